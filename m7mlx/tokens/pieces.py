"""The pieces of a sentencepiece model, with a folder's added tokens among them.

sentencepiece finds its user-defined pieces in any text. Those that are control tokens here
(`Names.is_control`) become control pieces, which no text encodes to. So do the tokens that a
folder's files add. Ids stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from m7mlx.tokens.added_tokens import AddedToken, Names

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # sentencepiece's types of pieces
_MISTRAL_OWN = 771  # from v2 on, lower ids are Mistral's own: those that are text stay text


class Pieces(NamedTuple):
    """A sentencepiece model with all tokens in it.

    data           the model, as sentencepiece reads it
    ids            name → id of all added tokens
    words          name → id of those that are plain words, which sentencepiece would not find
    shown          control tokens that have a text
    strips_before  tokens that take the white space before them
    strips_behind  tokens that take the white space after them
    """

    data: bytes
    ids: Mapping[str, int]
    words: Mapping[str, int]
    shown: frozenset[int]
    strips_before: frozenset[int]
    strips_behind: frozenset[int]


def with_added(data: bytes, model: SentencePieceProcessor, names: Names) -> Pieces:
    """Add the tokens of `names` to a model, as transformers adds them.

    data, model  the model, as bytes and as sentencepiece has loaded it

    A name that the model has keeps its id there. Otherwise the id that the file names takes the
    name, if the model has it. Others get the next ids, in their order.
    """
    from sentencepiece import sentencepiece_model_pb2

    pb: Any = sentencepiece_model_pb2  # made at run time: type checkers see nothing in it
    proto = pb.ModelProto.FromString(data)
    types = [piece.type for piece in proto.pieces]
    size, is_mistral = len(types), model.is_control(model.piece_to_id("[INST]"))
    own = [
        AddedToken(proto.pieces[i].piece.replace("▁", " "), id=i)
        for i, kind in enumerate(types)
        if kind == _USER_DEFINED and not (is_mistral and i < _MISTRAL_OWN)
    ]
    ids: dict[str, int] = {}
    words: dict[str, int] = {}
    shown: set[int] = set()
    tokens = names.all(own)
    for name, token in tokens.items():
        i = _find(model, name)
        if i is None and token.id is not None and token.id < size and types[token.id] != _BYTE:
            i = token.id
            proto.pieces[i].piece = name
        if i is None:
            i = len(proto.pieces)
            proto.pieces.add(piece=name, score=0.0, type=_CONTROL)
        ids[name] = i
        kind = types[i] if i < size else None
        if kind in (_UNKNOWN, _BYTE):
            continue
        if names.is_control(token) or not names.has_row(i):
            proto.pieces[i].type = _CONTROL
            if not token.special and kind != _CONTROL:
                shown.add(i)
        elif kind is None:
            words[name] = i
    return Pieces(
        proto.SerializeToString(),
        ids,
        words,
        frozenset(shown),
        frozenset(ids[name] for name, token in tokens.items() if token.lstrip),
        frozenset(ids[name] for name, token in tokens.items() if token.rstrip),
    )


def _find(model: SentencePieceProcessor, name: str) -> int | None:
    for piece in (name, name.replace(" ", "▁")):
        i: int = model.piece_to_id(piece)
        if model.id_to_piece(i) == piece:
            return i
    return None
