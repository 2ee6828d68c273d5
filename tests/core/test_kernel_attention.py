"""The kernel's attention against MLX's operations: the same steps with both, the same logits."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from models import mixed_config, small_config, small_model

import m7mlx.ring
from m7mlx import load_cache, save_cache
from m7mlx.cache import RollingCache
from m7mlx.model import Mistral
from m7mlx.rope import RopeScaling

pytestmark = pytest.mark.usefixtures("forced_instruction_set")

MODELS: dict[tuple[int | str | None, int], Mistral] = {
    (window, dim): small_model(small_config(sliding_window=window, head_dim=dim))
    for window in (1, 7, 30, None)
    for dim in (20, 32)
}
SCALING = RopeScaling(16, factor=4.0, attention_factor=1.3, query_beta=0.7)
MODELS["mixed and scaled", 32] = small_model(mixed_config(model_type="ministral3", head_dim=32, rope_scaling=SCALING))
FORMATS = (None, 16, 8, 4)
# Keys kept of a conversation that never ends, and sinks among them; more of those than a tile has.
STREAMS = (None, None, (8, 0), (12, 4), (40, 1), (80, 70))
IDS = np.random.default_rng(0).integers(0, 97, 2000)

# What is done to a cache; a number is drawn for each.
STEPS = ("feed", "feed", "feed", "next", "roll back", "snapshot", "restore", "save", "quantize", "read")
scripts = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(1, 40)), min_size=3, max_size=14)


class Run:
    """A conversation, or a batch, to which steps are done; it keeps all logits."""

    def __init__(
        self,
        key: tuple[int | str | None, int],
        kv_bits: int | None,
        slack: int,
        batch: int,
        stream: tuple[int, int] | None,
        folder: Path,
    ) -> None:
        self.model, self.batch, self.folder = MODELS[key], batch, folder
        size, sinks = stream or (None, 0)
        self.cache = self.model.new_cache(
            kv_bits=kv_bits, kv_group_size=32, slack=slack, max_kv_size=size, sinks=sinks
        )
        self.others: list[RollingCache] = []
        self.kept = self.cache.snapshot()
        self.fed = 0
        self.logits: list[np.ndarray] = []

    def feed(self, cache: RollingCache, length: int) -> None:
        rows = [IDS[(self.fed + 11 * row) % 1900 :][:length] for row in range(self.batch)]
        self.fed += length
        self.logits.append(np.array(self.model(mx.array(np.stack(rows)), cache)))
        if self.batch == 1:
            cache.ids += [int(i) for i in rows[0]]

    def do(self, step: str, count: int) -> None:
        cache = self.cache
        if step == "feed":
            self.feed(cache, count)
        elif step == "next":
            for _ in range(count % 10):
                self.feed(cache, 1)
        elif step == "roll back":
            cache.rollback(min(count, cache.max_rollback))
        elif step == "snapshot":  # and somebody else goes on with what is kept
            self.kept = cache.snapshot()
            other = cache.like()
            other.restore(self.kept)
            self.others.append(other)
            self.feed(other, 1 + count % 5)
        elif step == "restore":
            if self.kept.settings == cache.settings:
                cache.restore(self.kept)
        elif step == "save":
            if self.batch == 1 and cache.offset:
                save_cache(self.folder / "cache.safetensors", cache, self.model)
                self.cache = load_cache(self.folder / "cache.safetensors", self.model)
        elif step == "quantize":
            if self.model.config.head_dim == 32 and not cache.format.is_packed and count > 30:
                cache.quantize(8, 32)
        else:  # with writes still to be done
            self.model(mx.array(np.stack([IDS[:3]] * self.batch)), cache)
            cache.ids += [int(i) for i in IDS[:3]] if self.batch == 1 else []
            for ring in cache.rings:
                assert all(mx.isfinite(a.astype(mx.float32)).all() for a in ring.arrays if a.dtype != mx.uint32)

    def finish(self) -> None:
        for cache in (self.cache, *self.others):
            self.feed(cache, 9)
            self.feed(cache, 1)


def logits(script: list[tuple[str, int]], run: Run) -> list[np.ndarray]:
    for step, count in script:
        run.do(step, count)
    run.finish()
    return run.logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@given(
    key=st.sampled_from(list(MODELS)),
    kv_bits=st.sampled_from(FORMATS),
    slack=st.integers(0, 9),
    batch=st.sampled_from((1, 1, 3)),
    stream=st.sampled_from(STREAMS),
    script=scripts,
)
@settings(max_examples=examples(12), deadline=None)
def test_whatever_is_done_to_a_cache_the_logits_are_those_of_mlx(
    folder: Path,
    key: tuple[int | str | None, int],
    kv_bits: int | None,
    slack: int,
    batch: int,
    stream: tuple[int, int] | None,
    script: list[tuple[str, int]],
) -> None:
    if isinstance(key[0], int):  # every layer has a window of its own
        stream = None
    if key[1] == 20 and kv_bits in (4, 8):  # no group divides it
        kv_bits = 16
    found = logits(script, Run(key, kv_bits, slack, batch, stream, folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m7mlx.ring, "has_kernels", lambda: False)
        expected = logits(script, Run(key, kv_bits, slack, batch, stream, folder))
    # A number that lies between two codes may fall to either side. Of keys that are missing, or
    # another's, a token's logits differ by as much as they are. Where a stream has but ten keys
    # beside its sinks, a code of 4 bits weighs more.
    tolerance = {None: 1e-4, 16: 1e-2, 8: 0.1, 4: 0.7 if stream else 0.3}[kv_bits]
    if "quantize" in dict(script):
        tolerance = max(tolerance, 0.1)
    for one, other in zip(found, expected, strict=True):
        assert (np.linalg.norm(one - other, axis=-1) <= tolerance * np.linalg.norm(other, axis=-1)).all()
