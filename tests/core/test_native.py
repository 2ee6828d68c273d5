"""The C++ kernels' loader: when they are used, what is said when they cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

import m7mlx.cpu
from m7mlx.cpu import backend, native
from m7mlx.errors import InputError

PACKAGE = Path(native.__file__).parents[1]
TELL = "from m7mlx.cpu import native; print(native.usable(), native.instruction_set(), native.why_not(), sep='|')"


def python(code: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, in an environment with few variables."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "M7MLX_CACHE") if name in os.environ}
    settings = kept | {"M7MLX_BLAS": "off"} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=settings, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let each test begin with nothing found, on a machine that has been told nothing."""
    for name in ("M7MLX_NATIVE", "M7MLX_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path / "cache"))
    native._find.cache_clear()
    yield
    native._find.cache_clear()


@pytest.fixture
def built() -> None:
    if not backend.is_linux_cpu() or not find_spec("m7mlx.cpu._native"):
        pytest.skip("the kernels are not built here")


def put_in_place(monkeypatch: pytest.MonkeyPatch, built_for: str = "0.32.4", **functions: Any) -> None:
    """Pretend to be Linux with mlx-cpu 0.32.4, with an extension of these functions."""
    fake: dict[str, Callable[..., Any]] = {
        "instruction_sets": lambda: ["base", "avx2"],
        "use_instruction_set": lambda name: None,
        "set_threads": lambda n: None,
        "Weight": lambda codes: codes,
        "product": lambda x, weights: x @ weights[0].T,
    }
    monkeypatch.setattr(native, "is_linux_cpu", lambda: True)
    monkeypatch.setattr(native, "version", lambda _: "0.32.4")
    monkeypatch.setattr(native, "_read_record", lambda: (built_for, ""))
    module = SimpleNamespace(**fake | functions)
    monkeypatch.setitem(sys.modules, "m7mlx.cpu._native", module)
    monkeypatch.setattr(m7mlx.cpu, "_native", module, raising=False)


def take_away(monkeypatch: pytest.MonkeyPatch, record: Path) -> None:
    """Pretend to be Linux with mlx-cpu, without an extension; the build is to leave that record."""
    monkeypatch.setattr(native, "is_linux_cpu", lambda: True)
    monkeypatch.setattr(native, "_RECORD", record)
    monkeypatch.delattr(m7mlx.cpu, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "m7mlx.cpu._native", None)


@pytest.mark.usefixtures("built")
def test_what_was_built_is_used() -> None:
    said = python(TELL).stdout.strip().split("|")
    assert said[0] == "True" and said[1] in ("base", "avx2", "avx512") and said[2] == ""


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("chosen", ["base", "avx2", "avx512"])
def test_an_instruction_set_can_be_forced(chosen: str) -> None:
    done = python(TELL, M7MLX_ISA=chosen)
    sets = python("import mlx.core; from m7mlx.cpu import _native; print(_native.instruction_sets())").stdout
    if repr(chosen) in sets:
        assert done.stdout == f"True|{chosen}|\n"
    else:
        assert f"M7MLX_ISA: '{chosen}' is not to be had here" in done.stderr


def test_off_leaves_everything_to_mlx() -> None:
    if backend.is_linux_cpu():
        assert python(TELL, M7MLX_NATIVE="off").stdout == "False||M7MLX_NATIVE=off\n"
    assert native.note() == "" or native.why_not() != "M7MLX_NATIVE=off"


@pytest.mark.parametrize("system", ["macOS", "CUDA"])
def test_no_other_system_needs_them(system: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    take_away(monkeypatch, tmp_path / "none")
    monkeypatch.setattr(native, "is_linux_cpu", lambda: False)
    monkeypatch.setenv("M7MLX_ISA", "avx2")
    assert (native.usable(), native.why_not(), native.note()) == (False, "", "")


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (None, "nobody has built them"),
        ("[]", "nobody has built them"),
        ("{", "nobody has built them"),
        ('{"missing": "no compiler; apt install g++"}', "no compiler; apt install g++"),
        ('{"mlx": "0.32.3"}', 'built for MLX 0.32.3, and 0.32.4 is installed; pip install "mlx[cpu]==0.32.3"'),
        ('{"mlx": "0.32.4"}', "cannot be loaded"),
    ],
)
def test_what_the_build_left_is_told(
    record: str | None, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    take_away(monkeypatch, tmp_path / "record.json")
    monkeypatch.setattr(native, "version", lambda _: "0.32.4")
    if record is not None:
        (tmp_path / "record.json").write_text(record)
    assert not native.usable() and told in native.why_not()


def test_an_extension_for_another_mlx_is_not_even_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch, built_for="0.32.3", instruction_sets=lambda: pytest.fail("it was called"))
    assert not native.usable() and "built for MLX 0.32.3" in native.why_not()


def refuse(x: mx.array, weights: list[mx.array]) -> mx.array:
    raise TypeError("incompatible\nfunction arguments")


@pytest.mark.parametrize("product", [refuse, lambda x, weights: x + 1, lambda x, weights: x[1:]])
def test_an_extension_that_fails_its_test_is_not_used(
    product: Callable[..., mx.array], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_place(monkeypatch)
    assert native.usable()
    native._find.cache_clear()
    put_in_place(monkeypatch, product=product)
    assert not native.usable() and "install m7mlx again" in native.why_not()


def test_what_is_asked_for_and_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)
    monkeypatch.setenv("M7MLX_ISA", "avx1024")
    with pytest.raises(InputError, match="'avx1024' is not to be had here; there are base, avx2"):
        native.usable()
    monkeypatch.setenv("M7MLX_NATIVE", "on")
    with pytest.raises(InputError, match="'on' is neither off nor require"):
        native.usable()
    monkeypatch.setenv("M7MLX_NATIVE", "require")
    put_in_place(monkeypatch, built_for="0.32.3")
    with pytest.raises(InputError, match="NATIVE=require: they were built for MLX 0"):
        native.usable()


def test_the_best_set_is_the_default_and_another_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    put_in_place(monkeypatch, use_instruction_set=used.append)
    assert native.instruction_set() == "avx2"
    native._find.cache_clear()
    monkeypatch.setenv("M7MLX_ISA", "base")
    assert native.instruction_set() == "base"
    assert used == ["avx2", "base"]


def test_each_reason_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for built_for in ("0.32.3", "0.32.5"):
        put_in_place(monkeypatch, built_for)
        native._find.cache_clear()
        assert built_for in native.note() and native.note() == ""
    monkeypatch.setenv("M7MLX_CACHE", "/dev/null/nowhere")  # cannot be remembered: not said each time
    assert native.note() == ""


@pytest.mark.parametrize("what", ["broken", "empty", "missing"])
def test_a_command_goes_on_without_them_and_says_so_once(what: str, tmp_path: Path) -> None:
    if not backend.is_linux_cpu():
        pytest.skip("only Linux's CPU backend has kernels of ours")
    shutil.copytree(PACKAGE, tmp_path / "m7mlx", ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json"))
    if what != "missing":
        (tmp_path / "m7mlx" / "cpu" / "_build.json").write_text(json.dumps({"mlx": version("mlx")}))
        (tmp_path / "m7mlx" / "cpu" / "_native.so").write_bytes(b"" if what == "empty" else b"\x7fELF and no more")
    code = "import sys; from m7mlx_chat.cli import main; sys.exit(main(['--import', '/no/such/file']))"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    cache = str(tmp_path / "cache")
    first, second = (python(code, tmp_path, PYTHONPATH=path, M7MLX_CACHE=cache) for _ in range(2))
    note, error = first.stderr.splitlines()
    assert note.startswith("m7mlx-chat: note: packed weights are computed without m7mlx's kernels")
    assert ("nobody has built them" if what == "missing" else "cannot be loaded") in note
    assert error.startswith("m7mlx-chat: error:") and first.returncode == 2
    assert second.stderr.splitlines() == [error]


def test_the_version_tells_what_computes() -> None:
    code = "from m7mlx_chat.cli import main; main(['--version'])"
    first, device, *rest = python(code).stdout.splitlines()
    assert first.split()[0] == "m7mlx-chat" and len(first.split()) == 2
    assert device.startswith("MLX ") and device.split(", ")[1] in ("CPU", "Metal", "CUDA")
    if backend.is_linux_cpu():
        assert [line.split(":")[0] for line in rest] == ["kernels", "BLAS"]
        off = python(code, M7MLX_NATIVE="off").stdout.splitlines()
        assert off[2] == "kernels: MLX's own: M7MLX_NATIVE=off"
    bad = python(code, M7MLX_NATIVE="on")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1
