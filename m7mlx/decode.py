"""Ids → ids: reuse what a cache holds, prefill the rest in chunks, decode token by token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn

from m7mlx.arrays import has_kernels, on_cpu
from m7mlx.cache import RollingCache, Snapshot
from m7mlx.compiled import step_of
from m7mlx.lora import base_of
from m7mlx.model import Mistral
from m7mlx.sampling import Sampler

_COMPARED = 4096  # ids at a time


def default_chunk(model: Mistral) -> int:
    """Tokens of a prompt to read at a time, by what was measured (docs/performance.md).

    Nothing is cancelled within a chunk. With kernels of ours, 256 pay for the unpacking of weights.
    On the CPU backend without them, 128 keep most of what is computed within the cache; where
    weights stay quantised there, a row costs the same in any company, and in a large model seconds.
    """
    if not on_cpu():
        return 512
    if has_kernels():
        return 256
    return 8 if isinstance(base_of(model.model.layers[0].mlp.down_proj), nn.QuantizedLinear) else 128


def reuse(cache: RollingCache, ids: Sequence[int], snapshots: Iterable[Snapshot] = ()) -> int:
    """Bring the cache to the longest start of `ids` that it or a snapshot holds; return its length.

    At least one token is left to prefill, since its logits are needed. Where a ring can no longer
    roll back that far, what it holds is of no use; where nothing is, the cache starts anew.
    Snapshots of a cache with other settings are passed over.
    """
    best, source = _reusable(cache.ids, cache.offset, cache.max_rollback if cache.intact else -1, ids), None
    for snapshot in snapshots:
        if snapshot.settings == cache.settings:
            known = _reusable(snapshot.ids, snapshot.offset, snapshot.max_rollback, ids)
            if known > best:
                best, source = known, snapshot
    if source is not None:
        cache.restore(source)
    if best == 0:
        cache.reset()
    else:
        cache.rollback(cache.offset - best)
    return best


def shared_start(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items two sequences begin with alike; compared many at a time."""
    common = min(len(a), len(b))
    for start in range(0, common, _COMPARED):
        end = min(start + _COMPARED, common)
        first, second = list(a[start:end]), list(b[start:end])
        if first != second:
            return start + next(i for i, (x, y) in enumerate(zip(first, second, strict=True)) if x != y)
    return common


def reusable(shared: int, offset: int, max_rollback: int, length: int) -> int:
    """How many tokens of a prompt's start, but not all, a cache can be rolled back to.

    shared        tokens that the cache and the prompt of `length` begin with alike
    offset        tokens in the cache, of which it can undo `max_rollback`
    """
    known = min(shared, length - 1)
    return known if offset - known <= max_rollback else 0


def goes_on(ids: Sequence[int], later: Sequence[int], max_rollback: int) -> bool:
    """Whether a conversation of the ids `later` goes on from `ids`, and can go back to there.

    max_rollback  tokens that the later one can undo
    """
    length = len(ids)
    if length > len(later) or len(later) - length > max_rollback or (length and ids[-1] != later[length - 1]):
        return False  # mostly the last id tells already
    return shared_start(ids, later) == length


def _reusable(held: Sequence[int], offset: int, max_rollback: int, ids: Sequence[int]) -> int:
    if len(held) != offset:
        return 0
    return reusable(shared_start(held, ids), offset, max_rollback, len(ids))


def prefill(
    model: Mistral,
    ids: Sequence[int],
    cache: RollingCache,
    chunk: int = 512,
    on_progress: Callable[[int, int], None] | None = None,
) -> mx.array:
    """Read a prompt into the cache by chunks; return the logits [1, vocab_size] after it.

    Each chunk is evaluated before the next is built: a layer never holds more than window + chunk
    keys.
    """
    report = on_progress or (lambda done, total: None)
    hidden = None
    for start in range(0, len(ids), chunk):
        report(start, len(ids))
        hidden = read_chunk(model, list(ids[start : start + chunk]), cache)
    report(len(ids), len(ids))
    assert hidden is not None
    return model.head(hidden)[:, -1]


def read_chunk(model: Mistral, ids: list[int], cache: RollingCache, *, every: bool = False) -> mx.array:
    """Read one chunk into the cache; return its last token's hidden state [1, 1, hidden_size].

    every  return those of all of its tokens
    """
    hidden = model.hidden(mx.array([ids]), cache)
    hidden = hidden if every else hidden[:, -1:]
    mx.eval(hidden, *cache.arrays)
    cache.ids += ids
    mx.clear_cache()  # the chunk's temporaries would stay in MLX's pool
    return hidden


def decode(
    model: Mistral, logits: mx.array, cache: RollingCache, sampler: Sampler, limit: int | None
) -> Generator[int, None, None]:
    """Yield up to `limit` tokens (None: for ever), from the logits [1, vocab_size] of the prompt.

    The pass after a token is under way before that token is read: the device never waits for
    Python. Every token that has been yielded is in the cache. A sampler that does not look ahead is
    called once for each token, after the one before has been taken.
    """
    if limit == 0:
        return
    step = step_of(model)
    token = sampler(logits)
    mx.async_eval(token)
    count = 0
    while count != limit:
        logits = step(token[:, None], cache)[:, -1]
        following = sampler(logits) if sampler.looks_ahead else None
        mx.async_eval(logits if following is None else following)
        value: int = token.item()  # type: ignore[assignment]
        cache.ids.append(value)
        yield value
        count += 1
        if following is None:
            if count == limit:
                return
            following = sampler(logits)
            mx.async_eval(following)
        token = following
