"""The command line and config.json of a frozen dataclass."""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanor1.run.config import (
    apply_preset,
    from_json,
    load_arguments,
    option,
    parse_args,
    refuse_idle,
    to_json,
    user_errors,
)


@dataclass(frozen=True)
class Options:
    prompt: str = field(default="", metadata={"positional": True, "help": "what to ask"})
    steps: int = field(default=200, metadata={"help": "optimizer steps", "group": "training"})
    learning_rate: float = 1e-6
    compile: bool = False
    name: str = "all"
    top_k: Optional[int] = None  # noqa: UP045 (both spellings must work)
    folder: str | None = None
    level: Literal["low", "high"] = "low"
    choice: Literal["zero", "r1"] | None = None

    def validate(self):
        if self.steps > 1_000_000:
            raise ValueError(f"--steps is {self.steps}, and must be at most 1000000")


def parse(*argv: str, **keywords) -> Options:
    return parse_args(Options, argv, **keywords)[0]


def error_of(capsys, *argv: str, **keywords) -> str:
    """The one line on stderr with which parsing ends the program."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv, **keywords)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err.removeprefix("error: ").strip()


finite = st.floats(allow_nan=False, allow_infinity=False)
options = st.builds(
    Options,
    prompt=st.text(),
    steps=st.integers(max_value=1_000_000),
    learning_rate=finite,
    compile=st.booleans(),
    name=st.text(),
    top_k=st.none() | st.integers(),
    folder=st.none() | st.text().filter(lambda text: text.lower() != "none"),
    level=st.sampled_from(["low", "high"]),
    choice=st.sampled_from([None, "zero", "r1"]),
)


def as_argv(config: Options) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(config).items()]


@given(options)
def test_every_config_survives_the_command_line(config):
    parsed, given_names = parse_args(Options, as_argv(config))
    assert parsed == config
    assert given_names == {field.name for field in dataclasses.fields(Options)}


@given(options)
def test_every_config_survives_json(config):
    assert from_json(Options, json.loads(json.dumps(to_json(config), allow_nan=False))) == config


@given(st.lists(st.text() | st.sampled_from(["--steps", "--steps=1", "--no-compile", "-h", "--", "-1", "--config"])))
def test_any_command_line_is_read_or_refused_with_exit_code_0_or_2(argv):
    try:
        assert isinstance(parse(*argv), Options)
    except SystemExit as stop:
        assert stop.code in (0, 2)


def test_values_follow_their_option_or_an_equals_sign():
    config = parse("--steps", "1_000", "--learning-rate=-1e-6", "--name", "a,b", "--top-k", "none")
    assert (config.steps, config.learning_rate, config.name, config.top_k) == (1000, -1e-6, "a,b", None)
    assert parse("--name=").name == "" and parse("--learning-rate", "-1e-6").learning_rate == -1e-6


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--compile"], True),
        (["--no-compile"], False),
        (["--compile=false"], False),
        (["--compile", "true", "hello"], True),
        (["--compile", "hello"], True),
        (["--compile", "--no-compile"], False),
    ],
)
def test_a_bool_is_set_by_its_name_its_negation_or_a_word(flags, expected):
    assert parse(*flags).compile is expected


def test_a_positional_field_needs_no_option_name():
    assert parse("Why is -1 < 0?", "--steps", "3").prompt == "Why is -1 < 0?"
    assert parse("-3 + 4 = ?").prompt == "-3 + 4 = ?"


def test_a_second_positional_value_is_refused(capsys):
    assert "unexpected argument 'two'" in error_of(capsys, "one", "two")


def test_an_unknown_option_names_the_closest_known_one(capsys):
    assert error_of(capsys, "--stpes", "3") == "unknown option --stpes; did you mean --steps?"
    assert error_of(capsys, "-steps", "3") == "unknown option -steps; did you mean --steps?"
    assert error_of(capsys, "--zzzzzz=3") == "unknown option --zzzzzz"
    assert error_of(capsys, "--step", "3").startswith("unknown option --step;")  # no abbreviations


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "2.5"], "--steps: expected int, got '2.5'"),
        (["--steps", "true"], "--steps: expected int, got 'true'"),
        (["--learning-rate", "nan"], "--learning-rate: expected float, got 'nan'"),
        (["--learning-rate", "1e999"], "--learning-rate: expected float, got '1e999'"),
        (["--compile=maybe"], "--compile: expected bool, got 'maybe'"),
        (["--top-k", "many"], "--top-k: expected int|none, got 'many'"),
        (["--level", "3"], "--level: expected low|high, got '3'"),
        (["--level", "none"], "--level: expected low|high, got 'none'"),
        (["--choice", "r2"], "--choice: expected zero|r1|none, got 'r2'"),
        (["--steps"], "--steps needs a value: int"),
        (["--steps", "--compile"], "--steps needs a value: int"),
    ],
)
def test_a_wrong_value_is_refused_with_field_value_and_type(capsys, argv, message):
    assert error_of(capsys, *argv) == message


def test_validate_reports_like_any_other_error(capsys):
    assert error_of(capsys, "--steps", "1000001") == "--steps is 1000001, and must be at most 1000000"
    with pytest.raises(ValueError, match="at most 1000000"):
        from_json(Options, {"steps": 1_000_001})


def test_flags_override_the_config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"arguments": {"steps": 5, "name": "x"}, "commit": "abc"}))
    config, names = parse_args(Options, ["--steps", "7", f"--config={path}"])
    assert (config.steps, config.name, names, names.flags) == (7, "x", {"steps", "name"}, {"steps"})
    assert load_arguments(path) == {"steps": 5, "name": "x"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"stpes": 5}', "unknown key 'stpes' in FILE; did you mean steps?"),
        ('{"steps": 5.0}', "FILE: steps: expected int, got 5.0"),
        ('{"steps": true}', "FILE: steps: expected int, got True"),
        ('{"learning_rate": NaN}', "FILE: learning_rate: expected float, got nan"),
        ('{"learning_rate": "1e-6"}', "FILE: learning_rate: expected float, got '1e-6'"),
        ('{"name": [1]}', "FILE: name: expected str, got [1]"),
        ('{"level": true}', "FILE: level: expected low|high, got True"),
        ("[1]", "FILE must hold a JSON object of field names and values"),
        ('{"steps": ', "cannot read FILE as JSON: Expecting value: line 1 column 11 (char 10)"),
    ],
)
def test_a_wrong_config_file_is_named_with_the_key(tmp_path, capsys, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    assert error_of(capsys, "--config", str(path)) == message.replace("FILE", str(path))


def test_a_missing_config_file_is_named(tmp_path, capsys):
    assert str(tmp_path / "none.json") in error_of(capsys, "--config", str(tmp_path / "none.json"))


def test_a_preset_sets_only_what_the_user_did_not():
    preset = {"steps": 10, "learning_rate": 0.5}
    assert apply_preset(Options(steps=3), frozenset({"steps"}), preset) == Options(steps=3, learning_rate=0.5)


def test_help_shows_groups_types_defaults_and_stops(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help", description="Ask a model.")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "Ask a model." in text and "[PROMPT]" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines.index("training") + 1 == lines.index("--steps int optimizer steps (default: 200)")
    assert "--learning-rate float (default: 1e-06)" in lines
    assert "--compile, --no-compile (default: False)" in lines
    assert max(map(len, text.splitlines())) <= 120


SCRIPT = """
from nanor1.run.config import from_json, load_arguments, user_errors
from dataclasses import dataclass

@dataclass(frozen=True)
class Options:
    steps: int = 1

@user_errors()
def main():
    {body}

main()
"""


def run_script(body: str) -> tuple[int, str]:
    command = [sys.executable, "-c", SCRIPT.format(body=body)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("from_json(Options, {'stpes': 1})", "error: unknown key 'stpes' in config.json; did you mean steps?\n"),
        ("raise ValueError('prompt is 4100 tokens')", "error: prompt is 4100 tokens\n"),
        ("open('/no/such/file')", "error: [Errno 2] No such file or directory: '/no/such/file'\n"),
    ],
)
def test_user_errors_end_a_script_with_one_sentence(body, message):
    assert run_script(body) == (2, message)


@pytest.mark.parametrize(
    "body", ["assert False, 'broken'", "import json; json.loads('{')", "{}['missing']", "import ast; ast.parse('(')"]
)
def test_bugs_keep_their_traceback(body):
    code, stderr = run_script(body)
    assert code == 1 and stderr.startswith("Traceback")


def test_debug_shows_the_traceback_of_a_user_error(monkeypatch, capsys):
    monkeypatch.setenv("NANOR1_DEBUG", "1")
    with pytest.raises(SystemExit), user_errors():
        from_json(Options, {"stpes": 1})
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith(
        "\nerror: unknown key 'stpes' in config.json; did you mean steps?\n"
    )


# ---- ranges, and options without an effect


@dataclass(frozen=True, kw_only=True)
class Shared:
    seed: int = option(0, "of everything random", "shared", least=0)


@dataclass(frozen=True, kw_only=True)
class Ranged(Shared):
    share: float = option(0.5, "of all", "own", above=0, most=1)
    size: int = option(1, "of it", least=1, most=8, why=" (bytes)")
    limit: int | None = option(None, "none: no limit", least=1)
    every: int = option(0, "0: never", least=0, needs=("--limit", lambda config: config.limit))
    few_shot: str | None = option(None, "a file", alias="examples")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--share 0", "--share is 0.0; it must be above 0 and at most 1"),
        ("--share 1.01", "--share is 1.01; it must be above 0 and at most 1"),
        ("--share -1", "--share is -1.0"),
        ("--size 9", "--size is 9; it must be at least 1 and at most 8 (bytes)"),
        ("--limit 0", "--limit is 0; it must be at least 1"),
        ("--seed -1", "--seed is -1; it must be at least 0"),
    ],
)
def test_a_number_outside_its_range_is_refused_with_the_range(argv, said, capsys):
    with pytest.raises(SystemExit):
        parse_args(Ranged, argv.split())
    assert said in capsys.readouterr().err
    name, value = argv.removeprefix("--").split()
    with pytest.raises(ValueError, match=re.escape(said.split(";")[0])):  # and so from a file
        from_json(Ranged, {name: json.loads(value)})


def test_numbers_on_the_edge_of_a_range_and_none_are_taken():
    config, _ = parse_args(Ranged, ["--share", "1", "--size", "8", "--limit", "1", "--seed", "0"])
    assert (config.share, config.size, config.limit) == (1.0, 8, 1)
    assert parse_args(Ranged, ["--limit", "none"])[0].limit is None


@dataclass(frozen=True, kw_only=True)
class Placed(Shared):
    what: str = option("", "a word", positional=True, only=(("is for few", lambda c: c.seed < 3),))
    rate: int = option(
        1, "a rate", needs=("--seed", lambda c: c.seed), only=(("is for an even seed", lambda c: c.seed % 2 == 0),)
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("so --seed 3", "the what is for few"),
        ("--rate 2 --seed 1", "--rate is for an even seed"),  # the first that does not hold
        ("--rate 2", "--rate has no effect without --seed; give that, or leave it out"),
        ("--seed 4", "--seed is not for this script"),  # a rule of the script's own
        ("--seed 2 --rate 3 so", None),
    ],
)
def test_an_option_is_refused_by_its_rules_where_it_is_given(argv, said):
    config, given_names = parse_args(Placed, argv.split())
    with pytest.raises(ValueError, match=f"^{said}$") if said else contextlib.nullcontext():
        refuse_idle(config, given_names, {"seed": [("is not for this script", lambda c: c.seed != 4)]})


def test_a_flag_without_effect_is_refused_even_where_its_value_is_the_default(tmp_path):
    for argv in (["--every", "3"], ["--every", "0"]):
        with pytest.raises(ValueError, match="--every has no effect without --limit"):
            refuse_idle(*parse_args(Ranged, argv))
    refuse_idle(*parse_args(Ranged, ["--every", "3", "--limit", "5"]))
    stored = tmp_path / "config.json"
    stored.write_text(json.dumps({"arguments": {"every": 3}}))
    refuse_idle(*parse_args(Ranged, ["--config", str(stored)]))  # all arguments of another run, whatever it needed


def test_an_option_has_another_name_unless_a_field_is_called_so():
    assert parse_args(Ranged, ["--examples", "a.jsonl"])[0].few_shot == "a.jsonl"
    assert "few_shot" in parse_args(Ranged, ["--examples=a.jsonl"])[1]

    @dataclass(frozen=True, kw_only=True)
    class Taken(Ranged):
        examples: int = option(16, "an update")

    config, given = parse_args(Taken, ["--examples", "3"])
    assert (config.examples, config.few_shot) == (3, None) and given == {"examples"}


def test_help_shows_a_scripts_own_options_before_those_it_shares(capsys):
    with pytest.raises(SystemExit):
        parse_args(Ranged, ["--help"])
    shown = capsys.readouterr().out
    assert shown.index("own") < shown.index("--share") < shown.index("shared") < shown.index("--seed")


def test_a_program_that_asks_for_too_much_memory_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as stop, user_errors():
        raise MemoryError
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: this takes more memory than there is")
