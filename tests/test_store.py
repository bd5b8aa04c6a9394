"""The store: what was said is on disk, in order, and stays there whatever ends the program. Real SQLite files throughout."""
from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import pytest
from conftest import MODULE, FakeClock, wait_until

import claude_api_bridge as cab

posix = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")


@pytest.fixture
def open_store(tmp_path: Path, clock: FakeClock) -> Iterator[Callable[..., cab.Database]]:
    """open_store(path) -> a Store, on one file unless told otherwise; closed at the end."""
    opened: List[cab.Database] = []

    def make(path: Optional[Path] = None) -> cab.Database:
        opened.append(cab.Database(path or tmp_path / "bridge.db", clock))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., cab.Database]) -> cab.Database:
    return open_store()


def rows(path: Path, sql: str, *values: Any) -> List[Tuple[Any, ...]]:
    """What another program sees in the file."""
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        return db.execute(sql, values).fetchall()


def dump(path: Path) -> List[str]:
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        return list(db.iterdump())


def add(store: cab.Database, name: str = "app", **fields: Any) -> cab.Token:
    return store.add_token(cab.NewToken(name, **fields), cab.new_token())


def queue_up(store: cab.Database, token: cab.Token, *messages: str, conversation: Optional[str] = None) -> List[cab.Job]:
    return [store.enqueue(token.id, cab.Ask(message, conversation=conversation)).job for message in messages]


def claimed(store: cab.Database) -> cab.Job:
    job = store.claim()
    assert job is not None
    return job


def exchange(store: cab.Database, token: cab.Token, message: str, response: str, conversation: str = "default") -> None:
    """One completed turn."""
    queue_up(store, token, message, conversation=conversation)
    assert store.complete(claimed(store), cab.Answer(response))


def modes(folder: Path) -> List[int]:
    return sorted({path.stat().st_mode & 0o777 for path in folder.iterdir()})


# --- the file ---


def test_a_fresh_file_is_made_empty_at_the_present_version(store: cab.Database, tmp_path: Path) -> None:
    assert (store.tokens(), store.claim(), store.counts(), store.has_admin()) == ([], None, {"tokens": 0}, False)
    assert rows(tmp_path / "bridge.db", "PRAGMA user_version") == [(len(cab.MIGRATIONS),)]
    assert rows(tmp_path / "bridge.db", "PRAGMA journal_mode") == [("wal",)]
    assert not (tmp_path / "bridge-original.db").exists()


@posix
def test_nobody_else_can_read_the_files(tmp_path: Path, open_store: Callable[..., cab.Database]) -> None:
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


def test_opening_again_changes_nothing(open_store: Callable[..., cab.Database], tmp_path: Path) -> None:
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
        cab.Database(path, clock)
    assert str(path) in str(refused.value) and refused.value.hint
    assert path.read_bytes() == content


def test_a_folder_in_the_place_of_the_file_is_a_sentence(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "bridge.db").mkdir()
    for path in (tmp_path / "bridge.db", tmp_path / "missing" / "bridge.db"):
        with pytest.raises(cab.CannotStart) as refused:
            cab.Database(path, clock)
        assert str(path) in str(refused.value)


def test_the_file_of_a_newer_version_is_refused_and_untouched(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "bridge.db"
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        db.execute("CREATE TABLE requests (id TEXT, future TEXT)")
        db.execute("PRAGMA user_version = %d" % (len(cab.MIGRATIONS) + 1))
    before = path.read_bytes()
    with pytest.raises(cab.CannotStart) as refused:
        cab.Database(path, clock)
    assert "newer version" in str(refused.value)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["bridge.db"]


def test_a_later_step_is_applied_to_a_file_of_today(tmp_path: Path, open_store: Callable[..., cab.Database], monkeypatch: pytest.MonkeyPatch) -> None:
    old = open_store()
    job = queue_up(old, add(old), "hi")[0]
    old.close()
    monkeypatch.setattr(cab, "MIGRATIONS", cab.MIGRATIONS + (("ALTER TABLE jobs ADD COLUMN later TEXT DEFAULT 'x'",),))
    assert open_store().job(job.id)
    assert rows(tmp_path / "bridge.db", "SELECT message, later FROM jobs") == [("hi", "x")]
    assert rows(tmp_path / "bridge.db", "PRAGMA user_version") == [(len(cab.MIGRATIONS),)]


def test_a_step_that_fails_half_way_leaves_the_file_as_it_was(tmp_path: Path, open_store: Callable[..., cab.Database], clock: FakeClock,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    old = open_store()
    queue_up(old, add(old), "hi")
    old.close()
    path = tmp_path / "bridge.db"
    before, version = dump(path), rows(path, "PRAGMA user_version")
    monkeypatch.setattr(cab, "MIGRATIONS", cab.MIGRATIONS + (("ALTER TABLE jobs ADD COLUMN later TEXT", "UPDATE jobs SET nonsense = 1"),))
    with pytest.raises(cab.CannotStart) as refused:
        cab.Database(path, clock)
    assert "nonsense" in str(refused.value)
    assert (dump(path), rows(path, "PRAGMA user_version")) == (before, version)


def test_a_file_that_somebody_else_is_writing_is_waited_for(tmp_path: Path, open_store: Callable[..., cab.Database]) -> None:
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


def test_two_stores_on_one_file_see_each_other_s_writes(open_store: Callable[..., cab.Database]) -> None:
    bridge, command_line = open_store(), open_store()
    token = add(command_line)
    job = queue_up(bridge, token, "hi")[0]
    assert bridge.token(token.id) == token and command_line.job_status(job.id) == "queued"
    running = claimed(bridge)
    command_line.delete_token(token.id)
    assert bridge.complete(running, cab.Answer("late")) is False and bridge.tokens() == []


def test_a_full_disk_is_an_answer_that_says_so_and_passes(store: cab.Database) -> None:
    token = add(store)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute("PRAGMA max_page_count = %d" % pages)             # SQLite's own full disk
    with pytest.raises(cab.Unavailable) as refused:
        queue_up(store, token, "x" * 30_000)
    assert refused.value.status == 503 and "full" in str(refused.value)
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert len(queue_up(store, token, "x" * 30_000)) == 1 and store.counts() == {"queued": 1, "tokens": 1}


def test_nobody_who_only_reads_waits_for_another_program(store: cab.Database, tmp_path: Path) -> None:
    token = add(store)
    job = queue_up(store, token, "hi")[0]
    began = time.monotonic()
    with contextlib.closing(sqlite3.connect(str(next(tmp_path.rglob("bridge.db"))), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert store.job(job.id) == job and store.places(job) == (1, 1) and store.jobs(token.id, (), None, 5) == ([job], None)
        store.touch_token(token)                                              # which everybody with a token causes
        with pytest.raises(cab.Unavailable, match="locked"):
            store.check_writable()                                            # and everybody who asks for /health
        other.execute("ROLLBACK")
    assert time.monotonic() - began < cab.WRITE_SECONDS
    store.check_writable()                                                    # whose turn comes after what waited
    assert store.tokens()[0].last_used_at is not None


def test_a_file_that_cannot_be_written_is_noticed(store: cab.Database) -> None:
    store.check_writable()
    store._db.execute("PRAGMA query_only = ON")
    with pytest.raises(cab.Unavailable):
        store.check_writable()


# --- writes that share a commit ---

@contextlib.contextmanager
def held_up(store: cab.Database, path: Path) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """begin(task): runs it in a thread of its own, where it waits to write, since another program holds the file until the end."""
    store.check_writable()
    threads: List[threading.Thread] = []
    looks, check = [], store._check_file_not_replaced
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as other, pytest.MonkeyPatch.context() as patch:
        other.execute("BEGIN IMMEDIATE")
        patch.setattr(store, "_check_file_not_replaced", lambda: looks.append(check()))
        store._write_queue.put(cab.WriteTask(lambda db: None))
        wait_until(lambda: looks)                            # the writer has this one alone, and waits for the file

        def begin(task: Callable[[], Any]) -> None:
            threads.append(threading.Thread(target=task, name="task"))
            threads[-1].start()
            wait_until(lambda: store._write_queue.qsize() == len(threads))

        yield begin
        other.execute("ROLLBACK")
    for thread in threads:
        thread.join(20)


def outcome(task: Callable[[], Any], into: List[Any]) -> Callable[[], None]:
    def run() -> None:
        try:
            into.append(task())
        except BaseException as error:
            into.append(error)
    return run


def test_writes_that_wait_for_each_other_share_a_commit(store: cab.Database, tmp_path: Path) -> None:
    token, statements, found = add(store), [], []
    store._db.set_trace_callback(statements.append)
    with held_up(store, tmp_path / "bridge.db") as begin:
        for n in range(12):
            begin(outcome(lambda n=n: store.enqueue(token.id, cab.Ask(str(n))).position, found))         # type: ignore[misc]
    assert sorted(found) == list(range(1, 13))
    assert sorted(int(text) for text, in rows(tmp_path / "bridge.db", "SELECT message FROM jobs")) == list(range(12))
    assert statements[statements.index("BEGIN IMMEDIATE") + 1:].count("COMMIT") <= 3        # that of `check_writable`, the first, the rest


def test_of_writes_that_share_a_commit_only_the_one_that_fails_is_undone(store: cab.Database, tmp_path: Path) -> None:
    token, found = add(store), []

    def fails(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM tokens")
        raise ValueError("half way")

    with held_up(store, tmp_path / "bridge.db") as begin:
        begin(outcome(lambda: store.enqueue(token.id, cab.Ask("first")), found))
        begin(outcome(lambda: store.enqueue(token.id, cab.Ask("second")), found))
        begin(outcome(lambda: store._write(cab.WriteTask(fails)), found))
        begin(outcome(lambda: store.enqueue(token.id, cab.Ask("third"), limit=2), found))
        begin(outcome(lambda: store.enqueue(token.id, cab.Ask("fourth")), found))
    names = sorted(type(each).__name__ for each in found)
    assert names == ["EnqueueResult"] * 3 + ["QueueFull", "ValueError"]
    assert rows(tmp_path / "bridge.db", "SELECT message FROM jobs") == [("first",), ("second",), ("fourth",)]
    assert len(store.tokens()) == 1


def test_a_key_that_comes_twice_within_a_commit_leads_to_one_request(store: cab.Database, tmp_path: Path) -> None:
    token, found = add(store), []
    with held_up(store, tmp_path / "bridge.db") as begin:
        for _ in range(4):
            begin(outcome(lambda: store.enqueue(token.id, cab.Ask("hi"), "key"), found))
    assert len({queued.job.id for queued in found}) == 1 and sorted(queued.is_new for queued in found) == [False] * 3 + [True]
    assert [queued.position for queued in found] == [1] * 4 and rows(tmp_path / "bridge.db", "SELECT count(*) FROM jobs") == [(1,)]


def test_a_commit_that_fails_is_told_to_each_and_leaves_nothing(store: cab.Database, tmp_path: Path) -> None:
    token, found = add(store), []
    store._db.execute("PRAGMA max_page_count = %d" % store._db.execute("PRAGMA page_count").fetchone()[0])
    with held_up(store, tmp_path / "bridge.db") as begin:
        for _ in range(5):
            begin(outcome(lambda: store.enqueue(token.id, cab.Ask("x" * 30_000)), found))
    assert len(found) == 5 and all(isinstance(error, cab.Unavailable) and "full" in str(error) for error in found)
    assert len({id(error) for error in found}) == 5                        # answers add headers to them
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert rows(tmp_path / "bridge.db", "SELECT count(*) FROM jobs") == [(0,)] and len(queue_up(store, token, "hi")) == 1


def test_who_was_told_that_the_file_is_locked_has_nothing_stored_later(store: cab.Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token, found = add(store), []
    with held_up(store, tmp_path / "bridge.db") as begin:
        monkeypatch.setattr(cab, "WRITE_SECONDS", 0.05)
        for _ in range(3):
            begin(outcome(lambda: store.enqueue(token.id, cab.Ask("hi")), found))
        wait_until(lambda: len(found) == 3)
        monkeypatch.undo()
    assert all(isinstance(error, cab.Unavailable) and "locked" in str(error) for error in found)
    store.check_writable()
    assert rows(tmp_path / "bridge.db", "SELECT count(*) FROM jobs") == [(0,)]


def test_a_store_that_is_closed_has_written_what_it_was_given_and_takes_nothing_more(open_store: Callable[..., cab.Database],
                                                                                   tmp_path: Path) -> None:
    store = open_store()
    token = add(store)
    store.touch_token(token)                                                # nobody waits for it
    store.close()
    assert rows(tmp_path / "bridge.db", "SELECT last_used_at IS NULL FROM tokens") == [(0,)]
    with pytest.raises(cab.Unavailable, match="closed"):
        add(store)


# --- what was read is kept ---

def test_what_was_read_is_kept_until_something_is_written(store: cab.Database) -> None:
    token = add(store)
    job = queue_up(store, token, "hi")[0]
    statements: List[str] = []
    store._reader.set_trace_callback(statements.append)

    def looks() -> int:
        before = len(statements)
        assert store.token(token.id) and store.counts()["tokens"] == 1
        row = store.job(job.id, without_bodies=True)
        assert row and store.places(row) == (0 if row.status == "processing" else 1, 1)
        return len(statements) - before

    assert looks() >= 4 and looks() == looks() == 0
    claimed(store)
    assert (store.job(job.id, without_bodies=True) or job).status == "processing" and looks() > 0 and looks() == 0


def test_what_another_program_changes_counts_after_a_moment(open_store: Callable[..., cab.Database], clock: FakeClock) -> None:
    bridge, command_line = open_store(), open_store()
    token = add(command_line)
    clock.advance(cab.CACHE_REVALIDATE_SECONDS)
    assert bridge.token(token.id) == token
    command_line.delete_token(token.id)
    clock.advance(cab.CACHE_REVALIDATE_SECONDS)
    assert bridge.token(token.id) is None


def test_what_changes_while_it_is_read_is_not_kept(store: cab.Database) -> None:
    found = store._once(store.kept(), "count", lambda: (store.counts()["tokens"], add(store))[0])
    assert found == 0 and "count" not in store.kept() and store.counts()["tokens"] == 1


def test_no_more_is_kept_than_has_a_place(store: cab.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "CACHE_ENTRIES", 10)
    for n in range(100):
        assert store.token(str(n)) is None and len(store.kept()) + len(store._token_cache) <= 10


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
def taken_over(tmp_path: Path, open_store: Callable[..., cab.Database]) -> cab.Database:
    with original(tmp_path / "bridge.db"):
        pass
    return open_store()


def test_the_original_s_tokens_go_on_working(taken_over: cab.Database, clock: FakeClock) -> None:
    found = {name: taken_over.token_by_digest(cab.digest(secret)) for name, secret in SECRETS.items()}
    assert {name: token and (token.id, token.name, token.prefix) for name, token in found.items()} == {
        name: ("id-" + name, name, secret[:12]) for name, secret in SECRETS.items()}
    assert [name for name, token in found.items() if token and token.is_admin] == ["admin"] and taken_over.has_admin()
    assert [name for name, token in found.items() if token and token.is_expired(clock.now())] == ["old"]
    assert [name for name, token in found.items() if token and token.session_mode == "stateful"] == ["memo"]
    assert {token.tools for token in taken_over.tokens()} == {"none"} and len(taken_over.tokens()) == 4


def test_the_original_s_queue_runs_in_its_order_with_what_was_running_first(taken_over: cab.Database) -> None:
    order = []
    while taken_over.has_queued():
        job = claimed(taken_over)
        order.append((job.message, job.attempts, taken_over.complete(job, cab.Answer("ok"))))
    assert order == [(message, 1, True) for message in ("running", "wait 1", "wait 2", "wait 3", "third")]


def test_the_original_s_finished_requests_can_still_be_polled(taken_over: cab.Database) -> None:
    done, failed = taken_over.job("d1"), taken_over.job("e1")
    assert done and (done.status, done.response, done.created_at, done.completed_at) == ("completed", "ok", BEGAN + 12, BEGAN + 13)
    assert failed and (failed.status, failed.error, failed.error_code) == ("error", "Claude CLI exited with code 1: x", "cli_error")
    assert taken_over.counts() == {"queued": 5, "completed": 3, "error": 1, "tokens": 4}


def test_a_stateful_token_of_the_original_keeps_its_memory(taken_over: cab.Database) -> None:
    job = taken_over.job("m3")
    assert job and job.conversation == "default"
    assert taken_over.history(job) == [("first", "one"), ("second", "two")]
    session = taken_over.open_conversation("id-memo", "default")
    assert (session.session_id, session.spent_usd) == (None, 0.0)       # its session is in another folder of the CLI's
    assert taken_over.has_conversation(session.key)


def test_new_requests_come_after_the_original_s(taken_over: cab.Database) -> None:
    token = taken_over.token("id-app")
    assert token and taken_over.enqueue(token.id, cab.Ask("new")).position == 6


def test_revoking_a_token_of_the_original_takes_its_requests_along(taken_over: cab.Database, tmp_path: Path) -> None:
    taken_over.delete_token("id-memo")
    assert rows(tmp_path / "bridge.db", "SELECT count(*) FROM jobs WHERE token_id = 'id-memo'") == [(0,)]
    assert rows(tmp_path / "bridge.db", "PRAGMA foreign_key_check") == []


def test_the_original_s_file_is_kept_beside_ours(taken_over: cab.Database, tmp_path: Path) -> None:
    copy = tmp_path / "bridge-original.db"
    assert rows(copy, "SELECT id, message, response, status, error FROM requests ORDER BY rowid") == [
        (key, message, response, status, error) for key, _, message, response, status, _, _, error in REQUESTS]
    assert rows(copy, "SELECT count(*) FROM tokens") == [(4,)] and rows(copy, "PRAGMA user_version") == [(0,)]
    assert os.name != "posix" or copy.stat().st_mode & 0o777 == 0o600


@posix
def test_what_the_original_left_at_a_kill_9_is_taken_over_and_closed_to_others(tmp_path: Path, open_store: Callable[..., cab.Database]) -> None:
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


def test_a_take_over_that_fails_leaves_the_original_s_file_as_it_was(tmp_path: Path, clock: FakeClock, open_store: Callable[..., cab.Database]) -> None:
    path = tmp_path / "bridge.db"
    with original(path) as db:
        db.execute("CREATE TABLE jobs (somebody_s TEXT)")               # in the way of ours
    before, data = dump(path), path.read_bytes()
    for _ in range(2):                                                  # the second try finds the copy of the first
        with pytest.raises(cab.CannotStart) as refused:
            cab.Database(path, clock)
        assert "jobs" in str(refused.value)
        assert dump(path) == before and path.read_bytes() == data
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        db.execute("DROP TABLE jobs")
    assert open_store().counts()["queued"] == 5


def test_the_original_s_file_without_a_request_is_taken_over_too(tmp_path: Path, open_store: Callable[..., cab.Database]) -> None:
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
        claude = cab.ClaudeInstall(("claude",), cab.Features.read("2.1.330", ""), {}, "nobody")
        with pytest.raises(cab.CannotStart) as refused, cab.Bridge(config, claude, clock, print):
            pass
    assert str(config.port) in str(refused.value)
    assert dump(tmp_path / "bridge.db") == before


# --- a file of version 1 ---

DAY = 86_400
MIDNIGHT = 1_799_971_200                                                # 2027-01-15T00:00:00Z, eight hours before the clock begins
#                  id, token, status, created, attempts, conversation, response, usage, error code
VERSION_1_JOBS = [("a1", "app", "completed", MIDNIGHT - 1, 1, None, "one", "[10,7,5,3,0.5]", None),
                  ("a2", "app", "error", MIDNIGHT, 2, None, None, None, "timeout"),
                  ("a3", "app", "completed", MIDNIGHT + 5.5, 1, None, "three", None, None),
                  ("m1", "memo", "completed", MIDNIGHT + 6, 1, "trip", "Rome", None, None),
                  ("a4", "app", "processing", MIDNIGHT + 10, 1, None, None, None, None),
                  ("m2", "memo", "queued", MIDNIGHT + 11, 0, "trip", None, None, None)]


@pytest.fixture
def version_1(tmp_path: Path) -> Path:
    """A file as the version before wrote it."""
    path = tmp_path / "bridge.db"
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as db:
        for statement in cab.MIGRATIONS[0]:
            db.execute(statement)
        db.execute("PRAGMA user_version = 1")
        for name, mode, tools in (("app", "stateless", '["Read","Bash(git log:*)"]'), ("memo", "stateful", '"none"'),
                                  ("new", "stateless", '"all"')):
            db.execute("INSERT INTO tokens VALUES (?, ?, ?, 'cab-00000000', ?, NULL, ?, ?, ?, ?, '/srv')",
                       (name, "name of " + name, cab.digest(name), mode, MIDNIGHT - 100, MIDNIGHT + 9, int(name == "app"), tools))
        for job_id, token, status, created, attempts, conversation, response, usage, code in VERSION_1_JOBS:
            db.execute("INSERT INTO jobs (id, token_id, status, message, created_at, attempts, model, conversation, response, usage,"
                       " error_code) VALUES (?, ?, ?, ?, ?, ?, 'haiku', ?, ?, ?, ?)",
                       (job_id, token, status, "message " + job_id, created, attempts, conversation, response, usage, code))
        for name, session in (("trip", "s1"), ("home", None)):
            db.execute("INSERT INTO conversations VALUES ('memo', ?, ?, 0.25, ?, ?)", (name, session, MIDNIGHT + 6, MIDNIGHT + 7))
        db.execute("INSERT INTO children VALUES (4711, 'then')")
    return path


def test_a_file_of_version_1_keeps_every_row(version_1: Path, open_store: Callable[..., cab.Database]) -> None:
    tables = ("tokens", "jobs", "conversations", "children")
    columns = {table: ", ".join(row[1] for row in rows(version_1, "PRAGMA table_info(%s)" % table)) for table in tables}

    def content() -> Dict[str, Any]:
        return {table: rows(version_1, "SELECT %s FROM %s ORDER BY rowid" % (columns[table], table)) for table in tables}

    before = content()
    store = open_store()
    assert content() == before and {table: len(found) for table, found in before.items()} == {
        "tokens": 3, "jobs": 6, "conversations": 2, "children": 1}
    assert rows(version_1, "PRAGMA user_version") == [(len(cab.MIGRATIONS),)] and rows(version_1, "PRAGMA foreign_key_check") == []
    assert [path.name for path in version_1.parent.glob("*original*")] == []
    store.close()
    after = dump(version_1)
    open_store().close()
    assert dump(version_1) == after


def test_the_tokens_of_version_1_go_on_without_limits(version_1: Path, open_store: Callable[..., cab.Database]) -> None:
    assert open_store().token_by_digest(cab.digest("app")) == cab.Token(
        "app", "name of app", "cab-00000000", "stateless", None, MIDNIGHT - 100, MIDNIGHT + 9, True, ("Read", "Bash(git log:*)"), "/srv")


def test_the_queue_of_version_1_goes_on(version_1: Path, open_store: Callable[..., cab.Database]) -> None:
    store = open_store()
    assert store.job("a1") == cab.Job("a1", 1, "app", "completed", "message a1", MIDNIGHT - 1, 1, "haiku", response="one",
                                      usage=cab.Usage(10, 7, 5, 3, 0.5))
    assert store.recover() == (1, 0) and [claimed(store).id for _ in range(2)] == ["a4", "m2"]
    asked = store.job("m2")
    assert asked and store.history(asked) == [("message m1", "Rome")]
    assert [each.name for each in store.conversations("memo")] == ["trip"]
    assert store.enqueue("new", cab.Ask("new"), "key").is_new and not store.enqueue("new", cab.Ask("new"), "key").is_new


def test_usage_begins_with_what_version_1_had_counted(version_1: Path, open_store: Callable[..., cab.Database]) -> None:
    store = open_store()
    nothing = cab.Usage()
    assert store.usage("") == [cab.DayUsage("2027-01-14", "app", 1, 1, 0, nothing), cab.DayUsage("2027-01-15", "app", 3, 1, 1, nothing),
                               cab.DayUsage("2027-01-15", "memo", 2, 1, 0, nothing)]
    queue_up(store, store.tokens()[0], "of today")
    assert sum(row.requests for row in store.usage("2027-01-15")) == 6


def test_each_conversation_of_version_1_gets_a_key_and_keeps_its_session(version_1: Path, open_store: Callable[..., cab.Database]) -> None:
    store = open_store()
    trip, home = store.open_conversation("memo", "trip"), store.open_conversation("memo", "home")
    assert (trip[1:], home[1:]) == (("s1", 0.25), (None, 0.25))
    assert trip.key != home.key and all(len(each.key) == 32 and store.has_conversation(each.key) for each in (trip, home))


# --- tokens ---


def test_a_token_is_found_by_its_digest_and_never_stored(store: cab.Database, clock: FakeClock, tmp_path: Path) -> None:
    secret = cab.new_token()
    new = cab.NewToken("app", "stateful", 7, True, ("Read", "Bash(git log:*)"), 10, 200, ("haiku", "sonnet[1m]"))
    made = store.add_token(new, secret, "/srv/work")
    assert made == cab.Token(made.id, "app", secret[:12], "stateful", clock.now() + 7 * 86_400, clock.now(), None, True,
                             ("Read", "Bash(git log:*)"), "/srv/work", 10, 200, ("haiku", "sonnet[1m]"))
    assert store.token_by_digest(cab.digest(secret)) == made == store.token(made.id)
    assert store.token_by_digest(secret) is None and store.token_by_digest("") is None and store.token("none") is None
    store.close()
    assert secret.encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_tokens_are_listed_newest_first_in_one_second_too(store: cab.Database, clock: FakeClock) -> None:
    names = [add(store, name).name for name in ("a", "b")]
    clock.advance(1)
    names.append(add(store, "c").name)
    assert [token.name for token in store.tokens()] == names[::-1]


@pytest.mark.parametrize("days, is_expired", [(None, (False, False)), (1, (False, True)), (90, (False, False))])
def test_a_token_expires_to_the_second(store: cab.Database, clock: FakeClock, days: Optional[int], is_expired: Tuple[bool, bool]) -> None:
    token = add(store, expires_in_days=days)
    assert (token.is_expired(clock.now() + 86_399), token.is_expired(clock.now() + 86_400)) == is_expired


def test_the_use_of_a_token_is_noted_at_most_once_a_minute(store: cab.Database, clock: FakeClock) -> None:
    token, noted, began = add(store), [], clock.now()
    for seconds in (0, 1, 58, 1, 59, 1, -3600):                         # the clock may be set back, too
        clock.advance(seconds)
        token = store.token(token.id) or token
        store.touch_token(token)
        store.check_writable()                                              # nobody waits for the note: this comes after it
        noted.append((store.token(token.id) or token).last_used_at)
        store.touch_token(replace(token, last_used_at=None))                # as who read it before sees it
        assert store._write_queue.qsize() == 0
    assert [int(moment - began) for moment in noted if moment is not None] == [0, 0, 0, 60, 60, 120, -3480]


def test_the_101st_token_is_refused_but_expired_ones_do_not_count(store: cab.Database, clock: FakeClock) -> None:
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


def test_the_last_admin_cannot_be_revoked_and_an_expired_one_is_no_help(store: cab.Database, clock: FakeClock) -> None:
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


def test_an_expired_admin_is_none(store: cab.Database, clock: FakeClock) -> None:
    add(store, admin=True, expires_in_days=1)
    assert store.has_admin()
    clock.advance(86_400)
    assert not store.has_admin()


def test_revoking_takes_jobs_and_conversations_along(store: cab.Database, tmp_path: Path) -> None:
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


def test_an_ask_is_stored_whole(store: cab.Database, clock: FakeClock) -> None:
    token, ask = add(store), cab.Ask("a\0b é 😀", "haiku", "Be brief.", '{"type":"object"}', "trip", "low", 30.0)
    made, position, is_new = store.enqueue(token.id, ask)
    assert (position, is_new) == (1, True)
    assert store.job(made.id) == cab.Job(made.id, made.seq, token.id, "queued", ask.message, clock.now(), 0, "haiku", "Be brief.",
                                         '{"type":"object"}', "trip", "low")
    assert store.job(made.id.upper()) is None and store.job("") is None and store.job_status("none") is None


def test_jobs_run_first_come_first_served_and_positions_are_exact(store: cab.Database, clock: FakeClock) -> None:
    token = add(store)
    made = [store.enqueue(token.id, cab.Ask(str(number))) for number in range(4)]         # all in one second
    assert [queued.position for queued in made] == [1, 2, 3, 4]
    clock.advance(-60)                                                  # a clock set back must not let one overtake

    def places() -> List[Tuple[int, int]]:
        return [store.places(store.job(queued.job.id) or queued.job) for queued in made]

    assert places() == [(1, 1), (2, 2), (3, 3), (4, 4)]
    first = claimed(store)
    assert first.message == "0" and places() == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert store.enqueue(token.id, cab.Ask("late")).position == 5       # one runs, three wait
    assert [claimed(store).message for _ in range(4)] == ["1", "2", "3", "late"] and places() == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert store.claim() is None and not store.has_queued()
    assert store.complete(first, cab.Answer("ok")) and places() == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_a_full_queue_says_when_to_come_again_and_stores_nothing(store: cab.Database) -> None:
    token = add(store)
    queue_up(store, token, *map(str, range(cab.QUEUE_JOBS)))
    claimed(store)                                                      # running jobs count
    with pytest.raises(cab.QueueFull) as refused:
        store.enqueue(token.id, cab.Ask("51"))
    assert refused.value.status == 429 and dict(refused.value.headers)["Retry-After"] == str(refused.value.extra["retryAfter"])
    assert int(dict(refused.value.headers)["Retry-After"]) > 0 and store.counts() == {"queued": 49, "processing": 1, "tokens": 1}
    store.delete_token(token.id)
    assert store.enqueue(add(store).id, cab.Ask("room again")).position == 1


def test_the_token_may_be_revoked_between_its_check_and_its_ask(store: cab.Database) -> None:
    token = add(store)
    store.delete_token(token.id)
    with pytest.raises(cab.InvalidToken):
        store.enqueue(token.id, cab.Ask("hi"))
    assert store.counts() == {"tokens": 0}


def test_a_claim_says_so_in_the_file(store: cab.Database, clock: FakeClock) -> None:
    made = queue_up(store, add(store), "hi")[0]
    clock.advance(5)
    job = claimed(store)
    assert job == store.job(made.id)
    assert (job.status, job.attempts, job.started_at, job.created_at) == ("processing", 1, clock.now(), clock.now() - 5)


def test_an_answer_is_stored_with_its_figures(store: cab.Database, clock: FakeClock) -> None:
    queue_up(store, add(store), "hi")
    job = claimed(store)
    clock.advance(3)
    answer = cab.Answer("a\ud800b", '{"x":1}', cab.Usage(10, 7, 5, 3, 0.001), "claude-haiku", None)
    assert store.complete(job, answer) is True
    done = store.job(job.id)
    assert done and (done.status, done.response, done.structured, done.usage, done.model, done.completed_at, done.is_finished) == (
        "completed", "a\ufffdb", '{"x":1}', cab.Usage(10, 7, 5, 3, 0.001), "claude-haiku", clock.now(), True)


def test_a_structured_answer_with_half_a_letter_is_stored_too(store: cab.Database) -> None:
    queue_up(store, add(store), "hi")
    job = claimed(store)
    assert store.complete(job, cab.Answer("", '{"x":"\ud800"}')) is True
    assert (store.job(job.id) or job).structured == '{"x":"\ufffd"}'


def test_a_failure_is_stored_with_its_code(store: cab.Database, clock: FakeClock) -> None:
    queue_up(store, add(store), "hi")
    job = claimed(store)
    assert store.fail(job, "timeout", "too \ud800 long") is True
    done = store.job(job.id)
    assert done and (done.status, done.error_code, done.error, done.completed_at, done.response) == (
        "error", "timeout", "too \ufffd long", clock.now(), None)


def ways_to_finish(store: cab.Database, job: cab.Job) -> List[bool]:
    return [store.complete(job, cab.Answer("new")), store.fail(job, "timeout", "new"), store.requeue(job)]


def test_a_job_that_is_no_longer_wanted_cannot_be_finished(store: cab.Database) -> None:
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


def test_a_job_put_back_runs_next_and_was_not_attempted(store: cab.Database) -> None:
    queue_up(store, add(store), "first", "second")
    job = claimed(store)
    assert store.requeue(job) is True
    back = store.job(job.id)
    assert back and (back.status, back.attempts, back.started_at, store.places(back)) == ("queued", 0, None, (1, 1))
    assert claimed(store).message == "first"


def test_after_a_crash_what_ran_waits_at_its_old_place_but_at_most_twice(store: cab.Database, clock: FakeClock) -> None:
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


def test_old_finished_jobs_go_but_a_conversation_keeps_its_memory(store: cab.Database, clock: FakeClock) -> None:
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


def test_many_threads_and_two_stores_never_lose_or_share_a_place(open_store: Callable[..., cab.Database]) -> None:
    stores = [open_store(), open_store()]
    token, positions, refused = add(stores[0]), [], []

    def fill(store: cab.Database) -> None:
        for _ in range(15):
            try:
                positions.append(store.enqueue(token.id, cab.Ask("hi")).position)
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


# --- how a job ends ---

OPEN = (cab.JobStatus.QUEUED, cab.JobStatus.PROCESSING)


def test_a_job_that_waits_can_be_cancelled(store: cab.Database, clock: FakeClock) -> None:
    first, second = queue_up(store, add(store), "first", "second")
    clock.advance(3)
    assert store.fail(first, "cancelled", "x") is False                 # without more words only a running one fails
    assert store.fail(first, "cancelled", "The request was cancelled.", OPEN) is True
    ended = store.job(first.id)
    assert ended and (ended.status, ended.error_code, ended.error, ended.started_at, ended.completed_at) == (
        "error", "cancelled", "The request was cancelled.", None, clock.now())
    assert store.places(ended) == (0, 0) and store.places(second) == (1, 1) and claimed(store) == store.job(second.id)


def test_a_job_that_runs_can_be_cancelled_and_its_answer_comes_too_late(store: cab.Database) -> None:
    queue_up(store, add(store), "hi")
    job = claimed(store)
    assert store.fail(job, "cancelled", "x", ("queued",)) is False
    assert store.fail(job, "cancelled", "x", OPEN) is True
    cancelled = store.job(job.id)
    assert ways_to_finish(store, job) == [False] * 3 and store.recover() == (0, 0) and store.job(job.id) == cancelled


@pytest.mark.parametrize("code", [None, "timeout"])
def test_a_finished_job_cannot_be_cancelled(store: cab.Database, code: Optional[str]) -> None:
    token = add(store)
    queue_up(store, token, "hi")
    job = claimed(store)
    assert store.fail(job, code, "x") if code else store.complete(job, cab.Answer("ok"))
    before, usage = store.job(job.id), store.usage("")
    assert store.fail(job, "cancelled", "x", OPEN) is False
    assert (store.job(job.id), store.usage("")) == (before, usage)


def test_an_answer_says_how_often_its_text_began_anew(store: cab.Database) -> None:
    first, second = queue_up(store, add(store), "first", "second")
    assert store.complete(claimed(store), cab.Answer("ok"), 3) and store.complete(claimed(store), cab.Answer("ok"))
    assert [(store.job(job.id) or job).generation for job in (first, second)] == [3, 0]


def test_a_text_that_a_crash_cut_off_begins_anew(store: cab.Database) -> None:
    waits, runs = queue_up(store, add(store), "runs", "waits")[::-1]
    assert store.requeue(claimed(store), 2) and claimed(store).generation == 2
    assert store.recover() == (1, 0)
    assert [(store.job(job.id) or job).generation for job in (runs, waits)] == [3, 0]
    assert claimed(store).generation == 3


# --- Idempotency-Keys ---

ASK = cab.Ask("hi", "haiku", "Be brief.", '{"type":"object"}', "trip", "low")


def test_a_key_leads_to_the_request_that_it_made(store: cab.Database, clock: FakeClock) -> None:
    token = add(store)
    queue_up(store, token, "before")
    first = store.enqueue(token.id, ASK, "key")
    clock.advance(100)
    assert first.is_new and first.position == 2
    for ask in (ASK, replace(ASK, wait=30.0, stream=True)):
        assert store.enqueue(token.id, ask, "key") == (first.job, 2, False)
    assert [store.enqueue(token.id, ASK, key).is_new for key in ("another key", None, None)] == [True] * 3
    assert store.counts()["queued"] == 5 and store.usage("")[0].requests == 5


def test_a_key_leads_to_the_request_as_it_stands_now(store: cab.Database) -> None:
    token = add(store)
    store.enqueue(token.id, ASK, "key")
    runs = claimed(store)
    assert store.enqueue(token.id, ASK, "key") == (runs, 1, False)
    store.complete(runs, cab.Answer("ok", usage=cab.Usage(1, 2, 3, 4, 0.5)), 1)
    assert store.enqueue(token.id, ASK, "key") == (store.job(runs.id), 0, False)
    store.delete_conversation(token.id, "trip")
    assert store.enqueue(token.id, ASK, "key").job.response == "ok"


@pytest.mark.parametrize("changes", [
    {"message": "ho"}, {"model": None}, {"system_prompt": None}, {"json_schema": None}, {"conversation": "home"}, {"effort": "high"},
], ids=lambda changes: str(*changes))
def test_a_key_that_was_used_for_another_body_is_a_conflict(store: cab.Database, changes: Dict[str, Any]) -> None:
    token = add(store)
    first = store.enqueue(token.id, ASK, "key")
    with pytest.raises(cab.IdempotencyConflict) as refused:
        store.enqueue(token.id, replace(ASK, **changes), "key")
    assert refused.value.status == 409 and store.enqueue(token.id, ASK, "key").job == first.job


def test_a_key_is_the_token_s_own(store: cab.Database) -> None:
    one, other = add(store), add(store)
    first = store.enqueue(one.id, ASK, "key")
    second = store.enqueue(other.id, cab.Ask("something else"), "key")
    assert second.is_new and second.job.id != first.job.id
    store.delete_token(one.id)
    with pytest.raises(cab.InvalidToken):
        store.enqueue(one.id, ASK, "key")
    assert store.enqueue(other.id, cab.Ask("something else"), "key") == (second.job, 1, False)


@pytest.mark.parametrize("limits, refusal", [
    ({}, cab.QueueFull), ({"requests_per_minute": 1}, cab.RateLimited), ({"requests_per_day": 1}, cab.DailyLimit),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_replay_needs_no_room_and_no_allowance(store: cab.Database, limits: Dict[str, Any], refusal: Any) -> None:
    token = add(store, **limits)
    first = store.enqueue(token.id, ASK, "key", limit=1)
    with pytest.raises(refusal):
        store.enqueue(token.id, ASK, "a new key", limit=1)
    assert store.enqueue(token.id, ASK, "key", limit=1) == (first.job, 1, False)
    with pytest.raises(cab.IdempotencyConflict):
        store.enqueue(token.id, cab.Ask("ho"), "key", limit=1)


def test_a_key_is_remembered_by_the_file_for_as_long_as_the_request(open_store: Callable[..., cab.Database], clock: FakeClock) -> None:
    store = open_store()
    token, ask = add(store), cab.Ask("hi")
    first = store.enqueue(token.id, ask, "key").job
    store.close()
    store = open_store()
    assert store.enqueue(token.id, ask, "key") == (first, 1, False)
    store.complete(claimed(store), cab.Answer("ok"))
    clock.advance(8 * DAY)
    assert not store.enqueue(token.id, ask, "key").is_new
    assert store.purge(7) == 1 and store.enqueue(token.id, ask, "key").is_new


def test_threads_with_few_keys_make_as_many_requests_as_there_are_keys(open_store: Callable[..., cab.Database]) -> None:
    stores, keys = [open_store(), open_store()], ["a", "b", "c"]
    token = add(stores[0])
    found: List[Tuple[str, cab.EnqueueResult]] = []
    conflicts: List[str] = []

    def ask(store: cab.Database, seed: int) -> None:
        chance = random.Random(seed)
        for key in chance.sample(keys * 4, 12):
            found.append((key, store.enqueue(token.id, cab.Ask(key), key)))
            with contextlib.suppress(cab.IdempotencyConflict):
                store.enqueue(token.id, cab.Ask("something else"), key)
                conflicts.append(key)

    run_all([lambda seed=seed: ask(stores[seed % 2], seed) for seed in range(6)])  # type: ignore[misc]
    assert len(found) == 72 and conflicts == [] and stores[0].counts()["queued"] == 3 and stores[0].usage("")[0].requests == 3
    assert sorted(key for key, queued in found if queued.is_new) == keys
    assert len({(key, queued.job.id) for key, queued in found}) == 3


# --- the limits of a token ---


def refused_for(store: cab.Database, token: cab.Token, kind: Any) -> int:
    """The seconds after which the next ask is welcome."""
    with pytest.raises(kind) as refused:
        store.enqueue(token.id, cab.Ask("one too many"))
    wait = refused.value.extra["retryAfter"]
    assert refused.value.status == 429 and refused.value.headers == (("Retry-After", str(wait)),) and type(wait) is int
    return int(wait)


def granted(store: cab.Database, token: cab.Token, tries: int) -> int:
    count = 0
    for _ in range(tries):
        with contextlib.suppress(cab.RateLimited, cab.DailyLimit):
            store.enqueue(token.id, cab.Ask("hi"), limit=1_000)
            count += 1
    return count


def test_a_token_may_ask_so_often_within_60_seconds(store: cab.Database, clock: FakeClock) -> None:
    token, free = add(store, requests_per_minute=3), add(store)
    for seconds in (0, 10, 20):
        clock.advance(seconds)
        queue_up(store, token, "hi")
    assert refused_for(store, token, cab.RateLimited) == 30 and granted(store, free, 20) == 20
    clock.advance(29.5)
    assert refused_for(store, token, cab.RateLimited) == 1
    clock.advance(0.5)
    assert granted(store, token, 5) == 1 and refused_for(store, token, cab.RateLimited) == 10
    clock.advance(10)
    assert granted(store, token, 5) == 1 and refused_for(store, token, cab.RateLimited) == 20


@pytest.mark.parametrize("most, seed", [(1, 0), (2, 1), (3, 2), (5, 3), (9, 4)])
def test_no_60_seconds_hold_more_asks_than_the_limit_and_none_is_refused_without_need(store: cab.Database, clock: FakeClock, most: int,
                                                                                       seed: int) -> None:
    chance, token, asked = random.Random(seed), add(store, requests_per_minute=most), [0.0]
    for _ in range(60):
        clock.advance(chance.choice((0, 0, 0.25, 1, 7.5, 20)))
        recent = [moment for moment in asked if moment > clock.now() - 60]
        if len(recent) == most:
            wait = refused_for(store, token, cab.RateLimited)
            assert wait - 1 < recent[0] + 60 - clock.now() <= wait
        else:
            store.enqueue(token.id, cab.Ask("hi"), limit=1_000)
            asked.append(clock.now())


def test_a_clock_set_back_locks_no_token_out(store: cab.Database, clock: FakeClock) -> None:
    token = add(store, requests_per_minute=2)
    assert granted(store, token, 5) == 2
    clock.advance(-3_600)
    assert granted(store, token, 5) == 2 and refused_for(store, token, cab.RateLimited) == 60
    clock.advance(60)
    assert granted(store, token, 5) == 2


def test_a_token_may_ask_so_often_on_one_day_of_utc(store: cab.Database, clock: FakeClock) -> None:
    token, free = add(store, requests_per_day=2), add(store)
    clock.at = MIDNIGHT - 0.5
    assert granted(store, token, 5) == 2 and granted(store, free, 5) == 5
    with pytest.raises(cab.DailyLimit) as refused:
        queue_up(store, token, "hi")
    assert refused.value.extra == {"resetsAt": "2027-01-15T00:00:00.000Z", "retryAfter": 1} and "2 requests a day" in str(refused.value)
    clock.at = MIDNIGHT
    assert granted(store, token, 5) == 2 and refused_for(store, token, cab.DailyLimit) == DAY
    clock.advance(DAY - 0.001)
    assert refused_for(store, token, cab.DailyLimit) == 1
    clock.advance(0.001)
    assert granted(store, token, 5) == 2


def test_the_day_s_requests_stay_used_whatever_becomes_of_them(open_store: Callable[..., cab.Database], clock: FakeClock) -> None:
    store = open_store()
    token = add(store, requests_per_day=4)
    queue_up(store, token, "completed", "failed", "cancelled", "put back")
    store.complete(claimed(store), cab.Answer("ok"))
    store.fail(claimed(store), "timeout", "x")
    store.fail(claimed(store), "cancelled", "x", OPEN)
    store.requeue(claimed(store))
    assert store.purge(-1) == 3
    wait = refused_for(store, token, cab.DailyLimit)
    assert wait == 16 * 3_600
    store.close()
    assert refused_for(open_store(), token, cab.DailyLimit) == wait


def test_a_token_with_both_limits_keeps_to_both(store: cab.Database, clock: FakeClock) -> None:
    token = add(store, requests_per_minute=2, requests_per_day=3)
    assert granted(store, token, 5) == 2 and refused_for(store, token, cab.RateLimited) == 60
    clock.advance(60)
    assert granted(store, token, 5) == 1 and refused_for(store, token, cab.DailyLimit) == 16 * 3_600 - 60


@pytest.mark.parametrize("refusal, limits, key, room", [
    (cab.RateLimited, {"requests_per_minute": 2}, "new key", 50), (cab.DailyLimit, {"requests_per_day": 2}, "new key", 50),
    (cab.QueueFull, {}, "new key", 2), (cab.IdempotencyConflict, {}, "key", 50),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_refused_ask_leaves_no_trace(store: cab.Database, clock: FakeClock, tmp_path: Path, refusal: Any, limits: Dict[str, Any], key: str,
                                       room: int) -> None:
    token = add(store, **limits)
    store.enqueue(token.id, ASK, "key")
    queue_up(store, token, "hi")
    before = dump(tmp_path / "bridge.db")
    for _ in range(3):
        with pytest.raises(refusal):
            store.enqueue(token.id, cab.Ask("other"), key, room)
    assert dump(tmp_path / "bridge.db") == before
    clock.advance(DAY)
    assert store.enqueue(token.id, cab.Ask("other"), "new key").is_new


# --- lists of jobs ---


def walk(store: cab.Database, token: Optional[cab.Token] = None, statuses: Sequence[str] = (), limit: int = 3,
         meanwhile: Callable[[], Any] = lambda: None) -> List[List[str]]:
    """The messages of all pages."""
    pages: List[List[str]] = []
    before: Optional[int] = None
    for _ in range(100):
        jobs, before = store.jobs(token.id if token else None, statuses, before, limit)
        assert len(jobs) <= limit and (jobs or before is None) and [store.job(job.id) for job in jobs] == jobs
        pages.append([job.message for job in jobs])
        if before is None:
            return pages
        meanwhile()
    raise AssertionError("the pages do not end")


@pytest.mark.parametrize("limit, pages", [
    (1, ["6", "5", "4", "3", "2", "1", "0"]), (3, ["654", "321", "0"]), (6, ["654321", "0"]), (7, ["6543210"]), (100, ["6543210"]),
])
def test_the_pages_hold_every_job_once_newest_first(store: cab.Database, clock: FakeClock, limit: int, pages: List[str]) -> None:
    token, other = add(store), add(store)
    for number in range(7):
        clock.advance(-1)                                               # the order is that of the queue, not of the clock
        queue_up(store, token, str(number))
    new = iter("abcdefgh")
    assert walk(store, token, limit=limit, meanwhile=lambda: queue_up(store, token, next(new))) == [list(page) for page in pages]
    assert walk(store, other) == [[]]


def test_a_page_holds_the_jobs_of_one_token_or_of_all(store: cab.Database) -> None:
    one, other = add(store), add(store)
    for number in range(2):
        queue_up(store, one, "one %d" % number)
        queue_up(store, other, "other %d" % number)
    assert walk(store, one) == [["one 1", "one 0"]] and walk(store, other, limit=1) == [["other 1"], ["other 0"]]
    assert walk(store) == [["other 1", "one 1", "other 0"], ["one 0"]]
    store.delete_token(one.id)
    assert walk(store, one) == [[]] and walk(store) == [["other 1", "other 0"]]


@pytest.mark.parametrize("statuses, messages", [
    ((), "435210"), (("queued",), "43"), (("processing",), "2"), (("completed",), "0"), (("error",), "51"), (("queued", "error"), "4351"),
    (("error", "queued", "error"), "4351"), (("completed", "processing"), "20"), (cab.JobStatus.ALL, "435210"),
], ids=lambda value: ",".join(value))
def test_a_page_holds_the_statuses_that_were_asked_for(store: cab.Database, statuses: Sequence[str], messages: str) -> None:
    token = add(store)
    queue_up(store, token, "0", "1", "2")
    cancelled = queue_up(store, token, "5", "3", "4")[0]
    store.complete(claimed(store), cab.Answer("ok"))
    store.fail(claimed(store), "timeout", "x")
    claimed(store)
    store.fail(cancelled, "cancelled", "x", OPEN)
    for limit in (1, 2, 100):
        assert [message for page in walk(store, token, statuses, limit) for message in page] == list(messages)


def test_a_page_ends_early_where_it_is_large(store: cab.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "PAGE_CHARACTERS", 300)      # ids and status are 78 to 81 of a row
    token = add(store)
    queue_up(store, token, "small 1", "small 2", "x" * 500, "y" * 60, "z" * 60, "small 3", "answered")
    assert walk(store, token, limit=100) == [["answered", "small 3", "z" * 60], ["y" * 60, "x" * 500], ["small 2", "small 1"]]
    while store.has_queued():
        job = claimed(store)
        store.complete(job, cab.Answer("a" * 300 if job.message == "answered" else ""))
    assert walk(store, token, limit=100)[0] == ["answered"]


# --- conversations ---


def test_a_conversation_is_continued_only_after_a_turn_that_succeeded(store: cab.Database) -> None:
    token = add(store)
    keys: Set[str] = set()

    def turn(answer: Optional[cab.Answer]) -> Tuple[Optional[str], float]:
        queue_up(store, token, "hi", conversation="trip")
        job, opened = claimed(store), store.open_conversation(token.id, "trip")
        keys.add(opened.key)
        if answer:
            store.complete(job, answer)
        else:
            store.fail(job, "timeout", "x")
        return opened[1:]

    assert turn(cab.Answer("a", session_id="s1", spent_usd=0.5)) == (None, 0.0)
    assert turn(cab.Answer("b", session_id="s1", spent_usd=0.7)) == ("s1", 0.5)
    assert turn(None) == ("s1", 0.7)
    assert turn(cab.Answer("c", session_id=None))[0] is None            # the transcript may hold half a turn: never resumed
    assert store.open_conversation(token.id, "trip").session_id is None
    assert keys == {store.open_conversation(token.id, "trip").key}      # one conversation all the time
    assert store.open_conversation(token.id, "other")[1:] == (None, 0.0) and store.open_conversation(token.id, "other").key not in keys


def test_the_session_is_put_away_while_a_turn_runs(store: cab.Database) -> None:
    token = add(store)
    queue_up(store, token, "hi", conversation="trip")
    store.open_conversation(token.id, "trip")
    store.complete(claimed(store), cab.Answer("a", session_id="s1"))
    assert [store.open_conversation(token.id, "trip").session_id for _ in range(2)] == ["s1", None]


def test_a_conversation_of_a_revoked_token_is_not_begun(store: cab.Database, tmp_path: Path) -> None:
    session = store.open_conversation("gone", "trip")
    assert session[1:] == (None, 0.0) and not store.has_conversation(session.key)
    assert rows(tmp_path / "bridge.db", "SELECT count(*) FROM conversations") == [(0,)]


def test_the_history_is_the_completed_turns_of_this_conversation_before_this_job(store: cab.Database, tmp_path: Path) -> None:
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
def test_the_newest_turns_are_kept_within_both_limits(store: cab.Database, monkeypatch: pytest.MonkeyPatch, turns: int, size: int,
                                                      kept: List[int]) -> None:
    monkeypatch.setattr(cab, "HISTORY_TURNS", turns)
    monkeypatch.setattr(cab, "HISTORY_BYTES", size)
    token = add(store)
    for number in range(4):
        exchange(store, token, "%010d" % number, "é" * 5)               # 20 bytes a turn
    asked = store.job(queue_up(store, token, "now", conversation="default")[0].id)
    assert asked and [int(each.message) for each in store.history(asked)] == kept


def test_conversations_are_listed_with_their_turns_the_one_used_last_first(store: cab.Database, clock: FakeClock) -> None:
    token, other, began = add(store), add(store), clock.now()
    for name in ("trip", "home", "work"):
        exchange(store, token, "hi", "ho", name)
        clock.advance(10)
    exchange(store, token, "more", "ho", "trip")
    exchange(store, other, "somebody's", "x", "theirs")
    queue_up(store, token, "of no conversation")
    store.complete(claimed(store), cab.Answer("ok"))
    clock.advance(10)
    queue_up(store, token, "fails", conversation="home")
    job = claimed(store)
    clock.advance(5)
    queue_up(store, token, "waits", conversation="new")
    clock.advance(5)
    store.fail(job, "timeout", "x")
    assert store.conversations(token.id) == [("home", 1, began + 10, began + 50), ("new", 0, began + 45, began + 45),
                                             ("trip", 2, began, began + 30), ("work", 1, began + 20, began + 20)]
    queue_up(store, other, "in one second", conversation="a")
    queue_up(store, other, "in one second", conversation="b")
    assert [each.name for each in store.conversations(other.id)] == ["b", "a", "theirs"] and store.conversations("none") == []


def test_a_conversation_that_is_deleted_is_gone_alone(store: cab.Database) -> None:
    token, other = add(store), add(store)
    for owner, name in ((token, "trip"), (token, "home"), (other, "trip")):
        exchange(store, owner, "hi", "ho", name)
    keys = [store.open_conversation(owner.id, name).key for owner, name in ((token, "trip"), (token, "home"), (other, "trip"))]
    assert [store.delete_conversation(token.id, name) for name in ("nowhere", "trip", "trip")] == [False, True, False]
    assert store.delete_conversation("none", "home") is False
    assert [each.name for each in store.conversations(token.id)] == ["home"] and len(store.conversations(other.id)) == 1
    assert [store.has_conversation(key) for key in keys] == [False, True, True]


def test_what_was_said_in_a_deleted_conversation_can_still_be_polled_and_goes_with_its_time(store: cab.Database, clock: FakeClock) -> None:
    token = add(store)
    exchange(store, token, "hi", "ho", "trip")
    [[message]] = walk(store, token)
    store.delete_conversation(token.id, "trip")
    job = store.jobs(token.id, (), None, 10)[0][0]
    assert (message, job.message, job.response, job.conversation) == ("hi", "hi", "ho", None)
    clock.advance(7 * DAY + 1)
    assert store.purge(7) == 1 and store.usage("")[0].completed == 1


def test_what_waits_begins_a_deleted_conversation_afresh(store: cab.Database) -> None:
    token = add(store)
    exchange(store, token, "hi", "ho", "trip")
    before = store.open_conversation(token.id, "trip")
    exchange(store, token, "again", "ho", "trip")
    store._db.execute("UPDATE conversations SET session_id = 's1', spent_usd = 0.5")
    waits, later = queue_up(store, token, "waits", "later", conversation="trip")
    assert len(store.history(waits)) == 2
    assert store.delete_conversation(token.id, "trip") is True
    assert claimed(store) == store.job(waits.id) and (store.job(waits.id) or later).conversation == "trip" and store.history(waits) == []
    after = store.open_conversation(token.id, "trip")
    assert after[1:] == (None, 0.0) and after.key != before.key
    assert store.has_conversation(after.key) and not store.has_conversation(before.key)
    store.complete(waits, cab.Answer("first", session_id="s2"))
    assert store.history(later) == [("waits", "first")] and store.open_conversation(token.id, "trip") == (after.key, "s2", 0.0)
    assert [(each.name, each.turns) for each in store.conversations(token.id)] == [("trip", 1)]


def test_a_job_that_ran_when_its_conversation_was_deleted_leaves_nothing_in_the_next_one(store: cab.Database) -> None:
    token = add(store)
    runs, waits = queue_up(store, token, "secret", "waits", conversation="trip")
    claimed(store)
    before = store.open_conversation(token.id, "trip")
    assert store.delete_conversation(token.id, "trip") is True
    store.open_conversation(token.id, "trip")                           # the next one is there before the old run ends
    assert store.complete(runs, cab.Answer("told", session_id="s1", spent_usd=0.5)) is True
    assert (store.job(runs.id) or waits).response == "told"
    after = store.open_conversation(token.id, "trip")
    assert after[1:] == (None, 0.0) and after.key != before.key and store.history(waits) == []


def test_a_job_that_ran_when_its_conversation_was_deleted_is_tried_again_without_it(store: cab.Database) -> None:
    token = add(store)
    queue_up(store, token, "put back", conversation="trip")
    store.open_conversation(token.id, "trip")
    job = claimed(store)
    store.delete_conversation(token.id, "trip")
    store.requeue(job)
    assert claimed(store).conversation is None and store.conversations(token.id) == []


# --- usage ---


def test_usage_is_counted_on_the_day_of_the_request(store: cab.Database, clock: FakeClock) -> None:
    one, other = sorted((add(store), add(store)), key=lambda token: token.id)
    clock.at = MIDNIGHT - 1
    queue_up(store, one, "asked late")
    queue_up(store, other, "fails")
    clock.advance(2)
    assert store.complete(claimed(store), cab.Answer("ok", usage=cab.Usage(10, 7, 1000, 100, 0.25)))
    assert store.fail(claimed(store), "timeout", "x")
    for figures in (cab.Usage(1, 2, 3, 4, 0.5), cab.Usage(10, 20, 30, 40, 0.25)):
        queue_up(store, other, "of today")
        assert store.complete(claimed(store), cab.Answer("ok", usage=figures))
    today = cab.DayUsage("2027-01-15", other.id, 2, 2, 0, cab.Usage(11, 22, 33, 44, 0.75))
    late = cab.DayUsage("2027-01-14", one.id, 1, 1, 0, cab.Usage(10, 7, 1000, 100, 0.25))
    failed = cab.DayUsage("2027-01-14", other.id, 1, 0, 1, cab.Usage())
    assert store.usage("2027-01-14") == [late, failed, today]
    assert store.usage("2027-01-15") == [today] and store.usage("2027-01-16") == []
    assert store.usage("2027-01-14", other.id) == [failed, today] and store.usage("2027-01-15", one.id) == []


def test_each_job_is_counted_once_however_it_ends(store: cab.Database) -> None:
    token = add(store)
    jobs = queue_up(store, token, "completed", "failed", "cancelled", "cut off twice", "cancelled while it waits", "waits")
    store.complete(claimed(store), cab.Answer("ok", usage=cab.Usage(1)))
    store.fail(claimed(store), "timeout", "x")
    store.fail(claimed(store), "cancelled", "x", OPEN)
    for _ in range(2):
        claimed(store)
        store.recover()
    store.fail(jobs[4], "cancelled", "x", OPEN)
    usage = store.usage("")
    assert usage == [cab.DayUsage("2027-01-15", token.id, 6, 1, 4, cab.Usage(1))]
    for job in jobs[:5]:
        assert ways_to_finish(store, job) == [False] * 3
    assert store.recover() == (0, 0) and store.usage("") == usage


def test_what_a_revoked_token_used_stays_in_the_sums(store: cab.Database, clock: FakeClock) -> None:
    token = add(store)
    queue_up(store, token, "done", "runs", "waits")
    store.complete(claimed(store), cab.Answer("ok", usage=cab.Usage(1)))
    running = claimed(store)
    usage = store.usage("")
    store.delete_token(token.id)
    assert store.complete(running, cab.Answer("late", usage=cab.Usage(1))) is False and store.fail(running, "timeout", "x") is False
    assert store.usage("") == usage == [cab.DayUsage("2027-01-15", token.id, 3, 1, 0, cab.Usage(1))]
    clock.advance(30 * DAY)
    store.purge(7)
    assert store.usage("") == usage


def test_usage_goes_after_400_days(store: cab.Database, clock: FakeClock) -> None:
    token = add(store)
    for _ in range(2):
        queue_up(store, token, "waits")
        clock.advance(DAY)
    clock.at = MIDNIGHT + 400 * DAY + DAY - 1
    store.purge(7)
    assert [row.day for row in store.usage("")] == ["2027-01-15", "2027-01-16"]
    clock.advance(1)
    store.purge(7)
    assert [row.day for row in store.usage("")] == ["2027-01-16"] and store.counts()["queued"] == 2


def test_the_limits_of_the_plan_are_kept_as_they_were_told_last(open_store: Callable[..., cab.Database], clock: FakeClock) -> None:
    store, now = open_store(), clock.now()
    assert store.windows() == []
    five, seven = cab.RateLimitWindow("five_hour", "allowed", 0.42, now + 3_600.5, now), cab.RateLimitWindow("seven_day", None, None, None, now)
    store.save_plan_limits([seven, five])
    assert store.windows() == [five, seven]
    full = cab.RateLimitWindow("five_hour", "rejected", 1.0, None, now + 60)
    store.save_plan_limits([full])
    store.save_plan_limits([])
    store.close()
    assert open_store().windows() == [full, seven]


def test_a_limit_with_half_a_letter_is_kept_too(store: cab.Database) -> None:
    told = {"status": "a\ud800", "rateLimitType": "b\udfff", "overageStatus": "c\ud800", "resetsAt": 1}
    store.save_plan_limits(cab.parse_rate_limits({"rate_limit_info": told}, 7.0).windows)
    assert {window.seen_at for window in store.windows()} == {7.0}


# --- children, and the end of the program ---


def test_children_are_noted_and_forgotten(open_store: Callable[..., cab.Database]) -> None:
    store = open_store()
    for pid, started in ((10, "a"), (11, "b"), (10, "c"), (11, None), (12, None)):
        store.record_process(pid, started)
    store.close()
    assert open_store().children() == [(10, "c", None)]


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


def test_what_was_acknowledged_survives_kill_9(open_store: Callable[..., cab.Database], tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(MODULE.parent), str(tmp_path / "bridge.db")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        first, second = program.stdout.readline().decode().split()
        program.kill()
    store = open_store()
    assert [store.job_status(each) for each in (first, second)] == ["processing", "queued"]
    assert store.recover() == (1, 0)
    assert [claimed(store).id for _ in range(2)] == [first, second]


def test_an_admin_can_always_be_made_where_there_is_none(store: cab.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "TOKENS", 1)
    add(store)
    assert add(store, admin=True).is_admin
    with pytest.raises(cab.TokenLimit):
        add(store, admin=True)


def test_a_turn_larger_than_the_history_is_cut_and_not_forgotten(store: cab.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "HISTORY_BYTES", 10)
    token = add(store, session_mode="stateful")
    for message, response in (("old", "old"), ("new", "é" * 50), ("next", "")):
        store.enqueue(token.id, cab.Ask(message, conversation="default"))
        job = store.claim()
        assert job
        if response:
            store.complete(job, cab.Answer(response))
    assert store.history(job) == [("new", "ééé")]


def test_the_job_that_is_queued_is_the_job_that_is_stored(store: cab.Database) -> None:
    token = add(store, session_mode="stateful")
    job = store.enqueue(token.id, cab.Ask("hi", "haiku", "be short", "{}", "trip", "low"), "a key").job
    assert store.job(job.id) == job
