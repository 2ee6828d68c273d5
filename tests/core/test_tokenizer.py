"""Text ↔ ids: equal to mistral-common, text never a control id, streams equal to the whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MISTRAL_FILES, mistral_file
from tokenizer_folders import CONTROLS, HARD, ORACLES, bpe_json_of, byte_level_json, write_json_tokenizer

from m7mlx.errors import TokenizerError
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.tokenizer import Tokenizer

VERSIONS = list(MISTRAL_FILES)
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
@settings(max_examples=examples(80), deadline=None)
def test_any_text_equals_mistral_common(mistral_tokenizers: dict[str, Tokenizer], version: str, words: str) -> None:
    ids = mistral_tokenizers[version].encode(words)
    assert ids == ORACLES[version].encode(words, bos=False, eos=False)
    assert mistral_tokenizers[version].decode(ids) == ORACLES[version].decode(ids)


@given(st.sampled_from(VERSIONS), st.lists(st.integers(0, 31999) | st.integers(0, 1100), max_size=30))
@settings(max_examples=examples(80), deadline=None)
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


# --- tokenizer.json -------------------------------------------------------------------------------


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
@settings(max_examples=examples(40), deadline=None)
def test_byte_level_round_trip(byte_level: Tokenizer, words: str) -> None:
    assert byte_level.decode(byte_level.encode(words)) == words


@pytest.mark.parametrize("version", ["v1", "v3"])
@given(words=text | st.sampled_from(HARD))
@settings(max_examples=examples(30), deadline=None)
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


# --- folders --------------------------------------------------------------------------------------


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
