"""tokenizer.json (Hugging Face's `tokenizers`), with text and control tokens kept apart.

The library matches the names of added tokens inside any text: a user who types `<|im_start|>` would
start a message. So each control token is renamed, before the library sees it, to a name drawn at
random in this process. Its id and all its other properties stay; no text can contain its name.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from m7mlx.errors import ConfigError, TokenizerError
from m7mlx.jsonfile import read_json, said
from m7mlx.tokens.added_tokens import BYTE, FLAGS, AddedToken, Names
from m7mlx.tokens.tokenizer import MOST_BYTES, SPACE, Tokenizer, replace_surrogates


class JsonTokenizer(Tokenizer):
    """Byte-level BPE (GPT-2, Llama 3, Qwen) and sentencepiece-style BPE (Llama 2, Mistral)."""

    def __init__(self, path: Path, names: Names | None = None) -> None:
        super().__init__()
        names = names or Names()
        try:
            data = read_json(path, MOST_BYTES)
            self.add_bos = bool(names.settings.get("add_bos_token", _adds_bos(data, names.role("bos_token"))))
            added = {n: t for n, t in names.all(_listed(data)).items() if not _is_of_model(data["model"], n)}
            data |= {"truncation": None, "padding": None}  # those are for batches in training
            data["added_tokens"] = [{"id": 0, "content": name, **token.flags()} for name, token in added.items()]
            controls = {name for name, token in added.items() if names.is_control(token)}
            ids = self._build(data, controls)
            if late := {name for name in added if not names.has_row(ids[name])} - controls:
                controls |= late
                ids = self._build(data, controls)
        except (ConfigError, KeyError, TypeError, AttributeError) as error:
            raise TokenizerError(f"{path} is not a tokenizer file ({said(str(error))})") from None
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the library raises Exception itself, and panics
            raise TokenizerError(f"{path} cannot be used as a tokenizer ({said(str(error))})") from None
        self.vocab_size = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._added = ids
        self._controls = {name: ids[name] for name in added if name in controls}
        self._control_ids = frozenset(self._controls.values())
        self._hidden = frozenset(ids[name] for name in controls if added[name].special)
        self._added_texts = {i: name.encode() for name, i in ids.items()}
        self._byte_level, self.adds_leading_space = _decoder_kind(path, data)
        self.bos_id = self._id(names.role("bos_token"), ids)
        eos = self._id(names.role("eos_token"), ids)
        self.eos_ids = frozenset() if eos is None else frozenset({eos})

    def _id(self, name: str | None, added: Mapping[str, int]) -> int | None:
        return added.get(name, self._library.token_to_id(name)) if name else None

    def _build(self, data: Mapping[str, Any], controls: Collection[str]) -> dict[str, int]:
        """Make the library's tokenizer, with the control tokens renamed.

        Returns the ids that it gives all added tokens.
        """
        from tokenizers import Tokenizer as Library  # 20 ms: many models do without

        nonce = secrets.token_hex(8)
        renamed = {name: f"\ufdd0{nonce}:{n}\ufdd1" for n, name in enumerate(sorted(controls))}
        self._library = Library.from_str(json.dumps(_renamed(data, renamed)))
        ids: dict[str, int] = {}
        for token in data["added_tokens"]:
            name = token["content"]
            found: int | None = self._library.token_to_id(renamed.get(name, name))
            assert found is not None
            ids[name] = found
        self._renamed = renamed
        self._names = {ids[name]: new for name, new in renamed.items()}
        return ids

    def _encode_mixed(self, parts: Sequence[str | int]) -> list[int]:
        # Texts and control tokens go through the library in one call: whether a text gets a leading
        # space depends on where it stands.
        ids: list[int] = []
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += replace_surrogates(part)
            elif part in self._names:
                text += self._names[part]
            else:
                ids += [*self._encode(text), part]
                text = ""
        return ids + self._encode(text)

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        # Encoding a batch, even of one, lets other threads run; and the fast way leaves out where
        # in the text each id began, which nobody asks.
        ids: list[int] = self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def is_control(self, token: int) -> bool:
        return token in self._control_ids

    def is_shown(self, token: int) -> bool:
        return token not in self._hidden

    def control_ids(self) -> Mapping[str, int]:
        return self._controls

    def added_tokens(self) -> Mapping[str, int]:
        return self._added

    def vocabulary(self) -> dict[str, int]:
        names = {new: name for name, new in self._renamed.items()}
        return {names.get(piece, piece): i for piece, i in self._library.get_vocab(with_added_tokens=True).items()}

    def _token_bytes(self, token: int) -> bytes:
        if token in self._added_texts:
            return self._added_texts[token]
        piece: str | None = self._library.id_to_token(token)
        if piece is None:  # a hole in the vocabulary
            return b""
        if self._byte_level:
            return b"".join(_BYTE_OF[c] if c in _BYTE_OF else c.encode() for c in piece)
        byte = BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()

    def library(self) -> tuple[str, bytes]:
        return "tokenizers", self._library.to_str().encode()

    def starts_with_space(self, token: int) -> bool:
        return (self._library.id_to_token(token) or "").startswith(SPACE)


def _listed(data: Mapping[str, Any]) -> list[AddedToken]:
    """Return the added tokens of a tokenizer.json."""
    return [AddedToken(t["content"], **{f: bool(t[f]) for f in FLAGS}) for t in data.get("added_tokens") or ()]


def _is_of_model(model: Mapping[str, Any], name: str) -> bool:
    """Whether a token is one of the model's own characters or bytes, even if listed as added."""
    is_known = name in model["vocab"] if isinstance(model["vocab"], dict) else False
    return is_known and (len(name) == 1 or BYTE.fullmatch(name) is not None)


def _renamed(data: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename tokens everywhere in a tokenizer.json; drop the merges that would build one."""
    model = dict(data["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:  # Unigram: pairs of piece and score
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [p for p in pairs if "".join(p) not in names and not names.keys() & set(p)]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = [
        {**token, "content": names[token["content"]], "special": True, "normalized": False}
        if token["content"] in names
        else token
        for token in data["added_tokens"]
    ]
    # Its own post-processor would add control tokens by their old names.
    return {**data, "added_tokens": added, "model": model, "post_processor": None}


def _decoder_kind(path: Path, data: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether it is byte-level BPE, and whether decoding drops a leading space."""
    decoder = data.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type"): step for step in steps}
    if "ByteLevel" in kinds:
        return True, False
    if kinds.keys() & {"Metaspace", "ByteFallback", "Replace"}:
        metaspace = kinds.get("Metaspace", {})
        drops = bool(kinds.get("Strip", {}).get("start")) or metaspace.get("prepend_scheme", "never") != "never"
        return False, drops
    raise TokenizerError(
        f"{path}: decoder {decoder.get('type')!r} is not supported (byte-level or sentencepiece BPE is)"
    )


def _adds_bos(data: Mapping[str, Any], bos: str | None) -> bool:
    """Whether the file's own post-processor would put the start token first."""
    processor = data.get("post_processor") or {}
    processors = processor.get("processors", [processor])
    first = [p["single"][0] for p in processors if p.get("type") == "TemplateProcessing" and p.get("single")]
    return any(f.get("SpecialToken", {}).get("id") == bos for f in first)


def _byte_alphabet() -> dict[str, bytes]:
    """Return GPT-2's character for each byte: itself if printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    stand_ins = {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
    return {char: bytes([b]) for char, b in stand_ins.items()}


_BYTE_OF = _byte_alphabet()
_NAME_OF = {data[0]: char for char, data in _BYTE_OF.items()}


def byte_level_name(data: bytes) -> str:
    """Return how byte-level vocabularies write bytes."""
    return "".join([_NAME_OF[byte] for byte in data])
