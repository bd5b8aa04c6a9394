"""Fixtures for all tests: a fake clock, a fake `claude`, a bridge, a client.

A bridge runs either in this process (`bridge`) or as a program of its own (`program`).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
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
from typing import (
    Any, Callable, ContextManager, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence,
    Tuple)

import pytest

import claude_api_bridge as cab
import fake_claude as fake_claude_program

MODULE = Path(cab.__file__)
TESTS = Path(__file__).parent
REQUIRE_REAL = os.environ.get("CAB_REQUIRE_REAL") == "1"


def wait_until(fact: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Call `fact` until it returns a true value; return that value. Fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = fact()
        if value:
            return value
        assert time.monotonic() < deadline, "not true within %g s" % seconds
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    return cab.started_at(pid) is not None


def missing(what: str) -> None:
    """Skip the test because of `what`, or fail it if CAB_REQUIRE_REAL is set."""
    if REQUIRE_REAL:
        pytest.fail(what + " (required here)")
    pytest.skip(what)


class FakeClock(cab.Clock):
    """A clock that only `advance` moves. Wall clock and monotonic clock show the same time."""

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
    """Return the ids of the running child processes of this process (Linux)."""
    pids = ""
    for path in Path("/proc/self/task").glob("*/children"):
        # The thread may end before its file is read.
        with contextlib.suppress(OSError):
            pids += path.read_text() + " "
    return [int(pid) for pid in pids.split() if is_running(int(pid))]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Check after each test that it left no thread and no process behind."""
    threads, children = set(threading.enumerate()), set(our_children())
    yield
    wait_until(lambda: set(threading.enumerate()) <= threads and set(our_children()) <= children, 8)


def asked_once(probe: Callable[..., str]) -> Callable[..., str]:
    """Return a `probe` that caches the answers of the fake's shell script.

    Hundreds of bridges start over the same fake, and its answers do not depend on its folder.
    """
    cache: Dict[Tuple[str, ...], str] = {}

    def ask(argv: Sequence[str], environment: Mapping[str, str], **options: Any) -> str:
        words, head = tuple(argv[1:]), b""
        with contextlib.suppress(OSError), open(argv[0], "rb") as file:
            head = file.read(len(fake_claude_program.PROBE_SCRIPT))
        if head != fake_claude_program.PROBE_SCRIPT.encode():
            return probe(argv, environment, **options)
        if words not in cache:
            cache[words] = probe(argv, environment, **options)
        return cache[words]

    return ask


# Constants of the module that are shorter in all tests. The fake exits at once, unless its prompt
# makes it stay.
SHORT_SECONDS = {
    "SHUTDOWN_GRACE_SECONDS": 0.4,
    "MAINTENANCE_SECONDS": 0.1,
    "CANCEL_POLL_SECONDS": 0.02,
    "DEADLINE_POLL_SECONDS": 0.02,
}


@pytest.fixture(scope="session", autouse=True)
def short_rounds() -> Iterator[None]:
    """Shorten the intervals and grace periods of the module: the tests close hundreds of bridges.

    `SHORT` does the same for a bridge that runs as a program of its own.
    """
    serve = cab.BridgeServer.serve_forever
    # A shell starts its background jobs with SIGINT ignored.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cab.BridgeServer, "serve_forever", lambda server, *_: serve(server, 0.005))
        for name, seconds in SHORT_SECONDS.items():
            patch.setattr(cab, name, seconds)
        patch.setattr(cab, "FINISH_SECONDS", 0.4)
        patch.setattr(cab, "HEALTH_SECONDS", 0.3)
        patch.setattr(cab, "probe", asked_once(cab.probe))
        # A preexec_fn makes Python fork this process, which is large, so that it takes long.
        if os.name == "posix":
            patch.setattr(cab, "group_options", lambda *_: {"start_new_session": True})
        yield


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """Return the path that the prompt `hold FILE` waits for; create the file when the test ends."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


FAKE_SCRIPT = """import sys
sys.path.insert(0, %r)
import fake_claude
sys.exit(fake_claude.main(%r, **%r))
"""


class FakeClaude:
    """An executable that runs tests/fake_claude.py, and the log that it writes.

    Without options a shell script answers the questions of a start, in a tenth of the time.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.path = folder / ("claude.cmd" if os.name == "nt" else "claude")
        self.script = folder / "claude.py"
        folder.mkdir(parents=True, exist_ok=True)
        self.script.write_text(FAKE_SCRIPT % (str(TESTS), str(folder), options))
        if os.name == "nt":
            self.path.write_text('@"%s" -S "%s" %%*\n' % (sys.executable, self.script))
            return
        head = "#!/bin/sh\n" if options else fake_claude_program.PROBE_SCRIPT
        interpreter, script = shlex.quote(sys.executable), shlex.quote(str(self.script))
        self.path.write_text('%sexec %s -S %s "$@"\n' % (head, interpreter, script))
        self.path.chmod(0o755)

    def _log(self, name: str) -> List[Dict[str, Any]]:
        path = self.folder / name
        if not path.exists():
            return []
        # The last line may be incomplete.
        complete = path.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in complete.splitlines()]

    def starts(self) -> List[Dict[str, Any]]:
        """Return every start: {"pid", "argv", "env", "cwd"}."""
        return self._log("starts.jsonl")

    def children(self) -> List[Dict[str, Any]]:
        """Return the starts in stream-json mode."""
        return [start for start in self.starts() if "-p" in start["argv"]]

    def lines(self) -> List[Dict[str, Any]]:
        """Return every line that arrived on stdin."""
        return [entry["line"] for entry in self._log("lines.jsonl")]

    def messages(self) -> List[Dict[str, Any]]:
        """Return the lines that asked for an answer, in order."""
        return [
            line
            for line in self.lines()
            if line["type"] == "user" and line.get("shouldQuery") is not False
        ]

    def prompts(self) -> List[str]:
        """Return the texts of these lines."""
        return list(map(fake_claude_program.text_of, self.messages()))


@pytest.fixture
def fake_claude(tmp_path: Path) -> Callable[..., FakeClaude]:
    return lambda **options: FakeClaude(tmp_path / "fake", **options)


@dataclass(frozen=True)
class Event:
    """A Server-Sent Event. kind: its name, or "comment"; id: length of the text up to here."""

    kind: str
    id: int
    data: Any


class Stream:
    """An open stream of events; iterate over it, then close it.

    events: all events read so far; a heartbeat has the kind `comment`.
    """

    def __init__(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> None:
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
            if "" in fields:
                event = Event("comment", -1, fields[""])
            else:
                event = Event(fields["event"], int(fields["id"]), json.loads(fields["data"]))
            fields = {}
            self.events.append(event)
            yield event

    def until(self, kind: str) -> Event:
        """Read up to the next event of this kind; fail if the stream ends before it."""
        for event in self:
            if event.kind == kind:
                return event
        raise AssertionError("the stream ended without %s: %r" % (kind, self.events[-3:]))

    def rest(self) -> List[Event]:
        """Read to the end of the stream; return all events."""
        for _ in self:
            pass
        self.close()
        return self.events

    @property
    def text(self) -> str:
        """The client's text after the events read so far."""
        return text_of(self.events)

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def text_of(events: Iterable[Event], text: str = "") -> str:
    """Return a client's text after these events, if it was `text` before them.

    A `queued` or `started` restarts the text. The id of each delta must be the text's length.
    """
    for event in events:
        if event.kind in ("queued", "started"):
            text = ""
        elif event.kind == "delta":
            text += event.data["text"]
            assert event.id == len(text), event
    return text


@dataclass
class Answer:
    """An HTTP response. The names in `headers` are in lower case."""

    status: int
    headers: Mapping[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class Api:
    """A client that opens a connection per call.

    token: sent as a Bearer token, unless `headers` of a call replace it.
    """

    def __init__(self, port: int, token: Optional[str] = None) -> None:
        self.port = port
        self.token = token

    def with_token(self, token: Optional[str]) -> "Api":
        return Api(self.port, token)

    def _headers(self, headers: Optional[Mapping[str, str]]) -> Dict[str, str]:
        """Return the headers of a call, with the token."""
        authorization = {"Authorization": "Bearer " + self.token} if self.token else {}
        return {**authorization, **(headers or {})}

    def call(
        self, method: str, path: str, body: Any = None, headers: Optional[Mapping[str, str]] = None
    ) -> Answer:
        """Send a request. body: bytes are sent unchanged, anything else as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
        try:
            connection.request(method, path, data, self._headers(headers))
            response = connection.getresponse()
            response_headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, response_headers, response.read())
        finally:
            connection.close()

    def stream(
        self, method: str, path: str, body: Any = None, headers: Optional[Mapping[str, str]] = None
    ) -> Stream:
        """Open a stream of events; the caller reads it to its end or closes it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, self._headers(headers))
        return Stream(connection, connection.getresponse())

    def follow(self, request_id: str, after: Optional[int] = None, method: str = "GET") -> Stream:
        """Open the stream of a request's events, from the offset `after` of its text."""
        query = "" if after is None else "?after=%d" % after
        return self.stream(method, "/api/ask/%s/events%s" % (request_id, query))

    def get(self, path: str, **options: Any) -> Answer:
        return self.call("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        return self.call("POST", path, body, **options)

    def delete(self, path: str, **options: Any) -> Answer:
        return self.call("DELETE", path, **options)

    def ask(self, message: str, **fields: Any) -> str:
        """Send a message; return the request's id."""
        answer = self.post("/api/ask", {"message": message, **fields})
        assert answer.status in (200, 202), answer.data
        return str(answer.json["requestId"])

    def poll(self, request_id: str, wait: float = 0) -> Dict[str, Any]:
        """Return the body of a poll. wait: seconds that the bridge may hold the response back."""
        query = "?wait=%g" % wait if wait else ""
        return dict(self.get("/api/ask/%s%s" % (request_id, query)).json)

    def done(self, request_id: str, seconds: float = 30) -> Dict[str, Any]:
        """Wait until the request is finished; return the body of the poll."""
        body = self.poll(request_id, wait=seconds)
        assert body["status"] in ("completed", "error"), body
        return body

    def answer(self, message: str, **fields: Any) -> Dict[str, Any]:
        """Send a message and wait; return the body of the poll."""
        return self.done(self.ask(message, **fields))

    def new_token(self, name: str = "test", **fields: Any) -> "Api":
        """Create a token, which needs an admin token here; return a client that uses it."""
        answer = self.post("/api/tokens", {"name": name, **fields})
        assert answer.status == 201, answer.data
        return self.with_token(answer.json["token"])


class ListHandler(logging.Handler):
    """Appends the lines of the log to a list, in the form that the console prints."""

    def __init__(self, lines: List[str]) -> None:
        super().__init__(logging.INFO)
        self.lines = lines
        self.setFormatter(cab.LogFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@contextlib.contextmanager
def collected_log() -> Iterator[List[str]]:
    """Collect the lines of the module's log."""
    handler = ListHandler([])
    level = cab.logger.level
    cab.logger.addHandler(handler)
    cab.logger.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        cab.logger.removeHandler(handler)
        cab.logger.setLevel(level)


@pytest.fixture
def log() -> Iterator[List[str]]:
    """The lines of the module's log during the test."""
    with collected_log() as lines:
        yield lines


class RunningBridge:
    """A bridge in this process. log: the lines of the module's log since it started."""

    def __init__(self, bridge: cab.Bridge, log: List[str]) -> None:
        self.bridge, self.log = bridge, log
        self.data_dir = bridge.config.data_dir
        self.admin = Api(bridge.port, bridge.new_admin_token)
        self.port = bridge.port

    @property
    def pool(self) -> cab.ClaudePool:
        worker: Any = self.bridge._server.dispatcher._service._running
        pool: cab.ClaudePool = worker._pool
        return pool

    def waiting(self) -> List[int]:
        """Return the processes that wait for the next turn of a conversation, the last used last.
        """
        return [waiting.process.pid for waiting in list(self.pool._waiting)]


@contextlib.contextmanager
def running_bridge(
    config: cab.Config, environ: Mapping[str, str], clock: cab.Clock
) -> Iterator[RunningBridge]:
    """Run a bridge in this process."""
    install = cab.find_claude(config, environ)
    with collected_log() as log, cab.Bridge(config, install, clock) as opened:
        opened.serve()
        yield RunningBridge(opened, log)


def plain_bridge(folder: Path) -> ContextManager[RunningBridge]:
    """Run a bridge for many tests. It has no spare, so that no process of one test is in the next.
    """
    config = cab.Config(
        port=0, host="127.0.0.1", no_tunnel=True, data_dir=folder / "data",
        claude=str(FakeClaude(folder / "fake").path), rate_limit=0, spare=0,
    )
    return running_bridge(config, {"PATH": "", "HOME": str(folder)}, cab.Clock())


@pytest.fixture
def bridge(
    tmp_path: Path, fake_claude: Callable[..., FakeClaude]
) -> Iterator[Callable[..., RunningBridge]]:
    """Return a function that starts a RunningBridge on a free port, over a fake `claude`.

    bridge(claude=..., environ=..., clock=..., **settings). By default it has no idle process,
    which few tests need and which costs time.
    """
    opened = contextlib.ExitStack()

    def start(
        claude: Optional[FakeClaude] = None,
        environ: Optional[Mapping[str, str]] = None,
        clock: Optional[cab.Clock] = None,
        **settings: Any,
    ) -> RunningBridge:
        claude = claude or fake_claude()
        config = cab.Config(
            **{
                "port": 0, "host": "127.0.0.1", "no_tunnel": True, "data_dir": tmp_path / "data",
                "claude": str(claude.path), "rate_limit": 0, "spare": 0, **settings,
            }
        )
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **(environ or {})}
        return opened.enter_context(running_bridge(config, environment, clock or cab.Clock()))

    with opened:
        yield start


def imported(change: str = "") -> Tuple[str, ...]:
    """Return a command line that runs the module as a program, and starts faster than the script.

    Python loads the module from its bytecode cache, skips site-packages (the module needs none),
    and does not scan the imported objects for garbage.
    change: code that changes `cab` first.
    """
    code = (
        "import sys; sys.path.insert(0, %r); sys.argv[0] = %r; import gc; gc.disable(); "
        # PyPy has no gc.freeze.
        "import claude_api_bridge as cab; getattr(gc, 'freeze', gc.collect)(); gc.enable(); "
        "%s\ncab.run()"
    )
    return sys.executable, "-S", "-c", code % (str(MODULE.parent), str(MODULE), change or "pass")


# Code that gives a bridge in a process of its own the intervals of `short_rounds`.
SHORT = (
    "serve = cab.BridgeServer.serve_forever; "
    "cab.BridgeServer.serve_forever = lambda server, *_: serve(server, 0.005); "
    "vars(cab).update(%r)" % SHORT_SECONDS
)
IMPORTED = imported(SHORT)
# The demo. Its substitute for `claude` is started like IMPORTED, and probed without a process.
DEMO = imported(
    SHORT
    + """
import contextlib, io
def probe(argv, environment, **options):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        cab.DemoClaude(argv[argv.index("demo-claude") + 1:]).run()
    return output.getvalue()
cab.claude_command, cab.probe = lambda config, environ: %r, probe"""
    % ((*IMPORTED, "demo-claude"),)
)


class Program:
    """The bridge as a process of its own, with a clean environment.

    lines: the lines on stdout up to the address.
    """

    def __init__(self, command: List[str], environ: Mapping[str, str], folder: Path) -> None:
        self.errors_path = folder / ("stderr-%d" % len(list(folder.glob("stderr-*"))))
        with open(self.errors_path, "wb") as errors:
            self.process = subprocess.Popen(
                command,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self.lines: List[str] = []
        assert self.process.stdout is not None
        # A first start prints the admin token, then the address.
        for raw in self.process.stdout:
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
        """Send a signal; return the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(seconds)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@pytest.fixture
def program(
    tmp_path: Path, fake_claude: Callable[..., FakeClaude]
) -> Iterator[Callable[..., Program]]:
    """Return a function that runs `start` in a process of its own and waits until it serves.

    program(*flags, environ=..., claude=..., command=..., demo=...).
    """
    started: List[Program] = []

    def start(
        *flags: str,
        environ: Optional[Mapping[str, str]] = None,
        claude: Optional[Path] = None,
        command: Tuple[str, ...] = IMPORTED,
        demo: bool = False,
    ) -> Program:
        cli = ["--demo"] if demo else ["--claude", str(claude or fake_claude().path)]
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8", **(environ or {}),
        }
        command = DEMO if demo and command is IMPORTED else command
        words = [
            *command, "start", "--no-tunnel", "--host", "127.0.0.1", "--port", "0",
            "--data-dir", str(tmp_path / "data"), *cli, *flags,
        ]
        started.append(Program(words, environment, tmp_path))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.end(15)
        elif running.process.stdout:
            running.process.stdout.close()


def run_cli(
    *words: str, environ: Optional[Mapping[str, str]] = None, home: Optional[Path] = None,
    text: str = "",
) -> "subprocess.CompletedProcess[str]":  # fmt: skip
    """Run a command of the bridge to its end. text: what it reads from its standard input."""
    environment = {
        "PATH": os.environ["PATH"], "LANG": "C.UTF-8", **({"HOME": str(home)} if home else {}),
        **(environ or {}),
    }
    return subprocess.run(
        [*IMPORTED, *words],
        env=environment,
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        timeout=60,
    )


@pytest.fixture(scope="session")
def real_claude() -> Path:
    """Return the path of the real CLI: $CAB_TEST_CLAUDE, or `claude` in PATH.

    Without it the test is skipped, or fails if CAB_REQUIRE_REAL is set.
    """
    path = shutil.which(os.environ.get("CAB_TEST_CLAUDE") or "claude")
    if not path:
        missing("no real claude: npm install @anthropic-ai/claude-code and set CAB_TEST_CLAUDE")
    return Path(str(path)).absolute()


__all__ = [
    "Answer", "Api", "Event", "FakeClaude", "FakeClock", "Program", "RunningBridge", "Stream",
    "is_running", "missing", "run_cli", "shlex", "text_of", "wait_until",
]
