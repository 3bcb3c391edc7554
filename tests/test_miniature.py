import collections
import dataclasses
import functools
import itertools
import re

import pytest
import torch

from nanor1.gradient import Workers, add_gradient
from nanor1.miniature import (
    MINIATURES,
    Muon,
    base_model,
    calculate,
    documents,
    expression,
    find_model,
    make_tokenizer,
    miniature_task,
    new_model,
    next_examples,
    orthogonalize,
    own_miniature,
    pretrain,
    tries,
)
from nanor1.model import Transformer
from nanor1.run.checkpoint import save_checkpoint
from nanor1.tasks.countdown import check_countdown
from nanor1.tasks.problems import Problem, instance_key, is_in_share
from nanor1.tokenizer import Tokenizer

NAMES = ["arithmetic", "countdown"]  # countdown-small differs in its size alone
COUNTDOWN = MINIATURES["countdown"]
PROMPTS = {
    "countdown": re.compile(r"(?P<numbers>\d+ \d+ \d+) target (?P<target>\d+) : (?P<response>.*) <end>"),
    "arithmetic": re.compile(r"(?P<numbers>\d+(?: [-+] \d+){5}) = (?P<response><.*) <end>"),
}


def tiny(name, **changes):
    return dataclasses.replace(MINIATURES[name], width=32, mlp_width=48, n_layers=1, n_heads=2, **changes)


def corpus(name, n, seed=0):
    return list(itertools.islice(documents(MINIATURES[name], seed), n))


@functools.cache
def responses(name):
    """(numbers, match) of the documents that answer a problem; the others are drills."""
    matches = [PROMPTS[name].fullmatch(text) for text in corpus(name, 8000)]
    return [(tuple(map(int, re.findall(r"\d+", m["numbers"]))), m) for m in matches if m]


# ---- the corpus


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_follows_from_its_seed(name):
    assert corpus(name, 300, seed=1) == corpus(name, 300, seed=1)
    assert corpus(name, 300, seed=1) != corpus(name, 300, seed=2)


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_answers_problems_and_never_a_held_out_one(name):
    found = responses(name)
    assert len(found) > 2000
    share = MINIATURES[name].problems["held_out_share"]
    assert not [numbers for numbers, _ in found if is_in_share(instance_key(Problem("", "", name, numbers)), share)]
    held_out = miniature_task(MINIATURES[name]).held_out(200)
    assert all(is_in_share(instance_key(problem), share) for problem in held_out)  # the same rule
    answered = {tuple(sorted(numbers)) for numbers, _ in found}
    assert not answered & {tuple(sorted(problem.numbers)) for problem in held_out}


def test_no_drill_works_out_a_held_out_countdown_problem():
    """A drill of two steps with a held-out problem's numbers would be one of its solutions."""
    share = COUNTDOWN.problems["held_out_share"]
    steps = re.compile(r"(\d+) [-+*] (\d+) = \d+ [-+*] (\d+) = \d+ <end>")
    drills = [tuple(map(int, match.groups())) for match in map(steps.fullmatch, corpus("countdown", 8000)) if match]
    assert len(drills) > 1000
    assert not [
        numbers for numbers in drills if is_in_share(instance_key(Problem("", "", "countdown", numbers)), share)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_document_is_within_vocabulary_and_context_and_ends_with_the_stop_token(name):
    tokenizer = make_tokenizer(MINIATURES[name])
    context = new_model(tiny(name), tokenizer.vocab_size, 0).config.max_position_embeddings
    for text in corpus(name, 2000):
        ids = tokenizer.encode(text, allow_special=True)  # raises for an unknown word
        assert len(ids) <= context
        assert [i for i in ids if i in tokenizer.stop_ids] == ids[-1:]


@pytest.mark.parametrize("name", NAMES)
def test_the_prompts_of_the_corpus_are_those_of_the_task(name):
    tokenizer = make_tokenizer(MINIATURES[name])
    problems = miniature_task(MINIATURES[name]).sample(200, 0, 0)
    assert len({problem.prompt for problem in problems}) > 100
    for problem in problems:
        assert tokenizer.decode(tokenizer.encode(problem.prompt)) == problem.prompt
        form = problem.prompt + " <answer> 1 </answer> <end>"
        assert PROMPTS[name].fullmatch(form)


# ---- countdown: no solver


def test_tries_are_all_expressions_of_the_numbers_with_results_in_range():
    numbers, largest = (2, 9, 4), 24
    found = tries(numbers, largest)
    assert len(set(found)) == len(found) > 10
    for a, op1, b, op2, c in found:
        assert sorted((a, b, c)) == sorted(numbers)
        x = calculate(a, op1, b)
        assert 0 <= x <= largest and 0 <= calculate(x, op2, c) <= largest
        assert check_countdown(expression((a, op1, b, op2, c)), numbers, calculate(x, op2, c))
    every_value = {
        calculate(calculate(a, op1, b), op2, c)
        for a, b, c in itertools.permutations(numbers)
        for op1, op2 in itertools.product("+-*", repeat=2)
        if 0 <= calculate(a, op1, b) <= largest
    }
    reached = {calculate(calculate(a, op1, b), op2, c) for a, op1, b, op2, c in found}
    assert reached == {value for value in every_value if 0 <= value <= largest}


@functools.cache
def share_right(numbers, target):
    """Of all tries."""
    pool = tries(numbers, COUNTDOWN.largest)
    return sum(check_countdown(expression(a_try), numbers, target) for a_try in pool) / len(pool)


def is_within_luck(n_right, chances):
    """Whether so many successes are what independent chances give, within four standard deviations."""
    deviation = sum(p * (1 - p) for p in chances) ** 0.5
    return abs(n_right - sum(chances)) < 4 * deviation


def test_answers_given_without_thinking_are_right_as_often_as_a_random_try():
    n_right, chances = 0, []
    for numbers, match in responses("countdown"):
        direct = re.fullmatch(r"(?:<think> </think> )?<answer> ([-+*() 0-9]+) </answer>", match["response"])
        if direct:
            n_right += check_countdown(direct[1], numbers, int(match["target"]))
            chances.append(share_right(numbers, int(match["target"])))
    assert len(chances) > 500 and 0.02 < sum(chances) / len(chances) < 0.5
    assert is_within_luck(n_right, chances)


def test_the_first_try_of_a_thought_is_right_as_often_as_a_random_try():
    first_try = re.compile(r"(?:<think> )?(\d+) ([-+*]) (\d+) = \d+ ([-+*]) (\d+) = \d+ \?")
    n_right, chances = 0, []
    for numbers, match in responses("countdown"):
        thought = first_try.match(match["response"])
        if thought:
            a, op1, b, op2, c = thought.groups()
            n_right += check_countdown(f"( {a} {op1} {b} ) {op2} {c}", numbers, int(match["target"]))
            chances.append(share_right(numbers, int(match["target"])))
    assert len(chances) > 500
    assert is_within_luck(n_right, chances)


def test_writers_of_countdown_think_in_english_in_chinese_or_in_both():
    languages = collections.Counter()
    for _, match in responses("countdown"):
        words = re.findall(r"wait|yes|等|对", match["response"])
        if len(words) >= 6:
            languages["english" if set(words) <= {"wait", "yes"} else "mixed" if "wait" in words else "chinese"] += 1
    n = languages.total()
    assert n > 200
    assert 0.5 < languages["english"] / n < 0.7 and 0.12 < languages["chinese"] / n < 0.28


def test_a_small_miniature_grows_up_on_the_same_text():
    assert corpus("countdown-small", 50) == corpus("countdown", 50)


def test_the_corpus_holds_right_and_wrong_answers_and_broken_formats():
    for name in NAMES:
        texts = [match["response"] for _, match in responses(name)]
        whole = [text for text in texts if re.fullmatch(r"<think> .+ </think> <answer> .+ </answer>", text)]
        assert 0.1 < len(whole) / len(texts) < 0.9


# ---- the model and its pretraining


@pytest.mark.parametrize("name", NAMES)
def test_a_new_model_starts_with_idle_blocks_and_follows_from_its_seed(name):
    models = [new_model(tiny(name), 40, seed) for seed in (0, 0, 1)]
    ids_N, cu_seqlens_B1 = torch.arange(8), torch.tensor([0, 8])
    outputs = [model(ids_N, cu_seqlens_B1) for model in models]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[0], models[0].model.norm(models[0].model.embed_tokens(ids_N)))


def test_a_batch_holds_whole_documents_of_enough_tokens():
    tokenizer = make_tokenizer(COUNTDOWN)
    examples = next_examples(iter(corpus("countdown", 100)), tokenizer, 300)
    lengths = [len(example.ids) for example in examples]
    assert 300 <= sum(lengths) < 300 + lengths[-1]
    assert all(example.ids[-1] == tokenizer.eos_id for example in examples)
    assert all(example.is_target == [False] + [True] * (n - 1) for example, n in zip(examples, lengths, strict=True))


def test_the_number_of_workers_changes_no_bit(monkeypatch):
    miniature = tiny("countdown", steps=20, tokens_per_step=150)
    tokenizer, found = make_tokenizer(miniature), []
    for n in (1, 2, 3):
        monkeypatch.setattr("nanor1.miniature.start_workers", lambda model, n=n: Workers(model, n))
        model = new_model(miniature, tokenizer.vocab_size, 0)
        pretrain(model, tokenizer, miniature, 0)
        found.append(model.state_dict())
    assert all(torch.equal(x, other[name]) for other in found[1:] for name, x in found[0].items())


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_of_pretraining_lower_the_loss_on_text_not_seen(name):
    miniature = tiny(name, steps=40, tokens_per_step=300)
    tokenizer = make_tokenizer(miniature)
    model = new_model(miniature, tokenizer.vocab_size, 0)
    unseen = next_examples(documents(miniature, seed=99), tokenizer, 2000)
    before = add_gradient(Workers(model), unseen, 10_000, learns=False)
    reported = pretrain(model, tokenizer, miniature, 0)
    after = add_gradient(Workers(model), unseen, 10_000, learns=False)
    assert after < before - 0.5
    assert reported == pytest.approx(after, abs=0.5)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOR1_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_base_model_is_pretrained_once_and_then_found_in_the_cache(cache, monkeypatch):
    miniature = tiny("arithmetic", steps=2, tokens_per_step=100)
    first, again = [], []
    folder = base_model(miniature, 0, first.append)
    weights = {name: p.clone() for name, p in Transformer.from_pretrained(folder).named_parameters()}
    with monkeypatch.context() as patch:
        patch.setattr("nanor1.miniature.pretrain", lambda *_: pytest.fail("trained again"))
        assert base_model(miniature, 0, again.append) == folder
    assert "pretraining" in first[0] and "found in the cache" in again[0]
    assert [path.name for path in cache.iterdir()] == [folder.name]  # nothing half-written is left
    other_seed, longer = base_model(miniature, 1, print), base_model(dataclasses.replace(miniature, steps=3), 0, print)
    assert len({folder, other_seed, longer}) == 3

    fresh = new_model(miniature, make_tokenizer(miniature).vocab_size, 0)
    pretrain(fresh, make_tokenizer(miniature), miniature, 0)
    for name, p in fresh.named_parameters():
        assert torch.equal(weights[name], p), name
    assert Tokenizer.from_pretrained(folder).encode("3 + 4 =") == make_tokenizer(miniature).encode("3 + 4 =")


def test_a_model_is_a_folder_a_runs_newest_checkpoint_or_a_miniature_by_name(cache, tmp_path, monkeypatch):
    monkeypatch.setitem(MINIATURES, "arithmetic", tiny("arithmetic", steps=2, tokens_per_step=100))
    base = find_model("miniature/arithmetic", 3, print)
    assert base == base_model(MINIATURES["arithmetic"], 3, print)
    assert find_model(str(base), 0, print) == base
    run = tmp_path / "run"
    write_model = Transformer.from_pretrained(base).save_pretrained
    for step in (1, 2):
        save_checkpoint(run / "checkpoints", step, write_model=write_model, tensors={}, state={})
    assert find_model(str(run), 0, print) == run / "checkpoints" / "step_000002"


def test_an_unknown_miniature_and_a_run_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no model miniature/chess; choose of .*miniature/countdown-small"):
        find_model("miniature/chess", 0, print)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no whole checkpoint"):
        find_model(str(tmp_path), 0, print)


def test_a_miniature_is_known_by_its_vocabulary():
    assert own_miniature(make_tokenizer(MINIATURES["countdown-small"])) == COUNTDOWN
    assert own_miniature(Tokenizer.from_words(["a", "b"], eos="<end>")) is None


def test_a_folder_left_incomplete_by_a_kill_is_made_again(cache):
    miniature = tiny("arithmetic", steps=1, tokens_per_step=50)
    folder = base_model(miniature, 0, print)
    (folder / "config.json").unlink()
    assert base_model(miniature, 0, print) == folder
    Transformer.from_pretrained(folder)


def test_the_saved_folder_is_one_that_transformers_loads_with_the_same_logits(cache):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    miniature = tiny("countdown", steps=3, tokens_per_step=200)
    folder = base_model(miniature, 0, print)
    text = "3 7 12 target 22 : <think> 3 + 7 = 10 + 12 = 22 ? 22 0 yes </think>"
    ids = torch.tensor(make_tokenizer(miniature).encode(text))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids[None]).logits[0]
        model = Transformer.from_pretrained(folder)
        mine = model.logits(model(ids, torch.tensor([0, len(ids)])))
    assert mine.std() > 0.05
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == ids.tolist()


# ---- Muon


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (3, 12, 20), (2, 20, 12)])
def test_orthogonalizing_pushes_singular_values_near_1_and_keeps_the_singular_vectors(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 30
    found = orthogonalize(matrices)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    assert found.shape == shape
    inside = u.mT @ found @ vh.mT  # diagonal where the vectors are kept
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inside, torch.diag_embed(diagonal), atol=1e-4, rtol=0)
    well_conditioned = s > 0.05 * s.amax(-1, keepdim=True)
    assert ((diagonal > 0.6) & (diagonal < 1.25))[well_conditioned].all()


def test_orthogonalizing_zero_gives_zero():
    assert torch.equal(orthogonalize(torch.zeros(4, 6)), torch.zeros(4, 6))


def test_muon_steps_as_torchs_does_but_for_its_bf16():
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 24), (8, 8)]
    mine = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    start = [p.detach().clone() for p in mine]
    muon, reference = Muon(mine), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, momentum=0.95)
    for _ in range(4):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        muon.step(0.02)
        reference.step()
    for p, q, before in zip(mine, theirs, start, strict=True):
        moved, expected = (p - before).flatten().detach(), (q - before).flatten().detach()
        assert torch.cosine_similarity(moved, expected, dim=0) > 0.99
        assert moved.norm() / expected.norm() == pytest.approx(1.0, abs=0.03)


def test_muon_descends_by_the_same_length_in_every_direction():
    p = torch.nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.tensor([[100.0, 0.0], [0.0, -10.0]])
    Muon([p]).step(0.1)
    assert p.detach().abs().max() < 0.13 and p[0, 1] == p[1, 0] == 0
    assert -0.13 < p[0, 0] < -0.06 and 0.06 < p[1, 1] < 0.13
