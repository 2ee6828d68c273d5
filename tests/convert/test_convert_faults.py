"""Conversions that cannot work are refused first; those that break off leave the old result."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from m7mlx_convert.cli import main
from m7mlx_convert.output import _uninterrupted, whole_folder
from sources import assert_same, little, quantisable, read_weights, write_source

from m7mlx.files.checksums import sha256

DEAD = 999_999_999  # no such process: above every system's largest id


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_source(tmp_path / "source", quantisable())
    return tmp_path / "source"


def refusal(arguments: list[str | Path], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """Run the converter, which must fail with one line; returns that line."""
    assert main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"m7mlx-convert: error: [^\n]+\n", err)
    return err


def rewrite(folder: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    """Change the tensors of a folder with one file."""
    weights = read_weights(folder)
    mx.eval(*weights.values())
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


# --- the source -------------------------------------------------------------------------------

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop(Q_PROJ), f"tensor {Q_PROJ} is missing"),
        (lambda w: w.update({Q_PROJ: w[Q_PROJ].T[:-1]}), rf"{Q_PROJ} has shape \[127, 128\], config.json says \[128"),
        (lambda w: w.update({Q_PROJ: w[Q_PROJ].astype(mx.int8)}), f"{Q_PROJ} has type I8, which is not supported"),
        (lambda w: w.update({Q_PROJ: w[Q_PROJ].view(mx.uint32)}), f"{Q_PROJ} has type U32, which is not supported"),
        (
            lambda w: w.update({"model.layers.1.self_attn.q_proj.bias": mx.zeros((4,))}),
            "q_proj.bias is not a part of",
        ),
        (lambda w: w.update({"lora_A": mx.zeros((4,))}), "lora_A is not a part of mistral"),
    ],
)
def test_tensors_that_do_not_fit_the_config(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, mx.array]], object],
    says: str,
) -> None:
    rewrite(source, change)
    assert re.search(says, refusal([source, "--mlx-path", tmp_path / "out"], capsys))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_tensors_that_are_not_finite(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    value: float,
    dtype: mx.Dtype,
) -> None:
    """Found in the last place of a tensor in the middle.

    The tensors before it were written by then.
    """
    source = tmp_path / "source"
    write_source(source, quantisable(), dtype)

    def spoil(weights: dict[str, mx.array]) -> None:
        weights[Q_PROJ][-1, -1] = value

    rewrite(source, spoil)
    for options in ([], ["--quantize"]):
        line = refusal([source, "--mlx-path", tmp_path / "out", *options], capsys)
        assert f"{Q_PROJ} holds NaN or infinite numbers" in line
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_numbers_too_large_for_the_type_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path / "source", little(), mx.float32)
    rewrite(tmp_path / "source", lambda weights: weights.update({"model.norm.weight": mx.full((48,), 1e5)}))
    line = refusal([tmp_path / "source", "--mlx-path", tmp_path / "out", "--dtype", "float16"], capsys)
    assert "model.norm.weight holds numbers too large for mlx.core.float16" in line


def test_groups_that_do_not_divide_are_named_with_those_that_do(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_source(tmp_path / "a", quantisable(hidden_size=96))
    line = refusal([tmp_path / "a", "--mlx-path", tmp_path / "out", "--quantize"], capsys)
    assert "embed_tokens.weight has 96 columns, which groups of 64 do not divide; use --q-group-size 32" in line
    write_source(tmp_path / "b", little())
    line = refusal([tmp_path / "b", "--mlx-path", tmp_path / "out", "--quantize"], capsys)
    assert "has 48 columns" in line
    assert "no group size fits this model" in line
    assert not (tmp_path / "out").exists()


def test_a_config_with_a_billion_layers(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((source / "config.json").read_text())
    for layers, says in {
        10**9: "num_hidden_layers must be a whole number",
        9999: "config.json says 9999 layers",
    }.items():
        (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        assert says in refusal([source, "--mlx-path", tmp_path / "out"], capsys)


def write(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")


# --- the target -------------------------------------------------------------------------------


def test_targets_that_must_not_be_written(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    for target, says in {
        "file": "is a file; give a folder",
        "full": "exists; give another --mlx-path, or --force",
        "nowhere/out": "does not exist; create it",
        "file/out": "does not exist; create it",
        "source/out": "overlap",
        "link/out": "overlap",
    }.items():
        assert says in refusal([source, "--mlx-path", tmp_path / target], capsys)
    for target in ("source", "link", "../" + tmp_path.name + "/source"):
        assert "overlap" in refusal([source, "--mlx-path", tmp_path / target, "--force"], capsys)
    assert "is a file" in refusal([source, "--mlx-path", tmp_path / "file", "--force"], capsys)
    # A folder that is no model is not replaced, whatever the user insists on: it may be a home
    # folder.
    theirs = ["config.json", "model.safetensors", "tokenizer.json"]  # fetched by hand, say
    folders = {"home": ["config.json", "photos/"], "documents": ["letter.txt"], "model": theirs}
    for name, entries in folders.items():
        for entry in entries:
            (tmp_path / name / entry).mkdir(parents=True) if entry.endswith("/") else write(tmp_path / name / entry)
        line = refusal([source, "--mlx-path", tmp_path / name, "--force"], capsys)
        assert "is not a model folder that m7mlx-convert wrote and is not replaced" in line
        assert len(list((tmp_path / name).iterdir())) == len(entries)
    assert (source / "model.safetensors").is_file()


def test_force_replaces_only_by_something_whole(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main([str(source), "--mlx-path", str(out)]) == 0
    first = read_weights(out)
    mx.eval(*first.values())
    (tmp_path / "link").symlink_to(out)
    assert main([str(source), "--mlx-path", str(tmp_path / "link"), "--quantize", "--force"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert "lm_head.scales" in read_weights(out)
    assert main([str(source), "--mlx-path", str(out), "--force"]) == 0
    assert_same(read_weights(out), first)
    rewrite(source, lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"] * float("nan")}))
    capsys.readouterr()
    assert "lm_head.weight holds NaN" in refusal([source, "--mlx-path", out, "--force"], capsys)
    assert_same(read_weights(out), first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out", "source"]


def test_force_deletes_nothing_that_the_converter_did_not_write(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main([str(source), "--mlx-path", str(out)]) == 0
    capsys.readouterr()
    (out / ".DS_Store").write_bytes(b"\0")
    for name in ("notes.txt", "adapter_model.safetensors", "model-best.safetensors", "photos/", "chat.log"):
        (out / name).mkdir() if name.endswith("/") else (out / name).write_text("mine")
        line = refusal([source, "--mlx-path", out, "--force"], capsys)
        assert f"holds {name.strip('/')}, which m7mlx-convert did not write" in line
        (out / name).rmdir() if name.endswith("/") else (out / name).unlink()
    (out / "LICENSE").symlink_to(tmp_path / "elsewhere")
    assert "holds LICENSE" in refusal([source, "--mlx-path", out, "--force"], capsys)
    (out / "LICENSE").unlink()
    assert main([str(source), "--mlx-path", str(out), "--force"]) == 0


def test_what_is_put_there_while_it_runs_moves_on(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(source), "--mlx-path", str(out)]) == 0
    with whole_folder(out) as work:
        (work / "config.json").write_text("new")
        (out / "notes.txt").write_text("mine")
        (out / "photos").mkdir()
        (out / "photos" / "one.jpg").write_text("mine")
    assert {path.name: path.read_text() for path in out.iterdir() if path.is_file()} == {
        "config.json": "new",
        "notes.txt": "mine",
    }
    assert (out / "photos" / "one.jpg").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EPERM])
def test_a_target_that_cannot_be_replaced_is_found_before_the_work(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """An empty place where a disk is mounted, as a container's volume is."""
    out = tmp_path / "volume"
    out.mkdir()
    rename = Path.rename

    def as_a_mount(self: Path, to: Path) -> Path:
        if self == out:
            raise OSError(number, os.strerror(number), str(self))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", as_a_mount)
    monkeypatch.setattr("m7mlx_convert.convert.open_model", lambda *arguments: pytest.fail("the work has begun"))
    line = refusal([source, "--mlx-path", out], capsys)
    says = "a disk is mounted there" if number == errno.EBUSY else "Operation not permitted"
    assert f"cannot be replaced ({says}); give a folder in it: {out}/model" in line
    assert {path.name for path in tmp_path.iterdir()} == {"source", "volume"}


# --- breaking off -----------------------------------------------------------------------------


def test_other_hidden_files_are_left_alone(source: Path, tmp_path: Path) -> None:
    """Names that look alike, and a target whose name is a pattern."""
    names = {".o[u]t.partial-x", f".o[u]t2.partial-{DEAD}", f".out.partial-{DEAD}", ".o[u]t.txt"}
    for name in names | {f".o[u]t.partial-{DEAD}"}:
        (tmp_path / name).mkdir()
    assert main([str(source), "--mlx-path", str(tmp_path / "o[u]t")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == names | {"source", "o[u]t"}


def test_replacing_and_cleaning_are_not_interrupted() -> None:
    done = False
    with pytest.raises(KeyboardInterrupt):
        interrupted(lambda: None)
    try:
        with _uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done = True
    except KeyboardInterrupt:
        assert done
    else:
        pytest.fail("the signal was lost")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupted(body: Callable[[], None]) -> None:
    body()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)


def test_interrupted_in_the_last_moment_it_is_still_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the finished folder takes the old one's place: both renames happen."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("old")
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: interrupted(lambda: rename(self, to)))
    with pytest.raises(KeyboardInterrupt), whole_folder(out) as work:
        (work / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["new"]


# --- links ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.model", "config.json", "README.md", "model.safetensors"])
@pytest.mark.parametrize("way", ["straight", "over another", "by a folder"])
def test_a_link_out_of_the_source_is_refused(
    source: Path,
    tmp_path: Path,
    name: str,
    way: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret = tmp_path / "private" / name
    secret.parent.mkdir()
    if (source / name).exists():
        (source / name).rename(secret)
    else:
        secret.write_text("SECRET")
    link = source / name
    if way == "straight":
        link.symlink_to(secret)
    elif way == "over another":
        (source / "other").symlink_to(secret)
        link.symlink_to("other")
    else:
        (source / "away").symlink_to(secret.parent, target_is_directory=True)
        link.symlink_to(f"away/{name}")
    assert f"{link} is a link to {secret}, outside of the folder" in refusal(
        [source, "--mlx-path", tmp_path / "out"], capsys
    )
    assert not (tmp_path / "out").exists()


def test_links_within_a_source_and_those_of_the_hubs_cache_are_followed(source: Path, tmp_path: Path) -> None:
    """A snapshot of the Hub's cache holds nothing but links into the blobs beside it."""
    (source / "COPYING").write_text("Do what you like")
    (source / "LICENSE").symlink_to("COPYING")
    assert main([str(source), "--mlx-path", str(tmp_path / "plain"), "-q"]) == 0
    assert (tmp_path / "plain" / "LICENSE").read_text() == "Do what you like"
    assert not (tmp_path / "plain" / "LICENSE").is_symlink()

    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "hub" / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(path for path in source.iterdir() if not path.is_symlink()):
        file.rename(blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    # The whole folder may be one.
    (tmp_path / "by-a-link").symlink_to(snapshot, target_is_directory=True)
    for place in (snapshot, tmp_path / "by-a-link"):
        out = tmp_path / f"from-{place.name}"
        assert main([str(place), "--mlx-path", str(out), "-q"]) == 0
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()


def test_blobs_of_another_repository_are_not_this_ones(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "hub" / "models--a--private" / "blobs" / "1"
    other.parent.mkdir(parents=True)
    other.write_text("SECRET")
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    (snapshot / "LICENSE").symlink_to("../../../models--a--private/blobs/1")
    assert "outside of the folder" in refusal([snapshot, "--mlx-path", tmp_path / "out"], capsys)


# --- what was written is read again -----------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "README.md", "SHA256SUMS", "model.safetensors.index.json"]
)
def test_a_file_that_the_disk_holds_otherwise_is_noticed(
    source: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not the weights alone: every byte of the result is read again before it gets its name."""
    from m7mlx_convert import writer

    damaged: list[Path] = []

    def reading(path: Path) -> str:
        if path.name == name and ".partial-" in str(path):
            damaged.append(path)
            path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        return sha256(path)

    monkeypatch.setattr(writer, "sha256", reading)
    # Several files, so an index.
    monkeypatch.setattr(writer.WeightsWriter.__init__, "__defaults__", (None, 60_000))
    arguments: list[str | Path] = [source, "--mlx-path", tmp_path / "out"]
    assert f"{name} is not on the disk as it was written" in refusal(arguments, capsys)
    assert damaged and not (tmp_path / "out").exists()


# --- the disk ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(
    source: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments: list[str | Path] = [source, "--mlx-path", small_disk / "out"]
    assert "has 0.0 GB free, but the result takes" in refusal(arguments, capsys, status=1)
    # Filled by others meanwhile.
    monkeypatch.setattr("m7mlx_convert.convert.check_space", lambda *_: None)
    assert "the disk is full" in refusal(arguments, capsys, status=1)
    assert not list(small_disk.iterdir())


def test_folder_that_may_not_be_written(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def deny(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", deny)
    assert "Permission denied" in refusal([source, "--mlx-path", tmp_path / "out"], capsys, status=1)
