"""The shape of a model, read from Hugging Face's config.json or Mistral's params.json.

Nothing is guessed. A key that a config.json leaves out takes Hugging Face's default for that
architecture; a key that would change the computation and is not understood is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m7mlx.config_json import ARCHITECTURES, MOST_LAYERS, SLIDING, check_layer_types, read_config
from m7mlx.config_params import read_params
from m7mlx.errors import ConfigError
from m7mlx.jsonfile import number, read_json, token_id, whole
from m7mlx.quantization import Quantization
from m7mlx.rope import Rope, RopeScaling

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
    layer_types              "full_attention" or "sliding_attention" for each layer; empty where the
                             window is that of all layers
    head_dim                 need not be hidden_size / n_heads
    max_position_embeddings  the context in tokens that the positions were trained for
    rope_scaling             how the positions go beyond those first trained for
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
    rope_scaling: RopeScaling | None = None
    layer_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, key in _WHOLE.items():
            whole(getattr(self, name), key, MOST_LAYERS if name == "n_layers" else 1 << 40)
        if self.sliding_window is not None:
            whole(self.sliding_window, "sliding_window")
        check_layer_types(self.layer_types, self.n_layers, self.sliding_window)
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
        """Read Hugging Face's config.json, with Hugging Face's defaults for what it leaves out.

        Of a model that sees pictures, the part that reads and writes text is read.
        """
        return cls(**read_config(data))

    @classmethod
    def from_params(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read Mistral's own params.json, with the defaults of mistral-inference."""
        return cls(**read_params(data))

    # --- writing ----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return a whole config.json, of which `from_dict` makes this config again."""
        data: dict[str, Any] = {
            "architectures": [name for name, kind in ARCHITECTURES.items() if kind == self.model_type],
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
            **self._rope_dict(),
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids),
        }
        if self.model_type != "llama":
            data["sliding_window"] = self.sliding_window
        if self.layer_types:
            data["layer_types"] = list(self.layer_types)
        if self.quantization:
            data["quantization"] = self.quantization.to_dict()
        return data

    def _rope_dict(self) -> dict[str, Any]:
        """Return what config.json says of RoPE, where transformers and mlx-lm look for it."""
        scaling = {} if self.rope_scaling is None else self.rope_scaling.to_dict()
        if self.model_type == "ministral3":  # both need all of it
            beta = 0.0 if self.rope_scaling is None else self.rope_scaling.query_beta
            all_of_it = {"rope_type": "default", "original_max_position_embeddings": self.max_position_embeddings}
            all_of_it |= {"rope_theta": self.rope_theta, "llama_4_scaling_beta": beta}
            return {"rope_parameters": all_of_it | scaling}
        return {"rope_theta": self.rope_theta} | ({"rope_scaling": scaling} if scaling else {})

    # --- what follows from it ---------------------------------------------------------------------

    @property
    def rope(self) -> Rope:
        """How positions rotate queries and keys."""
        return Rope(self.rope_theta, self.head_dim, self.rope_scaling)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer; None for full attention."""
        if not self.layer_types:
            return (self.sliding_window,) * self.n_layers
        return tuple(self.sliding_window if kind == SLIDING else None for kind in self.layer_types)

    @property
    def window(self) -> int | None:
        """The window that bounds all layers; None where any has full attention."""
        return None if self.layer_types else self.sliding_window

    def of_layers(self, layers: range) -> ModelConfig:
        """Return the config of some of the layers, one behind the other."""
        return replace(self, n_layers=len(layers), layer_types=self.layer_types[layers.start : layers.stop])

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
