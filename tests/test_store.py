"""The store: what was said is on disk, in order, and stays there whatever ends the program. Real SQLite files throughout."""
from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import pytest
from conftest import MODULE, FakeClock

import claude_api_bridge as cab

posix = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")


@pytest.fixture
def open_store(tmp_path: Path, clock: FakeClock) -> Iterator[Callable[..., cab.Store]]:
    """open_store(path) -> a Store, on one file unless told otherwise; closed at the end."""
    opened: List[cab.Store] = []

    def make(path: Optional[Path] = None) -> cab.Store:
        opened.append(cab.Store(path or tmp_path / "bridge.db", clock))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., cab.Store]) -> cab.Store:
    return open_store()


def rows(path: Path, sql: str, *values: Any) -> List[Tuple[Any, ...]]:
    """What another program sees in the file."""
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        return db.execute(sql, values).fetchall()


def dump(path: Path) -> List[str]:
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        return list(db.iterdump())


def add(store: cab.Store, name: str = "app", **fields: Any) -> cab.Token:
    return store.add_token(cab.NewToken(name, **fields), cab.new_token())


def queue_up(store: cab.Store, token: cab.Token, *messages: str, conversation: Optional[str] = None) -> List[cab.Job]:
    return [store.enqueue(token.id, cab.Ask(message, conversation=conversation))[0] for message in messages]


def claimed(store: cab.Store) -> cab.Job:
    job = store.claim()
    assert job is not None
    return job


def exchange(store: cab.Store, token: cab.Token, message: str, response: str, conversation: str = "default") -> None:
    """One completed turn."""
    queue_up(store, token, message, conversation=conversation)
    assert store.complete(claimed(store), cab.Answer(response))


def modes(folder: Path) -> List[int]:
    return sorted({path.stat().st_mode & 0o777 for path in folder.iterdir()})


# --- the file ---


def test_a_fresh_file_is_made_empty_at_the_present_version(store: cab.Store, tmp_path: Path) -> None:
    assert (store.tokens(), store.claim(), store.counts(), store.has_admin()) == ([], None, {"tokens": 0}, False)
    assert rows(tmp_path / "bridge.db", "PRAGMA user_version") == [(len(cab.MIGRATIONS),)]
    assert rows(tmp_path / "bridge.db", "PRAGMA journal_mode") == [("wal",)]
    assert not (tmp_path / "bridge-original.db").exists()


@posix
def test_nobody_else_can_read_the_files(tmp_path: Path, open_store: Callable[..., cab.Store]) -> None:
    before = os.umask(0)
    try:
        folder = cab.private_directory(tmp_path / "a" / "data")
        store = open_store(folder / "bridge.db")
        add(store)
    finally:
        os.umask(before)
    assert modes(folder) == [0o600] and folder.stat().st_mode & 0o777 == 0o700


@posix
def test_a_folder_that_was_open_to_others_is_closed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    assert cab.private_directory(tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_place_of_the_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("mine")
    for folder in (tmp_path / "data", tmp_path / "data" / "below"):
        with pytest.raises(cab.CannotStart) as refused:
            cab.private_directory(folder)
        assert str(folder) in str(refused.value) and refused.value.hint
    assert (tmp_path / "data").read_text() == "mine"


def test_opening_again_changes_nothing(open_store: Callable[..., cab.Store], tmp_path: Path) -> None:
    first = open_store()
    queue_up(first, add(first), "hi")
    first.close()
    before = dump(tmp_path / "bridge.db")
    open_store().close()
    assert dump(tmp_path / "bridge.db") == before


@pytest.mark.parametrize("content", [b"no database, but somebody's notes\n" * 100, b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_file_that_is_no_database_is_refused_and_untouched(content: bytes, tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "bridge.db"
    path.write_bytes(content)
    with pytest.raises(cab.CannotStart) as refused:
        cab.Store(path, clock)
    assert str(path) in str(refused.value) and refused.value.hint
    assert path.read_bytes() == content


def test_a_folder_in_the_place_of_the_file_is_a_sentence(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "bridge.db").mkdir()
    for path in (tmp_path / "bridge.db", tmp_path / "missing" / "bridge.db"):
        with pytest.raises(cab.CannotStart) as refused:
            cab.Store(path, clock)
        assert str(path) in str(refused.value)


def test_the_file_of_a_newer_version_is_refused_and_untouched(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "bridge.db"
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        db.execute("CREATE TABLE requests (id TEXT, future TEXT)")
        db.execute("PRAGMA user_version = %d" % (len(cab.MIGRATIONS) + 1))
    before = path.read_bytes()
    with pytest.raises(cab.CannotStart) as refused:
        cab.Store(path, clock)
    assert "newer version" in str(refused.value)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["bridge.db"]


def test_a_later_step_is_applied_to_a_file_of_today(tmp_path: Path, open_store: Callable[..., cab.Store], monkeypatch: pytest.MonkeyPatch) -> None:
    old = open_store()
    job = queue_up(old, add(old), "hi")[0]
    old.close()
    monkeypatch.setattr(cab, "MIGRATIONS", cab.MIGRATIONS + (("ALTER TABLE jobs ADD COLUMN later TEXT DEFAULT 'x'",),))
    assert open_store().job(job.id)
    assert rows(tmp_path / "bridge.db", "SELECT message, later FROM jobs") == [("hi", "x")]
    assert rows(tmp_path / "bridge.db", "PRAGMA user_version") == [(len(cab.MIGRATIONS),)]


def test_a_step_that_fails_half_way_leaves_the_file_as_it_was(tmp_path: Path, open_store: Callable[..., cab.Store], clock: FakeClock,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    old = open_store()
    queue_up(old, add(old), "hi")
    old.close()
    path = tmp_path / "bridge.db"
    before, version = dump(path), rows(path, "PRAGMA user_version")
    monkeypatch.setattr(cab, "MIGRATIONS", cab.MIGRATIONS + (("ALTER TABLE jobs ADD COLUMN later TEXT", "UPDATE jobs SET nonsense = 1"),))
    with pytest.raises(cab.CannotStart) as refused:
        cab.Store(path, clock)
    assert "nonsense" in str(refused.value)
    assert (dump(path), rows(path, "PRAGMA user_version")) == (before, version)


def test_a_file_that_somebody_else_is_writing_is_waited_for(tmp_path: Path, open_store: Callable[..., cab.Store]) -> None:
    # Two commands on a new folder: the one that comes second finds the file locked while the first one makes it.
    path = tmp_path / "bridge.db"
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None, check_same_thread=False)) as other:
        other.execute("CREATE TABLE theirs (x)")
        other.execute("BEGIN IMMEDIATE")
        done = threading.Timer(0.2, other.execute, ("COMMIT",))
        done.start()
        try:
            assert open_store(path).counts() == {"tokens": 0}
        finally:
            done.join()


def test_two_stores_on_one_file_see_each_other_s_writes(open_store: Callable[..., cab.Store]) -> None:
    bridge, command_line = open_store(), open_store()
    token = add(command_line)
    job = queue_up(bridge, token, "hi")[0]
    assert bridge.token(token.id) == token and command_line.job_status(job.id) == "queued"
    running = claimed(bridge)
    command_line.delete_token(token.id)
    assert bridge.complete(running, cab.Answer("late")) is False and bridge.tokens() == []


def test_a_full_disk_is_an_answer_that_says_so_and_passes(store: cab.Store) -> None:
    token = add(store)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute("PRAGMA max_page_count = %d" % pages)             # SQLite's own full disk
    with pytest.raises(cab.Unavailable) as refused:
        queue_up(store, token, "x" * 30_000)
    assert refused.value.status == 503 and "full" in str(refused.value)
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert len(queue_up(store, token, "x" * 30_000)) == 1 and store.counts() == {"queued": 1, "tokens": 1}


def test_a_file_that_cannot_be_written_is_noticed(store: cab.Store) -> None:
    store.check_writable()
    store._db.execute("PRAGMA query_only = ON")
    with pytest.raises(cab.Unavailable):
        store.check_writable()


# --- the original's file ---

ORIGINAL = """
    CREATE TABLE tokens (id TEXT PRIMARY KEY, name TEXT NOT NULL, token_hash TEXT NOT NULL UNIQUE, token_prefix TEXT NOT NULL,
        session_mode TEXT NOT NULL DEFAULT 'stateless', expires_at INTEGER, created_at INTEGER NOT NULL, last_used_at INTEGER,
        is_admin INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE requests (id TEXT PRIMARY KEY, token_id TEXT NOT NULL REFERENCES tokens(id) ON DELETE CASCADE, message TEXT NOT NULL,
        response TEXT, status TEXT NOT NULL DEFAULT 'queued', session_id TEXT, created_at INTEGER NOT NULL, completed_at INTEGER, error TEXT);
    CREATE TABLE sessions (id TEXT PRIMARY KEY, token_id TEXT NOT NULL REFERENCES tokens(id) ON DELETE CASCADE, claude_session_id TEXT,
        working_dir TEXT, created_at INTEGER NOT NULL, last_used_at INTEGER);
    CREATE INDEX idx_tokens_hash ON tokens(token_hash);
    CREATE INDEX idx_requests_token ON requests(token_id);
    CREATE INDEX idx_requests_status ON requests(status);
    CREATE INDEX idx_sessions_token ON sessions(token_id);
"""
BEGAN = 1_799_000_000
SECRETS = {name: "cab-" + letter * 64 for name, letter in (("admin", "a"), ("app", "b"), ("memo", "c"), ("old", "d"))}
#           id, token, message, response, status, created, completed, error
REQUESTS = [("c1", "memo", "first", "one", "completed", 0, 5, None), ("c2", "memo", "second", "two", "completed", 10, 15, None),
            ("e1", "memo", "bad", None, "error", 11, 16, "Claude CLI exited with code 1: x"), ("d1", "app", "done", "ok", "completed", 12, 13, None),
            # Three in one second, stored in another order than their ids'; the one that was running came before them.
            ("q9", "app", "wait 1", None, "queued", 30, None, None), ("q1", "app", "wait 2", None, "queued", 30, None, None),
            ("q5", "app", "wait 3", None, "queued", 30, None, None), ("p1", "app", "running", None, "processing", 20, None, None),
            ("m3", "memo", "third", None, "queued", 31, None, None)]


@contextlib.contextmanager
def original(path: Path) -> Iterator[sqlite3.Connection]:
    """The Node program's database, as it stands while that program is open."""
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(ORIGINAL)
        for name, secret in SECRETS.items():
            db.execute("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, NULL, ?)",
                       ("id-" + name, name, cab.digest(secret), secret[:12], "stateful" if name == "memo" else "stateless",
                        BEGAN + 86_400 if name == "old" else None, BEGAN, int(name == "admin")))
        for key, token, message, response, status, created, completed, error in REQUESTS:
            db.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?, NULL, ?, ?, ?)",
                       (key, "id-" + token, message, response, status, BEGAN + created, completed and BEGAN + completed, error))
        db.execute("INSERT INTO sessions VALUES ('s1', 'id-memo', '7c0f', '/home/u/claude-api-bridge-workspace', ?, ?)", (BEGAN, BEGAN + 15))
        yield db


@pytest.fixture
def taken_over(tmp_path: Path, open_store: Callable[..., cab.Store]) -> cab.Store:
    with original(tmp_path / "bridge.db"):
        pass
    return open_store()


def test_the_original_s_tokens_go_on_working(taken_over: cab.Store, clock: FakeClock) -> None:
    found = {name: taken_over.token_by_digest(cab.digest(secret)) for name, secret in SECRETS.items()}
    assert {name: token and (token.id, token.name, token.prefix) for name, token in found.items()} == {
        name: ("id-" + name, name, secret[:12]) for name, secret in SECRETS.items()}
    assert [name for name, token in found.items() if token and token.is_admin] == ["admin"] and taken_over.has_admin()
    assert [name for name, token in found.items() if token and token.is_expired(clock.now())] == ["old"]
    assert [name for name, token in found.items() if token and token.session_mode == "stateful"] == ["memo"]
    assert {token.tools for token in taken_over.tokens()} == {"none"} and len(taken_over.tokens()) == 4


def test_the_original_s_queue_runs_in_its_order_with_what_was_running_first(taken_over: cab.Store) -> None:
    order = []
    while taken_over.has_queued():
        job = claimed(taken_over)
        order.append((job.message, job.attempts, taken_over.complete(job, cab.Answer("ok"))))
    assert order == [(message, 1, True) for message in ("running", "wait 1", "wait 2", "wait 3", "third")]


def test_the_original_s_finished_requests_can_still_be_polled(taken_over: cab.Store) -> None:
    done, failed = taken_over.job("d1"), taken_over.job("e1")
    assert done and (done.status, done.response, done.created_at, done.completed_at) == ("completed", "ok", BEGAN + 12, BEGAN + 13)
    assert failed and (failed.status, failed.error, failed.error_code) == ("error", "Claude CLI exited with code 1: x", "cli_error")
    assert taken_over.counts() == {"queued": 5, "completed": 3, "error": 1, "tokens": 4}


def test_a_stateful_token_of_the_original_keeps_its_memory(taken_over: cab.Store) -> None:
    job = taken_over.job("m3")
    assert job and job.conversation == "default"
    assert taken_over.history(job) == [("first", "one"), ("second", "two")]
    assert taken_over.open_conversation("id-memo", "default") == (None, 0.0)      # its session is in another folder of the CLI's


def test_new_requests_come_after_the_original_s(taken_over: cab.Store) -> None:
    token = taken_over.token("id-app")
    assert token and taken_over.enqueue(token.id, cab.Ask("new"))[1] == 6


def test_revoking_a_token_of_the_original_takes_its_requests_along(taken_over: cab.Store, tmp_path: Path) -> None:
    taken_over.delete_token("id-memo")
    assert rows(tmp_path / "bridge.db", "SELECT count(*) FROM jobs WHERE token_id = 'id-memo'") == [(0,)]
    assert rows(tmp_path / "bridge.db", "PRAGMA foreign_key_check") == []


def test_the_original_s_file_is_kept_beside_ours(taken_over: cab.Store, tmp_path: Path) -> None:
    copy = tmp_path / "bridge-original.db"
    assert rows(copy, "SELECT id, message, response, status, error FROM requests ORDER BY rowid") == [
        (key, message, response, status, error) for key, _, message, response, status, _, _, error in REQUESTS]
    assert rows(copy, "SELECT count(*) FROM tokens") == [(4,)] and rows(copy, "PRAGMA user_version") == [(0,)]
    assert os.name != "posix" or copy.stat().st_mode & 0o777 == 0o600


@posix
def test_what_the_original_left_at_a_kill_9_is_taken_over_and_closed_to_others(tmp_path: Path, open_store: Callable[..., cab.Store]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with original(tmp_path / "theirs.db"):                              # its newest rows are in the -wal file only
        for end in ("", "-wal", "-shm"):
            shutil.copy(str(tmp_path / "theirs.db") + end, str(folder / "bridge.db") + end)
            os.chmod(str(folder / "bridge.db") + end, 0o644)
    store = open_store(folder / "bridge.db")
    assert store.counts()["queued"] == 5 and store.has_admin()
    assert rows(folder / "bridge-original.db", "SELECT count(*) FROM requests") == [(len(REQUESTS),)]
    assert modes(folder) == [0o600]


def test_a_take_over_that_fails_leaves_the_original_s_file_as_it_was(tmp_path: Path, clock: FakeClock, open_store: Callable[..., cab.Store]) -> None:
    path = tmp_path / "bridge.db"
    with original(path) as db:
        db.execute("CREATE TABLE jobs (somebody_s TEXT)")               # in the way of ours
    before, data = dump(path), path.read_bytes()
    for _ in range(2):                                                  # the second try finds the copy of the first
        with pytest.raises(cab.CannotStart) as refused:
            cab.Store(path, clock)
        assert "jobs" in str(refused.value)
        assert dump(path) == before and path.read_bytes() == data
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        db.execute("DROP TABLE jobs")
    assert open_store().counts()["queued"] == 5


def test_the_original_s_file_without_a_request_is_taken_over_too(tmp_path: Path, open_store: Callable[..., cab.Store]) -> None:
    with original(tmp_path / "bridge.db") as db:
        db.execute("DELETE FROM requests")
        db.execute("DELETE FROM sessions")
    assert open_store().counts() == {"tokens": 4} and (tmp_path / "bridge-original.db").exists()


def test_a_start_that_fails_because_the_original_still_runs_leaves_its_file_alone(tmp_path: Path, clock: FakeClock) -> None:
    # The original listens on the same port by default and would find its tables gone.
    with original(tmp_path / "bridge.db"):
        pass
    before = dump(tmp_path / "bridge.db")
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        config = cab.Config(port=theirs.getsockname()[1], host="127.0.0.1", data_dir=tmp_path)
        claude = cab.Claude(("claude",), cab.Features.read("2.1.330", ""), {}, "nobody")
        with pytest.raises(cab.CannotStart) as refused, cab.Bridge(config, claude, clock, print):
            pass
    assert str(config.port) in str(refused.value)
    assert dump(tmp_path / "bridge.db") == before


# --- tokens ---


def test_a_token_is_found_by_its_digest_and_never_stored(store: cab.Store, clock: FakeClock, tmp_path: Path) -> None:
    secret = cab.new_token()
    made = store.add_token(cab.NewToken("app", "stateful", 7, True, ("Read", "Bash(git log:*)")), secret, "/srv/work")
    assert made == cab.Token(made.id, "app", secret[:12], "stateful", clock.now() + 7 * 86_400, clock.now(), None, True,
                             ("Read", "Bash(git log:*)"), "/srv/work")
    assert store.token_by_digest(cab.digest(secret)) == made == store.token(made.id)
    assert store.token_by_digest(secret) is None and store.token_by_digest("") is None and store.token("none") is None
    store.close()
    assert secret.encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_tokens_are_listed_newest_first_in_one_second_too(store: cab.Store, clock: FakeClock) -> None:
    names = [add(store, name).name for name in ("a", "b")]
    clock.advance(1)
    names.append(add(store, "c").name)
    assert [token.name for token in store.tokens()] == names[::-1]


@pytest.mark.parametrize("days, is_expired", [(None, (False, False)), (1, (False, True)), (90, (False, False))])
def test_a_token_expires_to_the_second(store: cab.Store, clock: FakeClock, days: Optional[int], is_expired: Tuple[bool, bool]) -> None:
    token = add(store, expires_in_days=days)
    assert (token.is_expired(clock.now() + 86_399), token.is_expired(clock.now() + 86_400)) == is_expired


def test_the_use_of_a_token_is_noted_at_most_once_a_minute(store: cab.Store, clock: FakeClock) -> None:
    token, noted, began = add(store), [], clock.now()
    for seconds in (0, 1, 58, 1, 59, 1, -3600):                         # the clock may be set back, too
        clock.advance(seconds)
        token = store.token(token.id) or token
        store.touch_token(token)
        noted.append((store.token(token.id) or token).last_used_at)
    assert [int(moment - began) for moment in noted if moment is not None] == [0, 0, 0, 60, 60, 120, -3480]


def test_the_101st_token_is_refused_but_expired_ones_do_not_count(store: cab.Store, clock: FakeClock) -> None:
    for number in range(cab.TOKENS):
        add(store, expires_in_days=1 if number == 0 else None)
    with pytest.raises(cab.TokenLimit) as refused:
        add(store)
    assert str(refused.value) == "Maximum 100 tokens allowed" and len(store.tokens()) == 100
    clock.advance(86_400)
    add(store)
    with pytest.raises(cab.TokenLimit):
        add(store)
    assert len(store.tokens()) == 101


def test_the_last_admin_cannot_be_revoked_and_an_expired_one_is_no_help(store: cab.Store, clock: FakeClock) -> None:
    first, brief = add(store, admin=True), add(store, admin=True, expires_in_days=1)
    app = add(store)
    clock.advance(86_400)
    with pytest.raises(cab.LastAdmin):
        store.delete_token(first.id)
    assert store.token(first.id)
    store.delete_token(app.id)
    store.delete_token(brief.id)
    second = add(store, admin=True)
    store.delete_token(first.id)
    assert store.tokens() == [second] and store.has_admin()


def test_an_expired_admin_is_none(store: cab.Store, clock: FakeClock) -> None:
    add(store, admin=True, expires_in_days=1)
    assert store.has_admin()
    clock.advance(86_400)
    assert not store.has_admin()


def test_revoking_takes_jobs_and_conversations_along(store: cab.Store, tmp_path: Path) -> None:
    gone, stays = add(store), add(store)
    for token in (gone, stays):
        exchange(store, token, "hi", "ho")
        store.open_conversation(token.id, "default")
        queue_up(store, token, "waits")
    store.delete_token(gone.id)
    for token_id in (gone.id, "none"):
        with pytest.raises(cab.NotFound):
            store.delete_token(token_id)
    for table in ("jobs", "conversations"):
        assert rows(tmp_path / "bridge.db", "SELECT DISTINCT token_id FROM " + table) == [(stays.id,)]


# --- the queue ---


def test_an_ask_is_stored_whole(store: cab.Store, clock: FakeClock) -> None:
    token, ask = add(store), cab.Ask("a\0b é 😀", "haiku", "Be brief.", '{"type":"object"}', "trip", "low", 30.0)
    made, position = store.enqueue(token.id, ask)
    assert position == 1
    assert store.job(made.id) == cab.Job(made.id, made.seq, token.id, "queued", ask.message, clock.now(), 0, "haiku", "Be brief.",
                                         '{"type":"object"}', "trip", "low")
    assert store.job(made.id.upper()) is None and store.job("") is None and store.job_status("none") is None


def test_jobs_run_first_come_first_served_and_positions_are_exact(store: cab.Store, clock: FakeClock) -> None:
    token = add(store)
    made = [store.enqueue(token.id, cab.Ask(str(number))) for number in range(4)]         # all in one second
    assert [position for _, position in made] == [1, 2, 3, 4]
    clock.advance(-60)                                                  # a clock set back must not let one overtake

    def positions() -> List[int]:
        return [store.queue_position(store.job(job.id) or job) for job, _ in made]

    assert positions() == [1, 2, 3, 4]
    assert claimed(store).message == "0" and positions() == [0, 1, 2, 3]
    assert store.enqueue(token.id, cab.Ask("late"))[1] == 5             # one runs, three wait
    assert [claimed(store).message for _ in range(4)] == ["1", "2", "3", "late"] and positions() == [0] * 4
    assert store.claim() is None and not store.has_queued()


def test_a_full_queue_says_when_to_come_again_and_stores_nothing(store: cab.Store) -> None:
    token = add(store)
    queue_up(store, token, *map(str, range(cab.QUEUE_JOBS)))
    claimed(store)                                                      # running jobs count
    with pytest.raises(cab.QueueFull) as refused:
        store.enqueue(token.id, cab.Ask("51"))
    assert refused.value.status == 429 and dict(refused.value.headers)["Retry-After"] == str(refused.value.extra["retryAfter"])
    assert int(dict(refused.value.headers)["Retry-After"]) > 0 and store.counts() == {"queued": 49, "processing": 1, "tokens": 1}
    store.delete_token(token.id)
    assert store.enqueue(add(store).id, cab.Ask("room again"))[1] == 1


def test_the_token_may_be_revoked_between_its_check_and_its_ask(store: cab.Store) -> None:
    token = add(store)
    store.delete_token(token.id)
    with pytest.raises(cab.InvalidToken):
        store.enqueue(token.id, cab.Ask("hi"))
    assert store.counts() == {"tokens": 0}


def test_a_claim_says_so_in_the_file(store: cab.Store, clock: FakeClock) -> None:
    made = queue_up(store, add(store), "hi")[0]
    clock.advance(5)
    job = claimed(store)
    assert job == store.job(made.id)
    assert (job.status, job.attempts, job.started_at, job.created_at) == ("processing", 1, clock.now(), clock.now() - 5)


def test_an_answer_is_stored_with_its_figures(store: cab.Store, clock: FakeClock) -> None:
    queue_up(store, add(store), "hi")
    job = claimed(store)
    clock.advance(3)
    answer = cab.Answer("a\ud800b", '{"x":1}', cab.Usage(10, 7, 5, 3, 0.001), "claude-haiku", None)
    assert store.complete(job, answer) is True
    done = store.job(job.id)
    assert done and (done.status, done.response, done.structured, done.usage, done.model, done.completed_at, done.is_finished) == (
        "completed", "a\ufffdb", '{"x":1}', cab.Usage(10, 7, 5, 3, 0.001), "claude-haiku", clock.now(), True)


def test_a_structured_answer_with_half_a_letter_is_stored_too(store: cab.Store) -> None:
    queue_up(store, add(store), "hi")
    job = claimed(store)
    assert store.complete(job, cab.Answer("", '{"x":"\ud800"}')) is True
    assert (store.job(job.id) or job).structured == '{"x":"\ufffd"}'


def test_a_failure_is_stored_with_its_code(store: cab.Store, clock: FakeClock) -> None:
    queue_up(store, add(store), "hi")
    job = claimed(store)
    assert store.fail(job, "timeout", "too \ud800 long") is True
    done = store.job(job.id)
    assert done and (done.status, done.error_code, done.error, done.completed_at, done.response) == (
        "error", "timeout", "too \ufffd long", clock.now(), None)


def ways_to_finish(store: cab.Store, job: cab.Job) -> List[bool]:
    return [store.complete(job, cab.Answer("new")), store.fail(job, "timeout", "new"), store.requeue(job)]


def test_a_job_that_is_no_longer_wanted_cannot_be_finished(store: cab.Store) -> None:
    token = add(store)
    queue_up(store, token, "waits", "runs", "revoked")
    waits = queue_up(store, token, "queued")[0]
    done = claimed(store)
    store.complete(done, cab.Answer("first"))
    assert ways_to_finish(store, done) == ways_to_finish(store, waits) == [False] * 3
    assert (store.job(done.id) or done).response == "first" and store.job_status(waits.id) == "queued"
    runs = claimed(store)
    store.delete_token(token.id)
    assert ways_to_finish(store, runs) == [False] * 3 and store.job(runs.id) is None


def test_a_job_put_back_runs_next_and_was_not_attempted(store: cab.Store) -> None:
    queue_up(store, add(store), "first", "second")
    job = claimed(store)
    assert store.requeue(job) is True
    back = store.job(job.id)
    assert back and (back.status, back.attempts, back.started_at, store.queue_position(back)) == ("queued", 0, None, 1)
    assert claimed(store).message == "first"


def test_after_a_crash_what_ran_waits_at_its_old_place_but_at_most_twice(store: cab.Store, clock: FakeClock) -> None:
    queue_up(store, add(store), "first", "second")
    first = claimed(store)
    assert store.recover() == (1, 0)
    assert (store.job(first.id) or first).attempts == 1
    again = claimed(store)
    assert (again.message, again.attempts) == ("first", 2)
    assert store.recover() == (0, 1) and store.recover() == (0, 0)
    lost = store.job(first.id)
    assert lost and (lost.status, lost.error_code, lost.completed_at) == ("error", "interrupted", clock.now()) and lost.error
    assert claimed(store).message == "second"


def test_old_finished_jobs_go_but_a_conversation_keeps_its_memory(store: cab.Store, clock: FakeClock) -> None:
    token = add(store)
    exchange(store, token, "remember", "yes")
    ended = [queue_up(store, token, message)[0] for message in ("done", "failed")]
    store.complete(claimed(store), cab.Answer("ok"))
    store.fail(claimed(store), "timeout", "x")
    running, waiting = queue_up(store, token, "runs", "waits")
    claimed(store)
    clock.advance(7 * 86_400)
    assert store.purge(7) == 0
    clock.advance(1)
    assert store.purge(7) == 2 and [store.job(job.id) for job in ended] == [None, None]
    assert [store.job_status(job.id) for job in (running, waiting)] == ["processing", "queued"]
    asked = store.job(queue_up(store, token, "what?", conversation="default")[0].id)
    assert asked and store.history(asked) == [("remember", "yes")]


def test_many_threads_and_two_stores_never_lose_or_share_a_place(open_store: Callable[..., cab.Store]) -> None:
    stores = [open_store(), open_store()]
    token, positions, refused = add(stores[0]), [], []

    def fill(store: cab.Store) -> None:
        for _ in range(15):
            try:
                positions.append(store.enqueue(token.id, cab.Ask("hi"))[1])
            except cab.QueueFull:
                refused.append(1)

    run_all([lambda store=store: fill(store) for store in stores * 2])  # type: ignore[misc]
    assert sorted(positions) == list(range(1, 51)) and len(refused) == 10
    found: List[Optional[cab.Job]] = []
    run_all([lambda store=store: found.extend(store.claim() for _ in range(20)) for store in stores * 2])  # type: ignore[misc]
    assert len({job.id for job in found if job}) == len([job for job in found if job]) == 50


def run_all(tasks: Sequence[Callable[[], Any]]) -> None:
    threads = [threading.Thread(target=task, name="task") for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- conversations ---


def test_a_conversation_is_continued_only_after_a_turn_that_succeeded(store: cab.Store) -> None:
    token = add(store)

    def turn(answer: Optional[cab.Answer]) -> Tuple[Optional[str], float]:
        queue_up(store, token, "hi", conversation="trip")
        job, opened = claimed(store), store.open_conversation(token.id, "trip")
        if answer:
            store.complete(job, answer)
        else:
            store.fail(job, "timeout", "x")
        return opened

    assert turn(cab.Answer("a", session_id="s1", spent_usd=0.5)) == (None, 0.0)
    assert turn(cab.Answer("b", session_id="s1", spent_usd=0.7)) == ("s1", 0.5)
    assert turn(None) == ("s1", 0.7)
    assert turn(cab.Answer("c", session_id=None))[0] is None            # the transcript may hold half a turn: never resumed
    assert store.open_conversation(token.id, "trip")[0] is None
    assert store.open_conversation(token.id, "other") == (None, 0.0)


def test_the_session_is_put_away_while_a_turn_runs(store: cab.Store) -> None:
    token = add(store)
    queue_up(store, token, "hi", conversation="trip")
    store.open_conversation(token.id, "trip")
    store.complete(claimed(store), cab.Answer("a", session_id="s1"))
    assert [store.open_conversation(token.id, "trip")[0] for _ in range(2)] == ["s1", None]


def test_a_conversation_of_a_revoked_token_is_not_begun(store: cab.Store, tmp_path: Path) -> None:
    assert store.open_conversation("gone", "trip") == (None, 0.0)
    assert rows(tmp_path / "bridge.db", "SELECT count(*) FROM conversations") == [(0,)]


def test_the_history_is_the_completed_turns_of_this_conversation_before_this_job(store: cab.Store, tmp_path: Path) -> None:
    token, other = add(store), add(store)
    exchange(store, token, "one", "1", "trip")
    exchange(store, token, "elsewhere", "x", "home")
    exchange(store, other, "somebody's", "x", "trip")
    queue_up(store, token, "failed", conversation="trip")
    store.fail(claimed(store), "timeout", "x")
    exchange(store, token, "two", "2", "trip")
    exchange(store, token, "now", "3", "trip")
    exchange(store, token, "later", "4", "trip")
    asked = store.job(rows(tmp_path / "bridge.db", "SELECT id FROM jobs WHERE message = 'now'")[0][0])
    assert asked and store.history(asked) == [("one", "1"), ("two", "2")]


@pytest.mark.parametrize("turns, size, kept", [
    (200, 1000, [0, 1, 2, 3]), (2, 1000, [2, 3]), (200, 60, [1, 2, 3]), (200, 59, [2, 3]), (200, 20, [3]),
])
def test_the_newest_turns_are_kept_within_both_limits(store: cab.Store, monkeypatch: pytest.MonkeyPatch, turns: int, size: int,
                                                      kept: List[int]) -> None:
    monkeypatch.setattr(cab, "HISTORY_TURNS", turns)
    monkeypatch.setattr(cab, "HISTORY_BYTES", size)
    token = add(store)
    for number in range(4):
        exchange(store, token, "%010d" % number, "é" * 5)               # 20 bytes a turn
    asked = store.job(queue_up(store, token, "now", conversation="default")[0].id)
    assert asked and [int(each.message) for each in store.history(asked)] == kept


# --- children, and the end of the program ---


def test_children_are_noted_and_forgotten(open_store: Callable[..., cab.Store]) -> None:
    store = open_store()
    for pid, started in ((10, "a"), (11, "b"), (10, "c"), (11, None), (12, None)):
        store.note_child(pid, started)
    store.close()
    assert open_store().children() == [(10, "c")]


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import claude_api_bridge as cab
store = cab.Store(Path(sys.argv[2]), cab.Clock())
token = store.add_token(cab.NewToken("app"), cab.new_token())
ids = [store.enqueue(token.id, cab.Ask(text))[0].id for text in ("first", "second")]
store.claim()
print(*ids, flush=True)
sys.stdin.read()
"""


def test_what_was_acknowledged_survives_kill_9(open_store: Callable[..., cab.Store], tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(MODULE.parent), str(tmp_path / "bridge.db")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        first, second = program.stdout.readline().decode().split()
        program.kill()
    store = open_store()
    assert [store.job_status(each) for each in (first, second)] == ["processing", "queued"]
    assert store.recover() == (1, 0)
    assert [claimed(store).id for _ in range(2)] == [first, second]


def test_an_admin_can_always_be_made_where_there_is_none(store: cab.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "TOKENS", 1)
    add(store)
    assert add(store, admin=True).is_admin
    with pytest.raises(cab.TokenLimit):
        add(store, admin=True)


def test_a_turn_larger_than_the_history_is_cut_and_not_forgotten(store: cab.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "HISTORY_BYTES", 10)
    token = add(store, session_mode="stateful")
    for message, response in (("old", "old"), ("new", "é" * 50), ("next", "")):
        store.enqueue(token.id, cab.Ask(message, conversation="default"))
        job = store.claim()
        assert job
        if response:
            store.complete(job, cab.Answer(response))
    assert store.history(job) == [("new", "ééé")]


def test_the_job_that_is_queued_is_the_job_that_is_stored(store: cab.Store) -> None:
    token = add(store, session_mode="stateful")
    job, _ = store.enqueue(token.id, cab.Ask("hi", "haiku", "be short", "{}", "trip", "low"))
    assert store.job(job.id) == job
