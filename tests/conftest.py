"""Fixtures: a clock that tests move, a fake `claude`, a bridge in this process, a bridge as a program, a client."""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import pytest

import claude_api_bridge as cab
import fake_claude as fake_claude_program

MODULE = Path(cab.__file__)
TESTS = Path(__file__).parent
REQUIRE_REAL = os.environ.get("CAB_REQUIRE_REAL") == "1"


def wait_until(fact: Callable[[], Any], seconds: float = 10.0) -> Any:
    """The fact as soon as it is true; fails after a bound."""
    until = time.monotonic() + seconds
    while True:
        found = fact()
        if found:
            return found
        assert time.monotonic() < until, "not so within %g s" % seconds
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    return cab.started_at(pid) is not None


def missing(what: str) -> None:
    """Skips with the reason, or fails where everything must be there."""
    if REQUIRE_REAL:
        pytest.fail(what + " (required here)")
    pytest.skip(what)


class FakeClock(cab.Clock):
    """Both clocks, moved by hand."""

    def __init__(self, at: float = 1_800_000_000.0) -> None:
        self.at = at

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at

    def advance(self, seconds: float) -> None:
        self.at += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def our_children() -> List[int]:
    """Living processes whose parent is this one (Linux)."""
    listed = ""
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):               # a thread that ends meanwhile
            listed += path.read_text() + " "
    return [int(pid) for pid in listed.split() if is_running(int(pid))]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test leaves a thread or a process behind."""
    threads, children = set(threading.enumerate()), set(our_children())
    yield
    wait_until(lambda: set(threading.enumerate()) <= threads and set(our_children()) <= children, 8)


def asked_once(probe: Callable[..., str]) -> Callable[..., str]:
    """`probe` for hundreds of bridges over the same fake: what its shell says does not depend on where it is."""
    known: Dict[Tuple[str, ...], str] = {}

    def ask(argv: Sequence[str], environment: Mapping[str, str]) -> str:
        words, begins = tuple(argv[1:]), b""
        with contextlib.suppress(OSError), open(argv[0], "rb") as file:
            begins = file.read(len(DEFAULT_SESSION))
        if begins != DEFAULT_SESSION.encode():
            return probe(argv, environment)
        if words not in known:
            known[words] = probe(argv, environment)
        return known[words]
    return ask


@pytest.fixture(scope="session", autouse=True)
def short_rounds() -> Iterator[None]:
    """The listening thread looks at deadlines, and whether it is to end, more often, and less is waited for what does not end
    by itself: hundreds of bridges are closed here."""
    serve = cab.BridgeServer.serve_forever
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:            # as a shell leaves it to what it starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cab.BridgeServer, "serve_forever", lambda server, *_: serve(server, 0.005))
        patch.setattr(cab, "SHUTDOWN_GRACE_SECONDS", 0.4)          # the fake leaves at once, or is made to stay
        patch.setattr(cab, "FINISH_SECONDS", 0.4)
        patch.setattr(cab, "IDLE_THREAD_SECONDS", 0.002)      # each test looks for threads that were left
        patch.setattr(cab, "MAINTENANCE_SECONDS", 0.1)
        patch.setattr(cab, "POLL_SECONDS", 0.02)
        patch.setattr(cab, "HEALTH_SECONDS", 0.3)
        patch.setattr(cab, "probe", asked_once(cab.probe))
        patch.setattr(cab, "group_options", lambda *_: {"start_new_session": True})     # forking this large process is slow
        yield


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """The file that the prompt `hold FILE` waits for; made at the latest when the test ends."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


DEFAULT_SESSION = """#!/bin/sh
case "$1" in
--version) echo "2.1.330 (Claude Code)"; exit ;;
--help) echo "  auth %s"; exit ;;
--setting-sources=) echo '{"loggedIn": true, "subscriptionType": "max"}'; exit ;;
esac
""" % fake_claude_program.FLAGS


class FakeClaude:
    """An executable that behaves as tests/fake_claude.py says, and what it noted. Without options a shell answers what a
    start asks it, in a tenth of the time."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.path, self.script = folder, folder / "claude", folder / "claude.py"
        folder.mkdir(parents=True, exist_ok=True)
        self.script.write_text("import sys\nsys.path.insert(0, %r)\nimport fake_claude\nsys.exit(fake_claude.main(%r, **%r))\n"
                               % (str(TESTS), str(folder), options))
        self.path.write_text("%sexec %s -S %s \"$@\"\n" % ("#!/bin/sh\n" if options else DEFAULT_SESSION, *map(shlex.quote, (
            sys.executable, str(self.script)))))
        self.path.chmod(0o755)

    def _log(self, name: str) -> List[Dict[str, Any]]:
        path = self.folder / name
        written = path.read_text().rpartition("\n")[0] if path.exists() else ""          # the last line may be half there
        return [json.loads(line) for line in written.splitlines()]

    def starts(self) -> List[Dict[str, Any]]:
        """Every start: {"pid", "argv", "env", "cwd"}."""
        return self._log("starts.jsonl")

    def children(self) -> List[Dict[str, Any]]:
        """The starts in stream-json mode."""
        return [start for start in self.starts() if "-p" in start["argv"]]

    def lines(self) -> List[Dict[str, Any]]:
        """Every line that arrived on stdin."""
        return [entry["line"] for entry in self._log("lines.jsonl")]

    def prompts(self) -> List[str]:
        """The prompts that asked for an answer, in order."""
        return [fake_claude_program.text_of(line) for line in self.lines()
                if line["type"] == "user" and line.get("shouldQuery") is not False]


@pytest.fixture
def fake_claude(tmp_path: Path) -> Callable[..., FakeClaude]:
    return lambda **options: FakeClaude(tmp_path / "fake", **options)


@dataclass(frozen=True)
class Event:
    """One Server-Sent Event. kind: its name, or "comment"; id: where the text ends after it."""
    kind: str
    id: int
    data: Any


class Stream:
    """An open stream of events; iterate over it, and close it. events: all that were read, with `comment` for keep-alives."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection, self._response = connection, response
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.events: List[Event] = []

    def __iter__(self) -> Iterator[Event]:
        fields: Dict[str, str] = {}
        for raw in self._response:
            line = raw.decode("utf-8").rstrip("\n")
            name, _, value = line.partition(": ")
            if line:
                fields[name] = value
                continue
            event = Event("comment", -1, fields[""]) if "" in fields else Event(fields["event"], int(fields["id"]), json.loads(fields["data"]))
            fields = {}
            self.events.append(event)
            yield event

    def until(self, kind: str) -> Event:
        """Reads on to the next event of this kind; fails where the stream ends before."""
        for event in self:
            if event.kind == kind:
                return event
        raise AssertionError("the stream ended without %s: %r" % (kind, self.events[-3:]))

    def rest(self) -> List[Event]:
        """All events to the end of the stream."""
        for _ in self:
            pass
        self.close()
        return self.events

    @property
    def text(self) -> str:
        """The text as a client has it: a `queued` or `started` begins it anew."""
        return text_of(self.events)

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def text_of(events: Iterable[Event], begun: str = "") -> str:
    """The text that a reader has after these events; each delta must end where its id says."""
    for event in events:
        if event.kind in ("queued", "started"):
            begun = ""
        elif event.kind == "delta":
            begun += event.data["text"]
            assert event.id == len(begun), event
    return begun


@dataclass
class Answer:
    """What came back over HTTP."""
    status: int
    headers: Mapping[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class Api:
    """A client with a connection per call. token: sent as Bearer unless a call says otherwise."""

    def __init__(self, port: int, token: Optional[str] = None) -> None:
        self.port, self.token = port, token

    def with_token(self, token: Optional[str]) -> "Api":
        return Api(self.port, token)

    def call(self, method: str, path: str, body: Any = None, headers: Optional[Mapping[str, str]] = None) -> Answer:
        """body: bytes as they are, anything else as JSON."""
        sent = {**({"Authorization": "Bearer " + self.token} if self.token else {}), **(headers or {})}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
        try:
            connection.request(method, path, data, sent)
            response = connection.getresponse()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        finally:
            connection.close()

    def stream(self, method: str, path: str, body: Any = None, headers: Optional[Mapping[str, str]] = None) -> Stream:
        """A stream of events, open; the caller reads it to its end or closes it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
        sent = {**({"Authorization": "Bearer " + self.token} if self.token else {}), **(headers or {})}
        connection.request(method, path, None if body is None else json.dumps(body).encode(), sent)
        return Stream(connection, connection.getresponse())

    def follow(self, request_id: str, after: Optional[int] = None, method: str = "GET") -> Stream:
        return self.stream(method, "/api/ask/%s/events%s" % (request_id, "" if after is None else "?after=%d" % after))

    def get(self, path: str, **options: Any) -> Answer:
        return self.call("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        return self.call("POST", path, body, **options)

    def delete(self, path: str, **options: Any) -> Answer:
        return self.call("DELETE", path, **options)

    def ask(self, message: str, **fields: Any) -> str:
        """-> the request's id."""
        answer = self.post("/api/ask", {"message": message, **fields})
        assert answer.status in (200, 202), answer.data
        return str(answer.json["requestId"])

    def poll(self, request_id: str, wait: float = 0) -> Dict[str, Any]:
        return dict(self.get("/api/ask/%s%s" % (request_id, "?wait=%g" % wait if wait else "")).json)

    def done(self, request_id: str, seconds: float = 30) -> Dict[str, Any]:
        """The finished poll body."""
        body = self.poll(request_id, wait=seconds)
        assert body["status"] in ("completed", "error"), body
        return body

    def answer(self, message: str, **fields: Any) -> Dict[str, Any]:
        """Asks and waits: the finished poll body."""
        return self.done(self.ask(message, **fields))

    def new_token(self, name: str = "test", **fields: Any) -> "Api":
        """A client with a token made for it (this one's must be admin)."""
        answer = self.post("/api/tokens", {"name": name, **fields})
        assert answer.status == 201, answer.data
        return self.with_token(answer.json["token"])


class RunningBridge:
    """A bridge in this process."""

    def __init__(self, bridge: cab.Bridge, log: List[str]) -> None:
        self.bridge, self.log = bridge, log
        self.data_dir = bridge.config.data_dir
        self.admin = Api(bridge.port, bridge.new_admin_token)
        self.port = bridge.port


@pytest.fixture
def bridge(tmp_path: Path, fake_claude: Callable[..., FakeClaude]) -> Iterator[Callable[..., RunningBridge]]:
    """bridge(claude=..., environ=..., clock=..., **settings) -> a RunningBridge on a free port, over a fake claude, by default
    without a spare, which few tests need and each has to pay for."""
    opened: List[cab.Bridge] = []

    def start(claude: Optional[FakeClaude] = None, environ: Optional[Mapping[str, str]] = None, clock: Optional[cab.Clock] = None,
              **settings: Any) -> RunningBridge:
        claude = claude or fake_claude()
        config = cab.Config(**{"port": 0, "host": "127.0.0.1", "no_tunnel": True, "data_dir": tmp_path / "data",
                               "claude": str(claude.path), "rate_limit": 0, "spare": 0, **settings})
        log: List[str] = []
        found = cab.find_claude(config, {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **(environ or {})})
        opened.append(cab.Bridge(config, found, clock or cab.Clock(), log.append).__enter__())
        opened[-1].serve()
        return RunningBridge(opened[-1], log)

    yield start
    for each in opened:
        each.__exit__(None, None, None)


# The program without compiling its source at each start, without looking for packages, which it has none of, and without looking for
# garbage among what stays to its end: all take longer than most of what it is started for.
def imported(change: str = "") -> Tuple[str, ...]:
    """Its command line. change: code that changes `cab` first."""
    code = ("import sys; sys.path.insert(0, %r); sys.argv[0] = %r; import gc; gc.disable(); "
            "import claude_api_bridge as cab; gc.freeze(); gc.enable(); %s\ncab.run()")
    return sys.executable, "-S", "-c", code % (str(MODULE.parent), str(MODULE), change or "pass")


# What `short_rounds` does to a bridge in this process.
SHORT = ("serve = cab.BridgeServer.serve_forever; cab.BridgeServer.serve_forever = lambda server, *_: serve(server, 0.005); "
         "cab.LEAVE_SECONDS, cab.ROUND_SECONDS, cab.TICK_SECONDS = 0.4, 0.1, 0.02")
IMPORTED = imported(SHORT)
# Its demo, whose stand-in for `claude` is started in the same way, and asked within the program what it is.
DEMO = imported(SHORT + """
import contextlib, io
def probe(argv, environment):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        cab.DemoClaude(argv[argv.index("demo-claude") + 1:]).run()
    return said.getvalue()
cab.claude_command, cab.probe = lambda config, environ: %r, probe""" % ((*IMPORTED, "demo-claude"),))


class Program:
    """The bridge as a person starts it: a process of its own, with a clean environment."""

    def __init__(self, command: List[str], environ: Mapping[str, str], folder: Path) -> None:
        self.errors_path = folder / ("stderr-%d" % len(list(folder.glob("stderr-*"))))
        with open(self.errors_path, "wb") as errors:
            self.process = subprocess.Popen(command, env=dict(environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                                            start_new_session=True)
        self.lines: List[str] = []
        assert self.process.stdout is not None
        for raw in self.process.stdout:                   # the token on a first start, then the address
            self.lines.append(raw.decode().strip())
            if self.lines[-1].startswith("http"):
                break

    @property
    def stderr(self) -> str:
        return self.errors_path.read_text("utf-8")

    @property
    def port(self) -> int:
        return int(self.lines[-1].rpartition(":")[2])

    @property
    def token(self) -> str:
        return next(line for line in self.lines if line.startswith("cab-"))

    @property
    def api(self) -> Api:
        return Api(self.port, self.token)

    def end(self, number: int, seconds: float = 10) -> int:
        """Sends a signal. -> exit status."""
        self.process.send_signal(number)
        status = self.process.wait(seconds)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@pytest.fixture
def program(tmp_path: Path, fake_claude: Callable[..., FakeClaude]) -> Iterator[Callable[..., Program]]:
    """program(*flags, environ=..., claude=...) -> `start` in a process of its own, once it serves."""
    started: List[Program] = []

    def start(*flags: str, environ: Optional[Mapping[str, str]] = None, claude: Optional[Path] = None,
              command: Tuple[str, ...] = IMPORTED, demo: bool = False) -> Program:
        which = ["--demo"] if demo else ["--claude", str(claude or fake_claude().path)]
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8", **(environ or {})}
        command = DEMO if demo and command is IMPORTED else command
        started.append(Program([*command, "start", "--no-tunnel", "--host", "127.0.0.1", "--port", "0", "--data-dir", str(tmp_path / "data"),
                                *which, *flags], environment, tmp_path))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.end(15)
        elif each.process.stdout:
            each.process.stdout.close()


def run_cli(*words: str, environ: Optional[Mapping[str, str]] = None, home: Optional[Path] = None) -> "subprocess.CompletedProcess[str]":
    """One command of ours, to its end."""
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **({"HOME": str(home)} if home else {}), **(environ or {})}
    return subprocess.run([*IMPORTED, *words], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, encoding="utf-8", timeout=60)


@pytest.fixture(scope="session")
def real_claude() -> Path:
    """The real CLI: $CAB_TEST_CLAUDE, or `claude` in PATH; else the test is skipped (or fails where it is required)."""
    found = shutil.which(os.environ.get("CAB_TEST_CLAUDE") or "claude")
    if not found:
        missing("no real claude here: npm install @anthropic-ai/claude-code, and name it in CAB_TEST_CLAUDE")
    return Path(str(found)).absolute()


__all__ = ["Answer", "Api", "Event", "FakeClaude", "FakeClock", "Program", "RunningBridge", "Stream", "is_running", "missing", "run_cli", "shlex", "text_of",
           "wait_until"]
