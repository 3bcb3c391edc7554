"""The gradient of an update, batch by batch; of a small model on several CPU threads at once.

Inside a matrix product of width 128 two threads wait for each other more than they work, and on a busy machine one
that is not running holds up the other at every operation. A replica a thread, one batch each, meets once a step.

Left out: several processes or devices.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from nanor1.packing import Batch

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
