"""Pure reinforcement learning on a base model, with rule-based rewards only: R1-Zero (DeepSeek-R1, 2501.12948).

    python train_zero.py                                       a miniature, from nothing, on a laptop
    python train_zero.py --model FOLDER --task gsm8k --data gsm8k_train.jsonl --eval-data gsm8k_test.jsonl

Each step: sample G completions for each of P problems (act), reward them by rules (judge), and follow the gradient of
the group-relative policy loss (learn). The formulas are in nanor1/grpo.py, the rewards in nanor1/rewards.py.
"""

import copy
import math
import random
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import nanor1.openmp  # noqa: F401  # isort: skip  (before torch)

import torch

from nanor1.checkpoint import load_checkpoint, model_folder
from nanor1.config import MANY, apply_preset, option, parse_args, refuse_idle, user_errors, validated
from nanor1.evaluate import Evaluation, Preference, Rules, evaluate, judge_all, make_rules, problem_accuracies
from nanor1.grpo import (
    LossSettings,
    Rollout,
    add_gradient,
    completion_logprobs,
    describe,
    group_advantages,
    kl_estimate,
    mean,
    step_metrics,
    to_items,
)
from nanor1.machine import Interrupt, peak_flops, peak_memory_gib
from nanor1.miniature import MINIATURES, NAMESPACE, find_miniature, find_model
from nanor1.model import Transformer
from nanor1.optim import MasterAdamW, NonFiniteGuard, learning_rate
from nanor1.packing import pack
from nanor1.paired import change_line, paired_change
from nanor1.parallel import Workers
from nanor1.prompts import Prompter, PromptOptions, choose_template, make_prompter
from nanor1.rewards import NAMES, overlong_penalty, parse_rewards
from nanor1.runlog import RunLog
from nanor1.sampler import Sampler
from nanor1.tasks import TASKS, Problem, Task, parse_object
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
    load_reward_model,
    load_task,
    open_log,
    own_rewards,
    prepare,
    report_failures,
    resumed,
    save_run,
    say_lr_jump,
    scale_metric,
    to_preference,
    warn_of_gap,
)


def has_kl(config: "Config") -> bool:
    return config.kl_coef > 0


def is_reused(config: "Config") -> bool:
    return config.minibatches > 1


def evaluates_samples_during(config: "Config") -> bool:
    return config.eval_every > 0 and (config.eval_temperature > 0 or config.eval_samples_during == 1)


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions, TaskOptions, PromptOptions):
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
    max_new_tokens: int = option(512, "length limit of a completion", least=1)
    temperature: float = option(1.0, "of sampling, and of the trainer's log-probabilities", above=0)
    max_rows: int = option(512, "completions sampled at once", least=1)
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
    clip_low: float = option(0.2, "lower clip of the ratio", least=0, needs=("--minibatches 2 or more", is_reused))
    clip_high: float = option(0.28, "upper clip", least=0, needs=("--minibatches 2 or more", is_reused))
    kl_coef: float = option(0.0, "weight of the KL divergence to the reference; 0: no reference is kept", least=0)
    kl: Literal["k2", "k3", "reward"] = option(
        "k2", "as a loss by k2 or (DeepSeek, biased) k3, or k1 in the reward", needs=("--kl-coef above 0", has_kl)
    )
    reference_every: int = option(
        0,
        "renew the reference every so many steps; 0: it stays the start",
        least=0,
        needs=("--kl-coef above 0", has_kl),
    )
    importance_cap: float = option(
        0.0, "cap of the sampler-trainer importance weight (about 2); 0: off", least=0, most=1e6
    )

    lr: float = option(1e-6, "peak learning rate", "schedule", least=0, most=1)
    decay: Literal["constant", "linear", "cosine"] = option("constant", "after warm-up, to a tenth of the peak")

    eval_every: int = option(20, "evaluate every so many steps; 0: only before and after", "evaluation", least=0)
    eval_problems: int = option(200, "held-out problems, at most", least=1)
    eval_samples: int = option(
        1,
        "samples a problem before and after the run",
        least=1,
        most=MANY,
        needs=("--eval-temperature above 0", lambda config: config.eval_temperature or config.eval_samples == 1),
    )
    eval_samples_during: int = option(
        1,
        "samples a problem during the run",
        least=1,
        most=MANY,
        needs=("--eval-every and --eval-temperature above 0", evaluates_samples_during),
    )
    eval_temperature: float = option(0.0, "0 is greedy", least=0)

    save_every: int = option(20, "checkpoint every so many steps; 0: only at the end", "saving", least=0)
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

MINIATURE_RUNS = {  # on the CPU, where one step is short: a GPU would wait for its launches
    "countdown": dict(
        steps=40, problems=32, completions=16, max_new_tokens=224, minibatches=2, lr=5e-4, warmup=3, decay="linear",
        tokens_per_batch=4096, eval_problems=500, eval_samples=16, eval_samples_during=1, eval_temperature=1.0,
        eval_every=20, template="bare", device="cpu", dtype="float32",
    ),
    "arithmetic": dict(
        steps=70, problems=32, completions=16, max_new_tokens=48, minibatches=2, lr=7e-4, warmup=3, decay="linear",
        tokens_per_batch=4096, eval_problems=500, eval_samples=16, eval_samples_during=1, eval_temperature=1.0,
        eval_every=20, template="bare", device="cpu", dtype="float32",
    ),
}  # fmt: skip


MINIATURE_NEXT = """what to try next:
  python train_zero.py --seed 1                      another base, another run
  python train_zero.py --task {other:<23}the other miniature: by trial (countdown), step by step (arithmetic)
  python train_zero.py --rewards accuracy=1          no reward for the format
  python sample.py --model {folder}/checkpoints/step_{step:06d} --raw "{prompt}"
and read {folder}/rollouts.jsonl: the answers, step by step"""
N_TRANSCRIPTS = 3  # held-out problems whose answers are shown before and after


@dataclass
class Progress:
    """What a resumed run needs besides weights and moments; a checkpoint's state.json."""

    step: int = 0
    n_drawn: int = 0  # problems: the next step takes the following ones
    lr: float | None = None  # of the last step
    wall_s: float = 0.0
    before: dict | None = None
    before_P: list[float | None] | None = None  # each held-out problem's share of right answers
    held_out: str | None = None  # which these problems were
    transcripts: list[str] | None = None  # the starting model's answers to the first held-out problems
    best_step: int | None = None
    best_accuracy: float = -1e9  # its; or, without gold answers, its reward


@dataclass(frozen=True)
class Actor:
    """Everything it takes to answer problems and have the answers judged."""

    workers: Workers  # the model, on one CPU thread or more
    sampler: Sampler  # of the same model
    prompter: Prompter
    task: Task
    rules: Rules  # by which answers are judged
    config: Config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prompter.tokenizer

    @property
    def tokens_per_batch(self) -> int:
        return default_tokens_per_batch(self.config.tokens_per_batch, self.sampler.model.head_weight_VC.device)


@dataclass
class Run:
    """Everything a run holds."""

    config: Config
    actor: Actor
    reference: Transformer | None  # of the KL term
    optimizer: MasterAdamW
    held_out: list[Problem]
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
    older = {"n_drawn": state.get("step", 0) * config.problems}  # of runs begun before it was kept
    progress = Progress(**older | state)
    if checkpoint and is_finished(config.resume, progress.step, config.steps):
        print(
            f"{config.resume} is finished: see summary.json there; to train on, give more than --steps {config.steps}"
        )
        return
    files = (config.data, config.eval_data, config.few_shot, config.reward_file)
    with open_log(config, checkpoint, progress.step, f"zero-{config.task}", COLUMNS, files) as log:
        say_lr_jump(log, config, progress.step, config.steps, progress.lr)
        run = set_up(config, checkpoint, tensors, progress, log, start_s - progress.wall_s)
        del tensors  # twice the model's size
        if progress.before is None:
            evaluate_before(run)
        train(run)
        if run.interrupt.is_asked:
            log.say(f"stopped after step {progress.step}; continue with: python train_zero.py --resume {log.folder}")
        else:
            finish(run)


def train(run: Run) -> None:
    """The steps: act, judge, learn, and what is due after each."""
    config, progress, guard = run.config, run.progress, NonFiniteGuard()
    while progress.step < config.steps and not run.interrupt.is_asked:
        step_start_s = time.monotonic()
        rollouts_PG, advantages_PG = act(run.actor, run.reference, progress.n_drawn)
        rollout_s = time.monotonic() - step_start_s
        report_unjudged(run.log, rollouts_PG)
        report_failures(run.actor.rules.own, run.log.say_once)
        loss_scale, dtype = run.optimizer.loss_scale, run.actor.workers.model.head_weight_VC.dtype
        learned = learn(run.actor, run.reference, run.optimizer, rollouts_PG, advantages_PG, progress.step)
        guard.check(learned["skipped_updates"], learned["updates"], loss_scale)
        progress.step, progress.lr = progress.step + 1, learned["lr"]
        progress.n_drawn += len(rollouts_PG)
        if run.reference and is_due(config.reference_every, progress.step):
            run.reference.load_state_dict(run.actor.workers.model.state_dict())

        metrics = describe(rollouts_PG, advantages_PG) | learned
        metrics |= throughput(rollouts_PG, rollout_s, learned, run.peak_flops)
        if is_due(config.eval_every, progress.step) and progress.step < config.steps:
            metrics |= evaluate_during(run)
        metrics["step_s"] = time.monotonic() - step_start_s
        run.log.metrics(progress.step, metrics)
        warn_of_gap(run.log, metrics, dtype, config.temperature, ", or --importance-cap 2")
        run.log.rollouts(progress.step, rollout_rows(rollouts_PG, config.log_rollouts))
        run.log.line(progress.step, metrics)
        progress.wall_s = time.monotonic() - run.start_s
        is_last = progress.step == config.steps or run.interrupt.is_asked
        if is_last or is_due(config.save_every, progress.step) or progress.best_step == progress.step:
            save(run)


# ---- start, resume, save


def read_command_line() -> tuple[Config, Path | None]:
    """The configuration, and with --resume the checkpoint to go on from. Flags beat the resumed run's own arguments."""
    config, given = parse_args(Config, description=__doc__)
    if config.resume:
        config, checkpoint = resumed(config, given)
        refuse_idle(config, given)
        return config, checkpoint
    if config.model is None:
        if config.task not in MINIATURES:
            raise ValueError(f"the task {config.task!r} needs a pretrained model: give --model FOLDER")
        config = replace(config, model=NAMESPACE + config.task)
    if miniature := find_miniature(config.model):
        config = as_miniature_run(config, given, miniature, MINIATURE_RUNS[miniature.task])
    if config.preset:
        config = apply_preset(config, given, PRESETS[config.preset])
    refuse_idle(validated(config), given)
    return config, None


def set_up(
    config: Config, checkpoint: Path | None, tensors: dict, progress: Progress, log: RunLog, start_s: float
) -> Run:
    folder = checkpoint or find_model(config.model, config.seed, log)
    device, dtype = choose_machine(config, checkpoint, folder, log)
    tokenizer = Tokenizer.from_pretrained(folder)
    template, why = choose_template(config.template, tokenizer, "r1-zero")
    log.say(f"model: {folder}; template: {template} ({why})")
    task = load_task(config, config.task, tokenizer, ("train", "held-out"))
    log.say(f"to train on: {task.describe('train')}\nto evaluate on: {task.describe('held-out')}")
    prompter = make_prompter(config, tokenizer, template, config.task)
    preference = load_preference(config, tokenizer, device, dtype, log) if config.reward_model else None
    rules = make_rules(prompter, weights=config.weights, own=own_rewards(config), preference=preference)
    model = Transformer.from_pretrained(folder, dtype, device)
    reference = make_reference(model, tensors) if config.kl_coef else None
    optimizer, workers = prepare(model, config, tensors, device)
    sampler = Sampler(model, config.max_rows, memory_share=0.5)  # the other half is for learning
    return Run(
        config=config,
        actor=Actor(workers, sampler, prompter, task, rules, config),
        reference=reference,
        optimizer=optimizer,
        held_out=task.part("held-out", config.eval_problems),
        progress=progress,
        log=log,
        interrupt=Interrupt(),
        peak_flops=peak_flops(device, dtype, log.say),
        start_s=start_s,
    )


def load_preference(config: Config, tokenizer: Tokenizer, device, dtype, log: RunLog) -> Preference:
    """What the reward model thinks of responses, in 0..1."""
    log.say(f"reward model: {model_folder(config.reward_model)}")
    model = load_reward_model(config.reward_model, tokenizer, dtype, device)
    return to_preference(model, tokenizer, default_tokens_per_batch(config.tokens_per_batch, device))


def make_reference(model: Transformer, tensors: dict[str, torch.Tensor]) -> Transformer:
    """The model as it is, or a resumed run's reference. ValueError for a run that was begun without one."""
    reference = copy.deepcopy(model).requires_grad_(False)
    if tensors:
        if not any(name.startswith("reference.") for name in tensors):
            raise ValueError(
                "--kl-coef: the run was begun without a reference, and its checkpoint holds none; leave --kl-coef out, "
                "or begin a new run from the checkpoint with --model"
            )
        reference.load_state_dict({name: tensors[f"reference.{name}"] for name in reference.state_dict()})
    return reference


def save(run: Run) -> None:
    """Save a checkpoint that `--resume` continues bit for bit: sampling and data order follow from seed and step."""
    progress = run.progress
    reference = run.reference.state_dict() if run.reference else {}
    save_run(
        run.log.folder,
        run.actor.workers.model,
        run.actor.tokenizer,
        run.optimizer,
        progress,
        tensors={f"reference.{name}": tensor for name, tensor in reference.items()},
        keep_last=run.config.keep_last,
        keep_best=progress.best_step,
    )


# ---- act and judge


def act(
    actor: Actor, reference: Transformer | None, n_drawn: int
) -> tuple[list[list[Rollout]], list[list[float | None]]]:
    """Sample and judge a step's groups; returns rollouts_PG and advantages_PG.

    Problems are those from `n_drawn` on of the task's endless sequence. With `--resample R` further ones are drawn for
    groups that teach nothing, at most R times (DAPO's dynamic sampling, bounded); what is then missing stays missing.
    """
    config, rollouts_PG, advantages_PG = actor.config, [], []
    for _ in range(config.resample + 1):
        n_missing = config.problems - sum(map(partial(is_useful, actor), rollouts_PG, advantages_PG))
        if n_missing <= 0:
            break
        first = n_drawn + len(rollouts_PG)
        problems = [problem for i in range(n_missing) for problem in actor.task.sample(1, config.seed, first + i)]
        groups = charge(answer(actor, problems, first), reference, actor)
        rollouts_PG += groups
        advantages_PG += group_advantages([[r.reward for r in group] for group in groups], config.advantage)
    return rollouts_PG, advantages_PG


def is_useful(actor: Actor, group: list[Rollout], advantages: list[float | None]) -> bool:
    """Whether a group need not be replaced: answers differ in accuracy, where that is rewarded, as in DAPO, or else in
    the reward. Rewards that are hardly ever equal, as for the language, would leave nothing to replace.
    """
    accuracies = {rollout.parts["accuracy"] for rollout in group} - {None}
    return any(advantages) and (len(accuracies) > 1 or not actor.rules.weights.get("accuracy"))


def answer(actor: Actor, problems: list[Problem], first: int) -> list[list[Rollout]]:
    """G judged completions of each problem, of which this is the `first` in the task's sequence."""
    config, prompts = actor.config, [actor.prompter.write(problem) for problem in problems]
    completions_PG = actor.sampler.generate(
        [ids for _, ids in prompts],
        n=config.completions,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=request_seed(config.seed, first),
        **actor.prompter.stops,
    )
    return judge_all(problems, prompts, completions_PG, actor.tokenizer, actor.rules)


def request_seed(seed: int, first: int) -> int:
    return seed * 1_000_003 + first + 1  # 0 is left to evaluations


def charge(rollouts_PG: list[list[Rollout]], reference: Transformer | None, actor: Actor) -> list[list[Rollout]]:
    """The rollouts with the reward that is optimised, less the overlong penalty and the KL where asked for."""
    config, flat = actor.config, [rollout for group in rollouts_PG for rollout in group]
    costs = {}
    if config.overlong == "penalty":
        limit, buffer = config.max_new_tokens, config.overlong_buffer
        costs["overlong_penalty"] = [overlong_penalty(len(rollout.completion.ids), limit, buffer) for rollout in flat]
    if config.kl_coef and config.kl == "reward":
        costs["kl_penalty"] = [-config.kl_coef * kl for kl in sequence_kl(reference, flat, actor)]
    for name, values in costs.items():
        flat = [
            replace(r, parts=r.parts | {name: value}, reward=None if r.reward is None else r.reward + value)
            for r, value in zip(flat, values, strict=True)
        ]
    charged = iter(flat)
    return [[next(charged) for _ in group] for group in rollouts_PG]


@torch.no_grad()
def sequence_kl(reference: Transformer, rollouts: list[Rollout], actor: Actor) -> list[float]:
    """The k1 estimate of KL(policy || reference), summed over each completion, under the policy that sampled it."""
    config, values = actor.config, torch.zeros(len(rollouts))
    for batch in pack(to_items(rollouts), actor.tokens_per_batch):
        batch = batch.to(reference.head_weight_VC.device)
        ref_logp_M, _ = completion_logprobs(reference, batch, config.temperature, actor.tokenizer.vocab_size)
        k1_M = kl_estimate(batch.sampler_logp_M, ref_logp_M, "k1")
        values.index_add_(0, batch.item_M.cpu(), k1_M.cpu())
    return values.tolist()


# ---- learn


def learn(actor: Actor, reference, optimizer: MasterAdamW, rollouts_PG, advantages_PG, step: int) -> dict:
    """The step's optimizer updates over the completions that teach something; returns its metrics.

    An update stands for P * G / minibatches completions, of the mean length of all that were sampled: these its divisor
    counts, whichever of them are learned from. So a completion weighs the same whether or not other groups teach
    nothing, and few groups make few updates of about that size, not many small ones.
    """
    config, start_s = actor.config, time.monotonic()
    chosen = choose(actor, rollouts_PG, advantages_PG)
    order = list(range(len(chosen)))
    random.Random(f"{config.seed} {step}").shuffle(order)
    lr = learning_rate(step, config.steps, config.lr, config.warmup, config.decay)
    updates, grad_norms, settings = [], [], loss_settings(actor, rollouts_PG)
    n_updates = math.ceil(len(chosen) * config.minibatches / (config.problems * config.completions))
    n_updates = min(n_updates, len(chosen))
    for i in range(n_updates):
        share = sorted(order[i::n_updates])  # those of one prompt lie side by side and share it
        rollouts, advantages = map(list, zip(*(chosen[j] for j in share), strict=True))
        scaled = replace(settings, loss_scale=optimizer.loss_scale)
        updates.append(add_gradient(actor.workers, reference, rollouts, advantages, scaled))
        grad_norms.append(optimizer.step(lr, config.max_grad_norm))
    finite = [norm for norm in grad_norms if math.isfinite(norm)]
    learn_s, metrics = time.monotonic() - start_s, step_metrics(updates) | scale_metric(optimizer)
    return metrics | {
        "grad_norm": mean(finite),
        "updates": len(finite),
        "skipped_updates": len(grad_norms) - len(finite),
        "lr": lr,
        "learn_s": learn_s,
        "learn_flops_per_s": metrics.pop("learn_flops") / learn_s,
    }


def choose(actor: Actor, rollouts_PG, advantages_PG) -> list[tuple[Rollout, float]]:
    """The completions to learn from, with their advantages, of P groups: useful ones first, where some were replaced.

    Those without an advantage are left out, and with them groups of equal reward, unless there is a KL loss: it falls
    on all that the policy samples. Answers cut off have no loss at all with `--overlong mask`.
    """
    config, groups = actor.config, list(zip(rollouts_PG, advantages_PG, strict=True))
    groups.sort(key=lambda group: (not is_useful(actor, *group), not any(group[1])))
    return [
        (rollout, advantage or 0.0)
        for group, advantages in groups[: config.problems]
        for rollout, advantage in zip(group, advantages, strict=True)
        if (config.has_kl_loss or any(advantages) and advantage is not None)
        and not (config.overlong == "mask" and rollout.completion.finish == "length")
    ]


def loss_settings(actor: Actor, rollouts_PG: list[list[Rollout]]) -> LossSettings:
    config = actor.config
    return LossSettings(
        temperature=config.temperature,
        vocab_size=actor.tokenizer.vocab_size,
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
        "peak_memory_gib": peak_memory_gib(),
    }


def report_unjudged(log: RunLog, rollouts_PG: list[list[Rollout]]) -> None:
    """Show the run's first completion that could not be judged; how many there are is in metrics.jsonl."""
    for rollout in (rollout for group in rollouts_PG for rollout in group if rollout.reward is None):
        shown = f"  problem: {shorten(rollout.problem.prompt)}\n  response: {shorten(rollout.text)}"
        log.say_once("unjudged", f"could not be judged, left out (first case): {rollout.parts}\n{shown}")


def rollout_rows(rollouts_PG: list[list[Rollout]], n: int) -> list[dict]:
    """`n` completions: the first of each group, then the second of each, and so on."""
    flat = ((p, g, group[g]) for g in range(len(rollouts_PG[0])) for p, group in enumerate(rollouts_PG))
    return [rollout_row(*at) for at in islice(flat, n)]


def rollout_row(group: int, index: int, rollout: Rollout) -> dict:
    return {
        "group": group,
        "index": index,
        "prompt": rollout.problem.prompt,
        "gold": rollout.problem.answer,
        "text": rollout.text,
        "finish": rollout.completion.finish,
        "tokens": len(rollout.completion.ids),
        "reward": rollout.reward,
        "parts": rollout.parts,
    }


def run_evaluation(actor: Actor, problems: list[Problem], samples: int) -> tuple[Evaluation, list[list[Rollout]]]:
    """On the same problems with the same random numbers each time, so that curves compare weights and nothing else."""
    config = actor.config
    return evaluate(
        actor.sampler,
        actor.prompter,
        problems,
        actor.rules,
        samples=samples if config.eval_temperature else 1,
        temperature=config.eval_temperature,
        max_new_tokens=config.max_new_tokens,
    )


def evaluate_before(run: Run) -> None:
    """The starting model's evaluation, kept for the end."""
    evaluation, rollouts_PG = run_evaluation(run.actor, run.held_out, run.config.eval_samples)
    run.progress.before, run.progress.before_P = evaluation.to_dict(), problem_accuracies(rollouts_PG)
    run.progress.held_out = digest_of(run.held_out)
    run.progress.transcripts = [group[0].text for group in rollouts_PG[:N_TRANSCRIPTS]]
    run.log.metrics(0, eval_metrics(run.progress.before))
    run.log.say(f"before: {evaluation}\n")
    if run.interrupt.is_asked or not run.config.steps:
        save(run)


def evaluate_during(run: Run) -> dict:
    """An evaluation's metrics; the best one so far is noted, and its checkpoint kept."""
    evaluation, _ = run_evaluation(run.actor, run.held_out, run.config.eval_samples_during)
    score = evaluation.reward if evaluation.accuracy is None else evaluation.accuracy
    if score is not None and score > run.progress.best_accuracy:
        run.progress.best_step, run.progress.best_accuracy = run.progress.step, score
    return eval_metrics(evaluation.to_dict())


def finish(run: Run) -> None:
    """Evaluate the trained model; say and write what the run came to."""
    config, progress, log = run.config, run.progress, run.log
    evaluation, rollouts_PG = run_evaluation(run.actor, run.held_out, config.eval_samples)
    progress.wall_s = time.monotonic() - run.start_s
    after = evaluation.to_dict()
    log.metrics(progress.step, eval_metrics(after))
    times = dict(wall_s=progress.wall_s, steps=progress.step, seed=config.seed)
    is_same = progress.held_out in (None, digest_of(run.held_out))  # None: a run begun before it was kept
    change = paired_change(progress.before_P, problem_accuracies(rollouts_PG)) if is_same else None
    log.summary({"before": progress.before, "after": after, "change": change} | times)
    if is_same:
        say_what_changed(run, after, rollouts_PG)
    else:
        log.say(f"\nbefore: {progress.before['n']} other held-out problems, with which these cannot be compared")
    log.say(f"\nafter:  {evaluation}")
    if change:
        log.say(f"change: {change_line(change)}")
    if progress.best_step:
        best = f"{progress.best_accuracy:.3f} at step {progress.best_step}"
        log.say(f"best evaluation on the way: {best}, checkpoint kept")
    report_failures(run.actor.rules.own, log.say_once)
    count_failures(run.actor.rules.own, log.say)
    log.say(f"{progress.step} steps, {progress.wall_s:.0f} s in all; run folder: {log.folder}")
    if config.model.startswith(NAMESPACE):
        other = "countdown" if config.task == "arithmetic" else "arithmetic"
        prompt = rollouts_PG[0][0].problem.prompt
        log.say(MINIATURE_NEXT.format(folder=log.folder, step=progress.step, other=other, prompt=prompt))


def say_what_changed(run: Run, after: dict, rollouts_PG: list[list[Rollout]]) -> None:
    """Some answers before and after, and a table of the evaluations' figures."""
    before, log = run.progress.before, run.log
    for before_text, (rollout, *_) in zip(run.progress.transcripts, rollouts_PG, strict=False):
        log.say(f"\nproblem: {rollout.problem.prompt}  (answer: {rollout.problem.answer})")
        log.say(f"  before: {shorten(before_text)}")
        log.say(f"  after:  {shorten(rollout.text)}")
    names = ["reward", "accuracy", "format", "language", "response_tokens", "retries", "truncated"]
    names += [name for name in after if name.startswith("majority")]
    log.say(f"\n{'held-out, ' + str(after['n']) + ' x ' + str(after['samples']):<24}{'before':>9}{'after':>9}")
    for name in names:
        if after[name] is not None and before.get(name) is not None:  # of an older run it may lack a figure
            log.say(f"{name.replace('_', ' '):<24}{before[name]:>9.3f}{after[name]:>9.3f}")


def shorten(text: str, limit: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[-limit // 2 :]}"


if __name__ == "__main__":
    main()
