"""AdamW with fp32 master weights, and the learning-rate schedule.

A bf16 weight has 8 bits of precision: around 0.02 its neighbours lie 0.0001 apart, and an update of 1e-6 is rounded
away. The optimizer therefore keeps fp32 masters of weights held in less, updates those, and rounds them into the model.

AdamW: Loshchilov and Hutter 2019 (1711.05101), torch's implementation.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class MasterAdamW:
    """AdamW over a model's parameters; matrices decay, vectors do not."""

    def __init__(self, model: nn.Module, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0):
        self.params = dict(model.named_parameters())
        self.masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in self.params.items()
        }
        matrices = [p for p in self.masters.values() if p.dim() >= 2]
        vectors = [p for p in self.masters.values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas)

    def step(self, lr: float, max_grad_norm: float) -> float:
        """Clip the gradients, update, clear them; returns the norm before clipping. Non-finite: no update is made."""
        for name, p in self.params.items():
            if self.masters[name] is not p and p.grad is not None:
                self.masters[name].grad, p.grad = p.grad.float(), None
        norm = float(nn.utils.clip_grad_norm_(self.masters.values(), max_grad_norm))
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self._round_into_model()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _round_into_model(self) -> None:
        for name, p in self.params.items():
            if self.masters[name] is not p:
                p.copy_(self.masters[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by parameter name: moments, step counts, and masters where they exist."""
        tensors = {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value
            if master is not self.params[name]:
                tensors[f"master.{name}"] = master.detach()
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_tensors` gave, also where the weights were held in another dtype then."""
        for name, master in self.masters.items():
            if f"step.{name}" in tensors:
                keys = ("step", "exp_avg", "exp_avg_sq")
                state = {key: tensors[f"{key}.{name}"].clone() for key in keys}
                self.adamw.state[master] = {k: v if k == "step" else v.to(master.device) for k, v in state.items()}
            if f"master.{name}" in tensors:
                master.copy_(tensors[f"master.{name}"])
        self._round_into_model()


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
