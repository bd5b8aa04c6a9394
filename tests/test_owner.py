"""What the owner sees besides the page: /metrics, /openapi.json, and `ask` from the shell."""
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
from conftest import IMPORTED, Answer, Api, FakeClaude, Program, RunningBridge, missing, run_cli, wait_until

import claude_api_bridge as cab

Bridges = Callable[..., RunningBridge]
Programs = Callable[..., Program]
Series = Dict[Tuple[str, str], float]


# --- /metrics ---

def read_metrics(text: str) -> Tuple[Series, Dict[str, str]]:
    """Strictly, as a scraper reads it. -> ((name, labels) -> value, name -> type)."""
    found: Series = {}
    kinds: Dict[str, str] = {}
    helped: List[str] = []
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split(" ", 3)[2]
            assert name not in helped and len(line.split(" ", 3)[3]) > 5
            helped.append(name)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == helped[-1] and kind in ("counter", "gauge", "histogram") and name not in kinds
            kinds[name] = kind
        else:
            shape = re.fullmatch(r'([a-z_]+)(\{(?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)*\})? (-?[0-9.]+(?:e[+-]?[0-9]+)?)', line)
            assert shape, line
            name, labels, value = shape.groups()
            base = re.sub("_(bucket|sum|count)$", "", name) if kinds[helped[-1]] == "histogram" else name
            assert base == helped[-1], "%s stands below %s" % (name, helped[-1])
            assert (name, labels or "") not in found, line
            found[name, labels or ""] = float(value)
    assert text.endswith("\n") and set(helped) == set(kinds)
    return found, kinds


def metrics(running: RunningBridge) -> Series:
    answer = running.admin.get("/metrics")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return read_metrics(answer.data.decode())[0]


def test_every_metric_is_in_the_table_and_well_formed(bridge: Bridges) -> None:
    running = bridge()
    running.admin.answer("hello")
    found, kinds = read_metrics(running.admin.get("/metrics").data.decode())
    assert list(kinds.items()) == [(row.name, row.kind) for row in cab.METRICS]
    labels = {row.name: set(filter(None, re.split(", ", row.labels))) for row in cab.METRICS}
    for name, told in found:
        base = name if name in labels else re.sub("_(bucket|sum|count)$", "", name)
        assert set(re.findall(r"([a-z]+)=", told)) - {"le"} == labels[base]


def test_an_ordinary_token_and_a_stranger_get_none(bridge: Bridges) -> None:
    running = bridge()
    assert running.admin.new_token().get("/metrics").status == 403 and running.admin.with_token(None).get("/metrics").status == 401


def test_what_happened_is_counted(bridge: Bridges, gate: Path) -> None:
    running = bridge(spare=1)
    before = metrics(running)
    assert running.admin.answer("hello")["status"] == "completed"
    assert running.admin.answer('error {"api_error_status": 404, "said": "model_not_found"}')["errorCode"] == "model_not_found"
    held, waits = running.admin.ask("hold %s" % gate), running.admin.ask("later")
    wait_until(lambda: running.admin.poll(held)["status"] == "processing")
    during = metrics(running)
    assert during["cab_queue_length", '{status="queued"}'] == during["cab_queue_length", '{status="processing"}'] == 1
    for each in (waits, held):
        assert running.admin.delete("/api/ask/" + each).status == 200
    wait_until(lambda: not running.admin.get("/api/status").json["worker"]["requestId"])
    after = metrics(running)
    finished = {labels: value for (name, labels), value in after.items() if name == "cab_requests_finished_total"}
    assert finished == {'{status="completed",code=""}': 1, '{status="error",code="model_not_found"}': 1, '{status="error",code="cancelled"}': 2}
    assert after["cab_requests_accepted_total", ""] == 4 and after["cab_tokens_total", '{kind="input"}'] == 10
    assert after["cab_wait_seconds_count", ""] == 3 and after["cab_run_seconds_count", ""] == 3      # one never ran
    assert sum(value for (name, _), value in after.items() if name == "cab_spare_total") == 3 <= after["cab_cli_starts_total", ""]
    assert after["cab_http_responses_total", '{status="202"}'] >= 4 and after["cab_cost_usd_total", ""] > 0
    assert after["cab_start_time_seconds", ""] == before["cab_start_time_seconds", ""] <= time.time()


def test_counters_never_go_down_and_buckets_add_up(bridge: Bridges) -> None:
    running = bridge()
    kinds = {row.name: row.kind for row in cab.METRICS}
    last: Series = {}
    for n in range(6):
        running.admin.answer("hello %d" % n)
        if n == 3:
            assert running.admin.new_token("gone").answer("x")["status"] == "completed"
            gone = next(token for token in running.admin.get("/api/tokens").json["tokens"] if token["name"] == "gone")
            assert running.admin.delete("/api/tokens/" + gone["id"]).status == 200       # its rows go, the counters stay
        now = metrics(running)
        for key, value in last.items():
            if kinds.get(key[0], "histogram") != "gauge":
                assert now[key] >= value, key
        for name in ("cab_wait_seconds", "cab_run_seconds"):
            buckets = [value for (each, _), value in now.items() if each == name + "_bucket"]
            assert buckets == sorted(buckets) and buckets[-1] == now[name + "_count", ""] and len(buckets) == len(cab.HISTOGRAM_SECONDS) + 1
        last = now


def test_the_plan_and_the_tunnel_are_shown(bridge: Bridges) -> None:
    running = bridge()
    info = {"status": "allowed_warning", "rateLimitType": "five_hour", "resetsAt": 4_102_444_800, "utilization": 0.5}
    running.admin.answer("script " + json.dumps([{"limits": info}, {"delta": "ok"}]))
    found = metrics(running)
    assert found["cab_plan_utilization", '{window="five_hour"}'] == 0.5
    assert found["cab_plan_resets_at_seconds", '{window="five_hour"}'] == 4_102_444_800
    assert (found["cab_resting", ""], found["cab_tunnel_up", ""], found["cab_tunnel_state", '{state="stopped"}']) == (0, 0, 1)


def test_labels_are_escaped() -> None:
    text = cab.metrics_text({("cab_info", (("version", 'a"b\\c\nd'), ("claude", "é"))): 1, ("cab_cost_usd_total", ()): 1e-7,
                             ("cab_start_time_seconds", ()): 1_800_000_000.25, ("cab_queue_length", (("status", "queued"),)): 10})
    assert 'cab_info{version="a\\"b\\\\c\\nd",claude="é"} 1\n' in text and "cab_cost_usd_total 1e-07\n" in text
    assert "cab_start_time_seconds 1800000000.25\n" in text and 'cab_queue_length{status="queued"} 10\n' in text
    read_metrics(text)


# --- /openapi.json ---

DOCUMENT = json.loads(json.dumps(cab.openapi()))


def faults(value: Any, schema: Mapping[str, Any], where: str = "$") -> Iterator[str]:
    """What of a value does not fit a schema, as far as ours use JSON Schema."""
    if "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    fits = {"object": isinstance(value, dict), "array": isinstance(value, list), "string": isinstance(value, str), "null": value is None,
            "boolean": isinstance(value, bool), "number": isinstance(value, (int, float)) and not isinstance(value, bool)}
    if kinds and not any(fits[kind] for kind in kinds):
        yield "%s is %r, not %s" % (where, value, kinds)
    elif isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                yield "%s.%s is missing" % (where, name)
        for name, part in value.items():
            if "properties" in schema and schema["properties"] and name not in schema["properties"]:
                yield "%s.%s is not described" % (where, name)
            yield from faults(part, schema.get("properties", {}).get(name, {}), "%s.%s" % (where, name))
    elif isinstance(value, list):
        for n, part in enumerate(value):
            yield from faults(part, schema.get("items", {}), "%s[%d]" % (where, n))


def check(method: str, path: str, answer: Answer) -> Answer:
    """The answer is as the document says."""
    told = DOCUMENT["paths"][path][method.lower()]["responses"]
    assert str(answer.status) in told, (method, path, answer.status, answer.data[:300])
    content = told[str(answer.status)]["content"]
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in content, (kind, path)
    if kind == "application/json":
        assert list(faults(answer.json, content[kind]["schema"])) == [], (method, path, answer.status)
    return answer


def test_the_document_holds_every_route_and_every_error() -> None:
    assert {(method.upper(), re.sub(r"\{(\w+)\}", r":\1", path)) for path, each in DOCUMENT["paths"].items() for method in each} == {
        (route.method, route.path) for route in cab.ROUTES}
    codes = {code for each in DOCUMENT["paths"].values() for one in each.values() for told in one["responses"].values()
             for content in told["content"].values() for code in content.get("examples", ())}
    assert codes == {kind.code for kind in cab.ERRORS}
    names = [one["operationId"] for each in DOCUMENT["paths"].values() for one in each.values()]
    assert len(set(names)) == len(names) and DOCUMENT["openapi"] == "3.1.0"
    for path, each in DOCUMENT["paths"].items():
        for one in each.values():
            assert {part["name"] for part in one["parameters"] if part["in"] == "path"} == set(re.findall(r"\{(\w+)\}", path))


def test_every_example_fits_its_own_schema() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        for example in schema.get("examples", ()):
            assert list(faults(example, schema)) == [], name
    for path, each in DOCUMENT["paths"].items():
        for one in each.values():
            for told in one["responses"].values():
                for content in told["content"].values():
                    for code, example in content.get("examples", {}).items():
                        assert list(faults(example["value"], content["schema"])) == [], (path, code)


def test_every_path_answers_as_the_document_says(bridge: Bridges, gate: Path) -> None:
    running = bridge(rate_limit=0)
    admin = running.admin
    assert check("GET", "/openapi.json", admin.with_token(None).get("/openapi.json")).json == DOCUMENT
    stateful = admin.with_token(check("POST", "/api/tokens", admin.post("/api/tokens", {
        "name": "s", "sessionMode": "stateful", "odd": 1})).json["token"])
    done = check("POST", "/api/ask", stateful.post("/api/ask", {"message": "hello", "wait": 30, "systemPrompt": "x", "effort": "low",
                                                                "model": "haiku", "odd": 1})).json
    held = check("POST", "/api/ask", admin.post("/api/ask", {"message": "hold %s" % gate})).json["requestId"]
    wait_until(lambda: admin.poll(held)["status"] == "processing")
    waits = admin.ask("later")
    for job, client in ((held, admin), (waits, admin), (done["requestId"], stateful)):
        check("GET", "/api/ask/{requestId}", client.get("/api/ask/" + job))
    check("GET", "/api/requests", admin.get("/api/requests"))
    check("DELETE", "/api/ask/{requestId}", admin.delete("/api/ask/" + held))
    check("DELETE", "/api/ask/{requestId}", admin.delete("/api/ask/" + held))
    admin.done(waits)
    check("POST", "/api/ask", admin.post("/api/ask", {"message": "shaped", "jsonSchema": {"type": "object"}, "wait": 30}))
    for method in ("GET", "POST"):
        check(method, "/api/ask/{requestId}/events", admin.call(method, "/api/ask/%s/events" % waits))
    check("POST", "/api/ask", admin.post("/api/ask", {"message": "hello", "stream": True}))
    for path in ("/api/requests", "/api/conversations", "/api/usage", "/api/status", "/", "/v1/models", "/api/tokens", "/health", "/metrics",
                 "/dashboard"):
        for client in (admin, stateful, admin.with_token(None), admin.with_token("cab-wrong")):
            check("GET", path, client.get(path))
    check("GET", "/", admin.get("/", headers={"Accept": "text/html"}))
    check("DELETE", "/api/conversations/{name}", stateful.delete("/api/conversations/default"))
    check("DELETE", "/api/conversations/{name}", stateful.delete("/api/conversations/default"))
    check("GET", "/v1/models/{id}", admin.get("/v1/models/haiku"))
    check("GET", "/v1/models/{id}", admin.get("/v1/models/nosuch"))
    chat: Dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
    call = {"messages": [{"role": "user", "content": 'call [["add", {"a": 1}]]'}]}
    ours = [{"name": "add", "input_schema": {"type": "object"}}]
    theirs = [{"type": "function", "function": {"name": "add"}}]
    refused = {"messages": [{"role": "user", "content": 'error {"api_error_status": 404, "said": "model_not_found"}'}]}
    for path, tools in (("/v1/messages", ours), ("/v1/chat/completions", theirs)):
        for body in (chat, {**call, "tools": tools}, {**chat, "stream": True}, {}, [], refused):
            check("POST", path, admin.post(path, body))
        check("POST", path, admin.with_token(None).post(path, chat))
        check("POST", path, admin.post(path, b"x" * (cab.BODY_BYTES + 1)))
        check("POST", path, admin.post(path, b"{}", headers={"Content-Encoding": "gzip"}))
    token = next(each for each in admin.get("/api/tokens").json["tokens"] if each["name"] == "s")
    check("DELETE", "/api/tokens/{id}", stateful.delete("/api/tokens/" + token["id"]))
    check("DELETE", "/api/tokens/{id}", admin.delete("/api/tokens/" + token["id"]))
    check("DELETE", "/api/tokens/{id}", admin.delete("/api/tokens/" + token["id"]))
    check("POST", "/api/tokens", admin.post("/api/tokens", {"name": ""}))
    check("POST", "/api/ask", admin.post("/api/ask", {"message": "x", "wait": 1000}))


def test_a_validator_takes_the_document(tmp_path: Path) -> None:
    """With the package openapi-spec-validator, in the environment that CAB_TEST_SDKS names."""
    python = shutil.which(os.environ.get("CAB_TEST_SDKS") or "")
    if not python or subprocess.run([python, "-c", "import openapi_spec_validator"], stderr=subprocess.DEVNULL, timeout=60).returncode:
        missing("no openapi-spec-validator in the environment of CAB_TEST_SDKS")
    (tmp_path / "openapi.json").write_text(json.dumps(DOCUMENT))
    done = subprocess.run([str(python), "-m", "openapi_spec_validator", str(tmp_path / "openapi.json")], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=120)
    assert done.returncode == 0, done.stdout.decode()


# --- ask ---

Asks = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def asks(program: Programs, tmp_path: Path) -> Asks:
    """asks(*words) -> one `ask` of the owner of the data folder, beside a running bridge."""
    running = program("--spare", "0")
    return lambda *words, **environ: run_cli("ask", *words, "--data-dir", str(tmp_path / "data"), home=tmp_path,
                                             environ={"RUNNING": str(running.port), **environ})


def test_the_answer_alone_goes_to_stdout(asks: Asks, tmp_path: Path) -> None:
    done = asks("Why?", "--model", "haiku")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Echo: Why?\n", "")
    told = json.loads(asks("Why?", "--json", "--system-prompt", "Be brief.").stdout)
    assert (told["status"], told["response"]) == ("completed", "Echo: Why?")
    assert FakeClaude(tmp_path / "fake").prompts() == ["Why?", "Why?"]
    listed = json.loads(run_cli("token", "list", "--json", "--data-dir", str(tmp_path / "data"), home=tmp_path).stdout)
    assert [token["name"] for token in listed] == ["ask (stateless)", "admin"]           # made once
    kept = tmp_path / "data" / "ask-tokens.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    run_cli("token", "revoke", listed[0]["id"], "--data-dir", str(tmp_path / "data"), home=tmp_path)
    assert asks("again").stdout == "Echo: again\n"                                       # and anew when it was revoked


def test_the_message_may_come_from_standard_input_and_a_conversation_goes_on(asks: Asks, program: Programs, tmp_path: Path) -> None:
    words = [*IMPORTED, "ask", "-", "--conversation", "trip", "--data-dir", str(tmp_path / "data")]
    for message in (b"remember \xc3\xa9 this", b"turns"):
        done = subprocess.run(words, input=message, stdout=subprocess.PIPE, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, timeout=60)
    assert json.loads(done.stdout) == [["user", "remember é this"], ["assistant", "Echo: remember é this"]]


def test_a_failure_is_a_sentence_and_a_status(asks: Asks, tmp_path: Path) -> None:
    done = asks('error {"api_error_status": 404, "said": "model_not_found", "result": "no such model"}')
    assert (done.returncode, done.stdout) == (1, "") and done.stderr == "error: model_not_found: no such model\n"
    done = asks("hello", CAB_TOKEN="cab-wrong")
    assert done.returncode == 1 and "Invalid or expired token" in done.stderr and "hint: check CAB_TOKEN" in done.stderr
    done = asks(" ")
    assert done.returncode == 1 and "must not be blank" in done.stderr
    done = asks("hello", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1 and "cannot be reached" in done.stderr and "hint: " in done.stderr


def test_without_a_bridge_it_says_so(tmp_path: Path) -> None:
    done = run_cli("ask", "hello", "--data-dir", str(tmp_path / "data"), home=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: No bridge is running with the data folder") and "hint: " in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_named_bridge_is_asked_with_a_given_token(program: Programs, tmp_path: Path) -> None:
    running = program()
    url = "http://127.0.0.1:%d" % running.port
    environ = {"CAB_TOKEN": running.token, "CAB_URL": url + "/"}
    done = run_cli("ask", "hello", "--data-dir", str(tmp_path / "elsewhere"), home=tmp_path, environ=environ)
    assert (done.returncode, done.stdout) == (0, "Echo: hello\n") and not (tmp_path / "elsewhere").exists()


class Terminal:
    """`ask` at a terminal."""

    def __init__(self, words: List[str], environ: Mapping[str, str]) -> None:
        self._side, theirs = pty.openpty()
        self.process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=dict(environ), start_new_session=True)
        os.close(theirs)
        self.text = ""

    def until(self, words: str) -> str:
        """Reads on until these words are there, or to the end."""
        until = time.monotonic() + 20
        while words not in self.text or not words:
            assert time.monotonic() < until, self.text
            if select.select([self._side], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    data = os.read(self._side, 4096)
                    if data:
                        self.text += data.decode()
                        continue
                break
        return self.text

    def close(self) -> Optional[int]:
        self.until("")
        os.close(self._side)
        return self.process.wait(10)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of POSIX")
def test_at_a_terminal_it_streams_and_control_c_cancels(program: Programs, tmp_path: Path, gate: Path) -> None:
    running = program("--spare", "0")
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8", "CAB_DATA_DIR": str(tmp_path / "data")}
    slowly = "script " + json.dumps([{"delta": "he"}, {"wait": str(gate)}, {"delta": "ld"}])
    terminal = Terminal([*IMPORTED, "ask", slowly], environ)
    assert terminal.until("he").endswith("he")               # the first word is there while the rest is not
    gate.touch()
    assert terminal.close() == 0 and terminal.text == "held\r\n"
    again = tmp_path / "again"
    terminal = Terminal([*IMPORTED, "ask", "hold %s" % again], environ)
    terminal.until("he")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.close() == 130 and "Cancelled." in terminal.text and "Traceback" not in terminal.text
    latest = Api(running.port, running.token).get("/api/requests?limit=1").json["requests"][0]
    assert latest["errorCode"] == "cancelled"
    again.touch()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of POSIX")
def test_an_answer_cannot_move_the_cursor(program: Programs, tmp_path: Path) -> None:
    program("--spare", "0")
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8", "CAB_DATA_DIR": str(tmp_path / "data")}
    terminal = Terminal([*IMPORTED, "ask", "say a\x1b[2Jb\tc\nd"], environ)
    assert terminal.close() == 0 and terminal.text == "a?[2Jb\tc\r\nd\r\n"
