"""Countdown's mathematics: expressions worked out from left to right, and the checker of an answer.

Source: the game as TinyZero plays it. What the model wrote is parsed, never run.
"""

import ast
import operator
import re
from fractions import Fraction

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


_EXPRESSION = re.compile(r"[-+*/() 0-9]{1,256}")
_NUMBER = re.compile(r"[0-9]+")
_MAX_DEPTH = 64
# Division is exact: with floats and a tolerance 300001 / 300000 would pass for 1.
_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: Fraction}


def check_countdown(equation: str, nums: tuple[int, ...] | list[int], target: int) -> bool:
    """Whether the expression uses each given number exactly once and has exactly the value `target`.

    One line of integers, + - * /, signs and parentheses; at most 256 characters between the outer blanks and 64 levels.
    Everything else is False, and no text raises. Refused by choice: an equals sign,
    a number left out, leading zeros (05), 2(3), LaTeX, other scripts' digits and operators, 5000 parentheses.

    >>> check_countdown("5 * (5 - 1 / 5)", [1, 5, 5, 5], 24)
    True
    """
    # Length, characters and numbers are settled before the parser sees anything: that keeps rubbish cheap.
    if countdown_numbers(equation) != sorted(nums):
        return False
    value = countdown_value(equation)
    return value is not None and value == target


def countdown_numbers(equation: str) -> list[int] | None:
    """The integers of an expression, sorted; None for a text that is too long or has characters of no expression.

    >>> countdown_numbers("3 + 7 + 12"), countdown_numbers("x + 1")
    ([3, 7, 12], None)
    """
    expression = equation.strip()
    return sorted(map(int, _NUMBER.findall(expression))) if _EXPRESSION.fullmatch(expression) else None


def countdown_value(equation: str) -> int | Fraction | None:
    """The exact value of an expression such as `check_countdown` takes; None for all that it refuses.

    >>> countdown_value("5 - 1 / 5"), countdown_value("2 ** 3")
    (Fraction(24, 5), None)
    """
    expression = equation.strip()
    if not _EXPRESSION.fullmatch(expression):
        return None
    try:
        return _value(ast.parse(expression, mode="eval").body, _MAX_DEPTH)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, depth: int) -> int | Fraction:
    """The exact value of a parsed expression; ValueError for any node that countdown does not know."""
    if depth == 0:
        raise ValueError("nested too deep")
    if isinstance(node, ast.Constant):
        return node.value  # an int: letters, dots and quotes never reached the parser
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, depth - 1)
        return -value if isinstance(node.op, ast.USub) else value  # ~ and not never reached the parser
    combine = _BINARY.get(type(getattr(node, "op", None)))
    if combine is None:
        raise ValueError("not an expression")
    return combine(_value(node.left, depth - 1), _value(node.right, depth - 1))
