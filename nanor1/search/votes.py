"""Choose one answer among several to a problem: votes, best-of-N, and what k samples out of n are worth.

Answers count as the same by mathematics, not by spelling. Every function is pure; the sampling is left to others.

Sources: self-consistency and its weights, Wang et al. 2203.11171, section 2; confidence of windows and the vote of the
most confident, DeepConf, Fu et al. 2508.15260, section 3 (offline); pass@k, Chen et al. 2107.03374, equation 1.
Departures: ties are broken by log-probability, where the papers name no rule; a share to keep is rounded up to whole
candidates, the earlier of two equals first, where DeepConf's own code keeps all above an interpolated percentile.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from nanor1.grading.compare import math_equal
from nanor1.rewards import accuracy
from nanor1.tasks.countdown import countdown_numbers, countdown_value
from nanor1.tasks.problems import Problem


@dataclass(frozen=True)
class Candidate:
    """One answer to a problem, among which a method chooses."""

    answer: str | None  # what rewards.final_answer finds; None: no answer, or cut off (no vote)
    logprob: float  # sum of its tokens' log-probabilities


# ---- which answers are the same


def same_answer(problem: Problem, a: str, b: str) -> bool:
    r"""Whether two final answers say the same, in either order; what cannot be read equals only its own spelling.

    Countdown: the same numbers and exactly the same value. Else `math_equal`, where the rules would take both answers
    or neither if the value were right: a copy of the question (`47 + 85`) is no vote for 132. So equal answers are
    right or wrong together, but for percentages (45% is both 45 and 0.45). Not for code, where no rule tells which
    programs do the same.

    >>> same_answer(Problem("", "", "math"), r"\frac{1}{2}", "0.5")
    True
    >>> same_answer(Problem("", "22", "countdown"), "3 + 7 + 12", "11 + 11")
    False
    """
    if a == b:
        return True
    if problem.task == "countdown":
        value = countdown_value(a)
        return value is not None and value == countdown_value(b) and countdown_numbers(a) == countdown_numbers(b)
    return _are_equal(a, b) and _is_worked_out(problem, a) == _is_worked_out(problem, b)


@lru_cache(maxsize=65_536)  # votes of 1, 2, 4, 8, 16 among the same answers compare the same pairs again and again
def _are_equal(a: str, b: str) -> bool:
    return math_equal(a, b) or math_equal(b, a)  # a base, 12_5, is forgiven on one side only


def _is_worked_out(problem: Problem, answer: str) -> bool:
    """Whether the rules take the answer where its own value is the right one."""
    return accuracy(replace(problem, answer=answer), answer) == 1.0


def group_answers(problem: Problem, answers: Sequence[str | None]) -> list[list[int]]:
    """The indices of equal answers together, in order of first occurrence; None is left out. Not for code.

    An answer joins the first group whose first member it equals: where equality does not carry over (45% is 45 and
    0.45, which differ) the order decides. Equal spellings are gathered first: `math_equal` takes up to a millisecond.

    >>> group_answers(Problem("", "", "math"), ["0.5", "2", None, "1/2"])
    [[0, 3], [1]]
    """
    assert problem.task != "code", "programs cannot be voted on"
    spellings: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        if answer is not None:
            spellings.setdefault(answer, []).append(i)
    groups: dict[str, list[int]] = {}
    for answer, indices in spellings.items():
        first = next((first for first in groups if same_answer(problem, answer, first)), answer)
        groups.setdefault(first, []).extend(indices)
    return [sorted(group) for group in groups.values()]


# ---- votes


def majority(problem: Problem, candidates: Sequence[Candidate]) -> int | None:
    """The index of the candidate that speaks for the most frequent answer; None if nobody has one.

    Ties go to the answer with the larger summed log-probability, then to the one given first. Of equal answers the
    one of the highest log-probability is chosen. Not for code.

    >>> votes = [Candidate("3", -1.0), Candidate("5", -4.0), Candidate("5.0", -2.0)]
    >>> majority(Problem("2 + 3 =", "5", "arithmetic"), votes)
    2
    """
    return weighted_vote(problem, candidates, [1.0] * len(candidates))


def weighted_vote(
    problem: Problem, candidates: Sequence[Candidate], weights: Sequence[float | None], keep_share: float = 1.0
) -> int | None:
    """As `majority`, but the answer of the largest summed weight wins; ties go to more votes, then as there.

    Only a share of the candidates with an answer votes, ceil(keep_share * n) of the highest weights (DeepConf's eta,
    taken, as in its authors' code, of the answers and not of all samples). The weight of an answer is a finite number
    from 0 up: tail and lowest are there only where the sampler was asked for confidences.
    """
    answered = [i for i, (c, _) in enumerate(zip(candidates, weights, strict=True)) if c.answer is not None]
    assert 0 < keep_share <= 1 and all(weights[i] is not None and 0 <= weights[i] < math.inf for i in answered), weights
    kept = max(1, math.ceil(keep_share * len(answered) - 1e-9))  # 0.07 * 100 is a little more than 7
    voters = set(sorted(answered, key=lambda i: -weights[i])[:kept])
    groups = group_answers(problem, [c.answer if i in voters else None for i, c in enumerate(candidates)])

    def rank(group: list[int]) -> tuple[float, int, float]:  # fsum: the order of the votes must not matter
        logprob = math.fsum(candidates[i].logprob for i in group)
        return math.fsum(weights[i] for i in group), len(group), logprob

    winner = max(groups, key=rank, default=[])
    return max(winner, key=lambda i: candidates[i].logprob, default=None)


def best_of(candidates: Sequence[Candidate], values: Sequence[float | None]) -> int | None:
    """The index of the candidate with an answer that has the largest value, the first of equals; None if there is none.

    A value that is None or nan is passed over. Works for code too, where the answer is the program.

    >>> best_of([Candidate("5", -4.0), Candidate(None, -1.0), Candidate("3", -2.0)], [0.2, 0.9, 0.3])
    2
    """
    known = [
        i
        for i, (candidate, value) in enumerate(zip(candidates, values, strict=True))
        if candidate.answer is not None and value is not None and not math.isnan(value)
    ]
    return max(known, key=lambda i: values[i], default=None)


def window_confidences(confidence_T: Sequence[float], window: int) -> tuple[float, float]:
    """The mean confidence of the last `window` tokens, and of the least confident window of that length (DeepConf).

    Windows move by one token, and a text shorter than one is one; takes time in proportion to the text. Departure:
    groups that begin before the text does, and so hold fewer tokens, are left out, as in the authors' code.

    >>> window_confidences([4.0, 1.0, 3.0, 6.0], 2)
    (4.5, 2.0)
    """
    assert window >= 1 and len(confidence_T)
    window = min(window, len(confidence_T))
    sums = list(accumulate(confidence_T, initial=0.0))
    means = [(end - start) / window for start, end in zip(sums, sums[window:], strict=False)]
    return means[-1], min(means)


# ---- k samples out of n


def pass_at_k(n: int, n_right: int, k: int) -> float:
    """The chance that k of n samples hold a right one, unbiased: 1 - C(n - right, k) / C(n, k) (Chen et al., eq. 1).

    In whole numbers up to the last division, so exact to a float.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    assert 0 <= n_right <= n and 1 <= k <= n
    return (math.comb(n, k) - math.comb(n - n_right, k)) / math.comb(n, k)


def subsets(n: int, k: int) -> list[range]:
    """The runs of k consecutive indices that n samples are cut into; what is left over at the end is in none.

    majority@k is the mean over these, less noisy than the first k alone.

    >>> subsets(7, 3)
    [range(0, 3), range(3, 6)]
    """
    assert 1 <= k <= n
    return [range(start, start + k) for start in range(0, n - k + 1, k)]
