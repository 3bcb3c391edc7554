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

    def during(self, samples: int, keeps_best: bool = False) -> dict:
        """The figures of an evaluation during the run, of which the best one's checkpoint may be kept."""
        if not self.problems:
            return {}
        (evaluation, _), progress = self.take(samples), self.run.progress
        score = evaluation.reward if evaluation.accuracy is None else evaluation.accuracy
        if keeps_best and score is not None and (progress.best_step is None or score > progress.best_accuracy):
            progress.best_step, progress.best_accuracy = progress.step, score
        return evaluation.to_dict()

    def after(self) -> None:
        """Evaluate the trained model; say and write what the run came to."""
        run, progress, log, own = self.run, self.run.progress, self.run.log, self.actor.rules.own
        evaluation, rollouts_PG = self.take(run.config.eval_samples) if self.problems else (None, [])
        after, said, change = evaluation and evaluation.to_dict(), [], None
        if after and progress.held_out not in (None, self.digest()):  # None: a run begun before it was kept
            said = [f"\nbefore: {progress.before['n']} other held-out problems, with which these cannot be compared"]
        elif after:
            said = self.what_changed(after, rollouts_PG)
            change = paired_change(progress.before_P, problem_accuracies(rollouts_PG))
        said += [f"\nafter:  {evaluation}"] if after else []
        said += [f"change: {change_line(change)}"] if change else []
        if progress.best_step:
            best = f"{progress.best_accuracy:.3f} at step {progress.best_step}"
            said.append(f"best evaluation on the way: {best}, checkpoint kept")
        report_failures(own, log.say_once)
        count_failures(own, said.append)
        run.finish(after, said, change=change)

    def what_changed(self, after: dict, rollouts_PG: list[list[Rollout]]) -> list[str]:
        """Some answers before and after, and a table of the evaluations' figures."""
        before, said = self.run.progress.before, []
        for before_text, (rollout, *_) in zip(self.run.progress.transcripts or (), rollouts_PG, strict=False):
            said.append(f"\nproblem: {rollout.problem.prompt}  (answer: {rollout.problem.answer})")
            said += [f"  before: {shorten(before_text)}", f"  after:  {shorten(rollout.text)}"]
        title = f"held-out, {after['n']} x {after['samples']}"
        said.append(f"\n{title:<24}{'before':>9}{'after':>9}")
        for name in (*SHOWN, *(name for name in after if name.startswith("majority"))):
            if after[name] is not None and before.get(name) is not None:  # of an older run it may lack a figure
                said.append(f"{name.replace('_', ' '):<24}{before[name]:>9.3f}{after[name]:>9.3f}")
        return said

    def digest(self) -> str:
        """Changes when a problem does, or their order."""
        return digest([(problem.prompt, problem.answer) for problem in self.problems])


def shorten(text: str, limit: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[-limit // 2 :]}"
