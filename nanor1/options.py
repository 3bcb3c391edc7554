"""Options that scripts share, and what becomes of them: machine, problems, rewards of one's own, a reward model.

How a model is asked is in prompts.py, what training alone takes in training.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import torch

from nanor1.miniature import Miniature, miniature_task, own_miniature
from nanor1.rewards import OwnReward, read_reward_file
from nanor1.run.config import apply_preset, option, option_name
from nanor1.tasks.problems import Task, make_task, parse_fields, parse_object
from nanor1.tokenizer import Tokenizer

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    device: str = option("auto", "cpu, cuda, mps or auto", "machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "of the weights; auto: bfloat16 on cuda, and where a CPU is measured to be faster with it; float16: cuda only",
    )
    threads: int = option(0, "CPU threads; 0: torch's choice", least=0, most=1024)


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    data: str | None = option(
        None, "JSON lines of problems; a tenth of them, chosen by a hash of the question, is held out", "problems"
    )
    eval_data: str | None = option(None, "JSON lines of problems that are all held out, in place of that tenth")
    fields: str = option(
        "",
        "columns of other names, as question=prompt,answer=gold: the task's field, and the file's",
        needs=("--data or --eval-data", lambda config: config.data or config.eval_data),
    )
    task_args: str = option(
        "", 'JSON object of the task\'s parameters, as {"n_numbers": 3}; see nanor1/tasks/problems.py'
    )
    reward_file: str | None = option(
        None, "your Python file of functions (problem, text) -> float or None, each a reward; see nanor1/rewards.py"
    )


def as_miniature_run(config: C, given: frozenset[str], miniature: Miniature, settings: dict) -> C:
    """The miniature's own task and `settings`, less what was given; ValueError where another task was given."""
    for name in given & {"data", "eval_data", "task_args"}:
        raise ValueError(f"{option_name(name)} is for pretrained models: a miniature generates its problems")
    if "task" in given and config.task != miniature.task:
        raise ValueError(f"{config.model} is the {miniature.task} miniature and knows no other task; leave --task out")
    return replace(apply_preset(config, given, settings), task=miniature.task)


def load_task(options: TaskOptions, name: str, tokenizer: Tokenizer, parts: Sequence[str]) -> Task:
    """The task that the options name, of which these parts are needed; a miniature has its own problems."""
    if miniature := own_miniature(tokenizer):
        if name != miniature.task or options.data or options.eval_data or options.task_args:
            raise ValueError(
                f"the model is the {miniature.task} miniature and knows no other words; give --task {miniature.task} "
                "without --data, --eval-data and --task-args"
            )
        return miniature_task(miniature)
    parameters = parse_object(options.task_args, "task parameters")
    if name == "text" and options.reward_file:
        parameters = dict(needs_answer=False) | parameters
    return make_task(
        name,
        data=options.data,
        eval_data=options.eval_data,
        fields=parse_fields(options.fields),
        parts=parts,
        **parameters,
    )


def own_rewards(options: TaskOptions) -> dict[str, OwnReward]:
    """The rewards of --reward-file by name; the file is run once, unless it changes."""
    path = options.reward_file
    return _run_reward_file(path, Path(path).stat().st_mtime_ns if Path(path).exists() else 0) if path else {}


@lru_cache(maxsize=1)
def _run_reward_file(path: str, changed_ns: int) -> dict[str, OwnReward]:
    return read_reward_file(path)


def report_failures(own: dict[str, OwnReward], say_once: Callable[[str, str], None]) -> None:
    """Show the first thing that went wrong in each reward of one's own; how often is in what is said at the end."""
    for name, reward in own.items():
        if reward.first_error:
            say_once(name, f"warning: {reward.first_error}: None, as is all that goes wrong there (said once)")


def count_failures(own: dict[str, OwnReward], say: Callable[[str], None]) -> None:
    """Say how often rewards of one's own could not be computed, if they could not."""
    if counts := [f"{reward.n_failed} values of {name}" for name, reward in own.items() if reward.n_failed]:
        say(f"could not be computed: {', '.join(counts)}")


def default_tokens_per_batch(asked_for: int, device: torch.device) -> int:
    """On a CPU larger batches are no faster and keep more activations, about 2 MB a token of SmolLM2-135M."""
    return asked_for or (1024 if device.type == "cpu" else 8192)
