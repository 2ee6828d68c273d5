"""Chat templates come from strangers: nothing they do may run code, hang or eat the memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from models import mistral_file
from tokenizer_folders import byte_level_json, write_json_tokenizer

from m7mlx import worker as worker_module
from m7mlx.errors import ChatFormatError
from m7mlx.tokens import template as template_module
from m7mlx.tokens.template import Marker, render
from m7mlx.worker import Worker

HI = {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True}


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
        "{{ [] + none }}",
        "{{ {}['a'].b }}",
        "{{ '%d' % 'a' }}",
        "{{ 2.0 ** 10000 }}",
        "{{ 'a'.encode('no such code') }}",
        "{% break %}",
        "{{ raise_exception(missing) }}",
        "{% import 'other' as other %}",
        "{{ namespace(__class__=1) }}",
        "{{ dict.mro() }}",
        # deep
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "not " * 5000 + "1 }}",
        "{% if 1 %}" * 5000,
        "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
        "{{ " + "1 + " * 5000 + "1 }}",
        "{% set ns = namespace(x=0) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
        # endless
        "{% macro m(n) %}{% if n < 60 %}{{ m(n + 1) }}{{ m(n + 1) }}{% endif %}{% endmacro %}{{ m(0) }}",
        "{{ ('f' * 20000000) | int(base=16) // ('e' * 10000000) | int(base=16) > 0 }}",
        "{{ lipsum(n=100000) | length }}",
        "{{ 'a' }}" * 100_000,
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        # memory and numbers
        "{{ 10 ** (10 ** 8) }}",
        "{{ (3 ** 5000000).bit_length() }}",
        "{{ ('{:>90000000}'.format(1)) | length }}",
        "{{ ('{a:>90000000}'.format_map({'a': 1})) | length }}",
        "{{ ('{:>90000000}' | attr('format'))(1) | length }}",
        "{{ '%90000000s' | format('a') | length }}",
        "{{ 'a'.rjust(90000000) | length }}",
        "{{ 'a'.zfill(90000000) | length }}",
        "{{ 'a'.encode().ljust(90000000) | length }}",
        "{{ (1).to_bytes(90000000, 'big') | length }}",
        "{{ ('a' * 9000).translate({97: 'b' * 10000}) | length }}",
        "{{ ('\\t' * 900).expandtabs(100000) | length }}",
        "{{ ('&' * 20000000) | e | length }}",
        "{{ [[[[0]]]] | tojson(indent=6000000) | length }}",
        "{{ [0, 0] | tojson(separators=('x' * 60000000, ':')) | length }}",
        "{{ (['x' * 60000] * 1500) | string | length }}",
        "{{ [1] | batch(70000000, fill_with='a') | list | length }}",
        "{{ 'a' | slice(70000000, fill_with='a') | list | length }}",
        "{{ ('a b ' * 2000) | wordwrap(1, wrapstring='x' * 100000) | length }}",
        "{{ 'a\\na' | indent(90000000) | length }}",
        "{{ strftime_now('%Y' * 25000000) | length }}",
        "{{ 'a' * 3000000 }}",
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
    with pytest.raises(ChatFormatError) as caught:
        render(template, {"messages": []})
    assert "template" in str(caught.value)


def test_a_long_conversation_stays_within_the_bounds() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
    messages = [{"role": "user", "content": "x" * 1000}] * 5000
    assert len(render(template, {"messages": messages})) == 5000 * 1007


@pytest.mark.parametrize(
    ("template", "context", "expected"),
    [
        ("{% for m in messages %}{{ '=' * 80 }}{{ m.content }}{% endfor %}", 10_000, 10_000 * 84),
        ("{% for a in messages %}{{ loop.index }}{% if loop.last %}{{ a }}{% endif %}{% endfor %}", 10_000, None),
        (
            "{% set ns = namespace(n=0) %}{% for a in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            10_000,
            5,
        ),
        ("{% for m in messages | reverse %}{{ m.content | trim | upper }}{% endfor %}", 10_000, 40_000),
        ("{{ tools | tojson(indent=4) }}", 1_000, None),
        ("{{ messages[0].content * 3 }}", "x" * 1_000_000, 3_000_000),
        ("{{ messages[0].content | replace('x', 'yz') | trim }}", "x\U0001f600" * 500_000, 1_500_000),
        ("{{ 2 ** 16 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ '%s-%d' % ('a', 5) }}{{ 'a'.ljust(9) }}|", 1, None),
    ],
)
def test_honest_templates_with_much_to_do_work(template: str, context: int | str, expected: int | None) -> None:
    n, text = (context, "text") if isinstance(context, int) else (1, context)
    messages = [{"role": "user", "content": text} for _ in range(n)]
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": {"type": "object"}}} for i in range(n)]
    rendered = render(template, {"messages": messages, "tools": tools})
    assert rendered == plain_jinja(template, {"messages": messages, "tools": tools})
    assert expected is None or len(rendered) == expected


def plain_jinja(template: str, context: dict[str, Any]) -> str:
    """Return what Jinja makes of a template, set up as transformers sets it up.

    The template needs no more than Jinja's own filters.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    return environment.from_string(template).render(**context)


def test_what_a_conversation_may_hold_arrives_unchanged() -> None:
    content = [
        "\ud800 \0 \u2028 \ufdd0 \U0001f600 {{ x }}",
        {"a": None, "b": [True, 0.5, 10**30, {"": ""}], "é": "ü"},
        (),
    ]
    rendered = render("{{ messages | tojson }}", {"messages": content})
    assert rendered == json.dumps(content, ensure_ascii=False)


def test_a_value_without_a_form_in_json_is_inert() -> None:
    assert render("{{ messages }}", {"messages": datetime(2024, 1, 1)}) == "<datetime>"


@pytest.mark.parametrize("depth", [2_000, 100_000])
def test_a_message_that_is_nested_too_deep(depth: int) -> None:
    nested: Any = "end"
    for _ in range(depth):
        nested = [nested]
    for part in (
        lambda: render("{{ 1 }}", {"messages": nested}),
        lambda: Marker(["<s>"]).mark({"content": nested}),
    ):
        with pytest.raises(ChatFormatError, match="nested too deep"):
            part()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "refuses the conversation: Roles must alternate"),
        ("{{ raise_exception('') }}", "refuses the conversation: it does not say why"),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("a\n{% for x in %}", "failed: line 2: Expected an expression"),
        ("{{ missing.attribute }}", "failed: 'missing' is undefined"),
        ("{{ 2.0 ** 10000 }}", "failed: Numerical result out of range"),
        ("{{ ''.__class__.x }}", "failed: access to attribute '__class__' of 'str' object is unsafe"),
        ("{% for i in range(100001) %}{% endfor %}", "failed: Range too big"),
        ("{{ 'a' * 90000000 }}", "takes too much memory"),
        (
            "{% macro m(n) %}{% if n < 60 %}{{ m(n+1) }}{{ m(n+1) }}{% endif %}{% endmacro %}{{ m(0) }}",
            "come to an end",
        ),
        ("{{ 'a' * 2100000 }}", "far more than the conversation holds"),
        ("a" * 1_000_001, "more than 1,000,000 characters"),
    ],
)
def test_the_cause_is_told_in_words(template: str, words: str) -> None:
    with pytest.raises(ChatFormatError) as caught:
        render(template, HI)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('a\x1b]52;c;x\x07b\x9bc\u202ed\r\ne' * 1000000) }}",
        "{% set x\x1b[2J = 1 %}",
        "{{ {}['a\x1b[2J\u202e'].x }}",
        "{{ x | nothing\x9b }}",
    ],
)
def test_a_templates_words_cannot_steer_a_terminal(template: str) -> None:
    with pytest.raises(ChatFormatError) as caught:
        render(template, HI)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_others_are_rendered_while_and_after_one_is_hostile() -> None:
    """Many threads share one process, and one of them has a hostile template.

    Whoever waits, waits for the clock of those before, not for ever.
    """
    hostile = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    found: list[str] = []

    def ask(template: str) -> None:
        try:
            found.append(render(template, HI))
        except ChatFormatError as error:
            found.append(str(error))

    threads = [threading.Thread(target=ask, args=(t,)) for t in [hostile, "{{ messages[0].content }}!"] + ["ok"] * 6]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == sorted(["the model's chat template does not come to an end", "Hi!"] + ["ok"] * 6)


def test_one_process_for_all_turns_until_a_template_goes_too_far() -> None:
    render("first", HI)
    pid = template_module._worker.pid
    for turn in range(5):
        render("{{ messages | length }}" + "x" * turn, HI)
        with pytest.raises(ChatFormatError):
            render("{{ 1 / 0 }}", HI)
    assert template_module._worker.pid == pid
    with pytest.raises(ChatFormatError):
        render("{{ 'a' * 90000000 }}", HI)
    assert render("next", HI) == "next"


def test_a_large_conversation_leaves_room_for_the_next() -> None:
    large = {"messages": [{"role": "user", "content": "\U0001f600" * 1000}] * 2000}
    for _ in range(3):
        assert len(render("{% for m in messages %}{{ m.content }}{% endfor %}", large)) == 2_000_000
        assert len(render("{{ ('a' * 40000000) | length }}", HI)) == 8


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10000000000 }}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    ],
)
def test_memory_is_bounded_where_the_system_does_not(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(worker_module, "RLIMITS", False)
    with Worker("m7mlx.tokens.template_process", memory=2 << 30) as worker:
        monkeypatch.setattr(template_module, "_worker", worker)
        assert render("{{ messages[0].content }}", HI) == "Hi"
        with pytest.raises(ChatFormatError, match="memory"):
            render(template, HI)
        assert render("{{ messages[0].content }}", HI) == "Hi"


def test_the_process_leaves_no_trace_in_this_one() -> None:
    code = "import sys; from m7mlx.tokens.template import render; print(render('1', {}), 'jinja2' in sys.modules)"
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", code]
    done = subprocess.run(command, text=True, capture_output=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["1", "False"], "")


REAL = """{%- set ns = namespace(last=-1, tools=false) %}
{%- macro call(c) %}<tool>{{ {"name": c.function.name, "of": c.function.arguments} | tojson }}</tool>{% endmacro %}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- for m in loop_messages[::-1] %}{%- if m.role == 'user' and ns.last < 0 %}
{%- set ns.last = loop_messages | length - 1 - loop.index0 %}{%- endif %}{%- endfor %}
{{- bos_token }}
{%- if tools is not none and tools %}{{ '# Tools\n' }}
    {%- for t in tools %}{{ t | tojson }}{{ '\n' }}{% endfor %}{%- endif %}
{%- for m in loop_messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) and not m.tool_calls %}{# no check #}{%- endif %}
    {%- if loop.index0 == ns.last and system is defined %}{{ '[SYS]' ~ system ~ '[/SYS]' }}{%- endif %}
    {%- if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}
        {%- for c in m.tool_calls or [] %}{{ call(c) }}{% endfor %}
    {%- endgeneration %}{{ eos_token }}
    {%- elif m.role == 'tool' %}{{ '[RESULT]' + m.content | string + '[/RESULT]' }}
    {%- else %}{{ '[INST] ' ~ m.content.strip().split('</think>')[-1].lstrip('\n') ~ ' [/INST]' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ strftime_now('%Y') | length }}{{- '<|assistant|>' }}{%- endif %}"""
CALLS = [{"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"x": "é<&>'"}}}]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " Hi\n"}],
    [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "a</think>\nb"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " b "},
        {"role": "user", "content": "c\U0001f600"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "f", "content": '{"y": 1}'},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}]


def real_templates() -> dict[str, str]:
    """Return real templates: the demo model's, Mistral's own, and one of everything.

    Mistral's own are as mistral-common writes them; the last one has everything that others use.
    """
    found = {"everything": REAL}
    if (demo := Path.home() / ".cache/m7mlx/demo/tokenizer_config.json").is_file():
        found["demo"] = json.loads(demo.read_text())["chat_template"]
    try:
        from mistral_common.integrations.chat_templates import chat_templates
    except ImportError:
        return found
    for version in ("v1", "v2", "v3"):
        found[version] = chat_templates.convert_tokenizer_to_chat_template(mistral_file(version))
    return found


@pytest.mark.oracle
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "system", "turns", "called"])
def test_templates_render_as_in_transformers(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    context = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    for name, template in real_templates().items():
        try:
            (expected,), _ = chat_template_utils.render_jinja_template([messages], tools, None, template, **context)
        except Exception as refused:
            expected = str(refused)
        try:
            found = render(template, {"messages": messages, "tools": tools, **context})
        except ChatFormatError as refused:
            found = str(refused).partition("refuses the conversation: ")[2]
        assert found == expected, name


@pytest.mark.oracle
@pytest.mark.parametrize("text", ["b", " b ", "b\n\n", " "])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "system", "turns", "called"])
def test_a_message_is_continued_as_in_transformers(tmp_path: Path, messages: list[dict[str, Any]], text: str) -> None:
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    last = {"role": "assistant", "content": text}
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for name, template in real_templates().items():
        try:
            (expected,), _ = chat_template_utils.render_jinja_template(
                [[*messages, last]], None, None, template, continue_final_message=True, **names
            )
        except Exception:  # refused by the template, or by transformers
            expected = None
        settings = names | {"chat_template": template}
        tokenizer = write_json_tokenizer(tmp_path, byte_level_json({"<s>": True, "</s>": True}), settings)
        try:
            ids = tokenizer.chat.encode([*messages, last | {"prefix": True}])
            found = b"".join({256: b"<s>", 257: b"</s>"}.get(i) or tokenizer.token_bytes(i) for i in ids).decode()
        except ChatFormatError:
            found = None
        assert found == expected, name


def test_marks_leave_the_text_itself_unchanged() -> None:
    marker = Marker(["<s>", "</s>"])
    marked = marker.mark({"content": "a<s>b</s> <", "role": "user"})
    assert marked["role"] == "user"
    assert [p.name for p in marker.split("<s>" + marked["content"] + "</s>")] == ["<s>", "a<s>b</s> <", "</s>"]
    assert [p.is_control for p in marker.split("<s>" + marked["content"] + "</s>")] == [True, False, True]


def test_a_message_of_all_noncharacters() -> None:
    with pytest.raises(ChatFormatError, match="noncharacter"):
        Marker(["<s>"]).mark("".join(map(chr, range(0xFDD0, 0xFDF0))))


def test_marks_cover_the_names_of_fields_and_what_is_called_role_inside() -> None:
    marker = Marker(["<s>", "</s>"])
    tool = {"role": "tool", "content": "x", "tool_calls": [{"role": "<s>", "</s>": {"role": {"a<s>": "</s>"}}}]}
    shown = json.dumps(marker.mark(tool), ensure_ascii=False)
    assert [p for p in marker.split(shown) if p.is_control] == []
    assert "".join(p.name for p in marker.split(shown)) == json.dumps(tool)
