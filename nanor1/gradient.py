"""The gradient of an update, batch by batch; of a small model on several CPU threads at once.

Inside a matrix product of width 128 two threads wait for each other more than they work, and on a busy machine one
that is not running holds up the other at every operation. A replica a thread, one batch each, meets once a step.

Left out: several processes or devices.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from nanor1.logprobs import chunked_loss
from nanor1.packing import Batch, Item, pack

Report = TypeVar("Report")
SMALL = 10_000_000  # parameters; larger models are bound by the reading of their weights, which threads then share


class Workers:
    """A model and its replicas, which share its weights (updates show at once) and have gradients of their own."""

    def __init__(self, model: nn.Module, n: int = 1):
        self.model = model
        self.models = [model, *(copy.deepcopy(model) for _ in range(n - 1))]
        for other in self.models[1:]:
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                q.data = p.data
        # torch counts its own threads by calling thread: one in each worker, elsewhere as many as before
        self.pool = ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) if n > 1 else None

    def accumulate(
        self,
        batches: Sequence[Batch],
        loss_of: Callable[[nn.Module, Batch], tuple[Tensor, Report]],
        learns: bool = True,
    ) -> list[Report]:
        """Add the gradients of all batches' losses to the model's parameters, always in the same order.

        `loss_of(a model, batch)`, with the batch on the model's device, returns a loss and what is to be known of it;
        the latter is returned for each batch. Without `learns` no gradient is formed.
        """

        def learn(model: nn.Module, batch: Batch) -> Report:
            with torch.set_grad_enabled(learns):  # here: it holds for the calling thread alone
                loss, report = loss_of(model, batch.to(model.head_weight_VC.device))
            if learns:
                loss.backward()
            return report

        n, reports = len(self.models), [None] * len(batches)
        run = self.pool.map if self.pool else map
        shares = run(lambda i: [learn(self.models[i], batch) for batch in batches[i::n]], range(n))
        for i, share in enumerate(shares):
            reports[i::n] = share
        for other in self.models[1:]:
            for p, q in zip(self.model.parameters(), other.parameters(), strict=True):
                if q.grad is not None:
                    p.grad = q.grad if p.grad is None else p.grad.add_(q.grad)
                    q.grad = None
        return reports


def start_workers(model: nn.Module, n: int = 0) -> Workers:
    """n workers; 0: as many as torch has threads for a small model on the CPU, else one."""
    if n == 0:
        is_small = next(model.parameters()).device.type == "cpu" and sum(p.numel() for p in model.parameters()) <= SMALL
        n = torch.get_num_threads() if is_small else 1
    return Workers(model, n)


# ---- supervised learning


@dataclass(frozen=True)
class Example:
    """Token ids; `is_target[t]`: the loss falls on predicting ids[t]. The first has none: nothing comes before it."""

    ids: list[int]
    is_target: list[bool]
    question: str = field(default="", compare=False)  # its bare text, if there is one: decides what is held out

    def __post_init__(self):
        assert len(self.ids) == len(self.is_target)
        assert any(self.is_target) and not self.is_target[0], "a token with a loss, and not the first"


def pack_examples(examples: Sequence[Example], tokens_per_batch: int, loss_scale: float = 1.0) -> list[Batch]:
    """The weights are those of the mean over all target tokens of the examples, times `loss_scale`."""
    weight = loss_scale / sum(sum(example.is_target) for example in examples)
    return pack([Item([], e.ids, e.is_target, weight=weight) for e in examples], tokens_per_batch)


def add_gradient(
    workers: Workers,
    examples: Sequence[Example],
    tokens_per_batch: int,
    vocab_size: int | None = None,
    loss_scale: float = 1.0,
    learns: bool = True,
) -> float:
    """Add the gradient of one update to the parameters; returns the loss, nats a target token, however it is split.

    Ids at or above `vocab_size` are never sampled, and here have no probability either. The gradient is multiplied by
    `loss_scale` (see nanor1/optim.py). Without `learns` there is none.
    """

    def loss_of(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = batch.predictor_states(model), model.head_weight_VC, batch.target_M
        loss, _, _ = chunked_loss(*inputs, lambda logp, at: -(logp * batch.weight_M[at]).sum(), vocab_size=vocab_size)
        return loss, loss.detach()

    losses = workers.accumulate(pack_examples(examples, tokens_per_batch, loss_scale), loss_of, learns)
    return torch.stack(losses).sum().item() / loss_scale
