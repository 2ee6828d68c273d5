"""The keys that a config.json or params.json may have; any other is refused by name.

Each is understood, or known to have no effect on the computation. A list of harmful keys could not
keep that promise: tomorrow's file has a key that nobody has heard of today.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m7mlx.errors import ConfigError

# config.json: what `ModelConfig.from_dict` reads.
_READ = frozenset(
    [
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "rope_parameters",
        "rope_scaling",
        "max_position_embeddings",
        "sliding_window",
        "layer_types",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "quantization",
        "quantization_config",
    ]
)
# Keys that may change the computation, with the values that leave it as it is.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (),
    "hidden_act": ("silu",),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "num_local_experts": (0, 1),
    "partial_rotary_factor": (1.0,),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "rope_traditional": (False,),
    "tie_encoder_decoder": (False,),
    "use_bfloat16": (False, True),
    "use_sliding_window": (True,),
}
# Keys about training, about generation (which generation_config.json or the caller decides), about
# other libraries or the file itself, and about code in the folder, which never runs.
_WITHOUT_EFFECT = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_flash_attn_2_enabled",
        "_name_or_path",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "base_model_name_or_path",
        "begin_suppress_tokens",
        "cache_implementation",
        "chunk_size_feed_forward",
        "cls_token_id",
        "cross_attention_hidden_size",
        "custom_pipelines",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "embd_pdrop",
        "encoder_no_repeat_ngram_size",
        "eos_token",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "length_penalty",
        "license",
        "max_length",
        "max_new_tokens",
        "min_length",
        "model_file",
        "model_max_length",
        "name_or_path",
        "neftune_noise_alpha",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "resid_pdrop",
        "return_dict",
        "return_dict_in_generate",
        "router_aux_loss_coef",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tokenizer_class",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "trust_remote_code",
        "typical_p",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
        "use_return_dict",
    ]
)

# The config.json of a model that sees pictures: what is read of it, and what is left out.
_WRAPPER_READ = frozenset(
    [
        "architectures",
        "model_type",
        "text_config",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "quantization",
        "quantization_config",
    ]
)
_PICTURES = frozenset(
    [
        "image_token_id",
        "image_token_index",
        "multimodal_projector_bias",
        "projector_hidden_act",
        "spatial_merge_size",
        "vision_config",
        "vision_feature_layer",
    ]
)

# params.json: what `ModelConfig.from_params` reads.
_PARAMS_READ = frozenset(
    [
        "dim",
        "n_layers",
        "head_dim",
        "hidden_dim",
        "n_heads",
        "n_kv_heads",
        "norm_eps",
        "vocab_size",
        "rope_theta",
        "max_seq_len",
        "max_position_embeddings",
        "sliding_window",
        "_sliding_window",
        "yarn",
        "llama_4_scaling",
        "rope_scaling",
        "tied_embeddings",
        "moe",
        "multimodal",
    ]
)
# The same two groups for params.json.
_PARAMS_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "activation": ("silu",),
    "causal": (True,),
    "model_type": ("transformer", "mistral"),
    "use_biases": (False,),
    **dict.fromkeys(("lora", "quantization"), ()),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), ()),
}
_PARAMS_WITHOUT_EFFECT = frozenset(["max_batch_size", "dtype", "vision_encoder"])  # pictures are left out


def check_keys(data: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key or a value of a config.json that is not understood."""
    _check(data, _READ | _WITHOUT_EFFECT, _NEUTRAL)


def check_wrapper_keys(data: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key beside `text_config` that is not understood.

    What concerns pictures is left out.
    """
    _check(data, _WRAPPER_READ | _PICTURES | _WITHOUT_EFFECT, _NEUTRAL)


def check_params_keys(data: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key or a value of a params.json that is not understood."""
    _check(data, _PARAMS_READ | _PARAMS_WITHOUT_EFFECT, _PARAMS_NEUTRAL)


def _check(data: Mapping[str, Any], known: frozenset[str], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    for key, value in data.items():
        if value is None or key in known:  # null stands for a key that is left out
            continue
        if key not in neutral:
            raise ConfigError(
                f"the key {key[:100]!r} is not known here and could change the computation; delete it if it does not"
            )
        if not any(isinstance(value, bool) is isinstance(good, bool) and value == good for good in neutral[key]):
            only = f" (only {neutral[key][0]!r})" if neutral[key] else ""
            raise ConfigError(f"{key} = {str(value)[:100]!r} is not supported{only}")
