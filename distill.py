"""Distillation: a small student learns to reason from a teacher.

    python distill.py --teacher BIG --model SMALL --task gsm8k --data gsm8k_train.jsonl --eval-data gsm8k_test.jsonl
    python distill.py --teacher traces.jsonl --model SMALL                          answers made before, by any model
    python distill.py --method logits --teacher BIG --model SMALL --task ...         the teacher's distributions
    python distill.py --method on-policy --teacher BIG --model SMALL --task ...      on the student's own answers

- traces: the teacher answers training problems; its right and readable answers are what the student is fine-tuned on
  (DeepSeek-R1, 2501.12948, section 2.4).
- logits: the same answers, but at each token the student is drawn towards the teacher's whole distribution.
- on-policy: the student answers, and the teacher says of each of its tokens how likely it finds it (GKD, 2306.13649).

The last two compare distributions over tokens, so both models need the same vocabulary. The losses are in
nanor1/sft.py, nanor1/distillation.py and nanor1/grpo.py, the choice of answers in nanor1/traces.py.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import nanor1.openmp  # noqa: F401  # isort: skip  (before torch)

import torch

from nanor1 import distillation, sft, traces
from nanor1.checkpoint import load_checkpoint
from nanor1.config import option, option_name, parse_args, user_errors
from nanor1.evaluate import Evaluation, evaluate, write_prompt
from nanor1.grpo import LossSettings, mean, step_metrics
from nanor1.grpo import add_gradient as add_policy_gradient
from nanor1.machine import Interrupt, peak_memory_gib
from nanor1.miniature import find_miniature, find_model, miniature_task, own_miniature
from nanor1.model import Transformer
from nanor1.optim import MasterAdamW, NonFiniteGuard
from nanor1.parallel import Workers
from nanor1.runlog import RunLog
from nanor1.sampler import Sampler
from nanor1.tasks import Problem, Task, format_prompt, make_task, task_parameters
from nanor1.tokenizer import Tokenizer
from nanor1.training import (
    as_miniature_run,
    check_least,
    choose_machine,
    default_tokens_per_batch,
    eval_metrics,
    is_due,
    is_finished,
    longest_example,
    open_log,
    prepare,
    resumed,
    save_run,
    update,
    warn_of_gap,
)


@dataclass(frozen=True)
class Config:
    model: str | None = option(None, "the student: model or run folder, or miniature/NAME", "what to train")
    teacher: str | None = option(None, "model or run folder, or a file of traces (sample.py --keep correct)")
    method: Literal["traces", "logits", "on-policy"] = option("traces", "see above")
    task: str | None = option(None, "countdown, arithmetic, gsm8k, math or code: what the teacher answers; evaluation")
    data: str | None = option(None, "JSON lines of training problems")
    eval_data: str | None = option(None, "JSON lines of held-out problems; none: a tenth of the data is held out")
    task_args: str = option("", 'JSON object of the task\'s parameters, as {"n_numbers": 3}; see nanor1/tasks.py')
    template: Literal["auto", "r1-zero", "chat", "bare"] = option("auto", "prompt; auto: chat if the model has one")
    out: str | None = option(None, "run folder; none: runs/distill-METHOD-TIME")
    resume: str | None = option(None, "continue the run in this folder")
    seed: int = option(0, "of everything random")

    traces: str | None = option(None, "logits: a file of traces; none: made by the teacher", "the teacher's answers")
    trace_problems: int = option(1000, "problems that the teacher answers")
    trace_samples: int = option(4, "answers a problem")
    max_per_problem: int = option(4, "right ones kept of a problem, at most")
    any_format: bool = option(False, "keep right answers without the format asked for, too")
    max_new_tokens: int = option(512, "length limit of an answer, the teacher's and the student's")
    temperature: float = option(1.0, "of sampling")
    max_rows: int = option(512, "answers made at once")

    epochs: float = option(1.0, "passes over the traces", "a step")
    steps: int = option(0, "updates; 0: as many as the epochs take; on-policy needs a number")
    examples: int = option(16, "traces an update")
    max_tokens: int = option(2048, "longer traces are left out, counted and reported")
    problems: int = option(16, "on-policy: problems an update")
    completions: int = option(4, "on-policy: answers a problem")

    divergence: Literal["forward", "reverse", "jsd"] = option("forward", "logits: see nanor1/distillation.py", "loss")
    beta: float = option(0.5, "logits: the teacher's share of jsd's mixture")
    hard_weight: float = option(0.5, "logits: weight of the token's own loss; the divergence gets the rest")
    divergence_temperature: float = option(1.0, "logits: softens both distributions")

    lr: float = option(1e-5, "peak learning rate", "optimizer")
    warmup: int = option(5, "updates of linear warm-up")
    decay: Literal["constant", "linear", "cosine"] = option("cosine", "after warm-up, to a tenth of the peak")
    weight_decay: float = option(0.0, "AdamW's, on matrices")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    tokens_per_batch: int = option(
        0, "tokens a forward and backward pass; 0: 1024 on the CPU (for the memory), else 8192"
    )
    checkpoint_activations: bool = option(False, "less memory, for a third more work")

    eval_every: int = option(0, "evaluate every so many updates; 0: only before and after", "evaluation and saving")
    eval_problems: int = option(200, "held-out problems")
    eval_samples: int = option(1, "samples a problem")
    eval_temperature: float = option(0.0, "0 is greedy")
    save_every: int = option(0, "checkpoint every so many updates; 0: only at the end")
    keep_last: int = option(2, "checkpoints kept")

    device: str = option("auto", "cpu, cuda, mps or auto", "machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "of the weights; auto: bfloat16 on cuda, and where a CPU is measured to be faster with it; float16: cuda only",
    )
    compile: Literal["auto", "on", "off"] = option("auto", "torch.compile of the student's blocks; auto: on cuda")
    threads: int = option(0, "CPU threads; 0: torch's choice")
    workers: int = option(0, "copies of the student, one a CPU thread; 0: one, or for a small model all threads")

    @property
    def trace_file(self) -> str | None:
        """The traces that are there already."""
        return self.teacher if Path(self.teacher).is_file() else self.traces

    def validate(self) -> None:
        at_least = dict(trace_problems=1, trace_samples=1, max_per_problem=1, max_new_tokens=1, max_rows=1, steps=0)
        at_least |= dict(examples=1, max_tokens=2, problems=1, completions=1, lr=0, warmup=0, weight_decay=0)
        at_least |= dict(tokens_per_batch=0, eval_every=0, eval_problems=1, eval_samples=1, save_every=0, keep_last=1)
        check_least(self, at_least, {})
        if self.temperature <= 0 or self.epochs <= 0:
            raise ValueError(f"--temperature {self.temperature}, --epochs {self.epochs}: both must be above 0")
        if self.method == "on-policy" and not self.steps:
            raise ValueError("--method on-policy has no epochs; give --steps")
        if self.method != "logits" and self.traces:
            raise ValueError("--traces is for --method logits; with --method traces give the file as --teacher")
        distillation.DivergenceSettings(1, self.divergence, self.beta, self.divergence_temperature, self.hard_weight)


MINIATURE_RUN = dict(  # on the CPU, where one step is short: a GPU would wait for its launches
    max_new_tokens=224, examples=64, epochs=2.0, lr=1e-3, max_tokens=256, tokens_per_batch=4096, problems=32,
    completions=4, eval_problems=500, eval_samples=16, eval_temperature=1.0, template="bare", device="cpu",
    dtype="float32",
)  # fmt: skip
COLUMNS = [
    ("loss", "loss", "7.4f"), ("divergence", "diverg", "7.4f"), ("reverse_kl", "rev KL", "7.4f"),
    ("accuracy", "acc", "5.3f"), ("response_tokens", "tokens", "6.1f"), ("lr", "lr", "7.1e"),
    ("grad_norm", "gnorm", "6.3f"), ("tokens_per_s", "tok/s", "7.0f"), ("step_s", "s", "5.1f"),
    ("eval_accuracy", "eval", "5.3f"),
]  # fmt: skip
HIDDEN_COLUMNS = {  # those of the other methods; on-policy's loss is its reverse KL
    "traces": {"divergence", "reverse_kl", "accuracy", "response_tokens"},
    "logits": {"reverse_kl", "accuracy", "response_tokens"},
    "on-policy": {"loss", "divergence"},
}


# what a traces file depends on, besides teacher and problems
DECIDING = ("trace_samples", "max_per_problem", "any_format", "max_new_tokens", "temperature", "seed")


@dataclass
class Progress:
    """What a resumed run needs besides weights and moments; a checkpoint's state.json."""

    step: int = 0
    wall_s: float = 0.0
    before: dict | None = None


@dataclass(frozen=True)
class Teacher:
    folder: Path
    model: Transformer
    tokenizer: Tokenizer


@dataclass
class Run:
    """Everything a run holds."""

    config: Config
    workers: Workers  # the student, on one CPU thread or more
    sampler: Sampler  # of the student
    tokenizer: Tokenizer
    teacher: Teacher | None  # None where its traces are all that is needed
    task: Task | None
    held_out: list[Problem]
    examples: list[sft.Example]  # the teacher's traces; none with on-policy
    n_steps: int
    tokens_per_batch: int
    progress: Progress
    optimizer: MasterAdamW
    log: RunLog
    interrupt: Interrupt
    start_s: float  # less what earlier parts of the run took


@user_errors()
def main() -> None:
    start_s = time.monotonic()
    config, checkpoint = read_command_line()
    if config.threads:
        torch.set_num_threads(config.threads)
    tensors, state = load_checkpoint(checkpoint) if checkpoint else ({}, {})
    progress = Progress(**state)
    columns = [column for column in COLUMNS if column[0] not in HIDDEN_COLUMNS[config.method]]
    with open_log(config, checkpoint, progress.step, f"distill-{config.method}", columns) as log:
        run = set_up(config, checkpoint, tensors, progress, log, start_s - progress.wall_s)
        del tensors  # twice the model's size
        if checkpoint and is_finished(config.resume, progress.step, run.n_steps):
            log.say(f"{config.resume} is finished, {progress.step} steps; to train on, give more --epochs or --steps")
            return
        if progress.before is None and run.held_out:
            evaluate_before(run)
        train(run, STEPS[config.method])
        if run.interrupt.is_asked:
            log.say(f"stopped after step {progress.step}; continue with: python distill.py --resume {log.folder}")
        else:
            finish(run)


def train(run: Run, learn: Callable[[Run, int], dict]) -> None:
    """The steps: the gradient of one method's loss, an update, and what is due after it."""
    config, progress, guard = run.config, run.progress, NonFiniteGuard()
    while progress.step < run.n_steps and not run.interrupt.is_asked:
        step_start_s = time.monotonic()
        metrics = learn(run, progress.step)
        metrics |= update(run.optimizer, guard, config, progress.step, run.n_steps)
        progress.step += 1

        step_s = time.monotonic() - step_start_s
        metrics |= {"step_s": step_s, "tokens_per_s": metrics["tokens"] / step_s, "peak_memory_gib": peak_memory_gib()}
        if run.held_out and is_due(config.eval_every, progress.step) and progress.step < run.n_steps:
            metrics |= eval_metrics(run_evaluation(run).to_dict())
        run.log.metrics(progress.step, metrics)
        warn_of_gap(run.log, metrics, run.workers.model.head_weight_VC.dtype, config.temperature)
        run.log.line(progress.step, metrics)
        progress.wall_s = time.monotonic() - run.start_s
        is_last = progress.step == run.n_steps or run.interrupt.is_asked
        if is_last or is_due(config.save_every, progress.step):
            save_run(
                run.log.folder, run.workers.model, run.tokenizer, run.optimizer, progress, keep_last=config.keep_last
            )


# ---- the three methods: each adds the gradient of one update and returns its metrics


def learn_traces(run: Run, step: int) -> dict:
    examples = next_examples(run, step)
    vocab_size, loss_scale = run.tokenizer.vocab_size, run.optimizer.loss_scale
    loss = sft.add_gradient(run.workers, examples, run.tokens_per_batch, vocab_size, loss_scale)
    return {"loss": loss, "tokens": n_tokens(examples)}


def learn_logits(run: Run, step: int) -> dict:
    examples, config = next_examples(run, step), run.config
    settings = distillation.DivergenceSettings(
        run.tokenizer.vocab_size, config.divergence, config.beta, config.divergence_temperature, config.hard_weight
    )
    metrics = distillation.add_gradient(
        run.workers, run.teacher.model, examples, run.tokens_per_batch, settings, run.optimizer.loss_scale
    )
    return metrics | {"tokens": n_tokens(examples)}


def next_examples(run: Run, step: int) -> list[sft.Example]:
    return sft.sample_examples([(run.examples, 1.0)], run.config.examples, run.config.seed, step)


def n_tokens(examples: list[sft.Example]) -> int:
    return sum(len(example.ids) - 1 for example in examples)


def learn_on_policy(run: Run, step: int) -> dict:
    """The student samples, the teacher scores each token, and the policy loss follows: no reward is needed."""
    config, vocab_size = run.config, run.tokenizer.vocab_size
    problems = run.task.sample(config.problems, config.seed, step)
    questions = [traces.ask(problem, config.template, run.tokenizer) for problem in problems]
    groups = traces.answer(
        run.sampler,
        run.tokenizer,
        questions,
        n=config.completions,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed * traces.SEED_STRIDE + step + 1,  # 0 is left to evaluations
    )
    rollouts = [rollout for group in groups for rollout in group]
    advantages = distillation.teacher_advantages(
        run.teacher.model, rollouts, config.temperature, vocab_size, run.tokens_per_batch
    )
    settings = LossSettings(config.temperature, vocab_size, run.tokens_per_batch, loss_scale=run.optimizer.loss_scale)
    learned = step_metrics([add_policy_gradient(run.workers, None, rollouts, advantages, settings)])
    return {
        "reverse_kl": distillation.reverse_kl(advantages),
        "accuracy": mean(rollout.parts["accuracy"] for rollout in rollouts),  # for the log alone
        "response_tokens": mean(len(rollout.completion.ids) for rollout in rollouts),
        "tokens": learned["learned_tokens"],
        **{name: learned[name] for name in ("entropy", "logp_gap_mean", "logp_gap_max")},
    }


STEPS = {"traces": learn_traces, "logits": learn_logits, "on-policy": learn_on_policy}


# ---- start and end


def read_command_line() -> tuple[Config, Path | None]:
    """The configuration, and with --resume the checkpoint to go on from. Flags beat the resumed run's own arguments."""
    config, given = parse_args(Config, description=__doc__)
    if config.resume:
        return resumed(config, given)
    if config.model is None or config.teacher is None:
        raise ValueError("--model and --teacher are needed: the student, and whom it learns from")
    if config.method != "traces" and Path(config.teacher).is_file():
        raise ValueError(f"--method {config.method} asks the teacher itself; --teacher {config.teacher} is a file")
    if miniature := find_miniature(config.model):
        config = as_miniature_run(config, given, miniature, MINIATURE_RUN)
    if not config.task and (config.method == "on-policy" or not config.trace_file):
        raise ValueError("--task is needed: the problems to answer")
    return config, None


def set_up(
    config: Config, checkpoint: Path | None, tensors: dict, progress: Progress, log: RunLog, start_s: float
) -> Run:
    folder = checkpoint or find_model(config.model, config.seed, log)
    log.say(f"student: {folder}")
    tokenizer = Tokenizer.from_pretrained(folder)
    if config.template == "auto":
        config = replace(config, template=default_template(tokenizer))
    config = replace(config, max_tokens=longest_example(config.max_tokens, folder))
    device, dtype = choose_machine(config, checkpoint, folder, log)
    task = load_task(config, tokenizer)
    teacher, examples = load_teaching(config, checkpoint, tokenizer, task, (dtype, device), log)
    model = Transformer.from_pretrained(folder, dtype, device)
    optimizer, workers = prepare(model, config, tensors, device)
    return Run(
        config=config,
        workers=workers,
        sampler=Sampler(model, config.max_rows, memory_share=0.5),  # the other half is for learning
        tokenizer=tokenizer,
        teacher=teacher,
        task=task,
        held_out=task.held_out(config.eval_problems) if task else [],
        examples=examples,
        n_steps=config.steps or math.ceil(config.epochs * len(examples) / config.examples),
        tokens_per_batch=default_tokens_per_batch(config.tokens_per_batch, device),
        progress=progress,
        optimizer=optimizer,
        log=log,
        interrupt=Interrupt(),
        start_s=start_s,
    )


def load_task(config: Config, tokenizer: Tokenizer) -> Task | None:
    if not config.task:
        return None
    if miniature := own_miniature(tokenizer):
        return miniature_task(miniature)
    return make_task(config.task, data=config.data, eval_data=config.eval_data, **task_parameters(config.task_args))


def load_teaching(
    config: Config, checkpoint: Path | None, tokenizer: Tokenizer, task: Task | None, machine: tuple, log: RunLog
) -> tuple[Teacher | None, list[sft.Example]]:
    """The teacher, where the method asks it at each step, and its traces, which are made now where there are none.

    They come before the first step, so a checkpoint says that they are all there.
    """
    path, has_traces = config.trace_file or str(log.folder / "traces.jsonl"), bool(config.trace_file or checkpoint)
    if config.method == "traces" and has_traces:
        return None, read_traces(config, tokenizer, path, log)
    teacher = load_teacher(config, tokenizer, machine, log)
    if config.method == "on-policy":
        return teacher, []
    if not has_traces:
        make_traces(config, teacher, task, path, log)
        teacher.model.drop_reordered()  # it scores from here on
    return teacher if config.method == "logits" else None, read_traces(config, tokenizer, path, log)


def load_teacher(config: Config, tokenizer: Tokenizer, machine: tuple, log: RunLog) -> Teacher:
    """The teacher in the student's dtype, on its device."""
    folder = find_model(config.teacher, config.seed, log)
    if not folder.exists():
        raise ValueError(f"--teacher {folder} is neither a model folder nor a file of traces")
    log.say(f"teacher: {folder}")
    own = Tokenizer.from_pretrained(folder)
    if config.method != "traces":
        why = f"--method {config.method} compares distributions over tokens (--method traces does not)"
        distillation.check_same_vocabulary(tokenizer, own, why)
    return Teacher(folder, Transformer.from_pretrained(folder, *machine).requires_grad_(False), own)


def read_traces(config: Config, tokenizer: Tokenizer, path: str, log: RunLog) -> list[sft.Example]:
    found = sft.read_examples(path, tokenizer, config.max_tokens)
    left_out = f", {found.n_too_long} longer than {config.max_tokens} tokens left out" if found.n_too_long else ""
    log.say(f"traces: {path}: {len(found.examples):,}{left_out}")
    return found.examples


def make_traces(config: Config, teacher: Teacher, task: Task, path: str, log: RunLog) -> None:
    """The teacher answers training problems; its right and readable answers go to `path`, a begun file goes on."""
    problems = traces.training_problems(task, config.trace_problems, config.seed)
    selection = traces.Selection("correct", not config.any_format, max_per_problem=config.max_per_problem)
    sampling = dict(temperature=config.temperature, max_new_tokens=config.max_new_tokens)
    ledger = traces.collect(
        Sampler(teacher.model, config.max_rows, memory_share=0.5),
        teacher.tokenizer,
        [ask(problem, config.template, teacher.tokenizer) for problem in problems],
        selection,
        path,
        samples=config.trace_samples,
        batch_size=max(1, traces.WAVES * config.max_rows // config.trace_samples),
        seed=config.seed,
        source={"model": str(teacher.folder), "step": None, "seed": config.seed},
        arguments={"--teacher": str(teacher.folder)} | {option_name(name): getattr(config, name) for name in DECIDING},
        say=log.say,
        **sampling,
    )
    log.say(traces.summary(ledger, selection))
    if not ledger.is_whole:
        log.say(f"continue with: python distill.py --resume {log.folder}")
        raise SystemExit(130)
    if not ledger.counts.get("kept"):
        raise ValueError(
            "none of the teacher's answers can be learned from; give a better teacher, more --trace-problems or "
            "--trace-samples, or --any-format"
        )


def ask(problem: Problem, template: str, tokenizer: Tokenizer) -> traces.Question:
    """The question in the teacher's own template for the teacher, and in the student's `template` to learn from."""
    own = "bare" if template == "bare" else default_template(tokenizer)
    return traces.Question(format_prompt(problem, template), write_prompt(problem, own, tokenizer), problem)


def default_template(tokenizer: Tokenizer) -> str:
    return "chat" if tokenizer.chat_template else "r1-zero"


def run_evaluation(run: Run) -> Evaluation:
    """The student's accuracy on the held-out problems, with the same random numbers each time."""
    config = run.config
    evaluation, _ = evaluate(
        run.sampler,
        run.tokenizer,
        run.held_out,
        config.template,
        {"accuracy": 1.0},
        samples=config.eval_samples if config.eval_temperature else 1,
        temperature=config.eval_temperature,
        max_new_tokens=config.max_new_tokens,
    )
    return evaluation


def evaluate_before(run: Run) -> None:
    """The starting student's evaluation, kept for the end."""
    evaluation = run_evaluation(run)
    run.progress.before = evaluation.to_dict()
    run.log.metrics(0, eval_metrics(run.progress.before))
    run.log.say(f"before: {evaluation}\n")


def finish(run: Run) -> None:
    """Evaluate the student; say and write what the run came to."""
    progress, log = run.progress, run.log
    after = run_evaluation(run) if run.held_out else None
    progress.wall_s = time.monotonic() - run.start_s
    if after:
        log.metrics(progress.step, eval_metrics(after.to_dict()))
    times = dict(wall_s=progress.wall_s, steps=progress.step, seed=run.config.seed)
    log.summary({"before": progress.before, "after": after and after.to_dict()} | times)
    if after:
        log.say(f"\nbefore: accuracy {progress.before['accuracy']:.3f}\nafter:  {after}")
    log.say(f"{progress.step} steps, {progress.wall_s:.0f} s in all; run folder: {log.folder}")
    log.say(f"next: python sample.py --model {log.folder} ...")


if __name__ == "__main__":
    main()
