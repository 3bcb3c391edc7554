"""What training scripts share: which run is resumed from where, when it is finished, an update, a save."""

import dataclasses
import json
import types

import pytest
import torch
from torch import nn

from nanor1 import training
from nanor1.miniature import MINIATURES, make_tokenizer, new_model
from nanor1.optim import NonFiniteGuard, learning_rate
from nanor1.runlog import RunLog

TINY = dataclasses.replace(MINIATURES["arithmetic"], width=8, mlp_width=8, n_layers=1)


@dataclasses.dataclass(frozen=True)
class Config:
    out: str | None = None
    resume: str | None = None
    preset: str | None = None
    steps: int = 5
    lr: float = 0.1
    warmup: int = 2
    decay: str = "linear"
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    checkpoint_activations: bool = False
    compile: str = "auto"
    workers: int = 1

    def validate(self):
        if self.steps < 0:
            raise ValueError("--steps is below 0")


@dataclasses.dataclass
class Progress:
    step: int = 0


class Said(list):
    say = list.append


def one_weight(value=1.0):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def ready(model, config=Config(), tensors=None):
    return training.prepare(model, config, tensors or {}, torch.device("cpu"))


def gradient(model, value):
    model.weight.grad = torch.full_like(model.weight, value)


def start(folder, **fields):
    """A run folder, as `open_log` starts it."""
    training.open_log(Config(out=str(folder), **fields), None, 0, "name", []).close()
    return folder


class Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def save(folder, step, model=None):
    model = model or new_model(TINY, 5, seed=0)
    training.save_run(folder, model, Tokenizer(), ready(model)[0], Progress(step))


# ---- which run is resumed, and from where


def test_flags_beat_the_arguments_of_the_resumed_run_and_these_the_defaults(tmp_path):
    save(start(tmp_path / "run", steps=9, lr=0.5), 4)
    config = Config(resume=str(tmp_path / "run"), lr=0.25, steps=5)
    config, checkpoint = training.resumed(config, {"resume", "lr"})
    assert (config.steps, config.lr, config.warmup) == (9, 0.25, 2) and config.resume == str(tmp_path / "run")
    assert checkpoint == tmp_path / "run" / "checkpoints" / "step_000004"


def test_a_run_without_checkpoint_is_resumed_from_its_beginning(tmp_path, capsys):
    folder = start(tmp_path / "run", steps=9)
    with RunLog(folder) as log:
        log.metrics(0, {"eval_loss": 1.0})
        log.metrics(1, {"loss": 1.0})
    (folder / "checkpoints" / ".tmp-step_000002-1").mkdir(parents=True)  # the kill came in the first save
    config, checkpoint = training.resumed(Config(resume=str(folder)), {"resume"})
    assert (config.steps, checkpoint) == (9, None)
    training.open_log(config, checkpoint, 0, "name", []).close()
    assert (folder / "metrics.jsonl").read_text() == "" and "begun again" in capsys.readouterr().out


def test_a_run_with_a_checkpoint_is_cut_back_to_it(tmp_path):
    folder = start(tmp_path / "run")
    with RunLog(folder) as log:
        for step in range(4):
            log.metrics(step, {"loss": 1.0})
    save(folder, 2)
    config, checkpoint = training.resumed(Config(resume=str(folder)), {"resume"})
    training.open_log(config, checkpoint, 2, "name", []).close()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]


def test_what_cannot_be_resumed_is_refused(tmp_path):
    folder = start(tmp_path / "run")
    save(folder, 2)
    with pytest.raises(ValueError, match="--preset is for a new run"):
        training.resumed(Config(resume=str(folder), preset="x"), {"resume", "preset"})
    with pytest.raises(ValueError, match="--steps is below 0"):
        training.resumed(Config(resume=str(folder), steps=-1), {"resume", "steps"})
    (folder / "checkpoints" / "step_000002" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        training.resumed(Config(resume=str(folder)), {"resume"})
    with pytest.raises(ValueError, match="nowhere"):
        training.resumed(Config(resume=str(tmp_path / "nowhere")), {"resume"})


@pytest.mark.parametrize(
    ("summary", "step", "n_steps", "is_finished"),
    [(None, 5, 5, False), (5, 5, 5, True), (5, 5, 9, False), (5, 7, 7, False), (5, 3, 5, False), (5, 5, 4, True)],
)
def test_a_run_is_finished_when_its_steps_are_made_and_summed_up(tmp_path, summary, step, n_steps, is_finished):
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps({"steps": summary}))
    assert training.is_finished(tmp_path, step, n_steps) is is_finished


def test_what_is_due_every_so_many_steps():
    assert [step for step in range(1, 8) if training.is_due(3, step)] == [3, 6]
    assert not any(training.is_due(0, step) for step in range(8))


# ---- learning


def test_an_update_follows_the_gradient_at_the_rate_of_its_step():
    model = one_weight()
    optimizer, guard = ready(model)[0], NonFiniteGuard()
    for step in range(3):
        gradient(model, 4.0)
        before = model.weight.item()
        found = training.update(optimizer, guard, Config(), step, 5)
        lr = learning_rate(step, 5, 0.1, 2, "linear")
        assert found == {"lr": lr, "grad_norm": pytest.approx(4.0)}
        assert model.weight.item() == pytest.approx(before - lr, rel=1e-4)  # Adam's first steps are signs


def test_an_update_by_a_gradient_that_is_not_finite_is_not_made_and_the_third_ends_the_run():
    model = one_weight()
    optimizer, guard = ready(model)[0], NonFiniteGuard()
    for value in (float("nan"), float("inf"), 1.0, float("nan"), float("nan")):
        gradient(model, value)
        training.update(optimizer, guard, Config(), 0, 5)
    assert model.weight.item() == pytest.approx(1 - learning_rate(0, 5, 0.1, 2, "linear"))
    gradient(model, float("nan"))
    with pytest.raises(ValueError, match="3 updates in a row"):
        training.update(optimizer, guard, Config(), 0, 5)


def test_a_model_made_ready_with_a_runs_tensors_goes_on_as_that_run():
    model, other = one_weight(), one_weight()
    optimizer, _ = ready(model)
    gradient(model, 2.0)
    optimizer.step(0.1, 9.0)
    other.load_state_dict(model.state_dict())
    again, workers = ready(other, tensors=optimizer.state_tensors())
    for each, its in ((optimizer, model), (again, other)):
        gradient(its, -1.0)
        each.step(0.1, 9.0)
    assert torch.equal(model.weight, other.weight) and workers.model is other


def test_a_compiled_model_has_no_copies():
    model = types.SimpleNamespace(compiled=0)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "MasterAdamW", lambda model, weight_decay: None)
        patch.setattr(training, "start_workers", lambda model, n: found.append(n))
        model.compile_blocks = lambda: found.append("compiled")
        for compile, workers in (("auto", 3), ("on", 0)):
            ready(model, Config(compile=compile, workers=workers, checkpoint_activations=True))
    assert found == [3, "compiled", 1] and model.checkpoints_activations


def test_no_example_is_longer_than_the_models_context(tmp_path):
    new_model(TINY, 5, seed=0).save_pretrained(tmp_path)
    assert [training.longest_example(n, tmp_path) for n in (100, 256, 2048)] == [100, 256, 256]


# ---- saving, and the rest


def test_a_saved_run_is_a_model_folder_with_its_tokenizer_and_state(tmp_path):
    save(tmp_path, 3)
    folder = tmp_path / "checkpoints" / "step_000003"
    assert json.loads((folder / "state.json").read_text()) == {"step": 3}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = new_model(TINY, 5, seed=0)
    next(model.parameters()).data[0] = float("inf")
    with pytest.raises(ValueError, match="not finite after step 3"):
        save(tmp_path, 3, model)
    assert not (tmp_path / "checkpoints").exists()


def test_a_resumed_run_keeps_the_dtype_of_its_checkpoint(tmp_path):
    new_model(TINY, len(make_tokenizer(TINY).special_ids) + 5, seed=0).bfloat16().save_pretrained(tmp_path)
    chosen = []
    for dtype, checkpoint in (("auto", tmp_path), ("float32", tmp_path), ("auto", None)):
        config = types.SimpleNamespace(device="cpu", dtype=dtype)
        chosen.append(training.choose_machine(config, checkpoint, tmp_path, Said())[1])
    assert chosen == [torch.bfloat16, torch.float32, torch.float32]  # a model so small is fp32 on a CPU


def test_figures_of_an_evaluation_are_named_as_such():
    assert training.eval_metrics({"loss": 1.0, "n": 2}) == {"eval_loss": 1.0, "eval_n": 2}


def test_batches_are_small_on_a_cpu_unless_asked_for():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert training.default_tokens_per_batch(77, cpu) == training.default_tokens_per_batch(77, gpu) == 77
    assert training.default_tokens_per_batch(0, cpu) < training.default_tokens_per_batch(0, gpu)
    assert [training.compiles(way, device) for way in ("auto", "on", "off") for device in (cpu, gpu)] == [
        False, True, True, True, False, False,
    ]  # fmt: skip


# ---- the gap between sampler and trainer


@pytest.mark.parametrize(
    ("dtype", "gap", "said"),
    [
        (torch.float32, 5e-7, None),
        (torch.float32, 2e-4, "the two compute different things, which is a bug"),
        (torch.float16, 0.0041, None),
        (torch.float16, 0.034, "try --dtype float32, or --flag"),
        (torch.bfloat16, 0.034, None),
        (torch.bfloat16, 0.07, "try --dtype float16 (on cuda) or float32, or --flag"),
    ],
)
def test_a_gap_is_warned_of_once_beyond_what_rounding_explains(tmp_path, dtype, gap, said):
    with RunLog.create(tmp_path / "run", {}, []) as log:
        training.warn_of_gap(log, {}, dtype, 1.0)  # a step without updates has none
        for _ in range(2):
            training.warn_of_gap(log, {"logp_gap_mean": gap}, dtype, 1.0, ", or --flag")
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.count("logp_gap_mean") == (0 if said is None else 1)
    assert said is None or (said in text and f"{gap:.2g}" in text)


def test_a_gap_may_be_larger_at_a_lower_temperature(tmp_path):
    with RunLog.create(tmp_path / "run", {}, []) as log:
        training.warn_of_gap(log, {"logp_gap_mean": 0.08}, torch.bfloat16, 0.5)
        assert "warning" not in (tmp_path / "run" / "log.txt").read_text()
        training.warn_of_gap(log, {"logp_gap_mean": 0.12}, torch.bfloat16, 0.5)
        training.warn_of_gap(log, {}, torch.bfloat16, 0.0)
    assert (tmp_path / "run" / "log.txt").read_text().count("warning") == 1


def test_data_files_that_were_edited_added_or_left_out_are_named_and_a_run_that_kept_no_digests_passes():
    before = {"a": "1", "b": "2", "c": "3"}
    assert training.changed_data(before, {"a": "1", "b": "9", "d": "4"}) == [
        "b has changed",
        "d was added",
        "c is gone, or no longer given,",
    ]
    assert training.changed_data(before, dict(before)) == training.changed_data(None, before) == []
