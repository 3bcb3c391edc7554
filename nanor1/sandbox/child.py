"""The processes in which model-written Python runs, and the messages between them; jobs.py starts the first.

This keeper forks two processes for every job, which share no memory and no file, only two pipes between them:

- the candidate holds the program, and never the tests. It confines itself (confine.py), loads the program as a module
  and then answers calls: a name and plain arguments in, a plain value out. Or it runs the program as a script.
- the judge holds the tests, and never the program. It confines itself too and runs the test code, in which the
  program's names are stubs (Remote) that call over the pipe. It compares values of its own: exact builtin types,
  decoded from JSON. What the program does to builtins, `__eq__`, frames, atexit or its exit code cannot reach them.

A call carries a secret drawn for it, and the answer must repeat it. The keeper, which never holds a job, waits for the
judge, kills the candidate, and tells how it ended. It is the parent of both: Landlock keeps a confined judge from
ending a candidate of its own, even by dying. Programs and tests are loaded by importlib, as modules whose source is in
memory: the one place where foreign text runs, and never in the trainer's process.
"""

import builtins
import contextlib
import importlib
import importlib.abc
import importlib.util
import json
import math
import os
import select
import signal
import struct
import symtable
import sys
import time
import types
from collections.abc import ItemsView, KeysView, ValuesView

from nanor1.sandbox.confine import confine, die_with_parent, leave_namespaces, most_processes, mount_scratch

MAX_REPLY = 4 << 20  # bytes of one answer, and of what a script prints
MAX_TEXT = 200  # characters of a value or an error in a reason
OVERTIME_S = 0.5  # what the judge has beyond the program's time
EXITED = "exited before answering"


# ---- messages: JSON behind its length


def send(fd: int, message: dict) -> None:
    """Write one message to a pipe: 4 bytes of length, then JSON (ASCII, so lone surrogates pass)."""
    text = json.dumps(message).encode()
    unsent = memoryview(struct.pack(">I", len(text)) + text)
    while unsent:
        unsent = unsent[os.write(fd, unsent) :]


def receive(fd: int, deadline: float = math.inf, limit: float = math.inf) -> dict:
    """Read one message; EOFError, TimeoutError, OverflowError (over `limit` bytes) or ValueError (no message)."""
    (size,) = struct.unpack(">I", _read(fd, 4, deadline))
    if size > limit:
        raise OverflowError(f"a message of {size} bytes")
    message = json.loads(_read(fd, size, deadline))
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


def _read(fd: int, size: int, deadline: float) -> bytearray:
    taken = bytearray()
    while len(taken) < size:
        piece = read_some(fd, size - len(taken), deadline)
        if not piece:
            raise EOFError("the other end is closed")
        taken += piece
    return taken


def read_some(fd: int, size: int, deadline: float) -> bytes:
    """At least one byte; none at the end of the stream; TimeoutError at the deadline (of time.monotonic)."""
    waiting = select.poll()
    waiting.register(fd, select.POLLIN)
    left = deadline - time.monotonic()
    if left <= 0 or not waiting.poll(None if left == math.inf else math.ceil(left * 1000)):
        raise TimeoutError
    return os.read(fd, min(size, 1 << 16))


# ---- values: what Python's literals can say, and iterators


def encode(value, keep):
    """The value as JSON can hold it, subclasses as what they derive from; anything else is {"kept": keep(value)}.

    Containers other than lists are {"type": [items]}. Iterators, ranges and views of a dict are taken out, lazily read
    to the end. Numbers and arrays of numpy are what `tolist` makes of them.
    """

    def each(items):
        return [encode(item, keep) for item in items]

    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return each(value)
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: each(value)}
    if isinstance(value, dict):
        return {"dict": [each(pair) for pair in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": [value.decode("latin-1")]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, (KeysView, ItemsView, ValuesView)) or hasattr(type(value), "__next__"):
        return {"iterator": each(value)}
    if hasattr(type(value), "tolist"):
        return encode(value.tolist(), keep)
    return {"kept": keep(value)}


def decode(value, kept):
    """The value that `encode` wrote, of exact builtin types; `kept(...)` for what stayed behind; else an error."""
    if isinstance(value, list):
        return [decode(item, kept) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "dict":
        return {decode(key, kept): decode(item, kept) for key, item in items}
    if kind == "bytes":
        return items[0].encode("latin-1")
    make = {"tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
    if kind in make:
        return make[kind]([decode(item, kept) for item in items])
    return {"complex": complex, "range": range, "kept": kept}[kind](*items)


def shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


def describe(error: BaseException) -> str:
    """The error in a line; whatever the error's own methods do."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, SystemExit):
        return EXITED
    if isinstance(error, SyntaxError):
        return shorten(f"syntax error: {error.msg} (line {error.lineno})")
    try:
        return shorten(f"{type(error).__name__}: {str(error)[:MAX_TEXT]}".removesuffix(": "))
    except BaseException:
        return "an error that cannot be told"


# ---- foreign text as a module


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


def candidate(calls: int, answers: int, output: int, folders: list[str], layers: list[str], n_processes: int) -> None:
    """Read a job, confine this process, and run the program; a script's process returns, to end as Python does."""
    try:
        job = receive(0)
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
    try:
        load("__main__", job["program"], {})
    except SystemExit:
        raise
    except BaseException as error:
        send(answers, {"failed": describe(error)})
        os._exit(1)


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
    """Load the program and answer until the calls end; never returns."""
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


# ---- the judge: holds the tests


UNHEARD = {TimeoutError: "timeout", EOFError: EXITED, OverflowError: "output limit"}  # why there is no message


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
        except (*UNHEARD, ValueError, RecursionError, MemoryError) as error:
            self.fail(UNHEARD.get(type(error), "an answer that is none"))

    def expect(self, key: str | None) -> None:
        """Fail, as the candidate says, unless its next message has this key."""
        message = self.hear()
        if key not in message:
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
        try:
            send(self.calls, {"token": token, "key": key, "attributes": attributes, "arguments": plain})
        except BrokenPipeError:
            self.fail(EXITED)
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
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (table is top or symbol.is_global()):
                read.add(symbol.get_name())
            is_set = symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
            if is_set and (table is top or symbol.is_declared_global()):
                own.add(symbol.get_name())
    return read - own - set(dir(builtins))


def examine(program: Program, tests: str) -> dict:
    """Run the tests against the program; a verdict of None where it is the tests that are at fault."""
    try:
        program.expect("loaded")
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
        program.expect(None)  # whatever it says: a script that ends well says nothing
    except TimeoutError:
        return {"passed": False, "reason": "timeout"}
    except Failed:
        if program.failure != EXITED:
            return {"passed": False, "reason": program.failure}
    return {"passed": None, "reason": EXITED, "output": printed.decode("utf-8", "replace")}


def judge(calls: int, answers: int, output: int, folders: list[str]) -> int:
    """Wait for the candidate to stand confined, take the tests, and send a verdict; returns the exit code."""
    ready = {}
    with contextlib.suppress(EOFError):
        ready = receive(answers)
        send(1, ready)
    if "layers" not in ready:
        return STOP
    job = receive(0)
    verdicts, calls, answers, output = _keep_only(1, calls, answers, output)
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


def keep(folders: list[str]) -> None:
    """Serve jobs from standard input until it ends; returns in the candidate's process as well, to let it end there."""
    layers, n_processes = leave_namespaces(), most_processes()
    signal.signal(signal.SIGTERM, lambda *_: (sweep(), os._exit(0)))
    send(1, {"unreadable": True})  # before it there is no test that another program could look for here
    while True:
        calls, answers, output = os.pipe(), os.pipe(), os.pipe()
        if not (runner := fork()):
            return candidate(calls[0], answers[1], output[1], folders, layers, n_processes)
        if not (judging := fork()):
            for fd in (calls[0], answers[1], output[1]):
                os.close(fd)
            os._exit(judge(calls[1], answers[0], output[0], folders))
        for fd in (*calls, *answers, *output):
            os.close(fd)
        judged = os.waitstatus_to_exitcode(os.waitpid(judging, 0)[1])
        is_late = judged == -signal.SIGALRM
        if is_late:
            send(1, {"passed": False, "reason": "timeout"})
        status = end(runner, 0.2 if judged == REAP else 0)
        send(1, {"status": status})
        if judged not in (KILL, REAP) and not is_late:
            return


def fork() -> int:
    """os.fork, with a child that the keeper takes along when it dies."""
    if not (pid := os.fork()):
        die_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return pid


def end(runner: int, grace_s: float) -> int:
    """The exit code of the candidate, minus the signal if one ended it; killed unless it ends within the grace."""
    deadline = time.monotonic() + grace_s
    while not (found := os.waitpid(runner, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.001)
    if not found[0]:
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(runner, signal.SIGKILL)
        found = os.waitpid(runner, 0)
    sweep()
    return os.waitstatus_to_exitcode(found[1])


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
