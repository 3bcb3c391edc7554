"""The run folder: what was run, what it measured, what it said.

    config.json      the arguments, versions, device, commit, command line and digests of data, written at the start
    metrics.jsonl    one line of scalars a step
    rollouts.jsonl   one line a kept rollout
    log.txt          every line that went to the console
    traces.jsonl     what a teacher answered before its student's first step; how far it is stands beside it
    summary.json     what the run came to, written at its end

Every line is flushed as it is written, so a killed run loses at most half a line; a resumed run first cuts the JSON
lines back to the step it resumes from. A run outlives its console: hours of work must not end with a terminal, or with
the program behind a pipe. Left out: other log services, and processes other than the one that logs (of several, let
only the first hold a RunLog). Source: the standard library; torch is imported only to ask its version.
"""

import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from nanor1.run.config import GONE, let_go

LINE_FILES = ("metrics.jsonl", "rollouts.jsonl", "log.txt")
CONSOLE_WIDTH = 120
LINES_PER_HEADER = 20
MADE_BEFORE = {"config.json", *LINE_FILES, "traces.jsonl", "traces.jsonl.progress.json"}  # anything is measured
Columns = Sequence[tuple[str, str, str]]


def default_run_folder(name: str, root: str | Path = "runs") -> Path:
    """Make and return an empty `root/name-YYYYMMDD-HHMMSS`, with `-2`, `-3`, ... where that second is taken."""
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in itertools.count(1):
        folder = Path(root) / (stem if attempt == 1 else f"{stem}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


class RunLog:
    """One run folder, open for appending. Columns are (key, label, format): ("reward", "reward", "6.3f")."""

    def __init__(self, folder: str | Path, columns: Columns = ()):
        self.folder = Path(folder)
        self.console = sys.stdout
        self.columns = [(key, label, spec, max(len(label), len(format(0, spec)))) for key, label, spec in columns]
        width = len("  step") + sum(2 + width for *_, width in self.columns)
        assert width <= CONSOLE_WIDTH, f"the columns take {width} characters of {CONSOLE_WIDTH}"
        self.files = {name: (self.folder / name).open("a", encoding="utf-8") for name in LINE_FILES}
        self.n_lines = 0
        self.warned: set[str] = set()

    @classmethod
    def create(
        cls,
        folder: str | Path,
        arguments: Mapping[str, object],
        columns: Columns = (),
        data_sha256: Mapping[str, str] | None = None,
    ) -> "RunLog":
        """Start a run in a new folder and write its config.json; ValueError where the folder holds a run.

        `data_sha256` are the digests of the files that it reads its data from.

        A run that failed before it logged a first line of metrics may be started again in its folder.
        """
        folder = Path(folder)
        if folder.exists() and not is_fresh(folder):
            raise ValueError(f"{folder} already holds files; choose another --out, or continue that run with --resume")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"the run folder {folder} cannot be made ({error.strerror}); choose another --out"
            ) from error
        made_of = {"arguments": dict(arguments), "data_sha256": dict(data_sha256 or {})}
        write_json(folder / "config.json", made_of | environment())
        return cls(folder, columns)

    @classmethod
    def open(cls, folder: str | Path, step: int | None, columns: Columns = ()) -> "RunLog":
        """Continue a run from its checkpoint at `step`: JSON lines of later steps and broken lines are cut away.

        None: a run without a checkpoint begins again, without the lines that it has.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is not a run folder: it has no config.json; check --resume")
        last = -1 if step is None else step
        n_cut = {name: cut_back(folder / name, last) for name in LINE_FILES if name.endswith(".jsonl")}
        log = cls(folder, columns)
        cuts = ", ".join(f"{n} lines from {name}" for name, n in n_cut.items() if n)
        how = "begun again, as there is no checkpoint," if step is None else f"resumed at step {step}"
        log.say(f"{how} by {shlex.join(sys.argv)}" + (f"; cut {cuts}" if cuts else ""))
        return log

    def metrics(self, step: int, values: Mapping[str, object]) -> None:
        """Append one step's scalars: floats to 6 significant digits, a nan or infinity as null with a warning."""
        self._append("metrics.jsonl", step, values)

    def rollouts(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Append one line a rollout, each with its step."""
        for row in rows:
            self._append("rollouts.jsonl", step, row)

    def _append(self, name: str, step: int, values: Mapping[str, object]) -> None:
        assert "step" not in values, "the step is given once, as an argument"
        non_finite: list[str] = []
        line = {"step": step} | {key: rounded(value, key, non_finite) for key, value in values.items()}
        self.files[name].write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self.files[name].flush()
        for key in sorted(set(non_finite)):
            self.say_once(key, f"warning: {key} is not finite at step {step}: written as null to {name} (said once)")

    def say(self, text: str) -> None:
        """Print to the console and to log.txt."""
        self._show(f"{text}\n")
        print(text, file=self.files["log.txt"], flush=True)

    def say_once(self, key: str, text: str) -> None:
        """Say the text, the first time that it is said under this key."""
        if key not in self.warned:
            self.warned.add(key)
            self.say(text)

    def line(self, step: int, values: Mapping[str, float | None]) -> None:
        """Say one aligned line of the columns, `-` where a value is missing, under a header every 20 lines."""
        if self.n_lines % LINES_PER_HEADER == 0:
            self.say("  step" + "".join(f"  {label:>{width}}" for _, label, _, width in self.columns))
        cells = [
            ("-" if values.get(key) is None else format(values[key], f), width) for key, _, f, width in self.columns
        ]
        self.say(f"{step:>6}" + "".join(f"  {cell:>{width}}" for cell, width in cells))
        self.n_lines += 1

    def _show(self, text: str) -> None:
        """Print to the console. When nobody reads it any more (`| head`, a closed terminal), stderr says so, once."""
        try:
            print(text, end="", file=self.console, flush=True)
        except OSError as error:
            if error.errno not in GONE:
                raise
            let_go(self.console)
            try:
                print(f"nobody reads the console; the run goes on: see {self.folder / 'log.txt'}", file=sys.stderr)
            except OSError:  # 2>&1
                let_go(sys.stderr)

    def summary(self, values: Mapping[str, object]) -> None:
        """Write summary.json, all of it or none; non-finite numbers are null."""
        write_json(self.folder / "summary.json", rounded(values, "summary", []))

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def show_progress(text: str = "") -> None:
    """Rewrite one line of the terminal that stderr is, without text clear it; silent where stderr is none."""
    if sys.stderr.isatty():
        line = text[: shutil.get_terminal_size().columns - 1]
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def rounded(value: object, name: str, non_finite: list[str]) -> object:
    """Round floats to 6 significant digits and make nans and infinities None, adding their names to `non_finite`.

    Example: `rounded({"loss": 0.123456789}, "metrics", [])` is `{"loss": 0.123457}`.
    """
    if isinstance(value, float) and not math.isfinite(value):
        non_finite.append(name)
        return None
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item, f"{name}.{key}", non_finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, name, non_finite) for item in value]
    return value


def is_fresh(folder: Path) -> bool:
    """Whether the folder is empty, or holds only what is made before anything is measured (or was in the making)."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()} - {f".{name}.tmp" for name in MADE_BEFORE}
    measured = [folder / name for name in LINE_FILES if name.endswith(".jsonl")]
    return names <= MADE_BEFORE and not any(path.exists() and path.stat().st_size for path in measured)


def cut_back(path: Path, step: int) -> int:
    """Keep the JSON lines whose step is at most `step`; drop later and broken ones, and return how many."""
    if not path.exists():
        return 0
    n_dropped = 0
    kept_path = path.with_name(f".{path.name}.kept")
    with path.open("rb") as lines, kept_path.open("wb") as kept:
        for line in lines:
            is_kept = is_up_to(line, step)
            kept.write(line if is_kept else b"")
            n_dropped += not is_kept
    fsync(kept_path)
    os.replace(kept_path, path)
    return n_dropped


def is_up_to(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically: a reader sees the old file or the new one, whenever the process dies."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk; where no folder can be opened, for files only."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows waits for what can be written
    except PermissionError:
        if is_folder:  # Windows
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def environment() -> dict[str, object]:
    """What a result depends on besides its arguments: command, start time, versions, device, commit."""
    commit, is_dirty = git_state(Path(__file__).resolve())
    return {
        "command": shlex.join(sys.argv),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("torch", "triton", "nanor1")},
        "device": device_name(),
        "commit": commit,
        "dirty": is_dirty,
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name() -> str:
    import torch  # here, not above: what only writes logs should not wait for torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu_info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpu_info.read_text()) if cpu_info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def git_state(source: Path) -> tuple[str | None, bool | None]:
    """The commit of the checkout that tracks `source`, and whether tracked files differ from it; None outside git."""
    run = partial(subprocess.run, cwd=source.parent, check=True, capture_output=True, text=True, timeout=20)
    try:
        # A package installed below somebody else's checkout must not report that checkout's commit.
        run(["git", "ls-files", "--error-unmatch", source.name])
        state = run(["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None, None
    return state.removesuffix("-dirty"), state.endswith("-dirty")
