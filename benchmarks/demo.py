"""The demo model as a newcomer meets it on Linux's CPU backend: prefill, decode, process start to first token.

    python benchmarks/demo.py [--rounds 3] [--prompt 34] [--tokens 32]

Every run is a process of its own, engines in turn: m7mlx with the BLAS it finds, m7mlx with MLX's own, and mlx-lm as
shipped. mlx-lm gets the same weights with float32 scales: with the float16 ones of the demo folder, each product is
emulated, and a token takes it seconds. Prompts are ids, the same for all; tokens are greedy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import preload_blas, spread, table

ENGINES = ("m7mlx", "m7mlx, MLX's BLAS", "mlx-lm")
WARM_UP = 2  # tokens


def run(engine: str, folder: str, ids: list[int], tokens: int) -> dict[str, Any]:
    """Prefill in the engine's own way, then decode; `BENCH_START` is when this process was started."""
    if engine == "mlx-lm":
        import mlx.core as mx
        from mlx_lm import load
        from mlx_lm.models.cache import make_prompt_cache

        model, _ = load(folder)
        cache = make_prompt_cache(model)
        began = time.perf_counter()
        logits = model(mx.array([ids]), cache)[:, -1]  # its own chunks are of 2,048
    else:
        preload_blas()
        import mlx.core as mx

        from m7mlx import load
        from m7mlx.decode import default_chunk, prefill

        model, _ = load(folder)
        cache = model.new_cache()
        began = time.perf_counter()
        logits = prefill(model, ids, cache, default_chunk())
    token = mx.argmax(logits, axis=-1)
    found = [token.item()]
    prefilled = time.perf_counter()
    first = time.time() - float(os.environ["BENCH_START"])
    for count in range(tokens + WARM_UP):
        if count == WARM_UP:
            decoding = time.perf_counter()
        token = mx.argmax(model(token[:, None], cache)[:, -1], axis=-1)
        found.append(token.item())
    return {
        "prefill": len(ids) / (prefilled - began),
        "decode": tokens / (time.perf_counter() - decoding),
        "first": first,
        "tokens": found,
    }


def widen(folder: Path, target: Path) -> None:
    """A copy of a model folder with all floating-point arrays in float32."""
    import mlx.core as mx

    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("SHA256SUMS"))
    for file in target.glob("*.safetensors"):
        arrays = mx.load(str(file))
        wide = {k: v.astype(mx.float32) if mx.issubdtype(v.dtype, mx.floating) else v for k, v in arrays.items()}
        mx.eval(wide)
        mx.save_safetensors(str(file), wide, {"format": "mlx"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=34)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--run", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    ids = [(i * 7919) % 40_000 + 100 for i in range(args.prompt)]
    if args.run:
        print(json.dumps(run(*args.run, ids, args.tokens)))
        return

    from m7mlx.hub import resolve

    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    with tempfile.TemporaryDirectory() as scratch:
        shipped = resolve("demo")
        widened = Path(scratch) / "demo-float32"
        widen(shipped, widened)
        for _ in range(args.rounds):
            for engine in ENGINES:
                folder = widened if engine == "mlx-lm" else shipped
                environment = os.environ | {"BENCH_START": str(time.time())}
                if engine == "m7mlx, MLX's BLAS":
                    environment["M7MLX_BLAS"] = "off"
                own = ["--prompt", str(args.prompt), "--tokens", str(args.tokens), "--run", engine, str(folder)]
                command = [sys.executable, __file__, *own]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                found[engine].append(json.loads(done.stdout.splitlines()[-1]))
    same = len({tuple(one["tokens"]) for runs in found.values() for one in runs}) == 1
    print(
        f"{args.prompt} tokens read, {args.tokens} decoded, {args.rounds} rounds; all chose the same tokens: {same}\n"
    )
    rows = []
    for engine, runs in found.items():
        row = [engine]
        for name, digits in (("prefill", 1), ("decode", 1), ("first", 2)):
            values = [one[name] for one in runs]
            ratio = statistics.median(v / b[name] for v, b in zip(values, found["mlx-lm"], strict=True))
            row.append(f"{spread(values, digits=digits)} · {ratio:.2f}×")
        rows.append(row)
    table(["engine", "prefill tok/s · against mlx-lm", "decode tok/s", "start to first token, s"], rows)


if __name__ == "__main__":
    main()
