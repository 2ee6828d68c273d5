"""m7mlx-eval: texts and two models, on small model folders."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from m7mlx_eval.cli import main
from m7mlx_eval.perplexity import Mean
from m7mlx_eval.texts import read_documents
from models import random_weights, small_config, write_folder

from m7mlx.loading import load
from m7mlx.scoring import score, spans

TEXT = (
    "The keeper of the lighthouse had not spoken to anyone for three weeks – not to a soul – when the storm began.\n"
)


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same shape as that in `model_folder`, with other weights."""
    config = small_config(vocab_size=32768, sliding_window=16, n_layers=2)
    return write_folder(tmp_path_factory.mktemp("other") / "model", config, random_weights(config, seed=5))


@pytest.fixture(scope="session")
def full_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full attention over 32 positions."""
    config = small_config(vocab_size=32000, sliding_window=None, n_layers=1, max_position_embeddings=32)
    return write_folder(tmp_path_factory.mktemp("full") / "model", config)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    return path


def figures(tmp_path: Path, *arguments: str | Path) -> dict[str, Any]:
    result = tmp_path / "result.json"
    assert main([*map(str, arguments), "--save", str(result)]) == 0
    found: dict[str, Any] = json.loads(result.read_text())
    return found


@pytest.mark.parametrize(("context", "stride"), [(None, None), (40, None), (24, 24), (24, 5), (500, 1)])
def test_perplexity_is_that_of_the_tokens(
    context: int | None,
    stride: int | None,
    tmp_path: Path,
    model_folder: Path,
    text: Path,
) -> None:
    asked = ([] if context is None else ["--context", str(context)]) + (
        [] if stride is None else ["--stride", str(stride)]
    )
    found = figures(tmp_path, model_folder, "--text", text, *asked)
    model, tokenizer = load(model_folder)
    ids = tokenizer.encode(TEXT * 3, add_bos=True)
    parts = list(spans(len(ids), context, stride or (context and context // 2)))
    losses = np.concatenate([-score(model, ids[w.start : w.end], w.first - w.start).logprobs for w in parts])
    assert found["tokens"] == len(ids) - 1 and found["windows"] == len(parts) and found["documents"] == 1
    assert found["bytes"] == len((TEXT * 3).encode())
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["loss_stderr"] == pytest.approx(losses.std(ddof=1) / math.sqrt(len(losses)), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(losses.sum() / math.log(2) / found["bytes"], rel=1e-5)


def test_a_model_is_no_distance_from_itself(
    tmp_path: Path,
    model_folder: Path,
    other_folder: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    same = figures(tmp_path, model_folder, "--text", text, "--against", model_folder)
    assert same["kl"]["mean"] == same["kl"]["max"] == 0 and same["top1_agreement"]["mean"] == 1
    assert same["reference"]["perplexity"] == same["perplexity"]
    capsys.readouterr()
    far = figures(tmp_path, model_folder, "--text", text, "--against", other_folder)
    assert far["kl"]["mean"] > 1 and far["top1_agreement"]["mean"] < 0.5
    assert far["reference"]["loss"] == pytest.approx(figures(tmp_path, other_folder, "--text", text)["loss"])
    shown = capsys.readouterr().out
    assert f"KL from {other_folder}" in shown and f"{far['kl']['mean']:.5f} ±" in shown


def test_fewer_bits_for_keys_and_values_are_the_models_alone(tmp_path: Path, text: Path) -> None:
    config = small_config(vocab_size=32000, sliding_window=16, n_layers=1, head_dim=64, n_heads=2, n_kv_heads=1)
    folder = write_folder(tmp_path / "wide", config)
    packed = figures(tmp_path, folder, "--text", text, "--against", folder, "--kv-bits", "4")
    assert 1e-4 < packed["kl"]["mean"] < 1 and packed["loss"] != packed["reference"]["loss"]
    assert packed["reference"]["loss"] == figures(tmp_path, folder, "--text", text)["loss"]


def test_each_document_of_a_data_set_is_read_by_itself(tmp_path: Path, model_folder: Path) -> None:
    texts = [TEXT, "Bees make honey.", "", TEXT * 2]
    lines, listed = tmp_path / "texts.jsonl", tmp_path / "texts.json"
    lines.write_text("\n\n".join(json.dumps({"n": 1, "body": text}) for text in texts), encoding="utf-8")
    listed.write_text(json.dumps([{"body": text} for text in texts]), encoding="utf-8")
    found = figures(tmp_path, model_folder, "--text", lines, "--field", "body")
    assert found["documents"] == 3
    total = 0.0
    for one in filter(None, texts):
        (tmp_path / "one.md").write_text(one, encoding="utf-8")
        alone = figures(tmp_path, model_folder, "--text", tmp_path / "one.md")
        total += alone["loss"] * alone["tokens"]
    assert found["loss"] * found["tokens"] == pytest.approx(total, rel=1e-5)
    again = figures(tmp_path, model_folder, "--text", listed, "--field", "body")
    assert again == found | {"text": str(listed)}
    few = figures(tmp_path, model_folder, "--text", lines, "--field", "body", "--max-tokens", "33")
    # Each begins with a token that is not scored.
    assert few["tokens"] == 31 and few["documents"] == 2


@pytest.mark.eval
def test_parquet_and_stdin(tmp_path: Path, model_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = figures(tmp_path, model_folder, "--text", text)
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT * 3))
    assert figures(tmp_path, model_folder, "--text", "-") == plain | {"text": "-"}
    import pyarrow
    from pyarrow import parquet

    table = tmp_path / "texts.parquet"
    parquet.write_table(pyarrow.table({"text": [TEXT * 3], "n": [1]}), table)
    assert figures(tmp_path, model_folder, "--text", table) == plain | {"text": str(table)}
    assert main([str(model_folder), "--text", str(table), "--field", "n"]) == 2
    assert main([str(model_folder), "--text", str(table), "--field", "m"]) == 2


def test_a_context_that_ends_is_said_and_read_in_windows(
    tmp_path: Path,
    full_folder: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = figures(tmp_path, full_folder, "--text", text)
    said = capsys.readouterr().err
    assert said == "m7mlx-eval: note: texts beyond the model's context are read in windows of 32 that advance by 16\n"
    assert found == figures(tmp_path, full_folder, "--text", text, "--context", "32", "--stride", "16")
    assert capsys.readouterr().err == ""


def test_a_mean_and_its_error_without_its_values() -> None:
    values = np.random.default_rng(1).normal(5, 2, 1000).astype(np.float32)
    mean = Mean()
    for part in np.split(values, [1, 300]):
        mean.add(part)
    assert mean.mean == pytest.approx(values.mean(), rel=1e-6)
    assert mean.error == pytest.approx(values.std(ddof=1) / math.sqrt(1000), rel=1e-4)
    assert mean.largest == values.max()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--text", "/no/such.txt"], "/no/such.txt cannot be read: No such file"),
        (["--text", "TMP/binary.txt"], "is no text (UTF-8)"),
        (["--text", "TMP/bad.jsonl"], "bad.jsonl, line 2 is no JSON"),
        (["--text", "TMP/bad.json"], "bad.json is no JSON"),
        (["--text", "TMP/good.jsonl", "--field", "body"], "has no text 'body'; choose with --field, of: text, title"),
        (["--text", "TMP/empty.txt"], "there is nothing to score"),
        (["--text", "TMP/none.jsonl"], "holds no texts"),
        (["--text", "TMP/good.txt", "--against", "FULL"], "have different vocabularies (32,768 and 32,000 tokens)"),
        (["--text", "TMP/good.txt", "--stride", "3"], "--stride needs --context"),
        (["--text", "TMP/good.txt", "--stride", "9", "--context", "8"], "--stride must not exceed --context"),
        (["--text", "TMP/good.txt", "--limit", "9"], "--limit goes with --tasks"),
        (["--tasks", "x", "--max-tokens", "9"], "--max-tokens goes with --text"),
        (["--tasks", "x", "--system", "Be brief"], "--system needs --chat"),
        (["--text", "TMP/good.txt", "--context", "0"], "'0' is not a positive number"),
        (["--text", "TMP/good.txt", "--save", "/no/such/x.json"], "the folder of /no/such/x.json does not exist"),
        ([], "one of the arguments --text --tasks is required"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    model_folder: Path,
    full_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": ')
    (tmp_path / "bad.json").write_text("[" * 100_000)
    (tmp_path / "good.jsonl").write_text('{"text": "fine", "title": "x", "n": 1}\n')
    (tmp_path / "good.txt").write_text("fine and good")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "none.jsonl").write_text("\n")
    given = [a.replace("TMP", str(tmp_path)).replace("FULL", str(full_folder)) for a in arguments]
    try:
        status = main([str(model_folder), *given])
    except SystemExit as left:
        status = int(left.code or 0)
    assert status == 2
    said = capsys.readouterr().err
    assert reason in said
    assert len(said.splitlines()) == 1


def test_a_context_beyond_the_models_and_parquet_without_pyarrow_are_refused(
    tmp_path: Path,
    full_folder: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(full_folder), "--text", str(text), "--context", "33"]) == 2
    assert "--context 33 is more than the 32 tokens that the model sees" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main([str(full_folder), "--text", "x.parquet"]) == 2
    assert "pip install pyarrow" in capsys.readouterr().err


def test_of_a_text_no_more_is_read_than_counts(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 10_000)
    (found,) = read_documents(str(tmp_path / "long.txt"), "text", 10)
    assert len(found) == 320
