import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import randomize, write_lines
from safetensors.torch import load_file
from vocabularies import of_bytes, of_words

from nanor1.gradient import Workers
from nanor1.model import ModelConfig, Transformer
from nanor1.optim import MasterAdamW
from nanor1.stages.reward_model import (
    Pair,
    RewardModel,
    add_gradient,
    load_reward_model,
    pair_loss,
    preference,
    read_pairs,
    score,
)
from nanor1.tokenizer import Tokenizer
from nanor1.weights import config_from_hf, is_reward_model

CONFIG = ModelConfig("llama", 40, 24, 40, 2, 4, 2, 6, 64)
LLAMA = dict(
    model_type="llama", vocab_size=40, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, hidden_act="silu", rope_theta=10_000.0,
    tie_word_embeddings=False, pad_token_id=39,
)  # fmt: skip
GPT2 = dict(model_type="gpt2", vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=39)
FAMILIES = {
    "llama": LLAMA,
    "llama, tied": LLAMA | dict(tie_word_embeddings=True),
    "qwen2": LLAMA | dict(model_type="qwen2"),
    "qwen3": LLAMA | dict(model_type="qwen3", head_dim=12),
    "gpt2": GPT2,
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}{% if add_generation_prompt %}bot :{% endif %}"
)
WORDS = "a b c d e f g h please user bot : <think> </think>".split()
TOKENIZER = of_words(WORDS, chat_template=TEMPLATE)
STOP = TOKENIZER.eos_id
ALL_IN_ONE, ONE_EACH = 10**6, 1  # tokens_per_batch


def random_scorer(seed=0, config=CONFIG):
    return randomize(RewardModel(config), seed)


def ids(text):
    return TOKENIZER.encode(text)


def pair(prompt, chosen, rejected, margin=0.0):
    return Pair(ids(prompt), [*ids(chosen), STOP], [*ids(rejected), STOP], margin)


PAIRS = [
    pair("a b c", "d", "e f g h", 0.5),
    pair("a", "c a please", "b b"),
    pair("a", "", "please please please please please", 2.0),  # the prompt of its neighbour, and an empty answer
    pair("h g f e d c b a", "a b c d", "d", -1.0),
    pair("b", "a", "c"),
]


@torch.no_grad()
def lone_score(model, prompt_ids, answer_ids):
    """The score of one sequence laid out whole, by the definition: the head on the last hidden state."""
    sequence = torch.tensor(prompt_ids + answer_ids)
    return (model(sequence, torch.tensor([0, len(sequence)]))[-1] @ model.score.weight[0]).item()


def gradient(model, pairs, tokens_per_batch=ALL_IN_ONE, center_coef=0.3, n_workers=1, loss_scale=1.0):
    model.zero_grad()
    terms = add_gradient(Workers(model, n_workers), pairs, tokens_per_batch, center_coef, loss_scale)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), terms


def test_a_scaled_loss_scales_the_gradient_and_no_metric():
    (plain, terms), (scaled, scaled_terms) = (gradient(random_scorer(), PAIRS, 20, loss_scale=s) for s in (1, 2**16))
    assert scaled_terms == terms and torch.equal(scaled, plain * 2**16)


# ---- the loss


def test_the_loss_by_hand():
    score_P2 = torch.tensor([[math.log(3), 0.0], [1.0, 1.0], [0.0, 5.0]])
    losses = pair_loss(score_P2, torch.zeros(3)).tolist()  # sigmoid(ln 3) = 3/4
    assert losses == pytest.approx([math.log(4 / 3), math.log(2), 5 + math.log1p(math.exp(-5))])


def test_a_margin_is_taken_off_the_difference_and_centring_adds_the_squared_sum():
    score_P2, margin_P = torch.tensor([[math.log(3) + 2, 0.0], [2.0, -3.0]]), torch.tensor([2.0, 5.0])
    assert pair_loss(score_P2, margin_P).tolist() == pytest.approx([math.log(4 / 3), math.log(2)])
    centring = (pair_loss(score_P2, margin_P, 0.1) - pair_loss(score_P2, margin_P)).tolist()
    assert centring == pytest.approx([0.1 * (math.log(3) + 2) ** 2, 0.1])


def test_only_centring_says_anything_about_the_common_offset_of_scores():
    offset = torch.tensor(3.0, requires_grad=True)
    scores = torch.tensor([[1.0, -1.0]]) + offset
    (free,) = torch.autograd.grad(pair_loss(scores, torch.zeros(1)).sum(), offset, retain_graph=True)
    (centred,) = torch.autograd.grad(pair_loss(scores, torch.zeros(1), 0.5).sum(), offset)
    assert free.item() == pytest.approx(0.0, abs=1e-6)
    assert centred.item() == pytest.approx(12.0)  # 0.5 * 2 * (4 + 2) * 2


def test_scores_far_apart_give_a_finite_loss_and_gradient():
    scores = torch.tensor([[-1e4, 1e4], [1e4, -1e4]], requires_grad=True)
    loss = pair_loss(scores, torch.zeros(2))
    loss.sum().backward()
    assert loss.tolist() == [2e4, 0.0]
    assert scores.grad.tolist() == [[-1.0, 1.0], [0.0, 0.0]]


# ---- the gradient of an update


@pytest.mark.parametrize("item", PAIRS)
def test_after_a_step_the_chosen_answer_scores_higher_against_the_rejected_one(item):
    model = random_scorer()
    before = [lone_score(model, item.prompt_ids, x) for x in (item.chosen_ids, item.rejected_ids)]
    gradient(model, [item], center_coef=0.0)
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-4 * p.grad
    after = [lone_score(model, item.prompt_ids, x) for x in (item.chosen_ids, item.rejected_ids)]
    assert after[0] - after[1] > before[0] - before[1]


def test_a_step_of_the_head_raises_the_chosen_score_and_lowers_the_rejected_one():
    model = random_scorer()
    item = PAIRS[1]
    before = [lone_score(model, item.prompt_ids, x) for x in (item.chosen_ids, item.rejected_ids)]
    gradient(model, [item], center_coef=0.0)
    (gap,) = model.score.weight.grad  # (p - 1) (state_chosen - state_rejected)
    model.score.weight.data -= 0.1 * gap
    after = [lone_score(model, item.prompt_ids, x) for x in (item.chosen_ids, item.rejected_ids)]
    assert after[0] > before[0] and after[1] < before[1]


def naive_loss(model, pairs, center_coef):
    """Each sequence whole and alone; the formula of the sources written out."""
    total = 0.0
    for item in pairs:
        sequences = [torch.tensor(item.prompt_ids + x) for x in (item.chosen_ids, item.rejected_ids)]
        chosen, rejected = (model.score(model(x, torch.tensor([0, len(x)]))[-1])[0] for x in sequences)
        wins = 1 / (1 + torch.exp(-(chosen - rejected - item.margin)))
        total = total - torch.log(wins) + center_coef * (chosen + rejected) ** 2
    return total / len(pairs)


def test_packed_loss_and_gradient_are_those_of_one_sequence_at_a_time():
    model = random_scorer()
    mine, terms = gradient(model, PAIRS)
    model.zero_grad()
    loss = naive_loss(model, PAIRS, 0.3)
    loss.backward()
    assert terms.loss == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(mine, torch.cat([p.grad.flatten() for p in model.parameters()]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize("tokens_per_batch", [ONE_EACH, 20, ALL_IN_ONE])
@pytest.mark.parametrize("turn", [0, 2])
def test_neither_the_split_nor_the_order_nor_the_number_of_workers_changes_the_update(
    n_workers, tokens_per_batch, turn
):
    model = random_scorer()
    wanted, terms = gradient(model, PAIRS)
    mine, others = gradient(model, PAIRS[turn:] + PAIRS[:turn], tokens_per_batch, n_workers=n_workers)
    torch.testing.assert_close(mine, wanted, atol=2e-5, rtol=1e-4)
    learned = ("n", "n_right", "loss", "difference", "score")
    assert [vars(others)[key] for key in learned] == pytest.approx([vars(terms)[key] for key in learned], rel=1e-4)


def test_the_terms_of_an_update_and_of_an_evaluation_are_means_of_lone_scores():
    model = random_scorer()
    scores = [[lone_score(model, p.prompt_ids, x) for x in (p.chosen_ids, p.rejected_ids)] for p in PAIRS]
    _, terms = gradient(model, PAIRS)
    held_out = add_gradient(Workers(model), PAIRS, 20, learns=False)
    for each in (terms, held_out):
        assert each.n == 5 and each.flops > 0
        assert each.n_right == sum(chosen > rejected for chosen, rejected in scores)
        assert each.difference == pytest.approx(sum(a - b for a, b in scores) / 5, abs=1e-5)
        assert each.score == pytest.approx(sum(a + b for a, b in scores) / 10, abs=1e-5)
    assert 0 < held_out.n_right < 5 and held_out.accuracy == held_out.n_right / 5
    assert held_out.loss == pytest.approx(naive_loss(model, PAIRS, 0.0).item(), rel=1e-5)


def packed_sizes(model):
    """A list to which each forward of the model adds its number of packed tokens."""
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


def test_pairs_are_packed_longest_first_within_the_limit():
    model = random_scorer()
    sizes = packed_sizes(model)
    add_gradient(Workers(model), PAIRS, 20)  # of 10, 8, 8, 15 and 5 tokens
    add_gradient(Workers(model), PAIRS, 28)
    assert sizes == [15, 10 + 8, 8 + 5, 15 + 10, 8 + 7 + 5]  # neighbours share a prompt of one token
    sizes.clear()
    assert add_gradient(Workers(model), PAIRS, ONE_EACH).n_tokens == 46
    assert sizes == [15, 10, 8, 8, 5]


def test_the_work_of_an_update_counts_blocks_and_attended_pairs_and_no_output_matrix():
    pairs = [pair("a b c", "d", "e f g h")]  # 3 tokens, then 2 and 5
    terms = add_gradient(Workers(random_scorer()), pairs, ALL_IN_ONE)
    matrices = 2 * (24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 40)  # q and o, k and v, the MLP; two layers
    attended = (1 + 2 + 3) + (4 + 5) + (4 + 5 + 6 + 7 + 8)
    assert terms.flops == 6 * matrices * 10 + 12 * 2 * 4 * 6 * attended


def test_evaluating_leaves_no_gradient_in_any_worker():
    workers = Workers(random_scorer(), 2)
    add_gradient(workers, PAIRS, ONE_EACH, learns=False)
    assert all(p.grad is None for model in workers.models for p in model.parameters())


def test_ties_count_half():
    model = random_scorer()
    model.score.weight.data.zero_()
    terms = add_gradient(Workers(model), PAIRS, ALL_IN_ONE, learns=False)
    assert (terms.n_right, terms.accuracy, terms.difference) == (2.5, 0.5, 0.0)
    unmargined = [Pair(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in PAIRS]
    assert add_gradient(Workers(model), unmargined, ALL_IN_ONE, learns=False).loss == pytest.approx(math.log(2))


# ---- learning


def planted_pairs(n, seed, is_random):
    """The answer with "please" somewhere in it is preferred; or else either of the two, by a coin."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(n):
        prompt, *answers = (rng.choices("abcdefgh", k=rng.randint(2, 5)) for _ in range(3))
        answers[0][rng.randrange(len(answers[0]))] = "please"
        if is_random:
            rng.shuffle(answers)
        pairs.append(pair(*(" ".join(words) for words in (prompt, *answers))))
    return pairs


@pytest.mark.parametrize("is_random", [False, True])
def test_a_planted_preference_is_learned_and_a_random_one_is_not(is_random):
    torch.manual_seed(0)
    model = RewardModel(CONFIG)
    model.score.weight.data.zero_()
    workers, optimizer = Workers(model), MasterAdamW(model)
    train, held_out = planted_pairs(640, 1, is_random), planted_pairs(300, 2, is_random)
    for step in range(40):
        at = step * 32 % len(train)
        add_gradient(workers, train[at : at + 32], ALL_IN_ONE, center_coef=0.01)
        optimizer.step(3e-3, 1.0)
    terms = add_gradient(workers, held_out, ALL_IN_ONE, learns=False)
    if is_random:
        assert 0.42 < terms.accuracy < 0.58  # the deviation of chance is 0.03
        return
    assert terms.accuracy > 0.95 and terms.difference > 2
    assert abs(terms.score) < 0.5  # centred
    nice, plain = score(model, TOKENIZER, [ids("a b"), ids("c d")], ["d please h", "d e h"], ALL_IN_ONE)
    assert preference(nice) > 0.7 and preference(plain) < 0.3


# ---- what is scored


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 2), st.text("abcdefgh ", max_size=12)), max_size=8), st.integers(1, 60))
def test_scores_are_those_of_each_sequence_alone_in_the_order_given(requests, tokens_per_batch):
    model, prompts = random_scorer(), [ids("a b"), ids("c"), ids("h g f e d")]
    texts = [" ".join(text.replace(" ", "")) for _, text in requests]
    mine = score(model, TOKENIZER, [prompts[i] for i, _ in requests], texts, tokens_per_batch)
    alone = [lone_score(model, prompts[i], [*ids(text), STOP]) for (i, _), text in zip(requests, texts, strict=True)]
    assert mine == pytest.approx(alone, abs=1e-4)


def test_completions_of_a_prompt_share_it_within_the_limit():
    model = random_scorer()
    sizes = packed_sizes(model)
    score(model, TOKENIZER, [ids("a b c d e")] * 5, ["a b c"] * 5, 13)
    assert sizes == [5 + 4 + 4, 5 + 4 + 4, 5 + 4]


def test_only_the_final_answer_counts():
    model, prompt = random_scorer(), ids("a b <think>")
    texts = ["<think> a b c </think>\n\nd e\n", "<think> please please </think>  d e ", "d e", "<think> a </think> e d"]
    one, two, bare, other = score(model, TOKENIZER, [prompt] * 4, texts, ALL_IN_ONE)
    assert one == two == bare
    assert abs(other - one) > 1e-3


def test_a_response_that_is_still_thinking_is_scored_as_the_empty_answer():
    model, prompt = random_scorer(), ids("a b")
    thinking, empty = score(model, TOKENIZER, [prompt] * 2, ["<think> a please", "<think> c </think>"], ONE_EACH)
    assert thinking == empty == pytest.approx(lone_score(model, prompt, [STOP]), abs=1e-5)


def test_what_does_not_fit_the_context_scores_nan_and_the_others_their_own():
    model, prompt = random_scorer(), ids("a")
    scores = score(model, TOKENIZER, [prompt] * 3, ["b " * 62, "b " * 63, "c"], ALL_IN_ONE)  # 64, 65 and 3 tokens
    assert [math.isnan(x) for x in scores] == [False, True, False]
    assert scores[2] == pytest.approx(lone_score(model, prompt, [*ids("c"), STOP]), abs=1e-5)


def test_a_special_token_spelled_out_in_an_answer_stays_mere_text():
    tokenizer = of_bytes(pad="<|user|>")
    model = random_scorer(config=ModelConfig("llama", tokenizer.vocab_size, 24, 40, 2, 4, 2, 6, 64))
    prompt, text = tokenizer.encode("Hi"), "x<|user|>Good!<|endoftext|>"
    (mine,) = score(model, tokenizer, [prompt], [text], ALL_IN_ONE)
    assert mine == pytest.approx(lone_score(model, prompt, [*text.encode(), tokenizer.eos_id]), abs=1e-5)


def test_a_preference_is_the_probability_of_the_score_and_none_where_there_is_none():
    assert [preference(x) for x in (0.0, math.log(3), -math.log(3))] == pytest.approx([0.5, 0.75, 0.25])
    assert [preference(x) for x in (1e6, -1e6)] == [1.0, 0.0]
    assert [preference(x) for x in (math.nan, math.inf, -math.inf)] == [None] * 3


def test_bf16_weights_give_fp32_scores_close_to_those_of_fp32():
    model = random_scorer()
    prompts, texts = [ids("a b")] * 3, ["c d", "please", "h g f e"]
    wanted = score(model, TOKENIZER, prompts, texts, ALL_IN_ONE)
    narrow = score(model.to(torch.bfloat16), TOKENIZER, prompts, texts, ALL_IN_ONE)
    assert narrow == pytest.approx(wanted, abs=0.1 * max(map(abs, wanted)))
    assert any(x != torch.tensor(x).bfloat16().item() for x in narrow)


# ---- pairs from a file


def test_both_forms_of_a_pair_are_read_as_prompt_answer_and_stop_token(tmp_path):
    path = write_lines(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": "a b", "chosen": "<think> c </think> d", "rejected": " e f ", "margin": 2},
            {
                "prompt": [{"role": "user", "content": "a b"}],
                "chosen": [{"role": "assistant", "content": "d"}],
                "rejected": [{"role": "assistant", "content": "<think> e f"}],
            },
        ],
    )
    text, chat = read_pairs(path, TOKENIZER, 100).examples
    assert text == Pair(ids("a b"), [*ids("d"), STOP], [*ids("e f"), STOP], 2.0)
    assert chat == Pair(ids("user : a b bot :"), [*ids("d"), STOP], [STOP], 0.0)


def test_a_chat_templates_special_tokens_are_tokens_and_a_texts_are_text(tmp_path):
    tokenizer = of_bytes(specials=["<|bot|>"], chat_template="{{ messages[0].content }}<|bot|>")
    row = {"prompt": [{"role": "user", "content": "x"}], "chosen": "y", "rejected": "z"}
    path = write_lines(tmp_path / "pairs.jsonl", [row, row | {"prompt": "x<|bot|>"}])
    chat, text = read_pairs(path, tokenizer, 100).examples
    assert chat.prompt_ids == [ord("x"), tokenizer.token_id("<|bot|>")]
    assert text.prompt_ids == list(b"x<|bot|>")


def test_a_pair_is_scored_in_use_as_it_was_in_training(tmp_path):
    model, thought = random_scorer(), "<think> a </think> d e"
    path = write_lines(tmp_path / "pairs.jsonl", [{"prompt": "a b", "chosen": thought, "rejected": "h"}])
    (item,) = read_pairs(path, TOKENIZER, 100).examples
    chosen, rejected = score(model, TOKENIZER, [ids("a b")] * 2, [thought, "h"], ALL_IN_ONE)
    assert chosen - rejected == pytest.approx(
        add_gradient(Workers(model), [item], ONE_EACH, learns=False).difference, abs=1e-5
    )


SYSTEM_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.reasoning_content }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}bot : {{ mood }}{% endif %}"
)


def test_the_prompt_of_a_pair_takes_variables_a_system_message_and_earlier_thinking(tmp_path):
    tokenizer = of_words([*WORDS, "system"], chat_template=SYSTEM_TEMPLATE)
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "bot", "content": "b", "reasoning_content": "c"},
        {"role": "user", "content": "d"},
    ]
    path = write_lines(tmp_path / "pairs.jsonl", [{"prompt": prompt, "chosen": "e", "rejected": "f", "split": "all"}])
    read = read_pairs(path, tokenizer, 100, {"mood": "please"}, system="g h")
    wanted = "system : g h user : a bot : c b user : d bot : please"
    assert tokenizer.decode(read.examples[0].prompt_ids) == wanted
    assert read.examples[0].question == "a" and read.n_not_train == 1
    own = [{"role": "system", "content": "h"}, *prompt]
    write_lines(path, [{"prompt": own, "chosen": "e", "rejected": "f"}])
    read = read_pairs(path, tokenizer, 100, {"mood": "please"}, system="g h")
    assert tokenizer.decode(read.examples[0].prompt_ids).startswith("system : h user : a") and read.n_not_train == 0


def test_a_system_message_has_no_place_before_a_plain_prompt_and_thinking_is_one_text(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", [GOOD])
    with pytest.raises(ValueError, match="line 1: expected messages, before which a system message can stand"):
        read_pairs(path, TOKENIZER, 100, system="a")
    said = {"role": "assistant", "content": "b", "reasoning": "c", "thinking": "d"}
    write_lines(path, [GOOD | {"prompt": [{"role": "user", "content": "a"}, said]}])
    with pytest.raises(ValueError, match="line 1: .*different ones in reasoning and thinking"):
        read_pairs(path, TOKENIZER, 100)


def test_the_questions_of_pairs_are_those_of_examples(tmp_path):
    message = {"role": "user", "content": " a b "}
    path = write_lines(tmp_path / "pairs.jsonl", [GOOD | {"prompt": "a b\n"}, GOOD | {"prompt": [message]}])
    assert [pair.question for pair in read_pairs(path, TOKENIZER, 100).examples] == ["a b", "a b"]


def test_pairs_that_are_too_long_or_equal_in_the_final_answer_are_left_out_and_counted(tmp_path):
    path = write_lines(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": "a b", "chosen": "c d", "rejected": "e"},  # 2 + 2 + the stop token
            {"prompt": "a b", "chosen": "c", "rejected": "e f g"},
            {"prompt": "a b", "chosen": "<think> c </think> d", "rejected": "<think> e </think> d"},
        ],
    )
    read = read_pairs(path, TOKENIZER, 5)
    assert (len(read.examples), read.n_too_long, read.n_equal) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"none of its 3 pairs.*2 are longer than 4 tokens, 1 have the same"):
        read_pairs(path, TOKENIZER, 4)


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
MALFORMED = {
    "no prompt": ({"chosen": "b", "rejected": "c"}, "'prompt'.*None"),
    "blank prompt": (GOOD | {"prompt": " "}, "'prompt'"),
    "no messages": (GOOD | {"prompt": []}, "'prompt'"),
    "a message without content": (GOOD | {"prompt": [{"role": "user"}]}, "'content'"),
    "no chosen": ({"prompt": "a", "rejected": "c"}, "'chosen'.*None"),
    "a number": (GOOD | {"rejected": 3}, "'rejected'.*3"),
    "two messages": (GOOD | {"chosen": [{"role": "assistant", "content": "b"}] * 2}, "'chosen'.*one assistant"),
    "a user's message": (GOOD | {"chosen": [{"role": "user", "content": "b"}]}, "'chosen'.*assistant"),
    "an infinite margin": (GOOD | {"margin": math.inf}, "'margin'.*inf"),
    "a text margin": (GOOD | {"margin": "1"}, "'margin'.*'1'"),
    "a truth as margin": (GOOD | {"margin": True}, "'margin'.*True"),
    "an unknown word": (GOOD | {"chosen": "zebra"}, "zebra"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_pair_is_refused_with_file_line_and_fault(tmp_path, name):
    row, fault = MALFORMED[name]
    path = write_lines(tmp_path / "pairs.jsonl", [GOOD, row])
    with pytest.raises(ValueError, match=f"pairs.jsonl, line 2: .*{fault}"):
        read_pairs(path, TOKENIZER, 100)


def test_messages_without_a_chat_template_are_refused(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", [GOOD | {"prompt": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ValueError, match="line 1: .*no chat template"):
        read_pairs(path, Tokenizer.from_words(WORDS), 100)


# ---- folders


def test_saving_and_loading_changes_no_bit(tmp_path):
    model = random_scorer().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert "lm_head.weight" not in mine and mine["score.weight"].shape == (1, 24)
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_language_model_becomes_a_reward_model_whose_scores_are_zero(tmp_path, name):
    language_model = randomize(Transformer(config_from_hf(FAMILIES[name])))
    language_model.hf_config = FAMILIES[name] | {"eos_token_id": STOP}
    language_model.save_pretrained(tmp_path / "base")
    model = RewardModel.from_pretrained(tmp_path / "base")
    assert score(model, TOKENIZER, [ids("a")], ["b"], ALL_IN_ONE) == [0.0]
    sequence = torch.tensor(ids("a b c d")), torch.tensor([0, 4])
    assert torch.equal(model(*sequence), language_model(*sequence))

    model.save_pretrained(tmp_path / "scorer")
    assert not is_reward_model(tmp_path / "base") and is_reward_model(tmp_path / "scorer")
    saved = json.loads((tmp_path / "scorer" / "config.json").read_text())
    assert saved["eos_token_id"] == STOP and saved["architectures"][0].endswith("ForSequenceClassification")


def test_each_kind_of_folder_is_refused_where_the_other_is_needed(tmp_path):
    random_scorer().save_pretrained(tmp_path / "scorer")
    for is_tied in (False, True):
        config = ModelConfig("llama", 40, 24, 40, 2, 4, 2, 6, 64, tie_word_embeddings=is_tied)
        Transformer(config).save_pretrained(tmp_path / "base")
        TOKENIZER.save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match="base holds a language model, which has no score"):
            load_reward_model(tmp_path / "base", TOKENIZER, None, None)
    with pytest.raises(ValueError, match="scorer holds a reward model.*give a language model"):
        Transformer.from_pretrained(tmp_path / "scorer")


def test_the_trainer_sees_every_parameter_and_replicas_share_them(tmp_path):
    model = random_scorer()
    optimizer = MasterAdamW(model)
    assert {"score.weight", "model.embed_tokens.weight"} <= optimizer.params.keys()
    before = model.score.weight.clone()
    workers = Workers(model, 2)
    add_gradient(workers, PAIRS, ONE_EACH)
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step(0.1, 1.0)
    assert not torch.equal(model.score.weight, before)
    assert workers.models[1].score.weight.data_ptr() == model.score.weight.data_ptr()


def test_a_compiled_reward_model_is_saved_by_the_same_names(tmp_path):
    model = random_scorer()
    model.compile_blocks(backend="eager")
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == random_scorer().state_dict().keys()


# ---- transformers


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    module.logging.set_verbosity_error()
    return module


REQUESTS = [("a b c", "d"), ("a", "c a please please"), ("h g f e d c b a", "")]


@torch.no_grad()
def hf_scores(model, is_batched):
    """Padded behind, as one batch, or one by one."""
    sequences = [[*ids(prompt), *ids(answer), STOP] for prompt, answer in REQUESTS]
    longest = max(map(len, sequences))
    if not is_batched:
        return [model(torch.tensor([sequence])).logits.item() for sequence in sequences]
    padded = torch.tensor([sequence + [39] * (longest - len(sequence)) for sequence in sequences])
    return model(padded, attention_mask=(padded != 39).long()).logits[:, 0].tolist()


def our_scores(model):
    return score(model, TOKENIZER, [ids(prompt) for prompt, _ in REQUESTS], [a for _, a in REQUESTS], ALL_IN_ONE)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_scores_our_reward_model_as_we_do(transformers, tmp_path, name):
    ours = random_scorer(config=config_from_hf(FAMILIES[name]))
    ours.hf_config = FAMILIES[name] | {"pad_token_id": 39}
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    wanted = our_scores(ours)
    assert torch.tensor(wanted).std() > 0.1
    for is_batched in (False, True):
        assert hf_scores(theirs.eval(), is_batched) == pytest.approx(wanted, abs=1e-4)


def hf_folder(transformers, folder, hf_config, n_labels):
    (folder / "config.json").write_text(json.dumps(hf_config))
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=n_labels)
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    model = randomize(model.float()).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reward_model_of_transformers_scores_the_same_here_and_is_saved_as_it_was(transformers, tmp_path, name):
    theirs = hf_folder(transformers, tmp_path, FAMILIES[name], 1)
    ours = RewardModel.from_pretrained(tmp_path)
    assert our_scores(ours) == pytest.approx(hf_scores(theirs, is_batched=True), abs=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    mine, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "ours", tmp_path))
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.mark.parametrize("n_labels", [2, 3])
def test_a_classifier_of_several_labels_is_refused(transformers, tmp_path, n_labels):
    hf_folder(transformers, tmp_path, LLAMA, n_labels)
    with pytest.raises(ValueError, match=f"a classifier of {n_labels} labels; a reward model has one"):
        RewardModel.from_pretrained(tmp_path)
