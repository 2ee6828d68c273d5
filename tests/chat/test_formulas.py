"""Formulas and code as they are shown: in Unicode, with their language, and nothing cut off."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_harness import chatting
from hypothesis import given
from hypothesis import strategies as st
from m7mlx_chat.latex import readable
from m7mlx_chat.markdown import CodeBlock
from textual.widgets import Static


@pytest.mark.parametrize(
    ("formula", "shown"),
    [
        (r"\alpha^2 + \beta_{ij} \leq \frac{a+b}{2c}", "α² + βᵢⱼ ≤ (a+b)/(2c)"),
        (r"\int_0^\infty e^{-x^2}\,dx = \frac{\sqrt{\pi}}{2}", "∫₀^∞ e^(-x²) dx = √(π)/2"),
        (r"\sum_{i=1}^{n} i", "∑ᵢ₌₁ⁿ i"),
        (r"\mathbb{R}^n \to \text{softmax}(QK^T/\sqrt{d_k})V", "ℝⁿ → softmax(QKᵀ/√(dₖ))V"),
        (r"x \in \{1, 2\}", "x ∈ {1, 2}"),
        (r"\frac{1}{\frac{2}{x^2}}", "1/(2/x²)"),
        (r"x^{q} + 10^{-3}", "x^q + 10⁻³"),
        (r"\unknown{x} \frac{", r"\unknown{x} \frac{"),
        (r"\input{/etc/passwd}", r"\input{/etc/passwd}"),
        ("a_{" * 5000, "a_{" * 5000),
    ],
)
def test_a_formula_in_unicode(formula: str, shown: str) -> None:
    assert readable(formula) == shown


@given(st.text(alphabet=r"\{}^_ab1 &%$fractinpu[]()") | st.text())
def test_no_formula_fails(formula: str) -> None:
    assert readable(formula) or not formula.strip()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (r"so \(x^2\) and $y_1$ and $$\alpha$$", ["so x² and y₁ and α"]),
        ("first\n\n\\[\n\\frac{a}{b}\n\\]\n\n$$\nc\n$$", ["first", "a/b", "c"]),
        ("$5 and $10; from $20-$30; \\$x\\$", ["$5 and $10; from $20-$30; $x$"]),
        (r"\begin{x} a \\ b \{c\} \end{x} but \*this\*", [r"\begin{x} a \\ b \{c\} \end{x} but *this*"]),
        (r"`\(x^2\)` and a lone $x", [r"\(x^2\) and a lone $x"]),
    ],
)
async def test_what_an_answer_shows_of_it(tmp_path: Path, text: str, shown: list[str]) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("question", text)
        assert [str(w.content) for w in chat.app.query("MarkdownParagraph").results(Static)] == shown
        assert chat.line()[1] == text


def has_bar(block: CodeBlock) -> bool:
    return bool(block.show_horizontal_scrollbar)


async def test_code_shows_its_language_and_all_of_its_lines(tmp_path: Path) -> None:
    long = "x = " + " + ".join(f"value{i}" for i in range(40))
    diff = "```diff\n@@ -1 +1 @@\n-old\n+new\n same\n```"
    async with chatting(tmp_path, size=(80, 40)) as chat:
        await chat.exchange("code?", f"```python\n{long}\n```\n\n{diff}\n\n```\nplain\n```")
        await chat.pilot.pause()
        python, changes, plain = chat.app.query(CodeBlock)
        assert [str(block.border_title or "") for block in (python, changes, plain)] == ["python", "diff", ""]
        assert "python" in chat.shown() and "value39" not in chat.shown()
        assert has_bar(python) and not has_bar(plain)
        colors = {str(span.style) for span in changes._highlighted_code.spans}
        assert {"$text-success", "$text-error"} <= colors
        await chat.pilot.press("alt+up", "w")
        await chat.pilot.pause()
        assert "value39" in chat.shown()
        assert not has_bar(python)
        await chat.pilot.press("w")
        await chat.pilot.pause()
        assert "value39" not in chat.shown()
