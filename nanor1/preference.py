"""A reward model: a transformer that gives an answer a score, learned from pairs of which one answer was preferred.

The score is read at the last token of prompt, answer and stop token, by one row of weights in place of the output
matrix. By Bradley and Terry (1952) the chosen answer wins against the rejected one with probability
sigmoid(score_chosen - score_rejected); the loss is the negative log-likelihood of that (InstructGPT, 2203.02155,
eq. 1, one pair a prompt). As in DeepSeek-R1 (2501.12948, section 2.3.4) helpfulness is a matter of the final answer:
what stands before `</think>` is cut off, in training and in use alike.

Left out: ensembles, several labels, scores of single steps, human-written scales.

Letters: P pairs, B sequences, N packed tokens, M answers, C width.
"""

import math
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanor1.model import Transformer
from nanor1.packing import MAKES_LAYOUT, attended_pairs, end_to_end, in_batches, to_device
from nanor1.parallel import Workers
from nanor1.pretrained import ModelConfig, is_reward_model, read_config
from nanor1.prompts import render
from nanor1.rewards import after_thinking
from nanor1.sft import NO_PLACE_FOR_SYSTEM, first_question, text_end, thought_in, with_system
from nanor1.tasks import read_json_lines
from nanor1.tokenizer import Tokenizer

Answered = tuple[list[int], list[int]]  # the ids of a prompt and of an answer to it


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


def load_scorer(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> RewardModel:
    """Load a reward model to score with; ValueError for a language model, which has learned no score."""
    if not is_reward_model(folder):
        raise ValueError(
            f"{folder} holds a language model, which has no score; make a reward model of it first: "
            "python train_sft.py --objective preference"
        )
    return RewardModel.from_pretrained(folder, dtype, device)


# ---- pairs from JSON lines


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, as ids; each is the final answer alone and ends in the stop token."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float = 0.0  # by how much the chosen one's score is to be higher
    question: str = field(default="", compare=False)  # its bare text: decides what is held out

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class Pairs:
    """The pairs of a file that can be learned from, and how many others there are."""

    pairs: list[Pair]
    n_too_long: int
    n_equal: int  # the two final answers are the same: they say nothing about a preference
    n_not_train: int = 0  # lines that say of themselves that their problem is not of the `split` "train"


def read_pairs(
    path: str | Path,
    tokenizer: Tokenizer,
    max_tokens: int,
    template_arguments: dict[str, object] | None = None,
    system: str = "",
) -> Pairs:
    """Read JSON lines of `prompt`, `chosen`, `rejected` and, if there is one, a number `margin`.

    `prompt` is a text, used as it is, or messages, dressed by the chat template; `chosen` and `rejected` are texts or
    lists of one assistant message. `template_arguments` and `system` are those of sft.read_examples. No sequence is
    longer than `max_tokens`. ValueError names file, line and fault.
    """

    def to_pair(row: dict) -> tuple[Pair, bool]:
        return _to_pair(row, tokenizer, template_arguments or {}, system), row.get("split") not in (None, "train")

    found = read_json_lines(path, to_pair)
    different = [pair for pair, _ in found if pair.chosen_ids != pair.rejected_ids]
    pairs = [pair for pair in different if _longest(pair) <= max_tokens]
    n_equal, n_too_long = len(found) - len(different), len(different) - len(pairs)
    if not pairs:
        raise ValueError(
            f"{path}: none of its {len(found)} pairs can be used: {n_too_long} are longer than {max_tokens} tokens, "
            f"{n_equal} have the same final answer twice"
        )
    return Pairs(pairs, n_too_long, n_equal, sum(is_not_train for _, is_not_train in found))


def _longest(pair: Pair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def _to_pair(row: dict, tokenizer: Tokenizer, template_arguments: dict[str, object], system: str) -> Pair:
    prompt_ids, question = _prompt(row.get("prompt"), tokenizer, template_arguments, system)
    chosen_ids, rejected_ids = (_answer_ids(_answer(row, name), tokenizer) for name in ("chosen", "rejected"))
    margin = row.get("margin", 0.0)
    if type(margin) not in (int, float) or not math.isfinite(margin):
        raise ValueError(f"expected a finite number 'margin', found {margin!r:.60}")
    return Pair(prompt_ids, chosen_ids, rejected_ids, float(margin), question)


def _prompt(
    prompt: object, tokenizer: Tokenizer, template_arguments: dict[str, object], system: str
) -> tuple[list[int], str]:
    """Its ids, which are those that a policy continued, and the question in it."""
    if isinstance(prompt, str) and prompt.strip():
        if system:
            raise ValueError(NO_PLACE_FOR_SYSTEM)
        return render(prompt, tokenizer, {})[1], prompt.strip()
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        for message in prompt:
            thought_in(message)  # refuses what cannot be one text; the template does with it what it does
        return render(with_system(prompt, system), tokenizer, template_arguments)[1], first_question(prompt)
    raise ValueError(
        f"expected 'prompt': a text or messages, each with a 'role' and a text 'content', found {prompt!r:.60}"
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _answer(row: dict, name: str) -> str:
    answer = row.get(name)
    if isinstance(answer, list) and len(answer) == 1 and _is_message(answer[0]) and answer[0]["role"] == "assistant":
        return answer[0]["content"]
    if not isinstance(answer, str):
        raise ValueError(f"expected {name!r}: a text or a list of one assistant message, found {answer!r:.60}")
    return answer


def final_part(text: str) -> str:
    """What of a response is scored; of one that is still thinking nothing, and it is scored as the empty answer.

    >>> final_part("<think> 2 + 2? </think> It is 4. ")
    'It is 4.'
    """
    return after_thinking(text).strip()


def _answer_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The final answer and the stop token. A special token that is spelled out in the answer stays mere text."""
    return [*tokenizer.encode(final_part(text)), text_end(tokenizer)]


# ---- scores of packed sequences


@dataclass(frozen=True)
class PackedAnswers:
    """Prompts, then the answers that continue them, laid end to end (see nanor1/packing.py); int64 tensors."""

    ids_N: Tensor
    cu_seqlens_B1: Tensor
    parent_B: Tensor
    last_M: Tensor  # the packed token at which each answer's score is read

    def to(self, device: torch.device) -> "PackedAnswers":
        return to_device(self, device, stays=MAKES_LAYOUT)


def pack(answered: list[Answered]) -> PackedAnswers:
    """Lay answers behind their prompts, longest first (see nanor1/attention.py); neighbours share an equal prompt."""
    prompts, parents = [], []
    for prompt_ids, group in groupby(answered, lambda item: item[0]):
        parents += [len(prompts)] * len(list(group))
        prompts.append(prompt_ids)
    order = sorted(range(len(answered)), key=lambda i: -sum(map(len, answered[i])))
    sequences = prompts + [answered[i][1] for i in order]
    starts = list(accumulate(map(len, sequences), initial=0))
    last = {i: end - 1 for i, end in zip(order, starts[len(prompts) + 1 :], strict=True)}
    return PackedAnswers(
        end_to_end(sequences),
        torch.tensor(starts),
        torch.tensor([-1] * len(prompts) + [parents[i] for i in order]),
        torch.tensor([last[i] for i in range(len(answered))]),
    )


def packed_scores(model: RewardModel, packed: PackedAnswers) -> Tensor:
    """The score of each answer, in the order in which they were given to `pack`: fp32 [M]."""
    packed = packed.to(model.score.weight.device)
    return model.scores(model(packed.ids_N, packed.cu_seqlens_B1, parent_B=packed.parent_B)[packed.last_M])


@torch.no_grad()
def score(
    model: RewardModel,
    tokenizer: Tokenizer,
    prompt_ids_B: list[list[int]],
    answers_B: list[str],
    tokens_per_batch: int,
) -> list[float]:
    """The score of each response behind its prompt; of the response only the final part counts (see `final_part`).

    `tokenizer` is the reward model's and the one of the prompts' ids. A sequence that is longer than the model's
    context scores nan. Give the completions of a prompt as neighbours: they then share it.
    """
    answer_ids_B = [_answer_ids(text, tokenizer) for text in answers_B]
    sequences = list(zip(prompt_ids_B, answer_ids_B, strict=True))
    fits_B = [sum(map(len, sequence)) <= model.config.max_position_embeddings for sequence in sequences]
    batches = in_batches([s for s, fits in zip(sequences, fits_B, strict=True) if fits], _n_new, tokens_per_batch)
    scores = iter([x for batch in batches for x in packed_scores(model, pack(batch)).tolist()])
    return [next(scores) if fits else math.nan for fits in fits_B]


def _n_new(item: Answered, before: Answered | None) -> int:
    prompt_ids, answer_ids = item
    return len(answer_ids) + (0 if before is not None and before[0] == prompt_ids else len(prompt_ids))


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
    workers: Workers, pairs: list[Pair], tokens_per_batch: int, center_coef: float = 0.0, loss_scale: float = 1.0
) -> PairTerms:
    """Add the gradient of one update, of the mean loss over `pairs`, to the parameters, however they are split.

    It is multiplied by `loss_scale` (see nanor1/optim.py).
    """

    def backward(model: RewardModel, batch: list[Pair]) -> list[float]:
        loss, sums = _loss_and_sums(model, batch, center_coef)
        (loss_scale * loss / len(pairs)).backward()
        return sums

    sums = workers.map(backward, _batches(pairs, tokens_per_batch))
    workers.gather_gradients()
    return _terms(len(pairs), sums)


def evaluate_pairs(workers: Workers, pairs: list[Pair], tokens_per_batch: int) -> PairTerms:
    """The same of held-out pairs, without gradient and centring."""

    @torch.no_grad()  # here: it holds for the calling thread alone
    def forward(model: RewardModel, batch: list[Pair]) -> list[float]:
        return _loss_and_sums(model, batch, center_coef=0.0)[1]

    return _terms(len(pairs), workers.map(forward, _batches(pairs, tokens_per_batch)))


def _batches(pairs: list[Pair], tokens_per_batch: int) -> list[list[Pair]]:
    """Longest first: the first batch is the most demanding, so a run that does not fit in memory fails at once."""
    by_length = sorted(pairs, key=lambda pair: -pair.n_tokens)
    return in_batches(by_length, lambda pair, _: pair.n_tokens, tokens_per_batch)


def _loss_and_sums(model: RewardModel, pairs: list[Pair], center_coef: float) -> tuple[Tensor, list[float]]:
    """The sum of the pairs' losses; and sums of n_right, loss, difference, score, n_tokens, flops."""
    packed = pack([(pair.prompt_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)])
    score_P2 = packed_scores(model, packed).view(-1, 2)
    margin_P = torch.tensor([pair.margin for pair in pairs], device=score_P2.device)
    loss = pair_loss(score_P2, margin_P, center_coef).sum()
    score_P2 = score_P2.detach()
    difference_P = score_P2[:, 0] - score_P2[:, 1]
    n_right = (difference_P.sign() + 1).sum() / 2
    sums = torch.stack([n_right, loss.detach(), difference_P.sum(), score_P2.mean(1).sum()]).tolist()
    n_tokens = len(packed.ids_N)
    flops = model.training_flops(n_tokens, attended_pairs(packed.cu_seqlens_B1, packed.parent_B), n_targets=0)
    return loss, [*sums, n_tokens, flops]


def _terms(n: int, sums: list[list[float]]) -> PairTerms:
    n_right, loss, difference, score, n_tokens, flops = map(sum, zip(*sums, strict=True))
    return PairTerms(n, n_right, loss / n, difference / n, score / n, n_tokens, flops)
