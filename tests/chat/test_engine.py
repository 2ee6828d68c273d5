"""The engine thread with a real, small model: one thread, one cache, every command answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from m7mlx_chat import loaded
from m7mlx_chat.branches import Branches
from m7mlx_chat.engine import Engine
from m7mlx_chat.events import Done, Event, Failed, Loading, Prefill, Ready, Text, Titled
from m7mlx_chat.settings import Settings
from models import random_weights, small_config, write_folder

from m7mlx import Request, Sampling, load
from m7mlx.decode import prefill
from m7mlx.loading import build

LONG = 100_000


def wait(engine: Engine, until: Callable[[list[Event]], bool], seen: list[Event] | None = None) -> list[Event]:
    events = seen if seen is not None else []
    deadline = time.monotonic() + 60
    while not until(events):
        assert time.monotonic() < deadline, events[-3:]
        events += engine.drain()
        time.sleep(0.005)
    return events


def ended(events: list[Event]) -> bool:
    return any(isinstance(e, Done | Failed) for e in events)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


class Asking(Engine):
    """An engine that answers with at most so many tokens."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self.max_tokens = max_tokens

    def ask(self, *messages: dict[str, Any], **options: Any) -> None:
        self.submit(Request(messages, max_tokens=self.max_tokens, **options))


@pytest.fixture
def start(model_folder: Path) -> Iterator[Callable[..., Asking]]:
    engines: list[Engine] = []

    def make(max_tokens: int = 12, folder: Path = model_folder, **changes: Any) -> Asking:
        engine = Asking(max_tokens)
        engines.append(engine)
        engine.start()
        engine.load(folder, Settings(**changes))
        return engine

    yield make
    for engine in engines:
        engine.close()
        assert not engine._thread.is_alive()


def test_loading_and_two_turns_over_one_cache(start: Callable[..., Asking]) -> None:
    engine = start()
    events = wait(engine, lambda es: any(isinstance(e, Ready) for e in es))
    assert isinstance(events[0], Loading)
    ready = next(e for e in events if isinstance(e, Ready))
    assert (ready.window, ready.context) == (16, 4096)
    assert ready.nbytes > 0
    engine.ask(user("Hello"))
    first = wait(engine, ended)
    done = first[-1]
    assert isinstance(done, Done)
    assert "".join(e.text for e in first if isinstance(e, Text)) == done.text
    assert any(isinstance(e, Prefill) for e in first)
    answer = {"role": "assistant", "content": done.text, "ids": done.ids}
    engine.ask(user("Hello"), answer, user("Again"))
    second = wait(engine, ended)[-1]
    assert isinstance(second, Done)
    assert second.statistics.reused_tokens == done.seen.tokens
    assert second.seen.cache_bytes == done.seen.cache_bytes


def test_a_title_is_written_on_the_side_and_whatever_comes_breaks_it_off(start: Callable[..., Asking]) -> None:
    engine = start()
    engine.ask(user("Hello"))
    done = wait(engine, ended)[-1]
    assert isinstance(done, Done)
    engine.write_title(7, Request([user("Which title?")], max_tokens=6))
    (titled,) = wait(engine, bool)
    assert isinstance(titled, Titled) and (titled.conversation, titled.text is None) == (7, False)
    engine.write_title(8, Request([user("Which title?")], max_tokens=LONG))
    answer = {"role": "assistant", "content": done.text, "ids": done.ids}
    engine.ask(user("Hello"), answer, user("Again"))
    events = wait(engine, ended)
    assert events[0] == Titled(8, None)
    second = events[-1]
    assert isinstance(second, Done)
    assert second.statistics.reused_tokens == done.seen.tokens  # the conversation's cache is as it was
    engine.write_title(9, Request([user("word " * 20_000)], max_tokens=6))  # no room: there is no title then
    assert wait(engine, bool) == [Titled(9, "")]
    engine.write_title(10, Request([user("Which title?")], max_tokens=LONG))
    engine.cancel()
    assert wait(engine, bool) == [Titled(10, None)]


def test_cancel_keeps_the_text_and_the_cache(start: Callable[..., Asking]) -> None:
    engine = start(LONG)
    engine.ask(user("Tell me everything"))
    events = wait(engine, lambda es: sum(isinstance(e, Text) for e in es) >= 3)
    engine.cancel()
    done = wait(engine, ended, events)[-1]
    assert isinstance(done, Done)
    assert done.reason == "stopped"
    assert done.ids
    assert done.text == "".join(e.text for e in events if isinstance(e, Text))
    answer = {"role": "assistant", "content": done.text, "ids": done.ids}
    engine.ask(user("Tell me everything"), answer, user("Go on"))
    events = wait(engine, lambda es: any(isinstance(e, Text) for e in es))
    engine.cancel()
    again = wait(engine, ended, events)[-1]
    assert isinstance(again, Done)
    assert again.statistics.reused_tokens == done.seen.tokens or again.seen.tokens > done.seen.tokens


def test_cancel_during_the_prefill(start: Callable[..., Asking]) -> None:
    engine = start()
    engine.ask(user("word " * 20_000))
    events = wait(engine, lambda es: any(isinstance(e, Prefill) and e.done for e in es))
    engine.cancel()
    done = wait(engine, ended, events)[-1]
    assert isinstance(done, Done)
    assert (done.reason, done.text, done.ids) == ("stopped", "", [])
    assert 0 < done.seen.tokens < 20_000


def test_a_cancel_that_comes_too_late_does_not_stop_the_next_answer(start: Callable[..., Asking]) -> None:
    engine = start()
    engine.ask(user("a"))
    wait(engine, ended)
    engine.cancel()
    engine.ask(user("b"))
    done = wait(engine, ended)[-1]
    assert isinstance(done, Done)
    assert done.reason in ("stop", "length")


def test_a_cancel_that_comes_at_once_is_not_forgotten(start: Callable[..., Asking]) -> None:
    engine = start()
    engine.ask(user("a"))  # the model is still being loaded
    engine.cancel()
    done = wait(engine, ended)[-1]
    assert isinstance(done, Done)
    assert (done.reason, done.text, done.ids) == ("stopped", "", [])


def test_a_failing_request_does_not_end_the_thread(
    start: Callable[..., Asking],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = start()
    engine.ask({"role": "robot", "content": "x"})
    failed = wait(engine, ended)[-1]
    assert isinstance(failed, Failed)
    assert "role" in failed.message
    assert not failed.fatal
    with monkeypatch.context() as patch:
        patch.setattr(loaded, "stream_answer", lambda *a, **k: 1 / 0)
        engine.ask(user("x"))
        assert wait(engine, ended)[-1] == Failed("ZeroDivisionError: division by zero")
    engine.ask(user("x"))
    assert isinstance(wait(engine, ended)[-1], Done)


def test_a_model_that_cannot_be_loaded_is_said(start: Callable[..., Asking], tmp_path: Path) -> None:
    failed = wait(start(folder=tmp_path), ended)[-1]
    assert isinstance(failed, Failed)
    assert failed.fatal
    assert "no config.json" in failed.message


def test_close_in_the_middle_of_an_answer(start: Callable[..., Asking]) -> None:
    engine = start(LONG)
    engine.ask(user("x"))
    wait(engine, lambda es: any(isinstance(e, Text) for e in es))
    engine.close()
    assert not engine._thread.is_alive()
    assert threading.active_count() < 50


def test_drain_joins_texts_and_keeps_the_order() -> None:
    engine = Engine()
    for event in (Text("a"), Text("b"), Prefill(1, 2), Text("c"), Text("d")):
        engine._events.put(event)
    assert engine.drain() == [Text("ab"), Prefill(1, 2), Text("cd")]
    assert engine.drain() == []


@pytest.mark.parametrize("speculate", ["lookup", "{folder}"])
def test_drafts_change_nothing_but_the_time(start: Callable[..., Asking], model_folder: Path, speculate: str) -> None:
    """Two turns with a drafter, and the same two without."""
    answers = []
    for how in ("off", speculate.format(folder=model_folder)):
        engine = start(60, speculate=how)
        history = [user("one two three one two three one two")]
        for _ in range(2):
            engine.ask(*history)
            done = next(e for e in wait(engine, ended) if isinstance(e, Done))
            answers.append(done.text)
            history += [{"role": "assistant", "content": done.text, "ids": done.ids}, user("and again")]
        assert done.statistics.reused_tokens > 0
    assert answers[:2] == answers[2:]


def test_a_draft_model_that_does_not_fit_is_said_at_once(start: Callable[..., Asking], tmp_path: Path) -> None:
    other = write_folder(tmp_path / "v1", small_config(vocab_size=32000, n_layers=1))
    engine = start(speculate=str(other))
    failed = wait(engine, ended)[-1]
    assert isinstance(failed, Failed)
    assert failed.fatal
    assert "another tokenizer" in failed.message


def test_a_change_that_cannot_be_leaves_the_engine_as_it_was(
    start: Callable[..., Asking],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    engine = start()
    ready = wait(engine, lambda es: any(isinstance(e, Ready) for e in es))[-1]
    engine.load(model_folder, Settings(kv_bits=8))  # groups of 64 do not divide a head_dim of 16
    failed, again = wait(engine, lambda es: any(isinstance(e, Ready) for e in es))[-2:]
    assert isinstance(failed, Failed)
    assert not failed.fatal
    assert again == ready
    engine.load(tmp_path, Settings())  # no model at all
    failed = wait(engine, ended)[-1]
    assert isinstance(failed, Failed)
    assert not failed.fatal
    engine.ask(user("x"))
    assert isinstance(wait(engine, ended)[-1], Done)


def test_another_model_takes_the_place_of_the_first(start: Callable[..., Asking], tmp_path: Path) -> None:
    engine = start()
    first = wait(engine, lambda es: any(isinstance(e, Ready) for e in es))[-1]
    other = write_folder(tmp_path / "other", small_config(vocab_size=32000, sliding_window=None, n_layers=1))
    engine.ask(user("x"))
    engine.load(other, Settings())
    events = wait(engine, lambda es: any(isinstance(e, Ready) for e in es))
    assert isinstance(first, Ready)
    assert isinstance(events[-1], Ready)
    assert (first.window, events[-1].window, events[-1].capacity) == (16, None, None)
    assert first.vocabulary != events[-1].vocabulary
    done = next(e for e in events if isinstance(e, Done))
    assert done.reason == "stopped"  # what was under way ends
    engine.ask(user("x"))
    assert isinstance(wait(engine, ended)[-1], Done)


@pytest.mark.parametrize("stops", [1, 5])
def test_an_answer_that_was_stopped_goes_on_as_if_it_had_not_been(start: Callable[..., Asking], stops: int) -> None:
    engine = start(80)
    sampling = Sampling(temperature=1.0, seed=3)
    engine.ask(user("Tell me"), sampling=sampling)
    whole = wait(engine, ended)[-1]
    assert isinstance(whole, Done)
    ids = whole.ids
    for begun in range(0, len(ids), max(1, len(ids) // stops)):
        engine.max_tokens = min(len(ids) // stops, len(ids) - begun)
        text = engine_decode(engine, ids[:begun])
        engine.ask(user("Tell me"), sampling=sampling, continues=ids[:begun])
        rest = wait(engine, ended)[-1]
        assert isinstance(rest, Done)
        assert whole.text.startswith(text + rest.text)
        assert ids[begun : begun + len(rest.ids)] == rest.ids


def engine_decode(engine: Engine, ids: list[int]) -> str:
    assert engine._loaded is not None
    shown = engine._loaded.tokenizer.detokenizer(at_start=True)
    return "".join(map(shown.add, ids))


def test_branches_that_were_left_are_not_read_again(start: Callable[..., Asking]) -> None:
    """Beyond the window, where the ring has overwritten what an earlier question needs."""
    engine = start(40)
    history = [user("word " * 60)]
    engine.ask(*history)
    first = wait(engine, ended)[-1]
    assert isinstance(first, Done)
    engine.ask(*history)  # another answer to the same question
    second = wait(engine, ended)[-1]
    assert isinstance(second, Done)
    assert second.statistics.reused_tokens == second.statistics.prompt_tokens - 1
    assert second.text == first.text
    engine.ask(user("something else"))
    wait(engine, ended)
    engine.ask(*history, {"role": "assistant", "content": first.text, "ids": first.ids}, user("and then?"))
    back = wait(engine, ended)[-1]
    assert isinstance(back, Done)
    assert back.statistics.reused_tokens >= first.seen.tokens - 1
    assert back.seen.kept_bytes > 0


def test_branches_keep_to_their_budget(model_folder: Path) -> None:
    model, _ = load(model_folder)
    cache = model.new_cache()
    model(mx.array([[1, 5, 9]]), cache)
    cache.ids = [1, 5, 9]
    branches = Branches(cache.nbytes * 2)
    for i in range(5):
        cache.ids = [1, 5, i]
        branches.keep(cache)
        branches.keep(cache)  # the same once more is no other
    assert [s.ids[-1] for s in branches.snapshots] == [4, 3]
    assert branches.nbytes <= cache.nbytes * 2
    too_small = Branches(cache.nbytes - 1)
    too_small.keep(cache)
    assert too_small.snapshots == []


def test_the_gauge_shows_the_bound_of_a_stream(start: Callable[..., Asking], tmp_path: Path) -> None:
    full = write_folder(tmp_path / "full", small_config(vocab_size=32000, sliding_window=None, n_layers=1))
    engine = start(folder=full, max_kv_size=40)
    ready = next(e for e in wait(engine, lambda es: any(isinstance(e, Ready) for e in es)) if isinstance(e, Ready))
    assert ready.window == 40
    engine.ask(user("word " * 200))
    done = wait(engine, ended)[-1]
    assert isinstance(done, Done)
    assert done.seen.tokens > 200


@pytest.mark.parametrize("bits", [None, 4, 8, 16, 32])
def test_the_bytes_of_a_token_are_those_that_its_keys_and_values_take(bits: int | None, tmp_path: Path) -> None:
    config = small_config(sliding_window=300, n_layers=1, head_dim=64)
    model = build(config, {name: mx.array(a).astype(mx.float16) for name, a in random_weights(config).items()})
    cache = model.new_cache(**Settings(kv_bits=bits, kv_group_size=32).cache)
    prefill(model, [i % 97 for i in range(400)], cache)
    ready = loaded._described(model, cache, tmp_path)
    assert ready.capacity is not None
    assert ready.token_bytes * ready.capacity == cache.nbytes
