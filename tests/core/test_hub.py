"""Names → folders, against a Hub of the tests' own.

Each case runs in a process of its own, as a user would meet it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hub_server import Hub, environment, serve
from models import small_config, write_folder
from processes import running

from m7mlx.errors import DiskError, NotFoundError
from m7mlx.files import hub as m7hub

REPO = "someone/small-mistral"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_folder(tmp_path / "served", small_config(vocab_size=32000, n_layers=1))
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with serve(folder, REPO) as server:
        yield server


CODE = """
import sys
from m7mlx.errors import M7Error
from m7mlx.files.hub import resolve
try:
    found = resolve(sys.argv[1], sys.argv[2] or None, sys.argv[3])
except M7Error as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(*sorted(p.name for p in found.iterdir()) if found.is_dir() else [found.name])
"""


def start(hub: Hub, tmp_path: Path, name: str) -> AbstractContextManager[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CODE, name, "", "huggingface"]
    pipe = subprocess.PIPE
    return running(command, env=environment(hub, tmp_path), stdout=pipe, stderr=pipe, text=True)


def resolve(
    hub: Hub, tmp_path: Path, name: str, revision: str | None = None, layout: str = "huggingface"
) -> subprocess.CompletedProcess[str]:
    """`m7mlx.files.hub.resolve` in a fresh process; prints the folder's files."""
    command = [sys.executable, "-c", CODE, name, revision or "", layout]
    return subprocess.run(
        command, env=environment(hub, tmp_path), capture_output=True, text=True, timeout=120, check=False
    )


def test_download_takes_what_a_model_needs_and_works_offline_afterwards(hub: Hub, tmp_path: Path) -> None:
    expected = "config.json model.safetensors tokenizer.model"
    done = resolve(hub, tmp_path, REPO)
    assert done.stdout.strip() == expected, done.stderr
    assert not any("evil" in path or ".bin" in path for _, path, _ in hub.requests if "/resolve/" in path)
    hub.status = 503
    assert resolve(hub, tmp_path, REPO).stdout.strip() == expected


def test_an_adapter_is_fetched_as_one_and_not_as_a_model(hub: Hub, tmp_path: Path) -> None:
    served = tmp_path / "served"
    (served / "model.safetensors").rename(served / "adapter_model.safetensors")
    (served / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for layout in ("huggingface", "any"):
        done = resolve(hub, tmp_path, REPO, layout=layout)
        assert f"m7mlx-convert MODEL --adapter {REPO}" in done.stderr
    assert not any("adapter_model" in path for _, path, _ in hub.requests if "/resolve/" in path)
    done = resolve(hub, tmp_path, REPO, layout="adapter")
    assert "adapter_model.safetensors" in done.stdout, done.stderr
    (served / "adapter_model.safetensors").unlink()
    assert "holds no adapter" in resolve(hub, tmp_path, REPO, layout="adapter").stderr


def test_progress_is_told_and_what_is_here_is_known_without_asking(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import sys; from m7mlx.files.hub import find_local, resolve; name = sys.argv[1]; seen = []\n"
        "print(find_local(name)); folder = resolve(name, progress=lambda *counts: seen.append(counts))\n"
        "assert seen == sorted(seen) and len({t for _, t in seen}) == 1, seen\n"
        "print(*seen[-1], (folder / 'model.safetensors').stat().st_size); print(find_local(name) == folder)\n"
    )
    command = [sys.executable, "-c", code, REPO]
    done = subprocess.run(
        command, env=environment(hub, tmp_path), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    before, counts, after = done.stdout.splitlines()
    assert before == "None" and after == "True", done.stderr
    here, total, _ = map(int, counts.split())
    assert here == total > 10_000_000
    hub.requests.clear()
    command[2] = "import sys; from m7mlx.files.hub import find_local; print(find_local(sys.argv[1]) is not None)"
    done = subprocess.run(command, env=environment(hub, tmp_path), capture_output=True, text=True, check=False)
    assert done.stdout == "True\n" and hub.requests == []


def test_a_connection_cut_in_the_middle_is_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after, hub.cuts = 11_000_000, 2
    done = resolve(hub, tmp_path, REPO)
    if done.returncode:  # given up for now: what came is kept, and the next run goes on from there
        assert done.stderr.strip().splitlines()[-1].startswith("DownloadError")
        done = resolve(hub, tmp_path, REPO)
    assert "model.safetensors" in done.stdout, done.stderr
    assert any(r.startswith("bytes=") and not r.startswith("bytes=0-") for _, _, r in hub.requests)


def fetched(hub: Hub) -> list[tuple[str, str]]:
    """Names and ranges of the files that were asked for with their bodies."""
    return [
        (path.rpartition("/")[2], r) for method, path, r in hub.requests if method == "GET" and "/resolve/" in path
    ]


def test_a_killed_download_is_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    """kill -9 in the middle: the next process asks for the rest only, and nothing is left over."""
    hub.slow = 0.005
    with start(hub, tmp_path, REPO) as process:
        parts: list[Path] = []
        deadline = time.monotonic() + 60
        while not parts or parts[0].stat().st_size < 1_000_000:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
            parts = list((tmp_path / "hf").rglob("*.m7mlx-part"))
    size = parts[0].stat().st_size
    hub.slow = 0
    hub.requests.clear()
    assert "model.safetensors" in resolve(hub, tmp_path, REPO).stdout
    assert ("model.safetensors", f"bytes={size}-") in fetched(hub)
    assert ("model.safetensors", "") not in fetched(hub)
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.suffix in (".m7mlx-part", ".incomplete")]


def test_what_other_killed_downloads_left_is_removed_and_live_ones_are_not(hub: Hub, tmp_path: Path) -> None:
    """Files of huggingface_hub's own downloads, which it never takes up."""
    from filelock import FileLock

    blobs = tmp_path / "hf" / "hub" / f"models--{REPO.replace('/', '--')}" / "blobs"
    locks = tmp_path / "hf" / "hub" / ".locks" / f"models--{REPO.replace('/', '--')}"
    blobs.mkdir(parents=True)
    locks.mkdir(parents=True)
    for name in ("aaaa.12345678.incomplete", "bbbb.12345678.incomplete"):
        (blobs / name).write_bytes(b"x")
    with FileLock(locks / "bbbb.lock"):
        assert resolve(hub, tmp_path, REPO).returncode == 0
    assert [path.name for path in blobs.glob("*.incomplete")] == ["bbbb.12345678.incomplete"]


def test_two_processes_fetch_once(hub: Hub, tmp_path: Path) -> None:
    hub.slow = 0.002
    with start(hub, tmp_path, REPO) as one, start(hub, tmp_path, REPO) as other:
        for process in (one, other):
            out, error = process.communicate(timeout=120)
            assert "model.safetensors" in out, error
    assert [name for name, _ in fetched(hub)].count("model.safetensors") == 1


def test_a_part_with_wrong_bytes_is_thrown_away(hub: Hub, tmp_path: Path) -> None:
    assert resolve(hub, tmp_path, REPO).returncode == 0
    (blob,) = (p for p in (tmp_path / "hf").rglob("blobs/*") if p.stat().st_size > 1_000_000)
    blob.with_name(blob.name + ".m7mlx-part").write_bytes(b"x" * 1_000_000)
    blob.unlink()
    assert "wrong SHA-256" in resolve(hub, tmp_path, REPO).stderr
    assert resolve(hub, tmp_path, REPO).returncode == 0


# --- which files ----------------------------------------------------------------------------------


def rename(hub: Hub, *names: str) -> None:
    """Serve the weights under other names."""
    data = (hub.folder / "model.safetensors").read_bytes()
    (hub.folder / "model.safetensors").unlink()
    (hub.folder / "pytorch_model.bin").unlink()
    for name in names:
        (hub.folder / name).parent.mkdir(exist_ok=True)
        (hub.folder / name).write_bytes(data)


def test_of_both_layouts_one_is_fetched(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "consolidated.safetensors").write_bytes(b"x" * 100)
    (hub.folder / "onnx").mkdir()
    (hub.folder / "onnx" / "model.safetensors").write_bytes(b"x" * 100)
    (hub.folder / "SHA256SUMS").write_text("")
    done = resolve(hub, tmp_path, REPO, layout="any")
    assert done.stdout.split() == ["SHA256SUMS", "config.json", "model.safetensors", "tokenizer.model"]
    hub.status = 503
    assert resolve(hub, tmp_path, REPO, layout="any").stdout == done.stdout


def test_mistrals_own_layout_is_for_the_converter(hub: Hub, tmp_path: Path) -> None:
    rename(hub, "consolidated.safetensors")
    done = resolve(hub, tmp_path, REPO)
    assert f"in Mistral's own layout only; convert it: m7mlx-convert {REPO}" in done.stderr
    assert not fetched(hub)
    assert "consolidated.safetensors" in resolve(hub, tmp_path, REPO, layout="any").stdout
    hub.status = 503
    assert "consolidated.safetensors" in resolve(hub, tmp_path, REPO, layout="any").stdout


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model.bin"], "has only pickle weights, which can run code"),
        (["consolidated.00.pth"], "has only pickle weights, which can run code"),
        (["a.Q4_0.gguf", "b.gguf"], f"name one: {REPO}/a.Q4_0.gguf or {REPO}/b.gguf"),
        (["notes.txt"], "has no weights"),
    ],
)
def test_repositories_without_weights_to_use_are_refused_first(
    hub: Hub, tmp_path: Path, names: list[str], message: str
) -> None:
    rename(hub, *names)
    done = resolve(hub, tmp_path, REPO)
    assert message in done.stderr
    assert not fetched(hub)


def test_a_gguf_file_in_a_repository(hub: Hub, tmp_path: Path) -> None:
    rename(hub, "sub/b.Q8_0.gguf", "a.gguf")
    done = resolve(hub, tmp_path, f"{REPO}/sub/b.Q8_0.gguf", layout="any")
    assert done.stdout.strip() == "b.Q8_0.gguf", done.stderr
    assert {name for name, _ in fetched(hub)} == {"b.Q8_0.gguf"}
    assert "has no file c.gguf; it has a.gguf, sub/b.Q8_0.gguf" in resolve(hub, tmp_path, f"{REPO}/c.gguf").stderr
    assert "is a file, but not GGUF" in resolve(hub, tmp_path, f"{REPO}/sub/b.Q8_0.gguf").stderr  # it was asked for
    hub.status = 503
    assert resolve(hub, tmp_path, f"{REPO}/sub/b.Q8_0.gguf", layout="any").returncode == 0


def test_the_disk_that_is_too_small_is_noticed_first(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from m7mlx.files import download, huggingface

    monkeypatch.setattr(huggingface, "find_storage", lambda repo: tmp_path / "hub" / "models--x")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("m7mlx.files.download.shutil.disk_usage", lambda _: usage)
    with pytest.raises(DiskError, match=r"model.safetensors takes 0\.\d GB more, the disk has 0\.0 GB free"):
        download.fetch_blob(REPO, "model.safetensors", None, download.RemoteFile(10**8, "0" * 64))


FULL = """
import errno, os
from m7mlx.files import download
write = download._Counted.write
def full(self, data):
    if self.tell() > 5_000_000:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(self, data)
download._Counted.write = full
"""


def test_a_disk_that_is_full_in_the_middle_keeps_what_came(hub: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL + CODE, REPO, "", "huggingface"]
    done = subprocess.run(
        command, env=environment(hub, tmp_path), capture_output=True, text=True, timeout=120, check=False
    )
    said = done.stderr.strip().splitlines()[-1]
    assert said == "DiskError: the disk is full; make room, then run the command again to resume"
    hub.requests.clear()
    assert "model.safetensors" in resolve(hub, tmp_path, REPO).stdout
    (span,) = [span for name, span in fetched(hub) if name == "model.safetensors"]
    assert int(span.removeprefix("bytes=").rstrip("-")) > 5_000_000


# --- wrong bytes ----------------------------------------------------------------------------------


def test_wrong_bytes_of_the_right_size_are_not_accepted(hub: Hub, tmp_path: Path) -> None:
    hub.wrong_bytes = "model.safetensors"
    done = resolve(hub, tmp_path, REPO)
    assert "DownloadError: model.safetensors is not what the Hub promised" in done.stderr
    hub.wrong_bytes = ""
    assert "model.safetensors" in resolve(hub, tmp_path, REPO).stdout


def test_a_blob_tampered_with_later_is_noticed(hub: Hub, tmp_path: Path) -> None:
    assert resolve(hub, tmp_path, REPO).returncode == 0
    (blob,) = (p for p in (tmp_path / "hf").rglob("blobs/*") if p.stat().st_size > 1_000_000)
    blob.write_bytes(b"x" * blob.stat().st_size)
    assert "wrong SHA-256" in resolve(hub, tmp_path, REPO).stderr


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "GatedRepo", "NotFoundError: someone/small-mistral is gated: accept its licence"),
        (403, "GatedRepo", "NotFoundError: someone/small-mistral is gated"),
        (404, "RepoNotFound", "NotFoundError: the Hub has no repository someone/small-mistral"),
        (401, "", "NotFoundError: the Hub does not let you read someone/small-mistral"),
        (503, "", "HubOutage: the Hub does not answer (503), and someone/small-mistral has not been downloaded"),
        (429, "", "HubOutage: the Hub asks to wait"),
    ],
)
def test_refusals_of_the_hub_are_one_clear_line(
    hub: Hub, tmp_path: Path, status: int, code: str, message: str
) -> None:
    hub.status, hub.code = status, code
    done = resolve(hub, tmp_path, REPO)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(message), done.stderr
    assert "Traceback" not in done.stderr


def test_no_network(hub: Hub, tmp_path: Path) -> None:
    hub.url = "http://127.0.0.1:9"
    done = resolve(hub, tmp_path, REPO)
    assert "HubOutage: cannot reach the Hub for someone/small-mistral" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_revision(hub: Hub, tmp_path: Path) -> None:
    assert (
        "NotFoundError: someone/small-mistral has no revision missing"
        in resolve(hub, tmp_path, REPO, "missing").stderr
    )


def test_paths_come_before_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert m7hub.resolve("org/name") == Path("org/name")


def test_unknown_names_list_the_aliases() -> None:
    with pytest.raises(NotFoundError, match="demo, mistral"):
        m7hub.resolve("mistrall")
