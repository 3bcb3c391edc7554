"""Talk to a model: an answer printed as it is made, or a conversation line by line.

stdout holds what the model wrote and nothing else (and titles, where there are several answers); on a terminal its
thinking is dimmed, unless NO_COLOR is set. Everything else goes to stderr. Ctrl-C ends an answer where it is. In a
conversation the cache is kept: a turn reads only what is new since the last whole answer.

Left out: tools, files, saved conversations.
"""

import contextlib
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass

from nanor1.sampler import Kept
from nanor1.search.asking import Asker, check_room
from nanor1.tasks.problems import Problem, format_prompt, prefilled
from nanor1.tasks.prompts import Prompt, Prompter, render

Messages = list[dict[str, str]]  # {"role", "content"} each, as Tokenizer.apply_chat_template takes them
INTERRUPTED = "stopped by Ctrl-C"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt, and why it ended."""

    text: str  # with a `<think>` that the prompt wrote for it, without the stop token; empty: nothing was said
    ending: str
    kept: Kept | None = None  # the cache of the prompt and it, if it was asked for and not stopped


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- a conversation


def converse(asker: Asker, messages: Messages, seed: int) -> None:
    """Answer line by line after these messages; with a chat template the model sees what was said before, as text."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines and recalls them; not there on Windows
    has_history = asker.prompter.template == "chat"
    if not has_history:
        say("every line is a prompt of its own: without a chat template there is no conversation")
    say("Ctrl-C stops an answer; an empty line or Ctrl-D ends the conversation")
    kept = None
    while line := read_line():
        asked = [*messages, {"role": "user", "content": line}]
        try:
            first, *_ = answer(asker, asked, seed, keep=True, behind=kept)
        except ValueError as error:  # an unknown word, or a conversation longer than the context
            say(f"error: {error}")
        except KeyboardInterrupt:  # before the answer began, or twice: where nothing waits for it
            say(INTERRUPTED)
        else:
            kept = first.kept or kept
            # The whole answer: where a model is not to see its earlier thinking (DeepSeek-R1, Qwen3), its chat template
            # leaves out what stands before `</think>`. A turn without an answer would teach it to say nothing.
            if has_history and first.text:
                messages = [*asked, {"role": "assistant", "content": first.text}]
        seed += 1


def read_line() -> str:
    """The next line; empty at the end of the input."""
    while True:
        say("")
        try:
            mark = "> " if sys.stdout.isatty() else ""  # input() shows it on stdout, and into a file it must not go
            print("" if mark else "> ", end="", file=sys.stderr, flush=True)
            return input(mark).strip()
        except KeyboardInterrupt:
            say("\n(an empty line or Ctrl-D ends)")
        except UnicodeDecodeError as error:
            say(f"error: the line is not UTF-8 text ({error})")
        except EOFError:
            say("")
            return ""


# ---- a prompt and its answers


def answer(asker: Asker, messages: Messages, seed: int, keep: bool = False, behind: Kept | None = None) -> list[Answer]:
    """Sample n answers to the last message and print them, the first as it is made; Ctrl-C ends them where they are.

    With `keep` the answers have their caches, unless they are stopped; what is kept `behind` the messages is not read
    again. ValueError for an empty prompt, and for one that leaves no room to answer.
    """
    text, prompt_ids = prompt = write_messages(messages, asker.prompter)
    if any(message["role"] == "assistant" for message in messages):
        check_room("the conversation", prompt_ids, asker.sampler, "say less, or begin a new one")
    else:
        check_room("the prompt", prompt_ids, asker.sampler)
    start_s = time.monotonic()
    ids_G: list[list[int]] = [[] for _ in range(asker.n)]
    kept_G: list[Kept | None] = [None] * asker.n
    with contextlib.closing(Printer(asker, text, 0)) as printer, contextlib.suppress(KeyboardInterrupt):

        def hear(_: int, index: int, token: int) -> None:
            ids_G[index].append(token)
            if index == 0:
                printer.push(token)

        how = asker.prompter.stops | asker.sampling
        (made_G,) = asker.sampler.generate(
            [prompt_ids], n=asker.n, seed=seed, on_token=hear, keep=keep, behind=[behind], **how
        )
        kept_G = [made.kept for made in made_G]
    wall_s = time.monotonic() - start_s
    for index in filter(ids_G.__getitem__, range(1, asker.n)):  # all, but where Ctrl-C came first
        with contextlib.closing(Printer(asker, text, index)) as printer:
            for token in ids_G[index]:
                printer.push(token)
    answers = [to_answer(ids, prompt, asker, kept) for ids, kept in zip(ids_G, kept_G, strict=True)]
    n_tokens, endings = sum(map(len, ids_G)), Counter(made.ending for made in answers)
    why = ", ".join(ending if asker.n == 1 else f"{count} {ending}" for ending, count in endings.items())
    speed = f"{n_tokens} tokens in {wall_s:.1f} s, {n_tokens / wall_s:.1f} tokens/s"
    say(f"{speed}, after a prompt of {len(prompt_ids)}; {why}")
    return answers


def write_messages(messages: Messages, prompter: Prompter) -> Prompt:
    """The text that the model sees and its ids; the user's text may hold special tokens, and they count as such."""
    last = messages[-1]["content"]
    if not last.strip():
        raise ValueError("the prompt is empty; give it as an argument or on stdin")
    if prompter.template == "chat":
        return render(messages, prompter.tokenizer, prompter.arguments)
    text = format_prompt(Problem(last, "", "prompt"), prompter.template)
    return render(text, prompter.tokenizer, allow_special=True)


def to_answer(ids: list[int], prompt: Prompt, asker: Asker, kept: Kept | None) -> Answer:
    """What was made, and why it ended there."""
    tokenizer, context = asker.tokenizer, asker.sampler.model.config.max_position_embeddings
    is_whole = bool(ids) and ids[-1] in tokenizer.stop_ids
    text, ending = tokenizer.decode(ids[:-1] if is_whole else ids), INTERRUPTED
    if is_whole:
        ending = f"ended by {tokenizer.decode(ids[-1:])}"
    elif held := [stop_text for stop_text in asker.prompter.stop_texts if stop_text in text]:
        ending = f"ended by --stop-text {held[0].strip() or repr(held[0])}"
    elif len(ids) == asker.sampling["max_new_tokens"]:
        ending = f"cut off by --max-new-tokens {len(ids)}"
    elif len(prompt[1]) + len(ids) == context:
        ending = f"cut off: the model's context of {context} is full"
    return Answer(prefilled(prompt[0]) + text if text else "", ending, kept)


# ---- printing


class Printer:
    """Writes an answer to stdout as its ids arrive, without the stop token; on a terminal the thinking is dimmed.

    Where there are several, each stands under its title.
    """

    def __init__(self, asker: Asker, prompt_text: str, index: int):
        self.stop_ids, self.stream = asker.tokenizer.stop_ids, asker.tokenizer.stream()
        is_plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR")
        self.dimmer = None if is_plain else Dimmer(bool(prefilled(prompt_text)))
        if asker.n > 1:
            print(f"--- answer {index + 1} of {asker.n}", flush=True)

    def push(self, token: int) -> None:
        if token not in self.stop_ids:
            self.write(self.stream.push(token))

    def write(self, text: str) -> None:
        print(self.dimmer.push(text) if self.dimmer else text, end="", flush=True)

    def close(self) -> None:
        self.write(self.stream.flush())
        print(self.dimmer.flush() if self.dimmer else "", flush=True)


class Dimmer:
    """Dims text from `<think>` to `</think>`; what may be the start of a tag is held back until it is known."""

    def __init__(self, is_thinking: bool):
        self.is_thinking, self.held = is_thinking, ""
        self.start = DIM if is_thinking else ""  # before the first text

    def push(self, text: str) -> str:
        """The text to print now, with the terminal's codes in it."""
        self.held += text
        painted, self.start = self.start, ""
        while (tag := "</think>" if self.is_thinking else "<think>") in self.held:
            before, _, self.held = self.held.partition(tag)
            painted += before + (tag + PLAIN if self.is_thinking else DIM + tag)
            self.is_thinking = not self.is_thinking
        n_held = max(n for n in range(len(tag)) if self.held.endswith(tag[:n]))
        end = len(self.held) - n_held
        painted, self.held = painted + self.held[:end], self.held[end:]
        return painted

    def flush(self) -> str:
        return self.held + (PLAIN if self.is_thinking else "")
