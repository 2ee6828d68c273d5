"""Files that go into messages and come out of conversations, and the clipboard's tools."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from m7mlx_chat.clipboard import code_blocks, copy_with_tool
from m7mlx_chat.files import MOST_BYTES, attached, free_name, write_new

from m7mlx.errors import DiskError, InputError


def test_a_file_in_a_message(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfx = 1\r\ny = '```'\r\n")
    assert attached(str(tmp_path / "a.py")) == "a.py:\n````\nx = 1\ny = '```'\n````"
    (tmp_path / "empty").write_text("")
    assert attached(str(tmp_path / "empty")) == "empty:\n```\n\n```"


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "nul").write_bytes(b"a\0b")
    (tmp_path / "big").write_bytes(b"a" * (MOST_BYTES + 1))
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("image.png", "not text"), ("nul", "NUL"), ("big", "more than 2 MB"), ("none", "No such file")):
        with pytest.raises(InputError, match=why):
            attached(str(tmp_path / name))
    with pytest.raises(InputError, match="cannot be read"):
        attached(str(tmp_path))
    with pytest.raises(InputError, match="no regular file"):
        attached("/dev/zero")


def test_names_for_new_files(tmp_path: Path) -> None:
    assert free_name(tmp_path, "What is *this*, então?", ".md").name == "What-is-this-então.md"
    assert free_name(tmp_path, "../../etc/passwd", ".md").name == "etc-passwd.md"
    assert free_name(tmp_path, "???", ".md").name == "conversation.md"
    (tmp_path / "a.md").touch()
    (tmp_path / "a-2.md").touch()
    assert free_name(tmp_path, "a", ".md").name == "a-3.md"
    with pytest.raises(InputError, match="exists"):
        write_new(tmp_path / "a.md", "x")
    with pytest.raises(DiskError, match="cannot be written"):
        write_new(tmp_path / "no" / "folder.md", "x")


def test_code_blocks() -> None:
    text = "a\n```py\none\n\ntwo\n```\nb\n~~~\n```\nthree\n~~~\n   ````\nfour\n```\n   ````\n```\nbroken off"
    assert code_blocks(text) == ["one\n\ntwo", "```\nthree", "four\n```", "broken off"]
    assert code_blocks("no `code` here") == []


def test_the_tools_that_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that works; one that fails or hangs is passed over."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("m7mlx_chat.clipboard._SECONDS", 0.5)
    (tmp_path / "pbcopy").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "wl-copy").write_text("#!/bin/sh\nexec sleep 5\n")
    (tmp_path / "xclip").write_text(f'#!/bin/sh\ncat > "{tmp_path}/copied"\n')
    for tool in ("pbcopy", "wl-copy", "xclip"):
        (tmp_path / tool).chmod(0o755)
    assert copy_with_tool("naïve \ud800 text")
    assert (tmp_path / "copied").read_text() == "naïve ? text"
    for tool in ("pbcopy", "wl-copy", "xclip"):
        (tmp_path / tool).unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not copy_with_tool("x")


def test_marks_without_an_end_take_no_time() -> None:
    began = time.monotonic()
    assert code_blocks("`" * 200_000) == []
    assert code_blocks("```\n" + "`" * 200_000 + "\n") == [""]
    assert code_blocks("~~~\n" + "~~~ x\n" * 30_000) == ["~~~ x\n" * 29_999 + "~~~ x"]
    assert time.monotonic() - began < 10  # minutes, where each is looked at from each place again
