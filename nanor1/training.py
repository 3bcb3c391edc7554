"""A run around its loop, the same for all training scripts: update, log, evaluate when due, save.

    run = Run(config, checkpoint, log)  # see nanor1/run/start.py for these
    run.prepare(model, tokenizer, n_steps)
    run.begin(before, ...)              # the starting model's evaluation
    for step in run.steps():            # goes on where a resumed run stopped; ends on Ctrl-C
        ...                             # add a gradient
        run.update()
        run.record(metrics)             # a line, the files, and what is due: evaluation, checkpoint
    if not run.is_stopped():
        run.finish(after, ...)          # the trained model's

Left out: the loops themselves, and what is evaluated.
"""

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from nanor1.gradient import start_workers
from nanor1.grpo import mean
from nanor1.miniature import find_model
from nanor1.optim import MasterAdamW, NonFiniteGuard, is_finite, learning_rate
from nanor1.options import MachineOptions, default_tokens_per_batch
from nanor1.run.checkpoint import load_checkpoint, save_checkpoint
from nanor1.run.config import option
from nanor1.run.log import RunLog
from nanor1.run.machine import Interrupt, choose_device, peak_memory_gib
from nanor1.run.start import end_if_finished
from nanor1.tokenizer import Tokenizer
from nanor1.weights import read_config

# The mean of |trainer's - sampler's log-probability| a token that rounding explains. Measured at temperature 1: bf16
# 0.034 (SmolLM2-135M) and 0.015 (Qwen2.5-Coder-0.5B), fp16 0.0041 and 0.0021, fp32 5e-7.
NORMAL_GAP = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}


@dataclass(frozen=True, kw_only=True)
class RunConfig(MachineOptions):
    """What all training scripts can be told, beside a model and how many steps."""

    compile: Literal["auto", "on", "off"] = option("auto", "torch.compile of the model's blocks; auto: on cuda")
    workers: int = option(
        0, "copies of the model, one a CPU thread; 0: one, or for a small model all threads", least=0, most=1024
    )
    tokens_per_batch: int = option(
        0, "tokens a forward and backward pass, a prompt counted once; 0: 1024 on the CPU (memory), else 8192", least=0
    )
    checkpoint_activations: bool = option(False, "less memory in learning, for a third more work")

    lr: float = option(1e-5, "peak learning rate", "optimizer", least=0, most=1)
    decay: Literal["constant", "linear", "cosine"] = option("cosine", "after warm-up, to a tenth of the peak")
    warmup: int = option(5, "updates (of train_zero.py: steps) of linear warm-up", least=0)
    weight_decay: float = option(0.0, "AdamW's, on matrices", least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: they are not", least=0)

    eval_every: int = option(
        0, "evaluate every so many updates; 0: only before and after", "evaluation and saving", least=0
    )
    save_every: int = option(0, "checkpoint every so many updates; 0: only at the end", least=0)

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


@dataclass
class Progress:
    """What a resumed run needs besides weights and moments; a checkpoint's state.json."""

    step: int = 0
    lr: float | None = None  # of the last step
    wall_s: float = 0.0
    n_drawn: int | None = None  # problems that train_zero.py has taken: the next step takes the following ones
    traces: str | None = None  # the digest of the file that distill.py learns from
    before: dict | None = None  # the first evaluation
    before_P: list[float | None] | None = None  # each held-out problem's share of right answers in it
    held_out: str | None = None  # which these problems were
    transcripts: list[str] | None = None  # the starting model's answers to the first of them
    best_step: int | None = None
    best_accuracy: float | None = None  # its; or, without gold answers, its reward


class Run:
    """A run that is started or resumed: what it learns with, and how far it is.

    At first it has the model's `folder`, `tokenizer` and `context`, the `device` and `dtype` to load it with, and the
    checkpoint's `tensors`; `prepare` takes the model, and from then on Ctrl-C lets a step finish.
    """

    def __init__(self, config, checkpoint: Path | None, log: RunLog):
        start_s = time.monotonic()
        self.config, self.checkpoint, self.log = config, checkpoint, log
        self.tensors, state = load_checkpoint(checkpoint) if checkpoint else ({}, {})
        self.progress = Progress(**state)
        self.start_s = start_s - self.progress.wall_s
        if config.threads:
            torch.set_num_threads(config.threads)
        self.folder = checkpoint or find_model(config.model, config.seed, log.say)
        log.say(f"model: {self.folder}")
        hf_config, model_config = read_config(self.folder)  # first: it says so where there is no such folder
        self.tokenizer = Tokenizer.from_pretrained(self.folder)
        self.context = model_config.max_position_embeddings
        # a resumed run keeps its dtype, so that it is the same run
        dtype = hf_config["torch_dtype"] if checkpoint and config.dtype == "auto" else config.dtype
        self.device, self.dtype = choose_device(config.device, dtype, log.say, model_config.hidden_size)
        self.tokens_per_batch = default_tokens_per_batch(config.tokens_per_batch, self.device)

    def prepare(self, model: nn.Module, tokenizer: Tokenizer, n_steps: int, has_reference: bool = False) -> None:
        """Make the model ready to learn, and with `has_reference` a copy of it as it is at the start.

        Checkpoints keep both, and this tokenizer. A run that was finished ends here.
        """
        config, self.n_steps = self.config, n_steps
        end_if_finished(config, self.checkpoint, n_steps, self.log.say)
        self._say_lr_jump()
        self.model, self.tokenizer = model, tokenizer
        self.reference = self._make_reference() if has_reference else None
        self.optimizer, self.guard = MasterAdamW(model, weight_decay=config.weight_decay), NonFiniteGuard()
        if self.tensors:
            self.optimizer.load_state_tensors(self.tensors)
        self.tensors = {}  # they are twice the model's size
        model.checkpoints_activations = config.checkpoint_activations
        is_compiled = config.compile == "on" or (config.compile == "auto" and self.device.type == "cuda")
        if is_compiled:
            model.compile_blocks()
        self.workers = start_workers(model, 1 if is_compiled else config.workers)
        self.interrupt = Interrupt()

    def _make_reference(self) -> nn.Module:
        """The model as it is, or a resumed run's reference. ValueError for a run that was begun without one."""
        reference = copy.deepcopy(self.model).requires_grad_(False)
        if self.tensors:
            if not any(name.startswith("reference.") for name in self.tensors):
                raise ValueError(
                    "--kl-coef: the run was begun without a reference, and its checkpoint holds none; leave --kl-coef "
                    "out, or begin a new run from the checkpoint with --model"
                )
            reference.load_state_dict({name: self.tensors[f"reference.{name}"] for name in reference.state_dict()})
        return reference

    def _say_lr_jump(self) -> None:
        """Say where a resumed run's learning rate does not go on from that of its last update."""
        config, step, last = self.config, self.progress.step, self.progress.lr
        if step == 0 or last is None:
            return
        following = self._lr(min(step, self.n_steps - 1))
        if not math.isclose(self._lr(step - 1), last, rel_tol=1e-3, abs_tol=1e-15):
            self.log.say(
                f"warning: the learning rate goes from {last:.3g} to {following:.3g}: the schedule is now that of "
                f"{self.n_steps} steps, --lr {config.lr:g}, --warmup {config.warmup}, --decay {config.decay}"
            )

    def _lr(self, step: int) -> float:
        return learning_rate(step, self.n_steps, self.config.lr, self.config.warmup, self.config.decay)

    def begin(self, before: dict, said: str) -> None:
        """Keep and say the starting model's evaluation; a run that stops here, or has no steps, need not repeat it."""
        self.progress.before = before
        self.log.metrics(0, eval_metrics(before))
        self.log.say(f"before: {said}\n")
        if self.interrupt.is_asked or not self.n_steps:
            self.save()

    def steps(self) -> Iterator[int]:
        """The steps to make, from 0; a resumed run's where it stopped. Ctrl-C ends them after the one it falls in."""
        while self.progress.step < self.n_steps and not self.interrupt.is_asked:
            self.step_start_s, self.grad_norms = time.monotonic(), []
            self.loss_scale = self.optimizer.loss_scale
            yield self.progress.step

    @property
    def step_s(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self.step_start_s

    def update(self) -> None:
        """Follow the gradient at the step's learning rate, unless it is not finite."""
        lr = self._lr(self.progress.step)
        self.grad_norms.append(self.optimizer.step(lr, self.config.max_grad_norm))

    def record(
        self, metrics: dict, rollouts: Sequence[Mapping] = (), evaluate: Callable[[], dict] | None = None
    ) -> None:
        """End a step: a line on the console, the files, and what is due: the evaluation's figures, a checkpoint.

        ValueError where several updates in a row were skipped, as their gradients were not finite.
        """
        config, progress, log = self.config, self.progress, self.log
        made = [norm for norm in self.grad_norms if math.isfinite(norm)]
        self.guard.check(len(self.grad_norms) - len(made), len(made), self.loss_scale)
        is_expected = self.loss_scale > 1  # a scaled loss overflows now and then; another norm is shown as it is
        norms = made if made or is_expected else self.grad_norms
        metrics = metrics | {"lr": self._lr(progress.step), "grad_norm": mean(norms), "step_s": self.step_s}
        metrics |= {"peak_memory_gib": peak_memory_gib()}
        metrics |= {"loss_scale": self.optimizer.loss_scale} if self.optimizer.is_scaled else {}
        progress.step, progress.lr = progress.step + 1, metrics["lr"]
        if evaluate and is_due(config.eval_every, progress.step) and progress.step < self.n_steps:
            metrics |= eval_metrics(evaluate())
        log.metrics(progress.step, metrics)
        log.rollouts(progress.step, rollouts)
        log.line(progress.step, metrics)
        is_last = progress.step == self.n_steps or self.interrupt.is_asked
        if is_last or is_due(config.save_every, progress.step) or progress.best_step == progress.step:
            self.save()

    def save(self) -> None:
        """Save a checkpoint that --resume continues bit for bit: sampling and data order follow from seed and step.

        ValueError where a weight is not finite: nothing is then saved.
        """
        progress, config = self.progress, self.config
        progress.wall_s = time.monotonic() - self.start_s
        if not is_finite(self.model.parameters()):
            raise ValueError(f"a weight is not finite after step {progress.step}; not saved: resume with a lower --lr")

        def write_model(folder: Path) -> None:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        reference = self.reference.state_dict() if self.reference else {}
        save_checkpoint(
            self.log.folder / "checkpoints",
            progress.step,
            write_model=write_model,
            tensors=self.optimizer.state_tensors() | {f"reference.{name}": t for name, t in reference.items()},
            state={name: value for name, value in vars(progress).items() if value is not None},
            keep_last=config.keep_last,
            keep_best=progress.best_step,
        )

    def is_stopped(self) -> bool:
        """Whether Ctrl-C ended the steps; says how the run goes on."""
        if self.interrupt.is_asked:
            script = f"python {Path(sys.argv[0]).name} --resume {self.log.folder}"
            self.log.say(f"stopped after step {self.progress.step}; continue with: {script}")
        return self.interrupt.is_asked

    def finish(self, after: dict | None, said: Sequence[str], **more) -> None:
        """Write summary.json and the trained model's evaluation, and say what the run came to."""
        progress, log = self.progress, self.log
        progress.wall_s = time.monotonic() - self.start_s
        if after:
            log.metrics(progress.step, eval_metrics(after))
        times = dict(wall_s=progress.wall_s, steps=progress.step, seed=self.config.seed)
        log.summary({"before": progress.before, "after": after} | more | times)
        end = f"{progress.step} steps, {progress.wall_s:.0f} s in all; run folder: {log.folder}"
        log.say("\n".join([*said, end]))

    def warn_of_gap(self, metrics: dict, corrects: str = "") -> None:
        """Say, once a run, that sampler and trainer differ by more than rounding of the weights explains.

        What is rounded counts 1 / temperature times in the metric. `corrects` names the script's flag, if it has one,
        that makes up for the difference.
        """
        gap, normal = metrics.get("logp_gap_mean", 0.0), NORMAL_GAP.get(self.dtype, math.inf)
        if gap * min(1.0, self.config.temperature) <= normal:
            return
        name = str(self.dtype).removeprefix("torch.")
        less = {torch.bfloat16: "--dtype float16 (on cuda) or float32", torch.float16: "--dtype float32"}
        advice = f"try {less[self.dtype]}" if self.dtype in less else "the two compute different things, which is a bug"
        self.log.say_once(
            "gap beyond rounding",
            f"warning: logp_gap_mean is {gap:.2g}; in {name} rounding explains {normal:g}: the sampler's "
            f"log-probabilities are not those that are learned from; {advice}{corrects} (said once)",
        )


def is_due(every: int, step: int) -> bool:
    """Whether something done every so many steps (0: never) is due after this one."""
    return bool(every) and step % every == 0


def eval_metrics(measured: dict) -> dict:
    """An evaluation's figures by their names in metrics.jsonl: `eval_accuracy` and so on."""
    return {f"eval_{name}": value for name, value in measured.items()}
