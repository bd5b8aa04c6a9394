"""Starts, ends, crashes and second starts of a whole bridge.

Most of these bridges run as a program of their own.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Tuple

import pytest
from conftest import (
    IMPORTED,
    Api,
    FakeClaude,
    Program,
    RunningBridge,
    imported,
    is_running,
    run_cli,
    text_of,
    wait_until,
)
from fake_cloudflared import FakeCloudflared
from test_http import Wire, request
from test_stream import chunks

import claude_api_bridge as cab

# What the fixture `program` returns.
Programs = Callable[..., Program]
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and PR_SET_PDEATHSIG")
ORIGINAL_SCHEMA = """
CREATE TABLE tokens (id TEXT PRIMARY KEY, name TEXT NOT NULL, token_hash TEXT UNIQUE NOT NULL,
    token_prefix TEXT NOT NULL, session_mode TEXT NOT NULL, expires_at INTEGER,
    created_at INTEGER NOT NULL, last_used_at INTEGER, is_admin INTEGER NOT NULL DEFAULT 0);
CREATE TABLE requests (id TEXT PRIMARY KEY,
    token_id TEXT REFERENCES tokens(id) ON DELETE CASCADE, message TEXT, response TEXT,
    status TEXT, session_id TEXT, created_at INTEGER, completed_at INTEGER, error TEXT);
CREATE TABLE sessions (id TEXT PRIMARY KEY,
    token_id TEXT REFERENCES tokens(id) ON DELETE CASCADE, claude_session_id TEXT,
    working_dir TEXT, created_at INTEGER, last_used_at INTEGER);
"""


@pytest.fixture
def fake(fake_claude: Callable[..., FakeClaude]) -> FakeClaude:
    return fake_claude()


@pytest.fixture
def program(program: Programs, fake: FakeClaude) -> Iterator[Programs]:
    """Wrap conftest's fixture: kill at the end what still runs.

    An orderly shutdown takes longer and has its own tests.
    """
    started: List[Program] = []

    def start(*flags: str, **options: Any) -> Program:
        started.append(program(*flags, claude=fake.path, **options))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            kill(running)


def kill(program: Program) -> None:
    """End a program as the kernel or a power cut does."""
    program.end(signal.SIGKILL)


def rows(data_dir: Path) -> List[str]:
    """Return the database's tokens, requests and conversations as SQL statements."""
    with contextlib.closing(sqlite3.connect(str(data_dir / "bridge.db"))) as db:
        return [line for line in db.iterdump() if 'INTO "children"' not in line]


def token_command(tmp_path: Path, *words: str) -> Any:
    """Run the command `token` on the test's data directory."""
    return run_cli("token", *words, "--data-dir", str(tmp_path / "data"))


def begin_poll(api: Api, request_id: str) -> http.client.HTTPConnection:
    """Start a poll that waits on the server."""
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=60)
    connection.request(
        "GET", "/api/ask/%s?wait=60" % request_id,
        headers={"Authorization": "Bearer %s" % api.token},
    )
    # The server has answered a later connection, so it has accepted the first one.
    api.poll(request_id)
    return connection


def begin_stream(api: Api, request_id: str) -> Wire:
    """Open a stream and read its head."""
    wire = Wire(api.port)
    wire.send(
        request(
            "GET /api/ask/%s/events HTTP/1.1" % request_id, "Authorization: Bearer %s" % api.token
        )
    ).answer(has_body=False)
    return wire


def is_listening(port: int) -> bool:
    """Return whether the port accepts a connection."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def wait_for_prompt(fake: FakeClaude, prompt: str, times: int = 1) -> List[int]:
    """Wait until the CLI has received the prompt so many times; return the pids of all CLIs."""
    wait_until(lambda: fake.prompts().count(prompt) == times)
    return [child["pid"] for child in fake.children()]


def try_start(
    tmp_path: Path, fake: FakeClaude, *flags: str, data_dir: Optional[Path] = None
) -> Any:
    """Start a bridge that must refuse to start; return the ended process."""
    return run_cli(
        "start", "--no-tunnel", "--host", "127.0.0.1", "--claude", str(fake.path), "--data-dir",
        str(data_dir or tmp_path / "data"), *(flags or ("--port", "0")), home=tmp_path,
    )


def refusal(done: Any) -> str:
    """Return the one error line of a refused start; check that a hint is its last line."""
    assert done.returncode == 1 and done.stdout == ""
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-2:-1] == errors, done.stderr
    assert lines[-1].startswith("hint: "), done.stderr
    return str(errors[0])


# --- in this process ---


def test_a_bridge_leaves_nothing_behind(tmp_path: Path, fake: FakeClaude) -> None:
    cloudflared = FakeCloudflared(tmp_path / "cloudflared")
    config = cab.Config(
        port=0, host="127.0.0.1", data_dir=tmp_path / "data", claude=str(fake.path),
        cloudflared=str(cloudflared.path),
    )
    token = None
    # The second start shows that lock, port and database are free again.
    for _ in range(2):
        threads = set(threading.enumerate())
        with cab.Bridge(config, cab.find_claude(config, dict(os.environ)), cab.Clock()) as bridge:
            bridge.serve()
            token = bridge.new_admin_token or token
            assert Api(bridge.port, token).answer("hello")["response"] == "Echo: hello"
            wait_until(cloudflared.starts)
        # The thread of the connection may take a moment to end.
        wait_until(lambda: set(threading.enumerate()) <= threads)
        starts = fake.children() + cloudflared.starts()
        assert not [start for start in starts if is_running(start["pid"])]
        assert not is_listening(bridge.port)


def test_a_bridge_that_ends_with_an_exception_leaves_nothing_behind(
    tmp_path: Path, fake: FakeClaude
) -> None:
    config = cab.Config(port=0, host="127.0.0.1", data_dir=tmp_path / "data", claude=str(fake.path))
    threads = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        with cab.Bridge(config, cab.find_claude(config, dict(os.environ)), cab.Clock()):
            wait_until(fake.children)
            raise ZeroDivisionError()
    assert set(threading.enumerate()) <= threads
    assert not [child for child in fake.children() if is_running(child["pid"])]


def shown_claude(running: RunningBridge) -> Tuple[str, str, str]:
    """Return what the bridge shows of `claude`.

    -> (version and payer in /api/status, which is also the page's source, version in /metrics)
    """
    claude = running.admin.get("/api/status").json["claude"]
    metrics = running.admin.get("/metrics").data.decode()
    versions = re.findall('^cab_info{.*claude="([^"]*)".*} 1$', metrics, re.MULTILINE)
    assert len(versions) == 1, metrics
    return claude["version"], claude["payer"], versions[0]


@pytest.mark.skipif(os.name != "posix", reason="a running program cannot be replaced on Windows")
@pytest.mark.parametrize("spare", [0, 1])
def test_after_an_update_and_a_request_status_and_metrics_show_the_new_claude(
    bridge: Callable[..., RunningBridge],
    fake: FakeClaude,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spare: int,
) -> None:
    # The bridge looks at the environment again when it examines the new program.
    monkeypatch.setenv("HOME", str(tmp_path))
    running = bridge(fake, spare=spare)
    assert running.admin.answer("first")["response"] == "Echo: first"
    old = "2.1.330 (Claude Code)"
    assert shown_claude(running) == (old, "Claude Max subscription", old)
    new = "2.1.400 (Claude Code)"
    update = FakeClaude(
        tmp_path / "update", version=new, auth={"loggedIn": True, "subscriptionType": "pro"}
    )
    os.replace(update.path, fake.path)
    assert running.admin.answer("second")["response"] == "Echo: second"
    assert shown_claude(running) == (new, "Claude Pro subscription", new)
    # The page itself holds no version; its script reads /api/status.
    page = running.admin.get("/dashboard").data.decode()
    assert old not in page
    assert new not in page
    assert "claude.version" in page


# --- crashes ---


@only_linux
def test_after_kill_9_every_request_completes_in_order_and_only_the_running_one_is_retried(
    program: Programs, fake: FakeClaude, gate: Path
) -> None:
    first = program()
    held = "hold %s" % gate
    prompts = [held, "two", "three", "four", "five", "six"]
    ids = [first.api.ask(prompt) for prompt in prompts]
    pids = wait_for_prompt(fake, held)
    kill(first)
    gate.touch()
    second = program()
    bodies = [Api(second.port, first.token).done(request_id) for request_id in ids]
    assert [body["response"] for body in bodies] == ["held"] + [
        "Echo: " + prompt for prompt in prompts[1:]
    ]
    assert fake.prompts() == [held, *prompts]
    assert [body["attempts"] for body in bodies] == [2, 1, 1, 1, 1, 1]
    assert sorted(bodies, key=lambda body: str(body["completedAt"])) == bodies
    assert not [pid for pid in pids if is_running(pid)]


@only_linux
def test_after_kill_9_a_stream_restarts_and_the_same_key_returns_its_request(
    program: Programs, gate: Path, tmp_path: Path
) -> None:
    first = program()
    once = {
        "first": str(tmp_path / "once"),
        "do": [{"delta": "half"}, {"wait": str(tmp_path / "never")}],
    }
    script = [once, {"delta": "A whole "}, {"wait": str(gate)}, {"delta": "text"}]
    body = {"message": "script " + json.dumps(script), "stream": True}
    stream = first.api.stream("POST", "/api/ask", body, {"Idempotency-Key": "k"})
    offset = stream.until("delta").id
    job_id = stream.events[0].data["requestId"]
    kill(first)
    # The stream ended without a last event.
    assert stream.rest()[-1].kind == "delta"
    second = program()
    api = Api(second.port, first.token)
    wait_until(lambda: api.poll(job_id).get("partial") == "A whole ")
    resumed = api.follow(job_id, offset)
    replayed = api.stream("POST", "/api/ask", body, {"Idempotency-Key": "k"})
    assert replayed.headers["idempotent-replayed"] == "true"
    gate.touch()
    for stream in (resumed, replayed):
        completed = stream.rest()[-1]
        assert (offset, text_of(stream.events, "half")) == (4, completed.data["response"])
        assert stream.text == "A whole text"
        assert (completed.data["requestId"], completed.data["attempts"]) == (job_id, 2)


@only_linux
def test_a_request_that_waits_for_the_plan_limit_survives_kill_9(
    program: Programs, tmp_path: Path
) -> None:
    first = program("--spare", "0")
    limits = {"status": "rejected", "rateLimitType": "five_hour", "resetsAt": time.time() + 3_600}
    failure = {"said": "rate_limit", "api_error_status": 429, "result": "You've hit your limit"}
    refused = {"first": str(tmp_path / "mark"), "do": [{"limits": limits}, {"fail": failure}]}
    ids = [
        first.api.ask("script " + json.dumps([refused, {"result": "at last"}])),
        first.api.ask("next"),
    ]
    wait_until(lambda: first.api.poll(ids[0]).get("waitingFor") == "usage_limit")
    assert first.api.poll(ids[1])["status"] == "queued"
    kill(first)
    # The pause is not stored: the next run finds out whether the limit is still used up.
    api = Api(program("--spare", "0").port, first.token)
    assert [api.done(job_id)["response"] for job_id in ids] == ["at last", "Echo: next"]
    assert [api.poll(job_id)["attempts"] for job_id in ids] == [1, 1]


def test_a_request_interrupted_by_two_kills_fails_as_interrupted(
    program: Programs, fake: FakeClaude, gate: Path
) -> None:
    held = "hold %s" % gate
    first = program()
    lost, after = first.api.ask(held), first.api.ask("next")
    for times, running in ((1, first), (2, None)):
        running = running or program()
        wait_for_prompt(fake, held, times)
        kill(running)
    api = Api(program().port, first.token)
    body = api.done(lost)
    assert (body["status"], body["errorCode"], body["attempts"]) == ("error", "interrupted", 2)
    assert api.done(after)["response"] == "Echo: next"
    assert fake.prompts() == [held, held, "next"]


@only_linux
def test_a_hung_child_does_not_outlive_a_killed_bridge(program: Programs, fake: FakeClaude) -> None:
    running = program()
    running.api.ask("hang")
    pids = wait_for_prompt(fake, "hang")
    assert any(map(is_running, pids))
    kill(running)
    wait_until(lambda: not any(map(is_running, pids)))


@only_linux
@pytest.mark.parametrize("prompt", ["grandchild %s", "stubborn"])
def test_the_next_start_ends_processes_that_survived_the_bridge(
    program: Programs, fake: FakeClaude, tmp_path: Path, prompt: str
) -> None:
    pid_file, first = tmp_path / "pid", program("--spare", "0")
    prompt = prompt.replace("%s", str(pid_file))
    client = first.api.new_token("tooled", tools="all")
    request_id = client.ask(prompt)
    wait_until(lambda: pid_file.exists() or client.poll(request_id).get("partial"))
    pid = int(pid_file.read_text()) if pid_file.exists() else fake.children()[-1]["pid"]
    kill(first)
    assert is_running(pid)
    token_id = next(
        token["id"]
        for token in json.loads(token_command(tmp_path, "list", "--json").stdout)
        if token["name"] == "tooled"
    )
    # Without the token the next start does not run the request again.
    token_command(tmp_path, "revoke", token_id)
    second = program()
    assert not is_running(pid)
    # One process ended, no request is queued again, and none has failed.
    assert re.search(r"\b1 process.*\b0 .*\b0 ", second.stderr)


def test_a_conversation_continues_after_a_restart(program: Programs) -> None:
    first = program()
    talk = first.api.new_token(sessionMode="stateful")
    talk.answer("I am Ann")
    for end in (signal.SIGTERM, signal.SIGKILL):
        first.end(end)
        first = program()
        turns = Api(first.port, talk.token).answer("turns")["response"]
        assert '["user", "I am Ann"], ["assistant", "Echo: I am Ann"]' in turns


def test_the_original_s_database_is_migrated_and_its_queue_runs(
    program: Programs, fake: FakeClaude, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    old = {name: cab.new_token() for name in ("admin", "app", "talk")}
    with contextlib.closing(sqlite3.connect(str(tmp_path / "data" / "bridge.db"))) as db:
        db.executescript(ORIGINAL_SCHEMA)
        db.executemany(
            "INSERT INTO tokens VALUES (?,?,?,?,?,NULL,1700000000,NULL,?)",
            [
                (
                    name, name, cab.digest(secret), secret[:12],
                    "stateful" if name == "talk" else "stateless", name == "admin",
                )
                for name, secret in old.items()
            ],
        )
        db.executemany(
            "INSERT INTO requests VALUES (?,?,?,?,?,NULL,?,?,NULL)",
            [
                ("1", "talk", "I am Ann", "Hello Ann", "completed", 1700000001, 1700000002),
                ("2", "app", "stuck", None, "processing", 1700000003, None),
                ("3", "app", "second", None, "queued", 1700000004, None),
                ("4", "talk", "turns", None, "queued", 1700000004, None),
            ],
        )
        db.execute("INSERT INTO sessions VALUES ('s', 'talk', 'gone', '/', 1700000001, 1700000001)")
        db.commit()
    running = program()
    # An admin token exists, so the bridge creates none.
    assert len(running.lines) == 1
    wait_until(lambda: fake.prompts() == ["stuck", "second", "turns"])
    owners = {"1": "talk", "2": "app", "3": "app", "4": "talk"}
    bodies = [Api(running.port, old[name]).done(request_id) for request_id, name in owners.items()]
    assert [body["response"] for body in bodies] == [
        "Hello Ann", "Echo: stuck", "Echo: second",
        '[["user", "I am Ann"], ["assistant", "Hello Ann"]]',
    ]
    assert Api(running.port, old["admin"]).get("/api/tokens").status == 200


# --- orderly shutdown ---


def test_every_signal_shuts_down_in_order_and_the_next_start_completes_the_request(
    program: Programs, fake: FakeClaude, gate: Path, tmp_path: Path
) -> None:
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    ]
    folders = [str(tmp_path / ("data-%d" % number)) for number in numbers]
    command = imported("cab.FINISH_SECONDS, cab.SHUTDOWN_GRACE_SECONDS = 0.2, 0.4")
    bridges = [program("--spare", "0", "--data-dir", folder, command=command) for folder in folders]
    ids = [running.api.ask("hold %s" % gate) for running in bridges]
    wait_until(lambda: len(fake.prompts()) == len(numbers))
    polls = [begin_poll(running.api, request_id) for running, request_id in zip(bridges, ids)]
    streams = [begin_stream(running.api, request_id) for running, request_id in zip(bridges, ids)]
    for running, number in zip(bridges, numbers):
        running.process.send_signal(number)
    for running, poll, stream in zip(bridges, polls, streams):
        assert running.process.wait(20) == 0 and "Traceback" not in running.stderr
        # The stream ends with a last chunk.
        with stream:
            events = b"".join(chunks(stream))
            assert b"event: delta" in events
            assert b"event: completed" not in events
            assert stream.rest() == b""
        assert json.loads(poll.getresponse().read())["status"] in ("queued", "processing")
        poll.close()
    assert not [child for child in fake.children() if is_running(child["pid"])]
    gate.touch()
    bodies = [
        Api(program("--spare", "0", "--data-dir", folder).port, running.token).done(request_id)
        for folder, running, request_id in zip(folders, bridges, ids)
    ]
    assert [(body["response"], body["attempts"]) for body in bodies] == [("held", 1)] * len(numbers)


def test_a_run_that_ends_soon_is_answered_before_the_shutdown(
    program: Programs, fake: FakeClaude, gate: Path
) -> None:
    running = program(command=imported("cab.FINISH_SECONDS = 20.0"))
    poll = begin_poll(running.api, running.api.ask("hold %s" % gate))
    wait_for_prompt(fake, "hold %s" % gate)
    running.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not is_listening(running.port))
    gate.touch()
    assert running.process.wait(20) == 0
    assert json.loads(poll.getresponse().read())["response"] == "held"
    poll.close()


def test_a_bridge_under_nohup_survives_the_end_of_its_terminal(program: Programs) -> None:
    running = program(command=("nohup", *IMPORTED))
    running.process.send_signal(signal.SIGHUP)
    assert running.api.answer("hello")["response"] == "Echo: hello"
    assert "Shutting down" not in running.stderr
    assert running.end(signal.SIGTERM) == 0


# --- starts that are refused ---


def test_a_second_bridge_on_the_same_data_is_refused_and_changes_nothing(
    program: Programs, fake: FakeClaude, gate: Path, tmp_path: Path
) -> None:
    first, held = program(), "hold %s" % gate
    ids = [first.api.ask(held), first.api.ask("next")]
    wait_for_prompt(fake, held)
    before = rows(tmp_path / "data")
    error = refusal(try_start(tmp_path, fake))
    assert "process %d" % first.process.pid in error and str(first.port) in error
    assert rows(tmp_path / "data") == before
    gate.touch()
    assert [first.api.done(request_id)["response"] for request_id in ids] == ["held", "Echo: next"]
    assert fake.prompts() == [held, "next"]


def test_a_port_in_use_is_one_error_line_and_creates_no_admin_token(
    program: Programs, fake: FakeClaude, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert "Port %d" % port in refusal(try_start(tmp_path, fake, "--port", str(port)))
    assert program().token.startswith("cab-")


def test_a_refused_start_does_not_change_interrupted_requests(
    program: Programs, fake: FakeClaude, gate: Path, tmp_path: Path
) -> None:
    first = program()
    lost = first.api.ask("hold %s" % gate)
    wait_for_prompt(fake, "hold %s" % gate)
    kill(first)
    before = rows(tmp_path / "data")
    with socket.create_server(("127.0.0.1", 0)) as other:
        refusal(try_start(tmp_path, fake, "--port", str(other.getsockname()[1])))
    assert rows(tmp_path / "data") == before
    gate.touch()
    assert Api(program().port, first.token).done(lost)["response"] == "held"


def spoil(folder: Path, name: str) -> Path:
    """Create an unusable data folder and return its path. name: what is wrong with it."""
    if name == "folder":
        (folder / "data").write_text("a file")
    elif name == "parent":
        (folder / "data").write_text("a file")
        return folder / "data" / "below"
    elif name == "database":
        (folder / "data").mkdir()
        (folder / "data" / "bridge.db").write_text("no database at all, " * 100)
    elif name == "newer":
        (folder / "data").mkdir()
        with contextlib.closing(sqlite3.connect(str(folder / "data" / "bridge.db"))) as db:
            db.execute("PRAGMA user_version = 99")
    else:
        (folder / "data" / name).mkdir(parents=True)
    return folder / "data"


@pytest.mark.parametrize("name", ["folder", "parent", "newer", "bridge.db", "bridge.lock"])
def test_an_unusable_data_folder_is_one_error_line(
    tmp_path: Path, fake: FakeClaude, name: str
) -> None:
    data_dir = spoil(tmp_path, name)
    assert str(tmp_path / "data") in refusal(try_start(tmp_path, fake, data_dir=data_dir))
