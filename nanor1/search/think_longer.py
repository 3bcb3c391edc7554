"""Inference-time methods that make one answer longer: budget forcing, and rounds of self-refinement.

Budget forcing is s1 (Muennighoff et al. 2501.19393, section 3.1): thinking that ends too early is made to go on by
"Wait" in the place of its end, and thinking that takes too long is ended by force. Self-refinement is Madaan et al.
2303.17651 (algorithm 1) with one turn a round: feedback and the better answer are asked for together, and only the
last answer is shown, not all before it. When to stop, and which answer to take, is left to the caller (votes.py).

Left out: what thinking would have led to had it ended at each "Wait", which costs an answer each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

from nanor1.next_token import request_key
from nanor1.rewards import after_thinking
from nanor1.sampler import Completion, Prompt, Sampler, Session
from nanor1.search.step_beams import Found, ask, mean_logprob
from nanor1.tasks.prompts import render
from nanor1.tokenizer import Tokenizer

REQUEST = (
    "Check your answer step by step. If you find a mistake, correct it. "
    "Then give the corrected final answer, in the form that was asked for."
)


def in_turn(seed: int, found: Found) -> Callable[[list[int], int], Session[Completion]]:
    """What samples once behind some ids, and counts it: each turn goes on from the cache of the one before."""
    kept, turns = None, count()

    def sample(ids: list[int], limit: int) -> Session[Completion]:
        nonlocal kept
        ((made,),) = yield from ask([Prompt(ids, 1, limit, request_key(seed, next(turns)), kept)], found)
        kept = made.kept
        return replace(made, kept=None)  # so that it holds no memory

    return sample


# ---- budget forcing


@dataclass(frozen=True)
class Budget:
    """How long is thought, and what is put in to have it so."""

    max_thinking: int  # tokens, put-in ones counted
    max_answer: int  # tokens behind the thinking
    min_thinking: float = math.inf  # tokens from which on thinking may end; inf: not before all waits
    wait_text: str = "Wait"  # takes the place of an end that came too early
    end_text: str = "</think>"  # ends thinking; "": the model thinks without tags, and a stop token ends all
    answer_text: str = ""  # stands behind an end by force, such as "\nFinal Answer:"

    def least_room(self, tokenizer: Tokenizer) -> int:
        """Tokens that must be left behind a prompt: for the end of thinking put in, the answer, and a thought."""
        return len(self.forced_end(tokenizer)) + self.max_answer + 1

    def forced_end(self, tokenizer: Tokenizer) -> list[int]:
        return tokenizer.encode(self.end_text + self.answer_text, allow_special=True)


def force_budget(
    sampler: Sampler,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    budget: Budget,
    *,
    max_waits: int,
    seeds: Sequence[int],
    **sampling,
) -> list[Found]:
    """Have each prompt thought about for so many tokens, then answered; one completion a prompt.

    Thinking ends with `end_text` or a stop token. If it has fewer than `min_thinking` tokens by then, its end is cut
    off and `wait_text` put in its place, at most `max_waits` times. At `max_thinking` tokens, the end not counted,
    `end_text` and `answer_text` are put in. Then the answer is sampled: finish "length" if `max_answer` cuts it off. No
    wait is put in where it would exceed `max_thinking`, which is less where the context leaves less; an end of several
    tokens that meets `max_thinking` halfway stays there as it is, before the forced one.

    Ids are never decoded and encoded again, but for the characters before the end in a token that holds both: they are
    encoded with the text put in. `seeds` has one number a prompt, with which the result does not depend on the others;
    `sampling` (temperature, top_k, top_p) goes to Sampler.run. The context must have `least_room` behind each prompt.
    """
    room = sampler.model.config.max_position_embeddings - budget.least_room(tokenizer) + 1
    limits = [min(budget.max_thinking, room - len(ids)) for ids in prompts]
    assert budget.max_answer >= 1 and all(limit >= 1 for limit in limits)
    think = partial(_think, tokenizer=tokenizer, budget=budget, max_waits=max_waits)
    sessions = [think(list(ids), seed, limit) for ids, seed, limit in zip(prompts, seeds, limits, strict=True)]
    stop_texts = list(filter(None, [budget.end_text]))
    stops = dict(stop_ids=tokenizer.stop_ids, stop_texts=stop_texts, decode=tokenizer.decode)
    return sampler.run(sessions, vocab_size=tokenizer.vocab_size, **stops, **sampling)


def _think(
    prompt_ids: list[int], seed: int, max_thinking: int, tokenizer: Tokenizer, budget: Budget, max_waits: int
) -> Session[Found]:
    """Think about one prompt, then answer; what is sampled goes on behind what was put in."""
    ids, logprobs, found = [], [], Found()
    sample = in_turn(seed, found)

    def take(made: Completion, n: int | None = None) -> None:
        ids.extend(made.ids[:n])
        logprobs.extend(made.logprobs[:n])

    def put_in(new_ids: list[int]) -> None:
        ids.extend(new_ids)
        logprobs.extend([0.0] * len(new_ids))
        found.n_inserted += len(new_ids)

    n_waits, is_ended = 0, False
    while len(ids) < max_thinking and not is_ended:
        made = yield from sample(prompt_ids + ids, max_thinking - len(ids))
        if made.finish == "length":
            take(made)
            break
        n_before, lost = _before_end(made.ids, tokenizer, budget.end_text)
        wait_ids = tokenizer.encode(lost + budget.wait_text, allow_special=True)
        n_thinking = len(ids) + n_before
        is_long = n_thinking >= budget.min_thinking or n_thinking + len(wait_ids) > max_thinking
        is_ended = is_long or n_waits == max_waits
        take(made, None if is_ended else n_before)
        if not is_ended:
            put_in(wait_ids)
            n_waits += 1
    if not is_ended:
        put_in(budget.forced_end(tokenizer))
    n_left, is_stopped = budget.max_answer, is_ended and ids[-1] in tokenizer.stop_ids
    while n_left and not is_stopped:  # end_text written once more ends nothing here
        made = yield from sample(prompt_ids + ids, n_left)
        take(made)
        n_left, is_stopped = n_left - len(made.ids), made.ids[-1] in tokenizer.stop_ids
    found.completions = [Completion(ids, logprobs, "stop" if is_stopped else "length")]
    found.scores = [sum(logprobs) / (len(ids) - found.n_inserted)]
    return found


def _before_end(ids: list[int], tokenizer: Tokenizer, end_text: str) -> tuple[int, str]:
    """How many ids stand wholly before what ended the thinking, and the text between the last of them and it."""
    if ids[-1] in tokenizer.stop_ids:
        return len(ids) - 1, ""
    before, _, _ = tokenizer.decode(ids).partition(end_text)
    texts = ((n, tokenizer.decode(ids[:n])) for n in range(len(ids) - 1, -1, -1))
    return next((n, before.removeprefix(text)) for n, text in texts if before.startswith(text))


# ---- self-refinement


def refine(
    sampler: Sampler,
    tokenizer: Tokenizer,
    messages_P: Sequence[list[dict]],
    *,
    rounds: int,
    max_new_tokens: int,
    seeds: Sequence[int],
    template_arguments: dict | None = None,
    **sampling,
) -> list[Found]:
    """Answer, then review and answer again `rounds` times; all answers of a prompt, the first one first.

    Each review sees the question, the last answer without its thinking, and REQUEST; each answer is what stands
    behind its own prompt. Where the next prompt would fill the context, the rounds of its question end. The answer is
    decoded and encoded again, as a chat template wants it. `template_arguments` go to the template, `sampling`
    (temperature, top_k, top_p) to Sampler.run.
    """
    context = sampler.model.config.max_position_embeddings

    def talk(messages: list[dict], seed: int) -> Session[Found]:
        found, shown = Found(), messages
        sample = in_turn(seed, found)
        for turn in range(rounds + 1):
            _, ids = render(shown, tokenizer, template_arguments)
            if turn and len(ids) >= context:
                break
            made = yield from sample(ids, max_new_tokens)
            found.completions.append(made)
            text = tokenizer.decode(made.ids, skip_special=True)
            last = after_thinking(text).strip() or text.strip()  # all of it if it was cut off while thinking
            shown = [*messages, {"role": "assistant", "content": last}, {"role": "user", "content": REQUEST}]
        found.scores = mean_logprob([], found.completions)
        return found

    sessions = [talk(messages, seed) for messages, seed in zip(messages_P, seeds, strict=True)]
    return sampler.run(sessions, stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size, **sampling)
