"""Compare two evaluations problem by problem: two files that `sample.py --task ... --out FILE` wrote.

The same problems before and after training differ less than two sets of problems do, so the difference of two
accuracies has a narrower interval than either of them. Left out: evaluations of training runs, whose answers are not
kept, and choices by a reward model or by confidence, which methods.py reckons for one file.

Source: the interval is Agresti and Min's for matched pairs, "Wald+2" (Statistics in Medicine 24:729, 2005): half a pair
more in each of the four cells, right or wrong before and after. Departures: shares of several samples take the place of
right and wrong, for which half a pair a cell is more than they need and the interval a little wide; the difference told
is the one observed, and not the interval's middle, which those pairs draw towards 0.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nanor1.evaluation.methods import METHODS, Run, score
from nanor1.run.resumable import ledger_path
from nanor1.tasks.problems import Problem, read_json_lines

Key = tuple[str, str, int]  # a problem: its prompt, its gold answer, and which of several that are alike
MARK = int | float | None  # what an answer's accuracy may be
CHOSEN_BY = {"answer", "tokens", "finish", "logprob"}  # what the methods that choose an answer look at
HEAD = " problems  before   after  difference  95%                up  down  same"
LEGEND = """\
accuracy: right, in whatever format; strict: right, and in the format asked for; difference: after less before, and the
95% interval of it for pairs of answers to the same problem; up, down, same: problems that got better, worse, neither"""


def paired_difference(before_P: Sequence[float], after_P: Sequence[float]) -> tuple[float, float, float]:
    """The mean of `after - before` over problems, shares in 0..1, and the ends of its 95% interval, within -1..1.

    >>> tuple(round(x, 3) for x in paired_difference([0, 0, 0, 1], [1, 1, 0, 1]))
    (0.5, -0.166, 0.832)
    """
    n = len(before_P)
    assert n == len(after_P) and n, f"{n} problems before and {len(after_P)} after; want the same ones, and at least 1"
    difference_P = [after - before for before, after in zip(before_P, after_P, strict=True)]
    # The four half pairs are 2 pairs; their differences 1, -1, 0 and 0 add nothing to the sum, and 1 to the squares.
    middle = sum(difference_P) / (n + 2)
    variance = (sum(d * d for d in difference_P) + 1) / (n + 2) - middle**2
    half = 1.96 * math.sqrt(variance / (n + 2))
    return sum(difference_P) / n, max(-1.0, middle - half), min(1.0, middle + half)


def compare_files(before: str | Path, after: str | Path) -> str:
    """A table of what two evaluation files say of the problems that both have, one line a method and score.

    Runs that both files have are compared, or the one run of each. Of independent samples it is the mean over them
    and, where FILE.progress.json tells the task, the vote of all; of a search its best. Answers that could not be
    judged are left out. ValueError for files that are no evaluations, or have nothing to compare.
    """
    paths = (Path(before), Path(after))
    (rows_a, task_a), (rows_b, task_b) = (read_evaluation(path) for path in paths)
    scores: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}  # what, from which runs
    pairs = _run_pairs(paths, rows_a, rows_b)
    for run_a, run_b in pairs:
        label = str(run_a) if run_a == run_b else f"{run_a}, {run_b}"
        both = [key for key in rows_a[run_a] if key in rows_b[run_b]]
        for of_run, path in zip((rows_a[run_a], rows_b[run_b]), paths, strict=True):
            if n_alone := len(of_run) - len(both):
                left_out.setdefault(f"{n_alone} in {path} alone", []).append(label)
        for name_a, name_b in zip(_methods(run_a, task_a), _methods(run_b, task_b), strict=False):
            shares_a = _shares(name_a, run_a, [rows_a[run_a][key] for key in both], task_a)
            shares_b = _shares(name_b, run_b, [rows_b[run_b][key] for key in both], task_b)
            judged = [pair for pair in zip(shares_a, shares_b, strict=True) if None not in pair]
            if n_unjudged := len(both) - len(judged):
                left_out.setdefault(f"{n_unjudged} that could not be judged", []).append(label)
            of = "majority of " if name_a == "majority" else ""
            for i, what in enumerate(("accuracy", "strict") if judged else ()):
                scores[f"{of}{label}: {what}"] = _figures([a[i] for a, _ in judged], [b[i] for _, b in judged])
    if not scores:
        raise ValueError(f"{before} and {after} have no problem in common that was judged in both")
    width = max(map(len, scores))
    table = [f"{label:<{width}}{numbers}" for label, numbers in {"": HEAD, **scores}.items()]
    notes = [
        f"left out: {what}" + (f" ({', '.join(dict.fromkeys(labels))})" if len(pairs) > 1 else "")
        for what, labels in left_out.items()
    ]
    return "\n".join([f"before: {before}, after: {after}", *table, *notes, "", LEGEND])


def read_evaluation(path: Path) -> tuple[dict[Run, dict[Key, dict]], str]:
    """The rows of each run in an evaluation file, by problem, and its task ("": nothing beside the file tells).

    ValueError, with the line, for a file that is none.
    """
    rows: dict[Run, dict[Key, dict]] = {}
    seen: Counter[tuple] = Counter()
    for run, row in read_json_lines(path, _to_row):
        problem = (run, row["prompt"], row["gold"])
        rows.setdefault(run, {})[*problem[1:], seen[problem]] = row
        seen[problem] += 1
    try:
        task = json.loads(ledger_path(path).read_text(encoding="utf-8"))["arguments"]["--task"]
    except (OSError, ValueError, KeyError, TypeError):
        task = ""  # the file alone was copied
    answers = (answer for of_run in rows.values() for row in of_run.values() for answer in row["answers"])
    return rows, task if all(CHOSEN_BY <= answer.keys() for answer in answers) else ""


def _to_row(row: dict) -> tuple[Run, dict]:
    """A line of the file with its run; ValueError for what is none."""
    match row:
        case {"run": str(name), "prompt": str(), "gold": str(), "answers": [_, *_] as answers}:
            kind, _, n = name.rpartition("-")
            is_run = n.isdecimal() and kind in {method.run for method in METHODS.values()}
            if is_run and all(
                isinstance(answer, dict) and "format" in answer and isinstance(answer.get("accuracy", ""), MARK)
                for answer in answers
            ):
                return Run(kind, int(n)), row
    raise ValueError(
        "expected a line of an evaluation by sample.py --task --out, with run, prompt, gold and judged answers; "
        f"found the fields {', '.join(row) or 'none'}"
    )


def _run_pairs(paths: tuple[Path, Path], rows_a: dict[Run, dict], rows_b: dict[Run, dict]) -> list[tuple[Run, Run]]:
    if len(rows_a) == len(rows_b) == 1:
        return [(*rows_a, *rows_b)]
    if shared := [(run, run) for run in rows_a if run in rows_b]:
        return shared
    a, b = (f"{path} has {', '.join(map(str, r))}" for path, r in zip(paths, (rows_a, rows_b), strict=True))
    raise ValueError(f"{a} and {b}: no run is in both; evaluate with the same --n and --method")


def _methods(run: Run, task: str) -> list[str]:
    """What can be said of a run: by its own method, and of samples by their vote, which takes the task to be known."""
    if run.kind == "refine":
        return ["refine"] if task else []
    if run.kind != "samples":
        return [run.kind]
    return ["sample", "majority"] if run.n > 1 and task not in ("", "code") else ["sample"]


def _shares(name: str, run: Run, rows: list[dict], task: str) -> list[tuple[float, float] | None]:
    """How right a method is on each problem, lenient and strict, in 0..1; None where that could not be judged."""
    try:
        return [score(name, run.n, run, row, Problem(row["prompt"], row["gold"], task)) for row in rows]
    except KeyError as error:
        raise ValueError(f"a line of {run} has no {error}; evaluate again") from error


def _figures(before_P: list[float], after_P: list[float]) -> str:
    mean, low, high = paired_difference(before_P, after_P)
    change_P = [round(after - before, 9) for before, after in zip(before_P, after_P, strict=True)]
    n, n_up, n_down = len(change_P), sum(d > 0 for d in change_P), sum(d < 0 for d in change_P)
    return (
        f"{n:>9}   {sum(before_P) / n:.3f}   {sum(after_P) / n:.3f}      {mean:+.3f}  {low:+.3f} to {high:+.3f}"
        f"{n_up:>5}{n_down:>6}{n - n_up - n_down:>6}"
    )


def paired_change(
    before_P: Sequence[float | None] | None, after_P: Sequence[float | None]
) -> dict[str, float | int] | None:
    """The paired difference over the problems that could be judged both times, by name; None where there is none.

    `before_P` is None of a run whose first evaluation kept no problem's share.
    """
    pairs = [(a, b) for a, b in zip(before_P or (), after_P, strict=False) if a is not None and b is not None]
    if not pairs:
        return None
    mean, low, high = paired_difference(*map(list, zip(*pairs, strict=True)))
    return {"accuracy": mean, "low": low, "high": high, "n": len(pairs)}


def change_line(change: dict[str, float | int]) -> str:
    """`paired_change` in words."""
    interval = f"95%: {change['low']:+.3f} to {change['high']:+.3f}"
    return f"accuracy {change['accuracy']:+.3f} ({interval}, paired over {change['n']} problems)"
