"""The transformer, in one file: GPT-2, Llama, Qwen2 and Qwen3 are settings of it.

One layout: `forward` takes sequences laid end to end (`ids_N`, `cu_seqlens_B1`) and returns the final hidden states;
`logits` multiplies by the vocabulary when somebody needs it. `decode` advances many sequences by one token each over a
KVCache. Parameter names are Hugging Face's.

Sources: GPT-2 (Radford et al. 2019), Llama (2302.13971, 2407.21783 for the rope scaling), Qwen2.5 (2412.15115),
Qwen3 (2505.09388); rotary positions 2104.09864; RMSNorm 1910.07467; SwiGLU 2002.05202.

Left out: mixture of experts, sliding windows, dropout, encoder-decoder.
"""

import math
import platform
from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanor1.attention import attention, cached_attention, hide_behind
from nanor1.packing import Layout, TileTable, layout, spread, to_device
from nanor1.run.machine import free_memory
from nanor1.weights import ModelConfig, read_config, read_parameters, write_folder

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


NARROW = 256  # width under which the products of a model gain nothing from reordered weights
REORDERED_ROWS = 64  # of the products that their layout is chosen for; those of 1 to 512 rows are as fast with it


def can_reorder(weight: Tensor) -> bool:
    """Whether oneDNN has a layout of its own for such a matrix: fp32, or bf16 where it multiplies it, on an x86 CPU."""
    is_x86 = weight.device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    if not is_x86 or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    is_bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return is_bf16 or weight.dtype == torch.float32


def reorder(weight: Tensor) -> Tensor:
    """A copy of a matrix, laid out as oneDNN reads it.

    For few rows F.linear takes as long to put the matrix in order as to multiply. torch keeps the operation that does
    it once, and the one that multiplies by it, for what torch.compile freezes (oneDNN's guide, "Memory Format
    Propagation").
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), REORDERED_ROWS)


def reordered_linear(
    x_NC: Tensor, reordered: Tensor, bias: Tensor | None = None, other: Tensor | None = None, then: str = "none"
) -> Tensor:
    """x W^T + b, W from `reorder`; then "swish", or "add" or "mul" of the other. Rounded once, and without gradient."""
    if other is None:
        return torch.ops.mkldnn._linear_pointwise(x_NC, reordered, bias, then, [], "")
    return torch.ops.mkldnn._linear_pointwise(x_NC, other, reordered, bias, then)


class Linear(nn.Linear):
    reordered: Tensor | None = None  # the same matrix for sampling on a CPU: see Transformer.reorder_weights

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x W^T + b, and the residual where one is given."""
        if self.reordered is not None and torch.is_inference_mode_enabled():
            return reordered_linear(x, self.reordered, self.bias, residual, "none" if residual is None else "add")
        if self.bias is not None and torch.compiler.is_compiling() and len(x) == 1:
            out = F.linear(x, self.weight) + self.bias  # inductor makes one kernel of this; where they are one, BLAS
        else:
            out = F.linear(x, self.weight, self.bias)
        return out if residual is None else residual + out


def _keeps_little(x: Tensor) -> bool:
    """Whether what the backward needs is chosen by hand: on a CPU; torch.compile chooses by itself."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if _keeps_little(x):
            return _LeanRMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # in fp32 inside


class _LeanRMSNorm(torch.autograd.Function):
    """F.rms_norm, of which autograd keeps several fp32 copies of x on a CPU, and this x alone.

    With n = x r, r = (mean(x^2) + eps)^-1/2 and y = n w:  dw = sum dy n,  dx = r (dy w - n mean(dy w n)).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_C)
        ctx.eps = eps
        return F.rms_norm(x, weight_C.shape, weight_C, eps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_C = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square().div(x.shape[-1]).add(ctx.eps).rsqrt()
        normed, grad = x * r, grad.to(wide)
        grad_weight_C = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight_C
        share = torch.linalg.vecdot(grad, normed)[..., None] / x.shape[-1]
        return torch.addcmul(grad, normed, share, value=-1).mul_(r).to(x.dtype), grad_weight_C.to(weight_C.dtype), None


def make_norm(config: ModelConfig) -> nn.Module:
    if config.is_layer_norm:
        return nn.LayerNorm(config.hidden_size, config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x [N, H, D] by each token's angle; cos and sin are [N, 1, D], sin signed."""
    x_fp32 = x.float()
    return torch.addcmul(x_fp32 * cos, x_fp32.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, C, bias=config.output_bias)
        self.q_norm, self.k_norm = (RMSNorm(D, config.norm_eps) if config.has_qk_norm else None for _ in range(2))
        self.head_dim = D
        self.reordered: tuple[Tensor, Tensor | None] | None = None  # q, k and v in one, for sampling on a CPU

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, C] -> q [N, H, D], k [N, K, D], v [N, K, D], normalised and rotated."""
        projections = self.q_proj, self.k_proj, self.v_proj
        if self.reordered is None or not torch.is_inference_mode_enabled():
            projected = [proj(x) for proj in projections]
        else:
            projected = reordered_linear(x, *self.reordered).split([proj.out_features for proj in projections], dim=-1)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in projected)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        return q, k, v


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(C, width, bias=bias) if config.is_gated else None
        self.up_proj = Linear(C, width, bias=bias)
        self.down_proj = Linear(width, C, bias=bias)
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {config.hidden_act!r} is not supported; choose of {', '.join(ACTIVATIONS)}")
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)), residual)
        if self.up_proj.reordered is not None and torch.is_inference_mode_enabled() and self.act is F.silu:
            gate = reordered_linear(x, self.gate_proj.reordered, self.gate_proj.bias, then="swish")
            product = reordered_linear(x, self.up_proj.reordered, self.up_proj.bias, gate, "mul")
        elif _keeps_little(x):  # the two factors alone
            parts = self.gate_proj(x), self.up_proj(x)
            product = checkpoint(self.gated, *parts, use_reentrant=False, preserve_rng_state=False)
        else:
            product = self.gated(self.gate_proj(x), self.up_proj(x))
        return self.down_proj(product, residual)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act(gate) * up


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope, attend: Callable, *context) -> Tensor:
        """x [N, C] -> [N, C]; `attend(q, k, v, *context)` is attention over whatever the caller attends to."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), rope)
        x = self.self_attn.o_proj(attend(q, k, v, *context).flatten(1), residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


def _tiles(where: Layout) -> TileTable | None:
    """What the Triton kernels work on, made once for all layers; None where there are no such kernels."""
    return where.tiles() if where.cu_seqlens_B1.is_cuda else None


def allow_programs() -> None:
    """Let torch.compile make more programs of one function than 8, from which on it would run it uncompiled.

    All models' blocks are one function to it, and each model has up to five programs: with a gradient, behind shared
    prompts, in its backward again, decoding, and of one row.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


def _attend_packed(q, k, v, where: Layout, k_SKTD: Tensor | None, v_SKTD: Tensor | None) -> Tensor:
    """Attention within packed sequences, whose keys and values are also written to a cache if one is given."""
    if k_SKTD is not None:
        k_SKTD[where.row_N, :, where.position_N] = k
        v_SKTD[where.row_N, :, where.position_N] = v
    if keys := where.shared:
        k, v = spread(k, keys), spread(v, keys)
    elif keys := where.cached:
        k, v = k_SKTD[keys.row_J, :, keys.position_J], v_SKTD[keys.row_J, :, keys.position_J]
    return attention(q, k, v, where.cu_seqlens_B1, where.cu_seqlens_k_B1, where.table)


def _attend_cached(q, k, v, k_SKTD: Tensor, v_SKTD: Tensor, row_B: Tensor, position_B: Tensor, *where) -> Tensor:
    """Attention of one token a row to the cache, to which its own key and value are added first."""
    k_SKTD[row_B, :, position_B] = k
    v_SKTD[row_B, :, position_B] = v
    return cached_attention(q, k_SKTD, v_SKTD, *where)


def make_embedding(n: int, width: int) -> nn.Embedding:
    """nn.Embedding, but for its own initialisation, which on the meta device imports torch._dynamo for two seconds."""
    weight = torch.empty(n, width)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(), freeze=False)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.hf_config: dict = {}  # the config.json it was loaded from; what config does not know is saved again
        self.checkpoints_activations = False  # keep only each block's input for the backward, and run it again there
        self.attend_packed = _attend_packed  # compile_blocks may take it out of the graph
        self.reordered_head: Tensor | None = None  # see reorder_weights
        self.reordered_versions: list[int] | None = None  # of the parameters that were reordered
        self.model = nn.Module()
        self.model.embed_tokens = make_embedding(config.vocab_size, config.hidden_size)
        if config.rope_theta is None:
            self.model.embed_positions = make_embedding(config.max_position_embeddings, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = make_norm(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        # no buffer: `.to(bfloat16)` would round it
        self.rope_frequencies = None if config.rope_theta is None else rope_frequencies(config)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "Transformer":
        """Load a Hugging Face folder in `dtype` (None: the file's own) onto `device`.

        ValueError says in one sentence what is missing, damaged or not supported.
        """
        hf_config, config = read_config(folder)
        with torch.device("meta"):
            model = cls(config)
        model.hf_config = hf_config
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        model.load_state_dict(dict(read_parameters(folder, config, shapes, dtype, device)), assign=True)
        return model

    @classmethod
    def from_scratch(
        cls, folder: str | Path, seed: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "Transformer":
        """Fresh weights for the config.json in a folder, which needs no weights; the same for a seed on every device.

        As in GPT-2 (Radford et al. 2019, section 2.3): deviation 0.02, for the projections back into the residual
        stream 0.02 / sqrt(2 layers), biases 0.
        """
        hf_config, config = read_config(folder)
        model = cls(config)
        model.hf_config = hf_config
        generator, layers = torch.Generator().manual_seed(seed), config.num_hidden_layers
        with torch.no_grad():
            for name, p in model.named_parameters():
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                if p.dim() == 2:
                    p.normal_(std=0.02 * (2 * layers) ** -0.5 if is_residual else 0.02, generator=generator)
                elif name.endswith("bias"):
                    p.zero_()
        return model.to(device=device, dtype=dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers loads too; tied weights are written once."""
        write_folder(folder, self.config, self.hf_config, self.state_dict())

    def compile_blocks(self, **options) -> None:
        """Compile each block in place, for forwards with a gradient and for decoding in slots; parameter names stay.

        All blocks share a program, and all lengths do, but for the limits at which torch changes its plan (4,096 tokens
        on a CPU). Without Triton kernels attention stays outside: it looks at lengths, and would be compiled again for
        each. With them shared prompts are a program of their own. `options` are torch.compile's.
        """
        allow_programs()
        if not self.head_weight_VC.is_cuda or self.head_weight_VC.dtype == torch.float32:
            self.attend_packed = torch.compiler.disable(_attend_packed)
        for block in self.model.layers:
            block.compile(dynamic=True, **options)

    def reorder_weights(self) -> None:
        """On a CPU, for sampling: keep a second copy of each matrix, laid out as oneDNN reads it.

        Products of few rows are 1.2 to 2 times as fast (LOG.md). Copies are made anew when weights have changed since,
        and dropped by the next forward with a gradient: they would be stale soon, and their memory is wanted. Inference
        mode alone, in which samplers work, takes them: what a model scores (no_grad) must not depend on whether it has
        sampled before. Where there is not twice the memory, or no such layout, nothing is done. Of replicas that share
        weights (gradient.py) only the one that is updated may sample: a change does not show in the others' versions.
        """
        versions = [0 if p.is_inference() else p._version for p in self.parameters()]
        if versions == self.reordered_versions:
            return
        self.drop_reordered()
        head_VC = self.head_weight_VC
        if self.config.hidden_size < NARROW or not can_reorder(head_VC):
            return
        if 2 * sum(p.nbytes for p in self.parameters()) > free_memory(head_VC.device):
            return
        for block in self.model.layers:
            projections = block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj
            biases = [proj.bias for proj in projections if proj.bias is not None]
            matrix = reorder(torch.cat([proj.weight for proj in projections]))
            block.self_attn.reordered = matrix, torch.cat(biases) if biases else None
            for part in (block.self_attn.o_proj, *block.mlp.children()):
                if isinstance(part, Linear):
                    part.reordered = reorder(part.weight)
        self.reordered_head, self.reordered_versions = reorder(head_VC), versions

    def __getstate__(self) -> dict:
        self.drop_reordered()  # which can neither be copied nor pickled
        return super().__getstate__()

    def _apply(self, *arguments, **options) -> "Transformer":
        self.drop_reordered()  # which do not follow to another device or dtype, as by `.to()`
        return super()._apply(*arguments, **options)

    def drop_reordered(self) -> None:
        if self.reordered_versions is not None:
            self.reordered_head = self.reordered_versions = None
            for part in self.modules():
                if isinstance(part, (Linear, Attention)):
                    part.reordered = None

    def training_flops(self, n_tokens: int, n_pairs: int, n_targets: int) -> float:
        """Floating-point operations of a forward and a backward over packed tokens, as model FLOPs utilisation counts.

        A multiply-add of a weight is 6 a token (2 forward, 4 backward): the blocks' matrices for all tokens, the head
        for the `n_targets` that have a loss, the embedding not at all. Attention is 12 H D a layer and pair of query
        and key, of which there are `n_pairs` (nanor1.packing.attended_pairs): a pair that the causal mask hides is not
        counted, where PaLM (2204.02311, appendix B) counts all T of a query. What is computed twice is counted once.
        """
        config, head_VC = self.config, self.head_weight_VC
        n_weights = sum(p.numel() for p in self.model.layers.parameters() if p.dim() == 2)
        attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * n_pairs
        return 6.0 * (n_weights * n_tokens + head_VC.numel() * n_targets) + attention

    @property
    def head_weight_VC(self) -> Tensor:
        """The output matrix; the embedding itself where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, C] -> logits [N, V]: fp32 on CUDA, where products of bf16 are to be had unrounded."""
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, self.head_weight_VC.t(), out_dtype=torch.float32)
        if self.reordered_head is None or not torch.is_inference_mode_enabled():
            return F.linear(hidden, self.head_weight_VC)
        return reordered_linear(hidden, self.reordered_head)

    def forward(
        self,
        ids_N: Tensor,
        cu_seqlens_B1: Tensor,
        cache: "KVCache | None" = None,
        parent_B: Tensor | None = None,
        past_B: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [N, C] of packed sequences, each attending to itself causally.

        With a cache, the keys and values of sequence b are also written to its row b (prefill). With `parent_B` [B],
        sequence b continues the earlier sequence parent_B[b] (-1: none) and attends to that one, too. With `past_B` [B]
        it continues the past_B[b] tokens that row b of the cache holds already. These three are best on the CPU,
        wherever the model is: see `layout`.
        """
        where = to_device(layout(cu_seqlens_B1, parent_B, past_B), ids_N.device)
        where.table = _tiles(where)
        caches = zip(cache.k, cache.v, strict=True) if cache else repeat((None, None))
        # a prefill is never compiled: it would need programs of its own
        run_block = Block.__call__ if torch.is_grad_enabled() else Block.forward
        if torch.is_grad_enabled() and self.checkpoints_activations:
            run_block = partial(checkpoint, run_block, use_reentrant=False)
        return self._run(ids_N, where.position_N, run_block, self.attend_packed, ((where, *kv) for kv in caches))

    def decode(
        self,
        ids_B: Tensor,
        position_B: Tensor,
        cache: "KVCache",
        max_len: int,
        slot_B: Tensor | None = None,
        is_running_B: Tensor | None = None,
        run_block: Callable | None = None,
    ) -> Tensor:
        """Hidden states [B, C] of one further token, at position_B of cache rows slot_B (None: 0..B-1).

        The cache is extended. `max_len` is at least position_B.max() + 1: how much of the cache is looked at. With
        slots, rows that are not running attend to nothing; their hidden states mean nothing. `run_block` stands in for
        calling a block, which is its first argument.
        """
        length_B, row_B, bias_BT = position_B + 1, slot_B, None
        if slot_B is None:
            row_B, bias_BT = torch.arange(len(ids_B), device=ids_B.device), hide_behind(length_B, max_len)
        else:
            length_B = torch.where(is_running_B, length_B, 0)
        where = (row_B, position_B, slot_B, length_B, max_len, bias_BT)
        contexts = ((*kv, *where) for kv in zip(cache.k, cache.v, strict=True))
        run_block = run_block or (Block.forward if slot_B is None else Block.__call__)
        return self._run(ids_B, position_B, run_block, _attend_cached, contexts)

    def _run(
        self, ids_N: Tensor, position_N: Tensor, run_block: Callable, attend: Callable, contexts: Iterable[tuple]
    ) -> Tensor:
        if torch.is_grad_enabled():
            self.drop_reordered()
        x = self.model.embed_tokens(ids_N)
        if self.config.rope_theta is None:
            x, rope = x + self.model.embed_positions(position_N), None
        else:
            rope = self.rope_angles(position_N)
        for block, context in zip(self.model.layers, contexts, strict=False):
            x = run_block(block, x, rope, attend, *context)
        return self.model.norm(x)

    def rope_angles(self, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """cos of each token's angles for both halves of a head, and sin with each half's sign: [N, 1, D] in fp32."""
        if self.rope_frequencies.device != position_N.device:
            self.rope_frequencies = self.rope_frequencies.to(position_N.device)
        angle = position_N[:, None, None].float() * self.rope_frequencies
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position for each of the D/2 pairs, fp32 on the CPU (2104.09864, section 3.2.2)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    # llama3: how much of a pair's frequency is kept follows from its turns within the original context
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)


class KVCache:
    """Keys and values of `n_rows` sequences of up to `max_len` tokens: for each layer k and v of [rows, K, T, D].

    They have the dtype of the model's weights, and are where these are.
    """

    def __init__(self, model: Transformer, n_rows: int, max_len: int):
        config, weight = model.config, model.head_weight_VC
        shape = (n_rows, config.num_key_value_heads, max_len, config.head_dim)
        self.k = [weight.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros_like(k) for k in self.k]

    @property
    def max_len(self) -> int:
        return self.k[0].shape[2]

    def resize(self, max_len: int) -> None:
        """Make rows longer or shorter, a layer at a time; what of their tokens still fits is kept."""
        for layers in (self.k, self.v):
            for i, old in enumerate(layers):
                layers[i] = F.pad(old, (0, 0, 0, max_len - old.shape[2]))

    def copy_rows(self, source: "KVCache", from_rows: Tensor, to_rows: Tensor, length: int) -> None:
        """Copy the first `length` positions of rows of `source` (this cache or another) into rows of this one."""
        for mine, theirs in ((self.k, source.k), (self.v, source.v)):
            for to_layer, from_layer in zip(mine, theirs, strict=True):
                to_layer[to_rows, :, :length] = from_layer[from_rows, :, :length]
