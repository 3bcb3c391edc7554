"""Pure reinforcement learning on a base model, with rule-based rewards only: R1-Zero (DeepSeek-R1, 2501.12948).

    python train_zero.py                                       a miniature, from nothing, on a laptop
    python train_zero.py --model FOLDER --task gsm8k --data gsm8k_train.jsonl --eval-data gsm8k_test.jsonl

Each step: sample G completions for each of P problems (act), reward them by rules (judge), and follow the gradient of
the group-relative policy loss (learn). Who acts and judges is in nanor1/judge.py, the rewards in nanor1/rewards.py, the
formulas in nanor1/grpo.py, and what keeps house around the loop in nanor1/training.py.
"""

import math
import random
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Literal

import nanor1.run.openmp  # noqa: F401  # isort: skip  (before torch)

from nanor1.evaluation.exam import Exam, ExamOptions, shorten
from nanor1.grpo import LossSettings, Rollout, add_gradient, describe, mean, step_metrics
from nanor1.judge import Actor, act_and_judge, choose, make_rules
from nanor1.miniature import MINIATURES, NAMESPACE, find_miniature
from nanor1.model import Transformer
from nanor1.options import TaskOptions, as_miniature_run, load_task, own_rewards, report_failures
from nanor1.rewards import NAMES, overlong_penalty, parse_rewards
from nanor1.run.checkpoint import model_folder
from nanor1.run.config import MANY, apply_preset, option, user_errors
from nanor1.run.log import RunLog
from nanor1.run.machine import peak_flops
from nanor1.run.start import open_log, read_command_line
from nanor1.sampler import Sampler
from nanor1.stages.reward_model import load_reward_model, to_preference
from nanor1.tasks.problems import TASKS, parse_object
from nanor1.tasks.prompts import PromptOptions, choose_template, make_prompter
from nanor1.training import Run, RunConfig, is_due

HAS_KL = ("--kl-coef above 0", lambda config: config.kl_coef > 0)
IS_REUSED = ("--minibatches 2 or more", lambda config: config.minibatches > 1)
SAMPLES_DURING = (
    "--eval-every and --eval-temperature above 0",
    lambda config: config.eval_every > 0 and (config.eval_temperature > 0 or config.eval_samples_during == 1),
)


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig, ExamOptions, TaskOptions, PromptOptions):
    model: str | None = option(
        None, "model or run folder, or miniature/NAME, which is pretrained first; none: miniature/TASK", "what to train"
    )
    task: Literal[TASKS] = option("countdown", "the problems")
    preset: Literal["deepseek"] | None = option(None, "published settings: deepseek (R1's first RL stage)")

    steps: int = option(200, "training steps", "a step", least=0)
    problems: int = option(16, "problems a step (P)", least=1, most=MANY)
    completions: int = option(
        8, "completions a problem (G)", least=2, most=MANY, why=" (a group of 1 has no advantage)"
    )
    temperature: float = option(1.0, "of sampling, and of the trainer's log-probabilities", above=0)
    resample: int = option(
        0, "at most this many rounds of further problems for groups of equal accuracy (or reward, without it)", least=0
    )

    rewards: str = option(
        "accuracy=1,format=0.1",
        "NAME=WEIGHT,... of accuracy, format (a cost: weight * (format - 1)), language, preference, random, and the "
        "functions of --reward-file",
        "reward",
    )
    reward_model: str | None = option(None, "folder by train_sft.py --objective preference, for preference=WEIGHT")
    overlong: Literal["none", "mask", "penalty"] = option("none", "cut-off completions: no loss, or DAPO's penalty")
    overlong_buffer: int = option(
        64,
        "tokens before the limit in which the penalty grows",
        least=1,
        needs=("--overlong penalty", lambda config: config.overlong == "penalty"),
    )

    advantage: Literal["mean", "std"] = option("mean", "reward - group mean; std: also / deviation", "loss")
    aggregate: Literal["token", "sequence", "constant"] = option("token", "mean over tokens; see nanor1/grpo.py")
    minibatches: int = option(1, "optimizer updates a step; fewer where few groups teach something", least=1)
    clip_low: float = option(0.2, "lower clip of the ratio", least=0, needs=IS_REUSED)
    clip_high: float = option(0.28, "upper clip", least=0, needs=IS_REUSED)
    kl_coef: float = option(0.0, "weight of the KL divergence to the reference; 0: no reference is kept", least=0)
    kl: Literal["k2", "k3", "reward"] = option(
        "k2", "as a loss by k2 or (DeepSeek, biased) k3, or k1 in the reward", needs=HAS_KL
    )
    reference_every: int = option(
        0, "renew the reference every so many steps; 0: it stays the start", least=0, needs=HAS_KL
    )
    importance_cap: float = option(
        0.0, "cap of the sampler-trainer importance weight (about 2); 0: off", least=0, most=1e6
    )

    lr: float = option(1e-6, "peak learning rate", "optimizer", least=0, most=1)
    decay: Literal["constant", "linear", "cosine"] = option("constant", "after warm-up, to a tenth of the peak")

    eval_every: int = option(
        20, "evaluate every so many steps; 0: only before and after", "evaluation and saving", least=0
    )
    eval_samples_during: int = option(
        1, "samples a problem in evaluations during the run", "during the run", least=1, most=MANY, needs=SAMPLES_DURING
    )
    save_every: int = option(20, "checkpoint every so many steps; 0: only at the end", least=0)
    log_rollouts: int = option(
        4, "completions a step that rollouts.jsonl keeps, one of each group first; 0: none", least=0
    )

    def validate(self) -> None:
        super().validate()
        parse_object(self.template_args, "--template-args")
        if self.overlong == "penalty":
            overlong_penalty(0, self.max_new_tokens, self.overlong_buffer)
        if self.importance_cap and self.minibatches > 1:
            raise ValueError("--importance-cap needs --minibatches 1: with several the ratio is to the sampler already")
        if not any(self.weights.values()):
            raise ValueError(f"--rewards {self.rewards} weighs nothing, so nothing would be learned; give a weight")
        if ("preference" in self.weights) != bool(self.reward_model):
            raise ValueError("--rewards preference=WEIGHT and --reward-model FOLDER need each other; give both or none")

    @property
    def weights(self) -> dict[str, float]:
        """Of the parts of the reward."""
        return parse_rewards(self.rewards, (*NAMES, *own_rewards(self)))

    @property
    def has_kl_loss(self) -> bool:
        return self.kl_coef > 0 and self.kl != "reward"


PRESETS = {
    # DeepSeek-R1 (2501.12948), the first RL stage: a rollout is 512 questions x 16, cut into 16 minibatches of 512
    # answers, which the paper's training steps are; the reference is renewed every 400 of these. The language reward is
    # added to accuracy and format. Left out: its length limit of 32,768 tokens.
    "deepseek": dict(
        problems=512, completions=16, minibatches=16, reference_every=25, lr=3e-6, kl_coef=0.001, kl="k3",
        clip_low=10.0, clip_high=10.0, advantage="std", aggregate="sequence", temperature=1.0, warmup=0,
        rewards="accuracy=1,format=1,language=1",
    )
}  # fmt: skip
COLUMNS = [
    ("reward", "reward", "6.3f"), ("accuracy", "acc", "5.3f"), ("format", "format", "5.3f"),
    ("response_tokens", "tokens", "6.1f"), ("truncated", "cut", "5.3f"), ("dropped_groups", "drop", "4d"),
    ("entropy", "entropy", "6.3f"), ("grad_norm", "gnorm", "6.3f"), ("logp_gap_mean", "gap", "7.1e"),
    ("rollout_tokens_per_s", "tok/s", "7.0f"), ("step_s", "s", "5.1f"), ("eval_accuracy", "eval", "5.3f"),
]  # fmt: skip

MINIATURE_RUN = dict(  # on the CPU, where one step is short: a GPU would wait for its launches
    problems=32, completions=16, minibatches=2, warmup=3, decay="linear", tokens_per_batch=4096, eval_problems=500,
    eval_samples=16, eval_samples_during=1, eval_temperature=1.0, eval_every=20, template="bare", device="cpu",
    dtype="float32",
)  # fmt: skip
MINIATURE_RUNS = {
    "countdown": MINIATURE_RUN | dict(steps=40, max_new_tokens=224, lr=5e-4),
    "arithmetic": MINIATURE_RUN | dict(steps=70, max_new_tokens=48, lr=7e-4),
}
MINIATURE_NEXT = """what to try next:
  python train_zero.py --seed 1                      another base, another run
  python train_zero.py --task {other:<23}the other miniature: by trial (countdown), step by step (arithmetic)
  python train_zero.py --rewards accuracy=1          no reward for the format
  python sample.py --model {folder}/checkpoints/step_{step:06d} --raw "{prompt}"
and read {folder}/rollouts.jsonl: the answers, step by step"""


@user_errors()
def main() -> None:
    config, checkpoint = read_command_line(Config, complete, __doc__)
    files = (config.data, config.eval_data, config.few_shot, config.reward_file)
    with open_log(config, checkpoint, f"zero-{config.task}", COLUMNS, files) as log:
        run = Run(config, checkpoint, log)
        actor = set_up(run)
        peak = peak_flops(run.device, run.dtype, log.say)
        exam = Exam(run, actor, actor.task.part("held-out", config.eval_problems))
        exam.before()
        evaluate = partial(exam.during, config.eval_samples_during, keeps_best=True)
        for step in run.steps():
            rollouts_PG, advantages_PG = act_and_judge(actor, run.reference, run.progress.n_drawn)
            rollout_s = run.step_s
            run.progress.n_drawn += len(rollouts_PG)
            report_what_failed(log, actor, rollouts_PG)

            learned = learn(run, actor, rollouts_PG, advantages_PG, step)
            run.warn_of_gap(learned, ", or --importance-cap 2")
            if run.reference and is_due(config.reference_every, step + 1):
                run.reference.load_state_dict(run.model.state_dict())

            metrics = describe(rollouts_PG, advantages_PG) | learned
            metrics |= throughput(rollouts_PG, rollout_s, learned, peak)
            run.record(metrics, rollout_rows(rollouts_PG, config.log_rollouts), evaluate)
        if not run.is_stopped():
            exam.after()
            if config.model.startswith(NAMESPACE):
                other = "countdown" if config.task == "arithmetic" else "arithmetic"
                prompt, step = exam.problems[0].prompt, run.progress.step
                log.say(MINIATURE_NEXT.format(folder=log.folder, step=step, other=other, prompt=prompt))


# ---- start


def complete(config: Config, given: frozenset[str]) -> Config:
    """A new run's configuration, with a miniature's settings and the preset's."""
    if config.model is None:
        if config.task not in MINIATURES:
            raise ValueError(f"the task {config.task!r} needs a pretrained model: give --model FOLDER")
        config = replace(config, model=NAMESPACE + config.task)
    if miniature := find_miniature(config.model):
        config = as_miniature_run(config, given, miniature, MINIATURE_RUNS[miniature.task])
    return apply_preset(config, given, PRESETS[config.preset]) if config.preset else config


def set_up(run: Run) -> Actor:
    """Load the problems, the reward model and the model that learns, and who answers and judges with them."""
    config, log = run.config, run.log
    if run.progress.n_drawn is None:  # of a new run, or one begun before it was kept
        run.progress.n_drawn = run.progress.step * config.problems
    template, why = choose_template(config.template, run.tokenizer, "r1-zero")
    log.say(f"template: {template} ({why})")
    task = load_task(config, config.task, run.tokenizer, ("train", "held-out"))
    log.say(f"to train on: {task.describe('train')}\nto evaluate on: {task.describe('held-out')}")
    prompter = make_prompter(config, run.tokenizer, template, config.task)
    preference = None
    if config.reward_model:
        log.say(f"reward model: {model_folder(config.reward_model)}")
        scorer = load_reward_model(config.reward_model, run.tokenizer, run.dtype, run.device)
        preference = to_preference(scorer, run.tokenizer, run.tokens_per_batch)
    rules = make_rules(prompter, weights=config.weights, own=own_rewards(config), preference=preference)
    model = Transformer.from_pretrained(run.folder, run.dtype, run.device)
    run.prepare(model, prompter.tokenizer, config.steps, has_reference=config.kl_coef > 0)
    sampler = Sampler(model, config.max_rows, memory_share=0.5)  # the other half is for learning
    return Actor(sampler, prompter, rules, task, config, run.tokens_per_batch)


# ---- learn


def learn(run: Run, actor: Actor, rollouts_PG, advantages_PG, step: int) -> dict:
    """The step's optimizer updates over the completions that teach something; returns its metrics.

    An update stands for P * G / minibatches completions, of the mean length of all that were sampled: these its divisor
    counts, whichever of them are learned from. So a completion weighs the same whether or not other groups teach
    nothing, and few groups make few updates of about that size, not many small ones.
    """
    config, start_s = actor.config, time.monotonic()
    chosen = choose(actor, rollouts_PG, advantages_PG)
    order = list(range(len(chosen)))
    random.Random(f"{config.seed} {step}").shuffle(order)
    updates, settings = [], loss_settings(actor, rollouts_PG)
    n_updates = math.ceil(len(chosen) * config.minibatches / (config.problems * config.completions))
    n_updates = min(n_updates, len(chosen))
    for i in range(n_updates):
        share = sorted(order[i::n_updates])  # those of one prompt lie side by side and share it
        rollouts, advantages = map(list, zip(*(chosen[j] for j in share), strict=True))
        scaled = replace(settings, loss_scale=run.optimizer.loss_scale)
        updates.append(add_gradient(run.workers, run.reference, rollouts, advantages, scaled))
        run.update()
    learn_s, metrics = time.monotonic() - start_s, step_metrics(updates)
    n_made = sum(map(math.isfinite, run.grad_norms))
    return metrics | {
        "updates": n_made,
        "skipped_updates": n_updates - n_made,
        "learn_s": learn_s,
        "learn_flops_per_s": metrics.pop("learn_flops") / learn_s,
    }


def loss_settings(actor: Actor, rollouts_PG: list[list[Rollout]]) -> LossSettings:
    config = actor.config
    return LossSettings(
        temperature=config.temperature,
        vocab_size=actor.prompter.tokenizer.vocab_size,
        tokens_per_batch=actor.tokens_per_batch,
        aggregate=config.aggregate,
        constant_length=config.max_new_tokens,
        n_sequences=config.problems * config.completions / config.minibatches,
        mean_length=mean(len(rollout.completion.ids) for group in rollouts_PG for rollout in group),
        is_batch_reused=config.minibatches > 1,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        importance_cap=config.importance_cap,
        kl_coef=config.kl_coef if config.has_kl_loss else 0.0,
        kl=config.kl if config.has_kl_loss else "k2",
    )


# ---- what is logged


def throughput(rollouts_PG: list[list[Rollout]], rollout_s: float, learned: dict, peak_flops: float) -> dict:
    n_tokens = sum(len(rollout.completion.ids) for group in rollouts_PG for rollout in group)
    return {
        "rollout_s": rollout_s,
        "rollout_tokens_per_s": n_tokens / rollout_s,
        "learn_tokens_per_s": learned["learned_tokens"] / learned["learn_s"],
        "mfu": learned["learn_flops_per_s"] / peak_flops,
    }


def report_what_failed(log: RunLog, actor: Actor, rollouts_PG: list[list[Rollout]]) -> None:
    """Show the run's first completion that could not be judged; how many there are is in metrics.jsonl."""
    for rollout in (rollout for group in rollouts_PG for rollout in group if rollout.reward is None):
        shown = f"  problem: {shorten(rollout.problem.prompt)}\n  response: {shorten(rollout.text)}"
        log.say_once("unjudged", f"could not be judged, left out (first case): {rollout.parts}\n{shown}")
    report_failures(actor.rules.own, log.say_once)


def rollout_rows(rollouts_PG: list[list[Rollout]], n: int) -> list[dict]:
    """`n` completions: the first of each group, then the second of each, and so on."""
    flat = ((g, p, group[g]) for g in range(len(rollouts_PG[0])) for p, group in enumerate(rollouts_PG))
    return [
        {
            "group": p,
            "index": g,
            "prompt": rollout.problem.prompt,
            "gold": rollout.problem.answer,
            "text": rollout.text,
            "finish": rollout.completion.finish,
            "tokens": len(rollout.completion.ids),
            "reward": rollout.reward,
            "parts": rollout.parts,
        }
        for g, p, rollout in islice(flat, n)
    ]


if __name__ == "__main__":
    main()
