"""Several CPU threads at once on a small model: each works on its own batches, with replicas that share the weights.

Inside a matrix product of width 128 two threads wait for each other more than they work, and on a busy machine one
that is not running holds up the other at every operation. A replica a thread, one batch each, meets once a step. Two
cores then sample and train about 1.5 times as fast as torch's own two threads (measured, LOG.md).

Left out: several processes or devices.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from nanor1.packing import Batch

Job, Result, Report = TypeVar("Job"), TypeVar("Result"), TypeVar("Report")
SMALL = 10_000_000  # parameters; larger models are bound by the reading of their weights, which threads then share


class Workers:
    """A model and its replicas, which share its weights (updates show at once) and have gradients of their own."""

    def __init__(self, model: nn.Module, n: int = 1):
        self.model = model
        self.models = [model, *(replica(model) for _ in range(n - 1))]
        # torch counts its own threads by calling thread: one in each worker, elsewhere as many as before
        self.pool = ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) if n > 1 else None

    def map(self, function: Callable[[nn.Module, Job], Result], jobs: Sequence[Job]) -> list[Result]:
        """`function(a model, job)` for each job, results in their order; worker i does jobs i, i + n, i + 2n, ..."""
        n = len(self.models)
        if self.pool is None:
            return [function(self.model, job) for job in jobs]
        shares = [jobs[i::n] for i in range(n)]
        work = [
            self.pool.submit(lambda model, share: [function(model, job) for job in share], *pair)
            for pair in zip(self.models, shares, strict=True)
        ]
        results: list = [None] * len(jobs)
        for i, future in enumerate(work):
            results[i::n] = future.result()
        return results

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

        reports = self.map(learn, batches)
        for other in self.models[1:]:
            for p, q in zip(self.model.parameters(), other.parameters(), strict=True):
                if q.grad is not None:
                    p.grad = q.grad if p.grad is None else p.grad.add_(q.grad)
                    q.grad = None
        return reports


def replica(model: nn.Module) -> nn.Module:
    """A copy of the modules whose parameters are the same memory."""
    other = copy.deepcopy(model)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.data = p.data
    return other


def start_workers(model: nn.Module, n: int = 0) -> Workers:
    """n workers; 0: as many as torch has threads for a small model on the CPU, else one."""
    parameters = list(model.parameters())
    if n == 0:
        is_small = parameters[0].device.type == "cpu" and sum(p.numel() for p in parameters) <= SMALL
        n = torch.get_num_threads() if is_small else 1
    return Workers(model, n)
