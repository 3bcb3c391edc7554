"""A reward model: a transformer that gives an answer a score, learned from pairs of which one answer was preferred.

The score is read at the last token of prompt, answer and stop token, by one row of weights in place of the output
matrix. By Bradley and Terry (1952) the chosen answer wins against the rejected one with probability
sigmoid(score_chosen - score_rejected); the loss is the negative log-likelihood of that (InstructGPT, 2203.02155,
eq. 1, one pair a prompt). As in DeepSeek-R1 (2501.12948, section 2.3.4) helpfulness is a matter of the final answer:
what stands before `</think>` is cut off, in training and in use alike.

Left out: ensembles, several labels, scores of single steps, human-written scales.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanor1.gradient import Workers
from nanor1.judge import Preference
from nanor1.model import Transformer
from nanor1.packing import Batch, Item, attended_pairs, pack, to_device
from nanor1.rewards import after_thinking
from nanor1.run.checkpoint import model_folder
from nanor1.stages.sft import NO_PLACE_FOR_SYSTEM, Examples, first_question, is_chat, text_end, thought_in, with_system
from nanor1.tasks.problems import read_json_lines
from nanor1.tasks.prompts import render
from nanor1.tokenizer import Tokenizer, check_same_vocabulary
from nanor1.weights import ModelConfig, is_reward_model, read_config


class RewardModel(Transformer):
    """A Transformer with a score instead of logits; its folder is what transformers calls ForSequenceClassification.

    transformers reads the score at the last token that is not config.json's `pad_token_id`: with a padding token that
    is also the stop token it finds another one than we do. Without one it takes one sequence at a time.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(replace(config, tie_word_embeddings=True))  # it has no output matrix of its own
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "RewardModel":
        """Load a reward model, or start one from a language model, all of whose scores are then 0.

        Which of the two a folder holds says `is_reward_model`. ValueError as from Transformer.from_pretrained.
        """
        if is_reward_model(folder):
            hf, _ = read_config(folder)
            n_labels = hf.get("num_labels") or len(hf.get("id2label") or "01")  # two is what transformers never writes
            if n_labels != 1:
                raise ValueError(f"{folder} holds a classifier of {n_labels} labels; a reward model has one")
            return super().from_pretrained(folder, dtype, device)
        language_model = Transformer.from_pretrained(folder, dtype, device)
        with torch.device("meta"):
            model = cls(language_model.config)
        model.hf_config = language_model.hf_config
        weights = {name: x for name, x in language_model.state_dict().items() if name != "lm_head.weight"}
        head = torch.zeros_like(weights["model.embed_tokens.weight"][:1])
        model.load_state_dict(weights | {"score.weight": head}, assign=True)
        return model

    def scores(self, state_MC: Tensor) -> Tensor:
        """The score read off a hidden state: fp32 [M]."""
        return F.linear(state_MC.float(), self.score.weight.float()).squeeze(1)


# ---- pairs from JSON lines


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, as ids; each is the final answer alone and ends in the stop token."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float = 0.0  # by how much the chosen one's score is to be higher
    question: str = field(default="", compare=False)  # its bare text: decides what is held out


def read_pairs(
    path: str | Path,
    tokenizer: Tokenizer,
    max_tokens: int,
    template_arguments: dict[str, object] | None = None,
    system: str = "",
) -> Examples:
    """Read JSON lines of `prompt`, `chosen`, `rejected` and, if there is one, a number `margin`.

    `prompt` is a text, used as it is, or messages, dressed by the chat template; `chosen` and `rejected` are texts or
    lists of one assistant message. `template_arguments` and `system` are those of sft.read_examples. No sequence is
    longer than `max_tokens`. ValueError names file, line and fault.
    """

    def to_pair(row: dict) -> tuple[Pair, bool]:
        prompt_ids, question = _prompt(row.get("prompt"), tokenizer, template_arguments or {}, system)
        chosen_ids, rejected_ids = (_answer_ids(_answer(row, name), tokenizer) for name in ("chosen", "rejected"))
        margin = row.get("margin", 0.0)
        if type(margin) not in (int, float) or not math.isfinite(margin):
            raise ValueError(f"expected a finite number 'margin', found {margin!r:.60}")
        pair = Pair(prompt_ids, chosen_ids, rejected_ids, float(margin), question)
        return pair, row.get("split") not in (None, "train")

    found = read_json_lines(path, to_pair)
    different = [pair for pair, _ in found if pair.chosen_ids != pair.rejected_ids]
    longest = lambda pair: len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))  # noqa: E731
    pairs = [pair for pair in different if longest(pair) <= max_tokens]
    n_equal, n_too_long = len(found) - len(different), len(different) - len(pairs)
    if not pairs:
        raise ValueError(
            f"{path}: none of its {len(found)} pairs can be used: {n_too_long} are longer than {max_tokens} tokens, "
            f"{n_equal} have the same final answer twice"
        )
    return Examples(pairs, n_too_long, n_equal=n_equal, n_not_train=sum(is_not_train for _, is_not_train in found))


def _prompt(
    prompt: object, tokenizer: Tokenizer, template_arguments: dict[str, object], system: str
) -> tuple[list[int], str]:
    """Its ids, which are those that a policy continued, and the question in it."""
    if isinstance(prompt, str) and prompt.strip():
        if system:
            raise ValueError(NO_PLACE_FOR_SYSTEM)
        return render(prompt, tokenizer, {})[1], prompt.strip()
    if is_chat(prompt):
        for message in prompt:
            thought_in(message)  # refuses what cannot be one text; the template does with it what it does
        return render(with_system(prompt, system), tokenizer, template_arguments)[1], first_question(prompt)
    raise ValueError(
        f"expected 'prompt': a text or messages, each with a 'role' and a text 'content', found {prompt!r:.60}"
    )


def _answer(row: dict, name: str) -> str:
    answer = row.get(name)
    if is_chat(answer) and len(answer) == 1 and answer[0]["role"] == "assistant":
        return answer[0]["content"]
    if not isinstance(answer, str):
        raise ValueError(f"expected {name!r}: a text or a list of one assistant message, found {answer!r:.60}")
    return answer


def _answer_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The final answer and the stop token; of a response that is still thinking the empty answer.

    A special token that is spelled out in the answer stays mere text.
    """
    return [*tokenizer.encode(after_thinking(text).strip()), text_end(tokenizer)]


# ---- scores


def to_item(prompt_ids: list[int], answer_ids: list[int]) -> Item:
    """The score is read where what comes behind the answer would be predicted: a token that is not there."""
    return Item(prompt_ids, [*answer_ids, 0], [False] * len(answer_ids) + [True])


@torch.no_grad()
def score(
    model: RewardModel, tokenizer: Tokenizer, prompt_ids_B: list[list[int]], answers_B: list[str], tokens_per_batch: int
) -> list[float]:
    """The score of each response behind its prompt; of the response only what follows its thinking counts.

    `tokenizer` is the reward model's and the one of the prompts' ids. A sequence that is longer than the model's
    context scores nan. Give the completions of a prompt as neighbours: they then share it.
    """
    items = [to_item(ids, _answer_ids(text, tokenizer)) for ids, text in zip(prompt_ids_B, answers_B, strict=True)]
    scores, longest = [math.nan] * len(items), model.config.max_position_embeddings + 1
    fitting = [item if len(item.prompt_ids + item.ids) <= longest else replace(item, ids=[]) for item in items]
    for batch in pack(fitting, tokens_per_batch):
        batch = batch.to(model.head_weight_VC.device)
        for i, x in zip(batch.item_M.tolist(), model.scores(batch.predictor_states(model)).tolist(), strict=True):
            scores[i] = x
    return scores


def preference(score: float) -> float | None:
    """sigmoid(score), None where the score is not finite: it cannot be judged.

    With centred scores, the probability of being preferred to an average answer. Within 0..1, so that the weight of
    this reward says how much it can ever be worth, and no score can outgrow the rules.

    >>> preference(0.0), round(preference(2.0), 3), preference(float("nan"))
    (0.5, 0.881, None)
    """
    return (1 + math.tanh(score / 2)) / 2 if math.isfinite(score) else None  # math.exp(-score) could overflow


# ---- learning


def pair_loss(score_P2: Tensor, margin_P: Tensor, center_coef: float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected)^2, of each pair: fp32 [P].

    The margin asks for a gap that grows with how clear the preference was (Llama 2, 2307.09288, eq. 2). Differences
    leave the scores' common offset free; the centring term draws their mean to 0 (Eisenstein et al. 2023, 2312.09244,
    eq. 2, where the coefficient is small, such as 0.01).
    """
    chosen_P, rejected_P = score_P2.unbind(1)
    loss_P = -F.logsigmoid(chosen_P - rejected_P - margin_P)
    return loss_P + center_coef * (chosen_P + rejected_P).square()


@dataclass(frozen=True)
class PairTerms:
    """What came out for some pairs: counts, and means over them."""

    n: int
    n_right: float  # pairs whose chosen answer has the higher score; a tie counts half
    loss: float
    difference: float  # of the scores, chosen - rejected
    score: float  # of both answers
    n_tokens: int  # packed, prompts included
    flops: float  # of a forward and a backward (see Transformer.training_flops)

    @property
    def accuracy(self) -> float:
        return self.n_right / self.n


def add_gradient(
    workers: Workers,
    pairs: list[Pair],
    tokens_per_batch: int,
    center_coef: float = 0.0,
    loss_scale: float = 1.0,
    learns: bool = True,
) -> PairTerms:
    """Add the gradient of one update, of the mean loss over `pairs`, to the parameters, however they are split.

    It is multiplied by `loss_scale` (see nanor1/optim.py). Without `learns` there is none.
    """
    items = [to_item(pair.prompt_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    margins = torch.tensor([pair.margin for pair in pairs])

    def loss_and_sums(model: RewardModel, batch: Batch) -> tuple[Tensor, tuple[Tensor, int, float]]:
        score_P2 = model.scores(batch.predictor_states(model)).view(-1, 2)
        margin_P = to_device(margins, score_P2.device)[batch.item_M[::2] // 2]
        loss = pair_loss(score_P2, margin_P, center_coef).sum()
        score_P2 = score_P2.detach()
        difference_P = score_P2[:, 0] - score_P2[:, 1]
        n_right = (difference_P.sign() + 1).sum() / 2
        sums = torch.stack([n_right, loss.detach(), difference_P.sum(), score_P2.mean(1).sum()])
        n_tokens, n_pairs = len(batch.ids_N), attended_pairs(batch.cu_seqlens_B1, batch.parent_B)
        return loss_scale * loss / len(pairs), (sums, n_tokens, model.training_flops(n_tokens, n_pairs, n_targets=0))

    reports = workers.accumulate(pack(items, tokens_per_batch, together=2), loss_and_sums, learns)
    of_batches = [[*sums.tolist(), *counts] for sums, *counts in reports]
    n, (n_right, loss, difference, score, n_tokens, flops) = len(pairs), map(sum, zip(*of_batches, strict=True))
    return PairTerms(n, n_right, loss / n, difference / n, score / n, n_tokens, flops)


def load_reward_model(
    folder: str | Path, tokenizer: Tokenizer, dtype: torch.dtype | None, device: torch.device
) -> RewardModel:
    """The reward model in a model or run folder, without gradients.

    ValueError unless it reads the tokenizer's ids, and for a language model, which has learned no score.
    """
    folder = model_folder(folder)
    check_same_vocabulary(tokenizer, Tokenizer.from_pretrained(folder), "--reward-model reads the ids that are sampled")
    if not is_reward_model(folder):
        raise ValueError(
            f"{folder} holds a language model, which has no score; make a reward model of it first: "
            "python train_sft.py --objective preference"
        )
    return RewardModel.from_pretrained(folder, dtype, device).requires_grad_(False)


def to_preference(model: RewardModel, tokenizer: Tokenizer, n_tokens: int) -> Preference:
    """What a reward model thinks of whole responses, in 0..1 or None, in batches of `n_tokens`."""
    return lambda prompt_ids_B, texts_B: [*map(preference, score(model, tokenizer, prompt_ids_B, texts_B, n_tokens))]
