import hashlib
import json
import os
import sys
import time
import warnings
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanor1.rewards import accuracy
from nanor1.tasks.countdown import check_countdown, countdown_numbers, countdown_value, fold
from nanor1.tasks.problems import (
    SPLITS,
    TASKS,
    Problem,
    countdown_problem,
    format_prompt,
    instance_key,
    is_in_share,
    make_task,
    parse_fields,
    prefilled,
)

MINIATURE = dict(
    n_numbers=3, max_number=15, operators="+-*", max_result=24, min_target=0, max_target=24, wording="symbols",
    held_out_share=0.2,
)  # fmt: skip
MINIATURE_SUM = dict(n_terms=6, max_term=9, max_value=40, operators="+-", wording="symbols")
SHARED = Path(os.environ.get("NANOR1_SHARED", "/nonexistent"))
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="NANOR1_SHARED names no folder with conformance/ and data/"
)


def read_task(name, path, **arguments):
    return make_task(name, data=path, parts=("all",), **arguments).part("all")


def reachable(numbers: tuple) -> set[Fraction]:
    """Every value that + - * / make of all the numbers: split them in two, combine what each half makes."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    values = set()
    for mask in range(1, 2 ** len(numbers) - 1):
        left = reachable(tuple(n for i, n in enumerate(numbers) if mask >> i & 1))
        right = reachable(tuple(n for i, n in enumerate(numbers) if not mask >> i & 1))
        for a in left:
            for b in right:
                values |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return values


# ---- the checker

trees = st.recursive(
    st.integers(0, 99),
    lambda child: st.tuples(st.sampled_from("+-*/"), child, child) | st.tuples(st.just("neg"), child),
    max_leaves=6,
)


def render(tree) -> str:
    if isinstance(tree, int):
        return str(tree)
    if tree[0] == "neg":
        return f"-({render(tree[1])})"
    return f"({render(tree[1])}) {tree[0]} ({render(tree[2])})"


def leaves(tree) -> list[int]:
    return [tree] if isinstance(tree, int) else [leaf for child in tree[1:] for leaf in leaves(child)]


def work_out(tree) -> Fraction | None:
    if isinstance(tree, int):
        return Fraction(tree)
    values = [work_out(child) for child in tree[1:]]
    if None in values or (tree[0] == "/" and values[1] == 0):
        return None
    if tree[0] == "neg":
        return -values[0]
    a, b = values
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[tree[0]]()


@settings(deadline=None, max_examples=300)
@given(trees, st.integers(-50, 50))
def test_checker_accepts_a_tree_exactly_when_its_value_is_the_target(tree, other_target):
    value = work_out(tree)
    if value is not None and value.denominator == 1:
        assert check_countdown(render(tree), leaves(tree), int(value))
    assert check_countdown(render(tree), leaves(tree), other_target) == (value == other_target)


@settings(deadline=None)
@given(trees, st.integers(1, 99), st.data())
def test_checker_refuses_a_right_value_when_the_numbers_are_not_the_given_ones(tree, extra, data):
    value = work_out(tree)
    if value is None or value.denominator != 1:
        return
    used = leaves(tree)
    dropped = data.draw(st.integers(0, len(used) - 1))
    assert not check_countdown(render(tree), [*used, extra], int(value))
    assert not check_countdown(render(tree), used[:dropped] + used[dropped + 1 :], int(value))


@pytest.mark.parametrize(
    ("equation", "numbers", "target", "verdict"),
    [
        ("1 + 2 * 3", (1, 2, 3), 7, True),  # the usual precedence
        ("8 - 3 - 2", (2, 3, 8), 3, True),  # from the left
        ("5 * (5 - 1 / 5)", (1, 5, 5, 5), 24, True),  # 24/5 on the way
        ("3 - -5", (3, 5), 8, True),
        ("+3 + 5", (3, 5), 8, True),
        ("  (1+2)\n", (1, 2), 3, True),
        ("300001 / 300000", (300001, 300000), 1, False),
        ("2 ** 3", (2, 3), 8, False),
        ("9 // 2", (9, 2), 4, False),
        ("~-3 + 0", (3, 0), 2, False),
        ("4 * 2.5", (4, 2, 5), 10, False),
        ("1_2 + 3", (12, 3), 15, False),
        ("12 + 3", (1, 2, 3), 15, False),
        ("2, 3", (2, 3), 5, False),
        ("", (), 0, False),
        ("5 / (3 - 3)", (5, 3, 3), 5, False),
        ("5\x00", (5,), 5, False),
    ],
)
def test_checker_on_cases_worked_by_hand(equation, numbers, target, verdict):
    assert check_countdown(equation, numbers, target) is verdict


@pytest.mark.parametrize(
    ("choice", "equation", "numbers", "target"),
    [
        ("an equals sign", "2 * 3 = 6", (2, 3), 6),
        ("a leading zero", "05 + 7", (5, 7), 12),
        ("a product without its sign", "2(3)", (2, 3), 6),
        ("another script's digits", "٢ + ٣", (2, 3), 5),
        ("a typographic operator", "6 ÷ 3", (6, 3), 2),
        ("LaTeX", "$2 + 3$", (2, 3), 5),
        ("two lines", "2 +\n3", (2, 3), 5),
        ("more parentheses than anyone needs", "(" * 128 + "1" + ")" * 127, (1,), 1),
        ("65 signs", "-" * 65 + "1", (1,), -1),
    ],
)
def test_checker_refuses_by_choice(choice, equation, numbers, target):
    assert not check_countdown(equation, numbers, target), choice


HOSTILE = [
    "9**9**9**9",
    "9" * 100_000,
    "99999*" * 42 + "9999",
    "1/" * 100 + "0",
    "1+" * 127 + "1",
    "(" * 5000 + "1" + ")" * 5000,
    "(" * 127 + "1" + ")" * 127,
    "((" * 60 + "1",
    "1" + "(1)" * 80,
    "-" * 250 + "1",
    "1" + " " * 200_000 + "+",
    "__import__('os').getpid()",
    "1 if 1 else 1",
    "\ud800",
    "\x00",
]


@pytest.mark.parametrize("equation", HOSTILE, ids=range(len(HOSTILE)))
def test_checker_meets_hostile_text_with_false_and_without_delay(equation):
    numbers = [int(word) for word in "".join(c if c in "0123456789" else " " for c in equation[:300]).split()]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert not check_countdown(equation, numbers, -12345)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2e-3


@settings(deadline=None, max_examples=300)
@given(st.text() | st.text(alphabet="0123456789+-*/() ", max_size=300), st.lists(st.integers(0, 99), max_size=4))
@example("1 (2)", [1, 2])
@example("1 if 2else 3", [1, 2, 3])
def test_checker_never_raises_or_warns_on_any_text(text, numbers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_countdown(text, numbers, 10**9) is False


def test_checker_returns_a_verdict_close_to_the_recursion_limit():
    def check_at(depth: int) -> bool:
        return check_at(depth - 1) if depth else check_countdown("1+" * 40 + "1", [1] * 41, 41)

    verdicts = set()
    for depth in range(100, sys.getrecursionlimit()):
        try:
            verdicts.add(check_at(depth))
        except RecursionError:  # not even the call of the checker fits any more
            break
    assert verdicts == {True, False}  # False: no room left to work it out


@settings(deadline=None)
@given(trees)
def test_an_expression_is_read_as_its_numbers_and_its_exact_value(tree):
    assert countdown_numbers(render(tree)) == sorted(leaves(tree))
    assert countdown_value(render(tree)) == work_out(tree)


@pytest.mark.parametrize("equation", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_has_a_value_only_where_the_checker_would_take_it(equation):
    value = countdown_value(equation)
    assert value is None or check_countdown(equation, countdown_numbers(equation), value)


@needs_shared
def test_checker_agrees_with_every_core_verdict_on_expressions():
    rows = [json.loads(line) for line in (SHARED / "conformance/countdown.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["level"] == "core" and "equation" in row]
    assert len(rows) > 20
    wrong = [
        row["id"]
        for row in rows
        if check_countdown(row["equation"], row["numbers"], row["target"]) != row["expected_correct"]
    ]
    assert wrong == []


# ---- generated problems


@pytest.mark.parametrize("parameters", [MINIATURE, {}, dict(n_numbers=3), dict(n_numbers=4, max_number=20)])
def test_generated_countdown_can_be_solved_and_keeps_its_ranges(parameters):
    task = make_task("countdown", **parameters)
    counts = {3: {3}, 4: {4}, None: {3, 4}}[parameters.get("n_numbers")]
    problems = task.sample(15, seed=1, step=2) + task.held_out(15)
    for problem in problems:
        assert problem.target in reachable(problem.numbers)
        assert all(1 <= number <= parameters.get("max_number", 99) for number in problem.numbers)
        assert parameters.get("min_target", 10) <= problem.target <= parameters.get("max_target", 99)
        assert problem.answer == str(problem.target) and problem.task == "countdown"
    assert {len(problem.numbers) for problem in problems} == counts


def test_miniature_countdown_has_a_solution_from_left_to_right_within_its_results():
    for problem in make_task("countdown", **MINIATURE).sample(60, seed=0, step=0):
        folds = (fold(p, ops, 24) for p in permutations(problem.numbers) for ops in product("+-*", repeat=2))
        assert problem.target in folds


def test_the_order_of_the_numbers_does_not_give_the_solution_away():
    problems = make_task("countdown", **MINIATURE).sample(200, seed=0, step=0)
    in_order = sum(any(fold(p.numbers, ops, 24) == p.target for ops in product("+-*", repeat=2)) for p in problems)
    assert in_order < 160  # unshuffled, it would be all 200


@pytest.mark.parametrize(
    ("numbers", "signs", "max_result", "value"),
    [
        ([8, 2, 3], "/*", 24, 12),
        ([8, 3], "/", 24, None),  # no integer
        ([3, 8], "-", 24, None),  # below 0
        ([5, 5, 5], "*-", 24, None),  # 25 on the way
        ([5, 5, 5], "*-", 25, 20),
        ([5, 0], "/", 24, None),
    ],
)
def test_fold_works_from_left_to_right_and_stays_in_range(numbers, signs, max_result, value):
    assert fold(numbers, list(signs), max_result) == value


@pytest.mark.parametrize("parameters", [{}, MINIATURE_SUM, dict(max_term=60, operators="-")])
def test_generated_arithmetic_has_the_answer_of_its_own_question(parameters):
    task = make_task("arithmetic", **parameters)
    for problem in task.sample(60, seed=3, step=0) + task.held_out(60):
        tokens = problem.prompt.removeprefix("What is ").strip("?= ").split()
        value, running = int(tokens[0]), []
        for sign, term in zip(tokens[1::2], map(int, tokens[2::2]), strict=True):
            value = {"+": value + term, "-": value - term, "*": value * term}[sign]
            running.append(value)
        assert str(value) == problem.answer
        assert all(0 <= v <= parameters.get("max_value", 9801) for v in running)
        assert sorted(problem.numbers) == sorted(map(int, tokens[::2]))
        assert len(problem.numbers) == parameters.get("n_terms", 2)


def test_prompts_of_the_generated_tasks_read_as_documented():
    assert countdown_problem((3, 7, 12), 22, wording="symbols").prompt == "3 7 12 target 22 :"
    words = countdown_problem((3, 7, 12), 22, operators="+-").prompt
    assert "3, 7, 12" in words and "22" in words and "only + - and" in words
    assert make_task("arithmetic", **MINIATURE_SUM).sample(1, 0, 0)[0].prompt.endswith(" =")
    assert make_task("arithmetic").sample(1, 0, 0)[0].prompt.startswith("What is ")


# ---- sampling and holding out


@pytest.mark.parametrize(
    ("name", "parameters"), [("countdown", MINIATURE), ("countdown", {}), ("arithmetic", MINIATURE_SUM)]
)
def test_no_held_out_instance_is_ever_sampled_and_none_comes_twice(name, parameters):
    task = make_task(name, **parameters)
    held_out = task.held_out(100)
    trained = {instance_key(problem) for step in range(10) for problem in task.sample(50, 0, step)}
    assert not trained & {instance_key(problem) for problem in held_out}
    assert len({(instance_key(problem), problem.answer) for problem in held_out}) == 100


def test_the_held_out_share_is_about_what_was_asked_for():
    numbers = [Problem("", "", "countdown", (a, b, c)) for a in range(1, 30) for b in range(a) for c in range(b)]
    share = sum(is_in_share(instance_key(problem), 0.2) for problem in numbers) / len(numbers)
    assert len(numbers) > 3000 and 0.17 < share < 0.23


def test_a_reordered_question_is_the_same_instance():
    one, other = countdown_problem((3, 7, 12), 22), countdown_problem((12, 3, 7), 8)
    assert instance_key(one) == instance_key(other)
    assert instance_key(one) != instance_key(countdown_problem((3, 7, 13), 22))


def test_sampling_depends_on_nothing_but_its_arguments(tmp_path):
    tasks = [make_task("countdown"), make_task("arithmetic"), make_task("gsm8k", data=gsm8k_file(tmp_path, 60))]
    again = [make_task("countdown"), make_task("arithmetic"), make_task("gsm8k", data=tmp_path / "gsm8k.jsonl")]
    for task, same in zip(tasks, again, strict=True):
        forwards = [task.sample(8, 5, step) for step in (0, 1, 2)]
        backwards = [same.sample(8, seed=5, step=step) for step in (2, 1, 0)]
        assert forwards == backwards[::-1]
        assert forwards[0] != forwards[1] and task.sample(8, 6, 0) != forwards[0]
        assert task.held_out(3) == same.held_out(3)


def test_a_file_is_gone_through_once_an_epoch_in_a_new_order_each_time(tmp_path):
    task = make_task(
        "gsm8k", data=gsm8k_file(tmp_path, 30), eval_data=gsm8k_file(tmp_path, 5, first=100, name="eval.jsonl")
    )
    seen = [problem.answer for step in range(10) for problem in task.sample(12, seed=0, step=step)]
    epochs = [seen[i : i + 30] for i in range(0, 120, 30)]
    assert all(sorted(map(int, epoch)) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sorted(int(p.answer) for p in task.held_out(5)) == [100, 101, 102, 103, 104]


def test_a_batch_larger_than_the_file_goes_on_into_the_next_epochs(tmp_path):
    eval_data = gsm8k_file(tmp_path, 1, first=100, name="eval.jsonl")
    task = make_task("gsm8k", data=gsm8k_file(tmp_path, 4), eval_data=eval_data)
    answers = [int(problem.answer) for problem in task.sample(10, 0, 0)]
    assert sorted(answers[:4]) == sorted(answers[4:8]) == [0, 1, 2, 3] and len(answers) == 10


def test_training_skips_what_the_evaluation_file_holds(tmp_path):
    task = make_task("gsm8k", data=gsm8k_file(tmp_path, 10), eval_data=gsm8k_file(tmp_path, 3, name="eval.jsonl"))
    assert {int(problem.answer) for problem in task.sample(70, 0, 0)} == set(range(3, 10))

    (tmp_path / "cd.jsonl").write_text('{"nums": [1, 2, 3], "target": 6}\n{"nums": [2, 2, 3], "target": 7}\n')
    small = make_task("countdown", eval_data=tmp_path / "cd.jsonl", n_numbers=3, max_number=3, min_target=0)
    sampled = {tuple(sorted(problem.numbers)) for problem in small.sample(300, 0, 0)}
    assert (1, 1, 1) in sampled and not sampled & {(1, 2, 3), (2, 2, 3)}
    assert {problem.numbers for problem in small.held_out(2)} == {(1, 2, 3), (2, 2, 3)}


def test_a_file_without_an_evaluation_file_is_split_in_two_without_loss(tmp_path):
    task = make_task("gsm8k", data=gsm8k_file(tmp_path, 400))
    trained = {problem.answer for problem in task.sample(400, 0, 0)}
    held_out = {problem.answer for problem in task.held_out(400 - len(trained))}
    assert trained.isdisjoint(held_out) and len(trained | held_out) == 400
    assert 20 <= len(held_out) <= 65


# ---- parts of a file


def prompts(problems: list[Problem]) -> list[str]:
    return [problem.prompt for problem in problems]


def test_a_script_that_goes_through_the_held_out_part_gets_what_training_is_evaluated_on(tmp_path):
    for task in (make_task("gsm8k", data=gsm8k_file(tmp_path, 300)), make_task("countdown")):
        assert task.part("held-out", 12, seed=7) == task.held_out(12)
    listed = make_task("gsm8k", data=tmp_path / "gsm8k.jsonl")
    n = len(listed.part("held-out"))
    assert 15 <= n <= 50 and listed.part("held-out") == listed.part("held-out", 1000) == listed.held_out(n)


def test_the_parts_of_a_file_share_no_problem_and_lose_none(tmp_path):
    task = make_task("gsm8k", data=gsm8k_file(tmp_path, 300))
    train, out, every = (task.part(split) for split in SPLITS)
    in_file = [f"How much is {i}?" for i in range(300)]
    assert prompts(every) == in_file and every == read_task("gsm8k", tmp_path / "gsm8k.jsonl")
    assert sorted(prompts(train + out)) == sorted(in_file)
    assert prompts(train) == [prompt for prompt in in_file if prompt not in prompts(out)]  # in the file's order
    assert task.part("all", 7) == every[:7]
    sampled = {problem.prompt for step in range(9) for problem in task.sample(50, 3, step)}
    assert sampled == set(prompts(train))


def test_some_of_the_train_part_are_the_first_that_the_seed_would_train_on(tmp_path):
    task = make_task("gsm8k", data=gsm8k_file(tmp_path, 300))
    n = len(task.part("train"))
    assert task.part("train", 40, seed=5) == task.sample(40, 5, 0) != task.part("train", 40, seed=6)
    assert task.part("train", 1000, seed=5) == task.sample(n, 5, 0)  # and not round again


def test_drawn_problems_of_a_part_come_once(tmp_path):
    task = make_task("countdown", **MINIATURE)
    sampled = task.sample(3000, 2, 0)
    part = task.part("train", 3000, seed=2)
    assert len(set(prompts(sampled))) < 3000
    assert prompts(part) == list(dict.fromkeys(prompts(sampled)))


def test_a_problem_drawn_by_itself_is_the_one_of_its_place_in_the_sequence(tmp_path):
    task = make_task("gsm8k", data=gsm8k_file(tmp_path, 23))
    singly = [task.sample(1, 4, i)[0] for i in range(60)]
    assert singly == [problem for step in range(5) for problem in task.sample(12, 4, step)]


def test_a_problem_of_a_long_file_is_drawn_without_shuffling_the_file_again(tmp_path):
    problems = [Problem(str(i), str(i), "text") for i in range(200_000)]
    task = make_task("text", data=write_rows(tmp_path, {"prompt": "q", "answer": "1"}), parts=())
    task.listed["train"] = problems
    task.sample(1, 0, 0)
    start = time.perf_counter()
    for i in range(1, 200):
        task.sample(1, 0, i)
    assert time.perf_counter() - start < 0.1  # one shuffle takes about as long


def test_to_evaluate_or_to_take_all_no_training_problems_are_needed(tmp_path):
    path = gsm8k_file(tmp_path, 3)
    evaluation = make_task("gsm8k", eval_data=path, parts=("held-out",))
    assert sorted(prompts(evaluation.part("held-out"))) == [f"How much is {i}?" for i in range(3)]
    assert prompts(evaluation.part("all")) == [f"How much is {i}?" for i in range(3)]
    every = make_task("gsm8k", data=path, parts=("all",))
    assert len(every.part("all")) == 3
    with pytest.raises(ValueError, match=r"0 of 3 problems are left to train on, 3 to evaluate on; give more data"):
        evaluation.sample(1, 0, 0)
    for ask in (evaluation.part, evaluation.describe):
        with pytest.raises(ValueError, match="0 of 3 problems are left to train on"):
            ask("train")
    one = make_task("gsm8k", data=gsm8k_file(tmp_path, 1), parts=("all",))
    with pytest.raises(ValueError, match=r"[01] of 1 problems are left to train on, [01] to evaluate on"):
        one.part("train"), one.part("held-out")


def test_the_part_to_train_on_is_what_the_evaluation_file_leaves(tmp_path):
    eval_data = gsm8k_file(tmp_path, 3, name="eval.jsonl")
    task = make_task("gsm8k", data=gsm8k_file(tmp_path, 5), eval_data=eval_data)
    assert prompts(task.part("train")) == ["How much is 3?", "How much is 4?"]
    assert sorted(prompts(task.part("held-out"))) == ["How much is 0?", "How much is 1?", "How much is 2?"]
    assert len(task.part("all")) == 5


def test_a_part_is_described_with_its_file_and_the_number_of_its_problems(tmp_path):
    path, eval_data = gsm8k_file(tmp_path, 1200), gsm8k_file(tmp_path, 1, name="eval.jsonl")
    task = make_task("gsm8k", data=path)
    n = len(task.part("held-out"))
    how = "10%, chosen by a hash of the problem"
    assert task.describe("train") == f"{1200 - n:,} problems of gsm8k.jsonl: the train part ({how}, are held out)"
    assert task.describe("held-out") == f"{n} problems of gsm8k.jsonl: the held-out part ({how})"
    assert task.describe("all") == "1,200 problems of gsm8k.jsonl, all of them"
    task = make_task("gsm8k", data=path, eval_data=eval_data)
    assert task.describe("train") == "1,199 problems of gsm8k.jsonl: all but the instances of eval.jsonl"
    assert task.describe("held-out") == "1 problem of eval.jsonl, all held out"
    assert make_task("countdown").describe("train") == "generated, none of the held-out instances"
    assert make_task("countdown").describe("held-out") == "generated, held-out instances alone"


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda task: task.part("all", 5), "no end to all of it; choose train or held-out"),
        (lambda task: task.part("train"), "without end; say how many"),
        (lambda task: task.part("held-out"), "without end; say how many"),
        (lambda task: make_task("countdown", parts=("all",)), "no end to all of it"),
        (lambda task: make_task("gsm8k", parts=("held-out",)), "give data=FILE"),
    ],
)
def test_a_part_that_a_task_does_not_have_is_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(make_task("countdown"))


@needs_shared
@pytest.mark.parametrize(
    ("name", "data", "eval_data", "sampled", "held_out"),
    [
        ("gsm8k", "gsm8k_train.jsonl", None, "f62e490af942628d", "7e4eab7c7cde997e"),
        ("gsm8k", "gsm8k_train.jsonl", "gsm8k_test.jsonl", "c869f51a6739b0d7", "9fcbf53d5c5296b7"),
        ("code", "HumanEval.jsonl", None, "ca63202dc8be5fb7", "9eec2b62ce8e54a0"),
        ("countdown", None, "countdown_3to4_eval.jsonl", "e7c371262bd9814a", "939822ebc934c2cb"),
        ("countdown", None, None, "3588a7bd033c4ead", "5a13ec90cab055f7"),
        ("arithmetic", None, None, "ae8da4da31083fa5", "684438beec719614"),
    ],
)
def test_a_seed_gives_the_problems_that_it_has_always_given(name, data, eval_data, sampled, held_out):
    """So that runs go on after an update, and figures stay comparable."""

    def digest(problems) -> str:
        return hashlib.sha256(repr(problems).encode()).hexdigest()[:16]

    files = {key: SHARED / "data" / file for key, file in (("data", data), ("eval_data", eval_data)) if file}
    task = make_task(name, **files)
    assert digest([task.sample(100, 3, step) for step in (0, 1, 5)]) == sampled
    assert digest(task.held_out(10)) == held_out


# ---- files


def gsm8k_file(folder: Path, n: int, first: int = 0, name: str = "gsm8k.jsonl") -> Path:
    rows = [{"question": f"How much is {i}?", "answer": f"It is\n#### {i}"} for i in range(first, first + n)]
    (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return folder / name


def read_one(folder: Path, name: str, line: str) -> Problem:
    """The one problem of a file; another line is held out, of other numbers and text."""
    other = {
        "gsm8k": '{"question": "other", "answer": "#### 1"}',
        "math": '{"problem": "other", "answer": "1"}',
        "countdown": '{"nums": [1, 1], "target": 2}',
    }
    (folder / "one.jsonl").write_text(line + "\n")
    (folder / "other.jsonl").write_text(other[name] + "\n")
    return make_task(name, data=folder / "one.jsonl", eval_data=folder / "other.jsonl").sample(1, 0, 0)[0]


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [
        ("gsm8k", {"question": "q", "answer": "12 * 100 = <<12*100=1200>>1200\n#### 1,200"}, "1200"),
        ("gsm8k", {"question": "q", "answer": "#### 3 no\n#### -4 "}, "-4"),
        ("math", {"problem": "q", "answer": "\\frac{1}{2}", "solution": "\\boxed{7}"}, "\\frac{1}{2}"),
        ("math", {"problem": "q", "answer": 5}, "5"),
        ("math", {"problem": "q", "solution": "Not \\boxed{3}, but $\\boxed{\\frac{1}{2}}$."}, "\\frac{1}{2}"),
        ("countdown", {"nums": [3, 4, 5], "target": 12, "one_solution": "3+4+5"}, "12"),
    ],
)
def test_the_gold_answer_is_read_as_published(tmp_path, name, row, answer):
    problem = read_one(tmp_path, name, json.dumps(row))
    assert problem.answer == answer and problem.task == name
    assert name == "countdown" or problem.prompt == "q"


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("gsm8k", '{"question": "q", "answer": ', "no valid JSON"),
        ("gsm8k", '["q", "#### 1"]', "expected a JSON object, found list"),
        ("gsm8k", '{"answer": "#### 1"}', "'question'"),
        ("gsm8k", '{"question": " ", "answer": "#### 1"}', "'question'"),
        ("gsm8k", '{"question": "q"}', "'answer'"),
        ("gsm8k", '{"question": "q", "answer": "it is 1"}', "#### NUMBER"),
        ("gsm8k", '{"question": "q", "answer": "it is 1\\n#### "}', "#### NUMBER"),
        ("gsm8k", '{"question": "q", "answer": 1}', "'answer'"),
        ("math", '{"problem": "q"}', "'solution'"),
        ("math", '{"problem": "q", "answer": ""}', "'answer'"),
        ("math", '{"problem": "q", "answer": null}', "'answer'"),
        ("math", '{"problem": "q", "solution": "the answer is 3"}', "boxed"),
        ("math", '{"problem": "q", "solution": "\\\\boxed{}"}', "boxed"),
        ("countdown", '{"nums": [1, 2]}', "'target'"),
        ("countdown", '{"nums": [], "target": 3}', "'nums'"),
        ("countdown", '{"nums": [1, 2.5], "target": 3}', "'nums'"),
        ("countdown", '{"nums": [1, true], "target": 3}', "'nums'"),
        ("countdown", '{"nums": "1 2", "target": 3}', "'nums'"),
    ],
)
def test_a_bad_line_is_refused_with_its_file_number_and_what_was_expected(tmp_path, name, line, expected):
    good = {
        "gsm8k": '{"question": "good", "answer": "#### 1"}',
        "math": '{"problem": "good", "answer": "1"}',
        "countdown": '{"nums": [1, 2], "target": 3}',
    }[name]
    with pytest.raises(ValueError) as refused:
        read_one(tmp_path, name, f"{good}\n\n{line}")
    message = str(refused.value)
    assert f"{tmp_path / 'one.jsonl'}, line 3" in message and expected in message


def test_bytes_that_are_no_utf8_are_refused_with_the_line(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"question": "\xff", "answer": "#### 1"}\n')
    with pytest.raises(ValueError, match="bad.jsonl, line 1"):
        make_task("gsm8k", data=tmp_path / "bad.jsonl")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(ValueError, match="empty.jsonl is empty"):
        make_task("math", data=tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("chess", {}, "unknown task 'chess'; choose one of countdown"),
        ("gsm8k", {}, "give data=FILE"),
        ("gsm8k", dict(data="/nonexistent/x.jsonl"), "x.jsonl cannot be read"),
        ("arithmetic", dict(data="x.jsonl"), "leave data and eval_data out"),
        ("arithmetic", dict(n_terms=1), "at least 2 terms"),
        ("arithmetic", dict(n_terms=3, operators="+*"), "operators"),
        ("countdown", dict(n_numbers=9), "choose 3, 4 or"),
        ("countdown", dict(operators="+^"), "operators"),
        ("countdown", dict(operators=""), "operators"),
        ("countdown", dict(wording="prose"), "wording"),
        ("countdown", dict(held_out_share=1.0), "held_out_share is 1.0"),
    ],
)
def test_a_wrong_argument_is_refused_with_its_value_and_the_choices(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, **arguments)


def test_asking_for_more_than_there_is_says_how_many_there_are(tmp_path):
    task = make_task(
        "gsm8k", data=gsm8k_file(tmp_path, 9), eval_data=gsm8k_file(tmp_path, 3, first=20, name="eval.jsonl")
    )
    with pytest.raises(ValueError, match="only 3"):
        task.held_out(4)
    tiny = make_task("countdown", n_numbers=3, max_number=4, max_result=9, min_target=0, held_out_share=0.3)
    with pytest.raises(ValueError, match=r"only \d+ of 5000"):
        tiny.held_out(5000)
    for impossible in (dict(max_number=2, min_target=90), dict(max_number=0)):
        with pytest.raises(ValueError, match="widen the ranges"):
            make_task("countdown", **impossible).sample(1, 0, 0)


def test_a_file_too_small_to_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"[01] of 1 problems are left to train on, [01] to evaluate on"):
        make_task("gsm8k", data=gsm8k_file(tmp_path, 1))


@needs_shared
def test_the_public_sets_are_read_whole():
    gsm8k = make_task("gsm8k", data=SHARED / "data/gsm8k_train.jsonl", eval_data=SHARED / "data/gsm8k_test.jsonl")
    assert all(problem.answer.lstrip("-").isdigit() for problem in gsm8k.sample(7473, 0, 0) + gsm8k.held_out(1319))
    math = make_task("math", data=SHARED / "data/math500_test.jsonl")
    assert len({problem.prompt for problem in math.sample(500, 0, 0)}) > 420 and len(math.held_out(30)) == 30
    countdown = make_task("countdown", eval_data=SHARED / "data/countdown_3to4_eval.jsonl").held_out(1024)
    assert all(problem.target in reachable(problem.numbers) for problem in countdown[:25])


# ---- own problems and own columns


def write_rows(folder: Path, *rows: dict) -> Path:
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "own.jsonl"


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": " q ", "answer": " 1/2 "}, "q", "1/2"),
        ({"question": "q", "answer": "Paris"}, "q", "Paris"),
        ({"prompt": "p", "question": "q", "answer": 7}, "p", "7"),
        ({"prompt": "p", "answer": 0.25}, "p", "0.25"),
        ({"prompt": "p", "answer": 0}, "p", "0"),
    ],
)
def test_a_text_problem_has_a_prompt_or_a_question_and_an_answer(tmp_path, row, prompt, answer):
    (problem,) = read_task("text", write_rows(tmp_path, row))
    assert problem == Problem(prompt, answer, "text")


def test_a_text_problem_is_judged_by_mathematics():
    assert accuracy(Problem("q", "1/2", "text"), "<think> a </think> <answer> 0.5 </answer>") == 1.0
    assert accuracy(Problem("q", "1/2", "text"), "<think> a </think> <answer> 0.6 </answer>") == 0.0
    assert accuracy(Problem("q", "", "text"), "<think> a </think> <answer> 0.6 </answer>") is None


@pytest.mark.parametrize("row", [{"prompt": "p"}, {"prompt": "p", "answer": None}, {"prompt": "p", "answer": " "}])
def test_a_text_problem_may_lack_its_answer_where_it_is_said(tmp_path, row):
    path = write_rows(tmp_path, row)
    with pytest.raises(ValueError, match=r"own.jsonl, line 1: expected a non-empty text 'answer'"):
        read_task("text", path)
    assert read_task("text", path, needs_answer=False) == [Problem("p", "", "text")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "p", "answer": "1"}, r"'prompt', found None \(fields: text, answer\)"),
        ({"prompt": "p", "answer": [1]}, r"'answer', found \[1\]"),
        ({"prompt": "p", "answer": True}, "'answer', found True"),
        ({"prompt": "p", "answer": float("nan")}, "'answer', found nan"),
        ({"prompt": 3, "answer": "1"}, "'prompt', found 3"),
    ],
)
def test_a_text_problem_of_another_form_is_refused(tmp_path, row, message):
    for needs_answer in (True, False):
        with pytest.raises(ValueError, match=f"own.jsonl, line 1: .*{message}"):
            read_task("text", write_rows(tmp_path, row), needs_answer=needs_answer)


@pytest.mark.parametrize(
    ("name", "fields", "row", "prompt", "answer"),
    [
        ("gsm8k", {"question": "prompt", "answer": "gold"}, {"prompt": "q", "gold": "so\n#### 18"}, "q", "18"),
        ("gsm8k", {"question": "prompt", "answer": "gold"}, {"prompt": "q", "gold": "1,800"}, "q", "1800"),
        ("gsm8k", {"question": "prompt", "answer": "gold"}, {"prompt": "q", "gold": 18}, "q", "18"),
        ("gsm8k", {"question": "prompt", "answer": "gold"}, {"prompt": "q", "gold": -1.5}, "q", "-1.5"),
        ("gsm8k", {"question": "prompt"}, {"prompt": "q", "answer": " 18 "}, "q", "18"),
        ("gsm8k", {"question": "answer", "answer": "question"}, {"answer": "q", "question": "18"}, "q", "18"),
        ("math", {"problem": "q", "solution": "s"}, {"q": "q", "s": "\\boxed{3}", "answer": "4"}, "q", "3"),
        ("text", {"question": "body", "answer": "gold"}, {"prompt": "p", "body": "q", "gold": "Paris"}, "q", "Paris"),
        ("countdown", {"nums": "numbers", "target": "goal"}, {"numbers": [1, 2], "goal": 3}, None, "3"),
    ],
)
def test_fields_come_from_the_columns_that_are_named(tmp_path, name, fields, row, prompt, answer):
    path = write_rows(tmp_path, row)
    (problem,) = read_task(name, path, fields=fields)
    assert (problem.prompt if prompt else None, problem.answer, problem.task) == (prompt, answer, name)
    assert make_task(name, eval_data=path, parts=("held-out",), fields=fields).held_out(1) == [problem]


@pytest.mark.parametrize("answer", ["it is 18", "18 apples", "18 19", True, None, "1/2", "", [18]])
def test_an_answer_of_another_form_than_a_number_still_needs_its_mark(tmp_path, answer):
    path = write_rows(tmp_path, {"question": "q", "answer": "18", "gold": answer})
    with pytest.raises(ValueError, match="own.jsonl, line 1: expected .*'answer'"):
        read_task("gsm8k", path, fields={"answer": "gold"})
    with pytest.raises(ValueError, match="#### NUMBER"):
        read_task("gsm8k", path)  # the number alone is for own columns


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gsm8k", {"answer": "gold"}, "own.jsonl, line 1: there is no column 'gold'; the line has question, answer"),
        ("gsm8k", {"anwser": "answer"}, "the gsm8k task reads no field 'anwser'; it reads question, answer"),
        ("arithmetic", {"question": "q"}, "the arithmetic task reads no field 'question'; it reads none"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, name, fields, message):
    path = write_rows(tmp_path, {"question": "q", "answer": "#### 1"})
    with pytest.raises(ValueError, match=message):
        read_task(name, path, fields=fields)


def test_columns_without_a_file_are_refused():
    with pytest.raises(ValueError, match="columns of a file; give data=FILE"):
        make_task("countdown", fields={"nums": "numbers"})


def test_columns_of_fields_are_read_from_a_list():
    assert parse_fields("question=prompt,answer=gold") == {"question": "prompt", "answer": "gold"}
    assert parse_fields(" answer = the answer ") == {"answer": "the answer"}
    assert parse_fields("answer=a=b") == {"answer": "a=b"}
    assert parse_fields("") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question", "'question' in 'question' names no column of a field; write FIELD=COLUMN"),
        ("question=", "'question=' in 'question=' names no column"),
        ("=prompt", "'=prompt'"),
        ("question=prompt,", "'' in 'question=prompt,' names no column"),
        (" ", "' ' in ' '"),
        ("answer=a,answer=b", "the field 'answer' stands twice in 'answer=a,answer=b'"),
    ],
)
def test_a_list_of_columns_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_fields(text)


def test_every_task_is_named_and_can_be_made(tmp_path):
    assert TASKS == ("countdown", "arithmetic", "gsm8k", "math", "code", "text")
    for name in TASKS:
        with pytest.raises(ValueError, match="no parameter 'zzz'"):
            make_task(name, zzz=1)


# ---- prompts


def test_the_base_template_ends_in_an_opened_think_that_counts_as_prefilled():
    prompt = format_prompt(Problem("Is {x} in $\\frac{1}{2}$?", "1", "math"), "r1-zero")
    assert prompt.endswith("User: Is {x} in $\\frac{1}{2}$?\nAssistant: <think>")
    assert all(tag in prompt for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    assert prefilled(prompt) == prefilled(prompt + "\n") == "<think>"


def test_both_templates_ask_for_the_python_block_that_the_form_of_a_program_needs():
    program = Problem("Write {how}.", "", "code")
    asked = format_prompt(program, "r1-zero")
    assert "```python" in asked and asked.endswith("User: Write {how}.\nAssistant: <think>")
    assert "```python" in format_prompt(program, "chat")[0]["content"]
    assert "python" not in format_prompt(Problem("q", "1", "math"), "r1-zero")


def test_the_chat_template_is_one_user_message_that_asks_for_the_form_its_task_is_judged_by():
    (boxed,) = format_prompt(Problem("q", "1", "math"), "chat")
    (tagged,) = format_prompt(countdown_problem((1, 2), 3), "chat")
    assert boxed["role"] == tagged["role"] == "user"
    assert "\\boxed{}" in boxed["content"] and "<answer>" not in boxed["content"] and boxed["content"].startswith("q\n")
    assert "<answer>" in tagged["content"] and "boxed" not in tagged["content"]


def test_the_bare_template_is_the_prompt_and_prefills_nothing():
    problem = countdown_problem((1, 2), 3, wording="symbols")
    assert format_prompt(problem, "bare") == "1 2 target 3 :"
    assert prefilled("1 2 target 3 :") == prefilled("<think> </think>") == prefilled("") == ""


def test_an_unknown_template_is_refused():
    with pytest.raises(ValueError, match="unknown template 'zero'"):
        format_prompt(Problem("q", "1", "math"), "zero")
