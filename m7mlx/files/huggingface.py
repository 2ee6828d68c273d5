"""What is used of huggingface_hub beyond its documentation, in one place.

Two things: how its cache is laid out, so that a file fetched here is taken as its own, and its
download of one file, which resumes where the documented functions do not. All else is imported from
its public modules. Each import stands where it is used: 0.4 s, which models on this machine do not
need.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO


def find_storage(repo: str) -> Path:
    """Return the folder of a repository in the Hub's cache, which need not be there yet."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def find_lock(repo: str, etag: str) -> Path:
    """Return the lock file that processes hold while they write one blob of a repository."""
    storage = find_storage(repo)
    return storage.parent / ".locks" / storage.name / f"{etag}.lock"


def fetch_rest(
    url: str,
    file: BinaryIO,
    *,
    done: int,
    size: int,
    headers: dict[str, str],
    name: str,
) -> None:
    """Append to `file` what comes after its first `done` bytes, with progress and retries.

    Raises what huggingface_hub raises.
    """
    from huggingface_hub.file_download import http_get

    http_get(url, file, resume_size=done, headers=headers, expected_size=size, displayed_filename=name)


def transport_error() -> type[Exception]:
    """Return the base class of what the HTTP library raises, whichever that is (httpx, httpx2)."""
    from huggingface_hub import errors

    base: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    return base
