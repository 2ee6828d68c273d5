"""Builds the C++ kernels of Linux's CPU backend while the package is installed.

hatchling calls `KernelsHook` when it makes a wheel, `pip install -e` included. Where the kernels
cannot be built the package is installed without them. _build.json, in their place or beside them,
says for which MLX they were built, or why they were not: that is what m7mlx.cpu.native reads. On
other systems nothing is built.

    python hatch_build.py    builds in place, in an environment with the extra `test`: for those who
                             change the kernels. Compiles only what has changed.

CXX, CXXFLAGS, LDFLAGS   the compiler, and options to add ("-g -fsanitize=address")
M7MLX_NATIVE             "off" builds nothing; with "require" an installation without them fails
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("m7mlx", "cpu")
EXTENSION = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
RECORD = "_build.json"  # {"mlx": the version it was built for} or {"missing": why it was not built}
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-pthread"]
FLAGS += ["-ffunction-sections", "-fdata-sections", "-DNDEBUG", "-DNB_DOMAIN=mlx"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
NANOBIND = {20: ">=2.13,<2.15", 21: "==2.15.*", 22: ">=3.0.1,<3.2"}  # by the version of its internals
TOOLS = "on Debian and Ubuntu: apt install g++ python3-dev; on Fedora: dnf install gcc-c++ python3-devel"
AGAIN = "then install m7mlx again"
GCC = 12  # the least: the kernels use its vectors' shuffles, which Clang lacks


class NotBuiltError(Exception):
    """There will be no extension; the message, one line, says why and, if anything helps, what."""


class KernelsHook(BuildHookInterface[BuilderConfig]):
    """Adds the extension to the wheel, if there is one, and what m7mlx reads of it."""

    def dependencies(self) -> list[str]:
        """Return the nanobind that MLX was built with: only then do arrays pass between both."""
        if self.target_name != "wheel" or sys.platform != "linux" or _setting() == "off":
            return []
        try:
            return [f"nanobind{NANOBIND.get(_nanobind_of_mlx(_find_mlx()), '')}"]
        except NotBuiltError:
            return []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the extension, in place for an editable installation."""
        if self.target_name != "wheel" or sys.platform != "linux":
            return
        editable = version == "editable"
        folder = ROOT / PACKAGE if editable else Path(tempfile.mkdtemp(prefix="m7mlx-"))
        try:
            build(folder)
            build_data["pure_python"], build_data["infer_tag"] = False, True
        except NotBuiltError as error:
            if _setting() == "require":
                _remove(folder)
                sys.exit(f"M7MLX_NATIVE=require: {error}")
            self.app.display_warning(f"installed without kernels in C++: {error}")
        if not editable:
            made = {str(path): str(PACKAGE / path.name) for path in folder.iterdir()}
            build_data["force_include"] |= made

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what is in the wheel now."""
        for path in build_data["force_include"]:
            if Path(path).name == RECORD:
                _remove(Path(path).parent)


def _remove(folder: Path) -> None:
    if folder != ROOT / PACKAGE:
        shutil.rmtree(folder, ignore_errors=True)


def build(folder: Path) -> Path:
    """Compile what has changed, link into a folder, and return the extension.

    The folder's record says what came of it. Raises NotBuiltError.
    """
    extension, record = folder / EXTENSION, folder / RECORD
    try:
        _build(extension)
        record.write_text(json.dumps({"mlx": importlib.metadata.version("mlx")}), encoding="utf-8")
    except (NotBuiltError, OSError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        with contextlib.suppress(OSError):  # a tree that may not be written to has no record
            extension.unlink(missing_ok=True)
            record.write_text(json.dumps({"missing": reason}), encoding="utf-8")
        raise NotBuiltError(reason) from error
    return extension


def _build(extension: Path) -> None:
    if _setting() == "off":
        raise NotBuiltError("M7MLX_NATIVE=off was set")
    mlx, compiler = _find_mlx(), _find_compiler()
    nanobind = _find_nanobind(mlx)
    with _objects_folder() as objects:
        _link(_compile(_units(mlx, nanobind), compiler, objects), compiler, mlx, extension)


@contextlib.contextmanager
def _objects_folder() -> Iterator[Path]:
    """Give the folder where objects are kept; a passing one where the tree is not ours to write."""
    kept = ROOT / "build" / "native" / "objects"
    with contextlib.suppress(OSError):
        kept.mkdir(parents=True, exist_ok=True)
    if os.access(kept, os.W_OK | os.X_OK):
        yield kept
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


class _Compiler(NamedTuple):
    command: list[str]
    version: str
    flags: list[str]  # CXXFLAGS


class _Unit(NamedTuple):
    """One compilation: a source, once per instruction set."""

    source: Path
    flags: list[str]
    includes: list[str]  # folders; their paths differ from one installation to the next
    key: str  # of all that is included


def _units(mlx: Path, nanobind: Path) -> list[_Unit]:
    """Return what to compile.

    The order matters: of an inline function that several objects bring, the linker takes the first
    one. No processor must meet an instruction that it lacks, so the plain objects come first.
    """
    folder = ROOT / PACKAGE / "kernels"
    sets: dict[str, list[str]] = {"base": []}
    if platform.machine() == "x86_64":
        sets |= {"avx2": AVX2, "avx512": AVX512}
    flags = [*FLAGS, "-Wall", "-Wextra", *(f"-DM7_HAS_{name.upper()}" for name in sets if name != "base")]
    headers = [mlx / "include", nanobind / "include", Path(sysconfig.get_paths()["include"])]
    includes = [f"-isystem{each}" for each in headers]
    versions = f"{EXTENSION} {importlib.metadata.version('mlx')} {importlib.metadata.version('nanobind')}"
    key = _digest([versions.encode(), *(each.read_bytes() for each in sorted(folder.glob("*.h")))])
    library = _Unit(
        nanobind / "src" / "nb_combined.cpp",
        [*FLAGS, "-fno-strict-aliasing", "-w"],
        [*includes, f"-isystem{nanobind / 'ext' / 'robin_map' / 'include'}"],
        versions,
    )
    once = [_Unit(each, flags, includes, key) for each in sorted(folder.glob("*.cpp")) if each.name != "kernels.cpp"]
    per_set = [
        _Unit(folder / "kernels.cpp", [*flags, f"-DM7_ISA={name}", *options], includes, key)
        for name, options in sets.items()
    ]
    return [library, *once, *per_set]


def _compile(units: list[_Unit], compiler: _Compiler, folder: Path) -> list[Path]:
    """Compile the units whose object is not there yet, in parallel, and remove other objects."""

    def run(unit: _Unit) -> Path:
        flags = [*unit.flags, *compiler.flags]
        key = _digest([unit.source.read_bytes(), unit.key.encode(), compiler.version.encode(), repr(flags).encode()])
        made = folder / f"{unit.source.stem}-{key}.o"
        if not made.exists():
            print(f"compiling {unit.source.name} {' '.join(f for f in flags if 'M7_ISA' in f)}", flush=True)
            part = made.with_suffix(f".{os.getpid()}")
            _run(compiler, [*flags, *unit.includes, "-c", str(unit.source), "-o", str(part)])
            part.replace(made)
        return made

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(run, units))
    for old in set(folder.glob("*.o")) - set(objects):
        old.unlink(missing_ok=True)
    return objects


def _link(objects: list[Path], compiler: _Compiler, mlx: Path, extension: Path) -> None:
    """Link the extension.

    It gets no path to MLX's library: mlx.core, imported before it, has loaded a library of that
    name already, be it from mlx-cpu or mlx-cuda.
    """
    part = extension.with_suffix(f".{os.getpid()}")
    strip = [] if compiler.flags else ["-Wl,-s"]
    options = ["-shared", "-pthread", "-Wl,--gc-sections", *strip, *compiler.flags]
    libraries = [f"-L{mlx / 'lib'}", "-lmlx", *shlex.split(os.environ.get("LDFLAGS", ""))]
    try:
        _run(compiler, [*options, *map(str, objects), *libraries, "-o", str(part)])
        part.replace(extension)  # a running process keeps the one that it has loaded
    finally:
        part.unlink(missing_ok=True)


def _run(compiler: _Compiler, arguments: list[str]) -> None:
    """Run the compiler and show what it says; NotBuiltError, with its first error, if it fails."""
    done = subprocess.run(
        [*compiler.command, *arguments], capture_output=True, text=True, errors="replace", check=False
    )
    if done.stderr:
        print(done.stderr, end="", file=sys.stderr, flush=True)
    if done.returncode:
        lines = done.stderr.splitlines() or ["no message"]
        error = next((line for line in lines if "error" in line), lines[0])
        raise NotBuiltError(f"{compiler.version} fails: {error.strip()}")


def _find_compiler() -> _Compiler:
    chosen = shlex.split(os.environ.get("CXX", ""))
    names = [chosen[0]] if chosen else ["g++", "c++"]
    path = next((found for name in names if (found := shutil.which(name))), None)
    if not path:
        raise NotBuiltError(f"{chosen[0] if chosen else 'a C++ compiler'} was not found; {TOOLS}; {AGAIN}")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        raise NotBuiltError(f"Python's headers are missing; {TOOLS}; {AGAIN}")
    command = [path, *chosen[1:]]
    version = (_ask([*command, "--version"]).splitlines() or [path])[0]
    macros = _ask([*command, "-dM", "-E", "-xc++", os.devnull])
    number = re.search(r"#define __GNUC__ (\d+)", macros)
    if "#define __clang__" in macros or not number or int(number[1]) < GCC:
        raise NotBuiltError(f"{version} does not compile them, GCC {GCC} or later does (CXX=g++-{GCC}); {AGAIN}")
    return _Compiler(command, version, shlex.split(os.environ.get("CXXFLAGS", "")))


def _ask(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout


def _find_mlx() -> Path:
    """Return MLX's folder: its headers and library come with mlx-cpu, the rest with mlx."""
    spec = importlib.util.find_spec("mlx")
    folders = [Path(each) for each in (spec.submodule_search_locations or ())] if spec else []
    for each in folders:
        if (each / "include" / "mlx" / "version.h").exists() and (each / "lib" / "libmlx.so").exists():
            return each
    raise NotBuiltError("MLX's headers are not there to build with")


def _find_nanobind(mlx: Path) -> Path:
    spec = importlib.util.find_spec("nanobind")
    if not spec or not spec.origin:
        raise NotBuiltError("nanobind is not there to build with")
    folder = Path(spec.origin).parent
    ours = 0
    for name in ("nb_abi.h", "nb_internals.h"):  # the older and the newer place
        path = folder / "src" / name
        if path.exists() and (found := re.search(r"define NB_INTERNALS_VERSION (\d+)", path.read_text())):
            ours = int(found[1])
    theirs = _nanobind_of_mlx(mlx)
    if ours != theirs:
        of_mlx, of_nanobind = importlib.metadata.version("mlx"), importlib.metadata.version("nanobind")
        raise NotBuiltError(
            f"MLX {of_mlx} and nanobind {of_nanobind} do not fit: their internals are of versions {theirs} and {ours}"
        )
    return folder


def _nanobind_of_mlx(mlx: Path) -> int:
    """Return the version of nanobind's internals in mlx.core, 0 if it cannot be told."""
    for path in mlx.glob(f"core{sysconfig.get_config_var('EXT_SUFFIX')}"):
        found = re.search(rb"\0v(\d+)_system_|_cxx11_abi_1_a\d+_v(\d+)\0", path.read_bytes())
        return int(found[1] or found[2]) if found else 0
    return 0


def _setting() -> str:
    return os.environ.get("M7MLX_NATIVE", "").lower()


def _digest(parts: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:16]


def main() -> int:
    """Build in place."""
    try:
        print(build(ROOT / PACKAGE).relative_to(ROOT))
    except NotBuiltError as error:
        print(f"not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
