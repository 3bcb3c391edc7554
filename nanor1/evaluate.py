"""Judge completions; accuracy with a confidence interval, and what answers at this accuracy cost in tokens.

Accuracy is the mean over problems of each problem's share of right samples (pass@1). Samples of one problem are not
independent, so the interval is over problems. Left out: methods that spend tokens on purpose (measure.py).
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from nanor1.coding import code_accuracies
from nanor1.grpo import Rollout
from nanor1.rewards import REPORTED, REWARDS, after_thinking, combine, final_answer
from nanor1.sampler import Completion, Sampler
from nanor1.tasks import Example, Problem, Style, format_prompt, prefilled
from nanor1.tokenizer import Tokenizer
from nanor1.voting import Candidate, majority

# The scores, in 0..1 or None, of responses behind the ids of their prompts: what a reward model prefers.
Preference = Callable[[list[list[int]], list[str]], list[float | None]]
WAIT = re.compile(r"\bwait\b|等", re.IGNORECASE)


def write_prompt(
    problem: Problem,
    template: str,
    tokenizer: Tokenizer,
    template_arguments: dict[str, object] | None = None,
    style: Style = "think",
    examples: Sequence[Example] = (),
) -> tuple[str, list[int]]:
    """The text a model sees and its ids; with "chat" the model's own template, whose special tokens count as such.

    `template_arguments` are of the model's own template; the others have none. For `style` and `examples` see
    tasks.format_prompt.
    """
    prompt = format_prompt(problem, template, style, examples)
    if template == "chat":
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **(template_arguments or {}))
        return text, tokenizer.encode(text, allow_special=True)
    ids = tokenizer.encode(prompt)
    return prompt, [tokenizer.bos_id, *ids] if tokenizer.adds_bos else ids


def judge(
    problem: Problem,
    prompt: tuple[str, list[int]],
    completion: Completion,
    tokenizer: Tokenizer,
    weights: dict[str, float],
    known: dict[str, float | None] | None = None,
) -> Rollout:
    """Reward one completion by rules. An answer cut off by the length limit is not an answer: its accuracy is 0.

    `known` parts are not judged again. The reward is None where a weighted part is, or is still to come from a reward
    model.
    """
    response, known = read_response(prompt, completion, tokenizer), known or {}
    names = {*REPORTED, *weights} & REWARDS.keys()
    parts = {name: known[name] if name in known else REWARDS[name](problem, response) for name in sorted(names)}
    if completion.finish == "length" and parts["accuracy"] is not None:
        parts["accuracy"] = 0.0
    reward = combine(parts, weights) if parts.keys() >= weights.keys() else None
    return Rollout(problem, prompt[1], completion, response, reward, parts)


def read_response(prompt: tuple[str, list[int]], completion: Completion, tokenizer: Tokenizer) -> str:
    """The text to judge: what the prompt pre-filled and what the model made of it, without the stop token."""
    ids = completion.ids[:-1] if completion.ids[-1] in tokenizer.stop_ids else completion.ids
    return prefilled(prompt[0]) + tokenizer.decode(ids)


def judge_all(
    problems: Sequence[Problem],
    prompts: Sequence[tuple[str, list[int]]],
    completions_PG: Sequence[Sequence[Completion]],
    tokenizer: Tokenizer,
    weights: dict[str, float],
    preference: Preference | None = None,
) -> list[list[Rollout]]:
    """Reward the completions of each problem; programs run several at a time, a reward model scores all at once."""
    jobs = [
        (problem, prompt, completion)
        for problem, prompt, group in zip(problems, prompts, completions_PG, strict=True)
        for completion in group
    ]
    known = _run_programs(jobs, tokenizer)
    flat = [judge(*job, tokenizer, weights, known.get(i)) for i, job in enumerate(jobs)]
    if preference:
        scores = preference([rollout.prompt_ids for rollout in flat], [rollout.text for rollout in flat])
        flat = [_with_preference(rollout, score, weights) for rollout, score in zip(flat, scores, strict=True)]
    rollouts = iter(flat)
    return [[next(rollouts) for _ in group] for group in completions_PG]


def _run_programs(jobs: list[tuple], tokenizer: Tokenizer) -> dict[int, dict[str, float | None]]:
    """The accuracy of each job that is code, run together: a tenth of the time that one by one would take."""
    code = [i for i, (problem, _, _) in enumerate(jobs) if problem.task == "code"]
    answers = [after_thinking(read_response(*jobs[i][1:], tokenizer)) for i in code]
    accuracies = code_accuracies([jobs[i][0] for i in code], answers) if code else []
    return {i: {"accuracy": value} for i, value in zip(code, accuracies, strict=True)}


def _with_preference(rollout: Rollout, score: float | None, weights: dict[str, float]) -> Rollout:
    """An answer that is cut off or missing is preferred to none: a reward model may never have seen one."""
    is_there = rollout.completion.finish == "stop" and after_thinking(rollout.text).strip()
    parts = rollout.parts | {"preference": score if is_there else 0.0}
    return replace(rollout, parts=parts, reward=combine(parts, weights))


def evaluate(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    template: str,
    weights: dict[str, float],
    *,
    samples: int = 1,
    **sampling,
) -> tuple["Evaluation", list[list[Rollout]]]:
    """Answer and judge each problem `samples` times; `sampling` goes to Sampler.generate."""
    prompts = [write_prompt(problem, template, tokenizer) for problem in problems]
    completions_PG = sampler.generate(
        [ids for _, ids in prompts],
        n=samples,
        stop_ids=tokenizer.stop_ids,
        vocab_size=tokenizer.vocab_size,
        **sampling,
    )
    rollouts_PG = judge_all(problems, prompts, completions_PG, tokenizer, weights)
    return summarize(rollouts_PG), rollouts_PG


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a fixed set of problems; shares are in 0..1."""

    accuracy: float
    accuracy_low: float  # 95% interval
    accuracy_high: float
    n: int  # problems
    samples: int  # a problem
    format: float
    language: float  # share of the words of the thinking that are in the problem's language
    response_tokens: float  # mean
    truncated: float
    retries: float  # mean number of times a response says "wait", or 等
    majority: float | None  # accuracy of the most frequent answer; None with one sample a problem

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields by name, the majority's with its number of samples (`majority_16`)."""
        values = asdict(self)
        values[f"majority_{self.samples}"] = values.pop("majority")
        return values

    def __str__(self) -> str:
        half = (self.accuracy_high - self.accuracy_low) / 2
        text = f"accuracy {self.accuracy:.3f} +- {half:.3f} (95%, n={self.n} x {self.samples})"
        text += f", format {self.format:.3f}, language {self.language:.3f}, {self.response_tokens:.1f} tokens"
        text += f", {self.retries:.2f} retries, {self.truncated:.1%} cut"
        return text if self.majority is None else f"{text}, majority@{self.samples} {self.majority:.3f}"


def summarize(rollouts_PG: Sequence[Sequence[Rollout]]) -> Evaluation:
    """Evaluate judged rollouts, one inner list a problem.

    A rollout whose accuracy is None (could not be judged) is left out of its problem's mean, and a problem with none
    left out of the set.
    """
    judged_PG = [[r for r in group if r.parts["accuracy"] is not None] for group in rollouts_PG]
    judged_PG = [group for group in judged_PG if group]
    if not judged_PG:
        raise ValueError("no rollout could be judged; check the problems' answers")
    means_P = [sum(r.parts["accuracy"] for r in group) / len(group) for group in judged_PG]
    flat = [r for group in judged_PG for r in group]
    mean = lambda values: sum(values) / len(flat)  # noqa: E731
    samples = max(map(len, rollouts_PG))
    low, high = accuracy_interval(means_P)
    return Evaluation(
        accuracy=sum(means_P) / len(means_P),
        accuracy_low=low,
        accuracy_high=high,
        n=len(means_P),
        samples=samples,
        format=mean(r.parts.get("format") or 0.0 for r in flat),
        language=mean(r.parts.get("language", 1.0) for r in flat),
        response_tokens=mean(len(r.completion.ids) for r in flat),
        truncated=mean(r.completion.finish == "length" for r in flat),
        retries=mean(len(WAIT.findall(r.text)) for r in flat),
        majority=majority_accuracy(judged_PG) if samples > 1 else None,
    )


def majority_accuracy(rollouts_PG: Sequence[Sequence[Rollout]]) -> float | None:
    """Share of problems whose most frequent answer is right (see voting.majority); None for programs.

    A rollout that was cut off, or gives no answer, has no vote (self-consistency: Wang et al. 2023, 2203.11171).
    """
    if any(group[0].problem.task == "code" for group in rollouts_PG):
        return None
    n_right = 0.0
    for group in rollouts_PG:
        winner = majority(group[0].problem, [to_candidate(rollout) for rollout in group])
        n_right += 0.0 if winner is None else group[winner].parts["accuracy"]
    return n_right / len(rollouts_PG)


def to_candidate(rollout: Rollout) -> Candidate:
    made = rollout.completion
    answer = final_answer(rollout.problem, rollout.text) if made.finish == "stop" else None
    return Candidate(answer, len(made.ids), sum(made.logprobs), accuracy=rollout.parts["accuracy"])


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


def wilson_interval(n_right: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927); 95% by default.

    >>> tuple(round(x, 3) for x in wilson_interval(8, 10))
    (0.49, 0.943)
    """
    if not 0 <= n_right <= n or n < 1:
        raise ValueError(f"{n_right} right of {n}: want 0 <= right <= n and n >= 1")
    p, shrink = n_right / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
