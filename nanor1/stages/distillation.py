"""Distillation: a student learns the distributions of a teacher, on given texts or on its own.

- On texts (`add_gradient`): at each target token the student's distribution S is drawn towards the teacher's T, mixed
  with the ordinary loss of the target. S and T are made for a chunk of tokens at a time, as in nanor1/logprobs.py.
- On the student's own samples (`teacher_advantages`): the teacher says of each sampled token how much likelier it is to
  the teacher than to the student; that number is the token's advantage in the policy loss of nanor1/grpo.py.

Learning from a teacher's answers alone, DeepSeek-R1's distillation (2501.12948, section 2.4), is nanor1/stages/sft.py.

The divergences, in nats, with T and S the softmax of the logits divided by the temperature tau:

    forward   KL(T || S)      covers all that the teacher might say (Hinton, Vinyals and Dean, 1503.02531)
    reverse   KL(S || T)      says nothing that the teacher would not (MiniLLM, 2306.08543)
    jsd       beta KL(T || M) + (1 - beta) KL(S || M)  with  M = beta T + (1 - beta) S

The last is the generalised Jensen-Shannon divergence of GKD (2306.13649, eq. 1, its P the teacher). It is 0 at both
ends of beta; divided by beta it tends to the forward KL as beta -> 0, divided by 1 - beta to the reverse KL as
beta -> 1. At beta = 1/2 it is symmetric and at most log 2.

Their gradients with respect to z, the student's logits divided by tau: with a_v = d / d S_v and d S_u / d z_v =
S_u (1[u = v] - S_v) it is S_v (a_v - sum_u S_u a_u), in which a constant in a_v counts for nothing:

    forward   a_v = -T_v / S_v                    S_v - T_v
    reverse   a_v = log(S_v / T_v) + 1            S_v (log(S_v / T_v) - KL(S || T))
    jsd       a_v = (1 - beta) log(S_v / M_v)     (1 - beta) S_v (log(S_v / M_v) - KL(S || M))

In the last, the terms without a logarithm cancel: (1 - beta) (1 - (beta T_v + (1 - beta) S_v) / M_v) = 0. So it is
(1 - beta) times the gradient of the reverse KL to a fixed M.

A token's loss is hard_weight * nll + (1 - hard_weight) * tau^2 * divergence, nll = -log p(target) at temperature 1.
The gradient with respect to the logits carries one 1 / tau from z = l / tau, and S - T shrinks as 1 / tau too; tau^2
undoes both, so that the mixture means the same at every temperature (1503.02531, section 2.1). What is reported is the
divergence without tau^2.

Left out: teachers of another vocabulary, stored or truncated teacher distributions, the mixing of texts with samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanor1.gradient import Example, Workers, pack_examples
from nanor1.grpo import Rollout, completion_logprobs, to_items
from nanor1.logprobs import BLOCK_BYTES, logit_chunks, loss_of_logits
from nanor1.packing import Batch, pack
from nanor1.stages.sft import text_end, turn_end
from nanor1.tokenizer import Tokenizer

# ---- the teacher's distributions, on given texts


@dataclass(frozen=True)
class DivergenceSettings:
    """Which divergence, and how it is mixed with the loss of the target itself; see the top of this file."""

    vocab_size: int  # ids at or above it have probability 0 in both models
    kind: str = "forward"
    beta: float = 0.5  # of jsd
    temperature: float = 1.0  # of the divergence
    hard_weight: float = 0.0  # of the target's own loss; the divergence gets the rest

    def __post_init__(self):
        assert self.kind in DIVERGENCES and self.temperature > 0 and 0 <= self.hard_weight <= 1, self
        if not 0 < self.beta < 1:
            raise ValueError(f"beta is {self.beta}, where jsd is 0; choose between 0 and 1, or forward or reverse")


def divergence_loss(
    student_MC: Tensor,
    student_weight_VC: Tensor,
    teacher_MC: Tensor,
    teacher_weight_VC: Tensor,
    target_M: Tensor,
    weight_M: Tensor,
    settings: DivergenceSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of weight * loss of each token, divergence [M], nll [M]); the loss alone carries a gradient, to the student.

    Hidden states and output weights of a model are of one dtype, fp32 or bf16 (or all four are fp64); the arithmetic
    and the results are fp32. The output weights may be padded differently. Two chunks of logits are held at a time. The
    gradient is formed with the loss: a second backward raises RuntimeError, as in `chunked_loss`.
    """
    teacher_chunks = logit_chunks(teacher_MC, teacher_weight_VC, vocab_size=settings.vocab_size)
    dtype = torch.promote_types(student_MC.dtype, torch.float32)
    divergence_M, nll_M = student_MC.new_empty(2, len(student_MC), dtype=dtype)

    def loss_of_chunk(logits: Tensor, at: slice, error: Tensor | None) -> tuple[Tensor, Tensor]:
        teacher_at, teacher_logits = next(teacher_chunks)
        assert at == teacher_at, "the two models' logits are of different dtypes"
        divergence_M[at], nll_M[at] = _chunk(logits, teacher_logits, target_M[at], error, settings)
        loss = torch.lerp(settings.temperature**2 * divergence_M[at], nll_M[at], settings.hard_weight)
        return (weight_M[at] * loss).sum(), weight_M[at]

    loss = loss_of_logits(student_MC, student_weight_VC, loss_of_chunk, vocab_size=settings.vocab_size)
    return loss, divergence_M, nll_M


def _chunk(logits, teacher_logits, target, error: Tensor | None, settings: DivergenceSettings) -> tuple[Tensor, Tensor]:
    """Divergence and nll of the tokens, as many at a time as fit a CPU's cache; their losses' gradient into `error`."""
    V, tau = settings.vocab_size, settings.temperature
    n_rows = max(1, BLOCK_BYTES[logits.device.type] // (V * logits.itemsize))
    divergence, nll = logits.new_empty(2, len(logits))
    for start in range(0, len(logits), n_rows):
        at = slice(start, start + n_rows)
        log_p = logits[at, :V].log_softmax(1)
        log_s = log_p if tau == 1 else (logits[at, :V] / tau).log_softmax(1)
        log_t = (teacher_logits[at, :V] / tau).log_softmax(1)
        divergence[at], gradient = DIVERGENCES[settings.kind](log_s, log_t, settings.beta)
        logp = log_p.gather(1, target[at, None])
        nll[at] = -logp.squeeze(1)
        if error is not None:
            hard_gradient = log_p.exp().scatter_(1, target[at, None], logp.expm1())
            error[at, :V] = torch.lerp(tau * gradient, hard_gradient, settings.hard_weight)
            error[at, V:] = 0
    return divergence, nll


# Each: (divergence [n], its gradient with respect to z [n, V]). In logarithms throughout: where a probability is 0 in
# fp32 its logarithm is still finite, and 0 times it is 0.


def _forward(log_s: Tensor, log_t: Tensor, _: float) -> tuple[Tensor, Tensor]:
    return _kl(log_t, log_s), log_s.exp() - log_t.exp()


def _reverse(log_s: Tensor, log_t: Tensor, _: float) -> tuple[Tensor, Tensor]:
    kl = _kl(log_s, log_t)
    return kl, log_s.exp() * (log_s - log_t - kl[:, None])


def _jensen_shannon(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    from_student, gradient = _reverse(log_s, log_m, beta)
    return beta * _kl(log_t, log_m) + (1 - beta) * from_student, (1 - beta) * gradient


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(1)


DIVERGENCES = {"forward": _forward, "reverse": _reverse, "jsd": _jensen_shannon}


def add_gradient(
    workers: Workers,
    teacher,
    examples: Sequence[Example],
    tokens_per_batch: int,
    settings: DivergenceSettings,
    loss_scale: float = 1.0,
) -> dict[str, float]:
    """Add the gradient of one update to the parameters; returns `loss`, `divergence` and `nll`, means a target token.

    The gradient is multiplied by `loss_scale` (see nanor1/optim.py). All workers read the one teacher, which sees the
    very batches of the student.
    """

    def loss_and_means(model, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher_MC = batch.predictor_states(teacher)
        student_MC, target_M, weight_M = batch.predictor_states(model), batch.target_M, batch.weight_M
        loss, divergence_M, nll_M = divergence_loss(
            student_MC, model.head_weight_VC, teacher_MC, teacher.head_weight_VC, target_M, weight_M, settings
        )
        return loss, torch.stack([loss.detach(), weight_M @ divergence_M, weight_M @ nll_M])

    means = workers.accumulate(pack_examples(examples, tokens_per_batch, loss_scale), loss_and_means)
    loss, divergence, nll = (torch.stack(means).sum(0) / loss_scale).tolist()
    return {"loss": loss, "divergence": divergence, "nll": nll}


# ---- on the student's own samples


@torch.no_grad()
def teacher_advantages(
    teacher, rollouts: list[Rollout], temperature: float, vocab_size: int, tokens_per_batch: int
) -> list[list[float]]:
    """log p_teacher - log p_student of each sampled token, to be given to nanor1.grpo as its advantage.

    The student's log-probability is the sampler's own, the teacher's is taken at the same temperature. With it the
    policy gradient is, in the mean over tokens drawn at a context, minus that of KL(student || teacher) there; a token
    is not credited for the contexts that it leads to (a discount of 0, as Thinking Machines' "On-Policy Distillation",
    2025, has it; GKD, 2306.13649, takes the full divergence at the same contexts).
    """
    advantages: list[list[float]] = [[] for _ in rollouts]
    for batch in pack(to_items(rollouts), tokens_per_batch):
        batch = batch.to(teacher.head_weight_VC.device)
        teacher_logp_M, _ = completion_logprobs(teacher, batch, temperature, vocab_size)
        of_tokens = (teacher_logp_M - batch.sampler_logp_M).tolist()
        for i, advantage in zip(batch.item_M.tolist(), of_tokens, strict=True):
            advantages[i].append(advantage)
    return advantages


def reverse_kl(advantages: list[list[float]]) -> float:
    """The mean over all sampled tokens of log p_student - log p_teacher: estimates KL(student || teacher) a token.

    >>> reverse_kl([[-1.0, 0.5], [-0.25]])
    0.25
    """
    of_tokens = [advantage for of_rollout in advantages for advantage in of_rollout]
    return -sum(of_tokens) / len(of_tokens)


# ---- whether two models can be compared


def check_same_end(student: Tokenizer, teacher: Tokenizer, template: str, why: str) -> None:
    """Raise ValueError unless an answer under this prompt template ends with one token for both.

    The two are compared at that token too: a teacher that ends with another would teach the student to go on. Their
    vocabularies are the same (see `check_same_vocabulary`). `why` opens the message: what needs one end.
    """

    def ends(name: str) -> list[int]:
        return [turn_end(tokenizer) if name == "chat" else text_end(tokenizer) for tokenizer in (student, teacher)]

    mine, theirs = ends(template)
    if mine == theirs:
        return
    same = [name for name in ("chat", "r1-zero") if len({*ends(name)}) == 1]
    remedy = f"give --template {same[0]}, under which they agree, or " if same else "give "
    raise ValueError(
        f"{why}, and under --template {template} the student's answers end with {student.token_text(mine)!r} and the "
        f"teacher's with {teacher.token_text(theirs)!r}, which would teach the student not to end; {remedy}"
        "--method traces"
    )
