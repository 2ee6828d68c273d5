"""The comparison of a result with its source: against both models run whole, and against itself."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from m7mlx_convert import verify
from m7mlx_convert.cli import main
from m7mlx_convert.convert import convert
from m7mlx_convert.opening import open_model
from m7mlx_convert.progress import Reporter
from m7mlx_convert.report import write_report
from m7mlx_convert.scheme import Recipe
from m7mlx_convert.text import DEFAULT_TOKENS, Text, read_text
from m7mlx_convert.verify import Comparison, compare
from models import random_weights, small_config, weights_on_disk, write_folder
from sources import quantisable

from m7mlx import load
from m7mlx.errors import InputError
from m7mlx.quantization import Quantization

KINDS = ("sliding_attention", "full_attention")
CONFIG = quantisable(vocab_size=32000, n_layers=2, layer_types=KINDS)  # a window of 7
QUIET = Reporter()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    source = write_folder(tmp_path / "source", CONFIG)
    return source, convert(str(source), tmp_path / "made", recipe=Recipe(Quantization(32, 4)))


def compared(source: Path, result: Path, ids: list[int]) -> Comparison:
    text = Text(ids, [str(token) for token in ids])
    models = [open_model(path, str(path), None) for path in (source, result)]
    return compare(models[0], models[1], text, QUIET)


def test_the_figures_are_those_of_both_models_run_whole(
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layer by layer in chunks of odd size gives what the models give at once.

    Numbers by NumPy in float64.
    """
    monkeypatch.setattr(verify, "_CHUNK", 11)
    monkeypatch.setattr(verify, "_HEAD_CHUNK", 5)
    monkeypatch.setattr(verify, "_SLICE", 30_000)
    ids = np.random.default_rng(0).integers(3, 32000, 45).tolist()
    found = compared(*pair, ids)
    p, q = (log_probabilities(folder, ids) for folder in pair)
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(-1), rtol=2e-3, atol=1e-5)
    # Near ties may fall either way.
    assert (found.agrees == (p.argmax(-1) == q.argmax(-1))).mean() > 0.95
    following = np.array(ids[1:])[:, None]
    for side, logs in enumerate((p, q)):
        np.testing.assert_allclose(found.losses[side], -np.take_along_axis(logs, following, 1)[:, 0], rtol=1e-4)
        assert found.perplexities[side] == pytest.approx(np.exp(found.losses[side].mean()), rel=1e-5)
    weights, made = random_weights(CONFIG), weights_on_disk(load(pair[1])[0])
    for name, error in found.weights.items():
        difference = np.linalg.norm(made[f"{name}.weight"] - weights[f"{name}.weight"])
        assert error == pytest.approx(difference / np.linalg.norm(weights[f"{name}.weight"]), rel=1e-4)
    assert found.weights.keys() == {
        n.removesuffix(".weight") for n, s in CONFIG.weight_shapes().items() if len(s) == 2
    }
    assert len(found.hidden) == CONFIG.n_layers
    assert all(0.01 < error < 1 for error in found.hidden)


def log_probabilities(folder: Path, ids: list[int]) -> np.ndarray:
    """Return those of what follows each id but the last: float64 [positions, vocabulary]."""
    model, _ = load(folder)
    cache = model.new_cache(kv_bits=32)  # as the comparison computes
    logits = np.array(model(mx.array([ids]), cache))[0, :-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    found: np.ndarray = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found


def test_a_model_is_no_distance_from_itself(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", small_config(vocab_size=32000, tie_word_embeddings=True))
    found = compared(source, convert(str(source), tmp_path / "copy"), [1, 5, 9, 400, 31999])
    assert found.kl.max() == 0
    assert found.agrees.all()
    assert not any(found.hidden)
    assert not any(found.weights.values())
    assert found.perplexities[0] == found.perplexities[1]


def test_fewer_bits_are_further_away(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", CONFIG)
    ids = list(range(3, 60))
    divergences = []
    for bits in (8, 6, 4, 2):
        made = convert(str(source), tmp_path / str(bits), recipe=Recipe(Quantization(32, bits)))
        divergences.append(compared(source, made, ids).kl.mean())
    assert divergences == sorted(divergences)
    assert divergences[0] < 0.01 * divergences[-1]


def test_models_that_do_not_belong_together(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", quantisable(vocab_size=32000, sliding_window=9))
    with pytest.raises(InputError, match=r"does not come from .*sliding_window is 7 in the one, 9 in the other"):
        compared(other, pair[1], [1, 2, 3])


def test_a_text_longer_than_the_context(tmp_path: Path) -> None:
    config = small_config(vocab_size=32000, sliding_window=None, max_position_embeddings=8)
    source = write_folder(tmp_path / "source", config)
    with pytest.raises(InputError, match="give --tokens 8"):
        compared(source, source, list(range(1, 11)))


# --- the text ---------------------------------------------------------------------------------


def test_the_built_in_text_is_long_enough(pair: tuple[Path, Path]) -> None:
    text = read_text(pair[1], 32000, None, None, QUIET)
    assert len(text.ids) == DEFAULT_TOKENS
    assert text.ids[0] == 1  # begin of sequence
    assert "".join(text.pieces).strip().startswith("Alice was beginning")


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe\x00", "is no text"), (b"", "is too short"), (None, "cannot be read")]
)
def test_files_that_are_no_text(pair: tuple[Path, Path], tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(pair[1], 32000, tmp_path / "text", None, QUIET)


# --- the command ------------------------------------------------------------------------------


def test_the_command_and_its_report(
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, made = map(str, pair)
    (tmp_path / "text").write_text("<script>alert('&')</script> Ünïcode 🦊 " * 30)
    arguments = ["verify", made, "--against", source, "--text", str(tmp_path / "text"), "--tokens", "50"]
    assert main([*arguments, "--report", str(tmp_path / "report.html")]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    for word in ("perplexity", "KL divergence", "top-1 agreement", "hidden states", "lm_head"):
        assert word in out
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == 3
    assert "<script" not in html
    assert "http" not in html
    assert "🦊" in html or "&lt;" in html
    assert main([*arguments, "--json"]) == 0
    *progress, result = map(json.loads, capsys.readouterr().out.splitlines())
    assert {event["event"] for event in progress} <= {"progress", "note"}
    assert result["event"] == "comparison"
    assert result["tokens"] == 50
    assert 0 < result["kl"]["mean"] <= result["kl"]["max"]


def test_converting_and_verifying_in_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_folder(tmp_path / "source", CONFIG), tmp_path / "out"
    assert main([str(source), "--q-bits", "8", "--mlx-path", str(out), "--verify", "--tokens", "20"]) == 0
    assert "top-1 agreement" in capsys.readouterr().out


def test_a_report_of_weights_without_error(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", CONFIG)
    write_report(compared(source, source, [1, 2, 3]), tmp_path / "r.html")
    assert "nan" not in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "1"], "at least 2"),
        (["--report", "/no/such/folder/r.html"], "does not exist"),
        (["--against", "/no/such"], "is no folder here"),
    ],
)
def test_bad_usage(
    pair: tuple[Path, Path],
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["verify", str(pair[1]), "--against", str(pair[0]), *options]
    try:
        status = main(arguments)
    except SystemExit as leave:
        status = int(leave.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err
