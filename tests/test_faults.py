"""The machine fails under the bridge: the disk is full, the database is locked, damaged or gone, the clock is set, files and processes are
scarce, and `claude` is replaced or behaves as no program should. Each time: who calls is told, nothing that was accepted is lost, and
all goes on by itself once the cause has passed."""
from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

import claude_api_bridge as cab
from conftest import MODULE, TESTS, Answer, Api, FakeClaude, Program, RunningBridge, is_running, wait_until

Bridges = Callable[..., RunningBridge]
Fakes = Callable[..., FakeClaude]

BIG = "x" * 20_000                                        # more than the free space of the pages that there are
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="sets the limits of a process from outside")


def script(*steps: Dict[str, Any]) -> str:
    """A prompt at which the fake does these steps."""
    return "script " + json.dumps(steps)


def store_of(running: RunningBridge) -> cab.Database:
    """The bridge's own store: some faults can only be made on its connection."""
    server: Any = running.bridge._server
    found: cab.Database = server.dispatcher._service._store
    return found


def database(running: RunningBridge) -> Path:
    return running.data_dir / "bridge.db"


def refused(answer: Answer, *words: str) -> bool:
    """Whether it is the 503 that tells of the database."""
    assert (answer.status, answer.json["code"]) == (503, "unavailable"), answer.data
    return any(word in answer.json["error"] for word in words)


def accepted(api: Api) -> Tuple[List[str], int]:
    """-> (all requests, newest first; how many were counted)."""
    return ([each["requestId"] for each in api.get("/api/requests?limit=100").json["requests"]],
            api.get("/api/usage").json["total"]["requests"])


def reading_works(api: Api, job: str) -> None:
    for path in ("/api/ask/" + job, "/api/requests", "/api/usage", "/api/status", "/api/tokens"):
        assert api.get(path).status == 200, path


# --- a full disk ---

@contextlib.contextmanager
def full_disk(running: RunningBridge) -> Iterator[None]:
    """SQLite's own full disk: the file may not grow."""
    db = store_of(running)._db
    db.execute("PRAGMA max_page_count = 1")               # which SQLite raises to what there is
    try:
        yield
    finally:
        db.execute("PRAGMA max_page_count = 1000000")


def test_on_a_full_disk_nothing_is_half_accepted_and_readers_go_on(bridge: Bridges) -> None:
    running = bridge()
    admin = running.admin
    job = admin.ask("hi")
    admin.done(job)
    before = accepted(admin)
    with full_disk(running):
        for _ in range(2):
            assert refused(admin.post("/api/ask", {"message": BIG}, headers={"Idempotency-Key": "once"}), "full")
        reading_works(admin, job)
        assert accepted(admin) == before
    again = admin.post("/api/ask", {"message": BIG}, headers={"Idempotency-Key": "once"})
    assert again.status == 202 and admin.done(again.json["requestId"])["status"] == "completed"
    assert accepted(admin) == ([again.json["requestId"], *before[0]], before[1] + 1)


@pytest.mark.parametrize("last, status", [({"result": BIG}, "completed"), ({"fail": {"result": BIG}}, "error")], ids=["answer", "failure"])
def test_what_came_of_a_run_on_a_full_disk_is_stored_once_there_is_room(bridge: Bridges, fake_claude: Fakes, gate: Path,
                                                                       last: Dict[str, Any], status: str) -> None:
    running = bridge()
    job = running.admin.ask(script({"wait": str(gate)}, last))
    wait_until(lambda: running.admin.poll(job)["status"] == "processing")
    with full_disk(running):
        gate.touch()
        wait_until(lambda: any("cannot be stored" in line for line in running.log))
        assert running.admin.poll(job)["status"] == "processing"         # which is what is true: nothing else is on disk
    body = running.admin.done(job)
    assert (body["status"], body["attempts"], len(fake_claude().prompts())) == (status, 1, 1)
    assert (body.get("response") or body["error"]).startswith("x" * 1000)
    assert running.admin.answer("next")["response"] == "Echo: next"


def test_a_bridge_that_ends_on_a_full_disk_runs_the_request_again_later(bridge: Bridges, fake_claude: Fakes, gate: Path) -> None:
    running = bridge()
    admin = running.admin
    job = admin.ask(script({"wait": str(gate)}, {"result": BIG}))
    wait_until(lambda: admin.poll(job)["status"] == "processing")
    store_of(running)._db.execute("PRAGMA max_page_count = 1")           # until its end
    gate.touch()
    wait_until(lambda: any("cannot be stored" in line for line in running.log))
    running.bridge.__exit__(None, None, None)
    after = bridge()
    body = Api(after.port, admin.token).done(job)
    assert (body["response"], body["attempts"]) == (BIG, 2)


LIMITED = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY)); sys.path.insert(0, %r);"
           " sys.argv[0] = %r; import claude_api_bridge as cab; cab.run()" % (str(MODULE.parent), str(MODULE)))


@linux_only
def test_a_disk_that_really_takes_nothing_more_is_told_by_health_and_passes(program: Callable[..., Program], gate: Path) -> None:
    import resource
    running = program()
    api = running.api
    job = api.ask("hold %s" % gate)
    wait_until(lambda: api.poll(job)["status"] == "processing")
    pid, unlimited = running.process.pid, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))       # type: ignore[attr-defined, unused-ignore]
    assert refused(api.get("/health"), "disk", "full")
    assert refused(api.post("/api/ask", {"message": "hi"}), "disk", "full")
    gate.touch()
    wait_until(lambda: "cannot be stored" in running.stderr)
    assert api.poll(job)["status"] == "processing" and api.get("/api/requests").status == 200
    resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)                            # type: ignore[attr-defined, unused-ignore]
    body = api.done(job)
    assert (body["response"], body["attempts"]) == ("held", 1)
    assert api.get("/health").status == 200 and api.answer("next")["response"] == "Echo: next"


@linux_only
def test_a_start_on_a_full_disk_is_a_sentence_that_does_not_cost_the_database(bridge: Bridges, fake_claude: Fakes, tmp_path: Path) -> None:
    running = bridge()
    running.admin.answer("hi")
    running.bridge.__exit__(None, None, None)
    before = database(running).read_bytes()
    tried = subprocess.run([sys.executable, "-S", "-c", LIMITED, "start", "--no-tunnel", "--host", "127.0.0.1", "--port", "0", "--data-dir",
                            str(running.data_dir), "--claude", str(fake_claude().path)], env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", timeout=60)
    assert (tried.returncode, tried.stdout) == (1, "") and "Traceback" not in tried.stderr
    assert "hint: " in tried.stderr and "away" not in tried.stderr.lower() and "aside" not in tried.stderr, tried.stderr
    assert database(running).read_bytes() == before and not list(running.data_dir.glob("*damaged*"))


# --- a database that cannot be written, or is locked ---

def test_a_database_that_is_read_only_serves_readers_until_it_can_be_written(bridge: Bridges) -> None:
    running = bridge()
    admin = running.admin
    job = admin.ask("hi")
    admin.done(job)
    before = accepted(admin)
    store_of(running)._db.execute("PRAGMA query_only = ON")
    for answer in (admin.post("/api/ask", {"message": "hi"}), admin.get("/health"), admin.post("/api/tokens", {"name": "new"})):
        assert refused(answer, "readonly")
    reading_works(admin, job)
    assert accepted(admin) == before
    store_of(running)._db.execute("PRAGMA query_only = OFF")
    assert admin.get("/health").status == 200 and admin.answer("next")["response"] == "Echo: next"


@contextlib.contextmanager
def locked(path: Path, how: str = "IMMEDIATE") -> Iterator[None]:
    """Another program that writes and does not come to an end."""
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as other:
        other.execute("BEGIN " + how)
        yield
        other.execute("ROLLBACK")


@pytest.mark.parametrize("how", ["IMMEDIATE", "EXCLUSIVE"])
def test_a_lock_of_another_program_holds_up_writers_for_a_bounded_time_and_no_reader(bridge: Bridges, monkeypatch: pytest.MonkeyPatch,
                                                                                     how: str) -> None:
    running = bridge()
    admin = running.admin
    job = admin.ask("hi")
    admin.done(job)
    before = accepted(admin)
    answers: List[Answer] = []
    asking = [threading.Thread(target=lambda: answers.append(admin.post("/api/ask", {"message": "late"})), name="asks") for _ in range(4)]
    with locked(database(running), how):
        for thread in asking:
            thread.start()
        for _ in range(10):
            reading_works(admin, job)
        assert not answers                                   # they wait still: nobody who reads has waited for them
        assert refused(admin.get("/health"), "locked", "busy") and accepted(admin) == before
    for thread in asking:
        thread.join(30)
    assert [answer.status for answer in answers] == [202] * 4
    assert [admin.done(answer.json["requestId"])["status"] for answer in answers] == ["completed"] * 4
    assert admin.get("/health").status == 200


# --- a damaged database ---

def page(number: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:number * 4096] + b"\xff" * 4096 + data[(number + 1) * 4096:]


@pytest.mark.parametrize("spoil", [lambda data: b"somebody's notes\n" * 1000, lambda data: data[:4096] + b"\xff" * (len(data) - 4096),
                                   lambda data: data[:len(data) // 8192 * 4096], page(2), lambda data: page(len(data) // 4096 - 1)(data)],
                         ids=["text", "all pages", "cut", "one page", "last page"])
def test_a_damaged_database_is_kept_aside_and_the_bridge_starts(bridge: Bridges, spoil: Callable[[bytes], bytes]) -> None:
    first = bridge()
    first.admin.answer(BIG)
    first.bridge.__exit__(None, None, None)
    path = database(first)
    path.write_bytes(spoil(path.read_bytes()))
    spoiled = path.read_bytes()
    after = bridge()
    kept, = after.data_dir.glob("bridge-damaged-*.db")
    assert kept.read_bytes() == spoiled and kept.stat().st_mode & 0o077 == 0
    assert any(str(kept) in line and "tokens must be made again" in line for line in after.log)
    assert after.admin.token and after.admin.answer("hi")["response"] == "Echo: hi"
    assert Api(after.port, first.admin.token).get("/api/requests").status == 401
    after.bridge.__exit__(None, None, None)
    path.write_bytes(spoiled)
    assert bridge().admin.get("/health").status == 200       # and a second time on the same day: nothing is overwritten
    assert len(list(after.data_dir.glob("bridge-damaged-*.db"))) == 2 and kept.read_bytes() == spoiled


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
def test_a_database_that_is_only_locked_newer_or_unreadable_stays_where_it_is(bridge: Bridges, monkeypatch: pytest.MonkeyPatch,
                                                                             fault: Callable[[Path], Iterator[None]]) -> None:
    first = bridge()
    first.bridge.__exit__(None, None, None)
    monkeypatch.setattr(cab, "WRITE_SECONDS", 0.1)
    with contextlib.contextmanager(fault)(database(first)):
        with pytest.raises(cab.CannotStart) as told:
            bridge()
    assert not isinstance(told.value, cab.DatabaseCorrupt) and "aside" not in told.value.hint and "away" not in told.value.hint
    assert database(first).exists() and not list(first.data_dir.glob("*damaged*"))


def test_damage_that_comes_while_the_bridge_runs_is_told_and_the_next_start_keeps_the_file(bridge: Bridges) -> None:
    running = bridge()
    running.admin.answer(BIG)
    path = database(running)
    with contextlib.closing(sqlite3.connect(str(path))) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    for answer in (running.admin.get("/api/requests"), running.admin.post("/api/ask", {"message": "hi"}), running.admin.get("/health")):
        assert refused(answer, "damaged") and "Restart the bridge" in answer.json["error"]
    running.bridge.__exit__(None, None, None)
    after = bridge()
    assert after.admin.answer("hi")["response"] == "Echo: hi" and len(list(after.data_dir.glob("bridge-damaged-*.db"))) == 1


@pytest.mark.skipif(os.name != "posix", reason="Windows does not delete a file that is open")
@pytest.mark.parametrize("again", [False, True])
def test_a_database_that_was_deleted_takes_no_request_that_nobody_would_find(bridge: Bridges, again: bool) -> None:
    running = bridge()
    job = running.admin.ask("hi")
    running.admin.done(job)
    shutil.rmtree(running.data_dir)
    if again:
        running.data_dir.mkdir()
        cab.Database(database(running), cab.Clock()).close()
    for answer in (running.admin.post("/api/ask", {"message": "hi"}), running.admin.get("/health")):
        assert refused(answer, "deleted or replaced") and "Restart the bridge" in answer.json["error"]
    assert running.admin.poll(job)["response"] == "Echo: hi"             # as long as it lasts


@pytest.mark.parametrize("spare", [0, 1])
def test_a_work_folder_that_was_deleted_is_made_again(bridge: Bridges, spare: int) -> None:
    running = bridge(spare=spare)
    running.admin.answer("hi")
    shutil.rmtree(running.data_dir / "work")
    assert running.admin.answer("next")["response"] == "Echo: next"
    wait_until((running.data_dir / "work").is_dir)


def test_a_file_in_the_place_of_the_work_folder_is_told_until_it_is_gone(bridge: Bridges) -> None:
    running = bridge()
    (running.data_dir / "work").write_text("a file")
    body = running.admin.answer("hi")
    assert (body["errorCode"], "work" in body["error"]) == ("cli_error", True)
    (running.data_dir / "work").unlink()
    assert running.admin.answer("next")["response"] == "Echo: next"


# --- a clock that is set ---

class SetClock(cab.Clock):
    """The real one, wrongly set by so many seconds."""
    wrong = 0.0

    def now(self) -> float:                              # type: ignore[override, unused-ignore]
        return super().now() + self.wrong


YEARS = 10 * 365 * 86_400.0


@pytest.mark.parametrize("wrong", [YEARS, -YEARS])
def test_a_clock_that_is_set_wrongly_and_back_loses_nothing(bridge: Bridges, gate: Path, wrong: float) -> None:
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
    clock.wrong = wrong                                      # in the middle of a run
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
    """Both clocks, each moved by hand."""

    def __init__(self) -> None:
        self.at, self.passed = 1_800_000_000.0, 0.0

    def now(self) -> float:                              # type: ignore[override, unused-ignore]
        return self.at

    def monotonic(self) -> float:                        # type: ignore[override, unused-ignore]
        return self.passed

    def advance(self, seconds: float) -> None:
        self.at += seconds
        self.passed += seconds


class NoClaude:
    """Stands for ClaudeCli where only the house is kept."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def test_old_requests_are_not_deleted_by_a_clock_that_jumped_but_by_time(tmp_path: Path) -> None:
    clock = HouseClock()
    store = cab.Database(tmp_path / "bridge.db", clock)
    with contextlib.closing(store):
        token = store.add_token(cab.NewToken(name="app"), "secret")
        claude: Any = NoClaude()
        worker = cab.Worker(store, claude, cab.Notifier(), clock, print, cab.Config(keep_days=30))
        job = store.enqueue(token.id, cab.Ask("hi")).job
        claimed = store.claim()
        assert claimed and store.complete(claimed, cab.Answer("kept"))
        worker._run_maintenance()
        clock.at += YEARS
        clock.advance(3601)
        worker._run_maintenance()                                 # the first look after the jump
        assert store.job(job.id) and store.usage("2000-01-01")
        clock.at -= YEARS
        for _ in range(2):
            clock.advance(3601)
            worker._run_maintenance()
        assert store.job(job.id) and store.usage("2000-01-01")
        for _ in range(30 * 24):
            clock.advance(3601)
            worker._run_maintenance()
        assert store.job(job.id) is None                     # whose time has really come


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
    """As an update does it: a new file in the place of the old one."""
    part = fake.path.with_name("claude.part")
    part.write_text(text)
    part.chmod(0o755)
    os.replace(part, fake.path)


@pytest.mark.skipif(os.name != "posix", reason="a running program cannot be replaced on Windows")
@pytest.mark.parametrize("spare, fault, words", [
    (0, removed, lambda fake: str(fake.path)),                              # a spare that is ready answers once more
    *((spare, fault, lambda fake: str(fake.path)) for fault in (not_executable, no_program) for spare in (0, 1)),
    *((spare, too_old, lambda fake: "1.0.0 (Claude Code) is too old") for spare in (0, 1))])
def test_a_claude_that_cannot_be_run_fails_clearly_until_it_is_there_again(bridge: Bridges, fake_claude: Fakes, spare: int,
                                                                          monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                                          fault: Callable[[FakeClaude], None],
                                                                          words: Callable[[FakeClaude], str]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fake = fake_claude()
    running = bridge(fake, spare=spare)
    assert running.admin.answer("hi")["response"] == "Echo: hi"
    good = fake.path.read_text()
    fault(fake)
    body = running.admin.answer("lost")
    assert body["errorCode"] == "cli_error" and words(fake) in body["error"], body
    assert running.admin.get("/health").status == 200
    replace_program(fake, good)
    assert running.admin.answer("next")["response"] == "Echo: next"


@pytest.mark.skipif(os.name != "posix", reason="a running program cannot be replaced on Windows")
def test_after_an_update_the_new_claude_answers_and_the_spare_of_the_old_one_goes(bridge: Bridges, tmp_path: Path,
                                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    versions = [FakeClaude(tmp_path / "one"), FakeClaude(tmp_path / "two", version="2.1.400 (Claude Code)")]
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
    wait_until(lambda: len(versions[0].children()) == 2)                 # the one that answered, and the next spare
    update(versions[1])
    assert running.admin.answer("second")["response"] == "Echo: second"
    assert (versions[0].prompts(), versions[1].prompts()) == (["first"], ["second"])
    wait_until(lambda: not any(is_running(start["pid"]) for start in versions[0].children()))
    update(versions[0])
    assert running.admin.answer("third")["response"] == "Echo: third"
    assert versions[0].prompts() == ["first", "third"]


# --- claude misbehaves at each point of its protocol ---

RAW = """import os, sys, time
sys.path.insert(0, %r)
from fake_json import dumps, loads
out = sys.stdout.buffer

def put(data):
    out.write(data)
    out.flush()

def say(**message):
    put(dumps(message).encode() + b"\\n")

def hear():
    return loads(sys.stdin.buffer.readline())

def greet():
    say(type="control_response", response={"subtype": "success", "request_id": hear()["request_id"], "response": {}})

def begin():
    greet()
    hear()
    say(type="system", subtype="init", session_id="s", apiKeySource="none", model="m", tools=[])
    say(type="stream_event", event={"type": "message_start", "message": {"id": "msg"}})

def delta(text="fi"):
    say(type="stream_event", event={"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}})

def result(text="fine", **more):
    say(**{"type": "result", "subtype": "success", "is_error": False, "result": text, "usage": {}, "total_cost_usd": 0, **more})

def answer(**more):
    begin()
    delta()
    result(**more)

with open(%r, "a") as log:
    log.write("%%d\\n" %% os.getpid())
"""

# what it does; how the request ends: its answer, or (code, a part of the text)
MISDEEDS: Dict[str, Tuple[str, Any]] = {
    "dies before it was greeted": ("sys.stderr.write('oh no'); sys.exit(3)", ("cli_error", "(exit code 3) without an answer: oh no")),
    "dies of a signal": ("os.kill(os.getpid(), 9)", ("cli_error", "exit code -9")),
    "dies after the greeting": ("greet(); os._exit(4)", ("cli_error", "exit code 4")),
    "dies after the prompt": ("greet(); hear(); os._exit(5)", ("cli_error", "exit code 5")),
    "dies in the middle": ("begin(); delta(); os._exit(6)", ("cli_error", "exit code 6")),
    "dies in a line": ("begin(); put(b'{\"type\": \"resu'); os._exit(7)", ("cli_error", "exit code 7")),
    "dies after the result": ("answer(); os._exit(8)", "fine"),
    "is killed after the result": ("answer(); os.kill(os.getpid(), 9)", "fine"),
    "ends well without an answer": ("begin(); sys.exit(0)", ("cli_error", "exit code 0")),
    "closes its output and stays": ("begin(); os.close(1); time.sleep(60)", ("cli_error", "without an answer")),
    "never reads": ("result('deaf'); time.sleep(60)", "deaf"),
    "reads nothing more": ("greet(); result('rude'); time.sleep(60)", "rude"),
    "stays after the result and ignores all": ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); answer(); time.sleep(60)", "fine"),
    "tells two results": ("answer(); result('other')", "fine"),
    "goes on after the result": ("answer(); put(b'{broken\\n' * 1000); time.sleep(60)", "fine"),
    "writes all bytes": ("put(bytes(range(256)) * 40 + b'\\n'); answer()", "fine"),
    "writes NULs": ("put(b'\\0' * 100_000 + b'\\n'); answer()", "fine"),
    "writes a NUL into a line": ("begin(); put(b'{\"type\": \"result\\0\"}\\n'); time.sleep(60)", ("cli_error", "not valid JSON")),
    "writes half a line and another": ("begin(); put(b'{\"type\": '); result(); time.sleep(60)", ("cli_error", "not valid JSON")),
    "writes no text": ("begin(); put(b'{\"type\": \"\\xff\\xfe\"}\\n'); result()", "fine"),
    "writes JSON that is no object": ("put(b'[]\\n3\\n\"x\"\\nnull\\ntrue\\n[{}]\\n'); answer()", "fine"),
    "writes objects of no kind": ("put(b'{}\\n{\"type\": null}\\n{\"type\": {}}\\n{\"type\": \"result2\"}\\n'); answer()", "fine"),
    "writes a line of ninety levels": ("put(b'{\"type\": \"x\", \"y\": ' + b'[' * 90 + b']' * 90 + b'}\\n'); answer()", "fine"),
    "writes a line of endless levels": ("put(b'{\"y\": ' + b'[' * 300_000 + b'\\n'); time.sleep(60)", ("cli_error", "not valid JSON")),
    "writes 20 MB without a newline": ("begin(); put(b'{' + b'x' * (20 << 20)); os._exit(9)", ("cli_error", "exit code 9")),
    "writes 20 MB of noise": ("put(b'x' * (20 << 20) + b'\\n'); answer()", "fine"),
    "writes much to stderr": ("sys.stderr.write('x' * (5 << 20)); answer()", "fine"),
    "writes no kind of answer": ("begin(); result(None)", ""),
    "tells odd figures": ("answer(usage='many', total_cost_usd=None, num_turns='x', stop_reason=5)", "fine"),
    "tells endless figures": ("answer(usage={'input_tokens': float('inf')}, total_cost_usd=float('nan'))", "fine"),
    "tells figures beyond all bounds": ("answer(usage={'input_tokens': 10 ** 40, 'output_tokens': -5}, total_cost_usd=-1e300)", "fine"),
    "tells an odd message": ("begin(); say(type='stream_event', event=5); say(type='stream_event'); say(type='assistant', message=7); result()",
                             None),
    "tells an odd init": ("greet(); hear(); say(type='system', subtype='init', model=5, tools=5, apiKeySource=None); delta(); result()", None),
    "tells odd limits": ("begin(); say(type='rate_limit_event', rate_limit_info={'status': 5, 'resetsAt': 'soon'}); result()", "fine"),
    "tells half a letter": ("answer(text='\\ud83d fine')", None),
}


class Misdeeds:
    """A bridge whose claude does a row of the table: its program is written anew for each."""

    def __init__(self, fake: FakeClaude, running: RunningBridge) -> None:
        self.fake, self.running, self.pids = fake, running, fake.folder / "pids"

    def do(self, code: str) -> Dict[str, Any]:
        self.fake.script.write_text(RAW % (str(TESTS), str(self.pids)) + code + "\n")
        return self.running.admin.answer("hi" + "!" * 1000)


@pytest.fixture
def misdeeds(bridge: Bridges, fake_claude: Fakes, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Misdeeds]:
    monkeypatch.setattr(cab, "BACK_OFF_SECONDS", (0.01,))
    return lambda **settings: Misdeeds(fake_claude(), bridge(**settings))


def test_whatever_claude_does_the_request_ends_so_and_the_bridge_lives_on(misdeeds: Callable[..., Misdeeds]) -> None:
    made = misdeeds(silence_seconds=4)                   # long for a slow machine; only what is wrong lasts as long
    wrong = {}
    for name, (code, wanted) in MISDEEDS.items():
        body = made.do(code)
        ended = body.get("response", (body.get("errorCode"), body.get("error")))
        is_right = (ended == wanted if isinstance(wanted, str) else isinstance(ended, tuple) and ended[0] == wanted[0] and wanted[1] in ended[1]
                    if wanted else body.get("errorCode") in (None, "cli_error"))
        if not is_right or body["attempts"] != 1:
            wrong[name] = body
    assert wrong == {}
    assert made.do("answer()")["response"] == "fine"
    assert not [line for line in made.running.log if "Traceback" in line]
    assert made.running.admin.get("/health").status == 200
    made.running.bridge.__exit__(None, None, None)
    assert not [pid for pid in made.pids.read_text().split() if is_running(int(pid))]


@pytest.mark.parametrize("code", ["time.sleep(60)", "greet(); time.sleep(60)", "begin(); delta(); put(b'{'); time.sleep(60)",
                                  "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); begin(); time.sleep(60)"])
def test_a_claude_that_falls_silent_anywhere_is_ended(misdeeds: Callable[..., Misdeeds], monkeypatch: pytest.MonkeyPatch,
                                                     code: str) -> None:
    monkeypatch.setattr(cab, "SHUTDOWN_GRACE_SECONDS", 0.1)
    made = misdeeds(silence_seconds=0.15)
    body = made.do(code)
    assert (body["status"], body["errorCode"]) == ("error", "timeout")
    wait_until(lambda: not [pid for pid in made.pids.read_text().split() if is_running(int(pid))] if made.pids.exists() else True)


# --- nothing is left to start a process with ---

def no_files(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """No file can be opened any more in this process."""
    import resource
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, before)


def no_processes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What fork says at the limit of processes; as root there is none that could be reached."""
    def fail(*_: Any, **__: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", fail)
    return lambda: monkeypatch.setattr(subprocess, "Popen", popen)


def no_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The process can be had, the second of the threads that serve it cannot."""
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name.startswith("stdout-"):
            raise RuntimeError("can't start new thread")
        start(thread)
    monkeypatch.setattr(threading.Thread, "start", fail)
    return lambda: monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX")
@pytest.mark.parametrize("scarcity", [no_files, no_processes, no_threads])
@pytest.mark.parametrize("passes", [True, False])
def test_a_process_that_cannot_be_had_for_a_moment_is_waited_for(fake_claude: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                scarcity: Callable[[pytest.MonkeyPatch], Callable[[], None]], passes: bool) -> None:
    monkeypatch.setattr(cab, "BACK_OFF_SECONDS", (0.05,))
    fake = fake_claude()
    config = cab.Config(data_dir=tmp_path / "data", claude=str(fake.path), spare=0, run_seconds=10 if passes else 0.15)
    cli = cab.ClaudePool(cab.find_claude(config, {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}), config, cab.Clock(), "scarce",
                        lambda *_: None)
    live = cab.LiveText()
    work = cab.RunRequest("hi", cab.SessionConfig(cab.SYSTEM_PROMPT))

    def look() -> None:
        if passes and live.rest:                             # the first try failed, and it is told that it is tried again
            give()

    give = scarcity(monkeypatch)
    try:
        if passes:
            assert cli.run(work, live, look).text == "Echo: hi"
        else:
            with pytest.raises(cab.RunFailed) as failed:
                cli.run(work, live, look)
            assert failed.value.code == "overloaded" and "could not be started" in str(failed.value)
    finally:
        give()
        cli.close()
