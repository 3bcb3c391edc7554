"""Problems to solve: countdown and arithmetic are generated; GSM8K, MATH, countdown, code and own sets are read.

A task gives training problems for a step (stateless: the same seed and step give the same problems, so a resumed run
sees what the interrupted one would have seen) and a fixed held-out set that training can never meet. What is held out
is decided by a hash of the instance - the multiset of its numbers, or else its text - so no list has to be kept. Every
script takes its problems from here, so that what one of them trains on is what no other evaluates on.

Left out: downloading, judging (rewards.py; only the countdown checker lives here).

Sources: countdown as TinyZero plays it, GSM8K (arXiv:2110.14168), MATH (arXiv:2103.03874), the base model's
conversation after Table 1 of the DeepSeek-R1 report (arXiv:2501.12948).
"""

import ast
import hashlib
import inspect
import json
import math
import operator
import random
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, TypeVar

from nanor1.coding import read_row
from nanor1.grading import extract_answer

SPLITS = ("train", "held-out", "all")  # the parts of a task's problems
HELD_OUT_SHARE = 0.1  # of all instances, where no file says what is held out
MAX_DRAWS = 20_000  # for one problem; if none fits, the parameters are at fault
FIELDS = {  # what the tasks read of a line of their files
    "countdown": ("nums", "target"),
    "arithmetic": (),
    "gsm8k": ("question", "answer"),
    "math": ("problem", "answer", "solution"),
    "code": tuple(
        "prompt test entry_point canonical_solution text test_list test_imports test_setup_code code "
        "question problem description input_output io solution".split()
    ),
    "text": ("prompt", "question", "answer"),
}
TASKS = tuple(FIELDS)
BOXED_TASKS = ("gsm8k", "math")  # a chat model writes these answers in \boxed{}, as it was trained to


@dataclass(frozen=True)
class Problem:
    """What to solve and how to judge it: `prompt` is the bare question, `answer` the gold answer as text.

    `numbers` are the numbers given (countdown, arithmetic), `target` the value to reach (countdown only),
    `tests` what judges a program (code: a coding.CodeTests).
    """

    prompt: str
    answer: str
    task: str
    numbers: tuple[int, ...] = ()
    target: int | None = None
    tests: object = None


# How a task comes by problems: a random draw (its None: draw again) and the reading of a JSON line; None: not so.
Draw = Callable[[random.Random], Problem | None]
File = str | Path
Row = TypeVar("Row")
Source = tuple[Draw | None, Callable[[dict], Problem] | None]


@dataclass(frozen=True, eq=False)
class Task:
    """A source of problems, made by `make_task`: for training, for evaluation, or a part to go through once; all pure.

    `listed` has the parts that are read from files, in the files' order; the others are drawn, without end.
    """

    name: str
    draw: Draw | None
    is_held_out: Callable[[Problem], bool]
    listed: dict[str, list[Problem]]
    words: dict[str, str]  # about each part, for `describe`

    def sample(self, n: int, seed: int, step: int) -> list[Problem]:
        """`n` problems to train on: of a file those from step * n on in an endless sequence of shuffled epochs.

        So `sample(1, seed, i)` is problem i of that sequence, and costs no more than its share.
        """
        if "train" in self.listed:
            return _take(self._there("train"), n, seed, step)
        rng = random.Random(f"sample {seed} {step}")
        try:
            return [_draw_where(self.draw, rng, lambda problem: not self.is_held_out(problem)) for _ in range(n)]
        except ValueError as error:
            raise ValueError(f"{error} to train on; widen the ranges of numbers and results") from error

    def held_out(self, n: int, seed: int = 0) -> list[Problem]:
        """`n` problems to evaluate on: drawn ones all differ, no two share both the numbers and the answer."""
        if "held-out" in self.listed:
            problems = self._there("held-out")
            if n > len(problems):
                raise ValueError(f"{n} held-out problems asked for, only {len(problems)} there; ask for fewer")
            return _take(problems, n, seed, 0)
        rng, found = random.Random(f"held out {seed}"), {}
        is_new = lambda p: self.is_held_out(p) and (instance_key(p), p.answer) not in found  # noqa: E731
        try:
            while len(found) < n:
                problem = _draw_where(self.draw, rng, is_new)
                found[instance_key(problem), problem.answer] = problem
        except ValueError as error:
            raise ValueError(
                f"{error}: only {len(found)} of {n} held-out ones found; ask for fewer, widen the ranges"
            ) from error
        return list(found.values())

    def part(self, split: str, n: int = 0, seed: int = 0) -> list[Problem]:
        """At most `n` problems of one of SPLITS (0: all), for a script that goes through them once.

        "held-out": those of `held_out(n)`, whatever the seed, so that all scripts evaluate on the same ones. "train":
        the file's in order, or the first `n` of the seed's first epoch; drawn ones each once. "all": the file's first
        `n`, in order. ValueError for a part without problems, and for all of what is drawn without end.
        """
        self.describe(split)  # refuses what is no part, or an empty one
        problems = self.listed.get(split)
        if problems is None and not n:
            raise ValueError(f"the {self.name} task generates problems without end; say how many, 200 for one")
        if problems is None and split == "train":
            return list({(problem.prompt, problem.answer): problem for problem in self.sample(n, seed, 0)}.values())
        if split == "held-out":
            return self.held_out(min(n or len(problems), len(problems)) if problems else n)
        return self.sample(min(n, len(problems)), seed, 0) if split == "train" and n else problems[: n or None]

    def describe(self, split: str) -> str:
        """Which problems a part has, as "1,319 problems of test.jsonl, all held out"; ValueError if it has none."""
        if split not in SPLITS:
            raise ValueError(f"unknown part {split!r}; choose one of {', '.join(SPLITS)}")
        if split not in self.words:
            raise ValueError(
                f"the {self.name} task is generated, there is no end to all of it; choose train or held-out"
            )
        if split not in self.listed:
            return self.words[split]
        n = len(self._there(split))
        return f"{n:,} problem{'' if n == 1 else 's'} of {self.words[split]}"

    def _there(self, split: str) -> list[Problem]:
        if not self.listed[split]:
            n_train, n_out, n_all = (len(self.listed.get(name, ())) for name in SPLITS)
            raise ValueError(
                f"{self.name}: {n_train} of {n_all} problems are left to train on, {n_out} to evaluate on; give more "
                "data, or an eval_data file of other problems (sample.py: or --split all)"
            )
        return self.listed[split]


def make_task(
    name: str,
    *,
    data: File | None = None,
    eval_data: File | None = None,
    held_out_share: float = HELD_OUT_SHARE,
    parts: Sequence[str] = ("train", "held-out"),
    fields: dict[str, str] | None = None,
    **parameters,
) -> Task:
    """Build the task called `name`, one of TASKS.

    Problems come from the JSON-lines file `data`, or are generated. The held-out ones come from the file `eval_data`
    (training then skips its instances), or a hash holds out a share of all instances. Only `parts` of SPLITS must have
    problems; to evaluate alone, `eval_data` is enough. `fields` names the columns of one's own files, see
    `parse_fields`. The other parameters are those of `countdown`, `arithmetic` and `text` below. Raises ValueError for
    what a user can get wrong.

        make_task("countdown", n_numbers=3, max_number=15, operators="+-*", max_result=24, min_target=0, max_target=24)
    """
    draw, to_problem = _source(name, parameters, fields)
    if (data or eval_data or fields) and not to_problem:
        raise ValueError(f"the {name} task is generated; leave data and eval_data out, and fields")
    if not draw and not data and ("train" in parts or not eval_data):
        raise ValueError(f"the {name} task is not generated; give data=FILE, JSON lines")
    if fields and not data and not eval_data:
        raise ValueError(f"fields {fields} name columns of a file; give data=FILE, JSON lines")
    problems = read_json_lines(data, to_problem) if data else []
    evaluation = read_json_lines(eval_data, to_problem) if eval_data else []
    rule = _held_out_rule(evaluation, held_out_share)
    train, out = [], []
    for problem in problems:
        (out if rule(problem) else train).append(problem)
    listed = {} if draw and not data else {"train": train}
    if data or eval_data:
        listed |= {"held-out": evaluation or out, "all": problems or evaluation}
    task = Task(name, draw, rule, listed, _words(data, eval_data, held_out_share))
    for part in parts:
        task.describe(part)  # refuses one that is empty
    return task


def _words(data: File | None, eval_data: File | None, share: float) -> dict[str, str]:
    """What `Task.describe` says of each part, behind the number of problems where they are read."""
    data, eval_data = (Path(file).name if file else "" for file in (data, eval_data))
    words = {"train": f"generated, none of the instances of {eval_data}", "held-out": f"{eval_data}, all held out"}
    if not data and not eval_data:
        return {"train": "generated, none of the held-out instances", "held-out": "generated, held-out instances alone"}
    if data and eval_data:
        words["train"] = f"{data}: all but the instances of {eval_data}"
    elif data:
        chosen = f"{100 * share:g}%, chosen by a hash of the problem"
        words["train"] = f"{data}: the train part ({chosen}, are held out)"
        words["held-out"] = f"{data}: the held-out part ({chosen})"
    return words | {"all": f"{data or eval_data}, all of them"}


def read_task(name: str, path: File, fields: dict[str, str] | None = None, **parameters) -> list[Problem]:
    """All problems of a task's file of JSON lines, in order; ValueError as in `make_task`."""
    return make_task(name, data=path, parts=("all",), fields=fields, **parameters).part("all")


def _source(name: str, parameters: dict, fields: dict[str, str] | None) -> Source:
    sources = {
        "countdown": countdown,
        "arithmetic": arithmetic,
        "gsm8k": lambda: (None, gsm8k_problem),
        "math": lambda: (None, math_problem),
        "code": lambda: (None, code_problem),
        "text": text,
    }
    if name not in sources:
        raise ValueError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    unknown = set(parameters) - set(inspect.signature(sources[name]).parameters)
    if unknown:
        known = ", ".join(inspect.signature(sources[name]).parameters) or "none"
        raise ValueError(f"the {name} task has no parameter {min(unknown)!r}; it has {known}")
    if unread := set(fields or ()) - set(FIELDS[name]):
        raise ValueError(
            f"the {name} task reads no field {min(unread)!r}; it reads {', '.join(FIELDS[name]) or 'none'}"
        )
    draw, to_problem = sources[name](**parameters)
    return draw, partial(_from_columns, name, fields, to_problem) if fields and to_problem else to_problem


def task_parameters(text: str) -> dict:
    """Read the parameters of a task from a JSON object, the empty text as none; ValueError for anything else.

    >>> task_parameters('{"n_numbers": 3}')
    {'n_numbers': 3}
    """
    return parse_object(text, "task parameters")


def parse_fields(text: str) -> dict[str, str]:
    """Read which column of a file holds a field that the task reads, "" as none; ValueError for anything else.

    >>> parse_fields("question=prompt,answer=gold")
    {'question': 'prompt', 'answer': 'gold'}
    """
    fields: dict[str, str] = {}
    for item in text.split(",") if text else ():
        field, equals, column = (part.strip() for part in item.partition("="))
        if not (field and equals and column):
            raise ValueError(f"{item!r} in {text!r} names no column of a field; write FIELD=COLUMN,FIELD=COLUMN")
        if field in fields:
            raise ValueError(f"the field {field!r} stands twice in {text!r}; give it one column")
        fields[field] = column
    return fields


def parse_object(text: str, what: str) -> dict:
    """Read a JSON object written by hand, the empty text as an empty one; ValueError, naming `what`, for all else."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} {text!r:.60} are no JSON object ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} {text!r:.60} are no JSON object")
    return found


# ---- what is held out


def instance_key(problem: Problem) -> str:
    """What makes two problems the same instance: their multiset of numbers where they have one, else the text.

    Coarser than the problem itself (47 + 85, 85 + 47 and 85 - 47 are one instance), so nothing close leaks.
    """
    return str(sorted(problem.numbers)) if problem.numbers else problem.prompt


def is_held_out(problem: Problem, share: float) -> bool:
    """Whether the problem's instance falls into the held-out `share` (0 to 1); see `is_in_share`."""
    return is_in_share(instance_key(problem), share)


def is_in_share(key: str, share: float) -> bool:
    """Whether the text falls, by a hash that never changes, into this share (0 to 1) of all texts."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _held_out_rule(evaluation: list[Problem], share: float) -> Callable[[Problem], bool]:
    if not 0 < share < 1:
        raise ValueError(f"held_out_share is {share}; it must lie between 0 and 1")
    keys = frozenset(map(instance_key, evaluation))
    return (lambda problem: instance_key(problem) in keys) if keys else partial(is_held_out, share=share)


# ---- drawn at random, or taken in order


def _draw_where(draw: Draw, rng: random.Random, accept: Callable[[Problem], bool]) -> Problem:
    for _ in range(MAX_DRAWS):
        problem = draw(rng)
        if problem is not None and accept(problem):
            return problem
    raise ValueError(f"no further problem in {MAX_DRAWS} draws")


def _take(problems: list[Problem], n: int, seed: int, step: int) -> list[Problem]:
    """Problems step*n ... step*n + n - 1 of an endless sequence of epochs, each epoch in its own shuffled order."""
    taken: list[Problem] = []
    while len(taken) < n:
        epoch, start = divmod(step * n + len(taken), len(problems))
        taken += [problems[i] for i in _epoch_order(len(problems), seed, epoch)[start : start + n - len(taken)]]
    return taken


@lru_cache(maxsize=8, typed=True)  # to shuffle half a million takes 0.2 s, and every step asks
def _epoch_order(n: int, seed: int, epoch: int) -> array:
    order = list(range(n))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return array("L", order)


# ---- generated: numbers and operators drawn at random, kept where the running value stays in range

_FOLD = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def fold(numbers: list[int], operators: list[str], max_result: int) -> int | None:
    """Work `((n0 op n1) op n2) ...` from left to right; None where a result is no integer or leaves 0..max_result.

    >>> fold([8, 2, 3], ["/", "*"], 24)
    12
    """
    value = numbers[0]
    for sign, number in zip(operators, numbers[1:], strict=True):
        if sign == "/" and (number == 0 or value % number):
            return None
        value = _FOLD[sign](value, number)
        if not 0 <= value <= max_result:
            return None
    return value


def countdown(
    n_numbers="3to4", max_number=99, operators="+-*/", max_result=1000, min_target=10, max_target=99, wording="words"
) -> Source:
    """Reach `target` from `n_numbers` (3, 4 or "3to4") numbers in 1..max_number, each used once.

    Solvable as drawn: the target is worked out from the numbers, every result an integer in 0..max_result. Read from
    a file: `nums`, `target`. `wording` as in `countdown_problem`.
    """
    counts = {"3": (3,), "4": (4,), "3to4": (3, 4)}.get(str(n_numbers))
    if counts is None:
        raise ValueError(f"n_numbers is {n_numbers!r}; choose 3, 4 or '3to4'")
    _check_choices(operators, "+-*/", wording)

    def draw(rng: random.Random) -> Problem | None:
        numbers = [rng.randint(1, max_number) for _ in range(rng.choice(counts))]
        target = fold(numbers, rng.choices(operators, k=len(numbers) - 1), max_result)
        if target is None or not min_target <= target <= max_target:
            return None
        rng.shuffle(numbers)  # the order drawn would give the solution away
        return countdown_problem(tuple(numbers), target, operators, wording)

    def to_problem(row: dict) -> Problem:
        nums, target = row.get("nums"), row.get("target")
        if type(target) is not int or not isinstance(nums, list) or {type(number) for number in nums} != {int}:
            raise ValueError(
                f"expected 'nums': [integers] and 'target': integer, found {nums!r:.60} and {target!r:.60}"
            )
        return countdown_problem(tuple(nums), target, operators, wording)

    return draw, to_problem


def countdown_problem(numbers: tuple[int, ...], target: int, operators="+-*/", wording="words") -> Problem:
    """The countdown problem told in "words", or in "symbols" separated by blanks: `3 7 12 target 22 :`."""
    prompt = f"{' '.join(map(str, numbers))} target {target} :"
    if wording == "words":
        prompt = (
            f"Combine the numbers {', '.join(map(str, numbers))} into an expression with the value {target}. Use every "
            f"number exactly once, and only {' '.join(operators)} and parentheses. The answer is the expression alone, "
            "for example (1 + 2) * 3."
        )
    return Problem(prompt, str(target), "countdown", numbers, target)


def arithmetic(n_terms=2, max_term=99, max_value=9801, operators="+-*", wording="words") -> Source:
    """`t0 op t1 op ...` with terms in 1..max_term and every running value in 0..max_value.

    `wording`: "words" (`What is 47 + 85?`) or "symbols" (`47 + 85 =`). The miniature: n_terms=6, max_term=9,
    max_value=40, operators="+-", wording="symbols".
    """
    if n_terms < 2:
        raise ValueError(f"n_terms is {n_terms}; it takes at least 2 terms")
    # With three terms or more a product would bind tighter than the left-to-right running value.
    _check_choices(operators, "+-*" if n_terms == 2 else "+-", wording)

    def draw(rng: random.Random) -> Problem | None:
        terms = [rng.randint(1, max_term) for _ in range(n_terms)]
        signs = rng.choices(operators, k=n_terms - 1)
        value = fold(terms, signs, max_value)
        question = " ".join(f"{sign} {term}" for sign, term in zip(["", *signs], terms, strict=True)).strip()
        prompt = f"What is {question}?" if wording == "words" else f"{question} ="
        return None if value is None else Problem(prompt, str(value), "arithmetic", tuple(terms))

    return draw, None


def _check_choices(operators: str, allowed: str, wording: str) -> None:
    if not operators or not set(operators) <= set(allowed):
        raise ValueError(f"operators is {operators!r}; choose some of {allowed!r} here")
    if wording not in ("words", "symbols"):
        raise ValueError(f"wording is {wording!r}; choose 'words' or 'symbols'")


# ---- read from JSON lines


def read_json_lines(path: File, parse: Callable[[dict], Row]) -> list[Row]:
    """What `parse` makes of each line's object (blank lines skipped).

    Its ValueError becomes one that names the file and the line; ValueError too for a file that cannot be read, a line
    that is no JSON object, and a file without a line.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); expected a file of JSON lines") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(parse(_json_object(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty; expected JSON lines, one object a line")
    return rows


def _json_object(line: bytes) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ValueError(f"expected one JSON object on the line, found no valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    return row


def _text_field(row: dict, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a non-empty text {name!r}, found {value!r:.60} (fields: {', '.join(row)})")
    return value.strip()


def _answer_field(row: dict) -> str:
    answer = row.get("answer")
    is_number = type(answer) is int or (type(answer) is float and math.isfinite(answer))
    return str(answer) if is_number else _text_field(row, "answer")


_NUMBER_ALONE = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_BEFORE = {"question": "prompt", "solution": "answer"}  # a task that finds the latter does not look for the former


def _from_columns(name: str, fields: dict[str, str], to_problem: Callable[[dict], Problem], row: dict) -> Problem:
    """A line of one's own file, each field taken from the column that holds it.

    GSM8K's answer may be the number alone there, without "####".
    """
    for column in fields.values():
        if column not in row:
            raise ValueError(f"there is no column {column!r}; the line has {', '.join(row) or 'none'}")
    hidden = {_BEFORE.get(field) for field in fields} - fields.keys()
    row = {field: row[field] for field in row if field not in hidden} | {f: row[column] for f, column in fields.items()}
    if name == "gsm8k" and _NUMBER_ALONE.fullmatch(answer := str(row.get("answer")).strip()):
        row["answer"] = f"#### {answer}"
    return to_problem(row)


def gsm8k_problem(row: dict) -> Problem:
    """A line of GSM8K as published: `question`, and `answer` ending in `#### 1,200` (the gold answer: 1200)."""
    question, (_, mark, gold) = _text_field(row, "question"), _text_field(row, "answer").rpartition("####")
    gold = gold.replace(",", "").strip()
    if not mark or not gold:
        raise ValueError(f"expected an 'answer' that ends in '#### NUMBER', found {row['answer'][-40:]!r}")
    return Problem(question, gold, "gsm8k")


def math_problem(row: dict) -> Problem:
    r"""A line of MATH as published: `problem`, and `answer` or else the last `\boxed{}` of `solution`."""
    question = _text_field(row, "problem")
    if "answer" in row:
        return Problem(question, _answer_field(row), "math")
    solution = _text_field(row, "solution")
    at = solution.rfind("\\boxed")
    gold = extract_answer(solution[at:]) if at >= 0 else None
    if not gold:
        raise ValueError(r"expected an 'answer', or a 'solution' with its result in \boxed{...}; found neither")
    return Problem(question, gold, "math")


def text(needs_answer=True) -> Source:
    """Any problems: `prompt`, or `question` if there is none, and `answer`, text or number, compared by `math_equal`.

    With `needs_answer` False a line may come without one, where a reward of one's own judges.
    """

    def to_problem(row: dict) -> Problem:
        prompt = _text_field(row, "question" if "question" in row and "prompt" not in row else "prompt")
        is_empty = row.get("answer") is None or not str(row["answer"]).strip()
        return Problem(prompt, "" if is_empty and not needs_answer else _answer_field(row), "text")

    return None, to_problem


def code_problem(row: dict) -> Problem:
    """A line of HumanEval, MBPP or a set of scripts' inputs and outputs as published; see coding.py."""
    prompt, solution, tests = read_row(row)
    return Problem(prompt, solution, "code", tests=tests)


# ---- prompts

R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. User asks, and Assistant first thinks the matter through in its mind, "
    "between <think> and </think>, and then gives User the answer, between <answer> and </answer>: <think> the "
    "thinking goes here </think> <answer> the answer goes here{how} </answer>.\nUser: {prompt}\nAssistant: <think>"
)
AS_PYTHON = "as complete Python code in one ```python block"
STYLES = {  # what a chat model is asked to do before it answers
    "think": "Think first, between <think> and </think>. Then write the final answer {where}.",
    "cot": "Think step by step. Then write the final answer {where}.",
    "direct": "Write only the final answer, {where}, without any explanation.",
}
Style = Literal["think", "cot", "direct"]


@dataclass(frozen=True)
class Example:
    """A question with a worked answer, shown before the problem (few-shot)."""

    prompt: str
    completion: str


def format_prompt(
    problem: Problem, template: str, style: Style = "think", examples: Sequence[Example] = ()
) -> str | list[dict[str, str]]:
    r"""Dress the question for a model: text, or for "chat" the messages for Tokenizer.apply_chat_template.

    "r1-zero": a base model's conversation that ends in an opened `<think>` (DeepSeek-R1, Table 1, in other words).
    "chat": a user's message, the question and how to write the answer: after thinking between tags, after a chain of
    thought in the open (Wei et al. 2201.11903; zero-shot Kojima et al. 2205.11916), or directly. "bare": the question
    alone. `examples` are turns before it ("chat"), or paragraphs ("bare"); where the style is "direct", their answers
    alone. ValueError where a template knows no other styles, or no examples.
    """
    if template != "chat" and style != "think":
        raise ValueError(
            f"the style {style!r} is asked for in words, which the template {template!r} has none of: use chat"
        )
    if template == "bare":
        return "".join(f"{example.prompt}\n{example.completion}\n\n" for example in examples) + problem.prompt
    if template == "r1-zero":
        if examples:
            raise ValueError("the template r1-zero takes no examples; use chat, or bare")
        how = f", {AS_PYTHON}" if problem.task == "code" else ""
        # not str.format: LaTeX is full of braces; and the prompt last, which may hold some of ours
        return R1_ZERO_TEMPLATE.replace("{how}", how).replace("{prompt}", problem.prompt)
    if template == "chat":
        where = "in \\boxed{}" if problem.task in BOXED_TASKS else "alone between <answer> and </answer>"
        if problem.task == "code":
            where = AS_PYTHON
        instruction = STYLES[style].replace("{where}", where)
        return [
            message
            for example in examples
            for message in (_user(example.prompt, instruction), _assistant(problem.task, example, style))
        ] + [_user(problem.prompt, instruction)]
    raise ValueError(f"unknown template {template!r}; choose 'r1-zero', 'chat' or 'bare'")


def _user(prompt: str, instruction: str) -> dict[str, str]:
    return {"role": "user", "content": f"{prompt}\n\n{instruction}"}


def _assistant(task: str, example: Example, style: Style) -> dict[str, str]:
    """A worked answer, or in the direct style no more of it than the answer itself."""
    answer = extract_answer(example.completion) if style == "direct" and task != "code" else None
    if answer is None:
        return {"role": "assistant", "content": example.completion}
    return {
        "role": "assistant",
        "content": f"\\boxed{{{answer}}}" if task in BOXED_TASKS else f"<answer> {answer} </answer>",
    }


def read_examples(path: File) -> tuple[Example, ...]:
    """Worked examples from JSON lines of `prompt` and `completion`; ValueError names file, line and fault."""

    def to_example(row: dict) -> Example:
        return Example(_text_field(row, "prompt"), _text_field(row, "completion"))

    return tuple(read_json_lines(path, to_example))


def prefilled(prompt_text: str) -> str:
    """What the prompt already wrote of the response: rewards judge `prefilled(prompt_text) + completion`.

    >>> prefilled("Assistant: <think>")
    '<think>'
    """
    return "<think>" if prompt_text.rstrip().endswith("<think>") else ""


# ---- the countdown checker

_EXPRESSION = re.compile(r"[-+*/() 0-9]{1,256}")
_NUMBER = re.compile(r"[0-9]+")
_MAX_DEPTH = 64
_BINARY = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", Fraction),  # exact: with floats and a tolerance 300001 / 300000 would pass for 1
}


def check_countdown(equation: str, nums: tuple[int, ...] | list[int], target: int, operators: str = "+-*/") -> bool:
    """Whether the expression uses each given number exactly once and has exactly the value `target`.

    One line of integers, + - * / (or the `operators` given), signs and parentheses; at most 256 characters between
    the outer blanks and 64 levels. Everything else is False, and no text raises. Refused by choice: an equals sign,
    a number left out, leading zeros (05), 2(3), LaTeX, other scripts' digits and operators, 5000 parentheses.

    >>> check_countdown("5 * (5 - 1 / 5)", [1, 5, 5, 5], 24)
    True
    """
    # Length, characters and numbers are settled before the parser sees anything: that keeps rubbish cheap.
    if countdown_numbers(equation) != sorted(nums):
        return False
    value = countdown_value(equation, operators)
    return value is not None and value == target


def countdown_numbers(equation: str) -> list[int] | None:
    """The integers of an expression, sorted; None for a text that is too long or has characters of no expression.

    >>> countdown_numbers("3 + 7 + 12"), countdown_numbers("x + 1")
    ([3, 7, 12], None)
    """
    expression = equation.strip()
    return sorted(map(int, _NUMBER.findall(expression))) if _EXPRESSION.fullmatch(expression) else None


def countdown_value(equation: str, operators: str = "+-*/") -> int | Fraction | None:
    """The exact value of an expression such as `check_countdown` takes; None for all that it refuses.

    >>> countdown_value("5 - 1 / 5"), countdown_value("2 ** 3")
    (Fraction(24, 5), None)
    """
    expression = equation.strip()
    if not _EXPRESSION.fullmatch(expression):
        return None
    try:
        return _value(ast.parse(expression, mode="eval").body, operators, _MAX_DEPTH)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, operators: str, depth: int) -> int | Fraction:
    """The exact value of a parsed expression; ValueError for any node that countdown does not know."""
    if depth == 0:
        raise ValueError("nested too deep")
    if isinstance(node, ast.Constant):
        return node.value  # an int: letters, dots and quotes never reached the parser
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, operators, depth - 1)
        return -value if isinstance(node.op, ast.USub) else value  # ~ and not never reached the parser
    sign, combine = _BINARY.get(type(getattr(node, "op", None)), ("", None))
    if not sign or sign not in operators:
        raise ValueError("not an expression of the allowed operators")
    return combine(_value(node.left, operators, depth - 1), _value(node.right, operators, depth - 1))
