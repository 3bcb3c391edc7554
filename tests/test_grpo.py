import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanor1.grpo import (
    LossSettings,
    Rollout,
    add_gradient,
    completion_logprobs,
    group_advantages,
    importance_weights,
    kl_estimate,
    pack,
    policy_loss,
    step_metrics,
    token_weights,
)
from nanor1.model import ModelConfig, Transformer
from nanor1.parallel import Workers
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

    def __call__(self, ids_N, cu_seqlens_B1):
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


def add_up(model, rollouts, advantages, tokens_per_batch=ALL_IN_ONE, reference=None, **settings):
    """Add one update's gradient to the model's parameters; returns the metrics."""
    settings = LossSettings(TEMPERATURE, VOCAB_SIZE, tokens_per_batch, constant_length=20, **settings)
    return step_metrics([add_gradient(Workers(model), reference, rollouts, advantages, settings)])


def gradient(model, *args, **kwargs):
    model.zero_grad()
    add_up(model, *args, **kwargs)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


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


def test_a_pack_holds_prompts_and_completions_end_to_end_longest_first():
    items = [rollout([1], [2, STOP], [-0.1, -0.2]), rollout([3, 4], [5, 6, STOP], [-0.3, -0.4, -0.5])]
    (batch,) = pack(items, [1.0, -2.0], [0.25, 0.5], ALL_IN_ONE)
    assert batch.rollout_B.tolist() == [1, 0]
    assert batch.ids_N.tolist() == [3, 4, 5, 6, STOP, 1, 2, STOP]
    assert batch.cu_seqlens_B1.tolist() == [0, 5, 8]
    assert batch.loss_mask_N.tolist() == [False, False, True, True, True, False, True, True]
    assert batch.advantage_N.tolist() == [0, 0, -2, -2, -2, 0, 1, 1]
    assert batch.weight_N.tolist() == [0, 0, 0.5, 0.5, 0.5, 0, 0.25, 0.25]
    assert batch.sampler_logp_N.tolist() == pytest.approx([0, 0, -0.3, -0.4, -0.5, 0, -0.1, -0.2])
    assert {name: x.dtype for name, x in vars(batch.to("cpu")).items()} == dict(
        rollout_B=torch.int64, ids_N=torch.int64, cu_seqlens_B1=torch.int64, loss_mask_N=torch.bool,
        advantage_N=torch.float32, sampler_logp_N=torch.float32, weight_N=torch.float32,
    )  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12), st.integers(1, 40))
def test_every_rollout_is_packed_once_and_only_a_lone_rollout_exceeds_the_limit(sizes, tokens_per_batch):
    items = [rollout([0] * p, [1] * c) for p, c in sizes]
    batches = pack(items, [0.0] * len(items), [0.0] * len(items), tokens_per_batch)
    assert sorted(i for batch in batches for i in batch.rollout_B.tolist()) == list(range(len(items)))
    assert all(len(b.ids_N) <= tokens_per_batch or len(b.rollout_B) == 1 for b in batches)
    lengths = [n for batch in batches for n in batch.cu_seqlens_B1.diff().tolist()]
    assert lengths == sorted(map(sum, sizes), reverse=True)


# ---- what is trained, and with which weight


def test_the_stop_token_is_trained_and_the_prompt_is_not():
    model = BareLogits([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    (batch,) = pack([rollout([0, 1], [0, 1])], [2.0], [0.5], ALL_IN_ONE)  # the second 1 is the stop token
    logp_M, _ = completion_logprobs(model, batch, 1.0, 2)
    mask = batch.loss_mask_N
    policy_loss(logp_M, logp_M.detach(), batch.advantage_N[mask], batch.weight_N[mask])[0].backward()
    # of -A * w * log p: -1 * (chosen - p), at the position before the chosen token
    assert model.logits_NV.grad.tolist() == [[0.0, 0.0], [-0.5, 0.5], [0.5, -0.5], [0.0, 0.0]]


def test_completion_logprobs_equal_the_samplers_and_a_naive_log_softmax(sampled):
    rollouts, advantages = sampled
    model = random_model()
    logprobs = torch.tensor([logp for r in rollouts for logp in r.completion.logprobs])
    assert logprobs.std() > 0.5  # far from uniform: equality says something
    for tokens_per_batch in (ONE_EACH, 50, ALL_IN_ONE):
        for batch in pack(rollouts, advantages, [0.0] * len(rollouts), tokens_per_batch):
            logp_M, _ = completion_logprobs(model, batch, TEMPERATURE, VOCAB_SIZE)
            naive = torch.cat([naive_logprobs(model, rollouts[i]) for i in batch.rollout_B])
            torch.testing.assert_close(logp_M, naive, atol=1e-5, rtol=0)
            torch.testing.assert_close(logp_M, batch.sampler_logp_N[batch.loss_mask_N], atol=1e-5, rtol=0)


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


def test_completions_of_one_token_and_prompts_of_one_token_are_trained():
    items = [rollout([1], [STOP]), rollout([2], [STOP]), rollout([3], [7])]
    model = random_model()
    (batch,) = pack(items, [1.0, 1.0, 1.0], token_weights([1, 1, 1], "token"), ALL_IN_ONE)
    logp_M, _ = completion_logprobs(model, batch, TEMPERATURE, VOCAB_SIZE)
    naive = torch.cat([naive_logprobs(model, items[i]) for i in batch.rollout_B])
    torch.testing.assert_close(logp_M, naive, atol=1e-5, rtol=0)


def test_a_batch_of_cut_off_completions_trains_all_their_tokens_and_no_other():
    items = [rollout([1, 2], [3, 4, 5], finish="length"), rollout([6], [7, 8], finish="length")]
    model = random_model()
    assert add_up(model, items, [1.0, 1.0])["loss"] == pytest.approx(-1.0)  # the weights sum to 1
    (batch,) = pack(items, [1.0, 1.0], [0.2, 0.2], ALL_IN_ONE)
    assert batch.ids_N[batch.loss_mask_N].tolist() == [3, 4, 5, 7, 8]


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
        assert metrics["learned_tokens"] == sum(lengths) + sum(len(r.prompt_ids) for r in rollouts)
        assert 0 < metrics["entropy"] < math.log(VOCAB_SIZE) and "kl" not in metrics
    assert step_metrics([]) == {"learned_tokens": 0}


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
