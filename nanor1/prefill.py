"""Reading prompts: their keys and values in a cache, and the hidden state that their first new token is drawn from.

Prompts are read through the packed forward of training. What a cache already holds of a prompt is taken from there, and
only the rest is read: behind a completion that was kept, and behind what many prompts begin with, such as worked
examples.

Letters: B prompts, N packed tokens, C hidden width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from nanor1.model import KVCache, Transformer
from nanor1.packing import end_to_end, index_tensor, to_device

MIN_SHARED = 32  # tokens that prompts begin with, from which on they are read once


@dataclass(frozen=True)
class Kept:
    """The keys and values of some tokens: a row of a cache, which lives as long as somebody holds this."""

    cache: KVCache
    row: int
    ids: Sequence[int]

    def n_shared(self, prompt: Sequence[int]) -> int:
        """How many tokens a prompt begins with that are kept; never its last one, whose hidden state is wanted."""
        most = min(len(self.ids), len(prompt) - 1)
        return next((i for i in range(most) if self.ids[i] != prompt[i]), most)


def take_over(
    model: Transformer, prompts: Sequence[Sequence[int]], behind: Sequence[Kept | None]
) -> tuple[KVCache, list[int]]:
    """A cache with a row a prompt, and how many of its first tokens stand there: those that are kept."""
    cache, device = KVCache(model, len(prompts), max(map(len, prompts))), model.head_weight_VC.device
    index = partial(index_tensor, device=device)
    past = [kept.n_shared(prompt) if kept else 0 for prompt, kept in zip(prompts, behind, strict=True)]
    for source in {id(kept.cache): kept.cache for kept in behind if kept}.values():
        rows = [b for b, kept in enumerate(behind) if kept and kept.cache is source]
        cache.copy_rows(source, index(behind[b].row for b in rows), index(rows), max(past[b] for b in rows))
    return cache, past


def prefill(
    model: Transformer, prompts: Sequence[Sequence[int]], behind: Sequence[Kept | None]
) -> tuple[KVCache, Tensor]:
    """Read each prompt, from where it leaves what is kept, all at once.

    Returns a cache with a row a prompt, and the hidden state of the last token of each, [B, C].
    """
    cache, past = take_over(model, prompts, behind)
    device = cache.k[0].device
    new = [prompt[n:] for prompt, n in zip(prompts, past, strict=True)]
    cu_seqlens_B1 = torch.tensor([0, *accumulate(map(len, new))])
    past_B = torch.tensor(past) if any(past) else None
    hidden_NC = model(to_device(end_to_end(new), device), cu_seqlens_B1, cache, past_B=past_B)
    return cache, hidden_NC[to_device(cu_seqlens_B1[1:] - 1, device)]


def read_beginning(model: Transformer, prompts: Sequence[Sequence[int]]) -> Kept | None:
    """What all prompts begin with, read; None where that is too little."""
    n = n_common(prompts)
    if n < MIN_SHARED:
        return None
    cache, _ = prefill(model, [prompts[0][:n]], [None])
    return Kept(cache, 0, prompts[0][:n])


def n_common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, of which none is a whole prompt; 0 for fewer than two.

    >>> n_common([[7, 8, 1], [7, 8, 2, 3], [7, 8]])
    1
    """
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in the order of a dictionary, so all others agree as far as these do
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)
