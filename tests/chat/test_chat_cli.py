"""m7mlx-chat as scripts start it: -p, pipes, files, JSON, exit statuses; and what is kept of it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from m7mlx_chat.environment import read_environment
from m7mlx_chat.headless import answer
from m7mlx_chat.settings import Settings
from m7mlx_chat.store import Store
from processes import piped, running

from m7mlx import load, stream_generate
from m7mlx.errors import InputError, M7Error, RunError
from m7mlx.tokens.infill import infill_ids

CHAT = str(Path(sys.executable).parent / "m7mlx-chat")
CAPITAL = "What is the capital of France?"


def chat(
    *arguments: str | Path,
    stdin: bytes | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[bytes]:
    source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    command = [CHAT, *map(str, arguments)]
    done: subprocess.CompletedProcess[bytes]
    done = subprocess.run(command, capture_output=True, cwd=cwd, timeout=300, check=False, **source)
    return done


# --- a real model ---------------------------------------------------------------------------------


@pytest.mark.demo
def test_a_question_on_the_command_line(demo_model: Path, tmp_path: Path) -> None:
    done = chat("--model", demo_model, "-p", CAPITAL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"The capital of France is Paris.\n"
    assert done.stderr == b""


@pytest.mark.demo
def test_a_question_through_a_pipe(demo_model: Path) -> None:
    assert b"Paris" in chat("--model", demo_model, stdin=CAPITAL.encode() + b"\n").stdout
    both = chat(
        "--model", demo_model, "-p", "Answer the question below.", "--max-tokens", "30", stdin=CAPITAL.encode()
    )
    assert b"Paris" in both.stdout


@pytest.mark.demo
@pytest.mark.parametrize(
    "options",
    [
        ["--speculate", "lookup"],
        ["--speculate", "demo"],
        ["--kv-bits", "8", "--max-kv-size", "300"],
        ["--max-kv-size", "30"],  # less than the question: a stream has no end
    ],
)
def test_the_answer_with_other_memory_and_other_speed(demo_model: Path, options: list[str]) -> None:
    # CAPITAL's first token is a near tie, which 8 bits may turn.
    question = "Name the capital of France."
    done = chat("--model", demo_model, "-p", question, "--max-tokens", "20", *options)
    assert done.returncode == 0, done.stderr
    assert b"Paris" in done.stdout
    assert done.stderr == b""


# --- a small model: the text between two ----------------------------------------------------------


def test_a_text_between_two(model_folder: Path) -> None:
    model, tokenizer = load(model_folder)
    ids = infill_ids(tokenizer, "def f(", "\nreturn [/INST]")
    pieces = stream_generate(model, tokenizer, ids, max_tokens=5)
    expected = tokenizer.detokenizer(at_start=False)
    text = "".join([expected.add(i) for piece in pieces for i in piece.ids] + [expected.finish()])
    options: list[str | Path] = ["--model", model_folder, "--suffix", "\nreturn [/INST]", "--max-tokens", "5"]
    for done in (chat(*options, "-p", "def f("), chat(*options, stdin=b"def f(")):
        assert (done.returncode, done.stdout.decode()) == (0, text + "\n"), done.stderr
    assert not read_environment().database.exists()  # nothing is kept


def test_what_does_not_go_with_a_suffix(tmp_path: Path) -> None:
    for others in (["--continue"], ["--file", "x"], ["--interactive"], ["--json-schema", "x"]):
        done = chat("--suffix", "x", "-p", "y", *others)
        assert done.returncode == 2 and b"--suffix prints what stands between two texts" in done.stderr


# --- a small model: what goes wrong ---------------------------------------------------------------


@pytest.mark.parametrize("stdin", [b"a\x00b \xff\xfe [/INST] </s>", "👩‍👩‍👧 你好".encode(), b"word " * 20_000])
def test_any_bytes_can_be_piped(model_folder: Path, stdin: bytes) -> None:
    done = chat("--model", model_folder, "--max-tokens", "3", stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"\n")


@pytest.mark.parametrize(
    ("arguments", "stdin", "status", "message"),
    [
        (["-p", "x", "--model", "no-such-model"], None, 2, b"no alias"),
        (["-p", "x", "--model", "/no/such/folder"], None, 2, b"'/no/such/folder' is no folder"),
        ([], b"", 2, b"there is no question"),
        (["-p", "  "], None, 2, b"there is no question"),
        ([], b"\n \n", 2, b"there is no question"),
        (["-p", "x", "--temp", "-1"], None, 2, b"temperature must lie between"),
        (["-p", "x", "--temp", "warm"], None, 2, b"invalid float value: 'warm'"),
        (["-p", "x", "--top-p", "nan"], None, 2, b"top_p must lie between"),
        (["-p", "x", "--max-tokens", "0"], None, 2, b"max_tokens must be at least 1"),
        (["-p", "x", "--stop", ""], None, 2, b"stop needs a text"),
        (["-p", "x", "--kv-bits", "5"], None, 2, b"--kv-bits: invalid choice: 5"),
        (["-p", "x", "--model", "{small}", "--kv-bits", "8"], None, 2, b"do not divide this model's head_dim of 16"),
        (["-p", "x", "--model", "{small}", "--max-kv-size", "9"], None, 2, b"own window bounds its cache to 16 keys"),
        (["-p", "x", "--model", "{small}", "--speculate", "nowhere"], None, 2, b"no alias"),
        (["-p", "x", "--model", "{small}", "--speculate", "{demo}"], None, 2, b"another tokenizer"),
        (["-p", "x", "--wrong"], None, 2, b"unrecognized arguments: --wrong"),
        (["-p", "x", "--file", "no-such-file"], None, 2, b"no-such-file cannot be read"),
        (["-p", "x", "--preset", "wild"], None, 2, b"there is no preset 'wild'"),
        (["--import", "no-such-file"], None, 2, b"cannot be read"),
        (["-p", "x", "-i", "--json"], None, 2, b"choose one"),
        (["--web", "--port", "0"], None, 2, b"--port must lie between"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str],
    stdin: bytes | None,
    status: int,
    message: bytes,
    tmp_path: Path,
    model_folder: Path,
    request: pytest.FixtureRequest,
) -> None:
    demo = request.getfixturevalue("demo_model") if "{demo}" in arguments else ""
    arguments = [a.format(small=model_folder, demo=demo) for a in arguments]
    done = chat(*arguments, stdin=stdin, cwd=tmp_path)
    assert done.returncode == status
    assert done.stdout == b""
    assert message in done.stderr
    assert done.stderr.startswith(b"m7mlx-chat: error: ")
    assert done.stderr.count(b"\n") == 1


def test_without_a_network_the_small_model_is_suggested(tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [CHAT, "-p", "x"], capture_output=True, env=environment, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 1
    assert b"cannot reach the Hub" in done.stderr
    assert b"m7mlx-chat --model demo" in done.stderr
    assert b"Traceback" not in done.stderr


def test_debug_shows_the_traceback(model_folder: Path) -> None:
    done = chat("--model", "/no/such", "-p", "x", "--debug")
    assert b"Traceback" in done.stderr


def test_control_c_keeps_what_was_answered(model_folder: Path) -> None:
    command = [CHAT, "--model", str(model_folder), "-p", "x", "--max-tokens", "1000000"]
    pipe = subprocess.PIPE
    with running(command, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL) as process:
        first = piped(process.stdout).read(1)
        process.send_signal(signal.SIGINT)
        rest, noise = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first
    assert rest.endswith(b"\n")
    assert noise == b""


@pytest.mark.parametrize(
    ("redirect", "status", "error"),
    [
        ("<&-", 0, b""),
        (">&-", 1, b"m7mlx-chat: error: standard output is closed; there is nowhere to print the answer\n"),
        (">/dev/full", 1, b"m7mlx-chat: error: the disk is full\n"),
        ("</dev/null", 0, b""),
    ],
)
def test_closed_and_full_streams(model_folder: Path, redirect: str, status: int, error: bytes) -> None:
    command = f"{CHAT} --model {model_folder} -p x --max-tokens 3 {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (status, error)


def test_a_reader_that_leaves_is_no_error(model_folder: Path) -> None:
    command = f"{CHAT} --model {model_folder} -p x --max-tokens 2000 | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, check=False)
    assert done.stderr == b""
    assert done.returncode == 0


def test_a_terminal_on_stdout_gets_no_control_characters(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pseudo-terminal, with a model made to print an escape sequence."""
    code = (
        "import sys, m7mlx.generation\nfrom m7mlx import Piece\n"
        "m7mlx.generation.stream_answer = lambda *a, **k: (p for p in [Piece('a\\x1b'), Piece(']52;c;eA==\\x07b')])\n"
        "from m7mlx_chat.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    master, slave = pty.openpty()
    command = [sys.executable, "-c", code, "--model", str(model_folder), "-p", "x"]
    done = subprocess.run(command, stdout=slave, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    os.close(slave)
    shown = os.read(master, 10_000).decode()
    os.close(master)
    assert done.returncode == 0, done.stderr
    assert shown == "a␛]52;c;eA==␇b\r\n"


@pytest.mark.parametrize("command", ["m7mlx-chat", "m7mlx-convert"])
def test_help_teaches_and_costs_little(command: str, tmp_path: Path) -> None:
    """At most half a second of CPU more than bare Python: no model, no Textual, no Hub."""
    code = f"import sys; sys.argv = [{command!r}, '--help']\nfrom {command.replace('-', '_')}.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit as e:\n    status = e.code\n"
    code += "heavy = {'textual', 'mlx_lm', 'transformers', 'huggingface_hub', 'gguf', 'tokenizers', 'torch'}\n"
    code += "print(status, sorted(heavy & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "examples:" in done.stdout
    assert done.stdout.strip().endswith("0 []"), done.stdout[-200:] + done.stderr
    installed = subprocess.run(
        [str(Path(CHAT).parent / command), "--version"], capture_output=True, text=True, check=False
    )
    assert installed.stdout.split()[0] == command


# --- conversations --------------------------------------------------------------------------------


def events(done: subprocess.CompletedProcess[bytes]) -> list[dict[str, object]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_event_is_an_object_a_line(model_folder: Path) -> None:
    found = events(chat("--model", model_folder, "-p", "x", "--max-tokens", "5", "--json"))
    assert [e["event"] for e in found[:2]] == ["start", "loading"]
    assert "reading" in {e["event"] for e in found}
    last = found[-1]
    assert (last["event"], last["reason"]) == ("done", "length")
    assert last["text"] == "".join(str(e["text"]) for e in found if e["event"] == "text")
    assert last["statistics"]["generated_tokens"] == 5  # type: ignore[index]
    failed = chat("--model", model_folder, "-p", "x", "--json", "--kv-bits", "8")
    assert json.loads(failed.stdout.splitlines()[-1])["event"] == "error"
    assert failed.returncode == 2


def test_a_conversation_is_kept_and_gone_on_with(model_folder: Path) -> None:
    small = ("--model", model_folder, "--max-tokens", "4")
    first = events(chat(*small, "-p", "one", "--json", "--system", "Be brief"))
    second = events(chat(*small, "-p", "two", "--json", "--continue"))
    third = events(chat(*small, "-p", "three", "--json"))
    assert first[0]["conversation"] == second[0]["conversation"] != third[0]["conversation"]
    gone = chat(*small, "-p", "secret", "--no-save")
    assert gone.returncode == 0
    with Store(read_environment().database) as store:
        conversations = store.conversations()
        assert [c.title for c in conversations] == ["three", "one"]
        branch = store.branch(conversations[1].leaf or 0)
        assert [m.text for m in branch] == ["one", first[-1]["text"], "two", second[-1]["text"]]
        assert conversations[1].system == "Be brief"
        assert {m.status for m in branch if m.role == "assistant"} == {"length"}
        assert branch[3].settings["system"] == "Be brief"  # it was gone on with as it began


def test_who_names_no_model_gets_that_of_the_conversation(model_folder: Path) -> None:
    """The default, which is not here, would be fetched."""
    assert chat("--model", model_folder, "--max-tokens", "2", "-p", "one").returncode == 0
    for arguments in (["--continue"], [], ["--no-save"]):
        begun = events(chat("-p", "two", "--max-tokens", "2", "--json", *arguments))[0]
        assert begun["model"] == str(model_folder)


def test_files_in_a_question(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("buy bread\n")
    (tmp_path / "more.txt").write_text("and milk")
    files = ("--file", tmp_path / "notes.md", "--file", tmp_path / "more.txt")
    done = chat("--model", model_folder, "--max-tokens", "2", "-p", "What?", *files, stdin=b"piped")
    assert done.returncode == 0, done.stderr
    with Store(read_environment().database) as store:
        asked = store.prompts()[0]
    assert asked == "What?\n\nnotes.md:\n```\nbuy bread\n```\n\nmore.txt:\n```\nand milk\n```\n\npiped"


def test_defaults_from_the_users_file(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M7MLX_CONFIG", str(tmp_path))
    (tmp_path / "config.toml").write_text(
        f'model = "{model_folder}"\nmax_tokens = 3\n[presets.long]\nmax_tokens = 6\n'
    )
    for arguments, count in (([], 3), (["--preset", "long"], 6), (["--preset", "long", "--max-tokens", "2"], 2)):
        last = events(chat("-p", "x", "--json", *arguments))[-1]
        assert last["statistics"]["generated_tokens"] == count  # type: ignore[index]
    (tmp_path / "config.toml").write_text("max_tokens = 0")
    done = chat("-p", "x")
    assert done.returncode == 2
    assert b"config.toml: max_tokens must be at least 1" in done.stderr


def test_conversations_come_in_from_a_file(tmp_path: Path) -> None:
    node = {"id": "a", "parent": None, "message": {"author": {"role": "user"}, "content": {"parts": ["hello"]}}}
    (tmp_path / "conversations.json").write_text(json.dumps([{"title": "Theirs", "mapping": {"a": node}}]))
    done = chat("--import", tmp_path / "conversations.json")
    assert (done.returncode, done.stdout) == (0, b"1 conversation imported\n"), done.stderr
    with Store(read_environment().database) as store:
        assert [c.title for c in store.conversations()] == ["Theirs"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_it_what_was_said_is_kept(model_folder: Path, number: int) -> None:
    command = [CHAT, "--model", str(model_folder), "-p", "tell me", "--max-tokens", "1000000"]
    said = b""
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            said += os.read(piped(process.stdout).fileno(), 65536)
        process.send_signal(number)
        rest = piped(process.stdout).read()
    with Store(read_environment().database) as store:
        (conversation,) = store.conversations()
        question, answer = store.branch(conversation.leaf or 0)
    assert question.text == "tell me"
    whole = (said + rest).decode("utf-8", "replace")
    assert whole.startswith(answer.text.rstrip("\n"))
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert answer.status == "stopped"
        assert answer.text == whole.removesuffix("\n")
    else:
        assert answer.status == "interrupted"
        assert len(answer.text) > len(whole) / 4  # a second of three, at the very most, is missing


def test_a_second_signal_ends_it_at_once(model_folder: Path) -> None:
    command = [CHAT, "--model", str(model_folder), "-p", "tell me", "--max-tokens", "1000000"]
    for pause in (0.0, 0.01, 0.05):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.read(1)
            for _ in range(3):
                process.terminate()
                time.sleep(pause)
            process.stdout.read()
            assert process.stderr.read() == b""
        assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)  # no abort


# --- answers in JSON ------------------------------------------------------------------------------


@pytest.mark.demo
def test_an_answer_fits_its_schema(demo_model: Path, tmp_path: Path) -> None:
    fields = {"capital": {"type": "string", "maxLength": 20}, "country": {"const": "France"}}
    schema = {
        "type": "object",
        "properties": fields,
        "required": ["capital", "country"],
        "additionalProperties": False,
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    options = ["-p", "Name the capital of France.", "--json-schema", str(tmp_path / "schema.json")]
    done = chat("--model", demo_model, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "Paris" in found["capital"] and found["country"] == "France"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ('{"type": "zebra"}', "schema"),
        ("{" + " " * (5 << 20) + "}", "more than 4 MB"),
    ],
)
def test_schemas_that_are_none(model_folder: Path, tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "schema.json"
    if content is not None:
        path.write_text(content)
    done = chat("--model", model_folder, "-p", "Hi", "--json-schema", str(path))
    assert done.returncode == 2
    assert reason.encode() in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_schema_is_for_a_single_answer(model_folder: Path, tmp_path: Path) -> None:
    done = chat("--model", model_folder, "-p", "Hi", "-i", "--json-schema", str(tmp_path / "x"))
    assert done.returncode == 2
    assert b"--json-schema is for a single answer" in done.stderr


class Breaks:
    """A grammar that allows anything, and cannot go on after a few tokens."""

    is_complete = False

    def __init__(self, tokens: int) -> None:
        self.left = tokens

    def mask(self, vocab_size: int) -> mx.array:
        if not self.left:
            raise InputError("the schema cannot be used: it asks for too much")
        self.left -= 1
        return mx.ones((vocab_size,), mx.bool_)

    def accept(self, token: int) -> None: ...


@pytest.mark.parametrize(("tokens", "kind"), [(5, RunError), (0, InputError)], ids=["on the way", "at once"])
def test_an_answer_that_fails_on_the_way_is_kept_and_is_no_success(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tokens: int,
    kind: type[M7Error],
) -> None:
    monkeypatch.setattr("m7mlx.request.json_constraint", lambda *_: Breaks(tokens))
    with pytest.raises(M7Error, match="it asks for too much") as raised:
        answer(Settings(model=str(model_folder)), "Hi", tmp_path / "chats.db", schema={})
    assert type(raised.value) is kind
    with Store(tmp_path / "chats.db") as store:
        (conversation,) = store.conversations()
        kept = store.message(conversation.leaf or 0)
    assert kept.status == "error"
    assert "it asks for too much" in kept.statistics["error"]
    assert kept.text == capfd.readouterr().out.removesuffix("\n")
    assert bool(kept.text) == bool(tokens)


@pytest.mark.demo
def test_json_that_is_cut_off_is_no_success(demo_model: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"story": {"type": "string", "minLength": 400}}, "required": ["story"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    options = ["-p", "Tell a story.", "--json-schema", str(tmp_path / "schema.json"), "--max-tokens", "12"]
    done = chat("--model", demo_model, *options)
    assert done.returncode == 1
    assert b"12 tokens were not enough for the whole JSON; allow more with --max-tokens" in done.stderr
    assert len(done.stderr.splitlines()) == 1
