"""How a model is asked: the options of it that the scripts share, the choice of a template, and a problem's prompt.

What is asked in words (the question, the form of the answer, examples) is problems.py's; here it becomes the text and
the ids that a model sees, with all that ends an answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nanor1.run.config import option
from nanor1.tasks.problems import Example, Problem, Style, format_prompt, parse_object, read_examples
from nanor1.tokenizer import Tokenizer

NEXT_TURN = "\nUser:"  # how the template r1-zero begins another turn
STOP_TEXTS = {"r1-zero": ("</answer>", NEXT_TURN)}  # what ends an answer by default, beside the stop tokens
Prompt = tuple[str, list[int]]  # the text that a model sees, and its ids


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    template_args: str = option(
        "", 'JSON object of variables of the chat template, as {"enable_thinking": false} for Qwen3', "prompt"
    )
    system: str = option("", "system message, for models with a chat template")


@dataclass(frozen=True, kw_only=True)
class PromptOptions(ChatOptions):
    template: Literal["auto", "r1-zero", "chat", "bare"] = option(
        "auto", "auto: chat, if the model has learned one, else r1-zero; see nanor1/tasks/prompts.py"
    )
    style: Style = option("think", "chat: think between tags, chain of thought (cot) in the open, answer directly")
    few_shot: str | None = option(None, "JSON lines of `prompt` and `completion` to show first", alias="examples")
    stop_text: str | None = option(
        "auto", "ends an answer that holds it; auto: </answer> and a new turn, for r1-zero alone"
    )


@dataclass(frozen=True)
class Prompter:
    """All that decides how problems are put to a model, and what ends its answers."""

    tokenizer: Tokenizer
    template: str  # "chat": the model's own; else as in problems.format_prompt
    arguments: Mapping[str, object] = field(default_factory=dict)  # of the model's own
    system: str = ""
    style: Style = "think"
    examples: Sequence[Example] = ()
    stop_texts: Sequence[str] = ()

    def show(self, problem: Problem) -> str | list[dict[str, str]]:
        """The text, or for "chat" the messages."""
        shown = format_prompt(problem, self.template, self.style, self.examples)
        return [*to_system(self.system), *shown] if self.template == "chat" else shown

    def write(self, problem: Problem) -> Prompt:
        """The text that the model sees, and its ids."""
        return render(self.show(problem), self.tokenizer, self.arguments)

    @property
    def stops(self) -> dict:
        """The arguments of Sampler.generate by which answers end."""
        ends = dict(stop_ids=self.tokenizer.stop_ids, vocab_size=self.tokenizer.vocab_size)
        return ends | (dict(stop_texts=self.stop_texts, decode=self.tokenizer.decode) if self.stop_texts else {})


def to_system(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []


def render(
    shown: str | list[dict], tokenizer: Tokenizer, arguments: Mapping[str, object] | None = None, allow_special=False
) -> Prompt:
    """Messages by the model's own template, whose special tokens count as such; text as it is, its own if allowed."""
    if not isinstance(shown, str):
        text = tokenizer.apply_chat_template(shown, add_generation_prompt=True, **(arguments or {}))
        return text, tokenizer.encode(text, allow_special=True)
    ids = tokenizer.encode(shown, allow_special)
    return shown, [tokenizer.bos_id, *ids] if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id] else ids


def make_prompter(options: PromptOptions, tokenizer: Tokenizer, template: str, task: str) -> Prompter:
    """What the options say of it; ValueError for one that the template has no place for.

    In a chat the tokenizer names what ends a turn among its own stops: a base model that learns so is none after it.
    """
    if template != "chat" and (options.system or parse_object(options.template_args, "--template-args")):
        name = "--system" if options.system else "--template-args"
        raise ValueError(f"{name} needs the template chat, and this is {template}; leave it out")
    if template == "chat" and tokenizer.turn_end_id is not None and not tokenizer.ends_turns:
        tokenizer = tokenizer.with_stop(tokenizer.turn_end_id)
    arguments, stop_texts = read_arguments(options, tokenizer), choose_stop_texts(options, template)
    examples = read_examples(options.few_shot) if options.few_shot else ()
    prompter = Prompter(tokenizer, template, arguments, options.system, options.style, examples, stop_texts)
    prompter.show(Problem("?", "", task))  # a style or examples that the template has no words for
    return prompter


def choose_stop_texts(options: PromptOptions, template: str) -> tuple[str, ...]:
    if options.stop_text == "auto":
        return STOP_TEXTS.get(template, ())
    return (options.stop_text,) if options.stop_text else ()


def read_arguments(options: ChatOptions, tokenizer: Tokenizer) -> dict[str, object]:
    """What --template-args tells the chat template; ValueError for what it would pass over in silence."""
    arguments = parse_object(options.template_args, "--template-args")
    if unknown := sorted(arguments.keys() - tokenizer.template_parameters):
        known = ", ".join(sorted(tokenizer.template_parameters)) or "none"
        raise ValueError(f"--template-args: the chat template has no variable {unknown[0]!r}; it has {known}")
    return arguments


def choose_template(asked: str, tokenizer: Tokenizer, otherwise: str, is_base_chat: bool = False) -> tuple[str, str]:
    """The template that "auto" or a name asks for, and why.

    auto: the model's own where it has learned it. A base model that merely ships one (Qwen2.5-0.5B) is known by its own
    stop tokens, among which is none that the template ends an answer with; it gets `otherwise`, as does a model without
    one, or with `is_base_chat` its own.
    """
    if asked == "chat" and not tokenizer.chat_template:
        raise ValueError("the model has no chat template; leave out --template chat, or use --template bare")
    if asked != "auto":
        return asked, "asked for"
    if not tokenizer.chat_template:
        return otherwise, "the model has no chat template"
    if tokenizer.turn_end_id is None or tokenizer.ends_turns or is_base_chat:
        return "chat", "the model's own"
    end = tokenizer.decode([tokenizer.turn_end_id])
    return otherwise, f"a base model: it does not stop at the {end} of the chat template that it ships"
