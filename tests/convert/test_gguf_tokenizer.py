"""Tokenizers out of GGUF metadata: the ids are those of the tokenizer that went in."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from conversations import assistant, system, user
from gguf_files import tokenizer_metadata, unpack_tokenizer
from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
from models import mistral_file
from sentencepiece import SentencePieceProcessor
from tekken_files import N_SPECIAL, byte_level_json_of, ids_by, mistral_common_of, tekken_data, write_tekken
from tokenizer_folders import HARD

TEXTS = [
    "Hello, world!",
    " leading and trailing ",
    "  two  spaces\n\n\tand\r\nlines   ",
    "",
    "Ünïcödé, 你好, こんにちは, 🙂🙃, Ελληνικά, עברית",
    "def f(x):\n    return x**2  # 12345 67.89\n",
    "<s></s><unk>[INST] text that looks like control [/INST]",
    "it's we'll THEY'RE don’t 1000000 ½ ² Ⅷ",
    "a\u0301\ufeff\u200b\u00a0x\u2581y",
]


def sentencepiece_metadata(version: str) -> dict[str, Any]:
    """The real model as llama.cpp's converter writes it."""
    from sentencepiece import sentencepiece_model_pb2

    pb: Any = sentencepiece_model_pb2  # made at run time: type checkers see nothing in it
    proto = pb.ModelProto()
    proto.ParseFromString(mistral_file(version).read_bytes())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [int(piece.type) for piece in proto.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_sentencepiece_ids_are_the_same(tmp_path: Path, version: str) -> None:
    ours = unpack_tokenizer(tmp_path, sentencepiece_metadata(version))
    original = SentencePieceProcessor(model_file=str(mistral_file(version)))
    rebuilt = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert rebuilt.get_piece_size() == original.get_piece_size() == ours.vocab_size
    for text in TEXTS:
        ids = original.encode(text)
        assert rebuilt.encode(text) == ids
        assert rebuilt.decode(ids) == original.decode(ids)
    for i in range(ours.vocab_size):
        assert rebuilt.id_to_piece(i) == original.id_to_piece(i)
        for kind in ("is_control", "is_unknown", "is_byte", "is_unused"):
            assert getattr(rebuilt, kind)(i) == getattr(original, kind)(i)
    assert (ours.bos_id, ours.eos_ids) == (1, frozenset({2}))


def test_sentencepiece_without_the_space_in_front(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata("v1") | {"tokenizer.ggml.add_space_prefix": False}
    assert unpack_tokenizer(tmp_path, metadata).encode("Hello") == [16230]  # and not ▁Hello, 22557
    metadata["tokenizer.ggml.add_space_prefix"] = True
    assert unpack_tokenizer(tmp_path, metadata).encode("Hello") == [22557]


@pytest.mark.parametrize("version", ["v3", "v7", "v13"])
def test_tekken_ids_are_those_of_mistral_common(tmp_path: Path, version: str) -> None:
    """A GGUF states no version: its chat template tells which of Mistral's formats it is."""
    theirs = mistral_common_of(write_tekken(tmp_path / "tekken", version))
    data = byte_level_json_of(tekken_data(version))
    pieces = list(data["model"]["vocab"])
    template = convert_tokenizer_to_chat_template(tmp_path / "tekken" / "tekken.json")
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [3 if i < N_SPECIAL else 1 for i in range(len(pieces))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in data["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": template,
    }
    ours = unpack_tokenizer(tmp_path, metadata)
    tekken = theirs.instruct_tokenizer.tokenizer
    for text in [*TEXTS, *HARD, "camelCaseHTTPServer snake_case 12345 Ǆʰ한국어 path/to//file\r\n"]:
        assert ours.encode(text) == tekken.encode(text, bos=False, eos=False)
        assert ours.decode(ours.encode(text)) == text
    assert ours.control_ids() == {token: i for i, token in enumerate(pieces[:N_SPECIAL])}
    for messages in ([system("Be brief"), user("a [INST]"), assistant("b"), user("c")], [user("x")]):
        assert ours.chat.encode(messages) == ids_by(theirs, messages)


@pytest.mark.parametrize("pre", ["gpt-2", "default", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_round_trip(tmp_path: Path, pre: str) -> None:
    tokenizer = unpack_tokenizer(tmp_path, tokenizer_metadata() | {"tokenizer.ggml.pre": pre})
    for text in TEXTS:
        composed = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert tokenizer.decode(tokenizer.encode(text)) == composed
    assert tokenizer.control_id("<s>") == tokenizer.bos_id == 0
    assert tokenizer.eos_ids == {1}
    assert tokenizer.vocab_size == 259


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["it", "'s", "ĠIT", "'", "S", "Ġ", "Ġ12345", "Ġx", "!!", "Ċ", "Ċ", "y"]),
        ("smollm", ["it", "'s", "ĠIT", "'", "S", "ĠĠ", "1", "2", "3", "4", "5", "Ġx", "!!", "Ċ", "Ċ", "y"]),
        ("llama-bpe", ["it", "'s", "ĠIT", "'S", "Ġ", "Ġ", "123", "45", "Ġx", "!!ĊĊ", "y"]),
        ("qwen2", ["it", "'s", "ĠIT", "'S", "Ġ", "Ġ", "1", "2", "3", "4", "5", "Ġx", "!!ĊĊ", "y"]),
    ],
)
def test_text_is_cut_as_the_model_was_trained(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    from tokenizers import Tokenizer as Library

    unpack_tokenizer(tmp_path, tokenizer_metadata() | {"tokenizer.ggml.pre": pre})
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    assert library.pre_tokenizer is not None
    assert [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str("it's IT'S  12345 x!!\n\ny")] == pieces


def test_merges_and_added_tokens(tmp_path: Path) -> None:
    """A user's text never becomes a control token.

    A user-defined token is taken out of text if it is a word.
    """
    tokens = [*tokenizer_metadata()["tokenizer.ggml.tokens"], "abc", "<|tool|>x", "pad"]
    metadata = tokenizer_metadata() | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * 258 + [4, 5],
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.padding_token_id": 261,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    tokenizer = unpack_tokenizer(tmp_path, metadata)
    assert tokenizer.encode("abc") == [259]
    assert 260 not in tokenizer.encode("<|tool|>x")
    assert tokenizer.control_id("<|tool|>x") == 260
    assert tokenizer.decode([260]) == "<|tool|>x"
    assert 0 not in tokenizer.encode("<s>")
    assert tokenizer.chat.encode([{"role": "user", "content": "abc"}]) == [0, 259]
    assert tokenizer.vocab_size == 262


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    """transformers reads ids as mlx-lm would, with the start token in front."""
    import warnings

    metadata = tokenizer_metadata() | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": True}
    tokenizer = unpack_tokenizer(tmp_path, metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:6]:
        assert theirs.encode(text) == [0, *tokenizer.encode(text)]


def test_spaces_in_user_defined_tokens(tmp_path: Path) -> None:
    """They are written as such there, and as ▁ in all other pieces.

    Tokens without a type are ordinary.
    """
    metadata = sentencepiece_metadata("v1")
    metadata["tokenizer.ggml.tokens"] += ["<|my turn|>", "    x   y", "qqzz"]
    metadata["tokenizer.ggml.scores"] += [0.0, 0.0, 0.0]
    metadata["tokenizer.ggml.token_type"] += [4, 4, 0]
    tokenizer = unpack_tokenizer(tmp_path, metadata)
    assert tokenizer.control_id("<|my turn|>") == 32000
    assert 32000 not in tokenizer.encode("<|my turn|>")
    assert tokenizer.decode([32000]) == "<|my turn|>"
    assert 32001 in tokenizer.encode("a    x   y")
    assert tokenizer.decode(tokenizer.encode("a    x   y qqzz")) == "a    x   y qqzz"
    assert not tokenizer.is_control(32002)
