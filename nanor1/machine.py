"""The machine a script runs on: the choice of device and dtype, said with its reason, and the memory used.

Left out: several devices (they are torch.distributed's matter). Source: torch only.
"""

import resource
import sys
from collections.abc import Callable

import torch


def choose_device(device: str, dtype: str, say: Callable[[str], None]) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of the weights, from "auto" or by name; `say` hears the choice with its reason.

    Raises ValueError for a device that torch does not know or does not find.
    """
    name, reason = device, "asked for"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        reason = "no GPU found" if name == "cpu" else "the fastest found"
    dtype_name, dtype_reason = dtype, "asked for"
    if dtype_name == "auto":
        is_cuda = name.startswith("cuda")
        dtype_name = "bfloat16" if is_cuda else "float32"
        dtype_reason = "tensor cores" if is_cuda else "exact, and fast enough"
    try:
        chosen = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not to be had here ({why}); leave it out, or use cpu") from error
    threads = f", {torch.get_num_threads()} threads" if chosen.type == "cpu" else ""
    say(f"device: {name} ({reason}){threads}; dtype: {dtype_name} ({dtype_reason})")
    return chosen, getattr(torch, dtype_name)


def peak_memory_gib() -> float:
    """Most memory held so far, in GiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
