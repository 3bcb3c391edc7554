"""Supervised training from files: fine-tuning on answers, language modelling on text, or a preference reward model.

    python train_sft.py --model FOLDER --data traces.jsonl                        fine-tuning: loss on the answers alone
    python train_sft.py --model FOLDER --data traces.jsonl:3,general.jsonl        several files, with weights
    python train_sft.py --model FOLDER --data corpus.txt --objective text         loss on every token
    python train_sft.py --model FOLDER --data pairs.jsonl --objective preference  a reward model

In DeepSeek-R1 (2501.12948, section 2.3) fine-tuning is the cold start, and later the stage between the two stages of
reinforcement learning; a preference reward model takes part in the last one. Each step: take some examples, follow the
gradient of their loss. How a loss is made of them: nanor1/gradient.py, nanor1/stages/reward_model.py; what is read from
files: nanor1/stages/sources.py; what keeps house around the loop: nanor1/training.py.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import nanor1.run.openmp  # noqa: F401  # isort: skip  (before torch)

from nanor1 import gradient
from nanor1.evaluation.accuracy import wilson_interval
from nanor1.miniature import find_miniature
from nanor1.model import Transformer
from nanor1.run.config import MANY, apply_preset, option, user_errors
from nanor1.run.machine import peak_flops
from nanor1.run.start import open_log, read_command_line
from nanor1.stages import reward_model, sft
from nanor1.stages.sources import read_sources
from nanor1.tasks.problems import HELD_OUT_SHARE, parse_object
from nanor1.tasks.prompts import ChatOptions
from nanor1.training import Run, RunConfig


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig, ChatOptions):
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

    eval_examples: int = option(500, "held-out examples, at most", "evaluation", least=1)

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


@user_errors()
def main() -> None:
    config, checkpoint = read_command_line(Config, complete, __doc__)
    columns = [column for column in COLUMNS if config.objective == "preference" or column[0] not in PAIR_COLUMNS]
    files = [path for path, _ in sft.parse_data(config.data)] + [config.eval_data]
    with open_log(config, checkpoint, config.objective, columns, files) as log:
        run = Run(config, checkpoint, log)
        sources, held_out = set_up(run)
        per_epoch, peak = sft.examples_per_epoch(sources), peak_flops(run.device, run.dtype, log.say)
        evaluate = partial(measure, run, held_out) if held_out else None
        if evaluate and run.progress.before is None:
            before = evaluate()
            run.begin(before, describe(before))
        for step in run.steps():
            metrics = learn(run, sft.sample_examples(sources, config.examples, config.seed, step))
            run.update()
            metrics["tokens_per_s"] = metrics["tokens"] / run.step_s
            metrics["mfu"] = metrics.pop("flops") / run.step_s / peak
            run.record(metrics | {"epoch": (step + 1) * config.examples / per_epoch}, evaluate=evaluate)
        if not run.is_stopped():
            finish(run, evaluate and evaluate())


def learn(run: Run, items: list) -> dict:
    """Add the gradient of an update over examples or pairs; returns its loss and what it took."""
    if run.config.objective == "preference":
        terms = reward_model.add_gradient(
            run.workers, items, run.tokens_per_batch, run.config.centring, run.optimizer.loss_scale
        )
        return pair_metrics(terms) | {"tokens": terms.n_tokens, "flops": terms.flops}
    loss = gradient.add_gradient(
        run.workers, items, run.tokens_per_batch, run.tokenizer.vocab_size, run.optimizer.loss_scale
    )
    lengths, n_targets = [len(example.ids) - 1 for example in items], sum(sum(example.is_target) for example in items)
    flops = run.model.training_flops(sum(lengths), sum(n * (n + 1) // 2 for n in lengths), n_targets)
    return {"loss": loss, "tokens": sum(lengths), "flops": flops}


def measure(run: Run, items: list) -> dict:
    """The same figures of held-out examples or pairs, without a gradient."""
    if run.config.objective == "preference":
        terms = reward_model.add_gradient(run.workers, items, run.tokens_per_batch, learns=False)
        low, high = wilson_interval(terms.n_right, terms.n)
        return pair_metrics(terms) | {"accuracy_low": low, "accuracy_high": high, "n": terms.n}
    loss = gradient.add_gradient(run.workers, items, run.tokens_per_batch, run.tokenizer.vocab_size, learns=False)
    return {"loss": loss, "n": len(items)}


def pair_metrics(terms: reward_model.PairTerms) -> dict:
    return {"loss": terms.loss, "accuracy": terms.accuracy, "difference": terms.difference, "score": terms.score}


# ---- start and end


def complete(config: Config, given: frozenset[str]) -> Config:
    """A new run's configuration, with a miniature's settings."""
    if config.model is None or config.data is None:
        raise ValueError("--model and --data are needed: what to train, and on which files")
    return apply_preset(config, given, MINIATURE_RUN) if find_miniature(config.model) else config


def set_up(run: Run) -> tuple[list[sft.Source], list]:
    """Read the files and load the model; returns the sources to train on and the held-out items."""
    config, tokenizer = run.config, run.tokenizer
    sources, held_out = read_sources(config, tokenizer, min(config.max_tokens, run.context), run.log.say)
    examples = (item for items, _ in sources for item in items)
    if config.objective == "sft" and any(example.ids[-1] == tokenizer.turn_end_id for example in examples):
        tokenizer = tokenizer.with_stop(tokenizer.turn_end_id)  # a base model that learns chats is none after it
    per_epoch, is_fresh = sft.examples_per_epoch(sources), config.from_scratch and not run.checkpoint
    n_steps = config.steps or math.ceil(config.epochs * per_epoch / config.examples)
    what = "pairs" if config.objective == "preference" else "examples"
    run.log.say(f"{per_epoch} {what} an epoch, {n_steps} steps")
    load = partial(Transformer.from_scratch, seed=config.seed) if is_fresh else Transformer.from_pretrained
    load = reward_model.RewardModel.from_pretrained if config.objective == "preference" else load
    run.prepare(load(run.folder, dtype=run.dtype, device=run.device), tokenizer, n_steps)
    return sources, held_out


def describe(measured: dict) -> str:
    text = f"held-out loss {measured['loss']:.4f} (n={measured['n']})"
    if "accuracy" in measured:
        text += f", accuracy {measured['accuracy']:.3f} (95%: {measured['accuracy_low']:.3f} to "
        text += f"{measured['accuracy_high']:.3f}), mean difference of scores {measured['difference']:.3f}"
    return text


def finish(run: Run, after: dict | None) -> None:
    """Say and write what the run came to."""
    said = [f"\nbefore: {describe(run.progress.before)}\nafter:  {describe(after)}"] if after else []
    run.finish(after, said)
    use = "train_zero.py --rewards accuracy=1,format=0.1,preference=0.5 --reward-model"
    use = use if run.config.objective == "preference" else "sample.py --model"
    run.log.say(f"next: python {use} {run.log.folder} ...")


if __name__ == "__main__":
    main()
