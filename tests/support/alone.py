"""What a request is answered with when nobody else asks, for tests of answers beside others."""

from __future__ import annotations

from typing import Any

from m7mlx import Piece, Request, stream_generate
from m7mlx.tokens.tokenizer import Tokenizer


def prompt(seed: int, length: int) -> list[int]:
    """Ids of so many tokens, the same for the same seed, with 32,000 in the vocabulary."""
    return [3 + (seed * 7919 + i * i * 31) % 31000 for i in range(length)]


def alone(model: Any, tokenizer: Tokenizer, request: Request, max_kv_size: int | None = None) -> list[Piece]:
    """All pieces of the answer."""
    return list(
        stream_generate(
            model,
            tokenizer,
            list(request.ids),
            cache=model.new_cache(max_kv_size=max_kv_size),
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            stop=request.stop,
            logprobs=request.logprobs,
        )
    )
