"""Who is asked: a model that is read when it is first needed, how it is prompted, judged, and told to think longer."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from nanor1.judge import Rules
from nanor1.model import Transformer
from nanor1.sampler import Sampler
from nanor1.search.step_beams import Scorer, mean_logprob
from nanor1.search.think_longer import Budget
from nanor1.tasks.prompts import Prompter
from nanor1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Asker:
    """A model, and how it is asked; its weights are read when they are first needed, after all mistakes are found."""

    folder: Path  # of the model
    device: torch.device
    dtype: torch.dtype
    prompter: Prompter
    sampling: dict[str, object]  # of Sampler.generate, the same for every prompt: max_new_tokens, temperature, ...
    max_rows: int = 64
    n: int = 1  # answers to a prompt
    seed: int = 0
    rules: Rules = Rules()  # by which answers are judged
    scorer: Scorer = mean_logprob  # of steps
    step_text: str = "\n"  # ends a step of beam search
    budget: Budget | None = None  # of budget forcing
    window: int = 32  # tokens over which a confidence is taken

    @cached_property
    def sampler(self) -> Sampler:
        return Sampler(Transformer.from_pretrained(self.folder, self.dtype, self.device), self.max_rows)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prompter.tokenizer


def check_room(what: str, prompt_ids: list[int], sampler: Sampler, remedy: str = "shorten it", least: int = 1) -> None:
    """ValueError for a prompt behind which the model's context has no room for so many tokens."""
    context = sampler.model.config.max_position_embeddings
    if len(prompt_ids) + least > context:
        raise ValueError(f"{what} is {len(prompt_ids)} tokens; the model's context is {context}: {remedy}")
