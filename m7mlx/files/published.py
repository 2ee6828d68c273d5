"""Models that have an alias: published in 4 bits for MLX, with their shapes and abilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from m7mlx.config import ModelConfig

_BITS = 4.5  # of a weight: 4, and a scale and a bias of 16 bits for each 64 weights
_NEWER = {
    "model_type": "mistral",
    "vocab_size": 131072,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
_MINISTRAL_3 = {"model_type": "ministral3"}
_SEVEN = {"model_type": "mistral", "rms_norm_eps": 1e-5, "sliding_window": None, "max_position_embeddings": 32768}
_SMALL = {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40}


class Published(NamedTuple):
    """A model on the Hub.

    repo    its repository
    nbytes  of its download, a vision tower included
    shape   what its config.json says of the text model
    can     what it can do besides answering
    """

    repo: str
    nbytes: int
    shape: Mapping[str, Any]
    can: tuple[str, ...] = ("tools",)

    @property
    def config(self) -> ModelConfig:
        """The shape of the text model, unquantised."""
        return ModelConfig.from_dict(self.shape)

    @property
    def weights(self) -> int:
        """Bytes of the text model's weights."""
        return int(self.config.n_weights * _BITS / 8)


PUBLISHED: dict[str, Published] = {
    "mistral": Published(
        "mlx-community/Mistral-7B-Instruct-v0.3-4bit", 4_080_000_000, _SEVEN | {"vocab_size": 32768}
    ),
    "mistral-v0.3": Published(
        "mlx-community/Mistral-7B-Instruct-v0.3-4bit", 4_080_000_000, _SEVEN | {"vocab_size": 32768}
    ),
    "mistral-v0.2": Published("mlx-community/Mistral-7B-Instruct-v0.2-4bit", 4_080_000_000, _SEVEN, ()),
    "ministral-3b": Published(
        "mlx-community/Ministral-3-3B-Instruct-2512-4bit",
        2_750_000_000,
        _MINISTRAL_3
        | {"hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26, "tie_word_embeddings": True},
    ),
    "ministral-8b": Published("mlx-community/Ministral-3-8B-Instruct-2512-4bit", 5_600_000_000, _MINISTRAL_3),
    "ministral-8b-reasoning": Published(
        "mlx-community/Ministral-3-8B-Reasoning-2512-4bit", 5_600_000_000, _MINISTRAL_3, ("tools", "reasoning")
    ),
    "ministral-14b": Published(
        "mlx-community/Ministral-3-14B-Instruct-2512-4bit",
        8_500_000_000,
        _MINISTRAL_3 | {"hidden_size": 5120, "intermediate_size": 16384, "num_hidden_layers": 40},
    ),
    "mistral-nemo": Published(
        "mlx-community/Mistral-Nemo-Instruct-2407-4bit",
        6_890_000_000,
        _NEWER | {"hidden_size": 5120, "num_hidden_layers": 40},
    ),
    "mistral-small": Published(
        "mlx-community/Mistral-Small-3.2-24B-Instruct-2506-4bit", 13_300_000_000, _NEWER | _SMALL
    ),
    "devstral-small": Published(
        "mlx-community/Devstral-Small-2-24B-Instruct-2512-4bit",
        14_100_000_000,
        _MINISTRAL_3 | _SMALL | {"max_position_embeddings": 393216},
    ),
}
