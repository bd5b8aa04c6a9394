"""/metrics, /openapi.json, and the command `ask`: what the owner uses besides the dashboard."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import pytest
from conftest import (
    IMPORTED, Answer, Api, FakeClaude, Program, RunningBridge, missing, run_cli, wait_until,
)

import claude_api_bridge as cab

Bridges = Callable[..., RunningBridge]
Programs = Callable[..., Program]
Series = Dict[Tuple[str, str], float]
# A sample of the text format: name, labels, value.
SAMPLE = re.compile(
    r'([a-z_]+)(\{(?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)*\})?'
    r" (-?[0-9.]+(?:e[+-]?[0-9]+)?)"
)


# --- /metrics ---


def read_metrics(text: str) -> Tuple[Series, Dict[str, str]]:
    """Parse the text strictly, as a scraper; return ((name, labels) -> value, name -> type)."""
    series: Series = {}
    kinds: Dict[str, str] = {}
    helped: List[str] = []
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split(" ", 3)[2]
            assert name not in helped
            assert len(line.split(" ", 3)[3]) > 5
            helped.append(name)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == helped[-1]
            assert kind in ("counter", "gauge", "histogram")
            assert name not in kinds
            kinds[name] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            name, labels, value = match.groups()
            base = name
            if kinds[helped[-1]] == "histogram":
                base = re.sub("_(bucket|sum|count)$", "", name)
            assert base == helped[-1], "%s is below %s" % (name, helped[-1])
            assert (name, labels or "") not in series, line
            series[name, labels or ""] = float(value)
    assert text.endswith("\n")
    assert set(helped) == set(kinds)
    return series, kinds


def metrics(running: RunningBridge) -> Series:
    answer = running.admin.get("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return read_metrics(answer.data.decode())[0]


def test_every_metric_is_in_the_table_and_well_formed(bridge: Bridges) -> None:
    running = bridge()
    running.admin.answer("hello")
    series, kinds = read_metrics(running.admin.get("/metrics").data.decode())
    assert list(kinds.items()) == [(row.name, row.kind) for row in cab.METRICS]
    documented = {row.name: set(filter(None, row.labels.split(", "))) for row in cab.METRICS}
    for name, labels in series:
        base = name if name in documented else re.sub("_(bucket|sum|count)$", "", name)
        assert set(re.findall(r"([a-z]+)=", labels)) - {"le"} == documented[base]


def test_metrics_need_an_admin_token(bridge: Bridges) -> None:
    running = bridge()
    assert running.admin.new_token().get("/metrics").status == 403
    assert running.admin.with_token(None).get("/metrics").status == 401


def test_requests_and_responses_are_counted(bridge: Bridges, gate: Path) -> None:
    running = bridge(spare=1)
    before = metrics(running)
    assert running.admin.answer("hello")["status"] == "completed"
    failed = running.admin.answer('error {"api_error_status": 404, "said": "model_not_found"}')
    assert failed["errorCode"] == "model_not_found"
    held, waits = running.admin.ask("hold %s" % gate), running.admin.ask("later")
    wait_until(lambda: running.admin.poll(held)["status"] == "processing")
    during = metrics(running)
    assert during["cab_queue_length", '{status="queued"}'] == 1
    assert during["cab_queue_length", '{status="processing"}'] == 1
    for job in (waits, held):
        assert running.admin.delete("/api/ask/" + job).status == 200
    wait_until(lambda: not running.admin.get("/api/status").json["worker"]["requestId"])
    after = metrics(running)
    finished = {
        labels: value
        for (name, labels), value in after.items()
        if name == "cab_requests_finished_total"
    }
    assert finished == {
        '{status="completed",code=""}': 1,
        '{status="error",code="model_not_found"}': 1,
        '{status="error",code="cancelled"}': 2,
    }
    assert after["cab_requests_accepted_total", ""] == 4
    assert after["cab_tokens_total", '{kind="input"}'] == 10
    # The request that waited never ran.
    assert after["cab_wait_seconds_count", ""] == 3
    assert after["cab_run_seconds_count", ""] == 3
    assert sum(value for (name, _), value in after.items() if name == "cab_spare_total") == 3
    assert after["cab_cli_starts_total", ""] >= 3
    assert after["cab_http_responses_total", '{status="202"}'] >= 4
    assert after["cab_cost_usd_total", ""] > 0
    assert after["cab_start_time_seconds", ""] == before["cab_start_time_seconds", ""]
    assert after["cab_start_time_seconds", ""] <= time.time()


def test_counters_never_go_down_and_buckets_add_up(bridge: Bridges) -> None:
    running = bridge()
    kinds = {row.name: row.kind for row in cab.METRICS}
    last: Series = {}
    for n in range(6):
        running.admin.answer("hello %d" % n)
        if n == 3:
            assert running.admin.new_token("gone").answer("x")["status"] == "completed"
            # The rows of a deleted token are deleted; the counters stay.
            rows = running.admin.get("/api/tokens").json["tokens"]
            (token_id,) = [row["id"] for row in rows if row["name"] == "gone"]
            assert running.admin.delete("/api/tokens/" + token_id).status == 200
        now = metrics(running)
        for key, value in last.items():
            if kinds.get(key[0], "histogram") != "gauge":
                assert now[key] >= value, key
        for name in ("cab_wait_seconds", "cab_run_seconds"):
            bucket_name = name + "_bucket"
            buckets = [now[key] for key in now if key[0] == bucket_name]
            assert buckets == sorted(buckets)
            assert buckets[-1] == now[name + "_count", ""]
            assert len(buckets) == len(cab.HISTOGRAM_SECONDS) + 1
        last = now


def test_the_plan_and_the_tunnel_are_shown(bridge: Bridges) -> None:
    running = bridge()
    info = {
        "status": "allowed_warning",
        "rateLimitType": "five_hour",
        "resetsAt": 4_102_444_800,
        "utilization": 0.5,
    }
    running.admin.answer("script " + json.dumps([{"limits": info}, {"delta": "ok"}]))
    series = metrics(running)
    assert series["cab_plan_utilization", '{window="five_hour"}'] == 0.5
    assert series["cab_plan_resets_at_seconds", '{window="five_hour"}'] == 4_102_444_800
    assert series["cab_resting", ""] == 0
    assert series["cab_tunnel_up", ""] == 0
    assert series["cab_tunnel_state", '{state="stopped"}'] == 1


def test_labels_are_escaped() -> None:
    text = cab.metrics_text(
        {
            ("cab_info", (("version", 'a"b\\c\nd'), ("claude", "é"))): 1,
            ("cab_cost_usd_total", ()): 1e-7,
            ("cab_start_time_seconds", ()): 1_800_000_000.25,
            ("cab_queue_length", (("status", "queued"),)): 10,
        }
    )
    assert 'cab_info{version="a\\"b\\\\c\\nd",claude="é"} 1\n' in text
    assert "cab_cost_usd_total 1e-07\n" in text
    assert "cab_start_time_seconds 1800000000.25\n" in text
    assert 'cab_queue_length{status="queued"} 10\n' in text
    read_metrics(text)


# --- /openapi.json ---

DOCUMENT = json.loads(json.dumps(cab.openapi()))


def faults(value: Any, schema: Mapping[str, Any], where: str = "$") -> Iterator[str]:
    """Yield the differences between a value and its schema.

    It knows only the parts of JSON Schema that the document uses.
    """
    if "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    fits = {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "null": value is None,
        "boolean": isinstance(value, bool),
        "number": isinstance(value, (int, float)) and not isinstance(value, bool),
    }
    if kinds and not any(fits[kind] for kind in kinds):
        yield "%s is %r, not %s" % (where, value, kinds)
    elif isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                yield "%s.%s is missing" % (where, name)
        for name, part in value.items():
            if "properties" in schema and schema["properties"] and name not in schema["properties"]:
                yield "%s.%s is not described" % (where, name)
            part_schema = schema.get("properties", {}).get(name, {})
            yield from faults(part, part_schema, "%s.%s" % (where, name))
    elif isinstance(value, list):
        for n, part in enumerate(value):
            yield from faults(part, schema.get("items", {}), "%s[%d]" % (where, n))


def check(method: str, path: str, answer: Answer) -> Answer:
    """Check a response against the document; return it."""
    responses = DOCUMENT["paths"][path][method.lower()]["responses"]
    assert str(answer.status) in responses, (method, path, answer.status, answer.data[:300])
    content = responses[str(answer.status)]["content"]
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in content, (kind, path)
    if kind == "application/json":
        differences = list(faults(answer.json, content[kind]["schema"]))
        assert differences == [], (method, path, answer.status)
    return answer


def operations() -> Iterator[Tuple[str, str, Dict[str, Any]]]:
    """Yield (path, method, operation) of all operations in the document."""
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def examples() -> Iterator[Tuple[str, str, Any, Mapping[str, Any]]]:
    """Yield (path, code, example, schema) of all examples in responses."""
    for path, _, operation in operations():
        for response in operation["responses"].values():
            for content in response["content"].values():
                for code, example in content.get("examples", {}).items():
                    yield path, code, example, content["schema"]


def test_the_document_has_every_route_and_every_error() -> None:
    documented = {
        (method.upper(), re.sub(r"\{(\w+)\}", r":\1", path)) for path, method, _ in operations()
    }
    assert documented == {(route.method, route.path) for route in cab.ROUTES}
    assert {code for _, code, _, _ in examples()} == {kind.code for kind in cab.ERRORS}
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(set(names)) == len(names)
    assert DOCUMENT["openapi"] == "3.1.0"
    for path, _, operation in operations():
        parameters = {row["name"] for row in operation["parameters"] if row["in"] == "path"}
        assert parameters == set(re.findall(r"\{(\w+)\}", path))


def test_every_example_fits_its_own_schema() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        for example in schema.get("examples", ()):
            assert list(faults(example, schema)) == [], name
    for path, code, example, schema in examples():
        assert list(faults(example["value"], schema)) == [], (path, code)


def test_every_path_answers_as_the_document_says(bridge: Bridges, gate: Path) -> None:
    running = bridge(rate_limit=0)
    admin = running.admin
    anonymous = admin.with_token(None)

    def post(path: str, body: Any, client: Api = admin) -> Any:
        return check("POST", path, client.post(path, body)).json

    assert check("GET", "/openapi.json", anonymous.get("/openapi.json")).json == DOCUMENT
    fields = {"name": "s", "sessionMode": "stateful", "odd": 1}
    stateful = admin.with_token(post("/api/tokens", fields)["token"])
    options = {"systemPrompt": "x", "effort": "low", "model": "haiku", "odd": 1}
    done = post("/api/ask", {"message": "hello", "wait": 30, **options}, stateful)
    held = post("/api/ask", {"message": "hold %s" % gate})["requestId"]
    wait_until(lambda: admin.poll(held)["status"] == "processing")
    waits = admin.ask("later")
    for job, client in ((held, admin), (waits, admin), (done["requestId"], stateful)):
        check("GET", "/api/ask/{requestId}", client.get("/api/ask/" + job))
    check("GET", "/api/requests", admin.get("/api/requests"))
    check("DELETE", "/api/ask/{requestId}", admin.delete("/api/ask/" + held))
    check("DELETE", "/api/ask/{requestId}", admin.delete("/api/ask/" + held))
    admin.done(waits)
    post("/api/ask", {"message": "shaped", "jsonSchema": {"type": "object"}, "wait": 30})
    for method in ("GET", "POST"):
        answer = admin.call(method, "/api/ask/%s/events" % waits)
        check(method, "/api/ask/{requestId}/events", answer)
    check("POST", "/api/ask", admin.post("/api/ask", {"message": "hello", "stream": True}))
    for path in (
        "/api/requests", "/api/conversations", "/api/usage", "/api/status", "/", "/v1/models",
        "/api/tokens", "/health", "/metrics", "/dashboard",
    ):
        for client in (admin, stateful, anonymous, admin.with_token("cab-wrong")):
            check("GET", path, client.get(path))
    check("GET", "/", admin.get("/", headers={"Accept": "text/html"}))
    check("DELETE", "/api/conversations/{name}", stateful.delete("/api/conversations/default"))
    check("DELETE", "/api/conversations/{name}", stateful.delete("/api/conversations/default"))
    check("GET", "/v1/models/{id}", admin.get("/v1/models/haiku"))
    check("GET", "/v1/models/{id}", admin.get("/v1/models/nosuch"))
    chat: Dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
    call = {"messages": [{"role": "user", "content": 'call [["add", {"a": 1}]]'}]}
    anthropic_tools = [{"name": "add", "input_schema": {"type": "object"}}]
    openai_tools = [{"type": "function", "function": {"name": "add"}}]
    prompt = 'error {"api_error_status": 404, "said": "model_not_found"}'
    refused = {"messages": [{"role": "user", "content": prompt}]}
    for path, tools in (("/v1/messages", anthropic_tools), ("/v1/chat/completions", openai_tools)):
        for body in (chat, {**call, "tools": tools}, {**chat, "stream": True}, {}, [], refused):
            check("POST", path, admin.post(path, body))
        check("POST", path, anonymous.post(path, chat))
        check("POST", path, admin.post(path, b"x" * (cab.BODY_BYTES + 1)))
        check("POST", path, admin.post(path, b"{}", headers={"Content-Encoding": "gzip"}))
    rows = admin.get("/api/tokens").json["tokens"]
    (token_id,) = [row["id"] for row in rows if row["name"] == "s"]
    check("DELETE", "/api/tokens/{id}", stateful.delete("/api/tokens/" + token_id))
    check("DELETE", "/api/tokens/{id}", admin.delete("/api/tokens/" + token_id))
    check("DELETE", "/api/tokens/{id}", admin.delete("/api/tokens/" + token_id))
    post("/api/tokens", {"name": ""})
    post("/api/ask", {"message": "x", "wait": 1000})


def has_validator(python: str) -> bool:
    """Return whether this Python has the package openapi-spec-validator."""
    words = [python, "-c", "import openapi_spec_validator"]
    return subprocess.run(words, stderr=subprocess.DEVNULL, timeout=60).returncode == 0


def test_a_validator_accepts_the_document(tmp_path: Path) -> None:
    """Run openapi-spec-validator in the environment that CAB_TEST_SDKS names."""
    python = shutil.which(os.environ.get("CAB_TEST_SDKS") or "")
    if not python or not has_validator(python):
        missing("no openapi-spec-validator in the environment of CAB_TEST_SDKS")
    (tmp_path / "openapi.json").write_text(json.dumps(DOCUMENT))
    done = subprocess.run(
        [str(python), "-m", "openapi_spec_validator", str(tmp_path / "openapi.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout.decode()


# --- ask ---

Asks = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def asks(program: Programs, tmp_path: Path) -> Asks:
    """Return a function that runs `ask` with the data folder of a running bridge."""
    running = program("--spare", "0")
    return lambda *words, **environ: run_cli(
        "ask",
        *words,
        "--data-dir",
        str(tmp_path / "data"),
        home=tmp_path,
        environ={"RUNNING": str(running.port), **environ},
    )


def test_the_answer_alone_goes_to_stdout(asks: Asks, tmp_path: Path) -> None:
    done = asks("Why?", "--model", "haiku")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Echo: Why?\n", "")
    body = json.loads(asks("Why?", "--json", "--system-prompt", "Be brief.").stdout)
    assert (body["status"], body["response"]) == ("completed", "Echo: Why?")
    assert FakeClaude(tmp_path / "fake").prompts() == ["Why?", "Why?"]
    folder = ("--data-dir", str(tmp_path / "data"))
    tokens = json.loads(run_cli("token", "list", "--json", *folder, home=tmp_path).stdout)
    # Both commands used the same token.
    assert [token["name"] for token in tokens] == ["ask (stateless)", "admin"]
    stored = tmp_path / "data" / "ask-tokens.json"
    assert stored.stat().st_mode & 0o777 == 0o600
    run_cli("token", "revoke", tokens[0]["id"], *folder, home=tmp_path)
    # `ask` creates a new token if the old one was revoked.
    assert asks("again").stdout == "Echo: again\n"


def test_the_message_can_come_from_standard_input_and_a_conversation_continues(
    asks: Asks, tmp_path: Path
) -> None:
    words = [*IMPORTED, "ask", "-", "--conversation", "trip", "--data-dir", str(tmp_path / "data")]
    for message in (b"remember \xc3\xa9 this", b"turns"):
        done = subprocess.run(
            words,
            input=message,
            stdout=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
            timeout=60,
        )
    assert json.loads(done.stdout) == [
        ["user", "remember é this"],
        ["assistant", "Echo: remember é this"],
    ]


def test_a_failure_is_a_sentence_and_a_status(asks: Asks) -> None:
    done = asks(
        'error {"api_error_status": 404, "said": "model_not_found", "result": "no such model"}'
    )
    assert (done.returncode, done.stdout) == (
        1,
        "",
    )
    assert done.stderr == "error: model_not_found: no such model\n"
    done = asks("hello", CAB_TOKEN="cab-wrong")
    assert done.returncode == 1
    assert "Invalid or expired token" in done.stderr
    assert "hint: check CAB_TOKEN" in done.stderr
    done = asks(" ")
    assert done.returncode == 2
    assert "The message is empty" in done.stderr
    done = asks("hello", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert "hint: " in done.stderr


def test_without_a_bridge_ask_ends_with_an_error(tmp_path: Path) -> None:
    done = run_cli("ask", "hello", "--data-dir", str(tmp_path / "data"), home=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: No bridge is running with the data folder")
    assert "hint: " in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_named_bridge_is_asked_with_a_given_token(program: Programs, tmp_path: Path) -> None:
    running = program()
    url = "http://127.0.0.1:%d" % running.port
    environ = {"CAB_TOKEN": running.token, "CAB_URL": url + "/"}
    done = run_cli(
        "ask", "hello", "--data-dir", str(tmp_path / "elsewhere"), home=tmp_path, environ=environ
    )
    assert (done.returncode, done.stdout) == (0, "Echo: hello\n")
    assert not (tmp_path / "elsewhere").exists()


class Terminal:
    """A command at a pseudo terminal. text: its output so far."""

    def __init__(self, words: List[str], environ: Mapping[str, str]) -> None:
        self._terminal, command_side = pty.openpty()
        self.process = subprocess.Popen(
            words,
            stdin=command_side,
            stdout=command_side,
            stderr=command_side,
            env=dict(environ),
            start_new_session=True,
        )
        os.close(command_side)
        self.text = ""

    def until(self, words: str) -> str:
        """Read until the text contains these words, or (with "") to the end; return the text."""
        deadline = time.monotonic() + 20
        while words not in self.text or not words:
            assert time.monotonic() < deadline, self.text
            if select.select([self._terminal], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    data = os.read(self._terminal, 4096)
                    if data:
                        self.text += data.decode()
                        continue
                break
        return self.text

    def close(self) -> Optional[int]:
        """Read to the end; return the exit status."""
        self.until("")
        os.close(self._terminal)
        return self.process.wait(10)


def terminal_environment(home: Path) -> Dict[str, str]:
    """Return the environment of `ask` at a terminal."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "CAB_DATA_DIR": str(home / "data"),
    }


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of POSIX")
def test_at_a_terminal_ask_streams_and_control_c_cancels(
    program: Programs, tmp_path: Path, gate: Path
) -> None:
    running = program("--spare", "0")
    environ = terminal_environment(tmp_path)
    prompt = "script " + json.dumps([{"delta": "he"}, {"wait": str(gate)}, {"delta": "ld"}])
    terminal = Terminal([*IMPORTED, "ask", prompt], environ)
    # The first delta appears before the answer is complete.
    assert terminal.until("he").endswith("he")
    gate.touch()
    assert terminal.close() == 0
    assert terminal.text == "held\r\n"
    second_gate = tmp_path / "second-gate"
    terminal = Terminal([*IMPORTED, "ask", "hold %s" % second_gate], environ)
    terminal.until("he")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.close() == 130
    assert "Cancelled." in terminal.text
    assert "Traceback" not in terminal.text
    latest = Api(running.port, running.token).get("/api/requests?limit=1").json["requests"][0]
    assert latest["errorCode"] == "cancelled"
    second_gate.touch()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of POSIX")
def test_an_answer_cannot_move_the_cursor(program: Programs, tmp_path: Path) -> None:
    program("--spare", "0")
    environ = terminal_environment(tmp_path)
    terminal = Terminal([*IMPORTED, "ask", "say a\x1b[2Jb\tc\nd"], environ)
    assert terminal.close() == 0
    assert terminal.text == "a?[2Jb\tc\r\nd\r\n"
