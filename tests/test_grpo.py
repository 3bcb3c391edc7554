import math
import random
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanor1 import packing
from nanor1.gradient import Workers
from nanor1.grpo import (
    LossSettings,
    Rollout,
    add_gradient,
    completion_logprobs,
    describe,
    group_advantages,
    importance_weights,
    kl_estimate,
    mean,
    policy_loss,
    step_metrics,
    to_items,
    token_weights,
)
from nanor1.logprobs import chunked_loss
from nanor1.model import ModelConfig, Transformer
from nanor1.sampler import Completion, generate

STOP, VOCAB_SIZE, TEMPERATURE = 12, 13, 0.8
CONFIG = ModelConfig("llama", 16, 24, 40, 2, 4, 2, 6, 64)  # 16 rows of output weights, of which 13 are tokens
ONE_EACH = 1  # tokens_per_batch that puts every rollout into a batch of its own
ALL_IN_ONE = 10**6


def random_model(seed=0):
    """A transformer whose weights are far from any initialisation, so that each of them matters."""
    model, generator = Transformer(CONFIG), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator) * 0.3
        p.data.copy_(noise if p.dim() == 2 else 1 + noise)
    return model


class BareLogits:
    """A model whose parameters are the logits at each packed position: gradients can be read off token by token."""

    def __init__(self, logits_NV):
        self.logits_NV = torch.tensor(logits_NV, requires_grad=True)
        self.head_weight_VC = torch.eye(self.logits_NV.shape[1])

    def __call__(self, ids_N, cu_seqlens_B1, parent_B):
        return self.logits_NV


def rollout(prompt_ids, ids, logprobs=None, finish="stop"):
    return Rollout(None, prompt_ids, Completion(ids, logprobs or [-1.0] * len(ids), finish), "", 1.0, {})


def replace_logprobs(item, logprobs):
    return replace(item, completion=replace(item.completion, logprobs=logprobs))


@pytest.fixture(scope="module")
def sampled():
    """24 rollouts of unequal lengths that a random model sampled, some of them cut off, and their advantages."""
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    groups = generate(
        random_model(), prompts, n=8, max_new_tokens=9, temperature=TEMPERATURE, stop_ids=[10, 11, STOP], seed=0,
        vocab_size=VOCAB_SIZE,
    )  # fmt: skip
    rollouts = [Rollout(None, p, c, "", 0.0, {}) for p, group in zip(prompts, groups, strict=True) for c in group]
    assert {r.completion.finish for r in rollouts} == {"stop", "length"}
    assert len({len(r.completion.ids) for r in rollouts}) > 3
    return rollouts, [1.0, -1.0, 0.5, -0.5, 2.0, -1.5] * 4


def pack(rollouts, advantages, weights, tokens_per_batch):
    return packing.pack(to_items(rollouts, advantages, weights), tokens_per_batch)


def add_up(model, rollouts, advantages, tokens_per_batch=ALL_IN_ONE, reference=None, **settings):
    """Add one update's gradient to the model's parameters; returns the metrics."""
    settings = LossSettings(TEMPERATURE, VOCAB_SIZE, tokens_per_batch, constant_length=20, **settings)
    return step_metrics([add_gradient(Workers(model), reference, rollouts, advantages, settings)])


def gradient(model, *args, **kwargs):
    model.zero_grad()
    add_up(model, *args, **kwargs)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def full_copies(items, advantages, weights):
    """Each rollout as a sequence of its own with all its prompt, its last token too: packing without any sharing."""
    sequences = [item.prompt_ids + item.completion.ids for item in items]
    starts = [0, *accumulate(map(len, sequences))]
    ends = starts[1:]
    first = [end - len(item.completion.ids) for item, end in zip(items, ends, strict=True)]
    at_M = torch.cat([torch.arange(a, b) for a, b in zip(first, ends, strict=True)])
    ids_N = torch.tensor([token for sequence in sequences for token in sequence])
    item_M = torch.cat([torch.full((len(item.completion.ids),), i) for i, item in enumerate(items)])
    return packing.Batch(
        ids_N, torch.tensor(starts), torch.full((len(items),), -1), at_M - 1, ids_N[at_M], item_M,
        torch.tensor(advantages)[item_M], torch.tensor([x for item in items for x in item.completion.logprobs]),
        torch.tensor(weights)[item_M],
    )  # fmt: skip


def policy_gradient(model, batch, temperature, vocab_size):
    """Add the gradient of the policy loss of a batch that is used once."""
    chunked_loss(
        batch.predictor_states(model), model.head_weight_VC, batch.target_M,
        lambda logp, at: policy_loss(logp, logp.detach(), batch.advantage_M[at], batch.weight_M[at])[0],
        temperature, vocab_size,
    )[0].backward()  # fmt: skip


def naive_logprobs(model, item):
    """One sequence at a time, all its logits at once."""
    ids = torch.tensor(item.prompt_ids + item.completion.ids)
    logits = model.logits(model(ids, torch.tensor([0, len(ids)])))[:, :VOCAB_SIZE]
    n_prompt = len(item.prompt_ids)
    return torch.stack([(logits[t - 1] / TEMPERATURE).log_softmax(-1)[ids[t]] for t in range(n_prompt, len(ids))])


# ---- advantages


def test_an_advantage_is_the_reward_minus_its_own_groups_mean():
    assert group_advantages([[3.0, 1.0, 2.0, 6.0], [1.0, 0.0]]) == [[0.0, -2.0, -1.0, 3.0], [0.5, -0.5]]


def test_std_divides_by_the_deviation_of_the_sample():
    # DeepSeekMath writes std(r) and no divisor. Here it is G - 1, torch.std's default: sqrt(1/3) and not 1/2.
    (advantages,) = group_advantages([[1.0, 0.0, 0.0, 1.0]], "std")
    assert advantages == pytest.approx([3**0.5 / 2, -(3**0.5) / 2, -(3**0.5) / 2, 3**0.5 / 2], abs=1e-5)


def test_std_hardly_depends_on_the_scale_of_rewards_and_mean_does():
    rewards = [[0.0, 1.0, 3.0]]
    scaled = [[10 * r for r in rewards[0]]]
    assert group_advantages(scaled, "std")[0] == pytest.approx(group_advantages(rewards, "std")[0], rel=1e-5)
    assert group_advantages(scaled)[0] == pytest.approx([10 * a for a in group_advantages(rewards)[0]])


@pytest.mark.parametrize("normalize", ["mean", "std"])
def test_a_reward_of_none_is_left_out_of_mean_and_deviation(normalize):
    with_none = group_advantages([[None, 2.0, None, 0.0, 1.0]], normalize)[0]
    known = group_advantages([[2.0, 0.0, 1.0]], normalize)[0]
    assert with_none == [None, known[0], None, known[1], known[2]]


@pytest.mark.parametrize("normalize", ["mean", "std"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3])
def test_a_group_of_identical_rewards_gets_exactly_zero(normalize, reward):
    assert group_advantages([[reward] * 7, [None, reward]], normalize) == [[0.0] * 7, [None, 0.0]]


def test_a_group_without_any_known_reward_has_no_advantage():
    assert group_advantages([[None, None]]) == [[None, None]]


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=16), st.sampled_from(["mean", "std"]))
def test_the_advantages_of_a_group_sum_to_zero(rewards, normalize):
    (advantages,) = group_advantages([rewards], normalize)
    assert sum(advantages) == pytest.approx(0.0, abs=1e-6)


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="choose mean or std"):
        group_advantages([[0.0, 1.0]], "rank")


# ---- weights


def test_token_weights_by_hand():
    lengths = [2, 8]
    assert token_weights(lengths, "token") == [1 / 10, 1 / 10]
    assert token_weights(lengths, "sequence") == [1 / 4, 1 / 16]
    assert token_weights(lengths, "constant", 5) == [1 / 10, 1 / 10]
    assert token_weights(lengths, "constant", 50) == [1 / 100, 1 / 100]
    with pytest.raises(ValueError, match="choose token, sequence or constant"):
        token_weights(lengths, "mean")


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20), st.sampled_from(["token", "sequence"]))
def test_the_weights_of_all_tokens_of_a_step_sum_to_one(lengths, aggregate):
    weights = token_weights(lengths, aggregate)
    assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(1.0)


# ---- the clipped loss, by hand


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "is_clipped"),  # slope: d loss / d logp = -ratio * A where not clipped
    [
        (1.1, 2.0, -2.2, -2.2, False),
        (1.1, -2.0, 2.2, 2.2, False),
        (0.9, 1.0, -0.9, -0.9, False),
        (0.9, -1.0, 0.9, 0.9, False),
        (1.25, 1.0, -1.25, -1.25, False),  # beyond 1.2: the upper clip is the wider one
        (1.5, 1.0, -1.28, 0.0, True),  # good, and likely enough by now
        (1.5, -1.0, 1.5, 1.5, False),  # bad, and likelier than it was: pulled back
        (0.5, 1.0, -0.5, -0.5, False),  # good, and rarer than it was: pulled back
        (0.5, -1.0, 0.8, 0.0, True),  # bad, and rare enough by now
        (1.5, 0.0, 0.0, 0.0, False),
    ],
)
def test_the_clipped_loss_and_its_gradient_for_one_token(ratio, advantage, loss, slope, is_clipped):
    logp = torch.tensor([-1.0 + math.log(ratio)], requires_grad=True)
    value, clipped = policy_loss(
        logp, torch.tensor([-1.0]), torch.tensor([advantage]), torch.tensor([0.25]), clip_low=0.2, clip_high=0.28
    )
    value.backward()
    assert value.item() == pytest.approx(loss / 4, abs=1e-6)
    assert logp.grad.item() == pytest.approx(slope / 4, abs=1e-6)
    assert clipped.tolist() == [is_clipped]


def test_the_loss_is_the_weighted_sum_over_tokens():
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    loss, _ = policy_loss(logp, logp.detach(), torch.tensor([1.0, -2.0, 4.0]), torch.tensor([0.5, 0.25, 0.125]))
    loss.backward()
    assert loss.item() == pytest.approx(-0.5)  # -(0.5 - 0.5 + 0.5)
    assert logp.grad.tolist() == pytest.approx([-0.5, 0.5, -0.5])


def test_on_policy_the_loss_is_minus_the_mean_advantage_and_its_gradient_is_the_policy_gradient():
    logits = torch.tensor([[0.3, -0.2, 0.9], [1.0, 0.5, -1.0]], requires_grad=True)
    logp = logits.log_softmax(-1)[[0, 1], [2, 0]]
    advantage, weight = torch.tensor([1.5, -0.5]), torch.tensor([0.5, 0.5])
    loss, clipped = policy_loss(logp, logp.detach(), advantage, weight)
    (mine,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(-(advantage * logits.log_softmax(-1)[[0, 1], [2, 0]]).mean(), logits)
    assert loss.item() == pytest.approx(-0.5)
    assert not clipped.any()
    torch.testing.assert_close(mine, expected)


def test_importance_weights_scale_a_tokens_loss_and_carry_no_gradient():
    logp, sampler_logp = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True), torch.tensor([-1.0, -2.0, -0.5])
    importance = importance_weights(logp, sampler_logp, cap=2.0)
    assert importance.tolist() == pytest.approx([1.0, 2.0, math.exp(-0.5)])  # e = 2.718 is cut to the cap
    assert not importance.requires_grad
    with_gradient = importance * logp / logp.detach()  # were it followed, the gradient would be another one
    loss, _ = policy_loss(logp, logp.detach(), torch.ones(3), torch.ones(3), importance_M=with_gradient)
    loss.backward()
    assert logp.grad.tolist() == pytest.approx([-1.0, -2.0, -math.exp(-0.5)])


# ---- KL


@pytest.mark.parametrize(
    ("kind", "value", "slope"),  # p = 1/2, ref = 1/4, so k1 = ln 2
    [("k2", math.log(2) ** 2 / 2, math.log(2)), ("k3", 0.5 - 1 + math.log(2), 0.5)],
)
def test_the_kl_term_and_its_gradient_by_hand(kind, value, slope):
    logp, ref_logp = torch.tensor([math.log(0.5)], requires_grad=True), torch.tensor([math.log(0.25)])
    loss, _ = policy_loss(
        logp, logp.detach(), torch.zeros(1), torch.tensor([0.5]), ref_logp_M=ref_logp, kl_coef=0.1, kl=kind
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.05 * value)
    assert logp.grad.item() == pytest.approx(0.05 * slope)


def test_an_unknown_kl_estimate_is_refused():
    with pytest.raises(ValueError, match="choose k1, k2 or k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


class Categorical:
    """A policy over four tokens and its reference: expectations are sums over the tokens, no sampling."""

    def __init__(self):
        self.theta = torch.tensor([0.5, -1.0, 0.2, 1.5], dtype=torch.float64, requires_grad=True)
        self.logp = self.theta.log_softmax(0)
        self.ref = torch.tensor([1.0, 0.3, -0.8, 0.1], dtype=torch.float64).log_softmax(0)
        self.p = self.logp.detach().exp()

    def expected_gradient(self, kind):
        """Of the estimate as a loss, over tokens drawn from the policy."""
        expectation = (self.p * kl_estimate(self.logp, self.ref, kind)).sum()
        return torch.autograd.grad(expectation, self.theta, retain_graph=True)[0]

    def exact_gradient(self, log_a, log_b):
        return torch.autograd.grad((log_a.exp() * (log_a - log_b)).sum(), self.theta, retain_graph=True)[0]


def test_k1_and_k3_are_unbiased_estimates_and_k2_is_not():
    c = Categorical()
    kl = torch.nn.functional.kl_div(c.ref, c.logp, reduction="sum", log_target=True).item()  # KL(policy || ref)
    expectation = {kind: (c.p * kl_estimate(c.logp, c.ref, kind)).sum().item() for kind in ("k1", "k2", "k3")}
    assert kl > 0.4
    assert expectation["k1"] == pytest.approx(kl) and expectation["k3"] == pytest.approx(kl)
    assert abs(expectation["k2"] - kl) > 0.02
    assert (kl_estimate(c.logp, c.ref, "k1") < 0).any() and (kl_estimate(c.logp, c.ref, "k3") >= 0).all()


def test_as_a_loss_k2_has_the_gradient_of_the_kl_and_k1_none():
    c = Categorical()
    exact = c.exact_gradient(c.logp, c.ref)
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(c.expected_gradient("k2"), exact)
    torch.testing.assert_close(c.expected_gradient("k1"), torch.zeros_like(exact))


def test_as_a_loss_k3_has_the_gradient_of_the_kl_the_other_way_round():
    c = Categorical()
    torch.testing.assert_close(c.expected_gradient("k3"), c.exact_gradient(c.ref, c.logp))
    assert (c.expected_gradient("k3") - c.exact_gradient(c.logp, c.ref)).abs().max() > 0.05


# ---- packing


def test_a_group_shares_its_prompt_and_a_lone_rollout_lies_behind_its_own():
    group = [rollout([1, 2], [3, STOP], [-0.1, -0.2]), rollout([1, 2], [4, 5, STOP], [-0.3, -0.4, -0.5])]
    (batch,) = pack([*group, rollout([6], [7, STOP], [-0.6, -0.7])], [1.0, -2.0, 3.0], [0.25, 0.5, 0.125], ALL_IN_ONE)
    assert batch.ids_N.tolist() == [1, 2, 4, 5, 3, 6, 7]  # a last token predicts nothing
    assert batch.cu_seqlens_B1.tolist() == [0, 2, 4, 5, 7]
    assert batch.parent_B.tolist() == [-1, 0, 0, -1]
    assert batch.item_M.tolist() == [1, 1, 1, 0, 0, 2, 2]
    assert batch.target_M.tolist() == [4, 5, STOP, 3, STOP, 7, STOP]
    assert batch.predictor_M.tolist() == [1, 2, 3, 1, 4, 5, 6]  # the prompt's last token predicts both first ones
    assert batch.advantage_M.tolist() == [-2, -2, -2, 1, 1, 3, 3]
    assert batch.weight_M.tolist() == [0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert batch.sampler_logp_M.tolist() == pytest.approx([-0.3, -0.4, -0.5, -0.1, -0.2, -0.6, -0.7])
    integers = ("ids_N", "cu_seqlens_B1", "parent_B", "predictor_M", "target_M", "item_M")
    for name, x in vars(batch.to("cpu")).items():
        assert x.dtype == (torch.int64 if name in integers else torch.float32), name


def test_only_neighbours_with_the_same_prompt_share_it():
    a, b = rollout([1, 2], [3, STOP]), rollout([4, 5], [6, STOP])
    assert [len(pack(items, [0.0] * 3, [0.0] * 3, ALL_IN_ONE)[0].ids_N) for items in ([a, a, b], [b, a, a])] == [7, 7]
    (apart,) = pack([a, b, rollout([9], [7] * 9), a], [0.0] * 4, [0.0] * 4, ALL_IN_ONE)
    assert apart.ids_N.tolist().count(2) <= 2


def test_a_group_that_does_not_fit_is_split_and_its_prompt_repeated():
    items = [rollout([1] * 5, [2] * n) for n in (4, 4, 3, 3)]
    batches = pack(items, [0.0] * 4, [0.0] * 4, 12)
    assert [batch.ids_N.tolist() for batch in batches] == [[1] * 5 + [2] * 6, [1] * 5 + [2] * 4]
    assert [batch.cu_seqlens_B1.tolist() for batch in batches] == [[0, 5, 8, 11], [0, 5, 7, 9]]


def groups_of(sizes):
    """Rollouts of groups; a group is (prompt length, completion lengths). Prompts of groups differ."""
    return [rollout([g] * p, [99] * c) for g, (p, lengths) in enumerate(sizes) for c in lengths]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5)), max_size=6),
    st.integers(1, 60),
)
def test_every_token_is_trained_once_and_only_a_lone_rollout_exceeds_the_limit(sizes, tokens_per_batch):
    items = groups_of(sizes)
    batches = pack(items, [0.0] * len(items), [0.0] * len(items), tokens_per_batch)
    trained = [i for batch in batches for i in batch.item_M.tolist()]
    assert sorted(trained) == [i for i, item in enumerate(items) for _ in item.completion.ids]
    for batch in batches:
        assert len(batch.ids_N) <= tokens_per_batch or len(batch.item_M.unique()) == 1
        assert (batch.cu_seqlens_B1.diff() > 0).all() and batch.cu_seqlens_B1[-1] == len(batch.ids_N)
        prompts = {tuple(items[i].prompt_ids) for i in batch.item_M.tolist()}
        assert sum(batch.ids_N.tolist().count(p[0]) for p in prompts) == sum(map(len, prompts))  # each once
    longest = [max(len(items[i].prompt_ids + items[i].completion.ids) for i in b.item_M.tolist()) for b in batches]
    assert longest[:1] == [max(p + max(c) for p, c in sizes)] if sizes else not batches


@given(
    st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=4)), min_size=1, max_size=5),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_packing_is_that_of_a_loop_token_by_token(sizes, tokens_per_batch, rng):
    numbers, items, advantages = iter(range(10**6)), [], []
    for p, lengths in sizes:
        prompt = [next(numbers) for _ in range(p)]
        for c in lengths:
            items.append(rollout(prompt, [next(numbers) for _ in range(c)], [-rng.random() for _ in range(c)]))
            advantages.append(rng.choice([rng.random(), [rng.random() for _ in range(c)]]))
    weights = [rng.random() for _ in items]
    for batch in pack(items, advantages, weights, tokens_per_batch):
        ids, at = batch.ids_N.tolist(), 0
        chosen = list(dict.fromkeys(batch.item_M.tolist()))
        for i in chosen:
            item, before = items[i], None
            for t, token in enumerate(item.completion.ids):
                before = item.prompt_ids[-1] if t == 0 else before  # every id is another one: it says where it lies
                advantage = advantages[i] if isinstance(advantages[i], float) else advantages[i][t]
                numbers_here = torch.tensor([advantage, item.completion.logprobs[t], weights[i]])
                assert batch.item_M[at] == i and batch.target_M[at] == token
                assert batch.predictor_M[at] == ids.index(before)
                assert [batch.advantage_M[at], batch.sampler_logp_M[at], batch.weight_M[at]] == numbers_here.tolist()
                before, at = token, at + 1
        assert at == len(batch.target_M)
        kept = {token for i in chosen for token in items[i].prompt_ids + items[i].completion.ids[:-1]}
        assert sorted(ids) == sorted(kept)
        bounds = batch.cu_seqlens_B1.tolist()
        for start, end, parent in zip(bounds, bounds[1:], batch.parent_B.tolist(), strict=False):
            before = [] if parent < 0 else ids[bounds[parent] : bounds[parent + 1]]
            assert any((i.prompt_ids + i.completion.ids)[: len(before) + end - start] == before + ids[start:end]
                       for i in (items[j] for j in chosen))  # fmt: skip


def test_what_has_no_token_to_train_never_enters():
    assert pack([], [], [], 10) == []
    items = [rollout([1, 2], []), rollout([1, 2], []), rollout([3], [STOP]), rollout([4, 5], [])]
    (batch,) = pack(items, [0.0] * 4, [0.0] * 4, ALL_IN_ONE)
    assert batch.ids_N.tolist() == [3] and batch.target_M.tolist() == [STOP]
    assert batch.item_M.tolist() == [2]


ODD_GROUPS = {
    "prompts of one token": [(1, [3, 5, 1]), (1, [2, 2])],
    "completions of one token": [(4, [1, 1, 1]), (2, [1]), (3, [1, 6])],
    "one token each": [(1, [1]), (1, [1, 1])],
    "a long prompt": [(40, [2, 3, 1]), (2, [9])],
}


@pytest.mark.parametrize("sizes", ODD_GROUPS.values(), ids=ODD_GROUPS)
def test_sharing_prompts_changes_neither_values_nor_gradients(sizes):
    rng = random.Random(0)
    items = [
        rollout([g, *rng.choices(range(10), k=p - 1)], rng.choices(range(10), k=c))
        for g, (p, lengths) in enumerate(sizes)
        for c in lengths
    ]
    items = [replace(item, prompt_ids=items[[i.prompt_ids[0] for i in items].index(item.prompt_ids[0])].prompt_ids)
             for item in items]  # fmt: skip
    model, numbers = random_model(), [0.1 * (i + 1) for i in range(len(items))]
    (shared,), gradients = pack(items, numbers, numbers, ALL_IN_ONE), []
    copies = full_copies(items, numbers, numbers)
    assert len(shared.ids_N) < len(copies.ids_N)
    for batch in (shared, copies):
        model.zero_grad()
        logp_M, _ = completion_logprobs(model, batch, TEMPERATURE, VOCAB_SIZE)
        policy_gradient(model, batch, TEMPERATURE, VOCAB_SIZE)
        values = [logp_M[batch.item_M == i] for i in range(len(items))]
        gradients.append((torch.cat(values), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (values, gradient), (wanted_values, wanted_gradient) = gradients
    torch.testing.assert_close(values, wanted_values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, atol=1e-5, rtol=1e-5)
    assert gradient.abs().max() > 0.01


# ---- what is trained, and with which weight


def test_the_stop_token_is_trained_and_the_prompt_is_not():
    model = BareLogits([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    (batch,) = pack([rollout([0, 1], [0, 1])], [2.0], [0.5], ALL_IN_ONE)  # the second 1 is the stop token
    policy_gradient(model, batch, 1.0, 2)
    # of -A * w * log p: -1 * (chosen - p), at the position before the chosen token
    assert model.logits_NV.grad.tolist() == [[0.0, 0.0], [-0.5, 0.5], [0.5, -0.5]]


def test_the_first_tokens_of_a_group_are_all_trained_at_the_prompts_last():
    model = BareLogits([[0.0, 0.0], [0.0, 0.0]])
    (batch,) = pack([rollout([0, 1], [0]), rollout([0, 1], [1])], [2.0, -4.0], [0.5, 0.5], ALL_IN_ONE)
    policy_gradient(model, batch, 1.0, 2)
    # -1 * (chosen - p) for token 0 and +2 * (chosen - p) for token 1
    assert model.logits_NV.grad.tolist() == [[0.0, 0.0], [-1.5, 1.5]]


def test_completion_logprobs_equal_the_samplers_and_a_naive_log_softmax(sampled):
    rollouts, advantages = sampled
    model = random_model()
    logprobs = torch.tensor([logp for r in rollouts for logp in r.completion.logprobs])
    assert logprobs.std() > 0.5  # far from uniform: equality says something
    for tokens_per_batch in (ONE_EACH, 50, ALL_IN_ONE):
        for batch in pack(rollouts, advantages, [0.0] * len(rollouts), tokens_per_batch):
            logp_M, _ = completion_logprobs(model, batch, TEMPERATURE, VOCAB_SIZE)
            naive = torch.cat([naive_logprobs(model, rollouts[i]) for i in batch.item_M.unique_consecutive()])
            torch.testing.assert_close(logp_M, naive, atol=1e-5, rtol=0)
            torch.testing.assert_close(logp_M, batch.sampler_logp_M, atol=1e-5, rtol=0)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_the_gradient_does_not_depend_on_how_rollouts_are_split_packed_or_ordered(sampled, aggregate):
    rollouts, advantages = sampled
    model = random_model()
    whole = gradient(model, rollouts, advantages, aggregate=aggregate)
    assert whole.abs().max() > 0.01
    shuffled = random.Random(1).sample(list(zip(rollouts, advantages, strict=True)), len(rollouts))
    for tokens_per_batch in (ONE_EACH, 17, 50):
        for items in (list(zip(rollouts, advantages, strict=True)), shuffled):
            other = gradient(model, *map(list, zip(*items, strict=True)), tokens_per_batch, aggregate=aggregate)
            torch.testing.assert_close(other, whole, atol=1e-6, rtol=1e-5)


def test_the_gradient_is_that_of_the_mean_over_all_tokens_computed_one_sequence_at_a_time(sampled):
    rollouts, advantages = sampled
    model = random_model()
    mine = gradient(model, rollouts, advantages)
    model.zero_grad()
    n_tokens = sum(len(r.completion.ids) for r in rollouts)
    for item, advantage in zip(rollouts, advantages, strict=True):
        (-advantage * naive_logprobs(model, item).sum() / n_tokens).backward()
    naive = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(mine, naive, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tokens_per_batch", [17, ALL_IN_ONE])
def test_a_list_of_equal_advantages_a_token_is_the_same_as_the_number(sampled, tokens_per_batch):
    rollouts, advantages = sampled
    lists = [[advantage] * len(r.completion.ids) for r, advantage in zip(rollouts, advantages, strict=True)]
    model = random_model()
    whole = gradient(model, rollouts, advantages, tokens_per_batch)
    assert torch.equal(gradient(model, rollouts, lists, tokens_per_batch), whole) and whole.any()
    assert torch.equal(gradient(model, rollouts, lists[:5] + advantages[5:], tokens_per_batch), whole)


def test_each_token_is_trained_with_its_own_advantage():
    # the longer one comes first in the batch, whatever the order given
    items = [rollout([0, 1], [0, 1]), rollout([0, 1], [1, 0, 1])]
    (batch,) = pack(items, [[1.0, -2.0], [3.0, 4.0, -5.0]], [0.5, 0.25], ALL_IN_ONE)
    assert batch.target_M.tolist() == [1, 0, 1, 0, 1]
    assert batch.advantage_M.tolist() == [3.0, 4.0, -5.0, 1.0, -2.0]
    model = BareLogits([[0.0, 0.0]] * 5)  # the prompt's two, two of the longer, one of the shorter
    policy_gradient(model, batch, 1.0, 2)
    # -A * w * (chosen - 1/2) of token 1, at the predictor of each; the prompt's last predicts both first tokens
    at_1 = [0.0, -3 * 0.25 / 2 + 1 * 0.5 / 2, 4 * 0.25 / 2, 5 * 0.25 / 2, 2 * 0.5 / 2]
    assert model.logits_NV.grad.tolist() == [[-g, g] for g in at_1]


def test_as_many_advantages_as_tokens_are_asked_for():
    with pytest.raises(AssertionError, match="2 of advantage for 3 tokens"):
        pack([rollout([0, 1], [1, 0, 1])], [[1.0, 2.0]], [1.0], ALL_IN_ONE)


def test_completions_of_one_token_and_prompts_of_one_token_are_trained():
    items = [rollout([1], [STOP]), rollout([2], [STOP]), rollout([3], [7])]
    model = random_model()
    (batch,) = pack(items, [1.0, 1.0, 1.0], token_weights([1, 1, 1], "token"), ALL_IN_ONE)
    logp_M, _ = completion_logprobs(model, batch, TEMPERATURE, VOCAB_SIZE)
    naive = torch.cat([naive_logprobs(model, items[i]) for i in batch.item_M])
    torch.testing.assert_close(logp_M, naive, atol=1e-5, rtol=0)


def test_a_batch_of_cut_off_completions_trains_all_their_tokens_and_no_other():
    items = [rollout([1, 2], [3, 4, 5], finish="length"), rollout([6], [7, 8], finish="length")]
    model = random_model()
    assert add_up(model, items, [1.0, 1.0])["loss"] == pytest.approx(-1.0)  # the weights sum to 1
    (batch,) = pack(items, [1.0, 1.0], [0.2, 0.2], ALL_IN_ONE)
    assert batch.target_M.tolist() == [3, 4, 5, 7, 8]


# ---- the settings of an update, and what is reported of it


def test_a_batch_used_once_has_ratio_one_whatever_the_sampler_said(sampled):
    rollouts, advantages = sampled
    off = [replace_logprobs(r, [logp - 1.0 for logp in r.completion.logprobs]) for r in rollouts]
    model = random_model()
    whole = gradient(model, rollouts, advantages)
    torch.testing.assert_close(gradient(model, off, advantages), whole)
    assert add_up(model, off, advantages)["clipped"] == 0.0


def test_a_batch_used_again_is_clipped_against_the_sampler(sampled):
    rollouts, _ = sampled
    off = [replace_logprobs(r, [logp - 1.0 for logp in r.completion.logprobs]) for r in rollouts]  # every ratio is e
    model, ones = random_model(), [1.0] * len(rollouts)
    metrics = add_up(model, off, ones, is_batch_reused=True)
    assert metrics["clipped"] == 1.0 and metrics["loss"] == pytest.approx(-1.28)
    assert not gradient(model, off, ones, is_batch_reused=True).any()
    reused = gradient(model, off, [-1.0] * len(rollouts), is_batch_reused=True)  # bad and likelier: never clipped
    once = gradient(model, off, [-1.0] * len(rollouts))
    torch.testing.assert_close(reused, math.e * once, atol=1e-5, rtol=1e-4)


def test_the_importance_cap_scales_the_gradient_by_the_samplers_error(sampled):
    rollouts, advantages = sampled
    off = [replace_logprobs(r, [logp - 1.0 for logp in r.completion.logprobs]) for r in rollouts]
    model = random_model()
    once = gradient(model, rollouts, advantages)
    torch.testing.assert_close(
        gradient(model, off, advantages, importance_cap=9.0), math.e * once, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(gradient(model, off, advantages, importance_cap=2.0), 2 * once, atol=1e-5, rtol=1e-4)


def test_a_scaled_loss_scales_the_gradient_and_no_metric(sampled):
    settings = dict(reference=random_model(1), kl_coef=0.1, tokens_per_batch=50)
    results = []
    for scale in (1.0, 2.0**16):
        model = random_model()
        metrics = add_up(model, *sampled, loss_scale=scale, **settings)
        results.append((metrics, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (metrics, plain), (scaled_metrics, scaled) = results
    assert scaled_metrics == metrics and torch.equal(scaled, plain * 2**16) and plain.any()


def test_a_gradient_too_small_for_fp16_is_that_of_fp32_by_its_scale(sampled):
    rollouts, advantages = sampled
    small = [1e-6 * advantage for advantage in advantages]
    model, exact = random_model().half(), random_model()
    exact.load_state_dict(model.state_dict())
    lost, wanted = gradient(model, rollouts, small), gradient(exact, rollouts, small)
    found = gradient(model, rollouts, small, loss_scale=2.0**16).float() / 2**16
    assert (lost - wanted).norm() > 0.1 * wanted.norm() > 10 * (found - wanted).norm()


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_the_kl_term_pulls_towards_the_reference_and_is_nothing_at_the_reference(sampled, kl):
    rollouts = sampled[0]
    zeros, reference = [0.0] * len(rollouts), random_model().requires_grad_(False)
    assert gradient(random_model(), rollouts, zeros, reference=reference, kl_coef=0.1, kl=kl).abs().max() < 1e-6
    model = random_model(seed=1)
    before = add_up(model, rollouts, zeros, reference=reference, kl_coef=0.1, kl=kl)["kl"]
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
    assert 0 < add_up(model, rollouts, zeros, reference=reference)["kl"] < 0.9 * before


def test_the_metrics_are_means_over_all_tokens_of_the_step(sampled):
    rollouts, advantages = sampled
    gaps = [0.01, 0.02, 0.0, 0.0, 0.05, 0.0] * 4
    off = [
        replace_logprobs(r, [logp + gap for logp in r.completion.logprobs])
        for r, gap in zip(rollouts, gaps, strict=True)
    ]
    lengths = [len(r.completion.ids) for r in rollouts]
    for tokens_per_batch in (ONE_EACH, ALL_IN_ONE):
        metrics = add_up(random_model(), off, advantages, tokens_per_batch)
        mean_gap = sum(n * gap for n, gap in zip(lengths, gaps, strict=True)) / sum(lengths)
        assert metrics["logp_gap_mean"] == pytest.approx(mean_gap, abs=1e-6)
        assert metrics["logp_gap_max"] == pytest.approx(0.05, abs=1e-5)
        mean_advantage = sum(n * a for n, a in zip(lengths, advantages, strict=True)) / sum(lengths)
        assert metrics["loss"] == pytest.approx(-mean_advantage)
        prompts = [r.prompt_ids for r in (rollouts if tokens_per_batch == ONE_EACH else rollouts[::8])]
        assert metrics["learned_tokens"] == sum(lengths) - len(lengths) + sum(map(len, prompts))
        assert 0 < metrics["entropy"] < math.log(VOCAB_SIZE) and "kl" not in metrics
    assert step_metrics([]) == {"learned_tokens": 0, "learn_flops": 0.0}


def test_the_work_of_a_step_is_counted_for_the_tokens_that_were_processed():
    group = [rollout([1, 2], [3, 4, STOP]), rollout([1, 2], [5, STOP])]
    # of CONFIG: q and o 24 x 24, k and v 24 x 12, gate, up and down 24 x 40, in 2 layers; the head 16 x 24
    blocks, head, per_pair = 2 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40), 16 * 24, 12 * 2 * 24
    shared = 6 * (5 * blocks + 5 * head) + per_pair * (1 + 2 + (3 + 4) + 3)
    assert add_up(random_model(), group, [1.0, -1.0])["learn_flops"] == shared
    apart = 6 * (7 * blocks + 5 * head) + per_pair * ((1 + 2 + 3 + 4) + (1 + 2 + 3))
    assert add_up(random_model(), group, [1.0, -1.0], ONE_EACH)["learn_flops"] == apart


def test_a_steps_rollouts_are_described_by_their_means_and_counts():
    def judged(n_tokens, reward, finish, **parts):
        return replace(rollout([1], [2] * n_tokens, finish=finish), reward=reward, parts=parts)

    rollouts_PG = [
        [judged(4, 1.0, "stop", accuracy=1.0), judged(2, 0.0, "length", accuracy=0.0)],
        [judged(3, None, "stop", accuracy=None), judged(7, 0.5, "stop", accuracy=0.5)],
    ]
    assert describe(rollouts_PG, [[0.5, -0.5], [None, 0.0]]) == dict(
        reward=0.5, accuracy=0.5, response_tokens=4.0, response_tokens_max=7, truncated=0.25, rollouts=4, unjudged=1,
        groups=2, dropped_groups=1,
    )  # fmt: skip
    assert mean([None, None]) is None


# ---- learning


def test_a_step_raises_what_was_rewarded_and_lowers_what_was_not():
    model = random_model()
    good, bad = rollout([3, 1, 4], [5, 9, STOP]), rollout([3, 1, 4], [2, 6, STOP])
    before = [naive_logprobs(model, item).sum().item() for item in (good, bad)]
    (advantages,) = group_advantages([[1.0, 0.0]])
    add_up(model, [good, bad], advantages)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
    after = [naive_logprobs(model, item).sum().item() for item in (good, bad)]
    assert after[0] > before[0] + 1e-3 and after[1] < before[1] - 1e-3


def test_a_group_of_identical_rewards_gives_exactly_no_gradient(sampled):
    (advantages,) = group_advantages([[0.3] * len(sampled[0])])
    assert not gradient(random_model(), sampled[0], advantages).any()


def trained_toy_policy(kl_coef, kl="k2"):
    """P(token 1) after training two logits from a uniform start: token 1 is worth 1, token 0 nothing."""
    logits, generator = torch.zeros(2, requires_grad=True), torch.Generator().manual_seed(0)
    reference, late = torch.tensor([0.5, 0.5]).log(), []
    for step in range(400):
        tokens = (torch.rand(256, generator=generator) < logits.detach().softmax(0)[1]).long()
        (advantages,) = group_advantages([tokens.double().tolist()])
        logp = logits.log_softmax(0)[tokens]
        loss, _ = policy_loss(
            logp, logp.detach(), torch.tensor(advantages), torch.full((256,), 1 / 256),
            ref_logp_M=reference[tokens], kl_coef=kl_coef, kl=kl,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= grad
        if step >= 200:
            late.append(logits.softmax(0)[1].item())
    return sum(late) / len(late)


def test_a_two_token_policy_learns_the_token_that_is_rewarded():
    assert trained_toy_policy(kl_coef=0.0) > 0.98


def test_with_k2_a_two_token_policy_converges_to_the_optimum_of_reward_minus_kl():
    # p1 / p0 = exp(1 / beta) maximises p1 - beta KL(p || uniform)
    assert trained_toy_policy(kl_coef=0.5) == pytest.approx(1 / (1 + math.exp(-2)), abs=0.01)


def test_with_k3_it_converges_elsewhere():
    # p (1 - p) = beta (p - 1/2), the gradients of the reward and of KL(uniform || p), at p = (1 + sqrt 5) / 4
    assert trained_toy_policy(kl_coef=0.5, kl="k3") == pytest.approx((1 + 5**0.5) / 4, abs=0.01)
