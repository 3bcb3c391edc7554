"""The slots of a sampler: fixed memory in which decode steps work, and the steps themselves.

A slot holds one request: a row of the key/value cache and the counters that go with it. A step advances the slots of a
list by a token, entirely on the device: nothing in it depends on a length that the host knows, so that CUDA can capture
it once and replay it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from nanor1.model import Block, KVCache, Transformer, allow_programs
from nanor1.next_token import hash_uniform, sample_tokens, token_confidence
from nanor1.packing import index_tensor

CACHE_STEP = 32  # tokens by which a CPU's cache grows
# Inductor's options for the blocks of a step of one row on CUDA, whose products take as long as weights are read: with
# this one they become Triton kernels, fused with what stands before and behind, of which it tries several cuts. None:
# such a step runs as all others do.
ONE_ROW_OPTIONS: dict | None = {"coordinate_descent_tuning": True}


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from logits, and what ends a completion; ValueError for what is not possible.

    Temperature 0 is greedy. `top_k` 0 and `top_p` 1 leave all tokens; ids at or above `vocab_size` are never sampled.
    A completion ends with a token of `stop_ids`, or when its text holds one of `stop_texts` (`decode` turns ids into
    text). With `confidence_k` completions have confidences, over so many likeliest tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: Sequence[int] = ()
    vocab_size: int | None = None
    confidence_k: int = 0
    # the host's part, which is nothing to a captured step
    stop_texts: Sequence[str] = field(default=(), compare=False)
    decode: Callable[[list[int]], str] | None = field(default=None, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))  # so that steps can be told by it
        temperature, top_k, top_p = self.temperature, self.top_k, self.top_p
        if not (0 <= temperature < float("inf") and top_k >= 0 and 0 < top_p <= 1):
            raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: want >= 0, >= 0 and in (0, 1]")
        if isinstance(self.stop_texts, str) or "" in self.stop_texts:
            raise ValueError(f"stop_texts is {self.stop_texts!r}; it must be a list of texts of at least one character")
        if self.stop_texts and self.decode is None:
            raise ValueError("stop_texts need decode, the tokenizer's way from ids to text")


class Slots:
    """The cache and the state of what runs in it, by slot: fixed memory, in which captured steps work.

    The last slot is never used: it stands in for the rows that a captured step has too many.
    """

    def __init__(self, model: Transformer, n_slots: int, room: int, n_new: int, is_fixed: bool = True):
        weight = model.head_weight_VC
        self.n_slots, self.room, self.n_new_tokens = n_slots, room, n_new
        self.cache = KVCache(model, n_slots + 1, room if is_fixed else 0)
        self.index = torch.arange(n_slots + 1, device=weight.device)
        self.token = torch.zeros_like(self.index)  # the last one, which is not in the cache yet
        self.position = torch.zeros_like(self.index)  # where in the cache it will go
        self.n_new = torch.zeros_like(self.index)  # tokens made
        self.limit = torch.zeros_like(self.index)  # of n_new
        self.key = torch.zeros_like(self.index)  # of the noise
        self.is_running = torch.zeros_like(self.index, dtype=torch.bool)
        # the last column takes what rows that are not running write
        self.ids = torch.zeros(n_slots + 1, n_new + 1, dtype=torch.int32, device=weight.device)
        self.logp = torch.zeros(n_slots + 1, n_new + 1, device=weight.device)
        self.confidence = torch.zeros_like(self.logp)
        is_cuda = weight.device.type == "cuda"
        if is_cuda:
            allow_programs()
        self.graph_pool = torch.cuda.graph_pool_handle() if is_cuda else None
        # in a step, where it would be some 50 small kernels; not bound to this object, which would outlive its use
        self.record_step = torch.compile(Slots.record, dynamic=True) if is_cuda else Slots.record

    def start(self, slot_B: Tensor, token_B: Tensor, position_B: Tensor, limit_B: Tensor, key_B: Tensor) -> None:
        self.token[slot_B], self.position[slot_B] = token_B, position_B
        self.limit[slot_B], self.key[slot_B] = limit_B, key_B
        self.n_new[slot_B], self.is_running[slot_B] = 0, True

    def record(self, slots: slice | Tensor, logits_BV: Tensor, sampling: Sampling) -> None:
        """Draw a token for each slot, and close those that stop or reach their limit; others than running ones stay."""
        n_new_B, running_B = self.n_new[slots], self.is_running[slots]
        logits_BV = logits_BV[:, : sampling.vocab_size].float()
        uniform_B = hash_uniform(self.key[slots], n_new_B)
        token_B, logp_B = sample_tokens(logits_BV, uniform_B, sampling.temperature, sampling.top_k, sampling.top_p)
        slot_B, column_B = self.index[slots], torch.where(running_B, n_new_B, self.n_new_tokens)
        self.ids[slot_B, column_B], self.logp[slot_B, column_B] = token_B.int(), logp_B
        if sampling.confidence_k:
            confidence_B = token_confidence(logits_BV, token_B, logp_B, sampling.temperature, sampling.confidence_k)
            self.confidence[slot_B, column_B] = confidence_B
        self.token[slots] = token_B
        n_new_B = n_new_B + running_B
        stopped_B = torch.zeros_like(running_B)
        for stop in sampling.stop_ids:
            stopped_B |= token_B == stop
        self.is_running[slots] = running_B & ~stopped_B & (n_new_B < self.limit[slots])
        self.n_new[slots] = n_new_B

    def decode(
        self, model: Transformer, slots: slice | Tensor, max_len: int, sampling: Sampling, run_block=None
    ) -> None:
        """Advance slots by a token: those of a list, or the first ones, as a slice; idle ones cost as much."""
        token_B, position_B, running_B = self.token[slots], self.position[slots], self.is_running[slots]
        slot_B = slots if isinstance(slots, Tensor) else None
        hidden_BC = model.decode(token_B, position_B, self.cache, max_len, slot_B, running_B, run_block)
        self.position[slots] = position_B + running_B
        self.record_step(self, slots, model.logits(hidden_BC), sampling)

    def extend(self, length: int) -> int:
        """See that the cache holds so many tokens a row, of at most `room`; returns how many keys attention looks at.

        A cache that is not fixed grows with its longest row, a few tokens at a time: oneDNN multiplies rows of bf16 as
        they lie where they are read to their end, and copies them first where not.
        """
        if length > self.cache.max_len:
            self.cache.resize(min(self.room, -(-length // CACHE_STEP) * CACHE_STEP))
        return length if self.cache.k[0].dtype == torch.float32 else self.cache.max_len

    def look(self) -> Callable[[], list[list[int]]]:
        """How far slots are, once asked: is_running and n_new of each; on CUDA copied while the device goes on."""
        state_2S = torch.stack((self.is_running.long(), self.n_new))
        if not state_2S.is_cuda:
            return state_2S.tolist
        copied_2S = torch.empty(state_2S.shape, dtype=torch.int64, pin_memory=True).copy_(state_2S, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def read() -> list[list[int]]:
            arrived.synchronize()
            return copied_2S.tolist()

        return read

    def move(self, from_B: Tensor, to_B: Tensor) -> None:
        """Move what runs in some slots into others."""
        self.cache.copy_rows(self.cache, from_B, to_B, int(self.position[from_B].max()))
        counters = (self.token, self.position, self.n_new, self.limit, self.key, self.is_running)
        for by_slot in (*counters, self.ids, self.logp, self.confidence):
            by_slot[to_B] = by_slot[from_B]


def slots_that_fit(model: Transformer, room: int, wanted: int, budget: int) -> int:
    """How many slots of `room` tokens, at most `wanted`, fit into `budget` bytes; ValueError if not one does."""
    config, weight = model.config, model.head_weight_VC
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * room * weight.element_size()
    logits = 4 * 4 * config.vocab_size  # in fp32, with the copies that drawing a token makes
    fitting = min(wanted, budget // (cache + logits) - 1)  # one more slot stands in for rows that are too many
    if fitting < 1:
        raise ValueError(
            f"the key/value cache of one request of {room} tokens takes {2 * (cache + logits) / 2**30:.2f} GiB with "
            f"its spare, and {budget / 2**30:.2f} GiB may be used: lower max_new_tokens, or shorten the prompts"
        )
    return fitting


class Step:
    """A decode step over a fixed number of slots; on CUDA captured in a graph, elsewhere run as it is.

    A captured step is a recording of kernels on fixed memory: it stays valid while the weights change in place.
    """

    def __init__(self, model: Transformer, slots: Slots, n_rows: int, sampling: Sampling):
        self.slot_B = torch.full((n_rows,), slots.n_slots, device=slots.token.device)
        self.spare, self.graph, self.listed = slots.n_slots, None, None
        is_cuda = self.slot_B.device.type == "cuda"
        run_block = None
        if is_cuda and n_rows == 1 and ONE_ROW_OPTIONS:  # dynamic: the cache may grow; a 1 is taken for a constant
            run_block = torch.compile(Block.forward, dynamic=True, options=ONE_ROW_OPTIONS)
        self.run = partial(slots.decode, model, self.slot_B, slots.room, sampling, run_block)
        if is_cuda:
            self.capture(slots)

    def capture(self, slots: Slots) -> None:
        with torch.cuda.device(self.slot_B.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compile and load everything before it is recorded; no slot is touched
                self.run()
                self.run()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=slots.graph_pool):
                self.run()

    def __call__(self, slots: list[int], n_steps: int) -> None:
        if slots != self.listed:  # most looks find that nothing has ended
            idle = [self.spare] * (len(self.slot_B) - len(slots))
            self.slot_B.copy_(index_tensor(slots + idle, self.slot_B.device))
            self.listed = slots
        for _ in range(n_steps):
            self.graph.replay() if self.graph else self.run()
