"""Inference-time search over the sampler: beams of steps, as one search or as several independent trees.

Beam search over steps follows Snell et al. 2408.03314, section 5.2, and Beeching et al. 2024, "Scaling test-time
compute with open models", from which the independent trees come (DVTS: diverse verifier tree search). Departures: a
finished beam leaves and takes its place with it, so that a pool is neither padded with copies nor cut at some step;
each tree is a whole beam search, where DVTS keeps the one best step in each (width 1).

Left out: lookahead, Monte Carlo tree search, a model that scores steps (a reward model of ours scores final answers).
Choosing among finished answers is voting.py; methods that lengthen one answer are budget.py; beams of tokens are
token_beams.py.

Letters: P prompts, B live beams, G completions of a beam.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from nanor1.draw import request_key
from nanor1.preference import RewardModel, score
from nanor1.sampler import Completion, Prompt, Sampler, Session
from nanor1.tasks import prefilled
from nanor1.tokenizer import Tokenizer

# The scores of completions, finished or not, behind the ids of their prompts: the higher, the better.
Scorer = Callable[[list[list[int]], list[Completion]], list[float]]


@dataclass(frozen=True)
class Found:
    """What a method made of one prompt, and what it took."""

    completions: list[Completion]  # finished answers: all that stands behind the prompt, what was put in included
    scores: list[float]  # of each, by which the method ranked it; else the mean log-probability of its sampled tokens
    n_sampled: int  # tokens really sampled, those of dropped branches and of what was cut off included
    n_inserted: int = 0  # tokens put in by the method, not sampled; their log-probability in a completion is 0
    n_prompt: int = 0  # tokens read before sampling in all calls, put-in ones included; not what a cache still held
    tree_of: Sequence[int] = ()  # of each completion, where independent searches were made: which one found it
    n_sampled_by_tree: Sequence[int] = ()  # the tokens of each


@dataclass
class Spent:
    """The tokens of one prompt so far, as in Found."""

    n_sampled: int = 0
    n_inserted: int = 0
    n_prompt: int = 0


def ask(prompts: list[Prompt], spent: Spent) -> Session[list[list[Completion]]]:
    """The completions of prompts, in a session; what they took is added to what was spent."""
    spent.n_prompt += sum(len(p.ids) - (p.behind.n_shared(p.ids) if p.behind else 0) for p in prompts)
    completions_PG = yield prompts
    spent.n_sampled += sum(len(completion.ids) for group in completions_PG for completion in group)
    return completions_PG


# ---- scorers


def mean_logprob(prompts: list[list[int]], completions: list[Completion]) -> list[float]:
    """How likely the model finds its own text, a token: a weak guide, which prefers the fluent to the right."""
    return [sum(completion.logprobs) / len(completion.logprobs) for completion in completions]


def reward_scorer(reward_model: RewardModel, tokenizer: Tokenizer, tokens_per_batch: int) -> Scorer:
    """Score the text so far by a reward model, as if it were the final answer.

    ValueError for a text that is still thinking: the reward model judges final answers, of which it has none. A
    completion that is longer than the reward model's context scores nan, which beam search ranks last.
    """

    def scorer(prompts: list[list[int]], completions: list[Completion]) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        texts = [_response(tokenizer, prompt_ids, completion.ids) for prompt_ids, completion in pairs]
        for text in texts:
            if "<think>" in text and "</think>" not in text:
                raise ValueError(
                    f"a reward model judges final answers, and this one is still thinking: {text[:60]!r}; use prompts "
                    "and a model that answer without <think>, or score steps by their log-probability"
                )
        return score(reward_model, tokenizer, prompts, texts, tokens_per_batch)

    return scorer


def _response(tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int]) -> str:
    """As evaluate.read_response: what the prompt pre-filled and what was sampled, without the stop token."""
    tail = tokenizer.decode(prompt_ids[-16:])  # <think> and blanks are fewer tokens
    return prefilled(tail) + tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.stop_ids else ids)


# ---- beams of steps


@dataclass
class _Beam:
    """A completion as far as it has come; finish is "length" until it stops."""

    completion: Completion
    is_live: bool = True
    score: float = 0.0

    def extended(self, step: Completion, stop_ids: Sequence[int], max_tokens: int) -> "_Beam":
        ids = self.completion.ids + step.ids
        finish = "stop" if ids[-1] in stop_ids else "length"
        is_live = step.finish == "stop" and finish == "length" and len(ids) < max_tokens
        kept = step.kept if is_live else None
        return _Beam(Completion(ids, self.completion.logprobs + step.logprobs, finish, kept=kept), is_live)


@dataclass
class _Tree:
    """One beam search: the beams that live, the finished ones, and the places that are left."""

    prompt_ids: list[int]
    key: tuple[int, int]  # of its random numbers: the prompt's seed and the number of the tree
    max_tokens: int  # of an answer
    n_places: int
    spent: Spent = field(default_factory=Spent)
    live: list[_Beam] = field(default_factory=lambda: [_Beam(Completion([], [], "length"))])
    finished: list[_Beam] = field(default_factory=list)

    def grow(self, steps_BG: list[list[Completion]], scorer: Scorer, stop_ids: Sequence[int]) -> None:
        """Keep the best of the live beams with their steps, of which equal ones count once."""
        candidates: dict[tuple[int, ...], _Beam] = {}
        for beam, steps in zip(self.live, steps_BG, strict=True):
            for step in steps:
                longer = beam.extended(step, stop_ids, self.max_tokens)
                candidates.setdefault(tuple(longer.completion.ids), longer)
        beams = list(candidates.values())
        scores = scorer([self.prompt_ids] * len(beams), [beam.completion for beam in beams])
        for beam, beam_score in zip(beams, scores, strict=True):
            beam.score = beam_score
        self.select(beams)

    def select(self, candidates: list[_Beam]) -> None:
        """Keep the best, the earlier one of two equals; a finished one takes its place along."""
        best = sorted(candidates, key=_rank)[: self.n_places]
        self.live = [beam for beam in best if beam.is_live]
        self.finished += [beam for beam in best if not beam.is_live]
        self.n_places -= len(best) - len(self.live)

    def end(self) -> None:
        """Finish the beams that live after the last step as they are."""
        self.finished += [replace(beam, completion=replace(beam.completion, kept=None)) for beam in self.live]
        self.live = []


def _rank(beam: _Beam) -> float:
    return math.inf if math.isnan(beam.score) else -beam.score


def beam_search(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    *,
    width: int,
    branching: int,
    scorer: Scorer,
    max_steps: int,
    max_new_tokens: int,
    seeds: Sequence[int],
    decode: Callable[[list[int]], str],
    trees: int = 1,
    step_texts: Sequence[str] = ("\n",),
    stop_ids: Sequence[int] = (),
    **sampling,
) -> list[Found]:
    """Search answers step by step; returns the finished ones of each prompt, best score first, at most width x trees.

    Of width x branching first steps the `width` best by `scorer` are kept; of each, `branching` next steps are sampled,
    and so on. A step ends with the token that completes one of `step_texts` (". " so with the first word of the next
    sentence), or with a stop token. Of equal candidates there is one. An answer is finished when it stops, has
    `max_steps` steps or `max_new_tokens` tokens, or meets the end of the context; its place is then not filled again,
    and the search ends with the last live beam: there may be fewer answers than places. `trees` searches of a prompt
    do not compete, and two of them may find the same answer. DVTS is trees=n, width=1.

    `seeds` has one number a prompt; with it the result is the same whatever else is searched for, and a tree's whatever
    the number of trees. `sampling` (temperature, top_k, top_p, vocab_size) goes to Sampler.generate. ValueError for
    sizes below 1 and what Sampler.generate refuses.
    """
    sizes = dict(width=width, branching=branching, trees=trees, max_steps=max_steps, max_new_tokens=max_new_tokens)
    check_sizes(prompts, seeds, **sizes)
    context = sampler.model.config.max_position_embeddings
    forest = [
        [_Tree(list(ids), (seed, t), min(max_new_tokens, context - len(ids)), width) for t in range(trees)]
        for ids, seed in zip(prompts, seeds, strict=True)
    ]
    sessions = [_search(tree, scorer, max_steps, branching, stop_ids) for of_prompt in forest for tree in of_prompt]
    sampler.run(sessions, stop_ids=stop_ids, stop_texts=step_texts, decode=decode, **sampling)
    return [_found(of_prompt) for of_prompt in forest]


def check_sizes(prompts: Sequence, seeds: Sequence[int], **sizes: float) -> None:
    """ValueError where there is not a seed a prompt, or a size is below 1."""
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one a prompt")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")


def _search(tree: _Tree, scorer: Scorer, max_steps: int, branching: int, stop_ids: Sequence[int]) -> Session[None]:
    """Let a tree grow step by step, to the end of its last live beam."""
    for n_steps in range(max_steps):
        if not tree.live:
            return
        n = branching if n_steps else tree.n_places * branching
        prompts = [
            Prompt(
                tree.prompt_ids + beam.completion.ids,
                n,
                tree.max_tokens - len(beam.completion.ids),
                request_key(*tree.key, n_steps, b),
                beam.completion.kept,
            )
            for b, beam in enumerate(tree.live)
        ]
        tree.grow((yield from ask(prompts, tree.spent)), scorer, stop_ids)
    tree.end()


def _found(trees: list[_Tree]) -> Found:
    """The answers of a prompt."""
    beams = [(t, beam) for t, tree in enumerate(trees) for beam in tree.finished]
    beams.sort(key=lambda of_tree: _rank(of_tree[1]))
    return Found(
        [beam.completion for _, beam in beams],
        [beam.score for _, beam in beams],
        sum(tree.spent.n_sampled for tree in trees),
        n_prompt=sum(tree.spent.n_prompt for tree in trees),
        tree_of=[t for t, _ in beams],
        n_sampled_by_tree=[tree.spent.n_sampled for tree in trees],
    )
