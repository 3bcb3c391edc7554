"""Talk to a model, or measure it on a task.

    python sample.py --model FOLDER "Why is the sky blue?"     one answer, printed as it is made
    python sample.py --model FOLDER                            a conversation (Ctrl-C: stop an answer, Ctrl-D: end)
    python sample.py --model FOLDER --raw < prompt.txt         the text as it is: for base models and miniatures
    python sample.py --model FOLDER --task gsm8k --data gsm8k_test.jsonl --limit 200 --out answers.jsonl

Answers and results go to stdout, everything else to stderr. The same command with the same seed gives the same result.
A miniature made by train_zero.py is known by its vocabulary, and --task then takes the miniature's own problems.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Literal, TextIO

import torch

from nanor1.config import apply_preset, option, parse_args, user_errors
from nanor1.evaluate import evaluate, summarize, write_prompt
from nanor1.grpo import Rollout
from nanor1.machine import choose_device
from nanor1.miniature import MINIATURES, Miniature, make_tokenizer, miniature_task
from nanor1.model import Transformer
from nanor1.pretrained import read_config
from nanor1.rewards import final_answer
from nanor1.sampler import Sampler
from nanor1.tasks import Problem, format_prompt, make_task, read_task, task_parameters
from nanor1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    model: str = option(MISSING, "model folder")
    prompt: str = option("", "what to ask; left out: stdin, or on a terminal a conversation", positional=True)
    system: str = option("", "system message, for models with a chat template")
    template: Literal["auto", "chat", "r1-zero", "bare"] = option(
        "auto", "of the prompt; auto: chat if the model has one, else bare (--task: r1-zero, a miniature's bare)"
    )
    raw: bool = option(False, "--template bare: the prompt as it is")
    seed: int = option(0, "of the random numbers")

    temperature: float = option(0.6, "0: greedy; with --task the default is 0, and 1 where --n is above 1", "sampling")
    top_k: int = option(0, "draw from the k likeliest tokens; 0: from all")
    top_p: float = option(1.0, "draw from the likeliest tokens that hold this probability")
    max_new_tokens: int = option(1024, "length limit of an answer")
    n: int = option(1, "answers to a prompt or problem; of a prompt's the first is printed as it is made")
    stop_text: str = option("", "end an answer that holds this text")

    task: Literal["countdown", "arithmetic", "gsm8k", "math"] | None = option(
        None, "measure on this task", "evaluation"
    )
    data: str | None = option(None, "JSON lines of problems, taken in order; none: generated, held-out ones")
    task_args: str = option("", 'JSON object of the task\'s parameters, as {"n_numbers": 3}; see nanor1/tasks.py')
    limit: int = option(0, "problems; 0: all of the file, or 200 generated")
    out: str | None = option(None, "new file of JSON lines: each problem's answers and verdicts")
    max_rows: int = option(64, "answers made at once; more are faster, above all on a GPU, and take more memory")

    device: str = option("auto", "cpu, cuda, mps or auto", "machine")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the weights; auto: bfloat16 on cuda, else float32"
    )
    threads: int = option(0, "CPU threads; 0: torch's choice")

    def validate(self) -> None:
        for name, least in dict(temperature=0, top_k=0, max_new_tokens=1, n=1, limit=0, max_rows=1, threads=0).items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")
        if self.raw and self.template not in ("auto", "bare"):
            raise ValueError(f"--raw means --template bare; leave one of --raw and --template {self.template} out")
        for name in ("prompt", "system") if self.task else ("data", "task_args", "limit", "out"):
            if getattr(self, name):
                why = (
                    "is not for --task, which has its own prompts" if self.task else "is for an evaluation: add --task"
                )
                raise ValueError(f"{'the prompt' if name == 'prompt' else '--' + name.replace('_', '-')} {why}")
        if self.task in ("gsm8k", "math") and not self.data:
            raise ValueError(f"--task {self.task} needs --data FILE, JSON lines of its problems")
        if self.task == "arithmetic" and self.data:
            raise ValueError("--task arithmetic is generated; leave --data out")


N_GENERATED = 200  # problems where no --limit is given
WAVES = 4  # --max-rows times this many answers make a batch: a row that ends early takes the next answer
SEED_STRIDE = 1_000_003  # apart are the random numbers of one --seed and the next: problems and turns count up from it
INTERRUPTED = "stopped by Ctrl-C"
SPARSE_S, LIVE_S = 30.0, 0.2  # between reports of progress: to a file, on a terminal
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@user_errors()
def main() -> None:
    config, given = parse_args(Config, description=__doc__)
    if config.task:
        config = apply_preset(config, given, dict(temperature=0.0 if config.n == 1 else 1.0))
    if config.n > 1 and config.temperature == 0:
        raise ValueError(
            f"--n {config.n} at --temperature 0 gives the same answer {config.n} times; raise one or drop one"
        )
    prompt = config.prompt if config.task or "prompt" in given else read_stdin()
    engine = load_engine(config)
    if config.task:
        measure(engine)
    elif prompt is None:
        converse(engine)
    else:
        messages = first_messages(config) + [{"role": "user", "content": prompt}]
        answers = answer(engine, messages, config.seed * SEED_STRIDE)
        if any(made.ending == INTERRUPTED for made in answers):
            raise SystemExit(130)


@dataclass(frozen=True)
class Engine:
    """A model ready to answer, and how it is asked to."""

    sampler: Sampler
    tokenizer: Tokenizer
    template: str
    config: Config

    def sampling(self) -> dict:
        """The arguments of Sampler.generate that are the same for every prompt."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p")
        stop_texts = [self.config.stop_text] if self.config.stop_text else []
        return {name: getattr(self.config, name) for name in names} | dict(
            stop_texts=stop_texts, decode=self.tokenizer.decode
        )

    @property
    def context(self) -> int:
        return self.sampler.model.config.max_position_embeddings


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read_stdin() -> str | None:
    """The prompt on stdin without the newline at its end; None where a person sits there."""
    if sys.stdin.isatty():
        return None
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not UTF-8 text ({error}); convert it") from error


def load_engine(config: Config) -> Engine:
    if config.threads:
        torch.set_num_threads(config.threads)
    _, model_config = read_config(config.model)
    device, dtype = choose_device(config.device, config.dtype, say, model_config.hidden_size)
    model = Transformer.from_pretrained(config.model, dtype, device)
    tokenizer = Tokenizer.from_pretrained(config.model)
    template, reason = choose_template(config, tokenizer)
    say(f"model: {config.model}; template: {template} ({reason})")
    if config.system and template != "chat":
        raise ValueError(f"--system needs the template chat, and this is {template}; write it into the prompt")
    return Engine(Sampler(model, config.max_rows), tokenizer, template, config)


def choose_template(config: Config, tokenizer: Tokenizer) -> tuple[str, str]:
    """The prompt template, and why."""
    if config.raw:
        return "bare", "asked for"
    if config.template == "chat" and not tokenizer.chat_template:
        raise ValueError(f"{config.model} has no chat template; leave out --template chat, or use --raw")
    if config.template != "auto":
        return config.template, "asked for"
    if tokenizer.chat_template:
        return "chat", "the model's own"
    is_bare = not config.task or own_miniature(tokenizer)
    return "bare" if is_bare else "r1-zero", "the model has no chat template"


def own_miniature(tokenizer: Tokenizer) -> Miniature | None:
    """The miniature whose vocabulary this is, if it is one's."""
    for miniature in MINIATURES.values():
        made = make_tokenizer(miniature)
        words = [made.decode([i]) for i in range(made.vocab_size)]
        if tokenizer.vocab_size == made.vocab_size and [*map(tokenizer.token_id, words)] == [*range(len(words))]:
            return miniature
    return None


# ---- one prompt, or a conversation


def first_messages(config: Config) -> list[dict[str, str]]:
    return [{"role": "system", "content": config.system}] if config.system else []


def converse(engine: Engine) -> None:
    """Answer line by line; with a chat template the model sees what was said before, as text."""
    if engine.template != "chat":
        say("every line is a prompt of its own: without a chat template there is no conversation")
    messages, turn = first_messages(engine.config), 0
    while line := read_line():
        messages.append({"role": "user", "content": line})
        try:
            first, *_ = answer(engine, messages, engine.config.seed * SEED_STRIDE + turn)
            messages.append({"role": "assistant", "content": first.text})
        except ValueError as error:  # an unknown word, or a conversation longer than the context
            say(f"error: {error}")
            messages.pop()
        turn += 1


def read_line() -> str:
    """The next line; empty at the end of the input."""
    while True:
        try:
            return input("\n> ").strip()
        except KeyboardInterrupt:
            say("\n(an empty line or Ctrl-D ends)")
        except EOFError:
            return ""


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt: its text without the stop token, and why it ended."""

    text: str
    ending: str


def answer(engine: Engine, messages: list[dict[str, str]], seed: int) -> list[Answer]:
    """Sample --n answers and print them, the first as it is made; Ctrl-C ends them where they are."""
    tokenizer, n = engine.tokenizer, engine.config.n
    text, prompt_ids = write_messages(messages, engine.template, tokenizer)
    check_room("the prompt", prompt_ids, engine)
    is_thinking = text.rstrip().endswith("<think>")
    ids_G: list[list[int]] = [[] for _ in range(n)]
    printer = Printer(tokenizer, is_thinking)

    def hear(_: int, index: int, token: int) -> None:
        ids_G[index].append(token)
        if index == 0:
            printer.push(token)

    print_title(0, n)
    start_s = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        engine.sampler.generate(
            [prompt_ids],
            n=n,
            stop_ids=tokenizer.stop_ids,
            vocab_size=tokenizer.vocab_size,
            seed=seed,
            on_token=hear,
            **engine.sampling(),
        )
    wall_s = time.monotonic() - start_s
    printer.close()
    for index in range(1, n):
        print_title(index, n)
        printer = Printer(tokenizer, is_thinking)
        for token in ids_G[index]:
            printer.push(token)
        printer.close()
    answers = [finished(ids, len(prompt_ids), engine) for ids in ids_G]
    n_tokens, endings = sum(map(len, ids_G)), Counter(made.ending for made in answers)
    why = ", ".join(ending if n == 1 else f"{count} {ending}" for ending, count in endings.items())
    say(f"{n_tokens} tokens in {wall_s:.1f} s, {n_tokens / wall_s:.1f} tokens/s; {why}")
    return answers


def write_messages(messages: list[dict[str, str]], template: str, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The text that the model sees and its ids; the user's text may hold special tokens, and they count as such."""
    last = messages[-1]["content"]
    if not last.strip():
        raise ValueError("the prompt is empty; give it as an argument or on stdin")
    if template == "chat":
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return text, tokenizer.encode(text, allow_special=True)
    text = format_prompt(Problem(last, "", "prompt"), template)
    ids = tokenizer.encode(text, allow_special=True)
    return text, [tokenizer.bos_id, *ids] if tokenizer.adds_bos and ids[0] != tokenizer.bos_id else ids


def check_room(what: str, prompt_ids: list[int], engine: Engine) -> None:
    if len(prompt_ids) >= engine.context:
        raise ValueError(f"{what} is {len(prompt_ids)} tokens; the model's context is {engine.context}: shorten it")


def print_title(index: int, n: int) -> None:
    if n > 1:
        print(f"--- answer {index + 1} of {n}", flush=True)


def finished(ids: list[int], n_prompt: int, engine: Engine) -> Answer:
    """What was made, and why it ended there."""
    config, tokenizer = engine.config, engine.tokenizer
    if ids and ids[-1] in tokenizer.stop_ids:
        return Answer(tokenizer.decode(ids[:-1]), f"ended by {tokenizer.decode(ids[-1:])}")
    text = tokenizer.decode(ids)
    if config.stop_text and config.stop_text in text:
        return Answer(text, "ended by --stop-text")
    if len(ids) == config.max_new_tokens:
        return Answer(text, f"cut off by --max-new-tokens {len(ids)}")
    is_full = n_prompt + len(ids) == engine.context
    return Answer(text, f"cut off: the model's context of {engine.context} is full" if is_full else INTERRUPTED)


class Printer:
    """Writes an answer to stdout as its ids arrive, without the stop token; on a terminal the thinking is dimmed."""

    def __init__(self, tokenizer: Tokenizer, is_thinking: bool):
        self.stop_ids, self.stream = tokenizer.stop_ids, tokenizer.stream()
        self.dimmer = Dimmer(is_thinking) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else None

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


# ---- evaluation


def measure(engine: Engine) -> None:
    """Answer and judge the problems, batch by batch, and print what came of it; Ctrl-C reports the batches done."""
    config, tokenizer = engine.config, engine.tokenizer
    problems = load_problems(config, own_miniature(tokenizer))
    for number, problem in enumerate(problems, 1):
        check_room(f"problem {number}", write_prompt(problem, engine.template, tokenizer)[1], engine)
    rollouts_PG: list[list[Rollout]] = []
    batch_size = max(1, WAVES * config.max_rows // config.n)
    progress = Progress(len(problems) * config.n, config.max_new_tokens, tokenizer.stop_ids)
    start_s = time.monotonic()
    with open_rows(config.out) as rows:
        try:
            while len(rollouts_PG) < len(problems):
                first = len(rollouts_PG)
                groups = answer_batch(engine, problems[first : first + batch_size], first, progress)
                rollouts_PG += groups
                if rows:
                    rows.writelines(
                        json.dumps(row(first + i, group), ensure_ascii=False) + "\n" for i, group in enumerate(groups)
                    )
                    rows.flush()
        except KeyboardInterrupt:
            say(f"\nstopped by Ctrl-C after {len(rollouts_PG)} of {len(problems)} problems")
    progress.clear()
    if rollouts_PG:
        print(report(engine, rollouts_PG, time.monotonic() - start_s))
    if len(rollouts_PG) < len(problems):
        raise SystemExit(130)


def load_problems(config: Config, miniature: Miniature | None) -> list[Problem]:
    """The file's problems in its order, or generated held-out ones, the same ones that train_zero.py evaluates on."""
    if miniature and (config.task != miniature.task or config.data or config.task_args):
        raise ValueError(
            f"{config.model} is the {miniature.task} miniature and knows no other words; give --task {miniature.task} "
            "without --data and --task-args"
        )
    if config.data:
        problems = read_task(config.task, config.data, **task_parameters(config.task_args))
        return problems[: config.limit or len(problems)]
    task = miniature_task(miniature) if miniature else make_task(config.task, **task_parameters(config.task_args))
    return task.held_out(config.limit or N_GENERATED)


def open_rows(path: str | None) -> contextlib.AbstractContextManager[TextIO | None]:
    if path is None:
        return contextlib.nullcontext()
    try:
        return open(path, "x", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"--out {path} cannot be made ({error.strerror}); give a new file in a folder that is there"
        ) from error


def answer_batch(engine: Engine, problems: list[Problem], first: int, progress: "Progress") -> list[list[Rollout]]:
    """The judged answers to problems `first`, `first` + 1, ...; each problem has random numbers of its own."""
    _, groups = evaluate(
        engine.sampler,
        engine.tokenizer,
        problems,
        engine.template,
        {"accuracy": 1.0},
        samples=engine.config.n,
        seed=[engine.config.seed * SEED_STRIDE + first + i for i in range(len(problems))],
        on_token=progress.hear,
        **engine.sampling(),
    )
    progress.end_batch(len(problems) * engine.config.n)
    return groups


class Progress:
    """How far an evaluation is, on stderr: one line rewritten on a terminal, else a line now and then."""

    def __init__(self, n_answers: int, max_new_tokens: int, stop_ids: Sequence[int]):
        self.n_answers, self.max_new_tokens, self.stop_ids = n_answers, max_new_tokens, frozenset(stop_ids)
        self.n_tokens = self.n_done = self.n_done_before = 0
        self.lengths: Counter[tuple[int, int]] = Counter()  # of the answers of this batch
        self.is_live = sys.stderr.isatty()
        self.start_s = self.shown_s = time.monotonic()

    def hear(self, problem: int, index: int, token: int) -> None:
        self.n_tokens += 1
        self.lengths[problem, index] += 1
        self.n_done += token in self.stop_ids or self.lengths[problem, index] == self.max_new_tokens
        if time.monotonic() - self.shown_s >= (LIVE_S if self.is_live else SPARSE_S):
            self.show()

    def end_batch(self, n_answers: int) -> None:
        """Count the answers that ended otherwise too: by a stop text, or at the end of the context."""
        self.n_done_before += n_answers
        self.n_done = self.n_done_before
        self.lengths.clear()

    def show(self) -> None:
        self.shown_s = time.monotonic()
        wall_s = self.shown_s - self.start_s
        text = (
            f"{self.n_done}/{self.n_answers} answers, {self.n_tokens:,} tokens, {self.n_tokens / wall_s:.0f} tokens/s"
        )
        if self.n_done:
            left_s = wall_s * (self.n_answers / self.n_done - 1)
            text += f", about {left_s / 60:.0f} min left" if left_s > 90 else f", about {left_s:.0f} s left"
        print(
            f"\r\x1b[K{text}" if self.is_live else text, end="" if self.is_live else "\n", file=sys.stderr, flush=True
        )

    def clear(self) -> None:
        if self.is_live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def row(index: int, group: list[Rollout]) -> dict:
    """A problem's line in --out."""
    problem = group[0].problem
    return {
        "index": index,
        "prompt": problem.prompt,
        "gold": problem.answer,
        "answers": [
            {
                "text": rollout.text,
                "answer": final_answer(problem, rollout.text),
                "accuracy": rollout.parts["accuracy"],
                "format": rollout.parts["format"],
                "tokens": len(rollout.completion.ids),
                "finish": rollout.completion.finish,
            }
            for rollout in group
        ],
    }


def report(engine: Engine, rollouts_PG: list[list[Rollout]], wall_s: float) -> str:
    """What an evaluation came to. Tokens are those of all of a problem's answers."""
    config, result = engine.config, summarize(rollouts_PG)
    tokens_P = sorted(sum(len(rollout.completion.ids) for rollout in group) for group in rollouts_PG)
    p95 = tokens_P[math.ceil(0.95 * len(tokens_P)) - 1]
    how = "greedy" if config.temperature == 0 else f"temperature {config.temperature:g}, seed {config.seed}"
    lines = [
        f"{config.task}: {len(rollouts_PG)} problems x {config.n}, template {engine.template}, {how}",
        f"accuracy        {result.accuracy:.3f}   95%: {result.accuracy_low:.3f} to {result.accuracy_high:.3f} "
        f"(n={result.n}); lenient: in any format",
        f"strict          {strict_accuracy(rollouts_PG):.3f}   right and in the format asked for",
        f"format          {result.format:.3f}",
        f"cut off         {result.truncated:.3f}   by --max-new-tokens {config.max_new_tokens} or a full context",
        f"tokens/problem  {sum(tokens_P) / len(tokens_P):.1f}   95% of the problems: at most {p95}",
        f"time            {wall_s:.1f} s   {sum(tokens_P) / wall_s:.0f} tokens/s",
    ]
    if result.majority is not None:
        lines.insert(2, f"majority@{config.n:<6} {result.majority:.3f}   of the most frequent answer")
    return "\n".join(lines)


def strict_accuracy(rollouts_PG: list[list[Rollout]]) -> float:
    """Mean over problems of the share of answers that are right and in form; what could not be judged is left out."""
    judged_PG = [[r.parts for r in group if r.parts["accuracy"] is not None] for group in rollouts_PG]
    means_P = [sum(p["accuracy"] * p["format"] for p in group) / len(group) for group in judged_PG if group]
    return sum(means_P) / len(means_P)


if __name__ == "__main__":
    main()
