"""Talk to a model, or measure it on a task.

    python sample.py --model FOLDER "Why is the sky blue?"     one answer, printed as it is made
    python sample.py --model FOLDER                            a conversation (Ctrl-C: stop an answer, Ctrl-D: end)
    python sample.py --model FOLDER --raw < prompt.txt         the text as it is: for base models and miniatures
    python sample.py --model FOLDER --task gsm8k --data gsm8k_test.jsonl --limit 200 --out answers.jsonl
    python sample.py --model FOLDER --task gsm8k --data gsm8k_test.jsonl --n 16 --compare --picture compare.svg
    python sample.py --model FOLDER --task countdown --n 16 --keep correct --out traces.jsonl    text to train on
    python sample.py --model FOLDER --prompts prompts.jsonl --out general.jsonl                  the same, not judged

FOLDER is a model folder, a run folder (its newest checkpoint is taken) or miniature/countdown, which is pretrained
where it is not in the cache. Answers and results go to stdout, everything else to stderr. The same command with the
same seed gives the same result; one that writes to --out goes on where it was stopped. A miniature is known by
its vocabulary, and --task then takes the miniature's own problems.
"""

import math
import re
import sys
import time
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal

import nanor1.openmp  # noqa: F401  # isort: skip  (before torch)

import torch

from nanor1.chat import INTERRUPTED, Speaker, answer, check_room, converse, say, write_messages
from nanor1.config import apply_preset, option, option_name, parse_args, user_errors
from nanor1.evaluate import Preference
from nanor1.ledger import touch
from nanor1.machine import choose_device
from nanor1.measure import Asker, batch_size, measure
from nanor1.methods import (
    LEGEND,
    METHODS,
    SINGLE,
    Figures,
    Run,
    Settings,
    compare,
    obstacle,
    picture,
    powers_of_two,
    report,
    runs_of,
    table,
)
from nanor1.miniature import Miniature, find_miniature, find_model, miniature_task, own_miniature
from nanor1.model import Transformer
from nanor1.pretrained import read_config
from nanor1.sampler import Sampler
from nanor1.search import Scorer, mean_logprob, reward_scorer
from nanor1.tasks import (
    BOXED_TASKS,
    Problem,
    Style,
    Task,
    make_task,
    parse_object,
    read_examples,
    read_json_lines,
    read_task,
    task_parameters,
)
from nanor1.tokenizer import Tokenizer
from nanor1.traces import (
    SEED_STRIDE,
    Question,
    Selection,
    ask,
    collect,
    summary,
    training_problems,
)
from nanor1.training import check_least, default_tokens_per_batch, load_reward_model, to_preference

METHOD_OPTIONS = """method compare picture style examples reward_model step_score step_text wait_text min_thinking
    max_thinking max_answer window keep_share""".split()


@dataclass(frozen=True)
class Config:
    model: str = option(MISSING, "model folder, run folder, or miniature/NAME")
    prompt: str = option("", "what to ask; left out: stdin, or on a terminal a conversation", positional=True)
    system: str = option("", "system message, for models with a chat template")
    template: Literal["auto", "chat", "r1-zero", "bare"] = option(
        "auto", "of the prompt; auto: chat if the model has one, else bare (--task: r1-zero, a miniature's bare)"
    )
    template_args: str = option(
        "", 'JSON object of variables of the model\'s chat template, as {"enable_thinking": false} for Qwen3'
    )
    raw: bool = option(False, "--template bare: the prompt as it is")
    seed: int = option(0, "of the random numbers, and of a miniature that is named")

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
    out: str | None = option(
        None, "JSON lines: each problem's answers and verdicts, or training text; one begun before goes on"
    )
    max_rows: int = option(64, "answers made at once; more are faster, above all on a GPU, and take more memory")

    method: str = option("", f"how to spend --n: one or more, NAME,NAME,..., of {', '.join(METHODS)}", "methods")
    compare: bool = option(False, "each --method (none: all that can be) at N = 1, 2, 4 ... --n, in a table")
    picture: str | None = option(None, "SVG file to draw the table's accuracy against tokens into")
    style: Style = option(
        "think", "of a chat prompt: think between tags, chain of thought in the open, answer directly"
    )
    examples: str | None = option(None, "JSON lines of `prompt` and `completion` to show first (few-shot)")
    reward_model: str | None = option(None, "folder by train_sft.py --objective preference, for best-reward")
    step_score: Literal["logprob", "reward"] = option("logprob", "beam, dvts: by what the best steps are kept")
    step_text: str | None = option(None, "beam, dvts: ends a step; none: a line break (a miniature: wait)")
    wait_text: str | None = option(
        None, "budget: takes the place of the end of thinking; none: Wait (without tags: on a new line)"
    )
    min_thinking: int | None = option(
        None, "budget: tokens from which on thinking may end; none: at every end, N - 1 times, it waits"
    )
    max_thinking: int = option(0, "budget: tokens after which thinking is ended by force; 0: what --max-answer leaves")
    max_answer: int = option(0, "budget: tokens of the answer behind it; 0: a quarter of --max-new-tokens")
    window: int = option(32, "vote-tail, vote-lowest: tokens over which a confidence is taken")
    keep_share: float = option(1.0, "vote-tail, vote-lowest: the most confident share of the answers votes")

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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of the weights; auto: bfloat16 on cuda and on a CPU that is clearly faster with it; float16: cuda only"
    )
    threads: int = option(0, "CPU threads; 0: torch's choice")

    def validate(self) -> None:
        least = dict(temperature=0, top_k=0, max_new_tokens=1, n=1, limit=0, max_rows=1, threads=0, max_per_problem=1)
        least |= dict(max_thinking=0, max_answer=0, window=1)
        check_least(self, least, {})
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_language <= 1:
            raise ValueError(f"--min-language is {self.min_language}; it must lie between 0 and 1")
        if self.raw and self.template not in ("auto", "bare"):
            raise ValueError(f"--raw means --template bare; leave one of --raw and --template {self.template} out")
        parse_object(self.template_args, "--template-args")
        if not 0 < self.keep_share <= 1:
            raise ValueError(f"--keep-share is {self.keep_share}; it must be above 0 and at most 1")
        if self.min_thinking is not None and self.min_thinking < 0:
            raise ValueError(f"--min-thinking is {self.min_thinking}; it must be at least 0")
        if self.step_score == "reward" and not self.reward_model:
            raise ValueError("--step-score reward needs --reward-model FOLDER")
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
        if not self.task or self.keep:
            self.refuse(METHOD_OPTIONS, "is for an evaluation: add --task, and leave --keep out")
        else:
            self.check_methods()
        if self.prompts and self.keep not in (None, "all"):
            raise ValueError(f"--keep {self.keep} needs --task, by which answers are judged; --prompts are not")
        if self.keep not in ("correct", "pairs"):
            self.refuse(["any_format", "min_language", "max_per_problem"], "is for --keep correct or --keep pairs")
        if (self.keep or self.prompts) and not self.out:
            raise ValueError(f"{'--keep' if self.keep else '--prompts'} needs --out FILE, to which it writes")
        if self.keep == "pairs" and self.n == 1:
            raise ValueError("--keep pairs needs several answers to a problem; give --n 16")

    def check_methods(self) -> None:
        """Options of a method are for it alone, and do something."""
        if not (self.method or self.compare):
            self.refuse(["picture"], "is of --method or --compare")
        if self.compare and self.n == 1:
            raise ValueError("--compare looks at N = 1, 2, 4 ... --n: give --n 2 or more")
        if self.methods or not self.compare:
            for names, users in OPTIONS_OF.items():
                if not {*users.split()} & {*self.methods}:
                    self.refuse(names.split(), f"is of --method {users.replace(' ', ' or ')}, which is not asked for")
        if self.n == 1:
            self.refuse(["wait_text", "min_thinking"], "is of budget forcing's N - 1 waits: give --n 2 or more")

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(filter(None, self.method.split(","))))

    @property
    def ns(self) -> list[int]:
        """Each N that is looked at."""
        return powers_of_two(self.n) if self.compare else [self.n]

    def refuse(self, names: list[str], why: str) -> None:
        for field in fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                raise ValueError(f"{'the prompt' if field.name == 'prompt' else option_name(field.name)} {why}")


# As it is trained, and in its words; its answers are short and take little memory.
MINIATURE = dict(max_new_tokens=224, max_rows=512, step_text="wait", wait_text="wait")
N_GENERATED = 200  # problems where no --limit is given
UNDRAWN = {"token-beam", "budget", "refine", *SINGLE}  # runs whose answers are not N equal ones at temperature 0
OPTIONS_OF = {  # methods
    "step_score step_text": "beam dvts",
    "wait_text min_thinking max_thinking max_answer": "budget",
    "window keep_share": "vote-tail vote-lowest",
}
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p")
ASKED = "task data task_args limit seed stop_text " + " ".join(SAMPLING)  # what files depend on
TRACES = ASKED + " n prompts system keep any_format min_language max_per_problem"
EVALUATION = (
    ASKED + " style examples reward_model step_score step_text wait_text min_thinking max_thinking max_answer window"
)


@user_errors()
def main() -> None:
    config, given = parse_args(Config, description=__doc__)
    if config.task:
        config = apply_preset(config, given, dict(temperature=0.0 if config.n == 1 else 1.0))
    runs = {METHODS[name].run for name in config.methods if name in METHODS} or {"samples"}
    if config.n > 1 and config.temperature == 0 and not runs <= UNDRAWN:
        raise ValueError(
            f"--n {config.n} at --temperature 0 gives the same answer {config.n} times; raise one or drop one"
        )
    if find_miniature(config.model):
        config = apply_preset(config, given, MINIATURE)
    if config.max_answer >= config.max_new_tokens and not config.max_thinking:
        raise ValueError(f"--max-answer {config.max_answer} leaves nothing of --max-new-tokens {config.max_new_tokens}")
    prompt = config.prompt if config.task or config.prompts or "prompt" in given else read_stdin()
    engine = make_engine(config)
    if config.keep or config.prompts:
        write_traces(engine)
    elif config.task:
        evaluate(engine)
    else:
        talk(engine, prompt)


@dataclass(frozen=True)
class Engine:
    """A model, and how it is asked; its weights are read when they are first needed, after all mistakes are found."""

    folder: Path  # of the model
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer
    template: str
    template_arguments: dict[str, object]  # of the model's chat template
    config: Config

    @cached_property
    def sampler(self) -> Sampler:
        return Sampler(Transformer.from_pretrained(self.folder, self.dtype, self.device), self.config.max_rows)

    def sampling(self) -> dict:
        """The arguments of Sampler.generate that are the same for every prompt."""
        stop_texts = [self.config.stop_text] if self.config.stop_text else []
        return {name: getattr(self.config, name) for name in SAMPLING} | dict(
            stop_texts=stop_texts, decode=self.tokenizer.decode
        )


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
    if sys.stdin is None:  # closed
        return ""
    if sys.stdin.isatty():
        return None
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not UTF-8 text ({error}); convert it") from error


def make_engine(config: Config) -> Engine:
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = find_model(config.model, config.seed, Console())
    (_, model_config), tokenizer = read_config(folder), Tokenizer.from_pretrained(folder)
    template, reason = choose_template(config, tokenizer)
    template_arguments = read_template_arguments(config, template, tokenizer)
    if config.system and template != "chat":
        raise ValueError(f"--system needs the template chat, and this is {template}; write it into the prompt")
    device, dtype = choose_device(config.device, config.dtype, say, model_config.hidden_size)
    say(f"model: {folder}; template: {template} ({reason})")
    return Engine(folder, device, dtype, tokenizer, template, template_arguments, config)


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


def read_template_arguments(config: Config, template: str, tokenizer: Tokenizer) -> dict[str, object]:
    """What --template-args tells the chat template; ValueError for what it would pass over in silence."""
    arguments = parse_object(config.template_args, "--template-args")
    if arguments and template != "chat":
        raise ValueError(f"--template-args needs the template chat, and this is {template}; leave it out")
    if unknown := sorted(arguments.keys() - tokenizer.template_parameters):
        known = ", ".join(sorted(tokenizer.template_parameters)) or "none"
        raise ValueError(
            f"--template-args: the chat template of {config.model} has no variable {unknown[0]!r}; it has {known}"
        )
    return arguments


# ---- one prompt, or a conversation


def talk(engine: Engine, prompt: str | None) -> None:
    """Answer the prompt, or without one whatever a person types."""
    config = engine.config
    speaker = Speaker(
        engine.sampler, engine.tokenizer, engine.template, engine.sampling(), config.n, engine.template_arguments
    )
    messages, seed = first_messages(config), config.seed * SEED_STRIDE
    if prompt is None:
        converse(speaker, messages, seed)
        return
    answers = answer(speaker, [*messages, {"role": "user", "content": prompt}], seed)
    if any(made.ending == INTERRUPTED for made in answers):
        raise SystemExit(130)


def first_messages(config: Config) -> list[dict[str, str]]:
    return [{"role": "system", "content": config.system}] if config.system else []


# ---- evaluation


def evaluate(engine: Engine) -> None:
    """Answer and judge the problems, and print what came of it; Ctrl-C reports the batches done, and ends with 130."""
    config, miniature = engine.config, own_miniature(engine.tokenizer)
    check_miniature(config, miniature)
    methods = choose_methods(engine)
    runs = runs_of(methods or ["sample"], config.ns)
    refuse_stop_text(config, runs)
    if config.picture:
        touch(Path(config.picture), "--picture")
    problems, asker = load_problems(config, miniature), make_asker(engine)
    rows, is_whole = measure(asker, problems, runs, config.out, deciding_arguments(engine, EVALUATION), say)
    if any(rows.values()):
        how = f"temperature {config.temperature:g}, seed {config.seed}" if config.temperature else "greedy"
        begun = "".join(f" (of {run} {len(done)})" for run, done in rows.items() if 0 < len(done) < len(problems))
        print(f"{config.task}: {len(problems)} problems{begun} x {config.n}, template {engine.template}, {how}")
        if methods:
            show_methods(config, methods, compare(methods, config.ns, rows, problems, asker.settings))
        else:
            print(report(runs[0], rows[runs[0]], problems))
    if not is_whole:
        raise SystemExit(130)


def choose_methods(engine: Engine) -> list[str]:
    """Those of --method; for --compare without it all that can be; ValueError for one that cannot."""
    config = engine.config
    what = (config.ns, config.task, engine.template, bool(config.reward_model))
    takes_all = config.compare and not config.methods
    obstacles = {name: obstacle(name, *what) for name in (METHODS if takes_all else config.methods)}
    for why in dict.fromkeys(filter(None, obstacles.values())):
        names = ", ".join(name for name, reason in obstacles.items() if reason == why)
        if not takes_all:
            raise ValueError(f"--method {names}: {why}")
        say(f"left out: {names}: {why}")
    return [name for name, why in obstacles.items() if not why]


def refuse_stop_text(config: Config, runs: list[Run]) -> None:
    """ValueError where --stop-text would be passed over."""
    deaf = [run.kind for run in runs if run.kind not in ("samples", *SINGLE)]
    if config.stop_text and deaf:
        raise ValueError(f"--stop-text ends samples, and not what --method {deaf[0]} makes; leave one of them out")


def show_methods(config: Config, methods: list[str], found: list[Figures]) -> None:
    """Print the table of methods and what its words mean, and draw the picture."""
    print("\n".join([table(found), "", *(f"{name:<13} {METHODS[name].what}" for name in methods), "", LEGEND]))
    if config.picture:
        title = f"{Path(config.model).resolve().name} on {config.task}, {found[0].problems} problems"
        Path(config.picture).write_text(picture(found, title), encoding="utf-8")


def make_asker(engine: Engine) -> Asker:
    """The model with all that --task's options say of how it is asked."""
    config, tokenizer = engine.config, engine.tokenizer
    is_tagged = engine.template == "r1-zero" or config.style == "think"
    max_answer = config.max_answer or max(1, config.max_new_tokens // 4)
    settings = Settings(
        step_text=config.step_text or "\n",
        wait_text=config.wait_text or ("Wait" if is_tagged else "\nWait,"),
        end_text="</think>" if is_tagged else "",
        answer_text=answer_opening(config.task),
        min_thinking=math.inf if config.min_thinking is None else config.min_thinking,
        max_thinking=config.max_thinking or max(1, config.max_new_tokens - max_answer),
        max_answer=max_answer,
        window=config.window,
        keep_share=config.keep_share,
    )
    examples = read_examples(config.examples) if config.examples else ()
    preference, scorer = judges(engine) if config.reward_model else (None, mean_logprob)
    if config.step_score == "reward" and is_tagged:
        raise ValueError(
            "--step-score reward: a reward model judges answers, not thinking; use a chat prompt of --style cot"
        )
    return Asker(
        engine.sampler,
        tokenizer,
        engine.template,
        config.seed,
        {name: getattr(config, name) for name in SAMPLING},
        stop_texts=[config.stop_text] if config.stop_text else [],
        template_arguments=engine.template_arguments,
        style=config.style,
        examples=examples,
        settings=settings,
        preference=preference,
        scorer=scorer if config.step_score == "reward" else mean_logprob,
    )


def answer_opening(task: str) -> str:
    """What opens the final answer where thinking is ended by force."""
    if task == "code":
        return "\n```python\n"
    return "\nThe final answer is \\boxed{" if task in BOXED_TASKS else " <answer>"


def judges(engine: Engine) -> tuple[Preference, Scorer]:
    """What the reward model of --reward-model thinks of whole answers, in 0..1, and of answers step by step."""
    model = load_reward_model(engine.config.reward_model, engine.tokenizer, engine.dtype, engine.device)
    n_tokens = default_tokens_per_batch(0, engine.device)
    return to_preference(model, engine.tokenizer, n_tokens), reward_scorer(model, engine.tokenizer, n_tokens)


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


# ---- training text


def write_traces(engine: Engine) -> None:
    """Rejection sampling into --out, and what came of it; Ctrl-C keeps the batches done and ends with 130."""
    config = engine.config
    selection = Selection(config.keep or "all", not config.any_format, config.min_language, config.max_per_problem)
    questions = read_prompts(engine) if config.prompts else ask_problems(engine)
    for number, question in enumerate(questions, 1):
        check_room(f"question {number}", question.prompt[1], engine.sampler)
    start_s = time.monotonic()
    ledger = collect(
        engine.sampler,
        engine.tokenizer,
        questions,
        selection,
        config.out,
        samples=config.n,
        batch_size=batch_size(Run("samples", config.n), config.max_rows),
        seed=config.seed,
        source=dict(model=str(engine.folder), step=checkpoint_step(engine.folder), seed=config.seed),
        arguments=deciding_arguments(engine, TRACES),
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
    return [ask(problem, engine.template, engine.tokenizer, engine.template_arguments) for problem in problems]


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
        prompt = write_messages(messages, engine.template, engine.tokenizer, engine.template_arguments)
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


def deciding_arguments(engine: Engine, names: str) -> dict:
    """The arguments on which the lines depend; --max-rows and the device may change when the command goes on."""
    arguments = {option_name(name): getattr(engine.config, name) for name in names.split()}
    arguments["--template-args"] = engine.template_arguments  # however they were spelled
    arguments["--dtype"] = str(engine.dtype).removeprefix("torch.")
    return {"--model": str(engine.folder), "--template": engine.template} | arguments


if __name__ == "__main__":
    main()
