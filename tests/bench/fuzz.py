"""Send mutated requests to a bridge; find errors 500, hangs, undocumented responses and leaks.

    python tests/bench/fuzz.py [--count 100000] [--seed 1] [--clients 8] [--raw 0.5] [--json]
    python tests/bench/fuzz.py --replay FILE

tests/mutations.py generates the requests, from the bridge's own /openapi.json, and judges the
responses. Clients send well-formed requests one by one or several at once, on persistent
connections. They send mutated bytes on a connection of their own, in one piece or several, and
mostly end the sending direction afterwards. They leave some connections open, which the bridge has
to close.

Four times all clients pause. Then the bridge must have as many threads, files and children as
before the first request. The program saves each failure in a file that --replay sends again.
Linux only (it reads /proc); `claude` is tests/fake_claude.py.
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

from common import children_of  # noqa: E402
from mutations import (  # noqa: E402
    Judge, Mutations, Request, Response, Violation, is_failed_run, read_all, read_response,
)

BRIDGE = TESTS.parent / "claude_api_bridge.py"
# When all clients pause, as shares of all requests.
ROUNDS = (0.1, 0.4, 0.7, 1.0)
# Longest time for a response, behind a full queue on a slow machine.
BOUND_SECONDS = 120
# Longest time after which the bridge closes a connection without traffic.
CLOSED_SECONDS = 75
# Longest time for the bridge to become idle: a process waits a minute for the results of tools.
SETTLE_SECONDS = 120
# By default glibc keeps some MB for each of its arenas, which hides a leak of the bridge.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
# Most connections that are left open at a time.
OPEN_CONNECTIONS = 60
# Allowed growth of the memory, from the first tenth to the end.
MAY_GROW_BYTES = 6 << 20
GOOD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
FAKE_SCRIPT = """import sys
sys.path.insert(0, %r)
import fake_claude
sys.exit(fake_claude.main(%r))
"""


class Bridge:
    """A bridge as a process, its tokens, and its resources according to /proc."""

    def __init__(self, folder: Path) -> None:
        fake, script = folder / "claude", folder / "claude.py"
        script.write_text(FAKE_SCRIPT % (str(TESTS), str(folder)))
        interpreter = shlex.quote(sys.executable)
        fake.write_text('#!/bin/sh\nexec %s -S %s "$@"\n' % (interpreter, shlex.quote(str(script))))
        fake.chmod(0o755)
        self.errors, secret = folder / "stderr", ""
        environ = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(folder), **ONE_ARENA}
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                [
                    sys.executable, str(BRIDGE), "start", "--no-tunnel", "--host", "127.0.0.1",
                    "--port", "0", "--rate-limit", "0", "--data-dir", str(folder / "data"),
                    # A process that waits for the next message of a conversation is no leak.
                    "--claude", str(fake), "--warm-seconds", "1",
                ],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        for line in (raw.decode().strip() for raw in self.process.stdout):
            if line.startswith("cab-"):
                secret = line
            if line.startswith("http"):
                self.port = int(line.rpartition(":")[2])
                break
        else:
            text = self.errors.read_text("utf-8", "replace")
            raise SystemExit("the bridge did not start: " + text)
        self.tokens = {"admin": secret}
        for role, mode in (("ordinary", "stateless"), ("stateful", "stateful")):
            fields = {"name": role, "sessionMode": mode}
            self.tokens[role] = self.call("POST", "/api/tokens", fields)["token"]
        self.token_ids = {token["id"] for token in self.call("GET", "/api/tokens")["tokens"]}

    def call(self, method: str, path: str, body: Any = None, role: str = "admin") -> Dict[str, Any]:
        """Send a request; return the JSON body of the response."""
        data = None if body is None else json.dumps(body)
        headers = {"Authorization": "Bearer " + self.tokens[role]}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=BOUND_SECONDS)
        try:
            connection.request(method, path, data, headers)
            return dict(json.loads(connection.getresponse().read()))
        finally:
            connection.close()

    def resources(self) -> Dict[str, int]:
        """Return the numbers of threads, files and children, and the memory in bytes."""
        proc = Path("/proc/%d" % self.process.pid)
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return {
            "threads": int(status["Threads"]),
            "files": len(os.listdir(proc / "fd")),
            "children": children_of(self.process.pid),
            "rss": int(status["VmRSS"].split()[0]) << 10,
        }

    def settle(self, base: Optional[Mapping[str, int]] = None) -> Dict[str, int]:
        """Wait until the bridge is idle and has no more resources than `base`; return them.

        It deletes the new tokens and the conversations. After a bound it returns in any case.
        """
        for token in self.call("GET", "/api/tokens")["tokens"]:
            if token["id"] not in self.token_ids:
                self.call("DELETE", "/api/tokens/" + token["id"])
        deadline, idle_rounds = time.monotonic() + SETTLE_SECONDS, 0
        while True:
            queue = self.call("GET", "/api/status")["queue"]
            if not queue["length"]:
                self._delete_conversations()
            now = self.resources()
            is_idle = not queue["isProcessing"] and not queue["length"]
            is_base = base is None or all(
                now[name] <= base[name] for name in ("threads", "files", "children")
            )
            idle_rounds = idle_rounds + 1 if is_idle and is_base else 0
            if idle_rounds >= (8 if base is None else 2) or time.monotonic() > deadline:
                return now
            time.sleep(0.25)

    def _delete_conversations(self) -> None:
        body = self.call("GET", "/api/conversations", role="stateful")
        for row in body["conversations"]:
            self.call("DELETE", "/api/conversations/" + row["name"], role="stateful")

    def end(self) -> int:
        """Shut the bridge down; return its exit status."""
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
    """The clients and their results. The lock guards the results."""

    def __init__(
        self, bridge: Bridge, spec: Mapping[str, Any], options: argparse.Namespace
    ) -> None:
        self.bridge, self.options = bridge, options
        self.judge = Judge(spec, bridge.tokens["admin"])
        self.generators = [
            Mutations(spec, bridge.tokens, options.seed * 1_000 + n, options.runs)
            for n in range(options.clients)
        ]
        self.lock = threading.Lock()
        self.counts: "Counter[str]" = Counter()
        self.statuses: "Counter[str]" = Counter()
        self.failures: List[str] = []
        self.slowest = (0.0, "")
        self.left_open: List[Tuple[socket.socket, float, bytes]] = []

    def round(self, until: int, stop_at: float) -> None:
        """Run all clients until so many requests are sent in total, or until a time."""
        clients = [
            threading.Thread(target=self.guarded, args=(mutations, until, stop_at), name="client")
            for mutations in self.generators
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def guarded(self, mutations: Mutations, until: int, stop_at: float) -> None:
        try:
            self.client(mutations, until, stop_at)
        except Exception:
            self.failed("a client failed by itself:\n" + traceback.format_exc())

    def client(self, mutations: Mutations, until: int, stop_at: float) -> None:
        line = Line(self.bridge.port)
        while (
            self.counts["sent"] < until
            and time.monotonic() < stop_at
            and len(self.failures) < self.options.most
        ):
            if mutations.happens(self.options.raw):
                self.send_bytes(mutations)
            else:
                self.requests(mutations, line)
        line.close()

    def requests(self, mutations: Mutations, line: "Line") -> None:
        """Send one to four requests at once on a persistent connection."""
        batch = [mutations.request() for _ in range(mutations.random.choice((1, 1, 1, 1, 2, 4)))]
        last = next((n for n, request in enumerate(batch) if is_last(request)), len(batch))
        # Bytes after it can make the end of the connection a reset.
        del batch[last + 1 :]
        data = b"".join(request.data for request in batch)
        start = time.monotonic()
        responses: List[Response] = []
        try:
            responses = line.exchange(data, batch)
            for request, response in zip(batch, responses):
                self.judge.check(request, response)
                mutations.learn(request, response)
        except socket.timeout:
            self.failed("hang", data, batch)
        except Violation as error:
            self.failed(str(error), data, batch)
        except (OSError, AssertionError, LookupError, TypeError, AttributeError) as error:
            self.failed("%s: %s" % (type(error).__name__, error), data, batch)
        if mutations.happens(0.1):
            line.close()
        self.count("whole", len(batch), responses, time.monotonic() - start, batch)

    def send_bytes(self, mutations: Mutations) -> None:
        """Send mutated bytes on a connection of their own, sometimes after a good request."""
        data, is_led = mutations.raw(), mutations.happens(0.1)
        start = time.monotonic()
        responses: List[Response] = []
        payload = GOOD + data if is_led else data
        try:
            connection = socket.create_connection(("127.0.0.1", self.bridge.port), BOUND_SECONDS)
            with self.lock:
                is_left = len(self.left_open) < OPEN_CONNECTIONS and mutations.happens(0.002)
                if is_left:
                    self.left_open.append((connection, time.monotonic() + CLOSED_SECONDS, data))
            cuts = [
                mutations.random.randrange(len(payload) + 1)
                for _ in range(mutations.random.choice((0, 0, 0, 1, 3)))
            ]
            send(connection, payload, sorted(cuts))
            if is_left:
                return self.count("left open", 1, [], 0.0, ())
            # Otherwise the client leaves before the response.
            received = b""
            if mutations.happens(0.97):
                shut_sending(connection)
                received = rest_of(connection)
            connection.close()
            responses = read_all(received, None if b"HEAD" in data else False)
            if is_led and received and responses[0].status != 200:
                raise Violation("the good request before it got a %d" % responses[0].status)
            for response in responses:
                self.judge.check_raw(response)
        except socket.timeout:
            self.failed("hang", data)
        except Violation as error:
            is_cut_off = str(error).startswith("the response is cut off")
            if is_cut_off and payload.count(b"HTTP/1.") > 1:
                # Bytes after the last answered request make the end of the connection a reset.
                self.count("cut off", 0, [], 0.0, ())
            else:
                self.failed(str(error), data)
        except OSError as error:
            self.failed("%s: %s" % (type(error).__name__, error), data)
        self.count("bytes", 1, responses, time.monotonic() - start, ())

    def count(
        self,
        kind: str,
        sent: int,
        responses: Sequence[Response],
        seconds: float,
        batch: Sequence[Request],
    ) -> None:
        """Add a result to the figures."""
        with self.lock:
            self.counts["sent"] += sent
            self.counts[kind] += sent or 1
            self.counts["answers"] += len(responses)
            for response in responses:
                is_run = response.status == 500 and is_failed_run(response)
                self.statuses["500, a failed run" if is_run else str(response.status)] += 1
            if seconds > self.slowest[0]:
                names = ["%s %s" % (request.method, request.target[:40]) for request in batch]
                self.slowest = (seconds, " and ".join(names) or "bytes")

    def close_open(self, is_over: bool) -> None:
        """Check that the bridge closes the connections that were left open.

        At the end it waits for all of them; before, it drops the recent ones.
        """
        for connection, deadline, data in self.left_open:
            connection.settimeout(max(1.0, deadline - time.monotonic()))
            try:
                if is_over or time.monotonic() >= deadline:
                    read_all(rest_of(connection), None if b"HEAD" in data else False)
            except socket.timeout:
                self.failed("a connection without traffic stays open", data)
            except Violation as error:
                self.failed(str(error), data)
            connection.close()
        self.left_open.clear()

    def failed(self, why: str, data: bytes = b"", batch: Sequence[Request] = ()) -> None:
        """Record a failure, and save its data without the tokens."""
        for role, secret in self.bridge.tokens.items():
            data = data.replace(secret.encode(), placeholder(role, secret))
        with self.lock:
            name = "fuzz-%d-%d.json" % (self.options.seed, len(self.failures))
            path = Path(self.options.save) / name
            self.failures.append("%s\n    %s\n    %r" % (why, path, data[:300]))
            if data:
                encoded = base64.b64encode(data).decode()
                record = {"why": why, "requests": len(batch), "data": encoded}
                path.write_text(json.dumps(record))
        print("WRONG: " + self.failures[-1], file=sys.stderr, flush=True)


def is_last(request: Request) -> bool:
    """Return whether the connection ends after the response."""
    return request.version == "1.0" or any(
        name == "Connection" and "close" in value for name, value in request.headers
    )


def placeholder(role: str, secret: str) -> bytes:
    """Return a replacement for a token in a saved request, of the same length."""
    return ("<%s>" % role).ljust(len(secret), ".").encode()


class Line:
    """A connection that stays open until the bridge closes it; then the next request opens one."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection: Optional[socket.socket] = None
        self._data = b""

    def close(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection, self._data = None, b""

    def exchange(self, data: bytes, batch: Sequence[Request]) -> List[Response]:
        """Send the requests; return the responses, fewer if one closes the connection.

        Raises Violation, socket.timeout.
        """
        is_fresh = self._connection is None
        responses = self._try(data, batch)
        if not responses and not is_fresh:
            # The connection had been idle for too long.
            responses = self._try(data, batch)
        if not responses:
            raise Violation("closed without a response")
        return responses

    def _try(self, data: bytes, batch: Sequence[Request]) -> List[Response]:
        if self._connection is None:
            address = ("127.0.0.1", self._port)
            self._connection = socket.create_connection(address, BOUND_SECONDS)
        connection = self._connection
        responses: List[Response] = []
        try:
            send(connection, data, ())
            for request in batch:
                response = self._response(connection, request)
                if response:
                    responses.append(response)
                if not response or response.headers.get("connection") == "close":
                    shut_sending(connection)
                    extra = self._data + (rest_of(connection) if response else b"")
                    if extra:
                        raise Violation("extra bytes after a response: %r" % extra[:200])
                    self.close()
                    return responses
            if self._data:
                raise Violation("extra bytes after a response: %r" % self._data[:200])
        except (Violation, socket.timeout):
            self.close()
            raise
        return responses

    def _response(self, connection: socket.socket, request: Request) -> Optional[Response]:
        """Return the final response to a request, or None if the connection ends before it."""
        while True:
            response = self._next_response(connection, request.method == "HEAD")
            if response is None or response.status != 100:
                return response
            if not any(name == "Expect" for name, _ in request.headers):
                raise Violation("a 100 without Expect")

    def _next_response(self, connection: socket.socket, is_head: bool) -> Optional[Response]:
        """Return the next response, or None if the connection ends before it."""
        while True:
            parsed = read_response(self._data, is_head, False) if self._data else None
            if parsed:
                self._data = self._data[parsed[1] :]
                return parsed[0]
            more = receive(connection)
            if not more:
                if self._data:
                    parsed = read_response(self._data, is_head, True)
                    self._data = b""
                return parsed[0] if parsed else None
            self._data += more


def send(connection: socket.socket, data: bytes, cuts: Sequence[int]) -> None:
    """Send the data, cut at these positions. The bridge may refuse it before all is sent."""
    try:
        for begin, end in zip((0, *cuts), (*cuts, len(data))):
            connection.sendall(data[begin:end])
    except (BrokenPipeError, ConnectionResetError):
        pass


def shut_sending(connection: socket.socket) -> None:
    """End the sending direction, if the connection is still open."""
    try:
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def receive(connection: socket.socket) -> bytes:
    """Return the next bytes, or none at the end; a reset counts as the end."""
    try:
        return connection.recv(1 << 16)
    except ConnectionResetError:
        return b""


def rest_of(connection: socket.socket) -> bytes:
    """Return all bytes up to the end of the connection."""
    pieces = []
    while True:
        piece = receive(connection)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


def run(options: argparse.Namespace, folder: Path) -> Dict[str, Any]:
    """Run the rounds; return the figures."""
    bridge = Bridge(folder)
    try:
        spec = bridge.call("GET", "/openapi.json")
        # Create what is created once, before the resources are counted.
        for role in bridge.tokens:
            bridge.call("POST", "/api/ask", {"message": "hi", "wait": 60}, role=role)
        bridge.call("GET", "/v1/models")
        base = bridge.settle()
        campaign = Campaign(bridge, spec, options)
        stop_at = time.monotonic() + options.seconds
        worked, marks = 0.0, [base]
        for part in ROUNDS:
            round_start = time.monotonic()
            campaign.round(int(options.count * part), stop_at)
            worked += time.monotonic() - round_start
            campaign.close_open(part == ROUNDS[-1])
            now = bridge.settle(base)
            marks.append(now)
            for name in ("threads", "files", "children"):
                if now[name] > base[name]:
                    details = (name, now[name], base[name])
                    campaign.failed("%s: %d, not %d as before the first request" % details)
            sent, failures = campaign.counts["sent"], len(campaign.failures)
            figures = (sent, failures, now["rss"] / 2**20, now["threads"], now["files"])
            line = "%7d sent, %d wrong, %5.1f MB, %d threads, %d files" % figures
            print(line, file=sys.stderr, flush=True)
            if failures >= options.most or time.monotonic() >= stop_at:
                break
        runs = bridge.call("GET", "/api/status")["stats"]["totalRequests"]
        if marks[-1]["rss"] > marks[1]["rss"] + MAY_GROW_BYTES:
            campaign.failed("memory grew from %d to %d bytes" % (marks[1]["rss"], marks[-1]["rss"]))
    finally:
        status = bridge.end()
    errors = bridge.errors.read_text("utf-8", "replace")
    if status:
        campaign.failed("the bridge ended with status %d" % status)
    # The fake prints tracebacks of its own.
    for words in ("Unexpected error", 'claude_api_bridge.py", line'):
        if words in errors:
            excerpt = errors[max(0, errors.index(words) - 200) :][:3_000]
            campaign.failed("%s on stderr:\n%s" % (words, excerpt))
    return {
        "seed": options.seed,
        **campaign.counts,
        "seconds": worked,
        "per_second": campaign.counts["sent"] / max(worked, 0.001),
        "statuses": dict(sorted(campaign.statuses.items())),
        "slowest_seconds": campaign.slowest[0],
        "slowest": campaign.slowest[1],
        "runs": runs,
        "base": base,
        "tenth": marks[1],
        "end": marks[-1],
        "failures": campaign.failures,
    }


def table(figures: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    rows = [
        ("seed", figures["seed"]),
        ("requests", figures.get("sent", 0)),
        ("  well-formed", figures.get("whole", 0)),
        ("  raw bytes", figures.get("bytes", 0)),
        ("  left open", figures.get("left open", 0)),
        ("  cut off", figures.get("cut off", 0)),
        ("messages that were queued", figures.get("runs", 0)),
        ("responses", figures.get("answers", 0)),
    ]
    rows += [("  " + status, count) for status, count in figures["statuses"].items()]
    rows += [
        ("requests per second", "%.0f" % figures["per_second"]),
        ("slowest response", "%.2f s (%s)" % (figures["slowest_seconds"], figures["slowest"])),
    ]
    for name, unit in (("rss", 2**20), ("threads", 1), ("files", 1), ("children", 1)):
        values = ["%8.1f" % (figures[mark][name] / unit) for mark in ("base", "tenth", "end")]
        rows.append((name + " (base, 10 %, end)", " ".join(values)))
    rows.append(("wrong", len(figures["failures"])))
    return "\n".join("%-28s %s" % row for row in rows)


def replay(path: str, folder: Path) -> int:
    """Send a saved failure to a new bridge; return the exit status."""
    saved, bridge = json.loads(Path(path).read_text()), Bridge(folder)
    try:
        data = base64.b64decode(saved["data"])
        for role, secret in bridge.tokens.items():
            data = data.replace(placeholder(role, secret), secret.encode())
        connection = socket.create_connection(("127.0.0.1", bridge.port), BOUND_SECONDS)
        with connection:
            send(connection, data, ())
            if not saved["requests"]:
                shut_sending(connection)
            else:
                # The bridge closes an idle connection earlier.
                connection.settimeout(20)
            received = rest_of(connection)
        text = received[:4_000].decode("utf-8", "replace")
        print("%s\n%r\n->\n%s" % (saved["why"], data[:4_000], text))
        for response in read_all(received, None if b"HEAD" in data else False):
            Judge(bridge.call("GET", "/openapi.json")).check_raw(response)
    except (socket.timeout, Violation) as error:
        print("WRONG: %s" % error)
        return 1
    finally:
        bridge.end()
        print(bridge.errors.read_text("utf-8", "replace"), file=sys.stderr)
    return 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description="Send mutated requests to a bridge, and check the responses."
    )
    parser.add_argument("--count", type=int, default=100_000, help="requests (default: 100000)")
    parser.add_argument(
        "--seconds", type=float, default=7_200, help="most seconds (default: 7200)"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the requests (default: 1)"
    )
    parser.add_argument("--clients", type=int, default=8, help="clients at once (default: 8)")
    parser.add_argument(
        "--raw", type=float, default=0.5, help="share of raw bytes (default: 0.5)"
    )
    parser.add_argument(
        "--runs",
        type=float,
        default=0.5,
        help="share of the messages that may be valid and start claude (default: 0.5)",
    )
    parser.add_argument(
        "--most", type=int, default=50, help="stop after so many failures (default: 50)"
    )
    parser.add_argument(
        "--save", default=".", metavar="DIR", help="folder for failures (default: here)"
    )
    parser.add_argument("--replay", metavar="FILE", help="send a saved failure again")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if sys.platform != "linux":
        print("error: this needs Linux", file=sys.stderr)
        return 2
    # An exit, unlike a death by the signal, ends the bridge, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        if options.replay:
            return replay(options.replay, Path(folder))
        figures = run(options, Path(folder))
    print(json.dumps(figures) if options.json else table(figures))
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
