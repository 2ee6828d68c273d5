"""Products with matrices as they lie: the kernels' against MLX's operations, and mapped files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from adapters import DOWN, HEAD, QUERY, write_mlx_lm, write_peft
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from m7mlx_convert.convert import convert
from m7mlx_convert.scheme import Recipe
from models import named_arrays
from sources import quantisable, write_source

from m7mlx import load, set_adapter
from m7mlx.arrays import fingerprint
from m7mlx.cpu import native
from m7mlx.quantization import Quantization

pytestmark = pytest.mark.usefixtures("forced_instruction_set")

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
AFFINE = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
PACKED = [*AFFINE, ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
EPS = 1e-5


class Case(NamedTuple):
    """A matrix as the kernels take it, its numbers, and those that its products are made of.

    terms  as large as the numbers, or as the code's and the bias's shares together
    """

    weight: object
    numbers: mx.array  # [rows, columns], float32
    terms: mx.array
    packed: tuple[mx.array, ...]
    scheme: tuple[str, int, int] | None

    def product(self, x: mx.array) -> mx.array:
        """Return x times the matrix, by MLX's operations in float32."""
        if self.scheme is None:
            return x @ self.numbers.T
        mode, bits, group = self.scheme
        codes, scales, *biases = self.packed
        if mode != "affine":
            return mx.quantized_matmul(x, codes, scales, group_size=group, bits=bits, mode=mode)
        scales, bias = scales.astype(mx.float32), biases[0].astype(mx.float32)
        return mx.quantized_matmul(x, codes, scales, bias, group_size=group, bits=bits)


def plain(rows: int, columns: int, dtype: mx.Dtype, seed: int) -> Case:
    matrix = mx.random.normal((rows, columns), key=mx.random.key(seed)).astype(dtype)
    numbers = matrix.astype(mx.float32)
    return Case(native.kernels().Weight(matrix), numbers, mx.abs(numbers), (matrix,), None)


def packed(rows: int, columns: int, scheme: tuple[str, int, int], dtype: mx.Dtype, seed: int) -> Case:
    mode, bits, group = scheme
    matrix = mx.random.normal((rows, columns), key=mx.random.key(seed)) + 0.1
    codes, *scales = mx.quantize(matrix, group_size=group, bits=bits, mode=mode)
    if mode == "affine":
        scales = [a.astype(dtype) for a in scales]
    weight = native.kernels().Weight(codes, *scales, *((None,) if len(scales) == 1 else ()), group, bits, mode)
    if mode == "affine":
        s, b = (a.astype(mx.float32) for a in scales)
        numbers = mx.dequantize(codes, s, b, group, bits)
        terms = mx.abs(mx.dequantize(codes, s, mx.zeros_like(b), group, bits)) + mx.repeat(mx.abs(b), group, axis=1)
    else:
        numbers = mx.dequantize(codes, scales[0], group_size=group, bits=bits, mode=mode, dtype=mx.float32)
        terms = mx.abs(numbers)
    return Case(weight, numbers, terms, (codes, *scales), scheme)


@st.composite
def cases(draw: st.DrawFn, count: int = 1, same_rows: bool = False) -> list[Case]:
    """Matrices that are stored alike and take the same inputs."""
    seed = draw(st.integers(0, 1000))
    dtype = draw(st.sampled_from(FLOATS))
    scheme = draw(st.sampled_from(PACKED) | st.none())
    rows = [draw(st.integers(1, 70))] * count if same_rows else [draw(st.integers(1, 70)) for _ in range(count)]
    if scheme is None:
        columns = draw(st.integers(1, 300))
        return [plain(n, columns, dtype, seed + i) for i, n in enumerate(rows)]
    columns = max(32, scheme[2]) * draw(st.integers(1, 5))
    return [packed(n, columns, scheme, dtype, seed + i) for i, n in enumerate(rows)]


def inputs(tokens: int, columns: int) -> mx.array:
    return mx.random.normal((tokens, columns), key=mx.random.key(tokens))


def assert_near(found: mx.array, expected: mx.array, size: mx.array) -> None:
    assert found.shape == expected.shape and found.dtype == mx.float32
    assert (np.abs(np.array(found) - np.array(expected)) <= 1e-5 * np.array(size) + 1e-30).all()


def sizes(x: mx.array, of: list[Case], rounded: bool = False) -> mx.array:
    """Return the sums of the absolute terms of the products, as large as rounding can make them."""
    x = mx.abs(x)
    if rounded and len(x) <= 8 and of[0].scheme is not None and 16 % of[0].scheme[1] == 0:
        groups = x.reshape(len(x), -1, of[0].scheme[2])
        x = 2 * mx.broadcast_to(groups.max(axis=2, keepdims=True), groups.shape).reshape(x.shape)
    return mx.concatenate([x @ case.terms.T for case in of], axis=-1)


@given(st.integers(1, 3).flatmap(cases), st.integers(1, 40), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=examples(30), deadline=None)
def test_a_product_is_that_of_mlx(
    of: list[Case], tokens: int, is_normed: bool, is_added: bool, rounded: bool
) -> None:
    x = inputs(tokens, of[0].numbers.shape[1])
    rows = sum(case.numbers.shape[0] for case in of)
    norm = 1 + mx.random.normal(x.shape[1:], key=mx.random.key(1)) / 8 if is_normed else None
    residual = mx.random.normal((tokens, rows), key=mx.random.key(2)) if is_added else None
    found = native.kernels().product(x, [case.weight for case in of], norm, EPS, residual, rounded=rounded)
    if norm is not None:
        x = mx.fast.rms_norm(x, norm, EPS)
    expected, size = mx.concatenate([case.product(x) for case in of], axis=-1), sizes(x, of, rounded)
    if residual is not None:
        expected, size = residual + expected, size + mx.abs(residual)
    assert_near(found, expected, size)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_rounding_moves_a_product_less_than_float16_would(bits: int, tokens: int) -> None:
    case = packed(96, 1024, ("affine", bits, 64), mx.float32, 5)
    x = inputs(tokens, 1024) * mx.where(mx.arange(1024) % 200 == 7, 50, 1)  # some channels stand out
    product = native.kernels().product
    exact, found = product(x, [case.weight]), product(x, [case.weight], rounded=True)
    half = case.product(x.astype(mx.float16).astype(mx.float32))
    error = [float(np.linalg.norm(np.array(y - exact))) for y in (found, half)]
    assert error[0] < min(error[1] / 3, 1e-4 * float(np.linalg.norm(np.array(exact))))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_rounding_hides_no_number_that_is_not_finite(wrong: float) -> None:
    case = packed(20, 256, ("affine", 4, 64), mx.float32, 5)
    x = inputs(2, 256)
    x[1, 100] = wrong
    found = native.kernels().product(x, [case.weight], rounded=True)
    assert mx.isfinite(found[0]).all() and not mx.isfinite(found[1]).any()
    assert (native.kernels().product(mx.zeros((2, 256)), [case.weight], rounded=True) == 0).all()


@given(cases(2, True), st.integers(1, 40), st.booleans())
@settings(max_examples=examples(20), deadline=None)
def test_a_gated_product_is_that_of_mlx(of: list[Case], tokens: int, is_normed: bool) -> None:
    x = inputs(tokens, of[0].numbers.shape[1])
    norm = 1 + mx.random.normal(x.shape[1:], key=mx.random.key(1)) / 8 if is_normed else None
    found = native.kernels().product(x, [case.weight for case in of], norm, EPS, None, True)
    if norm is not None:
        x = mx.fast.rms_norm(x, norm, EPS)
    gate, up = (case.product(x) for case in of)
    of_gate, of_up = (sizes(x, [case]) for case in of)
    assert_near(found, gate * mx.sigmoid(gate) * up, 3 * of_gate * of_up)


@given(cases(), st.lists(st.integers(-3, 80), min_size=1, max_size=9))
@settings(max_examples=examples(20), deadline=None)
def test_a_lookup_gives_the_rows_and_zeros_for_what_is_no_row(of: list[Case], ids: list[int]) -> None:
    (case,) = of
    rows = case.numbers.shape[0]
    found = native.kernels().lookup(mx.array([ids]), case.weight)
    is_row = mx.array([[[0 <= i < rows] for i in ids]])
    expected = mx.where(is_row, case.numbers[mx.array([ids]) % rows], 0)
    assert_near(found, expected, mx.where(is_row, case.terms[mx.array([ids]) % rows], 0))


def test_inputs_may_lie_anyhow() -> None:
    case = packed(40, 128, ("affine", 4, 64), mx.float16, 0)
    x = mx.random.normal((128, 3, 24), key=mx.random.key(0))
    views = [x.T, x.T[::2, 1:], mx.broadcast_to(x[:, 0, 0], (5, 2, 128)), x.swapaxes(0, 2)[3, 1]]
    for view in views:
        found = native.kernels().product(view, [case.weight])
        assert_near(found, case.product(view), mx.abs(view) @ case.terms.T)


@pytest.mark.parametrize("is_packed", [True, False])
def test_no_rows_give_no_rows(is_packed: bool) -> None:
    case = packed(40, 128, ("affine", 4, 64), mx.float16, 0) if is_packed else plain(40, 128, mx.float32, 0)
    assert native.kernels().product(mx.zeros((0, 128)), [case.weight]).shape == (0, 40)
    gain = mx.ones((128,))
    assert native.kernels().product(mx.zeros((2, 0, 128)), [case.weight] * 2, gain, EPS, None, True).size == 0
    mx.eval(native.kernels().product(mx.zeros((0, 128)), [case.weight] * 2, gain, EPS, mx.zeros((0, 80))))
    assert native.kernels().lookup(mx.zeros((0,), mx.int32), case.weight).shape == (0, 128)
    mx.eval(native.kernels().product(mx.zeros((0, 128)), [case.weight]))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with scales in 16 bits, whose tensors lie at multiples of 8."""
    folder = tmp_path_factory.mktemp("mapped")
    write_source(folder / "source", quantisable(), mx.float16)
    made = convert(str(folder / "source"), folder / "packed", recipe=Recipe(Quantization(32, 4)))
    return shifted(made, folder / "aligned", 0)


def shifted(folder: Path, to: Path, remainder: int) -> Path:
    """Copy a model; its numbers begin at an address that leaves this remainder, divided by 8."""
    shutil.copytree(folder, to)
    (path,) = to.glob("*.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    header += b" " * ((remainder - len(header)) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    (to / "SHA256SUMS").unlink(missing_ok=True)  # of the file as it was
    return to


@pytest.mark.parametrize("remainder", [1, 2, 3, 4])
def test_numbers_of_a_mapped_file_may_begin_anywhere(base: Path, tmp_path: Path, remainder: int) -> None:
    ids = mx.array([[5, 300, 7, 7, 0, 41, 250, 19, 88, 3, 12]])
    write_peft(tmp_path / "lora", [QUERY, DOWN])
    write_mlx_lm(tmp_path / "dora", "dora", [HEAD, DOWN])
    aligned, odd = (load(folder)[0] for folder in (base, shifted(base, tmp_path / "odd", remainder)))
    assert fingerprint(named_arrays(odd)) == fingerprint(named_arrays(aligned))
    assert mx.array_equal(odd(ids), aligned(ids))
    for adapter in ("lora", "dora", None):
        for model in (aligned, odd):
            set_adapter(model, None if adapter is None else tmp_path / adapter)
        assert mx.allclose(odd(ids), aligned(ids), rtol=1e-5, atol=1e-5), adapter


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of mappings")
def test_large_pages_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "numbers.bin"
    file.write_bytes(np.arange(1 << 20, dtype=np.float32).tobytes())
    (numbers,) = native.kernels().map_file(str(file), [(0, [1 << 20], mx.float32)])
    account = Path("/proc/self/smaps").read_text()
    flags = re.search(rf"{re.escape(str(file))}\n(?:.+\n)*?VmFlags: (.*)", account)
    known = Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()
    assert flags is not None and ("hg" in flags[1].split() or not known)
    assert numbers[-1].item() == (1 << 20) - 1
