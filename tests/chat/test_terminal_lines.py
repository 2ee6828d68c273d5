"""What the command lines print on a terminal steers nothing, whoever wrote the text."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from hostile import EVIL, MARKUP, UNSAFE
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from terminal import OURS, on_terminal

from m7mlx.terminal import json_line, make_safe, make_streams_safe, one_line, visible

NAME = "word" + EVIL.replace("/", "")
hostile = st.lists(st.sampled_from([*EVIL, "👩‍👩‍👧", "é", "ש", "e\u0301", "\ud800", " "]) | st.text(max_size=3)).map(
    "".join
)


@given(st.recursive(hostile, lambda inner: st.lists(inner) | st.dictionaries(hostile, inner), max_leaves=5))
def test_json_is_the_same_value_and_holds_nothing_that_a_terminal_obeys(value: object) -> None:
    line = json_line(value)
    assert json.loads(line) == json.loads(json.dumps(value))
    assert not UNSAFE.search(line)


@given(hostile)
def test_what_rich_draws_takes_the_cells_that_it_took(text: str) -> None:
    drawn = make_safe([Segment(text, Style(bold=True, link="http://evil.example"))])
    assert sum(cell_len(segment.text) for segment in drawn) == cell_len(text)
    # rich ends its lines so, and makes spaces of tabs itself
    assert not UNSAFE.search("".join(segment.text for segment in drawn).replace("\n", "").replace("\t", ""))
    assert all(segment.style is None or segment.style.link is None for segment in drawn)


HONEST = "👩‍👩‍👧 عربي עברית e\u0301 \u00a0 می\u200cخواهم tab\there 日本 🏳️‍🌈"


def test_honest_text_stays() -> None:
    assert visible(HONEST) == HONEST
    assert one_line(f" a\n {HONEST}").startswith("a 👩‍👩‍👧 عربي עברית e\u0301")
    assert json.loads(json_line(HONEST)) == HONEST
    segments = [Segment(HONEST.replace("\t", " "), Style(bold=True))]
    assert make_safe(segments) == segments


COMMANDS: list[list[str]] = [
    ["m7mlx-chat", "-p", "Hi", "--model", "MODEL", "--max-tokens", "3"],
    ["m7mlx-chat", "-p", "Hi", "--model", "MODEL", "--max-tokens", "3", "--json"],
    ["m7mlx-chat", "-p", "Hi", "--model", f"./{NAME}/nowhere"],
    ["m7mlx-chat", "-p", "Hi", "--model", "MODEL", "--preset", NAME],
    ["m7mlx-chat", "-p", "Hi", "--model", "BROKEN"],
    ["m7mlx-chat", "-p", "Hi", "--model", "BROKEN", "--debug"],
    ["m7mlx-chat", "-p", "Hi", "--file", f"{NAME}.txt"],
    ["m7mlx-chat", "--import", f"{NAME}.json"],
    ["m7mlx-chat", f"--{NAME}"],
    ["m7mlx-chat", "--speculate", f"./{NAME}/nowhere", "-p", "Hi", "--model", "MODEL"],
    ["m7mlx-convert", "MODEL", "--plan"],
    ["m7mlx-convert", "MODEL", "--plan", "--json"],
    ["m7mlx-convert", "MODEL", "--mlx-path", f"out-{NAME[:99]}"],
    ["m7mlx-convert", "MODEL", "--mlx-path", f"out-{NAME[:99]}", "--force", "--json"],
    ["m7mlx-convert", "BROKEN", "--mlx-path", "out"],
    ["m7mlx-convert", "BROKEN", "--mlx-path", "out", "--json"],
    ["m7mlx-convert", "verify", f"out-{NAME[:99]}", "--against", "MODEL"],
    ["m7mlx-eval", "MODEL", "--text", "TEXT"],
    ["m7mlx-eval", "MODEL", "--text", "TEXT", "--against", "MODEL"],
    ["m7mlx-eval", "MODEL", "--text", f"{NAME}.txt"],
    ["m7mlx-bench", "BROKEN"],
    ["m7mlx-serve", "--model", "BROKEN"],
    ["m7mlx-serve", "--model", f"./{NAME}/nowhere"],
    ["m7mlx-plan", "MODEL", "--ranks", "1"],
    ["m7mlx-plan", "BROKEN", "--ranks", "1"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    work = tmp_path_factory.mktemp("lines")
    shutil.copytree(model_folder, work / NAME)
    broken = work / ("broken" + NAME)
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": NAME, "architectures": [NAME]}))
    (work / ("text" + NAME)).write_text("Words, " * 40 + NAME)
    return work


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c).replace(NAME, "…")[:60])
def test_nothing_on_the_terminal_is_a_control(command: list[str], folder: Path) -> None:
    names = {"MODEL": f"./{NAME}", "BROKEN": f"./broken{NAME}", "TEXT": f"text{NAME}"}
    program = [str(Path(sys.executable).parent / command[0]), *(names.get(part, part) for part in command[1:])]
    written = on_terminal(program, cwd=folder, M7MLX_DATA=str(folder / "data"), M7MLX_CONFIG=str(folder / "config"))
    assert "word" in written or "-p" in command, written
    assert not [sequence for sequence in OURS.findall(written) if "7777" in sequence]
    left = OURS.sub("", written).replace("\r", "").replace("\n", "").replace("\t", "")
    assert not set(UNSAFE.findall(left))
    assert ("Traceback" in written) == ("--debug" in command), written
    for line in written.splitlines():
        if "--json" in command and line.startswith("{"):
            json.loads(line)


def test_into_a_pipe_text_goes_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    make_streams_safe()
    print(EVIL)
    assert capsys.readouterr().out == EVIL + "\n"


def test_tables_and_bars_of_rich_hold_no_markup_and_no_controls() -> None:
    program = (
        "from m7mlx.terminal import console, make_streams_safe; from rich.table import Table\n"
        "from rich.progress import Progress, TextColumn, BarColumn; from hostile import EVIL; import sys\n"
        "make_streams_safe(); t = Table('word' + EVIL, title='title' + EVIL); t.add_row(EVIL); console().print(t)\n"
        "console(stderr=True).print('plain' + EVIL)\n"
        "with Progress(TextColumn('{task.description}', markup=False), BarColumn(), console=console()) as p:\n"
        "    p.add_task('task{' + EVIL, total=2); print('printed' + EVIL); print('error' + EVIL, file=sys.stderr)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")])
    written = on_terminal([sys.executable, "-c", program], PYTHONPATH=path)
    for word in ("word", "title", "plain", "task{", "printed", "error"):
        assert word in written
    assert MARKUP in written
    assert "\x1b[" in OURS.findall(written)[0]  # rich's own are there
    assert not [sequence for sequence in OURS.findall(written) if "7777" in sequence]
    assert not set(UNSAFE.findall(OURS.sub("", written).replace("\r", "").replace("\n", "")))
