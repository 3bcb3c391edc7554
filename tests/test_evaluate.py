import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import of_bytes

from nanor1.evaluation.accuracy import accuracy_interval, evaluate, majority_accuracy, summarize, wilson_interval
from nanor1.grpo import Rollout
from nanor1.judge import Rules, judge_all
from nanor1.model import ModelConfig, Transformer
from nanor1.sampler import Completion, Sampler
from nanor1.tasks.problems import Code, Problem
from nanor1.tasks.prompts import Prompter
from nanor1.tokenizer import Tokenizer

SUM = Problem("2 + 3 =", "5", "arithmetic", (2, 3))
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
WORDS = [*TAGS, "+", "=", "wait", *map(str, range(10))]
RULES = Rules({"accuracy": 1.0, "format": 0.1})


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_words(WORDS, eos="<end>")


def answered(answer, accuracy, finish="stop", format=1.0, n_tokens=4, thinking="a", logprob=0.0):
    text = f"<think>{thinking}</think> <answer>{answer}</answer>"
    parts = {"accuracy": accuracy, "format": format}
    return Rollout(SUM, [0], Completion([1] * n_tokens, [logprob] * n_tokens, finish), text, accuracy, parts)


def judge(problem, prompt, completion, tokenizer, rules):
    ((rollout,),) = judge_all([problem], [prompt], [[completion]], tokenizer, rules)
    return rollout


def completion(tokenizer, text, finish="stop"):
    ids = tokenizer.encode(text, allow_special=True)
    return Completion(ids, [0.0] * len(ids), finish)


# ---- intervals


@pytest.mark.parametrize(
    ("n_right", "n", "low", "high"),  # Newcombe 1998 (Statistics in Medicine 17: 857-872), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_has_the_published_values_and_is_symmetric(n_right, n, low, high):
    assert wilson_interval(n_right, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(n - n_right, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("n", [20, 100])
def test_wilsons_interval_covers_the_truth_95_times_in_100(n):
    """Exactly, by adding up binomial probabilities; on average over the truth, and never far from it."""
    intervals = [wilson_interval(k, n) for k in range(n + 1)]
    coverages = []
    for p in (i / 40 for i in range(2, 39)):
        chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        coverages.append(sum(c for c, (low, high) in zip(chances, intervals, strict=True) if low <= p <= high))
    assert sum(coverages) / len(coverages) == pytest.approx(0.95, abs=0.01)
    assert min(coverages) > 0.90


@pytest.mark.parametrize(("n_right", "n"), [(3, 2), (-1, 2), (0, 0)])
def test_a_share_that_is_none_is_refused(n_right, n):
    with pytest.raises(AssertionError, match="want 0 <= right <= n and n >= 1"):
        wilson_interval(n_right, n)


def test_the_interval_of_several_samples_is_over_problems_by_hand():
    # with 0 and 1: mean 0.5, variance (4 * 0.0625 + 2 * 0.25) / 7 = 0.75 / 7: as much as that of 5 * 0.25 * 7 / 0.75 =
    # 11.6667 answers, half of them right; Wilson's half is 1.96 / 1.32928 * sqrt(0.25 / 11.6667 + 3.8416 / 544.444)
    low, high = accuracy_interval([0.25, 0.75, 0.25, 0.75, 0.5])
    assert (low, high) == pytest.approx((0.5 - 0.24886, 0.5 + 0.24886), abs=1e-4)


@pytest.fixture(scope="module")
def coverages():
    """How often the interval holds the truth, by problems, samples a problem, accuracy, and spread of difficulty.

    A problem's chance is drawn from a Beta distribution, of the larger a spread the smaller its last number.
    """
    rng, found = np.random.default_rng(0), {}
    settings = itertools.product((20, 50, 100), (1, 4, 16), (0.02, 0.1, 0.5, 0.9, 0.98), (0.5, 4.0, math.inf))
    for n, samples, truth, spread in settings:
        size = (250, n)
        chances = np.full(size, truth) if spread == math.inf else rng.beta(truth * spread, (1 - truth) * spread, size)
        intervals = map(accuracy_interval, (rng.binomial(samples, chances) / samples).tolist())
        found[n, samples, truth, spread] = np.mean([low <= truth <= high for low, high in intervals])
    return found


def test_intervals_cover_the_truth_95_times_in_100_whatever_the_accuracy_and_the_number_of_samples(coverages):
    assert 0.93 <= np.mean([*coverages.values()]) <= 0.98


@pytest.mark.parametrize("samples", [1, 4, 16])
def test_no_kind_of_evaluation_is_far_below_that(coverages, samples):
    of_these = [share for setting, share in coverages.items() if setting[1] == samples]
    assert min(of_these) > 0.88 and np.mean(of_these) > 0.94


def test_problems_that_are_all_right_or_all_wrong_have_wilsons_interval_and_never_a_width_of_zero():
    assert accuracy_interval([1.0] * 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert accuracy_interval([0.0] * 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert accuracy_interval([1.0] * 8 + [0.0] * 2) == pytest.approx((0.490, 0.943), abs=1e-3)
    low, high = accuracy_interval([0.5])
    assert low < 0.15 and high > 0.85


@given(st.lists(st.integers(0, 4).map(lambda n: n / 4), min_size=1, max_size=30))
def test_an_interval_holds_its_mean_stays_within_0_and_1_and_is_the_mirror_image_for_wrong_answers(means):
    low, high = accuracy_interval(means)
    assert 0 <= low <= sum(means) / len(means) + 1e-12 and sum(means) / len(means) - 1e-12 <= high <= 1
    assert accuracy_interval([1 - m for m in means]) == pytest.approx((1 - high, 1 - low), abs=1e-9)
    widest = wilson_interval(sum(means), len(means))  # as if all samples of a problem were one
    assert high - low <= widest[1] - widest[0] + 1e-9


# ---- majority


@pytest.mark.parametrize(
    ("group", "right"),
    [
        ([answered(4, 0.0), answered(5, 1.0), answered(5, 1.0)], 1.0),
        ([answered(5, 1.0), answered(4, 0.0), answered(4, 0.0)], 0.0),
        ([answered(4, 0.0), answered(5, 1.0), answered(5, 1.0), answered(4, 0.0)], 0.0),  # a tie: 4 came first
        ([answered(5, 1.0), answered(4, 0.0), answered(4, 0.0), answered(5, 1.0)], 1.0),  # a tie: 5 came first
        ([answered("", 0.0), answered("", 0.0), answered(5, 1.0)], 1.0),  # no answer, no vote
        ([answered(4, 0.0, "length"), answered(4, 0.0, "length"), answered(5, 1.0)], 1.0),  # cut off, no vote
        ([answered("", 0.0), answered(5, 0.0, "length")], 0.0),  # nobody votes
        ([answered("5", 1.0), answered(" 5 ", 1.0), answered(4, 0.0), answered(3, 0.0)], 1.0),  # blanks do not matter
        ([answered(4, 0.0), answered(4, 0.0), answered("5", 1.0), answered("5.0", 1.0), answered("05", 1.0)], 1.0),
        ([answered(4, 0.0, logprob=-2.0), answered(5, 1.0, logprob=-1.0)], 1.0),  # a tie: 5 is likelier
    ],
)
def test_the_majority_is_right_if_the_most_frequent_answer_is(group, right):
    assert majority_accuracy([group]) == right


def test_the_majority_is_a_share_of_all_problems():
    right, wrong, silent = [answered(5, 1.0)] * 3, [answered(4, 0.0)] * 3, [answered("", 0.0)] * 3
    assert majority_accuracy([right, right, wrong, silent]) == 0.5


# ---- summaries


def test_a_summary_by_hand():
    evaluation = summarize(
        [
            [answered(5, 1.0, n_tokens=2), answered(4, 0.0, "length", format=0.0, n_tokens=8, thinking="Wait, wait")],
            [answered(5, 1.0, n_tokens=4), answered(5, 1.0, n_tokens=6, thinking="waiter wait")],
        ]
    )
    assert (evaluation.accuracy, evaluation.n, evaluation.samples) == (0.75, 2, 2)
    assert (evaluation.format, evaluation.response_tokens, evaluation.truncated) == (0.75, 5.0, 0.25)
    assert evaluation.retries == 0.75  # three in four responses; a waiter is none
    assert evaluation.majority == 1.0
    assert 0 < evaluation.accuracy_low < 0.75 < evaluation.accuracy_high <= 1


def test_what_could_not_be_judged_is_left_out_of_its_problem_and_a_problem_without_judgement_out_of_the_set():
    unjudged = answered(5, None, n_tokens=100)
    evaluation = summarize([[answered(5, 1.0), unjudged], [unjudged, unjudged], [answered(4, 0.0)] * 2])
    assert (evaluation.accuracy, evaluation.n, evaluation.response_tokens) == (0.5, 2, 4.0)
    with pytest.raises(ValueError, match="no rollout could be judged"):
        summarize([[unjudged], [unjudged]])


def test_a_judge_of_ones_own_may_have_judged_nothing():
    evaluation = summarize([[answered(5, None)], [answered(5, None)]], may_be_unjudged=True)
    assert evaluation.accuracy is evaluation.reward is None and "nothing could be judged (n=2 x 1)" in str(evaluation)


def test_the_majority_is_named_with_its_number_of_samples():
    many = summarize([[answered(5, 1.0)] * 16]).to_dict()
    assert many["majority_16"] == 1.0 and "majority" not in many
    one = summarize([[answered(5, 1.0)]])
    assert one.majority is None and one.to_dict()["majority_1"] is None
    assert "majority" not in str(one) and "accuracy 1.000" in str(one)


# ---- judging one completion


def test_a_right_answer_is_rewarded_and_its_stop_token_is_no_part_of_the_text(tokenizer):
    text = "<think> 2 + 3 = 5 </think> <answer> 5 </answer>"
    done = completion(tokenizer, f"{text} <end>")
    rollout = judge(SUM, ("2 + 3 =", [6, 4, 7]), done, tokenizer, RULES)
    assert (rollout.text, rollout.reward) == (text, 1.0)
    assert rollout.parts == {"accuracy": 1.0, "format": 1.0, "language": 1.0}
    assert rollout.prompt_ids == [6, 4, 7]
    assert rollout.completion.ids[-1] == tokenizer.eos_id  # kept, for it is trained


def test_an_answer_that_is_cut_off_is_not_right_but_its_format_is_judged(tokenizer):
    text = "<think> 2 + 3 = 5 </think> <answer> 5 </answer>"
    rollout = judge(SUM, ("", []), completion(tokenizer, text, "length"), tokenizer, RULES)
    assert (rollout.text, rollout.reward) == (text, 0.0)
    assert rollout.parts == {"accuracy": 0.0, "format": 1.0, "language": 1.0}
    no_gold = Problem("2 + 3 =", "", "arithmetic")
    rollout = judge(no_gold, ("", []), completion(tokenizer, text, "length"), tokenizer, RULES)
    assert rollout.reward is None and rollout.parts["accuracy"] is None


def test_a_tag_that_the_prompt_has_opened_belongs_to_the_text(tokenizer):
    done = completion(tokenizer, "2 + 3 = 5 </think> <answer> 5 </answer> <end>")
    opened = judge(SUM, ("Assistant: <think>", []), done, tokenizer, RULES)
    assert opened.text.startswith("<think>2 + 3") and opened.parts["format"] == 1.0
    bare = judge(SUM, ("Assistant:", []), done, tokenizer, RULES)
    assert bare.parts["format"] == 0.0 and bare.reward == pytest.approx(0.9)


def test_an_answer_to_what_is_no_problem_is_read_and_not_judged(tokenizer):
    rollout = judge(None, ("Q <think>", [6]), completion(tokenizer, "2 <end>"), tokenizer, RULES)
    assert (rollout.text, rollout.reward, rollout.parts) == ("<think>2", None, {})


def test_accuracy_and_format_are_judged_even_where_they_are_not_rewarded(tokenizer):
    wrong = completion(tokenizer, "<answer> 4 </answer> <end>")
    rollout = judge(SUM, ("", []), wrong, tokenizer, Rules({"format": 1.0}))
    assert rollout.parts == {"accuracy": 0.0, "format": 0.0, "language": 1.0} and rollout.reward == -1.0


# ---- prompts


def test_a_bare_prompt_is_the_question_with_the_models_first_token_where_it_has_one(tokenizer):
    assert Prompter(tokenizer, "bare").write(SUM) == ("2 + 3 =", tokenizer.encode("2 + 3 ="))
    bytes_tokenizer = of_bytes(specials=["<s>"])
    bytes_tokenizer.adds_bos, bytes_tokenizer.bos_id = True, bytes_tokenizer.token_id("<s>")
    assert Prompter(bytes_tokenizer, "bare").write(SUM) == ("2 + 3 =", [bytes_tokenizer.bos_id, *b"2 + 3 ="])


# ---- a model


def test_a_model_answers_each_problem_so_many_times_and_is_heard_token_by_token(tokenizer):
    torch.manual_seed(0)
    model = Transformer(ModelConfig("llama", tokenizer.vocab_size, 8, 16, 1, 2, 1, 4, 32))
    problems, heard = [SUM, Problem("4 + 4 =", "8", "arithmetic", (4, 4))], []
    prompter, arguments = Prompter(tokenizer, "bare"), dict(samples=3, max_new_tokens=6, temperature=1.0, seed=1)
    evaluation, rollouts_PG = evaluate(
        Sampler(model), prompter, problems, RULES, on_token=lambda *token: heard.append(token), **arguments
    )
    assert (evaluation.n, evaluation.samples) == (2, 3)
    assert [[r.problem for r in group] for group in rollouts_PG] == [[problem] * 3 for problem in problems]
    assert evaluation.response_tokens == len(heard) / 6
    for p, group in enumerate(rollouts_PG):
        for g, rollout in enumerate(group):
            assert [token for *at, token in heard if at == [p, g]] == rollout.completion.ids
    again, _ = evaluate(Sampler(model), prompter, problems, RULES, **arguments)
    assert again == evaluation


def test_programs_of_a_step_are_run_together_and_judged_each_by_its_own_tests():
    tokenizer = of_bytes()
    double, triple = (
        Code.read({"text": "Multiply.", "test_list": [f"assert f(2) == {value}"], "code": "def f(n): ..."})
        for value in (4, 6)
    )
    answers = [f"```python\ndef f(n):\n    return {n} * n\n```" for n in (2, 3)]
    made = [[Completion([*tokenizer.encode(a), tokenizer.eos_id], [0.0], "stop") for a in answers]] * 2
    groups = judge_all([double, triple], [("Q", [1])] * 2, made, tokenizer, Rules())
    assert [[rollout.reward for rollout in group] for group in groups] == [[1.0, 0.0], [0.0, 1.0]]


def test_a_new_turn_behind_a_program_is_no_part_of_it():
    tokenizer = of_bytes()
    problem = Code.read({"text": "Double.", "test_list": ["assert f(2) == 4"], "code": "def f(n): ..."})
    answer = tokenizer.encode("def f(n):\n    return 2 * n\nUser: thanks")
    made, prompts = [[Completion(answer, [0.0], "stop")]], [("Q", [1])]
    for next_turn, accuracy in (("", 0.0), ("\nUser:", 1.0)):
        ((rollout,),) = judge_all([problem], prompts, made, tokenizer, Rules(next_turn=next_turn))
        assert rollout.parts["accuracy"] == accuracy


def test_a_reward_model_is_asked_once_for_all_its_none_is_left_out_and_no_answer_is_worth_nothing():
    tokenizer, asked = of_bytes(), []

    def preference(prompt_ids_B, texts_B):
        asked.append((prompt_ids_B, texts_B))
        return [0.25, None, 0.75, 0.75]

    made = [[Completion([*tokenizer.encode(a), tokenizer.eos_id], [0.0], "stop") for a in ("5", "6", "<think>")]]
    made[0].append(Completion(tokenizer.encode("5"), [0.0], "length"))
    rules = Rules({"accuracy": 1.0, "preference": 0.5}, preference=preference)
    (group,) = judge_all([SUM], [("2 + 3 =", [7])], made, tokenizer, rules)
    assert asked == [([[7]] * 4, ["5", "6", "<think>", "5"])]
    assert [rollout.parts["preference"] for rollout in group] == [0.25, None, 0.0, 0.0]  # still thinking; cut off
    assert [rollout.reward for rollout in group] == [1.125, None, 0.0, 0.0]
