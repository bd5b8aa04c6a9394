"""SIGKILL of the bridge at random moments under load, with its promise checked each time.

    python tests/bench/kill.py [--kills 200] [--seed 1] [--clients 12] [--json]

The promise: every request that was answered with 202 ends exactly once, as `completed` or `error`, in order, and is never lost.
The bridge is a process of its own over a stand-in of the CLI that notes which request it begins and ends. Clients ask (with and
without Idempotency-Key, with `wait`, in conversations, over /v1), poll, follow streams, cancel and list. After up to 400 ms (at
times more) the bridge is killed: while it serves, while it starts, or in the middle of an ordered end; then it is started again on
the same folder and port. After each kill a copy of its database, as the kill left it, is looked at; what clients were told, and what
the stand-in noted, is looked at in the end. Exit status 1 when a promise is broken. Linux (it looks into /proc).
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

SERVING_SECONDS = 60                                    # for a start; ten times what a loaded machine takes
ANSWER_SECONDS = 60                                     # for a client; nothing is waited for longer than a few seconds
LEFT_SECONDS = 20                                       # for the children of a killed bridge to be gone by themselves
DRAIN_SECONDS = 300                                     # for the queue to be empty in the end
ATTEMPTS = 2                                            # so often at most is a request tried that the bridge cut short
LONGEST_QUEUE = 25                                      # clients ask no more while so many wait
MARK = re.compile(r"\bwork (m-\d+)")

# `work MARKER SECONDS [fail] ...`: takes so long, and answers with the marker, its pid and the last 20 markers that it remembers.
FAKE = """
import json, os, sys, time
sys.path.insert(0, %r)
import fake_claude

class Noting(fake_claude.Fake):
    def note(self, line):
        pass

    def tell(self, *words):
        log = os.open(os.path.join(str(self.folder), "runs.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(log, (json.dumps(words) + "\\n").encode())
        os.close(log)

    def act_work(self, rest):
        marker, seconds, *how = rest.split()
        self.tell("begin", marker)
        known = [text.split()[1] for role, text in self.turns[:-1] if role == "user"][-20:]
        answer = " ".join([marker, "by", str(os.getpid()), "after", *known])
        for piece in (answer[:5], answer[5:12], answer[12:]):
            self.delta(piece)
            time.sleep(float(seconds) / 3)
        if how[:1] == ["fail"]:
            return self.result("", is_error=True, subtype="error_during_execution", errors=["told to fail"])
        self.turns.append(["assistant", answer])
        if self.keeps:
            self._transcript().write_text(json.dumps(self.turns))
        self.tell("end", marker, answer)
        self.say(type="assistant", message={"role": "assistant", "content": [{"type": "text", "text": answer}]}, parent_tool_use_id=None)
        self.result(answer)

fake_claude.Fake = Noting
sys.exit(fake_claude.main(%r))
"""
PROBES = """#!/bin/sh
case "$1" in
--version) echo "2.1.330 (Claude Code)"; exit ;;
--help) echo "  auth %s"; exit ;;
--setting-sources=) echo '{"loggedIn": true, "subscriptionType": "max"}'; exit ;;
esac
exec %s -S %s "$@"
"""


def write_fake(folder: Path) -> Path:
    """Makes the stand-in of the CLI; what a start asks it a shell answers. -> its path."""
    import fake_claude
    folder.mkdir(parents=True)
    (folder / "claude.py").write_text(FAKE % (str(TESTS), str(folder)))
    path = folder / "claude"
    path.write_text(PROBES % (fake_claude.FLAGS, shlex.quote(sys.executable), shlex.quote(str(folder / "claude.py"))))
    path.chmod(0o755)
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def bridge_command(folder: Path, claude: Path, port: int, *flags: str, before: str = "") -> List[str]:
    """How the bridge is started. before: statements that its program does first."""
    code = "import sys\nsys.path.insert(0, %r)\nsys.argv[0] = 'claude_api_bridge.py'\nimport claude_api_bridge as cab\n%s\ncab.run()"
    return [sys.executable, "-S", "-c", code % (str(TESTS.parent), before), "start", "--no-tunnel", "--host", "127.0.0.1",
            "--port", str(port), "--rate-limit", "0", "--data-dir", str(folder / "data"), "--claude", str(claude), *flags]


class Program:
    """The bridge as a process; its log goes to the end of a file."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.began = time.monotonic()
        self.lines: List[str] = []
        with open(folder / "bridge.log", "ab") as log:
            self.process = subprocess.Popen(list(command), env={"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"},
                                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True)

    def wait_serving(self) -> float:
        """Waits until it has told its address. -> seconds since it was started. Raises RuntimeError."""
        watchdog = threading.Timer(SERVING_SECONDS, self.process.kill)
        watchdog.start()
        try:
            assert self.process.stdout is not None
            for raw in self.process.stdout:
                self.lines.append(raw.decode().strip())
                if self.lines[-1].startswith("http"):
                    return time.monotonic() - self.began
        finally:
            watchdog.cancel()
            watchdog.join()
        raise RuntimeError("the bridge did not start (status %s)" % self.process.wait())

    @property
    def token(self) -> str:
        return next(line for line in self.lines if line.startswith("cab-"))

    def end(self, number: int, seconds: float = 30) -> int:
        """Sends a signal, unless it has ended. -> its status."""
        self.process.send_signal(number)
        status = self.process.wait(seconds)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


class Lost(Exception):
    """The answer did not come: the bridge was killed, or is not there."""


def call(port: int, token: Optional[str], method: str, path: str, body: Any = None,
         headers: Optional[Dict[str, str]] = None) -> Tuple[int, Dict[str, str], bytes]:
    """One request on a connection of its own. -> (status, headers, body). Raises Lost."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    sent = {**({"Authorization": "Bearer " + token} if token else {}), **(headers or {})}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), sent)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    except (OSError, http.client.HTTPException) as error:
        raise Lost(repr(error)) from None
    finally:
        connection.close()


@contextlib.contextmanager
def opened(port: int, token: str, method: str, path: str, body: Any = None,
           headers: Optional[Dict[str, str]] = None) -> Iterator[http.client.HTTPResponse]:
    """An answer that is read as it comes; a cut raises Lost."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    try:
        sent = {"Authorization": "Bearer " + token, **(headers or {})}
        connection.request(method, path, None if body is None else json.dumps(body), sent)
        with connection.getresponse() as response:
            yield response
    except (OSError, http.client.HTTPException) as error:
        raise Lost(repr(error)) from None
    finally:
        connection.close()


def events(response: http.client.HTTPResponse) -> Iterator[Tuple[str, int, Any]]:
    """(kind, id, data) of each Server-Sent Event; comments are left out."""
    fields: Dict[str, str] = {}
    for raw in response:
        name, _, value = raw.decode().rstrip("\n").partition(": ")
        if name:
            fields[name] = value
        elif "event" in fields:
            yield fields["event"], int(fields["id"]), json.loads(fields["data"])
            fields = {}


ASKED = ("ok", "message", "tokenId", "api", "systemPrompt", "effort", "jsonSchema", "warnings")


def final_of(body: Dict[str, Any]) -> Dict[str, Any]:
    """What is told of a finished request, wherever it is told."""
    return {name: value for name, value in body.items() if name not in ASKED}


@dataclass
class Accepted:
    """A request whose 202 (or first event) reached a client. turn: how many that client had got before."""
    id: str
    marker: str
    token: str
    client: int
    turn: int


@dataclass
class Ledger:
    """What the clients were told, and what was wrong with it. Any thread."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    accepted: Dict[str, Accepted] = field(default_factory=dict)
    finals: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    cancelled: Set[str] = field(default_factory=set)
    asked_to_cancel: Set[str] = field(default_factory=set)
    chats: Dict[str, str] = field(default_factory=dict)       # id -> text of an answer over /v1 that came whole
    keys: Dict[str, str] = field(default_factory=dict)        # marker -> id, of those asked with a key
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
                self.violations.append("the key %s made %s and %s" % (marker, self.keys[marker], job_id))
            if job_id not in self.accepted:
                self.accepted[job_id] = Accepted(job_id, marker, token, client, len(self.accepted))
            if self.accepted[job_id].marker != marker:
                self.violations.append("%s was given to %s and %s" % (job_id, self.accepted[job_id].marker, marker))

    def told(self, body: Dict[str, Any]) -> None:
        """Notes a body of a request; a finished one must be the same for ever."""
        if body["status"] not in ("completed", "error"):
            with self.lock:
                if body["requestId"] in self.finals:
                    self.violations.append("%s was finished, and is %s" % (body["requestId"], body["status"]))
            return
        final = final_of(body)
        with self.lock:
            known = self.finals.setdefault(body["requestId"], final)
            if known != final:
                self.violations.append("%s ended as %r and as %r" % (body["requestId"], known, final))

    def some_open(self, chooser: random.Random) -> Optional[Accepted]:
        with self.lock:
            found = [each for job_id, each in self.accepted.items() if job_id not in self.finals]
        return chooser.choice(found) if found else None


@dataclass
class Stage:
    """What clients share. tokens: name -> secret."""
    port: int
    ledger: Ledger
    tokens: Dict[str, str]
    is_serving: threading.Event = field(default_factory=threading.Event)
    is_over: threading.Event = field(default_factory=threading.Event)


WEIGHTS = {"ask": 4, "ask_with_key": 4, "ask_and_wait": 2, "ask_and_follow": 3, "ask_in_conversation": 3, "chat": 3, "poll": 3, "cancel": 1,
           "listing": 1}


class Client(threading.Thread):
    """Does this and that (every third only asks) until the stage is over; goes on with a new thing when the bridge is gone."""

    def __init__(self, number: int, stage: Stage, seed: int) -> None:
        super().__init__(name="client-%d" % number)
        self.number, self.stage, self.ledger, self.random = number, stage, stage.ledger, random.Random(seed)

    def run(self) -> None:
        while not self.stage.is_over.is_set():
            kind = "ask" if self.number % 3 == 0 else self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            try:
                self.ledger.count(kind)
                getattr(self, kind)()
            except Lost as lost:
                self._rest(lost)
            except Exception as error:                    # a body that is not as it should be
                self.ledger.wrong("%s: %r" % (kind, error))

    def _rest(self, lost: Lost) -> None:
        """Waits for the next bridge; at times only for a moment, so that some come before it serves."""
        self.ledger.count("lost answers")
        if "timed out" in str(lost):
            self.ledger.wrong("no answer within %d s" % ANSWER_SECONDS)
        if self.random.random() < 0.7:
            self.stage.is_serving.wait(5)
        else:
            self.stage.is_over.wait(self.random.uniform(0.02, 0.2))

    def _work(self) -> Tuple[str, str]:
        """-> (marker, a message that holds it)."""
        marker = self.ledger.marker()
        seconds = self.random.choice([0, 0, 0.01, 0.03, 0.1]) if self.random.random() < 0.97 else 1.5
        return marker, "work %s %g%s" % (marker, seconds, " fail" if self.random.random() < 0.04 else "")

    def _refused(self, status: int, data: bytes) -> None:
        """An answer that is none of ours to count: it must be one that says to come again."""
        if status not in (429, 503):
            self.ledger.wrong("status %d: %s" % (status, data[:200].decode("utf-8", "replace")))
        self.ledger.count("refused %d" % status)
        self.stage.is_over.wait(0.1)

    def _post(self, message: str, marker: str, token: str = "app", key: Optional[str] = None, **more: Any) -> Optional[str]:
        """POST /api/ask. -> the id, when it was accepted."""
        headers = {"Idempotency-Key": key} if key else {}
        status, _, data = call(self.stage.port, self.stage.tokens[token], "POST", "/api/ask", {"message": message, **more}, headers)
        if status not in (200, 202):
            return self._refused(status, data)
        body = json.loads(data)
        self.ledger.accept(body["requestId"], marker, token, self.number, key is not None)
        if status == 200:
            self.ledger.told(body)
        elif body["position"] > LONGEST_QUEUE:
            self.stage.is_over.wait(0.3)
        return str(body["requestId"])

    def _insist(self, message: str, marker: str, **more: Any) -> None:
        """With a key, again until it is known what became of it, and at times once more."""
        first = None
        while not self.stage.is_over.is_set():
            try:
                job_id = self._post(message, marker, key=marker, **more)
                if first or job_id and self.random.random() < 0.7:
                    return
                first = job_id
            except Lost as lost:
                self._rest(lost)

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
        """Reads the stream to its end, over restarts: what comes must add up to the answer."""
        marker, message = self._work()
        path, body, headers, text, offset = "/api/ask", {"message": message, "stream": True}, {"Idempotency-Key": marker}, "", 0
        while not self.stage.is_over.is_set():
            try:
                with opened(self.stage.port, self.stage.tokens["app"], "POST", path, body, headers) as response:
                    if response.status != 200:
                        self._refused(response.status, response.read())
                        continue
                    for kind, offset, data in events(response):
                        if kind == "delta":
                            text += data["text"]
                            if len(text) != offset:
                                return self.ledger.wrong("stream of %s: a delta ends at %d, not at %d" % (marker, offset, len(text)))
                            continue
                        self.ledger.accept(data["requestId"], marker, "app", self.number, True)
                        path, body, headers = "/api/ask/%s/events" % data["requestId"], {}, {}
                        if kind in ("completed", "error"):
                            self.ledger.told(data)
                            if kind == "completed" and text != data["response"]:
                                self.ledger.wrong("stream of %s: %r is not %r" % (marker, text, data["response"]))
                            return
                        text = ""                              # queued or started: it begins anew
            except Lost as lost:
                self._rest(lost)
            if path != "/api/ask":
                headers = {"Last-Event-ID": str(len(text))}

    def chat(self) -> None:
        """Over /v1, in either format; what came whole is checked in the end."""
        marker, message = self._work()
        path = self.random.choice(["/v1/messages", "/v1/chat/completions"])
        body = {"model": "haiku", "max_tokens": 100, "messages": [{"role": "user", "content": message}]}
        if self.random.random() < 0.3:
            with opened(self.stage.port, self.stage.tokens["app"], "POST", path, {**body, "stream": True}) as response:
                data = response.read()
                if response.status != 200 and response.status not in (429, 500, 503):
                    self.ledger.wrong("%s: status %d %r" % (path, response.status, data[:200]))
            return
        status, headers, data = call(self.stage.port, self.stage.tokens["app"], "POST", path, body)
        if status == 200:
            answer = json.loads(data)
            text = answer["content"][0]["text"] if path.endswith("messages") else answer["choices"][0]["message"]["content"]
            with self.ledger.lock:
                self.ledger.chats[headers["x-request-id"]] = text
        elif status not in (429, 503) and not (status == 500 and b"told to fail" in data):
            self.ledger.wrong("%s: status %d %r" % (path, status, data[:200]))

    def poll(self) -> None:
        each = self.ledger.some_open(self.random)
        if not each:
            return self.ask()
        status, _, data = call(self.stage.port, self.stage.tokens[each.token], "GET",
                               "/api/ask/%s%s" % (each.id, self.random.choice(["", "?wait=1", "?wait=3"])))
        if status in (200, 202):
            self.ledger.told(json.loads(data))
        else:
            self._refused(status, data)

    def cancel(self) -> None:
        each = self.ledger.some_open(self.random)
        if not each:
            return self.ask()
        with self.ledger.lock:
            self.ledger.asked_to_cancel.add(each.id)
        status, _, data = call(self.stage.port, self.stage.tokens[each.token], "DELETE", "/api/ask/" + each.id)
        if status == 200:
            self.ledger.told(json.loads(data))
            with self.ledger.lock:
                self.ledger.cancelled.add(each.id)
        elif status != 409:
            self._refused(status, data)

    def listing(self) -> None:
        status, _, data = call(self.stage.port, self.stage.tokens["admin"], "GET", "/api/requests?limit=50")
        if status != 200:
            return self._refused(status, data)
        for body in json.loads(data)["requests"]:
            self.ledger.told(body)


Row = Dict[str, Any]


@dataclass
class Evidence:
    """What the copies of the database held. finished: the row of each request when it was seen finished first."""
    ledger: Ledger
    finished: Dict[str, Row] = field(default_factory=dict)

    def look(self, data_dir: Path, scratch: Path) -> List[Row]:
        """Looks at a copy of the database of a bridge that is dead. -> its requests, in order of acceptance."""
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
                self.ledger.wrong("%s was told to be %s before that was stored: it is %s" % (job_id, final["status"], row["status"]))
        for row in rows:
            is_finished = row["status"] in ("completed", "error")
            if is_finished and self.finished.setdefault(row["id"], row) != row or not is_finished and row["id"] in self.finished:
                self.ledger.wrong("%s changed after its end: %r, %r" % (row["id"], self.finished[row["id"]], row))
            if row["attempts"] > ATTEMPTS:
                self.ledger.wrong("%s was attempted %d times" % (row["id"], row["attempts"]))
        return rows


def left_behind(data_dir: Path) -> List[int]:
    return cab.processes_tagged(cab.data_tag(data_dir) + ".")


def wait_gone(data_dir: Path, seconds: float) -> Optional[float]:
    """Waits until no process of a dead bridge is left. -> how long it took, or None."""
    began = time.monotonic()
    while left_behind(data_dir):
        if time.monotonic() - began > seconds:
            return None
        time.sleep(0.01)
    return time.monotonic() - began


def every_page(port: int, token: str) -> List[Dict[str, Any]]:
    """All requests, oldest first."""
    found, before = [], ""
    while before is not None:
        page = json.loads(call(port, token, "GET", "/api/requests?limit=100" + (before and "&before=" + before))[2])
        found += page["requests"]
        before = page["next"]
    return found[::-1]


def check_runs(ledger: Ledger, rows: Sequence[Row], log: Sequence[Sequence[str]], ordered_ends: int) -> None:
    """What the stand-in noted, against what became of the requests: in order, at most twice, and with the answer that was noted."""
    by_marker = {(MARK.search(row["message"]) or [None, ""])[1]: row for row in rows}
    if len(by_marker) != len(rows):
        ledger.wrong("%d markers in %d requests: one was queued twice" % (len(by_marker), len(rows)))
    begins: "Counter[str]" = Counter()
    answers: Dict[str, List[str]] = {}
    last = 0
    for what, marker, *answer in log:
        row = by_marker.get(marker)
        if row is None:
            ledger.wrong("%s ran, and is not stored" % marker)
        elif what == "begin":
            begins[marker] += 1
            if row["seq"] < last:
                ledger.wrong("%s (place %d) began after place %d" % (marker, row["seq"], last))
            last = max(last, row["seq"])
        else:
            answers.setdefault(marker, []).append(answer[0])
    done_at = 0.0
    memory: Dict[str, List[str]] = {}
    for marker, row in by_marker.items():
        if begins[marker] > row["attempts"] + ordered_ends:
            ledger.wrong("%s began %d times, with %d attempts" % (marker, begins[marker], row["attempts"]))
        if row["status"] == "completed":
            if row["response"] not in answers.get(marker, [])[-1:]:
                ledger.wrong("%s was answered %r, the stand-in said %r" % (marker, row["response"], answers.get(marker)))
            known = memory.setdefault(row["conversation"], []) if row["conversation"] else []
            if row["response"].split()[4:] != known[-20:]:
                ledger.wrong("%s remembered %r instead of %r" % (marker, row["response"].split()[4:], known[-20:]))
            known.append(marker)
        elif row["status"] != "error":
            ledger.wrong("%s is %s in the end" % (marker, row["status"]))
        elif row["error_code"] == "interrupted" and not row["api"]:
            if row["attempts"] != ATTEMPTS:
                ledger.wrong("%s was given up after %d attempts" % (marker, row["attempts"]))
        elif row["error_code"] == "cancelled" and not row["api"]:
            if row["id"] not in ledger.asked_to_cancel:
                ledger.wrong("%s was cancelled by nobody" % marker)
        elif row["error_code"] not in ("interrupted", "cancelled") and not row["message"].endswith(" fail"):
            ledger.wrong("%s ended with %s: %s" % (marker, row["error_code"], row["error"]))
        if row["status"] == "completed" or row["error_code"] == "cli_error":
            if row["completed_at"] < done_at:
                ledger.wrong("%s (place %d) ended before one that came earlier" % (marker, row["seq"]))
            done_at = row["completed_at"]


def check_end(ledger: Ledger, rows: Sequence[Row], bodies: Sequence[Dict[str, Any]], usage: Dict[str, Any]) -> None:
    """What clients were told, and what is counted, against what became of the requests."""
    by_id = {row["id"]: row for row in rows}
    for body in bodies:
        ledger.told(body)
    if [body["requestId"] for body in bodies] != [row["id"] for row in rows]:
        ledger.wrong("the list is not what is stored")
    for job_id in set(ledger.accepted) - set(ledger.finals):
        ledger.wrong("%s has no end" % job_id)
    for job_id in ledger.cancelled & set(by_id):
        if by_id[job_id]["error_code"] != "cancelled":
            ledger.wrong("%s was cancelled, and ended as %s" % (job_id, by_id[job_id]["error_code"] or "completed"))
    for job_id, text in ledger.chats.items():
        stored = by_id.get(job_id, {}).get("response")
        if stored != text:
            ledger.wrong("%s was answered %r over /v1, stored is %r" % (job_id, text, stored))
    last: Dict[int, Tuple[int, str]] = {}
    for each in sorted((each for each in ledger.accepted.values() if each.id in by_id), key=lambda each: each.turn):
        seq = by_id[each.id]["seq"]
        if seq < last.get(each.client, (0, ""))[0] and each.marker not in ledger.keys:
            ledger.wrong("%s was accepted after %s, and is before it" % (each.marker, last[each.client][1]))
        last[each.client] = max(last.get(each.client, (0, "")), (seq, each.marker))
    found = {"requests": len(rows), **{name: sum(row["status"] == status for row in rows)
                                       for name, status in (("completed", "completed"), ("errors", "error"))}}
    counted = {name: usage["total"][name] for name in found}
    if counted != found:
        ledger.wrong("the usage says %r, stored is %r" % (counted, found))


def campaign(kills: int, seed: int, clients: int, folder: Path, say: bool = False) -> Dict[str, Any]:
    """-> the summary; `violations` is a list."""
    chooser, claude, port = random.Random(seed), write_fake(folder / "fake"), free_port()
    command, data_dir = bridge_command(folder, claude, port), folder / "data"
    program = Program(command, folder)
    program.wait_serving()
    tokens = {"admin": program.token}
    for name, more in (("app", {}), ("talk", {"sessionMode": "stateful"})):
        tokens[name] = json.loads(call(port, tokens["admin"], "POST", "/api/tokens", {"name": name, **more})[2])["token"]
    ledger = Ledger()
    stage, evidence = Stage(port, ledger, tokens), Evidence(ledger)
    crowd = [Client(n, stage, chooser.randrange(1 << 30)) for n in range(clients)]
    recoveries: List[float] = []
    gone: List[float] = []
    moments: "Counter[str]" = Counter()
    left: Set[Tuple[int, Optional[str]]] = set()
    stage.is_serving.set()
    for each in crowd:
        each.start()
    try:
        for n in range(kills):
            how = chooser.choices(["while it served", "at a start", "in an ordered end"], [70, 15, 15])[0] if n else "while it served"
            moments[how] += 1
            if how == "at a start":
                stage.is_over.wait(chooser.uniform(0, 1.2 * statistics.median(recoveries or [0.5])))
            elif n:
                recoveries.append(program.wait_serving())
                for pid, started in left:
                    if started and cab.started_at(pid) == started:
                        ledger.wrong("process %d of a killed bridge outlived the next start" % pid)
                stage.is_serving.set()
            if how != "at a start":
                stage.is_over.wait(chooser.uniform(0, 0.4) if chooser.random() < 0.8 else chooser.uniform(0.4, 2))
            if how == "in an ordered end":
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
            evidence.look(data_dir, folder / "copy")
            program = Program(command, folder)
            if say and (n + 1) % 20 == 0:
                print("%4d kills, %5d accepted, %d violations" % (n + 1, len(ledger.accepted), len(ledger.violations)), file=sys.stderr)
        recoveries.append(program.wait_serving())
        stage.is_serving.set()
    except RuntimeError as error:
        ledger.wrong(str(error))
    finally:
        stage.is_over.set()
        stage.is_serving.set()
        for each in crowd:
            each.join(2 * ANSWER_SECONDS)
            if each.is_alive():
                ledger.wrong("%s hangs" % each.name)
    try:
        if program.process.poll() is None:
            until = time.monotonic() + DRAIN_SECONDS
            while json.loads(call(port, None, "GET", "/api/status")[2])["queue"]["length"]:
                if time.monotonic() > until:
                    ledger.wrong("the queue is not empty after %d s" % DRAIN_SECONDS)
                    break
                time.sleep(0.05)
            bodies = every_page(port, tokens["admin"])
            usage = json.loads(call(port, tokens["admin"], "GET", "/api/usage")[2])
            if program.end(signal.SIGTERM):
                ledger.wrong("the last bridge ended with an error")
            rows = evidence.look(data_dir, folder / "copy")
            log = [json.loads(line) for line in (folder / "fake" / "runs.log").read_text().splitlines()]
            check_runs(ledger, rows, log, moments["in an ordered end"])
            check_end(ledger, rows, bodies, usage)
            if left_behind(data_dir):
                ledger.wrong("processes %r outlived an ordered end" % left_behind(data_dir))
        else:
            rows = evidence.look(data_dir, folder / "copy")
    except Lost as error:
        rows = []
        ledger.wrong("the last bridge does not answer: %s" % error)
    finally:
        if program.process.poll() is None:
            program.end(signal.SIGKILL)
        elif program.process.stdout:
            program.process.stdout.close()
    if "Traceback" in (folder / "bridge.log").read_text("utf-8"):
        ledger.wrong("a traceback in the log")
    codes = Counter(row["error_code"] for row in rows)
    return {"kills": kills, "seed": seed, "moments": dict(moments), "stored": len(rows), "accepted": len(ledger.accepted),
            "with_key": len(ledger.keys), "answers_lost": ledger.counts["lost answers"],
            "completed": sum(row["status"] == "completed" for row in rows), "cancelled": codes["cancelled"],
            "interrupted": codes["interrupted"],
            "interrupted_v1": sum(row["error_code"] == "interrupted" and bool(row["api"]) for row in rows),
            "failed": codes["cli_error"], "run_twice": sum(row["attempts"] == 2 for row in rows),
            "recovery_median": statistics.median(recoveries or [0.0]), "recovery_max": max(recoveries or [0.0]),
            "gone_max": max(gone or [0.0]), "kinds": dict(ledger.counts), "violations": ledger.violations}


def table(found: Dict[str, Any]) -> str:
    rows = [("kills", "%d (%s)" % (found["kills"], ", ".join("%d %s" % (count, how) for how, count in found["moments"].items()))),
            ("accepted (a 202 or an event came)", "%d, %d with a key; %d stored" % (found["accepted"], found["with_key"], found["stored"])),
            ("answers that a kill took", found["answers_lost"]), ("completed", found["completed"]),
            ("interrupted", "%d, of them %d of /v1" % (found["interrupted"], found["interrupted_v1"])), ("cancelled", found["cancelled"]),
            ("failed as they were told to", found["failed"]), ("attempted twice", found["run_twice"]),
            ("recovery, start to serving", "%.2f s median, %.2f s longest" % (found["recovery_median"], found["recovery_max"])),
            ("children gone after a kill", "%.2f s longest" % found["gone_max"]), ("violations", len(found["violations"]))]
    return "\n".join(["%-36s %s" % row for row in rows] + ["  " + each for each in found["violations"][:40]])


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="Kills the bridge at random moments and checks that nothing is lost.")
    parser.add_argument("--kills", type=int, default=200, help="how often (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="of what is random in the choices, not in the moments (default: 1)")
    parser.add_argument("--clients", type=int, default=12, help="clients at once (default: 12)")
    parser.add_argument("--keep", metavar="DIR", help="a new folder that is kept, instead of a temporary one")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if sys.platform != "linux":
        print("error: this needs Linux", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        folder = Path(options.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        found = campaign(options.kills, options.seed, options.clients, folder, say=True)
    print(json.dumps(found) if options.json else table(found))
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
