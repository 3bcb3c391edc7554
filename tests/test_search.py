import gc
import itertools
import json
import math
import os
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import randomize
from vocabularies import of_bytes

from nanor1.model import KVCache, ModelConfig, Transformer
from nanor1.sampler import Completion, Sampler
from nanor1.search import think_longer
from nanor1.search.step_beams import beam_search, mean_logprob, reward_scorer
from nanor1.search.think_longer import REQUEST, Budget, force_budget, refine
from nanor1.search.token_beams import token_beam_search
from nanor1.stages import reward_model
from nanor1.tokenizer import Tokenizer

VOCAB, KNOWN = 61, 55  # the rows of the output matrix, and the tokens that a tokenizer would have
LLAMA = ModelConfig("llama", VOCAB, 32, 40, 2, 4, 2, 8, 64)
STOPS, MANY_STOPS = [7, 8], range(14)
PROMPTS = [[1, 2, 3], [9], [4, 5, 6, 20, 30, 40, 50], [3, 2, 1, 33]]
SEEDS = [11, 12, 13, 14]


def random_model(config=LLAMA, seed=0, kind=Transformer):
    return randomize(kind(config), seed)


def bigram_model(logp_VV, context=64):
    """A model whose log-probabilities after token u are row u of `logp_VV`, whatever came before."""
    V = len(logp_VV)
    model = Transformer(ModelConfig("llama", V, V, 4, 1, 1, 1, 2, context, norm_eps=1e-30))
    for parameter in model.model.layers.parameters():
        parameter.data.zero_()
    model.model.embed_tokens.weight.data.copy_(torch.eye(V))  # its norm is one token in V entries: V ** 0.5 high
    model.lm_head.weight.data.copy_(logp_VV.T / V**0.5)
    return model


class Spy(Sampler):
    """Remembers what its sessions asked for and what was made: (session, prompts, completions), in time's order."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.calls = []

    def run(self, sessions, **arguments):
        return super().run([self.watch(i, session) for i, session in enumerate(sessions)], **arguments)

    def watch(self, i, session):
        made_PG = None
        while True:
            try:
                prompts = session.send(made_PG)
            except StopIteration as end:
                return end.value
            made_PG = yield prompts
            self.calls.append((i, prompts, made_PG))

    @property
    def n_sampled(self):
        return sum(len(made.ids) for _, _, made_PG in self.calls for group in made_PG for made in group)


class Forgetful(Spy):
    """Prefills all prompts afresh."""

    def watch(self, i, session):
        made_PG = None
        while True:
            try:
                prompts = session.send(made_PG)
            except StopIteration as end:
                return end.value
            made_PG = yield [replace(prompt, behind=None) for prompt in prompts]


def lines(ids):
    """Tokens as text; every fourth one ends a line."""
    return "".join(f"{i}\n" if i % 4 == 0 else f"{i} " for i in ids)


def search(sampler, prompts=PROMPTS, seeds=SEEDS, **arguments):
    defaults = dict(
        width=3, branching=4, scorer=mean_logprob, max_new_tokens=14, decode=lines, stop_ids=STOPS, vocab_size=KNOWN,
    )  # fmt: skip
    return beam_search(sampler, prompts, seeds=seeds, **defaults | arguments)


def answers_of(found):
    return [
        [(made.ids, made.finish, round(score, 3)) for made, score in zip(f.completions, f.scores, strict=True)]
        for f in found
    ]


def tokens_through(model, monkeypatch):
    """A list of the numbers of tokens of each pass through the model."""
    sizes, run = [], model._run
    monkeypatch.setattr(model, "_run", lambda ids_N, *rest: (sizes.append(len(ids_N)), run(ids_N, *rest))[1])
    return sizes


# ---- toy models of which everything is known


LETTERS = "abcd."
STOP = LETTERS.index(".")


def letters(ids):
    return "".join(LETTERS[i] for i in ids)


def table(**rows):
    """Log-probabilities after each letter; what is not named has probability 0, and a letter without a row stops."""
    p = torch.zeros(len(LETTERS), len(LETTERS))
    for i, letter in enumerate(LETTERS):
        for following, probability in rows.get(letter, {".": 1.0}).items():
            p[i, LETTERS.index(following)] = probability
    return p.log().clamp(min=-1e4)


# Greedy takes b (0.55), then a dead end of thirds: 0.19 at most. The best is c, then d: 0.45 * 0.9 * 1.
TRAP = table(a=dict(b=0.55, c=0.45), b=dict(b=0.3, c=0.36, d=0.34), c={"d": 0.9, "c": 0.1})


def random_table(seed):
    return torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)


def every_answer(logp_VV, first, max_tokens):
    """All answers with their log-probabilities: stopped ones, and those of the most tokens."""
    for n in range(1, max_tokens + 1):
        for ids in itertools.product(range(len(logp_VV)), repeat=n):
            if STOP not in ids[:-1] and (ids[-1] == STOP or n == max_tokens):
                yield list(ids), sum(logp_VV[u, v].item() for u, v in zip([first, *ids], ids, strict=False))


def sum_logprob(prompts, completions):
    return [sum(made.logprobs) for made in completions]


def greedy_ids(model, prompt, max_new_tokens, stop_ids, vocab_size=None):
    arguments = dict(max_new_tokens=max_new_tokens, stop_ids=stop_ids, vocab_size=vocab_size, temperature=0.0)
    return Sampler(model).generate([prompt], **arguments)[0][0].ids


def test_step_beam_search_finds_the_best_answer_that_greedy_misses():
    model = bigram_model(TRAP)
    best_ids, best_logp = max(every_answer(TRAP, 0, 4), key=lambda answer: answer[1])
    assert letters(best_ids) == "cd." and greedy_ids(model, [0], 4, [STOP]) != best_ids
    (found,) = beam_search(
        Sampler(model), [[0]], width=3, branching=12, scorer=sum_logprob, max_new_tokens=4, seeds=[1],
        decode=letters, step_texts=list("abcd"), stop_ids=[STOP],
    )  # fmt: skip
    assert found.completions[0].ids == best_ids and found.scores[0] == pytest.approx(best_logp, abs=1e-4)
    assert found.scores == sorted(found.scores, reverse=True)


def test_token_beam_search_of_width_two_finds_the_best_answer_that_greedy_misses():
    (found,) = token_beam_search(bigram_model(TRAP), [[0]], width=2, max_new_tokens=4, stop_ids=[STOP])
    assert letters(found.completions[0].ids) == "cd." and found.scores[0] == pytest.approx(math.log(0.405), abs=1e-4)
    (found,) = token_beam_search(bigram_model(TRAP), [[0]], width=1, max_new_tokens=4)
    assert found.completions[0].ids == greedy_ids(bigram_model(TRAP), [0], 4, [])


@pytest.mark.parametrize("seed", range(4))
def test_a_token_beam_that_holds_everything_ranks_all_answers_there_are(seed):
    logp_VV = random_table(seed)
    (found,) = token_beam_search(bigram_model(logp_VV), [[2]], width=5**4, max_new_tokens=4, stop_ids=[STOP])
    wanted = {tuple(ids): logp for ids, logp in every_answer(logp_VV, 2, 4)}
    assert {tuple(made.ids) for made in found.completions} == wanted.keys() and len(found.scores) == len(wanted)
    assert found.scores == pytest.approx([wanted[tuple(made.ids)] for made in found.completions], abs=1e-4)
    assert found.scores == sorted(found.scores, reverse=True)
    assert all((made.finish == "stop") == (made.ids[-1] == STOP) for made in found.completions)


# ---- token beams of a transformer


@torch.no_grad()
def naive_token_beams(model, prompt, width, max_new_tokens):
    """The same search without a cache, without batching, and without stopping before the last token."""
    live, finished = [([], 0.0)], []
    for _ in range(max_new_tokens):
        candidates = []
        for ids, before in live:
            sequence = torch.tensor(prompt + ids)
            logits_V = model.logits(model(sequence, torch.tensor([0, len(sequence)]))[-1:])[0, :KNOWN]
            candidates += [([*ids, v], before + logp) for v, logp in enumerate(logits_V.log_softmax(-1).tolist())]
        best = sorted(candidates, key=lambda c: -c[1])[:width]
        finished += [c for c in best if c[0][-1] in MANY_STOPS]
        live = [c for c in best if c[0][-1] not in MANY_STOPS]
    ranked = sorted(((total, ids) for ids, total in finished + live), reverse=True)
    return ranked[:width]


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_token_beams_are_those_of_a_naive_search(width):
    for seed, prompt in enumerate(PROMPTS[:3]):
        model = random_model(seed=seed)
        (found,) = token_beam_search(
            model, [prompt], width=width, max_new_tokens=7, stop_ids=MANY_STOPS, vocab_size=KNOWN
        )
        wanted = naive_token_beams(model, prompt, width, 7)
        assert [made.ids for made in found.completions] == [ids for _, ids in wanted]
        assert found.scores == pytest.approx([score for score, _ in wanted], abs=1e-4)
        assert max(token for made in found.completions for token in made.ids) < KNOWN
        assert found.n_prompt == len(prompt) and found.n_sampled <= 7 * width


def test_a_token_beam_of_width_one_is_greedy():
    model = random_model()
    for prompt in PROMPTS[1:3]:  # up to the end of the context, or a stop token
        (found,) = token_beam_search(model, [prompt], width=1, max_new_tokens=99, stop_ids=STOPS)
        (made,) = found.completions
        (wanted,) = Sampler(model).generate([prompt], max_new_tokens=99, stop_ids=STOPS, temperature=0.0)[0]
        assert (made.ids, made.finish) == (wanted.ids, wanted.finish)
        assert made.logprobs == pytest.approx(wanted.logprobs, abs=1e-4) and found.n_sampled == len(wanted.ids)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_token_beams_of_many_prompts_are_those_of_each_alone(width):
    """They end at different times, and their prompts begin alike or not."""
    model, shared = random_model(), [*range(5, 45)]
    arguments = dict(width=width, max_new_tokens=9, vocab_size=KNOWN)
    for prompts in (PROMPTS * 2, [shared + prompt for prompt in PROMPTS]):
        for stop_ids in (STOPS, MANY_STOPS):
            heard = []
            together = token_beam_search(
                model,
                prompts,
                stop_ids=stop_ids,
                on_progress=lambda *event, heard=heard: heard.append(event),
                **arguments,
            )
            alone = [token_beam_search(model, [prompt], stop_ids=stop_ids, **arguments)[0] for prompt in prompts]
            assert answers_of(together) == answers_of(alone)
            assert [(f.n_sampled, f.n_prompt) for f in together] == [(f.n_sampled, f.n_prompt) for f in alone]
            n_tokens, ended = zip(*heard, strict=True)
            assert sum(n_tokens) == sum(f.n_sampled for f in together)
            assert sorted(sum(ended, [])) == sorted(f.n_sampled for f in together)
    assert len({len(f.completions[0].ids) for f in together}) > 1
    assert token_beam_search(model, [], **arguments) == []


# ---- beams of steps


def test_a_step_beam_of_width_one_without_branching_is_greedy():
    model = random_model()
    found = search(Sampler(model), width=1, branching=1, temperature=0.0, max_new_tokens=25)
    wanted = Sampler(model).generate(PROMPTS, max_new_tokens=25, stop_ids=STOPS, vocab_size=KNOWN, temperature=0.0)
    assert [f.completions[0].ids for f in found] == [made.ids for (made,) in wanted]
    assert [f.completions[0].finish for f in found] == [made.finish for (made,) in wanted]
    for f, (made,) in zip(found, wanted, strict=True):
        assert f.completions[0].logprobs == pytest.approx(made.logprobs, abs=1e-4) and f.n_sampled == len(made.ids)
        assert len(f.completions) == 1


@settings(max_examples=15)
@given(
    width=st.integers(1, 4), branching=st.integers(1, 3), trees=st.integers(1, 3), max_new_tokens=st.integers(1, 20),
    temperature=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_step_beams_keep_to_their_places_and_limits(width, branching, trees, max_new_tokens, temperature, seed):
    sampler = Spy(random_model(seed=seed % 3))
    found = search(
        sampler, [PROMPTS[0]], [seed], width=width, branching=branching, trees=trees, max_new_tokens=max_new_tokens,
        temperature=temperature,
    )  # fmt: skip
    (found,) = found
    ids = [made.ids for made in found.completions]
    assert 1 <= len(ids) <= width * trees and len(found.scores) == len(ids)
    assert max(Counter(map(tuple, ids)).values()) <= trees  # each tree has none of its own twice
    for made in found.completions:
        is_stopped = made.ids[-1] in STOPS
        assert made.finish == ("stop" if is_stopped else "length")
        assert is_stopped or len(made.ids) == max_new_tokens
        assert len(made.ids) == len(made.logprobs) <= max_new_tokens and max(made.ids) < KNOWN
        assert not set(made.ids[:-1]) & set(STOPS)
    assert found.scores == pytest.approx(mean_logprob([], found.completions))
    assert found.scores == sorted(found.scores, reverse=True)
    assert found.n_sampled == sampler.n_sampled and found.n_inserted == 0
    # a beam that is gone on with is no answer, and with the answers that are there already it fits in the places
    for _, prompts, _ in [call for call in sampler.calls if call[1][0].ids != PROMPTS[0]]:
        assert len(prompts) <= width
        assert trees > 1 or not {tuple(prompt.ids) for prompt in prompts} & {(*PROMPTS[0], *made) for made in ids}
    assert all(made.kept is None for made in found.completions)


def test_a_finished_beam_takes_its_place_along():
    """Half of the first tokens stop at once, and a stop scores best: three places are left after the first step."""
    logp_VV = table(a={".": 0.5, "b": 0.5}, b={"b": 0.5, "c": 0.4, "d": 0.1}, c={"c": 0.5, "b": 0.5}, d={"d": 1.0})
    sampler = Spy(bigram_model(logp_VV))
    (found,) = beam_search(
        sampler, [[0]], width=4, branching=8, max_new_tokens=3, seeds=[0], decode=letters,
        scorer=lambda _, made: [float(m.ids[-1] == STOP) for m in made], step_texts=list("abcd"), stop_ids=[STOP],
    )  # fmt: skip
    texts = [letters(made.ids) for made in found.completions]
    assert texts[0] == "." and sorted(map(len, texts[1:])) == [3, 3, 3] and len(set(texts)) == 4
    assert [[prompt.n for prompt in prompts] for _, prompts, _ in sampler.calls] == [[32], [8], [8, 8, 8]]


def test_a_search_that_ends_early_is_not_padded():
    """Only two different answers exist."""
    model = bigram_model(table(a=dict(b=0.5, c=0.5)))
    (found,) = beam_search(
        Sampler(model), [[0]], width=4, branching=4, max_new_tokens=9, seeds=[0], decode=letters,
        scorer=mean_logprob, step_texts=list("abcd"), stop_ids=[STOP],
    )  # fmt: skip
    assert sorted(letters(made.ids) for made in found.completions) == ["b.", "c."]


def test_the_end_of_the_context_finishes_a_beam():
    prompt = list(range(20, 50)) * 2  # 4 tokens are left
    (found,) = search(Sampler(random_model()), [prompt], [1], stop_ids=[], max_new_tokens=99)
    assert {(len(made.ids), made.finish) for made in found.completions} == {(4, "length")}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_problems_answers_do_not_depend_on_the_other_problems(temperature):
    model = random_model()
    arguments = dict(trees=2, temperature=temperature)
    together = answers_of(search(Sampler(model), **arguments))
    backwards = answers_of(search(Sampler(model), PROMPTS[::-1], SEEDS[::-1], **arguments))
    alone = [answers_of(search(Sampler(model), [p], [s], **arguments))[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert together == backwards[::-1] == alone
    assert temperature == 0 or answers_of(search(Sampler(model), seeds=[1, 2, 3, 4], **arguments)) != together


def test_a_tree_gives_what_it_gives_alone():
    """The answers of k trees are among those of k + 1, and every tree has found its own."""
    model = random_model()
    of_trees = [search(Sampler(model), width=1, trees=k) for k in (1, 2, 3)]
    for fewer, more in itertools.pairwise(of_trees):
        for a, b in zip(answers_of(fewer), answers_of(more), strict=True):
            assert not Counter(map(str, a)) - Counter(map(str, b)) and len(b) == len(a) + 1
    assert len({tuple(made.ids) for made in of_trees[2][0].completions}) > 1
    spent = [[(f.n_sampled, f.n_prompt) for f in found] for found in of_trees]
    assert all(a < b < c for p in range(4) for a, b, c in zip(*(of_k[p] for of_k in spent), strict=True))
    for one, two, three in zip(*of_trees, strict=True):
        assert [*one.n_sampled_by_tree, *two.n_sampled_by_tree[1:]] == three.n_sampled_by_tree[:2]
        assert sum(three.n_sampled_by_tree) == three.n_sampled and sorted(three.tree_of) == [0, 1, 2]
        (of_first,) = [made for made, tree in zip(three.completions, three.tree_of, strict=True) if tree == 0]
        assert of_first.ids == one.completions[0].ids


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_cache_that_is_taken_over_changes_no_beam(temperature):
    model = random_model()
    arguments = dict(trees=2, temperature=temperature, max_new_tokens=30)
    kept, afresh = (search(kind(model), **arguments) for kind in (Sampler, Forgetful))
    assert [[made.ids for made in f.completions] for f in kept] == [
        [made.ids for made in f.completions] for f in afresh
    ]
    for a, b in zip(kept, afresh, strict=True):
        for x, y in zip(a.completions, b.completions, strict=True):
            torch.testing.assert_close(torch.tensor(x.logprobs), torch.tensor(y.logprobs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("n_problems", [8, 40])
def test_caches_of_dropped_beams_are_given_back_and_few_problems_are_begun_at_once(n_problems, monkeypatch):
    model, alive, most = random_model(), weakref.WeakSet(), [0]
    init = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *rest: (alive.add(self), init(self, *rest))[1])

    def scorer(prompts, completions):
        most[0] = max(most[0], sum(cache.k[0].shape[0] for cache in alive))
        return mean_logprob(prompts, completions)

    sizes = dict(width=2, branching=4, max_new_tokens=30, stop_ids=[])
    search(Sampler(model, 16), [[9, i] for i in range(n_problems)], list(range(n_problems)), scorer=scorer, **sizes)
    assert most[0] < 16 + 1 + 16 + 2 * (2 * 16)  # slots, a prefill, two waves of candidates and what they go on from
    gc.collect()
    assert sum(cache.k[0].shape[0] for cache in alive) <= 17, "but for the slots nothing is left"


def test_what_was_read_and_sampled_is_what_went_through_the_model(monkeypatch):
    model = random_model()
    sampler, sizes = Spy(model, 4), tokens_through(model, monkeypatch)
    found = search(sampler, trees=2)
    n_last = sum(len(group) for _, _, made_PG in sampler.calls for group in made_PG)  # a last token is never read
    steps = [prompt for _, prompts, _ in sampler.calls if prompts[0].behind for prompt in prompts]
    n_again = sum(prompt.n - 1 for prompt in steps)  # the last token of a beam is read in each of its rows, at no cost
    assert sum(sizes) == sum(f.n_prompt + f.n_sampled for f in found) - n_last + n_again
    n_beams = len(steps)
    assert sum(f.n_prompt for f in found) == 2 * sum(map(len, PROMPTS)) + n_beams


# ---- scorers


BYTES = of_bytes()
EOS = BYTES.eos_id
SCORER_CONFIG = ModelConfig("llama", BYTES.vocab_size, 24, 40, 2, 4, 2, 6, 96)


def made(text, has_stop=False):
    ids = BYTES.encode(text) + [EOS] * has_stop
    return Completion(ids, [-1.0] * len(ids), "stop" if has_stop else "length")


def test_the_reward_scorer_scores_the_text_so_far_as_a_final_answer():
    judge = random_model(SCORER_CONFIG, kind=reward_model.RewardModel)
    scorer = reward_scorer(judge, BYTES, 10_000)
    prompts = [BYTES.encode("2 + 2?")] * 2 + [BYTES.encode("Go. <think>")]
    scores = scorer(prompts, [made("It is 4.\n"), made("It is 4.", has_stop=True), made("hm</think> 5")])
    finals = ["It is 4.", "It is 4.", "5"]
    assert scores == pytest.approx(reward_model.score(judge, BYTES, prompts, finals, 10_000))
    assert scores[0] == pytest.approx(scores[1]) and scores[0] != pytest.approx(scores[2], abs=1e-3)


@pytest.mark.parametrize("prompt, text", [("Go.", "<think> 2 + 2"), ("Go. <think>\n", "2 + 2 is 4")])
def test_the_reward_scorer_refuses_a_text_that_is_still_thinking(prompt, text):
    scorer = reward_scorer(random_model(SCORER_CONFIG, kind=reward_model.RewardModel), BYTES, 10_000)
    with pytest.raises(ValueError, match="judges final answers, and this one is still thinking"):
        scorer([BYTES.encode(prompt)], [made(text)])


def test_a_beam_search_is_led_by_a_reward_model_and_one_without_a_score_comes_last():
    judge = random_model(SCORER_CONFIG, kind=reward_model.RewardModel)
    scorer = reward_scorer(judge, BYTES, 10_000)
    model, prompt = random_model(SCORER_CONFIG, seed=3), BYTES.encode("ab")
    arguments = dict(decode=BYTES.decode, stop_ids=[EOS], vocab_size=None, step_texts=["e", "a", "\x00"])
    (found,) = search(Sampler(model), [prompt], [1], scorer=scorer, **arguments)
    assert found.scores == pytest.approx(scorer([prompt] * len(found.scores), found.completions), abs=1e-4)
    assert found.scores == sorted(found.scores, reverse=True) and len(found.scores) > 1
    nan_if_even = lambda _, completions: [math.nan if sum(c.ids) % 2 == 0 else -sum(c.ids) for c in completions]  # noqa: E731
    (found,) = search(Sampler(random_model()), [PROMPTS[0]], [1], scorer=nan_if_even, width=8, max_new_tokens=4)
    is_nan = [math.isnan(score) for score in found.scores]
    assert is_nan == sorted(is_nan) and not is_nan[0]


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match="prompt 0 is 64 tokens; the model's context is 64"):
        search(Sampler(random_model()), [[1] * 64], [1])


@pytest.mark.parametrize("arguments", [dict(width=0), dict(max_new_tokens=0), dict(prompts=[[1], []])])
def test_what_a_caller_of_token_beam_search_can_get_wrong_is_said(arguments):
    with pytest.raises(ValueError, match="want at least 1 of each|prompt 1 is 0 tokens; want 1 to 63"):
        token_beam_search(random_model(), **dict(prompts=[[1]], width=1, max_new_tokens=1) | arguments)


def test_no_prompts_find_nothing():
    assert search(Sampler(random_model()), [], []) == []


# ---- budget forcing


def merging_tokenizer(*merges):
    """Bytes, the end of the text, and a token for each pair that is merged, in this order."""
    tokenizer = of_bytes()
    files = dict(tokenizer._files)
    content = json.loads(files["tokenizer.json"])
    for i, (left, right) in enumerate(merges):
        content["model"]["vocab"][left + right] = EOS + 1 + i
    content["model"]["merges"] = [list(pair) for pair in merges]
    return Tokenizer(files | {"tokenizer.json": json.dumps(content).encode()})


STRADDLING = merging_tokenizer(("<", "/"), (".", "</"))
JOINED = STRADDLING.encode(".</")  # one token, in which a sentence ends and the end of thinking begins
SURE, HALF = 0.0, math.log(0.5)


def chain(tokenizer, **follows):
    """A model in which each of these characters is surely followed by one, or by one of two; others by the stop token.

    "E" stands for the stop token and "J" for the joined one.
    """
    ids = lambda texts: [{"E": EOS, "J": JOINED[0]}.get(text) or tokenizer.encode(text)[0] for text in texts]  # noqa: E731
    logp_VV = torch.full((tokenizer.vocab_size, tokenizer.vocab_size), -1e4)
    logp_VV[:, EOS] = SURE
    for text, texts in ({"<": "/", "/": "t", "t": "h", "h": "i", "i": "n", "n": "k", "k": ">"} | follows).items():
        logp_VV[ids(text), :] = -1e4
        logp_VV[ids(text) * len(texts), ids(texts)] = SURE if len(texts) == 1 else HALF
    return bigram_model(logp_VV, context=128)


def force(model, tokenizer, prompts=("p",), seeds=None, sampler=None, **arguments):
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    arguments = dict(max_thinking=40, max_answer=8, min_thinking=0, answer_text="!", wait_text="W") | arguments
    how = dict(max_waits=arguments.pop("max_waits", 0), temperature=arguments.pop("temperature", 1.0))
    seeds = seeds or list(range(len(ids)))
    return force_budget(sampler or Sampler(model), tokenizer, ids, Budget(**arguments), seeds=seeds, **how)


def text_of(found, tokenizer):
    return tokenizer.decode(found.completions[0].ids)


def test_the_joined_token_is_one_and_holds_the_beginning_of_the_end():
    assert len(JOINED) == 1 and STRADDLING.decode(JOINED) == ".</"


@pytest.mark.parametrize("max_waits", [0, 1, 3])
def test_wait_stands_where_the_end_stood_though_a_token_straddles_the_cut(max_waits):
    model = chain(STRADDLING, p="a", a="b", b="J", J="t", W="c", c="J", **{">": "x", "x": "E"})
    (found,) = force(model, STRADDLING, min_thinking=math.inf, max_waits=max_waits)
    assert text_of(found, STRADDLING) == "ab" + ".Wc" * max_waits + ".</think>x<|endoftext|>"
    (completion,) = found.completions
    assert completion.finish == "stop"
    # the cut takes the joined token and the rest of the tag, and "." is put in again with "W"
    assert completion.ids[:4] == STRADDLING.encode("ab.W" if max_waits else "ab") + JOINED * (not max_waits) + (
        STRADDLING.encode("t") * (not max_waits)
    )
    assert found.n_inserted == 2 * max_waits == 2 * text_of(found, STRADDLING).count("W")
    assert found.n_sampled == (2 + 7) + max_waits * (1 + 7) + 2  # ab</think> and so on, x and the stop token
    assert completion.logprobs == pytest.approx([0.0] * len(completion.ids), abs=1e-4)


def test_thinking_that_is_long_enough_or_out_of_waits_ends_by_itself():
    model = chain(STRADDLING, p="a", a="b", b="<", W="c", c="<", **{">": "x", "x": "E"})
    texts = {
        n: text_of(force(model, STRADDLING, min_thinking=n, max_waits=2)[0], STRADDLING).removesuffix("<|endoftext|>")
        for n in (0, 2, 3, 4, 5, 6, 7)
    }
    assert texts[0] == texts[2] == "ab</think>x"  # two tokens are enough
    assert texts[3] == texts[4] == "abWc</think>x"
    assert texts[5] == texts[6] == texts[7] == "abWcWc</think>x"  # the waits are used up


def test_a_stop_token_is_an_end_of_thinking_too():
    model = chain(STRADDLING, p="a", a="b", b="E", W="<", **{">": "x", "x": "E"})
    assert text_of(force(model, STRADDLING)[0], STRADDLING) == "ab<|endoftext|>"
    (found,) = force(model, STRADDLING, min_thinking=3, max_waits=1)
    assert text_of(found, STRADDLING) == "abW</think>x<|endoftext|>"
    assert (found.n_sampled, found.n_inserted) == (3 + 8 + 2, 1)


def test_at_its_most_tokens_thinking_is_ended_by_force_and_the_answer_cut_at_its_own():
    model = chain(STRADDLING, p="a", a="a", **{"!": "y", "y": "y"})
    (found,) = force(model, STRADDLING, max_thinking=5, max_answer=3)
    assert text_of(found, STRADDLING) == "aaaaa</think>!yyy"
    assert found.completions[0].finish == "length"
    assert (found.n_sampled, found.n_inserted) == (8, len(STRADDLING.encode("</think>!")))
    n_read_on = 1 + found.n_inserted  # the last token that was sampled, and what was put in behind it
    assert found.n_prompt == 1 + n_read_on
    assert found.scores == pytest.approx([0.0], abs=1e-4)


def test_a_wait_that_just_fits_is_put_in_and_one_that_does_not_is_not():
    model = chain(STRADDLING, p="a", a="b", b="<", W="c", c="<", **{">": "x", "x": "E", "!": "E"})
    answer = lambda wait_text: force(  # noqa: E731
        model, STRADDLING, max_thinking=10, min_thinking=10, max_waits=9, wait_text=wait_text
    )[0]
    assert text_of(answer("W" * 8), STRADDLING) == "ab" + "W" * 8 + "</think>!<|endoftext|>"
    assert text_of(answer("W" * 9), STRADDLING) == "ab</think>x<|endoftext|>"


def test_an_answer_that_writes_the_end_of_thinking_again_goes_on():
    model = chain(STRADDLING, p="<", **{">": "x", "x": "<"})
    (found,) = force(model, STRADDLING, max_answer=20)
    assert text_of(found, STRADDLING) == ("</think>" + "x</think>" * 3)[: 8 + 20]
    assert found.completions[0].finish == "length" and found.n_inserted == 0


def test_a_model_without_tags_thinks_until_it_stops_or_is_stopped():
    model = chain(STRADDLING, p="a", a="b", b="E", W="c", c="E", **{"!": "y", "y": "E"})
    untagged = dict(end_text="", answer_text="!")
    (found,) = force(model, STRADDLING, **untagged)
    assert text_of(found, STRADDLING) == "ab<|endoftext|>" and found.n_inserted == 0
    (found,) = force(model, STRADDLING, min_thinking=math.inf, max_waits=2, **untagged)
    assert text_of(found, STRADDLING) == "abWcWc<|endoftext|>"
    (found,) = force(chain(STRADDLING, p="a", a="a", **{"!": "y", "y": "E"}), STRADDLING, max_thinking=3, **untagged)
    assert text_of(found, STRADDLING) == "aaa!y<|endoftext|>" and found.completions[0].finish == "stop"


# Letters at random, in which the end "ca" comes every few tokens; after "W" and "!" too.
RANDOM_LETTERS = chain(
    STRADDLING, **{letter: "aabc" if letter in "pW" else "abcE" if letter in "ba" else "aabb" for letter in "pabcW!"}
)


@settings(max_examples=25)
@given(
    max_thinking=st.integers(1, 20), min_thinking=st.sampled_from([0, 3, 8, 20, math.inf]),
    max_waits=st.integers(0, 4), max_answer=st.integers(1, 6), seed=st.integers(0, 999),
    wait_text=st.sampled_from(["W", "WWW"]),
)  # fmt: skip
def test_budgets_hold_whatever_is_sampled(max_thinking, min_thinking, max_waits, max_answer, seed, wait_text):
    sampler = Spy(RANDOM_LETTERS)
    found_P = force(
        None, STRADDLING, ("p", "pa", "pb"), [seed, seed + 1, seed + 2], sampler, max_thinking=max_thinking,
        min_thinking=min_thinking, max_waits=max_waits, max_answer=max_answer, wait_text=wait_text, end_text="ca",
    )  # fmt: skip
    assert sum(found.n_sampled for found in found_P) == sampler.n_sampled
    for found in found_P:
        (completion,) = found.completions
        text = text_of(found, STRADDLING).replace("<|endoftext|>", "E")  # a character a token
        assert len(text) == len(completion.ids) == len(completion.logprobs)
        is_forced, n_waits = "!" in text, text.count(wait_text)
        thinking, end, answer = text.partition("ca!" if is_forced else "ca")
        if not is_forced and not end:
            thinking, end, answer = text[:-1], text[-1], ""
            assert end == "E"
        assert len(thinking) <= max_thinking and "E" not in thinking and len(answer) <= max_answer
        has_room = len(thinking) + len(wait_text) <= max_thinking
        assert len(thinking) >= min_thinking or n_waits == max_waits or not has_room
        assert not is_forced or len(thinking) == max_thinking
        assert n_waits <= max_waits and "W" not in answer
        assert completion.finish == ("stop" if text.endswith("E") else "length")
        assert completion.finish == "stop" or len(answer) == max_answer
        assert found.n_inserted == n_waits * len(wait_text) + 3 * is_forced
        assert found.n_sampled >= len(text) - found.n_inserted


def test_a_problems_thinking_does_not_depend_on_the_other_problems_nor_on_kept_caches():
    model, prompts, seeds = random_model(SCORER_CONFIG), ("ab", "c", "defgh", "gh"), [5, 6, 7, 8]
    end = dict(end_text=BYTES.decode([114]), min_thinking=12, max_waits=3, max_thinking=30)
    read = lambda found_P: [  # noqa: E731
        (f.completions[0].ids, f.completions[0].finish, f.n_sampled, f.n_inserted) for f in found_P
    ]
    together = read(force(model, BYTES, prompts, seeds, **end))
    assert together == read(force(model, BYTES, prompts[::-1], seeds[::-1], **end))[::-1]
    assert together == [read(force(model, BYTES, (p,), [s], **end))[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == read(force(model, BYTES, prompts, seeds, Forgetful(model), **end))
    greedy = end | dict(temperature=0.0)
    kept, afresh = (force(model, BYTES, prompts, seeds, kind(model), **greedy) for kind in (Sampler, Forgetful))
    assert read(kept) == read(afresh)
    for a, b in zip(kept, afresh, strict=True):
        assert a.completions[0].logprobs == pytest.approx(b.completions[0].logprobs, abs=1e-4)


def test_what_budget_forcing_read_and_sampled_is_what_went_through_the_model(monkeypatch):
    model = random_model(SCORER_CONFIG)
    sampler, sizes = Spy(model, 4), tokens_through(model, monkeypatch)
    found_P = force(
        model, BYTES, ("ab", "c", "def"), sampler=sampler, end_text="r", min_thinking=math.inf, max_waits=3,
        max_thinking=20,
    )  # fmt: skip
    n_last = sum(len(prompts) for _, prompts, _ in sampler.calls)
    assert sum(sizes) == sum(found.n_prompt + found.n_sampled for found in found_P) - n_last
    assert all(made.kept is None for found in found_P for made in found.completions)


def test_thinking_leaves_room_in_the_context_for_the_answer():
    model = chain(STRADDLING, p="p", **{"!": "y", "y": "y"})  # of 128 tokens
    (found,) = force(model, STRADDLING, ("p" * 100,), max_thinking=99, max_answer=8)
    n_forced = len(STRADDLING.encode("</think>!"))
    assert text_of(found, STRADDLING) == "p" * (128 - 100 - n_forced - 8) + "</think>!" + "y" * 8
    with pytest.raises(AssertionError):
        force(model, STRADDLING, ("p", "p" * 113))


# ---- self-refinement


TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% if hint %}{{ hint }}{% endif %}{% endif %}"
)
CHAT = of_bytes(chat_template=TEMPLATE)


def refined(model, questions=("a?", "bcd?"), sampler=None, **arguments):
    messages_P = [[{"role": "user", "content": question}] for question in questions]
    defaults = dict(rounds=2, max_new_tokens=6, seeds=list(range(len(questions))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(think_longer, "REQUEST", "Sure?")  # the contexts here are short
        return refine(sampler or Sampler(model), CHAT, messages_P, **defaults | arguments)


def test_each_review_shows_the_question_and_the_last_answer_alone():
    model = random_model(SCORER_CONFIG, seed=5)
    sampler = Spy(model)
    found_P = refined(None, sampler=sampler, template_arguments=dict(hint="so "))
    for p, (question, found) in enumerate(zip(("a?", "bcd?"), found_P, strict=True)):
        calls = [(prompt, made) for i, (prompt,), ((made,),) in sampler.calls if i == p]
        shown = [CHAT.decode(prompt.ids) for prompt, _ in calls]
        first, second, _ = (CHAT.decode(made.ids, skip_special=True).strip() for made in found.completions)
        assert first != second
        assert shown == [f"u:{question}\na:so "] + [f"u:{question}\na:{a}\nu:Sure?\na:so " for a in (first, second)]
        assert [made.ids for made in found.completions] == [made.ids for _, made in calls]
        assert found.scores == pytest.approx(mean_logprob([], found.completions))
        assert found.n_sampled == sum(len(made.ids) for made in found.completions) and found.n_inserted == 0
        assert all(made.kept is None for made in found.completions)


def test_thinking_is_not_shown_again_unless_it_is_all_there_is():
    model = chain(CHAT, **{":": "<", ">": "c", "c": "E"})
    sampler = Spy(model)
    refined(None, ("?",), sampler, rounds=1, max_new_tokens=20)
    assert CHAT.decode(sampler.calls[1][1][0].ids) == "u:?\na:c\nu:Sure?\na:"
    refined(None, ("?",), sampler, rounds=1, max_new_tokens=5)
    assert CHAT.decode(sampler.calls[3][1][0].ids) == "u:?\na:</thi\nu:Sure?\na:"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_problems_rounds_do_not_depend_on_the_others_nor_on_kept_caches(temperature):
    model = random_model(SCORER_CONFIG)
    read = lambda found_P: [[made.ids for made in found.completions] for found in found_P]  # noqa: E731
    together = read(refined(model, temperature=temperature))
    assert together == read(refined(None, sampler=Forgetful(model), temperature=temperature))
    assert together[1:] == read(refined(model, ("bcd?",), seeds=[1], temperature=temperature))


def test_a_full_context_ends_the_rounds_of_its_problem_alone():
    long = "x" * 75  # of 96 tokens; the next prompt would have the answer and the request, too
    found_P = refined(random_model(SCORER_CONFIG), (long, "a?"))
    assert [len(found.completions) for found in found_P] == [1, 3]


# ---- a real model


@pytest.mark.model
def test_each_method_answers_a_real_prompt():
    folder = Path(os.environ.get("NANOR1_MODELS", "-")) / "smollm2-135m"
    if not folder.exists():
        pytest.skip("needs NANOR1_MODELS with smollm2-135m")
    tokenizer, model = Tokenizer.from_pretrained(folder), Transformer.from_pretrained(folder, torch.float32)
    sampler = Sampler(model)
    messages = [{"role": "user", "content": "Name three colours, each on a line of its own."}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    prompts = [tokenizer.encode(text, allow_special=True)]
    ends = dict(stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size)

    greedy = sampler.generate(prompts, max_new_tokens=30, temperature=0.0, **ends)[0][0].ids
    beams = dict(scorer=mean_logprob, max_new_tokens=30, seeds=[0], decode=tokenizer.decode, **ends)
    (found,) = beam_search(sampler, prompts, width=1, branching=1, temperature=0.0, **beams)
    assert found.completions[0].ids == greedy
    (found,) = beam_search(sampler, prompts, width=2, branching=2, trees=2, **beams)
    assert 2 <= len(found.completions) <= 4

    (found,) = token_beam_search(model, prompts, width=1, max_new_tokens=30, **ends)
    assert found.completions[0].ids == greedy
    (found,) = token_beam_search(model, prompts, width=4, max_new_tokens=30, **ends)
    assert len(found.completions) == 4

    budget = Budget(25, 5, end_text="", answer_text="\n\nThe final answer is")
    (found,) = force_budget(sampler, tokenizer, prompts, budget, max_waits=1, seeds=[0], temperature=0.0)
    text = tokenizer.decode(found.completions[0].ids)
    assert "The final answer is" in text and found.completions[0].ids[:10] == greedy[:10]

    (found,) = refine(sampler, tokenizer, [messages], rounds=1, max_new_tokens=30, seeds=[0], temperature=0.0)
    assert len(found.completions) == 2 and found.completions[0].ids == greedy
    assert REQUEST and found.n_prompt > len(prompts[0])
