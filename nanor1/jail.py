"""The processes in which model-written Python runs; sandbox.py starts the first, and no other module imports this.

This keeper forks two processes for every job, which share no memory and no file, only two pipes between them:

- the candidate holds the program, and never the tests. It confines itself (confine.py), loads the program as a module
  and then answers calls: a name and plain arguments in, a plain value out. Or it runs the program as a script.
- the judge holds the tests, and never the program. It confines itself too and runs the test code, in which the
  program's names are stubs (Remote) that call over the pipe. It compares values of its own: exact builtin types,
  decoded from JSON. What the program does to builtins, `__eq__`, frames, atexit or its exit code cannot reach them.

A call carries a secret drawn for it, and the answer must repeat it. The keeper, which never holds a job, waits for the
judge, kills the candidate, and tells how it ended. Programs and tests are loaded by importlib, as modules whose source
is in memory: the one place where foreign text runs, and never in the trainer's process.
"""

import builtins
import contextlib
import importlib
import importlib.abc
import importlib.util
import os
import signal
import symtable
import sys
import time
import types

from nanor1.confine import confine, die_with_parent, leave_namespaces, most_processes, mount_scratch
from nanor1.wire import EXITED, MAX_REPLY, decode, describe, encode, read_some, receive, send, shorten


class Text(importlib.abc.SourceLoader):
    """A module's source from memory: importlib then does what it does with a file."""

    def __init__(self, source: str):
        self.source = source

    def get_filename(self, name):
        return f"{name}.py"  # not "<program>": tracebacks and inspect would not ask this loader for its lines

    def get_data(self, path):
        return self.source.encode("utf-8", "surrogatepass")


def load(name: str, source: str, names: dict) -> dict:
    """Run the source as the module `name`, in which `names` are known; returns the module's names."""
    loader = Text(source)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module
    vars(module).update(names)
    loader.exec_module(module)
    return vars(module)


# ---- the candidate: holds the program


def candidate(
    job_fd: int, calls: int, answers: int, output: int, folders: list[str], layers: list[str], n_processes: int
) -> None:
    """Read a job, confine this process, and run the program; a script's process returns, to end as Python does."""
    try:
        job = receive(job_fd)
    except EOFError:
        os._exit(0)
    stdin = job["stdin"]
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null if stdin is None else _as_file(stdin), 0)
    os.dup2(null if stdin is None else output, 1)
    alive = os.dup(2)  # closed when this process is gone: Jail.close waits for that
    os.dup2(null, 2)
    calls, answers, alive = _keep_only(calls, answers, alive)
    try:
        has_scratch = mount_scratch()
        layers = layers + confine(job["timeout_s"], job["memory_mib"], folders, n_processes, has_scratch)
        send(answers, {"layers": layers})
    except OSError as error:
        send(answers, {"broken": str(error)})
        os._exit(1)
    sys.argv = ["program.py"]
    sys.path += folders
    if stdin is None:
        _answer_calls(job["program"], calls, answers)
    else:
        _run_script(job["program"], answers)


def _as_file(text: str) -> int:
    """A file without a name that holds the text, to be read."""
    name = f"stdin-{os.getpid()}"
    with open(name, "xb") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    fd = os.open(name, os.O_RDONLY)
    os.unlink(name)
    return fd


def _keep_only(*fds: int) -> list[int]:
    """Close all files from 3 on but these, which move to 3, 4, ..."""
    high = [os.dup2(fd, 100 + i, inheritable=False) for i, fd in enumerate(fds)]
    kept = [os.dup2(fd, 3 + i, inheritable=False) for i, fd in enumerate(high)]
    os.closerange(3 + len(kept), 1024)
    return kept


def _answer_calls(program: str, calls: int, answers: int) -> None:
    try:
        objects = dict(load("program", program, {}))
        send(answers, {"loaded": True})
        while True:
            _answer(receive(calls), objects, answers)
    except BaseException as error:  # SystemExit too: a program that ends answers nothing
        send(answers, {"failed": describe(error)})
    finally:
        os._exit(0)


def _answer(call: dict, objects: dict, answers: int) -> None:
    """Answer one call: `objects` are the program's names, and by number what it returned that is no plain value."""

    def keep(value) -> tuple[int, bool]:
        objects[len(objects)] = value
        return len(objects) - 1, bool(value)

    token = {"token": call["token"]}
    try:
        if call["key"] not in objects:
            return send(answers, token | {"missing": True})
        value = objects[call["key"]]
        for name in call["attributes"]:
            value = getattr(value, name)
        arguments, named = decode(call["arguments"], lambda key, _: objects[key])
        send(answers, token | {"value": encode(value(*arguments, **named), keep)})
    except BaseException as error:  # nothing was sent: what fails in `send` is the encoding
        kinds = [kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind]
        send(answers, token | {"error": kinds, "text": describe(error)})


def _run_script(program: str, answers: int) -> None:
    """Run the program as a script and return: the interpreter then ends as it does, waiting for threads."""
    try:
        load("__main__", program, {})
    except SystemExit:
        raise
    except BaseException as error:
        send(answers, {"failed": describe(error)})
        os._exit(1)


# ---- the judge: holds the tests


class Failed(BaseException):
    """The program has failed for good; no `except Exception` of a test may hide it."""


class Program:
    """The judge's end of the pipes to the candidate: what it was last asked, and why it failed, if it did."""

    def __init__(self, calls: int, answers: int, deadline: float):
        self.calls, self.answers, self.deadline = calls, answers, deadline
        self.last = self.failure = ""

    def fail(self, reason: str):
        self.failure = reason
        raise Failed

    def hear(self) -> dict:
        """The candidate's next message; what is none, or none in time, is a failure."""
        try:
            return receive(self.answers, self.deadline, MAX_REPLY)
        except TimeoutError:
            self.fail("timeout")
        except EOFError:
            self.fail(EXITED)
        except OverflowError:
            self.fail("output limit")
        except (ValueError, RecursionError, MemoryError):
            self.fail("an answer that is none")

    def wait_until_loaded(self) -> None:
        message = self.hear()
        if "loaded" not in message:
            self.fail(shorten(str(message.get("failed") or "an answer to no question")))

    def call(self, key, attributes: tuple, arguments: tuple, named: dict):
        """Call what the candidate knows by `key`; its value, decoded. Raises what it raised, as a builtin error."""
        if self.failure:
            raise Failed
        shown = [repr(value) for value in arguments] + [f"{name}={value!r}" for name, value in named.items()]
        text = shorten(f"{'.'.join([str(key), *attributes])}({', '.join(shown)})")
        token = os.urandom(16).hex()
        plain = encode([arguments, named], _key)
        self.last = text
        self._send({"token": token, "key": key, "attributes": attributes, "arguments": plain})
        answer = self.hear()
        if answer.get("token") != token:
            self.fail("an answer to no question")
        if "missing" in answer:
            self.fail(f"no such function {key}")
        if "error" in answer:
            self._raise(text, answer)
        try:
            value = decode(answer["value"], lambda number, truth: Remote(self, number, truth=truth))
            self.last = shorten(f"{text} -> {value!r}")
        except (ValueError, TypeError, KeyError, RecursionError, MemoryError, AttributeError, OverflowError):
            self.fail("an answer that is none")
        return value

    def _send(self, message: dict) -> None:
        try:
            send(self.calls, message)
        except BrokenPipeError:
            self.fail(EXITED)

    def _raise(self, text: str, answer: dict):
        if answer.get("text") in ("memory", EXITED):
            self.fail(answer["text"])
        self.last = shorten(f"{text} raised {answer.get('text')}")
        kinds = [getattr(builtins, str(name), None) for name in answer["error"]]  # its class and what that derives from
        kind = next((kind for kind in kinds if kind in RAISED_AGAIN), RuntimeError)
        raise kind(str(answer.get("text")).partition(": ")[2])


# Builtin errors that a text makes. Not StopIteration: raised inside `map` or `zip` it would end a test's loop early,
# and with it the test. Not AssertionError, which is the tests' own.
RAISED_AGAIN = {kind for kind in vars(builtins).values() if isinstance(kind, type) and issubclass(kind, Exception)}
RAISED_AGAIN -= {StopIteration, StopAsyncIteration, AssertionError, ExceptionGroup}
RAISED_AGAIN -= {UnicodeEncodeError, UnicodeDecodeError, UnicodeTranslateError}


class Remote:
    """A stub for what only the candidate has: it is true or not, it can be called, and its attributes can be called."""

    def __init__(self, program: Program, key, attributes: tuple = (), truth=True):
        self._program, self._key, self._attributes, self._truth = program, key, attributes, truth

    def __call__(self, *arguments, **named):
        return self._program.call(self._key, self._attributes, arguments, named)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)  # what Python asks of any object is not the program's to answer
        return Remote(self._program, self._key, (*self._attributes, name))

    def __bool__(self):
        return bool(self._truth)

    def __repr__(self):
        return "<no plain value>"


class Named(Remote):
    """What tests call by a name that they neither set nor import: the program's, if it is no module's attribute.

    So `copy(x)` and `copy.make(x)` call the program, `copy.deepcopy` and `sys.getsizeof` are Python's own.
    """

    def __getattr__(self, name):
        own = super().__getattr__(name)
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module({"np": "numpy"}.get(self._key, self._key)), name)
        return own


def _key(value):
    if not isinstance(value, Remote) or value._attributes:
        raise TypeError(f"a test hands the program a {type(value).__name__}, which is no plain value")
    return value._key, value._truth


def free_names(tests: str) -> set[str]:
    """The names that test code reads, but neither sets nor finds among the builtins: the program's.

    >>> sorted(free_names("import math; assert math.floor(f(3)) == len(g())"))
    ['f', 'g']
    """
    top = symtable.symtable(tests, "<tests>", "exec")
    tables, read, own = [top], set(), set()
    for table in tables:
        tables += table.get_children()
        read |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (table is top or s.is_global())}
        own |= {s.get_name() for s in table.get_symbols() if binds(s) and (table is top or s.is_declared_global())}
    return read - own - set(dir(builtins))


def binds(symbol: symtable.Symbol) -> bool:
    return symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()


def examine(program: Program, tests: str) -> dict:
    """Run the tests against the program; a verdict of None where it is the tests that are at fault."""
    try:
        program.wait_until_loaded()
        stubs = types.ModuleType("program")
        stubs.__getattr__ = lambda name: Remote(program, name)  # for tests that say `from program import sum`
        stubs.__all__ = []  # `from program import *` brings what is there already
        sys.modules["program"] = stubs
        load("tests", tests, {name: Named(program, name) for name in free_names(tests)})
    except BaseException as error:
        if not program.failure and not program.last:
            return {"passed": None, "reason": f"the tests do not run: {describe(error)}"}
        told = "" if isinstance(error, AssertionError) or "raised" in program.last else f" ({describe(error)})"
        return {"passed": False, "reason": program.failure or f"wrong answer: {program.last}{told}"}
    if program.failure or not program.last:
        return {"passed": False if program.failure else None, "reason": program.failure or "the tests call nothing"}
    return {"passed": True, "reason": "passed"}


def collect(program: Program, output: int) -> dict:
    """What the script printed, once it has closed its files; else why it failed."""
    printed = bytearray()
    try:
        while piece := read_some(output, 1 << 16, program.deadline):
            printed += piece
            if len(printed) > MAX_REPLY:
                program.fail("output limit")
        program.fail(shorten(str(program.hear().get("failed") or "an answer to no question")))
    except TimeoutError:
        return {"passed": False, "reason": "timeout"}
    except Failed:
        if program.failure != EXITED:
            return {"passed": False, "reason": program.failure}
    return {"passed": None, "reason": EXITED, "output": printed.decode("utf-8", "replace")}


def judge(job_fd: int, verdicts: int, calls: int, answers: int, output: int, folders: list[str]) -> int:
    """Wait for the candidate to stand confined, take the tests, and send a verdict; returns the exit code."""
    try:
        ready = receive(answers)
    except EOFError:
        return STOP
    send(verdicts, ready)
    if "layers" not in ready:
        return STOP
    job = receive(job_fd)
    verdicts, calls, answers, output = _keep_only(verdicts, calls, answers, output)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    program = Program(calls, answers, time.monotonic() + job["timeout_s"])
    # Answers are waited for until then. This ends whatever else it may be that the program's values keep it at.
    signal.setitimer(signal.ITIMER_REAL, job["timeout_s"] + OVERTIME_S)
    confine(job["timeout_s"] + 1, job["memory_mib"], folders)
    sys.path += folders
    verdict = collect(program, output) if job["tests"] is None else examine(program, job["tests"])
    signal.setitimer(signal.ITIMER_REAL, 0)
    send(verdicts, verdict)
    return REAP if EXITED in (program.failure, verdict["reason"]) else KILL


# ---- the keeper

KILL, REAP, STOP = 0, 3, 1  # what the judge's exit code asks of the keeper: kill the candidate, let it end, stop
LATE = -signal.SIGALRM  # its exit code when its own time is over
OVERTIME_S = 0.5  # what it has beyond the program's time


def keep(folders: list[str]) -> None:
    """Serve jobs from standard input until it ends; returns in the candidate's process as well, to let it end there."""
    layers, n_processes = leave_namespaces(), most_processes()
    signal.signal(signal.SIGTERM, lambda *_: (sweep(), os._exit(0)))
    send(1, {"unreadable": True})  # before it there is no test that another program could look for here
    while True:
        calls, answers, output = os.pipe(), os.pipe(), os.pipe()
        runner = os.fork()
        if runner == 0:
            start_as_child()
            return candidate(0, calls[0], answers[1], output[1], folders, layers, n_processes)
        judging = os.fork()
        if judging == 0:
            start_as_child()
            for fd in (calls[0], answers[1], output[1]):
                os.close(fd)
            os._exit(judge(0, 1, calls[1], answers[0], output[0], folders))
        for fd in (*calls, *answers, *output):
            os.close(fd)
        judged = os.waitstatus_to_exitcode(os.waitpid(judging, 0)[1])
        if judged == LATE:
            send(1, {"passed": False, "reason": "timeout"})
        status = end(runner, 0.2 if judged == REAP else 0)
        send(1, {"status": status})
        if judged not in (KILL, REAP, LATE):
            return


def start_as_child() -> None:
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end(runner: int, grace_s: float) -> int:
    """The exit code of the candidate, minus the signal if one ended it; killed unless it ends within the grace."""
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline:
        pid, status = os.waitpid(runner, os.WNOHANG)
        if pid:
            break
        time.sleep(0.001)
    else:
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(runner, signal.SIGKILL)
        _, status = os.waitpid(runner, 0)
    sweep()
    return os.waitstatus_to_exitcode(status)


def sweep() -> None:
    """Kill all children: after a candidate none, where the seccomp filter holds. The keeper adopts orphans (Linux)."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            with open(f"/proc/self/task/{os.getpid()}/children") as children:
                for child in children.read().split():
                    os.kill(int(child), signal.SIGKILL)
