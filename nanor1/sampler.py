"""KV-cache generation for many ragged requests at once.

A request is one completion of one prompt. Requests wait in line for a slot of the cache (continuous batching); all that
have one advance by a token a step. A finished request frees its slot for the next in line. A prompt is prefilled once,
through the packed forward of training; its keys and values are copied to each of its n slots. What all prompts of a
call begin with, such as worked examples, is read once (prefill.py).

On a GPU the step is captured in CUDA graphs, one for each of a few numbers of rows, and replayed several times between
looks at which requests have finished; the answer to a look is read while the next steps run. A graph works on fixed
memory: the slots, and a list of which of them to advance. On a CPU a step looks at its rows at once, and the last
active rows are moved into the places of finished ones, so that the active rows are always the first: attention then
reads a plain slice of the cache, and a finished row costs nothing (but a step has a multiple of 8 rows, up to 7 of them
idle, since matrix products take that faster).

The randomness of a token depends on its prompt's seed (or the one seed and the prompt's index), the completion's index
and the position alone, so a request draws the same numbers whichever slot or batch it runs in. The logits may still
differ in their last bits with the shape of the batch (floating-point sums are not associative), and a draw that falls
between the two then gives another token.

A call may keep the caches of its completions, and a later one continue them without reading their tokens again: what
search over steps is made of (search.py).

Left out: paged caches, sharing a prompt's cache between slots (copies are read as fast up to some hundred tokens).

Letters: P prompts, R requests, S slots, B rows of a step, F finished rows, L new tokens, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nanor1.draw import request_key
from nanor1.machine import free_memory
from nanor1.model import KVCache, Transformer
from nanor1.prefill import Taken, prefill, read_beginning
from nanor1.slots import Kept, Look, Sampling, Slots, Step, slots_that_fit

PREFILL_TOKENS = 16_384  # prompts are prefilled in batches whose cache holds at most this many, or one prompt
ROOM_STEP = 128  # tokens: slots have room for a multiple, so that a conversation does not need new ones at each turn
STEPS_A_LOOK = 16  # on a GPU: decode steps between looks at which requests have finished
GRAPH_ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # and the number of slots itself


@dataclass(frozen=True)
class Completion:
    """One sampled answer: its token ids, their log-probabilities, and why it ended."""

    ids: list[int]  # the stop token included
    logprobs: list[float]  # at the sampling temperature, before top-k and top-p; those of temperature 1 when greedy
    finish: str  # "stop" or "length"
    confidences: list[float] | None = None  # of its tokens, where they were asked for (see draw.token_confidence)


def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], *, max_rows: int = 512, **arguments
) -> list[list[Completion]]:
    """Sample completions of prompts with a new `Sampler`, whose `generate` says which arguments there are.

    A Sampler that is kept is quicker from its second call on.
    """
    return Sampler(model, max_rows).generate(prompts, **arguments)


@dataclass
class Results:
    """What has been generated, by request."""

    ids_RL: Tensor
    logp_RL: Tensor
    confidence_RL: Tensor
    length_R: Tensor
    is_stopped_R: Tensor

    def take(self, slots: Slots, slot_F: Tensor, request_F: Tensor) -> None:
        self.ids_RL[request_F], self.logp_RL[request_F] = slots.ids[slot_F, :-1], slots.logp[slot_F, :-1]
        self.confidence_RL[request_F] = slots.confidence[slot_F, :-1]
        self.length_R[request_F], self.is_stopped_R[request_F] = slots.n_new[slot_F], slots.is_stopped[slot_F]

    def completions(self, n: int, has_confidences: bool) -> list[list[Completion]]:
        is_nan_R = self.logp_RL.isnan().any(-1)
        if is_nan_R.any():
            prompt = int(is_nan_R.nonzero()[0]) // n
            raise ValueError(f"the model's logits after prompt {prompt} are not numbers: look for nan in its weights")
        columns = (getattr(self, field.name).tolist() for field in fields(self))
        flat = [
            Completion(
                ids[:length],
                logp[:length],
                "stop" if is_stopped else "length",
                confidence[:length] if has_confidences else None,
            )
            for ids, logp, confidence, length, is_stopped in zip(*columns, strict=True)
        ]
        return [flat[i : i + n] for i in range(0, len(flat), n)]


class Sampler:
    """Samples from one model; keeps its cache, and on a GPU its captured steps, from call to call.

    At most `max_rows` requests run at once, fewer where their cache would take more than `memory_share` of the memory
    that is free. The model's weights may change between calls, in place. `is_stepwise` (None: on CUDA) says whether
    fixed steps over a list of slots are repeated, or the active rows are kept the first ones.
    """

    def __init__(
        self, model: Transformer, max_rows: int = 512, memory_share: float = 0.8, is_stepwise: bool | None = None
    ):
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; at least one row is needed")
        self.model, self.max_rows, self.memory_share = model, max_rows, memory_share
        self.device = model.head_weight_VC.device
        self.slots: Slots | None = None
        self.kept: Kept | None = None
        self.n_wanted = 0  # slots that were asked for, when these were made
        self.is_stepwise = self.device.type == "cuda" if is_stepwise is None else is_stepwise
        self.steps: dict[tuple[int, Sampling], Step] = {}

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
        confidence_k: int = 0,
        keep: bool = False,
        continues: Sequence[tuple[int, int] | None] | None = None,
    ) -> list[list[Completion]]:
        """Sample n completions of each prompt; returns one inner list a prompt, n long.

        A completion ends with a token of `stop_ids`, or when its text holds one of `stop_texts` (`decode` turns ids
        into text): finish "stop"; or after `max_new_tokens` (one number, or one a prompt), or at the end of the model's
        context: finish "length". Temperature 0 is greedy. `top_k` 0 and `top_p` 1 leave all tokens; ids at or above
        `vocab_size` are never sampled. `seed` is one number, or one a prompt, with which a prompt draws the same
        wherever it stands in the list. `on_token(prompt, completion, id)` hears of each token as it is made. With
        `confidence_k` completions have confidences, over so many likeliest tokens.

        `keep` keeps the caches of all completions until the next call that keeps, or `release`; the model's weights
        must stay as they are. `continues` then says of each prompt which completion (prompt, index) of that call it
        continues, None: none; it takes over the cache of the ids that they begin with alike.

        Raises ValueError for an empty prompt, one that leaves no room to answer, and where the cache of a single
        request exceeds the memory.
        """
        seeds = [request_key(seed, p) for p in range(len(prompts))] if isinstance(seed, int) else list(seed)
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        limits = _check_requests(self.model, prompts, n, limits, seeds)
        _check_sampling(temperature, top_k, top_p, stop_texts, decode)
        if not prompts:
            return []
        sampling = Sampling(temperature, top_k, top_p, tuple(stop_ids), vocab_size, confidence_k)
        with torch.inference_mode():
            self._reserve(len(prompts) * n, max(map(len, prompts)), max(limits))
            run = _Run(self, prompts, n, limits, seeds, sampling)
            run.take_over(self.kept, continues)
            if keep:
                run.keep(max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)))
            run.listen(on_token, stop_texts, decode)
            while run.n_waiting or run.request_of:
                run.admit() if run.should_admit() else run.decode()
                run.look()
        completions_PG = run.results.completions(n, confidence_k > 0)
        if keep:
            run.kept.ids_R = [[*ids, *made.ids] for ids, g in zip(prompts, completions_PG, strict=True) for made in g]
            self.kept = run.kept
        return completions_PG

    def release(self) -> None:
        """Give back the memory of the caches that were kept."""
        self.kept = None

    def _reserve(self, n_requests: int, n_prompt: int, n_new: int) -> None:
        """Make slots for requests of so many tokens, if those there are do not suffice."""
        room = min(self.model.config.max_position_embeddings, n_prompt + n_new)
        wanted, slots = min(self.max_rows, n_requests), self.slots
        if slots and self.n_wanted >= wanted and slots.room >= room and slots.n_new_tokens >= n_new:
            return  # also where memory held fewer than were wanted: it would again
        if slots:  # no smaller in any way, so that calls of changing sizes settle
            wanted, room = max(wanted, self.n_wanted), max(room, slots.room)
            n_new = max(n_new, slots.n_new_tokens)
        room = min(self.model.config.max_position_embeddings, -(-room // ROOM_STEP) * ROOM_STEP)
        self.steps, self.slots, slots, self.n_wanted = {}, None, None, wanted
        budget = int(free_memory(self.device) * self.memory_share)
        self.slots = Slots(self.model, slots_that_fit(self.model, room, wanted, budget), room, n_new)

    def step(self, n_rows: int, sampling: Sampling) -> Step:
        """The repeatable step over at least `n_rows` slots."""
        sizes = [size for size in GRAPH_ROWS if size < self.slots.n_slots] + [self.slots.n_slots]
        size = next(size for size in sizes if size >= n_rows)
        if (size, sampling) not in self.steps:
            self.steps[size, sampling] = Step(self.model, self.slots, size, sampling)
        return self.steps[size, sampling]


class _Run:
    """One call of generate: the requests that wait, those that run, and what has been generated."""

    def __init__(self, sampler: Sampler, prompts, n: int, limits: list[int], seeds: list[int], sampling: Sampling):
        self.sampler, self.model, self.slots = sampler, sampler.model, sampler.slots
        self.prompts, self.n, self.sampling, self.device = prompts, n, sampling, sampler.device
        self.n_requests, self.n_admitted = len(prompts) * n, 0
        self.n_slots = min(self.slots.n_slots, sampler.max_rows, self.n_requests)
        self.prefilled_requests = range(
            0
        )  # those whose prompts' caches and last logits are held, to be copied to slots
        self.request_of: dict[int, int] = {}  # slot -> request, of the active ones
        self.looks: deque = deque()
        self.start_R = self._index(map(len, prompts)).repeat_interleave(n)
        self.limit_R = self._index(limits).repeat_interleave(n)
        self.key_R = self._index(request_key(seed, g) for seed in seeds for g in range(n))
        ids_RL = torch.zeros(self.n_requests, self.slots.n_new_tokens, dtype=torch.int32, device=self.device)
        logp_RL, confidence_RL = ids_RL.float(), ids_RL.float()
        stopped_R = torch.zeros(self.n_requests, dtype=torch.bool, device=self.device)
        self.results = Results(ids_RL, logp_RL, confidence_RL, self.start_R * 0, stopped_R)
        self.kept: Kept | None = None
        self.slots.is_running.fill_(False)
        self.slots.position.zero_()

    def take_over(self, kept: Kept | None, continues: Sequence[tuple[int, int] | None] | None) -> None:
        """What need not be read of each prompt: the completion it continues, or what all others begin with."""
        self.taken_P: list[Taken | None] = [None] * len(self.prompts)
        if continues is None:
            continues = self.taken_P
        elif kept is None or len(continues) != len(self.prompts):
            raise ValueError(
                f"continues has {len(continues)} entries for {len(self.prompts)} prompts, and the last call kept "
                f"{'nothing' if kept is None else 'its caches'}; give one entry a prompt after a call with keep=True"
            )
        for p, (prompt, continued) in enumerate(zip(self.prompts, continues, strict=True)):
            if continued is not None:
                row = kept.row_of(*continued)
                self.taken_P[p] = Taken(kept.cache, row, kept.n_shared(row, prompt))
        new = [p for p, taken in enumerate(self.taken_P) if taken is None]
        beginning = read_beginning(self.model, [self.prompts[p] for p in new])
        for p in new:
            self.taken_P[p] = beginning

    def keep(self, room: int) -> None:
        """Have the caches of all requests, of up to `room` tokens, kept."""
        self.kept = Kept(KVCache.of(self.model, self.n_requests, room), self.n)

    def listen(self, on_token, stop_texts: Sequence[str], decode_text) -> None:
        """What the host has to see after each step; if nothing, a stepwise sampler looks less often, and later."""
        self.on_token, self.stop_texts, self.decode_text = on_token, stop_texts, decode_text
        is_late = self.sampler.is_stepwise and not (on_token or stop_texts)
        self.steps_a_look, self.looks_late = (STEPS_A_LOOK, 1) if is_late else (1, 0)

    @property
    def n_waiting(self) -> int:
        return self.n_requests - self.n_admitted

    @property
    def n_free(self) -> int:
        """Slots that are free and wanted."""
        return min(self.n_slots - len(self.request_of), self.n_waiting)

    def should_admit(self) -> bool:
        """Refill when an eighth of the slots is free, so that prompts are prefilled several at a time."""
        return self.n_free > 0 and self.n_free >= min(-(-self.n_slots // 8), self.n_waiting)

    def admit(self) -> None:
        """Give free slots to the next requests, and draw their first tokens."""
        if self.n_admitted >= self.prefilled_requests.stop:
            self._prefill()
        requests = range(self.n_admitted, min(self.n_admitted + self.n_free, self.prefilled_requests.stop))
        free = (slot for slot in range(self.n_slots) if slot not in self.request_of)
        placed = dict(zip(free, requests, strict=False))
        slot_B, request_B = self._index(placed.keys()), self._index(placed.values())
        source_B = (request_B - self.prefilled_requests.start) // self.n
        length = self.prefilled_cache.k[0].shape[2]
        self.slots.cache.copy_rows(self.prefilled_cache, source_B, slot_B, length)
        self.slots.start(slot_B, self.start_R[request_B], self.limit_R[request_B], self.key_R[request_B])
        self.slots.record(slot_B, self.prefilled_logits[source_B], self.sampling)
        self.request_of |= placed
        self.n_admitted = requests.stop
        self._hear(placed)

    def _prefill(self) -> None:
        """Read the next prompts, as many as free slots will want and the budget allows; the cache is a rectangle."""
        start = self.n_admitted // self.n
        stop, longest = start + 1, len(self.prompts[start])
        while (stop - start) * self.n < self.n_free:
            longest = max(longest, len(self.prompts[stop]))
            if longest * (stop + 1 - start) > PREFILL_TOKENS:
                break
            stop += 1
        self.prefilled_requests = range(start * self.n, stop * self.n)
        self.prefilled_cache, hidden_BC = prefill(self.model, self.prompts[start:stop], self.taken_P[start:stop])
        self.prefilled_logits = self.model.logits(hidden_BC)

    def decode(self) -> None:
        """Advance every active slot by a token, or by several where nobody looks in between."""
        n_rows = len(self.request_of)
        if self.sampler.is_stepwise:
            self.sampler.step(n_rows, self.sampling)(self._index(self.request_of), self.steps_a_look)
        else:
            max_len = int(self.slots.position[:n_rows].max()) + 1
            n_rows = n_rows if n_rows <= 4 else min(-(-n_rows // 8) * 8, self.slots.n_slots + 1)  # see model.linear
            self.slots.decode(self.model, slice(n_rows), max_len, self.sampling)
        self._hear(self.request_of)

    def _hear(self, request_of: dict[int, int]) -> None:
        """Pass on the token that each of these slots has just made, and close those that hold a stop text."""
        if self.on_token:
            tokens = self.slots.token[self._index(request_of)].tolist()
            for request, token in zip(request_of.values(), tokens, strict=True):
                self.on_token(request // self.n, request % self.n, token)
        if self.stop_texts:
            slot_F = self._index(self._slots_with_text(list(request_of)))
            self.slots.is_stopped[slot_F], self.slots.is_running[slot_F] = True, False

    def _slots_with_text(self, slots: list[int]) -> list[int]:
        """Those whose last tokens, as many as a text can be made of, hold one of the texts."""
        n_tail = max(len(text.encode()) for text in self.stop_texts) + 4  # a byte a token or more; 4: a cut character
        slot_B1 = self._index(slots)[:, None]
        column_BT = self.slots.n_new[slot_B1] - n_tail + torch.arange(n_tail, device=self.device)
        ids_BT, n_before_B = self.slots.ids[slot_B1, column_BT.clamp(min=0)], (column_BT < 0).sum(-1)
        tails = (self.decode_text(ids[n:]) for ids, n in zip(ids_BT.tolist(), n_before_B.tolist(), strict=True))
        return [slot for slot, tail in zip(slots, tails, strict=True) if any(text in tail for text in self.stop_texts)]

    def look(self) -> None:
        """Retire what has finished: now, or as it was one look ago, which has arrived while the next steps ran."""
        self.looks.append(Look(dict(self.request_of), self.slots.is_running))
        if len(self.looks) > self.looks_late:
            self.retire(self.looks.popleft().finished())

    def retire(self, finished: dict[int, int]) -> None:
        """Keep what finished slots have made and free them; those who have another request by now are left alone."""
        finished = {slot: request for slot, request in finished.items() if self.request_of.get(slot) == request}
        if not finished:
            return
        slot_F, request_F = self._index(finished.keys()), self._index(finished.values())
        self.results.take(self.slots, slot_F, request_F)
        if self.kept:
            self.kept.cache.copy_rows(self.slots.cache, slot_F, request_F, int(self.slots.position[slot_F].max()))
        for slot in finished:
            del self.request_of[slot]
        if not self.sampler.is_stepwise:
            self._move_to_front()

    def _move_to_front(self) -> None:
        """Move the last active rows into the places of finished ones."""
        n_active = len(self.request_of)
        holes = [slot for slot in range(n_active) if slot not in self.request_of]
        movers = [slot for slot in self.request_of if slot >= n_active]
        if holes:
            self.slots.move(self._index(movers), self._index(holes))
        for hole, mover in zip(holes, movers, strict=True):
            self.request_of[hole] = self.request_of.pop(mover)
        self.request_of = dict(sorted(self.request_of.items()))
        self.slots.position[n_active:] = 0

    def _index(self, numbers: Iterable[int]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64, device=self.device)


def _check_requests(model: Transformer, prompts, n: int, limits: list[int], seeds: list[int]) -> list[int]:
    """The most new tokens of each prompt, cut at the end of the model's context."""
    context = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; a prompt needs at least one token")
        if len(prompt) >= context:
            raise ValueError(
                f"prompt {i} is {len(prompt)} tokens; the model's context is {context}: shorten the prompt"
            )
    for name, values in (("seeds", seeds), ("limits of max_new_tokens", limits)):
        if len(values) != len(prompts):
            raise ValueError(f"{len(values)} {name} for {len(prompts)} prompts; give one number, or one a prompt")
    if min(n, *limits, 1) < 1:
        raise ValueError(f"n {n}, max_new_tokens {min(limits, default=1)}: each must be at least 1")
    return [min(limit, context - len(prompt)) for prompt, limit in zip(prompts, limits, strict=True)]


def _check_sampling(temperature: float, top_k: int, top_p: float, stop_texts, decode) -> None:
    if not (0 <= temperature < float("inf") and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: want >= 0, >= 0 and in (0, 1]")
    if isinstance(stop_texts, str) or "" in stop_texts:
        raise ValueError(f"stop_texts is {stop_texts!r}; it must be a list of texts of at least one character")
    if stop_texts and decode is None:
        raise ValueError("stop_texts need decode, the tokenizer's way from ids to text")
