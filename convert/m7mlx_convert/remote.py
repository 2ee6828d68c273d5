"""A source that is still on the Hub: enough of it to plan with, without its weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from m7mlx.errors import NotFoundError, WeightsError
from m7mlx.hub import HubOutage, RemoteFile, hub_errors, is_repo_id, list_files, snapshot, weight_files
from m7mlx.safetensors import StoredTensor
from m7mlx_convert.convert import name_of, repo_of
from m7mlx_convert.folder import open_folder
from m7mlx_convert.gguf import open_gguf
from m7mlx_convert.source import Source, shown

_MAX_SIDE = 1 << 40
_GGUF_HEAD = 1 << 24  # bytes; the metadata of a vocabulary of 128,000 takes 8 MB


def open_remote(source: str, revision: str | None) -> Source | None:
    """A Hub repository's model, or a GGUF file's in one, as its headers describe it; its tensors cannot be loaded.

    None for what is here, and where the Hub cannot be reached: then what was downloaded before serves.
    Raises NotFoundError, WeightsError, DownloadError.
    """
    repo = repo_of(source)
    if repo is None or not is_repo_id(repo):
        return None
    with hub_errors(repo, revision):
        try:
            files = list_files(repo, revision)
        except HubOutage:
            return None
        if source.lower().endswith(".gguf"):
            return _gguf(repo, source.split("/", 2)[-1], revision, files)
        names = weight_files(repo, files, "any")
        folder = snapshot(repo, revision, "any", weights=False)
        headers: dict[str, StoredTensor] = {}
        for name in names:
            headers |= _header(repo, name, revision)
    return open_folder(folder, name_of(source), headers)


def _header(repo: str, name: str, revision: str | None) -> dict[str, StoredTensor]:
    """Tensor → where it is stored, from the first kilobytes of a file."""
    from huggingface_hub import HfApi, errors

    try:
        found = HfApi().parse_safetensors_file_metadata(repo, name, revision=revision)
        return {tensor: _stored(Path(name), info) for tensor, info in found.tensors.items()}
    except (errors.SafetensorsParsingError, TypeError, ValueError) as error:
        raise WeightsError(f"{repo}/{name} is damaged: {shown(error)}") from None


def _stored(path: Path, info: Any) -> StoredTensor:
    shape = tuple(info.shape)
    if not all(type(side) is int and 0 <= side < _MAX_SIDE for side in shape):
        raise ValueError(f"{shape} is no shape")
    return StoredTensor(path, str(info.dtype), shape)


def _gguf(repo: str, name: str, revision: str | None, files: dict[str, RemoteFile]) -> Source:
    """The start of the file, in a file of the same size with a hole for the rest."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    if name not in files:
        raise NotFoundError(f"{repo} has no file {name}")
    headers = {**build_hf_headers(), "range": f"bytes=0-{_GGUF_HEAD - 1}"}
    response = get_session().get(hf_hub_url(repo, name, revision=revision), headers=headers, follow_redirects=True)
    hf_raise_for_status(response)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name
        with path.open("wb") as file:
            file.write(response.content[:_GGUF_HEAD])
            file.truncate(files[name].size)
        return open_gguf(path)
