"""The build of the C++ kernels: what is compiled, when, and what is said where it fails.

The compiler is a script that notes how it is called; that the real one makes a working extension is
what every installation with one shows (test_native.py).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("hatchling", reason="hatch_build.py needs hatchling (the extra test)")
SOURCE = Path(__file__).parents[2] / "hatch_build.py"
if sys.platform != "linux":
    pytest.skip("the kernels are built on Linux only", allow_module_level=True)

COMPILER = """#!{python}
import json, os, sys
args = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(args) + "\\n")
if "--version" in args:
    print("a compiler 1.0")
elif "-E" in args:
    print({macros!r})
elif {fails!r} and any({fails!r} in arg for arg in args):
    print("In file included from x.h:\\nx.cpp:1:2: error: no such thing\\nx.cpp:2: error: more", file=sys.stderr)
    sys.exit(1)
else:
    open(args[args.index("-o") + 1], "w").close()
"""


class Project:
    """A project with two sources, MLX's folders and a compiler."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = importlib.util.spec_from_file_location("hatch_build", SOURCE)
        assert spec and spec.loader
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.root, self.log = root, root / "log"
        self.package = root / "m7mlx" / "cpu"
        self.kernels = self.package / "kernels"
        self.kernels.mkdir(parents=True)
        for name in ("kernels.cpp", "module.cpp", "kernels.h"):
            (self.kernels / name).write_text(name)
        mlx, nanobind = root / "mlx", root / "nanobind"
        (nanobind / "src").mkdir(parents=True)
        (nanobind / "src" / "nb_combined.cpp").write_text("nanobind")
        monkeypatch.setattr(self.module, "ROOT", root)
        monkeypatch.setattr(self.module, "_find_mlx", lambda: mlx)
        monkeypatch.setattr(self.module, "_find_nanobind", lambda _: nanobind)
        monkeypatch.setattr(self.module.importlib.metadata, "version", lambda _: "1.0")
        monkeypatch.setattr(self.module.platform, "machine", lambda: "x86_64")
        monkeypatch.setenv("CXX", str(root / "c++"))
        for name in ("CXXFLAGS", "LDFLAGS", "M7MLX_NATIVE"):
            monkeypatch.delenv(name, raising=False)
        self.set_compiler()

    def set_compiler(self, macros: str = "#define __GNUC__ 12", fails: str = "") -> None:
        path = self.root / "c++"
        path.write_text(COMPILER.format(python=sys.executable, log=str(self.log), macros=macros, fails=fails))
        path.chmod(0o755)

    def build(self) -> list[list[str]]:
        """Build in place; returns the compiler’s calls that make a file; the last one links."""
        self.log.unlink(missing_ok=True)
        assert self.module.main() == 0
        calls = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [call for call in calls if "-o" in call]

    def fail(self) -> str:
        """Build in place, which must not work; returns the reason that is kept."""
        assert self.module.main() == 1
        assert not list(self.package.glob("*.so"))
        return str(json.loads((self.package / "_build.json").read_text())["missing"])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path, monkeypatch)


def test_the_kernels_are_compiled_once_per_instruction_set(project: Project) -> None:
    *compiled, linked = project.build()
    sets = {next(arg for arg in call if "M7_ISA" in arg): call for call in compiled if "-DM7_ISA" in str(call)}
    assert set(sets) == {"-DM7_ISA=base", "-DM7_ISA=avx2", "-DM7_ISA=avx512"}
    assert "-mavx2" in sets["-DM7_ISA=avx2"] and "-mavx512f" in sets["-DM7_ISA=avx512"]
    plain = [call for call in compiled if call not in sets.values()] + [sets["-DM7_ISA=base"]]
    assert not any(arg.startswith("-m") for call in plain for arg in call)
    # of an inline function in several objects the linker takes the first one
    objects = [arg for arg in linked if arg.endswith(".o")]
    last = [call[call.index("-o") + 1] for call in (sets["-DM7_ISA=avx2"], sets["-DM7_ISA=avx512"])]
    assert [Path(name).stem for name in objects[-2:]] == [Path(name).stem for name in last]
    assert (project.package / project.module.EXTENSION).exists()


@pytest.mark.parametrize("machine", ["aarch64", "riscv64"])
def test_other_processors_have_one_set(machine: str, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project.module.platform, "machine", lambda: machine)
    compiled = project.build()
    assert [arg for call in compiled for arg in call if "M7_ISA" in arg] == ["-DM7_ISA=base"]
    assert not any(arg.startswith(("-m", "-DM7_HAS")) for call in compiled for arg in call)


def test_only_what_has_changed_is_compiled_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(project.build()) == 6  # nanobind, module, kernels three times, the extension
    assert len(project.build()) == 1
    (project.kernels / "module.cpp").write_text("changed")
    assert len(project.build()) == 2
    (project.kernels / "kernels.h").write_text("changed")
    assert len(project.build()) == 5
    monkeypatch.setenv("CXXFLAGS", "-g -fsanitize=address")
    assert len(project.build()) == 6
    monkeypatch.setattr(project.module.importlib.metadata, "version", lambda _: "1.1")  # of MLX, of nanobind
    *_, linked = project.build()
    assert "-fsanitize=address" in linked
    assert len(list((project.root / "build" / "native" / "objects").iterdir())) == 5


def test_a_failure_leaves_the_reason_in_the_place_of_the_extension(project: Project) -> None:
    project.build()
    project.set_compiler(fails="M7_ISA=avx2")
    (project.kernels / "kernels.h").write_text("changed")
    assert project.fail().startswith("a compiler 1.0 fails: x.cpp:1:2: error: no such thing")
    project.set_compiler()
    project.build()
    assert json.loads((project.package / "_build.json").read_text()) == {"mlx": "1.0"}
    project.set_compiler(fails="-lmlx")
    assert "a compiler 1.0 fails" in project.fail()


def test_what_is_missing_is_named(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for macros in ("#define __GNUC__ 11", "#define __GNUC__ 12\n#define __clang__ 1", "neither of the two"):
        project.set_compiler(macros)
        assert "a compiler 1.0 does not compile them, GCC 12 or later does" in project.fail()
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert project.fail().startswith("no-such-compiler was not found; on Debian and Ubuntu: apt install g++")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert project.fail().startswith("a C++ compiler was not found; ")
    monkeypatch.setenv("M7MLX_NATIVE", "off")
    assert "M7MLX_NATIVE=off" in project.fail()


def test_a_tree_that_may_not_be_written_to_is_built_all_the_same(project: Project, tmp_path: Path) -> None:
    (project.root / "build").write_text("a file where the objects' folder would be")
    made = tmp_path / "elsewhere"
    made.mkdir()
    assert project.module.build(made) == made / project.module.EXTENSION
    assert sorted(path.name for path in made.iterdir()) == ["_build.json", project.module.EXTENSION]


def test_python_without_headers_is_named(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(project.module.sysconfig, "get_paths", lambda: {"include": str(tmp_path / "include")})
    assert project.fail().startswith("Python's headers are missing; ")


@pytest.mark.parametrize(
    ("text", "internals"),
    [
        (b"\0nanobind_system_libstdcpp_gxx_abi_1xxx_use_cxx11_abi_1_a1_v22\0", 22),
        (b"\0v21_system_libstdcpp_gxx_abi_1xxx_use_cxx11_abi_1\0", 21),
        (b"neither", 0),
    ],
)
def test_the_nanobind_of_mlx_is_read_from_it(text: bytes, internals: int, project: Project) -> None:
    mlx = project.root / "mlx"
    mlx.mkdir()
    (mlx / f"core{project.module.EXTENSION.removeprefix('_native')}").write_bytes(b"\x7fELF" + text + b"\0")
    assert project.module._nanobind_of_mlx(mlx) == internals
