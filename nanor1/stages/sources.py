"""The files that train_sft.py learns from: examples or pairs, with their weights, and what is held out of them."""

import random
from collections.abc import Callable

from nanor1.stages import reward_model, sft
from nanor1.tasks.prompts import read_arguments
from nanor1.tokenizer import Tokenizer

LEFT_OUT = {  # what a file's reader counts, in words
    "n_too_long": "longer than {max_tokens} tokens left out",
    "n_rewritten": "earlier answers without a loss, as the chat template rewrites them",
    "n_beside": "with thinking beside their messages, which is not learned: put it into the assistant's",
    "n_cut": "documents cut into pieces of {max_tokens} tokens",
    "n_equal": "left out whose two final answers are the same",
    "n_not_train": "to problems that are not for training (sample.py --split): evaluations meet them",
}


def read_sources(
    config, tokenizer: Tokenizer, max_tokens: int, say: Callable[[str], None]
) -> tuple[list[sft.Source], list]:
    """The files to train on with their weights, and the held-out items; says what was read and what left out."""
    sources, held_out, key = [], [], key_of(config.objective)
    if config.eval_data:
        held_out, note = read(config, config.eval_data, tokenizer, max_tokens)
        say(f"held out: {config.eval_data}: {note}")
    keys = {str(key(item)) for item in held_out}
    for path, weight in sft.parse_data(config.data):
        items, note = read(config, path, tokenizer, max_tokens)
        say(f"data: {path}: {note}" + (f"; weight {weight:g}" if weight != 1 else ""))
        if config.eval_data:
            n_read, items = len(items), [item for item in items if str(key(item)) not in keys]
            if n_read > len(items):
                say(f"data: {path}: {n_read - len(items)} left out, whose questions are in {config.eval_data}")
        else:
            items, out = sft.split(items, config.held_out, key)
            held_out += out
        if not items:
            raise ValueError(f"{path}: all of it is held out; lower --held-out, or give another --eval-data")
        sources.append((items, weight))
    n = min(len(held_out), config.eval_examples)
    say(f"held out: {n} of {len(held_out)}" if n else "nothing is held out: no evaluation")
    return sources, random.Random("held out").sample(held_out, n)  # of all files, for every seed the same


def read(config, path: str, tokenizer: Tokenizer, max_tokens: int) -> tuple[list, str]:
    """The examples, or pairs, of a file; and how many they are of what, and what was left out."""
    chats = dict(template_arguments=read_arguments(config, tokenizer), system=config.system)
    if config.objective == "preference":
        found = reward_model.read_pairs(path, tokenizer, max_tokens, **chats)
        items, counts = found.examples, [f"{len(found.examples):,} pairs"]
    elif config.objective == "text":
        found = sft.read_text(path, tokenizer, max_tokens)
        items, n_tokens = found.examples, sum(len(example.ids) for example in found.examples)
        counts = [f"{len(items):,} examples", f"{n_tokens:,} tokens"]
    else:
        found = sft.read_examples(path, tokenizer, max_tokens, **chats)
        items, n_tokens = found.examples, sum(sum(example.is_target) for example in found.examples)
        counts = [f"{len(items):,} examples", f"{n_tokens:,} tokens to learn"]
    left_out = {text.format(max_tokens=max_tokens): getattr(found, name) for name, text in LEFT_OUT.items()}
    return items, ", ".join(counts + [f"{n:,} {text}" for text, n in left_out.items() if n])


def key_of(objective: str) -> Callable:
    """Items of one key are held out together, or not at all: all answers to a question."""
    return (lambda pair: pair.question or pair.prompt_ids) if objective == "preference" else sft.question
