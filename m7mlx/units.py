"""Bytes, as people read them: decimal, as disks are sold."""

from __future__ import annotations


def in_gigabytes(nbytes: float, digits: int = 1) -> str:
    """Write bytes in gigabytes, so that several can be compared: "14.5 GB"."""
    return f"{nbytes / 1e9:,.{digits}f} GB"


def in_bytes(nbytes: int) -> str:
    """Write bytes in the unit that suits them, with three digits: "4.07 GB", "93 MB", "12 B"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes} B"


def counted(count: int, noun: str, nouns: str = "") -> str:
    """Write a number with what it counts: "1 message", "2,000 messages", "0 copies".

    `nouns` is the plural where it is not the noun with an s.
    """
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"
