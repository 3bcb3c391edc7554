r"""Is this answer that answer? Find the final answer in a response, and compare two answers as mathematics.

`extract_answer` looks, after `</think>`, for `\boxed{}`, an `<answer>` block, GSM8K's `####`, a phrase such as "the
answer is", and falls back on what ends the text. `math_equal` has both answers read by `latex` and compares them part
by part; scalars by the exact or 100-digit values of `numeric`. What they cannot read is compared as a string.

Choices, where tastes differ:
- Decimals are exact: 0.33 is not 1/3. A percentage p% is p/100; it equals p as well, since a unit may be left out.
- A unit or currency missing on one side is forgiven; two different known units (cm, m) are not, and none is converted.
- `x = 5` equals `5`, and `x \in [0, 1]` equals `[0, 1]`, where one side is only a name.
- Sets and lists without brackets have no order; tuples, intervals and matrices have. `[0, 1)` is not `(0, 1)`.
- Text and a single letter are compared without case. `\log` is the natural logarithm, `i` and `e` are constants.
- The one asymmetry: a gold with a base, `12_5`, is met by `12` (not by `7`); a gold `12` is not met by `12_5`.
- Unevaluated arithmetic counts: `2 \cdot 3` equals 6. A task that forbids this has to look at the answer's form.
"""

import re

from nanor1 import latex
from nanor1.numeric import is_close, real, samples

MAX_TAIL_CHARS = 50_000  # of a response, from its end, that are searched for an answer
MAX_BOXES = 16

# ---------------------------------------------------------------- extraction

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BETWEEN_BOXES = re.compile(r"(?:[\s$,;&.]|\\[,;()\[\]]|\\q?quad|\\(?:text|mbox)\{\s*(?:and|or),?\s*\}|and|or)*")
_VERB = r"\b(?:is|are|would be|will be|should be)\b"
_PHRASE = re.compile(rf"(?:\banswer|答案)[\s*_]*(?:{_VERB}|[:=：为是]|(?=[$\\]))[\s*_:：]*", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?:(?<![\w.)}])-\s?)?(?<![\w.{])(?:\\?\$\s?-?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,400}|(?=\.\d))(?:\.\d{1,400})?"
    r"(?:\s?/\s?\d{1,400}(?!\d|\.\d))?(?:\s?\\?%)?|\\[dt]?frac\{-?\d{1,400}\}\{\d{1,400}\}",
    re.ASCII,
)
_CHOICE = re.compile(r"(?:(?:choice|option|answer)\s*)?[\s({\[*:]*([A-J])[\s)}\]*.:,]*", re.IGNORECASE)
_CHOICE_FIRST = re.compile(
    r"[\s*({\[]*([A-J])[*)}\]]*(?:[.,:;)}\]。，、：]|\s+(?:because|since|as|is)\b|\s*$|(?=[一-鿿]))"
)
_CHOICE_INSIDE = re.compile(
    r"\(([A-J])\)|(?<![\w'])([A-J])(?= (?:is|seems|looks) (?:the )?(?:correct|right|true|answer))"
)
_CHOICE_ALONE = re.compile(r"(?<![\w'\\$^{])([A-J])(?=[.,;](?:\s|$)|\s*$)")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def extract_answer(text: str) -> str | None:
    r"""Return the final answer of a response as it is written there, or None where there is none.

    Only text after the last `</think>` counts; thinking that never closes leaves no answer. Of several boxes the last
    is the answer, unless only "and", "or" or commas stand between them: then it is their list. Only the last
    `MAX_TAIL_CHARS` characters are read.

    >>> extract_answer(r"<think>so \boxed{1}?</think> It is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    visible = text.rpartition("</think>")[2]
    if "<think>" in visible:
        return None
    visible = visible[-MAX_TAIL_CHARS:]
    if boxed := last_boxed(visible):
        return boxed
    _, opened, block = visible.rpartition("</answer>")[0].rpartition("<answer>")
    if opened:
        return _narrow(block) or block.strip() or None
    _, marker, rest = visible.rpartition("####")
    if marker:
        line = _sentence(rest.strip() + "\n", stop="\n")
        return _narrow(line) or latex.trim(line) or None
    phrases = list(_PHRASE.finditer(visible))
    found = _narrow(_sentence(visible[phrases[-1].end() :])) if phrases else None
    return found or _fall_back(visible)


def last_boxed(text: str) -> str | None:
    r"""Return the contents of the last closed `\boxed{...}`, `\fbox{...}` or `\boxed 5`, or None.

    Boxes joined only by "and", "or" or commas come back as one list. A box cut off before its brace closes is ignored.

    >>> last_boxed(r"\boxed{1}, so \boxed{2} and \boxed{3}")
    '2, 3'
    """
    contents, after = [], None
    for box in reversed(list(_BOX.finditer(text))[-MAX_BOXES:]):
        end, inside = _box_contents(text, box.end())
        if inside is None or (after is not None and end > after):  # cut off, or around the box just read
            continue
        if after is not None and not _BETWEEN_BOXES.fullmatch(text, end, after):
            break
        after = box.start()
        contents.insert(0, inside)
    return ", ".join(filter(None, contents)) or None


def _box_contents(text: str, at: int) -> tuple[int, str | None]:
    bare = re.compile(r" *([^\s${}\\]+)").match(text, at)
    if bare:
        return bare.end(), latex.trim(bare.group(1))
    opened = re.compile(r" *\{").match(text, at)
    depth = 0
    for brace in re.compile(r"\\[{}]|[{}]").finditer(text, at) if opened else ():
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return brace.end(), text[opened.end() : brace.start()].strip()
    return at, None


def _sentence(text: str, stop: str = r"\n|\.(?=\s|$)|。") -> str:
    """The first sentence: up to a line break or a full stop that is no decimal point."""
    return re.split(stop, text.lstrip("\n *_"), maxsplit=1)[0]


def _fall_back(text: str) -> str | None:
    """A response without a marker: all of it if it is an answer, else the choice it starts with or its last value."""
    is_short = len(text) <= 200 and "\n" not in text.strip()
    if is_short and _is_value(text):
        return latex.trim(_undelimited(text))
    if choice := _CHOICE_FIRST.match(text):
        return choice.group(1)
    if is_short and len(text.split()) == 1 and latex.is_prose(_clean(text)):
        return latex.trim(_undelimited(text))
    return _last_value(text)


def _narrow(fragment: str) -> str | None:
    """Reduce the words after a marker to the answer in them."""
    fragment = latex.trim(fragment)
    if choice := _CHOICE_FIRST.match(fragment):
        return choice.group(1)
    if _is_value(fragment):
        return _undelimited(fragment)
    for opening, closing in _DELIMITERS:
        inside, closed, _ = fragment.removeprefix(opening).partition(closing)
        if fragment.startswith(opening) and closed and _is_value(inside):
            return inside.strip()
    number = _NUMBER.match(fragment)
    if number and number.group():
        return number.group()
    return _last_value(fragment) or (fragment if 0 < len(fragment.split()) <= 8 else None)


def _last_value(text: str) -> str | None:
    """The last formula, bracketed choice or number, whichever ends last; else a choice that stands alone."""
    tail = max(0, len(text) - 2000)
    found = [_last_formula(text, opening, closing) for opening, closing in _DELIMITERS[1:]]
    for pattern in (_CHOICE_INSIDE, _NUMBER):
        found += [(match.end() + tail, match.group(match.lastindex or 0)) for match in pattern.finditer(text[tail:])]
    value = max((span for span in found if span[1]), key=lambda span: span[0], default=(0, None))[1]
    alone = None if value else _CHOICE_ALONE.search(text[tail:])
    return alone.group(1) if alone else value


def _last_formula(text: str, opening: str, closing: str) -> tuple[int, str | None]:
    end = text.rfind(closing)
    while end > 0 and closing == "$" and text[end - 1] in "\\$":
        end -= 1
    start = text.rfind(opening, 0, max(end, 0))
    inside = text[start + len(opening) : end].strip() if start >= 0 else ""
    return (end, inside) if inside and _is_value(inside) else (-1, None)


def _undelimited(text: str) -> str:
    for opening, closing in _DELIMITERS:
        inside = text.strip().removeprefix(opening).removesuffix(closing)
        if len(inside) == len(text.strip()) - len(opening) - len(closing) and opening not in inside:
            return inside.strip()
    return text.strip()


def _is_value(text: str) -> bool:
    cleaned = _clean(text)
    return bool(cleaned) and not latex.is_prose(cleaned) and latex.parse(cleaned) is not None


# ---------------------------------------------------------------- comparison

_INTEGER = re.compile(r"-?[0-9]{1,100}")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}


def math_equal(answer: str | None, gold: str) -> bool:
    r"""Return whether an answer means the same as the gold answer; never raises, and False for an empty answer.

    Either may be bare, between dollars, in a `\boxed{}` or at the end of a solution that boxes it or ends in `####`.
    The module's docstring lists what counts as the same. Symmetric but for bases: a gold `12_5` is met by `12`.

    >>> math_equal(r"\frac{\sqrt{8}}{2}", "sqrt(2)"), math_equal("[0, 1)", "(0, 1)")
    (True, False)
    """
    if answer is None:
        return False
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):  # most of what training grades
        return int(answer) == int(gold)
    answer, gold = _clean(answer), _clean(gold)
    if not answer or not gold:
        return False
    if answer == gold or max(len(answer), len(gold)) > latex.MAX_CHARS:
        return answer == gold
    if _same_text(answer, gold):
        return True
    if latex.is_prose(answer) or latex.is_prose(gold):
        return False
    are_lists = "," in answer and "," in gold and not re.search(r",\s*0\d", answer + gold)
    readings = (True, False) if are_lists else (True,)  # beside a list "100,200" may be one too, "2,048" not
    return any(_same_parsed(latex.parse(answer, grouped), latex.parse(gold, grouped)) for grouped in readings)


def _clean(text: str) -> str:
    """An answer out of its box or from behind ####, in one spelling."""
    if "\\boxed" in text or "\\fbox" in text:
        text = last_boxed(text[-MAX_TAIL_CHARS:]) or text
    return latex.clean(text.rpartition("####")[2].strip())


def _same_text(answer: str, gold: str) -> bool:
    answer, gold = latex.plain_words(answer), latex.plain_words(gold)
    choices = [_CHOICE.fullmatch(text) for text in (answer, gold)]
    if all(choices):
        return choices[0].group(1) == choices[1].group(1)
    return answer == gold and latex.is_prose(answer)


def _same_parsed(answer: tuple | None, gold: tuple | None) -> bool:
    if answer is None or gold is None:
        return False
    return _same(answer, gold) or (gold[0] == "base" and answer == latex.number(gold[1]))


def _same(a: tuple, b: tuple) -> bool:
    """Whether two parsed answers, or parts of them, are the same."""
    if a == b or (a[0] == b[0] == "relation" and _same_relation(a, b)):
        return True
    if "relation" in (a[0], b[0]):
        meanings = _meaning(a), _meaning(b)
        return meanings != (a, b) and not _are_unlike_equations(a, b) and _same(*meanings)
    if {a[0], b[0]} <= latex.SCALARS | {"unit"}:
        return _same_quantity(a, b)
    return _same_structure(a, b) or _same_structure(b, a)


def _same_structure(a: tuple, b: tuple) -> bool:
    match a, b:
        case ("bracket", opening, items, closing), ("bracket", other_opening, others, other_closing):
            return (opening, closing) == (other_opening, other_closing) and _same_items(items, others)
        case ("matrix", rows), ("matrix", others):
            return len(rows) == len(others) and all(map(_same_items, rows, others))
        case (("list" | "set", items), ("list" | "set", others)) | (("union", items), ("union", others)):
            return _same_unordered(items, others)
        case ("list", items), ("union", others):  # x < 1 or x > 4
            return all(item[0] == "relation" for item in items) and _same_unordered(items, others)
        case ("list", items), ("bracket", "(", others, ")"):  # x = 3, y = 2
            values = latex.assigned_values(items)
            return values is not None and _same_items(values, others)
        case ("list" | "set", items), (kind, *_) if kind in latex.SCALARS and items:  # one value in several forms
            return all(_same(item, b) for item in items)
    return False


def _same_items(items: tuple, others: tuple) -> bool:
    return len(items) == len(others) and all(map(_same, items, others))


def _same_unordered(items: tuple, others: tuple) -> bool:
    """Each item is struck out against one equal item of the others, and none is left."""
    left = list(others)
    for item in items:
        found = next((at for at, other in enumerate(left) if _same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return not left


def _same_quantity(a: tuple, b: tuple) -> bool:
    (a, unit), (b, other_unit) = _measured(a), _measured(b)
    if unit != other_unit and latex.is_known_unit(unit) and latex.is_known_unit(other_unit):
        return False
    if a[0] != "percent" and b[0] == "percent":
        a, b = b, a
    as_written = a[0] == "percent" != b[0] and _same_scalar(a[1], b)  # 45% is 45 too
    return as_written or _same_scalar(a, b)


def _measured(node: tuple) -> tuple[tuple, str]:
    if node[0] == "unit":
        return node[1], node[2]
    return node, node[0] if node[0] == "percent" else ""


def _same_scalar(a: tuple, b: tuple) -> bool:
    values = samples(a, b)
    return bool(values) and all(is_close(x, y) for x, y in values)


def _same_relation(a: tuple, b: tuple) -> bool:
    """Whether left minus right is the same, but for a constant factor that keeps the direction."""
    sides = (*a[1::2], *b[1::2])
    if (
        len(a) != 4
        or len(b) != 4
        or not {side[0] for side in sides} <= latex.SCALARS
        or not latex.contains(a, latex.VARIABLES)
    ):
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
    return not latex.contains((a, b), latex.VARIABLES) or [*filter(latex.is_name, a[1::2])] != [
        *filter(latex.is_name, b[1::2])
    ]


def _meaning(node: tuple) -> tuple:
    """What a relation says about its name: `x = 5` says 5, `x in S` says S, `0 < x < 1` says the interval (0, 1)."""
    if node[0] != "relation":
        return node
    sides, signs = list(node[1::2]), list(node[2::2])
    if set(signs) == {"="}:
        *said, value = sides[::-1] if latex.is_name(sides[-1]) else sides
        is_said = all(latex.is_name(side) or not latex.contains(side, latex.VARIABLES) for side in said)
        return (
            value if is_said and (any(map(latex.is_name, said)) or not latex.contains(value, latex.VARIABLES)) else node
        )
    if signs == [r"\in"]:
        return sides[1] if latex.is_name(sides[0]) else node
    return _interval(sides, signs) or node


def _interval(sides: list[tuple], signs: list[str]) -> tuple | None:
    r"""The interval of `1 < x`, `x \le 2` or `1 < x \le 2`, for |x| perhaps a union of two; None for anything else."""
    sides, signs = _bounds(sides, signs)
    if len(sides) != 3 or not set(signs) <= {"<", r"\le"} or latex.contains((sides[0], sides[2]), latex.VARIABLES):
        return None
    low, middle, high = sides
    is_magnitude = middle[0] == "abs" and latex.is_name(middle[1])
    if is_magnitude and low == ("neg", latex.INFINITY):  # |x| < 2
        low, middle, signs = ("neg", high), middle[1], [signs[1], signs[1]]
    if latex.is_name(middle):
        return _bracket(low, high, *signs)
    pieces = _bracket(("neg", high), ("neg", low), *signs[::-1]), _bracket(low, high, *signs)
    return ("union", pieces) if is_magnitude else None


def _bounds(sides: list[tuple], signs: list[str]) -> tuple[list[tuple], list[str]]:
    """The inequality from small to large, with an infinite end where it has only one."""
    if signs[0] in (">", r"\ge"):
        sides, signs = sides[::-1], [_FLIPPED.get(sign, "") for sign in reversed(signs)]
    if len(sides) > 2:
        return sides, signs
    if latex.contains(sides[0], latex.VARIABLES):  # x < 2
        return [("neg", latex.INFINITY), *sides], ["<", *signs]
    return [*sides, latex.INFINITY], [*signs, "<"]


def _bracket(low: tuple, high: tuple, sign: str, other_sign: str) -> tuple:
    return ("bracket", "(" if sign == "<" else "[", (low, high), ")" if other_sign == "<" else "]")
