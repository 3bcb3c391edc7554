"""What jail.py's processes and sandbox.py say to each other: messages in JSON, plain values, errors in a line."""

import json
import math
import os
import select
import struct
import time
from collections.abc import ItemsView, KeysView, ValuesView

MAX_REPLY = 4 << 20  # bytes of one answer, and of what a script prints
MAX_TEXT = 200  # characters of a value or an error in a reason
NO_DEADLINE = math.inf
EXITED = "exited before answering"


# ---- messages: JSON behind its length


def send(fd: int, message: dict) -> None:
    """Write one message to a pipe: 4 bytes of length, then JSON (ASCII, so lone surrogates pass)."""
    text = json.dumps(message).encode()
    unsent = memoryview(struct.pack(">I", len(text)) + text)
    while unsent:
        unsent = unsent[os.write(fd, unsent) :]


def receive(fd: int, deadline: float = NO_DEADLINE, limit: float = math.inf) -> dict:
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
    if left <= 0 or not waiting.poll(None if left == NO_DEADLINE else math.ceil(left * 1000)):
        raise TimeoutError
    return os.read(fd, min(size, 1 << 16))


# ---- values: what Python's literals can say, and iterators


def encode(value, keep):
    """The value as JSON can hold it, subclasses as what they derive from; anything else is {"kept": keep(value)}.

    Containers other than lists are {"type": [items]}. Iterators, ranges and views of a dict are taken out, lazily read
    to the end. Numbers and arrays of numpy are what `tolist` makes of them.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(item, keep) for item in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, keep) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, keep), encode(item, keep)] for key, item in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": [value.decode("latin-1")]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, (KeysView, ItemsView, ValuesView)) or hasattr(type(value), "__next__"):
        return {"iterator": [encode(item, keep) for item in value]}
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
