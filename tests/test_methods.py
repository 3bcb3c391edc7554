"""What methods come to: choices and costs reckoned from rows that are written by hand, and what is refused."""

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanor1.evaluation.methods import (
    AMONG_SAMPLES,
    METHODS,
    Run,
    figures,
    looks_of,
    obstacle,
    pass_rate,
    picture,
    powers_of_two,
    report,
    runs_of,
    table,
)
from nanor1.tasks.problems import Problem

SUM = Problem("2 + 3 =", "5", "arithmetic", (2, 3))


def answer(text, *, tokens=10, logprob=-1.0, finish="stop", form=1.0, **more):
    """One answer to SUM as measure.to_row writes it; text None: it gives none."""
    accuracy = float(text in ("5", "5.0") and finish == "stop")
    given = text if finish == "stop" else None
    row = dict(text=f"<answer>{text}</answer>", answer=given, accuracy=accuracy, format=form, language=1.0)
    return row | dict(tokens=tokens, finish=finish, logprob=logprob, score=logprob / tokens) | more


def row(*answers, index=0, sampled=None, read=7, seconds=8.0):
    sampled = sum(a["tokens"] for a in answers) if sampled is None else sampled
    return dict(
        index=index, sampled=sampled, inserted=0, read=read, seconds=seconds, answers=[dict(a) for a in answers]
    )


def measured(name, n, rows, kind=None, problems=(SUM,), **options):
    kind = kind or METHODS[name].run
    run = Run(kind, n if kind in ("beam", "budget") else max(len(r["answers"]) for r in rows))
    return figures(name, n, run, rows, problems, **options)


def accuracy(name, n, *answers, **options):
    return measured(name, n, [row(*answers)], **options).accuracy


def unjudged(given):
    return dict(given, accuracy=None)


RIGHT, WRONG, SILENT = answer("5"), answer("4"), answer(None)
CUT = answer("5", finish="length")


# ---- what is chosen


def test_a_single_sample_is_worth_the_mean_over_all_samples():
    assert accuracy("sample", 1, RIGHT, WRONG, WRONG, CUT) == 0.25
    assert accuracy("sample", 1, RIGHT, RIGHT, WRONG, RIGHT) == 0.75


def test_the_majority_of_n_is_the_mean_over_disjoint_subsets_of_n():
    answers = [RIGHT, WRONG, RIGHT, RIGHT, WRONG, RIGHT, WRONG, WRONG]
    assert accuracy("majority", 2, *answers) == 0.5  # of equals the one given first: 5, 5, 4, 4
    assert accuracy("majority", 4, *answers) == 0.5  # 5 by three of four, 4 by three of four
    assert accuracy("majority", 8, *answers) == 1.0  # four against four
    assert accuracy("majority", 3, *answers) == 1.0  # the last two, both wrong, are in no subset


def test_a_format_that_could_not_be_judged_is_not_kept_and_ends_nothing():
    """As a rule of one's own gives it."""
    unformed = answer("5", form=None)
    rows = [row(unformed, RIGHT), row(unformed, WRONG, index=1)]
    found = measured("sample", 1, rows, problems=(SUM, SUM))
    assert (found.accuracy, found.strict) == (0.75, 0.25)
    assert measured("best-rule", 2, rows[:1]).strict == 1.0  # of two right ones the one in form
    assert measured("majority", 2, rows[:1]).accuracy == 1.0
    text = report(Run("samples", 2), rows, [SUM, SUM])
    assert re.search(r"^format +1\.000$", text, re.MULTILINE)
    nowhere = report(Run("samples", 2), [row(unformed, unformed)], [SUM])
    assert re.search(r"^format +nan$", nowhere, re.MULTILINE)


def test_an_answer_that_is_cut_off_or_missing_has_no_vote():
    assert accuracy("majority", 5, RIGHT, SILENT, SILENT, CUT, CUT) == 1.0


@pytest.mark.parametrize("name", ["majority", "vote-logprob", "best-logprob", "best-reward", "best-rule"])
def test_where_nobody_has_an_answer_the_problem_is_wrong(name):
    nobody = measured(name, 2, [row(SILENT, CUT)])
    assert (nobody.accuracy, nobody.problems) == (0.0, 1)


def test_the_vote_by_log_probability_weighs_the_mean_probability_of_a_token():
    # exp(-0.1) = 0.90 against 2 exp(-1) = 0.74 for the two; by sums of log-probabilities -10 against -4
    sure, unsure = answer("5", tokens=100, logprob=-10.0), answer("4", tokens=2, logprob=-2.0)
    assert accuracy("vote-logprob", 3, unsure, unsure, sure) == 1.0
    assert accuracy("majority", 3, unsure, unsure, sure) == 0.0


@pytest.mark.parametrize(("name", "field"), [("vote-tail", "tail"), ("vote-lowest", "lowest")])
def test_a_vote_by_confidence_adds_up_the_confidences_of_the_share_that_is_kept(name, field):
    other = {"tail": "lowest", "lowest": "tail"}[field]
    votes = [answer(text, **{field: weight, other: 1.0}) for text, weight in [("5", 9.0), ("4", 5.0), ("4", 5.5)]]
    assert accuracy(name, 3, *votes) == 0.0  # 9 against 10.5
    assert accuracy(name, 3, *votes, keep_share=0.6) == 1.0  # 9 against 5.5: two of three vote
    assert accuracy(name, 3, *votes, keep_share=0.1) == 1.0
    assert accuracy("majority", 3, *votes, keep_share=0.1) == 0.0  # which is not by confidence


def test_the_share_that_is_kept_does_not_touch_the_vote_by_log_probability():
    votes = [answer("5", logprob=-0.1), answer("4", logprob=-1.0), answer("4", logprob=-1.0)]
    assert accuracy("vote-logprob", 3, *votes, keep_share=0.1) == 0.0


def test_the_best_by_log_probability_is_the_likeliest_a_token_that_has_an_answer():
    short, long = answer("4", tokens=2, logprob=-2.0), answer("5", tokens=100, logprob=-10.0)
    assert accuracy("best-logprob", 2, short, long) == 1.0
    assert accuracy("best-logprob", 3, short, long, answer(None, logprob=0.0)) == 1.0
    assert accuracy("best-logprob", 3, short, long, answer("5", finish="length", logprob=0.0)) == 1.0


def test_the_best_by_reward_is_the_one_that_the_reward_model_prefers():
    liked, disliked = dict(preference=0.9), dict(preference=0.1)
    assert accuracy("best-reward", 2, answer("4", **disliked), answer("5", **liked)) == 1.0
    assert accuracy("best-reward", 2, answer("5", **disliked), answer("4", **liked)) == 0.0
    assert accuracy("best-reward", 2, answer("5", **disliked), answer("4", preference=None)) == 1.0


@given(st.lists(st.sampled_from([RIGHT, WRONG, SILENT, answer("5", form=0.0)]), min_size=1, max_size=7), st.data())
def test_the_best_by_rule_is_the_share_of_subsets_that_hold_a_right_answer_and_no_method_beats_it(answers, data):
    n = data.draw(st.integers(1, len(answers)))
    found = measured("best-rule", n, [row(*answers)])
    groups = [answers[i : i + n] for i in range(0, len(answers) - n + 1, n)]
    assert found.accuracy == pytest.approx(sum(any(a["accuracy"] for a in some) for some in groups) / len(groups))
    in_form = [any(a["accuracy"] and a["format"] for a in some) for some in groups]
    assert found.strict == pytest.approx(sum(in_form) / len(groups))
    for name in ("majority", "vote-logprob", "best-logprob"):
        other = measured(name, n, [row(*answers)])
        assert other.accuracy <= found.accuracy and other.strict <= found.strict


@given(st.lists(st.sampled_from([RIGHT, WRONG, SILENT, unjudged(WRONG)]), min_size=1, max_size=7), st.data())
def test_the_pass_rate_is_the_share_of_all_subsets_of_judged_answers_that_hold_a_right_one(answers, data):
    k, known = data.draw(st.integers(1, len(answers))), [a for a in answers if a["accuracy"] is not None]
    every = list(itertools.combinations(known, k))
    rows = [row(*answers), row(*[unjudged(WRONG)] * 7)]
    if every:
        assert pass_rate(k, rows) == pytest.approx(sum(any(a["accuracy"] for a in some) for some in every) / len(every))
    else:
        assert math.isnan(pass_rate(k, rows))


def test_strict_is_right_and_in_form_by_the_answer_that_was_chosen():
    plain = answer("5", form=0.0, logprob=-0.5)  # speaks for the right answer, as it is the likeliest
    found = measured("majority", 3, [row(RIGHT, plain, WRONG)])
    assert (found.accuracy, found.strict) == (1.0, 0.0)
    assert measured("sample", 1, [row(RIGHT, plain, WRONG, WRONG)]).strict == 0.25


def test_a_search_is_worth_its_first_answer_and_costs_all_that_it_sampled():
    found = measured("beam", 4, [row(WRONG, RIGHT, sampled=90)])
    assert (found.accuracy, found.tokens, found.tokens_p95) == (0.0, 90, 90)
    assert measured("budget", 4, [row(RIGHT, sampled=90)]).accuracy == 1.0


def test_of_refinement_the_first_n_answers_vote_and_only_they_are_paid_for():
    answers = [answer("4", tokens=10), answer("5", tokens=20), answer("5", tokens=50)]
    by_n = {n: measured("refine", n, [row(*answers)]) for n in (1, 2, 3)}
    assert {n: f.accuracy for n, f in by_n.items()} == {1: 0.0, 2: 0.0, 3: 1.0}  # of two equals the first
    assert {n: f.tokens for n, f in by_n.items()} == {1: 10, 2: 30, 3: 80}
    assert {n: f.seconds for n, f in by_n.items()} == {1: 1.0, 2: 3.0, 3: 8.0}
    assert measured("refine", 3, [row(*answers[:2])]).tokens == 30  # the context was full


# ---- what it costs


def test_n_of_a_shared_run_cost_their_share_of_its_tokens_and_seconds_and_all_of_its_prompt():
    answers = [answer("5", tokens=tokens) for tokens in (10, 20, 30, 100)]
    rows = [row(*answers, seconds=8.0, read=7), row(*answers, index=1, seconds=16.0, read=9)]
    found = {n: measured("majority", n, rows, problems=[SUM, SUM]) for n in (1, 2, 4)}
    assert {n: (f.tokens, f.seconds, f.read) for n, f in found.items()} == {
        1: (40, 3.0, 8),
        2: (80, 6.0, 8),
        4: (160, 12.0, 8),
    }
    assert {n: f.tokens_p95 for n, f in found.items()} == {1: 100, 2: 130, 4: 160}  # 10 + 20 and 30 + 100


def test_95_of_100_problems_cost_at_most_the_p95():
    rows = [row(answer("5", tokens=tokens), index=i) for i, tokens in enumerate(range(100, 0, -1))]
    found = measured("greedy", 1, rows, problems=[SUM] * 100)
    assert (found.tokens, found.tokens_p95) == (50.5, 95)


def test_answers_that_are_cut_off_are_counted_among_those_that_are_used():
    assert measured("majority", 2, [row(RIGHT, CUT, CUT, CUT)]).truncated == 0.75
    assert measured("refine", 2, [row(RIGHT, CUT, CUT, CUT)]).truncated == 0.5


# ---- what cannot be judged


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_problem_that_cannot_be_judged_is_left_out_whether_it_was_answered_or_not(name):
    more = dict(tail=1.0, lowest=1.0, preference=0.5, tree=0)
    kind = METHODS[name].run
    n = 1 if kind in ("greedy", "direct") or name == "sample" else 4
    good, bad = answer("5", **more), unjudged(answer("4", tokens=999, **more))
    size = 1 if kind in ("greedy", "direct") else 4
    groups = [[good] * size, [bad] * size, [unjudged(dict(SILENT, tree=0))] * size]
    rows = [row(*group, index=i) | dict(sampled_by_tree=[10 * size]) for i, group in enumerate(groups)]
    found = figures(name, n, Run(kind, size), rows, [SUM] * 3)
    assert (found.accuracy, found.problems) == (1.0, 1) and found.tokens <= 40
    with pytest.raises(ValueError, match="no answer could be judged"):
        figures(name, n, Run(kind, size), rows[1:], [SUM] * 3)


def test_a_sample_that_cannot_be_judged_is_left_out_of_its_problem():
    unknown = unjudged(WRONG)
    assert accuracy("sample", 1, RIGHT, WRONG, unknown, unknown) == 0.5
    assert accuracy("best-rule", 3, WRONG, unknown, RIGHT) == 1.0  # of the two that can be judged


# ---- runs


def test_methods_among_samples_share_one_run_and_searches_have_one_for_each_n():
    runs = runs_of(["greedy", "sample", "majority", "best-rule", "beam", "dvts", "refine", "budget"], [1, 2, 4, 8, 16])
    assert [*map(str, runs)] == (
        ["greedy-1", "samples-16", "beam-1", "beam-2", "beam-4", "beam-8", "beam-16", "dvts-16", "refine-16"]
        + ["budget-1", "budget-2", "budget-4", "budget-8", "budget-16"]
    )


def test_one_n_alone_needs_no_other():
    assert runs_of(["majority", "greedy", "beam", "refine"], [6]) == [
        Run("samples", 6),
        Run("greedy", 1),
        Run("beam", 6),
        Run("refine", 6),
    ]
    assert runs_of(["sample"], [1]) == [Run("samples", 1)]


@pytest.mark.parametrize(("n", "powers"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_what_is_looked_at_are_the_powers_of_two_and_n_itself(n, powers):
    assert powers_of_two(n) == powers


def of_trees(*trees, index=1):
    """A row of several independent searches, whose t-th one costs 100 * (t + 1) tokens; better ones stand first."""
    answers = [{**made, "tree": t} for t, tree in enumerate(trees) for made in tree]
    costs = [100 * (t + 1) for t in range(len(trees))]
    return row(*sorted(answers, key=lambda made: -made["score"]), index=index) | dict(
        sampled=sum(costs), sampled_by_tree=costs
    )


def test_fewer_trees_are_the_mean_over_those_of_a_run_of_more():
    good, bad = answer("5", score=-0.1), answer("4", score=-0.2)
    best_but_wrong = answer("4", score=0.0)
    rows = [of_trees([bad], [good], [bad], [best_but_wrong, good], index=0)]
    of = {n: figures("dvts", n, Run("dvts", 16), rows, [SUM]) for n in (4, 8, 16)}
    assert [(f.accuracy, f.tokens) for f in of.values()] == [(1 / 4, 250), (1 / 2, 500), (0, 1000)]
    assert of[8].tokens_p95 == 700 and of[16].tokens_p95 == 1000


# ---- a comparison


@pytest.fixture(scope="module")
def comparison():
    """The figures of every method at N = 1, 2, 4, 8 over two problems, one answered rightly, and one half the time."""
    more, ns = dict(tail=1.0, lowest=1.0, preference=0.5), [1, 2, 4, 8]
    right, wrong = answer("5", **more), answer("4", **more)
    rows = {
        run: [row(*[right] * run.n), row(*[right, wrong] * (run.n // 2), *[right] * (run.n % 2), index=1)]
        for run in runs_of(list(METHODS), ns)
    }
    rows[Run("dvts", 8)] = [of_trees([right, right], [right, right]), of_trees([right, wrong], [wrong, right])]
    return [figures(*look, rows[look[-1]], [SUM, SUM]) for look in looks_of(list(METHODS), ns)]


def test_a_comparison_has_each_method_at_each_n_at_which_it_is_no_other(comparison):
    found = {}
    for f in comparison:
        found.setdefault(f.method, []).append(f.n)
    assert list(found) == list(METHODS)
    for name, ns in found.items():
        if name in ("greedy", "direct", "sample"):
            assert ns == [1]
        elif name == "dvts":
            assert ns == [8]
        else:
            assert ns == ([2, 4, 8] if name in AMONG_SAMPLES else [1, 2, 4, 8])
    by_method = {(f.method, f.n): f for f in comparison}
    assert by_method["sample", 1].accuracy == 0.75 and by_method["best-rule", 2].accuracy == 1.0
    assert by_method["majority", 4].tokens == 40 and by_method["beam", 4].tokens == 40


def test_the_table_has_a_line_for_each_method_and_n(comparison):
    head, *lines = table(comparison).splitlines()
    assert head.split()[:4] == ["method", "N", "accuracy", "95%"] and len(lines) == len(comparison)
    for f, line in zip(comparison, lines, strict=True):
        name, n, share, low, _, high, strict, tokens, p95, read, cut, seconds = line.split()
        assert (name, int(n), float(share), float(strict)) == (f.method, f.n, round(f.accuracy, 3), round(f.strict, 3))
        assert float(low) <= f.accuracy <= float(high) and (int(tokens), int(p95)) == (f.tokens, f.tokens_p95)
        assert (int(read), cut, float(seconds)) == (7, "0%", pytest.approx(f.seconds, abs=0.05))


def test_the_picture_has_a_line_for_each_method_and_a_point_for_each_n(comparison):
    svg = ET.fromstring(picture(comparison, "A & B <c>"))
    of_tag = {}
    for element in svg.iter():
        of_tag.setdefault(element.tag.rpartition("}")[2], []).append(element)
    texts = [element.text for element in of_tag["text"]]
    assert "A & B <c>" in texts and {text.removesuffix(" (upper bound)") for text in texts} > set(METHODS)
    assert [text for text in texts if "upper bound" in text] == ["best-rule (upper bound)"]
    n_points = [len(line.get("points").split()) for line in of_tag["polyline"][: len(METHODS)]]
    begun = {name: 1 for name in AMONG_SAMPLES}  # by the one sample
    assert n_points == [sum(f.method == name for f in comparison) + begun.get(name, 0) for name in METHODS]


def test_a_report_of_samples_by_hand():
    problems = [SUM, SUM]
    rows = [row(RIGHT, WRONG, answer("5", form=0.0), CUT, seconds=1.0), row(*[WRONG] * 4, index=1, seconds=3.0)]
    text = report(Run("samples", 4), rows, problems)
    for line in [
        r"accuracy +0\.250   95%: .* \(n=2\)",
        r"majority@ +0\.250  0\.500  0\.500   of 1, 2, 4",  # a pair: 5 before 4; and 5, as the other is cut off
        r"pass@ +0\.250  0\.417  0\.500   of 1, 2, 4",  # 1 - 1/6 of the first problem's pairs hold a right one
        r"strict +0\.125",
        r"format +0\.875",
        r"cut off +0\.125",
        r"tokens/problem +40\.0 +95% of the problems: at most 40",
        r"time +4\.0 s   20 tokens/s",
    ]:
        assert re.search(f"^{line}", text, re.MULTILINE), text
    assert "@" not in report(Run("samples", 1), [row(RIGHT)], problems) and "language" not in text


def test_a_report_of_programs_has_no_majority():
    code = Problem("Add.", "", "code")
    text = report(Run("samples", 2), [row(RIGHT, WRONG)], [code])
    assert re.search(r"^pass@ +0\.500  1\.000   of 1, 2$", text, re.MULTILINE) and "majority" not in text


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "ns", "change", "message"),
    [
        ("majorty", [4], {}, "there is no such method; choose of greedy, direct, sample, majority,"),
        ("majority", [4], dict(task="code"), "programs cannot be voted on .no rule .* choose best-logprob"),
        ("vote-logprob", [4], dict(task="code"), "programs cannot be voted on"),
        ("vote-tail", [4], dict(task="code"), "programs cannot be voted on"),
        ("vote-lowest", [4], dict(task="code"), "programs cannot be voted on"),
        ("refine", [4], dict(task="code"), "programs cannot be voted on"),
        ("best-reward", [4], dict(has_reward_model=False), "needs --reward-model FOLDER"),
        ("refine", [4], dict(template="bare"), "asked in words needs a chat template; this is bare"),
        ("direct", [4], dict(template="r1-zero"), "this is r1-zero"),
        ("beam", [6], {}, "keeps N / 4 beams; give --n as a multiple"),
        ("dvts", [1, 2, 4, 6], {}, "keeps N / 4 beams; give --n as a multiple"),
        ("dvts", [1, 2, 4], {}, "one tree is a beam search; give --n 8 or more"),
        ("refine", [1], {}, "give --n 2 or more"),
        ("majority", [1], {}, "nothing to choose; give --n 2 or more"),
        ("vote-tail", [1], {}, "nothing to choose; give --n 2 or more"),
    ],
)
def test_a_method_that_cannot_work_says_why(name, ns, change, message):
    what = dict(task="gsm8k", template="chat", has_reward_model=True) | change
    assert re.search(message, obstacle(name, ns, **what))
    assert obstacle("greedy", ns, **what) is None


@pytest.mark.parametrize("ns", [[8], [1, 2, 4, 8, 16], [12]])
def test_all_methods_can_be_where_there_is_all_that_they_need(ns):
    assert [obstacle(name, ns, "gsm8k", "chat", True) for name in METHODS] == [None] * len(METHODS)
