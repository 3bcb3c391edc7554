"""Tokens a second of methods of inference-time scaling, against plain batched sampling. Run by hand.

    python tests/bench/bench_search.py --model FOLDER --data gsm8k_test.jsonl
    python tests/bench/bench_search.py --model FOLDER --data gsm8k_test.jsonl --style cot --examples examples.jsonl

Each turn runs, on the same problems, a vote among 8 samples (with confidences, judged and voted on) and a beam search
of width 4 and branching 4, each beside plain sampling of as many answers. Ways take turns, since a machine's speed
drifts; ratios are of one turn. Tokens are those sampled, dropped branches included. The last line is JSON.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from measure import finish, where

from nanor1.evaluation.measure import answer
from nanor1.evaluation.methods import Run, figures
from nanor1.judge import make_rules
from nanor1.run.machine import choose_device
from nanor1.run.resumable import Progress
from nanor1.search.asking import Asker
from nanor1.tasks.problems import Problem, make_task, read_examples
from nanor1.tasks.prompts import Prompter
from nanor1.tokenizer import Tokenizer

WAYS = {"plain 8": 8, "majority@8": Run("samples", 8), "plain 16": 16, "beam 4x4": Run("beam", 16)}
PLAIN = {"majority@8": "plain 8", "beam 4x4": "plain 16"}


def rate(asker: Asker, run: Run | int, problems: list[Problem], prompts: list[list[int]]) -> float:
    """Sampled tokens a second of a way: of all that it does, choosing included."""
    start_s = time.perf_counter()
    if isinstance(run, int):
        made_PG = asker.sampler.generate(prompts, n=run, **asker.prompter.stops, **asker.sampling)
        return sum(len(made.ids) for group in made_PG for made in group) / (time.perf_counter() - start_s)
    rows = answer(asker, run, problems, 0, Progress(len(problems) * run.n))
    figures("majority" if run.kind == "samples" else run.kind, run.n, run, rows, problems)
    return sum(row["sampled"] for row in rows) / (time.perf_counter() - start_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="GSM8K's JSON lines")
    parser.add_argument("--style", default="cot")
    parser.add_argument("--examples", default="")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-rows", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device, dtype = choose_device(args.device, "auto", print)
    tokenizer = Tokenizer.from_pretrained(args.model)
    sampling = dict(max_new_tokens=args.max_new_tokens, temperature=0.8)
    examples = read_examples(args.examples) if args.examples else ()
    prompter = Prompter(tokenizer, "chat", style=args.style, examples=examples)
    rules = make_rules(prompter)
    asker = Asker(Path(args.model), device, dtype, prompter, sampling, args.max_rows, rules=rules)
    problems = make_task("gsm8k", data=args.data, parts=("all",)).part("all")[: args.limit]
    prompts = [prompter.write(problem)[1] for problem in problems]
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(args.turns + 1):
        for name, run in WAYS.items():
            found = rate(asker, run, problems, prompts)
            if turn:  # the first turn makes slots, and compiles on a GPU
                rates[name].append(found)
                print(f"turn {turn}: {name:<11} {found:8.1f} tokens/s", flush=True)
    for name, plain in PLAIN.items():
        ratios = [one / other for one, other in zip(rates[name], rates[plain], strict=True)]
        print(f"{name:<11} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of {plain}")
    finish("search", where(device, dtype) | {"arguments": vars(args)}, [{"tokens_per_s": rates}])


if __name__ == "__main__":
    with torch.inference_mode():
        main()
