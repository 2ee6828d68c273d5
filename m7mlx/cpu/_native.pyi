from collections.abc import Sequence

import mlx.core as mx

class Weight:
    """A matrix [rows, columns] as it lies, for `product` and `lookup`; it holds the arrays.

    codes  packed by MLX's `quantize`, with scales and perhaps biases; or float32, float16, bfloat16

    Raises ValueError for what the kernels do not know.
    """

    def __init__(
        self,
        codes: mx.array,
        scales: mx.array | None = None,
        biases: mx.array | None = None,
        group_size: int = 1,
        bits: int = 0,
        mode: str = "",
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...

def instruction_sets() -> list[str]:
    """Return the instruction sets that are compiled in and that this processor has, best last."""

def use_instruction_set(name: str) -> None:
    """Let the kernels of this set run from now on; ValueError if it is none of those."""

def threads() -> int:
    """Return how many threads share a kernel's work."""

def set_threads(n: int) -> None:
    """Let so many threads share a kernel's work; not while one runs."""

def product(
    x: mx.array,
    weights: Sequence[Weight],
    norm: mx.array | None = None,
    eps: float = 0.0,
    residual: mx.array | None = None,
    gated: bool = False,
    rounded: bool = False,
) -> mx.array:
    """Return the products of x [..., columns] with one to three weights, side by side, in float32.

    norm      weight of an RMSNorm on x, with its eps
    residual  added to the result
    gated     the weights are gate and up of a SwiGLU: return silu(gate) · up
    rounded   eight tokens or fewer may meet codes of 2, 4 or 8 bits as integers of 16 bits: each
              number to within 1/65,534 of the largest in its group
    """

def lookup(ids: mx.array, weight: Weight) -> mx.array:
    """Return rows of a weight, in float32: [..., columns]. An id outside of it gives zeros."""

def attend(
    heads: mx.array,
    rotation: mx.array,
    factors: mx.array | None,
    written: mx.array,
    buffers: Sequence[mx.array],
    n_kv_heads: int,
    offset: int,
    capacity: int,
    window: int,
    starts: Sequence[int],
    group: int,
    turned: bool,
    sinks: Sequence[mx.array] = (),
) -> tuple[mx.array, mx.array]:
    """Write the new keys and values into a ring's buffers, IN PLACE, and attend to it.

    heads     [batch, length, (heads + 2 KV heads) * head_dim]: queries, keys, values, not rotated
    rotation  [batch or 1, length, head_dim]: cosines, then sines
    factors   [batch or 1, length]: what queries are multiplied by besides
    written   what the last pass through these buffers returned: the order of both
    buffers   as `LayerRing` has them, evaluated
    window    0 for full attention
    starts    for each row, the position at which it began
    sinks     none, or the rotation of the queries for the sinks, and keys and values of these:
              [batch, KV heads, sinks, head_dim], rotated and turned as those in the buffers

    Returns (the result [batch, length, heads * head_dim], `written` of this pass).
    """

def map_file(path: str, tensors: Sequence[tuple[int, Sequence[int], mx.Dtype]]) -> list[mx.array]:
    """Return arrays that are parts of a file in memory; each part is (offset, shape, dtype).

    The file must not be shortened while they live. Raises OSError; ValueError for a part that lies
    beyond the file's end.
    """
