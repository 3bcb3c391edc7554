"""The run folder: its files, its console, and what a resumed run cuts away."""

import io
import json
import math
import subprocess
import sys

import pytest

from nanor1.run.log import RunLog, default_run_folder, git_state, show_progress, write_json

COLUMNS = [("reward", "reward", "6.3f"), ("loss", "policy loss", "8.4f"), ("tokens", "tokens", "6d")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def catch_console(monkeypatch):
    """What is printed from here on, all of it."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    return sys.stdout


def json_lines(path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_a_new_run_records_what_it_depends_on(tmp_path):
    RunLog.create(tmp_path / "runs" / "a", {"steps": 5, "lr": 1e-6}).close()
    config = json.loads((tmp_path / "runs" / "a" / "config.json").read_text())
    assert config["arguments"] == {"steps": 5, "lr": 1e-6}
    assert config["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert config["versions"].keys() == {"python", "torch", "triton", "nanor1"} and config["versions"]["torch"]
    assert config["device"] and config["command"] and config["started"]
    assert {"commit", "dirty"} <= config.keys()


def test_a_folder_that_holds_files_is_never_overwritten(tmp_path):
    with RunLog.create(tmp_path, {"steps": 0}):
        pass  # a start that failed before it measured anything
    with RunLog.create(tmp_path, {"steps": 1}) as log:  # may be repeated
        log.metrics(1, {"reward": 0.5})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="--out.*--resume"):
        RunLog.create(tmp_path, {"steps": 2})
    with pytest.raises(ValueError, match="already holds files"):
        RunLog.create(tmp_path / "config.json", {"steps": 2})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_start_that_was_killed_while_its_teacher_answered_may_be_repeated(tmp_path):
    RunLog.create(tmp_path, {}).close()
    for name in ("traces.jsonl", "traces.jsonl.progress.json", ".traces.jsonl.progress.json.tmp", ".config.json.tmp"):
        (tmp_path / name).write_text("1\n")
    RunLog.create(tmp_path, {}).close()
    assert (tmp_path / "traces.jsonl").read_text() == "1\n"
    (tmp_path / "more.jsonl").touch()
    with pytest.raises(ValueError, match="already holds files"):
        RunLog.create(tmp_path, {})


def test_a_run_without_checkpoint_begins_again_without_its_lines(tmp_path, monkeypatch):
    console = catch_console(monkeypatch)
    with RunLog.create(tmp_path, {}) as log:
        log.metrics(0, {"eval_loss": 1.0})
        log.metrics(1, {"loss": 1.0})
    with RunLog.open(tmp_path, None) as log:
        assert "begun again" in console.getvalue() and "cut 2 lines from metrics.jsonl" in console.getvalue()
    assert json_lines(tmp_path / "metrics.jsonl") == []


def test_default_folders_are_unique_within_a_second(tmp_path):
    folders = {default_run_folder("zero", tmp_path / "runs") for _ in range(20)}
    assert len(folders) == 20
    assert all(folder.name.startswith("zero-20") and not any(folder.iterdir()) for folder in folders)


def test_metrics_are_rounded_to_six_digits_and_stay_valid_json(tmp_path, monkeypatch):
    console = catch_console(monkeypatch)
    log = RunLog.create(tmp_path, {})
    log.metrics(1, {"loss": 0.123456789, "tokens": 123456789, "ok": True, "lr": 1e-6, "name": "é", "none": None})
    log.metrics(2, {"loss": math.nan, "gap": -math.inf, "parts": [1.00000001, math.inf]})
    log.metrics(3, {"loss": math.nan})
    first, second, third = json_lines(tmp_path / "metrics.jsonl")  # read while the log is open: lines are flushed
    assert first == {
        "step": 1,
        "loss": 0.123457,
        "tokens": 123456789,
        "ok": True,
        "lr": 1e-6,
        "name": "é",
        "none": None,
    }
    assert second == {"step": 2, "loss": None, "gap": None, "parts": [1.0, None]} and third["loss"] is None
    warnings = console.getvalue().splitlines()
    assert [line.split()[1] for line in warnings] == ["gap", "loss", "parts"]
    assert "step 2" in warnings[1] and (tmp_path / "log.txt").read_text() == console.getvalue()


def test_rollouts_are_one_line_each(tmp_path):
    with RunLog.create(tmp_path, {}) as log:
        log.rollouts(3, [{"text": "a\nb", "reward": 1.0}, {"text": "c", "reward": None}])
    expected = [{"step": 3, "text": "a\nb", "reward": 1.0}, {"step": 3, "text": "c", "reward": None}]
    assert json_lines(tmp_path / "rollouts.jsonl") == expected


def test_a_resumed_run_logs_no_step_twice(tmp_path, monkeypatch):
    console = catch_console(monkeypatch)
    with RunLog.create(tmp_path, {}) as log:
        for step in range(1, 6):
            log.metrics(step, {"loss": step / 10})
            log.rollouts(step, [{"text": "x"}, {"text": "y"}])
        log.say("before")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # the kill came here
    with RunLog.open(tmp_path, 3) as log:
        assert "3 lines from metrics.jsonl, 4 lines from rollouts.jsonl" in console.getvalue()
        log.metrics(4, {"loss": 40.0})
    assert [(line["step"], line["loss"]) for line in json_lines(tmp_path / "metrics.jsonl")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 40.0),
    ]
    assert [line["step"] for line in json_lines(tmp_path / "rollouts.jsonl")] == [1, 1, 2, 2, 3, 3]
    assert (tmp_path / "log.txt").read_text().startswith("before\nresumed at step 3")


@pytest.mark.parametrize("tail", [b'{"step": 1}', b"\x00\x00\x00\n", b"[1]\n", b'{"loss": 1}\n', b"\xff\xfe\n"])
def test_a_broken_last_line_is_dropped_on_resume(tmp_path, tail):
    with RunLog.create(tmp_path, {}) as log:
        log.metrics(0, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    RunLog.open(tmp_path, 9).close()
    assert json_lines(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.0}]


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(ValueError, match="not a run folder"):
        RunLog.open(tmp_path, 0)


def test_a_killed_run_keeps_every_line_it_logged(tmp_path):
    RunLog.create(tmp_path / "run", {}).close()
    script = f"""
import os, signal
from nanor1.run.log import RunLog
log = RunLog({str(tmp_path / "run")!r})
for step in range(50):
    log.metrics(step, {{"loss": 0.5}})
log.say("the end")
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert [line["step"] for line in json_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(50))
    assert (tmp_path / "run" / "log.txt").read_text() == "the end\n"


def test_console_lines_align_under_a_header_repeated_every_twenty(tmp_path, monkeypatch):
    console = catch_console(monkeypatch)
    with RunLog.create(tmp_path, {}, COLUMNS) as log:
        for step in range(1, 42):
            log.line(step, {"reward": 0.5, "loss": -0.00012, "other": 1.0} | ({"tokens": 7} if step > 1 else {}))
        lines = console.getvalue().splitlines()
    header = "  step  reward  policy loss  tokens"
    assert [index for index, line in enumerate(lines) if line == header] == [0, 21, 42]
    assert lines[1] == "     1   0.500      -0.0001       -"
    assert lines[2] == "     2   0.500      -0.0001       7"
    assert {len(line) for line in lines} == {len(header)}
    assert (tmp_path / "log.txt").read_text().splitlines() == lines


def test_columns_wider_than_the_console_are_refused(tmp_path):
    with pytest.raises(AssertionError, match="126 characters of 120"):
        RunLog.create(tmp_path, {}, [(f"m{i}", "m", "8.3f") for i in range(12)])


def test_progress_rewrites_one_terminal_line_and_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "20")
    show_progress("step 1/4")
    show_progress("a line that is longer than the terminal is wide")
    show_progress()
    assert sys.stderr.getvalue() == "\r\x1b[Kstep 1/4\r\x1b[Ka line that is long\r\x1b[K"


def test_progress_is_silent_without_a_terminal(capsys):
    show_progress("step 1/4")
    show_progress()
    assert capsys.readouterr() == ("", "")


def test_the_summary_is_replaced_whole_or_not_at_all(tmp_path):
    with RunLog.create(tmp_path, {}) as log:
        log.summary({"accuracy": 0.25, "loss": math.nan})
        with pytest.raises(TypeError):
            log.summary({"accuracy": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"accuracy": 0.25, "loss": None}


def test_a_json_file_survives_a_failed_write(tmp_path, monkeypatch):
    write_json(tmp_path / "best.json", {"step": 1})

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "best.json", {"step": 2})
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 1}


def test_git_state_tells_commit_and_changes_of_tracked_sources_only(tmp_path):
    def git(*command: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    try:
        git("init")
    except OSError:
        pytest.skip("git is not installed")
    git("commit", "--allow-empty", "-m", "somebody else's", "--no-verify")
    source = tmp_path / "source.py"
    source.write_text("1\n")
    assert git_state(source) == (None, None)  # below a checkout, but not of it
    git("add", "source.py")
    git("commit", "-m", "first", "--no-verify")
    (tmp_path / "untracked.txt").write_text("x")
    assert git_state(source) == (git("rev-parse", "HEAD").strip(), False)
    source.write_text("2\n")
    assert git_state(source) == (git("rev-parse", "HEAD").strip(), True)
