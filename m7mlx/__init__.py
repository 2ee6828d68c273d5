"""Mistral 7B on a Mac, private and local.

from m7mlx import load, generate

model, tokenizer = load("demo")
print(generate(model, tokenizer, [{"role": "user", "content": "What is the capital of France?"}]))
"""

import m7mlx.cpu.blas  # noqa: F401  first: it has to be there before mlx.core is

# isort: split
from m7mlx.batch import BatchCache
from m7mlx.cache import RollingCache
from m7mlx.cache_file import load_cache, save_cache
from m7mlx.config import ModelConfig
from m7mlx.decode import reuse
from m7mlx.errors import M7Error
from m7mlx.generation import Piece, Stats, generate, stream_generate
from m7mlx.loading import load
from m7mlx.lora import set_adapter
from m7mlx.model import Mistral
from m7mlx.quantization import Quantization
from m7mlx.sampling import Sampling
from m7mlx.speculative import DraftModel, PromptLookup, load_draft_model
from m7mlx.tokens.tokenizer import Tokenizer

__all__ = [
    "BatchCache",
    "DraftModel",
    "M7Error",
    "Mistral",
    "ModelConfig",
    "Piece",
    "PromptLookup",
    "Quantization",
    "RollingCache",
    "Sampling",
    "Stats",
    "Tokenizer",
    "generate",
    "load",
    "load_cache",
    "load_draft_model",
    "reuse",
    "save_cache",
    "set_adapter",
    "stream_generate",
]
