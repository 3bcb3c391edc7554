"""Packed sequences: positions, shared prompts, and the keys that each continuation attends to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanor1.packing import Item, attended_pairs, layout, pack, spread, tile_table, to_device


def starts(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def test_positions_count_from_the_start_of_each_sequence():
    where = layout(starts([3, 1, 2]))
    assert where.position_N.tolist() == [0, 1, 2, 0, 0, 1]
    assert where.row_N.tolist() == [0, 0, 0, 1, 2, 2]
    assert where.cu_seqlens_k_B1.tolist() == [0, 3, 4, 6] and where.shared is None


def test_a_continuation_goes_on_behind_its_prompt_and_its_keys_follow_the_prompts():
    # tokens 0 1 are a prompt, 2 a sequence of its own, 3 4 5 and 6 continue the prompt
    where = layout(starts([2, 1, 3, 1]), torch.tensor([-1, -1, 0, 0]))
    assert where.position_N.tolist() == [0, 1, 0, 2, 3, 4, 2]
    assert where.shared.source_J.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 0, 1, 6]
    assert where.cu_seqlens_k_B1.tolist() == [0, 2, 3, 8, 11]
    assert where.n_keys == 11


def test_parents_that_are_all_absent_are_no_sharing():
    assert layout(starts([2, 3]), torch.tensor([-1, -1])).shared is None


@pytest.mark.parametrize(
    "parents", [[-1, 2, -1], [0, -1, -1], [-1, 0, 1], [-1, 3, 0]], ids=["later", "itself", "of a child", "beyond"]
)
def test_a_parent_that_does_not_come_first_is_refused(parents):
    with pytest.raises(AssertionError, match="must be -1 or an earlier sequence"):
        layout(starts([2, 2, 2]), torch.tensor(parents))


def test_sequences_lie_behind_others_in_one_way_only():
    with pytest.raises(AssertionError, match="parent_B and past_B are two ways"):
        layout(starts([2, 2]), torch.tensor([-1, 0]), torch.tensor([0, 3]))


def test_keys_of_a_cache_are_those_it_held_and_then_the_new_ones():
    where = layout(starts([2, 1, 1]), past_B=torch.tensor([1, 0, 2]))
    assert where.position_N.tolist() == [1, 2, 0, 2] and where.row_N.tolist() == [0, 0, 1, 2]
    assert where.cached.row_J.tolist() == [0, 0, 0, 1, 2, 2, 2] and where.n_keys == 7
    assert where.cached.position_J.tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert where.cu_seqlens_k_B1.tolist() == [0, 3, 4, 7]


def test_a_layout_is_moved_with_all_its_tensors_and_a_batch_but_for_those_that_its_layout_is_made_of():
    where = layout(starts([2, 1, 3, 1]), torch.tensor([-1, -1, 0, 0]))
    moved = to_device(where, "meta")
    assert moved.n_keys == 11 and moved.cached is None
    tensors = [x for part in (moved, moved.shared) for x in vars(part).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) >= 8 and all(x.is_meta for x in tensors)
    batch = pack([Item([1], [2, 3])], 9)[0].to("meta")
    assert {name for name, x in vars(batch).items() if not x.is_meta} == {"cu_seqlens_B1", "parent_B"}


def test_what_is_not_learned_is_seen_and_no_target_whether_the_prompt_is_shared_or_not():
    masked, whole = Item([1, 2], [3, 4, 5], [False, True, True], advantage=[0.0, 2.0, 3.0]), Item([1, 2], [6, 7])
    (batch,) = pack([whole, masked, Item([], [8, 9], [False, True], weight=0.5)], 100)
    assert batch.ids_N.tolist() == [1, 2, 3, 4, 6, 8] and batch.cu_seqlens_B1.tolist() == [0, 2, 4, 5, 6]
    assert batch.parent_B.tolist() == [-1, 0, 0, -1] and batch.item_M.tolist() == [1, 1, 0, 0, 2]
    assert batch.target_M.tolist() == [4, 5, 6, 7, 9] and batch.predictor_M.tolist() == [2, 3, 1, 4, 5]
    assert batch.advantage_M.tolist() == [2, 3, 0, 0, 0] and batch.weight_M.tolist() == [1, 1, 1, 1, 0.5]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=6), st.integers(1, 30))
def test_items_that_belong_together_stay_in_one_batch(sizes, tokens_per_batch):
    items = [Item([i] * p, [9] * (n + k)) for i, (p, n) in enumerate(sizes) for k in (0, 1)]
    batches = [dict.fromkeys(batch.item_M.tolist()) for batch in pack(items, tokens_per_batch, together=2)]
    pairs = [list(batch)[i : i + 2] for batch in batches for i in range(0, len(batch), 2)]
    assert sorted(pairs) == [[i, i + 1] for i in range(0, len(items), 2)]


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


def tiles_by_hand(pairs, is_keys):
    """(work, sequence, first, starts and lengths, place of L) of all tiles of 128 that hold a token, by counting."""
    tiles, start_q, start_k, place = [], 0, 0, {}
    for b, (n_q, n_k) in enumerate(pairs):
        place[b] = (start_q // 128 + b) * 128
        for first in range(0, n_k if is_keys else n_q, 128):
            if is_keys:
                work = sum(i + n_k - n_q >= first for i in range(n_q))
            else:
                work = sum(j <= min(first + 127, n_q - 1) + n_k - n_q for j in range(n_k))
            tiles.append((-work, b, first, (first, start_q, n_q, start_k, n_k, place[b])))
        start_q, start_k = start_q + n_q, start_k + n_k
    return [entry for *_, entry in sorted(tiles)], place


@pytest.mark.parametrize(
    "pairs",
    [
        [(1, 1)],
        [(128, 128), (127, 127), (129, 129), (0, 0), (300, 300)],
        [(0, 0), (5, 400), (260, 300), (0, 130), (0, 0), (128, 129)],
        [(3, 3)] * 50,
        [(250, 250)] * 9,
    ],
    ids=str,
)
def test_a_tile_table_has_each_tile_once_most_work_first_and_spare_ones_last(pairs):
    (n_q, n_k), (cu_q, cu_k) = map(sum, zip(*pairs, strict=True)), map(starts, zip(*pairs, strict=True))
    for is_keys, table in enumerate(tile_table(cu_q, cu_k, n_q, n_k)):
        wanted, place = tiles_by_hand(pairs, is_keys)
        got = list(map(tuple, table.unflatten(0, (-1, 6)).tolist()))
        is_real = [entry[0] < entry[4 if is_keys else 2] for entry in got]
        assert [entry for entry, real in zip(got, is_real, strict=True) if real] == wanted
        assert table.dtype == torch.int32 and len(got) == (n_k if is_keys else n_q) // 128 + len(pairs) + is_keys
        if not is_keys:
            assert sorted(is_real, reverse=True) == is_real
            rows = [place[b] + first for b, (n, _) in enumerate(pairs) for first in range(0, n, 128)]
            assert len({*rows}) == len(rows) and max(rows) < 128 * len(got)  # L of no two tiles in one place


def test_the_tile_table_of_a_layout_is_that_of_its_queries_and_keys():
    alone = layout(starts([200, 3]))
    shared = layout(starts([200, 3, 150]), torch.tensor([-1, 0, 0]))
    behind = layout(starts([200, 3]), past_B=torch.tensor([1, 300]))
    for where, n_keys in ((alone, [200, 3]), (shared, [200, 203, 350]), (behind, [201, 303])):
        wanted = tile_table(where.cu_seqlens_B1, starts(n_keys), len(where.row_N), sum(n_keys))
        assert all(map(torch.equal, where.tiles(), wanted))
