"""The private names of Textual that the chat uses, all of them in this file.

Textual has no public way to outlive an error, to bound the size that is drawn or to name a key
sequence. pyproject.toml keeps Textual to one minor version: whoever moves that looks here.
"""

from __future__ import annotations

import functools
import traceback
from codecs import getincrementaldecoder
from collections.abc import Awaitable, Callable
from typing import Any, cast

from textual import _callback
from textual._ansi_sequences import ANSI_SEQUENCES_KEYS
from textual._context import active_app, active_message_pump
from textual._dispatch_key import dispatch_key
from textual.app import App
from textual.driver import Driver
from textual.drivers import linux_driver
from textual.drivers.web_driver import WebDriver
from textual.events import Key, Resize
from textual.geometry import Size
from textual.keys import Keys
from textual.message_pump import MessagePump
from textual.screen import Screen

Call = Callable[..., Awaitable[Any]]
_DRAWING = {Screen._compositor_refresh.__code__, Screen._refresh_layout.__code__}


class OpenApp(App[None]):
    """An app with hooks at the places where Textual decides by itself."""

    def take_error(self, error: Exception) -> bool:
        """Deal with an error that Textual caught; False lets Textual end the app with it."""
        return False

    def take_typed(self, event: Key) -> bool:
        """Take a key that neither a widget nor a binding wants; False leaves it to Textual."""
        return False

    def take_terminal(self) -> None:
        """Prepare for the terminal, which the driver takes next."""

    def show_frame(self, show: Callable[[], None], is_whole: bool) -> None:
        """Show what has been drawn; `is_whole` where the screen will show it now."""
        show()

    def drawn_size(self, size: Size) -> Size:
        """The size to draw for a terminal of `size`."""
        return size

    def send_to_terminal(self, sequence: str) -> None:
        """Send a control sequence to the terminal; a browser's page, or a test, has none."""
        driver = self._driver
        if driver is not None and not (driver.is_headless or driver.is_web or self.is_leaving):
            driver.write(sequence)

    def send_title(self, title: str) -> None:
        """Send the terminal its title, or the browser its page's."""
        if isinstance(self._driver, WebDriver):
            self._driver.write_meta({"type": "title", "title": title})
        else:
            self.send_to_terminal(f"\x1b]0;{title}\x07")

    @property
    def is_leaving(self) -> bool:
        """Whether the app has been told to end, or what it shows is just being taken away."""
        return self._exit or self._closing or any(screen._pruning for screen in self.screen_stack[:1])

    @property
    def has_exited(self) -> bool:
        """Whether `exit` has been called."""
        return self._exit

    def set_failed(self) -> None:
        """Make the return code that of a failure, unless it says so already."""
        self._return_code = self._return_code or 1

    @property
    def size(self) -> Size:
        return self.drawn_size(super().size)

    def _handle_exception(self, error: Exception) -> None:
        if not self.take_error(error):
            super()._handle_exception(error)

    def _display(self, screen: Screen[Any], renderable: Any) -> None:
        show = functools.partial(super()._display, screen, renderable)
        self.show_frame(show, renderable is not None and not self._batch_count)

    def _build_driver(
        self,
        headless: bool,
        inline: bool,
        mouse: bool,
        size: tuple[int, int] | None,
    ) -> Driver:
        if not headless:
            self.take_terminal()
        return super()._build_driver(headless, inline, mouse, size)

    async def _on_key(self, event: Key) -> None:
        event.prevent_default()  # of Textual's own App, which knows no `take_typed`
        if not await self._check_bindings(event.key) and not self.take_typed(event):
            await dispatch_key(self, event)

    def _on_resize(self, event: Resize) -> None:  # type: ignore[override]
        # Textual calls this before the method of the same name of its own App.
        event.size = event.virtual_size = self.drawn_size(event.size)


class OpenWebDriver(WebDriver):
    """A driver for browsers with hooks for what it writes and for the end of its input."""

    def __init__(self, app: App[Any], **options: Any) -> None:
        super().__init__(app, **options)
        self._write = self.send  # type: ignore[assignment]

    def send(self, data: bytes) -> int:
        """Write to the page; returns how many bytes were written."""
        raise NotImplementedError

    def leave_app(self) -> None:
        """Have the app end, from the thread that reads."""
        self._loop.call_soon_threadsafe(self._app.exit)


def running_app() -> App[Any] | None:
    """The app that this call belongs to, if there is one."""
    return active_app.get(None)


def current_pump() -> MessagePump | None:
    """The app, screen or widget whose message is handled now."""
    return active_message_pump.get(None)


def is_from_drawing(error: Exception) -> bool:
    """Whether an error was raised while a screen was laid out or drawn."""
    return any(frame.f_code in _DRAWING for frame, _ in traceback.walk_tb(error.__traceback__))


def wrap_every_call(wrapped: Callable[[Call], Call]) -> None:
    """Put `wrapped` around every call that Textual makes: for a handler, an action, a timer."""
    # The first calls every handler, action, timer and callback; the second whatever else a message
    # sets off.
    _callback._invoke = wrapped(_callback._invoke)  # type: ignore[assignment]
    dispatch = wrapped(MessagePump._dispatch_message)
    MessagePump._dispatch_message = dispatch  # type: ignore[assignment, method-assign]


def read_any_bytes() -> None:
    """Let the thread that reads the keys outlive bytes that are not UTF-8."""

    def forgiving(encoding: str) -> Callable[[], Any]:
        return functools.partial(getincrementaldecoder(encoding), errors="replace")

    linux_driver.getincrementaldecoder = forgiving  # type: ignore[attr-defined, assignment]


def read_alt_enter_as_ctrl_j() -> None:
    """Give Alt+Enter, as most terminals send it, the name of Ctrl+J: Textual drops the Alt."""
    cast(dict[str, Any], ANSI_SEQUENCES_KEYS)["\x1b\r"] = (Keys.ControlJ,)
