"""The GGUF files that are written for llama.cpp hold the numbers of the folder, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from effort import examples
from gguf import GGMLQuantizationType as Kind
from gguf_files import gguf_name
from hypothesis import given, settings
from hypothesis import strategies as st
from m7mlx_bench.gguf_blocks import choose_type, pack
from m7mlx_bench.gguf_copy import write_gguf
from m7mlx_bench.models import write_random
from models import random_weights, small_config, write_folder
from sources import permuted

from m7mlx.config import ModelConfig
from m7mlx.errors import InputError
from m7mlx.loading import load_model
from m7mlx.quantization import Quantization

CONFIG = small_config(hidden_size=256, intermediate_size=512, n_layers=2, n_heads=4, head_dim=64, vocab_size=300)


@settings(max_examples=examples(20), deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
@pytest.mark.parametrize(
    ("bits", "has_minimum", "kind"),
    [
        (4, False, Kind.Q4_0),
        (4, True, Kind.Q4_1),
        (5, False, Kind.Q5_0),
        (5, True, Kind.Q5_1),
        (8, False, Kind.Q8_0),
        (2, False, Kind.Q2_K),
        (3, False, Kind.Q3_K),
        (6, False, Kind.Q6_K),
    ],
)
def test_blocks_hold_what_mlx_has(bits: int, has_minimum: bool, kind: Kind, data: st.DataObject, seed: int) -> None:
    """As gguf-py reads them: each number is a product and perhaps a sum in float32."""
    group = data.draw(st.sampled_from([32, 64, 128]))
    rows = data.draw(st.integers(1, 9))
    is_super = kind in (Kind.Q2_K, Kind.Q3_K, Kind.Q6_K)
    columns = (256 if is_super else group) * data.draw(st.integers(1, 4))
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 32, (rows, columns * bits // 32), np.uint32)
    scales = rng.uniform(0.001, 0.1, (rows, columns // group)).astype(np.float16).astype(np.float32)
    if is_super:
        scales[:] = scales[:, :1]
    biases = scales * -(1 << (bits - 1))
    if has_minimum:
        biases = rng.uniform(-0.5, 0.1, scales.shape).astype(np.float16).astype(np.float32)
    scheme = Quantization(group, bits)
    assert choose_type(scheme, columns, scales, biases) is kind
    packed = pack(kind, scheme, words, scales, biases)
    expected = mx.dequantize(mx.array(words), mx.array(scales), mx.array(biases), group, bits)
    np.testing.assert_allclose(gguf.quants.dequantize(packed, kind), np.array(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("bits", "reason"), [(8, "no type for 8 bits with a minimum"), (3, "numbers in 3 bits")])
def test_numbers_that_no_type_holds_are_refused(bits: int, reason: str) -> None:
    scales = np.array([[0.1, 0.2, 0.1, 0.1]], np.float32)
    biases = scales * -(1 << (bits - 1))
    biases[0, 1] += bits == 8
    with pytest.raises(InputError, match=reason):
        choose_type(Quantization(64, bits), 256, scales, biases)


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_of_floats(tmp_path: Path, tied: bool) -> None:
    config = small_config(tie_word_embeddings=tied)
    folder = write_folder(tmp_path / "model", config)
    shares: list[float] = []
    assert write_gguf(folder, tmp_path / "x.gguf", shares.append) == "F32"
    fields, tensors = read_gguf(tmp_path / "x.gguf")
    expected = random_weights(config)
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}
    assert tensors.keys() == {gguf_name(name) for name in expected}
    for name, array in expected.items():
        of = heads.get(name.split(".")[-2])
        np.testing.assert_array_equal(tensors[gguf_name(name)], permuted(array, of) if of else array)
    assert fields["llama.rope.freq_base"] == config.rope_theta
    assert fields["llama.attention.key_length"] == config.head_dim
    assert fields["llama.vocab_size"] == config.vocab_size
    assert shares == sorted(shares) and shares[-1] == 1


def test_random_weights_in_4_bits_take_as_many_bits(tmp_path: Path) -> None:
    config = ModelConfig.from_dict(CONFIG.to_dict() | {"quantization": {"group_size": 64, "bits": 4}})
    write_random(tmp_path / "model", config)
    assert write_gguf(tmp_path / "model", tmp_path / "x.gguf") == "Q4_0"
    ours = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert abs((tmp_path / "x.gguf").stat().st_size / ours - 1) < 0.02


@pytest.mark.llama
@pytest.mark.parametrize("bits", [None, 2, 4, 6])
def test_llama_cpp_computes_the_same(tmp_path: Path, bits: int | None) -> None:
    import llama_cpp

    scheme = {"quantization": {"group_size": 64, "bits": bits}} if bits else {}
    config = ModelConfig.from_dict(CONFIG.to_dict() | {"sliding_window": None} | scheme)
    write_random(tmp_path / "model", config)
    write_gguf(tmp_path / "model", tmp_path / "x.gguf")
    ids = [7, 250, 31, 99, 4, 180, 66]
    llama = llama_cpp.Llama(str(tmp_path / "x.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    llama.eval(ids)
    theirs = np.array(llama.scores[: len(ids)])
    llama.close()
    ours = np.array(load_model(tmp_path / "model")(mx.array([ids])))[0]
    # It rounds keys, values and the inputs of products.
    assert np.abs(ours - theirs).max() < 0.01 * np.abs(ours).max()
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
