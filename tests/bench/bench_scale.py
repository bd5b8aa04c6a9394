"""Measure whether the bridge slows down as its history grows.

    python tests/bench/bench_scale.py [--rows 1000000] [--base 2000] [--rounds 5] [--only NAME,...]
                                      [--keep DIR] [--module PATH] [--baseline OLD.py] [--json]

Two bridges run with the same tokens, queue and usage figures: one with `--rows` finished requests,
one with `--base`, which are just enough that each list has as many entries. They take turns. A
ratio compares the large history with the small one.
  probes   the time of each kind of request. Right before each of them the same client submits a
           request and cancels it, so that nothing is cached; these two writes are rows of their own
  claim    from a submit to the event `started`, in a conversation whose process waits
  start    from spawn to the line with the address, when the port is open
  delays   one client polls and one submits and cancels, without end. The longest request of each
           kind: when no old requests are found at a start, while half of the requests are deleted
           (--keep-days) and their space is freed, and while a token and a conversation are deleted;
           "quiet" is the time after the first of these
The median is that of all samples. The p99 is the lower quartile of the p99 of the rounds (of five
rounds the second lowest), so that disturbances of the machine in some of them do not count: with
equal histories all ratios of it are below 1.3. A part that takes long ends early; the table
contains its number of samples.

The history covers 399 days: 20 tokens, three models, errors and cancelled requests, conversations,
schemas, requests of /v1 (whose images the bridge does not keep), messages and answers of 200 to
2,000 bytes. Tokens are created by the bridge, so its own migrations create the schema; the rows
are inserted by SQL, with the columns that exist. `--keep` stores the databases in a folder; later
runs use copies of them. With `--baseline` that module creates the databases and is measured as
well; this module migrates a copy at its first start. A million rows need 8 GB of disk. A fake CLI
answers. Linux only, because the fake needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import (
    Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple,
)  # fmt: skip

import common

SAMPLES, CLAIMS, STARTS = 100, 30, 5
# A part of a round ends after this time, or after the least number of samples.
PART_SECONDS, LEAST_SAMPLES = 10.0, 5
MOST_RATIO, MOST_DELAY_MS = 1.3, 50
# The parts "delays". A purge may take longer for each request.
NOTHING_SECONDS, QUIET_SECONDS, PURGE_SECONDS, PURGE_ROW_SECONDS = 10.0, 30.0, 300.0, 0.005
# The space is freed when so few pages were given back in this time; the load itself needs some.
STILL_PAGES, STILL_SECONDS = 200, 3.0
# Between two requests of a client in the part "delays": the bridge needs the processor, too.
PAUSE_SECONDS = 0.002
FOREVER = ("--keep-days", "3650", "--run-seconds", "86400")
DAYS, DAY = 399, 86_400
ROWS_AT_ONCE = 20_000
MODELS = ("claude-haiku-4-5", "claude-sonnet-4-5", "claude-opus-4-1")
# The names of the tokens, and how many of 100 requests are theirs. The stateful ones are first.
SHARES = {
    "memory": 12, "visitors": 10, "memory 2": 3, "memory 3": 3, "memory 4": 2,
    "user": 15, "heavy": 10, **{"user %d" % n: 45 / 12 for n in range(2, 14)},
}  # fmt: skip
STATEFUL = 5
SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}}
ERRORS = ("cancelled", "cancelled", "cli_error", "cli_error", "timeout", "overloaded")
Row = Dict[str, Any]


# --- the databases ---


class Facts(NamedTuple):
    """What the measurements need to know of a database.

    secrets, ids: of the tokens, by name.  requests: finished ones of the token "user", newest
    first.  middle: a number in the middle of the list.  conversation: the longest one of "memory".
    busy: the queued request that comes first.  waiting: another one.
    """

    secrets: Dict[str, str]
    ids: Dict[str, str]
    requests: List[str]
    middle: int
    conversation: str
    busy: str
    waiting: str


def insert(db: sqlite3.Connection, table: str, rows: Iterable[Row]) -> None:
    """Insert rows with the same keys. A column that the table does not have is left out."""
    columns: List[str] = []
    statement = ""
    batch: List[List[Any]] = []
    for row in rows:
        if not columns:
            known = {name for _, name, *_ in db.execute("PRAGMA table_info(%s)" % table)}
            columns = [name for name in row if name in known]
            places = ", ".join("?" * len(columns))
            statement = "INSERT INTO %s (%s) VALUES (%s)" % (table, ", ".join(columns), places)
        batch.append([row[name] for name in columns])
        if len(batch) == ROWS_AT_ONCE:
            with db:
                db.executemany(statement, batch)
            batch = []
    with db:
        db.executemany(statement, batch)


class History:
    """Invents requests."""

    def __init__(self, token_ids: Dict[str, str]) -> None:
        self.token_ids = token_ids
        self.random = random.Random(1)
        self.now = time.time()
        words = ["".join(self.random.choices("etaoinshrdlu", k=n % 9 + 1)) for n in range(9_999)]
        self._words = " ".join(self.random.choices(words, k=99_999))
        # (token id, name) -> the columns of a conversation.
        self._conversations: Dict[Tuple[str, str], Row] = {}

    def text(self) -> str:
        """Return 200 to 2,000 bytes."""
        start = self.random.randrange(len(self._words) - 2_000)
        return self._words[start : start + self.random.randint(200, 2_000)]

    def _conversation(self, name: str, number: int) -> Optional[str]:
        """Return a conversation of a stateful token: of 50, or a new one after 20 requests."""
        if name == "visitors":
            return "visit-%d" % (number // 200)
        if name.startswith("memory"):
            return "topic-%d" % max(0, self.random.randrange(-12, 50))
        return None

    def row(self, name: str, number: int, created_at: float) -> Row:
        """Return the columns of a queued request."""
        conversation = self._conversation(name, number)
        is_schema = self.random.random() < 0.05
        return {
            "id": str(uuid.UUID(int=self.random.getrandbits(128), version=4)),
            "token_id": self.token_ids[name],
            "status": "queued",
            "message": self.text(),
            "created_at": created_at,
            "attempts": 0,
            "model": self.random.choice(MODELS),
            "system_prompt": self.text() if self.random.random() < 0.1 else None,
            "json_schema": json.dumps(SCHEMA) if is_schema else None,
            "conversation": conversation,
            "effort": "low" if self.random.random() < 0.1 else None,
            "idempotency_key": "key-%d" % number if self.random.random() < 0.1 else None,
            "fingerprint": "%064x" % self.random.getrandbits(256),
            "api": "messages" if not conversation and self.random.random() < 0.1 else None,
            **dict.fromkeys(
                ("started_at", "completed_at", "response", "structured", "usage", "ending",
                 "error", "error_code")
            ),
        }  # fmt: skip

    def finished(self, count: int) -> Iterator[Row]:
        """Yield requests, oldest first."""
        names = self.random.choices(list(SHARES), list(SHARES.values()), k=count)
        for number, name in enumerate(names):
            created_at = self.now - DAYS * DAY * (1 - number / count)
            row = self.row(name, number, created_at)
            row["completed_at"] = created_at + self.random.uniform(2, 30)
            if self.random.random() < 0.12:
                row["status"], row["error_code"] = "error", self.random.choice(ERRORS)
                row["error"] = "The request ended: %s." % row["error_code"]
            else:
                cost = self.random.uniform(0.001, 0.1)
                row.update(status="completed", response=self.text(), usage=usage(self.random, cost))
                row.update(ending='["end_turn", null, []]')
                if row["json_schema"]:
                    row["structured"] = json.dumps({"answer": row["response"]})
            if row["error_code"] != "cancelled":
                row.update(started_at=created_at + 1, attempts=1)
            self._count(row)
            yield row

    def _count(self, row: Row) -> None:
        """Add a request to its conversation."""
        if row["conversation"]:
            key = (row["token_id"], row["conversation"])
            first = {"turns": 0, "bytes": 0, "created_at": row["created_at"]}
            sums = self._conversations.setdefault(key, first)
            sums["last_used_at"] = row["completed_at"]
            if row["status"] == "completed":
                sums["turns"] += 1
                sums["bytes"] += len(row["message"]) + len(row["response"])

    def queued(self) -> List[Row]:
        """Return five queued requests. The run of the first one does not end."""
        rows = [self.row("user", -number, self.now) for number in range(1, 6)]
        rows[0]["message"] = "busy"
        return [{**row, **dict.fromkeys(("idempotency_key", "json_schema", "api"))} for row in rows]

    def usage_rows(self) -> Iterator[Row]:
        """Yield the figures of each day and token; they do not depend on the requests."""
        for day in range(DAYS):
            for token_id in self.token_ids.values():
                counts = {"requests": 100, "completed": 90, "errors": 10}
                names = ("input_tokens", "output_tokens", "cache_read_tokens")
                tokens = {name: self.random.randrange(99_999) for name in names}
                date = time.strftime("%Y-%m-%d", time.gmtime(self.now - day * DAY))
                cost = self.random.uniform(0.001, 9)
                yield {"day": date, "token_id": token_id, **counts, **tokens, "cost_usd": cost}

    def conversation_rows(self) -> Iterator[Row]:
        """Yield the conversations of the requests so far."""
        for (token_id, name), sums in self._conversations.items():
            key, spent = "%032x" % self.random.getrandbits(128), self.random.uniform(0.001, 9)
            yield {"token_id": token_id, "name": name, "key": key, "spent_usd": spent, **sums}


def usage(chance: random.Random, cost: float) -> str:
    """Return the `usage` of a request as JSON."""
    return json.dumps([*(chance.randrange(9_999) for _ in range(4)), cost])


def create_tokens(folder: Path, module: Path) -> Dict[str, str]:
    """Let a bridge create a database with tokens; return the secrets by name."""
    options = ("--claude", common.paced_claude(folder / "claude"), "--spare", "0")
    with common.bridge(folder, common.environment(), *options, module=module) as at:
        secrets = {"admin": at.token}
        for number, name in enumerate(SHARES):
            mode = "stateful" if number < STATEFUL else "stateless"
            body = {"name": name, "sessionMode": mode, "expiresInDays": None}
            secrets[name] = common.call(at, "POST", "/api/tokens", body)["token"]
    return secrets


def fill(path: Path, count: int, secrets: Dict[str, str]) -> None:
    """Insert a history of so many requests; write the facts beside the database."""
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        db.execute("PRAGMA synchronous=OFF")
        db.execute("PRAGMA cache_size=-1000000")
        ids = dict(db.execute("SELECT name, id FROM tokens"))
        history = History({name: ids[name] for name in SHARES})
        insert(db, "jobs", history.finished(count))
        queued = history.queued()
        insert(db, "jobs", queued)
        insert(db, "conversations", history.conversation_rows())
        insert(db, "usage", history.usage_rows())
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        rows = db.execute(
            "SELECT id FROM jobs WHERE token_id = ? AND status = 'completed' ORDER BY seq DESC",
            (ids["user"],),
        ).fetchall()
        facts = Facts(
            secrets=secrets,
            ids=ids,
            requests=[row[0] for row in rows[:: max(1, len(rows) // 1_000)]],
            middle=db.execute("SELECT max(seq) / 2 FROM jobs").fetchone()[0],
            conversation="topic-0",
            busy=queued[0]["id"],
            waiting=queued[-1]["id"],
        )
    path.with_name("facts.json").write_text(json.dumps(facts._asdict()))


def built(folder: Path, module: Path, sizes: Sequence[int], keep: Optional[Path]) -> List[Path]:
    """Return a folder with a database for each size; build those that are not kept."""
    start = time.monotonic()
    secrets = create_tokens(folder / "new", module)
    new = folder / "new" / "data" / "bridge.db"
    with contextlib.closing(sqlite3.connect(str(new))) as db:
        version = db.execute("PRAGMA user_version").fetchone()[0]
    targets = []
    for size in sizes:
        target = (keep or folder) / ("rows-%d-schema-%d" % (size, version))
        if not target.exists():
            # Under its name only when it is complete.
            with tempfile.TemporaryDirectory(dir=str(target.parent)) as part:
                path = Path(part) / "built" / "bridge.db"
                path.parent.mkdir()
                shutil.copyfile(new, path)
                fill(path, size, secrets)
                path.parent.rename(target)
            said("%d rows: built after %.0f s" % (size, time.monotonic() - start))
        targets.append(target)
    return targets


def said(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


# --- a bridge with a history ---


class Site(NamedTuple):
    """A module with a database. folder: the home of its bridge.  rows: the size of the history."""

    module: Path
    folder: Path
    rows: int
    facts: Facts

    @property
    def database(self) -> Path:
        """The file of the database."""
        return self.folder / "data" / "bridge.db"

    @contextlib.contextmanager
    def running(self, *options: str) -> Iterator[common.Served]:
        """Run the bridge; yield it with the admin token."""
        claude = ("--claude", str(self.folder / "claude" / "claude"))
        environ = common.environment()
        with common.bridge(
            self.folder, environ, *claude, *FOREVER, *options, module=self.module
        ) as at:
            yield at._replace(token=self.facts.secrets["admin"])

    def read(self, sql: str, *values: Any) -> Any:
        """Return the first value of a statement."""
        url = "file:%s?mode=ro" % self.database
        with contextlib.closing(sqlite3.connect(url, uri=True, timeout=30)) as db:
            row = db.execute(sql, values).fetchone()
        return row and row[0]


def new_site(folder: Path, module: Path, built_in: Path, rows: int) -> Site:
    """Copy a database, and write a fake CLI."""
    (folder / "data").mkdir(parents=True, mode=0o700)
    common.paced_claude(folder / "claude")
    shutil.copyfile(built_in / "bridge.db", folder / "data" / "bridge.db")
    facts = Facts(**json.loads((built_in / "facts.json").read_text()))
    return Site(module, folder, rows, facts)


class Client:
    """A connection to the bridge that stays open."""

    def __init__(self, at: common.Served, facts: Facts) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", at.port, timeout=120)
        self._secrets = {**facts.secrets, "writer": facts.secrets["user"]}
        self._writer_id = ""
        self.facts = facts
        self.failures = 0

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def send(
        self,
        method: str,
        path: str,
        token: str = "",
        body: Optional[Row] = None,
        is_json: bool = False,
    ) -> Any:
        """Send a request; return (seconds, the body, which is parsed if `is_json`)."""
        headers = {"Authorization": "Bearer " + self._secrets[token]} if token else {}
        data = None if body is None else json.dumps(body)
        start = time.perf_counter()
        self._connection.request(method, path, data, headers)
        response = self._connection.getresponse()
        content = response.read()
        seconds = time.perf_counter() - start
        if response.status >= 300:
            self.failures += 1
            if self.failures == 1:
                said("%s %s: %d %r" % (method, path, response.status, content[:300]))
        return seconds, json.loads(content) if is_json else content

    def renew_writer(self) -> None:
        """Replace the token that writes; its requests are deleted, so that no history grows."""
        if self._writer_id:
            self.send("DELETE", "/api/tokens/" + self._writer_id, "admin")
        body = {"name": "writer"}
        _, answer = self.send("POST", "/api/tokens", "admin", body, is_json=True)
        self._secrets["writer"], self._writer_id = answer["token"], answer["tokenId"]

    def write(self) -> Dict[str, float]:
        """Submit a request and cancel it; return the seconds of both."""
        message = {"message": "hello"}
        submit, answer = self.send("POST", "/api/ask", "writer", message, is_json=True)
        path = "/api/ask/" + answer.get("requestId", "none")
        cancel, _ = self.send("DELETE", path, "writer")
        return {"submit": submit, "cancel": cancel}


# --- the probes ---


class Probe(NamedTuple):
    """A request. path: with {request}, {waiting} or {middle}.  token: its name."""

    path: str
    token: str = ""


PROBES = {
    "status": Probe("/api/status"),
    "status admin": Probe("/api/status", "admin"),
    "health": Probe("/health"),
    "metrics": Probe("/metrics", "admin"),
    "poll": Probe("/api/ask/{request}", "user"),
    "poll queued": Probe("/api/ask/{waiting}", "user"),
    "requests": Probe("/api/requests", "user"),
    "requests limit": Probe("/api/requests?limit=100", "user"),
    "requests error": Probe("/api/requests?status=error", "user"),
    "requests completed": Probe("/api/requests?status=completed", "user"),
    "requests both": Probe("/api/requests?status=completed,error", "user"),
    "requests unfinished": Probe("/api/requests?limit=100&status=queued,processing", "user"),
    "requests middle": Probe("/api/requests?before={middle}", "user"),
    "requests error middle": Probe("/api/requests?status=error&before={middle}", "user"),
    "conversations": Probe("/api/conversations", "memory"),
    "usage": Probe("/api/usage", "user"),
    "usage 400 days": Probe("/api/usage?days=400", "user"),
    "models": Probe("/v1/models", "user"),
}
# The same lists of all tokens.
PROBES.update(
    {
        name + " admin": one._replace(token="admin")
        for name, one in PROBES.items()
        if name.startswith(("requests", "usage"))
    }
)
PARTS = [*PROBES, "claim", "start", "delays"]

# Part -> site -> its rounds.
Samples = Dict[str, List[List[List[float]]]]


def probe(client: Client, name: str) -> float:
    """Send the request of a probe; return the seconds."""
    facts, (path, token) = client.facts, PROBES[name]
    job = random.choice(facts.requests)
    path = path.format(request=job, waiting=facts.waiting, middle=facts.middle)
    return float(client.send("GET", path, token)[0])


def in_turn(
    samples: Samples, name: str, sites: int, count: int, measure: Callable[[int], float]
) -> None:
    """Measure a part of a round at all sites in turn."""
    rounds: List[List[float]] = [[] for _ in range(sites)]
    deadline = time.monotonic() + PART_SECONDS
    for number in range(count):
        if number >= LEAST_SAMPLES and time.monotonic() > deadline:
            break
        for site in range(sites) if number % 2 else reversed(range(sites)):
            rounds[site].append(measure(site))
    for by_site, new in zip(samples.setdefault(name, [[] for _ in range(sites)]), rounds):
        by_site.append(new)


def probe_round(samples: Samples, clients: Sequence[Client], names: Sequence[str]) -> None:
    """Measure all probes, each after a write."""
    writes: Dict[str, List[List[float]]] = {
        name: [[] for _ in clients] for name in ("submit", "cancel")
    }

    def measure(site: int) -> float:
        for name, seconds in clients[site].write().items():
            writes[name][site].append(seconds)
        return probe(clients[site], chosen)

    for chosen in names:
        for client in clients:
            client.renew_writer()
        in_turn(samples, chosen, len(clients), SAMPLES, measure)
        if any(client.failures for client in clients):
            raise SystemExit("there were failed requests")
    for name, by_site in writes.items():
        for rounds, new in zip(samples.setdefault(name, [[] for _ in clients]), by_site):
            rounds.append(new)


def claim(at: common.Served, secret: str) -> float:
    """Send a message to a conversation; return the seconds to its event `started`."""
    body = {"message": "hello", "conversation": "bench", "stream": True}
    user = at._replace(token=secret)
    with common.open_request(user, "POST", "/api/ask", body) as (start, response):
        for line in response:
            if line == b"event: started\n":
                seconds = time.perf_counter() - start
            if line == b"event: completed\n":
                return seconds
    raise SystemExit("the stream ended without an answer (status %d)" % response.status)


def wait_until(is_true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait for a fact."""
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            raise SystemExit("%s did not come within %g s" % (what, seconds))
        time.sleep(0.05)


def timed_start(site: Site) -> float:
    """Return the seconds from spawn to listening."""
    start = time.perf_counter()
    with site.running("--spare", "0"):
        return time.perf_counter() - start


def measure_probes(sites: Sequence[Site], rounds: int, parts: Sequence[str]) -> Dict[str, Any]:
    """Run all bridges; return the samples, and the seconds of the first starts."""
    names = [name for name in PROBES if name in parts]
    samples: Samples = {}
    first_starts = []
    with contextlib.ExitStack() as stack:
        served, clients = [], []
        for site in sites:
            start = time.perf_counter()
            served.append(stack.enter_context(site.running()))
            first_starts.append(time.perf_counter() - start)
            client = Client(served[-1], site.facts)
            clients.append(client)
            stack.callback(client.close)
        for site, client in zip(sites, clients):
            path = "/api/ask/" + site.facts.busy

            def is_busy(client: Client = client, path: str = path) -> bool:
                job = client.send("GET", path, "user", is_json=True)[1]
                return bool(job["status"] == "processing")

            wait_until(is_busy, "the first run")
            stats = client.send("GET", "/api/status", is_json=True)[1]["stats"]
            if stats["totalRequests"] != site.rows + 5:
                raise SystemExit("the bridge counts %s, not %d" % (stats, site.rows + 5))
            client.renew_writer()
            for name in names:
                client.write()
                probe(client, name)
        for number in range(1, rounds * bool(names) + 1):
            probe_round(samples, clients, names)
            said("probes, round %d: done" % number)
        for at, site, client in zip(served, sites, clients):
            client.send("DELETE", "/api/ask/" + site.facts.busy, "user")
            claim(at, site.facts.secrets["memory"])
        for _ in range(rounds * ("claim" in parts)):
            secrets = [site.facts.secrets["memory"] for site in sites]
            in_turn(samples, "claim", len(sites), CLAIMS, lambda n: claim(served[n], secrets[n]))
    for _ in range(rounds * ("start" in parts)):
        in_turn(samples, "start", len(sites), STARTS, lambda n: timed_start(sites[n]))
    said("claims and starts: done")
    return {"samples": samples, "first_starts": first_starts}


# --- the delays ---


class Delays(NamedTuple):
    """The longest request of each kind in milliseconds. seconds: how long the load ran."""

    seconds: float
    poll: float
    submit: float
    cancel: float
    requests: int
    failed: int

    @property
    def longest(self) -> float:
        """The longest of all."""
        return max(self.poll, self.submit, self.cancel)


def load(at: common.Served, facts: Facts, until: Callable[[float], bool]) -> Delays:
    """Let a client poll and another submit and cancel. until: by the seconds so far."""
    times: Dict[str, List[float]] = {"poll": [], "submit": [], "cancel": []}
    is_over = threading.Event()
    clients = [Client(at, facts), Client(at, facts)]
    # The purge does not delete these.
    newest = facts.requests[: len(facts.requests) // 4]

    def poll() -> None:
        seconds, _ = clients[0].send("GET", "/api/ask/" + random.choice(newest), "user")
        times["poll"].append(seconds)

    def write() -> None:
        for kind, seconds in clients[1].write().items():
            times[kind].append(seconds)

    def repeat(step: Callable[[], None]) -> None:
        while not is_over.wait(PAUSE_SECONDS):
            step()

    threads = [
        threading.Thread(target=repeat, args=(step,), name="client") for step in (poll, write)
    ]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        while not until(time.monotonic() - start) and all(map(threading.Thread.is_alive, threads)):
            time.sleep(0.1)
        seconds = time.monotonic() - start
        if not all(map(threading.Thread.is_alive, threads)):
            raise SystemExit("a client of the load broke off")
    finally:
        is_over.set()
        for thread in threads:
            thread.join(130)
        for client in clients:
            client.close()
    longest = {kind: 1000 * max(values, default=0.0) for kind, values in times.items()}
    failed = sum(client.failures for client in clients)
    return Delays(seconds, requests=sum(map(len, times.values())), failed=failed, **longest)


def begin_run(site: Site) -> None:
    """Let the bridge begin a run without end, which each later start continues."""
    facts = site.facts
    with site.running("--spare", "0") as at:
        user = at._replace(token=facts.secrets["user"])
        path = "/api/ask/" + facts.busy
        # The probes have cancelled the first one.
        if "errorCode" in common.call(user, "GET", path):
            job = common.call(user, "POST", "/api/ask", {"message": "busy"})["requestId"]
            path = "/api/ask/" + job
        wait_until(
            lambda: bool(common.call(user, "GET", path)["status"] == "processing"), "the run"
        )


class Purge:
    """Watches the requests that a bridge deletes. days: the --keep-days of that bridge."""

    OLD = "status IN ('completed', 'error') AND conversation IS NULL AND completed_at < ?"

    def __init__(self, site: Site) -> None:
        self._site = site
        now = time.time()
        completed_at = site.read(
            "SELECT completed_at FROM jobs WHERE status IN ('completed', 'error')"
            " AND conversation IS NULL ORDER BY completed_at LIMIT 1 OFFSET ?",
            site.rows // 2,
        )
        self.days = max(1, int((now - completed_at) // DAY) + 1)
        self._before = now - self.days * DAY
        self.count = site.read("SELECT count(*) FROM jobs WHERE " + self.OLD, self._before)
        sql = "SELECT id FROM jobs WHERE %s ORDER BY %%s LIMIT 1" % self.OLD
        orders = ("seq", "seq DESC", *["random()"] * 5)
        # To count all of them takes long.
        self._some = [site.read(sql % order, self._before) for order in orders]
        self._free_pages = -STILL_PAGES
        self._still_since = 0.0
        self.most_seconds = PURGE_SECONDS + PURGE_ROW_SECONDS * self.count

    def is_over(self, seconds: float) -> bool:
        """Return whether all are deleted and no more pages are given back to the system."""
        if seconds > self.most_seconds:
            return True
        read = self._site.read
        if any(read("SELECT 1 FROM jobs WHERE id = ?", job_id) for job_id in self._some):
            return False
        pages = read("PRAGMA freelist_count")
        if abs(pages - self._free_pages) > STILL_PAGES:
            self._free_pages, self._still_since = pages, seconds
        if seconds - self._still_since < STILL_SECONDS:
            return False
        return bool(read("SELECT count(*) FROM jobs WHERE " + self.OLD, self._before) == 0)


def measure_delays(site: Site) -> Dict[str, Any]:
    """Measure the longest delays of a bridge with nothing to do and with much to delete."""
    facts = site.facts
    begin_run(site)
    # The system writes the copy of the database half a minute later, and a sync waits for that.
    os.sync()
    result: Dict[str, Any] = {}
    with site.running("--spare", "0") as at:
        result["nothing to delete"] = load(at, facts, lambda seconds: seconds > NOTHING_SECONDS)
        result["quiet"] = load(at, facts, lambda seconds: seconds > QUIET_SECONDS)
    purge = Purge(site)
    with site.running("--spare", "0", "--keep-days", str(purge.days)) as at:
        result["purge"] = load(at, facts, purge.is_over)
        if result["purge"].seconds > purge.most_seconds:
            os.kill(at.pid, signal.SIGKILL)
            raise SystemExit("the purge did not end within %g s" % purge.most_seconds)
        for name, user_name, path in (
            ("token deleted", "admin", "/api/tokens/" + facts.ids["heavy"]),
            ("conversation deleted", "memory", "/api/conversations/" + facts.conversation),
        ):
            result[name] = load_during(at, facts, user_name, path)
    return {"deleted": purge.count, **result}


def load_during(at: common.Served, facts: Facts, token: str, path: str) -> Delays:
    """Measure the delays while a thing is deleted, and for five seconds afterwards."""
    ended_at: List[float] = []

    def delete(seconds: float) -> bool:
        if not ended_at and seconds > 1:
            common.call(at._replace(token=facts.secrets[token]), "DELETE", path)
            ended_at.append(time.monotonic())
        return bool(ended_at) and time.monotonic() > ended_at[0] + 5

    return load(at, facts, delete)


# --- the results ---


def median_ms(rounds: Sequence[Sequence[float]]) -> float:
    """Return the median of all samples."""
    return 1000 * statistics.median(seconds for one in rounds for seconds in one)


def p99_ms(rounds: Sequence[Sequence[float]]) -> float:
    """Return the lower quartile of the p99 of the rounds."""
    all_p99 = sorted(common.percentile(sorted(one), 0.99) for one in rounds)
    return 1000 * all_p99[len(all_p99) // 4]


def probe_rows(samples: Samples, small: int, large: int) -> List[Dict[str, Any]]:
    """Return the figures of a module. small, large: the numbers of its sites."""
    rows = []
    for name, by_site in samples.items():
        both = by_site[small], by_site[large]
        base_ms, rows_ms = map(median_ms, both)
        base_p99, rows_p99 = map(p99_ms, both)
        row: Dict[str, Any] = {
            "part": name,
            "samples": sum(map(len, both[1])),
            "base_ms": base_ms,
            "rows_ms": rows_ms,
            "ratio": rows_ms / base_ms,
            "base_p99_ms": base_p99,
            "rows_p99_ms": rows_p99,
            "p99_ratio": rows_p99 / base_p99,
        }
        row["is_met"] = max(row["ratio"], row["p99_ratio"]) <= MOST_RATIO
        rows.append(row)
    return rows


def measure(
    modules: Dict[str, Path], options: argparse.Namespace, folder: Path
) -> Dict[str, Dict[str, Any]]:
    """Return the name of a module -> its figures."""
    sizes = (options.base, options.rows)
    builder = modules.get("baseline", modules["bridge"])
    built_in = built(folder, builder, sizes, options.keep)
    sites = [
        new_site(folder / ("%s-%d" % (name, size)), module, path, size)
        for name, module in modules.items()
        for size, path in zip(sizes, built_in)
    ]
    results: Dict[str, Dict[str, Any]] = {name: {} for name in modules}
    if options.only != ["delays"]:
        figures = measure_probes(sites, options.rounds, options.only)
        for number, result in enumerate(results.values()):
            small, large = 2 * number, 2 * number + 1
            result["probes"] = probe_rows(figures["samples"], small, large)
            result["first_start_seconds"] = figures["first_starts"][large]
    if "delays" in options.only:
        for number, (name, result) in enumerate(results.items()):
            result["delays"] = measure_delays(sites[2 * number + 1])
            said("delays, %s: done" % name)
    return results


def table(name: str, result: Dict[str, Any], sizes: Sequence[int]) -> str:
    """Return the figures of a module as text."""
    lines = []
    if "probes" in result:
        head = (name, "samples", "median", "ms", "ratio", "p99", "ms", "ratio")
        lines.append("%-32s %7s %9s %8s %7s %9s %8s %7s" % head)
        columns = ("rows: %d and %d" % tuple(sizes), "", *["small", "large", ""] * 2)
        lines.append("%-32s %7s %9s %8s %7s %9s %8s %7s" % columns)
        form = (
            "%(part)-32s %(samples)7d %(base_ms)9.2f %(rows_ms)8.2f %(ratio)7.2f"
            " %(base_p99_ms)9.2f %(rows_p99_ms)8.2f %(p99_ratio)7.2f "
        )
        for row in result["probes"]:
            lines.append(form % row + ("met" if row["is_met"] else "MISSED"))
        lines.append("first start, perhaps a migration: %.2f s" % result["first_start_seconds"])
        missed = [row["part"] for row in result["probes"] if not row["is_met"]]
        lines.append(common.judged("parts with a ratio above %g" % MOST_RATIO, len(missed), 0))
    delays = dict(result.get("delays", {}))
    deleted = delays.pop("deleted", 0)
    if delays:
        names = ("longest request, ms", "poll", "submit", "cancel", "requests", "failed", "seconds")
        lines += ["", "%-32s %8s %8s %8s %9s %7s %8s" % names]
        for part, one in delays.items():
            lines.append(
                "%-32s %8.1f %8.1f %8.1f %9d %7d %8.1f"
                % (part, one.poll, one.submit, one.cancel, one.requests, one.failed, one.seconds)
            )
        lines.append("the purge deleted %d requests" % deleted)
        failed = sum(one.failed for one in delays.values())
        lines.append(common.judged("failed requests", failed, 0))
        quiet = delays.pop("quiet").longest
        for part, one in delays.items():
            lines.append(
                common.judged("%s: ms above the quiet" % part, one.longest - quiet, MOST_DELAY_MS)
            )
    return "\n".join(lines)


def as_json(results: Dict[str, Dict[str, Any]]) -> Dict[str, Any]:
    """Return the figures with names for all of them."""
    for result in results.values():
        for name, value in result.get("delays", {}).items():
            if isinstance(value, Delays):
                result["delays"][name] = value._asdict()
    return results


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Build the databases, measure all parts, print tables or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000, help="finished requests (default: 1000000)")
    add("--base", type=int, default=2_000, help="those of the small history (default: 2000)")
    add("--rounds", type=int, default=5,
        help="rounds (default: 5; with less than 4 a p99 is chance)")
    add("--only", default=",".join(PARTS), help="some of the parts, which are %(default)s")
    add("--keep", type=Path, help="a folder that keeps the databases for the next run")
    add("--module", type=Path, default=common.MODULE, help="the file of the bridge")
    add("--baseline", type=Path, help="another claude_api_bridge.py to compare with")
    add("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if sys.platform != "linux":
        print("error: this needs Linux", file=sys.stderr)
        return 2
    options.rows, options.rounds = max(options.base, options.rows), max(1, options.rounds)
    options.only = options.only.split(",")
    if not set(options.only) <= set(PARTS):
        parser.error("--only takes some of " + ",".join(PARTS))
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    modules = {"bridge": options.module.absolute()}
    if options.baseline:
        modules["baseline"] = options.baseline.absolute()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        results = measure(modules, options, Path(folder))
    if options.json:
        sizes_and_rounds = {"base": options.base, "rows": options.rows, "rounds": options.rounds}
        print(json.dumps({**sizes_and_rounds, "modules": as_json(results)}))
    else:
        sizes = (options.base, options.rows)
        print("\n\n".join(table(name, result, sizes) for name, result in results.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
