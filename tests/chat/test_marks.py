"""Conversations that are pinned, and tags: in the list, in the search, in files and in lines."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
from chat_harness import Chat, chatting
from m7mlx_chat import portable
from m7mlx_chat.screens.dialogs import Ask
from m7mlx_chat.store import Store
from m7mlx_chat.store.rows import changed_tags, tags_of
from m7mlx_chat.store.schema import MIGRATIONS, open_database
from m7mlx_chat.widgets.sidebar import Conversations
from textual.widgets import Input

from m7mlx.errors import InputError


def listed(chat: Chat) -> list[str]:
    found = chat.app.query_one(Conversations)
    return [str(found.get_option_at_index(i).prompt) for i in range(found.option_count)]


async def three(chat: Chat) -> None:
    for name in ("apples", "pears", "plums"):
        chat.session.new()
        await chat.exchange(f"About {name}", f"There is much to say about {name}.")


async def search(chat: Chat, text: str) -> list[str]:
    await chat.pilot.press("ctrl+f")
    chat.app.query_one("#search", Input).value = text
    chat.app.sidebar.refresh_list()  # now, not after a pause in typing
    await chat.pilot.pause()
    return listed(chat)


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("#Work, home  #work", ("work", "home")),
        ("É\u0301 e\u0301", ("é\u0301", "é")),
        ("# -- #- ,", ()),
        ("a\x1b[31mb\u202ec \x07", ("a[31mbc",)),
        ("x" * 50, ("x" * 40,)),
        (" ".join(map(str, range(30))), tuple(map(str, range(20)))),
    ],
)
def test_tags_are_words(text: str, tags: tuple[str, ...]) -> None:
    assert tags_of(text) == tags == tags_of(" ".join(tags))


def test_tags_are_added_and_taken_away() -> None:
    assert changed_tags(("work",), "home #garden") == ("work", "home", "garden")
    assert changed_tags(("work", "home"), "-work -#home new") == ("new",)
    assert changed_tags(("work",), "-other work") == ("work",)


def test_an_older_database_gets_pins_and_tags(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with closing(open_database(path, MIGRATIONS[:4])) as db:
        db.execute(
            "INSERT INTO conversation (archived, created, updated, automatic, title, model, system, settings)"
            " VALUES (0, 1, 1, 1, 'old', '', '', '{}')"
        )
    with Store(path) as store:
        (old,) = store.conversations()
        assert (old.title, old.pinned, old.tags, store.pinned()) == ("old", False, (), [])
        store.pin(old.id, is_pinned=True)
        store.tag(old.id, ["Work", "#home"])
        assert store.pinned() == store.conversations() == [store.conversation(old.id)]
        assert store.conversation(old.id).tags == ("work", "home")
    assert list(tmp_path.glob("chats.db.v4.*.bak"))


def test_the_last_one_spoken_in_stays_the_last(tmp_path: Path) -> None:
    with Store(tmp_path / "chats.db") as store:
        first, last = (store.ask(None, None, text).conversation for text in ("first", "last"))
        store.pin(first, is_pinned=True)
        assert store.conversations(limit=1)[0].id == last  # what --continue opens
        assert [one.id for one in store.pinned()] == [first]
        store.archive(first)
        assert store.pinned() == [] and [one.id for one in store.pinned(archived=True)] == [first]


def test_a_fork_has_the_tags_and_is_not_pinned(tmp_path: Path) -> None:
    with Store(tmp_path / "chats.db") as store:
        asked = store.ask(None, None, "question")
        store.finish(asked.answer, "complete", "answer")
        store.pin(asked.conversation, is_pinned=True)
        store.tag(asked.conversation, ["work"])
        fork = store.conversation(store.fork(asked.answer))
        assert (fork.pinned, fork.tags) == (False, ("work",))


def test_a_search_for_a_tag(tmp_path: Path) -> None:
    with Store(tmp_path / "chats.db") as store:
        bees, ants = (store.ask(None, None, f"about {name} and #include").conversation for name in ("bees", "ants"))
        store.tag(bees, ["work", "100%"])
        assert store.tags_in("#work x") == (["work"], "x")
        assert store.tags_in("#Wo") == (["wo"], "")  # while it is being typed
        assert store.tags_in("#ork  #include") == ([], "#ork  #include")  # text: nothing has such a tag
        assert [one.id for one in store.titled("#work")] == [bees]
        assert [one.id for one in store.titled("#work ants")] == []
        assert store.search("#work") == []
        for part in ("about", "bou"):  # by words, and by parts of words
            assert [hit.conversation for hit in store.search(f"#work {part}")] == [bees]
            assert {hit.conversation for hit in store.search(part)} == {bees, ants}
        assert {hit.conversation for hit in store.search("#include")} == {bees, ants}
        assert [one.id for one in store.titled("#100%")] == [bees]
        store.delete(bees)
        assert store.titled("#work") == [] and store.tags_in("#work") == ([], "#work")


def test_files_keep_them_and_those_of_before_have_none(tmp_path: Path) -> None:
    with Store(tmp_path / "chats.db") as store:
        asked = store.ask(None, None, "question")
        store.pin(asked.conversation, is_pinned=True)
        store.tag(asked.conversation, ["work", "home"])
        text = portable.to_json(store.tree(asked.conversation))
    (tree,) = portable.parse(text)
    assert (tree.pinned, tree.tags) == (True, ("work", "home"))
    values = json.loads(text)
    (tree,) = portable.parse(json.dumps({key: values[key] for key in values if key not in ("pinned", "tags")}))
    assert (tree.pinned, tree.tags) == (False, ())
    (tree,) = portable.parse(json.dumps(values | {"tags": ["A\x1b b", "#c"]}))
    assert tree.tags == ("a", "b", "c")
    for wrong in ({"pinned": 1}, {"tags": "work"}, {"tags": [1]}):
        with pytest.raises(InputError, match="has a"):
            portable.parse(json.dumps(values | wrong))


async def test_a_pinned_conversation_stands_first(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(130, 30)) as chat:
        await three(chat)
        chat.app.query_one(Conversations).focus()
        await chat.pilot.press("down", "down", "p")
        assert listed(chat) == ["Pinned", "★ About apples", "Today", "About plums", "About pears"]
        assert chat.app.query_one(Conversations).has_focus
        await chat.send("/pin")
        assert listed(chat)[:3] == ["Pinned", "★ About plums", "★ About apples"]
        await chat.send("/pin")
        assert "no longer pinned" in chat.notices()
        await chat.exchange("More", "Yes.")
        assert listed(chat) == ["Pinned", "★ About apples", "Today", "About plums", "About pears"]
        assert "★ About apples" in await search(chat, "apples")
        await search(chat, "")
        await chat.send("/new")
        await chat.send("/pin")  # there is nothing yet
        assert listed(chat)[1] == "★ About apples"


async def test_tags_are_given_shown_and_found(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(130, 30)) as chat:
        await three(chat)
        await chat.send("/tag Fruit [b]garden[/b]")
        assert listed(chat)[1] == "About plums\n#fruit #[b]garden[/b]"
        assert "tags: #fruit #[b]garden[/b]" in chat.notices()
        assert "About plums  #fruit" in chat.shown().splitlines()[0]
        chat.app.query_one(Conversations).focus()
        await chat.pilot.press("down", "number_sign")
        assert isinstance(chat.app.screen, Ask)
        chat.app.screen.query_one(Input).value = "#fruit, tree"
        await chat.pilot.press("enter")
        assert listed(chat)[2] == "About pears\n#fruit #tree"
        assert await search(chat, "#fruit") == [
            "#fruit",
            "About plums\n#fruit #[b]garden[/b]",
            "About pears\n#fruit #tree",
        ]
        assert "2 conversations found" in chat.shown()
        found = await search(chat, "#tree say")
        assert len(found) == 1 and "There is much to say about pears." in found[0]
        await search(chat, "#nothing")
        assert "nothing found" in chat.shown()
        await search(chat, "")
        await chat.send("/tag -fruit")
        assert listed(chat)[1] == "About plums\n#[b]garden[/b]"
        await chat.send("/tag")
        assert isinstance(chat.app.screen, Ask)
        await chat.pilot.press("escape")
        await chat.send("/new")
        await chat.send("/tag work")
        assert "has not begun" in chat.notices()
