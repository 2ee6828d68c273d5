"""What agents send, as it came from them: recorded, and with its texts cut short.

Each is a second turn, in which the result of a call of theirs goes back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

BODIES = Path(__file__).parent / "bodies"
_CHAT: tuple[str, dict[str, int], str] = ("/v1/chat/completions", {"max_tokens": 8}, "[DONE]")
AGENTS = {
    "claude_code": ("/v1/messages?beta=true", {"max_tokens": 8}, "message_stop"),
    "codex": ("/v1/responses", {"max_output_tokens": 8}, "response.incomplete"),
    **dict.fromkeys(("mistral_vibe", "continue", "opencode", "qwen_code"), _CHAT),
}


@pytest.mark.parametrize("server", ["url", "chatml_url"])
@pytest.mark.parametrize("agent", AGENTS)
def test_what_agents_send_is_answered(server: str, agent: str, request: pytest.FixtureRequest) -> None:
    """By a model with a form of its own for tools, and by one that is told of them in words."""
    path, short, end = AGENTS[agent]
    body: dict[str, Any] = json.loads((BODIES / f"{agent}.json").read_text()) | short
    found = httpx.post(request.getfixturevalue(server) + path, json=body, timeout=60)
    assert found.status_code == 200, found.text
    data = [line.removeprefix("data: ") for line in found.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line) for line in data if line != "[DONE]"]
    assert not any("error" in event for event in events if event.get("type") != "response.incomplete")
    kinds = [event.get("type") for event in events]
    assert data[-1] == end if end == "[DONE]" else kinds[-1] in (end, "response.completed")


@pytest.mark.parametrize("agent", AGENTS)
def test_what_agents_send_calls_a_tool(chatml_url: str, agent: str) -> None:
    """A call that is demanded comes, of a tool that is there."""
    path, _, _ = AGENTS[agent]
    body: dict[str, Any] = json.loads((BODIES / f"{agent}.json").read_text()) | {"stream": False, "temperature": 0}
    body.pop("stream_options", None)  # which is for streams
    one: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    choice: dict[str, Any] = {
        "claude_code": {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 600},
        "codex": one | {"max_output_tokens": 600},
    }
    told = httpx.post(chatml_url + path, json=body | choice.get(agent, one | {"max_tokens": 600}), timeout=60).json()
    if agent in choice:
        called = [item["name"] for item in told.get("content") or told["output"]]
    else:
        called = [call["function"]["name"] for call in told["choices"][0]["message"]["tool_calls"]]
    names = {tool.get("name") or tool.get("function", tool).get("name") for tool in body["tools"]}
    names |= {inner["name"] for tool in body["tools"] for inner in tool.get("tools", ())}
    assert [name in names for name in called] == [True]
