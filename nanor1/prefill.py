"""What prompts leave behind when they are read: keys and values, and the hidden state their first token is drawn from.

Prompts are read through the packed forward of training. What all prompts of a batch begin with, such as worked
examples, is read once. A prompt that continues a kept cache takes that over, and only what follows is read.

Letters: B prompts, N packed tokens, A prompts that still have tokens to read, C hidden width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanor1.model import KVCache, Transformer

MIN_SHARED = 32  # tokens that all prompts of a batch begin with, from which on they are read once


@dataclass(frozen=True)
class Prefilled:
    """The cache of some prompts."""

    cache: KVCache
    first_row: int  # of the prompts in the cache; before it stands what they share
    hidden_BC: Tensor  # of the last token of each


def prefill(model: Transformer, prompts: Sequence[Sequence[int]]) -> Prefilled:
    """Read prompts from their beginning, all at once."""
    n_shared = n_common(prompts)
    first_row = int(n_shared >= MIN_SHARED)
    cache = _cache_for(model, first_row + len(prompts), max(map(len, prompts)))
    hidden_BC = _read_shared(model, prompts, n_shared, cache) if first_row else _read(model, prompts, cache)
    return Prefilled(cache, first_row, hidden_BC)


def prefill_behind(
    model: Transformer, prompts: Sequence[Sequence[int]], kept: KVCache, rows: Sequence[int], n_taken: Sequence[int]
) -> Prefilled:
    """Take over the first `n_taken` tokens of each prompt from a row of `kept`, and read on, token by token, of all
    prompts at once."""
    B, device = len(prompts), model.head_weight_VC.device
    cache = _cache_for(model, B, max(map(len, prompts)))
    cache.copy_rows(kept, _index(rows, device), _index(range(B), device), max(n_taken))
    hidden_BC: list[Tensor] = [torch.empty(0)] * B
    for i in range(max(len(prompt) - n for prompt, n in zip(prompts, n_taken, strict=True))):
        active = [b for b in range(B) if n_taken[b] + i < len(prompts[b])]
        ids_A = _index((prompts[b][n_taken[b] + i] for b in active), device)
        position_A = _index((n_taken[b] + i for b in active), device)
        slot_A = None if len(active) == B else _index(active, device)
        hidden_AC = model.decode(ids_A, position_A, cache, max(n_taken[b] for b in active) + i + 1, slot_A)
        for b, hidden_C in zip(active, hidden_AC, strict=True):
            hidden_BC[b] = hidden_C  # the last one stays
    return Prefilled(cache, 0, torch.stack(hidden_BC))


def n_common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, of which none is a whole prompt; 0 for a single one.

    >>> n_common([[7, 8, 1], [7, 8, 2, 3], [7, 8]])
    1
    """
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in the order of a dictionary, so all others agree as far as these do
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def _read(
    model: Transformer, prompts: Sequence[Sequence[int]], cache: KVCache, parent_B: Tensor | None = None
) -> Tensor:
    """Run whole prompts into rows of the cache; the hidden state of the last token of each: [B, C]."""
    device = model.head_weight_VC.device
    cu_seqlens_B1 = F.pad(_index(map(len, prompts), device).cumsum(0), (1, 0))
    ids_N = _index((token for prompt in prompts for token in prompt), device)
    return model(ids_N, cu_seqlens_B1, cache, parent_B)[cu_seqlens_B1[1:] - 1]


def _read_shared(model: Transformer, prompts: Sequence[Sequence[int]], n_shared: int, cache: KVCache) -> Tensor:
    """The same of prompts whose first tokens are read once, into the row before theirs."""
    parent_B = _index([-1] + [0] * len(prompts), cache.k[0].device)
    hidden_BC = _read(model, [prompts[0][:n_shared], *(prompt[n_shared:] for prompt in prompts)], cache, parent_B)
    row_B = _index(range(1, len(prompts) + 1), cache.k[0].device)
    cache.copy_rows(cache, row_B * 0, row_B, n_shared)
    return hidden_BC[1:]


def _cache_for(model: Transformer, n_rows: int, room: int) -> KVCache:
    return KVCache(model.config, n_rows, room, model.head_weight_VC.dtype, model.head_weight_VC.device)


def _index(numbers: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64, device=device)
