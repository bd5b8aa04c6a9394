"""Mutated requests against a bridge of its own: no 500, no hang, no undocumented answer, no thread, file or memory that stays.

    python tests/bench/fuzz.py [--count 100000] [--seed 1] [--clients 8] [--raw 0.5] [--json]
    python tests/bench/fuzz.py --replay FILE

tests/mutations.py makes the requests (from the bridge's own /openapi.json, and from raw bytes) and judges the answers. Whole
requests go out one after the other or several at once, on connections that are kept; bytes on a connection of their own, in
one piece or several, mostly with an end of sending after them. Some connections are left open: the bridge has to close them.
Four times all clients pause: then the bridge must have as many threads, files and children as before the first request.
What was wrong is saved as a file that --replay sends again. Linux (it looks into /proc); `claude` is tests/fake_claude.py.
"""
from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS)]

from mutations import Answered, Judge, Mutations, Sent, Wrong, is_failed_run, read_all, read_answer  # noqa: E402

BRIDGE = TESTS.parent / "claude_api_bridge.py"
ROUNDS = (0.1, 0.4, 0.7, 1.0)                           # when all clients pause, as a part of all requests
BOUND_SECONDS = 120                                     # an answer is there by then: a full queue before it, on a slow machine
CLOSED_SECONDS = 75                                     # and so is the end of a connection on which nothing comes
SETTLE_SECONDS = 120                                    # a process that waits for the results of tools does so for a minute
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}                   # else glibc keeps some MB for each of its arenas, and hides what the bridge keeps
OPEN_CONNECTIONS = 60                                   # left for the bridge to close, at most so many
MAY_GROW_BYTES = 6 << 20                                # memory, from the first tenth to the end
GOOD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Bridge:
    """A bridge as a process, its tokens, and what /proc tells of it."""

    def __init__(self, folder: Path) -> None:
        fake = folder / "claude"
        (folder / "claude.py").write_text("import sys\nsys.path.insert(0, %r)\nimport fake_claude\nsys.exit(fake_claude.main(%r))\n"
                                          % (str(TESTS), str(folder)))
        fake.write_text("#!/bin/sh\nexec %s -S %s \"$@\"\n" % (shlex.quote(sys.executable), shlex.quote(str(folder / "claude.py"))))
        fake.chmod(0o755)
        self.errors, secret = folder / "stderr", ""
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(BRIDGE), "start", "--no-tunnel", "--host", "127.0.0.1", "--port", "0", "--rate-limit", "0",
                 "--data-dir", str(folder / "data"), "--claude", str(fake)],
                env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(folder), **ONE_ARENA}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        assert self.process.stdout is not None
        for line in (raw.decode().strip() for raw in self.process.stdout):
            if line.startswith("cab-"):
                secret = line
            if line.startswith("http"):
                self.port = int(line.rpartition(":")[2])
                break
        else:
            raise SystemExit("the bridge did not start: " + self.errors.read_text("utf-8", "replace"))
        self.tokens = {"admin": secret}
        for who, mode in (("ordinary", "stateless"), ("stateful", "stateful")):
            self.tokens[who] = self.call("POST", "/api/tokens", {"name": who, "sessionMode": mode})["token"]
        self.own = {each["id"] for each in self.call("GET", "/api/tokens")["tokens"]}

    def call(self, method: str, path: str, body: Any = None, who: str = "admin") -> Dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=BOUND_SECONDS)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"Authorization": "Bearer " + self.tokens[who]})
            return dict(json.loads(connection.getresponse().read()))
        finally:
            connection.close()

    def has(self) -> Dict[str, int]:
        proc = Path("/proc/%d" % self.process.pid)
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        children = 0
        for path in proc.glob("task/*/children"):
            try:
                children += len(path.read_text().split())
            except OSError:                              # a thread that ends meanwhile
                continue
        return {"threads": int(status["Threads"]), "files": len(os.listdir(proc / "fd")), "children": children,
            "rss": int(status["VmRSS"].split()[0]) << 10}

    def settle(self, base: Optional[Mapping[str, int]] = None) -> Dict[str, int]:
        """What the bridge has once nothing runs and no conversation is warm, and no more than `base`, or after a bound."""
        for each in self.call("GET", "/api/tokens")["tokens"]:
            if each["id"] not in self.own:
                self.call("DELETE", "/api/tokens/" + each["id"])
        until, still = time.monotonic() + SETTLE_SECONDS, 0
        while True:
            queue = self.call("GET", "/api/status")["queue"]
            for each in self.call("GET", "/api/conversations", who="stateful")["conversations"] if not queue["length"] else ():
                self.call("DELETE", "/api/conversations/" + each["name"], who="stateful")
            now = self.has()
            is_idle = not queue["isProcessing"] and not queue["length"]
            is_base = base is None or all(now[name] <= base[name] for name in ("threads", "files", "children"))
            still = still + 1 if is_idle and is_base else 0
            if still >= (8 if base is None else 2) or time.monotonic() > until:
                return now
            time.sleep(0.25)

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


class Campaign:
    """The clients, and what they saw. Its numbers are changed under a lock."""

    def __init__(self, bridge: Bridge, spec: Mapping[str, Any], options: argparse.Namespace) -> None:
        self.bridge, self.options = bridge, options
        self.judge = Judge(spec, bridge.tokens["admin"])
        self.makers = [Mutations(spec, bridge.tokens, options.seed * 1_000 + n, options.runs) for n in range(options.clients)]
        self.lock = threading.Lock()
        self.counts: "Counter[str]" = Counter()
        self.statuses: "Counter[str]" = Counter()
        self.failures: List[str] = []
        self.slowest = (0.0, "")
        self.left_open: List[Tuple[socket.socket, float, bytes]] = []

    def round(self, until: int, stop_at: float) -> None:
        clients = [threading.Thread(target=self.guarded, args=(maker, until, stop_at), name="client") for maker in self.makers]
        for each in clients:
            each.start()
        for each in clients:
            each.join()

    def guarded(self, maker: Mutations, until: int, stop_at: float) -> None:
        try:
            self.client(maker, until, stop_at)
        except Exception:
            self.failed("a client failed by itself:\n" + traceback.format_exc())

    def client(self, maker: Mutations, until: int, stop_at: float) -> None:
        line = Line(self.bridge.port)
        while self.counts["sent"] < until and time.monotonic() < stop_at and len(self.failures) < self.options.most:
            if maker.is_so(self.options.raw):
                self.bytes(maker)
            else:
                self.requests(maker, line)
        line.close()

    def requests(self, maker: Mutations, line: "Line") -> None:
        """One to four requests at once on a connection that is kept."""
        batch = [maker.request() for _ in range(maker.chance.choice((1, 1, 1, 1, 2, 4)))]
        last = next((n for n, each in enumerate(batch) if is_last(each)), len(batch))
        del batch[last + 1:]                             # what comes behind it may make the end of the connection a reset
        data, began, answers = b"".join(each.data for each in batch), time.monotonic(), []
        try:
            answers = line.exchange(data, batch)
            for sent, answer in zip(batch, answers):
                self.judge.check(sent, answer)
                maker.learn(sent, answer)
        except socket.timeout:
            self.failed("hang", data, batch)
        except Wrong as error:
            self.failed(str(error), data, batch)
        except (OSError, AssertionError, LookupError, TypeError, AttributeError) as error:
            self.failed("%s: %s" % (type(error).__name__, error), data, batch)
        if maker.is_so(0.1):
            line.close()
        self.count("whole", len(batch), answers, time.monotonic() - began, batch)

    def bytes(self, maker: Mutations) -> None:
        """Some bytes on a connection of their own."""
        data, is_led, began, answers = maker.raw(), maker.is_so(0.1), time.monotonic(), []
        try:
            connection = socket.create_connection(("127.0.0.1", self.bridge.port), BOUND_SECONDS)
            with self.lock:
                is_left = len(self.left_open) < OPEN_CONNECTIONS and maker.is_so(0.002)
                if is_left:
                    self.left_open.append((connection, time.monotonic() + CLOSED_SECONDS, data))
            told = GOOD + data if is_led else data
            send(connection, told, sorted(maker.chance.randrange(len(told) + 1) for _ in range(maker.chance.choice((0, 0, 0, 1, 3)))))
            if is_left:
                return self.count("left open", 1, [], 0.0, ())
            if maker.is_so(0.97):
                shut_sending(connection)
                got = rest_of(connection)
            else:                                        # gone before the answer
                got = b""
            connection.close()
            answers = read_all(got, None if b"HEAD" in data else False)
            if is_led and got and answers[0].status != 200:
                raise Wrong("a good request before it was answered %d" % answers[0].status)
            for each in answers:
                self.judge.check_raw(each)
        except socket.timeout:
            self.failed("hang", data)
        except Wrong as error:
            if str(error).startswith("the answer breaks off") and told.count(b"HTTP/1.") > 1:
                self.count("cut off", 0, [], 0.0, ())    # the bytes behind the last request that is answered make the end a reset
            else:
                self.failed(str(error), data)
        except OSError as error:
            self.failed("%s: %s" % (type(error).__name__, error), data)
        self.count("bytes", 1, answers, time.monotonic() - began, ())

    def count(self, kind: str, sent: int, answers: Sequence[Answered], seconds: float, batch: Sequence[Sent]) -> None:
        with self.lock:
            self.counts["sent"] += sent
            self.counts[kind] += sent or 1
            self.counts["answers"] += len(answers)
            self.statuses.update("500, a failed run" if each.status == 500 and is_failed_run(each) else str(each.status)
                for each in answers)
            if seconds > self.slowest[0]:
                self.slowest = seconds, " and ".join("%s %s" % (each.method, each.target[:40]) for each in batch) or "bytes"

    def close_open(self, is_over: bool) -> None:
        """The bridge must have closed the connections that were left open long enough; at the end all are waited for."""
        for connection, until, data in self.left_open:
            connection.settimeout(max(1.0, until - time.monotonic()))
            try:
                if is_over or time.monotonic() >= until:
                    read_all(rest_of(connection), None if b"HEAD" in data else False)
            except socket.timeout:
                self.failed("a connection on which nothing comes stays open", data)
            except Wrong as error:
                self.failed(str(error), data)
            connection.close()
        self.left_open.clear()

    def failed(self, why: str, data: bytes = b"", batch: Sequence[Sent] = ()) -> None:
        for who, secret in self.bridge.tokens.items():
            data = data.replace(secret.encode(), placeholder(who, secret))
        with self.lock:
            path = Path(self.options.save) / ("fuzz-%d-%d.json" % (self.options.seed, len(self.failures)))
            self.failures.append("%s\n    %s\n    %r" % (why, path, data[:300]))
            if data:
                path.write_text(json.dumps({"why": why, "requests": len(batch), "data": base64.b64encode(data).decode()}))
        print("WRONG: " + self.failures[-1], file=sys.stderr, flush=True)


def is_last(sent: Sent) -> bool:
    """Whether the connection ends after its answer."""
    return sent.version == "1.0" or any(name == "Connection" and "close" in value for name, value in sent.headers)


def placeholder(who: str, secret: str) -> bytes:
    """Stands for a token in a saved request, as long as it is."""
    return ("<%s>" % who).ljust(len(secret), ".").encode()


class Line:
    """A connection that is kept for as long as the bridge keeps it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection: Optional[socket.socket] = None
        self._data = b""

    def close(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection, self._data = None, b""

    def exchange(self, data: bytes, batch: Sequence[Sent]) -> List[Answered]:
        """Sends the requests; the answers, fewer where one closes the connection. Raises Wrong, socket.timeout."""
        is_fresh = self._connection is None
        answers = self._try(data, batch)
        if not answers and not is_fresh:                  # it had been idle for too long
            answers = self._try(data, batch)
        if not answers:
            raise Wrong("closed without an answer")
        return answers

    def _try(self, data: bytes, batch: Sequence[Sent]) -> List[Answered]:
        connection = self._connection = self._connection or socket.create_connection(("127.0.0.1", self._port), BOUND_SECONDS)
        answers: List[Answered] = []
        try:
            send(connection, data, ())
            for sent in batch:
                one = self._answer(connection, sent.method == "HEAD")
                while one and one.status == 100:
                    if not any(name == "Expect" for name, _ in sent.headers):
                        raise Wrong("100, unasked for")
                    one = self._answer(connection, sent.method == "HEAD")
                if one:
                    answers.append(one)
                if not one or one.headers.get("connection") == "close":
                    shut_sending(connection)
                    left = self._data + (rest_of(connection) if one else b"")
                    if left:
                        raise Wrong("bytes are left over after an answer: %r" % left[:200])
                    self.close()
                    return answers
            if self._data:
                raise Wrong("bytes are left over after an answer: %r" % self._data[:200])
        except (Wrong, socket.timeout):
            self.close()
            raise
        return answers

    def _answer(self, connection: socket.socket, is_head: bool) -> Optional[Answered]:
        """The next answer; None where the connection ends before it."""
        while True:
            found = read_answer(self._data, is_head, False) if self._data else None
            if found:
                self._data = self._data[found[1]:]
                return found[0]
            more = receive(connection)
            if not more:
                if self._data:
                    found = read_answer(self._data, is_head, True)
                    self._data = b""
                return found[0] if found else None
            self._data += more


def send(connection: socket.socket, data: bytes, cuts: Sequence[int]) -> None:
    """In pieces; the bridge may have refused it before all was sent."""
    try:
        for begin, end in zip((0, *cuts), (*cuts, len(data))):
            connection.sendall(data[begin:end])
    except (BrokenPipeError, ConnectionResetError):
        pass


def shut_sending(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except ConnectionResetError:
        return b""


def rest_of(connection: socket.socket) -> bytes:
    pieces = []
    while True:
        piece = receive(connection)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


def run(options: argparse.Namespace, folder: Path) -> Dict[str, Any]:
    """-> the figures."""
    bridge = Bridge(folder)
    try:
        spec = bridge.call("GET", "/openapi.json")
        for who in bridge.tokens:                         # what is made once is there before it is counted
            bridge.call("POST", "/api/ask", {"message": "hi", "wait": 60}, who=who)
        bridge.call("GET", "/v1/models")
        base = bridge.settle()
        campaign, began, worked, marks = Campaign(bridge, spec, options), time.monotonic(), 0.0, [base]
        for part in ROUNDS:
            started = time.monotonic()
            campaign.round(int(options.count * part), began + options.seconds)
            worked += time.monotonic() - started
            campaign.close_open(part == ROUNDS[-1])
            marks.append(bridge.settle(base))
            for name in ("threads", "files", "children"):
                if marks[-1][name] > base[name]:
                    campaign.failed("%s: %d, not %d as before the first request" % (name, marks[-1][name], base[name]))
            print("%7d sent, %d wrong, %5.1f MB, %d threads, %d files" % (campaign.counts["sent"], len(campaign.failures),
                marks[-1]["rss"] / 2 ** 20,
                                                                        marks[-1]["threads"], marks[-1]["files"]), file=sys.stderr,
                                                                        flush=True)
            if len(campaign.failures) >= options.most or time.monotonic() >= began + options.seconds:
                break
        runs = bridge.call("GET", "/api/status")["stats"]["totalRequests"]
        if marks[-1]["rss"] > marks[1]["rss"] + MAY_GROW_BYTES:
            campaign.failed("memory grew from %d to %d bytes" % (marks[1]["rss"], marks[-1]["rss"]))
    finally:
        status = bridge.end()
    errors = bridge.errors.read_text("utf-8", "replace")
    if status:
        campaign.failed("the bridge ended with status %d" % status)
    for word in ("Unexpected error", 'claude_api_bridge.py", line'):           # the fake has tracebacks of its own
        if word in errors:
            campaign.failed("%s on stderr:\n%s" % (word, errors[max(0, errors.index(word) - 200):][:3_000]))
    return {"seed": options.seed, **campaign.counts, "seconds": worked, "per_second": campaign.counts["sent"] / max(worked, 0.001),
            "statuses": dict(sorted(campaign.statuses.items())), "slowest_seconds": campaign.slowest[0], "slowest": campaign.slowest[1],
            "runs": runs, "base": base, "tenth": marks[1], "end": marks[-1], "failures": campaign.failures}


def table(found: Mapping[str, Any]) -> str:
    rows = [(name, str(found.get(key, 0))) for name, key in (
        ("requests", "sent"), ("  whole, from the document", "whole"), ("  raw bytes", "bytes"), ("  left open", "left open"),
        ("  cut off", "cut off"),
        ("asks that were queued", "runs"), ("answers", "answers"))]
    rows += [("  " + status, str(count)) for status, count in found["statuses"].items()]
    rows += [("requests per second", "%.0f" % found["per_second"]), ("slowest answer", "%.2f s (%s)" % (found["slowest_seconds"],
        found["slowest"]))]
    rows += [(name + " (base, 10 %, end)", " ".join("%8.1f" % (found[mark][name] / unit) for mark in ("base", "tenth", "end")))
             for name, unit in (("rss", 2 ** 20), ("threads", 1), ("files", 1), ("children", 1))]
    rows += [("wrong", str(len(found["failures"])))]
    return "\n".join("%-28s %s" % row for row in [("seed", str(found["seed"])), *rows])


def replay(path: str, folder: Path) -> int:
    """Sends what was saved to a new bridge. -> exit status."""
    saved, bridge = json.loads(Path(path).read_text()), Bridge(folder)
    try:
        data = base64.b64decode(saved["data"])
        for who, secret in bridge.tokens.items():
            data = data.replace(placeholder(who, secret), secret.encode())
        connection = socket.create_connection(("127.0.0.1", bridge.port), BOUND_SECONDS)
        with connection:
            send(connection, data, ())
            if not saved["requests"]:
                shut_sending(connection)
            else:
                connection.settimeout(20)                 # the bridge closes an idle connection before
            got = rest_of(connection)
        print("%s\n%r\n->\n%s" % (saved["why"], data[:4_000], got[:4_000].decode("utf-8", "replace")))
        for each in read_all(got, None if b"HEAD" in data else False):
            Judge(bridge.call("GET", "/openapi.json")).check_raw(each)
    except (socket.timeout, Wrong) as error:
        print("WRONG: %s" % error)
        return 1
    finally:
        bridge.end()
        print(bridge.errors.read_text("utf-8", "replace"), file=sys.stderr)
    return 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="Sends mutated requests to a bridge, and checks what comes back.")
    parser.add_argument("--count", type=int, default=100_000, help="requests (default: 100000)")
    parser.add_argument("--seconds", type=float, default=7_200, help="the longest it may take (default: 7200)")
    parser.add_argument("--seed", type=int, default=1, help="the same one makes the same requests (default: 1)")
    parser.add_argument("--clients", type=int, default=8, help="at once (default: 8)")
    parser.add_argument("--raw", type=float, default=0.5, help="the part that is raw bytes (default: 0.5)")
    parser.add_argument("--runs", type=float, default=0.5,
        help="of the asks, the part that may be good enough to start claude (default: 0.5)")
    parser.add_argument("--most", type=int, default=50, help="give up after so many faults (default: 50)")
    parser.add_argument("--save", default=".", metavar="DIR", help="where faults are saved (default: here)")
    parser.add_argument("--replay", metavar="FILE", help="send a saved fault again")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if sys.platform != "linux":
        print("error: this needs Linux", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))          # so that the bridge ends, too
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        if options.replay:
            return replay(options.replay, Path(folder))
        found = run(options, Path(folder))
    print(json.dumps(found) if options.json else table(found))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
