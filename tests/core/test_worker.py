"""A process for work that a stranger's input could make endless.

It is bounded, never mixed up with another, and never left behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import m7mlx
from m7mlx import worker as worker_module
from m7mlx.errors import WorkerDiedError, WorkerError, WorkerMemoryError, WorkerTimeError
from m7mlx.worker import Worker
from m7mlx.worker_process import MAX_FRAME

SECONDS = 20.0  # for what ends long before
ECHO = b"reply = b'here'"


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker("worker_jobs", b"the setup") as made:
        yield made


def is_gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends within some seconds; one that nobody has waited for is there."""
    until = time.monotonic() + seconds
    while psutil.pid_exists(pid):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_it_answers_and_keeps_what_it_knows(worker: Worker) -> None:
    assert worker.ask(b"reply = setup", SECONDS) == b"the setup"
    worker.ask(b"kept = 5", SECONDS)
    assert worker.ask(b"reply = b'%d' % kept", SECONDS) == b"5"
    assert worker.ask(b"", SECONDS) == b""


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000, MAX_FRAME - 100])
def test_frames_of_every_size_go_both_ways(worker: Worker, size: int) -> None:
    assert worker.ask(b"reply = b'x' * %d" % size, SECONDS) == b"x" * size
    question = b"import inspect; reply = b'%d' % len(inspect.currentframe().f_back.f_locals['data'])#"
    question += b"x" * max(0, size - len(question))
    assert worker.ask(question, SECONDS) == b"%d" % len(question)


def test_more_than_a_frame_is_refused_and_harms_nothing(worker: Worker) -> None:
    worker.ask(b"kept = b'kept'", SECONDS)
    with pytest.raises(WorkerMemoryError):
        worker.ask(bytes(MAX_FRAME + 1), SECONDS)
    assert worker.ask(b"reply = kept", SECONDS) == b"kept"


@pytest.mark.parametrize(
    ("job", "kind"),
    [
        ("while True: pass", WorkerTimeError),
        ("x = 10 ** 10 ** 9", WorkerTimeError),  # one operation that does not come back to Python
        ("time.sleep(1000)", WorkerTimeError),
        ("os.kill(os.getpid(), 19)", WorkerTimeError),  # stopped
        ("x = b'a' * 10**10", WorkerMemoryError),
        ("x = []\nwhile True: x.append(b'a' * 100000)", WorkerMemoryError),
        ("reply = bytes(65 << 20)", WorkerMemoryError),
        ("os.abort()", WorkerDiedError),
        ("import ctypes; ctypes.string_at(0)", WorkerDiedError),
        ("os._exit(0)", WorkerDiedError),
        ("sys.exit()", WorkerDiedError),
        ("1 / 0", WorkerDiedError),
        ("class Panic(BaseException): pass\nraise Panic", WorkerDiedError),
        ("def f(): f()\nf()", WorkerDiedError),
        ("os.write(0, b'nonsense, more than a header has')", WorkerDiedError),
    ],
)
def test_what_goes_wrong_is_one_error_and_the_next_question_is_answered(
    worker: Worker, job: str, kind: type[WorkerError]
) -> None:
    worker.ask(b"", SECONDS)
    pid, alive = worker.pid, worker.alive
    assert pid and alive
    with pytest.raises(kind) as caught:
        worker.ask(job.encode(), seconds=2.0 if kind is WorkerTimeError else SECONDS)
    assert type(caught.value) is kind
    assert not worker.alive
    assert is_gone(pid, 0)  # waited for, too
    assert worker.ask(ECHO, SECONDS) == b"here"


def test_the_processors_time_is_bounded_apart_from_the_clocks(worker: Worker) -> None:
    worker.ask(b"", SECONDS)
    with pytest.raises(WorkerTimeError):
        worker.ask(b"while True: pass", seconds=600.0, cpu=0.2)
    assert worker.ask(b"time.sleep(0.5); reply = b'slept'", SECONDS, cpu=0.2) == b"slept"
    for _ in range(4):  # each job has its own
        assert worker.ask(
            b"t = time.process_time()\nwhile time.process_time() < t + 0.1: pass\n" + ECHO, SECONDS, 0.3
        )


def test_memory_is_bounded_where_the_system_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "RLIMITS", False)
    with Worker("worker_jobs", memory=200 << 20) as worker:
        unlimited = b"import resource; reply = b'%d' % resource.getrlimit(resource.RLIMIT_AS)[0]"
        assert worker.ask(unlimited, SECONDS) == b"%d" % -1
        assert worker.ask(b"x = b'a' * (100 << 20); time.sleep(0.1); del x; " + ECHO, SECONDS) == b"here"
        for job in (b"x = b'a' * (1 << 30); time.sleep(9)", b"x = []\nwhile True: x.append(b'a' * 100000)"):
            with pytest.raises(WorkerMemoryError):
                worker.ask(job, SECONDS)
            assert worker.ask(ECHO, SECONDS) == b"here"


def test_what_happens_on_the_line_during_a_job_does_not_end_it(worker: Worker) -> None:
    """The system may tell of a request's arrival when its job is already under way."""
    worker.ask(b"", SECONDS)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(worker.ask, b"time.sleep(0.5); " + ECHO, SECONDS)
        time.sleep(0.2)
        assert worker._ends
        worker._ends.line.send(b"?")
        assert asked.result() == b"here"


@pytest.mark.parametrize("rlimits", [True, False])
def test_a_job_may_be_given_less_memory(monkeypatch: pytest.MonkeyPatch, rlimits: bool) -> None:
    monkeypatch.setattr(worker_module, "RLIMITS", rlimits)
    with Worker("worker_jobs", memory=1 << 30) as worker:
        fill = b"x = b'a' * %d; time.sleep(0.2); del x; reply = b'done'"
        for _ in range(3):
            assert worker.ask(fill % (300 << 20), SECONDS, memory=400 << 20) == b"done"
            assert worker.ask(fill % (30 << 20), SECONDS, memory=40 << 20) == b"done"  # nothing is left of the first
            assert worker.ask(fill % (300 << 20) + b"#" * (20 << 20), SECONDS) == b"done"
        with pytest.raises(WorkerMemoryError):
            worker.ask(fill % (50 << 20), SECONDS, memory=40 << 20)


def test_the_process_has_nothing_of_this_one(worker: Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    with (tmp_path / "open").open("w") as kept:
        os.set_inheritable(kept.fileno(), True)
        look = """if True:
            import json, m7mlx, resource
            limits = [resource.getrlimit(getattr(resource, "RLIMIT_" + n))[0] for n in ("CORE", "FSIZE")]
            fds = [fd for fd in range(100) if os.path.exists(f"/dev/fd/{fd}")]
            leads = os.getsid(0) == os.getpid()
            found = [sorted(os.environ), "mlx" in sys.modules, limits, fds, leads, m7mlx.__path__]
            reply = json.dumps(found).encode()"""
        environment, has_mlx, limits, files, leads, places = json.loads(worker.ask(look.encode(), SECONDS))
    assert not [name for name in environment if "HF_" in name or "PYTHON" in name or "HOME" in name]
    assert len(environment) < 12
    assert not has_mlx
    assert limits == [0, 0]
    assert files[:3] == [0, 1, 2] and len(files) == 4  # the last one is the rope
    assert leads  # a session of its own: no terminal sends it signals
    assert places == list(m7mlx.__path__)


def test_it_gets_ready_before_it_is_asked() -> None:
    with Worker("worker_jobs", b"run:kept = b'ready'") as worker:
        worker.start()
        worker.start()
        pid = worker.pid
        assert worker.ask(b"reply = kept", SECONDS) == b"ready"
        assert worker.pid == pid


@pytest.mark.parametrize("module", ["no_such_module", "worker_jobs"])
def test_what_cannot_start_says_so_each_time(module: str) -> None:
    with Worker(module, b"run:raise ValueError('the cause')") as worker:
        worker.start()
        for _ in range(2):
            with pytest.raises(WorkerDiedError, match=r"no_such_module|the cause"):
                worker.ask(ECHO, SECONDS)
            assert not worker.alive


def test_a_setup_without_end_is_bounded() -> None:
    with Worker("worker_jobs", b"run:while True: pass", startup=1.0) as worker, pytest.raises(WorkerTimeError):
        worker.ask(ECHO, SECONDS)


def test_no_python_to_start(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as changed:
        changed.setattr(sys, "executable", "/no/python")
        with pytest.raises(WorkerDiedError, match="cannot be started"):
            worker.ask(ECHO, SECONDS)
    assert worker.ask(ECHO, SECONDS) == b"here"


def test_without_restart_what_it_knew_is_lost_for_good() -> None:
    with Worker("worker_jobs", restart=False) as worker:
        assert worker.ask(ECHO, SECONDS) == b"here"
        with pytest.raises(WorkerDiedError):
            worker.ask(b"os._exit(1)", SECONDS)
        with pytest.raises(WorkerDiedError):
            worker.ask(ECHO, SECONDS)
        worker.start()
        assert not worker.alive


def test_one_that_was_ended_between_questions_is_replaced(worker: Worker) -> None:
    worker.ask(b"", SECONDS)
    assert worker.pid
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert worker.ask(ECHO, SECONDS) == b"here"


def test_closing_in_the_middle_of_a_job(worker: Worker) -> None:
    worker.ask(b"", SECONDS)
    pid = worker.pid
    assert pid
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(worker.ask, b"time.sleep(600)", 600.0) for _ in range(3)]
        time.sleep(0.2)
        begun = time.monotonic()
        worker.close()
        for one in asked:
            with pytest.raises(WorkerDiedError, match="closed"):
                one.result()
    assert time.monotonic() - begun < SECONDS  # not 600
    assert is_gone(pid, 0)
    with pytest.raises(WorkerDiedError, match="closed"):
        worker.ask(ECHO, SECONDS)
    worker.close()


def test_threads_share_one_and_have_their_own(worker: Worker) -> None:
    def ask(n: int) -> None:
        for i in range(20):
            assert worker.ask(b"reply = b'%d %d'" % (n, i), SECONDS) == b"%d %d" % (n, i)
        with Worker("worker_jobs") as own:
            own.start()
            with pytest.raises(WorkerError):
                own.ask(b"os._exit(1)", SECONDS)
            assert own.ask(b"reply = b'%d'" % n, SECONDS) == b"%d" % n

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))


async def test_an_event_loop_goes_on_meanwhile(worker: Worker) -> None:
    await asyncio.to_thread(worker.ask, b"", SECONDS)
    asked = asyncio.create_task(asyncio.to_thread(worker.ask, b"while True: pass", 60.0, 0.5))
    turns = 0
    while not asked.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns > 5
    with pytest.raises(WorkerTimeError):
        await asked


def test_an_interrupted_question_does_not_leave_its_answer_to_the_next(worker: Worker) -> None:
    worker.ask(b"", SECONDS)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            worker.ask(b"time.sleep(0.6); reply = b'the first'", SECONDS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert worker.ask(ECHO, SECONDS) == b"here"


def test_signals_that_this_process_ignores_and_blocks_are_not(worker: Worker) -> None:
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF, signal.SIGALRM, signal.SIGIO})
    try:
        worker.ask(b"", SECONDS)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGPROF, before)
    with pytest.raises(WorkerTimeError):
        worker.ask(b"while True: pass", seconds=600.0, cpu=0.2)


def run_python(code: str, path: str = "", cwd: Path | None = None) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": path or os.pathsep.join([str(Path(__file__).parents[1] / "support"), *sys.path]),
    }
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", textwrap.dedent(code)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=cwd, text=True, stdout=pipe, stderr=pipe)


ASKING = """
    import sys, threading, time
    import m7mlx
    from m7mlx.worker import Worker
    worker = Worker({module!r})
    worker.ask(b"", 30.0)
    print(worker.pid, flush=True)
    def ask():
        try: worker.ask({job!r}, 600.0)
        except m7mlx.M7Error as error: print(error, flush=True)
    thread = threading.Thread(target=ask, daemon={daemon})
    thread.start()
    time.sleep(0.5)
    {then}
"""


@pytest.mark.parametrize("job", [b"time.sleep(600)", b"10 ** 10 ** 9", b"while True: pass"])
def test_it_does_not_outlive_a_killed_parent(job: bytes) -> None:
    if sys.platform != "linux" and b"**" in job:
        pytest.skip("what does not come back to Python is ended by its clock there")
    self_kill = "import os; os.kill(os.getpid(), 9)"
    with run_python(ASKING.format(module="worker_jobs", job=job, daemon=True, then=self_kill)) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert parent.wait(30) == -signal.SIGKILL
    assert is_gone(pid)


def test_it_does_not_outlive_a_killed_parent_elsewhere() -> None:
    self_kill = "import os; os.kill(os.getpid(), 9)"
    asking = ASKING.format(module="worker_jobs_elsewhere", job=b"while True: pass", daemon=True, then=self_kill)
    with run_python(asking) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
    assert is_gone(pid)


@pytest.mark.parametrize("daemon", [True, False])
@pytest.mark.parametrize("then", ["pass", "sys.exit(3)", "worker.close(); sys.exit(3)"])
def test_an_interpreter_that_leaves_waits_for_no_job(daemon: bool, then: str) -> None:
    asking = ASKING.format(module="worker_jobs", job=b"time.sleep(600)", daemon=daemon, then=then)
    with run_python(asking) as parent:
        output, errors = parent.communicate(timeout=30)
    assert parent.returncode == (3 if "exit" in then else 0)
    assert errors == ""
    assert is_gone(int(output.split()[0]), 1)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="a copy of a process with threads is a warning there")
def test_a_copy_of_this_process_asks_a_process_of_its_own() -> None:
    code = """
        import os, sys
        import m7mlx
        from m7mlx.worker import Worker
        worker = Worker("worker_jobs")
        ask = lambda: int(worker.ask(b"reply = b'%d' % os.getpid()", 30.0))
        first = ask()
        if not os.fork():
            assert ask() != first
            worker.close()
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
        assert ask() == first
    """
    with run_python(code) as parent:
        output, errors = parent.communicate(timeout=60)
    assert (parent.returncode, errors, output) == (0, "", "")


def test_it_works_from_a_zip_file(tmp_path: Path) -> None:
    package = Path(m7mlx.__file__).parent
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as packed:
        for name in ("errors", "worker", "worker_process", "worker_start"):
            packed.write(package / f"{name}.py", f"m7mlx/{name}.py")
        packed.writestr("m7mlx/__init__.py", "")
        packed.write(Path(__file__).parents[1] / "support" / "worker_jobs.py", "worker_jobs.py")
    code = """
        from m7mlx.worker import Worker
        with Worker("worker_jobs") as worker:
            print(worker.ask(b"import m7mlx; reply = repr(m7mlx.__path__).encode()", 30.0).decode())
    """
    with run_python(code, str(tmp_path / "all.zip"), tmp_path) as parent:
        output, errors = parent.communicate(timeout=60)
    assert (output.strip(), errors) == (repr([str(tmp_path / "all.zip" / "m7mlx")]), "")


def test_it_is_found_from_another_folder_by_a_relative_path(tmp_path: Path) -> None:
    shutil.copytree(Path(m7mlx.__file__).parent, tmp_path / "m7mlx", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).parents[1] / "support" / "worker_jobs.py", tmp_path)
    code = """
        import os
        from m7mlx.worker import Worker
        with Worker("worker_jobs") as worker:
            print(worker.ask(b"import m7mlx; reply = m7mlx.__path__[0].encode()", 30.0).decode())
    """
    with run_python(code, ".", tmp_path) as parent:
        output, errors = parent.communicate(timeout=60)
    assert (output.strip(), errors) == (str(tmp_path / "m7mlx"), "")


# --- copies ---------------------------------------------------------------------------------------


def test_whoever_has_many_files_open_can_have_copies() -> None:
    """As a server with many connections: its files have high numbers."""
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(100)]
    try:
        with Worker("worker_jobs", b"the setup") as original, original.copy() as copy:
            assert copy.ask(b"reply = setup", SECONDS) == b"the setup"
    finally:
        for file in held:
            os.close(file)


def test_a_copy_knows_what_the_original_knew_and_learns_for_itself(worker: Worker) -> None:
    worker.ask(b"kept = [1]", SECONDS)
    with worker.copy() as one, worker.copy() as other:
        assert len({worker.pid, one.pid, other.pid}) == 3
        one.ask(b"kept.append(2)", SECONDS)
        assert one.ask(b"reply = b'%d' % len(kept)", SECONDS) == b"2"
        assert other.ask(b"reply = b'%d' % len(kept)", SECONDS) == b"1"
        assert worker.ask(b"reply = b'%d' % len(kept)", SECONDS) == b"1"
        pids = [one.pid, other.pid]
    assert all(pid and is_gone(pid) for pid in pids)


@pytest.mark.parametrize(
    ("job", "error"),
    [
        (b"os.kill(os.getpid(), 11)", WorkerDiedError),
        (b"while True: pass", WorkerTimeError),
        (b"x = b'x' * (2 << 30)", WorkerMemoryError),
        (b"os._exit(0)", WorkerDiedError),
    ],
)
def test_what_ends_a_copy_ends_no_other(worker: Worker, job: bytes, error: type[WorkerError]) -> None:
    with worker.copy() as bad, worker.copy() as good:
        pid = bad.pid
        with pytest.raises(error):
            bad.ask(job, 20.0, 0.3)
        assert pid and is_gone(pid)
        with pytest.raises(WorkerError):  # what it knew is lost: there is no other one
            bad.ask(ECHO, SECONDS)
        assert good.ask(ECHO, SECONDS) == worker.ask(ECHO, SECONDS) == b"here"


def test_a_copy_outlives_its_original_and_not_its_line(worker: Worker) -> None:
    copy = worker.copy()
    worker.close()
    assert copy.ask(ECHO, SECONDS) == b"here"
    pid = copy.pid
    failed: list[str] = []

    def ask() -> None:
        try:
            copy.ask(b"while True: pass", SECONDS)
        except WorkerError as error:
            failed.append(type(error).__name__)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.2)
    copy.close()
    asking.join(SECONDS)
    assert failed == ["WorkerDiedError"] and pid and is_gone(pid)


def test_copies_are_bounded_where_the_system_does_not_bound_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "RLIMITS", False)
    with Worker("worker_jobs", memory=200 << 20) as original, original.copy() as copy:
        pid = copy.pid
        with pytest.raises(WorkerMemoryError):
            copy.ask(b"kept = [b'x' * (50 << 20) for _ in range(20)]\nwhile True: time.sleep(1)", SECONDS)
        assert pid and is_gone(pid)
        assert original.ask(ECHO, SECONDS) == b"here"


def test_a_job_may_have_a_process_of_its_own(worker: Worker) -> None:
    worker.ask(b"from m7mlx.worker import Worker", SECONDS)
    worker.ask(b"inner = Worker('worker_jobs', b'given'); inner.ask(b'', 20)", SECONDS)
    pid = int(worker.ask(b"reply = b'%d' % inner.pid", SECONDS))
    assert psutil.pid_exists(pid)
    worker.close()
    assert is_gone(pid)
