"""A fast BLAS in the place of MLX's own, on Linux's CPU backend.

The libraries are real ones where this machine has them.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from m7mlx.command import run
from m7mlx.cpu import backend, blas, native

PRODUCT = """
import sys
from m7mlx.cpu import blas
import mlx.core as mx
a = (mx.arange(33 * 257, dtype=mx.float32) % 17 - 8).reshape(33, 257)
print(blas.library, int((a @ a.T).sum().item()))
"""
EXPECTED = sum(
    sum((x % 17 - 8) * (y % 17 - 8) for x, y in zip(range(i, i + 257), range(j, j + 257), strict=True))
    for i in range(0, 33 * 257, 257)
    for j in range(0, 33 * 257, 257)
)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own.

    The dynamic linker tells on stderr where it found cblas_sgemm.
    """
    settings = {"PATH": os.environ["PATH"], "LD_DEBUG": "bindings"} | environment
    return subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False)


def bound(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The libraries in which MLX's cblas_sgemm was found."""
    lines = [
        line for line in done.stderr.splitlines() if "`cblas_sgemm'" in line and "libmlx" in line.split(" to ")[0]
    ]
    return [line.split(" to ")[1].split()[0] for line in lines]


@pytest.fixture
def wanted() -> None:
    if not backend.is_linux_cpu():
        pytest.skip("only Linux's CPU backend has a BLAS of its own")


@pytest.fixture
def openblas(wanted: None) -> str:
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        pytest.skip("there is no OpenBLAS on this machine")
    return "libopenblas.so.0"


def test_mlx_calls_the_fast_one_and_the_product_is_the_same(openblas: str) -> None:
    done = python(PRODUCT)
    assert done.stdout.split() == [openblas, str(EXPECTED)]
    assert [openblas in name for name in bound(done)] == [True]


@pytest.mark.usefixtures("wanted")
def test_off_leaves_the_one_that_mlx_brings() -> None:
    done = python(PRODUCT, M7MLX_BLAS="off")
    assert done.stdout.split() == [str(EXPECTED)]
    assert not any("openblas" in name for name in bound(done))


def test_too_late_is_said(openblas: str) -> None:
    done = python("import mlx.core\n" + PRODUCT)
    assert done.stdout.split() == [str(EXPECTED)]
    assert "UserWarning: mlx.core was imported before m7mlx" in done.stderr
    done = python("import mlx.core\n" + PRODUCT, LD_PRELOAD=openblas)  # the user's own way
    assert done.stdout.split() == [openblas, str(EXPECTED)]
    assert "UserWarning:" not in done.stderr


@pytest.mark.usefixtures("wanted")
@pytest.mark.parametrize("name", ["/no/such/lib.so", "libc.so.6", "libm.so.6", "a\nb"])
def test_a_library_that_does_not_do_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; from m7mlx_chat.cli import main; sys.exit(main(['--import', '/no/such/file']))"
    done = python(code, M7MLX_BLAS=name, LD_DEBUG="")
    first, second = done.stderr.splitlines()
    assert "m7mlx-chat: note: M7MLX_BLAS:" in first and "cannot be loaded" in first
    assert second.startswith("m7mlx-chat: error:") and done.returncode == 2


def test_how_to_get_one_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "library", "")
    monkeypatch.setattr(backend, "version", lambda _: "0.32.4")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("M7MLX_BLAS", raising=False)
    assert blas.note(advise=False) == ""
    assert "libopenblas0-pthread" in blas.note()
    assert blas.note() == ""
    monkeypatch.setenv("M7MLX_CACHE", "/dev/null/nowhere")  # cannot be remembered: not said each time
    assert blas.note(advise=True) == ""


@pytest.mark.parametrize("reason", ["macOS", "CUDA", "off", "there"])
def test_nothing_is_done_or_said_where_there_is_no_need(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a library was loaded")

    monkeypatch.setattr(blas, "library", "libopenblas.so.0" if reason == "there" else "")
    monkeypatch.setattr(sys, "platform", "darwin" if reason == "macOS" else "linux")
    monkeypatch.setattr(backend, "version", missing if reason == "CUDA" else lambda _: "0.32.4")
    monkeypatch.setenv("M7MLX_BLAS", "off" if reason == "off" else "")
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert blas.note(advise=True) == ""
    blas.interpose()


@pytest.mark.parametrize("usable", [True, False])
def test_a_command_advises_one_only_where_kernels_are_missing(
    usable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blas, "library", "")
    monkeypatch.setattr(backend, "version", lambda _: "0.32.4")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(native, "usable", lambda: usable)
    monkeypatch.setattr(native, "note", lambda: "")
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("M7MLX_BLAS", raising=False)
    assert run(lambda args: None, argparse.Namespace(debug=False), "tool") == 0
    assert capsys.readouterr().err.startswith("tool: note: without OpenBLAS") != usable
    monkeypatch.setenv("M7MLX_BLAS", "/no/such/lib.so")  # asked for: told in any case
    assert run(lambda args: None, argparse.Namespace(debug=False), "tool") == 0
    assert "M7MLX_BLAS: /no/such/lib.so cannot be loaded" in capsys.readouterr().err
