import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanor1 import optim
from nanor1.optim import MasterAdamW, NonFiniteGuard, is_finite, learning_rate

LR = 1e-3


class Tied(nn.Module):
    """An embedding that is the output matrix too, and a norm's vector."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(5, 3, dtype=dtype)
        self.embedding.weight.data.copy_(torch.randn(5, 3, generator=generator))
        self.scale = nn.Parameter(torch.tensor([0.5, 1.0, 2.0], dtype=dtype))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def loss(self, step):
        """Another one each step, so that moments matter."""
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 5, (6,), generator=generator)
        logits = self.head(self.embedding(ids) * self.scale)
        return nn.functional.cross_entropy(logits.float(), ids.roll(1))


def train(model, optimizer, steps, lr=LR, max_grad_norm=1.0):
    for step in steps:
        (model.loss(step) * optimizer.loss_scale).backward()
        optimizer.step(lr, max_grad_norm)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- the update


def test_on_fp32_weights_it_is_torchs_adamw_after_clipping():
    model = Tied()
    other = copy.deepcopy(model)
    optimizer = MasterAdamW(model, betas=(0.8, 0.9), weight_decay=0.1)
    groups = [dict(params=[other.embedding.weight]), dict(params=[other.scale], weight_decay=0.0)]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(5):
        lr = LR * (step + 1)
        train(model, optimizer, [step], lr, max_grad_norm=0.1)
        other.loss(step).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        reference.zero_grad()
    for name, p in weights(other).items():
        torch.testing.assert_close(weights(model)[name], p, atol=1e-7, rtol=1e-6)


def test_on_bf16_weights_updates_too_small_to_show_add_up_until_they_do():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((1, 2), 0.02, dtype=torch.bfloat16))

    model, plain = Single(), Single()
    start, optimizer = model.w.detach().clone(), MasterAdamW(model)
    plain_adamw = torch.optim.AdamW(plain.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(100):
        for m in (model, plain):
            m.w.grad = torch.ones_like(m.w)
        optimizer.step(1e-6, 10.0)
        plain_adamw.step()
        if step == 9:
            assert torch.equal(model.w, start)
            torch.testing.assert_close(optimizer.masters["w"], start.float() - 1e-5, atol=1e-8, rtol=0)
    assert torch.equal(plain.w, start)  # what the masters are for
    # after 100 the master has moved by 1e-4; bf16's neighbours lie 2^-13 = 1.2e-4 apart there
    torch.testing.assert_close(start.float() - model.w.float(), torch.full((1, 2), 2.0**-13), atol=0, rtol=0)
    assert model.w.dtype == torch.bfloat16 and model.w.grad is None


def test_weight_decay_shrinks_matrices_only():
    model = Tied()
    before, optimizer = weights(model), MasterAdamW(model, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1, 1.0)
    torch.testing.assert_close(model.embedding.weight.detach(), before["embedding.weight"] * 0.95)
    assert torch.equal(model.scale, before["scale"])


def test_tied_weights_are_updated_once_and_stay_tied():
    model = Tied()
    optimizer = MasterAdamW(model)
    assert list(optimizer.masters) == ["scale", "embedding.weight"]
    before = model.embedding.weight.detach().clone()
    model.embedding.weight.grad = torch.ones(5, 3)
    model.scale.grad = torch.zeros(3)
    optimizer.step(LR, 1e9)
    torch.testing.assert_close(before - model.embedding.weight.detach(), torch.full((5, 3), LR))  # Adam's first step
    assert model.head.weight is model.embedding.weight


def test_the_norm_returned_is_the_one_before_clipping_and_gradients_are_cleared():
    model = Tied()
    model.embedding.weight.grad, model.scale.grad = torch.zeros(5, 3), torch.tensor([30.0, 0.0, 40.0])
    assert MasterAdamW(model).step(LR, 1.0) == pytest.approx(50.0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_is_cleared(dtype, bad):
    model = Tied(dtype)
    optimizer = MasterAdamW(model, weight_decay=0.1)
    train(model, optimizer, range(2))
    before = {name: t.clone() for name, t in (weights(model) | optimizer.state_tensors()).items()}
    model.loss(2).backward()
    model.scale.grad[1] = bad
    assert not math.isfinite(optimizer.step(LR, 1.0))
    assert_same(weights(model) | optimizer.state_tensors(), before)
    assert all(p.grad is None for p in [*model.parameters(), *optimizer.masters.values()])
    train(model, optimizer, [3])
    assert not torch.equal(optimizer.masters["scale"], before.get("master.scale", before["scale"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_its_memory_is_taken_at_the_start(dtype):
    model = Tied(dtype)
    optimizer = MasterAdamW(model)
    before = {name: tensor.data_ptr() for name, tensor in optimizer.state_tensors().items()}
    assert len(before) == (6 if dtype == torch.float32 else 8)
    assert all(not tensor.any() for name, tensor in optimizer.state_tensors().items() if "master" not in name)
    train(model, optimizer, range(2))
    assert {name: tensor.data_ptr() for name, tensor in optimizer.state_tensors().items()} == before
    assert all(tensor.any() for tensor in optimizer.state_tensors().values())


def test_only_skips_in_a_row_end_a_run():
    guard = NonFiniteGuard()
    for n_skipped, n_made in [(2, 0), (1, 1), (2, 0), (0, 2), (1, 0), (0, 0), (1, 0)]:
        guard.check(n_skipped, n_made)
    with pytest.raises(ValueError, match="3 updates in a row"):
        guard.check(1, 0)


# ---- fp16 and its scaled loss


def test_gradients_too_small_for_fp16_survive_by_the_scale_and_its_norm_is_that_of_the_loss():
    """The loss is so small that its gradients, below 3e-8, are 0 in fp16; the update is that of fp32."""
    small, models = 1e-7, [Tied(torch.float16), Tied()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [MasterAdamW(model) for model in models]
    (small * models[0].loss(0)).backward()
    assert not models[0].embedding.weight.grad.any()
    models[0].zero_grad()
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            (small * model.loss(step) * optimizer.loss_scale).backward()
        norms = [optimizer.step(LR, 1e-8) for optimizer in optimizers]
        assert norms[0] == pytest.approx(norms[1], rel=0.01) and norms[1] > 2e-8  # it was clipped
    for name, master in optimizers[0].masters.items():
        moved = (master - models[1].get_parameter(name)).abs().max().item()
        assert moved < 0.05 * 3 * LR, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_have_no_scale(dtype):
    optimizer = MasterAdamW(Tied(dtype))
    assert optimizer.loss_scale == 1.0 and "loss_scale" not in optimizer.state_tensors()


def test_an_overflow_halves_the_scale_down_to_1_and_many_good_updates_double_it(monkeypatch):
    monkeypatch.setattr(optim, "DOUBLE_AFTER", 3)
    model = Tied(torch.float16)
    optimizer, before, scales = MasterAdamW(model), weights(model), []

    def step(gradient):
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer.step(LR, 1.0)
        scales.append(optimizer.loss_scale)

    for _ in range(18):
        step(math.inf)
    assert scales == [*(2.0**k for k in range(15, -1, -1)), 1.0, 1.0]
    assert_same(weights(model), before)
    scales.clear()
    for gradient in [1.0, 1.0, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]:
        step(gradient)
    assert scales == [1, 1, 1, 1, 1, 2, 2, 2, 4]  # after three in a row


def test_skips_that_lower_the_scale_do_not_end_a_run():
    guard = NonFiniteGuard()
    for loss_scale in (8.0, 4.0, 2.0, 8.0, 1.0, 1.0):
        guard.check(1, 0, loss_scale)
    with pytest.raises(ValueError, match="3 updates in a row"):
        guard.check(1, 0, 1.0)


def test_a_resumed_run_keeps_its_scale_and_how_long_it_has_held():
    model = Tied(torch.float16)
    optimizer = MasterAdamW(model)
    model.scale.grad = torch.full_like(model.scale, math.inf)
    optimizer.step(LR, 1.0)
    train(model, optimizer, range(2))
    resumed = MasterAdamW(model)
    resumed.load_state_tensors(optimizer.state_tensors())
    assert (resumed.loss_scale, resumed.n_since_change) == (2.0**15, 2)
    other = MasterAdamW(Tied(torch.bfloat16))
    other.load_state_tensors(optimizer.state_tensors())
    assert other.loss_scale == 1.0


# ---- saving and resuming


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(dtype, tmp_path):
    model = Tied(dtype)
    optimizer = MasterAdamW(model, weight_decay=0.1)
    train(model, optimizer, range(3))
    save_file(optimizer.state_tensors(), tmp_path / "optimizer.safetensors")  # refuses tensors that share memory

    resumed = Tied(dtype)
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer = MasterAdamW(resumed, weight_decay=0.1)
    resumed_optimizer.load_state_tensors(load_file(tmp_path / "optimizer.safetensors"))
    for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
        train(m, o, range(3, 6))
    assert_same(weights(resumed), weights(model))
    assert_same(resumed_optimizer.state_tensors(), optimizer.state_tensors())


def test_the_state_holds_masters_only_where_the_weights_are_held_in_less():
    models = {dtype: Tied(dtype) for dtype in (torch.float32, torch.bfloat16)}
    optimizers = {dtype: MasterAdamW(model) for dtype, model in models.items()}
    for dtype, model in models.items():
        train(model, optimizers[dtype], range(1))
    moments = {f"{k}.{n}" for k in ("step", "exp_avg", "exp_avg_sq") for n in ("scale", "embedding.weight")}
    masters = {"master.scale", "master.embedding.weight"}
    assert optimizers[torch.float32].state_tensors().keys() == moments
    assert optimizers[torch.bfloat16].state_tensors().keys() == moments | masters


def test_a_state_loaded_is_a_copy():
    model = Tied()
    optimizer = MasterAdamW(model)
    train(model, optimizer, range(1))
    saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    optimizer.load_state_tensors(saved)
    train(model, optimizer, range(1, 3))
    assert_same(saved, kept)


def test_a_bf16_run_resumed_in_fp32_goes_on_from_its_masters():
    model = Tied(torch.bfloat16)
    optimizer = MasterAdamW(model)
    train(model, optimizer, range(3))
    resumed = Tied()
    resumed.load_state_dict(model.state_dict())
    MasterAdamW(resumed).load_state_tensors(optimizer.state_tensors())
    assert_same(weights(resumed), {name: master.detach() for name, master in optimizer.masters.items()})


def test_an_fp32_run_can_be_resumed_in_bf16():
    model = Tied()
    optimizer = MasterAdamW(model)
    train(model, optimizer, range(3))
    resumed = Tied(torch.bfloat16)
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer = MasterAdamW(resumed)
    resumed_optimizer.load_state_tensors(optimizer.state_tensors())
    assert_same(weights(resumed), {name: w.bfloat16() for name, w in weights(model).items()})
    assert torch.equal(resumed_optimizer.state_tensors()["exp_avg.scale"], optimizer.state_tensors()["exp_avg.scale"])


# ---- learning rate


@pytest.mark.parametrize(
    ("decay", "step", "expected"),  # 10 steps, 2 of them warm-up, from a peak of 2 to a tenth
    [
        ("constant", 0, 1.0),
        ("constant", 1, 2.0),
        ("constant", 9, 2.0),
        ("constant", 99, 2.0),
        ("linear", 0, 1.0),
        ("linear", 1, 2.0),
        ("linear", 2, 2.0),
        ("linear", 4, 1.55),  # a quarter of the way from 2 to 0.2
        ("linear", 6, 1.1),
        ("linear", 9, 0.425),
        ("linear", 99, 0.2),
        ("cosine", 0, 1.0),
        ("cosine", 2, 2.0),
        ("cosine", 4, 0.2 + 1.8 * (2 + 2**0.5) / 4),
        ("cosine", 6, 1.1),
        ("cosine", 8, 0.2 + 1.8 * (2 - 2**0.5) / 4),
        ("cosine", 99, 0.2),
    ],
)
def test_the_learning_rate_warms_up_and_decays(decay, step, expected):
    assert learning_rate(step, 10, 2.0, 2, decay) == pytest.approx(expected)


def test_without_warm_up_it_starts_at_the_peak_and_a_run_of_warm_up_only_never_falls():
    assert learning_rate(0, 10, 2.0, 0, "cosine") == 2.0
    assert [learning_rate(step, 3, 3.0, 3, "linear") for step in range(3)] == pytest.approx([1.0, 2.0, 3.0])
    assert learning_rate(99, 10, 2.0, 2, "linear", final_fraction=0.0) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found(bad):
    assert is_finite([]) and is_finite([torch.zeros(3), torch.ones(2, 2, dtype=torch.bfloat16)])
    assert not is_finite([torch.zeros(3), torch.tensor([[0.0, bad]]), torch.zeros(1)])
