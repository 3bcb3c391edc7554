"""Rejection sampling: of a model's answers the right and readable ones become training text, line by line in a file.

Several answers to each problem are sampled and judged, and what is kept is written batch by batch, as JSON lines that
train_sft.py and distill.py read. A killed run goes on (resumable.py) to the very bytes that an uninterrupted one would
have written: a problem's random numbers depend on its index alone.

Source: DeepSeek-R1 (arXiv:2501.12948), section 2.3.3: several answers a prompt, only right ones kept, those that mix
languages filtered out. Departures: long paragraphs and code blocks stay, in which correct work is often written; what
is unreadable is here what lacks the format, or loops; and a problem gives only so many answers, so that easy ones do
not outnumber the hard ones. These are the first in the order of sampling, not the shortest: samples of one problem are
exchangeable, so the choice favours no kind of answer.

Left out: answers judged by a model, weighing problems by difficulty.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nanor1.grpo import Rollout
from nanor1.judge import Rules, judge_all
from nanor1.rewards import after_thinking
from nanor1.run.log import rounded
from nanor1.run.resumable import Ledger, Progress, digest, open_ledger, read_lines, work_through
from nanor1.sampler import Sampler
from nanor1.tasks.problems import Problem, prefilled
from nanor1.tasks.prompts import Prompt, Prompter

SEED_STRIDE = 1_000_003  # apart are the random numbers of one seed and the next: problems count up from it
WAVES = 4  # rows times this many answers make a batch: a row that ends early takes the next answer
LOOP_PERIODS = range(10, 301)  # characters; what is shorter may well stand often: 1 + 1 + 1 + 1 + 1
DROPPED = {  # why a sample is not kept, and how the report explains it; the first reason that holds counts
    "cut off": "unfinished at the length limit",
    "empty": "nothing said",
    "not judged": "no gold answer, or none that could be compared",
    "wrong": "or without an answer",
    "format": "right, but not in the format asked for",
    "language": "right, but in mixed languages",
    "looping": "right, but with a stretch of text four times in a row",
    "duplicate": "the same text again",
    "unpaired": "no answer of the other kind was left for it",
    "above the limit": "more than --max-per-problem",
}


@dataclass(frozen=True)
class Selection:
    """What is kept of a problem's samples.

    "all": all that ended. "correct": right, in the format, in one language, without loops, each text once, at most
    `max_per_problem`. "pairs": such an answer and a wrong one that ended, at most so many pairs, each sample in one.
    """

    keep: str = "correct"
    needs_format: bool = True
    min_language: float = 0.99  # share of the reasoning's words that are in the problem's language
    max_per_problem: int = 4


@dataclass(frozen=True)
class Question:
    """What a model is asked: the text or messages shown, their rendered text and ids, and what judges the answer."""

    shown: str | list[dict[str, str]]
    prompt: Prompt
    problem: Problem | None  # None: the answer is not judged


def ask(problem: Problem, prompter: Prompter, learner: Prompter | None = None) -> Question:
    """What a model is asked by its prompter, and as what it is learned: by the learner's, and without the examples."""
    return Question(replace(learner or prompter, examples=()).show(problem), prompter.write(problem), problem)


# ---- what is kept of one problem's samples


def select(group: Sequence[Rollout], selection: Selection) -> tuple[list[tuple[int, ...]], Counter[str]]:
    """The samples kept, by index: one each, or with "pairs" a chosen and a rejected one; and why others were dropped.

    In the order of sampling. Every sample is in one tuple, or counted once under a reason of DROPPED.
    """
    faults = [find_fault(rollout, selection) for rollout in group]
    good, dropped = [g for g, fault in enumerate(faults) if fault is None], Counter(filter(None, faults))
    if selection.keep == "all":
        return [(g,) for g in good], dropped
    n, bad = (2 if selection.keep == "pairs" else 1), []
    if n == 2:
        bad = [g for g, fault in enumerate(faults) if fault == "wrong"]
        del dropped["wrong"]
    # A preference model judges what follows the thinking (section 2.3.4): no two samples of pairs share that part.
    texts = [squeeze(after_thinking(group[g].text) if n == 2 else group[g].text) for g in good + bad]
    first = {text: g for text, g in reversed([*zip(texts, good + bad, strict=True)])}.values()
    columns = [[g for g in samples if g in first] for samples in (good, bad)[:n]]
    found = list(zip(*columns, strict=False))  # the first good answer with the first bad one, and so on
    kept = found[: selection.max_per_problem]
    more = {"duplicate": len(texts) - len(first), "unpaired": len(first) - n * len(found)}
    return kept, dropped + Counter(more | {"above the limit": n * (len(found) - len(kept))})


def find_fault(rollout: Rollout, selection: Selection) -> str | None:
    """The first reason not to keep a sample for itself; None for a good one."""
    parts = rollout.parts
    if rollout.completion.finish != "stop":
        return "cut off"
    is_empty = rollout.text.strip() in ("", "<think>")  # the tag may be the prompt's
    if selection.keep == "all":
        return "empty" if is_empty else None
    if parts["accuracy"] is None:
        return "not judged"
    if parts["accuracy"] < 1:
        return "wrong"
    if is_empty:  # right by a rule of one's own; train_sft.py refuses to learn nothing
        return "empty"
    if selection.needs_format and parts["format"] != 1:
        return "format"
    if (parts["language"] or 0.0) < selection.min_language:
        return "language"
    return "looping" if is_looping(rollout.text) else None


def is_looping(text: str) -> bool:
    """Whether 10 to 300 characters stand four times in a row, blanks and line breaks taken for one blank.

    >>> is_looping("So it is 4.\\n" * 4), is_looping("So it is 4.\\n" * 3)
    (True, False)
    """
    codes = np.frombuffer(f"{squeeze(text)} ".encode("utf-32-le", "surrogatepass"), np.uint32)
    for period in LOOP_PERIODS:
        if 4 * period > len(codes):
            return False
        breaks = np.flatnonzero(codes[period:] != codes[:-period])
        if np.diff(breaks, prepend=-1, append=len(codes) - period).max() > 3 * period:
            return True
    return False


def squeeze(text: str) -> str:
    return " ".join(text.split())


# ---- lines


def to_line(question: Question, index: int, group: Sequence[Rollout], samples: tuple[int, ...], source: dict) -> dict:
    """Training text as train_sft.py or the reward model reads it, then its provenance.

    Text of `prompt` and `completion` is what the model saw and made. Answers to messages, and those of a pair, are
    given as judged, with a `<think>` that the prompt pre-filled: another model's template may not write it.
    """
    rollouts = [group[g] for g in samples]
    texts, problem = [rollout.text for rollout in rollouts], question.problem
    if len(texts) == 2:
        line = {"prompt": question.shown, "chosen": texts[0], "rejected": texts[1]}
    elif isinstance(question.shown, str):
        line = {"prompt": question.shown, "completion": texts[0].removeprefix(prefilled(question.shown))}
    else:
        line = {"messages": [*question.shown, {"role": "assistant", "content": texts[0]}]}
    line |= {"problem": index} | source | {"sample": list(samples)}
    if problem:
        parts = [rounded(dict(sorted(rollout.parts.items())), "parts", []) for rollout in rollouts]
        line |= {"task": problem.task, "answer": problem.answer, "parts": parts}
    line["tokens"] = [len(rollout.completion.ids) for rollout in rollouts]
    if len(texts) == 1:
        line |= {name: line[name][0] for name in ("sample", "parts", "tokens") if name in line}
    return line


def line_key(line: dict) -> bytes:
    """What two lines that train the same share."""
    texts = [line.get(name) for name in ("messages", "prompt", "completion", "chosen", "rejected")]
    return hashlib.sha256(json.dumps(texts).encode()).digest()


# ---- sample, select, write


def collect(
    sampler: Sampler,
    prompter: Prompter,
    questions: Sequence[Question],
    rules: Rules,
    selection: Selection,
    path: str | Path,
    *,
    samples: int,
    batch_size: int,
    seed: int,
    source: dict,
    arguments: dict,
    say: Callable[[str], None],
    **sampling,
) -> Ledger:
    """Answer each question `samples` times and write what is kept to `path`, `batch_size` questions at a time.

    Continues the file if it was begun with the same `arguments` (all that decide the lines; the questions are added
    here). `source` goes into every line; `sampling` to Sampler.generate. After Ctrl-C the ledger returned is not whole.
    """
    asked = [(question.shown, repr(question.problem)) for question in questions]
    path, P = Path(path), len(questions)
    ledger = open_ledger(path, {**arguments, "problems": digest(asked)}, P)
    seen = set() if ledger.is_whole else set(map(line_key, read_lines(path)))
    progress = Progress(P * samples, ledger.n_done * samples)

    def make(batch: range) -> tuple[list[dict], Counter[str]]:
        asked, seeds = questions[batch.start : batch.stop], [seed * SEED_STRIDE + i for i in batch]
        prompts, how = [question.prompt for question in asked], prompter.stops | sampling
        made_PG = sampler.generate([ids for _, ids in prompts], n=samples, seed=seeds, on_progress=progress.hear, **how)
        groups = judge_all([question.problem for question in asked], prompts, made_PG, prompter.tokenizer, rules)
        return keep_batch(asked, batch.start, groups, selection, source, seen)

    batches = [(range(first, min(first + batch_size, P)),) for first in range(ledger.n_done, P, batch_size)]
    work_through(ledger, path, batches, make, say)
    return ledger


def keep_batch(
    questions: Sequence[Question], first: int, groups, selection: Selection, source: dict, seen: set[bytes]
) -> tuple[list[dict], Counter[str]]:
    """The batch's lines and counts; `source` says in each where it comes from: model, step, seed.

    A line that the file holds already (a problem that came twice) is a duplicate.
    """
    lines, counts = [], Counter()
    for index, (question, group) in enumerate(zip(questions, groups, strict=True), first):
        kept, dropped = select(group, selection)
        new = [to_line(question, index, group, samples, source) for samples in kept]
        if selection.keep != "all":
            new = [line for line in new if line_key(line) not in seen]
        seen.update(map(line_key, new))
        lines += new
        dropped["duplicate"] += (len(kept) - len(new)) * (2 if selection.keep == "pairs" else 1)
        counts += dropped + Counter(
            sampled=len(group),
            right=sum(rollout.parts.get("accuracy") == 1 for rollout in group),
            kept=len(new),
            problems=min(1, len(new)),
        )
    return lines, counts


def summary(ledger: Ledger, selection: Selection) -> str:
    """What was sampled, dropped and why, and kept, in a table."""
    counts = Counter(ledger.counts)
    rows = [("sampled", counts["sampled"], f"for {ledger.n_done} of {ledger.n_problems} problems")]
    rows += [(f"- {name}", counts[name], why) for name, why in DROPPED.items() if counts[name]]
    what = "pairs" if selection.keep == "pairs" else "kept"
    rows.append((what, counts["kept"], f"of {counts['problems']} problems"))
    if selection.keep != "all":
        rows.insert(1, ("right", counts["right"], f"{counts['right'] / max(1, counts['sampled']):.3f} of them"))
    return "\n".join(f"{name:<18}{n:>9,}   {why}" for name, n, why in rows)
