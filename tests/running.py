"""For tests: run a script's main() in this process, let something happen to it, compare what runs wrote; and models
of which it is known what they do."""

import contextlib
import io
import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from nanor1 import training
from nanor1.run import machine, resumable

MEASURED = re.compile(r".*_s|mfu|peak_memory_gib")  # seconds, throughput, memory: they differ from run to run


class Killed(BaseException):
    """What nothing catches and after which nothing is saved, as after SIGKILL."""


@contextlib.contextmanager
def own_process(cache):
    """What main() sets for its process is put back; yields a MonkeyPatch."""
    n_threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOR1_CACHE", str(cache))
        patch.setattr(machine, "matrix_rate", lambda *_: 1e9)  # not measured: that takes longer than a tiny run
        try:
            yield patch
        finally:
            torch.set_num_threads(n_threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)


def call_main(script, argv):
    """Run main() of a script; returns its exit code (None: killed), stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    name = f"{script.__name__}.py"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [name, *map(str, argv)])
        try:
            script.main()
        except SystemExit as stop:
            code = stop.code
        except Killed:
            code = None
    return code, out.getvalue(), err.getvalue()


def die_saving(patch, n_done):
    """Be killed where it is worst: the lines of a batch are written, the ledger does not know that so many are done."""
    write_json = resumable.write_json

    def write_or_die(beside, content):
        if content["n_done"] >= n_done:
            raise Killed
        write_json(beside, content)

    patch.setattr(resumable, "write_json", write_or_die)


def at_update(patch, at, happen):
    """Let something happen in step `at` (from 0), between its gradient and its update."""
    update = training.Run.update

    def happen_and_update(run):
        if run.progress.step == at:
            happen()
        update(run)

    patch.setattr(training.Run, "update", happen_and_update)


def die():
    raise Killed


def assert_refused(result, *said):
    """The run ended with one line of what was wrong."""
    code, _, err = result
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    for text in said:
        assert text in err


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def step_lines(folder):
    """The metrics of the training steps, without the lines that hold an evaluation alone."""
    return [line for line in read_lines(folder / "metrics.jsonl") if "lr" in line]


def repeatable(folder):
    """Everything a run measured that must not depend on when it was interrupted."""
    lines = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not MEASURED.fullmatch(k)} for line in lines]


def newest(folder):
    return max((folder / "checkpoints").glob("step_*"))


def assert_same_run(folder, whole):
    """The same metrics, and the same last checkpoint byte for byte."""
    assert newest(folder).name == newest(whole).name
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (newest(folder) / name).read_bytes() == (newest(whole) / name).read_bytes(), name
    assert repeatable(folder) == repeatable(whole)
    state, expected = (json.loads((newest(f) / "state.json").read_text()) for f in (folder, whole))
    assert state | {"wall_s": 0} == expected | {"wall_s": 0}
    summary, expected = (json.loads((f / "summary.json").read_text()) for f in (folder, whole))
    assert summary | {"wall_s": 0} == expected | {"wall_s": 0}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def randomize(model, seed=0, scale=0.3):
    """Weights far from any initialisation, so that each of them matters; biases too."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator) * scale
        p.data.copy_(1 + noise if p.dim() == 1 and bool((p == 1).all()) else noise)
    return model


@torch.no_grad()
def rig(model, weights):
    """A next token that depends on the last one alone, by {(last, next): its logit}: the blocks add nothing."""
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.ones_like(parameter) if "norm" in name else torch.zeros_like(parameter))
    model.model.embed_tokens.weight.copy_(torch.eye(len(model.lm_head.weight)))
    for (last, following), weight in weights.items():
        model.lm_head.weight[following, last] = weight
    return model
