"""What a program does when nobody reads its console any more: real pipes, real processes."""

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRINTING = """
from nanor1.run.config import user_errors

@user_errors()
def main():
    {work}

main()
"""
TINY = """
import dataclasses, runpy, sys
from nanor1 import miniature

tiny = dict(steps=2, tokens_per_step=100, width=32, mlp_width=32, n_layers=1)
miniature.MINIATURES["arithmetic"] = dataclasses.replace(miniature.MINIATURES["arithmetic"], **tiny)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FLAGS = "--problems 2 --completions 2 --max-new-tokens 4 --eval-problems 2 --eval-samples 1 --threads 1 --workers 1"


def start(command, cache, cwd=ROOT, **streams):
    environment = os.environ | {"NANOR1_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment, text=True, **streams)


def closed_pipe():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("unbuffered", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("n_lines", [1, 100_000])  # what waits to be written at the end, and what does not
def test_what_nobody_reads_ends_without_a_word(tmp_path, unbuffered, n_lines):
    writing = closed_pipe()
    printing = PRINTING.format(work=f"for _ in range({n_lines}): print('a line')")
    shown = start([*unbuffered, "-c", printing], tmp_path, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert shown.communicate() == (None, "") and shown.returncode == 141  # 128 + SIGPIPE


def test_what_is_read_keeps_its_exit_status_and_its_errors(tmp_path):
    for work, code, out, err in [
        ("print('a')", 0, "a\n", ""),
        ("print('a'); raise SystemExit(7)", 7, "a\n", ""),
        ("print('a'); raise ValueError('b')", 2, "a\n", "error: b\n"),
        ("raise KeyboardInterrupt", 130, "", "interrupted\n"),
    ]:
        shown = start(["-c", PRINTING.format(work=work)], tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert shown.communicate() == (out, err) and shown.returncode == code


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
@pytest.mark.parametrize("n_lines", [1, 100_000])
def test_a_console_without_room_is_an_error_that_is_said_once(tmp_path, n_lines):
    with open("/dev/full", "w") as full:
        printing = PRINTING.format(work=f"for _ in range({n_lines}): print('a line')")
        shown = start(["-c", printing], tmp_path, stdout=full, stderr=subprocess.PIPE)
        assert shown.communicate()[1] == "error: [Errno 28] No space left on device\n" and shown.returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's way to close a stream")
@pytest.mark.parametrize("closed, other", [("stdout", "stderr"), ("stderr", "stdout")])
def test_a_stream_that_is_closed_from_the_start_drops_what_it_gets(closed, other):
    work = f"import sys; print('lost', sys.{closed}.isatty(), file=sys.{closed}); print('kept', file=sys.{other})"
    command = ["sh", "-c", 'exec "$@" ' + {"stdout": ">&-", "stderr": "2>&-"}[closed], "sh", sys.executable, "-c"]
    shown = subprocess.run([*command, PRINTING.format(work=work)], cwd=ROOT, capture_output=True, text=True)
    assert {other: getattr(shown, other), closed: getattr(shown, closed)} == {other: "kept\n", closed: ""}
    assert shown.returncode == 0


@pytest.mark.parametrize("script", ["train_zero", "sample", "distill", "train_sft"])
def test_all_that_a_script_does_is_watched_over(script):
    (main,) = [f for f in ast.parse((ROOT / f"{script}.py").read_text()).body if getattr(f, "name", "") == "main"]
    assert [ast.unparse(decorator) for decorator in main.decorator_list] == ["user_errors()"]


def test_help_of_which_the_first_line_is_read_ends_without_a_word(tmp_path):
    shown = start(["train_zero.py", "--help"], tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert shown.stdout.readline() == "usage: train_zero.py [--option value ...]\n"
    shown.stdout.close()
    assert shown.stderr.read() == "" and shown.wait() in (0, 141)  # 0: all of it was written before


def test_answers_that_nobody_reads_end_the_program(tmp_path):
    writing = closed_pipe()
    command = ["-c", TINY, "sample.py", "1 + 2 =", "--model", "miniature/arithmetic", "--max-new-tokens", "4"]
    shown = start(command, tmp_path, stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    said = shown.communicate()[1]
    assert shown.returncode == 141 and "Broken pipe" not in said and "Traceback" not in said, said


def test_a_run_goes_on_without_its_console(tmp_path):
    writing = closed_pipe()
    command = ["-c", TINY, "train_zero.py", "--task", "arithmetic", "--steps", "2", "--out", str(tmp_path / "run")]
    run = start([*command, *FLAGS.split()], tmp_path, stdout=writing, stderr=subprocess.STDOUT)
    os.close(writing)
    assert run.wait(60) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert "device: cpu" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_says_once_on_stderr_that_its_console_is_gone(tmp_path):
    writing = closed_pipe()
    saying = "from nanor1.run.log import RunLog\nlog = RunLog('.')\nlog.say('a')\nlog.say('b')"
    run = start(["-c", saying], tmp_path, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert run.communicate()[1] == "nobody reads the console; the run goes on: see log.txt\n" and run.returncode == 0
    assert (tmp_path / "log.txt").read_text() == "a\nb\n"


def test_ctrl_c_saves_a_run_whose_console_it_ends_too(tmp_path):
    """As with `2>&1 | tee`: the reader is gone when the run hears of Ctrl-C."""
    command = ["-c", TINY, "train_zero.py", "--task", "arithmetic", "--steps", "100000", "--out", str(tmp_path / "run")]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run = start([*command, "--eval-every", "0", *FLAGS.split()], tmp_path, **streams)
    for line in run.stdout:
        if line.split()[:1] == ["3"]:
            break
    run.stdout.close()
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 0
    last = (tmp_path / "run" / "log.txt").read_text().splitlines()[-1]
    assert last.startswith("stopped after step ") and [*(tmp_path / "run" / "checkpoints").glob("step_*")]
