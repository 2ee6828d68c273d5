"""Events on their way from the thread that brings them to the app, which takes them on a timer."""

from __future__ import annotations

import threading
from dataclasses import replace

from m7mlx_chat.events import Event, Text


class EventQueue:
    """What has been said since the app looked last."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._changed = threading.Condition()

    def put(self, event: Event) -> None:
        """Add an event, on any thread."""
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def drain(self, wait: float = 0.0) -> list[Event]:
        """Return the events since the last call, neighbouring texts joined.

        If there is none, wait so many seconds for one.
        """
        with self._changed:
            if not self._events and wait:
                self._changed.wait(wait)
            events, self._events = self._events, []
        joined: list[Event] = []
        for event in events:
            last = joined[-1] if joined else None
            if isinstance(event, Text) and isinstance(last, Text):
                joined[-1] = replace(event, text=last.text + event.text, seen=event.seen or last.seen)
            else:
                joined.append(event)
        return joined
