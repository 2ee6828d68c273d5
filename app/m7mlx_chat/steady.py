"""The one place for whatever goes wrong on the screen: it is told in a corner, the chat goes on.

Textual ends the app at the first exception that a handler lets through, and the loop of the widget
that it came from. Here each call that Textual makes (a handler, an action, a timer, a callback)
fails alone: `_reported` stops the exception where it comes out of our code. What Textual catches on
its own (composing, layout, drawing, workers) comes to the same place, `SteadyApp.report`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from textual.actions import SkipAction
from textual.geometry import Size
from textual.screen import Screen
from textual.worker import WorkerFailed

from m7mlx.errors import M7Error
from m7mlx.terminal import visible
from m7mlx_chat.textual_internals import (
    Call,
    OpenApp,
    current_pump,
    is_from_drawing,
    read_any_bytes,
    running_app,
    wrap_every_call,
)

_SECONDS = 6.0  # an error stays in the corner; the same one is not told twice in that time
_SHOWN = 5  # errors in the corner at once
# faults, seconds: more than a key held down can cause is a loop that only the end stops
_MOST, _WITHIN = 500, 10.0
# frames in a row that could not be drawn, seconds between them: nobody sees what is told
_UNDRAWN, _AGAIN = 30, 0.1
_LONGEST = 200  # characters of an unforeseen error that are told
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
SMALLEST = Size(20, 5)  # what is drawn; a smaller terminal shows a part of it
_log = logging.getLogger(__name__)


class SteadyApp(OpenApp):
    """An app that outlives its errors.

    An error of `m7mlx.errors` is told in its own words. Any other one is a fault of ours: it is
    told in short, with its traceback in the log. Before the first frame there is nothing to tell it
    on: then, and where errors come in a loop, the app ends, and `failed` says why.
    """

    def __init__(self, log: Path) -> None:
        """Point the user to the file `log`, where the caller has the log written."""
        super().__init__()
        self.failed: Exception | None = None
        self.log_path = log
        self._drawn = False
        self._told: dict[str, float] = {}
        self._faults: deque[float] = deque(maxlen=_MOST)
        self._undrawn = 0

    def tell(self, text: str, *, is_error: bool = False) -> bool:
        """Show a line in the corner for a while; False if an error is not shown again."""
        if is_error:
            now = time.monotonic()
            self._told = {line: until for line, until in self._told.items() if until > now}
            if text in self._told or len(self._told) >= _SHOWN:
                return False
            self._told[text] = now + _SECONDS
        self.notify(
            visible(text),
            severity="error" if is_error else "information",
            timeout=_SECONDS if is_error else 3,
            markup=False,
        )
        return True

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Tell whatever fails within the block, and go on with what comes after it."""
        try:
            yield
        except Exception as error:
            self.report(error)

    def report(self, error: Exception) -> None:
        """Tell an error, and go on."""
        if isinstance(error, WorkerFailed) and isinstance(error.error, Exception):
            error = error.error
        if self.is_leaving:  # the widgets are gone: what does not find them matters to nobody
            _log.debug("while leaving", exc_info=error)
            return
        if isinstance(error, M7Error):
            self.tell(str(error), is_error=True)
        else:
            self._tell_unforeseen(error)
        self._give_up_in_a_loop(error)
        self._leave_half_made_screen()

    def _tell_unforeseen(self, error: Exception) -> None:
        self._faults.append(time.monotonic())
        text = " ".join(str(error).split())
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        line = f"that did not work ({text[:_LONGEST]}); {self.log_path} says more"
        if self.tell(line, is_error=True):
            _log.error("unforeseen", exc_info=error)

    def _give_up_in_a_loop(self, error: Exception) -> None:
        if is_from_drawing(error):
            self._undrawn += 1
            # nobody else would try before the next key
            self.set_timer(_AGAIN, lambda: self.refresh(layout=True))
        too_many = len(self._faults) == _MOST and self._faults[-1] - self._faults[0] < _WITHIN
        if too_many or self._undrawn >= _UNDRAWN:
            _log.error("giving up", exc_info=error)
            self.failed = error
            self.exit(return_code=1)

    def _leave_half_made_screen(self) -> None:
        """Leave a screen that could not be made: it would lie empty over the chat."""
        pump = current_pump()
        if isinstance(pump, Screen) and not pump.is_mounted and pump in self.screen_stack[1:]:
            self.call_later(self._leave, pump)

    async def _leave(self, screen: Screen[Any]) -> None:
        if self.screen is screen and len(self.screen_stack) > 1:
            await self.pop_screen()

    # --- hooks of `OpenApp` -----------------------------------------------------------------------

    def take_error(self, error: Exception) -> bool:
        if self._drawn or self.has_exited:
            self.report(error)
            return True
        self.failed = self.failed or error
        _log.error("at the start", exc_info=error)
        return False

    def show_frame(self, show: Callable[[], None], is_whole: bool) -> None:
        before = self._undrawn
        show()
        if is_whole and self._undrawn == before:
            self._undrawn = 0

    def on_ready(self) -> None:
        """Take note that the first frame has been drawn."""
        self._drawn = True

    def take_terminal(self) -> None:
        """Have whatever ends the program give the terminal back, and keep what was said."""
        loop = asyncio.get_running_loop()
        for number in _ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
                loop.add_signal_handler(number, self.exit, None, 128 + number)

    def drawn_size(self, size: Size) -> Size:
        """The size, or `SMALLEST`: in less there is no room inside borders to draw in."""
        return Size(max(size.width, SMALLEST.width), max(size.height, SMALLEST.height))

    def panic(self, *renderables: Any) -> None:
        """Leave: the thread that reads the keys has ended, because the terminal has."""
        super().panic(*renderables)
        self.set_failed()


def _reported(call: Call) -> Call:
    """Wrap a call: what it raises is reported to the app, and it returns None."""

    @functools.wraps(call)
    async def reported(*arguments: Any) -> Any:
        try:
            return await call(*arguments)
        except SkipAction:  # no error: the key is for somebody else
            raise
        except Exception as error:
            app = running_app()
            if not isinstance(app, SteadyApp) or not app._drawn or app.has_exited:
                raise
            app.report(error)
            await asyncio.sleep(0)  # where errors come in a loop, others have their turn

    return reported


wrap_every_call(_reported)
read_any_bytes()
