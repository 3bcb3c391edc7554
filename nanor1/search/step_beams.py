"""Inference-time search over the sampler: beams of steps, as one search or as several independent trees.

Beam search over steps follows Snell et al. 2408.03314, section 5.2, and Beeching et al. 2024, "Scaling test-time
compute with open models", from which the independent trees come (DVTS: diverse verifier tree search). Departures: a
finished beam leaves and takes its place with it, so that a pool is neither padded with copies nor cut at some step;
each tree is a whole beam search, where DVTS keeps the one best step in each (width 1).

Left out: lookahead, Monte Carlo tree search, a model that scores steps (a reward model of ours scores final answers).
Choosing among finished answers is votes.py; methods that lengthen one answer are think_longer.py; beams of tokens are
token_beams.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from nanor1.judge import read_response
from nanor1.next_token import request_key
from nanor1.sampler import Completion, Prompt, Sampler, Session
from nanor1.stages.reward_model import RewardModel, score
from nanor1.tokenizer import Tokenizer

# The scores of completions, finished or not, behind the ids of their prompts: the higher, the better.
Scorer = Callable[[list[list[int]], list[Completion]], list[float]]


@dataclass
class Found:
    """What a method made of one prompt, and what it took."""

    completions: list[Completion] = field(default_factory=list)  # all that stands behind the prompt, put in or sampled
    scores: list[float] = field(default_factory=list)  # it ranked them by; else `mean_logprob`, of what was sampled
    n_sampled: int = 0  # tokens really sampled, those of dropped branches and of what was cut off included
    n_inserted: int = 0  # tokens put in by the method, not sampled; their log-probability in a completion is 0
    n_prompt: int = 0  # tokens read before sampling in all calls, put-in ones included; not what a cache still held
    tree_of: Sequence[int] = ()  # of each completion, where independent searches were made: which one found it
    n_sampled_by_tree: Sequence[int] = ()  # the tokens of each


def ask(prompts: list[Prompt], found: Found) -> Session[list[list[Completion]]]:
    """The completions of prompts, in a session; what they took is counted."""
    found.n_prompt += sum(len(p.ids) - (p.behind.n_shared(p.ids) if p.behind else 0) for p in prompts)
    completions_PG = yield prompts
    found.n_sampled += sum(len(completion.ids) for group in completions_PG for completion in group)
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
        texts = []
        for prompt_ids, made in zip(prompts, completions, strict=True):
            tail = tokenizer.decode(prompt_ids[-16:])  # <think> and blanks are fewer tokens
            text = read_response(tail, made, tokenizer, "")
            if "<think>" in text and "</think>" not in text:
                raise ValueError(
                    f"a reward model judges final answers, and this one is still thinking: {text[:60]!r}; use prompts "
                    "and a model that answer without <think>, or score steps by their log-probability"
                )
            texts.append(text)
        return score(reward_model, tokenizer, prompts, texts, tokens_per_batch)

    return scorer


# ---- beams of steps


def beam_search(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    *,
    width: int,
    branching: int,
    scorer: Scorer,
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
    `max_new_tokens` tokens, or meets the end of the context; its place is then not filled again, and the search ends
    with the last live beam: there may be fewer answers than places. `trees` searches of a prompt do not compete, and
    two of them may find the same answer. DVTS is trees=n, width=1.

    `seeds` has one number a prompt; with it the result is the same whatever else is searched for, and a tree's whatever
    the number of trees. `sampling` (temperature, top_k, top_p, vocab_size) goes to Sampler.run, whose errors these are.
    """
    assert min(width, branching, trees, max_new_tokens) >= 1
    context = sampler.model.config.max_position_embeddings
    sessions = [
        _search(list(ids), (seed, tree), width, branching, min(max_new_tokens, context - len(ids)), scorer, stop_ids)
        for ids, seed in zip(prompts, seeds, strict=True)
        for tree in range(trees)
    ]
    found = sampler.run(sessions, stop_ids=stop_ids, stop_texts=step_texts, decode=decode, **sampling)
    return [_together(found[first : first + trees]) for first in range(0, len(found), trees)]


def _search(
    prompt_ids: list[int],
    key: tuple[int, int],
    n_places: int,
    branching: int,
    max_tokens: int,
    scorer: Scorer,
    stop_ids,
) -> Session[Found]:
    """One tree: step by step the best live beams are kept, to the end of the last one; a finished one keeps its place.

    A beam is a completion as far as it has come; one that lives has the finish "step".
    """
    found, live = Found(), [Completion([], [], "step")]
    for n_steps in count():
        if not live:
            return found
        n = branching if n_steps else n_places * branching
        prompts = [
            Prompt(prompt_ids + beam.ids, n, max_tokens - len(beam.ids), request_key(*key, n_steps, b), beam.kept)
            for b, beam in enumerate(live)
        ]
        # Nothing here holds the steps, so that the caches of those that are dropped are free.
        candidates = _extended(live, (yield from ask(prompts, found)), max_tokens, stop_ids)
        scored = zip(scorer([prompt_ids] * len(candidates), candidates), candidates, strict=True)
        best = sorted(scored, key=_rank)[:n_places]
        live = [beam for _, beam in best if beam.finish == "step"]
        found.scores += [score for score, beam in best if beam.finish != "step"]
        found.completions += [beam for _, beam in best if beam.finish != "step"]
        n_places -= len(best) - len(live)
        del candidates, scored


def _extended(live: list[Completion], steps_BG, max_tokens: int, stop_ids: Sequence[int]) -> list[Completion]:
    """The beams with each of their steps, of which equal ones count once."""
    candidates: dict[tuple[int, ...], Completion] = {}
    for beam, steps in zip(live, steps_BG, strict=True):
        for step in steps:
            ids, finish = beam.ids + step.ids, "length"
            if step.ids[-1] in stop_ids:
                finish = "stop"
            elif step.finish == "stop" and len(ids) < max_tokens:
                finish = "step"
            kept = step.kept if finish == "step" else None
            candidates.setdefault(tuple(ids), Completion(ids, beam.logprobs + step.logprobs, finish, kept=kept))
    return list(candidates.values())


def _rank(scored: tuple[float, object]) -> float:
    return math.inf if math.isnan(scored[0]) else -scored[0]


def _together(trees: list[Found]) -> Found:
    """What the trees of a prompt found, best first."""
    of_trees = [
        (s, made, t) for t, tree in enumerate(trees) for s, made in zip(tree.scores, tree.completions, strict=True)
    ]
    of_trees.sort(key=_rank)
    return Found(
        [made for _, made, _ in of_trees],
        [score for score, _, _ in of_trees],
        sum(tree.n_sampled for tree in trees),
        n_prompt=sum(tree.n_prompt for tree in trees),
        tree_of=[t for _, _, t in of_trees],
        n_sampled_by_tree=[tree.n_sampled for tree in trees],
    )
