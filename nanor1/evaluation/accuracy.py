"""Accuracy with a confidence interval, and what answers at this accuracy cost in tokens.

Accuracy is the mean over problems of each problem's share of right samples (pass@1). Samples of one problem are not
independent, so the interval is over problems. Left out: methods that spend tokens on purpose (measure.py).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nanor1.grpo import Rollout, mean
from nanor1.judge import Rules, answer
from nanor1.rewards import final_answer
from nanor1.sampler import Sampler
from nanor1.search.votes import Candidate, majority
from nanor1.tasks.problems import Problem
from nanor1.tasks.prompts import Prompter

WAIT = re.compile(r"\bwait\b|等", re.IGNORECASE)


def evaluate(
    sampler: Sampler, prompter: Prompter, problems: Sequence[Problem], rules: Rules, *, samples: int = 1, **sampling
) -> tuple["Evaluation", list[list[Rollout]]]:
    """Answer and judge each problem `samples` times; `sampling` goes to Sampler.generate."""
    rollouts_PG = answer(sampler, prompter, problems, rules, n=samples, **sampling)
    return summarize(rollouts_PG, may_be_unjudged=bool(rules.own)), rollouts_PG


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a fixed set of problems; shares are in 0..1."""

    accuracy: float | None  # and its 95% interval; None: no problem has a gold answer
    accuracy_low: float | None
    accuracy_high: float | None
    n: int  # problems
    samples: int  # a problem
    format: float | None
    language: float | None  # share of the words of the thinking that are in the problem's language
    response_tokens: float  # mean
    truncated: float
    retries: float  # mean number of times a response says "wait", or 等
    majority: float | None  # accuracy of the most frequent answer; None with one sample a problem
    reward: float | None  # mean of the weighted sum of the rules

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields by name, the majority's with its number of samples (`majority_16`)."""
        values = asdict(self)
        values[f"majority_{self.samples}"] = values.pop("majority")
        return values

    def __str__(self) -> str:
        if self.accuracy is None and self.reward is None:
            text = f"nothing could be judged (n={self.n} x {self.samples})"
        elif self.accuracy is None:
            text = f"reward {self.reward:.3f} (n={self.n} x {self.samples}, without gold answers)"
        else:
            half = (self.accuracy_high - self.accuracy_low) / 2
            text = f"accuracy {self.accuracy:.3f} +- {half:.3f} (95%, n={self.n} x {self.samples})"
        for name in ("format", "language"):  # None: a rule of one's own judged none
            text += "" if getattr(self, name) is None else f", {name} {getattr(self, name):.3f}"
        text += f", {self.response_tokens:.1f} tokens"
        text += f", {self.retries:.2f} retries, {self.truncated:.1%} cut"
        return text if self.majority is None else f"{text}, majority@{self.samples} {self.majority:.3f}"


def summarize(rollouts_PG: Sequence[Sequence[Rollout]], may_be_unjudged: bool = False) -> Evaluation:
    """Evaluate judged rollouts, one inner list a problem.

    A rollout whose accuracy is None (could not be judged) is left out of its problem's mean, and a problem with none
    left out of the set. Where that leaves nothing, the accuracy is None and the rest is of all; ValueError where no
    reward could be computed either, unless that `may_be`: a judge of one's own that is away for a while ends no run.
    """
    judged_PG = [[r for r in group if r.parts["accuracy"] is not None] for group in rollouts_PG]
    judged_PG = [group for group in judged_PG if group]
    seen_PG = judged_PG or rollouts_PG
    flat = [r for group in seen_PG for r in group]
    if not judged_PG and not may_be_unjudged and all(r.reward is None for r in flat):
        raise ValueError("no rollout could be judged; check the problems' answers")
    means_P = problem_accuracies(judged_PG)
    low, high = accuracy_interval(means_P) if means_P else (None, None)
    samples = max(map(len, rollouts_PG))
    return Evaluation(
        accuracy=mean(means_P),
        accuracy_low=low,
        accuracy_high=high,
        n=len(seen_PG),
        samples=samples,
        format=mean(r.parts.get("format", 0.0) for r in flat),
        language=mean(r.parts.get("language", 1.0) for r in flat),
        response_tokens=mean(len(r.completion.ids) for r in flat),
        truncated=mean(r.completion.finish == "length" for r in flat),
        retries=mean(len(WAIT.findall(r.text)) for r in flat),
        majority=majority_accuracy(judged_PG) if samples > 1 else None,
        reward=mean(r.reward for r in flat),
    )


def problem_accuracies(rollouts_PG: Sequence[Sequence[Rollout]]) -> list[float | None]:
    """Each problem's share of right answers among those that could be judged; None where there is none."""
    return [mean(rollout.parts["accuracy"] for rollout in group) for group in rollouts_PG]


def majority_accuracy(rollouts_PG: Sequence[Sequence[Rollout]]) -> float | None:
    """Share of problems whose most frequent answer is right (see votes.majority); None for programs.

    A rollout that was cut off, or gives no answer, has no vote (self-consistency: Wang et al. 2023, 2203.11171).
    """
    if any(group[0].problem.task == "code" for group in rollouts_PG):
        return None
    winners = [majority(group[0].problem, [*map(to_candidate, group)]) for group in rollouts_PG]
    pairs = zip(rollouts_PG, winners, strict=True)
    return mean(0.0 if winner is None else group[winner].parts["accuracy"] for group, winner in pairs)


def to_candidate(rollout: Rollout) -> Candidate:
    made = rollout.completion
    final = final_answer(rollout.problem, rollout.text) if made.finish == "stop" else None
    return Candidate(final, sum(made.logprobs))


def accuracy_interval(means_P: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a mean over problems of shares in 0..1: Wilson's, of as many trials as the spread tells.

    Shares vary less than answers that are right or wrong, as if there were more problems: n p (1 - p) / variance
    of them (the effective sample size of Korn and Graubard 1998). Where each share is 0 or 1 that is n. Departure: one
    problem all right and one all wrong are added where the spread is looked at, for a few that are alike tell little.
    """
    n, mean, widened_P = len(means_P), sum(means_P) / len(means_P), [*means_P, 0.0, 1.0]
    middle = sum(widened_P) / (n + 2)
    variance = sum((m - middle) ** 2 for m in widened_P) / (n + 2)
    n_effective = max(n, n * middle * (1 - middle) / variance)  # max: but for the last bit it is no less
    return wilson_interval(mean * n_effective, n_effective)


def wilson_interval(n_right: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of 95% for a proportion (Wilson 1927).

    >>> tuple(round(x, 3) for x in wilson_interval(8, 10))
    (0.49, 0.943)
    """
    assert 0 <= n_right <= n and n >= 1, f"{n_right} right of {n}: want 0 <= right <= n and n >= 1"
    z, p = 1.96, n_right / n
    shrink = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
