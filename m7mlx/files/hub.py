"""Name → folder or file: a path, an alias, a Hub repository, a GGUF file in one, or the demo model."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, NamedTuple

from m7mlx.errors import DiskError, DownloadError, NotFoundError, WeightsError
from m7mlx.files.checksums import MANIFEST, matches
from m7mlx.files.converter import converted
from m7mlx.files.demo import demo, here
from m7mlx.files.jsonfile import said
from m7mlx.files.weights import ADAPTERS, adapter_advice, folder_weights, is_model_file, refuse_adapter

ALIASES = {
    "mistral": "mlx-community/Mistral-7B-Instruct-v0.3-4bit",
    "mistral-v0.3": "mlx-community/Mistral-7B-Instruct-v0.3-4bit",
    "mistral-v0.2": "mlx-community/Mistral-7B-Instruct-v0.2-4bit",
}
DEMO = "demo"
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_REPO_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([^\0]+\.gguf)", re.IGNORECASE)
# What a model needs besides its weights: config, tokenizer, chat template, licence, checksums; no code, no pickle.
_SMALL = ("*.json", "tokenizer.model*", "*.jinja", "README.md", "LICENSE*", MANIFEST)
_PICKLE = (".bin", ".pth", ".pt", ".pkl", ".ckpt")
# What has to be here to do without a network; of a repository that has both layouts only one was fetched.
_OFFLINE, _NOT_OFFLINE = [*_SMALL, "*.safetensors"], ["consolidated*", "*/*"]
Layout = Literal["huggingface", "any", "adapter"]
Progress = Callable[[int, int], None]


class HubOutage(DownloadError):
    """The Hub cannot be reached, or does not answer now."""


class RemoteFile(NamedTuple):
    """A file of a repository: bytes, and for the large ones the SHA-256 that it is stored under."""

    size: int
    sha256: str | None


def resolve(
    name: str | Path, revision: str | None = None, layout: Layout = "huggingface", progress: Progress | None = None
) -> Path:
    """The folder that a name stands for; downloads what is not here yet, with progress on stderr.

    A path that exists comes first, then "demo", the aliases, Hub repositories "org/name" and GGUF files in them,
    "org/name/file.gguf". A GGUF file is converted once, into the cache folder (`m7mlx.files.converter`). `layout`
    "any" gives the file itself, and takes weights in Mistral's own layout, too: for the converter. "adapter" takes a
    LoRA adapter, which is refused otherwise.
    `progress` is called with (bytes here, bytes in all) of a repository's large files.
    Raises NotFoundError, WeightsError, DownloadError, DiskError.
    """
    text = str(name)
    if (path := existing(name)) is not None:
        if layout != "adapter":
            refuse_adapter(path)
        return converted(path) if layout == "huggingface" and path.is_file() else path
    if text == DEMO:
        return demo()
    repo = ALIASES.get(text, text)
    file = _repo_file(text)
    if file is not None:
        path = _gguf(*file, revision)
        return converted(path) if layout == "huggingface" else path
    if not _is_repo(text):
        known = ", ".join([DEMO, *ALIASES])
        raise NotFoundError(f"{said(text)} is no folder here, no Hub repository (org/name) and no alias ({known})")
    return snapshot(repo, revision, layout, progress=progress)


def check_name(name: str) -> None:
    """Raise NotFoundError, as `resolve` would, for a name that is nothing here and can be nothing elsewhere."""
    if existing(name) is None and name != DEMO and not _is_repo(name) and _repo_file(name) is None:
        resolve(name)


def _is_repo(name: str) -> bool:
    return not name.startswith(("/", ".", "~")) and is_repo_id(ALIASES.get(name, name))


def _repo_file(name: str) -> tuple[str, str] | None:
    """The repository and the GGUF file in it that a name stands for."""
    match = None if name.startswith(("/", ".", "~")) else _REPO_FILE.fullmatch(name)
    return (match[1], match[2]) if match and is_repo_id(match[1]) else None


def local(name: str | Path) -> Path | None:
    """The folder that a name stands for if all of it is on this machine; None if it would have to be fetched."""
    text = str(name)
    try:
        if (path := existing(name)) is not None:
            return path
    except NotFoundError:
        return None
    if text == DEMO:
        return here()
    if not _is_repo(text):
        return None
    try:
        folder = _here(ALIASES.get(text, text), None, HubOutage(""))
        folder_weights(folder)
        return folder if (folder / "config.json").is_file() else None
    except (HubOutage, WeightsError, OSError, ValueError):  # what lies in a cache may be anything
        return None


def is_repo_id(text: str) -> bool:
    """Whether it has the form "org/name", as the Hub's rules for names have it."""
    from huggingface_hub import errors
    from huggingface_hub.utils._validators import validate_repo_id

    if not _REPO_ID.fullmatch(text):
        return False
    try:
        validate_repo_id(text)
    except errors.HFValidationError:
        return False
    return True


def existing(name: str | Path) -> Path | None:
    """The file or folder of this name, if there is one. Raises NotFoundError where that cannot be told."""
    try:
        path = Path(os.path.expanduser(name))
        return path if str(name) and path.exists() else None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM):
            raise NotFoundError(f"{said(str(name))} may not be read: {os.strerror(errno.EACCES)}") from None
        return None  # too long for a path, or no path at all


def snapshot(
    repo: str,
    revision: str | None = None,
    layout: Layout = "huggingface",
    *,
    weights: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Download what a model needs of a repository into the Hub's own cache, and check every checksum.

    A download that was broken off, by whatever, is gone on with. `weights=False` leaves those out. Without a
    network, what is here already serves.
    """
    from huggingface_hub import snapshot_download

    from m7mlx.files.download import clean, fetch_blob

    with hub_errors(repo, revision):
        try:
            files = list_files(repo, revision)
        except HubOutage as outage:
            folder = _here(repo, revision, outage)
        else:
            wanted = _small(files) + (weight_files(repo, files, layout) if weights else [])
            clean(repo)
            large = [name for name in wanted if files[name].sha256]
            advance = _counter(sum(files[name].size for name in large), progress)
            for name in large:
                fetch_blob(repo, name, revision, files[name], advance)
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    _check_blobs(folder)
    return folder


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total)

    return advance


def _here(repo: str, revision: str | None, outage: HubOutage) -> Path:
    """The snapshot that was downloaded before. Raises the outage if there is none, or not all of it."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                local_files_only=True,
                allow_patterns=_OFFLINE,
                ignore_patterns=_NOT_OFFLINE,
            )
        )
    except errors.LocalEntryNotFoundError:
        raise outage from None
    if folder.parent.name != "snapshots":  # what the cache calls the newest revision is none
        raise outage
    return folder


def list_files(repo: str, revision: str | None = None) -> dict[str, RemoteFile]:
    """Name → file of a repository. Raises HubOutage, and what `hub_errors` understands."""
    from huggingface_hub import HfApi, errors

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except (errors.OfflineModeIsEnabled, _transport_error()) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 429 or (status or 500) >= 500:
            raise HubOutage(_outage(repo, status)) from None
        raise
    return {
        file.rfilename: RemoteFile(file.size or 0, file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or []
    }


def _outage(repo: str, status: int | None) -> str:
    if status is None:
        return f"cannot reach the Hub for {repo}, and it has not been downloaded before; check the network"
    if status == 429:
        return f"the Hub asks to wait (too many requests for {repo}); run the command again later"
    return f"the Hub does not answer ({status}), and {repo} has not been downloaded before; try again later"


def _small(files: Mapping[str, RemoteFile]) -> list[str]:
    return [name for name in files if "/" not in name and any(fnmatch(name, pattern) for pattern in _SMALL)]


def weight_files(repo: str, files: Mapping[str, RemoteFile], layout: Layout) -> list[str]:
    """The weight files to fetch. Raises WeightsError where there are none that can be used."""
    found = [name for name in files if "/" not in name and name.endswith(".safetensors")]
    if layout == "adapter":
        if adapters := [name for name in ADAPTERS if name in files]:
            return adapters
        raise WeightsError(f"{repo} holds no adapter ({' or '.join(ADAPTERS)})")
    if "adapter_config.json" in files and not any(is_model_file(name) for name in found):
        raise WeightsError(adapter_advice(repo))
    ours = [name for name in found if not name.startswith("consolidated")]
    if ours:
        return ours
    if found and layout == "any":
        return found
    if found:
        raise WeightsError(f"{repo} has weights in Mistral's own layout only; convert it: m7mlx-convert {repo}")
    if ggufs := sorted(name for name in files if name.lower().endswith(".gguf")):
        raise WeightsError(f"{repo} holds GGUF files; name one: {_listed(repo, ggufs)}")
    if any(name.endswith(_PICKLE) for name in files):
        raise WeightsError(
            f"{repo} has only pickle weights, which can run code; take a repository with safetensors, or load it "
            "with transformers and save it again (save_pretrained)"
        )
    raise WeightsError(f"{repo} has no weights (*.safetensors)")


def _listed(repo: str, names: Sequence[str]) -> str:
    shown = " or ".join(f"{repo}/{name}" for name in names[:4])
    return shown + (f" or one of {len(names) - 4} more" if len(names) > 4 else "")


def _gguf(repo: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, hf_hub_download

    from m7mlx.files.download import clean, fetch_blob

    with hub_errors(repo, revision):
        try:
            files = list_files(repo, revision)
        except HubOutage as outage:
            try:
                path = Path(hf_hub_download(repo, name, revision=revision, local_files_only=True))
            except errors.LocalEntryNotFoundError:
                raise outage from None
        else:
            if name not in files:
                ggufs = sorted(other for other in files if other.lower().endswith(".gguf"))
                raise NotFoundError(f"{repo} has no file {name}; it has {', '.join(ggufs[:8]) or 'no GGUF files'}")
            clean(repo)
            fetch_blob(repo, name, revision, files[name])
            path = Path(hf_hub_download(repo, name, revision=revision))
    _check_blob(path)
    return path


def quiet() -> None:
    """No progress bars and no warnings of downloads, from here on."""
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    logging.set_verbosity_error()


# --- what can go wrong ----------------------------------------------------------------------------------


def _transport_error() -> type[Exception]:
    """The HTTP library's own base class, whichever that library is (httpx, httpx2)."""
    from huggingface_hub import errors

    base: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    return base


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """What huggingface_hub raises, as one line with what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise NotFoundError(
            f"{repo} is gated: accept its licence on https://huggingface.co/{repo}, then log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise NotFoundError(f"the Hub has no repository {repo} (or it is private: `hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise NotFoundError(f"{repo} has no revision {revision}") from None
    except errors.HFValidationError as error:
        raise NotFoundError(f"{repo!r} is not a repository id: {error}") from None
    except errors.LocalEntryNotFoundError:
        raise DownloadError(_outage(repo, None)) from None
    except (_transport_error(), OSError) as error:
        raise _failure(repo, error) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # an answer, or a cache, that is none
        raise DownloadError(f"what is known of {repo} cannot be understood ({said(str(error))}); try again") from None


def _failure(repo: str, error: Exception) -> Exception:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return NotFoundError(f"the Hub does not let you read {repo}; log in with `hf auth login`")
    if status == 429:
        return DownloadError(_outage(repo, status))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError("the disk is full; make room, then run the command again to resume")
    cause = (str(error).splitlines() or [type(error).__name__])[0]
    return DownloadError(f"downloading {repo} failed ({cause}); run the command again to resume")


def _check_blobs(folder: Path) -> None:
    """Compare each large file with the SHA-256 it is stored under, once for each state of the file."""
    for file in sorted(folder.iterdir()):
        _check_blob(file)


def _check_blob(file: Path) -> None:
    blob = file.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and not matches(blob, blob.name):
        blob.unlink()
        raise DownloadError(f"{file.name} is not what the Hub promised (wrong SHA-256) and was removed; try again")
