"""The plan: what it promises is what comes, and printing it touches nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from m7mlx_convert import plan
from m7mlx_convert.cli import main
from m7mlx_convert.source import Tensor
from models import small_config, small_model, write_folder
from sources import quantisable, write_source

from m7mlx.files.weights import folder_weights
from m7mlx.memory import UNDO_SLACK, footprints
from m7mlx.quantization import Quantization
from m7mlx.units import in_bytes


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--q-bits", "3"],
        ["--q-mode", "mxfp4"],
        ["--quant-predicate", "mixed_2_6"],
        ["--q-bits", "4", "--q-rule", "lm_head=8:32", "--dtype", "float32"],
    ],
)
def test_the_size_promised_is_the_size_that_comes(
    tmp_path: Path,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_source(tmp_path / "source", quantisable())
    arguments = [str(tmp_path / "source"), "--mlx-path", str(tmp_path / "out"), *options, "--json"]
    before = sorted(tmp_path.rglob("*"))
    assert main([*arguments, "--plan"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    promised: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    stored = folder_weights(tmp_path / "out")
    sizes = {"U32": 4, "U8": 1, "BF16": 2, "F32": 4}
    total = 0
    for tensor in stored.values():
        count = 1
        for side in tensor.shape:
            count *= side
        total += count * sizes[tensor.dtype]
    assert promised["result_bytes"] == total == sum(group["bytes"] for group in promised["groups"])
    assert promised["bits_per_weight"] == round(8 * total / promised["parameters"], 3)


SCHEMES = [
    Quantization(64, 4),
    Quantization(32, 4, "mxfp4"),
    Quantization(32, 8, "mxfp8"),
    Quantization(16, 4, "nvfp4"),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.mode)
@pytest.mark.parametrize("rows", [1, 7, 8, 500])
def test_rows_quantised_by_and_by_are_those_of_the_whole(
    scheme: Quantization,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "_SLICE", 7 * 128)  # seven rows
    monkeypatch.setattr(plan, "on_cpu", lambda: True)
    weight = mx.random.normal((rows, 128), key=mx.random.key(rows)).astype(mx.bfloat16)
    planned = plan.PlannedParameter(
        "w.weight", Tensor((rows, 128), mx.bfloat16, lambda: {"weight": weight}), mx.bfloat16, scheme
    )
    whole = mx.quantize(weight, group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode)
    for found, expected in zip(planned.arrays(), whole, strict=True):
        assert mx.array_equal(found, expected).item()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.mode)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_a_parameter_takes_no_more_memory_than_it_says(scheme: Quantization, dtype: mx.Dtype) -> None:
    weight = mx.random.normal((3000, 1024)).astype(dtype)
    mx.eval(weight)

    def load() -> dict[str, mx.array]:
        return {"weight": weight + 0}  # an array of its own, as out of a file

    planned = plan.PlannedParameter("w.weight", Tensor(weight.shape, dtype, load), dtype, scheme)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(list(planned.arrays()))
    assert mx.get_peak_memory() - before <= 1.1 * planned.memory


def test_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path / "source", quantisable())
    assert main([str(tmp_path / "source"), "--q-bits", "4", "--plan"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    for line in ("mlp.down_proj", "4 bits, groups of 64", "bits a weight", "to make", "window of 7, for any length"):
        assert line in out
    assert (
        main([str(tmp_path / "source"), "--q-bits", "4", "--q-group-size", "128", "--plan", "--q-rule", "x=4"]) == 2
    )


@pytest.mark.parametrize(("bits", "kv_bits"), [("32 bits", None), ("4 bits", 4)])
def test_the_memory_of_a_chat_is_that_of_its_cache(bits: str, kv_bits: int | None) -> None:
    """What is planned is what a cache takes that has turned."""
    config = small_config(sliding_window=1000, n_heads=2, n_kv_heads=2, head_dim=64, hidden_size=64)
    (chat,) = footprints(config, 4 * config.n_weights, UNDO_SLACK)
    model = small_model(config)
    cache = model.new_cache(kv_bits=kv_bits)
    for _ in range(3):
        mx.eval(model(mx.zeros((1, 500), mx.int32), cache))
    assert cache.nbytes <= chat.caches[bits] <= 1.15 * cache.nbytes


def test_full_attention_shows_the_whole_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "source", small_config(vocab_size=32000, sliding_window=None))
    assert main([str(tmp_path / "source"), "--plan", "--json"]) == 0
    assert [chat["tokens"] for chat in json.loads(capsys.readouterr().out)["chat_memory"]] == [4096]


def test_sizes() -> None:
    assert [in_bytes(n) for n in (12, 1234, 93_000_000, 4_070_000_000)] == ["12 B", "1.23 kB", "93 MB", "4.07 GB"]
