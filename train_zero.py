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
from pathlib import Path
from typing import Literal

import nanor1.openmp  # noqa: F401  # isort: skip  (before torch)

import torch

from nanor1.checkpoint import load_checkpoint, model_folder
from nanor1.config import apply_preset, option, parse_args, user_errors
from nanor1.evaluate import Evaluation, Preference, evaluate, judge_all, write_prompt
from nanor1.grpo import (
    LossSettings,
    Rollout,
    add_gradient,
    completion_logprobs,
    describe,
    group_advantages,
    kl_estimate,
    mean,
    pack,
    step_metrics,
)
from nanor1.machine import Interrupt, peak_flops, peak_memory_gib
from nanor1.miniature import (
    MINIATURES,
    NAMESPACE,
    find_miniature,
    find_model,
    miniature_task,
    own_miniature,
)
from nanor1.model import Transformer
from nanor1.optim import MasterAdamW, NonFiniteGuard, learning_rate
from nanor1.parallel import Workers
from nanor1.rewards import overlong_penalty, parse_rewards
from nanor1.runlog import RunLog
from nanor1.sampler import Sampler
from nanor1.tasks import Problem, Task, make_task, task_parameters
from nanor1.tokenizer import Tokenizer
from nanor1.training import (
    as_miniature_run,
    check_least,
    choose_machine,
    default_tokens_per_batch,
    eval_metrics,
    is_due,
    is_finished,
    load_reward_model,
    open_log,
    prepare,
    resumed,
    save_run,
    scale_metric,
    to_preference,
    warn_of_gap,
)


@dataclass(frozen=True)
class Config:
    model: str | None = option(
        None, "model or run folder, or miniature/NAME, which is pretrained first; none: miniature/TASK", "what to train"
    )
    task: str = option("countdown", "countdown, arithmetic, gsm8k or math")
    data: str | None = option(None, "JSON lines of training problems")
    eval_data: str | None = option(None, "JSON lines of held-out problems; none: a tenth of the data is held out")
    task_args: str = option("", 'JSON object of the task\'s parameters, as {"n_numbers": 3}; see nanor1/tasks.py')
    template: Literal["auto", "r1-zero", "chat", "bare"] = option("auto", "prompt; auto: chat if the model has one")
    out: str | None = option(None, "run folder; none: runs/zero-TASK-TIME")
    resume: str | None = option(None, "continue the run in this folder")
    preset: Literal["deepseek"] | None = option(None, "published settings: deepseek (R1's first RL stage)")
    seed: int = option(0, "of everything random")

    steps: int = option(200, "training steps", "a step")
    problems: int = option(16, "problems a step (P)")
    completions: int = option(8, "completions a problem (G), at least 2")
    max_new_tokens: int = option(512, "length limit of a completion")
    stop_text: str | None = option(None, "a completion also ends once it holds this text (base models)")
    temperature: float = option(1.0, "of sampling, and of the trainer's log-probabilities")
    max_rows: int = option(512, "completions sampled at once")
    resample: int = option(0, "at most this many further rounds of sampling to replace groups of equal reward")

    rewards: str = option(
        "accuracy=1,format=0.1",
        "NAME=WEIGHT,... of accuracy, format (a cost: weight * (format - 1)), language, preference, random",
        "reward",
    )
    reward_model: str | None = option(None, "folder by train_sft.py --objective preference, for preference=WEIGHT")
    overlong: Literal["none", "mask", "penalty"] = option("none", "cut-off completions: no loss, or DAPO's penalty")
    overlong_buffer: int = option(64, "tokens before the limit in which the penalty grows")

    advantage: Literal["mean", "std"] = option("mean", "reward - group mean; std: also / deviation", "loss")
    aggregate: Literal["token", "sequence", "constant"] = option("token", "mean over tokens; see nanor1/grpo.py")
    minibatches: int = option(1, "optimizer updates a step")
    clip_low: float = option(0.2, "lower clip of the ratio (in force with several minibatches)")
    clip_high: float = option(0.28, "upper clip")
    kl_coef: float = option(0.0, "weight of the KL divergence to the reference; 0: no reference is kept")
    kl: Literal["k2", "k3", "reward"] = option("k2", "as a loss by k2 or (DeepSeek, biased) k3, or k1 in the reward")
    reference_every: int = option(0, "renew the reference every so many steps; 0: it stays the start")
    importance_cap: float = option(0.0, "cap of the sampler-trainer importance weight (about 2); 0: off")

    lr: float = option(1e-6, "peak learning rate", "optimizer")
    warmup: int = option(5, "steps of linear warm-up")
    decay: Literal["constant", "linear", "cosine"] = option("constant", "after warm-up, to a tenth of the peak")
    weight_decay: float = option(0.0, "AdamW's, on matrices")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    tokens_per_batch: int = option(
        0, "tokens a forward and backward pass, a prompt counted once; 0: 1024 on the CPU (memory), else 8192"
    )
    checkpoint_activations: bool = option(False, "less memory in learning, for a third more work")

    eval_every: int = option(20, "evaluate every so many steps; 0: only before and after", "evaluation")
    eval_problems: int = option(200, "held-out problems")
    eval_samples: int = option(1, "samples a problem before and after the run")
    eval_samples_during: int = option(1, "samples a problem during the run")
    eval_temperature: float = option(0.0, "0 is greedy")

    save_every: int = option(20, "checkpoint every so many steps; 0: only at the end", "saving")
    keep_last: int = option(2, "checkpoints kept, besides the best")

    device: str = option("auto", "cpu, cuda, mps or auto", "machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "of the weights; auto: bfloat16 on cuda, and where a CPU is measured to be faster with it; float16: cuda only",
    )
    compile: Literal["auto", "on", "off"] = option("auto", "torch.compile of the model's blocks; auto: on cuda")
    threads: int = option(0, "CPU threads; 0: torch's choice")
    workers: int = option(0, "copies of the model, one a CPU thread; 0: one, or for a small model all threads")

    def validate(self) -> None:
        at_least = dict(steps=0, problems=1, completions=2, max_new_tokens=1, max_rows=1, minibatches=1, keep_last=1)
        at_least |= dict(tokens_per_batch=0, eval_problems=1, eval_samples=1, eval_samples_during=1, resample=0)
        at_least |= dict(warmup=0, eval_every=0, save_every=0, reference_every=0, threads=0, workers=0, kl_coef=0, lr=0)
        check_least(self, at_least, dict(completions=" (a group of 1 has no advantage)"))
        if self.temperature <= 0:
            raise ValueError(f"--temperature is {self.temperature}; training samples need one above 0")
        if self.overlong == "penalty":
            overlong_penalty(0, self.max_new_tokens, self.overlong_buffer)
        if self.importance_cap and self.minibatches > 1:
            raise ValueError("--importance-cap needs --minibatches 1: with several the ratio is to the sampler already")
        if self.compile == "on" and self.workers > 1:
            raise ValueError("--compile on needs --workers 1: copies of the model are not compiled")
        if ("preference" in parse_rewards(self.rewards)) != bool(self.reward_model):
            raise ValueError("--rewards preference=WEIGHT and --reward-model FOLDER need each other; give both or none")


PRESETS = {
    "deepseek": dict(  # DeepSeek-R1, section 2.2.1: G 16, 32 questions, lr 3e-6, KL 0.001 (k3), clip 10, 16 minibatches
        problems=32, completions=16, lr=3e-6, kl_coef=0.001, kl="k3", reference_every=400, clip_low=10.0,
        clip_high=10.0, minibatches=16, advantage="std", aggregate="sequence", temperature=1.0, warmup=0,
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
    wall_s: float = 0.0
    before: dict | None = None
    transcripts: list[str] | None = None  # the starting model's answers to the first held-out problems
    best_step: int | None = None
    best_accuracy: float = -1.0


@dataclass(frozen=True)
class Actor:
    """Everything it takes to answer problems and have the answers judged."""

    workers: Workers  # the model, on one CPU thread or more
    sampler: Sampler  # of the same model
    tokenizer: Tokenizer
    task: Task
    template: str
    weights: dict[str, float]
    preference: Preference | None  # the reward model's
    config: Config

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
    progress = Progress(**state)
    if checkpoint and is_finished(config.resume, progress.step, config.steps):
        print(
            f"{config.resume} is finished: see summary.json there; to train on, give more than --steps {config.steps}"
        )
        return
    with open_log(config, checkpoint, progress.step, f"zero-{config.task}", COLUMNS) as log:
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
        rollouts_PG, advantages_PG = act(run.actor, run.reference, progress.step)
        rollout_s = time.monotonic() - step_start_s
        report_unjudged(run.log, rollouts_PG)
        loss_scale, dtype = run.optimizer.loss_scale, run.actor.workers.model.head_weight_VC.dtype
        learned = learn(run.actor, run.reference, run.optimizer, rollouts_PG, advantages_PG, progress.step)
        guard.check(learned["skipped_updates"], learned["updates"], loss_scale)
        progress.step += 1
        if run.reference and is_due(config.reference_every, progress.step):
            run.reference.load_state_dict(run.actor.workers.model.state_dict())

        metrics = describe(rollouts_PG, advantages_PG) | learned
        metrics |= throughput(rollouts_PG, rollout_s, learned, run.peak_flops)
        if is_due(config.eval_every, progress.step) and progress.step < config.steps:
            metrics |= evaluate_during(run)
        metrics["step_s"] = time.monotonic() - step_start_s
        run.log.metrics(progress.step, metrics)
        warn_of_gap(run.log, metrics, dtype, config.temperature, ", or --importance-cap 2")
        run.log.rollouts(progress.step, [rollout_row(group[0]) for group in rollouts_PG[:4]])
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
        return resumed(config, given)
    if config.model is None:
        if config.task not in MINIATURES:
            raise ValueError(f"the task {config.task!r} needs a pretrained model: give --model FOLDER")
        config = replace(config, model=NAMESPACE + config.task)
    if miniature := find_miniature(config.model):
        config = as_miniature_run(config, given, miniature, MINIATURE_RUNS[miniature.task])
    if config.preset:
        config = apply_preset(config, given, PRESETS[config.preset])
    config.validate()
    return config, None


def set_up(
    config: Config, checkpoint: Path | None, tensors: dict, progress: Progress, log: RunLog, start_s: float
) -> Run:
    folder = checkpoint or find_model(config.model, config.seed, log)
    log.say(f"model: {folder}")
    device, dtype = choose_machine(config, checkpoint, folder, log)
    model, tokenizer = Transformer.from_pretrained(folder, dtype, device), Tokenizer.from_pretrained(folder)
    reference = make_reference(model, tensors) if config.kl_coef else None
    optimizer, workers = prepare(model, config, tensors, device)
    task, template, weights = load_task(config, tokenizer)
    preference = load_preference(config, tokenizer, device, dtype, log) if "preference" in weights else None
    sampler = Sampler(model, config.max_rows, memory_share=0.5)  # the other half is for learning
    return Run(
        config=config,
        actor=Actor(workers, sampler, tokenizer, task, template, weights, preference, config),
        reference=reference,
        optimizer=optimizer,
        held_out=task.held_out(config.eval_problems),
        progress=progress,
        log=log,
        interrupt=Interrupt(),
        peak_flops=peak_flops(device, dtype, log.say),
        start_s=start_s,
    )


def load_task(config: Config, tokenizer: Tokenizer) -> tuple[Task, str, dict[str, float]]:
    """The task, the prompt template and the rewards' weights."""
    miniature = own_miniature(tokenizer)
    if miniature:
        task = miniature_task(miniature)
    else:
        task = make_task(config.task, data=config.data, eval_data=config.eval_data, **task_parameters(config.task_args))
    template = config.template
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "r1-zero"
    return task, template, parse_rewards(config.rewards)


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


def act(actor: Actor, reference: Transformer | None, step: int) -> tuple[list[list[Rollout]], list[list[float | None]]]:
    """Sample and judge a step's groups; returns rollouts_PG and advantages_PG.

    With `--resample R` groups of equal reward are replaced by fresh problems, at most R times (DAPO's dynamic sampling,
    bounded); what is still missing then stays missing.
    """
    config, rollouts_PG, advantages_PG = actor.config, [], []
    for attempt in range(config.resample + 1):
        n_useful = sum(any(advantages) for advantages in advantages_PG)
        if n_useful >= config.problems:
            break
        index = step * (config.resample + 1) + attempt  # of the draw: the same in a resumed run
        problems = actor.task.sample(config.problems, config.seed, index)[: config.problems - n_useful]
        groups = answer(actor, problems, index)
        rollouts_PG += groups
        advantages_PG += group_advantages(rewards(groups, reference, actor), config.advantage)
    return rollouts_PG, advantages_PG


def answer(actor: Actor, problems: list[Problem], index: int) -> list[list[Rollout]]:
    """G judged completions of each problem."""
    config, tokenizer = actor.config, actor.tokenizer
    prompts = [write_prompt(problem, actor.template, tokenizer) for problem in problems]
    completions_PG = actor.sampler.generate(
        [ids for _, ids in prompts],
        n=config.completions,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_ids=tokenizer.stop_ids,
        vocab_size=tokenizer.vocab_size,
        seed=request_seed(config.seed, index),
        **stop_texts(actor),
    )
    return judge_all(problems, prompts, completions_PG, tokenizer, actor.weights, actor.preference)


def stop_texts(actor: Actor) -> dict:
    text = actor.config.stop_text
    return {"stop_texts": [text], "decode": actor.tokenizer.decode} if text else {}


def request_seed(seed: int, index: int) -> int:
    return seed * 1_000_003 + index + 1  # 0 is left to evaluations


def rewards(rollouts_PG: list[list[Rollout]], reference, actor: Actor) -> list[list[float | None]]:
    """What the advantages are made of: the rules' rewards, less the overlong penalty and the KL where asked for."""
    config, flat = actor.config, [rollout for group in rollouts_PG for rollout in group]
    extra = [0.0] * len(flat)
    if config.overlong == "penalty":
        limit, buffer = config.max_new_tokens, config.overlong_buffer
        extra = [overlong_penalty(len(rollout.completion.ids), limit, buffer) for rollout in flat]
    if config.kl_coef and config.kl == "reward":
        kls = sequence_kl(reference, flat, actor)
        extra = [value - config.kl_coef * kl for value, kl in zip(extra, kls, strict=True)]
    totals = iter(None if r.reward is None else r.reward + more for r, more in zip(flat, extra, strict=True))
    return [[next(totals) for _ in group] for group in rollouts_PG]


@torch.no_grad()
def sequence_kl(reference: Transformer, rollouts: list[Rollout], actor: Actor) -> list[float]:
    """The k1 estimate of KL(policy || reference), summed over each completion, under the policy that sampled it."""
    config, values = actor.config, torch.zeros(len(rollouts))
    zeros = [0.0] * len(rollouts)
    for batch in pack(rollouts, zeros, zeros, actor.tokens_per_batch):
        batch = batch.to(reference.head_weight_VC.device)
        ref_logp_M, _ = completion_logprobs(reference, batch, config.temperature, actor.tokenizer.vocab_size)
        k1_M = kl_estimate(batch.sampler_logp_M, ref_logp_M, "k1")
        values.index_add_(0, batch.rollout_M.cpu(), k1_M.cpu())
    return values.tolist()


# ---- learn


def learn(actor: Actor, reference, optimizer: MasterAdamW, rollouts_PG, advantages_PG, step: int) -> dict:
    """The step's optimizer updates over the groups that teach something; returns its metrics."""
    config, start_s = actor.config, time.monotonic()
    chosen = [
        (rollout, advantage)
        for group, advantages in zip(rollouts_PG, advantages_PG, strict=True)
        if any(advantages)
        for rollout, advantage in zip(group, advantages, strict=True)
        if advantage is not None and not (config.overlong == "mask" and rollout.completion.finish == "length")
    ]
    order = list(range(len(chosen)))
    random.Random(f"{config.seed} {step}").shuffle(order)
    lr = learning_rate(step, config.steps, config.lr, config.warmup, config.decay)
    updates, grad_norms, settings = [], [], loss_settings(actor)
    for i in range(min(config.minibatches, len(chosen))):
        share = sorted(order[i :: config.minibatches])  # those of one prompt lie side by side and share it
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


def loss_settings(actor: Actor) -> LossSettings:
    config = actor.config
    return LossSettings(
        temperature=config.temperature,
        vocab_size=actor.tokenizer.vocab_size,
        tokens_per_batch=actor.tokens_per_batch,
        aggregate=config.aggregate,
        constant_length=config.max_new_tokens,
        is_batch_reused=config.minibatches > 1,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        importance_cap=config.importance_cap,
        kl_coef=0.0 if config.kl == "reward" else config.kl_coef,
        kl="k2" if config.kl == "reward" else config.kl,
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


def rollout_row(rollout: Rollout) -> dict:
    return {
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
        actor.tokenizer,
        problems,
        actor.template,
        actor.weights,
        samples=samples if config.eval_temperature else 1,
        temperature=config.eval_temperature,
        max_new_tokens=config.max_new_tokens,
        **stop_texts(actor),
    )


def evaluate_before(run: Run) -> None:
    """The starting model's evaluation, kept for the end."""
    evaluation, rollouts_PG = run_evaluation(run.actor, run.held_out, run.config.eval_samples)
    run.progress.before = evaluation.to_dict()
    run.progress.transcripts = [group[0].text for group in rollouts_PG[:N_TRANSCRIPTS]]
    run.log.metrics(0, eval_metrics(run.progress.before))
    run.log.say(f"before: {evaluation}\n")
    if run.interrupt.is_asked or not run.config.steps:
        save(run)


def evaluate_during(run: Run) -> dict:
    """An evaluation's metrics; the best one so far is noted, and its checkpoint kept."""
    evaluation, _ = run_evaluation(run.actor, run.held_out, run.config.eval_samples_during)
    if evaluation.accuracy > run.progress.best_accuracy:
        run.progress.best_step, run.progress.best_accuracy = run.progress.step, evaluation.accuracy
    return eval_metrics(evaluation.to_dict())


def finish(run: Run) -> None:
    """Evaluate the trained model; say and write what the run came to."""
    config, progress, log = run.config, run.progress, run.log
    evaluation, rollouts_PG = run_evaluation(run.actor, run.held_out, config.eval_samples)
    progress.wall_s = time.monotonic() - run.start_s
    after = evaluation.to_dict()
    log.metrics(progress.step, eval_metrics(after))
    times = dict(wall_s=progress.wall_s, steps=progress.step, seed=config.seed)
    log.summary({"before": progress.before, "after": after} | times)
    say_what_changed(run, after, rollouts_PG)
    log.say(f"\nafter:  {evaluation}")
    if progress.best_step:
        best = f"{progress.best_accuracy:.3f} at step {progress.best_step}"
        log.say(f"best evaluation on the way: {best}, checkpoint kept")
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
    names = ["accuracy", "format", "language", "response_tokens", "retries", "truncated"]
    names += [name for name in after if name.startswith("majority") and after[name] is not None]
    log.say(f"\n{'held-out, ' + str(after['n']) + ' x ' + str(after['samples']):<24}{'before':>9}{'after':>9}")
    for name in names:
        log.say(f"{name.replace('_', ' '):<24}{before[name]:>9.3f}{after[name]:>9.3f}")


def shorten(text: str, limit: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[-limit // 2 :]}"


if __name__ == "__main__":
    main()
