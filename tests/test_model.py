import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import nanor1.model
from nanor1.gradient import Workers
from nanor1.model import (
    KVCache,
    ModelConfig,
    RMSNorm,
    Transformer,
    can_reorder,
    reorder,
    reordered_linear,
    rope_frequencies,
)
from nanor1.optim import MasterAdamW
from nanor1.packing import Layout, tile_table
from nanor1.weights import RopeScaling, config_from_hf, config_to_hf, read_config

LLAMA = dict(
    model_type="llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    rope_theta=10_000.0,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=[2, 5],
    pad_token_id=None,
)
GPT2 = dict(model_type="gpt2", vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=None)
GPT2 |= dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, bos_token_id=3, eos_token_id=3)
QWEN2 = LLAMA | dict(model_type="qwen2", rope_theta=1e6, use_sliding_window=False, sliding_window=16)
QWEN2 |= dict(attention_bias=True)  # some files say so; it adds no bias after attention
QWEN3 = LLAMA | dict(model_type="qwen3", head_dim=12, rope_theta=1e6)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# config.json as transformers 4 writes it
CONFIGS = {
    "gpt2": GPT2,
    "gpt2 untied, relu, n_inner": GPT2 | dict(tie_word_embeddings=False, activation_function="relu", n_inner=24),
    "llama": LLAMA,
    "llama, one head per group, tied": LLAMA | dict(num_key_value_heads=4, tie_word_embeddings=True),
    "llama, seven heads per group, head_dim, biases": LLAMA
    | dict(
        hidden_size=35, num_attention_heads=7, num_key_value_heads=1, head_dim=6, attention_bias=True, mlp_bias=True
    ),
    "llama, relu": LLAMA | dict(hidden_act="relu"),
    "llama3 rope": LLAMA | dict(rope_theta=5e5, rope_scaling=LLAMA3_ROPE, tie_word_embeddings=True),
    "linear rope": LLAMA | dict(rope_scaling=dict(type="linear", rope_type="linear", factor=4.0)),
    "qwen2": QWEN2,
    "qwen2, seven heads per group, tied": QWEN2
    | dict(hidden_size=56, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": QWEN3,
    "qwen3, biases, tied": QWEN3 | dict(attention_bias=True, tie_word_embeddings=True, num_key_value_heads=1),
}
FAMILIES = {name: CONFIGS[name] for name in ("gpt2", "llama", "qwen2", "qwen3")}
MINIATURE = ModelConfig("llama", 50, 24, 96, 2, 4, 1, 6, 128, hidden_act="relu")


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    module.logging.set_verbosity_error()
    return module


def randomize(model, seed):
    """Weights far from any initialisation, so that each of them matters to the logits; biases too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        is_norm = parameter.dim() == 1 and bool((parameter == 1).all())
        parameter.data.copy_(1 + noise if is_norm else noise)
    return model


def random_model(config, seed=0):
    return randomize(Transformer(config), seed)


def write_json(path, content):
    path.write_text(json.dumps(content))


def hf_model(transformers, folder, hf_config, seed):
    """A random model of transformers itself, saved in `folder`."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", hf_config)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = randomize(model.float(), seed).eval()
    model.tie_weights()
    model.save_pretrained(folder)
    return model


def hf_load(transformers, folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def pack(sequences):
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return torch.cat(sequences), torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def random_sequences(lengths, seed=0, vocab_size=61):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def packed_logits(model, sequences):
    return model.logits(model(*pack(sequences)))


@torch.no_grad()
def hf_logits(model, sequences):
    return torch.cat([model(sequence[None]).logits[0] for sequence in sequences])


def assert_same_logits(ours, theirs, atol=1e-4):
    assert theirs.std() > 0.1  # logits near zero would agree whatever the model
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


# transformers


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_transformers_gives_its_logits_and_ours_gives_them_back(transformers, tmp_path, name, seed):
    theirs = hf_model(transformers, tmp_path / "theirs", CONFIGS[name], seed)
    ours = Transformer.from_pretrained(tmp_path / "theirs")
    sequences = random_sequences([5, 1, 60], seed)
    wanted = hf_logits(theirs, sequences)
    assert_same_logits(packed_logits(ours, sequences), wanted)

    ours.save_pretrained(tmp_path / "ours")
    assert_same_logits(hf_logits(hf_load(transformers, tmp_path / "ours"), sequences), wanted, atol=1e-6)
    assert read_config(tmp_path / "ours")[1] == ours.config
    ours_tensors, their_tensors = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs"))
    assert ours_tensors.keys() == their_tensors.keys()
    assert all(torch.equal(ours_tensors[key], their_tensors[key]) for key in ours_tensors)


@pytest.mark.parametrize("name", ["llama3 rope", "linear rope"])
def test_scaled_positions_beyond_the_original_context_equal_those_of_transformers(transformers, tmp_path, name):
    theirs = hf_model(transformers, tmp_path, CONFIGS[name], seed=2)
    sequences = random_sequences([256])
    assert_same_logits(packed_logits(Transformer.from_pretrained(tmp_path), sequences), hf_logits(theirs, sequences))


@pytest.mark.parametrize("name", CONFIGS)
def test_both_forms_of_config_json_are_the_same_model(transformers, tmp_path, name):
    """transformers writes the form of its own version: the config it wrote must be read as the one by hand."""
    hf_model(transformers, tmp_path, CONFIGS[name], seed=0)
    assert read_config(tmp_path)[1] == config_from_hf(CONFIGS[name])


def test_a_fresh_miniature_saved_by_us_loads_in_transformers_with_equal_logits(transformers, tmp_path):
    ours = random_model(MINIATURE)
    ours.save_pretrained(tmp_path)
    sequences = random_sequences([9, 4], vocab_size=50)
    assert_same_logits(packed_logits(ours, sequences), hf_logits(hf_load(transformers, tmp_path), sequences))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_model_of_each_family_saved_by_us_loads_in_transformers(transformers, tmp_path, name):
    ours = random_model(config_from_hf(CONFIGS[name]))
    ours.hf_config = CONFIGS[name] if name == "gpt2" else {}
    ours.save_pretrained(tmp_path)
    sequences = random_sequences([9, 4])
    assert_same_logits(packed_logits(ours, sequences), hf_logits(hf_load(transformers, tmp_path), sequences))


def test_a_sharded_folder_loads_as_the_whole_one(transformers, tmp_path):
    theirs = hf_model(transformers, tmp_path / "whole", LLAMA, seed=0)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole, sharded = (Transformer.from_pretrained(tmp_path / folder).state_dict() for folder in ("whole", "sharded"))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_the_hub_layout_of_gpt2_with_bare_names_and_mask_buffers_loads(transformers, tmp_path):
    theirs = hf_model(transformers, tmp_path, GPT2, seed=0)
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(tmp_path / "model.safetensors").items()}
    assert "wte.weight" in tensors
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(64, 64).tril().view(1, 1, 64, 64)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors")
    sequences = random_sequences([7, 30])
    assert_same_logits(packed_logits(Transformer.from_pretrained(tmp_path), sequences), hf_logits(theirs, sequences))


# config.json


def test_config_json_of_transformers_5_is_read():
    llama3 = {key: value for key, value in LLAMA3_ROPE.items()} | {"rope_theta": 5e5}
    rest = {key: value for key, value in LLAMA.items() if key != "rope_theta"} | {"dtype": "bfloat16"}
    config = config_from_hf(rest | {"rope_parameters": llama3})
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    config = config_from_hf(rest | {"rope_parameters": {"rope_theta": 123.0, "rope_type": "default"}})
    assert (config.rope_theta, config.rope_scaling) == (123.0, None)


def test_the_config_of_deepseek_r1_distill_qwen_is_read():
    """Its windows are named but not in use, and its attention has biases though no key says so."""
    config = config_from_hf(
        dict(
            model_type="qwen2",
            hidden_act="silu",
            hidden_size=1536,
            intermediate_size=8960,
            max_position_embeddings=131072,
            max_window_layers=21,
            num_attention_heads=12,
            num_hidden_layers=28,
            num_key_value_heads=2,
            rms_norm_eps=1e-06,
            rope_theta=10000,
            sliding_window=4096,
            tie_word_embeddings=False,
            torch_dtype="bfloat16",
            use_mrope=False,
            use_sliding_window=False,
            vocab_size=151936,
        )
    )
    assert (config.head_dim, config.qkv_bias, config.output_bias) == (128, True, False)
    assert config.rope_theta == 10_000.0 and config.rope_scaling is None


def test_absent_and_null_keys_have_the_defaults_of_transformers():
    bare = {key: LLAMA[key] for key in LLAMA if key not in ("num_key_value_heads", "rms_norm_eps", "rope_theta")}
    config = config_from_hf(bare | {"head_dim": None, "rope_scaling": None})
    assert (config.num_key_value_heads, config.head_dim, config.norm_eps, config.rope_theta) == (4, 8, 1e-6, 1e4)
    without = {key: value for key, value in QWEN3.items() if key != "head_dim"}
    assert config_from_hf(without).head_dim == 128
    assert config_from_hf(GPT2).tie_word_embeddings and not config_from_hf(bare).tie_word_embeddings
    assert config_from_hf(GPT2).intermediate_size == 4 * 32


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="qwen3_moe"), "qwen3_moe"),
        (dict(model_type="mixtral"), "mixtral"),
        (dict(model_type="gemma2"), "gemma2"),
        (dict(model_type=None), "None"),
        (dict(quantization_config=dict(quant_method="awq", bits=4)), "awq"),
        (QWEN2 | dict(use_sliding_window=True, max_window_layers=1), "window of 16"),
        (QWEN2 | dict(use_sliding_window=True, layer_types=["full_attention", "sliding_attention"]), "window of 16"),
        (dict(rope_scaling=dict(type="yarn", factor=4.0)), "yarn"),
        (dict(rope_scaling=dict(rope_type="dynamic", factor=4.0)), "dynamic"),
        (dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4)), "longrope"),
        (dict(rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e4))), "each kind of layer"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(num_key_value_heads=3), "multiple of num_key_value_heads 3"),
        (dict(hidden_size="32"), "hidden_size is '32'"),
        (dict(num_hidden_layers=0), "num_hidden_layers is 0"),
        (dict(head_dim=5), "head_dim is 5"),
        (GPT2 | dict(scale_attn_weights=False), "scale_attn_weights"),
        (GPT2 | dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (GPT2 | dict(n_head=5), "n_embd 32 is not a multiple of n_head 5"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(tmp_path, changes, message):
    write_json(tmp_path / "config.json", LLAMA | dict(head_dim=8) | changes)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        dict(use_sliding_window=False, sliding_window=16),
        dict(use_sliding_window=True, sliding_window=None),
        dict(use_sliding_window=True, sliding_window=16, max_window_layers=2),
        dict(use_sliding_window=True, sliding_window=256, max_window_layers=0),
    ],
)
def test_a_window_without_effect_is_no_reason_to_refuse(changes):
    assert config_from_hf(QWEN2 | changes) == config_from_hf(QWEN2)


def test_an_unknown_activation_is_refused_with_the_known_ones(tmp_path):
    write_json(tmp_path / "config.json", LLAMA | dict(hidden_act="swish7"))
    with pytest.raises(ValueError, match=r"swish7.*silu, relu"):
        Transformer.from_pretrained(tmp_path)


def test_a_config_that_no_key_can_express_is_not_saved(tmp_path):
    config = dataclasses.replace(MINIATURE, qkv_bias=True)
    with pytest.raises(AssertionError, match=r"no config.json says .*qkv_bias=True"):
        Transformer(config).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_is_hashable_and_survives_its_own_keys():
    for hf_config in CONFIGS.values():
        config = config_from_hf(hf_config)
        if config.rope_theta is not None and config.rope_scaling is None:  # as of models that are made here
            assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config
        assert hash(config) == hash(dataclasses.replace(config))


# loading and saving


@pytest.fixture
def llama_folder(tmp_path):
    folder = tmp_path / "llama"
    model = random_model(config_from_hf(LLAMA))
    model.hf_config = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "dtype": "float16"}
    model.save_pretrained(folder)
    return folder


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_saving_writes_back_the_config_that_was_read_with_the_dtype_of_the_weights(llama_folder):
    saved = json.loads((llama_folder / "config.json").read_text())
    assert (saved["bos_token_id"], saved["eos_token_id"]) == (1, [2, 5])
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert saved["torch_dtype"] == "float32" and "dtype" not in saved
    assert saved["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e4}
    again = Transformer.from_pretrained(llama_folder)
    again.save_pretrained(llama_folder)
    assert json.loads((llama_folder / "config.json").read_text()) == saved


def test_the_dtype_is_that_of_the_file_unless_one_is_asked_for(tmp_path):
    model = random_model(config_from_hf(QWEN2)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in Transformer.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    wide = Transformer.from_pretrained(tmp_path, dtype=torch.float32, device="cpu")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert all(torch.equal(p, q.float()) for p, q in zip(wide.parameters(), model.parameters(), strict=True))


def test_a_loaded_model_can_be_trained_and_does_not_share_memory_with_the_file(llama_folder):
    model = Transformer.from_pretrained(llama_folder)
    before = (llama_folder / "model.safetensors").read_bytes()
    ids_N, cu_seqlens_B1 = pack(random_sequences([4, 3]))
    model.logits(model(ids_N, cu_seqlens_B1)).sum().backward()
    assert all(p.grad is not None and p.is_contiguous() for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (llama_folder / "model.safetensors").read_bytes() == before


def test_tied_weights_are_written_once_and_read_twice_only_when_equal(tmp_path):
    random_model(config_from_hf(LLAMA | dict(tie_word_embeddings=True))).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    wanted = packed_logits(Transformer.from_pretrained(tmp_path), random_sequences([5]))
    embedding = tensors["model.embed_tokens.weight"]
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(packed_logits(Transformer.from_pretrained(tmp_path), random_sequences([5])), wanted)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs.*tie_word_embeddings to false"):
        Transformer.from_pretrained(tmp_path)


def truncate(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def rename_to_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {
        "model.norm.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    write_json(folder / "model.safetensors.index.json", {"weight_map": names})


def edit_config(folder, **changes):
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | changes)


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
DAMAGES = {
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "broken config.json": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "config.json is a list": (lambda folder: (folder / "config.json").write_text("[]"), "does not hold a JSON object"),
    "a size is missing": (lambda folder: edit_config(folder, vocab_size=None), "config.json has no 'vocab_size'"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "truncated": (truncate, "model.safetensors is cut short or damaged"),
    "not safetensors": (lambda folder: (folder / "model.safetensors").write_text("version https://"), "cut short or"),
    "a shard is missing": (rename_to_shard, "model-00002-of-00002.safetensors is missing"),
    "missing tensor": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(Q_PROJ)),
        f"1 tensors that config.json calls for are missing.*{Q_PROJ}",
    ),
    "unexpected tensor": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({"score.weight": torch.ones(1, 32)})),
        "no place for, the first is score.weight",
    ),
    "fewer layers than stored": (lambda folder: edit_config(folder, num_hidden_layers=1), "model.layers.1.input"),
    "another shape": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({Q_PROJ: torch.ones(31, 32)})),
        rf"model.safetensors: {Q_PROJ} has shape \[31, 32\], but config.json calls for \[32, 32\]",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_with_what_is_wrong_and_what_to_do(llama_folder, name):
    damage, message = DAMAGES[name]
    damage(llama_folder)
    with pytest.raises(ValueError, match=message) as error:
        Transformer.from_pretrained(llama_folder)
    assert str(llama_folder) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_does_not_exist_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="no folder Qwen/Qwen2.5-0.5B: download the model first"):
        Transformer.from_pretrained("Qwen/Qwen2.5-0.5B")


def test_the_shape_in_a_message_about_gpt2_is_that_of_the_file(tmp_path):
    model = random_model(config_from_hf(GPT2))
    model.hf_config = GPT2
    model.save_pretrained(tmp_path)
    name = "transformer.h.0.attn.c_attn.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(32, 95)}))
    with pytest.raises(ValueError, match=r"c_attn.weight has shape \[32, 95\], but config.json calls for \[32, 96\]"):
        Transformer.from_pretrained(tmp_path)


PEAK_MEMORY = """
import re, sys, torch
from pathlib import Path
from nanor1.model import Transformer
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
Transformer.from_pretrained(sys.argv[1])
before = peak()
model = Transformer.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
print(peak() - before, sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters()))
"""


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_a_model_from_scratch_needs_no_weights_follows_from_its_seed_and_starts_small(tmp_path, name):
    write_json(tmp_path / "config.json", CONFIGS[name] | {"vocab_size": 500})
    model, again, other = (Transformer.from_scratch(tmp_path, seed) for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    weights = model.state_dict()
    assert not torch.equal(weights["model.embed_tokens.weight"], other.model.embed_tokens.weight)
    assert weights["model.embed_tokens.weight"].std() == pytest.approx(0.02, rel=0.1)
    smaller = 0.02 / (2 * model.config.num_hidden_layers) ** 0.5
    assert weights["model.layers.0.mlp.down_proj.weight"].std() == pytest.approx(smaller, rel=0.2)
    assert not any(p.any() for name, p in weights.items() if name.endswith("bias"))
    logits = packed_logits(model, random_sequences([9]))
    assert (logits.softmax(-1) - 1 / 500).abs().max() < 0.002  # near to equal chances


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_needs_little_more_memory_than_the_weights_themselves(tmp_path, dtype):
    random_model(MINIATURE).save_pretrained(tmp_path / "small")
    sizes = dict(vocab_size=20_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    with torch.device("meta"):
        shapes = Transformer(config_from_hf(LLAMA | sizes)).state_dict()
    (tmp_path / "large").mkdir()
    write_json(tmp_path / "large" / "config.json", LLAMA | sizes)
    tensors = {name: torch.zeros(x.shape, dtype=torch.bfloat16) for name, x in shapes.items()}
    save_file(tensors, tmp_path / "large" / "model.safetensors")
    command = [sys.executable, "-c", PEAK_MEMORY, str(tmp_path / "small"), str(tmp_path / "large"), dtype]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    grown, weights, largest = map(int, output.split())
    assert weights > 100 * 2**20
    assert weights * 0.9 < grown < weights + largest + 16 * 2**20


# the forward passes


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_sequences_give_the_logits_of_each_alone(name):
    model, sequences = random_model(config_from_hf(CONFIGS[name])), random_sequences([5, 1, 12, 7, 9])
    alone = torch.cat([packed_logits(model, [sequence]) for sequence in sequences])
    torch.testing.assert_close(packed_logits(model, sequences), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_token_changes_its_own_sequence_from_there_on_and_nothing_else(name):
    model, sequences = random_model(config_from_hf(CONFIGS[name])), random_sequences([6, 8, 4])
    before = packed_logits(model, sequences)
    sequences[1][3] = (sequences[1][3] + 1) % 61
    change = (packed_logits(model, sequences) - before).abs().amax(-1)
    assert change[6 + 3 : 6 + 8].min() > 1e-3
    assert change[: 6 + 3].max() <= 1e-6 and change[6 + 8 :].max() <= 1e-6


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_prefill_and_decode_give_the_logits_of_the_packed_forward(name):
    model = random_model(config_from_hf(CONFIGS[name]))
    sequences, n_prompt = random_sequences([9, 7, 12]), [5, 1, 3]
    cache = KVCache(model, n_rows=4, max_len=16)
    for layer in (*cache.k, *cache.v):
        layer.fill_(1e3)  # cells that were never written must not count
    ids_N, cu_seqlens_B1 = pack([sequence[:n] for sequence, n in zip(sequences, n_prompt, strict=True)])
    wanted = packed_logits(model, sequences).split([9, 7, 12])
    prefilled = model.logits(model(ids_N, cu_seqlens_B1, cache)).split(n_prompt)
    for ours, theirs in zip(prefilled, wanted, strict=True):
        torch.testing.assert_close(ours, theirs[: len(ours)], atol=1e-5, rtol=1e-5)
    for step in range(4):
        position_B = torch.tensor(n_prompt) + step
        token_B = torch.stack([sequence[p] for sequence, p in zip(sequences, position_B, strict=True)])
        decoded = model.logits(model.decode(token_B, position_B, cache, int(position_B.max()) + 1 + step % 2))
        expected = torch.stack([rows[p] for rows, p in zip(wanted, position_B, strict=True)])
        torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_prompts_read_in_parts_give_the_logits_of_the_packed_forward(name):
    model, lengths = random_model(config_from_hf(CONFIGS[name])), [9, 7, 12]
    sequences = random_sequences(lengths)
    cache = KVCache(model, n_rows=4, max_len=16)
    for layer in (*cache.k, *cache.v):
        layer.fill_(1e3)
    wanted = packed_logits(model, sequences).split(lengths)
    for start, stop in ([0, 0, 0], [5, 1, 3]), ([5, 1, 3], [6, 6, 3 + 8]), ([6, 6, 11], lengths):
        parts = [sequence[a:b] for sequence, a, b in zip(sequences, start, stop, strict=True)]
        hidden_NC = model(*pack(parts), cache, past_B=torch.tensor(start))
        for ours, theirs, a, b in zip(
            model.logits(hidden_NC).split([*map(len, parts)]), wanted, start, stop, strict=True
        ):
            torch.testing.assert_close(ours, theirs[a:b], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_copied_cache_rows_decode_like_their_source():
    model, (prompt,) = random_model(MINIATURE), random_sequences([6], vocab_size=50)
    source, target = KVCache(model, 1, 6), KVCache(model, 3, 10)
    model(*pack([prompt]), source)
    target.copy_rows(source, torch.tensor([0, 0]), torch.tensor([2, 0]), 6)
    target.copy_rows(target, torch.tensor([2]), torch.tensor([1]), 6)
    token_B = torch.tensor([4, 9, 4])
    hidden_BC = model.decode(token_B, torch.full((3,), 6), target, 7)
    for token, hidden in zip(token_B, hidden_BC, strict=True):
        wanted = model(*pack([torch.cat((prompt, token[None]))]))[-1]
        torch.testing.assert_close(hidden, wanted, atol=1e-5, rtol=1e-5)


def test_gradients_of_a_packed_batch_are_the_sum_of_those_of_its_sequences():
    model, sequences = random_model(MINIATURE), random_sequences([6, 3, 1], vocab_size=50)

    def gradients(batch):
        model.zero_grad()
        model.logits(model(*pack(batch))).log_softmax(-1)[:, 7].sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    alone = [sum(grads) for grads in zip(*(gradients([sequence]) for sequence in sequences), strict=True)]
    for together, summed in zip(gradients(sequences), alone, strict=True):
        torch.testing.assert_close(together, summed, atol=1e-4, rtol=1e-4)


def shared_and_copied(prompts, tails):
    """Sequences of which `tails[i] = (prompt, tokens)` continue a prompt: packed with parents, and as full copies.

    Returns (ids, cu_seqlens, parents) and (ids, cu_seqlens), and where in the copies each token of the first is.
    """
    sequences = [*prompts, *(tail for _, tail in tails)]
    parents = torch.tensor([-1] * len(prompts) + [p for p, _ in tails])
    copies = [*prompts, *(torch.cat((prompts[p], tail)) for p, tail in tails)]
    ids, cu = pack(copies)
    ends = cu[1:].tolist()
    at = torch.cat([torch.arange(end - len(s), end) for s, end in zip(sequences, ends, strict=True)])
    return (*pack(sequences), parents), (ids, cu), at


def gradients(model, hidden, weight):
    model.zero_grad()
    (hidden * weight).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.model.parameters()])


@pytest.mark.parametrize("name", FAMILIES)
def test_continuations_of_a_shared_prompt_equal_full_copies_in_values_and_gradients(name):
    model = random_model(config_from_hf(CONFIGS[name]))
    prompts, tails = random_sequences([7, 1, 20]), random_sequences([4, 1, 6, 9], seed=1)
    shared, copied, at = shared_and_copied(prompts, list(zip([2, 0, 0, 1], tails, strict=True)))
    hidden, wanted = model(*shared[:2], parent_B=shared[2]), model(*copied)[at]
    torch.testing.assert_close(hidden, wanted, atol=1e-4, rtol=1e-4)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    mine, theirs = gradients(model, hidden, weight), gradients(model, wanted, weight)
    torch.testing.assert_close(mine, theirs, atol=2e-5 * theirs.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize(
    "goes_on", [dict(parent_B=torch.tensor([-1, -1, 0, 0])), dict(past_B=torch.tensor([2, 0, 1, 3]))]
)
def test_with_lengths_on_the_cpu_a_forward_asks_its_device_for_nothing(monkeypatch, goes_on):
    """On the meta device there is no number to be had: whoever asks for one, as on a GPU would wait, fails."""
    monkeypatch.setattr(nanor1.model, "attention", lambda q, *_: q)
    monkeypatch.setattr(nanor1.model, "_tiles", Layout.tiles)  # as on CUDA
    with torch.device("meta"):
        model = Transformer(config_from_hf(CONFIGS["llama"]))
        cache, ids_N = KVCache(model, 4, 16), torch.zeros(10, dtype=torch.int64)
    cu_seqlens_B1 = torch.tensor([0, 3, 5, 9, 10])
    hidden = model(ids_N, cu_seqlens_B1, cache, **goes_on)
    assert hidden.is_meta and hidden.shape == (10, 32)


# matrices laid out for sampling on a CPU


@pytest.fixture
def small_ones_too(monkeypatch):
    monkeypatch.setattr(nanor1.model, "NARROW", 0)


def test_small_matrices_are_not_reordered():
    model = random_model(config_from_hf(LLAMA))
    model.reorder_weights()
    assert model.reordered_head is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [1, 5, 64, 520])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_with_a_reordered_matrix_is_torchs(n_rows, has_bias, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((n_rows, 50), (70, 50), (70,)))
    if not can_reorder(weight):
        pytest.skip(f"oneDNN does not multiply {dtype} on this processor")
    wanted = torch.nn.functional.linear(x.double(), weight.double(), bias.double() if has_bias else None)
    out = reordered_linear(x, reorder(weight), bias if has_bias else None)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, atol=1e-4, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5)


def test_residual_factor_and_activation_are_part_of_a_product_with_a_reordered_matrix():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, other = (torch.randn(*shape, generator=generator) for shape in ((6, 50), (70, 50), (70,), (6, 70)))
    copy, product = reorder(weight), x @ weight.T + bias
    if copy is None:
        pytest.skip("this torch has no oneDNN")
    close = lambda mine, wanted: torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)  # noqa: E731
    close(reordered_linear(x, copy, bias, other, "add"), product + other)
    close(reordered_linear(x, copy, bias, other, "mul"), product * other)
    close(reordered_linear(x, copy, bias, then="swish"), F.silu(product))


def test_what_onednn_does_not_multiply_is_not_reordered():
    assert not can_reorder(torch.ones(4, 4, dtype=torch.float64))
    assert not can_reorder(torch.ones(4, 4, dtype=torch.float16))
    assert not can_reorder(torch.ones(4, 4, device="meta"))


@pytest.mark.parametrize("name", FAMILIES)
def test_reordered_weights_change_neither_a_forward_nor_a_decode_step(name, small_ones_too):
    model, cache = random_model(config_from_hf(CONFIGS[name])), None
    ids, cu = pack(random_sequences([7, 3]))
    token, position = torch.tensor([1, 2]), torch.tensor([7, 3])
    results = []
    for is_reordered in (False, True):
        with torch.inference_mode():
            if is_reordered:
                model.reorder_weights()
                if model.reordered_head is None:
                    pytest.skip("this torch has no oneDNN")
            cache = KVCache(model, 2, 8)
            hidden = model(ids, cu, cache)
            results.append((model.logits(hidden), model.logits(model.decode(token, position, cache, 8))))
    for plain, reordered in zip(*results, strict=True):
        torch.testing.assert_close(reordered, plain, atol=1e-4, rtol=1e-4)


def test_reordered_copies_follow_the_weights_and_end_with_a_forward_that_learns(small_ones_too):
    model = random_model(config_from_hf(LLAMA))
    ids, cu = pack(random_sequences([7, 3]))

    def logits():
        with torch.inference_mode():
            model.reorder_weights()
            return model.logits(model(ids, cu))

    before = logits()
    copy = model.reordered_head
    if copy is None:
        pytest.skip("this torch has no oneDNN")
    assert torch.equal(logits(), before) and model.reordered_head is copy  # kept while weights are as they were
    optimizer = MasterAdamW(model)
    model(ids, cu).square().sum().backward()
    linears = [part for part in model.modules() if hasattr(part, "reordered")]
    assert model.reordered_head is None and linears and all(part.reordered is None for part in linears)
    logits()  # as an evaluation between gradient and update
    optimizer.step(lr=0.1, max_grad_norm=1.0)
    after = logits()
    model.drop_reordered()
    with torch.inference_mode():
        torch.testing.assert_close(after, model.logits(model(ids, cu)), atol=1e-4, rtol=1e-4)
    assert (after - before).abs().max() > 0.1


def test_what_a_model_scores_does_not_depend_on_whether_it_has_sampled_before(small_ones_too):
    model = random_model(config_from_hf(LLAMA))
    ids, cu = pack(random_sequences([7, 3]))
    with torch.no_grad():
        before = model.logits(model(ids, cu))
    with torch.inference_mode():
        model.reorder_weights()
    with torch.no_grad():
        assert torch.equal(model.logits(model(ids, cu)), before)


def test_a_model_that_has_sampled_is_copied_pickled_and_converted_as_any_other(small_ones_too):
    model = random_model(config_from_hf(LLAMA))
    wanted = model.state_dict()
    for other in (
        copy.deepcopy,
        lambda model: Workers(model, 2).models[1],
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.double(),
    ):
        model.reorder_weights()
        made = other(model)
        assert made.reordered_head is None
        for name, value in made.state_dict().items():
            torch.testing.assert_close(value, wanted[name], check_dtype=False)
    model.reorder_weights()
    assert model.reordered_head is None  # of fp64


def test_weights_are_not_reordered_where_they_do_not_fit_twice(monkeypatch):
    model = random_model(config_from_hf(LLAMA))
    n_bytes = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr("nanor1.model.NARROW", 0)
    monkeypatch.setattr("nanor1.model.free_memory", lambda device: 2 * n_bytes - 1)
    model.reorder_weights()
    assert model.reordered_head is None


# what a CPU keeps for the gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lean_norm_is_torchs_in_value_and_gradient(dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((5, 48), (48,), (5, 48)))
    results = []
    for norm, wide in ((RMSNorm.forward, dtype), (lambda m, x: F.rms_norm(x, (48,), m.weight, m.eps), torch.float64)):
        module, leaf = RMSNorm(48, eps=1e-3).to(wide), x.clone().to(wide).requires_grad_()
        module.weight.data.copy_(weight)
        out = norm(module, leaf)
        out.backward(grad.to(wide))
        results.append([out.double(), leaf.grad.double(), module.weight.grad.double()])
    for mine, wanted in zip(*results, strict=True):
        assert (mine - wanted).norm() <= (4e-3 if dtype == torch.bfloat16 else 1e-6) * wanted.norm()


def test_the_lean_norms_gradient_is_the_numerical_one():
    module = RMSNorm(5, eps=1e-3).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(module.weight)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(module, {"weight": weight}, x), (x, module.weight)
    )


def test_a_forward_keeps_neither_fp32_copies_nor_what_is_quickly_made_again():
    config = dataclasses.replace(config_from_hf(LLAMA), num_hidden_layers=6)
    model = random_model(config).bfloat16()
    ids, cu = pack(random_sequences([70, 70]))
    C, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    KD, HD = config.num_key_value_heads * config.head_dim, heads * config.head_dim
    # both norms' inputs and results, q, k, v, attention's result, gate, up and their product
    numbers = 4 * C + HD + 2 * KD + HD + 3 * inner
    _, n_bytes = saved_bytes(model, ids, cu)
    assert n_bytes <= 1.25 * 2 * len(ids) * (6 * numbers + 2 * C)  # 1.9 with torch's own norm and product


# activation checkpointing and torch.compile


def saved_bytes(model, *arguments):
    """What a forward keeps for the backward, parameters aside."""
    parameters, saved = {p.data_ptr() for p in model.parameters()}, {}

    def count(tensor):
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        hidden = model(*arguments)
    return hidden, sum(saved.values())


def test_checkpointing_activations_saves_memory_and_changes_no_gradient():
    config = dataclasses.replace(config_from_hf(LLAMA), num_hidden_layers=6)
    plain, model = random_model(config), random_model(config)
    model.checkpoints_activations = True
    prompts, tails = random_sequences([30, 20]), random_sequences([25, 25, 9], seed=1)
    (ids, cu, parents), _, _ = shared_and_copied(prompts, list(zip([0, 0, 1], tails, strict=True)))
    (wanted, n_plain), (hidden, n_checkpointed) = (saved_bytes(m, ids, cu, None, parents) for m in (plain, model))
    assert torch.equal(hidden, wanted)
    assert n_checkpointed < 0.25 * n_plain
    weight = torch.randn(hidden.shape)
    torch.testing.assert_close(gradients(model, hidden, weight), gradients(plain, wanted, weight))


def probabilities(q, k, v, cu_q, cu_k):
    """Dense causal attention weights of packed sequences, [H, N, M], and k and v of each query head."""
    group, (n_q, n_k) = q.shape[1] // k.shape[1], (cu_q.diff(), cu_k.diff())
    row_q, row_k = (torch.arange(len(n)).repeat_interleave(n) for n in (n_q, n_k))
    at_q, at_k = torch.arange(len(q)) - cu_q[row_q] + (n_k - n_q)[row_q], torch.arange(len(k)) - cu_k[row_k]
    is_seen = (row_q[:, None] == row_k) & (at_q[:, None] >= at_k)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(~is_seen, float("-inf")).softmax(-1), k, v


def define_attention_op():
    """Attention as one operator that torch.compile cannot look into, as a GPU's kernel is."""

    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
        queries: torch.Tensor, keys: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        assert all(map(torch.equal, (queries, keys), tile_table(cu_q, cu_k, len(q), len(k))))
        p, _, v = probabilities(q, k, v, cu_q, cu_k)
        return torch.einsum("hnm,mhd->nhd", p, v).contiguous()

    def backward(
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        p, k_H, v_H = probabilities(q, k, v, cu_q, cu_k)
        dp = torch.einsum("nhd,mhd->hnm", grad, v_H)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        dq, dk = torch.einsum("hnm,mhd->nhd", ds, k_H), torch.einsum("hnm,nhd->mhd", ds, q)
        dv = torch.einsum("hnm,nhd->mhd", p, grad)
        groups = (k.shape[1], q.shape[1] // k.shape[1])
        return dq.contiguous(), dk.unflatten(1, groups).sum(2), dv.unflatten(1, groups).sum(2)

    op = torch.library.custom_op("nanor1_test::attention", forward, mutates_args=())
    op.register_fake(lambda q, *_: torch.empty_like(q))
    backward_op = torch.library.custom_op("nanor1_test::attention_backward", backward, mutates_args=())
    backward_op.register_fake(lambda grad, q, k, v, *_: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)))
    op.register_autograd(
        lambda ctx, grad: (*backward_op(grad, *ctx.saved_tensors), *[None] * 4),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:5]),
    )

    return lambda q, k, v, cu_q, cu_k, table: op(q, k, v, cu_q, cu_k, *table)


@pytest.fixture(scope="module")
def attention_op():
    return define_attention_op()


TINY = ModelConfig("llama", 61, 24, 40, 3, 4, 2, 6, 2048)
WARM_UP = [([5, 9], None), ([10, 3, 12, 2], [-1, -1, 0, 0])]
LENGTHS = [  # one sequence and many, few tokens and many, groups of one and more
    ([7, 7, 7], None), ([90], None), ([2], None), ([40, 20, 5, 1], None), ([1, 1], None), ([1] * 80, None),
    ([8, 8, 4], [-1, 0, 0]), ([30, 10, 9, 8, 7], [-1, 0, 0, 0, 0]), ([9, 1, 1], [-1, 0, 0]), ([8, 5, 7], [-1, -1, 0]),
]  # fmt: skip
MANY_ROWS = [([600, 60], None), ([400, 100, 100], [-1, 0, 0])]  # more than a transposed product takes


def assert_like_eager(model, eager, cases):
    for lengths, parents in cases:
        ids, cu = pack(random_sequences(lengths))
        parents = None if parents is None else torch.tensor(parents)
        weight, results = torch.randn(len(ids), 24), []
        for each in (model, eager):
            hidden = each(ids, cu, parent_B=parents)
            results.append((hidden, gradients(each, hidden, weight)))
        (hidden, mine), (wanted, theirs) = results
        torch.testing.assert_close(hidden, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine, theirs, atol=2e-5 * theirs.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize(
    ("backend", "checkpoints"),
    [
        ("eager", False),  # the tracing alone
        pytest.param("inductor", False, marks=pytest.mark.slow),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_are_compiled_once_for_all_lengths_and_equal_eager_ones(fresh_dynamo, backend, checkpoints):
    eager, model = random_model(TINY), random_model(TINY)
    model.checkpoints_activations = checkpoints
    model.compile_blocks(backend=backend)
    assert_like_eager(model, eager, WARM_UP[:1])
    assert fresh_dynamo["stats"]["unique_graphs"] == 2  # before and after attention, the same for all three blocks
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_like_eager(model, eager, WARM_UP + LENGTHS + MANY_ROWS)


def test_a_block_is_one_graph_where_attention_is_an_operator(fresh_dynamo, attention_op, monkeypatch):
    eager, model = random_model(TINY), random_model(TINY)
    monkeypatch.setattr(nanor1.model, "attention", attention_op)
    monkeypatch.setattr(nanor1.model, "_tiles", Layout.tiles)  # on the CPU, too
    monkeypatch.setattr(torch.compiler, "disable", lambda function: function)  # compile_blocks does so on the CPU
    model.compile_blocks(backend="eager", fullgraph=True)
    assert_like_eager(model, eager, WARM_UP)
    assert fresh_dynamo["stats"]["unique_graphs"] == 2  # without and with shared prompts
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_like_eager(model, eager, WARM_UP + LENGTHS + MANY_ROWS)


def test_the_programs_of_two_models_all_stay_compiled(fresh_dynamo):
    """A policy and a teacher share the code of a block, of which torch makes 8 programs by itself: here 2."""
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        for config in (TINY, dataclasses.replace(TINY, qkv_bias=True)):
            model = random_model(dataclasses.replace(config, num_hidden_layers=1))
            model.compile_blocks(backend="eager")
            cache = KVCache(model, 4, 16)
            for slots in ([2, 0], [1]):
                slot_B = torch.tensor(slots)
                model.decode(slot_B + 5, torch.full_like(slot_B, 3), cache, 16, slot_B, slot_B < 4)
    assert fresh_dynamo["stats"]["unique_graphs"] == 2 * 2  # of two rows and of one
    assert not fresh_dynamo["unimplemented"]


def test_blocks_compiled_for_one_row_are_one_program_for_all_caches_and_see_new_weights(fresh_dynamo):
    model, graphs = random_model(dataclasses.replace(TINY, qkv_bias=True)), []
    run_block = torch.compile(
        nanor1.model.Block.forward, dynamic=True, backend=lambda graph, _: (graphs.append(graph), graph)[1]
    )
    for n_slots, room in ((3, 16), (5, 24)):  # as when a conversation grows
        caches = [KVCache(model, n_slots, room) for _ in range(2)]
        for position in range(2):
            token_B, position_B = torch.tensor([7 + position]), torch.tensor([position])
            with torch.inference_mode():
                wanted, found = (
                    model.decode(token_B, position_B, cache, room, torch.tensor([1]), torch.tensor([True]), each)
                    for cache, each in zip(caches, (None, run_block), strict=True)
                )
                torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
                for parameter in model.parameters():
                    parameter.mul_(1.05)
    assert len(graphs) == 1
    products = [node for node in graphs[0].graph.nodes if node.target is torch.nn.functional.linear]
    assert len(products) == 7 and not any(len(node.args) > 2 and node.args[2] for node in products)  # biases apart


def test_a_compiled_model_keeps_its_names_is_saved_and_copied_and_samples_uncompiled(fresh_dynamo, tmp_path):
    eager, model = random_model(TINY), random_model(TINY)
    model.compile_blocks(backend="eager")
    assert list(model.state_dict()) == list(eager.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in eager.named_parameters()]
    model.save_pretrained(tmp_path)
    ids, cu = pack(random_sequences([9, 4]))
    with torch.no_grad():
        wanted = eager(ids, cu)
        for other in (model, copy.deepcopy(model), Workers(model, 2).models[1], Transformer.from_pretrained(tmp_path)):
            assert torch.equal(other(ids, cu), wanted)
    assert fresh_dynamo["stats"]["unique_graphs"] == 0
    assert all(
        p.data_ptr() == q.data_ptr()
        for p, q in zip(model.parameters(), Workers(model, 2).models[1].parameters(), strict=True)
    )


def test_the_work_of_a_forward_and_backward_is_what_torch_counts_of_its_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    model = random_model(dataclasses.replace(config_from_hf(LLAMA), hidden_size=64, head_dim=16, intermediate_size=96))
    ids, cu = pack(random_sequences([50, 30, 20]))
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        logits = model.logits(model(ids, cu)[:60])
        logits.sum().backward()
    products = counter.get_total_flops() - sum(
        flops for op, flops in counter.get_flop_counts()["Global"].items() if "bmm" in str(op) or "attention" in str(op)
    )
    # without attention: matrices alone. The gradient with respect to the first block's input is the embedding's.
    assert model.training_flops(100, 0, 60) == pytest.approx(products, rel=0.01)
    per_pair = 12 * 2 * 4 * 16  # a pair's score and its value, forward 2 x 2 D, backward twice that, 4 heads, 2 layers
    assert model.training_flops(0, 10, 0) == 10 * per_pair


def test_llama3_scaling_keeps_fast_pairs_slows_slow_ones_and_mixes_between():
    # theta 10^6 and 8 pairs: pair i turns 10^(-3i/4) radians a position; the original context is 2000 pi positions,
    # in which it makes 1000 * 10^(-3i/4) turns: 1000, 177.8, 31.6, 5.6, 1, 0.178...
    config = dataclasses.replace(
        MINIATURE,
        head_dim=16,
        rope_theta=1e6,
        rope_scaling=RopeScaling("llama3", 8.0, 0.5, 1.5, 6283),
    )
    plain = 10.0 ** (-0.75 * torch.arange(8))
    wanted = plain * torch.tensor([1, 1, 1, 1, 0.5 + 0.5 / 8, 1 / 8, 1 / 8, 1 / 8])
    torch.testing.assert_close(rope_frequencies(config), wanted, atol=0, rtol=1e-4)


def test_positions_stay_exact_when_the_model_becomes_bf16():
    model = Transformer(MINIATURE)
    wanted = model.rope_angles(torch.tensor([0, 1, 100]))
    narrow = model.to(torch.bfloat16).rope_angles(torch.tensor([0, 1, 100]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(narrow, wanted, strict=True))
    torch.testing.assert_close(wanted[0][:, 0, 0], torch.tensor([0, 1, 100.0]).cos())


# real models


def model_folder(name):
    folder = Path(os.environ.get("NANOR1_MODELS", "")) / name
    if "NANOR1_MODELS" not in os.environ or not folder.is_dir():
        pytest.skip(f"NANOR1_MODELS names no folder with {name}")
    return folder


PROMPTS = [
    "The capital of France is",
    "Question: Natalia sold 48 clips in April and half as many in May. How many in both months?\nAnswer:",
    "def fibonacci(n):\n",
]


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_a_real_model_gives_the_logits_and_the_greedy_text_of_transformers(transformers, name):
    from nanor1.sampler import generate
    from nanor1.tokenizer import Tokenizer

    folder = model_folder(name)
    tokenizer = Tokenizer.from_pretrained(folder)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    settings = dict(do_sample=False, max_new_tokens=64, pad_token_id=0)
    their_ids = [theirs.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() for prompt in prompts]
    sequences = [torch.tensor(prompt + ids) for prompt, ids in zip(prompts, their_ids, strict=True)]
    wanted = hf_logits(theirs, sequences)
    del theirs

    ours = Transformer.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(packed_logits(ours, sequences), wanted, atol=2e-3, rtol=1e-4)
    completions = generate(ours, prompts, max_new_tokens=64, temperature=0.0)
    assert [completion.ids for (completion,) in completions] == their_ids
