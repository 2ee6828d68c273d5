"""Every screen as it was looked at and found right: texts in tests/chat/screens, and colours.

A change on purpose: `M7MLX_UPDATE_SCREENS=1 pytest tests/chat/test_view.py`, then look at the
difference.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path

import pytest
from chat_harness import READY, Chat, chatting, done
from m7mlx_chat import catalog, dates
from m7mlx_chat.catalog import Entry
from m7mlx_chat.commands import estimate
from m7mlx_chat.config import Config
from m7mlx_chat.events import Failed, Loading, Prefill, Seen, Text
from m7mlx_chat.screens import models as models_screen
from rich.color import Color
from scripted_tools import ScriptedTools, called
from textual.widgets import Input

FOLDER = Path(__file__).parent / "screens"
NOW = datetime(2026, 3, 10, 14, 2)
ANSWER = """A **rolling buffer** keeps the last *W* keys and values:

```python
slot = position % capacity
```

1. memory is fixed
2. `window` tokens are seen

| tokens | slots |
|-------:|------:|
| 5,000  | 4,160 |
"""


async def talked(chat: Chat) -> None:
    await chat.exchange("What is a rolling buffer?", ANSWER)
    await chat.exchange("And what lies beyond?", "Nothing that is seen directly.", seen=5100)


async def welcome(chat: Chat) -> None:
    pass


async def conversation(chat: Chat) -> None:
    await talked(chat)


async def answering(chat: Chat) -> None:
    await talked(chat)
    await chat.send("Tell me more")
    await chat.say(Prefill(0, 20, 480), Text("Well, there is", 3, Seen(5120, 545_000_000)))


async def reading(chat: Chat) -> None:
    await chat.send("Here is a long text …")
    await chat.say(Prefill(2048, 8192, 480))


async def loading(chat: Chat) -> None:
    chat.session.ready, chat.app.is_loading = None, True
    await chat.send("Early")
    await chat.say(Loading(1_000_000_000, 4_000_000_000))


async def failed(chat: Chat) -> None:
    await chat.send("Too long")
    await chat.say(Failed("the prompt has 9000 tokens, but the model's context holds 8192; shorten it"))


async def window(chat: Chat) -> None:
    await talked(chat)
    await chat.pilot.press("f3")


async def branches(chat: Chat) -> None:
    await talked(chat)
    await chat.send("/retry")
    await chat.say(Text("Another answer.", 2))
    await chat.pilot.press("escape")
    await chat.say(done("Another answer.", "stopped"))
    await chat.pilot.press("alt+up")


async def sidebar(chat: Chat) -> None:
    await talked(chat)
    chat.session.new()
    await chat.exchange("Something else", "Yes.")
    if not chat.app.sidebar.is_shown:  # where there is room it is there from the start
        await chat.pilot.press("ctrl+b")


async def search(chat: Chat) -> None:
    await talked(chat)
    await chat.pilot.press("ctrl+f")
    chat.app.query_one("#search", Input).value = "rolling buffer"
    await chat.pilot.pause(0.3)


async def completion(chat: Chat) -> None:
    await chat.pilot.press("/")


async def editing(chat: Chat) -> None:
    await talked(chat)
    await chat.send("/edit")


async def help_screen(chat: Chat) -> None:
    await chat.pilot.press("f1")


async def settings(chat: Chat) -> None:
    await chat.send("/set temperature 0.7")
    await chat.pilot.press("f2")


async def stats(chat: Chat) -> None:
    await talked(chat)
    await chat.pilot.press("f4")


async def models(chat: Chat) -> None:
    await chat.pilot.press("ctrl+o")
    await chat.app.workers.wait_for_complete()


async def approval(chat: Chat) -> None:
    chat.session.tools = ScriptedTools()
    await chat.send("Is it raining in Paris?")
    await chat.say(called({"city": "Paris", "days": [1, 2]}, text="I look it up."))


async def calls(chat: Chat) -> None:
    chat.session.tools = tools = ScriptedTools("make")
    await chat.send("Is it raining in Paris?")
    await chat.say(called({"city": "Paris"}, {"city": "Rome"}, text="I look it up."))
    tools.give("rain")
    await chat.say()
    tools.give("no such city", "failed")
    await chat.say()
    await chat.say(done("In Paris it rains."))
    await chat.pilot.press("alt+up", "t")


async def history(chat: Chat) -> None:
    await talked(chat)
    await chat.pilot.press("ctrl+r")


SCREENS: tuple[Callable[[Chat], Awaitable[None]], ...] = (
    welcome, conversation, answering, reading, loading, failed, window, branches, sidebar, search, completion,
    editing, help_screen, settings, stats, models, history, approval, calls,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Entry("mistral", Path("/hub/mistral"), 4_080_000_000, 4_620_000_000, "4 bits", None, 32768)
    windowed = Entry("org/mistral-v0.1", Path("/hub/v01"), 14_480_000_000, 15_020_000_000, "16 bits", 4096, 32768)
    broken = Entry("./broken", Path("broken"), 0, problem="it has no weights (model*.safetensors)")
    (demo,) = (entry for entry in catalog.SUGGESTED if entry.name == "demo")
    monkeypatch.setattr(models_screen, "models", lambda own, used: [here, windowed, demo, broken])
    monkeypatch.setattr(models_screen, "machine_memory", lambda: 17_179_869_184)
    monkeypatch.setattr(catalog, "budget", lambda: 17_179_869_184)
    monkeypatch.setattr(dates, "today", NOW.date)
    monkeypatch.setattr(estimate, "_PAUSE_SECONDS", 3600.0)  # a slow machine would show tokens, a fast one none


@pytest.mark.parametrize("size", [(80, 24), (140, 44)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.__name__)
async def test_a_screen_is_as_it_was(
    screen: Callable[[Chat], Awaitable[None]],
    size: tuple[int, int],
    tmp_path: Path,
) -> None:
    config = Config(Path("/home/me/.config/m7mlx/config.toml"), presets={"precise": {"temperature": 0}})
    async with chatting(tmp_path, size=size, config=config, clock=NOW.timestamp) as chat:
        await screen(chat)
        await chat.pilot.pause()
        await chat.pilot.pause()
        chat.app.screen.set_focus(chat.app.screen.focused)
        shown = chat.shown() + "\n"
    file = FOLDER / f"{screen.__name__}-{size[0]}x{size[1]}.txt"
    if os.environ.get("M7MLX_UPDATE_SCREENS"):
        FOLDER.mkdir(exist_ok=True)
        file.write_text(shown, encoding="utf-8")
    assert shown == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("theme", ["textual-dark", "textual-light", "nord", "dracula"])
@pytest.mark.parametrize("screen", [conversation, window, branches, sidebar, help_screen, models])
async def test_every_text_can_be_read(screen: Callable[[Chat], Awaitable[None]], theme: str, tmp_path: Path) -> None:
    """Every text has enough contrast, by the WCAG's ratio of luminances.

    What themes themselves mute, times and costs among them, has less than its 4.5.
    """
    async with chatting(tmp_path, size=(140, 44), config=Config(tmp_path / "c.toml", theme=theme)) as chat:
        await chat.say(READY)
        await screen(chat)
        await chat.pilot.pause()
        strips = chat.app.screen._compositor.render_strips(chat.app.size)
        dim = len(chat.app.screen_stack) > 1  # what lies behind a dialog is dimmed on purpose
    ratios: list[float] = []
    for strip in strips:
        for segment in strip:
            letters = sum(character.isalnum() for character in segment.text)
            if letters and segment.style and segment.style.color and segment.style.bgcolor and not segment.style.dim:
                ratio = contrast(segment.style.color, segment.style.bgcolor)
                ratios += [ratio] * letters
    assert len(ratios) > 50
    ratios.sort()
    if not dim:
        assert ratios[0] >= 2.3
        assert ratios[len(ratios) // 4] >= 3.7


def contrast(a: Color, b: Color) -> float:
    lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color: Color) -> float:
    parts = [part / 255 for part in color.get_truecolor()]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
