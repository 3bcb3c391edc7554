"""KV-cache generation for many ragged requests at once.

A request is one completion of one prompt. Requests wait in line for a slot of the cache (continuous batching); all that
have one advance by a token a step. A finished request frees its slot for the next in line. A prompt is prefilled once,
through the packed forward of training; its keys and values are copied to each of its n slots. What all prompts of a
call begin with, such as worked examples, is read once (prefill.py).

On a GPU the step is captured in CUDA graphs, one for each of a few numbers of rows, and replayed several times between
looks at which requests have finished; the answer to a look is read while the next steps run. A graph works on fixed
memory: the slots, and a list of which of them to advance. On a CPU a step looks at its rows at once, and the last
active rows are moved into the places of finished ones, so that the active rows are always the first: attention then
reads a plain slice of the cache, and a finished row costs nothing. Matrices are multiplied by in a copy that is laid
out for few rows (model.py).

The randomness of a token depends on its prompt's seed (or the one seed and the prompt's index), the completion's index
and the position alone, so a request draws the same numbers whichever slot or batch it runs in. The logits may still
differ in their last bits with the shape of the batch (floating-point sums are not associative), and a draw that falls
between the two then gives another token.

A completion may keep its cache, and a later prompt that begins with its tokens go on from there. Searches, and whatever
else asks for one thing after another, are sessions: generators that yield prompts and are sent completions (`run`).

Left out: paged caches, sharing a prompt's cache between slots (copies are read as fast up to some hundred tokens).

Letters: P prompts.
"""

from collections.abc import Callable, Sequence

import torch

from nanor1.batching import Batch, Completion, Prompt, Result, Session, Sessions
from nanor1.draw import request_key
from nanor1.model import Transformer
from nanor1.prefill import Kept
from nanor1.slots import Sampling, SlotPool

__all__ = ["Completion", "Prompt", "Sampler", "Session", "generate"]


def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], *, max_rows: int = 512, **arguments
) -> list[list[Completion]]:
    """Sample completions of prompts with a new `Sampler`, whose `generate` says which arguments there are.

    A Sampler that is kept is quicker from its second call on.
    """
    return Sampler(model, max_rows).generate(prompts, **arguments)


class Sampler:
    """Samples from one model; keeps its cache, and on a GPU its captured steps, from call to call.

    At most `max_rows` requests run at once; the other arguments are those of SlotPool. The model's weights may change
    between calls, in place.
    """

    def __init__(self, model: Transformer, max_rows: int = 512, **arguments):
        self.model, self.max_rows = model, max_rows
        self.pool = SlotPool(model, max_rows, **arguments)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        max_new_tokens: int | Sequence[int],
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop_ids: Sequence[int] = (),
        stop_texts: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        seed: int | Sequence[int] = 0,
        vocab_size: int | None = None,
        on_token: Callable[[int, int, int], None] | None = None,
        on_progress: Callable[[int, list[int]], None] | None = None,
        confidence_k: int = 0,
        keep: bool = False,
        behind: Sequence[Kept | None] | None = None,
    ) -> list[list[Completion]]:
        """Sample n completions of each prompt; returns one inner list a prompt, n long.

        A completion ends with a token of `stop_ids`, or when its text holds one of `stop_texts` (`decode` turns ids
        into text): finish "stop"; or after `max_new_tokens` (one number, or one a prompt), or at the end of the model's
        context: finish "length". Temperature 0 is greedy. `top_k` 0 and `top_p` 1 leave all tokens; ids at or above
        `vocab_size` are never sampled. `seed` is one number, or one a prompt, with which a prompt draws the same
        wherever it stands in the list. `on_token(prompt, completion, id)` hears of each token as it is made, for which
        a GPU is waited for at each step; `on_progress(n_tokens, lengths)` of how many were made, and how long those are
        that ended, since it was last called. With `confidence_k` completions have confidences, over so many likeliest
        tokens.

        With `keep` completions have their caches, which hold memory as long as they live; the model's weights must stay
        as they are. `behind` has one a prompt (None: none): what a prompt begins with of it is not read again.

        Raises ValueError for an empty prompt, one that leaves no room to answer, and where the cache of a single
        request exceeds the memory.
        """
        P = len(prompts)
        seeds = [request_key(seed, p) for p in range(P)] if isinstance(seed, int) else list(seed)
        limits = [max_new_tokens] * P if isinstance(max_new_tokens, int) else list(max_new_tokens)
        behind = [None] * P if behind is None else list(behind)
        for name, values in (("seeds", seeds), ("limits of max_new_tokens", limits), ("kept caches", behind)):
            if len(values) != P:
                raise ValueError(f"{len(values)} {name} for {P} prompts; give one number, or one a prompt")
        _check_sampling(temperature, top_k, top_p, stop_texts, decode)
        asked = [
            Prompt(ids, n, limit, of_prompt, kept)
            for ids, limit, of_prompt, kept in zip(prompts, limits, seeds, behind, strict=True)
        ]
        sampling = Sampling(temperature, top_k, top_p, tuple(stop_ids), vocab_size, confidence_k)
        texts = dict(stop_texts=stop_texts, decode=decode)
        batch = Batch(self.pool, sampling, keep=keep, on_progress=on_progress, on_token=on_token, **texts)
        with torch.inference_mode():
            self.pool.reorder_weights()
            batch.prepare(asked)
            requests_P = batch.add(asked)
            while batch.is_busy:
                batch.advance()
            made = batch.collect()
            self.pool.rest()
        return [[made[request] for request in requests] for requests in requests_P]

    def run(
        self,
        sessions: Sequence[Session[Result]],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop_ids: Sequence[int] = (),
        stop_texts: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        vocab_size: int | None = None,
        on_progress: Callable[[int, list[int]], None] | None = None,
    ) -> list[Result]:
        """Complete what sessions ask for, one thing after another, and return what each comes to in the end.

        A session is a generator that yields prompts, and is sent their completions, with their caches, when all of them
        are there. Sessions do not wait for each other: the slots that one leaves free are another's. New ones begin
        where slots would stand empty, while fewer than two waves of requests are under way, for their caches take
        memory. Arguments and errors are those of `generate`.
        """
        _check_sampling(temperature, top_k, top_p, stop_texts, decode)
        sampling = Sampling(temperature, top_k, top_p, tuple(stop_ids), vocab_size)
        texts = dict(stop_texts=stop_texts, decode=decode)
        with torch.inference_mode():
            self.pool.reorder_weights()
            batch = Batch(self.pool, sampling, keep=True, on_progress=on_progress, **texts)
            results = Sessions(sessions, batch).finish()
            self.pool.rest()
        return results


def _check_sampling(temperature: float, top_k: int, top_p: float, stop_texts, decode) -> None:
    if not (0 <= temperature < float("inf") and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: want >= 0, >= 0 and in (0, 1]")
    if isinstance(stop_texts, str) or "" in stop_texts:
        raise ValueError(f"stop_texts is {stop_texts!r}; it must be a list of texts of at least one character")
    if stop_texts and decode is None:
        raise ValueError("stop_texts need decode, the tokenizer's way from ids to text")
