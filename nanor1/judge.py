"""Act and judge: problems are answered, and the answers rewarded, until enough groups teach something.

Left out: what a reward is (rewards.py), what a group's rewards are worth to its members (grpo.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from nanor1.grpo import Rollout, completion_logprobs, group_advantages, kl_estimate, to_items
from nanor1.model import Transformer
from nanor1.packing import pack
from nanor1.rewards import REPORTED, REWARDS, after_thinking, combine, marked, overlong_penalty
from nanor1.sampler import Completion, Sampler
from nanor1.tasks.problems import Problem, Style, Task, prefilled
from nanor1.tasks.programs import code_accuracies
from nanor1.tasks.prompts import NEXT_TURN, Prompt, Prompter
from nanor1.tokenizer import Tokenizer

# The scores, in 0..1 or None, of responses behind the ids of their prompts: what a reward model prefers.
Preference = Callable[[list[list[int]], list[str]], list[float | None]]


@dataclass(frozen=True)
class Rules:
    """By what completions are judged, beside accuracy, format and language, which always are."""

    weights: Mapping[str, float] = field(default_factory=lambda: {"accuracy": 1.0})  # of the reward's parts
    own: Mapping[str, Callable] = field(default_factory=dict)  # beside or in place of those of rewards.REWARDS
    preference: Preference | None = None  # a reward model's
    style: Style = "think"  # of the prompts: only the first has a form of tags
    next_turn: str = ""  # what begins another turn: an answer ends before it


@dataclass(frozen=True)
class Actor:
    """Everything it takes to answer problems and have the answers judged."""

    sampler: Sampler  # of the model that learns
    prompter: Prompter
    rules: Rules  # by which answers are judged
    task: Task | None
    config: Any  # of the script
    tokens_per_batch: int  # of a forward pass

    def answer(self, problems: list[Problem], seed: int) -> list[list[Rollout]]:
        """`--completions` judged answers to each problem."""
        c = self.config
        sampling = dict(n=c.completions, max_new_tokens=c.max_new_tokens, temperature=c.temperature, seed=seed)
        return answer(self.sampler, self.prompter, problems, self.rules, **sampling)


# ---- a step of reinforcement learning: which problems, which rewards, and which completions are learned from


def act_and_judge(
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
    for batch in pack(to_items(rollouts), actor.tokens_per_batch):
        batch = batch.to(reference.head_weight_VC.device)
        ref_logp_M, _ = completion_logprobs(reference, batch, config.temperature, actor.prompter.tokenizer.vocab_size)
        k1_M = kl_estimate(batch.sampler_logp_M, ref_logp_M, "k1")
        values.index_add_(0, batch.item_M.cpu(), k1_M.cpu())
    return values.tolist()


# ---- answers and their rewards


def make_rules(prompter: Prompter, **fields) -> Rules:
    """The rules for answers to these prompts; `fields` are the other ones of Rules. ValueError for an idle `own`."""
    next_turn = NEXT_TURN if NEXT_TURN in prompter.stop_texts else ""
    rules = Rules(style=prompter.style, next_turn=next_turn, **fields)
    if rules.own and not rules.own.keys() & {*REPORTED, *rules.weights}:
        raise ValueError(
            f"--reward-file: of its functions ({', '.join(rules.own)}) none is used: give one a weight (--rewards of "
            f"train_zero.py), or the name of what it is to judge, {', '.join(REPORTED)}"
        )
    return rules


def answer(
    sampler: Sampler, prompter: Prompter, problems: Sequence[Problem], rules: Rules, **sampling
) -> list[list[Rollout]]:
    """Answer each problem, and judge the answers; `sampling` goes to Sampler.generate."""
    prompts = [prompter.write(problem) for problem in problems]
    completions_PG = sampler.generate([ids for _, ids in prompts], **prompter.stops, **sampling)
    return judge_all(problems, prompts, completions_PG, prompter.tokenizer, rules)


def judge_all(
    problems: Sequence[Problem | None],
    prompts: Sequence[Prompt],
    completions_PG: Sequence[Sequence[Completion]],
    tokenizer: Tokenizer,
    rules: Rules,
) -> list[list[Rollout]]:
    """Reward the completions of each problem; programs run several at a time, a reward model scores all at once.

    Answers to what is no problem are read and not judged.
    """
    flat = [
        Rollout(problem, ids, made, read_response(text, made, tokenizer, rules.next_turn), None, {})
        for problem, (text, ids), group in zip(problems, prompts, completions_PG, strict=True)
        for made in group
    ]
    code = [i for i, r in enumerate(flat) if r.problem and r.problem.task == "code" and "accuracy" not in rules.own]
    programs = [after_thinking(flat[i].text) for i in code]
    accuracies = code_accuracies([flat[i].problem for i in code], programs)
    known = {i: {"accuracy": accuracy} for i, accuracy in zip(code, accuracies, strict=True)}
    scores = [None] * len(flat)
    if rules.preference:
        scores = rules.preference([rollout.prompt_ids for rollout in flat], [rollout.text for rollout in flat])
    judged = (judge(r, known.get(i, {}), scores[i], rules) if r.problem else r for i, r in enumerate(flat))
    return [[next(judged) for _ in group] for group in completions_PG]


def read_response(prompt: str, completion: Completion, tokenizer: Tokenizer, next_turn: str) -> str:
    """The text to judge: what the prompt pre-filled and what the model made of it, without what ends it."""
    ids = completion.ids[:-1] if completion.ids[-1] in tokenizer.stop_ids else completion.ids
    text = tokenizer.decode(ids)
    return prefilled(prompt) + (text.partition(next_turn)[0] if next_turn else text)


def judge(rollout: Rollout, known: dict[str, float | None], score: float | None, rules: Rules) -> Rollout:
    """Reward one answer by rules; `known` parts are not judged again, `score` is a reward model's.

    One that is cut off by the length limit is no answer: its accuracy is 0. One that is cut off or missing is
    preferred to none: a reward model may never have seen one. The reward is None where a weighted part is.
    """
    functions = REWARDS | ({} if rules.style == "think" else {"format": marked}) | rules.own
    names = sorted({*REPORTED, *rules.weights} & functions.keys())
    parts = {name: known[name] if name in known else functions[name](rollout.problem, rollout.text) for name in names}
    is_whole = rollout.completion.finish == "stop"
    if not is_whole and parts["accuracy"] is not None:
        parts["accuracy"] = 0.0
    if rules.preference:
        parts["preference"] = score if is_whole and after_thinking(rollout.text).strip() else 0.0
    return replace(rollout, parts=parts, reward=combine(parts, rules.weights))
