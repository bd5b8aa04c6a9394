"""Kill the bridge with SIGKILL at random moments under load, and check its promise each time.

    python tests/bench/kill.py [--kills 200] [--seed 1] [--clients 12] [--outages] [--json]

The promise: every request that was answered with 202 ends exactly once, as `completed` or `error`,
in order, and is never lost.

The bridge is a process of its own over a fake CLI that logs the start and the end of each request.
Clients send messages (with and without Idempotency-Key, with `wait`, in conversations, over /v1),
poll, follow streams, cancel and list. After up to 400 ms, sometimes more, the program kills the
bridge: while it serves, while it starts, or during an ordered shutdown. Then it restarts the bridge
on the same folder and port.

With --outages the network of the fake fails at random moments, also in the middle of an answer, or
its login is refused until it is renewed. No request may fail because of that, be overtaken, or
count such a run as an attempt; only requests of /v1 may fail, after a second.

After each kill the program checks a copy of the database. At the end it compares the database with
the responses that the clients received and with the log of the fake.
Exit status 1 if the promise is broken. Linux only (it reads /proc).
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import claude_api_bridge as cab  # noqa: E402

# Time for a start: ten times what a loaded machine needs.
SERVING_SECONDS = 60
# Time for a response: no client asks the bridge to wait longer than a few seconds.
ANSWER_SECONDS = 60
# Time in which the child processes of a killed bridge must exit by themselves.
LEFT_SECONDS = 20
# Time in which the queue must be empty at the end.
DRAIN_SECONDS = 300
# Most attempts of a request that the end of the bridge interrupted.
ATTEMPTS = 2
# With --outages: shorter waits in the bridge, and the name of the file that makes the fake fail.
SHORT_WAITS = "cab.BACK_OFF_SECONDS = (0.05, 0.1, 0.2); cab.CHAT_HOLD_SECONDS['network'] = 1.0"
AWAY = "away"
# Clients pause while this many requests wait.
LONGEST_QUEUE = 25
MARK = re.compile(r"\bwork (m-\d+)")

# `work MARKER SECONDS [fail] ...`: run for this time, then answer with the marker, the pid and the
# last 20 markers of the conversation. While the file `away` exists, the run fails, as the real CLI
# fails without a network (or, if the file says so, without a login).
FAKE = """
import json, os, sys, time
sys.path.insert(0, %r)
import fake_claude

class Noting(fake_claude.Fake):
    def note(self, line):
        pass

    def log(self, *words):
        path = os.path.join(str(self.folder), "runs.log")
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(file, (json.dumps(words) + "\\n").encode())
        os.close(file)

    def is_away(self, marker, what):
        try:
            with open(os.path.join(str(self.folder), %r)) as file:
                reason = file.read()
        except OSError:
            return False
        self.log(what, marker)
        word, status = "server_error", None
        text = "API Error: Connection refused (ECONNREFUSED)"
        if reason == "login":
            word, status = "authentication_failed", 401
            text = "Failed to authenticate. API Error: 401 Invalid bearer token"
        message = {"role": "assistant", "model": "<synthetic>", "content": []}
        self.say(type="assistant", message=message, error=word)
        self.result(text, is_error=True, api_error_status=status, stop_reason="stop_sequence")
        return True

    def act_work(self, rest):
        marker, seconds, *how = rest.split()
        if self.is_away(marker, "away"):
            return
        self.log("begin", marker)
        earlier = [text.split()[1] for role, text in self.turns[:-1] if role == "user"][-20:]
        answer = " ".join([marker, "by", str(os.getpid()), "after", *earlier])
        for piece in (answer[:5], answer[5:12], answer[12:]):
            self.delta(piece)
            time.sleep(float(seconds) / 3)
            if self.is_away(marker, "lost"):
                return
        if how[:1] == ["fail"]:
            errors = ["failed on request"]
            return self.result("", is_error=True, subtype="error_during_execution", errors=errors)
        self.turns.append(["assistant", answer])
        if self.is_persistent:
            self.save_turns()
        self.log("end", marker, answer)
        message = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        self.say(type="assistant", message=message, parent_tool_use_id=None)
        self.result(answer)

fake_claude.Fake = Noting
sys.exit(fake_claude.main(%r))
"""


def write_fake(folder: Path) -> Path:
    """Write the fake CLI; return its path."""
    import fake_claude

    folder.mkdir(parents=True)
    (folder / "claude.py").write_text(FAKE % (str(TESTS), AWAY, str(folder)))
    path = folder / "claude"
    interpreter, script = shlex.quote(sys.executable), shlex.quote(str(folder / "claude.py"))
    path.write_text('%sexec %s -S %s "$@"\n' % (fake_claude.PROBE_SCRIPT, interpreter, script))
    path.chmod(0o755)
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def bridge_command(
    folder: Path, claude: Path, port: int, *flags: str, before: str = ""
) -> List[str]:
    """Return the command that starts the bridge. before: statements that run first."""
    code = (
        "import sys\nsys.path.insert(0, %r)\nsys.argv[0] = 'claude_api_bridge.py'\n"
        "import claude_api_bridge as cab\n%s\ncab.run()"
    )
    return [
        sys.executable, "-S", "-c", code % (str(TESTS.parent), before), "start", "--no-tunnel",
        "--host", "127.0.0.1", "--port", str(port), "--rate-limit", "0", "--data-dir",
        str(folder / "data"), "--claude", str(claude), *flags,
    ]


class Program:
    """The bridge as a process. Its log is appended to a file."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.started_at = time.monotonic()
        self.lines: List[str] = []
        with open(folder / "bridge.log", "ab") as log:
            self.process = subprocess.Popen(
                list(command),
                env={"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )

    def wait_serving(self) -> float:
        """Wait until it prints its address; return the seconds since its start.

        Raises RuntimeError.
        """
        watchdog = threading.Timer(SERVING_SECONDS, self.process.kill)
        watchdog.start()
        try:
            assert self.process.stdout is not None
            for raw in self.process.stdout:
                self.lines.append(raw.decode().strip())
                if self.lines[-1].startswith("http"):
                    return time.monotonic() - self.started_at
        finally:
            watchdog.cancel()
            watchdog.join()
        raise RuntimeError("the bridge did not start (status %s)" % self.process.wait())

    @property
    def token(self) -> str:
        return next(line for line in self.lines if line.startswith("cab-"))

    def end(self, number: int, seconds: float = 30) -> int:
        """Send a signal; return the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(seconds)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


class Lost(Exception):
    """No response arrived: the bridge was killed, or does not run."""


def call(
    port: int,
    token: Optional[str],
    method: str,
    path: str,
    body: Any = None,
    headers: Optional[Dict[str, str]] = None,
) -> Tuple[int, Dict[str, str], bytes]:
    """Send a request on a connection of its own; return (status, headers, body). Raises Lost."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    authorization = {"Authorization": "Bearer " + token} if token else {}
    data = None if body is None else json.dumps(body)
    try:
        connection.request(method, path, data, {**authorization, **(headers or {})})
        response = connection.getresponse()
        response_headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, response_headers, response.read()
    except (OSError, http.client.HTTPException) as error:
        raise Lost(repr(error)) from None
    finally:
        connection.close()


@contextlib.contextmanager
def opened(
    port: int,
    token: str,
    method: str,
    path: str,
    body: Any = None,
    headers: Optional[Dict[str, str]] = None,
) -> Iterator[http.client.HTTPResponse]:
    """Send a request; the caller reads the response. Raises Lost if the connection breaks."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    data = None if body is None else json.dumps(body)
    try:
        all_headers = {"Authorization": "Bearer " + token, **(headers or {})}
        connection.request(method, path, data, all_headers)
        with connection.getresponse() as response:
            yield response
    except (OSError, http.client.HTTPException) as error:
        raise Lost(repr(error)) from None
    finally:
        connection.close()


def events(response: http.client.HTTPResponse) -> Iterator[Tuple[str, int, Any]]:
    """Yield (kind, id, data) of the Server-Sent Events; skip comments."""
    fields: Dict[str, str] = {}
    for raw in response:
        name, _, value = raw.decode().rstrip("\n").partition(": ")
        if name:
            fields[name] = value
        elif "event" in fields:
            yield fields["event"], int(fields["id"]), json.loads(fields["data"])
            fields = {}


# Fields that not every response about a finished request has.
OPTIONAL = ("ok", "message", "tokenId", "api", "systemPrompt", "effort", "jsonSchema", "warnings")


def final_of(body: Dict[str, Any]) -> Dict[str, Any]:
    """Return the fields that every response about a finished request has."""
    return {name: value for name, value in body.items() if name not in OPTIONAL}


@dataclass
class Accepted:
    """A request whose 202 (or first event) reached a client.

    turn: number of requests that were accepted before.
    """

    id: str
    marker: str
    token: str
    client: int
    turn: int


@dataclass
class Ledger:
    """The responses that the clients received, and the violations in them. Any thread.

    finals: id -> final body.  chats: id -> text of a complete response of /v1.
    keys: marker -> id, of the requests with an Idempotency-Key.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    accepted: Dict[str, Accepted] = field(default_factory=dict)
    finals: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    cancelled: Set[str] = field(default_factory=set)
    asked_to_cancel: Set[str] = field(default_factory=set)
    chats: Dict[str, str] = field(default_factory=dict)
    keys: Dict[str, str] = field(default_factory=dict)
    counts: "Counter[str]" = field(default_factory=Counter)
    violations: List[str] = field(default_factory=list)
    markers: int = 0

    def marker(self) -> str:
        with self.lock:
            self.markers += 1
            return "m-%d" % self.markers

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def wrong(self, text: str) -> None:
        with self.lock:
            if len(self.violations) < 200:
                self.violations.append(text)

    def accept(self, job_id: str, marker: str, token: str, client: int, is_keyed: bool) -> None:
        with self.lock:
            if is_keyed and self.keys.setdefault(marker, job_id) != job_id:
                self.violations.append(
                    "the key %s made %s and %s" % (marker, self.keys[marker], job_id)
                )
            if job_id not in self.accepted:
                self.accepted[job_id] = Accepted(job_id, marker, token, client, len(self.accepted))
            if self.accepted[job_id].marker != marker:
                self.violations.append(
                    "%s was given to %s and %s" % (job_id, self.accepted[job_id].marker, marker)
                )

    def record(self, body: Dict[str, Any]) -> None:
        """Record the body of a response. The body of a finished request must never change."""
        if body["status"] not in ("completed", "error"):
            with self.lock:
                if body["requestId"] in self.finals:
                    self.violations.append(
                        "%s was finished, and is %s" % (body["requestId"], body["status"])
                    )
            return
        final = final_of(body)
        with self.lock:
            earlier = self.finals.setdefault(body["requestId"], final)
            if earlier != final:
                self.violations.append(
                    "%s ended as %r and as %r" % (body["requestId"], earlier, final)
                )

    def some_open(self, chooser: random.Random) -> Optional[Accepted]:
        """Return a random request without a final body, or None."""
        with self.lock:
            jobs = [job for job_id, job in self.accepted.items() if job_id not in self.finals]
        return chooser.choice(jobs) if jobs else None


@dataclass
class Stage:
    """The state that the clients share. tokens: name -> secret."""

    port: int
    ledger: Ledger
    tokens: Dict[str, str]
    is_serving: threading.Event = field(default_factory=threading.Event)
    is_over: threading.Event = field(default_factory=threading.Event)


# The moments of a kill.
SERVING, STARTING, ENDING = "while it served", "at a start", "in an ordered end"
MOMENTS = [SERVING, STARTING, ENDING]
# How often a client runs each of its methods.
WEIGHTS = {
    "ask": 4, "ask_with_key": 4, "ask_and_wait": 2, "ask_and_follow": 3, "ask_in_conversation": 3,
    "chat": 3, "poll": 3, "cancel": 1, "listing": 1,
}


class Client(threading.Thread):
    """Runs random actions until the stage is over; every third client only sends messages.

    After a kill it starts another action.
    """

    def __init__(self, number: int, stage: Stage, seed: int) -> None:
        super().__init__(name="client-%d" % number)
        self.number = number
        self.stage = stage
        self.ledger = stage.ledger
        self.random = random.Random(seed)

    def run(self) -> None:
        while not self.stage.is_over.is_set():
            kind = "ask"
            if self.number % 3:
                kind = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            try:
                self.ledger.count(kind)
                getattr(self, kind)()
            except Lost as lost:
                self._pause(lost)
            except Exception as error:
                # For example a body without an expected field.
                self.ledger.wrong("%s: %r" % (kind, error))

    def _pause(self, lost: Lost) -> None:
        """Wait for the next bridge.

        Sometimes wait only for a moment, so that some requests arrive before the bridge serves.
        """
        self.ledger.count("lost answers")
        if "timed out" in str(lost):
            self.ledger.wrong("no answer within %d s" % ANSWER_SECONDS)
        if self.random.random() < 0.7:
            self.stage.is_serving.wait(5)
        else:
            self.stage.is_over.wait(self.random.uniform(0.02, 0.2))

    def _work(self) -> Tuple[str, str]:
        """Return (marker, a message that contains it)."""
        marker = self.ledger.marker()
        seconds = 1.5
        if self.random.random() < 0.97:
            seconds = self.random.choice([0, 0, 0.01, 0.03, 0.1])
        suffix = " fail" if self.random.random() < 0.04 else ""
        return marker, "work %s %g%s" % (marker, seconds, suffix)

    def _refused(self, status: int, data: bytes) -> None:
        """Record a refused request. The status must allow the client to retry."""
        if status not in (429, 503):
            self.ledger.wrong("status %d: %s" % (status, data[:200].decode("utf-8", "replace")))
        self.ledger.count("refused %d" % status)
        self.stage.is_over.wait(0.1)

    def _post(
        self, message: str, marker: str, token: str = "app", key: Optional[str] = None, **more: Any
    ) -> Optional[str]:
        """Send POST /api/ask; return the id if the bridge accepts the request."""
        headers = {"Idempotency-Key": key} if key else {}
        status, _, data = call(
            self.stage.port, self.stage.tokens[token], "POST", "/api/ask",
            {"message": message, **more}, headers,
        )
        if status not in (200, 202):
            return self._refused(status, data)
        body = json.loads(data)
        self.ledger.accept(body["requestId"], marker, token, self.number, key is not None)
        if status == 200:
            self.ledger.record(body)
        elif body["position"] > LONGEST_QUEUE:
            self.stage.is_over.wait(0.3)
        return str(body["requestId"])

    def _insist(self, message: str, marker: str, **more: Any) -> None:
        """Send a message with a key until a response arrives, and sometimes once more."""
        first = None
        while not self.stage.is_over.is_set():
            try:
                job_id = self._post(message, marker, key=marker, **more)
                if first or job_id and self.random.random() < 0.7:
                    return
                first = job_id
            except Lost as lost:
                self._pause(lost)

    def ask(self) -> None:
        for _ in range(self.random.choice([1, 1, 3, 6])):
            marker, message = self._work()
            self._post(message, marker)

    def ask_with_key(self) -> None:
        marker, message = self._work()
        self._insist(message, marker)

    def ask_and_wait(self) -> None:
        marker, message = self._work()
        self._post(message, marker, wait=3)

    def ask_in_conversation(self) -> None:
        marker, message = self._work()
        more = {"token": "talk", "conversation": self.random.choice(["one", "two"])}
        if self.random.random() < 0.5:
            self._insist(message, marker, **more)
        else:
            self._post(message, marker, **more)

    def ask_and_follow(self) -> None:
        """Read a stream to its end, over restarts. The deltas must add up to the answer."""
        marker, message = self._work()
        path = "/api/ask"
        body: Dict[str, Any] = {"message": message, "stream": True}
        headers = {"Idempotency-Key": marker}
        text = ""
        while not self.stage.is_over.is_set():
            try:
                with opened(
                    self.stage.port, self.stage.tokens["app"], "POST", path, body, headers
                ) as response:
                    if response.status != 200:
                        self._refused(response.status, response.read())
                        continue
                    for kind, offset, data in events(response):
                        if kind == "delta":
                            text += data["text"]
                            if len(text) != offset:
                                return self.ledger.wrong(
                                    "stream of %s: a delta ends at %d, not at %d"
                                    % (marker, offset, len(text))
                                )
                            continue
                        self.ledger.accept(data["requestId"], marker, "app", self.number, True)
                        path, body, headers = "/api/ask/%s/events" % data["requestId"], {}, {}
                        if kind in ("completed", "error"):
                            self.ledger.record(data)
                            if kind == "completed" and text != data["response"]:
                                self.ledger.wrong(
                                    "stream of %s: %r is not %r" % (marker, text, data["response"])
                                )
                            return
                        # `queued` or `started`: the text restarts.
                        text = ""
            except Lost as lost:
                self._pause(lost)
            if path != "/api/ask":
                headers = {"Last-Event-ID": str(len(text))}

    def chat(self) -> None:
        """Send a message over /v1. `check_end` checks the complete responses."""
        marker, message = self._work()
        path = self.random.choice(["/v1/messages", "/v1/chat/completions"])
        messages = [{"role": "user", "content": message}]
        body = {"model": "haiku", "max_tokens": 100, "messages": messages}
        if self.random.random() < 0.3:
            with opened(
                self.stage.port, self.stage.tokens["app"], "POST", path, {**body, "stream": True}
            ) as response:
                data = response.read()
                if response.status != 200 and response.status not in (429, 500, 503):
                    self.ledger.wrong("%s: status %d %r" % (path, response.status, data[:200]))
            return
        status, headers, data = call(self.stage.port, self.stage.tokens["app"], "POST", path, body)
        if status == 200:
            answer = json.loads(data)
            if path.endswith("messages"):
                text = answer["content"][0]["text"]
            else:
                text = answer["choices"][0]["message"]["content"]
            with self.ledger.lock:
                self.ledger.chats[headers["x-request-id"]] = text
        elif status not in (429, 503) and not (status == 500 and b"failed on request" in data):
            self.ledger.wrong("%s: status %d %r" % (path, status, data[:200]))

    def poll(self) -> None:
        job = self.ledger.some_open(self.random)
        if not job:
            return self.ask()
        path = "/api/ask/%s%s" % (job.id, self.random.choice(["", "?wait=1", "?wait=3"]))
        status, _, data = call(self.stage.port, self.stage.tokens[job.token], "GET", path)
        if status in (200, 202):
            self.ledger.record(json.loads(data))
        else:
            self._refused(status, data)

    def cancel(self) -> None:
        job = self.ledger.some_open(self.random)
        if not job:
            return self.ask()
        with self.ledger.lock:
            self.ledger.asked_to_cancel.add(job.id)
        token = self.stage.tokens[job.token]
        status, _, data = call(self.stage.port, token, "DELETE", "/api/ask/" + job.id)
        if status == 200:
            self.ledger.record(json.loads(data))
            with self.ledger.lock:
                self.ledger.cancelled.add(job.id)
        elif status != 409:
            self._refused(status, data)

    def listing(self) -> None:
        status, _, data = call(
            self.stage.port, self.stage.tokens["admin"], "GET", "/api/requests?limit=50"
        )
        if status != 200:
            return self._refused(status, data)
        for body in json.loads(data)["requests"]:
            self.ledger.record(body)


class Outages(threading.Thread):
    """Lets the network or the login of the fake fail at random moments, until it is closed.

    count: of the outages so far.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(name="outages")
        self._away = folder / "fake" / AWAY
        # HOME of the bridge is `folder`.
        self._login = folder / ".claude" / ".credentials.json"
        self._login.parent.mkdir()
        self._login.write_text("{}")
        self._random = random.Random(seed)
        self._is_over = threading.Event()
        self.count = 0

    def run(self) -> None:
        while not self._is_over.wait(self._random.uniform(0.2, 1.5)):
            part = self._away.with_suffix(".part")
            part.write_text(self._random.choice(["network", "network", "login"]))
            os.replace(str(part), str(self._away))
            self.count += 1
            self._is_over.wait(self._random.choice([0.05, 0.3, 0.8, 1.8]))
            self._away.unlink()
            # The login is renewed.
            renewed = self._login.stat().st_mtime_ns + 1_000_000
            os.utime(str(self._login), ns=(renewed, renewed))

    def close(self) -> None:
        """End the present outage."""
        self._is_over.set()
        self.join()


Row = Dict[str, Any]


@dataclass
class Evidence:
    """Checks copies of the database. finished: id -> row in the first copy where it is finished."""

    ledger: Ledger
    finished: Dict[str, Row] = field(default_factory=dict)

    def check(self, data_dir: Path, scratch: Path) -> List[Row]:
        """Check a copy of the database; return its requests, in order of acceptance.

        The bridge does not run.
        """
        with self.ledger.lock:
            accepted, finals = set(self.ledger.accepted), dict(self.ledger.finals)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        for name in ("bridge.db", "bridge.db-wal"):
            if (data_dir / name).exists():
                shutil.copy(str(data_dir / name), str(scratch / name))
        with contextlib.closing(sqlite3.connect(str(scratch / "bridge.db"))) as db:
            if db.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                self.ledger.wrong("the database is damaged")
            db.row_factory = sqlite3.Row
            rows = [dict(row) for row in db.execute("SELECT * FROM jobs ORDER BY seq")]
        by_id = {row["id"]: row for row in rows}
        for job_id in accepted - set(by_id):
            self.ledger.wrong("%s (%s) is lost" % (job_id, self.ledger.accepted[job_id].marker))
        for job_id, final in finals.items():
            row = by_id.get(job_id)
            if row and row["status"] != final["status"]:
                self.ledger.wrong(
                    "%s was reported as %s before that was stored: it is %s"
                    % (job_id, final["status"], row["status"])
                )
        for row in rows:
            is_finished = row["status"] in ("completed", "error")
            if is_finished:
                self.finished.setdefault(row["id"], row)
            if self.finished.get(row["id"], row) != row:
                self.ledger.wrong(
                    "%s changed after its end: %r, %r" % (row["id"], self.finished[row["id"]], row)
                )
            if row["attempts"] > ATTEMPTS:
                self.ledger.wrong("%s was attempted %d times" % (row["id"], row["attempts"]))
        return rows


def left_behind(data_dir: Path) -> List[int]:
    """Return the ids of the child processes that a bridge on this folder left."""
    return cab.processes_tagged(cab.data_tag(data_dir) + ".")


def wait_gone(data_dir: Path, seconds: float) -> Optional[float]:
    """Wait until no process of a killed bridge is left; return the seconds, or None."""
    start = time.monotonic()
    while left_behind(data_dir):
        if time.monotonic() - start > seconds:
            return None
        time.sleep(0.01)
    return time.monotonic() - start


def every_page(port: int, token: str) -> List[Dict[str, Any]]:
    """Return all requests, oldest first."""
    requests: List[Dict[str, Any]] = []
    query = "?limit=100"
    while True:
        page = json.loads(call(port, token, "GET", "/api/requests" + query)[2])
        requests += page["requests"]
        if page["next"] is None:
            return requests[::-1]
        query = "?limit=100&before=" + page["next"]


def check_runs(
    ledger: Ledger, rows: Sequence[Row], log: Sequence[Sequence[str]], ordered_ends: int
) -> None:
    """Compare the log of the fake with the stored requests.

    Requests run in order, at most twice, and the answer of the fake is the one that is stored.
    ordered_ends: how often the bridge was shut down, which adds a run without an attempt.
    """
    by_marker = {(MARK.search(row["message"]) or [None, ""])[1]: row for row in rows}
    if len(by_marker) != len(rows):
        ledger.wrong(
            "%d markers in %d requests: one was queued twice" % (len(by_marker), len(rows))
        )
    begins: "Counter[str]" = Counter()
    answers: Dict[str, List[str]] = {}
    last = 0
    for what, marker, *answer in log:
        row = by_marker.get(marker)
        if row is None:
            ledger.wrong("%s ran, but is not stored" % marker)
        elif what in ("away", "lost"):
            # Such a run is no attempt.
            begins[marker] -= what == "lost"
            ledger.count("runs " + what)
        elif what == "begin":
            begins[marker] += 1
            if row["seq"] < last:
                ledger.wrong("%s (number %d) started after number %d" % (marker, row["seq"], last))
            last = max(last, row["seq"])
        else:
            answers.setdefault(marker, []).append(answer[0])
    done_at = 0.0
    memory: Dict[str, List[str]] = {}
    for marker, row in by_marker.items():
        if begins[marker] > row["attempts"] + ordered_ends:
            ledger.wrong(
                "%s started %d times, with %d attempts" % (marker, begins[marker], row["attempts"])
            )
        if row["status"] == "completed":
            if row["response"] not in answers.get(marker, [])[-1:]:
                ledger.wrong(
                    "%s was answered %r, the fake printed %r"
                    % (marker, row["response"], answers.get(marker))
                )
            earlier = memory.setdefault(row["conversation"], []) if row["conversation"] else []
            if row["response"].split()[4:] != earlier[-20:]:
                ledger.wrong(
                    "%s remembered %r instead of %r"
                    % (marker, row["response"].split()[4:], earlier[-20:])
                )
            earlier.append(marker)
        elif row["status"] != "error":
            ledger.wrong("%s is %s at the end" % (marker, row["status"]))
        elif row["error_code"] == "interrupted" and not row["api"]:
            if row["attempts"] != ATTEMPTS:
                ledger.wrong("%s was given up after %d attempts" % (marker, row["attempts"]))
        elif row["error_code"] in ("network", "auth_required"):
            if not row["api"] or not ledger.counts["runs away"]:
                ledger.wrong("%s failed because of an outage" % marker)
        elif row["error_code"] == "cancelled" and not row["api"]:
            if row["id"] not in ledger.asked_to_cancel:
                ledger.wrong("%s was cancelled, but no client asked for it" % marker)
        elif row["error_code"] not in ("interrupted", "cancelled") and not row["message"].endswith(
            " fail"
        ):
            ledger.wrong("%s ended with %s: %s" % (marker, row["error_code"], row["error"]))
        if row["status"] == "completed" or row["error_code"] == "cli_error":
            if row["completed_at"] < done_at:
                ledger.wrong(
                    "%s (number %d) ended before an earlier request" % (marker, row["seq"])
                )
            done_at = row["completed_at"]


def check_end(
    ledger: Ledger, rows: Sequence[Row], bodies: Sequence[Dict[str, Any]], usage: Dict[str, Any]
) -> None:
    """Compare the responses and the usage with the stored requests."""
    by_id = {row["id"]: row for row in rows}
    for body in bodies:
        ledger.record(body)
    if [body["requestId"] for body in bodies] != [row["id"] for row in rows]:
        ledger.wrong("the list differs from the stored requests")
    for job_id in set(ledger.accepted) - set(ledger.finals):
        ledger.wrong("%s has no end" % job_id)
    for job_id in ledger.cancelled & set(by_id):
        if by_id[job_id]["error_code"] != "cancelled":
            end = by_id[job_id]["error_code"] or "completed"
            ledger.wrong("%s was cancelled, but ended as %s" % (job_id, end))
    for job_id, text in ledger.chats.items():
        stored = by_id.get(job_id, {}).get("response")
        if stored != text:
            ledger.wrong("%s was answered %r over /v1, stored is %r" % (job_id, text, stored))
    last: Dict[int, Tuple[int, str]] = {}
    jobs = [job for job in ledger.accepted.values() if job.id in by_id]
    for job in sorted(jobs, key=lambda job: job.turn):
        seq = by_id[job.id]["seq"]
        latest = last.get(job.client, (0, ""))
        if seq < latest[0] and job.marker not in ledger.keys:
            ledger.wrong("%s was accepted after %s, but is before it" % (job.marker, latest[1]))
        last[job.client] = max(latest, (seq, job.marker))
    stored_counts = {
        "requests": len(rows),
        "completed": sum(row["status"] == "completed" for row in rows),
        "errors": sum(row["status"] == "error" for row in rows),
    }
    counted = {name: usage["total"][name] for name in stored_counts}
    if counted != stored_counts:
        ledger.wrong("the usage reports %r, stored is %r" % (counted, stored_counts))


def campaign(
    kills: int,
    seed: int,
    clients: int,
    folder: Path,
    say: bool = False,
    has_outages: bool = False,
) -> Dict[str, Any]:
    """Kill the bridge `kills` times; return the summary. `violations` is a list."""
    chooser = random.Random(seed)
    claude = write_fake(folder / "fake")
    port = free_port()
    command = bridge_command(folder, claude, port, before=SHORT_WAITS if has_outages else "")
    data_dir = folder / "data"
    program = Program(command, folder)
    program.wait_serving()
    tokens = {"admin": program.token}
    for name, more in (("app", {}), ("talk", {"sessionMode": "stateful"})):
        tokens[name] = json.loads(
            call(port, tokens["admin"], "POST", "/api/tokens", {"name": name, **more})[2]
        )["token"]
    ledger = Ledger()
    stage, evidence = Stage(port, ledger, tokens), Evidence(ledger)
    crowd = [Client(n, stage, chooser.randrange(1 << 30)) for n in range(clients)]
    recoveries: List[float] = []
    gone: List[float] = []
    moments: "Counter[str]" = Counter()
    left: Set[Tuple[int, Optional[str]]] = set()
    stage.is_serving.set()
    outages = Outages(folder, chooser.randrange(1 << 30)) if has_outages else None
    for thread in (*crowd, *([outages] if outages else [])):
        thread.start()
    try:
        for n in range(kills):
            moment = chooser.choices(MOMENTS, [70, 15, 15])[0] if n else SERVING
            moments[moment] += 1
            if moment == STARTING:
                stage.is_over.wait(chooser.uniform(0, 1.2 * statistics.median(recoveries or [0.5])))
            elif n:
                recoveries.append(program.wait_serving())
                for pid, started in left:
                    if started and cab.started_at(pid) == started:
                        ledger.wrong("process %d of a killed bridge outlived the next start" % pid)
                stage.is_serving.set()
            if moment != STARTING:
                is_short = chooser.random() < 0.8
                stage.is_over.wait(chooser.uniform(0, 0.4) if is_short else chooser.uniform(0.4, 2))
            if moment == ENDING:
                program.process.send_signal(signal.SIGTERM)
                stage.is_over.wait(chooser.uniform(0, 1.5))
            program.end(signal.SIGKILL)
            stage.is_serving.clear()
            left = set()
            if chooser.random() < 0.5:
                took = wait_gone(data_dir, LEFT_SECONDS)
                if took is None:
                    ledger.wrong("processes %r outlived a killed bridge" % left_behind(data_dir))
                gone.append(took or LEFT_SECONDS)
            else:
                left = {(pid, cab.started_at(pid)) for pid in left_behind(data_dir)}
            evidence.check(data_dir, folder / "copy")
            program = Program(command, folder)
            if say and (n + 1) % 20 == 0:
                print(
                    "%4d kills, %5d accepted, %d violations"
                    % (n + 1, len(ledger.accepted), len(ledger.violations)),
                    file=sys.stderr,
                )
        recoveries.append(program.wait_serving())
        stage.is_serving.set()
    except RuntimeError as error:
        ledger.wrong(str(error))
    finally:
        if outages:
            outages.close()
        stage.is_over.set()
        stage.is_serving.set()
        for client in crowd:
            client.join(2 * ANSWER_SECONDS)
            if client.is_alive():
                ledger.wrong("%s hangs" % client.name)
    try:
        if program.process.poll() is None:
            deadline = time.monotonic() + DRAIN_SECONDS
            while json.loads(call(port, None, "GET", "/api/status")[2])["queue"]["length"]:
                if time.monotonic() > deadline:
                    ledger.wrong("the queue is not empty after %d s" % DRAIN_SECONDS)
                    break
                time.sleep(0.05)
            bodies = every_page(port, tokens["admin"])
            usage = json.loads(call(port, tokens["admin"], "GET", "/api/usage")[2])
            if program.end(signal.SIGTERM):
                ledger.wrong("the last bridge ended with an error")
            rows = evidence.check(data_dir, folder / "copy")
            lines = (folder / "fake" / "runs.log").read_text().splitlines()
            check_runs(ledger, rows, [json.loads(line) for line in lines], moments[ENDING])
            check_end(ledger, rows, bodies, usage)
            if left_behind(data_dir):
                ledger.wrong("processes %r outlived an ordered shutdown" % left_behind(data_dir))
        else:
            rows = evidence.check(data_dir, folder / "copy")
    except Lost as error:
        rows = []
        ledger.wrong("the last bridge does not answer: %s" % error)
    finally:
        if program.process.poll() is None:
            program.end(signal.SIGKILL)
        elif program.process.stdout:
            program.process.stdout.close()
    if "Traceback" in (folder / "bridge.log").read_text("utf-8"):
        ledger.wrong("the log contains a traceback")
    codes = Counter(row["error_code"] for row in rows)
    return {
        "kills": kills,
        "seed": seed,
        "moments": dict(moments),
        "stored": len(rows),
        "accepted": len(ledger.accepted),
        "with_key": len(ledger.keys),
        "answers_lost": ledger.counts["lost answers"],
        "completed": sum(row["status"] == "completed" for row in rows),
        "cancelled": codes["cancelled"],
        "interrupted": codes["interrupted"],
        "interrupted_v1": sum(
            row["error_code"] == "interrupted" and bool(row["api"]) for row in rows
        ),
        "failed": codes["cli_error"],
        "outages": outages.count if outages else 0,
        "runs_away": ledger.counts["runs away"],
        "runs_lost": ledger.counts["runs lost"],
        "failed_in_outages": codes["network"] + codes["auth_required"],
        "run_twice": sum(row["attempts"] == 2 for row in rows),
        "recovery_median": statistics.median(recoveries or [0.0]),
        "recovery_max": max(recoveries or [0.0]),
        "gone_max": max(gone or [0.0]),
        "kinds": dict(ledger.counts),
        "violations": ledger.violations,
    }


def table(summary: Dict[str, Any]) -> str:
    """Return the summary as text."""
    moments = ", ".join("%d %s" % (count, name) for name, count in summary["moments"].items())
    violations = summary["violations"]
    rows = [
        ("kills", "%d (%s)" % (summary["kills"], moments)),
        (
            "accepted (a 202 or an event)",
            "%(accepted)d, %(with_key)d with a key; %(stored)d stored" % summary,
        ),
        ("responses lost in a kill", summary["answers_lost"]),
        ("completed", summary["completed"]),
        ("interrupted", "%(interrupted)d, of them %(interrupted_v1)d of /v1" % summary),
        ("cancelled", summary["cancelled"]),
        ("failed on request", summary["failed"]),
        ("attempted twice", summary["run_twice"]),
        (
            "outages",
            "%(outages)d: %(runs_away)d runs failed at their start, %(runs_lost)d in the middle;"
            " %(failed_in_outages)d requests of /v1 failed" % summary,
        ),
        (
            "recovery, start to serving",
            "%(recovery_median).2f s median, %(recovery_max).2f s longest" % summary,
        ),
        ("children gone after a kill", "%(gone_max).2f s longest" % summary),
        ("violations", len(violations)),
    ]
    return "\n".join(["%-36s %s" % row for row in rows] + ["  " + text for text in violations[:40]])


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description="Kill the bridge at random moments and check that nothing is lost."
    )
    parser.add_argument("--kills", type=int, default=200, help="how often (default: 200)")
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        help="seed of the choices; the moments are not reproducible (default: 1)",
    )
    parser.add_argument("--clients", type=int, default=12, help="clients at once (default: 12)")
    parser.add_argument(
        "--keep", metavar="DIR", help="use this new folder instead of a temporary one"
    )
    parser.add_argument(
        "--outages", action="store_true", help="let the network and the login fail at random"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if sys.platform != "linux":
        print("error: this needs Linux", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        folder = Path(
            options.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        summary = campaign(
            options.kills, options.seed, options.clients, folder, True, options.outages
        )
    print(json.dumps(summary) if options.json else table(summary))
    return 1 if summary["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
