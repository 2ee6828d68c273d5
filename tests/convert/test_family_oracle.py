"""The newer Mistrals against transformers and mlx-lm: equal logits through every form.

transformers writes a random model; what the converter makes of it, of its FP8 form, and of what
mlx-lm makes of it, has its logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from family import write_tokenizer
from m7mlx_convert.convert import convert
from m7mlx_convert.scheme import Recipe
from needs import require
from peers import silenced

from m7mlx.loading import load_model
from m7mlx.quantization import Quantization

require("oracle")
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

LENGTH = 80  # past the original context, and past two steps of the queries' scaling
SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.25,
    "max_position_embeddings": 128,
    "sliding_window": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.25,
}
TEXTS = {
    "mistral": SMALL | {"model_type": "mistral", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "ministral3": SMALL | {"model_type": "ministral3", "rope_parameters": YARN},
}
VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
IDS = np.random.default_rng(3).integers(2, 258, (1, LENGTH))


@pytest.fixture(scope="module", params=TEXTS)
def wrapped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A random model that sees pictures, as transformers writes it, and its logits for a text."""
    torch.manual_seed(7)
    config = transformers.Mistral3Config(
        text_config=TEXTS[request.param], vision_config=VISION, tie_word_embeddings=False, image_token_index=319
    )
    model = transformers.Mistral3ForConditionalGeneration(config).float().eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return request.param, folder, logits_of(model)


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(input_ids=torch.from_numpy(IDS)).logits[0].float().numpy()
    return logits


def assert_logits(folder: Path, expected: np.ndarray) -> None:
    model = load_model(folder)
    found = np.array(model(mx.array(IDS), model.new_cache(kv_bits=32))[0])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_its_text_is_read_and_converted(wrapped: tuple[str, Path, np.ndarray], tmp_path: Path) -> None:
    kind, folder, expected = wrapped
    assert_logits(folder, expected)
    out = convert(str(folder), tmp_path / "out")
    assert_logits(out, expected)
    written = json.loads((out / "config.json").read_text())
    assert written["model_type"] == kind
    # The result is transformers' own text model.
    text = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    np.testing.assert_allclose(logits_of(text), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("blocks", [None, [32, 32]])
def test_fp8_is_what_transformers_reads(
    wrapped: tuple[str, Path, np.ndarray],
    tmp_path: Path,
    blocks: list[int] | None,
) -> None:
    _, folder, _ = wrapped
    config = json.loads((folder / "config.json").read_text())
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "language_model" not in name or "proj" not in name:
            tensors[name] = weight
            continue
        side = blocks[0] if blocks else max(weight.shape)
        parts = weight.unfold(0, min(side, weight.shape[0]), side).unfold(1, min(side, weight.shape[1]), side)
        scale = (parts.abs().amax((2, 3)) / 448).to(torch.bfloat16).float()
        spread = scale.repeat_interleave(side, 0).repeat_interleave(side, 1)[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale if blocks else scale.reshape(())
    settings = {
        "quant_method": "fp8",
        "weight_block_size": blocks,
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }
    packed = tmp_path / "fp8"
    packed.mkdir()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    write_tokenizer(packed)
    oracle = transformers.Mistral3ForConditionalGeneration.from_pretrained(packed, dtype=torch.float32).eval()
    assert_logits(convert(str(packed), tmp_path / "out", dtype="float32"), logits_of(oracle))


@pytest.mark.parametrize("scheme", [None, Quantization(32, 8)])
def test_mlx_lm_both_ways(
    wrapped: tuple[str, Path, np.ndarray],
    tmp_path: Path,
    mlx_lm: ModuleType,
    scheme: Quantization | None,
) -> None:
    from mlx_lm.convert import convert as their_convert

    _, folder, expected = wrapped
    with silenced():
        their_convert(
            str(folder),
            str(tmp_path / "theirs"),
            dtype="float32",
            quantize=scheme is not None,
            q_group_size=32,
            q_bits=8,
        )
    ours = convert(str(folder), tmp_path / "ours", recipe=Recipe(scheme), dtype="float32")
    with silenced():
        model = mlx_lm.utils.load_model(ours)[0]
    logits = np.array(model(mx.array(IDS))[0])
    assert_logits(ours, logits)
    # Theirs are loaded here alone: of a text without YaRN mlx-lm itself does not find RoPE's base.
    assert_logits(tmp_path / "theirs", logits)
    if scheme is None:
        assert_logits(ours, expected)
