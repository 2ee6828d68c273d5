"""Runs that were killed: nothing or the whole, and the next run goes on where they stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from adapters import write_mlx_lm
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from m7mlx_convert import plan
from m7mlx_convert.opening import open_model
from m7mlx_convert.output import whole_folder
from m7mlx_convert.plan import make_plan
from m7mlx_convert.scheme import Recipe
from m7mlx_convert.writer import JOURNAL, Spec, TensorBytes, WeightsWriter
from models import random_weights, small_config, write_folder
from processes import running
from sources import quantisable, write_packed, write_source

from m7mlx.errors import WeightsError
from m7mlx.quantization import Quantization

TENSORS = {f"t{i}": mx.arange(i * 7 + 3, dtype=mx.float32) + i for i in range(9)}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
PLAN = [[Spec(name, array.dtype, array.shape)] for name, array in TENSORS.items()]


def write(folder: Path, upto: int = len(PLAN), key: str | None = "key", max_bytes: int = 400) -> int:
    """Write the first tensors, as a run that is killed then does.

    Returns how many were there already.
    """
    writer = WeightsWriter(folder, PLAN, key, max_bytes)
    done = writer.done
    for name in list(TENSORS)[done:upto]:
        writer.write([TensorBytes.of(TENSORS[name])])
    if upto == len(PLAN):
        writer.finish()
    writer.close()
    return done


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(upto=st.integers(0, len(PLAN) - 1), lost=st.integers(0, 200), flipped=st.none() | st.integers(0, 300))
@settings(max_examples=examples(15), deadline=None)
def test_a_later_writer_goes_on(
    tmp_path_factory: pytest.TempPathFactory,
    upto: int,
    lost: int,
    flipped: int | None,
) -> None:
    """Whatever a dead run left, with its last bytes lost or one bit wrong.

    The result is that of one run.
    """
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    write(whole)
    write(broken, upto)
    shards = sorted(broken.glob("*.safetensors"))
    if shards:
        data = bytearray(shards[-1].read_bytes())
        data = data[: len(data) - min(lost, len(data))]
        if flipped is not None and data:
            data[flipped % len(data)] ^= 1
        shards[-1].write_bytes(data)
    done = write(broken)
    assert done <= upto
    if not lost and flipped is None:
        assert done == upto
    assert content(broken) == content(whole)


def test_another_key_starts_anew(tmp_path: Path) -> None:
    write(tmp_path, 5, key="one")
    assert write(tmp_path, 5, key="other") == 0
    assert write(tmp_path, 5, key="other") == 5
    assert write(tmp_path, 5, key=None) == 0
    (tmp_path / JOURNAL).write_bytes(b"\xff\xfe")
    assert write(tmp_path) == 0


def test_what_the_disk_holds_is_read_again(tmp_path: Path) -> None:
    writer = WeightsWriter(tmp_path, PLAN)
    for array in TENSORS.values():
        writer.write([TensorBytes.of(array)])
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match="not on the disk as it was written"):
        writer.finish()
    writer.close()


# --- what a run that was killed is known by ---------------------------------------------------


def settings_of(folder: Path, name: str, **changes: Any) -> None:
    """Change a JSON file and keep its time, as a copy that keeps times would."""
    path = folder / name
    before = path.stat()
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_key_follows_all_that_decides_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_packed(tmp_path / "packed", "gptq", 4)
    write_source(tmp_path / "plain", quantisable())
    write_mlx_lm(tmp_path / "lora", "lora", ["model.layers.1.mlp.up_proj"])

    def key(source: str, adapter: str | None = None, recipe: Recipe | None = None, dtype: str | None = None) -> str:
        folder = str(tmp_path / adapter) if adapter else None
        opened = open_model(tmp_path / source, source, folder)
        found = make_plan(opened, recipe or Recipe(), dtype).key
        assert found
        return found

    keys = [key("plain"), key("packed"), key("plain", "lora")]
    assert keys == [key("plain"), key("packed"), key("plain", "lora")]
    settings_of(tmp_path / "packed", "config.json", quantization_config=GPTQ | {"checkpoint_format": "gptq_v2"})
    keys.append(key("packed"))
    settings_of(tmp_path / "lora", "adapter_config.json", lora_parameters={"scale": 2.0})
    keys.append(key("plain", "lora"))
    settings_of(tmp_path / "lora", "adapter_config.json", fine_tune_type=None)
    keys.append(key("plain", "lora"))
    modes = [(32, 4, "affine"), (64, 4, "affine"), (32, 4, "mxfp4"), (16, 4, "nvfp4")]
    keys += [key("plain", recipe=Recipe(Quantization(*mode))) for mode in modes]
    keys.append(key("plain", dtype="float16"))
    for package in ("m7mlx", "mlx", "numpy", "gguf"):
        other = {package: "999"}
        monkeypatch.setattr(plan, "version", lambda name, other=other: other.get(name, version(name)))
        keys.append(key("plain"))
    assert len(set(keys)) == len(keys)


def test_what_the_source_has_no_more_is_not_taken_up(tmp_path: Path) -> None:
    """Small files are written anew; a dead run's own are not mixed with them."""
    work = tmp_path / ".out.partial-999999999"
    work.mkdir()
    for name in (JOURNAL, "model.safetensors", "tokenizer.model", "added_tokens.json"):
        (work / name).write_text("key")
    with whole_folder(tmp_path / "out", "key") as folder:
        assert {path.name for path in folder.iterdir()} == {JOURNAL, "model.safetensors"}


# --- the command ------------------------------------------------------------------------------


def command(source: Path, out: Path, *options: str) -> list[str]:
    tool = str(Path(sys.executable).parent / "m7mlx-convert")
    return [tool, str(source), "--mlx-path", str(out), "--q-bits", "3", *options]


CONFIG = small_config(vocab_size=32000, hidden_size=512, intermediate_size=2048, n_layers=8, n_heads=8, head_dim=64)


def model(folder: Path) -> Path:
    return write_folder(folder, CONFIG)


def partial(folder: Path) -> Sequence[Path]:
    return list(folder.glob(".out.partial-*"))


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """Twenty runs killed at moments spread over the time one takes.

    Each leaves nothing or the whole.
    """
    source, out = model(tmp_path / "source"), tmp_path / "out"
    start = time.monotonic()
    subprocess.run(command(source, tmp_path / "whole"), check=True, capture_output=True)
    duration = time.monotonic() - start
    expected = {name: data for name, data in content(tmp_path / "whole").items() if name != "README.md"}
    rng = random.Random(4)
    moments = [duration * (i + rng.random()) / 20 for i in range(20)]
    for moment in rng.sample(moments, 20):
        with running(command(source, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            time.sleep(moment)
        if out.exists():
            assert expected.items() <= content(out).items()
            shutil.rmtree(out)
        assert len(partial(tmp_path)) <= 1  # what an earlier run left was taken up or removed
    subprocess.run(command(source, out), check=True, capture_output=True)
    assert expected.items() <= content(out).items()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "whole"}


def killed_halfway(source: Path, out: Path) -> None:
    """Kill a run once it has written some of its tensors."""
    with running(command(source, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        deadline = time.monotonic() + 60
        while True:
            journals = [path / JOURNAL for path in partial(out.parent)]
            if journals and journals[0].is_file() and len(journals[0].read_text().splitlines()) > 10:
                break
            assert time.monotonic() < deadline
            time.sleep(0.002)


def test_the_next_run_takes_up_what_is_there(tmp_path: Path) -> None:
    source, out = model(tmp_path / "source"), tmp_path / "out"
    killed_halfway(source, out)
    done = subprocess.run(command(source, out, "--json"), check=True, capture_output=True, text=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert any("taken up" in event.get("text", "") for event in events)
    assert events[-1] == {"event": "done", "folder": str(out)}
    assert not partial(tmp_path)
    subprocess.run(command(source, tmp_path / "whole"), check=True, capture_output=True)
    assert content(out)["SHA256SUMS"] == content(tmp_path / "whole")["SHA256SUMS"]


def test_a_source_that_changed_is_not_taken_up(tmp_path: Path) -> None:
    source, out = model(tmp_path / "source"), tmp_path / "out"
    killed_halfway(source, out)
    config = small_config(
        vocab_size=32000, hidden_size=512, intermediate_size=2048, n_layers=8, n_heads=8, head_dim=64
    )
    write_folder(source, config, random_weights(config, seed=1))
    done = subprocess.run(command(source, out), check=True, capture_output=True, text=True)
    assert "taken up" not in done.stderr
    subprocess.run(command(source, tmp_path / "whole"), check=True, capture_output=True)
    assert content(out)["SHA256SUMS"] == content(tmp_path / "whole")["SHA256SUMS"]


def test_two_runs_at_once_do_not_hurt_each_other(tmp_path: Path) -> None:
    source, out = model(tmp_path / "source"), tmp_path / "out"
    with running(command(source, out)) as one, running(command(source, out)) as other:
        statuses = [process.wait(timeout=120) for process in (one, other)]
    assert 0 in statuses
    assert not partial(tmp_path)
    digest = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True, check=False)
    assert digest.returncode == 0 or shutil.which("sha256sum") is None
    assert os.listdir(tmp_path).count("out") == 1
