"""Plans of what is still on the Hub, and results that go there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_files import TINY, write_mistral_gguf
from hub_server import Hub, environment, serve
from models import write_folder
from sources import quantisable, write_native, write_sharded

REPO = "someone/little"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served", REPO) as server:
        yield server


def run(hub: Hub, tmp_path: Path, *arguments: str, token: str = "") -> subprocess.CompletedProcess[str]:
    settings = environment(hub, tmp_path) | ({"HF_TOKEN": token} if token else {})
    command = [sys.executable, "-m", "m7mlx_convert", *arguments]
    return subprocess.run(
        command, env=settings, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )


def weights_asked_for(hub: Hub) -> int:
    """Bytes of weight files that were asked for, at most."""
    spans = [
        span for method, path, span in hub.requests if method == "GET" and path.endswith((".safetensors", ".gguf"))
    ]
    return sum(int(span.rpartition("-")[2]) + 1 if span else 10**12 for span in spans)


@pytest.mark.parametrize("layout", ["huggingface", "sharded", "native", "gguf"])
def test_the_plan_of_a_repository_is_that_of_its_files(hub: Hub, tmp_path: Path, layout: str) -> None:
    hub.folder.rmdir()
    source = REPO
    if layout == "huggingface":
        write_folder(hub.folder, quantisable(vocab_size=32000))
    elif layout == "gguf":
        hub.folder.mkdir()
        write_mistral_gguf(hub.folder / "tiny.gguf", TINY, "Q8_0")
        source = f"{REPO}/tiny.gguf"
    else:
        (write_sharded if layout == "sharded" else write_native)(hub.folder)
    options = ["--q-bits", "4", "--q-group-size", "32", "--plan", "--json"]
    done = run(hub, tmp_path, source, *options)
    assert done.returncode == 0, done.stderr
    if layout != "gguf":  # of a small file the head is all
        assert weights_asked_for(hub) < 1_000_000
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    plan: dict[str, Any] = json.loads(done.stdout)
    here = run(hub, tmp_path, str(hub.folder / "tiny.gguf" if layout == "gguf" else hub.folder), *options)
    expected: dict[str, Any] = json.loads(here.stdout)
    changing = ("source", "target", "disk_free_bytes")
    assert {k: v for k, v in plan.items() if k not in changing} == {
        k: v for k, v in expected.items() if k not in changing
    }


PADDING = 400 << 20


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_mirror_that_sends_all_of_a_file_is_not_read_on(hub: Hub, tmp_path: Path, kind: str) -> None:
    """Range is a wish; what comes in spite of it is neither kept in memory nor waited for."""
    hub.folder.rmdir()
    source = REPO
    if kind == "gguf":
        hub.folder.mkdir()
        write_mistral_gguf(hub.folder / "tiny.gguf", TINY, "Q8_0")
        source = f"{REPO}/tiny.gguf"
    else:
        write_folder(hub.folder, quantisable(vocab_size=32000))
    hub.ranges = False
    plain = run(hub, tmp_path, source, "--plan", "--json")
    assert plain.returncode == 0, plain.stderr
    hub.padding = PADDING
    code = (
        "import sys\nfrom m7mlx_bench.worker import peak_rss\nfrom m7mlx_convert.cli import main\n"
        "status = main(sys.argv[1:])\nprint(peak_rss())\nsys.exit(status)"
    )
    command = [sys.executable, "-c", code, source, "--plan", "--json"]
    done = subprocess.run(
        command,
        env=environment(hub, tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *said, peak = done.stdout.splitlines()
    found, expected = json.loads(said[0]), json.loads(plain.stdout)
    assert {**found, "disk_free_bytes": 0} == {**expected, "disk_free_bytes": 0}
    assert int(peak) < 400e6
    assert hub.sent < PADDING / 4


def test_a_damaged_header_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.folder.rmdir()
    write_folder(hub.folder, quantisable(vocab_size=32000))
    (hub.folder / "model.safetensors").write_bytes(b"\xff" * 100)
    done = run(hub, tmp_path, REPO, "--plan")
    assert done.returncode == 2
    assert f"{REPO}/model.safetensors is damaged" in done.stderr
    assert done.stderr.count("\n") == 1


# --- uploads ----------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "little", quantisable(vocab_size=32000))


def test_what_arrives_is_what_was_made(hub: Hub, tmp_path: Path, source: Path) -> None:
    options = ["--q-bits", "4", "--mlx-path", "out", "--upload-repo", "some-org/little-4bit", "-q"]
    done = run(hub, tmp_path, str(source), *options, token="hf_right")
    assert done.stdout == f"out\n{hub.url}/some-org/little-4bit\n", done.stderr
    assert done.stderr == ""
    assert [created["name"] for created in hub.created] == ["little-4bit"]
    assert hub.uploaded == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("little", "hf_right", "names no owner"),
        ("some org/little", "hf_right", "is no name for a repository"),
        ("others/little", "hf_right", "someone, who is logged in, cannot write to others, but to someone, some-org"),
        ("someone/little", "hf_wrong", "log in with `hf auth login`"),
        ("someone/little", "", "log in with `hf auth login`"),
    ],
)
def test_uploads_that_cannot_be_are_refused_before_the_work(
    hub: Hub,
    tmp_path: Path,
    source: Path,
    repo: str,
    token: str,
    message: str,
) -> None:
    done = run(hub, tmp_path, str(source), "--mlx-path", "out", "--upload-repo", repo, token=token)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("status", [401, 403, 409, 500])
def test_a_result_that_cannot_be_uploaded_stays(hub: Hub, tmp_path: Path, source: Path, status: int) -> None:
    hub.status, hub.only = status, "/commit/"
    done = run(hub, tmp_path, str(source), "--mlx-path", "out", "--upload-repo", "someone/x", "-q", token="hf_right")
    assert done.returncode == 1
    assert done.stdout == "out\n"
    assert "uploading to someone/x failed" in done.stderr
    assert "out is complete: hf upload someone/x out" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert os.listdir(tmp_path / "out")
