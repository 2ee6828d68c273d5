"""All that a cache can do, in any order, against lists of keys attended to one by one.

No model: each token brings keys, values and queries of its own, so that thousands of cases run and
quantised rows can be compared exactly. The reference rotates, quantises and looks up every row anew
for every query.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from effort import examples
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import small_config, small_model

from m7mlx.attention import attend_to_ring
from m7mlx.batch import BatchCache
from m7mlx.cache import KVCache, RollingCache, Snapshot
from m7mlx.cache_file import load_cache, save_cache
from m7mlx.decode import reuse
from m7mlx.errors import InputError, RollbackError
from m7mlx.model import Mistral

VOCAB, LAYERS, HEADS, KV, DIM, THETA = 11, 2, 4, 2, 32, 1e4
# Rotated keys differ in their last bits, so that one between two codes may fall to either side.
NEAR = {None: 2e-5, 8: 1e-2, 4: 0.15}
_rng = np.random.default_rng(7)
QUERIES, KEYS, VALUES = (
    [mx.array(_rng.standard_normal((VOCAB, n, DIM)).astype(np.float32)) for _ in range(LAYERS)]
    for n in (HEADS, KV, KV)
)
tokens_of = st.integers(0, VOCAB - 1)


@functools.cache
def model(window: int | None, layer_types: tuple[str, ...]) -> Mistral:
    return small_model(
        small_config(
            vocab_size=VOCAB,
            n_layers=LAYERS,
            n_heads=HEADS,
            head_dim=DIM,
            sliding_window=window,
            layer_types=layer_types,
        )
    )


def rotate(x: mx.array, position: int) -> mx.array:  # [heads, DIM]
    return mx.fast.rope(x[None, :, None], DIM, traditional=False, base=THETA, scale=1.0, offset=position)[0, :, 0]


def rounded(x: mx.array, bits: int | None) -> mx.array:
    if bits is None:
        return x
    codes, scales, biases = mx.quantize(x, 32, bits)
    scales, biases = (s.astype(mx.float16).astype(mx.float32) for s in (scales, biases))
    return mx.dequantize(codes, scales, biases, 32, bits)


@functools.cache
def row(layer: int, token: int, position: int, bits: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The key, rotated to its position, and the value of one token, as they are stored."""
    key, value = rotate(KEYS[layer][token], position), VALUES[layer][token]
    if bits is not None:
        key = mx.hadamard_transform(rounded(mx.hadamard_transform(key), bits))  # its own inverse
    return np.array(key, np.float64), np.array(rounded(value, bits), np.float64)


@functools.cache
def query(layer: int, token: int, position: int) -> np.ndarray:
    return np.array(rotate(QUERIES[layer][token], position), np.float64)


def expected(cache: RollingCache, tokens: list[int], position: int, layer: int) -> np.ndarray:
    """What the token at `position` gets from attention: [HEADS, DIM]."""
    span = cache.positions.spans[cache.rings[layer].kind]
    bits, window = cache.format.bits, span.window
    seen = range(0 if window is None else max(0, position - window + 1), position + 1)
    rows = [row(layer, tokens[p], p, bits) for p in seen]
    if window is not None:
        for i in range(min(span.n_sinks, seen.start)):
            # A sink moves along, never further away than max_kv_size − 1; it is stored as computed.
            moved = i + max(0, position - (window + span.n_sinks - 1))
            rows.append((row(layer, tokens[i], moved, None)[0], row(layer, tokens[i], i, None)[1]))
    q = query(layer, tokens[position], position)
    out = np.zeros((HEADS, DIM))
    for head in range(HEADS):
        shared = head // (HEADS // KV)
        scores = np.array([k[shared] @ q[head] for k, _ in rows]) / np.sqrt(DIM)
        weights = np.exp(scores - scores.max())
        out[head] = weights @ np.array([v[shared] for _, v in rows]) / weights.sum()
    return out


def forward(cache: KVCache, rows: list[list[int]]) -> list[np.ndarray]:
    """One pass over new tokens [B][L] through all layers; per layer [B, HEADS, L, DIM]."""
    ids = mx.array(rows)
    length = ids.shape[1]
    cache.begin(length)
    described = cache.positions.forward_passes(length)
    outs = []
    for layer, ring in enumerate(cache.rings):
        heads = mx.concatenate([table[layer][ids].swapaxes(1, 2) for table in (QUERIES, KEYS, VALUES)], axis=1)
        outs.append(attend_to_ring(heads, ring, described[ring.kind], KV))
    cache.advance(length)
    mx.eval(outs, cache.arrays)
    return [np.array(out) for out in outs]


def check(cache: RollingCache, tokens: list[int], count: int, outs: list[np.ndarray], batch_row: int) -> None:
    """The outputs for the last `count` of `tokens`."""
    for layer, out in enumerate(outs):
        for i in range(count):
            wanted = expected(cache, tokens, len(tokens) - count + i, layer)
            assert np.abs(out[batch_row, :, i] - wanted).max() < NEAR[cache.format.bits]


@dataclass
class Conversation:
    cache: RollingCache
    tokens: list[int] = field(default_factory=list)
    snapshots: list[tuple[Snapshot, list[int]]] = field(default_factory=list)

    def append(self, new: list[int]) -> None:
        outs = forward(self.cache, [new])
        self.tokens += new
        self.cache.ids += new
        check(self.cache, self.tokens, len(new), outs, 0)


class CacheMachine(RuleBasedStateMachine):
    @initialize(
        window=st.sampled_from([4, 5, 7, 16, None, None]),
        mixed=st.sampled_from([(), (), ("full_attention", "sliding_attention")]),
        slack=st.integers(0, 6),
        stream=st.tuples(st.integers(6, 12), st.integers(0, 5)) | st.none(),
        bits=st.sampled_from([None, None, 4, 8]),
        prompts=st.tuples(*[st.lists(tokens_of, max_size=25)] * 2),
    )
    def start(
        self,
        window: int | None,
        mixed: tuple[str, ...],
        slack: int,
        stream: tuple[int, int] | None,
        bits: int | None,
        prompts: tuple[list[int], list[int]],
    ) -> None:
        mixed = mixed if window is not None else ()
        size, sinks = stream if stream and (window is None or mixed) else (None, 0)
        self.model = model(window, mixed)
        self.new = functools.partial(
            self.model.new_cache, slack=slack, kv_bits=bits, kv_group_size=32, max_kv_size=size, sinks=sinks
        )
        self.single = [Conversation(self.new()), Conversation(self.new())]
        for one, prompt in zip(self.single, prompts, strict=True):
            if prompt:  # most of what follows happens after the wrap
                one.append(prompt)
        self.batched: list[Conversation] = []
        self.batch: BatchCache | None = None

    def pick(self, data: st.DataObject) -> Conversation:
        return self.single[data.draw(st.integers(0, len(self.single) - 1), label="conversation")]

    @precondition(lambda self: self.single)
    @rule(data=st.data(), new=st.lists(tokens_of, min_size=1, max_size=14))
    def append(self, data: st.DataObject, new: list[int]) -> None:
        one = self.pick(data)
        assume(len(one.tokens) < 90)
        one.append(new)

    @precondition(lambda self: self.single)
    @rule(data=st.data(), new=st.lists(tokens_of, min_size=1, max_size=5))
    def decode(self, data: st.DataObject, new: list[int]) -> None:
        one = self.pick(data)
        assume(len(one.tokens) < 90)
        for token in new:
            one.append([token])

    @precondition(lambda self: self.single)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        one = self.pick(data)
        cache = one.cache
        n = data.draw(st.integers(0, cache.max_rollback) | st.integers(0, len(one.tokens) + 1), label="n")
        possible = cache.max_rollback
        if n <= possible:
            cache.rollback(n)
            del one.tokens[len(one.tokens) - n :]
        else:
            with pytest.raises(RollbackError):
                cache.rollback(n)
        assert (cache.offset, cache.ids) == (len(one.tokens), one.tokens)

    @precondition(lambda self: self.single)
    @rule(data=st.data())
    def snapshot(self, data: st.DataObject) -> None:
        one = self.pick(data)
        one.snapshots = [*one.snapshots[-2:], (one.cache.snapshot(), list(one.tokens))]

    @precondition(lambda self: any(one.snapshots for one in self.single))
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        one = self.pick(data)
        assume(one.snapshots)
        snapshot, tokens = data.draw(st.sampled_from(one.snapshots), label="snapshot")
        if snapshot.settings != one.cache.settings:  # taken before it was quantised
            with pytest.raises(InputError, match="precision"):
                one.cache.restore(snapshot)
            return
        one.cache.restore(snapshot)
        one.tokens = list(tokens)
        assert (one.cache.ids, one.cache.max_rollback) == (tokens, snapshot.max_rollback)

    @precondition(lambda self: self.single)
    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        one = self.pick(data)
        assume(one.tokens)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "chat.cache"
            save_cache(path, one.cache, self.model)
            loaded = load_cache(path, self.model)
        assert (loaded.offset, loaded.ids) == (len(one.tokens), one.tokens)
        assert (loaded.max_rollback, loaded.settings) == (one.cache.max_rollback, one.cache.settings)
        one.cache, one.snapshots = loaded, one.snapshots

    @precondition(lambda self: self.single)
    @rule(data=st.data(), bits=st.sampled_from([4, 8]))
    def quantize(self, data: st.DataObject, bits: int) -> None:
        one = self.pick(data)
        before = one.cache.format.bits
        if before in (None, bits):
            one.cache.quantize(bits, 32)
            assert one.cache.format.bits == bits
        else:
            with pytest.raises(InputError):
                one.cache.quantize(bits, 32)
            assert one.cache.format.bits == before

    @precondition(lambda self: self.single)
    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        one = self.pick(data)
        one.cache.reset()
        one.tokens = []

    @precondition(lambda self: self.single)
    @rule(data=st.data(), new=st.lists(tokens_of, min_size=1, max_size=20), use_snapshots=st.booleans())
    def reuse(self, data: st.DataObject, new: list[int], use_snapshots: bool) -> None:
        one = self.pick(data)
        keep = data.draw(st.integers(0, len(one.tokens)), label="keep")
        wanted = one.tokens[:keep] + new
        assume(len(wanted) < 90)
        held = [s for s, _ in one.snapshots] if use_snapshots else []
        known = reuse(one.cache, wanted, held)
        assert one.cache.ids == wanted[:known]
        assert known < len(wanted)
        one.tokens = wanted[:known]
        one.append(wanted[known:])

    # --- in a batch -------------------------------------------------------------------------------

    @precondition(lambda self: self.single)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        one = self.pick(data)
        if self.batch is None:
            self.batch = BatchCache([one.cache])
        elif one.cache.settings != self.batched[0].cache.settings:
            with pytest.raises(InputError, match="share"):
                self.batch.join(one.cache)
            return
        else:
            possible = min(self.batch.max_rollback, one.cache.max_rollback)
            assert self.batch.join(one.cache) == len(self.batched)
            assert self.batch.max_rollback <= possible  # what one row has lost, all cannot undo
        self.single.remove(one)
        self.batched.append(one)
        if len(self.single) + len(self.batched) < 4:
            self.single.append(Conversation(self.new()))

    @precondition(lambda self: self.single and self.batch is not None)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        """A conversation takes the place of one that is given up."""
        one, batch = self.pick(data), self.batch
        assert batch is not None
        row = data.draw(st.integers(0, len(self.batched) - 1), label="row")
        if one.cache.settings != self.batched[0].cache.settings:
            with pytest.raises(InputError, match="share"):
                batch.put(row, one.cache)
            return
        possible = one.cache.max_rollback
        batch.put(row, one.cache)
        assert batch.max_rollback <= possible
        self.single.remove(one)
        self.batched[row] = one
        assert batch.ids == [other.tokens for other in self.batched]
        self.single.append(Conversation(self.new()))

    @precondition(lambda self: self.batch is not None)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        assert self.batch is not None
        rows = data.draw(st.permutations(range(len(self.batched))), label="rows")
        rows = rows[: data.draw(st.integers(1, len(rows)), label="how many")]
        self.batch.keep(rows)
        self.batched = [self.batched[i] for i in rows]
        assert self.batch.ids == [one.tokens for one in self.batched]
        if not self.single:
            self.single.append(Conversation(self.new()))

    @precondition(lambda self: self.batch is not None)
    @rule(data=st.data(), length=st.just(1) | st.integers(1, 9))
    def batch_append(self, data: st.DataObject, length: int) -> None:
        assume(max(len(one.tokens) for one in self.batched) < 90)
        row = st.lists(tokens_of, min_size=length, max_size=length)
        new = [data.draw(row) for _ in self.batched]
        assert self.batch is not None
        outs = forward(self.batch, new)
        for i, one in enumerate(self.batched):
            one.tokens += new[i]
            self.batch.ids[i] += new[i]
            check(one.cache, one.tokens, length, outs, i)
        assert self.batch.offsets == [len(one.tokens) for one in self.batched]

    @precondition(lambda self: self.batch is not None)
    @rule(data=st.data())
    def batch_rollback(self, data: st.DataObject) -> None:
        assert self.batch is not None
        possible = self.batch.max_rollback
        n = data.draw(st.integers(0, possible) | st.integers(0, min(self.batch.offsets) + 1), label="n")
        if n <= possible:
            self.batch.rollback(n)
            for one in self.batched:
                del one.tokens[len(one.tokens) - n :]
        else:
            with pytest.raises(RollbackError):
                self.batch.rollback(n)
        assert self.batch.ids == [one.tokens for one in self.batched]

    @precondition(lambda self: self.batch is not None)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        assert self.batch is not None
        i = data.draw(st.integers(0, len(self.batched) - 1), label="row")
        one = self.batched[i]
        if len(self.batched) == 1:
            with pytest.raises(InputError, match="last row"):
                self.batch.leave(i)
            one.cache, self.batch = self.batch.row(i), None
        else:
            one.cache = self.batch.leave(i)
        self.batched.remove(one)
        self.single.append(one)
        assert (one.cache.offset, one.cache.ids) == (len(one.tokens), one.tokens)

    @invariant()
    def bounded(self) -> None:
        for one in getattr(self, "single", []):
            for ring in one.cache.rings:
                assert ring.window is None or ring.n_slots <= ring.window + ring.slack


CacheMachine.TestCase.settings = settings(max_examples=examples(50), stateful_step_count=25, deadline=None)
TestCacheMachine = CacheMachine.TestCase
