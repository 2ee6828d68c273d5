"""m7mlx-serve when a request, a schema or the engine itself goes wrong: what others notice."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from models import small_config, write_folder
from processes import piped
from serving import ENDLESS, NAME, open_requests, serving, settle, user

SLOW = {"type": "integer", "multipleOf": 3_000_017}  # takes longer to prepare than it may


def asked(url: str, timeout: float = 60, **body: Any) -> httpx.Response:
    body = {"model": NAME, "messages": user("Hi"), "max_tokens": 4} | body
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=timeout)


def following(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def test_a_padded_embedding(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", small_config(vocab_size=32800, sliding_window=16, n_layers=2))
    with serving(folder) as (url, _):
        refused = asked(url, logit_bias={"32790": 100})
        assert (refused.status_code, "32790" in refused.text) == (400, True)
        assert asked(url).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200


def test_all_answers_of_a_refused_request_end(model_folder: Path) -> None:
    with serving(model_folder, "--rows", "2", "--queue", "2") as (url, _):
        for stream in (False, True):
            refuse(url, stream)


def refuse(url: str, stream: bool) -> None:
    """Ask a server of two rows, where two requests may wait, for more than it can give."""
    for extra in (
        {"n": 3, "logit_bias": {"999999": 1}},
        {"n": 4, "response_format": following({"type": "zebra"})},
        {"n": 8},  # more than there are places for
    ):
        found = asked(url, stream=stream, max_tokens=100_000, **extra)
        assert found.status_code == 400, found.text
        settle(url, 0)
    # In the place of others it waits for all its places, and takes none before.
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=ENDLESS | {"max_tokens": 900}, timeout=60)
        settle(url, 1)
        assert asked(url, n=4, stream=stream).status_code == 429
        assert open_requests(url) <= 1
        assert going.result(60).status_code == 200
    assert asked(url, n=4, stream=stream).status_code == 200
    settle(url, 0)


def test_no_answer_takes_longer_than_it_may(model_folder: Path) -> None:
    with serving(model_folder, "--max-seconds", "1") as (url, _):
        found = asked(url, max_tokens=1_000_000, logit_bias={"2": -100}, n=2)
        assert found.status_code == 504 and "fewer tokens" in found.text
        settle(url, 0)
        streamed = asked(url, max_tokens=1_000_000, logit_bias={"2": -100}, stream=True)
        assert streamed.status_code == 200
        assert "took too long" in json.loads(streamed.text.strip().split("\n\n")[-1][6:])["error"]["message"]
        settle(url, 0)


def test_plain_requests_do_not_wait_for_schemas(model_folder: Path) -> None:
    setup = "from m7mlx import constrain; constrain._PREPARE_SECONDS = 2.0"
    with serving(model_folder, setup=setup) as (url, process), ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(asked, url, n=1, response_format=following(SLOW | {"title": str(i)})) for i in range(6)]
        settle(url, 6)
        for _ in range(3):
            assert asked(url).status_code == 200
        assert not all(one.done() for one in slow)  # they are still being prepared
        for one in slow:
            found = one.result(60)
            assert found.status_code == 400 and "takes too long to prepare" in found.text
        settle(url, 0)
        # There are places left for others, however many schemas come.
        slow = [pool.submit(asked, url, response_format=following(SLOW | {"title": f"x{i}"})) for i in range(8)]
        settle(url, 8)
        assert asked(url, response_format=following(SLOW | {"title": "y"})).status_code == 429
        assert asked(url).status_code == 200
        process.kill()


_FEW = """
import gc
from m7mlx import constrain
gc.disable()
constrain._AT_ONCE, constrain._PREPARE_SECONDS = 1, 0.2
"""


def test_a_schema_for_which_there_is_no_place(model_folder: Path) -> None:
    """The answers that have the places go on; once they have ended, however, there is room."""
    with serving(model_folder, setup=_FEW) as (url, _):
        long = {"type": "string", "minLength": 100_000}
        with httpx.stream(
            "POST",
            f"{url}/v1/chat/completions",
            json={"model": NAME, "messages": user("Hi"), "stream": True, "response_format": following(long)},
            timeout=60,
        ) as stream:
            lines = stream.iter_lines()
            assert next(lines)
            refused = asked(url, response_format=following({"const": 1}))
            assert refused.status_code == 429 and "try again later" in refused.text
            assert refused.headers["retry-after"]
        settle(url, 0)
        assert asked(url, response_format=following({"const": 1})).status_code == 200
        refusals: list[dict[str, Any]] = [{"stop": ["a", "e", "i"], "max_tokens": 900}, {"logit_bias": {"999999": 1}}]
        for number, wrong in enumerate(refusals):
            assert (
                asked(
                    url, response_format=following({"type": "string", "minLength": 900 + number}), **wrong
                ).status_code
                == 400
            )
            assert asked(url, response_format=following({"const": number + 2})).status_code == 200


def test_ending_while_a_schema_is_prepared(model_folder: Path) -> None:
    setup = "from m7mlx_serve import listener; listener.GRACE_SECONDS = 2.0"
    with serving(model_folder, setup=setup) as (url, process), ThreadPoolExecutor(1) as pool:
        going = pool.submit(asked, url, n=4, response_format=following(SLOW))
        settle(url, 4)
        process.send_signal(signal.SIGTERM)
        assert process.wait(25) == 0
        assert going.result(10).status_code in (400, 503)


_BREAKS = """
from m7mlx.scheduler import Scheduler
step, count = Scheduler.step, [0]
def breaks(self):
    count[0] += self.running_and_waiting[0] > 0
    if count[0] > 30:
        raise KeyError("what was said in a conversation")
    return step(self)
Scheduler.step = breaks
"""


def test_an_engine_that_ends_ends_the_server(model_folder: Path) -> None:
    """All who wait are told, the process says that it must not happen, and its status is 1."""
    with serving(model_folder, "--rows", "1", setup=_BREAKS) as (url, process), ThreadPoolExecutor(4) as pool:
        told = pool.submit(piped(process.stderr).read)
        whole, stream, waiting = (
            pool.submit(httpx.post, f"{url}/v1/chat/completions", json=ENDLESS | extra, timeout=60)
            for extra in ({}, {"stream": True}, {"n": 2})
        )
        statuses = {whole.result(30).status_code, waiting.result(30).status_code}
        assert statuses <= {500, 503}
        assert stream.result(30).status_code in (500, 503) or "error" in stream.result().text
        assert process.wait(30) == 1
        said = told.result(10)
    assert "the thread that computes has ended" in said.splitlines()[-1]
    assert "KeyError at" in said
    assert "conversation" not in said and "Traceback" not in said
