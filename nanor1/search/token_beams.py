"""The classic beam search over tokens, for likely text: the reference that searches over steps are compared with.

All prompts are searched at once. The live beams of all of them are the first rows of one cache; a beam that goes on
stays in its parent's row if it can, and of the others whole rows are copied.

Left out: penalties of length and of likeness, sampling within the beam.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanor1.model import KVCache, Transformer
from nanor1.packing import index_tensor
from nanor1.sampler import Completion, prefill, read_beginning
from nanor1.search.step_beams import Found


@dataclass
class _TokenBeam:
    """The beam behind one prompt: its live ones, the row of the cache that each goes on from, and finished ones."""

    n_prompt: int
    limit: int  # tokens of an answer
    width: int
    rows: list[int]
    live: list[Completion] = field(default_factory=lambda: [Completion([], [], "length")])
    finished: list[Completion] = field(default_factory=list)
    n_sampled: int = 0

    def grow(self, logits_BV: Tensor, stop_ids: Sequence[int]) -> None:
        """Go on with the likeliest continuations of all live beams by a token; none lives on where the search ends."""
        logp_BV, V = logits_BV.log_softmax(-1), logits_BV.shape[1]
        before_B1 = torch.tensor([[total_logprob(made)] for made in self.live], device=logits_BV.device)
        best = (before_B1 + logp_BV).flatten().topk(min(self.width, logp_BV.numel())).indices
        parents, live, rows = self.live, [], []
        is_last = len(parents[0].ids) + 1 == self.limit
        for i, logp in zip(best.tolist(), logp_BV.flatten()[best].tolist(), strict=True):
            parent, token = parents[i // V], i % V
            finish = "stop" if token in stop_ids else "length"
            made = Completion([*parent.ids, token], [*parent.logprobs, logp], finish)
            if finish == "length":
                live.append(made)
                rows.append(self.rows[i // V])
            if finish == "stop" or is_last:
                self.finished.append(made)
        self.n_sampled += len(best)
        self.finished = sorted(self.finished, key=total_logprob, reverse=True)[: self.width]
        is_over = len(self.finished) == self.width and all(  # a live one only loses log-probability
            total_logprob(made) <= total_logprob(self.finished[-1]) for made in live
        )
        self.live, self.rows = ([], []) if is_last or is_over else (live, rows)


@torch.inference_mode()
def token_beam_search(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    width: int,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    on_progress: Callable[[int, list[int]], None] = lambda n_tokens, lengths: None,
) -> list[Found]:
    """The classic beam search, for likely text: keep the `width` likeliest continuations of a prompt at each token.

    Returns of each prompt at most `width` answers by log-probability. One that has stopped leaves the beam; a search
    ends when no live one can still beat the worst of `width` finished ones. Nothing is drawn: tokens count as sampled
    where they were kept, and `on_progress` hears after each step of how many there were, and of how many each search
    took that ended. Ids at or above `vocab_size` are never taken. All prompts are searched at once, in prompts x width
    rows of a cache. ValueError for a width or max_new_tokens below 1, and a prompt that is empty or fills the context.
    """
    context = model.config.max_position_embeddings
    for i, ids in enumerate(prompts):
        if not 0 < len(ids) < context:
            raise ValueError(f"prompt {i} is {len(ids)} tokens; want 1 to {context - 1}, the model's context less 1")
    if min(width, max_new_tokens) < 1:
        raise ValueError(f"width {width}, max_new_tokens {max_new_tokens}: want at least 1 of each")
    if not prompts:
        return []
    limits = [min(max_new_tokens, context - len(ids)) for ids in prompts]
    beams = [_TokenBeam(len(ids), limits[i], width, rows=[i]) for i, ids in enumerate(prompts)]
    model.reorder_weights()
    read, hidden_BC = prefill(model, prompts, [read_beginning(model, prompts)] * len(prompts))
    cache = KVCache(model, len(prompts) * width, max(beam.n_prompt + beam.limit for beam in beams))
    row_B = index_tensor(range(len(prompts)), hidden_BC.device)
    cache.copy_rows(read, row_B, row_B, read.max_len)
    going = beams
    while going:
        logits_BV = model.logits(hidden_BC)[:, :vocab_size].float()
        before = sum(beam.n_sampled for beam in going)
        for beam in going:
            beam.grow(logits_BV[beam.rows], stop_ids)
        on_progress(sum(beam.n_sampled for beam in going) - before, [beam.n_sampled for beam in going if not beam.live])
        if going := [beam for beam in going if beam.live]:
            hidden_BC = _decode(model, going, cache)
    return [Found(b.finished, [*map(total_logprob, b.finished)], b.n_sampled, n_prompt=b.n_prompt) for b in beams]


def total_logprob(made: Completion) -> float:
    return sum(made.logprobs)


def _decode(model: Transformer, going: list[_TokenBeam], cache: KVCache) -> Tensor:
    """Give each live beam a row, of the first ones of the cache; returns their hidden states one token on."""
    parents = [row for beam in going for row in beam.rows]
    heirs = {row: i for i, row in reversed([*enumerate(parents)]) if row < len(parents)}  # who stays in a row
    free = iter(set(range(len(parents))) - heirs.keys())
    rows = [row if heirs.get(row) == i else next(free) for i, row in enumerate(parents)]
    row_of, places = {to: row for to, row in zip(rows, parents, strict=True) if to != row}, iter(rows)
    for beam in going:
        beam.rows = [next(places) for _ in beam.live]
    last = [(beam.n_prompt + len(made.ids) - 1, made.ids[-1]) for beam in going for made in beam.live]
    positions, tokens = zip(*(place for _, place in sorted(zip(rows, last, strict=True))), strict=True)
    index = [index_tensor(numbers, cache.k[0].device) for numbers in (row_of.values(), row_of, tokens, positions)]
    from_B, to_B, token_B, position_B = index
    cache.copy_rows(cache, from_B, to_B, max(positions))
    return model.decode(token_B, position_B, cache, max(positions) + 1)
