"""Text ↔ ids: equal to mistral-common, text never a control id, streams equal to the whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer as Oracle
from models import MISTRAL_FILES, mistral_file

from m7mlx.errors import TokenizerError
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.tokenizer import Tokenizer

VERSIONS = list(MISTRAL_FILES)
HARD = [
    "",
    " ",
    "  two",
    "trailing  ",
    "\n\n\t\r\n",
    "naïve café — “quotes”",
    "👩‍👩‍👧‍👦 🇫🇷 ☕",
    "你好，世界。日本語テキスト",
    "שלום עולם مرحبا",
    "</s><s>[INST] [/INST] <unk> [control_99] <0x41>",
    "▁already▁marked",
    "a\x00b\x7f\ufdd0\ufffd",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "def f(x):\n    return x  # tabs\tand spaces\n",
]
ORACLES = {v: Oracle(str(mistral_file(v))) for v in VERSIONS}
text = st.text(st.characters(codec="utf-8"), max_size=60)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("hard", HARD)
def test_hard_texts_equal_mistral_common(mistral_tokenizers: dict[str, Tokenizer], version: str, hard: str) -> None:
    tokenizer, oracle = mistral_tokenizers[version], ORACLES[version]
    ids = tokenizer.encode(hard)
    assert ids == oracle.encode(hard, bos=False, eos=False)
    assert tokenizer.encode(hard, add_bos=True) == oracle.encode(hard, bos=True, eos=False)
    assert tokenizer.decode(ids) == oracle.decode(ids)
    assert not any(tokenizer.is_control(i) for i in ids)


@given(st.sampled_from(VERSIONS), text)
@settings(max_examples=300, deadline=None)
def test_any_text_equals_mistral_common(mistral_tokenizers: dict[str, Tokenizer], version: str, words: str) -> None:
    ids = mistral_tokenizers[version].encode(words)
    assert ids == ORACLES[version].encode(words, bos=False, eos=False)
    assert mistral_tokenizers[version].decode(ids) == ORACLES[version].decode(ids)


@given(st.sampled_from(VERSIONS), st.lists(st.integers(0, 31999) | st.integers(0, 1100), max_size=30))
@settings(max_examples=400, deadline=None)
def test_any_ids_decode_as_in_mistral_common_and_stream_alike(
    mistral_tokenizers: dict[str, Tokenizer], version: str, ids: list[int]
) -> None:
    """Ids of every kind, bytes that are no UTF-8 included."""
    tokenizer = mistral_tokenizers[version]
    whole = tokenizer.decode(ids)
    visible = [i for i in ids if not tokenizer.is_control(i)]
    assert whole == ORACLES[version].decode(visible)
    stream = tokenizer.detokenizer()
    assert "".join([stream.add(i) for i in ids] + [stream.finish()]) == whole


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("hard", HARD)
def test_what_was_written_is_streamed_to_the_last_space(
    mistral_tokenizers: dict[str, Tokenizer], version: str, hard: str
) -> None:
    tokenizer = mistral_tokenizers[version]
    stream = tokenizer.detokenizer()
    streamed = "".join([stream.add(i) for i in tokenizer.encode(hard)] + [stream.finish()])
    assert streamed == hard.replace("▁", " ")  # which is how sentencepiece writes a space


def test_streams_hold_back_only_unfinished_characters(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = mistral_tokenizers["v3"]
    ids = tokenizer.encode("🦜")
    assert len(ids) > 3  # bytes: this bird has no piece of its own
    stream = tokenizer.detokenizer()
    assert [stream.add(i) for i in ids][-1] == "🦜"
    assert stream.finish() == ""
    stream = tokenizer.detokenizer()
    assert [stream.add(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.finish() == "\ufffd" * 3
    genuine = tokenizer.encode("\ufffd\ufffd")
    stream = tokenizer.detokenizer()
    assert "".join(stream.add(i) for i in genuine) == "\ufffd\ufffd"  # shown at once, not withheld


def test_a_continuation_keeps_its_leading_space(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = mistral_tokenizers["v1"]
    ids = tokenizer.encode("Paris")
    assert tokenizer.detokenizer().add(ids[0]) == "Paris"
    assert tokenizer.detokenizer(at_start=False).add(ids[0]) == " Paris"


def test_lone_surrogates_are_replaced(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = mistral_tokenizers["v3"]
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")


def test_ids_past_the_vocabulary_have_no_text(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = mistral_tokenizers["v3"]
    text = tokenizer.encode("Paris")
    assert tokenizer.decode([32768, *text, 10**9]) == "Paris"
    assert tokenizer.token_bytes(32768) == b""
    with pytest.raises(TokenizerError, match="not a token id"):
        tokenizer.decode([-1])


# --- tokenizer.json -------------------------------------------------------------------------------------


def byte_level_json(special: dict[str, bool]) -> dict[str, Any]:
    """A byte-level tokenizer of 256 bytes and some added tokens (name → special)."""
    from m7mlx.tokens.tokenizer_json import _BYTE_OF

    vocab = {char: byte[0] for char, byte in _BYTE_OF.items()}
    added = [
        {"id": 256 + n, "content": name, "special": s, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for n, (name, s) in enumerate(special.items())
    ]  # fmt: skip
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": vocab | {a["content"]: a["id"] for a in added}, "merges": []},
    }


def write_json_tokenizer(folder: Path, data: dict[str, Any], settings: dict[str, Any] | None = None) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings or {}))
    return load_tokenizer(folder)


CONTROLS = {"<|im_start|>": True, "<|im_end|>": False, "</s>": True, "[INST]": False}


def test_text_is_never_a_control_id_in_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = write_json_tokenizer(tmp_path, byte_level_json(CONTROLS), {"eos_token": "<|im_end|>"})
    for name in CONTROLS:
        typed = f"a {name}{name} b"
        ids = tokenizer.encode(typed)
        assert ids == list(typed.encode())
        assert tokenizer.decode(ids) == typed
        assert tokenizer.control_id(name) == 256 + list(CONTROLS).index(name)
    assert tokenizer.encode_mixed(["a", 256, "b<|im_end|>", 257]) == [97, 256, *b"b<|im_end|>", 257]
    assert tokenizer.eos_ids == {257}
    assert tokenizer.decode([97, 256, 98]) == "ab"


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_json_tokenizer(tmp_path_factory.mktemp("json"), byte_level_json(CONTROLS))


@given(words=text)
@settings(max_examples=100, deadline=None)
def test_byte_level_round_trip(byte_level: Tokenizer, words: str) -> None:
    assert byte_level.decode(byte_level.encode(words)) == words


@pytest.mark.parametrize("version", ["v1", "v3"])
@given(words=text | st.sampled_from(HARD))
@settings(max_examples=60, deadline=None)
def test_sentencepiece_style_json_equals_the_model_file(
    mistral_tokenizers: dict[str, Tokenizer], json_twins: dict[str, Tokenizer], version: str, words: str
) -> None:
    words = words.replace("▁", "")  # typed as such, the two libraries differ by design
    twin = json_twins[version]
    ids = twin.encode(words)
    assert ids == mistral_tokenizers[version].encode(words)
    assert twin.decode(ids) == mistral_tokenizers[version].decode(ids)


@pytest.fixture(scope="session")
def json_twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Mistral's v1 and v3 vocabularies as transformers would write them to a tokenizer.json."""
    twins = {}
    for version in ("v1", "v3"):
        twins[version] = write_json_tokenizer(tmp_path_factory.mktemp(version), bpe_json_of(mistral_file(version)))
    return twins


def bpe_json_of(model: Path) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    sp = SentencePieceProcessor(model_file=str(model))
    size = sp.get_piece_size()
    pieces = [sp.id_to_piece(i) for i in range(size)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        splits = [(piece[:n], piece[n:]) for n in range(1, len(piece)) if {piece[:n], piece[n:]} <= vocab.keys()]
        merges += [(-sp.get_score(vocab[piece]), vocab[a], vocab[b], a, b) for a, b in splits]
    merges.sort()
    added = [
        {"id": i, "content": pieces[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i in range(size) if sp.is_control(i) or sp.is_unknown(i)
    ]  # fmt: skip
    prepend = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": prepend},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "vocab": vocab,
            "merges": [[a, b] for _, _, _, a, b in merges],
        },
    }  # fmt: skip


# --- folders --------------------------------------------------------------------------------------------


def test_end_ids_come_from_all_files_that_name_them(tmp_path: Path) -> None:
    shutil.copy(mistral_file("v3"), tmp_path / "tokenizer.model")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 770]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert load_tokenizer(tmp_path).eos_ids == {2, 5, 770}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b""),
        ("tokenizer.model", b"not a model"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"model": {"vocab": {}, "type": "WordPiece"}}'),
        ("tokenizer.json", b'{"added_tokens": [{"content": "x"}], "model": {"vocab": {}}}'),
    ],
)
def test_damaged_files_are_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        load_tokenizer(tmp_path)
