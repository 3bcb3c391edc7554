"""KV-cache generation for many ragged requests at once.

A request is one completion of one prompt. Requests wait in line for a slot of the cache (continuous batching); all that
have one advance by a token a step, and one that has finished frees its slot. A prompt is read once, through the packed
forward of training, and its keys and values are copied to each of its n slots. What all prompts of a call begin with,
such as worked examples, is read once.

On a GPU the step is captured in CUDA graphs, one for each of a few numbers of rows, and replayed several times between
looks at which requests have finished; the answer to a look is read while the next steps run. On a CPU each step is
looked at, and the last active rows move into the places of finished ones, so that the active rows are always the first:
attention then reads a plain slice of the cache, and a finished row costs nothing.

A draw depends on its prompt's seed (or the one seed and the prompt's index), the completion's index and the position
alone, so a request draws the same numbers whichever slot or batch it runs in. The logits may still differ in their last
bits with the shape of the batch, and a draw that falls between the two then gives another token.

A completion may keep its cache, and a later prompt that begins with its tokens goes on from there. Searches, and
whatever else asks for one thing after another, are sessions: generators that yield prompts and are sent completions.

Left out: paged caches, sharing a prompt's cache between slots (copies are read as fast up to some hundred tokens).
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import accumulate, groupby
from typing import TypeVar

import torch
from torch import Tensor

from nanor1.model import KVCache, Transformer
from nanor1.next_token import request_key
from nanor1.packing import end_to_end, index_tensor, to_device
from nanor1.run.machine import free_memory
from nanor1.slots import Sampling, Slots, Step, slots_that_fit

MIN_SHARED = 32  # tokens that prompts begin with, from which on they are read once
PREFILL_TOKENS = 16_384  # prompts are prefilled in batches whose cache holds at most this many, or one prompt
ROOM_STEP = 128  # tokens: slots have room for a multiple, so that a conversation does not need new ones at each turn
# Rows of a step, and the number of slots itself. Not 1, but of a single slot: torch.compile makes a program of its own
# for one row, and one for all other numbers.
GRAPH_ROWS = (2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
STEPS_A_LOOK = 4  # on a GPU: decode steps between looks at which requests have finished; it reads the one before


# ---- what is asked, and what is made


@dataclass(frozen=True)
class Kept:
    """The keys and values of some tokens: a row of a cache, which lives as long as somebody holds this."""

    cache: KVCache
    row: int
    ids: Sequence[int]

    def n_shared(self, prompt: Sequence[int]) -> int:
        """How many tokens a prompt begins with that are kept; never its last one, whose hidden state is wanted."""
        return _n_alike(self.ids, prompt, min(len(self.ids), len(prompt) - 1))


@dataclass(frozen=True)
class Completion:
    """One sampled answer: its token ids, their log-probabilities, and why it ended."""

    ids: list[int]  # the stop token included
    logprobs: list[float]  # at the sampling temperature, before top-k and top-p; those of temperature 1 when greedy
    finish: str  # "stop" or "length"
    confidences: list[float] | None = None  # of its tokens, where they were asked for (see next_token.token_confidence)
    kept: Kept | None = field(default=None, repr=False, compare=False)  # the cache of its prompt and it, if asked for


@dataclass(frozen=True)
class Prompt:
    """What is to be completed n times."""

    ids: Sequence[int]
    n: int
    max_new_tokens: int
    seed: int
    behind: Kept | None = None  # what it begins with, as far as it does, is not read again

    @property
    def is_kept(self) -> bool:
        """Whether nothing is to be read: its last token is what the next step takes."""
        return self.behind is not None and self.behind.n_shared(self.ids) == len(self.ids) - 1


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
    that is free. `is_stepwise` (None: on CUDA) says whether fixed steps over a list of slots are repeated, or the
    active rows are kept the first ones. The model's weights may change between calls, in place.
    """

    def __init__(
        self, model: Transformer, max_rows: int = 512, memory_share: float = 0.8, is_stepwise: bool | None = None
    ):
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; at least one row is needed")
        self.model, self.max_rows, self.memory_share = model, max_rows, memory_share
        self.device = model.head_weight_VC.device
        self.is_stepwise = self.device.type == "cuda" if is_stepwise is None else is_stepwise
        self.slots: Slots | None = None  # made anew when more is asked of them, as are the steps over them
        self.n_wanted = 0  # slots that were asked for, when these were made
        self.steps: dict[tuple[int, Sampling], Step] = {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        max_new_tokens: int | Sequence[int],
        seed: int | Sequence[int] = 0,
        keep: bool = False,
        behind: Sequence[Kept | None] | None = None,
        **how,
    ) -> list[list[Completion]]:
        """Sample n completions of each prompt; returns one inner list a prompt, n long.

        `how` is all of Sampling (temperature, top_k, top_p, stop_ids, stop_texts, decode, vocab_size, confidence_k),
        and `on_token` and `on_progress` of `run`. A completion that stops has finish "stop"; one that meets
        `max_new_tokens` (one number, or one a prompt) or the end of the model's context has "length". `seed` is one
        number, or one a prompt, with which a prompt draws the same wherever it stands in the list.

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

        def ask() -> Session[list[list[Completion]]]:
            asked = zip(prompts, limits, seeds, behind, strict=True)
            return (yield [Prompt(ids, n, *of_prompt) for ids, *of_prompt in asked]) if prompts else []

        return self.run([ask()], keep=keep, **how)[0]

    def run(
        self,
        sessions: Sequence[Session[Result]],
        *,
        keep: bool = True,
        on_token: Callable[[int, int, int], None] | None = None,
        on_progress: Callable[[int, list[int]], None] | None = None,
        **sampling,
    ) -> list[Result]:
        """Complete what sessions ask for, one thing after another, and return what each comes to in the end.

        A session is a generator that yields prompts, and is sent their completions, with their caches, when all of them
        are there. Sessions do not wait for each other: the slots that one leaves free are another's. New ones begin
        where slots would stand empty, while fewer than two waves of requests are under way, for their caches take
        memory. `sampling` is all of Sampling; the errors are those of `generate`.

        `on_token(prompt, completion, id)` hears of each token as it is made, for which a GPU is waited for at each
        step; `on_progress(n_tokens, lengths)` of how many were made, and how long those are that ended, since it was
        last called.
        """
        how = Sampling(**sampling)
        with torch.inference_mode():
            if not self.is_stepwise:  # fixed steps are compiled instead
                self.model.reorder_weights()
            results = _Sessions(sessions, self, how, keep, on_token, on_progress).finish()
            if not self.is_stepwise and self.slots:
                self.slots.cache.resize(0)  # it grows again, and between calls its memory is wanted
        return results

    def reserve(self, n_requests: int, n_prompt: int, n_new: int) -> None:
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
        n_slots = slots_that_fit(self.model, room, wanted, budget)
        self.slots = Slots(self.model, n_slots, room, n_new, is_fixed=self.is_stepwise)

    def step(self, n_rows: int, sampling: Sampling) -> Step:
        """The repeatable step over at least `n_rows` slots."""
        size = next((size for size in GRAPH_ROWS if n_rows <= size < self.slots.n_slots), self.slots.n_slots)
        if (size, sampling) not in self.steps:
            self.steps[size, sampling] = Step(self.model, self.slots, size, sampling)
        return self.steps[size, sampling]


# ---- sessions


@dataclass(eq=False)
class _Request:
    """One completion of a prompt: in line, in a slot, or made."""

    prompt: Prompt
    g: int  # which of the prompt's completions
    number: int  # of the prompt, of all that are asked for in a call
    session: int
    limit: int  # of new tokens, which the end of the model's context may cut
    row: int = 0  # of the cache in which its prompt was read
    n_new: int = 0  # tokens made, at the last look
    holds_text: bool = False  # one of the stop texts
    ids: list[int] = field(default_factory=list)  # its tokens so far, where stop texts are sought in them
    made: Completion | None = None  # in the end


class _Sessions:
    """Sessions that share a batch: which of them wait, which live, and what they came to."""

    def __init__(self, sessions: Sequence[Session], sampler: Sampler, *how):
        self.sessions, self.results, self.n_asked = sessions, [None] * len(sessions), 0
        self.context = sampler.model.config.max_position_embeddings
        self.waiting = deque((i, asked) for i in range(len(sessions)) if (asked := self.send(i, None)))
        self.live: dict[int, list[_Request]] = {}  # what each one has asked for
        self.n_left: Counter[int] = Counter()  # requests of these that have not ended
        self.batch = _Batch(sampler, [request for _, asked in self.waiting for request in asked], *how)

    def send(self, i: int, made_PG: list[list[Completion]] | None) -> list[_Request]:
        """What a session asks for next; nothing when it has ended. ValueError for what cannot be completed."""
        try:
            prompts = self.sessions[i].send(made_PG)
        except StopIteration as end:
            self.results[i] = end.value
            return []
        asked, context = [], self.context
        for number, prompt in enumerate(prompts, self.n_asked):
            length, n_new = len(prompt.ids), prompt.max_new_tokens
            if not length:
                raise ValueError(f"prompt {number} is empty; a prompt needs at least one token")
            if length >= context:
                raise ValueError(
                    f"prompt {number} is {length} tokens; the model's context is {context}: shorten the prompt"
                )
            if min(prompt.n, n_new) < 1:
                raise ValueError(f"n {prompt.n}, max_new_tokens {n_new}: each must be at least 1")
            asked += [_Request(prompt, g, number, i, min(n_new, context - length)) for g in range(prompt.n)]
        self.n_asked += len(prompts)
        return asked

    def finish(self) -> list:
        while self.waiting or self.live:
            self.begin()
            ended = Counter(request.session for request in self.batch.advance())
            self.n_left -= ended  # keeps those that have some left
            if ready := sorted(ended.keys() - self.n_left.keys()):
                self.batch.collect()  # not before, for it waits for the device
            for i in ready:
                groups = groupby(self.live.pop(i), key=lambda request: request.number)
                if asked := self.send(i, [[request.made for request in group] for _, group in groups]):
                    self.add(i, asked)
        return self.results

    def begin(self) -> None:
        """Let sessions begin while slots are free that nothing waits for."""
        batch = self.batch
        while self.waiting and batch.n_slots - len(batch.request_of) > batch.n_waiting:
            n_under_way = sum(map(len, self.live.values()))
            if self.live and n_under_way + len(self.waiting[0][1]) > 2 * batch.n_slots:
                return
            self.add(*self.waiting.popleft())

    def add(self, i: int, asked: list[_Request]) -> None:
        self.live[i], self.n_left[i] = asked, len(asked)
        self.batch.unread += asked


# ---- continuous batching


class _Batch:
    """The requests that wait, those that run, and what has been generated.

    Slots are made for what is `asked` at first, and what all its prompts begin with is read. More may be put in line,
    in `unread`, at any time.
    """

    def __init__(self, sampler: Sampler, asked: list[_Request], sampling: Sampling, keep, on_token, on_progress):
        self.sampler, self.model, self.sampling, self.keep = sampler, sampler.model, sampling, keep
        self.on_token, self.on_progress = on_token, on_progress
        self.index = partial(index_tensor, device=sampler.device)
        self.may_end_text = lru_cache(maxsize=None)(partial(_may_end_text, sampling))
        # what the host has to see after each step; if nothing, a stepwise sampler looks less often, and later
        is_late = sampler.is_stepwise and not (on_token or sampling.stop_texts)
        self.steps_a_look, self.looks_late = (STEPS_A_LOOK, 1) if is_late else (1, 0)
        self.unread: deque[_Request] = deque()
        # whose prompts stand in `read_cache`, with the logits of their last tokens in `read_logits`
        self.read: deque[_Request] = deque()
        self.request_of: dict[int, _Request] = {}  # slot -> request, of the active ones
        self.looks: deque[tuple[dict[int, _Request], Callable]] = deque()
        # of requests that have ended, on the device: ids_BT, log-probabilities, confidences
        self.harvests: list[tuple[list[_Request], list[Tensor], KVCache | None]] = []
        if asked:
            self._reserve(len(asked), asked)
            fresh = [request.prompt.ids for request in asked if request.g == 0 and request.prompt.behind is None]
            self.beginning = read_beginning(self.model, fresh)

    def _reserve(self, n_requests: int, asked: list[_Request]) -> None:
        self.slots = None  # so that their memory is free before larger ones are made
        self.sampler.reserve(n_requests, max(len(r.prompt.ids) for r in asked), max(r.limit for r in asked))
        self.slots = self.sampler.slots
        self.n_slots = min(self.slots.n_slots, self.sampler.max_rows, n_requests)
        self.slots.is_running.fill_(False)
        self.slots.position.zero_()

    @property
    def n_waiting(self) -> int:
        return len(self.unread) + len(self.read)

    @property
    def n_free(self) -> int:
        """Slots that are free and wanted."""
        return min(self.n_slots - len(self.request_of), self.n_waiting)

    def should_admit(self) -> bool:
        """Refill when an eighth of the slots is free, so that prompts are prefilled several at a time."""
        if not self.n_free or self.n_free < min(-(-self.n_slots // 8), self.n_waiting):
            return False
        if not self.read and not self._fits(self.unread[0]):
            if self.request_of:  # larger slots are made when these are empty
                return False
            self._reserve(self.n_slots, [self.unread[0]])
        return True

    def _fits(self, request: _Request) -> bool:
        n_prompt = len(request.prompt.ids)
        return n_prompt + request.limit <= self.slots.room and request.limit <= self.slots.n_new_tokens

    def admit(self) -> None:
        """Give free slots to the next requests, and draw the first tokens of those whose prompts were read."""
        if not self.read:
            self._read_prompts()
        free = [slot for slot in range(self.n_slots) if slot not in self.request_of]
        next_ones = [self.read.popleft() for _ in range(min(self.n_free, len(self.read)))]
        placed = dict(zip(free, next_ones, strict=False))
        self.request_of |= placed
        slot_B, row_B = self.index(placed), self.index(request.row for request in next_ones)
        self.slots.extend(self.read_cache.max_len)
        self.slots.cache.copy_rows(self.read_cache, row_B, slot_B, self.read_cache.max_len)
        has_logits = self.read_logits is not None
        self.slots.start(
            slot_B,
            self.index(request.prompt.ids[-1] for request in next_ones),
            self.index(len(request.prompt.ids) - (not has_logits) for request in next_ones),
            self.index(request.limit for request in next_ones),
            self.index(request_key(request.prompt.seed, request.g) for request in next_ones),
        )
        if has_logits:
            self.slots.record(slot_B, self.read_logits[row_B], self.sampling)
            self._hear(placed)

    def _read_prompts(self) -> None:
        """Read the next prompts, as many as free slots will want and the budget allows; the cache is a rectangle.

        Those of which all but the last token is kept are not read: the next step takes that token.
        """
        prompts, longest, is_kept, n_free = [], 0, self.unread[0].prompt.is_kept, self.n_free
        while self.unread and len(self.read) < n_free:
            prompt = self.unread[0].prompt
            longest = max(longest, len(prompt.ids))
            is_too_much = prompts and longest * (len(prompts) + 1) > PREFILL_TOKENS
            if is_too_much or prompt.is_kept != is_kept or not self._fits(self.unread[0]):
                break
            for _ in range(prompt.n):
                self.read.append(request := self.unread.popleft())
                request.prompt, request.row = replace(prompt, behind=None), len(prompts)  # None: its memory is free
            prompts.append(prompt)
        ids, behind = [prompt.ids for prompt in prompts], [prompt.behind or self.beginning for prompt in prompts]
        if is_kept:
            (self.read_cache, _), self.read_logits = _take_over(self.model, ids, behind), None
        else:
            self.read_cache, hidden_BC = prefill(self.model, ids, behind)
            self.read_logits = self.model.logits(hidden_BC)

    def decode(self) -> None:
        """Advance every active slot by a token, or by several where nobody looks in between."""
        n_rows = len(self.request_of)
        if self.sampler.is_stepwise:
            self.sampler.step(n_rows, self.sampling)(list(self.request_of), self.steps_a_look)
        else:
            max_len = self.slots.extend(int(self.slots.position[:n_rows].max()) + 1)
            self.slots.decode(self.model, slice(n_rows), max_len, self.sampling)
        self._hear(self.request_of)

    def _hear(self, request_of: dict[int, _Request]) -> None:
        """Pass on the token that each of these slots has just made, and close those that hold a stop text."""
        if not self.on_token and not self.sampling.stop_texts:
            return
        tokens, ended = self.slots.token[self.index(request_of)].tolist(), []
        for (slot, request), token in zip(request_of.items(), tokens, strict=True):
            if self.on_token:
                self.on_token(request.number, request.g, token)
            request.ids.append(token)
            # few tokens can be the last one of a text, and only these are worth reading what stands before them
            if self.sampling.stop_texts and self.may_end_text(token) and _holds_text(self.sampling, request.ids):
                request.holds_text = True
                ended.append(slot)
        if ended:
            self.slots.is_running[self.index(ended)] = False

    def advance(self) -> list[_Request]:
        """Let requests begin, or those that run go on; then retire which have finished, and return them.

        Finished is what has finished now, or had a look ago, which has arrived while the next steps ran.
        """
        self.admit() if self.should_admit() else self.decode()
        self.looks.append((dict(self.request_of), self.slots.look()))
        if len(self.looks) <= self.looks_late:
            return []
        request_of, read = self.looks.popleft()
        is_running_S, n_new_S = read()
        n_before = sum(request.n_new for request in request_of.values())
        for slot, request in request_of.items():
            request.n_new = n_new_S[slot]
        ended = {slot: request for slot, request in request_of.items() if not is_running_S[slot]}
        # slots that have another request by now are left alone
        finished = {slot: request for slot, request in ended.items() if self.request_of.get(slot) == request}
        if finished:
            self.retire(finished)
        if self.on_progress:
            n_tokens = sum(request.n_new for request in request_of.values()) - n_before
            self.on_progress(n_tokens, [request.n_new for request in finished.values()])
        return list(finished.values())

    def retire(self, finished: dict[int, _Request]) -> None:
        """Keep what finished slots have made, and free them."""
        slot_B, slots, cache = self.index(finished), self.slots, None
        if self.keep:
            length = max(len(request.prompt.ids) + request.n_new - 1 for request in finished.values())
            cache = KVCache(self.model, len(finished), length)
            cache.copy_rows(slots.cache, slot_B, self.index(range(len(finished))), length)
        longest = max(request.n_new for request in finished.values())  # rows have room for the limit
        rows = [slots.ids, slots.logp, slots.confidence] if self.sampling.confidence_k else [slots.ids, slots.logp]
        self.harvests.append((list(finished.values()), [row_ST[slot_B, :longest] for row_ST in rows], cache))
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
            self.slots.move(self.index(movers), self.index(holes))
        for hole, mover in zip(holes, movers, strict=True):
            self.request_of[hole] = self.request_of.pop(mover)
        self.request_of = dict(sorted(self.request_of.items()))
        self.slots.position[n_active:] = 0

    def collect(self) -> None:
        """Give the requests that have ended what they made."""
        for requests, rows, cache in self.harvests:
            lists = zip(*(row_BT.tolist() for row_BT in rows), strict=True)
            for b, (request, made) in enumerate(zip(requests, lists, strict=True)):
                ids, logp, *confidence = (values[: request.n_new] for values in made)
                if any(map(math.isnan, logp)):
                    raise ValueError(
                        f"the model's logits after prompt {request.number} are not numbers: look for nan in its weights"
                    )
                kept = Kept(cache, b, [*request.prompt.ids, *ids[:-1]]) if cache else None
                finish = "stop" if request.holds_text or ids[-1] in self.sampling.stop_ids else "length"
                request.made = Completion(ids, logp, finish, confidence[0] if confidence else None, kept)
        self.harvests.clear()


def _may_end_text(sampling: Sampling, token: int) -> bool:
    """Whether the last character of a text may be this token's: it is there, is cut, or is a blank between tokens."""
    piece = sampling.decode([token])
    return "\ufffd" in piece or any(text[-1] in piece or text[-1].isspace() for text in sampling.stop_texts)


def _holds_text(sampling: Sampling, ids: list[int]) -> bool:
    """Whether the last tokens, as many as a text can be made of, hold one of the texts."""
    n_tail = max(len(text.encode()) for text in sampling.stop_texts) + 4  # a byte a token or more; 4: a cut character
    tail = sampling.decode(ids[-n_tail:])
    return any(text in tail for text in sampling.stop_texts)


# ---- reading prompts: what a cache already holds of one is taken from there, and only the rest is read


def prefill(
    model: Transformer, prompts: Sequence[Sequence[int]], behind: Sequence[Kept | None]
) -> tuple[KVCache, Tensor]:
    """Read each prompt, from where it leaves what is kept, all at once, through the packed forward of training.

    Returns a cache with a row a prompt, and the hidden state of the last token of each, [B, C].
    """
    cache, past = _take_over(model, prompts, behind)
    device = cache.k[0].device
    new = [prompt[n:] for prompt, n in zip(prompts, past, strict=True)]
    cu_seqlens_B1 = torch.tensor([0, *accumulate(map(len, new))])
    past_B = torch.tensor(past) if any(past) else None
    hidden_NC = model(to_device(end_to_end(new), device), cu_seqlens_B1, cache, past_B=past_B)
    return cache, hidden_NC[to_device(cu_seqlens_B1[1:] - 1, device)]


def _take_over(
    model: Transformer, prompts: Sequence[Sequence[int]], behind: Sequence[Kept | None]
) -> tuple[KVCache, list[int]]:
    """A cache with a row a prompt, and how many of its first tokens stand there: those that are kept."""
    cache = KVCache(model, len(prompts), max(map(len, prompts)))
    index = partial(index_tensor, device=cache.k[0].device)
    past = [kept.n_shared(prompt) if kept else 0 for prompt, kept in zip(prompts, behind, strict=True)]
    for source in {id(kept.cache): kept.cache for kept in behind if kept}.values():
        rows = [b for b, kept in enumerate(behind) if kept and kept.cache is source]
        cache.copy_rows(source, index(behind[b].row for b in rows), index(rows), max(past[b] for b in rows))
    return cache, past


def read_beginning(model: Transformer, prompts: Sequence[Sequence[int]]) -> Kept | None:
    """What all prompts begin with, of which none is a whole prompt, read; None where that is too little."""
    if len(prompts) < 2:
        return None
    first, last = min(prompts), max(prompts)  # in the order of a dictionary, so all others agree as far as these do
    shared = first[: _n_alike(first, last, min(map(len, prompts)) - 1)]
    if len(shared) < MIN_SHARED:
        return None
    cache, _ = prefill(model, [shared], [None])
    return Kept(cache, 0, shared)


def _n_alike(first: Sequence[int], second: Sequence[int], most: int) -> int:
    """How many tokens, at most `most`, both begin with."""
    return next((i for i in range(most) if first[i] != second[i]), most)
