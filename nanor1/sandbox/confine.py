"""Confine a process, for good and as far as the system can: limits, Landlock, a seccomp filter, namespaces.

Linux's own means, all open to an ordinary user and in containers, each used where it is there. A confined process
starts no process and some hundred threads at most, reaches no socket but pairs of its own, signals no other process,
changes no file but in a small folder of its own, and reads only what Python needs. What is lost without:

- Landlock (Linux before 5.13): it reads what the user may read, data sets with their tests too; there is no folder;
- Landlock's newer parts, or namespaces (as in most containers): there is no folder, and nothing else is lost;
- seccomp (machines other than x86-64 and arm64): there are no threads; messages reach UNIX sockets that have a path,
  files can be locked, and limits and priorities of the user's processes changed;
- all of these, or Linux: what the user may do is open, but for the limits.

Sources: seccomp(2), landlock(7), user_namespaces(7), capabilities(7); the numbers are those of Linux's headers.
"""

import contextlib
import ctypes
import errno
import functools
import math
import os
import platform
import signal
import stat
import struct
import sys

try:
    import resource
except ImportError:  # Windows, where none of this is called
    resource = None

LIBC = ctypes.CDLL(None, use_errno=True) if resource else None
IS_LINUX = sys.platform == "linux"
PR_SET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER = 1, 3, 4, 22, 36
PR_SET_NO_NEW_PRIVS = 38
TIMERS = 64  # of timer_create's, and signals that wait; all of a user's processes together have some ten thousand
THREADS = 256  # more than honest programs start, too few for a machine to notice
SCRATCH_MIB = 4  # of memory, beside a program's address space


def prctl(option: int, value=1, argument=None) -> int:
    """What prctl(2) returns; -1 if it failed, or if this is not Linux."""
    zero = ctypes.c_ulong(0)
    return LIBC.prctl(option, ctypes.c_ulong(value), argument, zero, zero) if IS_LINUX else -1


def die_with_parent() -> None:
    prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def leave_namespaces() -> list[str]:
    """For the keeper and all it starts: unreadable to others, no network, no privileges over the processes outside."""
    if not IS_LINUX:
        return []
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        LIBC.setresuid(0x40000000 + os.getpid(), -1, -1)  # root's processes count for no limit, those of this id do
    left = {"user": 0x10000000, "network": 0x40000000, "IPC": 0x08000000}
    names = [name for name, flag in left.items() if LIBC.unshare(flag) == 0]
    if "user" in names:  # only who has an id in it may write to a file system of its own
        with contextlib.suppress(OSError):
            maps = {"uid_map": f"{user} {user} 1", "setgroups": "deny", "gid_map": f"{group} {group} 1"}
            for name, text in maps.items():
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
    die_with_parent()  # after leaving: new rights in a namespace undo it
    prctl(PR_SET_CHILD_SUBREAPER)
    prctl(PR_SET_DUMPABLE, 0)
    for has_scratch in (False, True):
        filter_program(platform.machine(), has_scratch)  # made once, for all it starts
    return [f"own {', '.join(names)} namespace"] if names else []


def most_processes() -> int:
    """The limit on processes and threads for a program: THREADS and more over those there are.

    All of the user count: in the user namespace, or (before Linux 5.14, or without one) in the system. The least power
    of two is taken under which one more can be started.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    n = 32
    while (n := 2 * n) < (1 << 22 if hard == resource.RLIM_INFINITY else hard):
        resource.setrlimit(resource.RLIMIT_NPROC, (n, hard))
        with contextlib.suppress(BlockingIOError):
            if not (pid := os.fork()):
                os._exit(0)
            os.waitpid(pid, 0)
            break
    resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
    return n + THREADS


def mount_scratch() -> bool:
    """Put a small file system in memory, which only this process sees and which goes with it, over the current folder.

    All others become read-only for it. False where that needs a user namespace that there is not, or rights to map one.
    """
    folder, options = os.getcwd().encode(), f"size={SCRATCH_MIB}m,nr_inodes=256,mode=700".encode()
    read_only = struct.pack("QQQQ", 1, 0, 1 << 18, 0)  # MOUNT_ATTR_RDONLY, MS_PRIVATE: nothing spreads outside
    done = IS_LINUX and LIBC.unshare(0x00020000) == 0
    done = done and LIBC.syscall(442, -1, b"/", 0x8000, read_only, len(read_only)) == 0  # mount_setattr, recursive
    done = done and LIBC.mount(b"scratch", folder, b"tmpfs", 2 + 4, options) == 0  # no devices, no set-user-id
    os.chdir(folder)
    return done and LIBC.mkdir(b"new", 0o700) == 0 == LIBC.rmdir(b"new")  # not where leave_namespaces could map no user


def confine(
    timeout_s: float, memory_mib: int, folders: list[str], n_processes: int | None = None, has_scratch: bool = False
) -> list[str]:
    """Give up, for good, all that a program needs no more; returns what holds, in words.

    `n_processes`: most_processes's, if there is to be a limit. `has_scratch`: the current folder is mount_scratch's and
    may be written to, if Landlock keeps it to that.
    Raises OSError if Python's own files cannot be read afterwards (root without privileges in another user's folder).
    """
    cpu_s = math.ceil(timeout_s) + 1
    limits = {"CPU": cpu_s, "AS": memory_mib << 20, "FSIZE": 0, "NOFILE": 64, "CORE": 0}
    layers = []
    if IS_LINUX:
        LIBC.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
        prctl(PR_SET_NO_NEW_PRIVS)
        may_write = has_scratch and landlock_version() >= 3  # the older let files be truncated anywhere
        has_landlock = allow_files(folders, may_write)
        may_write = may_write and has_landlock
        holds = {"Landlock": has_landlock, "scratch folder": may_write, "seccomp": forbid_system_calls(may_write)}
        layers += [name for name, is_there in holds.items() if is_there]
        limits |= {"SIGPENDING": TIMERS} | ({"FSIZE": SCRATCH_MIB << 20} if may_write else {})
        limits |= {"NPROC": n_processes} if n_processes else {}
    if "seccomp" not in layers:
        limits["NPROC"] = 1  # counted for the whole user, so no process or thread can be added
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # not every system has every limit
            layers.append(f"no limit {name}")
    open(os.__file__).close()
    return [*layers, "limits"]


def landlock_version() -> int:
    return LIBC.syscall(444, None, 0, 1)


# Landlock's rights over files, as bits: write, read, list; remove and make folders and files, move and truncate them.
WRITE_FILE, READ_FILE, READ_DIR = 2, 4, 8
CHANGE = WRITE_FILE | 16 | 32 | 128 | 256 | 1 << 13 | 1 << 14


def allow_files(folders: list[str], has_scratch: bool) -> bool:
    """Landlock: read Python's files and the system's libraries, write the current folder at most, reach no process."""
    version = landlock_version()
    if version < 1:
        return False
    access = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1  # all rights over files that this version knows
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = LIBC.syscall(444, struct.pack("QQQ", access, network, scopes), size, 0)
    paths = [sys.prefix, sys.base_prefix, *folders, "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    paths += ["/dev/zero", "/dev/random", "/dev/urandom", "/dev/stdin"]  # the last to be opened again by its name
    more = {"/dev/null": WRITE_FILE, os.getcwd(): CHANGE if has_scratch else 0}
    for path in dict.fromkeys([*paths, *more]):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights = READ_FILE | (READ_DIR if stat.S_ISDIR(os.fstat(fd).st_mode) else 0) | more.get(path, 0)
            LIBC.syscall(445, ruleset, 1, struct.pack("=Qi", rights, fd), 0)
            os.close(fd)
    done = LIBC.syscall(446, ruleset, 0) == 0
    os.close(ruleset)
    return done


# System calls refused with EPERM, in Linux's two tables of numbers: x86-64's own, and the one of all newer machines.
# In turn: new processes; other processes; sockets with a name; what works around this filter; shared memory, memory
# files, and what the user's processes have a common share of; identities and privileges; changes to the file system
# (Landlock forbids most of them, where there is Landlock), and at the end those by which a scratch folder is used.
REFUSED = {
    "x86_64": """fork=57 vfork=58 execve=59 execveat=322
        ptrace=101 process_vm_readv=310 process_vm_writev=311 kcmp=312 tkill=200 rt_sigqueueinfo=129
        rt_tgsigqueueinfo=297 setpriority=141 ioprio_set=251 sched_setparam=142 sched_setscheduler=144
        sched_setaffinity=203 sched_setattr=314 migrate_pages=256 move_pages=279
        socket=41 connect=42 accept=43 accept4=288 bind=49 listen=50 sendmsg=46 sendmmsg=307
        bpf=321 perf_event_open=298 userfaultfd=323 seccomp=317 prctl=157 syslog=103
        shmget=29 shmat=30 shmctl=31 semget=64 semop=65 semtimedop=220 semctl=66 msgget=68 msgsnd=69 msgrcv=70
        msgctl=71 mq_open=240 mq_unlink=241 memfd_create=319 add_key=248 request_key=249 keyctl=250 flock=73
        inotify_init=253 inotify_init1=294 fanotify_init=300 io_setup=206
        setuid=105 setgid=106 setreuid=113 setregid=114 setgroups=116 setresuid=117 setresgid=119 setfsuid=122
        setfsgid=123 mount=165 umount2=166 pivot_root=155 chroot=161 unshare=272 setns=308
        link=86 symlink=88 chmod=90 fchmod=91 chown=92 fchown=93 lchown=94 utime=132 mknod=133 setxattr=188
        lsetxattr=189 fsetxattr=190 removexattr=197 lremovexattr=198 fremovexattr=199 utimes=235 mknodat=259
        fchownat=260 futimesat=261 linkat=265 symlinkat=266 fchmodat=268 utimensat=280 open_by_handle_at=304
        truncate=76 rename=82 mkdir=83 rmdir=84 creat=85 unlink=87 mkdirat=258 unlinkat=263 renameat=264
        renameat2=316""",
    "aarch64": """execve=221 execveat=281
        ptrace=117 process_vm_readv=270 process_vm_writev=271 kcmp=272 tkill=130 rt_sigqueueinfo=138
        rt_tgsigqueueinfo=240 setpriority=140 ioprio_set=30 sched_setparam=118 sched_setscheduler=119
        sched_setaffinity=122 sched_setattr=274 migrate_pages=238 move_pages=239
        socket=198 connect=203 accept=202 accept4=242 bind=200 listen=201 sendmsg=211 sendmmsg=269
        bpf=280 perf_event_open=241 userfaultfd=282 seccomp=277 prctl=167 syslog=116
        shmget=194 shmat=196 shmctl=195 semget=190 semop=193 semtimedop=192 semctl=191 msgget=186 msgsnd=189
        msgrcv=188 msgctl=187 mq_open=180 mq_unlink=181 memfd_create=279 add_key=217 request_key=218 keyctl=219
        flock=32 inotify_init1=26 fanotify_init=262 io_setup=0
        setuid=146 setgid=144 setreuid=145 setregid=143 setgroups=159 setresuid=147 setresgid=149 setfsuid=151
        setfsgid=152 mount=40 umount2=39 pivot_root=41 chroot=51 unshare=97 setns=268
        linkat=37 symlinkat=36 fchmod=52 fchmodat=53 fchown=55 fchownat=54 mknodat=33 setxattr=5 lsetxattr=6
        fsetxattr=7 removexattr=14 lremovexattr=15 fremovexattr=16 utimensat=88 open_by_handle_at=265
        truncate=45 mkdirat=34 unlinkat=35 renameat=38 renameat2=276""",
}
CHANGES = "truncate rename mkdir rmdir creat unlink mkdirat unlinkat renameat renameat2".split()
# Calls from this number on (the same everywhere) are as if they were not there: libraries fall back on the older. Among
# them are io_uring, whose work no filter sees, clone3 and openat2, whose arguments lie in memory out of its sight, and
# all that kernels will learn.
NEWER = 424
OWN_PID = 0x7F00FF01  # stands in the filter for the process's own id; no id is as large
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Calls judged by one argument, by the rules in filter_program.
JUDGED = {
    "x86_64": dict(
        kill=62, tgkill=234, prlimit64=302, socketpair=53, sendto=44, fcntl=72, ioctl=16, clone=56, open=2, openat=257
    ),
    "aarch64": dict(
        kill=129, tgkill=131, prlimit64=261, socketpair=199, sendto=206, fcntl=25, ioctl=29, clone=220, openat=56
    ),
}


def forbid_system_calls(has_scratch: bool = False) -> bool:
    """Install the seccomp filter; False where there is none for this machine, or none can be installed."""
    program = filter_program(platform.machine(), has_scratch)
    if not program:
        return False
    program = program.replace(struct.pack("I", OWN_PID), struct.pack("I", os.getpid()))
    lines = ctypes.create_string_buffer(program, len(program))
    return prctl(PR_SET_SECCOMP, 2, struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(lines))) == 0


@functools.cache
def filter_program(machine: str, has_scratch: bool = False) -> bytes:
    """The filter in classic BPF: instructions of (code, steps if true, steps if false, value), 8 bytes each."""
    if machine not in MACHINES:
        return b""
    load, jump, equal, at_least, bits, done = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06
    allow, kill, eperm, enosys = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    lines = [(load, 0, 0, 4), (equal, 1, 0, MACHINES[machine]), (done, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(bits, 0, 1, 0x40000000), (done, 0, 0, kill)]  # x86-64's x32 calls
    lines += [(at_least, 0, 1, NEWER), (done, 0, 0, enosys)]
    named = [item.split("=") for item in REFUSED[machine].split()]
    refused = [int(number) for name, number in named if not (has_scratch and name in CHANGES)]
    lines += [(equal, len(refused) - i, 0, number) for i, number in enumerate(refused)]
    lines += [(jump, 0, 0, 1), (done, 0, 0, eperm)]
    # Of a call: the argument that counts, a test, values for which it may be true, and whether that allows the call.
    unix, no_address, thread = 1, 0, 0x10000
    duplicate_and_flags = 0, 1, 2, 3, 4, 1030  # of fcntl; not whom a file signals, nor leases, locks, the size of pipes
    terminal_unread_blocking_inherit = 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451
    rules = {name: (0, equal, (OWN_PID,), True) for name in ("kill", "tgkill")}
    rules |= {"prlimit64": (0, equal, (0,), True), "clone": (0, bits, (thread,), True)}
    rules |= {"socketpair": (0, equal, (unix,), True), "sendto": (5, equal, (no_address,), True)}
    rules |= {"fcntl": (1, equal, duplicate_and_flags, True)}
    rules |= {"ioctl": (1, equal, terminal_unread_blocking_inherit, True)}
    if not has_scratch:
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        rules |= {"open": (1, bits, (writing,), False), "openat": (2, bits, (writing,), False)}
    for name, number in JUDGED[machine].items():
        if name in rules:
            argument, test, values, is_allowed = rules[name]
            n = len(values)
            lines += [(equal, 0, n + 3, number), (load, 0, 0, 16 + 8 * argument)]
            lines += [(test, n - i, 0, value) for i, value in enumerate(values)]
            lines += [(done, 0, 0, result) for result in ((eperm, allow) if is_allowed else (allow, eperm))]
    lines.append((done, 0, 0, allow))
    return b"".join(struct.pack("HBBI", *line) for line in lines)
