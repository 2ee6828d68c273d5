"""One engine for all pages: each waits its turn, has its own model, and hears of itself alone."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chat_harness import READY, ScriptedEngine, done
from m7mlx_chat.borrowed import BorrowedEngine
from m7mlx_chat.events import Counted, Done, Event, Failed, Loading, Ready, Text, Titled, Waiting
from m7mlx_chat.settings import Settings
from m7mlx_chat.web.shared import SharedEngine

from m7mlx import Request

A, B = Path("/models/a"), Path("/models/b")
SETTINGS = Settings()


class Page:
    """A page's engine, and all that it has said."""

    def __init__(self, shared: SharedEngine) -> None:
        with shared.lend() as theirs:
            self.engine = BorrowedEngine(os.dup(theirs.fileno()))
        self.engine.start()
        self.said: list[Event] = []

    def hears(self, kind: type[Event]) -> Event:
        """Wait for an event of a kind; returns it."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            for event in self.engine.drain(0.05):
                self.said.append(event)
            if isinstance(self.said[-1] if self.said else None, kind):
                return self.said[-1]
        raise AssertionError(f"it said {self.said}")

    def loaded(self, folder: Path = A, settings: Settings = SETTINGS) -> Page:
        self.engine.load(folder, settings)
        self.hears(Ready)
        return self


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


class Engine(ScriptedEngine):
    """Loads at once, but for what is said to be wrong; answers when the test says so."""

    wrong: Event | None = None

    def load(self, folder: Path, settings: Settings) -> None:
        super().load(folder, settings)
        events: list[Event] = [Loading(0, 1)]
        if self.wrong is not None:
            events.append(self.wrong)
        if not (isinstance(self.wrong, Failed) and self.wrong.fatal):
            events.append(READY)
        self.events += events


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def shared(engine: Engine) -> Iterator[SharedEngine]:
    shared = SharedEngine(engine)
    shared.start()
    yield shared
    shared.close()


def test_a_model_is_loaded_once_and_answers_in_turn(shared: SharedEngine, engine: Engine) -> None:
    first, second = Page(shared).loaded(), Page(shared).loaded()
    assert len(engine.loaded) == 1
    first.engine.submit(Request("one"))
    until(lambda: len(engine.asked) == 1)
    second.engine.submit(Request("two"))
    second.hears(Waiting)
    engine.events += [Text("I"), done("I")]
    assert first.hears(Done) == done("I")
    until(lambda: len(engine.asked) == 2)
    engine.events += [Text("II"), done("II")]
    assert second.hears(Done) == done("II")
    assert [one.prompt for one in engine.asked] == ["one", "two"]
    assert Text("II") not in first.said and Text("I") not in second.said


def test_a_text_is_counted_by_the_pages_own_model(shared: SharedEngine, engine: Engine) -> None:
    """In whatever order others count; nobody knows where another's model is loaded."""
    first, second = Page(shared), Page(shared)
    assert first.engine.count("one two") is None
    first.loaded(A)
    assert first.engine.count("one two") == 2 and first.engine.count("") == 0
    with ThreadPoolExecutor(4) as pool:
        texts = ["word " * n for n in range(12)]
        assert list(pool.map(first.engine.count, texts)) == list(range(12))
    second.loaded(B)
    assert first.engine.count("one two") is None and second.engine.count("one") == 1
    assert all(not isinstance(event, Counted) for event in first.said)


def test_each_page_has_its_own_model(shared: SharedEngine, engine: Engine) -> None:
    first, second = Page(shared).loaded(A), Page(shared).loaded(B, Settings(kv_bits=8))
    assert [folder for folder, _ in engine.loaded] == [A, B]
    first.engine.submit(Request("one"))
    until(lambda: len(engine.asked) == 1)
    assert engine.loaded[2:] == [(A, SETTINGS)]
    engine.events.append(done("I"))
    assert first.hears(Done) == done("I")
    assert Loading(0, 1) in first.said
    second.engine.submit(Request("two"))
    until(lambda: len(engine.asked) == 2)
    assert engine.loaded[3:] == [(B, Settings(kv_bits=8))]
    engine.events.append(done("II"))
    second.hears(Done)


def test_who_waits_can_stop_and_nobody_elses_answer_ends(shared: SharedEngine, engine: Engine) -> None:
    first, second = Page(shared).loaded(), Page(shared).loaded()
    first.engine.submit(Request("one"))
    until(lambda: len(engine.asked) == 1)
    second.engine.submit(Request("two"))
    second.hears(Waiting)
    second.engine.cancel()
    stopped = second.hears(Done)
    assert isinstance(stopped, Done) and (stopped.reason, stopped.text) == ("stopped", "")
    assert engine.cancelled == 0
    first.engine.cancel()
    until(lambda: engine.cancelled == 1)
    engine.events.append(done("I", "stopped"))
    assert first.hears(Done) == done("I", "stopped")
    second.engine.submit(Request("three"))
    until(lambda: len(engine.asked) == 2)
    engine.events.append(done("III"))
    assert second.hears(Done) == done("III")


@pytest.mark.parametrize("how", ["leaves", "dies"])
def test_a_page_that_goes_makes_room(shared: SharedEngine, engine: Engine, how: str) -> None:
    first, second = Page(shared).loaded(), Page(shared).loaded()
    first.engine.submit(Request("one"))
    until(lambda: len(engine.asked) == 1)
    second.engine.submit(Request("two"))
    if how == "leaves":
        first.engine.close()
    else:
        with socket.socket(fileno=os.dup(first.engine._connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)  # what the kernel does where a process is killed
    until(lambda: engine.cancelled == 1)
    engine.events.append(done("I", "stopped"))
    until(lambda: len(engine.asked) == 2)
    engine.events.append(done("II"))
    assert second.hears(Done) == done("II")


def test_settings_that_fail_leave_the_engine_as_it_was(shared: SharedEngine, engine: Engine) -> None:
    page = Page(shared).loaded()
    engine.wrong = Failed("8 bits do not go with it")
    page.loaded(A, Settings(kv_bits=8))
    assert engine.wrong in page.said
    engine.wrong = None
    page.engine.submit(Request("one"))
    until(lambda: len(engine.asked) == 1)
    assert len(engine.loaded) == 2  # not set up once more
    engine.events.append(done("I"))
    page.hears(Done)


def test_a_model_that_cannot_be_loaded_is_told_to_who_wants_it(shared: SharedEngine, engine: Engine) -> None:
    first, second = Page(shared).loaded(A), Page(shared)
    engine.wrong = Failed("no such model", fatal=True)
    second.engine.load(B, SETTINGS)
    assert second.hears(Failed) == engine.wrong
    engine.wrong = None
    first.engine.submit(Request("one"))
    until(lambda: len(engine.asked) == 1)
    assert engine.loaded[-1] == (A, SETTINGS)
    assert not any(isinstance(event, Failed) for event in first.said)
    engine.events.append(done("I"))
    first.hears(Done)


def test_who_loses_the_server_is_told(engine: Engine) -> None:
    shared = SharedEngine(engine)
    with shared.lend() as theirs:
        page = BorrowedEngine(os.dup(theirs.fileno()))
    page.submit(Request("no model yet"))
    page.start()
    until(lambda: page.drain() == [Failed("no model has been chosen")])
    page._connection.send(["leave"])
    until(lambda: page.drain() == [Failed("the server of this page has ended")])
    page.submit(Request("nobody hears"))


def test_titles_are_written_while_no_page_asks_anything_else(shared: SharedEngine, engine: Engine) -> None:
    first, second = Page(shared).loaded(), Page(shared).loaded()
    first.engine.write_title(7, Request("title?"))
    until(lambda: engine.titles == [(7, Request("title?"))])
    engine.events.append(Titled(7, "A title"))
    assert first.hears(Titled) == Titled(7, "A title")
    first.engine.submit(Request("one"))
    until(lambda: len(engine.asked) == 1)
    second.engine.write_title(8, Request("title?"))
    assert second.hears(Titled) == Titled(8, None)  # the model is at work: asked again later
    engine.events.append(done("I"))
    first.hears(Done)
    assert len(engine.titles) == 1 and Titled(7, "A title") not in second.said


def test_whatever_else_a_page_asks_breaks_off_a_title(shared: SharedEngine, engine: Engine) -> None:
    first, second = Page(shared).loaded(), Page(shared).loaded()
    first.engine.write_title(7, Request("title?"))
    until(lambda: len(engine.titles) == 1)
    second.engine.submit(Request("two"))
    until(lambda: engine.cancelled == 1)
    engine.events.append(Titled(7, None))
    assert first.hears(Titled) == Titled(7, None)
    until(lambda: len(engine.asked) == 1)
    engine.events.append(done("II"))
    assert second.hears(Done) == done("II") and Waiting() not in second.said


def test_a_title_is_not_worth_loading_another_model(shared: SharedEngine, engine: Engine) -> None:
    first = Page(shared).loaded(A)
    Page(shared).loaded(B)
    first.engine.write_title(7, Request("title?"))
    assert first.hears(Titled) == Titled(7, None)
    assert not engine.titles and len(engine.loaded) == 2
