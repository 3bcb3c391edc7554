"""The machine a script runs on: device and dtype, chosen and said with the reason, memory, matrix rate, and Ctrl-C.

Left out: several devices (they are torch.distributed's matter). Sources: torch; for PEAK_FLOPS the maker's data sheets;
for Windows its documents on GetProcessMemoryInfo and GlobalMemoryStatusEx.
"""

import contextlib
import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

try:
    import resource
except ImportError:  # Windows
    resource = None

SMALL_WIDTH = 512  # a narrower model is bound by overhead: bf16 gains nothing and costs precision
WORTHWHILE = 1.5  # as fast as fp32, at least, has bf16 to be on a CPU
UNKNOWN_MEMORY = 4 << 30  # bytes counted on where the system does not tell

# Dense bf16 products with fp32 sums, FLOP/s, by torch's name of the device: NVIDIA's data sheets (H200, H100, A100,
# L40S, L4) and its white papers on the Ada and Ampere GA102 architectures (RTX). Figures with sparsity are twice these.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


def choose_device(
    device: str, dtype: str, say: Callable[[str], None], width: int | None = None
) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of the weights, from "auto" or by name; `say` hears the choice with its reason.

    `width` is that of the model, if it is known: a small one gets fp32 on the CPU. Raises ValueError for a device that
    torch does not know or does not find, and for float16 elsewhere than on CUDA.
    """
    name, reason = device, "asked for"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        reason = "no GPU found" if name == "cpu" else "the fastest found"
    try:
        chosen = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not to be had here ({why}); leave it out, or use cpu") from error
    if dtype == "float16" and chosen.type != "cuda":
        raise ValueError(f"--dtype float16 is for CUDA, and the device is {name}; use float32 or bfloat16")
    dtype_name, dtype_reason = _choose_dtype(chosen, width) if dtype == "auto" else (dtype, "asked for")
    threads = f", {torch.get_num_threads()} threads" if chosen.type == "cpu" else ""
    say(f"device: {name} ({reason}){threads}; dtype: {dtype_name} ({dtype_reason})")
    return chosen, getattr(torch, dtype_name)


def _choose_dtype(device: torch.device, width: int | None) -> tuple[str, str]:
    """bf16 where it is clearly faster, which on a CPU is measured; and the reason."""
    if device.type == "cuda":
        return "bfloat16", "tensor cores"
    if device.type != "cpu":
        return "float32", "exact"
    if width is not None and width < SMALL_WIDTH:
        return "float32", f"exact, and as fast at a width of {width}"
    # by the time that the processor spends on this process: other programs must not decide how a model answers
    rates = {name: matrix_rate(device, getattr(torch, name), time.process_time) for name in ("float32", "bfloat16")}
    chosen = "bfloat16" if rates["bfloat16"] >= WORTHWHILE * rates["float32"] else "float32"
    measured = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items())
    return chosen, f"matrix products run at {measured} GFLOP/s a core"


def matrix_rate(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter, limit_s: float = 0.04
) -> float:
    """FLOP/s of matrix products of a model's shape, measured: the best of those that fit in about `limit_s`."""
    rows, width = (8192, 4096) if device.type == "cuda" else (128, 768)
    # waves: products of ones take less power, and so run faster, than those of numbers that differ
    x, weight = (torch.arange(n * width, device=device).sin().view(n, width).to(dtype) for n in (rows, 4 * width))

    def multiply() -> float:
        start_s = clock()
        F.linear(x, weight)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return clock() - start_s

    multiply()  # the first loads and chooses code
    end_s = clock() + limit_s
    times = [multiply()]
    while clock() < end_s:
        times.append(multiply())
    return 2 * rows * 4 * width * width / min(times)


def peak_flops(device: torch.device, dtype: torch.dtype, say: Callable[[str], None]) -> float:
    """The FLOP/s of matrix products that model FLOPs utilisation is of: published, or else measured; `say` hears it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if name in PEAK_FLOPS and dtype in (torch.bfloat16, torch.float16):
        peak, source = PEAK_FLOPS[name], f"published for {name}"
    else:
        peak, source = matrix_rate(device, dtype), "measured"
    name = str(dtype).removeprefix("torch.")
    say(f"model FLOPs utilisation (mfu) is of {peak / 1e12:.3g} TFLOP/s: {source}, {name} matrix products")
    return peak


def peak_memory_gib() -> float:
    """Most memory held so far, in GiB: of the GPU where there is one, else of this process; nan if nothing tells."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if resource:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)
    if hasattr(ctypes, "WinDLL"):
        return _windows_memory()[0] / 2**30
    return math.nan


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on the device; on the CPU and MPS, what the system or the container has left."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if hasattr(ctypes, "WinDLL"):
        return _windows_memory()[1]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        left = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: half of what there is
        if not hasattr(os, "sysconf"):
            return UNKNOWN_MEMORY
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(left, *left_in_control_groups())


def _windows_memory() -> tuple[int, int]:
    """Bytes that this process has held at most, and that the machine has left, as 64-bit Windows tells them."""
    kernel32 = ctypes.WinDLL("kernel32")
    counters = (ctypes.c_uint64 * 9)(72)  # PROCESS_MEMORY_COUNTERS: its size and page faults, peak working set, ...
    kernel32.K32GetProcessMemoryInfo(ctypes.c_void_p(-1), counters, 72)  # -1: this process
    status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX: its size and load, the machine's memory, what is left, ...
    kernel32.GlobalMemoryStatusEx(status)
    return counters[1], status[2]


def left_in_control_groups(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left in each Linux control group with a limit that this process is in, as in a container or a batch job.

    Of version 2 (`memory.max`) and version 1 (`memory.limit_in_bytes`); cached files count as left, since they give
    way. Inside a container the group's own path may not be there, and `root` is the container's group.
    """
    left = []
    for line in proc.read_text().splitlines() if proc.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, files = (root / "memory", _V1) if controllers else (root, _V2)
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):  # a limit holds for all groups within
            if group.is_relative_to(base):
                left += _left_in(group, *files)
    return left


_V1, _V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), ("memory.max", "memory.current", "")


def _left_in(group: Path, limit_name: str, used_name: str, prefix: str) -> list[int]:
    """Bytes left in one control group; none said where it has no limit."""
    try:
        limit, used = (group / limit_name).read_text().strip(), int((group / used_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return []
    cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return [] if limit == "max" else [max(0, int(limit) - used + cached)]


class Interrupt:
    """Ctrl-C and SIGTERM ask the run to finish its step, save and exit; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.is_asked = False
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number: int, frame: object) -> None:
        self.is_asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(OSError):  # `2>&1 | tee`: Ctrl-C ends tee, too
            os.write(2, b"\nfinishing this step, then saving (Ctrl-C again: stop at once)\n")  # print is not safe here
