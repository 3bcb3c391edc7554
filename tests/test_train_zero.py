"""train_zero.py: runs that survive, what they write, what they refuse, and what the steps of a step do.

Kills and signals are real: those runs are children of multiprocessing's fork server, which imports torch once for all.
"""

import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import running
import torch
from running import assert_refused, call_main, own_process, read_lines, repeatable, step_lines
from safetensors.torch import load_file
from vocabularies import of_bytes

from nanor1 import judge, optim, training
from nanor1.evaluation import exam
from nanor1.evaluation.accuracy import Evaluation
from nanor1.gradient import Workers
from nanor1.grpo import Rollout
from nanor1.judge import Rules
from nanor1.miniature import MINIATURES, base_model, miniature_task
from nanor1.model import Transformer
from nanor1.rewards import REWARDS
from nanor1.run import start
from nanor1.run.checkpoint import latest_checkpoint
from nanor1.run.config import parse_args
from nanor1.sampler import Completion, Sampler
from nanor1.stages.reward_model import load_reward_model, to_preference
from nanor1.tasks.problems import Problem, Task
from nanor1.tasks.prompts import Prompter
from nanor1.tokenizer import Tokenizer
from nanor1.weights import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import distill  # noqa: E402
import sample  # noqa: E402
import train_sft  # noqa: E402
import train_zero  # noqa: E402

TINY = dataclasses.replace(MINIATURES["arithmetic"], steps=20, tokens_per_step=300, width=32, mlp_width=32, n_layers=1)
FLAGS = (
    "--task arithmetic --problems 4 --completions 4 --max-new-tokens 24 --lr 1e-3 --minibatches 2 --eval-problems 8 "
    "--eval-samples 2 --threads 1"
)
VARIANTS = {
    "plain": "--save-every 2 --eval-every 3",
    "renewed reference, two workers": "--kl-coef 0.01 --reference-every 2 --save-every 1 --workers 2",
    "bfloat16": "--dtype bfloat16 --save-every 2",
}
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(
    ["torch._dynamo", "nanor1.grpo", "nanor1.miniature", "nanor1.evaluation.accuracy", "nanor1.sampler"]
)


def parity(problem, text):
    """A reward that random answers earn half of the time."""
    return float(len(text) % 2)


def second_bit(problem, text):
    """Another one, which an answer that was cut off may earn too."""
    return float(len(text) // 2 % 2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def base(cache):
    """The tiny base model that the runs of seed 0 start from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOR1_CACHE", str(cache))
        return base_model(TINY, 0, print)


@contextlib.contextmanager
def tiny_world(cache):
    """The arithmetic miniature is tiny and its rewards are random; what main() sets for the process is put back."""
    with own_process(cache) as patch:
        patch.setitem(train_zero.MINIATURES, "arithmetic", TINY)
        patch.setitem(REWARDS, "accuracy", parity)
        patch.setitem(REWARDS, "format", second_bit)
        yield patch


def read_command_line():
    return start.read_command_line(train_zero.Config, train_zero.complete, "")


@pytest.fixture
def world(cache):
    with tiny_world(cache) as patch:
        yield patch


@pytest.fixture
def run(world):
    return lambda *argv: call_main(train_zero, argv)


@pytest.fixture
def train(run, tmp_path):
    """A run of the tiny miniature that must succeed; returns its folder."""

    def train_flags(flags, name="run"):
        code, _, err = run(*shlex.split(FLAGS), *shlex.split(flags), "--out", str(tmp_path / name))
        assert code == 0, err
        return tmp_path / name

    return train_flags


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, other):
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- runs that survive


def child(scenario, cache, argv, output):
    """In a process of its own: main(), in a world where `scenario` happens."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["train_zero.py", *argv]
    with tiny_world(cache) as patch:
        SCENARIOS[scenario](patch)
        train_zero.main()


def at_step(patch, at, *numbers):
    """Send this process these signals at the start of step `at` (from 0)."""
    act_and_judge = train_zero.act_and_judge

    def act_and_signal(actor, reference, n_drawn):
        for number in numbers if n_drawn == at * actor.config.problems else ():
            os.kill(os.getpid(), number)
        return act_and_judge(actor, reference, n_drawn)

    patch.setattr(train_zero, "act_and_judge", act_and_signal)


def kill_in_save(patch):
    """Die in the save of step 4, after the model was written and before the optimizer is."""
    from nanor1.run import checkpoint

    save_file = checkpoint.save_file

    def save_or_die(tensors, path):
        if "step_000004" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(tensors, path)

    patch.setattr(checkpoint, "save_file", save_or_die)


def signal_in_evaluation(patch):
    take = exam.Exam.take

    def signal_and_take(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return take(*arguments)

    patch.setattr(exam.Exam, "take", signal_and_take)


SCENARIOS = {
    "killed after three steps": lambda patch: at_step(patch, 3, signal.SIGKILL),
    "killed in a save": kill_in_save,
    "SIGTERM": lambda patch: at_step(patch, 2, signal.SIGTERM),
    "SIGINT": lambda patch: at_step(patch, 2, signal.SIGINT),
    "SIGINT twice": lambda patch: at_step(patch, 2, signal.SIGINT, signal.SIGINT),
    "SIGTERM before the first step": signal_in_evaluation,
}


@pytest.fixture
def interrupted(cache, tmp_path):
    """Let a scenario happen to a run of six steps; returns its folder, exit code and output."""

    def run_child(scenario, flags):
        folder, output = tmp_path / "interrupted", tmp_path / "output.txt"
        argv = shlex.split(f"{FLAGS} {flags} --steps 6 --out {shlex.quote(str(folder))}")
        process = forkserver.Process(target=child, args=(scenario, cache, argv, output))
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"the run hangs: {output.read_text()}")
        return folder, process.exitcode, output.read_text()

    return run_child


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    """The folder and console of a whole run of six steps, made once for each variant."""
    made = {}

    def run_once(variant):
        if variant not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            argv = shlex.split(f"{FLAGS} {VARIANTS[variant]} --steps 6 --out {shlex.quote(str(folder))}")
            with tiny_world(cache):
                code, out, err = call_main(train_zero, argv)
            assert code == 0, err
            assert all(line["updates"] for line in step_lines(folder)), "a run that does not learn shows nothing"
            made[variant] = folder, out
        return made[variant]

    return run_once


def assert_same_run(folder, whole):
    running.assert_same_run(folder, whole)
    assert read_lines(folder / "rollouts.jsonl") == read_lines(whole / "rollouts.jsonl")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(variant, uninterrupted, interrupted, run):
    folder, code, _ = interrupted("killed after three steps", VARIANTS[variant])
    assert code == -signal.SIGKILL and read_lines(folder / "metrics.jsonl")[-1]["step"] == 3
    assert not (folder / "summary.json").exists()
    code, _, err = run("--resume", str(folder))
    assert code == 0, err
    assert_same_run(folder, uninterrupted(variant)[0])


def test_a_run_killed_in_the_middle_of_a_save_resumes_from_the_checkpoint_before(uninterrupted, interrupted, run):
    variant = "renewed reference, two workers"
    folder, code, _ = interrupted("killed in a save", VARIANTS[variant])
    (half,) = (folder / "checkpoints").glob(".tmp-*")
    assert code == -signal.SIGKILL and (half / "model.safetensors").exists()
    code, out, err = run("--resume", str(folder))
    assert code == 0 and "resumed at step 3" in out, err
    assert_same_run(folder, uninterrupted(variant)[0])
    assert not half.exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_lets_the_step_finish_and_saves_and_the_run_can_go_on(name, uninterrupted, interrupted, run):
    folder, code, output = interrupted(name, VARIANTS["plain"])
    assert code == 0 and "Traceback" not in output
    assert f"stopped after step 3; continue with: python train_zero.py --resume {folder}" in output
    assert latest_checkpoint(folder / "checkpoints").name == "step_000003"
    assert not (folder / "summary.json").exists()
    code, _, err = run("--resume", str(folder))
    assert code == 0, err
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6
    assert_same_run(folder, uninterrupted("plain")[0])


def test_a_second_ctrl_c_ends_the_run_at_once(interrupted):
    folder, code, output = interrupted("SIGINT twice", VARIANTS["plain"])
    assert code == 130 and output.endswith("interrupted\n") and "Traceback" not in output
    assert latest_checkpoint(folder / "checkpoints").name == "step_000002"


def test_a_run_stopped_before_its_first_step_can_go_on_as_it_says(uninterrupted, interrupted, run):
    folder, code, output = interrupted("SIGTERM before the first step", VARIANTS["plain"])
    assert code == 0 and f"--resume {folder}" in output
    code, _, err = run("--resume", str(folder))
    assert code == 0, err
    assert_same_run(folder, uninterrupted("plain")[0])


def test_a_resumed_run_takes_new_flags_and_keeps_the_other_arguments(train, run, world):
    folder = train("--steps 1 --save-every 1 --problems 3")
    world.setattr(sys, "argv", ["train_zero.py", "--resume", str(folder), "--steps", "9", "--lr", "0.5"])
    config, checkpoint = read_command_line()
    assert (config.steps, config.lr, config.problems, config.completions) == (9, 0.5, 3, 4)
    assert checkpoint.name == "step_000001"


def accuracies(patch, *values):
    """Let the evaluations find these accuracies, one after the other."""
    found, take = iter(values), exam.Exam.take

    def take_and_find(*arguments):
        evaluation, rollouts_PG = take(*arguments)
        return dataclasses.replace(evaluation, accuracy=next(found)), rollouts_PG

    patch.setattr(exam.Exam, "take", take_and_find)


def test_the_best_checkpoint_is_kept_when_evaluations_and_saves_fall_on_different_steps(train, world):
    accuracies(world, 0.1, 0.3, 0.5, 0.4, 0.2)  # before, steps 2, 4 and 6, after
    folder = train("--steps 7 --eval-every 2 --save-every 3 --keep-last 1")
    assert sorted(path.name for path in (folder / "checkpoints").glob("step_*")) == ["step_000004", "step_000007"]
    state = json.loads((folder / "checkpoints" / "step_000007" / "state.json").read_text())
    assert (state["best_step"], state["best_accuracy"]) == (4, 0.5)


@pytest.mark.parametrize("n_steps", [0, 1])
def test_a_finished_run_is_not_evaluated_again_and_says_so(train, run, n_steps):
    folder = train(f"--steps {n_steps} --save-every 1")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, out, err = run("--resume", str(folder))
    assert (code, err) == (0, "")
    assert f"{folder} is finished" in out and "summary.json" in out and f"give more than --steps {n_steps}" in out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_finished_run_goes_on_when_it_is_given_more_steps(train, run):
    folder = train("--steps 1 --save-every 1")
    code, out, err = run("--resume", str(folder), "--steps", "2")
    assert code == 0 and "is finished" not in out, err
    assert [line["step"] for line in step_lines(folder)] == [1, 2]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2


def test_a_run_that_made_its_steps_but_not_its_last_evaluation_makes_it_when_resumed(train, run):
    folder = train("--steps 1 --save-every 1")
    (folder / "summary.json").unlink()
    code, out, err = run("--resume", str(folder))
    assert code == 0 and "is finished" not in out, err
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1


def test_a_run_that_was_begun_before_all_this_was_kept_goes_on_and_ends(train, run, world):
    folder = train("--steps 1 --save-every 1")
    kept = json.loads((folder / "config.json").read_text())
    del kept["data_sha256"], kept["arguments"]["log_rollouts"], kept["arguments"]["reward_file"]
    (folder / "config.json").write_text(json.dumps(kept))
    load_checkpoint = training.load_checkpoint

    def load_older(checkpoint):
        tensors, state = load_checkpoint(checkpoint)
        del state["n_drawn"], state["lr"], state["before_P"], state["before"]["reward"]
        return tensors, state

    world.setattr(training, "load_checkpoint", load_older)
    code, out, err = run("--resume", str(folder), "--steps", "2")
    assert code == 0 and "could not" not in out, err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["change"] is None and "reward" in summary["after"]


# ---- what a run writes and says


def test_summary_holds_the_evaluations_before_and_after(uninterrupted):
    folder, _ = uninterrupted("plain")
    summary = json.loads((folder / "summary.json").read_text())
    for when in ("before", "after"):
        evaluation = summary[when]
        assert evaluation["n"] == 8 and evaluation["samples"] == 2
        assert 0 <= evaluation["accuracy_low"] <= evaluation["accuracy"] <= evaluation["accuracy_high"] <= 1
        assert 0 <= evaluation["majority_2"] <= 1 and 1 <= evaluation["response_tokens"] <= 24
        assert evaluation["retries"] == 0  # the tiny vocabulary has no "wait"
    assert summary["wall_s"] > 0 and summary["steps"] == 6 and summary["seed"] == 0


def test_console_shows_before_and_after_transcripts_and_the_run_folder(uninterrupted):
    folder, out = uninterrupted("plain")
    evaluation = r"accuracy [\d.]+ \+- [\d.]+ \(95%, n=8 x 2\)"
    assert re.search(rf"^before: {evaluation}", out, re.M) and re.search(rf"^after:  {evaluation}", out, re.M)
    held_out = miniature_task(TINY).held_out(8)[: exam.N_TRANSCRIPTS]
    for problem in held_out:
        assert re.search(
            rf"^problem: {re.escape(problem.prompt)} .*{problem.answer}.*\n  before: .*\n  after:  ", out, re.M
        )
    summary = json.loads((folder / "summary.json").read_text())
    row = re.search(r"^accuracy +([\d.]+) +([\d.]+)$", out, re.M)
    assert [float(x) for x in row.groups()] == pytest.approx(
        [summary[when]["accuracy"] for when in ("before", "after")], abs=6e-4
    )
    assert f"run folder: {folder}" in out
    assert [int(x) for x in re.findall(r"^ {5}(\d) ", out, re.M)] == [1, 2, 3, 4, 5, 6]
    assert "Traceback" not in out and max(map(len, (folder / "log.txt").read_text().splitlines()[:12])) < 200


def test_best_step_is_the_one_of_the_best_evaluation_during_the_run(uninterrupted):
    folder, _ = uninterrupted("plain")
    state = json.loads((folder / "checkpoints" / "step_000006" / "state.json").read_text())
    (line,) = [line for line in step_lines(folder) if "eval_accuracy" in line]
    assert (state["best_step"], state["best_accuracy"]) == (3, pytest.approx(line["eval_accuracy"]))


def readme_metrics():
    """The names in the first column of README's table of metrics."""
    table = (ROOT / "README.md").read_text().split("| in metrics.jsonl")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_metrics_are_those_that_the_readme_explains(uninterrupted):
    named = readme_metrics()
    assert len(named) > 20
    for variant, has_kl in (("plain", False), ("renewed reference, two workers", True)):
        for line in step_lines(uninterrupted(variant)[0]):
            found = {key for key in line if not key.startswith("eval_")} - {"step"}
            assert found == named - {"eval_*"} - (set() if has_kl else {"kl"})
    assert any("eval_accuracy" in line for line in step_lines(uninterrupted("plain")[0]))


def test_sampler_and_trainer_agree_on_log_probabilities(uninterrupted):
    gaps = [line["logp_gap_mean"] for line in step_lines(uninterrupted("plain")[0])]
    assert max(gaps) < 1e-5


def test_a_gap_beyond_rounding_is_said_once_with_the_flags_to_look_at(train, world, uninterrupted):
    assert "logp_gap_mean" not in (uninterrupted("plain")[0] / "log.txt").read_text()
    world.setitem(training.NORMAL_GAP, torch.bfloat16, 0.0)
    said = (train("--steps 2 --dtype bfloat16") / "log.txt").read_text()
    assert said.count("warning: logp_gap_mean is") == 1
    assert all(flag in said for flag in ("--dtype float16", "float32", "--importance-cap 2"))


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(uninterrupted, train):
    again = train(f"{VARIANTS['plain']} --steps 2", "again")
    other = train(f"{VARIANTS['plain']} --steps 2 --seed 1", "other")
    first = [line["response_tokens"] for line in step_lines(uninterrupted("plain")[0])][:2]
    assert [line["response_tokens"] for line in step_lines(again)] == first
    assert [line["response_tokens"] for line in step_lines(other)] != first


# ---- what is refused


@pytest.fixture
def byte_model(tmp_path):
    """A model folder over bytes, with a context of 64 tokens."""
    tokenizer = of_bytes()
    config = ModelConfig(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    Transformer(config).save_pretrained(tmp_path / "bytes")
    tokenizer.save_pretrained(tmp_path / "bytes")
    return str(tmp_path / "bytes")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--stepz 3", ["--stepz", "did you mean --steps?"]),
        ("--task sudoku", ["sudoku"]),
        ("--task gsm8k", ["gsm8k", "--model"]),
        ("--completions 1", ["--completions is 1", "at least 2"]),
        ("--steps many", ["--steps", "int", "many"]),
        ("--steps -1", ["--steps is -1"]),
        ("--lr nan", ["--lr", "nan"]),
        ("--steps", ["--steps needs a value"]),
        ("--temperature 0", ["--temperature is 0"]),
        ("--template poem", ["--template", "r1-zero", "poem"]),
        ("--rewards style=1", ["style", "accuracy"]),
        ("--rewards accuracy=0,format=0", ["weighs nothing"]),
        ("--overlong penalty --overlong-buffer 0", ["buffer is 0"]),
        ("--importance-cap 2 --minibatches 4 --model x", ["--importance-cap", "--minibatches 1"]),
        ("--compile on --workers 2", ["--compile on", "--workers 1"]),
        ("--preset openai", ["--preset", "deepseek"]),
        ("arithmetic", ["arithmetic"]),
        ("--model /nowhere/at/all", ["no folder /nowhere/at/all"]),
        ("--resume /nowhere/at/all", ["/nowhere/at/all"]),
        ("--config /nowhere/at/all.json", ["/nowhere/at/all.json"]),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_sentence(run, tmp_path, flags, said):
    assert_refused(run(*flags.split(), "--out", str(tmp_path / "run")), *said)


def test_a_run_folder_that_cannot_be_made_is_refused(run, tmp_path):
    (tmp_path / "file").touch()
    assert_refused(run(*FLAGS.split(), "--out", str(tmp_path / "file" / "run")), "file/run")


def test_data_for_a_miniature_is_refused(run, tmp_path):
    flags = f"{FLAGS} --steps 1 --data problems.jsonl --out {tmp_path}/run"
    assert_refused(run(*flags.split()), "--data", "miniature")


def test_an_existing_run_folder_is_refused_and_left_alone(run, uninterrupted):
    folder, _ = uninterrupted("plain")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert_refused(run(*FLAGS.split(), "--out", str(folder)), str(folder), "--resume")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_resuming_a_run_whose_checkpoints_are_damaged_is_refused(train, run):
    folder = train("--steps 1")
    (folder / "checkpoints/step_000001/model.safetensors").unlink()
    assert_refused(run("--resume", str(folder)), str(folder), "no whole checkpoint")


def test_a_kl_term_for_a_run_that_was_begun_without_a_reference_is_refused(train, run):
    folder = train("--steps 1")
    assert_refused(run("--resume", str(folder), "--steps", "2", "--kl-coef", "0.01"), "--kl-coef", "reference")


@pytest.mark.parametrize(
    ("line", "said"),
    [('{"question": "1 + 1?", ', "JSON"), ('{"question": "1 + 1?"}', "answer"), ("[1, 2]", "list")],
)
def test_a_broken_line_of_data_is_named_with_its_file(run, tmp_path, byte_model, line, said):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "1 + 2?", "answer": "#### 3"}\n' + line + "\n")
    flags = ["--model", byte_model, "--task", "gsm8k", "--data", str(path), "--out", str(tmp_path / "run")]
    assert_refused(run(*flags), f"{path}, line 2", said)


def test_a_prompt_longer_than_the_context_is_refused(run, tmp_path, byte_model):
    (tmp_path / "train.jsonl").write_text('{"question": "1 + 2?", "answer": "#### 3"}\n')
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "so " * 40, "answer": "#### 3"}) + "\n")
    flags = f"--task gsm8k --template bare --eval-problems 1 --data {tmp_path}/train.jsonl --out {tmp_path}/run"
    flags += f" --eval-data {tmp_path}/test.jsonl --max-new-tokens 4 --threads 1"
    assert_refused(run("--model", byte_model, *flags.split()), "119 tokens", "context is 64")


# ---- gradients and weights that are not finite


def poison(patch, calls):
    """Make the gradient nan in the calls of add_gradient whose number (from 0) is in `calls`."""
    add_gradient, count = train_zero.add_gradient, iter(range(1000))

    def add_poisoned(workers, *arguments):
        terms = add_gradient(workers, *arguments)
        if next(count) in calls:
            next(workers.model.parameters()).grad.fill_(float("nan"))
        return terms

    patch.setattr(train_zero, "add_gradient", add_poisoned)


def test_updates_with_a_non_finite_gradient_are_skipped_and_end_the_run_after_three(run, world, tmp_path, base):
    poison(world, range(1000))
    flags = [*FLAGS.split(), "--minibatches", "1", "--steps", "6", "--save-every", "1", "--out", str(tmp_path / "run")]
    assert_refused(run(*flags), "3 updates in a row", "--lr")
    lines = step_lines(tmp_path / "run")
    assert [(line["updates"], line["skipped_updates"], line["grad_norm"]) for line in lines] == [(0, 1, None)] * 2
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert [folder.name for folder in checkpoints] == ["step_000001", "step_000002"]
    for folder in checkpoints:
        assert_same_weights(folder, base)


def test_one_non_finite_gradient_is_counted_and_the_run_goes_on(world, train, base):
    poison(world, {1})
    folder = train("--minibatches 1 --steps 4 --save-every 4")
    lines = step_lines(folder)
    assert [(line["updates"], line["skipped_updates"]) for line in lines] == [(1, 0), (0, 1), (1, 0), (1, 0)]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(folder / "checkpoints/step_000004").values())


def test_weights_that_are_not_finite_are_never_saved(run, world, tmp_path):
    def step(optimizer, lr, max_grad_norm):
        next(iter(optimizer.params.values())).data[0] = float("inf")
        return 1.0

    world.setattr(optim.MasterAdamW, "step", step)
    world.setattr(exam.Exam, "take", lambda *_: (Evaluation(*[0.0] * 12), []))
    flags = [*FLAGS.split(), "--minibatches", "1", "--steps", "1", "--out", str(tmp_path / "run")]
    assert_refused(run(*flags), "not finite after step 1")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


# ---- groups, rewards, lengths


def test_groups_of_equal_reward_teach_nothing_and_are_counted(train, world, base):
    world.setitem(REWARDS, "format", lambda problem, text: 1.0)
    folder = train("--steps 2 --rewards format=1 --weight-decay 0.1")
    for line in step_lines(folder):
        assert (line["dropped_groups"], line["groups"], line["updates"], line["learned_tokens"]) == (4, 4, 0, 0)
        assert line["grad_norm"] is None
    assert_same_weights(folder / "checkpoints" / "step_000002", base)


def seen_by_add_gradient(patch):
    """The (rollouts, advantages) of each update from now on."""
    seen, add_gradient = [], train_zero.add_gradient

    def add_and_see(workers, reference, rollouts, advantages, settings):
        seen.append((rollouts, advantages))
        return add_gradient(workers, reference, rollouts, advantages, settings)

    patch.setattr(train_zero, "add_gradient", add_and_see)
    return seen


def test_rollouts_that_cannot_be_judged_are_counted_and_left_out(train, world):
    world.setitem(REWARDS, "accuracy", lambda problem, text: None if len(text) % 3 == 0 else float(len(text) % 2))
    seen = seen_by_add_gradient(world)
    (line,) = step_lines(train("--steps 1"))
    learned = [rollout for rollouts, _ in seen for rollout in rollouts]
    assert 0 < line["unjudged"] < line["rollouts"] == 16
    assert 0 < len(learned) <= 16 - line["unjudged"]
    assert all(rollout.reward is not None and len(rollout.text) % 3 for rollout in learned)


def cut_off_all(patch):
    generate = Sampler.generate

    def generate_cut(*arguments, **sampling):
        groups = generate(*arguments, **sampling)
        return [[dataclasses.replace(completion, finish="length") for completion in group] for group in groups]

    patch.setattr(Sampler, "generate", generate_cut)


def test_a_batch_of_cut_off_answers_earns_no_accuracy_and_still_learns_the_format(train, world):
    cut_off_all(world)
    world.setitem(REWARDS, "format", parity)
    (line,) = step_lines(train("--steps 1"))
    assert (line["truncated"], line["accuracy"]) == (1.0, 0.0)
    assert line["updates"] == math.ceil((4 - line["dropped_groups"]) / 2) > 0  # two of the four groups fill an update


def test_overlong_mask_leaves_cut_off_answers_out_of_the_loss(train, world, base):
    cut_off_all(world)
    world.setitem(REWARDS, "format", parity)
    folder = train("--steps 1 --overlong mask")
    (line,) = step_lines(folder)
    assert line["dropped_groups"] < line["groups"] and line["updates"] == 0
    assert_same_weights(folder / "checkpoints" / "step_000001", base)


def test_overlong_mask_keeps_the_finished_answers(train, world):
    world.setitem(REWARDS, "format", parity)
    seen = seen_by_add_gradient(world)
    (line,) = step_lines(train("--steps 1 --overlong mask --max-new-tokens 8"))
    learned = [rollout for rollouts, _ in seen for rollout in rollouts]
    assert 0 < line["truncated"] < 1 and learned
    assert all(rollout.completion.finish == "stop" for rollout in learned)


@pytest.fixture
def make_actor(world, base):
    """An actor on the tiny base, its configuration the tests' flags with some fields replaced."""

    def make(**fields):
        world.setattr(sys, "argv", ["train_zero.py", *FLAGS.split()])
        config = dataclasses.replace(read_command_line()[0], **fields)
        model, prompter = Transformer.from_pretrained(base), Prompter(Tokenizer.from_pretrained(base), "bare")
        n_tokens = config.tokens_per_batch or 1024
        return judge.Actor(Sampler(model), prompter, Rules(), miniature_task(TINY), config, n_tokens)

    return make


def rewarded(patch, rewards_of):
    """Let `rewards_of(number of the group in the run)` be the accuracies, and with them the rewards, of each group."""
    answer, count = judge.Actor.answer, iter(range(10_000))

    def answer_so(*arguments):
        groups = [(group, rewards_of(next(count))) for group in answer(*arguments)]
        return [
            [dataclasses.replace(r, reward=v, parts=r.parts | {"accuracy": v}) for r, v in zip(*pair, strict=True)]
            for pair in groups
        ]

    patch.setattr(judge.Actor, "answer", answer_so)


EQUAL, MIXED = [1.0] * 4, [1.0, 0.0, 0.0, 0.0]


def test_resampling_draws_other_problems_and_stops_at_its_bound(make_actor, world):
    rewarded(world, lambda number: EQUAL)
    rollouts_PG, advantages_PG = judge.act_and_judge(make_actor(resample=2), None, 20)
    assert [len(group) for group in rollouts_PG] == [4] * 12 and not any(map(any, advantages_PG))
    assert len({group[0].problem.prompt for group in rollouts_PG}) == 12
    next_PG, _ = judge.act_and_judge(make_actor(resample=2), None, 32)
    assert not {g[0].problem.prompt for g in next_PG} & {g[0].problem.prompt for g in rollouts_PG}


def test_resampling_replaces_just_the_groups_that_teach_nothing(make_actor, world):
    rewarded(world, lambda number: EQUAL if number == 3 else MIXED)
    rollouts_PG, advantages_PG = judge.act_and_judge(make_actor(resample=5), None, 0)
    assert len(rollouts_PG) == 5 and sum(map(any, advantages_PG)) == 4


def test_resampling_looks_at_accuracy_where_that_is_rewarded(make_actor, world):
    """The format differs in every group, so no reward is equal; two groups are all wrong."""
    rewarded(world, lambda number: [0.0] * 4 if number < 2 else MIXED)
    charge, costs = judge.charge, [0.0, 0.1, 0.0, 0.1]
    world.setattr(
        judge,
        "charge",
        lambda groups, *more: [
            [dataclasses.replace(r, reward=r.reward - cost) for r, cost in zip(group, costs, strict=True)]
            for group in charge(groups, *more)
        ],
    )
    actor = make_actor(resample=1)
    rollouts_PG, advantages_PG = judge.act_and_judge(actor, None, 0)
    assert len(rollouts_PG) == 6 and all(map(any, advantages_PG))
    chosen = judge.choose(actor, rollouts_PG, advantages_PG)
    assert [r for r, _ in chosen] == [r for group in rollouts_PG[2:] for r in group]  # P groups, the replaced ones out
    other = dataclasses.replace(actor, rules=Rules({"format": 1.0}))  # here any difference is the signal
    assert len(judge.act_and_judge(other, None, 0)[0]) == 4


def test_a_group_that_teaches_by_its_format_alone_is_learned_from_where_none_replaced_it(make_actor):
    actor = make_actor(resample=1)
    groups = [[fake(3, accuracy=1.0), fake(3, accuracy=0.0)], [fake(3, accuracy=0.0), fake(4, accuracy=0.0)]]
    chosen = judge.choose(actor, groups, [[0.5, -0.5], [0.05, -0.05]])
    assert [advantage for _, advantage in chosen] == [0.5, -0.5, 0.05, -0.05]


@pytest.mark.parametrize("resample", [0, 3])
def test_a_run_goes_through_its_problems_one_after_another_whatever_is_resampled(train, world, resample):
    """None is passed over, and none comes twice before all others have come."""
    asked, sample, n = [], Task.sample, 37
    listed = [Problem(f"{i} + 1 =", str(i + 1), "arithmetic") for i in range(n)]
    order = random.Random(0).sample(listed, n)
    world.setattr(Task, "sample", lambda task, n_asked, seed, step: asked.append(step) or [order[step % n]])
    rewarded(world, lambda number: EQUAL if number % 5 == 0 else MIXED)
    folder = train(f"--steps 7 --resample {resample} --save-every 3")
    assert asked == list(range(len(asked))) and (len(asked) == 28 if resample == 0 else len(asked) > 28)
    state = json.loads((folder / "checkpoints/step_000007/state.json").read_text())
    assert state["n_drawn"] == len(asked) and Task.sample is not sample


def test_each_step_round_and_seed_samples_with_noise_of_its_own(make_actor, world):
    rewarded(world, lambda number: EQUAL)

    def answers(first, **fields):
        """What act() samples for the same four problems, round by round."""
        actor = make_actor(resample=1, **fields)
        problems = actor.task.sample(4, 0, 0)
        always = SimpleNamespace(sample=lambda n, seed, i: [problems[i % 4]])
        rollouts_PG, _ = judge.act_and_judge(dataclasses.replace(actor, task=always), None, first)
        ids = [[tuple(rollout.completion.ids) for rollout in group] for group in rollouts_PG]
        return [ids[:4], ids[4:]]

    first = answers(0)
    assert answers(0) == first
    sampled = [*first, *answers(8), *answers(0, seed=1)]
    assert all(one != other for i, one in enumerate(sampled) for other in sampled[:i])


def test_no_step_of_any_seed_shares_its_noise_with_another_or_with_evaluations():
    seeds = [judge.request_seed(seed, index) for seed in range(20) for index in range(1000)]
    assert len(set(seeds)) == 20_000 and 0 not in seeds


def fake(n_tokens, reward=1.0, logprob=-1.0, seed=0, **parts):
    ids = random.Random(seed).choices(range(5), k=n_tokens)
    completion = Completion(ids, [logprob] * n_tokens, "stop")
    return Rollout(Problem("1 + 1 =", "2", "arithmetic"), [5, 6, 7], completion, "", reward, parts)


def test_overlong_penalty_lowers_the_reward_of_long_answers_and_is_one_of_its_parts(make_actor):
    actor = make_actor(overlong="penalty", max_new_tokens=100, overlong_buffer=20)
    groups = [[fake(80), fake(90), fake(100)], [fake(85, 0.5), fake(90, None)]]
    charged = judge.charge(groups, None, actor)
    assert [[r.reward for r in group] for group in charged] == [[1.0, 0.5, 0.0], [0.25, None]]
    assert [[r.parts["overlong_penalty"] for r in group] for group in charged] == [[0, -0.5, -1], [-0.25, -0.5]]


def test_the_reward_that_is_logged_is_the_one_that_is_optimised(train, world):
    (line,) = step_lines(train("--steps 1 --overlong penalty --overlong-buffer 20 --kl-coef 0.1 --kl reward"))
    rows = read_lines(train("--steps 1 --overlong penalty --overlong-buffer 20", "rows") / "rollouts.jsonl")
    parts = line["accuracy"] + 0.1 * (line["format"] - 1) + line["overlong_penalty"] + line["kl_penalty"]
    assert line["overlong_penalty"] < 0 and line["reward"] == pytest.approx(parts, abs=1e-4)
    for row in rows:
        parts = row["parts"]
        expected = parts["accuracy"] + 0.1 * (parts["format"] - 1) + parts["overlong_penalty"]
        assert row["reward"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("n", "kept"), [(0, 0), (6, 6), (99, 16)])
def test_as_many_rollouts_are_kept_as_are_asked_for(train, n, kept):
    rows = read_lines(train(f"--steps 1 --log-rollouts {n}") / "rollouts.jsonl")
    assert [(row["index"], row["group"]) for row in rows] == [(g, p) for g in range(4) for p in range(4)][:kept]
    assert len({row["prompt"] for row in rows if row["group"] == 0}) == min(kept, 1)


# ---- how strong a step is


class Sums:
    """In a run's place: adds up the gradients of a step's updates and leaves the weights alone."""

    optimizer = SimpleNamespace(loss_scale=1.0)

    def __init__(self, model, reference):
        self.workers, self.reference, self.grad_norms = Workers(model), reference, []
        self.params = dict(model.named_parameters())
        self.sums = {name: torch.zeros_like(p) for name, p in self.params.items()}

    def update(self):
        self.grad_norms.append(1.0)
        for name, p in self.params.items():
            if p.grad is not None:
                self.sums[name] += p.grad
                p.grad = None


def learned(actor, rollouts_PG, advantages_PG, reference=None):
    """The sum of a step's gradients, and of how many updates."""
    sums = Sums(actor.sampler.model, reference)
    train_zero.learn(sums, actor, rollouts_PG, advantages_PG, 0)
    return torch.cat([grad.flatten() for grad in sums.sums.values()]), len(sums.grad_norms)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize("minibatches", [1, 4, 16])
def test_a_group_moves_the_weights_as_far_whichever_others_teach_nothing(make_actor, aggregate, minibatches):
    actor = make_actor(aggregate=aggregate, minibatches=minibatches)
    rollouts_PG, _ = judge.act_and_judge(actor, None, 0)
    every_PG, nothing_PG = [[1.5, -0.5, -0.5, -0.5]] * 4, [[0.0] * 4] * 4
    whole, n_updates = learned(actor, rollouts_PG, every_PG)
    alone = [learned(actor, rollouts_PG, [*nothing_PG[:p], every_PG[p], *nothing_PG[p + 1 :]]) for p in range(4)]
    assert whole.norm() > 1e-3
    torch.testing.assert_close(sum(gradient for gradient, _ in alone), whole, rtol=1e-4, atol=1e-6)
    # 16 answers make as many updates as minibatches, 4 a quarter of them and at least one
    assert n_updates == minibatches and {n for _, n in alone} == {max(1, minibatches // 4)}


def test_there_are_no_more_updates_than_answers_to_learn_from(make_actor):
    actor = make_actor(minibatches=50)
    rollouts_PG, _ = judge.act_and_judge(actor, None, 0)
    assert learned(actor, rollouts_PG, [[1.0, -1.0, 0.5, -0.5]] * 4)[1] == 16


def test_answers_that_could_not_be_judged_or_are_masked_leave_the_others_their_weight(make_actor):
    actor = make_actor(overlong="mask", minibatches=1)
    rollouts_PG, _ = judge.act_and_judge(actor, None, 0)
    advantages_PG = [[1.0, None, -1.0, 0.5]] + [[0.0] * 4] * 3
    cut = dataclasses.replace(rollouts_PG[0][3].completion, finish="length")
    rollouts_PG[0][3] = dataclasses.replace(rollouts_PG[0][3], completion=cut)
    for i, finish in ((0, "stop"), (2, "stop")):
        completion = dataclasses.replace(rollouts_PG[0][i].completion, finish=finish)
        rollouts_PG[0][i] = dataclasses.replace(rollouts_PG[0][i], completion=completion)
    gradient, _ = learned(actor, rollouts_PG, advantages_PG)
    without, _ = learned(actor, rollouts_PG, [[1.0, 0.0, -1.0, 0.0]] + [[0.0] * 4] * 3)
    torch.testing.assert_close(gradient, without, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_the_kl_loss_falls_on_groups_of_equal_reward_and_on_answers_without_one(make_actor, kl):
    """Against a loss written out: the mean over all sampled tokens of the estimate of the KL."""
    actor = make_actor(kl_coef=0.5, kl=kl, minibatches=1)
    model, reference = actor.sampler.model, copy.deepcopy(actor.sampler.model)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    rollouts_PG, _ = judge.act_and_judge(actor, None, 0)
    gradient, n_updates = learned(actor, rollouts_PG, [[0.0] * 4] * 3 + [[None] * 4], reference)
    terms = []
    for rollout in (rollout for group in rollouts_PG for rollout in group):
        ids = torch.tensor(rollout.prompt_ids + rollout.completion.ids)
        ends = torch.tensor([0, len(ids)])
        logp, ref_logp = (
            m.logits(m(ids, ends)).float().log_softmax(-1)[range(len(rollout.prompt_ids) - 1, len(ids) - 1),
            ids[len(rollout.prompt_ids) :]] for m in (model, reference)
        )  # fmt: skip
        log_ratio = logp - ref_logp.detach()
        terms.append(log_ratio.square() / 2 if kl == "k2" else torch.exp(-log_ratio) - 1 + log_ratio)
    loss = 0.5 * torch.cat(terms).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert n_updates == 1 and expected.norm() > 1e-2
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_kl_to_the_model_itself_is_zero_on_its_own_samples(make_actor):
    actor = make_actor()
    rollouts_PG, _ = judge.act_and_judge(actor, None, 0)
    flat = [rollout for group in rollouts_PG for rollout in group]
    assert judge.sequence_kl(actor.sampler.model, flat, actor) == pytest.approx([0.0] * 16, abs=1e-4)


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 8192])
def test_kl_in_the_reward_is_k1_summed_over_each_answer(make_actor, tokens_per_batch):
    actor = make_actor(kl_coef=0.5, kl="reward", tokens_per_batch=tokens_per_batch)
    reference = actor.sampler.model
    with torch.no_grad():
        reference.head_weight_VC.zero_()  # every token has the log-probability -log V
    lengths, uniform = [3, 20, 7, 12], -torch.log(torch.tensor(float(actor.prompter.tokenizer.vocab_size))).item()
    flat = [fake(n, logprob=uniform + 0.1 * (i + 1), seed=i) for i, n in enumerate(lengths)]
    kls = [0.1 * (i + 1) * n for i, n in enumerate(lengths)]
    assert judge.sequence_kl(reference, flat, actor) == pytest.approx(kls, rel=1e-4)
    (charged,) = judge.charge([flat], reference, actor)
    assert [r.reward for r in charged] == pytest.approx([1 - 0.5 * kl for kl in kls], rel=1e-4)
    assert [r.parts["kl_penalty"] for r in charged] == pytest.approx([-0.5 * kl for kl in kls], rel=1e-4)


def test_kl_in_the_reward_adds_no_kl_to_the_loss(make_actor):
    assert train_zero.loss_settings(make_actor(kl_coef=0.5, kl="reward"), [[fake(3)]]).kl_coef == 0
    assert train_zero.loss_settings(make_actor(kl_coef=0.5, kl="k3"), [[fake(3)]]).kl_coef == 0.5


def test_the_utilisation_is_the_work_of_the_learning_phase_over_the_peak(train, world):
    said = []
    world.setattr(train_zero, "peak_flops", lambda device, dtype, say: said.append((device.type, dtype)) or 1e9)
    folder = train("--steps 1")
    (line,) = step_lines(folder)
    assert said == [("cpu", torch.float32)]
    assert line["mfu"] == pytest.approx(line["learn_flops_per_s"] / 1e9, rel=1e-4)
    tensors = weights(folder / "checkpoints/step_000001").items()
    blocks = sum(tensor.numel() for name, tensor in tensors if "layers" in name and tensor.dim() == 2)
    flops = line["learn_flops_per_s"] * line["learn_s"]
    assert 6 * blocks * line["learned_tokens"] < flops < 12 * blocks * line["learned_tokens"]  # and head and attention


def test_checkpointing_activations_changes_no_result(train, world):
    checkpointed = []
    world.setattr(training, "start_workers", lambda model, n: checkpointed.append(model) or Workers(model))
    folders = [train(f"--steps 2 --save-every 2 {flag}", f"run{flag}") for flag in ("--checkpoint-activations", "")]
    assert [model.checkpoints_activations for model in checkpointed] == [True, False]
    assert repeatable(folders[0]) == repeatable(folders[1])
    assert_same_weights(*(folder / "checkpoints/step_000002" for folder in folders))


def compiled(patch):
    """Count the models that are compiled, and trace them without making machine code."""
    models, compile_blocks = [], Transformer.compile_blocks

    def compile_and_count(model):
        models.append(model)
        compile_blocks(model, backend="eager")

    patch.setattr(Transformer, "compile_blocks", compile_and_count)
    return models


def test_a_compiled_run_learns_saves_and_keeps_a_reference(train, world):
    models = compiled(world)
    folder = train("--steps 2 --compile on --kl-coef 0.01 --save-every 1")
    assert len(models) == 1 and all(line["updates"] for line in step_lines(folder))
    wanted = step_lines(train("--steps 2 --kl-coef 0.01 --save-every 1 --workers 1", "plain"))
    assert len(models) == 1  # on a CPU only where asked for
    for line, other in zip(step_lines(folder), wanted, strict=True):
        assert [line[key] for key in ("loss", "entropy", "kl")] == pytest.approx(
            [other[key] for key in ("loss", "entropy", "kl")], abs=1e-3
        )


def test_a_float16_run_scales_its_loss_and_goes_on_as_if_never_stopped(train, run, world):
    """As on CUDA; torch computes it on a CPU too, slowly. The first scale is such that updates overflow."""
    world.setattr(training, "choose_device", lambda *_: (torch.device("cpu"), torch.float16))
    world.setattr(optim, "FIRST_SCALE", 2.0**22)
    flags = "--minibatches 1 --save-every 3 --max-new-tokens 8"
    whole, folder = train(f"{flags} --steps 6", "whole"), train(f"{flags} --steps 3")
    code, _, err = run("--resume", str(folder), "--steps", "6")
    assert code == 0, err
    lines = step_lines(whole)
    assert lines[0]["skipped_updates"] == 1 and lines[-1]["updates"] == 1 and lines[-1]["loss_scale"] < 2.0**22
    assert [line["loss_scale"] for line in step_lines(folder)] == [line["loss_scale"] for line in lines]
    checkpoints = [f / "checkpoints/step_000006" for f in (folder, whole)]
    assert_same_weights(*checkpoints)
    assert next(iter(weights(whole / "checkpoints/step_000006").values())).dtype == torch.float16
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert len({(checkpoint / name).read_bytes() for checkpoint in checkpoints}) == 1


def test_a_resumed_run_keeps_the_dtype_that_was_chosen_for_it(train, run):
    folder = train("--steps 1 --save-every 1 --dtype bfloat16")
    config = json.loads((folder / "config.json").read_text())
    config["arguments"]["dtype"] = "auto"  # on this machine, for so small a model, fp32
    (folder / "config.json").write_text(json.dumps(config))
    code, out, err = run("--resume", str(folder), "--steps", "2")
    assert code == 0 and "dtype: bfloat16" in out, err
    assert {tensor.dtype for tensor in weights(folder / "checkpoints/step_000002").values()} == {torch.bfloat16}


def test_rollouts_of_a_prompt_share_it_in_each_minibatch(train, world):
    seen = seen_by_add_gradient(world)
    train("--steps 1 --problems 3")
    for rollouts, _ in seen:
        prompts = [rollout.problem.prompt for rollout in rollouts]
        runs = [prompt for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]]
        assert len(runs) == len(set(runs)), "a prompt's rollouts lie apart"
    assert len(seen) == 2 and abs(len(seen[0][0]) - len(seen[1][0])) <= 1


# ---- settings


@pytest.fixture
def configure(monkeypatch):
    def read(flags):
        monkeypatch.setattr(sys, "argv", ["train_zero.py", *flags.split()])
        return read_command_line()[0]

    return read


def test_preset_deepseek_sets_the_published_values(configure):
    config = configure("--preset deepseek --model somewhere --task gsm8k --data x")
    published = dict(lr=3e-6, kl_coef=0.001, kl="k3", clip_low=10.0, clip_high=10.0, temperature=1.0)
    published |= dict(advantage="std", aggregate="sequence", completions=16)
    assert {name: getattr(config, name) for name in published} == published
    n_rollouts = config.problems * config.completions
    assert n_rollouts == 8192 and n_rollouts / config.minibatches == 512 == 32 * config.completions
    assert config.reference_every * config.minibatches == 400
    assert config.weights["accuracy"] == config.weights["format"] > 0 and config.weights["language"] > 0


def test_flags_win_over_a_preset_and_a_preset_over_the_miniatures_settings(configure):
    config = configure("--preset deepseek --lr 0.01 --completions=2 --task arithmetic")
    assert (config.lr, config.completions, config.problems, config.minibatches) == (0.01, 2, 512, 16)


def test_the_miniatures_settings_hold_for_miniatures_only(configure):
    default = train_zero.Config()
    for task, settings in train_zero.MINIATURE_RUNS.items():
        miniature, own = configure(f"--task {task}"), configure(f"--task {task} --model somewhere")
        assert {name: getattr(miniature, name) for name in settings} == settings
        assert own == dataclasses.replace(default, task=task, model="somewhere")
        assert configure(f"--task {task} --lr 1").lr == 1.0


def test_evaluations_ask_the_same_problems_whatever_the_seed_and_step(train, world):
    asked, evaluate = [], exam.evaluate

    def evaluate_and_note(sampler, prompter, problems, *arguments, **sampling):
        asked.append(([problem.prompt for problem in problems], sampling.get("seed", 0)))
        return evaluate(sampler, prompter, problems, *arguments, **sampling)

    world.setattr(exam, "evaluate", evaluate_and_note)
    train("--steps 2 --eval-every 1", "one")
    train("--steps 1 --seed 7", "two")
    assert len(asked) == 5 and len(set(asked[0][0])) == 8
    assert all(one == asked[0] for one in asked)


def test_evaluations_of_the_same_weights_are_the_same(train):
    summary = json.loads((train("--steps 2 --lr 0") / "summary.json").read_text())
    assert summary["before"] == summary["after"]


# ---- the README, and other text that shows commands


def commands(text):
    """(script, arguments) of each command line `python SCRIPT.py ...` in a text."""
    found = re.findall(r"python ((?:train_zero|train_sft|distill|sample)\.py)((?: +[^`\n]*)?)", text)
    return [(script, shlex.split(re.split(r" {3,}| < ", rest)[0])) for script, rest in found]


def test_readme_opens_with_the_two_commands_that_start_and_check_everything():
    top = (ROOT / "README.md").read_text().splitlines()[:16]
    assert "    pip install -e . && python train_zero.py" in top
    assert "    pip install -e '.[test]' && pytest" in top


@pytest.mark.parametrize(
    ("source", "least"),
    [
        ((ROOT / "README.md").read_text(), 25),
        (train_zero.__doc__, 2),
        (sample.__doc__, 4),
        (train_zero.MINIATURE_NEXT.format(folder="runs/x", step=40, other="countdown", prompt="1 + 2 ="), 4),
    ],
    ids=["README", "train_zero", "sample", "what to try next"],
)
def test_every_command_that_is_shown_parses(source, least, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shown_rewards = re.findall(r"^    (def \w+\(problem, text\):.*\n)    (    .*\n)", source, re.MULTILINE)
    (tmp_path / "my_rewards.py").write_text("".join(line for lines in shown_rewards for line in lines))
    scripts = {"train_zero.py": train_zero, "train_sft.py": train_sft, "distill.py": distill, "sample.py": sample}
    shown = commands(source)
    assert len(shown) >= least
    for script, argv in shown:
        if "--help" in argv:
            with pytest.raises(SystemExit) as stop:
                parse_args(scripts[script].Config, argv)
            assert stop.value.code == 0 and "--steps" in capsys.readouterr().out
        else:
            parse_args(scripts[script].Config, argv)


def test_every_file_on_readmes_map_is_there():
    readme = (ROOT / "README.md").read_text()
    table = readme.split("## The code, in reading order")[1].split("\n## ")[0]
    paths = [
        path for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for path in re.findall(r"`([^`]+)`", row)
    ]
    assert len(paths) > 20 and "nanor1/grpo.py" in paths
    assert [path for path in paths if not (ROOT / path).exists() and not (ROOT / "nanor1" / path).exists()] == []


def test_what_to_try_next_asks_the_model_that_was_trained_something_it_can_read(uninterrupted):
    _, out = uninterrupted("plain")
    shown = [parse_args(sample.Config, argv)[0] for script, argv in commands(out) if script == "sample.py"]
    assert shown and all(config.prompt for config in shown)
    for config in shown:
        assert Tokenizer.from_pretrained(config.model).encode(config.prompt)


# ---- a reward model


@pytest.fixture(scope="module")
def reward_model(cache, base, tmp_path_factory):
    """The folder of a run of train_sft.py: longer answers are preferred, and so scores differ."""
    folder = tmp_path_factory.mktemp("reward")
    rows = [{"prompt": f"{i} + 1 =", "chosen": "<answer> 3 3 </answer>", "rejected": "3"} for i in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--objective preference --model {base} --data {folder}/pairs.jsonl --steps 6 --lr 1e-2 --examples 8"
    with tiny_world(cache):
        assert call_main(train_sft, f"{flags} --threads 1 --out {folder}/run".split())[0] == 0
    return folder / "run"


PREFERRED = "--steps 2 --rewards accuracy=1,preference=0.5 --reward-model"


def test_a_reward_model_takes_part_in_the_reward(train, reward_model):
    folder = train(f"{PREFERRED} {reward_model}")
    assert f"reward model: {reward_model}/checkpoints/step_000006" in (folder / "log.txt").read_text()
    assert all(0 < line["preference"] < 1 for line in step_lines(folder))
    summary = json.loads((folder / "summary.json").read_text())
    assert all(0 < summary[when]["reward"] - summary[when]["accuracy"] < 0.5 for when in ("before", "after"))
    rows = read_lines(folder / "rollouts.jsonl")
    assert len({row["parts"]["preference"] for row in rows}) > 2
    for row in rows:
        parts = row["parts"]
        assert row["reward"] == pytest.approx(parts["accuracy"] + 0.5 * parts["preference"], abs=1e-5)


def test_an_answer_in_tags_is_preferred_as_the_reward_model_learned(reward_model, base):
    tokenizer = Tokenizer.from_pretrained(base)
    scorer = load_reward_model(reward_model, tokenizer, torch.float32, torch.device("cpu"))
    prefer = to_preference(scorer, tokenizer, 1024)
    prompts = [tokenizer.encode("7 + 1 =")] * 2
    tagged, bare = prefer(prompts, ["<think> 1 </think> <answer> 3 3 </answer>", "<think> 1 </think> 3"])
    assert 0 < bare < 0.5 < tagged < 1


@pytest.mark.parametrize("flags", ["--rewards accuracy=1,preference=0.5", "--reward-model somewhere"])
def test_one_of_reward_model_and_its_weight_without_the_other_is_refused(run, flags):
    assert_refused(run(*FLAGS.split(), *flags.split()), "--rewards preference=WEIGHT", "--reward-model FOLDER")


def test_a_language_model_is_no_reward_model(run, base, tmp_path):
    flags = f"{FLAGS} {PREFERRED} {base} --out {tmp_path}/run"
    assert_refused(run(*flags.split()), "language model", "--objective preference")


def test_a_reward_model_of_another_vocabulary_is_refused(run, byte_model, tmp_path):
    flags = f"{FLAGS} {PREFERRED} {byte_model} --out {tmp_path}/run"
    assert_refused(run(*flags.split()), "--reward-model", "different vocabularies")


def test_the_first_answer_that_cannot_be_judged_is_shown_once(train, world):
    world.setitem(REWARDS, "accuracy", lambda problem, text: None if len(text) % 3 == 0 else 1.0)
    said = (train("--steps 3") / "log.txt").read_text()
    assert said.count("could not be judged") == 1
    assert re.search(r"first case\): \{'accuracy': None.*\n  problem: .* =\n  response: ", said)


def test_a_run_folder_is_trained_on_from_its_newest_checkpoint(train, uninterrupted):
    whole, _ = uninterrupted("plain")
    folder = train(f"--steps 1 --lr 0 --model {whole}", "more")
    assert f"model: {whole}/checkpoints/step_000006" in (folder / "log.txt").read_text()
    assert_same_weights(folder / "checkpoints/step_000001", whole / "checkpoints/step_000006")


def test_random_rewards_do_not_favour_right_answers(train, world):
    """The control: every answer earns 0 or 1 by chance, whatever accuracy and format say of it."""
    seen = seen_by_add_gradient(world)
    folder = train("--steps 12 --rewards random=1")
    rollouts = [rollout for step, _ in seen for rollout in step]
    of = {right: [r.reward for r in rollouts if r.parts["accuracy"] == right] for right in (0.0, 1.0)}
    assert {*of[0.0], *of[1.0]} == {0.0, 1.0} and min(map(len, of.values())) > 10
    means = [sum(rewards) / len(rewards) for rewards in of.values()]
    assert abs(means[0] - means[1]) < 3 * (0.25 / len(of[0.0]) + 0.25 / len(of[1.0])) ** 0.5
    assert all("random" in line and "accuracy" in line for line in step_lines(folder))


def test_the_language_of_the_reasoning_is_reported_whatever_is_rewarded(uninterrupted):
    folder, out = uninterrupted("plain")
    assert all(0 <= line["language"] <= 1 for line in step_lines(folder))
    assert all("language" in row["parts"] for row in read_lines(folder / "rollouts.jsonl"))
    assert re.search(r"^language +[\d.]+ +[\d.]+$", out, re.M)


def test_a_run_killed_before_its_first_checkpoint_begins_again_when_resumed(uninterrupted, interrupted, run):
    folder, code, _ = interrupted("killed after three steps", VARIANTS["plain"])
    shutil.rmtree(folder / "checkpoints")
    assert code == -signal.SIGKILL and len(read_lines(folder / "metrics.jsonl")) == 4
    code, out, err = run("--resume", str(folder))
    assert code == 0 and "begun again" in out, err
    assert_same_run(folder, uninterrupted("plain")[0])
