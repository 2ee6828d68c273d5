import mlx.core as mx

def instruction_sets() -> list[str]:
    """Return the instruction sets that are compiled in and that this processor has, best last."""

def use_instruction_set(name: str) -> None:
    """Let the kernels of this set run from now on; ValueError if it is none of those."""

def copy(x: mx.array) -> mx.array:
    """Return a copy of `x` in float32, made by a kernel."""
