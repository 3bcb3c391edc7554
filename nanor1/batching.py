"""Continuous batching: the requests of one call of a sampler, and the sessions that ask for more as they hear of them.

A prompt is completed n times: n requests, which wait in line, get a slot, advance a token a step, and are harvested
when they end. Prompts may be added while others run, which is how sessions go on without waiting for each other.

Letters: P prompts, B rows of a step, F finished rows, L new tokens.
"""

import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from nanor1.draw import request_key
from nanor1.model import KVCache, Transformer
from nanor1.packing import index_tensor
from nanor1.prefill import Kept, prefill, read_beginning, take_over
from nanor1.slots import Look, Sampling, SlotPool

PREFILL_TOKENS = 16_384  # prompts are prefilled in batches whose cache holds at most this many, or one prompt
STEPS_A_LOOK = 4  # on a GPU: decode steps between looks at which requests have finished; it reads the one before


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


class Batch:
    """The requests that wait, those that run, and what has been generated; prompts may be added at any time."""

    def __init__(
        self,
        pool: SlotPool,
        sampling: Sampling,
        *,
        keep: bool,
        stop_texts: Sequence[str],
        decode,
        on_progress,
        on_token=None,
    ):
        self.pool, self.model, self.device, self.sampling = pool, pool.model, pool.device, sampling
        self.index = partial(index_tensor, device=pool.device)
        self.keep, self.stop_texts, self.decode_text = keep, stop_texts, decode
        self.on_token, self.on_progress = on_token, on_progress
        self.may_end_text = lru_cache(maxsize=None)(partial(may_end_text, tuple(stop_texts), decode))
        # what the host has to see after each step; if nothing, a stepwise sampler looks less often, and later
        is_late = pool.is_stepwise and not (on_token or stop_texts)
        self.steps_a_look, self.looks_late = (STEPS_A_LOOK, 1) if is_late else (1, 0)
        self.prompts: list[Prompt] = []
        self.first_P: list[int] = []  # the first request of each prompt; its others follow
        self.prompt_of: list[int] = []  # of each request
        self.n_admitted = 0
        self.beginning: Kept | None = None
        self.prefilled = range(0)  # the requests whose prompts' caches and last logits are held, to be copied to slots
        self.request_of: dict[int, int] = {}  # slot -> request, of the active ones
        self.looks: deque = deque()
        self.n_new_of: dict[int, int] = {}  # request -> tokens made, of the last look that was read
        self.harvests: list[Harvest] = []

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Make slots for prompts that will be added, and read what all of them begin with."""
        check_prompts(self.model, prompts)
        if not prompts:
            return
        self._reserve(sum(prompt.n for prompt in prompts), prompts)
        self.beginning = read_beginning(self.model, [prompt.ids for prompt in prompts if prompt.behind is None])

    def _reserve(self, n_requests: int, prompts: Sequence[Prompt]) -> None:
        n_prompt, n_new = max(len(p.ids) for p in prompts), max(n_new_tokens(self.model, p) for p in prompts)
        self.slots = None  # so that their memory is free before larger ones are made
        self.pool.reserve(n_requests, n_prompt, n_new)
        self.slots = self.pool.slots
        self.n_slots = min(self.slots.n_slots, self.pool.max_rows, n_requests)
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
        prompts, slot_B = [self.prompts[p] for p in numbers], self.index(placed)
        keys = [request_key(p.seed, r - self.first_P[i]) for r, i, p in zip(requests, numbers, prompts, strict=True)]
        source_B = self.index(p - self.prompt_of[self.prefilled.start] for p in numbers)
        self.slots.extend(self.prefilled_cache.max_len)
        self.slots.cache.copy_rows(self.prefilled_cache, source_B, slot_B, self.prefilled_cache.max_len)
        is_read = self.prefilled_logits is not None
        self.slots.start(
            slot_B,
            self.index(prompt.ids[-1] for prompt in prompts),
            self.index(len(prompt.ids) - (not is_read) for prompt in prompts),
            self.index(n_new_tokens(self.model, prompt) for prompt in prompts),
            self.index(keys),
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
        if self.pool.is_stepwise:
            self.pool.step(n_rows, self.sampling)(list(self.request_of), self.steps_a_look)
        else:
            max_len = self.slots.extend(int(self.slots.position[:n_rows].max()) + 1)
            self.slots.decode(self.model, slice(n_rows), max_len, self.sampling)
        self._hear(self.request_of)

    def _hear(self, request_of: dict[int, int]) -> None:
        """Pass on the token that each of these slots has just made, and close those that hold a stop text."""
        if not self.on_token and not self.stop_texts:
            return
        token_of = dict(zip(request_of, self.slots.token[self.index(request_of)].tolist(), strict=True))
        if self.on_token:
            for slot, token in token_of.items():
                prompt = self.prompt_of[request_of[slot]]
                self.on_token(prompt, request_of[slot] - self.first_P[prompt], token)
        # few tokens can be the last one of a text, and only these are worth reading what stands before them
        if self.stop_texts and (slots := [slot for slot, token in token_of.items() if self.may_end_text(token)]):
            slot_F = self.index(self._slots_with_text(slots))
            self.slots.is_stopped[slot_F], self.slots.is_running[slot_F] = True, False

    def _slots_with_text(self, slots: list[int]) -> list[int]:
        """Those whose last tokens, as many as a text can be made of, hold one of the texts."""
        n_tail = max(len(text.encode()) for text in self.stop_texts) + 4  # a byte a token or more; 4: a cut character
        slot_B1 = self.index(slots)[:, None]
        column_BT = self.slots.n_new[slot_B1] - n_tail + torch.arange(n_tail, device=self.device)
        ids_BT, n_before_B = self.slots.ids[slot_B1, column_BT.clamp(min=0)], (column_BT < 0).sum(-1)
        tails = (self.decode_text(ids[n:]) for ids, n in zip(ids_BT.tolist(), n_before_B.tolist(), strict=True))
        return [slot for slot, tail in zip(slots, tails, strict=True) if any(text in tail for text in self.stop_texts)]

    def look(self) -> None:
        """Retire what has finished: now, or as it was one look ago, which has arrived while the next steps ran."""
        self.looks.append(Look(dict(self.request_of), self.slots))
        if len(self.looks) <= self.looks_late:
            return
        finished, n_new_of = self.looks.popleft().read()
        # slots that have another request by now are left alone
        finished = {slot: request for slot, request in finished.items() if self.request_of.get(slot) == request}
        if finished:
            self.retire(finished)
        if self.on_progress:
            n_before = sum(self.n_new_of.get(request, 0) for request in n_new_of)
            self.on_progress(sum(n_new_of.values()) - n_before, [n_new_of[request] for request in finished.values()])
            self.n_new_of = n_new_of

    def retire(self, finished: dict[int, int]) -> None:
        """Keep what finished slots have made, and free them."""
        slot_F, slots = self.index(finished), self.slots
        cache = None
        if self.keep:
            length = int(slots.position[slot_F].max())
            cache = KVCache(self.model, len(finished), length)
            cache.copy_rows(slots.cache, slot_F, self.index(range(len(finished))), length)
        columns_F = [slots.n_new[slot_F], slots.is_stopped[slot_F], slots.ids[slot_F, :-1], slots.logp[slot_F, :-1]]
        if self.sampling.confidence_k:
            columns_F.append(slots.confidence[slot_F, :-1])
        self.harvests.append(Harvest(list(finished.values()), columns_F, cache))
        for slot in finished:
            del self.request_of[slot]
        if not self.pool.is_stepwise:
            self._move_to_front()

    def _move_to_front(self) -> None:
        """Move the last active rows into the places of finished ones."""
        n_active = len(self.request_of)
        holes = [slot for slot in range(n_active) if slot not in self.request_of]
        movers = [slot for slot in self.request_of if slot >= n_active]
        if holes:
            self.slots.move(self.index(movers), self.index(holes))
        for hole, mover in zip(holes, movers, strict=True):
            self.request_of[hole] = self.request_of.pop(mover)
        self.request_of = dict(sorted(self.request_of.items()))
        self.slots.position[n_active:] = 0

    def collect(self) -> dict[int, Completion]:
        """What was generated since this was last asked, by request."""
        harvests, self.harvests, made = self.harvests, [], {}
        if not harvests:
            return made
        columns = zip(*(harvest.columns_F for harvest in harvests), strict=True)
        n_F, is_stopped_F = torch.cat(next(columns)).tolist(), torch.cat(next(columns)).tolist()
        longest = max(n_F)  # rows have room for the limit, which few of them reach
        rows_FL = [torch.cat([rows_FL[:, :longest] for rows_FL in column]).cpu() for column in columns]
        places = ((request, h.cache, f) for h in harvests for f, request in enumerate(h.requests))
        for (request, cache, row), n, is_stopped, *rows_L in zip(places, n_F, is_stopped_F, *rows_FL, strict=True):
            ids, logp, *confidence = (row_L[:n].tolist() for row_L in rows_L)
            number = self.prompt_of[request]
            if any(map(math.isnan, logp)):
                raise ValueError(
                    f"the model's logits after prompt {number} are not numbers: look for nan in its weights"
                )
            kept = Kept(cache, row, [*self.prompts[number].ids, *ids[:-1]]) if cache else None
            finish = "stop" if is_stopped else "length"
            made[request] = Completion(ids, logp, finish, confidence[0] if confidence else None, kept)
        return made


def may_end_text(texts: tuple[str, ...], decode, token: int) -> bool:
    """Whether the last character of a text may be this token's: it is there, is cut, or is a blank between tokens."""
    piece = decode([token])
    return "\ufffd" in piece or any(text[-1] in piece or text[-1].isspace() for text in texts)


class Harvest(NamedTuple):
    """What some requests have generated, still on the device."""

    requests: list[int]
    columns_F: list[Tensor]  # lengths, is_stopped, ids [F, L], log-probabilities; confidences if asked for
    cache: KVCache | None


class Sessions:
    """Sessions that share a batch: which of them wait, which live, and what they came to."""

    def __init__(self, sessions: Sequence[Session], batch: Batch):
        self.sessions, self.batch, self.results = sessions, batch, [None] * len(sessions)
        asked = {i: self.send(i, None) for i in range(len(sessions))}
        self.waiting = deque((i, prompts) for i, prompts in asked.items() if prompts)
        self.live: dict[int, list[range]] = {}  # the requests of what each one has asked for
        self.owner: dict[int, int] = {}  # of each of these that is not there yet
        self.made: dict[int, Completion] = {}
        batch.prepare([prompt for _, prompts in self.waiting for prompt in prompts])

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
            self.batch.advance()
            made = self.batch.collect()
            self.made |= made
            owners = [self.owner.pop(request) for request in made]
            waited_for = set(self.owner.values()) if owners else set()
            for i in sorted(set(owners) - waited_for):
                self.go_on(i)
        return self.results

    def begin(self) -> None:
        """Let sessions begin while slots are free that nothing waits for."""
        while self.waiting and self.batch.n_slots - len(self.batch.request_of) > self.batch.n_waiting:
            n_under_way = sum(len(requests) for requests_P in self.live.values() for requests in requests_P)
            if self.live and n_under_way + sum(prompt.n for prompt in self.waiting[0][1]) > 2 * self.batch.n_slots:
                return
            self.ask(*self.waiting.popleft())

    def ask(self, i: int, prompts: list[Prompt]) -> None:
        self.live[i] = self.batch.add(prompts)
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
