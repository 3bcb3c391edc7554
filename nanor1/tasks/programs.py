"""Problems whose answer is a Python program: read from the rows of public sets, found in a response, judged by tests.

Three kinds: complete a function (HumanEval), write a function (MBPP), write a script that reads standard input and
prints (APPS, TACO and others: `input_output`, or pairs in `io`). The program is run by jobs.py, never here.

Left out: other languages, functions tested by input and output (APPS's `fn_name`), partial credit.

Sources: HumanEval (arXiv:2107.03374), MBPP (arXiv:2108.07732), APPS (arXiv:2105.09938).
"""

import builtins
import json
import keyword
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from nanor1.sandbox.jobs import Tests, Verdict, refuse_unconfined, run_many

# A fence opens a block, whatever its mark says; one behind other text on its line only if that is nothing or Python.
_OPENING = re.compile(r"(^[ \t]*)?(?<![`~])(`{3,}|~{3,})[ \t]*([^\n`]*)(?:\n|\Z)", re.MULTILINE)
_PYTHON = re.compile(
    r"\W{0,3}(\{[^\s{}]*\}\s*)?(lang\w*\W{1,2})?([ic]?python|pycon|\S+\.py|py)[\d.]*(?![-\w])", re.IGNORECASE
)
_FENCE, _STRING = r"^[ \t]*(`{3,}|~{3,})([^\n]*)", r"""#.*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'"""
# What matters where a block's end is looked for: outside strings of three quotes, and within each of the two kinds.
_TOKENS = {
    "": re.compile(rf"""{_FENCE}|\"{{3}}|'{{3}}|{_STRING}|\\.""", re.MULTILINE),
    '"""': re.compile(rf'{_FENCE}|\\.|"""', re.MULTILINE),
    "'''": re.compile(rf"{_FENCE}|\\.|'''", re.MULTILINE),
}
_BODY = re.compile(r"\n*(?:  |\t)[ \t]*[^\s`~]")
# A body of which the first line alone, no `for ...:`, lost its indentation.
_STRIPPED = re.compile(r"(?!.*:[ \t]*(?:#.*)?$)\S.*(?:\n(?:[ \t].*)?)+", re.MULTILINE)
_FUTURE = re.compile(r"^from __future__ import .*\n", re.MULTILINE)
_CALLED = re.compile(r"(?<![.\w])([A-Za-z_]\w*)\s*\(")


@dataclass(frozen=True)
class CodeTests:
    """What judges a program: `tests` as sandbox.run_tests takes them, and the `function` they call ("": a script).

    `opening` is the code that a response continues, up to the function's body (HumanEval; else empty).
    """

    tests: Tests
    function: str = ""
    opening: str = ""


# ---- a row of a file


def read_row(row: dict) -> tuple[str, str, CodeTests]:
    """The question, a solution ("" if the row has none) and the tests of one problem.

    ValueError for other rows, and where programs cannot be confined: better now than when the first one is sampled.
    """
    refuse_unconfined()
    if "entry_point" in row:
        return _humaneval(row)
    if "test_list" in row:
        return _mbpp(row)
    if "input_output" in row or "io" in row:
        return _script(row)
    known = "'entry_point' (HumanEval), 'test_list' (MBPP), 'input_output' or 'io'"
    raise ValueError(f"expected {known}; found the fields {', '.join(row)}")


def _humaneval(row: dict) -> tuple[str, str, CodeTests]:
    opening, test, function = (text_field(row, name) for name in ("prompt", "test", "entry_point"))
    preamble, rest = _split(opening, function)
    if not rest:
        raise ValueError(f"expected a 'prompt' that holds 'def {function}', found {opening!r:.60}")
    # The judge has the helpers of the prompt from the prompt: from the program they could be anything.
    tests = f"{preamble}\n{test}\ncheck({function})\n"
    prompt = f"Complete this Python function.\n\n{opening}"
    return prompt, row.get("canonical_solution", ""), CodeTests(tests, function, opening)


def _mbpp(row: dict) -> tuple[str, str, CodeTests]:
    question = text_field(row, "text" if "text" in row else "prompt").strip()
    tests, imports = row["test_list"], row.get("test_imports") or []
    for name, code in (("test_list", tests), ("test_imports", imports)):
        if not isinstance(code, list) or {type(line) for line in code} - {str}:
            raise ValueError(f"expected {name!r}: [lines of code], found {code!r:.60}")
    if not tests:
        raise ValueError("'test_list' is empty; it takes a test to judge a program")
    setup = "\n".join([*imports, row.get("test_setup_code") or ""])
    called = [name for name in _CALLED.findall(tests[0]) if not keyword.iskeyword(name)]
    called = [name for name in called if not re.search(rf"\b{name}\b", setup)]  # what the tests have is not asked for
    function = next((name for name in called if not hasattr(builtins, name)), (called or [""])[0])
    # One function is called `sum`: the tests mean the program's, which the import says.
    own = f"from program import {function}" if function else ""
    code = "\n".join([setup, own, *tests])
    prompt = f"{question}\nThe Python code should pass this test:\n{tests[0].strip()}"
    return prompt, row.get("code", ""), CodeTests(code, function)


def _script(row: dict) -> tuple[str, str, CodeTests]:
    question = text_field(row, next((name for name in ("question", "problem", "description") if name in row), "prompt"))
    pairs = row.get("io")
    if pairs is None:
        pairs = row["input_output"]
        pairs = json.loads(pairs) if isinstance(pairs, str) else pairs
        if not isinstance(pairs, dict) or pairs.get("fn_name") or not {"inputs", "outputs"} <= set(pairs):
            raise ValueError(f"expected 'input_output' of a script: 'inputs' and 'outputs', found {pairs!r:.60}")
        if len(pairs["inputs"]) != len(pairs["outputs"]):
            raise ValueError(f"{len(pairs['inputs'])} inputs have {len(pairs['outputs'])} outputs")
        pairs = list(zip(pairs["inputs"], pairs["outputs"], strict=True))
    if not isinstance(pairs, list) or not pairs or any(list(map(type, pair)) != [str, str] for pair in pairs):
        raise ValueError(f"expected pairs of texts, input and output, found {pairs!r:.60}")
    prompt = f"{question.strip()}\n\nWrite a Python program that reads standard input and prints the answer."
    return prompt, row.get("solution", ""), CodeTests(tuple(map(tuple, pairs)))


def text_field(row: dict, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a non-empty text {name!r}, found {value!r:.60} (fields: {', '.join(row)})")
    return value


def _split(code: str, function: str) -> tuple[str, str]:
    """The code before the top-level definition of the function, and from there on (empty if there is none)."""
    match = re.search(rf"^(?:async )?def {re.escape(function)}\b", code, re.MULTILINE)
    return (code[: match.start()], code[match.start() :]) if match else (code, "")


# ---- the program in a response


def extract_code(text: str, function: str = "") -> str | None:
    """The Python block of a response: of several the last that defines the function, else the last; None if none is.

    A block marked as Python comes before one without a mark, a session with prompts (`>>>`) after both, and an import
    is the weakest definition: uses of the function import it too. One with another mark counts if there is no other
    and it defines the function. A block that never closes runs to the end; one that only closes was opened by the
    prompt. Those in the last `<answer>` come first. Without any block it is all that stands there, or, where a function
    is asked for, all of the text.

    >>> extract_code("Thus:\\n```python\\nprint(1)\\n```\\nIt prints 1.")
    'print(1)\\n'
    """
    text = text.replace("\ufeff", "").replace("\r\n", "\n")
    _, is_tagged, answer = text.rpartition("</answer>")[0].rpartition("<answer>")
    answer = answer.partition("</answer>")[0]
    blocks = _blocks(answer) or _blocks(text)
    if not blocks:
        bare = answer if is_tagged else text if function else ""
        return textwrap.dedent(bare.strip("\n")) if bare.strip() else None
    kinds = {"python": [], "unmarked": [], "session": [], "before": []}
    for mark, code in blocks:
        kind = "before" if mark is None else "python" if _PYTHON.match(mark) else "unmarked"
        if kind == "python" or not mark and code.strip():
            if code.lstrip().startswith(">>>"):
                kind, typed = "session", [line[4:] for line in code.splitlines() if line.startswith((">>>", "..."))]
                code = "".join(f"{line}\n" for line in typed)
            kinds[kind].append(code)
    definitions = _definitions(function)
    if definitions and not any(kinds.values()):  # a block of another mark that defines the function as Python does
        kinds["other"] = [code for _, code in blocks if definitions[0].search(code)]
    for defines in definitions:
        for codes in kinds.values():
            if found := [code for code in codes if defines.search(code)]:
                return found[-1]
    codes = next(filter(None, kinds.values()), [None])
    return next((code for code in reversed(codes) if code and code.strip()), codes[-1])


def _blocks(text: str) -> list[tuple[str | None, str]]:
    """Marks and contents of all blocks; with the mark None what stands before a first fence that has none."""
    blocks, start = [], 0
    while opening := _OPENING.search(text, start):
        start, (indent, fence, mark) = opening.end(), opening.groups()
        if indent is None and mark and not _PYTHON.match(mark):
            continue
        if not (blocks or mark or fence in text[: opening.start()]):
            blocks.append((None, text[: opening.start()]))
        closing = _closing(text, start, fence)
        code = text[start : closing.start()] if closing else text[start:].partition(fence)[0]
        blocks.append((mark, textwrap.dedent(code)))
        if closing is None:
            break
        start = closing.start() if _PYTHON.match(closing[2]) else closing.end()
    return blocks


def _closing(text: str, start: int, fence: str) -> re.Match | None:
    """The fence that ends the block which starts there. Those in strings of three quotes do not, if the strings end."""
    quotes, inside = "", None
    while token := _TOKENS[quotes].search(text, start):
        start = token.end()
        if not token[1]:
            quotes = "" if token[0] == quotes else token[0] if not quotes and token[0] in _TOKENS else quotes
        elif token[1].startswith(fence):
            if not quotes:
                return token
            inside = inside or token
    return inside


def _definitions(function: str) -> list[re.Pattern]:
    """What defines the function at the top level: def, class or assignment; and import."""
    if not function:
        return []
    name = re.escape(function)
    is_set = rf"(?:(?!{name}\b)\w+[ \t]*[,=][ \t]*)*{name}[ \t]*(?:[,:][^=\n]*)?=(?!=)"
    own = rf"^(?:(?:async[ \t]+)?def[ \t]+{name}\b|class[ \t]+{name}\b|{is_set})"
    taken = rf"^(?:from[ \t]+\S+[ \t]+)?import\b(?:[ \t]*\([^()]*?|[^\n]*?)\b{name}\b(?![ \t]+as\b)"
    return [re.compile(pattern, re.MULTILINE) for pattern in (own, taken)]


def write_program(tests: CodeTests, text: str) -> str | None:
    """The program that a response (what follows its thinking) stands for; None if it holds none.

    Where the problem gave an opening, the response may give the whole function, without what stood before it, or else
    continue the opening: then up to the first line that is not indented (a block may lose its indentation). Both in a
    block, or as bare text.
    """
    code = extract_code(text, tests.function)
    if code is None or not tests.opening:
        return code
    is_body = re.search(r"^return\b", code, re.MULTILINE)  # whatever it imports, or calls as the function is called
    if not is_body and any(defines.search(code) for defines in _definitions(tests.function)):
        futures = "".join(_FUTURE.findall(code))  # have to come first
        preamble, _ = _split(tests.opening, tests.function)  # imports, and functions that it may use
        return f"{futures}{preamble}\n{_FUTURE.sub('', code)}"
    if _BODY.match(text):
        code = text  # it goes on where the opening ends; a block that follows is an example
    if _STRIPPED.fullmatch(code):
        code = f"    {code}"
    body = re.split(r"^(?=\S)", code, maxsplit=1, flags=re.MULTILINE)[0]
    return tests.opening + (body if body.strip() else textwrap.indent(code, "    "))


# ---- the verdict


def judge_programs(problems: Sequence, texts: Sequence[str], timeout_s: float = 5) -> list[Verdict]:
    """The verdict on each response (what follows the thinking) to its tasks.Problem with `tests`, one a core at a time.

    All of a step at once take a tenth of the time of one after the other.
    """
    jobs = [(write_program(p.tests, text), p.tests.tests) for p, text in zip(problems, texts, strict=True)]
    judged = iter(run_many([job for job in jobs if job[0] is not None], timeout_s))
    return [Verdict(False, "no Python block") if program is None else next(judged) for program, _ in jobs]


def code_accuracies(problems: Sequence, texts: Sequence[str]) -> list[float | None]:
    """1.0 for each program that passes all tests, else 0.0; None if they could not be run. See `judge_programs`."""
    verdicts = judge_programs(problems, texts)
    return [None if verdict.passed is None else float(verdict.passed) for verdict in verdicts]
