"""What a model prints is data: no control character of it reaches a terminal."""

from __future__ import annotations

# Each becomes a visible symbol, one for one. So nothing can hide, no sequence has to be recognised, and it
# does not matter where a stream is cut: ESC ]52;… shows as ␛]52;….
_SYMBOLS: dict[int, int] = {
    **{c: 0x2400 + c for c in range(0x20)},  # C0 → ␀ … ␟
    0x7F: 0x2421,  # DEL → ␡
    **dict.fromkeys(range(0x80, 0xA0), 0x2426),  # C1, among them one-byte CSI and OSC → ␦
    **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0x2426),  # bidi overrides and isolates
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),  # lone surrogates cannot be written
    0x2028: 0x2424,
    0x2029: 0x2424,  # line and paragraph separator → ␤
}
_TABLE: dict[int, int | None] = {**_SYMBOLS, 0x09: 0x09, 0x0A: 0x0A, 0x0D: None}


def visible(text: str) -> str:
    """`text` without anything a terminal would obey: controls and bidi overrides as symbols, CR dropped."""
    return text.translate(_TABLE)
