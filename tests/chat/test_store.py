"""The store: nothing said is lost, and no file or text makes it fail unforeseen."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import stat
import string
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_harness import check_database
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from m7mlx_chat.environment import read_environment
from m7mlx_chat.portable import to_json
from m7mlx_chat.portable.page import to_html
from m7mlx_chat.store import Store, schema
from m7mlx_chat.store.errors import StoreError
from m7mlx_chat.store.rows import TITLE_LENGTH, Asked, Message, Node, Tree, encodable, pack, title_of, unpack
from m7mlx_chat.store.schema import MIGRATIONS, open_database

from m7mlx.errors import DiskError, M7Error, RunError

HOSTILE = "a\0b \ud800 \U0001f600 \x1b[31m \u202e 'quoted' \"x\" \r\n"
DAY = 86400


class Clock:
    """Seconds that pass only when told, one at each look besides."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with Store(tmp_path / "data" / "chats.db", clock=clock) as store:
        yield store


def say(store: Store, conversation: int | None, parent: int | None, question: str, answer: str = "yes") -> Asked:
    asked = store.ask(conversation, parent, question)
    store.finish(asked.answer, "complete", answer)
    return asked


def texts(messages: list[Message]) -> list[str]:
    return [m.text for m in messages]


# --- asking and answering -------------------------------------------------------------------------


def test_a_question_is_stored_with_an_answer_under_way_and_then_a_whole_one(store: Store) -> None:
    settings = {"temperature": 0.5, "seed": 7}
    asked = store.ask(None, None, "What is it?", model="mistral", system="Be brief.", settings=settings)
    question, answer = store.branch(asked.answer)
    assert (question.role, question.text, question.status) == ("user", "What is it?", "complete")
    assert (answer.role, answer.text, answer.status, answer.ids) == ("assistant", "", "answering", None)
    assert answer.model == "mistral" and answer.settings == {**settings, "system": "Be brief."}
    store.grow(asked.answer, "It is")
    assert store.message(asked.answer).text == "It is"
    store.finish(asked.answer, "length", "It is a cache.", {"tokens_per_second": 60.5}, [1, 65537, 2])
    answer = store.message(asked.answer)
    assert (answer.text, answer.status, answer.ids) == ("It is a cache.", "length", [1, 65537, 2])
    assert answer.statistics == {"tokens_per_second": 60.5}
    conversation = store.conversation(asked.conversation)
    assert (conversation.title, conversation.automatic, conversation.leaf) == ("What is it?", True, asked.answer)
    assert (conversation.model, conversation.system, conversation.settings) == ("mistral", "Be brief.", settings)
    assert conversation.messages == 2


def test_an_answer_that_has_ended_cannot_be_written_again(store: Store) -> None:
    asked = say(store, None, None, "q", "whole")
    for write in (lambda: store.grow(asked.answer, ""), lambda: store.finish(asked.answer, "error", "")):
        with pytest.raises(StoreError, match="under way"):
            write()
    assert store.message(asked.answer).text == "whole"


def test_what_is_not_there_is_said_in_one_line(store: Store) -> None:
    here, elsewhere = say(store, None, None, "q"), say(store, None, None, "q")
    for call in (
        lambda: store.message(999),
        lambda: store.conversation(999),
        lambda: store.rename(999, "x"),
        lambda: store.archive(999),
        lambda: store.delete(999),
        lambda: store.fork(999),
        lambda: store.tree(999),
        lambda: store.siblings(999),
        lambda: store.grow(999, "x"),
        lambda: store.ask(999, None, "q"),
        lambda: store.ask(here.conversation, 999, "q"),
        lambda: store.ask(here.conversation, elsewhere.answer, "q"),
        lambda: store.switch(here.conversation, elsewhere.answer),
        lambda: store.again(here.answer),
    ):
        with pytest.raises(StoreError) as caught:
            call()
        assert "\n" not in str(caught.value) and "report" not in str(caught.value)
    assert len(store.conversations()) == 2 and store.conversation(here.conversation).messages == 2


def test_a_store_that_is_left_has_no_answer_under_way(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with Store(path) as store:
        asked = store.ask(None, None, "q")
        store.grow(asked.answer, "half")
    db = sqlite3.connect(path)
    assert db.execute("SELECT status, text, owner FROM message WHERE id = 2").fetchone() == (
        "interrupted",
        "half",
        None,
    )
    db.close()
    assert list((tmp_path / "instances").iterdir()) == []


def test_the_database_itself_refuses_what_is_no_tree(store: Store) -> None:
    one, other = say(store, None, None, "q"), say(store, None, None, "q")
    for change in (
        f"UPDATE message SET parent = {one.answer} WHERE id = {one.question}",  # a circle
        # across conversations
        f"UPDATE message SET parent = {one.answer} WHERE id = {other.question}",
        f"UPDATE conversation SET leaf = {one.answer} WHERE id = {other.conversation}",
        f"DELETE FROM message WHERE id = {one.question}",  # what others refer to
        f"UPDATE message SET status = 'answering' WHERE id = {one.answer}",  # by nobody
        f"UPDATE message SET role = 'system' WHERE id = {one.answer}",
    ):
        with pytest.raises(sqlite3.IntegrityError):
            store._db.execute(change)


# --- branches -------------------------------------------------------------------------------------


class StoreMachine(RuleBasedStateMachine):
    """The store beside a dictionary of parents: branches, siblings, counts and hits agree."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.messages: dict[int, dict[str, Any]] = {}
        self.conversations: dict[int, dict[str, Any]] = {}
        self.random = random.Random(0)

    @initialize(folder=st.uuids())
    def open(self, folder: Any) -> None:
        self.folder = Path(os.environ["M7MLX_TEST_FOLDER"]) / str(folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.store = Store(self.folder / "chats.db", clock=self.clock)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            check_database(self.folder / "chats.db")

    def pick(self, data: st.DataObject, **wanted: Any) -> int:
        found = [i for i, m in self.messages.items() if all(m[k] == v for k, v in wanted.items())]
        return data.draw(st.sampled_from(found))

    def add(self, message: int, conversation: int, parent: int | None, role: str, text: str) -> None:
        self.messages[message] = {"conversation": conversation, "parent": parent, "role": role, "text": text}
        self.conversations[conversation]["leaf"] = message

    def add_pair(self, asked: Asked, parent: int | None, text: str) -> None:
        self.add(asked.question, asked.conversation, parent, "user", encodable(text))
        self.add(asked.answer, asked.conversation, asked.question, "assistant", "")

    def path(self, message: int | None) -> list[int]:
        found = []
        while message is not None:
            found.append(message)
            message = self.messages[message]["parent"]
        return found[::-1]

    @rule(text=st.text(max_size=20))
    def begin(self, text: str) -> None:
        asked = self.store.ask(None, None, text)
        self.conversations[asked.conversation] = {"archived": False, "deleted": False, "title": title_of(text)}
        self.add_pair(asked, None, text)

    @precondition(lambda self: self.messages)
    @rule(data=st.data(), text=st.text(max_size=20), first=st.booleans())
    def ask(self, data: st.DataObject, text: str, first: bool) -> None:
        parent = self.pick(data, role="assistant")
        conversation = self.messages[parent]["conversation"]
        chosen = None if first else parent
        self.add_pair(self.store.ask(conversation, chosen, text), chosen, text)

    @precondition(lambda self: self.messages)
    @rule(data=st.data())
    def again(self, data: st.DataObject) -> None:
        question = self.pick(data, role="user")
        answer = self.store.again(question)
        self.add(answer, self.messages[question]["conversation"], question, "assistant", "")

    @precondition(lambda self: any(m["text"] == "" and m["role"] == "assistant" for m in self.messages.values()))
    @rule(data=st.data(), text=st.text(min_size=1, max_size=20), whole=st.booleans())
    def answer(self, data: st.DataObject, text: str, whole: bool) -> None:
        message = self.pick(data, role="assistant", text="")
        if self.store.message(message).status != "answering":
            return
        if whole:
            self.store.finish(message, "stopped", text)
        else:
            self.store.grow(message, text)
        self.messages[message]["text"] = encodable(text)

    @precondition(lambda self: self.messages)
    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        message = self.pick(data)
        conversation = self.messages[message]["conversation"]
        newest = max(m for m in self.messages if message in self.path(m))
        assert self.store.switch(conversation, message) == newest
        self.conversations[conversation]["leaf"] = newest

    @precondition(lambda self: self.messages)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        message = self.pick(data)
        old = self.messages[message]["conversation"]
        new = self.store.fork(message)
        title = self.store.conversation(new).title
        self.conversations[new] = {"archived": False, "deleted": False, "title": title}
        copies: dict[int | None, int] = {}
        for one, copy in zip(self.path(message), self.store.tree(new).nodes, strict=True):
            assert copy.text == self.messages[one]["text"]
        for one, copied in zip(self.path(message), self.store.branch(self.leaf(new)), strict=True):
            source = self.messages[one]
            self.add(copied.id, new, copies.get(source["parent"]), source["role"], source["text"])
            copies[one] = copied.id
        assert new != old

    def leaf(self, conversation: int) -> int:
        leaf = self.store.conversation(conversation).leaf
        assert leaf is not None
        return leaf

    @precondition(lambda self: self.conversations)
    @rule(data=st.data(), what=st.sampled_from(["archive", "unarchive", "delete", "undo_delete"]))
    def move(self, data: st.DataObject, what: str) -> None:
        conversation = data.draw(st.sampled_from(sorted(self.conversations)))
        getattr(self.store, what)(conversation)
        key = "archived" if "archive" in what else "deleted"
        self.conversations[conversation][key] = what in ("archive", "delete")

    @rule()
    def open_again(self) -> None:
        self.store.close()
        self.store = Store(self.folder / "chats.db", clock=self.clock)

    @rule()
    def wait_and_open_again(self) -> None:
        self.store.close()
        self.clock.now += 31 * DAY
        self.store = Store(self.folder / "chats.db", clock=self.clock)
        self.conversations = {c: v for c, v in self.conversations.items() if not v["deleted"]}
        self.messages = {i: m for i, m in self.messages.items() if m["conversation"] in self.conversations}

    @invariant()
    def branches_agree(self) -> None:
        for conversation, known in self.conversations.items():
            assert self.leaf(conversation) == known["leaf"]
            path = self.path(known["leaf"])
            branch = self.store.branch(known["leaf"])
            assert [m.id for m in branch] == path
            assert texts(branch) == [self.messages[i]["text"] for i in path]
            for message in branch:
                mine = self.messages[message.id]
                same = [
                    i
                    for i, m in self.messages.items()
                    if (m["conversation"], m["parent"]) == (conversation, mine["parent"])
                ]
                assert (message.place, message.siblings) == (same.index(message.id) + 1, len(same))
            cut = self.random.randint(1, len(path))
            assert self.store.branch(known["leaf"], cut) == branch[-cut:]
            assert self.store.branch(known["leaf"], cut, before=path[-cut]) == branch[:-cut][-cut:]

    @invariant()
    def lists_agree(self) -> None:
        for archived in (False, True):
            listed = self.store.conversations(archived)
            wanted = {c for c, k in self.conversations.items() if not k["deleted"] and k["archived"] == archived}
            assert {c.id for c in listed} == wanted
            assert [c.updated for c in listed] == sorted((c.updated for c in listed), reverse=True)
            assert self.store.conversations(archived, 2, 1) == listed[1:3]
            for c in listed:
                assert c.messages == sum(m["conversation"] == c.id for m in self.messages.values())
                assert c.title == self.conversations[c.id]["title"]

    @invariant()
    def prompts_agree(self) -> None:
        asked = [
            (self.store.message(i).created, i, m["text"])
            for i, m in self.messages.items()
            if m["role"] == "user" and not self.conversations[m["conversation"]]["deleted"]
        ]
        assert self.store.prompts() == list(dict.fromkeys(text for _, _, text in sorted(asked, reverse=True)))


@pytest.fixture(scope="module", autouse=True)
def _machine_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M7MLX_TEST_FOLDER", str(tmp_path_factory.mktemp("machine")))
        yield


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=examples(10), stateful_step_count=30, deadline=None)


def test_editing_a_question_and_answering_again_make_siblings_to_switch_between(store: Store) -> None:
    first = say(store, None, None, "one", "1")
    chat = first.conversation
    second = say(store, chat, first.answer, "two", "2")
    edited = say(store, chat, first.answer, "two, edited", "2'")
    assert texts(store.branch(edited.answer)) == ["one", "1", "two, edited", "2'"]
    assert [(m.place, m.siblings) for m in store.branch(edited.answer)] == [(1, 1), (1, 1), (2, 2), (1, 1)]
    answer = store.again(second.question)
    assert texts(store.siblings(answer)) == ["2", ""]
    assert store.switch(chat, edited.question) == edited.answer
    assert store.switch(chat, second.question) == answer  # the newest below, not the first
    assert store.switch(chat, first.question) == answer
    assert store.conversation(chat).leaf == answer
    assert texts(store.siblings(first.question)) == ["one"]  # other conversations' roots are none


def test_a_conversation_of_10_000_messages_is_paged_through_and_erased(store: Store, clock: Clock) -> None:
    """A chain this long is past SQLite's limit of nested triggers and Python's of nested calls."""
    nodes = tuple(
        Node(parent=i - 1 if i else None, role="assistant" if i % 2 else "user", text=f"word{i}", created=i)
        for i in range(10_000)
    )
    (chat,) = store.plant([Tree(title="long", automatic=True, created=0, updated=0, leaf=9_999, nodes=nodes)])
    assert [n.text for n in store.tree(chat).nodes] == [n.text for n in nodes]
    leaf, before, pages = store.conversation(chat).leaf, None, 0
    assert leaf is not None
    seen: list[str] = []
    while page := store.branch(leaf, 999, before):
        seen[:0], before, pages = texts(page), page[0].id, pages + 1
    assert seen == [n.text for n in nodes] and pages == 11
    root = page_root = store.branch(leaf)[0].id
    assert store.switch(chat, page_root) == leaf
    fork = store.fork(store.branch(leaf, 5_000)[0].id)
    assert store.conversation(fork).messages == 5_001
    assert store.message(root).parent is None
    store.delete(chat)
    clock.now += 31 * DAY
    with Store(store.path, clock=clock) as later:
        assert [c.id for c in later.conversations()] == [fork]
        assert [h.conversation for h in later.search("word77")][:1] == [fork] and later.search("word9999") == []
    check_database(store.path)


def test_reading_steps_stay_bounded(store: Store) -> None:
    """What a page of a branch costs, in SQLite's steps, does not grow with the conversation."""

    def steps(length: int) -> int:
        nodes = tuple(Node(parent=i - 1 if i else None, role="user", text="x", created=i) for i in range(length))
        (chat,) = store.plant([Tree(title="", automatic=True, created=0, updated=0, leaf=length - 1, nodes=nodes)])
        leaf = store.conversation(chat).leaf
        assert leaf is not None
        count = 0

        def step() -> int:
            nonlocal count
            count += 1
            return 0

        store._db.set_progress_handler(step, 10)
        store.branch(leaf, 20)
        store.branch(leaf, 20, before=store.branch(leaf, 5)[0].id)
        store._db.set_progress_handler(None, 0)
        return count

    assert steps(3_000) <= 1.5 * steps(60)


# --- conversations --------------------------------------------------------------------------------


def test_the_last_one_spoken_in_comes_first(store: Store) -> None:
    one, two = say(store, None, None, "one"), say(store, None, None, "two")
    assert [c.title for c in store.conversations()] == ["two", "one"]
    say(store, one.conversation, one.answer, "more")
    store.rename(two.conversation, "TWO")  # is not speaking
    assert [(c.title, c.messages) for c in store.conversations()] == [("one", 4), ("TWO", 2)]


def test_titles_are_chosen_or_automatic(store: Store) -> None:
    chat = say(store, None, None, "\n \x1b[31m\tHow does\u202e it  work?\nReally").conversation
    assert store.conversation(chat).title == "[31m How does it work?"
    store.rename(chat, "My\ntitle")
    assert (store.conversation(chat).title, store.conversation(chat).automatic) == ("My", False)
    store.rename(chat, " ")
    assert (store.conversation(chat).title, store.conversation(chat).automatic) == ("[31m How does it work?", True)


@given(st.text() | st.text(alphabet="ab \n\t", max_size=200))
def test_a_title_is_one_printable_line_of_60_characters_cut_at_a_word(text: str) -> None:
    title = title_of(text)
    assert 0 < len(title) <= TITLE_LENGTH and title == title.strip()
    assert not any(c in "\n\r\t\x1b\0\u202e" for c in title)
    words = [" ".join(line.split()) for line in text.splitlines() if line.split()]
    if set(text) <= set("ab \n\t") and words:
        whole = title.removesuffix("…")
        assert words[0].startswith(whole)
        if title != words[0]:
            assert words[0][len(whole)] == " " or " " not in words[0][:TITLE_LENGTH]


def test_what_was_deleted_comes_back_for_30_days(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "chats.db"
    with Store(path, clock=clock) as store:
        kept, gone = say(store, None, None, "kept word"), say(store, None, None, "gone word")
        store.delete(kept.conversation)
        store.delete(gone.conversation)
        assert store.conversations() == [] and store.search("word") == [] and store.prompts() == []
    clock.now += 29 * DAY
    with Store(path, clock=clock) as store:
        store.undo_delete(kept.conversation)
        assert [h.message for h in store.search("word")] == [kept.question]
    clock.now += 2 * DAY
    with Store(path, clock=clock) as store:
        assert [c.id for c in store.conversations()] == [kept.conversation]
        with pytest.raises(StoreError, match="any more"):
            store.undo_delete(gone.conversation)
        later = say(store, None, None, "new")
        # what is erased is never mistaken for what came after
        assert later.conversation > gone.conversation
    check_database(path)


def test_nothing_is_erased_under_an_answer(store: Store, clock: Clock) -> None:
    asked = store.ask(None, None, "q")
    store.delete(asked.conversation)
    clock.now += 31 * DAY
    Store(store.path, clock=clock).close()
    store.finish(asked.answer, "complete", "whole")
    Store(store.path, clock=clock).close()
    with pytest.raises(StoreError):
        store.message(asked.answer)


# --- searching ------------------------------------------------------------------------------------


def test_search_finds_words_their_beginnings_and_other_spellings(store: Store) -> None:
    asked = say(
        store, None, None, "Wie heißt die Hauptstadt von Österreich?", "Die Hauptstadt\nÖsterreichs ist **Wien**."
    )
    found = store.search("osterreichs haupt")
    assert [h.message for h in found] == [asked.answer]
    assert [found[0].snippet[a:b] for a, b in found[0].marks] == ["Hauptstadt", "Österreichs"]
    assert "\n" not in found[0].snippet and found[0].title.startswith("Wie heißt")
    assert {h.message for h in store.search("HAUPTSTADT")} == {asked.question, asked.answer}
    assert [h.message for h in store.search("stadt wien")] == [asked.answer]  # parts of words, too
    assert store.search("wien haupt paris") == []
    assert store.search("") == store.search(" \t") == store.search("?!") == []
    assert len(store.search("wien ?!")) == 1


def test_search_follows_every_change_of_a_text_and_marks_what_is_archived(store: Store) -> None:
    asked = store.ask(None, None, "q")
    store.grow(asked.answer, "alpha")
    assert len(store.search("alpha")) == 1
    store.finish(asked.answer, "complete", "beta")
    assert store.search("alpha") == [] and not store.search("beta")[0].archived
    store.archive(asked.conversation)
    assert store.search("beta")[0].archived
    better = say(store, None, None, "beta beta beta", "something else, and among much else a beta, too")
    assert [h.message for h in store.search("beta", limit=1)] == [better.question]


@pytest.mark.parametrize(
    "query",
    ['"', 'a"b', '"""', "alpha*", "*", "NEAR(alpha beta)", "alpha AND", "OR", "NOT", "text:alpha", "(", "-alpha",
     "^alpha", "{text}: alpha", "a\0b", "\0", "\ud800", "alpha + beta", "'", "alpha\u0301", "😀", "a " * 10_000,
     "x" * 100_000],
)  # fmt: skip
def test_a_search_is_text_and_no_query_language(store: Store, query: str) -> None:
    say(store, None, None, "alpha beta", "not near or and text alpha")
    for hit in store.search(query):
        assert all(0 <= a < b <= len(hit.snippet) for a, b in hit.marks)
    assert {h.message for h in store.search(f"{query} alph")} <= {1, 2}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(query=st.text() | st.text(alphabet=string.printable))
def test_no_search_fails(store: Store, query: str) -> None:
    if not store.conversations():
        say(store, None, None, string.printable, HOSTILE)
    store.search(query)
    store.titled(query)


def test_every_word_of_a_text_finds_it(store: Store) -> None:
    text = 'It\'s "C++" (and naïve_code) don’t—stop 3.14 日本語 emoji😀end x=y;'
    asked = say(store, None, None, text)
    for word in text.split():
        assert [h.message for h in store.search(word + " ")] == [asked.question], word
    assert len(store.search(text)) == 1


def test_any_part_of_any_script_is_found(store: Store) -> None:
    text = "Die Donaudampfschifffahrt kostet 50%_x; 私は東京都に住んでいます。 Я живу в Москве 👩‍👩‍👧 naïve"
    asked = say(store, None, None, text)
    say(store, None, None, "something else, 50 of it, Moskau, Tokyo")
    for part in "dampfschiff", "SCHIFFFAHRT", "東京", "京", "住んでい", "МОСКВ", "50%_x", "👩", "ïv", "dampf 東京":
        found = store.search(part)
        assert [h.message for h in found] == [asked.question], part
        assert found[0].snippet
    (hit,) = store.search("dampfschiff")
    assert [hit.snippet[a:b] for a, b in hit.marks] == ["dampfschiff"]
    for part in ("dampf東京", "_%", "京東"):
        assert store.search(part) == [], part


def test_titles_are_found(store: Store) -> None:
    one = say(store, None, None, "a question").conversation
    other = say(store, None, None, "another question").conversation
    store.rename(one, "Crème brûlée 東京")
    assert [c.id for c in store.titled("BRULEE creme")] == [one] == [c.id for c in store.titled("東京")]
    assert [c.id for c in store.titled("question")] == [other]
    assert store.titled("") == store.titled(" ") == store.titled("no-such") == []
    store.delete(one)
    assert store.titled("brulee") == []


def test_a_pasted_page_finds_where_it_came_from(store: Store) -> None:
    page = " ".join(f"word{i}" for i in range(5_000))
    asked = say(store, None, None, page)
    assert [h.message for h in store.search(page + " and more")] == [asked.question]
    assert [h.message for h in store.search("word7-" * 50_000)] == []


def test_earlier_prompts_come_once_newest_first(store: Store) -> None:
    chat = say(store, None, None, "Alpha").conversation
    for text in ("beta", "GAMMA ray", "Alpha"):
        say(store, chat, None, text, "an answer with alpha")
    assert store.prompts() == ["Alpha", "GAMMA ray", "beta"]
    assert store.prompts(limit=2) == ["Alpha", "GAMMA ray"] and store.prompts(limit=0) == []
    assert store.prompts("gamma") == ["GAMMA ray"] and store.prompts("%") == []


# --- texts ----------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text() | st.text(alphabet=st.characters(categories=["Cs", "Cc", "Cn", "Co"])))
def test_any_text_is_stored(store: Store, text: str) -> None:
    asked = store.ask(None, None, text, model=text, system=text, settings={text: [text]})
    store.grow(asked.answer, text)
    store.rename(asked.conversation, text)
    store.finish(asked.answer, "complete", text, {"s": text})
    kept = encodable(text)
    question, answer = store.branch(asked.answer)
    assert question.text == answer.text == answer.model == answer.settings["system"] == kept
    assert answer.statistics == {"s": kept}
    assert len(kept) == len(text) and all(a == b or b == "\ufffd" for a, b in zip(text, kept, strict=True))


def test_hostile_texts_leave_the_index_sound(store: Store) -> None:
    for _ in range(3):
        say(store, None, None, HOSTILE, HOSTILE * 3)
    assert len(store.search("quoted")) == 6
    check_database(store.path)


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_packed_ids_are_the_ids(ids: list[int]) -> None:
    assert unpack(pack(ids)) == ids


def test_ids_take_about_two_bytes_each() -> None:
    ids = [random.Random(i).randrange(32768) for i in range(4096)]
    assert len(pack(ids)) < 2.3 * len(ids)


# --- the file -------------------------------------------------------------------------------------


def test_the_database_lies_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M7MLX_DATA", str(tmp_path / "here"))
    path = read_environment().database
    assert path == tmp_path / "here" / "chats.db"
    with Store(path) as store:
        asked = say(store, None, None, "q")
    with Store(path) as store:
        assert store.message(asked.question).text == "q"
    monkeypatch.delenv("M7MLX_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    path = read_environment().database
    assert path.is_relative_to(tmp_path) and "m7mlx" in path.parts


def test_only_the_user_may_read_it_and_a_commit_is_on_the_disk(store: Store) -> None:
    say(store, None, None, "q")
    for file in [*store.path.parent.glob("chats.db*"), *store.path.parent.glob("instances/*")]:
        if file.suffix != ".lock" or file.parent.name == "instances":
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700
    pragmas = {
        name: store._db.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
    }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}


def test_another_thread_is_refused(store: Store) -> None:
    caught: list[BaseException] = []

    def use() -> None:
        try:
            store.conversations()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert isinstance(caught[0], sqlite3.ProgrammingError)


LATER = (
    *MIGRATIONS,
    ("ALTER TABLE conversation ADD COLUMN colour TEXT NOT NULL DEFAULT 'red'",),
    ("UPDATE conversation SET colour = colour || '!'",),
)


def test_an_older_database_goes_up_in_order_with_a_copy_before_each_step(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with Store(path) as store:
        say(store, None, None, "old words")
        db = open_database(path, LATER)  # beside an instance that has it open
    assert db.execute("SELECT colour FROM conversation").fetchone()[0] == "red!"
    assert db.execute("PRAGMA user_version").fetchone()[0] == len(LATER)
    db.close()
    copies = sorted(tmp_path.glob("chats.db.v*.bak"))
    assert [c.name.split(".")[2] for c in copies] == [f"v{len(MIGRATIONS)}", f"v{len(MIGRATIONS) + 1}"]
    assert all(stat.S_IMODE(c.stat().st_mode) == 0o600 for c in copies)
    open_database(path, LATER).close()
    assert sorted(tmp_path.glob("chats.db.v*")) == copies  # nothing to do, nothing copied
    path.unlink()
    copies[0].rename(path)
    with Store(path) as store:  # the copy is whole by itself
        assert len(store.search("old words")) == 1


def test_a_step_that_fails_changes_nothing_and_its_copy_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with Store(path) as store:
        say(store, None, None, "old words")
    for broken in (("DROP TABLE message_words", "NO SUCH STATEMENT"), ("DELETE FROM message WHERE id = 1",)):
        with pytest.raises((sqlite3.OperationalError, StoreError)):
            open_database(path, (*MIGRATIONS, broken))
        with Store(path) as store:
            assert len(store.search("old words")) == 1
    assert list(tmp_path.glob(f"chats.db.v{len(MIGRATIONS)}.*.bak"))


def test_no_step_without_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chats.db"
    Store(path).close()

    def full(source: Path, version: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(schema, "_back_up", full)
    with pytest.raises(DiskError):
        open_database(path, LATER)
    monkeypatch.undo()
    Store(path).close()  # still of this version


def test_a_newer_a_foreign_and_a_damaged_file_are_refused_and_left_alone(tmp_path: Path) -> None:
    newer, foreign = tmp_path / "newer" / "chats.db", tmp_path / "foreign" / "chats.db"
    newer.parent.mkdir()
    open_database(newer, LATER).close()
    foreign.parent.mkdir()
    other = sqlite3.connect(foreign)
    other.execute("CREATE TABLE mine (x)")
    other.close()
    files = {newer: "newer", foreign: "not a database of m7mlx"}
    whole = tmp_path / "whole.db"
    with Store(whole) as store:
        say(store, None, None, "words " * 5000)
    content = whole.read_bytes()
    for i, damage in enumerate(
        (b"hello", b"\0" * 3, os.urandom(4096), b"\0" + content[1:], content[:4096] + b"\0" * 9000)
    ):
        file = tmp_path / f"damaged{i}" / "chats.db"
        file.parent.mkdir()
        file.write_bytes(damage)
        files[file] = "damaged"
    for file, said in files.items():
        before = file.read_bytes()
        with pytest.raises(StoreError, match=said) as caught:
            use(file)
        assert "\n" not in str(caught.value)
        if file.parent.name != "damaged4":  # that one opens; what it lacks is seen when it is read
            assert file.read_bytes() == before


def use(path: Path) -> None:
    """A bit of everything."""
    with Store(path) as store:
        for conversation in store.conversations():
            store.tree(conversation.id)
            if conversation.leaf is not None:
                store.branch(conversation.leaf)
        store.search("wor")
        store.prompts()
        say(store, None, None, "q", "words")


def test_any_damage_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with Store(path) as store:
        for i in range(30):
            say(store, None, None, f"word{i} " * 20, "words " * 50)
    content = path.read_bytes()
    noise = random.Random(1)
    refused = []
    for _ in range(150):
        broken = bytearray(content[: noise.choice([len(content), noise.randrange(len(content))])])
        for _ in range(noise.choice([0, 1, 5, 200]) if broken else 0):
            broken[noise.randrange(len(broken))] = noise.randrange(256)
        for file in tmp_path.glob("chats.db*"):
            file.unlink()
        path.write_bytes(broken)
        try:
            use(path)
        except M7Error as error:
            refused.append(str(error))
    assert len(refused) > 50 and not any("\n" in message for message in refused)


DAMAGED: list[Any] = ["x", b"\xff\x00", -1, 1e300, "{", "[1]", "[" * 100_000, '{"a": 1}']
COLUMNS = {
    "conversation": "archived deleted_at created updated leaf automatic title model system settings",
    "message": "parent role status created owner model statistics text ids settings",
}


@pytest.mark.parametrize("column", [f"{t}.{c}" for t, found in COLUMNS.items() for c in found.split()])
def test_a_row_that_is_damaged_is_one_line(tmp_path: Path, column: str) -> None:
    """One column holds what it never should: read as something harmless, or told as damage."""
    table, name = column.split(".")
    for number, value in enumerate(DAMAGED):
        path = tmp_path / str(number) / "chats.db"
        path.parent.mkdir()
        with Store(path) as store:
            asked = store.ask(None, None, "q")
            store.finish(asked.answer, "complete", "a", {"generated_tokens": 3}, [1, 2])
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA ignore_check_constraints = 1")
            with contextlib.suppress(sqlite3.IntegrityError):  # SQLite itself refuses that
                db.execute(f"UPDATE {table} SET {name} = ?", [value])
                db.commit()
        with contextlib.suppress(M7Error), Store(path) as store:
            for read in (
                store.conversations,
                store.prompts,
                lambda s=store, a=asked: to_html(s.conversation(a.conversation), s.branch(a.answer)),
                lambda s=store, a=asked: [message.ids for message in s.branch(a.answer)],
                lambda s=store, a=asked: to_json(s.tree(a.conversation)),
                lambda s=store: s.search("q"),
                lambda s=store, a=asked: s.fork(a.answer),
                lambda s=store, a=asked: s.again(a.question),
            ):
                try:
                    read()
                except M7Error as error:
                    said = str(error)
                    assert "\n" not in said and len(said) < 500


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "chats.db").mkdir(parents=True)
    for path in (tmp_path / "file" / "chats.db", tmp_path / "folder" / "chats.db"):
        with pytest.raises(DiskError, match="cannot be written"):
            Store(path)


def test_a_full_disk_loses_nothing_that_was_there(store: Store) -> None:
    asked = store.ask(None, None, "q")
    store.grow(asked.answer, "so far")
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskError, match="full"):
        store.grow(asked.answer, "x " * 100_000)
    assert store.message(asked.answer).text == "so far"
    store._db.execute("PRAGMA max_page_count = 1000000")
    store.finish(asked.answer, "complete", "whole")
    assert store.message(asked.answer).text == "whole"


def test_a_database_that_another_program_keeps_locked_is_one_line(store: Store) -> None:
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store._db.execute("PRAGMA busy_timeout = 1")
    with pytest.raises(RunError, match="locked"):
        store.ask(None, None, "q")
    assert store.conversations() == []  # reading goes on
    other.execute("ROLLBACK")
    other.close()
    say(store, None, None, "q")
