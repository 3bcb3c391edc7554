"""KV-cache generation for many ragged requests at once.

A request is one completion of one prompt. Requests wait in line for a row of the cache; all active rows advance by one
token a step. When rows finish, the last active rows are moved into their places, so that the active rows are always
0..B-1 and a finished request costs nothing, and the freed rows go to the next requests in line. A prompt is prefilled
once; its keys and values are copied to each of its n rows.

The randomness of a token depends on (seed, prompt index, completion index, position) alone, so a request draws the same
numbers whichever row or batch it runs in. The logits may still differ in their last bits with the shape of the batch
(floating-point sums are not associative), and a draw that falls between the two then gives another token.

Letters: P prompts, R requests, B active rows, L new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanor1.model import KVCache, Transformer

PREFILL_TOKENS = 16_384  # prompts are prefilled in batches of at most about this many tokens


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
    `seed` is one number, or one a prompt. At most `max_rows` requests run at once. `on_token(prompt, completion, id)`
    hears of each token as it is made. Raises ValueError for an empty prompt or one that leaves no room to answer.
    """
    _check(model, prompts, n, max_new_tokens, temperature, top_k, top_p, stop_texts, decode)
    if not prompts:
        return []
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
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

    `uniform_B` is in [0, 1). The log-probability is that of softmax(logits / temperature) over all tokens, which is
    what a trainer computes; top-k and top-p narrow the draw only. Temperature 0 takes the largest logit.
    """
    logp_BV = F.log_softmax(logits_BV if temperature == 0 else logits_BV / temperature, dim=-1)
    if temperature == 0:
        token_B = logits_BV.argmax(-1)
    else:
        cdf_BV = _narrow(logp_BV.exp(), top_k, top_p).cumsum(-1)
        # the first token whose cumulative probability exceeds the threshold: never one of probability 0
        token_B = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True).squeeze(1)
    return token_B, logp_BV.gather(-1, token_B[:, None]).squeeze(1)


def _narrow(p_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero the probabilities outside the k largest, and outside the smallest set that holds top_p of the rest."""
    if 0 < top_k < p_BV.shape[-1]:
        p_BV = torch.where(p_BV < p_BV.topk(top_k).values[:, -1:], 0.0, p_BV)
    if top_p < 1.0:
        sorted_BV, index_BV = p_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        kept_BV = torch.where(before_BV < top_p * sorted_BV.sum(-1, keepdim=True), sorted_BV, 0.0)
        p_BV = torch.zeros_like(p_BV).scatter(-1, index_BV, kept_BV)
    return p_BV


def hash_uniform(key_B: Tensor, position_B: Tensor) -> Tensor:
    """A number in [0, 1) for each (key, position), both int64: SplitMix64's finaliser (Steele et al. 2014), 24 bits."""
    x = key_B + position_B * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return _shift(x ^ _shift(x, 31), 40).to(torch.float32) * 2.0**-24


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right and fill with zeros, where torch's own >> fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return (x & (2**64 - 1)) - (2**64 if x & 2**63 else 0)


def _key(seed: int, prompt: int, completion: int) -> int:
    """The key of a request's random numbers: SplitMix64 of its parts, folded one by one, on the host."""
    x = 0
    for part in (seed, prompt, completion):
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
        self.ids_RL = torch.zeros(self.n_requests, max_new_tokens, dtype=torch.int32, device=self.device)
        self.logp_RL = torch.zeros(self.n_requests, max_new_tokens, device=self.device)
        self.length_R = torch.zeros(self.n_requests, **long)
        self.is_stopped_R = torch.zeros(self.n_requests, dtype=torch.bool, device=self.device)
        self.start_R = torch.tensor([len(prompt) for prompt in prompts], **long).repeat_interleave(n)
        self.limit_R = (context - self.start_R).clamp(max=max_new_tokens)
        self.key_R = torch.tensor([_key(seeds[p], p, g) for p in range(len(prompts)) for g in range(n)], **long)
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
        """Run the next prompts, as many as free rows will want and a budget of tokens allows."""
        start = self.n_admitted // self.n
        stop, n_tokens = start + 1, len(self.prompts[start])
        while (stop - start) * self.n < self.n_free and n_tokens + len(self.prompts[stop]) <= PREFILL_TOKENS:
            n_tokens += len(self.prompts[stop])
            stop += 1
        prompts = self.prompts[start:stop]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        cu_seqlens_B1 = F.pad(lengths.cumsum(0), (1, 0))
        ids_N = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        config, dtype = self.model.config, self.cache.k[0].dtype
        self.prefilled = range(start, stop)
        self.prefilled_cache = KVCache(config, len(prompts), int(lengths.max()), dtype, self.device)
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
        """Whether the row's last tokens, of which each text could at most be made, hold one of the texts."""
        n_tail = max(len(text.encode()) for text in texts) + 4  # a token holds a byte or more; 4 for a cut character
        found = []
        for request in self.request[rows].tolist():
            end = int(self.length_R[request])
            tail = decode(self.ids_RL[request, max(0, end - n_tail) : end].tolist())
            found.append(any(text in tail for text in texts))
        return torch.tensor(found, device=self.device)

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
        lengths, is_stopped = self.length_R.tolist(), self.is_stopped_R.tolist()
        flat = [
            Completion(ids[:length], logp[:length], "stop" if stopped else "length")
            for ids, logp, length, stopped in zip(
                self.ids_RL.tolist(), self.logp_RL.tolist(), lengths, is_stopped, strict=True
            )
        ]
        return [flat[i : i + self.n] for i in range(0, len(flat), self.n)]


def _check(model, prompts, n, max_new_tokens, temperature, top_k, top_p, stop_texts, decode) -> None:
    context = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; a prompt needs at least one token")
        if len(prompt) >= context:
            raise ValueError(
                f"prompt {i} is {len(prompt)} tokens; the model's context is {context}: shorten the prompt"
            )
    if n < 1 or max_new_tokens < 1:
        raise ValueError(f"n is {n} and max_new_tokens is {max_new_tokens}; both must be at least 1")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: want >= 0, >= 0 and in (0, 1]")
    if stop_texts and decode is None:
        raise ValueError("stop_texts need decode, the tokenizer's way from ids to text")
