import math
from itertools import pairwise

import pytest
import torch

from nanor1.attention import attention, decode_attention, reference_attention

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


def packed_inputs(lengths, n_heads, n_kv_heads, head_dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n_tokens = sum(lengths)
    q, k, v = (
        torch.randn(n_tokens, heads, head_dim, generator=generator, dtype=dtype)
        for heads in (n_heads, n_kv_heads, n_kv_heads)
    )
    cu_seqlens_B1 = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return q, k, v, cu_seqlens_B1


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
    for out in (reference_attention(q, k, v, torch.tensor([0, 2])), attention(q, k, v, torch.tensor([0, 2]), 2)):
        torch.testing.assert_close(out[1, 0], torch.full((4,), 3.0))


@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 4), (4, 2), (7, 1), (14, 2)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_equals_the_reference_forward_and_backward(lengths, n_heads, n_kv_heads):
    q, k, v, cu_seqlens_B1 = packed_inputs(lengths, n_heads, n_kv_heads, dtype=torch.float32)
    results = []
    for function in (
        lambda *qkv: attention(*qkv, cu_seqlens_B1, max(lengths)),
        lambda *qkv: reference_attention(*qkv, cu_seqlens_B1),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
        results.append([out, *(leaf.grad for leaf in leaves)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lengths", [[3, 1, 2], [2, 2]], ids=["ragged", "equal"])
def test_gradients_equal_numerical_ones(lengths):
    q, k, v, cu_seqlens_B1 = packed_inputs(lengths, 2, 1, head_dim=2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, cu_seqlens_B1, max(lengths)), leaves)


def test_attention_keeps_the_dtype_and_stays_near_the_reference_in_bf16():
    q, k, v, cu_seqlens_B1 = packed_inputs([6, 2], 4, 2, dtype=torch.bfloat16)
    out = attention(q, k, v, cu_seqlens_B1, 6)
    assert out.dtype == torch.bfloat16
    wanted = reference_attention(q.float(), k.float(), v.float(), cu_seqlens_B1)
    torch.testing.assert_close(out.float(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_no_gradient_crosses_from_one_sequence_to_another_or_from_the_future(lengths):
    q, k, v, cu_seqlens_B1 = packed_inputs(lengths, 2, 1)
    k.requires_grad_(), v.requires_grad_()
    out = attention(q, k, v, cu_seqlens_B1, max(lengths))
    for start, end in pairwise(cu_seqlens_B1.tolist()):
        token = (start + end) // 2
        grads = torch.autograd.grad(out[token].sum(), (k, v), retain_graph=True)
        reached_k, reached_v = (grad.abs().sum((1, 2)) > 0 for grad in grads)
        assert reached_v[start : token + 1].all()  # of a lone key the gradient is 0: its weight is 1 whatever it is
        for reached in (reached_k, reached_v):
            assert not reached[:start].any() and not reached[token + 1 :].any()


@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 4), (4, 2), (7, 1), (14, 2)])
def test_decode_attention_is_the_last_row_of_attention_over_the_cached_tokens(n_heads, n_kv_heads):
    lengths = [5, 1, 8]
    q, k, v, cu_seqlens_B1 = packed_inputs(lengths, n_heads, n_kv_heads, dtype=torch.float32)
    cache_k, cache_v = (torch.full((3, n_kv_heads, 8, 8), 1e4) for _ in range(2))  # unused cells must not count
    for row, (start, end) in enumerate(pairwise(cu_seqlens_B1.tolist())):
        cache_k[row, :, : end - start] = k[start:end].transpose(0, 1)
        cache_v[row, :, : end - start] = v[start:end].transpose(0, 1)
    last = cu_seqlens_B1[1:] - 1
    mask_BT = torch.arange(8) < torch.tensor(lengths)[:, None]
    out = decode_attention(q[last], cache_k, cache_v, mask_BT)
    torch.testing.assert_close(out, reference_attention(q, k, v, cu_seqlens_B1)[last], atol=1e-5, rtol=1e-4)


def test_decode_attention_without_a_mask_looks_at_every_position():
    q, k, v, cu_seqlens_B1 = packed_inputs([6, 6], 4, 2, dtype=torch.float32)
    cache_k, cache_v = (x.view(2, 6, 2, 8).transpose(1, 2) for x in (k, v))
    out = decode_attention(q[[5, 11]], cache_k, cache_v, None)
    torch.testing.assert_close(out, reference_attention(q, k, v, cu_seqlens_B1)[[5, 11]], atol=1e-5, rtol=1e-4)
