"""Computing ahead: in order, within bounds, and errors come out where they belong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from m7mlx_convert import pipeline
from m7mlx_convert.folder import open_folder
from m7mlx_convert.pipeline import compute_ahead
from m7mlx_convert.plan import Plan, PlannedParameter, make_plan
from m7mlx_convert.scheme import Recipe
from m7mlx_convert.writer import TensorBytes
from models import random_weights, small_config, write_folder

from m7mlx.errors import WeightsError

CONFIG = small_config(vocab_size=32000)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(open_folder(write_folder(tmp_path / "source", CONFIG), "source"), Recipe(), None)


def test_in_order_and_whole(plan: Plan) -> None:
    weights = random_weights(CONFIG)
    names = []
    for planned, (piece,) in compute_ahead(plan.parameters):
        names.append(planned.name)
        found = np.frombuffer(piece.data, np.float32).reshape(piece.shape)
        np.testing.assert_array_equal(found, weights[planned.name])
    assert names == list(weights)


@pytest.mark.parametrize("limit", [1, 300_000, 10**9])
def test_what_is_in_flight_is_bounded(plan: Plan, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Never more than the limit at one time, unless a single parameter is larger.

    The writer is slower than all.
    """
    monkeypatch.setattr(pipeline, "IN_FLIGHT", limit)
    lock, now, most = threading.Lock(), 0, 0
    compute = pipeline._compute

    def counted(planned: PlannedParameter) -> list[TensorBytes]:
        nonlocal now, most
        with lock:
            now += planned.memory
            most = max(most, now)
        return compute(planned)

    monkeypatch.setattr(pipeline, "_compute", counted)
    for planned, _ in compute_ahead(plan.parameters):
        with lock:
            now -= planned.memory
    # The one that the caller has taken and not let go of yet comes on top.
    largest = max(planned.memory for planned in plan.parameters)
    assert most <= max(limit, largest) + largest


def test_an_error_comes_out_and_no_thread_stays(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    source = open_folder(write_folder(tmp_path / "source", CONFIG, weights), "source")
    computed = compute_ahead(make_plan(source, Recipe(), None).parameters)
    for name in list(weights)[: list(weights).index("model.layers.1.mlp.up_proj.weight")]:
        assert next(computed)[0].name == name
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        next(computed)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("convert")]


def test_a_caller_that_leaves_in_the_middle(plan: Plan) -> None:
    computed: Iterator[object] = compute_ahead(plan.parameters)
    next(computed)
    computed.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("convert")]
    assert mx.array([1]).item() == 1
