"""Which token is drawn: counter-based noise, and one number turned into a token of a distribution.

A token is drawn by inverting the cumulative distribution with one number in [0, 1), which is a hash of a request's key
and the token's position. So a draw depends on nothing else: not on the batch, not on what was drawn before elsewhere.
"""

import torch
from torch import Tensor

BLOCK = 1024  # a vocabulary larger than this is drawn from in two steps: a block of it, then a token of the block
PART = 2**20  # logits of which a CPU's caches hold what is made of them


def sample_tokens(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw a token a row from fp32 logits by inverting its cumulative distribution; returns (token_B int64, logp_B).

    `uniform_B` is in [0, 1); its dtype is that of the sums (see hash_uniform). The log-probability is that of
    softmax(logits / temperature) over all tokens, which is what a trainer computes; top-k and top-p narrow the draw
    only. Temperature 0 takes the largest logit. On a CPU a few rows are drawn at a time.
    """
    n_rows = max(1, PART // logits_BV.shape[-1])
    if logits_BV.device.type == "cpu" and len(logits_BV) > n_rows:
        parts = zip(logits_BV.split(n_rows), uniform_B.split(n_rows), strict=True)
        tokens, logps = zip(*(sample_tokens(*part, temperature, top_k, top_p) for part in parts), strict=True)
        return torch.cat(tokens), torch.cat(logps)
    if temperature not in (0, 1):
        logits_BV = logits_BV / temperature
    max_B1 = logits_BV.amax(-1, keepdim=True)
    weight_BV = (logits_BV - max_B1).exp_()  # probabilities but for their sum
    block_sums = _block_sums(weight_BV)
    sum_B = block_sums.sum(-1)
    if temperature == 0:
        token_B = logits_BV.argmax(-1)
    else:
        weight_BV = narrow(weight_BV, top_k, top_p)
        is_narrowed = top_k or top_p < 1
        token_B = _draw(weight_BV, _block_sums(weight_BV) if is_narrowed else block_sums, uniform_B)
    return token_B, (logits_BV.gather(-1, token_B[:, None]) - max_B1).squeeze(1) - sum_B.log()


def token_confidence(logits_BV: Tensor, token_B: Tensor, logp_B: Tensor, temperature: float, k: int) -> Tensor:
    """Minus the mean log-probability of the k likeliest tokens: fp32 [B], larger where the model is surer.

    `token_B` and its log-probability `logp_B` are what `sample_tokens` drew from these logits; they spare a second sum
    over the vocabulary. Source: DeepConf (Fu et al. 2025, 2508.15260), equation 2.
    """
    likeliest_B = logits_BV.topk(min(k, logits_BV.shape[-1]), sorted=False).values.mean(-1)
    return (logits_BV.gather(-1, token_B[:, None]).squeeze(1) - likeliest_B) / (temperature or 1.0) - logp_B


def narrow(weight_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero the weights outside the k largest, and outside the fewest that hold top_p of the rest.

    Of equal ones at the border as many are kept as there is room for, so top_k leaves k whatever the ties. top_p alone
    sorts the vocabulary: how many tokens it keeps is known only afterwards, and a captured step cannot ask.
    """
    if 0 < top_k < weight_BV.shape[-1]:
        kept, index = weight_BV.topk(top_k)  # in order
    elif top_p < 1.0:
        kept, index = weight_BV.sort(dim=-1, descending=True, stable=True)
    else:
        return weight_BV
    if top_p < 1.0:
        before = kept.cumsum(-1) - kept
        before[:, 0] = -1.0  # the largest is kept whatever is rounded
        kept = torch.where(before < top_p * kept.sum(-1, keepdim=True), kept, 0.0)
    return torch.zeros_like(weight_BV).scatter(-1, index, kept)


def _block_sums(weight_BV: Tensor) -> Tensor:
    """The sum of each BLOCK of neighbours, the last of which may be shorter: [B, blocks]."""
    n_whole = weight_BV.shape[-1] // BLOCK * BLOCK
    sums = weight_BV[:, :n_whole].unflatten(-1, (n_whole // BLOCK, BLOCK)).sum(-1)
    if n_whole == weight_BV.shape[-1]:
        return sums
    return torch.cat((sums, weight_BV[:, n_whole:].sum(-1, keepdim=True)), dim=-1)


def _draw(weight_BV: Tensor, block_sums: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the cumulated weight passes `uniform_B` of the whole; never one of weight 0.

    First a block is drawn, then a token of it: one running sum in fp32 over 150,000 tokens is too coarse for a third of
    them ever to be drawn, and one in fp64 takes longer than the softmax.
    """
    block_B, uniform_B = _invert(block_sums, uniform_B)
    V = weight_BV.shape[-1]
    column = block_B[:, None] * BLOCK + torch.arange(min(BLOCK, V), device=weight_BV.device)
    inside = weight_BV.gather(-1, column.clamp(max=V - 1)).masked_fill(column >= V, 0.0)
    return block_B * BLOCK + _invert(inside, uniform_B)[0]


def _invert(weight_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """The first index whose cumulated weight exceeds `uniform_B` of the sum, and how far into it that is, in [0, 1)."""
    cdf_BV = weight_BV.cumsum(-1, dtype=uniform_B.dtype)
    threshold_B1 = uniform_B[:, None] * cdf_BV[:, -1:]
    index_B1 = torch.searchsorted(cdf_BV, threshold_B1, right=True)
    index_B1.clamp_(max=cdf_BV.shape[-1] - 1)  # beyond the end only where a weight is NaN
    weight_B1 = weight_BV.gather(-1, index_B1)
    inside_B1 = (threshold_B1 - cdf_BV.gather(-1, index_B1) + weight_B1) / weight_B1
    return index_B1.squeeze(1), inside_B1.clamp(min=0).squeeze(1)  # rounding may leave it below 0, but never at 1


def hash_uniform(key_B: Tensor, position_B: Tensor) -> Tensor:
    """A number in [0, 1) for each (key, position), both int64: SplitMix64's finaliser (Steele et al. 2014).

    fp64 of 53 random bits; on MPS, which has no fp64, fp32 of 24: too coarse for tokens rarer than 1e-7.
    """
    dtype, bits = (torch.float32, 24) if key_B.device.type == "mps" else (torch.float64, 53)
    x = key_B + position_B * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return _shift(x ^ _shift(x, 31), 64 - bits).to(dtype) * 2.0**-bits


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right and fill with zeros, where torch's own >> fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return (x & (2**64 - 1)) - (2**64 if x & 2**63 else 0)


def request_key(*parts: int) -> int:
    """An int64 made of the parts, folded one by one with SplitMix64, on the host."""
    x = 0
    for part in parts:
        x = (x ^ part) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        x = (x ^ x >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        x ^= x >> 31
    return _signed(x)
