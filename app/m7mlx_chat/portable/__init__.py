"""Conversations as files: our own JSON, which holds all of one, and files from elsewhere.

    {"format": "m7mlx-chat", "version": 1, "title": …, "automatic": …, "created": …,
     "updated": …, "archived": …, "pinned": …, "tags": ["work", …], "model": …, "system": …,
     "settings": {…}, "leaf": 3,
     "messages": [{"parent": null, "role": "user", "text": …, "status": …, "created": …, "model": …,
                   "settings": {…}, "statistics": {…}}, …]}

`parent` and `leaf` count messages from 0; a parent comes before its children, so there is nothing
to go round in. Times are seconds since 1970. Token ids stay out: a file from a stranger could make
the model read ids that are not those of the text shown.

A file is read whole and checked before anything is stored; `Store.plant` stores all of it or
nothing. Nothing here touches a store: a long file may be read in any thread.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from m7mlx.errors import InputError
from m7mlx.units import counted
from m7mlx_chat.portable import chatgpt
from m7mlx_chat.portable.checked import Record
from m7mlx_chat.store.rows import CHOSEN_TITLE_LENGTH, Ending, Node, Role, Tree, tags_of, title_of

FORMAT, VERSION = "m7mlx-chat", 1
# ChatGPT's exports of years are some 100 MB; in memory they take ten times as much
MOST_BYTES = 1 << 29
_TOO_LONG = f"the file has {{:,.0f}} MB, the most is {MOST_BYTES / 1e6:,.0f}; split it"
_TOLD = 3  # reasons for which conversations were left out
_STATUSES = (*get_args(Ending), "interrupted")


def to_json(tree: Tree) -> str:
    """A conversation as our own JSON."""
    messages = [
        {
            "parent": node.parent,
            "role": node.role,
            "text": node.text,
            "status": node.status,
            "created": node.created,
            "model": node.model,
            "settings": node.settings,
            "statistics": node.statistics,
        }
        for node in tree.nodes
    ]
    head = {
        "format": FORMAT,
        "version": VERSION,
        "title": tree.title,
        "automatic": tree.automatic,
        "created": tree.created,
        "updated": tree.updated,
        "archived": tree.archived,
        "pinned": tree.pinned,
        "tags": list(tree.tags),
        "model": tree.model,
        "system": tree.system,
        "settings": tree.settings,
        "leaf": tree.leaf,
    }
    return json.dumps({**head, "messages": messages}, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


@dataclass(frozen=True)
class Imported:
    """The conversations of a file, and why others of it were left out, a line each."""

    trees: list[Tree]
    skipped: list[str]

    def told(self) -> str:
        """What was taken and what was not, in a line."""
        text = f"{counted(len(self.trees), 'conversation')} imported"
        if self.skipped:
            more = " …" if len(self.skipped) > _TOLD else ""
            text += f", {len(self.skipped):,} left out ({'; '.join(self.skipped[:_TOLD])}{more})"
        return text


def parse(data: str | bytes) -> list[Tree]:
    """The conversations that `parse_all` finds."""
    return parse_all(data).trees


def parse_all(data: str | bytes) -> Imported:
    """The conversations in a file of ours, a list of such, or ChatGPT's conversations.json.

    Of several those that are malformed are left out. Raises InputError, in one line, where nothing
    is left.
    """
    parsed = _json_of(data)
    items = parsed if isinstance(parsed, list) else [parsed]
    trees: list[Tree] = []
    skipped: list[str] = []
    for i, item in enumerate(items):
        try:
            trees += _trees(item, f"conversation {i + 1}" if len(items) > 1 else "the conversation")
        except InputError as error:
            skipped.append(str(error))
    if not trees:
        if skipped:
            raise InputError(f"{skipped[0]}; nothing was imported")
        raise InputError("the file has no messages; export the conversations again")
    return Imported(trees, skipped)


def _trees(item: Any, name: str) -> list[Tree]:
    record = Record(item, name)
    if record.get("format") == FORMAT:
        return [_tree(record)]
    if "mapping" in record:
        return chatgpt.trees(record)
    record.refuse("is neither one that m7mlx-chat exported nor one of ChatGPT's (conversations.json)")


def read_file(path: Path) -> Imported:
    """The conversations in a file, as `parse_all`. Raises InputError."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(_TOO_LONG.format(path.stat().st_size / 1e6))
        return parse_all(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None


def _json_of(data: str | bytes) -> Any:
    if len(data) > MOST_BYTES:
        raise InputError(_TOO_LONG.format(len(data) / 1e6))
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(text.removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise InputError(f"the file is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        cause = "nested too deep" if isinstance(error, RecursionError) else error
        raise InputError(f"the file is not JSON ({cause}); choose a JSON file that was exported") from None


def _tree(record: Record) -> Tree:
    version = record.whole("version")
    if not 1 <= version <= VERSION:
        record.refuse(f"is in version {version} of the format, this m7mlx knows {VERSION}: update m7mlx")
    nodes: list[Node] = []
    for item in record.array("messages"):
        node = _node(Record(item, f"message {len(nodes) + 1} of {record.name}"), len(nodes))
        nodes.append(node)
    return Tree(
        title=title_of(record.text("title"), CHOSEN_TITLE_LENGTH),
        automatic=record.flag("automatic"),
        created=record.time("created"),
        updated=record.time("updated"),
        archived=record.flag("archived"),
        # older files have neither
        pinned="pinned" in record and record.flag("pinned"),
        tags=tags_of(" ".join(record.texts("tags"))) if "tags" in record else (),
        model=record.text("model"),
        system=record.text("system"),
        settings=record.values("settings"),
        leaf=record.index("leaf", len(nodes)),
        nodes=tuple(nodes),
    )


def _node(record: Record, before: int) -> Node:
    role: Role = record.one_of("role", get_args(Role))
    return Node(
        parent=record.index("parent", before),
        role=role,
        text=record.text("text"),
        status=record.one_of("status", _STATUSES),
        created=record.time("created"),
        model=record.text("model"),
        settings=record.values("settings"),
        statistics=record.values("statistics"),
    )
