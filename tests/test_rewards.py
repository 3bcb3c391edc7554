import json
import math
import os
import pickle
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanor1.rewards import (
    NAMES,
    OwnReward,
    accuracy,
    after_thinking,
    answer_block,
    chance,
    combine,
    format,
    language,
    overlong_penalty,
    parse_rewards,
    read_reward_file,
)
from nanor1.tasks.problems import Problem, countdown_problem, prefilled

SHARED = Path(os.environ.get("NANOR1_SHARED", "/nonexistent"))
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="NANOR1_SHARED names no folder with conformance/ and data/"
)
COUNTDOWN = countdown_problem((1, 2, 3), 9)
SUM = Problem("What is 47 + 85?", "132", "arithmetic", (47, 85))
GSM8K = Problem("How many?", "1200", "gsm8k")
MATH = Problem("How much?", "\\frac{1}{2}", "math")
CODE = Problem("Add two numbers.", "", "code")
GENERAL = Problem("Write a letter.", "", "general")
ENGLISH = Problem("How many apples are left?", "3", "math")
CHINESE = Problem("还剩几个苹果？", "3", "math")

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
        (SUM, "$132/hour", 1.0),
        (SUM, r"2\binom{12}{2}", 0.0),
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
    assert all(format(other, text) in (0.0, 1.0) for other in (problem, CODE, GENERAL))
    assert 0.0 <= language(problem, text) <= 1.0


def test_thinking_ends_with_the_last_closing_tag():
    assert after_thinking("<think>a</think>b</think>c") == "c"
    assert after_thinking("no tags") == "no tags"
    assert after_thinking("<think>still at it") == ""
    assert answer_block("<answer>a<answer>b</answer>c</answer>") == "b"
    assert language(SUM, "<think>so</think>是</think>四") == 1 / 2  # of what comes before it
    assert language(SUM, "so 是") == language(SUM, "<think>so 是") == 1 / 2


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


@needs_shared
def test_the_format_of_code_agrees_with_the_conformance_set():
    rows = [row for row in conformance("format") if row["rule"] == "code_format_python"]
    assert len(rows) > 2 and [row["id"] for row in rows if format(CODE, row["text"]) != row["expected"]] == []


BLOCK = "```python\nprint(1)\n```"


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        (BLOCK, 1.0),
        (f"It prints 1:\n\n{BLOCK}\n\nDone.", 1.0),
        ("  ```python \r\n  print(1)\r\n  ``` \r\n", 1.0),  # in a list; line ends of another system
        (f"Run it:\n```bash\npython a.py\n```\n{BLOCK}", 1.0),  # other languages are free
        (f"{BLOCK}\n{BLOCK}", 0.0),
        ("```python\nprint(1)\n", 0.0),  # never closed
        ("```python\nprint(1)```", 0.0),
        ("```python\n\n```", 0.0),
        ("```python print(1)\n```", 0.0),
        ("Here: ```python\nprint(1)\n```", 0.0),
        ("```py\nprint(1)\n```", 0.0),
        ("```\nprint(1)\n```", 0.0),
        ("print(1)", 0.0),
        ("", 0.0),
    ],
)
@pytest.mark.parametrize("form", ["<think>a</think>\n{}", "<think>a</think>\n<answer>{}</answer>\n"])
def test_the_answer_to_code_holds_one_closed_python_block(form, answer, reward):
    assert format(CODE, form.format(answer)) == reward


def test_a_program_in_the_thinking_is_free_and_code_has_the_thinking_once_too():
    assert format(CODE, f"<think>\n{BLOCK}\n</think>\n{BLOCK}") == 1.0
    assert format(CODE, f"<think>\n{BLOCK}\n</think>\nprint(1)") == 0.0
    assert format(CODE, BLOCK) == format(CODE, f"<think></think>\n{BLOCK}") == 0.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think>\n\nDear Sir, <b>hello</b>", 1.0),
        ("<think>a</think><answer>Dear Sir</answer>", 1.0),  # what a base model is shown
        ("<think>a</think> \n", 0.0),
        ("<think> </think>Dear Sir", 0.0),
        ("Dear Sir", 0.0),
        ("Well: <think>a</think>Dear Sir", 0.0),
        ("<think>a</think>Dear <think>b</think>Sir", 0.0),
        ("<think>a</think>Dear <answer>Sir", 0.0),
        ("<think>a</think><answer>Dear Sir</answer> Yours", 0.0),
        ("<think>Dear Sir", 0.0),
    ],
)
def test_a_general_answer_is_thinking_once_and_then_anything_without_tags(text, reward):
    assert format(GENERAL, text) == reward


@needs_shared
def test_the_general_format_agrees_with_the_conformance_column_where_an_answer_follows():
    rows = [row for row in conformance("format") if row.get("think_once_first") is not None]
    rows = [row for row in rows if "answer>" not in row["text"]]
    wrong = [row["id"] for row in rows if format(GENERAL, row["text"] + " 42") != float(row["think_once_first"])]
    assert len(rows) > 10 and wrong == []


@pytest.mark.parametrize("prompt", ["<｜User｜>Hello<｜Assistant｜><think>", "<|assistant|>\n<think>\n"])
def test_a_think_that_the_template_wrote_counts_and_one_more_is_one_too_many(prompt):
    for problem, answer in ((GENERAL, "Hello."), (MATH, "\\boxed{1}"), (CODE, BLOCK)):
        once, again = f"\na\n</think>\n\n{answer}", f"<think>\na\n</think>\n\n{answer}"
        assert format(problem, prefilled(prompt) + once) == 1.0
        assert format(problem, prefilled(prompt) + again) == 0.0
        assert format(problem, prefilled("<|assistant|>\n") + again) == 1.0


@pytest.mark.parametrize("piece", ["<think>", "\\boxed{", "</think> ", "{ ", "\n", "<answer>", "```", "\n```py"])
def test_format_takes_time_in_proportion_to_the_text(piece):
    start = time.perf_counter()
    for text in (piece * 20_000, f"<think>{piece * 20_000}</think>{piece * 20_000}"):
        assert format(MATH, text) == 0.0
        assert format(CODE, text) == format(CODE, f"<think>a</think>\n```python\n{text}") == 0.0
    assert time.perf_counter() - start < 5.0


# ---- language


@pytest.mark.parametrize(
    ("text", "english", "chinese"),
    [
        ("So we add two and two.", 1, 0),
        ("所以，我们把它们加起来。", 0, 1),
        ("two apples, 苹果", 1 / 2, 1 / 2),  # each character counts
        ("so 只有 2 个", 1 / 4, 3 / 4),
        ("", 1, 1),
        ("1 + 2 = 3?! (１２)", 1, 1),
        ("let x and y be 3a + b", 1, 0),  # variables are no words
        ("设 x 和 y 为 3a", 0, 1),
        ("I 有 a 苹果", 0, 1),  # nor then are "I" and "a"
        ("it's 对", 1 / 2, 1 / 2),
        ("α + β ≤ π, ℓ, 𝑥: 对", 0, 1),
        ("re\u0301sume\u0301 对", 1 / 2, 1 / 2),  # an accent of its own parts no word
        ("x\u0302 对", 0, 1),
        ("5 km 多", 1 / 2, 1 / 2),  # not told from English
        ("then かなカ", 1 / 4, 0),
        ("漢字かな", 0, 1 / 2),  # kanji are not told from Chinese
        ("the sum of \u0430 and b", 4 / 5, 0),  # a Cyrillic letter that looks Latin
        ("m\u043eney", 1 / 2, 0),
        ("ответ is", 1 / 2, 0),
        ("سَلام is", 1 / 2, 0),
        ("שלום is", 1 / 2, 0),
        ("답은 is", 1 / 2, 0),
        ("में is", 1 / 2, 0),
        ("ดี is", 1 / 2, 0),
        ("და is", 1 / 2, 0),
    ],
)
def test_language_is_the_share_of_words_in_the_script_of_the_prompt(text, english, chinese):
    assert language(ENGLISH, text) == pytest.approx(english)
    assert language(CHINESE, text) == pytest.approx(chinese)


def test_the_language_of_a_miniature_that_mixes_two():
    thought = "8 - 3 = 5 - 4 = 1 ? 15 14 wait 8 * 3 = 24 - 4 = 20 ? 15 5 等 8 - 3 = 5 + 4 = 9 ? 15 6 wait 8 + 4 yes"
    text = f"<think> {thought} </think> <answer> ( 8 + 4 ) + 3 </answer>"
    assert language(Problem("8 3 4 target : 15", "15", "countdown"), text) == 3 / 4


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("<think> two </think> 苹果", 1),
        ("<think> 苹果 </think> two", 0),
        ("two </think> 苹果", 1),
        ("two 对", 1 / 2),  # no tags: all is reasoning
        ("<think> two 对", 1 / 2),  # cut off
        ("<think> two </think> 对 </think> four", 1 / 2),
        ("<think></think> 苹果", 1),
    ],
)
def test_the_language_is_that_of_the_reasoning(text, share):
    assert language(ENGLISH, text) == share


@pytest.mark.parametrize(
    ("prompt", "text", "share"),
    [
        ("3 + 4 = ?", "two 对", 1 / 2),
        ("3 + 4 = ?", "two", 1),  # no word: English
        ("", "two", 1),
        ("用 Python 计算", "对", 1),
        ("Translate 苹果 for me", "对", 0),
        ("$\\text{Find the value of}$ 求 x", "对", 1),  # LaTeX has no say here either
        ("two 二", "two", 1),  # as many: English
        ("Сколько яблок?", "три яблока", 1),
        ("Сколько яблок?", "three", 0),
        ("Combien de pommes ?", "two", 1),  # French is not told from English
    ],
)
def test_the_target_is_the_language_that_most_words_of_the_prompt_are_in(prompt, text, share):
    assert language(Problem(prompt, "", "math"), text) == share


NO_WORDS = [
    "```python\ndef add(left, right):\n    return `left`  # 加\n```",
    "`total 总`",
    "``total 总``",
    "$\\text{总 all}$",
    "$a = \\$5 总$",
    "$$\n\\sum 总 all $ x\n$$",
    "\\(总 \\text{all}\\)",
    "\\[\\begin{cases} 总 \\\\ all \\end{cases}\\]",
    "\\frac{all}{总}",
    "\\boxed{all \\frac{\\text{总}}{2}}",
    "\\alpha",
    "\\$5",
    "$5",
    "https://example.com/path?q=two",
    "www.example.com",
    "<think>",
    "<answer>",
    "</answer>",
    "42",
    "3.14%",
    "<<3*10=30>>30",
    "x",
    "β",
]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.sampled_from(["two", "apples", "对", "苹果", "か", "да"]), st.sampled_from(["", *NO_WORDS])),
        max_size=8,
    )
)
def test_digits_code_latex_tags_and_addresses_change_nothing(pairs):
    plain, mixed = " ".join(word for word, _ in pairs), " ".join(f"{word} {piece}" for word, piece in pairs)
    for problem in (ENGLISH, CHINESE):
        assert language(problem, mixed) == language(problem, plain)


@pytest.mark.parametrize("text", NO_WORDS)
def test_what_is_no_word_is_none_alone_either(text):
    assert language(ENGLISH, text) == language(CHINESE, text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "```\n对 two",
        "`对 two",
        "`对\ntwo`",
        "$x 对 two",
        "$$x 对 two",
        "\\(对 two",
        "\\[对 two",
        "\\boxed{对 two",
        "<对> two",
        "3 <4 对 two 5> 6",
        "$5对$6 two",
        "$5 对 $ two",
        "5$ 对 two 6$",
        "\\$对 two$ x",
        "http://example.com，对 two",
    ],
)
def test_what_is_left_open_or_money_hides_no_word(text):
    assert language(ENGLISH, text) == language(CHINESE, text) == 1 / 2


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=20), st.lists(st.sampled_from([*"`$\\()[]{}<>\n xа中か\ud800", "```", "\\a{", "two"])))
def test_every_text_has_a_language_share_and_never_raises(prompt, pieces):
    for text in ("".join(pieces), prompt + "".join(pieces)):
        assert 0.0 <= language(Problem(prompt, "", "math"), text) <= 1.0


@pytest.mark.parametrize(
    "piece",
    [
        "$",
        "`",
        "$ ",
        "`a",
        "$$a$",
        "\\",
        "\\(",
        "\\[[",
        "\\a{",
        "\\a{{}",
        "{",
        "<a",
        "www.",
        "中",
        "\u0430",
        "\u0301",
        "x",
    ],
)
def test_language_takes_time_in_proportion_to_the_text(piece):
    start = time.process_time()
    language(ENGLISH, (piece * 100_000)[:100_000])
    language(ENGLISH, "``" + piece * 10_000 + "```")
    assert time.process_time() - start < 5.0


@needs_shared
def test_language_agrees_with_the_conformance_set():
    rows = [row for row in conformance("format") if row["rule"] == "language_consistency"]
    wrong = []
    for row in rows:
        problem = CHINESE if row["params"]["target_language"] == "zh" else ENGLISH  # Spanish and French pass for it
        share = language(problem, row["text"])
        is_met = share >= row["expected"] if row["op"] == ">=" else share <= row["expected"]
        wrong += [] if is_met else [row["id"]]
    assert len(rows) > 20 and wrong == []


@needs_shared
def test_the_more_of_another_language_the_smaller_the_share():
    rows = [row for row in conformance("format") if row["rule"] == "language_order"]
    rows = [row for row in rows if row["id"] != "fmt-0269"]  # mixed with nothing but LaTeX, which does not count
    for row in rows:
        english, mixed, other = (language(ENGLISH, text) for text in row["text"])
        assert english > mixed > other, row["id"]
    assert len(rows) > 3


# ---- chance


def test_a_random_reward_is_fixed_by_the_text_and_one_half_on_average():
    values = [chance(SUM, f"<think>{i}</think>") for i in range(1000)]
    assert set(values) == {0.0, 1.0} and abs(sum(values) - 500) < 4 * 16  # four standard deviations
    assert values == [chance(SUM, f"<think>{i}</think>") for i in range(1000)]
    assert values != [chance(GSM8K, f"<think>{i}</think>") for i in range(1000)]


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
    assert combine({"accuracy": None, "format": 0.0}, {"accuracy": 0.0, "format": 0.1}) == -0.1


def test_rewards_of_all_kinds_add_up_by_their_weights():
    weights = parse_rewards("accuracy=1,format=0.1,language=0.2,preference=0.5")
    parts = {"accuracy": 1.0, "format": 0.0, "language": 0.75, "preference": 0.4}
    assert combine(parts, weights) == pytest.approx(1 - 0.1 + 0.15 + 0.2)
    assert combine(parts | {"preference": None}, weights) is None


def test_reward_weights_are_read_by_name():
    assert parse_rewards("accuracy=1,format=0.1") == {"accuracy": 1.0, "format": 0.1}
    assert parse_rewards(" format = 0 ") == {"format": 0.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acuracy=1", "unknown reward 'acuracy'.*choose from accuracy, format, language, .*preference"),
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


# ---- rewards of one's own


def write_rewards(folder: Path, text: str, name: str = "my_rewards.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


def returning(folder: Path, expression: str, name: str = "mine") -> OwnReward:
    text = f"import numpy, torch, fractions\ndef {name}(problem, text):\n    return {expression}\n"
    return read_reward_file(write_rewards(folder, text))[name]


def test_the_public_functions_of_a_file_are_rewards_and_nothing_else_of_it_is(tmp_path):
    text = """
from __future__ import annotations
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from os.path import join
from nanor1.rewards import accuracy as rule

@dataclass
class Weight:
    value: float

SCALE = Weight(0.5)

def _helper(text):
    return len(text)

def brevity(problem, text, scale=SCALE.value):
    return scale * _helper(text)

@lru_cache
def kept(problem, text):
    return 1

is_right = lambda problem, text: rule(problem, text)
"""
    found = read_reward_file(write_rewards(tmp_path, text))
    assert list(found) == ["brevity", "kept", "is_right"]
    assert [reward.name for reward in found.values()] == list(found)
    problem = Problem("q", "3", "math")
    assert found["brevity"](problem, "four") == 2.0
    assert found["is_right"](problem, "\\boxed{3}") == 1.0 and found["is_right"](problem, "\\boxed{4}") == 0.0
    assert found["is_right"](Problem("q", "", "text"), "3") is None
    assert {reward.n_failed for reward in found.values()} == {0}
    brevity = found["brevity"].function
    assert pickle.loads(pickle.dumps(brevity)) is brevity  # as its own worker processes need


def test_a_reward_sees_the_problem_and_the_text(tmp_path):
    reward = returning(tmp_path, "float(problem.answer) + len(text)")
    assert reward(Problem("q", "3", "math"), "four") == 7.0


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2", 2.0),
        ("True", 1.0),
        ("-0.5", -0.5),
        ("None", None),
        ("fractions.Fraction(1, 4)", 0.25),
        ("numpy.float32(0.5)", 0.5),
        ("numpy.array([[0.5]])", 0.5),
        ("torch.tensor(0.5)", 0.5),
        ("torch.tensor([0.5], requires_grad=True)", 0.5),
    ],
)
def test_a_number_of_any_kind_is_a_reward_and_none_is_no_judgement(tmp_path, expression, value):
    reward = returning(tmp_path, expression)
    result = reward(SUM, "text")
    assert result == value and type(result) in (float, type(None))
    assert (reward.n_failed, reward.first_error) == (0, None)


@pytest.mark.parametrize(
    ("expression", "what"),
    [
        ("'yes'", "it returned 'yes', which is text"),
        ("'0.5'", "it returned '0.5', which is text"),
        ("b'1'", "text"),
        ("float('nan')", "it returned nan; a reward is a finite number"),
        ("float('inf')", "it returned inf"),
        ("torch.tensor(float('nan'))", "it returned tensor"),
        ("numpy.array([1.0, 2.0])", "ValueError"),
        ("torch.ones(2)", "RuntimeError"),
        ("[1.0]", "TypeError"),
        ("{}", "TypeError"),
        ("1j", "TypeError"),
        ("10**400", "OverflowError"),
        ("object()", "TypeError"),
    ],
)
def test_what_is_no_number_is_no_judgement_counted_and_told_once(tmp_path, expression, what):
    reward = returning(tmp_path, expression)
    assert reward(SUM, "text") is None and reward(SUM, "other") is None
    assert reward.n_failed == 2
    assert reward.first_error.startswith("my_rewards.py, line 2, in mine: ") and what in reward.first_error


def test_an_exception_is_no_judgement_and_the_deepest_line_of_the_file_is_told(tmp_path):
    text = """import json

def _read(text):
    return json.loads(text)

def divide(problem, text):
    value = _read(text)
    return 1 / value
"""
    reward = read_reward_file(write_rewards(tmp_path, text))["divide"]
    assert reward(SUM, "4") == 0.25 and reward(SUM, "0") is None and reward(SUM, "x") is None
    assert reward.n_failed == 2
    assert reward.first_error == "my_rewards.py, line 8, in divide: ZeroDivisionError: division by zero"
    reward = read_reward_file(tmp_path / "my_rewards.py")["divide"]
    assert reward(SUM, "x") is None  # raised in json, called by line 4
    assert reward.first_error.startswith("my_rewards.py, line 4, in divide: json.decoder.JSONDecodeError: Expecting")


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("return mine(problem, text)", "RecursionError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise BaseException('x')", "BaseException: x"),
        ("raise Odd()", "Odd"),
        ("raise ValueError('a\\nb' * 1000)", "ValueError: a b"),
        ("assert text == 'x', 'not x'", "AssertionError: not x"),
    ],
)
def test_nothing_that_a_reward_raises_ends_a_run(tmp_path, body, what):
    text = f"""
class Odd(Exception):
    def __str__(self):
        raise ValueError("no text")

def mine(problem, text):
    {body}
"""
    reward = read_reward_file(write_rewards(tmp_path, text))["mine"]
    assert reward(SUM, "text") is None
    assert reward.first_error.startswith("my_rewards.py, line 7, in mine: ") and what in reward.first_error
    assert len(reward.first_error) < 400 and "\n" not in reward.first_error


def test_ctrl_c_within_a_reward_stops_the_run(tmp_path):
    text = "def mine(problem, text):\n    raise KeyboardInterrupt\n"
    with pytest.raises(KeyboardInterrupt):
        read_reward_file(write_rewards(tmp_path, text))["mine"](SUM, "text")


def test_an_accuracy_of_ones_own_lies_between_0_and_1(tmp_path):
    for value in (0, 0.25, 1):
        assert returning(tmp_path, str(value), "accuracy")(SUM, "text") == value
    for value in (-0.01, 1.5):
        reward = returning(tmp_path, str(value), "accuracy")
        assert reward(SUM, "text") is None
        assert f"in accuracy: ValueError: it returned {value}; accuracy lies in 0..1" in reward.first_error
    assert returning(tmp_path, "1.5", "score")(SUM, "text") == 1.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def mine(problem, text)\n    return 1\n", r"my_rewards.py, line 1: SyntaxError"),
        ("x = 1\n\ny = 1 / 0\n", r"my_rewards.py, line 3: ZeroDivisionError: division by zero"),
        ("def _f():\n    return {}['a']\n_f()\n", r"my_rewards.py, line 2: KeyError: 'a'"),
        ("import os\nimport no_such_module_1\n", r"line 2: ModuleNotFoundError: .*no_such_module_1.*on PYTHONPATH"),
        ("import sys\nsys.exit(2)\n", r"line 2: SystemExit: 2"),
        ("open('/nonexistent/x')\n", r"my_rewards.py, line 1: FileNotFoundError"),
        ("", "my_rewards.py defines no public function; write one, as def my_reward"),
        ("from math import sqrt\ndef _f(p, t): pass\nclass A: pass\n", "defines no public function"),
        ("\ndef one(text): return 1\n", r"my_rewards.py, line 2: one\(text\) cannot be called as one\(problem, text\)"),
        ("def three(a, b, c): return 1\n", r"line 1: three\(a, b, c\) cannot be called.*call it _three"),
        ("def named(problem, *, text): return 1\n", r"line 1: named\(problem, \*, text\) cannot"),
        ("def ok(p, t): return 1\ndef preference(p, t): return 1\n", "line 2: preference is a reward model's name"),
        ("def step(p, t): return 1\n", "line 1: step is the name of another figure in metrics.jsonl"),
        ("def reward(p, t): return 1\n", "line 1: reward is the name of another figure"),
        ("async def mine(problem, text): return 1\n", "line 1: mine is async"),
        ("def mine(problem, text): yield 1\n", "line 1: mine yields"),
    ],
)
def test_a_reward_file_that_cannot_be_used_is_refused_with_file_line_and_function(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_reward_file(write_rewards(tmp_path, text))


def test_a_reward_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none.py cannot be read \(No such file or directory\)"):
        read_reward_file(tmp_path / "none.py")
    with pytest.raises(ValueError, match="cannot be read"):
        read_reward_file(tmp_path)
    (tmp_path / "bytes.py").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="bytes.py, line .*SyntaxError"):
        read_reward_file(tmp_path / "bytes.py")


def test_a_reward_file_may_be_called_like_a_module_and_is_read_anew_each_time(tmp_path):
    first = read_reward_file(write_rewards(tmp_path, "def mine(p, t): return 1\n", "math.py"))
    second = read_reward_file(write_rewards(tmp_path, "def mine(p, t): return 2\n", "math.py"))
    assert (first["mine"](SUM, ""), second["mine"](SUM, "")) == (1.0, 2.0)
    assert math.sqrt(4) == 2 and [path.name for path in tmp_path.iterdir()] == ["math.py"]


def test_rewards_of_ones_own_are_weighed_by_their_names(tmp_path):
    own = read_reward_file(
        write_rewards(tmp_path, "def brevity(p, t): return 1 / len(t)\ndef accuracy(p, t): return 1\n")
    )
    names = (*NAMES, *own)
    weights = parse_rewards("accuracy=1,brevity=0.5", names)
    assert weights == {"accuracy": 1.0, "brevity": 0.5}
    parts = {name: own[name](SUM, "four") for name in weights}
    assert combine(parts, weights) == 1.125
    assert combine({name: own[name](SUM, "") for name in weights}, weights) is None
    with pytest.raises(
        ValueError, match="unknown reward 'brevty'.*accuracy, format, language, random, preference, brevity$"
    ):
        parse_rewards("brevty=1", names)
