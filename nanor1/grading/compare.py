r"""Is this answer that answer? Compare two answers as mathematics.

`math_equal` has both answers read by `latex` and compares them part by part; scalars by the exact or 100-digit values
of `numeric`. What they cannot read is compared as a string. `extract_answer` (find.py) finds the answer in a text.

Choices, where tastes differ:
- Decimals are exact: 0.33 is not 1/3, but `\frac{1}{3} \approx 0.33` equals both, as they are within 5%, and
  0.\overline{3} and 0.333... repeat. Unevaluated arithmetic counts: `2 \cdot 3` equals 6.
- p% equals p/100, and p as well, since a unit may be left out on one side, also the `per hour` of money; two different
  known ones are unequal, but lengths, times, weights, volumes and money convert. Plain `60 m` is a product, or metres.
- `3 hours 20 minutes` is one quantity; without a unit it is 200 or 10/3. 2 dozen are 24, or 2; k and M are variables.
- Words before a value that end in a colon or a verb such as "is" or "makes" add nothing, unless they hedge ("at least",
  "not", "half of"); hedged values (18+, "18 or more") equal no number.
- `x = 5` equals `5`, and `x \in [0, 1]` equals `[0, 1]`, where one side is only a name. A number may be said of two
  names or more as well, `m + n = 45`, or of |z| or cos A; not of the unknowns x, y, z, nor is 9 said of n in `3n = 9`.
- Sets and lists without brackets have no order; tuples, intervals and matrices have. `[0, 1)` is not `(0, 1)`.
- Ratios are reduced, but 12:30 and 6:15, two digits at the end, may be times, and `2 to 4` a range.
- A choice with its text or value, `(B) 17` or `B: heat flows`, equals B, and 17 too. Two of them need the same letter,
  and the same value where both give one. `A = 5` is no choice.
- Text is compared without case or a leading article. `\log` is the natural logarithm, `i` and `e` are constants.
- The one asymmetry: a gold with a base, `12_5`, is met by `12` (not by `7`); a gold `12` is not met by `12_5`.
"""

import functools
import itertools
import math
import operator
import re
from fractions import Fraction

from nanor1.grading import latex
from nanor1.grading.find import labelled, unmarked
from nanor1.grading.numeric import is_close, real, samples

_INTEGER = re.compile(r"-?[0-9]{1,100}")
_CHOICES = re.compile(r"[\s({]*[A-J](?:(?:[\s,(){}]|and)*[A-J])+[\s)}]*")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}
_ORDERS = {"<": operator.lt, ">": operator.gt, r"\le": operator.lt, r"\ge": operator.gt, r"\ne": operator.ne}
_SETS = {"bracket", "union", "without", "list", "relation"}  # that may hold numbers
_INFINITE = real(Fraction(2**5000))  # beyond what numeric.py counts to


def math_equal(answer: str | None, gold: str) -> bool:
    r"""Return whether an answer means the same as the gold answer; never raises, and False for an empty answer.

    Either may be bare, between dollars, in a `\boxed{}` or at the end of a solution that boxes it or ends in `####`.
    The module's docstring lists what counts as the same.

    >>> math_equal(r"\frac{\sqrt{8}}{2}", "sqrt(2)"), math_equal("[0, 1)", "(0, 1)")
    (True, False)
    """
    if answer is None:
        return False
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):  # most of what training grades
        return int(answer) == int(gold)
    answer, gold = unmarked(answer), unmarked(gold)
    if not answer or not gold:
        return False
    if answer == gold or max(len(answer), len(gold)) > latex.MAX_CHARS:
        return answer == gold
    (letter, content), (gold_letter, gold_content) = labelled(answer), labelled(gold)
    if letter and gold_letter:
        are_values = all(latex.parse(text) and not latex.is_prose(text) for text in (content, gold_content))
        return letter == gold_letter and (not are_values or _same_content(content, gold_content))
    return _same_content(answer, gold) or ((letter or gold_letter) != "" and _same_content(content, gold_content))


def is_worked_out(answer: str) -> bool:
    """Return whether an answer is no sum that is left to do: 18, $18 and 2 1/2 are none, 47 + 85 and 36/2 are."""
    sides = labelled(unmarked(answer))[1].split(r"\approx")
    nodes = [latex.parse(latex.spell_units(side)) for side in sides]
    return all(latex.is_name(node) or _is_worked_out(node) for node in nodes)


def _is_worked_out(node: tuple | None) -> bool:
    match node:
        case ("relation", *_, value) | ("unit", value, _) | ("neg" | "percent" | "deg", value):
            return _is_worked_out(value)
        case ("mul", ("num", a), ("inv", ("num", b))):  # a fraction in lowest terms
            return a.denominator == b.denominator == math.gcd(int(a), int(b)) == 1
        case ("list" | "set" | "compound", parts):
            return all(map(_is_worked_out, parts))
        case ("add", ("num", whole), ("mul", ("num", a), ("inv", ("num", b)))):  # mixed
            return whole.denominator == 1 and 0 < a < b
    return node is None or node[0] == "num" or node[0] not in latex.SCALARS


def _exact_and_rounded(text: str) -> list[str]:
    r"""The two sides of `\frac{1}{3} \approx 0.33`; else, or where they are not within 5%, the last."""
    sides = [side for side in text.split(r"\approx") if side.strip() and not latex.is_name(latex.parse(side))]
    nodes = [latex.parse(side) for side in sides]
    values = samples(*map(_meaning, nodes)) if len(nodes) == 2 and all(nodes) else []
    are_close = values and all(abs(real(a) - real(b)) <= 0.05 * abs(real(a)) for a, b in values)
    return sides if are_close else sides[-1:]


def _same_content(answer: str, gold: str) -> bool:
    if r"\approx" in answer + gold:
        sides = [_exact_and_rounded(text) for text in (answer, gold)]
        return any(_same_content(a, b) for a in sides[0] for b in sides[1])
    choices = [_CHOICES.fullmatch(latex.unstyled(text)) and re.findall("[A-J]", text) for text in (answer, gold)]
    if all(choices):  # A, C is AC
        return sorted(choices[0]) == sorted(choices[1])
    words = [latex.plain_words(text) for text in (answer, gold)]
    if latex.is_prose(words[0]) and words[0] == words[1]:
        return True
    if latex.is_prose(answer) or latex.is_prose(gold):
        return False
    are_lists = "," in answer and "," in gold and not re.search(r",\s*0\d", answer + gold)
    spelled = latex.spell_units(answer), latex.spell_units(gold)
    # beside a list "100,200" may be one too, "2,048" not; "60 m" is a product, or else metres
    readings = [(answer, gold, True)] + [(answer, gold, False)] * are_lists + [(*spelled, True)]
    nodes = [(latex.parse(a, grouped), latex.parse(b, grouped)) for a, b, grouped in dict.fromkeys(readings)]
    return any(
        _same(a, b) or (b[0] == "base" and a == latex.number(b[1])) for a, b in nodes if a is not None and b is not None
    )


def _same(a: tuple, b: tuple) -> bool:
    """Whether two parsed answers, or parts of them, are the same."""
    kinds = a[0], b[0]
    if a == b or (kinds == ("relation", "relation") and _same_relation(a, b)):
        return True
    if "compound" in kinds:
        forms = [node[1] if node[0] == "compound" else (node,) for node in (a, b)]
        return any(_same(form, other) for form in forms[0] for other in forms[1])
    if set(kinds) <= latex.SCALARS | {"unit"}:
        return _same_quantity(a, b)
    if _same_structure(a, b) or _same_structure(b, a):
        return True
    if kinds != ("bracket", "bracket") and {*kinds} <= _SETS and _same_numbers(a, b):
        return True
    meanings = _meaning(a), _meaning(b)
    return meanings != (a, b) and not _are_unlike_equations(a, b) and _same(*meanings)


def _same_structure(a: tuple, b: tuple) -> bool:
    match a, b:
        case ("bracket", opening, items, closing), ("bracket", other_opening, others, other_closing):
            return (opening, closing) == (other_opening, other_closing) and _same_items(items, others)
        case (("time", items), ("time", others)) | (("range", items), ("range" | "ratio", others)):
            return _same_items(items, others)
        case ("ratio", (*items, last)), ("ratio" | "time", (*others, other_last)):
            shares = [[("mul", x, ("inv", end)) for x in xs] for xs, end in ((items, last), (others, other_last))]
            return _same_items(*shares)
        case ("matrix", rows), ("matrix", others):
            return len(rows) == len(others) and all(map(_same_items, rows, others))
        case (("list" | "set", items), ("list" | "set", others)) | (("union", items), ("union", others)):
            left = list(others)
            for item in items:  # each is struck out against one equal item of the others
                found = next((at for at, other in enumerate(left) if _same(item, other)), None)
                if found is None:
                    return False
                del left[found]
            return not left
        case ("list", items), ("bracket", "(", others, ")"):  # x = 3, y = 2
            values = latex.assigned_values(items)
            return values is not None and _same_items(values, others)
        case ("list" | "set", items), (kind, *_) if kind in latex.SCALARS and items:  # one value in several forms
            return all(_same(item, b) for item in items)
    return False


def _same_items(items: tuple, others: tuple) -> bool:
    return len(items) == len(others) and all(map(_same, items, others))


def _same_quantity(a: tuple, b: tuple) -> bool:
    (a, unit), (b, other_unit) = [
        node[1:] if node[0] == "unit" else (node, node[0] if node[0] == "percent" else "") for node in (a, b)
    ]
    if (unit, other_unit) in (("cent", ""), ("", "cent")):  # 75 cents are 75, or 0.75
        cents, dollars = (a, b) if unit else (b, a)
        if _same_scalar(("mul", cents, latex.number("0.01")), dollars):
            return True
    if factor := latex.conversion(unit, other_unit):
        a = ("mul", a, ("num", factor))
    elif latex.are_unlike(unit, other_unit):
        return False
    if a[0] != "percent" and b[0] == "percent":
        a, b = b, a
    as_written = a[0] == "percent" != b[0] and _same_scalar(a[1], b)  # 45% is 45 too
    return as_written or _same_scalar(a, b)


def _same_scalar(a: tuple, b: tuple) -> bool:
    values = samples(a, b)
    return bool(values) and all(is_close(x, y) for x, y in values)


# ---------------------------------------------------------------- relations


def _same_relation(a: tuple, b: tuple) -> bool:
    """Whether left minus right is the same, but for a constant factor that keeps the direction."""
    are_scalar = len(a) == len(b) == 4 and {side[0] for side in (*a[1::2], *b[1::2])} <= latex.SCALARS
    if not are_scalar or _is_constant(a):
        return len(a) == len(b) and a[2::2] == b[2::2] and all(map(_same, a[1::2], b[1::2]))
    if b[2] not in (a[2], _FLIPPED.get(a[2])):
        return False
    pairs = samples(*(("add", left, ("neg", right)) for _, left, _, right in (a, b)))
    ratios = [real(x) / real(y) for x, y in pairs if not is_close(x, 0) and not is_close(y, 0)]
    if len(ratios) < 2 or not all(is_close(ratio, ratios[0]) for ratio in ratios):
        return False
    return a[2] in ("=", r"\ne") or (ratios[0].imag == 0 and (ratios[0].real > 0) == (a[2] == b[2]))


def _are_unlike_equations(a: tuple, b: tuple) -> bool:
    """Equations that cannot be replaced by their values: x = 9 and y = 9, or 0 = 0 and 20 = 0."""
    if a[0] != b[0] or a[2] != "=" or b[2] != "=":
        return False
    subjects = [latex.variables(tuple(filter(_is_subject, relation[1::2]))) for relation in (a, b)]
    return _is_constant((a, b)) or subjects[0] != subjects[1]


def _is_subject(node: tuple) -> bool:
    """Whether a value may be said of it: a name, or a measure of names that are no unknowns, as m + n, |z| or cos A."""
    if latex.is_name(node):
        return True
    kind, names = node[0], latex.variables(node)
    if kind not in latex.SCALARS or any(("sym", unknown) in names for unknown in ("xy" if kind == "abs" else "xyz")):
        return False
    return len(names) > 1 or (len(names) == 1 and kind in {"abs", *latex.FUNCTIONS.values()})


def _meaning(node: tuple) -> tuple:
    """What a relation says about its name: `x = 5` says 5, `x in S` says S; other nodes as they are."""
    if node[0] != "relation":
        return node
    sides, signs = node[1::2], {*node[2::2]}
    if signs == {r"\in"} and len(sides) == 2 and latex.is_name(sides[0]):
        return sides[1]
    are_choices = all(side[0] == "sym" and side[1].isupper() for side in sides)  # A = B names two
    if signs != {"="} or are_choices:
        return node
    is_turned = latex.is_name(sides[-1]) or (_is_constant(sides[0]) and not _is_constant(sides[-1]))
    *said, value = sides[::-1] if is_turned else sides
    if _is_constant(value):
        is_said = value[0] in ("matrix", "bracket") or any(map(_is_subject, said)) or all(map(_is_constant, said))
    elif {side[0] for side in sides} <= latex.SCALARS and all(_same_scalar(side, value) for side in said):
        is_said = True  # (x + 1)^2 = x^2 + 2x + 1
    else:
        has_name = any(map(latex.is_name, said))
        is_said = has_name and all(latex.is_name(side) or _is_constant(side) or _same(side, value) for side in said)
    return value if is_said else node


def _is_constant(node: tuple) -> bool:
    return not latex.variables(node)


# ---------------------------------------------------------------- sets of real numbers


def _same_numbers(a: tuple, b: tuple) -> bool:
    """Whether two sets of real numbers have in common what they hold of their ends, and between and beyond these."""
    ends = [end for node in (a, b) for end in _ends(node)]
    ends = sorted(end for end in {*ends, *(-end for end in ends), real(Fraction(0))} if abs(end) < _INFINITE)
    points = [ends[0] - 1, *ends, ends[-1] + 1]
    points += [(low + high) / 2 for low, high in itertools.pairwise(ends)]
    try:
        return len(ends) <= 40 and all(_has(a, point) == _has(b, point) for point in points)
    except ValueError:
        return False


def _has(node: tuple, x) -> bool:
    r"""Whether x is in an interval, a union, a set without points, or what relations say: `1 < x`, `|x| \ne 1`."""
    match node:
        case ("bracket", opening, (low, high), closing):
            signs = ["<" if end in "()" else r"\le" for end in (opening, closing)]
            return _has(("relation", low, signs[0], ("sym", "x"), signs[1], high), x)
        case ("relation", name, r"\in", whole) if latex.is_name(name):
            return _has(whole, x)
        case ("relation", *_) if {*node[2::2]} <= _ORDERS.keys() and [*map(_end, node[1::2])].count(None) == 1:
            name = next(side for side in node[1::2] if _end(side) is None)
            is_magnitude = name[0] == "abs"
            if latex.is_name(name[1] if is_magnitude else name):
                values = [_end(side) if side != name else abs(x) if is_magnitude else x for side in node[1::2]]
                return all(
                    sign in (r"\le", r"\ge") if is_close(a, b) else _ORDERS[sign](a, b)
                    for a, sign, b in zip(values, node[2::2], values[1:], strict=False)
                )
        case ("without", whole, ("set", points)):
            return _has(whole, x) and all(_has(("relation", ("sym", "x"), r"\ne", point), x) for point in points)
        case ("union", parts) | ("list", (("relation", *_), *_) as parts) if len(latex.variables(parts)) <= 1:
            n_holding = sum(_has(part, x) for part in parts)  # pieces that are said side by side do not overlap
            return n_holding == (len(parts) if any(part[2:3] == (r"\ne",) for part in parts) else 1)
    raise ValueError(f"{node[0]} is no set of real numbers")


@functools.lru_cache(1000)
def _end(node: tuple):
    """The value of a real number or an infinite end, None for anything else."""
    if node in (latex.INFINITY, ("neg", latex.INFINITY)):
        return _INFINITE if node == latex.INFINITY else -_INFINITE
    values = [real(value) for value, _ in samples(node, node)] if _is_constant(node) else []
    return values[0].real if values and values[0].imag == 0 else None


def _ends(node) -> list:
    if not isinstance(node, tuple):
        return []
    return [_end(node)] if _end(node) is not None else [end for part in node for end in _ends(part)]
