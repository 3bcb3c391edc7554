"""The scripts where all is missing that Windows lacks: simulated in a child process; no test here replaces a Windows.

Path rules, text files' line ends, locks on open files and the console of Windows are not simulated.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORLD = r"""
import contextlib, ctypes, dataclasses, errno, fcntl, io, json, os, runpy, select, signal, stat, sys
from types import SimpleNamespace

MODULES = "crypt fcntl grp nis posixshmem pty pwd readline resource spwd syslog termios tty".split()
SYSTEM = '''O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC chown chroot fchmod fork forkpty getegid geteuid
    getgid getgroups getpgid getpgrp getuid killpg mkfifo nice pread sched_getaffinity setpgid setsid setuid
    sysconf'''.split()
SIGNALS = '''SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGUSR1 SIGUSR2 alarm pthread_sigmask setitimer
    sigwait'''.split()
for name in MODULES:
    sys.modules[name] = None
for module, names in ((os, SYSTEM), (signal, SIGNALS), (select, ["poll", "epoll"])):
    for name in names:
        delattr(module, name)

real = SimpleNamespace(open=os.open, fsync=os.fsync, stat=os.stat, file=io.open)

def refuse_proc(path):
    if str(path).startswith(("/proc", "/sys")):
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))

def open_file(path, *arguments, **named):
    refuse_proc(path)
    return real.file(path, *arguments, **named)

def stat_file(path, *arguments, **named):
    refuse_proc(path)
    return real.stat(path, *arguments, **named)

def open_descriptor(path, *arguments, **named):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return real.open(path, *arguments, **named)

def fsync(descriptor):
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    real.fsync(descriptor)

def kill(process, number):
    raise AssertionError(f"signal {number} would be sent to process {process}")

os.open, os.fsync, os.stat, os.kill, io.open = open_descriptor, fsync, stat_file, kill, open_file

def memory_of_process(process, counters, size):
    assert process.value == 2**64 - 1 and counters[0] == size == ctypes.sizeof(counters) == 72
    counters[1] = 3 << 30
    return 1

def memory_of_machine(status):
    assert status[0] == ctypes.sizeof(status) == 64
    status[2] = 1 << 30
    return 1

kernel32 = SimpleNamespace(
    K32GetProcessMemoryInfo=memory_of_process,
    GlobalMemoryStatusEx=memory_of_machine,
)
ctypes.WinDLL = lambda name: dict(kernel32=kernel32)[name]

def run(command):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = command.split()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
    return dict(code=code or 0, out=out.getvalue(), err=err.getvalue())

import torch

torch.set_num_threads(1)
from nanor1 import miniature, sandbox, tasks

tiny = dict(steps=3, tokens_per_step=100, width=32, mlp_width=32, n_layers=1)
miniature.MINIATURES["arithmetic"] = dataclasses.replace(miniature.MINIATURES["arithmetic"], **tiny)
"""
WORK = r"""
said = {f"{name} --help": run(f"{name}.py --help") for name in ("train_zero", "sample", "distill", "train_sft")}
folder = sys.argv_folder
flags = "--problems 2 --completions 2 --max-new-tokens 8 --eval-problems 2 --eval-samples 1 --threads 1 --workers 1"
leftover = f"{folder}/zero/checkpoints/.tmp-step_000001"
said["zero"] = run(f"train_zero.py --task arithmetic --steps 1 --out {folder}/zero {flags}")
os.makedirs(leftover)
said["resumed"] = run(f"train_zero.py --resume {folder}/zero --steps 2")
said["leftover"] = os.path.isdir(leftover)
with open(f"{folder}/pairs.jsonl", "w") as file:
    file.write('{"prompt": "1 + 2 =", "completion": "3"}\n' * 4)
said["sft"] = run(
    f"train_sft.py --model {folder}/zero --data {folder}/pairs.jsonl --epochs 1 --examples 2 --out {folder}/sft "
    "--threads 1"
)
said["sample"] = run(f"sample.py --model {folder}/zero --task arithmetic --limit 2 --max-new-tokens 8 --threads 1")
with open(f"{folder}/code.jsonl", "w") as file:
    file.write(json.dumps(dict(text="Double.", code="", test_list=["assert double(2) == 4"])) + "\n")
for name, work in dict(
    task=lambda: tasks.make_task("code", data=f"{folder}/code.jsonl"),
    sandbox=lambda: sandbox.run_tests("open('ran', 'w')", "assert f(1)"),
).items():
    try:
        said[name] = str(work())
    except ValueError as error:
        said[name] = f"ValueError: {error}"
said["isolation"] = sandbox.isolation()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the commands came to, and their folder."""
    folder = tmp_path_factory.mktemp("windows")
    program = f"{WORLD}\nsys.argv_folder = {str(folder)!r}\n{WORK}"
    environment = os.environ | {"NANOR1_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"folder": folder}


@pytest.mark.parametrize("script", ["train_zero", "sample", "distill", "train_sft"])
def test_a_script_shows_its_help(said, script):
    shown = said[f"{script} --help"]
    assert shown["code"] == 0 and shown["err"] == "" and shown["out"].startswith(f"usage: {script}.py")


@pytest.mark.parametrize("name", ["zero", "resumed", "sft", "sample"])
def test_what_needs_no_sandbox_runs(said, name):
    assert said[name]["code"] == 0, said[name]


def test_memory_is_what_windows_tells(said):
    lines = [json.loads(line) for line in (said["folder"] / "zero" / "metrics.jsonl").read_text().splitlines()]
    assert {line["peak_memory_gib"] for line in lines if "peak_memory_gib" in line} == {3.0}


def test_what_a_killed_save_left_is_removed(said):
    assert not said["leftover"]


def test_programs_of_a_model_are_refused_and_what_is_missing_is_named(said):
    assert said["task"].startswith("ValueError: ") and "code.jsonl, line 1" in said["task"]
    assert said["sandbox"].startswith("ValueError: ") and not (ROOT / "ran").exists()
    assert said["isolation"].startswith("none: ")
    for name in ("task", "sandbox", "isolation"):
        assert "no fork, no resource limits, no poll to confine them" in said[name]
