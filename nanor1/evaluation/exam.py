"""What a model answers to held-out problems before and after its training, and what has changed."""

from dataclasses import dataclass

from nanor1.evaluation.accuracy import Evaluation, evaluate, problem_accuracies
from nanor1.evaluation.paired import change_line, paired_change
from nanor1.grpo import Rollout
from nanor1.judge import Actor
from nanor1.options import count_failures, report_failures
from nanor1.run.config import MANY, option
from nanor1.run.resumable import digest
from nanor1.tasks.problems import Problem
from nanor1.training import Run

N_TRANSCRIPTS = 3  # held-out problems whose answers are shown before and after
EVALUATES = ("--task", lambda config: config.task is not None)
SHOWN = ("reward", "accuracy", "format", "language", "response_tokens", "retries", "truncated")  # and the majority's


@dataclass(frozen=True, kw_only=True)
class ExamOptions:
    max_new_tokens: int = option(512, "length limit of an answer", "answers", least=1, needs=EVALUATES)
    max_rows: int = option(512, "answers made at once", least=1, needs=EVALUATES)

    eval_problems: int = option(200, "held-out problems, at most", "evaluation", least=1, needs=EVALUATES)
    eval_samples: int = option(
        1,
        "samples a problem before and after the run",
        least=1,
        most=MANY,
        needs=("--eval-temperature above 0", lambda config: config.eval_temperature or config.eval_samples == 1),
    )
    eval_temperature: float = option(0.0, "0 is greedy", least=0, needs=EVALUATES)


@dataclass(frozen=True)
class Exam:
    """The same problems with the same random numbers each time, so that figures compare weights and nothing else."""

    run: Run
    actor: Actor
    problems: list[Problem]  # none: there is no evaluation

    def take(self, samples: int) -> tuple[Evaluation, list[list[Rollout]]]:
        """`samples` answers to each problem, or one where they are greedy."""
        config = self.run.config
        return evaluate(
            self.actor.sampler,
            self.actor.prompter,
            self.problems,
            self.actor.rules,
            samples=samples if config.eval_temperature else 1,
            temperature=config.eval_temperature,
            max_new_tokens=config.max_new_tokens,
        )

    def before(self) -> None:
        """Evaluate the starting model, unless a resumed run did."""
        progress = self.run.progress
        if progress.before is not None or not self.problems:
            return
        evaluation, rollouts_PG = self.take(self.run.config.eval_samples)
        progress.before_P, progress.held_out = problem_accuracies(rollouts_PG), self.digest()
        progress.transcripts = [group[0].text for group in rollouts_PG[:N_TRANSCRIPTS]]
        self.run.begin(evaluation.to_dict(), str(evaluation))

    def during(self) -> dict:
        """The figures of an evaluation during the run; none where nothing is held out."""
        return self.take(self.run.config.eval_samples)[0].to_dict() if self.problems else {}

    def after(self) -> None:
        """Evaluate the trained model; say and write what the run came to."""
        run, progress, log = self.run, self.run.progress, self.run.log
        evaluation, rollouts_PG = self.take(run.config.eval_samples) if self.problems else (None, [])
        after = evaluation and evaluation.to_dict()
        is_same = progress.held_out in (None, self.digest())  # None: a run begun before it was kept
        change = paired_change(progress.before_P, problem_accuracies(rollouts_PG)) if is_same else None
        run.summarize(after, change=change)
        if after:
            if is_same:
                self.say_what_changed(after, rollouts_PG)
            else:
                n = progress.before["n"]
                log.say(f"\nbefore: {n} other held-out problems, with which these cannot be compared")
            log.say(f"\nafter:  {evaluation}")
        if change:
            log.say(f"change: {change_line(change)}")
        if progress.best_step:
            best = f"{progress.best_accuracy:.3f} at step {progress.best_step}"
            log.say(f"best evaluation on the way: {best}, checkpoint kept")
        report_failures(self.actor.rules.own, log.say_once)
        count_failures(self.actor.rules.own, log.say)
        run.say_end()

    def say_what_changed(self, after: dict, rollouts_PG: list[list[Rollout]]) -> None:
        """Some answers before and after, and a table of the evaluations' figures."""
        before, log = self.run.progress.before, self.run.log
        for before_text, (rollout, *_) in zip(self.run.progress.transcripts or (), rollouts_PG, strict=False):
            log.say(f"\nproblem: {rollout.problem.prompt}  (answer: {rollout.problem.answer})")
            log.say(f"  before: {shorten(before_text)}")
            log.say(f"  after:  {shorten(rollout.text)}")
        log.say(f"\n{'held-out, ' + str(after['n']) + ' x ' + str(after['samples']):<24}{'before':>9}{'after':>9}")
        for name in (*SHOWN, *(name for name in after if name.startswith("majority"))):
            if after[name] is not None and before.get(name) is not None:  # of an older run it may lack a figure
                log.say(f"{name.replace('_', ' '):<24}{before[name]:>9.3f}{after[name]:>9.3f}")

    def digest(self) -> str:
        """Changes when a problem does, or their order."""
        return digest([(problem.prompt, problem.answer) for problem in self.problems])


def shorten(text: str, limit: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[-limit // 2 :]}"
