"""Mistral 7B on a Mac, private and local.

from m7mlx import load, generate

model, tokenizer = load("demo")
print(generate(model, tokenizer, [{"role": "user", "content": "What is the capital of France?"}]))
"""

import m7mlx.cpu.blas  # noqa: F401  first: it has to be there before mlx.core is

# isort: split
from importlib.metadata import version

from m7mlx.answer import Piece, Stats
from m7mlx.batch import BatchCache
from m7mlx.cache import RollingCache, Snapshot
from m7mlx.cache_file import load_cache, save_cache
from m7mlx.config import ModelConfig
from m7mlx.decode import reuse
from m7mlx.embedding import embed
from m7mlx.errors import (
    CacheFileError,
    ChatFormatError,
    ConfigError,
    DiskError,
    DownloadError,
    InputError,
    M7Error,
    NotFoundError,
    PromptTooLongError,
    RollbackError,
    RunError,
    TokenizerError,
    WeightsError,
)
from m7mlx.generation import generate, stream_generate
from m7mlx.loading import load
from m7mlx.logprobs import TokenLogprobs
from m7mlx.lora import set_adapter
from m7mlx.model import Mistral
from m7mlx.quantization import Quantization
from m7mlx.request import Request
from m7mlx.sampling import LogitsProcessor, Sampling
from m7mlx.speculative import DraftModel, PromptLookup, load_draft_model
from m7mlx.tokens.messages import Message
from m7mlx.tokens.tokenizer import Tokenizer

__version__ = version("m7mlx")

__all__ = [
    "BatchCache",
    "CacheFileError",
    "ChatFormatError",
    "ConfigError",
    "DiskError",
    "DownloadError",
    "DraftModel",
    "InputError",
    "LogitsProcessor",
    "M7Error",
    "Message",
    "Mistral",
    "ModelConfig",
    "NotFoundError",
    "Piece",
    "PromptLookup",
    "PromptTooLongError",
    "Quantization",
    "Request",
    "RollbackError",
    "RollingCache",
    "RunError",
    "Sampling",
    "Snapshot",
    "Stats",
    "TokenLogprobs",
    "Tokenizer",
    "TokenizerError",
    "WeightsError",
    "__version__",
    "embed",
    "generate",
    "load",
    "load_cache",
    "load_draft_model",
    "reuse",
    "save_cache",
    "set_adapter",
    "stream_generate",
]
