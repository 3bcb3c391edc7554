"""What the system keeps from a program, and what goes on working."""

import math
import os
import re
import threading
from pathlib import Path

import pytest

from nanor1 import confine
from nanor1.sandbox import isolation, run_tests

LINUX_X86_OR_ARM = confine.IS_LINUX and os.uname().machine in confine.MACHINES


def dumpable():
    return confine.prctl(confine.PR_GET_DUMPABLE)


@pytest.mark.skipif(not LINUX_X86_OR_ARM, reason="Linux's")
def test_the_trainer_is_as_readable_as_before_once_the_last_of_several_has_judged():
    before, during = dumpable(), []

    def judge(seconds):
        assert run_tests(f"import time\ndef f(): time.sleep({seconds})", "f()").passed
        during.append(dumpable())

    threads = [threading.Thread(target=judge, args=(seconds,)) for seconds in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert during == [0, before] and dumpable() == before


WRITER = """
import os, pathlib

def f(folder):
    done = []
    for top in map(pathlib.Path, (folder, ".", "/tmp", "/dev/shm")):
        kept, new = top / "kept", top / "new"
        acts = [
            lambda: new.write_text("a"), new.mkdir, kept.unlink, top.rmdir, lambda: kept.rename(new),
            lambda: open(kept, "a").write("b"), lambda: os.truncate(kept, 0), lambda: os.symlink("/", new),
            lambda: os.link(kept, new), lambda: kept.chmod(0), lambda: os.utime(kept), lambda: os.mkfifo(new),
        ]
        for i, act in enumerate(acts):
            try:
                act()
                done.append(i)
            except OSError:
                pass
    return done
"""


@pytest.mark.skipif(not LINUX_X86_OR_ARM, reason="Landlock and seccomp are Linux's")
def test_nothing_can_be_written_or_removed(tmp_path):
    (tmp_path / "kept").write_text("here")
    verdict = run_tests(WRITER, f"assert f({str(tmp_path)!r}) == []")
    assert verdict.passed, verdict
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_text() == "here"


@pytest.mark.skipif(not LINUX_X86_OR_ARM, reason="Landlock and seccomp are Linux's")
def test_a_program_sees_an_empty_folder_and_an_empty_environment():
    program = "import os\ndef f(): return os.listdir('.'), set(os.environ)"
    allowed = {"LC_CTYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}  # the first is Python's own doing
    assert run_tests(program, f"files, names = f()\nassert files == [] and names <= {allowed}").reason == "passed"


USER = """
import asyncio, bisect, collections, dataclasses, datetime, decimal, enum, fractions, functools, hashlib, heapq
import itertools, math, random, re, string, threading, typing, zoneinfo
from concurrent.futures import ThreadPoolExecutor

@dataclasses.dataclass
class Point:
    x: typing.List[int]

def f(x):
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(abs, [*Point([x]).x, -1]))
"""


def test_what_programs_need_of_python_works():
    assert run_tests(USER, "assert f(3) == 4\nassert f(5) == 6").reason == "passed"


def test_numpy_fits_into_the_default_limits():
    program = "import numpy as np\ndef f(x): return (np.ones((x, x)) @ np.ones((x, x))).sum()"
    assert run_tests(program, "assert f(300) == 300.0 ** 3").reason == "passed"


def test_isolation_names_what_there_is():
    assert "limits" in isolation()
    if LINUX_X86_OR_ARM:
        assert "seccomp" in isolation()


HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_of_system_calls_are_those_of_the_headers(machine):
    if not Path(HEADERS[machine]).exists():
        pytest.skip(f"{HEADERS[machine]} is not installed")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(HEADERS[machine]).read_text()))
    named = [item.split("=") for item in confine.REFUSED[machine].split()]
    named += [[name, str(number)] for name, number in confine.JUDGED[machine].items()]
    known = [(name, number) for name, number in named if name in numbers]
    assert len(known) > 50 and all(numbers[name] == number for name, number in known)


@pytest.mark.parametrize("machine", confine.MACHINES)
def test_the_filter_is_whole_instructions_that_jump_forward_within_it(machine):
    program = confine.filter_program(machine, 1234)
    assert len(program) % 8 == 0
    n = len(program) // 8
    for i in range(n):
        code, if_true, if_false = program[8 * i], program[8 * i + 2], program[8 * i + 3]
        assert code in (0x20, 0x15, 0x45, 0x06) and i + 1 + max(if_true, if_false) <= n - (code != 0x06)
    assert math.log2(n) < 12  # the kernel takes 4096
