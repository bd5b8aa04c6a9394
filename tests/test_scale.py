"""What a long history costs: plans of statements, counters, purges in slices, and freed space.

No statement of a request or of the maintenance may cost more as the history grows.
"""

from __future__ import annotations

import contextlib
import random
import re
import sqlite3
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import pytest
from conftest import MODULE, FakeClock, RunningBridge, plain_bridge, wait_until
from test_store import (
    DAY, OPEN, add, blocked_writer, claim, exchange, open_store, original, outcome, queue_up, rows,
    store, version_1,
)  # fmt: skip

import claude_api_bridge as cab

__all__ = ["open_store", "store", "version_1"]

CHAT = {"model": "haiku", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}


def chat_of(text: str) -> cab.Chat:
    """Return a request of /v1/messages."""
    return cab.read_messages_request({**CHAT, "messages": [{"role": "user", "content": text}]})


def drain(store: cab.Stores, days: int = 7) -> List[int]:
    """Purge up to the end; return how many requests each call deleted."""
    deleted: List[int] = []
    while not deleted or deleted[-1]:
        deleted.append(store.jobs.purge(days))
        assert len(deleted) < 1000
    return deleted


def settle(store: cab.Stores) -> None:
    """Wait until everything that was queued for the writer is done."""
    store.database.write(lambda db: None)


# --- plans ---

# These grow with the history; a statement must not scan them.
LARGE = ("jobs", "conversations", "callbacks", "usage")
# Statement -> why its plan may be what the rule forbids.
EXCEPTIONS = {
    "SELECT session_id FROM conversations WHERE session_id IS NOT NULL":
        "at a start and once an hour, to find what may be deleted among the files of all sessions",
}


class RecordingConnection(sqlite3.Connection):
    """A connection that records its statements, with the values of their first execution."""

    statements: Dict[str, Any] = {}

    def execute(self, sql: str, values: Any = ()) -> sqlite3.Cursor:
        self.statements.setdefault(sql, values)
        return super().execute(sql, values)

    def executemany(self, sql: str, values: Iterable[Any]) -> sqlite3.Cursor:
        values = list(values)
        if values:
            self.statements.setdefault(sql, values[0])
        return super().executemany(sql, values)


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> Dict[str, Any]:
    """Return the statements that the databases of this test execute, with their values."""
    recorded: Dict[str, Any] = {}
    monkeypatch.setattr(RecordingConnection, "statements", recorded)

    def connect(path: Path) -> sqlite3.Connection:
        return sqlite3.connect(
            str(path), timeout=cab.WRITE_SECONDS, isolation_level=None, check_same_thread=False,
            factory=RecordingConnection,
        )

    monkeypatch.setattr(cab, "connect_database", connect)
    return recorded


def plan_of(db: sqlite3.Connection, sql: str, values: Any) -> List[str]:
    """Return the lines of the plan of a statement."""
    return [str(row[-1]) for row in db.execute("EXPLAIN QUERY PLAN " + sql, values)]


def growing(plan: List[str], tables: Iterable[str] = LARGE) -> List[str]:
    """Return the lines of a plan that read a whole large table, or sort it."""
    names = "|".join(tables)
    scans = [line for line in plan if re.match(r"SCAN (TABLE )?(%s)\b" % names, line)]
    is_large = any(re.search(r"\b(%s)\b" % names, line) for line in plan)
    sorts = [line for line in plan if "TEMP B-TREE" in line]
    return scans + sorts * is_large


def faults_of(path: Path, statements: Dict[str, Any]) -> Dict[str, List[str]]:
    """Return the recorded statements whose cost grows, with the lines that show it."""
    migrations = {statement for step in cab.MIGRATIONS for statement in step}
    faults = {}
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        for sql, values in statements.items():
            is_read = re.match(r"(SELECT|INSERT|UPDATE|DELETE|REPLACE|WITH)\b", sql)
            if not is_read or sql in migrations or sql in EXCEPTIONS:
                continue
            lines = growing(plan_of(db, sql, values))
            if lines:
                faults[sql] = lines
    return faults


def test_a_plan_that_scans_or_sorts_a_large_table_is_found(
    store: cab.Stores, tmp_path: Path
) -> None:
    # The check of the plans below can fail.
    settle(store)
    bad = {
        "SELECT count(*) FROM jobs": (),
        "SELECT message FROM jobs WHERE message = ?": ("x",),
        "SELECT id FROM jobs WHERE token_id = ? ORDER BY created_at": ("x",),
        "DELETE FROM jobs WHERE completed_at < ?": (1,),
        "SELECT 1 FROM conversations WHERE session_id = ?": ("x",),
    }
    good = {
        "SELECT message FROM jobs WHERE id = ?": ("x",),
        "SELECT seq FROM jobs WHERE token_id = ? ORDER BY seq DESC LIMIT 5": ("x",),
        "SELECT count(*) FROM tokens": (),
    }
    assert set(faults_of(tmp_path / "bridge.db", {**bad, **good})) == set(bad)


def use_all(store: cab.Stores, clock: FakeClock) -> None:
    """Call every method of the stores that a request or the maintenance calls."""
    database, jobs = store.database, store.jobs
    database.mark_in_use()
    token, other = add(store, admin=True), add(store, requests_per_minute=5, requests_per_day=9)
    for name in ("trip", "home"):
        exchange(store, token, "hi", "ho", name)
    for status in cab.JobStatus.UNFINISHED:
        queue_up(store, token, status, conversation="trip")
    jobs.enqueue(other.id, cab.Ask("hi"), "key")
    again = jobs.enqueue(other.id, cab.Ask("hi"), "key")
    jobs.enqueue(other.id, chat_of("hi"))
    assert jobs.has_queued() and not jobs.has_queued(("haiku", ""))
    first = claim(store)
    assert jobs.requeue(first, 1)
    assert jobs.claim(("opus",), ("none",)) == jobs.get(first.id)
    jobs.queue_positions(again.job)
    jobs.recover()
    first = claim(store)
    jobs.recover()
    jobs.fail_waiting("network", "x", "haiku", False, clock.now())
    for read in (jobs.get, jobs.summary, jobs.chat, jobs.status):
        read(first.id)
    jobs.response(first.id, 0, 5)
    every: Tuple[Tuple[str, ...], ...] = ((), ("completed",), OPEN, ("completed", "error", *OPEN))
    for statuses in every:
        for owner in (None, token.id):
            for before in (None, 5):
                jobs.page(cab.JobFilter(owner, statuses), before, 2)
                jobs.page(cab.JobFilter(token.id, statuses, "trip"), before, 2)
    jobs.counts()
    session = store.conversations.open(token.id, "trip")
    store.conversations.exists(session.key)
    store.conversations.list(token.id)
    store.conversations.session_ids(token.id, "trip")
    store.conversations.history(first)
    store.tokens.by_digest("x")
    store.tokens.get("x")
    store.tokens.list()
    store.tokens.count()
    store.tokens.touch(token)
    store.tokens.has_admin()
    store.usage.by_day("2027-01-01")
    store.usage.by_day("2027-01-01", token.id)
    store.usage.save_plan_limits([cab.RateLimitWindow("five_hour", "allowed", 0.4, 1.0, 1.0)])
    store.usage.plan_limits()
    database.set_state("a", "b")
    database.get_state("a")
    database.record_process(1, "a", "claude")
    database.recorded_processes()
    database.check_writable()
    jobs.fail(claim(store), "timeout", "x")
    jobs.fail_chats("interrupted", "x")
    clock.advance(10 * DAY)
    drain(store)
    store.usage.purge()
    database.free_pages()
    database.checkpoint()
    store.conversations.delete(token.id, "trip")
    store.tokens.delete(other.id)
    settle(store)


def test_no_statement_of_the_stores_scans_or_sorts_the_history(
    statements: Dict[str, Any],
    open_store: Callable[..., cab.Stores],
    clock: FakeClock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Every conversation is too long, so that its turns are purged, too.
    monkeypatch.setattr(cab, "HISTORY_BYTES", 3)
    store = open_store()
    use_all(store, clock)
    assert len(statements) > 60
    assert faults_of(tmp_path / "bridge.db", statements) == {}


def use_routes(running: RunningBridge) -> Set[Tuple[str, str]]:
    """Call every route; return the method and pattern of each."""
    admin = running.admin
    created = admin.post("/api/tokens", {"name": "app", "sessionMode": "stateful"})
    assert created.status == 201, created.data
    app = admin.with_token(created.json["token"])
    token_id = created.json["id"] if "id" in created.json else admin.get(
        "/api/tokens").json["tokens"][0]["id"]
    request_id = app.ask("hi", conversation="trip")
    app.done(request_id)
    app.follow(request_id).rest()
    app.follow(request_id, method="POST").rest()
    called = set()
    values = {"requestId": request_id, "name": "trip", "id": token_id}
    bodies = {
        "/api/ask": {"message": "hi"}, "/v1/messages": CHAT,
        "/v1/chat/completions": {"model": "haiku", "messages": CHAT["messages"]},
        "/api/tokens": {"name": "b"},
    }
    # A token is revoked last.
    for route in sorted(cab.ROUTES, key=lambda route: route.method == "DELETE"):
        path = re.sub(r":(\w+)", lambda match: values[match.group(1)], route.path)
        client = admin if route.auth is not cab.AuthLevel.TOKEN else app
        for caller in (client, admin):
            answer = caller.call(route.method, path, bodies.get(route.path))
            assert answer.status != 500, (path, answer.data)
        called.add((route.method, route.path))
    for query in ("status=completed", "status=queued,processing", "limit=1", "limit=1&before=2"):
        for client in (admin, app):
            client.get("/api/requests?" + query)
    return called


def test_no_statement_of_a_route_scans_or_sorts_the_history(
    statements: Dict[str, Any], bridge: Callable[..., RunningBridge]
) -> None:
    running = bridge()
    called = use_routes(running)
    assert len(called) == len(cab.ROUTES) and len(statements) > 60
    assert faults_of(running.data_dir / "bridge.db", statements) == {}


def test_the_rows_that_a_deletion_cascades_to_are_found_by_an_index(
    store: cab.Stores, tmp_path: Path
) -> None:
    # A plan does not show what a foreign key does.
    settle(store)
    path = tmp_path / "bridge.db"
    tables = [name for (name,) in rows(path, "SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = {
        (table, key[3]) for table in tables
        for key in rows(path, "PRAGMA foreign_key_list(%s)" % table)
    }
    assert {("jobs", "token_id"), ("conversations", "token_id")} <= columns
    for table, column in columns:
        names = [index[1] for index in rows(path, "PRAGMA index_list(%s)" % table)]
        first = {rows(path, "PRAGMA index_info(%s)" % name)[0][2] for name in names}
        assert column in first, table


# --- work ---


def fill(path: Path, token_ids: List[str], amount: int, now: float) -> None:
    """Store finished requests: half of them in conversations of 5 turns, a tenth failed."""
    with contextlib.closing(sqlite3.connect(str(path))) as db, db:
        for number in range(amount):
            name = "talk %d" % (number // 20) if number % 2 else None
            status, code = ("completed", None) if number % 10 else ("error", "timeout")
            db.execute(
                "INSERT INTO jobs (id, token_id, status, message, created_at, completed_at,"
                " conversation, response, error_code) VALUES (?, ?, ?, 'hi', ?, ?, ?, 'ho', ?)",
                (
                    "old-%d" % number, token_ids[number // 2 % len(token_ids)], status, now - 90,
                    now - 80, name, code,
                ),
            )
        db.execute(
            "INSERT INTO conversations (token_id, name, key, created_at, last_used_at, turns,"
            " bytes) SELECT token_id, conversation, lower(hex(randomblob(16))), min(created_at),"
            " max(completed_at), count(*), 4 * count(*) FROM jobs WHERE conversation IS NOT NULL"
            " GROUP BY 1, 2"
        )


def steps_of(store: cab.Stores, call: Callable[[], Any]) -> int:
    """Return how many instructions of SQLite's virtual machine a call needs."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    store.database._cache, store.database._token_cache = {}, {}
    connections = (store.database._db, store.database._reader)
    for connection in connections:
        connection.set_progress_handler(count, 1)
    call()
    settle(store)
    for connection in connections:
        connection.set_progress_handler(None, 1)
    return steps


def work_of_all(path: Path, clock: FakeClock, amount: int) -> Dict[str, int]:
    """Return the work of each kind of call on a history of so many requests."""
    with contextlib.closing(cab.Stores(path, clock)) as store:
        jobs, conversations, database = store.jobs, store.conversations, store.database
        token, other = add(store, admin=True), add(store, requests_per_minute=50)
        fill(path, [token.id, other.id], amount, clock.now())
        work: Dict[str, int] = {}

        def measure(name: str, call: Callable[[], Any]) -> None:
            work[name] = steps_of(store, call)

        jobs.enqueue(token.id, cab.Ask("hi"))
        for kind, owner in (("enqueue", token), ("enqueue with a limit", other)):
            measure(kind, lambda: jobs.enqueue(owner.id, cab.Ask("hi", conversation="new")))
        measure("key", lambda: jobs.enqueue(token.id, cab.Ask("hi"), "key"))
        measure("key again", lambda: jobs.enqueue(token.id, cab.Ask("hi"), "key"))
        measure("has_queued", jobs.has_queued)
        measure("claim", jobs.claim)
        running, queued = [
            jobs.page(cab.JobFilter(None, (status,)), None, 1)[0][0] for status in OPEN[::-1]
        ]
        for read in (jobs.get, jobs.summary, jobs.chat, jobs.status):
            measure(read.__name__, lambda: read(running.id))
        measure("response", lambda: jobs.response(running.id, 0, 5))
        measure("positions", lambda: jobs.queue_positions(queued))
        measure("requeue", lambda: jobs.requeue(running))
        jobs.claim()
        measure("recover", jobs.recover)
        measure("complete", lambda: jobs.complete(claim(store), cab.Answer("ho")))
        measure("fail", lambda: jobs.fail(claim(store), "timeout", "x"))
        measure("cancel", lambda: jobs.fail(queued, "cancelled", "x", OPEN))
        measure("fail_waiting", lambda: jobs.fail_waiting("network", "x", "opus", True, 0.0))
        measure("fail_chats", lambda: jobs.fail_chats("interrupted", "x"))
        for owner_id in (None, token.id):
            for statuses in ((), ("completed",), ("error",), OPEN, ("completed", "queued")):
                measure(
                    "page of %s, %s" % (bool(owner_id), statuses),
                    lambda: jobs.page(cab.JobFilter(owner_id, statuses), 60, 20),
                )
        measure("counts", jobs.counts)
        measure("open", lambda: conversations.open(token.id, "new"))
        key = conversations.open(token.id, "new").key
        measure("exists", lambda: conversations.exists(key))
        measure("list", lambda: conversations.list(token.id))
        measure("session_ids", lambda: conversations.session_ids(token.id, "new"))
        talk = jobs.enqueue(other.id, cab.Ask("hi", conversation="talk 1")).job
        measure("history", lambda: conversations.history(talk))
        measure("delete a conversation", lambda: conversations.delete(other.id, "talk 1"))
        measure("tokens", store.tokens.list)
        measure("has_admin", store.tokens.has_admin)
        measure("usage", lambda: store.usage.by_day("2027-01-01"))
        measure("usage.purge", store.usage.purge)
        measure("nothing to purge", lambda: jobs.purge(7))
        measure("nothing to free", database.free_pages)
        clock.advance(10 * DAY)
        measure("purge", lambda: jobs.purge(7))
        # The first of several transactions.
        measure("revoke", lambda: store.tokens._disable(other.id, True))
        return work


def test_no_call_needs_more_work_for_a_long_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "CONVERSATIONS", 3)
    monkeypatch.setattr(cab, "SLICE_ROWS", 20)
    small = work_of_all(tmp_path / "small.db", FakeClock(), 200)
    large = work_of_all(tmp_path / "large.db", FakeClock(), 2000)
    more = {
        name: (steps, large[name]) for name, steps in small.items()
        if large[name] > 1.2 * steps + 30
    }
    assert more == {}
    # There is work to compare.
    assert len(small) > 35 and min(small.values()) > 0


def test_conversations_that_were_purged_cost_nothing_in_the_next_purge(
    open_store: Callable[..., cab.Stores],
    tmp_path: Path,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each conversation has 5 turns of 4 bytes.
    monkeypatch.setattr(cab, "HISTORY_BYTES", 12)
    work = []
    for amount in (100, 1000):
        store = open_store(tmp_path / ("%d.db" % amount))
        token = add(store)
        fill(tmp_path / ("%d.db" % amount), [token.id], amount, clock.now() - 10 * DAY)
        drain(store)
        work.append(steps_of(store, lambda: store.jobs.purge(7)))
    assert work[1] <= work[0] * 1.2 + 30


@pytest.mark.parametrize("days", [1, 10], ids=["young", "the first is old"])
def test_young_turns_of_a_long_conversation_cost_a_purge_nothing(
    open_store: Callable[..., cab.Stores], tmp_path: Path, clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch, days: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(cab, "HISTORY_BYTES", 12)
    work = []
    for amount in (500, 5000):
        path = tmp_path / ("%d.db" % amount)
        store = open_store(path)
        token = add(store)
        now = clock.now()
        with contextlib.closing(sqlite3.connect(str(path))) as db, db:
            db.executemany(
                "INSERT INTO jobs (id, token_id, status, message, created_at, completed_at,"
                " conversation, response) VALUES (?, ?, 'completed', 'hi', ?, ?, 'talk', 'ho')",
                [(str(number), token.id, now, now - (1 if number else days) * DAY)
                 for number in range(amount)],
            )  # fmt: skip
            db.execute(
                "INSERT INTO conversations (token_id, name, key, created_at, last_used_at, turns,"
                " bytes) VALUES (?, 'talk', 'key', 0, 0, ?, ?)", (token.id, amount, 4 * amount))
        steps = [steps_of(store, lambda: store.jobs.purge(7)) for _ in range(2)]
        assert len(rows(path, "SELECT 1 FROM jobs")) == amount - (days > 7)
        work.append(max(steps))
    assert work[1] <= work[0] * 1.2 + 30


# --- counters ---


def counts_of_rows(path: Path) -> Dict[str, int]:
    return dict(rows(path, "SELECT status, count(*) FROM jobs GROUP BY 1"))


def counted(path: Path) -> Dict[str, int]:
    return dict(rows(path, "SELECT status, amount FROM job_counts WHERE amount"))


def bytes_of_rows(path: Path) -> List[Tuple[Any, ...]]:
    """Return the size of the stored turns of each conversation."""
    return rows(
        path,
        "SELECT token_id, name, (SELECT coalesce(sum(length(CAST(message AS BLOB)) +"
        " length(CAST(response AS BLOB))), 0) FROM jobs WHERE status = 'completed' AND"
        " jobs.token_id = conversations.token_id AND conversation = name) FROM conversations"
        " ORDER BY 1, 2",
    )


def stored_bytes(path: Path) -> List[Tuple[Any, ...]]:
    return rows(path, "SELECT token_id, name, bytes FROM conversations ORDER BY 1, 2")


class Model:
    """Calls a store at random, and keeps what its list of conversations must be."""

    def __init__(self, store: cab.Stores, clock: FakeClock, seed: int) -> None:
        self.store, self.clock, self.random = store, clock, random.Random(seed)
        self.tokens = [add(store, "app %d" % number) for number in range(3)]
        # Token id, name -> turns, created at, last used at.
        self.talks: Dict[Tuple[str, str], List[Any]] = {}
        # Job id -> its status, and its conversation, which a deletion takes away.
        self.status: Dict[str, str] = {}
        self.talk_of: Dict[str, Optional[Tuple[str, str]]] = {}
        self.created: Dict[str, float] = {}

    def use(self, talk: Optional[Tuple[str, str]], turns: int = 0) -> None:
        if talk:
            now = self.clock.now()
            self.talks.setdefault(talk, [0, now, now])
            self.talks[talk][0] += turns
            self.talks[talk][2] = now

    def enqueue(self) -> None:
        token = self.random.choice(self.tokens)
        name = self.random.choice(["trip", "home", "wörk", None])
        text = "é" * self.random.randrange(1, 30)
        job = self.store.jobs.enqueue(token.id, cab.Ask(text, conversation=name), limit=99).job
        self.status[job.id] = job.status
        self.talk_of[job.id] = (token.id, name) if name else None
        self.created[job.id] = job.created_at
        self.use(self.talk_of[job.id])

    def pick(self, *statuses: str) -> Optional[cab.Job]:
        found = sorted(job_id for job_id, status in self.status.items() if status in statuses)
        return self.store.jobs.get(self.random.choice(found)) if found else None

    def claim(self) -> None:
        job = self.store.jobs.claim()
        if job:
            self.status[job.id] = "processing"
            talk = self.talk_of[job.id]
            if talk:
                self.store.conversations.open(*talk)
                self.use(talk)

    def complete(self) -> None:
        job = self.pick("processing")
        if job:
            answer = cab.Answer("ü" * self.random.randrange(30))
            assert self.store.jobs.complete(job, answer)
            self.status[job.id] = "completed"
            if self.talk_of[job.id]:
                self.use(self.talk_of[job.id], 1)

    def fail(self) -> None:
        job = self.pick("processing", "queued")
        if job:
            assert self.store.jobs.fail(job, "timeout", "x", OPEN)
            self.status[job.id] = "error"
            self.use(self.talk_of[job.id])

    def requeue(self) -> None:
        job = self.pick("processing")
        if job:
            assert self.store.jobs.requeue(job)
            self.status[job.id] = "queued"

    def recover(self) -> None:
        self.store.jobs.recover()
        for job_id in [key for key, status in self.status.items() if status == "processing"]:
            self.status[job_id] = str(self.store.jobs.status(job_id))
            if self.status[job_id] == "error":
                self.use(self.talk_of[job_id])

    def purge(self) -> None:
        self.clock.advance(self.random.randrange(2 * DAY))
        drain(self.store, 1)
        for job_id, status in list(self.status.items()):
            if self.store.jobs.status(job_id) is None:
                assert status in ("completed", "error")
                del self.status[job_id]

    def delete_conversation(self) -> None:
        token = self.random.choice(self.tokens)
        talk = (token.id, self.random.choice(["trip", "home", "wörk"]))
        assert self.store.conversations.delete(*talk) == (talk in self.talks)
        self.talks.pop(talk, None)
        for job_id, status in self.status.items():
            if self.talk_of[job_id] == talk and status != "queued":
                self.talk_of[job_id] = None
        queued = [
            self.created[job_id] for job_id in self.status if self.talk_of[job_id] == talk
        ]
        if queued:
            self.talks[talk] = [0, min(queued), min(queued)]

    def revoke(self) -> None:
        number = self.random.randrange(len(self.tokens))
        token = self.tokens[number]
        unfinished = [
            job.id for job in self.store.jobs.page(cab.JobFilter(token.id, OPEN), None, 1000)[0]
        ]
        assert sorted(self.store.tokens.delete(token.id)) == sorted(unfinished)
        self.tokens[number] = add(self.store)
        for talk in [talk for talk in self.talks if talk[0] == token.id]:
            del self.talks[talk]
        for job_id in [job_id for job_id in self.status if not self.store.jobs.status(job_id)]:
            del self.status[job_id]

    def step(self) -> None:
        self.clock.advance(self.random.randrange(1, 100))
        frequent = [self.enqueue, self.claim, self.complete] * 4
        self.random.choice([
            *frequent, self.fail, self.fail, self.requeue, self.recover, self.purge,
            self.delete_conversation, self.revoke,
        ])()  # fmt: skip

    def conversations(self, token_id: str) -> List[cab.Conversation]:
        """Return what the list must be."""
        own = [(name, *use) for (owner, name), use in self.talks.items() if owner == token_id]
        return [cab.Conversation(*row) for row in sorted(own, key=lambda row: -row[3])]


@pytest.mark.parametrize("seed", range(6))
def test_counters_and_conversations_equal_a_count_after_random_operations(
    store: cab.Stores,
    clock: FakeClock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    monkeypatch.setattr(cab, "HISTORY_BYTES", 150)
    monkeypatch.setattr(cab, "SLICE_ROWS", 3)
    path, model = tmp_path / "bridge.db", Model(store, clock, seed)
    store.database._db.execute("PRAGMA synchronous=OFF")
    for _ in range(250):
        model.step()
        status: Dict[str, int] = {}
        for value in model.status.values():
            status[value] = status.get(value, 0) + 1
        assert store.jobs.counts() == counted(path) == counts_of_rows(path) == status
        assert stored_bytes(path) == bytes_of_rows(path)
        for token in model.tokens:
            assert store.conversations.list(token.id) == model.conversations(token.id)


def test_a_slice_ends_with_what_exceeds_its_bytes(
    store: cab.Stores, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Large answers take long to overwrite."""
    monkeypatch.setattr(cab, "SLICE_BYTES", 1000)
    token = add(store)

    def answer(count: int) -> None:
        for _ in range(count):
            queue_up(store, token, "hi")
            assert store.jobs.complete(claim(store), cab.Answer("x" * 600))

    answer(6)
    clock.advance(10 * DAY)
    left = []
    while store.jobs.purge(7):
        left.append(counted(tmp_path / "bridge.db").get("completed", 0))
    assert left == [4, 2, 0]
    answer(4)
    store.tokens._disable(token.id, False)
    while store.tokens.delete_slice(token.id):
        left.append(counted(tmp_path / "bridge.db").get("completed", 0))
    assert left[3:] == [2, 0]


def test_a_list_of_conversations_ends_at_its_limit(
    store: cab.Stores, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "CONVERSATIONS", 3)
    token = add(store)
    for name in "abcde":
        clock.advance(1)
        queue_up(store, token, "hi", conversation=name)
    clock.advance(1)
    queue_up(store, token, "hi", conversation="a")
    assert [listed.name for listed in store.conversations.list(token.id)] == ["a", "e", "d"]


def test_the_bytes_of_an_answer_with_a_lone_surrogate_are_those_that_are_stored(
    store: cab.Stores, tmp_path: Path
) -> None:
    exchange(store, add(store), "hi", "a\ud800b")
    assert stored_bytes(tmp_path / "bridge.db") == bytes_of_rows(tmp_path / "bridge.db")


# --- purges ---


def long_talk(store: cab.Stores, clock: FakeClock, size: int, old: int, young: int) -> cab.Token:
    """Store a conversation of so many turns of `size` bytes. The young ones are of today."""
    token = add(store)
    for number in range(old + young):
        if number == old:
            clock.advance(10 * DAY)
        exchange(store, token, "%05d" % number, "x" * (size - 5), "trip")
    return token


def messages(path: Path, where: str = "1") -> List[str]:
    sql = "SELECT message FROM jobs WHERE %s ORDER BY seq" % where
    return [text for (text,) in rows(path, sql)]


@pytest.mark.parametrize("young", [0, 10, 60])
def test_a_purge_keeps_what_is_replayed_and_what_is_young(
    store: cab.Stores,
    clock: FakeClock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    young: int,
) -> None:
    # Three times what is replayed: 30 turns of 50 bytes.
    monkeypatch.setattr(cab, "HISTORY_BYTES", 1_500)
    monkeypatch.setattr(cab, "SLICE_ROWS", 7)
    token = long_talk(store, clock, 50, 90 - young, young)
    if not young:
        clock.advance(10 * DAY)
    [job] = queue_up(store, token, "now", conversation="trip")
    before = store.conversations.history(job)
    assert len(before) == 30
    listed = store.conversations.list(token.id)
    deleted = drain(store)
    assert max(deleted) == 7 and deleted[-1] == 0
    assert store.conversations.history(job) == before
    kept = max(30, young)
    assert messages(tmp_path / "bridge.db", "status = 'completed'") == [
        "%05d" % number for number in range(90 - kept, 90)
    ]
    # What is deleted is listed as before.
    assert store.conversations.list(token.id) == listed and listed[0].turns == 90
    assert stored_bytes(tmp_path / "bridge.db") == [(token.id, "trip", kept * 50)]


def test_a_purge_deletes_exactly_what_is_too_old(
    store: cab.Stores, clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "SLICE_ROWS", 4)
    token = add(store)
    # Finished 7 days and 1 s, exactly 7 days, and just now; and what is never deleted.
    for age in (7 * DAY + 1, 7 * DAY, 0):
        at = clock.at
        clock.at = at - age
        for _ in range(3):
            for conversation in (None, "trip"):
                queue_up(store, token, "failed %d" % age, conversation=conversation)
                store.jobs.fail(claim(store), "timeout", "x")
            exchange(store, token, "turn %d" % age, "ho", "trip")
            queue_up(store, token, "single %d" % age)
            store.jobs.complete(claim(store), cab.Answer("ho"))
        clock.at = at
    clock.at -= 30 * DAY
    queue_up(store, token, "waits", "waits")
    claim(store)
    clock.at += 30 * DAY
    before = messages(tmp_path / "bridge.db")
    deleted = drain(store)
    assert deleted == [4, 4, 1, 0]
    gone = ("failed %d" % (7 * DAY + 1), "single %d" % (7 * DAY + 1))
    assert messages(tmp_path / "bridge.db") == [text for text in before if text not in gone]
    assert store.jobs.counts() == counts_of_rows(tmp_path / "bridge.db")


def test_a_turn_that_is_longer_than_the_history_stays(
    store: cab.Stores, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "HISTORY_BYTES", 100)
    token = add(store)
    for number in range(3):
        exchange(store, token, str(number), "x" * 500, "trip")
    clock.advance(10 * DAY)
    [job] = queue_up(store, token, "now", conversation="trip")
    before = store.conversations.history(job)
    assert [turn.message for turn in before] == ["2"]
    assert sum(drain(store)) == 2
    assert store.conversations.history(job) == before


@pytest.mark.parametrize("seed", range(20))
def test_a_purge_keeps_exactly_what_is_replayed_of_turns_of_any_size(
    store: cab.Stores,
    clock: FakeClock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    monkeypatch.setattr(cab, "HISTORY_BYTES", 60)
    monkeypatch.setattr(cab, "SLICE_ROWS", 3)
    token, choice = add(store), random.Random(seed)
    for number in range(12):
        size = choice.choice([0, 1, 5, 9, 20, 29, 30, 60, 200])
        exchange(store, token, "%02d" % number, choice.choice("xé") * (size // 2), "trip")
        if not choice.randrange(4):
            queue_up(store, token, "failed", conversation="trip")
            store.jobs.fail(claim(store), "timeout", "x")
    clock.advance(10 * DAY)
    [job] = queue_up(store, token, "now", conversation="trip")
    before = store.conversations.history(job)
    drain(store)
    assert store.conversations.history(job) == before
    kept = messages(tmp_path / "bridge.db", "status != 'queued'")
    assert kept == [turn.message for turn in before] and len(kept) < 12
    assert stored_bytes(tmp_path / "bridge.db") == bytes_of_rows(tmp_path / "bridge.db")


def test_a_conversation_of_250_turns_is_deleted(
    store: cab.Stores, clock: FakeClock, tmp_path: Path
) -> None:
    store.database._db.execute("PRAGMA synchronous=OFF")
    token = add(store)
    for number in range(250):
        exchange(store, token, str(number), "ok", "trip")
    clock.advance(1)
    exchange(store, token, "other", "ok", "home")
    assert 250 > 2 * cab.SLICE_ROWS
    clock.advance(1)
    running, queued = queue_up(store, token, "runs", "waits", conversation="trip")
    claim(store)
    assert len(store.conversations.history(queued)) == 250
    assert store.conversations.delete(token.id, "trip") is True
    path = tmp_path / "bridge.db"
    assert messages(path, "conversation = 'trip'") == ["waits"]
    assert messages(path, "conversation IS NULL") == [*map(str, range(250)), "runs"]
    assert store.conversations.history(queued) == []
    assert [(talk.name, talk.turns) for talk in store.conversations.list(token.id)] == [
        ("trip", 0), ("home", 1),
    ]  # fmt: skip
    assert store.jobs.complete(running, cab.Answer("ok"))
    assert stored_bytes(path) == bytes_of_rows(path)


@contextlib.contextmanager
def transactions(store: cab.Stores) -> Iterator[List[int]]:
    """Collect how many rows each write changes, with what triggers and foreign keys change."""
    changes: List[int] = []
    write = store.database.write

    def counting(task: Callable[..., Any], *wait: float) -> Any:
        def run(db: sqlite3.Connection) -> Any:
            before = db.total_changes
            try:
                return task(db)
            finally:
                changes.append(db.total_changes - before)

        return write(run, *wait)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.database, "write", counting)
        yield changes


def test_no_deletion_changes_more_rows_at_once_for_a_long_history(
    open_store: Callable[..., cab.Stores],
    tmp_path: Path,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cab, "SLICE_ROWS", 10)
    store, path = open_store(), tmp_path / "bridge.db"
    token, other = add(store), add(store)
    fill(path, [token.id, other.id], 2000, clock.now() - 10 * DAY)
    with contextlib.closing(sqlite3.connect(str(path))) as db, db:
        db.execute(
            "UPDATE jobs SET conversation = 'long' WHERE token_id = ? AND seq % 3", (other.id,))
    with transactions(store) as changes:
        drain(store)
        purge, changes[:] = list(changes), []
        assert store.conversations.delete(other.id, "long") is False
        conversation, changes[:] = list(changes), []
        store.tokens.delete(token.id)
    assert min(map(len, (purge, conversation, changes))) > 10
    # A trigger changes a counter for each row.
    assert max(map(max, (purge, conversation, changes))) <= 2 * cab.SLICE_ROWS


# --- the file ---


def pragma(path: Path, name: str) -> int:
    return int(rows(path, "PRAGMA " + name)[0][0])


def wal_of(path: Path) -> int:
    return path.with_name(path.name + "-wal").stat().st_size


def test_freed_pages_go_back_to_the_file_system(
    store: cab.Stores, clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "VACUUM_PAGES", 50)
    path, token = tmp_path / "bridge.db", add(store)
    for _ in range(30):
        queue_up(store, token, "x" * 40_000)
        store.jobs.complete(claim(store), cab.Answer("ok"))
    while store.database.free_pages():
        pass
    store.database.checkpoint()
    settle(store)
    size = path.stat().st_size
    clock.advance(10 * DAY)
    assert sum(drain(store)) == 30
    free = [pragma(path, "freelist_count")]
    assert free[0] * 4096 > 0.8 * size > 800_000
    while store.database.free_pages():
        free.append(pragma(path, "freelist_count"))
    # At most so many pages in one transaction.
    assert [before - after for before, after in zip(free, free[1:])] == [50] * (len(free) - 1)
    assert 0 < free[-1] <= 50 and pragma(path, "freelist_count") == 0
    store.database.checkpoint()
    settle(store)
    assert path.stat().st_size < 0.2 * size
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_checkpoint_empties_the_wal_file(store: cab.Stores, tmp_path: Path) -> None:
    path, token = tmp_path / "bridge.db", add(store)
    queue_up(store, token, "a text")
    assert wal_of(path) > 0
    store.database.checkpoint()
    settle(store)
    # An empty transaction writes nothing.
    assert wal_of(path) == 0 and b"a text" in path.read_bytes()
    assert queue_up(store, token, "more") and wal_of(path) > 0


def test_a_checkpoint_does_nothing_while_another_program_reads(
    store: cab.Stores, tmp_path: Path
) -> None:
    path, token = tmp_path / "bridge.db", add(store)
    queue_up(store, token, "a text")
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM jobs").fetchall()
        queue_up(store, token, "more")
        store.database.checkpoint()
        settle(store)
        assert wal_of(path) > 0
        other.execute("ROLLBACK")
    # The time that a write waits for another program is as before.
    assert store.database.write(
        lambda db: db.execute("PRAGMA busy_timeout").fetchone()[0]) == cab.WRITE_SECONDS * 1000
    store.database.checkpoint()
    settle(store)
    assert wal_of(path) == 0 and store.jobs.counts() == {"queued": 2}


def test_a_checkpoint_that_fails_does_not_report_a_stored_write_as_failed(
    store: cab.Stores, tmp_path: Path
) -> None:
    token = add(store)
    results: List[Any] = []

    def fails(db: sqlite3.Connection) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    def checkpoint() -> None:
        store.database._queue_write(cab.WriteTask(fails, Future(), is_transaction=False))

    with blocked_writer(store, tmp_path / "bridge.db") as submit:
        submit(outcome(lambda: store.jobs.enqueue(token.id, cab.Ask("hi")), results))
        submit(checkpoint)
    assert messages(tmp_path / "bridge.db") == ["hi"]
    assert [type(result) for result in results] == [cab.EnqueueResult]


def test_the_maintenance_purges_frees_and_empties_the_wal_file(
    tmp_path: Path, clock: FakeClock
) -> None:
    path = tmp_path / "data" / "bridge.db"
    with plain_bridge(tmp_path) as running:
        for _ in range(3):
            running.admin.answer("hi " + "x" * 20_000)
    with contextlib.closing(sqlite3.connect(str(path))) as db, db:
        db.execute("UPDATE jobs SET completed_at = 1, created_at = 1")
        size = path.stat().st_size
    with plain_bridge(tmp_path):
        wait_until(lambda: pragma(path, "freelist_count") == 0 and counts_of_rows(path) == {})
        wait_until(lambda: wal_of(path) == 0 and path.stat().st_size < size - 60_000)


# --- old versions ---


def old_file(path: Path, version: int, request: pytest.FixtureRequest) -> None:
    """Create a database of an old version, with requests and conversations."""
    if version == 0:
        with original(path):
            return
    request.getfixturevalue("version_1")
    with contextlib.closing(sqlite3.connect(str(path))) as db, db:
        for step in cab.MIGRATIONS[1:version]:
            for statement in step:
                db.execute(statement)
        db.execute("PRAGMA user_version = %d" % version)


@pytest.mark.parametrize("version", range(len(cab.MIGRATIONS)))
def test_an_old_version_gets_counters_and_gives_space_back(
    version: int,
    tmp_path: Path,
    open_store: Callable[..., cab.Stores],
    clock: FakeClock,
    request: pytest.FixtureRequest,
) -> None:
    path = tmp_path / "bridge.db"
    old_file(path, version, request)
    assert pragma(path, "user_version") == version
    assert pragma(path, "auto_vacuum") == 0
    store = open_store()
    expected = counts_of_rows(path)
    assert len(expected) >= 3 and store.jobs.counts() == counted(path) == expected
    assert stored_bytes(path) == bytes_of_rows(path)
    for token_id, name, turns, created_at, used_at, key in rows(
        path, "SELECT token_id, name, turns, created_at, last_used_at, key FROM conversations"
    ):
        [[amount, first, last]] = rows(
            path,
            "SELECT coalesce(sum(status = 'completed'), 0), min(created_at),"
            " max(coalesce(completed_at, created_at)) FROM jobs"
            " WHERE token_id = ? AND conversation = ?",
            token_id, name,
        )
        assert turns == amount and key
        assert first is None or (created_at, used_at) == (first, last)
    assert rows(path, "SELECT 1 FROM conversations WHERE turns")
    assert pragma(path, "auto_vacuum") == 2
    # The triggers of the migrated file count.
    claim(store)
    assert counted(path) == counts_of_rows(path) != expected
    clock.advance(10 * DAY)
    drain(store)
    while store.database.free_pages():
        pass
    assert counted(path) == counts_of_rows(path) and pragma(path, "freelist_count") == 0


# --- damage, and an unclean end ---


def break_page(path: Path, letter: bytes) -> None:
    """Break the list of pages that hold a long text; nothing reads it at a start."""
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        size = db.execute("PRAGMA page_size").fetchone()[0]
    data = bytearray(path.read_bytes())
    pages = [
        start for start in range(0, len(data), size)
        if data[start + 4 : start + size] == letter * (size - 4)
    ]
    data[pages[0] : pages[0] + 4] = b"\xff" * 4
    path.write_bytes(bytes(data))


def crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run a bridge in the folder "first"; return a folder as if it was killed. Its file is large.
    """
    monkeypatch.setattr(cab, "CHECKED_BYTES", 50_000)
    with plain_bridge(tmp_path / "first") as running:
        for _ in range(3):
            running.admin.answer("hi " + "x" * 30_000)
        source, target = tmp_path / "first" / "data", tmp_path / "second" / "data"
        target.mkdir(parents=True)
        for path in source.glob("bridge.db*"):
            (target / path.name).write_bytes(path.read_bytes())
    assert rows(target / "bridge.db", "SELECT 1 FROM remembered WHERE name = 'in_use'")
    return target.parent


def test_damage_is_found_after_an_unclean_end_and_the_next_start_moves_the_file_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = crash(tmp_path, monkeypatch)
    path = folder / "data" / "bridge.db"
    break_page(path, b"x")
    with plain_bridge(folder) as running:
        # It starts at once, with its tokens.
        assert running.bridge.new_admin_token is None
        answer = wait_until(
            lambda: [got for got in [running.admin.get("/health")] if got.status != 200])[0]
        assert answer.status == 503 and "damaged" in answer.json["error"]
        assert "Restart" in answer.json["error"]
        assert any("damaged" in line for line in running.log)
        assert running.admin.get("/api/status").status == 200
    with plain_bridge(folder) as running:
        assert running.bridge.new_admin_token
        assert running.admin.get("/health").status == 200
        assert running.admin.get("/api/status").json["stats"]["totalRequests"] == 0
    [moved] = (folder / "data").glob("bridge-damaged-*.db")
    assert b"x" * 4000 in moved.read_bytes()


def test_nothing_is_checked_after_a_clean_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data" / "bridge.db"
    monkeypatch.setattr(cab, "CHECKED_BYTES", 50_000)
    with plain_bridge(tmp_path) as running:
        for _ in range(3):
            running.admin.answer("hi " + "x" * 30_000)
    assert not rows(path, "SELECT 1 FROM remembered WHERE name = 'in_use'")
    break_page(path, b"x")
    with plain_bridge(tmp_path) as running:
        assert running.bridge.new_admin_token is None
        database = running.bridge._server.dispatcher._service.stores.database
        assert database._check is None
        assert running.admin.get("/health").status == 200
    # A small file is always checked.
    monkeypatch.setattr(cab, "CHECKED_BYTES", 1 << 30)
    with plain_bridge(tmp_path) as running:
        assert running.bridge.new_admin_token


def test_a_sound_file_is_checked_after_an_unclean_end_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = crash(tmp_path, monkeypatch)
    path = folder / "data" / "bridge.db"
    with plain_bridge(folder) as running:
        database = running.bridge._server.dispatcher._service.stores.database
        assert database._check
        database._check._thread.join(10)
        assert running.admin.get("/health").status == 200
    assert not rows(path, "SELECT 1 FROM remembered WHERE name = 'in_use'")


def test_a_check_that_a_clean_end_interrupts_is_made_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = crash(tmp_path, monkeypatch)
    break_page(folder / "data" / "bridge.db", b"x")

    def interrupted(db: sqlite3.Connection) -> None:
        raise sqlite3.OperationalError("interrupted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cab, "check_integrity", interrupted)
        with plain_bridge(folder) as running:
            running.bridge._server.dispatcher._service.stores.database._check._thread.join(10)
    with plain_bridge(folder) as running:
        database = running.bridge._server.dispatcher._service.stores.database
        assert database._check, "it was not checked"
        database._check._thread.join(10)
        assert running.admin.get("/health").status == 503


# --- revoked tokens ---


def texts_in(path: Path, marker: bytes) -> List[Tuple[str, bytes]]:
    """Return the texts with this marker that the files of a database contain."""
    found = set()
    for suffix in ("", "-wal"):
        file = path.with_name(path.name + suffix)
        for text in re.findall(marker + rb"-\w+", file.read_bytes()):
            found.add((suffix, text))
    return sorted(found)


def many_requests(store: cab.Stores, token: cab.Token, amount: int) -> None:
    """Store requests of every kind, whose texts all contain `secret-`."""
    for number in range(amount):
        # Some fit into a page, others need several.
        size = (10, 300, 9_000)[number % 3]
        long = "x" * size
        message = "secret-message%d %s" % (number, long)
        if number % 5 == 4:
            store.jobs.enqueue(token.id, chat_of("secret-chat%d %s" % (number, long)))
        else:
            store.jobs.enqueue(
                token.id,
                cab.Ask(
                    message, system_prompt="secret-system%d" % number,
                    conversation="secret-name%d" % (number % 4) if number % 2 else None,
                ),
            )
        job = claim(store)
        if number % 7 == 6:
            store.jobs.fail(job, "timeout", "secret-error%d" % number)
        else:
            store.jobs.complete(job, cab.Answer("secret-answer%d %s" % (number, long)))


@pytest.mark.parametrize("is_first", [True, False])
def test_the_texts_of_a_revoked_token_are_erased_in_the_files(
    is_first: bool,
    open_store: Callable[..., cab.Stores],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, connect = tmp_path / "bridge.db", cab.connect_database

    def forgetful(path: Path) -> sqlite3.Connection:
        # Some builds of SQLite overwrite what is deleted, others do not.
        db = connect(path)
        db.execute("PRAGMA secure_delete=OFF")
        return db

    monkeypatch.setattr(cab, "connect_database", forgetful)
    store = open_store()
    store.database._db.execute("PRAGMA synchronous=OFF")
    if not is_first:
        # It leaves the connection as the next one needs it.
        store.tokens.delete(add(store).id)
    token, other = add(store), add(store)
    many_requests(store, token, 250)
    queue_up(store, token, "secret-queued " + "x" * 9_000)
    queue_up(store, other, "kept-text")
    assert len(texts_in(path, b"secret")) > 250
    assert store.tokens.delete(token.id) != []
    settle(store)
    assert [text[:9] for _, text in texts_in(path, b"kept")] == [b"kept-text"]
    assert texts_in(path, b"secret") == []
    assert counted(path) == counts_of_rows(path) == {"queued": 1}


def test_a_request_that_is_stored_while_its_token_is_revoked_is_refused(
    store: cab.Stores,
) -> None:
    token, results = add(store), []
    exchange(store, token, "hi", "ho")
    delete_slice = store.tokens.delete_slice

    def late(token_id: str) -> Any:
        # Its caller was authenticated before the revocation began.
        with contextlib.suppress(cab.InvalidToken):
            results.append(store.jobs.enqueue(token.id, cab.Ask("late")))
        return delete_slice(token_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.tokens, "delete_slice", late)
        store.tokens.delete(token.id)
    assert results == [] and store.tokens.list() == []


REVOKE = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import claude_api_bridge as cab
cab.SLICE_ROWS = 10
store = cab.Stores(Path(sys.argv[2]), cab.Clock())
write, calls = store.database.write, []
def dies(*arguments):
    calls.append(1)
    if len(calls) == 4:
        os._exit(9)
    return write(*arguments)
store.database.write = dies
store.tokens.delete(sys.argv[3])
"""


def test_a_revoke_that_is_killed_half_way_leaves_an_expired_token_and_goes_on(
    open_store: Callable[..., cab.Stores], tmp_path: Path
) -> None:
    path, secret, store = tmp_path / "bridge.db", cab.new_token(), open_store()
    token = store.tokens.add(cab.NewToken("app"), secret)
    store.database._db.execute("PRAGMA synchronous=OFF")
    for number in range(50):
        exchange(store, token, str(number), "ok", "trip")
    queue_up(store, token, "runs", "waits")
    claim(store)
    store.close()
    killed = subprocess.run(
        [sys.executable, "-c", REVOKE, str(MODULE.parent), str(path), token.id], timeout=60)
    assert killed.returncode == 9
    store = open_store()
    # What was not finished is gone, then two slices.
    assert counted(path) == counts_of_rows(path) == {"completed": 30}
    assert store.tokens.by_digest(cab.digest(secret)) is None
    [left] = store.tokens.list()
    assert left.id == token.id and left.is_expired(store.database.clock.now())
    purge = cab.Purge(store, cab.Config(), cab.Clock())
    purge.step()
    while purge.is_running:
        purge.step()
    assert store.tokens.list() == [] and counted(path) == counts_of_rows(path) == {}
    assert rows(path, "SELECT count(*) FROM conversations") == [(0,)]
