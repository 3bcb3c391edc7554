"""Talk to a model, or measure it on a task.

    python sample.py --model FOLDER "Why is the sky blue?"     one answer, printed as it is made
    python sample.py --model FOLDER                            a conversation (Ctrl-C: stop an answer, Ctrl-D: end)
    python sample.py --model FOLDER --raw < prompt.txt         the text as it is: for base models and miniatures
    python sample.py --model FOLDER --task gsm8k --data gsm8k_test.jsonl --limit 200 --out answers.jsonl
    python sample.py --model FOLDER --task countdown --n 16 --keep correct --out traces.jsonl    text to train on
    python sample.py --model FOLDER --prompts prompts.jsonl --out general.jsonl                  the same, not judged

FOLDER is a model folder, a run folder (its newest checkpoint is taken) or miniature/countdown, which is pretrained
where it is not in the cache. Answers and results go to stdout, everything else to stderr. The same command with the
same seed gives the same result; one that writes training text goes on where it was stopped. A miniature is known by
its vocabulary, and --task then takes the miniature's own problems.
"""

import contextlib
import json
import math
import os
import re
import sys
import time
from collections import Counter
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal, TextIO

import torch

from nanor1.config import apply_preset, option, option_name, parse_args, user_errors
from nanor1.evaluate import evaluate, summarize, write_prompt
from nanor1.grpo import Rollout
from nanor1.machine import choose_device
from nanor1.miniature import Miniature, find_miniature, find_model, miniature_task, own_miniature
from nanor1.model import Transformer
from nanor1.pretrained import read_config
from nanor1.rewards import final_answer
from nanor1.sampler import Sampler
from nanor1.tasks import Problem, Task, format_prompt, make_task, read_json_lines, read_task, task_parameters
from nanor1.tokenizer import Tokenizer
from nanor1.traces import (
    SEED_STRIDE,
    WAVES,
    Progress,
    Question,
    Selection,
    ask,
    collect,
    summary,
    training_problems,
)
from nanor1.training import check_least


@dataclass(frozen=True)
class Config:
    model: str = option(MISSING, "model folder, run folder, or miniature/NAME")
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

    task: Literal["countdown", "arithmetic", "gsm8k", "math", "code"] | None = option(
        None, "measure on this task", "evaluation"
    )
    data: str | None = option(
        None, "JSON lines of problems, taken in order; none: generated, held-out ones (--keep: those for training)"
    )
    task_args: str = option("", 'JSON object of the task\'s parameters, as {"n_numbers": 3}; see nanor1/tasks.py')
    limit: int = option(0, "problems; 0: all of the file, or 200 generated")
    out: str | None = option(None, "new file of JSON lines: each problem's answers and verdicts, or training text")
    max_rows: int = option(64, "answers made at once; more are faster, above all on a GPU, and take more memory")

    keep: Literal["correct", "pairs", "all"] | None = option(
        None,
        "write to --out: right and readable answers; pairs of such a one and a wrong one; all that ended",
        "training text",
    )
    prompts: str | None = option(None, "JSON lines of `prompt` or `messages` to answer in place of a task: --keep all")
    any_format: bool = option(False, "keep right answers without the format asked for, too")
    min_language: float = option(0.99, "least share of the thinking's words in the problem's language; 0: any")
    max_per_problem: int = option(4, "answers or pairs of a problem: the first ones sampled")

    device: str = option("auto", "cpu, cuda, mps or auto", "machine")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the weights; auto: bfloat16 on cuda, else float32"
    )
    threads: int = option(0, "CPU threads; 0: torch's choice")

    def validate(self) -> None:
        least = dict(temperature=0, top_k=0, max_new_tokens=1, n=1, limit=0, max_rows=1, threads=0, max_per_problem=1)
        check_least(self, least, {})
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_language <= 1:
            raise ValueError(f"--min-language is {self.min_language}; it must lie between 0 and 1")
        if self.raw and self.template not in ("auto", "bare"):
            raise ValueError(f"--raw means --template bare; leave one of --raw and --template {self.template} out")
        if self.task in ("gsm8k", "math", "code") and not self.data:
            raise ValueError(f"--task {self.task} needs --data FILE, JSON lines of its problems")
        if self.task == "arithmetic" and self.data:
            raise ValueError("--task arithmetic is generated; leave --data out")
        self.check_mode()

    def check_mode(self) -> None:
        """Every option given belongs to what is done: an evaluation, training text, or a talk."""
        if self.task:
            self.refuse(["prompt", "system"], "is not for --task, which has its own prompts")
            self.refuse(["prompts"], "takes the place of --task; leave one of them out")
        elif self.prompts:
            self.refuse(["prompt", "data", "task_args"], "is not for --prompts, which are the questions")
        else:
            self.refuse(["data", "task_args", "limit", "out", "keep"], "is for an evaluation: add --task")
        if self.prompts and self.keep not in (None, "all"):
            raise ValueError(f"--keep {self.keep} needs --task, by which answers are judged; --prompts are not")
        if self.keep not in ("correct", "pairs"):
            self.refuse(["any_format", "min_language", "max_per_problem"], "is for --keep correct or --keep pairs")
        if (self.keep or self.prompts) and not self.out:
            raise ValueError(f"{'--keep' if self.keep else '--prompts'} needs --out FILE, to which it writes")
        if self.keep == "pairs" and self.n == 1:
            raise ValueError("--keep pairs needs several answers to a problem; give --n 16")

    def refuse(self, names: list[str], why: str) -> None:
        for field in fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                raise ValueError(f"{'the prompt' if field.name == 'prompt' else option_name(field.name)} {why}")


MINIATURE = dict(max_new_tokens=224, max_rows=512)  # as it is trained; its answers are short and take little memory
N_GENERATED = 200  # problems where no --limit is given
INTERRUPTED = "stopped by Ctrl-C"
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
    if find_miniature(config.model):
        config = apply_preset(config, given, MINIATURE)
    prompt = config.prompt if config.task or config.prompts or "prompt" in given else read_stdin()
    engine = load_engine(config)
    if config.keep or config.prompts:
        write_traces(engine)
    elif config.task:
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

    folder: Path  # of the model
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
    def batch_size(self) -> int:
        """Problems answered at once."""
        return max(1, WAVES * self.config.max_rows // self.config.n)

    @property
    def context(self) -> int:
        return self.sampler.model.config.max_position_embeddings


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Console:
    """What making a miniature reports to."""

    def say(self, text: str) -> None:
        say(text)

    def progress(self, done: int, total: int, label: str) -> None:
        if sys.stderr.isatty():
            end = "" if done < total else "\r\x1b[K"
            print(f"\r\x1b[K{label} {done}/{total}{end}", end="", file=sys.stderr, flush=True)


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
    folder = find_model(config.model, config.seed, Console())
    _, model_config = read_config(folder)
    device, dtype = choose_device(config.device, config.dtype, say, model_config.hidden_size)
    model, tokenizer = Transformer.from_pretrained(folder, dtype, device), Tokenizer.from_pretrained(folder)
    template, reason = choose_template(config, tokenizer)
    say(f"model: {folder}; template: {template} ({reason})")
    if config.system and template != "chat":
        raise ValueError(f"--system needs the template chat, and this is {template}; write it into the prompt")
    return Engine(folder, Sampler(model, config.max_rows), tokenizer, template, config)


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
    miniature = own_miniature(tokenizer)
    check_miniature(config, miniature)
    problems = load_problems(config, miniature)
    for number, problem in enumerate(problems, 1):
        check_room(f"problem {number}", write_prompt(problem, engine.template, tokenizer)[1], engine)
    rollouts_PG: list[list[Rollout]] = []
    batch_size = engine.batch_size
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
    if config.data:
        return read_file(config)
    return load_task(config, miniature).held_out(config.limit or N_GENERATED)


def read_file(config: Config) -> list[Problem]:
    problems = read_task(config.task, config.data, **task_parameters(config.task_args))
    return problems[: config.limit or len(problems)]


def load_task(config: Config, miniature: Miniature | None) -> Task:
    return miniature_task(miniature) if miniature else make_task(config.task, **task_parameters(config.task_args))


def check_miniature(config: Config, miniature: Miniature | None) -> None:
    if miniature and (config.task != miniature.task or config.data or config.task_args):
        raise ValueError(
            f"{config.model} is the {miniature.task} miniature and knows no other words; give --task {miniature.task} "
            "without --data and --task-args"
        )


def open_rows(path: str | None) -> contextlib.AbstractContextManager[TextIO | None]:
    if path is None:
        return contextlib.nullcontext()
    try:
        return open(path, "x", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"--out {path} cannot be made ({error.strerror}); give a new file in a folder that is there"
        ) from error


def answer_batch(engine: Engine, problems: list[Problem], first: int, progress: Progress) -> list[list[Rollout]]:
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
        *(
            [f"language        {result.language:.3f}   of the thinking's words are in the problem's language"]
            * (result.language < 1)
        ),
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


# ---- training text


def write_traces(engine: Engine) -> None:
    """Rejection sampling into --out, and what came of it; Ctrl-C keeps the batches done and ends with 130."""
    config = engine.config
    selection = Selection(config.keep or "all", not config.any_format, config.min_language, config.max_per_problem)
    questions = read_prompts(engine) if config.prompts else ask_problems(engine)
    for number, question in enumerate(questions, 1):
        check_room(f"question {number}", question.prompt[1], engine)
    start_s = time.monotonic()
    ledger = collect(
        engine.sampler,
        engine.tokenizer,
        questions,
        selection,
        config.out,
        samples=config.n,
        batch_size=engine.batch_size,
        seed=config.seed,
        source=dict(model=str(engine.folder), step=checkpoint_step(engine.folder), seed=config.seed),
        arguments=deciding_arguments(engine),
        say=say,
        **engine.sampling(),
    )
    print(summary(ledger, selection))
    say(f"{config.out}, {time.monotonic() - start_s:.1f} s")
    if not ledger.is_whole:
        raise SystemExit(130)


def ask_problems(engine: Engine) -> list[Question]:
    """The file's problems in its order, or generated ones to train on: none of them is held out."""
    config, miniature = engine.config, own_miniature(engine.tokenizer)
    check_miniature(config, miniature)
    if config.data:
        problems = read_file(config)
        say(f"problems: {len(problems)} of {config.data}")
    else:
        n = config.limit or N_GENERATED
        problems = training_problems(load_task(config, miniature), n, config.seed)
        repeated = f"{n - len(problems)} that came twice left out"
        say(f"problems: {len(problems)} generated ones for training, none held out; {repeated}")
    return [ask(problem, engine.template, engine.tokenizer) for problem in problems]


def read_prompts(engine: Engine) -> list[Question]:
    """The questions of --prompts: with a chat template messages, else text as --template dresses it."""

    def to_question(row: dict) -> Question:
        messages = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
        if not is_chat(messages):
            raise ValueError(
                "expected a text 'prompt', or 'messages' with texts 'role' and 'content', the last a user's"
            )
        if "messages" in row and engine.template != "chat":
            raise ValueError(f"'messages' need the template chat, and this is {engine.template}; give a 'prompt'")
        messages = first_messages(engine.config) + messages
        prompt = write_messages(messages, engine.template, engine.tokenizer)
        return Question(messages if engine.template == "chat" else prompt[0], prompt, None)

    questions = read_json_lines(engine.config.prompts, to_question)[: engine.config.limit or None]
    say(f"prompts: {len(questions)} of {engine.config.prompts}")
    return questions


def is_chat(messages: object) -> bool:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return False
    texts = [message.get(name) for message in messages for name in ("role", "content")]
    return bool(messages) and all(isinstance(text, str) for text in texts) and messages[-1]["role"] == "user"


def checkpoint_step(folder: Path) -> int | None:
    found = re.fullmatch(r"step_(\d+)", folder.name)
    return int(found[1]) if found else None


def deciding_arguments(engine: Engine) -> dict:
    """The arguments on which the lines depend; --max-rows and the machine may change when the command goes on."""
    names = "task data task_args limit prompts system n seed keep any_format min_language max_per_problem stop_text"
    names += " temperature top_k top_p max_new_tokens"
    arguments = {option_name(name): getattr(engine.config, name) for name in names.split()}
    return {"--model": str(engine.folder), "--template": engine.template} | arguments


if __name__ == "__main__":
    main()
