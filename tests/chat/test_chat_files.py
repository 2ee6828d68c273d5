"""Files that go into messages and come out of conversations."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
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
