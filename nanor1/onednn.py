"""Products of few rows with a large matrix on a CPU: oneDNN's, with the matrix laid out beforehand as it reads it.

torch.nn.functional.linear hands oneDNN (bf16) or MKL (fp32) the matrix as it lies, and for few rows putting it in order
takes as long as multiplying. torch keeps the operations that do it once for what torch.compile freezes; they are
called here. Measured: LOG.md. Left out: other processors than x86, where `reorder` gives None.

Source: oneDNN's guide, "Memory Format Propagation".
"""

import platform

import torch
from torch import Tensor

ROWS = 64  # of the products that the layout is chosen for; those of 1 to 512 rows are as fast with it


def reorder(weight_MC: Tensor) -> Tensor | None:
    """A copy of a matrix, fp32 or bf16, in oneDNN's own layout; None where oneDNN cannot multiply by it."""
    is_x86 = weight_MC.device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    if not is_x86 or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    is_bf16 = weight_MC.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight_MC.dtype != torch.float32 and not is_bf16:
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight_MC.detach(), ROWS)


def linear(
    x_NC: Tensor,
    reordered: Tensor,
    bias_M: Tensor | None = None,
    residual_NM: Tensor | None = None,
    factor_NM: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """x W^T + b of x's dtype, [N, M], with what `reorder` made of W; no gradient.

    With a residual x W^T + b + residual, with a factor (x W^T + b) * factor, with act="swish" silu(x W^T + b): rounded
    once, where several operations round, and read, several times. At most one of the three.
    """
    if residual_NM is None and factor_NM is None:
        return torch.ops.mkldnn._linear_pointwise(x_NC, reordered, bias_M, act, [], "")
    other, name = (residual_NM, "add") if factor_NM is None else (factor_NM, "mul")
    return torch.ops.mkldnn._linear_pointwise(x_NC, other, reordered, bias_M, name)
