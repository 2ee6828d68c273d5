"""What a model prints is data: no control character of it reaches a terminal."""

from m7mlx.terminal import visible

__all__ = ["visible"]
