"""Distillation: a small student learns to reason from a teacher.

    python distill.py --teacher BIG --model SMALL --task gsm8k --data gsm8k_train.jsonl --eval-data gsm8k_test.jsonl
    python distill.py --teacher traces.jsonl --model SMALL                          answers made before, by any model
    python distill.py --method logits --teacher BIG --model SMALL --task ...         the teacher's distributions
    python distill.py --method on-policy --teacher BIG --model SMALL --task ...      on the student's own answers

- traces: the teacher answers training problems; its right and readable answers are what the student is fine-tuned on
  (DeepSeek-R1, 2501.12948, section 2.4).
- logits: the same answers, but at each token the student is drawn towards the teacher's whole distribution.
- on-policy: the student answers, and the teacher says of each of its tokens how likely it finds it (GKD, 2306.13649).

The last two compare distributions over tokens, so both models need the same vocabulary. The losses are in
nanor1/gradient.py, nanor1/stages/distillation.py and nanor1/grpo.py, the teacher in nanor1/stages/teacher.py, the
choice of its answers in nanor1/stages/rejection_sampling.py, what keeps house around the loop in nanor1/training.py.
"""

import inspect
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import nanor1.run.openmp  # noqa: F401  # isort: skip  (before torch)

from nanor1 import gradient
from nanor1.evaluation.exam import EVALUATES, Exam, ExamOptions
from nanor1.grpo import LossSettings, mean, step_metrics
from nanor1.grpo import add_gradient as add_policy_gradient
from nanor1.judge import Actor, make_rules, request_seed
from nanor1.miniature import find_miniature
from nanor1.model import Transformer
from nanor1.options import TaskOptions, as_miniature_run, load_task, own_rewards
from nanor1.run.config import MANY, option, option_name, user_errors
from nanor1.run.start import open_log, read_command_line
from nanor1.sampler import Sampler
from nanor1.stages import distillation, sft
from nanor1.stages.teacher import Teacher, load_teaching
from nanor1.tasks.problems import TASKS, parse_object
from nanor1.tasks.prompts import PromptOptions, choose_template, make_prompter
from nanor1.training import Run, RunConfig


def asks_teacher(config: "Config") -> bool:
    """Whether the teacher answers problems before the first step."""
    return config.method != "on-policy" and not config.trace_file


TRACES_MADE = ("a teacher that answers problems", asks_teacher)
LOGITS = ("--method logits", lambda config: config.method == "logits")
ON_POLICY = ("--method on-policy", lambda config: config.method == "on-policy")
LEARNS_TRACES = ("--method traces or logits", lambda config: config.method != "on-policy")
SAMPLES = (
    "a teacher that answers problems, or --method on-policy",
    lambda config: asks_teacher(config) or config.method == "on-policy",
)


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig, ExamOptions, TaskOptions, PromptOptions):
    model: str | None = option(None, "the student: model or run folder, or miniature/NAME", "what to train")
    teacher: str | None = option(None, "model or run folder, or a file of traces (sample.py --keep correct)")
    method: Literal["traces", "logits", "on-policy"] = option("traces", "see above")
    task: Literal[TASKS] | None = option(None, "what the teacher answers, and what the student is evaluated on")

    traces: str | None = option(None, "logits: a file of traces; none: made by the teacher", "the teacher's answers")
    trace_problems: int = option(1000, "problems that the teacher answers", least=1, needs=TRACES_MADE)
    trace_samples: int = option(4, "answers a problem", least=1, most=MANY, needs=TRACES_MADE)
    max_per_problem: int = option(4, "right ones kept of a problem, at most", least=1, needs=TRACES_MADE)
    any_format: bool = option(False, "keep right answers without the format asked for, too", needs=TRACES_MADE)
    temperature: float = option(1.0, "of sampling", above=0, needs=SAMPLES)

    epochs: float = option(1.0, "passes over the traces", "a step", above=0, needs=LEARNS_TRACES)
    steps: int = option(0, "updates; 0: as many as the epochs take; on-policy needs a number", least=0)
    examples: int = option(16, "traces an update", least=1, most=MANY, needs=LEARNS_TRACES)
    max_tokens: int = option(2048, "longer traces are left out, counted and reported", least=2, needs=LEARNS_TRACES)
    problems: int = option(16, "on-policy: problems an update", least=1, most=MANY, needs=ON_POLICY)
    completions: int = option(4, "on-policy: answers a problem", least=1, most=MANY, needs=ON_POLICY)

    divergence: Literal["forward", "reverse", "jsd"] = option(
        "forward", "logits: see nanor1/stages/distillation.py", "loss", needs=LOGITS
    )
    beta: float = option(
        0.5,
        "logits: the teacher's share of jsd's mixture",
        above=0,
        most=1,
        needs=("--divergence jsd", lambda config: config.method == "logits" and config.divergence == "jsd"),
    )
    hard_weight: float = option(
        0.5, "logits: weight of the token's own loss; the divergence gets the rest", least=0, most=1, needs=LOGITS
    )
    divergence_temperature: float = option(1.0, "logits: softens both distributions", above=0, needs=LOGITS)

    eval_every: int = option(
        0, "evaluate every so many updates; 0: only before and after", "evaluation and saving", least=0, needs=EVALUATES
    )

    @property
    def trace_file(self) -> str | None:
        """The traces that are there already."""
        return self.teacher if Path(self.teacher).is_file() else self.traces

    def validate(self) -> None:
        super().validate()
        parse_object(self.template_args, "--template-args")
        if self.method == "on-policy" and not self.steps:
            raise ValueError("--method on-policy has no epochs; give --steps")
        if self.method != "logits" and self.traces:
            raise ValueError("--traces is for --method logits; with --method traces give the file as --teacher")
        distillation.DivergenceSettings(1, self.divergence, self.beta, self.divergence_temperature, self.hard_weight)


MINIATURE_RUN = dict(  # on the CPU, where one step is short: a GPU would wait for its launches
    max_new_tokens=224, examples=64, epochs=2.0, lr=1e-3, max_tokens=256, tokens_per_batch=4096, problems=32,
    completions=4, eval_problems=500, eval_samples=16, eval_temperature=1.0, template="bare", device="cpu",
    dtype="float32",
)  # fmt: skip
COLUMNS = [
    ("loss", "loss", "7.4f"), ("divergence", "diverg", "7.4f"), ("reverse_kl", "rev KL", "7.4f"),
    ("accuracy", "acc", "5.3f"), ("response_tokens", "tokens", "6.1f"), ("lr", "lr", "7.1e"),
    ("grad_norm", "gnorm", "6.3f"), ("tokens_per_s", "tok/s", "7.0f"), ("step_s", "s", "5.1f"),
    ("eval_accuracy", "eval", "5.3f"),
]  # fmt: skip
HIDDEN_COLUMNS = {  # those of the other methods; on-policy's loss is its reverse KL
    "traces": {"divergence", "reverse_kl", "accuracy", "response_tokens"},
    "logits": {"reverse_kl", "accuracy", "response_tokens"},
    "on-policy": {"loss", "divergence"},
}


@user_errors()
def main() -> None:
    config, checkpoint = read_command_line(Config, complete, __doc__)
    columns = [column for column in COLUMNS if column[0] not in HIDDEN_COLUMNS[config.method]]
    files = (config.data, config.eval_data, config.few_shot, config.reward_file, config.trace_file)
    with open_log(config, checkpoint, f"distill-{config.method}", columns, files) as log:
        run = Run(config, checkpoint, log)
        student, teacher, examples = set_up(run)
        held_out = student.task.part("held-out", config.eval_problems) if student.task else []
        exam = Exam(run, student, held_out)
        exam.before()
        evaluate = partial(exam.during, config.eval_samples)
        for step in run.steps():
            metrics = learn(run, student, teacher, examples, step)
            run.update()
            run.record(metrics | {"tokens_per_s": metrics["tokens"] / run.step_s}, evaluate=evaluate)
        if not run.is_stopped():
            exam.after()
            log.say(f"next: python sample.py --model {log.folder} ...")


# ---- the three methods


def learn(run: Run, student: Actor, teacher: Teacher | None, examples: list[gradient.Example], step: int) -> dict:
    """Add the gradient of one update by the run's method; returns its metrics."""
    config = run.config
    if config.method == "on-policy":
        return learn_on_policy(run, student, teacher, step)
    batch = sft.sample_examples([(examples, 1.0)], config.examples, config.seed, step)
    vocab_size, n_tokens, loss_scale = run.tokenizer.vocab_size, run.tokens_per_batch, run.optimizer.loss_scale
    if config.method == "traces":
        metrics = {"loss": gradient.add_gradient(run.workers, batch, n_tokens, vocab_size, loss_scale)}
    else:
        settings = distillation.DivergenceSettings(
            vocab_size, config.divergence, config.beta, config.divergence_temperature, config.hard_weight
        )
        metrics = distillation.add_gradient(run.workers, teacher.model, batch, n_tokens, settings, loss_scale)
    return metrics | {"tokens": sum(len(example.ids) - 1 for example in batch)}


def learn_on_policy(run: Run, student: Actor, teacher: Teacher, step: int) -> dict:
    """The student samples, the teacher scores each token, and the policy loss follows: no reward is needed."""
    config, vocab_size, n_tokens = run.config, run.tokenizer.vocab_size, run.tokens_per_batch
    problems = student.task.sample(config.problems, config.seed, step)
    groups = student.answer(problems, request_seed(config.seed, step))
    rollouts = [rollout for group in groups for rollout in group]
    advantages = distillation.teacher_advantages(teacher.model, rollouts, config.temperature, vocab_size, n_tokens)
    settings = LossSettings(config.temperature, vocab_size, n_tokens, loss_scale=run.optimizer.loss_scale)
    learned = step_metrics([add_policy_gradient(run.workers, None, rollouts, advantages, settings)])
    run.warn_of_gap(learned)
    return {
        "reverse_kl": distillation.reverse_kl(advantages),
        "accuracy": mean(rollout.parts["accuracy"] for rollout in rollouts),  # for the log alone
        "response_tokens": mean(len(rollout.completion.ids) for rollout in rollouts),
        "tokens": learned["learned_tokens"],
        **{name: learned[name] for name in ("entropy", "logp_gap_mean", "logp_gap_max")},
    }


# ---- start


def complete(config: Config, given: frozenset[str]) -> Config:
    """A new run's configuration, with a miniature's settings."""
    if config.model is None or config.teacher is None:
        raise ValueError("--model and --teacher are needed: the student, and whom it learns from")
    if config.method != "traces" and Path(config.teacher).is_file():
        raise ValueError(f"--method {config.method} asks the teacher itself; --teacher {config.teacher} is a file")
    if miniature := find_miniature(config.model):
        config = as_miniature_run(config, given, miniature, MINIATURE_RUN)
    if not config.task and (config.method == "on-policy" or not config.trace_file):
        raise ValueError("--task is needed: the problems to answer")
    of_task = [] if config.task else [*inspect.get_annotations(TaskOptions), "style", "few_shot", "stop_text"]
    if idle := [name for name in of_task if getattr(config, name) != getattr(Config, name)]:
        raise ValueError(f"{option_name(idle[0])} has no effect without --task; give that, or leave it out")
    return config


def set_up(run: Run) -> tuple[Actor, Teacher | None, list[gradient.Example]]:
    """Load the problems, the teacher, its traces, and the student, with who judges its answers."""
    config, log = run.config, run.log
    template, why = choose_template(config.template, run.tokenizer, "r1-zero", is_base_chat=True)
    log.say(f"template: {template} ({why})")
    prompter, task = make_prompter(config, run.tokenizer, template, config.task or "prompt"), None
    if config.task:
        parts = ("held-out",) if config.trace_file and config.method != "on-policy" else ("train", "held-out")
        task = load_task(config, config.task, run.tokenizer, parts)
        for part in parts:
            log.say(f"{'to learn from' if part == 'train' else 'to evaluate on'}: {task.describe(part)}")
    teacher, examples = load_teaching(run, prompter, task)
    model = Transformer.from_pretrained(run.folder, run.dtype, run.device)
    n_steps = config.steps or math.ceil(config.epochs * len(examples) / config.examples)
    run.prepare(model, prompter.tokenizer, n_steps)
    sampler = Sampler(model, config.max_rows, memory_share=0.5)  # the other half is for learning
    rules = make_rules(prompter, own=own_rewards(config))
    return Actor(sampler, prompter, rules, task, config, run.tokens_per_batch), teacher, examples


if __name__ == "__main__":
    main()
