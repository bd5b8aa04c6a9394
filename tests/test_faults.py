"""Faults of the machine and of `claude`.

The disk is full; the database is locked, damaged or deleted; the clock jumps; files and processes
run out; `claude` is replaced or breaks its protocol. In each case the client gets an error, no
accepted request is lost, and the bridge recovers by itself once the cause is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest

import claude_api_bridge as cab
from conftest import (
    MODULE, TESTS, Answer, Api, FakeClaude, Program, RunningBridge, is_running, wait_until,
)
from test_stream import script

Bridges = Callable[..., RunningBridge]
Fakes = Callable[..., FakeClaude]

# More than the free space in the pages of the database.
BIG = "x" * 20_000
linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="sets the limits of a process from outside"
)


def stores_of(running: RunningBridge) -> cab.Stores:
    """Return the bridge's own stores: some faults need their connection."""
    server: Any = running.bridge._server
    stores: cab.Stores = server.dispatcher._service.stores
    return stores


def database(running: RunningBridge) -> Path:
    return running.data_dir / "bridge.db"


def refused(answer: Answer, *words: str) -> bool:
    """Return whether it is the 503 for a failed database, with one of these words in it."""
    assert (answer.status, answer.json["code"]) == (503, "unavailable"), answer.data
    return any(word in answer.json["error"] for word in words)


def accepted(api: Api) -> Tuple[List[str], int]:
    """Return (the ids of all requests, newest first; the number of requests in the usage)."""
    requests = api.get("/api/requests?limit=100").json["requests"]
    count = api.get("/api/usage").json["total"]["requests"]
    return [request["requestId"] for request in requests], count


def reading_works(api: Api, job: str) -> None:
    """Check that requests which only read succeed."""
    for path in ("/api/ask/" + job, "/api/requests", "/api/usage", "/api/status", "/api/tokens"):
        assert api.get(path).status == 200, path


# --- a full disk ---


@contextlib.contextmanager
def full_disk(running: RunningBridge) -> Iterator[None]:
    """Make SQLite report a full disk: the file must not grow."""
    db = stores_of(running).database._db
    # SQLite raises the number to the present size.
    db.execute("PRAGMA max_page_count = 1")
    try:
        yield
    finally:
        db.execute("PRAGMA max_page_count = 1000000")


def test_a_full_disk_refuses_new_requests_completely_and_serves_readers(bridge: Bridges) -> None:
    running = bridge()
    admin = running.admin
    job = admin.ask("hi")
    admin.done(job)
    before = accepted(admin)
    key = {"Idempotency-Key": "once"}
    with full_disk(running):
        for _ in range(2):
            assert refused(admin.post("/api/ask", {"message": BIG}, headers=key), "full")
        reading_works(admin, job)
        assert accepted(admin) == before
    retry = admin.post("/api/ask", {"message": BIG}, headers=key)
    assert retry.status == 202
    assert admin.done(retry.json["requestId"])["status"] == "completed"
    assert accepted(admin) == ([retry.json["requestId"], *before[0]], before[1] + 1)


@pytest.mark.parametrize(
    "last, status",
    [({"result": BIG}, "completed"), ({"fail": {"result": BIG}}, "error")],
    ids=["answer", "failure"],
)
def test_the_result_of_a_run_on_a_full_disk_is_stored_once_there_is_room(
    bridge: Bridges, fake_claude: Fakes, gate: Path, last: Dict[str, Any], status: str
) -> None:
    running = bridge()
    job = running.admin.ask(script({"wait": str(gate)}, last))
    wait_until(lambda: running.admin.poll(job)["status"] == "processing")
    with full_disk(running):
        gate.touch()
        wait_until(lambda: any("cannot be stored" in line for line in running.log))
        # The result is not on disk yet.
        assert running.admin.poll(job)["status"] == "processing"
    body = running.admin.done(job)
    assert (body["status"], body["attempts"], len(fake_claude().prompts())) == (status, 1, 1)
    assert (body.get("response") or body["error"]).startswith("x" * 1000)
    assert running.admin.answer("next")["response"] == "Echo: next"


def test_a_request_that_a_full_disk_cut_off_runs_again_after_a_restart(
    bridge: Bridges, gate: Path
) -> None:
    running = bridge()
    admin = running.admin
    job = admin.ask(script({"wait": str(gate)}, {"result": BIG}))
    wait_until(lambda: admin.poll(job)["status"] == "processing")
    # The disk stays full until the bridge ends.
    stores_of(running).database._db.execute("PRAGMA max_page_count = 1")
    gate.touch()
    wait_until(lambda: any("cannot be stored" in line for line in running.log))
    running.bridge.__exit__(None, None, None)
    after = bridge()
    body = Api(after.port, admin.token).done(job)
    assert (body["response"], body["attempts"]) == (BIG, 2)


# The bridge in a process that may write no file larger than 4 KiB.
LIMITED = (
    "import resource, sys; "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY)); "
    "sys.path.insert(0, %r); sys.argv[0] = %r; "
    "import claude_api_bridge as cab; cab.run()" % (str(MODULE.parent), str(MODULE))
)


def limit_file_size(pid: int, size: Optional[int]) -> None:
    """Set the largest file that a process may write; None: no limit."""
    import resource

    limits = (resource.RLIM_INFINITY if size is None else size, resource.RLIM_INFINITY)
    # Only Linux has prlimit.
    prlimit: Any = getattr(resource, "prlimit")  # noqa: B009
    prlimit(pid, resource.RLIMIT_FSIZE, limits)


@linux_only
def test_health_reports_a_disk_that_takes_no_more_data_and_the_bridge_recovers(
    program: Callable[..., Program], gate: Path
) -> None:
    running = program()
    api = running.api
    job = api.ask("hold %s" % gate)
    wait_until(lambda: api.poll(job)["status"] == "processing")
    limit_file_size(running.process.pid, 4096)
    assert refused(api.get("/health"), "disk", "full")
    assert refused(api.post("/api/ask", {"message": "hi"}), "disk", "full")
    gate.touch()
    wait_until(lambda: "cannot be stored" in running.stderr)
    assert api.poll(job)["status"] == "processing"
    assert api.get("/api/requests").status == 200
    limit_file_size(running.process.pid, None)
    body = api.done(job)
    assert (body["response"], body["attempts"]) == ("held", 1)
    assert api.get("/health").status == 200
    assert api.answer("next")["response"] == "Echo: next"


@linux_only
def test_a_start_on_a_full_disk_ends_with_an_error_and_leaves_the_database_alone(
    bridge: Bridges, fake_claude: Fakes, tmp_path: Path
) -> None:
    running = bridge()
    running.admin.answer("hi")
    running.bridge.__exit__(None, None, None)
    before = database(running).read_bytes()
    done = subprocess.run(
        [
            sys.executable, "-S", "-c", LIMITED, "start", "--no-tunnel", "--host", "127.0.0.1",
            "--port", "0", "--data-dir", str(running.data_dir), "--claude", str(fake_claude().path),
        ],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert "hint: " in done.stderr
    # The hint must not advise to remove the file.
    assert "away" not in done.stderr.lower()
    assert "aside" not in done.stderr
    assert database(running).read_bytes() == before
    assert not list(running.data_dir.glob("*damaged*"))


# --- a database that cannot be written, or is locked ---


def test_a_read_only_database_serves_readers_and_recovers(bridge: Bridges) -> None:
    running = bridge()
    admin = running.admin
    job = admin.ask("hi")
    admin.done(job)
    before = accepted(admin)
    stores_of(running).database._db.execute("PRAGMA query_only = ON")
    assert refused(admin.post("/api/ask", {"message": "hi"}), "readonly")
    assert refused(admin.get("/health"), "readonly")
    assert refused(admin.post("/api/tokens", {"name": "new"}), "readonly")
    reading_works(admin, job)
    assert accepted(admin) == before
    stores_of(running).database._db.execute("PRAGMA query_only = OFF")
    assert admin.get("/health").status == 200
    assert admin.answer("next")["response"] == "Echo: next"


@contextlib.contextmanager
def locked(path: Path, how: str = "IMMEDIATE") -> Iterator[None]:
    """Hold a lock in another connection, as a program that never ends its transaction."""
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as other:
        other.execute("BEGIN " + how)
        yield
        other.execute("ROLLBACK")


@pytest.mark.parametrize("how", ["IMMEDIATE", "EXCLUSIVE"])
def test_a_lock_of_another_program_delays_writers_for_a_bounded_time_and_no_reader(
    bridge: Bridges, how: str
) -> None:
    running = bridge()
    admin = running.admin
    job = admin.ask("hi")
    admin.done(job)
    before = accepted(admin)
    answers: List[Answer] = []

    def write() -> None:
        answers.append(admin.post("/api/ask", {"message": "late"}))

    writers = [threading.Thread(target=write, name="writes") for _ in range(4)]
    with locked(database(running), how):
        for thread in writers:
            thread.start()
        for _ in range(10):
            reading_works(admin, job)
        # The writers still wait, so no reader waited for them.
        assert not answers
        assert refused(admin.get("/health"), "locked", "busy")
        assert accepted(admin) == before
    for thread in writers:
        thread.join(30)
    assert [answer.status for answer in answers] == [202] * 4
    bodies = [admin.done(answer.json["requestId"]) for answer in answers]
    assert [body["status"] for body in bodies] == ["completed"] * 4
    assert admin.get("/health").status == 200


# --- a damaged database ---


def page(number: int) -> Callable[[bytes], bytes]:
    """Return a function that overwrites this page."""
    return lambda data: data[: number * 4096] + b"\xff" * 4096 + data[(number + 1) * 4096 :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"somebody's notes\n" * 1000,
        lambda data: data[:4096] + b"\xff" * (len(data) - 4096),
        lambda data: data[: len(data) // 8192 * 4096],
        page(2),
        lambda data: page(len(data) // 4096 - 1)(data),
    ],
    ids=["text", "all pages", "cut", "one page", "last page"],
)
def test_the_bridge_moves_a_damaged_database_away_and_starts(
    bridge: Bridges, spoil: Callable[[bytes], bytes]
) -> None:
    first = bridge()
    first.admin.answer(BIG)
    first.bridge.__exit__(None, None, None)
    path = database(first)
    path.write_bytes(spoil(path.read_bytes()))
    spoiled = path.read_bytes()
    after = bridge()
    (copy,) = after.data_dir.glob("bridge-damaged-*.db")
    assert copy.read_bytes() == spoiled
    assert copy.stat().st_mode & 0o077 == 0
    # The log names the file, and what the loss of it means for the tokens.
    assert any(str(copy) in line and "tokens" in line for line in after.log)
    assert after.admin.token
    assert after.admin.answer("hi")["response"] == "Echo: hi"
    assert Api(after.port, first.admin.token).get("/api/requests").status == 401
    after.bridge.__exit__(None, None, None)
    # A second time on the same day: the bridge does not overwrite the first file.
    path.write_bytes(spoiled)
    assert bridge().admin.get("/health").status == 200
    assert len(list(after.data_dir.glob("bridge-damaged-*.db"))) == 2
    assert copy.read_bytes() == spoiled


def lock_it(path: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        yield


def make_it_newer(path: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        db.execute("PRAGMA user_version = 99")
    yield


def put_a_folder(path: Path) -> Iterator[None]:
    path.rename(path.with_name("elsewhere"))
    path.mkdir()
    yield


@pytest.mark.parametrize("fault", [lock_it, make_it_newer, put_a_folder])
def test_a_database_that_is_only_locked_newer_or_unreadable_stays_where_it_is(
    bridge: Bridges, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], Iterator[None]]
) -> None:
    first = bridge()
    first.bridge.__exit__(None, None, None)
    monkeypatch.setattr(cab, "WRITE_SECONDS", 0.1)
    with contextlib.contextmanager(fault)(database(first)):
        with pytest.raises(cab.CannotStart) as raised:
            bridge()
    assert not isinstance(raised.value, cab.DatabaseCorrupt)
    # The hint must not advise to remove the file.
    assert "aside" not in raised.value.hint
    assert "away" not in raised.value.hint
    assert database(first).exists()
    assert not list(first.data_dir.glob("*damaged*"))


def test_damage_while_the_bridge_runs_is_reported_and_the_next_start_moves_the_file_away(
    bridge: Bridges,
) -> None:
    running = bridge()
    running.admin.answer(BIG)
    path = database(running)
    with contextlib.closing(sqlite3.connect(str(path))) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    for answer in (
        running.admin.get("/api/requests"), running.admin.post("/api/ask", {"message": "hi"}),
        running.admin.get("/health"),
    ):
        assert refused(answer, "damaged")
        assert "Restart the bridge" in answer.json["error"]
    running.bridge.__exit__(None, None, None)
    after = bridge()
    assert after.admin.answer("hi")["response"] == "Echo: hi"
    assert len(list(after.data_dir.glob("bridge-damaged-*.db"))) == 1


@pytest.mark.skipif(os.name != "posix", reason="Windows does not delete a file that is open")
@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_bridge_whose_database_was_deleted_accepts_no_request(
    bridge: Bridges, is_replaced: bool
) -> None:
    running = bridge()
    job = running.admin.ask("hi")
    running.admin.done(job)
    shutil.rmtree(running.data_dir)
    if is_replaced:
        running.data_dir.mkdir()
        cab.Stores(database(running), cab.Clock()).close()
    for answer in (running.admin.post("/api/ask", {"message": "hi"}), running.admin.get("/health")):
        assert refused(answer, "deleted or replaced")
        assert "Restart the bridge" in answer.json["error"]
    # The open file can still be read.
    assert running.admin.poll(job)["response"] == "Echo: hi"


@pytest.mark.parametrize("spare", [0, 1])
def test_a_deleted_work_folder_is_created_again(bridge: Bridges, spare: int) -> None:
    running = bridge(spare=spare)
    running.admin.answer("hi")
    shutil.rmtree(running.data_dir / "work")
    assert running.admin.answer("next")["response"] == "Echo: next"
    wait_until((running.data_dir / "work").is_dir)


def test_runs_fail_while_a_file_has_the_name_of_the_work_folder(bridge: Bridges) -> None:
    running = bridge()
    (running.data_dir / "work").write_text("a file")
    body = running.admin.answer("hi")
    assert body["errorCode"] == "cli_error"
    assert "work" in body["error"]
    (running.data_dir / "work").unlink()
    assert running.admin.answer("next")["response"] == "Echo: next"


# --- a clock that is set ---


class SetClock(cab.Clock):
    """The real clock, set wrongly by `wrong` seconds."""

    wrong = 0.0

    def now(self) -> float:  # type: ignore[override, unused-ignore]
        return super().now() + self.wrong


YEARS = 10 * 365 * 86_400.0


@pytest.mark.parametrize("wrong", [YEARS, -YEARS])
def test_a_clock_that_is_set_wrongly_and_back_loses_nothing(
    bridge: Bridges, gate: Path, wrong: float
) -> None:
    clock = SetClock()
    running = bridge(clock=clock)
    admin = running.admin
    app = admin.new_token("app", expiresInDays=7)
    first = app.ask("first")
    app.done(first)
    key = {"Idempotency-Key": "once"}
    keyed = app.post("/api/ask", {"message": "keyed"}, headers=key).json["requestId"]
    app.done(keyed)
    held = admin.ask("hold %s" % gate)
    wait_until(lambda: admin.poll(held)["status"] == "processing")
    # The clock jumps during a run.
    clock.wrong = wrong
    later = [admin.ask("later"), admin.ask("and then")]
    assert app.get("/api/requests").status == (401 if wrong > 0 else 200)
    gate.touch()
    bodies = [admin.done(job) for job in (held, *later)]
    assert [body["response"] for body in bodies] == ["held", "Echo: later", "Echo: and then"]
    assert all(body["durationMs"] >= 0 for body in bodies)
    clock.wrong = 0.0
    after = admin.ask("after")
    admin.done(after)
    assert accepted(admin)[0] == [after, *reversed(later), held, keyed, first]
    assert app.poll(first)["response"] == "Echo: first"
    assert app.post("/api/ask", {"message": "keyed"}, headers=key).json["requestId"] == keyed
    assert admin.get("/health").status == 200


class HouseClock(cab.Clock):
    """A wall clock and a monotonic clock that the test moves separately."""

    def __init__(self) -> None:
        self.at, self.passed = 1_800_000_000.0, 0.0

    def now(self) -> float:  # type: ignore[override, unused-ignore]
        return self.at

    def monotonic(self) -> float:  # type: ignore[override, unused-ignore]
        return self.passed

    def advance(self, seconds: float) -> None:
        self.at += seconds
        self.passed += seconds


class NoPool:
    """Replaces the process pool in a test of the maintenance alone."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def test_requests_are_deleted_when_time_has_passed_not_when_the_clock_jumped(
    tmp_path: Path,
) -> None:
    clock = HouseClock()
    stores = cab.Stores(tmp_path / "bridge.db", clock)
    with contextlib.closing(stores):
        token = stores.tokens.add(cab.NewToken(name="app"), "secret")
        pool: Any = NoPool()
        runner = cab.ClaudeRunner(pool)
        worker = cab.Worker(stores, runner, cab.Notifier(), cab.Config(keep_days=30), clock)
        job = stores.jobs.enqueue(token.id, cab.Ask("hi")).job
        claimed = stores.jobs.claim()
        assert claimed
        assert stores.jobs.complete(claimed, cab.Answer("kept"))
        worker._run_maintenance()
        clock.at += YEARS
        clock.advance(3601)
        # The first maintenance after the jump.
        worker._run_maintenance()
        assert stores.jobs.get(job.id)
        assert stores.usage.by_day("2000-01-01")
        clock.at -= YEARS
        for _ in range(2):
            clock.advance(3601)
            worker._run_maintenance()
        assert stores.jobs.get(job.id)
        assert stores.usage.by_day("2000-01-01")
        for _ in range(30 * 24):
            clock.advance(3601)
            worker._run_maintenance()
        # After 30 days by both clocks.
        assert stores.jobs.get(job.id) is None


# --- claude is replaced while the bridge runs ---


def removed(fake: FakeClaude) -> None:
    fake.path.unlink()


def not_executable(fake: FakeClaude) -> None:
    fake.path.chmod(0o644)


def no_program(fake: FakeClaude) -> None:
    replace_program(fake, "\0\1\2 half a download")


def too_old(fake: FakeClaude) -> None:
    replace_program(fake, "#!/bin/sh\necho '1.0.0 (Claude Code)'\n")


def replace_program(fake: FakeClaude, text: str) -> None:
    """Replace the program as an update does: by a new file with the same name."""
    part = fake.path.with_name("claude.part")
    part.write_text(text)
    part.chmod(0o755)
    os.replace(part, fake.path)


@pytest.mark.skipif(os.name != "posix", reason="a running program cannot be replaced on Windows")
@pytest.mark.parametrize(
    "spare, fault, words",
    [
        # Not with a spare: an idle process answers once more.
        (0, removed, lambda fake: str(fake.path)),
        (0, not_executable, lambda fake: str(fake.path)),
        (1, not_executable, lambda fake: str(fake.path)),
        (0, no_program, lambda fake: str(fake.path)),
        (1, no_program, lambda fake: str(fake.path)),
        (0, too_old, lambda fake: "1.0.0 (Claude Code) is too old"),
        (1, too_old, lambda fake: "1.0.0 (Claude Code) is too old"),
    ],
)
def test_runs_fail_with_a_reason_while_claude_cannot_be_run(
    bridge: Bridges,
    fake_claude: Fakes,
    spare: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fault: Callable[[FakeClaude], None],
    words: Callable[[FakeClaude], str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fake = fake_claude()
    running = bridge(fake, spare=spare)
    assert running.admin.answer("hi")["response"] == "Echo: hi"
    good = fake.path.read_text()
    fault(fake)
    body = running.admin.answer("lost")
    assert body["errorCode"] == "cli_error", body
    assert words(fake) in body["error"]
    assert running.admin.get("/health").status == 200
    replace_program(fake, good)
    assert running.admin.answer("next")["response"] == "Echo: next"


@pytest.mark.skipif(os.name != "posix", reason="a running program cannot be replaced on Windows")
def test_after_an_update_the_new_claude_answers_and_the_old_idle_process_ends(
    bridge: Bridges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    versions = [
        FakeClaude(tmp_path / "one"),
        FakeClaude(tmp_path / "two", version="2.1.400 (Claude Code)"),
    ]
    link = tmp_path / "claude"
    link.symlink_to(versions[0].path)

    def update(target: FakeClaude) -> None:
        link.with_name("new").symlink_to(target.path)
        os.replace(link.with_name("new"), link)

    class Link(FakeClaude):
        def __init__(self) -> None:
            self.path = link

    running = bridge(Link(), spare=1)
    running.admin.answer("first")
    # The process that answered, and the next idle one.
    wait_until(lambda: len(versions[0].children()) == 2)
    update(versions[1])
    assert running.admin.answer("second")["response"] == "Echo: second"
    assert (versions[0].prompts(), versions[1].prompts()) == (["first"], ["second"])
    wait_until(lambda: not any(is_running(start["pid"]) for start in versions[0].children()))
    update(versions[0])
    assert running.admin.answer("third")["response"] == "Echo: third"
    assert versions[0].prompts() == ["first", "third"]


# --- claude breaks its protocol at each point ---

# The start of a program that a row of MISDEEDS completes.
RAW = """import os, sys, time
sys.path.insert(0, %r)
try:
    from fake_json import dumps, loads
except ImportError:
    from json import dumps, loads
out = sys.stdout.buffer

def put(data):
    out.write(data)
    out.flush()

def say(**message):
    put(dumps(message).encode() + b"\\n")

def read():
    return loads(sys.stdin.buffer.readline())

def greet():
    response = {"subtype": "success", "request_id": read()["request_id"], "response": {}}
    say(type="control_response", response=response)

def begin():
    greet()
    read()
    say(type="system", subtype="init", session_id="s", apiKeySource="none", model="m", tools=[])
    say(type="stream_event", event={"type": "message_start", "message": {"id": "msg"}})

def delta(text="fi"):
    delta = {"type": "text_delta", "text": text}
    say(type="stream_event", event={"type": "content_block_delta", "index": 0, "delta": delta})

def result(text="fine", **more):
    fields = {"type": "result", "subtype": "success", "is_error": False, "result": text}
    say(**{**fields, "usage": {}, "total_cost_usd": 0, **more})

def answer(**more):
    begin()
    delta()
    result(**more)

with open(%r, "a") as log:
    log.write("%%d\\n" %% os.getpid())
"""


def failed(words: str) -> Tuple[str, str]:
    """Return the end of a row whose request fails with these words in the text."""
    return "cli_error", words


# A name; the code of the program; the end of the request: its answer, a failure, or None if both
# an answer and a cli_error are right.
MISDEEDS: Dict[str, Tuple[str, Any]] = {
    # It dies.
    "dies before the greeting": (
        "sys.stderr.write('oh no'); sys.exit(3)",
        failed("(exit code 3) without an answer: oh no"),
    ),
    "dies of a signal": ("os.kill(os.getpid(), 9)", failed("exit code -9")),
    "dies after the greeting": ("greet(); os._exit(4)", failed("exit code 4")),
    "dies after the prompt": ("greet(); read(); os._exit(5)", failed("exit code 5")),
    "dies in the middle": ("begin(); delta(); os._exit(6)", failed("exit code 6")),
    "dies in a line": ('begin(); put(b\'{"type": "resu\'); os._exit(7)', failed("exit code 7")),
    "dies after the result": ("answer(); os._exit(8)", "fine"),
    "is killed after the result": ("answer(); os.kill(os.getpid(), 9)", "fine"),
    "exits with 0 and no answer": ("begin(); sys.exit(0)", failed("exit code 0")),
    # It does not exit, or does not read.
    "closes its output and stays": (
        "begin(); os.close(1); time.sleep(60)",
        failed("without an answer"),
    ),
    "never reads": ("result('deaf'); time.sleep(60)", "deaf"),
    "reads nothing more": ("greet(); result('rude'); time.sleep(60)", "rude"),
    "stays after the result and ignores SIGTERM": (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); answer(); time.sleep(60)",
        "fine",
    ),
    # It writes after the result.
    "prints two results": ("answer(); result('other')", "fine"),
    "continues after the result": ("answer(); put(b'{broken\\n' * 1000); time.sleep(60)", "fine"),
    # It writes bytes that are not a line of JSON.
    "writes all bytes": ("put(bytes(range(256)) * 40 + b'\\n'); answer()", "fine"),
    "writes NULs": ("put(b'\\0' * 100_000 + b'\\n'); answer()", "fine"),
    "writes a NUL into a line": (
        'begin(); put(b\'{"type": "result\\0"}\\n\'); time.sleep(60)',
        failed("not valid JSON"),
    ),
    "writes half a line and another": (
        "begin(); put(b'{\"type\": '); result(); time.sleep(60)",
        failed("not valid JSON"),
    ),
    "writes bytes that are not UTF-8": (
        'begin(); put(b\'{"type": "\\xff\\xfe"}\\n\'); result()',
        "fine",
    ),
    "writes JSON that is not an object": (
        "put(b'[]\\n3\\n\"x\"\\nnull\\ntrue\\n[{}]\\n'); answer()",
        "fine",
    ),
    "writes objects of unknown types": (
        'put(b\'{}\\n{"type": null}\\n{"type": {}}\\n{"type": "result2"}\\n\'); answer()',
        "fine",
    ),
    "writes a line of ninety levels": (
        "put(b'{\"type\": \"x\", \"y\": ' + b'[' * 90 + b']' * 90 + b'}\\n'); answer()",
        "fine",
    ),
    "writes a line of 300,000 levels": (
        "put(b'{\"y\": ' + b'[' * 300_000 + b'\\n'); time.sleep(60)",
        failed("not valid JSON"),
    ),
    # It writes too much.
    "writes 20 MB without a newline": (
        "begin(); put(b'{' + b'x' * (20 << 20)); os._exit(9)",
        failed("exit code 9"),
    ),
    "writes 20 MB of noise": ("put(b'x' * (20 << 20) + b'\\n'); answer()", "fine"),
    "writes 5 MB to stderr": ("sys.stderr.write('x' * (5 << 20)); answer()", "fine"),
    # Its fields have the wrong types.
    "prints a result without text": ("begin(); result(None)", ""),
    "prints numbers of the wrong type": (
        "answer(usage='many', total_cost_usd=None, num_turns='x', stop_reason=5)",
        "fine",
    ),
    "prints infinite numbers": (
        "answer(usage={'input_tokens': float('inf')}, total_cost_usd=float('nan'))",
        "fine",
    ),
    "prints numbers out of range": (
        "answer(usage={'input_tokens': 10 ** 40, 'output_tokens': -5}, total_cost_usd=-1e300)",
        "fine",
    ),
    "prints events of the wrong type": (
        "begin(); say(type='stream_event', event=5); say(type='stream_event'); "
        "say(type='assistant', message=7); result()",
        None,
    ),
    "prints an init of the wrong types": (
        "greet(); read(); say(type='system', subtype='init', model=5, tools=5, apiKeySource=None); "
        "delta(); result()",
        None,
    ),
    "prints limits of the wrong types": (
        "begin(); limits = {'status': 5, 'resetsAt': 'soon'}; "
        "say(type='rate_limit_event', rate_limit_info=limits); result()",
        "fine",
    ),
    "prints half a surrogate pair": ("answer(text='\\ud83d fine')", None),
}


def is_expected(body: Dict[str, Any], end: Any) -> bool:
    """Return whether a finished request ended as its row says."""
    if end is None:
        return body.get("errorCode") in (None, "cli_error")
    if isinstance(end, str):
        return body.get("response") == end
    code, words = end
    return body.get("errorCode") == code and words in body["error"]


class Misdeeds:
    """A bridge whose `claude` runs the code of one row at a time."""

    def __init__(self, fake: FakeClaude, running: RunningBridge) -> None:
        self.fake = fake
        self.running = running
        self.pids = fake.folder / "pids"

    def do(self, code: str) -> Dict[str, Any]:
        """Write the program, and send a message; return the body of the finished request."""
        self.fake.script.write_text(RAW % (str(TESTS), str(self.pids)) + code + "\n")
        return self.running.admin.answer("hi" + "!" * 1000)

    def running_pids(self) -> List[int]:
        """Return the ids of the started programs that still run."""
        if not self.pids.exists():
            return []
        return [int(pid) for pid in self.pids.read_text().split() if is_running(int(pid))]


@pytest.fixture
def misdeeds(
    bridge: Bridges, fake_claude: Fakes, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Misdeeds]:
    monkeypatch.setattr(cab, "BACK_OFF_SECONDS", (0.01,))
    return lambda **settings: Misdeeds(fake_claude(), bridge(**settings))


def test_each_fault_of_claude_ends_only_its_own_request(
    misdeeds: Callable[..., Misdeeds],
) -> None:
    # The silence is long enough for a slow machine; only a failing row lasts so long.
    made = misdeeds(silence_seconds=4)
    wrong = {}
    for name, (code, end) in MISDEEDS.items():
        body = made.do(code)
        if not is_expected(body, end) or body["attempts"] != 1:
            wrong[name] = body
    assert wrong == {}
    assert made.do("answer()")["response"] == "fine"
    assert not [line for line in made.running.log if "Traceback" in line]
    assert made.running.admin.get("/health").status == 200
    made.running.bridge.__exit__(None, None, None)
    assert made.running_pids() == []


@pytest.mark.parametrize(
    "code",
    [
        "time.sleep(60)", "greet(); time.sleep(60)", "begin(); delta(); put(b'{'); time.sleep(60)",
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); begin(); time.sleep(60)",
    ],
)
def test_a_claude_that_stays_silent_at_any_point_is_ended(
    misdeeds: Callable[..., Misdeeds], monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(cab, "SHUTDOWN_GRACE_SECONDS", 0.1)
    # Longer than claude takes to start: PyPy is slow at that.
    made = misdeeds(silence_seconds=0.15 if sys.implementation.name == "cpython" else 2)
    body = made.do(code)
    # Once it has called the API, that may be the silent one. On a slow machine it has not yet.
    expected = ("network", "timeout") if "begin()" in code else ("timeout",)
    assert body["status"] == "error" and body["errorCode"] in expected
    wait_until(lambda: not made.running_pids())


# --- no files, processes or threads for a new process ---


def no_files(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lower the limit so that this process cannot open another file; return the undo."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, before)


def no_processes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make Popen fail as at the limit of processes, which root never reaches; return the undo."""

    def fail(*_: Any, **__: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    child_process = cab.ChildProcess
    monkeypatch.setattr(cab, "ChildProcess", fail)
    return lambda: monkeypatch.setattr(cab, "ChildProcess", child_process)


def no_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the second thread of a process fail to start; return the undo."""
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name.startswith("stdout-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    return lambda: monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX")
@pytest.mark.parametrize("scarcity", [no_files, no_processes, no_threads])
def test_too_few_resources_for_a_process_end_the_run_at_once_as_an_overload(
    fake_claude: Fakes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scarcity: Callable[[pytest.MonkeyPatch], Callable[[], None]],
) -> None:
    fake = fake_claude()
    config = cab.Config(data_dir=tmp_path / "data", claude=str(fake.path), spare=0)
    install = cab.find_claude(config, {"PATH": os.environ["PATH"], "HOME": str(tmp_path)})
    pool = cab.ClaudePool(cab.ClaudeProgram(install), config, cab.Clock(), "scarce")
    runner = cab.ClaudeRunner(pool)
    live = cab.LiveText()
    request = cab.RunRequest("hi", cab.SessionConfig(cab.SYSTEM_PROMPT))
    undo = scarcity(monkeypatch)
    try:
        with pytest.raises(cab.RunFailed) as caught:
            runner.run(request, live, lambda: None)
        undo()
        # Of this machine: it holds all models, and says nothing of the API.
        failure = caught.value
        assert (failure.code, failure.is_of_model, failure.is_answered) == (
            "overloaded", False, False,
        )
        assert "could not be started" in str(failure)
        assert (live.read(), live.generation, live.current_pause) == ("", 0, None)
        # What had been started already is gone.
        wait_until(lambda: not any(is_running(child["pid"]) for child in fake.children()))
        assert fake.prompts() == []
        assert runner.run(request, live, lambda: None).text == "Echo: hi"
    finally:
        undo()
        pool.close()
