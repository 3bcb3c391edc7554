"""Causal attention over packed sequences, and over a key/value cache: one call each, in several ways.

Sequences lie end to end, `cu_seqlens_B1 = [0, len_0, len_0 + len_1, ...]`; no token attends across a boundary. The
queries of a sequence may be only its last positions: a chunk of a prompt, or a completion behind a prompt that others
share. Then keys have their own `cu_seqlens_k_B1`, and query i of a sequence sees its keys j <= i + k_len - q_len.

On CUDA the Triton kernels take them as they lie (kernels.py). Where those do not run, torch's
scaled_dot_product_attention (SDPA) does; a warning says why, once. A CPU takes one sequence after the other, short
ones by plain products. Other devices, and a narrow model on a CPU, want rectangles, so this is the one module in which
padding exists: sequences are copied into one and the result is copied back. A padded key lies after every real token of
its row, so the causal mask hides it, and no gradient reaches it. `reference_attention` says the same in the plainest
way; the tests compare them all.

Attention: Vaswani et al. 2017 (1706.03762, eq. 1); grouped queries: Ainslie et al. 2023 (2305.13245).

Letters: N packed queries, M packed keys, B sequences, T most queries of one, U most keys, H query heads, K key/value
heads, D head width, S slots of a cache.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanor1.packing import TileTable

NARROW = 256  # H * D, under which calling torch for each sequence takes longer than what is padded
SHORT = 256  # keys: up to here plain products beat SDPA's tiles on a CPU (forward and backward 2.5x at 140, bf16)
SHORT_IF_NARROW = 128  # queries: the same in rectangles, in fp32
FEW_ROWS = 4  # of a decode step: up to here SDPA is quicker in bf16
KEPT = 64  # keys: up to here, probabilities are kept for the gradient


def attention(
    q_NHD: Tensor,
    k_MKD: Tensor,
    v_MKD: Tensor,
    cu_seqlens_B1: Tensor,
    max_len: int,
    cu_seqlens_k_B1: Tensor | None = None,
    max_len_k: int | None = None,
    table: TileTable | None = None,
) -> Tensor:
    """Causal attention within each packed sequence; returns out_NHD in q's dtype, scaled by D ** -0.5.

    `cu_seqlens_B1` is int64 on q's device, starting at 0 and ending at N; `max_len` is the longest sequence (the Triton
    kernels do not look at it). The same of the keys, where a sequence has more of them than queries; None: as many.
    `table` is made of both for the Triton kernels (nanor1.packing.tile_table; None: for this call alone).
    On a CPU narrow heads are grouped: neighbours of similar length share a rectangle, so that sequences sorted by
    length waste least.
    """
    if cu_seqlens_k_B1 is None:
        cu_seqlens_k_B1, max_len_k = cu_seqlens_B1, max_len
    kernels = _triton_kernels(q_NHD)
    if kernels is not None:
        return kernels.flash_attention(q_NHD, k_MKD, v_MKD, cu_seqlens_B1, cu_seqlens_k_B1, table)
    if q_NHD.device.type != "cpu":  # one rectangle: its shape is known without asking the device
        lengths_B = cu_seqlens_B1.diff()
        lengths_k_B = lengths_B if cu_seqlens_k_B1 is cu_seqlens_B1 else cu_seqlens_k_B1.diff()
        return _attend_in_rectangle(q_NHD, k_MKD, v_MKD, lengths_B, lengths_k_B, max_len, max_len_k)
    attend = _attend_in_groups if _is_narrow(q_NHD) else _attend_by_sequence
    return attend(q_NHD, k_MKD, v_MKD, cu_seqlens_B1.diff().tolist(), cu_seqlens_k_B1.diff().tolist())


def cached_attention(
    q_BHD: Tensor, k_SKTD: Tensor, v_SKTD: Tensor, slot_B: Tensor | None, length_B: Tensor, max_len: int
) -> Tensor:
    """Attention of one query a row to the first length_B[b] keys of slot slot_B[b] (None: b); returns out_BHD.

    A row of length 0 gives zeros. `max_len` is the longest length or more (the Triton kernels do not look at it); cells
    of the cache up to there must be finite. Not differentiable on CUDA. Without kernels, slots other than None cost a
    copy of the rows.
    """
    kernels = _triton_kernels(q_BHD)
    if kernels is not None:
        return kernels.flash_decode(q_BHD, k_SKTD, v_SKTD, slot_B, length_B)
    rows = slice(len(q_BHD)) if slot_B is None else slot_B
    bias_BT = hide_behind(length_B, max_len)
    out_BHD = decode_attention(q_BHD, k_SKTD[rows, :, :max_len], v_SKTD[rows, :, :max_len], bias_BT)
    if q_BHD.device.type == "cpu" and bool(length_B.all()):  # asking is quicker than filling, where nothing waits
        return out_BHD
    return out_BHD.masked_fill(length_B[:, None, None] == 0, 0.0)  # a mean of nothing is nan


def hide_behind(length_B: Tensor, n_keys: int) -> Tensor:
    """What is added to the scores of rows that hold so many keys: 0, and -inf behind the last one; fp32 [B, T]."""
    is_hidden_BT = torch.arange(n_keys, device=length_B.device) >= length_B[:, None]
    return torch.zeros_like(is_hidden_BT, dtype=torch.float32).masked_fill_(is_hidden_BT, float("-inf"))


def decode_attention(q_BHD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, bias_BT: Tensor | None) -> Tensor:
    """Attention of one query a row to that row's cached keys; returns out_BHD.

    `bias_BT` is that of `hide_behind`; None says every position holds a token of the row.
    """
    B, H, D = q_BHD.shape
    K, T = k_BKTD.shape[1:3]
    q = q_BHD.view(B, K, H // K, D)  # the query heads that share a key/value head read it once, as rows of one product
    bias = None if bias_BT is None else bias_BT[:, None, None, :]
    if q.device.type != "cpu" or (q.dtype.itemsize < 4 and B <= FEW_ROWS):
        bias = None if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k_BKTD, v_BKTD, attn_mask=bias).reshape(B, H, D)
    q = q * D**-0.5  # here, too, plain products are quicker
    if q.dtype.itemsize >= 4:
        scores = torch.matmul(q, k_BKTD.mT)
        scores = scores if bias is None else scores.add_(bias)
    else:  # the larger side first: 2 to 3 times as fast in bf16
        scores = torch.matmul(k_BKTD, q.mT).mT
        out = torch.empty(B, K, H // K, T, dtype=torch.float32)
        scores = out.copy_(scores) if bias is None else torch.add(scores, bias, out=out)
    return torch.matmul(scores.softmax(dim=-1).to(q.dtype), v_BKTD).reshape(B, H, D)


def reference_attention(
    q_NHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, cu_seqlens_B1: Tensor, cu_seqlens_k_B1: Tensor | None = None
) -> Tensor:
    """The same as `attention`, sequence by sequence, in fp32: slow, and easy to believe."""
    group = q_NHD.shape[1] // k_MKD.shape[1]
    bounds = cu_seqlens_B1.tolist()
    bounds_k = bounds if cu_seqlens_k_B1 is None else cu_seqlens_k_B1.tolist()
    outputs = []
    for start, end, start_k, end_k in zip(bounds, bounds[1:], bounds_k, bounds_k[1:], strict=False):
        q = q_NHD[start:end].float()
        k, v = (x[start_k:end_k].float().repeat_interleave(group, dim=1) for x in (k_MKD, v_MKD))
        scores_HTU = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        future_TU = torch.ones_like(scores_HTU[0], dtype=torch.bool).triu(1 + len(k) - len(q))
        weights_HTU = scores_HTU.masked_fill(future_TU, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights_HTU, v))
    return torch.cat(outputs).to(q_NHD.dtype)


def _triton_kernels(q: Tensor):
    """The module of Triton kernels if it takes such queries; None on a CPU, and with a warning elsewhere."""
    if q.device.type == "cpu":
        return None
    try:
        from nanor1 import kernels  # triton comes with torch's CUDA builds only
    except ImportError:
        reason = "triton is not installed"
    else:
        reason = kernels.unsupported(q)
        if reason is None:
            return kernels
    warnings.warn(f"attention runs in torch's SDPA, slower and padded: {reason}", stacklevel=2)
    return None


def _attend_in_groups(q_NHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, lengths: list[int], lengths_k: list[int]) -> Tensor:
    """Attention in a rectangle for each group of neighbours of similar length."""
    groups = [list(zip(*group, strict=True)) for group in _groups_of_similar_length(lengths, lengths_k)]
    sizes, sizes_k = ([sum(group[i]) for group in groups] for i in (0, 1))
    parts = zip(q_NHD.split(sizes), k_MKD.split(sizes_k), v_MKD.split(sizes_k), groups, strict=True)
    outputs = []
    for q, k, v, (group, group_k) in parts:
        lengths_B = torch.tensor(group)
        lengths_k_B = lengths_B if group == group_k else torch.tensor(group_k)
        outputs.append(_attend_in_rectangle(q, k, v, lengths_B, lengths_k_B, max(group), max(group_k)))
    return torch.cat(outputs)


def _groups_of_similar_length(
    lengths: list[int], lengths_k: list[int], waste: float = 1.25, n_tokens: int = 512
) -> list[list[tuple[int, int]]]:
    """Cut the row of (queries, keys) where a rectangle of `n_tokens` or more would exceed `waste` times the real ones.

    >>> _groups_of_similar_length([9, 9, 8, 2, 2], [9, 9, 8, 9, 9], n_tokens=16)
    [[(9, 9), (9, 9), (8, 8)], [(2, 9), (2, 9)]]
    """
    groups, longest, total = [[]], (0, 0), (0, 0)
    for pair in zip(lengths, lengths_k, strict=True):
        longest, total = tuple(map(max, longest, pair)), (total[0] + pair[0], total[1] + pair[1])
        cells = [most * (len(groups[-1]) + 1) for most in longest]
        if total[1] - pair[1] >= n_tokens and any(n > waste * real for n, real in zip(cells, total, strict=True)):
            groups.append([])
            longest = total = pair
        groups[-1].append(pair)
    return groups


def _attend_by_sequence(
    q_NHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, lengths: list[int], lengths_k: list[int]
) -> Tensor:
    """One sequence after the other: plain products where it is short, SDPA, which skips what the mask hides, beyond."""
    sequences = zip(q_NHD.split(lengths), k_MKD.split(lengths_k), v_MKD.split(lengths_k), strict=True)
    return torch.cat(
        [
            _CausalProducts.apply(q, k, v) if len(k) <= SHORT else _causal(q[None], k[None], v[None])[0]
            for q, k, v in sequences
        ]
    )


class _CausalProducts(torch.autograd.Function):
    """Attention of the last T positions of a sequence of U, in fp32 by plain products; returns [T, H, D] in q's dtype.

    The query heads that share a key/value head are rows of one product with it. The probabilities, H * U numbers a
    query, are made again for the gradient where the sequence is longer than KEPT (as FlashAttention does, 2205.14135).
    """

    @staticmethod
    def forward(ctx, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor) -> Tensor:
        p, q = _probabilities(q_THD, k_UKD)
        ctx.save_for_backward(q_THD, k_UKD, v_UKD, *((p, q) if len(k_UKD) <= KEPT else ()))
        return _ungroup(torch.bmm(p, _wide(v_UKD).transpose(0, 1)), q_THD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_THD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_THD, k_UKD, v_UKD, *kept = ctx.saved_tensors
        p, q = kept or _probabilities(q_THD, k_UKD)
        dout, k, v = _group(_wide(dout_THD), k_UKD.shape[1]), *(_wide(x).transpose(0, 1) for x in (k_UKD, v_UKD))
        dv = torch.bmm(p.mT, dout)
        dp = torch.bmm(dout, v.mT)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dk = torch.bmm(ds.mT, q)
        dq = torch.bmm(ds, k).mul_(q_THD.shape[-1] ** -0.5)
        return _ungroup(dq, q_THD), dk.transpose(0, 1).to(k_UKD.dtype), dv.transpose(0, 1).to(v_UKD.dtype)


def _probabilities(q_THD: Tensor, k_UKD: Tensor) -> tuple[Tensor, Tensor]:
    """softmax of the scores, [K, T * G, U], and the scaled queries that they are made of, [K, T * G, D]."""
    T, (U, K) = len(q_THD), k_UKD.shape[:2]
    q = _group(_wide(q_THD) * q_THD.shape[-1] ** -0.5, K)
    scores = torch.bmm(q, _wide(k_UKD).transpose(0, 1).mT)
    scores.view(K, T, q_THD.shape[1] // K, U).add_(torch.full((T, U), float("-inf")).triu_(1 + U - T)[:, None])
    return scores.softmax(-1), q


def _wide(x: Tensor) -> Tensor:
    """In the dtype of scores: fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _group(x_THD: Tensor, K: int) -> Tensor:
    T, H, D = x_THD.shape
    return x_THD.view(T, K, H // K, D).transpose(0, 1).reshape(K, T * (H // K), D)


def _ungroup(x: Tensor, q_THD: Tensor) -> Tensor:
    """[K, T * G, D] -> [T, H, D] in the dtype of the queries."""
    (T, H, D), K = q_THD.shape, len(x)
    return x.view(K, T, H // K, D).transpose(0, 1).reshape(T, H, D).to(q_THD.dtype)


def _attend_in_rectangle(
    q_NHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, lengths_B: Tensor, lengths_k_B: Tensor, max_len: int, max_len_k: int
) -> Tensor:
    """`lengths_k_B` is the very tensor `lengths_B` where no sequence has more keys than queries."""
    is_square = lengths_k_B is lengths_B
    cells = _rectangle(lengths_B, max_len, len(q_NHD))
    cells_k = cells if is_square else _rectangle(lengths_k_B, max_len_k, len(k_MKD))
    q_BTHD = _pad(q_NHD, cells, (len(lengths_B), max_len))
    k_BUKD, v_BUKD = (_pad(x, cells_k, (len(lengths_B), max_len_k)) for x in (k_MKD, v_MKD))
    out_BTHD = _causal(q_BTHD, k_BUKD, v_BUKD, None if is_square else lengths_k_B - lengths_B)
    return out_BTHD.flatten(0, 1) if cells is None else _Unpad.apply(out_BTHD, cells[1])


def _causal(q_BTHD: Tensor, k_BUKD: Tensor, v_BUKD: Tensor, offset_B: Tensor | None = None) -> Tensor:
    """Query i of row b sees the keys j <= i + offset_B[b]; None: the queries are the last positions of each row."""
    T, U = q_BTHD.shape[1], k_BUKD.shape[1]
    if offset_B is None and T != U:
        offset_B = torch.tensor([U - T])
    if _is_narrow(q_BTHD) and T <= SHORT_IF_NARROW and q_BTHD.device.type == "cpu" and q_BTHD.dtype == torch.float32:
        return _causal_products(q_BTHD, k_BUKD, v_BUKD, offset_B)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BUKD, v_BUKD))
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    mask = None if offset_B is None else _is_seen(T, U, offset_B)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def _is_narrow(q: Tensor) -> bool:
    return q.shape[-2] * q.shape[-1] < NARROW


def _causal_products(q_BTHD: Tensor, k_BUKD: Tensor, v_BUKD: Tensor, offset_B: Tensor | None) -> Tensor:
    """Scores in full; the query heads that share a key/value head are rows of one matrix product with it."""
    B, T, H, D = q_BTHD.shape
    U, K = k_BUKD.shape[1:3]
    if offset_B is None:
        hidden_BTU = torch.full((1, T, T), float("-inf")).triu(1)
    else:
        hidden_BTU = torch.zeros(B, T, U).masked_fill_(~_is_seen(T, U, offset_B), float("-inf"))
    q = (q_BTHD * D**-0.5).reshape(B, T, K, H // K, D).transpose(1, 2).reshape(B * K, T * (H // K), D)
    k, v = (x.transpose(1, 2).reshape(B * K, U, D) for x in (k_BUKD, v_BUKD))
    scores = torch.bmm(q, k.mT).view(B, K, T, H // K, U) + hidden_BTU[:, None, :, None]
    out = torch.bmm(scores.softmax(dim=-1).view(B * K, T * (H // K), U), v)
    return out.view(B, K, T, H // K, D).transpose(1, 2).reshape(B, T, H, D)


def _is_seen(T: int, U: int, offset_B: Tensor) -> Tensor:
    """[B, T, U]: may query i look at key j? A padded query looks at something, so that nothing is nan."""
    i_T1, j_U = torch.arange(T, device=offset_B.device)[:, None], torch.arange(U, device=offset_B.device)
    return j_U <= i_T1 + offset_B[:, None, None]


def _rectangle(lengths_B: Tensor, max_len: int, n_tokens: int) -> tuple[Tensor, Tensor] | None:
    """For each cell of the [B, T] rectangle its packed token (0 where padded), and for each packed token its cell.

    None where lengths are equal: the packed tokens are the rectangle already.
    """
    if len(lengths_B) * max_len == n_tokens:
        return None
    starts_B = lengths_B.cumsum(0) - lengths_B
    column_T = torch.arange(max_len, device=lengths_B.device)
    is_real_BT = column_T < lengths_B[:, None]
    packed_index_BT = torch.where(is_real_BT, starts_B[:, None] + column_T, 0)
    return packed_index_BT.flatten(), is_real_BT.flatten().nonzero().squeeze(1)


def _pad(x_NHD: Tensor, cells: tuple[Tensor, Tensor] | None, shape: tuple[int, int]) -> Tensor:
    return x_NHD.unflatten(0, shape) if cells is None else _Pad.apply(x_NHD, *cells, shape)


class _Pad(torch.autograd.Function):
    """[N, H, D] -> [B, T, H, D]. Its backward is a gather too, where autograd's own would be a slow scatter-add."""

    @staticmethod
    def forward(ctx, x_NHD, packed_index, padded_index, shape):
        ctx.save_for_backward(padded_index)
        return x_NHD.index_select(0, packed_index).unflatten(0, shape)

    @staticmethod
    def backward(ctx, grad_BTHD):
        (padded_index,) = ctx.saved_tensors
        return grad_BTHD.flatten(0, 1).index_select(0, padded_index), None, None, None


class _Unpad(torch.autograd.Function):
    """[B, T, H, D] -> [N, H, D]; padded cells get a zero gradient."""

    @staticmethod
    def forward(ctx, x_BTHD, padded_index):
        ctx.save_for_backward(padded_index)
        ctx.shape = x_BTHD.shape
        return x_BTHD.flatten(0, 1).index_select(0, padded_index)

    @staticmethod
    def backward(ctx, grad_NHD):
        (padded_index,) = ctx.saved_tensors
        grad = grad_NHD.new_zeros(ctx.shape)
        grad.view(-1, *ctx.shape[2:]).index_copy_(0, padded_index, grad_NHD)
        return grad, None
