"""Rejection sampling: what is kept, what the lines hold, and that a file goes on where it was stopped."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import Killed, die_saving, read_lines, rig
from vocabularies import of_bytes

from nanor1.grpo import Rollout
from nanor1.judge import Rules
from nanor1.model import Transformer
from nanor1.run.resumable import ledger_path
from nanor1.sampler import Completion, Sampler
from nanor1.stages import rejection_sampling
from nanor1.stages.rejection_sampling import DROPPED, Question, Selection, ask, collect, is_looping, select, to_line
from nanor1.tasks.problems import Example, Problem
from nanor1.tasks.prompts import Prompter
from nanor1.tokenizer import Tokenizer
from nanor1.weights import ModelConfig

WORDS = ["<think>", "</think>", "<answer>", "</answer>", "1", "2", "3", "4", "+", "=", "so"]
NEXT = {"=": ["<think>"], "<think>": ["so"], "so": ["so", "</think>"], "</think>": ["<answer>", "</answer>"]}
NEXT |= {"<answer>": ["3", "4"], "3": ["</answer>"], "4": ["</answer>"], "</answer>": ["<end>"]}
PROBLEMS = [
    Problem(f"{a} + {b} =", str(a + b), "arithmetic") for a, b in [(1, 2), (2, 2), (2, 1), (1, 3), (3, 1), (1, 1)]
]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|><think>\n"
DEFAULTS = dict(samples=6, batch_size=2, seed=0, source=dict(model="m", step=40, seed=0), arguments={"--n": 6})
DEFAULTS |= dict(max_new_tokens=12, temperature=1.0)


def rollout(text="<think> so </think> 3", finish="stop", problem=PROBLEMS[0], **parts):
    parts = {"accuracy": 1.0, "format": 1.0, "language": 1.0} | parts
    return Rollout(problem, [1], Completion([5, 6], [0.0, 0.0], finish), text, 1.0, parts)


def tiny_model():
    """Says `<think> so ... so </think> <answer> 3 </answer>`, or 4, or does not answer; a coin decides each."""
    tokenizer = Tokenizer.from_words(WORDS, eos="<end>")
    size = tokenizer.vocab_size
    model = Transformer(ModelConfig("llama", size, size, 8, 1, 1, 1, 8, 64))
    pairs = [(word, next_word) for word, following in NEXT.items() for next_word in following]
    return Sampler(rig(model, {tuple(map(tokenizer.token_id, pair)): 9.0 for pair in pairs}), 8), tokenizer


def sample(path, problems=PROBLEMS, selection=Selection(), say=print, **options):  # noqa: B008
    sampler, tokenizer = tiny_model()
    prompter = Prompter(tokenizer, "bare")
    questions = [ask(problem, prompter) for problem in problems]
    return collect(sampler, prompter, questions, Rules(), selection, path, say=say, **DEFAULTS | options)


# ---- what is kept


def test_right_readable_and_different_answers_are_kept_in_the_order_of_sampling():
    group = [
        rollout("a"),
        rollout("b", accuracy=0.0),
        rollout("c", finish="length", accuracy=0.0),
        rollout("d", format=0.0),
        rollout("e", language=0.9),
        rollout("f", language=0.995),
        rollout("So it is 4. " * 4),
        rollout(" a\n"),
        rollout("g", accuracy=None),
        rollout("h"),
        rollout("i"),
        rollout("j"),
    ]
    kept, dropped = select(group, Selection(max_per_problem=3))
    assert kept == [(0,), (5,), (9,)]
    assert dropped == {
        "wrong": 1,
        "cut off": 1,
        "format": 1,
        "language": 1,
        "looping": 1,
        "duplicate": 1,
        "not judged": 1,
        "above the limit": 2,
    }


def test_format_and_language_are_asked_for_only_as_the_selection_says():
    group = [rollout("a", format=0.0), rollout("b", language=0.5), rollout("c")]
    assert select(group, Selection())[0] == [(2,)]
    assert select(group, Selection(needs_format=False))[0] == [(0,), (2,)]
    assert select(group, Selection(min_language=0.5))[0] == [(1,), (2,)]


def test_nothing_said_is_no_training_text_however_right_a_rule_finds_it():
    kept, dropped = select([rollout("<think>"), rollout(" "), rollout("a")], Selection(needs_format=False))
    assert kept == [(2,)] and dropped == {"empty": 2}


def test_all_keeps_what_ended_and_says_something_right_or_wrong_as_often_as_it_comes():
    group = [rollout("a", accuracy=0.0), rollout("a"), rollout("<think>\n"), rollout("b", finish="length")] * 9
    kept, dropped = select(group, Selection("all", max_per_problem=1))
    assert kept == [(4 * i + j,) for i in range(9) for j in (0, 1)] and dropped == {"empty": 9, "cut off": 9}


def test_pairs_hold_different_final_answers_and_each_sample_is_in_one():
    group = [
        rollout("x </think> 5", accuracy=0.0),
        rollout("x </think> 3"),
        rollout("y </think>  3 "),  # thought otherwise, but the final answer is the same
        rollout("<think> x", accuracy=0.0),  # ended within its thinking: the empty answer
        rollout("y </think> 5", accuracy=0.0),
        rollout("x </think> 1 + 2"),
        rollout("x </think> 7", accuracy=0.0, finish="length"),
        rollout("x </think> 2 + 1", format=0.0),
        rollout("x </think> 6", accuracy=0.0),
    ]
    pairs, dropped = select(group, Selection("pairs"))
    assert pairs == [(1, 0), (5, 3)]
    assert dropped == {"duplicate": 2, "cut off": 1, "format": 1, "unpaired": 1}
    pairs, dropped = select(group, Selection("pairs", max_per_problem=1))
    assert pairs == [(1, 0)] and dropped["above the limit"] == 2


@given(
    st.lists(
        st.builds(
            rollout,
            text=st.sampled_from(["a", "b ", "b", "c </think> a", "<think>", "So it is 4. " * 4]),
            finish=st.sampled_from(["stop", "stop", "length"]),
            accuracy=st.sampled_from([0.0, 1.0, None]),
            format=st.sampled_from([0.0, 1.0]),
            language=st.sampled_from([0.5, 1.0]),
        )
    ),
    st.sampled_from(["all", "correct", "pairs"]),
    st.integers(1, 3),
)
def test_every_sample_is_kept_once_or_dropped_for_one_reason(group, keep, limit):
    kept, dropped = select(group, Selection(keep, max_per_problem=limit))
    flat = [g for samples in kept for g in samples]
    assert len(set(flat)) == len(flat) and len(flat) + dropped.total() == len(group)
    assert dropped.keys() <= DROPPED.keys() and all(count > 0 for count in (+dropped).values())
    assert keep == "all" or len(kept) <= limit
    for chosen, *others in kept if keep != "all" else []:
        assert group[chosen].parts["accuracy"] == 1 and all(group[g].parts["accuracy"] == 0 for g in others)


@pytest.mark.parametrize(
    "text, loops",
    [
        ("I see it now.\n" * 4, True),
        ("First some work. " + "the same thing again\n\n" * 5 + "</think> 4", True),
        ("a b c d e f g h. 1\na b c d e f g h. 2\n" * 4, True),
        ("I see it now.\n" * 3, False),
        ("no no no no no no no", False),  # short words may stand so often
        ("1 + 1 + 1 + 1 + 1 = 5", False),
        ("Is it 12? No. Is it 13? No. Is it 14? No. Is it 15? No. Is it 16? Yes.", False),
    ],
)
def test_a_stretch_of_text_four_times_in_a_row_is_a_loop(text, loops):
    assert is_looping(text) == loops


@given(st.text("ab ", max_size=60), st.text("ab \n", max_size=40), st.integers(0, 8), st.text("ab ", max_size=60))
def test_loops_are_found_where_a_regular_expression_finds_them(before, unit, n, after):
    text = before + unit * n + after
    assert is_looping(text) == (re.search(r"(.{10,300}?)\1{3}", " ".join(text.split()) + " ") is not None)


def test_a_long_text_is_searched_for_loops_in_a_moment():
    assert not is_looping(" ".join(map(str, range(20_000))))


# ---- lines


def test_a_line_of_plain_text_is_prompt_and_completion_with_their_provenance():
    question = Question("1 + 2 = <think>", ("1 + 2 = <think>", [1]), PROBLEMS[0])
    group = [rollout(), rollout("<think> so </think> 3", format=0.0, language=1 / 3)]
    assert to_line(question, 7, group, (1,), dict(model="m", step=40, seed=3)) == {
        "prompt": "1 + 2 = <think>",
        "completion": " so </think> 3",
        "problem": 7,
        "model": "m",
        "step": 40,
        "seed": 3,
        "sample": 1,
        "task": "arithmetic",
        "answer": "3",
        "parts": {"accuracy": 1.0, "format": 0.0, "language": 0.333333},
        "tokens": 2,
    }


def test_an_answer_to_messages_holds_the_think_tag_that_the_template_pre_filled(tmp_path):
    tokenizer = of_bytes(specials=["<|user|>", "<|assistant|>"], chat_template=TEMPLATE)
    question = ask(PROBLEMS[0], Prompter(tokenizer, "chat"))
    line = to_line(question, 0, [rollout("<think>so</think> 3")], (0,), {})
    assert line["messages"] == [*question.shown, {"role": "assistant", "content": "<think>so</think> 3"}]
    assert question.shown[0]["content"].startswith("1 + 2 =\n\nThink first")


def test_the_lines_are_learned_token_for_token_as_they_were_sampled(tmp_path):
    sft = pytest.importorskip("nanor1.stages.sft")
    path, seen = tmp_path / "traces.jsonl", []
    _, tokenizer = tiny_model()
    generate = Sampler.generate

    def watched(sampler, prompts, **options):
        groups = generate(sampler, prompts, **options)
        seen.extend((tuple(prompt), tuple(c.ids)) for prompt, g in zip(prompts, groups, strict=True) for c in g)
        return groups

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "generate", watched)
        ledger = sample(path)
    examples = sft.read_examples(path, tokenizer, 64).examples
    assert len(examples) == ledger.counts["kept"] > 3
    for example in examples:
        n_prompt = example.is_target.index(True)
        assert all(example.is_target[n_prompt:])
        assert (tuple(example.ids[:n_prompt]), tuple(example.ids[n_prompt:])) in seen


def test_pairs_are_read_as_preferences(tmp_path):
    preference = pytest.importorskip("nanor1.stages.reward_model")
    path = tmp_path / "pairs.jsonl"
    ledger = sample(path, selection=Selection("pairs"), samples=12)
    pairs = preference.read_pairs(path, tiny_model()[1], 64)
    assert len(pairs.examples) == ledger.counts["kept"] > 3
    assert {row["prompt"] for row in read_lines(path)} <= {problem.prompt for problem in PROBLEMS}
    for row in read_lines(path):
        assert [parts["accuracy"] for parts in row["parts"]] == [1.0, 0.0] and len(set(row["sample"])) == 2


# ---- the file


def test_what_is_counted_adds_up_and_the_kept_answers_are_right(tmp_path):
    path = tmp_path / "traces.jsonl"
    ledger = sample(path, samples=12)
    counts, kept = Counter(ledger.counts), read_lines(path)
    assert ledger.is_whole and counts["sampled"] == 72 and counts["kept"] == len(kept)
    assert counts["sampled"] == counts["kept"] + sum(counts[name] for name in DROPPED)
    assert counts["wrong"] and counts["duplicate"] and counts["cut off"]
    assert counts["problems"] == len({row["problem"] for row in kept}) and ledger.n_bytes == path.stat().st_size
    for row in kept:
        problem = PROBLEMS[row["problem"]]
        assert row["prompt"] == problem.prompt and row["answer"] == problem.answer
        assert row["completion"].endswith(f"</think> <answer> {problem.answer} </answer>")
    report = rejection_sampling.summary(ledger, Selection())
    assert report.startswith("sampled") and f"{len(kept)}   of {counts['problems']} problems" in report


def test_a_problem_that_comes_twice_gives_no_line_twice(tmp_path):
    path, other = tmp_path / "traces.jsonl", tmp_path / "once.jsonl"
    once = sample(other, problems=PROBLEMS[:1], samples=20)
    twice = sample(path, problems=PROBLEMS[:1] * 3, samples=20, batch_size=1)
    texts = [(row["prompt"], row["completion"]) for row in read_lines(path)]
    assert len(set(texts)) == len(texts)
    assert twice.counts["duplicate"] > 3 * once.counts["duplicate"] / 2
    assert twice.counts["sampled"] == twice.counts["kept"] + sum(twice.counts.get(name, 0) for name in DROPPED)


def test_killed_sampling_goes_on_without_duplicates_to_the_bytes_of_an_uninterrupted_run(tmp_path):
    killed, whole, said = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl", []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_saving(patch, 4)
        sample(killed)
    ledger = json.loads(ledger_path(killed).read_text())
    assert ledger["n_done"] == 2 and killed.stat().st_size > ledger["n_bytes"] > 0
    sample(whole)
    sample(killed, say=said.append)
    assert killed.read_bytes() == whole.read_bytes()
    assert ledger_path(killed).read_text() == ledger_path(whole).read_text()
    assert said == [f"{killed} goes on after 2 of 6 problems"]


def test_other_problems_do_not_continue_a_file(tmp_path):
    path = tmp_path / "traces.jsonl"
    sample(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="begun with problems"):
        sample(path, problems=[*PROBLEMS[:5], Problem("1 + 1 =", "3", "arithmetic")])
    assert path.read_bytes() == before


def test_examples_that_were_shown_are_no_part_of_what_is_learned():
    tokenizer = of_bytes(specials=["<|user|>", "<|assistant|>"], chat_template=TEMPLATE)
    shots = (Example("1 + 1 =", "2"),)
    for template, asked in (("bare", "1 + 1 =\n2\n\n"), ("chat", "1 + 1 =")):
        question = ask(PROBLEMS[0], Prompter(tokenizer, template, examples=shots))
        assert asked in question.prompt[0] and "1 + 1" not in str(question.shown)
        assert question.shown == Prompter(tokenizer, template).show(PROBLEMS[0])
