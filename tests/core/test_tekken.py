"""tekken.json: ids equal mistral-common's, whatever the text; what is damaged is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tekken_files import SHIPPED, byte_level_json_of, tekken_data, write_tekken
from tokenizer_folders import HARD, write_files

from m7mlx.errors import TokenizerError
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.mistral_format import MistralFormat
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tokens.tokenizer_json import JsonTokenizer
from m7mlx.tokens.tokenizer_tekken import TekkenTokenizer

SCRIPTS = [
    "Ab",
    "é",
    "ß",
    "Ǆ",
    "ʰ",
    "Ω",
    "Я",
    "א",
    "ع",
    "ह",
    "த",
    "ไ",
    "ဗ",
    "ក",
    "ᚠ",
    "中",
    "ひ",
    "한",
    "𝔘",
    "😀",
    "́",
    "1",
    "٣",
    "Ⅷ",
    "_",
    "/",
    "\r",
    "\n",
    "\t",
    "\u3000",
    "\u200b",
    "\ufeff",
    "'",
    "s",
]


@pytest.fixture(scope="module", params=SHIPPED)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tekkenizer]:
    """A tokenizer that Mistral ships, alone in its folder, and mistral-common's."""
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copy(SHIPPED[request.param], folder / "tekken.json")
    return load_tokenizer(folder), Tekkenizer.from_file(folder / "tekken.json")


def test_what_the_file_says(pair: tuple[Tokenizer, Tekkenizer]) -> None:
    ours, theirs = pair
    assert isinstance(ours, TekkenTokenizer) and repr(ours.chat) == "MistralFormat(v3)"
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (theirs.n_words, theirs.bos_id, frozenset({theirs.eos_id}))
    assert ours.add_bos and not ours.adds_leading_space
    assert set(ours.control_ids().values()) == theirs.special_ids
    for name, token in ours.control_ids().items():
        assert theirs.id_to_piece(token) == name


@pytest.mark.parametrize("text", [*HARD, " ".join(SCRIPTS), "x" * 3000, " " * 3000 + "x", "\n" * 3000])
def test_hard_texts(pair: tuple[Tokenizer, Tekkenizer], text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text, bos=False, eos=False)
    assert ours.decode(ids) == text


@given(st.lists(st.one_of(st.sampled_from(SCRIPTS), st.text(max_size=6))).map("".join))
@settings(max_examples=examples(80), deadline=None)
def test_any_text_in_any_script(pair: tuple[Tokenizer, Tekkenizer], text: str) -> None:
    ours, theirs = pair
    text = text.encode("utf-8", "replace").decode()
    ids = ours.encode(text)
    assert ids == theirs.encode(text, bos=False, eos=False)
    assert not any(ours.is_control(token) for token in ids)
    stream = ours.detokenizer()
    assert "".join([*map(stream.add, ids), stream.finish()]) == text


@given(st.lists(st.integers(0, 131_071), max_size=12))
@settings(max_examples=examples(80), deadline=None)
def test_any_ids_decode_to_their_bytes(pair: tuple[Tokenizer, Tekkenizer], ids: list[int]) -> None:
    ours, theirs = pair
    whole = b"".join(theirs.id_to_byte_piece(token) for token in ids)
    assert b"".join(map(ours.token_bytes, ids)) == whole
    stream = ours.detokenizer()
    assert "".join([*map(stream.add, ids), stream.finish()]) == ours.decode(ids)
    assert ours.decode(ids).replace("\ufffd", "") == whole.decode("utf-8", "replace").replace("\ufffd", "")


def test_bytes_that_are_no_text(pair: tuple[Tokenizer, Tekkenizer]) -> None:
    ours, theirs = pair
    assert ours.encode("a\ud800b") == theirs.encode("a\ufffdb", bos=False, eos=False)
    euro = [1000 + byte for byte in "€".encode()]
    assert ours.decode(euro) == "€" and ours.decode(euro[:2]) == "\ufffd\ufffd"


def test_names_of_special_tokens_stay_text(pair: tuple[Tokenizer, Tekkenizer]) -> None:
    ours, theirs = pair
    text = "".join(ours.control_ids())
    assert ours.encode(text) == theirs.encode(text, bos=False, eos=False)
    assert not any(map(ours.is_control, ours.encode(text)))


def test_more_spaces_than_the_library_can_cut(pair: tuple[Tokenizer, Tekkenizer]) -> None:
    ours, _ = pair
    assert len(ours.encode(" " * 500_000)) == 7813
    for text in (" " * 500_001, "x" + "\n\u3000" * 300_000):
        with pytest.raises(TokenizerError, match="more than 500,000 spaces in a row"):
            ours.encode(text)


# --- beside a tokenizer.json ----------------------------------------------------------------------


def test_the_same_tokens_in_tokenizer_json(tmp_path: Path) -> None:
    """Mistral's own file is taken, whose ids are mistral-common's; both give the same ids."""
    write_tekken(tmp_path, "v3")
    data = byte_level_json_of(tekken_data("v3"))
    write_files(tmp_path, {"tokenizer.json": data})
    both = load_tokenizer(tmp_path)
    assert isinstance(both, TekkenTokenizer) and isinstance(both.chat, MistralFormat)
    (tmp_path / "tekken.json").unlink()
    alone = load_tokenizer(tmp_path)
    assert isinstance(alone, JsonTokenizer)
    for text in [*HARD, " ".join(SCRIPTS)]:
        assert alone.encode(text) == both.encode(text)
        assert alone.decode(alone.encode(text)) == text
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 12_000, "content": "<|im_start|>"})
    write_tekken(tmp_path, "v3")
    assert isinstance(load_tokenizer(write_files(tmp_path, {"tokenizer.json": data})), JsonTokenizer)


def test_a_damaged_tekken_beside_tokenizer_json_is_not_needed(tmp_path: Path) -> None:
    write_files(tmp_path, {"tokenizer.json": byte_level_json_of(tekken_data("v3")), "tekken.json": b"broken"})
    assert isinstance(load_tokenizer(tmp_path), JsonTokenizer)


# --- damage ---------------------------------------------------------------------------------------


def changed(**changes: Any) -> dict[str, Any]:
    return tekken_data("v11") | changes


def with_token(rank: int, /, **changes: Any) -> dict[str, Any]:
    vocab = list(tekken_data("v11")["vocab"])
    vocab[rank] = vocab[rank] | changes
    return changed(vocab=vocab)


SPECIAL = tekken_data("v11")["special_tokens"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "not a JSON object"),
        ({}, "'config'"),
        (changed(vocab=5), "too few tokens"),
        (changed(vocab=[1, 2]), "too few tokens"),
        (changed(vocab=tekken_data("v11")["vocab"][:5000]), "too few tokens"),
        (with_token(300, rank=301), "in the order of its ranks"),
        (with_token(300, token_bytes="?"), "token 300 is not base64"),
        (with_token(300, token_bytes=7), "damaged"),
        (with_token(5, token_bytes="YWE="), "begin with all bytes"),
        (with_token(300, token_bytes="AA=="), "stands twice"),
        (tekken_data("v11", pattern="("), "damaged"),
        (tekken_data("v11", default_vocab_size=-1), "no number of tokens"),
        (tekken_data("v11", default_vocab_size=True), "no number of tokens"),
        (tekken_data("v11", default_num_special_tokens=3), "too many"),
        (changed(special_tokens=None), "special_tokens is missing"),
        (changed(special_tokens=SPECIAL[1:]), "order of their ranks"),
        (changed(special_tokens=[*SPECIAL[:-1], SPECIAL[-1] | {"token_str": "<s>"}]), "two have one name"),
        (changed(special_tokens=[SPECIAL[0]]), "no tokens <s> and </s>"),
        (changed(special_tokens=7), "damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: Any, reason: str) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(data))
    with pytest.raises(TokenizerError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_pattern_that_takes_too_long_is_an_error(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tekken(tmp_path, "v3", pattern=r"(?:a|a|b(?=c))+(?!.)x|.(?!x)"))
    with pytest.raises(TokenizerError, match="cannot cut this text"):
        tokenizer.encode("a" * 4000)
