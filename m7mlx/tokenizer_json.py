"""tokenizer.json (Hugging Face's `tokenizers`), with text and control tokens kept apart.

The library matches the names of special tokens inside any text: a user who types `<|im_start|>` would start a
message. So each control token is renamed, before the library sees it, to a name drawn at random in this
process. Its id and all its other properties stay; no text can contain its name.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m7mlx.errors import ConfigError, TokenizerError
from m7mlx.jsonfile import read_json, said
from m7mlx.tokenizer import _BYTE, MOST_BYTES, SPACE, Tokenizer, clean

# Added tokens that are control tokens although the file does not call them special: <|im_end|>, [INST], <s>.
_CONTROL_SHAPE = re.compile(r"<\|?[^\s<>]+\|?>|\[[^\s\[\]]+\]")


class JsonTokenizer(Tokenizer):
    """Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and sentencepiece-style BPE (Llama 2, Mistral)."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer as Library

        super().__init__()
        try:
            data = read_json(path, MOST_BYTES)
            added = {t["content"]: t for t in data.get("added_tokens", [])}
            self._controls = {
                name: int(t["id"]) for name, t in added.items() if t["special"] or _CONTROL_SHAPE.fullmatch(name)
            }
            nonce = secrets.token_hex(8)
            self._names = {i: f"\ufdd0{nonce}:{i}\ufdd1" for i in self._controls.values()}
            self._plain_added: dict[int, str] = {
                int(t["id"]): name for name, t in added.items() if name not in self._controls
            }
            _rename(data, {name: self._names[i] for name, i in self._controls.items()})
            adds_bos = _adds_bos(data, settings)
            self._library = Library.from_str(json.dumps(data))
            self._byte_level, self.adds_leading_space = _decoder_kind(path, data)
        except TokenizerError:
            raise
        except (ConfigError, KeyError, TypeError, AttributeError) as error:
            raise TokenizerError(f"{path} is not a tokenizer file ({said(str(error))})") from None
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the library raises plain Exception, and panics, which are not even that
            raise TokenizerError(f"{path} cannot be used as a tokenizer ({said(str(error))})") from None
        self.vocab_size = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._control_ids = frozenset(self._controls.values())
        self.bos_id = self._named(settings, "bos_token")
        eos = self._named(settings, "eos_token")
        self.eos_ids = frozenset() if eos is None else frozenset({eos})
        self.add_bos = bool(settings.get("add_bos_token", adds_bos))

    def _named(self, settings: Mapping[str, Any], key: str) -> int | None:
        name = settings.get(key)
        name = name.get("content") if isinstance(name, Mapping) else name
        return self._controls.get(name) if isinstance(name, str) else None

    def encode_mixed(self, parts: Sequence[str | int]) -> list[int]:
        # Texts and control tokens go through the library in one call: whether a text gets a leading space depends
        # on where it stands.
        ids: list[int] = []
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += clean(part)
            elif part in self._names:
                text += self._names[part]
            else:
                ids += [*self._encode(text), part]
                text = ""
        return ids + self._encode(text)

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        # In a batch of one, others can go on meanwhile; and nobody asks where in the text each id began.
        ids: list[int] = self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def is_control(self, token: int) -> bool:
        return token in self._control_ids

    def control_ids(self) -> Mapping[str, int]:
        return self._controls

    def _token_bytes(self, token: int) -> bytes:
        if token in self._plain_added:
            return self._plain_added[token].encode()
        piece: str | None = self._library.id_to_token(token)
        if piece is None:  # a hole in the vocabulary
            return b""
        if self._byte_level:
            return b"".join(_BYTE_OF[c] if c in _BYTE_OF else c.encode() for c in piece)
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()

    def library(self) -> tuple[str, bytes]:
        return "tokenizers", self._library.to_str().encode()

    def starts_with_space(self, token: int) -> bool:
        return (self._library.id_to_token(token) or "").startswith(SPACE)


def _rename(data: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename tokens everywhere in a tokenizer.json, and drop merges that would build one out of text."""
    for token in data.get("added_tokens", []):
        if token["content"] in names:
            token |= {"content": names[token["content"]], "special": True, "normalized": False}
    model = data["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:  # Unigram: pairs of piece and score
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [p for p in pairs if "".join(p) not in names and not names.keys() & set(p)]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    data["post_processor"] = None  # it would add control tokens by their old names


def _decoder_kind(path: Path, data: Mapping[str, Any]) -> tuple[bool, bool]:
    """(byte-level BPE rather than sentencepiece-style, whether decoding drops a leading space)."""
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


def _adds_bos(data: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether the file's own post-processor would put the start token first."""
    bos = settings.get("bos_token")
    name = bos.get("content") if isinstance(bos, Mapping) else bos
    processor = data.get("post_processor") or {}
    processors = processor.get("processors", [processor])
    first = [p["single"][0] for p in processors if p.get("type") == "TemplateProcessing" and p.get("single")]
    return any(f.get("SpecialToken", {}).get("id") == name for f in first)


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's stand-ins for bytes: printable ones stand for themselves, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    stand_ins = {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
    return {char: bytes([b]) for char, b in stand_ins.items()}


_BYTE_OF = _byte_alphabet()
