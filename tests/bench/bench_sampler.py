"""Tokens a second of the sampler, against the machine's limits and transformers' generate. Run by hand.

    python tests/bench/bench_sampler.py                                       random weights, for a GPU
    python tests/bench/bench_sampler.py --model FOLDER                        real weights, natural stops, for a CPU
    python tests/bench/bench_sampler.py --model FOLDER --prompts-file gsm8k_test.jsonl
    python tests/bench/bench_sampler.py --parts rollouts --lengths ragged --peers   one thing, without peers
    python tests/bench/bench_sampler.py --quick                               seconds, to see that it runs

Random weights never stop, so lengths are fixed or drawn. Parts: `decode`, one row of a large model, and `context`, many
rows with long caches: bytes of weights and cache a second, as a share of the copy bandwidth, from the difference of a
long and a short generation, so that prefill and setup cancel. `rollouts`: groups of 8, more of them than slots, with a
length drawn for each group, and with one length for all. Real weights: 8 prompts x 8, or the questions of a JSON-lines
file, temperature 1; the floor is what the matrix products alone take with as many rows as run at each step.

Peers: transformers' generate, prompts padded on the left, finished rows waiting for the longest of their batch, with a
dynamic or a static cache (on a GPU transformers compiles that one by itself), and its continuous batching ("paged").
Tokens count up to and including the stop token. Ours and the peers take turns, since a machine's speed drifts; peers
far behind the best one leave after the first turn. The last line is JSON.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from measure import (
    PROMPTS,
    SHAPES,
    attempt,
    cache_bytes,
    compile_s,
    finish,
    forget_the_last_case,
    n_compiled,
    products_s,
    random_model,
    seconds,
    show,
    spread,
    synchronize,
    weight_bytes,
    where,
)

from nanor1.model import Transformer
from nanor1.run.machine import choose_device, peak_memory_gib
from nanor1.sampler import Sampler
from nanor1.tokenizer import Tokenizer
from nanor1.weights import config_to_hf

FAR_BEHIND = 0.8  # of the best peer's rate: slower ones are not measured again
LENGTHS = ["ragged", "equal"]
PEERS = [f"{dtype}-{cache}" for dtype in ("float32", "bfloat16") for cache in ("dynamic", "static", "paged")]
SHORT, LONG = 32, 160  # tokens of the two generations of which a step's time is the difference
PARTS = {  # what is run with random weights: shapes and rows; decode and context: and context in the middle
    "decode": [("qwen2.5-7b", 1, 512), ("qwen2.5-0.5b", 1, 512), ("qwen2.5-3b", 1, 512)],
    "context": [("qwen2.5-1.5b", 256, 768), ("qwen2.5-0.5b", 512, 768), ("qwen3-0.6b", 256, 768)],
    "rollouts": [("qwen2.5-0.5b", 512)],
}
QUICK_PARTS = {"decode": [("tiny", 1, 128)], "context": [("tiny", 4, 128)], "rollouts": [("tiny", 16)]}


@dataclass(frozen=True)
class Workload:
    """Requests: n completions of each prompt, of at most `limits` tokens, one number a prompt."""

    name: str
    prompts: list[list[int]]
    n: int
    limits: list[int]
    rows: int  # at once
    stop_ids: tuple[int, ...] = ()
    vocab_size: int | None = None

    def limited(self, limit: int) -> "Workload":
        return replace(self, limits=[min(limit, own) for own in self.limits])


@dataclass(frozen=True)
class Run:
    """One generation of a workload."""

    wall_s: float
    lengths: list[int]  # of the completions

    @property
    def rate(self) -> float:
        return sum(self.lengths) / self.wall_s


Generate = Callable[[Workload, int], list[int]]  # a workload and a seed -> the lengths of its completions


def main() -> None:
    args = parse_args()
    device, dtype = choose_device(args.device, args.dtype, print)
    facts = where(device, dtype)
    if args.model:
        results = [compare_on_real_weights(args, device, dtype, facts)]
    else:
        results = [result for part in args.parts for result in RUN_PART[part](args, device, dtype, facts)]
    finish("sampler", facts, results)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder with a chat template; none: random weights")
    parser.add_argument("--prompts-file", help="JSON lines with a `question` each; 64 of them, one completion each")
    parser.add_argument("--limit", type=int, default=None, help="most tokens of a completion: 128; random weights 1024")
    parser.add_argument("--repeats", type=int, default=None, help="turns: 5; --quick 2")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="with random weights")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="of the parts, these alone")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=LENGTHS, help="of the rollouts' completions")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="none given: all (random weights: in their dtype)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of our weights")
    parser.add_argument("--quick", action="store_true", help="a few tokens, and a tiny shape if there is no --model")
    args = parser.parse_args()
    args.repeats = args.repeats or (2 if args.quick else 5)
    args.limit = args.limit or (8 if args.quick else 128 if args.model else 1024)
    return args


# ---- real weights, natural stops


def compare_on_real_weights(args, device: torch.device, dtype: torch.dtype, facts: dict) -> dict:
    model, tokenizer = Transformer.from_pretrained(args.model, dtype, device), Tokenizer.from_pretrained(args.model)
    work = chat_workload(args, tokenizer)
    jobs = {"ours": our_generate(model, work.rows)}
    names = PEERS if args.peers is None else args.peers
    jobs |= load_peers(names, device, lambda dtype: load_transformers(args.model, dtype))
    first, runs = compare(jobs, work.limited(min(8, args.limit)), work, args.repeats, device)
    result = report(work, first, runs) | {"model": Path(args.model).name}
    floors = [floor_s(model, work, run.lengths) for run in runs["ours"]]
    share = [floor / run.wall_s for floor, run in zip(floors, runs["ours"], strict=True)]
    show("floor: matrix products alone", floor_rates := spread(floor_rate(runs["ours"], floors)), "tok/s")
    show("share of ours that the floor is", shares := spread(share), "")
    return result | {"floor_tokens_per_s": floor_rates, "floor_share": shares}


def chat_workload(args, tokenizer: Tokenizer) -> Workload:
    texts, n, name = PROMPTS, 8, "8 prompts x 8"
    if args.prompts_file:
        lines = Path(args.prompts_file).read_text(encoding="utf-8").splitlines()[:64]
        texts, n = [json.loads(line)["question"] for line in lines], 1
        name = f"{len(texts)} prompts of {Path(args.prompts_file).name}"
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}], True) for text in texts]
    prompts = [tokenizer.encode(chat, allow_special=True) for chat in chats]
    limits, stop_ids = [args.limit] * len(prompts), tuple(tokenizer.stop_ids)
    name = f"{name}, up to {args.limit} tokens"
    return Workload(name, prompts, n, limits, len(prompts) * n, stop_ids, tokenizer.vocab_size)


def floor_s(model: Transformer, work: Workload, lengths: list[int]) -> float:
    """Seconds of the matrix products alone, if every step had the rows that still ran."""
    n_prompts = len(work.prompts)
    total = products_s(model, sum(map(len, work.prompts)), n_prompts)
    sizes = sorted({1, 2, 4, 8, 16, 32, 48, len(lengths)})
    step_s = {size: products_s(model, size, size) for size in sizes if size <= len(lengths)}
    for position in range(1, max(lengths)):  # the first tokens come from the prompts' logits
        total += interpolate(step_s, sum(length > position for length in lengths))
    return total


def interpolate(values: dict[int, float], at: int) -> float:
    """Linear between the keys, which are sorted and surround `at`.

    >>> interpolate({1: 10.0, 3: 20.0}, 2)
    15.0
    """
    if at in values:
        return values[at]
    low, high = next((low, high) for low, high in pairwise(values) if low < at < high)
    return values[low] + (values[high] - values[low]) * (at - low) / (high - low)


def floor_rate(runs: list[Run], floors: list[float]) -> list[float]:
    return [sum(run.lengths) / floor for run, floor in zip(runs, floors, strict=True)]


# ---- random weights, given lengths


def measure_decode(args, device: torch.device, dtype: torch.dtype, facts: dict, part: str) -> list[dict]:
    """Time of a decode step, and the share of the copy bandwidth at which it reads weights and cache."""
    measure = partial(decode_steps, args, device, dtype, facts)
    return [attempt(f"{part} {case}", partial(measure, *case), in_full=True) for case in cases(args, part)]


def cases(args, part: str) -> list[tuple]:
    """Those of a part whose shape is asked for."""
    return [case for case in (QUICK_PARTS if args.quick else PARTS)[part] if case[0] in (args.shapes or SHAPES)]


def decode_steps(args, device, dtype, facts: dict, shape: str, n_rows: int, context: int) -> dict:
    model = ready_model(shape, device, dtype)
    middle = (SHORT + LONG) // 2
    prompts = random_prompts(model, [context - middle] * math.ceil(n_rows / 8))
    work = Workload("", prompts, min(n_rows, 8), [LONG] * len(prompts), n_rows)
    generate = our_generate(model, n_rows)
    generate(work, 0)  # compile, capture
    times = [
        [seconds(lambda limit=limit: generate(work.limited(limit), 0), device) for limit in (SHORT, LONG)]
        for _ in range(args.repeats)
    ]
    step_s = [(long - short) / (LONG - SHORT) for short, long in times]
    n_bytes = weight_bytes(model) + cache_bytes(model, n_rows * context)
    print(f"\n{shape}, {n_rows} rows at context {context}: {n_bytes / 2**30:.2f} GiB of weights and cache a step")
    show("decode", rates := spread([n_rows / s for s in step_s]), "tok/s")
    show("share of copy bandwidth", shares := spread([n_bytes / s / 1e9 / facts["copy_gb_per_s"] for s in step_s]), "")
    case = {"shape": shape, "rows": n_rows, "context": context, "bytes": n_bytes}
    return case | {"tokens_per_s": rates, "share_of_copy_bandwidth": shares}


def ready_model(shape: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A random model, compiled on a GPU; what was compiled and held before is forgotten."""
    forget_the_last_case(device)
    model = random_model(SHAPES[shape], device, dtype)
    if device.type == "cuda":
        model.compile_blocks()
    return model


def random_prompts(model: Transformer, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(model.config.vocab_size), k=length) for length in lengths]


def measure_rollouts(args, device: torch.device, dtype: torch.dtype, facts: dict) -> list[dict]:
    return [
        attempt(
            f"rollouts {case} {lengths}", partial(rollouts, args, device, dtype, facts, *case, lengths), in_full=True
        )
        for case in cases(args, "rollouts")
        for lengths in args.lengths
    ]


def rollouts(args, device, dtype, facts: dict, shape: str, rows: int, lengths: str) -> dict:
    """Groups of 8 completions, four times as many requests as slots."""
    model = ready_model(shape, device, dtype)
    work = rollout_workload(args, model, rows, lengths == "ragged")
    print(f"\n{shape}: {work.name}")
    ours = our_generate(model, work.rows)
    costs = first_call(model, ours, work, device)
    jobs = {"ours": ours} | load_peers(peer_names(args, dtype), device, partial(like, model))
    first, runs = compare(jobs, work, work, args.repeats, device)
    result = report(work, first, runs)
    rate = result["runs"]["ours"]["tokens_per_s"]["median"]
    costs["share_of_bandwidth_roofline"] = rate / roofline(model, work, facts["copy_gb_per_s"] * 1e9)
    for name, value in costs.items():
        print(f"  {name:34s} {value:9.4g}")
    return result | {"shape": shape} | costs


def first_call(model: Transformer, ours: Generate, work: Workload, device: torch.device) -> dict[str, float]:
    """What the first call costs beyond the next one, what is compiled in each, and the share of prefill in the next."""
    marks = [(n_compiled(), compile_s())]
    runs, clock = [], PrefillClock(model)
    for seed in (0, 1):
        prefill_s = clock.total_s()
        runs.append(run_once(ours, work, seed, device))
        marks.append((n_compiled(), compile_s()))
    return {
        "first_call_extra_s": runs[0].wall_s - runs[1].wall_s,
        "first_call_compile_s": marks[1][1] - marks[0][1],
        "first_call_graphs_compiled": marks[1][0] - marks[0][0],
        "second_call_graphs_compiled": marks[2][0] - marks[1][0],
        "prefill_share": (clock.total_s() - prefill_s) / runs[1].wall_s,
        "peak_memory_gib": peak_memory_gib(),
    }


def roofline(model: Transformer, work: Workload, bandwidth: float) -> float:
    """Tokens a second at which full slots read weights and cache, at the contexts of their lives, at this bandwidth."""
    pairs = list(zip(work.prompts, work.limits, strict=True))
    context = sum((len(prompt) + limit / 2) * limit for prompt, limit in pairs) / sum(work.limits)
    return work.rows * bandwidth / (weight_bytes(model) + cache_bytes(model, work.rows * context))


def rollout_workload(args, model: Transformer, rows: int, is_ragged: bool) -> Workload:
    """Prompts of about 128 tokens; a group's length is drawn from a lognormal distribution, cut at the limit."""
    n_prompts, rng = rows * 4 // 8, random.Random(0)
    drawn = [min(args.limit, 1 + int(rng.lognormvariate(math.log(0.3 * args.limit), 0.8))) for _ in range(n_prompts)]
    fixed = [max(1, round(statistics.mean(drawn)))] * n_prompts
    limits, width = (drawn if is_ragged else fixed), 8 if args.quick else 128
    prompts = random_prompts(model, [rng.randint(width * 3 // 4, width * 5 // 4) for _ in range(n_prompts)])
    kind = f"drawn lengths {min(limits)} to {max(limits)}" if is_ragged else f"all of {limits[0]} tokens"
    name = f"{n_prompts} prompts x 8, {rows} rows, {kind}, mean {statistics.mean(limits):.0f}"
    return Workload(name, prompts, 8, limits, rows)


class PrefillClock:
    """Time that a model's packed forward, which a sampler uses for prefill alone, has taken on its device."""

    def __init__(self, model: Transformer):
        self.is_cuda, self.moments = model.head_weight_VC.is_cuda, []
        model.register_forward_pre_hook(lambda *_: self.note())
        model.register_forward_hook(lambda *_: self.note())

    def note(self) -> None:
        if self.is_cuda:
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record()
        else:
            self.moments.append(time.perf_counter())

    def total_s(self) -> float:
        pairs = list(zip(self.moments[::2], self.moments[1::2], strict=True))
        if not self.is_cuda:
            return sum(end - start for start, end in pairs)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3


RUN_PART = {
    "decode": partial(measure_decode, part="decode"),
    "context": partial(measure_decode, part="context"),
    "rollouts": measure_rollouts,
}


# ---- the two sides


def our_generate(model: Transformer, rows: int) -> Generate:
    sampler = Sampler(model, rows)

    def generate(work: Workload, seed: int) -> list[int]:
        completions_PG = sampler.generate(
            work.prompts,
            n=work.n,
            max_new_tokens=work.limits,
            stop_ids=work.stop_ids,
            vocab_size=work.vocab_size,
            seed=seed,
        )
        return [len(completion.ids) for group in completions_PG for completion in group]

    return generate


def peer_names(args, dtype: torch.dtype) -> list[str]:
    """Of the dtype of the random weights, where none is named."""
    same = [name for name in PEERS if name.startswith(str(dtype).removeprefix("torch."))]
    return same if args.peers is None else args.peers


def load_peers(names: Sequence[str], device: torch.device, load: Callable) -> dict[str, Generate]:
    """transformers in each wanted way; a model for each dtype."""
    models, peers = {}, {}
    for name in names:
        dtype, cache = name.split("-")
        if dtype not in models:
            models[dtype] = attempt(name, lambda dtype=dtype: load(getattr(torch, dtype)).to(device).eval())
        if models[dtype]:
            generate = generate_paged if cache == "paged" else partial(generate_padded, cache)
            peers[f"transformers {name}"] = partial(generate, models[dtype])
    return peers


def load_transformers(folder: str, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def like(model: Transformer, dtype: torch.dtype):
    """transformers' model of the same shape and weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = dict(model.hf_config) or config_to_hf(model.config)
    with torch.device(model.head_weight_VC.device):
        other = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys), dtype=dtype)
    other.load_state_dict(model.state_dict(), strict=not model.config.tie_word_embeddings)
    return other


def sampling(work: Workload) -> dict:
    stop = {"eos_token_id": list(work.stop_ids) or None, "pad_token_id": work.stop_ids[0] if work.stop_ids else 0}
    return {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} | stop


@torch.inference_mode()
def generate_padded(cache: str, model, work: Workload, seed: int) -> list[int]:
    """Batches of as many rows as ours; all prompts as wide as the longest, so that shapes stay."""
    torch.manual_seed(seed)
    per_batch, width, lengths = work.rows // work.n, max(map(len, work.prompts)), []
    for start in range(0, len(work.prompts), per_batch):
        prompts, limits = (rows[start : start + per_batch] for rows in (work.prompts, work.limits))
        ids_BT = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
        mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        settings = sampling(work) | {"max_new_tokens": max(limits), "num_return_sequences": work.n}
        out_BT = model.generate(
            ids_BT, attention_mask=mask_BT, cache_implementation=None if cache == "dynamic" else cache, **settings
        )
        row_limits = [limit for limit in limits for _ in range(work.n)]
        rows = out_BT[:, width:].tolist()
        lengths += [useful(row, limit, work.stop_ids) for row, limit in zip(rows, row_limits, strict=True)]
    return lengths


def useful(ids: list[int], limit: int, stop_ids: Sequence[int]) -> int:
    """Tokens up to and including the first stop token, or the limit.

    >>> useful([7, 2, 2, 2], 3, (2,)), useful([7, 7, 7], 3, (2,))
    (2, 3)
    """
    return next((i + 1 for i, token in enumerate(ids[:limit]) if token in stop_ids), min(limit, len(ids)))


def generate_paged(model, work: Workload, seed: int) -> list[int]:
    """transformers' continuous batching, whose requests have limits of their own."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    settings = sampling(work) | ({} if work.stop_ids else {"eos_token_id": -1})
    config = GenerationConfig(max_new_tokens=max(work.limits), **settings)
    share = 0.5 if model.device.type == "cuda" else 0.1  # of the free memory, for its cache; there are others here
    batching = ContinuousBatchingConfig(max_requests_per_batch=work.rows, max_memory_percent=share, seed=seed)
    requests = [pair for pair in zip(work.prompts, work.limits, strict=True) for _ in range(work.n)]
    lengths = []
    with model.continuous_batching_context_manager(
        config, continuous_batching_config=batching, persistent_manager=True
    ) as manager:
        for prompt, limit in requests:
            manager.add_request(prompt, max_new_tokens=limit)
        while len(lengths) < len(requests):
            result = manager.get_result(timeout=1)
            if result and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                lengths.append(len(result.generated_tokens))
            elif not result and not manager.is_running():
                raise RuntimeError("its thread has ended without results")
    return lengths


# ---- taking turns


def run_once(generate: Generate, work: Workload, seed: int, device: torch.device) -> Run:
    synchronize(device)
    start_s = time.perf_counter()
    lengths = generate(work, seed)
    synchronize(device)
    return Run(time.perf_counter() - start_s, lengths)


def compare(
    jobs: dict[str, Generate], warm: Workload, work: Workload, repeats: int, device: torch.device
) -> tuple[dict[str, Run], dict[str, list[Run]]]:
    """First runs of the warm-up workload, then turns of the real one; by name."""

    def take(name: str, work: Workload, seed: int) -> Run | None:
        run = partial(run_once, jobs[name], work, seed, device)
        return run() if name == "ours" else attempt(name, run)

    first = {name: run for name in jobs if (run := take(name, warm, 0))}
    runs: dict[str, list[Run]] = {name: [] for name in first}
    alive = list(first)
    for turn in range(1, repeats + 1):
        for name in list(alive):
            if run := take(name, work, turn):
                runs[name].append(run)
                print(f"  turn {turn}: {name:32s} {run.rate:9.4g} tok/s", flush=True)
            else:
                alive.remove(name)
                del runs[name]
        best = max((runs[name][0].rate for name in alive if name != "ours"), default=0)
        alive = [name for name in alive if name == "ours" or runs[name][0].rate >= FAR_BEHIND * best]
    return first, runs


def report(work: Workload, first: dict[str, Run], runs: dict[str, list[Run]]) -> dict:
    """Rates and lengths of everyone, and ours against the best peer, turn by turn."""
    print(f"\n{work.name}")
    result = {"workload": work.name, "runs": {}}
    for name, own in runs.items():
        show(name, rates := spread([run.rate for run in own]), "tok/s")
        lengths = [length for run in own for length in run.lengths]
        shape = {"mean": statistics.mean(lengths), "min": min(lengths), "max": max(lengths)}
        shape["cut"] = sum(length >= max(work.limits) for length in lengths) / len(lengths)
        print(f"  {'':34s} lengths " + ", ".join(f"{key} {value:.3g}" for key, value in shape.items()))
        result["runs"][name] = {"tokens_per_s": rates, "lengths": shape, "first_s": first[name].wall_s}
    peers = [name for name in runs if name != "ours"]
    if not peers:
        return result
    peer = max(peers, key=lambda name: (len(runs[name]), statistics.median(run.rate for run in runs[name])))
    ratios = [mine.rate / theirs.rate for mine, theirs in zip(runs["ours"], runs[peer], strict=True)]
    show(f"ours / {peer}", ratio := spread(ratios), "x")
    return result | {"best_peer": peer, "ratio": ratio}


if __name__ == "__main__":
    main()
