"""Check that the bridge does not grow under steady traffic: memory, descriptors, threads, ...

    python tests/bench/soak.py [--seconds 1800] [--rate 5] [--day-seconds 90] [--json]
    python tests/bench/soak.py --requests 10000            at full speed

The bridge is a process of its own over a fake CLI. The clients use all features: messages that are
polled, waited for, streamed, cancelled, that fail, and streams that are left early; conversations
that are continued and deleted; both formats of /v1 with streams and tools; wrong tokens and bodies;
lists, dashboard, metrics; tokens that are created and revoked. After a warm-up the program samples
the memory, descriptors, threads, children and database of the process. At the end it compares the
median of the second tenth of the time with the median of the last tenth.

The bridge stores finished requests for days, so that the database would grow during the whole run.
Therefore a day of the bridge lasts `--day-seconds` (default: a twentieth of the time), maintenance
runs more often in proportion, and `--keep-days 1` deletes older requests. With `--day-seconds 0`
the clock of the bridge is not changed, and the growth is compared with the size of the requests.
Exit status 1 if something grew, or if a response was wrong. Linux only (it reads /proc).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import signal
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import kill
from common import children_of
from kill import Lost, call, events, opened

# Allowed growth of the memory: the larger of this share and this size.
RSS_SHARE, RSS_BYTES = 0.05, 3 << 20
# Allowed growth of the numbers of descriptors, threads and files.
FEW = 3
# Allowed growth of the number of children, which depends on chance.
CHILDREN = 5
# Most children: 4 of conversations, 4 that wait for tools, 4 that are ending, 2 idle or running,
# and 2 because a process that is just ending may count twice.
MOST_CHILDREN = 4 + 4 + 4 + 2 + 2
# Allowed growth of the database: large answers arrive by chance.
DATABASE_SHARE, DATABASE_BYTES = 0.25, 512 << 10
# SQLite restarts the WAL after 4 MiB.
WAL_BYTES = 8 << 20
# Afterwards as many processes wait for conversations and tools as at any later time.
WARM_UP_SECONDS, WARM_UP_REQUESTS = 90, 500
# Database bytes for each byte of the stored requests, with indexes and half-full pages.
OVERHEAD = 3.0

# A day of the bridge lasts DAY seconds; its hourly work runs more often in proportion. The bridge
# would take such a clock for one that somebody has set.
QUICK_DAYS = """
import time
start, run_maintenance = time.time(), cab.Worker._run_maintenance
cab.Clock.now = staticmethod(lambda: start + (time.time() - start) * 86400 / DAY)

def run_maintenance_often(worker):
    purge = worker._purge
    if purge._starts_at - time.monotonic() <= cab.PURGE_SECONDS - DAY / 24:
        purge._starts_at, purge._clock_offset = float("-inf"), None
    run_maintenance(worker)

cab.Worker._run_maintenance = run_maintenance_often
"""

TOOL = {
    "name": "weather",
    "description": "Returns the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
WEIGHTS = {
    "ask_and_poll": 5, "ask_and_wait": 4, "ask_and_follow": 4, "leave_half_way": 1,
    "ask_in_conversation": 4, "chat": 4, "chat_stream": 3, "chat_with_tool": 1, "cancel": 2,
    "fail": 1, "big": 1, "strangers": 1, "mistakes": 1, "lists": 2, "page": 1, "figures": 2,
    "token": 1,
}


class Sample(NamedTuple):
    """The state of the process. Sizes are in bytes. done: number of actions of the clients."""

    at: float
    done: int
    rss: int
    fds: int
    threads: int
    children: int
    database: int
    wal: int
    files: int


class Crowd:
    """The actions of the clients; `act` runs one of them. Any thread."""

    def __init__(self, port: int, admin: str, seed: int) -> None:
        self.port = port
        self.admin = admin
        self.seed = seed
        self.app = self.new_token()["token"]
        self.talk = self.new_token(sessionMode="stateful")["token"]
        self.lock = threading.Lock()
        self.done = 0
        self.counts: "Counter[str]" = Counter()
        self.wrong: List[str] = []

    def new_token(self, **more: Any) -> Dict[str, Any]:
        """Create a token; return the body of the response."""
        body = {"name": "soak", **more}
        return dict(self.json("POST", "/api/tokens", body, self.admin, statuses=(201,)))

    def json(
        self,
        method: str,
        path: str,
        body: Any = None,
        token: str = "",
        statuses: Sequence[int] = (200, 202),
        **headers: str,
    ) -> Any:
        """Send a request; return the JSON of the response.

        Raises AssertionError for another status, QueueFull for a full queue.
        """
        status, _, data = call(self.port, token or self.app, method, path, body, headers)
        if status == 429 and b"queue_full" in data:
            raise kill.cab.QueueFull("full")
        assert status in statuses, (method, path, status, data[:200])
        return json.loads(data)

    def ask(self, message: str, token: str = "", **more: Any) -> Dict[str, Any]:
        """Send a message and wait; return the body of the finished request."""
        body = {"message": message, "wait": 60, **more}
        return dict(self.json("POST", "/api/ask", body, token))

    def act(self, number: int) -> None:
        """Run a random action, and record its result."""
        chooser = random.Random(self.seed * 1_000_003 + number)
        kind = chooser.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        note = kind
        try:
            getattr(self, kind)(chooser, "m-%d" % number)
        except kill.cab.QueueFull:
            note = "queue full"
        except (AssertionError, Lost, KeyError, ValueError) as error:
            with self.lock:
                self.wrong.append("%s: %r" % (kind, error))
        with self.lock:
            self.done += 1
            self.counts[note] += 1

    @staticmethod
    def work(
        chooser: random.Random, marker: str, seconds: Sequence[float] = (0, 0, 0.02, 0.1)
    ) -> str:
        """Return a message for the fake of kill.py, of a random length."""
        duration, length = chooser.choice(seconds), chooser.choice((0, 1, 20, 200))
        return "work %s %g %s" % (marker, duration, "and so on " * length)

    def check(self, body: Dict[str, Any], marker: str) -> None:
        """Check the body of a completed request."""
        assert body["status"] == "completed", body
        assert body["response"].startswith(marker + " by "), body

    def ask_and_poll(self, chooser: random.Random, marker: str) -> None:
        job_id = self.json("POST", "/api/ask", {"message": self.work(chooser, marker)})["requestId"]
        body: Dict[str, Any] = {"status": "queued"}
        for _ in range(20):
            body = self.json("GET", "/api/ask/%s%s" % (job_id, chooser.choice(["", "?wait=5"])))
            if body["status"] in ("completed", "error"):
                break
            time.sleep(0.2)
        else:
            body = self.json("GET", "/api/ask/%s?wait=60" % job_id)
        self.check(body, marker)

    def ask_and_wait(self, chooser: random.Random, marker: str) -> None:
        message, model = self.work(chooser, marker), chooser.choice(["haiku", "sonnet"])
        body = {"message": message, "wait": 60, "model": model}
        headers = {"Idempotency-Key": marker} if chooser.random() < 0.3 else {}
        self.check(self.json("POST", "/api/ask", body, **headers), marker)

    def ask_and_follow(self, chooser: random.Random, marker: str) -> None:
        body = {"message": self.work(chooser, marker), "stream": True}
        with opened(self.port, self.app, "POST", "/api/ask", body) as response:
            if response.status == 429:
                raise kill.cab.QueueFull("full")
            text = ""
            for kind, _, data in events(response):
                if kind == "delta":
                    text += data["text"]
                elif kind in ("queued", "started"):
                    text = ""
            assert kind == "completed", data
            assert data["response"] == text, data
            self.check(data, marker)

    def leave_half_way(self, chooser: random.Random, marker: str) -> None:
        body = {"message": self.work(chooser, marker, (0.2,)), "stream": True}
        with opened(self.port, self.app, "POST", "/api/ask", body) as response:
            if response.status == 429:
                raise kill.cab.QueueFull("full")
            next(events(response))

    def ask_in_conversation(self, chooser: random.Random, marker: str) -> None:
        name = "talk-%d" % chooser.randrange(8)
        body = self.ask(self.work(chooser, marker), self.talk, conversation=name)
        self.check(body, marker)
        if chooser.random() < 0.3:
            self.json("DELETE", "/api/conversations/" + name, None, self.talk, (200, 404))

    def chat(self, chooser: random.Random, marker: str) -> None:
        turns = [
            {"role": "user", "content": "work x 0"},
            {"role": "assistant", "content": "x"},
        ] * chooser.randrange(3)
        body = {
            "model": "haiku",
            "max_tokens": 100,
            "messages": turns + [{"role": "user", "content": self.work(chooser, marker)}],
        }
        if chooser.random() < 0.5:
            text = self.json("POST", "/v1/messages", body)["content"][0]["text"]
        else:
            choice = self.json("POST", "/v1/chat/completions", body)["choices"][0]
            text = choice["message"]["content"]
        assert text.startswith(marker + " by "), text

    def chat_stream(self, chooser: random.Random, marker: str) -> None:
        body = {
            "model": "haiku",
            "max_tokens": 100,
            "stream": True,
            "messages": [{"role": "user", "content": self.work(chooser, marker)}],
        }
        path, end = chooser.choice(
            [("/v1/messages", b"message_stop"), ("/v1/chat/completions", b"data: [DONE]")]
        )
        with opened(self.port, self.app, "POST", path, body) as response:
            if response.status == 429:
                raise kill.cab.QueueFull("full")
            if chooser.random() < 0.2:
                # Close the connection early, which cancels the request.
                response.readline()
                return
            assert end in response.read()

    def chat_with_tool(self, chooser: random.Random, marker: str) -> None:
        """Let the model call a tool; sometimes never send the result."""
        turns: List[Dict[str, Any]] = [
            {"role": "user", "content": 'call [["weather", {"city": "%s"}]]' % marker}
        ]
        body = {"model": "haiku", "max_tokens": 100, "tools": [TOOL], "messages": turns}
        answer = self.json("POST", "/v1/messages", body)
        assert answer["stop_reason"] == "tool_use", answer
        if chooser.random() < 0.7:
            call_id = answer["content"][-1]["id"]
            result = {"type": "tool_result", "tool_use_id": call_id, "content": "sunny"}
            turns.append({"role": "assistant", "content": answer["content"]})
            turns.append({"role": "user", "content": [result]})
            self.json("POST", "/v1/messages", body)

    def cancel(self, chooser: random.Random, marker: str) -> None:
        body = self.json("POST", "/api/ask", {"message": self.work(chooser, marker, (0.5,))})
        time.sleep(chooser.choice((0, 0.1, 0.3)))
        self.json("DELETE", "/api/ask/" + body["requestId"], statuses=(200, 409))

    def fail(self, chooser: random.Random, marker: str) -> None:
        body = self.ask("work %s 0 fail" % marker)
        assert body["errorCode"] == "cli_error", body

    def big(self, chooser: random.Random, marker: str) -> None:
        body = self.ask("big %d" % chooser.choice((4, 16, 64)))
        assert body["status"] == "completed", body["status"]
        assert len(body["response"]) >= 2_048

    def strangers(self, chooser: random.Random, marker: str) -> None:
        for token in ("cab-" + "0" * 64, "nothing"):
            self.json("GET", "/api/requests", None, token, (401, 429))

    def mistakes(self, chooser: random.Random, marker: str) -> None:
        self.json("POST", "/api/ask", {"message": ""}, statuses=(400,))
        self.json("POST", "/api/ask", ["no object"], statuses=(400,))
        self.json("GET", "/api/ask/no-such-request", statuses=(404,))
        self.json("PUT", "/api/ask", statuses=(405,))
        self.json("POST", "/v1/messages", {"messages": 3}, statuses=(400,))

    def lists(self, chooser: random.Random, marker: str) -> None:
        self.json("GET", "/api/requests?limit=20", None, self.admin)
        self.json("GET", "/api/conversations", None, self.talk)
        self.json("GET", "/api/usage?days=7", None, self.admin)
        self.json("GET", "/v1/models")

    def page(self, chooser: random.Random, marker: str) -> None:
        status, _, data = call(self.port, None, "GET", "/dashboard")
        assert status == 200 and b"</html>" in data
        assert call(self.port, None, "GET", "/openapi.json")[0] == 200

    def figures(self, chooser: random.Random, marker: str) -> None:
        status, _, data = call(self.port, self.admin, "GET", "/metrics")
        assert status == 200 and b"cab_requests_accepted_total" in data
        assert self.json("GET", "/health")["status"] == "ok"
        self.json("GET", "/api/status", None, self.admin)

    def token(self, chooser: random.Random, marker: str) -> None:
        created = self.new_token(expiresInDays=1)
        self.json("GET", "/api/requests", None, created["token"])
        self.json("DELETE", "/api/tokens/" + created["tokenId"], None, self.admin)


def take_sample(pid: int, data_dir: Path, start: float, done: int) -> Sample:
    """Return a sample of the process."""

    def size(name: str) -> int:
        return (data_dir / name).stat().st_size if (data_dir / name).exists() else 0

    pages = int(Path("/proc/%d/statm" % pid).read_text().split()[1])
    return Sample(
        at=time.monotonic() - start,
        done=done,
        rss=pages * os.sysconf("SC_PAGE_SIZE"),
        fds=len(os.listdir("/proc/%d/fd" % pid)),
        threads=len(os.listdir("/proc/%d/task" % pid)),
        children=children_of(pid),
        database=size("bridge.db"),
        wal=size("bridge.db-wal"),
        files=sum(len(files) for _, _, files in os.walk(data_dir)),
    )


def stored_requests(data_dir: Path) -> Tuple[int, int]:
    """Return (number of stored requests, their bytes without indexes and pages)."""
    with contextlib.closing(sqlite3.connect(str(data_dir / "bridge.db"))) as db:
        columns = " + ".join(
            "coalesce(length(CAST(%s AS BLOB)), 0)" % row[1]
            for row in db.execute("PRAGMA table_info(jobs)")
        )
        count, size = db.execute("SELECT count(*), sum(%s) FROM jobs" % columns).fetchone()
        return int(count or 0), int(size or 0)


def drive(
    crowd: Crowd,
    seconds: float,
    rate: float,
    requests: int,
    clients: int,
    pid: int,
    data_dir: Path,
    say: bool,
) -> List[Sample]:
    """Run the traffic, after a warm-up; return the samples after the warm-up.

    requests: number of actions at full speed; if 0, `rate` actions a second for `seconds`.
    """
    deadline = time.monotonic() + seconds + WARM_UP_SECONDS
    total = requests + WARM_UP_REQUESTS if requests else 0
    orders: "queue.Queue[Optional[int]]" = queue.Queue(clients if requests else 0)
    start, samples, is_over = time.monotonic(), [], threading.Event()

    def run_client() -> None:
        for number in iter(orders.get, None):
            crowd.act(number)

    def take_samples() -> None:
        interval = 2.0 if requests else min(10.0, (seconds + WARM_UP_SECONDS) / 60)
        while not is_over.wait(interval):
            samples.append(take_sample(pid, data_dir, start, crowd.done))
            if say and len(samples) % 30 == 0:
                print("%6.0f s %s" % (samples[-1].at, row_of(samples[-1])), file=sys.stderr)

    workers = [threading.Thread(target=run_client, name="client-%d" % n) for n in range(clients)]
    sampler = threading.Thread(target=take_samples, name="samples")
    for thread in (*workers, sampler):
        thread.start()
    number = 0
    while number < total if requests else time.monotonic() < deadline:
        if not requests:
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
        orders.put(number)
        number += 1
    for _ in range(clients):
        orders.put(None)
    for thread in workers:
        thread.join()
    is_over.set()
    sampler.join()
    if requests:
        return [sample for sample in samples if sample.done >= WARM_UP_REQUESTS]
    return [sample for sample in samples if sample.at >= WARM_UP_SECONDS]


def row_of(sample: Sample) -> str:
    """Return a sample as text."""
    numbers = "%(fds)5d fds %(threads)5d threads %(children)3d children" % sample._asdict()
    megabytes = (sample.rss / 1e6, numbers, sample.database / 1e6, sample.wal / 1e6)
    sizes = "%8.1f MB %s %8.2f MB database %6.2f MB wal" % megabytes
    return "%7d done %s %4d files" % (sample.done, sizes, sample.files)


def tenths(samples: Sequence[Sample], by_done: bool) -> List[Sample]:
    """Return the medians of each tenth, of the time or of the number of actions."""
    positions = [sample.done if by_done else sample.at for sample in samples]
    first, last = positions[0], positions[-1]
    parts: List[List[Sample]] = [[] for _ in range(10)]
    for position, sample in zip(positions, samples):
        parts[min(9, int((position - first) / (last - first) * 10))].append(sample)
    medians = []
    for part in filter(None, parts):
        columns: Any = [statistics.median(column) for column in zip(*part)]
        medians.append(Sample(*columns))
    return medians


def judge(
    begin: Sample, end: Sample, samples: Sequence[Sample], days: float, growth: float
) -> List[str]:
    """Return what grew. growth: the bytes by which the stored requests grew."""
    faults = []
    if end.rss - begin.rss > max(RSS_SHARE * begin.rss, RSS_BYTES):
        faults.append("memory grew from %.1f to %.1f MB" % (begin.rss / 1e6, end.rss / 1e6))
    # A child has three pipes and three threads.
    more = 3 * (end.children - begin.children)
    limits = {"fds": FEW + more, "threads": FEW + more, "children": CHILDREN, "files": FEW}
    for name, allowed in limits.items():
        before, after = getattr(begin, name), getattr(end, name)
        if after - before > allowed:
            faults.append("%s grew from %d to %d" % (name, before, after))
    most_children = max(sample.children for sample in samples)
    if most_children > MOST_CHILDREN:
        faults.append("there were %d children" % most_children)
    largest_wal = max(sample.wal for sample in samples)
    if largest_wal > WAL_BYTES:
        faults.append("the WAL grew to %.1f MB" % (largest_wal / 1e6))
    room = growth * OVERHEAD + DATABASE_BYTES
    if days:
        room = max(DATABASE_SHARE * begin.database, DATABASE_BYTES)
    if end.database - begin.database > room:
        sizes = (begin.database / 1e6, end.database / 1e6, room / 1e6)
        faults.append("the database grew from %.2f to %.2f MB, allowed: %.2f MB more" % sizes)
    return faults


def soak(
    seconds: float,
    rate: float,
    requests: int,
    clients: int,
    day_seconds: float,
    seed: int,
    folder: Path,
    say: bool,
) -> Dict[str, Any]:
    """Run a bridge under traffic; return the figures."""
    claude = kill.write_fake(folder / "fake")
    before = "DAY = %r\n%s" % (day_seconds, QUICK_DAYS) if day_seconds else ""
    command = kill.bridge_command(folder, claude, 0, "--keep-days", "1", before=before)
    program = kill.Program(command, folder)
    try:
        program.wait_serving()
        port = int(program.lines[-1].rpartition(":")[2])
        crowd = Crowd(port, program.token, seed)
        pid, data_dir = program.process.pid, folder / "data"
        samples = drive(crowd, seconds, rate, requests, clients, pid, data_dir, say)
        metrics = call(port, program.token, "GET", "/metrics")[2].decode()
    finally:
        status = program.end(signal.SIGTERM) if program.process.poll() is None else 1
    if status or "Traceback" in (folder / "bridge.log").read_text("utf-8"):
        crowd.wrong.append("status %d, or a traceback in the log" % status)
    stored, size = stored_requests(folder / "data")
    parts = tenths(samples, bool(requests))
    begin, end = parts[1], parts[-1]
    growth = size * (1 - begin.done / max(1, crowd.done))
    peak = Sample(*(max(column) for column in zip(*samples)))
    return {
        "seconds": samples[-1].at,
        "done": crowd.done,
        "queued": metric(metrics, "cab_requests_accepted_total"),
        "cli_starts": metric(metrics, "cab_cli_starts_total"),
        "kinds": dict(crowd.counts),
        "per_second": crowd.done / samples[-1].at,
        "day_seconds": day_seconds,
        "stored": stored,
        "stored_bytes": size,
        "bytes_of_one": size / max(1, stored),
        "database_of_one": samples[-1].database / max(1, stored),
        "tenths": [part._asdict() for part in parts],
        "begin": begin._asdict(),
        "end": end._asdict(),
        "peak": peak._asdict(),
        "wrong": crowd.wrong[:40],
        "grew": judge(begin, end, samples, day_seconds, growth),
    }


def metric(text: str, name: str) -> int:
    """Return the value of a metric without labels."""
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return int(float(line.split()[-1]))


def table(figures: Dict[str, Any]) -> str:
    """Return the figures as text."""
    begin, end, peak = figures["begin"], figures["end"], figures["peak"]
    clock = "the clock is not changed"
    if figures["day_seconds"]:
        clock = "a day lasts %g s" % figures["day_seconds"]
    kinds = ["%d %s" % (count, kind) for kind, count in sorted(figures["kinds"].items())]
    lines = [
        "%(done)d actions in %(seconds).0f s (%(per_second).1f a second), "
        "%(queued)d requests queued, %(cli_starts)d processes of the CLI started; " % figures
        + clock
    ]
    for n, part in enumerate(figures["tenths"], 1):
        lines.append("%3d/10 %s" % (n, row_of(Sample(**part))))
    lines += ["", "%-10s %12s %12s %12s" % ("", "2nd tenth", "last tenth", "highest")]
    for name in ("rss", "fds", "threads", "children", "database", "wal", "files"):
        lines.append("%-10s %12d %12d %12d" % (name, begin[name], end[name], peak[name]))
    lines += [
        "",
        "stored: %(stored)d requests of %(bytes_of_one).0f bytes, "
        "%(database_of_one).0f bytes of the file for each" % figures,
        "actions: " + ", ".join(kinds),
        "wrong responses: %d" % len(figures["wrong"]),
    ]
    lines += ["  " + text for text in figures["wrong"]]
    lines += ["GREW: " + text for text in figures["grew"]]
    if not figures["grew"] and not figures["wrong"]:
        lines.append("flat")
    return "\n".join(lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description="Check that the bridge does not grow under steady traffic."
    )
    parser.add_argument("--seconds", type=float, default=1800, help="duration (default: 1800)")
    parser.add_argument("--rate", type=float, default=5, help="actions a second (default: 5)")
    parser.add_argument(
        "--requests", type=int, default=0, help="run so many actions at full speed instead"
    )
    parser.add_argument(
        "--clients", type=int, default=0, help="clients at once (default: 16, with --requests 8)"
    )
    parser.add_argument(
        "--day-seconds",
        type=float,
        default=-1,
        help="seconds that a day of the bridge lasts; 0 does not change its clock"
        " (default: a twentieth of --seconds, with --requests 20)",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the actions (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if sys.platform != "linux":
        print("error: this needs Linux", file=sys.stderr)
        return 2
    day = options.day_seconds
    if day < 0:
        day = 20 if options.requests else options.seconds / 20
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        figures = soak(
            options.seconds,
            options.rate,
            options.requests,
            options.clients or (8 if options.requests else 16),
            day,
            options.seed,
            Path(folder),
            say=True,
        )
    print(json.dumps(figures) if options.json else table(figures))
    return 1 if figures["grew"] or figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
