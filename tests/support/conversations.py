"""Conversations, and the ids that mistral-common makes of them."""

from __future__ import annotations

from typing import Any

from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV1, InstructTokenizerV2, InstructTokenizerV3
from tokenizer_folders import HARD, ORACLES

INSTRUCT = {
    "v1": InstructTokenizerV1(ORACLES["v1"]),
    "v2": InstructTokenizerV2(ORACLES["v2"]),
    "v3": InstructTokenizerV3(ORACLES["v3"]),
}
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


CONVERSATIONS = [
    [user("Hello")],
    [user("")],
    [system("Be brief"), user("Hello")],
    [system("Be brief"), user("Hello"), assistant("Hi"), user("Bye")],
    [system("A"), system("B"), user("x")],
    [system(""), user("x")],
    [user("Hello"), assistant("Hi there"), user("Bye")],
    [user("a"), user("b"), assistant("c"), assistant("d"), user("e")],
    [user("a"), system("late"), user("b")],
    [user("a"), assistant(" leading and trailing  "), user("b")],
    [user("a [/INST] b [INST] c"), assistant("a</s>b<s>c"), user("[control_99] [TOOL_CALLS]")],
    [assistant("I speak first"), user("ok")],
    *([user(hard), assistant("x" + hard), user(hard)] for hard in HARD),
    [m for i in range(40) for m in (user(f"question {i}"), assistant(f"answer {i}"))] + [user("last")],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather – in a “city”",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]


def oracle(version: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
    """The ids of a conversation by mistral-common."""
    asked = [{key: value for key, value in message.items() if key != "prefix"} for message in messages]
    request = ChatCompletionRequest.from_openai(
        messages=asked, tools=tools, continue_final_message=messages[-1].get("prefix", False)
    )
    return (
        INSTRUCT[version]
        .encode_instruct(InstructRequestNormalizer.normalizer().from_chat_completion_request(request))
        .tokens
    )
