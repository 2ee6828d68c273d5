"""What `from m7mlx import …` offers: held here, so that a change of it is made on purpose."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import mlx.core as mx
import pytest
from models import small_config, small_model

import m7mlx
from m7mlx import errors, load
from m7mlx.batch import BatchCache
from m7mlx.decode import prefill
from m7mlx.errors import InputError
from m7mlx.tokens.tokenizer import Tokenizer

PUBLIC = [
    *("BatchCache", "CacheFileError", "ChatFormatError", "ConfigError", "DiskError", "DownloadError"),
    *("DraftModel", "InputError", "LogitsProcessor", "M7Error", "Message", "Mistral", "ModelConfig"),
    *("NotFoundError", "Piece", "PromptLookup", "PromptTooLongError", "Quantization", "Request"),
    *("RollbackError", "RollingCache", "RunError", "Sampling", "Snapshot", "Stats", "TokenLogprobs"),
    *("Tokenizer", "TokenizerError", "WeightsError", "__version__", "embed", "generate", "load"),
    *("load_cache", "load_draft_model", "reuse", "save_cache", "set_adapter", "stream_generate"),
]
# Of a store, of a server that is busy, of a worker: an app's, or turned into one of the others.
OWN = {"BusyError", "StoreError", "WorkerError", "WorkerTimeError", "WorkerMemoryError", "WorkerDiedError"}
DOCS = Path(m7mlx.__file__).parents[1] / "docs"


def test_the_public_names_are_these_and_sorted() -> None:
    assert m7mlx.__all__ == PUBLIC == sorted(PUBLIC)
    assert all(hasattr(m7mlx, name) for name in PUBLIC)
    assert m7mlx.__version__ == importlib.metadata.version("m7mlx")


def test_every_error_that_can_be_caught_is_public() -> None:
    found = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert found - OWN <= set(PUBLIC)


def test_no_module_has_the_name_of_something_public() -> None:
    assert [name for name in PUBLIC if importlib.util.find_spec(f"m7mlx.{name}")] == []


def test_the_reference_shows_all_of_it() -> None:
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: m7mlx\.(\w+)$", page, re.MULTILINE))
    assert shown == set(PUBLIC) - {"__version__"}


# --- repr -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [7, None])
def test_a_model_and_its_caches_say_in_a_line_what_they_are(window: int | None) -> None:
    model = small_model(small_config(sliding_window=window))
    n = model.config.n_weights
    shown = f"window {window}" if window else "no window"
    assert repr(model) == f"Mistral({n:,} parameters, 3 layers of 48, {shown}, {n * 4 / 1e9:.2f} GB for float32)"
    model.changed_by("my\nlora")
    assert repr(model).endswith(r", adapter 'my\nlora')")
    cache = model.new_cache()
    prefill(model, list(range(12)), cache)
    kept = "window 7 + slack 8" if window else "all tokens"
    assert repr(cache) == f"RollingCache(12 tokens, {kept}, 3 layers of 2 × 16, {cache.nbytes / 1e6:.1f} MB)"
    batch = BatchCache([cache, cache])
    assert repr(batch).startswith(f"BatchCache(2 rows of 12, 12 tokens, {kept}")


def test_a_stored_cache_says_its_bits() -> None:
    model = small_model(small_config(head_dim=32, sliding_window=None))
    cache = model.new_cache(kv_bits=8, kv_group_size=32, max_kv_size=20, sinks=2)
    assert (
        repr(cache) == "RollingCache(0 tokens, window 18 + slack 8 + 2 sinks, 3 layers of 2 × 32 in 8 bits, 0.0 MB)"
    )


def test_a_tokenizer_says_what_it_is(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = mistral_tokenizers["v3"]
    assert repr(tokenizer) == "SentencePieceTokenizer(32,768 tokens, start 1, end 2)"
    assert repr(tokenizer.chat) == "MistralFormat(v3)"


# --- arguments ------------------------------------------------------------------------------------


def test_a_dtype_by_its_name(model_folder: Path) -> None:
    assert load(model_folder, dtype="bfloat16")[0].dtype == mx.bfloat16
    for wrong in ("float8", "int32", mx.int32, 16):
        with pytest.raises(InputError, match="dtype must be one of float16, bfloat16, float32, not"):
            load(model_folder, dtype=wrong)  # type: ignore[arg-type]
