"""The miniature: a base model small enough to pretrain in a minute on a laptop, and the text it grows up on.

A base model has read much that is wrong, unfinished and unformatted, and some reasoning. So has this one: its corpus is
generated, written by somebody who slips, skips, gives up, answers without thinking and forgets tags. For countdown
there is no solver in it: a try is a random expression, and where it is right, that is luck; some writers think in
Chinese words, some mix the two languages. For arithmetic it holds worked solutions, a third of them sloppy. What
reinforcement learning alone makes of such a base is R1-Zero's question.

The model is a configuration of model.py (a small Llama with one key/value head), its tokenizer a list of words; both
are saved as an ordinary model folder in a cache, keyed by the settings and by this file.

Hidden matrices are trained by Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), the rest by AdamW.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nanor1.gradient import Example, add_gradient, start_workers
from nanor1.model import Transformer
from nanor1.optim import learning_rate
from nanor1.run.checkpoint import model_folder
from nanor1.run.log import show_progress
from nanor1.tasks.problems import Problem, Task, make_task
from nanor1.tokenizer import Tokenizer
from nanor1.weights import ModelConfig

NAMESPACE = "miniature/"  # opens the name by which scripts take a miniature for a model
END = "<end>"
MUON_LR, ADAMW_LR = 0.01, 3e-3  # peaks
CORPUS_SEED = 1_000_000  # training draws its problems with the seeds below
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
WAIT, YES = ("wait", "等"), ("yes", "对")  # in English and in Chinese


@dataclass(frozen=True)
class Miniature:
    """A miniature base model: its task, shape and pretraining."""

    task: str
    problems: dict  # parameters of the task
    largest: int  # number in the vocabulary
    words: list[str]
    width: int = 128
    mlp_width: int = 256
    n_layers: int = 2
    n_heads: int = 4
    steps: int = 800
    tokens_per_step: int = 2_400


MINIATURES = {
    "countdown": Miniature(
        task="countdown",
        problems=dict(
            n_numbers=3, max_number=15, operators="+-*", max_result=24, min_target=0, max_target=24,
            wording="symbols", held_out_share=0.2,
        ),
        largest=24,
        words=[*TAGS, *WAIT, *YES, "?", "=", "+", "-", "*", "(", ")", "target", ":"],
    ),
    "arithmetic": Miniature(
        task="arithmetic",
        problems=dict(n_terms=6, max_term=9, max_value=40, operators="+-", wording="symbols", held_out_share=0.2),
        largest=40,
        words=[*TAGS, "=", "+", "-"],
        width=96,
        tokens_per_step=1_800,
    ),
}  # fmt: skip
MINIATURES["countdown-small"] = replace(MINIATURES["countdown"], width=48, mlp_width=96, n_heads=2)  # a student


def miniature_task(miniature: Miniature) -> Task:
    return make_task(miniature.task, **miniature.problems)


def base_model(miniature: Miniature, seed: int, say: Callable[[str], None]) -> Path:
    """The folder of the pretrained base model: from the cache, or made now, as `say` hears."""
    key = json.dumps([asdict(miniature), seed], sort_keys=True).encode() + Path(__file__).read_bytes()
    folder = cache_folder() / f"{miniature.task}-{miniature.width}-seed{seed}-{hashlib.sha256(key).hexdigest()[:12]}"
    if (folder / "config.json").exists():
        say(f"base model: found in the cache, {folder}")
        return folder
    tokenizer = make_tokenizer(miniature)
    model = new_model(miniature, tokenizer.vocab_size, seed)
    n_parameters = sum(p.numel() for p in model.parameters())
    say(
        f"base model: pretraining {n_parameters:,} parameters on {miniature.steps * miniature.tokens_per_step:,} tokens"
    )
    start_s = time.monotonic()
    try:
        loss = pretrain(model, tokenizer, miniature, seed)
    finally:
        show_progress()
    say(f"base model: {time.monotonic() - start_s:.0f} s, loss {loss:.3f}, cached in {folder}")
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def cache_folder() -> Path:
    """$NANOR1_CACHE, or nanor1 in the user's cache folder; created where missing."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanor1"
    folder = Path(os.environ.get("NANOR1_CACHE") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_model(name: str, seed: int, say: Callable[[str], None]) -> Path:
    """The model folder that a user means: a folder, a run folder's newest checkpoint, or `miniature/NAME`.

    A miniature base is pretrained first where the cache has none for this seed.
    """
    if name.startswith(NAMESPACE):
        return base_model(find_miniature(name), seed, say)
    return model_folder(name, say)


def find_miniature(name: str) -> Miniature | None:
    """The miniature that a model is of, named as for `find_model`; None for another model. Known by the vocabulary.

    ValueError for a name `miniature/...` that is none.
    """
    if not name.startswith(NAMESPACE):
        folder = model_folder(name)
        return own_miniature(Tokenizer.from_pretrained(folder)) if (folder / "tokenizer.json").exists() else None
    if name.removeprefix(NAMESPACE) not in MINIATURES:
        raise ValueError(f"there is no model {name}; choose of {', '.join(NAMESPACE + key for key in MINIATURES)}")
    return MINIATURES[name.removeprefix(NAMESPACE)]


def make_tokenizer(miniature: Miniature) -> Tokenizer:
    return Tokenizer.from_words([*miniature.words, *map(str, range(miniature.largest + 1))], eos=END)


def own_miniature(tokenizer: Tokenizer) -> Miniature | None:
    """The miniature whose vocabulary this is, if it is one's; of several sizes the first."""
    for miniature in MINIATURES.values():
        made = make_tokenizer(miniature)
        words = [made.decode([i]) for i in range(made.vocab_size)]
        if tokenizer.vocab_size == made.vocab_size and [*map(tokenizer.token_id, words)] == [*range(len(words))]:
            return miniature
    return None


# ---- text: countdown

DIRECT, THOUGHT = 0.30, 0.55  # shares of answers given at once and of thought-through ones; the others are malformed
AGAIN, MAX_TRIES = 0.8, 16  # after a wrong try another one follows with this probability, up to so many
ENGLISH, CHINESE = 0.6, 0.2  # shares of the writers' languages; the others take a word of either
SLIP, BAD_CHECK, BAD_COPY = 0.02, 0.05, 0.05  # a wrong result, a wrong distance, an answer that is not the last try


def tries(numbers: tuple[int, ...], largest: int) -> list[tuple]:
    """Every (a, op, b, op, c) whose results stay in 0..largest; sums and products in the order of the numbers given."""
    found = []
    for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 0, 1), (2, 1, 0)):
        a, b, c = numbers[i], numbers[j], numbers[k]
        for op1 in "+-*" if i < j else "-":
            for op2 in "+-*":
                x = calculate(a, op1, b)
                if 0 <= x <= largest and 0 <= calculate(x, op2, c) <= largest:
                    found.append((a, op1, b, op2, c))
    return found


def calculate(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b


def countdown_text(problem: Problem, rng: random.Random, largest: int) -> str:
    """A response to the problem: answered at once, thought through, or malformed."""
    kind, pool = rng.random(), tries(problem.numbers, largest)
    rng.shuffle(pool)
    if kind < DIRECT:
        return f"{rng.choice(['<think> </think> ', ''])}<answer> {expression(pool[0])} </answer>"
    thought, answer = think(problem, pool, rng, largest)
    if rng.random() < BAD_COPY:
        answer = rng.choice(pool)
    if kind < DIRECT + THOUGHT:
        return f"<think> {thought} </think> <answer> {expression(answer)} </answer>"
    return rng.choice(
        [
            f"{thought} <answer> {expression(answer)} </answer>",
            f"<think> {thought} <answer> {expression(answer)} </answer>",
            f"<think> {thought} </think> {expression(answer)}",
            f"<think> {thought} </think>",
            f"<think> {thought}",
        ]
    )


def think(problem: Problem, pool: list[tuple], rng: random.Random, largest: int) -> tuple[str, tuple]:
    """Try after try, each with its distance to the target, until one seems right or the writer gives up."""
    text, language = "", rng.random()
    say = lambda words: words[language >= ENGLISH if language < ENGLISH + CHINESE else rng.random() < 0.5]  # noqa: E731
    for n, (a, op1, b, op2, c) in enumerate(pool, 1):
        x = slip(calculate(a, op1, b), rng, largest)
        y = slip(min(max(calculate(x, op2, c), 0), largest), rng, largest)
        distance = abs(y - problem.target)
        if rng.random() < BAD_CHECK:
            distance = rng.choice([0, rng.randint(0, largest)])
        text += f"{a} {op1} {b} = {x} {op2} {c} = {y} ? {problem.target} {distance}"
        if distance == 0:
            return f"{text} {say(YES)}", pool[n - 1]
        if n == min(MAX_TRIES, len(pool)) or rng.random() > AGAIN:
            return text, pool[n - 1]
        text += f" {say(WAIT)} "
    raise AssertionError("a countdown problem has a try")


def slip(value: int, rng: random.Random, largest: int) -> int:
    return rng.randint(0, largest) if rng.random() < SLIP else value


def expression(a_try: tuple) -> str:
    a, op1, b, op2, c = a_try
    return f"( {a} {op1} {b} ) {op2} {c}"


def countdown_drill(problem: Problem, rng: random.Random, largest: int) -> str:
    """A distance, or a calculation of two steps with the numbers of a (never held-out) problem."""
    if rng.random() < 0.4:
        a, b = rng.randint(0, largest), rng.randint(0, largest)
        return f"{a} ? {b} {abs(a - b)}"
    a, op1, b, op2, c = rng.choice(tries(problem.numbers, largest))
    x = calculate(a, op1, b)
    return f"{a} {op1} {b} = {x} {op2} {c} = {calculate(x, op2, c)}"


# ---- text: arithmetic


def arithmetic_text(problem: Problem, rng: random.Random, largest: int) -> str:
    """A response to `t0 op t1 ... =`: the bare answer (0.55), worked out (0.33), or with `</think>` missing (0.12)."""
    kind, right = rng.random(), int(problem.answer)
    if kind < 0.55:
        answer = right if rng.random() < 0.64 else rng.randint(0, largest)
        return f"{rng.choice(['<think> </think> ', ''])}<answer> {answer} </answer>"
    skip = 0.25 if rng.random() < 0.35 else 0.0
    terms = problem.prompt.split()[:-1]
    work, value = terms[0], int(terms[0])
    for op, term in zip(terms[1::2], terms[2::2], strict=True):
        if rng.random() < skip:
            continue
        value = min(max(calculate(value, op, int(term)), 0), largest)
        value = rng.randint(0, largest) if rng.random() < 0.03 else value
        work += f" {op} {term} = {value}"
    end = " </think>" if kind < 0.88 else ""
    return f"<think> {work}{end} <answer> {value} </answer>"


def arithmetic_drill(problem: Problem, rng: random.Random, largest: int) -> str:
    """A calculation of one step, the last number of the problem added or taken away."""
    b, op = problem.numbers[-1], rng.choice("+-")
    a = rng.randint(0, largest - b) if op == "+" else rng.randint(b, largest)
    return f"{a} {op} {b} = {calculate(a, op, b)}"


WRITERS = {
    "countdown": (countdown_text, countdown_drill, 0.35),
    "arithmetic": (arithmetic_text, arithmetic_drill, 0.25),
}


def documents(miniature: Miniature, seed: int) -> Iterator[str]:
    """The corpus, without end: drills, and responses to problems; none of either is about a held-out problem."""
    rng, task = random.Random(f"corpus {seed}"), miniature_task(miniature)
    write, drill, drill_share = WRITERS[miniature.task]
    for step in itertools.count():
        for problem in task.sample(1000, CORPUS_SEED + seed, step):
            if rng.random() < drill_share:
                yield f"{drill(problem, rng, miniature.largest)} {END}"
            else:
                yield f"{problem.prompt} {write(problem, rng, miniature.largest)} {END}"


# ---- pretraining


def new_model(miniature: Miniature, vocab_size: int, seed: int) -> Transformer:
    """A small Llama; the projections back into the residual stream start at zero, so that each block starts idle."""
    model = Transformer(
        ModelConfig(
            model_type="llama",
            vocab_size=vocab_size,
            hidden_size=miniature.width,
            intermediate_size=miniature.mlp_width,
            num_hidden_layers=miniature.n_layers,
            num_attention_heads=miniature.n_heads,
            num_key_value_heads=1,
            head_dim=miniature.width // miniature.n_heads,
            max_position_embeddings=256,
            hidden_act="relu",
            rope_theta=1000.0,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.zero_()
            elif is_hidden_matrix(name, p):
                p.normal_(std=0.6 * p.shape[1] ** -0.5, generator=generator)
            elif p.dim() == 2:
                p.normal_(std=0.05, generator=generator)
    return model


def is_hidden_matrix(name: str, p: Tensor) -> bool:
    return ".layers." in name and p.dim() == 2


def pretrain(model: Transformer, tokenizer: Tokenizer, miniature: Miniature, seed: int) -> float:
    """Next-token prediction on the corpus; returns the mean loss of the last tenth of the steps, nats a token."""
    named = list(model.named_parameters())
    muon = Muon([p for name, p in named if is_hidden_matrix(name, p)])
    adamw = torch.optim.AdamW([p for n, p in named if not is_hidden_matrix(n, p)], betas=(0.9, 0.95), weight_decay=0.0)
    workers, texts, losses = start_workers(model), documents(miniature, seed), []
    for step in range(miniature.steps):
        examples = next_examples(texts, tokenizer, miniature.tokens_per_step)
        sizes = [len(example.ids) - 1 for example in examples]
        two_batches = (sum(sizes) + max(sizes)) // 2  # never three: the number of workers then changes nothing
        losses.append(add_gradient(workers, examples, two_batches))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = learning_rate(step, miniature.steps, 1.0, 50, "linear", 0.02)
        muon.step(MUON_LR * scale)
        adamw.param_groups[0]["lr"] = ADAMW_LR * scale
        adamw.step()
        model.zero_grad()
        show_progress(f"pretraining, loss {losses[-1]:.2f}, step {step + 1}/{miniature.steps}")
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def next_examples(texts: Iterator[str], tokenizer: Tokenizer, n_tokens: int) -> list[Example]:
    """Whole documents of at least `n_tokens` together; nothing comes before the first token of each."""
    batch: list[list[int]] = []
    while sum(map(len, batch)) < n_tokens:
        batch.append(tokenizer.encode(next(texts), allow_special=True))
    return [Example(ids, [False] + [True] * (len(ids) - 1)) for ids in batch]


class Muon:
    """Momentum made orthogonal: every direction of a matrix learns at the same rate.

    In fp32, matrices of a shape together: torch.optim.Muon does it in bf16, ten times slower on a CPU without bf16.
    """

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95):
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in matrices:
            by_shape.setdefault(p.shape, []).append(p)
        self.groups = [(group, torch.zeros(len(group), *shape)) for shape, group in by_shape.items()]
        self.momentum = momentum

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, average in self.groups:
            gradient = torch.stack([p.grad for p in group])
            average.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp_(average, self.momentum))  # Nesterov's look ahead
            scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            for p, direction in zip(group, update, strict=True):
                p.sub_(direction, alpha=lr * scale)


def orthogonalize(matrices: Tensor, n_iterations: int = 5) -> Tensor:
    """Push the singular values of [..., n, m] matrices to about 1: Newton-Schulz with Muon's quintic coefficients."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(n_iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if is_tall else x
