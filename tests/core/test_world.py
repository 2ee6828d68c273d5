"""Several processes share a model.

They are real ones, on this machine, started by `mlx.launch` with its ring of sockets.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import openai
import psutil
import pytest
from m7mlx_convert.cli import main as convert
from models import small_config, write_folder
from processes import running
from ranks import passes

from m7mlx import Mistral, load, stream_generate
from m7mlx.arrays import nbytes
from m7mlx.cpu import native
from m7mlx.errors import ConfigError
from m7mlx.files.weights import StoredTensor, data_starts, read_slices
from m7mlx.loading import load_model
from m7mlx.shard import MODES, Shard

LAUNCH = shutil.which("mlx.launch", path=str(Path(sys.executable).parent)) or "mlx.launch"
PORTS = iter(range(24_000 + os.getpid() % 400 * 16, 32_000, 8))


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def launch(count: int, *command: str) -> AbstractContextManager[subprocess.Popen[str]]:
    ring = ["-n", str(count), "--backend", "ring", "--starting-port", str(next(PORTS))]
    env = ["--env", "OPENBLAS_NUM_THREADS=1"]
    return running(
        [LAUNCH, *ring, *env, "--", sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launched(count: int, *command: str) -> tuple[str, str]:
    with launch(count, *command) as process:
        out, err = process.communicate(timeout=120)
    return out, err


CONFIG = small_config(hidden_size=64, n_heads=8, n_kv_heads=4, intermediate_size=128, n_layers=5, vocab_size=32000)
KINDS = ("full_attention", *["sliding_attention"] * 3, "full_attention")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("ranks") / "model", CONFIG)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 bits, one layer in 8: a shard has the layer under another number.

    Two layers have no window.
    """
    folder = write_folder(tmp_path_factory.mktemp("mixed") / "model", replace(CONFIG, layer_types=KINDS))
    target = tmp_path_factory.mktemp("quantised") / "model"
    rule = r"layers\.3\..*=8"
    assert (
        convert([str(folder), "--q-bits", "4", "--q-group-size", "32", "--q-rule", rule, "--mlx-path", str(target)])
        == 0
    )
    return target


RANKS = str(Path(__file__).parents[1] / "support" / "ranks.py")


def check(out: Path, count: int, whole: Mistral, err: str, rounding: float) -> None:
    expected = passes(whole)
    for mode in ("tensor", "pipeline"):
        ranks = [dict(np.load(out / f"{mode}-{r}.npz")) for r in range(count)]
        for found in ranks:
            for name, logits in expected.items():
                assert np.abs(found[name] - logits).max() <= rounding * np.abs(logits).max(), (mode, name, err)
        heads, layers = whole.config.n_kv_heads, whole.config.n_layers
        shapes = [tuple(found["shape"]) for found in ranks]
        if mode == "tensor":
            assert shapes == [(heads // count, layers)] * count
        else:
            assert sum(n for _, n in shapes) == layers and {h for h, _ in shapes} == {heads}
        # Nobody holds what is not its own: besides layers, only the ends of the model are there
        # more than once.
        ends = whole.model.embed_tokens, whole.lm_head
        assert sum(int(found["bytes"]) for found in ranks) <= whole.nbytes + (count - 1) * (
            sum(nbytes(end) for end in ends) + (2 * layers + 1) * whole.model.norm.weight.nbytes
        )


@pytest.mark.parametrize("count", [2, 4])
def test_logits_are_those_of_one_process(folder: Path, tmp_path: Path, count: int) -> None:
    """Chunks, tokens across the wrap, a rollback, rows of a batch."""
    _, err = launched(count, RANKS, str(folder), str(tmp_path), "tensor,pipeline")
    check(tmp_path, count, load_model(folder), err, 1e-5)  # sums in another order; how far apart depends on the BLAS


def test_so_are_those_of_quantised_weights(quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inputs that are rounded may fall to either side where a sum was added up in another order.
    monkeypatch.setenv("M7MLX_INPUT_BITS", "32")
    monkeypatch.setattr(native, "rounds_inputs", lambda: False)
    _, err = launched(2, RANKS, str(quantised), str(tmp_path), "tensor,pipeline", "quantised")
    monkeypatch.setattr(sys.modules["m7mlx.loading"], "expands", lambda config: False)
    whole = load_model(quantised)
    assert isinstance(whole.model.layers[0].mlp.down_proj, nn.QuantizedLinear)
    check(tmp_path, 2, whole, err, 1e-5)


@pytest.mark.parametrize("mode", ["tensor", "pipeline"])
def test_the_chat_answers_as_in_one_process(folder: Path, mode: str) -> None:
    asked = [
        "--model",
        str(folder),
        "--no-save",
        "-p",
        "Hello there",
        "--max-tokens",
        "12",
        "--temp",
        "0.9",
        "--seed",
        "3",
    ]
    alone = subprocess.run([sys.executable, "-m", "m7mlx_chat", *asked], capture_output=True, text=True, check=True)
    out, err = launched(2, "-m", "m7mlx_chat", *asked, "--parallel", mode)
    assert out.strip() == alone.stdout.strip() != ""
    assert "error" not in err


def address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if found := re.search(r"http://\S+", line):
            return found[0]
    raise AssertionError(said)


def test_a_server_of_two_processes_and_a_rank_that_is_killed(folder: Path) -> None:
    """A server's answers to many at once are the library's.

    A client that leaves disturbs nobody. Then one rank dies.
    """
    serve = ["-m", "m7mlx_serve", "--model", str(folder), "--name", "m", "--port", "0", "--rows", "3"]
    with launch(2, *serve) as process:
        url = address(process)
        model, tokenizer = load(folder)
        questions = ["Hi", "Hello there, how are you?", "Why?", "What is this?"]

        def ask(question: str) -> str:
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as api:
                stream = api.chat.completions.create(
                    model="m", messages=user(question), temperature=0, max_tokens=8, stream=True
                )
                text = ""
                for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                    if question == "Why?" and text:
                        stream.close()
                        break
                return text

        with ThreadPoolExecutor(4) as pool:
            found = dict(zip(questions, pool.map(ask, questions), strict=True))
        for question, text in found.items():
            expected = "".join(p.text for p in stream_generate(model, tokenizer, user(question), max_tokens=8))
            assert expected.startswith(text) if question == "Why?" else text == expected
        schema = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]}
        wanted: dict[str, Any] = {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": schema | {"additionalProperties": False}},
        }
        body = {"model": "m", "messages": user("Yes?"), "response_format": wanted, "temperature": 1, "max_tokens": 50}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["n"], bool)

        first = next(p for p in ranks(process) if b"MLX_RANK=0" in Path(f"/proc/{p}/environ").read_bytes())
        before = set(psutil.Process(first).children(recursive=True))
        wanted["json_schema"]["schema"] = {"type": "string", "minLength": 3000}
        with ThreadPoolExecutor(1) as pool:
            going = pool.submit(
                httpx.post, f"{url}/v1/chat/completions", json=body | {"max_tokens": 9000}, timeout=60
            )
            for _ in range(2):  # it goes on in a new process; then it fails, and the processes go on together
                while not (grammar := set(psutil.Process(first).children(recursive=True)) - before):
                    assert not going.done()
                    time.sleep(0.05)
                time.sleep(0.5)
                before |= grammar
                for one in grammar:
                    one.kill()
            assert going.result(60).status_code == 400
        assert ask("Hi") == found["Hi"]

        other = next(p for p in ranks(process) if b"MLX_RANK=1" in Path(f"/proc/{p}/environ").read_bytes())
        os.kill(other, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert "process 1 of this run has ended" in err
        assert "Traceback" not in err
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health", timeout=5)


def ranks(process: subprocess.Popen[str]) -> list[int]:
    """The processes that a launcher has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in found.stdout.split()]


def test_a_server_that_is_told_to_end_takes_the_others_along(folder: Path) -> None:
    serve = ["-m", "m7mlx_serve", "--model", str(folder), "--port", "0", "--parallel", "pipeline"]
    with launch(2, *serve) as process:
        assert httpx.get(f"{address(process)}/health", timeout=30).json() == {"status": "ok"}
        first = next(p for p in ranks(process) if b"MLX_RANK=0" in Path(f"/proc/{p}/environ").read_bytes())
        os.kill(first, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert "error" not in err and "exited with code" not in err


@pytest.mark.parametrize(
    ("count", "options", "reason"),
    [
        (3, ["--parallel", "tensor", "-p", "Hi"], "4 KV heads cannot be divided among 3 processes"),
        (2, ["--speculate", "lookup", "-p", "Hi"], "is not speculated on"),
        (2, [], "give the question with -p"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folder: Path, count: int, options: list[str], reason: str) -> None:
    out, err = launched(count, "-m", "m7mlx_chat", "--model", str(folder), "--no-save", *options)
    assert reason in err
    assert "Traceback" not in err
    assert not out.strip()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shards_make_up_the_whole(size: int, tied: bool) -> None:
    """Every number of every tensor is read by one rank at least.

    Nothing of the layers' matrices is read by two.
    """
    whole = small_config(
        n_layers=5, n_heads=30, n_kv_heads=30, intermediate_size=60, tie_word_embeddings=tied, layer_types=KINDS
    )
    for mode in MODES:
        shards = [Shard(mode, rank, size) for rank in range(size)]
        types = [shard.config(whole).layer_types for shard in shards]
        assert sum(types, ()) == KINDS if mode == "pipeline" else set(types) == {KINDS}
        own = [dict(shard.config(whole).weight_shapes()) for shard in shards]
        for name, shape in whole.weight_shapes().items():
            count = np.zeros(shape, int)
            for shard, shapes in zip(shards, own, strict=True):
                if (called := shard.name(name, whole)) is not None:
                    slices = shard.slices(name, shape)
                    count[slices] += 1
                    assert count[slices].shape == shapes[called]
            assert count.min() >= 1
            if len(shape) == 2 and name.startswith("model.layers"):
                assert count.max() == 1
            sizes = [shard.nbytes({name: (shape, 4 * count.size)}, whole) for shard in shards]
            assert sum(sizes) == 4 * count.sum()


def test_what_cannot_be_divided_is_refused() -> None:
    whole = small_config(n_layers=3, n_heads=4, n_kv_heads=2, intermediate_size=64)
    for shard, reason in (
        (Shard("tensor", 0, 3), "2 KV heads cannot be divided among 3"),
        (Shard("tensor", 0, 4), "2 KV heads"),
        (Shard("pipeline", 0, 4), "3 layers cannot be divided among 4"),
    ):
        with pytest.raises(ConfigError, match=reason):
            shard.config(whole)
    with pytest.raises(ConfigError, match="groups"):
        Shard("tensor", 0, 2).slices("model.layers.0.mlp.down_proj.scales", (48, 1))


def test_a_slice_is_read_as_the_whole_is(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    kinds = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U8": mx.uint8}
    arrays = {name: (mx.arange(35) * 5).reshape(5, 7).astype(kind) for name, kind in kinds.items()}
    mx.save_safetensors(str(file), arrays)
    for name, array in arrays.items():
        for slices in ((slice(1, 4), slice(7)), (slice(5), slice(2, 5)), (slice(0, 0), slice(7))):
            found = read_slices(StoredTensor(file, name, (5, 7), name), data_starts(file)[name], slices)
            assert found.dtype == array.dtype
            assert mx.array_equal(found, array[slices])
