r"""Read the mathematics people write as answers: LaTeX, Unicode or plain text in, a tree of tuples out.

`clean` gives one spelling to what is written in many; `parse` reads it by recursive descent. The text's length, the
nesting and the items of a list are bounded, so reading takes milliseconds and never overflows the stack.

Left out: sums, integrals, limits, set-builder notation, arithmetic on matrices, binomials, repeating decimals, numbers
in words.
"""

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

MAX_CHARS = 1000  # of an answer; a longer one is compared as a string
MAX_DEPTH = 30  # nested brackets, powers or signs
MAX_ITEMS = 40  # of a list or set, since comparison without order is quadratic

# ---------------------------------------------------------------- cleaning


def _table(pairs: str) -> dict[str, str]:
    return dict(pair.split() for pair in pairs.split(";"))


_SYMBOLS = r"""≤ \le;≥ \ge;≠ \ne;≈ =;π \pi;∞ \infty;± \pm;∈ \in;∪ \cup;∅ \emptyset;√ \sqrt;− -;– -;× *;· *;∙ *
;÷ /;⁄ /;。 .;° \degree;£ \pounds;€ \euro"""
_UNICODE = str.maketrans({old: new + " " for old, new in _table(_SYMBOLS).items()} | {";": ", "})


def clean(text: str) -> str:
    """Return one spelling for what is written in many: Unicode, spaces, dollars, commas inside numbers."""
    if len(text) > 4 * MAX_CHARS:
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", r"^{\g<0>}", text)
    text = re.sub("[¼-¾⅐-⅞]", r" \g<0>", text)
    text = unicodedata.normalize("NFKC", text).translate(_UNICODE)
    if "\\begin" not in text:  # there, two backslashes end a row; elsewhere they are one, escaped once too often
        text = re.sub(r"\\\\(?=(?:left|right|[dt]?frac|sqrt|text|pi|infty|pm|cup|in|le|ge|cdot)\b)", r"\\", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!)\s*(?=\d{3})", "", text)
    text = re.sub(r"(?<!\\)\\(?:[!,;: ()\[\]]|q?quad)|~", " ", text)
    text = re.sub(r"^\s*[A-Za-z]{4,}(?: [A-Za-z]+)?: ", "", text)  # "Area: 5"
    text = text.replace(r"\mathbb{R}", r"(-\infty, \infty)")
    text = re.sub(r"\^ ?(?:\\circ|\{ ?\\circ ?\})", r"\\degree ", text)
    text = re.sub(r"frac ?(\d) ?(?=[\d{])", r"frac{\1}", text)  # LaTeX gives \frac12 one digit each
    text = re.sub(r"(frac\{\d\})(\d)", r"\1{\2}", text)
    text = re.sub(r"\b(\d+) (\d+) ?/ ?(\d+)\b", r"\1\\frac{\2}{\3}", text)
    if text.count("$") - text.count("\\$") == 1:  # one dollar sign is money, a pair is mathematics
        text = re.sub(r"(?<!\\)\$", r"\\$", text)
    text = re.sub(r"- ?(\\\$|\\pounds|\\euro)", r"\1-", text)
    return re.sub(r"\s+", " ", trim(re.sub(r"(?<!\\)\$", " ", text)))


def trim(text: str) -> str:
    """Return the text without the emphasis and full stop around it."""
    return text.strip().strip("*_`").rstrip(".,;:。，").strip("*_` \t\n")


def is_prose(text: str) -> bool:
    """Return whether there are only words, one of them no product of variables (`ab` is one, `no` and `east` not)."""
    is_words = re.fullmatch(r"[^\W\d_](?:[^\W\d_]|['’ \-])*", text)
    return is_words is not None and re.search(r"[^\W\d_]{4}|[eiou]\w|\w[eiou]", text) is not None


def plain_words(text: str) -> str:
    r"""Return the text without \text{} around words, without case and without punctuation at its ends."""
    text = re.sub(r"\\(?:text\w*|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\s+", " ", text).strip(" .'\"").casefold()


# ---------------------------------------------------------------- tokens

_ALIASES = _table(
    r"\dfrac \frac;\tfrac \frac;\cfrac \frac;\leq \le;\leqslant \le;<= \le;\geq \ge;\geqslant \ge;>= \ge;\neq \ne"
    r";!= \ne;\lt <;\gt >;\approx =;\lvert |;\rvert |;\vert |;\mid |;\lbrace \{;\rbrace \};\cdot *;\times *;\div /"
    r";** ^;\land ,;\lor ,;and ,;or ,;\langle (;\rangle );\lbrack [;\rbrack ];\colon :;\% %;\varnothing \emptyset"
    r";inf \infty;infinity \infty;pi \pi;frac \frac;sqrt \sqrt;sin \sin;cos \cos;tan \tan;ln \ln;log \log;exp \exp"
)
_IGNORED = set(r"\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \displaystyle \textstyle \limits".split())
_IGNORED |= set(r"\angle \triangle \overrightarrow \vec \hline \rm".split())
_GREEK = set(r"\alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \kappa \lambda \mu \nu \xi".split())
_GREEK |= set(r"\rho \sigma \tau \phi \varphi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Sigma \Phi \Omega".split())
FUNCTIONS = {"\\" + name: name for name in "sin cos tan cot sec csc sinh cosh tanh exp ln".split()}
FUNCTIONS |= _table(r"\log ln;\arcsin asin;\arccos acos;\arctan atan")
_RELATIONS = set(r"= < > \le \ge \ne \in".split())
_SIGNS = _table(r"+ pos;- neg;\pm pm;\mp mp")
_POSTFIXES = _table(r"! fact;% percent;\degree deg")
_SENTENCE = set("is are was the of we if as so by this that with which since because when where".split())
_UNIT_SPELLINGS = """cm centimeter centimeters centimetre centimetres;mm millimeter millimeters;km kilometer kilometers
;m meter meters metre metres;in inch inches;ft foot feet;yd yard yards;mi mile miles;kg kilogram kilograms;g gram grams
;mg milligram milligrams;lb lbs pound pounds gbp;oz ounce ounces;ml milliliter milliliters;l liter liters litre litres
;s sec second seconds;min minute minutes;h hr hrs hour hours;day days;week weeks;month months;year years
;dollar dollars usd;euro euros eur;cent cents;degree degrees deg;radian radians rad;mph;percent pct"""
_UNITS = {word: group.split()[0] for group in _UNIT_SPELLINGS.split(";") for word in group.split()}
_CURRENCIES = _table(r"\$ dollar;\pounds lb;\euro euro")  # £40 and 40 pounds are the same, by weight or not
_TOKEN = re.compile(
    r"(?P<text>\\(?:text(?:bf|it|rm|sf|normal)?|mbox|mathrm|mathbf|mathit|operatorname)\s*\{(?P<words>[^{}]*)\})"
    r"|(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3})?)"
    r"|(?P<environment>\\(?:begin|end)\s*\{[A-Za-z]+\*?\})(?:\{[lcr|]+\})?"
    r"|(?P<letters>[A-Za-z]+)|(?P<space>\s+)|(?P<symbol>\\(?:[A-Za-z]+|.)|<=|>=|!=|\*\*|.)",
    re.ASCII,
)


class _Unparsed(Exception):
    """The text is outside the grammar or past a limit."""


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
#   ("pow", base, exponent); of one: neg inv abs fact deg percent sin cos ...
# Others: ("inf",) ("unit", x, unit) ("base", digits, base) ("relation", x, "=", y, "<", z, ...) ("union", items)
#   ("bracket", "(", items, "]"), with ":" for a ratio, ("list", items) ("set", items) ("matrix", rows)

SCALARS = {*"num const sym call add mul pow neg inv abs fact deg percent".split(), *FUNCTIONS.values()}
VARIABLES = {"sym", "call"}
INFINITY = ("inf",)


def parse(text: str, grouped: bool = True) -> tuple | None:
    """Parse a cleaned answer; None outside the grammar. In brackets, or where not `grouped`, 1,234 is two items.

    >>> parse("x = 1,234")
    ('relation', ('sym', 'x'), '=', ('num', Fraction(1234, 1)))
    """
    if grouped and not re.search(r"[(\[]|\\\{", text):
        text = re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)", lambda match: match.group().replace(",", ""), text)
    try:
        return _Parser(_tokens(text)).answer()
    except (_Unparsed, ValueError):
        return None


class _Parser:
    """Recursive descent; each method reads one level of precedence, the loosest first."""

    def __init__(self, tokens: list[str]):
        self.rest = iter(tokens)
        self.previous, self.token = "", next(self.rest, "")
        self.depth = 0
        self.open_bars = 0

    def next(self) -> str:
        if not self.token:
            raise _Unparsed
        self.previous, self.token = self.token, next(self.rest, "")
        return self.previous

    def take(self, *tokens: str) -> bool:
        """Step over the next token if it is one of these."""
        return self.token in tokens and bool(self.next())

    def expect(self, *tokens: str) -> str:
        if not self.take(*tokens):
            raise _Unparsed
        return self.previous

    def nested(self, read: Callable[[], tuple]) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unparsed
        value = read()
        self.depth -= 1
        return value

    def separated(self, read: Callable[[], tuple], separator: str) -> list[tuple]:
        parts = [read()]
        while self.take(separator):
            self.take(separator)  # "5, 6, and 7"
            parts.append(read())
        return parts

    def answer(self) -> tuple:
        items = _solutions(self.items())
        if self.token:
            raise _Unparsed
        return items[0] if len(items) == 1 else ("list", tuple(items))

    def items(self) -> list[tuple]:
        items = [one for item in self.separated(self.relation, ",") for one in _both_signs(item)]
        if len(items) > MAX_ITEMS:
            raise _Unparsed
        return items

    def relation(self) -> tuple:
        parts = [self.union()]
        while self.token in _RELATIONS:
            parts += [self.next(), self.union()]
        return ("relation", *parts) if len(parts) > 1 else parts[0]

    def union(self) -> tuple:
        pieces = self.separated(self.ratio, r"\cup")
        return ("union", tuple(pieces)) if len(pieces) > 1 else pieces[0]

    def ratio(self) -> tuple:
        parts = self.separated(self.quantity, ":")
        return ("bracket", ":", tuple(parts), ":") if len(parts) > 1 else parts[0]

    def quantity(self) -> tuple:
        """A sum with its currency or unit."""
        currency = _CURRENCIES[self.next()] if self.token in _CURRENCIES else ""
        value = self.sum()
        unit = self.unit() or currency
        if value[0] == "deg":
            return ("unit", value[1], "degree")
        if unit == "percent":
            return ("percent", value)
        return ("unit", value, unit) if unit and value[0] in SCALARS else value

    def unit(self) -> str:
        words = []
        while self.token.startswith('"') or (words and self.token in ("/", "^")):
            token = self.next()
            words += [token, self.subscript()] if token == "^" else re.findall(r"[^\W\d_]+|[^\s\"]", token)
        unit = " ".join(_UNITS.get(word, word) for word in words)
        return re.sub(r"^square (\w+)", r"\1 ^ 2", unit)

    def sum(self) -> tuple:
        terms = [self.signed(self.term)]
        while self.token in _SIGNS:
            terms.append(self.signed(self.term))
        return ("add", *terms) if len(terms) > 1 else terms[0]

    def signed(self, read: Callable[[], tuple]) -> tuple:
        if self.token not in _SIGNS:
            return read()
        sign = _SIGNS[self.next()]
        value = self.nested(lambda: self.signed(read))
        return value if sign == "pos" else (sign, value)

    def term(self) -> tuple:
        factors = [self.power()]
        while True:
            if self.take("*"):
                factors.append(self.signed(self.power))
            elif self.take("/"):
                factors.append(("inv", self.signed(self.power)))
            elif self.starts_factor():
                follows_number = _is_number(self.previous) and self.token == r"\frac"
                factor = self.power()
                is_mixed = follows_number and _is_mixed(factors[-1], factor)
                factors[-1:] = [("add", factors[-1], factor)] if is_mixed else [factors[-1], factor]
            else:
                return ("mul", *factors) if len(factors) > 1 else factors[0]

    def starts_factor(self) -> bool:
        """Whether a factor follows without a sign of multiplication; two numbers side by side are not a product."""
        if _is_number(self.token):
            return not _is_number(self.previous)
        if self.token == "|":
            return self.open_bars == 0
        starts = ("(", "{", "[", r"\frac", r"\sqrt", r"\pi")
        return self.token in starts or self.token in FUNCTIONS or _is_letter(self.token)

    def power(self) -> tuple:
        value = self.atom()
        for _ in range(4):
            if self.token in _POSTFIXES:
                value = (_POSTFIXES[self.next()], value)
            elif self.take("^"):
                value = ("pow", value, self.argument())
        return value

    def argument(self) -> tuple:
        """What `^` and `_` take: a group in braces, or one atom with its sign and, in 2^3^2, its own power."""
        value = self.signed(self.atom)
        return ("pow", value, self.nested(self.argument)) if self.take("^") else value

    def atom(self) -> tuple:
        return self.nested(self.read_atom)

    def read_atom(self) -> tuple:
        token = self.next()
        if _is_number(token):
            return ("base", token, self.subscript()) if self.take("_") else number(token)
        if token.startswith('"'):
            return self.words(token)
        if _is_letter(token):
            return self.symbol(token)
        if token in FUNCTIONS:
            return self.function(FUNCTIONS[token])
        if token not in _READERS:
            raise _Unparsed
        return _READERS[token](self)

    def symbol(self, name: str) -> tuple:
        """A variable with its subscript and primes; f(x) is a call, where other letters multiply the bracket."""
        while self.token in ("_", "'"):
            name += self.next()
            name += self.subscript() if name.endswith("_") else ""
        if name[0] in "fghFGPQ" and self.take("("):
            items = self.items()
            self.expect(")")
            return ("call", name, tuple(items))
        return ("const", name) if name in ("i", "e") else ("sym", name)

    def subscript(self) -> str:
        """The tokens of a subscript or of a unit's power, without their braces."""
        if not self.take("{"):
            return self.next()
        inside = ""
        while not self.take("}"):
            inside += self.next()
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

    def round_or_square(self) -> tuple:
        """A group, or a tuple or interval where there is a comma or the ends differ."""
        opening, items = self.previous, self.items()
        closing = self.expect(")", "]")
        if len(items) == 1 and opening + closing in ("()", "[]"):
            return items[0]
        return ("bracket", opening, tuple(items), closing)

    def braces(self) -> tuple:
        items = self.items()
        self.expect("}")
        return items[0] if len(items) == 1 else ("set", tuple(items))

    def set(self) -> tuple:
        items = [] if self.token == r"\}" else self.items()
        self.expect(r"\}")
        return ("set", tuple(items))

    def root(self) -> tuple:
        degree = number("2")
        if self.take("["):
            degree = self.sum()
            self.expect("]")
        return ("pow", self.atom(), ("inv", degree))

    def fraction(self) -> tuple:
        return ("mul", self.atom(), ("inv", self.atom()))

    def function(self, name: str) -> tuple:
        base = self.argument() if name == "ln" and self.take("_") else None
        exponent = self.argument() if self.take("^") else None
        x = self.atom() if self.token in ("(", "{") else self.function_argument()
        if exponent == ("neg", number("1")) and name in ("sin", "cos", "tan"):
            return ("a" + name, x)
        value = ("mul", (name, x), ("inv", (name, base))) if base else (name, x)
        return ("pow", value, exponent) if exponent else value

    def function_argument(self) -> tuple:
        r"""Without brackets, the factors up to the next sign, bracket or function: \sin 2x \cos x."""
        factors = [self.signed(self.power)]
        while self.starts_factor() and self.token not in FUNCTIONS and self.token not in ("(", "[", "|"):
            factors.append(self.power())
        return ("mul", *factors) if len(factors) > 1 else factors[0]

    def matrix(self) -> tuple:
        end = self.previous.replace("begin", "end")
        rows = [[]]
        while not self.take(end):
            if self.take("\\\\"):
                rows.append([])
            elif not self.take("&"):
                rows[-1].append(self.quantity())
        return ("matrix", tuple(tuple(row) for row in rows if row))


_READERS = {
    "|": _Parser.magnitude,
    "(": _Parser.round_or_square,
    "[": _Parser.round_or_square,
    "{": _Parser.braces,
    r"\{": _Parser.set,
    r"\overline": _Parser.atom,  # over AB; a number before it has repeating digits, which are not read
    r"\sqrt": _Parser.root,
    r"\frac": _Parser.fraction,
    r"\pi": lambda _: ("const", "pi"),
    r"\infty": lambda _: INFINITY,
    r"\emptyset": lambda _: ("set", ()),
    **{f"\\begin{{{kind}matrix}}": _Parser.matrix for kind in ["", "p", "b", "B", "v", "small"]},
    r"\begin{array}": _Parser.matrix,
}


def _is_number(token: str) -> bool:
    return token[:1].isdigit() or (len(token) > 1 and token[0] == ".")


def _is_letter(token: str) -> bool:
    return token in _GREEK or bool(re.fullmatch("[A-Za-zα-ωΑ-Ω]", token))


def number(text: str) -> tuple:
    """Return the node of a decimal."""
    return ("num", Fraction(text))


def _is_mixed(whole: tuple, fraction: tuple) -> bool:
    match whole, fraction:
        case ("num", n), ("mul", ("num", a), ("inv", ("num", b))):
            return n.denominator == a.denominator == b.denominator == 1 and 0 < a < b
    return False


def _solutions(items: list[tuple]) -> list[tuple]:
    """The tuples (1, 2), (3, 4) of `x = 1, y = 2 or x = 3, y = 4`: one starts where the first name comes back."""
    starts = [at for at, item in enumerate(items) if item[:3] == items[0][:3]]
    found = [assigned_values(items[start:end]) for start, end in zip(starts, [*starts[1:], len(items)], strict=True)]
    return [("bracket", "(", values, ")") for values in found] if len(found) > 1 and all(found) else items


def assigned_values(items) -> tuple | None:
    """Return the values (3, 2) of `x = 3, y = 2`, where the names differ, else None."""
    names = {item[1] for item in items if item[0] == "relation" and len(item) == 4 and item[2] == "="}
    is_assigned = 1 < len(items) == len(names) and all(map(is_name, names))
    return tuple(item[3] for item in items) if is_assigned else None


def is_name(node: tuple) -> bool:
    """Return whether this is a variable, f(x), a tuple or ratio of names, or capitals side by side as in AB."""
    match node:
        case ("sym", _) | ("call", *_):
            return True
        case ("bracket", "(" | ":", items, _):
            return all(map(is_name, items))
        case ("mul", *factors):
            return all(factor[0] == "sym" and factor[1].isupper() for factor in factors)
    return False


def _both_signs(item: tuple) -> list[tuple]:
    """A statement with plus-minus is two statements."""
    return [_with_sign(item, sign) for sign in ("pm", "mp")] if contains(item, {"pm", "mp"}) else [item]


def _with_sign(node, plus: str):
    if not isinstance(node, tuple):
        return node
    parts = tuple(_with_sign(part, plus) for part in node)
    if parts and parts[0] in ("pm", "mp"):
        return parts[1] if parts[0] == plus else ("neg", parts[1])
    return parts


def contains(node, kinds: set[str]) -> bool:
    """Return whether a node of one of these kinds is anywhere in a tree or a tuple of trees."""
    return isinstance(node, tuple) and (not kinds.isdisjoint(node[:1]) or any(contains(part, kinds) for part in node))


def is_known_unit(unit: str) -> bool:
    """Return whether the unit, or the first of `km / h`, is in the table of spellings."""
    return unit.split(" ")[0] in _UNITS.values()
