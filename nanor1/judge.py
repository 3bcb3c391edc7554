"""Act and judge: a step's problems are answered, and the answers rewarded, until enough groups teach something."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from nanor1.evaluate import Rules, judge_all
from nanor1.grpo import Rollout, completion_logprobs, group_advantages, kl_estimate, pack
from nanor1.model import Transformer
from nanor1.prompts import Prompter
from nanor1.rewards import overlong_penalty
from nanor1.sampler import Sampler
from nanor1.tasks import Problem, Task
from nanor1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Actor:
    """Everything it takes to answer problems and have the answers judged."""

    sampler: Sampler  # of the model that learns
    prompter: Prompter
    rules: Rules  # by which answers are judged
    task: Task | None
    config: Any  # of the script
    tokens_per_batch: int  # of a forward pass

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prompter.tokenizer

    def answer(self, problems: list[Problem], seed: int) -> list[list[Rollout]]:
        """`--completions` judged answers to each problem."""
        config, prompts = self.config, [self.prompter.write(problem) for problem in problems]
        completions_PG = self.sampler.generate(
            [ids for _, ids in prompts],
            n=config.completions,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=seed,
            **self.prompter.stops,
        )
        return judge_all(problems, prompts, completions_PG, self.tokenizer, self.rules)


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
        groups = charge(actor.answer(problems, request_seed(config.seed, first)), reference, actor)
        rollouts_PG += groups
        advantages_PG += group_advantages([[r.reward for r in group] for group in groups], config.advantage)
    return rollouts_PG, advantages_PG


def is_useful(actor: Actor, group: list[Rollout], advantages: list[float | None]) -> bool:
    """Whether a group need not be replaced: answers differ in accuracy, where that is rewarded, as in DAPO, or else in
    the reward. Rewards that are hardly ever equal, as for the language, would leave nothing to replace.
    """
    accuracies = {rollout.parts["accuracy"] for rollout in group} - {None}
    return any(advantages) and (len(accuracies) > 1 or not actor.rules.weights.get("accuracy"))


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


def request_seed(seed: int, first: int) -> int:
    """Of the noise in which problems are answered of which this is the first."""
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
    zeros = [0.0] * len(rollouts)
    for batch in pack(rollouts, zeros, zeros, actor.tokens_per_batch):
        batch = batch.to(reference.head_weight_VC.device)
        ref_logp_M, _ = completion_logprobs(reference, batch, config.temperature, actor.tokenizer.vocab_size)
        k1_M = kl_estimate(batch.sampler_logp_M, ref_logp_M, "k1")
        values.index_add_(0, batch.rollout_M.cpu(), k1_M.cpu())
    return values.tolist()
