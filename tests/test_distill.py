"""distill.py: its three methods, traces made by a teacher or read, other vocabularies, and runs that survive."""

import dataclasses
import json
import random
import shlex
import sys
from pathlib import Path

import pytest
import torch
from running import (
    Killed,
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

from nanor1 import judge, training
from nanor1.evaluation import exam
from nanor1.miniature import MINIATURES, make_tokenizer, miniature_task, new_model
from nanor1.model import Transformer
from nanor1.rewards import REWARDS
from nanor1.run.resumable import Ledger
from nanor1.stages import rejection_sampling, teacher
from nanor1.tasks.problems import make_task
from nanor1.tasks.prompts import Prompter
from nanor1.weights import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import distill  # noqa: E402
import train_sft  # noqa: E402

TINY = dataclasses.replace(MINIATURES["arithmetic"], width=32, mlp_width=32, n_layers=1)
FLAGS = "--lr 1e-2 --threads 1 --max-new-tokens 16 --eval-problems 8 --eval-samples 2 --max-rows 8 --warmup 0"


def with_common(flags):
    """The flags, behind those that all runs of these tests share as far as they have an effect."""
    if "on-policy" in flags:
        return f"{FLAGS} --problems 4 --completions 4 {flags}"
    is_made = ".jsonl" not in flags and "--teacher none" not in flags
    return f"{FLAGS} --examples 8 {'--trace-problems 24 --trace-samples 2' if is_made else ''} {flags}"


METHODS = {
    "traces": "--steps 8 --save-every 3",
    "logits": "--method logits --hard-weight 0 --steps 8 --save-every 3",
    "on-policy": "--method on-policy --steps 8 --save-every 3 --eval-every 4 --workers 2 --max-rows 32 --lr 2e-2",
}
CHAT = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|model|>{% endif %}"


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    """An untrained student, and a teacher that has learned to answer in the format."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer(TINY)
    for name, seed in (("student", 0), ("untrained", 1)):
        new_model(TINY, tokenizer.vocab_size, seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = random.Random(0)
    rows = [
        {
            "prompt": problem.prompt,
            "completion": f"<think> {rng.randint(0, 40)} </think> <answer> {rng.randint(0, 40)} </answer>",
        }
        for problem in miniature_task(TINY).sample(64, 0, 0)
    ]
    flags = f"--model {folder}/untrained --data {write_lines(folder / 'data.jsonl', rows)} --steps 20 --held-out 0"
    with own_process(folder / "cache"):
        flags = f"{flags} --lr 2e-2 --threads 1 --examples 16 --out {folder}/teacher"
        code, _, err = call_main(train_sft, shlex.split(flags))
    assert code == 0, err
    return folder


def mostly_right(problem, text):
    """Right in the eyes of these tests: a teacher this small is so by chance."""
    return float(len(text) % 3 > 0)


@pytest.fixture
def process(tmp_path):
    with own_process(tmp_path / "cache") as patch:
        patch.setitem(REWARDS, "accuracy", mostly_right)
        yield patch


@pytest.fixture
def run(process, folders, tmp_path):
    """A run of the tiny student into tmp_path/run, or a resumed one; returns exit code, stdout and stderr."""

    def call(flags, is_new=True):
        new = f"--model {folders}/student --teacher {folders}/teacher --out {tmp_path}/run"
        return call_main(distill, shlex.split(f"{new} {with_common(flags)}" if is_new else flags))

    return call


@pytest.fixture
def train(run, tmp_path):
    def call(flags):
        code, _, err = run(flags)
        assert code == 0, err
        return tmp_path / "run"

    return call


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """A whole run of each method: its folder, and what it said."""
    made = {}

    def once(method):
        if method not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            models = f"--model {folders}/student --teacher {folders}/teacher"
            flags = f"{models} {with_common(METHODS[method])} --out {folder}"
            with own_process(folder.parent / "cache") as patch:
                patch.setitem(REWARDS, "accuracy", mostly_right)
                code, out, err = call_main(distill, shlex.split(flags))
            assert code == 0, err
            made[method] = folder, out
        return made[method]

    return once


def measured(folder, key):
    return [line[key] for line in step_lines(folder)]


# ---- what is learned


def test_a_student_learns_the_traces_that_its_teacher_writes(whole):
    folder, out = whole("traces")
    losses = measured(folder, "loss")
    assert losses[0] > 3 and losses[-1] < 0.8 * losses[0]
    rows = read_lines(folder / "traces.jsonl")
    assert len(rows) > 10 and f"traces: {folder}/traces.jsonl: {len(rows)}" in out
    assert all(row["parts"]["accuracy"] == row["parts"]["format"] == 1 for row in rows)


def test_logits_draw_the_student_towards_the_teachers_distributions(whole):
    folder, _ = whole("logits")
    divergences = measured(folder, "divergence")
    assert divergences[0] > 1 and divergences[-1] < 0.6 * divergences[0]
    assert measured(folder, "loss") == pytest.approx(divergences)  # with no weight on the tokens themselves


def test_on_policy_lowers_the_reverse_divergence_to_the_teacher(whole):
    values = measured(whole("on-policy")[0], "reverse_kl")
    assert values[0] > 1 and values[-1] < 0.75 * values[0]


def test_the_student_and_the_sampler_agree_on_log_probabilities(whole):
    assert max(measured(whole("on-policy")[0], "logp_gap_mean")) < 1e-5


def test_a_teacher_is_never_changed(folders, whole):
    before = (newest(folders / "teacher") / "model.safetensors").read_bytes()
    for method in METHODS:
        whole(method)
    assert (newest(folders / "teacher") / "model.safetensors").read_bytes() == before


def test_traces_of_a_file_are_learned_with_no_teacher_and_no_task(process, folders, whole, tmp_path):
    path = whole("traces")[0] / "traces.jsonl"
    flags = f"--model {byte_model(tmp_path / 'bytes', seed=0)} --teacher {path} --steps 3 --lr 1e-2 --threads 1"
    code, out, err = call_main(distill, shlex.split(f"{flags} --warmup 0 --out {tmp_path}/run"))
    assert code == 0 and "teacher:" not in out, err
    losses = measured(tmp_path / "run", "loss")
    assert losses[-1] < losses[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"] is summary["after"] is None


def test_a_file_of_the_teachers_own_traces_makes_the_same_student(whole, run, folders, tmp_path):
    folder, _ = whole("traces")
    code, _, err = run(f"{METHODS['traces']} --teacher {folder}/traces.jsonl")
    assert code == 0 and not (tmp_path / "run" / "traces.jsonl").exists(), err
    assert_same_run(tmp_path / "run", folder)


def test_logits_may_be_compared_on_traces_of_a_file(whole, run, tmp_path):
    folder, _ = whole("logits")
    code, _, err = run(f"{METHODS['logits']} --traces {folder}/traces.jsonl")
    assert code == 0, err
    assert_same_run(tmp_path / "run", folder)


def test_traces_too_long_to_learn_are_counted_and_said(whole, run):
    path = whole("traces")[0] / "traces.jsonl"
    lengths = [
        len(make_tokenizer(TINY).encode(row["prompt"] + " " + row["completion"])) + 1 for row in read_lines(path)
    ]
    limit = sorted(lengths)[len(lengths) // 2]
    _, out, _ = run(f"--teacher {path} --max-tokens {limit} --steps 1")
    n_kept = sum(n <= limit for n in lengths)
    assert 0 < n_kept < len(lengths)
    assert f"{n_kept}, {len(lengths) - n_kept} longer than {limit} tokens left out" in out


def test_a_teacher_without_a_right_answer_is_refused_in_one_sentence(run, process):
    process.setitem(REWARDS, "accuracy", lambda problem, text: 0.0)
    assert_refused(run("--steps 1"), "none of the teacher's answers", "--any-format")


# ---- problems


def test_evaluations_meet_no_problem_that_is_trained_on(process, whole, train):
    held_out = {problem.prompt for problem in miniature_task(TINY).held_out(200)}
    asked = {row["prompt"] for row in read_lines(whole("traces")[0] / "traces.jsonl")}
    sampled, answer = [], judge.Actor.answer

    def see_and_answer(actor, problems, seed):
        sampled.extend(problem.prompt for problem in problems)
        return answer(actor, problems, seed)

    process.setattr(judge.Actor, "answer", see_and_answer)
    evaluated, evaluate = [], exam.evaluate

    def see_and_evaluate(sampler, prompter, problems, *arguments, **sampling):
        evaluated.append([problem.prompt for problem in problems])
        return evaluate(sampler, prompter, problems, *arguments, **sampling)

    process.setattr(exam, "evaluate", see_and_evaluate)
    train("--method on-policy --steps 2 --eval-every 1")
    assert len(asked) > 5 and len(set(sampled)) == 8 and not (asked | set(sampled)) & held_out
    assert len(evaluated) == 3 and set(evaluated[0]) <= held_out and evaluated[0] == evaluated[1] == evaluated[2]


def test_a_gap_beyond_rounding_is_said_once_on_policy(process, train):
    process.setitem(training.NORMAL_GAP, torch.float32, 0.0)
    said = (train("--method on-policy --steps 2") / "log.txt").read_text()
    assert said.count("warning: logp_gap_mean is") == 1 and "--importance-cap" not in said


def test_each_step_on_policy_asks_other_problems_with_other_random_numbers(process, train):
    seen, answer = [], judge.Actor.answer

    def see_and_answer(actor, problems, seed):
        seen.append((tuple(problem.prompt for problem in problems), seed))
        return answer(actor, problems, seed)

    process.setattr(judge.Actor, "answer", see_and_answer)
    train("--method on-policy --steps 3")
    assert len(set(seen)) == len({prompts for prompts, _ in seen}) == len({seed for _, seed in seen}) == 3


# ---- vocabularies and templates


def byte_model(folder, seed, chat_template=None, **tokens):
    tokenizer = of_bytes(chat_template=chat_template, **tokens)
    config = ModelConfig(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
    )  # fmt: skip
    Transformer(config).save_pretrained(folder)
    Transformer.from_scratch(folder, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["logits", "on-policy"])
def test_distributions_over_different_vocabularies_are_not_compared(run, tmp_path, method):
    other = byte_model(tmp_path / "bytes", seed=0)
    flags = f"--teacher {other} --method {method} --steps 1"
    assert_refused(run(flags), f"--method {method}", "different vocabularies", "--method traces")


def test_traces_cross_from_one_vocabulary_and_template_to_another(process, tmp_path):
    """A teacher without a chat template and a student with one, and the other way round."""
    for name in ("accuracy", "format", "language"):
        process.setitem(REWARDS, name, lambda problem, text: 1.0)
    process.setattr(rejection_sampling, "is_looping", lambda text: False)
    plain, chat = (
        byte_model(tmp_path / "plain", 0),
        byte_model(tmp_path / "chat", 1, CHAT, specials=["<|user|>", "<|model|>"]),
    )
    flags = "--task arithmetic --trace-problems 2 --trace-samples 8 --max-new-tokens 120 --steps 2 --threads 1 "
    flags += "--eval-problems 1 --lr 1e-2 --warmup 0"
    for student, other, fields in ((chat, plain, {"messages"}), (plain, chat, {"prompt", "completion"})):
        folder = tmp_path / f"run-{student.name}"
        argv = shlex.split(f"--model {student} --teacher {other} {flags} --out {folder}")
        code, _, err = call_main(distill, argv)
        assert code == 0, err
        losses = measured(folder, "loss")
        assert losses[1] < losses[0]
        for row in read_lines(folder / "traces.jsonl"):
            assert row.keys() & {"messages", "prompt", "completion"} == fields


def test_each_of_two_models_is_asked_in_its_own_template(tmp_path):
    problem = make_task("arithmetic").sample(1, 0, 0)[0]
    plain = of_bytes()
    chat = of_bytes(chat_template=CHAT, specials=["<|user|>", "<|model|>"])
    config = distill.Config(model="m", teacher="t")
    ask = lambda template, student, other: teacher.to_teacher(  # noqa: E731
        config, Prompter(student, template), other
    ).write(problem)
    assert Prompter(plain, "r1-zero").show(problem).endswith("<think>")
    text, _ = ask("r1-zero", plain, chat)
    assert text.startswith("<|user|>") and text.endswith("<|model|>") and problem.prompt in text
    text, ids = ask("chat", chat, plain)
    assert ids == plain.encode(text) and "<think>" in text and problem.prompt in text
    assert ask("bare", plain, chat)[0] == problem.prompt


def test_a_teacher_is_told_what_its_own_chat_template_has_a_variable_for():
    loud, deaf = (
        of_bytes(chat_template=f"{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}{more}")
        for more in ("{% if loud %}!{% endif %}", "?")
    )
    student = Prompter(loud, "chat", {"loud": True}, system="Be brief.", style="cot")
    config, problem = distill.Config(model="m", teacher="t"), make_task("arithmetic").sample(1, 0, 0)[0]
    for tokenizer, end in ((loud, "!"), (deaf, "?")):
        text, _ = teacher.to_teacher(config, student, tokenizer).write(problem)
        assert text.startswith("Be brief.") and "step by step" in text and text.endswith(end)


# ---- runs that survive


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(method, whole, run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        at_update(patch, 5, die)
        assert run(METHODS[method])[0] is None
    assert newest(tmp_path / "run").name == "step_000003"
    code, out, err = run(f"--resume {tmp_path}/run", is_new=False)
    assert code == 0 and "resumed at step 3" in out and "sampled" not in out, err
    assert_same_run(tmp_path / "run", whole(method)[0])


def stop_in_traces(patch, error):
    """The teacher is stopped at its second batch of answers."""
    append, calls = Ledger.append, []

    def append_or_stop(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return append(*arguments)

    patch.setattr(Ledger, "append", append_or_stop)


@pytest.mark.parametrize(("error", "goes_on"), [(Killed, "the same command"), (KeyboardInterrupt, "--resume")])
def test_a_run_stopped_while_traces_are_made_goes_on(error, goes_on, whole, run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_in_traces(patch, error)
        code, out, _ = run(METHODS["traces"])
    assert code == {Killed: None, KeyboardInterrupt: 130}[error]
    assert (f"python distill.py --resume {tmp_path}/run" in out) == (error is KeyboardInterrupt)
    n_before = len(read_lines(tmp_path / "run" / "traces.jsonl"))
    is_new = goes_on == "the same command"
    code, out, err = run(METHODS["traces"] if is_new else f"--resume {tmp_path}/run", is_new=is_new)
    assert code == 0 and "traces.jsonl goes on after 16 of 24 problems" in out and n_before > 5, err
    assert (tmp_path / "run/traces.jsonl").read_bytes() == (whole("traces")[0] / "traces.jsonl").read_bytes()
    assert_same_run(tmp_path / "run", whole("traces")[0])


def test_traces_of_other_settings_are_not_continued(run):
    with pytest.MonkeyPatch.context() as patch:
        stop_in_traces(patch, Killed)
        run("--steps 1")
    assert_refused(run("--steps 1 --temperature 0.5"), "--temperature", "0.5", "--out")


def test_a_student_of_traces_goes_on_without_its_teacher(whole, run, folders, tmp_path):
    """The traces are all there is to learn from, so the teacher may be gone."""
    with pytest.MonkeyPatch.context() as patch:
        at_update(patch, 5, die)
        run(METHODS["traces"])
    code, _, err = run(f"--resume {tmp_path}/run --teacher {tmp_path}/gone", is_new=False)
    assert code == 0, err
    assert_same_run(tmp_path / "run", whole("traces")[0])


# ---- what is said and refused


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--teacher none", ["--model and --teacher"]),
        ("--teacher missing.jsonl", ["missing.jsonl is neither", "file of traces"]),
        ("--method on-policy", ["--steps"]),
        ("--method wishful", ["--method", "on-policy", "wishful"]),
        ("--traces x.jsonl", ["--traces", "--method logits"]),
        ("--method logits --hard-weight 2", ["weight is 2"]),
        ("--method logits --divergence jsd --beta 1", ["beta is 1"]),
        ("--epochs 0", ["--epochs is 0"]),
        ("--trace-samples 0", ["--trace-samples is 0"]),
        ("--data x.jsonl", ["--data", "miniature"]),
        ("--resume /nowhere/at/all", ["/nowhere/at/all"]),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_sentence(run, flags, said):
    assert_refused(run(flags), *said)


@pytest.mark.parametrize("method", ["logits", "on-policy"])
def test_a_file_cannot_say_what_it_thinks_of_a_token(run, folders, method):
    assert_refused(run(f"--method {method} --steps 1 --teacher {folders}/data.jsonl"), "data.jsonl is a file")


def test_a_model_that_is_no_miniature_needs_a_task(process, tmp_path):
    student, other = (byte_model(tmp_path / name, seed=0) for name in ("student", "teacher"))
    assert_refused(call_main(distill, ["--model", student, "--teacher", other]), "--task")


COMMON = {"step", "tokens", "lr", "grad_norm", "step_s", "tokens_per_s", "peak_memory_gib"}
OWN = {
    "traces": {"loss"},
    "logits": {"loss", "divergence", "nll"},
    "on-policy": {"reverse_kl", "accuracy", "response_tokens", "entropy", "logp_gap_mean", "logp_gap_max"},
}


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_few_and_named(whole, method):
    folder, out = whole(method)
    for line in step_lines(folder):
        assert {key for key in line if not key.startswith("eval_")} == COMMON | OWN[method]
    summary = json.loads((folder / "summary.json").read_text())
    evaluated = [line for line in read_lines(folder / "metrics.jsonl") if "eval_accuracy" in line]
    assert [line["step"] for line in evaluated] == ([0, 4, 8] if method == "on-policy" else [0, 8])
    assert evaluated[0] == {"step": 0} | {f"eval_{key}": value for key, value in summary["before"].items()}
    assert evaluated[-1] == {"step": 8} | {f"eval_{key}": value for key, value in summary["after"].items()}
    table = out[out.index("  step") :].split("\n\n")[0].splitlines()
    assert len(table) == 9 and len({len(line) for line in table}) == 1 and len(table[0]) <= 120
    for label, of in (("diverg", "logits"), ("rev KL", "on-policy"), ("loss", "traces logits")):
        assert (label in table[0]) == (method in of)
