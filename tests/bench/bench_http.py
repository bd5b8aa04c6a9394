"""Requests a second and their tails: poll, status and submit against a naive server of the standard library.

    python tests/bench/bench_http.py [--seconds 0.8] [--rounds 5] [--clients 1,16,64,256] [--only poll,status,submit,limited]
                                     [--fsync-ms 2] [--baseline PATH] [--json]

All servers run as programs of their own and take turns within each round; the figures are medians over the rounds, a ratio is
the median of the rounds' ratios. Each has 1,000 finished requests of 1,000 characters. The naive server is what a first
version looks like: ThreadingHTTPServer as it is (HTTP/1.0, its parser, its backlog of 5), one open SQLite connection under a
lock, token and row read at each request, a commit at each insert. `--baseline` adds another copy of the module.

The load comes from one process with so many clients, each with one request at a time: `kept` connections stay (the naive
server closes each; its clients connect again), or there is one for `each` request. A time begins with the connecting where
there is one. Answers with a wrong status or body, and broken connections, are counted as bad; any makes the exit status 1.

The bridge has no limit on requests (--rate-limit 0); the row `limited` is with one that is not reached. Submits are durable on
both sides (synchronous=FULL), and a small library, built with `cc` and put before the C library's, makes each fsync last
`--fsync-ms`; without a compiler this part is left out. The worker is busy with one long run meanwhile, and what is submitted
leaves the queue at once (by a trigger), as the queue would be full after 50. Linux.
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
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

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
SELECT 'copy-' || x, token_id, status, message, created_at, completed_at, response FROM jobs, n WHERE id = '%s'"""
AT_ONCE = """
CREATE TRIGGER at_once AFTER INSERT ON jobs BEGIN
    UPDATE jobs SET status = 'completed', completed_at = created_at WHERE seq = NEW.seq;
END"""
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
EVICTABLE_SEND_SECONDS = 10.0                                    # the longest that a server may leave all clients without an answer


# --- the naive server ---


def serve_naive(folder: str) -> None:
    """Prints its port."""
    def digest(secret: str) -> str:
        return hashlib.sha256(secret.encode()).hexdigest()

    db = sqlite3.connect(os.path.join(folder, "naive.db"), check_same_thread=False, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE tokens (digest TEXT PRIMARY KEY, name TEXT)")
    db.execute("CREATE TABLE jobs (id TEXT PRIMARY KEY, message TEXT, response TEXT, status TEXT, created_at REAL)")
    db.execute("INSERT INTO tokens VALUES (?, 'app')", (digest("secret"),))
    db.execute("BEGIN")
    db.executemany("INSERT INTO jobs VALUES (?, 'hi', ?, 'completed', 1)", (("job-%d" % n, "x" * 1000) for n in range(ROWS)))
    db.execute("COMMIT")
    lock = threading.Lock()

    class Naive(BaseHTTPRequestHandler):
        def check(self) -> None:
            secret = self.headers["Authorization"].split()[-1]
            assert db.execute("SELECT name FROM tokens WHERE digest = ?", (digest(secret),)).fetchone()

        def do_GET(self) -> None:
            with lock:
                if self.path.endswith("status"):
                    self.answer(200, {"queue": dict(db.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall())})
                    return
                self.check()
                row = db.execute("SELECT response, status FROM jobs WHERE id = ?", (self.path.rpartition("/")[2],)).fetchone()
            self.answer(200, {"response": row[0], "status": row[1]})

        def do_POST(self) -> None:
            message, job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["message"], os.urandom(16).hex()
            with lock:
                self.check()
                db.execute("INSERT INTO jobs VALUES (?, ?, NULL, 'queued', ?)", (job, message, time.time()))
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
    with subprocess.Popen([sys.executable, __file__, "--naive", str(folder)], env=environ, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        try:
            assert child.stdout
            yield Target(Served(child.pid, int(child.stdout.readline()), "secret"), "job-1")
        finally:
            child.kill()


# --- the load ---


class Load(NamedTuple):
    """per_second: good answers; p50, p99: milliseconds for one; bad: wrong answers and broken connections; cpu: what the load
    itself took, as a share of a core."""
    per_second: float
    p50: float
    p99: float
    bad: int
    cpu: float


class Client:
    """One connection and what came on it. at: when its request began."""
    __slots__ = ("connection", "at", "data")

    def __init__(self, port: int) -> None:
        self.connection = socket.socket()
        self.connection.setblocking(False)                     # with a full backlog a connect takes seconds, for this one alone
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection.connect_ex(("127.0.0.1", port))
        self.at, self.data = time.perf_counter(), b""


def load(port: int, request: bytes, status: bytes, wanted: bytes, clients: int, seconds: float) -> Load:
    """Keeps so many clients busy. status, wanted: how an answer begins, and what its body contains."""
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
        began = answered = time.perf_counter()
        while answered - began < seconds:
            chosen = selector.select(EVICTABLE_SEND_SECONDS)
            if not chosen:
                raise SystemExit("no answer within %g s" % EVICTABLE_SEND_SECONDS)
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
                if data and head[9:12] == status and wanted in body:
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
    spent = answered - began
    times.sort()
    times = times or [float("inf")]
    return Load(len(times) / spent, percentile(times, 0.5) * 1000, percentile(times, 0.99) * 1000, bad, (time.process_time() - cpu) / spent)


# --- what is measured ---


class Target(NamedTuple):
    """A server that has a finished request of 1,000 x, the job."""
    at: Served
    job: str

    def asked(self, kind: str, is_kept: bool) -> bytes:
        """The request, with the headers that a client of Python's `requests` sends."""
        body = json.dumps({"message": "How are you?"}).encode() if kind == "submit" else b""
        line = {"poll": "GET /api/ask/" + self.job, "status": "GET /api/status", "submit": "POST /api/ask"}[kind]
        head = [line + " HTTP/1.1", "Host: localhost", "User-Agent: python-requests/2.32", "Accept-Encoding: gzip, deflate", "Accept: */*",
                "Connection: " + ("keep-alive" if is_kept else "close")]
        if kind != "status":
            head.append("Authorization: Bearer " + self.at.token)
        if body:
            head += ["Content-Type: application/json", "Content-Length: %d" % len(body)]
        return "\r\n".join([*head, "", ""]).encode() + body


class Case(NamedTuple):
    kind: str
    clients: int
    is_kept: bool

    def run(self, target: Target, seconds: float) -> Load:
        status, wanted = {"poll": (b"200", b"x" * 1000), "status": (b"200", b'"queue"'), "submit": (b"202", b'"requestId"')}[self.kind]
        return load(target.at.port, target.asked(self.kind, self.is_kept), status, wanted, self.clients, seconds)


class Part(NamedTuple):
    """Cases that the same servers get. rate_limit: the bridges'."""
    name: str
    cases: Sequence[Case]
    rate_limit: int = 0


@contextlib.contextmanager
def filled(folder: Path, environ: Dict[str, str], module: Path, part: Part) -> Iterator[Target]:
    """A bridge with as many finished requests as the naive server."""
    claude = paced_claude(folder / "claude")
    with bridge(folder, environ, "--claude", claude, "--rate-limit", str(part.rate_limit), module=module) as at:
        job = call(at, "POST", "/api/ask", {"message": "say " + "x" * 1000, "wait": 60})["requestId"]
        with contextlib.closing(sqlite3.connect(str(folder / "data" / "bridge.db"), timeout=30)) as db:
            db.execute(COPIES % (ROWS, job))
            db.commit()
            if part.name == "submit":
                busy = call(at, "POST", "/api/ask", {"message": "busy"})["requestId"]
                while call(at, "GET", "/api/ask/" + busy)["status"] != "processing":
                    time.sleep(0.01)
                db.execute(AT_ONCE)
        yield Target(at, job)


def measure(parts: Sequence[Part], rounds: int, seconds: float, modules: Dict[str, Path], slow: Dict[str, str],
            folder: Path) -> Dict[str, Dict[str, List[Load]]]:
    """-> the name of a case -> server -> its rounds."""
    found: Dict[str, Dict[str, List[Load]]] = {}
    for part in parts:
        environ = {**environment(), **(slow if part.name == "submit" else {})}
        with contextlib.ExitStack() as stack:
            (folder / part.name).mkdir()
            targets = {"naive": stack.enter_context(naive(folder / part.name, environ))}
            for name, module in modules.items():
                targets[name] = stack.enter_context(filled(folder / part.name / name, environ, module, part))
            for _ in range(rounds):
                for case in part.cases:
                    of = found.setdefault("%s, %d, %s" % (part.name, case.clients, "kept" if case.is_kept else "each"), {})
                    for name, target in targets.items():
                        of.setdefault(name, []).append(case.run(target, seconds))
    return found


def slow_fsync(folder: Path, milliseconds: float) -> Dict[str, str]:
    """What makes each fsync of a program last so long; empty without a compiler."""
    compiler = shutil.which("cc")
    if not compiler:
        return {}
    (folder / "slow.c").write_text(SLOW_FSYNC)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / "slow.so"), str(folder / "slow.c")], check=True)
    return {"LD_PRELOAD": str(folder / "slow.so"), "FSYNC_US": str(int(milliseconds * 1000))}


def ratio(of: Dict[str, List[Load]], name: str, to: str = "naive") -> float:
    """How many times as many answers a second."""
    return statistics.median(own.per_second / other.per_second for own, other in zip(of[name], of[to]))


def middle(loads: Sequence[Load]) -> Load:
    """The medians of the rounds; of the bad ones the sum."""
    columns = [statistics.median(column) for column in zip(*loads)]
    return Load(*columns)._replace(bad=sum(each.bad for each in loads))  # type: ignore[arg-type]


def table(found: Dict[str, Dict[str, List[Load]]], names: Sequence[str]) -> str:
    lines = [("%-22s" % "" + "".join("%24s" % name for name in names) + "   to naive" + "  to baseline" * (len(names) - 2)).rstrip(),
             "%-22s" % "clients, connections" + "%8s %7s %7s" % ("/s", "p50 ms", "p99 ms") * len(names)]
    for case, of in found.items():
        cells = ["%8.0f %7.1f %7.1f" % middle(of[name])[:3] for name in names]
        ratios = "%10.1f x" % ratio(of, "bridge") + "".join("%12.2f x" % ratio(of, "bridge", "baseline") for _ in names[2:])
        lines.append("%-22s" % case + "".join(cells) + ratios)
    least = {"poll, 16, kept": 10, "poll, 16, each": 2.5, "submit, 16, kept": 4}
    lines.append("")
    lines += [judged(case + ": ratio", ratio(found[case], "bridge"), wanted, True) for case, wanted in least.items() if case in found]
    if "poll, 64, kept" in found:
        lines.append(judged("poll, 64, kept: p99 ms", middle(found["poll, 64, kept"]["bridge"]).p99, 60))
    return "\n".join(lines)


def listed(words: str) -> List[str]:
    return [word for word in words.split(",") if word]


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.8, help="for each case and server in a round (default: 0.8)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--clients", type=listed, default=["1", "16", "64", "256"], help="(default: 1,16,64,256; submits: 16,64 of them)")
    parser.add_argument("--only", type=listed, default=["poll", "limited", "status", "submit"],
                        help="(default: poll,limited,status,submit)")
    parser.add_argument("--fsync-ms", type=float, default=2, help="how long an fsync lasts for submits (default: 2)")
    parser.add_argument("--baseline", type=Path, help="another claude_api_bridge.py to compare with")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--naive", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.naive:
        serve_naive(options.naive)

    def cases(kind: str, most: int = 256, least: int = 1) -> List[Case]:
        chosen = [clients for clients in map(int, options.clients) if least <= clients <= most]
        return [Case(kind, clients, is_kept) for is_kept in (True, False) for clients in chosen]

    parts = [Part("poll", cases("poll")), Part("limited", cases("poll", 16, 16), 1_000_000), Part("status", cases("status")),
             Part("submit", cases("submit", 64, 16))]
    modules = {"bridge": MODULE, **({"baseline": options.baseline.absolute()} if options.baseline else {})}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        slow = slow_fsync(Path(folder), options.fsync_ms)
        if not slow:
            print("submits are left out: there is no C compiler", file=sys.stderr)
        chosen = [part for part in parts if part.name in options.only and (slow or part.name != "submit")]
        found = measure(chosen, max(1, options.rounds), options.seconds, modules, slow, Path(folder))
    if options.json:
        print(json.dumps({case: {**{name: middle(loads)._asdict() for name, loads in of.items()},
                                 "ratios": {"to_" + name: ratio(of, "bridge", name) for name in of if name != "bridge"}}
                          for case, of in found.items()}))
    else:
        print(table(found, ["naive", *modules]))
        print("%d rounds of %g s, %.0f s in all; load average %.2f" % (
            options.rounds, options.seconds, time.monotonic() - began, os.getloadavg()[0]))
    bad = {(case, name): middle(loads).bad for case, of in found.items() for name, loads in of.items()}
    for (case, name), count in bad.items():
        if count:
            print("%s: %d bad answers from %s" % (case, count, name), file=sys.stderr)
    return int(any(bad.values()))


if __name__ == "__main__":
    sys.exit(main())
