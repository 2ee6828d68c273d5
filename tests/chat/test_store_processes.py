"""Several instances on one database, and kill -9 at any moment: what was stored stays."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chat_harness import check_database
from filelock import FileLock, Timeout
from m7mlx_chat import store as store_module
from m7mlx_chat.store import Store, schema
from m7mlx_chat.store.instances import Instance
from m7mlx_chat.store.rows import Node, Tree
from processes import running

from m7mlx.errors import RunError

NEWEST = len(schema.MIGRATIONS)  # the version of a new database
# Each line says what is on the disk by then.
ANSWERING = """
import sys
from pathlib import Path
from m7mlx_chat.store import Store

path, name, rounds, words = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = Store(path)
conversation = parent = None
print("open", flush=True)
for i in range(rounds):
    asked = store.ask(conversation, parent, f"{name} asks {i}", settings={"seed": i})
    print("ask", asked.conversation, asked.question, asked.answer, flush=True)
    text = ""
    for j in range(words):
        text += f"{name}{i}word{j} "
        store.grow(asked.answer, text)
        print("grow", asked.answer, j, flush=True)
    store.finish(asked.answer, "complete", text + "end", {"words": words}, list(range(words)))
    print("finish", asked.answer, flush=True)
    conversation, parent = asked.conversation, asked.answer
if rounds == 1:
    store.ask(conversation, parent, "the last")
    print("waiting", flush=True)
    sys.stdin.read()
store.close()
"""
OPENING = """
import sys
from pathlib import Path
from m7mlx_chat import store
from m7mlx_chat.store import schema

later = (
    *schema.MIGRATIONS,
    ("ALTER TABLE message ADD COLUMN extra TEXT", "UPDATE message SET text = text || ' two'"),
    ("UPDATE message SET text = text || ' three'",),
)
store.open_database = lambda path: schema.open_database(path, later)
print("ready", flush=True)
sys.stdin.readline()
with store.Store(Path(sys.argv[1])) as opened:
    print("open", opened._db.execute("PRAGMA user_version").fetchone()[0], len(opened.search("two")), flush=True)
"""
HOLDING = """
import sys
from filelock import FileLock

lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def program(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process of its own, dead when the block ends."""
    command = [sys.executable, "-c", script, *arguments]
    with running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


def lines(process: subprocess.Popen[str]) -> Iterator[list[str]]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line.split()


def check_kept(store: Store, said: list[list[str]], name: str) -> None:
    """Check that all that a killed program said it had stored is there."""
    asked = [tuple(map(int, line[1:])) for line in said if line[0] == "ask"]
    grown = {int(line[1]): int(line[2]) for line in said if line[0] == "grow"}
    finished = {int(line[1]) for line in said if line[0] == "finish"}
    for i, (conversation, question, answer) in enumerate(asked):
        assert store.message(question).text == f"{name} asks {i}"
        message = store.message(answer)
        assert (message.conversation, message.parent) == (conversation, question)
        text = "".join(f"{name}{i}word{j} " for j in range(grown.get(answer, -1) + 1))
        assert message.text.startswith(text)
        if answer in finished:
            assert message.status == "complete" and message.text.endswith("end") and message.ids is not None
        elif message.status != "complete":  # the kill came before the line that says so
            assert message.status == "interrupted"
            # Half a word would be half a transaction.
            assert all(word.startswith(f"{name}{i}word") for word in message.text.split())


def test_kill_9_at_any_moment_loses_nothing_that_was_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the other writes without a pause; a slow disk adds to that
    monkeypatch.setattr(schema, "_BUSY_SECONDS", 60.0)
    path = tmp_path / "chats.db"
    chance = random.Random(5)
    with Store(path) as survivor:  # answers all the while, and must not be taken for dead
        mine = survivor.ask(None, None, "a question of the survivor")
        for round_ in range(7):
            name = f"r{round_}x"
            said = []
            wanted = chance.randrange(1, 120)
            with program(ANSWERING, path, name, 1000, 20) as process:
                for line in lines(process):
                    said.append(line)
                    if len(said) == wanted:
                        break
                survivor.grow(mine.answer, f"so far {round_}")
                time.sleep(chance.random() / 50)
                process.kill()
                said += [line for line in lines(process) if line]
            assert process.wait() == -signal.SIGKILL
            with Store(path) as opened:
                # of the last line only a part may have come out
                check_kept(opened, said[:-1], name)
                assert opened.message(mine.answer).status == "answering"
                assert opened.message(mine.answer).text == f"so far {round_}"
            check_database(path)
        survivor.finish(mine.answer, "complete", "whole")
    with Store(path) as opened:
        assert opened.message(mine.answer).text == "whole"
        statuses = opened._db.execute("SELECT DISTINCT status FROM message").fetchall()
        assert {row["status"] for row in statuses} <= {"complete", "interrupted"}
    assert list((tmp_path / "instances").iterdir()) == []


def test_two_instances_write_at_once_and_neither_loses_anything(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with program(ANSWERING, path, "left", 40, 5) as left, program(ANSWERING, path, "right", 40, 5) as right:
        said = {"left": list(lines(left)), "right": list(lines(right))}
        assert left.wait() == right.wait() == 0
    with Store(path) as store:
        for name, known in said.items():
            assert sum(line[0] == "finish" for line in known) == 40
            check_kept(store, known, name)
            last = [line for line in known if line[0] == "ask"][-1]
            branch = store.branch(int(last[3]))
            assert [m.text for m in branch if m.role == "user"] == [f"{name} asks {i}" for i in range(40)]
        assert len(store.conversations()) == 2
    check_database(path)


def test_only_the_answers_of_the_dead_are_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with Store(path) as here, program(ANSWERING, path, "other", 1, 2) as other:
        for line in lines(other):
            if line[0] == "waiting":
                break
        (answer,) = [row["id"] for row in here._db.execute("SELECT id FROM message WHERE status = 'answering'")]
        here.recover()
        with Store(path):  # in the same process as `here`, too
            assert here.message(answer).status == "answering"
        other.kill()
        other.wait()
        assert here.message(answer).status == "answering"  # nobody has looked yet
        mine = here.ask(None, None, "mine")
        here.recover()
        assert here.message(answer).status == "interrupted"
        assert here.message(mine.answer).status == "answering"
        assert [file.name for file in (tmp_path / "instances").iterdir()] == [f"{here._instance.name}.lock"]


def test_an_instance_that_leaves_in_order_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with program(ANSWERING, path, "other", 1, 2) as other:
        for line in lines(other):
            if line[0] == "waiting":
                break
        assert other.stdin is not None
        other.stdin.close()
        assert other.wait() == 0
    db = sqlite3.connect(path)
    assert db.execute("SELECT status FROM message ORDER BY id DESC LIMIT 1").fetchone() == ("interrupted",)
    db.close()
    assert not list((tmp_path / "instances").iterdir()) and not list(tmp_path.glob("chats.db-*"))


@pytest.mark.parametrize("old", [False, True])
def test_several_instances_open_a_new_or_an_old_database_at_once(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "chats.db"
    if old:
        plant(path, 100)
    programs = [program(OPENING, path) for _ in range(4)]
    processes = [p.__enter__() for p in programs]
    try:
        said = [lines(process) for process in processes]
        assert [next(one) for one in said] == [["ready"]] * 4
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [next(one) for one in said] == [["open", str(NEWEST + 2), "50" if old else "0"]] * 4
        assert [process.wait() for process in processes] == [0] * 4
    finally:
        for p in programs:
            p.__exit__(None, None, None)
    assert len(list(tmp_path.glob(f"chats.db.v{NEWEST}.*.bak"))) == old  # one of them did the work
    check_database(path)


def test_kill_9_on_the_way_to_a_newer_version_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    whole = tmp_path / "whole.db"
    plant(whole, 3_000)
    chance = random.Random(3)
    for i in range(6):
        path = tmp_path / str(i) / "chats.db"
        path.parent.mkdir()
        path.write_bytes(whole.read_bytes())
        with program(OPENING, path) as process:
            assert next(lines(process)) == ["ready"]
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            time.sleep(chance.random() * 0.3)
            process.kill()
            process.wait()
        db = sqlite3.connect(path)
        version = db.execute("PRAGMA user_version").fetchone()[0]
        endings = {NEWEST: "word", NEWEST + 1: "word two", NEWEST + 2: "word two three"}
        assert db.execute("SELECT DISTINCT text FROM message").fetchall() == [(endings[version],)]
        db.close()
        check_database(path)
        for copy in path.parent.glob("*.bak"):
            db = sqlite3.connect(copy)
            text = endings[db.execute("PRAGMA user_version").fetchone()[0]]
            assert db.execute("SELECT text, count(*) FROM message GROUP BY text").fetchall() == [(text, 3_000)]
            db.close()
        with program(OPENING, path) as process:
            said = process.communicate("go\n")[0].split()
        assert said[:3] == ["ready", "open", str(NEWEST + 2)]


def plant(path: Path, count: int) -> None:
    """A database with one conversation."""
    nodes = tuple(Node(parent=i - 1 if i else None, role="user", text="word", created=i) for i in range(count))
    with Store(path) as store:
        store.plant([Tree(title="t", automatic=True, created=0, updated=0, leaf=count - 1, nodes=nodes)])


def test_an_instance_is_registered_where_nobody_can_take_it_for_dead(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the making of its file and the lock on it."""
    path = tmp_path / "chats.db"

    def register(folder: Path) -> Instance:
        with pytest.raises(Timeout):
            FileLock(f"{path}.lock").acquire(timeout=0)
        return Instance(folder)

    monkeypatch.setattr(store_module, "Instance", register)
    Store(path).close()
    FileLock(f"{path}.lock").acquire(timeout=0).lock.release()  # free again


def test_who_waits_too_long_for_another_to_open_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chats.db"
    monkeypatch.setattr(store_module, "_OPENING_SECONDS", 0.01)
    with program(HOLDING, f"{path}.lock") as process:
        assert next(lines(process)) == ["held"]
        with pytest.raises(RunError, match="another m7mlx-chat"):
            Store(path)
    Store(path).close()  # the lock went with the process
