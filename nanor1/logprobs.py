"""Log-probabilities and entropy of given tokens, and losses on them, without ever holding all the logits.

With a vocabulary of 150,000 the logits of a training batch are larger than the model. Here they are made for a chunk of
tokens at a time. Three functions share the chunk:

- `token_logprobs` is a plain differentiable function: its backward makes each chunk's logits again. Four matrix
  products of N x C x V: one forward; logits, gradient of hidden and gradient of weight backward.
- `chunked_loss` also takes the loss, and so can form the gradient while a chunk's logits are there. Three products. It
  asks that a token's loss depend on its own log-probability only, as in every policy loss and in cross-entropy.
- `loss_of_logits` does the same for a loss that knows its own gradient with respect to a chunk's logits; `chunked_loss`
  is one of these.

The maths, with l = hidden weight^T / temperature, lse = log sum_v exp(l_v), p = exp(l - lse):

    logp = l_target - lse                                     d logp / d l_v = 1[v = target] - p_v
    entropy = -sum_v p_v log p_v = lse - sum_v p_v l_v        (no gradient: it is for reporting)

so that with g = d loss / d logp, error = p - 1[target] and s = -g / temperature of each token

    d loss / d hidden = s * (error @ weight)                  d loss / d weight = error^T @ (s * hidden)

Only logp and entropy, one number a token, outlive a chunk. Departures from computing it plainly: logits, statistics and
sums are fp32 for weights of bf16 too. A bf16 logit between 16 and 32 is a multiple of 0.125, which would part the
trainer from the sampler; a bf16 sum of the weight's gradient over the chunks loses addends 256 times smaller. The error
is rounded to bf16 where that is multiplied faster.

Letters: N tokens, C width, V vocabulary.
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


def token_logprobs(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, temperature: float = 1.0, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """log p(target) at the sampling temperature, and the entropy of the whole distribution in nats; both fp32 [N].

    hidden and weight are of one dtype, fp32 or bf16, and get gradients of it (in fp64 all is fp64). Targets, int64, are
    below `vocab_size`; ids at or above it (padding of the output matrix) get probability 0, as in the sampler. The
    entropy carries no gradient; differentiating twice raises RuntimeError.
    """
    return _TokenLogprobs.apply(hidden_NC, weight_VC, targets_N, temperature, vocab_size or len(weight_VC))


def chunked_loss(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    loss_fn: Callable[[Tensor, slice], Tensor],
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the chunks' losses, logp [N], entropy [N]); the loss alone carries a gradient.

    `loss_fn(logp of some tokens, their slice of N)` returns a scalar, the sum of those tokens' losses, each a function
    of that token's own logp alone. Its gradient is formed at once, so the loss's backward only multiplies it by what
    comes from above; a second backward, and differentiating twice, raise RuntimeError. Shapes and dtypes are those of
    `token_logprobs`.

    >>> hidden, weight = torch.zeros(2, 4, requires_grad=True), torch.ones(8, 4)
    >>> loss, _, _ = chunked_loss(hidden, weight, torch.tensor([3, 5]), lambda logp, at: -logp.sum() / 2)
    >>> round(loss.item(), 4)  # log(8)
    2.0794
    """
    logp_N, entropy_N = hidden_NC.new_empty(2, len(hidden_NC), dtype=_wide(hidden_NC.dtype))

    def loss_of_chunk(logits: Tensor, at: slice, error: Tensor | None) -> tuple[Tensor, Tensor]:
        logp_N[at], entropy_N[at] = _statistics(logits, targets_N[at], error)
        loss, grad_logp = _loss_and_gradient(loss_fn, logp_N[at], at)
        return loss, grad_logp / -temperature

    return loss_of_logits(hidden_NC, weight_VC, loss_of_chunk, temperature, vocab_size), logp_N, entropy_N


def loss_of_logits(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    loss_fn: Callable[[Tensor, slice, Tensor | None], tuple[Tensor, Tensor]],
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The sum of the chunks' losses, with a gradient that is formed at once, as that of `chunked_loss` is.

    `loss_fn(logits of n tokens, their slice of N, error)` returns the sum of their losses and a factor [n], one a
    token. The logits are as `logit_chunks` makes them. It writes d loss / d (hidden weight^T), divided by that factor,
    into `error`, which is of the logits' shape and may be their very memory. None: no gradient is wanted.
    """
    if not torch.is_grad_enabled():
        hidden_NC, weight_VC = hidden_NC.detach(), weight_VC.detach()
    return _LossOfLogits.apply(hidden_NC, weight_VC, loss_fn, temperature, vocab_size or len(weight_VC))


@torch.no_grad()
def logit_chunks(
    hidden_NC: Tensor, weight_VC: Tensor, temperature: float = 1.0, vocab_size: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the tokens, each with its logits: fp32, rounded up to an aligned row, ids above the vocabulary -1e30.

    No gradient; the next chunk's logits are written over these.
    """
    vocab_size = vocab_size or len(weight_VC)
    hidden, weight = _operands(hidden_NC, weight_VC, vocab_size)
    for at, buffer, _ in _chunks(hidden, weight):
        yield at, _logits(buffer, hidden[at], weight, temperature, vocab_size)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NC, weight_VC, targets_N, temperature, vocab_size):
        hidden, weight = _operands(hidden_NC, weight_VC, vocab_size)
        logp_N, entropy_N = hidden.new_empty(2, len(hidden), dtype=_wide(hidden.dtype))
        for at, buffer, _ in _chunks(hidden, weight):
            logits = _logits(buffer, hidden[at], weight, temperature, vocab_size)
            logp_N[at], entropy_N[at] = _statistics(logits, targets_N[at])
        ctx.save_for_backward(hidden_NC, weight_VC, targets_N)
        ctx.settings = temperature, vocab_size
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp_N, _):
        hidden_NC, weight_VC, targets_N = ctx.saved_tensors
        temperature, vocab_size = ctx.settings
        hidden, weight = _operands(hidden_NC, weight_VC, vocab_size)
        gradients = _zero_gradients(hidden_NC, weight_VC, ctx.needs_input_grad)
        scale_N = grad_logp_N / -temperature
        factors = _gradient_operands(hidden_NC, weight_VC, hidden, weight)
        for at, buffer, error in _chunks(hidden, weight, has_error=True):
            logits = _logits(buffer, hidden[at], weight, temperature, vocab_size)
            _statistics(logits, targets_N[at], error)
            _add_gradients(gradients, at, error, scale_N[at], *factors)
        return *_in_dtype(gradients, hidden_NC.dtype), None, None, None


class _LossOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NC, weight_VC, loss_fn, temperature, vocab_size):
        hidden, weight = _operands(hidden_NC, weight_VC, vocab_size)
        gradients = _zero_gradients(hidden_NC, weight_VC, ctx.needs_input_grad)
        loss = hidden.new_zeros((), dtype=_wide(hidden.dtype))
        factors = _gradient_operands(hidden_NC, weight_VC, hidden, weight)
        has_gradient = any(ctx.needs_input_grad)
        for at, buffer, error in _chunks(hidden, weight, has_gradient):
            logits = _logits(buffer, hidden[at], weight, temperature, vocab_size)
            chunk_loss, scale = loss_fn(logits, at, error if has_gradient else None)
            loss += chunk_loss
            if has_gradient:
                _add_gradients(gradients, at, error, scale, *factors)
        ctx.gradients = _in_dtype(gradients, hidden_NC.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if ctx.gradients is None:
            raise RuntimeError("this loss has no second backward: its gradient is formed once, in the forward")
        gradients, ctx.gradients = ctx.gradients, None
        return *(g if g is None else g.mul_(grad_loss) for g in gradients), None, None, None


def _loss_and_gradient(loss_fn, logp: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        logp = logp.detach().requires_grad_()
        loss = loss_fn(logp, at)
        (grad_logp,) = torch.autograd.grad(loss, logp)
    return loss.detach(), grad_logp


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _operands(hidden_NC: Tensor, weight_VC: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """What the logits are a product of: the vocabulary's rows alone, and bf16 only where a product of it is fp32.

    That is on CUDA (torch.mm with out_dtype, torch >= 2.8). Elsewhere bf16 is converted, once a call: a product of bf16
    would round the logits.
    """
    weight = weight_VC[: _aligned(vocab_size)]
    if hidden_NC.is_cuda:
        return hidden_NC, weight
    return hidden_NC.to(_wide(hidden_NC.dtype)), weight.to(_wide(weight.dtype))


def _gradient_operands(hidden_NC: Tensor, weight_VC: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the error is multiplied with: the operands of the logits, but bf16 also on a CPU with instructions for it.

    The products are then twice as fast (Zen 4); without, they take five times as long (Zen 3).
    """
    if hidden_NC.dtype == torch.bfloat16 and hidden_NC.device.type == "cpu" and _cpu_multiplies_bf16():
        return hidden_NC, weight_VC[: len(weight)]
    return hidden, weight


@cache
def _cpu_multiplies_bf16() -> bool:
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def _aligned(n_rows: int) -> int:
    return -(-n_rows // ALIGNMENT) * ALIGNMENT


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into `out`, summed and returned in its dtype whatever that of a and b."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _chunks(hidden: Tensor, weight: Tensor, has_error: bool = False) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of the tokens, each with room for its logits, and for an error of the operands' dtype.

    That is the same memory where their dtypes are the same. The room is that of all chunks, as new memory pages cost
    more than exp. The slices depend on the vocabulary and not on how many rows pad it: two models of one vocabulary
    have the same.
    """
    N, V = len(hidden), len(weight)
    dtype = _wide(hidden.dtype)
    n = max(1, CHUNK_BYTES[hidden.device.type] // (_aligned(V) * dtype.itemsize))
    if n >= (multiple := CHUNK_ROWS[hidden.device.type]):
        n -= n % multiple
    buffer = hidden.new_empty(min(n, N), V, dtype=dtype)
    room = torch.empty_like(buffer, dtype=hidden.dtype) if has_error and hidden.dtype != dtype else buffer
    for start in range(0, N, n):
        at = slice(start, min(start + n, N))
        # data: torch.compile would make another program for a view of a larger tensor than for all of it
        logits = buffer[: at.stop - start].data
        yield at, logits, logits if room is buffer else room[: at.stop - start].data


def _logits(buffer: Tensor, hidden: Tensor, weight: Tensor, temperature: float, vocab_size: int) -> Tensor:
    logits = _product(hidden, weight.T, out=buffer)
    if temperature != 1:
        logits /= temperature
    logits[:, vocab_size:] = -1e30  # probability 0; -inf would make 0 * inf of it in the entropy
    return logits


def _statistics(logits: Tensor, targets: Tensor, error: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logp of the targets and entropy; p - 1[target] is written to `error`, which may be the logits' own memory.

    Without it the logits stay as they are. On a CPU a block of rows at a time, on CUDA in compiled passes over all.
    """
    logit = logits.gather(1, targets[:, None]).squeeze(1)
    if _is_compiled(logits.device):
        lse, entropy = _compiled_softmax()(logits, error)
    else:
        N, V = logits.shape
        rows = max(1, BLOCK_BYTES[logits.device.type] // (V * logits.itemsize))
        rooms = logits.new_empty(2, min(rows, N), V)  # once: made anew a block, they leave holes in a CPU's heap
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


def _zero_gradients(hidden_NC: Tensor, weight_VC: Tensor, needs_grad: tuple[bool, ...]) -> list[Tensor | None]:
    wanted = zip((hidden_NC, weight_VC), needs_grad, strict=False)
    return [torch.zeros_like(x, dtype=_wide(x.dtype)) if is_wanted else None for x, is_wanted in wanted]


def _add_gradients(gradients, at: slice, error: Tensor, scale: Tensor, hidden_NC: Tensor, weight: Tensor) -> None:
    """Add a chunk's part to both gradients; `scale` is multiplied into the small matrices, not into the error."""
    if error.dtype != weight.dtype:
        return _add_rounded(gradients, at, error, scale, hidden_NC, weight)
    grad_hidden_NC, grad_weight_VC = gradients
    if grad_hidden_NC is not None:
        _product(error, weight, out=grad_hidden_NC[at]).mul_(scale[:, None])
    if grad_weight_VC is not None:
        scaled, total = (hidden_NC[at] * scale[:, None]).to(error.dtype), grad_weight_VC[: len(weight)]
        if total.dtype == error.dtype:
            total.addmm_(error.T, scaled)
        else:
            total += _product(error.T, scaled, out=torch.empty_like(total))


def _add_rounded(gradients, at: slice, error: Tensor, scale: Tensor, hidden_NC: Tensor, weight: Tensor) -> None:
    """The same where the error is fp32 and the others bf16, to which a CPU rounds products as well.

    A part of the vocabulary at a time: the rounded error and the products are small, and their sums are fp32.
    """
    grad_hidden_NC, grad_weight_VC = gradients
    scaled = (hidden_NC[at] * scale[:, None]).to(weight.dtype)
    for start in range(0, len(weight), PART_ROWS):
        part = slice(start, min(start + PART_ROWS, len(weight)))
        rounded = error[:, part].to(weight.dtype)
        if grad_hidden_NC is not None:
            grad_hidden_NC[at] += rounded @ weight[part]
        if grad_weight_VC is not None:
            grad_weight_VC[part] += rounded.T @ scaled
    if grad_hidden_NC is not None:
        grad_hidden_NC[at] *= scale[:, None]


def _in_dtype(gradients: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if gradient is None else gradient.to(dtype) for gradient in gradients]
