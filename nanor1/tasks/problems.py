"""Problems to solve: countdown and arithmetic are generated; GSM8K, MATH, countdown, code and own sets are read.

A task gives training problems for a step (stateless: the same seed and step give the same problems, so a resumed run
sees what the interrupted one would have seen) and a fixed held-out set that training can never meet. What is held out
is decided by a hash of the instance - the multiset of its numbers, or else its text - so no list has to be kept. Every
script takes its problems from here, so that what one of them trains on is what no other evaluates on.

Left out: downloading, judging (rewards.py).

Sources: countdown as TinyZero plays it, GSM8K (arXiv:2110.14168), MATH (arXiv:2103.03874), the base model's
conversation after Table 1 of the DeepSeek-R1 report (arXiv:2501.12948).
"""

import dataclasses
import hashlib
import json
import math
import random
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from nanor1.grading import extract_answer
from nanor1.tasks.countdown import fold
from nanor1.tasks.programs import read_row, text_field

SPLITS = ("train", "held-out", "all")  # the parts of a task's problems
HELD_OUT_SHARE = 0.1  # of all instances, where no file says what is held out
MAX_DRAWS = 20_000  # for one problem; if none fits, the parameters are at fault
BOXED_TASKS = ("gsm8k", "math")  # a chat model writes these answers in \boxed{}, as it was trained to
_BEFORE = {"question": "prompt", "solution": "answer"}  # a task that finds the latter does not look for the former
File = str | Path
Row = TypeVar("Row")


@dataclass(frozen=True)
class Problem:
    """What to solve and how to judge it: `prompt` is the bare question, `answer` the gold answer as text.

    `numbers` are the numbers given (countdown, arithmetic), `target` the value to reach (countdown only),
    `tests` what judges a program (code: a programs.CodeTests).
    """

    prompt: str
    answer: str
    task: str
    numbers: tuple[int, ...] = ()
    target: int | None = None
    tests: object = None


# ---- what is held out


def instance_key(problem: Problem) -> str:
    """What makes two problems the same instance: their multiset of numbers where they have one, else the text.

    Coarser than the problem itself (47 + 85, 85 + 47 and 85 - 47 are one instance), so nothing close leaks.
    """
    return str(sorted(problem.numbers)) if problem.numbers else problem.prompt


def is_in_share(key: str, share: float) -> bool:
    """Whether the text falls, by a hash that never changes, into this share (0 to 1) of all texts."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


# ---- a task: problems to train on, to evaluate on, or to go through once


@dataclass(eq=False, kw_only=True)
class Task:
    """Problems for training, for evaluation, or a part to go through once: pure, and never changed once made.

    They come from the JSON-lines file `data`, or are drawn. The held-out ones come from the file `eval_data` (training
    then skips its instances), or a hash holds out a share of all instances. Only `parts` of SPLITS must have problems;
    to evaluate alone, `eval_data` is enough. `fields` names the columns of one's own files, see `parse_fields`.

    The classes below can draw a problem (None: draw again), read one from a line's object, or both; their parameters
    are fields, too. ValueError for what a user can get wrong.
    """

    data: File | None = None
    eval_data: File | None = None
    held_out_share: float = HELD_OUT_SHARE
    parts: Sequence[str] = ("train", "held-out")
    fields: dict[str, str] | None = None
    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()  # the fields of a line that `read` looks at
    draw: ClassVar[Callable[..., Problem | None] | None] = None
    read: ClassVar[Callable[..., Problem] | None] = None

    def __post_init__(self):
        self.fields, has_file = self.fields or {}, self.data or self.eval_data
        if unread := self.fields.keys() - set(self.reads):
            known = ", ".join(self.reads) or "none"
            raise ValueError(f"the {self.name} task reads no field {min(unread)!r}; it reads {known}")
        if (has_file or self.fields) and not self.read:
            raise ValueError(f"the {self.name} task is generated; leave data and eval_data out, and fields")
        if not self.draw and not self.data and ("train" in self.parts or not self.eval_data):
            raise ValueError(f"the {self.name} task is not generated; give data=FILE, JSON lines")
        if self.fields and not has_file:
            raise ValueError(f"fields {self.fields} name columns of a file; give data=FILE, JSON lines")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share is {self.held_out_share}; it must lie between 0 and 1")
        problems, evaluation = (
            read_json_lines(path, lambda row: self.read(self._own_columns(row))) if path else []
            for path in (self.data, self.eval_data)
        )
        self.held_out_keys = set(map(instance_key, evaluation))
        train, out = [], []
        for problem in problems:
            (out if self.is_held_out(problem) else train).append(problem)
        # The parts that are read, in the files' order; the others are drawn, without end.
        self.listed = {"train": train} if self.data or not self.draw else {}
        if has_file:
            self.listed |= {"held-out": evaluation or out, "all": problems or evaluation}
        for split in self.parts:
            self.describe(split)  # refuses one that is empty

    def _own_columns(self, row: dict) -> dict:
        """A line of one's own file, each field taken from the column that holds it; as it is without `fields`."""
        for column in self.fields.values():
            if column not in row:
                raise ValueError(f"there is no column {column!r}; the line has {', '.join(row) or 'none'}")
        hidden = {_BEFORE.get(field) for field in self.fields} - self.fields.keys()
        kept = {field: row[field] for field in row if field not in hidden}
        return kept | {field: row[column] for field, column in self.fields.items()}

    def is_held_out(self, problem: Problem) -> bool:
        key = instance_key(problem)
        return key in self.held_out_keys if self.held_out_keys else is_in_share(key, self.held_out_share)

    def sample(self, n: int, seed: int, step: int) -> list[Problem]:
        """`n` problems to train on: of a file those from step * n on in an endless sequence of shuffled epochs.

        So `sample(1, seed, i)` is problem i of that sequence, and costs no more than its share.
        """
        if "train" in self.listed:
            return _take(self._there("train"), n, seed, step)
        rng, hint = random.Random(f"sample {seed} {step}"), "to train on; widen the ranges of numbers and results"
        return [self._draw(rng, lambda problem: not self.is_held_out(problem), hint) for _ in range(n)]

    def held_out(self, n: int) -> list[Problem]:
        """`n` problems to evaluate on: drawn ones all differ, no two share both the numbers and the answer."""
        if "held-out" in self.listed:
            problems = self._there("held-out")
            if n > len(problems):
                raise ValueError(f"{n} held-out problems asked for, only {len(problems)} there; ask for fewer")
            return _take(problems, n, 0, 0)
        rng, found = random.Random("held out 0"), {}
        while len(found) < n:
            hint = f"to evaluate on: only {len(found)} of {n} held-out ones found; ask for fewer, widen the ranges"
            problem = self._draw(rng, lambda p: self.is_held_out(p) and (instance_key(p), p.answer) not in found, hint)
            found[instance_key(problem), problem.answer] = problem
        return list(found.values())

    def _draw(self, rng: random.Random, accept: Callable[[Problem], bool], hint: str) -> Problem:
        for _ in range(MAX_DRAWS):
            try:
                problem = self.draw(rng)
            except ValueError as error:  # of random, where a range is empty
                raise ValueError(f"{error} {hint}") from error
            if problem is not None and accept(problem):
                return problem
        raise ValueError(f"no further problem in {MAX_DRAWS} draws {hint}")

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
        assert split in SPLITS, split
        data, eval_data = (Path(path or "").name for path in (self.data, self.eval_data))
        if split not in self.listed and split == "all":
            raise ValueError(
                f"the {self.name} task is generated, there is no end to all of it; choose train or held-out"
            )
        if split not in self.listed:
            others = f"instances of {eval_data}" if eval_data else "held-out instances"
            return f"generated, none of the {others}" if split == "train" else "generated, held-out instances alone"
        n, how = len(self._there(split)), f"{100 * self.held_out_share:g}%, chosen by a hash of the problem"
        words = {
            "train": f"{data}: the train part ({how}, are held out)",
            "held-out": f"{data}: the held-out part ({how})",
            "all": f"{data or eval_data}, all of them",
        }
        if eval_data:
            words["train"] = f"{data}: all but the instances of {eval_data}"
            words["held-out"] = f"{eval_data}, all held out"
        return f"{n:,} problem{'' if n == 1 else 's'} of {words[split]}"

    def _there(self, split: str) -> list[Problem]:
        if not self.listed[split]:
            n_train, n_out, n_all = (len(self.listed.get(name, ())) for name in SPLITS)
            raise ValueError(
                f"{self.name}: {n_train} of {n_all} problems are left to train on, {n_out} to evaluate on; give more "
                "data, or an eval_data file of other problems (sample.py: or --split all)"
            )
        return self.listed[split]


def _take(problems: list[Problem], n: int, seed: int, step: int) -> list[Problem]:
    """Problems step*n ... step*n + n - 1 of an endless sequence of epochs, each epoch in its own shuffled order."""
    places = (divmod(i, len(problems)) for i in range(step * n, step * n + n))
    return [problems[_epoch_order(len(problems), seed, epoch)[at]] for epoch, at in places]


@lru_cache(maxsize=8, typed=True)  # to shuffle half a million takes 0.2 s, and every step asks
def _epoch_order(n: int, seed: int, epoch: int) -> array:
    order = list(range(n))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return array("L", order)


def make_task(name: str, **options) -> Task:
    """The task called `name`, one of TASKS, of these options of Task and parameters of its own class below.

    make_task("countdown", n_numbers=3, max_number=15, operators="+-*", max_result=24, min_target=0, max_target=24)
    """
    if name not in KINDS:
        raise ValueError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    kind = KINDS[name]
    shared = {field.name for field in dataclasses.fields(Task)}
    parameters = [field.name for field in dataclasses.fields(kind) if field.name not in shared]
    if unknown := options.keys() - shared - set(parameters):
        known = ", ".join(parameters) or "none"
        raise ValueError(f"the {name} task has no parameter {min(unknown)!r}; it has {known}")
    return kind(**options)


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


# ---- generated: numbers and operators drawn at random, kept where the running value stays in range


@dataclass(eq=False, kw_only=True)
class Countdown(Task):
    """Reach `target` from `n_numbers` (3, 4 or "3to4") numbers in 1..max_number, each used once.

    Solvable as drawn: the target is worked out from the numbers, every result an integer in 0..max_result. Read from
    a file: `nums`, `target`. `wording` as in `countdown_problem`.
    """

    name = "countdown"
    reads = ("nums", "target")
    n_numbers: int | str = "3to4"
    max_number: int = 99
    operators: str = "+-*/"
    max_result: int = 1000
    min_target: int = 10
    max_target: int = 99
    wording: str = "words"

    def __post_init__(self):
        if str(self.n_numbers) not in ("3", "4", "3to4"):
            raise ValueError(f"n_numbers is {self.n_numbers!r}; choose 3, 4 or '3to4'")
        _check_choices(self.operators, "+-*/", self.wording)
        super().__post_init__()

    def draw(self, rng: random.Random) -> Problem | None:
        counts = (3, 4) if self.n_numbers == "3to4" else (int(self.n_numbers),)
        numbers = [rng.randint(1, self.max_number) for _ in range(rng.choice(counts))]
        target = fold(numbers, rng.choices(self.operators, k=len(numbers) - 1), self.max_result)
        if target is None or not self.min_target <= target <= self.max_target:
            return None
        rng.shuffle(numbers)  # the order drawn would give the solution away
        return countdown_problem(tuple(numbers), target, self.operators, self.wording)

    def read(self, row: dict) -> Problem:
        nums, target = row.get("nums"), row.get("target")
        if type(target) is not int or not isinstance(nums, list) or {type(number) for number in nums} != {int}:
            raise ValueError(
                f"expected 'nums': [integers] and 'target': integer, found {nums!r:.60} and {target!r:.60}"
            )
        return countdown_problem(tuple(nums), target, self.operators, self.wording)


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


@dataclass(eq=False, kw_only=True)
class Arithmetic(Task):
    """`t0 op t1 op ...` with terms in 1..max_term and every running value in 0..max_value.

    `wording`: "words" (`What is 47 + 85?`) or "symbols" (`47 + 85 =`). The miniature: n_terms=6, max_term=9,
    max_value=40, operators="+-", wording="symbols".
    """

    name = "arithmetic"
    n_terms: int = 2
    max_term: int = 99
    max_value: int = 9801
    operators: str = "+-*"
    wording: str = "words"

    def __post_init__(self):
        if self.n_terms < 2:
            raise ValueError(f"n_terms is {self.n_terms}; it takes at least 2 terms")
        # With three terms or more a product would bind tighter than the left-to-right running value.
        _check_choices(self.operators, "+-*" if self.n_terms == 2 else "+-", self.wording)
        super().__post_init__()

    def draw(self, rng: random.Random) -> Problem | None:
        terms = [rng.randint(1, self.max_term) for _ in range(self.n_terms)]
        signs = rng.choices(self.operators, k=self.n_terms - 1)
        value = fold(terms, signs, self.max_value)
        question = " ".join(f"{sign} {term}" for sign, term in zip(["", *signs], terms, strict=True)).strip()
        prompt = f"What is {question}?" if self.wording == "words" else f"{question} ="
        return None if value is None else Problem(prompt, str(value), "arithmetic", tuple(terms))


def _check_choices(operators: str, allowed: str, wording: str) -> None:
    if not operators or not set(operators) <= set(allowed):
        raise ValueError(f"operators is {operators!r}; choose some of {allowed!r} here")
    if wording not in ("words", "symbols"):
        raise ValueError(f"wording is {wording!r}; choose 'words' or 'symbols'")


# ---- read from JSON lines

_NUMBER_ALONE = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")


class Gsm8k(Task):
    """GSM8K as published: `question`, and `answer` ending in `#### 1,200` (the gold answer: 1200)."""

    name = "gsm8k"
    reads = ("question", "answer")

    def read(self, row: dict) -> Problem:
        if self.fields and _NUMBER_ALONE.fullmatch(answer := str(row.get("answer")).strip()):
            row["answer"] = f"#### {answer}"  # one's own file may have no more than the number
        question, (_, mark, gold) = _text(row, "question"), _text(row, "answer").rpartition("####")
        gold = gold.replace(",", "").strip()
        if not mark or not gold:
            raise ValueError(f"expected an 'answer' that ends in '#### NUMBER', found {row['answer'][-40:]!r}")
        return Problem(question, gold, "gsm8k")


class Math(Task):
    r"""MATH as published: `problem`, and `answer` or else the last `\boxed{}` of `solution`."""

    name = "math"
    reads = ("problem", "answer", "solution")

    def read(self, row: dict) -> Problem:
        question = _text(row, "problem")
        if "answer" in row:
            return Problem(question, _answer(row), "math")
        _, box, rest = _text(row, "solution").rpartition("\\boxed")
        gold = extract_answer(box + rest) if box else None
        if not gold:
            raise ValueError(r"expected an 'answer', or a 'solution' with its result in \boxed{...}; found neither")
        return Problem(question, gold, "math")


class Code(Task):
    """HumanEval, MBPP, and sets of scripts' inputs and outputs as published; see programs.py."""

    name = "code"
    reads = tuple(
        "prompt test entry_point canonical_solution text test_list test_imports test_setup_code code "
        "question problem description input_output io solution".split()
    )

    @staticmethod
    def read(row: dict) -> Problem:
        prompt, solution, tests = read_row(row)
        return Problem(prompt, solution, "code", tests=tests)


@dataclass(eq=False, kw_only=True)
class Text(Task):
    """Any problems: `prompt`, or `question` if there is none, and `answer`, text or number, compared by `math_equal`.

    With `needs_answer` False a line may come without one, where a reward of one's own judges.
    """

    name = "text"
    reads = ("prompt", "question", "answer")
    needs_answer: bool = True

    def read(self, row: dict) -> Problem:
        prompt = _text(row, "question" if "question" in row and "prompt" not in row else "prompt")
        is_empty = row.get("answer") is None or not str(row["answer"]).strip()
        return Problem(prompt, "" if is_empty and not self.needs_answer else _answer(row), "text")


KINDS = {kind.name: kind for kind in (Countdown, Arithmetic, Gsm8k, Math, Code, Text)}
TASKS = tuple(KINDS)


def read_json_lines(path: File, parse: Callable[[dict], Row]) -> list[Row]:
    """What `parse` makes of each line's object, blank lines skipped; ValueError names file, line and fault."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); expected a file of JSON lines") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise ValueError(f"{where}: expected one JSON object on the line, found no valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
        try:
            rows.append(parse(row))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty; expected JSON lines, one object a line")
    return rows


def _text(row: dict, name: str) -> str:
    return text_field(row, name).strip()


def _answer(row: dict) -> str:
    answer = row.get("answer")
    is_number = type(answer) is int or (type(answer) is float and math.isfinite(answer))
    return str(answer) if is_number else _text(row, "answer")


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
        turns = [(example.prompt, _shown(problem.task, example, style)) for example in examples]
        messages = []
        for asked, answer in [*turns, (problem.prompt, None)]:
            messages.append({"role": "user", "content": f"{asked}\n\n{instruction}"})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return messages
    raise ValueError(f"unknown template {template!r}; choose 'r1-zero', 'chat' or 'bare'")


def _shown(task: str, example: Example, style: Style) -> str:
    """A worked answer, or in the direct style no more of it than the answer itself."""
    answer = extract_answer(example.completion) if style == "direct" and task != "code" else None
    if answer is None:
        return example.completion
    return f"\\boxed{{{answer}}}" if task in BOXED_TASKS else f"<answer> {answer} </answer>"


def read_examples(path: File) -> tuple[Example, ...]:
    """Worked examples from JSON lines of `prompt` and `completion`; ValueError names file, line and fault."""
    return tuple(read_json_lines(path, lambda row: Example(_text(row, "prompt"), _text(row, "completion"))))


def prefilled(prompt_text: str) -> str:
    """What the prompt already wrote of the response: rewards judge `prefilled(prompt_text) + completion`.

    >>> prefilled("Assistant: <think>")
    '<think>'
    """
    return "<think>" if prompt_text.rstrip().endswith("<think>") else ""
