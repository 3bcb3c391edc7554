r"""Find the final answer in a response: `extract_answer`.

It looks, after `</think>`, for `\boxed{}`, an `<answer>` block, GSM8K's `####`, a phrase such as "the answer is" or
"故选", and falls back on what the last sentence states. compare.py says whether it is the gold answer.

No answer is cut out of something longer: what stands together in a sentence (9π, 2^10, (5, 18), 7:30, 3 hours 20
minutes, more than 18, A or B) is found together. "about 18" says 18; "at least 18", "twice 9" and "5 or 18" something
else. Of a sentence without a marker a result counts ("= 18") before other numbers, a conclusion ("so") before reasons
("because"), and what is stated before circumstances ("for 7 days"). Of "the mean is 2 and the median is 4" neither is
the answer. Questions, offers, checks and code behind the answer do not count. A last sentence that breaks off, or says
that the answer cannot be known, states none.
"""

import functools
import re

from nanor1.grading import latex

MAX_TAIL_CHARS = 50_000  # of a response, from its end, that are searched for an answer
MAX_BOXES = 16
MAX_MARKERS = 8  # that say "the answer is", or ####
MAX_SENTENCE_CHARS = 500

_Span = tuple[int, int]  # where a value starts and ends in a sentence


def extract_answer(text: str) -> str | None:
    r"""Return the final answer of a response as it is written there, or None where there is none.

    Thinking that never closes leaves no answer. Of several boxes the last is the answer, unless only "and", "or" or
    commas stand between them: then it is their list; an empty box is none. Below a box a line "#### 18" or "Answer: C"
    has the last word; a letter may name what is in the box. Only the last `MAX_TAIL_CHARS` characters are read.

    >>> extract_answer(r"<think>so \boxed{1}?</think> It is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    visible = text.rpartition("</think>")[2]
    if "<think>" in visible:
        return None
    visible = _RESIDUE.sub("", visible[-MAX_TAIL_CHARS:])
    boxed, end = _last_boxes(visible)
    if boxed:
        return _below_a_box(boxed, visible[end:])
    _, opened, block = visible.rpartition("</answer>")[0].rpartition("<answer>")
    text = block.strip() if opened else visible
    return _after_a_marker(text) or _fall_back(text) or (text if opened else None) or None


def unmarked(text: str) -> str:
    """Return an answer out of its box or from behind ####, in one spelling."""
    if "\\boxed" in text or "\\fbox" in text:
        text = _last_boxes(text[-MAX_TAIL_CHARS:])[0] or text
    return latex.clean(text.rpartition("####")[2].strip())


def _pattern(text: str) -> re.Pattern:
    """Compile a pattern without its line breaks; ‹a, b› is either of the words, apart from other letters."""
    text = re.sub("‹.*?›", lambda words: re.sub(r",\s+", "|", words.group()), text, flags=re.DOTALL)
    text = text.replace("‹", "(?<![A-Za-z])(?:").replace("›", ")(?![A-Za-z])")
    return re.compile(re.sub(r"\n\s*", "", text), re.IGNORECASE)


# ---------------------------------------------------------------- marked answers

_LETTER = r"[*({\[]*(?-i:[A-J])[*)}\]]*(?![\w'’^=])"  # of a choice; B' and B = 2 are none
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;&.，、；和或与及]|\\[\\,;()\[\]]|\\q?quad|\\(?:text|mbox)\{\s*(?:and|or),?\s*\}|and|or|as well as"
    r"|[A-Za-z](?:_\{?\w\}?)?\s*=|(?<=\n)\s*(?:[-•]|\(?[b-h2-9][.)]|Part \w+:)|(?<=and )the \w+ is)*"
)
# GSM8K's <<9*2=18>>, special tokens, the end of a proof
_RESIDUE = re.compile(r"<<[^<>\n]{0,100}>>|<\|[^|>\n]{0,30}\|>|</s>|\$?\\(?:blacksquare|qed)\b\$?|[■∎]")
_PLACEHOLDER = re.compile(r"(?:\\[cl]?dots|\\square|\\text|\W|_|(?:your |final )?answer(?: here)?)*", re.IGNORECASE)
_BEFORE_A_MARKER = _pattern(r"[\s*_>【\[故]*(?:the )?(?:final |correct )?")
_MARKER = _pattern(
    # ####; the answer is, answer: and the like, or "answer" as a heading; what is said of this answer is another thing
    r"#{4,}|(?<![/\w])(?<!this )(?<!that )answer[\s*_\"']*"
    r"(?:‹is, are, of, equals, becomes, (?:would|will|should|must) (?:be|equal)›|[:=：→—–]|(?=[$\\])|\n)[\s*_\"':：]*"
    r"|\b(?:choose|pick|select|go with|opt for|(?:choice|option)(?: is|:)|matches)\s+"
    rf"(?:option\s+|choice\s+)?(?={_LETTER})"
    rf"|答案[*_]*(?:[】\]:：=为是选应]|\s)+|答[:：]|选(?:项|择)?[是为:：\s]*(?=[*({{\[]*[A-J])"
)


def _last_boxes(text: str) -> tuple[str | None, int]:
    """The contents of the last boxes, and where the last of them ends."""
    contents, start, last_end = [], len(text), 0
    for box in reversed(list(_BOX.finditer(text))[-MAX_BOXES:]):
        end, inside = _box_contents(text, box.end())
        if not inside or end > start:  # cut off, empty, or around the box just read
            continue
        if contents and not _BETWEEN_BOXES.fullmatch(text, end, start):
            break
        start, last_end = box.start(), last_end or end
        contents.insert(0, inside)
    return ", ".join(contents) or None, last_end


def _box_contents(text: str, at: int) -> tuple[int, str | None]:
    bare = re.compile(r" *([^\s${}\\]*\d[^\s${}\\]*|[A-J](?!\w))").match(text, at)  # "in a \boxed for you" is prose
    if bare:
        return bare.end(), latex.trim(bare.group(1))
    opened = re.compile(r" *\{").match(text, at)
    depth = 0
    for brace in re.compile(r"\\[{}]|[{}]").finditer(text, at) if opened else ():
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            inside = text[opened.end() : brace.start()].strip()
            return brace.end(), inside if "∅" in inside or not _PLACEHOLDER.fullmatch(inside) else None
    return at, None


def _below_a_box(boxed: str, below: str) -> str:
    for line in reversed(below.splitlines()[-20:]):
        marker = _MARKER.match(line, _BEFORE_A_MARKER.match(line).end())
        answer = _leading(_prose(line[marker.end() :][:MAX_SENTENCE_CHARS])) if marker else None
        if answer and re.fullmatch("[A-J]", answer) and len(re.sub(r"\\text\w*|\W", "", boxed)) > 1:
            return f"({answer}) {boxed}"  # the letter of what is in the box
        if answer:
            return answer
    return boxed


def _after_a_marker(text: str) -> str | None:
    """The answer behind the last #### or "the answer is" that an answer follows; else what is said behind the last."""
    said = None
    for marker in reversed(list(_MARKER.finditer(text))[-MAX_MARKERS:]):
        rest = text[marker.end() :][:MAX_SENTENCE_CHARS]
        line = rest.split("\n")[0]
        if marker.group()[0] == "#":  # a heading, where no answer follows at once
            words = _prose(line)
            is_heading = re.match(r"\d+[.)]\s+[A-Z]", words) or _REMARK.search(words)
            answer = None if is_heading else _leading(words)
            if not answer and not text[marker.end() + len(line) :].strip():
                said = said or _fall_back(line.strip())
        else:
            bold = re.findall(r"\*\*([^*\n]+)\*\*", line)
            sentence = next(iter(_sentences(rest)), "")
            answer = _leading(_prose(bold[0])) if len(bold) == 1 else None
            if not answer and re.search(r"\bwait\b|\bactually\b", rest, re.IGNORECASE):
                answer = _last_stated(rest)
            if not answer and sentence:
                answer = _leading(sentence) or (_fall_back(rest) if "\n" in marker.group() else _find(sentence))
                said = said or (sentence if len(sentence.split()) <= 8 else None)
        if answer:
            return answer
    return said or None


# ---------------------------------------------------------------- a response without a marker

_OFFER = _pattern("(?m)^.*‹let me know, would you like, feel free›")
_CUT_OFF = _pattern(r"‹the, (?-i:an?), of, to, and, we, is, are, has, for, by, with, from, than›$|(?:\s[-+/×=]|\()$")
_REFUSAL = _pattern(
    r"\b(?:cannot|can['’]t|unable to|impossible to) (?:be (?:known|found|[a-z]+ed)|determine|solve|answer|tell|say)\b"
    "|not enough (?:information|data)|无法|没有说明|请补充"
)
_REMARK = _pattern(  # a sentence that states no answer: a check, a note, a wish, a part of it, a question
    r"""^\W*(?:we can |let['’]?s |let us |let me |to )?(?:verif|check|double|confirm|indeed|compared? )
    |^\W*‹tip, note, sources?, 点睛, 点评›|‹hope (?:this|that|it)›
    |^‹of (?:these|those|them|which), (?:this|which) (?:matches|satisfies|agrees|makes sense)›
    |^‹is, are, do, does, did, can, could, what, how, why, which, who›.*\?$"""
)


def _fall_back(text: str) -> str | None:
    """A response without a marker: all of it if it is an answer, else the choice it starts with or its last value."""
    first = _prose(text[:200].strip().split("\n")[0])
    is_whole = _is_value(first) or (len(first.split()) == 1 and latex.is_prose(unmarked(first)))
    if is_whole and "\n" not in text.strip():
        return latex.trim(_undelimited(first))
    choice = _LEADING_CHOICES.match(first)
    if choice and not choice.group("more") and (answer := _leading(first)):
        return answer
    text = text[-4 * MAX_SENTENCE_CHARS :]
    text = _OFFER.split(text)[0].rstrip("-*_# \n") or text
    said = re.sub(r"```.*?(?:```|$)", "\n", text, flags=re.DOTALL)
    return _last_stated(said) or (_last_stated(text) if said != text else None)


def _last_stated(text: str) -> str | None:
    """What the last sentence states that states something."""
    sentences = _sentences(text[-2 * MAX_SENTENCE_CHARS :])
    if not sentences or _CUT_OFF.search(text.rstrip()[-20:]) or _REFUSAL.search(sentences[-1]):
        return None
    if named := re.fullmatch(r"\D*\b(?:is|was|on|an?|the) ([A-Z][a-z]+)", sentences[-1]):  # So it falls on a Tuesday
        return named.group(1)
    stating = [sentence for sentence in sentences if not _REMARK.search(sentence)]
    return next(filter(None, map(_find, reversed(stating))), None)


# ---------------------------------------------------------------- sentences in one spelling

_FORMULA = (
    r"\$\$(?:[^$\\]|\\.){1,1000}\$\$|\\\[.{1,1000}?\\\]|\\\(.{1,500}?\\\)"
    r"|(?<!\\)\$(?!\d[^$]*(?<!\{) [a-z]{2,}[ ,])(?:[^$\n\\]|\\.){1,500}\$(?!\d)"  # not "$5 and they pay $"
)
_SENTENCE = re.compile(
    rf"(?:{_FORMULA}|\([^()\n]{{0,100}}\)|[^\n.!?]"
    r"|(?<=approx)\.|(?<=i\.e)\.|(?<=Rs)\.|\.(?!\s|$)|[!?](?!\s*$|\s+[A-Z]|\s*\n))+",
    re.DOTALL,
)
_CJK = r"[\u3400-\u9fff]"
_WIDE = {0xFF01 + i: chr(0x21 + i) for i in range(94)} | str.maketrans(
    {"，": ", ", "、": ", ", "；": "; ", "。": ". ", "：": ":", "（": "(", "）": ")", "！": "! ", "【": " ", "】": " "}
)
_LINES = {
    r"\\(?:begin|end)\{(?:align|gather|equation|split|multline)\w*\*?\}(?:\{\w*\})?": "\n",
    r"&(?=\s*(?:=|<|>|\\[lg]eq?|\\[RrLlIe]))|(?<==)\s*&": " ",  # where lines are aligned
    r"(?<=[\w})])(\.\$\$?)(?=\s)|(\.\s*\\[\])])": r"\1\2\n",  # a formula with a full stop ends a sentence too
}
_PLAIN = {
    r"\\(?:boxed|fbox)\b\s*(?:\{\W*\})?": "",  # empty, or only named
    "[₀-₉]+": r"_\g<0>",
    r"(?<![\w)\]}*])\*{1,3}(?=[^\s*])|(?<=[^\s*])\*{1,3}(?![\w(\[{*\\])": "",  # emphasis, not 2*3
    r"`|</?\w{1,8}>|(?<!\w)__?(?=\w)|(?<=\w)__?(?![\w{(\\])": "",
    rf"(?<={_CJK})(?=[^\s\u3400-\u9fff])|(?<=[^\s\u3400-\u9fff])(?={_CJK})": " ",
    r"(?<=[a-z])\s*\$\^\{?(\d)\}?\$": r"^\1",  # cm$^2$
    r"(?<![\d)}$] )\b(?:minus|negative) (?=[\d$\\])": "-",
    rf"(?s:\s*({_FORMULA})\s*)": r" \1 ",
    r"(?<=\d) and (?:a|one)[ -]half\b": " 1/2",
    r"\s*负\s*(?=[\d$\\])": " -",
    r"\s*\(\s*(?!舍)([\u3400-\u9fff]{1,3})\s*\)": r" \1",  # 12 (个)
    r"^(?:[-•>] )+(?=\S)": "",
    r"(?<=\d)/-": "",  # Rs. 8,000/-
    r"(?<=[A-Za-z]:)(?=\d)": " ",  # Total:5
    r"(?<![\w^.\\{])(\d[\d.,]*)([mghslL])(?=[\s.,;!?]|$)(?!\s*[-=+*/^<>])": r"\1 \2",  # 540m
    r"(?<=[\d$)}A-J]) (?:或者?) (?=[-\d$(A-J])": " or ",
}


def _sentences(text: str) -> list[str]:
    """Sentences in one spelling: they end at a line break or a full stop that is no decimal point, not in a formula."""
    text = latex.respell(re.sub(r"．(?!\d)", ". ", text).translate(_WIDE), _LINES)
    sentences = ((_prose(found.group()), text[found.end() : found.end() + 1]) for found in _SENTENCE.finditer(text))
    return [words + "?" * (end == "?") for words, end in sentences if words]


def _prose(text: str) -> str:
    """Without emphasis and end marks; Chinese words and formulas stand apart."""
    text = latex.respell(text.translate(_WIDE), _PLAIN)
    return latex.trim(text.strip().strip("\"'“”").rstrip("!?"))


def _undelimited(text: str) -> str:
    """The inside of one formula; anything else as it is."""
    found = re.fullmatch(r"\$\$?([^$]+)\$\$?|\\[(\[]((?:(?!\\[(\[]).)+)\\[)\]]", text.strip(), re.DOTALL)
    return (found[1] or found[2]).strip() if found else text.strip()


# ---------------------------------------------------------------- what a sentence states

_LEADING_CHOICES = re.compile(  # A; or more of them: A and C
    rf"{_LETTER}(?P<more>(?:\s*(?:[,/&]|\b(?:or|and|possibly|maybe|perhaps)\b|或|和))+\s*{_LETTER})*"
    rf"(?=[.,:;]|(?<=[)\]}}])\s|\s+(?:because|since|as|is)\b|\s+[—–-]\s|\s*$|\s*{_CJK})"
)
_ONE_CHOICE = _pattern(r"(?:(?:choice|option|answer)\s*)?[\s({\[*:]*([A-J])[\s)}\]*.:,]*")
_LABELLED = re.compile(  # (B) 17, B: 17, B. heat flows, b) 17; not A: B
    r"(?:(?:[Cc]hoice|[Oo]ption|[Aa]nswer) *)?\(?([A-J]|(?<!\()[a-j](?=\) ))(?:\) *:? *|[:.、][ *]*)"
    r"(?!(?<!\) )[A-J]\b|[A-J]\b(?! =)|(?:and|or|nor|is|are|was)\b|- )"  # (B) or (C), (A) - 3; but (C) F = ma
    r"((?:[\w$({[\"']|\\(?!cup|cap|le|ge|ne|in\b)|(?<= )-).*)"
)
_EXPLAINED = re.compile(  # B (heat flows)
    r"([A-J]) *(?:[-—,] *|\()(?!(?:and|or|nor|but|maybe|perhaps)\b)([A-Za-z][a-z][^()]*)\)?"
)
_TWO_LABELS = re.compile(r"\([A-J]\)|\b[A-J](?: ?[):]|\. )|(?<![(\w])[a-j]\)|\b(?:and|or) [A-J]\b")
_ASIDE_IN_BRACKETS = re.compile(
    r"\s+\((?!or\b)[^()]*(?:[^\W\d_]{3}|[\u3400-\u9fff]|\d *[x×*] *\d|[=$%])[^()]*\)$"
)  # 18 (eggs), 18 (3 x 6)
_LIGHT = _pattern(  # adds nothing to the value that follows
    r"(?:‹approximately, about, around, just, the, an?, total, of, equals?, to, x, 约, 大约, 共, 为, 是›?[\s.:=~≈]*)*"
)
_NEGATION = _pattern(  # what follows is not the answer, or as in Step 2 and May 5 only a name
    r"""‹not, [a-z]+n['’]t, cannot, never, anything but, no longer, rul(?:es?|ed|ing) out, (?:eliminat|exclud)[a-z]+,
    rather than, instead of, 不是, 并非, 不选, 排除›
    (?: (?:be|have|equal|get|need|cost|take))?[\s,:]*(?:the |option |choice |just |equal to )*$
    |‹step, part, case, example, problem, question, solution, method, section, figure, 第›\s*$
    |\b(?:jan|feb|mar|apr|may|june?|july?|aug|sep|oct|nov|dec)[a-z]*\.? $"""
)
_REJECTED = _pattern(
    r"\s*(?:‹(?:is|are|was|were) (?:not|incorrect|wrong|false)›"
    r"|(?:[二两三四]?项|选项|都|均|\s)*(?:不正确|错)|\(?[^()]*舍去)"
)
_ASIDE = _pattern(  # a reason or a comparison follows, or as in 12 fruits: 5 apples and 7 pears the parts
    r"""(?<!and )‹since, because, indeed, where, of which, (?<=,\s)who(?:se)?, 因为, 由于, 其中, including,
    not counting, consisting of, made up of, namely, (?:down|up) from, vs, 此时, (?<=,\s)当›
    |: (?=[^=\d]*\d[\d.]*[^=\d]*(?:,|\band\b|\bat\b)[^=\d]*\d)
    |(?<=,) (?=\S+ (?:of whom|of which|more than|fewer than|less than))"""
)
_CONCLUSION = _pattern(  # the answer follows, as it does behind a clause at the start: If he pays 5, ...
    r"""‹so, thus, hence, therefore, leav(?:es|ing), mean(?:s|ing), for a total, becomes, gives?, yields?,
    round(?:s|ed)?(?: up| down)? to, simplif(?:ies|y) to, 所以, 因此, 故, 当[^,]*,›
    |^‹if, since, as, when, after, because, given, assuming, between, in, for›[^,]*,"""
)
_CIRCUMSTANCES = _pattern(  # what follows says when, where, how often, of what; not how many
    r"""(?:‹(?<!results )(?<!resulting )in, for, at, when, from, per, every, before, within, during, until,
    on(?: day)?, over, by, between, among, into, than, using, (?<!left )with, after(?: [a-z]+ing)?,
    to [a-z]+(?: [^ ,]+){0,5}, of(?= (?:the|these|those|all|her|his|their|its) ), (?:each|out) of›
    |[\d.)$](?: \w+){0,2} of)(?: ‹the[a-z]*, those, an?, all, each, every, her, his, its, year›)*\s*$"""
)
_PRICE = _pattern(r"‹at, from, than, of, with, vs›\.?(?: the| an?)?\s*$")
_QUALIFIER = _pattern(  # another value is meant than the one that follows
    r"""‹(?:[a-z]+ )?than, at (?:least|most), over, under, above, below, exceed[a-z]*, twice, double, half(?: of)?,
    (?:root|thirds?|quarters?|fifths?|tenths?|multiple|power) of, divisible by, (?:raised|minutes|close) to, minimum,
    (?<!round )(?<!rounds )(?<!rounded )up to, 超过, [大小多少]于, 至[少多][^0-9 ,]{0,4}›(?: or equal to)?\s*$"""
)
_QUALIFIED = _pattern(  # or than the one that stands in front
    r"""\s*(?:\+|‹(?:or|and) (?:more|less|fewer|greater|higher|above|below|up), at (?:least|most), 以[上下]›
    |[多余来成]|的倍数|plus$|choose\b|\(?mod\b|squared\b|cubed\b|to the (?:power|\d)|,? (?:wait|no),
    |(?:more|less|fewer) than [\d$]|\(?,?\s?(?:or|maybe|possibly|perhaps) (?:possibly |maybe |perhaps )?[-$]?\d
    |[^.]*‹otherwise, depending on›)"""
)
_HEDGED = _pattern(r"‹otherwise›|\bif\b[^\d]{0,60}\d[^.]{0,60}\bif\b")
_SUMMED = _pattern("‹total, sum, so, altogether, all, then, leaving, which, that, 共›")
_ARROW = re.compile(r"\\(?:[Ll]ong)?[Rr]ightarrow|\\implies|\\therefore|[⇒→∴]")


def labelled(text: str) -> tuple[str, str]:
    """Return the letter of a choice and the text or value beside it, if any; without a letter "" and all the text."""
    if choice := _ONE_CHOICE.fullmatch(latex.plain_words(text)):
        return choice.group(1).upper(), ""
    plain = re.sub(r"^\{(.*)\}$", r"\1", latex.unstyled(text)).strip()
    explained = _EXPLAINED.fullmatch(plain)
    if explained and latex.is_prose(explained[2]) and not re.search(r"\b[A-J]\b", explained[2]):
        return explained[1], explained[2]
    labelled = _LABELLED.fullmatch(plain)
    if not labelled or _TWO_LABELS.search(labelled[2]) or (plain[1] == "." and len(labelled[2]) == 1):  # i. e.
        return "", text
    return labelled[1].upper(), labelled[2]


def _leading(words: str) -> str | None:
    """The answer that words start with: a choice, all of them as a value, or a value before the rest."""
    choice = _LEADING_CHOICES.match(words)
    if choice and not _REJECTED.match(words, choice.end()):
        letter, content = labelled(words)
        if letter and _is_value(content):
            return words
        return latex.trim(choice.group()) if choice.group("more") else re.search("[A-J]", choice.group()).group()
    plain = _ASIDE_IN_BRACKETS.sub("", words)
    return _undelimited(plain) if _is_value(plain) else _find(words, only_leading=True)


def _find(sentence: str, only_leading: bool = False) -> str | None:
    """The value or choice that a sentence states; with `only_leading` the one that it starts with, if any."""
    found = _joined(sentence, _values(sentence))
    found = [(a, b) for a, b in found if not _before(_NEGATION, sentence, a) and not _REJECTED.match(sentence, b)]
    if only_leading:
        found = [span for span in found[:1] if _LIGHT.fullmatch(sentence, 0, span[0])]
    else:
        found = _main(sentence, found)
    if found and _HEDGED.search(sentence):
        return sentence
    return _written(sentence, *found[-1]) if found else None


def _before(pattern: re.Pattern, sentence: str, at: int) -> re.Match | None:
    return pattern.search(sentence, max(0, at - 100), at)


def _main(sentence: str, found: list[_Span]) -> list[_Span]:
    """What the main clause states: no reason, nor the 7 of "18 dollars for 7 days", where there is something else."""
    if aside := _ASIDE.search(sentence):
        found = [span for span in found if span[0] < aside.start()] or found
    for conclusion in reversed(list(_CONCLUSION.finditer(sentence))):
        if after := [span for span in found if span[0] >= conclusion.end()]:
            found = after
            break
    main, computed = [], []
    for span in found:
        before, value = sentence[: span[0]].rstrip(), sentence[slice(*span)]
        is_money = re.match(r"[$€£¥][^$]*$", value) and not _before(_PRICE, sentence, span[0])
        if is_main := is_money or not _before(_CIRCUMSTANCES, sentence, span[0]):
            main.append(span)
        if "=" in before[-1:] + value and (is_main or _form(value) != "assignment"):  # not "at x = 2"
            computed.append(span)
    stated = computed or main or found
    if len(stated) > 1 and _are_alike(sentence, *stated[-2:]):
        return [(stated[-2][0], stated[-1][1])]
    return stated


def _are_alike(sentence: str, first: _Span, second: _Span) -> bool:
    """Whether the same is said of two things: the mean is 2 and the median is 4; 12 for Ann and 15 for Bob."""
    between = sentence[first[1] : second[0]]
    if not re.search(r"\b(?:and|while|but)\b|[,;]", between) or _SUMMED.search(between):
        return False
    ends = [re.search(r"([\u3400-\u9fff]|(?<![^\W\d_])[A-Za-z]+)\W*$", sentence[:at]) for at in (first[0], second[0])]
    words = [end[1] if end else "" for end in ends]
    is_one_verb = words[0] == words[1] != "" and not re.fullmatch("at|in|on|to|from|by|of|after|with", words[0])
    is_for_each = all(re.match(r"[^.,\d]*? for\b", sentence[at:]) for at in (first[1], second[1]))
    are_names = all(word[:1].isupper() for word in words) and re.fullmatch(r"\s*[,;]?(?: and)? [A-Z]\w+ ", between)
    are_names = are_names or re.fullmatch(r"(?: \w+)? and [A-Z]\w+ ", between)
    return bool(is_one_verb or is_for_each or are_names)


def _written(sentence: str, start: int, end: int) -> str:
    """The value there as it is written, with its unit or "more than"; of a calculation the result: 7 of 10 - 3 = 7."""
    qualifier, qualified = _before(_QUALIFIER, sentence, start), _QUALIFIED.match(sentence, end)
    unit = re.compile(r"\s*([百千]?[万亿]|[^\s,.;:!?(]+)").match(sentence, end)
    has_unit = unit and _is_measure(unit.group(1))
    start = qualifier.start() if qualifier else start
    end = qualified.end() if qualified else unit.end() if has_unit else end
    stated = latex.trim(sentence[start:end])
    stated = re.sub(_FORMULA, lambda found: _undelimited(found.group()), stated, flags=re.DOTALL)
    stated = latex.trim(_ARROW.split(stated)[-1].lstrip("= "))
    left, _, right = stated.rpartition("=")
    has_names = re.search(r"(?<![^\W\d_])[^\W\d_](?![^\W\d_])|\\", re.sub(r"(?<=\d) ?[xX] ?(?=[\d$])", "*", left))
    is_worked_out = (re.search(r"\d", right) and not has_names) or (_is_value(right) and not _is_value(stated))
    stated = right.strip() if is_worked_out and not _n_open(left) else stated
    return re.sub(r"^\(([A-J])\)$|(?<=\d)-[A-Za-z]{2}.*", r"\1", stated)


# ---------------------------------------------------------------- the values in a sentence

_PIECE = re.compile(rf"{_FORMULA}|\S+", re.DOTALL)
_FUNCTION = "sin|cos|tan|log|ln|exp|sqrt"
_BARE_WORD = re.compile(rf"(?<![\\A-Za-z{{])(?!(?:{_FUNCTION}|pi|or|and)\b)[^\W\d_]{{2,}}")
_WORDS_FIRST = re.compile(rf"[^\d\\$(\[{{=]*?{_BARE_WORD.pattern}(?![^\W\d_])(?!\s*[-=+*/^(_])")
_KINDS = {  # of words and formulas, brackets whole: the first that fits
    r"[-+−–=<>≤≥×*·÷/^±≈∪∈:→&]|\\\\": "O",  # an operator
    r"(?:\$\$?|\\[(\[])\W*[A-Za-df-hj-z]\W*": "L",  # a letter, but e and i are values
    rf"{_FORMULA}|[$€£¥]\d.*": "D",
    r"\([A-J]\)": "C",  # a choice in brackets
    r"[A-Za-zα-ω]": "B",  # a letter that may be a choice
    r"[$€£¥]?[\d.,]*\d-[A-Za-z]{2}.*": "H",  # as in "a 5-day trip"
    rf"\([\d.]+ ?\\?%\)|[(\[{{].*?{_BARE_WORD.pattern}.*": "W",  # a word, or said again: 17/50 (34%)
    r"[-+−–±=<>≤≥]?[(\[{|]*[-+−–±~≈]?(?:[$€£¥₹]\s?[-−]?)?"  # mathematics
    rf"(?:\d|\.\d|[√π∞∅%°$]|(?:{_FUNCTION}|infinity)(?![a-z])|\\[A-Za-z(\[{{$%|]).*"
    r"|[-+−±]?[(\[{|]*[-−]?[A-Za-zα-ωΑ-Ω](?:[\^_=<>+*/(!|≤≥]|[-−](?:\d|\w\b)).*": "M",
}
_KINDS = {re.compile(pattern, re.DOTALL): kind for pattern, kind in _KINDS.items()}
_FACTORS = "(?:L(?=O[MLDmld])|[MD])(?:O[MLD]|M)*(?:O[mld]|m)?"
_RUN = f"^O{_FACTORS}|{_FACTORS}|[mdCc]"  # of the letters in _values: one value
_JOINED = re.compile(r"(?:\s*[^\s,.;]+)?[\s,]*(?:\b(?P<or>and/or|or)\b|\band\b|[&/]|或者?|和|与|以及)\s*")
_SIGN_BETWEEN = re.compile(  # 2 cups + 3
    r"\s*(?:times|plus|minus|choose|to the|percent of|(?:divided|multiplied) by|[^\d.,;:()]{0,30}[-+*/×÷=])\s*"
    r"|.*\s\(?[b-h]\)\s*"
)
_SAID = _pattern("‹is, are, was, were, be, has, have, had, gets?, needs?, between, both, of, [是为有]›|[=:]")


def _values(sentence: str) -> list[_Span]:
    """The spans of mathematics; without any, the 5 of "a 5-day trip", or a letter that may be a choice.

    They are found as runs of letters that stand for `_KINDS` of words and formulas, small at a clause's end.
    """
    spans, are_closed = [], _n_open(sentence) <= 0
    for start, end in (piece.span() for piece in _PIECE.finditer(sentence)):
        if spans and are_closed and _n_open(sentence[slice(*spans[-1])]) > 0:
            spans[-1] = spans[-1][0], end
        else:
            spans.append((start, end))
    kinds = "".join(_kind(sentence, span, i + 1 == len(spans)) for i, span in enumerate(spans))
    kinds = re.sub("(?<=M)[LB](?=[Mm])", "O", kinds)  # 3 x 4
    for pattern in (_RUN, "[Hh]", "[Bb]"):
        if runs := list(re.finditer(pattern, kinds)):
            return [(spans[run.start()][0], _end(sentence, spans[run.end() - 1])) for run in runs]
    return []


def _n_open(text: str) -> int:
    return sum(map(text.count, "([{")) - sum(map(text.count, ")]}"))


def _end(sentence: str, span: _Span) -> int:
    start, end = span
    core = sentence[start:end].rstrip(".,;:?\"'”")
    while _n_open(core) < 0 and core[-1:] in ")]}":
        core = core[:-1]
    return start + len(core)


def _kind(sentence: str, span: _Span, is_last: bool) -> str:
    end = _end(sentence, span)
    core, stops = sentence[span[0] : end], end < span[1]
    kind = next((kind for pattern, kind in _KINDS.items() if pattern.fullmatch(core)), "W")
    if kind == "B":
        is_article = core in "AI" and not (stops or is_last or re.match(r"\s+(?:is|or|and)\b", sentence[end:]))
        is_name = core not in "ABCDEFGHIJ" or is_article or re.match(r"\s*[=<>+*/^]", sentence[end:])
        kind = "L" if is_name else "B"
    return kind.lower() if stops else kind


def _joined(sentence: str, found: list[_Span]) -> list[_Span]:
    """Values that are said as one: 5 or 18; 2, 3 and 5; 3 hours 20 minutes; not again: 60 cm (0.6 m), 1/36, or 2.8%."""
    joined, last = [], None
    for span in found:
        between = sentence[last[1] : span[0]] if last else ""
        is_in_brackets = sentence[span[0]] == "(" and re.fullmatch(r"\s+[^\W\d]+\.? ", between)
        if is_in_brackets or re.fullmatch(r",? or (?:about|approximately|roughly) ", between):
            continue
        if last and _belongs_to(sentence, joined[-1][0], last, span):
            joined[-1] = joined[-1][0], span[1]
        else:
            joined.append(span)
        last = span
    return joined


def _belongs_to(sentence: str, first: int, last: _Span, span: _Span) -> bool:
    """Whether a value is part of the one that starts at `first` and ends with the part `last`."""
    between = sentence[last[1] : span[0]]
    unit = re.fullmatch(r"\s*([^\s,.;:]+),?\s+(?:and\s+)?", between)
    if unit and (_is_measure(unit[1]) or re.fullmatch(_CJK + "{1,2}", unit[1])):
        return True
    is_change = re.search(r"\b(?:from|by|up|down|add|adding)\W*$", sentence[:first])
    if _SIGN_BETWEEN.fullmatch(between) or (between == " to " and not is_change):
        return True
    forms = {_form(sentence[slice(*last)]), _form(sentence[slice(*span)])}
    if len(forms) > 1 or forms == {"statement"}:  # a result and a further one
        return False
    if between.strip() == "," and re.match(r"\s*(?:[,.;]|and\b|or\b|$)", sentence[span[1] :]):
        return True
    word = _JOINED.fullmatch(between)
    is_first = not sentence[:first].strip()
    # rows 2 and 10 are only named beside each other
    return bool(word and (word.group("or") or is_first or _before(_SAID, sentence, span[0])))


def _form(text: str) -> str:
    """A value (or an inequality), an assignment such as x = 5, or any other statement."""
    if not re.search(r"=|∈|\\in\b", text):
        return "value"
    is_assignment = re.match(r"[\W_]*(?:[A-Za-z](?:_\{?\w+\}?)?|\([a-z, ]+\))\s*=[^=∈]*$", text)
    return "assignment" if is_assignment else "statement"


def _is_value(text: str) -> bool:
    """Whether the text can be read as mathematics, and is no sentence that could be so by chance ("so 5" is s o 5)."""
    cleaned = unmarked(text)
    words = [word for word in _BARE_WORD.findall(cleaned) if not _is_measure(word)]
    is_sentence = len(words) > 1 or _WORDS_FIRST.match(cleaned)
    return bool(cleaned) and not is_sentence and latex.parse(cleaned) is not None


@functools.lru_cache(1000)
def _is_measure(word: str) -> bool:
    """Whether the word is a known unit or scale: hours, percent, million; not "in" or "per"."""
    node = latex.parse(unmarked("1 " + word)) if len(word) <= 20 and word not in ("in", "per") else None
    if node is None or node[0] == "unit":
        return node is not None and latex.is_known_unit(node[2])
    return node[0] != "relation" and not latex.variables(node)
