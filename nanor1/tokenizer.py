"""Text to token ids and back, from a Hugging Face `tokenizer.json`; chat templates; miniature vocabularies.

Two kinds of vocabulary are read and written, and nothing else: byte-level BPE (GPT-2, SmolLM2, Llama 3, Qwen2, Qwen3,
DeepSeek-R1-Distill) and words split on whitespace (the miniature models). tiktoken does the merging. The text is cut
into pieces by the `regex` package that tiktoken depends on rather than by tiktoken, because tiktoken's own splitter
overflows its stack on a megabyte of spaces, cannot cut in two stages (SmolLM2), and panics on a byte without a token.

Left out: SentencePiece (Unigram, byte fallback), WordPiece, padding, truncation, offsets, clean-up of spaces in
decoding, and post-processors: `encode` adds no beginning-of-text, whatever the file says (see `adds_bos`). Added tokens
are looked for before normalisation, whatever their `normalized` flag says. Characters newer than the reference's
Unicode tables may come out differently: combining marks from 2018 on (order in NFC), letters from 2025 on (pieces).

Sources: the file format is that of https://github.com/huggingface/tokenizers; byte-level BPE is Radford et al. 2019,
"Language Models are Unsupervised Multitask Learners", section 2.2.
"""

import codecs
import contextlib
import copy
import functools
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
import numpy as np
import regex
import tiktoken

# Kept byte for byte between loading and saving; the first two must exist. config.json belongs to the model.
_REQUIRED_FILES = ("tokenizer.json", "tokenizer_config.json")
_GENERATION = "generation_config.json"
_OPTIONAL_FILES = ("special_tokens_map.json", _GENERATION, "chat_template.jinja")

_PROBE = "7305"  # an answer that no template rewrites or writes by itself

# How GPT-2 cuts text: contractions, letters, digits, the rest (each with one space before), whitespace.
_GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """The vocabulary of a model folder: `encode`, `decode`, stop tokens and chat template.

    Attributes: `vocab_size` (largest id + 1: sample no id at or above it), `n_rows` (of the model's embedding, None
    where no config.json says), `eos_id`, `bos_id`, `pad_id` (None where absent), `declared_stop_ids` (sorted: those of
    generation_config.json, config.json and `eos_id`), `turn_end_id`, `stop_ids` (sorted: all of these; generation ends
    on any), `special_ids`, `adds_bos` (the model expects `bos_id` before plain text), `chat_template` (None where
    absent).

    >>> words = Tokenizer.from_words(["1", "+", "2", "="])
    >>> words.encode("1 + 2 ="), words.decode([0, 1, 2, 3, words.eos_id])
    ([0, 1, 2, 3], '1 + 2 = <|endoftext|>')
    """

    def __init__(self, files: dict[str, bytes], model_config: dict | None = None):
        """Build from the bytes of the files of a folder; `from_pretrained` is the usual way in."""
        self._files = files
        model_config = model_config or {}
        parsed = {name: _parse_json(text, name) for name, text in files.items() if name.endswith(".json")}
        tokenizer, config = (parsed[name] for name in _REQUIRED_FILES)
        added = tokenizer.get("added_tokens") or []
        model = tokenizer.get("model") or {}
        kind = model.get("type") or ("BPE" if "merges" in model else None)  # GPT-2's first file names no type
        if kind not in ("BPE", "WordLevel"):
            raise ValueError(f"tokenizer.json holds a {kind} model; supported are byte-level BPE and WordLevel")
        read = _ByteLevelModel if kind == "BPE" else _WordLevelModel
        self._model = read(tokenizer, {token["content"] for token in added})
        self._token_bytes = self._model.token_bytes | {token["id"]: token["content"].encode() for token in added}
        self._id_of_bytes = {token: i for i, token in self._token_bytes.items()}
        self._every_added = _AddedTokens(added)
        self._ordinary_added = _AddedTokens([token for token in added if not token["special"]])
        self.special_ids = frozenset(token["id"] for token in added if token["special"])
        self.vocab_size = max(self._token_bytes) + 1

        self._special_texts = _special_texts(parsed.get("special_tokens_map.json", {}) | config)
        self.bos_id, self.eos_id, self.pad_id = map(self._special_id, ("bos_token", "eos_token", "pad_token"))
        configs = ((parsed.get(_GENERATION, {}), _GENERATION), (model_config, "config.json"))
        stop_ids = {i for found in configs for i in _eos_ids(*found)}
        self.declared_stop_ids = tuple(sorted(stop_ids | ({self.eos_id} - {None})))
        # Llama 3's file would have its beginning-of-text before plain text.
        starts = _steps(tokenizer.get("post_processor"), "processors")
        starts = [step["single"][0] for step in starts if step["type"] == "TemplateProcessing"]
        self.adds_bos = bool(config.get("add_bos_token")) or any("SpecialToken" in start for start in starts)
        self.n_rows = model_config.get("vocab_size")
        if self.n_rows is not None and type(self.n_rows) is not int:
            raise ValueError(f"config.json has vocab_size {self.n_rows!r:.60}; expected a whole number")
        self._without_row = frozenset(i for i in self._token_bytes if self.n_rows and i >= self.n_rows)
        if self.adds_bos and self.bos_id is not None:
            self.check_rows([self.bos_id])  # it stands in every text
        self.chat_template = config.get("chat_template")  # a template, or several with names
        if isinstance(self.chat_template, list):
            named = {one.get("name"): one.get("template") for one in reversed(self.chat_template)}
            self.chat_template = named.get("default")
        if files.get("chat_template.jinja"):
            self.chat_template = files["chat_template.jinja"].decode()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Load the tokenizer of a Hugging Face model folder; ValueError says which file is missing or unsupported.

        The last ones are remembered by their files' bytes: a script that asks twice, as of which miniature a folder
        is, gets the same object.
        """
        folder = Path(folder)
        present = [name for name in _REQUIRED_FILES + _OPTIONAL_FILES if (folder / name).is_file()]
        if missing := [name for name in _REQUIRED_FILES if name not in present]:
            needed = " and ".join(_REQUIRED_FILES)
            raise ValueError(
                f"{folder} has no {missing[0]}: give a folder with {needed} (SentencePiece is unsupported)"
            )
        try:
            files = tuple((name, (folder / name).read_bytes()) for name in present)
            config_path = folder / "config.json"
            return _build(files, config_path.read_bytes() if config_path.is_file() else b"{}")
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the tokenizer of {folder}: {error}") from error

    @classmethod
    def from_words(cls, words: Iterable[str], eos: str = "<|endoftext|>") -> "Tokenizer":
        """A vocabulary of whitespace-separated words, numbered in their order, and behind them its end of text.

        Raises ValueError for a repeated word or one with whitespace in it; `encode` does for an unknown word.
        """
        words = [*words, eos]
        if bad := [word for word in words if word.split() != [word]]:
            raise ValueError(f"{bad[0]!r} cannot be one word of a vocabulary: words are split on whitespace")
        ids = {word: i for i, word in enumerate(words)}
        if repeated := [word for i, word in enumerate(words) if ids[word] != i]:
            raise ValueError(f"{repeated[0]!r} is in the vocabulary twice: every word needs its own id")
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = [{"id": ids.pop(eos), "content": eos} | flags]
        tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
        tokenizer |= {"post_processor": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": None}
        tokenizer["model"] = {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": eos}
        contents = zip(_REQUIRED_FILES, (tokenizer, config), strict=True)
        return cls({name: json.dumps(content, ensure_ascii=False, indent=1).encode() for name, content in contents})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files this tokenizer was loaded from, unchanged, into `folder`, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`; special tokens written in it become their ids only where `allow_special`.

        Added tokens that are not special (Qwen3's `<think>`) always become their ids, as in the reference. ValueError
        for a token without a row in the model's embedding.
        """
        ids = []
        for plain, added_id in (self._every_added if allow_special else self._ordinary_added).split(text):
            ids += self._model.encode(plain)
            if added_id is not None:
                ids.append(added_id)
        self.check_rows(ids)
        return ids

    def check_rows(self, ids: Sequence[int]) -> None:
        """ValueError for an id for which the model's embedding has no row; a token that is never used may have none."""
        if self._without_row and not self._without_row.isdisjoint(ids):
            i = next(i for i in ids if i in self._without_row)
            raise ValueError(
                f"the token {self.decode([i])!r} has id {i}, but the model's embedding has {self.n_rows} rows "
                "(vocab_size in config.json): leave it out of the text or of tokenizer.json, or give a larger model"
            )

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. ValueError for an id without a token."""
        kept = (i for i in ids if not (skip_special and i in self.special_ids))
        return self._model.separator.join(map(self._bytes_of, kept)).decode(errors="replace")

    def stream(self) -> "StreamDecoder":
        """An incremental decoder: push ids one at a time, print what comes back."""
        return StreamDecoder(self)

    def token_id(self, text: str) -> int | None:
        """Id of the one token that decodes to exactly `text`, or None."""
        return self._id_of_bytes.get(text.encode())

    def token_text(self, token_id: int) -> str | None:
        """Text of one id, or None where there is no such token."""
        return self.decode([token_id]) if token_id in self._token_bytes else None

    def apply_chat_template(
        self, messages: list[dict], add_generation_prompt: bool = False, **template_arguments: object
    ) -> str:
        """Render `messages` ({"role", "content"} each) as the model was taught; encode it with `allow_special=True`.

        A special token written inside a message is then one too, as in the reference: strip untrusted text first.
        Raises ValueError where the folder has no template or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template: pass plain text, or add chat_template.jinja")
        variables = {"tools": None, "documents": None} | self._special_texts | template_arguments
        try:
            return self._compiled_template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # a template computes: `''.split('')` raises what Python raises
            raise ValueError(f"the chat template cannot render these messages: {error}") from error

    @functools.cached_property
    def turn_end_id(self) -> int | None:
        """The added token, special or not, that the chat template writes behind an answer; None if it writes none.

        It is there whether or not another question follows: what opens the next turn ends none. Where the template
        renders only one of the two, it is what stands behind the answer there, without what opens a first question.
        None too without a template, and where it cannot render questions and answers.
        """
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}
        texts = []
        for chat in ([question, answer], [question, answer, question]):
            with contextlib.suppress(ValueError):  # as of templates that want a question last
                texts.append(self.apply_chat_template(chat).partition(_PROBE)[2])
        if not texts:
            return None
        behind = os.path.commonprefix(texts)
        if len(texts) == 1 and "?" in behind:
            opening = self.apply_chat_template([question]).rpartition("?")[0]
            behind = behind.rpartition("?")[0]
            behind = behind[: len(behind) - len(os.path.commonprefix([behind[::-1], opening[::-1]]))]
        return next(self._every_added.split(behind))[1]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(sorted({*self.declared_stop_ids, self.turn_end_id} - {None}))

    @property
    def ends_turns(self) -> bool:
        """Whether the folder's own stops hold the end of a turn; a base model that merely has a template does not."""
        return self.turn_end_id in self.declared_stop_ids

    def with_stop(self, token_id: int) -> "Tokenizer":
        """The same tokenizer, whose saved generation_config.json ends generation on `token_id` too."""
        self._bytes_of(token_id)  # refuses what is no token
        written = _parse_json(self._files.get(_GENERATION, b"{}"), _GENERATION)
        ids = [*dict.fromkeys([*_eos_ids(written, _GENERATION), *self.declared_stop_ids, token_id])]
        made = copy.copy(self)
        made._files = self._files | {_GENERATION: json.dumps(written | {"eos_token_id": ids}, indent=2).encode()}
        made.declared_stop_ids = tuple(sorted(ids))
        return made

    @functools.cached_property
    def template_parameters(self) -> frozenset[str]:
        """Names of the variables that the chat template reads (Qwen3: "enable_thinking") and that it may be given.

        Left out are the messages and the special tokens, which it is given anyway.
        """
        try:
            syntax = _template_environment().parse(self.chat_template or "")
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template cannot be read: {error}") from error
        given = {"messages", "add_generation_prompt", *self._special_texts}
        return frozenset(jinja2.meta.find_undeclared_variables(syntax) - given)

    @functools.cached_property
    def _compiled_template(self) -> jinja2.Template:
        return _template_environment().from_string(self.chat_template)

    def _special_id(self, name: str) -> int | None:
        text = self._special_texts.get(name)
        if text is not None and self.token_id(text) is None:
            raise ValueError(f"tokenizer_config.json names {text!r} as {name}, which tokenizer.json does not hold")
        return None if text is None else self.token_id(text)

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id not in self._token_bytes:
            raise ValueError(f"{token_id} is no token id: the vocabulary has ids from 0 to {self.vocab_size - 1}")
        return self._token_bytes[token_id]


@functools.lru_cache(maxsize=2)
def _build(files: tuple[tuple[str, bytes], ...], config: bytes) -> Tokenizer:
    return Tokenizer(dict(files), _parse_json(config, "config.json"))


class StreamDecoder:
    """Text as its ids arrive: a character split over tokens is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._separator = b""

    def push(self, token_id: int) -> str:
        """The text that this id completes, often all of its own, sometimes none."""
        text = self._utf8.decode(self._separator + self._tokenizer._bytes_of(token_id))
        self._separator = self._tokenizer._model.separator
        return text

    def flush(self) -> str:
        """What is still held back, as U+FFFD; the decoder is then as new."""
        self._separator = b""
        return self._utf8.decode(b"", final=True)


class _AddedTokens:
    """Finds added tokens in text, each with its flags: eats whitespace left or right, stands alone as a word."""

    def __init__(self, tokens: list[dict]):
        longest_first = sorted(tokens, key=lambda token: -len(token["content"]))
        self._ids = [token["id"] for token in longest_first]
        self._pattern = re.compile("|".join(map(self._token_pattern, longest_first)))

    @staticmethod
    def _token_pattern(token: dict) -> str:
        left = (r"\s*" if token.get("lstrip") else "") + (r"(?<!\w)" if token.get("single_word") else "")
        right = (r"(?!\w)" if token.get("single_word") else "") + (r"\s*" if token.get("rstrip") else "")
        return f"{left}({re.escape(token['content'])}){right}"

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Pairs of plain text and the added token after it; the last pair has none."""
        start = 0
        for match in self._pattern.finditer(text) if self._ids else ():
            yield text[start : match.start()], self._ids[match.lastindex - 1]
            start = match.end()
        yield text[start:], None


class _ByteLevelModel:
    """Byte-level BPE: normalise, cut into pieces, merge bytes within each piece."""

    separator = b""

    def __init__(self, tokenizer: dict, added_texts: set[str]):
        model = tokenizer["model"]
        for option in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise ValueError(
                    f"tokenizer.json sets {option}={model[option]!r}; only plain byte-level BPE is supported"
                )
        steps = [step["type"] for step in _steps(tokenizer.get("normalizer"), "normalizers")]
        if unsupported := [step for step in steps if step not in ("NFC", "NFD", "NFKC", "NFKD")]:
            raise ValueError(
                f"tokenizer.json has the normalizer {unsupported[0]}; only Unicode normal forms are supported"
            )
        self._forms = steps
        self._splitters = _splitters(_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
        ids = {text: i for text, i in model["vocab"].items() if text not in added_texts}
        alphabet = _byte_of_character()
        try:
            self.token_bytes = {i: bytes(alphabet[c] for c in token) for token, i in ids.items()}
        except KeyError as error:
            raise ValueError(f"tokenizer.json is not byte-level: a token holds the character {error}") from error
        ranks = {token: i for i, token in self.token_bytes.items()}
        # SmolLM2 has no token for 21 bytes. The reference drops them from a piece before it merges.
        self._missing = bytes(b for b in range(256) if bytes([b]) not in ranks)
        if self._missing and model.get("unk_token"):
            raise ValueError(f"bytes {self._missing!r} have no token and would become {model['unk_token']!r}")
        # A dropped byte leaves less than the piece that the reference looks up whole.
        _check_ids_are_ranks(ids, model["merges"], takes_whole=bool(model.get("ignore_merges")) and not self._missing)
        self._bpe = tiktoken.Encoding("", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
        self._piece_ids = functools.lru_cache(maxsize=2**16)(self._merge)

    def encode(self, text: str) -> list[int]:
        for form in self._forms:
            text = unicodedata.normalize(form, text)
        pieces = [text]
        for splitter in self._splitters:
            pieces = [part for piece in pieces for part in splitter.split(piece) if part]
        return list(itertools.chain.from_iterable(map(self._piece_ids, pieces)))

    def _merge(self, piece: str) -> list[int]:
        piece_bytes = piece.encode().translate(None, self._missing)
        # tiktoken's public methods take no bytes, and what is left of a dropped byte's character is no text.
        return self._bpe._encode_single_piece(piece_bytes) if piece_bytes else []


class _WordLevelModel:
    """One id a word; words are split on whitespace and joined with single spaces."""

    separator = b" "

    def __init__(self, tokenizer: dict, added_texts: set[str]):
        if tokenizer.get("normalizer") or (tokenizer.get("pre_tokenizer") or {}).get("type") != "WhitespaceSplit":
            raise ValueError("a WordLevel model is supported with pre-tokenizer WhitespaceSplit and no normalizer only")
        self._ids = {text: i for text, i in tokenizer["model"]["vocab"].items() if text not in added_texts}
        self.token_bytes = {i: text.encode() for text, i in self._ids.items()}

    def encode(self, text: str) -> list[int]:
        words = text.split()
        if unknown := [word for word in words if word not in self._ids]:
            raise ValueError(f"the word {unknown[0]!r} is not in this vocabulary of {len(self._ids)} words")
        return [self._ids[word] for word in words]


def _check_ids_are_ranks(ids: dict[str, int], merges: list, takes_whole: bool) -> None:
    """Refuse merges that tiktoken, which is told the tokens and their ids alone, would not follow.

    The file merges listed pairs, the first listed first. tiktoken merges any neighbours that make a token, the lowest
    id first, and takes a piece that is a token at once; the file does that only where it `takes_whole` (Llama 3).
    The two give the same ids if the products' ids do not fall along the list, and each token's bytes are merged into
    that one token by the file: then any neighbours that tiktoken merges are the listed pair that makes their token.
    Where the file takes whole pieces, a token may fail that of which all pairs that would make it are listed.
    """
    if len(set(ids.values())) < len(ids):
        raise ValueError("tokenizer.json gives two tokens the same id")
    lefts, rights, products, sizes = [], [], [], []  # not one list of tuples: the garbage collector would visit each
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        text = left + right
        try:
            products.append(ids[text])
            lefts.append(ids[left])
            rights.append(ids[right])
        except KeyError as error:
            raise ValueError(
                f"tokenizer.json merges {left!r} and {right!r}, but {error} is no token or an added one"
            ) from None
        sizes.append(len(text))
    left_R, right_R, product_R, size_R = (np.array(column, np.int64) for column in (lefts, rights, products, sizes))
    if (np.diff(product_R) < 0).any():
        raise ValueError("the order of merges in tokenizer.json is not that of the token ids, which tiktoken needs")
    made_at = np.full(max(ids.values(), default=0) + 1, len(merges))
    made_at[[i for text, i in ids.items() if len(text) == 1]] = -1
    _find_merges_that_happen(left_R, right_R, product_R, size_R, made_at)
    base, never_made = len(made_at), made_at == len(merges)
    pairs = set((left_R * base + right_R).tolist()) if takes_whole and never_made.any() else set()
    for text in [text for text, i in ids.items() if never_made[i]]:
        splits = [(ids.get(text[:n]), ids.get(text[n:])) for n in range(1, len(text))]
        if not takes_whole or any(None not in (x, y) and x * base + y not in pairs for x, y in splits):
            raise ValueError(
                f"the order of merges in tokenizer.json does not make {text!r} of its bytes; tiktoken would"
            )


def _find_merges_that_happen(
    left_R: np.ndarray, right_R: np.ndarray, product_R: np.ndarray, size_R: np.ndarray, made_at: np.ndarray
) -> None:
    """Enter into `made_at[id]`, -1 for bytes and else R, the rank of the merge that makes a token of its own bytes.

    The R merges are given by rank, with the sizes of what they make. A pair makes its token unless one at the end of
    left and one at the start of right were merged before. Which two stand there at a time is found by going back in
    time: the later made of both gives way to its inner part. A token made of later ones keeps R: what happens then is
    not in the order of ranks.
    """
    n_merges, base = len(left_R), len(made_at)
    # at the seam: the right part of left, the left of right
    part_of_left, part_of_right = np.zeros((2, base), np.int64)
    by_pair = np.argsort(left_R * base + right_R, kind="stable")
    sorted_pairs = (left_R * base + right_R)[by_pair]
    by_size = np.argsort(size_R, kind="stable")
    # parts are shorter than what they make
    for rank in np.split(by_size, np.flatnonzero(np.diff(size_R[by_size])) + 1):
        rank = rank[np.maximum(made_at[left_R[rank]], made_at[right_R[rank]]) < rank]
        x, y, x_end = left_R[rank], right_R[rank], np.full(len(rank), n_merges)
        y_end = x_end  # until when x and y stand there
        while len(rank):
            x_start, y_start = made_at[x], made_at[y]
            happens = np.maximum(x_start, y_start) < 0
            if happens.any():
                made = product_R[rank[happens]]
                made_at[made] = rank[happens]
                part_of_left[made], part_of_right[made] = right_R[rank[happens]], left_R[rank[happens]]
            goes_x = x_start > y_start  # of two equal neighbours the left one is made first
            x, x_end = np.where(goes_x, (part_of_left[x], x_start), (x, x_end))
            y, y_end = np.where(goes_x, (y, y_end), (part_of_right[y], y_start))
            at = np.searchsorted(sorted_pairs, x * base + y, side="right") - 1  # of equal pairs the last counts
            crossing = np.where(sorted_pairs[at] == x * base + y, by_pair[at], n_merges)
            # of equal ones the left is first
            keep = ~happens & ~((crossing < x_end) & (crossing <= y_end) & (crossing < n_merges))
            rank, x, y, x_end, y_end = rank[keep], x[keep], y[keep], x_end[keep], y_end[keep]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte stands for itself, the n-th other one is written as U+0100 + n."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _steps(stage: dict | None, name: str) -> list[dict]:
    """The steps of a part of tokenizer.json: none, itself, or those that it lists under a name."""
    return stage.get(name, [stage]) if stage else []


def _splitters(stages: list[dict]) -> list[regex.Pattern]:
    """One pattern a pre-tokenization stage; each cuts the pieces of the stage before it."""
    if not stages or stages[-1].get("type") != "ByteLevel":
        raise ValueError("tokenizer.json is not byte-level: its pre-tokenizer does not end in ByteLevel")
    # The one group makes split() return the matches too, beside the text between them.
    return [regex.compile(f"({pattern})") for pattern in map(_stage_pattern, stages) if pattern is not None]


def _stage_pattern(stage: dict) -> str | None:
    match stage:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return _GPT2_PIECES if stage.get("use_regex", True) else None
        case {"type": "Digits"}:
            return r"\p{N}" if stage["individual_digits"] else r"\p{N}+"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern
    raise ValueError(f"tokenizer.json has an unsupported pre-tokenizer: {stage}")


def _parse_json(content: bytes, name: str) -> dict:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds no JSON object but {found!r:.60}; download it again")
    return found


def _special_texts(config: dict) -> dict[str, str]:
    """bos_token, eos_token and so on as text; older files hold each as text, newer ones as an object with flags."""
    tokens = {name: token for name, token in config.items() if name.endswith("_token") and token}
    texts = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _eos_ids(config: dict, name: str) -> list[int]:
    found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(i) is not int for i in ids):
        raise ValueError(f"{name} has eos_token_id {found!r:.60}; expected a token id, a list of them, or null")
    return ids


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks a template's assistant text for loss masks; here it only has to render its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _template_environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # jinja's own escapes HTML
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda time_format: datetime.now().strftime(time_format)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def check_same_vocabulary(one: Tokenizer, other: Tokenizer, why: str) -> None:
    """Raise ValueError unless every id is the same token to both (bytes that are no whole characters look alike).

    `why` opens the message: what needs one vocabulary.
    """
    for i in range(max(one.vocab_size, other.vocab_size)):
        if (first := one.token_text(i)) != (second := other.token_text(i)):
            raise ValueError(
                f"{why}, and these two models have different vocabularies ({one.vocab_size} and {other.vocab_size} "
                f"tokens; first difference at id {i}: {first!r} and {second!r})"
            )
