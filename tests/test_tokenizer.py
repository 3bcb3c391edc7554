"""The tokenizer against recorded ids, against transformers, and by hand on miniature vocabularies."""

import functools
import itertools
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import of_bytes, of_words

from nanor1.tokenizer import Tokenizer

SHARED = os.environ.get("NANOR1_SHARED")
MODELS = os.environ.get("NANOR1_MODELS")
needs_conformance = pytest.mark.skipif(not SHARED, reason="NANOR1_SHARED (folder with conformance/) is not set")

END = "<|endoftext|>"
WORDS = ["1", "2", "+", "=", "<think>", "</think>", "<answer>", "</answer>", "naïve"]
BYTES = of_bytes()


def conformance(name: str) -> Path:
    return Path(SHARED or ".") / "conformance" / name


def json_lines(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:  # not splitlines(): the texts hold other line separators
        return [json.loads(line) for line in lines]


@functools.cache
def pretrained(model: str) -> Tokenizer:
    return Tokenizer.from_pretrained(conformance(f"tokenizers/{model}"))


def edited_folder(folder: Path, tokenizer: Tokenizer, file_name: str = "tokenizer.json", **changes: object) -> Path:
    """Save `tokenizer` to `folder` and overwrite top-level keys of one of its JSON files."""
    tokenizer.save_pretrained(folder)
    path = folder / file_name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))
    return folder


def byte_model(remove: str = "", merges: tuple[str, ...] = (), **options: object) -> dict:
    """The "model" entry of a byte vocabulary with some bytes removed and some pairs (written "ab") merged."""
    model = json.loads(BYTES._files["tokenizer.json"])["model"]
    vocab = {token: i for token, i in model["vocab"].items() if token not in remove}
    vocab |= {pair: 1000 + n for n, pair in enumerate(merges)}
    return model | {"vocab": vocab, "merges": [list(pair) for pair in merges]} | options


def reference(folder: Path) -> object:
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_example_in_docstring():
    words = Tokenizer.from_words(["1", "+", "2", "="])
    assert words.encode("1 + 2 =") == [0, 1, 2, 3]
    assert words.decode([0, 1, 2, 3, words.eos_id]) == "1 + 2 = <|endoftext|>"


# Recorded ids of four families.


@needs_conformance
@pytest.mark.parametrize("model", ["gpt2", "llama3", "qwen3", "smollm2"])
def test_ids_and_text_equal_the_reference_on_every_recorded_line(model):
    tokenizer, lines = pretrained(model), json_lines(conformance(f"tokenizer_{model}.jsonl"))
    assert len(lines) > 300
    for line in lines:
        text, ids = line["text"], line["ids"]
        assert tokenizer.encode(text, allow_special=True) == ids, line["id"]
        assert tokenizer.encode(text) == line.get("ids_specials_as_text", ids), line["id"]
        assert tokenizer.decode(ids) == line.get("decoded", text), line["id"]


@needs_conformance
@pytest.mark.parametrize(
    ("model", "expected"),  # vocab_size, bos_id, eos_id, pad_id, read off the files by eye
    [
        ("gpt2", (50257, 50256, 50256, None)),
        ("llama3", (128256, 128000, 128001, None)),
        ("qwen3", (151669, None, 151645, 151643)),
        ("smollm2", (49152, 1, 2, 2)),
    ],
)
def test_special_ids_are_those_of_the_files(model, expected):
    tokenizer = pretrained(model)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == expected
    assert tokenizer.declared_stop_ids == (tokenizer.eos_id,)
    assert tokenizer.stop_ids == tuple(sorted({tokenizer.eos_id, tokenizer.turn_end_id} - {None}))
    assert tokenizer.eos_id in tokenizer.special_ids


@needs_conformance
def test_ordinary_added_tokens_are_found_in_plain_text_and_special_ones_are_not():
    ids = pretrained("qwen3").encode("<think>a</think><|im_end|>")
    assert ids[:3] == [151667, 64, 151668] and 151645 not in ids


@needs_conformance
@pytest.mark.parametrize(
    "text", ["a" * 10**6, " " * 10**6 + "a", "\n" * 10**6, "7" * 10**6], ids=["letters", "spaces", "lines", "digits"]
)
def test_a_megabyte_of_one_character_is_encoded_whole(text):
    tokenizer = pretrained("gpt2")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@needs_conformance
@pytest.mark.parametrize("model", ["gpt2", "smollm2"])
def test_saving_keeps_every_byte_and_loading_again_gives_the_same_ids(model, tmp_path):
    pretrained(model).save_pretrained(tmp_path / "copy")
    for source in conformance(f"tokenizers/{model}").iterdir():
        assert (tmp_path / "copy" / source.name).read_bytes() == source.read_bytes()
    text = "naïve 日本 12345 \U0001f469‍\U0001f680"
    assert Tokenizer.from_pretrained(tmp_path / "copy").encode(text) == pretrained(model).encode(text)


# Streams.


@given(st.lists(st.integers(0, 256)))
def test_streamed_text_equals_text_decoded_at_once(ids):
    stream = BYTES.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == BYTES.decode(ids)


@needs_conformance
def test_streamed_text_equals_decoded_text_on_a_real_vocabulary():
    tokenizer, stream = pretrained("qwen3"), pretrained("qwen3").stream()
    ids = random.Random(0).choices(range(tokenizer.vocab_size), k=20_000)
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_stream_holds_a_character_back_until_it_is_whole():
    stream = BYTES.stream()
    assert [stream.push(byte) for byte in "é€".encode()] == ["", "é", "", "", "€"]
    assert stream.push(0xC3) == "" and stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.push(ord("a")) == "a"


def test_stream_of_words_puts_single_spaces_between_them():
    stream = Tokenizer.from_words(WORDS).stream()
    assert [stream.push(i) for i in [0, 2, 1]] == ["1", " +", " 2"]


# Bytes.


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_encode_to_themselves_and_back(text):
    assert BYTES.encode(text) == list(text.encode())
    assert BYTES.decode(BYTES.encode(text)) == text


def test_special_tokens_in_user_text_are_plain_text_unless_allowed():
    assert BYTES.encode(f"a{END}b") == list(f"a{END}b".encode())
    assert BYTES.encode(f"a{END}b", allow_special=True) == [97, 256, 98]
    assert BYTES.decode([97, 256, 98]) == f"a{END}b"
    assert BYTES.decode([97, 256, 98], skip_special=True) == "ab"


def test_token_id_finds_a_token_by_its_text():
    assert (BYTES.token_id("a"), BYTES.token_id(END), BYTES.token_id("ab")) == (97, 256, None)


def test_a_byte_without_a_token_is_dropped_before_merging(tmp_path):
    folder = edited_folder(tmp_path, BYTES, model=byte_model(remove="Ą", merges=("..",)))  # Ą stands for byte 4
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode(".\x04.") == [1000]
    assert tokenizer.encode("\x04") == []
    assert tokenizer.encode(".\x04.") == reference(folder).encode(".\x04.").ids


def test_digits_stage_cuts_before_the_main_pattern(tmp_path):
    byte_level = json.loads(BYTES._files["tokenizer.json"])["pre_tokenizer"]
    model = byte_model(merges=("12",))
    assert Tokenizer.from_pretrained(edited_folder(tmp_path, BYTES, model=model)).encode("12") == [1000]
    stages = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]}
    folder = edited_folder(tmp_path, BYTES, model=model, pre_tokenizer=stages)
    assert Tokenizer.from_pretrained(folder).encode("12") == [49, 50]


def test_text_is_normalised_when_the_file_says_so(tmp_path):
    folder = edited_folder(tmp_path, BYTES, normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]})
    assert Tokenizer.from_pretrained(folder).encode("e\N{COMBINING ACUTE ACCENT}") == list("é".encode())


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "special"])
def test_flags_of_added_tokens_act_as_in_the_reference(flag, tmp_path):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added = [{"id": 256 + n, "content": text} | flags | {flag: True} for n, text in enumerate(["TOK", "TOKEN"])]
    folder = edited_folder(tmp_path, BYTES, added_tokens=added)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "TOK"}')
    tokenizer, hf = Tokenizer.from_pretrained(folder), reference(folder)
    for text in ["a  TOK  b", "aTOKb", "TOKEN", " TOK", "TOK \n", "TOKTOK TOKENS", "é TOK", "."]:
        for hf.encode_special_tokens in (False, True):  # True: special tokens in the text are plain text
            ids = tokenizer.encode(text, allow_special=not hf.encode_special_tokens)
            assert ids == hf.encode(text, add_special_tokens=False).ids, text


# Words.


def test_words_number_in_order_and_only_end_of_text_is_special():
    words = of_words(WORDS, pad="<pad>")
    assert words.encode(" <think> 1 +\n2 </think>") == [4, 0, 2, 1, 5]
    assert words.decode([4, 0, 2, 1, 5, 9, 10]) == f"<think> 1 + 2 </think> {END} <pad>"
    assert (words.eos_id, words.pad_id, words.vocab_size) == (9, 10, 11)
    assert words.special_ids == {9, 10} and words.stop_ids == (9,)
    assert words.decode([4, 9], skip_special=True) == "<think>"


@pytest.mark.parametrize(
    "tokenizer",
    [of_words(WORDS, pad="<pad>", specials=["<s>"], chat_template="{{ messages[0].content }}"), BYTES],
    ids=["words", "bytes"],
)
def test_miniature_vocabularies_load_again_here_and_in_transformers_with_equal_ids(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(tmp_path)
    ours = Tokenizer.from_pretrained(tmp_path)
    text = f"<think> 1 + 2 </think> naïve{END}"
    ids = tokenizer.encode(text, allow_special=True)
    assert ids[-1] == tokenizer.eos_id
    assert ours.encode(text, allow_special=True) == ids
    assert (ours.eos_id, ours.pad_id, ours.chat_template) == (
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.chat_template,
    )
    for loader in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        hf = loader.from_pretrained(tmp_path)
        assert hf.encode(text, add_special_tokens=False) == ids
        assert hf.decode(ids) == tokenizer.decode(ids)
        assert (hf.eos_token_id, hf.pad_token_id, len(hf)) == (ours.eos_id, ours.pad_id, ours.vocab_size)


def test_unknown_repeated_and_split_words_are_refused_by_name():
    with pytest.raises(ValueError, match="'seven' is not in this vocabulary of 9 words"):
        Tokenizer.from_words(WORDS).encode("1 + seven")
    with pytest.raises(ValueError, match="'1' is in the vocabulary twice"):
        Tokenizer.from_words(["1", "2", "1"])
    with pytest.raises(ValueError, match="'=' is in the vocabulary twice"):
        Tokenizer.from_words(WORDS, eos="=")
    with pytest.raises(ValueError, match="'a b' cannot be one word"):
        Tokenizer.from_words(["a b"])


# Stop tokens.


def test_stop_ids_join_the_tokenizer_and_both_configs(tmp_path):
    folder = edited_folder(tmp_path, BYTES, "generation_config.json", eos_token_id=[7, 3])
    edited_folder(tmp_path, BYTES, "config.json", eos_token_id=99)
    loaded = Tokenizer.from_pretrained(folder)
    assert (loaded.stop_ids, loaded.eos_id) == ((3, 7, 99, 256), 256)
    loaded.save_pretrained(tmp_path / "copy")  # config.json is the model's to save
    assert Tokenizer.from_pretrained(tmp_path / "copy").stop_ids == (3, 7, 256)


def test_stop_ids_may_stand_in_the_model_config_alone_and_need_have_no_token(tmp_path):
    edited_folder(tmp_path, BYTES, "tokenizer_config.json", eos_token=None)
    (tmp_path / "config.json").write_text('{"eos_token_id": [99, 9999]}')
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert (loaded.stop_ids, loaded.eos_id) == ((99, 9999), None)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["<|endoftext|>", [1, "2"], 2.0, True, {"id": 3}])
def test_stop_ids_that_are_no_ids_are_refused_in_one_line(name, value, tmp_path):
    edited_folder(tmp_path, BYTES, name, eos_token_id=value)
    with pytest.raises(ValueError, match=r"config\.json has eos_token_id .*; expected a token id, a list") as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


START, STOP = "<|im_start|>", "<|im_end|>"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
STRIPPING = TURNS.replace("m.content", "m.content.split('</think>')[-1].strip()")
ALTERNATING = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + TURNS


def chat_folder(folder: Path, template: object, **stops: object) -> Path:
    """Bytes, <|endoftext|> (256, the tokenizer's own), <|im_start|> (257), <|im_end|> (258), and a template."""
    tokenizer = of_bytes(specials=[START, STOP])
    edited_folder(folder, tokenizer, "tokenizer_config.json", chat_template=template)
    return edited_folder(folder, Tokenizer.from_pretrained(folder), "generation_config.json", **stops)


@pytest.mark.parametrize("template", [TURNS, STRIPPING, ALTERNATING, TURNS.replace("<|im_end|>", " . <|im_end|>")])
def test_the_token_that_the_template_writes_behind_an_answer_is_a_stop(template, tmp_path):
    loaded = Tokenizer.from_pretrained(chat_folder(tmp_path, template, eos_token_id=256))
    assert (loaded.turn_end_id, loaded.stop_ids, loaded.declared_stop_ids) == (258, (256, 258), (256,))
    assert not loaded.ends_turns and loaded.eos_id == 256


def test_an_end_of_turn_need_not_be_special_and_the_default_of_several_templates_counts(tmp_path):
    named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": TURNS}]
    chat_folder(tmp_path, named)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"][2]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_pretrained(tmp_path).turn_end_id == 258


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[-1].role != 'user' %}{{ raise_exception('a question comes last') }}{% endif %}" + TURNS,
        "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}" + TURNS,
    ],
)
def test_a_template_that_refuses_some_conversations_still_tells_its_end_of_turn(template, tmp_path):
    assert Tokenizer.from_pretrained(chat_folder(tmp_path, template)).turn_end_id == 258


def test_what_opens_a_question_ends_no_turn_where_a_question_has_to_come_last(tmp_path):
    template = (
        "{% if messages[-1].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '' }}{{ m.content }}{% endfor %}"
    )
    assert Tokenizer.from_pretrained(chat_folder(tmp_path, template)).turn_end_id is None


def test_among_words_too_the_template_ends_a_turn():
    template = "{% for m in messages %}{{ m.role }} : {{ m.content }} . <end> {% endfor %}"
    words = of_words(["."], specials=["<end>"], chat_template=template)
    assert (words.turn_end_id, words.stop_ids) == (2, (1, 2))


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ raise_exception('never') }}",
        "{{ messages[9].content }}",
        "{{ ''.split('') }}",
        "{{ 1 // 0 }}",
        7,
        [{"name": "rag", "template": TURNS}],
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "<|im_start|>",
        "{{ messages[0].content }}<|im_end|>",
    ],
)
def test_a_template_without_an_end_of_turn_or_at_fault_adds_no_stop(template, tmp_path):
    loaded = Tokenizer.from_pretrained(chat_folder(tmp_path, template, eos_token_id=[256]))
    assert (loaded.turn_end_id, loaded.stop_ids, loaded.ends_turns) == (None, (256,), False)


@pytest.mark.parametrize("before", [{}, {"eos_token_id": 256, "top_k": 20}, {"eos_token_id": [7], "top_k": 20}])
def test_a_stop_that_is_added_is_saved_beside_the_others(before, tmp_path):
    folder = chat_folder(tmp_path, TURNS, **before)
    if not before:
        (folder / "generation_config.json").unlink()
    loaded = Tokenizer.from_pretrained(folder)
    assert loaded.stop_ids and not loaded.ends_turns
    added = loaded.with_stop(loaded.turn_end_id)
    added.save_pretrained(tmp_path / "copy")
    again = Tokenizer.from_pretrained(tmp_path / "copy")
    for tokenizer in (added, again):
        assert tokenizer.ends_turns and tokenizer.stop_ids == (*([7] if 7 in loaded.stop_ids else []), 256, 258)
        assert tokenizer.encode("a<|im_end|>", allow_special=True) == [97, 258]
    saved = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert saved["eos_token_id"][-1] == 258 and saved | {"eos_token_id": 0} == before | {"eos_token_id": 0}
    assert not loaded.ends_turns and added.with_stop(258).stop_ids == added.stop_ids
    with pytest.raises(ValueError, match="300 is no token id"):
        loaded.with_stop(300)


@needs_conformance
@pytest.mark.parametrize(
    ("model", "end"), [("qwen3", "<|im_end|>"), ("smollm2", "<|im_end|>"), ("llama3", "<|eot_id|>")]
)
def test_real_templates_end_turns_with_the_token_that_their_models_were_taught(model, end):
    assert pretrained(model).turn_end_id == pretrained(model).token_id(end) in pretrained(model).stop_ids


# Tokens for which the model has no row.


def folder_with_rows(folder: Path, n_rows: int, **options: object) -> Path:
    of_bytes(specials=["<think>", "</think>"], **options).save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"][1:]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"vocab_size": n_rows}))
    return folder


def test_a_text_with_a_token_beyond_the_embedding_is_refused_in_one_line(tmp_path):
    loaded = Tokenizer.from_pretrained(folder_with_rows(tmp_path, 257))
    assert loaded.encode("a") == [97] and loaded.vocab_size == 259
    with pytest.raises(ValueError, match="'</think>' has id 258, but the model's embedding has 257 rows") as error:
        loaded.encode("a</think>")
    assert "\n" not in str(error.value)
    assert Tokenizer.from_pretrained(folder_with_rows(tmp_path, 259)).encode("a</think>") == [97, 258]


def test_a_beginning_of_text_beyond_the_embedding_is_refused_at_once(tmp_path):
    folder = edited_folder(folder_with_rows(tmp_path, 257), BYTES, "tokenizer_config.json")
    edited = {"bos_token": END, "add_bos_token": True, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(edited))
    (folder / "config.json").write_text('{"vocab_size": 256}')
    with pytest.raises(ValueError, match="has id 256, but the model's embedding has 256 rows"):
        Tokenizer.from_pretrained(folder)


def test_special_tokens_may_be_objects_or_stand_in_the_special_tokens_map(tmp_path):
    edited_folder(tmp_path, BYTES, "tokenizer_config.json", eos_token={"content": END, "lstrip": False})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": END}))
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_id, loaded.bos_id) == (256, 256)


def test_a_post_processor_that_puts_a_token_first_is_reported_and_not_applied(tmp_path):
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": END, "type_id": 0}}]}
    loaded = Tokenizer.from_pretrained(edited_folder(tmp_path, BYTES, post_processor=template))
    assert loaded.adds_bos and not BYTES.adds_bos
    assert loaded.encode("a", allow_special=True) == [97]


# What is refused.

METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
BACKWARD = byte_model(merges=("ab", "cd"))
BACKWARD["merges"].reverse()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "holds a Unigram model"),
        ({"model": byte_model(byte_fallback=True)}, "byte_fallback=True"),
        ({"model": byte_model(end_of_word_suffix="</w>")}, "end_of_word_suffix='</w>'"),
        ({"model": byte_model(remove="a", unk_token="?")}, r"bytes b'a' have no token and would become '\?'"),
        ({"model": byte_model() | {"vocab": {"▁a": 0}}}, "not byte-level: a token holds the character '▁'"),
        ({"model": BACKWARD}, "order of merges"),
        ({"model": byte_model(merges=("ab",)) | {"merges": []}}, "order of merges"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        ({"pre_tokenizer": METASPACE}, "not byte-level: its pre-tokenizer"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"added_tokens": []}, "names '<|endoftext|>' as eos_token"),
    ],
)
def test_an_unsupported_tokenizer_is_refused_by_naming_what_is_unsupported(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")) as error:
        Tokenizer.from_pretrained(edited_folder(tmp_path, BYTES, **changes))
    assert str(tmp_path) in str(error.value)


# Merges that token ids can express, and others.


def merging_tokenizer(merges: list[list[str]], vocab: list[str], folder: Path, **options: object) -> Path:
    """Bytes and the tokens of `vocab`, of ids from 1000 on, made by `merges`; no text is cut."""
    model = byte_model() | options
    model |= {"vocab": model["vocab"] | {text: 1000 + n for n, text in enumerate(vocab)}, "merges": merges}
    byte_level = json.loads(BYTES._files["tokenizer.json"])["pre_tokenizer"] | {"use_regex": False}
    return edited_folder(folder, BYTES, model=model, pre_tokenizer=byte_level)


UNLIKE = {  # merges and vocabulary of a file, and a text that the ids alone would encode otherwise
    "a whole piece is a token, but its pair is never made": ("a,b b,c a,bc", "ab bc abc", "abc"),
    "two of three bytes are taken by a merge across the middle": ("b,c a,b c,d ab,cd", "bc ab cd abcd", "abcd"),
    "of three equal letters the first two are taken": ("a,a a,aa", "aa aaa", "aaa"),
    "a pair that makes a token is not listed": ("b,c a,b ab,c", "bc ab abc", "abc"),
    "a token is made by no merge": ("a,b", "ab zz", "zz"),
}


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("takes_whole", [False, True])
def test_merges_that_ids_cannot_express_are_refused(name, takes_whole, tmp_path):
    """A file that takes whole pieces (as Llama 3's) may hold a token that its merges never reach."""
    merges, vocab, text = UNLIKE[name]
    vocab, pairs = vocab.split(), [pair.split(",") for pair in merges.split()]
    folder, token = merging_tokenizer(pairs, vocab, tmp_path, ignore_merges=takes_whole), 1000 + vocab.index(text)
    assert token not in reference(folder).encode(f"x{text}").ids
    if takes_whole and "across the middle" in name:
        loaded = Tokenizer.from_pretrained(folder)
        assert loaded.encode(text) == reference(folder).encode(text).ids == [token]
        assert loaded.encode(f"x{text}") == reference(folder).encode(f"x{text}").ids
    else:
        with pytest.raises(ValueError, match="order of merges"):
            Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("merges", "vocab", "message"),
    [
        (["ab,c"], ["abc"], "merges 'ab' and 'c', but 'ab' is no token"),
        (["a,b", "c,d"], ["ab"], "merges 'c' and 'd', but 'cd' is no token"),
        (["c,d", "a,b"], ["ab"], "'cd' is no token"),
        (["a,b", "ab,c"], ["ab", END], "'abc' is no token"),
    ],
)
def test_a_merge_of_what_is_no_token_is_refused_by_name(merges, vocab, message, tmp_path):
    folder = merging_tokenizer([pair.split(",") for pair in merges], vocab, tmp_path)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(folder)


def test_a_merge_that_makes_an_added_token_and_two_tokens_of_one_id_are_refused(tmp_path):
    folder = merging_tokenizer([["a", "b"]], ["ab"], tmp_path)
    added = [{"id": 256, "content": END, "special": True}, {"id": 1000, "content": "ab", "special": True}]
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": added}))
    with pytest.raises(ValueError, match="'ab' is no token or an added one"):
        Tokenizer.from_pretrained(folder)
    content["model"]["vocab"]["ba"] = 1000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="two tokens the same id"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("takes_whole", [False, True])
def test_random_merges_are_followed_exactly_or_refused_where_some_text_differs(takes_whole, tmp_path):
    """Every text of up to nine letters. What is refused is merged by tiktoken itself, without the check."""
    tokenizers, tiktoken = pytest.importorskip("tokenizers"), pytest.importorskip("tiktoken")
    texts = ["".join(letters) for n in range(1, 10) for letters in itertools.product("ab", repeat=n)]
    rng, n_accepted, n_refused = random.Random(0), 0, 0
    for _ in range(100):
        merges, vocab = random_merges(rng, "ab")
        folder = merging_tokenizer(merges, vocab, tmp_path, ignore_merges=takes_whole)
        hf = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        wanted = [hf.encode(text, add_special_tokens=False).ids for text in texts]
        try:
            encode, is_refused = Tokenizer.from_pretrained(folder).encode, False
        except ValueError as error:
            assert "order of merges" in str(error)
            ranks = {bytes([i]): i for i in range(256)} | {text.encode(): 1000 + n for n, text in enumerate(vocab)}
            bpe = tiktoken.Encoding("", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
            encode, is_refused = bpe.encode, True
        is_different = [encode(text) for text in texts] != wanted
        # Of pieces taken whole a few files more are refused: a pair unlisted, of tokens that are never made.
        assert is_different == is_refused or (is_refused and takes_whole), merges
        n_accepted, n_refused = n_accepted + (not is_refused), n_refused + is_refused
    assert n_accepted > 50 and n_refused > 10


def random_merges(rng: random.Random, letters: str) -> tuple[list[list[str]], list[str]]:
    """Some merges in the order of the ids of what they make, often several for a token; none makes a long one."""
    tokens, merges = [*letters], []
    for _ in range(rng.randint(3, 9)):
        pair = rng.choices(tokens, k=2)
        text = "".join(pair)
        if text in tokens or len(text) > 5:
            continue
        ways = [[text[:n], text[n:]] for n in range(1, len(text)) if text[:n] in tokens and text[n:] in tokens]
        merges += [way for way in ways if way == pair or rng.random() < 0.5]
        tokens.append(text)
    return merges, tokens[len(letters) :]


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    BYTES.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not JSON"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer_config\.json"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("bad_id", [-1, 257])
def test_an_id_without_a_token_is_refused(bad_id):
    with pytest.raises(ValueError, match=f"{bad_id} is no token id: the vocabulary has ids from 0 to 256"):
        BYTES.decode([97, bad_id])


# Chat templates.

TEMPLATES = [
    "tokenizers/qwen3/tokenizer_config.json",
    "tokenizers/smollm2/tokenizer_config.json",
    "tokenizers/llama3/tokenizer_config.json",
    "tokenizers/templates/Qwen-Qwen2.5-7B-Instruct.jinja",
    "tokenizers/templates/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja",
]


def tokenizer_with_template(model: str, path: Path, folder: Path) -> Tokenizer:
    """The model's tokenizer, or bytes with the model's two special tokens, carrying the template at `path`."""
    if path.suffix == ".json":
        return pretrained(model)
    if model == "deepseek_v3":  # its vocabulary is not in the set: the text is compared, not the ids
        specials = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
        tokenizer = of_bytes(eos=specials["eos_token"], specials=[specials["bos_token"]])
        edited_folder(folder, tokenizer, "tokenizer_config.json", **specials)
    else:
        pretrained(model).save_pretrained(folder)
    (folder / "chat_template.jinja").write_bytes(path.read_bytes())
    return Tokenizer.from_pretrained(folder)


@needs_conformance
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_render_as_the_reference_on_every_recorded_line(template, tmp_path):
    lines = [line for line in json_lines(conformance("chat_template.jsonl")) if line["template"] == template]
    assert len(lines) >= 20
    tokenizer = tokenizer_with_template(lines[0]["model"], conformance(template), tmp_path)
    for line in lines:
        text = tokenizer.apply_chat_template(line["messages"], line["add_generation_prompt"], **line["kwargs"])
        assert text == line["rendered"], line["id"]
        if line["model"] != "deepseek_v3":
            assert tokenizer.encode(text, allow_special=True) == line["ids"], line["id"]


def render(template: str, **arguments: object) -> str:
    tokenizer = of_bytes(chat_template=template)
    return tokenizer.apply_chat_template([{"role": "user", "content": "<é>"}], **arguments)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "<é>!"),
        ("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "01"),
        ("  {% if add_generation_prompt %}\nyes{% else %}\nno{% endif %}\n{{ eos_token }}", f"no{END}"),
        ("{{ tools is none }} {{ date }}", "True today"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_templates_have_the_names_and_blank_rules_that_models_rely_on(template, expected):
    assert render(template, date="today") == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'a' + none }}", "cannot render"),
        ("{% if %}", "cannot render"),
        ("{{ ''.split('') }}", "cannot render"),
        ("{{ 1 // 0 }}", "cannot render"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_a_value_error(template, message):
    with pytest.raises(ValueError, match=message):
        render(template)


def test_a_folder_without_a_template_says_so():
    with pytest.raises(ValueError, match="no chat template"):
        BYTES.apply_chat_template([])


# Real folders, against transformers itself.

# Marks and letters of Unicode 3.2 only: the reference's tables differ from newer ones on newer characters.
OLD = [chr(i) for i in range(0x30000) if unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Cs", "Co")]
POOLS = [
    [chr(i) for i in range(32)] + list("\x7f\x85\xa0\u1680\u2028\u3000\u200b\ufeff"),
    list("abcXYZ'stmredvl  \n\r\t.,!?-_<|>"),
    list("0123456789²½Ⅷ٣೬〇一"),
    list("eaonué") + [chr(i) for i in range(0x300, 0x340)],
    list("日本語中文한국어ㄱ가각नमस्तेกำอ่العربية"),
    list("👩\u200d❤\ufe0f👨🏽🇩🇪"),
    ["'s", "'S", "'ſ", "'LL", "'Re", "K", "<think>", END, "<|im_start|>", "<|im_end|>"],
    OLD,
]


def random_text(rng: random.Random) -> str:
    pools = rng.choices(POOLS, k=rng.randint(1, 8))
    return "".join("".join(rng.choices(pool, k=rng.randint(1, 6))) for pool in pools)


@pytest.mark.model
@pytest.mark.skipif(not MODELS, reason="NANOR1_MODELS (folder with the model folders) is not set")
@pytest.mark.parametrize("model", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_random_unicode_is_encoded_and_decoded_as_transformers_does(model):
    folder = Path(MODELS) / model
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"{folder} has no tokenizer.json")
    hf = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    tokenizer, rng = Tokenizer.from_pretrained(folder), random.Random(1)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (hf.eos_token_id, len(hf))
    for text in (random_text(rng) for _ in range(3000)):
        ids = hf.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, allow_special=True) == ids, ascii(text)
        assert tokenizer.decode(ids) == hf.decode(ids, clean_up_tokenization_spaces=False), ascii(text)
    ids = rng.choices(range(tokenizer.vocab_size), k=5000)
    assert tokenizer.decode(ids) == hf.decode(ids, clean_up_tokenization_spaces=False)


def test_a_folder_is_parsed_once_as_long_as_its_files_stay_as_they_are(tmp_path):
    made = of_bytes(specials=["<a>"])
    made.save_pretrained(tmp_path)
    first = Tokenizer.from_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path) is first and first.stop_ids == (made.eos_id,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": made.token_id("<a>")}))
    assert Tokenizer.from_pretrained(tmp_path).stop_ids == (made.eos_id, made.token_id("<a>"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert 7 in Tokenizer.from_pretrained(tmp_path).stop_ids and first.stop_ids == (made.eos_id,)
