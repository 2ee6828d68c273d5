"""The pieces of benchmarks/long_context.py, on models of a few thousand weights."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from m7mlx_bench.models import write_random
from models import random_weights, small_config, small_model
from PIL import Image

from m7mlx.model import Mistral
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import long_context
import long_context_cost
import long_context_passkey
import long_context_reach

CONFIG = small_config(sliding_window=None, n_layers=2)
MODEL = small_model(CONFIG)
WINDOW = 8
IDS = [(i * i + 3 * i) % 97 for i in range(150)]


def expected_losses(ids: list[int], window: int | None = None, max_kv_size: int | None = None) -> np.ndarray:
    config = replace(CONFIG, sliding_window=window)
    logits = reference.logits(config, random_weights(CONFIG), ids, max_kv_size, 4)[:-1]
    picked: np.ndarray = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    return picked


@pytest.fixture(scope="session")
def words(demo_model: Path) -> Tokenizer:
    """The demo model's tokenizer, which takes digits one by one."""
    return load_tokenizer(demo_model)


@pytest.fixture(scope="session")
def reader(words: Tokenizer) -> Mistral:
    """A random model that the tokenizer fits."""
    return small_model(small_config(vocab_size=49152, sliding_window=None, n_layers=2))


def test_losses_are_those_of_the_three_ways_to_read() -> None:
    ways = long_context.caches(MODEL, WINDOW)
    found = {name: long_context.losses(MODEL, IDS, new()) for name, new in ways.items()}
    assert np.allclose(found["window"], expected_losses(IDS, window=WINDOW), atol=1e-4)
    assert np.allclose(found["4 sinks"], expected_losses(IDS, max_kv_size=WINDOW), atol=1e-4)
    assert np.allclose(found["full"], expected_losses(IDS), atol=1e-4)
    assert not np.allclose(found["full"], found["window"], atol=1e-2)
    assert np.allclose(long_context.losses(MODEL, IDS, ways["full"](), skip=100), found["full"][100:], atol=1e-4)


def test_a_fresh_reading_scores_every_token_alike_wherever_it_stands() -> None:
    found = long_context.fresh_losses(MODEL, IDS, 30)
    assert len(found) == len(IDS) - 30
    for start in range(30, len(IDS), 30):
        expected = expected_losses(IDS[start - 30 : start + 30])[29:]
        assert np.allclose(found[start - 30 : start], expected, atol=1e-4), start


def test_buckets_and_ratios() -> None:
    assert long_context.by_bucket([1, 2, 3, 5, 9, 9], 2) == [1.5, 4, 9]
    fresh, found = [[0.0, 0.0], [1.0, 1.0]], [[np.log(2), np.log(8)]]
    assert long_context.ratios(fresh, found) == pytest.approx([4])
    assert long_context.ratios(fresh, found, 1, 2) == pytest.approx([8])
    assert long_context.ratios(fresh, [[0.0]], 0, 2) == [1]  # read half as far
    assert long_context.ratios(fresh, [[0.0]], 1, 2) == []


@pytest.mark.demo
@pytest.mark.parametrize("lead", [0, 7, 50])
def test_the_number_stands_at_the_distance(words: Tokenizer, lead: int) -> None:
    digits = words.encode("68425")
    assert len(digits) == 5
    before: list[int] = []
    for distance in (16, 17, 40, 133):
        text, asked = long_context_passkey.passkey_prompt(words, "68425", lead, distance)
        ids = text + asked
        told = next(i for i in range(len(ids)) if ids[i : i + 5] == digits)
        assert len(ids) - 1 - (told + 4) == distance
        assert text[: len(before)] == before  # so that one reading serves all distances
        before = text
    assert "68425" in words.decode(text) and words.decode(asked) == long_context_passkey.ASKED


@pytest.mark.demo
def test_a_number_is_worth_exactly_nothing_beyond_the_reach(words: Tokenizer, reader: Mistral) -> None:
    """Two layers and a window of 24 reach 46 positions.

    The last digit is asked for 4 positions on.
    """
    distances = [16, 41, 47, 48, 90]
    margins: dict[str, list[float]] = {}
    for name, new in long_context.caches(reader, 24).items():
        told, other = (
            long_context_passkey.told_and_asked(reader, words, keys, 3, distances, new())
            for keys in (["68425", "17039"], ["17039", "68425"])
        )
        margins[name] = [a[0][0] - b[1][0] for a, b in zip(told, other, strict=True)]
    assert [margin != 0 for margin in margins["window"]] == [True, True, False, False, False]
    assert all(margins["full"])


@pytest.mark.demo
def test_asking_leaves_the_cache_as_it_was(words: Tokenizer, reader: Mistral) -> None:
    found = long_context_passkey.told_and_asked(
        reader, words, ["68425"], 3, [20, 60], long_context.caches(reader, 24)["window"]()
    )
    text, asked = long_context_passkey.passkey_prompt(words, "68425", 3, 60)
    digits = words.encode("68425")
    logits = reader(mx.array([text + asked + digits]), long_context.caches(reader, 24)["window"]())[0, -6:-1]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = sum(logprobs[i, digit].item() for i, digit in enumerate(digits)) / 5
    assert found[1][0][0] == pytest.approx(expected, abs=1e-4)


def test_a_change_moves_the_logits_within_the_reach_and_by_nothing_beyond() -> None:
    distances = list(range(1, 60))
    changes = long_context_reach.moved(MODEL, IDS, WINDOW, distances)
    assert [change > 0 for change in changes] == [d <= CONFIG.n_layers * (WINDOW - 1) for d in distances]


@pytest.mark.parametrize("engine", long_context_cost.ENGINES)
def test_a_sequence_is_read_on_and_measured_at_each_position(engine: str, tmp_path: Path) -> None:
    write_random(tmp_path, small_config(vocab_size=4096, sliding_window=20, n_layers=1))
    rows = long_context_cost.measure(engine, tmp_path, [64, 256, 600], 2)
    assert [row["position"] for row in rows] == [64, 256, 600]
    assert min(row[key] for row in rows for key in ("prefill", "ms", "kv", "peak", "rss")) > 0
    grows = rows[0]["kv"] < rows[1]["kv"] < rows[2]["kv"]
    assert grows if engine == "mlx-lm" else len({row["kv"] for row in rows}) == 1


@pytest.mark.demo
def test_the_whole_script(
    words: Tokenizer,
    reader: Mistral,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(long_context, "demo", lambda: (reader, words))
    monkeypatch.setattr(long_context, "TOY", replace(long_context_reach.TOY, n_layers=1))
    monkeypatch.setattr(long_context, "TOY_WINDOW", 9)
    monkeypatch.setattr(long_context, "PLACES", (1 / 8, 1.5))
    result, picture = tmp_path / "long.json", tmp_path / "long.png"
    row = {"position": 1024, "prefill": 1.0, "ms": 2.0, "kv": 3e6, "peak": 4e6, "rss": 5e6}
    result.write_text(json.dumps({"cost": {"window": 1024, "runs": {"m7mlx": [row, row | {"position": 2048}]}}}))
    options = ["--window", "128", "--windows", "2", "--texts", "2", "--keys", "2", "--json"]
    argv = ["long_context.py", "perplexity", "passkey", "reach", *options, str(result), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", argv)
    long_context.main()
    data: dict[str, Any] = json.loads(result.read_text())
    assert {"perplexity", "passkey", "reach", "cost"} == set(data)
    assert {name: [len(text) for text in texts] for name, texts in data["perplexity"]["runs"].items()} == {
        "fresh": [2, 2],
        "window": [2, 2],
        "4 sinks": [2, 2],
        "full": [2],
    }
    assert all(len(values) == 4 for values in data["passkey"]["runs"]["full"]["margins"])
    shown = capsys.readouterr().out
    assert "greatest beyond 0\n" in shown and "| distance |" in shown
    with Image.open(picture) as image:
        assert image.width > 1500
    monkeypatch.setattr(sys, "argv", ["long_context.py", "nothing"])
    with pytest.raises(SystemExit):
        long_context.main()
