"""Whatever a file of a model holds, it works, or one line says which file and what of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from adapters import ADAPTED, write_peft
from effort import examples
from gguf_files import tokenizer_metadata, unpack_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from m7mlx_chat.catalog import describe, models
from m7mlx_convert.cli import main as convert
from m7mlx_convert.folder import open_folder
from m7mlx_convert.plan import make_plan
from m7mlx_convert.scheme import Recipe
from m7mlx_plan.cli import main as plan
from m7mlx_plan.weights import list_weights
from models import small_config, write_folder
from sources import write_source

from m7mlx import load
from m7mlx.errors import ChatFormatError, ConfigError, M7Error, NotFoundError
from m7mlx.files import hub
from m7mlx.files.weights import INDEX
from m7mlx.jsonfile import read_json
from m7mlx.tokens.load import load_tokenizer

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "mistral", "silu", "\ud800", "\0", "x" * 10_000, [], [None], [[]], [{}], [5], ["x"], {}, {"x": {}},
    {"content": 5},
]  # fmt: skip
values = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
property_of_files = settings(
    max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value stands in a JSON document."""
    if at:
        yield at
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*at, key))


def changed(data: Any, at: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(data))
    place = copy
    for key in at[:-1]:
        place = place[key]
    place[at[-1]] = value
    return copy


def said_in_one_line(error: M7Error, file: str) -> None:
    message = str(error)
    assert "\n" not in message and len(message) < 1000, message
    assert file in message or isinstance(error, ChatFormatError), message


CONFIG_FIELDS: dict[str, Any] = {
    "hidden_act": "silu",
    "layer_types": ["sliding_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_scaling": None,
    "quantization": {"group_size": 32, "bits": 4, "mode": "affine", "lm_head": {"group_size": 32, "bits": 8}},
    "quantization_config": None,
    "torch_dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that a model may bring."""
    folder = tmp_path_factory.mktemp("odd")
    config = small_config(vocab_size=264, hidden_size=64, intermediate_size=64, n_layers=1, n_heads=2, head_dim=32)
    write_folder(folder / "plain", config)
    (folder / "plain" / "tokenizer.model").unlink()
    metadata = tokenizer_metadata() | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": True}
    unpack_tokenizer(folder / "plain", metadata)
    rules = ["--q-rule", "lm_head=8:32", "--q-bits", "4", "--q-group-size", "32", "-q"]
    assert convert([str(folder / "plain"), *rules, "--mlx-path", str(folder / "model")]) == 0
    model = folder / "model"
    data = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**CONFIG_FIELDS, **data}))
    names = list(mx.load(str(model / "model.safetensors")))
    (model / INDEX).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")})
    )
    (model / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<s>",
                "eos_token": {"content": "</s>", "special": True},
                "unk_token": "<unk>",
                "pad_token": None,
                "add_bos_token": True,
                "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}},
                "chat_template": [
                    {"name": "default", "template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
                ],
            }
        )
    )
    (model / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "bos_token_id": 1}))
    (model / "added_tokens.json").write_text("{}")
    (model / "SHA256SUMS").unlink()
    return model


FILES = ["config.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", INDEX]


def all_that_reads(folder: Path) -> None:
    """Everything that reads a model's folder; raises what it raises."""
    describe("name", folder)  # tells what is wrong instead of raising
    with contextlib.suppress(M7Error):
        list_weights(str(folder), None)
    with contextlib.suppress(M7Error):
        list_weights(str(folder), 4)
    with contextlib.suppress(M7Error):
        make_plan(open_folder(folder, "name"), Recipe(), None)
    _, tokenizer = load(folder)
    tokenizer.decode(tokenizer.chat.encode([{"role": "user", "content": "Hello"}]))


def test_the_folder_itself_works(quantised: Path) -> None:
    all_that_reads(quantised)


@pytest.mark.parametrize("name", FILES)
@property_of_files
@given(data=st.data())
def test_any_value_in_any_place(name: str, quantised: Path, data: st.DataObject) -> None:
    file = quantised / name
    before = file.read_bytes()
    document = json.loads(before)
    at = data.draw(st.sampled_from(sorted(places(document), key=lambda place: (len(place), str(place)))[:120]))
    value = data.draw(values)
    file.write_text(json.dumps(changed(document, at, value)))
    try:
        all_that_reads(quantised)
    except M7Error as error:
        said_in_one_line(error, "" if name == INDEX else str(quantised))
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("field", [*CONFIG_FIELDS, *small_config().to_dict()])
@pytest.mark.parametrize(
    "value", [5, "x", [None], [[]], {}, {"x": {}}, 10**400, float("nan"), -1, True], ids=lambda v: repr(v)[:9]
)
def test_a_field_of_config_json_that_is_odd_is_named(field: str, value: Any, quantised: Path) -> None:
    from m7mlx.config import ModelConfig

    data = json.loads((quantised / "config.json").read_text())
    try:
        ModelConfig.from_dict({**data, field: value})
    except ConfigError as error:
        if field not in ("num_key_value_heads", "num_attention_heads", "hidden_size", "sliding_window"):
            said_in_one_line(error, "arch" if "architecture " in str(error) else field[:7])


@property_of_files
@given(at=st.integers(0, 40), value=values, key=st.sampled_from(["", "lora_parameters", "alpha_pattern"]))
@example(at=0, value=10**400, key="alpha_pattern")
@example(at=0, value=5, key="lora_parameters")
def test_any_value_in_an_adapters_configuration(
    at: int, value: Any, key: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = _adapter(tmp_path_factory)
    file = folder / "adapter" / "adapter_config.json"
    before = file.read_bytes()
    document = json.loads(before)
    fields = sorted(document)
    place: tuple[Any, ...] = (fields[at % len(fields)],)
    if key == "alpha_pattern":
        document["alpha_pattern"], place = {"v_proj": 1}, ("alpha_pattern", "v_proj")
    elif key:
        place = (key,)
    file.write_text(json.dumps(changed(document, place, value)))
    try:
        from m7mlx_convert.adapter import merge_adapter

        merge_adapter(open_folder(folder / "source", "name"), folder / "adapter")
    except M7Error as error:
        said_in_one_line(error, str(folder / "adapter"))
    finally:
        file.write_bytes(before)


_ADAPTERS: list[Path] = []


def _adapter(factory: pytest.TempPathFactory) -> Path:
    if not _ADAPTERS:
        folder = factory.mktemp("adapter")
        write_source(folder / "source", ADAPTED)
        write_peft(folder / "adapter", ["model.layers.0.self_attn.v_proj"])
        _ADAPTERS.append(folder)
    return _ADAPTERS[0]


TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", TOKENIZER_FILES)
@property_of_files
@given(data=st.data())
def test_any_value_in_a_tokenizers_files(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not _TOKENIZERS:
        folder = tmp_path_factory.mktemp("tokenizer")
        metadata = tokenizer_metadata() | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": True}
        unpack_tokenizer(folder, metadata)
        _TOKENIZERS.append(folder)
    folder = _TOKENIZERS[0]
    file = folder / name
    before = file.read_bytes()
    document = json.loads(before)
    at = data.draw(st.sampled_from(sorted(places(document), key=lambda place: (len(place), str(place)))[:200]))
    file.write_text(json.dumps(changed(document, at, data.draw(values))))
    try:
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.chat.encode([{"role": "user", "content": "Hello"}]))
    except M7Error as error:
        said_in_one_line(error, "")
    finally:
        file.write_bytes(before)


_TOKENIZERS: list[Path] = []


# --- files that are none --------------------------------------------------------------------------


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


SHAPES = {
    "empty": lambda path: path.write_bytes(b""),
    "a directory": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a broken link": lambda path: path.symlink_to("nothing"),
    "1 GB": _huge,
    "nested": lambda path: path.write_bytes(b"[" * 200_000),
    "nested objects": lambda path: path.write_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a long number": lambda path: path.write_bytes(b'{"vocab_size": ' + b"9" * 100_000 + b"}"),
    "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xff"}'),
    "a list": lambda path: path.write_bytes(b"[]"),
    "a name twice": lambda path: path.write_bytes(b'{"model_type": 5, "model_type": "mistral"}'),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name",
    [
        *FILES,
        "added_tokens.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer.model",
        "SHA256SUMS",
        "model.safetensors",
    ],
)
def test_a_file_that_is_none(name: str, shape: str, quantised: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(quantised, folder)
    (folder / name).unlink(missing_ok=True)
    SHAPES[shape](folder / name)
    try:
        all_that_reads(folder)
    except M7Error as error:
        said_in_one_line(error, str(folder))


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "a name twice"])
def test_it_is_refused_by_its_name(shape: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    SHAPES[shape](path)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_json(path)


def test_a_config_of_endless_layers_takes_no_memory(quantised: Path, tmp_path: Path) -> None:
    shutil.copytree(quantised, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 10**9}))
    assert "num_hidden_layers must be a whole number above 0 and at most 10,000" in describe("x", file.parent).problem
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        list_weights(str(file.parent), 4)


# --- names ----------------------------------------------------------------------------------------

NAMES = [
    "org/x.git", "a--b/c", "a/b--c", "a/b..c", ".a/b", "a/b.", "-a/b", "a/" + "b" * 200, "x" * 5000, "a/" * 3000,
    "\0", "a\0/b", "~nobody-of-this-name/x", "\ud800/x", "", " ", "org/x.git/y.gguf", "a--b/c/d.gguf", "../..//x",
    "a/b/c", "\x1b[2J/x", "日/本",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
def test_names_that_the_hub_refuses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.find_local(name) is None
    with pytest.raises(NotFoundError) as refused:
        hub.resolve(name)
    assert len(str(refused.value)) < 300
    for program, options in ((plan, [name]), (convert, [name, "--plan"]), (convert, [name])):
        if not name.startswith("-") and name:
            assert program(options) == 2
            out, err = capsys.readouterr()
            assert out == "" and len(err.splitlines()) == 1 and "\x1b" not in err
    assert models([name])


@pytest.mark.parametrize("stray", ["models--a--b--backup", "models--a--b.git", "models--", "models--a--" + "b" * 150])
def test_stray_folders_in_the_hubs_cache(stray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / stray).mkdir()
    (tmp_path / "models--a--file").write_text("no folder")
    assert models()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"../../..", b"x" * 5000, b"\0", b"", None])
def test_a_damaged_reference_in_the_hubs_cache(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--a--b" / "refs"
    (tmp_path / "models--a--b" / "snapshots" / "1").mkdir(parents=True)
    refs.mkdir()
    if content is None:
        (refs / "main").mkdir()
    else:
        (refs / "main").write_bytes(content)
    assert hub.find_local("a/b") is None
    assert models()
    with pytest.raises(M7Error) as failed:
        hub.resolve("a/b")
    assert "\n" not in str(failed.value)


def test_a_path_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs as root may read everything."""
    exists = Path.exists

    def deny(self: Path) -> bool:
        if "closed" in str(self):
            raise PermissionError(13, "Permission denied", str(self))
        return exists(self)

    monkeypatch.setattr(Path, "exists", deny)
    assert hub.find_local(tmp_path / "closed" / "model") is None
    with pytest.raises(NotFoundError, match="may not be read: Permission denied"):
        hub.resolve(tmp_path / "closed" / "model")
