"""Group-relative policy optimization: advantages, packing, loss.

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

Letters: P problems, G completions a problem, B sequences, N packed tokens, M tokens with a loss.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanor1.logprobs import token_logprobs
from nanor1.parallel import Workers


@dataclass(frozen=True)
class Rollout:
    """One judged completion; `reward` is None where it could not be judged."""

    problem: Any
    prompt_ids: list[int]
    completion: Any  # ids, logprobs, finish
    text: str
    reward: float | None
    parts: dict[str, float | None]


@dataclass(frozen=True)
class PackedBatch:
    """Rollouts laid end to end; the loss falls on completion tokens alone."""

    rollout_B: Tensor  # int64: which of the rollouts given to `pack` each sequence is
    ids_N: Tensor  # int64
    cu_seqlens_B1: Tensor  # int64
    loss_mask_N: Tensor  # bool: completion tokens, the stop token included
    advantage_N: Tensor  # fp32, and so the two below
    sampler_logp_N: Tensor
    weight_N: Tensor  # of each token in the step's loss: sums to 1 over all batches of a step (see `token_weights`)

    def to(self, device) -> "PackedBatch":
        return PackedBatch(*(x.to(device) for x in vars(self).values()))


def group_advantages(rewards_PG: list[list[float | None]], normalize: str = "mean") -> list[list[float | None]]:
    """Reward minus the group's mean; with `normalize="std"` also divided by the group's deviation (G - 1 in it).

    A reward of None is left out of its group's mean and its advantage is None. A group in which all rewards are equal,
    or fewer than two are known, gets exactly 0 (and is worth no forward pass). DeepSeekMath, section 4.1.2.

    >>> group_advantages([[1.0, 0.0, 0.0, 1.0], [1.0, None, 1.0, 1.0]])
    [[0.5, -0.5, -0.5, 0.5], [0.0, None, 0.0, 0.0]]
    """
    if normalize not in ("mean", "std"):
        raise ValueError(f"advantage normalization is {normalize!r}; choose mean or std")
    return [_center(rewards, normalize) for rewards in rewards_PG]


def _center(rewards: list[float | None], normalize: str) -> list[float | None]:
    known = [r for r in rewards if r is not None]
    if len(set(known)) <= 1:
        return [None if r is None else 0.0 for r in rewards]
    mean = sum(known) / len(known)
    scale = 1.0
    if normalize == "std":
        scale = (sum((r - mean) ** 2 for r in known) / (len(known) - 1)) ** 0.5 + 1e-6
    return [None if r is None else (r - mean) / scale for r in rewards]


def token_weights(lengths: list[int], aggregate: str, constant_length: int | None = None) -> list[float]:
    """The weight of each sequence's tokens in the loss of one optimizer step, given all its completion lengths.

    "token": 1 / all tokens; "sequence": 1 / (sequences * own length); "constant": 1 / (sequences * constant_length).
    Computed over the whole step, so that the split into micro-batches changes nothing.

    >>> token_weights([1, 3], "token"), token_weights([1, 3], "sequence"), token_weights([1, 3], "constant", 4)
    ([0.25, 0.25], [0.5, 0.16666666666666666], [0.125, 0.125])
    """
    if aggregate == "token":
        return [1 / sum(lengths)] * len(lengths)
    if aggregate == "sequence":
        return [1 / (len(lengths) * length) for length in lengths]
    if aggregate == "constant":
        return [1 / (len(lengths) * constant_length)] * len(lengths)
    raise ValueError(f"aggregate is {aggregate!r}; choose token, sequence or constant")


def pack(
    rollouts: list[Rollout], advantages: list[float], weights: list[float], tokens_per_batch: int
) -> list[PackedBatch]:
    """Lay rollouts end to end, longest first, in batches of at most `tokens_per_batch` tokens (or of one rollout).

    Neighbours of equal length waste least where attention pads, and the largest batch comes first, so that a run that
    does not fit in memory fails at once.
    """
    order = sorted(range(len(rollouts)), key=lambda i: -_n_tokens(rollouts[i]))
    batches, current, n_tokens = [], [], 0
    for i in order:
        if current and n_tokens + _n_tokens(rollouts[i]) > tokens_per_batch:
            batches.append(current)
            current, n_tokens = [], 0
        current.append(i)
        n_tokens += _n_tokens(rollouts[i])
    batches += [current] if current else []
    return [_pack_one([(i, rollouts[i], advantages[i], weights[i]) for i in batch]) for batch in batches]


def _n_tokens(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.completion.ids)


def _pack_one(items: list[tuple[int, Rollout, float, float]]) -> PackedBatch:
    ids, is_trained, advantage, logp, weight, ends = [], [], [], [], [], [0]
    for _, rollout, a, w in items:
        n_prompt, n_completion = len(rollout.prompt_ids), len(rollout.completion.ids)
        ids += rollout.prompt_ids
        ids += rollout.completion.ids
        is_trained += [False] * n_prompt + [True] * n_completion
        advantage += [0.0] * n_prompt + [a] * n_completion
        logp += [0.0] * n_prompt
        logp += rollout.completion.logprobs
        weight += [0.0] * n_prompt + [w] * n_completion
        ends.append(len(ids))
    return PackedBatch(
        torch.tensor([i for i, *_ in items]),
        torch.tensor(ids),
        torch.tensor(ends),
        torch.tensor(is_trained),
        *map(torch.tensor, (advantage, logp, weight)),
    )


def completion_logprobs(model, batch: PackedBatch, temperature: float, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The model's log-probability of each completion token, and its entropy there: fp32 [M], in packed order."""
    hidden_NC = model(batch.ids_N, batch.cu_seqlens_B1)
    at_M = batch.loss_mask_N.nonzero().squeeze(1)  # a token is predicted by the hidden state before it
    return token_logprobs(hidden_NC[at_M - 1], model.head_weight_VC, batch.ids_N[at_M], temperature, vocab_size)


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
    ratio is then 1, no clip is in force, and the loss's value is minus the mean advantage, zero by construction, while
    its gradient is the policy gradient. `importance_M` multiplies a token's loss (no gradient): the truncated weight of
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
    is_batch_reused: bool = False  # several updates a batch: the ratio is to the sampler, and the clip is in force
    clip_low: float = 0.2
    clip_high: float = 0.28
    importance_cap: float = 0.0
    kl_coef: float = 0.0
    kl: str = "k2"


def add_gradient(
    workers: Workers, reference, rollouts: list[Rollout], advantages: list[float], settings: LossSettings
) -> list["BatchTerms"]:
    """Add the gradient of one optimizer update to the parameters, micro-batch by micro-batch.

    `reference` is the model of the KL term, or None. Returns what each micro-batch adds to the step's metrics.
    """
    lengths = [len(rollout.completion.ids) for rollout in rollouts]
    weights = token_weights(lengths, settings.aggregate, settings.constant_length)
    batches = pack(rollouts, advantages, weights, settings.tokens_per_batch)
    terms = workers.map(lambda model, batch: _backward(model, reference, batch, settings), batches)
    workers.gather_gradients()
    return terms


def _backward(model, reference, batch: PackedBatch, settings: LossSettings) -> "BatchTerms":
    batch = batch.to(model.head_weight_VC.device)
    mask, sampler_logp_M = batch.loss_mask_N, batch.sampler_logp_N[batch.loss_mask_N]
    logp_M, entropy_M = completion_logprobs(model, batch, settings.temperature, settings.vocab_size)
    importance_M = ref_logp_M = None
    if settings.importance_cap:
        importance_M = importance_weights(logp_M, sampler_logp_M, settings.importance_cap)
    if reference is not None:
        with torch.no_grad():
            ref_logp_M, _ = completion_logprobs(reference, batch, settings.temperature, settings.vocab_size)
    loss, is_clipped_M = policy_loss(
        logp_M,
        sampler_logp_M if settings.is_batch_reused else logp_M.detach(),
        batch.advantage_N[mask],
        batch.weight_N[mask],
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        importance_M=importance_M,
        ref_logp_M=ref_logp_M,
        kl_coef=settings.kl_coef,
        kl=settings.kl,
    )
    loss.backward()
    logp_M = logp_M.detach()
    gap_M = (logp_M - sampler_logp_M).abs()
    return BatchTerms(
        n_packed=len(batch.ids_N),
        n_tokens=len(logp_M),
        loss=float(loss.detach()),
        entropy=float(entropy_M.sum()),
        clipped=float(is_clipped_M.sum()),
        gap=float(gap_M.sum()),
        gap_max=float(gap_M.max()),
        kl=None if ref_logp_M is None else float(kl_estimate(logp_M, ref_logp_M, "k3").sum()),
    )


@dataclass(frozen=True)
class BatchTerms:
    """Sums over the tokens of one micro-batch, for the step's metrics."""

    n_packed: int  # tokens, prompts included
    n_tokens: int  # with a loss; the sums below are over these
    loss: float
    entropy: float
    clipped: float
    gap: float  # |log-probability of the trainer - of the sampler|
    gap_max: float
    kl: float | None


def step_metrics(updates: list[list[BatchTerms]]) -> dict[str, float]:
    """Means a token over all updates of a step, one inner list an update; only the count where there was none.

    The gap between sampler and trainer is taken from the first update, before which both hold the same weights.
    """
    terms = [term for update in updates for term in update]
    if not terms:
        return {"learned_tokens": 0}
    n_tokens = sum(term.n_tokens for term in terms)
    kl = {} if terms[0].kl is None else {"kl": sum(term.kl for term in terms) / n_tokens}
    return kl | {
        "loss": sum(term.loss for term in terms) / len(updates),
        "entropy": sum(term.entropy for term in terms) / n_tokens,
        "clipped": sum(term.clipped for term in terms) / n_tokens,
        "logp_gap_mean": sum(term.gap for term in updates[0]) / sum(term.n_tokens for term in updates[0]),
        "logp_gap_max": max(term.gap_max for term in updates[0]),
        "learned_tokens": sum(term.n_packed for term in terms),
    }
