"""One short run on a GPU, in parts, the most valuable first; one that fails stops no other. Needs no installation.

    bash tests/bench/gpu.sh first             is everything right, and how fast is it
    bash tests/bench/gpu.sh second            sizes of tiles, attention again, where the time of a row's decoding goes
    bash tests/bench/gpu.sh train             reinforcement learning of the model folder $MODEL on GSM8K's published
                                              files $DATA (train) and $EVAL_DATA (test), within a time
    bash tests/bench/gpu.sh first decode      some parts alone
    bash tests/bench/gpu.sh first --plan      say what would run
    TINY=1 bash tests/bench/gpu.sh first      everything small, on a CPU: does it run?

$OUT (runs/gpu) gets summary.txt, log.txt and results.jsonl: a line of each part, then the lines that it printed itself.
`train` adds the run's metrics.jsonl and rollouts.jsonl, the judged answers before.jsonl and after.jsonl, and
summary.json with accuracies, intervals and the paired difference; $TRAIN_ARGS are further options of train_zero.py.
$DEADLINE are other seconds for the whole. The exit code is 0 where that of each part is.
"""

import argparse
import atexit
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
START_S = time.monotonic()
TINY = bool(os.environ.get("TINY"))
N_PROCESSES = 8  # that run the kernels' tests
LEAST_S = 10  # with less time a part does not begin
SAVE_S = 60  # after which learning that was asked to stop has finished its step and saved, on a slow disk too
LOG_BYTES = 200_000  # of a part's log that are kept: its end


class Part(NamedTuple):
    name: str
    limit_s: int
    is_kept: bool = False  # this time is there for it, however long those before it take


PLANS = {  # seconds of the whole, and of each part at most
    "first": (
        430,
        [
            Part("kernels", 90), Part("smoke", 95), Part("attention", 60), Part("rollouts", 95), Part("train-1.5b", 75),
            Part("train-0.5b", 60), Part("context", 50), Part("decode", 60), Part("profile-train", 50),
            Part("profile-decode256", 45), Part("logprobs", 40),
        ],
    ),
    "second": (
        200,
        [
            Part("sweep-128", 75), Part("sweep-64", 60), Part("attention", 45, True),
            Part("profile-decode1", 35, True),
        ],
    ),
    "train": (570, [Part("before", 75, True), Part("learn", 480), Part("after", 75, True), Part("compare", 15, True)]),
}  # fmt: skip
UNTIMED = ("kernels", "smoke")  # they come first, and programs are compiled beside them for the others
WRITTEN = ("before.jsonl", "after.jsonl", "summary.json", "zero/metrics.jsonl", "zero/rollouts.jsonl")


def main() -> None:
    args = parse_args()
    deadline_s, parts = PLANS[args.run]
    parts = [part for part in parts if not args.parts or part.name in args.parts]
    stretch = 5 if TINY else 1  # a machine that only looks whether everything runs may be busy
    deadline_s = int(os.environ.get("DEADLINE", deadline_s)) * stretch
    parts = [part._replace(limit_s=part.limit_s * stretch) for part in parts]
    if args.plan:
        print(f"{args.run}: {deadline_s} s")
        for part in parts:
            print(f"{part.name}, {part.limit_s} s: {shlex.join(command_of(part.name, Path('FOLDER')))}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        report = Report(Path(os.environ.get("OUT", "runs/gpu")).resolve(), args.run)
        if args.run == "train":
            find_model(Path(folder))
        run_all(parts, deadline_s, Path(folder), report)
    print("\n" + (report.out / "summary.txt").read_text())
    sys.exit(1 if report.has_failed else 0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=PLANS)
    parser.add_argument("parts", nargs="*", help="these alone")
    parser.add_argument("--plan", action="store_true", help="say what would run")
    args = parser.parse_args()
    known = [part.name for part in PLANS[args.run][1]]
    if unknown := set(args.parts) - set(known):
        parser.error(f"{args.run} has no part {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    return args


# ---- what is run


def command_of(name: str, folder: Path) -> list[str]:
    """The command of a part, to be run in the root of the repository; `folder` is for what `train` writes."""
    kind, _, what = name.partition("-")
    device = ["--device", "cpu" if TINY else "cuda"]
    quick = [*device, *if_tiny("--quick")]
    rounds = ["--repeats", "7", *device, *if_tiny("--tiny")]  # of attention
    problems = ["--task", "gsm8k", "--max-new-tokens", size("512", "16"), "--max-rows", "512", *device]
    shape = {"rollouts": "qwen2.5-0.5b", "context": "qwen2.5-1.5b", "decode": "qwen2.5-7b", "train": f"qwen2.5-{what}"}
    one_shape = ["--shapes", size(shape.get(kind, ""), "tiny"), *quick]
    match kind:
        case "kernels":
            words = kernel_tests()
        case "smoke" | "prewarm":
            words = ["tests/bench/gpu_parts.py", kind, *quick]
        case "profile":
            words = ["tests/bench/gpu_parts.py", "profile", what, *quick]
        case "attention":
            words = ["tests/bench/bench_attention.py", "--only", size("", "1.5B 2048 r"), *rounds]
        case "sweep":
            kernels = ["forward", "dkdv", "dq", *(["decode"] if what == "128" else [])]  # which is swept at 128 alone
            words = ["tests/bench/bench_attention.py", "--sweep", *kernels, "--width", what, *rounds]
        case "rollouts":
            words = ["tests/bench/bench_sampler.py", "--parts", kind, "--peers", "--lengths", "ragged", *one_shape]
            words += ["--repeats", "1", "--limit", size("768", "8")]
        case "context" | "decode":
            words = ["tests/bench/bench_sampler.py", "--parts", kind, "--peers", "--repeats", "2", *one_shape]
        case "train":
            words = ["tests/bench/bench_train_step.py", "--cases", "sft", "--checkpointing", "off", *one_shape]
            words += ["--repeats", "3", *if_tiny("--no-compile")]
        case "logprobs":
            words = ["tests/bench/bench_logprobs.py", "--repeats", "2", *if_tiny("--shape", "64", "32", "512")]
        case "before" | "after":
            words = ["sample.py", "--model", variable("MODEL") if kind == "before" else str(folder / "zero"), *problems]
            words += ["--eval-data", variable("EVAL_DATA"), "--limit", size("800", "4")]
            words += ["--out", f"{folder}/{kind}.jsonl"]
        case "learn":
            words = ["train_zero.py", *learning(), "--out", str(folder / "zero"), *problems]
            words += shlex.split(os.environ.get("TRAIN_ARGS", ""))
        case "compare":
            words = ["tests/bench/gpu_parts.py", kind, str(folder)]
    return [sys.executable, *words]


def size(on_a_gpu: str, tiny: str) -> str:
    return tiny if TINY else on_a_gpu


def if_tiny(*words: str) -> tuple[str, ...]:
    return words if TINY else ()


def variable(name: str) -> str:
    return os.environ.get(name, f"${name}")


def kernel_tests() -> list[str]:
    """pytest's arguments: what runs in bf16, in several processes where there is pytest-xdist; without CUDA a list."""
    words = ["-m", "pytest", "-o", "addopts=", "--noconftest", "-p", "no:cacheprovider", "-q", "--tb=short"]
    words += ["tests/test_kernels.py", "-m", "gpu", "-k", "bf16 or decode or graph or same or refused"]
    if TINY:
        return [*words, "--collect-only"]
    has_processes = importlib.util.find_spec("xdist") is not None  # slower without, and said by the command in log.txt
    return [*words, "--maxfail", "10", *(["-n", str(N_PROCESSES), "--dist", "load"] if has_processes else [])]


def learning() -> list[str]:
    """train_zero.py's options: it ends when it is asked to, and evaluations stand before and behind it."""
    words = ["--model", variable("MODEL"), "--data", variable("DATA"), "--eval-data", variable("EVAL_DATA")]
    words += ["--steps", size("100000", "3"), "--problems", size("64", "2"), "--completions", size("8", "4")]
    words += ["--lr", "5e-6", "--eval-problems", size("32", "2"), "--eval-every", "0", "--save-every", "0"]
    return [*words, *if_tiny("--rewards", "random=1")]  # so that the tiny model has something to learn from


def find_model(folder: Path) -> None:
    """Make a tiny model where none is named and none has to be; exit where a file is not there."""
    if TINY and not os.environ.get("MODEL"):
        subprocess.run([sys.executable, ROOT / "tests/bench/gpu_parts.py", "tiny", folder / "tiny"], check=True)
        files = {"MODEL": "tiny", "DATA": "tiny/train.jsonl", "EVAL_DATA": "tiny/test.jsonl"}
        os.environ |= {name: str(folder / path) for name, path in files.items()}
    for name, inside in (("MODEL", "config.json"), ("DATA", ""), ("EVAL_DATA", "")):
        path = Path(os.environ.get(name) or "?").resolve()
        if not (path / inside).is_file():
            sys.exit(f"gpu.sh train: there is no {path / inside}; ${name} has to name it")
        os.environ[name] = str(path)


# ---- running


class Report:
    """The three files of every run."""

    def __init__(self, out: Path, run: str):
        self.out, self.has_failed = out, False
        head = f"{run}: tiny, on a CPU: what needs CUDA is left out\n" if TINY else gpu()
        out.mkdir(parents=True, exist_ok=True)
        for name in ("summary.txt", "log.txt", "results.jsonl", *WRITTEN):
            (out / Path(name).name).unlink(missing_ok=True)
        self.write("summary.txt", head)

    def write(self, name: str, text: str) -> None:
        with (self.out / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def skip(self, name: str) -> None:
        self.has_failed = True
        self.write("summary.txt", f"{name}: no time left\n")
        self.write("results.jsonl", json.dumps({"part": name, "rc": None}) + "\n")

    def add(self, name: str, command: list[str], rc: int, seconds: float, limit_s: float, log: Path) -> None:
        """What came of a part, of whose log the lines that are JSON are results."""
        self.has_failed |= rc != 0 and name != "prewarm"  # which may have been cut short
        line = f"{name}: rc {rc}, {seconds:.0f} s of {limit_s:.0f}, at {time.monotonic() - START_S:.0f} s\n"
        text = log.read_bytes()[-LOG_BYTES:].decode("utf-8", "replace")
        self.write("summary.txt", line)
        self.write("log.txt", f"===== {line}{shlex.join(command)}\n{text}\n")
        results = [json.dumps({"part": name, "rc": rc, "seconds": round(seconds, 1), "limit_s": round(limit_s)})]
        results += [line for line in text.splitlines() if is_json(line)]
        self.write("results.jsonl", "".join(f"{result}\n" for result in results))
        said = [line[:200] for line in text.splitlines() if len(line) < 400]
        print(line + "\n".join(said[-8:]), flush=True)


def is_json(line: str) -> bool:
    """Whether a line is a JSON object, and whole."""
    with contextlib.suppress(ValueError):
        return isinstance(json.loads(line), dict)
    return False


def gpu() -> str:
    """The GPU's name, memory and driver; exits where there is none."""
    query = "--query-gpu=name,memory.total,driver_version,clocks.sm,temperature.gpu"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(["nvidia-smi", query, "--format=csv"], text=True)
    sys.exit("gpu.sh: no GPU here (nvidia-smi says nothing); TINY=1 runs everything small on a CPU")


def run_all(parts: list[Part], deadline_s: float, folder: Path, report: Report) -> None:
    """Part after part; programs are compiled for later ones while those run that time nothing."""
    prewarm = None
    for i, part in enumerate(parts):
        if part.name in UNTIMED and not prewarm and parts[-1].name not in UNTIMED:
            prewarm = Job("prewarm", folder)
        if part.name not in UNTIMED and prewarm:
            prewarm.end(report, part.limit_s if TINY else 0)
            prewarm = None
        kept_s = sum(later.limit_s for later in parts[i + 1 :] if later.is_kept)
        limit_s = min(part.limit_s, deadline_s - (time.monotonic() - START_S) - kept_s)
        if limit_s < LEAST_S:
            report.skip(part.name)
            continue
        Job(part.name, folder).end(report, limit_s, SAVE_S if part.name == "learn" else 0)
        for name in WRITTEN:
            if (folder / name).exists():
                shutil.copy(folder / name, report.out)


class Job:
    """A part that runs, in a group of processes of its own."""

    def __init__(self, name: str, folder: Path):
        self.name, self.command = name, command_of(name, folder)
        self.log, self.start_s = folder / f"{name}.log", time.monotonic()
        atexit.register(self.kill)  # so that none goes on alone
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, process_group=0
            )

    def end(self, report: Report, limit_s: float, save_s: float = 0) -> None:
        """Wait for it; when its time is over it is asked to end (within `save_s`, if it has something to save)."""
        rc = 124
        try:
            rc = self.process.wait(limit_s - save_s)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended = self.process.wait(save_s or 5)
                rc = ended if save_s else rc
        self.kill()
        self.process.wait()
        atexit.unregister(self.kill)  # its number may be another's by then
        report.add(self.name, self.command, rc, time.monotonic() - self.start_s, limit_s, self.log)

    def kill(self) -> None:
        """What is left of it and of the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
