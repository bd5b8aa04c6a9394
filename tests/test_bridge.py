"""Room 12: starts, ends, crashes and second starts of a whole bridge, most of them as a program of its own."""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional

import pytest
from conftest import IMPORTED, Api, FakeClaude, Program, imported, is_running, run_cli, text_of, wait_until
from test_http import Wire, request
from test_stream import chunks

import claude_api_bridge as cab

Programs = Callable[..., Program]                            # what the fixture gives
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and PR_SET_PDEATHSIG")
ORIGINAL_SCHEMA = """
CREATE TABLE tokens (id TEXT PRIMARY KEY, name TEXT NOT NULL, token_hash TEXT UNIQUE NOT NULL, token_prefix TEXT NOT NULL,
    session_mode TEXT NOT NULL, expires_at INTEGER, created_at INTEGER NOT NULL, last_used_at INTEGER, is_admin INTEGER NOT NULL DEFAULT 0);
CREATE TABLE requests (id TEXT PRIMARY KEY, token_id TEXT REFERENCES tokens(id) ON DELETE CASCADE, message TEXT, response TEXT, status TEXT,
    session_id TEXT, created_at INTEGER, completed_at INTEGER, error TEXT);
CREATE TABLE sessions (id TEXT PRIMARY KEY, token_id TEXT REFERENCES tokens(id) ON DELETE CASCADE, claude_session_id TEXT, working_dir TEXT,
    created_at INTEGER, last_used_at INTEGER);
"""


@pytest.fixture
def fake(fake_claude: Callable[..., FakeClaude]) -> FakeClaude:
    return fake_claude()


@pytest.fixture
def program(program: Programs, fake: FakeClaude) -> Iterator[Programs]:
    """As conftest's, but what still runs in the end is killed: an ordered end takes longer, and has its own tests."""
    started: List[Program] = []

    def start(*flags: str, **options: Any) -> Program:
        started.append(program(*flags, claude=fake.path, **options))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            kill(each)


def kill(program: Program) -> None:
    """As the kernel, or a power cut, would end it."""
    program.end(signal.SIGKILL)


def rows(data_dir: Path) -> List[str]:
    """All that the database holds about tokens, requests and conversations, as SQL."""
    with contextlib.closing(sqlite3.connect(str(data_dir / "bridge.db"))) as db:
        return [line for line in db.iterdump() if 'INTO "children"' not in line]


def token_command(tmp_path: Path, *words: str) -> Any:
    return run_cli("token", *words, "--data-dir", str(tmp_path / "data"))


def begin_poll(api: Api, request_id: str) -> http.client.HTTPConnection:
    """A poll that the server holds."""
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=60)
    connection.request("GET", "/api/ask/%s?wait=60" % request_id, headers={"Authorization": "Bearer %s" % api.token})
    api.poll(request_id)                                     # a later connection was answered: the first is accepted
    return connection


def begin_stream(api: Api, request_id: str) -> Wire:
    """A stream whose head was read."""
    body_field = Wire(api.port)
    body_field.send(request("GET /api/ask/%s/events HTTP/1.1" % request_id, "Authorization: Bearer %s" % api.token)).answer(has_body=False)
    return body_field


def is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def processing(fake: FakeClaude, prompt: str, times: int = 1) -> List[int]:
    """Waits until the prompt was taken so many times. -> the pids of all children so far."""
    wait_until(lambda: fake.prompts().count(prompt) == times)
    return [child["pid"] for child in fake.children()]


def try_start(tmp_path: Path, fake: FakeClaude, *flags: str, data_dir: Optional[Path] = None) -> Any:
    """A start that is to be refused. -> what it said."""
    return run_cli("start", "--no-tunnel", "--host", "127.0.0.1", "--claude", str(fake.path),
                   "--data-dir", str(data_dir or tmp_path / "data"), *(flags or ("--port", "0")), home=tmp_path)


def refusal(done: Any) -> str:
    """The one sentence of a refused start, which says nothing on stdout and hints at a remedy."""
    assert done.returncode == 1 and done.stdout == ""
    said = done.stderr.splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1 and said[-2:-1] == errors and said[-1].startswith("hint: "), done.stderr
    return str(errors[0])


# --- in this process ---

def test_a_bridge_leaves_nothing_behind(tmp_path: Path, fake: FakeClaude) -> None:
    config = cab.Config(port=0, host="127.0.0.1", data_dir=tmp_path / "data", claude=str(fake.path))
    token = None
    for _ in range(2):                                       # twice: lock, port and database are free again
        threads = set(threading.enumerate())
        with cab.Bridge(config, cab.find_claude(config, dict(os.environ)), cab.Clock(), lambda text: None) as bridge:
            bridge.serve()
            token = bridge.new_admin_token or token
            assert Api(bridge.port, token).answer("hello")["response"] == "Echo: hello"
        wait_until(lambda: set(threading.enumerate()) <= threads)              # that of the connection is about to end
        assert not [child for child in fake.children() if is_running(child["pid"])]
        assert not is_listening(bridge.port)


def test_a_bridge_that_ends_by_an_error_leaves_nothing_behind(tmp_path: Path, fake: FakeClaude) -> None:
    config = cab.Config(port=0, host="127.0.0.1", data_dir=tmp_path / "data", claude=str(fake.path))
    threads = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        with cab.Bridge(config, cab.find_claude(config, dict(os.environ)), cab.Clock(), lambda text: None):
            wait_until(fake.children)
            raise ZeroDivisionError()
    assert set(threading.enumerate()) <= threads
    assert not [child for child in fake.children() if is_running(child["pid"])]


# --- crashes ---

@only_linux
def test_after_kill_9_every_request_is_completed_in_order_and_none_runs_thrice(program: Programs, fake: FakeClaude, gate: Path) -> None:
    first = program()
    held = "hold %s" % gate
    prompts = [held, "two", "three", "four", "five", "six"]
    ids = [first.api.ask(prompt) for prompt in prompts]
    left = processing(fake, held)
    kill(first)
    gate.touch()
    second = program()
    bodies = [Api(second.port, first.token).done(request_id) for request_id in ids]
    assert [body["response"] for body in bodies] == ["held"] + ["Echo: " + prompt for prompt in prompts[1:]]
    assert fake.prompts() == [held, *prompts]
    assert [body["attempts"] for body in bodies] == [2, 1, 1, 1, 1, 1]
    assert sorted(bodies, key=lambda body: str(body["completedAt"])) == bodies
    assert not [pid for pid in left if is_running(pid)]


@only_linux
def test_after_kill_9_a_stream_begins_anew_and_the_same_key_finds_its_request(program: Programs, gate: Path, tmp_path: Path) -> None:
    first = program()
    once = {"first": str(tmp_path / "once"), "do": [{"delta": "half"}, {"wait": str(tmp_path / "never")}]}
    body = {"message": "script " + json.dumps([once, {"delta": "A whole "}, {"wait": str(gate)}, {"delta": "text"}]), "stream": True}
    stream = first.api.stream("POST", "/api/ask", body, {"Idempotency-Key": "k"})
    offset = stream.until("delta").id
    job_id = stream.events[0].data["requestId"]
    kill(first)
    assert stream.rest()[-1].kind == "delta"                 # it broke off
    second = program()
    api = Api(second.port, first.token)
    wait_until(lambda: api.poll(job_id).get("partial") == "A whole ")
    again, replayed = api.follow(job_id, offset), api.stream("POST", "/api/ask", body, {"Idempotency-Key": "k"})
    assert replayed.headers["idempotent-replayed"] == "true"
    gate.touch()
    for each in (again, replayed):
        completed = each.rest()[-1]
        assert (offset, text_of(each.events, "half")) == (4, completed.data["response"]) and each.text == "A whole text"
        assert (completed.data["requestId"], completed.data["attempts"]) == (job_id, 2)


@only_linux
def test_what_the_plan_refused_is_not_lost_by_kill_9(program: Programs, fake: FakeClaude, tmp_path: Path) -> None:
    first = program("--spare", "0")
    refused = {"first": str(tmp_path / "mark"), "do": [
        {"limits": {"status": "rejected", "rateLimitType": "five_hour", "resetsAt": time.time() + 3_600}},
        {"fail": {"said": "rate_limit", "api_error_status": 429, "result": "You've hit your limit"}}]}
    ids = [first.api.ask("script " + json.dumps([refused, {"result": "at last"}])), first.api.ask("next")]
    wait_until(lambda: first.api.poll(ids[0]).get("waitingFor") == "usage_limit")
    assert first.api.poll(ids[1])["status"] == "queued"
    kill(first)
    api = Api(program("--spare", "0").port, first.token)     # who rests is not remembered: the next run tells
    assert [api.done(job_id)["response"] for job_id in ids] == ["at last", "Echo: next"]
    assert [api.poll(job_id)["attempts"] for job_id in ids] == [1, 1]


def test_a_request_during_which_the_bridge_was_killed_twice_is_given_up(program: Programs, fake: FakeClaude, gate: Path) -> None:
    held = "hold %s" % gate
    first = program()
    lost, after = first.api.ask(held), first.api.ask("next")
    for times, running in ((1, first), (2, None)):
        running = running or program()
        processing(fake, held, times)
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
    left = processing(fake, "hang")
    assert any(map(is_running, left))
    kill(running)
    wait_until(lambda: not any(map(is_running, left)))


@only_linux
@pytest.mark.parametrize("prompt", ["grandchild %s", "stubborn"])
def test_the_next_start_ends_what_did_not_leave(program: Programs, fake: FakeClaude, tmp_path: Path, prompt: str) -> None:
    note, first = tmp_path / "pid", program("--spare", "0")
    prompt = prompt.replace("%s", str(note))
    client = first.api.new_token("tooled", tools="all")
    request_id = client.ask(prompt)
    wait_until(lambda: note.exists() or client.poll(request_id).get("partial"))
    left = int(note.read_text()) if note.exists() else fake.children()[-1]["pid"]
    kill(first)
    assert is_running(left)
    token_id = next(token["id"] for token in json.loads(token_command(tmp_path, "list", "--json").stdout) if token["name"] == "tooled")
    token_command(tmp_path, "revoke", token_id)              # so that it is not run again
    second = program()
    assert not is_running(left) and "1 processes ended, 0 requests wait again, 0 given up" in second.stderr


def test_a_conversation_goes_on_after_a_restart(program: Programs, fake: FakeClaude) -> None:
    first = program()
    talk = first.api.new_token(sessionMode="stateful")
    talk.answer("I am Ann")
    for end in (signal.SIGTERM, signal.SIGKILL):
        first.end(end)
        first = program()
        turns = Api(first.port, talk.token).answer("turns")["response"]
        assert '["user", "I am Ann"], ["assistant", "Echo: I am Ann"]' in turns


def test_the_originals_database_is_taken_over_and_its_queue_runs_by_itself(program: Programs, fake: FakeClaude, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    old = {name: cab.new_token() for name in ("admin", "app", "talk")}
    with contextlib.closing(sqlite3.connect(str(tmp_path / "data" / "bridge.db"))) as db:
        db.executescript(ORIGINAL_SCHEMA)
        db.executemany("INSERT INTO tokens VALUES (?,?,?,?,?,NULL,1700000000,NULL,?)", [
            (name, name, cab.digest(secret), secret[:12], "stateful" if name == "talk" else "stateless", name == "admin")
            for name, secret in old.items()])
        db.executemany("INSERT INTO requests VALUES (?,?,?,?,?,NULL,?,?,NULL)", [
            ("1", "talk", "I am Ann", "Hello Ann", "completed", 1700000001, 1700000002),
            ("2", "app", "stuck", None, "processing", 1700000003, None),
            ("3", "app", "second", None, "queued", 1700000004, None),
            ("4", "talk", "turns", None, "queued", 1700000004, None)])
        db.execute("INSERT INTO sessions VALUES ('s', 'talk', 'gone', '/', 1700000001, 1700000001)")
        db.commit()
    running = program()
    assert len(running.lines) == 1                           # there is an admin token: none is made
    wait_until(lambda: fake.prompts() == ["stuck", "second", "turns"])
    owners = {"1": "talk", "2": "app", "3": "app", "4": "talk"}
    bodies = [Api(running.port, old[name]).done(request_id) for request_id, name in owners.items()]
    assert [body["response"] for body in bodies] == ["Hello Ann", "Echo: stuck", "Echo: second",
                                                     '[["user", "I am Ann"], ["assistant", "Hello Ann"]]']
    assert Api(running.port, old["admin"]).get("/api/tokens").status == 200


# --- ordered ends ---

def test_each_signal_ends_its_bridge_in_order_and_the_next_start_completes_the_request(
        program: Programs, fake: FakeClaude, gate: Path, tmp_path: Path) -> None:
    numbers = [number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    folders = [str(tmp_path / ("data-%d" % number)) for number in numbers]
    command = imported("cab.FINISH_SECONDS, cab.LEAVE_SECONDS = 0.2, 0.4")
    running = [program("--spare", "0", "--data-dir", folder, command=command) for folder in folders]
    ids = [each.api.ask("hold %s" % gate) for each in running]
    wait_until(lambda: len(fake.prompts()) == len(numbers))
    polls = [begin_poll(each.api, request_id) for each, request_id in zip(running, ids)]
    streams = [begin_stream(each.api, request_id) for each, request_id in zip(running, ids)]
    for each, number in zip(running, numbers):
        each.process.send_signal(number)
    for each, poll, stream in zip(running, polls, streams):
        assert each.process.wait(20) == 0 and "Traceback" not in each.stderr
        with stream:                                         # ended by a last chunk, not broken off
            told = b"".join(chunks(stream))
            assert b"event: delta" in told and b"event: completed" not in told and stream.rest() == b""
        assert json.loads(poll.getresponse().read())["status"] in ("queued", "processing")
        poll.close()
    assert not [child for child in fake.children() if is_running(child["pid"])]
    gate.touch()
    bodies = [Api(program("--spare", "0", "--data-dir", folder).port, each.token).done(request_id)
              for folder, each, request_id in zip(folders, running, ids)]
    assert [(body["response"], body["attempts"]) for body in bodies] == [("held", 1)] * len(numbers)


def test_an_answer_that_is_nearly_there_goes_out_before_the_end(program: Programs, fake: FakeClaude, gate: Path) -> None:
    running = program(command=imported("cab.FINISH_SECONDS = 20.0"))
    poll = begin_poll(running.api, running.api.ask("hold %s" % gate))
    processing(fake, "hold %s" % gate)
    running.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not is_listening(running.port))
    gate.touch()
    assert running.process.wait(20) == 0
    assert json.loads(poll.getresponse().read())["response"] == "held"
    poll.close()


def test_a_bridge_under_nohup_outlives_its_terminal(program: Programs) -> None:
    running = program(command=("nohup", *IMPORTED))
    running.process.send_signal(signal.SIGHUP)
    assert running.api.answer("hello")["response"] == "Echo: hello"
    assert "Shutting down" not in running.stderr
    assert running.end(signal.SIGTERM) == 0


# --- starts that are refused ---

def test_a_second_bridge_on_the_same_data_is_refused_and_changes_nothing(program: Programs, fake: FakeClaude, gate: Path,
                                                                         tmp_path: Path) -> None:
    first, held = program(), "hold %s" % gate
    ids = [first.api.ask(held), first.api.ask("next")]
    processing(fake, held)
    before = rows(tmp_path / "data")
    sentence = refusal(try_start(tmp_path, fake))
    assert "process %d" % first.process.pid in sentence and str(first.port) in sentence
    assert rows(tmp_path / "data") == before
    gate.touch()
    assert [first.api.done(request_id)["response"] for request_id in ids] == ["held", "Echo: next"]
    assert fake.prompts() == [held, "next"]


def test_a_port_in_use_is_one_sentence_and_costs_no_admin_token(program: Programs, fake: FakeClaude, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert "Port %d" % port in refusal(try_start(tmp_path, fake, "--port", str(port)))
    assert program().token.startswith("cab-")


def test_a_refused_start_leaves_running_requests_of_others_alone(program: Programs, fake: FakeClaude, gate: Path, tmp_path: Path) -> None:
    first = program()
    lost = first.api.ask("hold %s" % gate)
    processing(fake, "hold %s" % gate)
    kill(first)
    before = rows(tmp_path / "data")
    with socket.create_server(("127.0.0.1", 0)) as other:
        refusal(try_start(tmp_path, fake, "--port", str(other.getsockname()[1])))
    assert rows(tmp_path / "data") == before
    gate.touch()
    assert Api(program().port, first.token).done(lost)["response"] == "held"


def spoil(folder: Path, name: str) -> Path:
    """A data folder in which something is not what it should be."""
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
def test_unusable_data_is_one_sentence(tmp_path: Path, fake: FakeClaude, name: str) -> None:
    data_dir = spoil(tmp_path, name)
    assert str(tmp_path / "data") in refusal(try_start(tmp_path, fake, data_dir=data_dir))
