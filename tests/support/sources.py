"""Models as they are published, in every layout that a conversion reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from models import mistral_file, random_weights, small_config, write_folder

from m7mlx.config import ModelConfig
from m7mlx.files.weights import folder_weights

Weights = dict[str, mx.array]


LLAMA = small_config(
    model_type="llama", vocab_size=32000, hidden_size=128, intermediate_size=192, head_dim=32, sliding_window=None
)


NATIVE = {
    "embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attention.wq",
    "k_proj": "attention.wk",
    "v_proj": "attention.wv",
    "o_proj": "attention.wo",
    "gate_proj": "feed_forward.w1",
    "down_proj": "feed_forward.w2",
    "up_proj": "feed_forward.w3",
}


def little(**changes: Any) -> ModelConfig:
    """A model with as many ids as the tokenizer below, and sides that no group divides."""
    return small_config(**{"vocab_size": 320, "n_layers": 2} | changes)


def quantisable(**changes: Any) -> ModelConfig:
    """A model whose sides every group divides."""
    return little(**{"hidden_size": 128, "head_dim": 32, "intermediate_size": 256} | changes)


def tokenizer_json() -> dict[str, Any]:
    """A byte-level tokenizer of 258 tokens."""
    from tokenizers import pre_tokenizers

    vocab = {char: i + 2 for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(("<s>", "</s>"))],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1} | vocab, "merges": []},
    }


def write_source(
    folder: Path,
    config: ModelConfig,
    dtype: mx.Dtype = mx.bfloat16,
    shards: int = 1,
    **changes: Any,
) -> Weights:
    """A folder as on the Hub, with random weights, which are returned.

    `changes` go into its config.json.
    """
    folder.mkdir(parents=True)
    weights = {name: mx.array(array).astype(dtype) for name, array in random_weights(config).items()}
    names = sorted(weights)
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    else:
        parts = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
        for file, part in parts.items():
            mx.save_safetensors(str(folder / file), {n: weights[n] for n in part}, metadata={"format": "pt"})
        index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    data = config.to_dict() | {"bos_token_id": 0, "eos_token_id": 1} | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v != "absent"}))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return weights


def read_weights(folder: Path) -> Weights:
    """All tensors of a folder, by name."""
    weights: Weights = {}
    for file in sorted({tensor.path for tensor in folder_weights(folder).values()}):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        weights |= loaded
    return weights


def assert_same(found: Weights, expected: Weights) -> None:
    """Equal names, types and bits."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert mx.array_equal(found[name], array).item(), name


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp stores queries and keys: pairs (i, i + d/2) side by side."""
    d = weight.shape[0] // heads
    return weight.reshape(heads, 2, d // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_sharded(folder: Path) -> None:
    """A folder of three files and an index."""
    write_folder(folder, LLAMA)
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    mx.eval(*weights.values())
    (folder / "model.safetensors").unlink()
    parts = {f"model-0000{i + 1}-of-00003.safetensors": sorted(weights)[i::3] for i in range(3)}
    for file, names in parts.items():
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in names})
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def native_weights(config: ModelConfig, given: dict[str, np.ndarray] | None = None) -> dict[str, mx.array]:
    """Return weights as Mistral publishes them: their names, and query and key rows in pairs.

    given  weights under Hugging Face's names; random ones where there are none
    """
    weights = {}
    for name, array in (given or random_weights(config)).items():
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
        new = next(theirs for ours, theirs in NATIVE.items() if ours in name)
        layer = f"layers.{name.split('.')[2]}." if "layers" in name else ""
        weights[f"{layer}{new}.weight"] = mx.array(permuted(array, heads) if heads else array)
    return weights


def native_params(config: ModelConfig) -> dict[str, Any]:
    """What every params.json says of a model's shape."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.n_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
    }


def write_native(folder: Path, config: ModelConfig = LLAMA, **changes: Any) -> None:
    """A folder in Mistral's own layout; `changes` go into its params.json."""
    folder.mkdir()
    mx.save_safetensors(str(folder / "consolidated.safetensors"), native_weights(config))
    params = native_params(config)
    if config.sliding_window:
        params["sliding_window"] = config.sliding_window
    (folder / "params.json").write_text(json.dumps(params | changes))
    (folder / "tokenizer.model").write_bytes(mistral_file("v1").read_bytes())


def pack(numbers: np.ndarray, bits: int, order: tuple[int, ...]) -> np.ndarray:
    """Integers [rows, n] → int32 words [rows, n · bits / 32].

    Number order[i] of each word lies i-th from below.
    """
    per_word = 32 // bits
    words = numbers.reshape(numbers.shape[0], -1, per_word)[..., list(order)].astype(np.uint64)
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    packed: np.ndarray = (words << shifts).sum(axis=-1).astype(np.uint32).view(np.int32)
    return packed


def write_packed(folder: Path, method: str, bits: int, *, symmetric: bool = False, **settings: Any) -> dict[str, Any]:
    """A checkpoint as AutoAWQ or GPTQ write it; returns the float weights it stands for."""
    rng = np.random.default_rng(1)
    group, expected = 32, {}
    arrays: dict[str, mx.array] = {}
    straight = tuple(range(32 // bits))
    for name, array in random_weights(LLAMA).items():
        expected[name] = array.astype(np.float16).astype(np.float32)
        arrays[name] = mx.array(array.astype(np.float16))
        if "proj" not in name:
            continue
        rows, columns = array.shape
        q = rng.integers(0, 2**bits, (columns, rows))  # [in, out]
        zeros = rng.integers(0, 2**bits, (columns // group, rows))
        zeros[:] = 2 ** (bits - 1) if symmetric else zeros
        scales = rng.uniform(0.01, 0.02, zeros.shape).astype(np.float16)
        zero, scale = np.repeat(zeros, group, axis=0), np.repeat(scales.astype(np.float32), group, axis=0)
        expected[name] = ((q - zero) * scale).T.astype(np.float32)
        module = name.removesuffix(".weight")
        del arrays[name]
        if method == "awq":
            awq = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ, `pack_intweight`
            packed, stored_zeros = pack(q, 4, awq), pack(zeros, 4, awq)
        else:
            is_v1 = settings.get("checkpoint_format") or settings.get("format") or "gptq"
            stored = (zeros - (is_v1 == "gptq")) % 2**bits  # 0 is stored as the highest number
            packed, stored_zeros = pack(q.T, bits, straight).T, pack(stored, bits, straight)
        arrays[f"{module}.qweight"] = mx.array(np.ascontiguousarray(packed))
        arrays[f"{module}.scales"] = mx.array(scales)
        if not symmetric or method == "gptq":
            arrays[f"{module}.qzeros"] = mx.array(stored_zeros)
        if method == "gptq":
            arrays[f"{module}.g_idx"] = mx.array((np.arange(columns) // group).astype(np.int32))
    write_folder(folder, LLAMA)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    config = LLAMA.to_dict() | {"torch_dtype": "float16"}
    config["quantization_config"] = {"quant_method": method, "bits": bits, "group_size": group} | settings
    (folder / "config.json").write_text(json.dumps(config))
    return expected
