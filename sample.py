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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import nanor1.run.openmp  # noqa: F401  # isort: skip  (before torch)

import torch

from nanor1.chat import INTERRUPTED, answer, converse, say, write_messages
from nanor1.evaluation import methods
from nanor1.evaluation.measure import batch_size, measure
from nanor1.evaluation.methods import METHODS, SINGLE, Run, figures, looks_of, obstacle, powers_of_two, report, runs_of
from nanor1.evaluation.paired import compare_files
from nanor1.judge import make_rules
from nanor1.miniature import find_miniature, find_model, own_miniature
from nanor1.options import (
    MachineOptions,
    TaskOptions,
    count_failures,
    default_tokens_per_batch,
    load_task,
    own_rewards,
    report_failures,
)
from nanor1.rewards import OwnReward
from nanor1.run.checkpoint import digest
from nanor1.run.config import MANY, Rule, apply_preset, option, option_name, parse_args, refuse_idle, user_errors
from nanor1.run.machine import choose_device
from nanor1.run.resumable import touch
from nanor1.search.asking import Asker, check_room
from nanor1.search.step_beams import mean_logprob, reward_scorer
from nanor1.search.think_longer import Budget
from nanor1.stages.rejection_sampling import SEED_STRIDE, Question, Selection, ask, collect, summary
from nanor1.stages.reward_model import load_reward_model, to_preference
from nanor1.stages.sft import is_chat
from nanor1.tasks.problems import BOXED_TASKS, SPLITS, TASKS, Problem, parse_object, read_json_lines
from nanor1.tasks.prompts import PromptOptions, choose_template, make_prompter, to_system
from nanor1.tokenizer import Tokenizer
from nanor1.weights import read_config

# What options are for: whether it is done, and what is said of an option where it is not.
TASK = (("is for an evaluation: add --task", lambda c: c.task or c.prompts),)
EVALUATION = (("is for an evaluation: add --task, and leave --keep out", lambda c: c.task and not c.keep),)
TABLE = (*EVALUATION, ("is of --method or --compare", lambda c: c.method or c.compare))
SEVERAL = (*EVALUATION, ("looks at N = 1, 2, 4 ... --n: give --n 2 or more", lambda c: c.n > 1))
WAITS = (("is of budget forcing's N - 1 waits: give --n 2 or more", lambda c: c.n > 1),)
SELECTION = (("is for --keep correct or --keep pairs", lambda c: c.keep in ("correct", "pairs")),)
NO_TASK = (("is not for --task, which has its own prompts", lambda c: not c.task),)
NO_TASK_EITHER = (("takes the place of --task; leave one of them out", lambda c: not c.task),)
NO_PROMPTS = (("is not for --prompts, which are the questions", lambda c: not c.prompts),)
OF_PROBLEMS = dict.fromkeys([*inspect.get_annotations(TaskOptions), "split", "style", "few_shot"], NO_PROMPTS + TASK)
DRAWS = ("--temperature above 0", lambda c: c.temperature)


def of(methods: str, default, what: str, *, only: Sequence[Rule] = (), **range):
    """An option of these methods alone."""
    names = methods.split()
    why = f"is of --method {' or '.join(names)}, which is not asked for"
    asked = (why, lambda c: {*names} & {*c.methods} or c.compare and not c.methods)
    return option(default, f"{', '.join(names)}: {what}", only=(*EVALUATION, asked, *only), **range)


@dataclass(frozen=True, kw_only=True)
class Config(MachineOptions, TaskOptions, PromptOptions):
    model: str | None = option(None, "model folder, run folder, or miniature/NAME")
    prompt: str = option(
        "", "what to ask; left out: stdin, or on a terminal a conversation", positional=True, only=NO_TASK + NO_PROMPTS
    )
    raw: bool = option(False, "--template bare: the prompt as it is")
    seed: int = option(0, "of the random numbers, and of a miniature that is named", least=0)

    temperature: float = option(
        0.6, "0: greedy; default with --task: 0, or 1 where --n is above 1", "sampling", least=0
    )
    top_k: int = option(0, "draw from the k likeliest tokens; 0: from all", least=0, needs=DRAWS)
    top_p: float = option(1.0, "draw from the likeliest that hold this probability", above=0, most=1, needs=DRAWS)
    max_new_tokens: int = option(1024, "length limit of an answer", least=1)
    n: int = option(1, "answers to a prompt or problem; a prompt's first is printed as it is made", least=1, most=MANY)

    task: Literal[TASKS] | None = option(None, "measure on this task", "evaluation")
    split: Literal[("auto", *SPLITS)] = option(
        "auto", "part of the problems; auto: held-out, or train for --keep; all: the file as it is"
    )
    limit: int = option(0, "problems, at most; 0: all of the part, or 200 generated", least=0, only=TASK)
    paired: str | None = option(None, "BEFORE,AFTER: two --out files of evaluations, compared problem by problem")
    out: str | None = option(
        None, "JSON lines: each problem's answers and verdicts, or training text; one begun before goes on", only=TASK
    )
    max_rows: int = option(64, "answers made at once; more are faster, above all on a GPU, and take memory", least=1)

    method: str = option("", f"how to spend --n: NAME,NAME,..., of {', '.join(METHODS)}", "methods", only=EVALUATION)
    compare: bool = option(False, "each --method (none: all that can be) at N = 1, 2, 4 ... --n", only=SEVERAL)
    picture: str | None = option(None, "SVG file to draw the table's accuracy against tokens into", only=TABLE)
    reward_model: str | None = option(
        None, "folder by train_sft.py --objective preference, for best-reward", only=EVALUATION
    )
    step_score: Literal["logprob", "reward"] = of("beam dvts", "logprob", "by what the best steps are kept")
    step_text: str | None = of("beam dvts", None, "ends a step; none: a line break (a miniature: wait)")
    wait_text: str | None = of(
        "budget", None, "takes the place of the end of thinking; none: Wait (without tags: on a new line)", only=WAITS
    )
    min_thinking: int | None = of(
        "budget", None, "tokens from which on thinking may end; none: not before N - 1 waits", only=WAITS, least=0
    )
    max_thinking: int = of("budget", 0, "tokens at which thinking is ended; 0: what --max-answer leaves", least=0)
    max_answer: int = of("budget", 0, "tokens of the answer behind it; 0: a quarter of --max-new-tokens", least=0)
    window: int = of("vote-tail vote-lowest", 32, "tokens over which a confidence is taken", least=1)
    keep_share: float = of("vote-tail vote-lowest", 1.0, "the surest share of the answers votes", above=0, most=1)

    keep: Literal["correct", "pairs", "all"] | None = option(
        None, "right, readable answers; pairs of such a one and a wrong one; all", "training text, to --out", only=TASK
    )
    prompts: str | None = option(
        None, "JSON lines of `prompt` or `messages` to answer in place of a task: --keep all", only=NO_TASK_EITHER
    )
    any_format: bool = option(False, "keep right answers without the format asked for, too", only=SELECTION)
    min_language: float = option(
        0.99, "least share of the thinking's words in the problem's language; 0: any", least=0, most=1, only=SELECTION
    )
    max_per_problem: int = option(4, "answers or pairs of a problem: the first ones sampled", least=1, only=SELECTION)

    def check(self) -> None:
        """ValueError for options that ask for what cannot be; `refuse_idle` looks for those that ask for nothing."""
        if not self.model:
            raise ValueError("--model is required: no value on the command line")
        if self.raw and self.template not in ("auto", "bare"):
            raise ValueError(f"--raw means --template bare; leave one of --raw and --template {self.template} out")
        parse_object(self.template_args, "--template-args")
        if self.step_score == "reward" and not self.reward_model:
            raise ValueError("--step-score reward needs --reward-model FOLDER")
        if self.task not in (None, "countdown", "arithmetic") and not (self.data or self.eval_data):
            raise ValueError(f"--task {self.task} needs --data FILE or --eval-data FILE, JSON lines of its problems")
        if self.prompts and self.keep not in (None, "all"):
            raise ValueError(f"--keep {self.keep} needs --task, by which answers are judged; --prompts are not")
        if (self.keep or self.prompts) and not self.out:
            raise ValueError(f"{'--keep' if self.keep else '--prompts'} needs --out FILE, to which it writes")
        if self.keep == "pairs" and self.n == 1:
            raise ValueError("--keep pairs needs several answers to a problem; give --n 16")
        runs = {METHODS[name].run for name in self.methods if name in METHODS} or {"samples"}
        if self.n > 1 and self.temperature == 0 and not runs <= UNDRAWN:
            raise ValueError(
                f"--n {self.n} at --temperature 0 gives the same answer {self.n} times; raise one or drop one"
            )

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(filter(None, self.method.split(","))))

    @property
    def ns(self) -> list[int]:
        """Each N that is looked at."""
        return powers_of_two(self.n) if self.compare else [self.n]


# As it is trained, and in its words; its answers are short and take little memory.
MINIATURE = dict(max_new_tokens=224, max_rows=512, step_text="wait", wait_text="wait")
N_GENERATED = 200  # problems where no --limit is given
UNDRAWN = {"token-beam", "budget", "refine", *SINGLE}  # runs whose answers are not N equal ones at temperature 0
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p")
# What the lines of a file depend on; --max-rows and the device may change when a command goes on.
ASKED = "task data eval_data split fields task_args reward_file limit seed system style few_shot stop_text".split()
ASKED += SAMPLING
TRACES = [*ASKED, "n", "prompts", "keep", "any_format", "min_language", "max_per_problem"]
EVALUATED = [*ASKED, "reward_model", "step_score", "step_text", "wait_text", "min_thinking", "max_thinking"]
EVALUATED += ["max_answer", "window"]


@user_errors()
def main() -> None:
    config, given = parse_args(Config, description=__doc__)
    if config.paired:
        compare_pair(config.paired, given)
        return
    if config.task:
        config = apply_preset(config, given, dict(temperature=0.0 if config.n == 1 else 1.0))
    refuse_idle(config, given, OF_PROBLEMS)
    config.check()
    if find_miniature(config.model):
        config = apply_preset(config, given, MINIATURE)
    if config.max_answer >= config.max_new_tokens and not config.max_thinking:
        raise ValueError(f"--max-answer {config.max_answer} leaves nothing of --max-new-tokens {config.max_new_tokens}")
    prompt = config.prompt if config.task or config.prompts or "prompt" in given else read_stdin()
    asker = make_asker(config)
    if config.keep or config.prompts:
        write_traces(asker, config)
    elif config.task:
        evaluate(asker, config)
    else:
        talk(asker, config, prompt)


def compare_pair(paths: str, given: frozenset[str]) -> None:
    """Print what --paired asks for, which is for itself."""
    if others := sorted(given - {"paired"}):
        raise ValueError(f"{'the prompt' if others[0] == 'prompt' else option_name(others[0])} is not for --paired")
    before, _, after = paths.partition(",")
    if not before or not after or "," in after:
        raise ValueError(f"--paired {paths}: expected two files, BEFORE,AFTER")
    print(compare_files(before, after))


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


def make_asker(config: Config) -> Asker:
    """The model that the options name, not read yet, and how they ask it."""
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = find_model(config.model, config.seed, say)
    (_, model_config), tokenizer = read_config(folder), Tokenizer.from_pretrained(folder)
    is_asked = config.task and not own_miniature(tokenizer)
    asked = "bare" if config.raw else config.template
    template, reason = choose_template(asked, tokenizer, "r1-zero" if is_asked else "bare", not config.task)
    prompter = make_prompter(config, tokenizer, template, config.task or "prompt")
    device, dtype = choose_device(config.device, config.dtype, say, model_config.hidden_size)
    say(f"model: {folder}; template: {template} ({reason})")
    sampling = {name: getattr(config, name) for name in SAMPLING}
    rules = make_rules(prompter, own=own_rewards(config))
    return Asker(folder, device, dtype, prompter, sampling, config.max_rows, config.n, config.seed, rules=rules)


# ---- one prompt, or a conversation


def talk(asker: Asker, config: Config, prompt: str | None) -> None:
    """Answer the prompt, or without one whatever a person types."""
    messages, seed = to_system(config.system), config.seed * SEED_STRIDE
    if prompt is None:
        converse(asker, messages, seed)
        return
    answers = answer(asker, [*messages, {"role": "user", "content": prompt}], seed)
    if any(made.ending == INTERRUPTED for made in answers):
        raise SystemExit(130)


# ---- evaluation


def evaluate(asker: Asker, config: Config) -> None:
    """Answer and judge the problems, and print what came of it; Ctrl-C reports the batches done, and ends with 130."""
    names, runs = choose_methods(config, asker.prompter.template)
    if config.picture:
        touch(Path(config.picture), "--picture")
    problems, split = load_problems(config, asker.tokenizer)
    asker = with_methods(asker, config)
    arguments = deciding_arguments(asker, config, EVALUATED, split)
    rows, is_whole = measure(asker, problems, runs, config.out, arguments, say)
    report_rewards(asker.rules.own)
    if any(rows.values()):
        how = f"temperature {config.temperature:g}, seed {config.seed}" if config.temperature else "greedy"
        begun = "".join(f" (of {run} {len(done)})" for run, done in rows.items() if 0 < len(done) < len(problems))
        what = f"{config.task}: {len(problems)} problems{begun} x {config.n}"
        print(f"{what}, template {asker.prompter.template}, {how}; part: {split}")
        if names:
            looks = [look for look in looks_of(names, config.ns) if rows[look[-1]]]
            found = [figures(*look, rows[look[-1]], problems, config.keep_share) for look in looks]
            show_methods(config, names, found)
        else:
            print(report(runs[0], rows[runs[0]], problems))
    if not is_whole:
        raise SystemExit(130)


def choose_methods(config: Config, template: str) -> tuple[list[str], list[Run]]:
    """The methods of --method, or for --compare without it all that can be, and their runs; ValueError for what cannot.

    Without either there is no method, and one run of samples.
    """
    takes_all = config.compare and not config.methods
    what = (config.ns, config.task, template, bool(config.reward_model))
    obstacles = {name: obstacle(name, *what) for name in (METHODS if takes_all else config.methods)}
    for why in dict.fromkeys(filter(None, obstacles.values())):
        names = ", ".join(name for name, reason in obstacles.items() if reason == why)
        if not takes_all:
            raise ValueError(f"--method {names}: {why}")
        say(f"left out: {names}: {why}")
    names = [name for name, why in obstacles.items() if not why]
    runs = runs_of(names or ["sample"], config.ns)
    deaf = [run.kind for run in runs if run.kind not in ("samples", *SINGLE)]
    if config.stop_text not in ("auto", "", None) and deaf:
        raise ValueError(f"--stop-text ends samples, and not what --method {deaf[0]} makes; leave one of them out")
    return names, runs


def show_methods(config: Config, names: list[str], found: list[methods.Figures]) -> None:
    """Print the table of methods and what its words mean, and draw the picture."""
    words = [f"{name:<13} {METHODS[name].what}" for name in names]
    print("\n".join([methods.table(found), "", *words, "", methods.LEGEND]))
    if config.picture:
        title = f"{Path(config.model).resolve().name} on {config.task}, {found[0].problems} problems"
        Path(config.picture).write_text(methods.picture(found, title), encoding="utf-8")


def report_rewards(own: dict[str, OwnReward]) -> None:
    """What went wrong in rewards of one's own, and how often."""
    report_failures(own, lambda _, text: say(text))
    count_failures(own, say)


def with_methods(asker: Asker, config: Config) -> Asker:
    """The asker with all that the options say of methods, and with a reward model's judgement."""
    is_tagged = asker.prompter.template == "r1-zero" or config.style == "think"
    max_answer = config.max_answer or max(1, config.max_new_tokens // 4)
    opening = "\nThe final answer is \\boxed{" if config.task in BOXED_TASKS else " <answer>"
    budget = Budget(
        wait_text=config.wait_text or ("Wait" if is_tagged else "\nWait,"),
        end_text="</think>" if is_tagged else "",
        answer_text="\n```python\n" if config.task == "code" else opening,
        min_thinking=math.inf if config.min_thinking is None else config.min_thinking,
        max_thinking=config.max_thinking or max(1, config.max_new_tokens - max_answer),
        max_answer=max_answer,
    )
    rules, scorer = asker.rules, mean_logprob
    if config.reward_model:
        model = load_reward_model(config.reward_model, asker.tokenizer, asker.dtype, asker.device)
        n_tokens = default_tokens_per_batch(0, asker.device)
        rules = replace(rules, preference=to_preference(model, asker.tokenizer, n_tokens))
        if config.step_score == "reward":
            scorer = reward_scorer(model, asker.tokenizer, n_tokens)
    if config.step_score == "reward" and is_tagged:
        raise ValueError(
            "--step-score reward: a reward model judges answers, not thinking; use a chat prompt of --style cot"
        )
    step_text = config.step_text or "\n"
    return replace(asker, rules=rules, scorer=scorer, step_text=step_text, budget=budget, window=config.window)


def load_problems(config: Config, tokenizer: Tokenizer) -> tuple[list[Problem], str]:
    """The problems of the part that is asked for, and which part it is."""
    split = ("train" if config.keep else "held-out") if config.split == "auto" else config.split
    task = load_task(config, config.task, tokenizer, (split,))
    problems = task.part(split, config.limit or (0 if split in task.listed else N_GENERATED), config.seed)
    say(f"problems: {len(problems):,} - {task.describe(split)}")
    return problems, split


# ---- training text


def write_traces(asker: Asker, config: Config) -> None:
    """Rejection sampling into --out, and what came of it; Ctrl-C keeps the batches done and ends with 130."""
    selection = Selection(config.keep or "all", not config.any_format, config.min_language, config.max_per_problem)
    if config.prompts:
        questions, split = read_prompts(asker, config), None
    else:
        problems, split = load_problems(config, asker.tokenizer)
        questions = [ask(problem, asker.prompter) for problem in problems]
    for number, question in enumerate(questions, 1):
        check_room(f"question {number}", question.prompt[1], asker.sampler)
    step = re.fullmatch(r"step_(\d+)", asker.folder.name)
    source = dict(model=str(asker.folder), step=int(step[1]) if step else None, seed=config.seed)
    start_s = time.monotonic()
    ledger = collect(
        asker.sampler,
        asker.prompter,
        questions,
        asker.rules,
        selection,
        config.out,
        samples=config.n,
        batch_size=batch_size(Run("samples", config.n), config.max_rows),
        seed=config.seed,
        source=source | (dict(split=split) if split else {}),
        arguments=deciding_arguments(asker, config, TRACES, split),
        say=say,
        **asker.sampling,
    )
    report_rewards(asker.rules.own)
    print(summary(ledger, selection))
    say(f"{config.out}, {time.monotonic() - start_s:.1f} s")
    if not ledger.is_whole:
        raise SystemExit(130)


def read_prompts(asker: Asker, config: Config) -> list[Question]:
    """The questions of --prompts: with a chat template messages, else text as --template dresses it."""
    template = asker.prompter.template

    def to_question(row: dict) -> Question:
        messages = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
        if not is_chat(messages) or messages[-1]["role"] != "user":
            raise ValueError(
                "expected a text 'prompt', or 'messages' with texts 'role' and 'content', the last a user's"
            )
        if "messages" in row and template != "chat":
            raise ValueError(f"'messages' need the template chat, and this is {template}; give a 'prompt'")
        messages = to_system(config.system) + messages
        prompt = write_messages(messages, asker.prompter)
        return Question(messages if template == "chat" else prompt[0], prompt, None)

    questions = read_json_lines(config.prompts, to_question)[: config.limit or None]
    say(f"prompts: {len(questions)} of {config.prompts}")
    return questions


def deciding_arguments(asker: Asker, config: Config, names: list[str], split: str | None) -> dict:
    """The arguments on which the lines of a file depend, by the options' names."""
    arguments = {option_name(name): getattr(config, name) for name in names}
    arguments["--split"] = split  # the part that was taken
    arguments["--template-args"] = asker.prompter.arguments  # however they were spelled
    arguments["--stop-text"] = list(asker.prompter.stop_texts)
    if path := config.reward_file:
        arguments["--reward-file"] = f"{path} (sha256 {digest(Path(path))['sha256'][:12]})"
    arguments["--dtype"] = str(asker.dtype).removeprefix("torch.")
    return {"--model": str(asker.folder), "--template": asker.prompter.template} | arguments


if __name__ == "__main__":
    main()
