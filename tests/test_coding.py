"""Code problems: read as published, the program found in a response; reference solutions pass and mutants fail."""

import ast
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from nanor1.rewards import accuracy, final_answer
from nanor1.sandbox.jobs import run_many, run_tests
from nanor1.tasks.problems import Code, Problem, format_prompt, make_task
from nanor1.tasks.programs import (
    CodeTests,
    code_accuracies,
    extract_code,
    judge_programs,
    read_row,
    write_program,
)

SHARED = Path(os.environ.get("NANOR1_SHARED", "/no/such/folder"))
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="NANOR1_SHARED names no folder")

OPENING = """import math

def helper(x):
    return x

def f(x: int) -> int:
    '''Add one.
    >>> f(1)
    2
    '''
"""
HUMANEVAL = {
    "prompt": OPENING,
    "entry_point": "f",
    "canonical_solution": "    return helper(x) + int(math.sqrt(1))\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert helper(candidate(5)) == 6\n",
}
MBPP = {
    "prompt": "Write a function to add one.",
    "code": "def f(x):\n    return x + 1",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(f(1), 2)", "assert set([f(5)]) == {6}"],
}
SCRIPT = {"question": "Add one.", "input_output": json.dumps({"inputs": ["1\n", "5"], "outputs": ["2\n", "6"]})}


def block(code):
    return f"Here it is.\n\n```python\n{code}\n```\nDone."


def read_task(name, path):
    return make_task(name, data=path, parts=("all",)).part("all")


def lines(name):
    return [json.loads(line) for line in (SHARED / name).read_text().splitlines()]


# ---- rows


def test_a_function_to_complete_is_shown_and_judged_by_its_check():
    problem = Code.read(HUMANEVAL)
    assert problem.task == "code" and problem.prompt.startswith("Complete this Python function.\n\nimport math\n")
    assert problem.prompt.endswith("'''\n")  # a base model goes on from here with the body
    preamble, own = "import math\n\ndef helper(x):\n    return x\n\n", "def f(x): return 1"
    assert write_program(problem.tests, block(own)) == f"{preamble}\n{own}\n"
    assert accuracy(problem, block("def f(x): return helper(x) + math.floor(1.5)")) == 1.0
    assert accuracy(problem, block("def f(x): return x")) == 0.0


def test_helpers_of_the_prompt_are_the_judges_own():
    cheat = "def helper(x):\n    return {0: 2, 1: 6}.get(x, x)\ncalls = iter([2, 1])\ndef f(x): return next(calls)"
    assert accuracy(Code.read(HUMANEVAL), block(cheat)) == 0.0


def test_a_function_to_write_is_named_by_its_first_test_only():
    problem = Code.read(MBPP)
    assert "assert math.isclose(f(1), 2)" in problem.prompt and "f(5)" not in problem.prompt
    assert problem.tests.function == "f"
    assert code_accuracies([problem] * 2, [block(MBPP["code"]), block("def f(x): return 2")]) == [1.0, 0.0]


def test_a_function_named_like_a_builtin_is_the_programs():
    problem = Code.read({"text": "Add.", "test_list": ["assert sum(10, 15) == 25"]})
    assert accuracy(problem, block("def sum(a, b): return a + b")) == 1.0


def test_what_the_tests_import_is_not_the_function_asked_for():
    row = {"text": "Halve.", "test_imports": ["from math import isclose"], "test_list": ["assert isclose(f(1), 0.5)"]}
    problem = Code.read(row)
    assert problem.tests.function == "f"
    cheat = "def isclose(a, b): return True\ndef f(x): return 0"
    assert code_accuracies([problem] * 2, [block(cheat), block("def f(x): return x / 2")]) == [0.0, 1.0]


PAIRS = {"prompt": "Add one.", "io": [["1", "2"], ["5", "6"]]}


@pytest.mark.parametrize("row", [SCRIPT, SCRIPT | {"input_output": json.loads(SCRIPT["input_output"])}, PAIRS])
def test_a_script_is_judged_by_inputs_and_outputs(row):
    problem = Code.read(row)
    assert problem.prompt.startswith("Add one.\n\n") and "standard input" in problem.prompt
    assert code_accuracies([problem] * 2, [block("print(int(input()) + 1)"), block("print(2)")]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": 1}, "found the fields a"),
        (HUMANEVAL | {"prompt": "def g(x):"}, "holds 'def f'"),
        (HUMANEVAL | {"test": ""}, "non-empty text 'test'"),
        (MBPP | {"test_list": []}, "is empty"),
        (MBPP | {"test_list": [1]}, "'test_list'"),
        (MBPP | {"test_imports": "import math"}, "'test_imports'"),
        (SCRIPT | {"input_output": "no"}, "Expecting value"),
        (SCRIPT | {"input_output": {"inputs": ["1"], "outputs": []}}, "1 inputs"),
        (SCRIPT | {"input_output": {"inputs": [[1]], "outputs": [2], "fn_name": "f"}}, "of a script"),
        (SCRIPT | {"input_output": {"inputs": [], "outputs": []}}, "pairs of texts"),
        ({"prompt": "Add.", "io": [["1"]]}, "pairs of texts"),
        ({"prompt": "Add.", "io": 7}, "pairs of texts"),
    ],
)
def test_a_row_that_is_no_code_problem_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        Code.read(row)


def test_code_problems_are_a_task(tmp_path):
    path = tmp_path / "code.jsonl"
    path.write_text("\n".join(json.dumps(MBPP | {"prompt": f"Write {i}."}) for i in range(40)))
    task = make_task("code", data=path)
    assert {p.prompt for p in task.sample(20, 0, 0)}.isdisjoint(p.prompt for p in task.held_out(2))
    assert "```python" in format_prompt(task.held_out(1)[0], "chat")[0]["content"]


# ---- responses


def test_the_last_block_that_defines_the_function_is_taken():
    text = block("def f(x):\n    return 1") + block("def f(x):\n    return 2") + block("print(f(3))")
    assert extract_code(text, "f") == "def f(x):\n    return 2\n"
    assert extract_code(text) == "print(f(3))\n"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```\nwhich prints\n```\n1\n```", "x = 1\n"),
        ("```py\nx = 1\n```", "x = 1\n"),
        ("``` Python \nx = 1\n```", "x = 1\n"),
        ("1. so:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
        ("```python\n```", ""),
        ("<answer>\nx = 1\n</answer>", "x = 1"),
        ("<answer> </answer>", None),
        ("no code", None),
        ("", None),
        ("```", None),
        ("``` " * 20_000, None),
    ],
)
def test_a_block_is_found_however_it_is_fenced(text, code):
    assert extract_code(text) == code


MARKS = "python Python PYTHON py py3 python3 python3.11 ipython3 pycon {python} {.python} language-python python:a a.py"
MARKS = ["", "Python 3", 'python title="a.py"', "{.python .a}", "{python, echo=TRUE}", "lang='py'", *MARKS.split()]


@pytest.mark.parametrize("mark", MARKS)
def test_a_block_is_pythons_however_its_mark_says_so(mark):
    for fence in ("```", "~~~", "`````"):
        text = f"So:\n\n{fence}{mark}\nx = 1\n{fence}\nIt prints\n```text\n1\n```\nin\n```bash\npython add.py\n```"
        assert extract_code(text) == "x = 1\n"


@pytest.mark.parametrize("mark", ["text", "pytb", "python-output", "js", "json", "bash", "c++"])
def test_other_blocks_are_no_program(mark):
    assert extract_code(f"```{mark}\nx = 1\n```") is None


RIGHT = "def f(x):\n    return x + 1\n"


@pytest.mark.parametrize("mark", ["code", "text", "sage", "jupyter", "python_code", "tool_code", "#!/bin/python"])
def test_a_block_of_another_mark_counts_if_it_is_all_there_is_and_defines_the_function(mark):
    other = f"```{mark}\n{RIGHT}```\n"
    assert extract_code(f"So:\n{other}Run:\n```bash\npython f.py\n```\n", "f") == RIGHT
    assert extract_code(other + block("return x + 1"), "f") == "return x + 1\n"
    assert extract_code(other, "g") is None


@pytest.mark.parametrize("quotes", ['"""', "'''"])
@pytest.mark.parametrize("mark", ["", "python"])
@pytest.mark.parametrize("indent", ["", "    "])
def test_a_fence_within_a_string_of_the_program_ends_no_block(quotes, mark, indent):
    code = f"def f(x):\n    {quotes}It's\n{indent}```{mark}\n    f(1)\n{indent}```\n    {quotes}\n    return x + 1\n"
    assert extract_code(f"```python\n{code}```\nIt prints\n```\n2\n```", "f") == code


def test_a_string_that_never_ends_does_not_swallow_the_blocks_behind_it():
    doc = 'def f(x):\n    """Add one."""\n    return x + 1\n'
    assert extract_code(f'```python\n"""Add\n```\nNo:\n```python\n{doc}```\n', "f") == doc
    assert extract_code(f'```python\n# it\'s """\n{RIGHT}```\nIt prints\n```\n2\n```', "f") == f'# it\'s """\n{RIGHT}'


@pytest.mark.parametrize(
    "text",
    [
        RIGHT + "```",
        RIGHT + "```\n",
        RIGHT + "```\nThis adds one.",
        RIGHT + "```\nUse:\n```python\nprint(f(1))\n```",
        f"<answer>\n{RIGHT}```\n</answer>",
        RIGHT,
        RIGHT.replace("\n", "\r\n"),
        "\ufeff" + RIGHT,
        block("\ufeff" + RIGHT),
        f"Answer: ```python\n{RIGHT}```",
        f"```python\n{RIGHT}```python",
        f"```python\n{RIGHT[:-1]}```",
        f"```python\n{RIGHT}",
        block(RIGHT) + block("print(f(1))"),
        block(RIGHT) + block("from solution import f\nprint(f(1) == 2)"),
        block(RIGHT) + block(">>> f(1)\n2"),
        f"```\n{RIGHT}```\n" + block("print(f(1))"),
        block("def f(x):\n    return 0") + f"```python\nf(1)\n```python\n{RIGHT}```",
        block(">>> def f(x):\n...     return x + 1\n... \n>>> f(1)\n2").replace("```python", "```pycon"),
    ],
)
def test_the_function_is_found_wherever_the_block_begins_and_ends(text):
    assert extract_code(text, "f").strip().removesuffix("f(1)").strip() == RIGHT.strip()


@pytest.mark.parametrize(
    "code",
    [
        "f = lambda x: x + 1",
        "f: object = lambda x: x + 1",
        "g = f = lambda x: x + 1",
        "f, g = (lambda x: x + 1), 0",
        "class f:\n    pass",
        "async def f(x):\n    return x + 1",
        "from math import f",
        "from math import g, f",
        "from math import (\n    g,\n    f,\n)",
        "from math import g as f",
    ],
)
def test_a_function_is_defined_by_more_than_def(code):
    assert extract_code(block(code) + block("print(f(1) == 2)\nf == f"), "f") == code + "\n"
    assert extract_code(block(code) + block("def g(): pass"), "f") == code + "\n"


def test_code_is_found_in_bounded_time():
    started = time.process_time()
    units = ["```\n", "```python\n", "'''\n```\n", "import (f\n", "from a import (f,\n", "f,", "<answer>"]
    extract_code("```" + "{}" * 50_000)
    for unit in units:
        extract_code("```python\n" + unit * (100_000 // len(unit)), "f")
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "text",
    [
        "f = lambda x: x + 1",
        block("f = lambda x: helper(x) + 1") + block("print(f(1))"),
        block("from operator import neg\nf = lambda x: -neg(x) + 1"),
        "    return x + 1\n```\nThis adds one.",
        "    return x + 1\n\nSo:\n```python\nprint(f(1))\n```",
        " So:\n```python\n    return x + 1\n```",
        "    from math import floor as f\n    return x + f(1)\n",
        "   ```python\n   return x + 1\n   ```",
        block("    return x + 1").replace("\n", "\r\n"),
        block("def f(x):\n    return x + 1").replace("```", "~~~"),
        block("def f(x):\n    return x + 1"),
        "def f(x):\n    return x + 1\n",
        "<answer>def f(x):\n    return x + 1</answer>",
        "    return x + 1\n",
        "    return x + 1\n\nprint(f(3) / 0)\n",
        "    y = x\n\n    return y + 1\ndef g(x):",
        "y = x\n    return y + 1",
        "y = x\n\n    if y:\n        return y + 1\n    return 1\n",
        block("y = {\n    x\n}\nreturn y.pop() + 1"),
        block("y = (x +\n    1)\nreturn y"),
        block("for y in [x]:  # once\n    return y + 1"),
        block("from __future__ import annotations\nimport math\n\ndef f(x: Own) -> Own:\n    return helper(x) + 1"),
        block("    return x + 1"),
        block("from math import floor\ndef f(x):\n    return helper(x) + floor(1)"),
    ],
)
def test_a_response_may_give_the_function_or_its_body(text):
    assert accuracy(Code.read(HUMANEVAL), text) == 1.0


@pytest.mark.parametrize(
    "text", ["", "I do not know.", "```js\nf\n```", block("("), block("\0"), block("\ud800"), "```python"]
)
def test_a_response_without_a_program_earns_nothing(text):
    for row in (HUMANEVAL, MBPP, SCRIPT):
        assert accuracy(Code.read(row), text) == 0.0


def test_only_what_follows_the_thinking_counts():
    problem, right = Code.read(MBPP), block(MBPP["code"])
    assert accuracy(problem, f"<think>{block('def f(x): return 0')}</think>{right}") == 1.0
    assert accuracy(problem, f"<think>{right}</think>I am done.") == 0.0
    assert accuracy(problem, f"<think>{right}") == 0.0
    assert final_answer(problem, f"<think></think>{right}") == "def f(x):\n    return x + 1\n"


def test_what_cannot_be_judged_has_no_reward():
    assert accuracy(Problem("", "", "code"), block("x = 1")) is None
    assert accuracy(Problem("", "", "code", tests=CodeTests("assert (", "f")), block("f = abs")) is None
    assert code_accuracies([], []) == []


def test_a_program_of_a_script_stays_as_it_is():
    assert write_program(CodeTests((("", ""),)), block("x = 1")) == "x = 1\n"
    assert write_program(CodeTests((("", ""),)), "x = 1") is None


@shared
def test_extraction_agrees_with_other_projects_tests():
    checked = 0
    for case in lines("conformance/code_extract.jsonl"):
        if not case.get("dubious"):
            code = final_answer(Problem("", "", "code", tests=CodeTests(())), case["text"])
            assert (code and code.strip()) == case["expected"], case["id"]
            checked += 1
    assert checked > 9


@shared
@pytest.mark.parametrize("i", range(11))
def test_scripts_are_judged_as_by_other_projects(i):
    case = lines("conformance/code_stdin.jsonl")[i]
    verdict = run_tests(case["program"], case["io"], timeout_s=1 if "sleeps" in case.get("note", "") else 5)
    assert verdict.passed is case["expected_all_pass"], verdict


# ---- reference solutions and mutants of them


class Change(ast.NodeTransformer):
    """Change the n-th place where an operator, a comparison or a small number can become another."""

    swaps = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}
    swaps |= {ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}

    def __init__(self, n):
        self.left = n

    def generic_visit(self, node):
        node = super().generic_visit(node)
        if type(node) in self.swaps or isinstance(node, ast.Constant) and type(node.value) is int:
            self.left -= 1
            if self.left == -1:
                return ast.Constant(node.value + 1) if isinstance(node, ast.Constant) else self.swaps[type(node)]()
        return node


class ReturnNothing(ast.NodeTransformer):
    def visit_Return(self, node):
        return ast.Return(ast.Constant(None))


def mutant(source, change):
    """The changed source, None if nothing could be changed."""
    with warnings.catch_warnings(action="ignore"):  # some references have invalid escapes
        changed = ast.unparse(ast.fix_missing_locations(change.visit(ast.parse(source))))
        return None if changed == ast.unparse(ast.parse(source)) else changed


def solutions(name, step):
    """Problems of a set with their whole reference programs."""
    problems = read_task("code", SHARED / f"data/{name}.jsonl")[::step]
    return problems, [problem.tests.opening + problem.answer for problem in problems]


def check_solutions(name, step, timeout_s=5):
    problems, programs = solutions(name, step)
    verdicts = judge_programs(problems, list(map(block, programs)), timeout_s)
    failed = [(p.prompt[:60], v) for p, v in zip(problems, verdicts, strict=True) if not v.passed]
    assert not failed


def check_mutants(name, step, places, share):
    """Functions that return None fail, all of them; of those changed in one place at least the share given.

    A change may make no difference that the tests can show (a search goes further, equals take the other branch): what
    survives here must also survive where Python simply runs program and tests together.
    """
    problems, programs = solutions(name, step)
    nothing = [(p, mutant(source, ReturnNothing())) for p, source in zip(problems, programs, strict=True)]
    changed = [(p, mutant(s, Change(n))) for p, s in zip(problems, programs, strict=True) for n in range(places)]
    for mutants, least in ((nothing, 1), (changed, share)):
        mutants = [(problem, source) for problem, source in mutants if source]
        verdicts = judge_programs([p for p, _ in mutants], [block(source) for _, source in mutants], timeout_s=1)
        assert all(v.passed is not None for v in verdicts)
        survivors = [(p.tests, source) for (p, source), v in zip(mutants, verdicts, strict=True) if v.passed]
        print(f"{name}: {len(mutants) - len(survivors)} of {len(mutants)} mutants fail")
        assert len(survivors) <= (1 - least) * len(mutants)
        assert [source for tests, source in survivors if not plainly_passes(tests, source)] == []


def plainly_passes(tests, source):
    together = f"{source}\n{tests.tests}".replace(f"from program import {tests.function}\n", "")
    return subprocess.run([sys.executable, "-I", "-S", "-c", together], capture_output=True, timeout=20).returncode == 0


@shared
@pytest.mark.parametrize("name", ["HumanEval", "mbpp_sanitized"])
def test_reference_solutions_pass(name):
    check_solutions(name, 10)


@shared
@pytest.mark.parametrize("name", ["HumanEval", "mbpp_sanitized"])
def test_mutated_solutions_fail(name):
    check_mutants(name, 15, 1, 0.7)


@shared
@pytest.mark.slow
@pytest.mark.parametrize("name", ["HumanEval", "mbpp_sanitized"])
def test_all_reference_solutions_pass(name):
    check_solutions(name, 1, timeout_s=30)  # one of MBPP works for 5 s


@shared
@pytest.mark.slow
@pytest.mark.parametrize("name", ["HumanEval", "mbpp_sanitized"])
def test_most_mutated_solutions_fail(name):
    check_mutants(name, 1, 3, 0.8)


@shared
def test_cases_of_the_field_pass():
    cases = [case["input"] for case in lines("field/answers.jsonl") if case["input"]["call"] == "coding.judge_programs"]
    problems = [Problem("", "", "code", tests=read_row(case["row"])[2]) for case in cases]
    verdicts = judge_programs(problems, [case["text"] for case in cases])
    assert (
        len(cases) > 10
        and [case["text"] for case, verdict in zip(cases, verdicts, strict=True) if not verdict.passed] == []
    )


@shared
def test_programs_of_the_field_earn_what_they_should_and_leave_the_next_its_right():
    cases = [case for case in lines("field/programs.jsonl") if "tests" in case]
    for case in cases:
        tests = [test if isinstance(test, str) else list(map(tuple, test)) for test in case["tests"]]
        started = time.monotonic()
        passed = [verdict.passed for verdict in run_many(list(zip(case["program"], tests, strict=True)), 1, workers=1)]
        assert time.monotonic() - started < 5, case["name"]
        assert passed == [case["family"] != "new_attack", True][: len(passed)], case["name"]
    assert len(cases) > 6
