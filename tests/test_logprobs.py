import math

import pytest
import torch
import torch.nn.functional as F

from nanor1 import logprobs
from nanor1.logprobs import token_logprobs

N, C, V = 11, 6, 9


def example(seed=0, dtype=torch.float32):
    """Hidden states, output weights and targets; logits of several units, so that no distribution is near uniform."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V - 2, (N,), generator=generator)


def rows_a_chunk(monkeypatch, n, vocab_size=V):
    monkeypatch.setattr(logprobs, "MAX_CHUNK_LOGITS", n * vocab_size)


def test_it_is_the_log_softmax_of_the_scaled_logits_at_the_targets():
    hidden, weight, targets = example()
    logp, _ = token_logprobs(hidden, weight, targets, temperature=0.7)
    expected = ((hidden @ weight.T) / 0.7).log_softmax(-1)[range(N), targets]
    torch.testing.assert_close(logp, expected)


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_chunks_change_neither_values_nor_gradients(monkeypatch, rows):
    results = []
    for chunk in (N, rows):
        rows_a_chunk(monkeypatch, chunk)
        hidden, weight, targets = example()
        logp, entropy = token_logprobs(hidden, weight, targets, temperature=0.7)
        (logp * torch.linspace(-1, 2, N)).sum().backward()
        results.append((logp.detach(), entropy, hidden.grad, weight.grad))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=1e-5)
        assert whole.abs().max() > 0.1


def test_no_chunk_holds_more_logits_than_allowed(monkeypatch):
    rows_a_chunk(monkeypatch, 4)
    sizes, softmax = [], F.log_softmax
    monkeypatch.setattr(F, "log_softmax", lambda logits, dim: sizes.append(logits.numel()) or softmax(logits, dim=dim))
    hidden, weight, targets = example()
    token_logprobs(hidden, weight, targets)[0].sum().backward()
    assert max(sizes) == 4 * V and len(sizes) == 6  # 4, 4 and 3 rows, forward and once more for the gradient


@pytest.mark.parametrize("rows", [4, N])
def test_ids_at_or_above_vocab_size_have_probability_zero_and_no_gradient(monkeypatch, rows):
    rows_a_chunk(monkeypatch, rows, V - 2)
    hidden, weight, _ = example()
    total = sum(token_logprobs(hidden, weight, torch.full((N,), i), vocab_size=V - 2)[0].exp() for i in range(V - 2))
    torch.testing.assert_close(total, torch.ones(N))
    token_logprobs(hidden, weight, torch.zeros(N, dtype=torch.int64), vocab_size=V - 2)[0].sum().backward()
    assert not weight.grad[V - 2 :].any() and weight.grad[: V - 2].all()


@pytest.mark.parametrize("rows", [2, N])
def test_weights_tied_to_the_embedding_get_the_gradient_of_both_uses(monkeypatch, rows):
    rows_a_chunk(monkeypatch, rows)
    _, weight, targets = example()
    ids = targets.flip(0)
    token_logprobs(weight[ids], weight, targets)[0].sum().backward()
    tied = weight.grad.clone()
    embedding, head = (weight.detach().clone().requires_grad_() for _ in range(2))
    (embedding[ids] @ head.T).log_softmax(-1)[range(N), targets].sum().backward()
    torch.testing.assert_close(tied, embedding.grad + head.grad)


def test_the_softmax_of_bf16_logits_is_computed_in_fp32():
    hidden, weight, targets = example(dtype=torch.bfloat16)
    logp, entropy = token_logprobs(hidden, weight, targets, temperature=0.7)
    assert logp.dtype == entropy.dtype == torch.float32
    logits = F.linear(hidden, weight).float() / 0.7
    torch.testing.assert_close(logp, logits.log_softmax(-1)[range(N), targets])
    total = sum(token_logprobs(hidden, weight, torch.full((N,), i))[0].exp() for i in range(V))
    torch.testing.assert_close(total, torch.ones(N), atol=1e-5, rtol=0)  # in bf16 it would be off by some 0.01
    logp.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("probabilities", "entropy"),
    [
        ([0.25, 0.25, 0.25, 0.25], math.log(4)),
        ([0.5, 0.25, 0.125, 0.125], 1.75 * math.log(2)),
        ([0.5, 0.5, 0.0, 0.0], math.log(2)),  # logits of -infinity
        ([1.0, 0.0, 0.0, 0.0], 0.0),
    ],
)
def test_the_entropy_is_in_nats_and_knows_that_zero_times_log_zero_is_zero(probabilities, entropy):
    weight = torch.tensor(probabilities).log()[:, None]
    logp, mine = token_logprobs(torch.ones(1, 1), weight, torch.tensor([0]))
    assert mine.item() == pytest.approx(entropy, abs=1e-6)
    assert logp.item() == pytest.approx(math.log(probabilities[0]), abs=1e-6)


def test_the_entropy_is_that_of_the_distribution_sampled_from():
    weight = torch.tensor([0.8, 0.2]).log()[:, None]
    _, entropy = token_logprobs(torch.ones(1, 1), weight, torch.tensor([0]), temperature=0.5)
    hot = 0.64 / 0.68  # squared and normalised
    assert entropy.item() == pytest.approx(-hot * math.log(hot) - (1 - hot) * math.log(1 - hot), abs=1e-6)


@pytest.mark.parametrize("rows", [4, N])
def test_the_entropy_carries_no_gradient(monkeypatch, rows):
    rows_a_chunk(monkeypatch, rows)
    logp, entropy = token_logprobs(*example())
    assert logp.requires_grad and not entropy.requires_grad
