r"""Rule-based rewards: a problem and the model's text in, a number out; None where no judgement is possible.

The text judged is all the model is answerable for: what the prompt pre-filled (`<think>`) plus the completion, decoded
without its stop token. The format is a cost, not a prize: a perfect format adds nothing and a broken one costs its
weight, so no answer can earn anything by its looks (a format prize of weight 1 trains format at accuracy's expense).

Left out: rewards by a model, partial credit, rewards for code.

Sources: accuracy and format as in DeepSeek-R1-Zero (arXiv:2501.12948, section 2.2.2), the overlong penalty from DAPO
(arXiv:2503.14476, equation 13). Departures: the format must hold for the whole text with nothing empty, and it is
subtracted rather than added.
"""

import math
import re

from nanor1.grading import extract_answer, math_equal
from nanor1.tasks import BOXED_TASKS, Problem, check_countdown

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_ANSWER_FORM = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
_NUMBER_TASKS = ("arithmetic", "gsm8k")
_UNWORKED = re.compile(r"[\d)}]\s*(?:[-+*/^×÷·−–]|\\(?:times|cdot|div)\b)|\\[dt]?frac|\\sqrt")  # 47 + 85, \frac{36}{2}
_BOXED_FORM = re.compile(r"\s*<think>(.*)</think>(.*)", re.DOTALL)
_BOX = re.compile(r"\\boxed\s*\{\s*[^\s}].*\}", re.DOTALL)


def after_thinking(text: str) -> str:
    """The part that counts as the answer: what follows the last `</think>`.

    A text without `</think>` counts whole if it opens no `<think>` (the model answered at once), and not at all if it
    does (it was still thinking when it ended).

    >>> after_thinking("<think>maybe <answer>3</answer></think> <answer>4</answer>")
    ' <answer>4</answer>'
    """
    _, end, answer = text.rpartition("</think>")
    return answer if end or "<think>" not in text else ""


def answer_block(text: str) -> str | None:
    """What stands in the last `<answer>` that is opened after the thinking; None if there is none, or it never closes.

    >>> answer_block("<think>a</think> <answer> 1 + 2 </answer>")
    ' 1 + 2 '
    """
    _, opened, rest = after_thinking(text).rpartition("<answer>")
    block, closed, _ = rest.partition("</answer>")
    return block if opened and closed else None


def final_answer(problem: Problem, text: str) -> str | None:
    """The answer that the text commits itself to, as it is written but for blanks; None if it gives none.

    >>> final_answer(Problem("", "3", "countdown"), "<think> 1 + 2 = 3 </think> <answer> 1 + 2 </answer>")
    '1+2'
    """
    answer = answer_block(text) if problem.task == "countdown" else extract_answer(after_thinking(text))
    return None if answer is None else "".join(answer.split()) or None


def accuracy(problem: Problem, text: str) -> float | None:
    """1.0 if the text's final answer is right, 0.0 if it is wrong or missing; None if the problem has no gold answer.

    Only what follows the thinking counts. Countdown: the last `<answer>` block must pass `check_countdown`. Other
    tasks: the answer that `grading.extract_answer` finds there must equal the gold answer, and where the gold answer is
    a number (arithmetic, GSM8K) it must be worked out: `math_equal` would let `47 + 85` pass for 132.
    """
    if problem.task == "countdown":
        if problem.target is None or not problem.numbers:
            return None
        equation = answer_block(text)
        return float(equation is not None and check_countdown(equation, problem.numbers, problem.target))
    if not problem.answer.strip():
        return None
    answer = extract_answer(after_thinking(text))
    if answer is not None and problem.task in _NUMBER_TASKS:
        answer = answer.rpartition("=")[2]
        if _UNWORKED.search(answer):
            return 0.0
    return float(answer is not None and math_equal(answer, problem.answer))


def format(problem: Problem, text: str) -> float:
    r"""1.0 if the whole text has the form asked for, else 0.0.

    `<think> thinking </think> <answer> answer </answer>`, blanks between and around: each tag exactly once, in lower
    case, without attributes, in this order; thinking and answer not empty; nothing before, between or after. So
    repeated or nested blocks, a code fence around it all and a closing remark all cost the format.

    The tasks of BOXED_TASKS may also answer as chat models do: `<think> thinking </think>` once, at the start, not
    empty, and then text with exactly one, not empty `\boxed{}` and no `<answer>` tag.
    """
    counts = tuple(map(text.count, _TAGS))
    if counts == (1, 1, 1, 1):
        match = _ANSWER_FORM.fullmatch(text)
        return float(match is not None and bool(match[1].strip() and match[2].strip()))
    if counts == (1, 1, 0, 0) and problem.task in BOXED_TASKS:
        match = _BOXED_FORM.fullmatch(text)
        return float(match is not None and bool(match[1].strip()) and _has_one_box(match[2]))
    return 0.0


def _has_one_box(text: str) -> bool:
    return text.count("\\boxed") == 1 and _BOX.search(text) is not None


REWARDS = {"accuracy": accuracy, "format": format}


def overlong_penalty(n_tokens: int, max_tokens: int, buffer: int) -> float:
    """0 up to `max_tokens - buffer` tokens, then falling linearly to -1 at `max_tokens`, -1 beyond (DAPO, eq. 13).

    >>> overlong_penalty(90, 100, 20)
    -0.5
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"the overlong buffer is {buffer} tokens; it must lie in 1..{max_tokens}, the length allowed")
    return -min(max((n_tokens - (max_tokens - buffer)) / buffer, 0.0), 1.0)


def parse_rewards(text: str) -> dict[str, float]:
    """Read "accuracy=1,format=0.1" into weights by name; ValueError for what is unknown, repeated or no weight.

    >>> parse_rewards("accuracy=1,format=0.1")
    {'accuracy': 1.0, 'format': 0.1}
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, equals, number = (part.strip() for part in item.partition("="))
        if name not in REWARDS:
            raise ValueError(f"unknown reward {name!r} in {text!r}; choose from {', '.join(REWARDS)}")
        if not equals:
            raise ValueError(f"the reward {name!r} in {text!r} has no weight; write {name}=NUMBER")
        if name in weights:
            raise ValueError(f"the reward {name!r} stands twice in {text!r}; give it one weight")
        weights[name] = _weight(name, number)
    return weights


def _weight(name: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"the weight of {name!r} is {number!r}; write a number from 0 up, such as 0.1")
    return weight


def combine(parts: dict[str, float | None], weights: dict[str, float]) -> float | None:
    """The reward: weight * part summed, the format as a cost, weight * (part - 1); None if a weighted part is None.

    A completion whose reward is None is left out and counted, never scored 0: the model is not to blame.

    >>> combine({"accuracy": 1.0, "format": 0.0}, {"accuracy": 1.0, "format": 0.1})
    0.9
    """
    reward = 0.0
    for name, weight in weights.items():
        part = parts[name]
        if part is None:
            return None
        reward += weight * (part - 1 if name == "format" else part)
    return reward
