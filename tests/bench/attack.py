"""Attack a bridge in many ways, one after the other, and measure the effect on a good client.

    python tests/bench/attack.py [--only WORDS] [--scale 1.0] [--seconds 10] [--json]

The bridge is a process of its own over a fake CLI, with its default limits except `--rate-limit`.
The good client is a process, too. Every 20 ms it polls a request of its own: nine times of ten on
its open connection, otherwise on a new one. The bridge must never refuse it; if the bridge evicts
its connection, the poll must succeed on the next one. Memory, threads and files of the bridge come
from /proc (Linux only). Each attack has an address of its own in 127.0.0.0/8.
Exit status 1 if a promise is broken; the promises are listed below the table.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import http.client
import itertools
import json
import os
import random
import re
import resource
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Awaitable, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from common import cpu_seconds

TESTS = Path(__file__).resolve().parent.parent
BRIDGE = TESTS.parent / "claude_api_bridge.py"
# The good client alone makes 300 requests a minute in addition to its polls.
RATE_LIMIT = 6000
POLL_SECONDS = 0.02
# Longest time that anything here waits.
PATIENCE_SECONDS = 60.0
# Numbers of idle connections and of slow clients.
IDLE, SLOW = 1000, 256

FAKE = """import os, sys, time
sys.path.insert(0, %(tests)r)
import fake_claude

def act_pour(self, rest):
    '''pour MIB GATE: print so much text, then a delta every 20 s until the file GATE exists.'''
    size, _, gate = rest.partition(" ")
    for _ in range(int(size) << 4):
        self.delta("x" * 65536)
    for turn in range(6000):
        if os.path.exists(gate):
            break
        time.sleep(0.05)
        if turn %% 400 == 399:
            self.delta(".")
    self.result("done")

fake_claude.Fake.act_pour = act_pour
sys.exit(fake_claude.main(%(folder)r))
"""


# --- the bridge, and its resources ---


class Bridge:
    """The program under attack. files: limit of its open files (0: no limit)."""

    def __init__(self, folder: Path, files: int = 0) -> None:
        def limit_files() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

        folder.mkdir()
        script, claude = folder / "claude.py", folder / "claude"
        script.write_text(FAKE % {"tests": str(TESTS), "folder": str(folder)})
        claude.write_text("#!/bin/sh\nexec '%s' -S '%s' \"$@\"\n" % (sys.executable, script))
        claude.chmod(0o755)
        self.errors = folder / "stderr"
        with open(str(self.errors), "wb") as errors:
            self.program = subprocess.Popen(
                [
                    sys.executable, str(BRIDGE), "start", "--no-tunnel", "--host", "127.0.0.1",
                    "--port", "0", "--rate-limit", str(RATE_LIMIT), "--data-dir",
                    str(folder / "data"), "--claude", str(claude),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"},
                preexec_fn=limit_files if files else None,
            )
        assert self.program.stdout is not None
        self.pid, self.admin, self.port = self.program.pid, "", 0
        for line in (raw.decode().strip() for raw in self.program.stdout):
            if line.startswith("cab-"):
                self.admin = line
            if line.startswith("http"):
                self.port = int(line.rpartition(":")[2])
                break
        else:
            raise SystemExit("the bridge did not start: " + self.errors.read_text())

    def gauges(self) -> Tuple[float, int, int]:
        """Return (memory in MB, threads, open files)."""
        lines = Path("/proc/%d/status" % self.pid).read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        files = len(os.listdir("/proc/%d/fd" % self.pid))
        return int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"]), files

    def call(self, token: str, method: str, path: str, body: Any = None) -> Tuple[int, Any]:
        """Send a request; return (status, JSON of the response)."""
        data = None if body is None else json.dumps(body)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        try:
            connection.request(method, path, data, {"Authorization": "Bearer " + token})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def ask(self, token: str, message: str) -> str:
        """Send a message; return the id of the request."""
        status, body = self.call(token, "POST", "/api/ask", {"message": message})
        if status != 202:
            raise SystemExit("not queued: %r" % body)
        return str(body["requestId"])

    def wait_for(self, token: str, job: str, status: str) -> None:
        """Wait until a request has this status."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.call(token, "GET", "/api/ask/" + job + "?wait=0.1")[1]["status"] != status:
            if time.monotonic() > deadline:
                raise SystemExit("request %s is not %s" % (job, status))
            time.sleep(0.05)

    def end(self) -> int:
        """Shut the bridge down; return its exit status."""
        self.program.send_signal(signal.SIGTERM)
        assert self.program.stdout is not None
        try:
            return self.program.wait(30)
        except subprocess.TimeoutExpired:
            self.program.kill()
            return self.program.wait(30)
        finally:
            self.program.stdout.close()


class Gauge(threading.Thread):
    """Records the peaks of a bridge until `stop`."""

    def __init__(self, bridge: Bridge) -> None:
        super().__init__(name="gauge", daemon=True)
        self.bridge = bridge
        self.peak = bridge.gauges()
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.05):
            try:
                memory, threads, files = self.bridge.gauges()
            except OSError:
                # The bridge has died, which `campaign` reports.
                return
            most_memory, most_threads, most_files = self.peak
            self.peak = (
                max(memory, most_memory),
                max(threads, most_threads),
                max(files, most_files),
            )

    def stop(self) -> Tuple[float, int, int]:
        """Return the peaks."""
        self._stopped.set()
        self.join(10)
        return self.peak


# --- the good client, a process of its own ---


def be_good(port: int, token: str) -> None:
    """Poll for ever. A line on stdin names the path of the polls from now on.

    The figures of the polls of the previous path go to stdout.
    """
    path, current, lock = "", fresh_figures(), threading.Lock()
    # Start of the poll that has no response yet, or 0.
    poll_start = 0.0

    def listen() -> None:
        nonlocal path, current
        for line in sys.stdin:
            with lock:
                figures, current, path = current, fresh_figures(), line.strip()
                if poll_start:
                    # The poll without a response took at least so long.
                    seconds = [*figures["seconds"], time.perf_counter() - poll_start]
                    figures = {**figures, "seconds": seconds}
            print(json.dumps(figures), flush=True)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    connection: Optional[http.client.HTTPConnection] = None
    for turn in itertools.count():
        start = time.perf_counter()
        with lock:
            target, figures = path, current
            poll_start = start if target else 0.0
        if not target:
            time.sleep(POLL_SECONDS)
            continue
        if turn % 10 == 0 and connection is not None:
            connection.close()
        for attempt in (1, 2):
            try:
                connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                connection.request("GET", target, headers={"Authorization": "Bearer " + token})
                response = connection.getresponse()
                response.read()
                status = str(response.status)
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
                if connection is not None:
                    connection.close()
            if status in ("200", "202"):
                break
            figures["lost" if attempt == 1 else "failed"].append(status)
        with lock:
            figures["seconds"].append(time.perf_counter() - start)
            poll_start = 0.0
        time.sleep(max(0.0, POLL_SECONDS - (time.perf_counter() - start)))


def fresh_figures() -> Dict[str, List[Any]]:
    """Return empty figures: the times, and the failures of first and of second attempts."""
    return {"seconds": [], "lost": [], "failed": []}


class GoodClient:
    """The process of the good client."""

    def __init__(self, port: int, token: str) -> None:
        self._child = subprocess.Popen(
            [sys.executable, __file__, "--good", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "CAB_GOOD_TOKEN": token},
        )

    def follow(self, path: str) -> Dict[str, List[Any]]:
        """Change the path of the polls ("": no polls); return the figures of the previous path."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(path.encode() + b"\n")
        self._child.stdin.flush()
        return dict(json.loads(self._child.stdout.readline()))

    def end(self) -> None:
        self._child.kill()
        self._child.wait(10)
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()


# --- the connections of the attackers ---


class Connection:
    """A connection of an attacker.

    buffer_bytes: of the receive buffer (0: the default).  source: its address.
    """

    def __init__(self, field: "Field", buffer_bytes: int = 0, source: str = "") -> None:
        self.field = field
        self.loop = asyncio.get_running_loop()
        self.socket = socket.socket()
        self.socket.setblocking(False)
        if buffer_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self.socket.bind((source or field.address, 0))

    async def open(self, seconds: float = 30.0) -> "Connection":
        """Connect; return the connection itself."""
        address = ("127.0.0.1", self.field.bridge.port)
        try:
            await asyncio.wait_for(self.loop.sock_connect(self.socket, address), seconds)
        except BaseException:
            self.socket.close()
            raise
        return self

    async def send(self, data: bytes, seconds: float = 30.0) -> bool:
        """Send data; return whether the connection took all of it."""
        try:
            await asyncio.wait_for(self.loop.sock_sendall(self.socket, data), seconds)
            return True
        except (OSError, asyncio.TimeoutError):
            return False

    async def receive(self, seconds: float = 20.0, answers: int = 0) -> Tuple[bytes, str]:
        """Receive until the end of the connection, `answers` responses, or the end of the time.

        Return (the data, the reason: reset, closed, answered or open).
        """
        received, deadline = bytearray(), time.monotonic() + seconds
        while time.monotonic() < deadline:
            rest = max(0.01, deadline - time.monotonic())
            try:
                data = await asyncio.wait_for(self.loop.sock_recv(self.socket, 1 << 16), rest)
            except asyncio.TimeoutError:
                break
            except OSError:
                return bytes(received), "reset"
            if not data:
                return bytes(received), "closed"
            received += data
            if answers and len(STATUS.findall(received)) >= answers:
                return bytes(received), "answered"
        return bytes(received), "open"

    def is_closed(self) -> bool:
        """Return whether the bridge has closed it; discard the data that arrived before."""
        try:
            while self.socket.recv(1 << 16):
                pass
            return True
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self, resets: bool = False) -> None:
        if resets:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


class Field:
    """The means of an attack, and its results.

    token: of the attacker.  finished: a request with a response of 9 MiB.
    job: the running request.  waiting: a queued request.
    """

    def __init__(
        self,
        bridge: Bridge,
        number: int,
        options: argparse.Namespace,
        token: str,
        finished: str,
        job: str,
        waiting: str,
    ) -> None:
        self.bridge = bridge
        self.address = "127.0.%d.1" % (number + 1)
        self.scale = options.scale
        self.seconds = options.seconds
        self.token = token
        self.finished = finished
        self.job = job
        self.waiting = waiting
        self.random = random.Random(options.seed)
        self.attempts = 0
        self.answers: "Counter[str]" = Counter()
        self.broken: List[str] = []

    def count(self, whole: int) -> int:
        """Return a number of connections or requests, scaled."""
        return max(1, int(whole * self.scale))

    def note(self, outcome: str) -> None:
        """Count an outcome."""
        self.attempts += 1
        self.answers[outcome] += 1

    def record(self, data: bytes, end: str, expected: Sequence[str] = (), name: str = "") -> None:
        """Count an outcome, for example as `400 closed`.

        expected: the right outcomes, by their statuses; `-` stands for no response.
        """
        statuses = ",".join(status.decode() for status in STATUS.findall(data)[:4]) or "-"
        self.note(statuses + ("" if end == "answered" else " " + end))
        if expected and statuses not in expected:
            details = (name, statuses, end, "/".join(expected), bytes(data[:80]))
            self.broken.append("%s: %s %s, not %s (%r)" % details)

    def request(
        self, line: str, *headers: str, body: bytes = b"", token: Optional[str] = None
    ) -> bytes:
        """Return a request. token: "" for none, None for the token of the attacker."""
        key = self.token if token is None else token
        lines = [line + " HTTP/1.1", "Host: localhost"]
        if key:
            lines.append("Authorization: Bearer " + key)
        return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body

    def post(
        self, body: bytes, *headers: str, token: Optional[str] = None, path: str = "/api/ask"
    ) -> bytes:
        """Return a POST with a Content-Length."""
        length = "Content-Length: %d" % len(body)
        return self.request("POST " + path, length, *headers, body=body, token=token)


Attack = Callable[[Field], Awaitable[None]]
ATTACKS: List[Tuple[str, Attack]] = []


def attack(name: str) -> Callable[[Attack], Attack]:
    """Add a function to the attacks."""

    def add(function: Attack) -> Attack:
        ATTACKS.append((name, function))
        return function

    return add


async def crowd(count: int, one: Callable[[int], Awaitable[None]], at_once: int = 64) -> None:
    """Run `one` with the numbers below `count`, at most `at_once` at a time."""
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(work() for _ in range(min(count, at_once))))


async def exchange(
    field: Field,
    sent: bytes,
    expected: Sequence[str] = (),
    name: str = "",
    seconds: float = 20.0,
    answers: int = 0,
    ends: bool = False,
    cut: int = 0,
) -> bytes:
    """Open a connection, send, receive and close; return the received data.

    ends: end the sending direction before receiving.  cut: bytes in a first packet of their own.
    """
    try:
        connection = await Connection(field).open()
    except (OSError, asyncio.TimeoutError) as error:
        field.note(type(error).__name__)
        return b""
    try:
        if cut:
            await connection.send(sent[:cut])
            await asyncio.sleep(0.01)
        await connection.send(sent[cut:])
        if ends:
            try:
                connection.socket.shutdown(socket.SHUT_WR)
            except OSError:
                pass
        data, end = await connection.receive(seconds, answers)
        field.record(data, end, expected, name)
        return data
    finally:
        connection.close()


# --- 1. heads ---

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"POST /api/ask HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: "
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"

# Name, bytes before HIDDEN, and the right statuses: no response to HIDDEN may be among them.
SMUGGLES: Sequence[Tuple[str, bytes, Sequence[str]]] = (
    ("both lengths", CHUNKED + b"chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + HIDDEN, ["400"]),
    (
        "both lengths, other order",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        ["400"],
    ),
    ("TE: xchunked", CHUNKED + b"xchunked\r\n\r\n0\r\n\r\n" + HIDDEN, ["501"]),
    ("TE: chunked, identity", CHUNKED + b"chunked, identity\r\n\r\n0\r\n\r\n" + HIDDEN, ["501"]),
    ("TE: gzip, chunked", CHUNKED + b"gzip, chunked\r\n\r\n0\r\n\r\n" + HIDDEN, ["501"]),
    ("TE with a vertical tab", CHUNKED + b"\x0bchunked\r\n\r\n0\r\n\r\n" + HIDDEN, ["400"]),
    (
        "TE twice",
        CHUNKED + b"chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + HIDDEN,
        ["400"],
    ),
    (
        "TE behind a space",
        POST + b" Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        ["400"],
    ),
    (
        "TE in HTTP/1.0",
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        ["400"],
    ),
    (
        "two lengths",
        POST + b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n" + HIDDEN,
        ["400"],
    ),
    (
        "the same length twice",
        POST + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
        ["400"],
    ),
    *(
        (
            "length %s" % value.decode(),
            POST + b"Content-Length: " + value + b"\r\n\r\n" + HIDDEN,
            ["400"],
        )
        for value in (b"0, 0", b"+0", b"-1", b"0x0", b"1e1", b"", b"9" * 30, b"1_0", "٣".encode())
    ),
    ("bare LF at each line", HIDDEN.replace(b"\r\n", b"\n") + HIDDEN, ["400"]),
    ("bare LF in a value", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\n" + HIDDEN, ["400"]),
    (
        "bare LF before the blank line",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\n\r\n" + HIDDEN,
        ["400"],
    ),
    ("bare LF behind the request line", b"GET / HTTP/1.0x\n\r\n" + HIDDEN, ["400"]),
    ("CR only", b"GET / HTTP/1.1\rHost: localhost\r\r" + HIDDEN, ["400"]),
    ("CR in a value", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\rY: b\r\n\r\n" + HIDDEN, ["400"]),
    ("folded line", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n" + HIDDEN, ["400"]),
    (
        "space before the colon",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length : 44\r\n\r\n" + HIDDEN,
        ["400"],
    ),
    ("no name", b"GET / HTTP/1.1\r\nHost: localhost\r\n: a\r\n\r\n" + HIDDEN, ["400"]),
    ("no colon", b"GET / HTTP/1.1\r\nHost: localhost\r\nX\r\n\r\n" + HIDDEN, ["400"]),
    ("Host twice", b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n" + HIDDEN, ["400"]),
    ("no Host", b"GET / HTTP/1.1\r\n\r\n" + HIDDEN, ["400"]),
    (
        "Authorization twice",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n"
        b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n" + HIDDEN,
        ["400"],
    ),
    (
        "a foreign Host",
        b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n" + HIDDEN,
        ["421"],
    ),
    ("NUL in the line", b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN, ["400"]),
    ("NUL in a value", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n" + HIDDEN, ["400"]),
    ("HTTP/0.9", b"GET /\r\n" + HIDDEN, ["400"]),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HIDDEN, ["400", "505"]),
    (
        "HTTP/1.2 is like 1.1",
        b"GET /health HTTP/1.2\r\nHost: localhost\r\nConnection: close\r\n\r\n" + HIDDEN,
        ["200"],
    ),
    ("HTTP/9.9", b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n" + HIDDEN, ["400", "505"]),
    ("two spaces", b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN, ["400"]),
    ("a tab", b"GET\t/\tHTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN, ["400"]),
    (
        "TLS hello",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x07" * 64 + b"\r\n\r\n" + HIDDEN,
        ["400"],
    ),
    (
        "CONNECT",
        b"CONNECT evil:443 HTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN,
        ["400", "405", "501"],
    ),
    (
        "unknown method",
        b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN,
        ["400", "405", "501"],
    ),
    (
        "an unread body is not a request",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
        ["200"],
    ),
    ("HTTP/1.0 closes", b"GET /health HTTP/1.0\r\n\r\n" + HIDDEN, ["200"]),
    (
        "HTTP/1.0 keep-alive",
        b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
        b"GET /health HTTP/1.0\r\n\r\n" + HIDDEN,
        ["200,200"],
    ),
)


@attack("smuggled requests")
async def smuggle(field: Field) -> None:
    async def one(number: int) -> None:
        name, sent, expected = SMUGGLES[number % len(SMUGGLES)]
        cut = number // len(SMUGGLES) * len(sent) // tries
        await exchange(field, sent, expected, name, cut=cut)

    tries = field.count(10)
    await crowd(tries * len(SMUGGLES), one, 16)


@attack("chunks that hide a request")
async def bad_chunks(field: Field) -> None:
    bodies = (
        b"5\r\nhello0\r\n\r\n",
        b"5\nhello\n0\n\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"5 5\r\nhello\r\n0\r\n\r\n",
        b"fffffffff\r\n",
        b"5;a=\x0b\n\r\nhello\r\n0\r\n\r\n",
        b"\r\n",
        b"5\r\nhelloX\r\n0\r\n\r\n",
        b"0\r\nX : y\r\n\r\n",
        b"0\r\n" + b"X: y\r\n" * 100 + b"\r\n",
        b"0\r\nX:" + b" " * 16_000 + b"\0\r\n\r\n",
    )
    head = field.request("POST /api/ask", "Transfer-Encoding: chunked")

    async def one(number: int) -> None:
        body = bodies[number % len(bodies)]
        await exchange(field, head + body + HIDDEN, ["400", "413"], "chunk %r" % body[:20])

    await crowd(field.count(5) * len(bodies), one, 8)


@attack("pipelining 1,000 requests")
async def pipeline(field: Field) -> None:
    connection = await Connection(field).open()
    count = field.count(1000)
    requests = HIDDEN.replace(b"/hidden", b"/health") * count
    sending = asyncio.ensure_future(connection.send(requests, PATIENCE_SECONDS))
    data, end = await connection.receive(PATIENCE_SECONDS, count)
    await sending
    connection.close()
    for status in STATUS.findall(data):
        field.note(status.decode())
    if field.answers["200"] != count:
        details = (field.answers["200"], count, end)
        field.broken.append("pipelining: %d of %d answered (%s)" % details)


@attack("pipelining, no answer read")
async def deaf_pipeline(field: Field) -> None:
    """Request public pages 80 times on each of 64 connections, and never read."""
    paths = ("/openapi.json", "/dashboard")
    sent = b"".join(field.request("GET " + path, token="") for path in paths) * 40

    async def one(number: int) -> None:
        connection = await Connection(field, 4096).open()
        taken = await connection.send(sent, field.seconds)
        await asyncio.sleep(field.seconds)
        field.note("all requests taken" if taken else "no more requests taken")
        connection.close()

    await crowd(field.count(64), one, 64)


@attack("oversized heads")
async def oversized_heads(field: Field) -> None:
    big = b"x" * (64 << 10)
    heads = (
        ("one header of 64 KiB", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + big + b"\r\n\r\n"),
        ("a line of 64 KiB", b"GET /" + big + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        ("no line end", big + big),
        (
            "64 KiB of header lines",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 11_000 + b"\r\n",
        ),
        ("endless header lines", b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 700_000),
    )

    async def one(number: int) -> None:
        name, sent = heads[number % len(heads)]
        # "-": the reset arrived before the response.
        await exchange(field, sent, ["431", "414", "-"], name)

    await crowd(field.count(50) * len(heads), one, 16)


@attack("heads for slow patterns")
async def slow_patterns(field: Field) -> None:
    values = (
        b" " * 16_000 + b"\0",
        b"a " * 8_000 + b"\0",
        b"\t " * 8_000 + b"\x7f",
        b" " * 16_000 + b"a\0",
    )

    async def one(number: int) -> None:
        value = values[number % len(values)]
        sent = b"GET / HTTP/1.1\r\nHost: localhost\r\nX:" + value + b"\r\n\r\n"
        await exchange(field, sent, ["400"], "slow pattern")

    await crowd(field.count(100), one, 8)


# --- 2. bodies ---


@attack("huge bodies")
async def huge_bodies(field: Field) -> None:
    head = "POST /api/ask"
    chunks = (b"10000\r\n" + b"x" * 65_536 + b"\r\n") * 160
    kinds: Sequence[Tuple[str, str, bytes, List[str]]] = (
        ("declared 10^15", "Content-Length: 999999999999999", b"", []),
        ("declared 8 MiB, and sent", "Content-Length: %d" % (8 << 20), b"x" * (8 << 20), ["-"]),
        ("chunked without end", "Transfer-Encoding: chunked", chunks, ["-"]),
    )
    bodies = [
        (name, field.request(head, header, token=token) + body, [status, *reset])
        for name, header, body, reset in kinds
        for token, status in (("", "401"), (None, "413"))
    ]

    async def one(number: int) -> None:
        name, sent, expected = bodies[number % len(bodies)]
        await exchange(field, sent, expected, name)

    await crowd(field.count(10) * len(bodies), one, 8)


@attack("a million chunks of one byte")
async def tiny_chunks(field: Field) -> None:
    head = field.request("POST /api/ask", "Transfer-Encoding: chunked")
    sent = head + b"2\r\n[[\r\n" * 520_000 + b"0\r\n\r\n"

    async def one(number: int) -> None:
        await exchange(field, sent, ["400"], "tiny chunks", PATIENCE_SECONDS, 1)

    await crowd(field.count(4), one, 2)


@attack("gzip bombs")
async def gzip_bombs(field: Field) -> None:
    bomb = gzip.compress(b"\0" * (64 << 20), 9)

    async def one(number: int) -> None:
        coding = ("gzip", "br", "deflate", "gzip, gzip")[number % 4]
        sent = field.post(bomb, "Content-Encoding: " + coding)
        await exchange(field, sent, ["415"], coding, answers=1)

    await crowd(field.count(100), one, 16)


def in_list(item: str) -> bytes:
    """Return a body of 1 MiB with a list of these items."""
    count = ((1 << 20) - 40) // (len(item) + 1)
    return ('{"message":[' + ",".join([item] * count) + "]}").encode()


# Name, body, and the right statuses.
BODIES: Sequence[Tuple[str, bytes, Sequence[str]]] = (
    ("10,000 levels", b'{"message":' + b"[" * 10_000 + b"]" * 10_000 + b"}", ["400"]),
    ("1 MiB of [", b"[" * (1 << 20), ["400"]),
    ("1 MiB of {", b'{"":' * (1 << 18), ["400"]),
    ("NaN", b'{"message": "a", "wait": NaN}', ["400"]),
    ("Infinity", b'{"message": "a", "wait": -Infinity}', ["400"]),
    ("1e999", b'{"message": "a", "wait": 1e999}', ["400"]),
    ("1e999..., 1 MiB", b'{"message": "a", "wait": 1e' + b"9" * 1_000_000 + b"}", ["400"]),
    ("duplicate keys", b'{"message": "a", "message": 1}', ["400"]),
    ("an integer of 5,000 digits", b'{"message": "a", "wait": ' + b"9" * 5_000 + b"}", ["400"]),
    (
        "an integer of 1,000,000 digits",
        b'{"message": "a", "wait": ' + b"9" * 1_000_000 + b"}",
        ["400"],
    ),
    ("integers of 4,300 digits", in_list("9" * 4_300), ["400"]),
    (
        "100,000 keys",
        ("{" + ",".join('"%d":0' % n for n in range(100_000)) + "}").encode(),
        ["400"],
    ),
    ("170,000 escapes", b'{"message": "' + b"\\u0041" * 170_000 + b'"}', ["400"]),
    ("lone surrogates", b'{"message": "' + b"\\ud800" * 170_000 + b'"}', ["400"]),
    (
        "lone surrogates in names",
        ("{" + ",".join('"\\ud800%d":0' % n for n in range(50_000)) + "}").encode(),
        ["400"],
    ),
    ("empty lists", in_list("[]"), ["400"]),
    ("empty objects", in_list("{}"), ["400"]),
    ("90 levels, many", in_list("[" * 90 + "]" * 90), ["400"]),
    ("floats", in_list("0.1"), ["400"]),
    (
        "a schema of 1 MiB",
        b'{"message": 1, "jsonSchema": {"a": [' + b"[]," * 340_000 + b"[]]}}",
        ["400"],
    ),
    ("invalid UTF-8", b'{"message": "\xff\xfe\xc0\x80"}', ["400"]),
    ("UTF-16", '{"message": "a"}'.encode("utf-16"), ["400"]),
    ("nothing but spaces", b" " * (1 << 20), ["400"]),
)


@attack("bodies of JSON")
async def json_bodies(field: Field) -> None:
    slowest: Dict[str, float] = {}

    async def one(number: int) -> None:
        name, body, expected = BODIES[number % len(BODIES)]
        start = time.perf_counter()
        data = await exchange(field, field.post(body), expected, name, PATIENCE_SECONDS, 1)
        slowest[name] = max(slowest.get(name, 0), time.perf_counter() - start)
        if len(data) > 1 << 14:
            field.broken.append("%s: a response of %d bytes" % (name, len(data)))

    await crowd(field.count(4) * len(BODIES), one, 1)
    worst = max(slowest, key=lambda name: slowest[name])
    field.answers["slowest: %s, %d ms" % (worst, slowest[worst] * 1000)] += 1


@attack("the costliest JSON, 16 at once")
async def costly_json(field: Field) -> None:
    names = ("empty lists", "90 levels, many", "empty objects", "floats")
    bodies = [body for name, body, _ in BODIES if name in names]

    async def one(number: int) -> None:
        sent = field.post(bodies[number % len(bodies)])
        await exchange(field, sent, ["400"], "costly", PATIENCE_SECONDS, 1)

    await crowd(field.count(64), one, 16)


@attack("invalid UTF-8")
async def invalid_utf8(field: Field) -> None:
    heads = (
        ("in the path", b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", ["400"]),
        ("escaped in the path", field.request("GET /api/ask/%ff%fe%00"), ["404"]),
        (
            "escaped in the query",
            field.request("GET /api/requests?status=%ff%fe&limit=%00"),
            ["400"],
        ),
        ("in the Host", b"GET /health HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n", ["421", "400"]),
        (
            "in a token",
            b"GET /api/usage HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
            ["401", "429"],
        ),
        ("in a key", field.post(b'{"message": 1}', "Idempotency-Key: \xff\xfe"), ["400"]),
        (
            "in an offset",
            field.request("GET /api/ask/%s/events" % field.job, "Last-Event-ID: \xff"),
            ["400"],
        ),
    )

    async def one(number: int) -> None:
        name, sent, expected = heads[number % len(heads)]
        await exchange(field, sent, expected, name, answers=1)

    await crowd(field.count(20) * len(heads), one, 8)


# --- 3. slow and idle connections ---


async def besiege(field: Field, idle: int, drips: Sequence[Tuple[bytes, bytes]], slow: int) -> None:
    """Open idle connections and slow clients at once, for the time of an attack.

    A slow client sends a start, then a piece each half second. If the bridge closes a connection,
    the attacker opens another one, up to a hundred a second.
    """
    connections: List[Tuple[Connection, bytes]] = []
    deadline = time.monotonic() + field.seconds

    async def connect(number: int) -> None:
        start, drip = drips[number % len(drips)] if number < slow else (b"", b"")
        try:
            connection = await Connection(field).open(5)
        except (OSError, asyncio.TimeoutError) as error:
            return field.note(type(error).__name__)
        if start:
            await connection.send(start)
        connections.append((connection, drip))
        field.note("opened")

    await crowd(slow + idle, connect, 32)
    closed = 0
    while time.monotonic() < deadline:
        for connection, drip in list(connections):
            if connection.is_closed():
                connections.remove((connection, drip))
                connection.close()
                field.answers["closed"] += 1
                closed += 1
            elif drip:
                await connection.send(drip)
        retries, closed = min(closed, 50), max(0, closed - 50)
        if retries:
            await crowd(retries, connect, 8)
        await asyncio.sleep(0.5)
    for connection, _ in connections:
        connection.close()


@attack("1,000 idle connections")
async def idle_ones(field: Field) -> None:
    await besiege(field, field.count(IDLE), (), 0)


@attack("256 slow heads")
async def slow_heads(field: Field) -> None:
    drips = [(b"G", b"E"), (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X"), (b"\r\n", b"\r\n")]
    await besiege(field, 0, drips, field.count(SLOW))


@attack("256 slow bodies")
async def slow_bodies(field: Field) -> None:
    await besiege(field, 0, slow_body_starts(field), field.count(SLOW))


def slow_body_starts(field: Field) -> Sequence[Tuple[bytes, bytes]]:
    """Return (start, next piece) of slow bodies."""
    return [
        (field.request("POST /api/ask", "Content-Length: 1000"), b"{"),
        (field.request("POST /api/ask", "Transfer-Encoding: chunked"), b"1\r\n{\r\n"),
        (field.request("POST /api/ask", "Content-Length: 1000", token=""), b"{"),
    ]


@attack("256 bodies of 1 MiB, all but a byte")
async def held_bodies(field: Field) -> None:
    head = field.request("POST /api/ask", "Content-Length: %d" % (1 << 20))
    start = head + b"x" * ((1 << 20) - 100)
    await besiege(field, 0, [(start, b"x")], field.count(SLOW))


SIEGE = "1,000 idle and 256 slow at once"


@attack(SIEGE)
async def siege(field: Field) -> None:
    drips = [(b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X"), *slow_body_starts(field)]
    await besiege(field, field.count(IDLE), drips, field.count(SLOW))


# --- 4. clients that do not read ---


async def deaf(field: Field, count: int, sent: bytes) -> None:
    """Send a request on each of many connections and never read, for the time of an attack."""
    connections: List[Connection] = []

    async def one(number: int) -> None:
        try:
            connection = await Connection(field, 4096).open()
        except (OSError, asyncio.TimeoutError) as error:
            return field.note(type(error).__name__)
        connections.append(connection)
        await connection.send(sent)

    await crowd(count, one, 16)
    await asyncio.sleep(field.seconds)
    for connection in connections:
        try:
            first = connection.socket.recv(12, socket.MSG_PEEK)
            field.note("%s, not read" % first[9:12].decode())
        except OSError:
            field.note("nothing")
        connection.close()


@attack("deaf readers of a 9 MiB answer")
async def deaf_readers(field: Field) -> None:
    await deaf(field, field.count(100), field.request("GET /api/ask/" + field.finished))


@attack("deaf readers of its events")
async def deaf_replays(field: Field) -> None:
    await deaf(field, field.count(100), field.request("GET /api/ask/%s/events" % field.finished))


@attack("deaf readers of a running job")
async def deaf_streams(field: Field) -> None:
    await deaf(field, field.count(120), field.request("GET /api/ask/%s/events" % field.job))


@attack("deaf readers of lists")
async def deaf_lists(field: Field) -> None:
    await deaf(field, field.count(100), field.request("GET /api/requests?limit=100"))


@attack("slow readers of a 9 MiB answer")
async def slow_readers(field: Field) -> None:
    async def one(number: int) -> None:
        connection = await Connection(field, 4096).open()
        await connection.send(field.request("GET /api/ask/" + field.finished))
        deadline, end = time.monotonic() + field.seconds, "open"
        while time.monotonic() < deadline:
            try:
                data = await asyncio.wait_for(connection.loop.sock_recv(connection.socket, 1024), 1)
            except (OSError, asyncio.TimeoutError):
                data = b""
            if not data:
                end = "closed"
                break
            await asyncio.sleep(0.1)
        connection.close()
        field.note("%s, some read" % end)

    await crowd(field.count(64), one, 64)


# --- 5. storms of connections ---


@attack("5,000 connect and close")
async def connect_and_close(field: Field) -> None:
    async def one(number: int) -> None:
        try:
            (await Connection(field).open()).close()
            field.note("closed by us")
        except (OSError, asyncio.TimeoutError) as error:
            field.note(type(error).__name__)

    await crowd(field.count(5000), one, 64)


@attack("5,000 resets")
async def resets(field: Field) -> None:
    pieces = (
        b"",
        b"G",
        HIDDEN,
        field.post(b'{"message": 1}')[:-5],
        field.request("GET /api/ask/%s?wait=90" % field.job),
        field.request("GET /openapi.json", token=""),
    )

    async def one(number: int) -> None:
        try:
            connection = await Connection(field).open()
        except (OSError, asyncio.TimeoutError) as error:
            return field.note(type(error).__name__)
        await connection.send(pieces[number % len(pieces)])
        connection.close(resets=True)
        field.note("reset by us")

    await crowd(field.count(5000), one, 64)


@attack("connect and hold, 3,000")
async def connect_and_hold(field: Field) -> None:
    connections: List[Connection] = []

    async def one(number: int) -> None:
        try:
            connections.append(await Connection(field).open())
        except (OSError, asyncio.TimeoutError) as error:
            field.note(type(error).__name__)

    await crowd(field.count(3000), one, 64)
    await asyncio.sleep(1)
    for connection in connections:
        field.note("closed" if connection.is_closed() else "held")
        connection.close()


@attack("half-closed connections")
async def half_closed(field: Field) -> None:
    cases = (
        (HIDDEN.replace(b"/hidden", b"/health"), ["200"]),
        (b"", ["-"]),
        (b"GET / HT", ["400"]),
        (HIDDEN[:-2], ["400"]),
        (field.request("POST /api/ask", "Content-Length: 100") + b"{", ["400"]),
        (field.request("GET /api/ask/%s?wait=60" % field.job), ["202"]),
        (field.request("POST /api/ask", "Transfer-Encoding: chunked") + b"5\r\nhe", ["400"]),
    )

    async def one(number: int) -> None:
        sent, expected = cases[number % len(cases)]
        await exchange(field, sent, expected, "half-closed %r" % sent[:20], ends=True)

    await crowd(field.count(50) * len(cases), one, 32)


# --- 6. limits ---


@attack("streams of one token, 200")
async def many_streams(field: Field) -> None:
    connections: List[Connection] = []
    sent = (
        field.request("GET /api/ask/%s/events" % field.waiting),
        field.request("GET /api/ask/%s?wait=90" % field.waiting),
    )

    async def one(number: int) -> None:
        connections.append(await Connection(field).open())
        await connections[-1].send(sent[number % 2])

    await crowd(field.count(200), one, 16)
    await asyncio.sleep(min(field.seconds, 3))
    for connection in connections:
        try:
            field.note(connection.socket.recv(12)[9:12].decode() or "closed")
        except OSError:
            field.note("waits")
        connection.close()
    if field.scale >= 1 and field.answers["429"] != 200 - 128:
        field.broken.append("streams of one token: %d refused, not 72" % field.answers["429"])


@attack("hung up behind a byte, 100 waits")
async def hidden_hang_ups(field: Field) -> None:
    """Send a byte of the next request, then close: nobody waits for the response."""

    async def one(number: int) -> None:
        connection = await Connection(field).open()
        await connection.send(field.request("GET /api/ask/%s?wait=90" % field.waiting))
        # The bridge must not read the byte together with the head.
        await asyncio.sleep(1)
        await connection.send(b"G")
        await asyncio.sleep(1)
        connection.close()
        field.note("left")

    await crowd(field.count(100), one, 100)
    deadline, base = time.monotonic() + 20, 40
    while field.bridge.gauges()[1] > base and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    threads = field.bridge.gauges()[1]
    if threads > base:
        field.broken.append("%d threads wait for clients that left 20 s ago" % threads)


@attack("streams and waits without a token")
async def anonymous_streams(field: Field) -> None:
    lines = (
        "GET /api/ask/%s/events" % field.job,
        "GET /api/ask/%s?wait=90" % field.job,
        "POST /api/ask",
        "POST /v1/messages",
    )

    async def one(number: int) -> None:
        sent = field.request(lines[number % 4], "Connection: close", token="")
        await exchange(field, sent, ["401", "429"], "anonymous")

    await crowd(field.count(1000), one, 32)


async def flood(
    field: Field, sent: bytes, expected: Sequence[str], per_connection: int = 50
) -> None:
    """Send requests one by one on 16 connections, for the time of an attack."""
    deadline = time.monotonic() + field.seconds

    async def one(number: int) -> None:
        while time.monotonic() < deadline:
            try:
                connection = await Connection(field).open()
            except (OSError, asyncio.TimeoutError) as error:
                field.note(type(error).__name__)
                continue
            for _ in range(per_connection):
                if not await connection.send(sent):
                    break
                data, end = await connection.receive(20, 1)
                field.record(data, end, [*expected, "-"], "flood")
                if end != "answered" or time.monotonic() > deadline:
                    break
            connection.close()

    await crowd(16, one, 16)


@attack("a flood without a token")
async def anonymous_flood(field: Field) -> None:
    await flood(field, field.request("GET /api/status", token=""), ["200", "429"])


@attack("a flood of wrong tokens")
async def flood_of_wrong_tokens(field: Field) -> None:
    await flood(field, field.request("GET /api/usage", token="cab-" + "0" * 64), ["401", "429"])


@attack("12,000 addresses")
async def many_addresses(field: Field) -> None:
    """Send requests from more addresses than the rate limiter remembers, from 127.1.0.0 on."""

    async def one(number: int) -> None:
        source = "127.%d.%d.%d" % (1 + (number >> 16), (number >> 8) & 255, number & 255 or 1)
        connection = Connection(field, source=source)
        try:
            await connection.open()
            await connection.send(field.request("GET /hidden", "Connection: close", token=""))
            field.record(*await connection.receive(), expected=["404", "401"], name="address")
        except (OSError, asyncio.TimeoutError) as error:
            field.note(type(error).__name__)
        finally:
            connection.close()

    await crowd(field.count(12_000), one, 32)


# --- the campaign ---


Row = Dict[str, Any]
# Attacks with the response of 9 MiB. They run last, because it exists from then on.
LARGE = ("deaf readers", "slow readers")
# Attacks that need a token and use its limits fully. The good client may wait twice as long.
HEAVY = ("9 MiB", "lists", "of one byte")


def run_attack(
    bridge: Bridge,
    good: GoodClient,
    number: int,
    options: argparse.Namespace,
    tokens: Mapping[str, str],
    finished: str,
    folder: Path,
) -> Row:
    """Run an attack, from an idle bridge to an idle bridge; return its row of the table."""
    name, function = ATTACKS[number]
    gate = folder / ("gate-%d" % number)
    size = 9 if function is deaf_streams else 0
    job = bridge.ask(tokens["attacker"], "pour %d %s" % (size, gate))
    bridge.wait_for(tokens["attacker"], job, "processing")
    waiting = bridge.ask(tokens["attacker"], "hello")
    polled = bridge.ask(tokens["good"], "hello")
    time.sleep(1 if size else 0.2)
    base = bridge.gauges()
    field = Field(bridge, number, options, tokens["attacker"], finished, job, waiting)
    gauge = Gauge(bridge)
    gauge.start()
    good.follow("/api/ask/" + polled)
    start = time.monotonic()
    try:
        asyncio.run(function(field))
    except (OSError, asyncio.TimeoutError) as error:
        field.broken.append("%s: the attack itself failed: %r" % (name, error))
    seconds = time.monotonic() - start
    polls = good.follow("")
    peak = gauge.stop()
    deadline, after = time.monotonic() + options.settle, bridge.gauges()
    while has_more(after, base) and time.monotonic() < deadline:
        time.sleep(0.1)
        after = bridge.gauges()
    gate.touch()
    bridge.wait_for(tokens["good"], polled, "completed")
    times = polls["seconds"] or [0.0]
    row = {
        "name": name,
        "attempts": field.attempts,
        "answered": dict(field.answers.most_common()),
        "seconds": seconds,
        "polls": len(polls["seconds"]),
        "median": statistics.median(times),
        "longest": max(times),
        "lost": dict(Counter(polls["lost"])),
        "failed": dict(Counter(polls["failed"])),
        "base": base,
        "peak": peak,
        "after": after,
        "broken": field.broken,
    }
    row["broken"] = sorted(set(field.broken + broken_promises(row, options)))
    return row


def has_more(after: Sequence[float], before: Sequence[float], allowed: int = 3) -> bool:
    """Return whether the bridge has more threads or files than before."""
    return after[1] > before[1] + allowed or after[2] > before[2] + allowed


def broken_promises(row: Row, options: argparse.Namespace) -> List[str]:
    """Return the promises that the bridge broke during an attack."""
    broken = []
    if row["failed"]:
        broken.append("the good client failed twice in a row: %s" % row["failed"])
    if "503" in row["lost"]:
        broken.append("the good client was refused (503)")
    # A shorter attack, of a small --scale, can end before the first poll.
    if not row["polls"] and row["seconds"] > 10 * POLL_SECONDS:
        broken.append("the good client did not poll")
    if any("500" in outcome.split(" ")[0].split(",") for outcome in row["answered"]):
        broken.append("a 500")
    factor = 2 if any(words in row["name"] for words in HEAVY) else 1
    if row["median"] > factor * options.median_ms / 1000:
        broken.append("polls took %.0f ms at the median" % (row["median"] * 1000))
    if row["longest"] > options.longest_ms / 1000:
        broken.append("a poll took %.0f ms" % (row["longest"] * 1000))
    if row["peak"][0] > factor * options.memory_mb:
        broken.append("the bridge used %.0f MB" % row["peak"][0])
    if has_more(row["after"], row["base"]):
        counts = (*row["after"][1:], *row["base"][1:])
        broken.append("%d threads and %d files were left (before: %d, %d)" % counts)
    return ["%s: %s" % (row["name"], text) for text in broken]


def few_files(folder: Path) -> List[str]:
    """Open 200 connections to a bridge that may open 64 files; return the broken promises."""
    bridge = Bridge(folder, files=64)
    connections: List[socket.socket] = []
    try:
        for _ in range(200):
            connection = socket.socket()
            connection.settimeout(1)
            connections.append(connection)
            if connection.connect_ex(("127.0.0.1", bridge.port)):
                break
        time.sleep(1)
        start, before = time.monotonic(), cpu_seconds(bridge.pid)
        time.sleep(3)
        percent = (cpu_seconds(bridge.pid) - before) / (time.monotonic() - start) * 100
        start = time.monotonic()
        status = bridge.call(bridge.admin, "GET", "/health")[0]
        seconds = time.monotonic() - start
        figures = (percent, status, seconds)
        print("64 files, 200 connections: %.0f %% CPU; a new client got %d after %.2f s" % figures)
        broken = []
        if percent > 50:
            broken.append("few files: the bridge used %.0f %% of a CPU" % percent)
        if seconds > 5:
            broken.append("few files: a new client waited %.1f s" % seconds)
        return broken
    finally:
        for connection in connections:
            connection.close()
        bridge.end()


def campaign(options: argparse.Namespace, folder: Path) -> Tuple[List[Row], List[str]]:
    """Run all attacks; return (the rows, the broken promises)."""
    rows: List[Row] = []
    broken: List[str] = []
    bridge = Bridge(folder / "bridge")
    good: Optional[GoodClient] = None
    try:
        tokens = {
            name: str(bridge.call(bridge.admin, "POST", "/api/tokens", {"name": name})[1]["token"])
            for name in ("attacker", "good")
        }
        finished = ""
        time.sleep(1)
        first = bridge.gauges()
        good = GoodClient(bridge.port, tokens["good"])
        chosen = [number for number, (name, _) in enumerate(ATTACKS) if options.only in name]
        for number in sorted(chosen, key=lambda number: ATTACKS[number][0].startswith(LARGE)):
            if ATTACKS[number][0].startswith(LARGE) and not finished:
                finished = bridge.ask(tokens["attacker"], "flood 9")
                bridge.wait_for(tokens["attacker"], finished, "completed")
                if not options.json:
                    print("%-36s %.0f MB" % ("(after a response of 9 MiB)", bridge.gauges()[0]))
            row = run_attack(bridge, good, number, options, tokens, finished, folder)
            rows.append(row)
            broken += row["broken"]
            if not options.json:
                print(line_of(row), flush=True)
        good.end()
        deadline, last = time.monotonic() + options.settle, bridge.gauges()
        while has_more(last, first, 0) and time.monotonic() < deadline:
            time.sleep(0.1)
            last = bridge.gauges()
        if has_more(last, first):
            counts = (*last[1:], *first[1:])
            broken.append("at the end: %d threads and %d files, at first %d and %d" % counts)
    finally:
        if good:
            # It may have ended already, which does no harm.
            good.end()
        is_running = bridge.program.poll() is None
        status = bridge.end()
        if not is_running or status:
            verb = "ended" if is_running else "died"
            broken.append("the bridge %s with status %d" % (verb, status))
    errors = bridge.errors.read_text()
    if "Traceback" in errors or "Unexpected" in errors:
        broken.append("the bridge's log: " + errors[errors.find("Unexpected") :][:1000])
    return rows, broken


HEAD = "%-36s %8s %7s %5s %8s %8s %5s %11s %9s %9s  %s" % (
    "attack", "attempts", "seconds", "polls", "median", "longest", "lost", "MB", "threads",
    "files", "answered",
)


def line_of(row: Row) -> str:
    """Return a row as text. Memory, threads and files are the peak and the value afterwards."""
    (memory, threads, files), after = row["peak"], row["after"]
    return "%-36s %8d %7.1f %5d %6.1fms %6.0fms %5d %11s %9s %9s  %s" % (
        row["name"],
        row["attempts"],
        row["seconds"],
        row["polls"],
        row["median"] * 1000,
        row["longest"] * 1000,
        sum(row["lost"].values()),
        "%.0f>%.0f" % (memory, after[0]),
        "%d>%d" % (threads, after[1]),
        "%d>%d" % (files, after[2]),
        ", ".join("%s: %d" % pair for pair in list(row["answered"].items())[:5]),
    )


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description="Attack a bridge in many ways, and measure the effect on a good client."
    )
    parser.add_argument("--only", default="", help="run the attacks with these words in the name")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor of all numbers (default: 1.0)"
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="duration of a long attack (default: 10)"
    )
    parser.add_argument(
        "--settle",
        type=float,
        default=40.0,
        help="most seconds until threads and files are released (default: 40)",
    )
    parser.add_argument(
        "--median-ms",
        type=float,
        default=100.0,
        help="highest median of the good client's polls (default: 100)",
    )
    parser.add_argument(
        "--longest-ms", type=float, default=5000.0, help="longest of its polls (default: 5000)"
    )
    parser.add_argument(
        "--memory-mb", type=float, default=160.0, help="most memory of the bridge (default: 160)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of random choices (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--good", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.good:
        be_good(options.good, os.environ.pop("CAB_GOOD_TOKEN"))
        return 0
    if sys.platform != "linux":
        print("error: this needs Linux", file=sys.stderr)
        return 2
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if not options.json:
        print(HEAD)
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        rows, broken = campaign(options, Path(folder))
        if options.only in "few files":
            broken += few_files(Path(folder) / "few")
    if options.json:
        print(json.dumps({"rows": rows, "broken": broken}))
    for text in broken:
        print("BROKEN  " + text, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
