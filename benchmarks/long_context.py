"""Decode time and bytes of keys and values far into a conversation, against mlx-lm and transformers.

    python benchmarks/long_context.py [--shape small|demo] [--rounds 5] [--positions 1024 4096 16384 32768 131072]

One Mistral-shaped model with random weights and a window of 4,096, in float32, the same for all: 4 layers of 512 with
8 query and 2 KV heads, or the shape of the demo model (30 layers of 576, 9 query and 3 KV heads). Caches are filled
with random keys and values instead of a prefill: what a step costs depends on how many there are, not on what they
are. mlx-lm runs as shipped (it ignores the window) and with its own rotating cache put in by hand; transformers
runs with the window. Each engine has processes of its own, which take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from common import machine, preload_blas, spread, table

WINDOW, HEAD_DIM = 4096, 64
CONFIG: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1 << 18,
    "sliding_window": WINDOW,
    "tie_word_embeddings": False,
}
DEMO: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SHAPES = {"small": CONFIG, "demo": CONFIG | DEMO}
ENGINES = ("m7mlx", "m7mlx 8 bits", "m7mlx 4 bits", "mlx-lm", "mlx-lm rotating", "transformers")
STEPS = 24
Step = Callable[[], None]


def m7mlx(config: dict[str, Any], position: int, kv_bits: int | None) -> tuple[Step, Callable[[], int]]:
    preload_blas()
    import mlx.core as mx

    from m7mlx import Mistral, ModelConfig

    model = Mistral(ModelConfig.from_dict(config))
    mx.eval(model.parameters())
    cache = model.new_cache(kv_bits=kv_bits)
    rows = min(position, WINDOW)
    for ring in cache.rings:
        k, v = (mx.random.normal((1, config["num_key_value_heads"], rows, HEAD_DIM)) for _ in range(2))
        ring.write(ring.format.encode(k) + ring.format.encode(v), position - rows)
    cache.move_to(position, position)
    mx.eval(cache.arrays)
    state = [mx.array([[1]])]

    def step() -> None:
        state[0] = mx.argmax(model(state[0], cache)[:, -1:], axis=-1)
        mx.eval(state[0])

    return step, lambda: cache.nbytes


def mlx_lm(config: dict[str, Any], position: int, rotating: bool) -> tuple[Step, Callable[[], int]]:
    preload_blas()
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache, RotatingKVCache
    from mlx_lm.models.llama import Model, ModelArgs

    keys = ModelArgs.__dataclass_fields__
    model = Model(ModelArgs(**{k: v for k, v in config.items() if k in keys} | {"model_type": "llama"}))
    mx.eval(model.parameters())
    kv_heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
    cache = [RotatingKVCache(WINDOW, keep=0) if rotating else KVCache() for _ in range(layers)]
    for layer in cache:
        for start in range(0, position, 2048):  # as its own prefill does
            k, v = (mx.random.normal((1, kv_heads, min(2048, position - start), HEAD_DIM)) for _ in range(2))
            layer.update_and_fetch(k, v)
            mx.eval(layer.keys, layer.values)
    state = [mx.array([[1]])]

    def step() -> None:
        state[0] = mx.argmax(model(state[0], cache=cache)[:, -1:], axis=-1)
        mx.eval(state[0])

    return step, lambda: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache)


def transformers(config: dict[str, Any], position: int) -> tuple[Step, Callable[[], int]]:
    import torch
    from transformers import DynamicCache, MistralConfig, MistralForCausalLM

    torch.set_num_threads(2)
    kv_heads = config["num_key_value_heads"]
    theirs = MistralConfig(**{k: v for k, v in config.items() if k != "model_type"})
    with torch.no_grad():
        model = MistralForCausalLM(theirs).eval()
    cache = DynamicCache(config=theirs)
    for layer in range(config["num_hidden_layers"]):
        for start in range(0, position, 2048):
            k, v = (torch.randn(1, kv_heads, min(2048, position - start), HEAD_DIM) for _ in range(2))
            cache.update(k, v, layer)
    state = [torch.tensor([[1]]), position]

    def step() -> None:
        with torch.no_grad():
            out = model(state[0], past_key_values=cache, position_ids=torch.tensor([[state[1]]]))
        state[0], state[1] = out.logits[:, -1:].argmax(-1), state[1] + 1

    def nbytes() -> int:
        return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))

    return step, nbytes


def measure(shape: str, engine: str, position: int) -> dict[str, float]:
    """In a process of its own: milliseconds of a step (median), bytes of keys and values."""
    if engine == "transformers":
        step, nbytes = transformers(SHAPES[shape], position)
    elif engine.startswith("mlx-lm"):
        step, nbytes = mlx_lm(SHAPES[shape], position, engine.endswith("rotating"))
    else:
        step, nbytes = m7mlx(SHAPES[shape], position, {"m7mlx 8 bits": 8, "m7mlx 4 bits": 4}.get(engine))
    for _ in range(4):
        step()
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        times.append((time.perf_counter() - started) * 1e3)
    return {"ms": statistics.median(times), "bytes": nbytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 4096, 16384, 32768, 131072])
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "POSITION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.shape, args.one[0], int(args.one[1]))))
        return
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for position in args.positions:
            for engine in ENGINES:
                command = [sys.executable, __file__, "--shape", args.shape, "--one", engine, str(position)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.setdefault((engine, position), []).append(json.loads(done.stdout.splitlines()[-1]))
    print(machine(preload_blas()), f"· {args.shape} · {args.rounds} rounds of {STEPS} steps")
    head = ["engine", *(f"{p:,}" for p in args.positions)]
    print("\nDecode, ms per token:\n")
    table(head, [[e, *(spread([r["ms"] for r in found[e, p]]) for p in args.positions)] for e in ENGINES])
    print("\nKeys and values, MB, and how many times smaller than mlx-lm's:\n")
    rows = []
    for engine in ENGINES:
        sizes = [found[engine, p][0]["bytes"] for p in args.positions]
        peers = [found["mlx-lm", p][0]["bytes"] for p in args.positions]
        rows.append([engine, *(f"{s / 1e6:.2f} ({b / s:.2f})" for s, b in zip(sizes, peers, strict=True))])
    table(head, rows)


if __name__ == "__main__":
    main()
