"""tests/bench/gpu.sh: every part can be run, what goes wrong stays in its part, and what comes back can be read."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "tests" / "bench"
sys.path.insert(0, str(BENCH))
import bench_train_step  # noqa: E402
import gpu  # noqa: E402
import gpu_parts  # noqa: E402
import measure  # noqa: E402

SCRIPT = BENCH / "gpu.sh"


def run_script(*arguments, out=None, **variables):
    own = ("OUT", "TINY", "DEADLINE", "MODEL", "DATA", "EVAL_DATA", "TRAIN_ARGS")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"PY": sys.executable, "OMP_NUM_THREADS": "1"} | variables | ({"OUT": str(out)} if out else {})
    return subprocess.run(["/bin/bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def results(out):
    """The lines of results.jsonl; and of its parts the exit codes by name."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(list(out.iterdir())) <= 8
    return rows, {row["part"]: row["rc"] for row in rows if "part" in row}


def test_the_script_is_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.parametrize("tiny", ["", "1"])
@pytest.mark.parametrize("plan", gpu.PLANS)
def test_every_part_of_a_plan_has_a_command_whose_script_is_there(plan, tiny, monkeypatch):
    done = run_script(plan, "--plan", TINY=tiny)
    assert done.returncode == 0, done.stderr
    _, *lines = done.stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == [part.name for part in gpu.PLANS[plan][1]]
    for line in lines:
        scripts = [word for word in line.split() if word.endswith(".py")]
        assert scripts and all((ROOT / script).exists() for script in scripts), line


def test_what_is_kept_for_later_parts_leaves_time_to_the_others():
    for deadline_s, parts in gpu.PLANS.values():
        assert sum(part.limit_s for part in parts if part.is_kept) + gpu.SAVE_S + gpu.LEAST_S < deadline_s


def test_a_part_that_is_not_there_is_refused_with_those_that_are():
    done = run_script("second", "decode", TINY="1")
    assert done.returncode == 2
    assert "second has no part decode; it has sweep-128, sweep-64, " in done.stderr


def test_without_a_gpu_it_says_so_and_what_can_be_done(tmp_path):
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    done = run_script("first", PATH=str(tmp_path), out=tmp_path / "out")
    assert done.returncode == 1
    assert "no GPU here" in done.stderr and "TINY=1" in done.stderr


def test_training_without_weights_says_what_is_missing(tmp_path):
    done = run_script("train", TINY="1", MODEL=str(tmp_path / "none"), out=tmp_path / "out")
    assert done.returncode == 1
    assert f"there is no {tmp_path}/none/config.json; $MODEL has to name it" in done.stderr


def test_a_tiny_part_runs_on_a_cpu(tmp_path):
    done = run_script("first", "smoke", TINY="1", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows, rcs = results(tmp_path)
    assert rcs == {"smoke": 0}
    assert [row["is_fine"] for row in rows if "check" in row] == [True] * 4
    assert "smoke: rc 0" in (tmp_path / "summary.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("plan", gpu.PLANS)
def test_a_whole_tiny_run_ends_well_in_every_part(plan, tmp_path):
    done = run_script(plan, TINY="1", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows, rcs = results(tmp_path)
    assert set(rcs.values()) == {0}
    assert {part.name for part in gpu.PLANS[plan][1]} <= rcs.keys()
    if plan == "train":
        assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 3
        for name in ("metrics.jsonl", "rollouts.jsonl", "before.jsonl", "after.jsonl"):
            assert (tmp_path / name).read_text().startswith("{"), name


# ---- how parts are run


@pytest.fixture
def run_parts(tmp_path, monkeypatch):
    """Run parts, given as name -> (Python, seconds), within so many seconds; returns the folder that they wrote to."""

    def run(scripts, deadline_s=60, **changes):
        monkeypatch.setattr(gpu, "TINY", True)
        monkeypatch.setattr(gpu, "LEAST_S", 0.2)
        monkeypatch.setattr(gpu, "START_S", gpu.time.monotonic())
        monkeypatch.setattr(gpu, "command_of", lambda name, folder: [sys.executable, "-c", scripts[name][0]])
        for name, value in changes.items():
            monkeypatch.setattr(gpu, name, value)
        report = gpu.Report(tmp_path / "out", "first")
        gpu.run_all([gpu.Part(name, *values[1:]) for name, values in scripts.items()], deadline_s, tmp_path, report)
        return report

    return run


def test_a_part_that_fails_or_hangs_does_not_stop_the_rest(run_parts):
    report = run_parts(
        {
            "fails": ("import sys; print('why'); sys.exit(3)", 20),
            "hangs": ("import time; print('{\"a\": 1}', flush=True); time.sleep(60)", 2),
            "speaks": ("print('{\"b\": 2}'); print('{\"cut of'); print('words')", 20),
        }
    )
    rows, rcs = results(report.out)
    assert rcs == {"fails": 3, "hangs": 124, "speaks": 0}
    assert report.has_failed
    assert [row for row in rows if "part" not in row] == [{"a": 1}, {"b": 2}]
    log = (report.out / "log.txt").read_text()
    assert "why" in log and "words" in log


def test_what_a_part_starts_ends_with_it(run_parts, tmp_path):
    path = tmp_path / "number"
    child = "import subprocess, time; p = subprocess.Popen(['sleep', '60']); "
    run_parts({"hangs": (child + f"open({str(path)!r}, 'w').write(str(p.pid)); time.sleep(60)", 2)})
    process, end_s = int(path.read_text()), time.monotonic() + 20
    while is_running(process):
        assert time.monotonic() < end_s
        time.sleep(0.05)


def is_running(process):
    """Nobody may have asked after one that has ended: it is then a zombie."""
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().split()[2] != "Z"


def test_a_part_gets_no_time_that_is_kept_for_a_later_one(run_parts):
    sleep = "import time; time.sleep(60)"
    report = run_parts(
        {"long": (sleep, 60), "no more": (sleep, 60), "kept": ("print(1)", 5, True)}, deadline_s=6.5, LEAST_S=0.4
    )
    assert results(report.out)[1] == {"long": 124, "no more": None, "kept": 0}
    assert "no more: no time left" in (report.out / "summary.txt").read_text()


def test_learning_that_is_asked_to_stop_may_save_and_has_not_failed(run_parts):
    learn = """import signal, sys, time
def stop(*_):
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
time.sleep(60)"""
    report = run_parts({"learn": (learn, 7)}, SAVE_S=5)
    assert results(report.out)[1] == {"learn": 0} and not report.has_failed
    assert "saved" in (report.out / "log.txt").read_text()


# ---- what parts and benchmarks tell


def answers(*verdicts):
    rows = [{"answers": [{"accuracy": accuracy, "format": form}]} for accuracy, form in verdicts]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_the_difference_of_a_run_is_paired_by_problem_lenient_and_strict(tmp_path, capsys):
    (tmp_path / "zero").mkdir()
    (tmp_path / "before.jsonl").write_text(answers((1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (None, 0.0)))
    (tmp_path / "after.jsonl").write_text(answers((1.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)))
    step = {"step_s": 2.0, "accuracy": 0.5, "truncated": 0.0, "response_tokens": 9.0, "dropped_groups": 1}
    (tmp_path / "zero" / "metrics.jsonl").write_text(json.dumps(step) + '\n{"step": 1, "eval_accuracy": 0.5}\n')
    gpu_parts.compare(type("Arguments", (), {"what": str(tmp_path)}))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary
    assert (summary["steps"], summary["problems"], summary["step_s"], summary["mfu"]) == (1, 4, 2.0, None)
    lenient, strict = summary["lenient"], summary["strict"]
    assert (lenient["before"], lenient["after"], lenient["difference"]) == (0.25, 0.75, 0.5)
    assert lenient["difference_95"] == pytest.approx([-0.1657, 0.8323], abs=1e-4)  # 0, 1, 1, 0: see paired.py
    assert (strict["before"], strict["after"], strict["difference"]) == (0.0, 0.5, 0.5)


def test_a_benchmark_with_a_case_that_could_not_be_measured_fails_after_saying_the_others(capsys):
    with pytest.raises(SystemExit, match="1"):
        measure.finish("name", {"device": "x"}, [{"a": 1}, None])
    assert json.loads(capsys.readouterr().out) == {"benchmark": "name", "device": "x", "results": [{"a": 1}]}
    measure.finish("name", {}, [{"a": 1}])


@pytest.mark.parametrize("free_gib, n_tokens", [(110, 32_768), (50, 16_384), (25, 4096)])
def test_a_pass_takes_the_tokens_whose_activations_fit(free_gib, n_tokens, monkeypatch):
    """The 1.5B shape keeps 2 MB a token, as was counted when it was traced: 67 GB of 32k; checkpointed 0.15 MB."""
    with torch.device("meta"):
        model = bench_train_step.Transformer(measure.SHAPES["qwen2.5-1.5b"]).to(torch.bfloat16)
    monkeypatch.setattr(bench_train_step, "free_memory", lambda device: free_gib * 2**30)
    assert bench_train_step.tokens_that_fit(model, 32_768) == n_tokens
    model.checkpoints_activations = True
    assert bench_train_step.tokens_that_fit(model, 32_768) == 32_768
