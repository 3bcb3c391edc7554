"""train_sft.py: its three objectives, runs that survive, what is held out, what it says and what it refuses."""

import dataclasses
import json
import math
import os
import random
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
from running import (
    assert_refused,
    assert_same_run,
    at_update,
    call_main,
    die,
    newest,
    own_process,
    read_lines,
    step_lines,
    write_lines,
)
from vocabularies import of_bytes

from nanor1.miniature import MINIATURES, make_tokenizer, new_model
from nanor1.model import Transformer
from nanor1.run.start import read_command_line
from nanor1.stages.sft import split
from nanor1.stages.sources import key_of, read_sources
from nanor1.tokenizer import Tokenizer
from nanor1.weights import ModelConfig, is_reward_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_sft  # noqa: E402

TINY = dataclasses.replace(MINIATURES["arithmetic"], width=32, mlp_width=32, n_layers=1)
FLAGS = "--examples 8 --lr 1e-2 --threads 1 --max-tokens 64"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained miniature."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "words", make_tokenizer(TINY)
    new_model(TINY, tokenizer.vocab_size, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sum_row(rng):
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return {"prompt": f"{a} + {b} =", "completion": f"<think> {a} + {b} = {a + b} </think> <answer> {a + b} </answer>"}


def pair_row(rng):
    """The answer in tags is preferred to the bare one."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return {"prompt": f"{a} + {b} =", "chosen": f"<answer> {a + b} </answer>", "rejected": f"{a + b}"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of training text for each objective."""
    folder, rng = tmp_path_factory.mktemp("files"), random.Random(0)
    sums = [sum_row(rng) for _ in range(80)]
    return {
        "sft": write_lines(folder / "sums.jsonl", sums),
        "text": write_lines(folder / "text.jsonl", [{"text": " ".join(row.values())} for row in sums]),
        "preference": write_lines(folder / "pairs.jsonl", [pair_row(rng) for _ in range(80)]),
    }


@pytest.fixture(scope="module", autouse=True)
def trained(model, files, tmp_path_factory):
    """A model that reads: in an untrained one all scores are of the same last token, and a pair has no gradient."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    argv = [*shlex.split(f"--model {model} {FLAGS} --data {files['sft']} --steps 8"), "--out", folder]
    with own_process(folder.parent / "cache"):
        assert call_main(train_sft, argv)[0] == 0
    files["trained"] = folder
    return folder


@pytest.fixture
def process(tmp_path):
    with own_process(tmp_path / "cache") as patch:
        yield patch


@pytest.fixture
def run(process, model, tmp_path):
    """A run on the tiny model into the folder `name`; returns exit code, stdout and stderr."""

    def call(flags, name="run"):
        out = ["--model", model, *shlex.split(FLAGS), "--out", tmp_path / name] if name else []
        return call_main(train_sft, [*out, *shlex.split(flags)])

    return call


@pytest.fixture
def train(run, tmp_path):
    """A run that must succeed; returns its folder."""

    def call(flags, name="run"):
        code, _, err = run(flags, name)
        assert code == 0, err
        return tmp_path / name

    return call


@pytest.fixture(scope="module")
def whole(model, files, tmp_path_factory):
    """A whole run of each objective: its folder, and what it said."""
    made = {}

    def once(objective):
        if objective not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            argv = [*shlex.split(f"--model {model} {FLAGS}"), *shlex.split(variant(objective, files)), "--out", folder]
            with own_process(folder.parent / "cache"):
                code, out, err = call_main(train_sft, argv)
            assert code == 0, err
            made[objective] = folder, out
        return made[objective]

    return once


def variant(objective, files):
    flags = f"--objective {objective} --data {files[objective]} --held-out 0.3 --steps 12 --save-every 4 --eval-every 5"
    return f"{flags} --model {files['trained']}" if objective == "preference" else flags


OBJECTIVES = ["sft", "text", "preference"]


# ---- what is learned


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_lowers_its_loss_on_held_out_examples(whole, objective):
    folder, out = whole(objective)
    summary = json.loads((folder / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    uniform = math.log(2 if objective == "preference" else make_tokenizer(TINY).vocab_size)
    assert before["loss"] == pytest.approx(uniform, rel=0.1) and after["loss"] < 0.7 * before["loss"]
    assert f"before: held-out loss {before['loss']:.4f}" in out and f"after:  held-out loss {after['loss']:.4f}" in out
    evaluated = [line for line in read_lines(folder / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [0, 5, 10, 12]
    assert (evaluated[0]["eval_loss"], evaluated[-1]["eval_loss"]) == (before["loss"], after["loss"])


def test_a_reward_model_learns_a_planted_preference(whole):
    folder, _ = whole("preference")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"]["accuracy"] == 0.5  # a score of 0 each: ties
    assert summary["after"]["accuracy"] == 1.0 and summary["after"]["difference"] > 0.5
    assert summary["after"]["accuracy_low"] < 1.0 == summary["after"]["accuracy_high"]
    assert is_reward_model(newest(folder))


def test_a_trained_model_is_an_ordinary_folder_with_its_tokenizer(whole):
    folder, _ = whole("sft")
    tokenizer = Tokenizer.from_pretrained(newest(folder))
    hidden = Transformer.from_pretrained(newest(folder))(
        torch.tensor(tokenizer.encode("3 + 4 = <think> 3 + 4 =")), torch.tensor([0, 9])
    )
    assert hidden.shape == (9, TINY.width)


def test_text_is_learned_from_fresh_weights_where_the_folder_has_none(process, files, tmp_path):
    folder, tokenizer = tmp_path / "shape", of_bytes()
    config = ModelConfig(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    Transformer(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (tmp_path / "corpus.txt").write_text("the cat sat on the mat. " * 60)
    flags = f"--model {folder} --data {tmp_path}/corpus.txt --objective text --steps 20 --warmup 0 {FLAGS} --out"
    argv = [*shlex.split(flags), tmp_path / "run"]
    assert_refused(call_main(train_sft, argv), str(folder), "model.safetensors")
    code, out, err = call_main(train_sft, [*argv, "--from-scratch"])
    assert code == 0, err
    assert "1 documents cut into pieces of 32 tokens" in out, "longer pieces do not fit the model's context"
    lines = step_lines(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(tokenizer.vocab_size), rel=0.02) and lines[-1]["loss"] < 4


def test_fresh_weights_follow_the_seed_and_a_resumed_run_keeps_its_own(train, run, files):
    flags = f"--objective text --data {files['text']} --from-scratch --steps 2"
    losses = [
        [line["loss"] for line in step_lines(train(f"{flags} --seed {seed}", name))]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert losses[0] == losses[1] != losses[2]
    folder = train(f"{flags} --steps 1 --decay constant", "d")
    code, _, err = run(f"--resume {folder} --steps 2", None)
    assert code == 0, err
    assert step_lines(folder)[1]["loss"] == pytest.approx(losses[0][1], rel=1e-4)


# ---- runs that survive


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(objective, whole, files, run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        at_update(patch, 6, die)
        code, _, _ = run(variant(objective, files))
    assert code is None and newest(tmp_path / "run").name == "step_000004"
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 6
    code, out, err = run(f"--resume {tmp_path}/run", None)
    assert code == 0 and "resumed at step 4" in out, err
    assert_same_run(tmp_path / "run", whole(objective)[0])


def test_a_run_killed_before_its_first_checkpoint_begins_again_when_resumed(whole, files, run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        at_update(patch, 2, die)
        code, _, _ = run(variant("sft", files))
    assert code is None and not (tmp_path / "run" / "checkpoints").exists()
    assert_refused(run(variant("sft", files)), "--resume")
    code, out, err = run(f"--resume {tmp_path}/run", None)
    assert code == 0 and "begun again, as there is no checkpoint" in out, err
    assert_same_run(tmp_path / "run", whole("sft")[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_saves_and_the_run_can_go_on(number, whole, files, run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        at_update(patch, 2, lambda: os.kill(os.getpid(), number))
        code, out, _ = run(variant("sft", files))
    assert code == 0 and out.endswith(
        f"stopped after step 3; continue with: python train_sft.py --resume {tmp_path}/run\n"
    )
    assert newest(tmp_path / "run").name == "step_000003" and not (tmp_path / "run" / "summary.json").exists()
    code, _, err = run(f"--resume {tmp_path}/run", None)
    assert code == 0, err
    assert_same_run(tmp_path / "run", whole("sft")[0])


def test_a_signal_during_an_evaluation_saves_the_step_before_it(whole, files, run, tmp_path):
    measure, calls = train_sft.measure, []

    def signal_and_measure(run, items):
        calls.append(os.kill(os.getpid(), signal.SIGTERM) if len(calls) == 1 else None)
        return measure(run, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "measure", signal_and_measure)
        code, out, _ = run(variant("sft", files))
    assert code == 0 and "stopped after step 5" in out and newest(tmp_path / "run").name == "step_000005"
    code, _, err = run(f"--resume {tmp_path}/run", None)
    assert code == 0, err
    assert_same_run(tmp_path / "run", whole("sft")[0])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"}


def test_a_finished_run_that_is_resumed_says_so_and_changes_nothing_but_its_log(train, run, files):
    folder = train(f"--data {files['sft']} --epochs 0.2")
    before = contents(folder)
    code, out, err = run(f"--resume {folder}", None)
    assert code == 0 and f"{folder} is finished, 2 steps" in out and "--epochs" in out, err
    assert contents(folder) == before


def test_a_finished_run_goes_on_when_it_is_given_more_epochs(train, run, files):
    folder = train(f"--data {files['sft']} --epochs 0.2")
    code, out, err = run(f"--resume {folder} --epochs 0.4", None)
    assert code == 0 and "is finished" not in out, err
    assert [line["step"] for line in step_lines(folder)] == [1, 2, 3, 4]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4


# ---- how much is learned of what


def test_steps_win_over_epochs(train, files):
    assert len(step_lines(train(f"--data {files['sft']} --held-out 0 --epochs 5 --steps 3"))) == 3
    assert len(step_lines(train(f"--data {files['sft']} --held-out 0 --epochs 0.5", "half"))) == 5  # 40 / 8


def seen_examples(patch):
    """The examples of each update from now on."""
    seen, learn = [], train_sft.gradient.add_gradient

    def see_and_learn(workers, examples, *arguments):
        seen.append(examples)
        return learn(workers, examples, *arguments)

    patch.setattr(train_sft.gradient, "add_gradient", see_and_learn)
    return seen


def test_files_are_seen_as_often_as_their_weights_say(train, process, tmp_path):
    rng, seen = random.Random(1), seen_examples(process)
    often = write_lines(tmp_path / "often.jsonl", [sum_row(rng) for _ in range(8)])
    seldom = write_lines(tmp_path / "seldom.jsonl", [{"prompt": "1 - 1 =", "completion": "0"} for _ in range(16)])
    folder = train(f"--data {often}:3,{seldom}:0.5 --held-out 0 --epochs 1")
    lengths = [len(example.ids) for examples in seen for example in examples]
    assert len(lengths) == 32 and sum(n == 6 for n in lengths) == 8  # 24 of the first, 8 of the second: 4 and 2 words
    assert step_lines(folder)[-1]["epoch"] == 1.0
    said = (folder / "log.txt").read_text()
    assert f"data: {often}: 8 examples" in said and "; weight 3\n" in said and "; weight 0.5\n" in said


@pytest.mark.parametrize(
    ("objective", "row", "said"),
    [
        (
            "sft",
            {"prompt": "1 =", "completion": "1 " * 70},
            "880 tokens to learn, 3 longer than 64 tokens",
        ),
        ("preference", {"prompt": "1 =", "chosen": "1 " * 70, "rejected": "1"}, "80 pairs, 3 longer than 64 tokens"),
        ("preference", {"prompt": "1 =", "chosen": "1", "rejected": "<think> 2 </think> 1"}, "80 pairs, 3 left out"),
        ("text", {"text": "1 " * 70}, "3 documents cut into pieces of 64 tokens"),
    ],
)
def test_what_is_left_out_is_counted_and_said(train, files, tmp_path, objective, row, said):
    data = write_lines(tmp_path / "data.jsonl", [*read_lines(files[objective]), row, row, row])
    folder = train(f"--data {data} --objective {objective} --steps 1")
    assert said in (folder / "log.txt").read_text()


# ---- what is held out


@pytest.mark.parametrize("objective", ["sft", "preference"])
def test_no_question_is_both_learned_and_held_out(process, model, files, tmp_path, objective):
    """Two files that share their questions, each with several answers to one."""
    rows = read_lines(files[objective])
    again = write_lines(tmp_path / "again.jsonl", [row | {"completion": "1", "chosen": "1"} for row in rows[:40]])
    config = train_sft.Config(objective=objective, data=f"{files[objective]},{again}", held_out=0.3, max_tokens=64)
    sources, held_out = read_sources(config, make_tokenizer(TINY), 64, print)
    key = key_of(config.objective)
    learned, out = ({key(item) for item in items} for items in (sources[0][0] + sources[1][0], held_out))
    questions = {row["prompt"].strip() for row in rows}
    assert learned | out == questions and not learned & out and len(out) > 5
    assert len(held_out) > len(out), "the answers of both files to a held-out question are held out"


def test_held_out_examples_are_of_all_files_and_the_same_for_every_seed(model, files, tmp_path):
    other = write_lines(tmp_path / "other.jsonl", [{"prompt": f"{n} - 1 =", "completion": "0"} for n in range(1, 40)])
    chosen = []
    for seed in (0, 1):
        config = train_sft.Config(data=f"{files['sft']},{other}", held_out=0.4, eval_examples=20, seed=seed)
        chosen.append(read_sources(config, make_tokenizer(TINY), 2048, print)[1])
    minus = make_tokenizer(TINY).encode("-")[0]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 20
    assert 2 < sum(example.ids[1] == minus for example in chosen[0]) < 18


def test_eval_data_is_what_is_held_out_and_all_other_questions_are_learned(train, files, tmp_path):
    rows = [{"prompt": f"{a} + {b} =", "completion": str(a + b)} for a in range(5) for b in range(5)]
    data = write_lines(tmp_path / "data.jsonl", rows)
    others = [{"prompt": "9 + 9 =", "completion": "18"}]
    answered_otherwise = [{"prompt": f" {row['prompt']}", "completion": "1"} for row in rows[:7]]
    folder = train(f"--data {data} --eval-data {write_lines(tmp_path / 'a.jsonl', others)} --steps 1", "others")
    assert json.loads((folder / "summary.json").read_text())["after"]["n"] == 1
    assert "25 examples an epoch" in (folder / "log.txt").read_text()
    held_out = write_lines(tmp_path / "held.jsonl", others + answered_otherwise)
    folder = train(f"--data {data} --eval-data {held_out} --steps 1", "same")
    assert json.loads((folder / "summary.json").read_text())["after"]["n"] == 8
    log = (folder / "log.txt").read_text()
    assert "18 examples an epoch" in log and f"7 left out, whose questions are in {held_out}" in log


def test_a_run_with_nothing_held_out_trains_and_says_so(train, files):
    folder = train(f"--data {files['sft']} --held-out 0 --steps 2 --eval-every 1")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"] is summary["after"] is None and summary["steps"] == 2
    assert "nothing is held out: no evaluation" in (folder / "log.txt").read_text()
    assert not any(key.startswith("eval") for line in read_lines(folder / "metrics.jsonl") for key in line)


def test_a_file_all_of_which_is_held_out_is_refused(run, tmp_path):
    rows = [{"prompt": f"{a} + {b} =", "completion": "1"} for a in range(10) for b in range(10)]
    tokenizer, flags = make_tokenizer(TINY), "--held-out 0.5"
    data = write_lines(tmp_path / "one.jsonl", rows)
    examples = train_sft.sft.read_examples(data, tokenizer, 64).examples
    out = next(row for row, example in zip(rows, examples, strict=True) if split([example], 0.5)[1])
    write_lines(data, [out])
    assert_refused(run(f"--data {data} {flags}"), str(data), "--held-out")
    assert run(f"--data {data} --held-out 0 --steps 1")[0] == 0, "the folder of the run that was refused can be used"


# ---- what is refused


@pytest.mark.parametrize(
    ("objective", "line", "said"),
    [
        ("sft", '{"prompt": "1 + 1 =", ', "JSON"),
        ("sft", '{"question": "1 + 1 ="}', "'messages', or texts 'prompt'"),
        ("sft", '{"messages": [{"role": "user", "content": "1 + 1 ="}]}', "assistant"),
        ("sft", '{"prompt": "what is 1 + 1 ?", "completion": "2"}', "what"),
        ("text", '{"prompt": "1 + 1 ="}', "'text'"),
        ("preference", '{"prompt": "1 + 1 =", "chosen": "2"}', "'rejected'"),
        ("preference", "[1, 2]", "list"),
    ],
)
def test_a_broken_line_is_named_and_the_same_command_works_once_it_is_mended(
    run, files, tmp_path, objective, line, said
):
    data = tmp_path / "data.jsonl"
    good = files[objective].read_text().splitlines()
    data.write_text("\n".join([*good[:2], line, *good[2:]]) + "\n")
    flags = f"--data {data} --objective {objective} --steps 1"
    assert_refused(run(flags), f"{data}, line 3: ", said)
    data.write_text("\n".join(good) + "\n")
    code, _, err = run(flags)
    assert code == 0, err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", ["--model and --data"]),
        ("--data missing.jsonl", ["missing.jsonl cannot be read"]),
        ("--data a.jsonl:0", ["a.jsonl", "above 0"]),
        ("--data a.jsonl --epochs 0", ["--epochs is 0"]),
        ("--data a.jsonl --examples 0", ["--examples is 0", "at least 1"]),
        ("--data a.jsonl --held-out 1", ["--held-out is 1"]),
        ("--data a.jsonl --objective rlhf", ["--objective", "preference", "rlhf"]),
        ("--data a.jsonl --objective preference --from-scratch", ["--from-scratch"]),
        ("--data a.jsonl --model /nowhere/at/all", ["/nowhere/at/all"]),
        ("--data a.jsonl --model miniature/chess", ["miniature/chess", "miniature/countdown"]),
        ("--resume /nowhere/at/all", ["/nowhere/at/all"]),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_sentence(run, flags, said):
    assert_refused(run(flags), *said)


# ---- gradients that are not finite


def poison(patch, steps):
    """Make the gradient nan in these steps (from 0)."""
    learn, count = train_sft.gradient.add_gradient, iter(range(1000))

    def learn_poison(workers, *arguments, learns=True):
        loss = learn(workers, *arguments, learns=learns)
        if learns and next(count) in steps:
            next(workers.model.parameters()).grad.fill_(float("nan"))
            return float("nan")
        return loss

    patch.setattr(train_sft.gradient, "add_gradient", learn_poison)


def test_one_gradient_that_is_not_finite_is_skipped_and_the_run_goes_on(train, process, files):
    poison(process, {1})
    lines = step_lines(train(f"--data {files['sft']} --steps 4"))
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, False]
    assert lines[3]["loss"] < lines[0]["loss"]


def test_a_run_whose_gradients_stay_not_finite_ends_after_three(run, process, files, tmp_path):
    poison(process, range(1, 1000))
    assert_refused(run(f"--data {files['sft']} --steps 9"), "3 updates in a row", "--lr")
    assert [line["loss"] is None for line in step_lines(tmp_path / "run")] == [False, True, True]


# ---- how it is computed


def test_two_workers_and_small_batches_learn_the_same(train, files):
    flags = f"--data {files['sft']} --steps 3 --lr 1e-3"
    losses = [
        [line["loss"] for line in step_lines(train(f"{flags} {more}", more.replace(" ", "")))]
        for more in ("--workers 1", "--workers 2", "--tokens-per-batch 20", "--checkpoint-activations")
    ]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_a_miniatures_settings_hold_unless_flags_say_otherwise(process, model):
    process.setattr(sys, "argv", ["train_sft.py", "--model", str(model), "--data", "a.jsonl", "--lr", "0.5"])
    config, checkpoint = read_command_line(train_sft.Config, train_sft.complete, "")
    settings = train_sft.MINIATURE_RUN | {"lr": 0.5}
    assert {name: getattr(config, name) for name in settings} == settings and checkpoint is None


KEYS = {"step", "loss", "tokens", "lr", "grad_norm", "step_s", "epoch", "tokens_per_s", "mfu", "peak_memory_gib"}


@pytest.mark.parametrize(
    ("objective", "more", "measured"),
    [
        ("sft", set(), {"loss", "n"}),
        ("text", set(), {"loss", "n"}),
        (
            "preference",
            {"accuracy", "difference", "score"},
            {"loss", "n", "accuracy", "accuracy_low", "accuracy_high", "difference", "score"},
        ),
    ],
)
def test_metrics_are_few_and_named(whole, objective, more, measured):
    folder, _ = whole(objective)
    for line in step_lines(folder):
        assert {key for key in line if not key.startswith("eval_")} == KEYS | more
    assert {key for key in read_lines(folder / "metrics.jsonl")[0]} == {"step"} | {f"eval_{name}" for name in measured}
    assert 0 < step_lines(folder)[0]["mfu"] and step_lines(folder)[-1]["epoch"] > 1


def test_the_console_has_a_line_a_step_within_120_columns(whole):
    for objective in OBJECTIVES:
        _, out = whole(objective)
        table = out[out.index("  step") :].split("\n\n")[0].splitlines()
        assert len(table) == 13 and len({len(line) for line in table}) == 1
        assert ("margin" in table[0]) == (objective == "preference")
        assert max(map(len, out.splitlines())) < 200
