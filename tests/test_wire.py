"""What clients written for the Node original see: statuses, words, key order; and the limits on how often they may ask."""
from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest

import claude_api_bridge as cab
from conftest import Answer, Api, FakeClaude, FakeClock, RunningBridge, is_running, missing, wait_until
from test_stream import OVERLOADED, Skipped, once, refused_once, script

Start = Callable[..., RunningBridge]
Fakes = Callable[..., FakeClaude]
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
ISO = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
DAY = 86_400


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The admin's client of one bridge for all tests that queue nothing; it never ran a request."""
    folder = tmp_path_factory.mktemp("served")
    config = cab.Config(port=0, host="127.0.0.1", no_tunnel=True, data_dir=folder / "data", claude=str(FakeClaude(folder / "fake").path),
                        rate_limit=0, spare=0)
    with cab.Bridge(config, cab.find_claude(config, {"PATH": "", "HOME": str(folder)}), cab.Clock(), lambda text: None) as opened:
        opened.serve()
        yield Api(opened.port, opened.new_admin_token)
        assert Api(opened.port).get("/api/status").json["stats"]["totalRequests"] == 0


def processing(api: Api, gate: Path) -> str:
    """The id of a job that runs until the gate opens."""
    job_id = api.ask("hold %s" % gate)
    wait_until(lambda: api.poll(job_id).get("partial"))
    return job_id


def said(answer: Answer) -> Tuple[int, str]:
    """The status and the sentence of a refusal, whose shape is checked here once for all."""
    assert list(answer.json)[:2] == ["error", "code"] and re.fullmatch("[a-z_]+", answer.json["code"])
    return answer.status, answer.json["error"]


# --- who may pass ---

MISSING = "Missing Authorization header. Use: Bearer <token>"
INVALID = "Invalid or expired token"


def test_without_a_valid_token_the_answer_is_401_in_the_original_words(bridge: Start) -> None:
    running = bridge(spare=0)
    nobody, user = running.admin.with_token(None), running.admin.new_token()
    expected = {"": MISSING, "Basic dTpw": MISSING, "Bearer": MISSING, "Bearer   ": MISSING, str(user.token): MISSING,
                "Bearer cab-" + "0" * 64: INVALID, "Bearer " + str(user.token)[:-1]: INVALID, "bearer x y": INVALID}
    told = {sent: nobody.post("/api/ask", {"message": "hi"}, headers={"Authorization": sent} if sent else {}) for sent in expected}
    assert {sent: said(answer) for sent, answer in told.items()} == {sent: (401, text) for sent, text in expected.items()}
    assert said(nobody.post("/api/ask", b"{", headers={"x-api-key": "wrong"})) == (401, INVALID)


def test_a_revoked_and_an_expired_token_are_401(bridge: Start, clock: FakeClock) -> None:
    running = bridge(spare=0, clock=clock)
    revoked, expiring = running.admin.new_token(), running.admin.new_token(expiresInDays=7)
    assert running.admin.delete("/api/tokens/" + running.admin.get("/api/tokens").json["tokens"][1]["id"]).status == 200
    clock.advance(7 * DAY - 1)
    assert [revoked.get("/api/ask/x").status, expiring.get("/api/ask/x").status] == [401, 404]
    clock.advance(1)
    assert [said(api.get("/api/ask/x")) for api in (revoked, expiring)] == [(401, INVALID)] * 2
    assert [token["isExpired"] for token in running.admin.get("/api/tokens").json["tokens"]] == [True, False]


def test_the_token_may_come_in_any_of_these_forms(admin: Api) -> None:
    forms = (("Authorization", "bearer %s"), ("authorization", "BEARER %s"), ("Authorization", "Bearer    %s"), ("X-API-Key", "%s"), ("x-api-key", " %s "))
    told = {form: admin.with_token(None).get("/api/tokens", headers={form[0]: form[1] % admin.token}).status for form in forms}
    assert told == dict.fromkeys(forms, 200)


def test_an_api_key_counts_beside_another_scheme_but_not_beside_a_bearer_token(admin: Api) -> None:
    key = {"x-api-key": str(admin.token)}
    nobody = admin.with_token(None)
    assert nobody.get("/api/tokens", headers={**key, "Authorization": "Basic dTpw"}).status == 200
    assert nobody.get("/api/tokens", headers={**key, "Authorization": "Bearer cab-wrong"}).status == 401


def test_token_routes_are_for_admins_whatever_is_sent(admin: Api) -> None:
    user = admin.new_token()
    answers = (user.get("/api/tokens"), user.post("/api/tokens", b"{"), user.post("/api/tokens", {"name": "x"}), user.delete("/api/tokens/none"))
    assert [said(answer) for answer in answers] == [(403, "Admin token required")] * 4


# --- paths and methods ---

def test_paths_match_in_any_case_with_one_slash_behind_and_any_query(admin: Api) -> None:
    expected = {"/api/status": 200, "/API/Status": 200, "/api/status/": 200, "/api/status?x=%zz&&=": 200, "/api/%73tatus": 200, "/dashboard/": 200,
                "/": 200, "/?x": 200, "//api/status": 404, "/api//status": 404, "/api/status//": 404, "/api": 404, "/api/status/x": 404,
                "/api%2Fstatus": 404, "/api/ask/x/y": 404, "/api/ask//events": 404, "/api/ask/x/events/y": 404, "/api/conversations/": 200,
                "/API/Requests/": 200, "/api/usage/x": 404, "/favicon.ico": 404, "/../api/status": 404}
    answers = {path: admin.get(path) for path in expected}
    assert {path: answer.status for path, answer in answers.items()} == expected
    assert {said(answer) for answer in answers.values() if answer.status == 404} == {(404, "Not found")}


def test_a_wrong_method_is_405_and_allow_says_what_works(admin: Api) -> None:
    expected = {("GET", "/api/ask"): "OPTIONS, POST", ("PUT", "/api/ask/"): "OPTIONS, POST", ("PATCH", "/api/tokens"): "GET, HEAD, OPTIONS, POST",
                ("DELETE", "/api/tokens"): "GET, HEAD, OPTIONS, POST", ("GET", "/api/tokens/x"): "DELETE, OPTIONS",
                ("PUT", "/api/ask/x"): "DELETE, GET, HEAD, OPTIONS", ("DELETE", "/api/ask/x/events"): "GET, HEAD, OPTIONS, POST",
                ("POST", "/api/requests"): "GET, HEAD, OPTIONS", ("DELETE", "/api/conversations"): "GET, HEAD, OPTIONS",
                ("GET", "/api/conversations/x"): "DELETE, OPTIONS", ("POST", "/api/usage"): "GET, HEAD, OPTIONS",
                ("DELETE", "/api/status"): "GET, HEAD, OPTIONS", ("POST", "/"): "GET, HEAD, OPTIONS", ("HEAD", "/api/ask"): "OPTIONS, POST"}
    answers = {sent: admin.call(*sent) for sent in expected}
    assert {sent: (answer.status, answer.headers["allow"]) for sent, answer in answers.items()} == {
        sent: (405, allow) for sent, allow in expected.items()}
    assert answers["GET", "/api/ask"].json == {"error": "GET is not allowed here. Use: OPTIONS, POST", "code": "method_not_allowed"}


def test_a_bad_percent_escape_is_400(admin: Api) -> None:
    assert {said(admin.get(path))[0] for path in ("/api/ask/%zz", "/%", "/api/ask/%4", "/%%41")} == {400}


def test_head_is_get_without_the_body(admin: Api) -> None:
    same = ("content-length", "content-type", "access-control-allow-origin")
    for path in ("/", "/health", "/api/tokens", "/dashboard", "/API/STATUS/", "/none", "/api/ask/none"):
        got, head = admin.get(path), admin.call("HEAD", path)
        assert (head.status, head.data, [head.headers[name] for name in same]) == (got.status, b"", [got.headers[name] for name in same]), path


def test_options_is_204_on_any_path_and_names_our_headers(admin: Api) -> None:
    nobody = admin.with_token(None)
    for path in ("/api/ask", "/api/tokens/x", "/none", "/%zz", "//"):
        answer = nobody.call("OPTIONS", path, headers={"Origin": "https://example.com"})
        assert (answer.status, answer.data, answer.headers["access-control-allow-origin"]) == (204, b"", "*"), path
        assert set(answer.headers["access-control-allow-methods"].split(",")) >= {"GET", "POST", "DELETE"}
        assert set(answer.headers["access-control-allow-headers"].lower().split(",")) >= {
            "content-type", "authorization", "x-api-key", "idempotency-key", "last-event-id"}


def test_the_root_is_json_for_programs_and_the_page_for_browsers(admin: Api) -> None:
    nobody = admin.with_token(None)
    body = nobody.get("/", headers={"Accept": "*/*"}).json
    assert list(body) == ["name", "version", "description", "endpoints", "docs"] and body["name"] == "claude-api-bridge"
    assert set(body["endpoints"]) >= {"POST /api/ask", "GET /api/ask/:requestId", "POST /api/tokens", "GET /api/tokens", "DELETE /api/tokens/:id",
                                      "GET /api/status", "GET /dashboard"}
    page = nobody.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"] == "text/html; charset=utf-8" and page.data.startswith(b"<!doctype html>")


def test_health_is_ok_for_anyone(admin: Api) -> None:
    answer = admin.with_token(None).get("/health")
    assert (answer.status, answer.json) == (200, {"status": "ok"})


# --- asking ---

REQUIRED = "message field is required (string)"
TOO_LONG = "Message exceeds 32768 byte limit"
ASKS: Tuple[Tuple[Any, int, str, str], ...] = (
    (None, 400, REQUIRED, "invalid_request"), (b"", 400, REQUIRED, "invalid_request"),
    *((body, 400, REQUIRED, "invalid_request") for body in (
        {}, [], [1], b"null", b'"hi"', b"5", b"true", {"message": ""}, {"message": None}, {"message": 5}, {"message": ["hi"]}, {"Message": "hi"})),
    ({"message": " \n"}, 400, "message must not be blank", "invalid_request"),
    ({"message": "x" * 32_769}, 400, TOO_LONG, "invalid_request"), ({"message": "é" * 20_000}, 400, TOO_LONG, "invalid_request"),
    *((body, 400, "Body is not valid", "invalid_json") for body in (
        b"{", b"message=hi", b'{"message": "hi"} x', b"{'message': 'hi'}", b'{"message": "\xff"}', b'{"message": "hi", "wait": NaN}', b"[" * 100_000,
        b'{"message": "hi"}'.decode().encode("utf-16"))),
    ({"message": "hi", "pad": "x" * (1 << 20)}, 413, "Body exceeds 1048576 byte limit", "body_too_large"),
    *(({"message": "hi", field: value}, 400, field + " ", "invalid_request") for field, value in (
        ("model", ""), ("model", "-p"), ("model", 5), ("model", "a b"), ("model", "m" * 129), ("systemPrompt", 5), ("systemPrompt", "x" * 32_769),
        ("jsonSchema", "{}"), ("jsonSchema", []), ("effort", "huge"), ("effort", 1), ("conversation", "a b"), ("conversation", "mine"),
        ("wait", 91), ("wait", -1), ("wait", "soon"), ("wait", True), ("wait", []),
        ("stream", "true"), ("stream", 1), ("stream", []))),
)


def test_a_wrong_ask_is_refused_in_the_original_words_and_queues_nothing(admin: Api) -> None:
    user = admin.new_token()
    for body, status, text, code in ASKS:
        answer = user.post("/api/ask", body)
        assert (answer.status, answer.json["code"]) == (status, code) and answer.json["error"].startswith(text), (str(body)[:60], answer.data)
        if isinstance(body, dict) and len(body) > 1 and status == 400:
            assert answer.json["field"] == list(body)[1]
    assert admin.get("/api/status").json["stats"]["totalRequests"] == 0


def test_a_number_beyond_all_bounds_in_a_schema_is_refused(admin: Api) -> None:
    assert admin.post("/api/ask", b'{"message": "hi", "jsonSchema": {"maximum": 1e999}}').status == 400


def test_a_compressed_body_is_415(admin: Api) -> None:
    assert said(admin.post("/api/ask", b"\x1f\x8b", headers={"Content-Encoding": "gzip"}))[0] == 415


TAKEN = (
    (b'\xef\xbb\xbf{"message": "BOM"}', "Echo: BOM"), (b'{"message": "first", "message": "last"}', "Echo: last"),
    (b'{"message": "\\ud83d\\ude00 \\u0000 \\ud800"}', "Echo: \U0001f600 \0 \ufffd"),
    (json.dumps({"message": "say " + "x" * 32_764}).encode(), "x" * 32_764))


def test_what_the_original_took_is_taken(bridge: Start) -> None:
    api = bridge().admin
    ids = [api.post("/api/ask", body).json["requestId"] for body, _ in TAKEN]
    assert [api.done(job_id)["response"] for job_id in ids] == [text for _, text in TAKEN]


def test_an_ask_is_answered_202_in_the_original_shape(bridge: Start) -> None:
    answer = bridge().admin.post("/api/ask", {"message": "hi"})
    body = answer.json
    assert (answer.status, list(body)) == (202, ["ok", "requestId", "position", "poll"])
    assert UUID.fullmatch(body["requestId"])
    assert body == {"ok": True, "requestId": body["requestId"], "position": 1, "poll": "GET /api/ask/" + body["requestId"]}
    assert b'{"ok":true,' in answer.data                                     # compact, as clients that cut strings expect


def test_unknown_fields_are_ignored_but_not_silently(bridge: Start) -> None:
    api = bridge().admin
    warnings = ["unknown field 'systemPromt' ignored"]
    assert api.post("/api/ask", {"message": "hi", "systemPromt": "x"}).json["warnings"] == warnings
    assert api.post("/api/ask", {"message": "hi", "systemPromt": "x", "wait": 30}).json["warnings"] == warnings
    assert api.post("/api/tokens", {"name": "x", "isAdmin": True}).json["warnings"] == ["unknown field 'isAdmin' ignored"]
    assert "warnings" not in api.post("/api/ask", {"message": "hi", "model": "haiku"}).json


def test_the_choices_of_an_ask_reach_claude_on_stdin_only(bridge: Start, fake_claude: Callable[..., FakeClaude]) -> None:
    claude = fake_claude()
    api, schema = bridge(claude).admin, {"type": "object", "required": ["answer"]}
    body = api.answer("tell me", model="haiku", systemPrompt="Be brief: ü.", effort="low", jsonSchema=schema)
    assert body["structured"] == {"answer": "Echo: tell me"} and body["model"] == "resolved-haiku"
    requests = [line["request"] for line in claude.lines() if line["type"] == "control_request"]
    begin = next(request for request in requests if request["subtype"] == "initialize")
    assert (begin["systemPrompt"], begin["jsonSchema"], begin["agents"]["bridge"]["model"]) == ("Be brief: ü.", schema, "haiku")
    assert {"subtype": "apply_flag_settings", "settings": {"effortLevel": "low"}} in requests
    assert claude.prompts() == ["tell me"]
    assert not [word for start in claude.starts() for word in start["argv"] if re.search("tell me|Be brief|haiku|answer|^low$", word)]


# --- polling ---

def test_polls_say_queued_processing_and_completed_in_the_original_shapes(bridge: Start, gate: Path) -> None:
    api = bridge().admin
    running = processing(api, gate)
    queued = api.ask("say done")
    seen = {name: api.get("/api/ask/" + job_id) for name, job_id in (("queued", queued), ("processing", running))}
    gate.touch()
    api.done(queued)
    seen["completed"] = api.get("/api/ask/" + queued)
    first: Dict[str, Tuple[int, Dict[str, Any]]] = {
        "queued": (202, {"status": "queued", "requestId": queued, "queuePosition": 1}),
        "processing": (202, {"status": "processing", "requestId": running, "queuePosition": 0}),
        "completed": (200, {"status": "completed", "requestId": queued, "response": "done"})}
    assert {name: (answer.status, dict(list(answer.json.items())[:3])) for name, answer in seen.items()} == first
    assert [list(answer.json)[:3] for answer in seen.values()] == [list(body) for _, body in first.values()]
    assert seen["processing"].json["partial"] == "he" and not {"partial", "startedAt"} & set(seen["queued"].json)
    done = seen["completed"].json
    assert list(done)[3] == "completedAt" and all(ISO.fullmatch(done[name]) for name in ("completedAt", "createdAt", "startedAt"))
    assert (done["attempts"], done["model"]) == (1, "resolved-default-model") and 0 <= done["durationMs"] < 60_000
    assert set(done["usage"]) == {"inputTokens", "outputTokens", "cacheReadTokens", "cacheCreationTokens", "costUsd"}
    assert api.done(running)["response"] == "held"


def test_a_failed_request_is_200_with_error_and_its_code(bridge: Start) -> None:
    api = bridge(spare=0).admin
    job_id = api.ask("die 3 the words of claude")
    api.done(job_id)
    answer = api.get("/api/ask/" + job_id)
    assert (answer.status, list(answer.json)[:3], answer.json["status"]) == (200, ["status", "requestId", "error"], "error")
    assert "the words of claude" in answer.json["error"] and answer.json["errorCode"] == "cli_error" and "response" not in answer.json


def test_positions_are_exact_even_within_one_moment(bridge: Start, clock: FakeClock, gate: Path, tmp_path: Path) -> None:
    running = bridge(spare=0, clock=clock)
    others = running.admin.new_token()
    jobs = [processing(running.admin, gate)]
    for position, message in ((2, "hold %s" % (tmp_path / "next")), (3, "hi"), (4, "hi"), (5, "hi")):
        answer = (others if position % 2 else running.admin).post("/api/ask", {"message": message}).json
        assert answer["position"] == position
        jobs.append(answer["requestId"])
    assert [running.admin.poll(job_id)["queuePosition"] for job_id in jobs] == [0, 1, 2, 3, 4]
    gate.touch()
    wait_until(lambda: running.admin.poll(jobs[1])["status"] == "processing")
    try:
        assert [running.admin.poll(job_id).get("queuePosition") for job_id in jobs] == [None, 0, 1, 2, 3]
    finally:
        (tmp_path / "next").touch()


def test_a_request_is_found_by_its_owner_and_by_admins_only(bridge: Start) -> None:
    admin = bridge().admin
    mine, other = admin.new_token("mine"), admin.new_token("other")
    job_id = mine.ask("hi")
    mine.done(job_id)
    assert [api.get("/api/ask/" + job_id).status for api in (mine, admin)] == [200, 200]
    unknown = other.get("/api/ask/00000000-0000-4000-8000-000000000000")
    assert said(unknown) == (404, "Request not found")
    for answer in (other.get("/api/ask/" + job_id), mine.get("/api/ask/" + job_id.upper()), other.get("/api/ask/%s?wait=60" % job_id)):
        assert (answer.status, answer.data) == (404, unknown.data)          # nothing tells that it exists


def test_a_wait_ends_as_soon_as_the_answer_is_there(bridge: Start, gate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = bridge().admin
    job_id, poll, began = processing(api, gate), cab.Service.poll, time.monotonic()
    monkeypatch.setattr(cab.Service, "poll", lambda *args: gate.touch() or poll(*args))         # type: ignore[func-returns-value]
    answer = api.get("/api/ask/%s?wait=90" % job_id)
    assert (answer.status, answer.json["response"]) == (200, "held") and time.monotonic() - began < 30


def test_a_wait_ends_with_202_after_its_bound(bridge: Start, gate: Path) -> None:
    api = bridge().admin
    job_id, began = processing(api, gate), time.monotonic()
    answer = api.get("/api/ask/%s?wait=0.2" % job_id)
    assert (answer.status, answer.json["partial"]) == (202, "he") and 0.2 <= time.monotonic() - began < 30
    began, answer = time.monotonic(), api.post("/api/ask", {"message": "hi", "wait": 0.2})
    assert (answer.status, list(answer.json)) == (202, ["ok", "requestId", "position", "poll"]) and 0.2 <= time.monotonic() - began < 30


def test_a_wait_that_is_no_number_of_seconds_is_400(admin: Api) -> None:
    for wait in ("91", "90.5", "-1", "nan", "inf", "-inf", "abc", "", "1e9", "0x10", "5s"):
        answer = admin.get("/api/ask/none?wait=" + wait)
        assert said(answer) == (400, "wait must be a number of seconds from 0 to 90") and answer.json["field"] == "wait", wait


def test_an_ask_that_waits_is_answered_with_the_finished_poll_body(bridge: Start) -> None:
    api = bridge().admin
    for message, response in (("say at once", "at once"), ("die 3 so", None)):
        answer = api.post("/api/ask", {"message": message, "wait": 60})
        assert (answer.status, answer.json.get("response")) == (200, response)
        assert answer.json == api.poll(answer.json["requestId"])


# --- cancelling ---

def test_a_request_that_waits_is_gone_at_once_and_the_next_move_up(bridge: Start, fake_claude: Fakes, gate: Path) -> None:
    claude = fake_claude()
    api = bridge(claude, spare=0).admin
    held = processing(api, gate)
    gone, second, third = (api.ask("say %s" % name) for name in ("gone", "second", "third"))
    answer = api.delete("/api/ask/" + gone)
    assert (answer.status, list(answer.json)[:5]) == (200, ["ok", "status", "requestId", "error", "errorCode"])
    assert answer.json == {"ok": True, **api.poll(gone)} and "startedAt" not in answer.json
    assert (answer.json["status"], answer.json["errorCode"], answer.json["requestId"]) == ("error", "cancelled", gone)
    assert [api.poll(job_id)["queuePosition"] for job_id in (second, third)] == [1, 2]
    assert api.post("/api/ask", {"message": "say fourth"}).json["position"] == 4
    gate.touch()
    assert [api.done(job_id)["response"] for job_id in (held, second, third)] == ["held", "second", "third"]
    assert claude.prompts()[:3] == ["hold %s" % gate, "say second", "say third"]


def test_a_running_request_is_cancelled_at_once_and_its_process_goes(bridge: Start, fake_claude: Fakes,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "SHUTDOWN_GRACE_SECONDS", 100.0)
    clock, claude = Skipped(), fake_claude()
    api = bridge(claude, spare=0, clock=clock).admin
    running, after = api.ask("hang"), api.ask("say next")
    wait_until(lambda: api.poll(running).get("partial"))
    child = claude.children()[-1]["pid"]
    assert api.delete("/api/ask/" + running).json["errorCode"] == "cancelled"
    assert (api.poll(running)["status"], api.poll(running)["errorCode"]) == ("error", "cancelled")
    assert api.done(after)["response"] == "next"
    assert is_running(child)                                               # nobody waited for it
    clock.ahead = 101
    wait_until(lambda: not is_running(child))                              # it does not answer, and is ended
    stats = api.get("/api/status").json["stats"]
    assert (stats["completedRequests"], stats["errorRequests"]) == (1, 1)


def test_a_cancelled_run_is_interrupted(bridge: Start, fake_claude: Fakes, gate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "SHUTDOWN_GRACE_SECONDS", 20.0)                        # the fake reads what it was told when the gate is open
    claude = fake_claude()
    api = bridge(claude, spare=0).admin
    running = api.ask("tool %s" % gate)
    wait_until(claude.prompts)
    api.delete("/api/ask/" + running)
    wait_until(lambda: api.get("/api/status").json["worker"]["requestId"] is None)
    gate.touch()
    wait_until(lambda: not is_running(claude.children()[-1]["pid"]))
    assert [line["request"]["subtype"] for line in claude.lines() if line["type"] == "control_request"][-1] == "interrupt"
    body = api.poll(running)
    assert (body["status"], body["errorCode"], "response" in body) == ("error", "cancelled", False)      # its late answer is not wanted


def epoch(moment: str) -> float:
    return datetime.fromisoformat(moment[:-1] + "+00:00").timestamp()


def test_what_is_finished_unknown_or_anothers_cannot_be_cancelled(bridge: Start, gate: Path) -> None:
    admin = bridge(spare=0).admin
    mine, other = admin.new_token("mine"), admin.new_token("other")
    done, failed, running = mine.ask("hi"), mine.ask("die 3"), mine.ask("hold %s" % gate)
    mine.done(failed)
    before = [mine.poll(job_id) for job_id in (done, failed)]
    for job_id in (done, failed):
        answer = mine.delete("/api/ask/" + job_id)
        assert (answer.status, answer.json) == (409, {"error": "The request is already finished", "code": "already_finished"})
    assert [mine.poll(job_id) for job_id in (done, failed)] == before
    unknown = mine.delete("/api/ask/none")
    assert said(unknown) == (404, "Request not found")
    for job_id in (done, running):
        assert (other.delete("/api/ask/" + job_id).status, other.delete("/api/ask/" + job_id).data) == (404, unknown.data)
    assert admin.with_token(None).delete("/api/ask/" + running).status == 401
    assert mine.poll(running)["status"] == "processing" and admin.delete("/api/ask/" + running).status == 200
    assert said(mine.delete("/api/ask/" + running))[0] == 409


def test_a_cancelled_turn_is_no_part_of_its_conversation(bridge: Start, gate: Path) -> None:
    talk = bridge(spare=0).admin.new_token(sessionMode="stateful")
    talk.answer("I am Ann")
    cancelled = processing(talk, gate)
    talk.delete("/api/ask/" + cancelled)
    assert json.loads(talk.answer("turns")["response"]) == [["user", "I am Ann"], ["assistant", "Echo: I am Ann"]]


# --- the same request again ---

def with_key(api: Api, body: Any, key: str) -> Answer:
    return api.post("/api/ask", body, headers={"Idempotency-Key": key})


def test_the_same_key_and_body_give_the_first_request_again(bridge: Start, fake_claude: Callable[..., FakeClaude], gate: Path) -> None:
    claude = fake_claude()
    api = bridge(claude).admin
    processing(api, gate)
    key = "x" * 200
    first, again = with_key(api, {"message": "say it"}, key), with_key(api, {"message": "say it", "model": None}, key)
    assert first.status == again.status == 202 and first.json == again.json and first.json["position"] == 2
    assert ("idempotent-replayed" in first.headers, again.headers["idempotent-replayed"]) == (False, "true")
    assert "Idempotent-Replayed" in again.headers["access-control-expose-headers"]
    gate.touch()
    body = api.done(first.json["requestId"])
    waited = with_key(api, {"message": "say it", "wait": 60}, key)
    assert (waited.status, waited.json, waited.headers["idempotent-replayed"]) == (200, body, "true")
    assert with_key(api, {"message": "say it"}, key).json == {**first.json, "position": 0}
    stream = api.stream("POST", "/api/ask", {"message": "say it", "stream": True}, {"Idempotency-Key": key})
    assert [event.kind for event in stream.rest()] == ["queued", "started", "delta", "completed"]
    assert stream.headers["idempotent-replayed"] == "true" and stream.events[-1].data == body
    assert stream.events[0].data == {"requestId": first.json["requestId"], "position": 0}
    assert claude.prompts() == ["hold %s" % gate, "say it"]


def test_a_key_belongs_to_one_body_and_one_token(bridge: Start) -> None:
    admin = bridge(spare=0).admin
    user = admin.new_token()
    first = with_key(user, {"message": "say it"}, "key").json["requestId"]
    for body in ({"message": "say that"}, {"message": "say it", "model": "haiku"}, {"message": "say it", "systemPrompt": "x"}):
        refused = with_key(user, body, "key")
        assert (refused.status, refused.json["code"], "idempotent-replayed" in refused.headers) == (409, "idempotency_conflict", False)
    assert with_key(admin, {"message": "say that"}, "key").status == 202
    assert with_key(user, {"message": "say it"}, "KEY").json["requestId"] != first
    assert admin.get("/api/status").json["stats"]["totalRequests"] == 3


def test_a_key_of_no_or_too_many_characters_is_400(admin: Api) -> None:
    for key in ("", "x" * 201):
        answer = with_key(admin, {"message": "hi"}, key)
        assert said(answer) == (400, "Idempotency-Key must have 1 to 200 characters") and answer.json["field"] == "Idempotency-Key"


def test_a_hundred_posts_with_ten_keys_are_ten_runs_also_after_a_restart(bridge: Start, fake_claude: Callable[..., FakeClaude]) -> None:
    claude = fake_claude()
    running = bridge(claude, spare=0)
    api = running.admin.new_token()

    def send(number: int) -> Tuple[str, Optional[str]]:
        answer = with_key(api, {"message": "say %d" % (number % 10)}, "key %d" % (number % 10))
        return answer.json["requestId"], answer.headers.get("idempotent-replayed")

    with ThreadPoolExecutor(20) as callers:
        sent = list(callers.map(send, range(100)))
    assert [len({job_id for job_id, _ in sent[number::10]}) for number in range(10)] == [1] * 10
    assert [replayed for _, replayed in sent].count(None) == 10
    bodies = [api.done(job_id) for job_id, _ in sent[:10]]
    running.bridge.__exit__(None, None, None)
    api = Api(bridge(claude, spare=0).port, api.token)
    assert {send(number) for number in range(10)} == {(job_id, "true") for job_id, _ in sent}
    assert [api.poll(job_id) for job_id, _ in sent[:10]] == bodies
    assert sorted(claude.prompts()) == ["say %d" % number for number in range(10)]


# --- lists ---

def test_a_list_shows_one_s_own_requests_newest_first(bridge: Start, gate: Path) -> None:
    admin = bridge(spare=0).admin
    user = admin.new_token("user")
    done, failed, own = user.ask("say done"), user.ask("die 3"), admin.ask("say admin's")
    admin.done(own)
    running, queued = processing(user, gate), user.ask("say later")
    ids = {token["name"]: token["id"] for token in admin.get("/api/tokens").json["tokens"]}
    answer = user.get("/api/requests")
    assert (answer.status, list(answer.json), answer.json["next"]) == (200, ["requests", "next"], None)
    assert [each["requestId"] for each in answer.json["requests"]] == [queued, running, failed, done]
    polls = {job_id: admin.poll(job_id) for job_id in (queued, running, failed, done, own)}
    assert polls[running].pop("partial") == "he"                                # a list of long texts would be long
    messages = {queued: "say later", running: "hold %s" % gate, failed: "die 3", done: "say done", own: "say admin's"}
    assert answer.json["requests"] == [{**polls[job_id], "message": messages[job_id], "tokenId": ids["user"]}
                                       for job_id in (queued, running, failed, done)]
    assert [(each["requestId"], each["tokenId"]) for each in admin.get("/api/requests").json["requests"]] == [
        (job_id, ids["admin" if job_id == own else "user"]) for job_id in (queued, running, own, failed, done)]
    for status, wanted in (("queued", [queued]), ("processing", [running]), ("completed", [done]), ("error", [failed]),
                           ("completed,error", [failed, done]), ("queued,processing,completed,error", [queued, running, failed, done]),
                           ("", [queued, running, failed, done])):
        assert [each["requestId"] for each in user.get("/api/requests?status=" + status).json["requests"]] == wanted, status


def test_a_cursor_leads_through_the_whole_list_also_while_it_grows(bridge: Start, gate: Path) -> None:
    admin = bridge(spare=0).admin
    user = admin.new_token()
    processing(admin, gate)
    ids = [user.ask("hi") for _ in range(23)]
    first = user.get("/api/requests").json
    assert [each["requestId"] for each in first["requests"]] == ids[:2:-1] and isinstance(first["next"], str)
    user.ask("hi"), admin.ask("hi")
    found, following = [], first["next"]
    while following:
        page = user.get("/api/requests?limit=2&before=%s" % following).json
        assert 0 < len(page["requests"]) <= 2
        found += [each["requestId"] for each in page["requests"]]
        following = page["next"]
    assert found == ids[2::-1]
    assert user.get("/api/requests?limit=3&before=1").json == {"requests": [], "next": None}
    assert len(user.get("/api/requests?limit=100").json["requests"]) == 24
    assert user.get("/api/requests?limit=24").json["next"] is None


def test_a_page_of_long_answers_ends_early_and_the_next_goes_on(bridge: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "PAGE_CHARACTERS", 4_000)
    api = bridge(spare=0).admin
    ids = [api.ask("big 4") for _ in range(5)]
    api.done(ids[-1])
    pages, path = [], "/api/requests"
    while path:
        page = api.get(path).json
        pages.append([each["requestId"] for each in page["requests"]])
        path = page["next"] and "/api/requests?before=" + page["next"]
    assert pages == [ids[:2:-1], ids[2:0:-1], ids[:1]]


@pytest.mark.parametrize("query, field", [
    *(("limit=" + value, "limit") for value in ("0", "101", "-1", "x", "", "1.5", "1e1", "%D9%A3")),
    *(("before=" + value, "before") for value in ("0", "-1", "x", "", "1.5", "1000000000")),
    *(("status=" + value, "status") for value in ("done", "EnqueueResult", "queued,", ",", "queued;error", "queued%20"))])
def test_a_list_that_cannot_be_is_400_and_names_the_field(admin: Api, query: str, field: str) -> None:
    answer = admin.get("/api/requests?" + query)
    assert (answer.status, answer.json["code"], answer.json["field"]) == (400, "invalid_request", field)
    assert answer.json["error"].startswith(field + " must be ")


# --- conversations ---

def test_conversations_are_listed_and_a_deleted_one_begins_afresh(bridge: Start, fake_claude: Callable[..., FakeClaude]) -> None:
    claude = fake_claude()
    admin = bridge(claude, spare=0).admin
    talk, other = admin.new_token(sessionMode="stateful"), admin.new_token(sessionMode="stateful")
    assert talk.get("/api/conversations").json == {"conversations": []} == admin.get("/api/conversations").json
    talk.answer("I am Ann", conversation="ann")
    talk.answer("I am Bob")
    talk.answer("die 3", conversation="ann")
    listed = talk.get("/api/conversations").json["conversations"]
    assert [(each["name"], each["turns"], sorted(each)) for each in listed] == [
        (name, 1, ["createdAt", "lastUsedAt", "name", "turns"]) for name in ("ann", "default")]
    assert all(ISO.fullmatch(each["createdAt"]) and each["createdAt"] <= each["lastUsedAt"] for each in listed)
    other.answer("I am Cid", conversation="ann")
    warm = claude.children()[1]["pid"]
    assert is_running(warm)                                                # of the conversation `default`, with all that was said
    for name in ("ann", "default"):
        answer = talk.delete("/api/conversations/" + name)
        assert (answer.status, answer.json) == (200, {"ok": True, "message": "Conversation deleted"})
        assert said(talk.delete("/api/conversations/" + name)) == (404, "Conversation not found")
        assert json.loads(talk.answer("turns", conversation=name)["response"]) == []
    wait_until(lambda: not is_running(warm))
    assert json.loads(other.answer("turns", conversation="ann")["response"])[0] == ["user", "I am Cid"]
    assert len(talk.get("/api/requests").json["requests"]) == 5                 # what was asked is not lost with it


def test_a_conversation_deleted_while_it_runs_begins_afresh(bridge: Start, gate: Path) -> None:
    talk = bridge(spare=0).admin.new_token(sessionMode="stateful")
    talk.answer("I am Ann")
    running, waiting = processing(talk, gate), talk.ask("turns")
    assert talk.delete("/api/conversations/default").status == 200
    assert [(each["name"], each["turns"]) for each in talk.get("/api/conversations").json["conversations"]] == [("default", 0)]
    gate.touch()
    assert talk.done(running)["response"] == "held" and json.loads(talk.done(waiting)["response"]) == []


def test_only_one_s_own_conversations_can_be_deleted(bridge: Start) -> None:
    admin = bridge(spare=0).admin
    talk = admin.new_token(sessionMode="stateful")
    talk.answer("I am Ann")
    other = admin.new_token(sessionMode="stateful")
    for api, name in ((admin, "default"), (other, "default"), (talk, "other"), (talk, "Default"), (talk, "%00"), (talk, "%ED%A0%80")):
        assert said(api.delete("/api/conversations/" + name)) == (404, "Conversation not found")
    assert json.loads(talk.answer("turns")["response"])[0] == ["user", "I am Ann"]


# --- usage ---

ONE = {"inputTokens": 10, "outputTokens": 7, "cacheReadTokens": 5, "cacheCreationTokens": 3}


def used(requests: int, completed: int, errors: int) -> Dict[str, Any]:
    """The figures of so many answers of the fake, but for the cost."""
    return {"requests": requests, "completed": completed, "errors": errors, **{name: completed * count for name, count in ONE.items()}}


def without_cost(sums: Dict[str, Any]) -> Dict[str, Any]:
    return {name: value for name, value in sums.items() if name not in ("costUsd", "day", "tokenId", "name")}


def test_usage_is_told_per_day_and_token(bridge: Start, clock: FakeClock) -> None:
    admin = bridge(spare=0, clock=clock).admin
    user, gone = admin.new_token("user"), admin.new_token("gone")
    user.answer("one"), user.answer("die 3"), gone.answer("two")
    clock.advance(DAY)
    user.answer("three"), admin.answer("four")
    ids = {token["name"]: token["id"] for token in admin.get("/api/tokens").json["tokens"]}
    admin.delete("/api/tokens/" + ids["gone"])
    body = admin.get("/api/usage").json
    assert list(body) == ["since", "total", "days", "tokens", "plan"] and body["since"] == "2026-12-18"
    assert without_cost(body["total"]) == used(5, 4, 1) and body["total"]["costUsd"] == 0.008
    assert [(each["day"], without_cost(each)) for each in body["days"]] == [("2027-01-15", used(3, 2, 1)), ("2027-01-16", used(2, 2, 0))]
    assert {each["tokenId"]: (each["name"], without_cost(each)) for each in body["tokens"]} == {
        ids["user"]: ("user", used(3, 2, 1)), ids["admin"]: ("admin", used(1, 1, 0)), ids["gone"]: (None, used(1, 1, 0))}
    own = user.get("/api/usage").json
    assert without_cost(own["total"]) == used(3, 2, 1) and [each["name"] for each in own["tokens"]] == ["user"] and len(own["days"]) == 2
    today = admin.get("/api/usage?days=1").json
    assert (today["since"], without_cost(today["total"])) == ("2027-01-16", used(2, 2, 0))
    assert admin.new_token().get("/api/usage").json["total"] == {**used(0, 0, 0), "costUsd": 0}


def test_days_that_are_none_are_400(admin: Api) -> None:
    for days in ("0", "401", "-1", "x", "", "1.5"):
        answer = admin.get("/api/usage?days=" + days)
        assert said(answer) == (400, "days must be a whole number from 1 to 400") and answer.json["field"] == "days"


def test_usage_and_the_admins_status_show_the_windows_of_the_plan(bridge: Start, clock: FakeClock) -> None:
    admin = bridge(spare=0, clock=clock).admin
    nothing = {"windows": [], "isUsingOverage": False, "waitingFor": None, "resumesAt": None}
    assert admin.get("/api/usage").json["plan"] == nothing == admin.get("/api/status").json["plan"]
    soon, later = clock.now() + 600, clock.now() + 6 * DAY
    told = {"five_hour": {"utilization": 0.5, "resetsAt": soon, "status": "allowed"},
            "seven_day": {"utilization": 0.25, "resetsAt": later, "status": "allowed_warning"}}
    admin.answer(script({"limits": {"rateLimitType": "five_hour", **told["five_hour"], "unifiedWindows": told}}, {"result": "hi"}))
    windows = [{**window, "type": kind, "resetsAt": cab.iso_time(float(str(window["resetsAt"]))), "seenAt": cab.iso_time(clock.now())}
               for kind, window in told.items()]
    user = admin.new_token()
    assert admin.get("/api/status").json["plan"] == user.get("/api/usage").json["plan"] == {**nothing, "windows": windows}
    clock.advance(601)
    windows[0].update(status=None, utilization=None)                       # it was reset: nothing is known of the new one
    assert user.get("/api/usage").json["plan"] == {**nothing, "windows": windows}
    assert "plan" not in user.get("/api/status").json


# --- limits of a token ---

def test_a_token_may_ask_so_often_a_minute(bridge: Start, clock: FakeClock) -> None:
    admin = bridge(spare=0, clock=clock).admin
    user = admin.new_token(requestsPerMinute=2)
    first = user.ask("hi")
    clock.advance(20)
    user.ask("hi")
    clock.advance(10.5)
    refused = user.post("/api/ask", {"message": "hi"})
    assert (refused.status, refused.headers["retry-after"]) == (429, "30") and refused.json == {
        "error": "This token may send 2 requests a minute.", "code": "rate_limited", "retryAfter": 30}
    assert user.done(first)["status"] == "completed" and user.get("/api/requests").status == 200      # asks alone are counted
    assert admin.post("/api/ask", {"message": "hi"}).status == 202
    clock.advance(29)
    assert user.post("/api/ask", {"message": "hi"}).headers["retry-after"] == "1"
    clock.advance(0.5)
    assert statuses(2, lambda: user.post("/api/ask", {"message": "hi"})) == [202, 429]
    clock.advance(3600)
    assert statuses(3, lambda: user.post("/api/ask", {"message": "hi"})) == [202, 202, 429]


def test_a_token_may_ask_so_often_a_day(bridge: Start, clock: FakeClock) -> None:
    running = bridge(spare=0, clock=clock)
    user = running.admin.new_token(requestsPerDay=2)
    user.delete("/api/ask/" + user.ask("hi"))                              # a cancelled one counts, too
    assert with_key(user, {"message": "hi"}, "key").status == 202
    refused = user.post("/api/ask", {"message": "hi", "stream": True})
    assert (refused.status, refused.headers["retry-after"]) == (429, "57600") and refused.json == {
        "error": "This token may send 2 requests a day. It works again at 2027-01-16T00:00:00.000Z.", "code": "daily_limit",
        "resetsAt": "2027-01-16T00:00:00.000Z", "retryAfter": 57_600}
    assert with_key(user, {"message": "hi"}, "key").status == 202          # the same again is none more
    assert running.admin.post("/api/ask", {"message": "hi"}).status == 202
    clock.advance(57_599)
    assert user.post("/api/ask", {"message": "hi"}).status == 429
    clock.advance(1)
    assert statuses(3, lambda: user.post("/api/ask", {"message": "hi"})) == [202, 202, 429]
    assert user.get("/api/usage").json["total"]["requests"] == 4


def test_a_token_may_use_some_models_only(bridge: Start) -> None:
    admin = bridge(spare=0).admin
    user = admin.new_token(models=["haiku", "claude-opus-4"])
    assert [user.answer("hi", model=model)["model"] for model in (None, "default", "haiku", "claude-opus-4")] == [
        "resolved-haiku", "resolved-haiku", "resolved-haiku", "resolved-claude-opus-4"]
    for model in ("sonnet", "Haiku", "opus"):
        refused = user.post("/api/ask", {"message": "hi", "model": model})
        assert said(refused) == (403, "This token may not use the model %s. Use: haiku, claude-opus-4" % model)
        assert (refused.json["code"], refused.json["field"]) == ("model_not_allowed", "model")
    assert user.post("/api/ask", {"message": "hi", "model": "a b"}).status == 400
    assert admin.answer("hi", model="sonnet")["model"] == "resolved-sonnet"


# --- while the plan or the service rests ---

def resting(api: Api, job_id: str) -> Dict[str, Any]:
    """The poll body, once it says what the request waits for."""
    wait_until(lambda: "waitingFor" in api.poll(job_id))
    return api.poll(job_id)


def test_a_request_that_the_plan_refuses_waits_until_it_gives_again_and_those_behind_follow(
        bridge: Start, tmp_path: Path, fake_claude: Callable[..., FakeClaude]) -> None:
    clock, claude = Skipped(), fake_claude()
    running = bridge(claude, spare=0, clock=clock)
    api, resets_at = running.admin, int(clock.now()) + 500
    prompt = script(refused_once(resets_at, tmp_path / "mark"), {"delta": "at last"})
    first, others = api.ask(prompt), [api.ask("say %d" % number) for number in range(3)]
    body = resting(api, first)
    told = {"waitingFor": "usage_limit", "resumesAt": cab.iso_time(resets_at)}
    assert body == {"status": "queued", "requestId": first, "queuePosition": 1, "createdAt": body["createdAt"], "attempts": 0, **told}
    assert [api.poll(job_id)["queuePosition"] for job_id in others] == [2, 3, 4]
    assert {name: api.poll(others[0])[name] for name in told} == told
    assert [each["resumesAt"] for each in api.get("/api/requests").json["requests"]] == [told["resumesAt"]] * 4
    plan = api.get("/api/usage").json["plan"]
    assert {name: plan[name] for name in told} == told == {name: api.get("/api/status").json["plan"][name] for name in told}
    assert [(window["type"], window["status"], window["utilization"]) for window in plan["windows"]] == [("five_hour", "rejected", 1)]
    assert claude.prompts() == [prompt]
    clock.ahead = 501
    assert [api.done(job_id)["response"] for job_id in (first, *others)] == ["at last", "0", "1", "2"]
    assert claude.prompts() == [prompt, prompt, "say 0", "say 1", "say 2"]
    done = api.poll(first)
    assert done["attempts"] == 1 and not set(told) & set(done)
    assert api.get("/api/usage").json["plan"]["waitingFor"] is None


def test_a_queue_that_is_full_while_the_plan_rests_says_when_it_goes_on(bridge: Start, tmp_path: Path) -> None:
    clock = Skipped()
    api = bridge(spare=0, clock=clock).admin
    resets_at = int(clock.now()) + 500
    first = api.ask(script(refused_once(resets_at, tmp_path / "mark")))
    resting(api, first)
    for _ in range(49):
        api.ask("hi")
    full = api.post("/api/ask", {"message": "hi"})
    assert said(full) == (429, "Queue is full: the plan's limit is used up until %s." % cab.iso_time(resets_at))
    assert full.json["code"] == "queue_full" and int(full.headers["retry-after"]) == full.json["retryAfter"]
    assert 490 < full.json["retryAfter"] <= 500
    api.delete("/api/ask/" + first)                                        # who waits may be cancelled, and makes room
    assert api.post("/api/ask", {"message": "hi"}).json["position"] == 50


def test_a_request_waits_while_the_service_is_overloaded_and_is_tried_again(bridge: Start, fake_claude: Callable[..., FakeClaude],
                                                                           tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "BACK_OFF_SECONDS", (100,))
    clock, claude = Skipped(), fake_claude()
    api = bridge(claude, spare=0, clock=clock).admin
    job_id = api.ask(script(once(tmp_path / "mark", {"delta": "half"}, OVERLOADED), {"delta": "whole"}))
    body = resting(api, job_id)
    assert (body["status"], body["waitingFor"], body["partial"]) == ("processing", "overloaded", "")
    assert 0 < epoch(body["resumesAt"]) - clock.now() <= 100
    clock.ahead = 101
    done = api.done(job_id)
    assert (done["response"], done["attempts"], "waitingFor" in done, len(claude.prompts())) == ("whole", 1, False, 2)


def test_an_overload_that_lasts_ends_the_request_with_its_run(bridge: Start, monkeypatch: pytest.MonkeyPatch,
                                                             fake_claude: Callable[..., FakeClaude]) -> None:
    monkeypatch.setattr(cab, "BACK_OFF_SECONDS", (0.05, 300))
    claude = fake_claude()
    body = bridge(claude, spare=0, run_seconds=300).admin.answer(script(OVERLOADED))
    assert (body["status"], body["errorCode"], body["error"]) == ("error", "overloaded", "API Error: 529 Overloaded")
    assert len(claude.prompts()) == 2                                      # a third try would come too late


# --- tokens ---

NAME_REQUIRED = "Token name is required"
MODES = 'sessionMode must be "stateful" or "stateless"'
EXPIRY = "expiresInDays must be 1, 7, 30, 90, or null (never)"
NO_NAMES: Tuple[Any, ...] = (None, {}, [], b"null", b'"x"', {"name": ""}, {"name": "  "}, {"name": 5}, {"name": None}, {"name": ["x"]})
NO_FLAGS: Tuple[Any, ...] = ("true", 1, 0, [])
NO_NUMBERS: Tuple[Any, ...] = (0, -1, 1.5, 1e300, "", "many", True, [1], {})
NO_MODELS: Tuple[Any, ...] = ("haiku", [], {}, True, [""], [None], [1], ["a b"], ["-p"], ["m" * 129], ["haiku"] * 21)
NO_TOOLS: Tuple[Any, ...] = ("", "every", [], [""], ["Bash(a\nb)"], ["--flag"], [1], {}, True, ["R"] * 51)
WRONG_TOKENS: Tuple[Tuple[Any, str, Optional[str]], ...] = (
    *((body, NAME_REQUIRED, "name") for body in NO_NAMES),
    ({"name": "x" * 101}, "Token name must be 100 characters or less", "name"),
    *(({"name": "x", "sessionMode": mode}, MODES, "sessionMode") for mode in ("Stateful", "both", 1, True, ["stateful"])),
    *(({"name": "x", "expiresInDays": days}, EXPIRY, "expiresInDays") for days in (0, 2, "7", -1, True, 7.5, [7], "")),
    *(({"name": "x", "admin": admin}, "admin must be true or false", "admin") for admin in NO_FLAGS),
    *(({"name": "x", "tools": tools}, "tools must be", "tools") for tools in NO_TOOLS),
    *(({"name": "x", field: number}, "%s must be a whole number from 1 to %d" % (field, most), field)
      for field, most in (("requestsPerMinute", 10_000), ("requestsPerDay", 1_000_000))
      for number in (*NO_NUMBERS, most + 1)),
    *(({"name": "x", "models": models}, "model", "models") for models in NO_MODELS),
    (b"{", "Body is not valid JSON", None),
)


def test_a_wrong_token_is_refused_in_the_original_words_and_none_is_made(admin: Api) -> None:
    before = admin.get("/api/tokens").json
    for body, text, field in WRONG_TOKENS:
        answer = admin.post("/api/tokens", body)
        assert answer.status == 400 and answer.json["error"].startswith(text) and answer.json.get("field") == field, (body, answer.data)
    assert admin.get("/api/tokens").json == before


def test_a_tool_rule_with_half_a_character_is_no_fault_of_ours(admin: Api) -> None:
    assert admin.post("/api/tokens", b'{"name": "x", "tools": ["Read(\\ud800)"]}').status in (201, 400)


def test_a_token_is_made_in_the_original_shape(admin: Api) -> None:
    answer = admin.post("/api/tokens", {"name": "bot"})
    body = answer.json
    assert (answer.status, list(body)) == (201, ["ok", "tokenId", "token", "prefix", "warning"])
    assert re.fullmatch("cab-[0-9a-f]{64}", body["token"]) and UUID.fullmatch(body["tokenId"])
    assert (body["ok"], body["prefix"], body["warning"]) == (True, body["token"][:12], "Save this token now. It cannot be retrieved again.")


def test_the_choices_for_a_token_are_the_original_ones(bridge: Start, clock: FakeClock) -> None:
    admin = bridge(spare=0, clock=clock).admin
    for fields, mode, days in (({"sessionMode": "", "expiresInDays": None}, "stateless", None), ({"sessionMode": None}, "stateless", None),
                               ({"sessionMode": "stateful", "expiresInDays": 1}, "stateful", 1), ({"expiresInDays": 7}, "stateless", 7),
                               ({"expiresInDays": 30}, "stateless", 30), ({"expiresInDays": 90}, "stateless", 90)):
        admin.new_token("  blanks around " + "x" * 80, **fields)
        token = admin.get("/api/tokens").json["tokens"][0]
        assert (token["name"], token["sessionMode"]) == ("blanks around " + "x" * 80, mode)
        assert token["expiresAt"] == (cab.iso_time(clock.now() + days * DAY) if days else None)


def test_a_whole_number_may_be_written_with_a_point(admin: Api) -> None:
    assert admin.post("/api/tokens", b'{"name": "x", "expiresInDays": 7.0}').status == 201      # one kind of number in JSON


def test_the_list_of_tokens_has_the_original_shape_newest_first(bridge: Start, clock: FakeClock) -> None:
    admin = bridge(spare=0, clock=clock).admin
    unused = admin.new_token("unused", expiresInDays=7)
    admin.new_token("used", sessionMode="stateful", tools="read").get("/api/ask/x")
    assert admin.get("/health").status == 200               # which writes, too, and is told after the uses before it were noted
    answer = admin.get("/api/tokens")
    tokens = answer.json["tokens"]
    keys = ["id", "name", "prefix", "sessionMode", "expiresAt", "createdAt", "lastUsedAt", "isAdmin", "isExpired"]
    assert {tuple(list(token)[:9]) for token in tokens} == {tuple(keys)}
    assert [(token["name"], token["sessionMode"], token["isAdmin"], token["tools"]) for token in tokens] == [
        ("used", "stateful", False, "read"), ("unused", "stateless", False, "none"), ("admin", "stateless", True, "none")]
    now = cab.iso_time(clock.now())
    assert [token["lastUsedAt"] for token in tokens] == [now, None, now] and tokens[1]["createdAt"] == now
    assert str(unused.token).encode() not in answer.data and cab.digest(str(unused.token)).encode() not in answer.data


def test_the_limits_of_a_token_are_kept_and_listed(admin: Api) -> None:
    choices = {"requestsPerMinute": 10, "requestsPerDay": 200.0, "models": ["haiku", "claude-opus-4"]}
    limited, free = admin.post("/api/tokens", {"name": "x", **choices}), admin.post("/api/tokens", {"name": "y", **dict.fromkeys(choices)})
    assert "warnings" not in limited.json
    listed = {token["id"]: {name: token[name] for name in choices} for token in admin.get("/api/tokens").json["tokens"]}
    assert listed[limited.json["tokenId"]] == choices and listed[free.json["tokenId"]] == dict.fromkeys(choices)


def test_a_token_is_revoked_once(admin: Api) -> None:
    token_id = admin.post("/api/tokens", {"name": "x"}).json["tokenId"]
    answer = admin.delete("/api/tokens/" + token_id)
    assert (answer.status, answer.json) == (200, {"ok": True, "message": "Token revoked"})
    assert {said(admin.delete("/api/tokens/" + each)) for each in (token_id, "none", "%20")} == {(404, "Token not found")}


def test_there_are_at_most_a_hundred_tokens_and_expired_ones_do_not_count(bridge: Start, clock: FakeClock) -> None:
    admin = bridge(spare=0, clock=clock).admin
    for _ in range(99):
        admin.new_token(expiresInDays=1)
    assert said(admin.post("/api/tokens", {"name": "x"})) == (400, "Maximum 100 tokens allowed")
    clock.advance(DAY)
    assert admin.post("/api/tokens", {"name": "x"}).status == 201


def test_the_last_admin_that_still_counts_cannot_be_deleted(bridge: Start, clock: FakeClock) -> None:
    admin = bridge(spare=0, clock=clock).admin
    first = admin.get("/api/tokens").json["tokens"][0]["id"]
    last = 400, "Cannot delete the last admin token"
    assert said(admin.delete("/api/tokens/" + first)) == last
    admin.new_token("short", admin=True, expiresInDays=1)
    clock.advance(DAY)
    assert said(admin.delete("/api/tokens/" + first)) == last              # the other one has expired
    successor = admin.new_token("long", admin=True)
    assert admin.delete("/api/tokens/" + first).status == 200
    assert [admin.get("/api/tokens").status, successor.get("/api/tokens").status] == [401, 200]


# --- status ---

def test_the_status_counts_in_the_original_shape(bridge: Start, gate: Path) -> None:
    running = bridge(spare=0)
    admin = running.admin
    admin.answer("hi")
    admin.answer("die 3")
    processing(admin, gate)
    admin.ask("hi")
    body = admin.with_token(None).get("/api/status").json
    assert [list(body), list(body["queue"]), list(body["stats"])] == [
        ["status", "version", "queue", "stats"], ["isProcessing", "length"],
        ["totalTokens", "totalRequests", "completedRequests", "errorRequests", "queuedRequests"]]
    assert body == {"status": "running", "version": cab.__version__, "queue": {"isProcessing": True, "length": 2}, "stats": {
        "totalTokens": 1, "totalRequests": 4, "completedRequests": 1, "errorRequests": 1, "queuedRequests": 1}}


def test_the_status_tells_admins_more_and_nobody_else(bridge: Start, gate: Path) -> None:
    admin = bridge(spare=0).admin
    job_id = processing(admin, gate)
    body, public = admin.get("/api/status").json, admin.with_token(None).get("/api/status").json
    assert list(body)[:4] == list(public) == ["status", "version", "queue", "stats"]
    assert (body["worker"]["alive"], body["worker"]["requestId"]) == (True, job_id) and ISO.fullmatch(body["worker"]["since"])
    assert body["claude"]["version"].startswith("2.1.330")
    assert list(admin.new_token().get("/api/status").json) == list(public)


# --- limits ---

def call_from(address: str, running: RunningBridge, path: str, **headers: str) -> Answer:
    """A call from another address of this machine (127.0.0.0/8 is ours on Linux, and 127.0.0.1 alone on some systems)."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20, source_address=(address, 0))
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
    except OSError as error:
        missing("cannot call from %s: %s" % (address, error))
        raise
    finally:
        connection.close()


def statuses(count: int, call: Callable[[], Answer]) -> List[int]:
    return [call().status for _ in range(count)]


def test_holders_and_strangers_have_buckets_of_their_own_and_each_address_too(bridge: Start, clock: FakeClock) -> None:
    running = bridge(rate_limit=5, clock=clock, spare=0)
    nobody = running.admin.with_token(None)
    assert statuses(6, lambda: nobody.get("/api/status")) == [200] * 5 + [429]
    assert [nobody.get("/none").status, nobody.get("/dashboard").status, nobody.post("/api/ask").status] == [429] * 3
    assert statuses(6, lambda: running.admin.get("/api/status")) == [200] * 5 + [429]
    assert call_from("127.0.0.2", running, "/api/status").status == 200
    assert nobody.call("OPTIONS", "/api/ask").status == 204


def test_all_holders_share_one_bucket_that_fills_with_time(bridge: Start, clock: FakeClock) -> None:
    running = bridge(rate_limit=5, clock=clock, spare=0)
    user = running.admin.new_token()
    assert statuses(5, lambda: user.get("/none")) == [404] * 4 + [429]
    assert running.admin.get("/api/tokens").status == 429
    clock.advance(11.9)
    assert user.get("/api/status").status == 429
    clock.advance(0.2)
    assert [user.get("/api/status").status, user.get("/api/status").status] == [200, 429]
    clock.advance(3600)
    assert statuses(6, lambda: user.get("/api/status")) == [200] * 5 + [429]


def test_answers_tell_what_is_left_and_a_429_when_to_come_back(bridge: Start, clock: FakeClock) -> None:
    api = bridge(rate_limit=5, clock=clock, spare=0).admin
    names = ("ratelimit-policy", "ratelimit-limit", "ratelimit-remaining", "ratelimit-reset")
    told = api.get("/api/status").headers
    assert [told[name] for name in names] == ["5;w=60", "5", "4", "12"]
    statuses(4, lambda: api.get("/api/status"))
    refused = api.get("/api/status")
    assert [refused.headers[name] for name in (*names, "retry-after")] == ["5;w=60", "5", "0", "60", "12"]
    assert refused.json == {"error": "Too many requests, please slow down.", "code": "rate_limited", "retryAfter": 12}


def test_polls_of_ones_own_unfinished_request_do_not_use_up_the_bucket(bridge: Start, clock: FakeClock, gate: Path) -> None:
    running = bridge(rate_limit=5, clock=clock, spare=0)
    api = running.admin
    job_id = api.ask("hold %s" % gate)
    assert statuses(26, lambda: api.get("/api/ask/" + job_id)) == [202] * 25 + [429]
    assert statuses(5, lambda: api.get("/api/status")) == [200] * 4 + [429]


def test_waits_and_polls_of_others_or_of_what_is_done_use_up_the_bucket(bridge: Start, clock: FakeClock, gate: Path) -> None:
    running = bridge(rate_limit=5, clock=clock, spare=0)
    user = running.admin.new_token()
    done = user.post("/api/ask", {"message": "hi", "wait": 60}).json["requestId"]
    clock.advance(60)
    held = user.ask("hold %s" % gate)
    calls = ((user, "/api/ask/" + done), (user, "/api/ask/%s?wait=0" % held), (running.admin, "/api/ask/" + held), (user, "/api/ask/none"))
    assert [api.get(path).status for api, path in calls] == [200, 202, 202, 404]
    assert user.get("/api/status").status == 429
    assert user.get("/api/ask/" + held).status == 202


def test_headers_that_anyone_can_send_do_not_change_an_address(bridge: Start, clock: FakeClock) -> None:
    nobody = bridge(rate_limit=5, clock=clock, spare=0).admin.with_token(None)
    forged = iter(range(100))
    assert statuses(6, lambda: nobody.get("/api/status", headers={
        name: "10.0.0.%d" % next(forged) for name in ("X-Forwarded-For", "X-Real-IP", "CF-Connecting-IP", "Forwarded")})) == [200] * 5 + [429]


def test_ten_wrong_tokens_a_minute_and_address_are_heard_and_a_right_one_always(bridge: Start, clock: FakeClock) -> None:
    running = bridge(rate_limit=0, clock=clock, spare=0)
    wrong = running.admin.with_token("cab-wrong")
    assert statuses(11, lambda: wrong.get("/api/tokens")) == [401] * 10 + [429]
    refused = wrong.post("/api/ask", {"message": "hi"})
    assert (refused.status, refused.headers["retry-after"], refused.json["code"]) == (429, "6", "rate_limited")
    assert running.admin.get("/api/tokens").status == 200
    assert wrong.with_token(None).get("/api/tokens").status == 401
    assert call_from("127.0.0.2", running, "/api/tokens", Authorization="Bearer cab-wrong").status == 401
    clock.advance(6)
    assert statuses(2, lambda: wrong.get("/api/status")) == [200, 429]


def test_zero_switches_the_limits_off(bridge: Start, clock: FakeClock) -> None:
    running = bridge(rate_limit=0, clock=clock, spare=0)
    for api in (running.admin, running.admin.with_token(None)):
        answers = [api.get("/api/status") for _ in range(130)]
        assert {answer.status for answer in answers} == {200} and "ratelimit-limit" not in answers[-1].headers


def test_a_full_queue_is_429_with_advice_and_the_queue_goes_on(bridge: Start, gate: Path) -> None:
    api = bridge(spare=0, rate_limit=1_000).admin
    for position in range(1, 51):
        assert api.post("/api/ask", {"message": "hold %s" % gate}).json["position"] == position
    full = api.post("/api/ask", {"message": "hi"})
    assert said(full) == (429, "Queue is full. Please try again later.") and full.json["code"] == "queue_full"
    assert int(full.headers["retry-after"]) == full.json["retryAfter"] > 0
    gate.touch()
    wait_until(lambda: api.post("/api/ask", {"message": "hi"}).status == 202)


def test_a_full_queue_tells_the_rate_limit_too(bridge: Start, gate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise cab.QueueFull(headers=(("Retry-After", "10"),))

    monkeypatch.setattr(cab.Database, "enqueue", refuse)
    answer = bridge(spare=0, rate_limit=5).admin.post("/api/ask", {"message": "hi"})
    assert (answer.status, answer.headers.get("ratelimit-limit"), answer.headers.get("ratelimit-remaining")) == (429, "5", "4")


# --- programs as people wrote them for the original: post, read requestId, poll at an interval ---

def polling_loop(api: Api, message: str) -> str:
    """The Python way: raise on error; a body without status is a KeyError."""
    request_id = api.post("/api/ask", {"message": message}).json["requestId"]

    def look() -> Optional[str]:
        data = api.get("/api/ask/" + request_id).json
        if data["status"] == "error":
            raise Exception(data["error"])
        return str(data["response"]) if data["status"] == "completed" else None

    return str(wait_until(look))


def test_a_python_program_for_the_original_gets_its_answer_or_its_error(bridge: Start) -> None:
    api = bridge().admin.new_token()
    assert polling_loop(api, "Explain tides") == "Echo: Explain tides"
    with pytest.raises(Exception, match="out of order"):
        polling_loop(api, "die 3 out of order")


SHELL = r"""
bridge=http://127.0.0.1:PORT auth="Authorization: Bearer cab-your-token-here"
id=$(curl -s "$bridge/api/ask" -H "$auth" -H "Content-Type: application/json" -d '{"message": "Name five commands"}' | jq -r .requestId)
until [ "$(curl -s "$bridge/api/ask/$id" -H "$auth" | jq -r .status)" = completed ]; do sleep 0.05; done
curl -s "$bridge/api/ask/$id" -H "$auth" | jq -r .response
"""

JAVASCRIPT = """
const call = async (path, options = {}) => (await fetch("http://127.0.0.1:PORT/api/ask" + path, {
  ...options, headers: { Authorization: "Bearer cab-your-token-here", "Content-Type": "application/json" } })).json();

async function answerTo(message) {
  const { requestId } = await call("", { method: "POST", body: JSON.stringify({ message }) });
  for (;;) {
    const { status, response, error } = await call("/" + requestId);
    if (status === "completed") return response;
    if (status === "error") throw new Error(error);
    await new Promise((wake) => setTimeout(wake, 50));
  }
}
console.log(await answerTo("What does it mean?"));
console.log(await answerTo("die 3 out of order").catch((error) => "failed: " + error.message));
"""


def run_program(api: Api, words: List[str], text: str) -> str:
    """What a client program prints; its standard input is the program."""
    for word in (words[0], *(("curl", "jq") if words[0] == "bash" else ())):
        if not shutil.which(word):
            missing("no %s here" % word)
    sent = text.replace("PORT", str(api.port)).replace("cab-your-token-here", str(api.token))
    ended = subprocess.run(words, input=sent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", timeout=30)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def test_a_shell_program_for_the_original_gets_its_answer(bridge: Start) -> None:
    assert run_program(bridge().admin.new_token(), ["bash"], SHELL) == "Echo: Name five commands\n"


def test_a_javascript_program_for_the_original_gets_its_answer_or_its_error(bridge: Start) -> None:
    told = run_program(bridge().admin.new_token(), ["node", "--input-type=module", "-"], JAVASCRIPT).splitlines()
    assert told[0] == "Echo: What does it mean?" and re.match("failed: .*out of order", told[1])
