"""Saved caches: what is opened continues exactly; what is damaged or foreign is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import mixed_config, small_config, small_model
from safetensors import safe_open
from safetensors.numpy import save_file

from m7mlx.cache import RollingCache
from m7mlx.cache_file import _checksum, _read_header, load_cache, save_cache
from m7mlx.decode import decode, prefill
from m7mlx.errors import CacheFileError, DiskError, InputError, NotFoundError
from m7mlx.model import Mistral
from m7mlx.sampling import Sampler, Sampling

MODEL = small_model(small_config(head_dim=32))
FULL = small_model(small_config(head_dim=32, sliding_window=None))
MIXED = small_model(mixed_config(head_dim=32))
IDS = [(i * i + 3 * i) % 97 for i in range(60)]


def filled(model: Mistral = MODEL, ids: list[int] = IDS, **options: Any) -> tuple[RollingCache, mx.array]:
    cache = model.new_cache(**options)
    return cache, prefill(model, ids, cache, chunk=16)


def go_on(model: Mistral, cache: RollingCache, logits: mx.array, count: int = 30) -> list[int]:
    return list(decode(model, logits, cache, Sampler(Sampling()), count))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (MODEL, {}),
        (MODEL, {"slack": 0}),
        (MODEL, {"kv_bits": 4, "kv_group_size": 32}),
        (FULL, {}),
        (FULL, {"kv_bits": 8, "kv_group_size": 32}),
        (FULL, {"max_kv_size": 20}),
        (FULL, {"max_kv_size": 20, "sinks": 2, "kv_bits": 8, "kv_group_size": 32}),
        (MIXED, {"slack": 3}),
        (MIXED, {"max_kv_size": 20, "sinks": 2, "kv_bits": 8, "kv_group_size": 32}),
    ],
)
@pytest.mark.parametrize("length", [1, 5, 60])
def test_what_was_saved_goes_on_identically(
    model: Mistral, options: dict[str, Any], length: int, tmp_path: Path
) -> None:
    cache, logits = filled(model, IDS[:length], **options)
    path = tmp_path / "chats" / "one.cache"  # any name, in a folder that is not there yet
    save_cache(path, cache, model, {"title": "Ünïcode"})
    loaded = load_cache(path, model)
    assert (loaded.offset, loaded.ids, loaded.nbytes) == (length, IDS[:length], cache.nbytes)
    assert loaded.max_rollback == cache.max_rollback
    assert go_on(model, loaded, logits) == go_on(model, cache, logits)
    assert [p.name for p in path.parent.iterdir()] == ["one.cache"]
    header = _read_header(path)[1]
    assert (header.metadata, header.offset) == ({"title": "Ünïcode"}, length)


def test_a_saved_cache_can_still_roll_back(tmp_path: Path) -> None:
    cache, _ = filled(slack=6)
    save_cache(tmp_path / "c", cache, MODEL)
    loaded = load_cache(tmp_path / "c", MODEL)
    for one in (cache, loaded):
        one.rollback(5)
    ours, theirs = (MODEL(mx.array([IDS[55:58]]), one) for one in (cache, loaded))
    assert mx.array_equal(ours, theirs)


def test_a_file_of_that_name_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_cache(path, filled(ids=IDS[:10])[0], MODEL)
    save_cache(path, filled()[0], MODEL)
    assert load_cache(path, MODEL).offset == 60


def test_half_precision_models(tmp_path: Path) -> None:
    for dtype in (mx.float16, mx.bfloat16):
        model = small_model(small_config(head_dim=32, n_layers=1))
        model.set_dtype(dtype)
        cache, logits = filled(model)
        save_cache(tmp_path / "c", cache, model)
        assert go_on(model, load_cache(tmp_path / "c", model), logits, 4) == go_on(model, cache, logits, 4)
        with pytest.raises(CacheFileError, match="other weights"):
            load_cache(tmp_path / "c", small_model(small_config(head_dim=32, n_layers=1)))


# --- what must be refused -------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_cache(tmp_path / "c.cache", filled()[0], MODEL)
    return tmp_path / "c.cache"


def refused(path: Path, text: str, model: Mistral = MODEL) -> None:
    with pytest.raises(CacheFileError, match=text) as caught:
        load_cache(path, model)
    assert str(path) in str(caught.value)


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray], dict[str, str]], None], seal: bool = True) -> None:
    """Change a file as somebody who knows the format would: with a checksum that fits."""
    with safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    change(arrays, about)
    if seal:
        about["sha256"] = _checksum(about["header"], {n: mx.array(a) for n, a in arrays.items()})
    save_file(arrays, path, about)


def test_other_weights_and_other_shapes(saved: Path) -> None:
    refused(saved, "other weights", small_model(MODEL.config, seed=1))
    refused(saved, "another shape", small_model(small_config(head_dim=32, sliding_window=9)))
    refused(saved, "another shape", FULL)
    almost = small_model(MODEL.config)
    weight = almost.model.layers[1].mlp.down_proj.weight
    weight[17, 3] = weight[17, 3] * 1.0001
    refused(saved, "other weights", almost)


def test_every_cut_is_noticed(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in [*range(0, 40, 7), len(whole) // 3, len(whole) // 2, len(whole) - 1]:
        saved.write_bytes(whole[:length])
        refused(saved, "damaged")
    saved.write_bytes(whole + b"more")
    refused(saved, "damaged")


def test_every_flipped_byte_is_noticed(saved: Path) -> None:
    whole = saved.read_bytes()
    for position in range(0, len(whole), 97):
        flipped = bytearray(whole)
        flipped[position] ^= 0x20
        saved.write_bytes(flipped)
        with pytest.raises(CacheFileError):
            load_cache(saved, MODEL)


def test_a_layer_missing_added_or_of_another_shape(saved: Path) -> None:
    before = saved.read_bytes()
    for change, text in [
        (lambda a, h: a.pop("layers.1.values.rows"), "layers.1.values.rows is absent"),
        (lambda a, h: a.update({"layers.3.keys.rows": a["ids"]}), "layers.3.keys.rows is I32"),
        (lambda a, h: a.update({"layers.0.keys.rows": a["layers.0.keys.rows"][:, :, 1:]}), "layers.0.keys.rows"),
        (lambda a, h: a.update({"layers.0.keys.rows": a["layers.0.keys.rows"].astype(np.float16)}), "is F16"),
        (lambda a, h: a.pop("ids"), "no ids"),
        (lambda a, h: a.update({"ids": a["ids"][1:]}), "no ids"),
        (lambda a, h: a.update({"ids": a["ids"] + 100}), "outside the model's vocabulary"),
    ]:
        saved.write_bytes(before)
        rewrite(saved, change)
        refused(saved, text)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(saved: Path, bad: float) -> None:
    def poison(arrays: dict[str, np.ndarray], about: dict[str, str]) -> None:
        arrays["layers.2.keys.rows"] = arrays["layers.2.keys.rows"].copy()
        arrays["layers.2.keys.rows"][0, 1, 3, 5] = bad

    rewrite(saved, poison)
    refused(saved, "layers.2.keys.rows holds NaN or infinite")


def test_tensors_changed_under_their_checksum(saved: Path) -> None:
    rewrite(saved, lambda a, h: a.update({"layers.0.keys.rows": a["layers.0.keys.rows"] * 2}), seal=False)
    refused(saved, "checksum")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("window", 9, "contradicts"),
        ("window", None, "contradicts"),
        ("slack", 10**12, "slack"),
        ("slack", -1, "slack"),
        ("slack", 3.5, "slack"),
        ("slack", True, "slack"),
        ("offset", 0, "0 tokens"),
        ("offset", 10**9, "tokens"),
        ("written", 59, "tokens"),
        ("written", 10**9, "contradicts"),
        ("kv_bits", 5, "5 bits"),
        ("kv_bits", 4, "absent|groups"),
        ("max_kv_size", 100, "max_kv_size"),
        ("config_hash", "0" * 64, "another shape"),
        ("weight_hash", None, "weight_hash"),
        ("metadata", [], "metadata"),
    ],
)
def test_a_header_that_lies(saved: Path, key: str, value: object, text: str) -> None:
    def lie(arrays: dict[str, np.ndarray], about: dict[str, str]) -> None:
        about["header"] = json.dumps(json.loads(about["header"]) | {key: value})

    rewrite(saved, lie)
    refused(saved, text)


def test_files_that_are_not_ours(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(NotFoundError, match="no saved cache"):
        load_cache(tmp_path / "nowhere", MODEL)
    with pytest.raises(NotFoundError):
        load_cache(tmp_path, MODEL)
    other = tmp_path / "other"
    other.write_text("hello")
    refused(other, "not a whole safetensors file")
    save_file({"a": np.zeros(3)}, other)
    refused(other, "not a cache saved by m7mlx")
    rewrite(saved, lambda a, h: h.update(version="2"))
    refused(saved, "newer m7mlx")
    rewrite(saved, lambda a, h: h.update(version="x²"))
    refused(saved, "damaged")
    rewrite(saved, lambda a, h: h.update(version="1", header="[" * 100_000))
    refused(saved, "header cannot be read")


def test_a_prompt_cache_of_mlx_lm_is_foreign(tmp_path: Path) -> None:
    from mlx_lm.models.cache import KVCache, save_prompt_cache

    cache = [KVCache()]
    cache[0].update_and_fetch(mx.zeros((1, 2, 3, 16)), mx.zeros((1, 2, 3, 16)))
    save_prompt_cache(str(tmp_path / "theirs.safetensors"), cache)
    refused(tmp_path / "theirs.safetensors", "not a cache saved by m7mlx")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with pytest.raises(InputError, match="empty"):
        save_cache(path, MODEL.new_cache(), MODEL)
    with pytest.raises(InputError, match="another model"):
        save_cache(path, filled()[0], FULL)
    broken, _ = filled(slack=2)
    broken.begin(20)
    with pytest.raises(InputError, match="broken off"):
        save_cache(path, broken, MODEL)
    rows = MODEL.new_cache()
    MODEL(mx.array([[1, 2], [3, 4]]), rows)
    rows.ids = [1, 2]
    with pytest.raises(InputError, match="row by row"):
        save_cache(path, rows, MODEL)
    with pytest.raises(InputError, match="texts"):
        save_cache(path, filled()[0], MODEL, {"turns": 3})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_the_old_file(saved: Path) -> None:
    """A limit on file sizes, in a process of its own, stands for a small disk."""
    script = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
from test_cache_file import MODEL, filled
from m7mlx.errors import DiskError
from m7mlx.cache_file import save_cache
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_cache({str(saved)!r}, filled()[0], MODEL)
except DiskError as error:
    print(error)
"""
    before = saved.read_bytes()
    assert len(before) > 20_000
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "could not be written" in done.stdout
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(DiskError, match="could not be written"):
        save_cache(tmp_path / "c", filled()[0], MODEL)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        save_cache(tmp_path / "file" / "c", filled()[0], MODEL)
