"""Uploading a result to the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, errors
from huggingface_hub.utils import validate_repo_id

from m7mlx.errors import InputError, RunError
from m7mlx_convert.progress import Reporter


def check_upload(repo: str) -> None:
    """Raise InputError, before hours of work, if the user cannot write to a repository `repo`."""
    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise InputError(f"{repo!r} is no name for a repository: {error}") from None
    owner, _, name = repo.partition("/")
    if not name:
        raise InputError(f"{repo!r} names no owner; write ORG/NAME")
    try:
        user = HfApi().whoami()
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status not in (None, 401, 403):
            raise RunError(f"the Hub does not answer ({status}); try again later") from None
        raise InputError("uploading needs a token that may write: log in with `hf auth login`") from None
    except OSError as error:
        raise RunError(f"cannot reach the Hub to upload ({_line(error)}); check the network") from None
    owners = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if owner not in owners:
        raise InputError(f"{user['name']}, who is logged in, cannot write to {owner}, but to {', '.join(owners)}")


def upload(folder: Path, repo: str, reporter: Reporter) -> str:
    """Upload a whole folder, to a new repository if need be; return its address.

    Raises RunError; the folder stays, and what has arrived is not sent again.
    """
    api = HfApi()
    reporter.note(f"uploading {folder} to {repo}")
    try:
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Made with m7mlx-convert", ignore_patterns=[".*"]
        )
    except (OSError, ValueError) as error:  # all of huggingface_hub's are one of these
        raise RunError(
            f"uploading to {repo} failed ({_line(error)}); {folder} is complete: hf upload {repo} {folder}"
        ) from None
    return f"{api.endpoint}/{repo}"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
