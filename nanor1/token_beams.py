"""The classic beam search over tokens, for likely text: the reference that searches over steps are compared with.

All prompts are searched at once. Each has a block of `width` rows of one cache; a beam that goes on stays in its
parent's row if it can, and of the others only what stands behind the prompt is copied.

Left out: diversity penalties, sampling within the beam.

Letters: B live beams of a prompt, S searches that go on, W rows of one, R rows of all, V vocabulary, C hidden width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanor1.model import KVCache, Transformer
from nanor1.prefill import prefill, read_beginning
from nanor1.sampler import Completion
from nanor1.search import Found


@dataclass
class _TokenBeam:
    """The beam behind one prompt: its live ones, where each stands in the prompt's block of rows, and finished ones."""

    n_prompt: int
    limit: int  # tokens of an answer
    width: int
    length_penalty: float
    live: list[Completion] = field(default_factory=lambda: [Completion([], [], "length")])
    rows: list[int] = field(default_factory=lambda: [0])
    finished: list[Completion] = field(default_factory=list)
    n_sampled: int = 0

    def worth(self, made: Completion, length: int | None = None) -> float:
        return sum(made.logprobs) / (length or len(made.ids)) ** self.length_penalty

    def grow(self, logits_WV: Tensor, stop_ids: Sequence[int]) -> dict[int, int]:
        """Take the likeliest continuations; says from which row each row that changes is copied, if any lives on."""
        parents, made_B = self._likeliest(logits_WV[self.rows], stop_ids)
        is_last = len(made_B[0].ids) == self.limit
        self.n_sampled += len(made_B)
        self.finished += [made for made in made_B if made.finish == "stop" or is_last]
        self.finished = sorted(self.finished, key=self.worth, reverse=True)[: self.width]
        going_on = [(row, made) for row, made in zip(parents, made_B, strict=True) if made.finish == "length"]
        self.live = [made for _, made in going_on]
        if is_last or not self.live or (len(self.finished) == self.width and self._is_hopeless()):
            self.live = []
            return {}
        return self._place([row for row, _ in going_on])

    def _is_hopeless(self) -> bool:
        """A live one only loses log-probability, and in the end divides what it has by no more than the limit."""
        return max(self.worth(made, self.limit) for made in self.live) <= self.worth(self.finished[-1])

    def _likeliest(self, logits_BV: Tensor, stop_ids: Sequence[int]) -> tuple[list[int], list[Completion]]:
        """The continuations of all live beams by a token that are kept, best first, and the row each comes from."""
        logp_BV, V = logits_BV.log_softmax(-1), logits_BV.shape[1]
        before_B1 = torch.tensor([[sum(made.logprobs)] for made in self.live], device=logits_BV.device)
        best = (before_B1 + logp_BV).flatten().topk(min(self.width, logp_BV.numel())).indices
        parents, tokens, logps = (best // V).tolist(), (best % V).tolist(), logp_BV.flatten()[best].tolist()
        made = [
            Completion(
                [*self.live[i].ids, token], [*self.live[i].logprobs, logp], "stop" if token in stop_ids else "length"
            )
            for i, token, logp in zip(parents, tokens, logps, strict=True)
        ]
        return [self.rows[i] for i in parents], made

    def _place(self, parents: list[int]) -> dict[int, int]:
        """Give each live beam a row: its parent's to the first of several, else one that nobody goes on from."""
        free = iter([row for row in range(self.width) if row not in parents])
        stays = [row not in parents[:i] for i, row in enumerate(parents)]
        self.rows = [row if stay else next(free) for row, stay in zip(parents, stays, strict=True)]
        return {to: row for to, row in zip(self.rows, parents, strict=True) if to != row}

    @property
    def found(self) -> Found:
        return Found(self.finished, [*map(self.worth, self.finished)], self.n_sampled, n_prompt=self.n_prompt)


@torch.inference_mode()
def token_beam_search(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    width: int,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    length_penalty: float = 0.0,
    on_progress: Callable[[int, list[int]], None] = lambda n_tokens, lengths: None,
) -> list[Found]:
    """The classic beam search, for likely text: keep the `width` likeliest continuations of a prompt at each token.

    Returns of each prompt at most `width` answers by log-probability / length ** length_penalty. One that has stopped
    leaves the beam; a search ends when no live one can still beat the worst of `width` finished ones. Nothing is drawn:
    tokens count as sampled where they were kept, and `on_progress` hears after each step of how many there were, and of
    how many each search took that ended. Ids at or above `vocab_size` are never taken. All prompts are searched at
    once, in prompts x width rows of a cache. ValueError for a width or max_new_tokens below 1, a negative
    length_penalty, and a prompt that is empty or fills the context.
    """
    context = model.config.max_position_embeddings
    _check_tokens(prompts, context, width, max_new_tokens, length_penalty)
    limits = [min(max_new_tokens, context - len(ids)) for ids in prompts]
    beams = [_TokenBeam(len(ids), limit, width, length_penalty) for ids, limit in zip(prompts, limits, strict=True)]
    if not beams:
        return []
    model.reorder_weights()
    cache, hidden_RC = _block_cache(model, prompts, width, max(beam.n_prompt + beam.limit for beam in beams))
    going = list(beams)  # whose blocks of rows are the first ones of the cache, in this order
    while going:
        logits_SWV = model.logits(hidden_RC)[:, :vocab_size].float().unflatten(0, (len(going), -1))
        before = sum(beam.n_sampled for beam in going)
        copies = [
            {s * width + to: s * width + row for to, row in beam.grow(logits_WV, stop_ids).items()}
            for s, (beam, logits_WV) in enumerate(zip(going, logits_SWV, strict=True))
        ]
        on_progress(sum(beam.n_sampled for beam in going) - before, [beam.n_sampled for beam in going if not beam.live])
        length = max((beam.n_prompt + len(beam.live[0].ids) - 1 for beam in going if beam.live), default=0)
        _copy(cache, {to: row for of_beam in copies for to, row in of_beam.items()}, min(map(len, prompts)), length)
        going = _close_gaps(going, cache, width, length)
        hidden_RC = _decode(model, going, cache) if going else hidden_RC
    return [beam.found for beam in beams]


def _check_tokens(prompts: Sequence, context: int, width: int, max_new_tokens: int, length_penalty: float) -> None:
    for i, ids in enumerate(prompts):
        if not 0 < len(ids) < context:
            raise ValueError(f"prompt {i} is {len(ids)} tokens; want 1 to {context - 1}, the model's context less 1")
    if min(width, max_new_tokens) < 1 or length_penalty < 0:
        raise ValueError(
            f"width {width}, max_new_tokens {max_new_tokens}, length_penalty {length_penalty}: want at least 1, 1 and 0"
        )


def _block_cache(model: Transformer, prompts: Sequence[Sequence[int]], width: int, room: int) -> tuple[KVCache, Tensor]:
    """A cache with a block of `width` rows a prompt, each of which holds it, and each prompt's last hidden state."""
    read, hidden_BC = prefill(model, prompts, [read_beginning(model, prompts)] * len(prompts))
    cache, row_R = KVCache(model, len(prompts) * width, room), torch.arange(len(prompts) * width)
    row_R = row_R.to(hidden_BC.device)
    cache.copy_rows(read, row_R // width, row_R, max(map(len, prompts)))
    return cache, hidden_BC


def _copy(cache: KVCache, row_of: dict[int, int], start: int, length: int) -> None:
    """Copy positions start ... length - 1 of rows into others."""
    device = cache.k[0].device
    from_R, to_R = (torch.tensor(list(rows), dtype=torch.int64, device=device) for rows in (row_of.values(), row_of))
    cache.copy_rows(cache, from_R, to_R, length, start)


def _close_gaps(going: list[_TokenBeam], cache: KVCache, width: int, length: int) -> list[_TokenBeam]:
    """Move the last blocks that go on into the places of ended ones."""
    n_left = sum(bool(beam.live) for beam in going)
    holes = [s for s in range(n_left) if not going[s].live]
    movers = [s for s in range(n_left, len(going)) if going[s].live]
    moved = dict(zip(holes, movers, strict=True))
    _copy(cache, {to * width + w: s * width + w for to, s in moved.items() for w in range(width)}, 0, length)
    return [going[moved.get(s, s)] for s in range(n_left)]


def _decode(model: Transformer, going: list[_TokenBeam], cache: KVCache) -> Tensor:
    """The hidden states of all rows one token on; rows without a live beam do as the first one of their block."""
    token_SW = [[beam.live[0].ids[-1]] * beam.width for beam in going]
    for tokens, beam in zip(token_SW, going, strict=True):
        for row, made in zip(beam.rows, beam.live, strict=True):
            tokens[row] = made.ids[-1]
    position_R = [beam.n_prompt + len(beam.live[0].ids) - 1 for beam in going for _ in range(beam.width)]
    device = cache.k[0].device
    token_R = torch.tensor(token_SW, device=device).flatten()
    return model.decode(token_R, torch.tensor(position_R, device=device), cache, max(position_R) + 1)
