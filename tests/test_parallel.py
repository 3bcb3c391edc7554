"""Workers: replicas share weights, keep gradients of their own until they are gathered, and change no result."""

import threading

import pytest
import torch

from nanor1.gradient import SMALL, Workers, start_workers


class Model(torch.nn.Sequential):
    @property
    def head_weight_VC(self):
        return self[2].weight


def new_model():
    torch.manual_seed(0)
    return Model(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


class Inputs:
    """In place of a packed batch."""

    def __init__(self):
        self.x = torch.randn(4, 6)

    def to(self, device):
        return self


def loss_of(model, batch):
    loss = model(batch.x).square().sum()
    return loss, loss.item()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("n_batches", [0, 1, 2, 5])
def test_reports_come_in_the_order_of_the_batches(n, n_batches):
    batches = [Inputs() for _ in range(n_batches)]
    assert Workers(new_model(), n).accumulate(batches, lambda model, batch: (None, batch), learns=False) == batches


@pytest.mark.parametrize("n", [1, 2, 3])
def test_accumulated_gradients_are_those_of_one_model_and_the_replicas_start_afresh(n):
    batches = [Inputs() for _ in range(5)]
    alone, workers = new_model(), Workers(new_model(), n)
    losses = [loss_of(alone, batch) for batch in batches]
    sum(loss for loss, _ in losses).backward()
    for _ in range(2):  # what is there is added to
        assert workers.accumulate(batches, loss_of) == pytest.approx([value for _, value in losses])
    for p, q in zip(alone.parameters(), workers.model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, 2 * p.grad)
    assert all(p.grad is None for model in workers.models[1:] for p in model.parameters())


@pytest.mark.parametrize("n", [1, 2])
def test_without_learning_no_worker_forms_a_gradient(n):
    workers, seen = Workers(new_model(), n), []
    report = lambda model, batch: (None, seen.append(torch.is_grad_enabled()))  # noqa: E731
    workers.accumulate([Inputs() for _ in range(3)], report, learns=False)
    assert seen == [False] * 3


def test_an_update_in_place_shows_in_every_replica():
    workers = Workers(new_model(), 3)
    with torch.no_grad():
        for p in workers.model.parameters():
            p.add_(1.0)
    outputs = [model(torch.ones(2, 6)) for model in workers.models]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_workers_run_torch_on_one_thread_each_and_leave_the_caller_its_own():
    before = torch.get_num_threads()
    threads = lambda *_: (None, (torch.get_num_threads(), threading.get_ident()))  # noqa: E731
    seen = Workers(new_model(), 2).accumulate([Inputs() for _ in range(4)], threads, learns=False)
    assert {n for n, _ in seen} == {1}
    assert threading.get_ident() not in {ident for _, ident in seen}
    assert torch.get_num_threads() == before


def test_an_error_in_a_worker_reaches_the_caller():
    def fail(model, batch):
        raise ValueError("too much")

    with pytest.raises(ValueError, match="too much"):
        Workers(new_model(), 2).accumulate([Inputs()], fail)


def test_only_a_small_model_gets_a_worker_a_thread_unasked(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert len(start_workers(new_model()).models) == 4
    assert len(start_workers(new_model(), 2).models) == 2
    with torch.device("meta"):
        large = torch.nn.Linear(SMALL, 2, bias=False)
    assert len(start_workers(large).models) == 1
