"""Checkpoints: whole or not seen, whatever happens while they are written."""

import errno
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import call_main, own_process
from safetensors.torch import load_file, save_file

from nanor1.miniature import MINIATURES
from nanor1.run import checkpoint
from nanor1.run.checkpoint import (
    best_step,
    latest_checkpoint,
    load_checkpoint,
    model_folder,
    save_checkpoint,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_zero  # noqa: E402


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.arange(8.0)}, folder / "model.safetensors")


def save(root: Path, step: int, **keywords) -> Path:
    tensors = {"moment": torch.full((100,), float(step))}
    arguments = {"write_model": write_model, "tensors": tensors, "state": {"step": step}} | keywords
    return save_checkpoint(root, step, **arguments)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def latest(root: Path) -> tuple[Path | None, list[str]]:
    reports: list[str] = []
    return latest_checkpoint(root, reports.append), reports


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "fp32": torch.randn(3, 5, generator=generator),
        "bf16": torch.randn(7, generator=generator).bfloat16(),
        "transposed": torch.arange(6).reshape(2, 3).T,
        "bytes": torch.arange(256).to(torch.uint8),
        "scalar": torch.tensor(3),
    }
    state = {"step": 12, "seed": 5, "tokens": 10**15, "best": 0.1, "nested": {"a": [1, 2]}}
    folder = save(tmp_path / "checkpoints", 12, tensors=tensors, state=state)
    loaded, loaded_state = load_checkpoint(folder)
    assert folder == tmp_path / "checkpoints" / "step_000012" and loaded_state == state
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_a_checkpoint_holds_only_json_and_safetensors(tmp_path):
    folder = save(tmp_path, 1)
    expected = ["config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert names(folder) == expected
    for path in folder.iterdir():
        assert load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text()) is not None


def test_the_latest_of_none_is_none(tmp_path):
    assert latest(tmp_path / "missing") == (None, [])
    (tmp_path / "step_x").mkdir()
    assert latest(tmp_path) == (None, [])


def test_the_last_few_and_the_best_are_kept(tmp_path):
    for step, best in [(1, 1), (2, 1), (3, 1), (4, 4), (5, None), (6, None), (7, None)]:
        save(tmp_path, step, keep_best=best)
        if step == 3:
            assert names(tmp_path) == ["best.json", "step_000001", "step_000002", "step_000003"]
    assert names(tmp_path) == ["best.json", "step_000004", "step_000006", "step_000007"]
    assert best_step(tmp_path) == 4 and latest(tmp_path) == (tmp_path / "step_000007", [])


def test_the_latest_is_the_highest_step_not_the_last_in_the_alphabet(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert latest(tmp_path)[0] == tmp_path / "step_1000000"


def test_a_run_resumed_from_before_gives_up_the_later_steps(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=3)
    assert latest(tmp_path)[0].name == "step_000030"
    save(tmp_path, 15, keep_last=3)
    assert names(tmp_path) == ["step_000010", "step_000015"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5)
    folder = save(tmp_path, 5, state={"step": "again"})
    assert load_checkpoint(folder)[1] == {"step": "again"} and names(tmp_path) == ["step_000005"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip_one_bit, Path.unlink], ids=["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_reported_and_passed_over(tmp_path, harm, name):
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    harm(damaged / name)
    folder, reports = latest(tmp_path)
    assert folder == tmp_path / "step_000001"
    assert len(reports) == 1 and str(damaged) in reports[0]
    assert name in reports[0] or name == "manifest.json"  # a harmed manifest may blame a file that is whole
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        load_checkpoint(damaged)


@pytest.fixture
def hashed(monkeypatch):
    """The files that were read to be hashed."""
    paths, real_digest = [], checkpoint.digest

    def digest(path):
        paths.append(path)
        return real_digest(path)

    monkeypatch.setattr(checkpoint, "digest", digest)
    return paths


TICK_S = 0.03  # a file is remembered when it is older than the tick of the clock that stamps it
FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def test_a_checkpoint_that_is_looked_for_again_and_again_is_hashed_once(tmp_path, hashed):
    run = tmp_path / "run"
    folder = save(run / "checkpoints", 1)
    hashed.clear()
    time.sleep(TICK_S)
    for _ in range(3):
        assert model_folder(run) == latest(run / "checkpoints")[0] == folder
        load_checkpoint(folder)
    assert sorted(path.name for path in hashed) == FILES


def keep_times(path: Path) -> None:
    times = path.stat()
    flip_one_bit(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    flip_one_bit(other)
    os.replace(other, path)


@pytest.mark.parametrize("harm", [truncate, flip_one_bit, keep_times, replace_file, Path.unlink])
@pytest.mark.parametrize("wait_s", [0, TICK_S])
def test_a_file_that_changes_after_it_was_verified_is_seen(tmp_path, harm, wait_s):
    folder = save(tmp_path, 1)
    time.sleep(wait_s)
    assert latest(tmp_path) == (folder, [])
    harm(folder / "model.safetensors")
    assert latest(tmp_path)[0] is None
    with pytest.raises(ValueError, match="model.safetensors"):
        load_checkpoint(folder)


def test_only_what_changed_is_hashed_again(tmp_path, hashed):
    folder = save(tmp_path, 1)
    time.sleep(TICK_S)
    latest(tmp_path)
    hashed.clear()
    state = folder / "state.json"
    state.write_bytes(state.read_bytes())
    time.sleep(TICK_S)
    assert latest(tmp_path)[0] == folder and latest(tmp_path)[0] == folder
    assert hashed == [state]


TINY = replace(MINIATURES["arithmetic"], steps=2, tokens_per_step=100, width=32, mlp_width=32, n_layers=1)
FLAGS = "--problems 2 --completions 2 --max-new-tokens 4 --eval-problems 2 --eval-samples 1 --threads 1 --workers 1"


def test_a_script_hashes_the_checkpoint_that_it_starts_from_once(tmp_path, hashed):
    with own_process(tmp_path / "cache") as patch:
        patch.setitem(MINIATURES, "arithmetic", TINY)
        run = ["--out", tmp_path / "run", "--steps", 1, *FLAGS.split()]
        assert call_main(train_zero, ["--task", "arithmetic", *run])[0] == 0
        (folder,) = (tmp_path / "run" / "checkpoints").glob("step_*")
        files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
        for arguments in (
            ["--model", tmp_path / "run", "--out", tmp_path / "other", "--steps", 1, *FLAGS.split()],
            ["--resume", tmp_path / "run", "--steps", 2],
        ):
            for path in files:  # as after some time, or in another process
                path.touch()
            time.sleep(TICK_S)
            hashed.clear()
            assert call_main(train_zero, arguments)[0] == 0
            assert sorted(path for path in hashed if path.parent == folder) == files


def test_a_checkpoint_under_another_steps_name_is_damaged(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "step_000009")
    folder, reports = latest(tmp_path)
    assert folder is None and "of step 1" in reports[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_tensors_and_states_are_refused(tmp_path, value):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="moment holds a nan or infinity"):
        save(tmp_path, 2, tensors={"moment": torch.tensor([0.0, value])})
    with pytest.raises(ValueError, match="state is not JSON"):
        save(tmp_path, 2, state={"loss": value})
    assert names(tmp_path) == ["step_000001"] and latest(tmp_path)[0] == tmp_path / "step_000001"


@pytest.mark.parametrize("full_at", range(2, 10))  # of ten calls, the first and last are not about a file's content
def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_litter(tmp_path, monkeypatch, full_at):
    save(tmp_path, 1)
    real_fsync, calls = os.fsync, []

    def fsync_until_full(descriptor):
        calls.append(descriptor)
        if len(calls) == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_until_full)
    with pytest.raises(OSError, match=r"step_000002.* needs more than [\d,]+ bytes and [\d,]+ were free"):
        save(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == ["step_000001"] and latest(tmp_path) == (tmp_path / "step_000001", [])


def test_no_room_while_safetensors_writes_is_told_as_such(tmp_path):
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="step_000002: it needs more than 200,000 bytes"):
            save(tmp_path, 2, tensors={"moment": torch.zeros(50_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step_000001"] and latest(tmp_path) == (tmp_path / "step_000001", [])


def test_another_error_while_writing_is_passed_on_and_leaves_no_litter(tmp_path):
    def broken(folder: Path) -> None:
        raise KeyError("weight")

    with pytest.raises(KeyError, match="weight"):
        save(tmp_path, 1, write_model=broken)
    assert names(tmp_path) == []


def test_what_killed_saves_left_is_removed(tmp_path):
    for name in (".tmp-step_000001", ".tmp-step_000001-77", ".old-step_000001"):
        (tmp_path / name).mkdir()
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_000002"]


# One process, so that torch is imported once; its children are the runs that are killed.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from nanor1.run import checkpoint

torch.set_num_threads(1)
root = Path(sys.argv[1])

def save(step):
    tensors = {"moment": torch.full((50_000,), float(step))}
    write = lambda folder: save_file({"weight": torch.full((1000,), float(step))}, folder / "model.safetensors")
    checkpoint.save_checkpoint(root, step, write_model=write, tensors=tensors, state={"step": step}, keep_last=1)

def step_found():
    reports = []
    folder = checkpoint.latest_checkpoint(root, reports.append)
    assert folder is not None and not reports, (folder, reports)
    assert not [path for path in root.glob("step_*") if checkpoint.find_damage(path)]  # also while old ones are removed
    tensors, state = checkpoint.load_checkpoint(folder)
    assert (tensors["moment"] == state["step"]).all()
    return state["step"]

def in_child(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child

def save_until_killed(first):
    for step in range(first, first + 1000):
        save(step)

def killed_at_call(number, step):
    # SIGKILL in place of the number-th call that changes the disk.
    count = [0]
    def counted(call):
        def wrapper(*arguments, **keywords):
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)
        return wrapper
    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    save(step)

save(1)
for same_step in (False, True):
    number, was_killed = 0, True
    while was_killed:
        number += 1
        before = step_found()
        step = before if same_step else before + 1
        status = os.waitpid(in_child(lambda: killed_at_call(number, step)), 0)[1]
        was_killed = os.WIFSIGNALED(status)
        assert was_killed or os.WEXITSTATUS(status) == 0, status
        assert step_found() in (before, step), (number, before, step_found())
    print("points", number - 1)
random.seed(0)
for _ in range(6):
    before = step_found()
    child = in_child(lambda: save_until_killed(before + 1))
    time.sleep(random.uniform(0.01, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert step_found() >= before
final = step_found() + 1
save(final)
print("names", *sorted(os.listdir(root)), final)
"""


def test_kill_9_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *points, left = [line.split() for line in done.stdout.splitlines()]
    assert all(int(n_points) >= 15 for _, n_points in points) and len(points) == 2  # it was killed, and often
    assert left[1:] == [f"step_{int(left[-1]):06d}", left[-1]]  # and the next save cleaned up
