"""KV-cache generation for many ragged requests at once.

A request is one completion of one prompt. Requests wait in line for a row of the cache; all active rows advance by one
token a step. When rows finish, the last active rows are moved into their places, so that the active rows are always
0..B-1 and a finished request costs nothing, and the freed rows go to the next requests in line. A prompt is prefilled
once; its keys and values are copied to each of its n rows.

The randomness of a token depends on its prompt's seed (or the one seed and the prompt's index), the completion's index
and the position alone, so a request draws the same numbers whichever row or batch it runs in. The logits may still
differ in their last bits with the shape of the batch (floating-point sums are not associative), and a draw that falls
between the two then gives another token.

Letters: P prompts, R requests, B active rows, L new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanor1.model import KVCache, Transformer

PREFILL_TOKENS = 16_384  # prompts are prefilled in batches whose cache holds at most this many, or one prompt
BLOCK = 1024  # a vocabulary larger than this is drawn from in two steps: a block of it, then a token of the block


@dataclass(frozen=True)
class Completion:
    """One sampled answer: its token ids, their log-probabilities, and why it ended."""

    ids: list[int]  # the stop token included
    logprobs: list[float]  # at the sampling temperature, before top-k and top-p; those of temperature 1 when greedy
    finish: str  # "stop" or "length"


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    n: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    stop_texts: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    seed: int | Sequence[int] = 0,
    vocab_size: int | None = None,
    max_rows: int = 512,
    on_token: Callable[[int, int, int], None] | None = None,
) -> list[list[Completion]]:
    """Sample n completions of each prompt; returns one inner list a prompt, n long.

    A completion ends with a token of `stop_ids`, or when its text holds one of `stop_texts` (`decode` turns ids into
    text): finish "stop"; or after `max_new_tokens`, or at the end of the model's context: finish "length".
    Temperature 0 is greedy. `top_k` 0 and `top_p` 1 leave all tokens; ids at or above `vocab_size` are never sampled.
    `seed` is one number, or one a prompt, with which a prompt draws the same wherever it stands in the list. At most
    `max_rows` requests run at once. `on_token(prompt, completion, id)` hears of each token as it is made. Raises
    ValueError for an empty prompt or one that leaves no room to answer.
    """
    seeds = [_key(seed, p) for p in range(len(prompts))] if isinstance(seed, int) else list(seed)
    _check_requests(model, prompts, n, max_new_tokens, seeds, max_rows)
    _check_sampling(temperature, top_k, top_p, stop_texts, decode)
    if not prompts:
        return []
    with torch.inference_mode():
        batch = _Batch(model, prompts, n, max_new_tokens, seeds, max_rows)
        stop = torch.tensor(list(stop_ids), dtype=torch.int64, device=batch.device)
        while batch.n_waiting or batch.n_active:
            logits_BV, rows = batch.admit() if batch.should_admit() else batch.decode()
            token_B, logp_B = sample_tokens(
                logits_BV[:, :vocab_size].float(), batch.uniform(rows), temperature, top_k, top_p
            )
            batch.record(rows, token_B, logp_B)
            if on_token:
                for request, token in zip(batch.request[rows].tolist(), token_B.tolist(), strict=True):
                    on_token(request // n, request % n, token)
            is_stopped_B = torch.isin(token_B, stop)
            if stop_texts:
                is_stopped_B |= batch.holds_text(rows, stop_texts, decode)
            batch.retire(rows, is_stopped_B)
        return batch.completions()


def sample_tokens(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw a token a row by inverting its cumulative distribution; returns (token_B int64, logp_B fp32).

    `uniform_B` is in [0, 1); its dtype is that of the sums (see hash_uniform). The log-probability is that of
    softmax(logits / temperature) over all tokens, which is what a trainer computes; top-k and top-p narrow the draw
    only. Temperature 0 takes the largest logit.
    """
    logp_BV = F.log_softmax(logits_BV if temperature == 0 else logits_BV / temperature, dim=-1)
    if temperature == 0:
        token_B = logits_BV.argmax(-1)
    else:
        token_B = _draw(_narrow(logp_BV.exp(), top_k, top_p), uniform_B)
    return token_B, logp_BV.gather(-1, token_B[:, None]).squeeze(1)


def _narrow(p_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero the probabilities outside the k largest, and outside the fewest that hold top_p of the rest.

    Of equal ones at the border as many are kept as there is room for, so top_k leaves k whatever the ties.
    """
    if 0 < top_k < p_BV.shape[-1]:
        kept_BK, index_BK = p_BV.topk(top_k)
        p_BV = torch.zeros_like(p_BV).scatter(-1, index_BK, kept_BK)
    if top_p < 1.0:
        sorted_BV, index_BV = p_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        before_BV[:, 0] = -1.0  # the largest is kept whatever is rounded
        kept_BV = torch.where(before_BV < top_p * sorted_BV.sum(-1, keepdim=True), sorted_BV, 0.0)
        p_BV = torch.zeros_like(p_BV).scatter(-1, index_BV, kept_BV)
    return p_BV


def _draw(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the cumulated probability passes `uniform_B` of the whole; never one of probability 0.

    Of a large vocabulary first a block is drawn, then a token of it: one running sum in fp32 over 150,000 tokens is too
    coarse for a third of them ever to be drawn, and one in fp64 takes longer than the softmax.
    """
    V = p_BV.shape[-1]
    if V <= BLOCK:
        return _invert(p_BV, uniform_B)[0]
    p_BSW = F.pad(p_BV, (0, -V % BLOCK)).unflatten(-1, (-1, BLOCK))
    block_B, uniform_B = _invert(p_BSW.sum(-1), uniform_B)
    row_B = torch.arange(len(p_BV), device=p_BV.device) * p_BSW.shape[1] + block_B
    return block_B * BLOCK + _invert(p_BSW.flatten(0, 1).index_select(0, row_B), uniform_B)[0]


def _invert(weight_BN: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """The first index whose cumulated weight exceeds `uniform_B` of the sum, and how far into it that is, in [0, 1)."""
    cdf_BN = weight_BN.cumsum(-1, dtype=uniform_B.dtype)
    threshold_B1 = uniform_B[:, None] * cdf_BN[:, -1:]
    index_B1 = torch.searchsorted(cdf_BN, threshold_B1, right=True)
    index_B1.clamp_(max=cdf_BN.shape[-1] - 1)  # beyond the end only where a weight is NaN
    weight_B1 = weight_BN.gather(-1, index_B1)
    inside_B1 = (threshold_B1 - cdf_BN.gather(-1, index_B1) + weight_B1) / weight_B1
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


def _key(*parts: int) -> int:
    """An int64 made of the parts, folded one by one with SplitMix64, on the host."""
    x = 0
    for part in parts:
        x = (x ^ part) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        x = (x ^ x >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        x ^= x >> 31
    return _signed(x)


class _Batch:
    """The active rows (0..B-1 of the cache), the requests that wait, and what has been generated."""

    def __init__(self, model: Transformer, prompts, n: int, max_new_tokens: int, seeds: list[int], max_rows: int):
        self.model, self.prompts, self.n = model, prompts, n
        weight, context = model.head_weight_VC, model.config.max_position_embeddings
        self.device, self.n_requests, self.n_admitted = weight.device, len(prompts) * n, 0
        self.n_rows = min(max_rows, self.n_requests)
        self.room = min(context, max(map(len, prompts)) + max_new_tokens)
        self.cache = KVCache(model.config, self.n_rows, self.room, weight.dtype, weight.device)
        self.prefilled = range(0)  # the prompts whose keys, values and last logits are held, to be copied to their rows
        # by request
        long = dict(dtype=torch.int64, device=self.device)
        self.length_R = torch.zeros(self.n_requests, **long)
        self.is_stopped_R = torch.zeros(self.n_requests, dtype=torch.bool, device=self.device)
        self.start_R = torch.tensor([len(prompt) for prompt in prompts], **long).repeat_interleave(n)
        self.limit_R = (context - self.start_R).clamp(max=max_new_tokens)
        self.ids_RL = torch.zeros(self.n_requests, int(self.limit_R.max()), dtype=torch.int32, device=self.device)
        self.logp_RL = torch.zeros_like(self.ids_RL, dtype=torch.float32)
        self.key_R = torch.tensor([_key(seed, g) for seed in seeds for g in range(n)], **long)
        # by active row: its request and its last token, which is not in the cache yet
        self.request, self.token = torch.zeros(0, **long), torch.zeros(0, **long)

    @property
    def n_active(self) -> int:
        return len(self.request)

    @property
    def n_waiting(self) -> int:
        return self.n_requests - self.n_admitted

    @property
    def n_free(self) -> int:
        """Rows that are free and wanted."""
        return min(self.n_rows - self.n_active, self.n_waiting)

    def should_admit(self) -> bool:
        """Refill when an eighth of the rows is free, so that prompts are prefilled several at a time."""
        return self.n_free > 0 and self.n_free >= min(-(-self.n_rows // 8), self.n_waiting)

    def admit(self) -> tuple[Tensor, slice]:
        """Give free rows to the next requests; returns the logits of their first tokens and the rows."""
        if self.n_admitted >= self.prefilled.stop * self.n:
            self._prefill()
        first, last = self.n_admitted, min(self.n_admitted + self.n_free, self.prefilled.stop * self.n)
        request_B = torch.arange(first, last, device=self.device)
        source_B = request_B // self.n - self.prefilled.start
        rows = slice(self.n_active, self.n_active + last - first)
        to_rows = torch.arange(rows.start, rows.stop, device=self.device)
        self.cache.copy_rows(self.prefilled_cache, source_B, to_rows, self.prefilled_cache.k[0].shape[2])
        self.request = torch.cat((self.request, request_B))
        self.token = torch.cat((self.token, torch.zeros_like(request_B)))
        self.n_admitted = last
        return self.prefilled_logits[source_B], rows

    def _prefill(self) -> None:
        """Run the next prompts, as many as free rows will want and the budget allows; the cache is a rectangle."""
        start = self.n_admitted // self.n
        stop, longest = start + 1, len(self.prompts[start])
        while (stop - start) * self.n < self.n_free:
            longest = max(longest, len(self.prompts[stop]))
            if longest * (stop + 1 - start) > PREFILL_TOKENS:
                break
            stop += 1
        prompts = self.prompts[start:stop]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        cu_seqlens_B1 = F.pad(lengths.cumsum(0), (1, 0))
        ids_N = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        config, dtype = self.model.config, self.cache.k[0].dtype
        self.prefilled = range(start, stop)
        self.prefilled_cache = KVCache(config, len(prompts), max(map(len, prompts)), dtype, self.device)
        hidden_NC = self.model(ids_N, cu_seqlens_B1, self.prefilled_cache)
        self.prefilled_logits = self.model.logits(hidden_NC[cu_seqlens_B1[1:] - 1])

    def decode(self) -> tuple[Tensor, slice]:
        """Advance every active row by a token; returns the next token's logits and the rows."""
        position_B = self.start_R[self.request] + self.length_R[self.request] - 1
        hidden_BC = self.model.decode(self.token, position_B, self.cache, int(position_B.max()) + 1)
        return self.model.logits(hidden_BC), slice(0, self.n_active)

    def uniform(self, rows: slice) -> Tensor:
        return hash_uniform(self.key_R[self.request[rows]], self.length_R[self.request[rows]])

    def record(self, rows: slice, token_B: Tensor, logp_B: Tensor) -> None:
        request_B = self.request[rows]
        self.ids_RL[request_B, self.length_R[request_B]] = token_B.to(torch.int32)
        self.logp_RL[request_B, self.length_R[request_B]] = logp_B
        self.length_R[request_B] += 1
        self.token[rows] = token_B

    def holds_text(self, rows: slice, texts: Sequence[str], decode: Callable[[list[int]], str]) -> Tensor:
        """Whether each row's last tokens, as many as a text can be made of, hold one of the texts."""
        n_tail = max(len(text.encode()) for text in texts) + 4  # a token holds a byte or more; 4 for a cut character
        request_B1 = self.request[rows, None]
        index_BT = self.length_R[request_B1] - n_tail + torch.arange(n_tail, device=self.device)
        ids_BT, n_before_B = self.ids_RL[request_B1, index_BT.clamp(min=0)], (index_BT < 0).sum(-1)
        tails = (decode(ids[n:]) for ids, n in zip(ids_BT.tolist(), n_before_B.tolist(), strict=True))
        return torch.tensor([any(text in tail for text in texts) for tail in tails], device=self.device)

    def retire(self, rows: slice, is_stopped_B: Tensor) -> None:
        """Close the requests that stopped or reached their limit, and move the last active rows into the holes."""
        request_B = self.request[rows]
        self.is_stopped_R[request_B] = is_stopped_B
        is_active_B = torch.ones_like(self.request, dtype=torch.bool)
        is_active_B[rows] = ~is_stopped_B & (self.length_R[request_B] < self.limit_R[request_B])
        n_active = int(is_active_B.sum())
        if n_active == self.n_active:
            return
        holes = (~is_active_B[:n_active]).nonzero().squeeze(1)
        movers = is_active_B[n_active:].nonzero().squeeze(1) + n_active
        if len(holes):
            n_used = int((self.start_R + self.length_R)[self.request[movers]].max())
            self.cache.copy_rows(self.cache, movers, holes, n_used)
        self.request[holes], self.token[holes] = self.request[movers], self.token[movers]
        self.request, self.token = self.request[:n_active], self.token[:n_active]

    def completions(self) -> list[list[Completion]]:
        is_nan_R = self.logp_RL.isnan().any(-1)
        if is_nan_R.any():
            prompt = int(is_nan_R.nonzero()[0]) // self.n
            raise ValueError(f"the model's logits after prompt {prompt} are not numbers: look for nan in its weights")
        lengths, is_stopped = self.length_R.tolist(), self.is_stopped_R.tolist()
        flat = [
            Completion(ids[:length], logp[:length], "stop" if stopped else "length")
            for ids, logp, length, stopped in zip(
                self.ids_RL.tolist(), self.logp_RL.tolist(), lengths, is_stopped, strict=True
            )
        ]
        return [flat[i : i + self.n] for i in range(0, len(flat), self.n)]


def _check_requests(model, prompts, n, max_new_tokens, seeds, max_rows) -> None:
    context = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; a prompt needs at least one token")
        if len(prompt) >= context:
            raise ValueError(
                f"prompt {i} is {len(prompt)} tokens; the model's context is {context}: shorten the prompt"
            )
    if min(n, max_new_tokens, max_rows) < 1:
        raise ValueError(f"n {n}, max_new_tokens {max_new_tokens}, max_rows {max_rows}: each must be at least 1")
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one number, or one a prompt")


def _check_sampling(temperature, top_k, top_p, stop_texts, decode) -> None:
    if not (0 <= temperature < float("inf") and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: want >= 0, >= 0 and in (0, 1]")
    if isinstance(stop_texts, str) or "" in stop_texts:
        raise ValueError(f"stop_texts is {stop_texts!r}; it must be a list of texts of at least one character")
    if stop_texts and decode is None:
        raise ValueError("stop_texts need decode, the tokenizer's way from ids to text")
