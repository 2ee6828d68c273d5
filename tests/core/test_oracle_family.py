"""The dense architectures of Mistral's family, against transformers on torch (extra `oracle`).

Random small models: layers with and without a window, YaRN beyond its original context, queries
scaled by their position, and the text's part of a model that sees pictures.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from needs import require

require("oracle")
import torch  # noqa: E402
import transformers  # noqa: E402

from m7mlx.batch import BatchCache  # noqa: E402
from m7mlx.compiled import CompiledStep  # noqa: E402
from m7mlx.config import ModelConfig  # noqa: E402
from m7mlx.decode import prefill  # noqa: E402
from m7mlx.loading import build  # noqa: E402
from m7mlx.model import Mistral  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("computed_by"),
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

LENGTH = 90
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": None,
    "initializer_range": 0.25,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
SCALED = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.7}  # steps at 16, 32, 48 …
FULL, SLIDING = "full_attention", "sliding_attention"
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, yarn": ("Mistral", {"rope_parameters": YARN, "sliding_window": 11}),
    "mistral, yarn with settings": (
        "Mistral",
        {"rope_parameters": YARN | {"beta_fast": 4.0, "beta_slow": 0.2, "attention_factor": 1.3, "truncate": False}},
    ),
    "ministral": ("Ministral", {"sliding_window": 11, "layer_types": [FULL, SLIDING, SLIDING]}),
    "ministral, sliding first": ("Ministral", {"sliding_window": 5, "layer_types": [SLIDING, FULL, FULL]}),
    "ministral3": ("Ministral3", {"rope_parameters": SCALED}),
    "ministral3, a window": ("Ministral3", {"rope_parameters": SCALED | {"mscale": 0.5}, "sliding_window": 20}),
    "mistral3 of mistral": ("Mistral3", {"model_type": "mistral", "rope_parameters": {"rope_theta": 1e6}}),
    "mistral3 of ministral3": ("Mistral3", {"model_type": "ministral3", "rope_parameters": SCALED}),
}


@pytest.fixture(scope="module", params=MODELS)
def models(request: pytest.FixtureRequest) -> tuple[Any, Mistral]:
    """A random model of transformers, and ours with its configuration and weights."""
    name, changes = MODELS[request.param]
    torch.manual_seed(len(request.param))
    config: Any
    if name == "Mistral3":
        text = transformers.AutoConfig.for_model(**(SMALL | changes))
        parts: dict[str, Any] = {"text_config": text, "vision_config": PIXTRAL, "attn_implementation": "eager"}
        config = transformers.Mistral3Config(tie_word_embeddings=False, **parts)
        oracle = transformers.Mistral3ForConditionalGeneration(config)
    else:
        config = getattr(transformers, f"{name}Config").from_dict(SMALL | changes, attn_implementation="eager")
        oracle = getattr(transformers, f"{name}ForCausalLM")(config)
    oracle = oracle.float().eval()
    weights = {key.replace("language_model.", ""): value for key, value in oracle.state_dict().items()}
    ours = ModelConfig.from_dict(config.to_dict())
    return oracle, build(ours, {key: mx.array(weights[key].numpy()) for key in ours.weight_shapes()})


def draw_ids(length: int = LENGTH) -> list[int]:
    ids: list[int] = torch.randint(0, 96, (length,)).tolist()
    return ids


def expected_logits(oracle: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = oracle(input_ids=torch.tensor([ids])).logits[0].numpy()
    return logits


def assert_near(found: mx.array, expected: np.ndarray, about: object = None) -> None:
    assert np.abs(np.array(found) - expected).max() <= 1e-4 * np.abs(expected).max(), about


def test_logits_through_every_chunking(models: tuple[Any, Mistral]) -> None:
    oracle, model = models
    ids = draw_ids()
    expected = expected_logits(oracle, ids)
    assert_near(model(mx.array([ids]))[0], expected)
    for chunk, slack in ((1, 0), (2, 3), (7, 0), (7, 8), (33, 3), (64, 64)):
        cache = model.new_cache(slack=slack)
        parts = [model(mx.array([ids[i : i + chunk]]), cache) for i in range(0, LENGTH, chunk)]
        assert_near(mx.concatenate(parts, axis=1)[0], expected, (chunk, slack))


def test_rows_of_a_batch_and_compiled_steps(models: tuple[Any, Mistral]) -> None:
    oracle, model = models
    rows = [draw_ids(), draw_ids()]
    expected = [expected_logits(oracle, ids) for ids in rows]
    starts = (13, 50)
    for step in (model, CompiledStep(model)):
        caches = [model.new_cache() for _ in rows]
        for ids, start, cache in zip(rows, starts, caches, strict=True):
            prefill(model, ids[:start], cache)
        batch = BatchCache(caches)
        for i in range(LENGTH - max(starts)):
            tokens = [[ids[start + i]] for ids, start in zip(rows, starts, strict=True)]
            logits = step(mx.array(tokens), batch)
            for row, start in enumerate(starts):
                assert_near(logits[row, 0], expected[row][start + i], (row, i))


def test_what_is_taken_back_is_written_anew(models: tuple[Any, Mistral]) -> None:
    oracle, model = models
    ids, cache = draw_ids(), model.new_cache(slack=6)
    model(mx.array([ids[:60]]), cache)
    for others in ([1, 2, 3, 4, 5, 6], [7, 8]):
        model(mx.array([others]), cache)
        cache.rollback(len(others))
    assert_near(model(mx.array([ids[60:]]), cache)[0], expected_logits(oracle, ids)[60:])


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rotations_far_on_are_those_of_transformers(theta: float) -> None:
    """Up to the end of a context of 262,144 tokens; a float32 has 24 bits for such an angle."""
    from transformers.models.ministral3.modeling_ministral3 import Ministral3RotaryEmbedding

    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": 16.0, "original_max_position_embeddings": 16384}
    config = transformers.Ministral3Config(rope_parameters=rope)
    places = np.array([[0, 1, 16_383, 16_384, 100_000, 200_003, 262_143]])
    cosines, sines = Ministral3RotaryEmbedding(config)(torch.zeros(1), torch.tensor(places))
    expected = np.concatenate([cosines[0, :, :64].numpy(), sines[0, :, :64].numpy()], axis=-1)
    found = ModelConfig.from_dict(config.to_dict()).rope.angles(places)[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
