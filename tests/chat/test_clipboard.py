"""The blocks of code in an answer, and the clipboard's tools."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from m7mlx_chat.clipboard import code_blocks, copy_with_tool


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
