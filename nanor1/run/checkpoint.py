"""Atomic save, verified resume.

    checkpoints/step_000200/    a model folder, and beside it optimizer.safetensors, state.json and manifest.json
    checkpoints/best.json       the step that is kept for being the best

A checkpoint is written into a hidden sibling and gets its name by one rename, after every byte is on the disk. The
manifest, written last, holds each file's SHA-256 and size: a checkpoint is used only if it still matches. So whenever
the process, the machine or the disk gives out, the checkpoints before are whole and this one is whole or not seen.
A process that looks for a checkpoint several times hashes a file once, as long as the file stays as it is.
Nothing is pickled: tensors are safetensors, the rest is JSON (which turns tuples into lists, and keys into strings).

Left out: asynchronous and sharded saving; two runs saving into one folder at once.
"""

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nanor1.run.log import fsync, write_json

Tensors = dict[str, torch.Tensor]
CLOCK_TICK_NS = 20_000_000  # file systems stamp a change by a clock that moves every 1 to 10 ms
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save_checkpoint(
    root: str | Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    tensors: Tensors,
    state: dict,
    keep_last: int = 2,
    keep_best: int | None = None,
) -> Path:
    """Save step `step` into the folder `root` (a run's `checkpoints`), then drop all but the last few and the best one.

    `write_model(folder)` writes the model's files; `tensors` and `state` are what `load_checkpoint` gives back.
    `keep_best` is the step of the best checkpoint so far: it stays until another is named. ValueError where a tensor
    or the state holds a nan or infinity, OSError where there is no room; earlier checkpoints are then untouched.
    """
    assert step >= 0 and keep_last >= 1
    root = Path(root)
    require_finite(tensors, state, step)
    root.mkdir(parents=True, exist_ok=True)
    fsync(root.parent)
    remove_leftovers(root, "tmp")
    folder = root / f"step_{step:06d}"
    temporary = root / f".tmp-{folder.name}"
    free = shutil.disk_usage(root).free
    try:
        write_files(temporary, step, write_model, tensors, state)
        publish(temporary, folder)
    except Exception as error:
        if system_error_number(error) not in NO_ROOM:
            raise
        written = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        needed = max(written, sum(tensor.nbytes for tensor in tensors.values()))
        raise OSError(
            f"no room for {folder}: it needs more than {needed:,} bytes and {free:,} were free ({error}); earlier "
            f"checkpoints are whole: free some space or keep fewer checkpoints, then resume the run"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if keep_best is not None:
        write_json(root / "best.json", {"step": keep_best})
    prune(root, step, keep_last)
    return folder


def latest_checkpoint(root: str | Path, report: Callable[[str], None] = print) -> Path | None:
    """The newest whole checkpoint below `root`, or None; damaged ones are reported and passed over."""
    for folder in reversed(checkpoint_folders(Path(root))):
        damage = find_damage(folder)
        if damage is None:
            return folder
        report(f"warning: passing over the damaged checkpoint {folder}: {damage}")
    return None


def model_folder(name: str | Path, report: Callable[[str], None] = print) -> Path:
    """The newest whole checkpoint where `name` is a run folder, else `name`; ValueError for a run without one."""
    checkpoints = Path(name) / "checkpoints"
    if not checkpoints.is_dir():
        return Path(name)
    folder = latest_checkpoint(checkpoints, report)
    if folder is None:
        raise ValueError(f"the run {name} has no whole checkpoint; give a model folder or another run")
    return folder


def best_step(root: str | Path) -> int | None:
    """The step last saved as `keep_best`, or None."""
    path = Path(root) / "best.json"
    return json.loads(path.read_text(encoding="utf-8"))["step"] if path.exists() else None


def load_checkpoint(folder: str | Path) -> tuple[Tensors, dict]:
    """The tensors (in CPU memory) and the state of a checkpoint; ValueError where a file is missing or damaged."""
    folder = Path(folder)
    damage = find_damage(folder)
    if damage is not None:
        raise ValueError(f"{folder} is not a whole checkpoint: {damage}; resume from an earlier one")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return load_file(folder / "optimizer.safetensors"), state


def require_finite(tensors: Tensors, state: dict, step: int) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"step {step} is not saved: {name} holds a nan or infinity; resume from an earlier one")
    try:
        json.dumps(state, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"step {step} is not saved: its state is not JSON: {error}") from error


def write_files(folder: Path, step: int, write_model: Callable[[Path], None], tensors: Tensors, state: dict) -> None:
    """Write everything and wait for the disk; the manifest comes last."""
    folder.mkdir()
    write_model(folder)
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "optimizer.safetensors"
    )
    write_json(folder / "state.json", state)
    paths = sorted(folder.rglob("*"))
    for path in paths:
        fsync(path)
    files = {path.relative_to(folder).as_posix(): digest(path) for path in paths if path.is_file()}
    write_json(folder / "manifest.json", {"step": step, "files": files})


def publish(temporary: Path, folder: Path) -> None:
    """Give a finished checkpoint its name; one already there (of a run resumed from before it) stays until then."""
    if folder.exists():
        aside = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed after its second rename
        os.rename(folder, aside)
    os.rename(temporary, folder)
    fsync(folder.parent)


def prune(root: Path, step: int, keep_last: int) -> None:
    """Keep the last checkpoints up to `step` and the best one; later ones are of a past that this run has given up."""
    remove_leftovers(root, "old")
    folders = checkpoint_folders(root)
    kept = {step_of(folder) for folder in folders if step_of(folder) <= step}
    kept = {*sorted(kept)[-keep_last:], best_step(root)}
    for folder in folders:
        if step_of(folder) not in kept:
            # Hidden first, so that a half-removed checkpoint is never met under its name.
            doomed = folder.with_name(f".tmp-{folder.name}")
            os.rename(folder, doomed)
            shutil.rmtree(doomed)


def remove_leftovers(root: Path, kind: str) -> None:
    """Remove the hidden folders of saves that did not finish."""
    for folder in root.glob(f".{kind}-step_*"):
        shutil.rmtree(folder)


def step_of(folder: Path) -> int:
    return int(re.search(r"step_(\d+)", folder.name)[1])


def checkpoint_folders(root: Path) -> list[Path]:
    """Oldest first; with those put aside by `publish`, should the process have died between its two renames."""
    folders = [path for path in root.glob("*step_*") if re.fullmatch(r"step_\d+|\.old-step_\d+(-\d+)?", path.name)]
    return sorted(folders, key=lambda path: (step_of(path), path.name))


def find_damage(folder: Path) -> str | None:
    """Why this is not a whole checkpoint, or None where every file has the size and hash it was saved with."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["step"] != step_of(folder):
            return f"its manifest is of step {manifest['step']}"
        for name, expected in manifest["files"].items():
            if digest_once(folder / name) != expected:
                return f"{name} is not what was saved"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is broken: {error}"
    return None


def digest_once(path: Path) -> dict[str, object]:
    """`digest`, computed once a process for what the disk holds: a file that has changed since is read again.

    A file younger than a clock's tick is not remembered: it could change once more without a new time.
    """
    status = path.stat()
    changed_ns = max(status.st_mtime_ns, status.st_ctime_ns)
    if time.time_ns() - changed_ns < CLOCK_TICK_NS:
        return digest(path)
    return _remembered_digest(path.absolute(), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.cache
def _remembered_digest(path: Path, *state: int) -> dict[str, object]:
    return digest(path)


def digest(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def system_error_number(error: Exception) -> int | None:
    """The errno of a system error; safetensors raises errors of its own and says it in words: "... (os error 28)"."""
    in_words = re.search(r"\(os error (\d+)\)", str(error))
    return int(in_words[1]) if in_words else getattr(error, "errno", None)
