"""A teacher answers training problems in its own template, as its student is to answer them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanor1.gradient import Example
from nanor1.judge import make_rules
from nanor1.miniature import find_model
from nanor1.model import Transformer
from nanor1.options import own_rewards, report_failures
from nanor1.run.checkpoint import digest
from nanor1.run.config import option_name
from nanor1.sampler import Sampler
from nanor1.stages import rejection_sampling, sft
from nanor1.stages.distillation import check_same_end
from nanor1.tasks.problems import STYLES, Problem, Task, format_prompt
from nanor1.tasks.prompts import Prompter, choose_stop_texts, choose_template
from nanor1.tokenizer import Tokenizer, check_same_vocabulary
from nanor1.training import Run

# what a traces file depends on, besides teacher and problems
DECIDING = ("trace_samples", "max_per_problem", "any_format", "max_new_tokens", "temperature", "seed")


@dataclass(frozen=True)
class Teacher:
    folder: Path
    model: Transformer
    tokenizer: Tokenizer


def load_teaching(run: Run, prompter: Prompter, task: Task | None) -> tuple[Teacher | None, list[Example]]:
    """The teacher, where the method asks it at each step, and its traces, which are made now where there are none.

    They come before the first step, so a checkpoint says that they are all there.
    """
    config, log = run.config, run.log
    path, has_traces = config.trace_file or str(log.folder / "traces.jsonl"), bool(config.trace_file or run.checkpoint)
    teacher = None if config.method == "traces" and has_traces else load_teacher(run, prompter)
    if config.method == "on-policy":
        return teacher, []
    if not has_traces:
        make_traces(run, teacher, prompter, task, path)
        teacher.model.drop_reordered()  # it scores from here on
    examples = read_traces(run, prompter, task, path)
    check_unchanged(run, path)
    return teacher if config.method == "logits" else None, examples


def load_teacher(run: Run, prompter: Prompter) -> Teacher:
    """The teacher in the student's dtype, on its device."""
    config = run.config
    folder = find_model(config.teacher, config.seed, run.log.say)
    if not folder.exists():
        raise ValueError(f"--teacher {folder} is neither a model folder nor a file of traces")
    run.log.say(f"teacher: {folder}")
    own = Tokenizer.from_pretrained(folder)
    if config.method != "traces":
        why = f"--method {config.method} compares distributions over tokens (--method traces does not)"
        check_same_vocabulary(prompter.tokenizer, own, why)
        check_same_end(prompter.tokenizer, own, prompter.template, why)
    return Teacher(folder, Transformer.from_pretrained(folder, run.dtype, run.device).requires_grad_(False), own)


def make_traces(run: Run, teacher: Teacher, prompter: Prompter, task: Task, path: str) -> None:
    """The teacher answers training problems; its right and readable answers go to `path`, a begun file goes on."""
    config, log = run.config, run.log
    selection = rejection_sampling.Selection("correct", not config.any_format, max_per_problem=config.max_per_problem)
    asker = to_teacher(config, prompter, teacher.tokenizer)
    ledger = rejection_sampling.collect(
        Sampler(teacher.model, config.max_rows, memory_share=0.5),
        asker,
        [
            rejection_sampling.ask(problem, asker, prompter)
            for problem in task.part("train", config.trace_problems, config.seed)
        ],
        make_rules(asker, own=own_rewards(config)),
        selection,
        path,
        samples=config.trace_samples,
        batch_size=max(1, rejection_sampling.WAVES * config.max_rows // config.trace_samples),
        seed=config.seed,
        source={"model": str(teacher.folder), "step": None, "seed": config.seed, "split": "train"},
        arguments={"--teacher": str(teacher.folder)} | {option_name(name): getattr(config, name) for name in DECIDING},
        say=log.say,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
    )
    report_failures(own_rewards(config), log.say_once)
    log.say(rejection_sampling.summary(ledger, selection))
    if not ledger.is_whole:
        log.say(f"continue with: python distill.py --resume {log.folder}")
        raise SystemExit(130)
    if not ledger.counts.get("kept"):
        raise ValueError(
            "none of the teacher's answers can be learned from; give a better teacher, more --trace-problems or "
            "--trace-samples, or --any-format"
        )


def to_teacher(config, prompter: Prompter, tokenizer: Tokenizer) -> Prompter:
    """How the teacher is asked what its student is to learn: in its own template, where it has one.

    It is told what its chat template has a variable for.
    """
    if prompter.template == "bare":
        return replace(prompter, tokenizer=tokenizer)
    template, _ = choose_template("auto", tokenizer, "r1-zero", is_base_chat=True)
    stop_texts = choose_stop_texts(config, template)
    if template != "chat":
        if prompter.system or prompter.examples or prompter.style != "think":
            raise ValueError(
                "--system, --style and --few-shot are of chats, and the teacher has no chat template; leave them out"
            )
        return Prompter(tokenizer, template, stop_texts=stop_texts)
    known = {name: value for name, value in prompter.arguments.items() if name in tokenizer.template_parameters}
    return replace(prompter, tokenizer=tokenizer, template=template, arguments=known, stop_texts=stop_texts)


def read_traces(run: Run, prompter: Prompter, task: Task | None, path: str) -> list[Example]:
    """What can be learned of a file of traces, without those of held-out problems."""
    max_tokens, log = min(run.config.max_tokens, run.context), run.log
    found = sft.read_examples(path, prompter.tokenizer, max_tokens, prompter.arguments, prompter.system)
    if found.n_not_train:
        log.say(f"warning: {path}: {found.n_not_train} traces of problems that are not for training (--split)")
    left_out = f", {found.n_too_long} longer than {max_tokens} tokens left out" if found.n_too_long else ""
    log.say(f"traces: {path}: {len(found.examples):,}{left_out}")
    asked = questions_of(task.listed.get("held-out", ())) if task else frozenset()
    examples = [example for example in found.examples if example.question not in asked]
    if len(examples) < len(found.examples):
        log.say(f"traces: {len(found.examples) - len(examples):,} left out, to problems that are held out")
    if not examples:
        raise ValueError(f"{path}: all of it answers problems that are held out; give other traces or --eval-data")
    return examples


def questions_of(problems: Sequence[Problem]) -> frozenset[str]:
    """What traces of these problems may have as their question, in whatever template they were asked."""
    chats = [sft.first_question(format_prompt(p, "chat", style)) for p in problems for style in STYLES]
    texts = [format_prompt(p, template).strip() for p in problems for template in ("r1-zero", "bare")]
    return frozenset(chats + texts)


def check_unchanged(run: Run, path: str) -> None:
    """The traces that the run made are not edited between its parts, as no other data file is (see `open_log`)."""
    config, before = run.config, run.progress.traces
    run.progress.traces = digest(Path(path))["sha256"]
    if before not in (None, run.progress.traces) and not config.trace_file:
        if not config.allow_changed_data:
            raise ValueError(f"{path} has changed since the run began: go on with --allow-changed-data")
        run.log.say(f"warning: {path} has changed since the run began")
