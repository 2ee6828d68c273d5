"""Whatever raises, wherever Textual calls it from, is told and logged, and the app lives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from m7mlx_chat import steady
from m7mlx_chat.steady import SteadyApp
from textual import on, work
from textual.actions import SkipAction
from textual.app import ComposeResult
from textual.events import Click, Resize
from textual.message import Message
from textual.pilot import Pilot
from textual.reactive import reactive
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Input, Static
from unforeseen import nothing_unforeseen

from m7mlx.errors import DiskError

FULL = "the disk is full"
LOG = Path("chat.log")


class Trouble(Widget, can_focus=True):
    """Raises where it is told to."""

    BINDINGS: ClassVar = [("b", "break")]
    DEFAULT_CSS = "Trouble { height: 5; }"

    class Happened(Message):
        pass

    watched = reactive(0)
    awaited = reactive(0)
    checked = reactive(0)
    computed = reactive(0)

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__()
        self.where, self.error = where, error
        self.lives = 0

    def fail(self, where: str) -> None:
        if where == self.where:
            raise self.error

    def action_break(self) -> None:
        self.fail("action")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "break":
            self.fail("check_action")
        return True

    def key_k(self) -> None:
        self.fail("key")

    def on_click(self, event: Click) -> None:
        self.fail("click")

    def on_resize(self, event: Resize) -> None:
        self.fail("resize")

    @on(Happened)
    async def _happened(self) -> None:
        await asyncio.sleep(0)
        self.fail("message")

    def watch_watched(self) -> None:
        if self.watched:
            self.fail("watcher")

    async def watch_awaited(self) -> None:
        if self.awaited:
            self.fail("awaited watcher")

    def validate_checked(self, value: int) -> int:
        if value:
            self.fail("validator")
        return value

    def compute_computed(self) -> int:
        if self.checked:
            self.fail("compute")
        return 0

    def on_idle(self) -> None:
        if self.lives:
            self.fail("idle")

    def on_unmount(self) -> None:
        self.fail("unmount")

    @work
    async def worker(self) -> None:
        self.fail("worker")

    @work(thread=True)
    def thread(self) -> None:
        self.fail("thread")

    @work(thread=True)
    def from_thread(self) -> None:
        self.app.call_from_thread(self.fail, "from thread")

    def render(self) -> str:
        return "trouble"


class Raising(ModalScreen[str]):
    """A screen that raises while it is made, or gives something back to who raises then."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__()
        self.trouble = trouble

    def compose(self) -> ComposeResult:
        self.trouble.fail("screen compose")
        yield Static("a screen")
        yield Part(self.trouble)

    def on_mount(self) -> None:
        self.trouble.fail("screen mount")


class Part(Widget):
    def __init__(self, trouble: Trouble) -> None:
        super().__init__()
        self.trouble = trouble

    def compose(self) -> ComposeResult:
        self.trouble.fail("widget compose")
        yield Static("a part")

    def on_mount(self) -> None:
        self.trouble.fail("widget mount")


class App(SteadyApp):
    BINDINGS: ClassVar = [("f5", "live"), ("a", "break"), ("b", "break")]

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(LOG)
        self.trouble = trouble
        self.lived = 0

    def compose(self) -> ComposeResult:
        yield self.trouble
        yield Input()

    def action_live(self) -> None:
        self.lived += 1

    def action_break(self) -> None:
        self.trouble.fail("app action")


@asynccontextmanager
async def running(where: str, error: Exception) -> AsyncIterator[tuple[App, Trouble, Pilot[None]]]:
    app = App(Trouble(where, error))
    async with app.run_test(notifications=True) as pilot:
        app.trouble.focus()
        await pilot.pause()
        yield app, app.trouble, pilot


Do = Callable[[App, Trouble, Pilot[None]], Any]


def both(then: Callable[[Trouble], Any]) -> Do:
    """Do something as the widget would, and look at it once more with the next message."""

    async def do(app: App, trouble: Trouble, pilot: Pilot[None]) -> None:
        trouble.call_later(then, trouble)

    return do


def set_value(name: str) -> Do:
    return both(lambda trouble: setattr(trouble, name, 1))


KINDS: dict[str, Do] = {
    "action": lambda app, trouble, pilot: pilot.press("b"),
    "app action": lambda app, trouble, pilot: pilot.press("a"),
    "check_action": lambda app, trouble, pilot: pilot.press("b"),
    "key": lambda app, trouble, pilot: pilot.press("k"),
    "click": lambda app, trouble, pilot: pilot.click(Trouble),
    "resize": lambda app, trouble, pilot: pilot.resize_terminal(70, 20),
    "message": both(lambda trouble: trouble.post_message(Trouble.Happened())),
    "watcher": set_value("watched"),
    "awaited watcher": set_value("awaited"),
    "validator": set_value("checked"),
    "compute": set_value("checked"),
    "idle": set_value("lives"),
    "unmount": both(lambda trouble: trouble.remove()),
    "worker": both(lambda trouble: trouble.worker()),
    "thread": both(lambda trouble: trouble.thread()),
    "from thread": both(lambda trouble: trouble.from_thread()),
    "timer": both(lambda trouble: trouble.set_timer(0.01, lambda: trouble.fail("timer"))),
    "interval": both(lambda trouble: trouble.set_interval(0.02, lambda: trouble.fail("interval"))),
    "later": both(lambda trouble: trouble.fail("later")),
    "next": both(lambda trouble: trouble.call_next(trouble.fail, "next")),
    "after refresh": both(lambda trouble: trouble.call_after_refresh(trouble.fail, "after refresh")),
    "animation": both(
        lambda trouble: trouble.styles.animate(
            "opacity", 0.5, duration=0.02, on_complete=lambda: trouble.fail("animation")
        )
    ),
    "screen compose": both(lambda trouble: trouble.app.push_screen(Raising(trouble))),
    "screen mount": both(lambda trouble: trouble.app.push_screen(Raising(trouble))),
    "widget compose": both(lambda trouble: trouble.app.push_screen(Raising(trouble))),
    "widget mount": both(lambda trouble: trouble.app.push_screen(Raising(trouble))),
    "mounted": both(lambda trouble: trouble.mount(Part(trouble))),
}


def toasts(app: App) -> list[str]:
    return [notification.message for notification in app._notifications]


async def until(condition: Callable[[], bool], pilot: Pilot[None]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await pilot.pause(0.02)


@pytest.mark.parametrize(
    "error", [DiskError(FULL), ValueError("[red]nobody\x1b[2J foresaw it")], ids=["known", "unknown"]
)
@pytest.mark.parametrize("kind", KINDS)
async def test_whatever_raises_is_told_and_the_app_lives(
    kind: str,
    error: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    where = {"mounted": "widget mount"}.get(kind, kind)
    async with running(where, error) as (app, trouble, pilot):
        done = KINDS[kind](app, trouble, pilot)
        await done
        await until(lambda: bool(toasts(app)), pilot)
        trouble.where = ""  # from now on all is well
        if kind.startswith("widget"):
            await app.pop_screen()
        await pilot.pause(0.05)
        assert len(app.screen_stack) == 1  # a screen that could not be made is gone
        told = toasts(app)
        if isinstance(error, DiskError):
            assert told == [FULL]
            assert not caplog.records
        else:
            assert told == [f"that did not work (ValueError: [red]nobody␛[2J foresaw it); {LOG} says more"]
            assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [error]
        # The app takes keys, and so does the widget: the loop of neither has ended.
        if kind != "unmount":
            heard = asyncio.Event()
            trouble.call_later(heard.set)
            await asyncio.wait_for(heard.wait(), 5)
            trouble.focus()
        await pilot.press("f5")
        assert app.lived == 1
        assert app.return_code is None
    caplog.clear()


async def test_a_key_that_an_action_passes_on_is_no_error() -> None:
    class Skips(Trouble):
        def action_break(self) -> None:
            raise SkipAction

    app = App(Skips("app action", DiskError(FULL)))
    async with app.run_test() as pilot:
        app.trouble.focus()
        await pilot.press("b")
        await pilot.pause()
        assert toasts(app) == [FULL]  # from the app's own action, to which the key went on


async def test_one_error_again_and_again_is_told_once_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    async with running("action", ValueError("always")) as (app, _, pilot):
        for _ in range(50):
            await pilot.press("b")
        await pilot.pause()
        assert len(toasts(app)) == len(caplog.records) == 1
        assert app.return_code is None
    caplog.clear()


async def test_what_does_not_find_widgets_that_are_being_taken_away_is_no_fault(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An answer's event may come while the app that shows it ends."""
    async with running("action", ValueError("never")) as (app, _, _):
        leaving, taken = app.is_leaving, app._prune(app.screen)
        with app.going_on():
            app.screen.query_one("#gone")
        assert (leaving, app.is_leaving) == (False, True) and not caplog.records
        await taken


class Draws(Trouble):
    def render(self) -> str:
        if self.lives:
            raise ValueError("cannot be drawn")
        return "drawn"

    def render_again(self) -> None:
        self.lives = 1
        self.refresh()


class Storm(Trouble):
    def storm(self) -> None:
        self.call_later(self.storm)
        raise ValueError("again")

    async def waiting_storm(self) -> None:
        self.call_after_refresh(self.waiting_storm)
        self.refresh()
        raise ValueError("again")

    def bubbling(self) -> None:
        self.app.notify("a new line each time " * self.lives)
        self.lives += 1
        self.call_later(self.bubbling)
        raise ValueError(str(self.lives))


@pytest.mark.parametrize(
    ("trouble", "begin"),
    [(Draws, "render_again"), (Storm, "storm"), (Storm, "waiting_storm"), (Storm, "bubbling")],
)
async def test_errors_in_a_loop_end_the_app(
    trouble: type[Trouble],
    begin: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(steady, "_MOST", 100)  # a busy machine makes fewer faults in a second
    app = App(trouble("", ValueError()))
    async with app.run_test(notifications=True) as pilot:
        await pilot.pause()
        app.trouble.call_later(getattr(app.trouble, begin))
        async with asyncio.timeout(30):
            while app.is_running:
                await asyncio.sleep(0.01)
    assert app.return_code == 1
    assert isinstance(app.failed, ValueError)
    caplog.clear()


async def test_what_can_be_drawn_again_is_no_loop(caplog: pytest.LogCaptureFixture) -> None:
    app = App(Draws("", ValueError()))
    async with app.run_test(notifications=True) as pilot:
        for _ in range(2 * steady._UNDRAWN):
            app.trouble.lives = 1
            app.trouble.refresh()
            await asyncio.sleep(0.05)  # pilot.pause() would draw by itself
            app.trouble.lives = 0
            app.trouble.refresh()
            await asyncio.sleep(0.05)
        assert len(toasts(app)) == 1
        await pilot.press("f5")
        assert app.lived == 1
        assert app.return_code is None
    caplog.clear()


@pytest.mark.parametrize("where", ["compose", "mount"])
@pytest.mark.parametrize("error", [DiskError(FULL), ValueError("nobody foresaw it")])
async def test_before_the_first_frame_there_is_nothing_to_tell_it_on(
    where: str,
    error: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Fails(App):
        def compose(self) -> ComposeResult:
            if where == "compose":
                raise error
            yield self.trouble

        def on_mount(self) -> None:
            if where == "mount":
                raise error

    app = Fails(Trouble("", error))
    with pytest.raises(type(error)):
        async with app.run_test():
            pass
    assert app.failed is error
    assert app.return_code == 1
    caplog.clear()


async def test_what_the_app_outlives_its_tests_do_not(caplog: pytest.LogCaptureFixture) -> None:
    look = nothing_unforeseen(caplog)
    next(look)
    async with running("action", ValueError("on purpose")) as (_, _, pilot):
        await pilot.press("b")
        await pilot.pause()
    with pytest.raises(ValueError, match="on purpose"):
        next(look)
    caplog.clear()
