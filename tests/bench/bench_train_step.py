"""Time and peak memory of a training step: against TRL on a CPU, model FLOPs utilisation on a GPU. Run by hand.

    python tests/bench/bench_train_step.py --model FOLDER [--peer-python PATH]   a whole GRPO step beside TRL's
    python tests/bench/bench_train_step.py                                       learning alone, random weights
    python tests/bench/bench_train_step.py --quick [--model FOLDER]              seconds, to see that it runs

With --model: 4 prompts x 8 completions of up to 96 tokens, temperature 1, AdamW, rewards that are a hash of the ids, so
that no group is dropped. Each side is a process of its own; the first step of each is warm-up and not counted. TRL's
settings (PEERS) are tried for a step each, and the quickest then takes turns with ours. Memory is the peak resident
size of the process, which holds torch and the side's libraries, too.

Without: the gradient and the optimizer update over packed batches of 32k tokens, sequences of ragged length, about 1k
in the mean. "sft": every token is trained; "grpo": 8 completions share a prompt. New lengths at each repeat, so that
graphs compiled again would show. Where the memory should not suffice for the activations of a batch, it is learned in
halves or less. Model FLOPs utilisation (mfu) is nanor1's: Transformer.training_flops over the device's published peak;
the share of the matrix rate that is measured in this run stands beside it. The last line is JSON.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from functools import partial

import torch
from measure import (
    PROMPTS,
    ROOT,
    SHAPES,
    attempt,
    finish,
    forget_the_last_case,
    n_compiled,
    random_model,
    seconds,
    show,
    spread,
    where,
)

from nanor1.gradient import start_workers
from nanor1.grpo import LossSettings, Rollout, add_gradient, group_advantages
from nanor1.model import Transformer
from nanor1.optim import MasterAdamW
from nanor1.run.machine import choose_device, free_memory, peak_flops, peak_memory_gib
from nanor1.sampler import Completion, Sampler
from nanor1.tokenizer import Tokenizer

QUESTIONS = PROMPTS[4:]
G = 8  # completions a prompt
LR, MAX_GRAD_NORM = 1e-6, 1.0
PEERS = {  # dtype of the weights, and TRL's GRPOConfig where it is not its default; a batch of 32 is the whole step
    "float32": ("float32", dict(bf16=False, gradient_checkpointing=False, per_device_train_batch_size=32)),
    "float32-micro8": ("float32", dict(bf16=False, gradient_checkpointing=False, per_device_train_batch_size=8)),
    "float32-micro4-ckpt": ("float32", dict(bf16=False, gradient_checkpointing=True, per_device_train_batch_size=4)),
    "float32-static": (
        "float32",
        dict(bf16=False, gradient_checkpointing=False, per_device_train_batch_size=32, cache_implementation="static"),
    ),
    "autocast-micro8": ("float32", dict(bf16=True, gradient_checkpointing=False, per_device_train_batch_size=8)),
    "bfloat16-micro8": ("bfloat16", dict(bf16=True, gradient_checkpointing=False, per_device_train_batch_size=8)),
}
LEARNING = ["qwen2.5-0.5b", "qwen2.5-1.5b"]


def main() -> None:
    args = parse_args()
    if args.side:
        return run_side(args)
    device, dtype = choose_device(args.device, args.dtype, print)
    facts = where(device, dtype)
    finish("train_step", facts, [beside_trl(args)] if args.model else learning(args, device, dtype, facts))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder with a chat template; none: random weights, learning alone")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has TRL")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="TRL's settings to try")
    parser.add_argument("--limit", type=int, help="most tokens of a completion: 96; --quick 8")
    parser.add_argument("--steps", type=int, help="of each process, the first not counted: 3; --quick 2")
    parser.add_argument("--repeats", type=int, help="turns: 3; --quick 1; without --model 5 updates; --quick 2")
    parser.add_argument(
        "--tokens-per-batch",
        type=int,
        help="packed tokens a micro-batch: 1024, as train_zero.py on a CPU; without --model 32768",
    )
    parser.add_argument("--checkpointing", choices=("off", "on", "both"), help="of activations: both; with --model off")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="without --model")
    parser.add_argument("--no-compile", action="store_true", help="without --model")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="without --model: qwen2.5-0.5b, qwen2.5-1.5b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of our weights")
    parser.add_argument("--quick", action="store_true", help="a few tokens, and a tiny shape if there is no --model")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # in a process of its own: "ours", or one of PEERS
    args = parser.parse_args()
    args.limit = args.limit or (8 if args.quick else 96)
    args.steps = args.steps or (2 if args.quick else 3)
    if args.model:
        args.repeats, args.tokens_per_batch = args.repeats or (1 if args.quick else 3), args.tokens_per_batch or 1024
        args.device = "cpu"  # as the peer
    args.checkpointing = args.checkpointing or ("off" if args.model else "both")
    args.repeats = args.repeats or (2 if args.quick else 5)
    args.tokens_per_batch = args.tokens_per_batch or (512 if args.quick else 32_768)
    args.shapes = args.shapes or (["tiny"] if args.quick else LEARNING)
    return args


# ---- a GRPO step, beside TRL


def beside_trl(args) -> dict:
    """Both sides by turns, each in a process of its own."""
    print(f"\n{len(QUESTIONS)} prompts x {G}, up to {args.limit} tokens, {args.steps - 1} counted steps a process")
    best, tried = choose_peer(args)
    ours, peer = [], []
    for _ in range(args.repeats):
        ours.append(start_side(args, "ours", args.steps))
        if best and (side := attempt(f"TRL {best}", partial(start_side, args, best, args.steps))):
            peer.append(side)
    result = {"limit": args.limit, "ours": summary("ours", ours), "tried": tried, "best_peer": best}
    if peer:
        result |= {"peer": summary(f"TRL {best}", peer)} | ratios(ours, peer)
    return result


def choose_peer(args) -> tuple[str | None, dict[str, dict]]:
    """TRL's quickest settings, and one counted step of each; none is run where there is no choice."""
    if len(args.peers) < 2:
        return next(iter(args.peers), None), {}
    tried = {name: attempt(f"TRL {name}", partial(start_side, args, name, 2)) for name in args.peers}
    tried = {name: side for name, side in tried.items() if side}
    return min(tried, key=lambda name: tried[name]["step_s"], default=None), tried


def start_side(args, side: str, steps: int) -> dict:
    """Run a side's steps; raises RuntimeError with the last line that it wrote."""
    python = sys.executable if side == "ours" else args.peer_python
    options = ["--side", side, "--model", args.model, "--limit", str(args.limit), "--steps", str(steps)]
    options += ["--tokens-per-batch", str(args.tokens_per_batch), "--dtype", args.dtype]
    options += ["--checkpointing", args.checkpointing]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, __file__, *options], env=env, capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["it wrote nothing"]
    if done.returncode:
        raise RuntimeError(lines[-1])
    side_result = json.loads(lines[-1])
    print(
        f"  {side:22s} {side_result['step_s']:8.3f} s a step, {side_result['peak_memory_gib']:6.2f} GiB, "
        f"{side_result['tokens']:6.0f} tokens",
        flush=True,
    )
    return side_result


def summary(name: str, sides: list[dict]) -> dict:
    times, peaks, tokens = ([side[key] for side in sides] for key in ("step_s", "peak_memory_gib", "tokens"))
    show(f"{name}: time", time_s := spread(times), "s a step")
    show(f"{name}: peak memory", memory := spread(peaks), "GiB")
    show(f"{name}: tokens generated", n_tokens := spread(tokens), "a step")
    return {"step_s": time_s, "peak_memory_gib": memory, "tokens": n_tokens, "sides": sides}


def ratios(ours: list[dict], peer: list[dict]) -> dict:
    """Turn by turn; tokens of the two differ a little, since both draw them."""
    pairs = list(zip(ours, peer, strict=False))
    found = {
        "times_faster": spread([p["step_s"] / o["step_s"] for o, p in pairs]),
        "times_faster_per_token": spread([p["step_s"] / p["tokens"] / (o["step_s"] / o["tokens"]) for o, p in pairs]),
        "share_of_memory": spread([o["peak_memory_gib"] / p["peak_memory_gib"] for o, p in pairs]),
    }
    for name, values in found.items():
        show(name, values, "")
    return found


def run_side(args) -> None:
    """A side's steps in this process; the last line is JSON."""
    times, tokens = our_steps(args) if args.side == "ours" else trl_steps(args)
    counted = {"times_s": times, "step_s": statistics.mean(times[1:]), "tokens": statistics.mean(tokens[1:])}
    print(json.dumps(counted | {"tokens_by_step": tokens, "peak_memory_gib": peak_memory_gib()}))


def reward(ids: list[int]) -> float:
    """In [0, 1], from a hash: equal for equal completions only."""
    return zlib.crc32(str(ids).encode()) / 2**32


def our_steps(args) -> tuple[list[float], list[int]]:
    """Seconds and generated tokens of each step, made as train_zero.py makes one."""
    device, dtype = choose_device(args.device, args.dtype, print)
    model, tokenizer = Transformer.from_pretrained(args.model, dtype, device), Tokenizer.from_pretrained(args.model)
    model.checkpoints_activations = args.checkpointing == "on"
    optimizer, workers, sampler = MasterAdamW(model), start_workers(model), Sampler(model, memory_share=0.5)
    settings = LossSettings(1.0, tokenizer.vocab_size, args.tokens_per_batch)
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}], True) for text in QUESTIONS]
    prompts = [tokenizer.encode(chat, allow_special=True) for chat in chats]
    stop = {"stop_ids": tokenizer.stop_ids, "vocab_size": tokenizer.vocab_size}
    times, tokens = [], []
    for step in range(args.steps):
        start_s = time.perf_counter()
        completions_PG = sampler.generate(prompts, n=G, max_new_tokens=args.limit, seed=step, **stop)
        rewards_PG = [[reward(completion.ids) for completion in group] for group in completions_PG]
        rollouts = [
            Rollout(None, prompt, completion, tokenizer.decode(completion.ids), None, {})
            for prompt, group in zip(prompts, completions_PG, strict=True)
            for completion in group
        ]
        advantages = [advantage for group in group_advantages(rewards_PG) for advantage in group]
        add_gradient(workers, None, rollouts, advantages, settings)
        optimizer.step(LR, MAX_GRAD_NORM)
        times.append(time.perf_counter() - start_s)
        tokens.append(sum(len(rollout.completion.ids) for rollout in rollouts))
    return times, tokens


def trl_steps(args) -> tuple[list[float], list[int]]:
    """The same step by TRL's GRPOTrainer: num_iterations 1, beta 0, its other defaults and those of PEERS."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    dtype, settings = PEERS[args.side]
    moments, tokens = [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            moments.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            moments.append(time.perf_counter())

    def score(completion_ids, **_) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [reward(list(ids)) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            max_steps=args.steps,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            gradient_accumulation_steps=len(QUESTIONS) * G // settings["per_device_train_batch_size"],
            num_generations=G,
            max_completion_length=args.limit,
            temperature=1.0,
            num_iterations=1,
            beta=0.0,
            shuffle_dataset=False,
            disable_dropout=True,
            model_init_kwargs={"dtype": dtype},
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in QUESTIONS]
        trainer = GRPOTrainer(
            args.model, score, args=config, train_dataset=Dataset.from_list(rows), callbacks=[Clock()]
        )
        trainer.train()
    return [end - start for start, end in zip(moments, moments[1:], strict=False)], tokens


# ---- the learning phase alone


def learning(args, device: torch.device, dtype: torch.dtype, facts: dict) -> list[dict | None]:
    facts["peak_tflops"] = peak_flops(device, dtype, print) / 1e12
    cases = [
        (shape, name, is_checkpointed)
        for shape in args.shapes
        for name in args.cases
        for is_checkpointed in {"off": (False,), "on": (True,), "both": (False, True)}[args.checkpointing]
    ]
    measure = partial(measure_learning, args, device, dtype, facts)
    return [attempt(f"{case[0]} {case[1]}", partial(measure, *case), in_full=True) for case in cases]


def measure_learning(args, device, dtype, facts: dict, shape: str, name: str, is_checkpointed: bool) -> dict:
    """Updates of one packed batch each: tokens and FLOP a second, memory, graphs compiled."""
    forget_the_last_case(device)
    model = random_model(SHAPES[shape], device, dtype)
    model.checkpoints_activations = is_checkpointed
    if not args.no_compile:
        model.compile_blocks()
    workers, optimizer = start_workers(model, 1), MasterAdamW(model)
    micro_batch = tokens_that_fit(model, args.tokens_per_batch)
    settings = LossSettings(1.0, model.config.vocab_size, micro_batch)

    def update(seed: int) -> list:
        rollouts = CASES[name](args.tokens_per_batch, model.config.vocab_size, seed)
        advantages = [(-1.0) ** i for i in range(len(rollouts))]
        terms: list = []
        times = [
            seconds(lambda: terms.extend(add_gradient(workers, None, rollouts, advantages, settings)), device),
            seconds(lambda: optimizer.step(LR, MAX_GRAD_NORM), device),
        ]
        return [times, sum(t.n_packed for t in terms), sum(t.n_tokens for t in terms), sum(t.flops for t in terms)]

    before = n_compiled()
    first = [update(seed) for seed in (0, 1)]  # the second length is where a graph turns dynamic
    compiled = n_compiled()
    updates = [update(seed + 2) for seed in range(args.repeats)]
    recompiled = n_compiled() - compiled
    title = f"{shape}, {name}, {micro_batch} tokens a pass" + (", activation checkpointing" if is_checkpointed else "")
    case = {"shape": shape, "case": name, "checkpoints_activations": is_checkpointed, "micro_batch": micro_batch}
    case |= {"is_compiled": not args.no_compile, "graphs": compiled - before, "recompiles": recompiled}
    return case | {"first_s": sum(first[0][0])} | report_learning(title, updates, facts, compiled - before, recompiled)


def tokens_that_fit(model: Transformer, n_tokens: int) -> int:
    """The tokens of a forward and backward pass: all, or the largest half, quarter, ... that should fit the memory.

    For its backward a compiled block keeps three rows of the inner width, six of the width, and keys and values: 1 MB
    a token of the 0.5B shape, 2 MB of the 1.5B. Beside them stand the gradients, in the weights' dtype and in fp32, and
    a chunk of logits with what is made of it.
    """
    config, weight = model.config, model.head_weight_VC
    numbers = 3 * config.intermediate_size + 6 * config.hidden_size + 2 * config.num_key_value_heads * config.head_dim
    n_layers = config.num_hidden_layers
    kept = numbers + n_layers * config.hidden_size if model.checkpoints_activations else numbers * n_layers
    n_bytes = sum(p.numel() for p in model.parameters()) * (weight.element_size() + 4) + 6 * 2**30
    fitting = n_tokens
    while n_bytes + fitting * kept * weight.element_size() > 0.95 * free_memory(weight.device) and fitting > 1024:
        fitting //= 2
    return fitting


def report_learning(name: str, updates: list, facts: dict, n_graphs: int, n_recompiled: int) -> dict:
    """Rates of whole updates (gradient and optimizer), and of the gradient alone."""
    gradient_flops = [flops / gradient_s for (gradient_s, _), _, _, flops in updates]
    whole_flops = [flops / sum(times) for times, _, _, flops in updates]
    peak, measured = facts["peak_tflops"] * 1e12, facts["matrix_tflops"] * 1e12
    rates = {
        "packed_tokens_per_s": spread([packed / sum(times) for times, packed, _, _ in updates]),
        "trained_tokens_per_s": spread([trained / sum(times) for times, _, trained, _ in updates]),
        "tflops": spread([rate / 1e12 for rate in whole_flops]),
        "mfu": spread([rate / peak for rate in whole_flops]),
        "mfu_of_gradient_alone": spread([rate / peak for rate in gradient_flops]),
        "share_of_measured_matrix_rate": spread([rate / measured for rate in whole_flops]),
    }
    memory_gib = peak_memory_gib()
    print(f"\n{name}: {memory_gib:.2f} GiB at the peak, {n_graphs} graphs compiled, then {n_recompiled} more")
    for key, values in rates.items():
        show(key, values, "")
    return rates | {"peak_memory_gib": memory_gib}


def sft_rollouts(n_tokens: int, vocab_size: int, seed: int) -> list[Rollout]:
    """Sequences of which every token but the first is trained."""
    rng, rollouts = random.Random(seed), []
    for length in lengths(n_tokens, seed):
        rollouts.append(rollout([rng.randrange(vocab_size)], max(2, length), vocab_size, rng))
    return rollouts


def grpo_rollouts(n_tokens: int, vocab_size: int, seed: int) -> list[Rollout]:
    """Groups of 8 ragged completions; a prompt is a quarter of their mean length, and is packed once."""
    rng, rollouts = random.Random(seed), []
    own = lengths(n_tokens * 32 // 33, seed)
    for start in range(0, len(own), G):
        prompt = rng.choices(range(vocab_size), k=max(2, n_tokens // 128))
        rollouts += [rollout(prompt, max(2, length), vocab_size, rng) for length in own[start : start + G]]
    return rollouts


def rollout(prompt: list[int], n_new: int, vocab_size: int, rng: random.Random) -> Rollout:
    ids = rng.choices(range(vocab_size), k=n_new)
    return Rollout(None, prompt, Completion(ids, [0.0] * n_new, "stop"), "", None, {})


def lengths(n_tokens: int, seed: int) -> list[int]:
    """32 lengths that add up to about so many tokens, most of them within a factor of 2 of their mean."""
    rng = random.Random(seed)
    parts = [rng.lognormvariate(0, 0.6) for _ in range(32)]
    return [int(n_tokens * part / sum(parts)) for part in parts]


CASES = {"sft": sft_rollouts, "grpo": grpo_rollouts}


if __name__ == "__main__":
    main()
