"""Configs, read as Hugging Face and Mistral read them.

What is not understood is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import small_config

from m7mlx import config_keys
from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError
from m7mlx.quantization import Quantization

V01 = {  # mistralai/Mistral-7B-v0.1
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
V03 = V01 | {"sliding_window": None, "rope_theta": 1e6, "vocab_size": 32768}


def test_the_released_models() -> None:
    v01, v03 = ModelConfig.from_dict(V01), ModelConfig.from_dict(V03)
    assert (v01.sliding_window, v01.rope_theta, v01.head_dim, v01.n_kv_heads) == (4096, 1e4, 128, 8)
    assert (v03.sliding_window, v03.rope_theta, v03.vocab_size) == (None, 1e6, 32768)
    parameters = 0
    for shape in v01.weight_shapes().values():
        size = 1
        for side in shape:
            size *= side
        parameters += size
    assert parameters == 7_241_732_096  # 7.24 B


def test_what_is_left_out_takes_hugging_faces_default() -> None:
    mistral = ModelConfig.from_dict({"model_type": "mistral"})
    assert (mistral.sliding_window, mistral.tie_word_embeddings, mistral.norm_eps) == (4096, False, 1e-6)
    assert (mistral.n_kv_heads, mistral.max_position_embeddings) == (8, 131072)
    llama = ModelConfig.from_dict({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 16})
    assert (llama.sliding_window, llama.n_kv_heads, llama.head_dim) == (None, 16, 256)
    assert ModelConfig.from_dict({"model_type": "mistral", "sliding_window": None}).sliding_window is None


@pytest.mark.parametrize(
    ("keys", "theta"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}, "rope_scaling": None}, 5e5),
        ({}, 1e4),
    ],
)
def test_both_ways_of_writing_ropes_base(keys: dict[str, Any], theta: float) -> None:
    assert ModelConfig.from_dict({"model_type": "mistral"} | keys).rope_theta == theta


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "MixtralForCausalLM is not supported"),
        ({"model_type": "gpt2"}, "gpt2 is not supported; supported are MistralForCausalLM, LlamaForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures says LlamaForCausalLM but model_type says mistral"),
        ({"rope_parameters": {"rope_theta": 5}}, "rope_theta is given twice"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'llama3' is not supported"),
        ({"rope_scaling": 3}, "rope_scaling must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 5}, "32 query heads cannot share 5"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": 48}, "no multiple of 48 heads"),
        ({"head_dim": 7}, "odd"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": True}, "sliding_window"),
        ({"rms_norm_eps": float("nan")}, "norm_eps"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization": {"bits": 4}}, "group_size"),
        ({"quantization": {"bits": 7, "group_size": 64}}, "7 bits"),
        ({"quantization": {"bits": 4, "group_size": 64, "mode": "magic"}}, "magic"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused_by_name(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ModelConfig.from_dict(V01 | change)


def test_a_llama_has_no_window() -> None:
    with pytest.raises(ConfigError, match="sliding_window"):
        ModelConfig.from_dict({"model_type": "llama", "sliding_window": 4096})


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig.from_dict(V01),
        small_config(sliding_window=None, tie_word_embeddings=True, eos_token_ids=(2, 5), bos_token_id=None),
        small_config(
            quantization=Quantization(64, 4, overrides={"lm_head": None, "model.embed_tokens": Quantization(32, 8)})
        ),
    ],
)
def test_writing_and_reading_is_the_same_config(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_mistrals_own_params_json() -> None:
    params = {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
              "norm_eps": 1e-5, "vocab_size": 32000}  # fmt: skip
    v01 = ModelConfig.from_params(params | {"sliding_window": 4096})
    assert (v01.sliding_window, v01.rope_theta, v01.intermediate_size) == (4096, 1e4, 14336)
    assert ModelConfig.from_params(params).rope_theta == 1e6  # as mistral-inference: no window, large base
    assert ModelConfig.from_params(params | {"rope_theta": 123.0}).rope_theta == 123
    with pytest.raises(ConfigError, match="experts"):
        ModelConfig.from_params(params | {"moe": {"num_experts": 8}})
    with pytest.raises(ConfigError, match="'dim' is missing"):
        ModelConfig.from_params({k: v for k, v in params.items() if k != "dim"})


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": "gpt2"}', "\x00", "[" * 100_000])
def test_damaged_files_name_themselves(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        ModelConfig.from_folder(tmp_path)


# --- every key ------------------------------------------------------------------------------------


@given(
    st.text(min_size=1, max_size=30).filter(lambda key: key.strip() == key),
    st.sampled_from([True, False, 0, 1, 2.5, "x", [], [1], {}, {"a": 1}]),
)
def test_an_invented_key_is_refused_by_name(key: str, value: Any) -> None:
    for base, read, known in (
        (V01, ModelConfig.from_dict, config_keys._READ | config_keys._WITHOUT_EFFECT | config_keys._NEUTRAL.keys()),
        (
            PARAMS,
            ModelConfig.from_params,
            config_keys._PARAMS_READ | config_keys._PARAMS_WITHOUT_EFFECT | config_keys._PARAMS_NEUTRAL.keys(),
        ),
    ):
        if key in known:
            continue
        with pytest.raises(ConfigError, match="is not known here") as caught:
            read(base | {key: value})
        assert repr(key) in str(caught.value)
        assert read(base | {key: None}) == read(base)  # null says that there is none


PARAMS = {
    "dim": 16,
    "n_layers": 1,
    "head_dim": 8,
    "hidden_dim": 16,
    "n_heads": 2,
    "n_kv_heads": 1,
    "norm_eps": 1e-5,
    "vocab_size": 32000,
    "rope_theta": 1e6,
}


@pytest.mark.parametrize(
    "change",
    [
        {"yarn": {"factor": 16}},
        {"llama_4_scaling": {"beta": 0.1}},
        {"_sliding_window": [4096, 32768]},
        {"quantization": {"qformat_weight": "fp8_e4m3"}},
        {"rope_scaling": {"type": "yarn"}},
        {"causal": False},
        {"use_biases": True},
        {"q_lora_rank": 16},
        {"moe": {"num_experts": 8}},
    ],
)
def test_what_mistrals_own_layout_may_say_and_is_not_computed_here(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not supported"):
        ModelConfig.from_params(PARAMS | change)
    neutral = {"causal": True, "use_biases": False, "model_type": "transformer", "max_position_embeddings": 262144}
    config = ModelConfig.from_params(PARAMS | neutral | dict.fromkeys(change)) if "causal" not in change else None
    assert config is None or config.max_position_embeddings == 262144


@pytest.mark.parametrize(
    "change",
    [{"is_causal": False}, {"rope_interleaved": True}, {"attention_multiplier": 0.5}, {"is_encoder_decoder": True}],
)
def test_what_would_change_the_computation_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not supported"):
        ModelConfig.from_dict(V01 | change)


def test_special_tokens_are_of_the_vocabulary() -> None:
    for change in ({"bos_token_id": 32000}, {"eos_token_id": 32000}, {"eos_token_id": [2, 40_000]}):
        with pytest.raises(ConfigError, match="outside the vocabulary of 32000"):
            ModelConfig.from_dict(V01 | change)


@pytest.mark.oracle
def test_every_key_that_transformers_writes_is_known() -> None:
    import transformers

    for kind in (transformers.MistralConfig, transformers.LlamaConfig):
        written = kind().to_dict()
        assert ModelConfig.from_dict(written).vocab_size == 32000
        with pytest.raises(ConfigError):
            ModelConfig.from_dict(written | {"is_causal": False})
