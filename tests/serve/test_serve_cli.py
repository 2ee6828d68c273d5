"""m7mlx-serve as a program: its options, its port, its standard streams, and how it ends."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import piped, running
from serving import ENDLESS, NAME, client, serving, settle, user


def closed(url: str) -> None:
    """Wait until nobody new is let in."""
    host, port = url.removeprefix("http://").split(":")
    until = time.monotonic() + 20
    while True:
        try:
            socket.create_connection((host, int(port))).close()
        except ConnectionError:
            return
        assert time.monotonic() < until
        time.sleep(0.02)


def test_ending_under_load(model_folder: Path) -> None:
    """What can finish finishes; the rest is told; nobody new is let in; and it is no failure."""
    with serving(model_folder, "--rows", "4") as (url, process):
        asked: dict[str, dict[str, Any]] = {
            "short stream": {"stream": True, "max_tokens": 300},
            "short": {"max_tokens": 300},
            "endless stream": {"stream": True},
            "endless": {},
        }
        with ThreadPoolExecutor(4) as pool:
            going = {
                name: pool.submit(httpx.post, f"{url}/v1/chat/completions", json=ENDLESS | changes, timeout=60)
                for name, changes in asked.items()
            }
            settle(url, 4)
            process.send_signal(signal.SIGTERM)
            closed(url)
            assert process.wait(40) == 0
            found = {name: one.result(10) for name, one in going.items()}
        assert found["short stream"].text.endswith("data: [DONE]\n\n")
        assert found["short"].json()["usage"]["completion_tokens"] == 300
        *_, before, last = found["endless stream"].text.strip().split("\n\n")
        assert json.loads(before[6:])["choices"]
        assert json.loads(last[6:])["error"]["code"] == "shutting_down"
        assert found["endless"].status_code == 503
        assert found["endless"].json()["error"]["code"] == "shutting_down"


def test_ending_at_once(model_folder: Path) -> None:
    """A second signal waits for nobody."""
    with serving(model_folder, "--rows", "2") as (url, process), client(url) as api:
        stream = api.chat.completions.create(**ENDLESS, stream=True)
        next(stream)
        process.send_signal(signal.SIGINT)
        closed(url)
        process.send_signal(signal.SIGINT)
        assert process.wait(8) == -signal.SIGINT
        stream.close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "0.0.0.0"], "give a key with --api-key-file"),
        (["--rows", "0"], "--rows must lie between"),
        (["--port", "99999"], "--port must lie between"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--api-key-file", "/no/such/key"], "cannot be read"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--models-dir", "/no/such/folder"], "holds no model"),
        (["--model", "a", "--name", "b", "--name", "c"], "no --model that it could name"),
        (["--model", "a", "--model", "a"], "the same name"),
        (["--idle-unload", "soon"], "a time is a number"),
        (["--prefix-disk", "-1"], "--prefix-disk must be at least 0"),
    ],
)
def test_bad_options_are_one_line(options: list[str], reason: str) -> None:
    command = [sys.executable, "-m", "m7mlx_serve", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "m7mlx_serve", "--model", str(model_folder), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "cannot be opened" in done.stderr.splitlines()[-1]
    assert "loading" not in done.stderr


def test_an_address_with_colons(model_folder: Path) -> None:
    """What is printed can be opened."""
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        with serving(model_folder, "--host", "::1") as (url, _):
            assert httpx.get(f"{url}/health").status_code == 200
            port = url.rpartition(":")[2]
            command = [sys.executable, "-m", "m7mlx_serve", "--model", str(model_folder)]
            again = [*command, "--host", "::1", "--port", port]
            done = subprocess.run(again, capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 1
            assert f"[::1]:{port} cannot be opened" in done.stderr.splitlines()[-1]
        return
    pytest.skip("this machine has no ::1")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_standard_streams_that_are_closed(model_folder: Path, closed: str) -> None:
    """Some that start services leave them so; what goes wrong later ends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = f"""
import sys, m7mlx_serve.reading_process
from m7mlx_serve.openai import answers
def breaks(*_): raise KeyError("unforeseen")
answers.write = breaks
from m7mlx_serve.cli import main
sys.exit(main(["--model", {str(model_folder)!r}, "--name", {NAME!r}, "--port", "{port}"]))
"""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", program]
    with running(command, stdout=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.1)
        for _ in range(2):
            body = {"model": NAME, "messages": user("Hi"), "max_tokens": 2}
            found = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
            assert found.status_code == 500 and "error" in found.json()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert piped(process.stdout).read() == b""


def test_control_c_while_the_model_is_loaded(model_folder: Path) -> None:
    """What loads is not waited for: a model may take minutes."""
    program = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import m7mlx_serve.engine
from m7mlx_serve.cli import main
m7mlx_serve.engine.load = lambda folder: time.sleep(60)
sys.exit(main(["--model", {str(model_folder)!r}, "--port", "0"]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        assert process.stderr.readline().startswith("loading")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == "m7mlx-serve: stopped while loading\n"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
