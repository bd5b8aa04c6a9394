"""The database: acknowledged writes are on disk, in order, and survive any end of the program.

All tests use real SQLite files.
"""

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
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import pytest
from conftest import MODULE, FakeClock, wait_until

import claude_api_bridge as cab

posix = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")


@pytest.fixture
def open_store(tmp_path: Path, clock: FakeClock) -> Iterator[Callable[..., cab.Stores]]:
    """Return open_store(path=None, metrics=None) -> open stores, by default on one shared file."""
    opened: List[cab.Stores] = []

    def make(path: Optional[Path] = None, metrics: Optional[cab.Metrics] = None) -> cab.Stores:
        opened.append(cab.Stores(path or tmp_path / "bridge.db", clock, metrics))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., cab.Stores]) -> cab.Stores:
    return open_store()


def rows(path: Path, sql: str, *values: Any) -> List[Tuple[Any, ...]]:
    """Return the rows that another connection to the file reads."""
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        return db.execute(sql, values).fetchall()


def dump(path: Path) -> List[str]:
    """Return the file's content as SQL statements."""
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        return list(db.iterdump())


def add(store: cab.Stores, name: str = "app", **fields: Any) -> cab.Token:
    """Add a token and return its record."""
    return store.tokens.add(cab.NewToken(name, **fields), cab.new_token())


def queue_up(
    store: cab.Stores, token: cab.Token, *messages: str, conversation: Optional[str] = None
) -> List[cab.Job]:
    """Enqueue one job for each message."""
    return [
        store.jobs.enqueue(token.id, cab.Ask(message, conversation=conversation)).job
        for message in messages
    ]


def claim(store: cab.Stores) -> cab.Job:
    """Claim the next job; fail if there is none."""
    job = store.jobs.claim()
    assert job is not None
    return job


def exchange(
    store: cab.Stores,
    token: cab.Token,
    message: str,
    response: str,
    conversation: str = "default",
) -> None:
    """Store one completed turn of a conversation."""
    queue_up(store, token, message, conversation=conversation)
    assert store.jobs.complete(claim(store), cab.Answer(response))


def modes(folder: Path) -> List[int]:
    """Return the distinct permission bits of the files in a folder."""
    return sorted({path.stat().st_mode & 0o777 for path in folder.iterdir()})


# --- the file ---


def test_a_new_file_is_empty_and_has_the_current_schema_version(
    store: cab.Stores, tmp_path: Path
) -> None:
    assert (store.tokens.list(), store.tokens.has_admin()) == ([], False)
    assert (store.jobs.claim(), store.jobs.counts()) == (None, {})
    assert rows(tmp_path / "bridge.db", "PRAGMA user_version") == [(len(cab.MIGRATIONS),)]
    assert rows(tmp_path / "bridge.db", "PRAGMA journal_mode") == [("wal",)]
    assert not (tmp_path / "bridge-original.db").exists()


@posix
def test_other_users_cannot_read_the_files(
    tmp_path: Path, open_store: Callable[..., cab.Stores]
) -> None:
    before = os.umask(0)
    try:
        folder = cab.private_directory(tmp_path / "a" / "data")
        store = open_store(folder / "bridge.db")
        add(store)
    finally:
        os.umask(before)
    assert modes(folder) == [0o600] and folder.stat().st_mode & 0o777 == 0o700


@posix
def test_a_folder_that_other_users_could_read_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    assert cab.private_directory(tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_a_file_in_place_of_the_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("mine")
    for folder in (tmp_path / "data", tmp_path / "data" / "below"):
        with pytest.raises(cab.CannotStart) as refused:
            cab.private_directory(folder)
        assert str(folder) in str(refused.value) and refused.value.hint
    assert (tmp_path / "data").read_text() == "mine"


def test_opening_a_file_again_changes_nothing(
    open_store: Callable[..., cab.Stores], tmp_path: Path
) -> None:
    first = open_store()
    queue_up(first, add(first), "hi")
    first.close()
    before = dump(tmp_path / "bridge.db")
    open_store().close()
    assert dump(tmp_path / "bridge.db") == before


@pytest.mark.parametrize(
    "content", [b"no database, but somebody's notes\n" * 100, b"SQLite format 3\0" + b"\xff" * 4000]
)
def test_a_file_that_is_not_a_database_is_refused_and_unchanged(
    content: bytes, tmp_path: Path, clock: FakeClock
) -> None:
    path = tmp_path / "bridge.db"
    path.write_bytes(content)
    with pytest.raises(cab.CannotStart) as refused:
        cab.Stores(path, clock)
    assert str(path) in str(refused.value) and refused.value.hint
    assert path.read_bytes() == content


def test_a_folder_in_place_of_the_file_is_a_clear_error(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "bridge.db").mkdir()
    for path in (tmp_path / "bridge.db", tmp_path / "missing" / "bridge.db"):
        with pytest.raises(cab.CannotStart) as refused:
            cab.Stores(path, clock)
        assert str(path) in str(refused.value)


def test_a_file_of_a_newer_version_is_refused_and_unchanged(
    tmp_path: Path, clock: FakeClock
) -> None:
    path = tmp_path / "bridge.db"
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        db.execute("CREATE TABLE requests (id TEXT, future TEXT)")
        db.execute("PRAGMA user_version = %d" % (len(cab.MIGRATIONS) + 1))
    before = path.read_bytes()
    with pytest.raises(cab.CannotStart) as refused:
        cab.Stores(path, clock)
    assert "newer version" in str(refused.value)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["bridge.db"]


def test_a_new_migration_is_applied_to_a_current_file(
    tmp_path: Path, open_store: Callable[..., cab.Stores], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = open_store()
    job = queue_up(old, add(old), "hi")[0]
    old.close()
    monkeypatch.setattr(
        cab, "MIGRATIONS",
        cab.MIGRATIONS + (("ALTER TABLE jobs ADD COLUMN later TEXT DEFAULT 'x'",),),
    )
    assert open_store().jobs.get(job.id)
    assert rows(tmp_path / "bridge.db", "SELECT message, later FROM jobs") == [("hi", "x")]
    assert rows(tmp_path / "bridge.db", "PRAGMA user_version") == [(len(cab.MIGRATIONS),)]


def test_a_migration_that_fails_half_way_leaves_the_file_unchanged(
    tmp_path: Path,
    open_store: Callable[..., cab.Stores],
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = open_store()
    queue_up(old, add(old), "hi")
    old.close()
    path = tmp_path / "bridge.db"
    before, version = dump(path), rows(path, "PRAGMA user_version")
    monkeypatch.setattr(
        cab,
        "MIGRATIONS",
        cab.MIGRATIONS
        + (("ALTER TABLE jobs ADD COLUMN later TEXT", "UPDATE jobs SET nonsense = 1"),),
    )
    with pytest.raises(cab.CannotStart) as refused:
        cab.Stores(path, clock)
    assert "nonsense" in str(refused.value)
    assert (dump(path), rows(path, "PRAGMA user_version")) == (before, version)


def test_opening_waits_for_another_writer(
    tmp_path: Path, open_store: Callable[..., cab.Stores]
) -> None:
    # Two commands start on a new folder: the second finds the file locked while the first one
    # creates it.
    path = tmp_path / "bridge.db"
    with contextlib.closing(
        sqlite3.connect(str(path), isolation_level=None, check_same_thread=False)
    ) as other:
        other.execute("CREATE TABLE theirs (x)")
        other.execute("BEGIN IMMEDIATE")
        done = threading.Timer(0.2, other.execute, ("COMMIT",))
        done.start()
        try:
            assert open_store(path).jobs.counts() == {}
        finally:
            done.join()


def test_two_databases_on_one_file_see_each_other_s_writes(
    open_store: Callable[..., cab.Stores],
) -> None:
    bridge, command_line = open_store(), open_store()
    token = add(command_line)
    job = queue_up(bridge, token, "hi")[0]
    assert bridge.tokens.get(token.id) == token and command_line.jobs.status(job.id) == "queued"
    running = claim(bridge)
    command_line.tokens.delete(token.id)
    assert bridge.jobs.complete(running, cab.Answer("late")) is False and bridge.tokens.list() == []


def test_a_full_disk_is_an_error_answer_and_passes(store: cab.Stores) -> None:
    token = add(store)
    pages = store.database._db.execute("PRAGMA page_count").fetchone()[0]
    # SQLite's own simulation of a full disk.
    store.database._db.execute("PRAGMA max_page_count = %d" % pages)
    with pytest.raises(cab.Unavailable) as refused:
        queue_up(store, token, "x" * 30_000)
    assert refused.value.status == 503 and "full" in str(refused.value)
    store.database._db.execute("PRAGMA max_page_count = 1000000")
    assert len(queue_up(store, token, "x" * 30_000)) == 1
    assert store.jobs.counts() == {"queued": 1}


def test_reads_do_not_wait_for_another_program_s_lock(store: cab.Stores, tmp_path: Path) -> None:
    token = add(store)
    job = queue_up(store, token, "hi")[0]
    start = time.monotonic()
    with contextlib.closing(
        sqlite3.connect(str(next(tmp_path.rglob("bridge.db"))), isolation_level=None)
    ) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert store.jobs.get(job.id) == job
        assert store.jobs.queue_positions(job) == (1, 1)
        assert store.jobs.page(cab.JobFilter(token.id), None, 5) == ([job], None)
        # Every authenticated request does this.
        store.tokens.touch(token)
        with pytest.raises(cab.Unavailable, match="locked"):
            # GET /health does this.
            store.database.check_writable()
        other.execute("ROLLBACK")
    assert time.monotonic() - start < cab.WRITE_SECONDS
    # This write runs after the one that waited.
    store.database.check_writable()
    assert store.tokens.list()[0].last_used_at is not None


def test_a_file_that_cannot_be_written_is_reported(store: cab.Stores) -> None:
    store.database.check_writable()
    store.database._db.execute("PRAGMA query_only = ON")
    with pytest.raises(cab.Unavailable):
        store.database.check_writable()


# --- writes that share a commit ---


@contextlib.contextmanager
def blocked_writer(
    store: cab.Stores, path: Path
) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Yield submit(task), which runs the task in its own thread.

    Another connection holds the write lock until the block ends, so that all tasks wait.
    """
    store.database.check_writable()
    threads: List[threading.Thread] = []
    checks, check = [], store.database._check_file_not_replaced
    with (
        contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as other,
        pytest.MonkeyPatch.context() as patch,
    ):
        other.execute("BEGIN IMMEDIATE")
        patch.setattr(store.database, "_check_file_not_replaced", lambda: checks.append(check()))
        store.database.write_later(lambda db: None)
        # The writer thread has only this task in its batch, and waits for the lock.
        wait_until(lambda: checks)

        def submit(task: Callable[[], Any]) -> None:
            threads.append(threading.Thread(target=task, name="task"))
            threads[-1].start()
            wait_until(lambda: store.database._write_queue.qsize() == len(threads))

        yield submit
        other.execute("ROLLBACK")
    for thread in threads:
        thread.join(20)


def outcome(task: Callable[[], Any], into: List[Any]) -> Callable[[], None]:
    """Return a function that runs the task and appends its result or exception to a list."""

    def run() -> None:
        try:
            into.append(task())
        except BaseException as error:
            into.append(error)

    return run


def test_waiting_writes_share_a_commit(store: cab.Stores, tmp_path: Path) -> None:
    token, statements, results = add(store), [], []
    store.database._db.set_trace_callback(statements.append)
    with blocked_writer(store, tmp_path / "bridge.db") as submit:
        for number in range(12):
            task = partial(store.jobs.enqueue, token.id, cab.Ask(str(number)))
            submit(outcome(task, results))
    assert sorted(queued.position for queued in results) == list(range(1, 13))
    assert sorted(
        int(text) for (text,) in rows(tmp_path / "bridge.db", "SELECT message FROM jobs")
    ) == list(range(12))
    # One of `check_writable`, one of the first task, one of all others.
    assert statements[statements.index("BEGIN IMMEDIATE") + 1 :].count("COMMIT") <= 3


def test_only_the_failed_write_of_a_shared_commit_is_rolled_back(
    store: cab.Stores, tmp_path: Path
) -> None:
    token, outcomes = add(store), []

    def fails(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM tokens")
        raise ValueError("half way")

    with blocked_writer(store, tmp_path / "bridge.db") as submit:
        submit(outcome(lambda: store.jobs.enqueue(token.id, cab.Ask("first")), outcomes))
        submit(outcome(lambda: store.jobs.enqueue(token.id, cab.Ask("second")), outcomes))
        submit(outcome(lambda: store.database.write(fails), outcomes))
        submit(outcome(lambda: store.jobs.enqueue(token.id, cab.Ask("third"), limit=2), outcomes))
        submit(outcome(lambda: store.jobs.enqueue(token.id, cab.Ask("fourth")), outcomes))
    names = sorted(type(result).__name__ for result in outcomes)
    assert names == ["EnqueueResult"] * 3 + ["QueueFull", "ValueError"]
    assert rows(tmp_path / "bridge.db", "SELECT message FROM jobs") == [
        ("first",),
        ("second",),
        ("fourth",),
    ]
    assert len(store.tokens.list()) == 1


def test_a_key_used_four_times_within_one_commit_creates_one_request(
    store: cab.Stores, tmp_path: Path
) -> None:
    token, results = add(store), []
    with blocked_writer(store, tmp_path / "bridge.db") as submit:
        for _ in range(4):
            submit(outcome(lambda: store.jobs.enqueue(token.id, cab.Ask("hi"), "key"), results))
    assert len({queued.job.id for queued in results}) == 1
    assert sorted(queued.is_new for queued in results) == [False] * 3 + [True]
    assert [queued.position for queued in results] == [1] * 4
    assert rows(tmp_path / "bridge.db", "SELECT count(*) FROM jobs") == [(1,)]


def test_a_failed_commit_raises_in_every_caller_and_stores_nothing(
    store: cab.Stores, tmp_path: Path
) -> None:
    token, errors = add(store), []
    store.database._db.execute(
        "PRAGMA max_page_count = %d" % store.database._db.execute("PRAGMA page_count").fetchone()[0]
    )
    with blocked_writer(store, tmp_path / "bridge.db") as submit:
        for _ in range(5):
            submit(outcome(lambda: store.jobs.enqueue(token.id, cab.Ask("x" * 30_000)), errors))
    assert len(errors) == 5
    assert all(isinstance(error, cab.Unavailable) and "full" in str(error) for error in errors)
    # Each caller gets its own exception object, because the answer adds headers to it.
    assert len({id(error) for error in errors}) == 5
    store.database._db.execute("PRAGMA max_page_count = 1000000")
    assert rows(tmp_path / "bridge.db", "SELECT count(*) FROM jobs") == [(0,)]
    assert len(queue_up(store, token, "hi")) == 1


def test_a_write_reported_as_locked_is_not_stored_later(
    store: cab.Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, errors = add(store), []
    with blocked_writer(store, tmp_path / "bridge.db") as submit:
        monkeypatch.setattr(cab, "WRITE_SECONDS", 0.05)
        for _ in range(3):
            submit(outcome(lambda: store.jobs.enqueue(token.id, cab.Ask("hi")), errors))
        wait_until(lambda: len(errors) == 3)
        monkeypatch.undo()
    assert all(isinstance(error, cab.Unavailable) and "locked" in str(error) for error in errors)
    store.database.check_writable()
    assert rows(tmp_path / "bridge.db", "SELECT count(*) FROM jobs") == [(0,)]


def test_close_writes_what_is_pending_and_later_writes_are_refused(
    open_store: Callable[..., cab.Stores], tmp_path: Path
) -> None:
    store = open_store()
    token = add(store)
    # No caller waits for this write.
    store.tokens.touch(token)
    store.close()
    assert rows(tmp_path / "bridge.db", "SELECT last_used_at IS NULL FROM tokens") == [(0,)]
    with pytest.raises(cab.Unavailable, match="closed"):
        add(store)


def test_a_write_after_close_began_fails_at_once(
    open_store: Callable[..., cab.Stores], tmp_path: Path
) -> None:
    store = open_store()
    token = add(store)
    results: List[Any] = []
    with blocked_writer(store, tmp_path / "bridge.db") as submit:
        submit(outcome(lambda: store.jobs.enqueue(token.id, cab.Ask("in time")), results))
        closing = threading.Thread(target=store.close, name="task")
        closing.start()
        # Behind the pending write the queue contains its end.
        wait_until(lambda: store.database._write_queue.qsize() == 2)
        start = time.monotonic()
        with pytest.raises(cab.Unavailable, match="closed"):
            store.jobs.enqueue(token.id, cab.Ask("too late"))
        # No caller waits for this write, so it raises nothing.
        store.tokens.touch(token)
        assert time.monotonic() - start < 1
        assert closing.is_alive() and results == []
    closing.join(20)
    assert [result.is_new for result in results] == [True]
    assert rows(tmp_path / "bridge.db", "SELECT message FROM jobs") == [("in time",)]


@pytest.mark.parametrize("number", range(8))
def test_every_write_that_races_with_close_is_stored_or_fails_at_once(
    store: cab.Stores, tmp_path: Path, number: int
) -> None:
    token = add(store)
    accepted: List[str] = []
    refused: List[str] = []

    def write() -> None:
        while not refused:
            try:
                accepted.append(store.jobs.enqueue(token.id, cab.Ask("hi"), limit=10_000).job.id)
            except cab.Unavailable as error:
                refused.append(str(error))

    threads = [threading.Thread(target=write, name="task") for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(accepted) >= number)
    start = time.monotonic()
    store.close()
    for thread in threads:
        thread.join(20)
    # A write behind the end of the queue would wait for WRITE_SECONDS.
    assert time.monotonic() - start < cab.WRITE_SECONDS / 2
    assert refused and all("closed" in text for text in refused)
    stored = [job_id for (job_id,) in rows(tmp_path / "bridge.db", "SELECT id FROM jobs")]
    assert sorted(stored) == sorted(accepted)


def test_a_caller_that_gives_up_while_its_write_fails_does_not_end_the_writer(
    store: cab.Stores,
) -> None:
    class GivesUp(Future[Any]):
        """A future that its caller cancels just after the writer looked at its state."""

        def cancelled(self) -> bool:
            result = super().cancelled()
            self.cancel()
            return result

        def running(self) -> bool:
            result = super().running()
            self.cancel()
            return result

    future = GivesUp()
    with pytest.MonkeyPatch.context() as patch:
        # The whole batch fails, as it does when another program holds the lock for 10 s, which is
        # also the time that a caller waits.
        patch.setattr(store.database, "_check_file_not_replaced", lambda: 1 / 0)
        store.database._write_queue.put(cab.WriteTask(lambda db: None, future))
        wait_until(future.done)
    wait_until(lambda: store.database._write_queue.qsize() == 0)
    time.sleep(0.05)
    assert store.database._writer_thread.is_alive()
    add(store)


# --- metrics ---


def counters(metrics: cab.Metrics) -> Dict[str, float]:
    """Return the counters of the store that are not 0, by name and labels."""
    return {
        " ".join([name, *(value for _, value in labels if value)]): amount
        for (name, labels), amount in metrics.values().items()
        if amount
    }


def counters_of_rows(path: Path) -> Dict[str, float]:
    """Return what the counters must be if every row was counted once."""
    expected = {
        "cab_requests_accepted_total": rows(path, "SELECT count(*) FROM jobs")[0][0],
    }
    for status, code, amount in rows(
        path,
        "SELECT status, error_code, count(*) FROM jobs WHERE status IN ('completed', 'error')"
        " GROUP BY 1, 2",
    ):
        name = " ".join(filter(None, ("cab_requests_finished_total", status, code)))
        expected[name] = amount
    kinds = ("input", "output", "cache_read", "cache_creation")
    columns = ", ".join("coalesce(sum(%s_tokens), 0)" % kind for kind in kinds)
    [sums] = rows(path, "SELECT %s, coalesce(sum(cost_usd), 0) FROM usage" % columns)
    names = [*("cab_tokens_total " + kind for kind in kinds), "cab_cost_usd_total"]
    expected.update(zip(names, sums))
    return {name: amount for name, amount in expected.items() if amount}


USAGE = cab.Usage(10, 7, 1000, 100, 0.25)


def test_metrics_equal_the_rows_however_the_requests_end(
    open_store: Callable[..., cab.Stores], tmp_path: Path
) -> None:
    metrics, path = cab.Metrics(), tmp_path / "bridge.db"
    store = open_store(path, metrics)
    token = add(store)
    jobs = queue_up(store, token, *map(str, range(8)))
    for _ in range(2):
        store.jobs.enqueue(token.id, cab.Ask("hi"), "key")
    with pytest.raises(cab.QueueFull):
        store.jobs.enqueue(token.id, cab.Ask("hi"), limit=3)
    with pytest.raises(cab.IdempotencyConflict):
        store.jobs.enqueue(token.id, cab.Ask("ho"), "key")
    for _ in range(2):
        assert store.jobs.complete(claim(store), cab.Answer("ok", usage=USAGE))
    assert store.jobs.fail(claim(store), "timeout", "x")
    # A job that is put back, or is running, is not finished.
    assert store.jobs.requeue(claim(store))
    for _ in range(2):
        claim(store)
        store.jobs.recover()
    assert store.jobs.fail(jobs[5], "cancelled", "x", OPEN)
    claim(store)
    assert counters(metrics) == counters_of_rows(path) == {
        "cab_requests_accepted_total": 9, "cab_requests_finished_total completed": 2,
        "cab_requests_finished_total error timeout": 1,
        "cab_requests_finished_total error interrupted": 1,
        "cab_requests_finished_total error cancelled": 1, "cab_tokens_total input": 20,
        "cab_tokens_total output": 14, "cab_tokens_total cache_read": 2000,
        "cab_tokens_total cache_creation": 200, "cab_cost_usd_total": 0.5,
    }
    before = counters(metrics)
    for job in (jobs[0], jobs[2], jobs[5], jobs[7]):
        assert try_every_end(store, job) == [False] * 3
    assert counters(metrics) == before


Counted = Tuple[cab.Stores, cab.Metrics, List[Callable[[], Any]]]


@pytest.fixture
def counted(open_store: Callable[..., cab.Stores], tmp_path: Path) -> Counted:
    """Return a store with running and queued jobs, its metrics, and every counted kind of write."""
    metrics = cab.Metrics()
    store = open_store(tmp_path / "bridge.db", metrics)
    token = add(store)
    jobs = queue_up(store, token, *map(str, range(4)))
    completed, failed = claim(store), claim(store)
    chat = cab.read_messages_request(
        {"model": "haiku", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    )
    for _ in range(2):
        store.jobs.enqueue(token.id, chat)
    return store, metrics, [
        lambda: store.jobs.enqueue(token.id, cab.Ask("x" * 30_000)),
        lambda: store.jobs.complete(completed, cab.Answer("x" * 30_000, usage=USAGE)),
        lambda: store.jobs.fail(failed, "timeout", "x" * 30_000),
        lambda: store.jobs.fail(jobs[2], "cancelled", "x" * 30_000, OPEN),
        lambda: store.jobs.fail_chats("interrupted", "x" * 30_000),
    ]


ALL_COUNTED = {
    "cab_requests_accepted_total": 7, "cab_requests_finished_total completed": 1,
    "cab_requests_finished_total error timeout": 1,
    "cab_requests_finished_total error cancelled": 1,
    "cab_requests_finished_total error interrupted": 2, "cab_tokens_total input": 10,
    "cab_tokens_total output": 7, "cab_tokens_total cache_read": 1000,
    "cab_tokens_total cache_creation": 100, "cab_cost_usd_total": 0.25,
}


def test_a_write_that_fails_counts_nothing_and_its_repetition_counts_once(
    counted: Counted, tmp_path: Path
) -> None:
    store, metrics, writes = counted
    path, before = tmp_path / "bridge.db", counters(metrics)
    pages = store.database._db.execute("PRAGMA page_count").fetchone()[0]
    for write in writes:
        store.database._db.execute("PRAGMA max_page_count = %d" % pages)
        for _ in range(3):
            with pytest.raises(cab.Unavailable, match="full"):
                write()
            assert counters(metrics) == before == counters_of_rows(path)
        store.database._db.execute("PRAGMA max_page_count = 1000000")
        write()
        assert counters(metrics) != before
        before = counters(metrics)
        assert before == counters_of_rows(path)
        pages = store.database._db.execute("PRAGMA page_count").fetchone()[0]
    assert counters(metrics) == ALL_COUNTED


def test_writes_whose_commit_fails_count_nothing(counted: Counted, tmp_path: Path) -> None:
    store, metrics, writes = counted
    path, before = tmp_path / "bridge.db", counters(metrics)
    errors: List[Any] = []

    def fails_at_commit(db: sqlite3.Connection) -> None:
        db.execute("PRAGMA defer_foreign_keys = ON")
        db.execute("UPDATE jobs SET token_id = 'none'")

    with blocked_writer(store, path) as submit:
        for write in writes:
            submit(outcome(write, errors))
        submit(outcome(lambda: store.database.write(fails_at_commit), errors))
    # All of them ran without an error, and shared the commit that failed.
    assert [type(error) for error in errors] == [sqlite3.IntegrityError] * 6
    assert counters(metrics) == before == counters_of_rows(path)
    for write in writes:
        write()
    assert counters(metrics) == counters_of_rows(path) == ALL_COUNTED


def test_writes_count_after_their_commit_and_not_if_they_time_out(
    counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, metrics, writes = counted
    path, before = tmp_path / "bridge.db", counters(metrics)
    errors: List[Any] = []
    with blocked_writer(store, path) as submit:
        for write in writes:
            submit(outcome(write, errors))
        assert counters(metrics) == before
        monkeypatch.setattr(cab, "WRITE_SECONDS", 0.05)
        timed_out: List[Any] = []
        submit(outcome(writes[0], timed_out))
        wait_until(lambda: timed_out)
        monkeypatch.undo()
        assert isinstance(timed_out[0], cab.Unavailable)
        assert counters(metrics) == before and errors == []
    # All of them share one commit.
    assert [error for error in errors if isinstance(error, BaseException)] == []
    assert counters(metrics) == counters_of_rows(path) == ALL_COUNTED


def test_a_failed_write_does_not_change_what_its_shared_commit_counts(
    counted: Counted, tmp_path: Path
) -> None:
    store, metrics, writes = counted
    results: List[Any] = []

    def fails(db: sqlite3.Connection) -> None:
        raise ValueError("half way")

    with blocked_writer(store, tmp_path / "bridge.db") as submit:
        for write in writes:
            submit(outcome(write, results))
            submit(outcome(lambda: store.database.write(fails), results))
    assert len([result for result in results if isinstance(result, ValueError)]) == len(writes)
    assert counters(metrics) == counters_of_rows(tmp_path / "bridge.db") == ALL_COUNTED


# --- the read cache ---


def test_reads_are_cached_until_a_write(store: cab.Stores) -> None:
    token = add(store)
    job = queue_up(store, token, "hi")[0]
    statements: List[str] = []
    store.database._reader.set_trace_callback(statements.append)

    def count_statements() -> int:
        """Read the same data again and return how many SQL statements that took."""
        before = len(statements)
        assert store.tokens.get(token.id) and store.tokens.count() == 1
        assert sum(store.jobs.counts().values()) == 1
        row = store.jobs.summary(job.id)
        assert row
        queue_position = 0 if row.status == "processing" else 1
        assert store.jobs.queue_positions(row) == (queue_position, 1)
        return len(statements) - before

    assert count_statements() >= 4 and count_statements() == count_statements() == 0
    claim(store)
    assert (store.jobs.summary(job.id) or job).status == "processing"
    assert count_statements() > 0
    assert count_statements() == 0


def test_another_program_s_change_is_seen_after_the_cache_is_revalidated(
    open_store: Callable[..., cab.Stores], clock: FakeClock
) -> None:
    bridge, command_line = open_store(), open_store()
    token = add(command_line)
    clock.advance(cab.CACHE_REVALIDATE_SECONDS)
    assert bridge.tokens.get(token.id) == token
    command_line.tokens.delete(token.id)
    clock.advance(cab.CACHE_REVALIDATE_SECONDS)
    assert bridge.tokens.get(token.id) is None


def test_data_that_changes_during_the_read_is_not_cached(store: cab.Stores) -> None:
    def count_then_add() -> int:
        count = len(store.tokens.list())
        add(store)
        return count

    assert store.database.cached("count", count_then_add) == 0
    assert "count" not in store.database.read_cache()
    assert store.database.cached("count", count_then_add) == 1


def test_the_cache_has_a_maximum_size(store: cab.Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "CACHE_ENTRIES", 10)
    for number in range(100):
        assert store.tokens.get(str(number)) is None
        assert len(store.database.read_cache()) + len(store.database._token_cache) <= 10


# --- the original program's file ---

ORIGINAL = """
    CREATE TABLE tokens (id TEXT PRIMARY KEY, name TEXT NOT NULL,
        token_hash TEXT NOT NULL UNIQUE, token_prefix TEXT NOT NULL,
        session_mode TEXT NOT NULL DEFAULT 'stateless', expires_at INTEGER,
        created_at INTEGER NOT NULL, last_used_at INTEGER, is_admin INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE requests (id TEXT PRIMARY KEY,
        token_id TEXT NOT NULL REFERENCES tokens(id) ON DELETE CASCADE, message TEXT NOT NULL,
        response TEXT, status TEXT NOT NULL DEFAULT 'queued', session_id TEXT,
        created_at INTEGER NOT NULL, completed_at INTEGER, error TEXT);
    CREATE TABLE sessions (id TEXT PRIMARY KEY,
        token_id TEXT NOT NULL REFERENCES tokens(id) ON DELETE CASCADE, claude_session_id TEXT,
        working_dir TEXT, created_at INTEGER NOT NULL, last_used_at INTEGER);
    CREATE INDEX idx_tokens_hash ON tokens(token_hash);
    CREATE INDEX idx_requests_token ON requests(token_id);
    CREATE INDEX idx_requests_status ON requests(status);
    CREATE INDEX idx_sessions_token ON sessions(token_id);
"""
CREATED_AT = 1_799_000_000
SECRETS = {
    name: "cab-" + letter * 64
    for name, letter in (("admin", "a"), ("app", "b"), ("memo", "c"), ("old", "d"))
}
#           id, token, message, response, status, created, completed, error
REQUESTS = [
    ("c1", "memo", "first", "one", "completed", 0, 5, None),
    ("c2", "memo", "second", "two", "completed", 10, 15, None),
    ("e1", "memo", "bad", None, "error", 11, 16, "Claude CLI exited with code 1: x"),
    ("d1", "app", "done", "ok", "completed", 12, 13, None),
    # Three jobs of one second, stored in another order than that of their ids. The one that was
    # running was created before them.
    ("q9", "app", "wait 1", None, "queued", 30, None, None),
    ("q1", "app", "wait 2", None, "queued", 30, None, None),
    ("q5", "app", "wait 3", None, "queued", 30, None, None),
    ("p1", "app", "running", None, "processing", 20, None, None),
    ("m3", "memo", "third", None, "queued", 31, None, None),
]


@contextlib.contextmanager
def original(path: Path) -> Iterator[sqlite3.Connection]:
    """Create the Node program's database as it is while that program has it open."""
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(ORIGINAL)
        for name, secret in SECRETS.items():
            db.execute(
                "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, NULL, ?)",
                (
                    "id-" + name, name, cab.digest(secret), secret[:12],
                    "stateful" if name == "memo" else "stateless",
                    CREATED_AT + 86_400 if name == "old" else None, CREATED_AT,
                    int(name == "admin"),
                ),
            )
        for key, token, message, response, status, created, completed, error in REQUESTS:
            db.execute(
                "INSERT INTO requests VALUES (?, ?, ?, ?, ?, NULL, ?, ?, ?)",
                (
                    key, "id-" + token, message, response, status, CREATED_AT + created,
                    completed and CREATED_AT + completed, error,
                ),
            )
        db.execute(
            "INSERT INTO sessions VALUES ('s1', 'id-memo', '7c0f',"
            " '/home/u/claude-api-bridge-workspace', ?, ?)",
            (CREATED_AT, CREATED_AT + 15),
        )
        yield db


@pytest.fixture
def migrated(tmp_path: Path, open_store: Callable[..., cab.Stores]) -> cab.Stores:
    """Open the original's database, which migrates it."""
    with original(tmp_path / "bridge.db"):
        pass
    return open_store()


def test_the_original_s_tokens_still_work(migrated: cab.Stores, clock: FakeClock) -> None:
    tokens = {
        name: migrated.tokens.by_digest(cab.digest(secret)) for name, secret in SECRETS.items()
    }
    assert {
        name: token and (token.id, token.name, token.prefix) for name, token in tokens.items()
    } == {name: ("id-" + name, name, secret[:12]) for name, secret in SECRETS.items()}
    assert [name for name, token in tokens.items() if token and token.is_admin] == ["admin"]
    assert migrated.tokens.has_admin()
    assert [name for name, token in tokens.items() if token and token.is_expired(clock.now())] == [
        "old"
    ]
    assert [
        name for name, token in tokens.items() if token and token.session_mode == "stateful"
    ] == ["memo"]
    assert {token.tools for token in migrated.tokens.list()} == {"none"}
    assert len(migrated.tokens.list()) == 4


def test_the_original_s_queue_runs_in_order_and_the_running_job_is_first(
    migrated: cab.Stores,
) -> None:
    order = []
    while migrated.jobs.has_queued():
        job = claim(migrated)
        order.append((job.message, job.attempts, migrated.jobs.complete(job, cab.Answer("ok"))))
    assert order == [
        (message, 1, True) for message in ("running", "wait 1", "wait 2", "wait 3", "third")
    ]


def test_the_original_s_finished_requests_can_still_be_polled(migrated: cab.Stores) -> None:
    done, failed = migrated.jobs.get("d1"), migrated.jobs.get("e1")
    assert done
    assert (done.status, done.response, done.created_at, done.completed_at) == (
        "completed", "ok", CREATED_AT + 12, CREATED_AT + 13,
    )
    assert failed
    assert (failed.status, failed.error, failed.error_code) == (
        "error", "Claude CLI exited with code 1: x", "cli_error",
    )
    assert migrated.jobs.counts() == {"queued": 5, "completed": 3, "error": 1}


def test_a_stateful_token_of_the_original_keeps_its_history(migrated: cab.Stores) -> None:
    job = migrated.jobs.get("m3")
    assert job and job.conversation == "default"
    assert migrated.conversations.history(job) == [("first", "one"), ("second", "two")]
    session = migrated.conversations.open("id-memo", "default")
    # The CLI stored its session for another folder, so it cannot be resumed.
    assert (session.session_id, session.spent_usd) == (None, 0.0)
    assert migrated.conversations.exists(session.key)


def test_new_requests_are_queued_after_the_original_s(migrated: cab.Stores) -> None:
    token = migrated.tokens.get("id-app")
    assert token and migrated.jobs.enqueue(token.id, cab.Ask("new")).position == 6


def test_revoking_a_token_of_the_original_deletes_its_requests(
    migrated: cab.Stores, tmp_path: Path
) -> None:
    migrated.tokens.delete("id-memo")
    assert rows(tmp_path / "bridge.db", "SELECT count(*) FROM jobs WHERE token_id = 'id-memo'") == [
        (0,)
    ]
    assert rows(tmp_path / "bridge.db", "PRAGMA foreign_key_check") == []


def test_a_copy_of_the_original_s_file_remains(migrated: cab.Stores, tmp_path: Path) -> None:
    copy = tmp_path / "bridge-original.db"
    assert rows(
        copy, "SELECT id, message, response, status, error FROM requests ORDER BY rowid"
    ) == [
        (key, message, response, status, error)
        for key, _, message, response, status, _, _, error in REQUESTS
    ]
    assert rows(copy, "SELECT count(*) FROM tokens") == [(4,)]
    assert rows(copy, "PRAGMA user_version") == [(0,)]
    assert os.name != "posix" or copy.stat().st_mode & 0o777 == 0o600


@posix
def test_the_original_s_files_after_kill_9_are_migrated_and_become_private(
    tmp_path: Path, open_store: Callable[..., cab.Stores]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    # The newest rows are only in the -wal file.
    with original(tmp_path / "theirs.db"):
        for end in ("", "-wal", "-shm"):
            shutil.copy(str(tmp_path / "theirs.db") + end, str(folder / "bridge.db") + end)
            os.chmod(str(folder / "bridge.db") + end, 0o644)
    store = open_store(folder / "bridge.db")
    assert store.jobs.counts()["queued"] == 5 and store.tokens.has_admin()
    assert rows(folder / "bridge-original.db", "SELECT count(*) FROM requests") == [
        (len(REQUESTS),)
    ]
    assert modes(folder) == [0o600]


def test_a_failed_migration_leaves_the_original_s_file_unchanged(
    tmp_path: Path, clock: FakeClock, open_store: Callable[..., cab.Stores]
) -> None:
    path = tmp_path / "bridge.db"
    with original(path) as db:
        # The migration fails because a table of this name exists.
        db.execute("CREATE TABLE jobs (somebody_s TEXT)")
    before, data = dump(path), path.read_bytes()
    # The second attempt finds the copy that the first one made.
    for _ in range(2):
        with pytest.raises(cab.CannotStart) as refused:
            cab.Stores(path, clock)
        assert "jobs" in str(refused.value)
        assert dump(path) == before and path.read_bytes() == data
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        db.execute("DROP TABLE jobs")
    assert open_store().jobs.counts()["queued"] == 5


def test_the_original_s_file_without_requests_is_migrated_too(
    tmp_path: Path, open_store: Callable[..., cab.Stores]
) -> None:
    with original(tmp_path / "bridge.db") as db:
        db.execute("DELETE FROM requests")
        db.execute("DELETE FROM sessions")
    store = open_store()
    assert (store.jobs.counts(), store.tokens.count()) == ({}, 4)
    assert (tmp_path / "bridge-original.db").exists()


def test_a_start_that_fails_because_the_original_still_runs_leaves_its_file_unchanged(
    tmp_path: Path, clock: FakeClock
) -> None:
    # The original listens on the same port by default. It must not lose its tables while it runs.
    with original(tmp_path / "bridge.db"):
        pass
    before = dump(tmp_path / "bridge.db")
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        config = cab.Config(port=theirs.getsockname()[1], host="127.0.0.1", data_dir=tmp_path)
        claude = cab.ClaudeInstall(("claude",), cab.Features.read("2.1.330", ""), {}, "nobody")
        with pytest.raises(cab.CannotStart) as refused, cab.Bridge(config, claude, clock):
            pass
    assert str(config.port) in str(refused.value)
    assert dump(tmp_path / "bridge.db") == before


# --- a file of version 1 ---

DAY = 86_400
MIDNIGHT = 1_799_971_200  # 2027-01-15T00:00:00Z, eight hours before the fake clock's first moment.
#                  id, token, status, created, attempts, conversation, response, usage, error code
VERSION_1_JOBS = [
    ("a1", "app", "completed", MIDNIGHT - 1, 1, None, "one", "[10,7,5,3,0.5]", None),
    ("a2", "app", "error", MIDNIGHT, 2, None, None, None, "timeout"),
    ("a3", "app", "completed", MIDNIGHT + 5.5, 1, None, "three", None, None),
    ("m1", "memo", "completed", MIDNIGHT + 6, 1, "trip", "Rome", None, None),
    ("a4", "app", "processing", MIDNIGHT + 10, 1, None, None, None, None),
    ("m2", "memo", "queued", MIDNIGHT + 11, 0, "trip", None, None, None),
]


@pytest.fixture
def version_1(tmp_path: Path) -> Path:
    """Create a file as the previous version wrote it."""
    path = tmp_path / "bridge.db"
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as db:
        for statement in cab.MIGRATIONS[0]:
            db.execute(statement)
        db.execute("PRAGMA user_version = 1")
        for name, mode, tools in (
            ("app", "stateless", '["Read","Bash(git log:*)"]'),
            ("memo", "stateful", '"none"'),
            ("new", "stateless", '"all"'),
        ):
            db.execute(
                "INSERT INTO tokens VALUES (?, ?, ?, 'cab-00000000', ?, NULL, ?, ?, ?, ?, '/srv')",
                (
                    name, "name of " + name, cab.digest(name), mode, MIDNIGHT - 100, MIDNIGHT + 9,
                    int(name == "app"), tools,
                ),
            )
        for (
            job_id, token, status, created, attempts, conversation, response, usage, code,
        ) in VERSION_1_JOBS:
            db.execute(
                "INSERT INTO jobs (id, token_id, status, message, created_at, attempts, model,"
                " conversation, response, usage, error_code)"
                " VALUES (?, ?, ?, ?, ?, ?, 'haiku', ?, ?, ?, ?)",
                (
                    job_id, token, status, "message " + job_id, created, attempts, conversation,
                    response, usage, code,
                ),
            )
        for name, session in (("trip", "s1"), ("home", None)):
            db.execute(
                "INSERT INTO conversations VALUES ('memo', ?, ?, 0.25, ?, ?)",
                (name, session, MIDNIGHT + 6, MIDNIGHT + 7),
            )
        db.execute("INSERT INTO children VALUES (4711, 'then')")
    return path


def test_migrating_version_1_preserves_every_row(
    version_1: Path, open_store: Callable[..., cab.Stores]
) -> None:
    tables = ("tokens", "jobs", "conversations", "children")
    columns = {
        table: ", ".join(row[1] for row in rows(version_1, "PRAGMA table_info(%s)" % table))
        for table in tables
    }
    # It now counts failed requests as well.
    columns["conversations"] = columns["conversations"].replace(", last_used_at", "")

    def content() -> Dict[str, Any]:
        return {
            table: rows(version_1, "SELECT %s FROM %s ORDER BY rowid" % (columns[table], table))
            for table in tables
        }

    before = content()
    store = open_store()
    assert content() == before
    assert {table: len(records) for table, records in before.items()} == {
        "tokens": 3, "jobs": 6, "conversations": 2, "children": 1,
    }
    assert rows(version_1, "PRAGMA user_version") == [(len(cab.MIGRATIONS),)]
    assert rows(version_1, "PRAGMA foreign_key_check") == []
    assert [path.name for path in version_1.parent.glob("*original*")] == []
    store.close()
    after = dump(version_1)
    open_store().close()
    assert dump(version_1) == after


def test_tokens_of_version_1_still_work_and_have_no_limits(
    version_1: Path, open_store: Callable[..., cab.Stores]
) -> None:
    assert open_store().tokens.by_digest(cab.digest("app")) == cab.Token(
        "app", "name of app", "cab-00000000", "stateless", None, MIDNIGHT - 100, MIDNIGHT + 9, True,
        ("Read", "Bash(git log:*)"), os.path.join(version_1.anchor, "srv"),
    )


def test_the_queue_of_version_1_continues(
    version_1: Path, open_store: Callable[..., cab.Stores]
) -> None:
    store = open_store()
    assert store.jobs.get("a1") == cab.Job(
        "a1", 1, "app", "completed", "message a1", MIDNIGHT - 1, 1, "haiku", response="one",
        usage=cab.Usage(10, 7, 5, 3, 0.5),
    )
    assert store.jobs.recover() == (1, 0) and [claim(store).id for _ in range(2)] == ["a4", "m2"]
    asked = store.jobs.get("m2")
    assert asked and store.conversations.history(asked) == [("message m1", "Rome")]
    names = [conversation.name for conversation in store.conversations.list("memo")]
    assert names == ["trip", "home"]
    assert store.jobs.enqueue("new", cab.Ask("new"), "key").is_new
    assert not store.jobs.enqueue("new", cab.Ask("new"), "key").is_new


def test_usage_includes_the_jobs_of_version_1(
    version_1: Path, open_store: Callable[..., cab.Stores]
) -> None:
    store = open_store()
    nothing = cab.Usage()
    assert store.usage.by_day("") == [
        cab.DayUsage("2027-01-14", "app", 1, 1, 0, nothing),
        cab.DayUsage("2027-01-15", "app", 3, 1, 1, nothing),
        cab.DayUsage("2027-01-15", "memo", 2, 1, 0, nothing),
    ]
    queue_up(store, store.tokens.list()[0], "of today")
    assert sum(row.requests for row in store.usage.by_day("2027-01-15")) == 6


def test_each_conversation_of_version_1_gets_a_key_and_retains_its_session(
    version_1: Path, open_store: Callable[..., cab.Stores]
) -> None:
    store = open_store()
    trip, home = store.conversations.open("memo", "trip"), store.conversations.open("memo", "home")
    assert (trip[1:], home[1:]) == (("s1", 0.25), (None, 0.25))
    assert trip.key != home.key
    for opened in (trip, home):
        assert len(opened.key) == 32
        assert store.conversations.exists(opened.key)


# --- tokens ---


def test_a_token_is_looked_up_by_its_digest_and_its_secret_is_not_stored(
    store: cab.Stores, clock: FakeClock, tmp_path: Path
) -> None:
    secret = cab.new_token()
    new = cab.NewToken(
        "app", 7, 10, 200, ("haiku", "sonnet[1m]"), "stateful", True, ("Read", "Bash(git log:*)")
    )
    token = store.tokens.add(new, secret, os.path.abspath("/srv/work"))
    assert token == cab.Token(
        token.id, "app", secret[:12], "stateful", clock.now() + 7 * 86_400, clock.now(), None, True,
        ("Read", "Bash(git log:*)"), os.path.abspath("/srv/work"), 10, 200,
        ("haiku", "sonnet[1m]"),
    )
    assert store.tokens.by_digest(cab.digest(secret)) == token == store.tokens.get(token.id)
    assert store.tokens.by_digest(secret) is None
    assert store.tokens.by_digest("") is None
    assert store.tokens.get("none") is None
    store.close()
    assert secret.encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_tokens_are_listed_newest_first_even_within_one_second(
    store: cab.Stores, clock: FakeClock
) -> None:
    names = [add(store, name).name for name in ("a", "b")]
    clock.advance(1)
    names.append(add(store, "c").name)
    assert [token.name for token in store.tokens.list()] == names[::-1]


@pytest.mark.parametrize(
    "days, is_expired", [(None, (False, False)), (1, (False, True)), (90, (False, False))]
)
def test_a_token_expires_at_the_exact_second(
    store: cab.Stores, clock: FakeClock, days: Optional[int], is_expired: Tuple[bool, bool]
) -> None:
    token = add(store, expires_in_days=days)
    assert (
        token.is_expired(clock.now() + 86_399), token.is_expired(clock.now() + 86_400),
    ) == is_expired


def test_last_used_at_is_written_at_most_once_a_minute(
    store: cab.Stores, clock: FakeClock
) -> None:
    token, times, start = add(store), [], clock.now()
    # The last step sets the clock back.
    for seconds in (0, 1, 58, 1, 59, 1, -3600):
        clock.advance(seconds)
        token = store.tokens.get(token.id) or token
        store.tokens.touch(token)
        # No caller waits for that write; this one runs after it.
        store.database.check_writable()
        times.append((store.tokens.get(token.id) or token).last_used_at)
        # A caller that read the token before that write queues no second one.
        store.tokens.touch(replace(token, last_used_at=None))
        assert store.database._write_queue.qsize() == 0
    assert [int(moment - start) for moment in times if moment is not None] == [
        0, 0, 0, 60, 60, 120, -3480,
    ]


def test_the_101st_token_is_refused_but_expired_ones_do_not_count(
    store: cab.Stores, clock: FakeClock
) -> None:
    for number in range(cab.TOKENS):
        add(store, expires_in_days=1 if number == 0 else None)
    with pytest.raises(cab.TokenLimit) as refused:
        add(store)
    assert str(refused.value) == "Maximum 100 tokens allowed" and len(store.tokens.list()) == 100
    clock.advance(86_400)
    add(store)
    with pytest.raises(cab.TokenLimit):
        add(store)
    assert len(store.tokens.list()) == 101


def test_the_last_valid_admin_cannot_be_revoked(store: cab.Stores, clock: FakeClock) -> None:
    first, brief = add(store, admin=True), add(store, admin=True, expires_in_days=1)
    app = add(store)
    clock.advance(86_400)
    with pytest.raises(cab.LastAdmin):
        store.tokens.delete(first.id)
    assert store.tokens.get(first.id)
    store.tokens.delete(app.id)
    store.tokens.delete(brief.id)
    second = add(store, admin=True)
    store.tokens.delete(first.id)
    assert store.tokens.list() == [second] and store.tokens.has_admin()


def test_an_expired_admin_does_not_count_as_admin(store: cab.Stores, clock: FakeClock) -> None:
    add(store, admin=True, expires_in_days=1)
    assert store.tokens.has_admin()
    clock.advance(86_400)
    assert not store.tokens.has_admin()


def test_revoking_a_token_deletes_its_jobs_and_conversations(
    store: cab.Stores, tmp_path: Path
) -> None:
    revoked, remaining = add(store), add(store)
    for token in (revoked, remaining):
        exchange(store, token, "hi", "ho")
        store.conversations.open(token.id, "default")
        queue_up(store, token, "waits")
    store.tokens.delete(revoked.id)
    for token_id in (revoked.id, "none"):
        with pytest.raises(cab.NotFound):
            store.tokens.delete(token_id)
    for table in ("jobs", "conversations"):
        assert rows(tmp_path / "bridge.db", "SELECT DISTINCT token_id FROM " + table) == [
            (remaining.id,)
        ]


# --- the queue ---


def test_every_field_of_an_ask_is_stored(store: cab.Stores, clock: FakeClock) -> None:
    token, ask = (
        add(store),
        cab.Ask("a\0b é 😀", "haiku", "Be brief.", '{"type":"object"}', "trip", "low", 30.0),
    )
    job, position, is_new = store.jobs.enqueue(token.id, ask)
    assert (position, is_new) == (1, True)
    assert store.jobs.get(job.id) == cab.Job(
        job.id, job.seq, token.id, "queued", ask.message, clock.now(), 0, "haiku", "Be brief.",
        '{"type":"object"}', "trip", "low",
    )
    assert store.jobs.get(job.id.upper()) is None
    assert store.jobs.get("") is None
    assert store.jobs.status("none") is None


def test_jobs_run_in_order_of_arrival_and_positions_are_exact(
    store: cab.Stores, clock: FakeClock
) -> None:
    token = add(store)
    # All within one second.
    results = [store.jobs.enqueue(token.id, cab.Ask(str(number))) for number in range(4)]
    assert [queued.position for queued in results] == [1, 2, 3, 4]
    # A clock that is set back must not change the order.
    clock.advance(-60)

    def positions() -> List[Tuple[int, int]]:
        jobs = [store.jobs.get(queued.job.id) or queued.job for queued in results]
        return [store.jobs.queue_positions(job) for job in jobs]

    assert positions() == [(1, 1), (2, 2), (3, 3), (4, 4)]
    first = claim(store)
    assert first.message == "0" and positions() == [(0, 1), (1, 2), (2, 3), (3, 4)]
    # One job runs, three wait.
    assert store.jobs.enqueue(token.id, cab.Ask("late")).position == 5
    assert [claim(store).message for _ in range(4)] == ["1", "2", "3", "late"]
    assert positions() == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert store.jobs.claim() is None and not store.jobs.has_queued()
    assert store.jobs.complete(first, cab.Answer("ok"))
    assert positions() == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_a_full_queue_answers_with_retry_after_and_stores_nothing(store: cab.Stores) -> None:
    token = add(store)
    queue_up(store, token, *map(str, range(cab.QUEUE_JOBS)))
    # Running jobs count, too.
    claim(store)
    with pytest.raises(cab.QueueFull) as refused:
        store.jobs.enqueue(token.id, cab.Ask("51"))
    assert refused.value.status == 429
    assert dict(refused.value.headers)["Retry-After"] == str(refused.value.extra["retryAfter"])
    assert int(dict(refused.value.headers)["Retry-After"]) > 0
    assert store.jobs.counts() == {"queued": 49, "processing": 1}
    store.tokens.delete(token.id)
    assert store.jobs.enqueue(add(store).id, cab.Ask("room again")).position == 1


def test_a_token_revoked_before_its_ask_is_stored_is_refused(store: cab.Stores) -> None:
    token = add(store)
    store.tokens.delete(token.id)
    with pytest.raises(cab.InvalidToken):
        store.jobs.enqueue(token.id, cab.Ask("hi"))
    assert store.jobs.counts() == {}


def test_a_claim_is_stored(store: cab.Stores, clock: FakeClock) -> None:
    queued = queue_up(store, add(store), "hi")[0]
    clock.advance(5)
    job = claim(store)
    assert job == store.jobs.get(queued.id)
    assert (job.status, job.attempts, job.started_at, job.created_at) == (
        "processing", 1, clock.now(), clock.now() - 5,
    )


def test_an_answer_is_stored_with_its_usage(store: cab.Stores, clock: FakeClock) -> None:
    queue_up(store, add(store), "hi")
    job = claim(store)
    clock.advance(3)
    answer = cab.Answer("a\ud800b", '{"x":1}', cab.Usage(10, 7, 5, 3, 0.001), "claude-haiku", None)
    assert store.jobs.complete(job, answer) is True
    done = store.jobs.get(job.id)
    assert done
    assert (
        done.status, done.response, done.structured, done.usage, done.model, done.completed_at,
        done.is_finished,
    ) == (
        "completed", "a\ufffdb", '{"x":1}', cab.Usage(10, 7, 5, 3, 0.001), "claude-haiku",
        clock.now(), True,
    )


def test_a_structured_answer_with_a_lone_surrogate_is_stored(store: cab.Stores) -> None:
    queue_up(store, add(store), "hi")
    job = claim(store)
    assert store.jobs.complete(job, cab.Answer("", '{"x":"\ud800"}')) is True
    assert (store.jobs.get(job.id) or job).structured == '{"x":"\ufffd"}'


def test_a_failure_is_stored_with_its_code(store: cab.Stores, clock: FakeClock) -> None:
    queue_up(store, add(store), "hi")
    job = claim(store)
    assert store.jobs.fail(job, "timeout", "too \ud800 long") is True
    done = store.jobs.get(job.id)
    assert done
    assert (done.status, done.error_code, done.error, done.completed_at, done.response) == (
        "error", "timeout", "too \ufffd long", clock.now(), None,
    )


def try_every_end(store: cab.Stores, job: cab.Job) -> List[bool]:
    """Try to complete, fail and requeue a job; return which attempts succeeded."""
    return [
        store.jobs.complete(job, cab.Answer("new")), store.jobs.fail(job, "timeout", "new"),
        store.jobs.requeue(job),
    ]


def test_a_job_that_is_not_running_cannot_be_finished(store: cab.Stores) -> None:
    token = add(store)
    queue_up(store, token, "waits", "runs", "revoked")
    waits = queue_up(store, token, "queued")[0]
    done = claim(store)
    store.jobs.complete(done, cab.Answer("first"))
    assert try_every_end(store, done) == try_every_end(store, waits) == [False] * 3
    assert (store.jobs.get(done.id) or done).response == "first"
    assert store.jobs.status(waits.id) == "queued"
    runs = claim(store)
    store.tokens.delete(token.id)
    assert try_every_end(store, runs) == [False] * 3 and store.jobs.get(runs.id) is None


def test_a_requeued_job_runs_next_and_its_attempt_does_not_count(store: cab.Stores) -> None:
    queue_up(store, add(store), "first", "second")
    job = claim(store)
    assert store.jobs.requeue(job) is True
    requeued = store.jobs.get(job.id)
    assert requeued
    assert (requeued.status, requeued.attempts, requeued.started_at) == ("queued", 0, None)
    assert store.jobs.queue_positions(requeued) == (1, 1)
    assert claim(store).message == "first"


def test_after_a_crash_the_running_job_is_requeued_at_its_position_at_most_once(
    store: cab.Stores, clock: FakeClock
) -> None:
    queue_up(store, add(store), "first", "second")
    first = claim(store)
    assert store.jobs.recover() == (1, 0)
    assert (store.jobs.get(first.id) or first).attempts == 1
    again = claim(store)
    assert (again.message, again.attempts) == ("first", 2)
    assert store.jobs.recover() == (0, 1) and store.jobs.recover() == (0, 0)
    lost = store.jobs.get(first.id)
    assert lost
    assert (lost.status, lost.error_code, lost.completed_at) == (
        "error", "interrupted", clock.now(),
    )
    assert lost.error
    assert claim(store).message == "second"


def test_old_finished_jobs_are_deleted_but_conversations_retain_their_history(
    store: cab.Stores, clock: FakeClock
) -> None:
    token = add(store)
    exchange(store, token, "remember", "yes")
    ended = [queue_up(store, token, message)[0] for message in ("done", "failed")]
    store.jobs.complete(claim(store), cab.Answer("ok"))
    store.jobs.fail(claim(store), "timeout", "x")
    running, waiting = queue_up(store, token, "runs", "waits")
    claim(store)
    clock.advance(7 * 86_400)
    assert store.jobs.purge(7) == 0
    clock.advance(1)
    assert store.jobs.purge(7) == 2 and [store.jobs.get(job.id) for job in ended] == [None, None]
    assert [store.jobs.status(job.id) for job in (running, waiting)] == ["processing", "queued"]
    asked = store.jobs.get(queue_up(store, token, "what?", conversation="default")[0].id)
    assert asked and store.conversations.history(asked) == [("remember", "yes")]


def test_many_threads_and_two_databases_never_lose_or_share_a_queue_position(
    open_store: Callable[..., cab.Stores],
) -> None:
    stores = [open_store(), open_store()]
    token, positions, refused = add(stores[0]), [], []

    def fill(store: cab.Stores) -> None:
        for _ in range(15):
            try:
                positions.append(store.jobs.enqueue(token.id, cab.Ask("hi")).position)
            except cab.QueueFull:
                refused.append(1)

    run_all([partial(fill, store) for store in stores * 2])
    assert sorted(positions) == list(range(1, 51)) and len(refused) == 10
    claims: List[Optional[cab.Job]] = []

    def claim_jobs(store: cab.Stores) -> None:
        claims.extend(store.jobs.claim() for _ in range(20))

    run_all([partial(claim_jobs, store) for store in stores * 2])
    assert len({job.id for job in claims if job}) == len([job for job in claims if job]) == 50


def run_all(tasks: Sequence[Callable[[], Any]]) -> None:
    """Run each task in its own thread and wait for all of them."""
    threads = [threading.Thread(target=task, name="task") for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- how a job ends ---

OPEN = (cab.JobStatus.QUEUED, cab.JobStatus.PROCESSING)


def test_a_queued_job_can_be_cancelled(store: cab.Stores, clock: FakeClock) -> None:
    first, second = queue_up(store, add(store), "first", "second")
    clock.advance(3)
    # By default only a running job can fail.
    assert store.jobs.fail(first, "cancelled", "x") is False
    assert store.jobs.fail(first, "cancelled", "The request was cancelled.", OPEN) is True
    ended = store.jobs.get(first.id)
    assert ended
    assert (ended.status, ended.error_code, ended.error, ended.started_at, ended.completed_at) == (
        "error", "cancelled", "The request was cancelled.", None, clock.now(),
    )
    assert store.jobs.queue_positions(ended) == (0, 0)
    assert store.jobs.queue_positions(second) == (1, 1)
    assert claim(store) == store.jobs.get(second.id)


def test_a_running_job_can_be_cancelled_and_its_late_answer_is_discarded(
    store: cab.Stores,
) -> None:
    queue_up(store, add(store), "hi")
    job = claim(store)
    assert store.jobs.fail(job, "cancelled", "x", ("queued",)) is False
    assert store.jobs.fail(job, "cancelled", "x", OPEN) is True
    cancelled = store.jobs.get(job.id)
    assert try_every_end(store, job) == [False] * 3
    assert store.jobs.recover() == (0, 0)
    assert store.jobs.get(job.id) == cancelled


@pytest.mark.parametrize("code", [None, "timeout"])
def test_a_finished_job_cannot_be_cancelled(store: cab.Stores, code: Optional[str]) -> None:
    token = add(store)
    queue_up(store, token, "hi")
    job = claim(store)
    assert store.jobs.fail(job, code, "x") if code else store.jobs.complete(job, cab.Answer("ok"))
    before, usage = store.jobs.get(job.id), store.usage.by_day("")
    assert store.jobs.fail(job, "cancelled", "x", OPEN) is False
    assert (store.jobs.get(job.id), store.usage.by_day("")) == (before, usage)


def test_an_answer_stores_how_often_its_text_was_restarted(store: cab.Stores) -> None:
    first, second = queue_up(store, add(store), "first", "second")
    assert store.jobs.complete(claim(store), cab.Answer("ok"), 3)
    assert store.jobs.complete(claim(store), cab.Answer("ok"))
    assert [(store.jobs.get(job.id) or job).generation for job in (first, second)] == [3, 0]


def test_a_crash_increments_the_text_generation_of_the_running_job(store: cab.Stores) -> None:
    waits, runs = queue_up(store, add(store), "runs", "waits")[::-1]
    assert store.jobs.requeue(claim(store), 2) and claim(store).generation == 2
    assert store.jobs.recover() == (1, 0)
    assert [(store.jobs.get(job.id) or job).generation for job in (runs, waits)] == [3, 0]
    assert claim(store).generation == 3


# --- Idempotency-Keys ---

ASK = cab.Ask("hi", "haiku", "Be brief.", '{"type":"object"}', "trip", "low")


def test_a_repeated_key_returns_the_request_that_it_created(
    store: cab.Stores, clock: FakeClock
) -> None:
    token = add(store)
    queue_up(store, token, "before")
    first = store.jobs.enqueue(token.id, ASK, "key")
    clock.advance(100)
    assert first.is_new and first.position == 2
    for ask in (ASK, replace(ASK, wait=30.0, stream=True)):
        assert store.jobs.enqueue(token.id, ask, "key") == (first.job, 2, False)
    assert all(
        store.jobs.enqueue(token.id, ASK, key).is_new for key in ("another key", None, None)
    )
    assert store.jobs.counts()["queued"] == 5 and store.usage.by_day("")[0].requests == 5


def test_a_repeated_key_returns_the_request_s_current_state(store: cab.Stores) -> None:
    token = add(store)
    store.jobs.enqueue(token.id, ASK, "key")
    runs = claim(store)
    assert store.jobs.enqueue(token.id, ASK, "key") == (runs, 1, False)
    store.jobs.complete(runs, cab.Answer("ok", usage=cab.Usage(1, 2, 3, 4, 0.5)), 1)
    assert store.jobs.enqueue(token.id, ASK, "key") == (store.jobs.get(runs.id), 0, False)
    store.conversations.delete(token.id, "trip")
    assert store.jobs.enqueue(token.id, ASK, "key").job.response == "ok"


@pytest.mark.parametrize(
    "changes",
    [
        {"message": "ho"},
        {"model": None},
        {"system_prompt": None},
        {"json_schema": None},
        {"conversation": "home"},
        {"effort": "high"},
    ],
    ids=lambda changes: str(*changes),
)
def test_a_key_reused_with_another_body_is_a_conflict(
    store: cab.Stores, changes: Dict[str, Any]
) -> None:
    token = add(store)
    first = store.jobs.enqueue(token.id, ASK, "key")
    with pytest.raises(cab.IdempotencyConflict) as refused:
        store.jobs.enqueue(token.id, replace(ASK, **changes), "key")
    assert refused.value.status == 409 and store.jobs.enqueue(token.id, ASK, "key").job == first.job


def test_keys_are_scoped_to_the_token(store: cab.Stores) -> None:
    one, other = add(store), add(store)
    first = store.jobs.enqueue(one.id, ASK, "key")
    second = store.jobs.enqueue(other.id, cab.Ask("something else"), "key")
    assert second.is_new and second.job.id != first.job.id
    store.tokens.delete(one.id)
    with pytest.raises(cab.InvalidToken):
        store.jobs.enqueue(one.id, ASK, "key")
    assert store.jobs.enqueue(other.id, cab.Ask("something else"), "key") == (second.job, 1, False)


@pytest.mark.parametrize(
    "limits, refusal",
    [
        ({}, cab.QueueFull),
        ({"requests_per_minute": 1}, cab.RateLimited),
        ({"requests_per_day": 1}, cab.DailyLimit),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_replay_ignores_queue_and_rate_limits(
    store: cab.Stores, limits: Dict[str, Any], refusal: Any
) -> None:
    token = add(store, **limits)
    first = store.jobs.enqueue(token.id, ASK, "key", limit=1)
    with pytest.raises(refusal):
        store.jobs.enqueue(token.id, ASK, "a new key", limit=1)
    assert store.jobs.enqueue(token.id, ASK, "key", limit=1) == (first.job, 1, False)
    with pytest.raises(cab.IdempotencyConflict):
        store.jobs.enqueue(token.id, cab.Ask("ho"), "key", limit=1)


def test_a_key_is_stored_as_long_as_its_request(
    open_store: Callable[..., cab.Stores], clock: FakeClock
) -> None:
    store = open_store()
    token, ask = add(store), cab.Ask("hi")
    first = store.jobs.enqueue(token.id, ask, "key").job
    store.close()
    store = open_store()
    assert store.jobs.enqueue(token.id, ask, "key") == (first, 1, False)
    store.jobs.complete(claim(store), cab.Answer("ok"))
    clock.advance(8 * DAY)
    assert not store.jobs.enqueue(token.id, ask, "key").is_new
    assert store.jobs.purge(7) == 1 and store.jobs.enqueue(token.id, ask, "key").is_new


def test_threads_that_share_keys_create_one_request_for_each_key(
    open_store: Callable[..., cab.Stores],
) -> None:
    stores, keys = [open_store(), open_store()], ["a", "b", "c"]
    token = add(stores[0])
    results: List[Tuple[str, cab.EnqueueResult]] = []
    conflicts: List[str] = []

    def ask(store: cab.Stores, seed: int) -> None:
        rng = random.Random(seed)
        for key in rng.sample(keys * 4, 12):
            results.append((key, store.jobs.enqueue(token.id, cab.Ask(key), key)))
            with contextlib.suppress(cab.IdempotencyConflict):
                store.jobs.enqueue(token.id, cab.Ask("something else"), key)
                conflicts.append(key)

    run_all([partial(ask, stores[seed % 2], seed) for seed in range(6)])
    assert len(results) == 72
    assert conflicts == []
    assert stores[0].jobs.counts()["queued"] == 3
    assert stores[0].usage.by_day("")[0].requests == 3
    assert sorted(key for key, queued in results if queued.is_new) == keys
    assert len({(key, queued.job.id) for key, queued in results}) == 3


# --- the limits of a token ---


def retry_after(store: cab.Stores, token: cab.Token, kind: Any) -> int:
    """Return the Retry-After seconds of the refusal of one more ask."""
    with pytest.raises(kind) as refused:
        store.jobs.enqueue(token.id, cab.Ask("one too many"))
    wait = refused.value.extra["retryAfter"]
    assert refused.value.status == 429
    assert refused.value.headers == (("Retry-After", str(wait)),)
    assert type(wait) is int
    return int(wait)


def count_accepted(store: cab.Stores, token: cab.Token, tries: int) -> int:
    """Ask so many times and return how many asks were accepted."""
    count = 0
    for _ in range(tries):
        with contextlib.suppress(cab.RateLimited, cab.DailyLimit):
            store.jobs.enqueue(token.id, cab.Ask("hi"), limit=1_000)
            count += 1
    return count


def test_requests_per_minute_limits_every_60_seconds(store: cab.Stores, clock: FakeClock) -> None:
    token, free = add(store, requests_per_minute=3), add(store)
    for seconds in (0, 10, 20):
        clock.advance(seconds)
        queue_up(store, token, "hi")
    assert retry_after(store, token, cab.RateLimited) == 30
    assert count_accepted(store, free, 20) == 20
    clock.advance(29.5)
    assert retry_after(store, token, cab.RateLimited) == 1
    clock.advance(0.5)
    assert count_accepted(store, token, 5) == 1 and retry_after(store, token, cab.RateLimited) == 10
    clock.advance(10)
    assert count_accepted(store, token, 5) == 1 and retry_after(store, token, cab.RateLimited) == 20


@pytest.mark.parametrize("most, seed", [(1, 0), (2, 1), (3, 2), (5, 3), (9, 4)])
def test_the_rate_limit_holds_for_every_60_seconds_and_refuses_no_ask_without_need(
    store: cab.Stores, clock: FakeClock, most: int, seed: int
) -> None:
    rng, token, times = random.Random(seed), add(store, requests_per_minute=most), [0.0]
    for _ in range(60):
        clock.advance(rng.choice((0, 0, 0.25, 1, 7.5, 20)))
        recent = [moment for moment in times if moment > clock.now() - 60]
        if len(recent) == most:
            wait = retry_after(store, token, cab.RateLimited)
            assert wait - 1 < recent[0] + 60 - clock.now() <= wait
        else:
            store.jobs.enqueue(token.id, cab.Ask("hi"), limit=1_000)
            times.append(clock.now())


def test_a_clock_set_back_does_not_lock_a_token_out(store: cab.Stores, clock: FakeClock) -> None:
    token = add(store, requests_per_minute=2)
    assert count_accepted(store, token, 5) == 2
    clock.advance(-3_600)
    assert count_accepted(store, token, 5) == 2 and retry_after(store, token, cab.RateLimited) == 60
    clock.advance(60)
    assert count_accepted(store, token, 5) == 2


def test_requests_per_day_limits_every_utc_day(store: cab.Stores, clock: FakeClock) -> None:
    token, free = add(store, requests_per_day=2), add(store)
    clock.at = MIDNIGHT - 0.5
    assert count_accepted(store, token, 5) == 2 and count_accepted(store, free, 5) == 5
    with pytest.raises(cab.DailyLimit) as refused:
        queue_up(store, token, "hi")
    assert refused.value.extra == {"resetsAt": "2027-01-15T00:00:00.000Z", "retryAfter": 1}
    assert "2 requests a day" in str(refused.value)
    clock.at = MIDNIGHT
    assert count_accepted(store, token, 5) == 2 and retry_after(store, token, cab.DailyLimit) == DAY
    clock.advance(DAY - 0.001)
    assert retry_after(store, token, cab.DailyLimit) == 1
    clock.advance(0.001)
    assert count_accepted(store, token, 5) == 2


def test_requests_count_for_the_day_however_they_end(
    open_store: Callable[..., cab.Stores],
) -> None:
    store = open_store()
    token = add(store, requests_per_day=4)
    queue_up(store, token, "completed", "failed", "cancelled", "put back")
    store.jobs.complete(claim(store), cab.Answer("ok"))
    store.jobs.fail(claim(store), "timeout", "x")
    store.jobs.fail(claim(store), "cancelled", "x", OPEN)
    store.jobs.requeue(claim(store))
    assert store.jobs.purge(-1) == 3
    wait = retry_after(store, token, cab.DailyLimit)
    assert wait == 16 * 3_600
    store.close()
    assert retry_after(open_store(), token, cab.DailyLimit) == wait


def test_both_limits_of_a_token_apply(store: cab.Stores, clock: FakeClock) -> None:
    token = add(store, requests_per_minute=2, requests_per_day=3)
    assert count_accepted(store, token, 5) == 2 and retry_after(store, token, cab.RateLimited) == 60
    clock.advance(60)
    assert count_accepted(store, token, 5) == 1
    assert retry_after(store, token, cab.DailyLimit) == 16 * 3_600 - 60


@pytest.mark.parametrize(
    "refusal, limits, key, room",
    [
        (cab.RateLimited, {"requests_per_minute": 2}, "new key", 50),
        (cab.DailyLimit, {"requests_per_day": 2}, "new key", 50),
        (cab.QueueFull, {}, "new key", 2),
        (cab.IdempotencyConflict, {}, "key", 50),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_refused_ask_stores_nothing(
    store: cab.Stores,
    clock: FakeClock,
    tmp_path: Path,
    refusal: Any,
    limits: Dict[str, Any],
    key: str,
    room: int,
) -> None:
    token = add(store, **limits)
    store.jobs.enqueue(token.id, ASK, "key")
    queue_up(store, token, "hi")
    before = dump(tmp_path / "bridge.db")
    for _ in range(3):
        with pytest.raises(refusal):
            store.jobs.enqueue(token.id, cab.Ask("other"), key, room)
    assert dump(tmp_path / "bridge.db") == before
    clock.advance(DAY)
    assert store.jobs.enqueue(token.id, cab.Ask("other"), "new key").is_new


# --- lists of jobs ---


def walk(
    store: cab.Stores,
    token: Optional[cab.Token] = None,
    statuses: Sequence[str] = (),
    limit: int = 3,
    meanwhile: Callable[[], Any] = lambda: None,
) -> List[List[str]]:
    """Return the messages of all pages; call `meanwhile` between two pages."""
    pages: List[List[str]] = []
    before: Optional[int] = None
    for _ in range(100):
        where = cab.JobFilter(token.id if token else None, tuple(statuses))
        jobs, before = store.jobs.page(where, before, limit)
        assert len(jobs) <= limit
        assert jobs or before is None
        assert [store.jobs.get(job.id) for job in jobs] == jobs
        pages.append([job.message for job in jobs])
        if before is None:
            return pages
        meanwhile()
    raise AssertionError("the pages do not end")


@pytest.mark.parametrize(
    "limit, pages",
    [
        (1, ["6", "5", "4", "3", "2", "1", "0"]),
        (3, ["654", "321", "0"]),
        (6, ["654321", "0"]),
        (7, ["6543210"]),
        (100, ["6543210"]),
    ],
)
def test_the_pages_contain_every_job_once_newest_first(
    store: cab.Stores, clock: FakeClock, limit: int, pages: List[str]
) -> None:
    token, other = add(store), add(store)
    for number in range(7):
        # The order is that of the queue, not that of the clock.
        clock.advance(-1)
        queue_up(store, token, str(number))
    new = iter("abcdefgh")
    assert walk(store, token, limit=limit, meanwhile=lambda: queue_up(store, token, next(new))) == [
        list(page) for page in pages
    ]
    assert walk(store, other) == [[]]


def test_a_page_contains_the_jobs_of_one_token_or_of_all(store: cab.Stores) -> None:
    one, other = add(store), add(store)
    for number in range(2):
        queue_up(store, one, "one %d" % number)
        queue_up(store, other, "other %d" % number)
    assert walk(store, one) == [["one 1", "one 0"]]
    assert walk(store, other, limit=1) == [["other 1"], ["other 0"]]
    assert walk(store) == [["other 1", "one 1", "other 0"], ["one 0"]]
    store.tokens.delete(one.id)
    assert walk(store, one) == [[]] and walk(store) == [["other 1", "other 0"]]


@pytest.mark.parametrize(
    "statuses, messages",
    [
        ((), "435210"),
        (("queued",), "43"),
        (("processing",), "2"),
        (("completed",), "0"),
        (("error",), "51"),
        (("queued", "error"), "4351"),
        (("error", "queued", "error"), "4351"),
        (("completed", "processing"), "20"),
        (cab.JobStatus.ALL, "435210"),
    ],
    ids=lambda value: ",".join(value),
)
def test_a_page_contains_only_the_requested_statuses(
    store: cab.Stores, statuses: Sequence[str], messages: str
) -> None:
    token = add(store)
    queue_up(store, token, "0", "1", "2")
    cancelled = queue_up(store, token, "5", "3", "4")[0]
    store.jobs.complete(claim(store), cab.Answer("ok"))
    store.jobs.fail(claim(store), "timeout", "x")
    claim(store)
    store.jobs.fail(cancelled, "cancelled", "x", OPEN)
    for limit in (1, 2, 100):
        assert [
            message for page in walk(store, token, statuses, limit) for message in page
        ] == list(messages)


def test_a_large_page_ends_early(store: cab.Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    # The ids and the status take 78 to 81 characters of a row.
    monkeypatch.setattr(cab, "PAGE_CHARACTERS", 300)
    token = add(store)
    queue_up(
        store, token, "small 1", "small 2", "x" * 500, "y" * 60, "z" * 60, "small 3", "answered"
    )
    assert walk(store, token, limit=100) == [
        ["answered", "small 3", "z" * 60],
        ["y" * 60, "x" * 500],
        ["small 2", "small 1"],
    ]
    while store.jobs.has_queued():
        job = claim(store)
        store.jobs.complete(job, cab.Answer("a" * 300 if job.message == "answered" else ""))
    assert walk(store, token, limit=100)[0] == ["answered"]


# --- conversations ---


def test_a_session_is_resumed_only_after_a_successful_turn(store: cab.Stores) -> None:
    token = add(store)
    keys: Set[str] = set()

    def turn(answer: Optional[cab.Answer]) -> Tuple[Optional[str], float]:
        queue_up(store, token, "hi", conversation="trip")
        job, opened = claim(store), store.conversations.open(token.id, "trip")
        keys.add(opened.key)
        if answer:
            store.jobs.complete(job, answer)
        else:
            store.jobs.fail(job, "timeout", "x")
        return opened[1:]

    assert turn(cab.Answer("a", session_id="s1", spent_usd=0.5)) == (None, 0.0)
    assert turn(cab.Answer("b", session_id="s1", spent_usd=0.7)) == ("s1", 0.5)
    assert turn(None) == ("s1", 0.7)
    # The transcript may contain half a turn, so it is never resumed.
    assert turn(cab.Answer("c", session_id=None))[0] is None
    assert store.conversations.open(token.id, "trip").session_id is None
    # It was the same conversation all the time.
    assert keys == {store.conversations.open(token.id, "trip").key}
    assert store.conversations.open(token.id, "other")[1:] == (None, 0.0)
    assert store.conversations.open(token.id, "other").key not in keys


def test_the_session_is_cleared_while_a_turn_runs(store: cab.Stores) -> None:
    token = add(store)
    queue_up(store, token, "hi", conversation="trip")
    store.conversations.open(token.id, "trip")
    store.jobs.complete(claim(store), cab.Answer("a", session_id="s1"))
    assert [store.conversations.open(token.id, "trip").session_id for _ in range(2)] == ["s1", None]


def test_a_conversation_of_a_revoked_token_is_not_created(
    store: cab.Stores, tmp_path: Path
) -> None:
    session = store.conversations.open("gone", "trip")
    assert session[1:] == (None, 0.0) and not store.conversations.exists(session.key)
    assert rows(tmp_path / "bridge.db", "SELECT count(*) FROM conversations") == [(0,)]


def test_the_history_contains_only_the_conversation_s_completed_turns_before_the_job(
    store: cab.Stores, tmp_path: Path
) -> None:
    token, other = add(store), add(store)
    exchange(store, token, "one", "1", "trip")
    exchange(store, token, "elsewhere", "x", "home")
    exchange(store, other, "somebody's", "x", "trip")
    queue_up(store, token, "failed", conversation="trip")
    store.jobs.fail(claim(store), "timeout", "x")
    exchange(store, token, "two", "2", "trip")
    exchange(store, token, "now", "3", "trip")
    exchange(store, token, "later", "4", "trip")
    asked = store.jobs.get(
        rows(tmp_path / "bridge.db", "SELECT id FROM jobs WHERE message = 'now'")[0][0]
    )
    assert asked and store.conversations.history(asked) == [("one", "1"), ("two", "2")]


@pytest.mark.parametrize(
    "size, expected",
    [
        (1000, [0, 1, 2, 3]),
        (80, [0, 1, 2, 3]),
        (79, [1, 2, 3]),
        (60, [1, 2, 3]),
        (59, [2, 3]),
        (20, [3]),
    ],
)
def test_the_history_contains_the_newest_turns_within_its_limit(
    store: cab.Stores, monkeypatch: pytest.MonkeyPatch, size: int, expected: List[int]
) -> None:
    monkeypatch.setattr(cab, "HISTORY_BYTES", size)
    token = add(store)
    for number in range(4):
        # Each turn has 20 bytes.
        exchange(store, token, "%010d" % number, "é" * 5)
    asked = store.jobs.get(queue_up(store, token, "now", conversation="default")[0].id)
    assert asked and [int(turn.message) for turn in store.conversations.history(asked)] == expected


def test_the_history_has_no_limit_of_turns(store: cab.Stores) -> None:
    token = add(store)
    for number in range(250):
        exchange(store, token, str(number), "ok")
    asked = store.jobs.get(queue_up(store, token, "now", conversation="default")[0].id)
    assert asked and len(store.conversations.history(asked)) == 250


def test_conversations_are_listed_with_their_turns_last_used_first(
    store: cab.Stores, clock: FakeClock
) -> None:
    token, other, start = add(store), add(store), clock.now()
    for name in ("trip", "home", "work"):
        exchange(store, token, "hi", "ho", name)
        clock.advance(10)
    exchange(store, token, "more", "ho", "trip")
    exchange(store, other, "somebody's", "x", "theirs")
    queue_up(store, token, "of no conversation")
    store.jobs.complete(claim(store), cab.Answer("ok"))
    clock.advance(10)
    queue_up(store, token, "fails", conversation="home")
    job = claim(store)
    clock.advance(5)
    queue_up(store, token, "waits", conversation="new")
    clock.advance(5)
    store.jobs.fail(job, "timeout", "x")
    assert store.conversations.list(token.id) == [
        ("home", 1, start + 10, start + 50),
        ("new", 0, start + 45, start + 45),
        ("trip", 2, start, start + 30),
        ("work", 1, start + 20, start + 20),
    ]
    queue_up(store, other, "in one second", conversation="a")
    queue_up(store, other, "in one second", conversation="b")
    assert [conversation.name for conversation in store.conversations.list(other.id)] == [
        "b", "a", "theirs",
    ]
    assert store.conversations.list("none") == []


def test_deleting_a_conversation_leaves_all_others(store: cab.Stores) -> None:
    token, other = add(store), add(store)
    for owner, name in ((token, "trip"), (token, "home"), (other, "trip")):
        exchange(store, owner, "hi", "ho", name)
    keys = [
        store.conversations.open(owner.id, name).key
        for owner, name in ((token, "trip"), (token, "home"), (other, "trip"))
    ]
    assert [store.conversations.delete(token.id, name) for name in ("nowhere", "trip", "trip")] == [
        False, True, False,
    ]
    assert store.conversations.delete("none", "home") is False
    assert [conversation.name for conversation in store.conversations.list(token.id)] == ["home"]
    assert len(store.conversations.list(other.id)) == 1
    assert [store.conversations.exists(key) for key in keys] == [False, True, True]


def test_requests_of_a_deleted_conversation_can_be_polled_until_they_are_purged(
    store: cab.Stores, clock: FakeClock
) -> None:
    token = add(store)
    exchange(store, token, "hi", "ho", "trip")
    [[message]] = walk(store, token)
    store.conversations.delete(token.id, "trip")
    job = store.jobs.page(cab.JobFilter(token.id), None, 10)[0][0]
    assert (message, job.message, job.response, job.conversation) == ("hi", "hi", "ho", None)
    clock.advance(7 * DAY + 1)
    assert store.jobs.purge(7) == 1 and store.usage.by_day("")[0].completed == 1


def test_a_queued_job_restarts_a_deleted_conversation(store: cab.Stores) -> None:
    token = add(store)
    exchange(store, token, "hi", "ho", "trip")
    before = store.conversations.open(token.id, "trip")
    exchange(store, token, "again", "ho", "trip")
    store.database._db.execute("UPDATE conversations SET session_id = 's1', spent_usd = 0.5")
    waits, later = queue_up(store, token, "waits", "later", conversation="trip")
    assert len(store.conversations.history(waits)) == 2
    assert store.conversations.delete(token.id, "trip") is True
    assert claim(store) == store.jobs.get(waits.id)
    assert (store.jobs.get(waits.id) or later).conversation == "trip"
    assert store.conversations.history(waits) == []
    after = store.conversations.open(token.id, "trip")
    assert after[1:] == (None, 0.0) and after.key != before.key
    assert store.conversations.exists(after.key) and not store.conversations.exists(before.key)
    store.jobs.complete(waits, cab.Answer("first", session_id="s2"))
    assert store.conversations.history(later) == [("waits", "first")]
    assert store.conversations.open(token.id, "trip") == (after.key, "s2", 0.0)
    assert [(listed.name, listed.turns) for listed in store.conversations.list(token.id)] == [
        ("trip", 1)
    ]


def test_a_job_running_while_its_conversation_is_deleted_adds_nothing_to_the_new_one(
    store: cab.Stores,
) -> None:
    token = add(store)
    runs, waits = queue_up(store, token, "secret", "waits", conversation="trip")
    claim(store)
    before = store.conversations.open(token.id, "trip")
    assert store.conversations.delete(token.id, "trip") is True
    # The new conversation exists before the old run ends.
    store.conversations.open(token.id, "trip")
    assert store.jobs.complete(runs, cab.Answer("answer", session_id="s1", spent_usd=0.5)) is True
    assert (store.jobs.get(runs.id) or waits).response == "answer"
    after = store.conversations.open(token.id, "trip")
    assert after[1:] == (None, 0.0) and after.key != before.key
    assert store.conversations.history(waits) == []


def test_a_job_running_while_its_conversation_is_deleted_is_retried_without_one(
    store: cab.Stores,
) -> None:
    token = add(store)
    queue_up(store, token, "put back", conversation="trip")
    store.conversations.open(token.id, "trip")
    job = claim(store)
    store.conversations.delete(token.id, "trip")
    store.jobs.requeue(job)
    assert claim(store).conversation is None and store.conversations.list(token.id) == []


# --- usage ---


def test_usage_is_counted_on_the_day_of_the_request(store: cab.Stores, clock: FakeClock) -> None:
    one, other = sorted((add(store), add(store)), key=lambda token: token.id)
    clock.at = MIDNIGHT - 1
    queue_up(store, one, "asked late")
    queue_up(store, other, "fails")
    clock.advance(2)
    usage = cab.Usage(10, 7, 1000, 100, 0.25)
    assert store.jobs.complete(claim(store), cab.Answer("ok", usage=usage))
    assert store.jobs.fail(claim(store), "timeout", "x")
    for figures in (cab.Usage(1, 2, 3, 4, 0.5), cab.Usage(10, 20, 30, 40, 0.25)):
        queue_up(store, other, "of today")
        assert store.jobs.complete(claim(store), cab.Answer("ok", usage=figures))
    today = cab.DayUsage("2027-01-15", other.id, 2, 2, 0, cab.Usage(11, 22, 33, 44, 0.75))
    late = cab.DayUsage("2027-01-14", one.id, 1, 1, 0, usage)
    failed = cab.DayUsage("2027-01-14", other.id, 1, 0, 1, cab.Usage())
    assert store.usage.by_day("2027-01-14") == [late, failed, today]
    assert store.usage.by_day("2027-01-15") == [today] and store.usage.by_day("2027-01-16") == []
    assert store.usage.by_day("2027-01-14", other.id) == [failed, today]
    assert store.usage.by_day("2027-01-15", one.id) == []


def test_every_job_is_counted_once_however_it_ends(store: cab.Stores) -> None:
    token = add(store)
    jobs = queue_up(
        store, token, "completed", "failed", "cancelled", "cut off twice",
        "cancelled while it waits", "waits",
    )
    store.jobs.complete(claim(store), cab.Answer("ok", usage=cab.Usage(1)))
    store.jobs.fail(claim(store), "timeout", "x")
    store.jobs.fail(claim(store), "cancelled", "x", OPEN)
    for _ in range(2):
        claim(store)
        store.jobs.recover()
    store.jobs.fail(jobs[4], "cancelled", "x", OPEN)
    usage = store.usage.by_day("")
    assert usage == [cab.DayUsage("2027-01-15", token.id, 6, 1, 4, cab.Usage(1))]
    for job in jobs[:5]:
        assert try_every_end(store, job) == [False] * 3
    assert store.jobs.recover() == (0, 0) and store.usage.by_day("") == usage


def test_usage_of_a_revoked_token_remains_in_the_sums(
    store: cab.Stores, clock: FakeClock
) -> None:
    token = add(store)
    queue_up(store, token, "done", "runs", "waits")
    store.jobs.complete(claim(store), cab.Answer("ok", usage=cab.Usage(1)))
    running = claim(store)
    usage = store.usage.by_day("")
    store.tokens.delete(token.id)
    assert store.jobs.complete(running, cab.Answer("late", usage=cab.Usage(1))) is False
    assert store.jobs.fail(running, "timeout", "x") is False
    assert usage == [cab.DayUsage("2027-01-15", token.id, 3, 1, 0, cab.Usage(1))]
    assert store.usage.by_day("") == usage
    clock.advance(30 * DAY)
    store.jobs.purge(7)
    store.usage.purge()
    assert store.usage.by_day("") == usage


def test_usage_is_deleted_after_400_days(store: cab.Stores, clock: FakeClock) -> None:
    token = add(store)
    for _ in range(2):
        queue_up(store, token, "waits")
        clock.advance(DAY)
    clock.at = MIDNIGHT + 400 * DAY + DAY - 1
    store.usage.purge()
    assert [row.day for row in store.usage.by_day("")] == ["2027-01-15", "2027-01-16"]
    clock.advance(1)
    # Deleting requests deletes no figures.
    store.jobs.purge(7)
    assert [row.day for row in store.usage.by_day("")] == ["2027-01-15", "2027-01-16"]
    store.usage.purge()
    assert [row.day for row in store.usage.by_day("")] == ["2027-01-16"]
    assert store.jobs.counts() == {"queued": 2}


def test_the_last_reported_plan_limits_are_stored(
    open_store: Callable[..., cab.Stores], clock: FakeClock
) -> None:
    store, now = open_store(), clock.now()
    assert store.usage.plan_limits() == []
    five, seven = (
        cab.RateLimitWindow("five_hour", "allowed", 0.42, now + 3_600.5, now),
        cab.RateLimitWindow("seven_day", None, None, None, now),
    )
    store.usage.save_plan_limits([seven, five])
    assert store.usage.plan_limits() == [five, seven]
    full = cab.RateLimitWindow("five_hour", "rejected", 1.0, None, now + 60)
    store.usage.save_plan_limits([full])
    store.usage.save_plan_limits([])
    store.close()
    assert open_store().usage.plan_limits() == [full, seven]


def test_a_plan_limit_with_a_lone_surrogate_is_stored(store: cab.Stores) -> None:
    info = {
        "status": "a\ud800", "rateLimitType": "b\udfff", "overageStatus": "c\ud800", "resetsAt": 1,
    }
    store.usage.save_plan_limits(cab.parse_rate_limits({"rate_limit_info": info}, 7.0).windows)
    assert {window.seen_at for window in store.usage.plan_limits()} == {7.0}


# --- child processes, and the end of the program ---


def test_child_processes_are_recorded_and_deleted(open_store: Callable[..., cab.Stores]) -> None:
    store = open_store()
    for pid, started, program in (
        (10, "a", "claude"), (11, "b", "claude"), (12, "c", None), (10, "d", "cloudflared"),
    ):
        store.database.record_process(pid, started, program)
    # No row exists for the last one.
    for pid in (11, 13):
        store.database.forget_process(pid)
    store.close()
    assert sorted(open_store().database.recorded_processes()) == [
        (10, "d", "cloudflared"), (12, "c", None),
    ]


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import claude_api_bridge as cab
store = cab.Stores(Path(sys.argv[2]), cab.Clock())
token = store.tokens.add(cab.NewToken("app"), cab.new_token())
ids = [store.jobs.enqueue(token.id, cab.Ask(text))[0].id for text in ("first", "second")]
store.jobs.claim()
print(*ids, flush=True)
sys.stdin.read()
"""


def test_acknowledged_jobs_survive_kill_9(
    open_store: Callable[..., cab.Stores], tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(MODULE.parent), str(tmp_path / "bridge.db")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as program:
        assert program.stdout is not None
        first, second = program.stdout.readline().decode().split()
        program.kill()
    store = open_store()
    assert [store.jobs.status(job_id) for job_id in (first, second)] == ["processing", "queued"]
    assert store.jobs.recover() == (1, 0)
    assert [claim(store).id for _ in range(2)] == [first, second]


def test_the_first_admin_can_be_created_despite_the_token_limit(
    store: cab.Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "TOKENS", 1)
    add(store)
    assert add(store, admin=True).is_admin
    with pytest.raises(cab.TokenLimit):
        add(store, admin=True)


def test_a_turn_larger_than_the_history_limit_is_truncated_not_dropped(
    store: cab.Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "HISTORY_BYTES", 10)
    token = add(store, session_mode="stateful")
    for message, response in (("old", "old"), ("new", "é" * 50), ("next", "")):
        store.jobs.enqueue(token.id, cab.Ask(message, conversation="default"))
        job = store.jobs.claim()
        assert job
        if response:
            store.jobs.complete(job, cab.Answer(response))
    assert store.conversations.history(job) == [("new", "ééé")]


def test_enqueue_returns_the_job_as_it_is_stored(store: cab.Stores) -> None:
    token = add(store, session_mode="stateful")
    job = store.jobs.enqueue(
        token.id, cab.Ask("hi", "haiku", "be short", "{}", "trip", "low"), "a key"
    ).job
    assert store.jobs.get(job.id) == job
