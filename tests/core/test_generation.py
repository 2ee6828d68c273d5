"""The road from prompt to text.

Any cutting and any reuse gives the same answer, and every stop is exact.
"""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from models import small_config, small_model

from m7mlx import (
    BatchCache,
    Mistral,
    PromptLookup,
    RollingCache,
    Sampling,
    Tokenizer,
    generate,
    load,
    reuse,
    stream_generate,
)
from m7mlx.answer import StopFilter
from m7mlx.constrain import Unconstrained
from m7mlx.errors import ChatFormatError, InputError, PromptTooLongError, TokenizerError


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Mistral, Tokenizer]:
    return load(model_folder)


def test_a_conversation_is_not_prefilled_again(loaded: tuple[Mistral, Tokenizer]) -> None:
    model, tokenizer = loaded
    cache = model.new_cache()
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Tell me a long story, please"}]
    for _ in range(4):
        before = cache.offset
        pieces = list(stream_generate(model, tokenizer, messages, cache=cache, max_tokens=30))
        stats = pieces[-1].stats
        assert stats is not None
        assert stats.reused_tokens == before
        assert stats.prompt_tokens - stats.reused_tokens < 12
        ids = [i for piece in pieces for i in piece.ids]
        text = "".join(piece.text for piece in pieces)
        messages += [{"role": "assistant", "content": text, "ids": ids}, {"role": "user", "content": "Go on"}]


def test_pieces_joined_are_the_answer_and_carry_all_ids(loaded: tuple[Mistral, Tokenizer]) -> None:
    model, tokenizer = loaded
    pieces = list(stream_generate(model, tokenizer, [1, 5, 900], max_tokens=40))
    ids = [i for piece in pieces for i in piece.ids]
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)
    assert "".join(p.text for p in pieces) == generate(model, tokenizer, [1, 5, 900], max_tokens=40)
    assert all(piece.stats is None for piece in pieces[:-1])
    stats = pieces[-1].stats
    assert stats is not None
    assert (stats.prompt_tokens, stats.reused_tokens, stats.generated_tokens) == (3, 0, len(ids))
    assert pieces[-1].finish_reason == ("stop" if ids[-1] in tokenizer.eos_ids else "length")
    assert stats.time_to_first_token > 0
    assert stats.prompt_tps > 0
    assert stats.generation_tps > 0
    assert stats.peak_memory > 0
    assert stats.cache_bytes > 0


def test_three_forms_of_a_prompt(loaded: tuple[Mistral, Tokenizer]) -> None:
    model, tokenizer = loaded
    text = generate(model, tokenizer, "Hello there", max_tokens=10)
    ids = tokenizer.encode("Hello there", add_bos=True)
    assert text.lstrip(" ") == generate(model, tokenizer, ids, max_tokens=10).lstrip(" ")
    message = [{"role": "user", "content": "Hello"}]
    assert generate(model, tokenizer, message, max_tokens=10) == generate(
        model, tokenizer, tokenizer.chat.encode(message), max_tokens=10
    )


def test_an_end_token_ends_the_answer_and_is_not_shown(loaded: tuple[Mistral, Tokenizer]) -> None:
    model, tokenizer = loaded
    whole = [i for p in stream_generate(model, tokenizer, [1, 7], max_tokens=20) for i in p.ids]
    end = whole[9]
    usual, tokenizer.eos_ids = tokenizer.eos_ids, frozenset({end})
    try:
        pieces = list(stream_generate(model, tokenizer, [1, 7], max_tokens=20))
    finally:
        tokenizer.eos_ids = usual
    first = whole.index(end)
    assert [i for p in pieces for i in p.ids] == whole[: first + 1]
    assert "".join(p.text for p in pieces) == tokenizer.decode(whole[:first])
    assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize("limit", [0, 1, 2, 17])
def test_max_tokens(loaded: tuple[Mistral, Tokenizer], limit: int) -> None:
    model, tokenizer = loaded
    pieces = list(stream_generate(model, tokenizer, [1, 9], max_tokens=limit))
    assert sum(len(p.ids) for p in pieces) == limit
    assert pieces[-1].finish_reason == "length"


def test_closing_the_stream_keeps_what_was_yielded(loaded: tuple[Mistral, Tokenizer]) -> None:
    model, tokenizer = loaded
    cache = model.new_cache()
    prompt = [1, 20, 30]
    stream = stream_generate(model, tokenizer, prompt, cache=cache, max_tokens=50)
    got = [i for _ in range(5) for i in next(stream).ids]
    stream.close()
    assert cache.ids == prompt + got
    resumed = [i for p in stream_generate(model, tokenizer, prompt + got, cache=cache, max_tokens=10) for i in p.ids]
    plain = [i for p in stream_generate(model, tokenizer, prompt, max_tokens=len(got) + 10) for i in p.ids]
    assert got + resumed == plain


def test_an_aborted_prefill_leaves_a_valid_cache(loaded: tuple[Mistral, Tokenizer]) -> None:
    model, tokenizer = loaded
    cache = model.new_cache()
    seen: list[tuple[int, int]] = []

    def abort(done: int, total: int) -> None:
        seen.append((done, total))
        if done >= 40:
            raise KeyboardInterrupt

    prompt = [1, *range(800, 900)]
    with pytest.raises(KeyboardInterrupt):
        list(stream_generate(model, tokenizer, prompt, cache=cache, on_prefill=abort, prefill_chunk=20))
    assert seen == [(0, 101), (20, 101), (40, 101)]
    assert cache.ids == prompt[:40]
    again = list(stream_generate(model, tokenizer, prompt, cache=cache, max_tokens=12))
    assert again[-1].stats is not None
    assert again[-1].stats.reused_tokens == 40
    assert "".join(p.text for p in again) == generate(model, tokenizer, prompt, max_tokens=12)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_an_answer_broken_off_goes_on_as_if_it_had_not_been(
    loaded: tuple[Mistral, Tokenizer], penalty: float
) -> None:
    model, tokenizer = loaded
    sampling = Sampling(temperature=1.5, seed=11, repetition_penalty=penalty)
    messages = [{"role": "user", "content": "Tell me a long story"}]
    pieces = list(stream_generate(model, tokenizer, messages, sampling=sampling, max_tokens=40))
    ids, text = [i for piece in pieces for i in piece.ids], "".join(piece.text for piece in pieces)
    cache = model.new_cache(slack=64)
    for cut in (0, 1, 7, 25, len(ids) - 1):
        begun, shown = ids[:cut], tokenizer.detokenizer(at_start=True)
        before = "".join(map(shown.add, begun))
        rest = list(
            stream_generate(
                model, tokenizer, messages, cache=cache, sampling=sampling, max_tokens=40 - cut, continues=begun
            )
        )
        assert before + "".join(piece.text for piece in rest) == text
        assert begun + [i for piece in rest for i in piece.ids] == ids


@pytest.mark.parametrize("as_ids", [False, True])
def test_a_message_that_the_model_continues(loaded: tuple[Mistral, Tokenizer], as_ids: bool) -> None:
    """The answer is what comes after the message.

    Its first space is included, and so is a character that was cut in the middle.
    """
    model, tokenizer = loaded
    question = [{"role": "user", "content": "Tell me a long story"}]
    pieces = list(stream_generate(model, tokenizer, question, max_tokens=40))
    ids = [i for piece in pieces for i in piece.ids]
    for cut in (1, 7, 25):
        last: dict[str, Any] = {"role": "assistant", "content": tokenizer.decode(ids[:cut]), "prefix": True}
        if as_ids:
            last["ids"] = ids[:cut]
        begun = ids[:cut] if as_ids else tokenizer.encode(last["content"].rstrip(" "))
        rest = list(stream_generate(model, tokenizer, [*question, last], max_tokens=40))
        found = [i for piece in rest for i in piece.ids]
        whole = tokenizer.chat.encode(question) + begun
        assert found == [i for piece in stream_generate(model, tokenizer, whole, max_tokens=40) for i in piece.ids]
        shown = tokenizer.detokenizer()
        before = "".join(map(shown.add, begun))
        after = "".join(map(shown.add, found)) + shown.finish()
        assert "".join(piece.text for piece in rest) == after
        assert before + after == tokenizer.decode([*begun, *found])


def test_a_seed_repeats_the_answer(loaded: tuple[Mistral, Tokenizer]) -> None:
    model, tokenizer = loaded
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=11)
    first = generate(model, tokenizer, "a", sampling=sampling, max_tokens=20)
    assert generate(model, tokenizer, "a", sampling=sampling, max_tokens=20) == first
    assert generate(model, tokenizer, "a", sampling=Sampling(temperature=1.0, seed=12), max_tokens=20) != first


# --- stop strings ---------------------------------------------------------------------------------


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=8),
)
@settings(max_examples=examples(80), deadline=None)
def test_stop_texts_across_any_borders(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    stream = StopFilter(stops)
    shown = ""
    for a, b in pairwise(borders):
        shown += stream.add(text[a:b])
        if stream.found:
            break
    shown += stream.finish("")
    hits = [text.find(s) for s in stops if s in text]
    if not hits:
        assert shown == text
        assert not stream.found
    else:
        assert stream.found
        assert text.startswith(shown)
        assert not any(s in shown for s in stops)
        assert any(text[len(shown) :].startswith(s) for s in stops)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), max_size=4), st.integers(1, 30))
@settings(max_examples=examples(80), deadline=None)
def test_stop_texts_cut_alike_whatever_the_pieces(text: str, stops: list[str], length: int) -> None:
    def shown(size: int) -> str:
        stream, parts = StopFilter(stops), []
        for start in range(0, len(text), size):
            parts.append(stream.add(text[start : start + size]))
            if stream.found:
                break
        return "".join([*parts, stream.finish("")])

    assert shown(length) == shown(1)


def test_stop_texts_in_generation(loaded: tuple[Mistral, Tokenizer]) -> None:
    model, tokenizer = loaded
    whole = generate(model, tokenizer, [1, 44], max_tokens=40)
    for start in range(3, 40):  # falls where it falls, inside tokens and across their borders
        stop = whole[start : start + 5]
        pieces = list(stream_generate(model, tokenizer, [1, 44], max_tokens=40, stop=[stop, "\x00never"]))
        assert "".join(p.text for p in pieces) == whole[: whole.index(stop)]
        assert pieces[-1].finish_reason == "stop"


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ([], {}, InputError),
        ([32768], {}, TokenizerError),
        ([-1], {}, TokenizerError),
        ([1.5], {}, InputError),
        ([True], {}, InputError),
        ([{"role": "user"}], {}, ChatFormatError),
        ([1], {"max_tokens": -1}, InputError),
        ([1], {"prefill_chunk": 0}, InputError),
        ([1], {"stop": [""]}, InputError),
        ([1], {"stop": "text"}, InputError),
    ],
)
def test_bad_requests_are_refused_at_once(
    loaded: tuple[Mistral, Tokenizer], prompt: list[int], options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        stream_generate(*loaded, prompt, **options)


def test_full_attention_ends_at_its_context(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    config = small_config(vocab_size=32768, sliding_window=None, max_position_embeddings=20, n_layers=1)
    model, tokenizer = small_model(config), mistral_tokenizers["v3"]
    tokenizer.eos_ids, usual = frozenset(), tokenizer.eos_ids
    try:
        pieces = list(stream_generate(model, tokenizer, [1] * 12, max_tokens=None))
    finally:
        tokenizer.eos_ids = usual
    assert sum(len(p.ids) for p in pieces) == 8
    with pytest.raises(PromptTooLongError, match=r"21 tokens.*holds 20"):
        stream_generate(model, tokenizer, [1] * 21)


@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [
        ([1, 2], {"max_tokens": 2.5}, "max_tokens must be a whole number"),
        ([1, 2], {"max_tokens": True}, "max_tokens must be a whole number"),
        ([1, 2], {"max_tokens": "5"}, "max_tokens must be a whole number"),
        ([1, 2], {"prefill_chunk": 1.5}, "prefill_chunk must be a whole number"),
        (b"hi", {}, "a prompt is a text"),
        (None, {}, "a prompt is a text"),
        (3, {}, "a prompt is a text"),
        ([1, "2"], {}, "a prompt is a text"),
        ([1.0, 2.0], {}, "a prompt is a text"),
        ([True], {}, "a prompt is a text"),
        (np.array([[1, 2], [3, 4]]), {}, "a prompt is a text"),
        (mx.array([0.5]), {}, "a prompt is a text"),
        ({"role": "user", "content": "x"}, {}, "a message stands in a list"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "must be of type text"),
        ([1], {"stop": [1]}, "stop must be a list of texts"),
        ([1], {"stop": "x"}, "stop must be a list of texts"),
        ([1], {"stop": 5}, "stop must be a list of texts"),
        ([1], {"stop": None}, "stop must be a list of texts"),
        ([1], {"sampling": {"temperature": 1}}, "sampling must be a Sampling, not dict"),
        ([1], {"cache": "chat.cache"}, "cache must be a RollingCache, not str"),
        ([1], {"drafter": PromptLookup}, "not the class PromptLookup"),
        ([1], {"drafter": "lookup"}, "drafter must be"),
        ([1], {"continues": b"x"}, "outside the model's vocabulary|a prompt is a text"),
    ],
)
def test_arguments_of_another_kind_are_refused_in_a_line(
    loaded: tuple[Mistral, Tokenizer], prompt: Any, options: Any, reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        generate(*loaded, prompt, **{"max_tokens": 2} | options)
    assert "\n" not in str(caught.value)


def test_what_users_bring_is_taken(loaded: tuple[Mistral, Tokenizer]) -> None:
    ids = [1, 5, 9, 200]
    expected = generate(*loaded, ids, max_tokens=5)
    for brought in (mx.array(ids), mx.array([ids]), np.array(ids), np.array([ids]), tuple(ids), list(np.array(ids))):
        # Arrays are no Sequence to a type checker.
        assert generate(*loaded, brought, max_tokens=5) == expected  # type: ignore[arg-type]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]}]
    whole = [{"role": "user", "content": "Hello there"}]
    assert generate(*loaded, parts, max_tokens=5) == generate(*loaded, whole, max_tokens=5)


@pytest.mark.parametrize("ids", [[[10**7]], [[-1]], [[97]], [1, 2], [[0.5]]])
def test_a_model_reads_no_memory_that_is_not_its_own(ids: Any) -> None:
    with pytest.raises(InputError):
        small_model(small_config())(mx.array(ids))


def test_a_cache_is_one_models(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, ids = mistral_tokenizers["v1"], [1, 5, 9, 200, 31]
    model = small_model(small_config(vocab_size=32000))
    others = (
        small_model(small_config(vocab_size=32000), seed=1),
        small_model(small_config(vocab_size=32000, sliding_window=None)),
        small_model(small_config(vocab_size=32000, n_layers=2)),
    )
    expected = generate(model, tokenizer, ids, max_tokens=9)
    for other in others:
        for cache in (other.new_cache(), RollingCache(other.config)):
            generate(other, tokenizer, ids, max_tokens=3, cache=cache)
            with pytest.raises(InputError, match="another model's"):
                generate(model, tokenizer, ids, max_tokens=9, cache=cache)
            with pytest.raises(InputError, match="another model's"):
                model(mx.array([[1]]), cache)
            assert reuse(cache, [*ids, 7], [model.new_cache().snapshot()]) == len(ids)
    own = RollingCache(model.config)
    assert generate(model, tokenizer, ids, max_tokens=9, cache=own) == expected
    with pytest.raises(InputError, match="share model"):
        BatchCache([own, others[0].new_cache()])


@pytest.mark.parametrize("drafter", [None, PromptLookup()])
def test_two_generators_over_one_cache_do_not_mix(loaded: tuple[Mistral, Tokenizer], drafter: Any) -> None:
    model, tokenizer = loaded
    ids = [1, 5, 9, 200]
    expected = generate(model, tokenizer, ids[::-1], max_tokens=9)
    cache = model.new_cache(slack=32)
    first = stream_generate(model, tokenizer, ids, max_tokens=9, cache=cache, drafter=drafter)
    next(first)
    second = stream_generate(model, tokenizer, ids[::-1], max_tokens=9, cache=cache, drafter=drafter)
    begun = next(second).text
    with pytest.raises(InputError, match="a cache of its own"):
        list(first)
    assert begun + "".join(piece.text for piece in second) == expected


def test_a_failed_answer_keeps_nothing_in_memory(loaded: tuple[Mistral, Tokenizer]) -> None:
    enforced = Unconstrained()
    enforced.is_whole = True
    model, tokenizer = loaded
    text = generate(model, tokenizer, [1, 5, 900], max_tokens=8)
    cache = model.new_cache()
    kept = weakref.ref(cache)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(InputError, match="stop text"):
            generate(
                model,
                tokenizer,
                [1, 5, 900],
                cache=cache,
                max_tokens=8,
                stop=[text.strip()[0]],
                constraint=enforced,
            )
        del cache
        assert kept() is None
    finally:
        gc.enable()
