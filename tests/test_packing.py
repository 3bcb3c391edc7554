"""Packed sequences: positions, shared prompts, and the keys that each continuation attends to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanor1.packing import attended_pairs, layout, spread, to_device
from nanor1.sft import TextBatch


def starts(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def test_positions_count_from_the_start_of_each_sequence():
    where = layout(starts([3, 1, 2]))
    assert where.position_N.tolist() == [0, 1, 2, 0, 0, 1]
    assert where.row_N.tolist() == [0, 0, 0, 1, 2, 2]
    assert where.max_len == 3 and where.shared is None


def test_a_continuation_goes_on_behind_its_prompt_and_its_keys_follow_the_prompts():
    # tokens 0 1 are a prompt, 2 a sequence of its own, 3 4 5 and 6 continue the prompt
    where = layout(starts([2, 1, 3, 1]), torch.tensor([-1, -1, 0, 0]))
    assert where.position_N.tolist() == [0, 1, 0, 2, 3, 4, 2]
    assert where.shared.source_M.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 0, 1, 6]
    assert where.shared.cu_seqlens_B1.tolist() == [0, 2, 3, 8, 11]
    assert (where.max_len, where.shared.max_len) == (3, 5)


def test_parents_that_are_all_absent_are_no_sharing():
    assert layout(starts([2, 3]), torch.tensor([-1, -1])).shared is None


@pytest.mark.parametrize(
    "parents", [[-1, 2, -1], [0, -1, -1], [-1, 0, 1], [-1, 3, 0]], ids=["later", "itself", "of a child", "beyond"]
)
def test_a_parent_that_does_not_come_first_is_refused(parents):
    with pytest.raises(ValueError, match="must be -1 or an earlier sequence"):
        layout(starts([2, 2, 2]), torch.tensor(parents))


def test_sequences_lie_behind_others_in_one_way_only():
    with pytest.raises(ValueError, match="parent_B and past_B are two ways"):
        layout(starts([2, 2]), torch.tensor([-1, 0]), torch.tensor([0, 3]))


def test_keys_of_a_cache_are_those_it_held_and_then_the_new_ones():
    where = layout(starts([2, 1, 1]), past_B=torch.tensor([1, 0, 2]))
    assert where.position_N.tolist() == [1, 2, 0, 2] and where.row_N.tolist() == [0, 0, 1, 2]
    assert where.cached.row_M.tolist() == [0, 0, 0, 1, 2, 2, 2] and where.cached.max_len == 3
    assert where.cached.position_M.tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert where.cached.cu_seqlens_B1.tolist() == [0, 3, 4, 7]


def test_a_layout_is_moved_with_all_its_tensors_and_a_batch_but_for_those_that_its_layout_is_made_of():
    where = layout(starts([2, 1, 3, 1]), torch.tensor([-1, -1, 0, 0]))
    moved = to_device(where, "meta")
    assert moved.shared.max_len == 5 and moved.cached is None
    tensors = [x for part in (moved, moved.shared) for x in vars(part).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) >= 8 and all(x.is_meta for x in tensors)
    batch = TextBatch(*torch.arange(5)[:, None]).to("meta")
    assert {name for name, x in vars(batch).items() if not x.is_meta} == {"cu_seqlens_B1"}


SHARED = st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), max_size=4)), min_size=1, max_size=4)


def prompts_then_continuations(groups):
    """Lengths and parents of sequences; a group is (prompt length, lengths of its continuations)."""
    children = [(length, row) for row, (_, lengths) in enumerate(groups) for length in lengths]
    return [p for p, _ in groups] + [n for n, _ in children], [-1] * len(groups) + [row for _, row in children]


@given(SHARED)
def test_spreading_copies_each_prompt_before_its_continuations_and_its_gradient_adds_up(groups):
    lengths, parents = prompts_then_continuations(groups)
    where = layout(starts(lengths), torch.tensor(parents))
    x = torch.arange(sum(lengths), dtype=torch.float64)[:, None, None].expand(-1, 2, 3).clone().requires_grad_()
    parts = x.split(lengths)
    wanted = torch.cat(
        [torch.cat((parts[p], part)) if p >= 0 else part for p, part in zip(parents, parts, strict=True)]
    )
    if where.shared is None:
        assert len(wanted) == len(x)
        return
    mine, weight = spread(x, where.shared), torch.randn(wanted.shape, dtype=torch.float64)
    assert torch.equal(mine, wanted)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (mine, wanted)]
    torch.testing.assert_close(*gradients)


@given(SHARED)
def test_attended_pairs_are_those_of_a_mask_in_full(groups):
    lengths, parents = prompts_then_continuations(groups)
    n_pairs = 0
    for length, parent in zip(lengths, parents, strict=True):
        n_keys = length + (lengths[parent] if parent >= 0 else 0)
        n_pairs += int(torch.ones(length, n_keys).tril(n_keys - length).sum())
    assert attended_pairs(starts(lengths), torch.tensor(parents)) == n_pairs
    if not any(p >= 0 for p in parents):
        assert attended_pairs(starts(lengths)) == n_pairs
