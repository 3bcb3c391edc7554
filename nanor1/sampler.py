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

A completion may keep its cache, and a later prompt that begins with its tokens go on from there. Searches, and whatever
else asks for one thing after another, are sessions: generators that yield prompts and are sent completions (`run`).

Left out: paged caches, sharing a prompt's cache between slots (copies are read as fast up to some hundred tokens).

Letters: P prompts, R requests, S slots, B rows of a step, F finished rows, L new tokens, V vocabulary.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from nanor1.draw import request_key
from nanor1.machine import free_memory
from nanor1.model import KVCache, Transformer
from nanor1.prefill import Kept, prefill, read_beginning, take_over
from nanor1.slots import Look, Sampling, Slots, Step, slots_that_fit

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
    kept: Kept | None = field(default=None, repr=False, compare=False)  # the cache of its prompt and it, if asked for


@dataclass(frozen=True)
class Prompt:
    """What is to be completed n times."""

    ids: Sequence[int]
    n: int
    max_new_tokens: int
    seed: int
    behind: Kept | None = None  # what it begins with, as far as it does, is not read again


Result = TypeVar("Result")
# Yields prompts and is sent their completions, until it returns a result.
Session = Generator[list[Prompt], list[list[Completion]], Result]


def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], *, max_rows: int = 512, **arguments
) -> list[list[Completion]]:
    """Sample completions of prompts with a new `Sampler`, whose `generate` says which arguments there are.

    A Sampler that is kept is quicker from its second call on.
    """
    return Sampler(model, max_rows).generate(prompts, **arguments)


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
        behind: Sequence[Kept | None] | None = None,
    ) -> list[list[Completion]]:
        """Sample n completions of each prompt; returns one inner list a prompt, n long.

        A completion ends with a token of `stop_ids`, or when its text holds one of `stop_texts` (`decode` turns ids
        into text): finish "stop"; or after `max_new_tokens` (one number, or one a prompt), or at the end of the model's
        context: finish "length". Temperature 0 is greedy. `top_k` 0 and `top_p` 1 leave all tokens; ids at or above
        `vocab_size` are never sampled. `seed` is one number, or one a prompt, with which a prompt draws the same
        wherever it stands in the list. `on_token(prompt, completion, id)` hears of each token as it is made. With
        `confidence_k` completions have confidences, over so many likeliest tokens.

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
        run = _Run(self, sampling, keep, on_token, stop_texts, decode)
        with torch.inference_mode():
            run.prepare(asked)
            requests_P = run.add(asked)
            while run.is_busy:
                run.advance()
            made = run.collect()
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
        on_token: Callable[[int, int, int], None] | None = None,
    ) -> list[Result]:
        """Complete what sessions ask for, one thing after another, and return what each comes to in the end.

        A session is a generator that yields prompts, and is sent their completions, with their caches, when all of them
        are there. Sessions do not wait for each other: the slots that one leaves free are another's. New ones begin
        where slots would stand empty, while fewer than two waves of requests are under way, for their caches take
        memory. Arguments and errors are those of `generate`; `on_token` hears 0 for the prompt and the completion.
        """
        _check_sampling(temperature, top_k, top_p, stop_texts, decode)
        sampling = Sampling(temperature, top_k, top_p, tuple(stop_ids), vocab_size)
        hear = (lambda _, __, token: on_token(0, 0, token)) if on_token else None
        with torch.inference_mode():
            return _Sessions(sessions, _Run(self, sampling, True, hear, stop_texts, decode)).finish()

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
    """The requests that wait, those that run, and what has been generated; prompts may be added at any time."""

    def __init__(self, sampler: Sampler, sampling: Sampling, keep: bool, on_token, stop_texts: Sequence[str], decode):
        self.sampler, self.model, self.device, self.sampling = sampler, sampler.model, sampler.device, sampling
        self.keep, self.on_token, self.stop_texts, self.decode_text = keep, on_token, stop_texts, decode
        # what the host has to see after each step; if nothing, a stepwise sampler looks less often, and later
        is_late = sampler.is_stepwise and not (on_token or stop_texts)
        self.steps_a_look, self.looks_late = (STEPS_A_LOOK, 1) if is_late else (1, 0)
        self.prompts: list[Prompt] = []
        self.first_P: list[int] = []  # the first request of each prompt; its others follow
        self.prompt_of: list[int] = []  # of each request
        self.n_admitted = 0
        self.beginning: Kept | None = None
        self.prefilled = range(0)  # the requests whose prompts' caches and last logits are held, to be copied to slots
        self.request_of: dict[int, int] = {}  # slot -> request, of the active ones
        self.looks: deque = deque()
        self.harvests: list[_Harvest] = []

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Make slots for prompts that will be added, and read what all of them begin with."""
        check_prompts(self.model, prompts)
        if not prompts:
            return
        self._reserve(sum(prompt.n for prompt in prompts), prompts)
        self.beginning = read_beginning(self.model, [prompt.ids for prompt in prompts if prompt.behind is None])

    def _reserve(self, n_requests: int, prompts: Sequence[Prompt]) -> None:
        n_prompt, n_new = max(len(p.ids) for p in prompts), max(n_new_tokens(self.model, p) for p in prompts)
        self.sampler._reserve(n_requests, n_prompt, n_new)
        self.slots = self.sampler.slots
        self.n_slots = min(self.slots.n_slots, self.sampler.max_rows, n_requests)
        self.slots.is_running.fill_(False)
        self.slots.position.zero_()

    def add(self, prompts: Sequence[Prompt]) -> list[range]:
        """Have prompts completed; returns the requests of each."""
        check_prompts(self.model, prompts)
        requests_P = []
        for prompt in prompts:
            self.first_P.append(len(self.prompt_of))
            self.prompt_of += [len(self.prompts)] * prompt.n
            self.prompts.append(prompt)
            requests_P.append(range(self.first_P[-1], len(self.prompt_of)))
        return requests_P

    @property
    def is_busy(self) -> bool:
        return bool(self.n_waiting or self.request_of)

    def advance(self) -> None:
        self.admit() if self.should_admit() else self.decode()
        self.look()

    @property
    def n_waiting(self) -> int:
        return len(self.prompt_of) - self.n_admitted

    @property
    def n_free(self) -> int:
        """Slots that are free and wanted."""
        return min(self.n_slots - len(self.request_of), self.n_waiting)

    def should_admit(self) -> bool:
        """Refill when an eighth of the slots is free, so that prompts are prefilled several at a time."""
        if not self.n_free or self.n_free < min(-(-self.n_slots // 8), self.n_waiting):
            return False
        prompt = self.prompts[self.prompt_of[self.n_admitted]]
        if not self._fits(prompt):
            if self.request_of:  # larger slots are made when these are empty
                return False
            self._reserve(self.n_slots, [prompt])
        return True

    def _fits(self, prompt: Prompt) -> bool:
        n_new = n_new_tokens(self.model, prompt)
        return len(prompt.ids) + n_new <= self.slots.room and n_new <= self.slots.n_new_tokens

    def admit(self) -> None:
        """Give free slots to the next requests, and draw the first tokens of those whose prompts were read."""
        if self.n_admitted >= self.prefilled.stop:
            self._prefill()
        requests = range(self.n_admitted, min(self.n_admitted + self.n_free, self.prefilled.stop))
        free = (slot for slot in range(self.n_slots) if slot not in self.request_of)
        placed, numbers = dict(zip(free, requests, strict=False)), [self.prompt_of[request] for request in requests]
        prompts, slot_B = [self.prompts[p] for p in numbers], self._index(placed)
        keys = [request_key(p.seed, r - self.first_P[i]) for r, i, p in zip(requests, numbers, prompts, strict=True)]
        source_B = self._index(p - self.prompt_of[self.prefilled.start] for p in numbers)
        self.slots.cache.copy_rows(self.prefilled_cache, source_B, slot_B, self.prefilled_cache.k[0].shape[2])
        is_read = self.prefilled_logits is not None
        self.slots.start(
            slot_B,
            self._index(prompt.ids[-1] for prompt in prompts),
            self._index(len(prompt.ids) - (not is_read) for prompt in prompts),
            self._index(n_new_tokens(self.model, prompt) for prompt in prompts),
            self._index(keys),
        )
        self.request_of |= placed
        self.n_admitted = requests.stop
        if is_read:
            self.slots.record(slot_B, self.prefilled_logits[source_B], self.sampling)
            self._hear(placed)

    def _prefill(self) -> None:
        """Read the next prompts, as many as free slots will want and the budget allows; the cache is a rectangle.

        Those of which all but the last token is kept are not read: the next step takes that token.
        """
        start = stop = self.prompt_of[self.n_admitted]
        longest, n_requests, is_kept = 0, 0, self._is_kept(self.prompts[start])
        while stop < len(self.prompts) and n_requests < self.n_free:
            prompt = self.prompts[stop]
            longest = max(longest, len(prompt.ids))
            is_too_much = stop > start and longest * (stop + 1 - start) > PREFILL_TOKENS
            if is_too_much or self._is_kept(prompt) != is_kept or not self._fits(prompt):
                break
            n_requests += prompt.n
            stop += 1
        prompts = self.prompts[start:stop]
        self.prefilled = range(self.n_admitted, self.n_admitted + n_requests)
        taken = (
            self.model,
            [prompt.ids for prompt in prompts],
            [prompt.behind or self.beginning for prompt in prompts],
        )
        if is_kept:
            (self.prefilled_cache, _), self.prefilled_logits = take_over(*taken), None
        else:
            self.prefilled_cache, hidden_BC = prefill(*taken)
            self.prefilled_logits = self.model.logits(hidden_BC)
        self.prompts[start:stop] = [replace(prompt, behind=None) for prompt in prompts]  # so their memory is free

    def _is_kept(self, prompt: Prompt) -> bool:
        return prompt.behind is not None and prompt.behind.n_shared(prompt.ids) == len(prompt.ids) - 1

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
                prompt = self.prompt_of[request]
                self.on_token(prompt, request - self.first_P[prompt], token)
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
        slot_F, slots = self._index(finished), self.slots
        cache = None
        if self.keep:
            length = int(slots.position[slot_F].max())
            cache = KVCache.of(self.model, len(finished), length)
            cache.copy_rows(slots.cache, slot_F, self._index(range(len(finished))), length)
        columns_F = [slots.ids[slot_F, :-1], slots.logp[slot_F, :-1], slots.n_new[slot_F], slots.is_stopped[slot_F]]
        if self.sampling.confidence_k:
            columns_F.append(slots.confidence[slot_F, :-1])
        self.harvests.append(_Harvest(list(finished.values()), columns_F, cache))
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

    def collect(self) -> dict[int, Completion]:
        """What was generated since this was last asked, by request."""
        harvests, self.harvests, made = self.harvests, [], {}
        if not harvests:
            return made
        columns = (
            torch.cat(column).tolist() for column in zip(*(harvest.columns_F for harvest in harvests), strict=True)
        )
        places = ((request, h.cache, f) for h in harvests for f, request in enumerate(h.requests))
        for (request, cache, row), ids, logp, n, is_stopped, *confidence in zip(places, *columns, strict=True):
            ids, logp, number = ids[:n], logp[:n], self.prompt_of[request]
            if any(map(math.isnan, logp)):
                raise ValueError(
                    f"the model's logits after prompt {number} are not numbers: look for nan in its weights"
                )
            kept = Kept(cache, row, [*self.prompts[number].ids, *ids[:-1]]) if cache else None
            finish, confidences = "stop" if is_stopped else "length", confidence[0][:n] if confidence else None
            made[request] = Completion(ids, logp, finish, confidences, kept)
        return made

    def _index(self, numbers: Iterable[int]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64, device=self.device)


class _Harvest(NamedTuple):
    """What some requests have generated, still on the device."""

    requests: list[int]
    columns_F: list[
        Tensor
    ]  # ids [F, L], log-probabilities, lengths, whether a stop ended them; confidences if asked for
    cache: KVCache | None


class _Sessions:
    """Sessions that share a run: which of them wait, which live, and what they came to."""

    def __init__(self, sessions: Sequence[Session], run: _Run):
        self.sessions, self.run, self.results = sessions, run, [None] * len(sessions)
        asked = {i: self.send(i, None) for i in range(len(sessions))}
        self.waiting = deque((i, prompts) for i, prompts in asked.items() if prompts)
        self.live: dict[int, list[range]] = {}  # the requests of what each one has asked for
        self.owner: dict[int, int] = {}  # of each of these that is not there yet
        self.made: dict[int, Completion] = {}
        run.prepare([prompt for _, prompts in self.waiting for prompt in prompts])

    def send(self, i: int, made: list[list[Completion]] | None) -> list[Prompt]:
        """What a session asks for next; nothing when it has ended."""
        try:
            return self.sessions[i].send(made)
        except StopIteration as end:
            self.results[i] = end.value
            return []

    def finish(self) -> list:
        while self.waiting or self.live:
            self.begin()
            self.run.advance()
            made = self.run.collect()
            self.made |= made
            owners = [self.owner.pop(request) for request in made]
            waited_for = set(self.owner.values()) if owners else set()
            for i in sorted(set(owners) - waited_for):
                self.go_on(i)
        return self.results

    def begin(self) -> None:
        """Let sessions begin while slots are free that nothing waits for."""
        while self.waiting and self.run.n_slots - len(self.run.request_of) > self.run.n_waiting:
            n_under_way = sum(len(requests) for requests_P in self.live.values() for requests in requests_P)
            if self.live and n_under_way + sum(prompt.n for prompt in self.waiting[0][1]) > 2 * self.run.n_slots:
                return
            self.ask(*self.waiting.popleft())

    def ask(self, i: int, prompts: list[Prompt]) -> None:
        self.live[i] = self.run.add(prompts)
        self.owner |= {request: i for requests in self.live[i] for request in requests}

    def go_on(self, i: int) -> None:
        """Send a session what it asked for, all of which is there."""
        made_PG = [[self.made.pop(request) for request in requests] for requests in self.live.pop(i)]
        if prompts := self.send(i, made_PG):
            self.ask(i, prompts)


def check_prompts(model: Transformer, prompts: Sequence[Prompt]) -> None:
    context = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not len(prompt.ids):
            raise ValueError(f"prompt {i} is empty; a prompt needs at least one token")
        if len(prompt.ids) >= context:
            raise ValueError(
                f"prompt {i} is {len(prompt.ids)} tokens; the model's context is {context}: shorten the prompt"
            )
        if min(prompt.n, prompt.max_new_tokens) < 1:
            raise ValueError(f"n {prompt.n}, max_new_tokens {prompt.max_new_tokens}: each must be at least 1")


def n_new_tokens(model: Transformer, prompt: Prompt) -> int:
    """The most new tokens behind a prompt, which the end of the model's context may cut."""
    return min(prompt.max_new_tokens, model.config.max_position_embeddings - len(prompt.ids))


def _check_sampling(temperature: float, top_k: int, top_p: float, stop_texts, decode) -> None:
    if not (0 <= temperature < float("inf") and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: want >= 0, >= 0 and in (0, 1]")
    if isinstance(stop_texts, str) or "" in stop_texts:
        raise ValueError(f"stop_texts is {stop_texts!r}; it must be a list of texts of at least one character")
    if stop_texts and decode is None:
        raise ValueError("stop_texts need decode, the tokenizer's way from ids to text")
