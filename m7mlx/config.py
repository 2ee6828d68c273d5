"""The shape of a model, read from Hugging Face's config.json or Mistral's params.json.

Nothing is guessed. A key that a config.json leaves out takes Hugging Face's default for that
architecture; a key that would change the computation and is not understood is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m7mlx.config_keys import check_keys, check_params_keys
from m7mlx.errors import ConfigError
from m7mlx.jsonfile import given, number, read_json, said, texts, token_id, token_ids, whole
from m7mlx.quantization import Quantization

# Hugging Face's defaults, from MistralConfig and LlamaConfig; those that both share are in _SHARED.
_SHARED: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": _SHARED
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "llama": _SHARED
    | {
        "intermediate_size": 11008,
        "num_key_value_heads": None,  # as many as query heads
        "max_position_embeddings": 2048,
        "sliding_window": None,
    },
}
_ARCHITECTURES = {"MistralForCausalLM": "mistral", "LlamaForCausalLM": "llama"}
_DEFAULT_ROPE_THETA = 10000.0
_MOST_LAYERS = 10_000
# Fields that must be numbers, by what a config.json calls them.
_WHOLE = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}
_NUMBERS = {"norm_eps": "rms_norm_eps", "rope_theta": "rope_theta"}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model like Mistral, in the paper's words (arXiv 2310.06825, table 1).

    sliding_window           tokens that a token sees, itself included; None for full attention
    head_dim                 need not be hidden_size / n_heads
    max_position_embeddings  the context in tokens that the positions were trained for
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    sliding_window: int | None
    tie_word_embeddings: bool
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        for name, key in _WHOLE.items():
            whole(getattr(self, name), key, _MOST_LAYERS if name == "n_layers" else 1 << 40)
        if self.sliding_window is not None:
            whole(self.sliding_window, "sliding_window")
        for name, key in _NUMBERS.items():
            number(getattr(self, name), key)
        if self.bos_token_id is not None:
            token_id(self.bos_token_id, "bos_token_id")
        for field, ids in (("bos_token_id", (self.bos_token_id or 0,)), ("eos_token_id", self.eos_token_ids)):
            if max(ids, default=0) >= self.vocab_size:
                raise ConfigError(f"{field} {max(ids)} is outside the vocabulary of {self.vocab_size}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key-value heads: "
                "the first must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary position embedding needs pairs")

    # --- reading ----------------------------------------------------------------------------------

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `folder`/config.json (preferred) or `folder`/params.json. Raises ConfigError."""
        folder = Path(folder)
        for name, read in (("config.json", cls.from_dict), ("params.json", cls.from_params)):
            if (folder / name).is_file():
                try:
                    return read(read_json(folder / name))
                except ConfigError as error:
                    raise ConfigError(f"{folder / name}: {error}") from None
        raise ConfigError(f"{folder} has no config.json; give a folder with a model's config and weights")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json, with Hugging Face's defaults for what it leaves out."""
        model_type = _model_type(data)
        values = _DEFAULTS[model_type] | {k: v for k, v in data.items() if v is not None or k == "sliding_window"}
        if model_type == "llama" and values["sliding_window"] is not None:
            raise ConfigError("sliding_window is not a part of llama; say model_type mistral if it is meant")
        check_keys(data)
        n_heads, hidden = values["num_attention_heads"], values["hidden_size"]
        head_dim = values.get("head_dim")
        if head_dim is None:
            if whole(hidden, "hidden_size") % whole(n_heads, "num_attention_heads"):
                raise ConfigError(f"hidden_size {hidden} is no multiple of {n_heads} heads, and head_dim is absent")
            head_dim = hidden // n_heads
        quantization = given(data, "quantization", "an object")
        foreign = given(data, "quantization_config", "an object")
        if quantization is None and foreign is not None:
            method = said(foreign.get("quant_method", "unknown"))
            raise ConfigError(f"weights quantised by {method} are not MLX's; convert them: m7mlx-convert FOLDER")
        config = cls(
            model_type=model_type,
            vocab_size=values["vocab_size"],
            hidden_size=hidden,
            intermediate_size=values["intermediate_size"],
            n_layers=values["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=n_heads if values["num_key_value_heads"] is None else values["num_key_value_heads"],
            head_dim=head_dim,
            norm_eps=values["rms_norm_eps"],
            rope_theta=_rope_theta(data),
            max_position_embeddings=values["max_position_embeddings"],
            sliding_window=values["sliding_window"],
            tie_word_embeddings=_boolean(values, "tie_word_embeddings"),
            bos_token_id=data.get("bos_token_id", 1),
            eos_token_ids=token_ids(data.get("eos_token_id", 2), "eos_token_id"),
            quantization=Quantization.from_dict(quantization) if quantization else None,
        )
        _check_layer_types(data, config)
        return config

    @classmethod
    def from_params(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read Mistral's own params.json, with the defaults of mistral-inference."""
        if data.get("moe") or data.get("vision_encoder"):
            raise ConfigError("mixtures of experts and vision models are not supported; only dense Mistral is")
        check_params_keys(data)
        window = data.get("sliding_window")
        if isinstance(window, list):
            raise ConfigError("a sliding_window for each layer is not supported")
        try:
            return cls(
                model_type="mistral",
                vocab_size=data["vocab_size"],
                hidden_size=data["dim"],
                intermediate_size=data["hidden_dim"],
                n_layers=data["n_layers"],
                n_heads=data["n_heads"],
                n_kv_heads=data.get("n_kv_heads", data["n_heads"]),
                head_dim=data["head_dim"],
                norm_eps=data["norm_eps"],
                rope_theta=(1e4 if window else 1e6) if data.get("rope_theta") is None else data["rope_theta"],
                max_position_embeddings=data.get("max_seq_len") or data.get("max_position_embeddings") or 32768,
                sliding_window=window,
                tie_word_embeddings=bool(data.get("tied_embeddings", False)),
            )
        except KeyError as error:
            raise ConfigError(f"{error.args[0]!r} is missing") from None

    # --- writing ----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return a whole config.json, of which `from_dict` makes this config again."""
        data: dict[str, Any] = {
            "architectures": [name for name, kind in _ARCHITECTURES.items() if kind == self.model_type],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids),
        }
        if self.model_type == "mistral":
            data["sliding_window"] = self.sliding_window
        if self.quantization:
            data["quantization"] = self.quantization.to_dict()
        return data

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every parameter of the unquantised model: its name on disk → its shape."""
        d, heads, kv = self.hidden_size, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        block = {
            "input_layernorm": (d,),
            "self_attn.q_proj": (heads, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, heads),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (self.intermediate_size, d),
            "mlp.up_proj": (self.intermediate_size, d),
            "mlp.down_proj": (d, self.intermediate_size),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, d)}
        for i in range(self.n_layers):
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
        shapes["model.norm.weight"] = (d,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        return shapes

    @property
    def n_weights(self) -> int:
        """How many numbers the weights have."""
        return sum(math.prod(shape) for shape in self.weight_shapes().values())


def _model_type(data: Mapping[str, Any]) -> str:
    """Return "mistral" or "llama"; other architectures are refused by name."""
    named = texts(data, "architectures")
    model_type = given(data, "model_type", "a text") or (_ARCHITECTURES.get(named[0]) if named else None)
    foreign = [name for name in named if name not in _ARCHITECTURES]
    if foreign or model_type not in _DEFAULTS:
        found = foreign[0] if foreign else (model_type or "no architecture")
        raise ConfigError(
            f"architecture {said(found)[1:-1]} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
    if named and _ARCHITECTURES[named[0]] != model_type:
        raise ConfigError(f"architectures says {named[0]} but model_type says {model_type}")
    return str(model_type)


def _rope_theta(data: Mapping[str, Any]) -> float:
    """Find RoPE's base: at the top level, or in `rope_parameters` as transformers 5 writes it."""
    found: list[float] = []
    if data.get("rope_theta") is not None:
        found.append(number(data["rope_theta"], "rope_theta"))
    for key in ("rope_parameters", "rope_scaling"):
        rope = given(data, key, "an object") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", None):
            raise ConfigError(f"{key} of type {said(kind)} is not supported; only plain RoPE is")
        if rope.get("partial_rotary_factor") not in (None, 1.0):
            raise ConfigError("partial_rotary_factor is not supported; RoPE must turn the whole head")
        if rope.get("rope_theta") is not None:
            found.append(number(rope["rope_theta"], "rope_theta"))
    if len(set(found)) > 1:
        raise ConfigError(f"rope_theta is given twice and contradicts itself: {found[0]} and {found[1]}")
    return found[0] if found else _DEFAULT_ROPE_THETA


def _check_layer_types(data: Mapping[str, Any], config: ModelConfig) -> None:
    kinds = set(texts(data, "layer_types"))
    expected = "full_attention" if config.sliding_window is None else "sliding_attention"
    if kinds - {expected}:
        raise ConfigError(f"layer_types mixes {said(', '.join(sorted(kinds)))}; all layers must be {expected}")


def _boolean(values: Mapping[str, Any], key: str) -> bool:
    if not isinstance(values[key], bool):
        raise ConfigError(f"{key} must be true or false, not {said(values[key])}")
    return bool(values[key])
