"""Run model-written Python against tests: a verdict and a short reason, whatever the program is and does.

Tests are code that calls the program's functions and asserts (HumanEval, MBPP), or pairs of a script's standard input
and output. Each program runs in a process of its own (child.py): a new session, an empty environment and folder, no
network, no further process, nothing written but small files that go with it, limits on time, memory and output, all
killed at the end. The tests never enter that process. Their code runs in a second, equally confined one, which asks the
first for values and compares them; of scripts this process compares the output. A run that ends well proves nothing:
only values count.

Where the system cannot confine programs at all (Windows has neither fork nor resource limits), none is run: ValueError.

What this is not: a security boundary against a determined attacker. Program and trainer share a kernel, a user and a
machine; time and memory can be felt through; and where the system lacks a part, it is done without: `isolation()` says
what there is, confine.py what is lost. What the program may read: Python's own files and the system's libraries.
Without Landlock it is what the user may read, so also the files that tests are kept in: such a machine is not one to
pay for code on. The trainer's memory is closed to it on any Linux while programs run, and to debuggers but root's.

Left out: other languages, subprocesses for the program, functions as arguments, arguments changed in place.

Source of the design: the ways to cheat that are known from code rewards; see child.py for the system's side.
"""

import contextlib
import itertools
import math
import os
import re
import select
import site
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanor1.sandbox.child import EXITED, receive, send, shorten
from nanor1.sandbox.confine import PR_GET_DUMPABLE, PR_SET_DUMPABLE, prctl, resource

# Without `site` Python starts three times as fast; the folders it would find are added for the program alone.
OPTIONS = ["-I", "-S", "-X", "int_max_str_digits=0"]  # time limits numbers, too
START = """
import site, sys
site.setquit()  # exit() and quit()
sys.path.insert(0, sys.argv[1])
from nanor1.sandbox.child import keep
del sys.path[0]
keep(sys.argv[2:])
"""
START_S = 60  # until a jail that has a job must stand; a machine under load is slow
GRACE_S = 5  # beyond the program's own time, until its judge must have spoken

Tests = str | Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Verdict:
    """Whether the program passed, and why. `passed` is None where no judgement was possible: no reward, not 0.

    `isolation` names what confined the program on this machine.
    """

    passed: bool | None
    reason: str
    isolation: str = ""


def run_tests(program: str, tests: Tests, timeout_s: float = 5, memory_mib: int = 512) -> Verdict:
    """Judge one program. Raises nothing that depends on the program; ValueError on a system that cannot confine it.

    `tests` is code, in which the names that are neither builtin nor its own are the program's (and those that it
    imports `from program`), but for what a module has (`sys.getsizeof`); or a list of (input, output) for a script.
    `timeout_s` is for all of the code, and for each pair; `memory_mib` limits address space.

    >>> run_tests("def double(x): return x + 2", "assert double(2) == 4; assert double(3) == 6").reason
    'wrong answer: double(3) -> 5'
    """
    return run_many([(program, tests)], timeout_s, memory_mib, workers=1)[0]


def run_many(
    jobs: Sequence[tuple[str, Tests]], timeout_s: float = 5, memory_mib: int = 512, workers: int | None = None
) -> list[Verdict]:
    """Judge (program, tests) pairs as `run_tests` does, `workers` at a time (None: one for each CPU core)."""
    if not jobs:
        return []
    refuse_unconfined()
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    workers = min(len(jobs), workers or cores)
    left = list(enumerate(jobs))
    waiting = iter(left)  # one for all workers
    verdicts = [Verdict(None, "not judged")] * len(jobs)

    def work() -> None:
        with contextlib.closing(Jail(timeout_s, memory_mib)) as jail:
            for i, (program, tests) in waiting:
                verdicts[i] = jail.judge(program, tests)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    with unreadable:
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            left.clear()  # after Ctrl-C no further job is begun
    return verdicts


def isolation() -> str:
    """What confines programs on this machine, in words; "none" and the reason if nothing can be run."""
    try:
        verdict = run_tests("def f(): return 1", "assert f() == 1")
    except ValueError as error:
        return f"none: {error}"
    return verdict.isolation if verdict.passed else f"none: {verdict.reason}"


def refuse_unconfined() -> None:
    """ValueError where the system lacks what no program is run without."""
    parts = {"fork": hasattr(os, "fork"), "resource limits": resource is not None, "poll": hasattr(select, "poll")}
    if lacking := ", no ".join(name for name, is_there in parts.items() if not is_there):
        raise ValueError(
            f"model-written programs are not run here: {sys.platform} has no {lacking} to confine them; take another "
            "task, or Linux (on Windows: WSL)"
        )


class Unreadable:
    """While entered, by one thread or several: no other process of this user reads this one's memory and open files.

    Nor can a debugger or profiler attach, and no core is dumped, unless root asks.
    """

    def __init__(self):
        self.lock, self.before = threading.Lock(), []

    def __enter__(self):
        with self.lock:
            self.before.append(prctl(PR_GET_DUMPABLE))
            prctl(PR_SET_DUMPABLE, 0)

    def __exit__(self, *_):
        with self.lock:
            prctl(PR_SET_DUMPABLE, self.before.pop())  # whoever leaves last: what was found first


unreadable = Unreadable()  # one for the process, as the kernel's flag is


class Jail:
    """A keeper (child.py) with its folder: judges one job after another, and is started again after a bad one."""

    def __init__(self, timeout_s: float, memory_mib: int):
        self.timeout_s, self.memory_mib = timeout_s, memory_mib
        self.keeper, self.folder = None, None

    def judge(self, program: str, tests: Tests) -> Verdict:
        """One verdict; None for `passed` if the system or the tests are at fault."""
        if isinstance(tests, str):
            return self._run(program, tests, None)[0]
        verdict = Verdict(None, "there are no tests")
        for stdin, expected in tests:
            verdict, printed = self._run(program, None, stdin)
            if printed is not None:
                is_same = same_output(printed, expected)
                reason = "passed" if is_same else shorten(f"wrong output: {stdin!r:.80} -> {printed!r}")
                verdict = replace(verdict, passed=is_same, reason=reason)
            if not verdict.passed:
                break
        return verdict

    def _run(self, program: str, tests: str | None, stdin: str | None) -> tuple[Verdict, str | None]:
        """The verdict, and what a script printed if it ended well."""
        limits = {"timeout_s": self.timeout_s, "memory_mib": self.memory_mib}
        isolation = None
        try:
            self._start()
            send(self.keeper.stdin.fileno(), {"program": program, "stdin": stdin} | limits)
            send(self.keeper.stdin.fileno(), {"tests": tests} | limits)
            ready = self._hear(START_S)
            if "broken" in ready:
                raise OSError(ready["broken"])
            isolation = ", ".join(ready["layers"])
            told = self._hear(self.timeout_s + GRACE_S)
            passed, reason, printed = told["passed"], told["reason"], told.get("output")
            status = self._hear(GRACE_S)["status"]  # of the program's process
        except (OSError, EOFError, ValueError, KeyError) as error:  # TimeoutError is an OSError
            self.close()
            if isolation is None:
                return Verdict(None, f"the program could not be run: {error or type(error).__name__}"), None
            reason = "timeout" if isinstance(error, TimeoutError) else "its values ended the judge"
            return Verdict(False, reason, isolation), None
        if status < 0 and reason == EXITED:
            passed, reason, printed = False, f"killed by signal {-status}", None
        elif status > 0 and printed is not None:
            passed, reason, printed = False, f"exit code {status}", None
        return Verdict(passed, reason, isolation), printed

    def _start(self) -> None:
        if self.keeper is None:
            self.folder = tempfile.TemporaryDirectory(prefix="nanor1-sandbox-", ignore_cleanup_errors=True)
            self.keeper = subprocess.Popen(
                [sys.executable, *OPTIONS, "-c", START, str(Path(__file__).parents[2]), *site.getsitepackages()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self.folder.name,
                env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # numpy would start a thread a core
                start_new_session=True,
                bufsize=0,
            )
            self._hear(START_S)  # it can no longer be read

    def _hear(self, seconds: float) -> dict:
        return receive(self.keeper.stdout.fileno(), time.monotonic() + seconds)

    def close(self) -> None:
        """End the keeper and all it started, wait until they are gone, and remove the folder."""
        if self.keeper is not None:
            with self.keeper:
                self.keeper.terminate()  # it ends its children first; where it is dead already, they die with it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.keeper.communicate(timeout=GRACE_S)  # until the last of them has let go of what all hold
                self.keeper.kill()
            self.keeper = None
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None


# ---- what a script prints

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def same_output(printed: str, expected: str) -> bool:
    """Whether the lines have the same words; blanks at their ends and empty lines at the end count for nothing.

    Where a number is expected in decimals, any way to write it will do, to 6 digits: 0.5 for 0.500000, not 5 for 05.
    """
    ours, theirs = ([line.split() for line in text.rstrip().split("\n")] for text in (printed, expected))
    chain = itertools.chain.from_iterable
    return list(map(len, ours)) == list(map(len, theirs)) and all(map(_same_word, chain(ours), chain(theirs)))


def _same_word(printed: str, expected: str) -> bool:
    if printed == expected:
        return True
    if not (_NUMBER.fullmatch(expected) and _NUMBER.fullmatch(printed)) or expected.lstrip("+-").isdigit():
        return False
    return math.isclose(float(printed), float(expected), rel_tol=1e-6, abs_tol=1e-9)
