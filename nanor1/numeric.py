r"""The value of a parsed scalar: exact for as long as it is rational, otherwise to 100 digits.

An expression with variables is evaluated at four fixed pseudo-random points (Schwartz 1980, Zippel 1979); nothing is
simplified symbolically, and nothing reaches `eval` or sympy. The size of every number is bounded before and after each
step, so no timer is needed and limits hold in any thread.
"""

import functools
import math
import operator
import random
import threading
from collections.abc import Callable
from fractions import Fraction

import mpmath

from nanor1.latex import FUNCTIONS, SCALARS, VARIABLES, contains

MAX_BITS = 4096  # of a numerator or denominator
MAX_MAGNITUDE = 166  # binary exponent, about 1e50, of an irrational value; rounding puts tan(pi/2) near 1e100

_MP = mpmath.MPContext()
_MP.dps = 100
_MP_LOCK = threading.Lock()  # mpmath fills its caches of constants without one
_CONSTANTS = {"pi": +_MP.pi, "e": +_MP.e, "i": _MP.mpc(0, 1)}


class _Undecided(Exception):
    """No value: undefined here, or past a limit."""


def samples(a: tuple, b: tuple) -> list[tuple]:
    """Return the values of two scalars at one point, or four with variables; [] where fewer than half are defined.

    A value is a Fraction for as long as it is rational, else a number of mpmath.
    """
    n_points = 4 if contains((a, b), VARIABLES) else 1
    found = []
    for point in range(n_points):
        try:
            with _MP_LOCK:
                found.append((_value(a, point), _value(b, point)))
        except (_Undecided, ArithmeticError, ValueError):
            continue
    return found if 2 * len(found) >= n_points else []


def is_close(a, b) -> bool:
    """Return whether two values are equal: exactly if rational, else to 50 of their 100 digits."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = real(a), real(b)
    return bool(abs(a - b) <= max(abs(a), abs(b)) * _MP.mpf(10) ** -50 + _MP.mpf(10) ** -80)


def real(value):
    """Return a value as a number of mpmath."""
    return _MP.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _value(node: tuple, point: int):
    kind, *parts = node
    if kind == "num":
        return parts[0]
    if kind == "const":
        return _CONSTANTS[parts[0]]
    if kind in VARIABLES:
        return _variable("".join(map(str, parts)), point)
    if kind not in SCALARS:
        raise _Undecided
    return _bounded(_OPERATIONS[kind](*[_value(part, point) for part in parts]))


def _variable(name: str, point: int) -> Fraction:
    """Between 1/5 and 2; positive for every name at point 0, of both signs at the others."""
    dice = random.Random(f"{point} {name}")
    size = Fraction(dice.randrange(200, 2000), 1009)
    return -size if point and dice.random() < 0.5 else size


def _bounded(value):
    if isinstance(value, Fraction):
        is_within = _n_bits(value) <= MAX_BITS
    else:
        is_within = _MP.isfinite(value) and _MP.mag(value) <= MAX_MAGNITUDE
    if not is_within:
        raise _Undecided
    return value


def _n_bits(value: Fraction) -> int:
    return max(part.bit_length() for part in value.as_integer_ratio())


def _folded(operate: Callable) -> Callable:
    def step(a, b):
        are_rational = isinstance(a, Fraction) and isinstance(b, Fraction)
        return _bounded(operate(a, b) if are_rational else operate(real(a), real(b)))

    return lambda *values: functools.reduce(step, values)


def _power(base, exponent):
    """Exact where rational; the odd root of a negative rational is the real one."""
    if not (isinstance(base, Fraction) and isinstance(exponent, Fraction)):
        return real(base) ** _bounded(real(exponent))
    if abs(exponent) * _n_bits(base) > MAX_BITS:
        raise _Undecided
    times, degree = exponent.as_integer_ratio()
    if base < 0 and degree % 2 and degree > 1:
        return (-1) ** times * _power(-base, exponent)
    roots = [_exact_root(part, degree) for part in base.as_integer_ratio()]
    return real(base) ** real(exponent) if None in roots else Fraction(*roots) ** times


def _exact_root(value: int, degree: int) -> int | None:
    root = value if degree == 1 else int(_MP.nint(abs(_MP.mpf(value)) ** (_MP.mpf(1) / degree)))
    return root if root**degree == value else None


def _factorial(value) -> Fraction:
    """Of n too, which is no integer at the points where it is sampled: the gamma function at n + 1."""
    if _is_index(value, 450):
        return Fraction(math.factorial(int(value)))
    if abs(value) > 100:
        raise _Undecided
    return _MP.gamma(real(value) + 1)


def _is_index(value, largest: int) -> bool:
    return isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= largest


def _binomial(n, k):
    """n (n - 1) ... (n - k + 1) / k! for a small k, in whole numbers Pascal's; else by the gamma function."""
    if not _is_index(k, 450):
        return real(_factorial(n)) / real(_factorial(k)) / real(_factorial(real(n) - real(k)))
    if _is_index(n, MAX_BITS):
        return Fraction(math.comb(int(n), int(k)))
    return _folded(operator.mul)(Fraction(1), *[(n - i) / (i + 1) for i in range(int(k))])


def _function(name: str) -> Callable:
    return lambda x: getattr(_MP, name)(real(x))


_OPERATIONS = {
    "add": _folded(operator.add),
    "mul": _folded(operator.mul),
    "pow": _power,
    "neg": operator.neg,
    "inv": lambda x: 1 / x,
    "abs": abs,
    "percent": lambda x: x / 100,
    "deg": lambda x: real(x) * _MP.pi / 180,
    "fact": _factorial,
    "binom": _binomial,
} | {name: _function(name) for name in FUNCTIONS.values()}
