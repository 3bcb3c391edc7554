"""Attention kernels against their limits and peers, run by hand on a GPU.

    python tests/bench/bench_attention.py                              # the tables; the last line is JSON
    python tests/bench/bench_attention.py --peers "sdpa cudnn" flex_attention  # beside others than varlen_attn
    python tests/bench/bench_attention.py --sweep forward dq --width 128  # tile sizes: times, registers, spills
    python tests/bench/bench_attention.py --device cpu --tiny          # no figures: does everything run? (interpreter)

Packed causal attention counts useful operations only: with P = sum of len (len + 1) / 2 pairs of a query and a key it
sees, forward does 4 P H D and backward 10 P H D (five products), whatever a kernel does besides. Decoding is measured
by the bytes of the keys and values it must read. Limits come from the same run: a bf16 product of 8192 x 8192 matrices
and a copy of 2 GiB. Each result, and each gradient, is compared with SDPA's, sequence by sequence, before it is timed.
A time is the median over repeats of the mean over a few calls in a row between two CUDA events; the spread is that of
the middle half. Decoding runs from a CUDA graph over enough layers that their caches do not fit the L2 cache together.
"""

import argparse
import copy
import importlib
import inspect
import json
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure import commit
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS = {"0.5B": (14, 2, 64), "1.5B": (12, 2, 128), "7B": (28, 4, 128)}  # H, K, D of Qwen2.5
PACKED = [(model, mean, is_equal) for mean in (2048, 4096, 8192) for is_equal in (True, False) for model in HEADS]
N_TOKENS = 32768
DECODE = {  # model, context of each row, room in the cache, layers
    "7B, 1 row of 4096": ("7B", [4096], 8192, 28),
    "7B, 1 row of 1024": ("7B", [1024], 8192, 28),
    "1.5B, 256 rows of 768": ("1.5B", [768] * 256, 1024, 4),
    "1.5B, 256 rows of 256 to 1280": ("1.5B", [256 + 4 * i for i in range(256)], 1536, 4),
}
# Tiles to try, by kernel, chip and width; all compile without spills, see tests/test_kernels.py.
SWEEP = {  # block_m, block_n, num_warps, num_stages
    "forward": {
        ("hopper", 64): "64,64,4,2 64,64,4,3 64,128,4,2 64,128,4,3 128,64,4,2 128,64,8,2 128,64,8,3 128,128,8,2",
        ("hopper", 128): "64,64,4,2 64,64,4,3 64,128,4,2 128,32,8,3 128,64,8,2 128,64,8,3 128,128,8,2 128,128,8,3",
        ("ampere", 64): "64,32,4,2 64,64,4,2 64,64,4,3 128,32,8,2 128,64,4,2 128,64,8,2",
        ("ampere", 128): "64,32,4,2 64,32,4,3 64,64,4,2 128,32,8,2 128,32,8,3 128,64,8,2",
    },
    "dq": {
        ("hopper", 64): "64,64,4,2 64,64,4,3 64,128,4,2 128,32,8,3 128,64,8,2 128,64,8,3 128,128,8,2",
        ("hopper", 128): "64,32,4,2 64,32,4,3 64,64,4,2 64,64,4,3 128,32,8,2 128,64,8,2 128,64,8,3",
        ("ampere", 64): "64,32,4,2 64,32,4,3 64,64,8,2 128,32,8,2 128,32,8,3 128,64,8,2",
        ("ampere", 128): "64,16,8,2 64,32,4,2 64,32,8,2 64,64,8,2 128,32,8,2",
    },
    "dkdv": {
        ("hopper", 64): "32,64,4,3 64,64,4,1 64,64,4,2 64,64,4,3 32,128,8,3 64,128,8,1 64,128,8,2 64,128,8,3",
        ("hopper", 128): "32,64,4,2 32,64,4,3 64,64,4,1 64,64,4,2 32,128,8,2 64,128,8,1 64,128,8,2 64,128,8,3",
        ("ampere", 64): "32,32,4,2 32,32,4,3 32,64,4,2 64,32,4,2 32,64,8,2",
        ("ampere", 128): "32,32,4,2 32,32,8,2 32,64,4,2 32,64,8,2 32,64,8,3 64,64,8,2",
    },
    "decode": dict.fromkeys(
        [(chip, width) for chip in ("hopper", "ampere") for width in (64, 128)],
        "16,32,2,4 16,32,4,3 16,64,2,3 16,64,4,2 16,64,4,3 16,128,4,2 16,128,8,2",
    ),
}


class Packed(NamedTuple):
    """Sequences of one shape, laid end to end."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    cu: Tensor
    lengths: list[int]

    @property
    def is_equal(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def forward_flop(self) -> int:
        return 4 * sum(n * (n + 1) // 2 for n in self.lengths) * self.q.shape[1] * self.q.shape[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, each thing once")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=["varlen_attn"], help="flex_attention is compiled for each shape"
    )
    parser.add_argument("--sweep", nargs="+", choices=SWEEP, help="try tile sizes of these kernels instead")
    parser.add_argument("--width", type=int, default=128, help="head width of the sweep")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_attention: no CUDA device here; --device cpu --tiny shows that the script runs")
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    torch.manual_seed(0)
    kernels = importlib.import_module("nanor1.kernels")  # here, since triton reads the environment then
    clock = Clock(args.device, 1 if args.tiny else args.repeats)
    report = {**where(args.device), **limits(clock, args.tiny)}
    print(json.dumps(report))
    if args.sweep:
        report["sweep"], tiles = {}, copy.deepcopy(kernels.TILES)
        for name in args.sweep:
            print(json.dumps({"sweep": name, "width": args.width}))
            report["sweep"][name] = sweep(kernels, clock, name, args.width, args.tiny)
            kernels.TILES.update(copy.deepcopy(tiles))  # those of the others stay as they were
    else:
        report["packed"] = [row for shape in PACKED for row in bench_packed(kernels, clock, shape, report, args)]
        report["decode"] = [row for name in DECODE for row in bench_decode(kernels, clock, name, report, args)]
    print(json.dumps(report))
    ours = [row for table in ("packed", "decode") for row in report.get(table, []) if row["peer"] == "nanor1"]
    if any("failed" in row for row in ours):
        sys.exit(1)


def where(device: str) -> dict:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    triton = importlib.import_module("triton")
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    dtype = "bfloat16" if device == "cuda" else "float32"
    return {"device": name, "dtype": dtype, "commit": commit(), **versions}


class Clock:
    """Milliseconds of a function: median over repeats, and the width of the middle half of them."""

    def __init__(self, device: str, repeats: int, calls: int = 5):
        self.device, self.repeats, self.calls = device, repeats, calls if repeats > 1 else 1

    def __call__(self, function: Callable[[], object]) -> tuple[float, float]:
        for _ in range(3 if self.repeats > 1 else 0):
            function()
        times = sorted(self._once(function) for _ in range(self.repeats))
        n = len(times)
        return statistics.median(times), times[3 * n // 4] - times[n // 4]

    def _once(self, function) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / self.calls


def limits(clock: Clock, is_tiny: bool) -> dict:
    """The matrix rate and the copy bandwidth of this machine, on random data."""
    n, n_bytes = (256, 2**20) if is_tiny else (8192, 2**31)
    a, b = (torch.randn(n, n, device=clock.device).to(dtype_of(clock.device)) for _ in range(2))
    matrix_ms, _ = clock(lambda: a @ b)
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    copy_ms, _ = clock(lambda: target.copy_(source))
    return {"matrix_tflop_per_s": 2 * n**3 / matrix_ms / 1e9, "copy_gb_per_s": 2 * n_bytes / copy_ms / 1e6}


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def make_packed(model: str, mean: int, is_equal: bool, device: str, is_tiny: bool) -> Packed:
    """About N_TOKENS tokens in sequences of this mean length; ragged ones from a quarter of it to seven quarters."""
    H, K, D = HEADS[model] if not is_tiny else (2, 1, HEADS[model][2])
    n_tokens, mean = (128, mean // 64) if is_tiny else (N_TOKENS, mean)
    draw = random.Random(0)
    lengths = [mean if is_equal else draw.randrange(mean // 4, 7 * mean // 4) for _ in range(n_tokens // mean)]
    N = sum(lengths)
    q, k, v, dout = (torch.randn(N, heads, D, device=device).to(dtype_of(device)) for heads in (H, K, K, H))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return Packed(*leaves, dout, torch.tensor([0, *lengths], device=device).cumsum(0), lengths)


def bench_packed(kernels, clock: Clock, shape: tuple, report: dict, args) -> list[dict]:
    model, mean, is_equal = shape
    name = f"{model} {mean} {'equal' if is_equal else 'ragged'}"
    if args.only not in name:
        return []
    x = make_packed(*shape, clock.device, args.tiny)
    print(f"\n{name}: {len(x.lengths)} sequences, {len(x.q)} tokens, q {list(x.q.shape)}, k {list(x.k.shape)}")
    wanted = [attend_one_by_one(x), *gradients(lambda: attend_one_by_one(x), x)]
    rows = []
    for peer in ["nanor1", *args.peers]:
        row = {"shape": name, "peer": peer}
        try:
            function = make_ours(x, kernels) if peer == "nanor1" else PEERS[peer](x, kernels)
            check(function, x, wanted)
            row |= rates(clock, function, x, report["matrix_tflop_per_s"])
        except Exception as error:  # a peer that is missing or fails is part of the result
            row["failed"] = reason(error)
            if peer == "nanor1":
                traceback.print_exc()
        rows.append(show(row))
    return rows


def show(row: dict) -> dict:
    """A line of JSON at once, so that what was measured is there when time runs out."""
    print(
        json.dumps({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}),
        flush=True,
    )
    return row


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:150]}"


def rates(clock: Clock, function, x: Packed, matrix_rate: float) -> dict:
    with torch.no_grad():
        forward_ms, forward_spread = clock(function)
    both_ms, both_spread = clock(lambda: gradients(function, x))
    forward, both = x.forward_flop / forward_ms / 1e9, 3.5 * x.forward_flop / both_ms / 1e9
    return {
        "forward_ms": forward_ms,
        "forward_spread_ms": forward_spread,
        "forward_tflop_per_s": forward,
        "forward_of_limit": forward / matrix_rate,
        "both_ms": both_ms,
        "both_spread_ms": both_spread,
        "both_tflop_per_s": both,
        "both_of_limit": both / matrix_rate,
    }


def gradients(function, x: Packed) -> list[Tensor]:
    return list(torch.autograd.grad(function(), (x.q, x.k, x.v), x.dout))


def check(function, x: Packed, wanted: list[Tensor]) -> None:
    for name, got, want in zip(("out", "dq", "dk", "dv"), [function(), *gradients(function, x)], wanted, strict=True):
        got, want = got.detach().float(), want.detach().float()
        error = float((got - want).norm() / want.norm())
        if not error < 2e-2:
            raise ValueError(f"{name} is {error:.1e} of its norm away from SDPA's")


def attend_one_by_one(x: Packed) -> Tensor:
    """SDPA's choice for each sequence: the reference."""
    parts = zip(*(y.split(x.lengths) for y in (x.q, x.k, x.v)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(*(y.transpose(0, 1)[None] for y in qkv), is_causal=True, enable_gqa=True)
        for qkv in parts
    ]
    return torch.cat([out[0].transpose(0, 1) for out in outputs])


def make_ours(x: Packed, kernels):
    table = kernels.packing.tile_table(x.cu, x.cu, len(x.q), len(x.k))  # not timed: a model makes one for all layers
    return lambda: kernels.flash_attention(x.q, x.k, x.v, x.cu, x.cu, table)


def make_varlen(x: Packed, kernels):
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    parameters = inspect.signature(varlen_attn).parameters  # they changed from one release of torch to the next
    options = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    cu, longest = x.cu.to(torch.int32), max(x.lengths)
    return lambda: varlen_attn(x.q, x.k, x.v, cu, cu, longest, longest, **options)


def make_sdpa(backend: SDPBackend):
    def make(x: Packed, kernels):
        if not x.is_equal:
            raise ValueError("takes equal lengths only")
        shape = len(x.lengths), x.lengths[0]

        def run():
            q, k, v = (y.unflatten(0, shape).transpose(1, 2) for y in (x.q, x.k, x.v))
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).flatten(0, 1)

        return run

    return make


def make_flex(x: Packed, kernels):
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    sequence = torch.arange(len(x.lengths), device=x.q.device).repeat_interleave(x.cu.diff())

    def is_seen(b, h, i, j):
        return (j <= i) & (sequence[i] == sequence[j])

    mask = flex.create_block_mask(is_seen, None, None, len(x.q), len(x.q), device=x.q.device)
    torch._dynamo.reset()  # one shape at a time, so that none runs in a graph made for another
    attend = torch.compile(flex.flex_attention) if x.q.is_cuda else flex.flex_attention
    q, k, v = (y.transpose(0, 1)[None] for y in (x.q, x.k, x.v))
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


PEERS = {
    "varlen_attn": make_varlen,
    "sdpa flash": make_sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": make_sdpa(SDPBackend.CUDNN_ATTENTION),
    "flex_attention": make_flex,
}


class Cache(NamedTuple):
    """One query a row, and the keys and values of some layers."""

    q: Tensor
    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor
    n_bytes: int  # of keys and values that a layer must read


def make_cache(model: str, lengths: list[int], room: int, n_layers: int, device: str, is_tiny: bool) -> Cache:
    H, K, D = HEADS[model]
    if is_tiny:
        lengths, room, n_layers = [n // 16 for n in lengths[:2]], room // 16, 1
    dtype = dtype_of(device)
    shape = len(lengths), K, room, D
    layers = [tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(2)) for _ in range(n_layers)]
    q = torch.randn(len(lengths), H, D, device=device, dtype=dtype)
    return Cache(q, layers, torch.tensor(lengths, device=device), 2 * sum(lengths) * K * D * dtype.itemsize)


def bench_decode(kernels, clock: Clock, name: str, report: dict, args) -> list[dict]:
    if args.only not in name:
        return []
    x = make_cache(*DECODE[name], clock.device, args.tiny)
    longest = int(x.lengths.max())
    mask = (torch.arange(longest, device=x.q.device) < x.lengths[:, None])[:, None, None]
    mask = None if bool(mask.all()) else mask

    def sdpa(k, v):
        k, v = (y[:, :, :longest] for y in (k, v))
        return F.scaled_dot_product_attention(x.q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]

    peers = {"nanor1": lambda k, v: kernels.flash_decode(x.q, k, v, None, x.lengths), "sdpa": sdpa}
    wanted = sdpa(*x.layers[0]).float()
    print(f"\ndecode {name}: {x.n_bytes / 1e6:.1f} MB a layer")
    rows = []
    for peer, function in peers.items():
        row = {"shape": name, "peer": peer}
        try:
            error = float((function(*x.layers[0]).float() - wanted).norm() / wanted.norm())
            if not error < 2e-2:
                raise ValueError(f"out is {error:.1e} of its norm away from SDPA's")
            row |= bandwidth(clock, function, x, report["copy_gb_per_s"])
        except Exception as error:
            row["failed"] = reason(error)
        rows.append(show(row))
    return rows


def bandwidth(clock: Clock, function, x: Cache, copy_rate: float) -> dict:
    ms, spread = clock(captured(lambda: [function(k, v) for k, v in x.layers], clock.device))
    layer_ms = ms / len(x.layers)
    rate = x.n_bytes / layer_ms / 1e6
    spread_us = spread / len(x.layers) * 1e3
    return {"layer_us": layer_ms * 1e3, "spread_us": spread_us, "gb_per_s": rate, "of_copy": rate / copy_rate}


def captured(function: Callable[[], object], device: str) -> Callable[[], object]:
    """The replay of a CUDA graph of the function, so that launching costs next to nothing."""
    if device == "cpu":
        return function
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def tiles_to_try(kernels, name: str, chip: str, width: int) -> list[NamedTuple]:
    return [kernels.Tiles(*map(int, tiles.split(","))) for tiles in SWEEP[name][chip, width].split()]


def sweep(kernels, clock: Clock, name: str, width: int, is_tiny: bool) -> list[dict]:
    """Times of one kernel for each tile size, the others as they are; the fastest last."""
    x = make_packed("0.5B" if width == 64 else "1.5B", 4096, True, clock.device, is_tiny)
    cache = make_cache(*DECODE["1.5B, 256 rows of 768"], clock.device, is_tiny)
    q, k, v, cu = x.q.detach(), x.k.detach(), x.v.detach(), x.cu
    table = kernels.packing.tile_table(cu, cu, len(q), len(k))
    out, lse = kernels._forward(q, k, v, *table)
    runs = {
        "forward": lambda: kernels._forward(q, k, v, *table),
        "dq": lambda: kernels._backward(x.dout, q, k, v, out, lse, *table),
        "dkdv": lambda: kernels._backward(x.dout, q, k, v, out, lse, *table),
        "decode": lambda: [kernels.flash_decode(cache.q, *kv, None, cache.lengths) for kv in cache.layers],
    }
    chip = kernels._chip(q.device), kernels._padded(width)
    cuts, rows = kernels.TILES[chip], []
    candidates = dict.fromkeys([cuts[name], *tiles_to_try(kernels, name, *chip)])  # none twice
    for tiles in list(candidates)[: 2 if is_tiny else None]:
        row, cuts[name] = {"tiles": tuple(tiles)}, tiles
        try:
            row["ms"], row["spread_ms"] = clock(captured(runs[name], clock.device))
            row |= compiled(getattr(kernels, f"_{name}_kernel"))
        except Exception as error:  # too much shared memory, say
            row["failed"] = reason(error)
        rows.append(show(row))
    return sorted(rows, key=lambda row: -row.get("ms", float("inf")))


def compiled(kernel) -> dict:
    """What the compiler made of the kernel that ran last."""
    if not torch.cuda.is_available():
        return {}
    last = list(kernel.device_caches[torch.cuda.current_device()][0].values())[-1]
    return {"registers": last.n_regs, "spill_bytes": 4 * last.n_spills, "shared": last.metadata.shared}


if __name__ == "__main__":
    main()
