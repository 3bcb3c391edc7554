"""What the system keeps from a program, with every layer and with one of them gone, for root and for others."""

import contextlib
import functools
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nanor1.sandbox import confine, jobs
from nanor1.sandbox.jobs import isolation, run_many, run_tests

LINUX_X86_OR_ARM = confine.IS_LINUX and os.uname().machine in confine.MACHINES
LINUX = pytest.mark.skipif(not LINUX_X86_OR_ARM, reason="namespaces, Landlock and seccomp are Linux's")

# ---- attacks: each program's f(...) returns what it reached

TOOLS = '''
import ctypes, errno, fcntl, os, resource, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
reached = []

def attempt(name, act, is_reached=lambda result: result is not None and result is not False):
    """Note the name if the act fails neither as Python's nor as C's functions do."""
    try:
        result = act()
    except (OSError, ValueError, OverflowError):
        return None
    if is_reached(result):
        reached.append(name)
    return result

def call(name, function, *arguments):
    """The same for a function of C, or a system call by its number; 64-bit arguments."""
    c = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    function = getattr(libc, function) if isinstance(function, str) else lambda *c, n=function: libc.syscall(n, *c)
    return attempt(name, lambda: function(*c), lambda result: result >= 0)
'''

ATTACKS = {
    "datagrams to a name": """
def f(t):
    ours, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    stream, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    attempt("tipc", lambda: socket.socketpair(30, socket.SOCK_DGRAM))
    libc.mmap.restype = ctypes.c_void_p
    for name in (t["socket"], "\\0" + t["abstract"]):
        attempt("sendto", lambda: ours.sendto(b"leak", name))
        attempt("sendmsg", lambda: ours.sendmsg([b"leak"], [], 0, name))
        attempt("connect", lambda: (ours.connect(name), ours.send(b"leak")))
        raw = struct.pack("H", 1) + name.encode() + b"\\0" * (name[0] != "\\0")
        page = libc.mmap(ctypes.c_void_p(0x200000000), ctypes.c_long(4096), 3, 0x22, -1, 0)  # low half of 32 bits: zero
        ctypes.memmove(page, raw, len(raw))
        call("sendto low zero", "sendto", ours.fileno(), b"leak", 4, 0, ctypes.c_void_p(page), len(raw))
        vector = (ctypes.c_void_p * 2)(ctypes.cast(b"leak", ctypes.c_void_p), 4)
        message = (ctypes.c_void_p * 8)(page, len(raw), ctypes.addressof(vector), 1, 0, 0, 0, 0)
        call("sendmmsg", "sendmmsg", ours.fileno(), message, 1, 0)
        call("sendmsg raw", "sendmsg", ours.fileno(), message, 0)
    attempt("bind", lambda: (ours.bind("bound"), True)[1])
    attempt("listen", lambda: (stream.listen(1), True)[1])
    for family, kind in ((1, 1), (2, 1), (2, 2), (10, 1), (16, 3), (17, 3), (38, 5), (40, 1)):
        attempt(f"socket {family}", lambda: socket.socket(family, kind))
    return reached
""",
    "descriptors handed over": """
def f(t):
    a, b = socket.socketpair()
    attempt("send_fds", lambda: socket.send_fds(a, [b"x"], [0]))
    call("pidfd_getfd", 438, call("pidfd_open", 434, t["pid"], 0) or -1, 0, 0)
    for fd in range(64):
        attempt("inherited", lambda: os.fstat(fd).st_mode & 0o170000 not in (0o010000, 0o140000, 0o020000), bool)
        for n in (os.getppid(), t["pid"]):
            attempt("another's", lambda: os.open(f"/proc/{n}/fd/{fd}", os.O_RDONLY))
    return reached
""",
    "signals of files": """
def f(t):
    r, w = os.pipe()
    a, b = socket.socketpair()
    for fd, other in ((r, w), (a.fileno(), b.fileno())):
        for number in (8, 15, 10, 1026):
            argument = struct.pack("ii", 1, t["pid"]) if number == 15 else signal.SIGUSR1 if number == 10 else t["pid"]
            attempt(f"fcntl {number}", lambda: fcntl.fcntl(fd, number, argument))
        for number in (0x8901, 0x8902, 0x5410):
            attempt(f"ioctl {number:x}", lambda: fcntl.ioctl(fd, number, struct.pack("i", t["pid"])))
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
        os.write(other, b"x")
    return reached
""",
    "signals": """
def f(t):
    for pid in (t["pid"], os.getppid()):
        attempt("kill", lambda: (os.kill(pid, signal.SIGUSR1), True)[1])
    for pid in (t["pid"], os.getppid()):
        call("tkill", {"x86_64": 200, "aarch64": 130}[os.uname().machine], pid, 10)
        call("tgkill", {"x86_64": 234, "aarch64": 131}[os.uname().machine], pid, pid, 10)
        call("sigqueue", "sigqueue", pid, 10, 0)
        call("pidfd", 424, call("pidfd_open", 434, pid, 0) or -1, 10, None, 0)
        event = struct.pack("=Qiii44x", 0, 10, 4, pid)
        call("timer", "timer_create", 1, event, ctypes.create_string_buffer(8))
    return reached
""",
    "System V and POSIX objects": """
def f(t):
    libc.shmat.restype = ctypes.c_void_p
    failed = ctypes.c_void_p(-1).value
    room = ctypes.create_string_buffer(4096)
    attempt("shmat", lambda: libc.shmat(t["shm"], None, 0o10000), lambda p: p != failed)
    attempt("shmat to write", lambda: libc.shmat(t["shm"], None, 0), lambda p: p != failed)
    for command in (2, 13, 14, 15):
        call("shmctl", "shmctl", t["shm"], command, room)
        call("semctl", "semctl", t["sem"], 0, command, room)
        call("msgctl", "msgctl", t["msg"], command, room)
    call("semctl set", "semctl", t["sem"], 0, 16, 3)
    call("semop", "semop", t["sem"], struct.pack("Hhh", 0, 1, 0o4000), 1)
    call("semtimedop", "semtimedop", t["sem"], struct.pack("Hhh", 0, 1, 0o4000), 1, None)
    call("msgsnd", "msgsnd", t["msg"], struct.pack("l8s", 1, b"leak"), 8, 0o4000)
    call("msgrcv", "msgrcv", t["msg"], room, 8, 0, 0o4000)
    for kind, arguments in (("shm", (0, 4096)), ("sem", (0, 1)), ("msg", (0,))):
        made = call(kind + "get", kind + "get", *arguments, 0o1600)
        if made >= 0:  # leave none
            getattr(libc, kind + "ctl")(made, 0, 0)
    call("mq_open", "mq_open", b"/nanor1-test", 0o102, 0o600, None)
    call("mq_unlink", "mq_unlink", b"/nanor1-test")
    call("add_key", "syscall", {"x86_64": 248, "aarch64": 217}[os.uname().machine], b"user", b"n", b"x", 1, -2)
    return reached
""",
    "memory and files of trainer, keeper and judge": """
def look(path, place):
    with open(path, "rb", 0) as file:
        file.seek(place)
        return file.read(1) or None

def f(t):
    room = ctypes.create_string_buffer(64)
    for pid in (t["pid"], os.getppid(), os.getpid() + 1):
        for name in ("mem", "maps", "environ", "auxv", "pagemap", "stack"):
            attempt(name, lambda: look(f"/proc/{pid}/{name}", t["address"] if name == "mem" else 0))
        for name in ("cwd", "root", "exe", "fd/0", "ns/user"):
            attempt(name, lambda: os.readlink(f"/proc/{pid}/{name}"))
        local = (ctypes.c_void_p * 2)(ctypes.addressof(room), 8)
        remote = (ctypes.c_void_p * 2)(t["address"], 8)
        call("process_vm_readv", "process_vm_readv", pid, local, 1, remote, 1, 0)
        call("process_vm_writev", "process_vm_writev", pid, remote, 1, remote, 1, 0)
        call("seize", "ptrace", 0x4206, pid, None, None)
    return reached
""",
    "limits and priority of others": """
def f(t):
    for pid in (t["pid"], os.getppid()):
        attempt("prlimit", lambda: resource.prlimit(pid, resource.RLIMIT_CPU))
        attempt("setpriority", lambda: (os.setpriority(os.PRIO_PROCESS, pid, 19), True)[1])
        attempt("affinity", lambda: (os.sched_setaffinity(pid, {0}), True)[1])
        attempt("scheduler", lambda: (os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)), True)[1])
        call("ioprio", {"x86_64": 251, "aarch64": 30}[os.uname().machine], 1, pid, (3 << 13))
    return reached
""",
    "files outside are read": """
def f(t):
    for path in (t["file"], "/etc/passwd", f"/proc/{t['pid']}/cmdline", "/var", "/sys"):
        attempt(path, lambda: os.listdir(path) if os.path.isdir(path) else open(path).read(1) + "x")
    return reached
""",
    "files outside are changed": """
def f(t):
    file, folder, new = t["file"], os.path.dirname(t["file"]), os.path.join(os.path.dirname(t["file"]), "new")
    for path in (file, new, "/proc/self/comm"):
        attempt("open", lambda: os.open(path, os.O_WRONLY))
        attempt("create", lambda: os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    attempt("open with a temporary name", lambda: os.open(folder, os.O_RDWR | os.O_TMPFILE))
    attempt("open with O_TRUNC", lambda: os.open(file, os.O_RDONLY | os.O_TRUNC))
    attempt("by a cwd", lambda: os.open(f"/proc/{t['pid']}/cwd/new", os.O_RDWR | os.O_CREAT))
    acts = dict(truncate=lambda: os.truncate(file, 0), unlink=lambda: os.unlink(file), mkdir=lambda: os.mkdir(new),
        rmdir=lambda: os.rmdir(folder), rename=lambda: os.rename(file, new), link=lambda: os.link(file, new),
        take=lambda: os.rename(file, "mine"), symlink=lambda: os.symlink("/", new), chmod=lambda: os.chmod(file, 0),
        chown=lambda: os.chown(file, os.geteuid(), -1), utime=lambda: os.utime(file), fifo=lambda: os.mkfifo(new),
        xattr=lambda: os.setxattr(file, "user.a", b"a"), link_here=lambda: os.link(file, "here"),
        give=lambda: (open("own", "w"), os.rename("own", new)))
    call("mount", "mount", b"x", folder.encode(), b"tmpfs", 0, None)
    call("umount", "umount2", os.getcwd().encode(), 2)
    fd = attempt("", lambda: os.open(file, os.O_RDONLY), lambda _: False)
    if fd is not None:
        attempt("flags", lambda: fcntl.ioctl(fd, 0x40086602, struct.pack("l", 0x80)))
        attempt("times by fd", lambda: (os.utime(fd), True)[1])
        attempt("mode by fd", lambda: (os.fchmod(fd, 0o600), True)[1])
        attempt("again", lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
        call("file_setattr", 469, fd, b"", ctypes.create_string_buffer(24), 24, 0x1000)
    for name, act in acts.items():
        attempt(name, lambda: (act(), True)[1])
    call("setxattrat", 463, -100, file.encode(), 0, b"user.a", struct.pack("QII", 0, 0, 0), 16)
    call("fchmodat2", 452, -100, file.encode(), 0, 0)
    return reached
""",
    "what users have in common": """
def f(t):
    fd = os.open(os.__file__, os.O_RDONLY)
    attempt("flock", lambda: (fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB), True)[1])
    attempt("lockf", lambda: (fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB), True)[1])
    attempt("lease", lambda: fcntl.fcntl(fd, 1024, fcntl.F_RDLCK))
    attempt("notify", lambda: fcntl.fcntl(os.open("/usr", os.O_RDONLY), 1026, 1))
    attempt("pipe of a size", lambda: fcntl.fcntl(os.pipe()[1], 1031, 1 << 20))
    call("inotify", "inotify_init")
    call("inotify1", "inotify_init1", 0)
    call("fanotify", "fanotify_init", 0x200, 0)
    return reached
""",
    "ways around the filter": """
def f(t):
    room = ctypes.create_string_buffer(4096)
    call("io_uring", 425, 4, room)
    call("openat2", 437, -100, b".", struct.pack("QQQ", 0, 0, 0), 24)
    call("memfd", "memfd_create", b"x", 0)
    call("memfd_secret", 447, 0)
    call("fsopen", 430, b"tmpfs", 0)
    call("open_tree", 428, -100, b"/", 1)
    call("open_tree_attr", 467, -100, b"/", 1, None, 0)
    call("listns", 470, room, room, 1, 0)
    call("landlock again", 444, None, 0, 1)
    x86 = os.uname().machine == "x86_64"
    call("userfaultfd", 323 if x86 else 282, 1)
    call("perf", 298 if x86 else 241, struct.pack("II112x", 1, 120), 0, -1, -1, 0)
    call("bpf", 321 if x86 else 280, 0, room, 128)
    call("aio", 206 if x86 else 0, 1, ctypes.create_string_buffer(8))
    call("kernel log", "klogctl", 3, room, 4096)
    handle = struct.pack("Ii", 8, 1) + bytes(8)
    call("handle", "open_by_handle_at", -100, handle, 1)
    call("seccomp", 317 if x86 else 277, 1, 0, struct.pack("HxxxxxxP", 1, 0))
    return reached
""",
    "identities and namespaces": """
def f(t):
    user = os.geteuid()
    for name in ("setuid", "setgid", "seteuid", "setegid"):
        attempt(name, lambda: (getattr(os, name)(user), True)[1])
    attempt("setresuid", lambda: (os.setresuid(user, user, user), True)[1])
    attempt("setreuid", lambda: (os.setreuid(user, user), True)[1])
    call("unshare", "unshare", 0x10000000)
    for name in ("user", "mnt", "net", "ipc"):
        attempt(name, lambda: call("setns", "setns", os.open(f"/proc/{t['pid']}/ns/{name}", os.O_RDONLY), 0))
    call("dumpable", "prctl", 4, 1, 0, 0, 0)
    call("death signal", "prctl", 1, 0, 0, 0, 0)
    call("capset", "capset", struct.pack("Ii", 0x20080522, 0), b"\\xff" * 24)
    return reached
""",
    "new processes": """
def f(t):
    own = os.getpid()
    def born(name, act):
        try:
            pid = act()
        except (OSError, ValueError):
            return
        if pid == 0 and os.getpid() != own:
            os._exit(0)
        if pid > 0:
            reached.append(name)
    born("fork", os.fork)
    born("fork in a pty", lambda: os.forkpty()[0])
    born("clone", lambda: libc.syscall({"x86_64": 56, "aarch64": 220}[os.uname().machine], 17, 0, 0, 0, 0))
    born("spawn", lambda: os.posix_spawn("/bin/true", ["true"], {}))
    attempt("exec", lambda: os.execv("/bin/false", ["false"]))
    call("execveat", "execveat", -100, b"/bin/false", None, None, 0)
    return reached
""",
    "threads without end": """
def f(t):
    stack = ctypes.create_string_buffer(1 << 16)
    top = ctypes.c_void_p(ctypes.addressof(stack) + (1 << 15) & ~15)  # one for all: they only wait
    n = 0
    while n < 4000 and libc.clone(libc.pause, top, 0x50F00, None) > 0:
        n += 1
    return [] if n < 1000 else [n]
""",
    "timers without end": """
def f(t):
    n, room = 0, ctypes.create_string_buffer(8)
    while n < 4000 and libc.timer_create(1, None, room) == 0:
        n += 1
    return [] if n < 1000 else [n]
""",
}

# The trainer: sets up what could be reached, has the attacks judged, and says what each reached and what it noticed.
TRAINER = """
import ctypes, json, os, shutil, signal, socket, sys, tempfile
root, request = sys.argv[1], json.load(sys.stdin)
sys.path.insert(0, root)
from nanor1.sandbox import jobs as sandbox

libc = ctypes.CDLL(None)
seen = []
for number in (signal.SIGUSR1, signal.SIGIO, signal.SIGURG):
    signal.signal(number, lambda number, _: seen.append(f"signal {number}"))
folder = tempfile.mkdtemp()
target = {"pid": os.getpid(), "file": f"{folder}/kept", "socket": f"{folder}/socket", "abstract": folder[1:]}
open(target["file"], "w").write("kept")
listening = []
for name in (target["socket"], "\\0" + target["abstract"]):
    listening.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    listening[-1].bind(name)
    listening[-1].setblocking(False)
target |= {"shm": libc.shmget(0, 4096, 0o1600), "sem": libc.semget(0, 1, 0o1600), "msg": libc.msgget(0, 0o1600)}
libc.msgsnd(target["msg"], ctypes.create_string_buffer(b"\\1" + bytes(7) + b"kept", 16), 8, 0)
page = ctypes.create_string_buffer(b"kept", 64)
target["address"] = ctypes.addressof(page)
start, _, rest = sandbox.START.partition("from nanor1.sandbox.child")
sandbox.START = f"{start}from nanor1.sandbox import confine; {request['patch']}from nanor1.sandbox.child{rest}"
if request["is_readable"]:
    import contextlib
    sandbox.unreadable = contextlib.nullcontext()
jobs = [(program, f"reached = f({target!r})\\nassert reached == [], reached") for program in request["programs"]]
verdicts = sandbox.run_many(jobs, timeout_s=20, workers=2)
for end in listening:
    try:
        seen.append(str(end.recv(100)))
    except BlockingIOError:
        pass
libc.shmctl(target["shm"], 0, None)
libc.semctl(target["sem"], 0, 0)
libc.msgctl(target["msg"], 0, None)
os.unlink(target["socket"])
paths = [(name, os.path.join(folder, name)) for name in os.listdir(folder)]
files = [[name, os.stat(path).st_mode & 0o777, os.chmod(path, 0o600), open(path).read()] for name, path in paths]
intact = [files, page.value.decode(), os.getpriority(os.PRIO_PROCESS, 0)]
shutil.rmtree(folder)
print(json.dumps([[v.passed, v.reason, v.isolation] for v in verdicts] + [seen, intact]))
"""
PATCHES = {
    "nothing": "",
    "Landlock": "confine.allow_files = lambda *_: False; ",
    "Landlock's newer parts": "confine.landlock_version = lambda: 1; ",
    "namespaces": "confine.LIBC.unshare = lambda _: -1; ",
    "seccomp": "confine.forbid_system_calls = lambda _: False; ",
    "rights to map a user": "confine.open = lambda name, *mode: open('/none' if mode else name); ",
}
PATCHES["Landlock and namespaces"] = PATCHES["Landlock"] + PATCHES["namespaces"]
PATCHES["all"] = PATCHES["Landlock and namespaces"] + PATCHES["seccomp"]


@functools.cache
def user_and_python(user):
    """The ids of a user for subprocess, and a Python that this user may start, with the project's root."""
    ids = {} if user == "this user" else {"user": 65534, "group": 65534, "extra_groups": []}
    root = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); from nanor1.sandbox import child, jobs"
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            if subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL, cwd="/", **ids).returncode == 0:
                return ids, python, root
    pytest.skip(f"no Python that {user} may start: needs root, and folders that others may read")


def trainer(user, without="nothing", programs=(), is_readable=False):
    """What a trainer of that user says: verdicts, what it noticed, and what is left of its own."""
    ids, python, root = user_and_python(user)
    request = {"patch": PATCHES[without], "programs": [TOOLS + program for program in programs]}
    request["is_readable"] = is_readable
    done = subprocess.run(
        [python, "-c", TRAINER, root], input=json.dumps(request), text=True, cwd="/", env={"TMPDIR": "/tmp"},
        stdout=subprocess.PIPE, check=True, **ids,
    )  # fmt: skip
    *verdicts, seen, intact = json.loads(done.stdout)
    return verdicts, seen, intact


LIMITED = {"threads without end", "timers without end"}
INTACT = [[["kept", 0o644, None, "kept"]], "kept", os.getpriority(os.PRIO_PROCESS, 0)]


@LINUX
@pytest.mark.parametrize("user", ["this user", "nobody"])
@pytest.mark.parametrize(
    "without", ["nothing", "Landlock's newer parts", "namespaces", "Landlock", "Landlock and namespaces"]
)
def test_attacks_reach_nothing_but_what_can_be_read_without_landlock(user, without):
    verdicts, noticed, intact = trainer(user, without, ATTACKS.values())
    failed = {name: reason for name, (passed, reason, _) in zip(ATTACKS, verdicts, strict=True) if not passed}
    isolation = verdicts[0][2]
    assert list(failed) == ([] if "Landlock" in isolation else ["files outside are read"]), failed
    assert (noticed, intact) == ([], INTACT)
    assert "seccomp" in isolation and without.partition(" ")[0] not in isolation


@LINUX
@pytest.mark.parametrize("user", ["this user", "nobody"])
def test_without_the_filter_other_processes_and_files_are_safe_but_for_sockets_with_a_name(user):
    verdicts, noticed, intact = trainer(user, "seccomp", ATTACKS.values())
    failed = {name for name, (passed, _, _) in zip(ATTACKS, verdicts, strict=True) if not passed}
    assert not failed & {name for name in ATTACKS if "files" in name.split() and name != "signals of files"}
    assert not failed & {"new processes", *LIMITED}
    assert set(noticed) <= {"b'leak'"} and intact[:2] == INTACT[:2]


@LINUX
def test_the_attacks_would_reach_what_they_aim_at():
    verdicts, noticed, intact = trainer("nobody", "all", ATTACKS.values(), is_readable=True)
    failed = {name for name, (passed, _, _) in zip(ATTACKS, verdicts, strict=True) if not passed}
    assert failed == set(ATTACKS) - LIMITED  # which is the limits' doing
    assert {"signal 10", "b'leak'"} <= set(noticed) and intact[0] != INTACT[0]


TRAINERS_MEMORY = """
def f(t):
    try:
        lines, memory = list(open(f"/proc/{t['pid']}/maps")), open(f"/proc/{t['pid']}/mem", "rb", 0)
    except OSError:
        return []
    for low, high in ((int(n, 16) for n in line.split()[0].split("-")) for line in lines):
        try:
            memory.seek(low)
            reached.extend([low] if b"kept" in memory.read(min(high - low, 1 << 24)) else [])
        except (OSError, ValueError, OverflowError):
            pass
    return reached
"""


@LINUX
@pytest.mark.parametrize("is_readable", [True, False])
def test_a_trainer_cannot_be_read_while_it_judges_where_nothing_else_hides_it(is_readable):
    ((passed, _, _),), _, _ = trainer("nobody", "Landlock and namespaces", [TRAINERS_MEMORY], is_readable=is_readable)
    assert passed is not is_readable


def dumpable():
    return confine.prctl(confine.PR_GET_DUMPABLE)


@LINUX
def test_the_trainer_is_as_readable_as_before_once_the_last_of_several_has_judged(monkeypatch):
    before, during = dumpable(), []
    judge = jobs.Jail.judge
    monkeypatch.setattr(jobs.Jail, "judge", lambda *a: during.append(dumpable()) or judge(*a))
    with jobs.unreadable:
        assert run_tests("def f(): return 1", "assert f() == 1").passed
        during.append(dumpable())
    assert during == [0, 0] and dumpable() == before
    assert run_tests("def f(): return 1", "assert f() == 1").passed
    assert during == [0, 0, 0] and dumpable() == before


# ---- the scratch folder

HAS_SCRATCH = pytest.mark.skipif("'scratch folder' not in isolation()", reason="no scratch folder here")
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
                done.append((str(top), i))
            except OSError:
                pass
    return done
"""


@LINUX
@pytest.mark.parametrize("without", ["Landlock", "Landlock's newer parts", "namespaces", "rights to map a user"])
def test_where_a_layer_is_missing_nothing_can_be_written_or_removed(without):
    program = WRITER + "\nwrite, f = f, lambda t: write(t['file'][:-5])"
    ((passed, reason, isolation),), _, intact = trainer("this user", without, [program])
    assert passed and intact == INTACT and "scratch" not in isolation, reason


@LINUX
def test_nothing_outside_the_scratch_folder_can_be_written_or_removed(tmp_path):
    (tmp_path / "kept").write_text("here")
    verdict = run_tests(WRITER, f"assert {{top for top, _ in f({str(tmp_path)!r})}} <= {{'.'}}")
    assert verdict.passed, verdict
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_text() == "here"


TEMPORARY = """
import os, pathlib, shutil, tempfile

def f(x):
    with tempfile.TemporaryFile() as file, tempfile.NamedTemporaryFile("w+") as named:
        file.write(b"a")
        named.write("a")
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "inner").mkdir()
        pathlib.Path(folder, "inner", "b").write_text("b")
        os.rename(f"{folder}/inner/b", f"{folder}/c")
        shutil.copyfile(f"{folder}/c", "d")
    with open("left", "w") as file:
        print("text", file=file)
    with open(os.devnull, "w") as file:
        print("text", file=file)
    return open("left").read(), sorted(os.listdir(".")), x
"""


@HAS_SCRATCH
def test_a_program_may_write_into_its_folder_and_the_next_one_finds_an_empty_one(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = "import os\nassert os.listdir('.') == []\n"  # by the judge
    first = (TEMPORARY, f"{seen}assert f(1) == ('text\\n', ['d', 'left'], 1)\n{seen}")
    looks = ("import os\ndef f(): return os.listdir('.')", "assert f() == []")
    verdicts = run_many([first, looks, first, looks], workers=1)
    assert [verdict.reason for verdict in verdicts] == ["passed"] * 4
    assert list(tmp_path.iterdir()) == []


FILLER = """
import errno, os

def f(x):
    errors = []
    try:
        with open("large", "wb", 0) as file:
            while True: file.write(bytes(1 << 16))
    except OSError as error: errors.append(error.errno)
    large, n = os.path.getsize("large"), 0
    os.unlink("large")
    try:
        while n < 10_000: n += 1; open(f"small-{n}", "w").close()
    except OSError as error: errors.append(error.errno)
    return large, n, errors == [errno.ENOSPC] * 2 or errors == [errno.EFBIG, errno.ENOSPC]
"""


@HAS_SCRATCH
def test_what_a_program_writes_is_bounded():
    tests = "bytes, files, full = f(0)\nassert bytes <= 4 << 20 and files <= 256 and full, (bytes, files, full)"
    assert run_tests(FILLER, tests).reason == "passed"


def test_a_script_cannot_change_its_standard_input():
    program = """
import os
for act in (lambda: os.write(0, b"x"), lambda: os.pwrite(0, b"x" * 99, 0), lambda: os.ftruncate(0, 9),
            lambda: os.open("/proc/self/fd/0", os.O_RDWR)):
    try: print(act())
    except OSError: pass
print(input())
"""
    assert run_tests(program, [("text\n", "text\n")]).reason == "passed"


# ---- what goes on working


@LINUX
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
LOOPS = """
import asyncio, fcntl, os, queue, select, signal, socket, sqlite3, sys, threading

async def later(x):
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(None, lambda: x) + await asyncio.to_thread(int, 1)

def f(x):
    ours, theirs = socket.socketpair()
    ours.sendall(b"a" * 10)
    assert theirs.recv(10) == b"a" * 10 and select.select([ours], [ours], [], 0)[1] == [ours]
    theirs.setblocking(False)
    r, w = os.pipe()
    os.set_blocking(r, False)
    assert fcntl.fcntl(r, fcntl.F_GETFL) & os.O_NONBLOCK and not sys.stdin.isatty()
    threads = [threading.Thread(target=os.getpid) for _ in range(40)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    signal.signal(signal.SIGUSR1, lambda *_: None)
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)
    return asyncio.run(later(sqlite3.connect(":memory:").execute(f"select {x}").fetchone()[0]))
"""


@pytest.mark.parametrize("program", [USER, LOOPS])
def test_what_programs_need_of_python_works(program):
    assert run_tests(program, "assert f(3) == 4\nassert f(5) == 6").reason == "passed"


def test_numpy_fits_into_the_default_limits():
    program = "import numpy as np\ndef f(x): return (np.ones((x, x)) @ np.ones((x, x))).sum()"
    assert run_tests(program, "assert f(300) == 300.0 ** 3").reason == "passed"


def test_isolation_names_what_there_is():
    assert "limits" in isolation()
    if LINUX_X86_OR_ARM:
        assert "seccomp" in isolation()


# ---- the filter

HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_of_system_calls_are_those_of_the_headers(machine):
    if not Path(HEADERS[machine]).exists():
        pytest.skip(f"{HEADERS[machine]} is not installed")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(HEADERS[machine]).read_text()))
    named = [item.split("=") for item in confine.REFUSED[machine].split()]
    named += [[name, str(number)] for name, number in confine.JUDGED[machine].items()]
    known = [(name, number) for name, number in named if name in numbers]
    assert len(known) == len(named) and all(numbers[name] == number for name, number in known)
    assert all(int(number) < confine.NEWER for _, number in named)
    assert {name for name, number in numbers.items() if 424 <= int(number)} >= {"io_uring_setup", "clone3", "openat2"}


@pytest.mark.parametrize("has_scratch", [False, True])
@pytest.mark.parametrize("machine", confine.MACHINES)
def test_the_filter_is_whole_instructions_that_jump_forward_within_it(machine, has_scratch):
    program = confine.filter_program(machine, has_scratch)
    assert len(program) % 8 == 0
    n = len(program) // 8
    for i, (code, if_true, if_false, value) in enumerate(struct.iter_unpack("HBBI", program)):
        steps = value if code == 0x05 else max(if_true, if_false)
        assert code in (0x20, 0x05, 0x15, 0x35, 0x45, 0x06) and i + 1 + steps <= n - (code != 0x06)
    assert math.log2(n) < 12  # the kernel takes 4096


def decide(program, machine, number, arguments):
    """What the filter says of a system call: classic BPF, run here."""
    call = struct.pack("=iIQ6Q", number, machine, 0, *arguments, *[0] * (6 - len(arguments)))
    lines, i, loaded = list(struct.iter_unpack("HBBI", program)), 0, 0
    while True:
        code, if_true, if_false, value = lines[i]
        i += 1
        if code == 0x06:
            return value
        if code == 0x20:
            (loaded,) = struct.unpack_from("=I", call, value)
        elif code == 0x05:
            i += value
        else:
            is_true = {0x15: loaded == value, 0x35: loaded >= value, 0x45: loaded & value != 0}[code]
            i += if_true if is_true else if_false


ALLOWED, EPERM, ENOSYS, KILLED = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
OWN, LOW_ZERO = confine.OWN_PID, 0x200000000
DECISIONS = [
    ("kill", (OWN, 9), ALLOWED), *[("kill", (other, 9), EPERM) for other in (OWN + 1, 2**32 - 1, 0)],
    ("tgkill", (OWN, 5), ALLOWED), ("tgkill", (5, OWN), EPERM),
    ("prlimit64", (0, 1, 8), ALLOWED), ("prlimit64", (OWN, 1, 8), EPERM),
    ("clone", (0x3D0F00,), ALLOWED), ("clone", (17,), EPERM), ("clone", (0x4111,), EPERM),
    ("socketpair", (1, 2), ALLOWED), ("socketpair", (30, 2), EPERM),
    ("sendto", (3, LOW_ZERO, 4, 0, 0, 0), ALLOWED), ("sendto", (3, 8, 4, 0, LOW_ZERO, 16), EPERM),
    *[("fcntl", (3, command, 9), ALLOWED) for command in (0, 1, 2, 3, 4, 1030)],
    *[("fcntl", (3, command, 9), EPERM) for command in (5, 6, 7, 8, 10, 15, 37, 1024, 1026, 1031, 1033, 8 + 2**31)],
    *[("ioctl", (3, request), ALLOWED) for request in (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)],
    *[("ioctl", (3, request), EPERM) for request in (0x8901, 0x8902, 0x5410, 0x5412, 0x40086602, 0xC0046686)],
]  # fmt: skip


@pytest.mark.parametrize("machine", confine.MACHINES)
def test_the_filter_judges_calls_by_what_they_ask(machine):
    numbers, architecture = confine.JUDGED[machine], confine.MACHINES[machine]
    refused = dict(item.split("=") for item in confine.REFUSED[machine].split())
    for has_scratch in (False, True):
        program = confine.filter_program(machine, has_scratch)
        for name, arguments, result in DECISIONS:
            assert decide(program, architecture, numbers[name], arguments) == result, (name, arguments)
        for name, number in refused.items():
            is_allowed = has_scratch and name in confine.CHANGES
            assert decide(program, architecture, int(number), ()) == (ALLOWED if is_allowed else EPERM), name
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC):
            writes = decide(program, architecture, numbers["openat"], (2**64 - 100, 8, flags))
            assert writes == (ALLOWED if has_scratch else EPERM)
        assert decide(program, architecture, numbers["openat"], (2**64 - 100, 8, os.O_CLOEXEC)) == ALLOWED
        assert {decide(program, architecture, number, ()) for number in (424, 425, 435, 437, 469, 900)} == {ENOSYS}
        assert decide(program, 0x40000003, 37, (OWN, 9)) == KILLED  # the calls of 32-bit x86
        assert decide(program, architecture, 0x40000000 + 62, (OWN, 9)) == KILLED
