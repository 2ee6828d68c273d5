"""Models that LM Studio and Ollama keep on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from chat_harness import chatting, environment_in
from gguf_files import gguf_config, write_gguf
from m7mlx_chat import jobs
from m7mlx_chat.catalog import Entry
from m7mlx_chat.elsewhere import find_elsewhere, read_architecture
from m7mlx_chat.environment import Environment, Programs, read_environment
from m7mlx_chat.screens.dialogs import Choose
from m7mlx_chat.screens.models import Models
from models import small_config, write_folder

from m7mlx.errors import WeightsError

MODEL = "application/vnd.ollama.image.model"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A GGUF file that the converter takes."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, gguf_config(n_layers=1))
    return file.read_bytes()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Places for both programs, and nothing anywhere else."""
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return Programs((tmp_path / "lmstudio",), (tmp_path / "ollama",))


def pulled(
    programs: Programs,
    data: bytes,
    name: str = "registry.ollama.ai/library/mistral/7b",
    letter: str = "a",
    *extra: dict[str, object],
    size: int | None = None,
) -> Path:
    """What `ollama pull` leaves: a manifest, and a file called by its digest."""
    (place,) = programs.ollama
    blob = place / "blobs" / f"sha256-{letter * 64}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    layer = {"mediaType": MODEL, "digest": f"sha256:{letter * 64}", "size": len(data) if size is None else size}
    written(programs, json.dumps({"schemaVersion": 2, "layers": [layer, *extra]}), name)
    return blob


def written(programs: Programs, manifest: str, name: str = "registry.ollama.ai/library/mistral/7b") -> None:
    file = programs.ollama[0] / "manifests" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(manifest)


def using(folder: Path, programs: Programs) -> Environment:
    here = environment_in(folder)
    return Environment(here.data, here.config, here.log, programs=programs)


def test_where_they_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    programs = read_environment().programs
    assert programs.lm_studio == (tmp_path / ".lmstudio", tmp_path / ".cache" / "lm-studio")
    assert programs.ollama[0] == tmp_path / ".ollama" / "models"
    monkeypatch.setenv("OLLAMA_MODELS", "/somewhere")
    assert read_environment().programs.ollama == (Path("/somewhere"),)
    assert find_elsewhere(Programs((tmp_path / "none",), (tmp_path / "none",))) == []


def test_what_lm_studio_keeps(programs: Programs, tiny: bytes, tmp_path: Path) -> None:
    place = programs.lm_studio[0] / "models"
    folder = write_folder(place / "mlx-community" / "Mistral", small_config(vocab_size=32768))
    other = write_folder(place / "mlx-community" / "Other", small_config(vocab_size=32768))
    config = json.loads((other / "config.json").read_text()) | {"model_type": "gemma3"}
    (other / "config.json").write_text(json.dumps(config))
    files = place / "bartowski" / "Mistral-GGUF"
    files.mkdir(parents=True)
    for name in ("m-Q4_0.gguf", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf"):
        (files / name).write_bytes(tiny)
    (files / "bad.gguf").write_bytes(b"GGML")
    (files / "README.md").write_text("text")
    write_gguf(files / "mmproj.gguf", gguf_config(n_layers=1), architecture="clip")
    os.mkfifo(files / "pipe.gguf")
    found = {entry.label: entry for entry in find_elsewhere(programs)}
    assert found["mlx-community/Mistral"].folder == folder and found["mlx-community/Mistral"].window == 7
    assert found["bartowski/Mistral-GGUF/m-Q4_0.gguf"].file == files / "m-Q4_0.gguf"
    assert found["bartowski/Mistral-GGUF/m-Q4_0.gguf"].nbytes == len(tiny)
    problems = {label.rpartition("/")[2]: entry.problem for label, entry in found.items() if entry.problem}
    assert problems == {
        "bad.gguf": "it is not a GGUF file",
        "big-00001-of-00002.gguf": "it is one of several parts; join them with: llama-gguf-split --merge",
        "pipe.gguf": "it is no regular file",
    }
    assert len(found) == 5
    # where the user has moved them
    settings = programs.lm_studio[0] / "settings.json"
    moved = write_folder(tmp_path / "moved" / "org" / "Moved", small_config(vocab_size=32768))
    settings.write_text(json.dumps({"downloadsFolder": str(tmp_path / "moved")}))
    assert moved in [entry.folder for entry in find_elsewhere(programs)]
    for odd in ("{", "[]", '{"downloadsFolder": 5}', '{"downloadsFolder": "\\u0000"}'):
        settings.write_text(odd)
        assert len(find_elsewhere(programs)) == 5


def test_what_ollama_keeps(programs: Programs, tiny: bytes) -> None:
    blob = pulled(programs, tiny)
    pulled(programs, tiny, "registry.ollama.ai/someone/tuned/latest")
    pulled(programs, tiny, "hf.co/org/name/Q4_K_M", "b")
    found = find_elsewhere(programs)
    assert [entry.label for entry in found] == ["hf.co/org/name:Q4_K_M", "mistral:7b", "someone/tuned:latest"]
    assert found[1].file == blob and found[1].nbytes == len(tiny) and found[1].owner == "Ollama"
    assert not any(entry.problem for entry in found)


@pytest.mark.parametrize(
    ("manifest", "problem"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "is not a JSON object"),
        ("{}", "lists no layers"),
        ('{"layers": [1]}', "lists no layers"),
        (json.dumps({"layers": [{"mediaType": MODEL, "digest": "sha256:../../etc/passwd"}]}), "names no file"),
        (
            json.dumps({"layers": [{"mediaType": MODEL, "digest": f"sha256:{'c' * 64}", "size": "1"}]}),
            "names no file",
        ),
        (json.dumps({"layers": [{"mediaType": MODEL, "digest": f"sha256:{'c' * 64}", "size": 1}]}), "ollama pull"),
        (json.dumps({"layers": [{"mediaType": MODEL}, {"mediaType": MODEL}]}), "several files"),
        (json.dumps({"layers": [], "padding": "x" * (1 << 20)}), "more than"),
    ],
)
def test_a_broken_manifest_is_shown_with_the_reason(programs: Programs, manifest: str, problem: str) -> None:
    written(programs, manifest)
    (entry,) = find_elsewhere(programs)
    assert problem in entry.problem and entry.label == "mistral:7b" and entry.file is None


def test_what_else_ollama_can_hold(programs: Programs, tiny: bytes) -> None:
    pulled(programs, tiny, size=5)
    pulled(programs, tiny, "h/n/adapted/x", "b", {"mediaType": "application/vnd.ollama.image.adapter"})
    pulled(programs, b"", "h/n/empty/x", "c")
    written(programs, '{"layers": [{"mediaType": "application/vnd.ollama.image.tensor"}]}', "h/n/mlx/x")
    written(programs, "{}", "h/n/\x1b[2J\n/\udcff")
    (programs.ollama[0] / "manifests" / "stray").write_text("{}")
    found = {entry.label: entry.problem for entry in find_elsewhere(programs)}
    assert "not whole" in found["mistral:7b"]
    assert "only Ollama can" in found["h/n/adapted:x"]
    assert found["h/n/empty:x"] == "it is not a GGUF file"
    assert len(found) == 4


def _key(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("head", "architecture"),
    [
        (b"", ""),
        (b"\x03", ""),
        (b"\x09\0\0\0" + bytes(16), ""),
        (b"\x03\0\0\0" + bytes(8) + b"\xff" * 8, ""),
        (b"\x03\0\0\0" + bytes(8) + b"\xff" * 16, ""),
        (b"\x03\0\0\0" + bytes(8) + b"\2" + bytes(7) + _key(b"a") + b"\x63\0\0\0", ""),
        (b"\x03\0\0\0" + bytes(8) + b"\2" + bytes(7) + _key(b"a") + b"\x09\0\0\0\x08\0\0\0" + b"\xff" * 8, ""),
        (b"\x03\0\0\0" + bytes(8) + b"\2" + bytes(7) + _key(b"a") + b"\x09\0\0\0\x0a\0\0\0" + b"\xff" * 8, ""),
        (
            b"\x03\0\0\0" + bytes(8) + b"\3" + bytes(7)
            + _key(b"a") + b"\x04\0\0\0" + bytes(4)
            + _key(b"b") + b"\x09\0\0\0\x08\0\0\0\1" + bytes(7) + _key(b"text")
            + _key(b"general.architecture") + b"\x08\0\0\0" + _key(b"llama"),
            "llama",
        ),
    ],
)  # fmt: skip
def test_the_head_of_a_gguf_file(tmp_path: Path, head: bytes, architecture: str) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"GGUF" + head)
    assert read_architecture(file) == (architecture, 4 + len(head))
    with pytest.raises(WeightsError):
        read_architecture(tmp_path / "none")


async def test_a_file_of_ollama_is_converted_and_answers(programs: Programs, tiny: bytes, tmp_path: Path) -> None:
    pulled(programs, tiny)
    async with chatting(tmp_path, environment=using(tmp_path, programs)) as chat:
        await chat.send("/model mistral:7b")  # the name that the list shows
        await chat.settled()
        assert isinstance(chat.app.screen, Choose)
        assert "stays as it is" in chat.shown() and "Convert it as it is" in chat.shown()
        await chat.pilot.press("enter")
        await chat.settled()
        folder, settings = chat.engine.loaded[-1]
        assert folder == tmp_path / "data" / "models" / "mistral-7b"
        assert settings.model == str(folder) and (folder / "config.json").is_file()
        await chat.send("/model mistral:7b")  # once is enough
        await chat.settled()
        assert chat.engine.loaded[-1][0] == folder and len(chat.app.screen_stack) == 1


async def test_a_file_that_the_converter_refuses(programs: Programs, tmp_path: Path) -> None:
    file = tmp_path / "odd.gguf"
    write_gguf(file, gguf_config(n_layers=1), changes={"llama.expert_count": 8})
    pulled(programs, file.read_bytes())
    async with chatting(tmp_path, environment=using(tmp_path, programs)) as chat:
        await chat.send("/model mistral:7b")
        await chat.settled()
        assert "mixtures of experts are not supported" in chat.told()
        assert not (tmp_path / "data" / "models" / "mistral-7b").exists()


async def test_a_folder_of_lm_studio_is_used_in_place(programs: Programs, tmp_path: Path) -> None:
    place = programs.lm_studio[0] / "models" / "org" / "Name"
    folder = write_folder(place, small_config(vocab_size=32768))
    async with chatting(tmp_path, environment=using(tmp_path, programs)) as chat:
        await chat.pilot.press("ctrl+o")
        await chat.settled()
        assert "org/Name" in chat.shown() and "LM Studio" in chat.shown()
        await chat.pilot.press(*"name", "enter")
        await chat.pilot.pause()
        assert chat.engine.loaded[-1][0] == folder
        assert chat.session.settings.model == str(folder)
        await chat.exchange("q", "a")
        await chat.pilot.press("ctrl+o")
        await chat.settled()
        screen = chat.app.screen
        assert isinstance(screen, Models)
        assert [row.folder for row in screen._rows if isinstance(row, Entry) and row.folder] == [folder]  # once


async def test_a_list_that_comes_after_the_screen_has_gone(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        chat.app.choose_model()
        await chat.settled()
        screen = chat.app.screen
        assert isinstance(screen, Models)
        entries = screen._entries
        leaving = chat.app.pop_screen()
        await screen.query("*").remove()  # as it is for a moment: without its parts, and not yet removed itself
        screen._listed(entries)  # raises nothing
        await leaving
        screen._listed(entries)
        await chat.pilot.pause()
        assert not chat.notices()


async def test_hostile_names_are_shown_harmlessly(programs: Programs, tiny: bytes, tmp_path: Path) -> None:
    pulled(programs, tiny, "registry.ollama.ai/library/\x1b]0;x\x07[red]/\u202e7b")
    async with chatting(tmp_path, environment=using(tmp_path, programs)) as chat:
        await chat.pilot.press("ctrl+o")
        await chat.settled()
        assert "␛]0;x␇[red]:␦7b" in chat.shown()
        screen = chat.app.screen
        assert isinstance(screen, Models)
        (entry,) = (row for row in screen._rows if isinstance(row, Entry) and row.file)
        assert jobs.target_folder(entry.label, 4, tmp_path) == tmp_path / "0-x-red-7b-4bit"
        screen._choose(entry)
        await chat.settled()
        assert isinstance(chat.app.screen, Choose)
        assert "␛]0;x␇[red]:␦7b" in chat.shown()
