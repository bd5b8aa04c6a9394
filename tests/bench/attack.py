"""Attacks on a running bridge, one after the other, and what a well-behaved client notices of each.

    python tests/bench/attack.py [--only WORDS] [--scale 1.0] [--seconds 10] [--json]

The bridge is a process of its own over a fake CLI, with its limits as they are but for `--rate-limit`. The good client is a
process, too: every 20 ms it polls a request of its own, nine times of ten on the connection that it has, else on a new one.
It must never be refused, and where its connection had to make room it must succeed on the next one. The gauges of the
bridge come from /proc (Linux). Each attack comes from an address of its own in 127.0.0.0/8, as each attacker would.
Exit status 1 when a promise is broken: each is named below the table.
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
from typing import Any, Awaitable, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

TESTS = Path(__file__).resolve().parent.parent
BRIDGE = TESTS.parent / "claude_api_bridge.py"
RATE_LIMIT = 6000                                       # the good client alone makes 300 requests a minute besides its own polls
POLL_SECONDS = 0.02
PATIENCE_SECONDS = 60.0                                 # the longest that anything here waits for anything
IDLE, SLOW = 1000, 256

FAKE = """import os, sys, time
sys.path.insert(0, %(tests)r)
import fake_claude

def act_pour(self, rest):
    '''pour MIB GATE: so much text, then a word now and then until the file GATE exists.'''
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


# --- the bridge, and what it uses ---


class Bridge:
    """The program under attack. files: how many it may open at once (0: as many as it likes)."""

    def __init__(self, folder: Path, files: int = 0) -> None:
        folder.mkdir()
        script, claude = folder / "claude.py", folder / "claude"
        script.write_text(FAKE % {"tests": str(TESTS), "folder": str(folder)})
        claude.write_text("#!/bin/sh\nexec '%s' -S '%s' \"$@\"\n" % (sys.executable, script))
        claude.chmod(0o755)
        self.errors = folder / "stderr"
        with open(str(self.errors), "wb") as errors:
            self.program = subprocess.Popen(
                [sys.executable, str(BRIDGE), "start", "--no-tunnel", "--host", "127.0.0.1", "--port", "0", "--rate-limit", str(RATE_LIMIT),
                 "--data-dir", str(folder / "data"), "--claude", str(claude)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=errors, env={"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"},
                preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None)
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
        """-> (memory in MB, threads, open files)."""
        words = dict(line.split(":", 1) for line in Path("/proc/%d/status" % self.pid).read_text().splitlines())
        return int(words["VmRSS"].split()[0]) / 1024, int(words["Threads"]), len(os.listdir("/proc/%d/fd" % self.pid))

    def cpu_seconds(self) -> float:
        words = Path("/proc/%d/stat" % self.pid).read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def call(self, token: str, method: str, path: str, body: Any = None) -> Tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"Authorization": "Bearer " + token})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def ask(self, token: str, message: str) -> str:
        status, body = self.call(token, "POST", "/api/ask", {"message": message})
        if status != 202:
            raise SystemExit("not queued: %r" % body)
        return str(body["requestId"])

    def wait_for(self, token: str, job: str, status: str) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while self.call(token, "GET", "/api/ask/" + job + "?wait=0.1")[1]["status"] != status:
            if time.monotonic() > until:
                raise SystemExit("request %s is not %s" % (job, status))
            time.sleep(0.05)

    def end(self) -> int:
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
    """Notes the peaks of a bridge until it is told to stop."""

    def __init__(self, bridge: Bridge) -> None:
        super().__init__(name="gauge", daemon=True)
        self.bridge, self.peak = bridge, bridge.gauges()
        self._ends = threading.Event()

    def run(self) -> None:
        while not self._ends.wait(0.05):
            try:
                memory, threads, files = self.bridge.gauges()
            except OSError:                             # it died, which is told elsewhere
                return
            self.peak = max(memory, self.peak[0]), max(threads, self.peak[1]), max(files, self.peak[2])

    def stop(self) -> Tuple[float, int, int]:
        self._ends.set()
        self.join(10)
        return self.peak


# --- the good client, a process of its own ---


def be_good(port: int, token: str) -> None:
    """Polls; a line on stdin names the request from now on, and what the polls of the last one showed goes to stdout."""
    path, seen, lock, under_way = "", fresh_figures(), threading.Lock(), 0.0

    def listen() -> None:
        nonlocal path, seen
        for line in sys.stdin:
            with lock:
                told, seen, path = seen, fresh_figures(), line.strip()
                if under_way:                           # one that has no answer yet took at least so long
                    told = {**told, "seconds": [*told["seconds"], time.perf_counter() - under_way]}
            print(json.dumps(told), flush=True)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    connection: Optional[http.client.HTTPConnection] = None
    for turn in itertools.count():
        began = time.perf_counter()
        with lock:
            now, figures = path, seen
            under_way = began if now else 0.0
        if not now:
            time.sleep(POLL_SECONDS)
            continue
        if turn % 10 == 0 and connection is not None:
            connection.close()
        for attempt in (1, 2):
            try:
                connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                connection.request("GET", now, headers={"Authorization": "Bearer " + token})
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
            figures["seconds"].append(time.perf_counter() - began)
            under_way = 0.0
        time.sleep(max(0.0, POLL_SECONDS - (time.perf_counter() - began)))


def fresh_figures() -> Dict[str, List[Any]]:
    return {"seconds": [], "lost": [], "failed": []}


class GoodClient:
    """The process of the good client."""

    def __init__(self, port: int, token: str) -> None:
        self._child = subprocess.Popen([sys.executable, __file__, "--good", str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       env={**os.environ, "CAB_GOOD_TOKEN": token})

    def follow(self, path: str) -> Dict[str, List[Any]]:
        """From now on it asks for this ("": nothing). -> what it saw before."""
        assert self._child.stdin is not None and self._child.stdout is not None
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


class Wire:
    """A connection of an attacker."""

    def __init__(self, field: "Field", buffer_bytes: int = 0, source: str = "") -> None:
        self.field, self.loop = field, asyncio.get_running_loop()
        self.socket = socket.socket()
        self.socket.setblocking(False)
        if buffer_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self.socket.bind((source or field.address, 0))

    async def open(self, seconds: float = 30.0) -> "Wire":
        try:
            await asyncio.wait_for(self.loop.sock_connect(self.socket, ("127.0.0.1", self.field.bridge.port)), seconds)
        except BaseException:
            self.socket.close()
            raise
        return self

    async def send(self, data: bytes, seconds: float = 30.0) -> bool:
        """-> whether it went; a closed connection takes nothing more."""
        try:
            await asyncio.wait_for(self.loop.sock_sendall(self.socket, data), seconds)
            return True
        except (OSError, asyncio.TimeoutError):
            return False

    async def hear(self, seconds: float = 20.0, answers: int = 0) -> Tuple[bytes, str]:
        """All that comes until the bridge closes, or so many answers were begun, or the time is up. -> (it, how it ended)."""
        heard, until = bytearray(), time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                data = await asyncio.wait_for(self.loop.sock_recv(self.socket, 1 << 16), max(0.01, until - time.monotonic()))
            except asyncio.TimeoutError:
                break
            except OSError:
                return bytes(heard), "reset"
            if not data:
                return bytes(heard), "closed"
            heard += data
            if answers and len(STATUS.findall(heard)) >= answers:
                return bytes(heard), "answered"
        return bytes(heard), "open"

    def is_closed(self) -> bool:
        """Whether the bridge has closed it; what came before that is thrown away."""
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
    """What an attack has at hand, and what it notes. token: a client's own; job: the one that runs; waiting: one that is queued."""

    def __init__(self, bridge: Bridge, number: int, options: argparse.Namespace, token: str, finished: str, job: str, waiting: str) -> None:
        self.bridge, self.address, self.scale, self.seconds = bridge, "127.0.%d.1" % (number + 1), options.scale, options.seconds
        self.token, self.finished, self.job, self.waiting = token, finished, job, waiting
        self.random = random.Random(options.seed)
        self.tried, self.answers, self.broken = 0, Counter(), []      # type: int, Counter[str], List[str]

    def count(self, whole: int) -> int:
        return max(1, int(whole * self.scale))

    def note(self, outcome: str) -> None:
        self.tried += 1
        self.answers[outcome] += 1

    def heard(self, data: bytes, end: str, expected: Sequence[str] = (), name: str = "") -> None:
        """Notes an outcome as `400 closed`. expected: the outcomes that are right, by their statuses, `-` for none."""
        statuses = ",".join(found.decode() for found in STATUS.findall(data)[:4]) or "-"
        self.note(statuses + ("" if end == "answered" else " " + end))
        if expected and statuses not in expected:
            self.broken.append("%s: %s %s, not %s (%r)" % (name, statuses, end, "/".join(expected), bytes(data[:80])))

    def request(self, line: str, *headers: str, body: bytes = b"", token: Optional[str] = None) -> bytes:
        """token: "" for none, None for the client's own."""
        key = self.token if token is None else token
        lines = [line + " HTTP/1.1", "Host: localhost", *(["Authorization: Bearer " + key] if key else []), *headers, "", ""]
        return "\r\n".join(lines).encode("latin-1") + body

    def post(self, body: bytes, *headers: str, token: Optional[str] = None, path: str = "/api/ask") -> bytes:
        return self.request("POST " + path, "Content-Length: %d" % len(body), *headers, body=body, token=token)


Attack = Callable[[Field], Awaitable[None]]
ATTACKS: List[Tuple[str, Attack]] = []


def attack(name: str) -> Callable[[Attack], Attack]:
    def add(function: Attack) -> Attack:
        ATTACKS.append((name, function))
        return function
    return add


async def crowd(count: int, one: Callable[[int], Awaitable[None]], at_once: int = 64) -> None:
    """So many of them, at most `at_once` at a time. A connection that the bridge breaks is an outcome, no error."""
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(work() for _ in range(min(count, at_once))))


async def exchange(field: Field, sent: bytes, expected: Sequence[str] = (), name: str = "", seconds: float = 20.0, answers: int = 0,
                   ends: bool = False, cut: int = 0) -> bytes:
    """One connection: sends, hears, closes. ends: whether the sending side is shut before; cut: so many bytes come in a packet of their
    own. -> what came."""
    try:
        body_field = await Wire(field).open()
    except (OSError, asyncio.TimeoutError) as error:
        field.note(type(error).__name__)
        return b""
    try:
        if cut:
            await body_field.send(sent[:cut])
            await asyncio.sleep(0.01)
        await body_field.send(sent[cut:])
        if ends:
            try:
                body_field.socket.shutdown(socket.SHUT_WR)
            except OSError:
                pass
        data, end = await body_field.hear(seconds, answers)
        field.heard(data, end, expected, name)
        return data
    finally:
        body_field.close()


# --- 1. heads ---

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"POST /api/ask HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: "

SMUGGLES: Sequence[Tuple[str, bytes, Sequence[str]]] = (
    ("both lengths", CHUNKED + b"chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + HIDDEN, ["400"]),
    ("both lengths, other order",
     b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN, ["400"]),
    ("TE: xchunked", CHUNKED + b"xchunked\r\n\r\n0\r\n\r\n" + HIDDEN, ["501"]),
    ("TE: chunked, identity", CHUNKED + b"chunked, identity\r\n\r\n0\r\n\r\n" + HIDDEN, ["501"]),
    ("TE: gzip, chunked", CHUNKED + b"gzip, chunked\r\n\r\n0\r\n\r\n" + HIDDEN, ["501"]),
    ("TE with a vertical tab", CHUNKED + b"\x0bchunked\r\n\r\n0\r\n\r\n" + HIDDEN, ["400"]),
    ("TE twice", CHUNKED + b"chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + HIDDEN, ["400"]),
    ("TE behind a space", b"POST / HTTP/1.1\r\nHost: localhost\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN, ["400"]),
    ("TE in HTTP/1.0", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN, ["400"]),
    ("two lengths", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nContent-Length: 44\r\n\r\n" + HIDDEN, ["400"]),
    ("the same length twice", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n" + HIDDEN, ["400"]),
    *(("length %s" % value.decode(), b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + value + b"\r\n\r\n" + HIDDEN, ["400"])
      for value in (b"0, 0", b"+0", b"-1", b"0x0", b"1e1", b"", b"9" * 30, b"1_0", "٣".encode())),
    ("bare LF at each line", HIDDEN.replace(b"\r\n", b"\n") + HIDDEN, ["400"]),
    ("bare LF in a value", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\n" + HIDDEN, ["400"]),
    ("bare LF before the blank line", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\n\r\n" + HIDDEN, ["400"]),
    ("bare LF behind the request line", b"GET / HTTP/1.0x\n\r\n" + HIDDEN, ["400"]),
    ("CR only", b"GET / HTTP/1.1\rHost: localhost\r\r" + HIDDEN, ["400"]),
    ("CR in a value", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\rY: b\r\n\r\n" + HIDDEN, ["400"]),
    ("folded line", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n" + HIDDEN, ["400"]),
    ("space before the colon", b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length : 44\r\n\r\n" + HIDDEN, ["400"]),
    ("no name", b"GET / HTTP/1.1\r\nHost: localhost\r\n: a\r\n\r\n" + HIDDEN, ["400"]),
    ("no colon", b"GET / HTTP/1.1\r\nHost: localhost\r\nX\r\n\r\n" + HIDDEN, ["400"]),
    ("Host twice", b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n" + HIDDEN, ["400"]),
    ("no Host", b"GET / HTTP/1.1\r\n\r\n" + HIDDEN, ["400"]),
    ("Authorization twice",
     b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n" + HIDDEN, ["400"]),
    ("a foreign Host", b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n" + HIDDEN, ["421"]),
    ("NUL in the line", b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN, ["400"]),
    ("NUL in a value", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n" + HIDDEN, ["400"]),
    ("HTTP/0.9", b"GET /\r\n" + HIDDEN, ["400"]),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HIDDEN, ["400", "505"]),
    ("HTTP/1.2", b"GET / HTTP/1.2\r\nHost: localhost\r\n\r\n" + HIDDEN, ["400", "505"]),
    ("HTTP/9.9", b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n" + HIDDEN, ["400", "505"]),
    ("two spaces", b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN, ["400"]),
    ("a tab", b"GET\t/\tHTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN, ["400"]),
    ("TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x07" * 64 + b"\r\n\r\n" + HIDDEN, ["400"]),
    ("CONNECT", b"CONNECT evil:443 HTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN, ["400", "405", "501"]),
    ("unknown method", b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN, ["400", "405", "501"]),
    ("a body nobody reads is no request",
     b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN, ["200"]),
    ("HTTP/1.0 closes", b"GET /health HTTP/1.0\r\n\r\n" + HIDDEN, ["200"]),
    ("HTTP/1.0 keep-alive goes on", b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
     b"GET /health HTTP/1.0\r\n\r\n" + HIDDEN, ["200,200"]),
)


@attack("smuggled requests")
async def smuggle(field: Field) -> None:
    async def one(number: int) -> None:
        name, sent, expected = SMUGGLES[number % len(SMUGGLES)]
        await exchange(field, sent, expected, name, cut=number // len(SMUGGLES) * len(sent) // tries)

    tries = field.count(10)
    await crowd(tries * len(SMUGGLES), one, 16)


@attack("chunks that hide a request")
async def bad_chunks(field: Field) -> None:
    bodies = (b"5\r\nhello0\r\n\r\n", b"5\nhello\n0\n\n", b"-5\r\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n",
              b"5 5\r\nhello\r\n0\r\n\r\n", b"fffffffff\r\n", b"5;a=\x0b\n\r\nhello\r\n0\r\n\r\n", b"\r\n",
              b"5\r\nhelloX\r\n0\r\n\r\n", b"0\r\nX : y\r\n\r\n",
              b"0\r\n" + b"X: y\r\n" * 100 + b"\r\n", b"0\r\nX:" + b" " * 16_000 + b"\0\r\n\r\n")
    head = field.request("POST /api/ask", "Transfer-Encoding: chunked")

    async def one(number: int) -> None:
        await exchange(field, head + bodies[number % len(bodies)] + HIDDEN, ["400", "413"], "chunk %r" % bodies[number % len(bodies)][:20])

    await crowd(field.count(5) * len(bodies), one, 8)


@attack("pipelining 1,000 requests")
async def pipeline(field: Field) -> None:
    body_field = await Wire(field).open()
    count = field.count(1000)
    sending = asyncio.ensure_future(body_field.send(HIDDEN.replace(b"/hidden", b"/health") * count, PATIENCE_SECONDS))
    data, end = await body_field.hear(PATIENCE_SECONDS, count)
    await sending
    body_field.close()
    for status in STATUS.findall(data):
        field.note(status.decode())
    if field.answers["200"] != count:
        field.broken.append("pipelining: %d of %d answered (%s)" % (field.answers["200"], count, end))


@attack("pipelining, no answer read")
async def deaf_pipeline(field: Field) -> None:
    """Public pages asked for again and again on 64 connections that never read."""
    sent = b"".join(field.request("GET " + path, token="") for path in ("/openapi.json", "/dashboard")) * 40

    async def one(number: int) -> None:
        body_field = await Wire(field, 4096).open()
        taken = await body_field.send(sent, field.seconds)
        await asyncio.sleep(field.seconds)
        field.note("all requests taken" if taken else "no more requests taken")
        body_field.close()

    await crowd(field.count(64), one, 64)


@attack("oversized heads")
async def oversized_heads(field: Field) -> None:
    big = b"x" * (64 << 10)
    heads = (("one header of 64 KiB", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + big + b"\r\n\r\n"),
             ("a line of 64 KiB", b"GET /" + big + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"),
             ("no line end", big + big),
             ("64 KiB of header lines", b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 11_000 + b"\r\n"),
             ("endless header lines", b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 700_000))

    async def one(number: int) -> None:
        name, sent = heads[number % len(heads)]
        await exchange(field, sent, ["431", "414", "-"], name)          # "-": the reset overtook the answer

    await crowd(field.count(50) * len(heads), one, 16)


@attack("heads that a pattern is slow at")
async def slow_patterns(field: Field) -> None:
    values = (b" " * 16_000 + b"\0", b"a " * 8_000 + b"\0", b"\t " * 8_000 + b"\x7f", b" " * 16_000 + b"a\0")

    async def one(number: int) -> None:
        value = values[number % len(values)]
        await exchange(field, b"GET / HTTP/1.1\r\nHost: localhost\r\nX:" + value + b"\r\n\r\n", ["400"], "slow pattern")

    await crowd(field.count(100), one, 8)


# --- 2. bodies ---


@attack("huge bodies")
async def huge_bodies(field: Field) -> None:
    head = "POST /api/ask"
    chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    bodies = [("declared 10^15", field.request(head, "Content-Length: 999999999999999", token=key), answer)
              for key, answer in (("", ["401"]), (None, ["413"]))]
    bodies += [("declared 8 MiB, and sent", field.request(head, "Content-Length: %d" % (8 << 20), token=key) + b"x" * (8 << 20), answer)
               for key, answer in (("", ["401", "-"]), (None, ["413", "-"]))]
    bodies += [("chunked without end", field.request(head, "Transfer-Encoding: chunked", token=key) + chunk * 160, answer)
               for key, answer in (("", ["401", "-"]), (None, ["413", "-"]))]

    async def one(number: int) -> None:
        name, sent, expected = bodies[number % len(bodies)]
        await exchange(field, sent, expected, name)

    await crowd(field.count(10) * len(bodies), one, 8)


@attack("a million chunks of one byte")
async def tiny_chunks(field: Field) -> None:
    sent = field.request("POST /api/ask", "Transfer-Encoding: chunked") + b"2\r\n[[\r\n" * 520_000 + b"0\r\n\r\n"

    async def one(number: int) -> None:
        await exchange(field, sent, ["400"], "tiny chunks", PATIENCE_SECONDS, 1)

    await crowd(field.count(4), one, 2)


@attack("gzip bombs")
async def gzip_bombs(field: Field) -> None:
    bomb = gzip.compress(b"\0" * (64 << 20), 9)

    async def one(number: int) -> None:
        coding = ("gzip", "br", "deflate", "gzip, gzip")[number % 4]
        await exchange(field, field.post(bomb, "Content-Encoding: " + coding), ["415"], coding, answers=1)

    await crowd(field.count(100), one, 16)


def in_list(item: str) -> bytes:
    """A list of so many of them as 1 MiB holds."""
    count = ((1 << 20) - 40) // (len(item) + 1)
    return ('{"message":[' + ",".join([item] * count) + "]}").encode()


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
    ("an integer of 1,000,000 digits", b'{"message": "a", "wait": ' + b"9" * 1_000_000 + b"}", ["400"]),
    ("integers of 4,300 digits", in_list("9" * 4_300), ["400"]),
    ("100,000 keys", ("{" + ",".join('"%d":0' % n for n in range(100_000)) + "}").encode(), ["400"]),
    ("170,000 escapes", b'{"message": "' + b"\\u0041" * 170_000 + b'"}', ["400"]),
    ("lone surrogates", b'{"message": "' + b"\\ud800" * 170_000 + b'"}', ["400"]),
    ("lone surrogates in names", ("{" + ",".join('"\\ud800%d":0' % n for n in range(50_000)) + "}").encode(), ["400"]),
    ("empty lists", in_list("[]"), ["400"]),
    ("empty objects", in_list("{}"), ["400"]),
    ("90 levels, many", in_list("[" * 90 + "]" * 90), ["400"]),
    ("floats", in_list("0.1"), ["400"]),
    ("a schema of 1 MiB", b'{"message": 1, "jsonSchema": {"a": [' + b"[]," * 340_000 + b"[]]}}", ["400"]),
    ("invalid UTF-8", b'{"message": "\xff\xfe\xc0\x80"}', ["400"]),
    ("UTF-16", '{"message": "a"}'.encode("utf-16"), ["400"]),
    ("nothing but spaces", b" " * (1 << 20), ["400"]),
)


@attack("bodies of JSON")
async def json_bodies(field: Field) -> None:
    slowest: Dict[str, float] = {}

    async def one(number: int) -> None:
        name, body, expected = BODIES[number % len(BODIES)]
        began = time.perf_counter()
        data = await exchange(field, field.post(body), expected, name, PATIENCE_SECONDS, 1)
        slowest[name] = max(slowest.get(name, 0), time.perf_counter() - began)
        if len(data) > 1 << 14:
            field.broken.append("%s: an answer of %d bytes" % (name, len(data)))

    await crowd(field.count(4) * len(BODIES), one, 1)
    worst = max(slowest, key=lambda name: slowest[name])
    field.answers["slowest: %s, %d ms" % (worst, slowest[worst] * 1000)] += 1


@attack("the costliest JSON, 16 at once")
async def costly_json(field: Field) -> None:
    bodies = [body for name, body, _ in BODIES if name in ("empty lists", "90 levels, many", "empty objects", "floats")]

    async def one(number: int) -> None:
        await exchange(field, field.post(bodies[number % len(bodies)]), ["400"], "costly", PATIENCE_SECONDS, 1)

    await crowd(field.count(64), one, 16)


@attack("invalid UTF-8")
async def invalid_utf8(field: Field) -> None:
    heads = (("in the path", b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", ["400"]),
             ("escaped in the path", field.request("GET /api/ask/%ff%fe%00"), ["404"]),
             ("escaped in the query", field.request("GET /api/requests?status=%ff%fe&limit=%00"), ["400"]),
             ("in the Host", b"GET /health HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n", ["421", "400"]),
             ("in a token", b"GET /api/usage HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n", ["401", "429"]),
             ("in a key", field.post(b'{"message": 1}', "Idempotency-Key: \xff\xfe"), ["400"]),
             ("in an offset", field.request("GET /api/ask/%s/events" % field.job, "Last-Event-ID: \xff"), ["400"]))

    async def one(number: int) -> None:
        name, sent, expected = heads[number % len(heads)]
        await exchange(field, sent, expected, name, answers=1)

    await crowd(field.count(20) * len(heads), one, 8)


# --- 3. slow and idle ones ---


async def besiege(field: Field, idle: int, drips: Sequence[Tuple[bytes, bytes]], slow: int) -> None:
    """So many idle connections and slow clients (a start, then a byte each half second) at once, for the time of an attack.
    One that the bridge closes comes again, a hundred of them a second."""
    wires: List[Tuple[Wire, bytes]] = []
    until = time.monotonic() + field.seconds

    async def begin(number: int) -> None:
        start, drip = drips[number % len(drips)] if number < slow else (b"", b"")
        try:
            body_field = await Wire(field).open(5)
        except (OSError, asyncio.TimeoutError) as error:
            return field.note(type(error).__name__)
        if start:
            await body_field.send(start)
        wires.append((body_field, drip))
        field.note("opened")

    await crowd(slow + idle, begin, 32)
    gone = 0
    while time.monotonic() < until:
        for body_field, drip in list(wires):
            if body_field.is_closed():
                wires.remove((body_field, drip))
                body_field.close()
                field.answers["closed"] += 1
                gone += 1
            elif drip:
                await body_field.send(drip)
        again, gone = min(gone, 50), max(0, gone - 50)
        if again:
            await crowd(again, begin, 8)
        await asyncio.sleep(0.5)
    for body_field, _ in wires:
        body_field.close()


@attack("1,000 idle connections")
async def idle_ones(field: Field) -> None:
    await besiege(field, field.count(IDLE), (), 0)


@attack("256 slow heads")
async def slow_heads(field: Field) -> None:
    await besiege(field, 0, [(b"G", b"E"), (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X"), (b"\r\n", b"\r\n")], field.count(SLOW))


@attack("256 slow bodies")
async def slow_bodies(field: Field) -> None:
    await besiege(field, 0, slow_body_starts(field), field.count(SLOW))


def slow_body_starts(field: Field) -> Sequence[Tuple[bytes, bytes]]:
    return [(field.request("POST /api/ask", "Content-Length: 1000"), b"{"),
            (field.request("POST /api/ask", "Transfer-Encoding: chunked"), b"1\r\n{\r\n"),
            (field.request("POST /api/ask", "Content-Length: 1000", token=""), b"{")]


@attack("256 bodies of 1 MiB, all but a byte")
async def held_bodies(field: Field) -> None:
    start = field.request("POST /api/ask", "Content-Length: %d" % (1 << 20)) + b"x" * ((1 << 20) - 100)
    await besiege(field, 0, [(start, b"x")], field.count(SLOW))


SIEGE = "1,000 idle and 256 slow at once"


@attack(SIEGE)
async def siege(field: Field) -> None:
    await besiege(field, field.count(IDLE), [(b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X"), *slow_body_starts(field)], field.count(SLOW))


# --- 4. those who do not read ---


async def deaf(field: Field, count: int, sent: bytes) -> None:
    """So many connections that ask and never read, for the time of an attack."""
    wires: List[Wire] = []

    async def one(number: int) -> None:
        try:
            body_field = await Wire(field, 4096).open()
        except (OSError, asyncio.TimeoutError) as error:
            return field.note(type(error).__name__)
        wires.append(body_field)
        await body_field.send(sent)

    await crowd(count, one, 16)
    await asyncio.sleep(field.seconds)
    for body_field in wires:
        try:
            first = body_field.socket.recv(12, socket.MSG_PEEK)
            field.note("%s, not read" % first[9:12].decode())
        except OSError:
            field.note("nothing")
        body_field.close()


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
        body_field = await Wire(field, 4096).open()
        await body_field.send(field.request("GET /api/ask/" + field.finished))
        until, heard, end = time.monotonic() + field.seconds, 0, "open"
        while time.monotonic() < until:
            try:
                data = await asyncio.wait_for(body_field.loop.sock_recv(body_field.socket, 1024), 1)
            except (OSError, asyncio.TimeoutError):
                data = b""
            heard += len(data)
            if not data:
                end = "closed"
                break
            await asyncio.sleep(0.1)
        body_field.close()
        field.note("%s, some read" % end)

    await crowd(field.count(64), one, 64)


# --- 5. storms of connections ---


@attack("5,000 connect and close")
async def connect_and_close(field: Field) -> None:
    async def one(number: int) -> None:
        try:
            (await Wire(field).open()).close()
            field.note("closed by us")
        except (OSError, asyncio.TimeoutError) as error:
            field.note(type(error).__name__)

    await crowd(field.count(5000), one, 64)


@attack("5,000 resets")
async def resets(field: Field) -> None:
    pieces = (b"", b"G", HIDDEN, field.post(b'{"message": 1}')[:-5], field.request("GET /api/ask/%s?wait=90" % field.job),
              field.request("GET /openapi.json", token=""))

    async def one(number: int) -> None:
        try:
            body_field = await Wire(field).open()
        except (OSError, asyncio.TimeoutError) as error:
            return field.note(type(error).__name__)
        await body_field.send(pieces[number % len(pieces)])
        body_field.close(resets=True)
        field.note("reset by us")

    await crowd(field.count(5000), one, 64)


@attack("connect and hold, 3,000")
async def connect_and_hold(field: Field) -> None:
    wires: List[Wire] = []

    async def one(number: int) -> None:
        try:
            wires.append(await Wire(field).open())
        except (OSError, asyncio.TimeoutError) as error:
            field.note(type(error).__name__)

    await crowd(field.count(3000), one, 64)
    await asyncio.sleep(1)
    for body_field in wires:
        field.note("closed" if body_field.is_closed() else "held")
        body_field.close()


@attack("half-closed connections")
async def half_closed(field: Field) -> None:
    cases = ((HIDDEN.replace(b"/hidden", b"/health"), ["200"]), (b"", ["-"]), (b"GET / HT", ["400"]), (HIDDEN[:-2], ["400"]),
             (field.request("POST /api/ask", "Content-Length: 100") + b"{", ["400"]),
             (field.request("GET /api/ask/%s?wait=60" % field.job), ["202"]),
             (field.request("POST /api/ask", "Transfer-Encoding: chunked") + b"5\r\nhe", ["400"]))

    async def one(number: int) -> None:
        sent, expected = cases[number % len(cases)]
        await exchange(field, sent, expected, "half-closed %r" % sent[:20], ends=True)

    await crowd(field.count(50) * len(cases), one, 32)


# --- 6. places and limits ---


@attack("streams of one token, 200")
async def many_streams(field: Field) -> None:
    wires: List[Wire] = []
    sent = (field.request("GET /api/ask/%s/events" % field.waiting), field.request("GET /api/ask/%s?wait=90" % field.waiting))

    async def one(number: int) -> None:
        wires.append(await Wire(field).open())
        await wires[-1].send(sent[number % 2])

    await crowd(field.count(200), one, 16)
    await asyncio.sleep(min(field.seconds, 3))
    for body_field in wires:
        try:
            field.note(body_field.socket.recv(12)[9:12].decode() or "closed")
        except OSError:
            field.note("waits")
        body_field.close()
    if field.scale >= 1 and field.answers["429"] != 200 - 128:
        field.broken.append("streams of one token: %d refused, not 72" % field.answers["429"])


@attack("hung up behind a byte, 100 waits")
async def hidden_hang_ups(field: Field) -> None:
    """A byte of the next request, then the end: what was asked has nobody to go to."""
    async def one(number: int) -> None:
        body_field = await Wire(field).open()
        await body_field.send(field.request("GET /api/ask/%s?wait=90" % field.waiting))
        await asyncio.sleep(1)                          # the byte must not be read together with the head
        await body_field.send(b"G")
        await asyncio.sleep(1)
        body_field.close()
        field.note("left")

    await crowd(field.count(100), one, 100)
    until, base = time.monotonic() + 20, 40
    while field.bridge.gauges()[1] > base and time.monotonic() < until:
        await asyncio.sleep(0.2)
    left = field.bridge.gauges()[1]
    if left > base:
        field.broken.append("%d threads wait for clients that left 20 s ago" % left)


@attack("strangers for streams and waits")
async def strange_streams(field: Field) -> None:
    paths = ("GET /api/ask/%s/events" % field.job, "GET /api/ask/%s?wait=90" % field.job, "POST /api/ask", "POST /v1/messages")

    async def one(number: int) -> None:
        await exchange(field, field.request(paths[number % 4], "Connection: close", token=""), ["401", "429"], "stranger")

    await crowd(field.count(1000), one, 32)


async def flood(field: Field, sent: bytes, expected: Sequence[str], per_connection: int = 50) -> None:
    """One request after the other from 16 connections, for the time of an attack."""
    until = time.monotonic() + field.seconds

    async def one(number: int) -> None:
        while time.monotonic() < until:
            try:
                body_field = await Wire(field).open()
            except (OSError, asyncio.TimeoutError) as error:
                field.note(type(error).__name__)
                continue
            for _ in range(per_connection):
                if not await body_field.send(sent):
                    break
                data, end = await body_field.hear(20, 1)
                field.heard(data, end, [*expected, "-"], "flood")
                if end != "answered" or time.monotonic() > until:
                    break
            body_field.close()

    await crowd(16, one, 16)


@attack("a flood of strangers")
async def flood_of_strangers(field: Field) -> None:
    await flood(field, field.request("GET /api/status", token=""), ["200", "429"])


@attack("a flood of wrong tokens")
async def flood_of_wrong_tokens(field: Field) -> None:
    await flood(field, field.request("GET /api/usage", token="cab-" + "0" * 64), ["401", "429"])


@attack("12,000 addresses")
async def many_addresses(field: Field) -> None:
    """More than the limiter remembers; from 127.1.0.0 on."""
    async def one(number: int) -> None:
        body_field = Wire(field, source="127.%d.%d.%d" % (1 + (number >> 16), (number >> 8) & 255, number & 255 or 1))
        try:
            await body_field.open()
            await body_field.send(field.request("GET /hidden", "Connection: close", token=""))
            field.heard(*await body_field.hear(), expected=["404", "401"], name="address")
        except (OSError, asyncio.TimeoutError) as error:
            field.note(type(error).__name__)
        finally:
            body_field.close()

    await crowd(field.count(12_000), one, 32)


# --- the campaign ---


Row = Dict[str, Any]


LARGE = ("deaf readers", "slow readers")               # of the 9 MiB answer, which exists from their turn on: they come last


def run_attack(bridge: Bridge, good: GoodClient, number: int, options: argparse.Namespace, tokens: Mapping[str, str], finished: str,
               folder: Path) -> Row:
    """One attack, from a quiet bridge to a quiet bridge. -> its row of the table."""
    name, function = ATTACKS[number]
    gate = folder / ("gate-%d" % number)
    size = 9 if function is deaf_streams else 0
    job = bridge.ask(tokens["attacker"], "pour %d %s" % (size, gate))
    bridge.wait_for(tokens["attacker"], job, "processing")
    waiting, own = bridge.ask(tokens["attacker"], "hello"), bridge.ask(tokens["good"], "hello")
    time.sleep(1 if size else 0.2)
    base, field = bridge.gauges(), Field(bridge, number, options, tokens["attacker"], finished, job, waiting)
    gauge = Gauge(bridge)
    gauge.start()
    good.follow("/api/ask/" + own)
    began = time.monotonic()
    try:
        asyncio.run(function(field))
    except (OSError, asyncio.TimeoutError) as error:
        field.broken.append("%s: the attack itself failed: %r" % (name, error))
    seconds = time.monotonic() - began
    seen = good.follow("")
    peak = gauge.stop()
    until, after = time.monotonic() + options.settle, bridge.gauges()
    while (after[1] > base[1] + 3 or after[2] > base[2] + 3) and time.monotonic() < until:
        time.sleep(0.1)
        after = bridge.gauges()
    gate.touch()
    bridge.wait_for(tokens["good"], own, "completed")
    times = seen["seconds"] or [0.0]
    row = {"name": name, "tried": field.tried, "answered": dict(field.answers.most_common()), "seconds": seconds,
           "polls": len(seen["seconds"]), "median": statistics.median(times), "longest": max(times),
           "lost": dict(Counter(seen["lost"])), "failed": dict(Counter(seen["failed"])),
           "base": base, "peak": peak, "after": after, "broken": field.broken}
    row["broken"] = sorted(set(field.broken + broken_promises(row, options)))
    return row


def broken_promises(row: Row, options: argparse.Namespace) -> List[str]:
    found, name = [], row["name"]
    if row["failed"]:
        found.append("%s: the good client failed twice in a row: %s" % (name, row["failed"]))
    if "503" in row["lost"]:
        found.append("%s: the good client was refused (503)" % name)
    if not row["polls"]:
        found.append("%s: the good client did not poll" % name)
    if any("500" in outcome.split(" ")[0].split(",") for outcome in row["answered"]):
        found.append("%s: a 500" % name)
    more = 2 if any(word in name for word in ("9 MiB", "lists", "of one byte")) else 1     # these hold a token, and use it to the full
    if row["median"] > more * options.median_ms / 1000:
        found.append("%s: polls took %.0f ms at the median" % (name, row["median"] * 1000))
    if row["longest"] > options.longest_ms / 1000:
        found.append("%s: a poll took %.0f ms" % (name, row["longest"] * 1000))
    if row["peak"][0] > more * options.memory_mb:
        found.append("%s: the bridge used %.0f MB" % (name, row["peak"][0]))
    if row["after"][1] > row["base"][1] + 3 or row["after"][2] > row["base"][2] + 3:
        found.append("%s: %d threads and %d files were left (before: %d, %d)" % (name, *row["after"][1:], *row["base"][1:]))
    return found


def few_files(folder: Path) -> List[str]:
    """A bridge that may open 64 files, and 200 connections that stay. -> broken promises."""
    bridge, held = Bridge(folder, files=64), []
    try:
        for _ in range(200):
            body_field = socket.socket()
            body_field.settimeout(1)
            held.append(body_field)
            if body_field.connect_ex(("127.0.0.1", bridge.port)):
                break
        time.sleep(1)
        began, before = time.monotonic(), bridge.cpu_seconds()
        time.sleep(3)
        share = (bridge.cpu_seconds() - before) / (time.monotonic() - began)
        began = time.monotonic()
        status = bridge.call(bridge.admin, "GET", "/health")[0]
        took = time.monotonic() - began
        print("64 files and 200 connections: %.0f %% CPU; a new client was answered %d after %.2f s" % (share * 100, status, took))
        return (["few files: the bridge used %.0f %% of a CPU" % (share * 100)] if share > 0.5 else []) + (
            ["few files: a new client waited %.1f s" % took] if took > 5 else [])
    finally:
        for body_field in held:
            body_field.close()
        bridge.end()


def campaign(options: argparse.Namespace, folder: Path) -> Tuple[List[Row], List[str]]:
    """-> (the rows, the broken promises)."""
    rows, broken = [], []                                # type: List[Row], List[str]
    bridge = Bridge(folder / "bridge")
    good: Optional[GoodClient] = None
    try:
        tokens = {name: str(bridge.call(bridge.admin, "POST", "/api/tokens", {"name": name})[1]["token"]) for name in ("attacker", "good")}
        finished = ""
        time.sleep(1)
        first = bridge.gauges()
        good = GoodClient(bridge.port, tokens["good"])
        for number, (name, _) in sorted(enumerate(ATTACKS), key=lambda pair: pair[1][0].startswith(LARGE)):
            if options.only in name:
                if name.startswith(LARGE) and not finished:
                    finished = bridge.ask(tokens["attacker"], "flood 9")
                    bridge.wait_for(tokens["attacker"], finished, "completed")
                    if not options.json:
                        print("%-36s %.0f MB" % ("(after one answer of 9 MiB)", bridge.gauges()[0]))
                rows.append(run_attack(bridge, good, number, options, tokens, finished, folder))
                broken += rows[-1]["broken"]
                if not options.json:
                    print(line_of(rows[-1]), flush=True)
        good.end()
        until, last = time.monotonic() + options.settle, bridge.gauges()
        while (last[1] > first[1] or last[2] > first[2]) and time.monotonic() < until:
            time.sleep(0.1)
            last = bridge.gauges()
        if last[1] > first[1] + 3 or last[2] > first[2] + 3:
            broken.append("at the end: %d threads and %d files, at first %d and %d" % (*last[1:], *first[1:]))
    finally:
        if good:
            good.end()                                   # once more does no harm
        alive = bridge.program.poll() is None
        status = bridge.end()
        if not alive or status:
            broken.append("the bridge %s with status %d" % ("ended" if alive else "died", status))
    errors = bridge.errors.read_text()
    if "Traceback" in errors or "Unexpected" in errors:
        broken.append("the bridge's log: " + errors[errors.find("Unexpected"):][:1000])
    return rows, broken


HEAD = "%-36s %7s %7s %5s %8s %8s %5s %11s %9s %9s  %s" % (
    "attack", "tried", "seconds", "polls", "median", "longest", "lost", "MB", "threads", "files", "answered")


def line_of(row: Row) -> str:
    answered = ", ".join("%s: %d" % pair for pair in list(row["answered"].items())[:5])
    return "%-36s %7d %7.1f %5d %6.1fms %6.0fms %5d %11s %9s %9s  %s" % (
        row["name"], row["tried"], row["seconds"], row["polls"], row["median"] * 1000, row["longest"] * 1000, sum(row["lost"].values()),
        "%.0f>%.0f" % (row["peak"][0], row["after"][0]), "%d>%d" % (row["peak"][1], row["after"][1]),
        "%d>%d" % (row["peak"][2], row["after"][2]), answered)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="Attacks a bridge, and tells what a good client notices.")
    parser.add_argument("--only", default="", help="the attacks whose name holds these words")
    parser.add_argument("--scale", type=float, default=1.0, help="how many of each, against the table (default: 1.0)")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long an attack that lasts goes on (default: 10)")
    parser.add_argument("--settle", type=float, default=40.0, help="how long threads and files may need to go (default: 40)")
    parser.add_argument("--median-ms", type=float, default=100.0, help="most at the median of the good client's polls (default: 100)")
    parser.add_argument("--longest-ms", type=float, default=5000.0, help="most for any of its polls (default: 5000)")
    parser.add_argument("--memory-mb", type=float, default=160.0, help="most memory of the bridge (default: 160)")
    parser.add_argument("--seed", type=int, default=1)
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
