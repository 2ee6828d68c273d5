"""Which prompt a folder's model gets: what its own template writes.

Mistral's format is used only where it is the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conversations import CONVERSATIONS, TOOLS, assistant, oracle, system, user
from mistral_common.integrations.chat_templates.template_generator import TemplateConfig, build_chat_template
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from models import mistral_file
from tokenizer_folders import added_token, bpe_json_of, byte_level_json, transformers_tokenizer, write_files

from m7mlx.errors import ChatFormatError, TokenizerError
from m7mlx.tokens import choice
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.mistral_format import MistralFormat
from m7mlx.tokens.template_format import TemplateFormat
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tokens.tokenizer_json import JsonTokenizer
from m7mlx.tokens.tokenizer_sentencepiece import SentencePieceTokenizer

V7 = mistral_file("v1").with_name("mistral_instruct_tokenizer_241114.model.v7")
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
# What mistral-common does, in a template's words: v1, and v3 without tools.
V1 = (
    "{{ bos_token }}{% set s = namespace(text='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set s.text = m.content + '\n\n' %}{% elif m.role == 'user' %}"
    "{{ ' [INST] ' + s.text + m.content + ' [/INST]' }}"
    "{% set s.text = '' %}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
V3 = (
    "{{ bos_token }}{% set s = namespace(text='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set s.text = m.content + '\n\n' %}{% elif m.role == 'user' %}"
    "{{ '[INST] ' + (s.text if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TEXTS = {"v1": V1, "v3": V3}
# Other conventions with [INST] in them.
CONVENTIONS = {
    "Llama 2's system prompt": V1.replace("m.content + '\n\n'", "'<<SYS>>\n' + m.content + '\n<</SYS>>\n\n'"),
    "system apart": V1.replace("{% set s.text = m.content + '\n\n' %}", "{{ m.content + '\n' }}"),
    "no spaces": V1.replace("' [INST] '", "'[INST]'").replace("' [/INST]'", "'[/INST]'"),
    "a line for each": V1.replace("' [/INST]'", "' [/INST]\n'"),
    "no start": V1.replace("{{ bos_token }}", ""),
    "no end": V1.replace(" + eos_token", ""),
    "system in each turn": V1.replace("{% set s.text = '' %}", ""),
    "system refused": V1.replace("{% set s.text = m.content + '\n\n' %}", "{{ raise_exception('no system') }}"),
    "answers trimmed of their space": V1.replace("' ' + m.content", "m.content"),
    "a prompt of its own": "{{ bos_token }}[INST] Sum up: {{ messages[-1].content }} [/INST]",
    "tools in words": V1.replace("{% else %}", "{% elif m.role == 'tool' %}{{ m.content }}{% else %}")
    + "{% if tools %}{{ tools | tojson }}{% endif %}",
}
ASKED = [
    [user("Hello")],
    [user("Hello"), assistant("Hi there"), user("Bye")],
    [system("Be brief"), user("Hello")],
    [system("Be brief"), user("Hello"), assistant("Hi there"), user("Bye")],
]


@pytest.fixture(autouse=True)
def record(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("M7MLX_CACHE", str(cache))
    return cache / "chat-formats.json"


def mistrals(folder: Path, version: str, template: str | None, **settings: Any) -> Path:
    shutil.copy(mistral_file(version), folder / "tokenizer.model")
    given = {} if template is None else {"chat_template": template}
    return write_files(folder, {"tokenizer_config.json": NAMED | given | settings})


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_mistrals_format_where_it_is_the_same(tmp_path: Path, version: str) -> None:
    """Mistral's format is then used for what the template does not know, too."""
    tokenizer = load_tokenizer(mistrals(tmp_path, version, TEXTS[version]))
    assert isinstance(tokenizer.chat, MistralFormat) and tokenizer.chat.version == version
    for messages in CONVERSATIONS:
        assert tokenizer.chat.encode(messages) == oracle(version, messages)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("oracle", [False, pytest.param(True, marks=pytest.mark.oracle)])
def test_other_conventions_are_kept(tmp_path: Path, convention: str, oracle: bool) -> None:
    tokenizer = load_tokenizer(mistrals(tmp_path, "v1", CONVENTIONS[convention]))
    assert isinstance(tokenizer.chat, TemplateFormat)
    if oracle:
        theirs = transformers_tokenizer(tmp_path)
        for messages in ASKED[:2] if convention == "system refused" else ASKED:
            expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
            assert tokenizer.chat.encode(messages) == expected
    if convention == "system refused":
        with pytest.raises(ChatFormatError, match="no system"):
            tokenizer.chat.encode(ASKED[2])


@pytest.mark.oracle
@pytest.mark.parametrize("text", ["Hi", " Hi there ", "a\n", "</s>[INST] x", "😀"])
def test_a_message_is_continued_as_in_transformers(tmp_path: Path, text: str) -> None:
    for name in ("a line for each", "answers trimmed of their space", "no end"):
        tokenizer = load_tokenizer(mistrals(tmp_path, "v1", CONVENTIONS[name]))
        assert isinstance(tokenizer.chat, TemplateFormat)
        theirs = transformers_tokenizer(tmp_path)
        for before in ASKED:
            asked = [*before, assistant(text)]
            expected = theirs.apply_chat_template(
                asked, tokenize=True, return_dict=False, continue_final_message=True, add_generation_prompt=False
            )
            found = tokenizer.chat.encode([*before, assistant(text) | {"prefix": True}])
            if "</s>" in text:  # typed text stays text
                assert found.count(2) == sum(m["role"] == "assistant" for m in before) * (name != "no end")
            else:
                assert found == expected


@pytest.mark.parametrize(
    "change",
    [
        ("(s.text if loop.last else '')", "(s.text if loop.first else '')"),
        ("'[INST] '", "'[INST]'"),
        ("'\n\n'", "'\n'"),
    ],
)
def test_one_kind_of_conversation_decides(tmp_path: Path, change: tuple[str, str]) -> None:
    assert isinstance(load_tokenizer(mistrals(tmp_path, "v3", V3.replace(*change))).chat, TemplateFormat)


def test_a_template_that_knows_tools_is_asked_about_them(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(mistrals(tmp_path, "v3", V3 + "{% if tools %}{{ tools | tojson }}{% endif %}"))
    assert isinstance(tokenizer.chat, TemplateFormat)
    assert tokenizer.decode(tokenizer.chat.encode([user("x")], TOOLS)).endswith(json.dumps(TOOLS, ensure_ascii=False))


@pytest.mark.parametrize("with_json", [False, True])
def test_a_template_that_mistral_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_json: bool) -> None:
    """Its models were made with mistral-common, whatever spaces the template leaves out."""
    text = CONVENTIONS["answers trimmed of their space"]
    monkeypatch.setattr(choice, "_PUBLISHED", {choice._digest(text)})
    mistrals(tmp_path, "v1", text.replace("{% else %}", "\n  {%- else %}").replace("\n  {%- else %}", "{% else %}"))
    if with_json:
        write_files(tmp_path, {"tokenizer.json": bpe_json_of(mistral_file("v1"))})
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer) and isinstance(tokenizer.chat, MistralFormat)
    assert tokenizer.chat.encode(ASKED[3]) == oracle("v1", ASKED[3])
    write_files(tmp_path, {"added_tokens.json": {"<|im_end|>": 32000}})  # a fine-tune
    assert isinstance(load_tokenizer(tmp_path).chat, TemplateFormat)


def test_a_copy_with_other_indentation_is_the_same_template() -> None:
    text = "{%- for m in messages %}\n    {{- m.content + '\\n' }}\n\n{%- endfor %}\n"
    assert choice._digest(text) == choice._digest(text.replace("    ", "\t").rstrip())
    assert choice._digest(text) != choice._digest(text.replace("content +", "content  +"))


# --- vocabularies since v7 ------------------------------------------------------------------------


@pytest.fixture
def v7(tmp_path: Path) -> Tokenizer:
    template = build_chat_template(TemplateConfig(TokenizerVersion.v7, spm=True))
    shutil.copy(V7, tmp_path / "tokenizer.model")
    return load_tokenizer(write_files(tmp_path, {"tokenizer_config.json": NAMED | {"chat_template": template}}))


@pytest.mark.parametrize("messages", ASKED, ids=range(len(ASKED)))
def test_later_models_take_their_own_template(v7: Tokenizer, messages: list[dict[str, Any]]) -> None:
    request: Any = ChatCompletionRequest.from_openai(messages=messages)
    assert v7.chat.encode(messages) == MistralTokenizer.from_file(str(V7)).encode_chat_completion(request).tokens


def test_nothing_typed_becomes_a_command_of_theirs(v7: Tokenizer) -> None:
    names = [name for name in v7.control_ids() if not name.startswith("[control_")]
    assert len(names) > 15
    text = " ".join(names)
    plain, typed = (v7.chat.encode([system(t), user(t), assistant(t), user(t)]) for t in ("x", text))
    assert [i for i in typed if v7.is_control(i)] == [i for i in plain if v7.is_control(i)]


def test_without_a_template_their_tokens_tell_the_version(tmp_path: Path) -> None:
    shutil.copy(V7, tmp_path / "tokenizer.model")
    chat = load_tokenizer(tmp_path).chat
    assert isinstance(chat, MistralFormat) and chat.version == "v7"


# --- tokenizer.json beside tokenizer.model --------------------------------------------------------


def test_the_one_with_more_tokens_counts(tmp_path: Path) -> None:
    data = bpe_json_of(mistral_file("v1"))
    mistrals(tmp_path, "v1", None)
    assert isinstance(load_tokenizer(write_files(tmp_path, {"tokenizer.json": data})), SentencePieceTokenizer)
    data["added_tokens"].append({"id": 32000, **added_token("<|any|>")})
    tokenizer = load_tokenizer(write_files(tmp_path, {"tokenizer.json": data}))
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.control_id("<|any|>") == 32000


def test_a_broken_model_beside_tokenizer_json_is_not_needed(tmp_path: Path) -> None:
    write_files(tmp_path, {"tokenizer.model": b"broken", "tokenizer.json": byte_level_json({})})
    assert load_tokenizer(tmp_path).encode("a") == [97]


# --- what is remembered ---------------------------------------------------------------------------


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    found: list[Path] = []
    choose = choice._choose

    def noted(folder: choice.Folder) -> choice._Choice:
        found.append(folder.path)
        return choose(folder)

    monkeypatch.setattr(choice, "_choose", noted)
    return found


def test_a_folder_is_tried_once_for_each_state(tmp_path: Path, tries: list[Path], record: Path) -> None:
    mistrals(tmp_path, "v1", V1)
    kinds = [type(load_tokenizer(tmp_path).chat) for _ in range(3)]
    assert (kinds, len(tries)) == ([MistralFormat] * 3, 1)
    shutil.copytree(tmp_path, tmp_path / "copy")
    load_tokenizer(tmp_path / "copy")
    assert len(tries) == 1 and record.is_file()
    (tmp_path / "chat_template.jinja").write_text(V3)
    assert isinstance(load_tokenizer(tmp_path).chat, TemplateFormat) and len(tries) == 2
    write_files(tmp_path, {"added_tokens.json": {"<|x|>": 32000}})
    assert load_tokenizer(tmp_path).control_id("<|x|>") == 32000 and len(tries) == 3


@pytest.mark.parametrize(
    "damage", ["", "{", "[1]", "null", "\\xff", '{"STATE": 7}', '{"STATE": [1, "v9"]}', "[" * 9999]
)
def test_a_damaged_record_is_none(tmp_path: Path, tries: list[Path], record: Path, damage: str) -> None:
    load_tokenizer(mistrals(tmp_path, "v1", V1))
    state = next(iter(json.loads(record.read_text())))
    record.write_text(damage.replace("STATE", state), encoding="latin-1")
    assert isinstance(load_tokenizer(tmp_path).chat, MistralFormat)
    assert len(tries) == 2
    load_tokenizer(tmp_path)
    assert len(tries) == 2


def test_where_nothing_can_be_noted_it_is_tried_again(
    tmp_path: Path, tries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path / "file" / "cache"))
    mistrals(tmp_path, "v1", V1)
    assert all(isinstance(load_tokenizer(tmp_path).chat, MistralFormat) for _ in range(2))
    assert len(tries) == 2


def test_the_record_stays_small(tmp_path: Path, record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_KEPT", 3)
    for n in range(5):
        load_tokenizer(write_files(tmp_path, {"tokenizer.json": byte_level_json({f"<{n}>": True})}))
    assert len(json.loads(record.read_text())) == 3


# --- tokens without a row in the embedding --------------------------------------------------------


def padded(folder: Path, rows: int, **settings: Any) -> Tokenizer:
    added = {"<s>": True, "</s>": True, "<pad>": True, "covid": False}
    write_files(folder, {"tokenizer.json": byte_level_json(added), "tokenizer_config.json": settings})
    return load_tokenizer(folder, rows)


def test_a_few_tokens_more_than_rows_are_none_to_the_model(tmp_path: Path) -> None:
    tokenizer = padded(tmp_path, 258, eos_token="</s>", pad_token="<pad>")
    assert (tokenizer.vocab_size, tokenizer.eos_ids) == (258, frozenset({257}))
    assert tokenizer.encode("<pad> covid") == [*b"<pad> covid"]  # not the token that the model does not have
    assert tokenizer.decode([258, 97, 259]) == "a"


def test_they_are_refused_by_name_where_they_occur(tmp_path: Path) -> None:
    tokenizer = padded(tmp_path, 258, bos_token="<pad>", eos_token="<pad>", chat_template="{{ bos_token }}x")
    assert tokenizer.eos_ids == frozenset()
    for use in (lambda: tokenizer.encode("x", add_bos=True), lambda: tokenizer.chat.encode([user("x")])):
        with pytest.raises(TokenizerError, match=r"the token '<pad>' \(258\) has no row in .* of 258") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_sentencepiece_model_does_without_them_too(tmp_path: Path) -> None:
    shutil.copy(mistral_file("v1"), tmp_path / "tokenizer.model")
    write_files(tmp_path, {"added_tokens.json": {"[PAD]": 32000, "covid": 32001}})
    tokenizer = load_tokenizer(tmp_path, 32000)
    assert tokenizer.vocab_size == 32000 and max(tokenizer.encode("covid [PAD]")) < 32000
    assert load_tokenizer(tmp_path, 32002).encode("covid") == [32001]


@pytest.mark.parametrize("rows", [255, 200, 1])
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path, rows: int) -> None:
    with pytest.raises(TokenizerError, match=f"260 tokens but the model's embedding only {rows}; they do not belong"):
        padded(tmp_path, rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {"padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "a"}},
    ],
)  # fmt: skip
def test_prompts_are_neither_cut_nor_filled(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = {"tokenizer_config.json": {"chat_template": "{{ messages[0].content }}"}}
    tokenizer = load_tokenizer(write_files(tmp_path, {"tokenizer.json": byte_level_json({}) | changes} | settings))
    assert tokenizer.encode("Hello, world") == tokenizer.chat.encode([user("Hello, world")]) == [*b"Hello, world"]
