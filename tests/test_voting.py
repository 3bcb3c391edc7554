import math
import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanor1.rewards import accuracy, final_answer
from nanor1.search.votes import (
    Candidate,
    best_of,
    group_answers,
    majority,
    pass_at_k,
    same_answer,
    subsets,
    weighted_vote,
    window_confidences,
)
from nanor1.tasks.problems import Problem

MATH = Problem("What is a half?", r"\frac{1}{2}", "math")
SUM = Problem("47 + 85 =", "132", "arithmetic", (47, 85))
COUNTDOWN = Problem("3 7 12 target 22 :", "22", "countdown", (3, 7, 12), 22)
CODE = Problem("Write f.", "", "code")


def candidates(*answers, logprobs=None):
    """Candidates, each less likely than the one before it unless told otherwise."""
    logprobs = logprobs or [-1.0 - i for i in range(len(answers))]
    return [Candidate(answer, logprob) for answer, logprob in zip(answers, logprobs, strict=True)]


# ---- which answers are the same


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", "1/2", True),
        ("0.5", "0.51", False),
        ("x=5", "5", True),
        ("(1,2)", "(2,1)", False),
        ("1,200", "1200", True),
        ("12_5", "12", True),  # a base, which math_equal forgives only on the side of the gold answer
        ("12_5", "7", False),
        (r"\frac{1", r"\frac{1", True),
        (r"\frac{1", r"\frac{2", False),
        ("noidea", "noclue", False),
    ],
)
def test_answers_are_the_same_by_mathematics_in_either_order(a, b, verdict):
    assert same_answer(MATH, a, b) is verdict
    assert same_answer(MATH, b, a) is verdict


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ("3+7+12", "7+3+12", True),
        ("3 + 7 + 12", "(12+7)+3", True),
        ("3+7+12", "11+11", False),  # other numbers of the same value
        ("3+7+12", "3*7+12", False),  # the same numbers of another value
        ("3/7*12", "12*3/7", True),  # 36/7, no float
        ("3+3+7", "3+7+7-4", False),
        ("12/(7-7)", "12/(7-7)", True),
        ("12/(7-7)", "(12)/(7-7)", False),  # without a value only its own spelling
        ("twelve", "12", False),
    ],
)
def test_countdown_answers_are_the_same_by_numbers_and_value(a, b, verdict):
    assert same_answer(COUNTDOWN, a, b) is verdict
    assert same_answer(COUNTDOWN, b, a) is verdict


@pytest.mark.parametrize(
    ("problem", "answers"),
    [
        (SUM, ["47+85", "132", "132.0", "85+47", "47+85=132", "131", "133-1", "$132", "none"]),
        (COUNTDOWN, ["3+7+12", "12+7+3", "22", "11+11", "12+(3+7)", "3*7+1", "(3+7+12", "7*3-12", "3*7-12"]),
        (MATH, ["1/2", "0.5", r"\frac12", "2/4", r"\frac{\sqrt{4}}{4}", "2", "0.50", "x=0.5", "half"]),
    ],
    ids=lambda value: value.task if isinstance(value, Problem) else "",
)
def test_a_group_is_right_or_wrong_as_a_whole(problem, answers):
    groups = group_answers(problem, [final_answer(problem, f"<answer>{answer}</answer>") for answer in answers])
    verdicts = [{accuracy(problem, f"<answer>{answers[i]}</answer>") for i in group} for group in groups]
    assert sorted(i for group in groups for i in group) == list(range(len(answers)))
    assert all(len(verdict) == 1 for verdict in verdicts) and verdicts.count({1.0}) == 1
    assert len(groups[verdicts.index({1.0})]) >= 3


def test_groups_come_in_order_of_first_occurrence_and_leave_out_who_has_no_answer():
    answers = ["2", "0.5", None, "no idea", "1/2", "2", None, r"\frac{1}{2}", "4/2"]
    assert group_answers(MATH, answers) == [[0, 5, 8], [1, 4, 7], [3]]
    assert group_answers(MATH, ["0.5", "1/2", "0.5"]) == [[0, 1, 2]]
    assert group_answers(MATH, []) == group_answers(MATH, [None, None]) == []


def test_where_equality_does_not_carry_over_the_first_answer_of_a_group_decides():
    assert not same_answer(MATH, "45", "0.45")
    assert group_answers(MATH, [r"45\%", "45", "0.45"]) == [[0, 1, 2]]
    assert group_answers(MATH, ["45", r"45\%", "0.45"]) == [[0, 1], [2]]


# ---- majority


def test_the_largest_group_wins_however_unlikely_and_its_likeliest_member_speaks_for_it():
    voters = candidates("2", "0.5", "1/2", None, r"\frac{1}{2}", logprobs=[-1, -90, -70, -0.1, -80])
    assert majority(MATH, voters) == 2


def test_votes_are_counted_by_mathematics_where_spelling_would_choose_another():
    assert majority(MATH, candidates("2", "2", "0.5", "1/2", r"\frac{1}{2}")) == 2


def test_a_tie_goes_to_the_larger_summed_log_probability_not_to_the_likeliest_candidate():
    voters = candidates("2", "0.5", "2", "1/2", logprobs=[-1.0, -3.0, -9.0, -4.0])  # -10 against -7
    assert majority(MATH, voters) == 1


def test_a_tie_in_log_probability_goes_to_the_answer_given_first():
    assert majority(MATH, candidates("3", "2", "0.5", logprobs=[-2.0, -1.0, -1.0])) == 1
    assert majority(MATH, candidates("2", "0.5", "1/2", "4/2", logprobs=[-4.0, -2.0, -3.0, -1.0])) == 3
    assert majority(MATH, candidates("2", "2", logprobs=[-1.0, -1.0])) == 0


def test_answers_nobody_can_read_vote_by_their_spelling():
    assert majority(MATH, candidates("no idea", "dunno", "2", "dunno")) == 1
    assert majority(COUNTDOWN, candidates("3+(7", "3+(7+", "3+(7")) == 0


def test_without_an_answer_nobody_is_chosen():
    assert majority(MATH, []) is None
    assert majority(MATH, candidates(None, None)) is None
    assert majority(MATH, candidates(None, "2", None)) == 1


def test_a_countdown_expression_of_other_numbers_takes_no_votes_from_the_right_one():
    assert majority(COUNTDOWN, candidates("11+11", "11+11", "3+7+12", "12+3+7", "7+12+3")) == 2


def test_without_ties_majority_does_not_depend_on_the_order():
    spellings = [["0.5", "1/2", r"\frac{1}{2}"], ["2", "4/2", "2.0"], ["7", "x=7"], [None]]
    for seed in range(40):
        rng = random.Random(seed)
        sizes = rng.sample([1, 2, 3, 4], k=4)
        answers = [rng.choice(forms) for forms, size in zip(spellings, sizes, strict=True) for _ in range(size)]
        voters = candidates(*answers, logprobs=[rng.uniform(-50, 0) for _ in answers])
        shuffled = rng.sample(voters, k=len(voters))
        assert shuffled[majority(MATH, shuffled)] == voters[majority(MATH, voters)]


# ---- weighted votes


def test_a_weighted_vote_adds_up_the_weights_of_equal_answers():
    voters = candidates("2", "0.5", "1/2", "3")
    assert weighted_vote(MATH, voters, [0.50, 0.30, 0.25, 0.1]) == 1  # 0.50 against 0.55
    assert weighted_vote(MATH, voters, [0.56, 0.30, 0.25, 0.1]) == 0


def test_only_the_share_with_the_highest_weights_votes():
    voters = candidates("2", "2", "2", "0.5", "3")
    weights = [4.0, 4.0, 4.0, 9.0, 1.0]
    assert weighted_vote(MATH, voters, weights) == 0  # 12 against 9
    assert weighted_vote(MATH, voters, weights, keep_share=0.6) == 3  # 9 against 4 + 4
    assert weighted_vote(MATH, voters, weights, keep_share=1e-12) == 3  # at least one


def test_the_share_is_of_those_with_an_answer_and_rounded_up():
    voters = candidates("2", None, "0.5", None, "1/2", None)
    weights = [5.0, 9.0, 3.0, 9.0, 2.5, 9.0]
    assert weighted_vote(MATH, voters, weights, keep_share=0.66) == 0  # 1.98 of 3: 5 against 3
    assert weighted_vote(MATH, voters, weights, keep_share=0.67) == 2  # 2.01 of 3: 5 against 5.5


def test_a_share_of_whole_candidates_is_not_rounded_up_by_the_float_it_is_written_in():
    assert 0.07 * 100 > 7
    voters = candidates(*["2"] * 4, *["0.5"] * 96, logprobs=[-9.0] * 4 + [-1.0] * 96)
    assert weighted_vote(MATH, voters, [1.0] * 100, keep_share=0.07) == 0  # 4 against 3
    assert weighted_vote(MATH, voters, [1.0] * 100, keep_share=0.08) == 4  # 4 against 4, and likelier


def test_equal_weights_at_the_cut_keep_who_came_first():
    voters = candidates("3", "2", "0.5", logprobs=[-9.0, -5.0, -1.0])
    assert weighted_vote(MATH, voters, [0.5, 1.0, 1.0], keep_share=1 / 3) == 1


def test_weights_of_zero_leave_the_vote_to_the_majority():
    voters = candidates("2", "0.5", "1/2")
    assert weighted_vote(MATH, voters, [0.0, 0.0, 0.0]) == majority(MATH, voters) == 1


def test_the_weight_of_who_has_no_answer_is_not_asked_for():
    assert weighted_vote(MATH, candidates(None, "3"), [None, 1.0]) == 1


# ---- best of N


def test_the_best_is_the_answer_of_the_largest_value_and_the_first_of_equals():
    assert best_of(candidates("2", "3", "4", "5"), [0.1, -2.0, 0.7, 0.7]) == 2
    assert best_of(candidates("2", "3"), [-4.0, -3.0]) == 1


def test_who_has_no_answer_or_no_value_cannot_be_the_best():
    assert best_of(candidates(None, "3", "4", "5"), [9.0, math.nan, None, -1.0]) == 3
    assert best_of(candidates("2", "3"), [None, math.nan]) is None
    assert best_of(candidates(None), [1.0]) is best_of([], []) is None


# ---- confidence of windows


@pytest.mark.parametrize(
    ("confidences", "window", "tail", "lowest"),
    [
        ([5.0, 1.0, 2.0, 9.0, 4.0], 2, 6.5, 1.5),
        ([5.0, 1.0, 2.0, 9.0, 4.0], 1, 4.0, 1.0),
        ([5.0, 1.0, 2.0, 9.0, 4.0], 5, 4.2, 4.2),
        ([5.0, 1.0, 2.0, 9.0, 4.0], 2048, 4.2, 4.2),  # shorter than a window
        ([3.0, 1.0, 1.0], 2, 1.0, 1.0),  # the end is the worst
        ([0.0, 0.0, 9.0, 9.0], 3, 6.0, 3.0),
        ([7.0], 1, 7.0, 7.0),
    ],
)
def test_window_confidences_by_hand(confidences, window, tail, lowest):
    assert window_confidences(confidences, window) == pytest.approx((tail, lowest))


@settings(max_examples=50)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=60), st.integers(1, 70))
def test_window_confidences_are_those_of_every_window_worked_out_alone(confidences, window):
    width = min(window, len(confidences))
    means = [math.fsum(confidences[i : i + width]) / width for i in range(len(confidences) - width + 1)]
    tail = math.fsum(confidences[-window:]) / width
    assert window_confidences(confidences, window) == pytest.approx((tail, min(means)), abs=1e-9)


def test_window_confidences_of_a_long_text_are_exact_and_take_no_window_squared():
    rng = random.Random(0)
    confidences = [rng.uniform(0, 20) for _ in range(100_000)]
    confidences[40_000:42_048] = [rng.uniform(0, 1) for _ in range(2048)]
    lowest = math.fsum(confidences[40_000:42_048]) / 2048
    tail = math.fsum(confidences[-2048:]) / 2048
    assert window_confidences(confidences, 2048) == pytest.approx((tail, lowest), rel=1e-9)


# ---- k samples out of n


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_sample(n):
    for n_right in range(n + 1):
        for k in range(1, n + 1):
            hits = [min(subset) < n_right for subset in combinations(range(n), k)]
            assert pass_at_k(n, n_right, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)


def test_pass_at_k_is_exact_where_products_of_floats_are_not():
    assert pass_at_k(10_000, 1, 5_000) == 0.5
    assert pass_at_k(10_000, 1, 1) == 1e-4
    assert pass_at_k(100_000, 3, 1) == 3e-5
    assert pass_at_k(200, 0, 100) == 0.0
    assert pass_at_k(200, 101, 100) == 1.0


@pytest.mark.parametrize(
    ("n", "k", "runs"),
    [
        (16, 8, [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]),
        (5, 2, [[0, 1], [2, 3]]),
        (3, 1, [[0], [1], [2]]),
        (4, 4, [[0, 1, 2, 3]]),
        (7, 4, [[0, 1, 2, 3]]),
    ],
)
def test_subsets_are_disjoint_runs_of_equal_size(n, k, runs):
    assert [list(run) for run in subsets(n, k)] == runs


# ---- our own mistakes

MISTAKES = [(weighted_vote, (MATH, candidates("2", "3"), [1.0, weight])) for weight in (-0.1, math.nan, math.inf, None)]
MISTAKES += [(weighted_vote, (MATH, candidates("2"), [1.0], share)) for share in (0.0, -0.5, 1.1, math.nan)]
MISTAKES += [(window_confidences, wrong) for wrong in (([], 3), ([1.0], 0), ([1.0], -2))]
MISTAKES += [(pass_at_k, wrong) for wrong in ((4, 2, 5), (4, 5, 2), (4, -1, 2), (4, 2, 0), (0, 0, 0))]
MISTAKES += [(subsets, wrong) for wrong in ((3, 4), (3, 0), (0, 1))]
MISTAKES += [(group_answers, (CODE, ["a"])), (majority, (CODE, candidates("a")))]


@pytest.mark.parametrize(("function", "arguments"), MISTAKES)
def test_a_mistake_of_our_own_is_refused(function, arguments):
    with pytest.raises(AssertionError):
        function(*arguments)


def test_as_many_weights_as_candidates_are_wanted():
    for choose, weights in ((lambda *a: weighted_vote(MATH, *a), [1.0]), (best_of, [1.0, 2.0, 3.0])):
        with pytest.raises(ValueError):
            choose(candidates("2", "3"), weights)
