"""Log-probabilities and entropy of given tokens, and losses on them, without ever holding all the logits.

With a vocabulary of 150,000 the logits of a training batch are larger than the model. Here they are made for a chunk of
tokens at a time, and a loss's gradient is formed while its chunk's logits are there: three matrix products of
M x C x V, where a backward that made the logits again would take four.

- `token_logprobs` only looks.
- `chunked_loss` asks that a token's loss depend on its own log-probability only, as in every policy loss and in
  cross-entropy.
- `loss_of_logits`, of which that is one, is for a loss that knows its gradient with respect to a chunk's logits.

The maths, with l = hidden weight^T / temperature, lse = log sum_v exp(l_v), p = exp(l - lse):

    logp = l_target - lse                                     d logp / d l_v = 1[v = target] - p_v
    entropy = -sum_v p_v log p_v = lse - sum_v p_v l_v        (no gradient: it is for reporting)

so that with g = d loss / d logp, error = p - 1[target] and s = -g / temperature of each token

    d loss / d hidden = s * (error @ weight)                  d loss / d weight = error^T @ (s * hidden)

Only logp and entropy, one number a token, outlive a chunk. Departures from computing it plainly: logits, statistics and
sums are fp32 for weights of bf16 too. A bf16 logit between 16 and 32 is a multiple of 0.125, which would part the
trainer from the sampler; a bf16 sum of the weight's gradient over the chunks loses addends 256 times smaller. The error
is rounded to bf16 where that is multiplied faster.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import repeat

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = defaultdict(lambda: 2**27, cuda=2**31)  # logits; small chunks read weight and its gradient too often
CHUNK_ROWS = defaultdict(lambda: 1, cuda=128)  # their number is a multiple of it: whole tiles of a matrix product
BLOCK_BYTES = defaultdict(lambda: 2**21, cuda=2**28)  # of these, what is exponentiated at a time: fits a CPU's cache
PART_ROWS = 2**12  # of the output matrix that a CPU multiplies in bf16 at a time
ALIGNMENT = 8  # vocabulary entries: rows of bf16 start at multiples of 16 bytes, as tensor cores want


@torch.no_grad()
def token_logprobs(
    hidden_MC: Tensor, weight_VC: Tensor, targets_M: Tensor, temperature: float = 1.0, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """log p(target) at the sampling temperature, and the entropy of the whole distribution in nats; both fp32 [M].

    hidden and weight are of one dtype, fp32 or bf16 (in fp64 all is fp64). Targets, int64, are below `vocab_size`; ids
    at or above it (padding of the output matrix) get probability 0, as in the sampler. No gradient.
    """
    logp_M, entropy_M = hidden_MC.new_empty(2, len(hidden_MC), dtype=_wide(hidden_MC.dtype))
    for at, logits in logit_chunks(hidden_MC, weight_VC, temperature, vocab_size):
        logp_M[at], entropy_M[at] = _statistics(logits, targets_M[at])
    return logp_M, entropy_M


def chunked_loss(
    hidden_MC: Tensor,
    weight_VC: Tensor,
    targets_M: Tensor,
    loss_fn: Callable[[Tensor, slice], Tensor],
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the chunks' losses, logp [M], entropy [M]); the loss alone carries a gradient.

    `loss_fn(logp of some tokens, their slice of M)` returns a scalar, the sum of those tokens' losses, each a function
    of that token's own logp alone. Its gradient is formed at once, so the loss's backward only multiplies it by what
    comes from above; a second backward, and differentiating twice, raise RuntimeError. Shapes and dtypes are those of
    `token_logprobs`; hidden and weight get gradients of their dtype.

    >>> hidden, weight = torch.zeros(2, 4, requires_grad=True), torch.ones(8, 4)
    >>> loss, _, _ = chunked_loss(hidden, weight, torch.tensor([3, 5]), lambda logp, at: -logp.sum() / 2)
    >>> round(loss.item(), 4)  # log(8)
    2.0794
    """
    logp_M, entropy_M = hidden_MC.new_empty(2, len(hidden_MC), dtype=_wide(hidden_MC.dtype))

    def loss_of_chunk(logits: Tensor, at: slice, error: Tensor | None) -> tuple[Tensor, Tensor]:
        logp_M[at], entropy_M[at] = _statistics(logits, targets_M[at], error)
        with torch.enable_grad():
            logp = logp_M[at].detach().requires_grad_()
            loss = loss_fn(logp, at)
            (grad_logp,) = torch.autograd.grad(loss, logp)
        return loss.detach(), grad_logp / -temperature

    return loss_of_logits(hidden_MC, weight_VC, loss_of_chunk, temperature, vocab_size), logp_M, entropy_M


def loss_of_logits(
    hidden_MC: Tensor,
    weight_VC: Tensor,
    loss_fn: Callable[[Tensor, slice, Tensor | None], tuple[Tensor, Tensor]],
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The sum of the chunks' losses, with a gradient that is formed at once, as that of `chunked_loss` is.

    `loss_fn(logits of n tokens, their slice of M, error)` returns the sum of their losses and a factor [n], one a
    token. The logits are as `logit_chunks` makes them. It writes d loss / d (hidden weight^T), divided by that factor,
    into `error`, which is of the logits' shape and may be their very memory. None: no gradient is wanted.
    """
    if not torch.is_grad_enabled():
        hidden_MC, weight_VC = hidden_MC.detach(), weight_VC.detach()
    return _LossOfLogits.apply(hidden_MC, weight_VC, loss_fn, temperature, vocab_size or len(weight_VC))


@torch.no_grad()
def logit_chunks(
    hidden_MC: Tensor, weight_VC: Tensor, temperature: float = 1.0, vocab_size: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the tokens, each with its logits: fp32, rounded up to an aligned row, ids above the vocabulary -1e30.

    No gradient; the next chunk's logits are written over these.
    """
    vocab_size = vocab_size or len(weight_VC)
    for at, logits, _ in _chunks(*_operands(hidden_MC, weight_VC, vocab_size), temperature, vocab_size):
        yield at, logits


class _LossOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MC, weight_VC, loss_fn, temperature, vocab_size):
        hidden, weight = _operands(hidden_MC, weight_VC, vocab_size)
        factors = hidden, weight  # what the error is multiplied with
        if hidden_MC.dtype == torch.bfloat16 and hidden_MC.device.type == "cpu" and _cpu_multiplies_bf16():
            factors = hidden_MC, weight_VC[: len(weight)]
        loss, gradients = hidden.new_zeros((), dtype=_wide(hidden.dtype)), []
        if any(ctx.needs_input_grad):
            gradients = [torch.zeros_like(x, dtype=loss.dtype) for x in (hidden_MC, weight_VC)]
        for at, logits, error in _chunks(hidden, weight, temperature, vocab_size, has_error=bool(gradients)):
            chunk_loss, scale = loss_fn(logits, at, error)
            loss += chunk_loss
            if gradients:
                _add_gradients(gradients, at, error, scale, *factors)
        ctx.gradients = [gradient.to(hidden_MC.dtype) for gradient in gradients]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if ctx.gradients is None:
            raise RuntimeError("this loss has no second backward: its gradient is formed once, in the forward")
        gradients, ctx.gradients = ctx.gradients, None
        return *(gradient.mul_(grad_loss) for gradient in gradients), None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _operands(hidden_MC: Tensor, weight_VC: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """What the logits are a product of: the vocabulary's rows alone, and bf16 only where a product of it is fp32.

    That is on CUDA (torch.mm with out_dtype, torch >= 2.8). Elsewhere bf16 is converted, once a call: a product of bf16
    would round the logits.
    """
    weight = weight_VC[: _aligned(vocab_size)]
    if hidden_MC.is_cuda:
        return hidden_MC, weight
    return hidden_MC.to(_wide(hidden_MC.dtype)), weight.to(_wide(weight.dtype))


@cache
def _cpu_multiplies_bf16() -> bool:
    """Products of bf16 are then twice as fast (Zen 4); without these instructions they take five times as long."""
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def _aligned(n_rows: int) -> int:
    return -(-n_rows // ALIGNMENT) * ALIGNMENT


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into `out`, summed and returned in its dtype whatever that of a and b."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _chunks(
    hidden: Tensor, weight: Tensor, temperature: float, vocab_size: int, has_error: bool = False
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Slices of the tokens, each with its logits, and with room for an error of the operands' dtype.

    That is the same memory where their dtypes are the same. The memory is that of all chunks, as new pages cost more
    than exp. The slices depend on the vocabulary and not on how many rows pad it: two models of one vocabulary have the
    same.
    """
    M, V = len(hidden), len(weight)
    dtype = _wide(hidden.dtype)
    n = max(1, CHUNK_BYTES[hidden.device.type] // (_aligned(V) * dtype.itemsize))
    if n >= (multiple := CHUNK_ROWS[hidden.device.type]):
        n -= n % multiple
    buffer = hidden.new_empty(min(n, M), V, dtype=dtype)
    room = torch.empty_like(buffer, dtype=hidden.dtype) if has_error and hidden.dtype != dtype else buffer
    for start in range(0, M, n):
        at = slice(start, min(start + n, M))
        # data: torch.compile would make another program for a view of a larger tensor than for all of it
        logits = _product(hidden[at], weight.T, out=buffer[: at.stop - start].data)
        if temperature != 1:
            logits /= temperature
        logits[:, vocab_size:] = -1e30  # probability 0; -inf would make 0 * inf of it in the entropy
        error = logits if room is buffer else room[: at.stop - start].data
        yield at, logits, error if has_error else None


def _statistics(logits: Tensor, targets: Tensor, error: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logp of the targets and entropy; p - 1[target] is written to `error`, which may be the logits' own memory.

    Without it the logits stay as they are. On a CPU a block of rows at a time, on CUDA in compiled passes over all.
    """
    logit = logits.gather(1, targets[:, None]).squeeze(1)
    if _is_compiled(logits.device):
        lse, entropy = _compiled_softmax()(logits, error)
    else:
        n, V = logits.shape
        rows = max(1, BLOCK_BYTES[logits.device.type] // (V * logits.itemsize))
        rooms = logits.new_empty(2, min(rows, n), V)  # once: made anew a block, they leave holes in a CPU's heap
        errors = repeat(None) if error is None else error.split(rows)
        parts = [_softmax(*pair, *rooms[:, : len(pair[0])]) for pair in zip(logits.split(rows), errors, strict=False)]
        lse, entropy = map(torch.cat, zip(*parts, strict=True))
    logp = logit - lse
    if error is not None:
        error.scatter_(1, targets[:, None], logp.expm1().to(error.dtype)[:, None])
    return logp, entropy


def _is_compiled(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("triton") is not None


@cache
def _compiled_softmax() -> Callable:
    """`_softmax` in four passes over the logits instead of nine, for any number of rows and without room."""
    return torch.compile(_softmax, dynamic=True)


def _softmax(
    logits: Tensor, p: Tensor | None, shifted: Tensor | None = None, exp: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """lse and entropy of each row; its probabilities are written to `p`. The other two are room to work in."""
    highest = logits.amax(1, keepdim=True)
    shifted = torch.sub(logits, highest, out=shifted)
    exp = torch.exp(shifted, out=exp)
    total = exp.sum(1)
    mean_shifted = shifted.mul_(exp).sum(1) / total  # a bmm of one row and one column is ten times slower
    if p is not None:
        p.copy_(exp.div_(total[:, None]))
    return highest.squeeze(1) + total.log(), total.log() - mean_shifted


def _add_gradients(gradients, at: slice, error: Tensor, scale: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Add a chunk's part to both gradients; `scale` is multiplied into the small matrices, not into the error.

    Where the error is fp32 and the operands bf16, a CPU rounds products too: then a part of the vocabulary at a time,
    so that the rounded error and the products are small, and their sums are fp32.
    """
    grad_hidden_MC, total = gradients[0], gradients[1][: len(weight)]
    scaled = (hidden[at] * scale[:, None]).to(weight.dtype)
    if error.dtype != weight.dtype:
        for start in range(0, len(weight), PART_ROWS):
            part = slice(start, start + PART_ROWS)
            rounded = error[:, part].to(weight.dtype)
            grad_hidden_MC[at] += rounded @ weight[part]
            total[part] += rounded.T @ scaled
    else:
        _product(error, weight, out=grad_hidden_MC[at])
        if total.dtype == error.dtype:
            total.addmm_(error.T, scaled)
        else:
            total += _product(error.T, scaled, out=torch.empty_like(total))
    grad_hidden_MC[at] *= scale[:, None]
