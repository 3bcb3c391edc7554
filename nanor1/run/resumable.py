"""Files of JSON lines that a killed command goes on with, and how far a command is.

Beside the file stands `FILE.progress.json`: the arguments, how many problems are done at which byte of the file, and
what has been counted. Lines are added batch by batch; a batch that was cut off is cut away and made again.
"""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nanor1.run.log import fsync, show_progress, write_json

SPARSE_S, LIVE_S = 30.0, 0.2  # between reports of progress: to a file, on a terminal


@dataclass
class Ledger:
    """How far a file is: what FILE.progress.json holds."""

    arguments: dict  # on which the lines depend
    n_problems: int
    n_done: int = 0
    n_bytes: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        return self.n_done == self.n_problems

    def append(self, path: Path | None, lines: list[dict], n_problems: int, counts: Counter[str]) -> None:
        """Add the lines of a batch where the last one ends: first the bytes are on the disk, then the ledger says so.

        Without a path nothing is written, and problems are counted only.
        """
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "replace")
        if path:
            with path.open("r+b") as file:
                file.seek(self.n_bytes)
                file.truncate()
                file.write(content)
            fsync(path)
        self.n_done, self.n_bytes = self.n_done + n_problems, self.n_bytes + len(content)
        self.counts = dict(Counter(self.counts) + counts)
        if path:
            write_json(ledger_path(path), asdict(self))


def ledger_path(path: str | Path) -> Path:
    return Path(f"{path}.progress.json")


def open_ledger(path: Path | None, arguments: dict, n_problems: int) -> Ledger:
    """Start a file, or cut one back to the last whole batch; ValueError where it is something else."""
    if path is None:
        return Ledger(arguments, n_problems)
    beside = ledger_path(path)
    if not beside.exists():
        if path.exists() and path.stat().st_size:
            raise ValueError(f"{path} is there already, without {beside.name} to continue it; give a new --out")
        touch(path)
        ledger = Ledger(arguments, n_problems)
        write_json(beside, asdict(ledger))
        return ledger
    try:
        ledger = Ledger(**json.loads(beside.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{beside} says nothing about lines ({error}); give a new --out") from error
    for name, value in arguments.items():
        if (before := ledger.arguments.get(name)) != value:
            raise ValueError(
                f"{path} was begun with {name} {before!r}, this is {value!r}; continue with the same, or give a new "
                "--out"
            )
    n_bytes = path.stat().st_size if path.exists() else -1
    if n_bytes < ledger.n_bytes:
        raise ValueError(f"{path} is shorter than {beside.name} says; delete both to start again")
    if n_bytes > ledger.n_bytes and not ledger.is_whole:
        os.truncate(path, ledger.n_bytes)
    return ledger


def work_through(ledger: Ledger, path: Path | None, batches: Sequence[tuple], make: Callable, say: Callable) -> None:
    """Add what `make` returns, lines and counts, of batch after batch; after Ctrl-C what is done stays.

    A batch is the arguments of `make`; the last one is the range of its problems.
    """
    if ledger.n_done:
        so_far = "is finished" if ledger.is_whole else f"goes on after {ledger.n_done} of {ledger.n_problems} problems"
        say(f"{path} {so_far}")
    n_problems = 0
    try:
        for *arguments, indices in batches:
            n_problems = len(indices)
            lines, counts = make(*arguments, indices)
            ledger.append(path, lines, n_problems, counts)
    except KeyboardInterrupt:
        show_progress()
        kept = f", kept in {path}; the same command goes on from there" if path else ""
        so_far = f"{ledger.n_done} of {ledger.n_problems} problems ({n_problems} under way lost)"
        say(f"stopped by Ctrl-C after {so_far}{kept}")
    show_progress()


def digest(asked: Sequence) -> str:
    """Changes when a question or what judges it does, as when the file that they are read from is edited."""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def touch(path: Path, option: str = "--out") -> None:
    """Make sure that a file can be written; ValueError if it cannot."""
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written ({error.strerror}); give another one") from error


def read_lines(path: Path) -> Iterator[dict]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is damaged ({error}); give a new --out") from error
            yield row


class Progress:
    """How far sampling is, on stderr: one line rewritten on a terminal, else a line now and then."""

    def __init__(self, n_answers: int, n_before: int = 0):
        """`n_before` of the answers were there before it began, and say nothing about the time left."""
        self.n_answers, self.n_before, self.n_done = n_answers, n_before, n_before
        self.n_tokens = self.n_tokens_done = 0  # all; those of answers that are done
        self.is_live = sys.stderr.isatty()
        self.start_s = self.shown_s = time.monotonic()

    def hear(self, n_tokens: int, lengths: Sequence[int] = ()) -> None:
        """So many tokens more were sampled, and answers of such lengths ended; of a search that is known at its end."""
        self.n_tokens += n_tokens
        self.n_done += len(lengths)
        self.n_tokens_done += sum(lengths)
        if time.monotonic() - self.shown_s >= (LIVE_S if self.is_live else SPARSE_S):
            self.show()

    def show(self) -> None:
        self.shown_s = time.monotonic()
        rate = self.n_tokens / (self.shown_s - self.start_s)
        text = f"{self.n_done}/{self.n_answers} answers, {self.n_tokens:,} tokens, {rate:.0f} tokens/s"
        if (n_new := self.n_done - self.n_before) and rate:
            # answers to come are as long as those that are done, and some of their tokens are there
            n_to_come = self.n_tokens_done * (self.n_answers - self.n_done) / n_new
            left_s = max(0.0, n_to_come - (self.n_tokens - self.n_tokens_done)) / rate
            text += f", about {left_s / 60:.0f} min left" if left_s > 90 else f", about {left_s:.0f} s left"
        if self.is_live:
            show_progress(text)
        else:
            print(text, file=sys.stderr, flush=True)
