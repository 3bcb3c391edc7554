"""Packed sequences: where each token stands, what it attends to, and the one batch that all training uses.

Sequences lie end to end, `cu_seqlens_B1 = [0, len_0, len_0 + len_1, ...]`. The G completions of a prompt need not each
carry a copy of it: with `parent_B` a sequence says which earlier one it continues, so the prompt is embedded, projected
and multiplied once. Its keys and values are then laid before those of each continuation, for attention alone. Values
and gradients are those of the full copies. The idea is Prefix Grouper's (2506.05433).

Left out: continuations of continuations.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import accumulate, chain, groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128  # tokens of one sequence, that a few of the attention kernels' programs work on
TABLE_COLUMNS = 6
NUMPY = {torch.int64: np.int64, torch.float32: np.float32, torch.bool: np.bool_}

# ---- a batch to learn from


@dataclass(frozen=True)
class Item:
    """What continues a prompt, or without one a whole text; and which loss falls on predicting each of `ids`.

    The last four are one for all of `ids`, or a list with one for each. The last id predicts nothing: it is a target
    only.
    """

    prompt_ids: list[int]  # never learned; neighbours in a batch share an equal one
    ids: list[int]
    is_learned: bool | list[bool] = True  # not the first one of a text: nothing predicts it
    advantage: float | list[float] = 0.0
    sampler_logp: float | list[float] = 0.0
    weight: float | list[float] = 1.0

    def __post_init__(self):
        assert self.prompt_ids or not self.ids or not self.each("is_learned")[0], "nothing predicts a text's first id"

    def each(self, name: str) -> list:
        value = getattr(self, name)
        values = value if isinstance(value, list) else [value] * len(self.ids)
        assert len(values) == len(self.ids), f"{len(values)} of {name} for {len(self.ids)} tokens"
        return values


@dataclass(frozen=True)
class Batch:
    """Items laid end to end; a prompt that several of them continue is there once."""

    ids_N: Tensor  # int64, and so the five below
    cu_seqlens_B1: Tensor
    parent_B: Tensor  # the sequence that holds an item's prompt; -1: prompts, and items that lie behind their own
    predictor_M: Tensor  # the packed token whose hidden state predicts the target; for the first the prompt's last
    target_M: Tensor  # the learned ids
    item_M: Tensor  # which of the items given to `pack` they are of
    advantage_M: Tensor  # fp32, and so the two below
    sampler_logp_M: Tensor
    weight_M: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """On the device, but for what the layout is made of."""
        return to_device(self, device, stays=("cu_seqlens_B1", "parent_B"))

    def predictor_states(self, model) -> Tensor:
        """The hidden state that predicts each target: [M, C]."""
        hidden_NC = model(self.ids_N, self.cu_seqlens_B1, parent_B=self.parent_B)
        # the first tokens of a group share their predictor; this gather's backward always adds up in the same order
        return F.embedding(self.predictor_M, hidden_NC)


def pack(items: Sequence[Item], tokens_per_batch: int, together: int = 1) -> list[Batch]:
    """Lay items end to end, in batches of at most `tokens_per_batch` packed tokens (or of one item).

    Each `together` neighbours, which have one prompt, stay in one batch. Groups with the same prompt come longest
    first: the first batch is then the most demanding, so that a run that does not fit in memory fails at once.
    """

    def n_tokens(unit: range) -> int:
        return len(items[unit[0]].prompt_ids) + sum(len(items[i].ids) - 1 for i in unit)

    units = [range(i, i + together) for i in range(0, len(items), together) if items[i].ids]
    groups = groupby(units, lambda unit: items[unit[0]].prompt_ids or unit)
    by_length = [sorted(group, key=n_tokens, reverse=True) for _, group in groups]
    by_length.sort(key=lambda group: n_tokens(group[0]), reverse=True)
    batches: list[list[int]] = []
    n_packed = 0
    for unit in chain.from_iterable(by_length):
        prompt_ids, n_new = items[unit[0]].prompt_ids, n_tokens(unit)
        n_shared = len(prompt_ids) if batches and items[batches[-1][-1]].prompt_ids == prompt_ids else 0
        if not batches or n_packed + n_new - n_shared > tokens_per_batch:
            batches.append([])
            n_packed, n_shared = 0, 0
        batches[-1] += unit
        n_packed += n_new - n_shared
    return [pack_one(items, batch) for batch in batches]


def pack_one(items: Sequence[Item], chosen: Sequence[int]) -> Batch:
    """One batch of the items of these numbers: each prompt, then the sequences that continue it.

    A prompt with one item is one sequence with it.
    """
    groups = [list(group) for _, group in groupby(chosen, lambda i: items[i].prompt_ids or i)]
    sequences, parents, predictors, start = [], [], [], 0
    for group in groups:
        row, prompt_ids = len(sequences), items[group[0]].prompt_ids
        seen = [items[i].ids[:-1] for i in group]
        sequences += [prompt_ids + seen[0]] if len(group) == 1 else [prompt_ids, *filter(None, seen)]
        parents += [-1] + [row] * (len(sequences) - row - 1)
        start += len(prompt_ids)
        last_of_prompt = start - 1
        for ids in seen:
            predictors.append([last_of_prompt, *range(start, start + len(ids))])
            start += len(ids)
    is_learned = end_to_end([items[i].each("is_learned") for i in chosen], torch.bool)

    def learned(lists: list[list], dtype: torch.dtype = torch.int64) -> Tensor:
        return end_to_end(lists, dtype)[is_learned]

    return Batch(
        end_to_end(sequences),
        torch.tensor(list(accumulate(map(len, sequences), initial=0))),
        torch.tensor(parents),
        learned(predictors),
        learned([items[i].ids for i in chosen]),
        learned([[i] * len(items[i].ids) for i in chosen]),
        *(
            learned([items[i].each(name) for i in chosen], torch.float32)
            for name in ("advantage", "sampler_logp", "weight")
        ),
    )


def end_to_end(lists: Sequence[Sequence[float]], dtype: torch.dtype = torch.int64) -> Tensor:
    """The numbers of all lists in one tensor on the CPU.

    >>> end_to_end([[7, 8], [], [9]]).tolist()
    [7, 8, 9]
    """
    return torch.from_numpy(np.fromiter(chain.from_iterable(lists), NUMPY[dtype], sum(map(len, lists))))


def to_device(x: Any, device: torch.device | str, stays: Collection[str] = ()) -> Any:
    """A tensor, or a dataclass with its tensors but for the fields that stay, on the device; the rest as it is.

    Nothing waits for CUDA: a copy from memory that is not pinned would.
    """
    if isinstance(x, Tensor):
        is_copied = torch.device(device).type == "cuda" and not x.is_cuda
        return x.pin_memory().to(device, non_blocking=True) if is_copied else x.to(device)
    if not is_dataclass(x):
        return x
    return replace(x, **{name: to_device(value, device) for name, value in vars(x).items() if name not in stays})


def index_tensor(numbers: Iterable[int], device: torch.device) -> Tensor:
    """Numbers as int64 on the device, without a wait."""
    return to_device(torch.tensor(list(numbers), dtype=torch.int64), device)


# ---- the layout of a forward

# None of these is frozen: torch 2.11 guards on every field of a frozen dataclass that compiled code passes on, so a
# block would be compiled anew for shared prompts, even where attention lies outside the graph.


@dataclass
class SharedKeys:
    """How the keys and values of N tokens become the J of all sequences: each one's prompt, then its own."""

    source_J: Tensor  # the token of each key
    own_N: Tensor  # the key that is a token's own
    prompt_R: Tensor  # tokens of sequences that are continued
    copies_RG: Tensor  # the keys that are copies of such a token; J where there are fewer than G


@dataclass
class CachedKeys:
    """Where in a cache the J keys of all sequences stand: what it held of each, then its own."""

    row_J: Tensor
    position_J: Tensor


class TileTable(NamedTuple):
    """What the programs of the attention kernels work on: tiles of at most TILE tokens, those with most work first.

    int32, for each tile the numbers: its first token, counted within its sequence; of its sequence the first query and
    the number of queries, the first key and the number of keys; and the first row of a tensor in which each sequence's
    queries begin a new tile. Flat, and of two lengths, since torch.compile takes sizes that are equal by chance for the
    same, and compiles again when they no longer are.
    """

    queries: Tensor  # by the number of keys that a tile's queries see
    keys: Tensor  # by the number of queries that see a tile's keys


@dataclass
class Layout:
    """What a forward over packed sequences has to know; tensors are int64 where those that it is made of are."""

    cu_seqlens_B1: Tensor
    cu_seqlens_k_B1: Tensor  # of the keys that they see, N where none are shared or cached
    n_keys: int
    row_N: Tensor  # the sequence of each token
    position_N: Tensor  # counted from the start of the prompt
    shared: SharedKeys | None = None
    cached: CachedKeys | None = None
    table: TileTable | None = None  # for the attention kernels, once for all layers

    def tiles(self) -> TileTable:
        """The table; nothing waits for the device."""
        return tile_table(self.cu_seqlens_B1, self.cu_seqlens_k_B1, len(self.row_N), self.n_keys)


def layout(cu_seqlens_B1: Tensor, parent_B: Tensor | None = None, past_B: Tensor | None = None) -> Layout:
    """The layout of sequences of which `parent_B` (None: none; -1: this one not) continue an earlier one.

    With `past_B` sequence b lies behind so many tokens, whose keys and values a cache holds; not with parents.

    Best of tensors on the CPU, and then moved (`to_device`): each length that is asked for makes a GPU finish its work.
    """
    lengths_B = cu_seqlens_B1.diff()
    _, row_N, column_N = _places(lengths_B)
    if past_B is not None:
        assert parent_B is None, "parent_B and past_B are two ways to lie behind other tokens"
        prefix_B = past_B
    elif parent_B is not None and bool((parent_B >= 0).any()):
        index_B, is_child_B = torch.arange(len(parent_B), device=parent_B.device), parent_B >= 0
        is_right = (parent_B < index_B).all() and not is_child_B[parent_B[is_child_B]].any()
        assert is_right, f"parents {parent_B.tolist()}: each must be -1 or an earlier sequence that has none itself"
        prefix_B = torch.where(is_child_B, lengths_B[parent_B], 0)
    else:
        return Layout(cu_seqlens_B1, cu_seqlens_B1, len(row_N), row_N, column_N)
    cu_seqlens_k_B1, row_J, column_J = _places(lengths_B + prefix_B)
    where = Layout(cu_seqlens_B1, cu_seqlens_k_B1, len(row_J), row_N, column_N + prefix_B[row_N])
    if past_B is not None:
        where.cached = CachedKeys(row_J, column_J)
    else:
        behind_J = column_J - prefix_B[row_J]  # negative in the prompt
        start_J = cu_seqlens_B1[torch.where(behind_J < 0, parent_B[row_J], row_J)]
        source_J = start_J + torch.where(behind_J < 0, column_J, behind_J)
        own_N = cu_seqlens_k_B1[row_N] + where.position_N
        where.shared = SharedKeys(source_J, own_N, *_copies_of_prompts(where, parent_B, column_N))
    return where


def _copies_of_prompts(where: Layout, parent_B: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor]:
    """prompt_R and copies_RG of SharedKeys."""
    children: list[list[int]] = [[] for _ in parent_B]
    for child, parent in enumerate(parent_B.tolist()):
        if parent >= 0:
            children[parent].append(child)
    G = max(2, *map(len, children))  # for a size of 1 torch.compile would make another program
    children_BG = torch.tensor([row + [-1] * (G - len(row)) for row in children], device=parent_B.device)
    prompt_R = (children_BG[where.row_N, 0] >= 0).nonzero().squeeze(1)
    children_RG = children_BG[where.row_N[prompt_R]]
    copies_RG = where.cu_seqlens_k_B1[children_RG] + column_N[prompt_R, None]
    return prompt_R, torch.where(children_RG >= 0, copies_RG, where.n_keys)


def attended_pairs(cu_seqlens_B1: Tensor, parent_B: Tensor) -> int:
    """How many (query, key) pairs causal attention over these sequences has: what its cost grows with.

    >>> attended_pairs(torch.tensor([0, 3, 5]), torch.tensor([-1, 0]))
    15
    """
    lengths_B = cu_seqlens_B1.diff()
    prefix_B = torch.where(parent_B >= 0, lengths_B[parent_B], 0)
    return int((lengths_B * (lengths_B + 1) // 2 + lengths_B * prefix_B).sum())


def tile_table(cu_seqlens_q_B1: Tensor, cu_seqlens_k_B1: Tensor, n_queries: int, n_keys: int) -> TileTable:
    """The tiles of packed sequences, whose queries are their last positions; made without a look at any length.

    >>> tile_table(torch.tensor([0, 130, 140]), torch.tensor([0, 130, 140]), 140, 140).queries.unflatten(0, (-1, 6))[:3]
    tensor([[128,   0, 130,   0, 130,   0],
            [  0,   0, 130,   0, 130,   0],
            [  0, 130,  10, 130,  10, 256]], dtype=torch.int32)
    """
    length_B, length_k_B = cu_seqlens_q_B1.diff(), cu_seqlens_k_B1.diff()
    offset_B = length_k_B - length_B  # query i sees the keys up to i + offset
    number_B, row, first = _cut(cu_seqlens_q_B1, n_queries)
    seen = (torch.minimum(first + TILE, length_B[row]) + offset_B[row]) * (first < length_B[row])
    # one tile more, so that the tables are never equally long
    _, row_k, first_k = _cut(cu_seqlens_k_B1, n_keys + TILE)
    seeing = length_B[row_k] - (first_k - offset_B[row_k]).clamp(min=0)
    sequence_B5 = torch.stack((cu_seqlens_q_B1[:-1], length_B, cu_seqlens_k_B1[:-1], length_k_B, number_B * TILE), 1)
    tables = (
        torch.cat((first[:, None], sequence_B5[row]), 1)[work.argsort(descending=True, stable=True)]
        for row, first, work in ((row, first, seen), (row_k, first_k, seeing))
    )
    return TileTable(*(table.flatten().int() for table in tables))


def _cut(cu_seqlens_B1: Tensor, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The number of each sequence's first tile, and of each tile its sequence and its first token within that.

    All tiles of a sequence have a number before the next one's first; spare tiles begin behind the sequence's end.
    """
    number_B = cu_seqlens_B1[:-1] // TILE + torch.arange(len(cu_seqlens_B1) - 1, device=cu_seqlens_B1.device)
    tile = torch.arange(n_tokens // TILE + len(number_B), device=number_B.device)
    row = torch.searchsorted(number_B, tile, right=True) - 1
    return number_B, row, (tile - number_B[row]) * TILE


def _places(lengths_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where sequences of these lengths start, and of each token its sequence and its place in that."""
    cu_seqlens_B1 = F.pad(lengths_B.cumsum(0), (1, 0))
    row_N = torch.arange(len(lengths_B), device=lengths_B.device).repeat_interleave(lengths_B)
    return cu_seqlens_B1, row_N, torch.arange(len(row_N), device=row_N.device) - cu_seqlens_B1[row_N]


def spread(x_NKD: Tensor, shared: SharedKeys) -> Tensor:
    """Keys or values of the N tokens -> of the J keys of all sequences."""
    return _Spread.apply(x_NKD, shared.source_J, shared.own_N, shared.prompt_R, shared.copies_RG)


class _Spread(torch.autograd.Function):
    """A gather whose backward gathers too: the same sum in the same order every time, and no scatter."""

    @staticmethod
    def forward(ctx, x_NKD: Tensor, source_J: Tensor, own_N: Tensor, prompt_R: Tensor, copies_RG: Tensor) -> Tensor:
        ctx.save_for_backward(own_N, prompt_R, copies_RG)
        return x_NKD.index_select(0, source_J)

    @staticmethod
    def backward(ctx, grad_JKD: Tensor) -> tuple[Tensor, None, None, None, None]:
        own_N, prompt_R, copies_RG = ctx.saved_tensors
        padded = torch.cat((grad_JKD, torch.zeros_like(grad_JKD[:1])))
        copies_sum_RKD = padded.index_select(0, copies_RG.flatten()).unflatten(0, copies_RG.shape).sum(1)
        grad_NKD = grad_JKD.index_select(0, own_N)
        grad_NKD.index_add_(0, prompt_R, copies_sum_RKD)  # each prompt token once, so nothing races
        return grad_NKD, None, None, None, None
