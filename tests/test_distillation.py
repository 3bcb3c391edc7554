import json
import math
import random
import re
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from running import randomize
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from vocabularies import of_bytes, of_words

from nanor1 import grpo, logprobs
from nanor1.gradient import Example, Workers
from nanor1.gradient import add_gradient as supervised_gradient
from nanor1.grpo import LossSettings, Rollout
from nanor1.model import ModelConfig, Transformer
from nanor1.packing import pack
from nanor1.sampler import Completion, generate
from nanor1.stages.distillation import (
    DIVERGENCES,
    DivergenceSettings,
    add_gradient,
    check_same_end,
    divergence_loss,
    reverse_kl,
    teacher_advantages,
)
from nanor1.tokenizer import Tokenizer, check_same_vocabulary

M, C, C_TEACHER, V = 11, 6, 9, 24
USED = 21  # of the vocabulary, where some of it is padding
ROWS = [1, 4, M, 100]  # tokens a chunk: one; a ragged last chunk; exactly all; more than there are
KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]


def example(seed=0, dtype=torch.float64, student_rows=V, teacher_rows=V):
    """The arguments of divergence_loss but for the settings; logits of several units."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(M, C), (student_rows, C), (M, C_TEACHER), (teacher_rows, C_TEACHER)]
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    target_M, weight_M = torch.randint(0, USED, (M,), generator=generator), torch.rand(M, generator=generator)
    return *(x.requires_grad_() for x in tensors), target_M, weight_M


def direct_loss(hidden, weight, teacher_hidden, teacher_weight, target, token_weight, settings):
    """The same loss from all logits at once, by torch's own divergences: (loss, divergence, nll)."""
    logits = hidden @ weight[: settings.vocab_size].T
    teacher_logits = (teacher_hidden @ teacher_weight[: settings.vocab_size].T).detach()
    student, teacher = (Categorical(logits=x / settings.temperature) for x in (logits, teacher_logits))
    if settings.kind == "jsd":
        beta = settings.beta
        mixture = Categorical(beta * teacher.probs + (1 - beta) * student.probs)
        divergence = beta * kl_divergence(teacher, mixture) + (1 - beta) * kl_divergence(student, mixture)
    else:
        pair = (teacher, student) if settings.kind == "forward" else (student, teacher)
        divergence = kl_divergence(*pair)
    nll = F.cross_entropy(logits, target, reduction="none")
    mixed = settings.hard_weight * nll + (1 - settings.hard_weight) * settings.temperature**2 * divergence
    return (token_weight * mixed).sum(), divergence, nll


@pytest.fixture
def rows_a_chunk(monkeypatch):
    """Set the number of tokens a chunk and, smaller, a block, for a vocabulary of V."""

    def set_rows(rows, itemsize=8):
        monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", rows * V * itemsize)
        monkeypatch.setitem(logprobs.BLOCK_BYTES, "cpu", (rows + 2) // 3 * V * itemsize)

    return set_rows


def grads(loss, arguments):
    return torch.autograd.grad(loss, arguments[:2])


# ---- values and gradients


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("temperature", "hard_weight", "vocab_size"), [(1.0, 0.0, V), (2.0, 0.3, USED)])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_losses_and_gradients_are_those_of_the_direct_computation(
    rows_a_chunk, rows, temperature, hard_weight, vocab_size, kind, beta
):
    rows_a_chunk(rows)
    settings = DivergenceSettings(vocab_size, kind, beta, temperature, hard_weight)
    arguments = example(seed=rows)
    mine, expected = divergence_loss(*arguments, settings), direct_loss(*arguments, settings)
    for value, wanted in zip(mine, expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-12, rtol=1e-10)
        assert value.dtype == torch.float64 and wanted.min() > 0.01
    assert not mine[1].requires_grad and not mine[2].requires_grad
    for gradient, wanted in zip(grads(3 * mine[0], arguments), grads(3 * expected[0], arguments), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=1e-10)
        assert wanted.abs().max() > 0.1


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_fp32_is_within_rounding_of_fp64(rows_a_chunk, kind, beta):
    rows_a_chunk(4, itemsize=4)
    arguments, settings = example(dtype=torch.float32), DivergenceSettings(USED, kind, beta, 0.7, 0.2)
    exact = [x.detach().double().requires_grad_() for x in arguments[:4]]
    mine, expected = divergence_loss(*arguments, settings), direct_loss(*exact, *arguments[4:], settings)
    pairs = [*zip(mine, expected, strict=True)]
    pairs += zip(grads(mine[0], arguments), grads(expected[0], exact), strict=True)
    for value, wanted in pairs:
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted, atol=1e-5, rtol=1e-5)


def test_no_gradient_reaches_the_teacher_and_none_is_formed_without_grad_mode():
    arguments = example()
    divergence_loss(*arguments, DivergenceSettings(V))[0].backward()
    assert arguments[0].grad is not None and arguments[2].grad is None and arguments[3].grad is None
    with torch.no_grad():
        assert not divergence_loss(*arguments, DivergenceSettings(V))[0].requires_grad


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_what_requires_a_gradient_gets_one(frozen):
    arguments, settings = example(), DivergenceSettings(V, "reverse")
    expected = grads(divergence_loss(*arguments, settings)[0], arguments)
    arguments[frozen].requires_grad_(False)
    (gradient,) = torch.autograd.grad(divergence_loss(*arguments, settings)[0], arguments[1 - frozen])
    torch.testing.assert_close(gradient, expected[1 - frozen])


# ---- what the divergences are


def of_logits(student_logits, teacher_logits, settings, target=0):
    """(loss, divergence, gradient of the loss with respect to the student's logits) of one token."""
    student = torch.tensor(student_logits)[:, None].requires_grad_()
    teacher, one = torch.tensor(teacher_logits)[:, None], torch.ones(1, 1)
    target_M, weight_M = torch.tensor([target]), torch.ones(1)
    loss, divergence, _ = divergence_loss(one, student, one, teacher, target_M, weight_M, settings)
    loss.backward()
    return loss.item(), divergence.item(), student.grad.flatten().tolist()


def test_forward_and_reverse_by_hand():
    student, teacher = [math.log(1 / 4), math.log(3 / 4)], [math.log(1 / 2), math.log(1 / 2)]
    _, forward, gradient = of_logits(student, teacher, DivergenceSettings(2))
    assert forward == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert gradient == pytest.approx([1 / 4 - 1 / 2, 3 / 4 - 1 / 2])  # S - T
    _, reverse, gradient = of_logits(student, teacher, DivergenceSettings(2, "reverse"))
    assert reverse == pytest.approx(1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2))
    assert gradient == pytest.approx([1 / 4 * (math.log(1 / 2) - reverse), 3 / 4 * (math.log(3 / 2) - reverse)])


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equal_models_have_no_divergence_and_no_gradient(kind, beta, temperature):
    hidden, weight, *_, target, token_weight = example(dtype=torch.float32)
    arguments = hidden, weight, hidden.detach(), weight.detach(), target, token_weight
    loss, divergence, _ = divergence_loss(*arguments, DivergenceSettings(USED, kind, beta, temperature))
    assert abs(loss.item()) < 1e-6 and divergence.abs().max() < 1e-6
    for gradient in grads(loss, arguments):
        assert gradient.abs().max() < 1e-6
        assert kind == "jsd" or not gradient.any()  # exactly


def test_jsd_is_symmetric_at_one_half_and_elsewhere_symmetric_with_beta_turned_round():
    hidden, weight, teacher_hidden, teacher_weight, *rest = example()
    for beta in (0.5, 0.2):
        _, there, _ = divergence_loss(
            hidden, weight, teacher_hidden, teacher_weight, *rest, DivergenceSettings(V, "jsd", beta)
        )
        _, back, _ = divergence_loss(
            teacher_hidden, teacher_weight, hidden, weight, *rest, DivergenceSettings(V, "jsd", 1 - beta)
        )
        torch.testing.assert_close(there, back)
    _, same_beta, _ = divergence_loss(
        teacher_hidden, teacher_weight, hidden, weight, *rest, DivergenceSettings(V, "jsd", beta)
    )
    assert (there - same_beta).abs().max() > 0.01


@hypothesis_settings(max_examples=50)
@given(st.lists(st.tuples(*2 * [st.floats(-100, 100, width=32)]), min_size=2, max_size=6))
def test_jsd_at_one_half_is_between_0_and_log_2(pairs):
    student, teacher = map(list, zip(*pairs, strict=True))
    _, divergence, _ = of_logits(student, teacher, DivergenceSettings(len(pairs), "jsd"))
    assert -1e-6 <= divergence <= math.log(2) + 1e-6


def test_jsd_of_distributions_that_share_nothing_is_log_2():
    _, divergence, _ = of_logits([0.0, -200.0], [-200.0, 0.0], DivergenceSettings(2, "jsd"))
    assert divergence == pytest.approx(math.log(2))


@pytest.mark.parametrize(("end", "kind"), [(0, "forward"), (1, "reverse")])
def test_jsd_divided_by_the_distance_of_beta_from_its_end_tends_to_a_kl(end, kind):
    arguments, distance = example(), 1e-7
    loss, divergence, _ = divergence_loss(*arguments, DivergenceSettings(V, "jsd", abs(end - distance), 3.0))
    wanted_loss, wanted, _ = divergence_loss(*arguments, DivergenceSettings(V, kind, temperature=3.0))
    torch.testing.assert_close(divergence / distance, wanted, atol=1e-4, rtol=1e-3)
    pairs = zip(grads(loss / distance, arguments), grads(wanted_loss, arguments), strict=True)
    for gradient, wanted_gradient in pairs:
        torch.testing.assert_close(gradient, wanted_gradient, atol=1e-4, rtol=1e-3)
    other = {"forward": "reverse", "reverse": "forward"}[kind]
    assert (wanted - divergence_loss(*arguments, DivergenceSettings(V, other, temperature=3.0))[1]).abs().max() > 0.1


def test_at_high_temperature_loss_and_gradient_no_longer_depend_on_it():
    (cool, divergence, cool_gradient), (hot, hotter, hot_gradient) = (
        of_logits([3.0, -1.0, 0.0], [0.0, 2.0, 1.0], DivergenceSettings(3, temperature=tau)) for tau in (50.0, 100.0)
    )
    assert hot == pytest.approx(cool, rel=0.05) and hot_gradient == pytest.approx(cool_gradient, rel=0.05)
    assert hotter == pytest.approx(divergence / 4, rel=0.05)  # what is reported is without tau^2
    # to first order in 1 / tau: (centred logits of the student - of the teacher) / V
    assert hot_gradient == pytest.approx([(7 / 3 + 1) / 3, (-5 / 3 - 1) / 3, (-2 / 3 - 0) / 3], rel=0.05)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("student", [[0.0, 0.0, 0.0], [-300.0, 300.0, 0.0], [300.0, 0.0, -1e4]])
def test_near_one_hot_distributions_give_finite_losses_and_gradients(kind, beta, student):
    loss, divergence, gradient = of_logits(
        student, [500.0, -500.0, -1e30], DivergenceSettings(3, kind, beta, temperature=0.5, hard_weight=0.1)
    )
    assert all(map(math.isfinite, (loss, divergence, *gradient))) and divergence >= -1e-6
    if kind == "forward" and student == [0.0, 0.0, 0.0]:
        assert divergence == pytest.approx(math.log(3))


# ---- padding, widths, dtypes, memory


@pytest.mark.parametrize("rows", [4, 7])  # room for 7 rows of 24 is room for 8 of 21
@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(V, USED), (USED, V), (V + 40, V), (USED, V + 9)])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_rows_that_pad_either_vocabulary_have_probability_zero_and_no_gradient(
    rows_a_chunk, rows, student_rows, teacher_rows, kind
):
    rows_a_chunk(rows)
    arguments = example(student_rows=student_rows, teacher_rows=teacher_rows)
    with torch.no_grad():
        for weight in (arguments[1], arguments[3]):
            weight[USED:] *= 1000  # would outweigh everything
    settings = DivergenceSettings(USED, kind, hard_weight=0.2)
    mine, expected = divergence_loss(*arguments, settings), direct_loss(*arguments, settings)
    for value, wanted in zip(mine, expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-12, rtol=1e-10)
    gradient, wanted = (grads(loss[0], arguments)[1] for loss in (mine, expected))
    torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=1e-10)
    assert not gradient[USED:].any() and gradient[:USED].all()


@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("products", ["fp32", "cpu", "cuda"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_bf16_models_are_compared_in_fp32(monkeypatch, rows_a_chunk, kind, products, teacher_dtype):
    """With bf16 products the error is rounded before it is multiplied; the loss is not."""
    rows_a_chunk(4, itemsize=4)
    monkeypatch.setattr(logprobs, "_cpu_multiplies_bf16", lambda: products == "cpu")
    if products == "cuda":
        monkeypatch.setattr(logprobs, "_operands", lambda hidden, weight, vocab_size: (hidden, weight))
        monkeypatch.setattr(logprobs, "_product", lambda a, b, out: out.copy_(a.float() @ b.float()))
    arguments, settings = list(example(dtype=torch.bfloat16)), DivergenceSettings(V, kind, hard_weight=0.3)
    exact = [x.detach().double().requires_grad_() for x in arguments[:4]]
    arguments[2:4] = (x.to(teacher_dtype) for x in arguments[2:4])
    mine, expected = divergence_loss(*arguments, settings), direct_loss(*exact, *arguments[4:], settings)
    for value, wanted in zip(mine, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted, atol=1e-5, rtol=1e-5)
    for gradient, wanted in zip(grads(mine[0], arguments), grads(expected[0], exact), strict=True):
        assert gradient.dtype == torch.bfloat16
        n_roundings = 1 if products == "fp32" else 3  # of 2^-8 each at most: error, its factor, result
        torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=n_roundings * 2**-8 * wanted.abs().max())


class NewTensors(TorchDispatchMode):
    """The sizes of the tensors that operations make, forward and backward."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {id(x) for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        self.sizes += [x.numel() for x in tree_iter(out) if isinstance(x, torch.Tensor) and id(x) not in known]
        return out


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_no_tensor_larger_than_a_chunk_of_logits_is_made(rows_a_chunk, kind):
    rows_a_chunk(15, itemsize=4)
    generator = torch.Generator().manual_seed(0)
    sizes = [(50, C), (V, C), (50, C_TEACHER), (V, C_TEACHER)]
    tensors = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
    arguments = *tensors, torch.randint(0, V, (50,), generator=generator), torch.ones(50)
    settings = DivergenceSettings(V, kind, temperature=2.0, hard_weight=0.5)
    with NewTensors() as direct:
        direct_loss(*arguments, settings)[0].backward()
    assert max(direct.sizes) >= 50 * V  # what the watch is for, it sees
    with NewTensors() as seen:
        divergence_loss(*arguments, settings)[0].backward()
    assert max(seen.sizes) == 15 * V
    with torch.autograd.graph.saved_tensors_hooks(lambda x: pytest.fail("a tensor is kept"), lambda x: x):
        divergence_loss(*arguments, settings)


def test_a_second_backward_is_an_error():
    loss, _, _ = divergence_loss(*example(), DivergenceSettings(V))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_beta_at_which_jsd_means_nothing_is_refused(beta):
    with pytest.raises(ValueError, match=re.escape(f"beta is {beta}, where jsd is 0")):
        DivergenceSettings(V, kind="jsd", beta=beta)


@pytest.mark.parametrize("settings", [dict(kind="js"), dict(temperature=0.0), dict(hard_weight=1.5)])
def test_other_settings_that_mean_nothing_are_our_own_mistake(settings):
    with pytest.raises(AssertionError):
        DivergenceSettings(V, **settings)


# ---- models: on given texts

STOP, VOCAB_SIZE, TEMPERATURE = 12, 13, 0.8
STUDENT = ModelConfig("llama", 16, 24, 40, 2, 4, 2, 6, 64)  # 16 rows of output weights, of which 13 are tokens
TEACHER = ModelConfig("llama", 13, 32, 48, 2, 4, 2, 8, 64)  # wider, and not padded
ALL_IN_ONE = 10**6


def random_model(config, seed):
    return randomize(Transformer(config), seed)


@pytest.fixture(scope="module")
def teacher():
    return random_model(TEACHER, seed=1).requires_grad_(False)


@pytest.fixture(scope="module")
def examples():
    rng = random.Random(0)
    lengths = [2, 9, 5, 14, 7, 3]
    return [
        Example(rng.choices(range(VOCAB_SIZE), k=n), [False, *(rng.random() < 0.6 for _ in range(n - 2)), True])
        for n in lengths
    ]


def gradient_of(model, add, n_workers=1):
    """(what `add` of some workers returns, the gradient that it added)."""
    model.zero_grad()
    returned = add(Workers(model, n_workers))
    return returned, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_an_update_is_the_mean_over_all_target_tokens_computed_one_text_at_a_time(teacher, examples, kind):
    model, settings = random_model(STUDENT, 0), DivergenceSettings(VOCAB_SIZE, kind, 0.3, 1.5, 0.25)
    means, gradient = gradient_of(model, lambda w: add_gradient(w, teacher, examples, ALL_IN_ONE, settings))
    model.zero_grad()
    n_targets, expected = sum(sum(example.is_target) for example in examples), torch.zeros(3)
    for example in examples:
        ids, at = torch.tensor(example.ids), [t - 1 for t, is_target in enumerate(example.is_target) if is_target]
        states = [m(ids, torch.tensor([0, len(ids)]))[at] for m in (model, teacher)]
        values = direct_loss(
            states[0], model.head_weight_VC, states[1], teacher.head_weight_VC, ids[1:][at],
            torch.full((len(at),), 1 / n_targets), settings,
        )  # fmt: skip
        values[0].backward()
        expected += torch.stack([values[0], values[1].sum() / n_targets, values[2].sum() / n_targets]).detach()
    assert list(means.values()) == pytest.approx(expected.tolist(), rel=1e-5)
    assert list(means) == ["loss", "divergence", "nll"]
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)
    assert wanted.abs().max() > 0.01 and teacher.head_weight_VC.grad is None


@pytest.mark.parametrize(("tokens_per_batch", "n_workers"), [(1, 1), (15, 1), (15, 2)])
def test_neither_the_split_into_batches_nor_the_number_of_workers_changes_anything(
    teacher, examples, tokens_per_batch, n_workers
):
    model, settings = random_model(STUDENT, 0), DivergenceSettings(VOCAB_SIZE, hard_weight=0.25)
    means, whole = gradient_of(model, lambda w: add_gradient(w, teacher, examples, ALL_IN_ONE, settings))
    other_means, other = gradient_of(
        model, lambda w: add_gradient(w, teacher, examples, tokens_per_batch, settings), n_workers
    )
    assert other_means == pytest.approx(means, rel=1e-5)
    torch.testing.assert_close(other, whole, atol=1e-6, rtol=1e-4)


def test_a_scaled_loss_scales_the_gradient_and_no_metric(teacher, examples):
    model, settings = random_model(STUDENT, 0), DivergenceSettings(VOCAB_SIZE, hard_weight=0.25)
    means, plain = gradient_of(model, lambda w: add_gradient(w, teacher, examples, 15, settings))
    scaled_means, scaled = gradient_of(model, lambda w: add_gradient(w, teacher, examples, 15, settings, 2.0**16))
    assert scaled_means == means and torch.equal(scaled, plain * 2**16)


def test_the_hard_loss_alone_is_supervised_fine_tuning(teacher, examples):
    model, settings = random_model(STUDENT, 0), DivergenceSettings(VOCAB_SIZE, temperature=2.0, hard_weight=1.0)
    means, gradient = gradient_of(model, lambda w: add_gradient(w, teacher, examples, 15, settings))
    loss, wanted = gradient_of(model, lambda w: supervised_gradient(w, examples, 15, VOCAB_SIZE))
    assert means["loss"] == pytest.approx(loss, rel=1e-5) and means["nll"] == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_descending_the_gradient_brings_the_student_towards_the_teacher(teacher, examples, kind):
    model, settings = random_model(STUDENT, 0), DivergenceSettings(VOCAB_SIZE, kind)
    optimizer, seen = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(12):
        optimizer.zero_grad()
        seen.append(add_gradient(Workers(model), teacher, examples, ALL_IN_ONE, settings)["divergence"])
        optimizer.step()
    assert seen[-1] < 0.6 * seen[0]


# ---- models: on the student's own samples


def sample(model, prompts, n, seed=0):
    groups = generate(
        model, prompts, n=n, max_new_tokens=9, temperature=TEMPERATURE, stop_ids=[STOP], seed=seed,
        vocab_size=VOCAB_SIZE,
    )  # fmt: skip
    return [Rollout(None, p, c, "", None, {}) for p, group in zip(prompts, groups, strict=True) for c in group]


def log_softmax_after(model, rollout):
    """log p of all tokens before each completion token, one sequence at a time: [T, V]."""
    ids = torch.tensor(rollout.prompt_ids + rollout.completion.ids)
    logits = model.logits(model(ids, torch.tensor([0, len(ids)])))[len(rollout.prompt_ids) - 1 : -1, :VOCAB_SIZE]
    return (logits.double() / TEMPERATURE).log_softmax(-1)


PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3], [7]]


@pytest.mark.parametrize("tokens_per_batch", [1, 20, ALL_IN_ONE])
def test_an_advantage_is_how_much_likelier_the_token_is_to_the_teacher(teacher, tokens_per_batch):
    student = random_model(STUDENT, 0)
    rollouts = sample(student, PROMPTS, n=3)
    rollouts.insert(2, Rollout(None, [1, 2], Completion([], [], "length"), "", None, {}))
    advantages = teacher_advantages(teacher, rollouts, TEMPERATURE, VOCAB_SIZE, tokens_per_batch)
    assert advantages[2] == []
    signs = set()
    for rollout, of_tokens in zip(rollouts, advantages, strict=True):
        if not rollout.completion.ids:
            continue
        chosen = torch.tensor(rollout.completion.ids)[:, None]
        mine, theirs = (log_softmax_after(m, rollout).gather(1, chosen).squeeze(1) for m in (student, teacher))
        assert of_tokens == pytest.approx((theirs - mine).tolist(), abs=1e-4)
        signs |= {a > 0 for a in of_tokens}
    assert signs == {True, False}


class BareLogits:
    """A model whose parameters are the logits at each packed position."""

    def __init__(self, logits_NV):
        self.logits_NV = torch.tensor(logits_NV, requires_grad=True)
        self.head_weight_VC = torch.eye(self.logits_NV.shape[1])

    def __call__(self, ids_N, cu_seqlens_B1, parent_B):
        return self.logits_NV


def policy_gradient(model, batch, vocab_size):
    """Add the gradient of the policy loss of a batch that is used once."""
    logprobs.chunked_loss(
        batch.predictor_states(model), model.head_weight_VC, batch.target_M,
        lambda logp, at: grpo.policy_loss(logp, logp.detach(), batch.advantage_M[at], batch.weight_M[at])[0],
        vocab_size=vocab_size,
    )[0].backward()  # fmt: skip


def test_the_sign_by_hand():
    # the student draws token 0 (p = 1/2), then token 1 (p = 1/2); the teacher gives them 1/4 and 3/4
    rollout = Rollout(None, [1], Completion([0, 1], [math.log(1 / 2)] * 2, "stop"), "", None, {})
    teacher = BareLogits([[0.0, math.log(3)]] * 2)
    (advantages,) = teacher_advantages(teacher, [rollout], 1.0, 2, ALL_IN_ONE)
    assert advantages == pytest.approx([math.log(1 / 2), math.log(3 / 2)], abs=1e-6)
    assert reverse_kl([advantages]) == pytest.approx(-math.log(3 / 4) / 2)
    student = BareLogits([[0.0, 0.0]] * 2)
    (batch,) = pack(grpo.to_items([rollout], [advantages], [0.5]), ALL_IN_ONE)
    policy_gradient(student, batch, 2)
    first, second = student.logits_NV.grad.tolist()  # a descent lowers token 0 at the first, raises 1 at the second
    assert first[0] > 0 > first[1] and second[1] < 0 < second[0]


def test_in_the_mean_over_the_students_tokens_the_policy_gradient_is_that_of_the_reverse_kl():
    student_logits, teacher_logits = [0.3, -1.0, 0.8], [1.0, 0.2, -0.5]
    p = torch.tensor(student_logits).softmax(0)
    rollouts = [Rollout(None, [0], Completion([v], [p[v].log().item()], "stop"), "", None, {}) for v in range(3)]
    advantages = teacher_advantages(BareLogits([teacher_logits]), rollouts, 1.0, 3, ALL_IN_ONE)
    student = BareLogits([student_logits])
    (batch,) = pack(
        grpo.to_items(rollouts, advantages, p.tolist()), ALL_IN_ONE
    )  # each token once, weighted as it is drawn
    policy_gradient(student, batch, 3)
    _, kl, expected = of_logits(student_logits, teacher_logits, DivergenceSettings(3, "reverse"))
    assert student.logits_NV.grad[0].tolist() == pytest.approx(expected, abs=1e-6)
    mean_advantage = sum(p_v * advantage[0] for p_v, advantage in zip(p.tolist(), advantages, strict=True))
    assert mean_advantage == pytest.approx(-kl, abs=1e-6)


@torch.no_grad()
def exact_reverse_kl(student, teacher, rollouts):
    """Mean KL(student || teacher), over whole distributions, at the contexts of samples of the student."""
    pairs = [[log_softmax_after(m, rollout) for m in (student, teacher)] for rollout in rollouts]
    return torch.cat([(mine.exp() * (mine - theirs)).sum(1) for mine, theirs in pairs]).mean().item()


def test_on_policy_distillation_moves_the_student_towards_the_teacher_on_held_out_prompts(teacher):
    student, rng = random_model(STUDENT, 0), random.Random(0)
    settings = LossSettings(TEMPERATURE, VOCAB_SIZE, 4096)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    held_out = [rng.choices(range(STOP), k=3) for _ in range(8)]
    before, seen = exact_reverse_kl(student, teacher, sample(student, held_out, n=8)), []
    for step in range(20):
        prompts = [rng.choices(range(STOP), k=3) for _ in range(16)]
        rollouts = sample(student, prompts, n=4, seed=step)
        advantages = teacher_advantages(teacher, rollouts, TEMPERATURE, VOCAB_SIZE, 4096)
        seen.append(reverse_kl(advantages))
        optimizer.zero_grad()
        grpo.add_gradient(Workers(student), None, rollouts, advantages, settings)
        optimizer.step()
    assert seen[0] == pytest.approx(before, rel=0.15)  # the estimate from the samples
    assert exact_reverse_kl(student, teacher, sample(student, held_out, n=8)) < 0.8 * before


# ---- vocabularies


WHY = "this compares tokens"


def test_equal_vocabularies_pass_whatever_surrounds_them():
    words = ["1", "2", "+"]
    check_same_vocabulary(Tokenizer.from_words(words), of_words(words, chat_template="{{ messages }}"), WHY)
    check_same_vocabulary(of_bytes(), of_bytes(), WHY)


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        (["a", "b", "c"], ["a", "d", "c"], "(4 and 4 tokens; first difference at id 1: 'b' and 'd')"),
        (["a", "b"], ["b", "a"], "(3 and 3 tokens; first difference at id 0: 'a' and 'b')"),
        (["a"], ["a", "b"], "(2 and 3 tokens; first difference at id 1: '<|endoftext|>' and 'b')"),
    ],
)
def test_different_vocabularies_are_refused_with_their_first_difference(student, teacher, sentence):
    with pytest.raises(ValueError, match=f"^{WHY}, and .*" + re.escape(sentence)):
        check_same_vocabulary(Tokenizer.from_words(student), Tokenizer.from_words(teacher), WHY)


def test_one_more_special_token_at_the_end_is_a_difference():
    with pytest.raises(ValueError, match=re.escape("(257 and 258 tokens; first difference at id 257: None and '<x>')")):
        check_same_vocabulary(of_bytes(), of_bytes(specials=["<x>"]), WHY)


def test_ids_without_a_token_are_compared_too(tmp_path):
    of_bytes().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][0]["id"] = 300  # was 256
    path.write_text(json.dumps(content))
    sparse = Tokenizer.from_pretrained(tmp_path)
    check_same_vocabulary(sparse, sparse, WHY)
    with pytest.raises(ValueError, match=re.escape("first difference at id 256: '<|endoftext|>' and None")):
        check_same_vocabulary(of_bytes(), sparse, WHY)


TURNS = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
OTHER_TURNS = TURNS.replace("<end>", "<|im_end|>")


def ending(eos="<|endoftext|>", template=TURNS):
    """A tokenizer of the one vocabulary; only its own stop and its template differ."""
    tokenizer = of_bytes(specials=["<end>", "<|im_end|>"], chat_template=template)
    tokenizer.eos_id = tokenizer.token_id(eos)
    return tokenizer


@pytest.mark.parametrize(
    ("student", "teacher", "agree"),
    [
        (ending(), ending(), {"chat", "r1-zero", "bare"}),
        (ending(), ending(eos="<end>"), {"chat"}),  # base and instruct of one family
        (ending(), ending(template=OTHER_TURNS), {"r1-zero", "bare"}),
        (ending(), ending(template=None), {"r1-zero", "bare"}),
        (ending(), ending(eos="<end>", template=None), {"chat"}),
        (ending(), ending(eos="<end>", template=OTHER_TURNS), set()),
    ],
)
def test_models_that_end_their_answers_differently_are_not_compared(student, teacher, agree):
    for template in ("chat", "r1-zero", "bare"):
        if template in agree:
            check_same_end(student, teacher, template, WHY)
            continue
        with pytest.raises(ValueError, match=f"^{WHY}, and under --template {template} the student's") as error:
            check_same_end(student, teacher, template, WHY)
        remedies = [other for other in ("chat", "r1-zero") if f"give --template {other}, under" in str(error.value)]
        assert set(remedies) <= agree and bool(remedies) == bool(agree)
        assert str(error.value).endswith("--method traces") and "\n" not in str(error.value)


def test_both_ends_are_named():
    with pytest.raises(ValueError, match=re.escape("end with '<end>' and the teacher's with '<|im_end|>'")):
        check_same_end(ending(), ending(template=OTHER_TURNS), "chat", WHY)


def test_a_vocabulary_of_150_000_is_compared_in_a_moment():
    tokenizer = Tokenizer.from_words(str(n) for n in range(150_000))
    start_s = time.process_time()
    check_same_vocabulary(tokenizer, tokenizer, WHY)
    assert time.process_time() - start_s < 3
