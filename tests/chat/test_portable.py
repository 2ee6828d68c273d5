"""Export and import: what goes out comes back the same, what is hostile is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from m7mlx_chat import dates, portable
from m7mlx_chat.portable import parse, parse_all, to_json
from m7mlx_chat.portable.page import to_html, to_markdown
from m7mlx_chat.store import Store
from m7mlx_chat.store.rows import Node, Tree, encodable, tags_of, title_of
from markdown_it import MarkdownIt

from m7mlx.errors import InputError

TEXT = st.text().map(encodable)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.dictionaries(TEXT, SCALAR | st.lists(SCALAR, max_size=3), max_size=3)
TIMES = st.floats(0, 4e9)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Any tree that the store could hold, of whatever shape."""
    nodes = [
        Node(
            parent=draw(st.none() | st.integers(0, i - 1)) if i else None,
            role=draw(st.sampled_from(["user", "assistant"])),
            text=draw(TEXT),
            status=draw(st.sampled_from(["complete", "stopped", "length", "error", "interrupted"])),
            created=draw(TIMES),
            model=draw(TEXT),
            settings=draw(VALUES),
            statistics=draw(VALUES),
        )
        for i in range(draw(st.integers(0, 12)))
    ]
    return Tree(
        title=title_of(draw(TEXT)),
        automatic=draw(st.booleans()),
        created=draw(TIMES),
        updated=draw(TIMES),
        archived=draw(st.booleans()),
        pinned=draw(st.booleans()),
        tags=tags_of(draw(st.text("ab #-,éÉß\x1b\n", max_size=60))),
        model=draw(TEXT),
        system=draw(TEXT),
        settings=draw(VALUES),
        leaf=draw(st.none() | st.integers(0, len(nodes) - 1)) if nodes else None,
        nodes=tuple(nodes),
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "chats.db") as store:
        yield store


def exported(store: Store) -> tuple[Any, list[Any]]:
    """A conversation that has all there is, and its branch."""
    asked = store.ask(None, None, "What is <b>bold</b>?", model="mistral", system="Be brief.\n<script>")
    store.finish(asked.answer, "complete", "It is **bold**.", {"tokens_per_second": 60.5}, [1, 2, 3])
    more = store.ask(asked.conversation, asked.answer, "And code?", model="mistral")
    store.finish(more.answer, "stopped", "```python\nx = 1 < 2")
    return store.conversation(asked.conversation), store.branch(more.answer)


# --- our own JSON ---------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tree=trees())
def test_what_is_exported_is_imported_the_same(store: Store, tree: Tree) -> None:
    text = to_json(tree)
    assert parse(text) == parse(text.encode()) == parse("\ufeff" + text) == [tree]
    assert parse(f"[{text}, {text}]") == [tree, tree]
    (conversation,) = store.plant(parse(text))
    assert store.tree(conversation) == tree
    assert to_json(store.tree(conversation)) == text


def test_a_conversation_that_was_led_here_comes_back_but_for_its_token_ids(store: Store) -> None:
    conversation, branch = exported(store)
    store.again(branch[0].id)
    (back,) = store.plant(parse(to_json(store.tree(conversation.id))))
    old, new = store.tree(conversation.id), store.tree(back)
    assert [n.text for n in new.nodes] == [n.text for n in old.nodes] and new.leaf == old.leaf == 4
    assert [n.status for n in new.nodes] == ["complete", "complete", "complete", "stopped", "interrupted"]
    assert old.nodes[1].ids == [1, 2, 3] and new.nodes[1].ids is None


def own(**changes: Any) -> dict[str, Any]:
    node = Node(parent=None, role="user", text="q", created=1)
    tree = Tree(title="t", automatic=True, created=1, updated=2, leaf=0, nodes=(node,))
    values: dict[str, Any] = json.loads(to_json(tree))
    return values | changes


def message(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = own()["messages"][0]
    return values | changes


# --- ChatGPT's export -----------------------------------------------------------------------------


def node(
    key: str,
    parent: str | None,
    role: str,
    *parts: Any,
    time: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    content = {"content_type": "text", "parts": list(parts)}
    said = {"author": {"role": role}, "content": content, "create_time": time, "metadata": {}, "recipient": "all"}
    return {"id": key, "parent": parent, "children": [], "message": said | more}


def chatgpt(*nodes: dict[str, Any], **more: Any) -> dict[str, Any]:
    mapping = {n["id"]: n for n in nodes}
    head = {
        "title": "A chat",
        "create_time": 100.5,
        "update_time": 200.5,
        "default_model_slug": "gpt",
        "mapping": mapping,
    }
    return head | more


ROOT: dict[str, Any] = {"id": "root", "parent": None, "children": [], "message": None}


def test_chatgpts_tree_comes_over_with_its_branches() -> None:
    data = chatgpt(
        # before its parent
        node("a2", "q1", "assistant", "second answer", time=4, metadata={"model_slug": "gpt-x"}),
        ROOT,
        node("sys", "root", "system", "", metadata={"is_visually_hidden_from_conversation": True}),
        node("ctx", "sys", "user", "about me", content={"content_type": "user_editable_context"}),
        node("memo", "ctx", "user", "hidden", metadata={"is_visually_hidden_from_conversation": True}),
        node("q1", "memo", "user", "first", "question", time=1),
        node("a1", "q1", "assistant", "first answer", time=2),
        node("call", "a2", "assistant", "search(…)", time=5, recipient="browser"),
        node("tool", "call", "tool", "results", time=6),
        node("think", "tool", "assistant", "hm", time=6.5, content={"content_type": "thoughts", "thoughts": []}),
        node("a3", "think", "assistant", "and more", time=7, metadata={"finish_details": {"type": "max_tokens"}}),
        node("img", "a3", "user", {"content_type": "image_asset_pointer"}, "what is it?", time=None),
        current_node="a1",
    )
    (tree,) = parse(json.dumps([data]))
    assert [(n.parent, n.role, n.text) for n in tree.nodes] == [
        (None, "user", "first\nquestion"),
        (0, "assistant", "first answer"),
        (0, "assistant", "second answer\n\nand more"),
        (2, "user", "[image]\nwhat is it?"),
    ]
    assert [n.created for n in tree.nodes] == [1, 2, 4, 7] and tree.nodes[2].status == "length"
    assert tree.nodes[2].model == "gpt-x" and (tree.title, tree.automatic, tree.leaf) == ("A chat", False, 1)
    assert (tree.created, tree.updated, tree.model) == (100.5, 200.5, "gpt")
    assert parse(json.dumps(data)) == [tree]


@st.composite
def chatgpt_trees(draw: st.DrawFn) -> tuple[dict[str, Any], list[int | None]]:
    """Nodes in any order, with any of them left out of what was said; and the parents by node."""
    count = draw(st.integers(1, 12))
    parents = [draw(st.none() | st.integers(0, i - 1)) if i else None for i in range(count)]
    times = st.none() | st.floats(0, 1000)
    roles = st.sampled_from(["user", "assistant", "tool", "system"])
    nodes = [
        node(f"n{i}", None if p is None else f"n{p}", draw(roles), f"text {i}", time=draw(times))
        for i, p in enumerate(parents)
    ]
    return chatgpt(*draw(st.permutations(nodes))), parents


@given(chatgpt_trees())
def test_of_chatgpts_messages_none_is_lost_and_none_loses_what_came_before_it(
    example: tuple[dict[str, Any], list[int | None]],
) -> None:
    data, parents = example
    said = {
        i: n["message"]["author"]["role"]
        for i, n in ((int(key[1:]), n) for key, n in data["mapping"].items())
        if n["message"]["author"]["role"] in ("user", "assistant")
    }
    if not said:
        with pytest.raises(InputError, match="no messages"):
            parse(json.dumps(data))
        return
    (tree,) = parse(json.dumps(data))
    held = [[int(n) for n in re.findall(r"text (\d+)", node.text)] for node in tree.nodes]
    assert sorted(n for one in held for n in one) == sorted(said)
    for i in range(len(held)):
        path: list[int] = []
        at: int | None = i
        while at is not None:
            path, at = held[at] + path, tree.nodes[at].parent
        wanted: list[int] = []
        up: int | None = held[i][-1]
        while up is not None:
            wanted, up = ([up] if up in said else []) + wanted, parents[up]
        assert path == wanted
        assert all(said[n] == tree.nodes[i].role for n in held[i])
    assert all(n.parent is None or n.parent < i for i, n in enumerate(tree.nodes))


def test_conversations_without_a_word_are_left_out() -> None:
    empty, full = chatgpt(ROOT, node("x", "root", "user", " ")), chatgpt(node("q", None, "user", "hello"), title=None)
    assert [t.title for t in parse(json.dumps([empty, full]))] == ["hello"]
    with pytest.raises(InputError, match="no messages"):
        parse(json.dumps([empty]))


def test_a_chain_of_100_000_messages_comes_over(store: Store) -> None:
    count = 100_000
    nodes = [
        node(f"n{i}", f"n{i - 1}" if i else None, "assistant" if i % 2 else "user", f"text{i}") for i in range(count)
    ]
    (tree,) = parse(json.dumps([chatgpt(*reversed(nodes))]))
    assert [n.parent for n in tree.nodes] == [None, *range(count - 1)] and tree.nodes[-1].text == f"text{count - 1}"
    same = [node(f"n{i}", f"n{i - 1}" if i else None, "user", "word") for i in range(count)]
    (tree,) = parse(json.dumps(chatgpt(*same)))
    assert len(tree.nodes) == 1 and len(tree.nodes[0].text) == 6 * count - 2


# --- hostile files --------------------------------------------------------------------------------

CIRCLE = chatgpt(node("a", "b", "user", "x"), node("b", "a", "assistant", "y"), node("c", None, "user", "z"))
HOSTILE: dict[str, str | bytes] = {
    "empty": "",
    "no JSON": "{",
    "no UTF-8": b'{"title": "\xff"}',
    "UTF-16": json.dumps([CIRCLE]).encode("utf-16"),
    "binary": bytes(range(256)),
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"mapping":' * 100_000 + "{}" + "}" * 100_000,
    "a number": "1",
    "null": "null",
    "an empty list": "[]",
    "something else": '{"a": 1}',
    "a list of something else": "[[]]",
    "endless digits": '{"format": "m7mlx-chat", "version": ' + "1" * 5000 + "}",
    "NaN": json.dumps(own(created=float("nan"))),
    "a circle": json.dumps(CIRCLE),
    "its own parent": json.dumps(chatgpt(node("a", "a", "user", "x"))),
    "mapping is a list": json.dumps(chatgpt(mapping=[])),
    "a node is a text": json.dumps(chatgpt(mapping={"a": "x"})),
    "a message is a list": json.dumps(chatgpt(mapping={"a": {"message": [1]}})),
    "author is a text": json.dumps(chatgpt(node("a", None, "user", "x", author="user"))),
    "parts is a text": json.dumps(chatgpt(node("a", None, "user", content={"parts": "x"}))),
    "a part is a number": json.dumps(chatgpt(node("a", None, "user", 5))),
    "a part's text is a list": json.dumps(chatgpt(node("a", None, "user", {"text": []}))),
    "a parent is a number": json.dumps(chatgpt(node("a", 1, "user", "x"))),  # type: ignore[arg-type]
    "title is an object": json.dumps(chatgpt(node("a", None, "user", "x"), title={})),
    "a time is a text": json.dumps(chatgpt(node("a", None, "user", "x"), create_time="now")),
    "a time is endless": json.dumps(chatgpt(node("a", None, "user", "x"))).replace("100.5", "1e999"),
    "a time is negative": json.dumps(chatgpt(node("a", None, "user", "x"), update_time=-1)),
    "a time is true": json.dumps(own(created=True)),
    "newer": json.dumps(own(version=99)),
    "version 0": json.dumps(own(version=0)),
    "version is true": json.dumps(own(version=True)),
    "messages is an object": json.dumps(own(messages={})),
    "a message is null": json.dumps(own(messages=[None])),
    "a later parent": json.dumps(own(messages=[message(), message(parent=2), message(parent=1)])),
    "a message is its own parent": json.dumps(own(messages=[message(parent=0)])),
    "a negative parent": json.dumps(own(messages=[message(), message(parent=-1)])),
    "parent is true": json.dumps(own(messages=[message(), message(), message(parent=True)])),
    "parent is a fraction": json.dumps(own(messages=[message(), message(parent=0.0)])),
    "a leaf that is not there": json.dumps(own(leaf=1)),
    "an unknown role": json.dumps(own(messages=[message(role="system")])),
    "a role that is a list": json.dumps(own(messages=[message(role=[])])),
    "an answer under way": json.dumps(own(messages=[message(status="answering")])),
    "text is null": json.dumps(own(messages=[message(text=None)])),
    "settings is a list": json.dumps(own(settings=[])),
    "deep settings": json.dumps(own()).replace('"settings": {}', '"settings": {"a": ' + "[" * 99 + "]" * 99 + "}"),
    "endless settings": json.dumps(own()).replace('"settings": {}', '"settings": {"a": [1e999]}'),
    "automatic is 1": json.dumps(own(automatic=1)),
    "a title is missing": json.dumps({k: v for k, v in own().items() if k != "title"}),
    "two bad ones": json.dumps([own(leaf=7), 5]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_and_nothing_is_imported(store: Store, name: str) -> None:
    with pytest.raises(InputError) as caught:
        store.plant(parse(HOSTILE[name]))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert store.conversations() == [] and store.search("x") == []


def test_what_is_malformed_among_others_is_left_out_and_told() -> None:
    file = json.dumps([own(), own(leaf=7), chatgpt(node("a", None, "user", "x")), 5])
    imported = parse_all(file)
    assert len(imported.trees) == 2
    assert [line.partition(" ")[0] for line in imported.skipped] == ["conversation"] * 2
    assert imported.told().startswith("2 conversations imported, 2 left out (conversation 2 ")
    assert "conversation 4 " in imported.told() and "nothing was imported" not in imported.told()
    assert parse_all(json.dumps(own())).told() == "1 conversation imported"


def test_a_file_that_is_too_large_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="MB"):
        parse(b" " * 1001)
    assert len(parse(json.dumps(own()))) == 1


def test_a_tree_that_fails_in_the_middle_takes_the_others_with_it(store: Store) -> None:
    good = parse(json.dumps(own()))[0]

    def some() -> Iterator[Tree]:
        yield good
        raise InputError("the second one is damaged")

    with pytest.raises(InputError):
        store.plant(some())
    assert store.conversations() == []


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=5), inside, max_size=4),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_value_at_any_place_is_taken_or_refused(store: Store, data: st.DataObject) -> None:
    """A sound file with one value of it replaced by any other."""
    said = node("a", "q", "assistant", "y", metadata={"finish_details": {"type": "stop"}})
    sound = data.draw(
        st.sampled_from([own(messages=[message(), message(parent=0)]), chatgpt(node("q", None, "user", "x"), said)])
    )
    changed = json.loads(json.dumps(sound))
    where = changed
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = data.draw(st.sampled_from(keys))
        if not (isinstance(where[key], dict | list) and where[key] and data.draw(st.booleans())):
            break
        where = where[key]
    where[key] = data.draw(ANY_JSON)
    try:
        planted = store.plant(parse(json.dumps(changed)))
    except InputError as error:
        one_line = "\n" not in str(error)
    else:
        one_line = True
        for conversation in planted:
            tree = store.tree(conversation)
            assert parse(to_json(tree)) == [tree]
            found = store.conversation(conversation)
            branch = store.branch(found.leaf) if found.leaf is not None else []
            assert to_html(found, branch) and to_markdown(found, branch)
    assert one_line


# --- pages ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The text of a page; anything that could run, load or lead somewhere unseen fails."""

    TAGS = frozenset(
        {
            "html",
            "head",
            "meta",
            "time",
            "title",
            "style",
            "body",
            "article",
            "footer",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "p",
        }
        | {"div", "span", "pre", "code", "em", "strong", "s", "ul", "ol", "li", "blockquote", "hr", "br", "a"}
        | {"table", "thead", "tbody", "tr", "th", "td"}
    )
    ATTRIBUTES = frozenset(
        {"class", "datetime", "href", "start", "charset", "name", "content", "http-equiv", "style", "title"}
    )

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in self.TAGS, tag
        for name, value in attributes:
            assert name in self.ATTRIBUTES, name
            if name == "href":
                assert tag == "a" and not re.match(r"\s*(javascript|vbscript|data|file):", value or "", re.IGNORECASE)
            if name == "style":
                assert re.fullmatch(r"text-align:(left|right|center)", value or "")

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError("a comment")

    def handle_pi(self, data: str) -> None:
        raise AssertionError("a processing instruction")


def test_headings_of_an_answer_lie_below_those_of_the_page(store: Store) -> None:
    asked = store.ask(None, None, "q")
    store.finish(
        asked.answer, "complete", "# One\n\n###### Six\n\n```no-such-language\na < b\n```\n\n```\nc < d\n```"
    )
    html = to_html(store.conversation(asked.conversation), store.branch(asked.answer))
    assert html.count("<h1>") == 1 and "<h3>One</h3>" in html and "<h6>Six</h6>" in html
    assert "a &lt; b" in html and "c &lt; d" in html
    Page(html)


def test_a_page_shows_questions_as_typed_and_answers_as_markdown(store: Store) -> None:
    conversation, branch = exported(store)
    html = to_html(conversation, branch)
    text = Page(html).text
    assert "<strong>bold</strong>" in html and "What is <b>bold</b>?" in text and "Be brief.\n<script>" in text
    assert 'class="language-python"><span class="c-n">x</span>' in html and "x = 1 < 2" in text and "stopped" in text
    assert ".c-n" in html and "@media print" in html
    assert text.index("What is") < text.index("It is") < text.index("And code?") < text.index("x = 1")
    assert "default-src 'none'" in html and "light dark" in html


HTML = ["<script>alert(1)</script>", "<img src=x onerror=y>", "<!--", "-->", "&lt;", "&#x202e;", "&#0;", "</style>"]
HTML += ["</article>", "]]>", "<?x", "<svg onload=x>", "<base href=//x>", "\0", "\x1b", "\u202e", "\ud800", "'\""]
MARKDOWN = [
    "![i](http://x/y.png)",
    "[a](javascript:alert(1))",
    "[l](http://x 'a\"b')",
    "<http://x/>",
    "<javascript:x>",
]
MARKDOWN += [
    "```",
    "~~~",
    "`",
    "|a|b|\n|-|-|\n|c|d|",
    "# h",
    "> q",
    "- i",
    "[r]: data:text/html,x\n\n[r]",
    "\n\n",
    " ",
]
PIECES = st.sampled_from([*HTML, *MARKDOWN, "\n\n", "<javascript:x>", "{", "}", "{title}"])
HOSTILE_TEXT = st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=examples(80))
@given(title=HOSTILE_TEXT, question=HOSTILE_TEXT, answer=HOSTILE_TEXT)
def test_nothing_in_a_page_runs_loads_or_hides(store: Store, title: str, question: str, answer: str) -> None:
    asked = store.ask(None, None, question, model=title, system=question)
    store.finish(asked.answer, "complete", answer)
    store.rename(asked.conversation, title)
    conversation, branch = store.conversation(asked.conversation), store.branch(asked.answer)
    html, markdown = to_html(conversation, branch), to_markdown(conversation, branch)
    page = Page(html)
    for letter in "\0\x1b\u202e\ud800":
        assert letter not in html and letter not in markdown
    words = [word for word in re.findall(r"\w+", encodable(question)) if word.isascii()]
    assert all(word in page.text and word in markdown for word in words)


@pytest.mark.parametrize(
    "text", ["```\ncode", "~~~~ x\ncode\n~~~", "````\n```\ncode\n```", "a\n  ```py\ncode", "~~~\n```"]
)
def test_a_code_block_left_open_does_not_swallow_what_follows(store: Store, text: str) -> None:
    asked = store.ask(None, None, "q")
    store.finish(asked.answer, "stopped", text)
    more = store.ask(asked.conversation, asked.answer, "after it")
    markdown = to_markdown(store.conversation(asked.conversation), store.branch(more.answer))
    tokens = MarkdownIt("commonmark").parse(markdown)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert [heading.partition(" · ")[0] for heading in headings] == ["q", "You", "Answer", "You", "Answer"]
    assert "after it" in [token.content for token in tokens if token.type == "inline"]


def test_markdown_of_a_branch(store: Store) -> None:
    conversation, branch = exported(store)
    text = to_markdown(conversation, branch)
    assert text.startswith("# What is <b>bold</b>?\n\n") and "> Be brief.\n> <script>" in text
    asked, answered = (dates.full_time(message.said_at) for message in branch[:2])
    assert f"## You · {asked}\n\nWhat is <b>bold</b>?\n\n## mistral · {answered}\n\nIt is **bold**.\n" in text
    assert text.endswith("```python\nx = 1 < 2\n```\n\n*(stopped)*\n")
