"""Memory of a cache whose layers have a window in part, against one without any window.

    python benchmarks/mixed_cache.py [--tokens 131072] [--kv-heads 1]

The cache has the shape of Ministral 8B's: 36 layers, of which every fourth sees everything and the
others the last 32,768 tokens, heads of 128; by default one of its eight KV heads, in 16 bits. The
model around it is small and random. The rings are filled with zeros up to a chunk before the end;
the last 128 tokens and 8 more are real passes, as in a chat.
"""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before mlx.core is imported

# isort: split
import argparse
from dataclasses import replace

import mlx.core as mx
from common import machine_line, table

from m7mlx import Mistral
from m7mlx.config import ModelConfig
from m7mlx.memory import UNDO_SLACK

CHUNK, FILL = 128, 8192
SHAPE = ModelConfig(
    model_type="ministral",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    n_layers=36,
    n_heads=4,
    n_kv_heads=1,
    head_dim=128,
    norm_eps=1e-5,
    rope_theta=1e8,
    max_position_embeddings=1 << 18,
    sliding_window=32768,
    tie_word_embeddings=False,
    layer_types=("full_attention", *["sliding_attention"] * 3) * 9,
)


def measure(config: ModelConfig, tokens: int) -> tuple[int, int]:
    """Return the bytes of keys and values at so many tokens, and what MLX holds for them."""
    model = Mistral(config)
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    cache = model.new_cache(slack=UNDO_SLACK, kv_bits=16)
    filled = tokens - CHUNK
    for ring in cache.rings:
        for start in range(max(0, filled - (ring.window or filled)), filled, FILL):
            rows = mx.zeros((1, config.n_kv_heads, min(FILL, filled - start), config.head_dim), mx.float16)
            ring.write((rows, rows), start)
            mx.eval(ring.arrays)
    cache.positions = cache.positions.at(filled)
    for length in (CHUNK, *[1] * 8):
        mx.eval(model(mx.array([[1] * length]), cache), cache.arrays)
    mx.clear_cache()
    return cache.nbytes, mx.get_active_memory() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--kv-heads", type=int, default=1)
    args = parser.parse_args()
    mixed = replace(SHAPE, n_kv_heads=args.kv_heads, n_heads=4 * args.kv_heads)
    print(machine_line(), f"· {args.tokens:,} tokens, {args.kv_heads} KV heads of {mixed.head_dim}, 16 bits")
    rows, first = [], 0
    for name, config in (
        ("all layers", replace(mixed, model_type="mistral", sliding_window=None, layer_types=())),
        ("every fourth layer", mixed),
        ("no layer", replace(mixed, model_type="mistral", layer_types=())),
    ):
        nbytes, active = measure(config, args.tokens)
        first = first or nbytes
        rows.append([name, f"{nbytes / 1e6:,.1f}", f"{active / 1e6:,.1f}", f"{first / nbytes:.2f}×"])
    table(["full attention in", "keys and values, MB", "MLX's memory, MB", "times less"], rows)


if __name__ == "__main__":
    main()
