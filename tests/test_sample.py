"""sample.py: what it prints, what it measures, what it refuses."""

import contextlib
import io
import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import call_main, read_lines, rig, write_lines
from vocabularies import of_bytes, of_words

from nanor1.miniature import MINIATURES, make_tokenizer, miniature_task
from nanor1.model import Transformer
from nanor1.run.checkpoint import save_checkpoint
from nanor1.sampler import Sampler, generate
from nanor1.tokenizer import Tokenizer
from nanor1.weights import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
GENERATE = Sampler.generate  # tests put a wrapper in its place
sys.path.insert(0, str(ROOT))
import sample  # noqa: E402

ALL = ("--split", "all")  # of the problems, in the order of their file
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["<think>", "</think>", "<answer>", "</answer>", "1", "2", "3", "4", "+", "=", ":", "so", r"\boxed{3}", "go"]
NEXT = {"=": "<think>", "<think>": "so", "so": "</think>", "</think>": "<answer>", "<answer>": "3", "3": "</answer>"}
NEXT |= {"</answer>": "<end>", ":": r"\boxed{3}", r"\boxed{3}": "<end>", "go": "go"}
PROBLEMS = [  # the rigged model's answer: right and in form; wrong and in form; right, but not in form
    {"question": "1 + 2 =", "answer": "so #### 3"},
    {"question": "2 + 2 =", "answer": "so #### 4"},
    {"question": "1 + 2 :", "answer": "so #### 3"},
]


def new_model(vocab_size, width, context=256):
    torch.manual_seed(0)
    return Transformer(ModelConfig("llama", vocab_size, width, 8, 1, 1, 1, 8, context))


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """Random weights over bytes: answers are mostly broken UTF-8, and differ from seed to seed."""
    tokenizer = of_bytes(specials=["<|system|>", "<|user|>", "<|assistant|>"], chat_template=TEMPLATE)
    model = new_model(tokenizer.vocab_size, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return save(tmp_path_factory.mktemp("chat"), model, tokenizer)


def save_rigged(folder, tokenizer, following, context=256):
    """A model whose next word depends on the last one alone, as `following` says: the blocks add nothing."""
    model = new_model(tokenizer.vocab_size, tokenizer.vocab_size, context)
    logits = {tuple(map(tokenizer.token_id, words)): 30.0 for words in following.items()}
    return save(folder, rig(model, logits), tokenizer)


@pytest.fixture(scope="module")
def rigged_folder(tmp_path_factory):
    return save_rigged(tmp_path_factory.mktemp("rigged"), Tokenizer.from_words(WORDS, eos="<end>"), NEXT)


@pytest.fixture
def problem_file(tmp_path):
    return str(write_lines(tmp_path / "problems.jsonl", PROBLEMS))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run main() with these arguments; returns the exit code, stdout and stderr."""

    def run_main(*argv, stdin=b"", is_terminal=False):
        monkeypatch.setattr(sys, "argv", ["sample.py", *argv, "--device", "cpu"])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: is_terminal)
        try:
            sample.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run_main


def greedy(folder, prompt_ids, max_new_tokens):
    """The text that generate() makes of the prompt, the stop token left out."""
    model, tokenizer = Transformer.from_pretrained(folder, torch.float32), Tokenizer.from_pretrained(folder)
    ((completion,),) = generate(
        model, [prompt_ids], max_new_tokens=max_new_tokens, temperature=0.0, stop_ids=tokenizer.stop_ids
    )
    return tokenizer.decode(i for i in completion.ids if i not in tokenizer.stop_ids)


# ---- one prompt


def test_an_answer_is_printed_token_by_token_and_is_the_decoded_text(run, chat_folder, monkeypatch, capsys):
    tokenizer, printed, made = Tokenizer.from_pretrained(chat_folder), [""], []

    def watched(*arguments, on_token, **options):
        def hear(prompt, index, token):
            on_token(prompt, index, token)
            made.append(token)
            printed.append(printed[-1] + capsys.readouterr().out)

        return GENERATE(*arguments, on_token=hear, **options)

    monkeypatch.setattr(Sampler, "generate", watched)
    code, rest, _ = run("--model", chat_folder, "Hello", "--max-new-tokens", "40", "--temperature", "1.0")
    shown = [i for i in made if i not in tokenizer.stop_ids]
    assert code == 0 and len(shown) > 5
    assert printed[-1] + rest == tokenizer.decode(shown) + "\n"
    assert len(set(printed)) > 5  # it grew while the answer was being made


def test_a_chat_prompt_is_answered_as_generate_answers_the_rendered_template(run, chat_folder):
    tokenizer = Tokenizer.from_pretrained(chat_folder)
    for argv, text in [
        ([], "<|user|>Hello<|assistant|>"),
        (["--system", "Be brief."], "<|system|>Be brief.<|user|>Hello<|assistant|>"),
        (["--raw"], "Hello"),
    ]:
        code, out, _ = run("--model", chat_folder, "Hello", "--temperature", "0", "--max-new-tokens", "20", *argv)
        assert code == 0 and out == greedy(chat_folder, tokenizer.encode(text, allow_special=True), 20) + "\n"


def test_the_seed_decides_the_answer(run, chat_folder):
    def ask(seed):
        return run("--model", chat_folder, "Hello", "--temperature", "1", "--max-new-tokens", "30", "--seed", seed)[1]

    assert ask("1") == ask("1")
    assert ask("1") != ask("2")


def test_of_several_answers_each_is_printed_under_its_title(run, chat_folder):
    options = ["--model", chat_folder, "Hello", "--temperature", "1", "--max-new-tokens", "30"]
    _, one, _ = run(*options)
    code, out, err = run(*options, "--n", "3")
    parts = re.split(r"^--- answer (\d) of 3\n", out, flags=re.MULTILINE)
    assert code == 0 and parts[1::2] == ["1", "2", "3"] and len(set(parts[2::2])) == 3
    assert parts[2] == one
    assert "3 cut off" in err or "ended by" in err


@pytest.mark.parametrize(
    "prompt, options, text, ending",
    [
        ("1 + 2 =", [], "<think> so </think> <answer> 3 </answer>", "7 tokens in .* ended by <end>"),
        ("1 + 2 =", ["--stop-text", "</think>"], "<think> so </think>", "3 tokens in .* ended by --stop-text"),
        ("go", ["--max-new-tokens", "3"], "go go go", "3 tokens in .* cut off by --max-new-tokens 3"),
        ("go", [], " ".join(["go"] * 255), "255 tokens in .* cut off: the model's context of 256 is full"),
    ],
)
def test_the_last_line_on_stderr_says_why_the_answer_ended(run, rigged_folder, prompt, options, text, ending):
    code, out, err = run("--model", rigged_folder, prompt, *options)
    assert code == 0 and out == text + "\n"
    assert re.search(ending, err.splitlines()[-1])


def test_without_a_chat_template_the_prompt_is_taken_as_it_is_and_stderr_says_so(run, rigged_folder):
    code, out, err = run("--model", rigged_folder, stdin=b"1 + 2 :\n")
    assert code == 0 and out == "\\boxed{3}\n"
    assert "template: bare (the model has no chat template)" in err


def test_ctrl_c_ends_a_single_answer_with_130_and_keeps_what_was_printed(run, rigged_folder, monkeypatch):
    monkeypatch.setattr(Sampler, "generate", interrupted_after(2))
    code, out, err = run("--model", rigged_folder, "1 + 2 =")
    assert code == 130 and out == "<think> so\n" and "stopped by Ctrl-C" in err.splitlines()[-1]


def interrupted_after(n_tokens):
    def interrupted(*arguments, on_token, **options):
        left = iter(range(n_tokens - 1))

        def hear(*event):
            on_token(*event)
            if next(left, None) is None:
                raise KeyboardInterrupt

        return GENERATE(*arguments, on_token=hear, **options)

    return interrupted


# ---- a conversation


def test_a_conversation_shows_the_model_what_was_said_before(run, chat_folder, monkeypatch):
    typed = iter(["Hi", "More", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    options = ["--model", chat_folder, "--temperature", "0", "--max-new-tokens", "12"]
    code, out, _ = run(*options, is_terminal=True)
    tokenizer = Tokenizer.from_pretrained(chat_folder)
    first = greedy(chat_folder, tokenizer.encode("<|user|>Hi<|assistant|>", allow_special=True), 12)
    history = f"<|user|>Hi<|assistant|>{first}<|user|>More<|assistant|>"
    second = greedy(chat_folder, tokenizer.encode(history, allow_special=True), 12)
    assert code == 0 and out == f"{first}\n{second}\n"


class Terminal:
    """A program on a terminal of its own: type at it, wait for what it shows."""

    # Ctrl-C interrupts what is spawned, also where these tests run in the background, which a shell lets ignore it.
    SPAWN = (
        "import os, pty, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    )

    def __init__(self, *command):
        environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
        spawn = [sys.executable, "-c", self.SPAWN, *command]
        self.process = subprocess.Popen(spawn, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.unread = ""

    def wait_for(self, text, pressing="", patience_s=400):
        """Everything shown up to and with the text; a key is pressed, and again where nothing comes of it."""
        output, deadline_s = self.process.stdout, time.monotonic() + patience_s
        self.type(pressing)
        while text not in self.unread:
            assert time.monotonic() < deadline_s, f"waited for {text!r}: {self.unread}"
            if not select.select([output], [], [], 10)[0]:
                self.type(pressing)
                continue
            chunk = os.read(output.fileno(), 65536)
            assert chunk, f"it ended, and {text!r} was not shown: {self.unread}"
            self.unread += chunk.decode(errors="replace").replace("\r\n", "\n")
        shown, _, self.unread = self.unread.partition(text)
        return shown + text

    def type(self, text):
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def close(self):
        self.process.kill()
        self.process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_on_a_terminal_ctrl_c_stops_an_answer_lines_are_edited_and_thinking_is_dimmed(tmp_path):
    tokenizer = Tokenizer.from_words(WORDS, eos="<end>")
    folder = save_rigged(tmp_path / "model", tokenizer, NEXT, context=100_000)
    options = ["--max-new-tokens", "99000", "--dtype", "float32", "--device", "cpu"]
    with contextlib.closing(Terminal(sys.executable, str(ROOT / "sample.py"), "--model", folder, *options)) as terminal:
        assert "Ctrl-C stops an answer" in terminal.wait_for("\n> ")
        terminal.type("go\n")
        terminal.wait_for("go go go go go")
        terminal.type("\x03")
        assert "stopped by Ctrl-C" in terminal.wait_for("\n> ")
        terminal.type("1 + 2 so\x08\x08=\n")  # backspace twice
        answer = terminal.wait_for("ended by <end>")
        assert "\x1b[2m<think> so </think>\x1b[0m <answer> 3 </answer>\n7 tokens in " in answer
        terminal.wait_for("\n> ")
        # Python's readline sleeps through a signal that comes between its prompt and its first look at the keyboard.
        terminal.wait_for("(an empty line or Ctrl-D ends)\n\n> ", pressing="\x03")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=400) == 0


# ---- arguments of the chat template

TELLING = (
    "{% if loud %}<|system|>{{ tone | default('plain') }}{% endif %}{% for message in messages %}"
    "{{ message.content }}{% endfor %}<|assistant|>"
)
LOUD, SHOWN = {"loud": True, "tone": "é"}, "<|system|>éHi"


@pytest.fixture
def told(run, tmp_path, chat_folder, monkeypatch):
    """Run main() on a model whose template can be told `loud` and `tone`; returns its result and the prompts' texts."""
    tokenizer = of_bytes(specials=["<|system|>", "<|user|>", "<|assistant|>"], chat_template=TELLING)
    folder = save(tmp_path / "told", Transformer.from_pretrained(chat_folder, torch.float32), tokenizer)

    def run_main(*argv):
        seen = []

        def watched(sampler, prompts, **options):
            seen.extend(map(tokenizer.decode, prompts))
            return GENERATE(sampler, prompts, **options)

        monkeypatch.setattr(Sampler, "generate", watched)
        return run("--model", folder, "--max-new-tokens", "4", *argv), seen

    return run_main


@pytest.mark.parametrize("way", ["talk", "task", "keep", "prompts"])
def test_the_chat_template_is_told_its_arguments_wherever_it_is_used(told, tmp_path, way):
    prompts, problems = tmp_path / "prompts.jsonl", tmp_path / "problems.jsonl"
    prompts.write_text('{"prompt": "Hi"}\n')
    problems.write_text('{"question": "Hi", "answer": "#### 3"}\n')
    task = ["--task", "gsm8k", *ALL, "--data", str(problems)]
    keep = [*task, "--keep", "all"]
    options = {"talk": ["Hi"], "task": task, "keep": keep, "prompts": ["--prompts", str(prompts)]}[way]
    for name, arguments, start in [("a", {}, "Hi"), ("b", {"loud": 1}, "<|system|>plainHi"), ("c", LOUD, SHOWN)]:
        out = ["--out", str(tmp_path / name)] if way in ("keep", "prompts") else []
        (code, _, err), (seen,) = told(*options, *out, "--template-args", json.dumps(arguments))
        assert code == 0 and seen.startswith(start), err


def test_what_a_template_can_be_told_are_the_variables_it_reads_and_is_not_given_anyway():
    template = "{{ bos_token }}{% for m in messages %}{% set text = m.content %}{{ text + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt and strftime_now(form) %}{{ raise_exception(tone.name) }}{% endif %}"
    tokenizer = of_bytes(chat_template=template)
    assert tokenizer.template_parameters == {"bos_token", "form", "tone"}  # this vocabulary has no bos_token
    assert of_bytes().template_parameters == set()
    with pytest.raises(ValueError, match="the chat template cannot be read"):
        of_bytes(chat_template="{% if %}").template_parameters  # noqa: B018


def test_training_text_is_continued_with_the_same_template_arguments_however_they_are_spelled(told, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", str(tmp_path / "out.jsonl")
    prompts.write_text('{"prompt": "Hi"}\n')
    options = ["--prompts", str(prompts), "--out", out, "--template-args"]
    assert told(*options, json.dumps(LOUD))[0][0] == 0
    (code, _, err), _ = told(*options, json.dumps(dict(reversed(LOUD.items())), indent=1))
    assert code == 0 and f"{out} is finished" in err
    (code, _, err), _ = told(*options, '{"loud": true}')
    assert code == 2 and "was begun with --template-args {'loud': True, 'tone': 'é'}, this is {'loud': True}" in err


# ---- evaluation


def test_an_evaluation_counts_what_the_rigged_model_must_score(run, rigged_folder, problem_file):
    options = ["--task", "gsm8k", "--data", problem_file, *ALL, "--template", "bare"]
    code, out, _ = run("--model", rigged_folder, *options)
    assert code == 0
    for line in [
        "gsm8k: 3 problems x 1, template bare, greedy",
        r"accuracy +0.667   95%: 0.208 to 0.939 \(n=3\)",  # Wilson's interval of 2 of 3
        "strict +0.333",
        "format +0.667",
        "cut off +0.000",
        "tokens/problem +5.3 +95% of the problems: at most 7",  # 7, 7 and 2 tokens
    ]:
        assert re.search(f"^{line}", out, re.MULTILINE), out


def test_an_evaluation_shows_the_language_only_where_an_answer_leaves_it(run, tmp_path, rigged_folder):
    words = {"<think>": "等", "等": "</think>", "=": "<think>", "</think>": "<answer>", "<answer>": "3"}
    words |= {"3": "</answer>", "</answer>": "<end>", ":": "</answer>"}
    folder = save_rigged(tmp_path / "mixed", Tokenizer.from_words([*WORDS, "等"], eos="<end>"), words)
    data = tmp_path / "problems.jsonl"
    data.write_text('{"question": "go so go =", "answer": "#### 3"}\n{"question": "go so go :", "answer": "#### 3"}\n')
    options = ["--task", "gsm8k", "--data", str(data), *ALL, "--template", "bare"]
    _, out, _ = run("--model", folder, *options)
    assert re.search("^language +0.500 ", out, re.MULTILINE)
    assert "language" not in run("--model", rigged_folder, *options)[1]


def test_an_answer_cut_off_by_the_limit_is_counted_and_is_wrong(run, rigged_folder, problem_file):
    options = ["--task", "gsm8k", "--data", problem_file, *ALL, "--template", "bare", "--max-new-tokens", "6"]
    code, out, _ = run("--model", rigged_folder, *options)
    assert code == 0 and re.search("^accuracy +0.333", out, re.MULTILINE)  # only the \boxed{3} of two tokens is left
    assert re.search("^cut off +0.667", out, re.MULTILINE)


def test_out_holds_a_line_a_problem_in_the_order_of_the_file(run, rigged_folder, problem_file, tmp_path):
    out_file = tmp_path / "answers.jsonl"
    options = ["--task", "gsm8k", "--data", problem_file, *ALL, "--template", "bare", "--n", "2", "--max-rows", "1"]
    code, out, _ = run("--model", rigged_folder, *options, "--out", str(out_file))
    rows = read_lines(out_file)
    assert code == 0 and "3 problems x 2, template bare, temperature 1," in out
    assert [(row["index"], row["prompt"], row["gold"]) for row in rows] == [
        (0, "1 + 2 =", "3"),
        (1, "2 + 2 =", "4"),
        (2, "1 + 2 :", "3"),
    ]
    in_form = {"text": "<think> so </think> <answer> 3 </answer>", "answer": "3", "format": 1.0}
    in_form |= {"tokens": 7, "finish": "stop", "language": 1.0}
    boxed = {"text": r"\boxed{3}", "answer": "3", "accuracy": 1.0, "format": 0.0, "tokens": 2, "finish": "stop"}
    chosen_by = {"logprob", "score", "tail", "lowest"}  # as sure as a model can be
    expected = [in_form | {"accuracy": 1.0}, in_form | {"accuracy": 0.0}, boxed]
    for row, answer in zip(rows, expected, strict=True):
        assert row["run"] == "samples-2" and row["sampled"] == 2 * answer["tokens"] and row["read"] == 4
        for given in row["answers"]:
            assert given == given | answer and given.keys() == answer.keys() | {"language"} | chosen_by
            assert given["logprob"] == pytest.approx(0, abs=1e-3)


def test_the_seed_decides_sampled_evaluations_and_batches_draw_different_numbers(run, chat_folder, tmp_path):
    data = tmp_path / "same.jsonl"
    data.write_text('{"question": "Same?", "answer": "#### 1"}\n' * 8)

    def texts(name, *options):
        task = ["--task", "gsm8k", "--data", str(data), *ALL, "--temperature", "1", "--max-new-tokens", "16"]
        out = ["--max-rows", "1", "--out", str(tmp_path / name)]
        code, _, err = run("--model", chat_folder, *task, *out, *options)
        assert code == 0, err
        return [row["answers"][0]["text"] for row in read_lines(tmp_path / name)]

    first = texts("a")
    assert first == texts("b") and first != texts("c", "--seed", "1")
    assert len(set(first)) == 8  # two batches of four problems


def test_a_miniature_is_known_by_its_vocabulary_and_gets_its_own_held_out_problems(run, tmp_path):
    miniature = MINIATURES["arithmetic"]
    folder = save_rigged(tmp_path / "mini", make_tokenizer(miniature), {"=": "7", "7": "<end>"})
    code, out, err = run("--model", folder, "--task", "arithmetic", "--limit", "20", "--out", str(tmp_path / "o"))
    rows = read_lines(tmp_path / "o")
    problems = miniature_task(miniature).held_out(20)
    assert code == 0 and [row["prompt"] for row in rows] == [problem.prompt for problem in problems]
    n_right = sum(problem.answer == "7" for problem in problems)
    assert re.search(f"^accuracy +{n_right / 20:.3f}", out, re.MULTILINE)

    code, _, err = run("--model", folder, "--task", "countdown")
    assert code == 2 and "give --task arithmetic" in err


def test_several_samples_are_reported_by_pass_and_majority_of_1_2_4_and_all(run, rigged_folder, problem_file):
    options = ["--task", "gsm8k", "--data", problem_file, *ALL, "--template", "bare", "--n", "6"]
    code, out, _ = run("--model", rigged_folder, *options)
    assert code == 0 and "3 problems x 6, template bare, temperature 1, seed 0" in out
    for name in ("pass@", "majority@"):  # all samples of a problem are the same
        assert re.search(rf"^{name} +0.667  0.667  0.667  0.667   of 1, 2, 4, 6$", out, re.MULTILINE), out
    assert re.search(r"^tokens/problem +32.0 +95% of the problems: at most 42$", out, re.MULTILINE)


# ---- training text


def test_rejection_sampling_keeps_right_answers_in_form_and_says_what_it_dropped(
    run, rigged_folder, problem_file, tmp_path
):
    out_file = str(tmp_path / "traces.jsonl")
    options = ["--task", "gsm8k", "--data", problem_file, *ALL, "--template", "bare", "--n", "3"]
    code, out, err = run("--model", rigged_folder, *options, "--keep", "correct", "--out", out_file)
    (line,) = read_lines(out_file)
    assert code == 0 and "problems: 3 - 3 problems of problems.jsonl, all of them" in err
    assert line["split"] == "all"
    assert (line["prompt"], line["completion"]) == ("1 + 2 =", "<think> so </think> <answer> 3 </answer>")
    assert (line["model"], line["step"], line["seed"]) == (rigged_folder, None, 0)
    assert (line["problem"], line["sample"], line["tokens"]) == (0, 0, 7)
    table = [re.match(r"([\w -]+?)  +(\d+) ", row).groups() for row in out.splitlines()]
    assert table == [
        ("sampled", "9"),
        ("right", "6"),
        ("- wrong", "3"),
        ("- format", "3"),
        ("- duplicate", "2"),
        ("kept", "1"),
    ]

    code, again, err = run("--model", rigged_folder, *options, "--keep", "correct", "--out", out_file)
    assert code == 0 and again == out and f"{out_file} is finished" in err and read_lines(out_file) == [line]

    boxed = str(tmp_path / "boxed.jsonl")
    code, _, _ = run("--model", rigged_folder, *options, "--keep", "correct", "--any-format", "--out", boxed)
    assert code == 0 and [row["completion"] for row in read_lines(boxed)] == [line["completion"], r"\boxed{3}"]


def test_generated_problems_of_training_text_are_never_held_out_and_the_checkpoint_is_named(run, tmp_path):
    miniature, out_file = MINIATURES["arithmetic"], str(tmp_path / "all.jsonl")
    source = save_rigged(tmp_path / "mini", make_tokenizer(miniature), {"=": "7", "7": "<end>"})
    model, tokenizer = Transformer.from_pretrained(source, torch.float32), Tokenizer.from_pretrained(source)

    def write_model(folder):
        save(folder, model, tokenizer)

    for step in (20, 40):
        folder = save_checkpoint(
            tmp_path / "run" / "checkpoints", step, write_model=write_model, tensors={"x": torch.zeros(1)}, state={}
        )
    options = ["--model", str(tmp_path / "run"), "--task", "arithmetic", "--seed", "3"]
    code, _, err = run(*options, "--limit", "50", "--keep", "all", "--out", out_file)
    made, held_out = read_lines(out_file), {problem.prompt for problem in miniature_task(miniature).held_out(2000)}
    assert (
        code == 0 and f"model: {folder};" in err and "problems: 50 - generated, none of the held-out instances" in err
    )
    assert [row["prompt"] for row in made] == [p.prompt for p in miniature_task(miniature).sample(50, 3, 0)]
    assert not held_out & {row["prompt"] for row in made}
    assert {(row["model"], row["step"], row["seed"], row["completion"]) for row in made} == {(str(folder), 40, 3, "7")}
    assert {row["parts"]["accuracy"] for row in made} == {0.0, 1.0}

    code, _, err = run(*options, "--limit", "60", "--keep", "all", "--out", out_file)
    assert code == 2 and "was begun with --limit 50, this is 60" in err


def test_prompts_are_answered_without_being_judged_and_cut_answers_left_out(run, tmp_path):
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    folder = save_rigged(tmp_path / "chat", of_words(WORDS, eos="<end>", chat_template=template), NEXT)
    prompts, out_file = tmp_path / "prompts.jsonl", str(tmp_path / "out.jsonl")
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "="}]
    rows = [{"prompt": "1 + 2 :"}, {"prompt": "go"}, {"messages": chat}]
    write_lines(prompts, rows)
    options = ["--model", folder, "--prompts", str(prompts), "--max-new-tokens", "9", "--seed", "5"]
    code, out, _ = run(*options, "--out", out_file)
    boxed = {"role": "assistant", "content": r"\boxed{3}"}
    thought = {"role": "assistant", "content": "<think> so </think> <answer> 3 </answer>"}
    source = {"model": folder, "step": None, "seed": 5, "sample": 0}
    assert code == 0 and read_lines(out_file) == [
        {"messages": [{"role": "user", "content": "1 + 2 :"}, boxed], "problem": 0} | source | {"tokens": 2},
        {"messages": [*chat, thought], "problem": 2} | source | {"tokens": 7},
    ]
    assert re.search(r"^sampled +3 +for 3 of 3 problems\n- cut off +1 .*\nkept +2 +of 2 problems$", out, re.MULTILINE)

    code, _, err = run(*options, "--raw", "--out", str(tmp_path / "raw.jsonl"))
    assert code == 2 and f"{prompts}, line 3: 'messages' need the template chat, and this is bare" in err


def test_pairs_are_written_from_the_command_line(run, rigged_folder, tmp_path):
    data, out_file = tmp_path / "problems.jsonl", str(tmp_path / "pairs.jsonl")
    data.write_text('{"question": "1 + 2 :", "answer": "#### 3"}\n')
    hot = ["--temperature", "40", "--seed", "1", "--n", "64", "--any-format", "--max-per-problem", "2"]
    options = ["--task", "gsm8k", "--data", str(data), *ALL, "--template", "bare", *hot, "--max-new-tokens", "12"]
    code, out, err = run("--model", rigged_folder, *options, "--keep", "pairs", "--out", out_file)
    assert code == 0, err
    assert len(read_lines(out_file)) == 2 and re.search("^pairs +2 +of 1 problems$", out, re.MULTILINE)
    for row in read_lines(out_file):
        assert row["prompt"] == "1 + 2 :" and "3" in row["chosen"] and row["chosen"] != row["rejected"]


def test_ctrl_c_in_rejection_sampling_ends_with_130_and_the_same_command_goes_on(
    run, rigged_folder, problem_file, tmp_path, monkeypatch
):
    calls, out_file = iter([True, True]), str(tmp_path / "traces.jsonl")

    def interrupted(*arguments, **options):
        if next(calls, None):
            return GENERATE(*arguments, **options)
        raise KeyboardInterrupt

    options = ["--model", rigged_folder, "--task", "gsm8k", "--data", problem_file, *ALL, "--template", "bare"]
    options += ["--keep", "all", "--out", out_file, "--n", "4", "--max-rows", "1"]  # a problem a batch
    monkeypatch.setattr(Sampler, "generate", interrupted)
    code, out, err = run(*options)
    assert code == 130 and "stopped by Ctrl-C after 2 of 3 problems" in err and "sampled" in out
    monkeypatch.setattr(Sampler, "generate", GENERATE)
    code, _, err = run(*options)
    assert code == 0 and f"{out_file} goes on after 2 of 3 problems" in err
    assert [row["problem"] for row in read_lines(out_file)] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


# ---- errors

THERE = "good.jsonl is there already, without good.jsonl.progress.json to continue it"


@pytest.mark.parametrize(
    "argv, message",
    [
        ("hi", "--model is required"),
        ("CHAT hi --tempurature 1", "did you mean --temperature"),
        ("CHAT hi --temperature -1", "--temperature is -1.0; it must be at least 0"),
        ("CHAT hi --top-p 0", "--top-p is 0.0"),
        ("CHAT hi --n 2 --temperature 0", "the same answer 2 times"),
        ("CHAT hi --raw --template chat", "--raw means --template bare"),
        ("CHAT hi --task countdown", "the prompt is not for --task"),
        ("CHAT hi --out x", "--out is for an evaluation: add --task"),
        ("CHAT --task gsm8k", "--task gsm8k needs --data FILE"),
        ("CHAT --task code", "--task code needs --data FILE"),
        ("CHAT --task arithmetic --data x", "task is generated; leave data and eval_data out"),
        ("CHAT --task gsm8k --data MISSING", "cannot be read"),
        ("CHAT --task gsm8k --data BROKEN", "broken.jsonl, line 2: expected one JSON object"),
        ("CHAT --task gsm8k --split all --data LONG", "problem 2 is .* tokens; the model's context is 256"),
        ("CHAT --task gsm8k --split all --data GOOD --out GOOD", THERE),
        ("MISSING hi", "no folder"),
        ("miniature/chess hi", "there is no model miniature/chess"),
        ("CHAT --keep all hi", "--keep is for an evaluation: add --task"),
        ("CHAT --task gsm8k --data GOOD --keep correct", "--keep needs --out FILE"),
        ("CHAT --task gsm8k --data GOOD --keep pairs --out x", "needs several answers to a problem; give --n 16"),
        ("CHAT --task gsm8k --data GOOD --keep all --out GOOD", THERE),
        ("CHAT --task gsm8k --data GOOD --any-format", "--any-format is for --keep correct"),
        ("CHAT --prompts GOOD", "--prompts needs --out FILE"),
        ("CHAT --prompts GOOD --task countdown", "--prompts takes the place of --task"),
        ("CHAT --prompts GOOD --data GOOD", "--data is not for --prompts"),
        ("CHAT --prompts GOOD --keep correct --out x", "--keep correct needs --task"),
        ("CHAT --prompts GOOD --out MISSING", "good.jsonl, line 1: expected a text 'prompt'"),
        ("CHAT hi --compare", "--compare is for an evaluation: add --task, and leave --keep out"),
        ("CHAT hi --window 5", "--window is for an evaluation: add --task, and leave --keep out"),
        ("CHAT hi --fields a=b", "--fields is for an evaluation: add --task"),
        ("CHAT --prompts GOOD --style cot", "--style is not for --prompts, which are the"),
        ("CHAT --prompts GOOD hi", "the prompt is not for --prompts"),
        ("CHAT --task countdown --window 5", "--window is of --method vote-tail or vote-lowest"),
        ("CHAT --task countdown --method beam --max-answer 5", "is of --method budget"),
        ("CHAT --task countdown --method budget --wait-text so", "give --n 2 or more"),
        ("CHAT --task countdown --compare", "--compare looks at N = 1, 2, 4 ... --n: give --n 2"),
        ("CHAT hi --temperature 0 --top-k 5", "--top-k has no effect without --temperature"),
        ("CHAT hi --paired a,b", "--model is not for --paired"),
        ("--paired a,b,c", "--paired a,b,c: expected two files, BEFORE,AFTER"),
        ("CHAT hi --device gpu9", "--device gpu9 is not to be had here"),
        (["CHAT", "x" * 300], "the prompt is .* tokens; the model's context is 256: shorten it"),
        (["CHAT", " "], "the prompt is empty"),
        ("CHAT", "the prompt is empty"),  # stdin is no terminal, and holds nothing
        ("RIGGED hi", "the word 'hi' is not in this vocabulary"),
        ("RIGGED go --template chat", "has no chat template"),
        ("RIGGED go --system so", "--system needs the template chat"),
        (["CHAT", "hi", "--template-args", "{'loud': true}"], "--template-args .* are no JSON object"),
        (["RIGGED", "go", "--template-args", '{"loud": 1}'], "--template-args needs the template chat"),
        (
            ["CHAT", "hi", "--raw", "--template-args", '{"loud": 1}'],
            "--template-args needs the template chat, and this is bare",
        ),
    ],
)
def test_a_mistake_ends_with_one_sentence_and_exit_code_2(
    monkeypatch, tmp_path, chat_folder, rigged_folder, argv, message
):
    good = '{"question": "1 + 2", "answer": "#### 3"}\n'
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "broken.jsonl").write_text(good + "{oops\n")
    (tmp_path / "long.jsonl").write_text(good + good.replace("1 + 2", "1 + 2 " * 50))
    paths = {name.upper(): str(tmp_path / f"{name}.jsonl") for name in ("good", "broken", "long", "missing")}
    paths |= {"CHAT": chat_folder, "RIGGED": rigged_folder}
    words = [paths.get(word, word) for word in (argv.split() if isinstance(argv, str) else argv)]
    model = [] if words[0] in ("hi", "--paired") else ["--model"]
    short = ["--template", "bare"] if "--task" in argv else []
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    code, out, err = call_main(sample, [*model, *words, *short])
    last = err.splitlines()[-1]
    assert code == 2 and out == "" and "Traceback" not in err
    assert last.startswith("error: ") and re.search(message, last), err


def test_the_script_refuses_a_prompt_from_a_pipe_that_is_no_text(rigged_folder):
    command = [sys.executable, str(ROOT / "sample.py"), "--model", rigged_folder]
    done = subprocess.run(command, input=b"\xff\xfe\n", capture_output=True, timeout=120)
    assert done.returncode == 2 and done.stdout == b"" and done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"error: the prompt on stdin is not UTF-8 text")


# ---- a real model


@pytest.mark.model
def test_a_real_chat_model_names_the_capital_of_france_as_generate_does(run):
    folder = Path(os.environ.get("NANOR1_MODELS", "")) / "smollm2-135m"
    if "NANOR1_MODELS" not in os.environ or not folder.is_dir():
        pytest.skip("NANOR1_MODELS names no folder with smollm2-135m")
    question, tokenizer = "What is the capital of France?", Tokenizer.from_pretrained(folder)
    options = ["--temperature", "0", "--max-new-tokens", "24"]
    # in bf16 the first two candidates, 0.1 nat apart, may change places: in transformers' bf16, too
    code, out, err = run("--model", str(folder), question, *options, "--dtype", "float32")
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    assert code == 0 and out == greedy(folder, tokenizer.encode(text, allow_special=True), 24) + "\n"
    assert "Paris" in out and "<|im_end|>" not in out
