"""The documents of a file: a text, or the texts of a data set."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from m7mlx.errors import InputError
from m7mlx.paths import user_path

_CHARACTERS = 32  # a token seldom has more: of a text of gigabytes only the start is read


def read_documents(name: str, field: str, tokens: int | None = None) -> Iterator[str]:
    """Yield the documents of a file: many of a data set (.jsonl, .json, .parquet), else one.

    name    a path, or "-" for a text on stdin
    field   where a data set keeps its texts
    tokens  how many will be looked at in all: of a text no more than needed is read

    Raises InputError for a file that cannot be read, or without such a field.
    """
    path = user_path(name)
    kind = "" if name == "-" else path.suffix.lower()
    try:
        if kind == ".parquet":
            yield from _parquet(path, field)
        elif kind in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8") as lines:
                yield from _texts(name, _objects(name, lines), field)
        elif kind == ".json":
            yield from _texts(name, _listed(name, json.loads(path.read_text(encoding="utf-8"))), field)
        elif name == "-":
            yield _start(sys.stdin, tokens)
        else:
            with path.open(encoding="utf-8") as stream:
                yield _start(stream, tokens)
    except UnicodeDecodeError:
        raise InputError(f"{name} is no text (UTF-8)") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is no JSON ({error})") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from None


def _start(stream: TextIO, tokens: int | None) -> str:
    return stream.read(-1 if tokens is None else tokens * _CHARACTERS)


def _objects(name: str, lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{name}, line {number} is no JSON ({error})") from None


def _listed(name: str, data: Any) -> list[Any]:
    if isinstance(data, Mapping):
        return [data]
    if isinstance(data, list):
        return data
    raise InputError(f"{name} holds neither an object nor a list of objects")


def _texts(name: str, items: Iterable[Any], field: str) -> Iterator[str]:
    for number, item in enumerate(items, 1):
        text = item.get(field) if isinstance(item, Mapping) else None
        if not isinstance(text, str):
            known = ", ".join(islice((k for k, v in item.items() if isinstance(v, str)), 9)) if _is(item) else "none"
            raise InputError(f"{name}: object {number} has no text {field!r}; choose with --field, of: {known}")
        yield text


def _is(item: Any) -> bool:
    return isinstance(item, Mapping) and bool(item)


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path}: Parquet files need pyarrow: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if field not in names:
            raise InputError(f"{path} has no column {field!r}; choose with --field, of: {', '.join(names[:9])}")
        for batch in file.iter_batches(256, columns=[field]):
            yield from _texts(str(path), batch.to_pylist(), field)
    except ArrowException as error:
        raise InputError(f"{path} cannot be read: {error}") from None
