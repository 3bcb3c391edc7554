"""Put methods of inference-time scaling to a task's problems: their answers, judged, as rows of a file.

A run (methods.Run) is a way to produce answers to a problem. What it made of a problem is a row: the answers, what a
method chooses by, and the tokens and seconds that it took. From rows alone methods.py reckons all figures, so a row
read from a file counts as one just made. Tokens are those sampled, the ones of dropped branches included; those read
as prompts, and those put in, are counted apart.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from nanor1.evaluation.accuracy import to_candidate
from nanor1.evaluation.methods import MAX_BRANCHING, SINGLE, Run
from nanor1.grpo import Rollout
from nanor1.judge import judge_all
from nanor1.run.resumable import Progress, digest, open_ledger, read_lines, work_through
from nanor1.sampler import Sampler
from nanor1.search.asking import Asker, check_room
from nanor1.search.step_beams import Found, beam_search, mean_logprob
from nanor1.search.think_longer import force_budget, refine
from nanor1.search.token_beams import token_beam_search
from nanor1.search.votes import window_confidences
from nanor1.stages.rejection_sampling import SEED_STRIDE, WAVES
from nanor1.tasks.problems import Problem

CONFIDENCE_K = 20  # likeliest tokens of which a token's confidence is made, as in DeepConf


# ---- runs: ways to produce answers


def produce(asker: Asker, run: Run, prompts: list[list[int]], problems: list[Problem], seeds: list[int], on_progress):
    """The answers to some problems by a run: one Found a problem."""
    tokenizer, sampling = asker.tokenizer, dict(asker.sampling, on_progress=on_progress)
    stops = dict(stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size, decode=tokenizer.decode)
    if run.kind in ("samples", "greedy", "direct"):
        if run.kind != "samples":
            sampling["temperature"] = 0.0
        return _sample(asker.sampler, prompts, run.n, seed=seeds, **asker.prompter.stops, **sampling)
    if run.kind in ("beam", "dvts"):
        branching = min(MAX_BRANCHING, run.n)
        n_beams = run.n // branching
        sizes = dict(width=n_beams) if run.kind == "beam" else dict(width=1, trees=n_beams)
        sizes |= dict(branching=branching, step_texts=[asker.step_text])
        return beam_search(asker.sampler, prompts, scorer=asker.scorer, seeds=seeds, **sizes, **stops, **sampling)
    if run.kind == "token-beam":
        sizes = dict(width=run.n, max_new_tokens=sampling["max_new_tokens"], stop_ids=tokenizer.stop_ids)
        return token_beam_search(
            asker.sampler.model, prompts, vocab_size=tokenizer.vocab_size, on_progress=on_progress, **sizes
        )
    if run.kind == "budget":
        del sampling["max_new_tokens"]
        waits = dict(max_waits=run.n - 1, seeds=seeds)
        return force_budget(asker.sampler, tokenizer, prompts, asker.budget, **waits, **sampling)
    assert run.kind == "refine", run
    messages_P = [asker.prompter.show(problem) for problem in problems]
    rounds = dict(rounds=run.n - 1, seeds=seeds, template_arguments=asker.prompter.arguments)
    return refine(asker.sampler, tokenizer, messages_P, **rounds, **sampling)


def _sample(sampler: Sampler, prompts: list[list[int]], n: int, **sampling) -> list[Found]:
    """Independent samples, with confidences, of which a vote among them is made."""
    completions_PG = sampler.generate(prompts, n=n, confidence_k=CONFIDENCE_K if n > 1 else 0, **sampling)
    return [
        Found(group, mean_logprob([], group), sum(len(made.ids) for made in group), n_prompt=len(prompt_ids))
        for prompt_ids, group in zip(prompts, completions_PG, strict=True)
    ]


# ---- rows: what a run made of a problem


def measure(
    asker: Asker, problems: Sequence[Problem], runs: Sequence[Run], path: str | None, arguments: dict, say
) -> tuple[dict[Run, list[dict]], bool]:
    """The rows of each run, and whether they are all there: after Ctrl-C those of the batches done.

    With `path` they are kept in that file, and one that was begun with the same `arguments` goes on, also with other
    runs; the problems as they are shown are added to the arguments. ValueError for a problem that leaves no room to
    answer.
    """
    shown = [asker.prompter.write(problem) for problem in problems]
    _check_room(asker, runs, [ids for _, ids in shown])
    asked = [(text, repr(problem)) for (text, _), problem in zip(shown, problems, strict=True)]
    P, path = len(problems), path and Path(path)
    ledger = open_ledger(path, {**arguments, "problems": digest(asked)}, len(runs) * P)
    rows = read_rows(path, ledger.n_done, runs)
    ledger.n_problems = ledger.n_done + len(runs) * P - sum(map(len, rows.values()))  # it may hold other runs, too
    progress = Progress(P * sum(run.n for run in runs), sum(run.n * len(rows[run]) for run in runs))

    def make(run: Run, batch: range) -> tuple[list[dict], Counter]:
        made = answer(asker, run, problems[batch.start : batch.stop], batch.start, progress)
        rows[run] += made
        return made, Counter()

    batches = []
    for run in runs:
        size = batch_size(run, asker.sampler.max_rows)
        batches += [(run, range(first, min(first + size, P))) for first in range(len(rows[run]), P, size)]
    work_through(ledger, path, batches, make, say)
    return rows, ledger.is_whole


def _check_room(asker: Asker, runs: Sequence[Run], prompts: Sequence[list[int]]) -> None:
    """ValueError for a prompt behind which the model's context has no room for an answer by one of the runs."""
    least, remedy = 1, "shorten it"
    if any(run.kind == "budget" for run in runs):
        least = asker.budget.least_room(asker.tokenizer)
        remedy = (
            f"an answer with --max-answer {asker.budget.max_answer} takes at least {least}; lower that, or shorten it"
        )
    for number, ids in enumerate(prompts, 1):
        check_room(f"problem {number}", ids, asker.sampler, remedy, least)


def read_rows(path: Path | None, n_rows: int, runs: Sequence[Run]) -> dict[Run, list[dict]]:
    """What a file holds of some runs, in the order of the problems."""
    rows = {str(run): [] for run in runs}
    for number, row in enumerate(islice(read_lines(path), n_rows), 1):
        if (done := rows.get(row.get("run"))) is not None:
            if row.get("index") != len(done):
                raise ValueError(f"{path}, line {number}: problem {len(done)} of {row['run']} should stand here")
            done.append(row)
    return {run: rows[str(run)] for run in runs}


def batch_size(run: Run, max_rows: int) -> int:
    """Problems answered at once: several waves of rows, or one where methods go on so long that ends do not matter,
    since what a batch has made is lost when it is stopped."""
    if run.kind == "token-beam":  # its cache is of all problems
        return max(1, max_rows // run.n)
    waves = max(1, WAVES * max_rows // run.n)
    return max(waves, max_rows) if run.kind in ("budget", "refine") else waves


def answer(asker: Asker, run: Run, problems: Sequence[Problem], first: int, progress: Progress) -> list[dict]:
    """The rows of problems `first`, `first` + 1, ...; each has random numbers of its own."""
    prompter, rules = asker.prompter, asker.rules
    if run.kind == "direct":
        prompter, rules = replace(prompter, style="direct"), replace(rules, style="direct")
    start_s = time.monotonic()
    prompts = [prompter.write(problem) for problem in problems]
    seeds = [asker.seed * SEED_STRIDE + first + i for i in range(len(problems))]
    is_search = run.kind not in ("samples", *SINGLE)  # of which the sampler hears parts of answers end
    hear = (lambda n_tokens, _: progress.hear(n_tokens)) if is_search else progress.hear
    found_P = produce(asker, run, [ids for _, ids in prompts], list(problems), seeds, hear)
    if is_search:
        progress.hear(0, [found.n_sampled / run.n for found in found_P for _ in range(run.n)])
    completions_PG = [found.completions for found in found_P]
    rollouts_PG = judge_all(problems, prompts, completions_PG, asker.tokenizer, rules)
    wall_s = time.monotonic() - start_s
    return [
        to_row(asker, run, first + i, found, group, wall_s / len(problems))
        for i, (found, group) in enumerate(zip(found_P, rollouts_PG, strict=True))
    ]


def to_row(asker: Asker, run: Run, index: int, found: Found, group: list[Rollout], wall_s: float) -> dict:
    """What a run made of a problem, as a JSON line."""
    problem = group[0].problem
    answers = [to_answer(asker, rollout, score) for rollout, score in zip(group, found.scores, strict=True)]
    if run.kind == "dvts":
        answers = [{**answer, "tree": tree} for answer, tree in zip(answers, found.tree_of, strict=True)]
    return {
        "run": str(run),
        "index": index,
        "prompt": problem.prompt,
        "gold": problem.answer,
        "sampled": found.n_sampled,
        "inserted": found.n_inserted,
        "read": found.n_prompt,
        "seconds": round(wall_s, 6),
        **({"sampled_by_tree": found.n_sampled_by_tree} if run.kind == "dvts" else {}),
        "answers": answers,
    }


def to_answer(asker: Asker, rollout: Rollout, score: float) -> dict:
    """One answer, judged; what a method chooses by stands with it."""
    made, parts = rollout.completion, rollout.parts
    candidate = to_candidate(rollout)
    confidences = window_confidences(made.confidences, asker.window) if made.confidences else ()
    return {
        "text": rollout.text,
        "answer": candidate.answer,
        "accuracy": parts["accuracy"],
        "format": parts["format"],
        "language": parts["language"],
        "tokens": len(made.ids),
        "finish": made.finish,
        "logprob": round(candidate.logprob, 4),
        "score": round(score, 5) if math.isfinite(score) else None,
        **{name: round(value, 4) for name, value in zip(("tail", "lowest"), confidences, strict=False)},
        **{name: parts[name] for name in parts if name == "preference"},
    }
