import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanor1.rewards import accuracy, after_thinking, answer_block, combine, format, overlong_penalty, parse_rewards
from nanor1.tasks import Problem, countdown_problem

SHARED = Path(os.environ.get("NANOR1_SHARED", "/nonexistent"))
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="NANOR1_SHARED names no folder with conformance/ and data/"
)
COUNTDOWN = countdown_problem((1, 2, 3), 9)
SUM = Problem("What is 47 + 85?", "132", "arithmetic", (47, 85))
GSM8K = Problem("How many?", "1200", "gsm8k")
MATH = Problem("How much?", "\\frac{1}{2}", "math")

# Verdicts of level "policy" that this project chooses otherwise: 5000 nested parentheses, and a leading zero (05 + 07).
OTHER_CHOICES = {"cd-0171": False, "cd-0219": False}


def conformance(name: str) -> list[dict]:
    return [json.loads(line) for line in (SHARED / f"conformance/{name}.jsonl").read_text().splitlines()]


# ---- accuracy


@needs_shared
def test_countdown_accuracy_agrees_with_the_conformance_set():
    wrong = []
    rows = conformance("countdown")
    for row in rows:
        problem = Problem("", str(row["target"]), "countdown", tuple(row["numbers"]), row["target"])
        expected = row["expected_correct"]
        if row["level"] == "policy":
            expected = OTHER_CHOICES.get(row["id"], expected)
        if accuracy(problem, row["response"]) != float(expected):
            wrong.append(row["id"])
    assert len(rows) > 50 and wrong == []


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think> <answer>(1 + 2) * 3</answer>", 1.0),
        ("<think>a</think> <answer>\n(1 + 2) * 3\n</answer>", 1.0),
        ("<answer>(1 + 2) * 3</answer>", 1.0),  # no thinking at all: format's business
        ("a</think><answer>(1 + 2) * 3</answer>", 1.0),  # the opening tag is missing: format's business
        ("<think>a</think><answer>1 + 2 + 3</answer><answer>(1 + 2) * 3</answer>", 1.0),  # the last counts
        ("<think>a</think><answer>(1 + 2) * 3</answer><answer>1 + 2 + 3</answer>", 0.0),
        ("<think>a</think><answer>(1 + 2) * 3</answer><answer>1 + 2", 0.0),  # the last was cut off
        ("<think>a</think><answer>(1 + 2) * 3", 0.0),
        ("<think>a</think>(1 + 2) * 3", 0.0),
        ("<think>a</think>\\boxed{(1 + 2) * 3}", 0.0),
        ("<think><answer>(1 + 2) * 3</answer></think>", 0.0),  # thought, never said
        ("<think><answer>(1 + 2) * 3</answer>", 0.0),  # cut off while thinking
        ("<think>a</think><answer>(1 + 2) * 3</answer></think>", 0.0),  # thinking went on after it
        ("<think>a</think><ANSWER>(1 + 2) * 3</ANSWER>", 0.0),
        ("<think>a</think></answer>(1 + 2) * 3<answer>", 0.0),
        ("", 0.0),
    ],
)
def test_countdown_judges_the_last_answer_block_after_the_thinking(text, reward):
    assert accuracy(COUNTDOWN, text) == reward


@pytest.mark.parametrize(
    ("problem", "answer", "reward"),
    [
        (SUM, "132", 1.0),
        (SUM, "133", 0.0),
        (SUM, "47 + 85", 0.0),
        (SUM, "47 + 85 = 132", 1.0),
        (SUM, "132 = 47 + 85", 0.0),
        (SUM, "264/2", 0.0),
        (SUM, "\\frac{264}{2}", 0.0),
        (SUM, "66 \\times 2", 0.0),
        (GSM8K, "1,200", 1.0),
        (GSM8K, "$1200.00", 1.0),
        (GSM8K, "1200.", 1.0),
        (GSM8K, "\\$1{,}200", 1.0),
        (GSM8K, "-1200", 0.0),
        (GSM8K, "12", 0.0),
        (GSM8K, "100 * 12", 0.0),
        (MATH, "0.5", 1.0),
        (MATH, "$\\frac12$", 1.0),
        (MATH, "2", 0.0),
        (MATH, "no idea", 0.0),
        (MATH, "", 0.0),
    ],
)
@pytest.mark.parametrize("form", ["<answer>{}</answer>", "So it is \\boxed{{{}}}."])
def test_an_answer_is_right_by_its_value_and_a_number_must_be_worked_out(problem, answer, reward, form):
    assert accuracy(problem, "<think>I think 132, 1200, \\boxed{\\frac12}</think>" + form.format(answer)) == reward


def test_an_answer_found_while_thinking_does_not_count():
    for problem in (SUM, GSM8K, MATH):
        assert accuracy(problem, f"<think>\\boxed{{{problem.answer}}} <answer>{problem.answer}</answer>") == 0.0


def test_a_problem_without_a_gold_answer_cannot_be_judged():
    text = "<think>a</think><answer>1</answer>"
    assert accuracy(Problem("q", " ", "math"), text) is None
    assert accuracy(Problem("q", "", "countdown"), text) is None


tagged_text = st.lists(
    st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "1", "(1+2)*3", "\n", " "])
    | st.text(max_size=3),
    max_size=14,
).map("".join)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([COUNTDOWN, SUM, GSM8K, MATH]), tagged_text)
def test_every_text_is_judged_and_never_raises(problem, text):
    assert accuracy(problem, text) in (0.0, 1.0)
    assert format(problem, text) in (0.0, 1.0)


def test_thinking_ends_with_the_last_closing_tag():
    assert after_thinking("<think>a</think>b</think>c") == "c"
    assert after_thinking("no tags") == "no tags"
    assert after_thinking("<think>still at it") == ""
    assert answer_block("<answer>a<answer>b</answer>c</answer>") == "b"


# ---- format


@needs_shared
def test_format_agrees_with_the_conformance_columns_save_where_a_part_is_empty():
    rows = [row for row in conformance("format") if row.get("r1_think_answer_once") is not None]
    wrong, empty = [], 0
    for row in rows:
        compact = "".join(row["text"].split())
        is_empty = "<think></think>" in compact or "<answer></answer>" in compact
        empty += is_empty and row["r1_think_answer_once"]
        if format(COUNTDOWN, row["text"]) != float(row["r1_think_answer_once"] and not is_empty):
            wrong.append(row["id"])
    assert len(rows) > 50 and empty > 0 and wrong == []


@needs_shared
def test_boxed_format_agrees_with_the_conformance_column_on_texts_without_an_answer_tag():
    rows = [row for row in conformance("format") if row.get("think_once_first") is not None]
    rows = [row for row in rows if "answer>" not in row["text"]]
    wrong = [row["id"] for row in rows if format(MATH, row["text"] + " \\boxed{42}") != float(row["think_once_first"])]
    assert len(rows) > 10 and wrong == []


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>\na < b\n</think>\n\n<answer>\nb\n</answer>\n", 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer> Done.", 0.0),
        ("Well, <think>a</think><answer>b</answer>", 0.0),
        ("<think> </think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>\n</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a<think>b</think></think><answer>b</answer>", 0.0),
        ("<think><think>a</think><answer>b</answer>", 0.0),  # the tag the prompt pre-filled, written again
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0.0),
        ("a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format_holds_for_the_whole_text_or_not_at_all(text, reward):
    assert format(COUNTDOWN, text) == format(MATH, text) == reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think>\nSo it is $\\boxed{\\frac{1}{2}}$.", 1.0),
        ("<think>perhaps \\boxed{2}</think> \\boxed{3}", 1.0),  # a draft in the thinking is free
        ("<think>a</think> It is 3.", 0.0),
        ("<think>a</think> \\boxed{}", 0.0),
        ("<think>a</think> \\boxed{ } or {3}", 0.0),
        ("<think>a</think> \\boxed{3", 0.0),
        ("<think>a</think> \\boxed{3} or \\boxed{4}", 0.0),
        ("<think>\\boxed{3}</think>", 0.0),
        ("<think> </think>\\boxed{3}", 0.0),
        ("So: <think>a</think>\\boxed{3}", 0.0),
        ("<think>a</think><think>b</think>\\boxed{3}", 0.0),
        ("<think>a</think><answer>\\boxed{3}", 0.0),
        ("\\boxed{3}", 0.0),
    ],
)
def test_boxed_format_is_thinking_once_and_then_one_box_and_only_for_tasks_that_ask_for_it(text, reward):
    assert format(MATH, text) == format(GSM8K, text) == reward
    assert format(COUNTDOWN, text) == format(SUM, text) == 0.0


@pytest.mark.parametrize("piece", ["<think>", "\\boxed{", "</think> ", "{ ", "\n", "<answer>"])
def test_format_takes_time_in_proportion_to_the_text(piece):
    start = time.perf_counter()
    for text in (piece * 20_000, f"<think>{piece * 20_000}</think>{piece * 20_000}"):
        assert format(MATH, text) == 0.0
    assert time.perf_counter() - start < 5.0


# ---- length


@pytest.mark.parametrize(
    ("n_tokens", "penalty"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (500, -1.0)]
)
def test_overlong_penalty_falls_from_0_to_minus_1_over_the_buffer(n_tokens, penalty):
    assert overlong_penalty(n_tokens, 100, 20) == pytest.approx(penalty)


@needs_shared
def test_overlong_penalty_agrees_with_the_conformance_set():
    rows = [row for row in conformance("format") if row["rule"] == "soft_overlong"]
    assert rows
    for row in rows:
        limit, buffer = row["params"]["max_completion_len"], row["params"]["soft_punish_cache"]
        assert overlong_penalty(row["text"], limit, buffer) == pytest.approx(row["expected"])


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_an_overlong_buffer_outside_the_length_is_refused(buffer):
    with pytest.raises(ValueError, match=f"buffer is {buffer} tokens; it must lie in 1..100"):
        overlong_penalty(5, 100, buffer)


# ---- combination


@pytest.mark.parametrize(
    ("is_right", "has_format", "reward"), [(1.0, 1.0, 1.0), (1.0, 0.0, 0.9), (0.0, 1.0, 0.0), (0.0, 0.0, -0.1)]
)
def test_format_can_cost_but_earns_nothing(is_right, has_format, reward):
    parts = {"accuracy": is_right, "format": has_format}
    assert combine(parts, {"accuracy": 1.0, "format": 0.1}) == pytest.approx(reward)


def test_a_reward_with_a_part_that_could_not_be_judged_is_none():
    assert combine({"accuracy": None, "format": 1.0}, {"accuracy": 1.0, "format": 0.1}) is None
    assert combine({"accuracy": None, "format": 1.0}, {"format": 0.1}) == 0.0  # not weighted, not needed


def test_reward_weights_are_read_by_name():
    assert parse_rewards("accuracy=1,format=0.1") == {"accuracy": 1.0, "format": 0.1}
    assert parse_rewards(" format = 0 ") == {"format": 0.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acuracy=1", "unknown reward 'acuracy'.*choose from accuracy, format"),
        ("", "unknown reward ''"),
        ("accuracy=1,", "unknown reward ''"),
        ("accuracy", "no weight; write accuracy=NUMBER"),
        ("accuracy=one", "weight of 'accuracy' is 'one'"),
        ("accuracy=", "weight of 'accuracy' is ''"),
        ("accuracy=nan", "weight of 'accuracy' is 'nan'"),
        ("accuracy=inf", "weight of 'accuracy' is 'inf'"),
        ("accuracy=-1", "weight of 'accuracy' is '-1'"),
        ("accuracy=1,accuracy=1", "stands twice"),
    ],
)
def test_a_wrong_reward_list_is_refused_with_what_to_write(text, message):
    with pytest.raises(ValueError, match=message):
        parse_rewards(text)
