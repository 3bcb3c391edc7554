import math
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

import nanor1.model
import nanor1.sampler
import nanor1.slots
from nanor1 import next_token
from nanor1.logprobs import token_logprobs
from nanor1.model import ModelConfig, Transformer
from nanor1.next_token import PART, hash_uniform, request_key, sample_tokens
from nanor1.sampler import Prompt, Sampler, generate, read_beginning
from nanor1.slots import Sampling, Slots, slots_that_fit

VOCAB = 61
LLAMA = ModelConfig("llama", VOCAB, 32, 40, 2, 4, 2, 8, 256)
CONFIGS = {
    "gpt2": ModelConfig(
        "gpt2", VOCAB, 32, 64, 2, 4, 4, 8, 256, hidden_act="gelu_new", rope_theta=None, tie_word_embeddings=True,
        qkv_bias=True, output_bias=True, mlp_bias=True, is_gated=False, is_layer_norm=True,
    ),
    "llama": LLAMA,
    "qwen2": ModelConfig("qwen2", VOCAB, 32, 40, 2, 4, 1, 8, 256, rope_theta=1e6, qkv_bias=True),
    "qwen3": ModelConfig("qwen3", VOCAB, 32, 40, 2, 4, 2, 12, 256, has_qk_norm=True, tie_word_embeddings=True),
}  # fmt: skip


def random_model(config=LLAMA, seed=0):
    """Weights far from any initialisation, so that every part of the model matters to the logits."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.3
        is_scale = parameter.dim() == 1 and bool((parameter == 1).all())
        parameter.data.copy_(1 + noise if is_scale else noise)
    return model


def gpu_model():
    """One whose attention runs in the Triton kernels."""
    return random_model(ModelConfig("llama", VOCAB, 128, 160, 2, 4, 2, 64, 256)).to("cuda", torch.float16)


def bigram_model(logits_VV, context=64):
    """A model whose logits after token u are row u of `logits_VV`, whatever came before: known by construction."""
    V = len(logits_VV)
    model = Transformer(ModelConfig("llama", V, V, 4, 1, 1, 1, 2, context, norm_eps=1e-30))
    for parameter in model.model.layers.parameters():
        parameter.data.zero_()
    model.model.embed_tokens.weight.data.copy_(torch.eye(V))  # its norm is one token in V entries: V ** 0.5 high
    model.lm_head.weight.data.copy_(logits_VV.T / V**0.5)
    return model


def counting_model(V=10, context=64):
    """After u comes u + 1, and after the last token 0, with certainty."""
    return bigram_model(torch.eye(V).roll(1, dims=1) * 1000.0, context)


def random_prompts(lengths, seed=0, vocab_size=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


RAGGED = random_prompts([1, 30, 2, 17, 5, 44, 3, 3, 9, 26])


def ids_of(completions_PG):
    return [[completion.ids for completion in group] for group in completions_PG]


@torch.no_grad()
def packed_logits(model, sequences):
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids_N = torch.tensor([token for sequence in sequences for token in sequence])
    return model.logits(model(ids_N, pad(lengths.cumsum(0), (1, 0)))).split(lengths.tolist())


def greedy_without_cache(model, prompt, n_tokens):
    ids = list(prompt)
    for _ in range(n_tokens):
        ids.append(int(packed_logits(model, [ids])[0][-1].argmax()))
    return ids[len(prompt) :]


def teacher_forced_logprobs(model, prompts, completions_PG, temperature=1.0, vocab_size=None):
    """What a trainer computes for all completions, in one packed forward without a cache."""
    pairs = [
        (list(prompt), completion.ids)
        for prompt, group in zip(prompts, completions_PG, strict=True)
        for completion in group
    ]
    lengths = torch.tensor([len(prompt) + len(ids) for prompt, ids in pairs])
    ids_N = torch.tensor([token for prompt, ids in pairs for token in prompt + ids])
    is_completion_N = torch.tensor([i >= len(prompt) for prompt, ids in pairs for i in range(len(prompt + ids))])
    at = is_completion_N.nonzero().squeeze(1)
    with torch.no_grad():
        hidden_NC = model(ids_N, pad(lengths.cumsum(0), (1, 0)))
        return token_logprobs(hidden_NC[at - 1], model.head_weight_VC, ids_N[at], temperature, vocab_size)[0]


def sampled_logprobs(completions_PG):
    return torch.tensor([logp for group in completions_PG for completion in group for logp in completion.logprobs])


# ---- the cache and the batch change nothing


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_those_of_the_whole_sequence_run_again_for_each(family):
    model = random_model(CONFIGS[family])
    prompts = RAGGED[:5]
    completions = generate(model, prompts, max_new_tokens=20, temperature=0.0, max_rows=3)
    wanted = [[greedy_without_cache(model, prompt, 20)] for prompt in prompts]
    assert ids_of(completions) == wanted
    assert len({token for (ids,) in wanted for token in ids}) > 10  # not one token over and over


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_ragged_batch_gives_what_its_prompts_give_one_by_one(family, temperature):
    model, seeds = random_model(CONFIGS[family]), list(range(100, 100 + len(RAGGED)))
    arguments = dict(n=2, max_new_tokens=15, temperature=temperature, stop_ids=[7, 8, 9])
    together = generate(model, RAGGED, seed=seeds, max_rows=9, **arguments)
    alone = [generate(model, [prompt], seed=[seed], **arguments)[0] for prompt, seed in zip(RAGGED, seeds, strict=True)]
    assert ids_of(together) == ids_of(alone)
    assert [[c.finish for c in group] for group in together] == [[c.finish for c in group] for group in alone]
    torch.testing.assert_close(sampled_logprobs(together), sampled_logprobs(alone), atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_rows", [1, 3, 7, 20])
def test_the_number_of_rows_changes_no_result(max_rows):
    model = random_model()
    arguments = dict(n=3, max_new_tokens=30, stop_ids=[7, 8, 9, 10], seed=5)  # ends at any step, so rows move often
    completions, wanted = (generate(model, RAGGED, max_rows=rows, **arguments) for rows in (max_rows, 512))
    assert len({len(completion.ids) for group in wanted for completion in group}) > 10
    assert ids_of(completions) == ids_of(wanted)


def test_a_thousand_requests_pass_through_seven_rows():
    model = random_model(ModelConfig("llama", VOCAB, 16, 16, 1, 2, 1, 8, 64))
    prompts = random_prompts([1 + i % 13 for i in range(500)])
    arguments = dict(n=2, max_new_tokens=6, stop_ids=[1, 2, 3, 4, 5, 6, 7])
    completions = generate(model, prompts, max_rows=7, **arguments)
    assert [len(group) for group in completions] == [2] * 500
    assert ids_of(completions) == ids_of(generate(model, prompts, **arguments))
    torch.testing.assert_close(
        sampled_logprobs(completions), teacher_forced_logprobs(model, prompts, completions), atol=1e-4, rtol=0
    )


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    n=st.integers(1, 4),
    max_rows=st.integers(1, 9),
    max_new_tokens=st.integers(1, 30),
    stop_id=st.integers(0, 9),
)
def test_a_deterministic_chain_is_continued_right_through_any_number_of_rows(
    lengths, n, max_rows, max_new_tokens, stop_id
):
    prompts = [[(3 * i + j) % 10 for j in range(length)] for i, length in enumerate(lengths)]
    completions = generate(
        counting_model(context=24), prompts, n=n, max_rows=max_rows, max_new_tokens=max_new_tokens, stop_ids=[stop_id]
    )
    for prompt, group in zip(prompts, completions, strict=True):
        wanted = [(prompt[-1] + 1 + i) % 10 for i in range(min(max_new_tokens, 24 - len(prompt)))]
        is_stopped = stop_id in wanted
        wanted = wanted[: wanted.index(stop_id) + 1] if is_stopped else wanted
        assert [(c.ids, c.finish) for c in group] == [(wanted, "stop" if is_stopped else "length")] * n


# ---- steps over a list of slots, as on a GPU, but for the capture


@pytest.mark.parametrize("max_rows", [1, 3, 7, 20])
def test_steps_over_slots_give_what_moved_rows_give(max_rows):
    model = random_model()
    arguments = dict(n=3, max_new_tokens=30, stop_ids=[7, 8, 9, 10], seed=5)
    stepwise = Sampler(model, max_rows, is_stepwise=True).generate(RAGGED, **arguments)
    moved = Sampler(model, max_rows, is_stepwise=False).generate(RAGGED, **arguments)
    assert len({len(completion.ids) for group in stepwise for completion in group}) > 10
    assert ids_of(stepwise) == ids_of(moved)
    assert [[c.finish for c in group] for group in stepwise] == [[c.finish for c in group] for group in moved]
    torch.testing.assert_close(sampled_logprobs(stepwise), sampled_logprobs(moved), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("n_slots", "sizes"), [(1, {1}), (2, {2}), (3, {2, 3}), (6, {2, 4, 6})])
def test_only_a_single_slot_has_steps_of_one_row(n_slots, sizes):
    """torch.compile makes a program of its own for one row, which the last of many requests is not worth."""
    engine = Sampler(random_model(), n_slots, is_stepwise=True)
    engine.reserve(n_slots, 4, 4)
    steps = [engine.step(n_rows, Sampling(1.0, 0, 1.0, (), None)) for n_rows in range(1, n_slots + 1)]
    assert {len(step.slot_B) for step in steps} == sizes
    assert all(len(step.slot_B) >= n_rows for n_rows, step in enumerate(steps, 1))


def test_the_list_of_slots_is_copied_to_the_device_only_when_other_slots_run(monkeypatch):
    copied, index_tensor = [], nanor1.slots.index_tensor
    monkeypatch.setattr("nanor1.slots.index_tensor", lambda *rest: (copied.append(rest[0]), index_tensor(*rest))[1])
    limits = [90, 40]
    Sampler(counting_model(context=128), 2, is_stepwise=True).generate([[1], [2]], max_new_tokens=limits)
    assert copied == [[0, 1], [0, 2]]  # slot 2 is the spare one


@pytest.mark.parametrize("n_new", [2, 5, 21, 40])
def test_a_stepwise_sampler_runs_idle_for_less_than_two_looks(n_new, monkeypatch):
    n_steps, decode = [], Transformer.decode
    monkeypatch.setattr(Transformer, "decode", lambda *rest: (n_steps.append(1), decode(*rest))[1])
    Sampler(counting_model(), 2, is_stepwise=True).generate([[1]], n=2, max_new_tokens=n_new)
    assert n_new - 1 <= len(n_steps) < n_new - 1 + 2 * nanor1.sampler.STEPS_A_LOOK <= n_new + 7


@pytest.mark.gpu
def test_nothing_waits_for_the_device_while_it_steps_but_the_read_of_a_look(monkeypatch):
    """Requests of one length twice through the slots: admitted, stepped, looked at, retired."""
    advance, collect, n_advanced = nanor1.sampler._Batch.advance, nanor1.sampler._Batch.collect, []

    def watched(batch):
        n_advanced.append(1)
        if len(n_advanced) == 4:  # before: prefill, compile, capture
            torch.cuda.set_sync_debug_mode("error")
        return advance(batch)

    def collected(batch):
        torch.cuda.set_sync_debug_mode("default")
        return collect(batch)

    monkeypatch.setattr(nanor1.sampler._Batch, "advance", watched)
    monkeypatch.setattr(nanor1.sampler._Batch, "collect", collected)
    try:
        (made,) = Sampler(gpu_model(), 16).generate([[1, 2, 3]], n=32, max_new_tokens=40)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(completion.ids) for completion in made] == [40] * 32 and len(n_advanced) > 4


def test_a_stepwise_sampler_hears_tokens_and_stop_texts_after_each_step():
    heard, arguments = [], dict(n=2, max_new_tokens=20, stop_texts=["56"], decode=digits)
    model = counting_model()
    completions = Sampler(model, 3, is_stepwise=True).generate(
        [[1], [3], [5]], **arguments, on_token=lambda *event: heard.append(event)
    )
    assert ids_of(completions) == [[[2, 3, 4, 5, 6]] * 2, [[4, 5, 6]] * 2, [[6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6]] * 2]
    for p, group in enumerate(completions):
        for g, completion in enumerate(group):
            assert [token for p_, g_, token in heard if (p_, g_) == (p, g)] == completion.ids


def digits(ids):
    return "".join(map(str, ids))


def test_a_sampler_keeps_its_slots_from_call_to_call_and_sees_new_weights():
    model = random_model()
    sampler_ = Sampler(model, max_rows=8)
    first = sampler_.generate(RAGGED, max_new_tokens=12, seed=1)
    slots = sampler_.slots
    sampler_.generate(RAGGED[:2], max_new_tokens=5, seed=2)
    assert sampler_.slots is slots
    assert ids_of(sampler_.generate(RAGGED, max_new_tokens=12, seed=1)) == ids_of(first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    again = sampler_.generate(RAGGED, max_new_tokens=12, seed=1)
    assert sampler_.slots is slots
    assert ids_of(again) == ids_of(generate(model, RAGGED, max_new_tokens=12, seed=1)) != ids_of(first)


def test_a_longer_request_makes_larger_slots_and_nothing_is_left_of_the_old_ones():
    model = random_model()
    sampler_ = Sampler(model, max_rows=4)
    sampler_.generate(RAGGED[:1], max_new_tokens=3)
    longer = sampler_.generate(RAGGED, max_new_tokens=40, n=2)
    assert ids_of(longer) == ids_of(generate(model, RAGGED, max_new_tokens=40, n=2))


def test_each_prompt_may_have_its_own_limit():
    limits = [5, 1, 17, 30]
    completions = generate(counting_model(V=61), [[1], [2], [3], [4]], n=2, max_new_tokens=limits)
    assert [[len(c.ids) for c in group] for group in completions] == [[limit] * 2 for limit in limits]


def ready_slots(model, n_slots, seed=0):
    """Slots in the middle of things: some run, some of those are about to reach their limit; the spare one is idle."""
    slots, generator = Slots(model, n_slots, 64, 8), torch.Generator().manual_seed(seed)
    draw_ints = partial(torch.randint, size=(n_slots + 1,), generator=generator)
    slots.key[:], slots.n_new[:], slots.limit[:] = draw_ints(-(2**62), 2**62), draw_ints(0, 5), draw_ints(1, 7)
    slots.is_running[:] = draw_ints(0, 5) > 0
    slots.is_running[-1] = False
    return slots


def slots_hold(slots):
    """The state of all slots but the spare one, without the column that takes what idle rows write."""
    tensors = {name: x[:-1] for name, x in vars(slots).items() if torch.is_tensor(x)}
    return {name: x[:, :-1] if x.dim() == 2 else x for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("backend", "sampling"),
    [
        ("aot_eager", Sampling(0.6, 20, 0.9, (3, 7), 50, confidence_k=4)),
        pytest.param("inductor", Sampling(0.6, 20, 0.9, (3, 7), 50, confidence_k=4), marks=pytest.mark.slow),
        pytest.param("inductor", Sampling(1.0, 0, 1.0, (), None), marks=pytest.mark.slow),
        pytest.param("inductor", Sampling(0.0, 0, 1.0, (3, 7), None), marks=pytest.mark.slow),
        pytest.param("inductor", Sampling(0.7, 5, 1.0, (3,), 50), marks=pytest.mark.slow),
        pytest.param("inductor", Sampling(0.6, 0, 0.9, (3,), None), marks=pytest.mark.slow),
    ],
)
def test_recording_compiled_changes_slots_as_uncompiled_in_one_program_for_all_rows(fresh_dynamo, backend, sampling):
    model, record = random_model(), torch.compile(Slots.record, backend=backend, dynamic=True, fullgraph=True)
    with torch.inference_mode():
        for n_rows, n_slots in ((6, 9), (3, 9), (17, 40), (2, 2)):
            theirs, ours = ready_slots(model, n_slots), ready_slots(model, n_slots)
            slot_B = torch.randperm(n_slots + 1, generator=torch.Generator().manual_seed(0))[:n_rows]
            slot_B[1:] = slot_B[1:].where(theirs.is_running[slot_B[1:]], n_slots)  # the spare one several times
            for seed in range(3):
                logits_BV = torch.randn(n_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
                theirs.record(slot_B, logits_BV, sampling)
                record(ours, slot_B, logits_BV, sampling)
            assert slots_hold(ours).keys() >= {"ids", "logp", "n_new", "is_running"}
            torch.testing.assert_close(slots_hold(ours), slots_hold(theirs))
    assert fresh_dynamo["stats"]["unique_graphs"] == 1


def test_one_program_records_draws_of_other_temperatures_and_stop_texts_too(fresh_dynamo):
    model, record = random_model(), torch.compile(Slots.record, backend="eager", dynamic=True, fullgraph=True)
    for temperature, stop_texts in ((0.7, []), (0.9, ["5"]), (1.3, ["67", "8"])):
        sampling = Sampling(temperature, stop_texts=stop_texts, decode=lambda ids: digits(ids))
        record(ready_slots(model, 3), torch.arange(3), torch.randn(3, VOCAB), sampling)
    assert fresh_dynamo["stats"]["unique_graphs"] == 1


def test_stop_texts_need_no_captured_steps_of_their_own():
    engine = Sampler(random_model(), 4, is_stepwise=True)
    engine.reserve(4, 4, 4)
    samplings = [Sampling(stop_ids=[3], stop_texts=texts, decode=digits) for texts in ([], ["5"])]
    assert engine.step(2, samplings[0]) is engine.step(2, samplings[1]) is not engine.step(2, Sampling())


@pytest.mark.gpu
@pytest.mark.parametrize("max_rows", [1, 7, 20])
@pytest.mark.parametrize(
    "sampling", [dict(temperature=0), dict(confidence_k=3), dict(top_p=0.9), dict(top_k=8, top_p=0.9)]
)
def test_captured_steps_give_what_compiled_ones_give_and_those_what_plain_ones_give(sampling, max_rows, monkeypatch):
    """To the last bit, and but for a few draws that fall between the roundings of two programs."""
    arguments = dict(n=3, max_new_tokens=30, stop_ids=[7, 8, 9, 10], seed=5) | sampling
    model, made = gpu_model(), []
    made.append(sum(Sampler(model, max_rows).generate(RAGGED, **arguments), []))
    monkeypatch.setattr(nanor1.slots.Step, "capture", lambda self, slots: None)
    made.append(sum(Sampler(model, max_rows).generate(RAGGED, **arguments), []))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    made.append(sum(Sampler(model, max_rows).generate(RAGGED, **arguments), []))
    captured, compiled, plain = made
    assert captured == compiled
    same = [(ours, theirs) for ours, theirs in zip(captured, plain, strict=True) if ours.ids == theirs.ids]
    assert len(same) >= 0.8 * len(plain)
    for ours, theirs in same:
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=0.05) and ours.finish == theirs.finish


# ---- memory


def test_slots_are_as_many_as_the_memory_holds():
    config = ModelConfig("llama", 1000, 64, 64, 3, 4, 2, 16, 4096)  # a token: 2 * 3 layers * 2 heads * 16 * 4 bytes
    model, row = Transformer(config), 768 * 100 + 16 * 1000
    assert slots_that_fit(model, 100, wanted=50, budget=11 * row) == 10  # one more is the spare
    assert slots_that_fit(model, 100, wanted=5, budget=11 * row) == 5
    assert slots_that_fit(model, 100, wanted=50, budget=2 * row) == 1
    with pytest.raises(ValueError, match="one request of 100 tokens takes 0.00 GiB.*lower max_new_tokens"):
        slots_that_fit(model, 100, wanted=50, budget=2 * row - 1)


def test_little_memory_means_fewer_rows_and_the_same_completions(monkeypatch):
    model = random_model()  # a token: 2 * 2 layers * 2 heads * 8 * 4 bytes; logits: 16 bytes a token of the vocabulary
    monkeypatch.setattr("nanor1.sampler.free_memory", lambda device: 4 * (256 * 128 + 16 * VOCAB))
    small = Sampler(model, max_rows=20, memory_share=1.0)  # of 44 + 20 tokens, rounded to 128
    completions = small.generate(RAGGED, max_new_tokens=20, n=2)
    assert small.slots.n_slots == 3
    slots = small.slots
    small.generate(RAGGED, max_new_tokens=20, n=2)
    assert small.slots is slots  # too few still, but a new cache would not be larger
    monkeypatch.undo()
    assert ids_of(completions) == ids_of(generate(model, RAGGED, max_new_tokens=20, n=2))


@pytest.mark.parametrize("is_stepwise", [False, True])
def test_completions_far_from_the_length_limit_are_not_turned_into_lists_of_its_size(is_stepwise, monkeypatch):
    n_listed, tolist = [], torch.Tensor.tolist

    def watched(self):
        n_listed.append(self.numel())
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", watched)
    sampler = Sampler(counting_model(context=4096), 4, is_stepwise=is_stepwise)
    made = sampler.generate([[8], [2], [5]], n=2, max_new_tokens=4000, stop_ids=[9], confidence_k=2)
    assert ids_of(made) == [[[9]] * 2, [[3, 4, 5, 6, 7, 8, 9]] * 2, [[6, 7, 8, 9]] * 2]
    assert [[len(c.logprobs), len(c.confidences)] for (c, _) in made] == [[1, 1], [7, 7], [4, 4]]
    assert max(n_listed) < 100


@pytest.mark.parametrize("n", [1, 5, 50, 64])
def test_steps_on_a_cpu_have_the_rows_of_the_requests_and_no_others(n, monkeypatch):
    n_rows, decode = [], Transformer.decode

    def watched(self, ids_B, *arguments):
        n_rows.append(len(ids_B))
        return decode(self, ids_B, *arguments)

    monkeypatch.setattr(Transformer, "decode", watched)
    generate(random_model(), [[1, 2, 3]], n=n, max_new_tokens=4, max_rows=n)
    assert n_rows == [n] * 3


def watched_forwards(monkeypatch):
    """A list of the tokens of each prefill."""
    read, forward = [], Transformer.forward

    def watched(self, ids_N, *rest, **more):
        read.append(ids_N.tolist())
        return forward(self, ids_N, *rest, **more)

    monkeypatch.setattr(Transformer, "forward", watched)
    return read


def test_a_prompt_is_prefilled_once_for_all_its_completions(monkeypatch):
    model, read = random_model(), watched_forwards(monkeypatch)
    (group,) = generate(model, [[1, 2, 3]], n=20, max_new_tokens=5, max_rows=7)
    assert read == [[1, 2, 3]] and len(group) == 20
    read.clear()
    generate(model, RAGGED, n=3, max_new_tokens=15, max_rows=4, stop_ids=[3, 4, 5])
    assert [token for ids in read for token in ids] == [token for prompt in RAGGED for token in prompt]


def test_the_cache_of_a_prefill_holds_no_more_than_the_budget(monkeypatch):
    model, sizes = random_model(), []
    forward = Transformer.forward

    def measuring_forward(self, ids_N, cu_seqlens_B1, cache, *rest, **more):
        rows, _, length, _ = cache.k[0].shape
        sizes.append((rows, length))
        return forward(self, ids_N, cu_seqlens_B1, cache, *rest, **more)

    monkeypatch.setattr(Transformer, "forward", measuring_forward)
    monkeypatch.setattr(nanor1.sampler, "PREFILL_TOKENS", 40)
    prompts = random_prompts([3] * 15 + [50] + [30, 3, 3, 3])
    completions = generate(model, prompts, max_new_tokens=4)
    assert sizes == [(13, 3), (2, 3), (1, 50), (1, 30), (3, 3)]  # a prompt longer than the budget runs alone
    monkeypatch.undo()
    assert ids_of(completions) == ids_of(generate(model, prompts, max_new_tokens=4))


# ---- log-probabilities


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
@pytest.mark.parametrize("narrow", [10**9, 0], ids=["narrow", "wide"])  # wide: weights are reordered
def test_logprobs_are_those_a_trainer_computes_at_the_same_temperature(family, temperature, narrow, monkeypatch):
    monkeypatch.setattr(nanor1.model, "NARROW", narrow)
    model = random_model(CONFIGS[family])
    completions = generate(model, RAGGED, n=3, max_new_tokens=40, temperature=temperature, max_rows=7, stop_ids=[3, 4])
    theirs = teacher_forced_logprobs(model, RAGGED, completions, temperature)
    ours = sampled_logprobs(completions)
    assert ours.std() > 0.5  # equal guesses would agree whatever the model
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_greedy_logprobs_are_those_of_temperature_one():
    model = random_model()
    completions = generate(model, RAGGED, max_new_tokens=20, temperature=0.0)
    theirs = teacher_forced_logprobs(model, RAGGED, completions)
    torch.testing.assert_close(sampled_logprobs(completions), theirs, atol=1e-4, rtol=0)


def test_logprobs_are_of_the_whole_distribution_when_top_k_and_top_p_narrow_the_draw():
    model = random_model()
    completions = generate(model, RAGGED, max_new_tokens=20, top_k=3, top_p=0.8, temperature=0.9)
    theirs = teacher_forced_logprobs(model, RAGGED, completions, 0.9)
    torch.testing.assert_close(sampled_logprobs(completions), theirs, atol=1e-4, rtol=0)


def test_ids_past_the_vocabulary_are_never_sampled_and_have_no_probability():
    model = random_model()
    model.lm_head.weight.data[40:] *= 5  # the padding would win
    completions = generate(model, RAGGED, n=4, max_new_tokens=30, vocab_size=40)
    assert max(token for group in ids_of(completions) for ids in group for token in ids) < 40
    theirs = teacher_forced_logprobs(model, RAGGED, completions, vocab_size=40)
    torch.testing.assert_close(sampled_logprobs(completions), theirs, atol=1e-4, rtol=0)
    greedy = generate(model, RAGGED, max_new_tokens=30, temperature=0.0, vocab_size=40)
    assert max(token for group in ids_of(greedy) for ids in group for token in ids) < 40
    unlimited = generate(model, RAGGED, max_new_tokens=30, temperature=0.0)
    assert max(token for group in ids_of(unlimited) for ids in group for token in ids) >= 40


def test_a_bf16_model_samples_and_its_logprobs_are_a_rounding_away_from_the_trainers():
    model = random_model().bfloat16()
    completions = generate(model, RAGGED, n=4, max_new_tokens=40, max_rows=7)
    gap = (sampled_logprobs(completions) - teacher_forced_logprobs(model, RAGGED, completions)).abs()
    assert gap.mean() < 0.05 and len(gap) == 10 * 4 * 40
    assert all(math.isfinite(logp) and logp <= 0 for logp in sampled_logprobs(completions).tolist())


# ---- where a completion ends


def test_the_stop_token_is_kept_and_finish_says_stop():
    ((completion,),) = generate(counting_model(), [[2]], max_new_tokens=20, stop_ids=[5])
    assert (completion.ids, completion.finish, len(completion.logprobs)) == ([3, 4, 5], "stop", 3)


def test_any_of_several_stop_ids_ends_a_completion():
    completions = generate(counting_model(), [[2], [6], [8]], max_new_tokens=20, stop_ids=[5, 8, 0])
    assert ids_of(completions) == [[[3, 4, 5]], [[7, 8]], [[9, 0]]]
    assert {completion.finish for (completion,) in completions} == {"stop"}


def test_a_stop_token_in_the_prompt_ends_nothing():
    ((completion,),) = generate(counting_model(), [[5, 5]], max_new_tokens=3, stop_ids=[5])
    assert (completion.ids, completion.finish) == ([6, 7, 8], "length")


def test_a_stop_token_as_the_first_token_or_as_the_last_allowed_one_is_a_stop():
    first, last = generate(counting_model(), [[4], [2]], max_new_tokens=3, stop_ids=[5])
    assert (first[0].ids, first[0].finish) == ([5], "stop")
    assert (last[0].ids, last[0].finish) == ([3, 4, 5], "stop")


def test_max_new_tokens_ends_a_completion_with_length():
    for limit in (1, 2, 7):
        ((completion,),) = generate(counting_model(), [[0]], max_new_tokens=limit)
        assert (completion.ids, completion.finish) == (list(range(1, limit + 1)), "length")


def test_prompt_and_completion_fill_the_context_and_never_pass_it():
    prompts = [[0] * 15, [0] * 14, [0] * 3, [0]]  # the first is one short of the context
    completions = generate(counting_model(context=16), prompts, n=2, max_new_tokens=10**9, max_rows=3)
    assert [[len(c.ids) for c in group] for group in completions] == [[1, 1], [2, 2], [13, 13], [15, 15]]
    assert {c.finish for group in completions for c in group} == {"length"}
    assert completions[3][0].ids == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5]


def test_learned_positions_are_not_asked_for_one_past_the_context():
    config = ModelConfig("gpt2", VOCAB, 16, 16, 1, 2, 2, 8, 16, rope_theta=None, is_gated=False, is_layer_norm=True)
    completions = generate(random_model(config), random_prompts([15, 1]), max_new_tokens=100)
    assert [len(completion.ids) for (completion,) in completions] == [1, 15]


# bytes as tokens: a text of several bytes spans several tokens, and a character may be cut in two
def decode_bytes(ids):
    return bytes(ids).decode(errors="replace")


def spelling_model(text):
    """After each byte of the text comes its next one; the text's bytes are all different."""
    text = text.encode()
    assert len(set(text)) == len(text)
    logits_VV = torch.zeros(256, 256)
    for this, following in zip(text, text[1:], strict=False):
        logits_VV[this, following] = 1000.0
    return bigram_model(logits_VV)


@pytest.mark.parametrize("max_rows", [1, 512])
@pytest.mark.parametrize(
    "stop_texts, wanted",
    [
        (["cde"], "bcde"),
        (["e"], "bcde"),
        (["xyz", "é"], "bcdeé"),
        (["é→"], "bcdeé→"),
        (["→f", "fgh"], "bcdeé→f"),
        (["hij", "gh"], "bcdeé→fgh"),
        (["abc", "ac"], "bcdeé→fghij"),  # the first only with the prompt, the other nowhere
    ],
)
def test_a_stop_text_ends_a_completion_with_the_token_that_completes_it(stop_texts, wanted, max_rows):
    text = "abcdeé→fghij"
    ((completion,), (other,)) = generate(
        spelling_model(text), [b"a", b"i"], max_new_tokens=len(text.encode()) - 1, temperature=0.0,
        stop_texts=stop_texts, decode=decode_bytes, max_rows=max_rows,
    )  # fmt: skip
    assert bytes(completion.ids).decode() == wanted
    assert completion.finish == ("length" if wanted.endswith("j") else "stop")
    assert other.ids[0] == ord("j") and other.finish == "length"


def test_stop_texts_agree_with_a_search_of_the_whole_text_at_every_step():
    texts = ["<>", "é", "→", "e\n"]
    logits_VV = torch.full((256, 256), -1000.0)
    logits_VV[:, list("<>é→e\n".encode())] = 0.0  # babble of their nine bytes, most of it no UTF-8
    completions = generate(
        bigram_model(logits_VV), [b"<", b"e", "é".encode()[:1]], n=30, max_new_tokens=40, stop_texts=texts,
        decode=decode_bytes, max_rows=20,
    )  # fmt: skip
    found = Counter()
    for completion in (completion for group in completions for completion in group):
        text = bytes(completion.ids)
        is_ended = [any(stop.encode() in text[:i] for stop in texts) for i in range(1, 41)]
        wanted = is_ended.index(True) + 1 if True in is_ended else 40
        assert (len(completion.ids), completion.finish) == (wanted, "stop" if True in is_ended else "length")
        found.update([stop for stop in texts if stop.encode() in text] or ["none"])
    assert set(found) == {*texts, "none"}


# ---- the draw


def test_temperature_zero_takes_the_largest_logit():
    logits_BV = torch.tensor([[0.0, 3.0, 2.0], [5.0, -1.0, 4.9]])
    token_B, logp_B = sample_tokens(logits_BV, torch.tensor([0.99, 0.99]), temperature=0.0)
    assert token_B.tolist() == [1, 0]
    # by hand: -log(1 + e^-1 + e^-3) and -log(1 + e^-6 + e^-0.1)
    assert logp_B.tolist() == pytest.approx([-0.349012, -0.645699], abs=1e-5)


def test_a_draw_inverts_the_cumulative_distribution():
    logits_BV = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(6, -1)
    uniform_B = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 0.99])
    token_B, logp_B = sample_tokens(logits_BV, uniform_B)
    assert token_B.tolist() == [0, 0, 1, 1, 2, 2]
    assert logp_B.exp().tolist() == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.25, 0.25])


EDGES = {torch.float64: (0.0, 1 - 2.0**-53), torch.float32: (0.0, 1 - 2.0**-24)}  # the least and the largest uniform


@pytest.mark.parametrize("dtype", EDGES)
@pytest.mark.parametrize("V", [7, 1024, 1025, 5000])
def test_a_token_without_probability_is_never_drawn_even_at_the_edges(dtype, V):
    generator = torch.Generator().manual_seed(V)
    logits_BV = torch.randn(200, V, generator=generator)
    is_possible_BV = torch.rand(200, V, generator=generator) < torch.rand(200, 1, generator=generator) ** 8
    is_possible_BV[:, V // 2] = True
    logits_BV[~is_possible_BV] = -math.inf
    rows, possible = torch.arange(200), is_possible_BV.long()
    assert not is_possible_BV[:, 0].all() and not is_possible_BV[:, -1].all()
    inner = torch.rand(200, generator=generator, dtype=dtype)
    low, inside, high = (
        sample_tokens(logits_BV, u, 1.0)[0]
        for u in (*(torch.full((200,), u, dtype=dtype) for u in EDGES[dtype]), inner)
    )
    for token_B in (low, inside, high):
        assert is_possible_BV[rows, token_B].all()
    assert torch.equal(low, possible.argmax(-1))  # u = 0: the first that is possible
    likely = logits_BV.softmax(-1).flip(-1) > 1e-6  # u below 1: the last, or one so close that only rounding parts them
    assert (inside >= V - 1 - likely.long().argmax(-1)).all()


@pytest.mark.parametrize("dtype", EDGES)
def test_a_draw_at_the_border_of_two_blocks_stays_inside_the_block(dtype):
    generator = torch.Generator().manual_seed(0)
    weight_BN = torch.rand(20_000, 30, generator=generator) ** torch.randint(1, 20, (20_000, 1), generator=generator)
    weight_BN[:, ::7] = 0.0
    cdf_BN = weight_BN.cumsum(-1, dtype=dtype)
    border_B1 = torch.randint(0, 30, (20_000, 1), generator=generator)
    uniform_B = (cdf_BN.gather(-1, border_B1) / cdf_BN[:, -1:]).squeeze(1).clamp(max=EDGES[dtype][1])
    for u in (uniform_B, uniform_B.nextafter(torch.zeros_like(uniform_B))):
        index_B, inside_B = next_token._invert(weight_BN, u)
        assert ((0 <= inside_B) & (inside_B < 1)).all()
        assert (weight_BN.gather(-1, index_B[:, None]) > 0).all()


def test_rare_tokens_at_the_end_of_a_large_vocabulary_are_each_drawn():
    """A tail of 18,000 tokens of 2e-9 each; near 1 a running sum in fp32 moves in steps of thirty of them."""
    V, n_tail, p, B = 20_000, 18_000, 2e-9, 1100  # so many that a block ends among them
    logits_V = torch.full((V,), math.log((1 - n_tail * p) / (V - n_tail)))
    logits_V[V - n_tail :] = math.log(p)
    middle = 1 - n_tail * p / 2
    uniform_B = middle + p * torch.arange(B, dtype=torch.float64)  # one of them apart
    token_B, logp_B = sample_tokens(logits_V.expand(B, -1), uniform_B)
    torch.testing.assert_close(logp_B, torch.full((B,), math.log(p)), atol=1e-3, rtol=0)
    assert token_B.diff().tolist() == [1] * (B - 1)
    assert abs(int(token_B[0]) - (V - n_tail // 2)) < 300  # the fp32 softmax may be 1e-7 off: some 50 of them


@pytest.mark.parametrize("narrow", [{}, dict(temperature=0.0), dict(temperature=0.7, top_k=5), dict(top_p=0.9)])
@pytest.mark.parametrize("V", [PART // 3, PART + 5])
def test_drawing_by_parts_draws_the_same_to_the_last_bit(V, narrow, monkeypatch):
    B, generator = 7, torch.Generator().manual_seed(0)
    logits_BV = torch.randn(B, V + 3, generator=generator)[:, :V]
    uniform_B = torch.rand(B, dtype=torch.float64, generator=generator)
    parts = sample_tokens(logits_BV, uniform_B, **narrow)
    monkeypatch.setattr(next_token, "PART", B * V)
    for whole_B, parts_B in zip(sample_tokens(logits_BV, uniform_B, **narrow), parts, strict=True):
        assert torch.equal(whole_B, parts_B)


@pytest.mark.parametrize("V", [50, 2000])
def test_drawn_frequencies_match_the_probabilities_whatever_the_number_of_blocks(V):
    logits_V = torch.randn(V, generator=torch.Generator().manual_seed(0)) * 2
    n_draws = 10_000
    uniform_B = (torch.arange(n_draws, dtype=torch.float64) + 0.5) / n_draws
    token_B, _ = sample_tokens(logits_V.expand(n_draws, -1), uniform_B, temperature=0.8)
    wanted_V = (logits_V.double() / 0.8).softmax(-1) * n_draws
    assert (
        torch.bincount(token_B, minlength=V) - wanted_V
    ).abs().max() < 1.1  # an interval of length p holds p n points of a grid, give or take 1


def chi_square_bound(degrees):
    """Six deviations above the mean: a fair sampler passes it with a probability of some 1e-6."""
    return degrees + 6 * math.sqrt(2 * degrees)


def chi_square(counts, probabilities):
    wanted = [p * sum(counts) for p in probabilities]
    return sum((count - want) ** 2 / want for count, want in zip(counts, wanted, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampled_tokens_follow_the_softmax_of_the_logits_over_the_temperature(temperature):
    logits_VV = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) * 1.5
    completions = generate(
        bigram_model(logits_VV), [[0], [3, 1]], n=400, max_new_tokens=50, temperature=temperature, seed=11
    )
    follows = Counter()
    for first, group in zip((0, 1), ids_of(completions), strict=True):
        for ids in group:
            follows.update(zip([first, *ids], ids, strict=False))
    assert sum(follows.values()) == 40_000
    for u in range(8):
        weights = [math.exp(logit / temperature) for logit in logits_VV[u].tolist()]
        counts = [follows[u, v] for v in range(8)]
        assert chi_square(counts, [w / sum(weights) for w in weights]) < chi_square_bound(7), u


def drawn(p, n=20_000, **narrow):
    """The share of draws that each token gets, over evenly spaced numbers."""
    uniform_B = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    token_B, _ = sample_tokens(torch.tensor(p).log().expand(n, -1), uniform_B, **narrow)
    return (torch.bincount(token_B, minlength=len(p)) / n).tolist()


@pytest.mark.parametrize(
    "narrow, wanted",
    [
        (dict(top_k=1), [0, 1, 0, 0]),
        (dict(top_k=2), [0, 2 / 3, 1 / 3, 0]),  # 0.4 and 0.2
        (dict(top_k=4), [0.19, 0.4, 0.2, 0.21]),
        (dict(top_k=9), [0.19, 0.4, 0.2, 0.21]),
        (dict(top_p=1e-300), [0, 1, 0, 0]),
        (dict(top_p=0.39), [0, 1, 0, 0]),
        (dict(top_p=0.41), [0, 0.4 / 0.61, 0, 0.21 / 0.61]),
        (dict(top_p=0.62), [0, 0.4 / 0.81, 0.2 / 0.81, 0.21 / 0.81]),
        (dict(top_p=0.82), [0.19, 0.4, 0.2, 0.21]),
        (dict(top_k=2, top_p=0.6), [0, 1, 0, 0]),  # 0.4 of the remaining 0.61 is already above 0.6
        (dict(top_k=2, top_p=0.7), [0, 0.4 / 0.61, 0, 0.21 / 0.61]),
        (dict(top_k=3, top_p=0.6), [0, 0.4 / 0.61, 0, 0.21 / 0.61]),
    ],
)
def test_top_k_and_top_p_draw_from_the_set_worked_out_by_hand(narrow, wanted):
    p = [0.19, 0.4, 0.2, 0.21]
    if narrow == dict(top_k=2):
        p, wanted = [0.1, 0.4, 0.2, 0.3], [0, 4 / 7, 0, 3 / 7]
    assert drawn(p, **narrow) == pytest.approx(wanted, abs=1e-3)


def test_of_equal_probabilities_no_more_are_drawn_than_the_set_has_room_for():
    for k in range(1, 6):
        shares = drawn([0.1, 0.2, 0.2, 0.2, 0.2, 0.1], top_k=k)
        assert sum(share > 0 for share in shares) == k
        assert shares[0] == shares[5] == 0 or k == 5
    assert sum(share > 0 for share in drawn([0.25] * 4, top_p=0.5)) == 2
    assert sum(share > 0 for share in drawn([0.25] * 4, top_p=0.51)) == 3
    assert sum(share > 0 for share in drawn([0.25] * 4, top_p=1e-9)) == 1


@pytest.mark.parametrize(
    ("top_k", "top_p", "wanted"),
    [  # of the four 0.2 and the two 0.1, how many are drawn, all alike
        (4, 0.6, 3),  # 0.48 of 0.8: three
        (4, 0.7, 3),  # 0.56
        (4, 0.8, 4),  # 0.64
        (3, 0.6, 2),  # 0.36 of 0.6
        (2, 0.3, 1),
        (6, 0.5, 3),  # top-k leaves all: 0.5 of 1
        (9, 0.5, 3),
        (0, 0.5, 3),
    ],
)
def test_of_equal_probabilities_top_p_keeps_as_many_of_the_k_as_hold_its_share(top_k, top_p, wanted):
    shares = drawn([0.1, 0.2, 0.2, 0.2, 0.2, 0.1], top_k=top_k, top_p=top_p)
    assert sorted(shares)[-wanted:] == pytest.approx([1 / wanted] * wanted, abs=1e-3)


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.integers(0, 6), min_size=1, max_size=12), top_k=st.integers(0, 13), eighths=st.integers(1, 8)
)
def test_narrowing_keeps_the_weights_that_a_walk_down_the_sorted_list_keeps(weights, top_k, eighths):
    weights[0] += 1  # not all of them 0
    candidates, wanted = sorted(weights, reverse=True)[: top_k or None], []
    for weight in candidates:
        if not wanted or sum(wanted) < eighths / 8 * sum(candidates):
            wanted.append(weight)
    kept = next_token.narrow(torch.tensor([weights]).float(), top_k, eighths / 8)[0].tolist()
    assert sorted(filter(None, kept)) == sorted(filter(None, wanted))
    assert all(after in (0, before) for before, after in zip(weights, kept, strict=True))


@pytest.mark.parametrize(("top_k", "widths"), [(7, []), (0, [500])])
def test_top_p_sorts_the_vocabulary_only_where_top_k_has_not_ordered_a_few(top_k, widths):
    """A sort of 512 x 152,000 takes a GPU as long as several steps of a small model."""
    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "sort" in str(function):
                found.append(args[0].shape[-1])
            return function(*args, **kwargs or {})

    with Watch():
        next_token.narrow(torch.rand(2, 500), top_k, 0.9)
    assert found == widths


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(0, 12),
    top_p=st.floats(1e-320, 1.0, exclude_min=True),
    temperature=st.floats(0.05, 5),
)
def test_no_token_outside_the_narrowed_set_is_ever_drawn(seed, top_k, top_p, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(9, generator=generator).mul(2).round()  # with many equal
    uniform_B = torch.rand(500, generator=generator, dtype=torch.float64)
    token_B, _ = sample_tokens(logits_V.expand(500, -1), uniform_B, temperature, top_k, top_p)
    p = (logits_V.double() / temperature).softmax(-1)
    drawn_p = p[token_B.unique()]
    assert len(drawn_p) <= (top_k or 9)
    largest = p.sort(descending=True).values[: top_k or 9]
    assert drawn_p.min() >= largest[-1] * (1 - 1e-6)
    # without the rarest of them, the drawn ones do not hold top_p yet
    assert drawn_p.sum() - drawn_p.min() < top_p * largest.sum() + 1e-6 or len(drawn_p) == 1


def test_top_k_one_is_greedy():
    model = random_model()
    arguments = dict(max_new_tokens=30, stop_ids=[3])
    greedy = generate(model, RAGGED, temperature=0.0, **arguments)
    assert ids_of(generate(model, RAGGED, top_k=1, temperature=1.3, **arguments)) == ids_of(greedy)
    assert ids_of(generate(model, RAGGED, top_p=1e-6, temperature=1.3, **arguments)) == ids_of(greedy)


# ---- random numbers


def test_hash_uniform_is_uniform_and_never_one():
    key_B = torch.arange(1000)[:, None].expand(-1, 200).flatten()  # keys as like one another as can be
    u = hash_uniform(key_B, torch.arange(200).repeat(1000))
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    counts = torch.histc(u.float(), 100, 0, 1).tolist()
    assert chi_square(counts, [0.01] * 100) < chi_square_bound(99)
    assert len(u.unique()) == len(u)
    extremes = hash_uniform(torch.tensor([-(2**63), 2**63 - 1, -1, 0]), torch.tensor([2**40, 0, 2**31, 1]))
    assert ((0 <= extremes) & (extremes < 1)).all()


def test_hash_uniform_is_the_published_generator():
    # SplitMix64 from seed 0 and 1234567: the first outputs printed with its public implementations
    state = torch.tensor([0, 0, 1234567])
    known = torch.tensor([0xE220A8397B1DCDAF >> 11, 0x6E789E6AA1B965F4 >> 11, 6457827717110365317 >> 11])
    u = hash_uniform(state, torch.tensor([1, 2, 1]))
    assert (u * 2**53).long().tolist() == known.tolist()


def test_hash_uniform_is_uncorrelated_over_positions_keys_and_neighbours():
    key_KT, position_KT = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    u = hash_uniform(key_KT.flatten(), position_KT.flatten()).view(300, 300) - 0.5
    lags = [(u[:, lag:] * u[:, :-lag]) for lag in (1, 2, 7)] + [(u[lag:] * u[:-lag]) for lag in (1, 2, 7)]
    for products in [*lags, u[1:, 1:] * u[:-1, :-1], u[1:, :-1] * u[:-1, 1:]]:
        correlation = products.mean() * 12  # over the variance of a uniform number
        assert abs(correlation) < 5 / math.sqrt(products.numel())  # five deviations


def test_keys_of_requests_differ_in_each_part_and_in_their_order():
    keys = [next_token.request_key(seed, p, g) for seed in range(-3, 20) for p in range(20) for g in range(20)]
    assert len(set(keys)) == len(keys)
    assert next_token.request_key(2**64 + 5, 1) == next_token.request_key(5, 1) != next_token.request_key(1, 5)
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_completions_of_a_prompt_differ_and_a_seed_reproduces_them():
    sample = partial(generate, random_model(), [[1, 2], [1, 2]], n=8, max_new_tokens=12)
    first = ids_of(sample(seed=3))
    everything = [tuple(ids) for group in first for ids in group]
    assert len(set(everything)) == 16  # the two prompts are equal, and yet draw their own numbers
    assert ids_of(sample(seed=3)) == first
    other = [tuple(ids) for group in ids_of(sample(seed=4)) for ids in group]
    assert not set(everything) & set(other)


def test_torchs_own_random_state_is_neither_used_nor_moved():
    model = random_model()
    torch.manual_seed(0)
    first, after = generate(model, RAGGED, max_new_tokens=5), torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == after
    assert ids_of(generate(model, RAGGED, max_new_tokens=5)) == ids_of(first)


def test_a_prompt_with_its_own_seed_draws_the_same_wherever_it_stands():
    model, prompts, seeds = random_model(), RAGGED[:4], [9, 8, 7, 2**70]
    forwards = generate(model, prompts, n=2, max_new_tokens=20, seed=seeds)
    backwards = generate(model, prompts[::-1], n=2, max_new_tokens=20, seed=seeds[::-1])
    assert ids_of(forwards) == ids_of(backwards)[::-1]
    twice = generate(model, [prompts[0]] * 3, max_new_tokens=20, seed=[9, 9, 1])
    assert ids_of(twice)[0] == ids_of(twice)[1] != ids_of(twice)[2]


# ---- callers


def test_on_token_hears_every_token_once_in_the_order_of_its_request():
    heard = {}
    completions = generate(
        random_model(), RAGGED, n=3, max_new_tokens=20, max_rows=4, stop_ids=[3, 4, 5],
        on_token=lambda p, g, token: heard.setdefault((p, g), []).append(token),
    )  # fmt: skip
    assert heard == {(p, g): ids for p, group in enumerate(ids_of(completions)) for g, ids in enumerate(group)}


@pytest.mark.parametrize("is_stepwise", [False, True])
@pytest.mark.parametrize("stop_texts", [[], ["56"]])
def test_progress_tells_each_token_and_each_end_once(is_stepwise, stop_texts):
    heard, sampler = [], Sampler(random_model(), 4, is_stepwise=is_stepwise)
    completions_PG = sampler.generate(
        RAGGED, n=3, max_new_tokens=40, stop_ids=[3, 4, 5], stop_texts=stop_texts, decode=digits,
        on_progress=lambda *event: heard.append(event),
    )  # fmt: skip
    lengths = [len(ids) for group in ids_of(completions_PG) for ids in group]
    n_tokens, ended = zip(*heard, strict=True)
    assert sum(n_tokens) == sum(lengths) and min(n_tokens) >= 0 and len(heard) > 10
    assert sorted(sum(ended, [])) == sorted(lengths)


def test_who_asks_for_progress_alone_does_not_make_a_stepwise_sampler_look_more_often():
    n_looks = []
    for arguments in ({}, dict(on_progress=lambda *_: None), dict(on_token=lambda *_: None)):
        sampler = Sampler(random_model(), 4, is_stepwise=True)
        n_looks.append(0)

        def step(*arguments, make=sampler.step):
            n_looks[-1] += 1
            return make(*arguments)

        sampler.step = step
        sampler.generate(RAGGED, n=2, max_new_tokens=40, **arguments)
    assert n_looks[0] == n_looks[1] < n_looks[2] / 3


def test_no_prompts_give_no_completions():
    assert generate(random_model(), [], max_new_tokens=5) == []


def test_the_model_can_be_trained_after_it_has_sampled():
    model = random_model()
    completions = generate(model, RAGGED, max_new_tokens=5)
    ids_N = torch.tensor(completions[0][0].ids)
    model.logits(model(ids_N, torch.tensor([0, len(ids_N)]))).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1] * 256]), "prompt 0 is 256 tokens; the model's context is 256"),
        (dict(prompts=[[1], [1], [1] * 300]), "prompt 2 is 300 tokens; the model's context is 256"),
        (dict(n=0), "n 0, max_new_tokens 5: each must be at least 1"),
        (dict(max_new_tokens=0), "n 1, max_new_tokens 0: each must"),
        (dict(max_rows=0), "max_rows is 0"),
        (dict(temperature=-0.5), "temperature -0.5"),
        (dict(temperature=math.nan), "temperature nan"),
        (dict(temperature=math.inf), "temperature inf"),
        (dict(top_k=-1), "top_k -1"),
        (dict(top_p=0.0), "top_p 0.0"),
        (dict(top_p=1.5), "top_p 1.5"),
        (dict(top_p=math.nan), "top_p nan"),
        (dict(seed=[1, 2]), "2 seeds for 1 prompts"),
        (dict(stop_texts=["x"]), "stop_texts need decode"),
        (dict(stop_texts="stop", decode=decode_bytes), "stop_texts is 'stop'; it must be a list"),
        (dict(stop_texts=["x", ""], decode=decode_bytes), "of at least one character"),
    ],
)
def test_what_a_caller_can_get_wrong_is_said_in_one_sentence(arguments, message):
    with pytest.raises(ValueError) as error:
        generate(random_model(), **dict(prompts=[[1]], max_new_tokens=5) | arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_numbers_are_an_error_and_not_tokens(temperature):
    model = random_model()
    model.model.embed_tokens.weight.data[5] = math.nan
    with pytest.raises(ValueError, match="the model's logits after prompt 1 are not numbers"):
        generate(model, [[1], [5]], max_new_tokens=3, temperature=temperature, top_k=1)


def test_a_sampler_whose_weights_are_mended_samples_again():
    model = random_model()
    engine, weight = Sampler(model), model.model.embed_tokens.weight.data
    before = weight[5].clone()
    weight[5] = math.nan
    with pytest.raises(ValueError, match="the model's logits after prompt 0 are not numbers"):
        engine.generate([[5]], max_new_tokens=9)
    weight[5] = before
    assert engine.generate([[5]], max_new_tokens=2) == generate(model, [[5]], max_new_tokens=2)


# ---- caches that are kept and continued

KEEPING = dict(max_new_tokens=9, temperature=1.0, stop_ids=[3, 5], keep=True)


@pytest.fixture(params=["first rows", "stepwise"])
def is_stepwise(request):
    return request.param == "stepwise"


def extended(prompts, completions_PG, extra=()):
    """Each completion behind its prompt, and what is kept of it."""
    made = [(prompt, completion) for prompt, group in zip(prompts, completions_PG, strict=True) for completion in group]
    return [prompt + completion.ids + list(extra) for prompt, completion in made], [c.kept for _, c in made]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("extra", [(), (7,), (7, 8, 9)])
def test_continuing_a_kept_cache_gives_what_reading_the_tokens_again_gives(config, extra, is_stepwise):
    model, prompts = random_model(config), random_prompts([5, 1, 12])
    engine = Sampler(model, max_rows=4, is_stepwise=is_stepwise)  # fewer rows than the 9 requests
    longer, kept = extended(prompts, engine.generate(prompts, n=3, **KEEPING), extra)
    arguments = dict(n=2, max_new_tokens=6, temperature=1.0, seed=list(range(9)))
    continued = engine.generate(longer, behind=kept, **arguments)
    for ours, fresh in zip(sum(continued, []), sum(generate(model, longer, **arguments), []), strict=True):
        assert ours.ids == fresh.ids
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(fresh.logprobs), atol=1e-4, rtol=0)


def test_a_prompt_that_leaves_a_kept_text_takes_over_only_what_they_share(is_stepwise):
    model, prompts = random_model(), random_prompts([6, 6])
    engine = Sampler(model, is_stepwise=is_stepwise)
    made = engine.generate(prompts, n=2, **KEEPING | dict(stop_ids=[]))
    turned = [prompts[0] + made[0][1].ids[:4] + [1, 2], prompts[1][:3] + [50], prompts[1], random_prompts([200])[0]]
    behind, arguments = [made[0][1].kept, made[1][0].kept, made[1][1].kept, None], dict(max_new_tokens=6, temperature=0)
    ours = engine.generate(turned, behind=behind, **arguments)
    assert [g[0].ids for g in ours] == [g[0].ids for g in generate(model, turned, **arguments)]


def test_what_is_taken_over_is_not_read_again(monkeypatch):
    model, prompts, read = random_model(), random_prompts([30, 40]), watched_forwards(monkeypatch)
    engine = Sampler(model)
    longer, kept = extended(prompts, engine.generate(prompts, n=2, **KEEPING))
    engine.generate(longer, max_new_tokens=4, behind=kept)
    assert read == [prompts[0] + prompts[1]], "the last token of each is the next step's"
    more = random_prompts([65])[0]
    engine.generate([longer[0] + more], max_new_tokens=4, behind=kept[:1])
    assert read[1:] == [longer[0][-1:] + more]


def test_chains_of_kept_calls_equal_one_long_completion(is_stepwise):
    model, prompts = random_model(), random_prompts([4, 9])
    engine = Sampler(model, is_stepwise=is_stepwise)
    texts, kept = prompts, None
    for _ in range(4):
        made = engine.generate(texts, max_new_tokens=5, temperature=0, keep=True, behind=kept)
        texts, kept = extended(texts, made)
    whole = generate(model, prompts, max_new_tokens=20, temperature=0)
    assert texts == [prompt + group[0].ids for prompt, group in zip(prompts, whole, strict=True)]


def test_a_cache_is_kept_only_where_it_is_asked_for():
    engine, prompts = Sampler(random_model()), random_prompts([4, 4])
    plain, kept = (engine.generate(prompts, max_new_tokens=3, keep=keep) for keep in (False, True))
    assert plain == kept and {made.kept for (made,) in plain} == {None}
    assert [list(made.kept.ids) for (made,) in kept] == [
        p + made.ids[:-1] for p, (made,) in zip(prompts, kept, strict=True)
    ]
    with pytest.raises(ValueError, match="1 kept caches for 2 prompts"):
        engine.generate(prompts, max_new_tokens=2, behind=[None])


# ---- sessions


def asking(prompts, lengths, n, seed):
    """Ask for completions of some prompts, and then of each first one behind its prompt, and so on."""
    texts, kept, heard = prompts, [None] * len(prompts), []
    for turn, length in enumerate(lengths):
        made = yield [
            Prompt(ids, n, length, request_key(seed, turn, p), behind)
            for p, (ids, behind) in enumerate(zip(texts, kept, strict=True))
        ]
        heard.append([[completion.ids for completion in group] for group in made])
        texts = [ids + group[0].ids for ids, group in zip(texts, made, strict=True)]
        kept = [group[0].kept for group in made]
    return heard


@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_sessions_get_what_calls_of_their_own_would_have_got(max_rows, is_stepwise):
    """Of different lengths and numbers of prompts, so that they go on at different times; one asks for nothing."""
    model = random_model()
    plans = [([5, 2], [3, 9, 1], 2), ([30], [20], 3), ([1, 1, 1], [4] * 6, 1), ([8], [40, 2], 2), ([9], [], 1)]
    plans = [(random_prompts(sizes, seed=i), lengths, n, i) for i, (sizes, lengths, n) in enumerate(plans)]
    sampling = dict(temperature=1.0, stop_ids=[3])
    together = Sampler(model, max_rows, is_stepwise=is_stepwise).run([asking(*plan) for plan in plans], **sampling)
    for heard, (texts, lengths, n, seed) in zip(together, plans, strict=True):
        assert len(heard) == len(lengths)
        for turn, (groups, length) in enumerate(zip(heard, lengths, strict=True)):
            seeds = [request_key(seed, turn, p) for p in range(len(texts))]
            alone = generate(model, texts, n=n, max_new_tokens=length, seed=seeds, **sampling)
            assert groups == [[made.ids for made in group] for group in alone]
            texts = [ids + group[0] for ids, group in zip(texts, groups, strict=True)]


def test_sessions_read_what_all_begin_with_once_and_make_room_when_prompts_outgrow_the_slots(monkeypatch):
    model, head = random_model(), random_prompts([100])[0]
    plans = [([head + tail], [20, 60, 40], 1, i) for i, tail in enumerate(random_prompts([3, 1, 20, 8], seed=1))]
    alone = [Sampler(model).run([asking(*plan)], temperature=0)[0] for plan in plans]
    read, engine = watched_forwards(monkeypatch), Sampler(model, 2)
    assert engine.run([asking(*plan) for plan in plans], temperature=0) == alone
    assert read[0] == head and sum(map(len, read)) == 100 + 32 and engine.slots.room == 256


def test_no_session_waits_for_another(monkeypatch):
    """One long request beside chains of short ones: the steps of the model are those of the longest chain, not more."""
    model, decode, n_steps = random_model(), Transformer.decode, []
    monkeypatch.setattr(Transformer, "decode", lambda *rest: (n_steps.append(1), decode(*rest))[1])
    plans = [([[1, 2]], [60], 1, 0)] + [([[3, 4]], [6] * 10, 1, seed) for seed in range(1, 4)]
    Sampler(model, 4, is_stepwise=False).run([asking(*plan) for plan in plans], temperature=1.0)
    assert 59 <= len(n_steps) < 70


def test_what_a_session_can_get_wrong_is_said():
    def session(*prompts):
        yield list(prompts)

    engine = Sampler(random_model())
    for prompt, message in (
        (Prompt([], 1, 3, 0), "prompt 1 is empty"),
        (Prompt([1] * 256, 1, 3, 0), "prompt 1 is 256 tokens; the model's context is 256"),
        (Prompt([1], 0, 3, 0), "n 0, max_new_tokens 3"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.run([session(Prompt([1], 1, 1, 0)), session(prompt)])
    assert engine.run([]) == []


# ---- confidences


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_a_confidence_is_minus_the_mean_log_probability_of_the_likeliest_tokens(temperature, is_stepwise):
    logits_VV = torch.randn(12, 12, generator=torch.Generator().manual_seed(1)) * 3
    engine = Sampler(bigram_model(logits_VV), is_stepwise=is_stepwise)
    (made,) = engine.generate([[2]], max_new_tokens=10, temperature=temperature, vocab_size=9, confidence_k=4)[0]
    logp_VV = (logits_VV[:, :9].double() / (temperature or 1)).log_softmax(-1)
    expected = [-logp_VV[before].sort().values[-4:].mean() for before in [2, *made.ids[:-1]]]
    torch.testing.assert_close(torch.tensor(made.confidences), torch.stack(expected).float(), atol=1e-4, rtol=1e-4)


def test_confidences_are_there_only_where_asked_for_and_change_no_draw():
    model, prompts = random_model(), random_prompts([3, 8])
    plain = generate(model, prompts, n=2, max_new_tokens=7)
    asked = generate(model, prompts, n=2, max_new_tokens=7, confidence_k=100)  # more than there are tokens
    assert {made.confidences for made in sum(plain, [])} == {None}
    assert [made.ids for made in sum(plain, [])] == [made.ids for made in sum(asked, [])]
    assert all(len(made.confidences) == len(made.ids) for made in sum(asked, []))


# ---- what all prompts begin with


def test_what_all_prompts_begin_with_is_read_once_and_changes_nothing(is_stepwise, monkeypatch):
    model, head, tails = random_model(), random_prompts([50])[0], random_prompts([3, 1, 20, 8], seed=1)
    prompts, arguments = [head + tail for tail in tails], dict(n=3, max_new_tokens=8)
    alone = [generate(model, [prompt], seed=[i], **arguments)[0] for i, prompt in enumerate(prompts)]
    read = watched_forwards(monkeypatch)
    together = Sampler(model, max_rows=5, is_stepwise=is_stepwise).generate(prompts, seed=[0, 1, 2, 3], **arguments)
    assert read[0] == head and sum(map(len, read)) == 50 + 32 and len(read) > 2, "once, however many batches follow"
    for ours, theirs in zip(sum(together, []), sum(alone, []), strict=True):
        assert ours.ids == theirs.ids
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-4, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=2, max_size=5))
def test_the_common_beginning_is_the_longest_that_leaves_each_prompt_a_token(prompts):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(nanor1.sampler, "MIN_SHARED", 1)
        kept = read_beginning(counting_model(), prompts)
    n = len(kept.ids) if kept else 0
    assert len({tuple(prompt[:n]) for prompt in prompts}) == 1 and n < min(map(len, prompts))
    longer = {tuple(prompt[: n + 1]) for prompt in prompts}
    assert len(longer) > 1 or n + 1 == min(map(len, prompts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpus_cache_grows_with_its_longest_row_and_is_given_back(dtype):
    model = random_model().to(dtype)
    sampler, lengths = Sampler(model, max_rows=2), []
    grown = sampler.generate([[1, 2, 3], [4] * 9], max_new_tokens=60, on_token=lambda *_: lengths.append(held(sampler)))
    assert lengths == sorted(lengths) and lengths[0] == 32 and lengths[-1] == 96 and set(lengths) == {32, 64, 96}
    assert held(sampler) == 0
    fixed = Sampler(model, max_rows=2)
    fixed.reserve(2, 9, 60)
    fixed.slots.cache.resize(fixed.slots.room)  # grown at once
    assert ids_of(fixed.generate([[1, 2, 3], [4] * 9], max_new_tokens=60)) == ids_of(grown)


def held(sampler):
    return sampler.slots.cache.max_len
