"""ChatGPT's export, conversations.json: a conversation is a `mapping` of nodes that name parents.

Only what was said is taken over, with all branches: questions and answers. System prompts, hidden
nodes, calls of tools and what they returned are left out, and what followed them moves up.
"""

from __future__ import annotations

import heapq
from dataclasses import replace
from typing import Any

from m7mlx_chat.portable.checked import Record
from m7mlx_chat.store.rows import Node, Role, Status, Tree, encodable, title_of

_SAID = ("text", "multimodal_text")
_ENDINGS: dict[Any, Status] = {"max_tokens": "length", "interrupted": "stopped"}


def trees(record: Record) -> list[Tree]:
    """Return the conversation, if anything was said in it. Raises InputError."""
    began = _time(record, "create_time", 0.0)
    nodes, index = _in_order(record, began)
    if not nodes:
        return []
    shown = record.get("current_node")
    leaf = index.get(shown) if isinstance(shown, str) else None
    title = _text(record, "title")
    nodes, moved = _joined(nodes)
    return [
        Tree(
            title=title_of(title or next((n.text for n in nodes if n.role == "user"), "")),
            automatic=not title,
            created=began,
            updated=_time(record, "update_time", began),
            archived=bool(record.get("is_archived")),
            model=_text(record, "default_model_slug"),
            leaf=moved[leaf] if leaf is not None else len(nodes) - 1,
            nodes=tuple(nodes),
        )
    ]


def _in_order(record: Record, began: float) -> tuple[list[Node], dict[str, int | None]]:
    """The messages that were said, each after its parent, otherwise as they were written.

    Also the index of the last message said on the way to each node.
    """
    mapping = record.record("mapping").items()
    entries = {key: Record(item, f"node {i + 1} of {record.name}") for i, (key, item) in enumerate(mapping)}
    children: dict[str | None, list[str]] = {}
    for key, entry in entries.items():
        parent = _text(entry, "parent")
        children.setdefault(parent if parent in entries else None, []).append(key)

    nodes: list[Node] = []
    last: dict[str, int | None] = {}
    order = {key: i for i, key in enumerate(entries)}
    ready: list[tuple[float, int, str, int | None]] = []

    def add(parent: str | None, created: float, index: int | None) -> None:
        for key in children.get(parent, ()):
            message = entries[key].record("message")
            heapq.heappush(ready, (_time(message, "create_time", created), order[key], key, index))

    add(None, began, None)
    while ready:
        created, _, key, index = heapq.heappop(ready)
        if node := _node(entries[key].record("message"), index, created):
            nodes.append(node)
            index = len(nodes) - 1
        last[key] = index
        add(key, created, index)
    if len(last) < len(entries):
        record.refuse("has messages that are their own ancestors")
    return nodes, last


def _node(message: Record, parent: int | None, created: float) -> Node | None:
    """A message, if it was said by one of the two to the other."""
    role: Role
    match message.record("author").get("role"):
        case "user":
            role = "user"
        case "assistant":
            role = "assistant"
        case _:
            return None
    metadata, content = message.record("metadata"), message.record("content")
    if metadata.get("is_visually_hidden_from_conversation") or message.get("recipient") not in (None, "all"):
        return None
    if content.get("content_type") not in (None, *_SAID):
        return None
    text = _said(content)
    ending = metadata.record("finish_details").get("type")
    status = _ENDINGS.get(ending, "complete") if isinstance(ending, str) and role == "assistant" else "complete"
    if not text.strip():
        return None
    model = _text(metadata, "model_slug") if role == "assistant" else ""
    return Node(parent=parent, role=role, text=text, status=status, created=created, model=model)


def _said(content: Record) -> str:
    parts = []
    for part in content.array("parts") if content.get("parts") is not None else []:
        if isinstance(part, str):
            parts.append(part)
        elif part is not None:
            other = Record(part, f"a part of {content.name}")
            is_image = other.get("content_type") == "image_asset_pointer"
            parts.append("[image]" if is_image else _text(other, "text"))
    return encodable("\n".join(filter(None, parts)))


def _joined(nodes: list[Node]) -> tuple[list[Node], list[int]]:
    """Join messages of one role in a row: what stood between them was left out.

    Also where each message went.
    """
    followers = [0] * len(nodes)
    for node in nodes:
        if node.parent is not None:
            followers[node.parent] += 1
    texts: list[list[str]] = []
    kept: list[Node] = []
    moved: list[int] = []
    for node in nodes:
        before = node.parent
        if before is not None and followers[before] == 1 and nodes[before].role == node.role:
            moved.append(moved[before])
            texts[moved[before]].append(node.text)
            kept[moved[before]] = replace(kept[moved[before]], status=node.status)
        else:
            moved.append(len(kept))
            texts.append([node.text])
            kept.append(replace(node, parent=None if before is None else moved[before]))
    return [replace(node, text="\n\n".join(parts)) for node, parts in zip(kept, texts, strict=True)], moved


def _text(record: Record, key: str) -> str:
    """A text that may be missing."""
    return record.text(key) if record.get(key) is not None else ""


def _time(record: Record, key: str, otherwise: float) -> float:
    """A time that may be missing."""
    return record.time(key) if record.get(key) is not None else otherwise
