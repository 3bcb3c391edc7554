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
from fractions import Fraction

import mpmath

from nanor1.grading.latex import FUNCTIONS, variables

MAX_BITS = 4096  # of a numerator or denominator
MAX_MAGNITUDE = 166  # binary exponent, about 1e50, of an irrational value; rounding puts tan(pi/2) near 1e100

_MP = mpmath.MPContext()
_MP.dps = 100
_MP_LOCK = threading.Lock()  # mpmath fills its caches of constants without one


def samples(a: tuple, b: tuple) -> list[tuple]:
    """Return the values of two scalars at one point, or four with variables; [] where fewer than half are defined.

    A value is a Fraction for as long as it is rational, else a number of mpmath.
    """
    n_points = 4 if variables((a, b)) else 1
    found = []
    for point in range(n_points):
        try:
            with _MP_LOCK:
                found.append((_value(a, point), _value(b, point)))
        except (ArithmeticError, ValueError):  # undefined here, or past a limit
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
        return {"pi": +_MP.pi, "e": +_MP.e, "i": _MP.mpc(0, 1)}[parts[0]]
    if kind in ("sym", "call"):  # between 1/5 and 2; positive for every name at point 0, of both signs at the others
        dice = random.Random(f"{point} {''.join(map(str, parts))}")
        size = Fraction(dice.randrange(200, 2000), 1009)
        return -size if point and dice.random() < 0.5 else size
    if kind not in _OPERATIONS:
        raise ValueError(f"{kind} has no value")
    values = [_value(part, point) for part in parts]
    are_exact = all(isinstance(value, Fraction) for value in values)
    return _bounded(_OPERATIONS[kind](*(values if are_exact else map(real, values))))


def _bounded(value):
    if isinstance(value, Fraction):
        is_within = _n_bits(value) <= MAX_BITS
    else:
        is_within = _MP.isfinite(value) and _MP.mag(value) <= MAX_MAGNITUDE
    if not is_within:
        raise OverflowError
    return value


def _n_bits(value: Fraction) -> int:
    return max(part.bit_length() for part in value.as_integer_ratio())


def _power(base, exponent):
    """Exact where rational; the odd root of a negative rational is the real one."""
    if not isinstance(base, Fraction):
        return base**exponent
    if abs(exponent) * _n_bits(base) > MAX_BITS:
        raise OverflowError
    times, degree = exponent.as_integer_ratio()
    if base < 0 and degree % 2 and degree > 1:
        return (-1) ** times * _power(-base, exponent)
    parts = base.as_integer_ratio()
    roots = [part if degree == 1 else int(_MP.nint(abs(_MP.mpf(part)) ** (_MP.mpf(1) / degree))) for part in parts]
    is_exact = all(root**degree == part for root, part in zip(roots, parts, strict=True))
    return Fraction(*roots) ** times if is_exact else real(base) ** real(exponent)


def _factorial(value):
    """Of n too, which is no integer at the points where it is sampled: the gamma function at n + 1."""
    if abs(value) > 450:
        raise OverflowError
    is_index = isinstance(value, Fraction) and value.denominator == 1 and value >= 0
    return Fraction(math.factorial(int(value))) if is_index else _MP.factorial(real(value))


def _binomial(n, k):
    """n (n - 1) ... (n - k + 1) / k! for a whole k, which is exact; else by the gamma function."""
    if isinstance(k, Fraction) and k.denominator == 1 and 0 <= k <= 450:
        return _product(Fraction(1), *[(n - i) / (i + 1) for i in range(int(k))])
    return real(_factorial(n)) / real(_factorial(k)) / real(_factorial(n - k))


def _product(*factors):
    return functools.reduce(lambda a, b: _bounded(a * b), factors)


_OPERATIONS = {
    "add": lambda *terms: functools.reduce(lambda a, b: _bounded(a + b), terms),
    "mul": _product,
    "pow": _power,
    "neg": operator.neg,
    "inv": lambda x: 1 / x,
    "abs": abs,
    "percent": lambda x: x / 100,
    "deg": lambda x: real(x) * _MP.pi / 180,
    "fact": _factorial,
    "binom": _binomial,
} | {name: lambda x, name=name: getattr(_MP, name)(real(x)) for name in FUNCTIONS.values()}
