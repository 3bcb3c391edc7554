"""chat.py: what is printed where, what a model sees of a conversation, and what Ctrl-C ends."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vocabularies import of_bytes

from nanor1 import chat
from nanor1.chat import INTERRUPTED, Answer, Dimmer, answer, converse
from nanor1.model import ModelConfig, Transformer
from nanor1.sampler import Completion, Sampler
from nanor1.search.asking import Asker
from nanor1.tasks.prompts import Prompter

TEMPLATES = Path(os.environ.get("NANOR1_SHARED", "")) / "conformance" / "tokenizers" / "templates"
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "<assistant>{% if think %}<think>\n{% endif %}"
)
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
END = "<|endoftext|>"


class Scripted:
    """In place of a sampler: says these texts, one a call, and keeps the prompts and arguments it was called with."""

    def __init__(self, tokenizer, *texts, context=1000):
        self.tokenizer, self.texts, self.calls = tokenizer, list(texts), []
        self.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=context))

    def generate(self, prompts, *, on_token, **arguments):
        self.calls.append({"text": self.tokenizer.decode(prompts[0]), **arguments})
        before, event, _ = self.texts.pop(0).partition("^C")
        for index in range(arguments["n"]):
            for token in self.tokenizer.encode(before, allow_special=True):
                on_token(0, index, token)
        if event:
            raise KeyboardInterrupt
        return [[Completion([], [], "stop")] * arguments["n"]]


def new_asker(sampler, prompter, sampling, **arguments):
    """A model that is there already, as one that was read."""
    asker = Asker(None, None, None, prompter, sampling, **arguments)
    vars(asker)["sampler"] = sampler
    return asker


def speaker(*texts, chat_template=TEMPLATE, context=1000, template_arguments=None, stop_texts=(), **arguments):
    tokenizer = of_bytes(chat_template=chat_template)
    prompter = Prompter(tokenizer, "chat" if chat_template else "bare", template_arguments or {}, stop_texts=stop_texts)
    arguments = {"sampling": {"max_new_tokens": 500}} | arguments
    return new_asker(Scripted(tokenizer, *texts, context=context), prompter, **arguments)


def ask(talker, text="Hi", seed=0):
    return answer(talker, [{"role": "user", "content": text}], seed)


@pytest.fixture
def terminal(monkeypatch):
    """stdout is a terminal, and nobody asked for plain text; to be entered by the test, in which pytest sets stdout."""

    def enter():
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.delenv("NO_COLOR", raising=False)

    return enter


@pytest.fixture
def type_lines(monkeypatch):
    """Set what will be typed: an exception is what the reading raises; Ctrl-D is typed at the end."""

    def set_lines(*lines):
        typed, shown = iter([*lines, EOFError]), []

        def type_line(mark):
            shown.append(mark)
            line = next(typed)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", type_line)
        return shown

    return set_lines


def turns(talker):
    """What the model saw at each turn."""
    return [call["text"] for call in talker.sampler.calls]


# ---- printing


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    "is_thinking, text, painted",
    [
        (False, "a <think>b</think> c", "a \x1b[2m<think>b</think>\x1b[0m c"),
        (True, "b < </thin </think>c", "\x1b[2mb < </thin </think>\x1b[0mc"),
        (False, "a < b <thinking> <thi", "a < b <thinking> <thi"),
        (False, "<think>b", "\x1b[2m<think>b\x1b[0m"),
    ],
)
def test_thinking_is_dimmed_however_the_text_is_cut(is_thinking, text, painted, size):
    dimmer = Dimmer(is_thinking)
    pieces = [dimmer.push(text[i : i + size]) for i in range(0, len(text), size)]
    assert "".join([*pieces, dimmer.flush()]) == painted


@pytest.mark.parametrize(
    "think, text, painted",
    [
        (False, "<think>so</think>4", f"{DIM}<think>so</think>{PLAIN}4"),
        (True, "so</think>4", f"{DIM}so</think>{PLAIN}4"),  # the template wrote the tag
        (False, "4", "4"),
    ],
)
def test_thinking_is_dimmed_on_a_terminal_and_nothing_is_added_elsewhere(
    capsys, monkeypatch, terminal, think, text, painted
):
    terminal()
    talker = speaker(*[text + END] * 3, template_arguments={"think": think})
    ask(talker)
    assert capsys.readouterr().out == painted + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    ask(talker)
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    ask(talker)
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("event", [KeyboardInterrupt, ValueError("nan")])
def test_a_terminal_is_left_plain_whatever_ends_the_thinking(capsys, monkeypatch, terminal, event):
    terminal()
    talker = speaker("<think>so")
    generate = talker.sampler.generate

    def broken(*arguments, **options):
        generate(*arguments, **options)
        raise event

    monkeypatch.setattr(talker.sampler, "generate", broken)
    if event is KeyboardInterrupt:
        ask(talker)
    else:
        with pytest.raises(ValueError, match="nan"):
            ask(talker)
    assert capsys.readouterr().out == f"{DIM}<think>so{PLAIN}\n"


def test_the_last_line_counts_the_tokens_of_all_answers_and_those_of_the_prompt_apart(capsys, monkeypatch):
    monkeypatch.setattr(chat.time, "monotonic", iter([10.0, 12.0]).__next__)
    answers = ask(speaker("four" + END, n=2))
    assert answers == [Answer("four", f"ended by {END}")] * 2
    prompt = len("<user>Hi<assistant>")  # a byte a token
    out, err = capsys.readouterr()
    assert out == "--- answer 1 of 2\nfour\n--- answer 2 of 2\nfour\n"
    assert err == f"10 tokens in 2.0 s, 5.0 tokens/s, after a prompt of {prompt}; 2 ended by {END}\n"


# ---- what the model sees


def test_the_sampler_gets_the_seed_and_the_sampling_arguments_and_the_template_its_own():
    sampling = {"max_new_tokens": 7, "temperature": 0.5}
    talker = speaker("4" + END, sampling=sampling, template_arguments={"think": True})
    ask(talker, seed=11)
    (call,) = talker.sampler.calls
    assert (call["text"], call["seed"], call["n"]) == ("<user>Hi<assistant><think>\n", 11, 1)
    assert (call["max_new_tokens"], call["temperature"]) == (7, 0.5)


@pytest.mark.parametrize("think, made", [(False, "<think>so</think>4"), (True, "so</think>4")])
def test_a_conversation_keeps_whole_answers_with_a_tag_that_the_prompt_wrote(type_lines, think, made):
    talker = speaker(made + END, "5" + END, template_arguments={"think": think})
    type_lines("One", "Two")
    converse(talker, [{"role": "system", "content": "Be brief."}], seed=3)
    first, second = turns(talker)
    tail = "<think>\n" if think else ""
    assert first == f"<system>Be brief.<user>One<assistant>{tail}"
    assert second == f"<system>Be brief.<user>One<assistant><think>so</think>4<user>Two<assistant>{tail}"
    assert [call["seed"] for call in talker.sampler.calls] == [3, 4]  # the same question is answered anew


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="NANOR1_SHARED (folder with conformance/) is not set")
@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"])
def test_a_thinking_models_own_template_leaves_earlier_thinking_out(type_lines, name):
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    arguments = {"enable_thinking": True, "bos_token": ""}
    talker = speaker(
        "<think>\nsecret\n</think>\n\nfour" + END, "5", chat_template=template, template_arguments=arguments
    )
    type_lines("One", "Two")
    converse(talker, [], 0)
    _, second = turns(talker)
    assert "secret" not in second and re.search("One.*four.*Two", second, re.DOTALL)


def test_without_a_chat_template_every_line_is_a_prompt_of_its_own(type_lines, capsys):
    talker = speaker("1" + END, "2" + END, chat_template=None)
    type_lines("One", "Two")
    converse(talker, [], 0)
    assert turns(talker) == ["One", "Two"]
    assert "there is no conversation" in capsys.readouterr().err


def test_a_line_that_does_not_fit_is_refused_and_forgotten(type_lines, capsys):
    talker = speaker("4" + END, "5" + END, context=60)
    type_lines("x" * 80, "One", "y" * 80, "Two")
    converse(talker, [], 0)
    assert turns(talker) == ["<user>One<assistant>", "<user>One<assistant>4<user>Two<assistant>"]
    err = capsys.readouterr().err
    assert "error: the prompt is 97 tokens; the model's context is 60: shorten it" in err
    assert "error: the conversation is 118 tokens; the model's context is 60: say less, or begin a new one" in err


def test_a_turn_reads_only_what_is_new_and_says_what_it_would_have_said(type_lines, capsys, monkeypatch):
    torch.manual_seed(0)
    tokenizer = of_bytes(chat_template=TEMPLATE)
    model = Transformer(ModelConfig("llama", tokenizer.vocab_size, 32, 40, 2, 4, 2, 8, 512))
    sampling = {"max_new_tokens": 20}
    read, forward = [], Transformer.forward

    def counting_forward(self, ids_N, *rest, **more):
        read.append(len(ids_N))
        return forward(self, ids_N, *rest, **more)

    def talk():
        read.clear()
        type_lines("What is 2 + 3?", "And 4 + 5 + 6?", "Why?")
        converse(
            new_asker(Sampler(model), Prompter(tokenizer, "chat"), sampling),
            [{"role": "system", "content": "Be brief."}],
            0,
        )
        return capsys.readouterr().out, list(read)

    monkeypatch.setattr(Transformer, "forward", counting_forward)
    said, new = talk()
    monkeypatch.setattr(chat, "answer", lambda *arguments, keep, behind: answer(*arguments))
    said_afresh, whole = talk()
    assert said == said_afresh and len(new) == len(whole) == 3 and new[0] == whole[0]
    assert all(some < every - whole[0] for some, every in zip(new[1:], whole[1:], strict=True))


# ---- Ctrl-C, and the end


def test_ctrl_c_keeps_what_was_said_and_forgets_a_turn_in_which_nothing_was(type_lines, capsys):
    talker = speaker("^C", "fo^C", "5" + END)
    type_lines("One", "Two", "Three")
    converse(talker, [], 0)
    assert turns(talker)[1:] == ["<user>Two<assistant>", "<user>Two<assistant>fo<user>Three<assistant>"]
    out, err = capsys.readouterr()
    assert out == "\nfo\n5\n" and err.count(INTERRUPTED) == 2


def test_ctrl_c_twice_does_not_end_the_program_either(type_lines, capsys, monkeypatch):
    talker, to_answer, events = speaker("fo^C", "5" + END), chat.to_answer, iter([KeyboardInterrupt])

    def interrupted(*arguments):
        for event in events:
            raise event
        return to_answer(*arguments)

    monkeypatch.setattr(chat, "to_answer", interrupted)
    type_lines("One", "Two")
    converse(talker, [], 0)
    assert turns(talker)[1] == "<user>Two<assistant>" and capsys.readouterr().out == "fo\n5\n"


def test_answers_that_ctrl_c_kept_from_beginning_are_not_announced(capsys):
    ask(speaker("^C", n=2))
    out, err = capsys.readouterr()
    assert "answer 2" not in out and f"2 {INTERRUPTED}" in err


def test_a_tag_that_the_prompt_wrote_is_no_answer_by_itself():
    (made,) = ask(speaker("^C", template_arguments={"think": True}))
    assert made == Answer("", INTERRUPTED)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_mark_of_a_line_goes_to_a_terminal_and_not_into_a_file_of_answers(
    type_lines, capsys, monkeypatch, is_terminal
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    shown = type_lines(KeyboardInterrupt, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "One")
    converse(speaker("4" + END), [], 0)
    out, err = capsys.readouterr()
    assert out == "4\n" and shown == ["> " if is_terminal else ""] * 4  # input() would have shown them on stdout
    assert err.count("> ") == (0 if is_terminal else 4)
    assert "(an empty line or Ctrl-D ends)" in err and "the line is not UTF-8 text" in err


def test_an_empty_line_ends_a_conversation(type_lines):
    talker = speaker("4" + END)
    type_lines("One", "  ", "Two")
    converse(talker, [], 0)
    assert len(talker.sampler.calls) == 1
