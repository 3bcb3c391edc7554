import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nanor1 import logprobs
from nanor1.logprobs import chunked_loss, token_logprobs

N, C, V = 11, 6, 24
USED = 21  # of the vocabulary, where some of it is padding
ROWS = [1, 3, 4, N, 100]  # tokens a chunk: one; ragged last chunks; exactly all; more than there are


def example(seed=0, dtype=torch.float32):
    """Hidden states, output weights and targets; logits of several units, so that no distribution is near uniform."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, USED, (N,), generator=generator)


def plain_logprobs(hidden, weight, targets, temperature=1.0, vocab_size=None):
    return (hidden @ weight[:vocab_size].T / temperature).log_softmax(-1)[range(len(targets)), targets]


@pytest.fixture
def rows_a_chunk(monkeypatch):
    """Set the number of tokens a chunk and, smaller, a block of the statistics, for a vocabulary of V."""

    def set_rows(rows, itemsize=4):
        monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", rows * V * itemsize)
        monkeypatch.setitem(logprobs.BLOCK_BYTES, "cpu", (rows + 2) // 3 * V * itemsize)

    return set_rows


@pytest.fixture
def bf16_products(monkeypatch):
    """Stand in for CUDA: operands stay bf16, their products are summed and returned in fp32."""
    monkeypatch.setattr(logprobs, "_operands", lambda hidden, weight, vocab_size: (hidden, weight))
    monkeypatch.setattr(logprobs, "_product", lambda a, b, out: out.copy_(a.float() @ b.float()))


@pytest.fixture
def products(request, monkeypatch):
    """How the gradient's products of bf16 weights are made; returns the number of roundings before each sum."""
    if request.param == "cuda":
        request.getfixturevalue("bf16_products")
    monkeypatch.setattr(logprobs, "_cpu_multiplies_bf16", lambda: request.param == "cpu")
    monkeypatch.setattr(logprobs, "PART_ROWS", 10)  # of 24: a ragged last part
    return 0 if request.param == "fp32" else 1


PRODUCTS = pytest.mark.parametrize("products", ["fp32", "cpu", "cuda"], indirect=True)


def clipped_loss(old, advantage, weight, ref):
    """A policy loss with everything: ratio and clip, k3 penalty, a detached importance weight."""

    def loss_fn(logp, at):
        ratio, log_ref_ratio = (logp - old[at]).exp(), ref[at] - logp
        surrogate = torch.minimum(ratio * advantage[at], ratio.clamp(0.8, 1.28) * advantage[at])
        k3 = log_ref_ratio.exp() - 1 - log_ref_ratio
        return ((0.1 * k3 - surrogate * (logp.detach() - old[at]).exp().clamp(max=2)) * weight[at]).sum()

    return loss_fn


def loss_of(logp, seed):
    """A clipped loss around given log-probabilities: some ratios in the clip, some beyond each end of it."""
    generator = torch.Generator().manual_seed(seed)
    old, ref = (logp.detach() + 0.5 * torch.randn(N, generator=generator) for _ in range(2))
    return clipped_loss(old, torch.randn(N, generator=generator), torch.rand(N, generator=generator), ref)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("temperature", "vocab_size"), [(1.0, None), (0.7, None), (1.5, USED)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_those_of_the_plain_log_softmax(rows_a_chunk, rows, temperature, vocab_size, dtype):
    rows_a_chunk(rows, dtype.itemsize)
    hidden, weight, targets = example(seed=rows, dtype=dtype)
    logp, _ = token_logprobs(hidden, weight, targets, temperature, vocab_size)
    assert logp.dtype == dtype and not logp.requires_grad
    tolerance = {torch.float32: {"atol": 2e-6, "rtol": 1e-5}, torch.float64: {"atol": 1e-14, "rtol": 1e-13}}[dtype]
    torch.testing.assert_close(logp, plain_logprobs(hidden, weight, targets, temperature, vocab_size), **tolerance)


@pytest.mark.parametrize("rows", [3, N])
def test_the_gradient_is_that_of_finite_differences(rows_a_chunk, rows):
    rows_a_chunk(rows, 8)
    hidden, weight, targets = example(dtype=torch.float64)

    def loss(hidden, weight):
        return chunked_loss(hidden, weight, targets, lambda logp, at: logp.square().sum(), 0.7, USED)[0]

    for x, grad in zip((hidden, weight), torch.autograd.grad(loss(hidden, weight), (hidden, weight)), strict=True):
        direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
        sides = [loss(*(y + h * direction if y is x else y for y in (hidden, weight))).item() for h in (1e-5, -1e-5)]
        assert (grad * direction).sum().item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("temperature", "vocab_size"), [(1.0, None), (0.7, USED)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chunked_loss_has_the_value_and_gradient_of_the_loss_of_all_tokens(
    rows_a_chunk, rows, temperature, vocab_size, dtype
):
    rows_a_chunk(rows, dtype.itemsize)
    hidden, weight, targets = example(seed=rows, dtype=dtype)
    expected_logp = plain_logprobs(hidden, weight, targets, temperature, vocab_size)
    loss_fn = loss_of(expected_logp, seed=rows)
    expected = loss_fn(expected_logp, slice(None))
    expected_grads = torch.autograd.grad(3 * expected, (hidden, weight))
    loss, logp, entropy = chunked_loss(hidden, weight, targets, loss_fn, temperature, vocab_size)
    assert not logp.requires_grad and not entropy.requires_grad
    torch.testing.assert_close(entropy, token_logprobs(hidden, weight, targets, temperature, vocab_size)[1])
    grads = torch.autograd.grad(3 * loss, (hidden, weight))
    rounding = {torch.float32: 1e-5, torch.float64: 1e-14}[dtype]
    for mine, theirs in zip((loss, logp, *grads), (expected, expected_logp, *expected_grads), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=rounding * max(1.0, theirs.abs().max().item()))
        assert theirs.abs().max() > 0.01


def squares(hidden, weight, targets):
    return chunked_loss(hidden, weight, targets, lambda logp, at: logp.square().sum())[0]


def test_only_what_requires_a_gradient_gets_one():
    hidden, weight, targets = example()
    expected = torch.autograd.grad(plain_logprobs(hidden, weight, targets).square().sum(), (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(squares(hidden, weight.detach(), targets), hidden)[0], expected[0])
    torch.testing.assert_close(torch.autograd.grad(squares(hidden.detach(), weight, targets), weight)[0], expected[1])
    assert not squares(hidden.detach(), weight.detach(), targets).requires_grad
    with torch.no_grad():
        assert not squares(hidden, weight, targets).requires_grad


def test_gradients_add_up_over_micro_batches_and_pass_through_a_weight_that_is_no_leaf():
    hidden, weight, targets = example()
    expected = torch.autograd.grad(plain_logprobs(hidden, weight, targets).square().sum(), weight)[0]
    weight.grad = None
    for _ in range(2):
        (0.5 * squares(hidden, 2 * (weight / 2), targets)).backward()
    torch.testing.assert_close(weight.grad, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [4, N])
def test_ids_at_or_above_vocab_size_have_probability_zero_and_no_gradient(rows_a_chunk, rows):
    rows_a_chunk(rows)
    hidden, weight, targets = example()
    with torch.no_grad():
        weight[USED:] *= 1000  # would outweigh everything
    total = sum(token_logprobs(hidden, weight, torch.full((N,), i), vocab_size=USED)[0].exp() for i in range(USED))
    torch.testing.assert_close(total, torch.ones(N))
    chunked_loss(hidden, weight, targets, lambda logp, at: logp.sum(), vocab_size=USED)[0].backward()
    assert not weight.grad[USED:].any() and weight.grad[:USED].all()


def test_padding_costs_no_more_than_the_rounding_up_to_an_aligned_row(rows_a_chunk):
    rows_a_chunk(N)
    hidden, weight, targets = example()
    wide = torch.cat((weight.detach(), torch.randn(5000, C)))
    with LargestTensor() as seen:
        token_logprobs(hidden, wide, targets, vocab_size=USED)
    assert seen.numel == N * V  # 21 rounded up to a multiple of 8


class LargestTensor(TorchDispatchMode):
    """Watches every operation's new tensors, forward and backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {id(x) for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x.numel() for x in tree_iter(out) if isinstance(x, torch.Tensor) and id(x) not in known]
        self.numel = max([self.numel, *made])
        return out


def test_no_tensor_larger_than_a_chunk_of_logits_is_made_forward_or_backward(rows_a_chunk):
    rows_a_chunk(15)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, C, generator=generator).requires_grad_() for n in (50, V))
    targets = torch.randint(0, V, (50,), generator=generator)
    with LargestTensor() as plain:
        plain_logprobs(hidden, weight, targets).square().sum().backward()
    assert plain.numel >= 50 * V  # what the watch is for, it sees
    with LargestTensor() as seen:
        squares(hidden, weight, targets).backward()
    assert seen.numel == 15 * V


def test_no_logits_are_kept_for_the_backward(rows_a_chunk):
    rows_a_chunk(4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        squares(*example())
    assert max(kept) == 4  # one number a token, while its chunk is there


class TiedModel(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(embedding.clone(), freeze=False)
        self.mix = nn.Linear(C, C, bias=False)
        nn.init.eye_(self.mix.weight)

    def forward(self, ids):
        return self.mix(self.embed(ids)).tanh()


@pytest.mark.parametrize("rows", [2, N])
def test_weights_tied_to_the_embedding_get_the_gradient_of_both_uses(rows_a_chunk, rows):
    rows_a_chunk(rows)
    _, weight, targets = example()
    ids = targets.flip(0)
    plain = TiedModel(weight.detach())
    head = plain.embed.weight.detach().clone().requires_grad_()
    plain_logprobs(plain(ids), head, targets).square().sum().backward()
    expected = plain.embed.weight.grad + head.grad
    model = TiedModel(weight.detach())
    squares(model(ids), model.embed.weight, targets).backward()
    torch.testing.assert_close(model.embed.weight.grad, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.mix.weight.grad, plain.mix.weight.grad, atol=1e-5, rtol=1e-5)


def test_log_probabilities_of_bf16_weights_are_those_of_the_same_weights_in_fp32():
    hidden, weight, targets = example(dtype=torch.bfloat16)
    logp, entropy = token_logprobs(hidden, weight, targets, temperature=0.7)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp, plain_logprobs(hidden.float(), weight.float(), targets, 0.7))
    rounded = plain_logprobs(hidden, weight, targets, 0.7).float()
    assert (logp - rounded).abs().max() > 1e-3  # what logits of bf16 would do


def bf16_example(n=200, width=32):
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, width, generator=generator).bfloat16().requires_grad_()
    weight = (2 * torch.randn(V, width, generator=generator) / width**0.5).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(0, V, (n,), generator=generator)


def check_within_rounding(mine, expected, terms, n_roundings):
    """|mine - expected| is at most the roundings (2^-8 each in bf16) of the terms of the sum, and of the result."""
    assert mine.dtype == torch.bfloat16
    bound = (n_roundings * terms + expected.abs()) * 2**-8 * 1.01 + 1e-6
    assert ((mine.float() - expected).abs() <= bound).all()


@pytest.mark.parametrize("rows", [8, 64, 1000])
@PRODUCTS
def test_gradients_of_bf16_weights_are_off_by_the_rounding_of_their_terms_only(rows_a_chunk, rows, products):
    """bf16 products round the error, and hidden times its factor, before they are multiplied; fp32 ones nothing."""
    rows_a_chunk(rows)
    hidden, weight, targets = bf16_example()
    hidden_fp32, weight_fp32 = (x.detach().float().requires_grad_() for x in (hidden, weight))
    plain = plain_logprobs(hidden_fp32, weight_fp32, targets)
    expected = torch.autograd.grad(plain.square().sum(), (hidden_fp32, weight_fp32))
    with torch.no_grad():
        error = F.one_hot(targets, V) - (hidden_fp32 @ weight_fp32.T).softmax(-1)
        size = (error * 2 * plain[:, None]).abs()  # of each logit's gradient
        terms = size @ weight_fp32.abs(), size.T @ hidden_fp32.abs()
    grads = torch.autograd.grad(squares(hidden, weight, targets), (hidden, weight))
    check_within_rounding(grads[0], expected[0], terms[0], products)
    check_within_rounding(grads[1], expected[1], terms[1], 2 * products)


@PRODUCTS
def test_the_weights_gradient_in_bf16_loses_no_small_contribution_of_many_chunks(rows_a_chunk, products):
    """One chunk of size 1 and 512 of 2^-9: the sum is 2; added in bf16, each of the 512 would vanish."""
    rows_a_chunk(1)
    factor = torch.full((513,), 2.0**-9)
    factor[0] = 1.0
    hidden = torch.ones(513, 1, dtype=torch.bfloat16)
    targets = torch.zeros(513, dtype=torch.int64)
    weight = torch.zeros(V, 1, dtype=torch.bfloat16, requires_grad=True)
    chunked_loss(hidden, weight, targets, lambda logp, at: (logp * factor[at]).sum())[0].backward()
    assert weight.grad[0].item() == pytest.approx(2 * (1 - 1 / V), rel=2**-8)
    assert weight.grad[1].item() == pytest.approx(-2 / V, rel=2**-8)


@pytest.mark.parametrize(("fits", "taken"), [(3, 3), (4, 4), (7, 4), (11, 8)])
def test_a_chunk_is_a_whole_number_of_tiles_where_one_fits(rows_a_chunk, monkeypatch, fits, taken):
    rows_a_chunk(fits)
    monkeypatch.setitem(logprobs.CHUNK_ROWS, "cpu", 4)
    hidden, weight, _ = example()
    chunks = [(at.start, len(logits)) for at, logits in logprobs.logit_chunks(hidden, weight)]
    assert chunks == [(start, min(taken, N - start)) for start in range(0, N, taken)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_passes_give_the_same_in_one_program_for_all_numbers_of_rows(monkeypatch, bf16_products, dtype):
    programs = []

    def count(graph, _):
        programs.append(graph)
        return graph.forward

    compiled = torch.compile(logprobs._softmax, dynamic=True, backend=count)
    hidden, weight, targets = bf16_example()
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    for rows in (64, 200, 33):
        monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", rows * V * 4)
        results = []
        for is_compiled in (False, True):
            monkeypatch.setattr(logprobs, "_is_compiled", lambda device, answer=is_compiled: answer)
            monkeypatch.setattr(logprobs, "_compiled_softmax", lambda: compiled)
            loss, *values = chunked_loss(hidden, weight, targets, lambda logp, at: logp.square().sum(), 0.7)
            grads = torch.autograd.grad(loss, (hidden, weight))
            results.append((loss, *values, *grads, *token_logprobs(hidden, weight, targets)))
        for mine, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(mine, expected)
    assert len(programs) == 2  # with an error to write, and without


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled passes and fp32 products of bf16 need CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_cuda_values_are_those_of_fp64_and_no_more_memory_is_taken_than_a_chunk_and_its_error(monkeypatch, dtype):
    n, width, size = 3000, 64, 16_384
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cuda", 1024 * size * 4)
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(m, width, generator=generator, device="cuda").to(dtype) for m in (n, size))
    hidden, weight = hidden.requires_grad_(), (weight / 2).requires_grad_()
    targets = torch.randint(0, size - 5, (n,), generator=generator, device="cuda")

    def loss_fn(logp, at):
        return logp.square().sum() / n

    chunked_loss(hidden, weight, targets, loss_fn, 0.7, size - 5)[0].backward()  # compiles
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, logp, entropy = chunked_loss(hidden, weight, targets, loss_fn, 0.7, size - 5)
    loss.backward()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 1024 * size * (4 if dtype == torch.float32 else 6) * 1.25

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = plain_logprobs(*exact, targets, 0.7, size - 5)
    (expected.square().sum() / n).backward()
    p = (exact[0] @ exact[1][: size - 5].T / 0.7).softmax(-1).detach()
    torch.testing.assert_close(logp.double(), expected.detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), -torch.special.xlogy(p, p).sum(1), atol=1e-4, rtol=1e-5)
    for mine, theirs in zip((hidden, weight), exact, strict=True):
        error = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.01}[dtype]


@pytest.mark.parametrize(("temperature", "vocab_size"), [(1.0, None), (0.5, USED)])
@pytest.mark.parametrize("rows", [4, N])
def test_the_entropy_is_that_of_the_distribution_sampled_from(rows_a_chunk, rows, temperature, vocab_size):
    rows_a_chunk(rows)
    hidden, weight, targets = example()
    expected = torch.distributions.Categorical(logits=hidden @ weight[:vocab_size].T / temperature).entropy()
    entropy = token_logprobs(hidden, weight, targets, temperature, vocab_size)[1]
    torch.testing.assert_close(entropy, expected.detach(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("logits", "entropy"),
    [
        ([7.0, 7.0, 7.0, 7.0], math.log(4)),
        ([math.log(4), math.log(2), 0.0, 0.0], 1.75 * math.log(2)),
        ([0.0, 0.0, -300.0, -1e30], math.log(2)),  # probabilities that are zero in fp32
        ([0.0, -300.0, -300.0, -300.0], 0.0),
    ],
)
def test_the_entropy_is_in_nats_and_knows_that_zero_times_log_zero_is_zero(logits, entropy):
    _, mine = token_logprobs(torch.ones(1, 1), torch.tensor(logits)[:, None], torch.tensor([0]))
    assert mine.item() == pytest.approx(entropy, abs=1e-6)


def test_large_logits_do_not_overflow():
    logp, entropy = token_logprobs(torch.ones(1, 1), torch.tensor([[1000.0], [999.0]]), torch.tensor([1]))
    assert logp.item() == pytest.approx(-1 - math.log1p(math.exp(-1)), rel=1e-4)
    p = 1 / (1 + math.e)
    assert entropy.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-5)


def test_no_tokens_give_no_values_and_zero_gradients():
    hidden, weight, _ = example()
    targets = torch.zeros(0, dtype=torch.int64)
    logp, entropy = token_logprobs(hidden[:0], weight, targets)
    assert logp.shape == entropy.shape == (0,)
    weight.grad = None
    squares(hidden[:0], weight, targets).backward()
    assert weight.grad.shape == weight.shape and not weight.grad.any()


def test_differentiating_twice_is_an_error():
    hidden, weight, targets = example()
    (grad,) = torch.autograd.grad(squares(hidden, weight, targets).square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_second_backward_is_an_error():
    loss = squares(*example())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
