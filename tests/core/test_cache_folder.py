"""A folder of saved conversations: what is found there, what leaves, and who else may use it."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest
from models import mixed_config, small_config, small_model, write_folder

from m7mlx.cache import RollingCache
from m7mlx.cache_folder import CacheFolder, find_spaces, measure_folder, remove_space
from m7mlx.cpu import native
from m7mlx.decode import prefill
from m7mlx.errors import DiskError
from m7mlx.loading import load
from m7mlx.model import Mistral
from m7mlx.quantization import Quantization

MODELS: dict[int | str | None, Mistral] = {
    7: small_model(small_config()),
    None: small_model(small_config(sliding_window=None)),
    "mixed": small_model(mixed_config()),
}
BEGINNING = list(range(1, 41))


def read(model: Mistral, ids: list[int], slack: int = 8) -> RollingCache:
    cache = model.new_cache(slack=slack)
    prefill(model, ids, cache)
    cache.ids = list(ids)
    return cache


def folder(path: Path, model: Mistral, most_bytes: int = 1 << 30) -> CacheFolder:
    return CacheFolder(path, model, model.new_cache(slack=8), most_bytes)


@pytest.mark.parametrize("window", MODELS)
def test_what_is_saved_is_found_by_how_it_begins(tmp_path: Path, window: int | str | None) -> None:
    """After a restart, too; in the same space, for the same weights, and as exactly as it was."""
    model = MODELS[window]
    assert folder(tmp_path, model).save(read(model, BEGINNING), "a")
    again = folder(tmp_path, model)
    held, name = again.find([*BEGINNING, 50, 51], "a")
    assert held == len(BEGINNING) and again.find([*BEGINNING, 50, 51], "b") == (0, "")
    cache = again.load(name)
    assert cache is not None and cache.ids == BEGINNING
    more = [50, 51, 52]
    expected = prefill(model, [*BEGINNING, *more], model.new_cache(slack=8))
    assert mx.allclose(prefill(model, more, cache), expected, atol=1e-5).item()
    assert again.find([9, *BEGINNING], "a") == (0, "")
    shorter = again.find([*BEGINNING[:20], 60, 61], "a")[0]
    assert shorter == (20 if window is None else 0)  # a ring that has turned cannot go back so far
    assert again.find(BEGINNING, "a")[0] == len(BEGINNING) - 1  # one is left to read
    other = small_model(model.config, seed=5)
    assert folder(tmp_path, other).find([*BEGINNING, 50], "a") == (0, "")
    figures = again.figures
    assert (figures.files, figures.hits) == (1, 1) and figures.nbytes > 0


def test_a_conversation_takes_the_place_of_what_it_goes_on_from(tmp_path: Path) -> None:
    model = MODELS[None]
    found = folder(tmp_path, model)
    assert found.save(read(model, BEGINNING)) and found.save(read(model, [*BEGINNING, 3, 4]))
    assert found.figures.files == 1 and not found.save(read(model, BEGINNING))
    assert found.save(read(model, [*BEGINNING, 5, 6])) and found.save(read(model, BEGINNING), "other")
    assert found.figures.files == 3
    assert not found.save(read(model, BEGINNING, slack=9), "x")  # of other options


def test_a_conversation_may_have_one_place_and_leave_it(tmp_path: Path) -> None:
    """Where all of a space is one conversation, of whose branches the last is kept."""
    model = MODELS[7]
    found = folder(tmp_path, model)
    for begin in (2, 3):
        assert found.save(read(model, [begin, *BEGINNING]), "a", alone=True)
    assert found.save(read(model, BEGINNING), "b", alone=True)
    assert sorted(find_spaces(tmp_path).values()) == ["a", "b"]
    assert found.find([3, *BEGINNING, 9], "a")[0] > 0 and found.find([2, *BEGINNING, 9], "a")[0] == 0
    (tmp_path / "damaged.m7cache.safetensors").write_bytes(b"{")
    remove_space(tmp_path, "a")
    assert list(find_spaces(tmp_path).values()) == ["b"] and measure_folder(tmp_path)[0] == 2
    remove_space(tmp_path / "none", "a")


def test_the_folder_is_bounded_and_what_was_used_last_stays(tmp_path: Path) -> None:
    model = MODELS[7]
    first = folder(tmp_path, model)
    first.save(read(model, BEGINNING))
    size = first.figures.nbytes
    found = folder(tmp_path, model, most_bytes=3 * size + size // 2)
    for begin in (2, 3):
        found.save(read(model, [begin, *BEGINNING]))
    for age, path in enumerate(sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, (1000 + age, 1000 + age))
    assert found.load(found.find([*BEGINNING, 9])[1]) is not None
    found.save(read(model, [4, *BEGINNING]))
    assert found.figures.files == 3 and found.figures.evicted == 1 and found.figures.nbytes <= 3.5 * size
    assert [found.find([*start, *BEGINNING, 9])[0] > 0 for start in ([], [2], [3], [4])] == [True, False, True, True]
    small = folder(tmp_path, model, most_bytes=size // 2)
    assert not small.save(read(model, [5, *BEGINNING]))


def test_files_are_the_users_alone(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    found = folder(place, MODELS[7])
    found.save(read(MODELS[7], BEGINNING))
    assert place.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in place.iterdir()] == [0o600]
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be used"):
        folder(tmp_path / "file", MODELS[7])


def test_what_is_damaged_is_passed_over_and_removed(tmp_path: Path) -> None:
    model = MODELS[7]
    found = folder(tmp_path, model)
    for begin in (2, 3):
        found.save(read(model, [begin, *BEGINNING]))
    name = found.find([2, *BEGINNING, 9])[1]
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1  # among the values: only loading looks there
    (tmp_path / name).write_bytes(data)
    other = found.find([3, *BEGINNING, 9])[1]
    (tmp_path / other).write_bytes(b"\xff" * 100)
    assert found.load(name) is None and found.load("none.m7cache.safetensors") is None
    again = folder(tmp_path, model)
    assert again.find([3, *BEGINNING, 9]) == (0, "") and not list(tmp_path.iterdir())
    assert (found.figures.damaged, again.figures.damaged) == (1, 1)
    (tmp_path / ".x.m7cache.safetensors.partial.safetensors").write_bytes(b"")
    os.utime(tmp_path / ".x.m7cache.safetensors.partial.safetensors", (1, 1))
    folder(tmp_path, model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [4, None])
def test_models_whose_weights_are_mapped(tmp_path: Path, bits: int | None) -> None:
    """Weights are summed up where they lie in their file, on another thread than the model's.

    What one load of it has saved, another finds; with a weight changed in the file, none does.
    """
    config = small_config(
        vocab_size=32000, hidden_size=64, n_layers=1, quantization=Quantization(32, bits) if bits else None
    )
    path = write_folder(tmp_path / "model", config)
    kept, ids = tmp_path / "kept", [*BEGINNING, 50, 51]

    def opened() -> tuple[Mistral, CacheFolder]:
        model = load(path)[0]
        mx.eval(model.parameters())
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(folder, kept, model).result()
            pool.submit(mx.clear_streams).result()
        return model, found

    model, first = opened()
    if native.usable():
        assert str(path / "model.safetensors") in Path("/proc/self/maps").read_text()
    expected = prefill(model, ids, model.new_cache(slack=8))
    assert first.save(read(model, BEGINNING))
    del model, first
    model, again = opened()
    held, name = again.find(ids)
    cache = again.load(name)
    assert held == len(BEGINNING) and cache is not None
    assert mx.allclose(prefill(model, ids[held:], cache), expected, atol=1e-2).item()
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 64
    file.with_name("changed").write_bytes(data)  # a file of its own: others have the old one mapped
    file.with_name("changed").rename(file)
    assert opened()[1].find(ids) == (0, "")


def test_two_that_share_a_folder_do_not_harm_each_other(tmp_path: Path) -> None:
    """They save, evict and load at the same time; what is loaded is whole."""
    model = MODELS[7]
    caches = [read(model, [begin, *BEGINNING]) for begin in range(2, 10)]
    one = folder(tmp_path, model)
    one.save(caches[0])
    most = one.figures.nbytes * 3
    failed: list[BaseException] = []

    def use() -> None:
        try:
            found = folder(tmp_path, model, most)
            for cache in caches * 2:
                found.save(cache)
                _, name = found.find([*cache.ids, 9])
                back = found.load(name) if name else None
                assert back is None or back.ids == cache.ids
        except BaseException as error:
            failed.append(error)
        finally:
            mx.clear_streams()

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and one.figures.nbytes <= most
