"""Supervised fine-tuning: what is learned of a line, and that sampling sees the same; packing, loss, order of data."""

import json
import math
import os
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from running import randomize
from vocabularies import of_bytes, of_words

from nanor1.gradient import Example, Workers, add_gradient, pack_examples
from nanor1.model import ModelConfig, Transformer
from nanor1.sampler import Sampler
from nanor1.stages.sft import (
    Examples,
    examples_per_epoch,
    parse_data,
    question,
    read_examples,
    read_text,
    sample_examples,
    split,
    text_end,
    turn_end,
)
from nanor1.tasks.problems import Problem, is_in_share, make_task
from nanor1.tasks.prompts import Prompter
from nanor1.tokenizer import Tokenizer

SHARED = Path(os.environ.get("NANOR1_SHARED", "-"))
MODELS = Path(os.environ.get("NANOR1_MODELS", "-"))

WORDS = "a b c d e user assistant system :".split()
WORD_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% if m.role == 'assistant' %}<end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHAT = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHAT_THAT_OPENS = CHAT.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
CHAT_THAT_STRIPS = CHAT.replace("m.content", "m.content.split('</think>')[-1]")
ALL_IN_ONE, ONE_EACH = 10**6, 1  # tokens_per_batch


def word_tokenizer(**options):
    return of_words(WORDS, eos="<end>", chat_template=WORD_TEMPLATE, **options)


def chat_tokenizer(template=CHAT, eos="<|im_end|>"):
    return of_bytes(eos=eos, specials=["<|im_start|>"], chat_template=template)


def with_bos(tokenizer):
    tokenizer.adds_bos, tokenizer.bos_id = True, tokenizer.token_id("<s>")
    return tokenizer


def write(folder, *rows, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*contents, roles=("user", "assistant")):
    """Messages of alternating roles."""
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def read_one(folder, tokenizer, row) -> Example:
    (example,) = read_examples(write(folder, row), tokenizer, 10_000).examples
    return example


def learned(tokenizer, example):
    """The text of each span that has a loss."""
    marks = [0, *(t for t, (x, y) in enumerate(pairwise(example.is_target), 1) if x != y), len(example.ids)]
    return [tokenizer.decode(example.ids[start:end]) for start, end in pairwise(marks) if example.is_target[start]]


# ---- chat


def test_the_loss_of_a_chat_falls_on_the_answer_and_its_stop_token(tmp_path):
    tokenizer = word_tokenizer()
    example = read_one(tmp_path, tokenizer, chat("a b", "c d e"))
    a, b, c, d, e, user, assistant, _, colon = range(9)
    assert example.ids == [user, colon, a, b, assistant, colon, c, d, e, tokenizer.eos_id]
    assert example.is_target == [False] * 6 + [True] * 4


def test_an_example_is_the_rendered_chat_up_to_its_stop_token(tmp_path):
    tokenizer, row = chat_tokenizer(), chat("Hi <é>", " Hello \n")
    example = read_one(tmp_path, tokenizer, row)
    rendered = tokenizer.apply_chat_template(row["messages"]).removesuffix("\n")
    assert example.ids == tokenizer.encode(rendered, allow_special=True)
    assert learned(tokenizer, example) == [" Hello \n<|im_end|>"]


def test_the_prompt_is_the_one_that_sampling_sees(tmp_path):
    tokenizer, problem = chat_tokenizer(), Problem("1 + 1?", "2", "arithmetic")
    _, prompt_ids = Prompter(tokenizer, "chat").write(problem)
    asked = tokenizer.decode(prompt_ids).split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    assert read_one(tmp_path, tokenizer, chat(asked, "2")).ids == [*prompt_ids, *b"2", tokenizer.eos_id]


def test_earlier_turns_that_the_template_keeps_are_learned_with_their_stop_tokens(tmp_path):
    row = chat("Hi", "Hello", "How?", "Well.", "And?", "So.")
    assert learned(chat_tokenizer(), read_one(tmp_path, chat_tokenizer(), row)) == [
        "Hello<|im_end|>",
        "Well.<|im_end|>",
        "So.<|im_end|>",
    ]
    assert read_examples(tmp_path / "data.jsonl", chat_tokenizer(), 1000).n_rewritten == 0


def test_a_past_turn_that_the_template_rewrites_has_no_loss_and_is_counted(tmp_path):
    tokenizer = chat_tokenizer(CHAT_THAT_STRIPS)
    row = chat("Hi", "<think>hm</think>Hello", "How?", "Well.", "And?", "<think>so</think>So.")
    found = read_examples(write(tmp_path, row), tokenizer, 1000)
    assert found.n_rewritten == 1
    assert learned(tokenizer, found.examples[0]) == ["Well.<|im_end|>", "<think>so</think>So.<|im_end|>"]
    prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)
    assert "hm" not in prompt and tokenizer.decode(found.examples[0].ids).startswith(prompt)


def test_a_past_turn_that_merges_with_its_surroundings_is_not_taken_for_what_was_sampled(tmp_path):
    """With the tokenizer "ab" -> one id, "a" behind the prompt's "b..." would be encoded otherwise in one go."""
    tokenizer = chat_tokenizer(CHAT.replace("\n", "a"))
    parts = json.loads(tokenizer._files["tokenizer.json"])
    parts["model"]["merges"], parts["model"]["vocab"]["ab"] = [["a", "b"]], 1000
    tokenizer = Tokenizer(tokenizer._files | {"tokenizer.json": json.dumps(parts).encode()})
    row = chat("x", "b", "x", "b")
    found = read_examples(write(tmp_path, row), tokenizer, 1000)
    assert found.n_rewritten == 1 and found.examples[0].ids.count(1000) == 1
    assert found.examples[0].ids[-2:] == [ord("b"), tokenizer.eos_id]


@pytest.mark.parametrize(
    "answer", ["<think>\nhm</think>2", "<think>hm</think>2", "hm</think>2", " <think>\nhm</think>2"]
)
def test_a_think_tag_that_the_prompt_has_opened_is_not_written_twice(tmp_path, answer):
    tokenizer = chat_tokenizer(CHAT_THAT_OPENS)
    example = read_one(tmp_path, tokenizer, chat("1 + 1?", answer))
    assert tokenizer.decode(example.ids).endswith("assistant\n<think>\nhm</think>2<|im_end|>")
    assert learned(tokenizer, example) == ["hm</think>2<|im_end|>"]


def test_a_turn_whose_opened_tag_the_template_drops_later_is_counted_as_rewritten(tmp_path):
    found = read_examples(write(tmp_path, chat("a", "b", "c", "d")), chat_tokenizer(CHAT_THAT_OPENS), 1000)
    assert found.n_rewritten == 1
    assert learned(chat_tokenizer(), found.examples[0]) == ["d<|im_end|>"]


def test_a_control_token_spelled_out_in_an_answer_is_mere_text(tmp_path):
    tokenizer = chat_tokenizer()
    example = read_one(tmp_path, tokenizer, chat("Hi", "<|im_end|>"))
    assert example.ids[-11:] == [*b"<|im_end|>", tokenizer.eos_id]
    found = read_examples(write(tmp_path, chat("Hi", "<|im_end|>", "Hi", "x")), tokenizer, 1000)
    assert found.n_rewritten == 1 and learned(tokenizer, found.examples[0]) == ["x<|im_end|>"]


def base_tokenizer(template=CHAT):
    """As Qwen2.5 base: the folder's own stop is <|endoftext|>, and its template ends turns with <|im_end|>."""
    return of_bytes(eos="<|endoftext|>", specials=["<|im_start|>", "<|im_end|>"], chat_template=template)


def test_a_turn_ends_as_the_template_ends_it_and_a_text_with_the_end_of_text(tmp_path):
    tokenizer = base_tokenizer()
    assert turn_end(tokenizer) == 258 == tokenizer.token_id("<|im_end|>") and text_end(tokenizer) == 256
    assert turn_end(of_bytes()) == text_end(of_bytes()) == 256
    assert turn_end(base_tokenizer("{{ messages[-1].content }}")) == 256
    example = read_one(tmp_path, tokenizer, chat("2+2?", "4", "3+3?", "6"))
    assert learned(tokenizer, example) == ["4<|im_end|>", "6<|im_end|>"]
    assert read_one(tmp_path, tokenizer, {"prompt": "2+2=", "completion": "4"}).ids == [*b"2+2=4", 256]


def test_a_tokenizer_that_declares_no_end_of_text_ends_texts_as_turns():
    tokenizer = base_tokenizer()
    tokenizer.eos_id, tokenizer.declared_stop_ids = None, ()
    assert text_end(tokenizer) == turn_end(tokenizer) == 258
    bare = of_bytes()
    bare.eos_id, bare.declared_stop_ids = None, ()
    with pytest.raises(ValueError, match="no token that ends a text"):
        text_end(bare)


def test_tokens_beyond_the_embedding_are_refused_with_file_and_line_and_the_end_of_a_turn_too(tmp_path):
    base_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 258}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"line 1: the token '<\|im_end\|>' has id 258, but .* 258 rows"):
        read_one(tmp_path, tokenizer, chat("a", "b"))
    assert read_one(tmp_path, tokenizer, {"prompt": "a", "completion": "b"}).ids == [*b"ab", 256]
    with pytest.raises(ValueError, match="has id 258"):
        turn_end(tokenizer)


def test_a_padding_token_beyond_the_embedding_is_harmless_to_sampling_and_to_the_loss(tmp_path):
    tokenizer = base_tokenizer()  # 259 tokens, of which the last two have no row
    model = Transformer(ModelConfig("llama", 257, 24, 40, 2, 4, 2, 6, 64))
    stops = dict(stop_ids=tokenizer.stop_ids, max_new_tokens=20, seed=1)
    ((sampled,),), ((wanted,),) = (
        Sampler(model).generate([[*b"1+1="]], vocab_size=n, **stops) for n in (tokenizer.vocab_size, 257)
    )
    assert sampled.ids == wanted.ids
    example = read_one(tmp_path, tokenizer, {"prompt": "1+1=", "completion": "2"})
    of_259, of_257 = (add_gradient(Workers(model), [example], 99, n, learns=False) for n in (259, 257))
    assert of_259 == of_257


@pytest.mark.skipif(not SHARED.exists(), reason="NANOR1_SHARED (folder with conformance/) is not set")
@pytest.mark.parametrize("model", ["qwen3", "smollm2", "llama3"])
def test_behind_every_recorded_prompt_an_answer_is_learned_whole(model, tmp_path):
    folder = SHARED / "conformance"
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizers" / model)
    lines = map(json.loads, (folder / "chat_template.jsonl").open(encoding="utf-8"))
    answer, n = "<think>\nwell\n</think>\n\n 42", 0
    for line in lines:
        is_ours = line["template"] == f"tokenizers/{model}/tokenizer_config.json"
        if not is_ours or not line["add_generation_prompt"] or line["kwargs"] or "tool" in line["conversation"]:
            continue
        row = {"messages": [*line["messages"], {"role": "assistant", "content": answer}]}
        found = read_examples(write(tmp_path, row), tokenizer, 10_000)
        (example,), n = found.examples, n + 1
        end = tokenizer.token_id("<|eot_id|>" if model == "llama3" else "<|im_end|>")
        assert example.ids == [*line["ids"], *tokenizer.encode(answer), end], line["id"]
        n_said = sum(message["role"] == "assistant" for message in line["messages"])
        assert len(learned(tokenizer, example)) == n_said + 1 - found.n_rewritten
    assert n >= 2


# ---- thinking in a field of its own


def thought(name="reasoning_content", thinking="Two and two.", content="4", **more):
    row = chat("2+2?", content)
    row["messages"][1] |= {name: thinking} | more
    return row


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_beside_an_answer_is_learned_before_it(tmp_path, name):
    tokenizer = chat_tokenizer()
    example = read_one(tmp_path, tokenizer, thought(name))
    assert learned(tokenizer, example) == ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>"]
    example = read_one(tmp_path, chat_tokenizer(CHAT_THAT_OPENS), thought(name))
    assert tokenizer.decode(example.ids).endswith("assistant\n<think>\nTwo and two.\n</think>\n\n4<|im_end|>")
    assert learned(tokenizer, example) == ["Two and two.\n</think>\n\n4<|im_end|>"]


def test_thinking_is_the_same_in_a_field_and_in_the_answer(tmp_path):
    written = chat("2+2?", "<think>\nTwo and two.\n</think>\n\n4")
    for row in (thought(), thought(thinking="\nTwo and two.\n", content="\n\n4"), thought(reasoning="Two and two.")):
        assert read_one(tmp_path, chat_tokenizer(), row) == read_one(tmp_path, chat_tokenizer(), written)


@pytest.mark.parametrize("nothing", [None, "", " \n"])
def test_no_thinking_in_the_field_is_as_no_field(tmp_path, nothing):
    plain = read_one(tmp_path, chat_tokenizer(), chat("2+2?", "4"))
    assert read_one(tmp_path, chat_tokenizer(), thought(thinking=nothing)) == plain
    assert read_one(tmp_path, chat_tokenizer(), thought(thinking=nothing, reasoning="x")) != plain


def test_a_template_that_reads_the_field_sees_it_in_earlier_turns_and_they_are_then_learned(tmp_path):
    row = chat("2+2?", "4", "3+3?", "6")
    row["messages"][1]["reasoning_content"] = "Two and two."
    shows = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    tokenizer = chat_tokenizer(CHAT.replace("{{ m.content }}", shows))
    said = ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>", "6<|im_end|>"]
    assert learned(tokenizer, read_one(tmp_path, tokenizer, row)) == said
    found = read_examples(write(tmp_path, row), chat_tokenizer(), 1000)
    assert found.n_rewritten == 1 and learned(tokenizer, found.examples[0]) == said[1:]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (thought(reasoning="Other."), "different ones in reasoning_content and reasoning"),
        (thought(thinking=["Two."]), "expected a text 'reasoning_content' in a message, found .'Two.'."),
        (thought(content="<think>Two.</think>4"), "in a field of its own or in tags, found both in message 2"),
        (thought(thinking="<think>Two.</think>"), "in a field of its own or in tags, found both in message 2"),
        (thought(tool_calls=[{"name": "add"}]), "found 'tool_calls' in message 2"),
        (thought(content=[{"type": "text", "text": "4"}]), "expected texts 'role' and 'content'"),
        ({"prompt": "a", "completion": "b", "reasoning": "c"}, "'completion', found others in 'reasoning'"),
        ({"prompt": "a", "completion": "b", "thinking": ["c"]}, "'completion', found others in 'thinking'"),
        (thought(thinking_content="Other."), "found 'thinking_content' in message 2, which cannot be learned"),
    ],
)
def test_words_that_could_not_be_learned_as_they_stand_are_refused_with_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 2: .*{message}"):
        read_examples(write(tmp_path, chat("a", "b"), row), chat_tokenizer(), 1000)


def test_empty_calls_and_thinking_that_a_completion_repeats_are_no_loss(tmp_path):
    tokenizer = chat_tokenizer()
    assert learned(tokenizer, read_one(tmp_path, tokenizer, chat("a", "b") | {"reasoning": "c"})) == ["b<|im_end|>"]
    row = {"prompt": "a", "completion": "<think> c </think> d", "thinking": "c"}
    assert learned(tokenizer, read_one(tmp_path, tokenizer, row)) == ["<think> c </think> d<|im_end|>"]
    read_one(tmp_path, tokenizer, thought(tool_calls=[]))


def test_thinking_beside_messages_is_counted(tmp_path):
    rows = [chat("a", "b") | {"reasoning": "c"}, chat("a", "b") | {"thinking": "b", "reasoning": True}, chat("a", "b")]
    assert read_examples(write(tmp_path, *rows), chat_tokenizer(), 1000).n_beside == 1


# ---- variables of the template, a system message, provenance

CHAT_THAT_ASKS = CHAT.replace("assistant\n{% endif", "assistant\n{% if not think %}<think></think>{% endif %}{% endif")


def test_variables_of_the_template_reach_every_prompt(tmp_path):
    path, tokenizer = write(tmp_path, chat("a", "b", "c", "d")), chat_tokenizer(CHAT_THAT_ASKS)
    (plain,) = read_examples(path, tokenizer, 1000).examples
    (asked,) = read_examples(path, tokenizer, 1000, {"think": True}).examples
    assert tokenizer.decode(plain.ids).endswith("assistant\n<think></think>d<|im_end|>")
    assert tokenizer.decode(asked.ids).endswith("assistant\nd<|im_end|>")
    assert learned(tokenizer, asked) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_system_message_stands_before_messages_without_one(tmp_path):
    own = {"messages": [{"role": "system", "content": "own"}, *chat("a", "b")["messages"]]}
    path, tokenizer = write(tmp_path, chat("a", "b"), own), chat_tokenizer()
    given, kept = read_examples(path, tokenizer, 1000, system="Be brief.").examples
    assert tokenizer.decode(given.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na")
    assert tokenizer.decode(kept.ids).startswith("<|im_start|>system\nown<|im_end|>\n<|im_start|>user\na")
    assert given.question == kept.question == "a"
    with pytest.raises(ValueError, match=r"line 2: expected messages, before which a system message can stand"):
        read_examples(write(tmp_path, chat("a", "b"), {"prompt": "a", "completion": "b"}), tokenizer, 99, system="x")


def test_lines_from_problems_that_were_not_for_training_are_counted(tmp_path):
    rows = [chat("a", "b") | more for more in ({}, {"split": None}, {"split": "train"}, {"split": "held-out"})]
    path = write(tmp_path, *rows, {"prompt": "a", "completion": "b", "split": "all"})
    assert read_examples(path, chat_tokenizer(), 1000).n_not_train == 2


# ---- prompt and completion


def test_the_loss_of_a_text_falls_on_the_completion_and_the_end(tmp_path):
    tokenizer = word_tokenizer()
    example = read_one(tmp_path, tokenizer, {"prompt": "a b :", "completion": "c", "reward": 1.0, "model": None})
    assert example.ids == [0, 1, 8, 2, tokenizer.eos_id]
    assert example.is_target == [False, False, False, True, True]


def test_blanks_of_prompt_and_completion_are_kept_and_each_is_encoded_alone(tmp_path):
    example = read_one(tmp_path, chat_tokenizer(), {"prompt": "\na ", "completion": " b\n"})
    assert example.ids == [*b"\na ", *b" b\n", 256]


def test_a_prompt_starts_with_the_first_token_that_the_model_expects_and_may_then_be_empty(tmp_path):
    tokenizer = with_bos(word_tokenizer(specials=["<s>"]))
    example = read_one(tmp_path, tokenizer, {"prompt": "", "completion": "c d"})
    assert example == Example([tokenizer.bos_id, 2, 3, tokenizer.eos_id], [False, True, True, True])


def test_without_such_a_token_nothing_predicts_the_first_of_an_unprompted_text(tmp_path):
    example = read_one(tmp_path, word_tokenizer(), {"prompt": "", "completion": "c d"})
    assert example == Example([2, 3, 9], [False, True, True])


# ---- faults and limits

MALFORMED = [
    ("{", "no valid JSON"),
    ("[]", "expected a JSON object, found list"),
    ({}, "expected 'messages', or texts 'prompt' and"),
    ({"prompt": "a"}, "found prompt 'a' and completion None"),
    ({"prompt": "a", "completion": " "}, "and completion ' '"),
    ({"prompt": None, "completion": "b"}, "found prompt None"),
    ({"question": "a", "answer": "b"}, r"\(fields: question, answer\)"),
    ({"prompt": "a", "completion": "unknown"}, "the word 'unknown' is not in this vocabulary"),
    ({"messages": []}, r"a list of messages, found \[\]"),
    ({"messages": "a"}, "a list of messages, found 'a'"),
    ({"messages": ["a"]}, "texts 'role' and 'content', found 'a' as message 1"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "as message 2"),
    ({"messages": [{"role": "user", "content": None}]}, "as message 1"),
    (chat("a"), "last message to be the assistant's, found role 'user'"),
    ({"messages": [{"role": "system", "content": "a"}]}, "last message to be the assistant's, found role 'system'"),
    (chat("a", roles=("assistant", "user")), "found the assistant's first"),
    (chat("a", "b", "c", " "), "message 4 without content"),
    (chat("a", "", "c", "d"), "message 2 without content"),
]


@pytest.mark.parametrize(("row", "message"), MALFORMED)
def test_a_malformed_line_is_refused_with_file_and_line(tmp_path, row, message):
    path = write(tmp_path, chat("a", "b"), "\n", row)
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 3: .*{message}"):
        read_examples(path, word_tokenizer(), 100)


def test_a_chat_the_template_refuses_is_refused_with_file_and_line(tmp_path):
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    row = {"messages": [{"role": "system", "content": "a"}, *chat("a", "b")["messages"]]}
    with pytest.raises(ValueError, match="line 1: .*no system message"):
        read_examples(write(tmp_path, row), chat_tokenizer(refusal + CHAT), 100)


def test_messages_need_a_chat_template(tmp_path):
    with pytest.raises(ValueError, match="line 1: this tokenizer has no chat template"):
        read_examples(write(tmp_path, chat("a", "b")), of_bytes(), 100)


def test_examples_that_are_too_long_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": "a", "completion": "b " * n} for n in range(1, 6)]
    assert [len(e.ids) for e in read_examples(write(tmp_path, *rows), word_tokenizer(), 5).examples] == [3, 4, 5]
    assert read_examples(tmp_path / "data.jsonl", word_tokenizer(), 5).n_too_long == 2
    with pytest.raises(ValueError, match="all of its 5 examples are longer than 2 tokens"):
        read_examples(tmp_path / "data.jsonl", word_tokenizer(), 2)


def test_a_file_that_is_missing_or_empty_is_named(tmp_path):
    for read in (read_examples, read_text):
        with pytest.raises(ValueError, match="none.jsonl cannot be read"):
            read(tmp_path / "none.jsonl", word_tokenizer(), 5)
        with pytest.raises(ValueError, match="data.jsonl is empty"):
            read(write(tmp_path, "\n"), word_tokenizer(), 5)
    with pytest.raises(ValueError, match="none.txt cannot be read"):
        read_text(tmp_path / "none.txt", word_tokenizer(), 5)


# ---- plain text


def test_a_document_is_learned_from_its_start_to_its_end(tmp_path):
    path = write(tmp_path, {"text": "a b", "source": 1}, {"text": "c"})
    tokenizer = with_bos(word_tokenizer(specials=["<s>"]))
    assert read_text(path, tokenizer, 10) == Examples(
        [Example([10, 0, 1, 9], [False, True, True, True]), Example([10, 2, 9], [False, True, True])]
    )
    assert read_text(path, word_tokenizer(), 10).examples[1] == Example([2, 9], [False, True])


def test_a_plain_file_is_one_document(tmp_path):
    path = write(tmp_path, "a b\n\n", "c\n", name="corpus.txt")
    assert [example.ids for example in read_text(path, word_tokenizer(), 10).examples] == [[0, 1, 2, 9]]


@given(n_words=st.integers(1, 40), max_tokens=st.integers(2, 12))
def test_of_a_long_document_every_token_but_the_first_is_learned_once(tmp_path_factory, n_words, max_tokens):
    words = [random.Random(i).choice("abcde") for i in range(n_words)]
    path = write(tmp_path_factory.mktemp("text"), {"text": " ".join(words)})
    found = read_text(path, word_tokenizer(), max_tokens)
    masked = [pair for example in found.examples for pair in zip(example.ids, example.is_target, strict=True)]
    targets = [i for i, is_target in masked if is_target]
    assert targets == [*word_tokenizer().encode(" ".join(words)), 9][1:]
    assert all(2 <= len(example.ids) <= max_tokens for example in found.examples)
    assert found.n_cut == int(n_words + 1 > max_tokens)


@pytest.mark.parametrize("row", [{"text": " "}, {"text": 1}, {"prompt": "a"}])
def test_a_line_without_text_is_refused_with_file_and_line(tmp_path, row):
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: expected a non-empty 'text'"):
        read_text(write(tmp_path, {"text": "a"}, row), word_tokenizer(), 10)


# ---- packing and the loss

CONFIG = ModelConfig("llama", 16, 24, 40, 2, 4, 2, 6, 64)


def random_model(seed=0):
    return randomize(Transformer(CONFIG), seed).double()


def random_examples(n=7, seed=0):
    """Several lengths; masks with gaps; two examples that are the same."""
    rng, examples = random.Random(seed), []
    for _ in range(n):
        ids = [rng.randrange(13) for _ in range(rng.randint(2, 12))]
        is_target = [False, *(rng.random() < 0.6 for _ in ids[2:]), True]
        examples.append(Example(ids, is_target))
    return [*examples, examples[0]]


def gradients(model):
    found = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    return found


def reference_loss(model, examples):
    """One example at a time, all its logits at once, cross-entropy by torch; backward not yet taken."""
    losses = []
    for example in examples:
        ids = torch.tensor(example.ids)
        logits = model(ids, torch.tensor([0, len(ids)])) @ model.head_weight_VC.T
        is_target = torch.tensor(example.is_target)[1:]
        losses.append(F.cross_entropy(logits[:-1][is_target], ids[1:][is_target], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("tokens_per_batch", [ONE_EACH, 9, 20, ALL_IN_ONE])
def test_packed_examples_have_the_loss_and_the_gradient_of_single_ones(tokens_per_batch):
    model, examples = random_model(), random_examples()
    wanted = reference_loss(model, examples)
    wanted.backward()
    wanted_gradients = gradients(model)
    loss = add_gradient(Workers(model), examples, tokens_per_batch)
    assert loss == pytest.approx(wanted.item(), abs=1e-6)
    torch.testing.assert_close(gradients(model), wanted_gradients, rtol=1e-6, atol=1e-6)


def test_the_order_of_the_examples_and_the_workers_change_nothing():
    model, examples = random_model(), random_examples()
    loss, found = add_gradient(Workers(model), examples, 20), gradients(model)
    for workers, order in [(Workers(model), examples[::-1]), (Workers(model, 2), examples)]:
        assert add_gradient(workers, order, 12) == pytest.approx(loss, abs=1e-6)
        torch.testing.assert_close(gradients(model), found, rtol=1e-6, atol=1e-6)


def test_a_scaled_loss_scales_the_gradient_and_is_reported_as_it_is():
    model, examples = random_model(), random_examples()
    loss, plain = add_gradient(Workers(model), examples, 20), gradients(model)
    assert add_gradient(Workers(model), examples, 20, loss_scale=2.0**16) == loss
    assert all(torch.equal(g, p * 2**16) for g, p in zip(gradients(model), plain, strict=True))


@pytest.mark.parametrize("n_workers", [1, 2])
def test_the_mean_loss_is_that_of_an_update_and_leaves_no_gradient(n_workers):
    model, examples = random_model(), random_examples()
    wanted = add_gradient(Workers(model), examples, ALL_IN_ONE)
    gradients(model)
    keeps_graph: list[bool] = []
    model.register_forward_pre_hook(lambda *_: keeps_graph.append(torch.is_grad_enabled()))
    assert add_gradient(Workers(model, n_workers), examples, 9, learns=False) == pytest.approx(wanted, abs=1e-6)
    assert gradients(model) == [None] * len(list(model.parameters()))
    assert len(keeps_graph) > 2 and not any(keeps_graph)  # in every thread


class BareLogits:
    """A model whose parameters are the logits at each packed position: gradients can be read off token by token."""

    def __init__(self, n_tokens, vocab_size):
        self.logits_NV = torch.zeros(n_tokens, vocab_size, requires_grad=True)
        self.head_weight_VC = torch.eye(vocab_size)

    def __call__(self, ids_N, cu_seqlens_B1, parent_B):
        return self.logits_NV

    def parameters(self):
        return [self.logits_NV]


def test_only_the_places_that_predict_a_target_learn_each_its_own_token_the_stop_token_too():
    examples = [Example([3, 1, 2, 0], [False, False, True, True]), Example([1, 3], [False, True])]
    model = BareLogits(4, 8)  # packed: 3 1 2 | 1
    assert add_gradient(Workers(model), examples, ALL_IN_ONE) == pytest.approx(math.log(8))
    wanted = torch.full((4, 8), 1 / 8 / 3)  # p of each of 8 tokens, a mean over three targets
    wanted[0] = 0
    for n, target in [(1, 2), (2, 0), (3, 3)]:
        wanted[n, target] -= 1 / 3
    torch.testing.assert_close(model.logits_NV.grad, wanted)


def test_ids_at_or_above_the_vocabulary_have_no_probability():
    examples = [Example([1, 2], [False, True])]
    for vocab_size, n in ((4, 4), (None, 8)):
        assert add_gradient(Workers(BareLogits(1, 8)), examples, 10, vocab_size) == pytest.approx(math.log(n))


def test_each_target_stands_behind_its_predictor_and_all_weights_sum_to_one():
    a, b = Example([5, 6, 7], [False, False, True]), Example([1, 2, 3, 4], [False, True, False, True])
    (batch,) = pack_examples([a, b], ALL_IN_ONE)
    assert batch.ids_N.tolist() == [1, 2, 3, 5, 6] and batch.cu_seqlens_B1.tolist() == [0, 3, 5]
    assert batch.predictor_M.tolist() == [0, 2, 4] and batch.target_M.tolist() == [2, 4, 7]
    assert batch.weight_M.tolist() == pytest.approx([1 / 3] * 3)
    assert batch.predictor_states(lambda ids, *_, parent_B: ids[:, None]).tolist() == [[1], [3], [6]]


@given(st.lists(st.integers(2, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_batches_keep_the_limit_hold_every_example_once_and_begin_with_the_longest(lengths, tokens_per_batch):
    examples = [Example([i] * length, [False] * (length - 1) + [True]) for i, length in enumerate(lengths)]
    batches = pack_examples(examples, tokens_per_batch)
    assert sorted(i for batch in batches for i in batch.target_M.tolist()) == list(range(len(lengths)))
    assert all(len(batch.ids_N) <= tokens_per_batch or len(batch.target_M) == 1 for batch in batches)
    packed = [n for batch in batches for n in batch.cu_seqlens_B1.diff().tolist()]
    assert packed == sorted((length - 1 for length in lengths), reverse=True)
    assert sum(batch.weight_M.sum().item() for batch in batches) == pytest.approx(1)


# ---- several files, epochs, what is held out


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.jsonl", [("a.jsonl", 1.0)]),
        ("a.jsonl:3,b.jsonl", [("a.jsonl", 3.0), ("b.jsonl", 1.0)]),
        ("a:.5, b:1e-1", [("a", 0.5), ("b", 0.1)]),
        (r"C:\data\a.jsonl,D:/b.jsonl:2", [(r"C:\data\a.jsonl", 1.0), ("D:/b.jsonl", 2.0)]),
        ("of:monday:nan,of:v2.1:3", [("of:monday:nan", 1.0), ("of:v2.1", 3.0)]),
    ],
)
def test_only_a_number_behind_the_last_colon_is_a_weight(text, wanted):
    assert parse_data(text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no file"),
        ("a.jsonl,", "names no file"),
        (":3", "':3' names no file"),
        ("a.jsonl:0", "the weight of a.jsonl is 0"),
        ("a.jsonl:-2", "is -2; it must be above 0"),
        ("a.jsonl:1e999", "the weight of a.jsonl is 1e999"),
    ],
)
def test_data_without_a_file_or_with_an_impossible_weight_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_data(text)


SOURCES = [(["a1", "a2", "a3", "a4"], 3.0), (["b1", "b2"], 1.0), (["c1", "c2", "c3", "c4", "c5"], 1.4), (["d1"], 1.0)]


def epochs(n_epochs, seed=0, sources=SOURCES):
    n = examples_per_epoch(sources)
    return [sample_examples(sources, n, seed, epoch) for epoch in range(n_epochs)]


def test_an_epoch_holds_each_example_as_often_as_its_file_weighs():
    assert examples_per_epoch(SOURCES) == 12 + 2 + 7 + 1
    for epoch in epochs(4):
        counts = Counter(epoch)
        assert [counts[name] for name in ("a1", "a2", "a3", "a4", "b1", "b2", "d1")] == [3, 3, 3, 3, 1, 1, 1]
        assert sorted(counts[f"c{i}"] for i in range(1, 6)) == [1, 1, 1, 2, 2]


def test_the_fraction_of_a_file_goes_round_so_that_all_have_their_turn():
    counts = Counter(name for epoch in epochs(5) for name in epoch)
    assert {counts[f"c{i}"] for i in range(1, 6)} == {7}
    halves = [set(epoch) for epoch in epochs(2, sources=[(list(range(100)), 0.5)])]
    assert [len(half) for half in halves] == [50, 50] and halves[0] | halves[1] == set(range(100))
    assert 10 < len(halves[0] & set(range(50))) < 40  # a file may be sorted: no share of it is a stretch of it


def test_epochs_and_seeds_differ_in_their_order():
    (first, second), (other, _) = epochs(2), epochs(2, seed=1)
    assert first != second and first != other and sorted(first) != first


@given(n=st.integers(1, 60), seed=st.integers(0, 5))
def test_updates_of_any_size_take_the_same_endless_sequence_and_need_no_earlier_ones(n, seed):
    stream = [name for epoch in epochs(6, seed) for name in epoch]
    for step in reversed(range(len(stream) // n)):  # the last first, as a resumed run may ask for it
        taken = sample_examples(SOURCES, n, seed, step)
        assert taken == stream[step * n : (step + 1) * n]
        taken.clear()  # what the caller does with them is nobody else's matter


def test_a_weight_that_takes_nothing_is_refused():
    with pytest.raises(ValueError, match="weight 0.1 takes none of a file's 4 examples"):
        examples_per_epoch([(list("abcd"), 0.1)])


def answers(n_questions, n_answers=3):
    return [
        Example([q // 100, q % 100, 7, a], [False, False, False, True])
        for q in range(n_questions)
        for a in range(n_answers)
    ]


def test_all_answers_to_a_question_are_held_out_or_none_wherever_they_stand():
    train, held_out = split(answers(1000), 0.1)
    assert len(train) + len(held_out) == 3000 and 240 <= len(held_out) <= 360  # 4 deviations
    assert not {tuple(question(e)) for e in train} & {tuple(question(e)) for e in held_out}
    backwards, held_out_backwards = split(answers(1000)[::-1], 0.1)
    assert (backwards[::-1], held_out_backwards[::-1]) == (train, held_out)


def test_what_is_held_out_never_changes():
    """Recorded: with another hash a model would be trained on what an earlier one was measured on."""
    _, held_out = split(answers(40, n_answers=1), 0.1)
    assert [example.ids[1] for example in held_out] == [12, 21, 22, 23]


def test_texts_without_a_prompt_are_held_out_each_for_itself():
    texts = [Example([1, i, 9], [False, True, True]) for i in range(200)]
    train, held_out = split([*texts, *texts], 0.3)
    assert 30 < len(held_out) / 2 < 90 and Counter(tuple(e.ids) for e in held_out).most_common()[-1][1] == 2
    assert not {tuple(e.ids) for e in train} & {tuple(e.ids) for e in held_out}


def test_the_questions_held_out_are_those_that_a_task_holds_out(tmp_path):
    """From messages and from prompts, in whichever file, whatever the answers and the rest of the conversation."""
    tokenizer, asked = chat_tokenizer(), [f"What is {n} + {n}?" for n in range(100)]
    system = [{"role": "system", "content": "Be brief."}]
    files = [
        [{"prompt": f" {text}\n", "completion": str(n)} for n, text in enumerate(asked)],
        [chat(text, "<think>hm</think>1", "Sure?", "Yes.") for text in asked],
        [{"messages": [*system, *chat(f"{text} ", "2")["messages"]]} for text in asked],
    ]
    task = make_task("gsm8k", data=write(tmp_path, *({"question": q, "answer": "#### 1"} for q in asked)))
    wanted = {text for text in asked if is_in_share(text, 0.1)}
    assert wanted == {problem.prompt for problem in task.held_out(len(wanted))} and 2 < len(wanted) < 20
    for rows in files:
        found = read_examples(write(tmp_path, *rows), tokenizer, 1000, {"x": 1}).examples
        train, out = split(found, 0.1)
        assert {example.question for example in out} == wanted
        assert {example.question for example in train} == {*asked} - wanted


def test_anything_can_be_split_by_a_key_of_its_own():
    train, held_out = split(list("abcabc"), 0.5, key=str.upper)
    assert not set(train) & set(held_out) and sorted(train + held_out) == list("aabbcc")
    assert split(list("abc"), 0.0, key=str) == (list("abc"), [])


# ---- real tokenizers


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_a_chat_example_is_the_very_ids_that_generation_saw_and_made(name, tmp_path):
    if not (MODELS / name).exists():
        pytest.skip(f"needs NANOR1_MODELS with {name}")
    tokenizer = Tokenizer.from_pretrained(MODELS / name)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    prompt_ids = tokenizer.encode(prompt, allow_special=True)
    sampler = Sampler(Transformer.from_pretrained(MODELS / name, torch.float32))
    ((completion,),) = sampler.generate(
        [prompt_ids], max_new_tokens=60, temperature=0.0, stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size
    )
    assert completion.finish == "stop" and len(completion.ids) > 5
    answer = {"role": "assistant", "content": tokenizer.decode(completion.ids[:-1])}
    example = read_one(tmp_path, tokenizer, {"messages": [*messages, answer]})
    assert example.ids == prompt_ids + completion.ids
    assert example.is_target == [False] * len(prompt_ids) + [True] * len(completion.ids)
    rendered = tokenizer.encode(tokenizer.apply_chat_template([*messages, answer]), allow_special=True)
    assert rendered[: len(example.ids)] == example.ids
