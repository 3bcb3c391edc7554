"""The Triton kernels against a naive reference: through Triton's interpreter on a CPU, in bf16 on a GPU (-m gpu).

Run as a script, this file compiles kernels ahead of time and prints what the compiler says of each, a JSON line each:
the interpreter, which the tests need, and the compiler cannot live in one process.
"""

import contextlib
import importlib
import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import nanor1.attention  # noqa: E402
import nanor1.model  # noqa: E402
from nanor1 import kernels  # noqa: E402
from nanor1.attention import reference_attention  # noqa: E402
from nanor1.model import ModelConfig, Transformer  # noqa: E402
from nanor1.packing import TILE, Layout, tile_table  # noqa: E402

interpreted = pytest.mark.skipif(not kernels.INTERPRETED, reason="needs TRITON_INTERPRET=1, and no GPU")
on_gpu = pytest.mark.gpu
SHARED_LIMIT = {90: 232_448, 80: 166_912, 89: 101_376}  # bytes a block may have: CUDA's programming guide, table 30
TRAINING = "forward", "dq", "dkdv"
WIDTHS = 16, 24, 32, 64, 80, 96, 128  # of the head widths that there are

LENGTHS = {  # (queries, keys) of each sequence; blocks are of 64 and 128
    "ragged": [(5, 5), (1, 1), (131, 131), (64, 64)],
    "around a block": [(127, 127), (128, 128), (129, 129)],
    "fewer queries than keys": [(130, 200), (1, 129), (64, 65), (3, 140)],
    "one query each": [(1, 1), (1, 300), (1, 128)],
    "empty ones between": [(0, 0), (9, 9), (0, 7), (0, 0), (70, 90), (0, 0)],
}


@pytest.fixture
def seed():
    """A new one each time; pytest shows it when the test fails, and NANOR1_SEED brings it back."""
    seed = int(os.environ.get("NANOR1_SEED", random.randrange(2**31)))
    print(f"NANOR1_SEED={seed}")
    torch.manual_seed(seed)
    return seed


def packed(pairs, n_heads, n_kv_heads, width, dtype, device="cpu"):
    lengths, lengths_k = zip(*pairs, strict=True)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(device) for x in (lengths, lengths_k))
    heads = ((sum(lengths), n_heads), (sum(lengths_k), n_kv_heads), (sum(lengths_k), n_kv_heads))
    q, k, v = (torch.randn(*shape, width, device=device).to(dtype) for shape in heads)
    return q, k, v, cu_q, cu_k


def outputs_and_gradients(function, q, k, v, dout):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def assert_equals_the_reference(q, k, v, cu_q, cu_k, tolerance):
    dout = torch.randn_like(q)
    got = outputs_and_gradients(lambda *qkv: kernels.flash_attention(*qkv, cu_q, cu_k), q, k, v, dout)
    wanted = outputs_and_gradients(
        lambda *qkv: reference_attention(*qkv, cu_q, cu_k), q.float(), k.float(), v.float(), dout
    )
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
        assert x.dtype == q.dtype
        error = float((x.float() - y).norm() / y.norm().clamp(min=1e-6))
        assert error < tolerance, f"{name} is off by {error:.2e} of its norm"
        row_error = (x.float() - y).flatten(1).norm(dim=1) / y.norm().clamp(min=1e-6) * len(y) ** 0.5
        assert float(row_error.max()) < 40 * tolerance, f"{name} is off at token {int(row_error.argmax())}"


@interpreted
@pytest.mark.parametrize(
    "lengths, n_heads, n_kv_heads, width, dtype",
    [
        ("ragged", 4, 1, 64, torch.float32),
        ("ragged", 2, 2, 128, torch.float16),
        ("ragged", 2, 1, 80, torch.float32),
        ("ragged", 2, 1, 96, torch.float16),
        ("ragged", 4, 2, 24, torch.float32),
        ("around a block", 2, 1, 16, torch.float16),
        ("fewer queries than keys", 2, 1, 32, torch.float32),
        ("one query each", 6, 2, 48, torch.float16),
        ("empty ones between", 4, 4, 40, torch.float32),
        ("around a block", 1, 1, 64, torch.float32),
        ("fewer queries than keys", 7, 1, 64, torch.float32),
        ("fewer queries than keys", 2, 1, 80, torch.float16),
        ("one query each", 8, 1, 128, torch.float32),
        ("one query each", 14, 2, 64, torch.float32),
        ("empty ones between", 4, 2, 96, torch.float32),
    ],
    ids=str,
)
def test_output_and_gradients_equal_the_reference(seed, lengths, n_heads, n_kv_heads, width, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert_equals_the_reference(*packed(LENGTHS[lengths], n_heads, n_kv_heads, width, dtype), tolerance)


@interpreted
@pytest.mark.parametrize(
    "lengths, n_heads, n_kv_heads, width, dtype",
    [("ragged", 2, 1, 24, torch.float32), ("empty ones between", 2, 1, 96, torch.float16)],
    ids=str,
)
def test_chips_that_read_through_pointers_give_the_same(seed, monkeypatch, lengths, n_heads, n_kv_heads, width, dtype):
    monkeypatch.setattr(kernels, "_chip", lambda device: "ampere")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert_equals_the_reference(*packed(LENGTHS[lengths], n_heads, n_kv_heads, width, dtype), tolerance)


@on_gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n_heads, n_kv_heads", [(2, 2), (4, 1), (14, 2), (8, 1)])
@pytest.mark.parametrize("lengths", [*LENGTHS, "long"])
def test_output_and_gradients_equal_the_reference_on_a_gpu(seed, lengths, n_heads, n_kv_heads, width, dtype, tolerance):
    pairs = LENGTHS.get(lengths, [(2000, 2000), (1, 1), (777, 1500), (0, 0), (128, 4096), (1025, 1025)])
    assert_equals_the_reference(*packed(pairs, n_heads, n_kv_heads, width, dtype, "cuda"), tolerance)


@interpreted
def test_many_sequences_each_find_their_tiles(seed):
    lengths = torch.randint(0, 9, (57,)).tolist()
    assert_equals_the_reference(*packed([(n, n) for n in lengths], 1, 1, 64, torch.float32), 1e-5)


@interpreted
def test_a_table_that_calls_share_gives_the_same_as_one_made_for_each(seed):
    *qkv, cu_q, cu_k = packed(LENGTHS["fewer queries than keys"], 2, 1, 64, torch.float32)
    table = tile_table(cu_q, cu_k, len(qkv[0]), len(qkv[1]))
    results = [
        outputs_and_gradients(lambda *qkv: kernels.flash_attention(*qkv, cu_q, cu_k, table), *qkv, qkv[0])  # noqa: B023
        for table in (table, None)
    ]
    assert all(map(torch.equal, *results))


@interpreted
def test_a_model_on_the_kernels_equals_one_on_torchs_attention(seed, monkeypatch):
    model = Transformer(ModelConfig("llama", 61, 32, 40, 2, 2, 1, 16, 2048))
    ids, cu, parent_B = torch.randint(61, (160,)), torch.tensor([0, 130, 135, 160]), torch.tensor([-1, 0, 0])
    results = []
    for on_kernels in (True, False):
        if on_kernels:
            monkeypatch.setattr(nanor1.attention, "_triton_kernels", lambda q: kernels)
            monkeypatch.setattr(nanor1.model, "_tiles", Layout.tiles)
        hidden = model(ids, cu, parent_B=parent_B)
        results.append((hidden, *torch.autograd.grad(hidden.square().sum(), model.model.layers.parameters())))
        monkeypatch.undo()
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)


@interpreted
def test_nothing_gives_nothing():
    q, k, v, cu_q, cu_k = packed([(0, 0), (0, 3)], 2, 1, 64, torch.float32)
    got = outputs_and_gradients(lambda *qkv: kernels.flash_attention(*qkv, cu_q, cu_k), q, k, v, q)
    assert [x.shape for x in got] == [q.shape, q.shape, k.shape, v.shape]
    assert (got[2] == 0).all() and (got[3] == 0).all()


@interpreted
def test_strided_and_misaligned_tensors_give_the_same(seed):
    q, k, v, cu_q, cu_k = packed(LENGTHS["ragged"], 2, 1, 64, torch.float32)
    wanted = kernels.flash_attention(q, k, v, cu_q, cu_k)
    fused = torch.cat((q, k, v), dim=1)
    shifted = torch.cat((torch.zeros(1), q.flatten()))[1:].view_as(q)  # four bytes behind a 16-byte address
    transposed = k.mT.contiguous().mT
    for args in (fused.split((2, 1, 1), dim=1), (shifted, k, v), (q, transposed, v)):
        torch.testing.assert_close(kernels.flash_attention(*args, cu_q, cu_k), wanted, rtol=0, atol=0)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(kernels.flash_attention(*leaves, cu_q, cu_k).sum(), leaves)  # a gradient of stride 0
    wanted = torch.autograd.grad(reference_attention(*leaves, cu_q, cu_k).sum(), leaves)
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-5)


def is_deterministic(dtype, device, pairs):
    args = packed(pairs, 7, 1, 64, dtype, device)
    dout = torch.randn_like(args[0])
    function = lambda *qkv: kernels.flash_attention(*qkv, *args[3:])  # noqa: E731
    first, *others = (outputs_and_gradients(function, *args[:3], dout) for _ in range(4))
    return all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@interpreted
def test_gradients_are_the_same_in_every_run(seed):
    assert is_deterministic(torch.float32, "cpu", [(70, 70), (3, 9)])


@on_gpu
def test_gradients_are_the_same_in_every_run_on_a_gpu(seed):
    assert is_deterministic(torch.bfloat16, "cuda", [(3000, 3000), (1, 1), (500, 1700)])


@pytest.fixture
def empty_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_decodes_like_the_reference(lengths, n_heads, n_kv_heads, width, dtype, n_splits, slots=None, device="cpu"):
    """Slots lie permuted in a cache that holds nan wherever nothing was written."""
    B, T = len(lengths), max(lengths) + 5
    q = torch.randn(B, n_heads, width, device=device).to(dtype)
    cache = torch.full((2, B + 2, n_kv_heads, T, width), float("nan"), dtype=dtype, device=device)
    wanted = torch.zeros(B, n_heads, width, device=device)
    for b, length in enumerate(lengths):
        k, v = torch.randn(2, length, n_kv_heads, width, device=device).to(dtype)
        cache[:, b if slots is None else slots[b], :, :length] = torch.stack((k, v)).transpose(1, 2)
        if length:
            bounds = torch.tensor([0, 1]), torch.tensor([0, length])
            wanted[b] = reference_attention(q[b : b + 1].float(), k.float(), v.float(), *bounds)[0]
    slot_B = None if slots is None else torch.tensor(slots, device=device, dtype=torch.int32)
    out = kernels.flash_decode(q, *cache, slot_B, torch.tensor(lengths, device=device), n_splits)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert float((out.float() - wanted).norm() / wanted.norm()) < tolerance
    assert all((out[b] == 0).all() for b, length in enumerate(lengths) if not length)


@interpreted
@pytest.mark.parametrize("n_splits", [1, 2, 7, None])
@pytest.mark.parametrize(
    "n_heads, n_kv_heads, width, dtype",
    [
        (2, 2, 64, torch.float32),
        (4, 1, 80, torch.float16),
        (7, 1, 128, torch.float32),
        (40, 2, 96, torch.float32),
        (4, 2, 24, torch.float32),
        (2, 1, 48, torch.float32),
    ],
    ids=str,
)
def test_decode_equals_the_reference_however_the_keys_are_split(seed, n_splits, n_heads, n_kv_heads, width, dtype):
    lengths = [200, 0, 1, 64, 129]
    assert_decodes_like_the_reference(lengths, n_heads, n_kv_heads, width, dtype, n_splits, slots=[3, 6, 0, 5, 1])


@interpreted
def test_decode_without_slots_takes_the_first_rows_and_more_splits_than_keys_do_no_harm(seed, empty_memory_is_nan):
    assert_decodes_like_the_reference([3, 0, 130], 2, 1, 64, torch.float32, n_splits=33)


@pytest.mark.parametrize(
    "n_rows, max_len, wanted", [(1, 512, 8), (4, 4096, 8), (1, 4096, 32), (1, 511, 1), (11, 512, 2), (33, 9999, 1)]
)
def test_few_rows_are_split_into_64_keys_and_more_while_two_programs_a_processor_suffice(n_rows, max_len, wanted):
    assert kernels._choose_splits(n_rows, max_len, torch.device("cpu")) == wanted  # which counts as 16 processors


@on_gpu
@pytest.mark.parametrize("n_splits", [1, 13, None])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n_heads, n_kv_heads", [(2, 2), (14, 2), (28, 4)])
def test_decode_equals_the_reference_on_a_gpu(seed, n_splits, width, n_heads, n_kv_heads):
    for dtype in (torch.bfloat16, torch.float16):
        assert_decodes_like_the_reference(
            [4000, 0, 1, 64, 129, 700], n_heads, n_kv_heads, width, dtype, n_splits, [3, 6, 0, 5, 1, 7], "cuda"
        )


@interpreted
def test_the_operators_keep_torchs_rules(seed):
    """Schema, autograd and fake registration, and tracing with dynamic shapes."""
    q, k, v, cu_q, cu_k = packed([(9, 9), (3, 20)], 2, 1, 64, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    table = tile_table(cu_q, cu_k, len(q), len(k))
    torch.library.opcheck(kernels._forward, (*leaves, *table), atol=1e-5, rtol=1e-4)
    cache = torch.randn(2, 1, 20, 64)
    torch.library.opcheck(kernels._decode, (q[:2].detach(), cache, cache, None, torch.tensor([3, 20]), 2))


@interpreted
def test_torch_compile_keeps_one_graph_for_all_lengths(seed):
    counter = CompileCounterWithBackend("aot_eager")

    def layer(q, k, v, cu_q, cu_k):
        return kernels.flash_attention(q * 2, k.sin(), v, cu_q, cu_k).cos()

    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for pairs in ([(5, 5), (1, 3)], [(70, 70), (2, 2)], [(3, 130), (140, 140), (1, 1)]):
        args = packed(pairs, 2, 1, 64, torch.float32)
        dout = torch.randn_like(args[0])
        results = [
            outputs_and_gradients(lambda *qkv: function(*qkv, *args[3:]), *args[:3], dout)  # noqa: B023
            for function in (compiled, layer)
        ]
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


@pytest.mark.parametrize("width", [8, 36, 136])
def test_other_head_widths_are_refused_with_the_widths_that_there_are(width):
    q, k, v, cu_q, cu_k = packed([(3, 3)], 2, 1, width, torch.float32)
    with pytest.raises(ValueError, match=f"head width {width}; .* multiples of 8 from 16 to 128"):
        kernels.flash_attention(q, k, v, cu_q, cu_k)
    with pytest.raises(ValueError, match=f"head width {width}"):
        kernels.flash_decode(q, k[None].mT, v[None].mT, None, cu_q[1:])


@interpreted
def test_what_does_not_fit_together_is_refused(seed):
    q, k, v, cu_q, cu_k = packed([(3, 3)], 4, 3, 64, torch.float32)
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        kernels.flash_attention(q, k, v, cu_q, cu_k)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.flash_attention(q, k[:, :2], v[:, :1], cu_q, cu_k)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.flash_attention(q, k[:, :2], v[:, :2].half(), cu_q, cu_k)
    with pytest.raises(ValueError, match="multiples of 8"):
        cache = torch.randn(1, 2, 5, 65)[..., :64]
        kernels.flash_decode(q[:1], cache, cache, None, cu_q[1:])
    with pytest.raises(ValueError, match="1 sequences of queries, 2 of keys"):
        kernels.flash_attention(q, k[:, :2], v[:, :2], cu_q, torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="bfloat16 in Triton's interpreter"):
        kernels.flash_attention(q.bfloat16(), k[:, :2].bfloat16(), v[:, :2].bfloat16(), cu_q, cu_k)


@pytest.mark.parametrize("tiles", kernels.TILES.values(), ids=map(str, kernels.TILES))
def test_no_kernel_reads_more_rows_of_l_and_delta_than_were_written(tiles):
    rows = [tiles[name].block_m for name in ("dkdv", "dq", "forward")]
    assert rows[0] <= min(rows[1:])


@pytest.mark.parametrize("tiles", kernels.TILES.values(), ids=map(str, kernels.TILES))
def test_every_block_is_a_part_of_a_tile(tiles):
    assert not any(TILE % n for n in (tiles["forward"].block_m, tiles["dq"].block_m, tiles["dkdv"].block_n))


def test_other_devices_are_refused():
    assert "device meta" in kernels.unsupported(torch.empty(1, 64, device="meta"))


@on_gpu
def test_fp32_on_a_gpu_is_refused():
    assert "float32" in kernels.unsupported(torch.empty(1, 64, device="cuda"))


@on_gpu
def test_nothing_waits_for_the_device_and_a_graph_replays_with_other_lengths(seed):
    n, cu = 1000, torch.tensor([0, 300, 1000], device="cuda")
    q, k, v = (torch.randn(n, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    cache, lengths = (
        torch.randn(2, 3, 2, 512, 64, device="cuda", dtype=torch.bfloat16),
        torch.tensor([5, 0, 512]).cuda(),
    )

    def run():
        return kernels.flash_attention(q, k, v, cu, cu), kernels.flash_decode(q[:3], *cache, None, lengths)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    cu[1], lengths[1] = 701, 77
    graph.replay()
    torch.testing.assert_close(captured, run(), rtol=0, atol=0)


@pytest.mark.parametrize("capability", [90, *(pytest.param(older, marks=pytest.mark.slow) for older in (80, 89))])
def test_kernels_compile_without_spills_and_within_shared_memory(capability, tmp_path):
    assert_compiles_well(capability, "bf16", (64, 128), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80, 89])
@pytest.mark.parametrize("dtype, widths", [("bf16", (16, 24, 32, 48, 80, 96)), ("fp16", WIDTHS)], ids=["bf16", "fp16"])
def test_the_other_kernels_compile_without_spills_and_within_shared_memory(capability, dtype, widths, tmp_path):
    assert_compiles_well(capability, dtype, widths, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80, 89])
def test_all_tiles_that_a_sweep_times_compile_without_spills_and_within_shared_memory(capability, tmp_path):
    assert_compiles_well(capability, "bf16", (64, 128), tmp_path, "--sweep")


def assert_compiles_well(capability, dtype, widths, tmp_path, *options):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DUMP_PTXAS_LOG": "1"}
    command = [sys.executable, __file__, str(capability), dtype, *map(str, widths), *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert {(x["kernel"], x["width"]) for x in reports} == {(n, w) for n in (*TRAINING, "decode") for w in widths}
    for report in reports:
        print(report)
        assert report["spill"] <= 32
        assert report["shared"] <= SHARED_LIMIT[capability]
        if capability == 90 and report["kernel"] in TRAINING:  # Hopper's matrix units, fed by its copy engine
            assert report["wgmma"] and report["tma"] and not report["mma"]
        elif report["kernel"] in TRAINING:  # loads of 16 bytes that go on while others are computed with
            assert report["async"] and not report["narrow"]


def compile_ahead_of_time(name, capability, dtype, width, tiles):
    """What a launch of the kernel would compile, for a chip that need not be there."""
    padded = kernels._padded(width)
    kernel = getattr(kernels, f"_{name}_kernel")
    constants = dict(D=width, GROUP=4, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, WIDTH=padded)
    width_of_descriptors = padded if capability == 90 else None
    signature = {name: argument_type(name, tiles, dtype, width_of_descriptors) for name in kernel.arg_names}
    attributes = {
        (i,) if isinstance(kind, str) else (i, 0): [["tt.divisibility", 16]]
        for i, (argument, kind) in enumerate(signature.items())
        if argument not in kernels.PLAIN and kind[0][0] == "*"
    }
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            triton.compiler.ASTSource(kernel, signature, constants, attributes),
            target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
            options=dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        )
    counts = {key: compiled.asm["ptx"].count(text) for key, text in INSTRUCTIONS.items()}
    spill = sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue()).groups())) // 2
    registers = int(re.search(r"Used (\d+) registers", log.getvalue())[1])
    report = dict(kernel=name, width=width, tiles=tiles, registers=registers, spill=spill)
    return report | dict(shared=compiled.metadata.shared) | counts


INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "mma": "mma.sync",
    "tma": "cp.async.bulk.tensor",
    "async": "cp.async.cg.shared.global",
    "narrow": "ld.global.b16",
}


def argument_type(argument, tiles, dtype, width):
    if argument in ("lse_desc", "delta_desc"):
        return f"tensordesc<fp32[1, {tiles.block_m}]>"
    if argument.endswith(("_NHD", "_JKD")):
        rows = tiles.block_n if argument.endswith("_JKD") else tiles.block_m
        return f"tensordesc<{dtype}[1, {rows}, {width}]>" if width else kernels.Strided(f"*{dtype}", "i32", "i32")
    if argument in ("slots", "lengths"):
        return "*i64"
    if argument == "table":
        return "*i32"
    if argument.isupper():
        return "constexpr"
    if "stride" in argument:
        return "i32"
    is_fp32 = argument in ("lse", "delta")
    return "*fp32" if is_fp32 else f"*{dtype}"


def main(capability, dtype, *widths_and_options):
    """Compile the kernels in their own tiles, or with --sweep in those that bench_attention.py tries."""
    chip = "hopper" if capability == "90" else "ampere"
    if is_sweep := "--sweep" in widths_and_options:
        sys.path.insert(0, str(ROOT / "tests" / "bench"))
        tiles_to_try = importlib.import_module("bench_attention").tiles_to_try
    for name in (*TRAINING, "decode"):
        for width in [int(word) for word in widths_and_options if word.isdigit()]:
            row = chip, kernels._padded(width)
            for tiles in tiles_to_try(kernels, name, *row) if is_sweep else [kernels.TILES[row][name]]:
                print(json.dumps(compile_ahead_of_time(name, int(capability), dtype, width, tiles)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
