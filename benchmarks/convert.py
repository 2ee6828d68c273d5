"""Converting a checkpoint of Mistral 7B's size: peak memory and time against mlx-lm's converter.

    python benchmarks/convert.py [--folder /tmp] [--rounds 2] [--verify]

Writes 14.5 GB of random bfloat16 weights in three shards into FOLDER (kept there for the next
run), then converts them to 4 bits in groups of 64 with both, in turn, each in a process of its
own. The bits that come out must be equal.
"""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before mlx.core is imported

# isort: split
import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from common import machine_line, spread, table
from m7mlx_bench.models import SHAPES

from m7mlx.files.weights import folder_weights

CONFIG = replace(SHAPES["7b"], max_position_embeddings=32768)
SHARDS = 3


def write_checkpoint(folder: Path) -> None:
    """Write shapes, names and files of mistralai/Mistral-7B-v0.1, cut out of one random block."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    mx.random.seed(0)
    block = (mx.random.normal((1 << 28,)) * 0.02).astype(mx.bfloat16)
    shapes = list(CONFIG.weight_shapes().items())
    starts = np.random.default_rng(0).integers(0, 1 << 26, len(shapes)).tolist()
    weight_map = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = range(shard * len(shapes) // SHARDS, (shard + 1) * len(shapes) // SHARDS)
        arrays = {}
        for i in part:
            key, shape = shapes[i]
            arrays[key] = block[starts[i] : starts[i] + int(np.prod(shape))].reshape(shape)
            weight_map[key] = name
        print(f"writing {name}", file=sys.stderr)
        mx.save_safetensors(str(folder / name), arrays, metadata={"format": "pt"})
        arrays.clear()
        mx.clear_cache()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict() | {"torch_dtype": "bfloat16"}))


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer, which both sides can read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {char: i + 3 for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2} | alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def measured(command: list[str]) -> tuple[float, float]:
    """Measure seconds, and gigabytes of peak resident memory, of one command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed:\n{error}")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - started, usage.ru_maxrss * unit / 1e9


def same_bits(a: Path, b: Path) -> bool:
    """Return whether two folders hold the same tensors, compared one at a time."""
    found, other = folder_weights(a), folder_weights(b)
    if found.keys() != other.keys():
        return False
    for name in found:
        files = mx.load(str(found[name].path)), mx.load(str(other[name].path))
        assert isinstance(files[0], dict) and isinstance(files[1], dict)
        if not mx.array_equal(files[0][found[name].name], files[1][other[name].name]).item():
            return False
        mx.clear_cache()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--verify", action="store_true", help="measure `m7mlx-convert verify` on 64 tokens, too")
    args = parser.parse_args()
    source, outs = args.folder / "mistral-7b-random", {n: args.folder / f"out-{n}" for n in ("m7mlx", "mlx-lm")}
    # In a process of its own: the kernel counts a parent's memory to a child's peak.
    writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(source,))
    writer.start()
    writer.join()
    ours = [sys.executable, "-m", "m7mlx_convert", str(source), "--mlx-path", str(outs["m7mlx"]), "-q"]
    theirs = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(source), "--mlx-path", str(outs["mlx-lm"])]
    commands = {"m7mlx": [*ours, "--q-bits", "4"], "mlx-lm": [*theirs, "-q"]}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            shutil.rmtree(outs[name], ignore_errors=True)
            found[name].append(measured(command))
            print(name, found[name][-1], file=sys.stderr)
    assert same_bits(*outs.values()), "the two did not give the same bits"
    print(machine_line())
    medians = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in found.items()}
    rows = [
        [
            name,
            spread([seconds for seconds, _ in runs], 1, " s"),
            spread([memory for _, memory in runs], 2, " GB"),
            f"{medians[name] / medians['mlx-lm']:.2f}",
        ]
        for name, runs in found.items()
    ]
    table(["converter", "time", "peak memory", "time / mlx-lm's"], rows)
    if args.verify:
        command = [sys.executable, "-m", "m7mlx_convert", "verify", str(outs["m7mlx"]), "--against", str(source)]
        seconds, memory = measured([*command, "--tokens", "64", "-q"])
        print(f"\nverify, 64 tokens: {seconds:.0f} s, {memory:.2f} GB")


if __name__ == "__main__":
    main()
