"""A list of prompts: the answers that each gets alone; one prompt and several are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import small_config, small_model

import m7mlx.batch_generation
import m7mlx.memory
from m7mlx import Mistral, PromptLookup, Sampling, Tokenizer, generate, load, stream_generate
from m7mlx.errors import InputError, M7Error, TokenizerError
from m7mlx.memory import budget, cache_bytes, positions_that_fit
from m7mlx.rows import Told
from m7mlx.scheduler import Scheduler

TEXTS = [f"Question {n}: " + "what is it? " * n for n in range(11)]  # more than there are rows; most leave the window
CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Mistral, Tokenizer]:
    return load(model_folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_tokens": 0},
        {"sampling": Sampling(temperature=0.8, top_p=0.9, seed=3)},
        {"stop": ["a", "e"]},
        {"logits_processors": [lambda ids, logits: logits + mx.arange(logits.shape[-1]) % 7]},
    ],
)
def test_each_answer_is_the_one_that_its_prompt_gets_alone(
    loaded: tuple[Mistral, Tokenizer], options: dict[str, Any]
) -> None:
    options = {"max_tokens": 9} | options
    alone = [generate(*loaded, text, **options) for text in TEXTS]
    assert generate(*loaded, TEXTS, **options) == alone
    assert generate(*loaded, tuple(TEXTS), **options) == alone


def test_prompts_of_every_form(loaded: tuple[Mistral, Tokenizer]) -> None:
    prompts: list[Any] = ["Hello", [1, 5, 900], CHAT, (1, 7), np.array([1, 9]), mx.array([1, 11])]
    alone = [generate(*loaded, prompt, max_tokens=4) for prompt in prompts]
    assert all(isinstance(answer, str) for answer in alone)
    assert generate(*loaded, prompts, max_tokens=4) == alone
    assert generate(*loaded, [CHAT, CHAT], max_tokens=4) == [alone[2]] * 2
    assert generate(*loaded, [[1, 5, 900]], max_tokens=4) == [alone[1]]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (["Hello", 5], "a list of prompts holds whole prompts .* of kind int"),
        (["Hello", CHAT[0]], "of kind dict"),
        ([[1, 2], None], "of kind NoneType"),
        ([CHAT, CHAT[0]], "of kind dict"),
        ([CHAT[0], "Hello"], "message 2 has no role"),
        ([CHAT[0], CHAT], "message 2 has no role"),
        ([1, "Hello"], "a prompt is a text"),
        ([1, [2]], "a prompt is a text"),
        ([["Hello"]], "a prompt is a text"),
        ([[]], "the prompt is empty"),
        ([], "the prompt is empty"),
    ],
)
def test_what_is_neither_one_prompt_nor_several(loaded: tuple[Mistral, Tokenizer], prompt: Any, reason: str) -> None:
    with pytest.raises(M7Error, match=reason) as caught:
        generate(*loaded, prompt, max_tokens=2)
    assert "\n" not in str(caught.value)


def test_a_stream_is_one_answer(loaded: tuple[Mistral, Tokenizer]) -> None:
    with pytest.raises(InputError, match="a prompt is a text"):
        stream_generate(*loaded, ["Hello", "Bye"])  # type: ignore[arg-type]


def test_what_belongs_to_one_answer_is_refused(loaded: tuple[Mistral, Tokenizer]) -> None:
    model, _ = loaded
    given: dict[str, Any] = {"cache": model.new_cache(), "drafter": PromptLookup(), "on_prefill": print}
    given |= {"prefill_chunk": 8, "continues": [5], "logprobs": 3}
    for name, value in given.items():
        with pytest.raises(InputError, match=f"{name} belongs to one answer"):
            generate(*loaded, ["Hello", "Bye"], **{name: value})
    assert generate(*loaded, ["Hello"], cache=None, continues=(), max_tokens=1) == [
        generate(*loaded, "Hello", max_tokens=1)
    ]


def test_a_prompt_that_cannot_be_answered_is_found_before_the_others_begin(
    loaded: tuple[Mistral, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mistral, "hidden", lambda *_: pytest.fail("a pass was begun"))
    with pytest.raises(TokenizerError, match="outside the model's vocabulary"):
        generate(*loaded, [[1, 2], [10**7]])


def test_a_failure_on_the_way_is_raised(loaded: tuple[Mistral, Tokenizer]) -> None:
    def broken(ids: Any, logits: mx.array) -> mx.array:
        raise ValueError("broken processor")

    with pytest.raises(Exception, match="broken processor"):
        generate(*loaded, ["Hello", "Bye"], logits_processors=[broken], max_tokens=2)


@pytest.mark.parametrize(("fitting", "rows", "kept"), [(1, 1, 0), (2, 1, 1), (4, 3, 1), (40, 8, 1)])
def test_answers_side_by_side_share_the_memory(
    monkeypatch: pytest.MonkeyPatch, loaded: tuple[Mistral, Tokenizer], fitting: int, rows: int, kept: int
) -> None:
    made: list[Scheduler] = []
    most = 0

    class Watched(Scheduler):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            made.append(self)

        def step(self) -> tuple[Told, bool]:
            nonlocal most
            found = super().step()
            most = max(most, self.running_and_waiting[0])
            return found

    monkeypatch.setattr(m7mlx.batch_generation, "Scheduler", Watched)
    model, tokenizer = small_model(small_config(vocab_size=32000, sliding_window=None)), loaded[1]
    prompts = [[5 + n] * (20 + n) for n in range(11)]
    alone = [generate(model, tokenizer, prompt, max_tokens=6) for prompt in prompts]
    around = budget() - positions_that_fit(model.config, model.nbytes, 32) * cache_bytes(model.config, 1, 32)
    monkeypatch.setattr(m7mlx.memory, "_limit", around + cache_bytes(model.config, fitting * 36, 32))
    assert generate(model, tokenizer, prompts, max_tokens=6) == alone
    assert most <= rows == made[0].options["rows"]
    assert made[0].options["kept"] == kept
