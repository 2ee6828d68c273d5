"""Rows of a batch: each as if it were alone, whoever joins and leaves beside it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import mixed_config, small_config, small_model
from values import number

from m7mlx.batch import BatchCache
from m7mlx.cache import RollingCache
from m7mlx.decode import decode, prefill
from m7mlx.errors import InputError, RollbackError
from m7mlx.model import Mistral
from m7mlx.sampling import Sampler, Sampling

pytestmark = pytest.mark.usefixtures("computed_by")

MODELS: dict[int | str | None, Mistral] = {
    7: small_model(small_config(sliding_window=7, head_dim=32)),
    None: small_model(small_config(sliding_window=None, head_dim=32)),
    "mixed": small_model(mixed_config(sliding_window=7, head_dim=32)),
}
PROMPTS = [[(i * i + k) % 97 for i in range(length)] for k, length in enumerate((3, 40, 11, 25))]


def alone(model: Mistral, prompt: list[int], count: int, **options: Any) -> list[int]:
    cache = model.new_cache(**options)
    return list(decode(model, prefill(model, prompt, cache), cache, Sampler(Sampling()), count))


def prefilled(model: Mistral, prompt: list[int], **options: Any) -> tuple[RollingCache, int]:
    cache = model.new_cache(**options)
    return cache, int(number(mx.argmax(prefill(model, prompt, cache))))


def advance(model: Mistral, batch: BatchCache, tokens: list[int], answers: list[list[int]]) -> list[int]:
    """One greedy step for all rows."""
    logits = model(mx.array([[t] for t in tokens]), batch)[:, -1]
    for ids, answer, token in zip(batch.ids, answers, tokens, strict=True):
        ids.append(token)
        answer.append(token)
    chosen: list[int] = np.array(mx.argmax(logits, axis=-1)).tolist()
    return chosen


@pytest.mark.parametrize(
    ("window", "options"),
    [
        (7, {}),
        (7, {"slack": 1, "kv_bits": 8, "kv_group_size": 32}),
        (None, {}),
        (None, {"kv_bits": 8, "kv_group_size": 32}),
        (None, {"max_kv_size": 12, "sinks": 3}),
        ("mixed", {}),
        ("mixed", {"slack": 1, "kv_bits": 8, "kv_group_size": 32}),
        ("mixed", {"max_kv_size": 12, "sinks": 3}),
    ],
)
def test_rows_that_join_and_leave_answer_as_if_alone(window: int | str | None, options: dict[str, Any]) -> None:
    """The third row joins after 5 steps and the first leaves after 9; it goes on by itself."""
    model = MODELS[window]
    expected = [alone(model, prompt, 24, **options) for prompt in PROMPTS]
    caches, tokens = map(list, zip(*(prefilled(model, p, **options) for p in PROMPTS[:3]), strict=True))
    batch = BatchCache(caches[:2])
    answers: list[list[int]] = [[], []]
    row_tokens = tokens[:2]
    for _ in range(5):
        row_tokens = advance(model, batch, row_tokens, answers)
    assert batch.join(caches[2]) == 2
    answers.append([])
    row_tokens.append(tokens[2])
    for _ in range(4):
        row_tokens = advance(model, batch, row_tokens, answers)
    gone = batch.leave(0)
    assert len(batch) == 2
    first, token = answers.pop(0), row_tokens.pop(0)
    late, token_of_late = prefilled(model, PROMPTS[3], **options)
    batch.join(late)
    answers.append([])
    row_tokens.append(token_of_late)
    for _ in range(8):
        row_tokens = advance(model, batch, row_tokens, answers)
    for answer, wanted in zip(answers, expected[1:], strict=True):
        assert answer == wanted[: len(answer)]
    assert batch.ids == [p + a for p, a in zip(PROMPTS[1:], answers, strict=True)]

    assert gone.ids == PROMPTS[0] + first
    logits = model(mx.array([[token]]), gone)[:, -1]
    rest = list(decode(model, logits, gone, Sampler(Sampling()), 14))
    assert [*first, token, *rest] == expected[0]
    assert caches[0].offset == len(PROMPTS[0])  # what joined was not changed


def test_no_row_sees_another() -> None:
    model = MODELS[7]

    def logits_of_first(neighbour: int) -> np.ndarray:
        caches = [prefilled(model, PROMPTS[0])[0], prefilled(model, [neighbour] * 30)[0]]
        batch = BatchCache(caches)
        return np.array(model(mx.array([[1, 2], [neighbour, neighbour]]), batch)[0])

    assert (logits_of_first(5) == logits_of_first(50)).all()


def test_empty_rows_join() -> None:
    model = MODELS[7]
    batch = BatchCache([model.new_cache(), model.new_cache()])
    found = model(mx.array([PROMPTS[2], PROMPTS[1][:11]]), batch)
    batch.join(model.new_cache())
    assert batch.offsets == [11, 11, 0]
    again = model(mx.array([[1], [2], [3]]), batch)
    solo = model.new_cache()
    assert mx.allclose(found[0], model(mx.array([PROMPTS[2]]), solo)[0], atol=1e-4)
    assert mx.allclose(again[0], model(mx.array([[1]]), solo)[0], atol=1e-4)
    assert mx.allclose(again[2], model(mx.array([[3]]))[0], atol=1e-4)


def test_a_batch_takes_what_its_longest_row_needs_and_gives_it_back() -> None:
    model = small_model(small_config(sliding_window=None))
    short, long = (prefilled(model, [i % 97 for i in range(n)])[0] for n in (10, 1000))
    batch = BatchCache([short, long, short])
    assert batch.nbytes == 3 * long.nbytes
    batch.leave(1)
    assert batch.nbytes == 2 * short.nbytes


def test_rollback_goes_for_all_rows_or_none() -> None:
    model = MODELS[7]
    batch = BatchCache([prefilled(model, p, slack=4)[0] for p in PROMPTS[:2]])
    before = [list(ids) for ids in batch.ids]
    with pytest.raises(RollbackError, match="only 3"):
        batch.rollback(4)
    for _ in range(2):
        model(mx.array([[1], [1]]), batch)
    for ids in batch.ids:
        ids += [1, 1]
    batch.rollback(2)
    assert batch.ids == before
    assert batch.offsets == [len(ids) for ids in before]


def test_what_cannot_be_one_batch() -> None:
    with pytest.raises(InputError, match="at least one"):
        BatchCache([])
    model = MODELS[7]
    for other in (MODELS[None].new_cache(), model.new_cache(slack=1), model.new_cache(kv_bits=4, kv_group_size=32)):
        with pytest.raises(InputError, match="share"):
            BatchCache([model.new_cache(), other])
    batch = BatchCache([prefilled(model, PROMPTS[0])[0]])
    with pytest.raises(InputError, match="last row"):
        batch.leave(0)
    with pytest.raises(InputError, match="2 rows of ids for a cache of 1"):
        model(mx.array([[1], [2]]), batch)


def test_what_one_row_has_lost_no_row_can_undo() -> None:
    model = MODELS[7]
    caches = [prefilled(model, p, slack=4)[0] for p in (PROMPTS[1], PROMPTS[3])]
    caches[0].rollback(3)
    batch = BatchCache(caches)
    assert batch.max_rollback == 1
    assert batch.row(1).max_rollback == 1


@pytest.mark.parametrize("lengths", [(10, 700), (400, 1000), (700, 10), (299, 305)])
def test_a_row_takes_the_place_of_another_whatever_their_lengths(lengths: tuple[int, int]) -> None:
    """Rings that are not whole yet, on either side; the neighbour continues undisturbed."""
    model = small_model(small_config(sliding_window=300, n_layers=2))
    prompts = [[(i * i + k) % 97 for i in range(length)] for k, length in enumerate((*lengths, 20))]
    expected = [alone(model, prompt, 12) for prompt in prompts]
    (neighbour, a), (coming, b), (ended, c) = (prefilled(model, prompt) for prompt in prompts)
    batch = BatchCache([neighbour, ended])
    answers: list[list[int]] = [[], []]
    tokens = advance(model, batch, [a, c], answers)
    possible = coming.max_rollback
    batch.put(1, coming)
    assert batch.max_rollback <= min(possible, 1 + lengths[0])
    answers[1], tokens[1] = [], b
    for _ in range(11):
        tokens = advance(model, batch, tokens, answers)
    assert answers == [expected[0], expected[1][:11]]
    assert batch.ids == [p + a for p, a in zip(prompts, answers, strict=False)]


def test_putting_and_keeping_copy_no_more_than_they_must() -> None:
    model = small_model(small_config(sliding_window=2000))
    caches = [prefilled(model, [i % 97 for i in range(n)])[0] for n in (1990, 1950, 1900, 1800, 30)]
    batch = BatchCache(caches[:4])
    mx.eval(batch.arrays)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    batch.put(2, caches[4])
    assert mx.get_peak_memory() - before < batch.nbytes / 8
    batch.keep([2, 0])
    assert batch.offsets == [30, 1990]
    assert batch.nbytes == 2 * caches[0].nbytes
