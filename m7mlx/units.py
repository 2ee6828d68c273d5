"""Bytes, as people read them."""

from __future__ import annotations


def in_gigabytes(nbytes: float, digits: int = 1) -> str:
    """Write bytes in one unit, so that several can be compared: "14.5 GB"; decimal, as disks are sold."""
    return f"{nbytes / 1e9:,.{digits}f} GB"


def in_bytes(nbytes: int) -> str:
    """Write bytes in the unit that suits them, with three digits: "4.07 GB", "93 MB", "12 B"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes} B"
