"""What `mlx.launch` runs for test_world.py: the passes of one rank, and the logits that it gets.

ranks.py FOLDER OUT MODE [quantised]
"""

from __future__ import annotations

import sys
from pathlib import Path

import m7mlx  # noqa: F401  first: it loads a fast BLAS

# isort: split
import mlx.core as mx
import numpy as np

from m7mlx.batch import BatchCache
from m7mlx.config import ModelConfig
from m7mlx.decode import prefill
from m7mlx.model import Mistral
from m7mlx.parallel.world import World, join
from m7mlx.shard import MODES, Mode

PROMPT = [(i * i * 7 + 3) % 97 for i in range(23)]
STEPS = [5, 80, 2, 9, 41, 77, 13, 60, 8, 33]


def passes(model: Mistral) -> dict[str, np.ndarray]:
    """Chunks, single tokens across the wrap, a rollback, two rows at once: logits of each."""
    found = {}
    cache = model.new_cache(slack=3, kv_bits=32)
    found["prompt"] = np.array(prefill(model, PROMPT, cache, 9))
    for i, token in enumerate(STEPS):
        found[f"token {i}"] = np.array(model(mx.array([[token]]), cache))
    cache.rollback(2)
    found["again"] = np.array(model(mx.array([STEPS[-2:]]), cache))
    other = model.new_cache(slack=3, kv_bits=32)
    prefill(model, PROMPT[:5], other, 9)
    found["rows"] = np.array(model(mx.array([[1], [2]]), BatchCache([cache, other])))
    return found


def joined(mode: Mode, folder: str) -> World:
    """What this rank has joined; `mlx.launch` makes more than one."""
    world = join(mode, lambda: ModelConfig.from_folder(folder))
    assert world is not None
    return world


def main() -> None:
    folder, out, modes, *rest = sys.argv[1:]
    if rest:
        vars(sys.modules["m7mlx.loading"])["expands"] = lambda config: False
    asked = [mode for mode in MODES if mode in modes.split(",")]
    for mode in asked:
        world = joined(mode, folder)
        model, _ = world.load(folder)
        found = passes(model)
        found |= {
            "bytes": np.array(model.nbytes),
            "shape": np.array([model.config.n_kv_heads, model.config.n_layers]),
        }
        np.savez(Path(out) / f"{mode}-{world.rank}.npz", allow_pickle=False, **found)
        mx.eval(mx.distributed.all_sum(mx.array(1)))  # all have written
    if world.rank == 0:
        world.close()
    else:
        world.channel.hear()  # the end


if __name__ == "__main__":
    main()
