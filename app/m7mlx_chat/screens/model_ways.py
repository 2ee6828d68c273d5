"""The ways to get a model that is not ready for use: what each downloads or converts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from m7mlx.units import in_bytes
from m7mlx_chat.hub_search import Files, Offer

_KEPT = re.compile(r"Q4_0|Q4_1|Q8_0|F16|BF16|F32", re.IGNORECASE)  # blocks that lose nothing
_GROWS = 1.3  # from this on a conversion without quantising makes more of a file
_SHOWN = 40  # files of a repository


class Way(NamedTuple):
    """One way to get a model.

    text    what the user reads
    source  what is fetched or converted
    bits    for the conversion; None leaves the weights as they are
    fetches it is fetched as it is, and not converted into a folder of the chat's own
    """

    text: str
    source: str
    bits: int | None = None
    fetches: bool = False


def ways_of_file(source: str, nbytes: int, plan: Mapping[str, Any], bits: int) -> list[Way]:
    """Return the ways to convert a file here; the better one first.

    plan  what converting it as it is gives
    bits  the others that are offered
    """
    as_it_is = int(plan["result_bytes"])
    ways = [
        Way(f"Convert it as it is: {in_bytes(as_it_is)}", source),
        Way(f"Convert it to {bits} bits: about {in_bytes(_quantised(plan['parameters'], bits))}", source, bits),
    ]
    return ways if as_it_is <= _GROWS * nbytes else ways[::-1]


def ways_on_hub(offer: Offer, files: Files, bits: int) -> list[Way]:
    """Return the ways to get a model from the Hub: as it is, converted, or one of its files."""
    ways = []
    if files.nbytes:
        size = in_bytes(files.nbytes)
        if not (files.is_native or offer.is_packed):
            ways.append(Way(f"Download it: {size}", offer.repo, fetches=True))
        if offer.is_full:
            kept = in_bytes(_quantised(offer.parameters, bits))
            text = f"Download it, {size}, and convert it to {bits} bits: about {kept}"
            ways.append(Way(text, offer.repo, bits))
        elif files.is_native or offer.is_packed:
            ways.append(Way(f"Download it, {size}, and convert it", offer.repo))
    for name, nbytes in sorted(files.ggufs.items(), key=lambda item: item[1])[:_SHOWN]:
        becomes = None if _KEPT.search(name) else bits
        how = f"convert it to {becomes} bits" if becomes else "convert it as it is"
        ways.append(Way(f"{name}: {in_bytes(nbytes)}, {how}", f"{offer.repo}/{name}", becomes))
    return ways


def _quantised(parameters: int, bits: int) -> int:
    return int(parameters * (bits + 0.5) / 8)  # a scale and a bias of 16 bits for each 64 weights
