r"""Is this answer that answer? Find the final answer in a response, and compare two answers as mathematics.

`extract_answer` looks, after `</think>`, for `\boxed{}`, an `<answer>` block, GSM8K's `####`, a phrase such as "the
answer is", and falls back on what ends the text. `math_equal` reads both answers with a small grammar of its own and
compares them exactly (`fractions.Fraction`) where they are rational, otherwise to 50 of 100 digits with mpmath.
Expressions with variables are compared at four fixed pseudo-random points (Schwartz 1980, Zippel 1979), not simplified.

Nothing reaches `eval` or sympy. Length, nesting and the size of every number are bounded before work is done, so no
timer is needed and a call takes milliseconds in any thread. What is past a bound is compared as a string.

Choices, where tastes differ:
- Decimals are exact: 0.33 is not 1/3. A percentage p% is p/100; it equals p as well, since a unit may be left out.
- A unit or currency missing on one side is forgiven; two different known units (cm, m) are not, and none is converted.
- `x = 5` equals `5`, and `x \in [0, 1]` equals `[0, 1]`, where one side is only a name.
- Sets and lists without brackets have no order; tuples, intervals and matrices have. `[0, 1)` is not `(0, 1)`.
- Text and a single letter are compared without case. `\log` is the natural logarithm, `i` and `e` are constants.
- The one asymmetry: a gold with a base, `12_5`, is met by `12` (not by `7`); a gold `12` is not met by `12_5`.
- Unevaluated arithmetic counts: `2 \cdot 3` equals 6. A task that forbids this has to look at the answer's form.

Left out: sums, integrals, limits, set-builder notation, arithmetic on matrices, numbers in words; these are equal only
when written alike.
"""

import math
import random
import re
import threading
import unicodedata
from collections.abc import Callable
from fractions import Fraction

import mpmath

# ---------------------------------------------------------------- limits

MAX_CHARS = 1000  # of an answer; a longer one is compared as a string
MAX_TAIL_CHARS = 50_000  # of a response, from its end, that are searched for an answer
MAX_DEPTH = 30  # nested brackets
MAX_BITS = 4096  # of a numerator, a denominator, or a binary exponent
MAX_ITEMS = 40  # of a list or set, since comparison without order is quadratic
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
        return _narrow(line) or _trim(line) or None
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
        return bare.end(), _trim(bare.group(1))
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
        return _trim(_undelimited(text))
    if choice := _CHOICE_FIRST.match(text):
        return choice.group(1)
    if is_short and len(text.split()) == 1 and _is_prose(_clean(text)):
        return _trim(_undelimited(text))
    return _last_value(text)


def _narrow(fragment: str) -> str | None:
    """Reduce the words after a marker to the answer in them."""
    fragment = _trim(fragment)
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
    return bool(cleaned) and not _is_prose(cleaned) and _parse(cleaned) is not None


def _trim(text: str) -> str:
    return text.strip().strip("*_`").rstrip(".,;:。，").strip("*_` \t\n")


# ---------------------------------------------------------------- cleaning and tokens


def _table(pairs: str) -> dict[str, str]:
    return dict(pair.split() for pair in pairs.split(";"))


_UNICODE = str.maketrans(
    {old: new + " " for old, new in _table(r"≤ \le;≥ \ge;≠ \ne;π \pi;∞ \infty;± \pm;∈ \in;∪ \cup;∅ \emptyset").items()}
    | _table(r"≈ =;− -;– -;× *;· *;∙ *;÷ /;⁄ /;， ,;。 .;： :;（ (;） );％ %;£ \$;€ \$")
    | {"√": r"\sqrt ", "°": r"^\circ "}
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_ALIASES = _table(
    r"\dfrac \frac;\tfrac \frac;\cfrac \frac;\leq \le;\leqslant \le;<= \le;\geq \ge;\geqslant \ge;>= \ge"
    r";\neq \ne;!= \ne;\lt <;\gt >;\approx =;\lvert |;\rvert |;\vert |;\mid |;\lbrace \{;\rbrace \};\cdot *;\times *"
    r";\div /;** ^;\land ,;\lor ,;and ,;or ,;\langle (;\rangle );\lbrack [;\rbrack ];\colon :;\% %"
    r";\varnothing \emptyset;inf \infty;infinity \infty;pi \pi;frac \frac;sin \sin;cos \cos;tan \tan;ln \ln;log \log"
    r";exp \exp;sqrt \sqrt"
)
_IGNORED = set(r"\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \displaystyle \textstyle \limits".split())
_IGNORED |= set(r"\angle \triangle \overline \overrightarrow \vec \hline \rm".split())
_GREEK = set(r"\alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \kappa \lambda \mu \nu \xi".split())
_GREEK |= set(r"\rho \sigma \tau \phi \varphi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Sigma \Phi \Omega".split())
_FUNCTIONS = set(r"\sin \cos \tan \cot \sec \csc \sinh \cosh \tanh \arcsin \arccos \arctan \ln \log \exp".split())
_RELATIONS = set(r"= < > \le \ge \ne \in".split())
_MATRICES = set("pmatrix bmatrix Bmatrix vmatrix matrix array smallmatrix".split())
_SENTENCE = set("is are was the of we if as so by this that with which since because when where".split())
_UNIT_SPELLINGS = """cm centimeter centimeters centimetre centimetres;mm millimeter millimeters;km kilometer kilometers
;m meter meters metre metres;in inch inches;ft foot feet;yd yard yards;mi mile miles;kg kilogram kilograms;g gram grams
;mg milligram milligrams;lb lbs pound pounds;oz ounce ounces;ml milliliter milliliters;l liter liters litre litres
;s sec second seconds;min minute minutes;h hr hrs hour hours;day days;week weeks;month months;year years
;dollar dollars usd;cent cents;degree degrees deg;radian radians rad;mph;percent pct"""
_UNITS = {word: group.split()[0] for group in _UNIT_SPELLINGS.split(";") for word in group.split()}
_TOKEN = re.compile(
    r"(?P<text>\\(?:text(?:bf|it|rm|sf|normal)?|mbox|mathrm|mathbf|mathit|operatorname)\s*\{(?P<words>[^{}]*)\})"
    r"|(?P<number>\d*\.\d*\\overline\{\d+\}|(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<environment>\\(?:begin|end)\s*\{[A-Za-z]+\*?\})(?:\{[lcr|]+\})?"
    r"|(?P<letters>[A-Za-z]+)|(?P<space>\s+)|(?P<symbol>\\(?:[A-Za-z]+|.)|<=|>=|!=|\*\*|.)",
    re.ASCII,
)


class _Unparsed(Exception):
    """The text is outside the grammar or past a limit."""


def _clean(text: str) -> str:
    """One spelling for what is written in many: the box or `####` answer, unicode, dollars, commas inside numbers."""
    if "\\boxed" in text or "\\fbox" in text:
        text = last_boxed(text[-MAX_TAIL_CHARS:]) or text
    text = text.rpartition("####")[2].strip()
    if len(text) > 4 * MAX_CHARS:
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda power: "^{" + power.group().translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda half: " " + unicodedata.normalize("NFKC", half.group()), text).translate(_UNICODE)
    if "\\begin" not in text:  # there, two backslashes end a row; elsewhere they are one, escaped once too often
        text = re.sub(r"\\\\(?=(?:left|right|[dt]?frac|sqrt|text|pi|infty|pm|cup|in|le|ge|cdot)\b)", r"\\", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!)\s*(?=\d{3})", "", text)
    text = re.sub(r"(?<!\\)\\(?:[!,;: ()\[\]]|q?quad)|~", " ", text)
    if text.count("$") - text.count("\\$") == 1:  # one dollar sign is money, a pair is mathematics
        text = re.sub(r"(?<!\\)\$", r"\\$", text)
    return re.sub(r"\s+", " ", _trim(re.sub(r"(?<!\\)\$", " ", text)))


def _is_prose(text: str) -> bool:
    """Only words, and at least one that is no product of variables (`ab` is one, `no` and `east` are not)."""
    is_words = re.fullmatch(r"[^\W\d_](?:[^\W\d_]|['’ \-])*", text)
    return is_words is not None and re.search(r"[^\W\d_]{4}|[eiou]\w|\w[eiou]", text) is not None


def _text_key(text: str) -> str:
    text = re.sub(r"\\(?:text\w*|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\s+", " ", text).strip(" .'\"").casefold()


def _tokens(text: str) -> list[str]:
    r"""Numbers, letters, commands with their backslash, symbols; and words as `"apples`, `\begin{name}` as one."""
    if len(text) > MAX_CHARS:
        raise _Unparsed
    tokens = []
    for match in _TOKEN.finditer(text):
        found, kind = match.group(match.lastgroup), match.lastgroup
        if kind == "text":
            tokens += _word_tokens(match.group("words").strip())
        elif kind == "letters" and found not in _ALIASES:
            tokens += _letter_tokens(found)
        elif kind != "space" and found not in _IGNORED:
            tokens.append(_ALIASES.get(found, found))
    return tokens


def _word_tokens(words: str) -> list[str]:
    r"""The inside of \text{}: a word or words, or mathematics that was put there, as in \text{2/3}."""
    if words.casefold().strip(" ,") in ("and", "or"):
        return [","]
    is_words = words.isalpha() or re.match(r"[^\W\d_]{2,}", words)
    return ['"' + words.casefold()] if is_words else _tokens(words)


def _letter_tokens(letters: str) -> list[str]:
    if letters in _SENTENCE:
        raise _Unparsed
    if len(letters) >= 4 or (len(letters) > 1 and letters in _UNITS):
        return ['"' + letters.casefold()]
    return list(letters)


# ---------------------------------------------------------------- grammar
#
# A parsed answer is a tuple that starts with its kind.
# Scalars: ("num", Fraction) ("const", name) ("sym", name) ("call", name, arguments) ("add", *terms) ("mul", *factors)
#   ("pow", base, exponent) ("func", name, x) ("log", base, x) ("binom", n, k); of one: neg inv abs fact deg percent
# Others: ("inf",) ("unit", x, unit) ("base", digits, base) ("relation", x, "=", y, "<", z, ...) ("ratio", items)
#   ("bracket", "(", items, "]") ("list", items) ("set", items) ("union", items) ("matrix", rows)

_SCALARS = set("num const sym call add mul pow func log binom neg inv abs fact deg percent pm mp".split())
_VARIABLES = {"sym", "call"}
_ONE, _TWO = ("num", Fraction(1)), ("num", Fraction(2))


def _parse(text: str, grouped: bool = True) -> tuple | None:
    """Parse a cleaned answer; None outside the grammar. In brackets, or where not `grouped`, 1,234 is two items."""
    if grouped and not re.search(r"[(\[]|\\\{", text):
        text = re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)", lambda number: number.group().replace(",", ""), text)
    try:
        return _Parser(_tokens(text)).answer()
    except (_Unparsed, ValueError):
        return None


class _Parser:
    """Recursive descent; each method reads one level of precedence, the loosest first."""

    def __init__(self, tokens: list[str]):
        self.tokens = [*tokens, ""]
        self.at = 0
        self.depth = 0
        self.open_bars = 0
        self.is_money = False

    @property
    def token(self) -> str:
        return self.tokens[self.at]

    def next(self) -> str:
        token = self.token
        self.at = min(self.at + 1, len(self.tokens) - 1)
        return token

    def take(self, *tokens: str) -> bool:
        """Step over the next token if it is one of these."""
        is_here = self.token in tokens
        self.at += is_here
        return is_here

    def expect(self, *tokens: str) -> str:
        if not self.take(*tokens):
            raise _Unparsed
        return self.tokens[self.at - 1]

    def answer(self) -> tuple:
        groups = [self.items()]
        while self.take(";"):
            groups.append(self.items())
        if self.token:
            raise _Unparsed
        if len(groups) == 1:
            groups = _solutions(groups[0])
        if len(groups) == 1:
            return _list(groups[0])
        return ("list", tuple(_assigned(group) or _list(group) for group in groups))

    def items(self) -> list[tuple]:
        items = _both_signs(self.relation())
        while self.take(","):
            while self.take(","):  # "5, 6, and 7"
                pass
            items += _both_signs(self.relation())
        if len(items) > MAX_ITEMS:
            raise _Unparsed
        return items

    def relation(self) -> tuple:
        parts = [self.union()]
        while self.token in _RELATIONS:
            parts += [self.next(), self.union()]
        return ("relation", *parts) if len(parts) > 1 else parts[0]

    def union(self) -> tuple:
        pieces = [self.ratio()]
        while self.take(r"\cup"):
            pieces.append(self.ratio())
        return ("union", tuple(pieces)) if len(pieces) > 1 else pieces[0]

    def ratio(self) -> tuple:
        parts = [self.quantity()]
        while self.token == ":":
            is_label = self.tokens[self.at - 1].startswith('"')  # "Area: 5"
            self.at += 1
            parts = [*([] if is_label else parts), self.quantity()]
        return ("ratio", tuple(parts)) if len(parts) > 1 else parts[0]

    def quantity(self) -> tuple:
        """A sum with the unit behind it or the currency sign in it."""
        outer, self.is_money = self.is_money, False
        value = self.sum()
        unit = self.unit() or ("dollar" if self.is_money else "")
        self.is_money = outer
        if value[0] == "deg":
            return ("unit", value[1], "degree")
        if unit == "percent":
            return ("percent", value)
        return ("unit", value, unit) if unit and value[0] in _SCALARS else value

    def unit(self) -> str:
        words = []
        while self.token.startswith('"') or (words and self.token in ("/", "^")):
            token = self.next()
            words += [token, self.subscript()] if token == "^" else re.findall(r"[^\W\d_]+|[^\s\"]", token)
        unit = " ".join(_UNITS.get(word, word) for word in words)
        return re.sub(r"^square (\w+)", r"\1 ^ 2", unit)

    def sum(self) -> tuple:
        terms = []
        while not terms or self.token in ("+", "-", r"\pm", r"\mp"):
            kind = ""
            while self.token in ("+", "-", r"\pm", r"\mp"):
                sign = self.next()
                if sign == "-":
                    kind = {"": "neg", "neg": "", "pm": "mp", "mp": "pm"}[kind]
                elif sign != "+":
                    kind = sign[1:]
            terms.append((kind, self.term()) if kind else self.term())
        return ("add", *terms) if len(terms) > 1 or terms[0][0] in ("pm", "mp") else terms[0]

    def term(self) -> tuple:
        factors = [self.power()]
        while True:
            if self.take("*"):
                factors.append(self.signed(self.power))
            elif self.take("/"):
                factors.append(("inv", self.signed(self.power)))
            elif self.starts_factor():
                follows_number = _is_number(self.tokens[self.at - 1]) and self.token == r"\frac"
                factor = self.power()
                is_mixed = follows_number and _is_mixed(factors[-1], factor)
                factors[-1:] = [("add", factors[-1], factor)] if is_mixed else [factors[-1], factor]
            else:
                return ("mul", *factors) if len(factors) > 1 else factors[0]

    def signed(self, read: Callable[[], tuple]) -> tuple:
        if self.take("-"):
            return ("neg", read())
        self.take("+")
        return read()

    def starts_factor(self) -> bool:
        """Whether a factor follows without a sign of multiplication; two numbers side by side are not a product."""
        token = self.token
        if _is_number(token):
            return not _is_number(self.tokens[self.at - 1])
        if token == "|":
            return self.open_bars == 0
        is_command = token in _FUNCTIONS or token in (r"\frac", r"\sqrt", r"\pi", r"\binom")
        return is_command or _is_letter(token) or token in ("(", "{", "[")

    def power(self) -> tuple:
        value = self.atom()
        for _ in range(4):
            if self.take("!"):
                value = ("fact", value)
            elif self.take("%"):
                value = ("percent", value)
            elif self.take("^"):
                value = ("deg", value) if self.takes_degree() else ("pow", value, self.argument())
        return value

    def takes_degree(self) -> bool:
        if self.tokens[self.at : self.at + 3] == ["{", r"\circ", "}"]:
            self.at += 3
            return True
        return self.take(r"\circ")

    def argument(self) -> tuple:
        """What `^` and `_` take: a group in braces, or one atom with its sign and, in 2^3^2, its own power."""
        is_negative = self.take("-")
        value = self.atom()
        if self.take("^"):
            value = ("pow", value, self.nested(self.argument))
        return ("neg", value) if is_negative else value

    def nested(self, read: Callable[[], tuple]) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unparsed
        value = read()
        self.depth -= 1
        return value

    def atom(self) -> tuple:
        return self.nested(self.read_atom)

    def read_atom(self) -> tuple:
        token = self.next()
        if _is_number(token):
            return self.number(token)
        if token.startswith('"'):
            return self.words(token)
        if _is_letter(token):
            return self.symbol(token)
        if token in _FUNCTIONS:
            return self.function(token[1:])
        if token.startswith(r"\begin{"):
            return self.matrix(token.removeprefix(r"\begin{").removesuffix("}"))
        constants = {r"\pi": ("const", "pi"), r"\infty": ("inf",), r"\emptyset": ("set", ())}
        if token in constants:
            return constants[token]
        readers = {"|": self.magnitude, "(": self.group, "[": self.group, "{": self.group, r"\{": self.group}
        readers |= {r"\sqrt": self.root, r"\frac": self.fraction, r"\binom": self.binomial, r"\$": self.money}
        readers |= {r"\mathbb": self.real_numbers}
        if token not in readers:
            raise _Unparsed
        return readers[token]()

    def number(self, text: str) -> tuple:
        power_of_ten = re.search(r"[eE][+-]?(\d+)$", text)
        if len(text) > MAX_BITS // 8 or (power_of_ten and int(power_of_ten.group(1)) > MAX_BITS // 8):
            raise _Unparsed
        if self.take("_"):
            return ("base", text, self.subscript())
        top, slash, bottom = [*self.tokens[self.at :], "", ""][:3]
        if slash == "/" and _is_number(top) and _is_number(bottom):  # 3 1/2
            fraction = ("mul", _num(top), ("inv", _num(bottom)))
            if _is_mixed(_num(text), fraction):
                self.at += 3
                return ("add", _num(text), fraction)
        return _num(text)

    def symbol(self, name: str) -> tuple:
        """A variable with its subscript and primes; f(x) is a call, where other letters multiply the bracket."""
        while self.token in ("_", "'"):
            name += self.next()
            name += self.subscript() if name.endswith("_") else ""
        if self.token == "(" and name[0] in "fghFGPQ":
            self.at += 1
            items = self.items()
            self.expect(")")
            return ("call", name, tuple(items))
        return ("const", name) if name in ("i", "e") else ("sym", name)

    def subscript(self) -> str:
        """The tokens of a subscript or of a unit's power, without their braces."""
        if not self.take("{"):
            return self.next()
        end = self.tokens.index("}", self.at)
        inside = "".join(self.tokens[self.at : end])
        self.at = end + 1
        return inside

    def words(self, text: str) -> tuple:
        while self.token.startswith('"'):
            text += " " + self.next()[1:]
        if self.starts_factor() and self.token != "(":  # "about 5 cm" is a sentence
            raise _Unparsed
        return ("sym", text[1:])

    def magnitude(self) -> tuple:
        self.open_bars += 1
        value = self.sum()
        self.open_bars -= 1
        self.expect("|")
        return ("abs", value)

    def group(self) -> tuple:
        opening = self.tokens[self.at - 1]
        if opening == r"\{" and self.take(r"\}"):
            return ("set", ())
        bars, self.open_bars = self.open_bars, 0
        items = self.items()
        self.open_bars = bars
        closing = self.expect(*{"{": ["}"], r"\{": [r"\}"]}.get(opening, [")", "]"]))
        if opening == r"\{" or (opening == "{" and len(items) > 1):
            return ("set", tuple(items))
        if opening == "{" or (len(items) == 1 and opening + closing in ("()", "[]")):
            return items[0]
        return ("bracket", opening, tuple(items), closing)

    def money(self) -> tuple:
        self.is_money = True
        return self.signed(self.atom)

    def real_numbers(self) -> tuple:
        if self.subscript() != "R":
            raise _Unparsed
        return ("bracket", "(", (("neg", ("inf",)), ("inf",)), ")")

    def root(self) -> tuple:
        degree = _TWO
        if self.take("["):
            degree = self.sum()
            self.expect("]")
        return ("pow", self.atom(), ("inv", degree))

    def fraction(self) -> tuple:
        return ("mul", self.digit_or_group(), ("inv", self.digit_or_group()))

    def binomial(self) -> tuple:
        return ("binom", self.digit_or_group(), self.digit_or_group())

    def digit_or_group(self) -> tuple:
        r"""LaTeX gives \frac12 one digit each."""
        if len(self.token) > 1 and self.token.isdecimal():
            digit, self.tokens[self.at] = self.token[0], self.token[1:]
            return _num(digit)
        return self.atom()

    def function(self, name: str) -> tuple:
        base = self.argument() if name == "log" and self.take("_") else None
        exponent = self.argument() if self.take("^") else None
        x = self.atom() if self.token in ("(", "{") else self.function_argument()
        if exponent == ("neg", _ONE) and "\\arc" + name in _FUNCTIONS:
            name, exponent = "arc" + name, None
        value = ("log", base, x) if base else ("func", name, x)
        return ("pow", value, exponent) if exponent else value

    def function_argument(self) -> tuple:
        r"""Without brackets, the factors up to the next sign, bracket or function: \sin 2x \cos x."""
        factors = [self.signed(self.power)]
        while self.starts_factor() and self.token not in _FUNCTIONS and self.token not in ("(", "[", "|"):
            factors.append(self.power())
        return ("mul", *factors) if len(factors) > 1 else factors[0]

    def matrix(self, name: str) -> tuple:
        if name not in _MATRICES:
            raise _Unparsed
        rows = [[]]
        while not self.take(f"\\end{{{name}}}"):
            if self.take("\\\\"):
                rows.append([])
            elif not self.take("&"):
                rows[-1].append(self.quantity())
        return ("matrix", tuple(tuple(row) for row in rows if row))


def _is_number(token: str) -> bool:
    return token[:1].isdigit() or (len(token) > 1 and token[0] == ".")


def _is_letter(token: str) -> bool:
    return token in _GREEK or bool(re.fullmatch("[A-Za-zα-ωΑ-Ω]", token))


def _num(text: str) -> tuple:
    r"""A decimal; with a repeating end, 0.1\overline{6} is (16 - 1) / 90."""
    fixed, _, period = text.removesuffix("}").partition(r"\overline{")
    if not period:
        return ("num", Fraction(text))
    whole, _, decimals = fixed.partition(".")
    difference = int(whole + decimals + period) - int("0" + whole + decimals)
    return ("num", Fraction(difference, 10 ** len(decimals) * (10 ** len(period) - 1)))


def _is_mixed(whole: tuple, fraction: tuple) -> bool:
    match whole, fraction:
        case ("num", n), ("mul", ("num", a), ("inv", ("num", b))):
            return n.denominator == a.denominator == b.denominator == 1 and 0 < a < b
    return False


def _list(items: list[tuple]) -> tuple:
    return items[0] if len(items) == 1 else ("list", tuple(items))


def _solutions(items: list[tuple]) -> list[list[tuple]]:
    """Two solutions in `x = 1, y = 2 or x = 3, y = 4`: a new one starts where the first name comes back."""
    starts = [at for at, item in enumerate(items) if item[:3] == items[0][:3]]
    groups = [items[start:end] for start, end in zip(starts, [*starts[1:], len(items)], strict=True)]
    return groups if len(groups) > 1 and all(map(_assigned, groups)) else [items]


def _assigned(items) -> tuple | None:
    """The tuple (3, 2) of `x = 3, y = 2`, where the names differ."""
    names = {item[1] for item in items if item[0] == "relation" and len(item) == 4 and item[2] == "="}
    if len(items) < 2 or len(names) != len(items) or not all(map(_is_name, names)):
        return None
    return ("bracket", "(", tuple(item[3] for item in items), ")")


def _both_signs(item: tuple) -> list[tuple]:
    """A statement with plus-minus is two statements."""
    return [_with_sign(item, sign) for sign in ("pm", "mp")] if _contains(item, {"pm", "mp"}) else [item]


def _with_sign(node, plus: str):
    if not isinstance(node, tuple):
        return node
    parts = tuple(_with_sign(part, plus) for part in node)
    if parts and parts[0] in ("pm", "mp"):
        return ("add", parts[1]) if parts[0] == plus else ("neg", parts[1])
    return parts


def _contains(node, kinds: set[str]) -> bool:
    if not isinstance(node, tuple):
        return False
    is_one = bool(node) and isinstance(node[0], str) and node[0] in kinds
    return is_one or any(_contains(part, kinds) for part in node)


# ---------------------------------------------------------------- values

_MP = mpmath.MPContext()
_MP.dps = 100
_MP_LOCK = threading.Lock()  # mpmath fills its caches of constants without one


class _Undecided(Exception):
    """No value: undefined here, or past a limit."""


def _value(node: tuple, point: int):
    """The value of a scalar at one of the fixed points: a Fraction for as long as it is rational, else mpf or mpc."""
    kind, *parts = node
    if kind == "num":
        return parts[0]
    if kind in _VARIABLES:
        return _variable("".join(map(str, parts)), point)
    if kind == "const":
        return {"pi": +_MP.pi, "e": +_MP.e, "i": _MP.mpc(0, 1)}[parts[0]]
    if kind == "func":
        return _bounded(_function(parts[0], _value(parts[1], point)))
    if kind == "pow":
        is_constant = not _contains(parts[0], _VARIABLES)
        return _bounded(_power(_value(parts[0], point), _value(parts[1], point), is_constant))
    if kind in ("add", "mul"):
        return _folded(kind, [_value(part, point) for part in parts])
    if kind not in _OPERATIONS:
        raise _Undecided
    return _bounded(_OPERATIONS[kind](*[_value(part, point) for part in parts]))


def _variable(name: str, point: int) -> Fraction:
    """Between 1/5 and 2; positive for every name at point 0, of both signs at the others."""
    dice = random.Random(f"{point} {name}")
    size = Fraction(dice.randrange(200, 2000), 1009)
    return -size if point and dice.random() < 0.5 else size


def _folded(kind: str, values: list):
    total = values[0]
    for value in values[1:]:
        if isinstance(total, Fraction) != isinstance(value, Fraction):
            total, value = _mp(total), _mp(value)
        total = _bounded(total + value if kind == "add" else total * value)
    return total


def _bounded(value):
    if isinstance(value, Fraction):
        is_within = max(value.numerator.bit_length(), value.denominator.bit_length()) <= MAX_BITS
    else:
        is_within = _MP.isfinite(value) and (not value or abs(_MP.mag(value)) <= MAX_BITS)
    if not is_within:
        raise _Undecided
    return value


def _mp(value):
    return _MP.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _integer(value, limit: int) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= limit:
        raise _Undecided
    return int(value)


_OPERATIONS = {
    "neg": lambda x: -x,
    "inv": lambda x: 1 / x,
    "abs": abs,
    "percent": lambda x: x / 100,
    "deg": lambda x: _mp(x) * _MP.pi / 180,
    "fact": lambda x: Fraction(math.factorial(_integer(x, 450))),
    "binom": lambda n, k: Fraction(math.comb(_integer(n, 2000), _integer(k, 2000))),
    "log": lambda base, x: _MP.ln(_mp(x)) / _MP.ln(_mp(base)),
}


def _function(name: str, x):
    x = _mp(x)
    if name in ("exp", "sinh", "cosh", "tanh") and abs(x) > MAX_BITS:
        raise _Undecided
    renamed = {"log": "ln", "arcsin": "asin", "arccos": "acos", "arctan": "atan"}
    return getattr(_MP, renamed.get(name, name))(x)


def _power(base, exponent, is_constant: bool):
    """Exact where rational. The odd root of a negative constant is the real one, of a variable the principal one."""
    if isinstance(exponent, Fraction) and isinstance(base, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * bits > MAX_BITS:
            raise _Undecided
        if base < 0 and exponent.denominator % 2 and exponent.denominator > 1 and is_constant:
            return (-1) ** exponent.numerator * _power(-base, exponent, True)
        roots = [_exact_root(part, exponent.denominator) for part in (base.numerator, base.denominator)]
        if None not in roots:
            return Fraction(*roots) ** exponent.numerator
    if base and abs(_mp(exponent)) * (abs(_MP.mag(_mp(base))) + 2) > MAX_BITS:
        raise _Undecided
    is_integer = isinstance(exponent, Fraction) and exponent.denominator == 1
    return _mp(base) ** (int(exponent) if is_integer else _mp(exponent))


def _exact_root(value: int, degree: int) -> int | None:
    """The integer root, by bisection; None where it is not an integer."""
    if degree == 1 or value in (0, 1):
        return value
    if value < 0 or degree >= value.bit_length():
        return None
    low, high = 1, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if middle**degree < value else (low, middle)
    return low if low**degree == value else None


def _close(a, b) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = _mp(a), _mp(b)
    return bool(abs(a - b) <= max(abs(a), abs(b)) * _MP.mpf(10) ** -50 + _MP.mpf(10) ** -80)


def _samples(a: tuple, b: tuple) -> list[tuple]:
    """The values of two scalars at one point, or four with variables; [] where fewer than half are defined."""
    n_points = 4 if _contains((a, b), _VARIABLES) else 1
    found = []
    for point in range(n_points):
        try:
            found.append((_value(a, point), _value(b, point)))
        except (_Undecided, ArithmeticError, ValueError):
            continue
    return found if 2 * len(found) >= n_points else []


# ---------------------------------------------------------------- comparison

_INTEGER = re.compile(r"-?[0-9]{1,100}")
_FLIPPED = _table(r"< >;> <;\le \ge;\ge \le;= =;\ne \ne")


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
    if answer == gold or max(len(answer), len(gold)) > MAX_CHARS:
        return answer == gold
    if _same_text(answer, gold):
        return True
    if _is_prose(answer) or _is_prose(gold):
        return False
    are_lists = "," in answer and "," in gold and not re.search(r",\s*0\d", answer + gold)
    readings = (True, False) if are_lists else (True,)  # beside a list "100,200" may be one too, "2,048" not
    return any(_same_parsed(_parse(answer, grouped), _parse(gold, grouped)) for grouped in readings)


def _same_text(answer: str, gold: str) -> bool:
    answer, gold = _text_key(answer), _text_key(gold)
    choices = [_CHOICE.fullmatch(text) for text in (answer, gold)]
    if all(choices):
        return choices[0].group(1) == choices[1].group(1)
    return answer == gold and _is_prose(answer)


def _same_parsed(answer: tuple | None, gold: tuple | None) -> bool:
    if answer is None or gold is None:
        return False
    with _MP_LOCK:
        return _same(answer, gold) or (gold[0] == "base" and answer == _num(gold[1]))


def _same(a: tuple, b: tuple) -> bool:
    """Whether two parsed answers, or parts of them, are the same."""
    if a == b:
        return True
    if a[0] == b[0] == "relation":
        if _same_relation(a, b):
            return True
        if a[2] == b[2] == "=" and [*filter(_is_name, a[1::2])] != [*filter(_is_name, b[1::2])]:
            return False  # x = 9 and y = 9
    if "relation" in (a[0], b[0]):
        meanings = _meaning(a), _meaning(b)
        return meanings != (a, b) and _same(*meanings)
    if {a[0], b[0]} <= _SCALARS | {"unit"}:
        return _same_quantity(a, b)
    return _same_structure(a, b) or _same_structure(b, a)


def _same_structure(a: tuple, b: tuple) -> bool:
    match a, b:
        case ("bracket", opening, items, closing), ("bracket", other_opening, others, other_closing):
            return (opening, closing) == (other_opening, other_closing) and _same_items(items, others)
        case ("ratio", items), ("ratio", others):
            return _same_items(items, others)
        case ("matrix", rows), ("matrix", others):
            return len(rows) == len(others) and all(map(_same_items, rows, others))
        case (("list" | "set", items), ("list" | "set", others)) | (("union", items), ("union", others)):
            return _same_unordered(items, others)
        case ("list", items), ("union", others):  # x < 1 or x > 4
            return all(item[0] == "relation" for item in items) and _same_unordered(items, others)
        case ("list", items), ("bracket", "(", _, ")") if assigned := _assigned(items):  # x = 3, y = 2
            return _same(assigned, b)
        case ("list" | "set", items), (kind, *_) if kind in _SCALARS and items:  # one value in several forms
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
    if a[0] == b[0] == "unit" and a[2] != b[2] and all(node[2].split()[0] in _UNITS.values() for node in (a, b)):
        return False
    a, b = (node[1] if node[0] == "unit" else node for node in (a, b))
    if (a[0] == "percent") != (b[0] == "percent"):
        percentage, other = (a, b) if a[0] == "percent" else (b, a)
        if _same_scalar(percentage[1], other):
            return True
    return _same_scalar(a, b)


def _same_scalar(a: tuple, b: tuple) -> bool:
    samples = _samples(a, b)
    return bool(samples) and all(_close(x, y) for x, y in samples)


def _same_relation(a: tuple, b: tuple) -> bool:
    """Whether left minus right is the same, but for a constant factor that keeps the direction."""
    if len(a) != 4 or len(b) != 4 or not {side[0] for side in (*a[1::2], *b[1::2])} <= _SCALARS:
        return len(a) == len(b) and a[2::2] == b[2::2] and all(map(_same, a[1::2], b[1::2]))
    if b[2] not in (a[2], _FLIPPED.get(a[2])) or not _contains(a, _VARIABLES):
        return False
    differences = [("add", side[1], ("neg", side[3])) for side in (a, b)]
    samples = [pair for pair in _samples(*differences) if not any(_close(side, Fraction(0)) for side in pair)]
    ratios = [_mp(x) / _mp(y) for x, y in samples]
    if len(ratios) < 2 or not all(_close(ratio, ratios[0]) for ratio in ratios):
        return False
    return a[2] in ("=", r"\ne") or (_MP.im(ratios[0]) == 0 and (_MP.re(ratios[0]) > 0) == (a[2] == b[2]))


def _meaning(node: tuple) -> tuple:
    """What a relation says about its name: `x = 5` says 5, `x in S` says S, `0 < x < 1` says the interval (0, 1)."""
    if node[0] != "relation":
        return node
    sides, signs = node[1::2], set(node[2::2])
    if signs == {"="}:
        *said, value = sides[::-1] if _is_name(sides[-1]) else sides
        is_said = all(_is_name(side) or not _contains(side, _VARIABLES) for side in said)
        return value if is_said and (any(map(_is_name, said)) or not _contains(value, _VARIABLES)) else node
    if signs == {r"\in"}:
        return sides[1] if len(sides) == 2 and _is_name(sides[0]) else node
    return _interval(list(sides), list(node[2::2])) or node


def _is_name(node: tuple) -> bool:
    """A variable, f(x), a tuple or ratio of names, or capitals side by side as in AB."""
    match node:
        case ("sym", _) | ("call", *_):
            return True
        case ("bracket", "(", items, ")") | ("ratio", items):
            return all(map(_is_name, items))
        case ("mul", *factors):
            return all(factor[0] == "sym" and factor[1].isupper() for factor in factors)
    return False


def _interval(sides: list[tuple], signs: list[str]) -> tuple | None:
    r"""The interval of `1 < x`, `x \le 2` or `1 < x \le 2`, the union of two for |x|; None for anything else."""
    if signs[0] in (">", r"\ge"):
        sides, signs = sides[::-1], [_FLIPPED.get(sign, "") for sign in reversed(signs)]
    if len(sides) == 2:
        is_below = _contains(sides[0], _VARIABLES)  # x < 2 has no lower end
        sides = [("neg", ("inf",)), *sides] if is_below else [*sides, ("inf",)]
        signs = ["<", *signs] if is_below else [*signs, "<"]
    if len(sides) != 3 or not set(signs) <= {"<", r"\le"} or _contains((sides[0], sides[2]), _VARIABLES):
        return None
    low, middle, high = sides
    opens, closes = signs[0] == "<", signs[1] == "<"
    if _is_name(middle):
        return _bracket(low, high, opens, closes)
    if middle[0] != "abs" or not _is_name(middle[1]):
        return None
    if low == ("neg", ("inf",)):
        return _bracket(("neg", high), high, closes, closes)
    mirrored = _bracket(("neg", high), ("neg", low), closes, opens)
    return ("union", (mirrored, _bracket(low, high, opens, closes)))


def _bracket(low: tuple, high: tuple, is_open_below: bool, is_open_above: bool) -> tuple:
    return ("bracket", "[("[is_open_below], (low, high), "])"[is_open_above])
