"""Measure requests a second and response times of the bridge and of a naive server.

    python tests/bench/bench_http.py [--seconds 0.8] [--rounds 5] [--clients 1,16,64,256]
                                     [--only poll,status,submit,limited] [--fsync-ms 2]
                                     [--baseline PATH] [--json]

All servers run as programs of their own and take turns within a round. The figures are medians of
the rounds; a ratio is the median of the ratios in the rounds. Each server has 1,000 finished
requests of 1,000 characters. The naive server is what a first version looks like:
ThreadingHTTPServer without changes (HTTP/1.0, its parser, its backlog of 5), one open SQLite
connection under a lock, a read of token and row at each request, a commit at each insert.
`--baseline` adds another copy of the module.

The load comes from one process with so many clients, each with one request at a time. Connections
are persistent (`kept`; the naive server closes them, and its clients connect again), or each
request has its own (`each`). The time of a request includes its connection, if it needs one.
Responses with a wrong status or body, and broken connections, count as bad; the exit status is 1
if there are any.

The bridge has no limit on requests (--rate-limit 0); in the row `limited` it has a limit that the
load does not reach. Submits are durable on both sides (synchronous=FULL). A small library, built
with `cc` and loaded before the C library, makes each fsync take `--fsync-ms`; without a compiler
this part is left out. Meanwhile the worker is busy with a long run, and a trigger removes submitted
requests from the queue, which would be full after 50. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import selectors
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence

from common import MODULE, Served, bridge, call, environment, judged, paced_claude, percentile

SLOW_FSYNC = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <unistd.h>
#include <sys/syscall.h>
static int slow(int failed) { usleep(atoi(getenv("FSYNC_US"))); return failed; }
int fsync(int fd) { return slow(syscall(SYS_fsync, fd)); }
int fdatasync(int fd) { return slow(syscall(SYS_fdatasync, fd)); }
"""
ROWS = 1000
COPIES = """
INSERT INTO jobs (id, token_id, status, message, created_at, completed_at, response)
WITH RECURSIVE n(x) AS (SELECT 2 UNION ALL SELECT x + 1 FROM n WHERE x < %d)
SELECT 'copy-' || x, token_id, status, message, created_at, completed_at, response
FROM jobs, n WHERE id = '%s'"""
AT_ONCE = """
CREATE TRIGGER at_once AFTER INSERT ON jobs BEGIN
    UPDATE jobs SET status = 'completed', completed_at = created_at WHERE seq = NEW.seq;
END"""
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
# Longest time in which no client receives a response.
NO_RESPONSE_SECONDS = 10.0


# --- the naive server ---


def serve_naive(folder: str) -> None:
    """Run the naive server; print its port."""

    def digest(secret: str) -> str:
        return hashlib.sha256(secret.encode()).hexdigest()

    db = sqlite3.connect(
        os.path.join(folder, "naive.db"), check_same_thread=False, isolation_level=None
    )
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE tokens (digest TEXT PRIMARY KEY, name TEXT)")
    db.execute(
        "CREATE TABLE jobs (id TEXT PRIMARY KEY, message TEXT, response TEXT, status TEXT,"
        " created_at REAL)"
    )
    db.execute("INSERT INTO tokens VALUES (?, 'app')", (digest("secret"),))
    db.execute("BEGIN")
    db.executemany(
        "INSERT INTO jobs VALUES (?, 'hi', ?, 'completed', 1)",
        (("job-%d" % n, "x" * 1000) for n in range(ROWS)),
    )
    db.execute("COMMIT")
    lock = threading.Lock()

    class Naive(BaseHTTPRequestHandler):
        def check(self) -> None:
            secret = self.headers["Authorization"].split()[-1]
            query = "SELECT name FROM tokens WHERE digest = ?"
            assert db.execute(query, (digest(secret),)).fetchone()

        def do_GET(self) -> None:
            job = self.path.rpartition("/")[2]
            with lock:
                if self.path.endswith("status"):
                    rows = db.execute("SELECT status, count(*) FROM jobs GROUP BY status")
                    self.answer(200, {"queue": dict(rows.fetchall())})
                    return
                self.check()
                query = "SELECT response, status FROM jobs WHERE id = ?"
                row = db.execute(query, (job,)).fetchone()
            self.answer(200, {"response": row[0], "status": row[1]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            job = os.urandom(16).hex()
            row = (job, body["message"], time.time())
            with lock:
                self.check()
                db.execute("INSERT INTO jobs VALUES (?, ?, NULL, 'queued', ?)", row)
            self.answer(202, {"requestId": job, "status": "queued"})

        def answer(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Naive)
    print(server.server_port, flush=True)
    server.serve_forever()


@contextlib.contextmanager
def naive(folder: Path, environ: Dict[str, str]) -> Iterator["Target"]:
    """Run the naive server as a program of its own."""
    with subprocess.Popen(
        [sys.executable, __file__, "--naive", str(folder)],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        try:
            assert child.stdout
            yield Target(Served(child.pid, int(child.stdout.readline()), "secret"), "job-1")
        finally:
            child.kill()


# --- the load ---


class Load(NamedTuple):
    """The figures of a load.

    per_second: good responses.  p50, p99: milliseconds of a response.  bad: wrong responses and
    broken connections.  cpu: of this process, as a share of a core.
    """

    per_second: float
    p50: float
    p99: float
    bad: int
    cpu: float


class Client:
    """A connection, and the data that it received. at: the start of its request."""

    __slots__ = ("connection", "at", "data")

    def __init__(self, port: int) -> None:
        self.connection = socket.socket()
        # If the backlog is full, a connect takes seconds; only this client waits.
        self.connection.setblocking(False)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection.connect_ex(("127.0.0.1", port))
        self.at, self.data = time.perf_counter(), b""


def load(
    port: int, request: bytes, status: bytes, content: bytes, clients: int, seconds: float
) -> Load:
    """Run so many clients. status, content: of a good response; its body contains `content`."""
    times: List[float] = []
    bad, cpu = 0, time.process_time()
    with selectors.DefaultSelector() as selector:

        def connect() -> None:
            client = Client(port)
            selector.register(client.connection, selectors.EVENT_WRITE, client)

        def end(client: Client) -> None:
            selector.unregister(client.connection)
            client.connection.close()

        for _ in range(clients):
            connect()
        start = answered = time.perf_counter()
        while answered - start < seconds:
            chosen = selector.select(NO_RESPONSE_SECONDS)
            if not chosen:
                raise SystemExit("no response within %g s" % NO_RESPONSE_SECONDS)
            for key, ready in chosen:
                client: Client = key.data
                try:
                    if ready & selectors.EVENT_WRITE:
                        client.connection.send(request)
                        selector.modify(client.connection, selectors.EVENT_READ, client)
                        continue
                    data = client.connection.recv(1 << 16)
                except ConnectionError:
                    data = b""
                client.data += data
                head, _, body = client.data.partition(b"\r\n\r\n")
                length = LENGTH.search(head + b"\r\n")
                if data and (not length or len(body) < int(length.group(1))):
                    continue
                answered = time.perf_counter()
                if data and head[9:12] == status and content in body:
                    times.append(answered - client.at)
                else:
                    bad += 1
                if data and b"\nConnection: keep-alive" in head:
                    client.connection.send(request)
                    client.at, client.data = answered, b""
                else:
                    end(client)
                    connect()
        for key in list(selector.get_map().values()):
            end(key.data)
    total = answered - start
    times.sort()
    times = times or [float("inf")]
    return Load(
        per_second=len(times) / total,
        p50=percentile(times, 0.5) * 1000,
        p99=percentile(times, 0.99) * 1000,
        bad=bad,
        cpu=(time.process_time() - cpu) / total,
    )


# --- the measurements ---


class Target(NamedTuple):
    """A server. job: a finished request with a response of 1,000 characters."""

    at: Served
    job: str

    def request(self, kind: str, is_kept: bool) -> bytes:
        """Return a request with the headers that Python's `requests` sends."""
        body = json.dumps({"message": "How are you?"}).encode() if kind == "submit" else b""
        lines = {
            "poll": "GET /api/ask/%s HTTP/1.1" % self.job,
            "status": "GET /api/status HTTP/1.1",
            "submit": "POST /api/ask HTTP/1.1",
        }
        head = [
            lines[kind],
            "Host: localhost",
            "User-Agent: python-requests/2.32",
            "Accept-Encoding: gzip, deflate",
            "Accept: */*",
            "Connection: " + ("keep-alive" if is_kept else "close"),
        ]
        if kind != "status":
            head.append("Authorization: Bearer " + self.at.token)
        if body:
            head += ["Content-Type: application/json", "Content-Length: %d" % len(body)]
        return "\r\n".join([*head, "", ""]).encode() + body


# Kind of request -> (status, a part of the body).
GOOD_RESPONSES = {
    "poll": (b"200", b"x" * 1000),
    "status": (b"200", b'"queue"'),
    "submit": (b"202", b'"requestId"'),
}


class Case(NamedTuple):
    """A load: the kind of the requests, the number of clients, and their kind of connection."""

    kind: str
    clients: int
    is_kept: bool

    @property
    def title(self) -> str:
        """The number of clients and the kind of connection."""
        return "%d, %s" % (self.clients, "kept" if self.is_kept else "each")

    def run(self, target: Target, seconds: float) -> Load:
        """Run the load against a server."""
        status, content = GOOD_RESPONSES[self.kind]
        request = target.request(self.kind, self.is_kept)
        return load(target.at.port, request, status, content, self.clients, seconds)


class Part(NamedTuple):
    """Cases for the same servers. rate_limit: of the bridges."""

    name: str
    cases: Sequence[Case]
    rate_limit: int = 0


@contextlib.contextmanager
def filled(folder: Path, environ: Dict[str, str], module: Path, part: Part) -> Iterator[Target]:
    """Run a bridge with as many finished requests as the naive server."""
    options = ("--claude", paced_claude(folder / "claude"), "--rate-limit", str(part.rate_limit))
    with bridge(folder, environ, *options, module=module) as at:
        fields = {"message": "say " + "x" * 1000, "wait": 60}
        job = call(at, "POST", "/api/ask", fields)["requestId"]
        path = str(folder / "data" / "bridge.db")
        with contextlib.closing(sqlite3.connect(path, timeout=30)) as db:
            db.execute(COPIES % (ROWS, job))
            db.commit()
            if part.name == "submit":
                busy = call(at, "POST", "/api/ask", {"message": "busy"})["requestId"]
                while call(at, "GET", "/api/ask/" + busy)["status"] != "processing":
                    time.sleep(0.01)
                db.execute(AT_ONCE)
        yield Target(at, job)


def measure(
    parts: Sequence[Part],
    rounds: int,
    seconds: float,
    modules: Dict[str, Path],
    slow: Dict[str, str],
    folder: Path,
) -> Dict[str, Dict[str, List[Load]]]:
    """Return the name of a case -> server -> its rounds."""
    results: Dict[str, Dict[str, List[Load]]] = {}
    for part in parts:
        environ = {**environment(), **(slow if part.name == "submit" else {})}
        with contextlib.ExitStack() as stack:
            (folder / part.name).mkdir()
            targets = {"naive": stack.enter_context(naive(folder / part.name, environ))}
            for name, module in modules.items():
                targets[name] = stack.enter_context(
                    filled(folder / part.name / name, environ, module, part)
                )
            for _ in range(rounds):
                for case in part.cases:
                    by_server = results.setdefault("%s, %s" % (part.name, case.title), {})
                    for name, target in targets.items():
                        by_server.setdefault(name, []).append(case.run(target, seconds))
    return results


def slow_fsync(folder: Path, milliseconds: float) -> Dict[str, str]:
    """Return the environment that makes each fsync take so long; empty without a compiler."""
    compiler = shutil.which("cc")
    if not compiler:
        return {}
    (folder / "slow.c").write_text(SLOW_FSYNC)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(folder / "slow.so"), str(folder / "slow.c")],
        check=True,
    )
    return {"LD_PRELOAD": str(folder / "slow.so"), "FSYNC_US": str(int(milliseconds * 1000))}


Results = Dict[str, Dict[str, List[Load]]]
# Case -> least ratio of the bridge to the naive server.
TARGETS = {"poll, 16, kept": 5, "poll, 16, each": 1, "submit, 16, kept": 4}
TARGET_P99 = ("poll, 64, kept", 60)


def ratio(by_server: Dict[str, List[Load]], name: str, to: str = "naive") -> float:
    """Return the median ratio of the responses a second."""
    pairs = zip(by_server[name], by_server[to])
    return statistics.median(load.per_second / other.per_second for load, other in pairs)


def middle(loads: Sequence[Load]) -> Load:
    """Return the medians of the rounds, and the sum of the bad responses."""
    columns: Any = [statistics.median(column) for column in zip(*loads)]
    return Load(*columns)._replace(bad=sum(load.bad for load in loads))


def table(results: Results, names: Sequence[str]) -> str:
    """Return the figures as text."""
    head = "%-22s" % "" + "".join("%24s" % name for name in names) + "   to naive"
    columns = "%8s %7s %7s" % ("/s", "p50 ms", "p99 ms")
    if "baseline" in names:
        head += "  to baseline"
    lines = [head, "%-22s" % "clients, connections" + columns * len(names)]
    for case, by_server in results.items():
        cells = ["%8.0f %7.1f %7.1f" % middle(by_server[name])[:3] for name in names]
        cells.append("%10.1f x" % ratio(by_server, "bridge"))
        if "baseline" in names:
            cells.append("%12.2f x" % ratio(by_server, "bridge", "baseline"))
        lines.append("%-22s" % case + "".join(cells))
    lines.append("")
    for case, least in TARGETS.items():
        if case in results:
            lines.append(judged(case + ": ratio", ratio(results[case], "bridge"), least, True))
    case, most = TARGET_P99
    if case in results:
        lines.append(judged(case + ": p99 ms", middle(results[case]["bridge"]).p99, most))
    return "\n".join(lines)


def as_json(results: Results) -> Dict[str, Any]:
    """Return case -> server -> figures, with the ratios of the bridge to the other servers."""
    figures: Dict[str, Any] = {}
    for case, by_server in results.items():
        others = [name for name in by_server if name != "bridge"]
        figures[case] = {name: middle(loads)._asdict() for name, loads in by_server.items()}
        figures[case]["ratios"] = {
            "to_" + name: ratio(by_server, "bridge", name) for name in others
        }
    return figures


def listed(words: str) -> List[str]:
    """Parse words with commas between them."""
    return [word for word in words.split(",") if word]


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.8,
        help="seconds for each case and server in a round (default: 0.8)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument(
        "--clients",
        type=listed,
        default=["1", "16", "64", "256"],
        help="clients at once (default: 1,16,64,256; submits: only 16,64 of them)",
    )
    parser.add_argument(
        "--only",
        type=listed,
        default=["poll", "limited", "status", "submit"],
        help="kinds of requests (default: poll,limited,status,submit)",
    )
    parser.add_argument(
        "--fsync-ms", type=float, default=2, help="time of an fsync in submits (default: 2)"
    )
    parser.add_argument(
        "--baseline", type=Path, help="another claude_api_bridge.py to compare with"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--naive", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.naive:
        serve_naive(options.naive)

    def cases(kind: str, most: int = 256, least: int = 1) -> List[Case]:
        chosen = [clients for clients in map(int, options.clients) if least <= clients <= most]
        return [Case(kind, clients, is_kept) for is_kept in (True, False) for clients in chosen]

    parts = [
        Part("poll", cases("poll")),
        Part("limited", cases("poll", 16, 16), 1_000_000),
        Part("status", cases("status")),
        Part("submit", cases("submit", 64, 16)),
    ]
    modules = {"bridge": MODULE}
    if options.baseline:
        modules["baseline"] = options.baseline.absolute()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        slow = slow_fsync(Path(folder), options.fsync_ms)
        if not slow:
            print("submits are left out: there is no C compiler", file=sys.stderr)
        chosen = [
            part for part in parts if part.name in options.only and (slow or part.name != "submit")
        ]
        rounds = max(1, options.rounds)
        results = measure(chosen, rounds, options.seconds, modules, slow, Path(folder))
    if options.json:
        print(json.dumps(as_json(results)))
    else:
        print(table(results, ["naive", *modules]))
        times = (options.rounds, options.seconds, time.monotonic() - start, os.getloadavg()[0])
        print("%d rounds of %g s, %.0f s in total; load average %.2f" % times)
    status = 0
    for case, by_server in results.items():
        for name, loads in by_server.items():
            bad = middle(loads).bad
            if bad:
                print("%s: %d bad responses from %s" % (case, bad, name), file=sys.stderr)
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
