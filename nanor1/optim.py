"""AdamW with fp32 master weights, and the learning-rate schedule.

A bf16 weight has 8 bits of precision: around 0.02 its neighbours lie 0.0001 apart, and an update of 1e-6 is rounded
away. The optimizer therefore keeps fp32 masters of weights held in less, updates those, and rounds them into the model.

fp16 has 11 bits, so that sampler and trainer differ an eighth as much as in bf16 (2510.26788), and ends at 6e-8, below
which a gradient is lost. The loss is therefore multiplied by `loss_scale` before its backward, and the gradients are
divided by it here, in fp32. The scale is halved where it made a gradient overflow, an update that is then left out, and
doubled after many that went well (Micikevicius et al. 2018, 1710.03740, section 3.2).

AdamW: Loshchilov and Hutter 2019 (1711.05101), torch's implementation.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MAX_SKIPPED = 3  # updates in a row that may be skipped for a non-finite gradient
FIRST_SCALE = 2.0**16  # of the loss, where weights are fp16
DOUBLE_AFTER = 2000  # updates without an overflow


class MasterAdamW:
    """AdamW over a model's parameters; matrices decay, vectors do not."""

    def __init__(self, model: nn.Module, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0):
        self.params = dict(model.named_parameters())
        self.masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in self.params.items()
        }
        self.rounded = [(p, self.masters[name]) for name, p in self.params.items() if self.masters[name] is not p]
        self.is_scaled = any(p.dtype == torch.float16 for p in self.params.values())
        self.loss_scale, self.n_since_change = FIRST_SCALE if self.is_scaled else 1.0, 0
        matrices = [p for p in self.masters.values() if p.dim() >= 2]
        vectors = [p for p in self.masters.values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, fused=True)
        for p in self.masters.values():  # at once: memory that is free from now on is free to the sampler's cache
            moments = {key: torch.zeros_like(p, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
            self.adamw.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device)} | moments

    def step(self, lr: float, max_grad_norm: float) -> float:
        """Clip the gradients (at 0: not), update, clear them; returns the norm before. Non-finite: no update is made.

        The gradients are those of the loss times `loss_scale`; the norm is that of the loss.
        """
        for p, master in self.rounded:
            if p.grad is not None:
                master.grad, p.grad = p.grad.float(), None
        if self.is_scaled:
            for master in self.masters.values():
                if master.grad is not None:
                    master.grad /= self.loss_scale
        norm = float(nn.utils.clip_grad_norm_(self.masters.values(), max_grad_norm or math.inf))
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            torch.autograd.graph.increment_version(self.params.values())  # which the fused update does not
            self._round_into_model()
        if self.is_scaled:
            self._adapt_scale(math.isfinite(norm))
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def _adapt_scale(self, is_made: bool) -> None:
        self.n_since_change += 1
        if not is_made:
            self.loss_scale, self.n_since_change = max(1.0, self.loss_scale / 2), 0
        elif self.n_since_change == DOUBLE_AFTER:
            self.loss_scale, self.n_since_change = 2 * self.loss_scale, 0

    @torch.no_grad()
    def _round_into_model(self) -> None:
        for p, master in self.rounded:
            p.copy_(master)

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by parameter name: moments, step counts, masters where there are; the scale."""
        scale = [self.loss_scale, self.n_since_change]
        tensors = {"loss_scale": torch.tensor(scale)} if self.is_scaled else {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state[master].items():
                tensors[f"{key}.{name}"] = value
            if master is not self.params[name]:
                tensors[f"master.{name}"] = master.detach()
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_tensors` gave, also where the weights were held in another dtype then."""
        for name, master in self.masters.items():
            for key, value in self.adamw.state[master].items():
                if f"{key}.{name}" in tensors:
                    value.copy_(tensors[f"{key}.{name}"])
            if f"master.{name}" in tensors:
                master.copy_(tensors[f"master.{name}"])
        self._round_into_model()
        if self.is_scaled and "loss_scale" in tensors:
            self.loss_scale, self.n_since_change = tensors["loss_scale"].tolist()


class NonFiniteGuard:
    """Stops a run whose updates are skipped for non-finite gradients several times in a row."""

    def __init__(self):
        self.n_in_a_row = 0

    def check(self, n_skipped: int, n_made: int, loss_scale: float = 1.0) -> None:
        """Updates skipped while the loss was scaled do not count: the next one is made at a lower scale."""
        n_skipped = n_skipped if loss_scale == 1 else 0
        self.n_in_a_row = 0 if n_made else self.n_in_a_row + n_skipped
        if self.n_in_a_row >= MAX_SKIPPED:
            raise ValueError(
                f"the gradient was not finite in {self.n_in_a_row} updates in a row; the last checkpoint is whole: "
                "lower --lr, raise --warmup, or use --dtype float32, and start again from it"
            )


def learning_rate(step: int, n_steps: int, peak: float, warmup: int, decay: str, final_fraction: float = 0.1) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, then "constant", "linear" or "cosine" to a fraction.

    >>> [round(learning_rate(s, 4, 1.0, 2, "linear"), 3) for s in range(4)]
    [0.5, 1.0, 1.0, 0.55]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, n_steps - warmup))
    falling = {"constant": 1.0, "linear": 1.0 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[decay]
    return peak * (final_fraction + (1.0 - final_fraction) * falling)


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number of every tensor is finite."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)
