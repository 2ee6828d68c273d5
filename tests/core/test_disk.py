"""Files that are written whole or not at all.

That holds under limits, on full disks, and on systems with a better fsync.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from m7mlx_chat.store import Store
from m7mlx_eval.journal import Journal

from m7mlx.errors import DiskError
from m7mlx.files import disk
from m7mlx.files.disk import sync, sync_path, write_whole

F_FULLFSYNC = 51  # macOS's number


def test_a_file_is_replaced_with_its_rights_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "one")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    path.chmod(0o640)
    write_whole(path, b"two")
    assert path.read_text() == "two" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["a.json"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_links_stay_links_and_pipes_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to("there/file")
    write_whole(link, "text")
    assert link.is_symlink() and (tmp_path / "there" / "file").read_text() == "text"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "through")
    reader.join(30)
    assert read == ["through"] and stat.S_ISFIFO(pipe.stat().st_mode)
    write_whole("/dev/null", "nothing")


def test_a_new_file_never_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "new", "one", new=True)
    for link in (os.link, _no_links):  # exFAT has no second names
        monkeypatch.setattr(os, "link", link)
        with pytest.raises(FileExistsError):
            write_whole(tmp_path / "new", "two", new=True)
        with pytest.raises(FileExistsError):
            disk._name(tmp_path / "work", tmp_path / "new")
    write_whole(tmp_path / "other", "three", new=True)
    assert (tmp_path / "new").read_text() == "one" and (tmp_path / "other").read_text() == "three"
    assert sorted(os.listdir(tmp_path)) == ["new", "other"]


def _no_links(source: Path, target: Path) -> None:
    if not source.exists():
        raise FileExistsError
    raise OSError(errno.ENOTSUP, "Operation not supported")


LIMITED = """
import sys
from m7mlx.files.disk import write_whole
from m7mlx.errors import DiskError
try:
    write_whole(sys.argv[1], "x" * 100_000)
except DiskError as error:
    print(error)
"""


def test_a_limit_of_the_file_size_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert done.stdout == f"{path} cannot be written: a file is too big; the file that was there is as it was\n"
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EIO, "Input/output error")],
)
@pytest.mark.parametrize("step", ["write", "sync", "rename"])
def test_a_disk_that_fails_at_any_step_leaves_the_old_file(
    step: str, number: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    if step == "rename":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(disk, "_write" if step == "write" else "sync", fail)
    with pytest.raises(DiskError, match=says):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["kept"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"no/file cannot be written: No such file"):
        write_whole(tmp_path / "no" / "file", "x")
    with pytest.raises(DiskError, match="Is a directory"):
        write_whole(tmp_path, "x")


def test_on_macos_the_drive_has_to_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", F_FULLFSYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda descriptor, command: asked.append(command))
    monkeypatch.setattr(os, "fsync", lambda descriptor: asked.append(-1))
    write_whole(tmp_path / "file", "text")
    assert asked == [F_FULLFSYNC, F_FULLFSYNC]  # the file, then its name in the folder


def test_where_the_file_system_does_not_know_it_fsync_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []

    def refuse(descriptor: int, command: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", F_FULLFSYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", synced.append)
    with (tmp_path / "file").open("w") as file:
        sync(file.fileno())
        assert synced == [file.fileno()]


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(disk, "sync", refuse)
    sync_path(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid"):
        sync_path(tmp_path / "file")


def test_nobody_syncs_another_way() -> None:
    root = Path(__file__).parents[2]
    found = [
        str(path.relative_to(root))
        for folder in ("m7mlx", "app", "convert")
        for path in (root / folder).rglob("*.py")
        if "fsync(" in path.read_text()
    ]
    assert found == ["m7mlx/files/disk.py"]


def test_the_store_of_conversations_syncs_fully(tmp_path: Path) -> None:
    with Store(tmp_path / "chats.db") as store:
        for pragma in ("fullfsync", "checkpoint_fullfsync"):
            assert store._db.execute(f"PRAGMA {pragma}").fetchone()[0] == 1
        assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2
    with sqlite3.connect(tmp_path / "chats.db") as db:  # it is the connection's, not the file's
        assert db.execute("PRAGMA fullfsync").fetchone()[0] == 0
    db.close()


def test_answers_that_no_longer_fit_are_one_line_and_the_others_kept(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(tmp_path, {"a": 1}) as journal:
        journal.add("one", 1)
        size = journal.path.stat().st_size
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
        try:
            with pytest.raises(DiskError, match="a file is too big; the answers so far are kept"):
                journal.add("two", "x" * 100)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
    with Journal(tmp_path, {"a": 1}) as journal:
        assert journal.answers["one"] == 1  # and nothing in it is damaged


def test_results_that_cannot_be_written_were_shown(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from m7mlx_eval.cli import main

    (tmp_path / "text").write_text("Some words to read. " * 5)
    (tmp_path / "out.json").write_text("{}")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, "_write", full)
    given = [str(model_folder), "--text", str(tmp_path / "text"), "--save", str(tmp_path / "out.json")]
    assert main(given) == 1
    out, err = capsys.readouterr()
    assert "perplexity" in out
    assert err.splitlines()[-1].endswith("the disk is full; the file that was there is as it was")
    assert json.loads((tmp_path / "out.json").read_text()) == {}
