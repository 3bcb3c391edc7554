"""README's chain of commands, shrunken: each command's files are what the next one needs."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distill
import sample
import train_sft
import train_zero
from nanor1.miniature import MINIATURES
from nanor1.model import Transformer
from nanor1.run.checkpoint import model_folder
from nanor1.stages.reward_model import RewardModel
from nanor1.stages.sft import read_examples
from nanor1.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
SCRIPTS = {"train_zero.py": train_zero, "train_sft.py": train_sft, "distill.py": distill, "sample.py": sample}
SMALLER = {  # what makes a command short, by script; what stands last wins
    "train_zero.py": "--steps 2 --problems 8 --completions 8 --eval-problems 10 --eval-samples 2 --max-new-tokens 96",
    "train_sft.py": "--steps 4",
    "distill.py": "--steps 4 --trace-problems 60 --eval-problems 10 --eval-samples 2 --max-new-tokens 96",
    "sample.py": "--max-new-tokens 96",
}


def chain():
    """The commands of README's section, and the eleventh."""
    section = (ROOT / "README.md").read_text().split("## DeepSeek-R1 in ten commands")[1].split("\n## ")[0]
    return re.findall(r"^    (.+)$", section, re.MULTILINE)


def shrink(words):
    smaller = shlex.split(SMALLER[words[1]])
    if "--limit" in words:
        words = [*words, "--limit", "60"]
    return [*words, *smaller]


def run(command, monkeypatch):
    """A command of README, its scripts in this process; what is before the last `;` by the shell."""
    shell, _, python = command.rpartition("; ")
    if shell:
        subprocess.run(["bash", "-c", shell.replace("0 24", "0 4")], check=True)
    words = shrink(shlex.split(python))
    assert words[0] == "python"
    monkeypatch.setattr(sys, "argv", words[1:])
    SCRIPTS[words[1]].main()


def test_readmes_chain_is_ten_commands_and_one_more():
    commands = chain()
    assert len(commands) == 11
    assert [re.search(r"(\w+\.py)", command)[1] for command in commands].count("train_zero.py") == 3
    outs = [re.search(r"--out (\S+)", command)[1] for command in commands]
    for command in commands:
        for name in re.findall(r"runs/[\w.-]+", command):
            before = outs[: outs.index(re.search(r"--out (\S+)", command)[1]) + 1]
            assert name in before or f"> {name}" in command, f"{name} is not made before {command}"


@pytest.mark.slow
def test_a_shrunken_version_of_readmes_chain_runs_from_nothing_to_a_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOR1_CACHE", str(tmp_path / "cache"))
    for name in ("countdown", "countdown-small"):  # enough pretraining that some answers are right
        monkeypatch.setitem(MINIATURES, name, dataclasses.replace(MINIATURES[name], steps=250))
    Path("runs").mkdir()
    n_threads = torch.get_num_threads()
    try:
        for command in chain():
            run(command, monkeypatch)
    finally:
        torch.set_num_threads(n_threads)

    folders = [model_folder(f"runs/{name}") for name in ("zero", "cold-start", "reasoner", "sft", "r1", "student")]
    models = [Transformer.from_pretrained(folder) for folder in folders]
    assert len({model.head_weight_VC.sum().item() for model in models}) == len(models)
    assert RewardModel.from_pretrained(model_folder("runs/reward")).score.weight.any()
    tokenizer = Tokenizer.from_pretrained(folders[0])
    for name in ("cold-start", "reasoning", "general"):
        assert read_examples(f"runs/{name}.jsonl", tokenizer, 256).examples
    traces = [json.loads(line) for line in Path("runs/reasoning.jsonl").read_text().splitlines()]
    assert {row["parts"]["accuracy"] for row in traces} == {1.0}
    assert {row["model"] for row in traces} == {str(folders[2])}
    r1 = [json.loads(line) for line in Path("runs/r1/metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["preference"] < 1 for line in r1 if "reward" in line)
    for name in ("zero", "reasoner", "r1", "student"):
        assert json.loads(Path(f"runs/{name}/summary.json").read_text())["after"]["n"] == 10
