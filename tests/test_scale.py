"""What a long history costs: plans of statements, counters, purges in slices, and freed space.

No statement of a request or of the maintenance may cost more as the history grows.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import pytest
from conftest import MODULE, FakeClock, RunningBridge, plain_bridge, wait_until
from test_store import (
    DAY, OPEN, add, claim, exchange, open_store, original, queue_up, rows, store, version_1,
)  # fmt: skip

import claude_api_bridge as cab

__all__ = ["open_store", "store", "version_1"]

CHAT = {"model": "haiku", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}


def chat_of(text: str) -> cab.Chat:
    """Return a request of /v1/messages."""
    return cab.read_messages_request({**CHAT, "messages": [{"role": "user", "content": text}]})


def drain(store: cab.Stores, days: int = 7) -> List[int]:
    """Purge up to the end; return how many requests each call deleted."""
    deleted = []
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
# Part of a statement -> why its plan may be what the rule forbids.
EXCEPTIONS: Dict[str, str] = {}


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

    monkeypatch.setattr(cab.Database, "_connect", staticmethod(connect))
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
            if not is_read or sql in migrations or any(part in sql for part in EXCEPTIONS):
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
    for status in ((), ("completed",), OPEN, ("completed", "error", "queued", "processing")):
        for owner in (None, token.id):
            for before in (None, 5):
                jobs.page(owner, status, before, 2)
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
    for query in ("", "?status=completed", "?status=queued,processing", "?limit=1", "?limit=1&before=2"):
        for client in (admin, app):
            client.get("/api/requests" + query)
    return called


def test_no_statement_of_a_route_scans_or_sorts_the_history(
    statements: Dict[str, Any], bridge: Callable[..., RunningBridge]
) -> None:
    running = bridge()
    called = use_routes(running)
    assert len(called) == len(cab.ROUTES) and len(statements) > 60
    assert faults_of(running.data_dir / "bridge.db", statements) == {}
