"""What the benchmarks of whole models share: shapes, random weights, prompts, measured limits, peers that may fail.

Limits are measured in the run they are compared in: the rate at which memory is copied (bytes read and written), and
that of matrix products. Shapes are those of the named models' config.json on the Hugging Face hub.

Letters: B rows, C width, M other side of a matrix.
"""

import gc
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that benchmarks run from anywhere, not installed

from nanor1.model import Transformer, reorder, reordered_linear
from nanor1.run.machine import matrix_rate
from nanor1.weights import ModelConfig

ROOT = Path(__file__).resolve().parents[2]


def qwen2(width: int, inner: int, layers: int, heads: int, kv_heads: int, is_tied: bool = True) -> ModelConfig:
    vocab_size = 151_936 if is_tied else 152_064
    return ModelConfig(
        "qwen2", vocab_size, width, inner, layers, heads, kv_heads, width // heads, 32_768,
        rope_theta=1e6, tie_word_embeddings=is_tied, qkv_bias=True,
    )  # fmt: skip


SHAPES = {
    "qwen2.5-0.5b": qwen2(896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": qwen2(1536, 8960, 28, 12, 2),
    "qwen2.5-3b": qwen2(2048, 11_008, 36, 16, 2),
    "qwen2.5-7b": qwen2(3584, 18_944, 28, 28, 4, is_tied=False),
    "qwen3-0.6b": ModelConfig(
        "qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, 40_960, rope_theta=1e6, tie_word_embeddings=True, has_qk_norm=True
    ),
    "tiny": replace(qwen2(64, 128, 2, 4, 2), vocab_size=512),  # for a look at whether a benchmark runs
}

PROMPTS = [  # their answers differ in length
    "How many days does one week have? Reply with the number only.",
    "Is ice colder than steam? Reply with yes or no only.",
    "Name the capital city of Norway in one short sentence.",
    "What do bees make from nectar? Answer in one sentence.",
    "Give the names of three fruits that are yellow, as a short list.",
    "Say in two or three sentences why leaves turn brown in autumn.",
    "Two friends share ten coins equally. How many does each get? Explain in one or two sentences.",
    "Describe in detail how bread is baked, from the flour to the loaf.",
]


def forget_the_last_case(device: torch.device) -> None:
    """Free what the model and the programs of the last case held, and count its peak of memory no more."""
    torch.compiler.reset()
    gc.collect()  # models lie in cycles: without it neither of the two lines around it frees anything
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Transformer:
    """Matrices of deviation 0.02, norms of one, biases of zero: finite logits, and no memory for a second copy."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    return model


# ---- limits


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(job: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start_s = time.perf_counter()
    job()
    synchronize(device)
    return time.perf_counter() - start_s


def copy_bandwidth(device: torch.device, limit_s: float = 0.5) -> float:
    """Bytes a second read and written by a copy larger than any cache, the best of those that fit in `limit_s`."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    best, end_s = seconds(lambda: target.copy_(source), device), time.perf_counter() + limit_s
    while time.perf_counter() < end_s:
        best = min(best, seconds(lambda: target.copy_(source), device))
    return 2 * source.nbytes / best


@torch.inference_mode()
def products_s(model: Transformer, n_rows: int, n_logits: int, repeats: int = 3) -> float:
    """Seconds that the matrix products alone take for `n_rows` tokens of which `n_logits` reach the head.

    The quicker of two ways to compute them, the best of the repeats.
    """
    head_VC = model.head_weight_VC
    jobs = [(torch.randn(n_rows, p.shape[1]).to(p), p) for p in model.model.layers.parameters() if p.dim() == 2]
    jobs.append((torch.randn(n_logits, head_VC.shape[1]).to(head_VC), head_VC))
    reordered = [reorder(weight_MC) for _, weight_MC in jobs]

    def multiply(is_reordered: bool) -> None:
        for (x_BC, weight_MC), copy in zip(jobs, reordered, strict=True):
            reordered_linear(x_BC, copy) if is_reordered and copy is not None else F.linear(x_BC, weight_MC)

    return min(seconds(partial(multiply, way), head_VC.device) for way in (False, True) * repeats)


def weight_bytes(model: Transformer) -> int:
    """What a decode step reads of the weights: all but an embedding that is not the output matrix, too."""
    embedding = model.model.embed_tokens.weight
    total = sum(p.nbytes for p in model.parameters())
    return total if embedding is model.head_weight_VC else total - embedding.nbytes


def cache_bytes(model: Transformer, n_tokens: float) -> float:
    """Keys and values of so many tokens."""
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * n_tokens * model.head_weight_VC.element_size()


def n_compiled() -> int:
    """Graphs that torch.compile has made so far in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compile_s() -> float:
    """Seconds that torch.compile has taken so far in this process."""
    return torch._dynamo.utils.calculate_time_spent()["total_wall_time"]


# ---- what is said


def where(device: torch.device, dtype: torch.dtype) -> dict:
    """Device, dtype, versions and limits, for the head of a benchmark; printed."""
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "commit": commit(),
        "copy_gb_per_s": copy_bandwidth(device) / 1e9,
        "matrix_tflops": matrix_rate(device, dtype, limit_s=0.5) / 1e12,
    }
    for name, value in facts.items():
        print(f"{name:16s} {value:.3g}" if isinstance(value, float) else f"{name:16s} {value}")
    return facts


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux
        return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checked-out commit, with a + where files differ from it."""
    try:
        run = [subprocess.check_output(["git", *words], cwd=ROOT, text=True) for words in GIT]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run[0].strip() + ("+" if run[1].strip() else "")


GIT = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])


def attempt(name: str, job: Callable[[], Any], in_full: bool = False) -> Any:
    """What the job returns; None where it fails, and why is printed: a peer may be missing or lack what it needs.

    `in_full`: with all that was called, as one wants to know it of what is ours.
    """
    try:
        return job()
    except Exception as error:  # of another project: whatever it is, the rest is still to be measured
        frame = traceback.extract_tb(error.__traceback__)[-1]
        lines = str(error).strip().splitlines() or [""]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        if in_full:
            traceback.print_exc()
        print(f"{name}: not measured: {type(error).__name__}: {lines[0][:200]} ({place})", flush=True)
        return None


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def show(name: str, values: dict[str, float], unit: str) -> None:
    low, high = values["min"], values["max"]
    print(f"  {name:34s} {values['median']:9.4g} {unit} ({low:.4g} to {high:.4g}, {values['n']} runs)")


def finish(benchmark: str, facts: dict, results: Sequence[dict | None]) -> None:
    """The last line, for programs; the exit code is 1 where a case (None) could not be measured."""
    measured = [result for result in results if result]
    print(json.dumps({"benchmark": benchmark} | facts | {"results": measured}))
    if len(measured) < len(results):
        sys.exit(1)
