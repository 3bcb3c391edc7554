import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import nanor1.attention
from nanor1.attention import attention, cached_attention, hide_behind, reference_attention

LENGTHS = {
    "ragged": [5, 1, 9, 3],
    "equal": [4, 4, 4],
    "one sequence": [7],
    "single tokens": [1, 1, 1],
    "long and ragged": [150, 3, 201],
    "long and equal": [140, 140],
    "long, then many short": [300, 280, 2, 9, 1, 9],
    "short, then long": [4, 4, 4, 520, 1, 260],
}


FEWER_QUERIES = {  # (queries, keys) of each sequence
    "a chunk each": [(3, 8), (1, 5), (4, 4), (2, 9)],
    "equal chunks": [(2, 6), (2, 6), (2, 6)],
    "a prompt, then completions behind it": [(100, 100), (93, 193), (101, 201), (7, 107), (99, 199), (100, 200)],
    "a long prompt, then completions behind it": [(700, 700), (30, 730), (1, 701), (28, 728)],
    "longer than a block": [(150, 300), (3, 3), (131, 200)],
    "one token": [(1, 1), (1, 300), (1, 40)],
    "nothing new": [(0, 4), (3, 4), (0, 0)],
}


@pytest.fixture(autouse=True, params=[False, True], ids=["cpu", "elsewhere"])
def each_way_without_kernels(request, monkeypatch):
    def in_a_rectangle(q, k, v, bounds, bounds_k):
        return nanor1.attention._in_a_rectangle(q, k, v, torch.tensor(bounds), torch.tensor(bounds_k))

    if request.param:
        monkeypatch.setattr(nanor1.attention._Products, "apply", in_a_rectangle)


def cu_seqlens(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def packed_inputs(lengths, n_heads, n_kv_heads, head_dim=8, dtype=torch.float64, seed=0, lengths_k=None):
    generator = torch.Generator().manual_seed(seed)
    n_keys = sum(lengths_k or lengths)
    q, k, v = (
        torch.randn(n_tokens, heads, head_dim, generator=generator, dtype=dtype)
        for n_tokens, heads in ((sum(lengths), n_heads), (n_keys, n_kv_heads), (n_keys, n_kv_heads))
    )
    return q, k, v, cu_seqlens(lengths)


def outputs_and_gradients(function, *qkv):
    """What `function` gives for q, k, v, and the gradients for one fixed random gradient of it."""
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = function(*leaves)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(out.dtype))
    return [out, *(leaf.grad for leaf in leaves)]


def test_reference_with_equal_scores_averages_the_values_so_far_of_the_own_sequence():
    v = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0]).view(5, 1, 1)
    out = reference_attention(torch.ones(5, 1, 1), torch.zeros(5, 1, 1), v, torch.tensor([0, 3, 5]))
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 1.5, 3.0, 10.0, 15.0]))


def test_scores_are_divided_by_the_root_of_the_head_width():
    q = torch.zeros(2, 1, 4)
    q[1, 0, 0] = 2 * math.log(3)  # halved by the scale: weights 1/4 and 3/4
    k = torch.zeros(2, 1, 4)
    k[1, 0, 0] = 1.0
    v = torch.tensor([0.0, 4.0]).view(2, 1, 1).expand(2, 1, 4)
    for out in (reference_attention(q, k, v, torch.tensor([0, 2])), attention(q, k, v, *[torch.tensor([0, 2])] * 2)):
        torch.testing.assert_close(out[1, 0], torch.full((4,), 3.0))


@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 4), (4, 2), (7, 1), (14, 2)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_equals_the_reference_forward_and_backward(lengths, n_heads, n_kv_heads):
    q, k, v, cu_seqlens_B1 = packed_inputs(lengths, n_heads, n_kv_heads, dtype=torch.float32)
    results = outputs_and_gradients(lambda *qkv: attention(*qkv, cu_seqlens_B1, cu_seqlens_B1), q, k, v)
    wanted = outputs_and_gradients(lambda *qkv: reference_attention(*qkv, cu_seqlens_B1), q, k, v)
    torch.testing.assert_close(results, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 4), (7, 1), (14, 2)])
@pytest.mark.parametrize("pairs", FEWER_QUERIES.values(), ids=FEWER_QUERIES)
def test_sequences_with_fewer_queries_than_keys_equal_the_reference_forward_and_backward(pairs, n_heads, n_kv_heads):
    lengths, lengths_k = map(list, zip(*pairs, strict=True))
    *qkv, cu_q = packed_inputs(lengths, n_heads, n_kv_heads, dtype=torch.float32, lengths_k=lengths_k)
    cu_k = cu_seqlens(lengths_k)
    results = outputs_and_gradients(lambda *qkv: attention(*qkv, cu_q, cu_k), *qkv)
    wanted = outputs_and_gradients(lambda *qkv: reference_attention(*qkv, cu_q, cu_k), *qkv)
    torch.testing.assert_close(results, wanted, atol=1e-5, rtol=1e-4)


def test_fewer_queries_than_keys_give_the_last_rows_of_the_whole():
    *qkv, cu_k = packed_inputs([9, 6], 4, 2, dtype=torch.float32)
    whole = attention(*qkv, cu_k, cu_k)
    last = [7, 8, 14]
    q, k, v = qkv
    for function in (attention, reference_attention):
        torch.testing.assert_close(function(q[last], k, v, cu_seqlens([2, 1]), cu_k), whole[last])


@pytest.mark.parametrize("lengths", [[3, 1, 2], [2, 2]], ids=["ragged", "equal"])
def test_gradients_equal_numerical_ones(lengths):
    q, k, v, cu_seqlens_B1 = packed_inputs(lengths, 2, 1, head_dim=2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, cu_seqlens_B1, cu_seqlens_B1), leaves)


def test_attention_keeps_the_dtype_and_stays_near_the_reference_in_bf16():
    q, k, v, cu_seqlens_B1 = packed_inputs([6, 2], 4, 2, dtype=torch.bfloat16)
    out = attention(q, k, v, cu_seqlens_B1, cu_seqlens_B1)
    assert out.dtype == torch.bfloat16
    wanted = reference_attention(q.float(), k.float(), v.float(), cu_seqlens_B1)
    torch.testing.assert_close(out.float(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_no_gradient_crosses_from_one_sequence_to_another_or_from_the_future(lengths):
    q, k, v, cu_seqlens_B1 = packed_inputs(lengths, 2, 1)
    k.requires_grad_(), v.requires_grad_()
    out = attention(q, k, v, cu_seqlens_B1, cu_seqlens_B1)
    for start, end in pairwise(cu_seqlens_B1.tolist()):
        token = (start + end) // 2
        grads = torch.autograd.grad(out[token].sum(), (k, v), retain_graph=True)
        reached_k, reached_v = (grad.abs().sum((1, 2)) > 0 for grad in grads)
        assert reached_v[start : token + 1].all()  # of a lone key the gradient is 0: its weight is 1 whatever it is
        for reached in (reached_k, reached_v):
            assert not reached[:start].any() and not reached[token + 1 :].any()


def test_what_lies_behind_a_length_is_hidden():
    inf = float("inf")
    assert hide_behind(torch.tensor([1, 3, 0]), 3).tolist() == [[0, -inf, -inf], [0, 0, 0], [-inf, -inf, -inf]]


@pytest.mark.parametrize("n_rows", [2, 9])
def test_cached_attention_in_bf16_is_the_reference_to_rounding_with_few_rows_and_many(n_rows):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((n_rows, 6, 16), *[(n_rows, 2, 20, 16)] * 2)
    )
    lengths = [20 - row for row in range(n_rows)]
    out = cached_attention(q, k, v, None, torch.tensor(lengths), 20)
    cu_q, cu_k = torch.arange(n_rows + 1), F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    packed_k, packed_v = (torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)]) for x in (k, v))
    wanted = reference_attention(q.double(), packed_k.double(), packed_v.double(), cu_q, cu_k)
    assert out.dtype == torch.bfloat16
    assert (out.double() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [None, [4, 0, 2]], ids=["first rows", "permuted slots"])
@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 4), (4, 2), (7, 1), (14, 2)])
def test_cached_attention_is_the_last_row_of_attention_over_the_tokens_in_the_slot(n_heads, n_kv_heads, slots, dtype):
    lengths = [5, 1, 8]
    q, k, v, cu_seqlens_B1 = packed_inputs(lengths, n_heads, n_kv_heads, dtype=dtype)
    # unused cells must not count
    cache_k, cache_v = (torch.full((5, n_kv_heads, 12, 8), 1e4, dtype=dtype) for _ in range(2))
    for row, (start, end) in enumerate(pairwise(cu_seqlens_B1.tolist())):
        slot = row if slots is None else slots[row]
        cache_k[slot, :, : end - start] = k[start:end].transpose(0, 1)
        cache_v[slot, :, : end - start] = v[start:end].transpose(0, 1)
    last, slot_B = cu_seqlens_B1[1:] - 1, None if slots is None else torch.tensor(slots)
    length_B = torch.tensor(lengths)
    out = cached_attention(q[last], cache_k, cache_v, slot_B, length_B, 8)
    assert torch.equal(out, cached_attention(q[last], cache_k, cache_v, slot_B, length_B, 8, hide_behind(length_B, 8)))
    wanted = reference_attention(q, k, v, cu_seqlens_B1)[last]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, wanted, atol=tolerance, rtol=tolerance)


def test_a_row_with_nothing_cached_gives_zeros_and_leaves_the_others_alone():
    q, k, v, _ = packed_inputs([3], 4, 2, dtype=torch.float32)
    cache_k, cache_v = (x.transpose(0, 1).expand(2, 2, 3, 8) for x in (k, v))
    out = cached_attention(q[[1, 1]], cache_k, cache_v, torch.tensor([0, 1]), torch.tensor([0, 2]), 3)
    assert (out[0] == 0).all()
    torch.testing.assert_close(out[1], reference_attention(q, k, v, cu_seqlens([3]))[1])


def test_where_the_kernels_do_not_run_a_warning_says_why_and_the_result_is_the_same():
    """A tensor of a subclass says it lives on another device, which leads to one rectangle for all sequences."""

    class Elsewhere(torch.Tensor):
        device = property(lambda self: torch.device("xpu"))

    q, k, v, cu = packed_inputs([5, 1, 3], 4, 2, head_dim=64, dtype=torch.float32)
    with pytest.warns(UserWarning, match="SDPA.*(device xpu|not installed)"):
        out = attention(q.as_subclass(Elsewhere), k, v, cu, cu)
    wanted = reference_attention(q, k, v, cu)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), wanted, atol=1e-5, rtol=1e-4)
