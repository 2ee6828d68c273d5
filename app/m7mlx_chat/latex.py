"""Formulas as a terminal can show them: `\\frac{\\alpha^2}{n}` is α²/n."""

from __future__ import annotations

import logging
import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pylatexenc.latex2text import LatexNodes2Text

_LONGEST = 5_000  # characters of a formula
_UP, _DOWN, _END = "\ue000", "\ue001", "\ue002"  # private characters: what stands above or below, its end
_SCRIPT = re.compile(r"([\^_])(?:\{([^{}]*)\}|(\\[A-Za-z]+|[^\s{}\\]))")
_MARKED = re.compile(f"([{_UP}{_DOWN}])([^{_UP}{_DOWN}{_END}]*){_END}")
_ATOM = re.compile(r"\d[\d.,]*|[^\W\d]+|√\(.*\)|.")  # what needs no brackets above or below a fraction
_RELATION = re.compile(r" ([≤≥≠≈∈→⇒⇔≡⊂⊆∪∩∖·×])(?=\S)")
_ABOVE = str.maketrans(
    "0123456789+-−=()abcdefghijklmnoprstuvwxyzABDEGHIJKLMNOPRTUVWαβγδ*′'∘",
    "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻᴬᴮᴰᴱᴳᴴᴵᴶᴷᴸᴹᴺᴼᴾᴿᵀᵁⱽᵂᵅᵝᵞᵟ*′′°",
)
_BELOW = str.maketrans("0123456789+-−=()aehijklmnoprstuvxβγρφχ", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓᵦᵧᵨᵩᵪ")


def readable(formula: str) -> str:
    """A formula in Unicode; what cannot be said in it stays as it was written."""
    if len(formula) > _LONGEST:
        return formula
    text, before = formula, ""
    while text != before:  # from the innermost outwards
        text, before = _SCRIPT.sub(_mark, text), text
    try:
        text = _converter().latex_to_text(text)
    except Exception:  # whatever it makes of what is no LaTeX
        return formula
    if re.search(r"%s|%\(", text):  # a macro that lacks its arguments
        return formula
    before = ""
    while text != before:
        text, before = _MARKED.sub(_script, text), text
    return " ".join(_RELATION.sub(r" \1 ", text).split()) or formula


def _mark(found: re.Match[str]) -> str:
    mark = _UP if found[1] == "^" else _DOWN
    return f"{mark}{found[2] if found[2] is not None else found[3] + ' '}{_END}"


def _script(found: re.Match[str]) -> str:
    """What stands above or below the line, in small letters where there are all of them."""
    is_above, text = found[1] == _UP, found[2].replace(" ", "")
    table = _ABOVE if is_above else _BELOW
    if all(ord(character) in table for character in text):
        return text.translate(table)
    return ("^" if is_above else "_") + (text if len(text) == 1 else f"({found[2].strip()})")


@cache
def _converter() -> LatexNodes2Text:
    # 30 ms, and only who is told a formula needs it
    from pylatexenc.latex2text import LatexNodes2Text, MacroTextSpec, get_default_latex_context_db

    logging.getLogger("pylatexenc").setLevel(logging.CRITICAL)
    known = get_default_latex_context_db()
    fractions = [MacroTextSpec(name, simplify_repl=_fraction) for name in ("frac", "dfrac", "tfrac", "cfrac")]
    unread = [MacroTextSpec(name, simplify_repl="") for name in ("input", "include")]  # no files are read
    known.add_context_category("m7mlx", macros=[*fractions, *unread], prepend=True)
    return LatexNodes2Text(known, math_mode="text")


def _fraction(node: Any, l2tobj: LatexNodes2Text) -> str:
    above, below = (l2tobj.nodelist_to_text([one]).strip() for one in node.nodeargd.argnlist[-2:])
    return f"{_in_brackets(above)}/{_in_brackets(below)}"


def _in_brackets(text: str) -> str:
    return text if _ATOM.fullmatch(_MARKED.sub("", text)) else f"({text})"
