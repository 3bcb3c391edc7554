r"""Rule-based rewards: a problem and the model's text in, a number out; None where no judgement is possible.

The text judged is all the model is answerable for: what the prompt pre-filled (`<think>`) plus the completion, decoded
without its stop token. The format is a cost, not a prize: a perfect format adds nothing and a broken one costs its
weight, so no answer can earn anything by its looks (a format prize of weight 1 trains format at accuracy's expense).

Left out: partial credit, and the preference of a reward model (reward_model.py), which is only weighed here. Whoever
wants other rules writes them into a file of one's own (`read_reward_file`).

Sources: accuracy and format as in DeepSeek-R1-Zero (arXiv:2501.12948, section 2.2.2), language as in DeepSeek-R1
(section 2.3.2), the overlong penalty from DAPO (arXiv:2503.14476, equation 13). Departures: the format must hold for
the whole text with nothing empty, and it is subtracted rather than added; a Chinese character counts as a word, though
words have one and a half of them on average, so beside English words the Chinese ones weigh too much.
"""

import hashlib
import inspect
import math
import re
import reprlib
import runpy
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import regex  # comes with tiktoken; knows the scripts of Unicode

from nanor1.grading import extract_answer, is_worked_out, math_equal
from nanor1.tasks.countdown import check_countdown
from nanor1.tasks.problems import BOXED_TASKS, Problem
from nanor1.tasks.programs import code_accuracies, write_program

LOGGED = frozenset(  # what train_zero.py writes of a step beside the rewards' means
    "step reward response_tokens response_tokens_max truncated rollouts unjudged groups dropped_groups kl loss entropy "
    "overlong_penalty kl_penalty clipped logp_gap_mean logp_gap_max learned_tokens learn_flops loss_scale grad_norm "
    "updates skipped_updates lr learn_s learn_flops_per_s rollout_s rollout_tokens_per_s learn_tokens_per_s mfu "
    "peak_memory_gib step_s".split()
)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_NUMBER_TASKS = ("arithmetic", "gsm8k")


def after_thinking(text: str) -> str:
    """The part that counts as the answer: what follows the last `</think>`.

    Without one all of it, if it opens no `<think>` (the model answered at once), else nothing (it was still thinking).

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
    """The answer that the text commits itself to, its blanks made single ones; None if it gives none.

    Of a code problem it is the whole program, blanks as they are.

    >>> final_answer(Problem("", "3", "countdown"), "<think> 1 + 2 = 3 </think> <answer> 1 +  2 </answer>")
    '1 + 2'
    """
    if problem.task == "code":
        return write_program(problem.tests, after_thinking(text))
    answer = answer_block(text) if problem.task == "countdown" else extract_answer(after_thinking(text))
    return None if answer is None else " ".join(answer.split()) or None


def accuracy(problem: Problem, text: str) -> float | None:
    """1.0 if the text's final answer is right, 0.0 if it is wrong or missing; None if the problem has no gold answer.

    Only what follows the thinking counts. Countdown: the last `<answer>` block must pass `check_countdown`. Code: the
    program must pass the problem's tests (programs.py), and it is None if they could not be run. Other tasks: the
    answer that `grading.extract_answer` finds there must equal the gold answer, and where the gold answer is a number
    (arithmetic, GSM8K) it must be worked out: `math_equal` would let `47 + 85` pass for 132.
    """
    if problem.task == "countdown":
        if problem.target is None or not problem.numbers:
            return None
        equation = answer_block(text)
        return float(equation is not None and check_countdown(equation, problem.numbers, problem.target))
    if problem.task == "code":
        return code_accuracies([problem], [after_thinking(text)])[0] if problem.tests else None
    if not problem.answer.strip():
        return None
    answer = extract_answer(after_thinking(text))
    is_right = answer is not None and math_equal(answer, problem.answer)
    return float(is_right and (problem.task not in _NUMBER_TASKS or is_worked_out(answer)))


# ---- format

_ANSWER_FORM = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
_CHAT_FORM = re.compile(r"\s*<think>(.*)</think>(.*)", re.DOTALL)
_TAGGED_TASKS = ("countdown", "arithmetic")
_BOX = re.compile(r"\\boxed\s*\{\s*[^\s}].*\}", re.DOTALL)
_PROGRAM = re.compile(r"^[ \t]*```python[ \t\r]*\n(.*?)^[ \t]*```[ \t\r]*$", re.DOTALL | re.MULTILINE)


def format(problem: Problem, text: str) -> float:
    r"""1.0 if the whole text has the form asked for, else 0.0.

    `<think> thinking </think> <answer> answer </answer>`, blanks between and around: each tag exactly once, in lower
    case, without attributes, in this order; thinking and answer not empty; nothing before, between or after. So
    repeated or nested blocks, a code fence around it all and a closing remark all cost the format.

    Countdown and arithmetic have no other form. All else may also be answered as chat models do, DeepSeek-R1 among
    them: `<think> thinking </think>` once, at the start, not empty, and then the answer, not empty, without tags. In
    this form the answer to a task of BOXED_TASKS has exactly one, not empty `\boxed{}`. In both forms the answer to
    "code" has exactly one block between the lines "```python" and "```", not empty; text around it is free.

    A `<think>` that the prompt pre-filled is the first: a model that writes it again breaks the form.
    """
    counts = tuple(map(text.count, _TAGS))
    is_tagged = counts == (1, 1, 1, 1)
    if not is_tagged and (counts != (1, 1, 0, 0) or problem.task in _TAGGED_TASKS):
        return 0.0
    match = (_ANSWER_FORM if is_tagged else _CHAT_FORM).fullmatch(text)
    if match is None or not match[1].strip() or not match[2].strip():
        return 0.0
    if problem.task == "code":
        return float(_has_one_program(match[2]))
    return float(is_tagged or problem.task not in BOXED_TASKS or _has_one_box(match[2]))


def marked(problem: Problem, text: str) -> float:
    r"""1.0 if the text marks one final answer as it was asked to, without tags around its thinking; else 0.0.

    One, not empty `\boxed{}` where the task has boxed answers, one program, else one `<answer>` block. It is the form
    of a chain of thought in the open, and of a direct answer.
    """
    if problem.task == "code":
        return float(_has_one_program(text))
    if problem.task in BOXED_TASKS:
        return float(_has_one_box(text))
    counts = tuple(map(text.count, _TAGS[2:]))
    return float(counts == (1, 1) and bool((answer_block(text) or "").strip()))


def _has_one_box(text: str) -> bool:
    return text.count("\\boxed") == 1 and _BOX.search(text) is not None


def _has_one_program(text: str) -> bool:
    match = _PROGRAM.search(text) if text.count("```python") == 1 else None
    return match is not None and bool(match[1].strip())


# ---- language

# Letters that are no words: code, LaTeX, tags, addresses. An attempt that fails ends where the next one could begin,
# and gives nothing back on the way (*+, ++), so the time is in proportion to the text. What is left open, a code fence
# for one, hides nothing. A dollar before a digit closes no formula: it is money, as in "$5 and $6".
_BRACES = r"\{[^{}]*+\}"
for _ in range(2):  # \boxed{\frac{\text{total}}{2}}
    _BRACES = rf"\{{(?:[^{{}}]++|{_BRACES})*+\}}"
_NO_WORDS = regex.compile(
    r"```.*?```|`{1,2}+[^`\n]++`{1,2}+|"  # code
    r"\$\$(?:[^$\\]|\\.|\$(?!\$))*+\$\$|\$(?=[^\s$])(?:[^$\\]|\\.)*+(?<!\s)\$(?!\d)|"  # formulas
    r"\\\((?:[^\\]|\\[^()])*+\\\)|\\\[(?:[^\\]|\\[^\[\]])*+\\\]|"
    rf"\\[A-Za-z]++(?:{_BRACES})*+|\\.|"  # commands of LaTeX
    r"</?[A-Za-z]++>|(?:https?://|www\.)[!-~]++",  # tags, addresses
    regex.DOTALL,
)
# A word is a run of letters of one script; in scripts that are written without blanks it is one letter. A single Latin
# letter is a variable ("a" and "I" with it), a Greek one mathematics. English stands first: it wins a tie.
_SCRIPTS = {
    "Latin": r"(?:[\p{Latin}&&\p{L}]\p{M}*+){2,}+",
    "Han": r"[\p{Han}&&\p{L}]",
    "Kana": r"[[\p{Hiragana}\p{Katakana}]&&\p{L}]",
    "Thai": r"[\p{Thai}&&\p{L}]",
    **{
        script: rf"[\p{{{script}}}&&\p{{L}}][\p{{{script}}}\p{{M}}]*+"
        for script in ("Cyrillic", "Arabic", "Hebrew", "Hangul", "Devanagari")
    },
    "other": r"(?:[\p{L}--[\p{Latin}\p{Greek}\p{Common}]]\p{M}*+)++",
}
_WORD = regex.compile("|".join(f"(?P<{script}>{word})" for script, word in _SCRIPTS.items()), regex.V1)


def language(problem: Problem, text: str) -> float:
    """The share of the reasoning's words that are in the language of the problem's prompt; 1.0 if it has no words.

    The reasoning is what stands before the last `</think>`, and all of a text without one. A language is told by its
    script. The target is the script that most words of the prompt are in, Latin where it has none: whatever the prompt
    may ask for, an English one wants English. Not counted either way: digits, punctuation, code between backticks,
    LaTeX, tags, web addresses, single Latin letters and Greek ones. A text that was cut off while thinking counts as
    far as it goes.

    What this does not tell apart: English from French, from pinyin, or from units and function names outside LaTeX
    ("km", "sin"); Chinese from Japanese but for the kana. Nor does it see the language of what stands in code or
    LaTeX, or after the thinking: it is of use beside accuracy and format, not alone.

    >>> language(Problem("What is 2 + 2?", "4", "arithmetic"), "<think> 2 + 2, let me see, 是 4 </think> 四")
    0.75
    """
    target = max(_SCRIPTS, key=_count_words(problem.prompt).__getitem__)
    before, end, _ = text.rpartition("</think>")
    words = _count_words(before if end else text)
    return words[target] / words.total() if words else 1.0


def _count_words(text: str) -> Counter[str]:
    """How many words of each script."""
    return Counter(match.lastgroup for match in _WORD.finditer(_NO_WORDS.sub(" ", text)))


def chance(problem: Problem, text: str) -> float:
    """1.0 or 0.0, equally likely and always the same for a text: the control, from which nothing is to be learned.

    Random rewards lift some models by what the trainer does to them alone (2506.10947).
    """
    digest = hashlib.sha256(f"{problem.prompt}\0{text}".encode("utf-8", "surrogatepass")).digest()
    return float(digest[0] % 2)


# ---- rewards of one's own


@dataclass
class OwnReward:
    """A function of a user's file, called as any rule is. What it does wrong is a None, counted, and never raised.

    Wrong: an exception, and a result that is neither None nor a finite number (an array or a tensor of one number is
    one). `n_failed` counts them, `first_error` says what the first was, and in which line. There is no limit of time.
    ValueError when made of a function that cannot be called as a reward is, or has a name that is taken.
    """

    name: str
    path: Path
    function: Callable[[Problem, str], object]
    first_error: str | None = None
    n_failed: int = 0

    def __post_init__(self):
        name, function, fault = self.name, self.function, ""
        if name == "preference":
            fault = " is a reward model's name, not a function's; give it another one"
        elif name in LOGGED:
            fault = " is the name of another figure in metrics.jsonl; give it another one"
        elif inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            fault = " is async; a reward is a plain function, which returns its number"
        elif inspect.isgeneratorfunction(function):
            fault = " yields; a reward is a plain function, which returns its number"
        else:
            signature = inspect.signature(function)
            try:
                signature.bind(None, None)
            except TypeError as error:
                how = f"cannot be called as {name}(problem, text) ({error})"
                fault = f"{signature} {how}; if it is no reward, call it _{name}"
        self.first_line = inspect.unwrap(function).__code__.co_firstlineno
        if fault:
            raise ValueError(f"{self.path}, line {self.first_line}: {name}{fault}")

    def __call__(self, problem: Problem, text: str) -> float | None:
        try:
            result = self.function(problem, text)
            return None if result is None else self._to_number(result)
        except KeyboardInterrupt:  # the user's
            raise
        except BaseException as error:
            self.n_failed += 1
            line = _line_in(self.path, error) or self.first_line
            where = f"{self.path.name}, line {line}, in {self.name}"
            self.first_error = self.first_error or f"{where}: {_in_a_line(error)}"
            return None

    def _to_number(self, result: object) -> float:
        what = f"it returned {reprlib.repr(result)}"
        if isinstance(result, str | bytes):
            raise TypeError(f"{what}, which is text; a reward is a number, or None")
        number = float(result.item() if hasattr(result, "item") else result)  # .item(): an array's or a tensor's
        if not math.isfinite(number):
            raise ValueError(f"{what}; a reward is a finite number, or None")
        if self.name == "accuracy" and not 0 <= number <= 1:  # it is averaged as a share, with an interval
            raise ValueError(f"{what}; accuracy lies in 0..1, and what does not takes another name")
        return number


def read_reward_file(path: str | Path) -> dict[str, OwnReward]:
    """The rewards of a user's Python file, by name: every public function that it defines, `(problem, text)` -> number.

    The number may be any finite one, of a function called accuracy one in 0..1; None where no judgement is possible.
    One called accuracy, format, language or random replaces the rule of that name: so a task is judged by a file of
    one's own; what is called format is a cost (`combine`). Names that begin with "_", imported functions and classes
    are left alone. The file is run, as a script would be; what it imports must be installed or on PYTHONPATH.
    ValueError, with file, line and function, for what cannot be read, run or called like this.
    """
    path = Path(path)
    try:
        path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); expected a Python file of rewards") from error
    module = ModuleType(f"reward_file_{path.stem}")  # not the stem alone: a file may be called math.py
    try:  # not an import, which keeps what it read: the file may have been edited within the same second
        vars(module).update(runpy.run_path(str(path), run_name=module.__name__))
    except (Exception, SystemExit) as error:
        hint = "; install it, or put its folder on PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(f"{path}, line {_line_in(path, error)}: {_in_a_line(error)}{hint}") from error
    sys.modules[module.__name__] = module  # where pickle looks for what the file defines
    found = {
        name: OwnReward(name, path, value)
        for name, value in vars(module).items()
        if inspect.isroutine(value) and name[0] != "_" and getattr(value, "__module__", None) == module.__name__
    }
    if not found:
        raise ValueError(f"{path} defines no public function; write one, as def my_reward(problem, text): return 1.0")
    return found


def _line_in(path: Path, error: BaseException) -> int | None:
    """The line of a file in which something went wrong: of several the deepest; None if it was nowhere in it."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno or 1
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(path)]
    return lines[-1] if lines else None


def _in_a_line(error: BaseException) -> str:
    return f"{' '.join(traceback.format_exception_only(error)[-1].split()):.300}"


# ---- combination

REWARDS = {"accuracy": accuracy, "format": format, "language": language, "random": chance}  # the rules
REPORTED = ("accuracy", "format", "language")  # of every completion, whatever is weighted
NAMES = (*REWARDS, "preference")  # what can be weighted: preference is a reward model's score, which a script adds


def overlong_penalty(n_tokens: int, max_tokens: int, buffer: int) -> float:
    """0 up to `max_tokens - buffer` tokens, then falling linearly to -1 at `max_tokens`, -1 beyond (DAPO, eq. 13).

    >>> overlong_penalty(90, 100, 20)
    -0.5
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"the overlong buffer is {buffer} tokens; it must lie in 1..{max_tokens}, the length allowed")
    return -min(max((n_tokens - (max_tokens - buffer)) / buffer, 0.0), 1.0)


def parse_rewards(text: str, names: Sequence[str] = NAMES) -> dict[str, float]:
    """Read "accuracy=1,format=0.1" into weights by name; ValueError for what is unknown, repeated or no weight.

    `names` are those that can be weighed: NAMES, and with a reward file `(*NAMES, *read_reward_file(path))`.

    >>> parse_rewards("accuracy=1,format=0.1")
    {'accuracy': 1.0, 'format': 0.1}
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, equals, number = (part.strip() for part in item.partition("="))
        if name not in names:
            raise ValueError(f"unknown reward {name!r} in {text!r}; choose from {', '.join(dict.fromkeys(names))}")
        if not equals:
            raise ValueError(f"the reward {name!r} in {text!r} has no weight; write {name}=NUMBER")
        if name in weights:
            raise ValueError(f"the reward {name!r} stands twice in {text!r}; give it one weight")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = math.nan
        if not 0 <= weights[name] < math.inf:
            raise ValueError(f"the weight of {name!r} is {number!r}; write a number from 0 up, such as 0.1")
    return weights


def combine(parts: dict[str, float | None], weights: dict[str, float]) -> float | None:
    """The reward: weight * part summed, the format as a cost, weight * (part - 1); None if a weighted part is None.

    A completion whose reward is None is left out and counted, never scored 0: the model is not to blame. A part without
    a weight, or with the weight 0, is only reported.

    >>> combine({"accuracy": 1.0, "format": 0.0}, {"accuracy": 1.0, "format": 0.1})
    0.9
    """
    weighed = {name: parts[name] for name, weight in weights.items() if weight}
    if None in weighed.values():
        return None
    reward = 0.0
    for name, part in weighed.items():
        reward += weights[name] * (part - 1 if name == "format" else part)
    return reward
