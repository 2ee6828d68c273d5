"""The engine thread with a real, small model: one thread, one cache, every command answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config, write_folder
from m7mlx_chat import engine as module
from m7mlx_chat.engine import Done, Engine, Event, Failed, Loading, Prefill, Ready, Text
from m7mlx_chat.settings import Settings

from m7mlx.sampling import Sampling

LONG = 100_000


def settings(max_tokens: int = 12, **changes: Any) -> Settings:
    return Settings(model="small", system="", sampling=Sampling(), max_tokens=max_tokens, **changes)


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


@pytest.fixture
def start(model_folder: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(max_tokens: int = 12, folder: Path = model_folder, **changes: Any) -> Engine:
        engines.append(Engine(folder, settings(max_tokens, **changes)))
        engines[-1].start()
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
        assert not engine._thread.is_alive()


def test_loading_and_two_turns_over_one_cache(start: Callable[..., Engine]) -> None:
    engine = start()
    events = wait(engine, lambda es: any(isinstance(e, Ready) for e in es))
    assert isinstance(events[0], Loading)
    ready = next(e for e in events if isinstance(e, Ready))
    assert (ready.window, ready.context) == (16, 4096)
    assert ready.nbytes > 0
    engine.submit([user("Hello")])
    first = wait(engine, ended)
    done = first[-1]
    assert isinstance(done, Done)
    assert "".join(e.text for e in first if isinstance(e, Text)) == done.text
    assert any(isinstance(e, Prefill) for e in first)
    answer = {"role": "assistant", "content": done.text, "ids": done.ids}
    engine.submit([user("Hello"), answer, user("Again")])
    second = wait(engine, ended)[-1]
    assert isinstance(second, Done)
    assert second.reused_tokens == done.tokens_seen
    assert second.cache_bytes == done.cache_bytes


def test_cancel_keeps_the_text_and_the_cache(start: Callable[..., Engine]) -> None:
    engine = start(LONG)
    engine.submit([user("Tell me everything")])
    events = wait(engine, lambda es: sum(isinstance(e, Text) for e in es) >= 3)
    engine.cancel()
    done = wait(engine, ended, events)[-1]
    assert isinstance(done, Done)
    assert done.reason == "stopped"
    assert done.ids
    assert done.text == "".join(e.text for e in events if isinstance(e, Text))
    answer = {"role": "assistant", "content": done.text, "ids": done.ids}
    engine.submit([user("Tell me everything"), answer, user("Go on")])
    events = wait(engine, lambda es: any(isinstance(e, Text) for e in es))
    engine.cancel()
    again = wait(engine, ended, events)[-1]
    assert isinstance(again, Done)
    assert again.reused_tokens == done.tokens_seen or again.tokens_seen > done.tokens_seen


def test_cancel_during_the_prefill(start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    wait(engine, lambda es: any(isinstance(e, Ready) for e in es))
    on_prefill = engine._on_prefill
    monkeypatch.setattr(
        engine, "_on_prefill", lambda done, total: (done > 0 and engine.cancel(), on_prefill(done, total))
    )
    engine.submit([user("word " * 2000)])
    done = wait(engine, ended)[-1]
    assert isinstance(done, Done)
    assert (done.reason, done.text, done.ids) == ("stopped", "", [])
    assert 0 < done.tokens_seen < 2000


def test_a_cancel_that_comes_too_late_does_not_stop_the_next_answer(start: Callable[..., Engine]) -> None:
    engine = start()
    engine.submit([user("a")])
    wait(engine, ended)
    engine.cancel()
    engine.submit([user("b")])
    done = wait(engine, ended)[-1]
    assert isinstance(done, Done)
    assert done.reason in ("stop", "length")


def test_a_cancel_that_comes_at_once_is_not_forgotten(start: Callable[..., Engine]) -> None:
    engine = start()
    engine.submit([user("a")])  # the model is still being loaded
    engine.cancel()
    done = wait(engine, ended)[-1]
    assert isinstance(done, Done)
    assert (done.reason, done.text, done.ids) == ("stopped", "", [])


def test_a_failing_request_does_not_end_the_thread(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    engine.submit([{"role": "robot", "content": "x"}])
    failed = wait(engine, ended)[-1]
    assert isinstance(failed, Failed)
    assert "role" in failed.message
    assert not failed.fatal
    with monkeypatch.context() as patch:
        patch.setattr(module, "stream_generate", lambda *a, **k: 1 / 0)
        engine.submit([user("x")])
        assert wait(engine, ended)[-1] == Failed("ZeroDivisionError: division by zero")
    engine.submit([user("x")])
    assert isinstance(wait(engine, ended)[-1], Done)


def test_a_model_that_cannot_be_loaded_is_said(start: Callable[..., Engine], tmp_path: Path) -> None:
    failed = wait(start(folder=tmp_path), ended)[-1]
    assert isinstance(failed, Failed)
    assert failed.fatal
    assert "no config.json" in failed.message


def test_close_in_the_middle_of_an_answer(start: Callable[..., Engine]) -> None:
    engine = start(LONG)
    engine.submit([user("x")])
    wait(engine, lambda es: any(isinstance(e, Text) for e in es))
    engine.close()
    assert not engine._thread.is_alive()
    assert threading.active_count() < 50


def test_drain_joins_texts_and_keeps_the_order(tmp_path: Path) -> None:
    engine = Engine(tmp_path, settings())
    for event in (Text("a"), Text("b"), Prefill(1, 2), Text("c"), Text("d")):
        engine._emit(event)
    assert engine.drain() == [Text("ab"), Prefill(1, 2), Text("cd")]
    assert engine.drain() == []


@pytest.mark.parametrize("speculate", ["lookup", "{folder}"])
def test_drafts_change_nothing_but_the_time(start: Callable[..., Engine], model_folder: Path, speculate: str) -> None:
    """Two turns with a drafter, and the same two without."""
    answers = []
    for how in ("off", speculate.format(folder=model_folder)):
        engine = start(60, speculate=how, cache={"slack": 64})
        history = [user("one two three one two three one two")]
        for _ in range(2):
            engine.submit(history)
            done = next(e for e in wait(engine, ended) if isinstance(e, Done))
            answers.append(done.text)
            history += [{"role": "assistant", "content": done.text, "ids": done.ids}, user("and again")]
        assert done.reused_tokens > 0
    assert answers[:2] == answers[2:]


def test_a_draft_model_that_does_not_fit_is_said_at_once(start: Callable[..., Engine], tmp_path: Path) -> None:
    other = write_folder(tmp_path / "v1", small_config(vocab_size=32000, n_layers=1))
    engine = start(speculate=str(other))
    failed = wait(engine, ended)[-1]
    assert isinstance(failed, Failed)
    assert failed.fatal
    assert "another tokenizer" in failed.message


def test_the_gauge_shows_the_bound_of_a_stream(start: Callable[..., Engine], tmp_path: Path) -> None:
    full = write_folder(tmp_path / "full", small_config(vocab_size=32000, sliding_window=None, n_layers=1))
    engine = start(folder=full, cache={"max_kv_size": 40})
    ready = next(e for e in wait(engine, lambda es: any(isinstance(e, Ready) for e in es)) if isinstance(e, Ready))
    assert ready.window == 40
    engine.submit([user("word " * 200)])
    done = wait(engine, ended)[-1]
    assert isinstance(done, Done)
    assert done.tokens_seen > 200
