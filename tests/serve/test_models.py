"""Several models: loaded when they are asked for, within a bound; none leaves while it is used."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from m7mlx_serve.catalog import Catalog, about
from m7mlx_serve.limits import Limits
from m7mlx_serve.named import meant, named_model, tagged
from models import small_config, write_folder
from serving import ENDLESS, client, serving, settle, user

from m7mlx import InputError
from m7mlx.memory import AROUND

NAMES = [f"m{i}" for i in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small models, one of a family of its own, and what is none."""
    found = tmp_path_factory.mktemp("models")
    first = write_folder(found / "m0", small_config(vocab_size=32768, sliding_window=16, n_layers=1))
    for name in (*NAMES[1:], "owner/m5"):
        shutil.copytree(first, found / name)
    shutil.copytree(first, found / "broken")
    (found / "broken" / "model.safetensors").write_bytes(b"\xff" * 100)
    (found / "empty").mkdir()
    (found / ".hidden").mkdir()
    return found


# The bound holds two of them.
_TWO = """
from m7mlx_serve import models
from m7mlx_serve.catalog import about
from m7mlx_serve.limits import Limits
from pathlib import Path
models.budget = lambda: models.AROUND + int(2.5 * about(Path({!r}), Limits(rows=2)).needed)
"""


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    setup = _TWO.format(str(folder / "m0"))
    with serving(folder / "m0", "--models-dir", str(folder), "--rows", "2", setup=setup) as (found, _):
        yield found


def loaded(url: str) -> set[str]:
    return {one["name"].removesuffix(":latest") for one in httpx.get(f"{url}/api/ps").json()["models"]}


def ask(url: str, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": user("Hi"), "max_tokens": 2} | more
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_all_are_listed_and_five_take_turns(url: str) -> None:
    with client(url) as api:
        assert [one.id for one in api.models.list()] == ["small", "broken", *NAMES, "owner/m5"]
    tags = [one["name"] for one in httpx.get(f"{url}/api/tags").json()["models"]]
    assert tags == [f"{name}:latest" for name in ("small", "broken", *NAMES, "owner/m5")]
    assert httpx.get(f"{url}/v1/models/owner/m5").json()["id"] == "owner/m5"
    assert httpx.get(f"{url}/v1/models/m1:latest").json()["id"] == "m1"
    assert httpx.get(f"{url}/v1/models/none").status_code == 404
    assert ask(url, "m1:latest").json()["model"] == "m1"  # the name that Ollama's API tells
    for name in (*NAMES, "owner/m5", *NAMES):
        found = ask(url, name)
        assert (found.status_code, found.json()["model"]) == (200, name)
        assert name in loaded(url) and len(loaded(url)) <= 2
    assert ask(url, "").json()["model"] == "small"
    before = loaded(url)
    for name in (*NAMES, "owner/m5:latest", ""):
        assert httpx.post(f"{url}/api/show", json={"name": name}, timeout=60).status_code == 200
    assert httpx.post(f"{url}/api/show", json={"model": "none"}).status_code == 404
    assert loaded(url) == before  # clients ask of all
    unknown = ask(url, "none")
    assert (unknown.status_code, "use one of 'small', " in unknown.text) == (404, True)


def test_the_memory_of_those_that_have_left_is_given_back(tmp_path: Path) -> None:
    """What the process holds, as the system sees it, while five take turns in room for two."""
    config = small_config(vocab_size=32768, hidden_size=512, n_layers=1)
    first = write_folder(tmp_path / "m0", config)
    for name in NAMES[1:]:
        shutil.copytree(first, tmp_path / name)
    size = about(first, Limits(rows=2)).stored
    held = []
    setup = _TWO.format(str(first))
    with serving(first, "--models-dir", str(tmp_path), "--rows", "2", setup=setup) as (url, server):
        for name in [*NAMES, *NAMES[:2]]:
            assert ask(url, name).status_code == 200 and len(loaded(url)) <= 2
            held.append(psutil.Process(server.pid).memory_info().rss)
    assert max(held[3:]) - held[1] < size  # one more that stays would be as much
    assert max(held) < AROUND + 2.5 * about(first, Limits(rows=2)).needed, held


def test_a_load_that_fails_fails_its_request_alone(url: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda name: ask(url, name).status_code, ["broken", "m1", "broken"]))
    assert found == [503, 200, 503]
    refused = ask(url, "broken")
    assert "'broken' cannot be loaded" in refused.text and refused.json()["error"]["code"] == "model_not_loaded"
    assert httpx.get(f"{url}/health").status_code == 200 and ask(url, "m2").status_code == 200


def test_what_is_under_way_is_not_cut(url: str) -> None:
    """Others wait until there is room, and whoever comes meanwhile waits behind them."""
    asked = ENDLESS | {"model": "m3", "max_tokens": 900, "stream": True}
    with ThreadPoolExecutor(3) as pool:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=60) as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data: "))
            next(lines)
            others = [pool.submit(ask, url, name) for name in ("m0", "m1", "m2")]
            rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert [one.result(60).status_code for one in others] == [200] * 3
    settle(url, 0)


def test_pins_and_idle_models(folder: Path, tmp_path: Path) -> None:
    """What is pinned stays; what nobody uses leaves, and a client that leaves uses nothing."""
    few = tmp_path / "few"
    shutil.copytree(folder / "m1", few / "one")
    with serving(few / "one", "--models-dir", str(few), "--idle-unload", "1s", "--pin", "one") as (url, _):
        assert loaded(url) == {"small", "one"}
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=ENDLESS | {"stream": True}, timeout=60
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            time.sleep(2.5)
            assert loaded(url) == {"small", "one"} and next(lines) is not None
        until = time.monotonic() + 30
        while loaded(url) != {"one"}:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert ask(url, "small").status_code == 200
        shutil.copytree(few / "one", few / "two")
        until = time.monotonic() + 30
        while ask(url, "two").status_code != 200:  # a look into the folder holds for seconds
            assert time.monotonic() < until
            time.sleep(0.5)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model": "a"}', "a"), (b'{"messages": [{"model": "no"}], "x": {"model": "no"}, "model" :\n"a"}', "a"),
        (b'{"a": "\\"model\\": \\"no\\"", "model": "\\u00e9\\""}', 'é"'), (b'{"model": 5}', ""), (b"[", ""),
        (b'["model", "a"]', ""), (b'{"model": "a', ""), (b'{"name": "a", "model": "b"}', "b"),
        (b'"' + b'\\"' * 4_000_000, ""), (b'{"model":' * 900_000, ""), (b'{"model": "\\x"}', ""), (b"", ""),
    ],
)  # fmt: skip
def test_the_name_in_a_body(body: bytes, name: str) -> None:
    assert named_model(body, is_ollamas=False) == name
    assert named_model(b'{"name": "a:latest"}', is_ollamas=True) == "a:latest"


def test_the_model_that_a_name_means() -> None:
    names = ["a", "a:latest", "b", "c:7b"]
    for asked, name in {"": "a", "tgi": "a", "b:latest": "b", "a:latest": "a:latest", "c:7b": "c:7b"}.items():
        assert meant(asked, names) == name
    assert meant("c", names) == "c" and meant("", []) == ""
    assert all(meant(tagged(name), names) == name for name in ("b", "c:7b"))


def test_a_catalog(folder: Path, tmp_path: Path) -> None:
    assert Catalog({}, folder).names == ["broken", *NAMES, "owner/m5"]
    both = Catalog({"m3": tmp_path}, folder)
    assert both.names[0] == "m3" and both.folder("m3") == tmp_path and both.folder("none") is None
    with pytest.raises(InputError, match="holds no model"):
        Catalog({}, tmp_path)
    one, many = (about(folder / "m0", Limits(rows=rows)) for rows in (1, 9))
    assert one.stored == many.stored < one.needed < many.needed
