"""Methods of inference-time scaling: how answers are produced, how one of them is chosen, and what came of it.

A method is a run, which makes rows (measure.py), and a choice among a row's answers. Methods that choose among
independent samples share one run: a method at N of n samples is the mean over the n/N disjoint subsets of N
(votes.subsets), so the same tokens tell of N = 1, 2, 4 ... n; independent trees are shared like this, too. All figures
are reckoned from rows; nothing is sampled here.

What N is: samples; beams times branching, which is at most 4; times thought, N - 1 of them after a "Wait"; answers
with refinement, N - 1 of them reviews.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanor1.evaluation.accuracy import accuracy_interval
from nanor1.evaluation.plot import Point, scatter
from nanor1.grpo import mean
from nanor1.search.votes import Candidate, best_of, pass_at_k, subsets, weighted_vote
from nanor1.tasks.problems import Problem

MAX_BRANCHING = 4  # next steps of a beam (Beeching et al. 2024)


@dataclass(frozen=True)
class Run:
    """A way to produce answers to a problem, and its N."""

    kind: str
    n: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.n}"


# ---- methods: runs, and ways to choose


@dataclass(frozen=True)
class Method:
    """How a problem's answers are produced, and by what one of them, as it stands in a row, is chosen.

    Where there is neither, it is the first one that has finished: a search gives the best first.
    """

    run: str
    what: str
    weight: Callable[[dict], float | None] | None = None  # in a vote
    value: Callable[[dict], float | None] | None = None  # the answer of the largest one is taken


METHODS = {
    "greedy": Method("greedy", "one answer at temperature 0"),
    "direct": Method("direct", "one answer at temperature 0, asked for without any thinking"),
    "sample": Method("samples", "one sampled answer (mean over all samples)"),
    "majority": Method("samples", "the most frequent answer (self-consistency)", lambda a: 1.0),
    "vote-logprob": Method(  # Wang et al. 2203.11171, equation 1
        "samples", "votes weigh their mean probability a token", lambda a: math.exp(a["logprob"] / a["tokens"])
    ),
    "vote-tail": Method("samples", "votes weigh the confidence of their end", lambda a: a.get("tail")),
    "vote-lowest": Method("samples", "votes weigh their least confidence", lambda a: a.get("lowest")),
    "best-logprob": Method("samples", "the likeliest a token", value=lambda a: a["logprob"] / a["tokens"]),
    "best-reward": Method("samples", "the one that a reward model prefers", value=lambda a: a.get("preference")),
    "best-rule": Method(  # of right answers one in the form asked for
        "samples",
        "upper bound: the gold answer chooses",
        value=lambda a: a["accuracy"] and a["accuracy"] * (1 + (a["format"] or 0.0)),
    ),
    "beam": Method("beam", "beam search over steps"),
    "dvts": Method("dvts", "beam search over steps in independent trees"),
    "token-beam": Method("token-beam", "beam search over tokens"),
    "budget": Method("budget", "N - 1 times made to think on (budget forcing)"),
    "refine": Method("refine", "N - 1 reviews of the last answer, then a vote", lambda a: 1.0),
}
AMONG_SAMPLES = [name for name, method in METHODS.items() if method.run == "samples" and name != "sample"]
WHOLE = ("beam", "token-beam", "budget")  # runs that are another one for each N
SINGLE = ("greedy", "direct")  # there is only N = 1
CONFIDENT = ("vote-tail", "vote-lowest")


def looks_of(methods: Sequence[str], ns: Sequence[int]) -> list[tuple[str, int, Run]]:
    """Each method at each N at which it is looked at, and the run that it is reckoned from."""
    kinds = [(name, n, METHODS[name].run) for name in methods for n in sizes_of(name, ns)]
    return [(name, n, Run(kind, n if kind in (*WHOLE, *SINGLE) else max(ns))) for name, n, kind in kinds]


def runs_of(methods: Sequence[str], ns: Sequence[int]) -> list[Run]:
    """The runs that methods at each N need, each once."""
    return list(dict.fromkeys(run for *_, run in looks_of(methods, ns)))


def sizes_of(name: str, ns: Sequence[int]) -> list[int]:
    """The N of `ns` at which a method is no other method: one sample needs no choice, and one tree is a beam search."""
    if name in (*SINGLE, "sample"):
        return [1]
    least = 2 if name in AMONG_SAMPLES else MAX_BRANCHING + 1 if name == "dvts" else 1
    return [n for n in ns if n >= least]


def obstacle(name: str, ns: Sequence[int], task: str, template: str, has_reward_model: bool) -> str | None:
    """Why a method cannot work here, and what to do about it; None if it can."""
    if name not in METHODS:
        return f"there is no such method; choose of {', '.join(METHODS)}"
    if task == "code" and METHODS[name].weight:
        return (
            "programs cannot be voted on (no rule tells which do the same); choose best-logprob, best-reward, "
            "best-rule or beam"
        )
    if name == "best-reward" and not has_reward_model:
        return "it needs --reward-model FOLDER, by train_sft.py --objective preference"
    if name in ("refine", "direct") and template != "chat":
        return f"what is asked in words needs a chat template; this is {template}"
    if name in (*AMONG_SAMPLES, "refine") and max(ns) == 1:
        return "of one answer there is nothing to choose; give --n 2 or more"
    if METHODS[name].run in ("beam", "dvts") and any(n > MAX_BRANCHING and n % MAX_BRANCHING for n in ns):
        return f"it keeps N / {MAX_BRANCHING} beams; give --n as a multiple"
    if name == "dvts" and max(ns) <= MAX_BRANCHING:
        return f"one tree is a beam search; give --n {2 * MAX_BRANCHING} or more"
    return None


# ---- figures


@dataclass(frozen=True)
class Figures:
    """What a method came to at one N; tokens and seconds a problem."""

    method: str
    n: int
    problems: int
    accuracy: float
    low: float  # 95% interval
    high: float
    strict: float  # right and in the form asked for
    tokens: float  # sampled
    tokens_p95: float
    read: float  # as prompts, by the whole run
    truncated: float  # of the answers
    seconds: float  # the run's, in proportion to the tokens


def figures(
    name: str, n: int, run: Run, rows: Sequence[dict], problems: Sequence[Problem], keep_share: float = 1.0
) -> Figures:
    """A method's figures from a run's rows; problems that could not be judged are left out. ValueError if all are."""
    scores = [score(name, n, run, row, problems[row["index"]], keep_share) for row in rows]
    if not any(scores):
        raise ValueError("no answer could be judged; check the problems' answers")
    judged = [row for row, judged in zip(rows, scores, strict=True) if judged]
    rights, stricts = zip(*filter(None, scores), strict=True)
    parts_P = [_parts(n, run, row) for row in judged]
    tokens_P = [mean(tokens for _, tokens in parts) for parts in parts_P]
    every_cost = sorted(tokens for parts in parts_P for _, tokens in parts)
    low, high = accuracy_interval(rights)
    return Figures(
        method=name,
        n=n,
        problems=len(judged),
        accuracy=mean(rights),
        low=low,
        high=high,
        strict=mean(stricts),
        tokens=mean(tokens_P),
        tokens_p95=every_cost[math.ceil(0.95 * len(every_cost)) - 1],
        read=mean(row["read"] for row in judged),
        truncated=mean(a["finish"] == "length" for parts in parts_P for answers, _ in parts for a in answers),
        seconds=mean(row["seconds"] * made / row["sampled"] for row, made in zip(judged, tokens_P, strict=True)),
    )


def score(
    name: str, n: int, run: Run, row: dict, problem: Problem, keep_share: float = 1.0
) -> tuple[float, float] | None:
    """How right a method is on a problem, lenient and strict, in 0..1; None if that could not be judged.

    Where it chooses no answer it is wrong.
    """
    verdicts = []
    for answers, _ in _parts(1 if name == "sample" else n, run, row):
        if any(answer["accuracy"] is not None for answer in answers):
            chosen = choose(name, problem, answers, keep_share)
            right = 0.0 if chosen is None else answers[chosen]["accuracy"]
            if right is not None:
                verdicts.append((right, right and right * (answers[chosen]["format"] == 1)))
    return tuple(map(mean, zip(*verdicts, strict=True))) or None


def choose(name: str, problem: Problem, answers: list[dict], keep_share: float) -> int | None:
    """The index of the answer that a method chooses; None where there is none to choose.

    Of the answers a vote by confidence counts the most confident share.
    """
    method = METHODS[name]
    if not (method.weight or method.value):
        return next((i for i, answer in enumerate(answers) if answer.get("finish") == "stop"), 0)
    candidates = [Candidate(answer["answer"], answer["logprob"]) for answer in answers]
    if method.value:
        return best_of(candidates, [*map(method.value, answers)])
    weights = [*map(method.weight, answers)]
    return weighted_vote(problem, candidates, weights, keep_share if name in CONFIDENT else 1.0)


def _parts(n: int, run: Run, row: dict) -> list[tuple[list[dict], int]]:
    """The answers of the run that are those of N, each time that it holds N, and what they cost in sampled tokens."""
    answers = row["answers"]
    if run.kind in WHOLE:
        return [(answers, row["sampled"])]
    if run.kind == "dvts":
        trees = row["sampled_by_tree"]
        parts = subsets(len(trees), max(1, n // MAX_BRANCHING))
        return [([a for a in answers if a["tree"] in part], sum(trees[t] for t in part)) for part in parts]
    # The first N answers of refinement are what the run of N would have given.
    parts = [range(n)] if run.kind == "refine" else subsets(len(answers), n)
    groups = [answers[part.start : part.stop] for part in parts]
    return [(group, sum(answer.get("tokens", 0) for answer in group)) for group in groups]


LEGEND = """\
accuracy: right, in whatever format; strict: right, and in the format asked for; tokens: sampled, the mean, and what
95% of the problems do not exceed (p95); read: as prompts; cut: answers cut off; seconds: shared out by tokens"""


def table(found: Sequence[Figures]) -> str:
    """The figures, one method and N a line."""
    lines = [
        f"{f.method:<12}{f.n:>4}     {f.accuracy:.3f}  {f.low:.3f} to {f.high:.3f}  {f.strict:.3f}  "
        f"{f.tokens:>14,.0f}{f.tokens_p95:>8,.0f}{f.read:>8,.0f}{f.truncated:>6.0%}{f.seconds:>9.2f}"
        for f in found
    ]
    head = "method         N  accuracy  95%             strict  tokens/problem     p95    read   cut  seconds"
    return "\n".join([head, *lines])


def picture(found: Sequence[Figures], title: str) -> str:
    """Accuracy against tokens, a line a method, as SVG; of one sample all choices among samples are made."""
    series: dict[str, list[Point]] = {}
    for f in found:
        name = f"{f.method} (upper bound)" if f.method == "best-rule" else f.method
        begun = [s for s in found if s.method == "sample"] if f.method in AMONG_SAMPLES and name not in series else []
        points = [Point(g.tokens, g.accuracy, g.low, g.high, str(g.n)) for g in (*begun, f)]
        series.setdefault(name, []).extend(points)
    return scatter(series, title=title, x_label="tokens sampled a problem", y_label="accuracy")


def report(run: Run, rows: Sequence[dict], problems: Sequence[Problem]) -> str:
    """What independent samples came to, in a block of lines; tokens are those of all of a problem's answers."""
    f, powers = figures("sample", run.n, run, rows, problems), powers_of_two(run.n)
    answers = [answer for row in rows for answer in row["answers"] if answer["accuracy"] is not None]
    form, language = (mean(answer[name] for answer in answers) for name in ("format", "language"))
    wall_s = sum(row["seconds"] for row in rows)
    lines = [
        f"accuracy        {f.accuracy:.3f}   95%: {f.low:.3f} to {f.high:.3f} (n={f.problems}); lenient: in any format",
        f"strict          {f.strict:.3f}   right and in the format asked for",
        f"format          {math.nan if form is None else form:.3f}",
        f"cut off         {f.truncated:.3f}   by --max-new-tokens or a full context",
        f"tokens/problem  {f.tokens:.1f}   95% of the problems: at most {f.tokens_p95:.0f}",
        f"time            {wall_s:.1f} s   {sum(row['sampled'] for row in rows) / wall_s:.0f} tokens/s",
    ]
    if language is not None and language < 1:
        what = "of the thinking's words are in the problem's language"
        lines.insert(3, f"language        {language:.3f}   {what}")
    found = {"pass@": [pass_rate(n, rows) for n in powers]}
    if problems[0].task != "code":
        found["majority@"] = [figures("majority", n, run, rows, problems).accuracy for n in powers]
    for label, values in found.items() if run.n > 1 else ():
        lines.insert(1, f"{label:<15} {'  '.join(f'{x:.3f}' for x in values)}   of {', '.join(map(str, powers))}")
    return "\n".join(lines)


def pass_rate(k: int, rows: Sequence[dict]) -> float:
    """The mean pass@k of the problems that have k answers which could be judged; nan where none has.

    Unbiased, over all subsets of k. best-rule looks at the subsets that other methods choose from, and so bounds them.
    """
    verdicts_P = [[a["accuracy"] for a in row["answers"] if a["accuracy"] is not None] for row in rows]
    rate = mean(pass_at_k(len(verdicts), verdicts.count(1.0), k) for verdicts in verdicts_P if len(verdicts) >= k)
    return math.nan if rate is None else rate


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4 ... up to n, and n itself."""
    return sorted({2**i for i in range(n.bit_length())} | {n})
