"""Ask the Hub which models there are, in a process of its own.

    python -m m7mlx_chat.hub_search search WORDS
    python -m m7mlx_chat.hub_search files org/name

The chat reads one JSON object from it, and can kill it at any moment: huggingface_hub itself waits
for the Hub without an end.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from m7mlx.errors import DownloadError, M7Error, WeightsError
from m7mlx.files.hub import is_repo_id
from m7mlx.files.huggingface import transport_error
from m7mlx.files.repository import hub_errors, list_files, weight_files
from m7mlx.terminal import print_event

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

# huggingface_hub is imported where it is used: 0.4 s, which the chat itself does not need.

Form = Literal["MLX", "GGUF", "safetensors"]
_ARCHITECTURES = ("mistral", "mistral3", "ministral", "ministral3")  # as config.json names them
_FAMILY = "stral"  # in the names of GGUF files: Mistral, Ministral, Devstral, Codestral, …
GGUF_ARCHITECTURES = ("llama", "mistral3")  # what llama.cpp calls models of the kind that we convert
# Nothing reads the first ones here; the others come from formats that are no whole model.
_REFUSED = {"bitsandbytes", "exl2", "exl3", "onnx", "openvino", "peft", "lora", "adapter"}
_PACKED = {"awq", "gptq", "fp8", "compressed-tensors"}  # converted before they are used
_EACH = 40  # models of each architecture
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2}  # others: 1
_NOT_A_MODEL = re.compile(r"mmproj|imatrix|-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)


@dataclass(frozen=True)
class Offer:
    """A model on the Hub.

    nbytes      of its weights; 0 where only its list of files tells
    parameters  how many numbers are stored; 0 where that is not known
    form        what it is made for
    is_packed   its weights have to be converted before they are used
    is_full     its weights are not quantised
    is_gated    its licence has to be accepted on the Hub
    """

    repo: str
    nbytes: int
    parameters: int
    downloads: int
    form: Form
    is_packed: bool
    is_full: bool
    is_gated: bool


class Files(NamedTuple):
    """What a repository holds of a model.

    nbytes     of the weights that would be fetched; 0 where there are none
    is_native  they lie in Mistral's own layout, which has to be converted
    ggufs      its GGUF files, and their sizes
    """

    nbytes: int
    is_native: bool
    ggufs: dict[str, int]


def search(text: str) -> list[Offer]:
    """Return the models whose name has these words, the most downloaded first.

    Raises DownloadError.
    """
    from huggingface_hub import HfApi

    api, found = HfApi(), dict[str, Offer]()
    for tag in (*_ARCHITECTURES, "gguf"):
        with _errors():
            for model in api.list_models(
                search=text,
                filter=tag,
                sort="downloads",
                limit=_EACH,
                expand=["config", "downloads", "gated", "gguf", "safetensors", "tags"],
            ):
                offer = _offer(model)
                if offer is not None:
                    found.setdefault(offer.repo, offer)
    return sorted(found.values(), key=lambda offer: -offer.downloads)


def _offer(model: ModelInfo) -> Offer | None:
    """Return a model that can be used here; None for any other."""
    tags = {str(tag) for tag in model.tags or []}
    if not is_repo_id(model.id) or tags & _REFUSED or any(tag.startswith("base_model:adapter:") for tag in tags):
        return None
    if "gguf" in tags:
        about: dict[str, Any] = model.gguf if isinstance(model.gguf, dict) else {}
        if _FAMILY not in model.id.lower() or about.get("architecture") not in GGUF_ARCHITECTURES:
            return None
        return _made(model, "GGUF", 0, _count(about.get("total")), is_packed=True, is_full=False)
    config: dict[str, Any] = model.config if isinstance(model.config, dict) else {}
    if not tags.union([str(config.get("model_type"))]).intersection(_ARCHITECTURES) or "safetensors" not in tags:
        return None
    stored = model.safetensors.parameters if model.safetensors else {}
    counts = {str(kind): _count(count) for kind, count in stored.items()}
    nbytes = sum(count * _BYTES.get(kind, 1) for kind, count in counts.items())
    is_packed = bool(tags & _PACKED)
    is_full = bool(counts) and not is_packed and counts.keys() <= {"F64", "F32", "BF16", "F16"}
    form: Form = "MLX" if "mlx" in tags else "safetensors"
    return _made(model, form, nbytes, sum(counts.values()), is_packed=is_packed, is_full=is_full)


def _made(model: ModelInfo, form: Form, nbytes: int, parameters: int, *, is_packed: bool, is_full: bool) -> Offer:
    downloads, gated = _count(model.downloads), bool(model.gated)
    return Offer(model.id, nbytes, parameters, downloads, form, is_packed, is_full, gated)


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value < 1 << 50 else 0


def find_files(repo: str) -> Files:
    """Return what a repository holds of a model. Raises M7Error where that cannot be used."""
    with hub_errors(repo, None):
        files = list_files(repo)
    ggufs = {name: file.size for name, file in files.items() if name.lower().endswith(".gguf")}
    ggufs = {name: size for name, size in ggufs.items() if not _NOT_A_MODEL.search(name)}
    try:
        names, is_native = weight_files(repo, files, "huggingface"), False
    except WeightsError:
        if not ggufs:
            names, is_native = weight_files(repo, files, "any"), True
        else:
            names, is_native = [], False
    return Files(sum(files[name].size for name in names), is_native, ggufs)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what huggingface_hub raises while it searches into DownloadError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise DownloadError("HF_HUB_OFFLINE is set: the Hub is not asked") from None
    except (transport_error(), OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None:
            raise DownloadError("cannot reach the Hub; check the network") from None
        if status == 429:
            raise DownloadError("the Hub asks to wait (too many requests); try again later") from None
        raise DownloadError(f"the Hub does not search now ({status}); try again later") from None
    except (ValueError, TypeError, KeyError, AttributeError):  # malformed data
        raise DownloadError("the Hub's answer cannot be understood; try again later") from None


def main(kind: str, text: str) -> int:
    """Ask the Hub and print what it answers; return the exit status."""
    try:
        if kind == "search":
            print_event("result", offers=[asdict(offer) for offer in search(text)])
        else:
            print_event("result", **find_files(text)._asdict())
    except M7Error as error:
        print_event("error", message=" ".join(str(error).split()))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2]))
