"""A model folder as Hugging Face writes it: config.json and safetensors, to a ModelConfig and tensors, and back.

Reads what transformers 4 writes (`rope_theta`, `rope_scaling`, `torch_dtype`) and what 5 does (`rope_parameters`,
`dtype`); writes back the config.json that was read. Weights are read one at a time into their dtype and place, so that
the peak of memory is the model's own size.

Left out: the hub (a folder is local), pickled weights, quantized weights, every family but those of FAMILIES.

Sources: the config.json and tensor names of openai-community/gpt2, meta-llama/Llama-3.2-1B, Qwen/Qwen2.5-0.5B and
Qwen/Qwen3-0.6B; the format of safetensors.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FAMILIES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
REWARD_MODELS = {
    family: re.sub("LMHeadModel|ForCausalLM", "ForSequenceClassification", name) for family, name in FAMILIES.items()
}
SCORE = "score.weight"  # a reward model's one row of output weights, in place of the output matrix
SUPPORTED = "nanor1 loads dense gpt2, llama, qwen2 and qwen3 models with full attention and unquantized weights"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BUFFER = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")  # stored by old versions; not parameters

# GPT-2's names in the file for ours. Its q, k and v are one matrix, and its matrices are transposed: [in, out].
GPT2_NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.layers": "transformer.h",
    "model.norm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are slowed for contexts longer than the first training's."""

    rope_type: str  # linear (2306.15595): all frequencies; llama3 (2407.21783): the slow ones
    factor: float
    low_freq_factor: float = 1.0  # llama3: slowed are those below so many turns in the original context,
    high_freq_factor: float = 4.0  # kept are those above so many, and between the two it is mixed
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """What differs between the supported models; names as in Hugging Face's config.json."""

    model_type: str  # gpt2, llama, qwen2, qwen3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope_theta: float | None = 10_000.0  # None: learned positions
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    is_gated: bool = True  # act(gate) * up; else act(up)
    has_qk_norm: bool = False
    is_layer_norm: bool = False  # else RMSNorm

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is int:
                size(vars(self), field.name)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions turn pairs, so it must be even")


def size(values: Mapping, name: str) -> int:
    """values[name]; ValueError where it is not a whole number of at least 1, KeyError where there is none."""
    if type(values[name]) is not int or values[name] < 1:
        raise ValueError(f"{name} is {values[name]!r}; it must be a whole number of at least 1")
    return values[name]


def read_config(folder: str | Path) -> tuple[dict, ModelConfig]:
    """The folder's config.json as it is, and as a ModelConfig; ValueError says what is missing or not supported."""
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise ValueError(f"no folder {folder}: download the model first; names on the hub are not looked up")
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json, so it is not a model folder")
    hf = read_json(path)
    try:
        return hf, config_from_hf(hf)
    except KeyError as error:
        raise ValueError(f"{path} has no {error}, which a model of type {hf['model_type']} needs") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def is_reward_model(folder: str | Path) -> bool:
    """Whether the model in the folder gives a text a score, and no next token; ValueError as from `read_config`."""
    hf, _ = read_config(folder)
    return REWARD_MODELS[hf["model_type"]] in (hf.get("architectures") or [])


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download or copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object; download or copy it again")
    return content


def config_from_hf(hf: Mapping) -> ModelConfig:
    """A parsed config.json as a ModelConfig; KeyError for a missing size, ValueError for what is not supported."""
    hf = {key: value for key, value in hf.items() if value is not None}
    if reason := reason_to_refuse(hf):
        raise ValueError(f"{reason}; {SUPPORTED}")
    return gpt2_config(hf) if hf["model_type"] == "gpt2" else rotary_config(hf)


def reason_to_refuse(hf: Mapping) -> str | None:
    """Why nanor1 would compute something else than this config asks for, or None."""
    if hf.get("model_type") not in FAMILIES:
        return f"model_type {hf.get('model_type')!r} is not supported"
    if "quantization_config" in hf:
        method = hf["quantization_config"].get("quant_method", "unnamed")
        return f"quantized weights ({method}) are not supported"
    if has_sliding_window(hf):
        return f"a sliding window of {hf['sliding_window']} tokens is not supported"
    if not hf.get("scale_attn_weights", True) or hf.get("scale_attn_by_inverse_layer_idx", False):
        return "scale_attn_weights false and scale_attn_by_inverse_layer_idx true are not supported"
    return None


def has_sliding_window(hf: Mapping) -> bool:
    """Whether some layer's window is shorter than the context; Qwen's configs name windows that are not in use."""
    if hf["model_type"] not in ("qwen2", "qwen3") or not hf.get("use_sliding_window") or "sliding_window" not in hf:
        return False
    n_layers = hf["num_hidden_layers"]
    default = ["sliding_attention"] * (n_layers - hf.get("max_window_layers", 28))
    return "sliding_attention" in hf.get("layer_types", default) and (
        hf["sliding_window"] < hf["max_position_embeddings"]
    )


def gpt2_config(hf: Mapping) -> ModelConfig:
    C, H = size(hf, "n_embd"), size(hf, "n_head")
    if C % H:
        raise ValueError(f"n_embd {C} is not a multiple of n_head {H}")
    return ModelConfig(
        model_type="gpt2",
        vocab_size=hf["vocab_size"],
        hidden_size=C,
        intermediate_size=hf.get("n_inner", 4 * C),
        num_hidden_layers=hf["n_layer"],
        num_attention_heads=H,
        num_key_value_heads=H,
        head_dim=C // H,
        max_position_embeddings=hf["n_positions"],
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        hidden_act=hf.get("activation_function", "gelu_new"),
        rope_theta=None,
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        is_gated=False,
        is_layer_norm=True,
    )


def rotary_config(hf: Mapping) -> ModelConfig:
    """Llama, Qwen2 and Qwen3; defaults are those of transformers."""
    C, H, family = size(hf, "hidden_size"), size(hf, "num_attention_heads"), hf["model_type"]
    theta, scaling = rope_settings(hf)
    attention_bias = hf.get("attention_bias", False)
    return ModelConfig(
        model_type=family,
        vocab_size=hf["vocab_size"],
        hidden_size=C,
        intermediate_size=hf["intermediate_size"],
        num_hidden_layers=hf["num_hidden_layers"],
        num_attention_heads=H,
        num_key_value_heads=hf.get("num_key_value_heads", H),
        head_dim=hf.get("head_dim", 128 if family == "qwen3" else C // H),
        max_position_embeddings=hf["max_position_embeddings"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        hidden_act=hf.get("hidden_act", "silu"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=family == "qwen2" or attention_bias,  # Qwen2 has these three and no others, whatever the key says
        output_bias=family != "qwen2" and attention_bias,
        mlp_bias=family == "llama" and hf.get("mlp_bias", False),
        has_qk_norm=family == "qwen3",
    )


def rope_settings(hf: Mapping) -> tuple[float, RopeScaling | None]:
    """theta and the scaling, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    rope = {**hf.get("rope_parameters", {}), **hf.get("rope_scaling", {})}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0)))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "linear", "llama3") or any(isinstance(value, dict) for value in rope.values()):
        name = rope_type if rope_type != "default" else "of its own for each kind of layer"
        raise ValueError(f"rope scaling {name} is not supported; nanor1 knows default, linear and llama3")
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported; nanor1 rotates the whole head")
    if rope_type == "default":
        return theta, None
    if rope_type == "linear":
        return theta, RopeScaling("linear", rope["factor"])
    context = rope.get("original_max_position_embeddings", hf["max_position_embeddings"])
    return theta, RopeScaling("llama3", rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], context)


def config_to_hf(config: ModelConfig) -> dict:
    """The config.json of a model that was made here: one with rotary positions, not slowed."""
    same = (
        "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim "
        "num_key_value_heads max_position_embeddings hidden_act rope_theta tie_word_embeddings"
    ).split()
    hf = {name: getattr(config, name) for name in same}
    hf |= {"rms_norm_eps": config.norm_eps, "attention_bias": config.output_bias, "mlp_bias": config.mlp_bias}
    assert config_from_hf(hf) == config, f"no config.json says {config}"
    return hf


def file_layout(config: ModelConfig, parameters: Iterable[str]) -> dict[str, list[str]]:
    """The names of the file's tensors, each with the parameters that it holds: one, or of GPT-2 q, k and v together."""
    layout: dict[str, list[str]] = {}
    for parameter in parameters:  # q, k, v come in this order
        name = parameter
        for ours, theirs in GPT2_NAMES.items() if config.model_type == "gpt2" else ():
            name = name.replace(ours, theirs)
        layout.setdefault(name, []).append(parameter)
    return layout


def is_transposed(config: ModelConfig, parameter: str) -> bool:
    return config.model_type == "gpt2" and parameter.endswith("_proj.weight")


def read_parameters(
    folder: str | Path,
    config: ModelConfig,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of `shapes` from the folder's weights, in `dtype` (None: that of the file's embedding).

    ValueError names the file and the tensor that is damaged, missing, left over, or of another shape.
    """
    if SCORE not in shapes and is_reward_model(folder):
        raise ValueError(f"{folder} holds a reward model, which scores text and writes none; give a language model")
    layout = file_layout(config, shapes)
    places = tensor_places(folder, "transformer." if config.model_type == "gpt2" else "model.")
    check_names(folder, config, layout.keys(), places.keys())
    embedding = places[next(name for name, parts in layout.items() if "model.embed_tokens.weight" in parts)]
    head = places.get("lm_head.weight", embedding) if config.tie_word_embeddings else embedding
    if head != embedding and not torch.equal(read_tensor(*embedding), read_tensor(*head)):
        raise ValueError(
            f"{head[0]}: {head[1]} differs from {embedding[1]}, but config.json ties the two; set "
            f"tie_word_embeddings to false there to use both"
        )
    dtype = dtype or read_tensor(*embedding).dtype
    for name, parts in layout.items():
        path, key = places[name]
        tensor, is_turned = read_tensor(path, key), is_transposed(config, parts[0])
        n_rows, *rest = shapes[parts[0]]
        wanted = [*rest, len(parts) * n_rows] if is_turned else [len(parts) * n_rows, *rest]
        if list(tensor.shape) != wanted:
            raise ValueError(
                f"{path}: {key} has shape {list(tensor.shape)}, but config.json calls for {wanted}; "
                f"the two are of different models"
            )
        for parameter, part in zip(parts, (tensor.T if is_turned else tensor).chunk(len(parts)), strict=True):
            contiguous = torch.empty(shapes[parameter], dtype=dtype, device=device)
            yield parameter, contiguous.copy_(part)


def tensor_places(folder: str | Path, prefix: str) -> dict[str, tuple[Path, str]]:
    """For each tensor the file that holds it and its name there; files written without the prefix are the same."""
    places = {}
    for path in weight_files(Path(folder)):
        for key in open_weights(path).keys():
            if not BUFFER.search(key):
                places[key if key.startswith((prefix, "lm_head.", SCORE)) else prefix + key] = (path, key)
    return places


def weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}: get the model in the safetensors format")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{folder / INDEX} has no weight_map; download or copy it again")
    paths = [folder / name for name in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing, though {INDEX} names it: download or copy it again")
    return paths


def open_weights(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}); download or copy it again") from error


def read_tensor(path: Path, key: str) -> Tensor:
    # Opened anew for each tensor: the mapped pages of one read would otherwise stay, and double the peak of memory.
    with open_weights(path) as weights:
        return weights.get_tensor(key)


def check_names(folder: str | Path, config: ModelConfig, wanted: Iterable[str], found: Iterable[str]) -> None:
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing, unexpected = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted) - optional)
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} tensors that config.json calls for are missing from the weights, the first is "
            f"{missing[0]}; the two are of different models, or a file is not whole"
        )
    if unexpected:
        raise ValueError(
            f"{folder}: the weights hold {len(unexpected)} tensors that a {config.model_type} of this config.json has "
            f"no place for, the first is {unexpected[0]}; it is another kind of model"
        )


def write_folder(folder: str | Path, config: ModelConfig, hf: Mapping, parameters: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors, for this loader and for transformers.

    `hf` is the config.json the model came from, and is written back; empty for a model that was made here.
    """
    tensors = to_file_layout(config, parameters)
    keys = {key: value for key, value in (hf or config_to_hf(config)).items() if key != "dtype"}
    keys["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    keys["architectures"] = [FAMILIES[config.model_type]]
    if SCORE in tensors:  # without these labels transformers would make a classifier of two
        keys |= {"id2label": {"0": "score"}, "label2id": {"score": 0}, "tie_word_embeddings": True}
        keys["architectures"] = [REWARD_MODELS[config.model_type]]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")


def to_file_layout(config: ModelConfig, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the family's files hold them: named, q, k and v joined, transposed; contiguous, on the CPU."""
    tensors = {}
    for name, parts in file_layout(config, parameters).items():
        first, *others = (parameters[parameter].detach().cpu() for parameter in parts)
        tensor = torch.cat([first, *others]) if others else first
        tensors[name] = (tensor.T if is_transposed(config, parts[0]) else tensor).contiguous()
    return tensors
