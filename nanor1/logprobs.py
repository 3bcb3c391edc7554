"""Log-probabilities and entropy of given tokens, without holding all the logits at once.

With a vocabulary of 150,000 the logits of a training batch are larger than the model. Here they are made a chunk of
tokens at a time, forward and backward: each chunk's logits are dropped after the forward and made again for its
gradient (activation checkpointing, 1604.06174).

Letters: N tokens, C width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_CHUNK_LOGITS = 2**26  # 256 MiB of fp32 at a time


def token_logprobs(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, temperature: float = 1.0, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """log p(target) at the sampling temperature, and the entropy of the whole distribution in nats; both fp32 [N].

    The log-softmax is computed in fp32 whatever the dtype of hidden and weight. Ids at or above `vocab_size` (padding
    of the output matrix) get probability 0, as in the sampler. The entropy is for reporting: it carries no gradient.
    """
    weight_VC = weight_VC[:vocab_size]
    chunk = max(1, MAX_CHUNK_LOGITS // len(weight_VC))
    if len(targets_N) <= chunk:
        return _chunk_logprobs(hidden_NC, weight_VC, targets_N, temperature)
    parts = [
        checkpoint(_chunk_logprobs, hidden, weight_VC, targets, temperature, use_reentrant=False)
        for hidden, targets in zip(hidden_NC.split(chunk), targets_N.split(chunk), strict=True)
    ]
    logp, entropy = zip(*parts, strict=True)
    return torch.cat(logp), torch.cat(entropy)


def _chunk_logprobs(hidden: Tensor, weight_VC: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp_NV = F.log_softmax(F.linear(hidden, weight_VC).float() / temperature, dim=-1)
    with torch.no_grad():
        entropy_N = -(logp_NV.exp() * logp_NV).nan_to_num(0.0).sum(-1)
    return logp_NV.gather(-1, targets[:, None]).squeeze(-1), entropy_N
