"""All that a conversion takes from its source.

Every bit, what defaults hide, the files that go along; no code.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from hub_server import serve
from m7mlx_convert.cli import main
from m7mlx_convert.convert import convert
from m7mlx_convert.writer import Spec, TensorBytes, WeightsWriter
from peers import silenced
from sources import assert_same, little, quantisable, read_weights, tokenizer_json, write_source

from m7mlx import load
from m7mlx.config import ModelConfig
from m7mlx.errors import InputError

# --- not quantised ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("tied", "shards"), [(False, 1), (True, 3)])
def test_weights_are_kept_bit_for_bit(tmp_path: Path, dtype: mx.Dtype, tied: bool, shards: int) -> None:
    source = tmp_path / "source"
    weights = write_source(source, little(tie_word_embeddings=tied), dtype, shards, torch_dtype="float32")
    out = convert(str(source), tmp_path / "out")
    assert_same(read_weights(out), weights)
    found = mx.load(str(out / "model.safetensors"), return_metadata=True)
    assert isinstance(found, tuple) and found[1] == {"format": "mlx"}
    assert load(out)[0].config == load(source)[0].config


def test_dtype_casts_everything_and_says_so_in_the_config(tmp_path: Path) -> None:
    weights = write_source(tmp_path / "source", little(), mx.float32, torch_dtype="float32")
    out = convert(str(tmp_path / "source"), tmp_path / "out", dtype="float16")
    assert_same(read_weights(out), {name: array.astype(mx.float16) for name, array in weights.items()})
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"


def test_tensors_that_are_computed_or_tied_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    weights = write_source(source, little(tie_word_embeddings=True))
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones((8,)),
        "lm_head.weight": weights["model.embed_tokens.weight"],
    }
    mx.save_safetensors(str(source / "model.safetensors"), weights | extra)
    assert_same(read_weights(convert(str(source), tmp_path / "out")), weights)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.uint8])
def test_writer_writes_what_mlx_reads(tmp_path: Path, dtype: mx.Dtype) -> None:
    """Odd sizes, one dimension and three, and views that do not lie row by row in memory."""
    base = mx.arange(105).reshape(3, 5, 7)
    arrays = {"a": base, "b": base.T, "c": base[1:, ::2], "d": base[0, :, 3], "e": mx.zeros((1,))}
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    writer = WeightsWriter(tmp_path, [[Spec(name, dtype, array.shape)] for name, array in arrays.items()])
    for array in arrays.values():
        writer.write([TensorBytes.of(array)])
    writer.finish()
    writer.close()
    assert_same(read_weights(tmp_path), arrays)


# --- quantised, and mlx-lm --------------------------------------------------------------------


def test_mlx_lm_reads_what_the_source_left_to_defaults(tmp_path: Path, mlx_lm: ModuleType) -> None:
    """An untied head said by absence, and RoPE's base where transformers 5 writes it."""
    source = tmp_path / "source"
    changes: dict[str, Any] = {
        "tie_word_embeddings": "absent",
        "rope_theta": "absent",
        "rope_parameters": {"rope_theta": 5e5},
    }
    write_source(source, little(sliding_window=None), mx.float32, **changes)
    out = convert(str(source), tmp_path / "out")
    ids = mx.array([[1, 5, 90, 7]])
    with silenced():
        model, _ = mlx_lm.load(str(out))
    expected = load(source)[0](ids)
    assert mx.allclose(model(ids), expected, rtol=1e-4, atol=1e-4).item()
    written = json.loads((out / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert written["rope_theta"] == 5e5
    assert written["sliding_window"] is None


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_quantised_folder_of_mlx_lm_is_copied_as_it_is(tmp_path: Path, mlx_lm: ModuleType, mode: str) -> None:
    source, quantised = tmp_path / "source", tmp_path / "quantised"
    write_source(source, quantisable(), torch_dtype="float32")  # which must not change the scales
    with silenced():
        mlx_lm.convert(str(source), str(quantised), quantize=True, q_mode=mode, dtype="float16")
    out = convert(str(quantised), tmp_path / "out")
    assert_same(read_weights(out), read_weights(quantised))
    ids = mx.array([[1, 5, 90, 7]])
    assert mx.array_equal(load(out)[0](ids), load(quantised)[0](ids)).item()
    with pytest.raises(InputError, match="--dtype bfloat16 would change"):
        convert(str(quantised), tmp_path / "again", dtype="bfloat16")


# --- the other files --------------------------------------------------------------------------


def test_config_and_files_go_along_and_code_does_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    code: dict[str, Any] = {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}, "model_file": "modeling.py"}
    write_source(source, little(), attention_dropout=0.0, use_cache=True, **code)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | code))
    for name in ("modeling.py", "tokenizer.py", "tokenizer.bin", "tokenizer.pkl", "training_args.bin"):
        (source / name).write_text("evil")
    for name in ("chat_template.jinja", "LICENSE"):
        (source / name).write_text(f"content of {name}")
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\nhello")
    out = convert(str(source), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE",
    }
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text()) == settings
    given = json.loads((source / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == {k: v for k, v in given.items() if k not in code}


def test_card_names_origin_licence_and_how_it_was_made(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    source = tmp_path / "source"
    write_source(source, quantisable())
    (source / "README.md").write_text('---\nlanguage: en\nlicense: "mit"\n---\n# x\nlicense: wrong\n')
    with serve(source, "org/little-mistral") as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "M7MLX_CACHE": str(tmp_path / "m7")}
        command = [sys.executable, "-m", "m7mlx_convert", "org/little-mistral", "--quantize", "-q"]
        environment = os.environ | settings | {"HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "little-mistral-4bit\n", done.stderr
    card = ModelCard.load(tmp_path / "little-mistral-4bit" / "README.md", ignore_metadata_errors=False)
    assert card.data.license == "mit"
    assert card.data.base_model == "org/little-mistral"
    assert "at revision " + "0" * 39 + "1" in card.text
    assert card.data.library_name == "mlx"
    assert card.data.tags == ["mlx", "mistral"]
    assert "\nm7mlx-convert org/little-mistral --quantize\n" in card.text
    assert "\nm7mlx-chat --model .\n" in card.text


def test_card_survives_hostile_names(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    source = tmp_path / "a`b\n---\nlicense: gpl"
    write_source(source, little())
    (source / "README.md").write_text("---\nlicense: [x, *y\n---\n")
    out = convert(str(source), tmp_path / "out", command=["m7mlx-convert", source.name])
    card = ModelCard.load(out / "README.md", ignore_metadata_errors=False)
    assert card.data.license == "[x, *y"
    assert card.text.count("```") == 6


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "little-mlx"),
        (["--quantize"], "little-4bit"),
        (["--q-bits", "8"], "little-8bit"),
        (["--quantize", "--q-bits", "2", "--q-group-size", "32"], "little-2bit"),
    ],
)
def test_default_name_of_the_result(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    folder: str,
) -> None:
    write_source(tmp_path / "models" / "little", quantisable())
    monkeypatch.chdir(tmp_path)
    assert main(["models/little/", *arguments]) == 0
    assert load(folder)
    shutil.rmtree(folder)
    monkeypatch.chdir("models/little")
    assert main([".", "--mlx-path", f"../../{folder}", *arguments]) == 0
    assert load(tmp_path / folder)


def test_help_imports_no_libraries() -> None:
    libraries = "{'gguf', 'huggingface_hub', 'rich', 'sentencepiece', 'tokenizers', 'transformers'}"
    code = f"import sys, m7mlx_convert.cli; sys.exit(({libraries} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """A model of 340 MB against one of less than 1 MB, with 30 MB in flight.

    Its largest tensor has 8 MB.
    """
    code = (
        "import re, sys; from m7mlx_convert import pipeline; from m7mlx_convert.cli import main; "
        "pipeline.IN_FLIGHT = 30_000_000; main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    large = {"hidden_size": 1024, "intermediate_size": 4096, "n_layers": 12}
    for options in ([], ["--q-bits", "4"]):
        peaks = []
        for name, sizes in {"small": {}, "large": large}.items():
            if not (tmp_path / name).exists():
                write_zeros(tmp_path / name, quantisable(**sizes))
            command = [
                sys.executable,
                "-c",
                code,
                str(tmp_path / name),
                "--mlx-path",
                str(tmp_path / "out"),
                "--force",
            ]
            done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
            peaks.append(int(done.stdout.split()[-1]) * 1024)
        assert sum(file.stat().st_size for file in (tmp_path / "large").iterdir()) > 300e6
        assert peaks[1] - peaks[0] < 60e6


def write_zeros(folder: Path, config: ModelConfig) -> None:
    folder.mkdir()
    weights = {name: mx.zeros(shape, mx.float16) for name, shape in config.weight_shapes().items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
