"""Memory: what is planned is what is taken, and a limit is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from models import mixed_config, random_weights, small_config, small_model, write_folder

import m7mlx.memory
from m7mlx import load
from m7mlx.config import ModelConfig
from m7mlx.cpu import native
from m7mlx.errors import InputError, PromptTooLongError, RunError
from m7mlx.files.weights import folder_weights
from m7mlx.generation import stream_generate
from m7mlx.loading import build
from m7mlx.memory import (
    UNDO_SLACK,
    budget,
    cache_bytes,
    default_kv_bits,
    footprints,
    limit_memory,
    loaded_bytes,
    machine_memory,
    positions_that_fit,
)
from m7mlx.quantization import Quantization
from m7mlx.tokens.tokenizer import Tokenizer

_CHAT = """
import sys
from m7mlx import load
import mlx.core as mx
from m7mlx.decode import decode, default_chunk, prefill
from m7mlx.sampling import Sampler, Sampling
from m7mlx_bench.worker import peak_rss

model, _ = load(sys.argv[1])
cache, length = model.new_cache(), int(sys.argv[2])
held = length - 600  # the memory does not depend on what they are, and some machines read them for minutes
for ring in cache.rings:
    shape = (1, model.config.n_kv_heads, held, model.config.head_dim)
    k, v = (mx.random.normal(shape, dtype=model.dtype) for _ in range(2))
    ring.write(ring.format.encode(k) + ring.format.encode(v), 0)
    mx.eval(ring.arrays)
    del k, v
cache.positions = cache.positions.at(held)
mx.clear_cache()
logits = prefill(model, [100 + i % 40_000 for i in range(length - 8 - held)], cache, default_chunk(model))
list(decode(model, logits, cache, Sampler(Sampling()), 7))
print(peak_rss())
"""


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is the process's own; here it ends with the test."""
    monkeypatch.setattr(m7mlx.memory, "_limit", None)


@pytest.mark.demo
def test_a_chat_takes_what_was_planned(demo_model: Path) -> None:
    """All of a process, as the kernel counts it, with 4,096 tokens in the cache."""
    config = ModelConfig.from_folder(demo_model)
    stored = sum(path.stat().st_size for path in {tensor.path for tensor in folder_weights(demo_model).values()})
    plan = footprints(config, stored, UNDO_SLACK)[0]
    command = [sys.executable, "-c", _CHAT, str(demo_model), str(plan.tokens)]
    measured = int(subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout)
    assert abs(plan.total / measured - 1) < 0.1


@pytest.mark.usefixtures("without_kernels")
def test_weights_that_are_not_expanded_are_planned_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU quantised weights have float32 scales where they do not fit expanded."""
    monkeypatch.setattr(m7mlx.memory, "expands", lambda config: False)
    monkeypatch.setattr(sys.modules["m7mlx.loading"], "expands", lambda config: False)
    config = small_config(hidden_size=256, intermediate_size=512, quantization=Quantization(64, 4), vocab_size=32000)
    weights: dict[str, mx.array] = {}
    for name, shape in config.weight_shapes().items():
        array = mx.random.normal(shape)
        kinds = ("weight", "scales", "biases")
        parts = mx.quantize(array.astype(mx.float16), 64, 4) if len(shape) == 2 else (array,)
        weights |= {f"{name.removesuffix('weight')}{kind}": part for kind, part in zip(kinds, parts, strict=False)}
    folder = write_folder(tmp_path / "model", config)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    stored = (folder / "model.safetensors").stat().st_size
    assert loaded_bytes(config, stored) == pytest.approx(load(folder)[0].nbytes, rel=0.02)


_WIRED = """
import sys, mlx.core as mx
mx.set_wired_limit = lambda limit: sys.exit("the wired limit was raised")
from m7mlx_chat.cli import main
sys.exit(main(["--model", sys.argv[1], "-p", "hi", "--max-tokens", "3", "--no-save", *sys.argv[2:]]))
"""


def test_the_wired_limit_is_left_alone(model_folder: Path) -> None:
    """On macOS wired memory that runs out stops the machine, not the program."""
    for options in ([], ["--max-memory", "0.5"], ["--speculate", "lookup"]):
        command = [sys.executable, "-c", _WIRED, str(model_folder), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), options
    root = Path(__file__).parents[2]
    ours = [path for folder in ("m7mlx", "app", "convert") for path in (root / folder).rglob("*.py")]
    assert ours and not [path for path in ours if "set_wired_limit" in path.read_text()]


@pytest.mark.usefixtures("limited")
def test_a_limit_is_kept_by_models_and_sequences(tmp_path: Path, mistral_tokenizers: dict[str, Tokenizer]) -> None:
    folder = write_folder(tmp_path / "model", small_config(vocab_size=32000, sliding_window=None))
    model, tokenizer = small_model(small_config(vocab_size=32000, sliding_window=None)), mistral_tokenizers["v1"]
    around = 150_000_000
    limit_memory(around + model.nbytes + cache_bytes(model.config, 50, 32))
    assert budget() < machine_memory()
    with pytest.raises(PromptTooLongError, match="the prompt has 60 tokens, but memory holds 50 beside the model"):
        next(stream_generate(model, tokenizer, [5] * 60))
    pieces = list(stream_generate(model, tokenizer, [5] * 40, max_tokens=None))
    assert pieces[-1].stats is not None
    assert pieces[-1].finish_reason == "stop" or pieces[-1].stats.generated_tokens == 10
    assert list(stream_generate(model, tokenizer, [5] * 80, cache=model.new_cache(max_kv_size=30), max_tokens=3))
    m7mlx.memory._limit = 1_000_000
    with pytest.raises(RunError, match=r"but the limit is 0\.0 GB; quantise it"):
        load(folder)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("nbytes", [-1, 0, 1_000_000, 1 << 60])
def test_limits_that_make_no_sense(nbytes: int) -> None:
    with pytest.raises(InputError, match="the limit on memory must be between"):
        limit_memory(nbytes)
    assert budget() == machine_memory()


@pytest.mark.parametrize("given", ["0.1", "nan", "lots", "1e30"])
def test_the_chat_refuses_such_limits(given: str) -> None:
    command = [sys.executable, "-m", "m7mlx_chat", "--max-memory", given, "-p", "hi", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "error" in done.stderr


@pytest.mark.demo
def test_the_chat_keeps_to_a_limit(demo_model: Path) -> None:
    command = [sys.executable, "-m", "m7mlx_chat", "--model", str(demo_model), "--max-memory", "0.3", "-p", "hi"]
    done = subprocess.run([*command, "--max-tokens", "3", "--json", "--no-save"], capture_output=True, check=False)
    assert done.returncode == 0  # 0.54 GB expanded do not fit into half of that: the weights stay quantised
    assert json.loads(done.stdout.splitlines()[-1])["event"] == "done"


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_cache_has_the_bits_that_are_planned(
    kernels: bool, dtype: mx.Dtype, request: pytest.FixtureRequest
) -> None:
    if not kernels:
        request.getfixturevalue("without_kernels")
    elif not native.usable():
        pytest.skip("there are no kernels here")
    config = small_config()
    weights = {name: mx.array(array).astype(dtype) for name, array in random_weights(config).items()}
    stored = sum(array.nbytes for array in weights.values())
    model = build(config, weights)
    assert default_kv_bits(config, stored) == model.new_cache().format.stored_bits(model.dtype)
    assert default_kv_bits(config, stored) == (16 if kernels and dtype != mx.float32 else 32)


def test_on_a_gpu_keys_and_values_have_the_bits_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m7mlx.memory, "on_cpu", lambda: False)
    monkeypatch.setattr(m7mlx.memory, "has_kernels", lambda: False)
    config = small_config()
    assert [default_kv_bits(config, config.n_weights * size) for size in (1, 2, 4)] == [16, 16, 32]


@pytest.mark.parametrize("length", [1, 256, 512])
def test_layers_with_and_without_a_window_take_what_is_planned(length: int) -> None:
    """The numbers of a cache whose sliding layers have turned, and of one where they have not."""
    config = mixed_config(sliding_window=128)
    model = small_model(config)
    cache = model.new_cache(slack=UNDO_SLACK)
    model(mx.array([[1] * length]), cache)
    slots = -(-length // 256) * 256  # that are allocated
    assert cache.nbytes == cache_bytes(config, slots, 32)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("length", [1, 100, 191, 192, 193, 1000])
def test_what_fits_is_what_is_planned_for_both_kinds_of_layers(length: int) -> None:
    config = mixed_config(sliding_window=128)
    m7mlx.memory._limit = 150_000_000 + 7 + cache_bytes(config, length, 32)
    assert positions_that_fit(config, 7, 32) == length
