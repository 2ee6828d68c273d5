"""The chat in lines: what is typed and told, without a terminal and in one that is dumb."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from chat_harness import READY, ScriptedEngine, done, environment_in
from m7mlx_chat.actions import ACTIONS
from m7mlx_chat.config import Config
from m7mlx_chat.environment import read_environment
from m7mlx_chat.events import Event, Failed, Text, Thought, Titled
from m7mlx_chat.plain.reading import Lines, completions
from m7mlx_chat.plain.talk import Talk
from m7mlx_chat.plain.writing import Progress, Written
from m7mlx_chat.session import Session
from m7mlx_chat.settings import Settings
from m7mlx_chat.steps import Call
from m7mlx_chat.store import Store
from scripted_tools import ScriptedTools, called

from m7mlx import Request

CHAT = str(Path(sys.executable).parent / "m7mlx-chat")


class Answering(ScriptedEngine):
    """Loads at once, and answers with what was prepared, or with the number of the question."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[list[Event]] = []

    def load(self, folder: Path, settings: Settings) -> None:
        super().load(folder, settings)
        self.events.append(READY)

    def submit(self, request: Request) -> None:
        super().submit(request)
        text = f"answer {len(self.asked)}"
        self.events += self.prepared.pop(0) if self.prepared else [Text(text), done(text)]


class Typed(Lines):
    """Lines that a test types."""

    def __init__(self, *lines: str) -> None:
        self.is_terminal, self._editor, self._left = False, None, list(lines)

    def _line(self, prompt: str) -> str | None:
        return self._left.pop(0) if self._left else None


class ByHand(Typed):
    """Lines that are typed by a person, at a terminal."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.is_terminal = True


class Talking:
    """A talk over a database in a folder, and what it wrote."""

    def __init__(self, folder: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
        self.store, self.engine, self._capsys, self._folder = store, Answering(), capsys, folder
        self.session = Session(store, self.engine, Settings(model="a/model"))
        self.config = Config(folder / "config.toml", presets={"warm": {"temperature": 0.5}})
        self.kind = Typed

    def type(self, *lines: str, prepared: list[list[Event]] | None = None) -> tuple[str, str]:
        """Type lines and leave; returns what came on standard output and standard error."""
        self.engine.prepared += prepared or []
        written = Written()
        environment, typed = environment_in(self._folder), self.kind(*lines)
        talk = Talk(self.session, self.engine, self.config, environment, typed, written)
        talk.load(self._folder)
        self.status = talk.run()
        return self._capsys.readouterr()

    def said(self) -> list[str]:
        return [message.text for message in self.store.read(self.session.line)]


@pytest.fixture
def talking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Talking]:
    with Store(tmp_path / "chats.db") as store:
        yield Talking(tmp_path, store, capsys)


# --- tools ----------------------------------------------------------------------------------------


def test_tools_are_listed_and_turned_off(talking: Talking) -> None:
    tools = talking.session.tools = ScriptedTools()
    _, told = talking.type("/tools", "/tools off", "/tools ask look", "/tools ask x", "/tools y")
    assert "w: ready" in told and "look (asks): Looks." in told and "\x1b" not in told
    assert not tools.is_on
    for line in ("look is asked about again", "nothing is kept of a tool 'x'", "/tools shows them"):
        assert line in told


# --- questions and answers ------------------------------------------------------------------------


def test_answers_go_to_standard_output_and_nothing_else(talking: Talking) -> None:
    out, told = talking.type("Hello", "", "And?")
    assert (out, told, talking.status) == ("answer 1\nanswer 2\n", "", 0)
    assert talking.said() == ["Hello", "answer 1", "And?", "answer 2"]


def test_several_lines_are_one_message(talking: Talking) -> None:
    talking.type("one\\", "two", '"""three', "  four", 'five"""', '"""', "six\\", '"""', "seven \\")
    assert talking.said()[::2] == ["one\ntwo", "three\n  four\nfive", "six\\", "seven"]


def test_files_go_into_a_question(talking: Talking, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("buy milk")
    _, told = talking.type(f"What is in @{tmp_path}/notes.txt ?", "me@nowhere.example and @nothing stay")
    assert talking.said()[0] == "What is in \nnotes.txt:\n```\nbuy milk\n```\n ?"
    assert talking.said()[2] == "me@nowhere.example and @nothing stay"
    assert "with notes.txt: " in told


def test_what_a_model_says_is_never_obeyed(talking: Talking) -> None:
    answer = "a\x1b]52;c;eA==\x07b\x9b31m\u202e"
    bad: list[list[Event]] = [[Thought("\x1b[2J"), Text(answer), done(answer)], [Failed("no \x1b[31m way")]]
    out, told = talking.type("Hello", "again", "/stats", "/find a", "1", prepared=bad)
    assert out == "a␛]52;c;eA==␇b␦31m␦\n"
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", told)
    assert "thinking ..." in told and "error: no ␛[31m way" in told
    assert talking.status == 1


def test_an_answer_that_was_cut_is_gone_on_with(talking: Talking) -> None:
    cut: list[Event] = [Text("It is"), done("It is", "length")]
    out, told = talking.type("What is it?", "/continue", prepared=[cut, [Text(" over"), done(" over")]])
    assert out == "It is\n over\n"
    assert "cut at the longest length" in told
    assert talking.said() == ["What is it?", "It is over"]


@pytest.mark.parametrize("way", ["1", "2", "3", "something else"])
def test_a_full_conversation_offers_ways_to_go_on(talking: Talking, way: str) -> None:
    full: list[Event] = [Failed("too long", room=100)]
    _, told = talking.type("first", "second", way, prepared=[[Text("a"), done("a")], full])
    assert "1  Go on here" in told and "100 tokens at once" in told
    asked = [message.text for one in talking.store.conversations() for message in talking.store.tree(one.id).nodes]
    if way == "1":
        assert talking.engine.loaded[-1][1].max_kv_size == 100
        assert talking.said()[-2:] == ["second", "answer 3"]
    elif way == "2":
        assert talking.said()[0].startswith("Sum up the conversation below") and "I: first" in talking.said()[0]
        assert talking.said()[2:] == ["second", "answer 4"]
    elif way == "3":
        assert talking.said() == ["second", "answer 3"]
    else:
        assert "something else" in asked  # no number: a message like any other


@pytest.mark.parametrize(("word", "outcome"), [("once", "given"), ("ALWAYS", "given"), ("no", "refused"), ("", "")])
def test_a_call_of_a_tool_is_asked_about(talking: Talking, word: str, outcome: str) -> None:
    class Tools(ScriptedTools):
        def make(self, call: Call) -> None:
            super().make(call)
            self.give("in the \x1b[2J box")

    talking.session.tools = tools = Tools()
    calls: list[Event] = [called({"where": "here\x1b[2J"})]
    out, told = talking.type("Where is it?", "perhaps", word, prepared=[calls, [Text("There."), done("There.")]])
    assert 'The model calls look with {"where": "here\\u001b[2J"}' in told and "That is none of the four." in told
    steps = talking.store.message(talking.session.line[-1]).steps
    assert [call.outcome for step in steps for call in step.calls][: bool(outcome)] == [outcome] * bool(outcome)
    assert bool(tools.made) == (outcome == "given") and "\x1b" not in told
    assert out == ("There.\n" if word else "")


# --- commands -------------------------------------------------------------------------------------


def test_every_slash_command_is_known(talking: Talking) -> None:
    names = [action.slash for action in ACTIONS if action.slash and action.slash != "bye"]
    _, told = talking.type("Hello", *(f"/{name}" for name in names), "/bye", "never read")
    assert "there is no command" not in told
    assert re.findall(r"/(\w+) needs the chat on a screen", told) == ["theme"]
    assert "never read" not in talking.store.prompts()
    assert "there is no command /xyz" in talking.type("/xyz")[1]


def test_conversations_are_found_and_opened_by_number(talking: Talking) -> None:
    talking.type("about bees", "/new", "about cats")
    _, told = talking.type("/find bees", "1", "and wasps?")
    assert "about bees" in told and "A number opens one." in told
    assert talking.said()[:3] == ["about bees", "answer 1", "and wasps?"]
    talking.type("/find", "2", "/rename Cats", "/delete", "/undo", "7")
    assert talking.said()[0] == "about cats" and talking.said()[2] == "7"
    assert {one.title for one in talking.store.conversations()} == {"about bees", "Cats"}


def test_conversations_are_pinned_tagged_and_found_by_tag(talking: Talking) -> None:
    _, told = talking.type(
        "about bees", "/tag Work #home", "/tag -home", "/tag", "/pin", "/new", "about ants", "/find"
    )
    assert "tags: #work #home\ntags: #work\ntags: #work\npinned" in told
    first, second = (line for line in told.splitlines() if line[:3] in ("1  ", "2  "))
    assert "about bees (" in first and ", pinned, #work)" in first and "about ants (" in second
    _, told = talking.type("/find #work", "1", "/pin", "/find #nothing")
    assert "1  about bees (" in told and "2  " not in told and "no longer pinned" in told
    assert "nothing found" in told
    assert talking.said()[0] == "about bees"


def test_what_is_opened_tells_when_it_was_said(talking: Talking) -> None:
    _, told = talking.type("about bees", "/new", "/find bees", "1")
    assert re.search(r"^you \(\d\d:\d\d\): about bees\nmodel \(\d\d:\d\d\): answer 1$", told, re.MULTILINE)


def test_a_title_is_written_while_the_user_reads(talking: Talking, monkeypatch: pytest.MonkeyPatch) -> None:
    talking.kind = ByHand
    monkeypatch.setattr(
        talking.engine, "write_title", lambda number, _: talking.engine.events.append(Titled(number, "Insects"))
    )
    first: list[Event] = [Text("many"), done("many", prompt_tps=500.0)]
    talking.type("about bees", "/find", prepared=[first])
    assert [one.title for one in talking.store.conversations()] == ["Insects"]


def test_settings_and_presets(talking: Talking) -> None:
    _, told = talking.type(
        "/set temperature 0.3", "/set", "/set nothing", "/system Be brief", "/preset warm", "Hello"
    )
    assert "temperature: 0.3" in told and "there is no setting 'nothing'" in told
    assert talking.session.settings.temperature == 0.5
    assert talking.engine.messages()[0] == {"role": "system", "content": "Be brief"}
    assert len(talking.engine.loaded) == 1
    talking.type("/set kv_bits 8")
    assert talking.engine.loaded[-1][1].kv_bits == 8


def test_a_question_is_edited_and_answered_again(talking: Talking) -> None:
    talking.type("Hello", "/edit", "Good day", "/retry")
    assert talking.said() == ["Good day", "answer 3"]
    assert len(talking.store.siblings(talking.session.line[0])) == 2


def test_the_beginning_of_an_answer_is_given(talking: Talking) -> None:
    _, told = talking.type("/begin Well", "Hello", "/begin", "/begin Well, yes:")
    assert "nothing has been asked yet" in told and "/begin needs the words" in told
    assert talking.engine.asked[-1].continues == "Well, yes:"
    assert talking.said()[0] == "Hello" and talking.said()[1].startswith("Well, yes:")


def test_prompts_are_kept_and_filled_in(talking: Talking) -> None:
    kept = "Translate {{text}} to {{language}}."
    _, told = talking.type(kept, "/prompt save translate", "/prompt", "/prompt translate", "bread", "French")
    assert talking.said()[2] == "Translate bread to French." and "translate\n" in told


def test_another_model_answers_as_well(talking: Talking, model_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(model_folder)
    talking.type(f"/model {tmp_path}/one", "Hello", f"/compare {tmp_path}/two", "And?")
    assert [folder.name for folder, _ in talking.engine.loaded] == [tmp_path.name, "one", "two", "one"]
    answers = talking.store.answers(talking.session.line[0])
    assert [(one.text, Path(one.model).name) for one in answers] == [("answer 1", "one"), ("answer 2", "two")]
    assert talking.said()[2:] == ["And?", "answer 3"]


def test_exports_and_imports(talking: Talking, tmp_path: Path) -> None:
    talking.type("Hello", f"/export {tmp_path}/a.json", f"/import {tmp_path}/a.json")
    assert len(talking.store.conversations()) == 2
    assert talking.said() == ["Hello", "answer 1"]


def test_models_are_listed_and_taken_by_number_and_by_name(
    talking: Talking, model_folder: Path, tmp_path: Path
) -> None:
    own = tmp_path / "data" / "models" / "mine-4bit"
    own.parent.mkdir(parents=True)
    own.symlink_to(model_folder)
    _, told = talking.type("/model mine-4bit", "Hello", "/model nothing-of-the-kind")
    assert talking.session.settings.model == str(own) == talking.store.conversations()[0].model
    assert "nothing-of-the-kind" in told and "is no folder here" in told
    _, told = talking.type("/model")
    found = re.search(r"^(\d+)  mine-4bit: .*in use$", told, re.MULTILINE)
    assert found
    loaded = len(talking.engine.loaded)
    talking.type("/model", found[1])
    assert len(talking.engine.loaded) == loaded + 2


def test_progress_is_told_from_time_to_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(Written(), "reading", "token")
    for second in range(26):
        now[0] = 100.0 + second
        progress(second * 100, 2500)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "reading: 300 of 2,500 tokens",
        "reading: 1,300 of 2,500 tokens",
        "reading: 2,300 of 2,500 tokens",
    ]


def test_what_a_word_can_become(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "note\x1b[31m", "no t"):
        (tmp_path / name).write_text("")
    assert completions("/re", "/re") == ["/rename ", "/replay", "/retry"]
    assert completions("look at @no", "@no") == ["@notes.txt"]
    assert completions("look at no", "no") == []


# --- the program ----------------------------------------------------------------------------------


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([CHAT, *arguments], input=stdin, capture_output=True, timeout=120, check=False)


def test_lines_from_a_pipe_are_questions(model_folder: Path) -> None:
    done = run("--plain", "--model", str(model_folder), "--max-tokens", "4", stdin=b"one\ntwo\n/bye\nthree\n")
    assert done.returncode == 0, done.stderr
    with Store(read_environment().database) as store:
        (conversation,) = store.conversations()
        said = [message.text for message in store.branch(conversation.leaf or 0)]
    assert said[::2] == ["one", "two"]
    again = run("--plain", "--continue", "--max-tokens", "4", stdin=b"three\n")
    assert again.returncode == 0, again.stderr
    with Store(read_environment().database) as store:
        assert store.conversations()[0].messages == 6


def test_without_a_terminal_the_chat_goes_on_in_lines(model_folder: Path) -> None:
    done = run("--model", str(model_folder), "--max-tokens", "4", "-i", "-p", "x")
    assert done.returncode == 0
    assert done.stdout
    first, *_ = done.stderr.decode().splitlines()
    assert first == "m7mlx-chat: there is no terminal to draw the chat on; it goes on in lines, as with --plain"


def test_what_does_not_go_with_it() -> None:
    done = run("--plain", "--web")
    assert done.returncode == 2 and b"choose one" in done.stderr


class Teletype:
    """A terminal that obeys nothing, and all that was written to it."""

    def __init__(self, *arguments: str, term: str = "dumb") -> None:
        self.master, slave = pty.openpty()
        start = (
            "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "signal.signal(2, signal.default_int_handler); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, CHAT, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"TERM": term},
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, pattern: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not re.search(pattern, self.seen):
            assert time.monotonic() < until, self.seen
            self._read()

    def _read(self) -> bool:
        if select.select([self.master], [], [], 0.1)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Linux says so where the other side has gone
                return False
            self.seen += data.decode("utf-8", "replace")
            return bool(data)
        return True

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self.master, text.encode())

    def end(self) -> int:
        while self._read() and self.process.poll() is None:
            pass
        return self.process.wait(30)


@contextmanager
def teletype(*arguments: str, term: str = "dumb") -> Iterator[Teletype]:
    one = Teletype(*arguments, term=term)
    try:
        yield one
    finally:
        with suppress(ProcessLookupError):
            one.process.kill()
        one.process.wait()
        os.close(one.master)


def test_a_dumb_terminal_gets_the_chat_in_lines(model_folder: Path) -> None:
    """Ctrl-C stops an answer and drops a line, Tab completes, Ctrl-D leaves; nothing is drawn."""
    with teletype("--model", str(model_folder), "--max-tokens", "1000000") as terminal:
        terminal.wait_for("> $")
        assert "TERM=dumb) cannot show the chat; it goes on in lines, as with --plain" in terminal.seen
        written = terminal.seen
        terminal.type("tell me\n")
        terminal.wait_for(r"\w{20}|(\w+ ){5}")
        terminal.type("\x03")
        terminal.wait_for(r"\(stopped; /continue goes on\)\s+> $")
        written += terminal.seen
        terminal.type("half a line\x03")
        terminal.wait_for(r"Ctrl-D or /bye leaves\.\s+> $")
        written += terminal.seen
        terminal.type("/sta\t\n")
        terminal.wait_for(r"peak memory [\d.]+ GB\s+> $")
        written += terminal.seen
        terminal.type("\x04")
        assert terminal.end() == 0
        written += terminal.seen
    assert not re.search("[\x00-\x06\x0e-\x1f\x7f]", written.replace("^C", ""))
    with Store(read_environment().database) as store:
        (conversation,) = store.conversations()
        question, answer = store.branch(conversation.leaf or 0)
    assert (question.text, answer.status) == ("tell me", "stopped")


def test_a_signal_in_mid_answer_keeps_what_was_said(model_folder: Path) -> None:
    with teletype("--plain", "--model", str(model_folder), "--max-tokens", "1000000", term="xterm") as terminal:
        terminal.wait_for("> $")
        terminal.type("tell me\n")
        terminal.wait_for(r"\w{20}|(\w+ ){5}")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 128 + signal.SIGTERM
    with Store(read_environment().database) as store:
        answer = store.message(store.conversations()[0].leaf or 0)
    assert answer.status == "stopped" and answer.text
