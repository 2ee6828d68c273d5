"""What an answer cost, as people read it."""

from __future__ import annotations

from m7mlx.units import in_gigabytes
from m7mlx_chat.store.rows import Message

HEADINGS = ("tokens", "tok/s", "first after", "prompt", "reused", "read a second", "peak memory")


def figures(message: Message) -> tuple[str, ...]:
    """Return what an answer cost, in the order of `HEADINGS`."""
    s = message.statistics
    return (
        f"{s.get('generated_tokens', 0):,}",
        f"{s.get('generation_tps', 0):.1f}",
        f"{s.get('time_to_first_token', 0):.2f} s",
        f"{s.get('prompt_tokens', 0):,}",
        f"{s.get('reused_tokens', 0):,}" + " (disk)" * bool(s.get("from_disk")),
        f"{s.get('prompt_tps', 0):,.0f}",
        in_gigabytes(s.get("peak_memory", 0), 2),
    )
