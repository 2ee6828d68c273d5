"""A source that is still on the Hub, opened without its weights: enough to plan with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from m7mlx.errors import NotFoundError, WeightsError
from m7mlx.files.download import RemoteFile
from m7mlx.files.hub import is_repo_id
from m7mlx.files.repository import HubOutage, fetch_snapshot, hub_errors, list_files, weight_files
from m7mlx.files.weights import StoredTensor, validate_header
from m7mlx.terminal import shown
from m7mlx_convert.folder import open_folder
from m7mlx_convert.gguf import open_gguf
from m7mlx_convert.opening import find_repo, name_model
from m7mlx_convert.source import Source

_HEAD = 1 << 17  # bytes; the header of most files is less
_MAX_HEADER = 100_000_000  # as in the safetensors library
_PIECE = 1 << 16
_GGUF_HEAD = 1 << 24  # bytes; the metadata of a vocabulary of 128,000 takes 8 MB


def open_remote(source: str, revision: str | None) -> Source | None:
    """Open a Hub repository, or a GGUF file in one, from its headers; its tensors cannot be read.

    Returns None for what is here, and where the Hub cannot be reached: then what was downloaded
    before serves. Raises NotFoundError, WeightsError, DownloadError.
    """
    repo = find_repo(source)
    if repo is None or not is_repo_id(repo):
        return None
    with hub_errors(repo, revision):
        try:
            files = list_files(repo, revision)
        except HubOutage:
            return None
        if source.lower().endswith(".gguf"):
            return _open_gguf(repo, source.split("/", 2)[-1], revision, files)
        names = weight_files(repo, files, "any")
        folder = fetch_snapshot(repo, revision, "any", weights=False)
        headers: dict[str, StoredTensor] = {}
        for name in names:
            headers |= _read_header(repo, name, revision, files[name].size, folder)
    return open_folder(folder, name_model(source), headers)


def _read_header(repo: str, name: str, revision: str | None, size: int, folder: Path) -> dict[str, StoredTensor]:
    """Read a file's header: tensor → where in `folder` it will be stored."""
    start = _fetch_start(repo, name, revision, _HEAD)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > _MAX_HEADER:
        raise WeightsError(f"{repo}/{name} is damaged: it does not begin with a header")
    if 8 + length > len(start):
        start = _fetch_start(repo, name, revision, 8 + length)
    with _sparse_file(name, start[: 8 + length], size) as path:
        try:
            return {
                tensor: StoredTensor(folder / name, *info, tensor) for tensor, info in validate_header(path).items()
            }
        except WeightsError as error:
            raise WeightsError(f"{repo}/{name} is damaged: {shown(error)}") from None


def _open_gguf(repo: str, name: str, revision: str | None, files: dict[str, RemoteFile]) -> Source:
    """Open a GGUF file from its header. Raises NotFoundError, and what `open_gguf` raises."""
    if name not in files:
        raise NotFoundError(f"{repo} has no file {name}")
    with _sparse_file(name, _fetch_start(repo, name, revision, _GGUF_HEAD), files[name].size) as path:
        return open_gguf(path)


def _fetch_start(repo: str, name: str, revision: str | None, count: int) -> bytes:
    """Fetch the first bytes of a file; where a mirror sends all of it, the rest is not read."""
    # Packed, a few bytes could become many.
    headers = {**build_hf_headers(), "range": f"bytes=0-{count - 1}", "accept-encoding": "identity"}
    url = hf_hub_url(repo, name, revision=revision)
    data = bytearray()
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        for piece in response.iter_raw(_PIECE):
            data += piece
            if len(data) >= count:
                break
    return bytes(data[:count])


@contextmanager
def _sparse_file(name: str, start: bytes, size: int) -> Iterator[Path]:
    """Make a file of the true size with a hole for all but its start."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name
        with path.open("wb") as file:
            file.write(start)
            file.truncate(size)
        yield path
