"""The findings of the DeepSeek-R1 report (2501.12948), in miniature: what each way of training is worth.

    python tests/bench/findings.py run --seed 0 --out FOLDER     all runs of one seed, by the scripts of the repository
    python tests/bench/findings.py table --out FOLDER            the table over the seeds found there

Every run of a seed has the settings of the default run (`python train_zero.py`); rows differ in what they start from
and in the rewards. A run that is finished in the folder is not made again. The bases are taken from the cache, or
pretrained. Evaluation: 500 held-out problems, 4 samples each, temperature 1; intervals of 95% are over problems.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from anywhere, not installed

from nanor1.run.config import option, parse_args

ROOT = Path(__file__).parents[2]
BIG, SMALL = "miniature/countdown", "miniature/countdown-small"
ROWS = {  # of the table: (run, which of its evaluations)
    "base": ("zero", "before"),
    "1. pure RL": ("zero", "after"),
    "2. SFT on cold-start traces": ("sft-rl", "before"),
    "3. SFT + RL": ("sft-rl", "after"),
    "small base": ("small-zero", "before"),
    "4a. small: pure RL": ("small-zero", "after"),
    "4b. small: distilled": ("small-distilled", "after"),
    "5. small: distilled + RL": ("small-distilled-rl", "after"),
    "6. pure RL, language reward": ("language", "after"),
    "7. RL on random rewards": ("random", "after"),
}
LEARNED = {  # the runs whose training a row's model went through, besides what made its traces
    "1. pure RL": ["zero"], "2. SFT on cold-start traces": ["sft"], "3. SFT + RL": ["sft", "sft-rl"],
    "4a. small: pure RL": ["small-zero"], "4b. small: distilled": ["small-distilled"],
    "5. small: distilled + RL": ["small-distilled", "small-distilled-rl"], "6. pure RL, language reward": ["language"],
    "7. RL on random rewards": ["random"],
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    action: Literal["run", "table"] = option("run", "run or table", positional=True)
    out: str = option("runs/findings", "folder of all seeds' runs")
    seed: int = option(0, "run: of base, sampling and training")
    steps: int = option(0, "run: of each RL run; 0: the default run's")
    samples: int = option(4, "run: samples a problem of the evaluations")
    threads: int = option(0, "run: CPU threads, so that several seeds may run side by side; 0: torch's choice")


def main() -> None:
    config, _ = parse_args(Config, description=__doc__)
    if config.action == "table":
        print(table(Path(config.out)))
    else:
        run_all(config, Path(config.out).resolve() / f"seed{config.seed}")


def run_all(config: Config, folder: Path) -> None:
    """All runs of a seed, in the order in which they need each other."""
    folder.mkdir(parents=True, exist_ok=True)
    zero = ["train_zero.py", "--eval-samples", str(config.samples), "--eval-every", "0", "--save-every", "0"]
    zero += ["--steps", str(config.steps)] if config.steps else []
    one = lambda name, *command: make(config, folder, name, [*command, "--out", str(folder / name)])  # noqa: E731
    traces = str(folder / "cold-start.jsonl")
    one("zero", *zero, "--model", BIG)
    write_traces(config, folder / "zero", traces)
    one("sft", "train_sft.py", "--model", BIG, "--data", traces)
    one("sft-rl", *zero, "--model", str(folder / "sft"))
    one("small-zero", *zero, "--model", SMALL)
    distill = ["distill.py", "--model", SMALL, "--teacher", str(folder / "sft-rl"), "--trace-problems", "1500"]
    one("small-distilled", *distill, "--eval-samples", str(config.samples))
    one("small-distilled-rl", *zero, "--model", str(folder / "small-distilled"))
    one("language", *zero, "--model", BIG, "--rewards", "accuracy=1,format=0.1,language=0.2")
    one("random", *zero, "--model", BIG, "--rewards", "random=1")


def make(config: Config, folder: Path, name: str, command: list[str]) -> None:
    """Make one run, unless it is finished; resume it, if it was begun."""
    if (folder / name / "summary.json").exists():
        return
    if (folder / name / "config.json").exists():
        command = [command[0], "--resume", str(folder / name)]
    elif command[0] != "sample.py":
        command = [*command, "--seed", str(config.seed), "--threads", str(config.threads)]
    with (folder / f"{name}.log").open("a") as log:
        subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)


def write_traces(config: Config, model: Path, path: str) -> None:
    """A few hundred right and readable answers, as R1's cold start is written from R1-Zero's (section 2.3.1)."""
    if Path(f"{path}.s").exists():
        return
    start_s = time.monotonic()
    command = ["sample.py", "--model", str(model), "--task", "countdown", "--keep", "correct", "--out", path]
    command += ["--n", "4", "--limit", "250", "--max-per-problem", "2", "--max-new-tokens", "224", "--max-rows", "512"]
    command += ["--seed", str(config.seed), "--threads", str(config.threads)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    Path(f"{path}.s").write_text(f"{time.monotonic() - start_s:.1f}")


def table(folder: Path) -> str:
    """Means over the seeds, with each seed's accuracy and the widest of their intervals; seconds are of learning."""
    seeds = sorted(path for path in folder.glob("seed*") if path.is_dir())
    lines = [
        "| | accuracy, by seed | 95% | majority@4 | format | language, by seed | tokens | cut | seconds of training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (run, when) in ROWS.items():
        found = [json.loads(path.read_text())[when] for seed in seeds if (path := seed / run / "summary.json").exists()]
        if not found:
            continue
        mean = lambda key: statistics.mean(values[key] for values in found)  # noqa: E731, B023
        each = lambda key: ", ".join(f"{values[key]:.3f}" for values in found)  # noqa: E731, B023
        half = max(values["accuracy_high"] - values["accuracy_low"] for values in found) / 2
        majority = next(key for key in found[0] if key.startswith("majority"))
        seconds = [sum(map(learning_seconds, (seed / run for run in LEARNED.get(name, [])))) for seed in seeds]
        lines.append(
            f"| {name} | {each('accuracy')} | +- {half:.3f} | {mean(majority):.3f} | {mean('format'):.3f} | "
            f"{each('language')} | {mean('response_tokens'):.1f} | {mean('truncated'):.1%} | "
            f"{statistics.mean(seconds[: len(found)]):.0f} |"
        )
    return "\n".join(lines)


def learning_seconds(run: Path) -> float:
    """Of all steps of a run: sampling, judging and learning, without the evaluations."""
    metrics = run / "metrics.jsonl"
    rows = map(json.loads, metrics.read_text().splitlines()) if metrics.exists() else []
    return sum(row.get("step_s", 0.0) for row in rows)


if __name__ == "__main__":
    main()
