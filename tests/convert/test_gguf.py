"""GGUF: the same numbers, names and tokens as the model it was made from.

Hostile files are refused, not run into.
"""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conversations import CHATML
from effort import examples
from gguf_files import TINY, write_mistral_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from m7mlx_convert.cli import main
from m7mlx_convert.convert import convert
from m7mlx_convert.gguf import repack
from m7mlx_convert.gguf_header import read_header
from m7mlx_convert.progress import Reporter
from m7mlx_convert.scheme import Recipe
from models import mistral_file, random_weights, small_config, weights_on_disk
from sentencepiece import SentencePieceProcessor
from sources import read_weights
from tokenizer_folders import HARD
from values import number

from m7mlx import generate, load, stream_generate
from m7mlx.config import ModelConfig
from m7mlx.errors import M7Error, WeightsError
from m7mlx.quantization import Quantization
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.tokenizer import Tokenizer


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_weights_are_those_of_the_file(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    expected = write_mistral_gguf(tmp_path / "tiny.gguf", TINY, kind)
    reporter = Reporter("text")
    dtype = "float32" if kind == "F32" else None
    out = convert(str(tmp_path / "tiny.gguf"), tmp_path / "out", dtype=dtype, reporter=reporter)
    model, _ = load(out)
    found = weights_on_disk(model)
    for name, array in expected.items():
        exact = kind == "F32" or (kind != "Q5_0" and array.ndim == 2)
        np.testing.assert_allclose(found[name], array, rtol=2e-6 if exact else 4e-3, atol=1e-6 if exact else 2e-3)
    kept = {"Q8_0": Quantization(32, 8), "Q4_0": Quantization(32, 4), "Q4_1": Quantization(32, 4)}
    assert model.config.quantization == kept.get(kind)
    assert ("expanded to float16" in capfd.readouterr().err) == (kind == "Q5_0")


def test_logits_equal_those_of_the_same_weights_in_huggings_face_layout(tmp_path: Path) -> None:
    """The row order of queries and keys is undone: seen in the logits, not only in the weights."""
    from models import small_model

    write_mistral_gguf(tmp_path / "tiny.gguf", TINY)
    model, _ = load(convert(str(tmp_path / "tiny.gguf"), tmp_path / "out", dtype="float32"))
    ids = mx.array([[1, 500, 31999, 4, 77]])
    assert mx.allclose(model(ids), small_model(TINY)(ids), rtol=1e-5, atol=1e-5).item()


@given(st.sampled_from(["Q4_0", "Q4_1", "Q8_0"]), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=examples(30), deadline=None)
def test_repacked_blocks_are_the_same_numbers(kind: str, rows: int, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    quant = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(rng.standard_normal((rows, 32 * blocks)).astype(np.float32) * 3, quant)
    packed = {k: mx.array(v) for k, v in repack(data, kind).items()}
    found = mx.dequantize(
        packed["weight"], packed["scales"].astype(mx.float32), packed["biases"].astype(mx.float32),
        group_size=32, bits=8 if kind == "Q8_0" else 4,
    )  # fmt: skip
    np.testing.assert_allclose(np.array(found), gguf.quants.dequantize(data, quant), rtol=1e-6, atol=1e-6)


def test_mixed_types_are_written_as_overrides_that_mlx_lm_understands(tmp_path: Path) -> None:
    import mlx_lm.utils

    config = small_config(**{**vars(TINY), "tie_word_embeddings": True, "n_layers": 1})
    write_mixed(tmp_path / "mixed.gguf", config)
    out = convert(str(tmp_path / "mixed.gguf"), tmp_path / "out")
    written = json.loads((out / "config.json").read_text())
    assert written["quantization"] == {
        "group_size": 32, "bits": 4, "mode": "affine",
        "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
    }  # fmt: skip
    theirs, _ = mlx_lm.utils.load_model(out)
    ids = mx.array([[1, 500, 31999]])
    expected = load(out)[0](ids)
    assert mx.allclose(
        theirs(ids).astype(mx.float32), expected, rtol=0.05, atol=0.05 * number(mx.abs(expected).max())
    ).item()


def write_mixed(path: Path, config: ModelConfig) -> None:
    quantize = gguf.quants.quantize
    add = gguf.GGUFWriter.add_tensor

    def add_tensor(self: Any, name: str, data: np.ndarray, raw_dtype: Any = None) -> None:
        if name == "token_embd.weight":
            raw_dtype = gguf.GGMLQuantizationType.Q8_0
            data = quantize(random_weights(config)["model.embed_tokens.weight"], raw_dtype)
        add(self, name, data, raw_dtype=raw_dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add_tensor)
        write_mistral_gguf(path, config, "Q4_1")


def test_quantising_expanded_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_mistral_gguf(tmp_path / "tiny.gguf", TINY, "F16")
    out = convert(str(tmp_path / "tiny.gguf"), tmp_path / "out", recipe=Recipe(Quantization(32, 4)))
    weight = read_weights(out)["model.layers.0.mlp.up_proj.weight"]
    original = mx.array(random_weights(TINY)["model.layers.0.mlp.up_proj.weight"]).astype(mx.float16)
    assert mx.array_equal(weight, mx.quantize(original, group_size=32, bits=4)[0]).item()
    write_mistral_gguf(tmp_path / "kept.gguf", TINY, "Q8_0")
    options = ["--q-bits", "4", "--q-group-size", "32", "--mlx-path", str(tmp_path / "x")]
    assert main([str(tmp_path / "kept.gguf"), *options]) == 0
    assert "the losses add up" in capfd.readouterr().err


def test_mistral_7b_v01_gets_its_window(tmp_path: Path) -> None:
    """The format has no place for the window; the shape and RoPE's base tell."""
    from m7mlx_convert.gguf_config import _with_window

    v01 = ModelConfig.from_dict({"model_type": "llama", "intermediate_size": 14336, "num_key_value_heads": 8})
    config, notes = _with_window(v01, {})
    assert (config.model_type, config.sliding_window) == ("mistral", 4096)
    assert "4,096" in notes[0]
    v02 = ModelConfig.from_dict({**v01.to_dict(), "rope_theta": 1e6})
    assert _with_window(v02, {}) == (v02, ())
    write_mistral_gguf(tmp_path / "w.gguf", TINY, llama__attention__sliding_window=9)
    assert load(convert(str(tmp_path / "w.gguf"), tmp_path / "out"))[0].config.sliding_window == 9


# --- tokenizers -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["v1", "v3"])
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A sentencepiece tokenizer that went through a GGUF file, and the original."""
    folder = tmp_path_factory.mktemp(request.param)
    config = small_config(**{**vars(TINY), "vocab_size": 32768 if request.param == "v3" else 32000, "n_layers": 1})
    write_mistral_gguf(folder / "t.gguf", config, version=request.param)
    tokenizer = load_tokenizer(convert(str(folder / "t.gguf"), folder / "out"))
    return tokenizer, SentencePieceProcessor(model_file=str(mistral_file(request.param)))


@given(words=st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(HARD))
@settings(max_examples=examples(40), deadline=None)
def test_sentencepiece_ids_survive(twins: tuple[Tokenizer, Any], words: str) -> None:
    tokenizer, original = twins
    ids = tokenizer.encode(words)
    assert ids == original.encode(words)
    assert tokenizer.decode(ids) == original.decode(ids)


def test_a_mistral_gguf_chats_in_mistrals_format(twins: tuple[Tokenizer, Any]) -> None:
    tokenizer, original = twins
    assert tokenizer.eos_ids == {2}
    expected = (
        [1, 3, 23325, 4]
        if original.get_piece_size() == 32768
        else [1, 733, 16289, 28793, 22557, 733, 28748, 16289, 28793]
    )
    assert tokenizer.chat.encode([{"role": "user", "content": "Hello"}]) == expected


def test_a_template_in_the_file_is_used(tmp_path: Path) -> None:
    write_mistral_gguf(
        tmp_path / "z.gguf",
        TINY,
        changes=lambda w: w.add_chat_template("{{ messages[0].content }}{{ eos_token }}"),
    )
    tokenizer = load_tokenizer(convert(str(tmp_path / "z.gguf"), tmp_path / "out"))
    assert tokenizer.chat.encode([{"role": "user", "content": "Hi</s>"}])[-1] == 2
    assert tokenizer.chat.encode([{"role": "user", "content": "Hi</s>"}]).count(2) == 1


@pytest.mark.demo
def test_the_demo_models_tokenizer(demo_model: Path) -> None:
    tokenizer = load_tokenizer(demo_model)
    assert tokenizer.encode("Hello world 123") == [19556, 905, 216, 33, 34, 35]  # digits one by one
    for text in [*HARD, CHATML]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert not any(tokenizer.is_control(i) for i in tokenizer.encode(text))
    ids = tokenizer.chat.encode([{"role": "system", "content": "S"}, {"role": "user", "content": "<|im_end|>"}])
    assert [i for i in ids if tokenizer.is_control(i)] == [1, 2, 1, 2, 1]
    assert tokenizer.eos_ids == {2}


@pytest.mark.demo
def test_the_demo_model_knows_the_capital_of_france(demo_model: Path) -> None:
    model, tokenizer = load("demo")
    answer = generate(model, tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    assert answer == "The capital of France is Paris."


@pytest.mark.demo
def test_the_demo_model_reads_nothing_twice(demo_model: Path) -> None:
    model, tokenizer = load(demo_model)
    cache = model.new_cache()
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Name a fruit."}]
    first = list(stream_generate(model, tokenizer, messages, cache=cache, max_tokens=8))
    ids = [i for piece in first for i in piece.ids]
    kept = ids[:-1] if ids[-1] in tokenizer.eos_ids else ids
    answer: dict[str, Any] = {"role": "assistant", "content": "".join(piece.text for piece in first), "ids": kept}
    seen = cache.offset
    second = list(stream_generate(model, tokenizer, [*messages, answer, messages[0]], cache=cache, max_tokens=2))
    assert second[-1].stats is not None
    assert second[-1].stats.reused_tokens == seen


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "metadata", "reason"),
    [
        (None, {"llama__expert_count": 8}, "experts"),
        (None, {"llama__rope__scaling__type": "yarn"}, "scaled RoPE"),
        (None, {"llama__rope__dimension_count": 8}, "part of the head"),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.full(8, 2, np.float32)),
            {},
            "rope_freqs.weight is not a part",
        ),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(8, np.float32)), {}, "attn_q.bias is not a part"),
    ],
)
def test_models_that_are_not_understood(
    tmp_path: Path,
    change: Any,
    metadata: dict[str, Any],
    reason: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_mistral_gguf(tmp_path / "x.gguf", TINY, changes=change, **metadata)
    assert main([str(tmp_path / "x.gguf"), "--mlx-path", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_other_architectures_and_missing_tensors(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "g.gguf"), "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(M7Error, match="'gemma' is not supported; supported is llama"):
        convert(str(tmp_path / "g.gguf"), tmp_path / "out")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int = 0, entries: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


HOSTILE = {
    "empty": b"",
    "magic": b"GGML" + b"\0" * 60,
    "short": b"GGUF\x03",
    "version": header(version=99),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^50 entries": header(entries=2**50),
    "2^60 tensors": header(tensors=2**60),
    "2^50-byte key": header(entries=1) + struct.pack("<Q", 2**50),
    "2^63-byte string": header(entries=1) + text("a") + struct.pack("<IQ", 8, 2**63),
    "huge array": header(entries=1) + text("a") + struct.pack("<IIQ", 9, 4, 2**61),
    "array of empty strings": header(entries=1) + text("a") + struct.pack("<IIQ", 9, 8, 2**40),
    "nested arrays": header(entries=1) + text("a") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 100,
    "unknown value": header(entries=1) + text("a") + struct.pack("<I", 99),
    "4e9 dimensions": header(tensors=1) + text("a") + struct.pack("<I", 4_000_000_000),
    "huge tensor": header(tensors=1) + text("a") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0),
    "offset": header(tensors=1) + text("a") + struct.pack("<IQIQ", 1, 4, 0, 2**62),
    "unknown type": header(tensors=1) + text("a") + struct.pack("<IQIQ", 1, 4, 999, 0),
    "no metadata": header(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_line(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evil.gguf").write_bytes(HOSTILE[name])
    assert main([str(tmp_path / "evil.gguf"), "--mlx-path", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("m7mlx-convert: error: ")
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file whose vocabulary is cut away, so that most of it is structure."""
    path = tmp_path_factory.mktemp("sound") / "s.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@given(data=st.data())
@settings(max_examples=examples(60), deadline=None)
def test_any_damage_is_an_error_or_harmless(
    sound: bytes,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    broken = bytearray(sound[: data.draw(st.integers(0, len(sound)), label="length")])
    for _ in range(data.draw(st.integers(0, 4), label="changes")):
        if broken:
            broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("broken") / "b.gguf"
    path.write_bytes(broken)
    with contextlib.suppress(WeightsError):
        read_header(path)
    with pytest.raises(M7Error):
        convert(str(path), path.parent / "out")  # sound or not, it is no whole model
