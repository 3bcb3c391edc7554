"""Evaluations by every method through sample.py: rows, their tokens, files that go on, and what is refused."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest
from running import Killed, call_main, die_saving, randomize, read_lines, rig, write_lines
from vocabularies import of_bytes

from nanor1.evaluation import measure
from nanor1.evaluation.methods import METHODS
from nanor1.model import Transformer
from nanor1.run.resumable import ledger_path
from nanor1.sampler import Sampler
from nanor1.stages.reward_model import RewardModel
from nanor1.tokenizer import Tokenizer
from nanor1.weights import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sample  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# What may follow a byte, whatever came before: lines "Si", in the end \boxed{3} or \boxed{4}; a coin decides each.
FOLLOWING = {"<|assistant|>": "\\S", "S": "i", "i": "\n", "\n": "\\S", "\\": "b", "b": "o", "o": "x", "x": "e"}
FOLLOWING |= {"e": "d", "d": "{", "{": "34", "3": "}", "4": "}", "t": "\\"}
PROBLEMS = [{"question": f"{what}?", "answer": f"#### {gold}"} for what, gold in [("a", 3), ("bb", 4), ("ccc", 9)]]
GENERATE = Sampler.generate  # tests put a wrapper in its place
ALL = [name for name in METHODS if name != "dvts"]  # at N up to 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of this module: a model, a reward model, problems."""
    folder = tmp_path_factory.mktemp("measure")
    specials = ["<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = of_bytes(specials=specials, eos="<end>", chat_template=TEMPLATE)
    V = tokenizer.vocab_size
    config = ModelConfig("llama", V, V, 8, 1, 1, 1, 8, 1024)
    logits = {
        (tokenizer.encode(token, allow_special=True)[0], ord(character)): 2.0 - i / 16  # greedy takes the first
        for token, following in FOLLOWING.items()
        for i, character in enumerate(following)
    }
    rig(Transformer(config), logits | {(ord("}"), tokenizer.eos_id): 2.0}).save_pretrained(folder / "model")
    randomize(RewardModel(config)).save_pretrained(folder / "reward")
    for name in ("model", "reward"):
        tokenizer.save_pretrained(folder / name)
    write_lines(folder / "problems.jsonl", PROBLEMS)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Run main() on the problems of gsm8k; returns its exit code, stdout and stderr."""

    def run_main(*argv, data=None):
        options = ["--model", folder / "model", "--task", "gsm8k", "--data", data or folder / "problems.jsonl"]
        return call_main(sample, [*options, "--split", "all", "--max-new-tokens", "24", "--device", "cpu", *argv])

    return run_main


def without_seconds(path):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_lines(path)]


def kinds(path):
    return list(dict.fromkeys(row["run"] for row in read_lines(path)))


# ---- every method


class Watch:
    """The number of tokens that the sampler made, by run; and the prompts that it was asked to complete, by run."""

    def __init__(self):
        self.run, self.made, self.prompts = None, Counter(), {}

    def produce(self, asker, run, *arguments):
        self.run = str(run)
        return PRODUCE(asker, run, *arguments)

    def complete(self, sampler, sessions, **arguments):
        return RUN(sampler, [self.listen(session) for session in sessions], **arguments)

    def listen(self, session):
        made_PG = None
        while True:
            try:
                prompts = session.send(made_PG)
            except StopIteration as end:
                return end.value
            self.prompts.setdefault(self.run, []).extend(list(prompt.ids) for prompt in prompts)
            made_PG = yield prompts
            self.made[self.run] += sum(len(completion.ids) for group in made_PG for completion in group)


RUN = Sampler.run
PRODUCE = measure.produce


@pytest.fixture(scope="module")
def whole(run, folder):
    """All methods but DVTS at N = 1, 2, 4 by one command: the file, what it printed, and what was watched."""
    watch, out = Watch(), folder / "whole.jsonl"
    argv = ["--compare", "--n", "4", "--out", out, "--picture", folder / "whole.svg"]
    argv += ["--reward-model", folder / "reward"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "produce", watch.produce)
        patch.setattr(Sampler, "run", lambda *arguments, **named: watch.complete(*arguments, **named))
        code, printed, err = run(*argv)
    assert code == 0, err
    return argv, out, printed, watch


def test_compare_without_a_method_takes_all_that_can_be(whole):
    _, out, printed, _ = whole
    head, columns, *lines = printed.splitlines()
    assert head.startswith("gsm8k: 3 problems x 4, template chat, temperature 1, seed 0") and columns.startswith("meth")
    table = lines[: lines.index("")]
    assert list(dict.fromkeys(line.split()[0] for line in table)) == ALL
    ns = {name: [int(line.split()[1]) for line in table if line.split()[0] == name] for name in ALL}
    assert ns["greedy"] == [1] and ns["majority"] == [2, 4] and ns["beam"] == [1, 2, 4]
    names, legend = "\n".join(lines[lines.index("") + 1 :]).split("\n\n")
    assert [line.split()[0] for line in names.splitlines()] == ALL  # what their names mean
    assert "upper bound" in names and legend.startswith("accuracy: right")
    rows = read_lines(out)
    assert [row["index"] for row in rows] == [0, 1, 2] * (len(rows) // 3)


def test_a_rows_tokens_are_those_that_the_sampler_made(whole):
    _, out, _, watch = whole
    sampled = Counter()
    for row in read_lines(out):
        sampled[row["run"]] += row["sampled"]
        in_answers = sum(answer["tokens"] for answer in row["answers"])
        kind = row["run"].rpartition("-")[0]
        if kind in ("samples", "greedy", "direct", "refine"):
            assert row["sampled"] == in_answers and row["inserted"] == 0
        elif kind == "budget":  # each wait stands where a stop token was cut off
            assert in_answers <= row["sampled"] + row["inserted"] <= in_answers + 3
        else:
            assert row["sampled"] >= max(answer["tokens"] for answer in row["answers"])
    assert {run: n for run, n in sampled.items() if not run.startswith("token")} == watch.made
    assert any(row["inserted"] for row in read_lines(out) if row["run"] == "budget-4")


def test_prompts_are_counted_apart(whole):
    _, out, _, watch = whole
    read = Counter()
    for row in read_lines(out):
        read[row["run"]] += row["read"]
    for run in ("greedy-1", "direct-1", "samples-4"):
        assert read[run] == sum(map(len, watch.prompts[run]))
    assert read["refine-4"] > read["samples-4"] and read["beam-4"] > 0


def test_an_answer_is_judged_and_has_what_methods_choose_by(whole):
    _, out, _, _ = whole
    for row in read_lines(out):
        assert row["prompt"] == PROBLEMS[row["index"]]["question"]
        assert row["gold"] == PROBLEMS[row["index"]]["answer"].removeprefix("#### ")
        for answer in row["answers"]:
            if answer["finish"] == "stop":
                assert answer["text"].endswith(f"\\boxed{{{answer['answer']}}}") and answer["answer"] in "34"
            else:
                assert answer["answer"] is None
            assert answer["accuracy"] == float(answer["answer"] == row["gold"])
            assert 0 <= answer["preference"] <= 1 and answer["logprob"] < 0
            assert answer["format"] == float(row["run"] == "direct-1")  # the others are asked for tags
            assert ("tail" in answer) == (row["run"] == "samples-4")
            assert "tail" not in answer or 0 < answer["lowest"] <= answer["tail"] + 1e-4


def test_the_direct_answer_is_asked_for_in_its_own_words_and_reviews_show_the_last_answer(whole, folder):
    _, out, _, watch = whole
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    shown = {run: [*map(tokenizer.decode, prompts)] for run, prompts in watch.prompts.items()}
    assert all("without any explanation" in text for text in shown["direct-1"])
    others = [text for run in ("greedy-1", "samples-4") for text in shown[run]]
    assert all("Think first" in text and "without any explanation" not in text for text in others)
    (row, *_) = [row for row in read_lines(out) if row["run"] == "refine-4"]
    assert len(row["answers"]) == 4
    first, last = row["answers"][0]["text"], row["answers"][-1]["text"]
    assert any(first in text and "Check your answer" in text for text in shown["refine-4"])
    assert len(shown["refine-4"]) == 12 and last


def test_the_picture_is_svg_with_a_line_for_each_method(whole, folder):
    svg = ET.parse(folder / "whole.svg").getroot()
    texts = [element.text for element in svg.iter() if element.tag.endswith("text")]
    assert svg.tag.endswith("svg") and set(ALL) < {text.removesuffix(" (upper bound)") for text in texts}
    assert "model on gsm8k, 3 problems" in texts


def test_a_finished_file_is_reckoned_again_without_a_token_made(whole, run, folder, monkeypatch):
    argv, out, printed, _ = whole
    before = out.read_bytes()
    (folder / "whole.svg").unlink()
    monkeypatch.setattr(measure, "produce", None)  # it would be called in vain
    code, again, err = run(*argv)
    assert (code, again, out.read_bytes()) == (0, printed, before) and f"{out} is finished" in err
    assert (folder / "whole.svg").exists()
    with out.open("ab") as file:
        file.write(b"a line of the user's own")
    assert run(*argv)[:2] == (0, printed)
    out.write_bytes(before)
    code, other, _ = run(*argv, "--keep-share", "0.5")  # by which only the choice changes
    assert code == 0 and out.read_bytes() == before


def test_methods_are_compared_on_rows_of_which_the_table_tells_what_they_hold(whole):
    """Reckoned again, from the file alone, by other code: accuracy of single samples, and what holds a right one."""
    _, out, printed, _ = whole
    samples = [row["answers"] for row in read_lines(out) if row["run"] == "samples-4"]
    share = [sum(answer["accuracy"] for answer in group) / 4 for group in samples]
    table = {tuple(line.split()[:2]): line.split() for line in printed.splitlines() if len(line.split()) == 12}
    assert float(table["sample", "1"][2]) == pytest.approx(sum(share) / 3, abs=6e-4)
    assert float(table["best-rule", "4"][2]) == pytest.approx(sum(s > 0 for s in share) / 3, abs=6e-4)
    n_tokens = sum(answer["tokens"] for group in samples for answer in group)
    assert int(table["majority", "2"][7]) == round(n_tokens / 3 / 2)
    greedy = [row["answers"][0]["accuracy"] for row in read_lines(out) if row["run"] == "greedy-1"]
    assert float(table["greedy", "1"][2]) == pytest.approx(sum(greedy) / 3, abs=6e-4)


# ---- the same result


SOME = ["--method", "majority,beam,budget,refine,token-beam", "--n", "2"]


def test_rows_depend_on_the_seed_alone_and_not_on_the_batch(run, tmp_path):
    paths = {}
    for name, options in {"a": [], "b": ["--max-rows", "1"], "c": ["--seed", "1"]}.items():
        paths[name] = tmp_path / name
        code, _, err = run(*SOME, "--out", paths[name], *options)
        assert code == 0, err
    a, b, c = (without_seconds(paths[name]) for name in "abc")
    assert a == b
    same = [one["answers"] == other["answers"] for one, other in zip(a, c, strict=True)]
    assert all(same[-3:]) and sum(same[:-3]) <= 4  # token beams draw nothing; short answers may come again


def test_greedy_is_what_temperature_0_gives(run, tmp_path):
    assert run("--method", "greedy", "--n", "8", "--out", tmp_path / "greedy")[0] == 0
    assert run("--temperature", "0", "--out", tmp_path / "zero")[0] == 0
    greedy, zero = read_lines(tmp_path / "greedy"), read_lines(tmp_path / "zero")
    assert [row["answers"] for row in greedy] == [row["answers"] for row in zero]
    assert kinds(tmp_path / "greedy") == ["greedy-1"] and kinds(tmp_path / "zero") == ["samples-1"]


def test_trees_are_told_apart_in_a_row(run, tmp_path):
    assert run("--method", "dvts", "--n", "8", "--out", tmp_path / "out")[0] == 0
    for row in read_lines(tmp_path / "out"):
        assert row["sampled"] == sum(row["sampled_by_tree"]) and len(row["sampled_by_tree"]) == 2
        assert {answer["tree"] for answer in row["answers"]} == {0, 1}


# ---- files that go on


KILLED = [*SOME, "--max-rows", "1"]  # 2 problems a batch, so that a run takes two


def test_a_killed_evaluation_goes_on_to_the_rows_of_an_uninterrupted_one(run, tmp_path):
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        die_saving(patch, 5)
        assert run(*KILLED, "--out", killed)[0] is None
    ledger = json.loads(ledger_path(killed).read_text())
    assert 0 < ledger["n_done"] < 5 and killed.stat().st_size > ledger["n_bytes"] > 0
    code, printed, err = run(*KILLED, "--out", killed)
    assert code == 0 and f"{killed} goes on after {ledger['n_done']} of 15 problems" in err, err
    assert run(*KILLED, "--out", whole)[0] == 0
    assert without_seconds(killed) == without_seconds(whole)
    columns = [re.sub(r"\S+$", "", line, flags=re.MULTILINE) for line in printed.splitlines()]
    again = run(*KILLED, "--out", whole)[1]
    assert columns == [re.sub(r"\S+$", "", line, flags=re.MULTILINE) for line in again.splitlines()]


def interrupt(patch, n_runs, error):
    """Let this error come after so many calls of produce."""
    left = iter(range(n_runs))

    def interrupted(*arguments):
        if next(left, None) is None:
            raise error
        return PRODUCE(*arguments)

    patch.setattr(measure, "produce", interrupted)


def test_ctrl_c_keeps_the_batches_done_reports_them_and_the_same_command_goes_on(run, tmp_path):
    out, options = tmp_path / "out.jsonl", [*KILLED[:3], "2", "--max-rows", "1", "--out", tmp_path / "out.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 3, KeyboardInterrupt)
        code, printed, err = run(*options)
    assert code == 130 and len(read_lines(out)) == 5
    said = "stopped by Ctrl-C after 5 of 15 problems (1 under way lost), kept in"
    assert f"{said} {out}; the same command goes on from there" in err
    assert printed.startswith("gsm8k: 3 problems (of beam-2 2) x 2,")
    assert "majority" in printed and re.search("^beam ", printed, re.MULTILINE)
    assert not re.search("^refine +2 +0", printed, re.MULTILINE)
    code, _, err = run(*options)
    assert code == 0 and f"{out} goes on after 5 of 15 problems" in err and len(read_lines(out)) == 15


def test_an_evaluation_without_a_file_that_is_stopped_before_its_first_batch_prints_nothing(run):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 0, KeyboardInterrupt)
        code, printed, err = run()
    assert code == 130 and printed == "" and err.rstrip().endswith("after 0 of 3 problems (3 under way lost)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--style", "cot"], "begun with --style 'think', this is 'cot'; continue with the same, or give a new --out"),
        (["--seed", "5"], "begun with --seed 0, this is 5"),
        (["--window", "5", "--method", "vote-tail"], "begun with --window 32, this is 5"),
        (["--dtype", "bfloat16"], "begun with --dtype 'float32', this is 'bfloat16'"),
        (["--temperature", "0.5"], "begun with --temperature 1.0, this is 0.5"),
    ],
)
def test_other_arguments_do_not_continue_a_file(run, begun, options, message):
    path, argv = begun
    before = path.read_bytes()
    code, _, err = run(*argv, *options)
    assert code == 2 and re.search(message, err.splitlines()[-1]), err
    assert path.read_bytes() == before


def test_a_file_takes_in_other_methods_and_other_n_and_what_it_holds_is_not_made_again(run, tmp_path):
    """Also behind what somebody added to a whole file."""
    out, made = tmp_path / "out", ["samples-2"]
    (tmp_path / "alone").mkdir()
    ways = [["majority"], ["greedy,majority,beam"], ["beam,majority", "--compare"], ["majority", "--n", "4"]]
    for way, new in zip(ways, [[], ["greedy-1", "beam-2"], ["beam-1"], ["samples-4"]], strict=True):
        argv = ["--n", "2", "--method", *way]
        code, printed, err = run(*argv, "--out", out)
        made += new
        assert code == 0 and kinds(out) == made and len(read_lines(out)) == 3 * len(made), err
        alone = run(*argv, "--out", tmp_path / "alone" / str(len(made)))[1]
        assert [line.split()[:8] for line in printed.splitlines()] == [line.split()[:8] for line in alone.splitlines()]
    assert run("--n", "2", "--method", "majority", "--out", out)[2].endswith(f"{out} is finished\n")
    with out.open("ab") as file:
        file.write(b"a line of the user's own")
    assert run("--n", "2", "--method", "token-beam", "--out", out)[0] == 0
    assert kinds(out) == [*made, "token-beam-2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line.replace(b'"run"', b"'run'"), "line 2 is damaged (Expecting property name"),
        (lambda line: line.replace(b'"index": 1', b'"index": 2'), "line 2: problem 1 of samples-2 should stand here"),
    ],
)
def test_a_file_that_was_harmed_is_refused_by_its_line(run, tmp_path, change, message):
    out, argv = tmp_path / "out", ["--method", "majority", "--n", "2", "--out", tmp_path / "out"]
    assert run(*argv)[0] == 0
    first, second, *rest = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([first, change(second), *rest]))
    code, printed, err = run(*argv)
    assert code == 2 and printed == "" and message in err.splitlines()[-1], err


@pytest.fixture(scope="module")
def begun(run, folder):
    """A file that was begun with its arguments."""
    path = folder / "begun.jsonl"
    argv = ["--method", "majority", "--n", "2", "--out", path]
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 1, Killed)
        assert run(*argv, "--max-rows", "1")[0] is None and len(read_lines(path)) == 2
    return path, argv


def test_problems_or_examples_that_were_edited_do_not_continue_a_file(run, begun, folder, tmp_path):
    path, argv = begun
    edited, before = folder / "problems.jsonl", (folder / "problems.jsonl").read_bytes()
    for change in (dict(answer="#### 5"), dict(question="c?")):
        write_lines(edited, [*PROBLEMS[:2], PROBLEMS[2] | change])
        code, _, err = run(*argv)
        assert code == 2 and "was begun with problems" in err
    edited.write_bytes(before)
    examples, argv = tmp_path / "examples.jsonl", ["--examples", tmp_path / "examples.jsonl", "--out", tmp_path / "out"]
    write_lines(examples, [{"prompt": "d?", "completion": "4"}])
    assert run(*argv)[0] == 0
    write_lines(examples, [{"prompt": "d?", "completion": "5"}])
    code, _, err = run(*argv)
    assert code == 2 and "was begun with problems" in err


# ---- prompts


@pytest.fixture
def asked(run, folder, monkeypatch):
    """Run main() and return its result and the texts of the prompts."""
    tokenizer = Tokenizer.from_pretrained(folder / "model")

    def run_main(*argv):
        seen = []

        def watched(sampler, prompts, **options):
            seen.extend(map(tokenizer.decode, prompts))
            return GENERATE(sampler, prompts, **options)

        monkeypatch.setattr(Sampler, "generate", watched)
        return run(*argv, "--limit", "1"), seen

    return run_main


EXAMPLES = [{"prompt": "d?", "completion": r"Four. \boxed{4}"}, {"prompt": "e?", "completion": r"\boxed{5}"}]


def test_examples_are_turns_of_a_chat_or_paragraphs_before_the_question(asked, tmp_path):
    path = write_lines(tmp_path / "examples.jsonl", EXAMPLES)
    (code, _, err), (text,) = asked("--examples", path)
    assert code == 0, err
    turns = re.split(r"<\|(?:user|assistant)\|>", text)
    assert [turn.partition("\n\n")[0] for turn in turns] == ["", "d?", r"Four. \boxed{4}", "e?", r"\boxed{5}", "a?", ""]
    assert turns[1].partition("\n\n")[2] == turns[5].partition("\n\n")[2] != ""
    (code, _, _), (text,) = asked("--examples", path, "--raw")
    assert code == 0 and text == "d?\nFour. \\boxed{4}\n\ne?\n\\boxed{5}\n\na?"
    (code, _, _), (text,) = asked("--examples", path, "--method", "direct")
    assert code == 0 and "Four" not in text and r"<|assistant|>\boxed{4}<|user|>" in text


def test_the_style_decides_what_is_asked_for_and_what_counts_as_its_form(asked, tmp_path):
    wanted = {"think": ("Think first", 0.0), "cot": ("Think step by step", 1.0), "direct": ("Write only", 1.0)}
    for style, (words, form) in wanted.items():  # the model boxes its answer, and writes no tags
        (code, _, err), (text,) = asked("--style", style, "--out", tmp_path / style)
        assert code == 0 and words in text, err
        assert [answer["format"] for answer in read_lines(tmp_path / style)[0]["answers"]] == [form]


def test_a_stop_text_ends_samples(asked, tmp_path):
    (code, _, _), _ = asked("--stop-text", "{", "--out", tmp_path / "out")
    (row,) = read_lines(tmp_path / "out")
    assert code == 0 and row["answers"][0]["text"].endswith(r"\boxed{") and row["answers"][0]["finish"] == "stop"


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--method majorty --n 4", "there is no such method; choose of greedy, direct"),
        ("--method majority", "--method majority: of one answer there is nothing to choose; give --n 2 or more"),
        ("--method direct --template r1-zero", "template; this is r1-zero"),
        ("--method best-reward --n 2", "needs --reward-model FOLDER"),
        ("--method greedy,beam --stop-text x --n 4", "--stop-text ends samples, and not what --method"),
        ("--method majority --n 4 --temperature 0", "gives the same answer 4 times"),
        ("--method greedy --keep all --out x", "--method is for an evaluation"),
        ("--picture x.svg", "--picture is of --method or --compare"),
        ("--compare --n 2 --picture FOLDER/none/x.svg", "none/x.svg cannot be written (No such file"),
        ("--reward-model FOLDER/model", "holds a language model, which has no score"),
        ("--window 0", "--window is 0; it must be at least 1"),
        ("--keep-share 0", "--keep-share is 0.0; it must be above 0 and at most 1"),
        ("--min-thinking -1", "--min-thinking is -1; it must be at least 0"),
        ("--method beam --step-score reward", "--step-score reward needs --reward-model FOLDER"),
        ("--style terse", "--style"),
        ("--style cot --raw", "the style 'cot' is asked for in words"),
        ("--examples FOLDER/none.jsonl", "none.jsonl cannot be read (No such file or directory)"),
        ("--examples FOLDER/examples.jsonl", "examples.jsonl, line 2: expected a non-empty text 'completion'"),
        ("--examples FOLDER/good.jsonl --template r1-zero", "the template r1-zero takes no examples"),
        ("--data FOLDER/empty.jsonl", "empty.jsonl is empty; expected JSON lines"),
        ("--data FOLDER/no_answer.jsonl", "no_answer.jsonl, line 3: expected a non-empty text 'answer', found None"),
        ("--data FOLDER/no_mark.jsonl", "no_mark.jsonl, line 1: expected an 'answer' that ends in '#### NUMBER'"),
        ("--out FOLDER/none/out.jsonl", "cannot be written (No such file or directory)"),
    ],
)
def test_a_mistake_ends_with_one_sentence_and_exit_code_2(run, folder, options, said):
    write_lines(folder / "good.jsonl", EXAMPLES)
    write_lines(folder / "examples.jsonl", [EXAMPLES[0], {"prompt": "d?"}])
    (folder / "empty.jsonl").write_text("\n \n")
    write_lines(folder / "no_answer.jsonl", [*PROBLEMS[:2], {"question": "c?"}])
    write_lines(folder / "no_mark.jsonl", [{"question": "c?", "answer": "9"}])
    code, out, err = run(*options.replace("FOLDER", str(folder)).split())
    *_, last = err.splitlines()
    assert code == 2 and out == "" and "Traceback" not in err and last.startswith("error: ") and said in last, err
