r"""Read the mathematics people write as answers: LaTeX, Unicode or plain text in, a tree of tuples out.

`clean` gives one spelling to what is written in many; `parse` reads it by recursive descent. The text's length, the
nesting and the items of a list are bounded, so reading takes milliseconds and never overflows the stack.

Left out: sums, integrals, limits, arithmetic on matrices, and on sets but for points taken out of intervals; digits
beyond 9 in other bases; numbers in words.
"""

import functools
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


_SYMBOLS = r"""≤ \le;≥ \ge;≠ \ne;≈ \approx;π \pi;∞ \infty;± \pm;∈ \in;∪ \cup;∅ \emptyset;√ \sqrt;− -;– -;‐ -;‒ -;× *;· *
;∙ *;⋅ *;÷ /;⁄ /;。 .;° \degree;£ \pounds;€ \euro;∖ \setminus;∶ :;¥ \yuan;₹ \rupee;¢ \cent"""
_UNICODE = str.maketrans({old: new + " " for old, new in _table(_SYMBOLS).items()} | {";": ", "})
_BEFORE = {  # what Unicode makes compatible with plain digits and letters
    "ℝ": r"\\mathbb{R}",
    "º": "°",
    "[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+": r"^{\g<0>}",
    "_?([₀-₉]+)": r"_{\1}",
    "[¼-¾⅐-⅞]": r" \g<0>",
}
_SPELLINGS = {
    # two backslashes end a row of a matrix; before a command they are one, escaped once too often
    r"(?<!\\)\\\\(?=(?:left|right|[dt]?frac|sqrt|text|pi|infty|pm|cup|in|le|ge|cdot)\b)": r"\\",
    # what only changes the looks, with a colour's name; the contents stay
    r"\\(?:(?:text)?color(?:box)?|fcolorbox *\{[^{}]*\}) *(?:\[\w+\])? *\{[^{}]*\}|\\[hv]?phantom *\{[^{}]*\}"
    r"|\\(?:boldsymbol|bm|bold|pmb|u(?:nder)?line|emph|ensuremath|mathstrut|(?:text|display|script)style"
    r"|tiny|(?:normal|footnote|script)size|small|large|Large|LARGE|huge|Huge|left|right|[bB]igg?[lr]?|limits|angle"
    r"|triangle|hline|overrightarrow|vec|bf|rm|it|sf|tt|(?:bf|it|rm|sf|tt)(?:series|shape|family))(?![A-Za-z])": "",
    # thousands, by any space that is no \quad; before a slash, 2 100/200 is mixed
    r"(?<![\w.])(?<!\d )\d{1,3}(?:(?:\\[,: ] *|\\thinspace *|~|\{\\,\}| (?!\d{3} ?/))\d{3})+(?!\d| \d)": (
        lambda match: re.sub(r"\D", "", match.group())
    ),
    r"(?<=\d)(?:\{,\}|,\\!)\s*(?=\d{3})": "",
    r"(?<!\\)\\(?:[!,;: ()\[\]]|q?quad|thinspace)|~": " ",
    r"^\s*[A-Za-z]{4,}(?: [A-Za-z]{2,})?: ": "",  # Area: 5
    r"^[^\W\dfghFGPQ](?:_\{?\w+\}?)? ?\(([a-z])\) ?=(?!=)": r"f(\1) =",  # p(x) = 2x
    r"\{:\}": ":",
    r"\\overline ?\{ ?([A-Z] ?[A-Z]) ?\}": r"\1",  # the length AB; z is another number under a bar
    r"\\\\ *(?=\\end)": "",
    r"(?<!^[A-J])、|、(?=[A-J])": ", ",
    r"\\(?:mathbb|Bbb) ?(?:\{ ?([A-Z]) ?\}|([A-Z]))": r"\\mathbb{\1\2}",
    r"(?:\\mathbf ?\{R\}|(?<![A-Za-z])R)(?= ?\\(?:setminus|backslash))": r"\\mathbb{R}",
    r"\\mathbb\{R\} ?[_^] ?(?:\{ ?\+ ?\}|\+)": r"(0, \\infty)",
    r"\\mathbb\{R\}": r"(-\\infty, \\infty)",
    # of a set of all x where something is so, what is so
    r"\\\{ ?([a-zA-Z])(?: ?\\in ?\(-\\infty, \\infty\))? ?(?:\\mid|\||:) ?((?:(?!\\[{}]).)*)\\\}": r"\2",
    r"\\[lr]?vert(?![a-z])": "|",
    r"\|([^|]*[\w)}\]]) ?\|": r"\\abs{\1}",
    r"\|([^|]*\\abs[^|]*)\|": r"\\abs{\1}",
    r"\\(sin|cos|tan) ?\^ ?\{ ?- ?1 ?\}": r"\\arc\1",
    r"(?:^|\{)((?:[^{}\\]|\\(?!choose)|\{[^{}]*\})*+)\\choose((?:[^{}]|\{[^{}]*\})*)(?:\}|$)": r"\\binom{\1}{\2}",
    r"(?<=[)\]]) ?- ?(?=\\\{)": r"\\setminus",
    r"(?<![\w})])(?:\{ ?\})? ?[_^] ?(?:\{(\d+)\}|(\d)) ?C ?_ ?(\{\d+\}|\d)": r"\\binom{\1\2}\3",
    r"\\mathrm ?\{ ?C ?\}": "C",
    r"C ?(?:\^ ?\{?(\d+)\}? ?_ ?\{?(\d+)\}?|_ ?\{?(\d+)\}? ?\^ ?\{?(\d+)\}?)": r"\\binom{\2\3}{\1\4}",
    r"(?<![A-Za-z\\])C ?\(([^(),]+),([^(),]+)\)": r"\\binom{\1}{\2}",
    r"\b(\d+) ?(?:C|choose) ?(\d+)\b": r"\\binom{\1}{\2}",
    r"^(?:\\text\{ ?)?[Aa]ll real(?: number)?s?(?= except|\}|$)": r"(-\\infty, \\infty)",
    r"(?<=\)) except(?: for)?(?: ?\})? ?(.+?)\}?$": r"\\setminus\\{\1\\}",
    r"(?<=\\infty\))\}$": "",
    r"(?<=\w)\)?(?: *\\text\{| )*\(?(?:in )?base(?: |\}|\{)*(\d{1,2})[)} ]*$": r"_{\1}",
    r"(?<=\d)(\.\d*)\((\d{1,6})\)": r"\1\\overline{\2}",  # 0.(6)
    r"(?<=[\d)])!=": "! =",
    r"^ ?= ?(?=[^=])": "",
    r"\^ ?(?:\\circ|\{ ?\\circ ?\})": r"\\degree ",
    r"\\degree *(?:\\(?:text|mathrm) *\{ *)?([CF])\b\}?": r"\\text{ degrees \1}",
    r"(:\d\d) ?([AaPp])\.?[Mm]\b": r"\1\\text{ \2m}",
    r"(?<![A-Za-z\\])pi(?![A-Za-z])": r"\\pi ",
    r"(?<=\d) ?\(([A-Za-z]{4,}[A-Za-z ]*)\)\s*$": r" \\text{\1}",  # 18 (eggs)
    r"\b(?:US|HK|NZ|[AC]) ?(?=\\?\$|dollar)": "",
    r"\bRs\.? ?(?=\d)": r"\\rupee ",
    r"\b(sq|cu)\. ?(?=[a-z])": r"\1 ",
    r"(\d ?[ckm]?m)([23])\b": r"\1^\2",
    r"(?<=\w )an? (?=(?:second|minute|hour|day|week|month|year)\b)": "per ",
    r"\\[dtc](?=frac|binom)": r"\\",
    r"(frac|binom) ?(\d) ?(?=[\d{])": r"\1{\2}",  # LaTeX gives \frac12 one digit each
    r"((?:frac|binom)\{\d\})(\d)": r"\1{\2}",
    r"\b(\d+) (\d+) ?/ ?(\d+)\b": r"\1\\frac{\2}{\3}",
    r"(?<![\w.^])(\d{1,3}(?:,\d{3})+|\d+) ?\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}": lambda match: (  # a mixed number
        match.expand(r"{\1+\\frac{\2}{\3}}") if int(match[2]) < int(match[3]) else match.group()
    ),
    r"(\d)[\u0304\u0305\u0307]|\\(?:overset|stackrel) ?\{ ?(?:\.|\\cdot) ?\} ?\{?(\d)\}?": r"\\dot{\1\2}",
    r"(\.\d{0,20}?)(\d{1,12}?)\2{2,20}(?:\.{3}|\\[lc]?dots)": r"\1\\overline{\2}",  # 0.333...
    r"(\.\d+)\.{3}": r"\1\\ldots ",
    r"(?:[, (]|\\q?quad)+[kn] ?(?:\\in|∈) ?\\mathbb ?\{?Z\}?\)?[.$ ]*$": "",  # for every whole k
}


def clean(text: str) -> str:
    """Return one spelling for what is written in many: Unicode, spaces, style, dollars, thousands."""
    if len(text) > 4 * MAX_CHARS:
        return text
    text = unicodedata.normalize("NFKC", respell(text, _BEFORE)).translate(_UNICODE)
    text = respell(text, _SPELLINGS)
    if text.count("$") - text.count("\\$") == 1:  # one dollar sign is money, a pair is mathematics
        text = re.sub(r"(?<!\\)\$", r"\\$", text)
    text = re.sub(r"- ?(\\\$|\\pounds|\\euro|\\yuan|\\rupee)", r"\1-", text)
    return re.sub(r"\s+", " ", trim(re.sub(r"(?<!\\)\$", " ", text)))


def respell(text: str, spellings: dict[str, str]) -> str:
    """Return the text with every pattern of a table replaced, one after the other."""
    for pattern, spelling in spellings.items():
        text = re.sub(pattern, spelling, text)
    return text


def trim(text: str) -> str:
    """Return the text without the emphasis and full stop around it."""
    return text.strip().strip('*_`"').rstrip(".,;:。，").strip('*_`" \t\n')


def is_prose(text: str) -> bool:
    """Return whether there are only words, one of them no product of variables (`ab` is one, `no` and `east` not)."""
    is_words = re.fullmatch(r"[^\W\d_](?:[^\W\d_]|['’ \-])*", text)
    words = [word for word in re.findall(r"[^\W\d_]+", text) if "\\" + word not in FUNCTIONS] if is_words else []
    return any(re.search(r"[^\W\d_]{4}|[eiou]\w|\w[eiou]", word) for word in words)


def unstyled(text: str) -> str:
    r"""Return the text without the \text{} around words."""
    return re.sub(rf"{_WORDS}\s*\{{([^{{}}]*)\}}", r"\1", text)


def plain_words(text: str) -> str:
    r"""Return the text without \text{} around words, case, a leading article and punctuation at its ends."""
    words = re.sub(r"\s+", " ", unstyled(text)).strip(' ."{}').casefold()
    words = words.strip("'") if words[:1] == "'" else words  # B' is not B
    return re.sub(r"^(?:an?|the) (?=\w[\w-])", "", words)


def spell_units(text: str) -> str:
    r"""Return the text with `60 m` as `60\text{ m}`: in plain text, a letter apart from its number may be a unit."""
    return re.sub(r"(?<=\d)(?: ([mgshLNJWVΩ])(?= ?(?:$|[/^]| \d))|([hm])(?= ?\d+ ?[a-z]))", r"\\text{ \1\2}", text)


# ---------------------------------------------------------------- tokens

_ALIASES = _table(
    r"\leq \le;\leqslant \le;<= \le;\geq \ge;\geqslant \ge;>= \ge;\neq \ne"
    r";!= \ne;\lt <;\gt >;\approx =;\lbrace \{;\rbrace \};\cdot *;\times *;\div /"
    r";** ^;\land ,;\lor or;or or;and ,;\langle (;\rangle );\lbrack [;\rbrack ];\colon :;\% %;\varnothing \emptyset"
    r";\bar \overline;\backslash \setminus;\smallsetminus \setminus;to to"
    r";inf \infty;infinity \infty;frac \frac;sqrt \sqrt"
)
_WORDS = r"\\(?:text(?:bf|it|rm|sf|tt|sc|up|normal)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|operatorname\*?)"
_GREEK = set(r"\alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \kappa \lambda \mu \nu \xi".split())
_GREEK |= set(r"\rho \sigma \tau \phi \varphi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Sigma \Phi \Omega".split())
FUNCTIONS = {"\\" + name: name for name in "sin cos tan cot sec csc sinh cosh tanh exp ln".split()}
FUNCTIONS |= _table(r"\log ln;\arcsin asin;\arccos acos;\arctan atan")
_RELATIONS = set(r"= < > \le \ge \ne \in".split())
_SIGNS = _table(r"+ pos;- neg;\pm pm;\mp mp")
_POSTFIXES = _table(r"! fact;% percent;\degree deg")
_SENTENCE = set("is are was the of we if not as so by this that with which since because when where".split())
# Words in front of a value say no more than "=" where they end in one of these and hold none of the hedges.
_VERBS = "is|are|was|were|be|equal|make|have|has|had|get|earn|need|cost|pay|paid|save|spend|sell|take|give"
_SAID = re.compile(
    rf"(?!.*n['’]t)([^-\d\\$(.]*?)(?:\b(?:{_VERBS})s?|:)[\s:]*+((?![^\W\d_]).*)", re.DOTALL | re.IGNORECASE
)
_HEDGES = """or nor and but not no never without except either neither if at than least most less about around over
    above under below between from up approximately almost nearly roughly plus minus negative root twice double triple
    half halves third thirds quarter quarters squared cubed factorial could might may can cannot wrong""".split()
_PARTS = re.compile(".*(?:four|fif|six|eigh|even|nin|ten|twelf|een|tie|red|sand|ion)ths?")
_HAN_HEDGES = set("以多左右余或至约上下倍和与不非")
_UNIT_SPELLINGS = """cm centimeter centimetre 厘米;mm millimeter millimetre 毫米;km kilometer kilometre 千米 公里
;m meter metre 米;in inch inches;ft foot feet;yd yard;mi mile;kg kilogram 千克 公斤;g gram 克;mg milligram
;lb lbs pound gbp;oz ounce;ml milliliter millilitre 毫升;l liter litre 升;gal gallon;s sec second 秒;min minute 分钟
;h hr hrs hour 小时;day 天;week;month;year yr yrs;dollar usd;euro eur;yuan cny rmb 元;yen jpy;rupee inr;cad;aud;chf;hkd
;sgd;krw;cent;degree deg 度;celsius c;fahrenheit f;radian rad;percent pct;am;pm;n newton;j joule;w watt;v volt
;kw kilowatt;kwh;hz hertz;kj kilojoule;cal calorie;kcal;mol mole;ohm Ω"""
_UNITS = {word: group.split()[0] for group in _UNIT_SPELLINGS.split(";") for word in group.split()}
_UNITS |= {word + "s": unit for word, unit in _UNITS.items() if len(word) > 2}
_UNITS |= {"mph": "mi / h", "kph": "km / h", "kmh": "km / h", "per": "/"}
_UNITS |= dict.fromkeys(["square", "sq", "平方"], "square") | dict.fromkeys(["cubic", "cu", "立方"], "cubic")
_UNIT_LETTERS = set("mgshlLNJWVΩ")
_SYSTEMS = """mm 1 cm 10 m 1000 km 1000000;in 1 ft 12 yd 36 mi 63360;s 1 min 60 h 3600 day 86400 week 604800
;month 1 year 12;mg 1 g 1000 kg 1000000;oz 1 lb 16;ml 1 l 1000;cent 1 dollar 100;cent 1 euro 100"""
_SIZES = [dict(zip(line.split()[::2], map(int, line.split()[1::2]), strict=True)) for line in _SYSTEMS.split(";")]
_CURRENCIES = _table(  # £40 and 40 pounds are the same, by weight or not
    r"\$ dollar;\pounds lb;\euro euro;\yuan yuan;\rupee rupee;\cent cent"
    ';"usd dollar;"eur euro;"gbp lb;"cny yuan;"inr rupee'
)
_MONEY = set(_CURRENCIES.values())
_SCALES = dict(hundred=2, thousand=3, million=6, billion=9, trillion=12, 百=2, 千=3, 万=4, 亿=8)  # powers of ten
_TOKEN = re.compile(
    rf"(?P<text>{_WORDS}\s*\{{(?P<words>[^{{}}]*)\}})"
    r"|(?P<repeating>\d*\.\d*(?:\\overline|\\bar|(?:\\dot *(?:\{\d\}|\d)\d*)*\\dot) *(?:\{\d+\}|\d)(?!\d))"
    r"|(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3})?)"
    r"|(?P<environment>\\(?:begin|end)\s*\{[A-Za-z]+\*?\})(?:\{[lcr|]+\})?"
    r"|(?P<letters>[A-Za-z]+)|(?P<han>[一-鿿]+)|(?P<space>\s+)|(?P<symbol>\\(?:[A-Za-z]+|.)|<=|>=|!=|\*\*|.)",
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
            tokens += _word_tokens(match.group("words"), is_first=not tokens)
        elif kind == "letters" and found not in _ALIASES:
            tokens += _letter_tokens(found, follows_word=bool(tokens) and tokens[-1].startswith('"'))
        elif kind == "han":
            tokens += _han_tokens(found, is_first=not tokens)
        elif kind != "space" and not re.fullmatch(_WORDS, found):
            tokens.append(_ALIASES.get(found, found))
    return tokens


def _word_tokens(words: str, is_first: bool) -> list[str]:
    r"""The inside of \text{}: words, a name, or mathematics that was put there, as in \text{2/3}."""
    is_unit = not is_first and re.match(r" +[A-Z]$|\s*[mgshLlNJWV] ?/ ?[A-Za-z]", words)  # 60\text{ K}, 60\text{ m/s}
    words = words.strip()
    lower = words.casefold().strip(" ,")
    said = _SAID.fullmatch(words) if is_first else None
    if said and not _is_hedged(re.findall(r"[^\W\d_]+", said[1].casefold())):
        return _tokens(said[2])
    if joined := re.fullmatch("(?:(.+?) )??(?:(and|or|to|is|are|equals) ?)+", lower):
        sign = _ALIASES.get(joined[2], "=")
        return [*_word_tokens(joined[1], is_first), sign] if joined[1] else [sign]
    if not is_first and re.match("[一-鿿]", words):
        return _han_tokens(words, is_first)
    if len(words) == 1 and words.isalpha():
        return ['"' + words] if is_unit or words in _UNIT_LETTERS else [words]
    if not (is_unit or re.match(r"[^\W\d_]{2,}", words)) or re.search(r"(?<![\w^])\d", words):
        return _tokens(words)
    if words not in _UNITS and "\\" + words in FUNCTIONS:
        return ["\\" + words]
    return ['"' + word for word in lower.split()]


def _is_hedged(words: list[str]) -> bool:
    """Whether a value beside these words is another one, or not certain: `or more`, `thirds`."""
    return not set(words).isdisjoint(_HEDGES) or any(map(_PARTS.fullmatch, words))


def _letter_tokens(letters: str, follows_word: bool) -> list[str]:
    if letters in _SENTENCE:
        raise _Unparsed
    is_function = "\\" + letters in FUNCTIONS
    is_unit = letters.lower() in _UNITS and not (letters.isupper() and len(letters) == 2)
    is_word = is_unit or (follows_word and letters.islower()) or (len(letters) >= 4 and not is_function)
    if is_word and len(letters) > 1:
        return ['"' + letters.lower()]
    return ["\\" + letters] if is_function else list(letters)


def _han_tokens(words: str, is_first: bool) -> list[str]:
    """Chinese after a value: a power of ten, a unit; anywhere else it is a sentence."""
    if is_first or not _HAN_HEDGES.isdisjoint(words):
        raise _Unparsed
    scales = re.match(f"[{''.join(_SCALES)}]*" if words not in _UNITS else "", words).group()  # 千克 is one word
    unit = re.sub("^(平方|立方)(?=.)", r"\1 ", words[len(scales) :])
    return ['"' + word for word in (*scales, unit) if word]


# ---------------------------------------------------------------- grammar
#
# A parsed answer is a tuple that starts with its kind.
# Scalars: ("num", Fraction) ("const", name) ("sym", name) ("call", name, arguments) ("add", *terms) ("mul", *factors)
#   ("pow", base, exponent) ("binom", n, k); of one: neg inv abs fact deg percent sin cos ...
# Others: ("inf",) ("unit", x, unit) ("compound", one unit node for each of its units) ("base", digits, base)
#   ("relation", x, "=", y, "<", z, ...) ("union", items) ("without", x, set) ("bracket", "(", items, "]")
#   ("list", items) ("set", items) ("ratio", items) ("time", items) ("range", items) ("matrix", rows)

SCALARS = {*"num const sym call add mul pow binom neg inv abs fact deg percent".split(), *FUNCTIONS.values()}
INFINITY = ("inf",)
_BASES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()


def parse(text: str, grouped: bool = True) -> tuple | None:
    """Parse a cleaned answer; None outside the grammar. In brackets, or where not `grouped`, 1,234 is two items.

    >>> parse("x = 1,234")
    ('relation', ('sym', 'x'), '=', ('num', Fraction(1234, 1)))
    """
    if grouped and not re.search(r"[(\[]|\\\{", text):
        text = re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)", lambda match: match.group().replace(",", ""), text)
    try:
        parser = _Parser(_tokens(text))
        items = _solutions(parser.items())
    except (_Unparsed, ValueError):
        return None
    return None if parser.token else items[0] if len(items) == 1 else ("list", tuple(items))


class _Parser:
    """Recursive descent; each method reads one level of precedence, the loosest first."""

    def __init__(self, tokens: list[str]):
        self.rest = iter([*tokens, "", ""])
        self.previous, self.token, self.following = "", next(self.rest), next(self.rest)
        self.depth = 0
        self.has_or = False

    def next(self) -> str:
        if not self.token:
            raise _Unparsed
        self.previous, self.token, self.following = self.token, self.following, next(self.rest, "")
        return self.previous

    def take(self, *tokens: str) -> bool:
        """Step over the next token if it is one of these."""
        return self.token in tokens and bool(self.next())

    def expect(self, *tokens: str) -> str:
        if not self.take(*tokens):
            raise _Unparsed
        return self.previous

    def separated(self, read: Callable[[], tuple], *separators: str) -> list[tuple]:
        parts = [read()]
        while self.take(*separators):
            self.take(*separators)  # "5, 6, and 7"
            self.has_or |= self.previous == "or"
            parts.append(read())
        return parts

    def items(self) -> list[tuple]:
        """A statement with plus-minus is two statements."""
        items = self.separated(self.relation, ",", "or")
        items = [one for item in items for one in dict.fromkeys(_with_sign(item, sign) for sign in ("pm", "mp"))]
        if len(items) > MAX_ITEMS:
            raise _Unparsed
        return items if self.has_or else _compounds(items)

    def relation(self) -> tuple:
        parts = [self.union()]
        while self.token in _RELATIONS:
            parts += [self.next(), self.union()]
        return ("relation", *parts) if len(parts) > 1 else parts[0]

    def union(self) -> tuple:
        pieces = self.separated(self.ratio, r"\cup")
        value = ("union", tuple(pieces)) if len(pieces) > 1 else pieces[0]
        if not self.take(r"\setminus"):
            return value
        points = self.ratio()
        return ("without", value, points if points[0] in ("set", "bracket", "union") else ("set", (points,)))

    def ratio(self) -> tuple:
        """Parts that may be reduced; not so in `12:30`, which may be a time, nor in `3 to 4`, which may be a range."""
        parts, kind = [self.compound()], "time"
        while self.take(":", "to"):
            kind = "range" if self.previous == "to" else kind
            kind = "ratio" if kind == "time" and not re.fullmatch(r"\d\d", self.token) else kind
            parts.append(self.compound())
        return (kind, tuple(parts)) if len(parts) > 1 else parts[0]

    def compound(self) -> tuple:
        """One quantity, or `3 hours 20 minutes`."""
        parts = [self.quantity()]
        while parts[-1][0] == "unit" and _is_number(self.token):
            parts.append(self.quantity())
        parts = _compounds(parts)
        if len(parts) > 1:
            raise _Unparsed
        return parts[0]

    def quantity(self) -> tuple:
        """A sum with its currency or unit."""
        currency = _CURRENCIES[self.next()] if self.token in _CURRENCIES else ""
        value = self.sum()
        unit = self.unit() or (_CURRENCIES[self.next()] if not currency and self.token in _CURRENCIES else "")
        unit = f"{currency} {unit}".strip() if not unit or unit[0] == "/" else unit
        if value[0] == "deg":
            return ("unit", value[1], "degree")
        if unit == "percent":
            return ("percent", value)
        if unit and value[0] == "sym" and value[1].isupper():  # a choice has no unit
            raise _Unparsed
        if unit.split(" ")[0] == "dozen":  # 3 dozen eggs are 3, or 36
            return ("compound", (("unit", value, unit), _scaled(value, 12)))
        return ("unit", value, unit) if unit and value[0] in SCALARS else value

    def unit(self) -> str:
        words = []
        while self.token.startswith('"') or self.divides_unit() or (words and self.token in {*"/*^"} | _UNIT_LETTERS):
            token = self.next()
            words += [token, self.subscript()] if token == "^" else re.findall(r"[^\W\d_]+|[^\s\"]", token)
        if _is_hedged(words) and words[1:] not in (["squared"], ["cubed"]):
            raise _Unparsed
        unit = " ".join(_UNITS.get(word, _UNITS.get(word.lower(), word)) for word in words)
        unit = re.sub(r"^(?:square (\w+)|(\w+) squared)", r"\1\2 ^ 2", unit)
        return re.sub(r"^(?:cubic (\w+)|(\w+) cubed)", r"\1\2 ^ 3", unit)

    def divides_unit(self) -> bool:
        """Whether a slash stands before a word: 18 / hour, where `hour` divides nothing."""
        return self.token == "/" and self.following.startswith('"')

    def sum(self) -> tuple:
        terms = [self.signed(self.term)]
        while self.token in _SIGNS:
            terms.append(self.signed(self.term))
        return ("add", *terms) if len(terms) > 1 else terms[0]

    def signed(self, read: Callable[[], tuple]) -> tuple:
        signs = []
        while self.token in _SIGNS:
            signs.append(_SIGNS[self.next()])
        self.depth += len(signs)
        value = read()
        self.depth -= len(signs)
        for sign in reversed(signs):
            value = value if sign == "pos" else (sign, value)
        return value

    def term(self) -> tuple:
        factors = [self.power()]
        while True:
            if self.take("*"):
                factors.append(self.signed(self.power))
            elif not self.divides_unit() and self.take("/"):
                factors.append(("inv", self.signed(self.power)))
            elif self.starts_factor():
                factors.append(self.power())
            else:
                return ("mul", *factors) if len(factors) > 1 else factors[0]

    def starts_factor(self) -> bool:
        """Whether a factor follows without a sign of multiplication; no number follows a number or a letter."""
        if _is_number(self.token):
            return not _is_number(self.previous) and not _is_letter(self.previous)
        starts = ("(", "{", "[", r"\abs", r"\frac", r"\sqrt", r"\pi", r"\binom")
        return self.token in starts or self.token in FUNCTIONS or _is_letter(self.token)

    def power(self) -> tuple:
        value = self.atom()
        for _ in range(4):
            if self.token in _POSTFIXES:
                value = (_POSTFIXES[self.next()], value)
            elif self.token[1:] in _SCALES and not _is_letter(self.previous):
                value = _scaled(value, 10 ** _SCALES[self.next()[1:]])
            elif self.take("^"):
                value = ("pow", value, self.argument())
        return value

    def argument(self) -> tuple:
        """What `^` and `_` take: a group in braces, or one atom with its sign and, in 2^3^2, its own power."""
        powers = [self.signed(self.atom)]
        while self.take("^"):
            self.depth += 1
            powers.append(self.signed(self.atom))
        self.depth -= len(powers) - 1
        return functools.reduce(lambda exponent, base: ("pow", base, exponent), reversed(powers))

    def atom(self) -> tuple:
        self.depth += 1
        token = self.next()
        if self.depth > MAX_DEPTH:
            raise _Unparsed
        if _is_number(token):
            value = ("base", token, self.base()) if self.take("_") else number(token)
        elif token.startswith('"'):
            value = self.words(token)
        elif _is_letter(token):
            value = self.symbol(token)
        elif token in FUNCTIONS:
            value = self.function(FUNCTIONS[token])
        elif token in _READERS:
            value = _READERS[token](self)
        else:
            raise _Unparsed
        self.depth -= 1
        return value

    def symbol(self, name: str) -> tuple:
        """A variable with its subscript and primes; f(x) is a call, where other letters multiply the bracket."""
        while self.token in ("_", "'"):
            name += self.next()
            name += self.subscript() if name.endswith("_") else ""
        if name[0] in "fghFGPQ" and self.token == "(":
            return ("call", name, self.atom())
        return ("const", name) if name in ("i", "e") else ("sym", name)

    def subscript(self) -> str:
        """The tokens of a subscript or of a unit's power, without their braces."""
        if not self.take("{"):
            return self.next()
        inside = ""
        while not self.take("}"):
            inside += self.next()
        return inside

    def base(self) -> str:
        """The subscript 2 of 2, (2), two or base 2."""
        base = re.sub('^"?base|[^0-9A-Za-z]', "", self.subscript())
        return str(_BASES.index(base)) if base in _BASES else base

    def words(self, text: str) -> tuple:
        while self.token.startswith('"'):
            text += " " + self.next()[1:]
        if self.starts_factor() and self.token != "(":  # "about 5 cm" is a sentence
            raise _Unparsed
        return ("sym", text[1:])

    def bracket(self) -> tuple:
        r"""A group; a tuple, interval or set where there is a comma or the ends differ."""
        opening = self.previous
        items = [] if self.token == r"\}" else self.items()
        closing = self.expect(*_CLOSING[opening])
        if len(items) == 1 and opening + closing in ("()", "[]", "{}"):
            is_base = opening != "{" and items[0][0] == "num" and self.take("_")
            return ("base", str(items[0][1]), self.base()) if is_base else items[0]
        return ("set", tuple(items)) if "{" in opening else ("bracket", opening, tuple(items), closing)

    def root(self) -> tuple:
        degree = self.atom() if self.token == "[" else number("2")
        return ("pow", self.atom(), ("inv", degree))

    def function(self, name: str) -> tuple:
        r"""Without brackets of the factors up to the next sign, bracket or function: \sin 2x \cos x."""
        base = self.argument() if name == "ln" and self.take("_") else None
        exponent = self.argument() if self.take("^") else None
        is_group = self.token in ("(", "{")
        factors = [self.atom() if is_group else self.signed(self.power)]
        while not is_group and self.starts_factor() and self.token not in {*FUNCTIONS, *"(["}:
            factors.append(self.power())
        x = ("mul", *factors) if len(factors) > 1 else factors[0]
        value = ("mul", (name, x), ("inv", (name, base))) if base else (name, x)
        return ("pow", value, exponent) if exponent else value

    def matrix(self) -> tuple:
        end = self.previous.replace("begin", "end")
        rows = self.separated(lambda: tuple(self.separated(self.quantity, "&")), "\\\\")
        self.expect(end)
        return ("matrix", tuple(rows))


_CLOSING = {"(": ")]", "[": ")]", "{": "}", r"\{": [r"\}"]}
_READERS = {
    **dict.fromkeys(_CLOSING, _Parser.bracket),
    r"\overline": lambda parser: ("sym", "bar " + parser.subscript()),
    r"\sqrt": _Parser.root,
    r"\abs": lambda parser: ("abs", parser.atom()),
    r"\binom": lambda parser: ("binom", parser.atom(), parser.atom()),
    r"\frac": lambda parser: ("mul", parser.atom(), ("inv", parser.atom())),
    r"\pi": lambda _: ("const", "pi"),
    r"\infty": lambda _: INFINITY,
    r"\emptyset": lambda _: ("set", ()),
    r"\mathbb": lambda parser: ("sym", "set " + parser.subscript()),
    **{
        f"\\begin{{{kind}}}": _Parser.matrix
        for kind in "matrix pmatrix bmatrix Bmatrix vmatrix smallmatrix array".split()
    },
}


def _is_number(token: str) -> bool:
    return token[:1].isdigit() or (len(token) > 1 and token[0] == ".")


def _is_letter(token: str) -> bool:
    return token in _GREEK or bool(re.fullmatch("[A-Za-zα-ωΑ-Ω]", token))


def number(text: str) -> tuple:
    r"""Return the node of a decimal, which may repeat: 0.1\overline{6}."""
    fixed, _, repeating = text.partition("\\")
    value = Fraction(fixed + "0" * (fixed[-1] == "."))
    if digits := re.sub(r"\D", "", repeating):
        n_fixed = len(fixed.partition(".")[2])
        value += Fraction(int(digits), 10**n_fixed * (10 ** len(digits) - 1))
    return ("num", value)


def _compounds(items: list[tuple]) -> list[tuple]:
    """The items with each `5 feet, 6 inches`, large to small in units of one kind, as one sum in each of its units."""
    groups = []
    for item in items:
        units = [groups[-1][-1][2], item[2]] if groups and groups[-1][-1][0] == item[0] == "unit" else []
        if units and (conversion(*units) or 0) > 1:
            groups[-1].append(item)
        else:
            groups.append([item])
    return [
        ("compound", tuple(_summed(group, part[2]) for part in group)) if len(group) > 1 else group[0]
        for group in groups
    ]


def _summed(parts: list[tuple], unit: str) -> tuple:
    terms = [_scaled(value, conversion(own, unit)) for _, value, own in parts]
    are_numbers = all(term[0] == "num" for term in terms)
    return ("unit", ("num", sum(term[1] for term in terms)) if are_numbers else ("add", *terms), unit)


def _scaled(value: tuple, factor: int | Fraction) -> tuple:
    """The product; of a number it is a number, no sum that is left to do."""
    return ("num", value[1] * factor) if value[0] == "num" else ("mul", value, ("num", Fraction(factor)))


def conversion(unit: str, other: str) -> Fraction | None:
    """Return how many of the other unit one unit is; None for units of different kinds."""
    sizes = next((sizes for sizes in _SIZES if unit in sizes and other in sizes), None)
    return Fraction(sizes[unit], sizes[other]) if sizes else None


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


def is_name(node: tuple | None) -> bool:
    """Return whether this is a variable, f(x), a tuple or ratio of names, or capitals side by side as in AB."""
    match node:
        case ("sym", _) | ("call", *_):
            return True
        case ("bracket", "(", items, _) | ("ratio", items):
            return all(map(is_name, items))
        case ("mul", *factors):
            return all(factor[0] == "sym" and factor[1].isupper() for factor in factors)
    return False


def _with_sign(node, plus: str):
    """A tree that takes one sign of every plus-minus."""
    if not isinstance(node, tuple):
        return node
    parts = tuple(_with_sign(part, plus) for part in node)
    if parts and parts[0] in ("pm", "mp"):
        return parts[1] if parts[0] == plus else ("neg", parts[1])
    return parts


def variables(node) -> set[tuple]:
    """Return the variables and calls of functions in a tree or a tuple of trees."""
    if not isinstance(node, tuple):
        return set()
    own = {node} if node[:1] in (("sym",), ("call",)) else set()
    return own.union(*map(variables, node))


def are_unlike(unit: str, other: str) -> bool:
    """Return whether two known units differ; the `per hour` of money may be left out."""
    rate, other_rate = unit.split(" / "), other.split(" / ")
    if rate[0] in _MONEY and 1 in (len(rate), len(other_rate)):
        unit, other = rate[0], other_rate[0]
    return unit != other and is_known_unit(unit) and is_known_unit(other)


def is_known_unit(unit: str) -> bool:
    """Return whether the unit, or the first word of `km / h`, is in the table of spellings."""
    return unit.split(" ")[0] in set(_UNITS.values()) - {"/"}
