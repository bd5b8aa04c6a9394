"""Whether the bridge stays as small as it is: memory, descriptors, threads, children and database under a steady mix of traffic.

    python tests/bench/soak.py [--seconds 1800] [--rate 5] [--day-seconds 90] [--json]
    python tests/bench/soak.py --requests 10000                                       as fast as it goes

The bridge is a process of its own over a stand-in of the CLI. Clients do all that clients do: asks that are polled, waited for,
streamed, left half way, cancelled, that fail; conversations that are continued and forgotten; both formats of /v1 with streams and
tools; wrong tokens and bodies, lists, dashboard, metrics, tokens made and revoked. After a warm-up the process is looked at all the
time; in the end the median of the second tenth of the time is compared with that of the last.

Finished requests are kept for days, so the database would grow for as long as this runs. Therefore a day of the bridge lasts
`--day-seconds` (default: a twentieth of the time; its house keeping comes as much more often), and `--keep-days 1` deletes
what is older. With `--day-seconds 0` its clock is left alone, and the growth is compared with what is kept.
Exit status 1 when something grew, or an answer was not as it should be. Linux (it looks into /proc).
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
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import kill                                             # beside this file
from kill import Lost, call, events, opened

RSS_SHARE, RSS_BYTES = 0.05, 3 << 20                    # growth of the memory that counts as none: this share, or so much
FEW = 3                                                 # as many more descriptors, threads or files count as none
CHILDREN, MOST_CHILDREN = 5, 4 + 4 + 4 + 2 + 2          # chance decides how many wait; conversations, tools, leaving, spare, running; and
                                                        # one that just ends counts twice
DATABASE_SHARE, DATABASE_BYTES = 0.25, 512 << 10       # as much as large answers come by chance
WAL_BYTES = 8 << 20                                     # SQLite begins anew after 4 MiB
WARM_UP_SECONDS, WARM_UP_REQUESTS = 90, 500             # until as many processes wait for conversations and tools as ever will
OVERHEAD = 3.0                                          # database bytes for one byte of what is kept, indexes and half-full pages included

# A day of the bridge lasts DAY seconds; what it does once an hour it does as much more often.
QUICK_DAYS = """
import time
began, keep_house = time.time(), cab.Worker._keep_house
cab.Clock.now = staticmethod(lambda: began + (time.time() - began) * 86400 / DAY)

def keep_house_often(worker):
    if time.monotonic() - worker._purged_at >= DAY / 24:
        worker._purged_at, worker._clocks_apart = float("-inf"), None      # such a clock counts as one that was set
    keep_house(worker)

cab.Worker._keep_house = keep_house_often
"""

TOOL = {"name": "weather", "description": "Tells the weather",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
WEIGHTS = {"ask_and_poll": 5, "ask_and_wait": 4, "ask_and_follow": 4, "leave_half_way": 1, "ask_in_conversation": 4, "chat": 4,
           "chat_stream": 3, "chat_with_tool": 1, "cancel": 2, "fail": 1, "big": 1, "strangers": 1, "mistakes": 1, "lists": 2, "page": 1,
           "figures": 2, "token": 1}


class Sample(NamedTuple):
    """What the process looks like. Sizes in bytes; done: what clients did so far."""
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
    """Does things with the bridge, one per `act`. Any thread."""

    def __init__(self, port: int, admin: str, seed: int) -> None:
        self.port, self.admin, self.seed = port, admin, seed
        self.app = self.new_token()["token"]
        self.talk = self.new_token(sessionMode="stateful")["token"]
        self.lock = threading.Lock()
        self.done = 0
        self.counts: "Counter[str]" = Counter()
        self.wrong: List[str] = []

    def new_token(self, **more: Any) -> Dict[str, Any]:
        return dict(self.json("POST", "/api/tokens", {"name": "soak", **more}, self.admin, wants=(201,)))

    def json(self, method: str, path: str, body: Any = None, token: str = "", wants: Sequence[int] = (200, 202), **headers: str) -> Any:
        """The body of an answer; one with another status is an AssertionError, a full queue is a QueueFull."""
        status, _, data = call(self.port, token or self.app, method, path, body, headers)
        if status == 429 and b"queue_full" in data:
            raise kill.cab.QueueFull("full")
        assert status in wants, (method, path, status, data[:200])
        return json.loads(data)

    def act(self, number: int) -> None:
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
    def work(chooser: random.Random, marker: str, seconds: Sequence[float] = (0, 0, 0.02, 0.1)) -> str:
        return "work %s %g %s" % (marker, chooser.choice(seconds), "and so on " * chooser.choice((0, 1, 20, 200)))

    def check(self, body: Dict[str, Any], marker: str) -> None:
        assert body["status"] == "completed" and body["response"].startswith(marker + " by "), body

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
        body = {"message": self.work(chooser, marker), "wait": 60, "model": chooser.choice(["haiku", "sonnet"])}
        self.check(self.json("POST", "/api/ask", body, **({"Idempotency-Key": marker} if chooser.random() < 0.3 else {})), marker)

    def ask_and_follow(self, chooser: random.Random, marker: str) -> None:
        with opened(self.port, self.app, "POST", "/api/ask", {"message": self.work(chooser, marker), "stream": True}) as response:
            if response.status == 429:
                raise kill.cab.QueueFull("full")
            text = ""
            for kind, _, data in events(response):
                text = text + data["text"] if kind == "delta" else "" if kind in ("queued", "started") else text
            assert kind == "completed" and data["response"] == text, data
            self.check(data, marker)

    def leave_half_way(self, chooser: random.Random, marker: str) -> None:
        with opened(self.port, self.app, "POST", "/api/ask", {"message": self.work(chooser, marker, (0.2,)), "stream": True}) as response:
            if response.status == 429:
                raise kill.cab.QueueFull("full")
            next(events(response))

    def ask_in_conversation(self, chooser: random.Random, marker: str) -> None:
        name = "talk-%d" % chooser.randrange(8)
        body = self.json("POST", "/api/ask", {"message": self.work(chooser, marker), "conversation": name, "wait": 60}, self.talk)
        self.check(body, marker)
        if chooser.random() < 0.3:
            self.json("DELETE", "/api/conversations/" + name, None, self.talk, wants=(200, 404))

    def chat(self, chooser: random.Random, marker: str) -> None:
        turns = [{"role": "user", "content": "work x 0"}, {"role": "assistant", "content": "x"}] * chooser.randrange(3)
        body = {"model": "haiku", "max_tokens": 100, "messages": turns + [{"role": "user", "content": self.work(chooser, marker)}]}
        if chooser.random() < 0.5:
            text = self.json("POST", "/v1/messages", body)["content"][0]["text"]
        else:
            text = self.json("POST", "/v1/chat/completions", body)["choices"][0]["message"]["content"]
        assert text.startswith(marker + " by "), text

    def chat_stream(self, chooser: random.Random, marker: str) -> None:
        body = {"model": "haiku", "max_tokens": 100, "stream": True, "messages": [{"role": "user", "content": self.work(chooser, marker)}]}
        path, end = chooser.choice([("/v1/messages", b"message_stop"), ("/v1/chat/completions", b"data: [DONE]")])
        with opened(self.port, self.app, "POST", path, body) as response:
            if response.status == 429:
                raise kill.cab.QueueFull("full")
            if chooser.random() < 0.2:
                response.readline()                            # and hangs up, which cancels it
                return
            assert end in response.read()

    def chat_with_tool(self, chooser: random.Random, marker: str) -> None:
        """A call of a client's tool; at times nobody comes with its result."""
        turns: List[Dict[str, Any]] = [{"role": "user", "content": 'call [["weather", {"city": "%s"}]]' % marker}]
        body = {"model": "haiku", "max_tokens": 100, "tools": [TOOL], "messages": turns}
        answer = self.json("POST", "/v1/messages", body)
        assert answer["stop_reason"] == "tool_use", answer
        if chooser.random() < 0.7:
            use = answer["content"][-1]["id"]
            turns += [{"role": "assistant", "content": answer["content"]},
                      {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use, "content": "sunny"}]}]
            self.json("POST", "/v1/messages", body)

    def cancel(self, chooser: random.Random, marker: str) -> None:
        job_id = self.json("POST", "/api/ask", {"message": self.work(chooser, marker, (0.5,))})["requestId"]
        time.sleep(chooser.choice((0, 0.1, 0.3)))
        self.json("DELETE", "/api/ask/" + job_id, wants=(200, 409))

    def fail(self, chooser: random.Random, marker: str) -> None:
        body = self.json("POST", "/api/ask", {"message": "%s %s 0 fail" % ("work", marker), "wait": 60})
        assert body["errorCode"] == "cli_error", body

    def big(self, chooser: random.Random, marker: str) -> None:
        body = self.json("POST", "/api/ask", {"message": "big %d" % chooser.choice((4, 16, 64)), "wait": 60})
        assert body["status"] == "completed" and len(body["response"]) >= 2_048, body["status"]

    def strangers(self, chooser: random.Random, marker: str) -> None:
        for token in ("cab-" + "0" * 64, "nothing"):
            self.json("GET", "/api/requests", None, token, wants=(401, 429))

    def mistakes(self, chooser: random.Random, marker: str) -> None:
        self.json("POST", "/api/ask", {"message": ""}, wants=(400,))
        self.json("POST", "/api/ask", ["no object"], wants=(400,))
        self.json("GET", "/api/ask/no-such-request", wants=(404,))
        self.json("PUT", "/api/ask", wants=(405,))
        self.json("POST", "/v1/messages", {"messages": 3}, wants=(400,))

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
        made = self.new_token(expiresInDays=1)
        self.json("GET", "/api/requests", None, made["token"])
        self.json("DELETE", "/api/tokens/" + made["tokenId"], None, self.admin)


def children_of(pid: int) -> int:
    count = 0
    for path in Path("/proc/%d/task" % pid).glob("*/children"):
        with contextlib.suppress(OSError):                    # a thread that ends meanwhile
            count += len(path.read_text().split())
    return count


def look(pid: int, data_dir: Path, began: float, done: int) -> Sample:
    def size(name: str) -> int:
        return (data_dir / name).stat().st_size if (data_dir / name).exists() else 0

    return Sample(time.monotonic() - began, done, int(Path("/proc/%d/statm" % pid).read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
                  len(os.listdir("/proc/%d/fd" % pid)), len(os.listdir("/proc/%d/task" % pid)), children_of(pid), size("bridge.db"),
                  size("bridge.db-wal"), sum(len(files) for _, _, files in os.walk(data_dir)))


def kept_bytes(data_dir: Path) -> List[int]:
    """-> [requests that are kept, their bytes without indexes and pages]."""
    with contextlib.closing(sqlite3.connect(str(data_dir / "bridge.db"))) as db:
        columns = " + ".join("coalesce(length(CAST(%s AS BLOB)), 0)" % row[1] for row in db.execute("PRAGMA table_info(jobs)"))
        return [int(each or 0) for each in db.execute("SELECT count(*), sum(%s) FROM jobs" % columns).fetchone()]


def drive(crowd: Crowd, seconds: float, rate: float, requests: int, clients: int, pid: int, data_dir: Path, say: bool) -> List[Sample]:
    """The traffic, after a warm-up. requests: so many as fast as it goes; else `rate` a second, for `seconds`. -> what was seen."""
    seconds, requests = seconds + WARM_UP_SECONDS, requests and requests + WARM_UP_REQUESTS
    orders: "queue.Queue[Optional[int]]" = queue.Queue(clients if requests else 0)
    began, samples, is_over = time.monotonic(), [], threading.Event()

    def serve() -> None:
        for number in iter(orders.get, None):
            crowd.act(number)

    def subscribe() -> None:
        every = 2.0 if requests else min(10.0, seconds / 60)
        while not is_over.wait(every):
            samples.append(look(pid, data_dir, began, crowd.done))
            if say and len(samples) % 30 == 0:
                print("%6.0f s %s" % (samples[-1].at, row_of(samples[-1])), file=sys.stderr)

    threads = [threading.Thread(target=serve, name="client-%d" % n) for n in range(clients)]
    threads.append(threading.Thread(target=watch, name="watch"))
    for thread in threads:
        thread.start()
    number = 0
    while number < requests if requests else time.monotonic() - began < seconds:
        if not requests:
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
        orders.put(number)
        number += 1
    for _ in range(clients):
        orders.put(None)
    for thread in threads[:-1]:
        thread.join()
    is_over.set()
    threads[-1].join()
    return [sample for sample in samples if (sample.done >= WARM_UP_REQUESTS if requests else sample.at >= WARM_UP_SECONDS)]


def row_of(sample: Sample) -> str:
    return "%7d done %8.1f MB %5d fds %5d threads %3d children %8.2f MB database %6.2f MB wal %4d files" % (
        sample.done, sample.rss / 1e6, sample.fds, sample.threads, sample.children, sample.database / 1e6, sample.wal / 1e6, sample.files)


def tenths(samples: Sequence[Sample], by_done: bool) -> List[Sample]:
    """The medians of each tenth, of the time or of what was done."""
    places = [sample.done if by_done else sample.at for sample in samples]
    parts: List[List[Sample]] = [[] for _ in range(10)]
    for place, sample in zip(places, samples):
        parts[min(9, int((place - places[0]) / (places[-1] - places[0]) * 10))].append(sample)
    return [Sample(*(statistics.median(values) for values in zip(*part))) for part in parts if part]    # type: ignore[arg-type]


def judge(begin: Sample, end: Sample, samples: Sequence[Sample], days: float, growth: float) -> List[str]:
    """What grew. growth: how much the kept requests explain, in bytes."""
    found = []
    if end.rss - begin.rss > max(RSS_SHARE * begin.rss, RSS_BYTES):
        found.append("memory grew from %.1f to %.1f MB" % (begin.rss / 1e6, end.rss / 1e6))
    more = end.children - begin.children                # each has three pipes and as many threads that move their bytes
    for name, allowed in (("fds", FEW + 3 * more), ("threads", FEW + 3 * more), ("children", CHILDREN), ("files", FEW)):
        if getattr(end, name) - getattr(begin, name) > allowed:
            found.append("%s grew from %d to %d" % (name, getattr(begin, name), getattr(end, name)))
    if max(sample.children for sample in samples) > MOST_CHILDREN:
        found.append("there were %d children" % max(sample.children for sample in samples))
    if max(sample.wal for sample in samples) > WAL_BYTES:
        found.append("the WAL grew to %.1f MB" % (max(sample.wal for sample in samples) / 1e6))
    room = max(DATABASE_SHARE * begin.database, DATABASE_BYTES) if days else growth * OVERHEAD + DATABASE_BYTES
    if end.database - begin.database > room:
        found.append("the database grew from %.2f to %.2f MB, allowed were %.2f MB more" % (
            begin.database / 1e6, end.database / 1e6, room / 1e6))
    return found


def soak(seconds: float, rate: float, requests: int, clients: int, day_seconds: float, seed: int, folder: Path,
         say: bool) -> Dict[str, Any]:
    claude = kill.write_fake(folder / "fake")
    before = "DAY = %r\n%s" % (day_seconds, QUICK_DAYS) if day_seconds else ""
    program = kill.Program(kill.bridge_command(folder, claude, 0, "--keep-days", "1", before=before), folder)
    try:
        program.wait_serving()
        port = int(program.lines[-1].rpartition(":")[2])
        crowd = Crowd(port, program.token, seed)
        samples = drive(crowd, seconds, rate, requests, clients, program.process.pid, folder / "data", say)
        metrics = call(port, program.token, "GET", "/metrics")[2].decode()
        starts = next(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("cab_cli_starts_total"))
        queued = next(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("cab_requests_accepted_total"))
    finally:
        status = program.end(signal.SIGTERM) if program.process.poll() is None else 1
    if status or "Traceback" in (folder / "bridge.log").read_text("utf-8"):
        crowd.wrong.append("status %d, or a traceback in the log" % status)
    kept, size = kept_bytes(folder / "data")
    parts = tenths(samples, bool(requests))
    begin, end = parts[1], parts[-1]
    found = judge(begin, end, samples, day_seconds, size * (1 - begin.done / max(1, crowd.done)))
    return {"seconds": samples[-1].at, "done": crowd.done, "queued": int(queued), "cli_starts": int(starts), "kinds": dict(crowd.counts),
            "per_second": crowd.done / samples[-1].at, "day_seconds": day_seconds, "kept": kept, "kept_bytes": size,
            "bytes_of_one": size / max(1, kept), "database_of_one": samples[-1].database / max(1, kept),
            "tenths": [part._asdict() for part in parts], "begin": begin._asdict(), "end": end._asdict(),
            "peak": Sample(*(max(values) for values in zip(*samples)))._asdict(), "wrong": crowd.wrong[:40], "grew": found}


def table(found: Dict[str, Any]) -> str:
    lines = ["%d things done in %.0f s (%.1f a second), %d requests queued, %d processes of the CLI started; %s" % (
        found["done"], found["seconds"], found["per_second"], found["queued"], found["cli_starts"],
        "a day lasts %g s" % found["day_seconds"] if found["day_seconds"] else "its clock is the real one")]
    lines += ["%3d/10 %s" % (n, row_of(Sample(**each))) for n, each in enumerate(found["tenths"], 1)]
    lines += ["", "%-10s %12s %12s %12s" % ("", "2nd tenth", "last tenth", "highest")]
    for name in ("rss", "fds", "threads", "children", "database", "wal", "files"):
        lines.append("%-10s %12d %12d %12d" % (name, found["begin"][name], found["end"][name], found["peak"][name]))
    lines += ["", "kept: %d requests of %.0f bytes, %.0f bytes of the file for each" % (
        found["kept"], found["bytes_of_one"], found["database_of_one"]), "what was done: " + ", ".join(
        "%d %s" % (count, kind) for kind, count in sorted(found["kinds"].items()))]
    lines += ["wrong answers: %d" % len(found["wrong"])] + ["  " + each for each in found["wrong"]]
    return "\n".join(lines + ["GREW: " + each for each in found["grew"]] + ([] if found["grew"] or found["wrong"] else ["flat"]))


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="Watches what the bridge needs under a steady mix of traffic.")
    parser.add_argument("--seconds", type=float, default=1800, help="how long (default: 1800)")
    parser.add_argument("--rate", type=float, default=5, help="things done in a second (default: 5)")
    parser.add_argument("--requests", type=int, default=0, help="do so many, as fast as it goes, instead")
    parser.add_argument("--clients", type=int, default=0, help="clients at once (default: 16, with --requests 8)")
    parser.add_argument("--day-seconds", type=float, default=-1, help="how long a day of the bridge lasts; 0 leaves its clock alone"
                        " (default: a twentieth of --seconds, with --requests 20)")
    parser.add_argument("--seed", type=int, default=1, help="of what is random (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if sys.platform != "linux":
        print("error: this needs Linux", file=sys.stderr)
        return 2
    day = options.day_seconds if options.day_seconds >= 0 else 20 if options.requests else options.seconds / 20
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = soak(options.seconds, options.rate, options.requests, options.clients or (8 if options.requests else 16), day, options.seed,
                     Path(folder), say=True)
    print(json.dumps(found) if options.json else table(found))
    return 1 if found["grew"] or found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
