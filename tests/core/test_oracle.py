"""The live oracle: Hugging Face's MistralForCausalLM on torch (extra `oracle`).

Its weights come to us through the installed converter.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from effort import some
from models import mistral_file
from needs import require

require("oracle")
import torch  # noqa: E402
import transformers  # noqa: E402

from m7mlx import load  # noqa: E402
from m7mlx.decode import decode, prefill  # noqa: E402
from m7mlx.sampling import Sampler, Sampling  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("computed_by"),
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

LENGTH = 96
SMALL: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "sliding_window": 11,
}
SHAPES: dict[str, dict[str, Any]] = {
    "window": {},
    "full": {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "one key-value head": {"num_key_value_heads": 1},
    "a key-value head each": {"num_key_value_heads": 4, "sliding_window": 5},
    "eight queries each": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8},
    "odd sizes": {"hidden_size": 52, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10},
    "tied": {"tie_word_embeddings": True, "sliding_window": 32},
    "window of one": {"sliding_window": 1},
}


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random model of transformers, and the folder that m7mlx-convert made of what it saved."""
    torch.manual_seed(len(request.param))
    config = transformers.MistralConfig.from_dict(
        SMALL | SHAPES[request.param] | {"initializer_range": 0.25}, attn_implementation="eager"
    )
    model = transformers.MistralForCausalLM(config).float().eval()
    folder = tmp_path_factory.mktemp("oracle")
    model.save_pretrained(folder / "hf", max_shard_size="2MB")
    assert len(list((folder / "hf").glob("*.safetensors"))) > 1
    shutil.copy(mistral_file("v1"), folder / "hf" / "tokenizer.model")
    convert = [sys.executable, "-m", "m7mlx_convert", str(folder / "hf"), "--mlx-path", str(folder / "mlx")]
    done = subprocess.run(convert, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return model, folder / "mlx"


def relative(found: mx.array, expected: Any) -> float:
    array = expected.numpy()
    return float(np.abs(np.array(found) - array).max() / np.abs(array).max())


def test_logits_through_every_chunking(checkpoint: tuple[Any, Path]) -> None:
    oracle, folder = checkpoint
    ids = torch.randint(0, 32000, (1, LENGTH))
    with torch.no_grad():
        expected = oracle(ids).logits[0]
    model, _ = load(folder)
    sequence = mx.array(ids.tolist())
    assert relative(model(sequence)[0], expected) < 1e-4
    for number, chunk in enumerate((1, 2, 5, 11, 33, 64, 65, 66)):
        for slack in some((0, 3, 64), 3, first=number):
            cache = model.new_cache(slack=slack)
            parts = [model(sequence[:, i : i + chunk], cache) for i in range(0, LENGTH, chunk)]
            assert relative(mx.concatenate(parts, axis=1)[0], expected) < 1e-4, (chunk, slack)


def test_a_greedy_continuation_of_200_tokens_is_identical(checkpoint: tuple[Any, Path]) -> None:
    """The oracle chooses each token after those before it, so it would go on in the same way."""
    oracle, folder = checkpoint
    prompt = torch.randint(0, 32000, (1, 40))
    model, _ = load(folder)
    cache = model.new_cache()
    logits = prefill(model, prompt[0].tolist(), cache, chunk=16)
    ours = list(decode(model, logits, cache, Sampler(Sampling()), 200))
    assert len(ours) == 200
    with torch.no_grad():  # without a cache: nothing of it can go wrong
        chosen = oracle(torch.cat([prompt, torch.tensor([ours])], dim=1)).logits[0].argmax(-1)
    assert chosen[39:-1].tolist() == ours


@pytest.mark.parametrize("is_own", [False, True])
def test_a_head_beside_a_tied_embedding(is_own: bool, tmp_path: Path) -> None:
    """The config says that head and embedding are tied, and the file has both.

    transformers ties them only where they are equal.
    """
    from safetensors.torch import load_file, save_file

    torch.manual_seed(3)
    config = transformers.MistralConfig.from_dict(SMALL | {"tie_word_embeddings": True}, attn_implementation="eager")
    transformers.MistralForCausalLM(config).float().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    head[31_999, 63] += is_own
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(mistral_file("v1"), tmp_path / "tokenizer.model")
    oracle = transformers.MistralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, 32000, (1, LENGTH))
    with torch.no_grad():
        expected = oracle(ids).logits[0]
    model, _ = load(tmp_path)
    assert model.config.tie_word_embeddings is not is_own
    assert relative(model(mx.array(ids.tolist()))[0], expected) < 1e-4
