"""What training scripts share: which run is resumed from where, when it is finished, an update, a save."""

import contextlib
import dataclasses
import json
import types

import pytest
import torch
from running import own_process, read_lines
from torch import nn

from nanor1 import training
from nanor1.miniature import MINIATURES, make_tokenizer, new_model
from nanor1.model import Transformer
from nanor1.optim import learning_rate
from nanor1.options import default_tokens_per_batch
from nanor1.run import start
from nanor1.run.log import RunLog

TINY = dataclasses.replace(MINIATURES["arithmetic"], width=8, mlp_width=8, n_layers=1)
TOKENIZER = make_tokenizer(TINY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig):
    model: str | None = None
    preset: str | None = None
    steps: int = 5
    epochs: float = 1.0
    lr: float = 0.1
    warmup: int = 2
    decay: str = "linear"
    temperature: float = 1.0
    device: str = "cpu"
    dtype: str = "float32"
    workers: int = 1

    def validate(self):
        if self.steps < 0:
            raise ValueError("--steps is below 0")


@pytest.fixture(autouse=True)
def process(tmp_path):
    with own_process(tmp_path / "cache") as patch:
        yield patch


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of an untrained model."""
    folder = tmp_path_factory.mktemp("base")
    new_model(TINY, TOKENIZER.vocab_size, seed=0).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def begin(base, tmp_path):
    """A run that is ready to learn, in tmp_path/run; of the tiny model, or of one that is given."""

    def ready(model=None, checkpoint=None, **fields):
        resume = str(tmp_path / "run") if checkpoint else None
        config = Config(model=str(base), out=str(tmp_path / "run"), resume=resume, **fields)
        run = training.Run(config, checkpoint, start.open_log(config, checkpoint, "name", []))
        run.prepare(model or new_model(TINY, TOKENIZER.vocab_size, seed=0), TOKENIZER, config.steps)
        return run

    return ready


def one_weight(value=1.0):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def gradient(model, value):
    model.weight.grad = torch.full_like(model.weight, value)


def make_folder(folder, **fields):
    """A run folder, as `open_log` starts it."""
    start.open_log(Config(out=str(folder), **fields), None, "name", []).close()
    return folder


def save(begin, step, **fields):
    """A run that made so many steps and saved the last."""
    run = begin(**fields)
    run.progress.step = step
    run.save()
    run.log.close()
    return run.log.folder


# ---- which run is resumed, and from where


def test_flags_beat_the_arguments_of_the_resumed_run_and_these_the_defaults(begin, tmp_path):
    save(begin, 4, steps=9, lr=0.5)
    config = Config(resume=str(tmp_path / "run"), lr=0.25, steps=5)
    config, checkpoint = start.resumed(config, {"resume", "lr"})
    assert (config.steps, config.lr, config.warmup) == (9, 0.25, 2) and config.resume == str(tmp_path / "run")
    assert checkpoint == tmp_path / "run" / "checkpoints" / "step_000004"


def test_a_run_without_checkpoint_is_resumed_from_its_beginning(tmp_path, capsys):
    folder = make_folder(tmp_path / "run", steps=9)
    with RunLog(folder) as log:
        log.metrics(0, {"eval_loss": 1.0})
        log.metrics(1, {"loss": 1.0})
    (folder / "checkpoints" / ".tmp-step_000002-1").mkdir(parents=True)  # the kill came in the first save
    config, checkpoint = start.resumed(Config(resume=str(folder)), {"resume"})
    assert (config.steps, checkpoint) == (9, None)
    start.open_log(config, checkpoint, "name", []).close()
    assert (folder / "metrics.jsonl").read_text() == "" and "begun again" in capsys.readouterr().out


def test_a_run_with_a_checkpoint_is_cut_back_to_it(begin):
    folder = save(begin, 2)
    with RunLog(folder) as log:
        for step in range(4):
            log.metrics(step, {"loss": 1.0})
    config, checkpoint = start.resumed(Config(resume=str(folder)), {"resume"})
    start.open_log(config, checkpoint, "name", []).close()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]


def test_what_cannot_be_resumed_is_refused(begin, tmp_path):
    folder = save(begin, 2)
    with pytest.raises(ValueError, match="--preset is for a new run"):
        start.resumed(Config(resume=str(folder), preset="x"), {"resume", "preset"})
    with pytest.raises(ValueError, match="--steps is below 0"):
        start.resumed(Config(resume=str(folder), steps=-1), {"resume", "steps"})
    (folder / "checkpoints" / "step_000002" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        start.resumed(Config(resume=str(folder)), {"resume"})
    with pytest.raises(ValueError, match="nowhere"):
        start.resumed(Config(resume=str(tmp_path / "nowhere")), {"resume"})


@pytest.mark.parametrize(
    ("summary", "step", "n_steps", "is_finished"),
    [(None, 5, 5, False), (5, 5, 5, True), (5, 5, 9, False), (5, 7, 7, False), (5, 3, 5, False), (5, 5, 4, True)],
)
def test_a_run_is_finished_when_its_steps_are_made_and_summed_up(tmp_path, summary, step, n_steps, is_finished):
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps({"steps": summary}))
    said, end = [], start.end_if_finished
    for config in (Config(resume=str(tmp_path), steps=n_steps), Config(resume=str(tmp_path), steps=0)):
        with pytest.raises(SystemExit) if is_finished else contextlib.nullcontext():
            end(config, tmp_path / f"step_{step:06d}", n_steps, said.append)
    assert len(said) == 2 * is_finished
    assert not said or (said[0].endswith(f"more than --steps {n_steps}") and said[1].endswith("--epochs or --steps"))


def test_what_is_due_every_so_many_steps():
    assert [step for step in range(1, 8) if training.is_due(3, step)] == [3, 6]
    assert not any(training.is_due(0, step) for step in range(8))


# ---- learning


def learn(run, values):
    """A step for each gradient; returns the metrics' rate and norm."""
    for _, value in zip(run.steps(), values, strict=False):
        gradient(run.model, value)
        run.update()
        run.record({})
    return [(line["lr"], line["grad_norm"]) for line in read_lines(run.log.folder / "metrics.jsonl")]


def test_an_update_follows_the_gradient_at_the_rate_of_its_step(begin, process):
    model = one_weight()
    run = begin(model, steps=50)
    expected, weight = [learning_rate(step, 50, 0.1, 2, "linear") for step in range(3)], 1.0
    assert learn(run, [4.0] * 3) == [(pytest.approx(lr, rel=1e-5), pytest.approx(4.0)) for lr in expected]
    assert model.weight.item() == pytest.approx(weight - sum(expected), rel=1e-4)  # Adam's first steps are signs


def test_an_update_by_a_gradient_that_is_not_finite_is_not_made_and_the_third_ends_the_run(begin):
    model, nan = one_weight(), float("nan")
    run = begin(model, steps=50, warmup=0, decay="constant")
    assert [norm for _, norm in learn(run, (nan, float("inf"), 1.0, nan, nan))] == [None, None, 1.0, None, None]
    assert model.weight.item() == pytest.approx(1 - 0.1)
    with pytest.raises(ValueError, match="3 updates in a row"):
        learn(run, [nan])
    assert "warning: grad_norm is not finite at step 1" in (run.log.folder / "log.txt").read_text()


def test_a_model_made_ready_with_a_runs_tensors_goes_on_as_that_run(begin):
    run = begin(steps=2)
    for p in run.model.parameters():
        p.grad = torch.full_like(p, 2.0)
    next(run.steps())
    run.update()
    run.record({})
    run.save()
    run.log.close()
    (checkpoint,) = (run.log.folder / "checkpoints").glob("step_*")
    again = begin(model=Transformer.from_pretrained(checkpoint), checkpoint=checkpoint, steps=2)
    assert again.progress.step == 1 and again.workers.model is again.model and not again.tensors
    for each in (run, again):
        next(each.steps())
        for p in each.model.parameters():
            p.grad = torch.full_like(p, -1.0)
        each.update()
    assert all(map(torch.equal, run.model.parameters(), again.model.parameters()))


def test_a_compiled_model_has_no_copies(begin, process, base, tmp_path):
    found = []
    process.setattr(training, "MasterAdamW", lambda model, weight_decay: None)
    process.setattr(training, "start_workers", lambda model, n: found.append(n))
    for i, (compile, workers, device) in enumerate(
        [("auto", 3, "cpu"), ("on", 0, "cpu"), ("off", 3, "cuda"), ("auto", 3, "cuda")]
    ):
        model = types.SimpleNamespace(compile_blocks=lambda: found.append("compiled"))
        config = Config(
            model=str(base), out=str(tmp_path / str(i)), compile=compile, workers=workers, checkpoint_activations=True
        )
        with start.open_log(config, None, "name", []) as log:
            run = training.Run(config, None, log)
            run.device = torch.device(device)
            run.prepare(model, TOKENIZER, 1)
        assert model.checkpoints_activations
    assert found == [3, "compiled", 1, 3, "compiled", 1]


# ---- saving, and the rest


def test_a_saved_run_is_a_model_folder_with_its_tokenizer_and_what_is_known_of_its_state(begin):
    folder = save(begin, 3) / "checkpoints" / "step_000003"
    state = json.loads((folder / "state.json").read_text())
    assert state == {"step": 3, "wall_s": state["wall_s"]}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_weights_that_are_not_finite_are_not_saved(begin, tmp_path):
    model = new_model(TINY, 5, seed=0)
    next(model.parameters()).data[0] = float("inf")
    with pytest.raises(ValueError, match="not finite after step 3"):
        save(begin, 3, model=model)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_resumed_run_keeps_the_dtype_of_its_checkpoint(begin, base, tmp_path):
    folder = save(begin, 1, model=Transformer.from_pretrained(base).bfloat16())
    (checkpoint,) = (folder / "checkpoints").glob("step_*")
    chosen = []
    for dtype, where in (("auto", checkpoint), ("float32", checkpoint), ("auto", None)):
        config = Config(model=str(checkpoint), out=str(tmp_path / f"new{len(chosen)}"), dtype=dtype)
        with start.open_log(config, None, "name", []) as log:
            chosen.append(training.Run(config, where, log).dtype)
    assert chosen == [torch.bfloat16, torch.float32, torch.float32]  # a model so small is fp32 on a CPU


def test_batches_are_small_on_a_cpu_unless_asked_for():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert default_tokens_per_batch(77, cpu) == default_tokens_per_batch(77, gpu) == 77
    assert default_tokens_per_batch(0, cpu) < default_tokens_per_batch(0, gpu)


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
def test_a_gap_is_warned_of_once_beyond_what_rounding_explains(begin, tmp_path, dtype, gap, said):
    run = begin()
    run.dtype = dtype
    run.warn_of_gap({})  # a step without updates has none
    for _ in range(2):
        run.warn_of_gap({"logp_gap_mean": gap}, ", or --flag")
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.count("logp_gap_mean") == (0 if said is None else 1)
    assert said is None or (said in text and f"{gap:.2g}" in text)


def test_a_gap_may_be_larger_at_a_lower_temperature(begin, tmp_path):
    run = begin(temperature=0.5)
    run.dtype = torch.bfloat16
    run.warn_of_gap({"logp_gap_mean": 0.08})
    assert "warning" not in (tmp_path / "run" / "log.txt").read_text()
    run.warn_of_gap({"logp_gap_mean": 0.12})
    run.warn_of_gap({})
    assert (tmp_path / "run" / "log.txt").read_text().count("warning") == 1


def test_data_files_that_were_edited_added_or_left_out_are_named_and_a_run_that_kept_no_digests_passes():
    before = {"a": "1", "b": "2", "c": "3"}
    assert start.changed_data(before, {"a": "1", "b": "9", "d": "4"}) == [
        "b has changed",
        "d was added",
        "c is gone, or no longer given,",
    ]
    assert start.changed_data(before, dict(before)) == start.changed_data(None, before) == []
    assert start.changed_data(before, {"a": "1", "b": "2", "moved": "3"}) == []
    assert start.changed_data(before, before | {"a": "2", "b": "1"}) == ["a has changed", "b has changed"]
