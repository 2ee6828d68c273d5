"""The text between two others: ids equal mistral-common's, and typed names stay text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.fim.request import FIMRequest
from models import mistral_file, small_config, small_model
from tekken_files import SIZE, mistral_common_of, write_tekken
from tokenizer_folders import HARD

from m7mlx import Request
from m7mlx.errors import InputError
from m7mlx.request import prepare
from m7mlx.tokens.infill import infill_ids
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.tokenizer import Tokenizer

PARTS = st.one_of(st.sampled_from(["[SUFFIX]", "[PREFIX]", "</s>", " ", "\n", "(", "f"]), st.text(max_size=6))
CODE = st.lists(PARTS).map("".join)
Pairs = list[tuple[Tokenizer, Path]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Codestral's vocabulary (v3), and a tekken one."""
    codestral = tmp_path_factory.mktemp("v3") / "tokenizer.model.v3"
    shutil.copy(mistral_file("v3"), codestral)
    tekken = write_tekken(tmp_path_factory.mktemp("tekken"), "v7")
    return [(load_tokenizer(codestral.parent), codestral), (load_tokenizer(tekken), tekken / "tekken.json")]


@pytest.fixture(scope="module")
def theirs(pairs: Pairs) -> list[object]:
    return [mistral_common_of(path) for _, path in pairs]


@given(st.sampled_from([0, 1]), CODE, CODE)
@settings(max_examples=examples(60), deadline=None)
def test_any_texts(pairs: Pairs, theirs: list[object], n: int, prefix: str, suffix: str) -> None:
    prefix, suffix = (text.encode("utf-8", "replace").decode() for text in (prefix, suffix))
    expected = theirs[n].encode_fim(FIMRequest(prompt=prefix, suffix=suffix)).tokens  # type: ignore[attr-defined]
    tokenizer = pairs[n][0]
    found = infill_ids(tokenizer, prefix, suffix)
    assert found == expected
    assert sum(map(tokenizer.is_control, found)) == 3


@pytest.mark.parametrize("text", HARD)
def test_hard_texts(pairs: Pairs, theirs: list[object], text: str) -> None:
    for (tokenizer, _), other in zip(pairs, theirs, strict=True):
        expected = other.encode_fim(FIMRequest(prompt=text, suffix=text)).tokens  # type: ignore[attr-defined]
        assert infill_ids(tokenizer, text, text) == expected


def test_a_model_that_cannot(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    for version in ("v1", "v2"):
        with pytest.raises(InputError, match="cannot fill in the middle"):
            infill_ids(mistral_tokenizers[version], "a", "b")


def test_a_request_with_a_suffix(pairs: Pairs) -> None:
    tokenizer = pairs[1][0]
    model = small_model(small_config(vocab_size=SIZE, n_layers=1))
    request = Request.from_dict(Request("def f(", suffix="return x").to_dict())
    ready = prepare(request, model, tokenizer, model.new_cache())
    assert list(ready.ids) == infill_ids(tokenizer, "def f(", "return x") and not ready.at_start
    for prompt in ([1, 2], [{"role": "user", "content": "x"}]):
        with pytest.raises(InputError, match="goes with a prompt that is one"):
            Request(prompt, suffix="x")
