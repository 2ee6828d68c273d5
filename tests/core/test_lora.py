"""Adapters beside the weights: the merged model's logits, no trace left, caches that notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapters import ADAPTED, DOWN, EMBEDDING, HEAD, QUERY, break_config, random, write_mlx_lm, write_peft
from m7mlx_convert.convert import convert
from m7mlx_convert.scheme import Recipe
from models import named_arrays
from sources import quantisable, write_source
from values import number

import m7mlx.fuse
import m7mlx.loading
from m7mlx import generate, load, load_cache, save_cache, set_adapter, stream_generate
from m7mlx.arrays import fingerprint
from m7mlx.compiled import CompiledStep
from m7mlx.config import ModelConfig
from m7mlx.decode import default_chunk, prefill
from m7mlx.errors import CacheFileError, InputError, NotFoundError
from m7mlx.model import Mistral
from m7mlx.quantization import Quantization

IDS = mx.array(np.random.default_rng(0).integers(3, ADAPTED.vocab_size, (1, 24)))
VALUE, UP = "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"


def difference(a: mx.array, b: mx.array) -> float:
    return number(mx.abs(a - b).max() / mx.abs(b).max())


def source(folder: Path, config: ModelConfig = ADAPTED) -> Path:
    write_source(folder, config, mx.float32)
    return folder


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    ("is_tied", "modules"),
    [
        (False, [QUERY, VALUE, DOWN, UP]),
        (False, [EMBEDDING]),
        (False, [HEAD, VALUE]),
        (True, [EMBEDDING, DOWN]),
    ],
)
def test_an_adapter_of_mlx_lm_gives_the_logits_of_the_merged_model(
    tmp_path: Path, kind: str, is_tied: bool, modules: list[str]
) -> None:
    base = source(tmp_path / "base", quantisable(tie_word_embeddings=is_tied))
    write_mlx_lm(tmp_path / "adapter", kind, modules)
    merged = load(convert(str(base), tmp_path / "merged", adapter=str(tmp_path / "adapter")))[0](IDS)
    model, _ = load(base, adapter_path=tmp_path / "adapter")
    assert difference(model(IDS), merged) < 1e-4
    set_adapter(model, None)
    assert difference(model(IDS), merged) > 1e-3


def two_models(tmp_path: Path, is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Mistral, Path]:
    """A model in 4 bits and its folder: expanded to float32, or packed as it is on a GPU."""
    base = convert(str(source(tmp_path / "source")), tmp_path / "base", recipe=Recipe(Quantization(32, 4)))
    if is_packed:  # and with gate and up in one product
        monkeypatch.setattr(m7mlx.fuse, "on_cpu", lambda: False)
        monkeypatch.setattr(m7mlx.loading, "expands", lambda *_: False)
    model, _ = load(base)
    assert isinstance(model.model.layers[1].mlp.down_proj, nn.QuantizedLinear) == is_packed
    assert ("gate_up_proj" in model.model.layers[1].mlp) == is_packed
    return model, base


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_quantised_base_keeps_its_bits(
    tmp_path: Path, is_packed: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is the base expanded, with the adapter merged into it and left in float32."""
    model, base = two_models(tmp_path, is_packed, monkeypatch)
    modules = [QUERY, VALUE, DOWN, UP, HEAD]
    extra = {}
    if "use_dora" in settings:
        for module in modules:
            rows = ADAPTED.weight_shapes()[f"{module}.weight"][0]
            extra[f"base_model.model.{module}.lora_magnitude_vector"] = mx.abs(random(rows, seed=4)) + 1
    write_peft(tmp_path / "adapter", modules, extra, **settings)
    expanded = convert(str(base), tmp_path / "expanded", recipe=Recipe(None, None, (), True), dtype="float32")
    merged = load(convert(str(expanded), tmp_path / "merged", adapter=str(tmp_path / "adapter")))[0](IDS)
    chunk, weights = default_chunk(model), model.nbytes
    set_adapter(model, tmp_path / "adapter")
    assert difference(model(IDS), merged) < 1e-4
    assert default_chunk(model) == chunk
    assert weights < model.nbytes < weights * 1.2


def test_swapped_and_taken_off_the_model_is_what_it_was(tmp_path: Path) -> None:
    base = source(tmp_path / "base")
    write_peft(tmp_path / "one", [QUERY])
    write_mlx_lm(tmp_path / "two", "dora", [VALUE, DOWN, EMBEDDING])
    model, _ = load(base)
    before, plain = fingerprint(named_arrays(model)), model(IDS)
    found = {}
    for name in ("one", "two", "one"):
        set_adapter(model, tmp_path / name)
        alone, _ = load(base, adapter_path=tmp_path / name)
        found[name] = model(IDS)
        assert mx.array_equal(found[name], alone(IDS)).item()
        assert model.adapter == str(tmp_path / name)
    assert difference(found["one"], found["two"]) > 1e-3
    set_adapter(model, None)
    assert mx.array_equal(model(IDS), plain).item()
    assert fingerprint(named_arrays(model)) == before
    assert model.adapter is None


def test_a_cache_belongs_to_one_state_of_the_model(tmp_path: Path) -> None:
    base = source(tmp_path / "base")
    write_peft(tmp_path / "adapter", [QUERY, DOWN])
    model, tokenizer = load(base)
    cache = model.new_cache()
    ids: list[int] = np.array(IDS)[0].tolist()
    expected = generate(model, tokenizer, ids, cache=cache, max_tokens=4)
    save_cache(tmp_path / "plain.cache", cache, model)
    snapshot = cache.snapshot()
    set_adapter(model, tmp_path / "adapter")
    for use in (
        lambda: model(IDS, cache),
        lambda: next(stream_generate(model, tokenizer, ids, cache=cache)),
        lambda: save_cache(tmp_path / "wrong.cache", cache, model),
        lambda: model.new_cache().restore(snapshot),
    ):
        with pytest.raises(InputError, match="another model"):
            use()
    with pytest.raises(CacheFileError, match="other weights"):
        load_cache(tmp_path / "plain.cache", model)
    changed = model.new_cache()
    prefill(model, ids, changed)
    save_cache(tmp_path / "changed.cache", changed, model)
    assert load_cache(tmp_path / "changed.cache", model).offset == 24
    set_adapter(model, None)
    with pytest.raises(InputError, match="another model"):
        model(IDS, changed)
    with pytest.raises(CacheFileError, match="other weights"):
        load_cache(tmp_path / "changed.cache", model)
    assert load_cache(tmp_path / "plain.cache", model).ids == cache.ids
    assert generate(model, tokenizer, ids, cache=cache, max_tokens=4) == expected


def test_a_compiled_step_sees_the_adapter(tmp_path: Path) -> None:
    base = source(tmp_path / "base")
    write_peft(tmp_path / "adapter", [QUERY, DOWN])
    model, _ = load(base)
    step = CompiledStep(model)
    for adapter in (None, tmp_path / "adapter", None):
        set_adapter(model, adapter)
        plain, compiled = model.new_cache(), model.new_cache()
        model(IDS, plain), model(IDS, compiled)
        assert difference(step(IDS[:, :1], compiled), model(IDS[:, :1], plain)) < 1e-4


def write_another_method(folder: Path) -> None:
    write_peft(folder, [QUERY])
    break_config(folder, peft_type="IA3")


REFUSED: dict[str, tuple[Any, str]] = {
    "a norm that was saved whole": (
        lambda f: write_peft(f, [QUERY], {"base_model.model.model.norm.weight": mx.zeros(128)}),
        "replaces model.norm as a whole, which only merging can do: m7mlx-convert MODEL --adapter ",
    ),
    "a head of another size": (
        lambda f: write_peft(f, [QUERY], {"base_model.model.lm_head.weight": mx.zeros((32002, 128))}),
        "was its vocabulary resized",
    ),
    "a full fine-tune": (
        lambda f: write_mlx_lm(f, "full", [DOWN]),
        f"replaces {DOWN} as a whole, which only merging can do",
    ),
    "another model's layer": (
        lambda f: write_peft(
            f,
            [],
            {
                "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": mx.zeros((4, 128)),
                "base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": mx.zeros((256, 4)),
            },
        ),
        "changes model.layers.9.mlp.up_proj, which is no part of the model",
    ),
    "another shape": (
        lambda f: write_peft(
            f,
            [],
            {
                f"base_model.model.{DOWN}.lora_A.weight": mx.zeros((4, 64)),
                f"base_model.model.{DOWN}.lora_B.weight": mx.zeros((128, 4)),
            },
        ),
        "does not fit",
    ),
    "half": (
        lambda f: write_peft(f, [QUERY], {f"base_model.model.{DOWN}.lora_A.weight": mx.zeros((4, 256))}),
        "lora_B is missing for",
    ),
    "another method": (
        write_another_method,
        "peft_type IA3 is not LORA",
    ),
    "no adapter": (lambda f: (f.mkdir(), (f / "adapter_config.json").write_text("{}")), "holds no adapter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_put_on_is_refused_and_changes_nothing(tmp_path: Path, name: str) -> None:
    write, message = REFUSED[name]
    base = source(tmp_path / "base")
    write(tmp_path / "adapter")
    with pytest.raises(InputError, match=message):
        load(base, adapter_path=tmp_path / "adapter")
    write_peft(tmp_path / "good", [QUERY])
    model, _ = load(base, adapter_path=tmp_path / "good")
    before = model(IDS)
    with pytest.raises(InputError, match=message):
        set_adapter(model, tmp_path / "adapter")
    assert mx.array_equal(model(IDS), before).item()
    assert model.adapter == str(tmp_path / "good")


def test_numbers_that_are_not_finite_are_found_before_anything_is_changed(tmp_path: Path) -> None:
    base = source(tmp_path / "base")
    write_peft(tmp_path / "adapter", [QUERY, DOWN], {})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    arrays: Any = mx.load(str(file))
    mx.eval(arrays)
    name = f"base_model.model.{DOWN}.lora_B.weight"
    mx.save_safetensors(str(file), arrays | {name: mx.full(arrays[name].shape, mx.nan)})
    model, _ = load(base)
    before = model(IDS)
    with pytest.raises(InputError, match="NaN or infinite"):
        set_adapter(model, tmp_path / "adapter")
    assert mx.array_equal(model(IDS), before).item()


def test_a_whole_head_for_a_tied_model_is_not_passed_over(tmp_path: Path) -> None:
    base = source(tmp_path / "base", quantisable(tie_word_embeddings=True))
    write_mlx_lm(tmp_path / "adapter", "full", [HEAD])
    with pytest.raises(InputError, match="changes lm_head, which is no part of the model"):
        load(base, adapter_path=tmp_path / "adapter")


def test_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is no folder here"):
        load(source(tmp_path / "base"), adapter_path=tmp_path / "nowhere")


def test_the_settings_are_those_of_the_file(tmp_path: Path) -> None:
    """Twice the alpha, twice the change."""
    base = source(tmp_path / "base")
    write_peft(tmp_path / "adapter", [HEAD])
    model, _ = load(base)
    plain = model(IDS)
    changes = []
    for alpha in (8, 16):
        break_config(tmp_path / "adapter", lora_alpha=alpha)
        assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == alpha
        set_adapter(model, tmp_path / "adapter")
        changes.append(model(IDS) - plain)
    assert difference(changes[1], 2 * changes[0]) < 1e-4
