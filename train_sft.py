"""Supervised training from files: fine-tuning on answers, language modelling on text, or a preference reward model.

    python train_sft.py --model FOLDER --data traces.jsonl                        fine-tuning: loss on the answers alone
    python train_sft.py --model FOLDER --data traces.jsonl:3,general.jsonl        several files, with weights
    python train_sft.py --model FOLDER --data corpus.txt --objective text         loss on every token
    python train_sft.py --model FOLDER --data pairs.jsonl --objective preference  a reward model

In DeepSeek-R1 (2501.12948, section 2.3) fine-tuning is the cold start, and later the stage between the two stages of
reinforcement learning; a preference reward model takes part in the last one. Each step: take some examples, follow the
gradient of their loss. What is read from a file and how a loss is made of it: nanor1/sft.py, nanor1/preference.py.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import nanor1.openmp  # noqa: F401  # isort: skip  (before torch)

import torch

from nanor1 import preference, sft
from nanor1.checkpoint import load_checkpoint
from nanor1.config import MANY, apply_preset, option, parse_args, refuse_idle, user_errors, validated
from nanor1.evaluate import wilson_interval
from nanor1.machine import Interrupt, peak_flops, peak_memory_gib
from nanor1.miniature import find_miniature, find_model
from nanor1.model import Transformer
from nanor1.optim import MasterAdamW, NonFiniteGuard
from nanor1.parallel import Workers
from nanor1.prompts import ChatOptions, read_arguments
from nanor1.runlog import RunLog
from nanor1.tasks import HELD_OUT_SHARE, parse_object
from nanor1.tokenizer import Tokenizer
from nanor1.training import (
    TrainingOptions,
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
    say_lr_jump,
    update,
)


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions, ChatOptions):
    model: str | None = option(
        None, "model or run folder, or miniature/NAME, which is pretrained first", "what to train"
    )
    data: str | None = option(None, "files, as a.jsonl or a.jsonl:3,b.jsonl with weights: epochs of it in one epoch")
    eval_data: str | None = option(None, "file of held-out examples, in place of --held-out of the data")
    held_out: float = option(
        HELD_OUT_SHARE,
        "share of the data held out, by the hash of the question that holds out problems; 0: no evaluation",
        least=0,
        needs=("--data alone, without --eval-data", lambda config: not config.eval_data),
    )
    objective: Literal["sft", "text", "preference"] = option(
        "sft", "sft: on answers; text: on every token; preference: a reward model from prompt/chosen/rejected"
    )
    from_scratch: bool = option(False, "fresh weights: the folder needs only config.json and the tokenizer")

    epochs: float = option(1.0, "passes over the data", "a step", above=0)
    steps: int = option(0, "updates; 0: as many as the epochs take", least=0)
    examples: int = option(16, "examples, or pairs, an update", least=1, most=MANY)
    max_tokens: int = option(2048, "longer examples (text: is cut) are left out, counted and reported", least=2)

    centring: float = option(
        0.01,
        "preference: weight of the squared sum of a pair's scores",
        "loss",
        least=0,
        needs=("--objective preference", lambda config: config.objective == "preference"),
    )

    lr: float = option(1e-5, "peak learning rate", "schedule", least=0, most=1)
    decay: Literal["constant", "linear", "cosine"] = option("cosine", "after warm-up, to a tenth of the peak")

    eval_every: int = option(
        0, "evaluate every so many updates; 0: only before and after", "evaluation and saving", least=0
    )
    eval_examples: int = option(500, "held-out examples, at most", least=1)
    save_every: int = option(0, "checkpoint every so many updates; 0: only at the end", least=0)

    def validate(self) -> None:
        super().validate()
        if self.held_out >= 1:
            raise ValueError(f"--held-out is {self.held_out}; it must be at least 0 and below 1")
        if self.from_scratch and self.objective == "preference":
            raise ValueError("a reward model starts from a language model; leave out --from-scratch")
        if self.objective == "text" and (self.template_args or self.system):
            raise ValueError("--template-args and --system are of chats, and --objective text has none; leave them out")
        parse_object(self.template_args, "--template-args")
        sft.parse_data(self.data or "none")


MINIATURE_RUN = dict(  # on the CPU, where one step is short: a GPU would wait for its launches
    examples=64, epochs=2.0, lr=1e-3, max_tokens=256, tokens_per_batch=4096, device="cpu", dtype="float32"
)
COLUMNS = [
    ("loss", "loss", "7.4f"), ("accuracy", "acc", "5.3f"), ("difference", "margin", "6.3f"), ("lr", "lr", "7.1e"),
    ("grad_norm", "gnorm", "6.3f"), ("epoch", "epoch", "5.2f"), ("tokens_per_s", "tok/s", "7.0f"),
    ("mfu", "mfu", "5.3f"), ("step_s", "s", "5.1f"), ("eval_loss", "eval", "7.4f"),
    ("eval_accuracy", "eval acc", "5.3f"),
]  # fmt: skip
PAIR_COLUMNS = {"accuracy", "difference", "eval_accuracy"}  # of --objective preference
NOT_TRAIN = "to problems that are not for training (sample.py --split): evaluations meet them"


@dataclass
class Progress:
    """What a resumed run needs besides weights and moments; a checkpoint's state.json."""

    step: int = 0
    lr: float | None = None  # of the last update
    wall_s: float = 0.0
    before: dict | None = None


@dataclass(frozen=True)
class Objective:
    """What is read from a file, which model learns from it, and how; an item is an example or a pair."""

    read: Callable  # (path, tokenizer, max_tokens, **how) -> (items, what they are and what was left out)
    load: Callable  # (folder, dtype, device) -> model
    learn: Callable  # (workers, items, tokens_per_batch, loss_scale) -> metrics; adds the mean loss's gradient
    measure: Callable  # the same without a gradient


@dataclass
class Run:
    """Everything a run holds."""

    config: Config
    objective: Objective
    workers: Workers  # the model, on one CPU thread or more
    tokenizer: Tokenizer
    optimizer: MasterAdamW
    sources: list[sft.Source]
    held_out: list
    n_steps: int
    tokens_per_batch: int
    progress: Progress
    log: RunLog
    interrupt: Interrupt
    peak_flops: float  # FLOP/s of matrix products on this device
    start_s: float  # less what earlier parts of the run took


@user_errors()
def main() -> None:
    start_s = time.monotonic()
    config, checkpoint = read_command_line()
    if config.threads:
        torch.set_num_threads(config.threads)
    tensors, state = load_checkpoint(checkpoint) if checkpoint else ({}, {})
    progress = Progress(**state)
    columns = [column for column in COLUMNS if config.objective == "preference" or column[0] not in PAIR_COLUMNS]
    files = [path for path, _ in sft.parse_data(config.data)] + [config.eval_data]
    with open_log(config, checkpoint, progress.step, config.objective, columns, files) as log:
        run = set_up(config, checkpoint, tensors, progress, log, start_s - progress.wall_s)
        del tensors  # twice the model's size
        if checkpoint and is_finished(config.resume, progress.step, run.n_steps):
            log.say(f"{config.resume} is finished, {progress.step} steps; to train on, give more --epochs or --steps")
            return
        say_lr_jump(log, config, progress.step, run.n_steps, progress.lr)
        if progress.before is None and run.held_out:
            evaluate_before(run)
        train(run)
        if run.interrupt.is_asked:
            log.say(f"stopped after step {progress.step}; continue with: python train_sft.py --resume {log.folder}")
        else:
            finish(run)


def train(run: Run) -> None:
    """The steps: take examples, follow the gradient of their loss, and do what is due after each."""
    config, progress, guard = run.config, run.progress, NonFiniteGuard()
    while progress.step < run.n_steps and not run.interrupt.is_asked:
        step_start_s = time.monotonic()
        items = sft.sample_examples(run.sources, config.examples, config.seed, progress.step)
        metrics = run.objective.learn(run.workers, items, run.tokens_per_batch, loss_scale=run.optimizer.loss_scale)
        metrics |= update(run.optimizer, guard, config, progress.step, run.n_steps)
        progress.step, progress.lr = progress.step + 1, metrics["lr"]

        metrics |= throughput(run, metrics, time.monotonic() - step_start_s)
        if run.held_out and is_due(config.eval_every, progress.step) and progress.step < run.n_steps:
            metrics |= eval_metrics(evaluate(run))
        run.log.metrics(progress.step, metrics)
        run.log.line(progress.step, metrics)
        progress.wall_s = time.monotonic() - run.start_s
        is_last = progress.step == run.n_steps or run.interrupt.is_asked
        if is_last or is_due(config.save_every, progress.step):
            save_run(
                run.log.folder, run.workers.model, run.tokenizer, run.optimizer, progress, keep_last=config.keep_last
            )


def throughput(run: Run, metrics: dict, step_s: float) -> dict:
    per_epoch = sft.examples_per_epoch(run.sources)
    return {
        "step_s": step_s,
        "epoch": run.progress.step * run.config.examples / per_epoch,
        "tokens_per_s": metrics["tokens"] / step_s,
        "mfu": metrics.pop("flops") / step_s / run.peak_flops,
        "peak_memory_gib": peak_memory_gib(),
    }


# ---- the objectives


def make_objective(config: Config, tokenizer: Tokenizer, is_fresh: bool) -> Objective:
    """What the three objectives differ in; `is_fresh`: start from fresh weights."""
    chats = dict(template_arguments=read_arguments(config, tokenizer), system=config.system)
    if config.objective == "preference":
        read, load = partial(read_pairs, **chats), preference.RewardModel.from_pretrained
        return Objective(read, load, partial(learn_pairs, config.centring), measure_pairs)
    load = partial(Transformer.from_scratch, seed=config.seed) if is_fresh else Transformer.from_pretrained
    read = read_text if config.objective == "text" else partial(read_answers, **chats)
    sizes = dict(vocab_size=tokenizer.vocab_size)
    return Objective(read, load, partial(learn_examples, **sizes), partial(measure_examples, **sizes))


def read_answers(path: str, tokenizer: Tokenizer, max_tokens: int, **how) -> tuple[list[sft.Example], str]:
    found = sft.read_examples(path, tokenizer, max_tokens, **how)
    n_targets = sum(sum(example.is_target) for example in found.examples)
    return found.examples, counted(
        (len(found.examples), "examples"),
        (n_targets, "tokens to learn"),
        (found.n_too_long, f"longer than {max_tokens} tokens left out"),
        (found.n_rewritten, "earlier answers without a loss, as the chat template rewrites them"),
        (found.n_beside, "with thinking beside their messages, which is not learned: put it into the assistant's"),
        (found.n_not_train, NOT_TRAIN),
    )


def read_text(path: str, tokenizer: Tokenizer, max_tokens: int) -> tuple[list[sft.Example], str]:
    found = sft.read_text(path, tokenizer, max_tokens)
    return found.examples, counted(
        (len(found.examples), "examples"),
        (sum(len(example.ids) for example in found.examples), "tokens"),
        (found.n_cut, f"documents cut into pieces of {max_tokens} tokens"),
    )


def read_pairs(path: str, tokenizer: Tokenizer, max_tokens: int, **how) -> tuple[list[preference.Pair], str]:
    found = preference.read_pairs(path, tokenizer, max_tokens, **how)
    return found.pairs, counted(
        (len(found.pairs), "pairs"),
        (found.n_too_long, f"longer than {max_tokens} tokens left out"),
        (found.n_equal, "left out whose two final answers are the same"),
        (found.n_not_train, NOT_TRAIN),
    )


def counted(*counts: tuple[int, str]) -> str:
    """What there is how many of, less what there is none of."""
    return ", ".join(f"{n:,} {what}" for n, what in counts if n)


def learn_examples(
    workers: Workers, examples: list[sft.Example], tokens_per_batch: int, vocab_size: int, loss_scale: float
) -> dict:
    loss = sft.add_gradient(workers, examples, tokens_per_batch, vocab_size, loss_scale)
    lengths = [len(example.ids) - 1 for example in examples]
    n_targets = sum(sum(example.is_target) for example in examples)
    flops = workers.model.training_flops(sum(lengths), sum(n * (n + 1) // 2 for n in lengths), n_targets)
    return {"loss": loss, "tokens": sum(lengths), "flops": flops}


def measure_examples(workers: Workers, examples: list[sft.Example], tokens_per_batch: int, vocab_size: int) -> dict:
    return {"loss": sft.mean_loss(workers, examples, tokens_per_batch, vocab_size), "n": len(examples)}


def learn_pairs(
    centring: float, workers: Workers, pairs: list[preference.Pair], tokens_per_batch: int, loss_scale: float
) -> dict:
    terms = preference.add_gradient(workers, pairs, tokens_per_batch, centring, loss_scale)
    return pair_metrics(terms) | {"tokens": terms.n_tokens, "flops": terms.flops}


def measure_pairs(workers: Workers, pairs: list[preference.Pair], tokens_per_batch: int) -> dict:
    terms = preference.evaluate_pairs(workers, pairs, tokens_per_batch)
    low, high = wilson_interval(terms.n_right, terms.n)
    return pair_metrics(terms) | {"accuracy_low": low, "accuracy_high": high, "n": terms.n}


def pair_metrics(terms: preference.PairTerms) -> dict:
    return {"loss": terms.loss, "accuracy": terms.accuracy, "difference": terms.difference, "score": terms.score}


# ---- start and end


def read_command_line() -> tuple[Config, Path | None]:
    """The configuration, and with --resume the checkpoint to go on from. Flags beat the resumed run's own arguments."""
    config, given = parse_args(Config, description=__doc__)
    if config.resume:
        config, checkpoint = resumed(config, given)
        refuse_idle(config, given)
        return config, checkpoint
    if config.model is None or config.data is None:
        raise ValueError("--model and --data are needed: what to train, and on which files")
    if find_miniature(config.model):
        config = apply_preset(config, given, MINIATURE_RUN)
    refuse_idle(validated(config), given)
    return config, None


def set_up(
    config: Config, checkpoint: Path | None, tensors: dict, progress: Progress, log: RunLog, start_s: float
) -> Run:
    folder = checkpoint or find_model(config.model, config.seed, log)
    log.say(f"model: {folder}")
    tokenizer = Tokenizer.from_pretrained(folder)
    is_fresh = config.from_scratch and not checkpoint
    objective = make_objective(config, tokenizer, is_fresh)
    config = replace(config, max_tokens=longest_example(config.max_tokens, folder))
    sources, held_out = read_sources(config, objective, tokenizer, log)
    examples = (item for items, _ in sources for item in items)
    if config.objective == "sft" and any(example.ids[-1] == tokenizer.turn_end_id for example in examples):
        tokenizer = tokenizer.with_stop(tokenizer.turn_end_id)  # a base model that learns chats is none after it
    device, dtype = choose_machine(config, checkpoint, folder, log)
    optimizer, workers = prepare(objective.load(folder, dtype=dtype, device=device), config, tensors, device)
    per_epoch = sft.examples_per_epoch(sources)
    n_steps = config.steps or math.ceil(config.epochs * per_epoch / config.examples)
    log.say(f"{per_epoch} {'pairs' if config.objective == 'preference' else 'examples'} an epoch, {n_steps} steps")
    return Run(
        config=config,
        objective=objective,
        workers=workers,
        tokenizer=tokenizer,
        optimizer=optimizer,
        sources=sources,
        held_out=held_out,
        n_steps=n_steps,
        tokens_per_batch=default_tokens_per_batch(config.tokens_per_batch, device),
        progress=progress,
        log=log,
        interrupt=Interrupt(),
        peak_flops=peak_flops(device, dtype, log.say),
        start_s=start_s,
    )


def read_sources(config: Config, objective: Objective, tokenizer: Tokenizer, log: RunLog) -> tuple[list, list]:
    """The files to train on with their weights, and the held-out items; says what was read and what left out."""
    sources, held_out, key = [], [], key_of(config.objective)
    if config.eval_data:
        held_out, note = objective.read(config.eval_data, tokenizer, config.max_tokens)
        log.say(f"held out: {config.eval_data}: {note}")
    keys = {str(key(item)) for item in held_out}
    for path, weight in sft.parse_data(config.data):
        items, note = objective.read(path, tokenizer, config.max_tokens)
        log.say(f"data: {path}: {note}" + (f"; weight {weight:g}" if weight != 1 else ""))
        if config.eval_data:
            n_read, items = len(items), [item for item in items if str(key(item)) not in keys]
            if n_read > len(items):
                log.say(f"data: {path}: {n_read - len(items)} left out, whose questions are in {config.eval_data}")
        else:
            items, out = sft.split(items, config.held_out, key)
            held_out += out
        if not items:
            raise ValueError(f"{path}: all of it is held out; lower --held-out, or give another --eval-data")
        sources.append((items, weight))
    n = min(len(held_out), config.eval_examples)
    log.say(f"held out: {n} of {len(held_out)}" if n else "nothing is held out: no evaluation")
    return sources, random.Random("held out").sample(held_out, n)  # of all files, for every seed the same


def key_of(objective: str) -> Callable:
    """Items of one key are held out together, or not at all: all answers to a question."""
    return (lambda pair: pair.question or pair.prompt_ids) if objective == "preference" else sft.question


def evaluate(run: Run) -> dict:
    return run.objective.measure(run.workers, run.held_out, run.tokens_per_batch)


def evaluate_before(run: Run) -> None:
    """The starting model's evaluation, kept for the end."""
    run.progress.before = evaluate(run)
    run.log.metrics(0, eval_metrics(run.progress.before))
    run.log.say(f"before: {describe(run.progress.before)}\n")


def describe(measured: dict) -> str:
    text = f"held-out loss {measured['loss']:.4f} (n={measured['n']})"
    if "accuracy" in measured:
        text += f", accuracy {measured['accuracy']:.3f} (95%: {measured['accuracy_low']:.3f} to "
        text += f"{measured['accuracy_high']:.3f}), mean difference of scores {measured['difference']:.3f}"
    return text


def finish(run: Run) -> None:
    """Evaluate the trained model; say and write what the run came to."""
    progress, log = run.progress, run.log
    after = evaluate(run) if run.held_out else None
    progress.wall_s = time.monotonic() - run.start_s
    times = dict(wall_s=progress.wall_s, steps=progress.step, seed=run.config.seed)
    if after:
        log.metrics(progress.step, eval_metrics(after))
    log.summary({"before": progress.before, "after": after} | times)
    if after:
        log.say(f"\nbefore: {describe(progress.before)}\nafter:  {describe(after)}")
    log.say(f"{progress.step} steps, {progress.wall_s:.0f} s in all; run folder: {log.folder}")
    use = "train_zero.py --rewards accuracy=1,format=0.1,preference=0.5 --reward-model"
    log.say(f"next: python {use if run.config.objective == 'preference' else 'sample.py --model'} {log.folder} ...")


if __name__ == "__main__":
    main()
