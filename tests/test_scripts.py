"""What the four scripts have in common: which problems they meet, own data and rewards, settings, and resumed runs."""

import dataclasses
import json
import shlex
import shutil
import sys
import tempfile
import typing
from pathlib import Path

import pytest
import torch
from running import assert_refused, call_main, own_process, read_lines, step_lines, write_lines
from vocabularies import of_bytes

from nanor1 import rewards
from nanor1.model import Transformer
from nanor1.sampler import Sampler
from nanor1.stages import sft, teacher
from nanor1.tasks.problems import Problem, is_in_share
from nanor1.tasks.prompts import Prompter
from nanor1.tokenizer import Tokenizer
from nanor1.weights import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import distill  # noqa: E402
import sample  # noqa: E402
import train_sft  # noqa: E402
import train_zero  # noqa: E402

QUESTIONS = [f"{a} + {b}?" for a in range(12) for b in range(5)]
HELD_OUT = {question for question in QUESTIONS if is_in_share(question, 0.1)}
COMMON = "--max-new-tokens 4 --threads 1 --template bare"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model over bytes that says anything, and problems of several kinds of file."""
    folder, tokenizer = tmp_path_factory.mktemp("scripts"), of_bytes()
    torch.manual_seed(0)
    config = ModelConfig("llama", tokenizer.vocab_size, 16, 16, 1, 2, 1, 8, 128)
    Transformer(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_lines(folder / "gsm8k.jsonl", [{"question": q, "answer": f"#### {len(q)}"} for q in QUESTIONS])
    write_lines(folder / "own.jsonl", [{"task": q, "gold": len(q)} for q in QUESTIONS])
    write_lines(folder / "open.jsonl", [{"prompt": q} for q in QUESTIONS])
    write_lines(folder / "answers.jsonl", [{"prompt": q, "completion": "5"} for q in QUESTIONS])
    return folder


@pytest.fixture
def process(tmp_path, monkeypatch):
    with own_process(tmp_path / "cache") as patch:
        patch.setitem(rewards.REWARDS, "accuracy", lambda problem, text: float(len(text) % 2))
        yield patch


@pytest.fixture
def run(process, folder):
    def run_script(script, flags):
        return call_main(script, shlex.split(flags.replace("DIR", str(folder))))

    return run_script


@pytest.fixture
def asked(process):
    """The texts of the prompts that models were asked to complete from now on, in the order of the calls."""
    calls, generate = [], Sampler.generate

    def see_and_generate(sampler, prompts, **sampling):
        calls.append([bytes(ids).decode() for ids in prompts])
        return generate(sampler, prompts, **sampling)

    process.setattr(Sampler, "generate", see_and_generate)
    return calls


# ---- which problems


def test_no_script_trains_on_what_another_evaluates_on(run, asked, tmp_path):
    """One file for everything: what is held out of it is so everywhere, by the same hash, and said."""
    task, out = f"--model DIR/model --task gsm8k --data DIR/gsm8k.jsonl {COMMON}", f"--out {tmp_path}"
    keep = f"{task} --n 8 --temperature 1 --any-format --min-language 0 --keep correct {out}/traces.jsonl"
    code, printed, err = run(sample, keep)
    assert code == 0 and "all but" not in err and "the train part" in err, err
    learned = {prompt for call in asked for prompt in call}
    assert learned == set(QUESTIONS) - HELD_OUT
    assert {row["split"] for row in read_lines(tmp_path / "traces.jsonl")} == {"train"}
    assert json.loads((tmp_path / "traces.jsonl.progress.json").read_text())["arguments"]["--split"] == "train"

    asked.clear()
    code, printed, err = run(sample, f"{task} {out}/evaluation.jsonl")
    (evaluated,) = asked
    assert code == 0 and set(evaluated) == HELD_OUT and "part: held-out" in printed, err

    asked.clear()
    flags = "--problems 8 --completions 2 --steps 9 --eval-every 0 --lr 1e-3 --seed 3"
    code, printed, err = run(train_zero, f"{task} {flags} {out}/zero")
    assert code == 0 and "the train part" in printed and "the held-out part" in printed, err
    before, *steps, after = asked
    assert before == after == evaluated
    assert {prompt for call in steps for prompt in call} == learned

    asked.clear()
    flags = f"--teacher DIR/model --trace-samples 8 --temperature 1 --any-format --examples 8 --steps 1 {out}/student"
    code, printed, err = run(distill, f"{task} {flags}")
    teaching, before, after = asked
    assert code == 0 and set(teaching) == learned and before == after == evaluated, err

    code, printed, err = run(train_sft, f"--model DIR/model --data DIR/answers.jsonl --steps 1 --threads 1 {out}/sft")
    n_out = len(HELD_OUT)
    assert code == 0 and f"held out: {n_out} of {n_out}" in printed, err


@pytest.mark.parametrize(
    ("split", "questions"), [("train", set(QUESTIONS) - HELD_OUT), ("held-out", HELD_OUT), ("all", set(QUESTIONS))]
)
@pytest.mark.parametrize("keep", ["", "--keep all --out DIR/kept.jsonl"])
def test_a_part_is_taken_where_it_is_asked_for(run, asked, folder, tmp_path, split, questions, keep):
    flags = f"--model DIR/model --task gsm8k --data DIR/gsm8k.jsonl {COMMON} --split {split} {keep}"
    code, _, err = run(sample, flags.replace("DIR/kept", f"{tmp_path}/kept"))
    assert code == 0 and {prompt for call in asked for prompt in call} == questions, err


def test_as_many_held_out_problems_are_the_same_ones_in_every_script(run, asked, folder, tmp_path):
    task = f"--model DIR/model --task gsm8k --eval-data DIR/gsm8k.jsonl {COMMON}"
    assert run(sample, f"{task} --limit 7 --seed 5")[0] == 0
    flags = f"--data DIR/more.jsonl --problems 1 --completions 2 --steps 0 --eval-problems 7 --out {tmp_path}/zero"
    write_lines(folder / "more.jsonl", [{"question": f"Why {i}?", "answer": "#### 1"} for i in range(5)])
    code, _, err = run(train_zero, f"{task} {flags} --seed 9")
    assert code == 0, err
    first, second, *_ = asked
    assert len(first) == 7 and first == second and first != QUESTIONS[:7]


def test_traces_of_held_out_problems_are_told_of_where_they_are_learned(run, tmp_path):
    rows = [{"prompt": q, "completion": "5", "split": "all" if q in HELD_OUT else "train"} for q in QUESTIONS]
    path, n = write_lines(tmp_path / "traces.jsonl", rows), len(HELD_OUT)
    code, printed, err = run(train_sft, f"--model DIR/model --data {path} --steps 1 --threads 1 --out {tmp_path}/sft")
    assert code == 0 and f"{n} to problems that are not for training" in printed, err
    code, printed, err = run(distill, f"--model DIR/model --teacher {path} --steps 1 --threads 1 --out {tmp_path}/d")
    assert code == 0 and f"warning: {path}: {n} traces of problems that are not for training" in printed, err
    pairs = write_lines(tmp_path / "pairs.jsonl", [row | {"chosen": "5", "rejected": "6"} for row in rows])
    flags = f"--objective preference --model DIR/model --data {pairs} --steps 1 --threads 1 --out {tmp_path}/rm"
    code, printed, err = run(train_sft, flags)
    assert code == 0 and f"{n} to problems that are not for training" in printed, err


# ---- own data, own rewards

OWN = """
import math

def shortness(problem, text):
    return -len(text) / 10

def _helper(problem, text):
    return 1

def picky(problem, text):
    if len(text) % 3 == 0:
        raise RuntimeError("I do not like " + repr(text[:5]))
    return 1.0
"""


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(OWN)
    return path


def test_own_columns_and_own_rewards_train_and_a_failing_reward_is_counted_and_shown(run, tmp_path, reward_file):
    flags = f"--model DIR/model --task text --data DIR/own.jsonl --fields prompt=task,answer=gold {COMMON}"
    flags += f" --reward-file {reward_file} --rewards accuracy=1,shortness=0.5,picky=0.1 --problems 4 --completions 4"
    code, printed, err = run(train_zero, f"{flags} --steps 2 --lr 1e-3 --out {tmp_path}/run --log-rollouts 99")
    assert code == 0, err
    assert printed.count("my_rewards.py, line 12, in picky: RuntimeError: I do not like") == 1
    rows, lines = read_lines(tmp_path / "run/rollouts.jsonl"), step_lines(tmp_path / "run")
    n_failed = sum(len(row["text"]) % 3 == 0 for row in rows)
    assert sum(line["unjudged"] for line in lines) == n_failed > 0 and f"{n_failed} values of picky" in printed
    for row in rows:
        parts, n = row["parts"], len(row["text"])
        assert parts["shortness"] == pytest.approx(-n / 10) and parts["picky"] == (None if n % 3 == 0 else 1.0)
        total = None if n % 3 == 0 else parts["accuracy"] - n / 20 + 0.1
        assert row["reward"] == pytest.approx(total)
    assert all(line["shortness"] < 0 and line["picky"] == 1 for line in lines)


def test_problems_without_answers_are_trained_on_and_evaluated_by_a_reward_file(run, process, tmp_path, reward_file):
    process.setitem(rewards.REWARDS, "accuracy", rewards.accuracy)  # of no gold answer it says None
    flags = f"--model DIR/model --task text --data DIR/open.jsonl {COMMON} --reward-file {reward_file}"
    flags += " --rewards shortness=1 --problems 4 --completions 4 --steps 2 --lr 1e-3 --eval-every 1"
    code, printed, err = run(train_zero, f"{flags} --out {tmp_path}/run")
    assert code == 0 and "without gold answers" in printed and "best evaluation on the way" in printed, err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["before"]["accuracy"] is summary["change"] is None and summary["after"]["reward"] < 0


def test_a_judge_that_fails_for_a_while_ends_no_run(run, tmp_path):
    path = tmp_path / "judge.py"
    path.write_text("def accuracy(problem, text):\n    raise ConnectionError('no judge')\n")
    flags = f"--model DIR/model --task gsm8k --data DIR/gsm8k.jsonl {COMMON} --reward-file {path} --steps 2"
    more = "--problems 2 --completions 2 --eval-every 1"
    code, printed, err = run(train_zero, f"{flags} {more} --out {tmp_path}/zero")
    assert code == 0 and "before: nothing could be judged" in printed, err
    assert "judge.py, line 2, in accuracy: ConnectionError: no judge" in printed and "values of accuracy" in printed
    assert json.loads((tmp_path / "zero/summary.json").read_text())["after"]["reward"] is None
    code, printed, err = run(distill, f"{flags} --teacher DIR/answers.jsonl --out {tmp_path}/student")
    assert code == 0 and "ConnectionError: no judge" in printed, err
    code, printed, err = run(
        sample, f"{flags.partition(' --steps')[0]} --keep correct --limit 2 --out {tmp_path}/t.jsonl"
    )
    assert code == 0 and "ConnectionError: no judge" in err and " values of accuracy" in err


def test_a_reward_file_of_which_nothing_is_used_is_refused(run, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def brevity(problem, text):\n    return -len(text)\n")
    flags = f"--model DIR/model --task gsm8k --data DIR/gsm8k.jsonl {COMMON} --reward-file {path}"
    student = f"{flags} --teacher DIR/answers.jsonl --steps 1 --out {tmp_path}/student"
    for script, argv in [(train_zero, f"{flags} --steps 1 --out {tmp_path}/zero"), (sample, flags), (distill, student)]:
        assert_last(run(script, argv), "of its functions (brevity) none is used")


def test_an_answer_file_begun_with_a_reward_file_does_not_go_on_with_another(run, tmp_path):
    path = tmp_path / "judge.py"
    path.write_text("def accuracy(problem, text):\n    return 1.0\n")
    flags = f"--model DIR/model --task gsm8k --data DIR/gsm8k.jsonl {COMMON} --limit 2 --reward-file {path}"
    for more in ("", "--keep all"):
        out = tmp_path / f"rows{len(more)}.jsonl"
        path.write_text("def accuracy(problem, text):\n    return 1.0\n")
        assert run(sample, f"{flags} {more} --out {out}")[0] == 0
        assert run(sample, f"{flags} {more} --out {out}")[0] == 0
        path.write_text("def accuracy(problem, text):\n    return 0.0\n")
        assert_last(run(sample, f"{flags} {more} --out {out}"), "was begun with --reward-file")


def assert_last(result, said):
    code, _, err = result
    assert code == 2 and said in err.splitlines()[-1], err


def test_what_a_step_logs_beside_the_rewards_are_names_that_no_reward_may_have(run, tmp_path):
    flags = f"--model DIR/model --task gsm8k --data DIR/gsm8k.jsonl {COMMON} --steps 2 --overlong penalty"
    flags += " --overlong-buffer 2 --kl-coef 0.1 --problems 4 --completions 4 --lr 1e-3"
    for kl in ("k3", "reward"):
        assert run(train_zero, f"{flags} --kl {kl} --out {tmp_path}/{kl}")[0] == 0
        names = {name for line in step_lines(tmp_path / kl) for name in line if not name.startswith("eval_")}
        assert names - {"accuracy", "format", "language"} <= rewards.LOGGED


def ended(patch):
    """Let no answer be cut off, which would be no answer."""
    generate = Sampler.generate

    def generate_whole(*arguments, **sampling):
        groups = generate(*arguments, **sampling)
        return [[dataclasses.replace(completion, finish="stop") for completion in group] for group in groups]

    patch.setattr(Sampler, "generate", generate_whole)


def test_a_rule_of_ones_own_takes_the_place_of_accuracy_in_evaluations_and_training_text(run, process, tmp_path):
    ended(process)
    path = tmp_path / "judge.py"
    path.write_text("def accuracy(problem, text):\n    return float('5' not in problem.prompt)\n")
    task = f"--model DIR/model --task gsm8k --eval-data DIR/gsm8k.jsonl {COMMON} --reward-file {path}"
    code, printed, err = run(sample, f"{task} --out {tmp_path}/rows.jsonl")
    assert code == 0, err
    share = sum("5" not in question for question in QUESTIONS) / len(QUESTIONS)
    assert f"accuracy        {share:.3f}" in printed
    rows = read_lines(tmp_path / "rows.jsonl")
    assert all(row["answers"][0]["accuracy"] == ("5" not in row["prompt"]) for row in rows)
    code, _, err = run(
        sample, f"{task} --split all --any-format --min-language 0 --keep correct --out {tmp_path}/traces.jsonl"
    )
    kept = {row["prompt"] for row in read_lines(tmp_path / "traces.jsonl")}
    assert code == 0 and kept == {question for question in QUESTIONS if "5" not in question}, err
    path.write_text("def accuracy(problem, text):\n    return 1.0\n")
    code, _, err = run(sample, f"{task} --out {tmp_path}/rows.jsonl")
    assert code == 2 and "was begun with --reward-file" in err
    path.write_text("def mine(problem, text):\n    return 1.0\n")
    code, _, err = run(sample, f"{task} --out {tmp_path}/other.jsonl")
    assert code == 2 and "error: --reward-file: of its functions (mine) none is used" in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--rewards shortness=1", ["unknown reward 'shortness'"]),
        ("--reward-file {file} --rewards _helper=1", ["unknown reward '_helper'"]),
        ("--reward-file missing.py", ["missing.py"]),
        ("--reward-file {file}", ["shortness, picky", "none is used", "--rewards"]),
        ("--fields question", ["question"]),
        ("--data DIR/own.jsonl --fields question=nothing", ["own.jsonl, line 1", "nothing"]),
    ],
)
def test_a_mistake_in_own_data_or_rewards_is_told_in_one_sentence(run, tmp_path, reward_file, flags, said):
    flags = flags.replace("{file}", str(reward_file))
    base = f"--model DIR/model --task gsm8k --data DIR/gsm8k.jsonl {COMMON} --steps 1 --out {tmp_path}/run"
    assert_refused(run(train_zero, f"{base} {flags}"), *said)


# ---- the prompt


@pytest.fixture
def chat_folder(folder, tmp_path):
    """A base model that ships a chat template, as Qwen2.5-0.5B does, and whose template has a variable."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<e>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{{ '!' if loud else '?' }}{% endif %}"
    )
    tokenizer = of_bytes(specials=["<e>"], chat_template=template)
    Transformer(ModelConfig("llama", tokenizer.vocab_size, 16, 16, 1, 2, 1, 8, 1024)).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_training_and_evaluation_are_asked_alike_by_the_same_options(run, process, chat_folder, tmp_path):
    seen, generate = set(), Sampler.generate

    def see_and_generate(sampler, prompts, **sampling):
        seen.update(
            bytes(i for i in ids if i < 256).decode().replace(q, "Q")
            for ids in prompts
            for q in QUESTIONS
            if f"]{q}" in bytes(i for i in ids if i < 256).decode()
        )
        return generate(sampler, prompts, **sampling)

    process.setattr(Sampler, "generate", see_and_generate)
    shots = write_lines(tmp_path / "shots.jsonl", [{"prompt": "1?", "completion": "\\boxed{1}"}])
    how = f"--model {chat_folder} --task gsm8k --data DIR/gsm8k.jsonl --max-new-tokens 4 --threads 1 --template chat "
    how += "--system Brief. --style cot --template-args '{\"loud\": true}' "
    small = "--problems 2 --completions 2 --eval-problems 2"
    commands = [
        (sample, f"{how} --examples {shots}"),
        (train_zero, f"{how} --examples {shots} --steps 1 {small} --out {tmp_path}/zero"),
        (distill, f"{how} --few-shot {shots} --teacher {chat_folder} --method on-policy --steps 1 {small} "
         f"--out {tmp_path}/distilled"),
    ]  # fmt: skip
    for script, flags in commands:
        code, _, err = run(script, flags)
        assert code == 0, err
    (prompt,) = seen
    assert prompt.startswith("[system]Brief.[user]1?") and prompt.endswith("[assistant]!") and "step by step" in prompt


def test_a_base_model_with_a_chat_template_is_asked_as_r1_zero_and_its_rollouts_end_with_their_turn(
    run, process, chat_folder, tmp_path
):
    ends, prompts = set(), set()
    generate = Sampler.generate

    def see_and_generate(sampler, ids, **sampling):
        prompts.update(bytes(i for i in one if i < 256).decode()[-19:] for one in ids)
        ends.add((sampling["stop_ids"], tuple(sampling["stop_texts"])))
        return generate(sampler, ids, **sampling)

    process.setattr(Sampler, "generate", see_and_generate)
    flags = (
        f"--model {chat_folder} --task gsm8k --data DIR/gsm8k.jsonl --max-new-tokens 4 --threads 1 --eval-problems 2"
    )
    flags += f" --problems 2 --completions 2 --steps 1 --out {tmp_path}/zero"
    code, printed, err = run(train_zero, flags)
    assert code == 0 and "template: r1-zero (a base model: it does not stop at the <e>" in printed, err
    assert prompts == {"Assistant: <think>"[-19:].rjust(18)} or all(p.endswith("Assistant: <think>") for p in prompts)
    tokenizer = Tokenizer.from_pretrained(chat_folder)
    assert ends == {(tokenizer.stop_ids, ("</answer>", "\nUser:"))} and tokenizer.token_id("<e>") in tokenizer.stop_ids


@pytest.mark.parametrize(("script", "given"), [(train_sft, "--held-out 0 --data"), (distill, "--teacher")])
def test_a_system_message_stands_before_chats_that_have_none_in_whatever_learns_them(
    run, process, chat_folder, tmp_path, script, given
):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": messages}] * 4)
    learned, sample_examples = [], script.sft.sample_examples

    def see_and_sample(*arguments):
        learned.extend(sample_examples(*arguments))
        return sample_examples(*arguments)

    process.setattr(script.sft, "sample_examples", see_and_sample)
    flags = f"--model {chat_folder} {given} {path} --system Brief. --steps 1 --threads 1 --out {tmp_path}/run"
    code, _, err = run(script, flags)
    tokenizer = Tokenizer.from_pretrained(chat_folder)
    assert code == 0 and learned and all("Brief." in tokenizer.decode(example.ids) for example in learned), err


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (train_sft, "--data {chats} --held-out 0"),
        (distill, "--teacher {chats}"),
        (
            train_zero,
            "--template chat --task gsm8k --data DIR/gsm8k.jsonl --problems 1 --completions 2 --max-new-tokens 4 "
            "--eval-problems 1",
        ),
    ],
    ids=["sft", "distill", "zero"],
)
def test_a_base_model_that_learned_chats_is_asked_in_its_template_from_then_on(
    run, chat_folder, tmp_path, script, flags
):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": messages}] * 4)
    flags = f"--model {chat_folder} {flags.format(chats=path)} --steps 1 --threads 1 --out {tmp_path}/run"
    code, _, err = run(script, flags)
    assert code == 0, err
    assert not Tokenizer.from_pretrained(chat_folder).ends_turns
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step_*")
    assert Tokenizer.from_pretrained(checkpoint).ends_turns
    flags = f"--model {tmp_path}/run --task gsm8k --data DIR/gsm8k.jsonl --max-new-tokens 4 --threads 1"
    code, printed, err = run(sample, flags)
    assert code == 0 and "template: chat (the model's own)" in err, err


# ---- settings


@pytest.mark.parametrize("script", [train_zero, train_sft, distill, sample])
def test_template_arguments_that_are_no_json_are_refused_before_anything_is_made(run, tmp_path, script):
    flags = "--model DIR/model --template-args loud" + (f" --out {tmp_path}/run" if script is not sample else "")
    assert_refused(run(script, flags), "--template-args 'loud' are no JSON object")
    assert not list(tmp_path.glob("run"))


@pytest.mark.parametrize("script", [train_zero, train_sft, distill, sample])
def test_every_number_has_a_range(script):
    kinds = typing.get_type_hints(script.Config)
    for field in dataclasses.fields(script.Config):
        if {int, float} & {kinds[field.name], *typing.get_args(kinds[field.name])}:
            least, above, *_ = field.metadata["range"]
            assert least is not None or above is not None, field.name


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (train_zero, "--clip-low -0.1 --minibatches 2"),
        (train_zero, "--clip-high -1 --minibatches 2"),
        (train_zero, "--importance-cap -2"),
        (train_zero, "--weight-decay -0.1"),
        (train_zero, "--max-grad-norm -1"),
        (train_zero, "--threads 100000"),
        (train_zero, "--threads -1"),
        (train_zero, "--seed -1"),
        (train_zero, "--eval-temperature -1"),
        (train_zero, "--overlong penalty --overlong-buffer -3"),
        (train_sft, "--max-grad-norm -1"),
        (train_sft, "--centring -1 --objective preference"),
        (train_sft, "--held-out -0.1"),
        (distill, "--eval-temperature -1"),
        (distill, "--divergence-temperature 0 --method logits"),
        (distill, "--hard-weight 1.5 --method logits"),
        (train_zero, "--problems 1000000000000"),
        (train_zero, "--completions 1000000000000"),
        (train_zero, "--importance-cap 1e308"),
        (train_zero, "--lr 1e12"),
        (train_sft, "--examples 1000000000000"),
        (distill, "--examples 1000000000000"),
        (sample, "--n 1000000000000"),
        (sample, "--keep-share 0"),
        (sample, "--threads 100000"),
        (sample, "--seed -3"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(run, script, flags):
    name = flags.split()[0] if "overlong" not in flags else "--overlong-buffer"
    assert_refused(run(script, f"--model DIR/model {flags}"), f"{name} is", "it must be")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (train_zero, "--eval-samples 4"),
        (train_zero, "--eval-samples-during 4 --eval-temperature 0"),
        (train_zero, "--kl k3"),
        (train_zero, "--reference-every 5"),
        (train_zero, "--overlong-buffer 9"),
        (train_zero, "--overlong-buffer 9 --overlong mask"),
        (train_zero, "--clip-high 0.3"),
        (train_zero, "--clip-low 0.2"),
        (train_zero, "--fields question=q --data none --task countdown"),
        (train_zero, "--allow-changed-data"),
        (train_sft, "--centring 0.1"),
        (train_sft, "--held-out 0.2 --eval-data x"),
        (distill, "--beta 0.3 --method logits"),
        (distill, "--divergence reverse"),
        (distill, "--hard-weight 0.2"),
        (distill, "--problems 3"),
        (distill, "--trace-problems 3 --method on-policy --steps 1"),
        (distill, "--examples 3 --method on-policy --steps 1"),
        (distill, "--eval-samples 3"),
        (distill, "--data x.jsonl --task none --teacher DIR/answers.jsonl"),
        (distill, "--few-shot x.jsonl --data none --task none --teacher DIR/answers.jsonl"),
        (distill, "--temperature 0.5 --teacher DIR/answers.jsonl"),
        (distill, "--max-rows 5 --teacher DIR/answers.jsonl --task none --data none"),
        (distill, "--data DIR/gsm8k.jsonl --teacher DIR/answers.jsonl --task none"),
        (distill, "--style cot --teacher DIR/answers.jsonl --task none --data none"),
        (train_zero, "--eval-samples-during 4 --eval-temperature 1 --eval-every 0"),
        (sample, "--top-p 0.9 --task gsm8k"),
        (sample, "--top-k 5 --temperature 0 --task gsm8k"),
    ],
)
def test_a_flag_that_has_no_effect_is_refused(run, script, flags):
    more = {train_zero: "--task gsm8k --data DIR/gsm8k.jsonl", train_sft: "--data DIR/answers.jsonl"}
    more[distill] = "--task gsm8k --data DIR/gsm8k.jsonl --teacher DIR/model"
    more[sample] = "--data DIR/gsm8k.jsonl"
    name = flags.split()[0]
    assert_refused(run(script, f"--model DIR/model {more[script]} {flags}"), f"{name} has no effect without")


def test_a_gradient_norm_of_0_clips_nothing(run, process, tmp_path):
    from nanor1.optim import MasterAdamW

    model = torch.nn.Linear(3, 1, bias=False)
    moved = []
    for max_grad_norm in (0.0, 1e9, 1.0):
        with torch.no_grad():
            model.weight.fill_(1.0)
        optimizer = MasterAdamW(model)
        optimizer.adamw.param_groups[0]["eps"] = 1.0  # so that the step's length depends on the gradient's
        model(torch.tensor([[3.0, -4.0, 0.0]])).sum().backward()
        assert optimizer.step(0.1, max_grad_norm) == pytest.approx(5.0)
        moved.append((model.weight.detach() - 1).tolist())
    assert moved[0] == moved[1] != moved[2] and all(x == pytest.approx(0) for x in moved[0][0][2:])
    assert moved[0][0][0] < 0 < moved[0][0][1]


# ---- data that changes, schedules that jump


RESUMED = {
    train_zero: "--model DIR/model --task gsm8k --data {file} --template bare --problems 2 --completions 2 "
    "--max-new-tokens 4 --eval-problems 1 --lr 1e-4 --decay linear",
    train_sft: "--model DIR/model --data {file} --examples 4 --lr 1e-4",
    distill: "--model DIR/model --teacher {file} --examples 4 --lr 1e-4",
}


@pytest.mark.parametrize("script", RESUMED)
@pytest.mark.parametrize("change", ["edited", "grown"])
def test_a_run_does_not_go_on_in_silence_with_other_data(run, folder, tmp_path, script, change):
    rows = [{"question": q, "answer": f"#### {len(q)}", "prompt": q, "completion": "5"} for q in QUESTIONS]
    file = write_lines(tmp_path / "data.jsonl", rows)
    flags = RESUMED[script].replace("{file}", str(file))
    code, _, err = run(script, f"{flags} --steps 2 --threads 1 --out {tmp_path}/run")
    assert code == 0, err
    kept = json.loads((tmp_path / "run/config.json").read_text())["data_sha256"]
    assert list(kept) == [str(file)] and len(kept[str(file)]) == 64
    assert run(script, f"--resume {tmp_path}/run --steps 3")[0] == 0  # as it was
    write_lines(file, [*rows[:-1], rows[-1] | {"answer": "#### 70"}] if change == "edited" else [*rows, *rows[:3]])
    resume = f"--resume {tmp_path}/run --steps 4"
    assert_refused(run(script, resume), f"{file} has changed since", "--allow-changed-data")
    code, printed, err = run(script, f"{resume} --allow-changed-data")
    assert code == 0 and f"warning: {file} has changed" in printed, err
    code, printed, err = run(script, f"--resume {tmp_path}/run --steps 5")  # allowed once, it is the run's data
    assert code == 0 and "has changed" not in printed, err


def test_a_file_that_a_resumed_run_reads_for_the_first_time_is_named(run, folder, tmp_path):
    flags = RESUMED[train_sft].replace("{file}", "DIR/answers.jsonl")
    assert run(train_sft, f"{flags} --steps 1 --threads 1 --out {tmp_path}/run")[0] == 0
    other = write_lines(tmp_path / "other.jsonl", [{"prompt": q, "completion": "6"} for q in QUESTIONS])
    resume = f"--resume {tmp_path}/run --steps 2 --data DIR/answers.jsonl,{other}"
    assert_refused(run(train_sft, resume), f"{other} was added since")


def test_a_data_file_that_was_moved_and_is_what_it_was_has_not_changed(run, tmp_path):
    rows = [{"prompt": q, "completion": "5"} for q in QUESTIONS]
    file = write_lines(tmp_path / "data.jsonl", rows)
    flags = RESUMED[train_sft].replace("{file}", str(file))
    assert run(train_sft, f"{flags} --steps 1 --threads 1 --out {tmp_path}/run")[0] == 0
    file.rename(tmp_path / "moved.jsonl")
    resume = f"--resume {tmp_path}/run --data {tmp_path}/moved.jsonl"
    code, printed, err = run(train_sft, f"{resume} --steps 2")
    assert code == 0 and "warning" not in printed, err
    write_lines(tmp_path / "moved.jsonl", rows[:-1])
    assert_refused(run(train_sft, f"{resume} --steps 3"), "moved.jsonl was added")


def test_traces_that_a_run_made_and_somebody_edited_are_not_learned_in_silence(run, tmp_path):
    flags = "--model DIR/model --teacher DIR/model --task gsm8k --data DIR/gsm8k.jsonl --any-format --examples 4"
    flags += f" {COMMON} --trace-problems 20 --eval-problems 2 --reward-file {tmp_path}/judge.py"
    (tmp_path / "judge.py").write_text("def accuracy(problem, text):\n    return 1.0\n")
    with pytest.MonkeyPatch.context() as patch:
        ended(patch)
        code, _, err = run(distill, f"{flags} --steps 1 --out {tmp_path}/run")
    assert code == 0, err
    assert run(distill, f"--resume {tmp_path}/run --steps 2")[0] == 0
    traces = tmp_path / "run/traces.jsonl"
    traces.write_text("".join(traces.read_text().splitlines(keepends=True)[:-1]))
    assert_last(run(distill, f"--resume {tmp_path}/run --steps 3"), "traces.jsonl has changed since")
    code, printed, err = run(distill, f"--resume {tmp_path}/run --steps 3 --allow-changed-data")
    assert code == 0 and "traces.jsonl has changed since" in printed, err


@pytest.mark.parametrize("script", [train_zero, distill])
def test_other_held_out_problems_are_not_compared_with_those_at_the_start(run, tmp_path, script):
    rows = [{"question": q, "answer": f"#### {len(q)}"} for q in QUESTIONS]
    file = write_lines(tmp_path / "eval.jsonl", rows[:5])
    flags = f"--model DIR/model --task gsm8k --data DIR/gsm8k.jsonl --eval-data {file} {COMMON}"
    more = "--problems 2 --completions 2" if script is train_zero else "--teacher DIR/answers.jsonl --examples 2"
    code, printed, err = run(script, f"{flags} {more} --steps 1 --out {tmp_path}/run")
    assert code == 0 and "paired over 5 problems" in printed, err
    code, printed, err = run(script, f"--resume {tmp_path}/run --steps 2")
    assert code == 0 and "paired over 5 problems" in printed, err
    write_lines(file, rows[5:10])
    code, printed, err = run(script, f"--resume {tmp_path}/run --steps 3 --allow-changed-data")
    assert code == 0 and "other held-out problems, with which these cannot be compared" in printed, err
    assert "paired over" not in printed
    assert json.loads((tmp_path / "run/summary.json").read_text())["change"] is None


def test_a_traces_problem_is_known_by_its_question_in_every_template():
    problem = Problem("1 + 1?", "2", "gsm8k")
    tokenizer = of_bytes(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    for template, style in (("r1-zero", "think"), ("bare", "think"), ("chat", "think"), ("chat", "direct")):
        prompter = Prompter(tokenizer, template, style=style)
        shown = prompter.show(problem)
        row = {"prompt": shown, "completion": "2"}
        if template == "chat":
            row = {"messages": [*shown, {"role": "assistant", "content": "2"}]}
        with tempfile.TemporaryDirectory() as folder:
            example = sft.read_examples(write_lines(Path(folder) / "a.jsonl", [row]), tokenizer, 9999).examples[0]
        assert example.question in teacher.questions_of([problem])


def test_traces_of_problems_that_are_held_out_are_not_learned_whatever_made_them(run, process, tmp_path):
    ended(process)
    (tmp_path / "judge.py").write_text("def accuracy(problem, text):\n    return 1.0\n")
    common = f"--model DIR/model --task gsm8k --max-new-tokens 4 --threads 1 --reward-file {tmp_path}/judge.py"
    made = f"{common} --data DIR/gsm8k.jsonl --any-format --min-language 0 --keep correct --template bare"
    assert run(sample, f"{made} --out {tmp_path}/traces.jsonl")[0] == 0
    n_traces = len(read_lines(tmp_path / "traces.jsonl"))
    trained_on = [q for q in QUESTIONS if q not in HELD_OUT][:7]
    rows = [{"question": q, "answer": "#### 1"} for q in trained_on]
    held_out = write_lines(tmp_path / "eval.jsonl", rows)
    student = f"{common} --teacher {tmp_path}/traces.jsonl --eval-data {held_out} --steps 1 --template bare"
    code, printed, err = run(distill, f"{student} --data DIR/gsm8k.jsonl --out {tmp_path}/run")
    assert code == 0, err
    assert "7 left out, to problems that are held out" in printed and n_traces == len(QUESTIONS) - len(HELD_OUT)


@pytest.mark.parametrize("flags", ["--model DIR/other", "--out DIR/elsewhere", "--from-scratch"])
def test_what_a_resumed_run_has_no_use_for_is_refused(run, tmp_path, flags):
    begun = f"--model DIR/model --data DIR/answers.jsonl --examples 4 --threads 1 --out {tmp_path}/run"
    assert run(train_sft, f"{begun} --steps 1")[0] == 0
    assert_refused(run(train_sft, f"--resume {tmp_path}/run --steps 2 {flags}"), f"{flags.split()[0]} has no effect")
    assert run(train_sft, f"{begun} --resume {tmp_path}/run --steps 2")[0] == 0, "the same command again"


@pytest.mark.parametrize("script", RESUMED)
def test_a_learning_rate_that_jumps_is_told_of_and_one_that_goes_on_is_not(run, tmp_path, script):
    data = "DIR/gsm8k.jsonl" if script is train_zero else "DIR/answers.jsonl"
    flags = RESUMED[script].replace("{file}", data)
    code, printed, err = run(script, f"{flags} --steps 8 --warmup 1 --save-every 4 --threads 1 --out {tmp_path}/run")
    assert code == 0, err
    shutil.rmtree(tmp_path / "run/checkpoints/step_000008")
    code, printed, err = run(script, f"--resume {tmp_path}/run")
    assert code == 0 and "resumed at step 4" in printed and "learning rate goes from" not in printed, err
    code, printed, err = run(script, f"--resume {tmp_path}/run --steps 20")
    last, first = (step_lines(tmp_path / "run")[i]["lr"] for i in (7, 8))
    assert code == 0 and last < 0.5 * first, err
    assert f"warning: the learning rate goes from {last:.3g} to {first:.3g}: the schedule is now that of 20" in printed
