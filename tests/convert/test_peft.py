"""PEFT as the oracle.

Adapters that it makes, saves and loads, and the logits of the model with them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from m7mlx_convert.convert import convert
from models import mistral_file
from needs import require

from m7mlx.files.adapters import _PEFT_KNOWN

require("peft")
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from m7mlx import load  # noqa: E402
from m7mlx.errors import InputError  # noqa: E402

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

SMALL: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 11,
    "initializer_range": 0.2,
}
IDS = np.random.default_rng(0).integers(3, 32000, (1, 24)).tolist()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "base"
    torch.manual_seed(1)
    config = transformers.MistralConfig(**SMALL, tie_word_embeddings=request.param)
    transformers.MistralForCausalLM(config).float().save_pretrained(folder)
    shutil.copy(mistral_file("v1"), folder / "tokenizer.model")
    return folder


def hugging_face(folder: Path) -> Any:
    return transformers.MistralForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def train(base: Path, adapter: Path, **settings: Any) -> None:
    """Save an adapter of which every number that can be trained has moved."""
    torch.manual_seed(2)
    values: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(hugging_face(base), peft.LoraConfig(**values))
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(adapter))


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model.eval()(torch.tensor(IDS), use_cache=False).logits[0].numpy()
    return found


def difference(folder: Path, expected: np.ndarray, adapter_path: Path | None = None) -> float:
    found = np.array(load(folder, adapter_path=adapter_path)[0](mx.array(IDS))[0])
    return float(np.abs(found - expected).max() / np.abs(expected).max())


HEADS = ["lm_head", "embed_tokens"]
MERGED: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "all linear layers": {"target_modules": "all-linear", "bias": "all", "lora_dropout": 0.1},
    "rank-stabilised": {"target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 5, "k_proj": 3},
    },
    "some layers": {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "DoRA": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "DoRA, rank-stabilised": {"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True},
    "DoRA of the embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "DoRA of the head": {"target_modules": ["lm_head"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding and head": {"target_modules": HEADS},
    "embedding and head, tied": {"target_modules": HEADS, "ensure_weight_tying": True},
    "embedding, tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "head, tied": {"target_modules": ["lm_head"], "ensure_weight_tying": True},
    "embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": HEADS},
    "both saved, tied": {"target_modules": ["q_proj"], "modules_to_save": HEADS, "ensure_weight_tying": True},
    "embedding by LoRA, head saved": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    "norms saved": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "no way to begin": {"target_modules": ["q_proj"], "init_lora_weights": False},
    "EVA": {"target_modules": ["q_proj"], "init_lora_weights": "eva"},
    "MiCA": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
}


def skip_where_peft_is_older(settings: dict[str, Any]) -> None:
    known = set(peft.LoraConfig.__dataclass_fields__)
    if not settings.keys() <= known or (settings.get("init_lora_weights") == "mica" and "kasa_config" not in known):
        pytest.skip(f"PEFT {peft.__version__} does not have this")


@pytest.mark.parametrize("name", MERGED)
def test_merged_or_unmerged_as_peft_computes_it(base: Path, tmp_path: Path, name: str) -> None:
    """The logits of the model that PEFT loads, adapter apart.

    Merging a tied model, PEFT itself goes wrong.
    """
    skip_where_peft_is_older(MERGED[name])
    train(base, tmp_path / "adapter", **MERGED[name])
    expected = logits(peft.PeftModel.from_pretrained(hugging_face(base), tmp_path / "adapter"))
    out = convert(str(base), tmp_path / "out", adapter=str(tmp_path / "adapter"))
    assert difference(out, expected) < 1e-4
    assert difference(base, expected) > 1e-2  # it has changed something
    if "norm" in MERGED[name].get("modules_to_save", []):
        with pytest.raises(InputError, match="which only merging can do: m7mlx-convert MODEL --adapter"):
            load(base, adapter_path=tmp_path / "adapter")
    else:
        assert difference(base, expected, adapter_path=tmp_path / "adapter") < 1e-4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights pissa changes the weights"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4 changes"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights olora changes"),
    "activated": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is not supported"),
    "biases": ({"lora_bias": True}, "lora_bias is not supported"),
    "tokens": ({"trainable_token_indices": [7, 9]}, "trainable_token_indices is not supported"),
    "layers again": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is not supported"),
    "KaSA": ({"kasa_config": {}}, "kasa_config is not supported"),
    "block-diagonal": (
        {"use_bdlora": {"target_modules_bd_b": ["q_proj"], "nblocks": 2, "match_strict": False}},
        "use_bdlora is not supported",
    ),
    "VeLoRA": ({"velora_config": {"num_groups": 4}}, "velora_config is not supported"),
    "Monte Carlo": ({"monteclora_config": {}}, "monteclora_config is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_merging_would_get_wrong_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    settings, message = REFUSED[name]
    skip_where_peft_is_older(settings)
    train(base, tmp_path / "adapter", target_modules=["q_proj"], **settings)
    with pytest.raises(InputError, match=message):
        convert(str(base), tmp_path / "out", adapter=str(tmp_path / "adapter"))


@pytest.mark.parametrize("init", ["loftq", "corda", "lora_ga", "PISSA", "a new one", ["pissa"], 1])
def test_other_ways_to_begin_are_refused(base: Path, tmp_path: Path, init: object) -> None:
    """Those that need data or other libraries to make, and those that are not known."""
    train(base, tmp_path / "adapter", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(InputError, match="changes the weights that the adapter is added to"):
        convert(str(base), tmp_path / "out", adapter=str(tmp_path / "adapter"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_made_plain_by_peft_they_are_merged(base: Path, tmp_path: Path, init: Literal["pissa", "olora"]) -> None:
    torch.manual_seed(2)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=init)
    model = peft.get_peft_model(hugging_face(base), settings)
    config = model.peft_config["default"]
    assert isinstance(config, peft.LoraConfig)
    config.init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    config.init_lora_weights = init
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    out = convert(str(base), tmp_path / "out", adapter=str(tmp_path / "plain"))
    assert difference(out, expected) < 1e-4


def test_every_setting_that_peft_has_is_known_or_refused(base: Path, tmp_path: Path) -> None:
    """Whatever PEFT adds: a setting that is set and not known here is refused by its name."""
    train(base, tmp_path / "adapter", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(path.read_text())
    assert "lora_alpha" in written
    for key in sorted(written.keys() - _PEFT_KNOWN):
        path.write_text(json.dumps(written | {key: ["something"]}))
        with pytest.raises(InputError, match=f"{key} is not supported"):
            convert(str(base), tmp_path / "out", adapter=str(tmp_path / "adapter"))


def test_a_resized_vocabulary_is_refused_with_what_to_do(base: Path, tmp_path: Path) -> None:
    model = hugging_face(base)
    model.resize_token_embeddings(32002)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    peft.get_peft_model(model, settings).save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    with pytest.raises(InputError, match=r"\[32002, 32\].*was its vocabulary resized\? save the whole model"):
        convert(str(base), tmp_path / "out", adapter=str(tmp_path / "adapter"))


def test_the_same_embedding_saved_beside_lora(base: Path, tmp_path: Path) -> None:
    """`save_embedding_layers` puts the model's own embedding and head into the file.

    PEFT loads them in their place, and a tied model has one of them in two places.
    """
    from safetensors.torch import load_file, save_file

    torch.manual_seed(2)
    model = peft.get_peft_model(hugging_face(base), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    arrays = load_file(file)
    whole = [name for name in arrays if "embed_tokens" in name or "lm_head" in name]
    assert whole
    save_file(arrays | {name: arrays[name] * 1.5 for name in whole}, file)
    expected = logits(peft.PeftModel.from_pretrained(hugging_face(base), tmp_path / "adapter"))
    out = convert(str(base), tmp_path / "out", adapter=str(tmp_path / "adapter"))
    assert difference(out, expected) < 1e-4
