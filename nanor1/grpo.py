"""Group-relative policy optimization: advantages, token weights, loss.

For each problem G completions are sampled; the advantage of a completion is its reward minus the mean of its group, so
that no value network is needed (GRPO: DeepSeekMath, 2402.03300; DeepSeek-R1, 2501.12948). Defaults depart from the
paper where later work found a bias or no use:

- no division by the group's standard deviation, which weighs easy and hard problems up (Dr.GRPO, 2503.20783);
  `normalize="std"` is DeepSeek's;
- a token's weight does not depend on its response's length: "token" divides by all tokens of the step (DAPO, 2503.14476
  eq. 8), "constant" by a fixed length (Dr.GRPO); "sequence" is DeepSeek's mean within each response;
- the upper clip is wider than the lower (DAPO's clip-higher);
- no KL term. Where one is asked for, k2 has the right gradient on-policy; DeepSeek's k3 as a loss is a biased
  approximation (2510.01555), and k1 as a loss has zero expected gradient, so k1 goes into the reward or nowhere.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanor1.gradient import Workers
from nanor1.logprobs import chunked_loss, token_logprobs
from nanor1.packing import Batch, Item, attended_pairs, pack

Advantage = float | list[float]  # of a completion, or of each of its tokens


@dataclass(frozen=True)
class Rollout:
    """One judged completion; `reward` is None where it could not be judged."""

    problem: Any
    prompt_ids: list[int]
    completion: Any  # ids, logprobs, finish
    text: str
    reward: float | None
    parts: dict[str, float | None]


def group_advantages(rewards_PG: list[list[float | None]], normalize: str = "mean") -> list[list[float | None]]:
    """Reward minus the group's mean; with `normalize="std"` also divided by the group's deviation (G - 1 in it).

    A reward of None is left out of its group's mean and its advantage is None. A group in which all rewards are equal,
    or fewer than two are known, gets exactly 0 (and is worth no forward pass). DeepSeekMath, section 4.1.2.

    >>> group_advantages([[1.0, 0.0, 0.0, 1.0], [1.0, None, 1.0, 1.0]])
    [[0.5, -0.5, -0.5, 0.5], [0.0, None, 0.0, 0.0]]
    """
    if normalize not in ("mean", "std"):
        raise ValueError(f"advantage normalization is {normalize!r}; choose mean or std")
    advantages_PG = []
    for rewards in rewards_PG:
        known = [r for r in rewards if r is not None]
        center, scale = sum(known) / max(1, len(known)), 1.0
        if len(set(known)) <= 1:
            center = known[0] if known else 0.0  # a sum could round
        elif normalize == "std":
            scale = (sum((r - center) ** 2 for r in known) / (len(known) - 1)) ** 0.5 + 1e-6
        advantages_PG.append([None if r is None else (r - center) / scale for r in rewards])
    return advantages_PG


def token_weights(
    lengths: list[int],
    aggregate: str,
    constant_length: int | None = None,
    n_sequences: float | None = None,
    mean_length: float | None = None,
) -> list[float]:
    """The weight of each sequence's tokens in the loss of one optimizer update, given their completions' lengths.

    "token": 1 / all tokens; "sequence": 1 / (sequences * own length); "constant": 1 / (sequences * constant_length).
    Counted are `n_sequences` of `mean_length` tokens, as many as an update was to have; by default those that are
    given. So the weight of a sequence does not depend on which others were left out, and the split into micro-batches
    changes nothing.

    >>> token_weights([1, 3], "token"), token_weights([1, 3], "sequence"), token_weights([1, 3], "constant", 4)
    ([0.25, 0.25], [0.5, 0.16666666666666666], [0.125, 0.125])
    >>> token_weights([1, 3], "token", n_sequences=4, mean_length=2.5)
    [0.1, 0.1]
    """
    n = n_sequences or len(lengths)
    if aggregate == "token":
        return [1 / (n * mean_length if mean_length else sum(lengths))] * len(lengths)
    if aggregate == "sequence":
        return [1 / (n * length) for length in lengths]
    if aggregate == "constant":
        return [1 / (n * constant_length)] * len(lengths)
    raise ValueError(f"aggregate is {aggregate!r}; choose token, sequence or constant")


def to_items(
    rollouts: list[Rollout], advantages: Sequence[Advantage] | None = None, weights: Sequence[float] | None = None
) -> list[Item]:
    """What packing lays end to end: the loss falls on all tokens of the completions, the stop token included."""
    zeros = [0.0] * len(rollouts)
    return [
        Item(rollout.prompt_ids, rollout.completion.ids, True, advantage, rollout.completion.logprobs, weight)
        for rollout, advantage, weight in zip(rollouts, advantages or zeros, weights or zeros, strict=True)
    ]


def completion_logprobs(model, batch: Batch, temperature: float, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The model's log-probability of each completion token, and its entropy there: fp32 [M]."""
    states_MC = batch.predictor_states(model)
    return token_logprobs(states_MC, model.head_weight_VC, batch.target_M, temperature, vocab_size)


def policy_loss(
    logp_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    weight_M: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    importance_M: Tensor | None = None,
    ref_logp_M: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k2",
) -> tuple[Tensor, Tensor]:
    """The clipped policy-gradient loss of some tokens, to be minimised: (sum of weight * loss, whether clipped [M]).

    ratio = exp(logp - old_logp); the loss of a token is -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
    (PPO, 1707.06347, eq. 7; DAPO eq. 8 for two bounds). Give `logp.detach()` as old where the batch is used once: the
    ratio is then 1, no clip is in force, and the loss's value is minus the weighted mean advantage, which says nothing
    (it is zero where all completions have the same total weight, as advantages are centred in each group), while its
    gradient is the policy gradient. `importance_M` multiplies a token's loss (no gradient): the truncated weight of
    the sampler-trainer gap. `kl_coef` adds the k2 or k3 estimate of KL(policy || reference).
    """
    ratio = (logp_M - old_logp_M).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage_M, clipped * advantage_M)
    is_clipped = (clipped * advantage_M < ratio * advantage_M).detach()
    if importance_M is not None:
        loss = loss * importance_M.detach()
    if kl_coef:
        loss = loss + kl_coef * kl_estimate(logp_M, ref_logp_M, kl)
    return (loss * weight_M).sum(), is_clipped


def kl_estimate(logp_M: Tensor, ref_logp_M: Tensor, kind: str) -> Tensor:
    """An estimate of KL(policy || reference) a token from samples of the policy: k1, k2 or k3 (Schulman 2020).

    k1 = log p - log ref is unbiased; k2 = k1^2 / 2 is biased, its gradient is not; k3 = exp(-k1) - 1 + k1 is unbiased
    and never negative, its gradient is biased.
    """
    k1 = logp_M - ref_logp_M
    if kind == "k1":
        return k1
    if kind == "k2":
        return k1.square() / 2
    if kind == "k3":
        return torch.exp(-k1) - 1 + k1
    raise ValueError(f"KL estimate is {kind!r}; choose k1, k2 or k3")


def importance_weights(logp_M: Tensor, sampler_logp_M: Tensor, cap: float) -> Tensor:
    """min(p_trainer / p_sampler, cap): corrects a sampler whose arithmetic differs from the trainer's (TIS)."""
    return (logp_M.detach() - sampler_logp_M).exp().clamp(max=cap)


@dataclass(frozen=True)
class LossSettings:
    """How a step's loss is made; see `policy_loss`, `token_weights` and `importance_weights`."""

    temperature: float
    vocab_size: int
    tokens_per_batch: int
    aggregate: str = "token"
    constant_length: int | None = None
    n_sequences: float | None = None  # that the divisor of an update counts, and their mean length; None: its own
    mean_length: float | None = None
    is_batch_reused: bool = False  # several updates a batch: the ratio is to the sampler, and the clip is in force
    clip_low: float = 0.2
    clip_high: float = 0.28
    importance_cap: float = 0.0
    kl_coef: float = 0.0
    kl: str = "k2"
    loss_scale: float = 1.0  # the gradient is multiplied by it (see nanor1/optim.py), what is reported is not


def add_gradient(
    workers: Workers, reference, rollouts: list[Rollout], advantages: list[Advantage], settings: LossSettings
) -> list["BatchTerms"]:
    """Add the gradient of one optimizer update to the parameters, micro-batch by micro-batch.

    An advantage is a number for all tokens of a completion, or a list of one number a token. `reference` is the model
    of the KL term, or None. Returns what each micro-batch adds to the step's metrics.
    """
    lengths = [len(rollout.completion.ids) for rollout in rollouts]
    weights = token_weights(
        lengths, settings.aggregate, settings.constant_length, settings.n_sequences, settings.mean_length
    )
    weights = [weight * settings.loss_scale for weight in weights]  # at the root: all of the backward is in its range
    batches = pack(to_items(rollouts, advantages, weights), settings.tokens_per_batch)
    reports = workers.accumulate(batches, partial(_loss_and_sums, reference=reference, settings=settings))
    return [BatchTerms(*counts, *sums.tolist()) for counts, sums in reports]


def _loss_and_sums(model, batch: Batch, reference, settings: LossSettings) -> tuple[Tensor, tuple]:
    """The loss of a batch; and of the fields of BatchTerms the counts, and the sums as one tensor."""
    temperature, vocab_size, cap, ref_logp_M = settings.temperature, settings.vocab_size, settings.importance_cap, None
    if reference is not None:
        with torch.no_grad():
            ref_logp_M, _ = completion_logprobs(reference, batch, temperature, vocab_size)

    is_clipped_M = torch.zeros_like(batch.weight_M)

    def loss_of(logp: Tensor, at: slice) -> Tensor:
        sampler_logp = batch.sampler_logp_M[at]
        loss, is_clipped_M[at] = policy_loss(
            logp,
            sampler_logp if settings.is_batch_reused else logp.detach(),
            batch.advantage_M[at],
            batch.weight_M[at],
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            importance_M=importance_weights(logp, sampler_logp, cap) if cap else None,
            ref_logp_M=None if ref_logp_M is None else ref_logp_M[at],
            kl_coef=settings.kl_coef,
            kl=settings.kl,
        )
        return loss

    inputs = batch.predictor_states(model), model.head_weight_VC, batch.target_M
    loss, logp_M, entropy_M = chunked_loss(*inputs, loss_of, temperature, vocab_size)
    gap_M = (logp_M - batch.sampler_logp_M).abs()
    sums = [loss.detach() / settings.loss_scale, entropy_M.sum(), is_clipped_M.sum(), gap_M.sum(), gap_M.max()]
    if reference is not None:
        sums.append(kl_estimate(logp_M, ref_logp_M, "k3").sum())
    n_packed, n_tokens = len(batch.ids_N), len(batch.target_M)
    n_pairs = attended_pairs(batch.cu_seqlens_B1, batch.parent_B)
    return loss, ((n_packed, n_tokens, model.training_flops(n_packed, n_pairs, n_tokens)), torch.stack(sums))


@dataclass(frozen=True)
class BatchTerms:
    """Sums over the tokens of one micro-batch, for the step's metrics."""

    n_packed: int  # tokens, prompts included
    n_tokens: int  # with a loss; the sums below are over these
    flops: float  # of the model (see Transformer.training_flops)
    loss: float
    entropy: float
    clipped: float
    gap: float  # |log-probability of the trainer - of the sampler|
    gap_max: float
    kl: float | None = None


def step_metrics(updates: list[list[BatchTerms]]) -> dict[str, float]:
    """Means a token over all updates of a step, one inner list an update; only the counts where there was none.

    The gap between sampler and trainer is taken from the first update, before which both hold the same weights.
    """
    terms = [term for update in updates for term in update]
    if not terms:
        return {"learned_tokens": 0, "learn_flops": 0.0}
    n_tokens = sum(term.n_tokens for term in terms)
    kl = {} if terms[0].kl is None else {"kl": sum(term.kl for term in terms) / n_tokens}
    return kl | {
        "loss": sum(term.loss for term in terms) / len(updates),
        "entropy": sum(term.entropy for term in terms) / n_tokens,
        "clipped": sum(term.clipped for term in terms) / n_tokens,
        "logp_gap_mean": sum(term.gap for term in updates[0]) / sum(term.n_tokens for term in updates[0]),
        "logp_gap_max": max(term.gap_max for term in updates[0]),
        "learned_tokens": sum(term.n_packed for term in terms),
        "learn_flops": sum(term.flops for term in terms),
    }


def describe(rollouts_PG: list[list[Rollout]], advantages_PG: list[list[float | None]]) -> dict[str, float | None]:
    """Rewards, lengths and groups of a step's rollouts, as metrics."""
    flat = [rollout for group in rollouts_PG for rollout in group]
    lengths = [len(rollout.completion.ids) for rollout in flat]
    parts = {name: mean(rollout.parts[name] for rollout in flat) for name in flat[0].parts}
    return {
        "reward": mean(rollout.reward for rollout in flat),
        **parts,
        "response_tokens": mean(lengths),
        "response_tokens_max": max(lengths),
        "truncated": mean(float(rollout.completion.finish == "length") for rollout in flat),
        "rollouts": len(flat),
        "unjudged": sum(rollout.reward is None for rollout in flat),
        "groups": len(rollouts_PG),
        "dropped_groups": sum(not any(advantages) for advantages in advantages_PG),
    }


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
