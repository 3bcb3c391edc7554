"""Confine a process, for good and as far as the system can: limits, Landlock, a seccomp filter, namespaces.

Linux's own means, all open to an ordinary user and in containers, each used where it is there. A confined process
starts no process (threads are free), opens no socket, changes nothing in the file system, signals no other process, and
reads only what Python needs. Elsewhere (other systems and machines) there are the resource limits alone.

Sources: seccomp(2), landlock(7), user_namespaces(7), capabilities(7); the numbers are those of Linux's headers.
"""

import ctypes
import errno
import math
import os
import platform
import resource
import signal
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
IS_LINUX = sys.platform == "linux"
PR_SET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER = 1, 3, 4, 22, 36
PR_SET_NO_NEW_PRIVS = 38


def prctl(option: int, value=1, argument=None) -> int:
    """What prctl(2) returns; -1 if it failed, or if this is not Linux."""
    zero = ctypes.c_ulong(0)
    return LIBC.prctl(option, ctypes.c_ulong(value), argument, zero, zero) if IS_LINUX else -1


def die_with_parent() -> None:
    prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def leave_namespaces() -> list[str]:
    """For the keeper and all it starts: unreadable to others, no network, no privileges over the processes outside."""
    left = {"user": 0x10000000, "network": 0x40000000, "IPC": 0x08000000}
    names = [name for name, flag in left.items() if IS_LINUX and LIBC.unshare(flag) == 0]
    die_with_parent()  # after leaving: new rights in a namespace undo it
    prctl(PR_SET_CHILD_SUBREAPER)
    prctl(PR_SET_DUMPABLE, 0)
    return [f"own {', '.join(names)} namespace"] if names else []


def confine(timeout_s: float, memory_mib: int, folders: list[str]) -> list[str]:
    """Give up, for good, all that a program needs no more; returns what holds, in words.

    Raises OSError if Python's own files cannot be read afterwards (root without privileges in another user's folder).
    """
    cpu_s = math.ceil(timeout_s) + 1
    limits = {"CPU": cpu_s, "AS": memory_mib << 20, "FSIZE": 0, "NOFILE": 64, "CORE": 0}
    layers = []
    if IS_LINUX:
        LIBC.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
        prctl(PR_SET_NO_NEW_PRIVS)
        layers += ["Landlock"] if allow_reading(folders) else []
        layers += ["seccomp"] if forbid_system_calls() else []
    if "seccomp" not in layers:
        limits["NPROC"] = 1  # counted for the whole user, so no process or thread can be added; root is free of it
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


def allow_reading(folders: list[str]) -> bool:
    """Landlock: read only Python's files and the system's libraries, write nothing, reach no process outside."""
    version = LIBC.syscall(444, None, 0, 1)
    if version < 1:
        return False
    access = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1  # all rights over files that this version knows
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = LIBC.syscall(444, struct.pack("QQQ", access, network, scopes), size, 0)
    paths = [sys.prefix, sys.base_prefix, *folders, "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    for path in [*paths, "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", os.getcwd()]:
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights = 4 + 8 if os.path.isdir(path) else 4  # READ_FILE, READ_DIR
            LIBC.syscall(445, ruleset, 1, struct.pack("=Qi", rights, fd), 0)
            os.close(fd)
    done = LIBC.syscall(446, ruleset, 0) == 0
    os.close(ruleset)
    return done


# System calls refused with EPERM, in Linux's two tables of numbers: x86-64's own, and the one of all newer machines.
# In turn: new processes; other processes; network and what works around this filter; shared memory and memory files;
# privileges; changes to the file system (Landlock forbids most of them, where there is Landlock).
BOTH = """pidfd_send_signal=424 io_uring_setup=425 open_tree=428 move_mount=429 fsopen=430 fsmount=432 pidfd_open=434
    pidfd_getfd=438 process_madvise=440 mount_setattr=442 memfd_secret=447 process_mrelease=448 fchmodat2=452"""
REFUSED = {
    "x86_64": f"""fork=57 vfork=58 execve=59 execveat=322
        ptrace=101 process_vm_readv=310 process_vm_writev=311 kcmp=312 tkill=200 rt_sigqueueinfo=129
        rt_tgsigqueueinfo=297 setpriority=141 ioprio_set=251 sched_setparam=142 sched_setscheduler=144
        sched_setaffinity=203 sched_setattr=314 migrate_pages=256 move_pages=279
        socket=41 bpf=321 perf_event_open=298 userfaultfd=323 seccomp=317 prctl=157
        shmget=29 semget=64 msgget=68 mq_open=240 memfd_create=319 add_key=248 request_key=249 keyctl=250
        mount=165 umount2=166 pivot_root=155 chroot=161 unshare=272 setns=308
        truncate=76 rename=82 mkdir=83 rmdir=84 creat=85 link=86 unlink=87 symlink=88 chmod=90 fchmod=91 chown=92
        fchown=93 lchown=94 utime=132 mknod=133 setxattr=188 lsetxattr=189 fsetxattr=190 removexattr=197
        lremovexattr=198 fremovexattr=199 utimes=235 mkdirat=258 mknodat=259 fchownat=260 futimesat=261 unlinkat=263
        renameat=264 linkat=265 symlinkat=266 fchmodat=268 utimensat=280 renameat2=316 {BOTH}""",
    "aarch64": f"""execve=221 execveat=281
        ptrace=117 process_vm_readv=270 process_vm_writev=271 kcmp=272 tkill=130 rt_sigqueueinfo=138
        rt_tgsigqueueinfo=240 setpriority=140 ioprio_set=30 sched_setparam=118 sched_setscheduler=119
        sched_setaffinity=122 sched_setattr=274 migrate_pages=238 move_pages=239
        socket=198 bpf=280 perf_event_open=241 userfaultfd=282 seccomp=277 prctl=167
        shmget=194 semget=190 msgget=186 mq_open=180 memfd_create=279 add_key=217 request_key=218 keyctl=219
        mount=40 umount2=39 pivot_root=41 chroot=51 unshare=97 setns=268
        truncate=45 mkdirat=34 unlinkat=35 symlinkat=36 linkat=37 renameat=38 mknodat=33 fchmod=52 fchmodat=53
        fchownat=54 fchown=55 setxattr=5 lsetxattr=6 fsetxattr=7 removexattr=14 lremovexattr=15 fremovexattr=16
        utimensat=88 renameat2=276 {BOTH}""",
}
# Calls judged by one argument: name, its place; and refused if it is another value ("!="), or has any bit of it ("&").
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
JUDGED = {
    "x86_64": dict(kill=62, tgkill=234, prlimit64=302, clone=56, open=2, openat=257),
    "aarch64": dict(kill=129, tgkill=131, prlimit64=261, clone=220, openat=56),
}
CLONE3, OPENAT2 = 435, 437  # their arguments lie in memory, out of a filter's sight: libraries fall back on the older


def forbid_system_calls() -> bool:
    """Install the seccomp filter; False where there is none for this machine, or none can be installed."""
    machine = platform.machine()
    if machine not in MACHINES:
        return False
    program = filter_program(machine, os.getpid())
    lines = ctypes.create_string_buffer(program, len(program))
    return prctl(PR_SET_SECCOMP, 2, struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(lines))) == 0


def filter_program(machine: str, own_pid: int) -> bytes:
    """The filter in classic BPF: instructions of (code, steps if true, steps if false, value), 8 bytes each."""
    load, equal, bits, done = 0x20, 0x15, 0x45, 0x06
    allow, kill, eperm, enosys = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    lines = [(load, 0, 0, 4), (equal, 1, 0, MACHINES[machine]), (done, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(bits, 0, 1, 0x40000000), (done, 0, 0, kill)]  # x86-64's x32 calls
    for name_number in REFUSED[machine].split():
        lines += [(equal, 0, 1, int(name_number.partition("=")[2])), (done, 0, 0, eperm)]
    for number in (CLONE3, OPENAT2):
        lines += [(equal, 0, 1, number), (done, 0, 0, enosys)]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    thread = 0x10000
    rules = {"kill": (0, equal, own_pid, 1), "tgkill": (0, equal, own_pid, 1), "prlimit64": (0, equal, 0, 1)}
    rules |= {"clone": (0, bits, thread, 1), "open": (1, bits, writing, 0), "openat": (2, bits, writing, 0)}
    for name, number in JUDGED[machine].items():
        argument, test, value, allowed = rules[name]
        lines += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * argument), (test, 1 - allowed, allowed, value)]
        lines += [(done, 0, 0, allow), (done, 0, 0, eperm)]
    lines.append((done, 0, 0, allow))
    return b"".join(struct.pack("HBBI", *line) for line in lines)
