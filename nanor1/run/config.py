"""A frozen dataclass becomes a command line, and a config.json.

Every field is an option: `max_new_tokens: int` is set by `--max-new-tokens 5` or `--max-new-tokens=5`; a bool by
`--compile`, `--no-compile` or `--compile=false`; an Optional is emptied by `none`. A field is an int, float, str, bool
or Literal of strings, or one of these or None. What it accepts beside its type, and what it takes to have an effect, is
said where it stands (see `option`). Fields that scripts share are those of a base class; `--help` shows them behind the
script's own. `--config FILE.json` starts from the arguments of another run. What wins, weakest first: the default, the
preset, the file, the flags. Left out: nested configurations, subcommands, abbreviated names. Source: the standard
library only (argparse takes a bool's word for a positional value, and -1e-6 for an option).
"""

import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import json
import math
import operator
import os
import re
import sys
import textwrap
import traceback
import types
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

T = typing.TypeVar("T")
Values = dict[str, object]
Rule = tuple[str, Callable[[typing.Any], object]]  # words, and whether a Config has what they speak of
BOOL_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
MANY = 1_000_000  # more of anything that is held in memory at once is a slip of the finger
GONE = (errno.EPIPE, errno.EIO, errno.EINVAL)  # of printing: the reader ended, the terminal closed; on Windows the last
PACKAGE = Path(__file__).resolve().parents[1]


def option(
    default,
    help: str,
    group: str | None = None,
    *,
    positional: bool = False,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    why: str = "",
    needs: Rule | None = None,
    only: Sequence[Rule] = (),
    alias: str | None = None,
):
    """A field of a Config: its default, its help, and the heading that it opens.

    `positional`: its value needs no option name. A number is at `least` or `above`, and at `most`; `why` is said where
    it is not. `needs` is what gives the option an effect, in words, and whether a Config has it; `only` are what else
    must hold, each with what is said where it does not: see `refuse_idle`. `alias` is its other name.
    """
    if needs:
        only = [*only, (f"has no effect without {needs[0]}; give that, or leave it out", needs[1])]
    metadata = dict(help=help, group=group, positional=positional, only=only, alias=alias)
    return dataclasses.field(default=default, metadata=metadata | dict(range=(least, above, most, why)))


class Given(frozenset[str]):
    """The names of the fields that the command line set by flags or by `--config`; `flags` are the former alone."""

    flags: frozenset[str] = frozenset()


def fail(message: str) -> typing.NoReturn:
    """Print `error: message` to stderr and exit with 2; NANOR1_DEBUG=1 shows the traceback first."""
    if os.environ.get("NANOR1_DEBUG") == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError or OSError raised by nanor1 or its scripts into `fail`; also a decorator, `@user_errors()`.

    The same errors raised inside another package are a bug of ours, not of the user: they keep their traceback.
    Ctrl-C ends the program with 130, as a shell expects, and without one. Where nobody reads what it prints, as behind
    `| head`, it ends with 141 and no word, as programs do that SIGPIPE kills; a run goes on (see runlog.RunLog). What a
    console's encoding lacks is printed as a question mark; where there is no console from the start, all is dropped.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by `>&-`; pythonw.exe
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    consoles = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    for stream in consoles:
        stream.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            for stream in consoles:
                finish(stream)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    except MemoryError:
        fail("this takes more memory than there is; give smaller numbers")
    except (ValueError, OSError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        file = Path(frame.f_code.co_filename).resolve()
        if (
            not file.is_relative_to(PACKAGE)
            and file.parent != PACKAGE.parent
            and frame.f_globals.get("__name__") != "__main__"
        ):
            raise
        fail(str(error))


def finish(stream: typing.TextIO) -> None:
    """Print what is left to print; an error is raised once, and not shown again as the interpreter ends."""
    try:
        stream.flush()
    except OSError as error:
        let_go(stream)
        if error.errno in GONE:
            raise BrokenPipeError from error
        raise


def let_go(stream: typing.TextIO) -> None:
    """What is printed to a stream that nobody reads any more is dropped from here on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parse_args(Config: type[T], argv: Sequence[str] | None = None, *, description: str = "") -> tuple[T, Given]:
    """Read the command line (default: sys.argv[1:]) into a Config; what the user got wrong ends the program by `fail`.

    Returns the config and what was set by flags or by `--config`. The config's own `validate()`, if there is one, may
    raise ValueError.
    """
    try:
        flags = read_flags(Config, sys.argv[1:] if argv is None else argv, description)
        path = flags.pop("config", None)
        stored = {} if path is None else read_values(Config, load_arguments(path), path)
        given = Given(stored | flags)
        given.flags = frozenset(flags)
        return validated(Config(**stored | flags)), given
    except ValueError as error:
        fail(str(error))


def apply_preset(config: T, given: frozenset[str], preset: Values) -> T:
    """Set the fields that `preset` names, except those the user gave."""
    return dataclasses.replace(config, **{name: value for name, value in preset.items() if name not in given})


to_json = dataclasses.asdict


def from_json(Config: type[T], values: Values, source: str = "config.json") -> T:
    """Build a Config from parsed JSON; ValueError names `source` and the key that is unknown or mistyped."""
    return validated(Config(**read_values(Config, values, source)))


def load_arguments(path: str | Path) -> Values:
    """The arguments that a JSON file holds: a run's config.json, or a plain object of field names and values."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} as JSON: {error}") from error
    arguments = content.get("arguments", content) if isinstance(content, dict) else content
    if not isinstance(arguments, dict):
        raise ValueError(f"{path} must hold a JSON object of field names and values")
    return arguments


def read_values(Config: type, values: Values, source: str) -> Values:
    kinds = typing.get_type_hints(Config)
    for name in values:
        if name not in kinds:
            raise ValueError(f"unknown key {name!r} in {source}{suggestion(name, kinds)}")
    return {name: read_value(value, kinds[name], f"{source}: {name}") for name, value in values.items()}


def validated(config: T) -> T:
    """The config, if its numbers lie in their ranges and its own `validate()`, where it has one, agrees."""
    for field in fields(config):
        least, above, most, why = field.metadata.get("range", (None, None, None, ""))
        bounds = [("at least", least, operator.ge), ("above", above, operator.gt), ("at most", most, operator.le)]
        bounds = [bound for bound in bounds if bound[1] is not None]
        number = getattr(config, field.name)
        if number is not None and not all(holds(number, limit) for _, limit, holds in bounds):
            words = " and ".join(f"{word} {limit}" for word, limit, _ in bounds)
            raise ValueError(f"{option_name(field.name)} is {number}; it must be {words}{why}")
    getattr(config, "validate", lambda: None)()
    return config


def refuse_idle(config, given: Given, more: dict[str, Sequence[Rule]] = types.MappingProxyType({})) -> None:
    """ValueError for the first flag that was given and has no effect beside the others; call it after all presets.

    What `--config` gives is not looked at: it is all of another run's arguments. `more` are rules that a script has for
    options which it shares with others.
    """
    for field in fields(config):
        rules = [*more.get(field.name, ()), *field.metadata.get("only", ())]
        if field.name in given.flags and (broken := [why for why, holds in rules if not holds(config)]):
            name = f"the {field.name}" if field.metadata.get("positional") else option_name(field.name)
            raise ValueError(f"{name} {broken[0]}")


def read_value(value: object, kind: object, where: str, is_text: bool = False) -> object:
    """A JSON value, or a command line's text, as the field holds it; ValueError says `where` and what was expected."""
    inner, read, reason = without_none(kind), value, None
    if inner is not kind and (value is None or is_text and value.lower() == "none"):
        return None
    try:
        if is_text and inner in (int, float, bool):
            read = BOOL_WORDS.get(value.lower()) if inner is bool else inner(value)
        if inner is float and type(read) in (int, float) and math.isfinite(read):
            return float(read)
        if read in typing.get_args(inner) or (type(read) is inner and inner is not float):
            return read
    except (ValueError, OverflowError) as error:
        reason = error
    raise ValueError(f"{where}: expected {describe(kind)}, got {value!r}") from reason


def without_none(kind: object) -> object:
    """The type inside an Optional; any other type as it is."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind
    inner = [part for part in typing.get_args(kind) if part is not type(None)]
    assert len(inner) == 1, f"a field cannot have the type {kind}"
    return inner[0]


def describe(kind: object) -> str:
    """A type as help and errors show it: `int`, `zero|r1`, `int|none`."""
    inner = without_none(kind)
    shown = "|".join(typing.get_args(inner)) or inner.__name__
    return shown if inner is kind else f"{shown}|none"


def read_flags(Config: type, argv: Sequence[str], description: str) -> Values:
    """The fields that the command line sets; `--help` prints the help text and exits with 0."""
    kinds = {"config": str} | typing.get_type_hints(Config)
    names = {name: name for name in kinds} | aliases_of(Config)
    positional = deque(field.name for field in fields(Config) if field.metadata.get("positional"))
    tokens, values = deque(argv), {}
    while tokens:
        token = tokens.popleft()
        if token in ("-h", "--help"):
            print(help_text(Config, description))
            raise SystemExit(0)
        if not re.match(r"--\w|-[A-Za-z][\w-]*$", token):
            if not positional:
                raise ValueError(f"unexpected argument {token!r}; a value follows its option, as in --name value")
            name = positional.popleft()
            values[name] = read_value(token, kinds[name], name, is_text=True)
            continue
        flag, has_value, text = token.partition("=")
        word = flag.removeprefix("--").replace("-", "_")
        if word not in names and not has_value and kinds.get(word.removeprefix("no_")) is bool:
            values[word.removeprefix("no_")] = False
            continue
        if word not in names:
            raise ValueError(f"unknown option {flag}{suggestion(flag, map(option_name, names))}")
        kind, upcoming = kinds[names[word]], tokens[0] if tokens else "--"
        if not has_value and kind is bool and upcoming.lower() not in ("true", "false"):
            text = "true"
        elif not has_value and upcoming.startswith("--"):
            raise ValueError(f"{flag} needs a value: {describe(kind)}")
        elif not has_value:
            text = tokens.popleft()
        values[names[word]] = read_value(text, kind, flag, is_text=True)
    return values


def aliases_of(Config: type) -> dict[str, str]:
    """Other names of fields, less those that a field is called by."""
    aliases = {field.metadata["alias"]: field.name for field in fields(Config) if field.metadata.get("alias")}
    return {alias: name for alias, name in aliases.items() if alias not in typing.get_type_hints(Config)}


def option_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def suggestion(word: str, known: Iterable[str]) -> str:
    return "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(word, known, n=1, cutoff=0.6))


def help_text(Config: type, description: str) -> str:
    """What `--help` prints: usage, description, then every option under its group, with its type and default."""
    kinds, other_names = typing.get_type_hints(Config), {name: alias for alias, name in aliases_of(Config).items()}
    positional = [f"[{field.name.upper()}] " for field in fields(Config) if field.metadata.get("positional")]
    lines = [f"usage: {Path(sys.argv[0]).name} {''.join(positional)}[--option value ...]", "", description.strip()]
    shared = {name for base in Config.__mro__[1:] for name in inspect.get_annotations(base)}
    for index, field in enumerate(sorted(fields(Config), key=lambda field: field.name in shared)):
        if index == 0 or field.metadata.get("group"):
            lines += ["", field.metadata.get("group") or "options"]
        name, kind = option_name(field.name), kinds[field.name]
        name += f", {option_name(other_names[field.name])}" if field.name in other_names else ""
        left = f"{name}, --no-{name[2:]}" if kind is bool else f"{name} {describe(kind)}"
        lines.append(two_columns(left, f"{field.metadata.get('help', '')} (default: {field.default})"))
    return "\n".join([*lines, two_columns("--config FILE.json", "start from the arguments of a run's config.json")])


def two_columns(left: str, right: str) -> str:
    return textwrap.fill(right.strip(), 110, initial_indent=f"  {left:<28}  ", subsequent_indent=" " * 32)
