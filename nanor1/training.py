"""What every training script does around its loop: start or resume a run, choose the machine, update, save.

A script keeps a Config (TrainingOptions and its own), a Progress (a dataclass with all that a resumed run needs besides
weights and moments) and a RunLog. Left out: the loops themselves.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from nanor1.checkpoint import checkpoint_folders, digest, latest_checkpoint, model_folder, save_checkpoint
from nanor1.config import apply_preset, from_json, load_arguments, option, option_name, to_json
from nanor1.distillation import check_same_vocabulary
from nanor1.evaluate import Preference
from nanor1.ledger import digest as digest_asked
from nanor1.machine import choose_device
from nanor1.miniature import Miniature, miniature_task, own_miniature
from nanor1.optim import MasterAdamW, NonFiniteGuard, is_finite, learning_rate
from nanor1.parallel import Workers, start_workers
from nanor1.preference import RewardModel, load_scorer, preference, score
from nanor1.pretrained import read_config, read_json
from nanor1.rewards import OwnReward, read_reward_file
from nanor1.runlog import Columns, RunLog, default_run_folder, write_json
from nanor1.tasks import Problem, Task, make_task, parse_fields, task_parameters
from nanor1.tokenizer import Tokenizer

C = TypeVar("C")

# The mean of |trainer's - sampler's log-probability| a token that rounding explains. Measured at temperature 1: bf16
# 0.034 (SmolLM2-135M) and 0.015 (Qwen2.5-Coder-0.5B), fp16 0.0041 and 0.0021, fp32 5e-7.
NORMAL_GAP = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    device: str = option("auto", "cpu, cuda, mps or auto", "machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "of the weights; auto: bfloat16 on cuda, and where a CPU is measured to be faster with it; float16: cuda only",
    )
    threads: int = option(0, "CPU threads; 0: torch's choice", least=0, most=1024)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(MachineOptions):
    compile: Literal["auto", "on", "off"] = option("auto", "torch.compile of the model's blocks; auto: on cuda")
    workers: int = option(
        0, "copies of the model, one a CPU thread; 0: one, or for a small model all threads", least=0, most=1024
    )
    tokens_per_batch: int = option(
        0, "tokens a forward and backward pass, a prompt counted once; 0: 1024 on the CPU (memory), else 8192", least=0
    )
    checkpoint_activations: bool = option(False, "less memory in learning, for a third more work")

    weight_decay: float = option(0.0, "AdamW's, on matrices", "optimizer", least=0)
    warmup: int = option(5, "updates (of train_zero.py: steps) of linear warm-up", least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: they are not", least=0)

    out: str | None = option(None, "run folder; none: one in runs/ that is named after what is done and when", "run")
    resume: str | None = option(None, "continue the run in this folder")
    allow_changed_data: bool = option(
        False, "resume although a data file is not what it was", needs=("--resume", lambda config: config.resume)
    )
    keep_last: int = option(2, "checkpoints kept, besides the best", least=1)
    seed: int = option(0, "of everything random", least=0)

    def validate(self) -> None:
        if self.compile == "on" and self.workers > 1:
            raise ValueError("--compile on needs --workers 1: copies of the model are not compiled")


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    data: str | None = option(
        None, "JSON lines of problems; a tenth of them, chosen by a hash of the question, is held out", "problems"
    )
    eval_data: str | None = option(None, "JSON lines of problems that are all held out, in place of that tenth")
    fields: str = option(
        "",
        "columns of other names, as question=prompt,answer=gold: the task's field, and the file's",
        needs=("--data or --eval-data", lambda config: config.data or config.eval_data),
    )
    task_args: str = option("", 'JSON object of the task\'s parameters, as {"n_numbers": 3}; see nanor1/tasks.py')
    reward_file: str | None = option(
        None, "your Python file of functions (problem, text) -> float or None, each a reward; see nanor1/rewards.py"
    )


def load_task(options: TaskOptions, name: str, tokenizer: Tokenizer, parts: Sequence[str]) -> Task:
    """The task that the options name, of which these parts are needed; a miniature has its own problems."""
    if miniature := own_miniature(tokenizer):
        if name != miniature.task or options.data or options.eval_data or options.task_args:
            raise ValueError(
                f"the model is the {miniature.task} miniature and knows no other words; give --task {miniature.task} "
                "without --data, --eval-data and --task-args"
            )
        return miniature_task(miniature)
    parameters = task_parameters(options.task_args)
    if name == "text" and options.reward_file:
        parameters = dict(needs_answer=False) | parameters
    return make_task(
        name,
        data=options.data,
        eval_data=options.eval_data,
        fields=parse_fields(options.fields),
        parts=parts,
        **parameters,
    )


def own_rewards(options: TaskOptions) -> dict[str, OwnReward]:
    """The rewards of --reward-file by name; the file is run once, unless it changes."""
    path = options.reward_file
    return _run_reward_file(path, Path(path).stat().st_mtime_ns if Path(path).exists() else 0) if path else {}


@lru_cache(maxsize=1)
def _run_reward_file(path: str, changed_ns: int) -> dict[str, OwnReward]:
    return read_reward_file(path)


def report_failures(own: dict[str, OwnReward], say_once: Callable[[str, str], None]) -> None:
    """Show the first thing that went wrong in each reward of one's own; how often is in what is said at the end."""
    for name, reward in own.items():
        if reward.first_error:
            say_once(name, f"warning: {reward.first_error}: None, as is all that goes wrong there (said once)")


def count_failures(own: dict[str, OwnReward], say: Callable[[str], None]) -> None:
    """Say how often rewards of one's own could not be computed, if they could not."""
    if counts := [f"{reward.n_failed} values of {name}" for name, reward in own.items() if reward.n_failed]:
        say(f"could not be computed: {', '.join(counts)}")


def resumed(config: C, given: Iterable[str]) -> tuple[C, Path | None]:
    """The configuration and the newest whole checkpoint of the run in `config.resume`; flags beat its arguments.

    `given` are the names of the fields that the command line set. No checkpoint: the run ended before its first one,
    and begins again. ValueError where there is no run, or all its checkpoints are damaged.
    """
    if "preset" in given:
        raise ValueError("--preset is for a new run; with --resume give the single flags")
    folder, values = Path(config.resume), to_json(config)
    stored = load_arguments(folder / "config.json")
    for name in {"model", "out", "from_scratch"} & {*given}:
        if values[name] != stored.get(name) and (name, values[name]) != ("out", config.resume):
            raise ValueError(
                f"{option_name(name)} has no effect with --resume, which goes on from the run's newest checkpoint in "
                "its own folder; leave it out, or begin a new run"
            )
    stored |= {name: values[name] for name in given}
    config = from_json(type(config), stored, f"{folder}/config.json")
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None and checkpoint_folders(folder / "checkpoints"):
        raise ValueError(f"{folder} has no whole checkpoint to resume from; start a new run")
    return config, checkpoint


def as_miniature_run(config: C, given: frozenset[str], miniature: Miniature, settings: dict) -> C:
    """The miniature's own task and `settings`, less what was given; ValueError where another task was given."""
    for name in given & {"data", "eval_data", "task_args"}:
        raise ValueError(f"{option_name(name)} is for pretrained models: a miniature generates its problems")
    if "task" in given and config.task != miniature.task:
        raise ValueError(f"{config.model} is the {miniature.task} miniature and knows no other task; leave --task out")
    return replace(apply_preset(config, given, settings), task=miniature.task)


def open_log(
    config, checkpoint: Path | None, step: int, name: str, columns: Columns, files: Sequence[str | None] = ()
) -> RunLog:
    """The run's log: of the resumed run cut back to `step`, or of a new one in `config.out` or runs/NAME-TIME.

    `files` are those that the run reads its data from. Their digests are kept in config.json; ValueError where one is
    not what it was, unless --allow-changed-data, which keeps the new ones.
    """
    digests = {path: digest(Path(path))["sha256"] for path in files if path and Path(path).is_file()}
    if not config.resume:
        return RunLog.create(config.out or default_run_folder(name), to_json(config), columns, digests)
    made_of = read_json(Path(config.resume) / "config.json")
    changes = changed_data(made_of.get("data_sha256"), digests)
    if changes and not config.allow_changed_data:
        raise ValueError(
            f"{'; '.join(changes)} since {config.resume} began: begin a new run from its checkpoint with --model, or "
            "go on with --allow-changed-data"
        )
    log = RunLog.open(config.resume, step if checkpoint else None, columns)
    for change in changes:
        log.say(f"warning: {change} since the run began")
    if changes:
        write_json(log.folder / "config.json", made_of | {"data_sha256": digests})
    return log


def changed_data(before: dict[str, str] | None, now: dict[str, str]) -> list[str]:
    """How the digests of data files differ, in words; of a run that kept none nothing is said.

    A file of another name that holds what one held before was moved, and has not changed.
    """
    if before is None:
        return []
    words = {path: "has changed" if path in before else "was added" for path in now if now[path] != before.get(path)}
    words |= {path: "is gone, or no longer given," for path in before if path not in now}
    moved = {path for path in words if path in before and before[path] in now.values()}
    moved |= {path for path in words if path not in before and now[path] in before.values()}
    return [f"{path} {what}" for path, what in words.items() if path not in moved]


def say_lr_jump(log: RunLog, config, step: int, n_steps: int, last_lr: float | None) -> None:
    """Say where a resumed run's learning rate does not go on from that of its last update (`step` were made)."""
    if step == 0 or last_lr is None:
        return
    expected, following = (
        learning_rate(at, n_steps, config.lr, config.warmup, config.decay) for at in (step - 1, min(step, n_steps - 1))
    )
    if not math.isclose(expected, last_lr, rel_tol=1e-3, abs_tol=1e-15):
        log.say(
            f"warning: the learning rate goes from {last_lr:.3g} to {following:.3g}: the schedule is now that of "
            f"{n_steps} steps, --lr {config.lr:g}, --warmup {config.warmup}, --decay {config.decay}"
        )


def digest_of(problems: Sequence[Problem]) -> str:
    """Changes when a problem does, or their order."""
    return digest_asked([(problem.prompt, problem.answer) for problem in problems])


def is_finished(folder: str | Path, step: int, n_steps: int) -> bool:
    """Whether the run in the folder has made its steps and written what it came to."""
    summary = Path(folder) / "summary.json"
    is_written = summary.exists() and json.loads(summary.read_text(encoding="utf-8"))["steps"] == step
    return step >= n_steps and is_written


def is_due(every: int, step: int) -> bool:
    """Whether something done every so many steps (0: never) is due after this one."""
    return bool(every) and step % every == 0


def choose_machine(config, checkpoint: Path | None, folder: Path | str, log) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of the weights; a resumed run keeps its dtype, so that it is the same run."""
    hf_config, model_config = read_config(folder)
    dtype = hf_config["torch_dtype"] if checkpoint and config.dtype == "auto" else config.dtype
    return choose_device(config.device, dtype, log.say, model_config.hidden_size)


def prepare(model: nn.Module, config, tensors: dict[str, Tensor], device: torch.device) -> tuple[MasterAdamW, Workers]:
    """Make a loaded model ready to learn: its optimizer, with the moments of a resumed run's `tensors`, and workers."""
    optimizer = MasterAdamW(model, weight_decay=config.weight_decay)
    if tensors:
        optimizer.load_state_tensors(tensors)
    model.checkpoints_activations = config.checkpoint_activations
    is_compiled = compiles(config.compile, device)
    if is_compiled:
        model.compile_blocks()
    return optimizer, start_workers(model, 1 if is_compiled else config.workers)


def compiles(compile: str, device: torch.device) -> bool:
    """Whether `--compile on|off|auto` asks for compiled blocks on this device; auto: on CUDA."""
    return compile == "on" or (compile == "auto" and device.type == "cuda")


def default_tokens_per_batch(asked_for: int, device: torch.device) -> int:
    """On a CPU larger batches are no faster and keep more activations, about 2 MB a token of SmolLM2-135M."""
    return asked_for or (1024 if device.type == "cpu" else 8192)


def load_reward_model(
    folder: str | Path, tokenizer: Tokenizer, dtype: torch.dtype | None, device: torch.device
) -> RewardModel:
    """The reward model in a model or run folder, without gradients; ValueError unless it reads the tokenizer's ids."""
    folder = model_folder(folder)
    check_same_vocabulary(tokenizer, Tokenizer.from_pretrained(folder), "--reward-model reads the ids that are sampled")
    return load_scorer(folder, dtype, device).requires_grad_(False)


def to_preference(model: RewardModel, tokenizer: Tokenizer, n_tokens: int) -> Preference:
    """What a reward model thinks of whole responses, in 0..1 or None, in batches of `n_tokens`."""
    return lambda prompt_ids_B, texts_B: [*map(preference, score(model, tokenizer, prompt_ids_B, texts_B, n_tokens))]


def longest_example(max_tokens: int, folder: Path | str) -> int:
    """`max_tokens`, or the context of the model in the folder where that is shorter."""
    return min(max_tokens, read_config(folder)[1].max_position_embeddings)


def update(optimizer: MasterAdamW, guard: NonFiniteGuard, config, step: int, n_steps: int) -> dict[str, float]:
    """Follow the gradient at the schedule's rate of update `step` (from 0); returns `lr`, `grad_norm`, fp16's scale.

    A gradient that is not finite is skipped; ValueError after several in a row.
    """
    lr = learning_rate(step, n_steps, config.lr, config.warmup, config.decay)
    loss_scale, grad_norm = optimizer.loss_scale, optimizer.step(lr, config.max_grad_norm)
    is_made = math.isfinite(grad_norm)
    guard.check(n_skipped=int(not is_made), n_made=int(is_made), loss_scale=loss_scale)
    is_expected = not is_made and loss_scale > 1
    return {"lr": lr, "grad_norm": None if is_expected else grad_norm} | scale_metric(optimizer)


def scale_metric(optimizer: MasterAdamW) -> dict[str, float]:
    """What the loss of the next update is multiplied by, where weights are fp16."""
    return {"loss_scale": optimizer.loss_scale} if optimizer.is_scaled else {}


def warn_of_gap(log: RunLog, metrics: dict, dtype: torch.dtype, temperature: float, corrects: str = "") -> None:
    """Say, once a run, that sampler and trainer differ by more than rounding to `dtype` explains.

    What is rounded counts 1 / temperature times in the metric.
    `corrects` names the script's flag, if it has one, that makes up for the difference.
    """
    gap, normal = metrics.get("logp_gap_mean", 0.0), NORMAL_GAP.get(dtype, math.inf)
    if gap * min(1.0, temperature) <= normal:
        return
    name = str(dtype).removeprefix("torch.")
    less = {torch.bfloat16: "--dtype float16 (on cuda) or float32", torch.float16: "--dtype float32"}.get(dtype)
    advice = f"try {less}{corrects}" if less else f"the two compute different things, which is a bug{corrects}"
    log.say_once(
        "gap beyond rounding",
        f"warning: logp_gap_mean is {gap:.2g}; in {name} rounding explains {normal:g}: the sampler's "
        f"log-probabilities are not those that are learned from; {advice} (said once)",
    )


def eval_metrics(measured: dict) -> dict:
    """An evaluation's figures by their names in metrics.jsonl: `eval_accuracy` and so on."""
    return {f"eval_{name}": value for name, value in measured.items()}


def save_run(
    folder: Path,
    model: nn.Module,
    tokenizer,
    optimizer: MasterAdamW,
    progress,
    *,
    tensors: dict[str, Tensor] | None = None,
    keep_last: int = 2,
    keep_best: int | None = None,
) -> Path:
    """Save the checkpoint of step `progress.step` that `--resume` continues bit for bit; returns its folder.

    `tensors` are what else has to be kept. ValueError where a weight is not finite: nothing is then saved.
    """
    if not is_finite(model.parameters()):
        raise ValueError(f"a weight is not finite after step {progress.step}; not saved: resume with a lower --lr")

    def write_model(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return save_checkpoint(
        folder / "checkpoints",
        progress.step,
        write_model=write_model,
        tensors=optimizer.state_tensors() | (tensors or {}),
        state=vars(progress),
        keep_last=keep_last,
        keep_best=keep_best,
    )
