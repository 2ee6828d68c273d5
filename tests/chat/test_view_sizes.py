"""Every screen in terminals of every size, made smaller and larger while an answer comes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from chat_harness import Chat, chatting
from effort import some
from m7mlx_chat.events import Seen, Text
from m7mlx_chat.steady import SMALLEST
from m7mlx_chat.view import BESIDE_FROM
from m7mlx_chat.widgets.composer import Composer
from textual.events import Resize
from textual.geometry import Size
from textual.widgets import Input
from textual.widgets._toast import Toast, ToastRack

# Smaller ones than `SMALLEST` are drawn in that size: one of these is enough in each direction.
SIZES = (
    (2, 2),
    (6, 30),
    (12, 10),
    (300, 1),
    (24, 8),
    (30, 40),
    (1, 100),
    (40, 12),
    (200, 60),
    (56, 9),
    (30, 10),
    (20, 5),
    (300, 100),
)
LAST = (100, 30)  # all that is looked for fits
SCREENS: dict[str, tuple[str, ...]] = {
    "chat": (),
    "conversations": ("ctrl+b",),
    "search": ("ctrl+f", "q"),
    "window": ("f3",),
    "help": ("f1",),
    "settings": ("f2",),
    "figures": ("f4",),
    "models": ("ctrl+o",),
    "history": ("ctrl+r",),
    "palette": ("ctrl+p", "e"),
    "selection": ("alt+up",),
    "completion": ("slash",),
    "long text": ("x", *["ctrl+j"] * 14, "at"),
    "title": ("slash", "r", "e", "n", "tab", "enter"),
}
ANSWER = "# Heading\n\n| a | b |\n|---|---|\n| x | y |\n\n```python\nfor x in y: pass\n```\n\n- one\n  - two\n\n"


async def resized(chat: Chat, width: int, height: int) -> None:
    """Resize the chat as the terminal's driver does it.

    What is drawn is drawn by the app: Pilot's pause would do it by itself.
    """
    chat.app._driver._size = (width, height)  # type: ignore[union-attr]
    chat.app.post_message(Resize(Size(width, height), Size(width, height)))
    await asyncio.sleep(0.05)


def check_composer(chat: Chat) -> None:
    """Hold that the composer is on the screen, and that nothing told in the corner covers it."""
    composer, screen = chat.app.composer, chat.app.screen
    if not chat.app.sidebar.is_shown or chat.app.size.width >= BESIDE_FROM:  # else the list covers all
        assert screen.region.contains_region(composer.region), chat.app.size
    for toast in screen.query(Toast):
        seen = toast.region.intersection(screen.query_one(ToastRack).region)
        assert not seen.overlaps(composer.region), chat.app.size


@pytest.mark.parametrize("screen", SCREENS)
async def test_every_screen_in_every_size(tmp_path: Path, screen: str) -> None:
    async with chatting(tmp_path, notifications=True) as chat:
        await chat.exchange("a question", ANSWER)
        await chat.send("another question")
        await chat.pilot.press(*SCREENS[screen])
        chat.app.tell("an error " * 20, is_error=True)
        chat.app.tell("done")
        sizes = [*some(SIZES, 3, first=list(SCREENS).index(screen)), LAST]
        for place, (width, height) in enumerate(sizes):
            await resized(chat, width, height)
            text = f"word {place} **bold**\n\n" + ANSWER[: place % 9]
            await chat.say(Text(text, place + 1, Seen(500 * place, 10**6)))
            assert chat.app.size == (max(width, SMALLEST.width), max(height, SMALLEST.height))
            if len(chat.app.screen_stack) == 1:
                check_composer(chat)
        assert chat.app._undrawn == 0
        await chat.pilot.press("escape", "escape", "escape")
        for _ in range(100):  # the end comes into view after the layout, on a busy machine later
            if (last := f"word {len(sizes) - 1}") in chat.shown():
                break
            await asyncio.sleep(0.05)
        assert last in chat.shown()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (20, 5), (24, 8), (300, 100)])
async def test_a_chat_that_starts_in_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    async with chatting(tmp_path, size=size, notifications=True) as chat:
        await chat.exchange("a question", "an answer")
        assert "▌" in chat.shown()


async def test_in_a_narrow_terminal_the_conversations_lie_over_the_talk(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(30, 12)) as chat:
        await chat.exchange("the question", "the answer")
        await chat.pilot.press("ctrl+b")
        await chat.pilot.pause()
        assert "2 messages" in chat.shown()
        assert "Write" not in chat.shown()
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert isinstance(chat.app.focused, Composer)
        assert "Write a message" in chat.shown()


async def test_in_a_narrow_terminal_every_setting_has_room(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(24, 12)) as chat:
        await chat.pilot.press("f2")
        await chat.pilot.pause()
        assert all(field.size.width >= 12 for field in chat.app.screen.query(Input))
