"""GGUF headers: sound ones are read as the `gguf` package does, hostile ones give one line."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import gguf_config, write_gguf
from m7mlx_convert.cli import main
from m7mlx_convert.gguf import open_gguf
from m7mlx_convert.gguf_header import read_header

from m7mlx.errors import M7Error, WeightsError


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(entries: list[bytes], tensors: list[bytes], version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join(entries + tensors)


ARCHITECTURE = entry("general.architecture", 8, string("llama"))
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "too short": b"GGUF\x03",
    "not GGUF": header([], [], magic=b"GGML"),
    "version 1": header([], [], version=1),
    "another byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2⁵⁰ tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**50, 0),
    "2⁵⁰ entries": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**50),
    "9,999 entries that are not there": b"GGUF" + struct.pack("<IQQ", 3, 0, 9_999),
    "a key of 2⁵⁰ bytes": header([struct.pack("<Q", 2**50)], []),
    "a key of 2⁶⁴ − 1 bytes": header([struct.pack("<Q", 2**64 - 1) + b"x" * 100], []),
    "a key past the end": header([struct.pack("<Q", 60_000) + b"x"], []),
    "a key that is no text": header([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1)], []),
    "a string of 2⁵⁰ bytes": header([entry("k", 8, struct.pack("<Q", 2**50))], []),
    "a string that is no text": header([entry("k", 8, struct.pack("<Q", 2) + b"\xff\xfe")], []),
    "an array of 2⁵⁰ numbers": header([entry("k", 9, struct.pack("<IQ", 4, 2**50))], []),
    "an array of 2⁵⁰ strings": header([entry("k", 9, struct.pack("<IQ", 8, 2**50))], []),
    "an array of 3,999,999 strings that are not there": header([entry("k", 9, struct.pack("<IQ", 8, 3_999_999))], []),
    "arrays within arrays": header([entry("k", 9, struct.pack("<IQ", 9, 1) * 100)], []),
    "a value of no known type": header([entry("k", 99, b"")], []),
    "an array of no known type": header([entry("k", 9, struct.pack("<IQ", 99, 1))], []),
    "a key twice": header([ARCHITECTURE, ARCHITECTURE], []),
    "an alignment of 0": header([entry("general.alignment", 4, struct.pack("<I", 0))], []),
    "an alignment of 48": header([entry("general.alignment", 4, struct.pack("<I", 48))], []),
    "an alignment in words": header([entry("general.alignment", 8, string("32"))], []),
    "4·10⁹ dimensions": header([], [string("t") + struct.pack("<I", 4_000_000_000)]),
    "no dimension": header([], [tensor("t", [])]),
    "a side of 0": header([], [tensor("t", [0, 4])]),
    "sides of 2⁶³": header([], [tensor("t", [2**63, 2**63, 2**63])]),
    "sides whose product is 2⁶⁴": header([], [tensor("t", [2**32, 2**32])]),
    "a type that is not known": header([], [tensor("t", [32], kind=4242)]),
    "half a block": header([], [tensor("t", [16, 2], kind=2)]),
    "an offset past the end": header([], [tensor("t", [8], offset=2**40)]) + bytes(64),
    "an offset of 2⁶⁴ − 1": header([], [tensor("t", [8], offset=2**64 - 1)]) + bytes(64),
    "data cut short": header([], [tensor("t", [8])]) + bytes(20),
    "a tensor twice": header([], [tensor("t", [8])] * 2) + bytes(99),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=r"m\.gguf is not a sound GGUF file: .+; fetch it again"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
    assert main([str(path), "--mlx-path", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_a_large_array_takes_memory_in_proportion(tmp_path: Path) -> None:
    """3 MB of bytes as metadata: some ten times that, not some thousand times."""
    path = tmp_path / "m.gguf"
    path.write_bytes(header([entry("k", 9, struct.pack("<IQ", 0, 3_000_000) + bytes(3_000_000))], []))
    tracemalloc.start()
    try:
        assert len(read_header(path).metadata["k"]) == 3_000_000
        assert tracemalloc.get_traced_memory()[1] < 80e6
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    kinds = {"model.embed_tokens.weight": Kind.Q8_0, "lm_head.weight": Kind.Q4_0}
    write_gguf(
        path, gguf_config(n_layers=1), kinds=kinds, changes={"general.alignment": 64, "general.tags": ["a", "ä"]}
    )
    return path


def test_sound_headers_are_read_as_by_the_package(sound: Path) -> None:
    metadata, tensors = read_header(sound)
    reader = gguf.GGUFReader(sound)
    assert metadata == {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(tensors) == [tensor.name for tensor in reader.tensors]
    for expected in reader.tensors:
        found = tensors[expected.name]
        assert found.kind == expected.tensor_type.name
        assert found.shape == tuple(reversed(expected.shape.tolist()))
        assert np.array_equal(found.read().reshape(-1), expected.data.reshape(-1).view(np.uint8))


def broken(sound: Path, path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    """A changed copy is read, or refused with one of this project's errors.

    Nothing else happens.
    """
    path.write_bytes(change(bytearray(sound.read_bytes())))
    try:
        open_gguf(path)
    except M7Error as error:
        assert "\n" not in str(error)  # noqa: PT017 - most changes, but not all, are errors


def test_every_truncation_is_refused(sound: Path, tmp_path: Path) -> None:
    whole = sound.read_bytes()
    for length in [*range(0, 3000, 37), *range(3000, len(whole), len(whole) // 50), len(whole) - 1]:
        (tmp_path / "m.gguf").write_bytes(whole[:length])
        with pytest.raises(WeightsError, match="not a sound GGUF file"):
            open_gguf(tmp_path / "m.gguf")


def test_random_damage_never_crashes(sound: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    end = min(tensor.offset for tensor in read_header(sound).tensors.values())

    def flip(data: bytearray) -> bytearray:
        for _ in range(rng.choice((1, 1, 3, 30))):
            data[rng.randrange(end)] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        return data

    for _ in range(300):
        broken(sound, tmp_path / "m.gguf", flip)


def test_a_file_that_shrinks_meanwhile(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(sound.read_bytes())
    last = list(open_gguf(path).tensors.values())[-1]
    path.write_bytes(sound.read_bytes()[:-40_000])
    with pytest.raises(WeightsError, match="become shorter"):
        last.read()
