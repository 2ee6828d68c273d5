"""One repository of the Hub: what is in it, what of it a model needs, and fetching that."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from m7mlx.errors import DiskError, DownloadError, NotFoundError, WeightsError
from m7mlx.files.checksums import MANIFEST, matches
from m7mlx.files.download import RemoteFile, fetch_blob, remove_leftovers
from m7mlx.files.huggingface import transport_error
from m7mlx.files.weights import ADAPTERS, adapter_advice, is_model_file
from m7mlx.jsonfile import said

# huggingface_hub is imported where it is used: 0.4 s, which models on this machine do not need.

# What a model needs besides its weights: config, tokenizer, chat template, licence, checksums; no
# code, no pickle.
_SMALL = ("*.json", "tokenizer.model*", "*.jinja", "README.md", "LICENSE*", MANIFEST)
_PICKLE = (".bin", ".pth", ".pt", ".pkl", ".ckpt")
# What has to be here to do without a network; of a repository that has both layouts only one was
# fetched.
_OFFLINE, _NOT_OFFLINE = [*_SMALL, "*.safetensors"], ["consolidated*", "*/*"]
Layout = Literal["huggingface", "any", "adapter"]
Progress = Callable[[int, int], None]


class HubOutage(DownloadError):
    """The Hub cannot be reached, or does not answer now."""


def fetch_snapshot(
    repo: str,
    revision: str | None = None,
    layout: Layout = "huggingface",
    *,
    weights: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Download what a model needs of a repository into the Hub's cache, and check every checksum.

    weights   False leaves the weights out
    progress  as for `m7mlx.files.hub.resolve`

    A download that was broken off is resumed. Without a network, what was fetched before is taken.
    Raises NotFoundError, WeightsError, DownloadError, DiskError.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(repo, revision):
        try:
            files = list_files(repo, revision)
        except HubOutage as outage:
            folder = find_snapshot(repo, revision, outage)
        else:
            wanted = _small(files) + (weight_files(repo, files, layout) if weights else [])
            remove_leftovers(repo)
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


def find_snapshot(repo: str, revision: str | None, outage: HubOutage) -> Path:
    """Return the snapshot that was downloaded before. Raises `outage` if there is no whole one."""
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
    """Return the files of a repository by name. Raises HubOutage, and what `hub_errors` reads."""
    from huggingface_hub import HfApi, errors

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except (errors.OfflineModeIsEnabled, transport_error()) as error:
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
    """Return the weight files to fetch. Raises WeightsError where none of them can be used."""
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


def find_gguf(repo: str, name: str) -> Path | None:
    """Return a GGUF file of a repository if it was downloaded before."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, local_files_only=True))
    except (errors.LocalEntryNotFoundError, OSError, ValueError):  # what lies in a cache may be anything
        return None


def fetch_gguf(
    repo: str,
    name: str,
    revision: str | None,
    progress: Progress | None = None,
) -> Path:
    """Download a GGUF file into the Hub's cache; arguments and errors as for `fetch_snapshot`."""
    from huggingface_hub import errors, hf_hub_download

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
            remove_leftovers(repo)
            fetch_blob(repo, name, revision, files[name], _counter(files[name].size, progress))
            path = Path(hf_hub_download(repo, name, revision=revision))
    _check_blob(path)
    return path


def silence_downloads() -> None:
    """Turn progress bars and warnings of downloads off, from here on."""
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()


# --- what can go wrong ----------------------------------------------------------------------------


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one of our errors, which says what to do."""
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
    except (transport_error(), OSError) as error:
        raise _failure(repo, error) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # malformed data
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
    """Compare each large file with the SHA-256 it is stored under, once for each of its states."""
    for file in sorted(folder.iterdir()):
        _check_blob(file)


def _check_blob(file: Path) -> None:
    blob = file.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and not matches(blob, blob.name):
        blob.unlink()
        raise DownloadError(f"{file.name} is not what the Hub promised (wrong SHA-256) and was removed; try again")
