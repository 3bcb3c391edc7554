"""Supervised fine-tuning: files become token sequences with a loss mask (their loss: gradient.py).

A model learns what it would have had to sample. The prompt of a chat's answer is rendered and encoded as it is for
sampling, the answer is encoded apart from it, as sampled ids begin anew there, and the stop token that ends a turn is
learned with it. The answer never passes through the chat template, which may strip its thinking (DeepSeek-R1-Distill,
Qwen3); thinking that stands in a field beside it is written before it. DeepSeek-R1 (2501.12948, section 2.3) learns its
cold start and its rejection-sampled answers this way.

Special tokens spelled out in an answer stay mere text, so no line can end a turn within it or begin another; added
tokens that are not special (Qwen3's `<think>`) are what they are in sampling. In the messages of a prompt they count,
as for the sampler (see Tokenizer.apply_chat_template): strip untrusted text first.

Left out: loss weights within an example, tools, loss on the user's turns, packing that fills batches to the brim.
"""

import functools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from nanor1.gradient import Example
from nanor1.tasks.problems import is_in_share, prefilled, read_json_lines
from nanor1.tokenizer import Tokenizer

Element = TypeVar("Element")  # an example, or anything else
Source = tuple[Sequence[Element], float]  # what a file holds, and how often an epoch has it
THINKING = ("reasoning_content", "reasoning", "thinking")  # fields of a message beside its content
TAG = re.compile("</?think>")
# fields of a message that hold words to learn, and not as one of these texts does
UNLEARNED = tuple(
    "tool_calls function_call refusal reasoning_details thinking_blocks thinking_content reasoning_text thought "
    "thoughts chain_of_thought cot analysis".split()
)
NO_PLACE_FOR_SYSTEM = "expected messages, before which a system message can stand, found a plain 'prompt'"
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Examples:
    """What can be learned from a file, and what was left out of it."""

    examples: list  # of Example, or of reward_model.Pair
    n_too_long: int = 0  # examples not there
    n_rewritten: int = 0  # earlier assistant turns without a loss: in the prompt the template shows them otherwise
    n_cut: int = 0  # documents that are several examples
    n_equal: int = 0  # pairs not there: their two final answers are the same, which says nothing about a preference
    n_beside: int = 0  # lines with thinking beside their messages, which may be no more than a label: not learned
    n_not_train: int = 0  # lines that say of themselves that their problem is not of the `split` "train"


# ---- examples from JSON lines


def read_examples(
    path: str | Path,
    tokenizer: Tokenizer,
    max_tokens: int,
    template_arguments: dict[str, object] | None = None,
    system: str = "",
) -> Examples:
    """Read JSON lines of `messages` (chat), or of `prompt` and `completion` (text); other fields are ignored.

    Messages: a loss on the last one, which is the assistant's, and on its earlier ones that stand in the last one's
    prompt token for token as they would have been sampled; what the assistant thought (see `said`) is part of it.
    `template_arguments` are variables of the chat template, `system` is put before messages without a system message.
    Text: a loss on the completion and the end-of-text token. Examples longer than `max_tokens` are left out and
    counted. ValueError names file, line and fault.
    """
    write = partial(tokenizer.apply_chat_template, add_generation_prompt=True, **(template_arguments or {}))

    def to_example(row: dict) -> tuple[Example, int, bool, bool]:
        """An example, and what of it adds to n_rewritten, n_beside and n_not_train."""
        is_not_train = row.get("split") not in (None, "train")
        if "messages" not in row:
            if system:
                raise ValueError(NO_PLACE_FOR_SYSTEM)
            return _text_example(row, tokenizer), 0, False, is_not_train
        _check_messages(messages := row["messages"])
        is_beside = _thinking_beside(row, " ".join(map(said, messages))) is not None
        return *_chat_example(with_system(messages, system), tokenizer, write), is_beside, is_not_train

    found = read_json_lines(path, to_example)
    kept = [(example, n) for example, n, *_ in found if len(example.ids) <= max_tokens]
    if not kept:
        raise ValueError(f"{path}: all of its {len(found)} examples are longer than {max_tokens} tokens; allow more")
    return Examples(
        [example for example, _ in kept],
        n_too_long=len(found) - len(kept),
        n_rewritten=sum(n for _, n in kept),
        n_beside=sum(is_beside for *_, is_beside, _ in found),
        n_not_train=sum(is_not_train for *_, is_not_train in found),
    )


def _text_example(row: dict, tokenizer: Tokenizer) -> Example:
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion.strip():
        raise ValueError(
            "expected 'messages', or texts 'prompt' and (non-empty) 'completion', "
            f"found prompt {prompt!r:.60} and completion {completion!r:.60} (fields: {', '.join(row)})"
        )
    if beside := _thinking_beside(row, completion):
        raise ValueError(f"expected all words to learn in 'completion', found others in {beside!r}; join them")
    before = [*_text_start(tokenizer), *tokenizer.encode(prompt)]
    answer = [*tokenizer.encode(completion), text_end(tokenizer)]
    return _example(before + answer, [False] * len(before) + [True] * len(answer), prompt.strip())


def _thinking_beside(row: dict, learned: str) -> str | None:
    """The field of the line itself that holds thinking which is not among what is learned."""
    found = {name: row[name] for name in THINKING if isinstance(row.get(name), str | list | dict) and row[name]}
    return next((n for n, text in found.items() if not isinstance(text, str) or text.strip() not in learned), None)


def _chat_example(messages: list[dict], tokenizer: Tokenizer, write: Callable) -> tuple[Example, int]:
    """The example, and how many of the assistant's earlier turns got no loss."""

    def turn(i: int) -> tuple[list[int], list[int]]:
        """The prompt at which a sampler would have begun message `i`, and the ids it would have made."""
        prompt = write(messages[:i])
        answer = continuation(prompt, said(messages[i]))
        return tokenizer.encode(prompt, allow_special=True), [*tokenizer.encode(answer), turn_end(tokenizer)]

    before, answer = turn(len(messages) - 1)
    is_target, n_rewritten = [False] * len(before) + [True] * len(answer), 0
    for i, message in enumerate(messages[:-1]):
        if message["role"] == "assistant":
            start, made = turn(i)
            end = len(start) + len(made)
            if before[:end] == start + made:
                is_target[len(start) : end] = [True] * len(made)
            else:
                n_rewritten += 1
    return _example(before + answer, is_target, first_question(messages)), n_rewritten


def _example(ids: list[int], is_target: list[bool], question: str = "") -> Example:
    if len(ids) < 2:
        raise ValueError("expected a text of at least one token, found none that this tokenizer knows")
    return Example(ids, [False, *is_target[1:]], question)


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"expected 'messages': a list of messages, found {messages!r:.60}")
    for n, message in enumerate(messages, 1):
        if not is_message(message):
            raise ValueError(f"expected texts 'role' and 'content', found {message!r:.60} as message {n}")
        if message["role"] != "assistant":
            continue
        if not message["content"].strip():
            raise ValueError(f"expected the assistant to say something, found message {n} without content")
        if thought_in(message) and TAG.search(message["content"] + thought_in(message)):
            raise ValueError(f"expected thinking in a field of its own or in tags, found both in message {n}")
        if unlearned := [name for name in UNLEARNED if message.get(name)]:
            raise ValueError(f"expected texts to learn, found {unlearned[0]!r} in message {n}, which cannot be learned")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"expected the last message to be the assistant's, found role {messages[-1]['role']!r}")
    if messages[0]["role"] == "assistant":
        raise ValueError("expected a message for the assistant to answer, found the assistant's first")


def is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def is_chat(messages: object) -> bool:
    return isinstance(messages, list) and bool(messages) and all(map(is_message, messages))


def thought_in(message: dict) -> str:
    """What the assistant thought, from the one of the fields THINKING that has a text; "" if none has."""
    found = {name: message[name] for name in THINKING if message.get(name) is not None}
    if wrong := [name for name, thought in found.items() if not isinstance(thought, str)]:
        raise ValueError(f"expected a text {wrong[0]!r} in a message, found {found[wrong[0]]!r:.60}")
    thoughts = {thought.strip(): thought for thought in found.values() if thought.strip()}
    if len(thoughts) > 1:
        raise ValueError(f"expected one text of what was thought, found different ones in {' and '.join(found)}")
    return next(iter(thoughts.values()), "")


def said(message: dict) -> str:
    """All that the assistant wrote; thinking that has a field of its own as DeepSeek-R1 and Qwen3 write it.

    >>> said({"role": "assistant", "content": "4", "reasoning_content": "2 + 2"})
    '<think>\\n2 + 2\\n</think>\\n\\n4'
    """
    thought, content = thought_in(message).strip("\n"), message["content"]
    return f"<think>\n{thought}\n</think>\n\n" + content.lstrip("\n") if thought else content


def with_system(messages: list[dict], system: str) -> list[dict]:
    """The messages behind a system message of this text, if there is one and they have none of their own."""
    has_own = any(message["role"] == "system" for message in messages)
    return messages if has_own or not system else [{"role": "system", "content": system}, *messages]


def first_question(messages: list[dict]) -> str:
    return next((message["content"].strip() for message in messages if message["role"] == "user"), "")


def continuation(prompt: str, response: str) -> str:
    """What is left to write of a response where the prompt may end in an opened `<think>`: the tag is not repeated.

    >>> continuation("Assistant: <think>\\n", "<think>\\nTwo. </think> 2"), continuation("Assistant:", "<think> 2")
    ('Two. </think> 2', '<think> 2')
    """
    opened, blanks = prefilled(prompt), prompt[len(prompt.rstrip()) :]
    if not opened or not response.lstrip().startswith(opened):
        return response
    return response.lstrip().removeprefix(opened).removeprefix(blanks)


def turn_end(tokenizer: Tokenizer) -> int:
    """The token that the chat template writes behind an answer, else the end-of-text token."""
    if tokenizer.turn_end_id is None:
        return text_end(tokenizer)
    tokenizer.check_rows([tokenizer.turn_end_id])
    return tokenizer.turn_end_id


def text_end(tokenizer: Tokenizer) -> int:
    """The token that ends a plain text: the tokenizer's own, else the first on which sampling stops."""
    ends = [i for i in (tokenizer.eos_id, *tokenizer.declared_stop_ids, *tokenizer.stop_ids) if i is not None]
    if not ends:
        raise ValueError("the tokenizer has no token that ends a text; name an eos_token in its files")
    tokenizer.check_rows(ends[:1])
    return ends[0]


def _text_start(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_id] if tokenizer.adds_bos else []


# ---- examples from plain text


def read_text(path: str | Path, tokenizer: Tokenizer, max_tokens: int) -> Examples:
    """Documents to learn whole, as in pretraining: a .jsonl file has a `text` a line, any other file is one document.

    A document longer than `max_tokens` is cut into examples (see `cut`) and counted. ValueError names file, line and
    fault.
    """

    def to_ids(row: dict) -> list[int]:
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"expected a non-empty 'text', found {text!r:.60} (fields: {', '.join(row)})")
        ids = [*_text_start(tokenizer), *tokenizer.encode(text), text_end(tokenizer)]
        return _example(ids, [True] * len(ids)).ids

    if Path(path).suffix == ".jsonl":
        documents = read_json_lines(path, to_ids)
    else:
        try:
            documents = [to_ids({"text": Path(path).read_text(encoding="utf-8")})]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as plain text ({error})") from error
    pieces = [piece for ids in documents for piece in cut(ids, max_tokens)]
    examples = [Example(ids, [False] + [True] * (len(ids) - 1)) for ids in pieces]
    return Examples(examples, n_cut=sum(len(ids) > max_tokens for ids in documents))


def cut(ids: list[int], max_tokens: int) -> list[list[int]]:
    """Pieces of 2 to `max_tokens` tokens. Each begins with the last token of the one before: all but the first of all
    are then learned, each once.

    >>> cut([1, 2, 3, 4, 5, 6], 3)
    [[1, 2, 3], [3, 4, 5], [5, 6]]
    """
    return [ids[start : start + max_tokens] for start in range(0, len(ids) - 1, max_tokens - 1)]


# ---- several files, epochs, what is held out


def parse_data(text: str) -> list[tuple[str, float]]:
    """Paths and weights of `a.jsonl:3,b.jsonl`; without a number behind its last colon a path has weight 1.

    >>> parse_data("a.jsonl:3,C:/b.jsonl,c.jsonl:0.5")
    [('a.jsonl', 3.0), ('C:/b.jsonl', 1.0), ('c.jsonl', 0.5)]
    """
    sources = []
    for part in map(str.strip, text.split(",")):
        path, colon, number = part.rpartition(":")
        if not colon or not NUMBER.fullmatch(number):
            path, number = part, "1"
        if not path:
            raise ValueError(f"data {part!r} names no file; expected FILE or FILE:WEIGHT, separated by commas")
        if not 0 < float(number) < float("inf"):
            raise ValueError(f"the weight of {path} is {number}; it must be above 0, as in {path}:0.5")
        sources.append((path, float(number)))
    return sources


def sample_examples(sources: Sequence[Source], n: int, seed: int, step: int) -> list:
    """The `n` examples of update `step` (from 0), which follow from the arguments alone: a resumed run sees the same.

    They are the next ones of an endless sequence of epochs. In an epoch, shuffled over all sources, each example of a
    source of weight 2.3 comes twice, and 0.3 of them once more: another 0.3 in the next epoch, until all had their
    turn. What a source holds are examples, or anything else.
    """
    sizes, per_epoch = _sizes(sources), examples_per_epoch(sources)
    chosen: list[tuple[int, int]] = []
    while len(chosen) < n:
        epoch, start = divmod(step * n + len(chosen), per_epoch)
        chosen += _epoch(sizes, seed, epoch)[start : start + n - len(chosen)]
    return [sources[source][0][i] for source, i in chosen]


def examples_per_epoch(sources: Sequence[Source]) -> int:
    """How many examples an epoch has; ValueError for a weight so small that it takes none of its source."""
    return sum(n_taken for _, n_taken in _sizes(sources))


def _sizes(sources: Sequence[Source]) -> tuple[tuple[int, int], ...]:
    """How many examples each source has, and how many an epoch takes of them."""
    sizes = tuple((len(items), round(weight * len(items))) for items, weight in sources)
    for (n_there, n_taken), (_, weight) in zip(sizes, sources, strict=True):
        if n_taken == 0:
            raise ValueError(f"weight {weight:g} takes none of a file's {n_there} examples; give it a larger one")
    return sizes


@functools.lru_cache(maxsize=2)  # the updates of an epoch share it
def _epoch(sizes: tuple[tuple[int, int], ...], seed: int, epoch: int) -> list[tuple[int, int]]:
    """Source and index of each example of an epoch, in its order."""
    chosen = []
    for source, (n_there, n_taken) in enumerate(sizes):
        times, rest = divmod(n_taken, n_there)
        order = list(range(n_there))
        random.Random(f"share {seed} {source}").shuffle(order)
        chosen += [(source, i) for i in order * times]
        chosen += [(source, order[(epoch * rest + j) % n_there]) for j in range(rest)]
    random.Random(f"epoch {seed} {epoch}").shuffle(chosen)
    return chosen


def question(example: Example) -> str | list[int]:
    """What an example answers: its question as tasks/problems.py has it; of a text without one the ids before its first
    target, all of them where there is one such id at most."""
    if example.question:
        return example.question
    n_before = example.is_target.index(True)
    return example.ids[:n_before] if n_before > 1 else example.ids


def split(
    items: Sequence[Element], share: float, key: Callable[[Element], object] = question
) -> tuple[list[Element], list[Element]]:
    """(to train on, held out): a hash of `key(item)` that never changes holds out about this share.

    Items of the same key, all answers to a question, come to the same side, in whichever file they are: the side that
    nanor1/tasks/problems.py gives a problem of this text. Either side can come out empty.
    """
    sides: tuple[list, list] = [], []
    for item in items:
        sides[is_in_share(str(key(item)), share)].append(item)
    return sides
