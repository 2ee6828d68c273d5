"""Models that other programs keep on this machine: LM Studio's folders and files, Ollama's files.

What lies there was written by others, and may change at any moment: it is read within bounds, and
whatever cannot be read is left out, or shown with the reason.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError, M7Error, WeightsError
from m7mlx.jsonfile import NotRegularError, open_regular, read_json, said
from m7mlx_chat.catalog import Entry, describe
from m7mlx_chat.environment import Programs
from m7mlx_chat.hub_search import GGUF_ARCHITECTURES

_MOST = 2000  # files and folders that are looked at in one program's place
_MANIFEST = 1 << 20  # bytes
_HEAD = 1 << 16  # bytes of a GGUF file among which the architecture stands: it comes first
_MODEL, _ADAPTER = "application/vnd.ollama.image.model", "application/vnd.ollama.image.adapter"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf", re.IGNORECASE)
_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type → bytes
_STRING, _ARRAY = 8, 9


def find_elsewhere(programs: Programs) -> list[Entry]:
    """Return the models of other programs that can be used, or converted; each place once."""
    found: dict[tuple[str, str], Entry] = {}
    for entry in (*_lm_studio(programs), *_ollama(programs)):
        found.setdefault((entry.label, os.path.realpath(entry.folder or entry.file or "")), entry)
    return list(found.values())


# --- LM Studio ------------------------------------------------------------------------------------


def _lm_studio(programs: Programs) -> Iterator[Entry]:
    """Yield what lies in the folders PUBLISHER/MODEL: folders for MLX, and GGUF files."""
    for home in programs.lm_studio:
        places = [home / "models"]
        with suppress(M7Error):
            moved = read_json(home / "settings.json").get("downloadsFolder")
            if isinstance(moved, str) and os.path.isabs(moved) and "\0" not in moved:
                places.append(Path(moved))
        for place in places:
            for folder in islice(_folders(place, depth=2), _MOST):
                yield from _in_folder(folder, str(folder.relative_to(place)))


def _folders(place: Path, depth: int) -> Iterator[Path]:
    if depth == 0:
        yield place
        return
    for name in _names(place):
        if not name.startswith("."):
            yield from _folders(place / name, depth - 1)


def _names(folder: Path) -> list[str]:
    """Return the names of what lies in a folder, in order; none where it cannot be read."""
    try:
        return sorted(os.listdir(folder))[:_MOST]
    except OSError:
        return []


def _in_folder(folder: Path, label: str) -> Iterator[Entry]:
    names = _names(folder)
    if "config.json" in names:
        with suppress(Exception):  # another architecture: none of our business
            ModelConfig.from_folder(folder)
            yield replace(describe(str(folder), folder), label=label, owner="LM Studio")
        return
    for name in names:
        if not name.lower().endswith(".gguf"):
            continue
        part = _PART.search(name)
        if part is None:
            yield from _gguf(folder / name, f"{label}/{name}", "LM Studio")
        elif int(part[1]) == 1:
            yield _unusable(
                f"{label}/{name}", "LM Studio", "it is one of several parts; join them with: llama-gguf-split --merge"
            )


# --- Ollama ---------------------------------------------------------------------------------------


def _ollama(programs: Programs) -> Iterator[Entry]:
    """Yield what the manifests HOST/NAMESPACE/MODEL/TAG name."""
    for place in programs.ollama:
        for manifest in islice(_folders(place / "manifests", depth=4), _MOST):
            name = _name(manifest)
            try:
                found = _layer(manifest)
                if found is not None:
                    yield from _blob(place, name, *found)
            except M7Error as error:
                yield _unusable(name, "Ollama", str(error))


def _name(manifest: Path) -> str:
    """Return the name as Ollama shows it: without its own host and namespace."""
    host, namespace, model, tag = manifest.parts[-4:]
    parts = [host, namespace, model]
    if host == "registry.ollama.ai":
        parts = [model] if namespace == "library" else [namespace, model]
    return f"{'/'.join(parts)}:{tag}"


def _layer(manifest: Path) -> tuple[str, int] | None:
    """Return digest and size of the model of a manifest; None where it has no GGUF file.

    Raises ConfigError for a manifest that cannot be understood, WeightsError for a model that is
    more than one file.
    """
    layers = read_json(manifest, _MANIFEST).get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise ConfigError("its manifest lists no layers; pull it again")
    kinds = [layer.get("mediaType") for layer in layers]
    if _MODEL not in kinds:
        return None
    if kinds.count(_MODEL) > 1 or _ADAPTER in kinds:
        raise WeightsError("it is put together from several files, which only Ollama can do")
    model: dict[str, Any] = layers[kinds.index(_MODEL)]
    digest, size = model.get("digest"), model.get("size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or type(size) is not int:
        raise ConfigError(f"its manifest names no file ({said(digest)}); pull it again")
    return digest, size


def _blob(place: Path, name: str, digest: str, size: int) -> Iterator[Entry]:
    file = place / "blobs" / digest.replace(":", "-")
    try:
        here = file.stat().st_size
    except OSError:
        yield _unusable(name, "Ollama", f"its file is gone; get it again: ollama pull {name}")
        return
    if here != size:
        yield _unusable(name, "Ollama", f"its file is not whole; get it again: ollama pull {name}")
        return
    yield from _gguf(file, name, "Ollama")


# --- GGUF files -----------------------------------------------------------------------------------


def _gguf(file: Path, label: str, owner: str) -> Iterator[Entry]:
    """Yield a GGUF file of an architecture that we convert; whether it can be, its plan tells."""
    try:
        architecture, nbytes = read_architecture(file)
    except WeightsError as error:
        yield _unusable(label, owner, str(error))
        return
    if architecture in GGUF_ARCHITECTURES:
        yield Entry(label, None, nbytes, label=label, file=file, owner=owner)


def _unusable(label: str, owner: str, problem: str) -> Entry:
    return Entry(label, None, 0, label=label, owner=owner, problem=problem)


def read_architecture(file: Path) -> tuple[str, int]:
    """Return what a GGUF file says it holds, "" where that does not stand first, and its bytes.

    Raises WeightsError for a file that is not one, or that cannot be read.
    """
    try:
        with open_regular(file) as opened:
            nbytes, head = os.fstat(opened.fileno()).st_size, opened.read(_HEAD)
    except NotRegularError:
        raise WeightsError("it is no regular file") from None
    except OSError as error:
        raise WeightsError(f"it cannot be read: {error.strerror}") from None
    if head[:4] != b"GGUF":
        raise WeightsError("it is not a GGUF file")
    try:
        return _architecture(head), nbytes
    except (struct.error, KeyError, OverflowError, UnicodeDecodeError):  # the head ends before it, or is damaged
        return "", nbytes


def _architecture(head: bytes) -> str:
    version, _, count = struct.unpack_from("<IQQ", head, 4)
    if version not in (2, 3):
        return ""
    at = 24
    for _ in range(min(count, 100)):
        key, at = _text(head, at)
        (kind,) = struct.unpack_from("<I", head, at)
        at += 4
        if key == b"general.architecture" and kind == _STRING:
            return _text(head, at)[0].decode()
        at = _skip(head, at, kind)
    return ""


def _text(head: bytes, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", head, at)
    return head[at + 8 : at + 8 + length], at + 8 + length


def _skip(head: bytes, at: int, kind: int) -> int:
    """Return where the value of this type ends."""
    if kind == _STRING:
        return _text(head, at)[1]
    if kind != _ARRAY:
        return at + _FIXED[kind]
    item: int
    count: int
    item, count = struct.unpack_from("<IQ", head, at)
    at += 12
    if item != _STRING:
        return at + _FIXED[item] * count
    for _ in range(count):
        at = _text(head, at)[1]
    return at
