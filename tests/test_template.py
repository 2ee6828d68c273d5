"""Chat templates come from strangers: nothing they do may run code, hang or eat the memory."""

from __future__ import annotations

import sys

import pytest

from m7mlx.errors import ChatFormatError
from m7mlx.template import Guard, render


def test_what_templates_of_the_hub_use() -> None:
    template = """
    {%- for m in messages %}
        {%- if loop.index0 == 1 %}{% break %}{% endif %}
        {%- set ns = namespace(text='') %}
        {%- for part in m.content.split(',') %}{% set ns.text = ns.text ~ part | upper %}{% endfor %}
        {%- generation %}{{ ns.text }}{% endgeneration %}
    {%- endfor %}
    {{- tools | tojson }}{{ strftime_now('%Y')[:2] }}"""
    context = {"messages": [{"content": "a,b"}, {"content": "never"}], "tools": {"é": "<&>"}}
    assert render(template, context) == 'AB{"é": "<&>"}20'


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no system role') }}",
        "{% for x in %}",
        "{{ 1 / 0 }}",
        "{{ missing.attribute }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include 'other' %}",
        # endless
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        # memory
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set a %}{% for i in range(1000) %}xxxxxxxx{% endfor %}{% endset %}"
        "{% set b %}{% for i in range(1000) %}{{ a }}{% endfor %}{% endset %}"
        "{% for i in range(1000) %}{{ b }}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ [0] * 10000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
        "{% set a = 'a' * 1000000 %}{{ a | replace('a', a) }}",
        "{% set a = 'a' * 1000000 %}{{ a.join('b' * 1000) }}",
        "{% set a = 'a' * 1000000 %}{{ ('b' * 1000) | list | join(a) }}",
    ],
)
def test_hostile_and_broken_templates_end_in_one_line(template: str) -> None:
    before = sys.gettrace()
    with pytest.raises(ChatFormatError) as caught:
        render(template, {"messages": []})
    assert "template" in str(caught.value)
    assert sys.gettrace() is before


def test_a_long_conversation_stays_within_the_bounds() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
    messages = [{"role": "user", "content": "x" * 1000}] * 5000
    assert len(render(template, {"messages": messages})) == 5000 * 1007


def test_guard_leaves_the_text_itself_unchanged() -> None:
    guard = Guard(["<s>", "</s>"])
    protected = guard.protect({"content": "a<s>b</s> <", "role": "user"})
    assert protected["role"] == "user"
    assert [p.name for p in guard.split("<s>" + protected["content"] + "</s>")] == ["<s>", "a<s>b</s> <", "</s>"]
    assert [p.is_control for p in guard.split("<s>" + protected["content"] + "</s>")] == [True, False, True]


def test_a_message_of_all_noncharacters() -> None:
    with pytest.raises(ChatFormatError, match="noncharacter"):
        Guard(["<s>"]).protect("".join(map(chr, range(0xFDD0, 0xFDF0))))
