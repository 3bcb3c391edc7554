"""Those parts of gpu.sh that are no benchmark of their own. Results are JSON lines.

    python tests/bench/gpu_parts.py smoke               does the model sample and learn as it should on this device
    python tests/bench/gpu_parts.py profile decode256   kernel by kernel: decode256, decode1 or train
    python tests/bench/gpu_parts.py prewarm             fill the caches of compiled programs on the disk
    python tests/bench/gpu_parts.py tiny FOLDER         a small model that knows nothing, and problems for it
    python tests/bench/gpu_parts.py compare FOLDER      what before.jsonl, after.jsonl and the run zero come to

--quick --device cpu shows that they run.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from bench_train_step import sft_rollouts
from measure import SHAPES, attempt, forget_the_last_case, random_model, seconds

from nanor1.evaluation.accuracy import accuracy_interval
from nanor1.evaluation.paired import paired_difference
from nanor1.gradient import start_workers
from nanor1.grpo import LossSettings, Rollout, add_gradient, completion_logprobs, to_items
from nanor1.model import Transformer
from nanor1.optim import MasterAdamW
from nanor1.packing import pack
from nanor1.sampler import Sampler
from nanor1.slots import Sampling, Slots, Step
from nanor1.weights import ModelConfig

DECODE = {"decode256": ("qwen2.5-1.5b", 256, 768), "decode1": ("qwen2.5-7b", 1, 512)}  # shape, rows, context
# Means of |logp of trainer - of sampler|, four times those of the model of `smoke` on a CPU: more is a bug.
GAPS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
GRADIENT_ERROR = 0.03  # of its norm, compiled against eager; bf16 against fp32 is 0.015 there
CHAT = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}model: {% endif %}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("what", nargs="?", help="decode256, decode1 or train; a folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny shape")
    args = parser.parse_args()
    PARTS[args.part](args)


def ready_model(args, shape: str, n_layers: int = 0, dtype: torch.dtype | None = None) -> Transformer:
    """A random model, with its own number of layers (0) or another, compiled on a GPU; the last one is forgotten."""
    device = torch.device(args.device)
    forget_the_last_case(device)
    model = plain_model(args, shape, n_layers, dtype)
    if device.type == "cuda":
        model.compile_blocks()
    return model


def plain_model(args, shape: str, n_layers: int = 0, dtype: torch.dtype | None = None) -> Transformer:
    """The same, not compiled; bf16 on a GPU, else fp32, where no dtype is given."""
    config = SHAPES["tiny" if args.quick else shape]
    config = replace(config, num_hidden_layers=n_layers or config.num_hidden_layers)
    dtype = dtype or (torch.bfloat16 if args.device == "cuda" else torch.float32)
    return random_model(config, torch.device(args.device), dtype)


# ---- smoke


def smoke(args) -> None:
    """Checks of four layers of the 0.5B shape, each by itself, so that one that fails does not hide the others."""
    model = ready_model(args, "qwen2.5-0.5b", 4)
    checks = {
        "sampler against trainer": partial(sample_and_score, args, model),
        "captured steps against uncaptured ones": partial(compare_captured, args, model),
        "compiled gradient against eager": partial(compare_gradients, args, model),
        "one row against trainer": partial(sample_and_score, args, model, n_rows=1, n_prompts=2),
    }
    if args.device == "cuda":
        checks["sampler against trainer, fp16"] = lambda: sample_and_score(
            args, ready_model(args, "qwen2.5-0.5b", 4, torch.float16)
        )
    are_fine = []
    for name, check in checks.items():
        found = attempt(name, check, in_full=True) or {"is_fine": False}
        print(json.dumps({"check": name} | found), flush=True)
        are_fine.append(found["is_fine"])
    if not all(are_fine):
        sys.exit(1)


def sample_and_score(args, model: Transformer, n_rows: int = 48, n_prompts: int = 24) -> dict:
    """Ragged requests, more of them than slots, twice; the trainer's log-probabilities of what was sampled."""
    prompts, limits = requests(args, model, n_prompts)
    generate = partial(Sampler(model, n_rows).generate, prompts, n=4, max_new_tokens=limits, seed=1)
    made: list = []
    times = [seconds(lambda: made.append(generate()), torch.device(args.device)) for _ in range(2)]
    ids = [[completion.ids for group in run for completion in group] for run in made]
    rollouts = [
        Rollout(None, prompt, completion, "", None, {})
        for prompt, group in zip(prompts, made[0], strict=True)
        for completion in group
    ]
    gap_M, dtype = gap(model, rollouts), model.head_weight_VC.dtype
    found = {
        "dtype": str(dtype).removeprefix("torch."),
        "first_s": times[0],
        "second_s": times[1],
        "lengths_are_right": list(map(len, ids[0])) == [limit for limit in limits for _ in range(4)],
        "same_ids_again": statistics.mean(map(list.__eq__, *ids)),
        "gap_mean": float(gap_M.mean()),
        "gap_max": float(gap_M.max()),
    }
    is_close = found["gap_mean"] < GAPS[dtype]  # not where it is nan
    return found | {"is_fine": found["lengths_are_right"] and found["same_ids_again"] == 1 and is_close}


def requests(args, model: Transformer, n_prompts: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of random tokens, and a limit of new ones for each."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda low, high, n: torch.randint(low, high, (n,), generator=generator).tolist()  # noqa: E731
    n_prompts, longest = (min(n_prompts, 4), 20) if args.quick else (n_prompts, 120)
    prompts = [draw(0, model.config.vocab_size, length) for length in draw(3, longest, n_prompts)]
    return prompts, draw(1, longest, n_prompts)


@torch.no_grad()
def gap(model: Transformer, rollouts: list[Rollout]) -> torch.Tensor:
    """|log-probability of the trainer - of the sampler| of each token."""
    batches = [batch.to(model.head_weight_VC.device) for batch in pack(to_items(rollouts), 4096)]
    scored = [completion_logprobs(model, batch, 1.0, model.config.vocab_size)[0] for batch in batches]
    return torch.cat([(logp - batch.sampler_logp_M).abs() for logp, batch in zip(scored, batches, strict=True)])


@torch.inference_mode()
def compare_captured(args, model: Transformer) -> dict:
    """The same slots advanced by the replayed graph and by the step that was recorded: bit for bit the same."""
    n_rows, n_steps = (4, 8) if args.quick else (32, 40)
    sampling, index_B = Sampling(1.0, 0, 1.0, (), None), torch.arange(n_rows, device=args.device)
    made = []
    for is_captured in (True, False):
        slots = Slots(model, n_rows, 128, n_steps)
        step = Step(model, slots, n_rows, sampling)
        slots.start(index_B, index_B + 5, index_B * 0, 1 + index_B % n_steps, index_B + 7)
        advance(step, index_B, n_steps, is_captured)
        made.append((slots.ids[:n_rows, :-1], slots.logp[:n_rows, :-1], slots.n_new[:n_rows]))
    captured, plain = made
    found = {"n_tokens": int(plain[2].sum()), "same_ids": torch.equal(captured[0], plain[0])}
    found["largest_difference"] = float((captured[1] - plain[1]).abs().max())
    is_whole = found["n_tokens"] == sum(1 + row % n_steps for row in range(n_rows))
    return found | {"is_fine": is_whole and found["same_ids"] and found["largest_difference"] == 0}


def advance(step: Step, index_B: torch.Tensor, n_steps: int, is_captured: bool = True) -> None:
    """Advance slots, by replaying the step's graph where it has one, or by what was recorded."""
    step.slot_B.copy_(index_B)
    for _ in range(n_steps):
        step.graph.replay() if step.graph and is_captured else step.run()


def compare_gradients(args, model: Transformer) -> dict:
    """One batch through compiled blocks and through plain ones of the same weights; then an update."""
    gradients = {}
    for name, each in (("compiled", model), ("eager", plain_model(args, "qwen2.5-0.5b", 4))):
        learn(each, 512 if args.quick else 8192, seed=0)
        gradients[name] = torch.cat([p.grad.float().flatten() for p in each.parameters()])
    error = (gradients["compiled"] - gradients["eager"]).norm() / gradients["eager"].norm()
    norm = MasterAdamW(model).step(1e-6, 1.0)
    found = {"gradient_error": float(error), "gradient_norm": norm}
    found["weights_are_finite"] = all(bool(p.isfinite().all()) for p in model.parameters())
    return found | {"is_fine": found["gradient_error"] < GRADIENT_ERROR and norm > 0 and found["weights_are_finite"]}


def learn(model: Transformer, n_tokens: int, seed: int) -> None:
    """Add the gradient of a packed batch of random sequences."""
    rollouts = sft_rollouts(n_tokens, model.config.vocab_size, seed)
    settings = LossSettings(1.0, model.config.vocab_size, n_tokens)
    add_gradient(start_workers(model, 1), None, rollouts, [(-1.0) ** i for i in range(len(rollouts))], settings)


# ---- where the time goes


def profile(args) -> None:
    """Kernels by their time: of decode steps, or of a training step of the 0.5B shape."""
    with torch.inference_mode(args.what != "train"):
        job, n = decode_job(args) if args.what in DECODE else train_job(args)
        for _ in range(2):
            job()
        wall_s = seconds(job, torch.device(args.device))
        activity = getattr(torch.profiler.ProfilerActivity, args.device.upper())
        with torch.profiler.profile(activities=[activity]) as recorded:
            seconds(job, torch.device(args.device))
    of_device = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    time_ms = lambda event: getattr(event, of_device) / n / 1e3  # noqa: E731
    events = sorted(recorded.key_averages(), key=time_ms, reverse=True)
    total_ms, n_launches = sum(map(time_ms, events)), sum(event.count for event in events) / n
    print(f"{args.what}: {wall_s / n * 1e3:.3f} ms, of which kernels {total_ms:.3f} ms in {n_launches:.0f} launches")
    for event in events[:45]:
        share = time_ms(event) / total_ms
        print(f"{time_ms(event):9.4f} ms {share:6.1%} {event.count / n:7.1f} x  {event.key[:140]}")
    first = [{"kernel": event.key[:80], "ms": time_ms(event), "count": event.count / n} for event in events[:12]]
    print(json.dumps({"profile": args.what, "wall_ms": wall_s / n * 1e3, "kernels_ms": total_ms, "kernels": first}))


def decode_job(args) -> tuple[Callable[[], None], int]:
    shape, n_rows, context = DECODE[args.what]
    n_rows, context = (min(n_rows, 4), 40) if args.quick else (n_rows, context)
    model, n = ready_model(args, shape), 4 if args.quick else 20
    n_new = 5 * n  # what the calls of the job make
    slots = Slots(model, n_rows, -(-(context + n_new) // 128) * 128, n_new)
    slots.position[:n_rows], slots.limit[:n_rows], slots.is_running[:n_rows] = context, n_new, True
    step = Step(model, slots, n_rows, Sampling(1.0, 0, 1.0, (), None))
    index_B = torch.arange(n_rows, device=model.head_weight_VC.device)
    return lambda: advance(step, index_B, n), n


def train_job(args) -> tuple[Callable[[], None], int]:
    model, n_tokens = ready_model(args, "qwen2.5-0.5b"), 512 if args.quick else 32_768
    optimizer = MasterAdamW(model)

    def update() -> None:
        learn(model, n_tokens, seed=0)
        optimizer.step(1e-6, 1.0)

    return update, 1


def prewarm(args) -> None:
    """What blocks are compiled to does not depend on their number, nor on lengths."""
    for shape, n_rows in (("qwen2.5-0.5b", 512), ("qwen2.5-1.5b", 256), ("qwen2.5-7b", 1)):
        model = ready_model(args, shape, 2)
        if n_rows > 1:
            learn(model, 512 if args.quick else 8192, seed=0)
        n_rows = min(n_rows, 4) if args.quick else n_rows
        Sampler(model, n_rows).generate([[1, 2, 3]] * n_rows, max_new_tokens=4)
        print(f"{shape}: compiled", flush=True)


# ---- a run of reinforcement learning


def tiny(args) -> None:
    """A model folder of a tiny shape with random weights and bytes for tokens, and train.jsonl and test.jsonl."""
    folder = Path(args.what)
    sys.path.append(str(Path(__file__).parents[1]))
    from vocabularies import of_bytes

    tokenizer = of_bytes(chat_template=CHAT)
    torch.manual_seed(0)
    Transformer(ModelConfig("llama", tokenizer.vocab_size, 32, 64, 2, 2, 1, 16, 1024)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, numbers in (("train", range(30)), ("test", range(30, 40))):
        rows = [{"question": f"What is {a} + 2?", "answer": f"#### {a + 2}"} for a in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def compare(args) -> None:
    """Accuracy before and after with 95% intervals, the paired difference, and the run's rates; into summary.json."""
    folder = Path(args.what)
    rows = {when: read_lines(folder / f"{when}.jsonl") for when in ("before", "after")}
    steps = [row for row in read_lines(folder / "zero" / "metrics.jsonl") if "step_s" in row]
    summary = {"steps": len(steps), "problems": len(rows["after"])}
    for kind, is_right in (("lenient", is_right_in_any_form), ("strict", is_right_in_the_form)):
        before, after = ([is_right(row) for row in rows[when]] for when in ("before", "after"))
        difference, *interval = paired_difference(before, after)
        summary[kind] = {
            "before": statistics.mean(before),
            "before_95": accuracy_interval(before),
            "after": statistics.mean(after),
            "after_95": accuracy_interval(after),
            "difference": difference,
            "difference_95": interval,
        }
        print(f"{kind}: " + ", ".join(f"{name} {value}" for name, value in summary[kind].items()))
    for name in ("step_s", "rollout_tokens_per_s", "learn_tokens_per_s", "mfu", "logp_gap_mean", "peak_memory_gib"):
        values = [row[name] for row in steps if row.get(name) is not None]
        summary[name] = statistics.median(values) if values else None
    for name in ("accuracy", "truncated", "response_tokens", "dropped_groups"):
        summary[name] = [row[name] for row in steps]
    print(json.dumps(summary))
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_right_in_any_form(row: dict) -> float:
    return float(row["answers"][0]["accuracy"] or 0)


def is_right_in_the_form(row: dict) -> float:
    return float(is_right_in_any_form(row) and row["answers"][0]["format"] == 1)


PARTS = {
    "smoke": smoke,
    "profile": profile,
    "prewarm": prewarm,
    "tiny": tiny,
    "compare": compare,
}

if __name__ == "__main__":
    main()
