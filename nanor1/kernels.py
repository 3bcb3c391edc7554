"""FlashAttention in Triton: causal, packed, grouped-query attention with its backward, and decoding over a cache.

One query i sees the keys j <= i + offset of its sequence, offset = k_len - q_len: the queries are the last positions.
With s_ij = q_i . k_j / sqrt(D):

    forward     out_i = sum_j p_ij v_j,   p_ij = exp(s_ij - L_i),   L_i = log sum_j exp(s_ij)
    backward    dv_j = sum_i p_ij do_i                  dp_ij = do_i . v_j
                ds_ij = p_ij (dp_ij - delta_i)          delta_i = sum_j p_ij dp_ij = do_i . out_i
                dq_i = sum_j ds_ij k_j / sqrt(D)        dk_j = sum_i ds_ij q_i / sqrt(D)

Scores are never stored. Forward walks over blocks of keys and keeps, for each query, the largest score so far m,
total = sum exp(s - m) and acc = sum exp(s - m) v; when m grows to m', both are multiplied by exp(m - m'). At the end
out = acc / total and L = m + log total. Backward recomputes p from L. It is split in two: one kernel owns a block of
queries and makes dq (and delta), one owns a block of keys and makes dk and dv, walking over the queries of every head
that shares them. Two matrix products are done twice that way (7 instead of 5), but no sum depends on the order in which
programs run, so gradients are the same in every run. Exponentials are powers of 2: scores, and so L, carry a factor
log2(e).

Decoding has one query a row, so the keys are split among programs: each gives out and L of its share. Share r holds
exp(L_r) of the total, so a second small kernel makes out = sum_r exp(L_r) out_r / sum_r exp(L_r).

How programs find their work: in a table of tiles of 128 tokens (nanor1.packing.tile_table), those with most work
first, which torch makes on the device once for all layers; no length is ever read by the host. Blocks smaller than a
tile share its entry; spare tiles return at once. L and delta lie in tiles of 128 too, [H, tiles * 128], and hold inf
and 0 behind a sequence's end: p is 0 there, and no loop over queries needs another mask. Behind the last key lies the
next sequence (or zeros, which a tensor descriptor gives beyond its bounds): the causal mask hides it. So only stores
are masked; but a token that is not finite spoils its neighbours.

Sources: FlashAttention-2 (Dao 2023, 2307.08691) for both passes; Milakov and Gimelshein 2018 (1805.02867) for the
online softmax; Flash-Decoding (Dao, Haziza, Massa, Sizov 2023) for the split. Left out: dropout, bias, other masks than
the causal one, and warp specialisation, which Triton 3.6 and 3.7 offer for few kernels.

In kernels i is a query, j a key, and GROUP query heads share a key/value head.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanor1 import packing

HEAD_WIDTHS = (*range(16, 129, 8),)  # steps of 16 bytes in half precision, which descriptors and async copies need
TILE = tl.constexpr(packing.TILE)  # every block of a tile table's rows is one, or a part of one
COLUMNS = tl.constexpr(packing.TABLE_COLUMNS)
LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = triton.knobs.runtime.interpret  # read once, as triton does it when it defines the kernels
STRIDES = [f"{x}_stride_{dimension}" for x in "kv" for dimension in ("slot", "head", "token")]
# Arguments that no kernel is compiled anew for, whatever their value or address.
PLAIN = ["lse_stride", "n_splits", "table", "slots", "lengths", *STRIDES]


class Tiles(NamedTuple):
    """How a kernel is cut: a block of queries (decode: heads), a block of keys, and Triton's options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By kind of chip, width in registers and kernel: sizes that Triton 3.6 and 3.7 compile with 32 bytes of spills or less,
# see tests/test_kernels.py; tests/bench/bench_attention.py --sweep times others. "ampere" fits the 99 KiB of shared
# memory of sm_86 and sm_89. dkdv's blocks of queries are no larger than those that write the L and delta it reads.
TILES = {
    ("hopper", 64): {
        "forward": Tiles(128, 64, 8, 2),
        "dq": Tiles(128, 64, 8, 2),
        "dkdv": Tiles(64, 128, 8, 2),
        "decode": Tiles(16, 64, 4, 3),
    },
    ("hopper", 128): {
        "forward": Tiles(128, 128, 8, 2),
        "dq": Tiles(128, 64, 8, 2),
        "dkdv": Tiles(64, 128, 8, 2),
        "decode": Tiles(16, 64, 4, 3),
    },
    ("ampere", 64): {
        "forward": Tiles(128, 32, 8, 2),
        "dq": Tiles(64, 32, 4, 2),
        "dkdv": Tiles(32, 32, 4, 2),
        "decode": Tiles(16, 64, 4, 3),
    },
    ("ampere", 128): {
        "forward": Tiles(64, 32, 4, 2),
        "dq": Tiles(64, 16, 8, 2),
        "dkdv": Tiles(32, 32, 8, 2),
        "decode": Tiles(16, 32, 4, 3),
    },
}


@triton.jit
def _find_block(table, BLOCK: tl.constexpr):
    """This program's block: its first row within its sequence; of that q_start, q_len, k_start, k_len, start of L."""
    part: tl.constexpr = TILE // BLOCK
    entry = table + tl.program_id(1) // part * COLUMNS
    first = tl.load(entry) + tl.program_id(1) % part * BLOCK
    return first, tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)


@triton.jit
def _load(x, row, end, head, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows row .. row + ROWS of one head of a packed tensor, as _describe gives it; zero where out of bounds.

    Those from `end` on, which belong to the next sequence, are zero only where there is no descriptor.
    """
    if isinstance(x, tl.tensor_descriptor):
        return x.load([head, row, 0]).reshape(ROWS, COLUMNS)
    else:
        i, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        first = x.pointer + (row.to(tl.int64) * x.row_stride + head * x.head_stride) * 8
        mask = (row + i < end)[:, None] & (column < D)[None, :]
        return tl.load(first + i[:, None] * (x.row_stride * 8) + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(pointer, x, start, first, length, head, heads, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the rows first .. of a sequence, up to its length, into one head of a contiguous [N, heads, D] tensor."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    offset = ((start + row).to(tl.int64)[:, None] * heads + head) * D + column[None, :]
    mask = (row < length)[:, None] & (column < D)[None, :]
    tl.store(pointer + offset, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _fold(s, m, total, acc, scale: tl.constexpr):
    """Online softmax: what a block of scores [rows, keys] adds to m and total, its p, and acc in the new scale."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    return p, m_new, total * shrink + tl.sum(p, 1), acc * shrink[:, None]


@triton.jit(do_not_specialize=PLAIN)
def _forward_kernel(
    q_NHD, k_JKD, v_JKD, out, lse, table, lse_stride,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (h, block): a block of queries of one head against all keys that they see."""
    h = tl.program_id(0)
    i0, q_start, q_len, k_start, k_len, lse_start = _find_block(table, BLOCK_M)
    if i0 >= q_len:
        return
    offset = k_len - q_len
    scale: tl.constexpr = D**-0.5 * LOG2_E

    i = i0 + tl.arange(0, BLOCK_M)
    q = _load(q_NHD, q_start + i0, q_start + q_len, h, D, BLOCK_M, WIDTH)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    n_open = (i0 + offset + 1) // BLOCK_N * BLOCK_N  # keys before this one are seen by every query of the block
    n_seen = tl.minimum(i0 + BLOCK_M, q_len) + offset
    for MASKED in tl.static_range(2):
        first, last = (n_open, n_seen) if MASKED else (0, n_open)
        for j0 in tl.range(first, last, BLOCK_N):
            k = _load(k_JKD, k_start + j0, k_start + k_len, h // GROUP, D, BLOCK_N, WIDTH)
            s = tl.dot(q, k.T)
            if MASKED:
                j = j0 + tl.arange(0, BLOCK_N)
                s = tl.where(j[None, :] <= (i + offset)[:, None], s, float("-inf"))
            p, m, total, acc = _fold(s, m, total, acc, scale)
            v = _load(v_JKD, k_start + j0, k_start + k_len, h // GROUP, D, BLOCK_N, WIDTH)
            acc = tl.dot(p.to(v.dtype), v, acc)

    lse_row = lse + h * lse_stride.to(tl.int64) + lse_start
    tl.store(lse_row + i, tl.where(i < q_len, m + tl.log2(total), float("inf")))
    _store(out, acc / total[:, None], q_start, i0, q_len, h, tl.num_programs(0), D, BLOCK_M, WIDTH)


@triton.jit(do_not_specialize=PLAIN)
def _dq_kernel(
    q_NHD, k_JKD, v_JKD, out_NHD, dout_NHD, lse, delta, dq, table, lse_stride,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (h, block), as in the forward pass: delta and dq of a block of queries."""
    h = tl.program_id(0)
    i0, q_start, q_len, k_start, k_len, lse_start = _find_block(table, BLOCK_M)
    if i0 >= q_len:
        return
    offset = k_len - q_len
    scale: tl.constexpr = D**-0.5 * LOG2_E

    i = i0 + tl.arange(0, BLOCK_M)
    lse_row = h * lse_stride.to(tl.int64) + lse_start + i
    out = _load(out_NHD, q_start + i0, q_start + q_len, h, D, BLOCK_M, WIDTH)
    dout = _load(dout_NHD, q_start + i0, q_start + q_len, h, D, BLOCK_M, WIDTH)
    delta_i = tl.where(i < q_len, tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1), 0.0)
    tl.store(delta + lse_row, delta_i)
    lse_i = tl.load(lse + lse_row)
    q = _load(q_NHD, q_start + i0, q_start + q_len, h, D, BLOCK_M, WIDTH)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    n_open = (i0 + offset + 1) // BLOCK_N * BLOCK_N
    n_seen = tl.minimum(i0 + BLOCK_M, q_len) + offset
    for MASKED in tl.static_range(2):
        first, last = (n_open, n_seen) if MASKED else (0, n_open)
        for j0 in tl.range(first, last, BLOCK_N):
            k = _load(k_JKD, k_start + j0, k_start + k_len, h // GROUP, D, BLOCK_N, WIDTH)
            v = _load(v_JKD, k_start + j0, k_start + k_len, h // GROUP, D, BLOCK_N, WIDTH)
            p = tl.exp2(tl.dot(q, k.T) * scale - lse_i[:, None])
            if MASKED:
                j = j0 + tl.arange(0, BLOCK_N)
                p = tl.where(j[None, :] <= (i + offset)[:, None], p, 0.0)
            ds = p * (tl.dot(dout, v.T) - delta_i[:, None])
            acc = tl.dot(ds.to(k.dtype), k, acc)
    _store(dq, acc * D**-0.5, q_start, i0, q_len, h, tl.num_programs(0), D, BLOCK_M, WIDTH)


@triton.jit(do_not_specialize=PLAIN)
def _dkdv_kernel(
    q_NHD, k_JKD, v_JKD, dout_NHD, lse_desc, delta_desc, dk, dv, table,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (kv head, block): dk and dv of a block of keys, from all queries that see one of them, head after head.

    Scores lie transposed, [keys, queries], and so are the left side of both sums as they are. Registers are scarce:
    a second loop without mask, or L and delta loaded through pointers, makes them spill at width 128.
    """
    kv_head = tl.program_id(0)
    j0, q_start, q_len, k_start, k_len, lse_start = _find_block(table, BLOCK_N)
    if j0 >= k_len:
        return
    offset = k_len - q_len
    scale: tl.constexpr = D**-0.5 * LOG2_E

    j = j0 + tl.arange(0, BLOCK_N)
    k = _load(k_JKD, k_start + j0, k_start + k_len, kv_head, D, BLOCK_N, WIDTH)
    v = _load(v_JKD, k_start + j0, k_start + k_len, kv_head, D, BLOCK_N, WIDTH)
    dk_acc = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    i_first = tl.maximum(j0 - offset, 0) // BLOCK_M * BLOCK_M
    n_blocks = tl.cdiv(q_len - i_first, BLOCK_M)
    for step in tl.range(0, GROUP * n_blocks):  # one loop: a loop over heads would fill the pipeline anew for each
        h = kv_head * GROUP + step // n_blocks
        i0 = i_first + step % n_blocks * BLOCK_M
        q = _load(q_NHD, q_start + i0, q_start + q_len, h, D, BLOCK_M, WIDTH)
        dout = _load(dout_NHD, q_start + i0, q_start + q_len, h, D, BLOCK_M, WIDTH)
        lse_i = lse_desc.load([h, lse_start + i0]).reshape(BLOCK_M)
        p = tl.exp2(tl.dot(k, q.T) * scale - lse_i[None, :])
        i = i0 + tl.arange(0, BLOCK_M)
        p = tl.where(j[:, None] <= (i + offset)[None, :], p, 0.0)
        dv_acc = tl.dot(p.to(dout.dtype), dout, dv_acc)
        delta_i = delta_desc.load([h, lse_start + i0]).reshape(BLOCK_M)
        ds = p * (tl.dot(v, dout.T) - delta_i[None, :])
        dk_acc = tl.dot(ds.to(q.dtype), q, dk_acc)
    _store(dv, dv_acc, k_start, j0, k_len, kv_head, tl.num_programs(0), D, BLOCK_N, WIDTH)
    _store(dk, dk_acc * D**-0.5, k_start, j0, k_len, kv_head, tl.num_programs(0), D, BLOCK_N, WIDTH)


@triton.jit(do_not_specialize=PLAIN)
def _decode_kernel(
    q, k, v, slots, lengths, out, lse,  # strides are in units of 8: so the compiler knows that it may load 16 bytes
    k_stride_slot, k_stride_head, k_stride_token, v_stride_slot, v_stride_head, v_stride_token,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (split, kv head, row): a share of the keys against all heads that share them, rows of one product.

    `out` [splits, B, H, D] and `lse` [splits, B, H] are those of the share. Of an empty one lse is -inf, and out is not
    written but by split 0, which gives 0: a short row of a long cache costs no more than its keys.
    """
    split, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_splits, K, B = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    length = tl.load(lengths + b).to(tl.int32)
    slot = (b if slots is None else tl.load(slots + b)).to(tl.int64)
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), n_splits) * BLOCK_N
    first = split * share
    last = tl.minimum(first + share, length)
    scale: tl.constexpr = D**-0.5 * LOG2_E

    g = tl.arange(0, BLOCK_M)
    column = tl.arange(0, WIDTH)
    mask = (g < GROUP)[:, None] & (column < D)[None, :]
    row = (b * K + kv_head) * GROUP + g
    share_row = row + (split * B * K * GROUP).to(tl.int64)
    if (split > 0) & (first >= length):
        tl.store(lse + share_row, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=g < GROUP)
        return
    q_tile = tl.load(q + row[:, None] * D + column[None, :], mask=mask, other=0.0)
    k_row = k + (slot * k_stride_slot + kv_head * k_stride_head) * 8 + column[None, :]
    v_row = v + (slot * v_stride_slot + kv_head * v_stride_head) * 8 + column[None, :]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for j0 in tl.range(first, last, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        is_key = (j < last)[:, None] & (column < D)[None, :]  # other cells of a cache may hold anything, nan as well
        k_tile = tl.load(k_row + j[:, None] * (k_stride_token * 8), mask=is_key, other=0.0)
        v_tile = tl.load(v_row + j[:, None] * (v_stride_token * 8), mask=is_key, other=0.0)
        s = tl.where((j < last)[None, :], tl.dot(q_tile, k_tile.T), float("-inf"))
        p, m, total, acc = _fold(s, m, total, acc, scale)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)

    total = tl.where(total > 0, total, 1.0)
    tl.store(lse + share_row, m + tl.log2(total), mask=g < GROUP)
    tl.store(out + share_row[:, None] * D + column[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=PLAIN)
def _combine_kernel(share_out, share_lse, out, n_splits, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """Program (row and head): the mean of the shares' out, weighted by 2 ** lse; 0 where all are empty."""
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, WIDTH)
    row = split.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    lse = tl.load(share_lse + row, mask=split < n_splits, other=float("-inf"))
    largest = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weight, 0)
    mask = (split < n_splits)[:, None] & (column < D)[None, :]
    x = tl.load(share_out + row[:, None] * D + column[None, :], mask=mask, other=0.0)
    x = tl.where((lse > float("-inf"))[:, None], x, 0.0)  # of an empty share nothing was written
    x = tl.sum(x * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + tl.program_id(0).to(tl.int64) * D + column, x.to(out.dtype.element_ty), mask=column < D)


def unsupported(q: Tensor) -> str | None:
    """Why the kernels cannot take queries q [..., D] of this device, dtype and width; None if they can."""
    if q.shape[-1] not in HEAD_WIDTHS:
        return f"head width {q.shape[-1]}; the Triton kernels take multiples of 8 from 16 to 128"
    if q.device.type == "cpu" and INTERPRETED:  # for tests; the interpreter gets bf16 wrong
        return None if q.dtype in (torch.float16, torch.float32) else f"{q.dtype} in Triton's interpreter"
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"device {q.device.type}; the Triton kernels are made for CUDA"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype}; the Triton kernels take bfloat16 and float16"
    major = torch.cuda.get_device_properties(q.device).major
    return None if major >= 8 else f"compute capability {major}.x; the Triton kernels need 8.0"


def flash_attention(
    q_NHD: Tensor,
    k_JKD: Tensor,
    v_JKD: Tensor,
    cu_seqlens_q_B1: Tensor,
    cu_seqlens_k_B1: Tensor,
    table: packing.TileTable | None = None,
) -> Tensor:
    """Causal attention within each packed sequence, differentiable; returns out_NHD in q's dtype.

    The queries of a sequence are its last positions: it has at least as many keys, and N and J differ if it has more.
    `cu_seqlens_*_B1` are int32 or int64, on q's device, from 0 to N and J; nothing reads them on the host. `table` is
    theirs (nanor1.packing.tile_table), for several calls to share; None: made here. Raises ValueError for what the
    kernels do not take.
    """
    _check(q_NHD, k_JKD, v_JKD)
    if len(cu_seqlens_q_B1) != len(cu_seqlens_k_B1):
        raise ValueError(f"{len(cu_seqlens_q_B1) - 1} sequences of queries, {len(cu_seqlens_k_B1) - 1} of keys")
    if table is None:
        table = packing.tile_table(cu_seqlens_q_B1, cu_seqlens_k_B1, len(q_NHD), len(k_JKD))
    return _forward(q_NHD, k_JKD, v_JKD, *table)[0]


def flash_decode(
    q_BHD: Tensor, k_SKTD: Tensor, v_SKTD: Tensor, slot_B: Tensor | None, length_B: Tensor, n_splits: int | None = None
) -> Tensor:
    """Attention of one query a row to the first length_B[b] keys of slot slot_B[b] (None: b); returns out_BHD.

    A row of length 0 gives zeros and reads no key. The cache may be strided, its last dimension dense and the other
    strides multiples of 8; cells beyond a length may hold anything. `n_splits` programs share the keys of a row (None:
    chosen from the shapes alone). Not differentiable. Raises ValueError for what the kernels do not take.
    """
    _check(q_BHD, k_SKTD, v_SKTD)
    if k_SKTD.stride(-1) != 1 or v_SKTD.stride(-1) != 1:
        raise ValueError("the head width of the cache must be its dense dimension: stride(-1) is not 1")
    if n_splits is None:
        n_splits = _choose_splits(q_BHD.shape[0] * k_SKTD.shape[1], k_SKTD.shape[2], q_BHD.device)
    return _decode(q_BHD, k_SKTD, v_SKTD, slot_B, length_B, n_splits)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if reason := unsupported(q):
        raise ValueError(reason)
    if k.shape != v.shape or k.shape[-1] != q.shape[-1] or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {q.dtype} {q.shape}, k {k.dtype} {k.shape} and v {v.dtype} {v.shape} do not fit together")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads evenly")


@torch.library.custom_op("nanor1::flash_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """out [N, H, D] and L [H, tiles * 128]; of the tile table, `keys` is for the backward alone."""
    out, lse = _forward_outputs(q, k, v, queries, keys)
    if q.numel() == 0:
        return out, lse
    q, k, v = map(_aligned, (q, k, v))
    tiles, constants = _plan(q, k, "forward")
    with torch.cuda.device_of(q):
        _forward_kernel[q.shape[1], _n_blocks(queries, tiles.block_m)](
            *_describe(tiles.block_m, q), *_describe(tiles.block_n, k, v), out, lse, queries, lse.stride(0), **constants
        )
    return out, lse


@_forward.register_fake
def _forward_outputs(q, k, v, queries, keys):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], _n_blocks(queries, 1)), dtype=torch.float32)


@torch.library.custom_op("nanor1::flash_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq, dk, dv = _backward_outputs(dout, q, k, v, out, lse, queries, keys)
    dout, q, k, v = map(_aligned, (dout, q, k, v))
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(q):
        tiles, constants = _plan(q, k, "dq")
        _dq_kernel[q.shape[1], _n_blocks(queries, tiles.block_m)](
            *_describe(tiles.block_m, q), *_describe(tiles.block_n, k, v), *_describe(tiles.block_m, out, dout),
            lse, delta, dq, queries, lse.stride(0), **constants,
        )  # fmt: skip
        tiles, constants = _plan(q, k, "dkdv")
        rows = [TensorDescriptor.from_tensor(x, [1, tiles.block_m]) for x in (lse, delta)]
        _dkdv_kernel[k.shape[1], _n_blocks(keys, tiles.block_n)](
            *_describe(tiles.block_m, q), *_describe(tiles.block_n, k, v), *_describe(tiles.block_m, dout), *rows,
            dk, dv, keys, **constants,
        )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _backward_outputs(dout, q, k, v, out, lse, queries, keys):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])


def _differentiate(ctx, dout, _dlse):
    return *_backward(dout, *ctx.saved_tensors), None, None


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


@torch.library.custom_op("nanor1::flash_decode", mutates_args=())
def _decode(q: Tensor, k: Tensor, v: Tensor, slots: Tensor | None, lengths: Tensor, n_splits: int) -> Tensor:
    B, H, D = q.shape
    out = q.new_empty(q.shape)
    if B == 0:
        return out
    K, strides = k.shape[1], (*k.stride()[:3], *v.stride()[:3])
    if any(stride % 8 for stride in strides):
        raise ValueError(f"strides of the cache are {k.stride()} and {v.stride()}; the kernel wants multiples of 8")
    tiles, constants = _plan(q, k, "decode")
    constants["BLOCK_M"] = max(tiles.block_m, triton.next_power_of_2(H // K))
    lse = q.new_empty((n_splits, B, H), dtype=torch.float32)
    share = out if n_splits == 1 else q.new_empty((n_splits, B, H, D), dtype=torch.float32)
    with torch.cuda.device_of(q):
        _decode_kernel[n_splits, K, B](
            q.contiguous(), k, v, slots, lengths, share, lse, *(n // 8 for n in strides), **constants
        )
        if n_splits > 1:
            width, splits = constants["WIDTH"], triton.next_power_of_2(n_splits)
            _combine_kernel[(B * H,)](share, lse, out, n_splits, D=D, WIDTH=width, SPLITS=splits)
    return out


@_decode.register_fake
def _(q, k, v, slots, lengths, n_splits):
    return q.new_empty(q.shape)


def _plan(q: Tensor, k: Tensor, kernel: str) -> tuple[Tiles, dict]:
    """How to cut a kernel for these shapes, and its compile-time arguments."""
    D = q.shape[-1]
    width = _padded(D)
    tiles = TILES[_chip(q.device), width][kernel]
    constants = dict(D=D, GROUP=q.shape[1] // k.shape[1], BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, WIDTH=width)
    return tiles, constants | dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)


@cache
def _chip(device: torch.device) -> str:
    """Which rows of TILES a device takes: the chips with more than 200 KiB of shared memory, and the rest."""
    is_large = device.type == "cpu" or torch.cuda.get_device_properties(device).major in (9, 10)
    return "hopper" if is_large else "ampere"


def _choose_splits(n_rows: int, max_len: int, device: torch.device) -> int:
    """As many as give each multiprocessor two programs, while a full row leaves 64 keys to each.

    Few keys are quicker read one block after the other than by two kernels.
    """
    if max_len < 512:
        return 1
    n_processors = 16 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * n_processors // max(n_rows, 1), max_len // 64, 64))


def _n_blocks(table: Tensor, block: int) -> int:
    return table.shape[0] // packing.TABLE_COLUMNS * (packing.TILE // block)


def _padded(D: int) -> int:
    """The width that head width D is computed in; columns out of bounds read as zero and are not written."""
    return 64 if D <= 64 else 128


class Strided(NamedTuple):
    """A packed tensor [N, H, D] whose rows begin at steps of 16 bytes; strides are in units of 8 numbers."""

    pointer: Tensor
    row_stride: int
    head_stride: int


def _describe(rows: int, *tensors_NHD: Tensor) -> list[TensorDescriptor | Strided]:
    """What kernels load blocks of [rows, 64 or 128] from.

    Where a copy engine reads them, descriptors of [H, N, D] for blocks [1, rows, 64 or 128]; Triton drops a leading 1
    at no cost, others not. Elsewhere it would read a descriptor's tensor number by number, since it takes no alignment
    from it, and without a pipeline.
    """
    if _chip(tensors_NHD[0].device) != "hopper":
        return [Strided(x, x.stride(0) // 8, x.stride(1) // 8) for x in tensors_NHD]
    swapped = ((x, [x.shape[1], len(x), x.shape[2]], [x.stride(1), x.stride(0), 1]) for x in tensors_NHD)
    return [TensorDescriptor(x, shape, strides, [1, rows, _padded(shape[2])]) for x, shape, strides in swapped]


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy where kernels could not read it: they want 16-byte steps and a dense last dimension."""
    is_aligned = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(n > 0 and n % 8 == 0 for n in x.stride()[:-1])
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)
