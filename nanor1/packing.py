"""Packed sequences: where each token stands, and what it attends to; a prompt may be shared.

Sequences lie end to end, `cu_seqlens_B1 = [0, len_0, len_0 + len_1, ...]`. The G completions of a prompt need not each
carry a copy of it: with `parent_B` a sequence says which earlier one it continues, so the prompt is embedded, projected
and multiplied once. Its keys and values are then laid before those of each continuation, for attention alone. Values
and gradients are those of the full copies. The idea is Prefix Grouper's (2506.05433).

Left out: continuations of continuations.

Letters: N packed tokens, M packed keys (N and the copies), B sequences, G continuations of a sequence at most.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Item = TypeVar("Item")
TILE = 128  # tokens of one sequence, that a few of the attention kernels' programs work on
TABLE_COLUMNS = 6
MAKES_LAYOUT = ("cu_seqlens_B1", "parent_B")  # fields of a batch that stay on the CPU
NUMPY = {torch.int64: np.int64, torch.float32: np.float32, torch.bool: np.bool_}

# None of these is frozen: torch 2.11 guards on every field of a frozen dataclass that compiled code passes on, so a
# block would be compiled anew for shared prompts, even where attention lies outside the graph.


@dataclass
class SharedKeys:
    """How the keys and values of N tokens become the M of all sequences: each one's prompt, then its own."""

    cu_seqlens_B1: Tensor  # of the M keys
    max_len: int
    source_M: Tensor  # the token of each key
    own_N: Tensor  # the key that is a token's own
    prompt_R: Tensor  # tokens of sequences that are continued
    copies_RG: Tensor  # the keys that are copies of such a token; M where there are fewer than G


@dataclass
class CachedKeys:
    """Where in a cache the M keys of all sequences stand: what it held of each, then its own."""

    cu_seqlens_B1: Tensor  # of the M keys
    max_len: int
    row_M: Tensor
    position_M: Tensor


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
    max_len: int
    row_N: Tensor  # the sequence of each token
    position_N: Tensor  # counted from the start of the prompt
    shared: SharedKeys | None = None
    cached: CachedKeys | None = None

    def tiles(self) -> TileTable:
        """For the attention kernels; nothing waits for the device."""
        keys, n_queries = self.shared or self.cached, len(self.row_N)
        if keys is None:
            return tile_table(self.cu_seqlens_B1, self.cu_seqlens_B1, n_queries, n_queries)
        n_keys = len(keys.source_M if self.shared else keys.row_M)
        return tile_table(self.cu_seqlens_B1, keys.cu_seqlens_B1, n_queries, n_keys)


def layout(cu_seqlens_B1: Tensor, parent_B: Tensor | None = None, past_B: Tensor | None = None) -> Layout:
    """The layout of sequences of which `parent_B` (None: none; -1: this one not) continue an earlier one.

    With `past_B` sequence b lies behind so many tokens, whose keys and values a cache holds. ValueError for both, and
    where a parent does not come before its continuation or continues another one itself.

    Best of tensors on the CPU, and then moved (`to_device`): each length that is asked for makes a GPU finish its work.
    """
    lengths_B = cu_seqlens_B1.diff()
    row_N = _rows(lengths_B)
    column_N = torch.arange(len(row_N), device=row_N.device) - cu_seqlens_B1[row_N]
    if past_B is not None:
        if parent_B is not None:
            raise ValueError("parent_B and past_B are two ways to lie behind other tokens; give one")
        position_N, cached = column_N + past_B[row_N], _cached_keys(lengths_B + past_B)
        return Layout(cu_seqlens_B1, int(lengths_B.max()), row_N, position_N, cached=cached)
    if parent_B is None or not bool((parent_B >= 0).any()):
        return Layout(cu_seqlens_B1, int(lengths_B.max()), row_N, column_N)
    index_B, is_child_B = torch.arange(len(parent_B), device=parent_B.device), parent_B >= 0
    if (parent_B >= index_B).any() or is_child_B[parent_B[is_child_B]].any():
        raise ValueError(f"parents {parent_B.tolist()}: each must be -1 or an earlier sequence that has none itself")
    prefix_B = torch.where(is_child_B, lengths_B[parent_B], 0)
    position_N = column_N + prefix_B[row_N]
    shared = _share(cu_seqlens_B1, parent_B, prefix_B, row_N, column_N)
    return Layout(cu_seqlens_B1, int(lengths_B.max()), row_N, position_N, shared)


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


def in_batches(
    items: Iterable[Item], n_new: Callable[[Item, Item | None], int], tokens_per_batch: int
) -> list[list[Item]]:
    """Batches of neighbours of at most `tokens_per_batch` tokens (or of one item).

    `n_new(item, before)` is how many tokens an item adds to a batch behind `before`; None: to an empty one.

    >>> in_batches([3, 3, 2, 9], lambda n, before: n, 6)
    [[3, 3], [2], [9]]
    """
    batches, n_tokens = [], 0
    for item in items:
        n_more = n_new(item, batches[-1][-1] if batches else None)
        if not batches or n_tokens + n_more > tokens_per_batch:
            batches.append([])
            n_tokens, n_more = 0, n_new(item, None)
        batches[-1].append(item)
        n_tokens += n_more
    return batches


def end_to_end(lists: Sequence[Sequence[float]], dtype: torch.dtype = torch.int64) -> Tensor:
    """The numbers of all lists in one tensor on the CPU.

    >>> end_to_end([[7, 8], [], [9]]).tolist()
    [7, 8, 9]
    """
    flat = np.fromiter(chain.from_iterable(lists), NUMPY[dtype], sum(map(len, lists)))
    return torch.from_numpy(flat)


def attended_pairs(cu_seqlens_B1: Tensor, parent_B: Tensor | None = None) -> int:
    """How many (query, key) pairs causal attention over these sequences has: what its cost grows with.

    >>> attended_pairs(torch.tensor([0, 3]))
    6
    """
    lengths_B = cu_seqlens_B1.diff()
    pairs = lengths_B * (lengths_B + 1) // 2
    if parent_B is not None:
        pairs = pairs + torch.where(parent_B >= 0, lengths_B * lengths_B[parent_B], 0)
    return int(pairs.sum())


def tile_table(cu_seqlens_q_B1: Tensor, cu_seqlens_k_B1: Tensor, n_queries: int, n_keys: int) -> TileTable:
    """The tiles of packed sequences, whose queries are their last positions; made without a look at any length.

    >>> tile_table(torch.tensor([0, 130, 140]), torch.tensor([0, 130, 140]), 140, 140).queries.unflatten(0, (-1, 6))[:3]
    tensor([[128,   0, 130,   0, 130,   0],
            [  0,   0, 130,   0, 130,   0],
            [  0, 130,  10, 130,  10, 256]], dtype=torch.int32)
    """
    length_B, length_k_B = cu_seqlens_q_B1.diff(), cu_seqlens_k_B1.diff()
    offset_B = length_k_B - length_B  # query i sees the keys up to i + offset
    number_B, number_k_B = _first_tiles(cu_seqlens_q_B1), _first_tiles(cu_seqlens_k_B1)
    sequence_B5 = torch.stack((cu_seqlens_q_B1[:-1], length_B, cu_seqlens_k_B1[:-1], length_k_B, number_B * TILE), 1)

    row_T, first_T = _cut(number_B, n_queries)
    n_keys_T = (torch.minimum(first_T + TILE, length_B[row_T]) + offset_B[row_T]) * (first_T < length_B[row_T])
    row_k_T, first_k_T = _cut(number_k_B, n_keys + TILE)  # one more, so that the tables are never equally long
    n_queries_T = length_B[row_k_T] - (first_k_T - offset_B[row_k_T]).clamp(min=0)
    entries = ((first_T, row_T, n_keys_T), (first_k_T, row_k_T, n_queries_T))
    tables = (
        torch.cat((first_T[:, None], sequence_B5[row_T]), 1)[work_T.argsort(descending=True, stable=True)]
        for first_T, row_T, work_T in entries
    )
    return TileTable(*(table_T6.flatten().int() for table_T6 in tables))


def _first_tiles(cu_seqlens_B1: Tensor) -> Tensor:
    """Numbers of each sequence's first tile, so that all its tiles have one before the next sequence's first."""
    return cu_seqlens_B1[:-1] // TILE + torch.arange(len(cu_seqlens_B1) - 1, device=cu_seqlens_B1.device)


def _cut(number_B: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
    """For each tile its sequence and its first token within that; spare tiles begin behind the sequence's end."""
    tile_T = torch.arange(n_tokens // TILE + len(number_B), device=number_B.device)
    row_T = torch.searchsorted(number_B, tile_T, right=True) - 1
    return row_T, (tile_T - number_B[row_T]) * TILE


def _cached_keys(lengths_B: Tensor) -> CachedKeys:
    row_M, cu_keys_B1 = _rows(lengths_B), F.pad(lengths_B.cumsum(0), (1, 0))
    position_M = torch.arange(len(row_M), device=row_M.device) - cu_keys_B1[row_M]
    return CachedKeys(cu_keys_B1, int(lengths_B.max()), row_M, position_M)


def _share(cu_seqlens_B1: Tensor, parent_B: Tensor, prefix_B: Tensor, row_N: Tensor, column_N: Tensor) -> SharedKeys:
    lengths_B = cu_seqlens_B1.diff() + prefix_B
    cu_keys_B1 = F.pad(lengths_B.cumsum(0), (1, 0))
    row_M = _rows(lengths_B)
    column_M = torch.arange(len(row_M), device=row_M.device) - cu_keys_B1[row_M]
    behind_M = column_M - prefix_B[row_M]  # negative in the prompt
    source_M = torch.where(behind_M < 0, cu_seqlens_B1[parent_B[row_M]] + column_M, cu_seqlens_B1[row_M] + behind_M)

    children_BG = _children(parent_B)
    prompt_R = (children_BG[row_N, 0] >= 0).nonzero().squeeze(1)
    children_RG = children_BG[row_N[prompt_R]]
    copies_RG = torch.where(children_RG >= 0, cu_keys_B1[children_RG] + column_N[prompt_R, None], len(row_M))
    own_N = cu_keys_B1[row_N] + prefix_B[row_N] + column_N
    return SharedKeys(cu_keys_B1, int(lengths_B.max()), source_M, own_N, prompt_R, copies_RG)


def _children(parent_B: Tensor) -> Tensor:
    """The continuations of each sequence, -1 behind the last: [B, G].

    >>> _children(torch.tensor([-1, 0, 0, -1, 3])).tolist()
    [[1, 2], [-1, -1], [-1, -1], [4, -1], [-1, -1]]
    """
    children = [[] for _ in parent_B]
    for child, parent in enumerate(parent_B.tolist()):
        if parent >= 0:
            children[parent].append(child)
    width = max(2, *map(len, children))  # for a size of 1 torch.compile would make another program
    return torch.tensor([row + [-1] * (width - len(row)) for row in children], device=parent_B.device)


def _rows(lengths_B: Tensor) -> Tensor:
    return torch.arange(len(lengths_B), device=lengths_B.device).repeat_interleave(lengths_B)


def spread(x_NKD: Tensor, shared: SharedKeys) -> Tensor:
    """Keys or values of the N tokens -> of the M keys of all sequences."""
    return _Spread.apply(x_NKD, shared.source_M, shared.own_N, shared.prompt_R, shared.copies_RG)


class _Spread(torch.autograd.Function):
    """A gather whose backward gathers too: the same sum in the same order every time, and no scatter."""

    @staticmethod
    def forward(ctx, x_NKD: Tensor, source_M: Tensor, own_N: Tensor, prompt_R: Tensor, copies_RG: Tensor) -> Tensor:
        ctx.save_for_backward(own_N, prompt_R, copies_RG)
        return x_NKD.index_select(0, source_M)

    @staticmethod
    def backward(ctx, grad_MKD: Tensor) -> tuple[Tensor, None, None, None, None]:
        own_N, prompt_R, copies_RG = ctx.saved_tensors
        padded = torch.cat((grad_MKD, torch.zeros_like(grad_MKD[:1])))
        copies_sum_RKD = padded.index_select(0, copies_RG.flatten()).unflatten(0, copies_RG.shape).sum(1)
        grad_NKD = grad_MKD.index_select(0, own_N)
        grad_NKD.index_add_(0, prompt_R, copies_sum_RKD)  # each prompt token once, so nothing races
        return grad_NKD, None, None, None, None
