"""Causal attention over packed sequences, and over a key/value cache: one call each.

Sequences lie end to end, `cu_seqlens_B1 = [0, len_0, len_0 + len_1, ...]`; no token attends across a boundary. The
queries of a sequence may be only its last positions: a chunk of a prompt, or a completion behind a prompt that others
share. Then keys have their own `cu_seqlens_k_B1`, and query i of a sequence sees its keys j <= i + k_len - q_len.

On CUDA the Triton kernels take them as they lie (kernels.py). A CPU takes a few queries of a sequence at a time, by
plain products with the keys that they see. Elsewhere, with a warning that says why, once, sequences are copied into a
rectangle for torch's scaled_dot_product_attention (SDPA). `reference_attention` says the same in the plainest way; the
tests compare them all.

Attention: Vaswani et al. 2017 (1706.03762, eq. 1); grouped queries: Ainslie et al. 2023 (2305.13245).
"""

import warnings
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanor1.packing import TileTable

BLOCK = 64  # queries at a time on a CPU: fewer are more calls, more reach further beyond what is seen
FEW_ROWS = 4  # of a decode step: up to here SDPA is quicker in bf16


def attention(
    q_NHD: Tensor,
    k_JKD: Tensor,
    v_JKD: Tensor,
    cu_seqlens_B1: Tensor,
    cu_seqlens_k_B1: Tensor,
    table: TileTable | None = None,
) -> Tensor:
    """Causal attention within each packed sequence; returns out_NHD in q's dtype, scaled by D ** -0.5.

    `cu_seqlens_B1` and `cu_seqlens_k_B1` are int64 on q's device, from 0 to N and J. `table` is made of them for the
    Triton kernels (nanor1.packing.tile_table; None: for this call alone).
    """
    kernels = _triton_kernels(q_NHD)
    if kernels is not None:
        return kernels.flash_attention(q_NHD, k_JKD, v_JKD, cu_seqlens_B1, cu_seqlens_k_B1, table)
    if q_NHD.device.type == "cpu":
        return _Products.apply(q_NHD, k_JKD, v_JKD, cu_seqlens_B1.tolist(), cu_seqlens_k_B1.tolist())
    return _in_a_rectangle(q_NHD, k_JKD, v_JKD, cu_seqlens_B1, cu_seqlens_k_B1)


def cached_attention(
    q_BHD: Tensor,
    k_SKTD: Tensor,
    v_SKTD: Tensor,
    slot_B: Tensor | None,
    length_B: Tensor,
    max_len: int,
    bias_BT: Tensor | None = None,
) -> Tensor:
    """Attention of one query a row to the first length_B[b] keys of slot slot_B[b] (None: b); returns out_BHD.

    A slot's row of length 0 gives zeros. `max_len` is the longest length or more (the Triton kernels do not look at
    it); cells of the cache up to there must be finite. Not differentiable on CUDA. Without kernels slots cost a copy of
    the rows; none are used where `bias_BT` is given, which is that of `hide_behind`, for several calls to share.
    """
    kernels = _triton_kernels(q_BHD) if bias_BT is None else None
    if kernels is not None:
        return kernels.flash_decode(q_BHD, k_SKTD, v_SKTD, slot_B, length_B)
    bias_BT = hide_behind(length_B, max_len) if bias_BT is None else bias_BT
    rows = slice(len(q_BHD)) if slot_B is None else slot_B
    k, v, bias = k_SKTD[rows, :, :max_len], v_SKTD[rows, :, :max_len], bias_BT[:, None, None, :]
    B, K, _, D = k.shape
    q = q_BHD.view(B, K, -1, D)  # the query heads that share a key/value head are rows of one product with it
    if q.device.type != "cpu" or (q.dtype.itemsize < 4 and B <= FEW_ROWS):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    else:  # here, too, plain products are quicker
        q = q * D**-0.5
        if q.dtype.itemsize >= 4:
            scores = torch.matmul(q, k.mT).add_(bias)
        else:  # the larger side first: 2 to 3 times as fast in bf16
            scores = torch.matmul(k, q.mT).mT
            scores = torch.add(scores, bias, out=torch.empty(scores.shape, dtype=torch.float32))
        out = torch.matmul(scores.softmax(dim=-1).to(q.dtype), v)
    out_BHD = out.reshape(q_BHD.shape)
    return out_BHD if slot_B is None else out_BHD.masked_fill(length_B[:, None, None] == 0, 0.0)  # it was nan


def hide_behind(length_B: Tensor, n_keys: int) -> Tensor:
    """What is added to the scores of rows that hold so many keys: 0, and -inf behind the last one; fp32 [B, T]."""
    is_hidden_BT = torch.arange(n_keys, device=length_B.device) >= length_B[:, None]
    return torch.zeros_like(is_hidden_BT, dtype=torch.float32).masked_fill_(is_hidden_BT, float("-inf"))


def reference_attention(
    q_NHD: Tensor, k_JKD: Tensor, v_JKD: Tensor, cu_seqlens_B1: Tensor, cu_seqlens_k_B1: Tensor | None = None
) -> Tensor:
    """The same as `attention`, sequence by sequence, in fp32: slow, and easy to believe."""
    lengths = cu_seqlens_B1.diff().tolist()
    lengths_k = lengths if cu_seqlens_k_B1 is None else cu_seqlens_k_B1.diff().tolist()
    group, outputs = q_NHD.shape[1] // k_JKD.shape[1], []
    for q, *kv in zip(q_NHD.split(lengths), k_JKD.split(lengths_k), v_JKD.split(lengths_k), strict=True):
        k, v = (x.float().repeat_interleave(group, dim=1) for x in kv)
        scores_HTJ = torch.einsum("qhd,khd->hqk", q.float(), k) * q.shape[-1] ** -0.5
        future_TJ = torch.ones_like(scores_HTJ[0], dtype=torch.bool).triu(1 + len(k) - len(q))
        weights_HTJ = scores_HTJ.masked_fill(future_TJ, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights_HTJ, v))
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


class _Products(torch.autograd.Function):
    """Attention in fp32 by plain products, BLOCK queries of a sequence at a time; returns out_NHD in q's dtype.

    The query heads that share a key/value head are rows of one product with it, a query's rows one after the other.
    Of BLOCK keys or more, probabilities are made again for the gradient (as FlashAttention does, 2205.14135).
    """

    @staticmethod
    def forward(
        ctx, q_NHD: Tensor, k_JKD: Tensor, v_JKD: Tensor, bounds_B1: list[int], bounds_k_B1: list[int]
    ) -> Tensor:
        ctx.blocks = _blocks(bounds_B1, bounds_k_B1, group=q_NHD.shape[1] // k_JKD.shape[1])
        q, k, v, hidden = _by_kv_head(q_NHD, k_JKD, v_JKD)
        out, kept = torch.empty_like(q), []
        for rows, keys in ctx.blocks:
            p = _probabilities(q[:, rows], k[:, keys], hidden)
            torch.bmm(p, v[:, keys], out=out[:, rows])
            kept.append(p if p.shape[-1] < BLOCK else None)
        ctx.save_for_backward(q_NHD, k_JKD, v_JKD, *kept)
        return _packed(out, q_NHD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_NHD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_NHD, k_JKD, v_JKD, *kept = ctx.saved_tensors
        q, k, v, hidden = _by_kv_head(q_NHD, k_JKD, v_JKD)
        dout = _heads_first(dout_NHD, len(k))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (rows, keys), p in zip(ctx.blocks, kept, strict=True):
            p = _probabilities(q[:, rows], k[:, keys], hidden) if p is None else p
            dv[:, keys].baddbmm_(p.mT, dout[:, rows])
            dp = torch.bmm(dout[:, rows], v[:, keys].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dk[:, keys].baddbmm_(ds.mT, q[:, rows])
            torch.bmm(ds, k[:, keys], out=dq[:, rows])
        dq *= q_NHD.shape[-1] ** -0.5
        return _packed(dq, q_NHD), _packed(dk, k_JKD), _packed(dv, v_JKD), None, None


def _blocks(bounds_B1: list[int], bounds_k_B1: list[int], group: int) -> list[tuple[slice, slice]]:
    """For some queries of a sequence at a time, their rows of the products and the keys up to the last one they see.

    >>> _blocks([0, 70], [0, 75], group=2)
    [(slice(0, 128, None), slice(0, 69, None)), (slice(128, 140, None), slice(0, 75, None))]
    """
    return [
        (slice(i * group, min(i + BLOCK, end) * group), slice(start_k, end_k - max(end - i - BLOCK, 0)))
        for (start, end), (start_k, end_k) in zip(pairwise(bounds_B1), pairwise(bounds_k_B1), strict=True)
        for i in range(start, end, BLOCK)
    ]


def _by_kv_head(q_NHD: Tensor, k_JKD: Tensor, v_JKD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled queries [K, N * group, D], keys and values [K, J, D], and what is added to scores of keys yet to come."""
    q, k, v = (_heads_first(x, k_JKD.shape[1]) for x in (q_NHD, k_JKD, v_JKD))
    hidden = torch.full((BLOCK, BLOCK), float("-inf"), dtype=q.dtype).triu_(1)
    return q * q.shape[-1] ** -0.5, k, v, hidden.repeat_interleave(q_NHD.shape[1] // k_JKD.shape[1], 0)


def _probabilities(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """softmax of the scores of rows whose last query sees all keys, the one before it all but one, and so on."""
    rows, n_queries = q.shape[1], q.shape[1] * BLOCK // len(hidden)
    scores = torch.bmm(q, k.mT)
    scores[..., -n_queries:].add_(hidden[:rows, :n_queries])
    return scores.softmax(-1)


def _heads_first(x_NHD: Tensor, K: int) -> Tensor:
    """[N, H, D] -> [K, N * H / K, D] in the dtype of scores: fp32, or fp64 for fp64."""
    wide = x_NHD.to(torch.promote_types(x_NHD.dtype, torch.float32))
    return wide.unflatten(1, (K, -1)).transpose(0, 1).flatten(1, 2)


def _packed(x: Tensor, like_NHD: Tensor) -> Tensor:
    """The way back, into the shape and dtype of another."""
    return x.unflatten(1, (len(like_NHD), -1)).transpose(0, 1).reshape(like_NHD.shape).to(like_NHD.dtype)


def _in_a_rectangle(q_NHD: Tensor, k_JKD: Tensor, v_JKD: Tensor, cu_B1: Tensor, cu_k_B1: Tensor) -> Tensor:
    """One SDPA for all sequences; the device is asked for their longest lengths.

    Behind the end of a sequence stands whatever follows it. Its own queries see no key there, and those are not read.
    """
    n_queries, n_keys = torch.stack([cu_B1, cu_k_B1]).diff().amax(1).tolist()  # the one wait for the device
    q_BHTD, k_BKJD, v_BKJD = _pad(q_NHD, cu_B1, n_queries), _pad(k_JKD, cu_k_B1, n_keys), _pad(v_JKD, cu_k_B1, n_keys)
    k_BHJD, v_BHJD = (x.repeat_interleave(q_BHTD.shape[1] // x.shape[1], dim=1) for x in (k_BKJD, v_BKJD))
    is_seen_B1TJ = None  # a causal mask, which is quicker not given
    if len(q_NHD) != len(k_JKD):
        offset_B = cu_k_B1.diff() - cu_B1.diff()
        i_T, j_J = (torch.arange(x.shape[2], device=x.device) for x in (q_BHTD, k_BHJD))
        is_seen_B1TJ = j_J <= i_T[:, None] + offset_B[:, None, None, None]
    out_BHTD = F.scaled_dot_product_attention(
        q_BHTD, k_BHJD, v_BHJD, attn_mask=is_seen_B1TJ, is_causal=is_seen_B1TJ is None
    )
    token_N = torch.arange(len(q_NHD), device=cu_B1.device)
    row_N = torch.searchsorted(cu_B1, token_N, right=True) - 1
    return out_BHTD.transpose(1, 2).flatten(0, 1).index_select(0, row_N * q_BHTD.shape[2] + token_N - cu_B1[row_N])


def _pad(x_NHD: Tensor, cu_B1: Tensor, max_len: int) -> Tensor:
    """[N, H, D] -> [B, H, T, D]; of a token's cells one at most has a gradient, so their sum has no order."""
    index_BT = (cu_B1[:-1, None] + torch.arange(max_len, device=cu_B1.device)).clamp(max=len(x_NHD) - 1)
    return x_NHD.index_select(0, index_BT.flatten()).unflatten(0, index_BT.shape).transpose(1, 2)
