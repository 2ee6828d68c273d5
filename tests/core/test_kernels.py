"""The kernels' own test, in C++, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from effort import examples

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "m7mlx" / "cpu" / "kernels"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
SETS = {"base": [], "avx2": AVX2, "avx512": AVX512}
FLAGS = ["-g1", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-pthread", "-Wall", "-Wextra"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0"]  # -O1 compiles twice as long

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or not COMPILER, reason="needs Linux and g++"),
    pytest.mark.timeout(1200),  # what runs first is compiled for minutes
]


def sets_here() -> list[str]:
    """Return the instruction sets of this processor that the kernels are compiled for."""
    if platform.machine() != "x86_64":
        return ["base"]
    told = set(Path("/proc/cpuinfo").read_text().split())
    return ["base", *(name for name in ("avx2", "avx512") if {flag[2:] for flag in SETS[name]} <= told)]


def compile_cpp(*options: str) -> None:
    done = subprocess.run([str(COMPILER), *FLAGS, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, sets = tmp_path_factory.mktemp("kernels"), sets_here()
    if (
        "libasan"
        not in subprocess.run(
            [str(COMPILER), "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
        ).stdout
    ):
        pytest.skip("needs the sanitizers' libraries")

    def compile_set(name: str) -> str:
        made = folder / f"{name}.o"
        options = SANITIZED if name == sets[-1] else ["-O1"]  # all are one source
        compile_cpp(*options, *SETS[name], f"-DM7_ISA={name}", "-c", str(KERNELS / "kernels.cpp"), "-o", str(made))
        return str(made)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_set, sets))
    there = [f"-DM7_HAS_{name.upper()}" for name in sets if name != "base"]
    sources = [ROOT / "tests" / "native" / "kernels_test.cpp", KERNELS / "isa.cpp", KERNELS / "threads.cpp"]
    compile_cpp(*SANITIZED, *there, *map(str, sources), *objects, "-o", str(folder / "kernels_test"))
    return folder / "kernels_test"


@pytest.mark.parametrize("name", SETS)
def test_the_kernels_agree_with_plain_loops(program: Path, name: str) -> None:
    if name not in sets_here():
        pytest.skip(f"this processor has no {name}")
    rounds = examples(25)
    command = [str(program), "--isa", name, "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"OK {name}, {rounds} rounds\n"), (done.stdout + done.stderr)[-3000:]
