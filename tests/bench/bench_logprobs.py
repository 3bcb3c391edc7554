"""Time and peak memory of log-probabilities with their gradients: all logits at once against chunks. Run by hand.

    python tests/bench/bench_logprobs.py [--repeats 5] [--shape N C V]...

The variants do the same work, forward and backward, to the gradients of hidden and weight:

- plain: all logits, cross-entropy in fp32, no entropy (what most trainers do);
- plain_entropy: the same with the entropy, which the two below also give;
- checkpoint: chunks of tokens under torch.utils.checkpoint;
- in_forward: `chunked_loss`.

Times are medians over repeats that take turns, so that a busy machine slows all alike. TFLOP/s counts the 6 N C V
operations that are needed, also where a variant does 8; the limit is the rate of the product hidden weight^T, timed in
the same turns. Memory is beyond the inputs: on CUDA torch.cuda.max_memory_allocated, on the CPU the growth of ru_maxrss
over one run in a process of its own. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import commit, processor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanor1.logprobs import chunked_loss

CUDA_SHAPES = [(16384, 896, 151936), (16384, 1536, 151936)]
CPU_SHAPES = [(1024, 576, 49152), (512, 896, 151936)]
CHECKPOINT_LOGITS = 2**26


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("N", "C", "V"))
    args = parser.parse_args()
    is_cuda = torch.cuda.is_available()
    shapes = args.shape or (CUDA_SHAPES if is_cuda else CPU_SHAPES)
    where = {
        "device": torch.cuda.get_device_name() if is_cuda else processor(),
        "threads": None if is_cuda else torch.get_num_threads(),
        "dtype": "bfloat16" if is_cuda else "float32",
        "torch": torch.__version__,
        "commit": commit(),
    }
    print(json.dumps(where | {"results": [measure(is_cuda, args.repeats, *shape) for shape in shapes]}))


def make_inputs(N: int, C: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = (torch.randn(n, C, generator=generator, device=device) for n in (N, V))
    weight *= 3 / C**0.5  # logits of a few units; in place, or a copy would hide as much of the peak
    targets = torch.randint(0, V, (N,), generator=generator, device=device)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def run_plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    F.cross_entropy(F.linear(hidden, weight).float(), targets).backward()


def chunk_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = F.linear(hidden, weight).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), entropy


def run_plain_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    (-chunk_logprobs(hidden, weight, targets)[0].mean()).backward()


def run_checkpoint(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    rows = max(1, CHECKPOINT_LOGITS // len(weight))
    parts = [
        checkpoint(chunk_logprobs, h, weight, t, use_reentrant=False)[0]
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    (-torch.cat(parts).mean()).backward()


def run_in_forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    N = len(targets)
    chunked_loss(hidden, weight, targets, lambda logp, at: -logp.sum() / N)[0].backward()


VARIANTS = {
    "plain": run_plain,
    "plain_entropy": run_plain_entropy,
    "checkpoint": run_checkpoint,
    "in_forward": run_in_forward,
}


def measure(is_cuda: bool, repeats: int, N: int, C: int, V: int) -> dict:
    """Times and memory of every variant at one shape; prints a table."""
    if is_cuda:
        memory = {name: cuda_bytes(name, N, C, V) for name in VARIANTS}
    else:
        with multiprocessing.get_context("forkserver").Pool(1, maxtasksperchild=1) as processes:
            memory = {name: processes.apply(cpu_bytes, (name, N, C, V)) for name in VARIANTS}
    seconds = time_in_turns(is_cuda, repeats, N, C, V)
    product_s = statistics.median(seconds.pop("product"))
    limit = 2 * N * C * V / product_s / 1e12
    print(f"{N} tokens x {V}, width {C}: matrix products at {limit:.3g} TFLOP/s")
    rows = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        rate = 6 * N * C * V / median / 1e12
        rows[name] = {
            "median_s": median,
            "min_s": min(times),
            "max_s": max(times),
            "tflops": rate,
            "share_of_limit": rate / limit,
            "memory_gib": memory[name] / 2**30,
        }
        print(
            f"  {name:14s} {median:8.4f} s ({min(times):.4f} to {max(times):.4f}), {rate:7.3g} TFLOP/s"
            f" = {rate / limit:4.0%} of the limit, {memory[name] / 2**30:6.2f} GiB"
        )
    return {"N": N, "C": C, "V": V, "limit_tflops": limit, "variants": rows}


def time_in_turns(is_cuda: bool, repeats: int, N: int, C: int, V: int) -> dict[str, list[float]]:
    hidden, weight, targets = make_inputs(N, C, V)
    a, b = hidden.detach(), weight.detach()
    logits = torch.empty(N, V, dtype=a.dtype, device=a.device)
    jobs: dict[str, Callable] = {"product": lambda: torch.mm(a, b.T, out=logits)}
    jobs |= {name: lambda run=run: run(hidden, weight, targets) for name, run in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):  # the first warms up
        for name, job in jobs.items():
            hidden.grad = weight.grad = None
            started = now(is_cuda)
            job()
            if turn:
                seconds[name].append(now(is_cuda) - started)
    return seconds


def now(is_cuda: bool) -> float:
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def cuda_bytes(name: str, N: int, C: int, V: int) -> int:
    inputs = make_inputs(N, C, V)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    VARIANTS[name](*inputs)
    return torch.cuda.max_memory_allocated() - before


def cpu_bytes(name: str, N: int, C: int, V: int) -> int:
    inputs = make_inputs(N, C, V)
    VARIANTS[name](*make_inputs(8, C, 64))  # what the libraries allocate once
    before = peak_bytes()
    VARIANTS[name](*inputs)
    return peak_bytes() - before


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
