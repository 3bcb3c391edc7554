"""Talk to a model, or measure it on a task.

    python sample.py --model FOLDER "Why is the sky blue?"     one answer, printed as it is made
    python sample.py --model FOLDER                            a conversation (Ctrl-C: stop an answer, Ctrl-D: end)
    python sample.py --model FOLDER --raw < prompt.txt         the text as it is: for base models and miniatures
    python sample.py --model FOLDER --task gsm8k --eval-data gsm8k_test.jsonl --limit 200 --out answers.jsonl
    python sample.py --model FOLDER --task gsm8k --eval-data gsm8k_test.jsonl --n 16 --compare --picture compare.svg
    python sample.py --paired before.jsonl,after.jsonl            two such files, problem by problem
    python sample.py --model FOLDER --task countdown --n 16 --keep correct --out traces.jsonl    text to train on
    python sample.py --model FOLDER --prompts prompts.jsonl --out general.jsonl                  the same, not judged

FOLDER is a model folder, a run folder (its newest checkpoint is taken) or miniature/countdown, which is pretrained
where it is not in the cache. Answers and results go to stdout, everything else to stderr. The same command with the
same seed gives the same result; one that writes to --out goes on where it was stopped. A miniature is known by
its vocabulary, and --task then takes the miniature's own problems.

A tenth of the problems of --data, or all of --eval-data, is held out, as in training: --task measures on those, the
same ones as train_zero.py, and --keep makes text to train on of the others. --split takes another part.
"""

import inspect
import math
import re
import sys
import time
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal

import nanor1.openmp  # noqa: F401  # isort: skip  (before torch)

import torch

from nanor1.chat import INTERRUPTED, Speaker, answer, check_room, converse, say, write_messages
from nanor1.checkpoint import digest
from nanor1.config import MANY, apply_preset, option, option_name, parse_args, refuse_idle, user_errors
from nanor1.judge import Preference, make_rules
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
from nanor1.miniature import find_miniature, find_model, own_miniature
from nanor1.model import Transformer
from nanor1.options import (
    MachineOptions,
    TaskOptions,
    count_failures,
    default_tokens_per_batch,
    load_reward_model,
    load_task,
    own_rewards,
    report_failures,
    to_preference,
)
from nanor1.paired import compare_files
from nanor1.pretrained import read_config
from nanor1.prompts import Prompter, PromptOptions, choose_template, make_prompter, to_system
from nanor1.rewards import OwnReward
from nanor1.sampler import Sampler
from nanor1.search import Scorer, mean_logprob, reward_scorer
from nanor1.tasks import BOXED_TASKS, SPLITS, TASKS, Problem, parse_object, read_json_lines
from nanor1.tokenizer import Tokenizer
from nanor1.traces import SEED_STRIDE, Question, Selection, ask, collect, summary

METHOD_OPTIONS = """method compare picture reward_model step_score step_text wait_text min_thinking max_thinking
    max_answer window keep_share""".split()
DRAWS = ("--temperature above 0", lambda config: config.temperature)


@dataclass(frozen=True, kw_only=True)
class Config(MachineOptions, TaskOptions, PromptOptions):
    model: str | None = option(None, "model folder, run folder, or miniature/NAME")
    prompt: str = option("", "what to ask; left out: stdin, or on a terminal a conversation", positional=True)
    raw: bool = option(False, "--template bare: the prompt as it is")
    seed: int = option(0, "of the random numbers, and of a miniature that is named", least=0)

    temperature: float = option(
        0.6, "0: greedy; with --task the default is 0, and 1 where --n is above 1", "sampling", least=0
    )
    top_k: int = option(0, "draw from the k likeliest tokens; 0: from all", least=0, needs=DRAWS)
    top_p: float = option(
        1.0, "draw from the likeliest tokens that hold this probability", above=0, most=1, needs=DRAWS
    )
    max_new_tokens: int = option(1024, "length limit of an answer", least=1)
    n: int = option(
        1, "answers to a prompt or problem; of a prompt's the first is printed as it is made", least=1, most=MANY
    )

    task: Literal[TASKS] | None = option(None, "measure on this task", "evaluation")
    split: Literal[("auto", *SPLITS)] = option(
        "auto", "part of the problems; auto: held-out, or train for --keep; all: the file as it is"
    )
    limit: int = option(0, "problems, at most; 0: all of the part, or 200 generated", least=0)
    paired: str | None = option(None, "BEFORE,AFTER: two --out files of evaluations, compared problem by problem")
    out: str | None = option(
        None, "JSON lines: each problem's answers and verdicts, or training text; one begun before goes on"
    )
    max_rows: int = option(
        64, "answers made at once; more are faster, above all on a GPU, and take more memory", least=1
    )

    method: str = option("", f"how to spend --n: one or more, NAME,NAME,..., of {', '.join(METHODS)}", "methods")
    compare: bool = option(False, "each --method (none: all that can be) at N = 1, 2, 4 ... --n, in a table")
    picture: str | None = option(None, "SVG file to draw the table's accuracy against tokens into")
    reward_model: str | None = option(None, "folder by train_sft.py --objective preference, for best-reward")
    step_score: Literal["logprob", "reward"] = option("logprob", "beam, dvts: by what the best steps are kept")
    step_text: str | None = option(None, "beam, dvts: ends a step; none: a line break (a miniature: wait)")
    wait_text: str | None = option(
        None, "budget: takes the place of the end of thinking; none: Wait (without tags: on a new line)"
    )
    min_thinking: int | None = option(
        None, "budget: tokens from which on thinking may end; none: at every end, N - 1 times, it waits", least=0
    )
    max_thinking: int = option(
        0, "budget: tokens after which thinking is ended by force; 0: what --max-answer leaves", least=0
    )
    max_answer: int = option(0, "budget: tokens of the answer behind it; 0: a quarter of --max-new-tokens", least=0)
    window: int = option(32, "vote-tail, vote-lowest: tokens over which a confidence is taken", least=1)
    keep_share: float = option(
        1.0, "vote-tail, vote-lowest: the most confident share of the answers votes", above=0, most=1
    )

    keep: Literal["correct", "pairs", "all"] | None = option(
        None,
        "write to --out: right and readable answers; pairs of such a one and a wrong one; all that ended",
        "training text",
    )
    prompts: str | None = option(None, "JSON lines of `prompt` or `messages` to answer in place of a task: --keep all")
    any_format: bool = option(False, "keep right answers without the format asked for, too")
    min_language: float = option(
        0.99, "least share of the thinking's words in the problem's language; 0: any", least=0, most=1
    )
    max_per_problem: int = option(4, "answers or pairs of a problem: the first ones sampled", least=1)

    def validate(self) -> None:
        if self.paired:
            self.refuse([field.name for field in fields(self) if field.name != "paired"], "is not for --paired")
            return
        if not self.model:
            raise ValueError("--model is required: no value on the command line")
        if self.raw and self.template not in ("auto", "bare"):
            raise ValueError(f"--raw means --template bare; leave one of --raw and --template {self.template} out")
        parse_object(self.template_args, "--template-args")
        if self.step_score == "reward" and not self.reward_model:
            raise ValueError("--step-score reward needs --reward-model FOLDER")
        if self.task not in (None, "countdown", "arithmetic") and not (self.data or self.eval_data):
            raise ValueError(f"--task {self.task} needs --data FILE or --eval-data FILE, JSON lines of its problems")
        if self.task == "arithmetic" and (self.data or self.eval_data):
            raise ValueError("--task arithmetic is generated; leave --data out, and --eval-data")
        self.check_mode()

    def check_mode(self) -> None:
        """Every option given belongs to what is done: an evaluation, training text, or a talk."""
        of_task = [*inspect.get_annotations(TaskOptions), "split", "style", "few_shot"]
        if self.task:
            self.refuse(["prompt"], "is not for --task, which has its own prompts")
            self.refuse(["prompts"], "takes the place of --task; leave one of them out")
        elif self.prompts:
            self.refuse(["prompt", *of_task], "is not for --prompts, which are the questions")
        else:
            self.refuse([*of_task, "limit", "out", "keep"], "is for an evaluation: add --task")
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
ASKED = (  # what files depend on
    "task data eval_data split fields task_args reward_file limit seed system style few_shot stop_text "
    + " ".join(SAMPLING)
)
TRACES = ASKED + " n prompts keep any_format min_language max_per_problem"
EVALUATION = ASKED + " reward_model step_score step_text wait_text min_thinking max_thinking max_answer window"


@user_errors()
def main() -> None:
    config, given = parse_args(Config, description=__doc__)
    if config.paired:
        print(compare_files(*split_pair(config.paired)))
        return
    if config.task:
        config = apply_preset(config, given, dict(temperature=0.0 if config.n == 1 else 1.0))
    refuse_idle(config, given)
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
    prompter: Prompter
    config: Config

    @cached_property
    def sampler(self) -> Sampler:
        return Sampler(Transformer.from_pretrained(self.folder, self.dtype, self.device), self.config.max_rows)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prompter.tokenizer

    @property
    def sampling(self) -> dict:
        """The arguments of Sampler.generate that are the same for every prompt."""
        return {name: getattr(self.config, name) for name in SAMPLING}


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


def split_pair(text: str) -> list[str]:
    paths = text.split(",")
    if len(paths) != 2 or not all(paths):
        raise ValueError(f"--paired {text}: expected two files, BEFORE,AFTER")
    return paths


def make_engine(config: Config) -> Engine:
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = find_model(config.model, config.seed, Console())
    (_, model_config), tokenizer = read_config(folder), Tokenizer.from_pretrained(folder)
    is_asked = config.task and not own_miniature(tokenizer)
    asked = "bare" if config.raw else config.template
    template, reason = choose_template(asked, tokenizer, "r1-zero" if is_asked else "bare", not config.task)
    prompter = make_prompter(config, tokenizer, template, config.task or "prompt")
    device, dtype = choose_device(config.device, config.dtype, say, model_config.hidden_size)
    say(f"model: {folder}; template: {template} ({reason})")
    return Engine(folder, device, dtype, prompter, config)


# ---- one prompt, or a conversation


def talk(engine: Engine, prompt: str | None) -> None:
    """Answer the prompt, or without one whatever a person types."""
    config = engine.config
    speaker = Speaker(engine.sampler, engine.prompter, engine.sampling, config.n)
    messages, seed = to_system(config.system), config.seed * SEED_STRIDE
    if prompt is None:
        converse(speaker, messages, seed)
        return
    answers = answer(speaker, [*messages, {"role": "user", "content": prompt}], seed)
    if any(made.ending == INTERRUPTED for made in answers):
        raise SystemExit(130)


# ---- evaluation


def evaluate(engine: Engine) -> None:
    """Answer and judge the problems, and print what came of it; Ctrl-C reports the batches done, and ends with 130."""
    config, methods = engine.config, choose_methods(engine)
    runs = runs_of(methods or ["sample"], config.ns)
    refuse_stop_text(config, runs)
    if config.picture:
        touch(Path(config.picture), "--picture")
    (problems, split), asker = load_problems(engine), make_asker(engine)
    arguments = deciding_arguments(engine, EVALUATION, split)
    rows, is_whole = measure(asker, problems, runs, config.out, arguments, say)
    report_rewards(asker.rules.own)
    if any(rows.values()):
        how = f"temperature {config.temperature:g}, seed {config.seed}" if config.temperature else "greedy"
        begun = "".join(f" (of {run} {len(done)})" for run, done in rows.items() if 0 < len(done) < len(problems))
        what = f"{config.task}: {len(problems)} problems{begun} x {config.n}"
        print(f"{what}, template {engine.prompter.template}, {how}; part: {split}")
        if methods:
            show_methods(config, methods, compare(methods, config.ns, rows, problems, asker.settings.keep_share))
        else:
            print(report(runs[0], rows[runs[0]], problems))
    if not is_whole:
        raise SystemExit(130)


def report_rewards(own: dict[str, OwnReward]) -> None:
    """What went wrong in rewards of one's own, and how often."""
    report_failures(own, lambda _, text: say(text))
    count_failures(own, say)


def choose_methods(engine: Engine) -> list[str]:
    """Those of --method; for --compare without it all that can be; ValueError for one that cannot."""
    config = engine.config
    what = (config.ns, config.task, engine.prompter.template, bool(config.reward_model))
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
    if config.stop_text not in ("auto", "", None) and deaf:
        raise ValueError(f"--stop-text ends samples, and not what --method {deaf[0]} makes; leave one of them out")


def show_methods(config: Config, methods: list[str], found: list[Figures]) -> None:
    """Print the table of methods and what its words mean, and draw the picture."""
    print("\n".join([table(found), "", *(f"{name:<13} {METHODS[name].what}" for name in methods), "", LEGEND]))
    if config.picture:
        title = f"{Path(config.model).resolve().name} on {config.task}, {found[0].problems} problems"
        Path(config.picture).write_text(picture(found, title), encoding="utf-8")


def make_asker(engine: Engine) -> Asker:
    """The model with all that --task's options say of how it is asked."""
    config, prompter = engine.config, engine.prompter
    is_tagged = prompter.template == "r1-zero" or config.style == "think"
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
    preference, scorer = judges(engine) if config.reward_model else (None, mean_logprob)
    if config.step_score == "reward" and is_tagged:
        raise ValueError(
            "--step-score reward: a reward model judges answers, not thinking; use a chat prompt of --style cot"
        )
    return Asker(
        engine.sampler,
        prompter,
        config.seed,
        engine.sampling,
        settings,
        make_rules(prompter, own=own_rewards(config), preference=preference),
        scorer if config.step_score == "reward" else mean_logprob,
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


def load_problems(engine: Engine) -> tuple[list[Problem], str]:
    """The problems of the part that is asked for, and which part it is."""
    config = engine.config
    split = ("train" if config.keep else "held-out") if config.split == "auto" else config.split
    task = load_task(config, config.task, engine.tokenizer, (split,))
    limit = config.limit or (0 if split in task.listed else N_GENERATED)
    problems = task.part(split, limit, config.seed)
    say(f"problems: {len(problems):,} - {task.describe(split)}")
    return problems, split


# ---- training text


def write_traces(engine: Engine) -> None:
    """Rejection sampling into --out, and what came of it; Ctrl-C keeps the batches done and ends with 130."""
    config = engine.config
    selection = Selection(config.keep or "all", not config.any_format, config.min_language, config.max_per_problem)
    if config.prompts:
        questions, split = read_prompts(engine), None
    else:
        problems, split = load_problems(engine)
        questions = [ask(problem, engine.prompter) for problem in problems]
    for number, question in enumerate(questions, 1):
        check_room(f"question {number}", question.prompt[1], engine.sampler)
    start_s = time.monotonic()
    ledger = collect(
        engine.sampler,
        engine.prompter,
        questions,
        make_rules(engine.prompter, own=own_rewards(config)),
        selection,
        config.out,
        samples=config.n,
        batch_size=batch_size(Run("samples", config.n), config.max_rows),
        seed=config.seed,
        source=dict(model=str(engine.folder), step=checkpoint_step(engine.folder), seed=config.seed)
        | (dict(split=split) if split else {}),
        arguments=deciding_arguments(engine, TRACES, split),
        say=say,
        **engine.sampling,
    )
    report_rewards(own_rewards(config))
    print(summary(ledger, selection))
    say(f"{config.out}, {time.monotonic() - start_s:.1f} s")
    if not ledger.is_whole:
        raise SystemExit(130)


def read_prompts(engine: Engine) -> list[Question]:
    """The questions of --prompts: with a chat template messages, else text as --template dresses it."""

    def to_question(row: dict) -> Question:
        messages = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
        if not is_chat(messages):
            raise ValueError(
                "expected a text 'prompt', or 'messages' with texts 'role' and 'content', the last a user's"
            )
        template = engine.prompter.template
        if "messages" in row and template != "chat":
            raise ValueError(f"'messages' need the template chat, and this is {template}; give a 'prompt'")
        messages = to_system(engine.config.system) + messages
        prompt = write_messages(messages, engine.prompter)
        return Question(messages if template == "chat" else prompt[0], prompt, None)

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


def deciding_arguments(engine: Engine, names: str, split: str | None) -> dict:
    """The arguments on which the lines depend; --max-rows and the device may change when the command goes on."""
    arguments = {option_name(name): getattr(engine.config, name) for name in names.split()}
    arguments["--split"] = split  # the part that was taken
    arguments["--template-args"] = engine.prompter.arguments  # however they were spelled
    arguments["--stop-text"] = list(engine.prompter.stop_texts)
    if path := engine.config.reward_file:
        arguments["--reward-file"] = f"{path} (sha256 {digest(Path(path))['sha256'][:12]})"
    arguments["--dtype"] = str(engine.dtype).removeprefix("torch.")
    return {"--model": str(engine.folder), "--template": engine.prompter.template} | arguments


if __name__ == "__main__":
    main()
