"""Who is asked: a model that is read when it is first needed, how it is prompted, judged, and told to think longer."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from nanor1.judge import Rules
from nanor1.model import Transformer
from nanor1.sampler import Sampler
from nanor1.search.step_beams import Scorer, mean_logprob
from nanor1.search.think_longer import REQUEST
from nanor1.tasks.prompts import Prompter
from nanor1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Settings:
    """What the methods are told."""

    step_text: str = "\n"  # ends a step of beam search
    wait_text: str = "Wait"  # budget forcing: put in the place of the end of thinking
    end_text: str = "</think>"  # that end; "" where a model thinks without tags, and the stop token is the end
    answer_text: str = ""  # put in after an end by force
    min_thinking: float = math.inf  # tokens from which on thinking may end
    max_thinking: int = 768  # tokens
    max_answer: int = 256  # tokens behind the thinking
    window: int = 32  # tokens over which a confidence is taken
    keep_share: float = 1.0  # of the answers, the most confident ones, vote by confidence
    request: str = REQUEST  # for a review of the last answer


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
    settings: Settings = Settings()  # of methods
    rules: Rules = Rules()  # by which answers are judged
    scorer: Scorer = mean_logprob  # of steps

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
