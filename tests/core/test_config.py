"""Configs, read as Hugging Face and Mistral read them.

What is not understood is refused by name.
"""

from __future__ import annotations

import json
from dataclasses import replace
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
from m7mlx.rope import RopeScaling

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


YARN = RopeScaling(64, factor=8.0, beta_fast=20.0, beta_slow=2.0, attention_factor=1.5, truncate=False)
MINISTRAL3 = {  # mistralai/Ministral-3-8B-Instruct-2512, without its vision_config
    "architectures": ["Mistral3ForConditionalGeneration"],
    "dtype": "bfloat16",
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": {
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 262144,
        "model_type": "ministral3",
        "num_attention_heads": 32,
        "num_hidden_layers": 34,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 131072,
    },
    "vision_config": {"model_type": "pixtral"},
    "vision_feature_layer": -1,
}


def test_the_text_of_a_model_that_sees_pictures() -> None:
    config = ModelConfig.from_dict(MINISTRAL3)
    assert (config.model_type, config.n_layers, config.window) == ("ministral3", 34, None)
    assert config.rope_scaling == RopeScaling(16384, factor=16.0, query_beta=0.1)
    assert not ModelConfig.from_dict(MINISTRAL3 | {"text_config": {"tie_word_embeddings": False}}).tie_word_embeddings
    assert ModelConfig.from_dict(MINISTRAL3 | {"text_config": {}}).tie_word_embeddings  # transformers' default
    small31 = ModelConfig.from_dict(MINISTRAL3 | {"text_config": {"sliding_window": None, "rope_theta": 1e9}})
    assert (small31.model_type, small31.sliding_window, small31.rope_theta) == ("mistral", None, 1e9)
    scheme = {"group_size": 64, "bits": 4, "language_model.lm_head": {"group_size": 32, "bits": 8}}
    quantization = ModelConfig.from_dict(MINISTRAL3 | {"quantization": scheme}).quantization
    assert quantization is not None and quantization.overrides.keys() == {"lm_head"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text_config": None}, "text_config"),
        ({"text_config": {"model_type": "mistral4"}}, "mistral4 is not supported"),
        ({"text_config": {"model_type": "mistral3"}}, "mistral3 is not supported"),
        ({"text_config": {"n_experts": 4}}, "'n_experts'"),
        ({"audio_config": {}}, "'audio_config'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ],
    ids=str,
)
def test_what_is_not_understood_of_it_is_refused_by_name(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ModelConfig.from_dict(MINISTRAL3 | change)


def test_layers_with_and_without_a_window() -> None:
    kinds = ["full_attention", *["sliding_attention"] * 3] * 8
    mixed = ModelConfig.from_dict(V01 | {"model_type": "ministral", "architectures": None, "layer_types": kinds})
    assert mixed.windows == (None, 4096, 4096, 4096) * 8
    assert (mixed.window, mixed.sliding_window) == (None, 4096)
    for name, window in (("full_attention", None), ("sliding_attention", 4096)):
        alike = ModelConfig.from_dict(V01 | {"layer_types": [name] * 32})
        assert (alike.layer_types, alike.window, alike.windows) == ((), window, (window,) * 32)


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
        ({"rope_scaling": {"type": "yarn"}}, "'yarn' needs factor"),
        ({"rope_scaling": {"type": "yarn", "factor": -1}}, "rope_scaling: factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta": 3}}, "rope_scaling has 'beta'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "llama_4_scaling_beta": 0.1}}, "ministral3 alone"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}, "rope_parameters": {"rope_theta": 1e4}}, "contradict"),
        ({"rope_parameters": {"full_attention": {}}}, "'full_attention'"),
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
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types names 2 layers"),
        ({"layer_types": ["sliding_attention"] * 32, "sliding_window": None}, "sliding_window is null"),
        ({"layer_types": ["chunked_attention"] * 32}, "'chunked_attention', which is not supported"),
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
            layer_types=("full_attention", "sliding_attention", "sliding_attention"), model_type="ministral"
        ),
        small_config(layer_types=("sliding_attention", "full_attention", "full_attention")),
        small_config(rope_scaling=YARN),
        small_config(model_type="ministral3", sliding_window=None, rope_scaling=replace(YARN, query_beta=0.25)),
        small_config(model_type="ministral3", rope_scaling=RopeScaling(16, query_beta=0.5)),
        small_config(model_type="ministral3"),
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
    queries = {"llama_4_scaling": {"original_max_position_embeddings": 16384, "beta": 0.1}}
    yarn = {"original_max_position_embeddings": 16384, "factor": 16, "apply_scale": False, "beta": 32, "alpha": 1}
    ministral3 = ModelConfig.from_params(params | queries | {"yarn": yarn, "vision_encoder": {"dim": 1}})
    assert (ministral3.model_type, ministral3.rope_theta) == ("ministral3", 1e6)
    assert ministral3.rope_scaling == ModelConfig.from_dict(MINISTRAL3).rope_scaling
    scaled = ModelConfig.from_params(params | {"yarn": yarn | {"apply_scale": True}}).rope_scaling
    assert scaled is not None and scaled.attention_factor == pytest.approx(1.2772588722239782)
    for key in ("sliding_window", "_sliding_window"):
        mixed = ModelConfig.from_params(params | {key: [None, 32768, 32768, 32768]})
        assert (mixed.model_type, mixed.windows) == ("ministral", (None, 32768, 32768, 32768) * 8)
        assert ModelConfig.from_params(params | {key: [7]}).windows == (7,) * 32
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
    ("change", "reason"),
    [
        ({"yarn": {"factor": 16}}, "yarn needs original_max_position_embeddings"),
        ({"yarn": {"factor": 16, "original_max_position_embeddings": 4, "gamma": 1}}, "yarn has 'gamma'"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling needs original_max_position_embeddings"),
        ({"rope_scaling": {"type": "yarn"}}, "needs factor"),
        ({"sliding_window": [4, None, 4]}, "names 3 layers, which does not divide the model's 1"),
        ({"sliding_window": 4, "_sliding_window": [4]}, "both given"),
        ({"multimodal": {"whisper_model_args": {}}}, "whisper_model_args"),
    ],
)
def test_what_mistrals_own_layout_says_by_halves(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ModelConfig.from_params(PARAMS | change)


@pytest.mark.parametrize(
    "change",
    [
        {"_sliding_window": [4096, 32768]},
        {"quantization": {"qformat_weight": "fp8_e4m3"}},
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

    kinds = ("MistralConfig", "LlamaConfig", "MinistralConfig", "Ministral3Config")
    for name in kinds:
        written = getattr(transformers, name)().to_dict()
        ours = ModelConfig.from_dict(written)
        assert ours.vocab_size == written["vocab_size"]
        read = getattr(transformers, name).from_dict(ours.to_dict())  # and the other way
        again = ModelConfig.from_dict(read.to_dict())
        assert again == ours
        with pytest.raises(ConfigError):
            ModelConfig.from_dict(written | {"is_causal": False})


@pytest.mark.oracle
def test_a_model_that_sees_pictures_as_transformers_writes_it() -> None:
    import transformers

    for text in (transformers.MistralConfig(sliding_window=None), transformers.Ministral3Config()):
        written = transformers.Mistral3Config(text_config=text).to_dict()
        ours = ModelConfig.from_dict(written)
        assert replace(ours, tie_word_embeddings=False) == ModelConfig.from_dict(text.to_dict())
