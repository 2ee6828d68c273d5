"""Long conversations: a page of widgets at a time, whatever is looked at; nothing out of place."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_harness import Chat, chatting
from m7mlx_chat.events import Text
from m7mlx_chat.markdown import LONGEST, PART, ROWS, parts
from m7mlx_chat.store import Store
from m7mlx_chat.store.rows import Node, Tree
from m7mlx_chat.widgets.transcript import MOST, PAGE
from textual.widgets import Input


def long_tree(count: int) -> Tree:
    nodes = tuple(
        Node(
            parent=i - 1 if i else None,
            role="assistant" if i % 2 else "user",
            text=f"message {i}" + (" *and* more, to fill the line, and the next one as well" * 3 if i % 2 else ""),
            created=1e9 + i,
        )
        for i in range(count)
    )
    return Tree(title="long", automatic=False, created=1e9, updated=1e9, leaf=count - 1, nodes=nodes)


@pytest.fixture
def long(tmp_path: Path) -> Path:
    with Store(tmp_path / "chats.db") as store:
        store.plant([long_tree(200)])
    return tmp_path


def numbers(chat: Chat) -> list[int]:
    return [int(view.text.split()[1]) for view in chat.app.transcript.views]


def in_view(chat: Chat) -> list[int]:
    """Numbers of the messages of which something is on the screen."""
    area = chat.app.transcript.region
    return [int(v.text.split()[1]) for v in chat.app.transcript.views if v.region.overlaps(area)]


async def test_a_page_is_mounted_and_its_end_is_in_view(long: Path) -> None:
    async with chatting(long) as chat:
        await chat.app.open_conversation(1)
        await chat.pilot.pause()
        assert numbers(chat) == list(range(200 - PAGE, 200))
        assert in_view(chat)[-1] == 199


async def test_scrolling_up_and_down_passes_every_message_once(tmp_path: Path) -> None:
    count = MOST + 2 * PAGE
    with Store(tmp_path / "chats.db") as store:
        store.plant([long_tree(count)])
    async with chatting(tmp_path, size=(100, 80)) as chat:
        await chat.app.open_conversation(1)
        await chat.pilot.pause()
        seen = list(in_view(chat))
        for _ in range(count):
            await chat.pilot.press("pageup")
            await chat.pilot.pause()
            now = in_view(chat)
            assert now[-1] >= seen[0] - 1, "messages were skipped"
            assert numbers(chat) == list(range(numbers(chat)[0], numbers(chat)[-1] + 1))
            assert len(numbers(chat)) <= MOST + PAGE
            seen = now
            if now[0] == 0:
                break
        assert seen[0] == 0
        for _ in range(count):
            await chat.pilot.press("pagedown")
            await chat.pilot.pause()
            now = in_view(chat)
            assert now[0] <= seen[-1] + 1, "messages were skipped"
            seen = now
            if now[-1] == count - 1:
                break
        assert seen[-1] == count - 1


async def test_a_jump_to_the_middle_and_an_answer_at_the_end(long: Path) -> None:
    async with chatting(long) as chat:
        message = chat.store.search("message 123")[0].message
        chat.session.show(message)
        await chat.app.show_all(found=message)
        await chat.pilot.pause()
        assert 123 in in_view(chat)
        assert len(numbers(chat)) == PAGE
        await chat.send("message 200")  # far below what is shown
        await chat.say(Text("message 201"))
        assert numbers(chat)[-2:] == [200, 201]
        assert in_view(chat)[-1] == 201


async def test_a_talk_that_goes_on_keeps_few_messages_mounted(long: Path) -> None:
    async with chatting(long) as chat:
        await chat.app.open_conversation(1)
        while len(numbers(chat)) <= 2 * PAGE:
            await chat.pilot.press("pageup")
        await chat.exchange("message 200", "message 201")
        assert numbers(chat) == list(range(202 - PAGE, 202))
        assert in_view(chat)[-1] == 201
        while numbers(chat)[0] == 202 - PAGE:  # what was taken away comes back
            await chat.pilot.press("pageup")
        assert numbers(chat) == list(range(202 - 2 * PAGE, 202))


async def test_a_search_hit_of_another_conversation_is_seen(tmp_path: Path) -> None:
    blocks = "\n\n".join(f"## Part\n\n- one\n- two\n\n```python\nx = {i}\n```" for i in range(3))
    with Store(tmp_path / "chats.db") as store:
        store.plant([long_tree(60), long_tree(2)])
        for message in range(60):
            rich = f"message {message} word{message:02} " + (f"and more\n\n{blocks}" if message % 2 else "")
            store._db.execute("UPDATE message SET text = ? WHERE id = ?", [rich, message + 1])
    async with chatting(tmp_path, size=(80, 24)) as chat:
        for number in (3, 58, 30):
            await chat.app.open_conversation(2)
            await chat.pilot.pause()
            await chat.pilot.press("ctrl+f")
            chat.app.query_one("#search", Input).value = f"word{number:02}"
            await chat.pilot.pause(0.3)
            await chat.pilot.press("enter")
            await chat.pilot.pause()
            await chat.pilot.pause()
            view = chat.app.query_one(".-found")
            transcript = chat.app.transcript
            at_top = view.region.y == transcript.scrollable_content_region.y
            assert at_top or transcript.scroll_y == transcript.max_scroll_y, number
            assert f"word{number:02}" in "\n".join(line[35:] for line in chat.shown().splitlines()), number


async def test_the_end_stays_in_view_while_an_answer_grows_unless_the_user_looks_elsewhere(long: Path) -> None:
    async with chatting(long) as chat:
        await chat.app.open_conversation(1)
        await chat.send("message 200")
        for _ in range(20):
            await chat.say(Text("message 201 and so on\n\n"))
        transcript = chat.app.transcript
        assert transcript.scroll_y == transcript.max_scroll_y
        await chat.pilot.press("pageup")
        await chat.pilot.pause()
        place = transcript.scroll_y
        await chat.say(Text("more\n\n" * 10))
        await chat.pilot.pause()
        assert transcript.scroll_y == place


# --- parts of an answer ---------------------------------------------------------------------------


def test_parts_are_the_text_however_it_comes() -> None:
    import random

    rng = random.Random(0)
    pieces = [
        "word ",
        "\n",
        "\n\n",
        "```\n",
        "- item\n",
        "| a | b |\n",
        "~~~py\n",
        "    code\n",
        "# head\n\n",
        "x" * 5000,
    ]
    for _ in range(300):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 60)))
        whole = parts(text)
        assert "".join(part.text for part in whole) == text
        shown, current, fence, position = "", "", "", 0
        while position < len(text):
            step = rng.randint(1, 3000)
            *done, last = parts(current + text[position : position + step], fence)
            position += step
            shown += "".join(part.text for part in done)
            fence = done[-1].fence if done else fence
            current = last.text
        assert shown + current == text


def test_parts_end_between_blocks() -> None:
    paragraphs = "A paragraph of some words.\n\n" * 1000
    assert all(len(part.text) <= PART + 100 and not part.plain for part in parts(paragraphs))
    # one list: its numbers and bullets belong together
    items = "- an item\n\n  and more of it\n\n" * 200
    assert len(parts(items)) == 1
    code = "```\n" + "line\n\n" * 900 + "```\n\nafter"
    assert [part.text.startswith("```") for part in parts(code)] == [True, False]


def test_what_is_too_long_is_plain_to_its_end_and_no_further() -> None:
    code = "before\n\n```\n" + "line *x*\n" * 5000 + "```\n\nafter *it*"
    found = parts(code)
    assert not found[0].plain and not found[-1].plain
    assert found[-1].text.strip() == "after *it*"
    assert all(part.plain for part in found[1:-1])
    assert max(len(part.text) for part in found) <= LONGEST
    table = "|a|b|\n|-|-|\n" + "|c|d|\n" * (2 * ROWS)
    assert parts(table)[0].plain
    assert parts("x" * 100_000)[0].plain
