"""The cache: exact however a sequence is cut, fixed in size, honest about what it can undo."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import reference
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from models import mixed_config, random_weights, small_config, small_model

from m7mlx.arrays import has_kernels
from m7mlx.cache import RollingCache
from m7mlx.decode import prefill, reuse
from m7mlx.errors import InputError, RollbackError

LENGTH = 70
IDS = [(i * i + 3 * i) % 97 for i in range(LENGTH)]
MODELS = {window: small_model(small_config(sliding_window=window)) for window in (1, 2, 4, 7, 16, None)}
EXPECTED = {
    window: reference.logits(model.config, random_weights(model.config), IDS) for window, model in MODELS.items()
}
windows = st.sampled_from(list(MODELS))


def assert_close(found: mx.array, expected: np.ndarray) -> None:
    difference = np.abs(np.array(found) - expected).max() / np.abs(expected).max()
    assert difference < 1e-4, difference


@given(windows, st.integers(0, 9), st.data())
@settings(max_examples=examples(20), deadline=None)
def test_any_cutting_gives_the_same_logits(window: int | None, slack: int, data: st.DataObject) -> None:
    model = MODELS[window]
    cache = model.new_cache(slack=slack)
    while cache.offset < LENGTH:
        start = cache.offset
        length = data.draw(st.integers(1, LENGTH - start) | st.just(1), label="length")
        found = model(mx.array([IDS[start : start + length]]), cache)[0]
        assert_close(found, EXPECTED[window][start : start + length])


@pytest.mark.parametrize("window", MODELS)
def test_token_by_token_across_many_wraps(window: int | None) -> None:
    model = MODELS[window]
    cache = model.new_cache(slack=1)
    for i, token in enumerate(IDS):
        assert_close(model(mx.array([[token]]), cache)[0, 0], EXPECTED[window][i])


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    model = MODELS[7]
    cache = model.new_cache()
    rows = mx.array([IDS, IDS[::-1]])
    found = mx.concatenate([model(rows[:, i : i + 9], cache) for i in range(0, LENGTH, 9)], axis=1)
    assert_close(found[0], EXPECTED[7])
    assert_close(found[1], reference.logits(model.config, random_weights(model.config), IDS[::-1]))


class RollingCacheMachine(RuleBasedStateMachine):
    """Appends, rollbacks and resets in any order, against logits of the whole sequence."""

    @initialize(window=windows, slack=st.integers(0, 6))
    def start(self, window: int | None, slack: int) -> None:
        self.model = MODELS[window]
        self.weights = random_weights(self.model.config)
        self.cache = RollingCache(self.model.config, slack)
        self.ids: list[int] = []

    @precondition(lambda self: len(self.ids) < 60)
    @rule(
        tokens=st.lists(st.integers(0, 96), min_size=1, max_size=20)
        | st.lists(st.integers(0, 96), min_size=1, max_size=1)
    )
    def append(self, tokens: list[int]) -> None:
        found = self.model(mx.array([tokens]), self.cache)[0]
        self.ids += tokens
        self.cache.ids += tokens
        assert_close(found, reference.logits(self.model.config, self.weights, self.ids)[-len(tokens) :])

    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, len(self.ids) + 1), label="n")
        offset, possible = self.cache.offset, self.cache.max_rollback
        window, slack = self.cache.window, self.cache.slack
        if window is None or len(self.ids) == 0:
            assert possible == len(self.ids)
        if n <= possible:
            self.cache.rollback(n)
            del self.ids[len(self.ids) - n :]
            assert (self.cache.offset, self.cache.ids) == (offset - n, self.ids)
        else:
            with pytest.raises(RollbackError):
                self.cache.rollback(n)
            assert (self.cache.offset, self.cache.ids) == (offset, self.ids)
        assert possible <= max(slack, offset)

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.ids = []


RollingCacheMachine.TestCase.settings = settings(max_examples=examples(15), stateful_step_count=12, deadline=None)
TestRollingCache = RollingCacheMachine.TestCase


@given(st.sampled_from([1, 4, 7, 16]), st.integers(1, 8), st.integers(0, LENGTH - 10), st.data())
@settings(max_examples=examples(20), deadline=None)
def test_rollback_of_up_to_the_slack_always_works(window: int, slack: int, before: int, data: st.DataObject) -> None:
    model = MODELS[window]
    cache = model.new_cache(slack=slack)
    if before:
        prefill(model, IDS[:before], cache, chunk=data.draw(st.integers(1, 30), label="chunk"))
    wrong = data.draw(st.integers(0, min(slack, before + slack)), label="n")
    for _ in range(wrong):
        model(mx.array([[5]]), cache)
    cache.rollback(wrong)
    assert_close(model(mx.array([IDS[before : before + 10]]), cache)[0], EXPECTED[window][before : before + 10])


def test_rollback_past_the_slack_raises_and_changes_nothing() -> None:
    model = MODELS[4]
    cache = model.new_cache(slack=3)
    prefill(model, IDS[:30], cache)
    with pytest.raises(RollbackError, match="only 3 can still be undone"):
        cache.rollback(4)
    with pytest.raises(RollbackError):
        cache.rollback(-1)
    assert cache.offset == 30
    assert cache.ids == IDS[:30]
    cache.rollback(2)
    with pytest.raises(RollbackError, match="only 1 "):  # two of the three are used up
        cache.rollback(2)
    assert_close(model(mx.array([IDS[28:40]]), cache)[0], EXPECTED[4][28:40])


def test_memory_after_fifty_windows_is_memory_after_one() -> None:
    window = 64
    model = small_model(small_config(sliding_window=window))
    cache = model.new_cache()
    ids = [i % 97 for i in range(50 * window)]
    prefill(model, ids[:window], cache, chunk=32)
    after_one = cache.nbytes
    # 3 layers, keys and values, 2 heads of 16 numbers of 4 bytes
    assert after_one == 3 * 2 * 2 * 16 * 4 * (window + cache.slack)
    prefill(model, ids[window:], cache, chunk=100)
    for _ in range(5):
        mx.eval(model(mx.array([[1]]), cache))
    assert cache.offset == 50 * window + 5
    assert cache.nbytes == after_one


def test_peak_memory_of_prefill_does_not_grow_with_the_prompt() -> None:
    model = small_model(small_config(sliding_window=64, n_layers=8, n_kv_heads=4))

    def peak(length: int) -> int:
        cache = model.new_cache()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(prefill(model, [i % 97 for i in range(length)], cache, chunk=64))
        return mx.get_peak_memory() - before

    short, long = peak(64 * 4), peak(64 * 100)
    keys_of_the_long_prompt = 8 * 2 * 4 * 16 * 4 * 64 * 100
    assert long < short * 1.1
    assert long < keys_of_the_long_prompt / 4


def test_a_long_prompt_takes_little_beside_its_keys() -> None:
    """Layers with full attention keep all of it; besides, there are a layer's copy and scores."""
    config = mixed_config(sliding_window=64, n_layers=8, layer_types=("full_attention", "sliding_attention") * 4)
    model, length = small_model(config), 64 * 100
    cache = model.new_cache()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(prefill(model, [i % 97 for i in range(length)], cache, chunk=64))
    layer = 2 * 2 * 16 * 4 * length
    scores = 0 if has_kernels() else 8 * config.n_heads * 64 * length * 4  # the kernels keep none
    assert cache.nbytes < 4.3 * layer
    assert mx.get_peak_memory() - before < cache.nbytes + 3 * layer + scores


def test_a_cache_of_both_kinds_can_undo_what_all_layers_can() -> None:
    model = small_model(mixed_config())
    cache = model.new_cache(slack=3)
    assert cache.turns_at == 10
    prefill(model, IDS[:10], cache)
    assert cache.max_rollback == 10
    prefill(model, IDS[10:30], cache)
    assert cache.max_rollback == 3
    with pytest.raises(RollbackError, match="only 3 can still be undone"):
        cache.rollback(4)
    assert model.new_cache(max_kv_size=9, sinks=2, slack=3).turns_at == 10
    with pytest.raises(InputError, match="max_kv_size must be above the number of sinks"):
        model.new_cache(max_kv_size=2, sinks=2)
    assert "window 7 in 2 of them" in repr(model)
    assert "all tokens, in 2 layers window 7 + slack 3" in repr(cache)


@pytest.mark.parametrize("window", [4990, 8000, None])
def test_writing_does_not_copy_the_ring(window: int | None) -> None:
    """A decode step may hold only a little more than the ring itself: MLX wrote in place."""
    model = small_model(small_config(sliding_window=window, n_layers=1, n_heads=2, n_kv_heads=2))
    cache = model.new_cache()
    prefill(model, [1] * 5000, cache)
    token = mx.array([[1]])
    for _ in range(3):
        token = mx.argmax(model(token, cache)[:, -1:], -1)
        mx.eval(token)
    mx.clear_cache()
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    mx.eval(model(token, cache))
    assert mx.get_peak_memory() - active < cache.nbytes / 4


def test_a_broken_off_pass_is_noticed() -> None:
    model = MODELS[7]
    cache = model.new_cache(slack=2)
    prefill(model, IDS[:30], cache)
    assert not cache.positions.forward_passes(20)[0].in_place
    cache.begin(20)  # layers may have begun to write; the pass never ends
    assert not cache.intact
    with pytest.raises(RollbackError, match="reset"):
        model(mx.array([[1]]), cache)
    cache.reset()
    assert_close(model(mx.array([IDS]), cache)[0], EXPECTED[7])


def test_slack_must_not_be_negative() -> None:
    with pytest.raises(InputError, match="slack"):
        MODELS[7].new_cache(slack=-1)


# --- snapshots and reuse --------------------------------------------------------------------------


@pytest.mark.parametrize("window", [4, 16, None])
def test_both_go_on_from_a_snapshot(window: int | None) -> None:
    model = MODELS[window]
    cache = model.new_cache(slack=3)
    prefill(model, IDS[:40], cache)
    snapshot = cache.snapshot()
    assert_close(model(mx.array([IDS[40:]]), cache)[0], EXPECTED[window][40:])
    other = model.new_cache(slack=3)
    other.restore(snapshot)
    assert_close(model(mx.array([IDS[40:60]]), other)[0], EXPECTED[window][40:60])
    cache.restore(snapshot)
    assert cache.ids == IDS[:40]
    assert_close(model(mx.array([IDS[40:50]]), cache)[0], EXPECTED[window][40:50])


def test_a_snapshot_remembers_what_cannot_be_undone_any_more() -> None:
    cache = MODELS[4].new_cache(slack=3)
    prefill(MODELS[4], IDS[:30], cache)
    cache.rollback(2)
    snapshot = cache.snapshot()
    prefill(MODELS[4], IDS[28:50], cache)
    cache.restore(snapshot)
    assert cache.max_rollback == snapshot.max_rollback == 1
    with pytest.raises(RollbackError):
        cache.rollback(2)


def test_a_snapshot_fits_only_its_own_kind() -> None:
    snapshot = MODELS[4].new_cache().snapshot()
    for other in (MODELS[7].new_cache(), MODELS[4].new_cache(slack=5)):
        with pytest.raises(InputError, match="another shape"):
            other.restore(snapshot)
    broken = MODELS[4].new_cache(slack=1)
    prefill(MODELS[4], IDS[:30], broken)
    broken.begin(9)
    with pytest.raises(RollbackError, match="broken off"):
        broken.snapshot()


def test_reuse_takes_the_longest_start_that_anybody_holds() -> None:
    model = MODELS[7]
    cache = model.new_cache(slack=2)
    snapshots = []
    for end in (10, 25, 40):
        prefill(model, IDS[cache.offset : end], cache)
        snapshots.append(cache.snapshot())
    for known, ids in [
        (40, [*IDS[:40], 5]),  # all of it
        (39, [*IDS[:39], 5, 5]),  # rolled back
        (38, IDS[:39]),  # the last is always computed
        (25, [*IDS[:30], 5, 5]),  # beyond the slack: from a snapshot
        (24, [*IDS[:24], 5, 5]),  # rolled back from there
        (10, [*IDS[:20], 5]),
        (0, [5, *IDS]),
    ]:
        assert reuse(cache, ids, snapshots) == known
        assert cache.ids == ids[:known]
        expected = reference.logits(model.config, random_weights(model.config), ids)
        assert_close(model(mx.array([ids[known:]]), cache)[0], expected[known:])
        cache.ids += ids[known:]
        cache.restore(snapshots[-1])


def test_reuse_passes_over_snapshots_of_other_caches() -> None:
    other = MODELS[7].new_cache(slack=9)
    prefill(MODELS[7], IDS[:20], other)
    cache = MODELS[7].new_cache(slack=2)
    assert reuse(cache, IDS[:25], [other.snapshot()]) == 0


# --- in fewer bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [16, None])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.1), (4, 0.8)])
def test_quantised_on_the_way_or_from_the_start(window: int | None, bits: int, most: float) -> None:
    """Whenever the cache is quantised, the logits stay close (this model is a rough one)."""
    model = small_model(small_config(sliding_window=window, head_dim=32))
    exact = model(mx.array([IDS]))[0, 40:]
    for when in (0, 20, 40):
        cache = model.new_cache()
        for start in range(0, 40, 10):
            if start == when:
                cache.quantize(bits, 32)
            prefill(model, IDS[start : start + 10], cache)
        if when == 40:
            cache.quantize(bits, 32)
        error = model(mx.array([IDS[40:]]), cache)[0] - exact
        assert mx.sqrt((error**2).mean() / (exact**2).mean()) < most


def test_quantising_twice() -> None:
    model = small_model(small_config(head_dim=32))
    cache = model.new_cache(kv_bits=8, kv_group_size=32)
    cache.quantize(8, 32)
    with pytest.raises(InputError, match="8 bits already"):
        cache.quantize(4, 32)
    with pytest.raises(InputError, match="do not divide"):
        model.new_cache(kv_bits=8, kv_group_size=64)
    with pytest.raises(InputError, match="4, 8 or 16 bits"):
        model.new_cache(kv_bits=3)


@pytest.mark.parametrize("head_dim", [32, 96])
@pytest.mark.parametrize("kind", ["window", "full", "stream", "mixed"])
def test_a_copy_in_other_bits_and_back_again(kind: str, head_dim: int) -> None:
    """It holds the same conversation: exactly in as many bits, closely in 8.

    None disturbs another.
    """
    config = (mixed_config if kind == "mixed" else small_config)(
        sliding_window=16 if kind in ("window", "mixed") else None, head_dim=head_dim, n_layers=3
    )
    model = small_model(config)
    stream = {"max_kv_size": 24} if kind == "stream" else {}
    cache = model.new_cache(**stream)
    prefill(model, IDS[:40], cache)
    cache.ids = IDS[:40]
    for bits, most in ((None, 1e-6), (8, 0.1)):
        copy = model.new_cache(kv_bits=bits, kv_group_size=32, **stream)
        copy.take(cache, model.dtype)
        back = model.new_cache(**stream)
        back.take(copy, model.dtype)
        assert copy.ids == back.ids == IDS[:40] and copy.nbytes <= cache.nbytes == back.nbytes
        before = cache.snapshot()
        exact = model(mx.array([IDS[40:]]), cache)[0]
        mx.eval(exact)
        cache.restore(before)
        for one in (copy, back):
            error = model(mx.array([IDS[40:]]), one)[0] - exact
            assert mx.sqrt((error**2).mean() / (exact**2).mean()) < most
    with pytest.raises(InputError, match="another window"):
        model.new_cache(slack=9, **stream).take(cache, model.dtype)


def test_the_bits_of_a_new_cache_are_the_models_unless_others_are_asked_for() -> None:
    model = small_model(small_config())
    sizes = {}
    for default in (None, 16):
        model.kv_bits = default
        for bits in (None, 16, 32):
            cache = model.new_cache(kv_bits=bits)
            prefill(model, IDS, cache)
            assert cache.like().format == cache.format
            sizes[default, bits] = cache.nbytes
    assert sizes[None, None] == sizes[None, 32] == sizes[16, 32]
    assert sizes[16, None] == sizes[None, 16] == sizes[16, 16] == sizes[None, 32] / 2
