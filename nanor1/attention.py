"""Causal attention over packed sequences, and over a key/value cache: one call each.

Sequences lie end to end, `cu_seqlens_B1 = [0, len_0, len_0 + len_1, ...]`; no token attends across a boundary. This is
the one module in which padding exists: torch's scaled_dot_product_attention (SDPA) wants a rectangle, so sequences are
copied into one and the result is copied back. A padded key lies after every real token of its row, so the causal mask
hides it, and no gradient reaches it.

`reference_attention` says the same in the plainest way; the tests compare the two. Attention: Vaswani et al. 2017
(1706.03762, eq. 1); grouped queries: Ainslie et al. 2023 (2305.13245).

Letters: N packed tokens, B sequences, T longest sequence, H query heads, K key/value heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 128  # up to this length plain matrix products beat SDPA's tiles on a CPU in fp32 (2x at 30 tokens)


def attention(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, cu_seqlens_B1: Tensor, max_len: int) -> Tensor:
    """Causal attention within each packed sequence; returns out_NHD in q's dtype, scaled by D ** -0.5.

    `cu_seqlens_B1` is int64 on q's device, starting at 0 and ending at N; `max_len` is the longest sequence. Neighbours
    of similar length share a rectangle, so sequences sorted by length waste least.
    """
    if q_NHD.device.type != "cpu":  # one rectangle: its shape is known without asking the device
        return _attend_in_rectangle(q_NHD, k_NKD, v_NKD, cu_seqlens_B1.diff(), max_len)
    groups = _groups_of_similar_length(cu_seqlens_B1.diff().tolist())
    sizes = [sum(group) for group in groups]
    parts = zip(q_NHD.split(sizes), k_NKD.split(sizes), v_NKD.split(sizes), groups, strict=True)
    return torch.cat([_attend_in_rectangle(q, k, v, torch.tensor(group), max(group)) for q, k, v, group in parts])


def decode_attention(q_BHD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Attention of one query a row to that row's cached keys; returns out_BHD.

    `mask_BT` is True where the cache holds a token of the row; None says every position does.
    """
    B, H, D = q_BHD.shape
    K = k_BKTD.shape[1]
    q = q_BHD.view(B, K, H // K, D)  # the query heads that share a key/value head read it once, as rows of one product
    mask = None if mask_BT is None else mask_BT[:, None, None, :]
    if q.device.type == "cpu" and q.dtype == torch.float32:  # here, too, plain products are quicker
        scores = torch.matmul(q * D**-0.5, k_BKTD.mT)
        weights = (scores if mask is None else scores.masked_fill_(~mask, float("-inf"))).softmax(dim=-1)
        return torch.matmul(weights, v_BKTD).reshape(B, H, D)
    return F.scaled_dot_product_attention(q, k_BKTD, v_BKTD, attn_mask=mask).reshape(B, H, D)


def reference_attention(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, cu_seqlens_B1: Tensor) -> Tensor:
    """The same as `attention`, sequence by sequence, in fp32: slow, and easy to believe."""
    group = q_NHD.shape[1] // k_NKD.shape[1]
    outputs = []
    for start, end in zip(cu_seqlens_B1.tolist(), cu_seqlens_B1.tolist()[1:], strict=False):
        q = q_NHD[start:end].float()
        k, v = (x[start:end].float().repeat_interleave(group, dim=1) for x in (k_NKD, v_NKD))
        scores_HTT = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        future_TT = torch.ones_like(scores_HTT[0], dtype=torch.bool).triu(1)
        weights_HTT = scores_HTT.masked_fill(future_TT, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights_HTT, v))
    return torch.cat(outputs).to(q_NHD.dtype)


def _groups_of_similar_length(lengths: list[int], waste: float = 1.25, n_tokens: int = 512) -> list[list[int]]:
    """Cut the row of lengths where a rectangle of `n_tokens` or more would exceed `waste` times its real tokens.

    >>> _groups_of_similar_length([9, 9, 8, 2, 2], n_tokens=16)
    [[9, 9, 8], [2, 2]]
    """
    groups, longest, total = [[]], 0, 0
    for length in lengths:
        longest = max(longest, length)
        if total >= n_tokens and longest * (len(groups[-1]) + 1) > waste * (total + length):
            groups.append([])
            longest, total = length, 0
        groups[-1].append(length)
        total += length
    return groups


def _attend_in_rectangle(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, lengths_B: Tensor, max_len: int) -> Tensor:
    shape = len(lengths_B), max_len
    if len(lengths_B) * max_len == len(q_NHD):  # equal lengths: the packed tokens are the rectangle already
        q, k, v = (x.unflatten(0, shape) for x in (q_NHD, k_NKD, v_NKD))
        return _causal(q, k, v).flatten(0, 1)
    packed_index, padded_index = _rectangle(lengths_B, max_len)
    q, k, v = (_Pad.apply(x, packed_index, padded_index, shape) for x in (q_NHD, k_NKD, v_NKD))
    return _Unpad.apply(_causal(q, k, v), padded_index)


def _causal(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
    if q_BTHD.shape[1] <= SHORT and q_BTHD.device.type == "cpu" and q_BTHD.dtype == torch.float32:
        return _causal_products(q_BTHD, k_BTKD, v_BTKD)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _causal_products(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
    """Scores in full; the query heads that share a key/value head are rows of one matrix product with it."""
    B, T, H, D = q_BTHD.shape
    K = k_BTKD.shape[2]
    future_TT = torch.full((T, T), float("-inf"), dtype=q_BTHD.dtype).triu(1)
    q = (q_BTHD * D**-0.5).reshape(B, T, K, H // K, D).transpose(1, 2).reshape(B * K, T * (H // K), D)
    k, v = (x.transpose(1, 2).reshape(B * K, T, D) for x in (k_BTKD, v_BTKD))
    scores = torch.bmm(q, k.mT).view(B * K, T, H // K, T) + future_TT[:, None]
    out = torch.bmm(scores.softmax(dim=-1).flatten(1, 2), v)
    return out.view(B, K, T, H // K, D).transpose(1, 2).reshape(B, T, H, D)


def _rectangle(lengths_B: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
    """For each cell of the [B, T] rectangle its packed token (0 where padded), and for each packed token its cell."""
    starts_B = lengths_B.cumsum(0) - lengths_B
    column_T = torch.arange(max_len, device=lengths_B.device)
    is_real_BT = column_T < lengths_B[:, None]
    packed_index_BT = torch.where(is_real_BT, starts_B[:, None] + column_T, 0)
    return packed_index_BT.flatten(), is_real_BT.flatten().nonzero().squeeze(1)


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
