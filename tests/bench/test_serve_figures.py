"""The pieces of benchmarks/serve.py: what is started, what is counted, what is compared."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
from aiohttp import ClientSession, web

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import serve

SCENARIO = serve.Scenario(clients=2, shared=0, requests=3, prompt=10, tokens=5)


@pytest.mark.parametrize("tells_usage", [True, False])
async def test_answers_are_counted_whether_a_server_tells_of_them_or_not(tells_usage: bool) -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        asked.append(body["messages"][0]["content"])
        response = web.StreamResponse()
        await response.prepare(request)
        deltas = [{"role": "assistant"}, *({"content": text} for text in "abc")]
        events: list[dict[str, object]] = [{"choices": [{"delta": delta}]} for delta in deltas]
        if tells_usage:
            events.append({"choices": [], "usage": {"completion_tokens": 7}})
        for event in events:
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        async with ClientSession() as session:
            count, first = await serve.ask(session, f"http://127.0.0.1:{port}", "model", "fox", 5)
        assert count == (7 if tells_usage else 3)
        assert first > 0
        tps, p95 = await serve.drive(f"http://127.0.0.1:{port}", "model", SCENARIO, 0)
        assert tps > 0 and p95 > 0
    finally:
        await runner.cleanup()
    assert len(set(asked)) == 1 + 2 * 3  # no two clients ask the same


def test_rows_compare_with_the_first_server() -> None:
    figures = [serve.Figures(20, 1, 0.5), serve.Figures(30, 2, 0.7)]
    slower = [serve.Figures(10, 4, 0.1), serve.Figures(15, 4, 0.1)]
    ours, theirs = serve.rows_of(SCENARIO, {"m7mlx": figures, "llama.cpp": slower})
    assert ours[:3] == ["2", "no", "m7mlx"] and ours[-1] == "0.70 GB"
    assert theirs[4].startswith("2.00×")
    assert theirs[6].startswith("3.00×")


def options(**changes: object) -> argparse.Namespace:
    given = {"model": "demo", "servers": None, "gguf": None, "llama_server": None, "llama_python": None}
    return argparse.Namespace(**given | {"float32": False} | changes)


def test_servers_read_the_same_weights(tmp_path: Path, model_folder: Path) -> None:
    asked = options(model=str(model_folder), gguf=Path("x.gguf"), llama_server="llama-server", llama_python="python")
    asked.servers = list(serve.SERVERS)
    found = {server.name: server for server in serve.find_servers(asked, tmp_path)}
    assert list(found) == asked.servers
    assert str(model_folder) in found["m7mlx"].command and found["mlx-lm"].model == str(model_folder)
    assert "x.gguf" in found["llama.cpp"].command
    interrupts = found["llama-cpp-python"].command.index("--interrupt_requests")
    assert found["llama-cpp-python"].command[interrupts + 1] == "false"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"servers": ["llama.cpp"]}, "needs its program"),
        ({"servers": ["llama.cpp"], "llama_server": "x", "float32": True}, "needs packed weights"),
        ({"servers": ["llama.cpp"], "llama_server": "x"}, "as a GGUF file with its tokenizer"),
    ],
)
def test_what_llama_cpp_lacks_is_said(
    tmp_path: Path, model_folder: Path, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(SystemExit, match=reason):
        serve.find_servers(options(model=str(model_folder), **changes), tmp_path)
