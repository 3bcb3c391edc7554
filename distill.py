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

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import nanor1.openmp  # noqa: F401  # isort: skip  (before torch)

import torch

from nanor1 import distillation, sft, traces
from nanor1.checkpoint import digest, load_checkpoint
from nanor1.config import MANY, option, option_name, parse_args, refuse_idle, user_errors, validated
from nanor1.evaluate import Evaluation, Rules, evaluate, make_rules, problem_accuracies
from nanor1.grpo import LossSettings, Rollout, mean, step_metrics
from nanor1.grpo import add_gradient as add_policy_gradient
from nanor1.machine import Interrupt, peak_memory_gib
from nanor1.miniature import find_miniature, find_model
from nanor1.model import Transformer
from nanor1.optim import MasterAdamW, NonFiniteGuard
from nanor1.paired import change_line, paired_change
from nanor1.parallel import Workers
from nanor1.prompts import Prompter, PromptOptions, choose_stop_texts, choose_template, make_prompter
from nanor1.runlog import RunLog
from nanor1.sampler import Sampler
from nanor1.tasks import STYLES, TASKS, Problem, Task, format_prompt, parse_object
from nanor1.tokenizer import Tokenizer
from nanor1.training import (
    TaskOptions,
    TrainingOptions,
    as_miniature_run,
    choose_machine,
    count_failures,
    default_tokens_per_batch,
    digest_of,
    eval_metrics,
    is_due,
    is_finished,
    load_task,
    longest_example,
    open_log,
    own_rewards,
    prepare,
    report_failures,
    resumed,
    save_run,
    say_lr_jump,
    update,
    warn_of_gap,
)


def asks_teacher(config: "Config") -> bool:
    """Whether the teacher answers problems before the first step."""
    return config.method != "on-policy" and not config.trace_file


def is_logits(config: "Config") -> bool:
    return config.method == "logits"


def is_on_policy(config: "Config") -> bool:
    return config.method == "on-policy"


def has_task(config: "Config") -> bool:
    return config.task is not None


TRACES_MADE = ("a teacher that answers problems", asks_teacher)
LOGITS, ON_POLICY = ("--method logits", is_logits), ("--method on-policy", is_on_policy)
LEARNS_TRACES = ("--method traces or logits", lambda config: config.method != "on-policy")
EVALUATES = ("--task", has_task)
SAMPLES = ("a teacher that answers problems, or --method on-policy", lambda c: asks_teacher(c) or is_on_policy(c))


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions, TaskOptions, PromptOptions):
    model: str | None = option(None, "the student: model or run folder, or miniature/NAME", "what to train")
    teacher: str | None = option(None, "model or run folder, or a file of traces (sample.py --keep correct)")
    method: Literal["traces", "logits", "on-policy"] = option("traces", "see above")
    task: Literal[TASKS] | None = option(None, "what the teacher answers, and what the student is evaluated on")

    traces: str | None = option(None, "logits: a file of traces; none: made by the teacher", "the teacher's answers")
    trace_problems: int = option(1000, "problems that the teacher answers", least=1, needs=TRACES_MADE)
    trace_samples: int = option(4, "answers a problem", least=1, most=MANY, needs=TRACES_MADE)
    max_per_problem: int = option(4, "right ones kept of a problem, at most", least=1, needs=TRACES_MADE)
    any_format: bool = option(False, "keep right answers without the format asked for, too", needs=TRACES_MADE)
    max_new_tokens: int = option(
        512, "length limit of an answer, the teacher's and the student's", least=1, needs=EVALUATES
    )
    temperature: float = option(1.0, "of sampling", above=0, needs=SAMPLES)
    max_rows: int = option(512, "answers made at once", least=1, needs=EVALUATES)

    epochs: float = option(1.0, "passes over the traces", "a step", above=0, needs=LEARNS_TRACES)
    steps: int = option(0, "updates; 0: as many as the epochs take; on-policy needs a number", least=0)
    examples: int = option(16, "traces an update", least=1, most=MANY, needs=LEARNS_TRACES)
    max_tokens: int = option(2048, "longer traces are left out, counted and reported", least=2, needs=LEARNS_TRACES)
    problems: int = option(16, "on-policy: problems an update", least=1, most=MANY, needs=ON_POLICY)
    completions: int = option(4, "on-policy: answers a problem", least=1, most=MANY, needs=ON_POLICY)

    divergence: Literal["forward", "reverse", "jsd"] = option(
        "forward", "logits: see nanor1/distillation.py", "loss", needs=LOGITS
    )
    beta: float = option(
        0.5,
        "logits: the teacher's share of jsd's mixture",
        above=0,
        most=1,
        needs=("--divergence jsd", lambda config: is_logits(config) and config.divergence == "jsd"),
    )
    hard_weight: float = option(
        0.5, "logits: weight of the token's own loss; the divergence gets the rest", least=0, most=1, needs=LOGITS
    )
    divergence_temperature: float = option(1.0, "logits: softens both distributions", above=0, needs=LOGITS)

    lr: float = option(1e-5, "peak learning rate", "schedule", least=0, most=1)
    decay: Literal["constant", "linear", "cosine"] = option("cosine", "after warm-up, to a tenth of the peak")

    eval_every: int = option(
        0, "evaluate every so many updates; 0: only before and after", "evaluation and saving", least=0, needs=EVALUATES
    )
    eval_problems: int = option(200, "held-out problems, at most", least=1, needs=EVALUATES)
    eval_samples: int = option(
        1,
        "samples a problem",
        least=1,
        most=MANY,
        needs=("--eval-temperature above 0", lambda config: config.eval_temperature or config.eval_samples == 1),
    )
    eval_temperature: float = option(0.0, "0 is greedy", least=0, needs=EVALUATES)
    save_every: int = option(0, "checkpoint every so many updates; 0: only at the end", least=0)

    @property
    def trace_file(self) -> str | None:
        """The traces that are there already."""
        return self.teacher if Path(self.teacher).is_file() else self.traces

    def validate(self) -> None:
        super().validate()
        parse_object(self.template_args, "--template-args")
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
    lr: float | None = None  # of the last update
    wall_s: float = 0.0
    before: dict | None = None
    before_P: list[float | None] | None = None  # each held-out problem's share of right answers
    held_out: str | None = None  # which these problems were
    traces: str | None = None  # the digest of their file


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
    prompter: Prompter  # to the student
    rules: Rules
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

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prompter.tokenizer


@user_errors()
def main() -> None:
    start_s = time.monotonic()
    config, checkpoint = read_command_line()
    if config.threads:
        torch.set_num_threads(config.threads)
    tensors, state = load_checkpoint(checkpoint) if checkpoint else ({}, {})
    progress = Progress(**state)
    columns = [column for column in COLUMNS if column[0] not in HIDDEN_COLUMNS[config.method]]
    files = (config.data, config.eval_data, config.few_shot, config.reward_file, config.trace_file)
    with open_log(config, checkpoint, progress.step, f"distill-{config.method}", columns, files) as log:
        run = set_up(config, checkpoint, tensors, progress, log, start_s - progress.wall_s)
        del tensors  # twice the model's size
        if checkpoint and is_finished(config.resume, progress.step, run.n_steps):
            log.say(f"{config.resume} is finished, {progress.step} steps; to train on, give more --epochs or --steps")
            return
        say_lr_jump(log, config, progress.step, run.n_steps, progress.lr)
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
        progress.step, progress.lr = progress.step + 1, metrics["lr"]

        step_s = time.monotonic() - step_start_s
        metrics |= {"step_s": step_s, "tokens_per_s": metrics["tokens"] / step_s, "peak_memory_gib": peak_memory_gib()}
        if run.held_out and is_due(config.eval_every, progress.step) and progress.step < run.n_steps:
            metrics |= eval_metrics(run_evaluation(run)[0].to_dict())
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
    questions = [traces.ask(problem, run.prompter) for problem in problems]
    groups = traces.answer(
        run.sampler,
        run.prompter,
        questions,
        run.rules,
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
        config, checkpoint = resumed(config, given)
        refuse_idle(config, given)
        return config, checkpoint
    if config.model is None or config.teacher is None:
        raise ValueError("--model and --teacher are needed: the student, and whom it learns from")
    if config.method != "traces" and Path(config.teacher).is_file():
        raise ValueError(f"--method {config.method} asks the teacher itself; --teacher {config.teacher} is a file")
    if miniature := find_miniature(config.model):
        config = as_miniature_run(config, given, miniature, MINIATURE_RUN)
    if not config.task and (config.method == "on-policy" or not config.trace_file):
        raise ValueError("--task is needed: the problems to answer")
    of_task = [] if config.task else [*inspect.get_annotations(TaskOptions), "style", "few_shot", "stop_text"]
    if idle := [name for name in of_task if getattr(config, name) != getattr(Config, name)]:
        raise ValueError(f"{option_name(idle[0])} has no effect without --task; give that, or leave it out")
    refuse_idle(validated(config), given)
    return config, None


def set_up(
    config: Config, checkpoint: Path | None, tensors: dict, progress: Progress, log: RunLog, start_s: float
) -> Run:
    folder = checkpoint or find_model(config.model, config.seed, log)
    tokenizer = Tokenizer.from_pretrained(folder)
    template, why = choose_template(config.template, tokenizer, "r1-zero", is_base_chat=True)
    log.say(f"student: {folder}; template: {template} ({why})")
    prompter = make_prompter(config, tokenizer, template, config.task or "prompt")
    config = replace(config, max_tokens=longest_example(config.max_tokens, folder))
    device, dtype = choose_machine(config, checkpoint, folder, log)
    task = None
    if config.task:
        parts = ("held-out",) if config.trace_file and config.method != "on-policy" else ("train", "held-out")
        task = load_task(config, config.task, tokenizer, parts)
        for part in parts:
            log.say(f"{'to learn from' if part == 'train' else 'to evaluate on'}: {task.describe(part)}")
    teacher, examples = load_teaching(config, checkpoint, prompter, task, (dtype, device), log)
    if config.method != "on-policy":
        check_traces(config, progress, log)
    model = Transformer.from_pretrained(folder, dtype, device)
    optimizer, workers = prepare(model, config, tensors, device)
    return Run(
        config=config,
        workers=workers,
        sampler=Sampler(model, config.max_rows, memory_share=0.5),  # the other half is for learning
        prompter=prompter,
        rules=make_rules(prompter, own=own_rewards(config)),
        teacher=teacher,
        task=task,
        held_out=task.part("held-out", config.eval_problems) if task else [],
        examples=examples,
        n_steps=config.steps or math.ceil(config.epochs * len(examples) / config.examples),
        tokens_per_batch=default_tokens_per_batch(config.tokens_per_batch, device),
        progress=progress,
        optimizer=optimizer,
        log=log,
        interrupt=Interrupt(),
        start_s=start_s,
    )


def check_traces(config: Config, progress: Progress, log: RunLog) -> None:
    """The traces that the run made are not edited between its parts, as no other data file is (see `open_log`)."""
    path = Path(config.trace_file or log.folder / "traces.jsonl")
    before, progress.traces = progress.traces, digest(path)["sha256"]
    if before not in (None, progress.traces) and not config.trace_file:
        if not config.allow_changed_data:
            raise ValueError(f"{path} has changed since the run began: go on with --allow-changed-data")
        log.say(f"warning: {path} has changed since the run began")


def load_teaching(
    config: Config, checkpoint: Path | None, prompter: Prompter, task: Task | None, machine: tuple, log: RunLog
) -> tuple[Teacher | None, list[sft.Example]]:
    """The teacher, where the method asks it at each step, and its traces, which are made now where there are none.

    They come before the first step, so a checkpoint says that they are all there.
    """
    path, has_traces = config.trace_file or str(log.folder / "traces.jsonl"), bool(config.trace_file or checkpoint)
    if config.method == "traces" and has_traces:
        return None, read_traces(config, prompter, task, path, log)
    teacher = load_teacher(config, prompter, machine, log)
    if config.method == "on-policy":
        return teacher, []
    if not has_traces:
        make_traces(config, teacher, prompter, task, path, log)
        teacher.model.drop_reordered()  # it scores from here on
    return teacher if config.method == "logits" else None, read_traces(config, prompter, task, path, log)


def load_teacher(config: Config, prompter: Prompter, machine: tuple, log: RunLog) -> Teacher:
    """The teacher in the student's dtype, on its device."""
    folder = find_model(config.teacher, config.seed, log)
    if not folder.exists():
        raise ValueError(f"--teacher {folder} is neither a model folder nor a file of traces")
    log.say(f"teacher: {folder}")
    own = Tokenizer.from_pretrained(folder)
    if config.method != "traces":
        why = f"--method {config.method} compares distributions over tokens (--method traces does not)"
        distillation.check_same_vocabulary(prompter.tokenizer, own, why)
        distillation.check_same_end(prompter.tokenizer, own, prompter.template, why)
    return Teacher(folder, Transformer.from_pretrained(folder, *machine).requires_grad_(False), own)


def read_traces(config: Config, prompter: Prompter, task: Task | None, path: str, log: RunLog) -> list[sft.Example]:
    found = sft.read_examples(path, prompter.tokenizer, config.max_tokens, prompter.arguments, prompter.system)
    if found.n_not_train:
        log.say(f"warning: {path}: {found.n_not_train} traces of problems that are not for training (--split)")
    left_out = f", {found.n_too_long} longer than {config.max_tokens} tokens left out" if found.n_too_long else ""
    log.say(f"traces: {path}: {len(found.examples):,}{left_out}")
    asked = questions_of(task.listed.get("held-out", ())) if task else frozenset()
    examples = [example for example in found.examples if example.question not in asked]
    if len(examples) < len(found.examples):
        log.say(f"traces: {len(found.examples) - len(examples):,} left out, to problems that are held out")
    if not examples:
        raise ValueError(f"{path}: all of it answers problems that are held out; give other traces or --eval-data")
    return examples


def questions_of(problems: Sequence[Problem]) -> frozenset[str]:
    """What traces of these problems may have as their question, in whatever template they were asked."""
    chats = [sft.first_question(format_prompt(p, "chat", style)) for p in problems for style in STYLES]
    texts = [format_prompt(p, template).strip() for p in problems for template in ("r1-zero", "bare")]
    return frozenset(chats + texts)


def make_traces(config: Config, teacher: Teacher, prompter: Prompter, task: Task, path: str, log: RunLog) -> None:
    """The teacher answers training problems; its right and readable answers go to `path`, a begun file goes on."""
    problems = task.part("train", config.trace_problems, config.seed)
    selection = traces.Selection("correct", not config.any_format, max_per_problem=config.max_per_problem)
    asker = to_teacher(config, prompter, teacher.tokenizer)
    sampling = dict(temperature=config.temperature, max_new_tokens=config.max_new_tokens)
    ledger = traces.collect(
        Sampler(teacher.model, config.max_rows, memory_share=0.5),
        asker,
        [traces.ask(problem, asker, prompter) for problem in problems],
        make_rules(asker, own=own_rewards(config)),
        selection,
        path,
        samples=config.trace_samples,
        batch_size=max(1, traces.WAVES * config.max_rows // config.trace_samples),
        seed=config.seed,
        source={"model": str(teacher.folder), "step": None, "seed": config.seed, "split": "train"},
        arguments={"--teacher": str(teacher.folder)} | {option_name(name): getattr(config, name) for name in DECIDING},
        say=log.say,
        **sampling,
    )
    report_failures(own_rewards(config), log.say_once)
    log.say(traces.summary(ledger, selection))
    if not ledger.is_whole:
        log.say(f"continue with: python distill.py --resume {log.folder}")
        raise SystemExit(130)
    if not ledger.counts.get("kept"):
        raise ValueError(
            "none of the teacher's answers can be learned from; give a better teacher, more --trace-problems or "
            "--trace-samples, or --any-format"
        )


def to_teacher(config: Config, prompter: Prompter, tokenizer: Tokenizer) -> Prompter:
    """How the teacher is asked what its student is to learn: in its own template, where it has one.

    It is told what its chat template has a variable for.
    """
    if prompter.template == "bare":
        return replace(prompter, tokenizer=tokenizer)
    template, _ = choose_template("auto", tokenizer, "r1-zero", is_base_chat=True)
    stop_texts = choose_stop_texts(config, template)
    if template != "chat":
        if prompter.system or prompter.examples or prompter.style != "think":
            raise ValueError(
                "--system, --style and --few-shot are of chats, and the teacher has no chat template; leave them out"
            )
        return Prompter(tokenizer, template, stop_texts=stop_texts)
    known = {name: value for name, value in prompter.arguments.items() if name in tokenizer.template_parameters}
    return replace(prompter, tokenizer=tokenizer, template=template, arguments=known, stop_texts=stop_texts)


def run_evaluation(run: Run) -> tuple[Evaluation, list[list[Rollout]]]:
    """The student's accuracy on the held-out problems, with the same random numbers each time."""
    config = run.config
    return evaluate(
        run.sampler,
        run.prompter,
        run.held_out,
        run.rules,
        samples=config.eval_samples if config.eval_temperature else 1,
        temperature=config.eval_temperature,
        max_new_tokens=config.max_new_tokens,
    )


def evaluate_before(run: Run) -> None:
    """The starting student's evaluation, kept for the end."""
    evaluation, rollouts_PG = run_evaluation(run)
    run.progress.before, run.progress.before_P = evaluation.to_dict(), problem_accuracies(rollouts_PG)
    run.progress.held_out = digest_of(run.held_out)
    run.log.metrics(0, eval_metrics(run.progress.before))
    run.log.say(f"before: {evaluation}\n")


def finish(run: Run) -> None:
    """Evaluate the student; say and write what the run came to."""
    progress, log = run.progress, run.log
    after, rollouts_PG = run_evaluation(run) if run.held_out else (None, [])
    progress.wall_s = time.monotonic() - run.start_s
    if after:
        log.metrics(progress.step, eval_metrics(after.to_dict()))
    is_same = progress.held_out in (None, digest_of(run.held_out))  # None: a run begun before it was kept
    change = paired_change(progress.before_P or [], problem_accuracies(rollouts_PG)) if is_same else None
    times = dict(wall_s=progress.wall_s, steps=progress.step, seed=run.config.seed)
    log.summary({"before": progress.before, "after": after and after.to_dict(), "change": change} | times)
    if after and after.accuracy is not None:
        before = progress.before["accuracy"]
        others = "" if is_same else ", of other held-out problems, with which these cannot be compared"
        log.say(f"\nbefore: accuracy {'unknown' if before is None else f'{before:.3f}'}{others}\nafter:  {after}")
    if change:
        log.say(f"change: {change_line(change)}")
    report_failures(run.rules.own, log.say_once)
    count_failures(run.rules.own, log.say)
    log.say(f"{progress.step} steps, {progress.wall_s:.0f} s in all; run folder: {log.folder}")
    log.say(f"next: python sample.py --model {log.folder} ...")


if __name__ == "__main__":
    main()
