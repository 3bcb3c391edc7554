"""Tokenizers for tests: bytes or words, with the special tokens and the chat template that a test is about."""

import json

from nanor1.tokenizer import Tokenizer, _byte_of_character

END = "<|endoftext|>"


def of_words(words, *, eos=END, pad=None, specials=(), chat_template=None, **parts):
    """Words as of `Tokenizer.from_words`, then the special tokens; `parts` replace those of tokenizer.json."""
    words = list(words)
    files = {name: json.loads(content) for name, content in Tokenizer.from_words(words, eos)._files.items()}
    tokenizer, config = files["tokenizer.json"], files["tokenizer_config.json"]
    special_texts = dict.fromkeys([eos, *([pad] if pad else []), *specials])
    flags = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] = [flags | {"id": len(words) + n, "content": s} for n, s in enumerate(special_texts)]
    tokenizer |= parts
    config |= {name: v for name, v in (("pad_token", pad), ("chat_template", chat_template)) if v is not None}
    return Tokenizer({name: json.dumps(content).encode() for name, content in files.items()})


def of_bytes(**options):
    """The 256 bytes, each its own id, then the special tokens of `options`, which are those of `of_words`."""
    ids = dict(sorted(_byte_of_character().items(), key=lambda item: item[1]))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": ids, "merges": []}
    return of_words(ids, model=model, pre_tokenizer=byte_level, decoder=byte_level, **options)
