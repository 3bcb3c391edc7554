"""Model-written programs: what is judged, what cannot be faked, and that nothing hangs or stays behind."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanor1.sandbox import child, confine, jobs
from nanor1.sandbox.jobs import isolation, run_many, run_tests, same_output

TESTS = "assert f(3) == 4\nassert f(5) == 6"
NEEDLE = 918273645
HUNTED = f"assert f(3) == {NEEDLE}"
FOUND = r"re.findall(rb'assert f\(3\) == (\d+)', memory)"

# name: (program, what the reason says). None of them may pass `TESTS`.
HOSTILE = {
    "exits with 0": ("import sys; sys.exit(0)", "exited before answering"),
    "exits with 0 at once": ("import os; os._exit(0)", "exited before answering"),
    "exits when called": ("import os\ndef f(x): os._exit(0)", "exited before answering"),
    "raises SystemExit when called": ("import sys\ndef f(x): sys.exit(0)", "exited before answering"),
    "prints passed": ("print('passed'); print('1 passed in 0.01s'); import os; os._exit(0)", "exited before answering"),
    "patched builtins": (
        "import builtins, json\nbuiltins.len = builtins.all = lambda *a: True\nbuiltins.AssertionError = Exception\n"
        "builtins.print = json.dumps = json.loads = lambda *a, **k: '{\"passed\": true}'\ndef f(x): return 0",
        "",
    ),
    "an object that equals everything": (
        "class Any:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return Any()",
        "wrong answer",
    ),
    "an int that equals everything": (
        "class Any(int):\n    def __eq__(self, other): return True\ndef f(x): return Any(7)",
        "wrong answer: f(3) -> 7",
    ),
    "a str that equals everything": ("class S(str):\n    __eq__ = lambda *a: 1\ndef f(x): return S(9)", "f(3) -> '9'"),
    "a list that equals everything": ("class S(list):\n    __eq__ = lambda *a: 1\ndef f(x): return S()", "f(3) -> []"),
    "an exception that ends loops": ("def f(x): raise StopIteration", "raised StopIteration"),
    "a patched hook": ("import sys\nsys.excepthook = lambda *a: None\ndef f(x): assert x < 0", "AssertionError"),
    "atexit": ("import atexit, os\natexit.register(os._exit, 0)\nraise ValueError('x')", "ValueError: x"),
    "forged answers at once": (
        "import os, json, struct\nt = json.dumps({'token': 'a' * 32, 'value': 4}).encode()\n"
        "for fd in range(3, 64):\n    try: os.write(fd, (struct.pack('>I', len(t)) + t) * 9)\n"
        "    except OSError: pass\ndef f(x): return 0",
        "an answer to no question",
    ),
    "forged verdicts": (
        "import os, json, struct\nt = json.dumps({'passed': True, 'reason': 'passed', 'status': 0}).encode()\n"
        "for fd in range(0, 64):\n    try: os.write(fd, (struct.pack('>I', len(t)) + t) * 9)\n"
        "    except OSError: pass\nos._exit(0)",
        "an answer to no question",
    ),
    "noise on all files": (
        "import os\nfor fd in range(0, 64):\n    try: os.write(fd, b'\\x00\\x00\\x00\\x02ab' * 50)\n"
        "    except OSError: pass\ndef f(x): return x + 1",
        "an answer that is none",
    ),
    "closed pipes": ("import os\nos.closerange(0, 64)\ndef f(x): return x + 1", "exited before answering"),
    "swapped pipes": ("import os\nos.dup2(3, 4)\ndef f(x): return x + 1", ""),
    "an endless loop": ("while True: pass", "timeout"),
    "an endless loop when called": ("def f(x):\n    while True: pass", "timeout"),
    "ignored signals": (
        "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass",
        "timeout",
    ),
    "threads that do not end": (
        "import threading, time\nfor _ in range(3): threading.Thread(target=time.sleep, args=(99,)).start()\nf = abs",
        "wrong answer",
    ),
    "a bomb of threads": (
        "import threading, time\nthreading.stack_size(1 << 15)\nwhile True:\n"
        "    threading.Thread(target=time.sleep, args=(99,)).start()",
        "",
    ),
    "a fork bomb": ("import os\nwhile True: os.fork()", "PermissionError"),
    "a fork bomb that goes on": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout"),
    "a daemon": ("import os\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    import time; time.sleep(99)", ""),
    "a subprocess": ("import subprocess\nsubprocess.run(['sleep', '99'])", ""),
    "a shell": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'sleep 99'])", "PermissionError"),
    "a socket": ("import socket\nsocket.socket()", "PermissionError"),
    "a memory bomb": ("x = 'a' * (1 << 40)", "memory"),
    "a memory bomb when called": ("def f(x):\n    a = []\n    while True: a.append(bytes(1 << 24))", "memory"),
    "a huge value": ("def f(x): return 'a' * (1 << 26)", ""),
    "a long list": ("def f(x): return [0] * (1 << 22)", ""),
    "an endless iterator": ("import itertools\ndef f(x): return itertools.count()", ""),
    "a value in itself": ("def f(x):\n    a = []\n    a.append(a)\n    return a", "RecursionError"),
    "a deep value": ("def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a", ""),
    "a huge number": ("def f(x): return 10 ** (10 ** 5)", ""),
    "not a number": ("def f(x): return float('nan')", "f(3) -> nan"),
    "deep recursion": ("def f(x): return f(x)", "RecursionError"),
    "bottomless recursion": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return sorted([x], key=f)\n", "",
    ),
    "gigabytes of output": ("while True: print('a' * 10 ** 6)", "timeout"),
    "an error that cannot be told": (
        "class E(Exception):\n    def __str__(self): raise self\ndef f(x): raise E", "an error that cannot be told",
    ),
    "an error of a gigabyte": ("def f(x): raise ValueError('a' * 10 ** 8)", "ValueError: aaa"),
    "standard input": ("x = input()", "EOFError"),
    "no such function": ("def g(x): return x + 1", "no such function f"),
    "nothing": ("", "no such function f"),
    "no Python": ("def f(x) return x", "syntax error"),
    "NUL": ("def f(x):\0 return 1", ""),
    "a lone surrogate": ("def f(x): return '\ud800'", "syntax error"),
    "deep parentheses": ("(" * 10_000, "syntax error"),
    "ten megabytes": ("x = [" + "0," * 5_000_000 + "]", ""),
    "a foreign encoding": ("# coding: no-such-code\nf = abs", "syntax error"),
    "the parent killed": (
        f"import os\nfor pid in (os.getppid(), {os.getpid()}, -1, 0):\n"
        "    try: os.kill(pid, 9)\n    except OSError: pass\nf = abs",
        "wrong answer",
    ),
    "the parent's limits": (
        f"import resource\nresource.prlimit({os.getpid()}, resource.RLIMIT_CPU, (1, 1))", "PermissionError",
    ),
    "own limits": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))", ""),
}  # fmt: skip

# Programs that look for the tests wherever they could be; `f` returns what it finds.
HUNTERS = {
    "frames and objects": (
        "import gc, sys, re\ndef f(x):\n    frame, seen = sys._getframe(), []\n    while frame:\n"
        "        seen += [repr(frame.f_locals), repr(frame.f_globals)]\n        frame = frame.f_back\n"
        "    seen += [o for o in gc.get_objects() if isinstance(o, str)]\n"
        "    seen += [repr(vars(m)) for m in list(sys.modules.values()) if m]\n"
        f"    memory = ''.join(seen).encode()\n    return [*map(int, {FOUND}), 0][0]"
    ),
    "memory of processes": (
        "import re, os\ndef f(x):\n    memory = b''\n"
        "    for pid in [os.getppid(), 'self', *range(PARENT, PARENT + 300)]:\n"
        "        try:\n            for line in open(f'/proc/{pid}/maps'):\n"
        "                low, high = (int(n, 16) for n in line.split()[0].split('-'))\n"
        "                with open(f'/proc/{pid}/mem', 'rb', 0) as file:\n"
        "                    file.seek(low)\n                    memory = file.read(min(high - low, 1 << 24))\n"
        f"                    for n in {FOUND}: return int(n)\n        except (OSError, ValueError): pass\n    return 0"
    ).replace("PARENT", str(os.getpid())),
    "what processes show": (
        "import re, glob\ndef f(x):\n    memory = b''\n    for name in glob.glob('/proc/*/*'):\n"
        "        try: memory += open(name, 'rb').read(1 << 20)\n        except OSError: pass\n"
        f"    return [*map(int, {FOUND}), 0][0]"
    ),
    "open files": (
        "import os, re\ndef f(x):\n    memory = b''\n    for fd in range(64):\n        if fd in (3, 4): continue\n"
        "        try: memory += os.read(fd, 1 << 20)\n        except OSError: pass\n"
        f"    return [*map(int, {FOUND}), 0][0]"
    ),
    "files": (
        "import os, re\ndef f(x):\n    memory = b''\n    for top in ('.', '/tmp', '/root', '/home', '/dev/shm'):\n"
        "        for folder, _, names in os.walk(top):\n            for name in names[:9]:\n"
        "                try: memory += open(os.path.join(folder, name), 'rb').read(1 << 16)\n"
        f"                except OSError: pass\n    return [*map(int, {FOUND}), 0][0]"
    ),
}


def processes(marker):
    """The processes whose command line holds the marker."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found += [folder.name] if marker.encode() in (folder / "cmdline").read_bytes() else []
        except OSError:
            pass
    return found


@pytest.fixture(scope="module")
def hostile():
    """All hostile programs judged at once: their verdicts, the seconds taken, processes and files left behind."""
    marker = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(tempfile, "tempdir", folder)
        patch.setattr(jobs, "START", f"{jobs.START}  # {marker}")
        started = time.monotonic()
        asked = [(program, TESTS) for program, _ in HOSTILE.values()]
        asked += [(program, HUNTED) for program in HUNTERS.values()]
        verdicts = run_many(asked, timeout_s=1, memory_mib=300)
        seconds = time.monotonic() - started
        left = processes(marker), sorted(os.listdir(folder))
    return dict(zip([*HOSTILE, *HUNTERS], verdicts, strict=True)), seconds, left


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_fails_with_its_reason(hostile, name):
    verdict = hostile[0][name]
    assert verdict.passed is False and HOSTILE[name][1] in verdict.reason, verdict
    assert verdict.reason and len(verdict.reason) < 300


@pytest.mark.parametrize("name", HUNTERS)
def test_the_tests_are_nowhere_a_program_can_look(hostile, name):
    assert hostile[0][name].passed is False and str(NEEDLE) not in hostile[0][name].reason, hostile[0][name]


def test_hostile_programs_leave_no_process_and_no_file_and_take_bounded_time(hostile):
    _, seconds, left = hostile
    assert left == ([], [])
    assert seconds < 3 * len(hostile[0])


def test_a_program_that_finds_the_answer_would_be_noticed():
    program = HUNTERS["frames and objects"] + f"\nsource = 'assert f(3) == {NEEDLE}'"
    assert run_tests(program, HUNTED).passed


@pytest.mark.parametrize(
    "tests",
    [TESTS, "def check(c):\n    assert c(3) == 4\n    assert c(x=5) == 6\ncheck(f)", "from program import f\n" + TESTS],
)
def test_a_right_program_passes_however_the_tests_call_it(tests):
    assert run_tests("print('loaded')\ndef f(x):\n    print(x)\n    return x + 1", tests).passed


VALUES = """None True False 0 -1 10**40 0.1 -0.0 1e300 float('inf') 2j 'a\\n"\\u00e9\\ud800' b'\\x00\\xff' [] () {}
[1,[2]] (1,(2,),[3]) {1,2} frozenset({(1,2)}) {1:'a',(2,3):[4]} range(2,9,3)""".split()


def test_values_come_back_as_they_are_with_their_types():
    program = "def f(*values, **named): return values[0] if values else named['v']"
    tests = [f"v = {value}\nassert f(v) == v and type(f(v)) is type(v) and repr(f(v=v)) == repr(v)" for value in VALUES]
    assert [v.reason for v in run_many([(program, test) for test in tests])] == ["passed"] * len(VALUES)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("iter([1, 2])", "list(f()) == [1, 2]"),
        ("map(str, [1, 2])", "list(f()) == ['1', '2']"),
        ("{1: 2}.keys()", "sorted(f()) == [1]"),
        ("__import__('collections').Counter('aab')", "f() == {'a': 2, 'b': 1} and type(f()) is dict"),
        ("__import__('collections').namedtuple('P', 'x y')(1, 2)", "f() == (1, 2)"),
        ("__import__('re').match('a', 'a')", "f()"),
        ("__import__('re').match('a', 'b')", "not f()"),
        ("__import__('numpy').arange(3)", "f() == [0, 1, 2]"),
        ("__import__('numpy').float32(0.5)", "f() == 0.5"),
        ("type('S', (), {'twice': lambda self, x: 2 * x})()", "f().twice(4) == 8"),
    ],
)
def test_what_a_literal_cannot_say_becomes_plain_or_stays_with_the_program(value, expected):
    assert run_tests(f"def f(): return {value}", f"assert {expected}").reason == "passed"


single = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
plain = st.recursive(
    single | st.sets(st.integers()),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(plain)
@settings(max_examples=50)
def test_encoding_is_undone_by_decoding(value):
    again = child.decode(json.loads(json.dumps(child.encode(value, None))), None)
    assert again == value and type(again) is type(value)


def test_errors_reach_the_tests_that_expect_them():
    tests = "try: f(0)\nexcept ZeroDivisionError: pass\nelse: assert False\nassert f(2) == 0.5"
    assert run_tests("def f(x): return 1 / x", tests).passed
    assert run_tests("def f(x): return 1 / x", "assert f(0) == 1").reason == (
        "wrong answer: f(0) raised ZeroDivisionError: division by zero"
    )


@pytest.mark.parametrize(
    ("error", "caught"),
    [
        ("ValueError", "ValueError"),
        ("type('Own', (ValueError,), {})", "ValueError"),
        ("type('Own', (type('Other', (KeyError,), {}),), {})", "KeyError"),
        ("type('Own', (TypeError, ValueError), {})", "TypeError"),
        ("type('Own', (Exception,), {})", "Exception"),
        ("type('Own', (TimeoutError,), {})", "TimeoutError"),
        ("FileNotFoundError", "OSError"),
        ("RecursionError", "RuntimeError"),
    ],
)
def test_an_error_comes_back_as_its_nearest_builtin_class_with_its_message(error, caught):
    tests = f"try: f()\nexcept {caught} as error: assert 'a: b' in str(error)\nelse: assert False"
    assert run_tests(f"def f(): raise {error}('a: b')", tests).reason == "passed"


def test_an_error_that_a_text_does_not_make_comes_back_as_what_it_derives_from():
    tests = "try: f()\nexcept ValueError: pass\nelse: assert False"
    assert run_tests(r"def f(): return b'\xff'.decode()", tests).reason == "passed"


def test_an_error_that_is_only_named_like_a_builtin_one_is_none():
    tests = "try: f()\nexcept ValueError: assert False\nexcept Exception: pass"
    assert run_tests("class ValueError(Exception): pass\ndef f(): raise ValueError", tests).passed


def test_a_test_that_catches_everything_cannot_hide_that_the_program_is_gone():
    tests = "try: f(1)\nexcept BaseException: pass\n"
    assert run_tests("import os\ndef f(x): os._exit(0)", tests).reason == "exited before answering"
    assert run_tests("def f(x):\n    while True: pass", tests, timeout_s=0.3).reason == "timeout"


def test_an_error_does_not_end_a_loop_of_the_tests_early():
    tests = "assert list(map(f, [1, 2])) == []"
    assert run_tests("def f(x): raise StopIteration", tests).passed is False


def test_names_of_the_program_do_not_replace_those_of_the_tests():
    program = "def set(x): return 0\ndef abs(x): return 0\ndef helper(x): return 0\ndef f(x): return [9]"
    tests = "def helper(x): return x\nassert set(f(1)) == set([8]) or abs(f(1)[0] - 1) == 0 or helper(1) == 0"
    assert run_tests(program, tests).passed is False
    assert run_tests("def sum(a): return 6", "from program import sum\nassert sum(1) == 6").passed


@pytest.mark.parametrize(
    ("program", "tests", "passes"),
    [
        ("class sys: getsizeof = lambda x: 0\ndef f(x): return 0", "assert f(3) == sys.getsizeof(3)", False),
        ("import sys\ndef f(x): return sys.getsizeof(x)", "assert f(3) == sys.getsizeof(3)", True),
        ("class math: isclose = lambda *a: True\ndef f(x): return 0", "assert math.isclose(f(3), 1)", False),
        ("os = 1\ndef f(x): return x", "def check(c): assert os.path.join('a', 'b') == c('a/b')\ncheck(f)", True),
        ("class np: allclose = lambda *a: True\ndef f(x): return [0, x]", "assert np.allclose(f(3), [1, 3])", False),
        ("def f(x): return [1, x]", "assert np.allclose(f(3), [1, 3])", True),
        ("def copy(x): return [x]", "assert copy(3) == [3]", True),
        ("def bisect(a, x): return x", "assert bisect([], 3) == 3", True),
        ("class queue: put_all = lambda x: x", "assert queue.put_all(3) == 3", True),
        ("def f(x): return x\ne = 0", "def set_e():\n    global e\n    e = 3\nset_e()\nassert f(0) == e", False),
        ("def f(x): return x\nsqrt = abs", "from math import *\nassert f(3) == sqrt(9)", True),
        ("def f(x): return x", "from program import *\nassert f(3) == 3", True),
    ],
)
def test_modules_that_tests_name_are_the_judges_own_and_what_they_call_is_the_programs(program, tests, passes):
    assert run_tests(program, tests).passed is passes


def test_tests_may_print():
    tests = "import sys\nprint('a' * 10**5, flush=True)\nprint('b', file=sys.stderr)\nassert f(3) == 4"
    assert run_tests("def f(x): return x + 1", tests).reason == "passed"


def test_a_program_is_new_for_every_job_but_keeps_its_state_within_one():
    program = "n = 0\ndef f():\n    global n\n    n += 1\n    return n"
    assert all(verdict.passed for verdict in run_many([(program, "assert (f(), f()) == (1, 2)")] * 3, workers=1))


@pytest.mark.parametrize("tests", ["", "x = 1", "assert (", "import no_such_module\nassert f(1)", "assert False", []])
def test_tests_that_do_not_run_or_call_nothing_give_no_verdict(tests):
    assert run_tests("def f(x): return x", tests).passed is None


def test_a_jail_that_cannot_be_started_gives_no_verdict(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    verdict = run_tests("def f(x): return x + 1", TESTS)
    assert verdict.passed is None and "No such file" in verdict.reason
    assert isolation().startswith("none: ")


def test_a_jail_that_breaks_gives_no_verdict(monkeypatch):
    monkeypatch.setattr(jobs, "START", "raise SystemExit(1)")
    assert [verdict.passed for verdict in run_many([("f = abs", TESTS)] * 2)] == [None, None]


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


@pytest.mark.skipif(not confine.IS_LINUX, reason="processes are found in /proc")
def test_a_killed_trainer_takes_its_programs_along(tmp_path):
    marker = uuid.uuid4().hex
    code = f"sandbox.START += '  # {marker}'\nsandbox.run_tests('while True: pass', 'assert f()', timeout_s=60)"
    command = [sys.executable, "-c", f"from nanor1.sandbox import jobs as sandbox\n{code}"]
    trainer = subprocess.Popen(command, cwd=Path(__file__).parents[1], env={"TMPDIR": str(tmp_path)})
    wait_for(lambda: len(processes(marker)) == 4)  # itself, the keeper, the judge and the program
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not processes(marker))


@pytest.mark.skipif(not confine.IS_LINUX, reason="processes are found in /proc")
@pytest.mark.parametrize("is_killed_first", [False, True])
def test_a_jail_is_closed_when_all_its_processes_are_gone(monkeypatch, is_killed_first):
    marker = uuid.uuid4().hex
    monkeypatch.setattr(jobs, "START", f"{jobs.START}  # {marker}")

    def receive(*arguments):
        message = child.receive(*arguments)
        if "layers" not in message:
            return message
        assert len(processes(marker)) == 3  # the program stands confined
        if is_killed_first:
            started.keeper.kill()
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "receive", receive)
    with pytest.raises(KeyboardInterrupt), contextlib.closing(jobs.Jail(60, 300)) as started:
        started.judge("while True: pass", TESTS)
    assert processes(marker) == []


FORGER = """
import json, os, struct, time
def read(n):
    return b"".join(os.read(3, 1) for _ in range(n))
def say(raw):
    raw = struct.pack(">I", len(raw)) + raw
    while raw:
        raw = raw[os.write(4, raw):]
say(b'{"loaded": true}')
"""
EQUAL_HASHES = """
call = json.loads(read(*struct.unpack(">I", read(4))))
say(json.dumps(call | {"value": {"set": [i * (2 ** 61 - 1) for i in range(100_000)]}}).encode())
time.sleep(99)
"""
SLOW = {
    "a program that never reads": (FORGER + "time.sleep(99)", "f('a' * 10 ** 6)"),
    "a set of equal hashes": (FORGER + EQUAL_HASHES, "f(1)"),
    "a huge range": ("def f(x): return range(10 ** 15)", "assert sum(f(1)) == 2"),
    "tests that do not end": ("def f(x): return 1", "while True: f(1)"),
}


def test_the_judges_time_is_the_programs_whatever_it_returns():
    with contextlib.closing(jobs.Jail(5, 512)) as one:
        assert one.judge("f = abs", "assert f(-1) == 1").passed
        keeper, one.timeout_s = one.keeper, 0.3
        for name, (program, tests) in SLOW.items():
            started = time.monotonic()
            verdict = one.judge(program, tests)
            assert (verdict.passed, verdict.reason) == (False, "timeout"), name
            assert time.monotonic() - started < 4, name
        one.timeout_s = 5
        assert one.judge("f = abs", "assert f(-1) == 1").passed and one.keeper is keeper


def test_no_jobs_give_no_verdicts():
    assert run_many([]) == []


def test_after_an_interrupt_no_further_job_is_begun(monkeypatch):
    begun, threads, join = [], [], threading.Thread.join

    def interrupt(thread):
        threads.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.Jail, "judge", lambda *job: begun.append(job) or time.sleep(0.1))
    monkeypatch.setattr(threading.Thread, "join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_many([("f = abs", TESTS)] * 9, workers=1)
    join(threads[0])
    assert len(begun) <= 1


def test_more_workers_judge_at_the_same_time():
    jobs = [("import time\ndef f(x):\n    time.sleep(0.5)\n    return x", "assert f(1) == 1")] * 6
    started = time.monotonic()
    assert all(verdict.passed for verdict in run_many(jobs, workers=6))
    assert time.monotonic() - started < 2.5


# ---- scripts


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print(int(input()) + 1)", "passed"),
        ("import sys\nprint(int(sys.stdin.read()) + 1, end='')", "passed"),
        ("print(int(open(0).read()) + 1)\nraise SystemExit", "passed"),
        ("import os\nprint(int(input()) + 1, flush=True)\nos._exit(0)", "passed"),
        ("import threading\nthreading.Thread(target=lambda: print(int(input()) + 1)).start()", "passed"),
        ("if __name__ == '__main__': print(int(input()) + 1)", "passed"),
        ("import sys\nprint(int(input()) + 1)\nsys.exit(1)", "exit code 1"),
        ("print(4)", "wrong output: '5' -> '4\\n'"),
        ("print('passed')", "wrong output: '3\\n' -> 'passed\\n'"),
        ("pass", "wrong output: '3\\n' -> ''"),
        ("print(4); print(int(input()) / 0)", "ZeroDivisionError: division by zero"),
        ("import os, signal\nprint(4, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9"),
        ("while True: print('a' * 10 ** 6)", "output limit"),
        ("import os\nos.closerange(0, 64)\nwhile True: pass", "killed by signal 9"),
        ("import os\nos.close(1)\nwhile True: pass", "timeout"),
        ("import atexit, time\nprint(int(input()) + 1)\natexit.register(time.sleep, 99)", "timeout"),
        ("import os\nos.write(2, b'a' * 10 ** 7)\nprint(int(input()) + 1)", "passed"),
        ("def f(x) print", "syntax error: expected ':' (line 1)"),
    ],
)
def test_a_script_is_judged_by_what_it_prints(program, reason):
    verdict = run_tests(program, [("3\n", "4\n"), ("5", "6")], timeout_s=0.8)
    assert (verdict.reason, verdict.passed) == (reason, reason == "passed")


# Scripts that print the sum of the second line's numbers, each in a way that is usual; and what scripts do besides.
HONEST = {
    "exit": "input()\nprint(sum(map(int, input().split())))\nexit()",
    "quit": "input()\nprint(sum(map(int, input().split())))\nquit(0)",
    "exit that is caught": "input()\nprint(sum(map(int, input().split())))\ntry: exit()\nexcept SystemExit: pass",
    "a deep thread": (
        "import sys, threading\nsys.setrecursionlimit(10 ** 6)\nthreading.stack_size(2 ** 27)\n"
        "def depth(n): return n and 1 + depth(n - 1)\ndef main():\n    depth(50_000)\n    input()\n"
        "    print(sum(map(int, input().split())))\nmain = threading.Thread(target=main)\nmain.start()\nmain.join()"
    ),
    "the buffer": "import sys\nn, a, b = map(int, sys.stdin.buffer.read().split())\nprint(a + b)",
    "a name of standard input": "input = open('/dev/stdin').readline\ninput()\nprint(sum(map(int, input().split())))",
    "os.read": (
        "import io, os\ninput = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline\ninput()\n"
        "os.write(1, b'%d' % sum(map(int, input().split())))"
    ),
    "lines until the end": (
        "lines = []\nwhile True:\n    try: lines.append(input())\n    except EOFError: break\n"
        "print(sum(map(int, lines[1].split())))"
    ),
    "asyncio": (
        "import asyncio\nasync def main():\n    await asyncio.sleep(0)\n    input()\n"
        "    print(sum(map(int, input().split())))\nasyncio.run(main())"
    ),
    "numpy": "import numpy as np\ninput()\nprint(np.array(input().split(), dtype=int).sum())",
    "its own source": (
        "import inspect, traceback\ndef add(a, b):\n    return a + b\nassert 'a + b' in inspect.getsource(add)\n"
        "try: add(1, '')\nexcept TypeError: assert 'a + b' in traceback.format_exc()\ninput()\n"
        "print(add(*map(int, input().split())))"
    ),
    "pickle": (
        "import copy, pickle\nclass Sum:\n    def __init__(self, n): self.n = n\ninput()\n"
        "s = copy.deepcopy(Sum(sum(map(int, input().split()))))\nprint(pickle.loads(pickle.dumps(s)).n)"
    ),
    "doctest": (
        "import doctest\ndef add(a, b):\n    '>>> add(1, 2)\\n3'\n    return a + b\n"
        "assert doctest.testmod() == (0, 1)\ninput()\nprint(add(*map(int, input().split())))"
    ),
    "standard error": "import sys\nprint('a', file=sys.stderr)\ninput()\nprint(sum(map(int, input().split())))",
    "an alarm": "import signal\nsignal.alarm(9)\ninput()\nprint(sum(map(int, input().split())))",
    "long numbers": "input()\nassert len(str(int('7' * 9000))) == 9000\nprint(sum(map(int, input().split())))",
}


def test_honest_scripts_pass_in_all_their_usual_ways():
    verdicts = run_many([(program, [("2\n4 5\n", "9\n")]) for program in HONEST.values()])
    assert {name: v.reason for name, v in zip(HONEST, verdicts, strict=True) if not v.passed} == {}


LONG = [
    ("import math\ndef f(n): return math.factorial(n)", "import math\nassert f(3000) == math.factorial(3000)"),
    ("def f(n): return len(str(n))", "assert f(10 ** 6000) == 6001"),
    ("def f(n): return [-(10 ** n), {(10 ** n,)}]", "assert f(5000) == [-(10 ** 5000), {(10 ** 5000,)}]"),
    ("def f(text): return int(text)", "assert f('9' * 7000) == 10 ** 7000 - 1"),
]


def test_numbers_may_have_thousands_of_digits():
    assert [verdict.reason for verdict in run_many(LONG)] == ["passed"] * len(LONG)


def test_a_large_input_and_a_large_output_pass_through():
    text = "\n".join(map(str, range(200_000)))
    assert run_tests("import sys\nprint(sys.stdin.read())", [(text, text)]).passed


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n3\n\n", "1 2\n3\n", True),
        ("1\n2\n", "1 2\n", False),
        ("", "", True),
        ("", "0", False),
        ("0.5", "0.500000", True),
        ("0.5000004", "0.500000", True),
        ("0.50001", "0.500000", False),
        ("5e-1", "0.5", True),
        ("3", "3.0", True),
        ("3.0", "3", False),  # whole numbers are asked for as such
        ("03", "3", False),
        ("1000000000000000001", "1000000000000000000", False),
        ("nan", "0.5", False),
        ("nan", "nan", True),
        ("inf", "1e999", False),
        ("Yes", "YES", False),
    ],
)
def test_output_is_compared_by_lines_words_and_decimals(printed, expected, same):
    assert same_output(printed, expected) is same


def test_output_is_compared_in_bounded_time():
    started = time.process_time()
    assert not same_output("1" * 10**5 + "x", "0.5") and not same_output("1." * 10**5, "0.5")
    assert time.process_time() - started < 1
