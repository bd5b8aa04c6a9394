"""The native API as clients of the Node original see it.

Statuses, error texts, the order of keys, and rate limits.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import sqlite3
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest

import claude_api_bridge as cab
from conftest import (
    Answer, Api, FakeClaude, FakeClock, RunningBridge, is_running, missing,
    plain_bridge, wait_until,
)
from test_stream import OVERLOADED, Skipped, once, refused_once, script

Start = Callable[..., RunningBridge]
Fakes = Callable[..., FakeClaude]
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
ISO = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
DAY = 86_400


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An admin client of a bridge that is shared by all tests that queue nothing."""
    with plain_bridge(tmp_path_factory.mktemp("served")) as running:
        yield running.admin
        assert Api(running.port).get("/api/status").json["stats"]["totalRequests"] == 0


def processing(api: Api, gate: Path) -> str:
    """Start a job that runs until the gate opens. -> its id."""
    job_id = api.ask("hold %s" % gate)
    wait_until(lambda: api.poll(job_id).get("partial"))
    return job_id


def refusal(answer: Answer) -> Tuple[int, str]:
    """Return the status and the text of a refusal, and check its shape."""
    assert list(answer.json)[:2] == ["error", "code"]
    assert re.fullmatch("[a-z_]+", answer.json["code"])
    return answer.status, answer.json["error"]


# --- authentication ---

MISSING = "Missing Authorization header. Use: Bearer <token>"
INVALID = "Invalid or expired token"


def test_without_a_valid_token_the_answer_is_401_with_the_text_of_the_original(
    bridge: Start,
) -> None:
    running = bridge(spare=0)
    anonymous, user = running.admin.with_token(None), running.admin.new_token()
    expected = {
        "": MISSING, "Basic dTpw": MISSING, "Bearer": MISSING, "Bearer   ": MISSING,
        str(user.token): MISSING, "Bearer cab-" + "0" * 64: INVALID,
        "Bearer " + str(user.token)[:-1]: INVALID, "bearer x y": INVALID,
    }
    answers = {}
    for header in expected:
        headers = {"Authorization": header} if header else {}
        answers[header] = anonymous.post("/api/ask", {"message": "hi"}, headers=headers)
    for header, text in expected.items():
        assert refusal(answers[header]) == (401, text), header
    assert refusal(anonymous.post("/api/ask", b"{", headers={"x-api-key": "wrong"})) == (
        401, INVALID,
    )


def test_a_revoked_and_an_expired_token_are_401(bridge: Start, clock: FakeClock) -> None:
    running = bridge(spare=0, clock=clock)
    revoked, expiring = running.admin.new_token(), running.admin.new_token(expiresInDays=7)
    token_id = running.admin.get("/api/tokens").json["tokens"][1]["id"]
    assert running.admin.delete("/api/tokens/" + token_id).status == 200
    clock.advance(7 * DAY - 1)
    assert [revoked.get("/api/ask/x").status, expiring.get("/api/ask/x").status] == [401, 404]
    clock.advance(1)
    assert [refusal(api.get("/api/ask/x")) for api in (revoked, expiring)] == [(401, INVALID)] * 2
    assert [token["isExpired"] for token in running.admin.get("/api/tokens").json["tokens"]] == [
        True, False,
    ]


def test_the_token_may_have_any_of_these_forms(admin: Api) -> None:
    forms = (
        ("Authorization", "bearer %s"),
        ("authorization", "BEARER %s"),
        ("Authorization", "Bearer    %s"),
        ("X-API-Key", "%s"),
        ("x-api-key", " %s "),
    )
    for name, value in forms:
        headers = {name: value % admin.token}
        answer = admin.with_token(None).get("/api/tokens", headers=headers)
        assert answer.status == 200, (name, value)


def test_an_api_key_counts_beside_another_scheme_but_not_beside_a_bearer_token(admin: Api) -> None:
    key = {"x-api-key": str(admin.token)}
    anonymous = admin.with_token(None)
    for header, status in (("Basic dTpw", 200), ("Bearer cab-wrong", 401)):
        answer = anonymous.get("/api/tokens", headers={**key, "Authorization": header})
        assert answer.status == status


def test_token_routes_are_for_admins_only(admin: Api) -> None:
    user = admin.new_token()
    answers = (
        user.get("/api/tokens"),
        user.post("/api/tokens", b"{"),
        user.post("/api/tokens", {"name": "x"}),
        user.delete("/api/tokens/none"),
    )
    assert [refusal(answer) for answer in answers] == [(403, "Admin token required")] * 4


# --- paths and methods ---


def test_paths_match_in_any_case_with_a_trailing_slash_and_any_query(admin: Api) -> None:
    expected = {
        "/api/status": 200, "/API/Status": 200, "/api/status/": 200, "/api/status?x=%zz&&=": 200,
        "/api/%73tatus": 200, "/dashboard/": 200, "/": 200, "/?x": 200, "//api/status": 404,
        "/api//status": 404, "/api/status//": 404, "/api": 404, "/api/status/x": 404,
        "/api%2Fstatus": 404, "/api/ask/x/y": 404, "/api/ask//events": 404,
        "/api/ask/x/events/y": 404, "/api/conversations/": 200, "/API/Requests/": 200,
        "/api/usage/x": 404, "/favicon.ico": 404, "/../api/status": 404,
    }
    answers = {path: admin.get(path) for path in expected}
    assert {path: answer.status for path, answer in answers.items()} == expected
    assert {refusal(answer) for answer in answers.values() if answer.status == 404} == {
        (404, "Not found")
    }


def test_a_wrong_method_is_405_and_allow_lists_the_right_ones(admin: Api) -> None:
    expected = {
        ("GET", "/api/ask"): "OPTIONS, POST",
        ("PUT", "/api/ask/"): "OPTIONS, POST",
        ("PATCH", "/api/tokens"): "GET, HEAD, OPTIONS, POST",
        ("DELETE", "/api/tokens"): "GET, HEAD, OPTIONS, POST",
        ("GET", "/api/tokens/x"): "DELETE, OPTIONS, PATCH",
        ("PUT", "/api/ask/x"): "DELETE, GET, HEAD, OPTIONS",
        ("DELETE", "/api/ask/x/events"): "GET, HEAD, OPTIONS, POST",
        ("POST", "/api/requests"): "GET, HEAD, OPTIONS",
        ("DELETE", "/api/conversations"): "GET, HEAD, OPTIONS",
        ("GET", "/api/conversations/x"): "DELETE, OPTIONS",
        ("POST", "/api/usage"): "GET, HEAD, OPTIONS",
        ("DELETE", "/api/status"): "GET, HEAD, OPTIONS",
        ("POST", "/"): "GET, HEAD, OPTIONS",
        ("HEAD", "/api/ask"): "OPTIONS, POST",
    }
    answers = {request: admin.call(*request) for request in expected}
    assert {
        request: (answer.status, answer.headers["allow"]) for request, answer in answers.items()
    } == {request: (405, allow) for request, allow in expected.items()}
    body = answers["GET", "/api/ask"].json
    assert body == {"error": body["error"], "code": "method_not_allowed"}
    assert "OPTIONS, POST" in body["error"]


def test_a_bad_percent_escape_is_400(admin: Api) -> None:
    assert {
        refusal(admin.get(path))[0] for path in ("/api/ask/%zz", "/%", "/api/ask/%4", "/%%41")
    } == {400}


def test_head_is_get_without_the_body(admin: Api) -> None:
    same = ("content-length", "content-type", "access-control-allow-origin")
    for path in (
        "/", "/health", "/api/tokens", "/dashboard", "/API/STATUS/", "/none", "/api/ask/none",
    ):
        get, head = admin.get(path), admin.call("HEAD", path)
        assert (head.status, head.data) == (get.status, b""), path
        for name in same:
            assert head.headers[name] == get.headers[name], (path, name)


def test_options_is_204_on_any_path_and_lists_the_request_headers(admin: Api) -> None:
    anonymous = admin.with_token(None)
    for path in ("/api/ask", "/api/tokens/x", "/none", "/%zz", "//"):
        answer = anonymous.call("OPTIONS", path, headers={"Origin": "https://example.com"})
        assert (answer.status, answer.data, answer.headers["access-control-allow-origin"]) == (
            204, b"", "*",
        ), path
        assert set(answer.headers["access-control-allow-methods"].split(",")) >= {
            "GET", "POST", "DELETE",
        }
        assert set(answer.headers["access-control-allow-headers"].lower().split(",")) >= {
            "content-type", "authorization", "x-api-key", "idempotency-key", "last-event-id",
        }


def test_the_root_is_json_for_programs_and_the_page_for_browsers(admin: Api) -> None:
    anonymous = admin.with_token(None)
    body = anonymous.get("/", headers={"Accept": "*/*"}).json
    assert list(body) == ["name", "version", "description", "endpoints", "docs"]
    assert body["name"] == "claude-api-bridge"
    assert set(body["endpoints"]) >= {
        "POST /api/ask", "GET /api/ask/:requestId", "POST /api/tokens", "GET /api/tokens",
        "DELETE /api/tokens/:id", "GET /api/status", "GET /dashboard",
    }
    page = anonymous.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.data.startswith(b"<!doctype html>")


def test_health_is_ok_for_anyone(admin: Api) -> None:
    answer = admin.with_token(None).get("/health")
    assert (answer.status, answer.json) == (200, {"status": "ok"})


# --- asking ---

REQUIRED = "message field is required (string)"
TOO_LONG = "Message exceeds 32768 byte limit"
# (body, status, text of the original, code). The text is None if the original has no such error.
INVALID_ASKS: Tuple[Tuple[Any, int, Optional[str], str], ...] = (
    (None, 400, REQUIRED, "invalid_request"),
    (b"", 400, REQUIRED, "invalid_request"),
    *(
        (body, 400, REQUIRED, "invalid_request")
        for body in (
            {}, [], [1], b"null", b'"hi"', b"5", b"true", {"message": ""}, {"message": None},
            {"message": 5}, {"message": ["hi"]}, {"Message": "hi"},
        )
    ),
    ({"message": " \n"}, 400, None, "invalid_request"),
    ({"message": "x" * 32_769}, 400, TOO_LONG, "invalid_request"),
    ({"message": "é" * 20_000}, 400, TOO_LONG, "invalid_request"),
    *(
        (body, 400, None, "invalid_json")
        for body in (
            b"{", b"message=hi", b'{"message": "hi"} x', b"{'message': 'hi'}",
            b'{"message": "\xff"}', b'{"message": "hi", "wait": NaN}', b"[" * 100_000,
            b'{"message": "hi"}'.decode().encode("utf-16"),
        )
    ),
    ({"message": "hi", "pad": "x" * (1 << 20)}, 413, None, "body_too_large"),
    *(
        ({"message": "hi", field: value}, 400, None, "invalid_request")
        for field, value in (
            ("model", ""), ("model", "-p"), ("model", 5), ("model", "a b"), ("model", "m" * 129),
            ("systemPrompt", 5), ("systemPrompt", "x" * 32_769), ("jsonSchema", "{}"),
            ("jsonSchema", []), ("effort", "huge"), ("effort", 1), ("conversation", "a b"),
            ("conversation", "mine"), ("wait", 91), ("wait", -1), ("wait", "soon"), ("wait", True),
            ("wait", []), ("stream", "true"), ("stream", 1), ("stream", []),
        )
    ),
)


def test_an_invalid_ask_is_refused_with_the_text_of_the_original_and_queues_nothing(
    admin: Api,
) -> None:
    user = admin.new_token()
    for body, status, text, code in INVALID_ASKS:
        answer = user.post("/api/ask", body)
        context = (str(body)[:60], answer.data)
        assert (answer.status, answer.json["code"]) == (status, code), context
        assert text is None or answer.json["error"] == text, context
        if code == "invalid_request":
            has_second = isinstance(body, dict) and len(body) > 1
            field = list(body)[1] if has_second else "message"
            assert answer.json["field"] == field, context
            assert text is not None or field in answer.json["error"], context
    assert admin.get("/api/status").json["stats"]["totalRequests"] == 0


def test_a_number_beyond_all_bounds_in_a_schema_is_refused(admin: Api) -> None:
    body = b'{"message": "hi", "jsonSchema": {"maximum": 1e999}}'
    assert admin.post("/api/ask", body).status == 400


def test_a_compressed_body_is_415(admin: Api) -> None:
    answer = admin.post("/api/ask", b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    assert refusal(answer)[0] == 415


ACCEPTED_BODIES = (
    (b'\xef\xbb\xbf{"message": "BOM"}', "Echo: BOM"),
    (b'{"message": "first", "message": "last"}', "Echo: last"),
    (b'{"message": "\\ud83d\\ude00 \\u0000 \\ud800"}', "Echo: \U0001f600 \0 \ufffd"),
    (json.dumps({"message": "say " + "x" * 32_764}).encode(), "x" * 32_764),
)


def test_bodies_that_the_original_accepts_are_accepted(bridge: Start) -> None:
    api = bridge().admin
    ids = [api.post("/api/ask", body).json["requestId"] for body, _ in ACCEPTED_BODIES]
    assert [api.done(job_id)["response"] for job_id in ids] == [text for _, text in ACCEPTED_BODIES]


def test_an_ask_is_answered_with_202_and_the_body_of_the_original(bridge: Start) -> None:
    answer = bridge().admin.post("/api/ask", {"message": "hi"})
    body = answer.json
    assert (answer.status, list(body)) == (202, ["ok", "requestId", "position", "poll"])
    assert UUID.fullmatch(body["requestId"])
    assert body == {
        "ok": True,
        "requestId": body["requestId"],
        "position": 1,
        "poll": "GET /api/ask/" + body["requestId"],
    }
    # The JSON is compact, as clients expect that parse it with string functions.
    assert b'{"ok":true,' in answer.data


def test_unknown_fields_are_ignored_with_a_warning(bridge: Start) -> None:
    api = bridge().admin
    warnings = ["unknown field 'systemPromt' ignored"]
    assert api.post("/api/ask", {"message": "hi", "systemPromt": "x"}).json["warnings"] == warnings
    assert (
        api.post("/api/ask", {"message": "hi", "systemPromt": "x", "wait": 30}).json["warnings"]
        == warnings
    )
    assert api.post("/api/tokens", {"name": "x", "isAdmin": True}).json["warnings"] == [
        "unknown field 'isAdmin' ignored"
    ]
    assert "warnings" not in api.post("/api/ask", {"message": "hi", "model": "haiku"}).json


def test_the_options_of_an_ask_reach_claude_on_stdin_only(
    bridge: Start, fake_claude: Callable[..., FakeClaude]
) -> None:
    claude = fake_claude()
    api, schema = bridge(claude).admin, {"type": "object", "required": ["answer"]}
    body = api.answer(
        "tell me", model="haiku", systemPrompt="Be brief: ü.", effort="low", jsonSchema=schema
    )
    assert body["structured"] == {"answer": "Echo: tell me"} and body["model"] == "resolved-haiku"
    requests = [line["request"] for line in claude.lines() if line["type"] == "control_request"]
    initialize = next(request for request in requests if request["subtype"] == "initialize")
    assert (
        initialize["systemPrompt"], initialize["jsonSchema"],
        initialize["agents"]["bridge"]["model"],
    ) == ("Be brief: ü.", schema, "haiku")
    assert {"subtype": "apply_flag_settings", "settings": {"effortLevel": "low"}} in requests
    assert claude.prompts() == ["tell me"]
    assert not [
        word
        for start in claude.starts()
        for word in start["argv"]
        if re.search("tell me|Be brief|haiku|answer|^low$", word)
    ]


# --- polling ---


def test_polls_of_queued_processing_and_completed_have_the_bodies_of_the_original(
    bridge: Start, gate: Path
) -> None:
    api = bridge().admin
    running = processing(api, gate)
    queued = api.ask("say done")
    answers = {
        name: api.get("/api/ask/" + job_id)
        for name, job_id in (("queued", queued), ("processing", running))
    }
    gate.touch()
    api.done(queued)
    answers["completed"] = api.get("/api/ask/" + queued)
    first: Dict[str, Tuple[int, Dict[str, Any]]] = {
        "queued": (202, {"status": "queued", "requestId": queued, "queuePosition": 1}),
        "processing": (202, {"status": "processing", "requestId": running, "queuePosition": 0}),
        "completed": (200, {"status": "completed", "requestId": queued, "response": "done"}),
    }
    assert {
        name: (answer.status, dict(list(answer.json.items())[:3]))
        for name, answer in answers.items()
    } == first
    assert [list(answer.json)[:3] for answer in answers.values()] == [
        list(body) for _, body in first.values()
    ]
    assert answers["processing"].json["partial"] == "he"
    assert not {"partial", "startedAt"} & set(answers["queued"].json)
    done = answers["completed"].json
    assert list(done)[3] == "completedAt"
    assert all(ISO.fullmatch(done[name]) for name in ("completedAt", "createdAt", "startedAt"))
    assert (done["attempts"], done["model"]) == (1, "resolved-default-model")
    assert 0 <= done["durationMs"] < 60_000
    assert set(done["usage"]) == {
        "inputTokens", "outputTokens", "cacheReadTokens", "cacheCreationTokens", "costUsd",
    }
    assert api.done(running)["response"] == "held"


def test_a_failed_request_is_200_with_error_and_its_code(bridge: Start) -> None:
    api = bridge(spare=0).admin
    job_id = api.ask("die 3 the words of claude")
    api.done(job_id)
    answer = api.get("/api/ask/" + job_id)
    assert (answer.status, list(answer.json)[:3], answer.json["status"]) == (
        200, ["status", "requestId", "error"], "error",
    )
    assert "the words of claude" in answer.json["error"] and answer.json["errorCode"] == "cli_error"
    assert "response" not in answer.json


def test_positions_are_exact_even_within_one_moment(
    bridge: Start, clock: FakeClock, gate: Path, tmp_path: Path
) -> None:
    running = bridge(spare=0, clock=clock)
    others = running.admin.new_token()
    jobs = [processing(running.admin, gate)]
    for position, message in (
        (2, "hold %s" % (tmp_path / "next")),
        (3, "hi"),
        (4, "hi"),
        (5, "hi"),
    ):
        answer = (
            (others if position % 2 else running.admin).post("/api/ask", {"message": message}).json
        )
        assert answer["position"] == position
        jobs.append(answer["requestId"])
    assert [running.admin.poll(job_id)["queuePosition"] for job_id in jobs] == [0, 1, 2, 3, 4]
    gate.touch()
    wait_until(lambda: running.admin.poll(jobs[1])["status"] == "processing")
    try:
        assert [running.admin.poll(job_id).get("queuePosition") for job_id in jobs] == [
            None, 0, 1, 2, 3,
        ]
    finally:
        (tmp_path / "next").touch()


def test_a_request_is_found_by_its_owner_and_by_admins_only(bridge: Start) -> None:
    admin = bridge().admin
    mine, other = admin.new_token("mine"), admin.new_token("other")
    job_id = mine.ask("hi")
    mine.done(job_id)
    assert [api.get("/api/ask/" + job_id).status for api in (mine, admin)] == [200, 200]
    unknown = other.get("/api/ask/00000000-0000-4000-8000-000000000000")
    assert refusal(unknown) == (404, "Request not found")
    for answer in (
        other.get("/api/ask/" + job_id),
        mine.get("/api/ask/" + job_id.upper()),
        other.get("/api/ask/%s?wait=60" % job_id),
    ):
        # Nothing shows that the request exists.
        assert (answer.status, answer.data) == (404, unknown.data)


def test_a_wait_ends_as_soon_as_the_answer_is_there(
    bridge: Start, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = bridge().admin
    job_id, poll, started_at = processing(api, gate), cab.Service.poll, time.monotonic()

    def open_gate_and_poll(*args: Any) -> Any:
        gate.touch()
        return poll(*args)

    monkeypatch.setattr(cab.Service, "poll", open_gate_and_poll)
    answer = api.get("/api/ask/%s?wait=90" % job_id)
    assert (answer.status, answer.json["response"]) == (200, "held")
    assert time.monotonic() - started_at < 30


def test_a_wait_ends_with_202_after_its_bound(bridge: Start, gate: Path) -> None:
    api = bridge().admin
    job_id, started_at = processing(api, gate), time.monotonic()
    answer = api.get("/api/ask/%s?wait=0.2" % job_id)
    assert (answer.status, answer.json["partial"]) == (202, "he")
    assert 0.2 <= time.monotonic() - started_at < 30
    started_at, answer = time.monotonic(), api.post("/api/ask", {"message": "hi", "wait": 0.2})
    assert (answer.status, list(answer.json)) == (202, ["ok", "requestId", "position", "poll"])
    assert 0.2 <= time.monotonic() - started_at < 30


def test_an_invalid_wait_is_400(admin: Api) -> None:
    for wait in ("91", "90.5", "-1", "nan", "inf", "-inf", "abc", "", "1e9", "0x10", "5s"):
        answer = admin.get("/api/ask/none?wait=" + wait)
        assert (answer.status, answer.json["code"]) == (400, "invalid_request"), wait
        assert answer.json["field"] == "wait" and "wait" in answer.json["error"], wait
        assert "90" in answer.json["error"], wait


def test_an_ask_that_waits_is_answered_with_the_finished_poll_body(bridge: Start) -> None:
    api = bridge().admin
    for message, response in (("say at once", "at once"), ("die 3 so", None)):
        answer = api.post("/api/ask", {"message": message, "wait": 60})
        assert (answer.status, answer.json.get("response")) == (200, response)
        assert answer.json == api.poll(answer.json["requestId"])


# --- cancelling ---


def test_a_cancelled_queued_request_is_gone_at_once_and_the_next_move_up(
    bridge: Start, fake_claude: Fakes, gate: Path
) -> None:
    claude = fake_claude()
    api = bridge(claude, spare=0).admin
    held = processing(api, gate)
    gone, second, third = (api.ask("say %s" % name) for name in ("gone", "second", "third"))
    answer = api.delete("/api/ask/" + gone)
    assert (answer.status, list(answer.json)[:5]) == (
        200, ["ok", "status", "requestId", "error", "errorCode"],
    )
    assert answer.json == {"ok": True, **api.poll(gone)} and "startedAt" not in answer.json
    assert (answer.json["status"], answer.json["errorCode"], answer.json["requestId"]) == (
        "error", "cancelled", gone,
    )
    assert [api.poll(job_id)["queuePosition"] for job_id in (second, third)] == [1, 2]
    assert api.post("/api/ask", {"message": "say fourth"}).json["position"] == 4
    gate.touch()
    assert [api.done(job_id)["response"] for job_id in (held, second, third)] == [
        "held", "second", "third",
    ]
    assert claude.prompts()[:3] == ["hold %s" % gate, "say second", "say third"]


def test_a_running_request_is_cancelled_at_once_and_its_process_ends(
    bridge: Start, fake_claude: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "SHUTDOWN_GRACE_SECONDS", 100.0)
    clock, claude = Skipped(), fake_claude()
    api = bridge(claude, spare=0, clock=clock).admin
    running, after = api.ask("hang"), api.ask("say next")
    wait_until(lambda: api.poll(running).get("partial"))
    child = claude.children()[-1]["pid"]
    assert api.delete("/api/ask/" + running).json["errorCode"] == "cancelled"
    assert (api.poll(running)["status"], api.poll(running)["errorCode"]) == ("error", "cancelled")
    assert api.done(after)["response"] == "next"
    # No client waits for it.
    assert is_running(child)
    clock.ahead = 101
    # It does not react, and is killed.
    wait_until(lambda: not is_running(child))
    stats = api.get("/api/status").json["stats"]
    assert (stats["completedRequests"], stats["errorRequests"]) == (1, 1)


def test_a_cancelled_run_is_interrupted(
    bridge: Start, fake_claude: Fakes, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fake reads its input only after the gate is open.
    monkeypatch.setattr(cab, "SHUTDOWN_GRACE_SECONDS", 20.0)
    claude = fake_claude()
    api = bridge(claude, spare=0).admin
    running = api.ask("tool %s" % gate)
    wait_until(claude.prompts)
    api.delete("/api/ask/" + running)
    wait_until(lambda: api.get("/api/status").json["worker"]["requestId"] is None)
    gate.touch()
    wait_until(lambda: not is_running(claude.children()[-1]["pid"]))
    assert [
        line["request"]["subtype"] for line in claude.lines() if line["type"] == "control_request"
    ][-1] == "interrupt"
    body = api.poll(running)
    # The late answer is discarded.
    assert (body["status"], body["errorCode"], "response" in body) == ("error", "cancelled", False)


def epoch(moment: str) -> float:
    """Return the epoch seconds of a time as the API writes it."""
    return datetime.fromisoformat(moment[:-1] + "+00:00").timestamp()


def test_a_request_that_is_finished_unknown_or_of_another_token_cannot_be_cancelled(
    bridge: Start, gate: Path
) -> None:
    admin = bridge(spare=0).admin
    mine, other = admin.new_token("mine"), admin.new_token("other")
    done, failed, running = mine.ask("hi"), mine.ask("die 3"), mine.ask("hold %s" % gate)
    mine.done(failed)
    before = [mine.poll(job_id) for job_id in (done, failed)]
    for job_id in (done, failed):
        answer = mine.delete("/api/ask/" + job_id)
        assert (answer.status, answer.json["code"]) == (409, "already_finished")
        assert set(answer.json) == {"error", "code"}
    assert [mine.poll(job_id) for job_id in (done, failed)] == before
    unknown = mine.delete("/api/ask/none")
    assert refusal(unknown) == (404, "Request not found")
    for job_id in (done, running):
        assert (
            other.delete("/api/ask/" + job_id).status, other.delete("/api/ask/" + job_id).data,
        ) == (404, unknown.data)
    assert admin.with_token(None).delete("/api/ask/" + running).status == 401
    assert mine.poll(running)["status"] == "processing"
    assert admin.delete("/api/ask/" + running).status == 200
    assert refusal(mine.delete("/api/ask/" + running))[0] == 409


def test_a_cancelled_turn_is_not_part_of_its_conversation(bridge: Start, gate: Path) -> None:
    talk = bridge(spare=0).admin.new_token(sessionMode="stateful")
    talk.answer("I am Ann")
    cancelled = processing(talk, gate)
    talk.delete("/api/ask/" + cancelled)
    assert json.loads(talk.answer("turns")["response"]) == [
        ["user", "I am Ann"],
        ["assistant", "Echo: I am Ann"],
    ]


# --- idempotency ---


def with_key(api: Api, body: Any, key: str) -> Answer:
    """Ask with an Idempotency-Key."""
    return api.post("/api/ask", body, headers={"Idempotency-Key": key})


def test_the_same_key_and_body_return_the_first_request(
    bridge: Start, fake_claude: Callable[..., FakeClaude], gate: Path
) -> None:
    claude = fake_claude()
    api = bridge(claude).admin
    processing(api, gate)
    key = "x" * 200
    first = with_key(api, {"message": "say it"}, key)
    again = with_key(api, {"message": "say it", "model": None}, key)
    assert first.status == again.status == 202 and first.json == again.json
    assert first.json["position"] == 2
    assert ("idempotent-replayed" in first.headers, again.headers["idempotent-replayed"]) == (
        False, "true",
    )
    assert "Idempotent-Replayed" in again.headers["access-control-expose-headers"]
    gate.touch()
    body = api.done(first.json["requestId"])
    waited = with_key(api, {"message": "say it", "wait": 60}, key)
    assert (waited.status, waited.json, waited.headers["idempotent-replayed"]) == (
        200, body, "true",
    )
    assert with_key(api, {"message": "say it"}, key).json == {**first.json, "position": 0}
    stream = api.stream(
        "POST", "/api/ask", {"message": "say it", "stream": True}, {"Idempotency-Key": key}
    )
    assert [event.kind for event in stream.rest()] == ["queued", "started", "delta", "completed"]
    assert stream.headers["idempotent-replayed"] == "true" and stream.events[-1].data == body
    assert stream.events[0].data == {"requestId": first.json["requestId"], "position": 0}
    assert claude.prompts() == ["hold %s" % gate, "say it"]


def test_a_key_belongs_to_one_body_and_one_token(bridge: Start) -> None:
    admin = bridge(spare=0).admin
    user = admin.new_token()
    first = with_key(user, {"message": "say it"}, "key").json["requestId"]
    for body in (
        {"message": "say that"}, {"message": "say it", "model": "haiku"},
        {"message": "say it", "systemPrompt": "x"},
    ):
        refused = with_key(user, body, "key")
        assert (refused.status, refused.json["code"], "idempotent-replayed" in refused.headers) == (
            409, "idempotency_conflict", False,
        )
    assert with_key(admin, {"message": "say that"}, "key").status == 202
    assert with_key(user, {"message": "say it"}, "KEY").json["requestId"] != first
    assert admin.get("/api/status").json["stats"]["totalRequests"] == 3


def test_a_key_of_no_or_too_many_characters_is_400(admin: Api) -> None:
    for key in ("", "x" * 201):
        answer = with_key(admin, {"message": "hi"}, key)
        assert (answer.status, answer.json["code"]) == (400, "invalid_request")
        assert answer.json["field"] == "Idempotency-Key" and "200" in answer.json["error"]


def test_a_hundred_posts_with_ten_keys_are_ten_runs_also_after_a_restart(
    bridge: Start, fake_claude: Callable[..., FakeClaude]
) -> None:
    claude = fake_claude()
    running = bridge(claude, spare=0)
    api = running.admin.new_token()

    def send(number: int) -> Tuple[str, Optional[str]]:
        answer = with_key(api, {"message": "say %d" % (number % 10)}, "key %d" % (number % 10))
        return answer.json["requestId"], answer.headers.get("idempotent-replayed")

    with ThreadPoolExecutor(20) as callers:
        results = list(callers.map(send, range(100)))
    assert [len({job_id for job_id, _ in results[number::10]}) for number in range(10)] == [1] * 10
    assert [replayed for _, replayed in results].count(None) == 10
    bodies = [api.done(job_id) for job_id, _ in results[:10]]
    running.bridge.__exit__(None, None, None)
    api = Api(bridge(claude, spare=0).port, api.token)
    assert {send(number) for number in range(10)} == {(job_id, "true") for job_id, _ in results}
    assert [api.poll(job_id) for job_id, _ in results[:10]] == bodies
    assert sorted(claude.prompts()) == ["say %d" % number for number in range(10)]


# --- lists ---


def test_a_list_shows_the_caller_s_own_requests_newest_first(bridge: Start, gate: Path) -> None:
    admin = bridge(spare=0).admin
    user = admin.new_token("user")
    done, failed, own = user.ask("say done"), user.ask("die 3"), admin.ask("say admin's")
    admin.done(own)
    running, queued = processing(user, gate), user.ask("say later")
    ids = {token["name"]: token["id"] for token in admin.get("/api/tokens").json["tokens"]}
    answer = user.get("/api/requests")
    assert (answer.status, list(answer.json), answer.json["next"]) == (
        200, ["requests", "next", "searchedTo"], None,
    )
    assert [row["requestId"] for row in answer.json["requests"]] == [queued, running, failed, done]
    polls = {job_id: admin.poll(job_id) for job_id in (queued, running, failed, done, own)}
    # A list of long texts would be long.
    assert polls[running].pop("partial") == "he"
    messages = {
        queued: "say later",
        running: "hold %s" % gate,
        failed: "die 3",
        done: "say done",
        own: "say admin's",
    }
    assert answer.json["requests"] == [
        {**polls[job_id], "message": messages[job_id], "tokenId": ids["user"]}
        for job_id in (queued, running, failed, done)
    ]
    assert [
        (row["requestId"], row["tokenId"]) for row in admin.get("/api/requests").json["requests"]
    ] == [
        (job_id, ids["admin" if job_id == own else "user"])
        for job_id in (queued, running, own, failed, done)
    ]
    for status, expected in (
        ("queued", [queued]),
        ("processing", [running]),
        ("completed", [done]),
        ("error", [failed]),
        ("completed,error", [failed, done]),
        ("queued,processing,completed,error", [queued, running, failed, done]),
        ("", [queued, running, failed, done]),
    ):
        assert [
            row["requestId"] for row in user.get("/api/requests?status=" + status).json["requests"]
        ] == expected, status


def test_a_cursor_reads_the_whole_list_also_while_it_grows(bridge: Start, gate: Path) -> None:
    admin = bridge(spare=0).admin
    user = admin.new_token()
    processing(admin, gate)
    ids = [user.ask("hi") for _ in range(23)]
    first = user.get("/api/requests").json
    assert [row["requestId"] for row in first["requests"]] == ids[:2:-1]
    assert isinstance(first["next"], str)
    user.ask("hi")
    admin.ask("hi")
    listed, following = [], first["next"]
    while following:
        page = user.get("/api/requests?limit=2&before=%s" % following).json
        assert 0 < len(page["requests"]) <= 2
        listed += [row["requestId"] for row in page["requests"]]
        following = page["next"]
    assert listed == ids[2::-1]
    assert user.get("/api/requests?limit=3&before=1").json == {
        "requests": [], "next": None, "searchedTo": None,
    }
    assert len(user.get("/api/requests?limit=100").json["requests"]) == 24
    assert user.get("/api/requests?limit=24").json["next"] is None


def listed(api: Api, query: str) -> List[str]:
    """Return the messages of a list."""
    return [row["message"] for row in api.get("/api/requests?" + query).json["requests"]]


def test_a_list_is_filtered_by_text_token_model_time_error_and_conversation(
    bridge: Start, clock: FakeClock
) -> None:
    admin = bridge(spare=0, clock=clock).admin
    user, memo = admin.new_token("user"), admin.new_token("memo", sessionMode="stateful")
    began_at = str(cab.iso_time(clock.now()))
    user.answer("say Straße")
    admin.done(user.ask("die 3", model="haiku"))
    clock.advance(60)
    later = str(cab.iso_time(clock.now() - 1))
    memo.answer("say one", conversation="trip")
    memo.answer("say two", conversation="trip")
    memo.answer("say three", conversation="work")
    everything = ["say three", "say two", "say one", "die 3", "say Straße"]
    for query, expected in {
        "q=STRASSE": ["say Straße"], "q=two": ["say two"], "q=cli_error": ["die 3"],
        "q=": everything, "q=nowhere": [], "token=user": ["die 3", "say Straße"],
        "token=memo&q=one": ["say one"],
        "model=HAIKU": ["die 3"], "error=cli_error": ["die 3"], "error=timeout": [],
        "since=" + later: everything[:3], "since=" + began_at: everything,
        "since=2027-01-15": everything, "since=2999-01-01T00:00": [],
        "token=memo&conversation=trip": ["say two", "say one"], "conversation=trip": [],
        "token=memo&conversation=trip&status=error": [], "status=error&q=3": ["die 3"],
    }.items():  # fmt: skip
        assert listed(admin, query) == expected, query
    assert listed(memo, "conversation=trip") == ["say two", "say one"]
    assert listed(user, "q=say") == ["say Straße"] and listed(user, "token=user") == everything[3:]
    assert user.get("/api/requests?token=memo").status == 404
    for since in ("yesterday", "1", "2027-13-01", "2027-01-01T00:00:00+99:00"):
        answer = admin.get("/api/requests?since=" + since)
        assert (answer.status, answer.json["field"]) == (400, "since")


def test_a_search_reads_a_bounded_part_and_says_how_far_it_came(
    bridge: Start, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "SEARCH_PAGES", 2)
    monkeypatch.setattr(cab, "PAGE_JOBS", 3)
    api = bridge(spare=0, clock=clock).admin
    for message in ("needle 1", *"abcdefg", "needle 2", "h"):
        api.answer("say " + message)
        clock.advance(1)
    first = api.get("/api/requests?q=needle").json
    assert [row["message"] for row in first["requests"]] == ["say needle 2"]
    assert first["searchedTo"] == cab.iso_time(clock.now() - 6)
    second = api.get("/api/requests?q=needle&before=" + first["next"]).json
    assert [row["message"] for row in second["requests"]] == ["say needle 1"]
    assert (second["next"], second["searchedTo"]) == (None, None)
    one = api.get("/api/requests?q=say&limit=1").json
    assert len(one["requests"]) == 1 and listed(api, "q=needle&before=" + one["next"]) == [
        "say needle 2",
    ]


def test_a_request_alone_has_what_the_list_has(bridge: Start) -> None:
    admin = bridge(spare=0).admin
    user = admin.new_token()
    done = user.done(user.ask("die 3", systemPrompt="Be brief."))
    [row] = admin.get("/api/requests").json["requests"]
    assert user.get("/api/requests/" + done["requestId"]).json == row
    assert (row["message"], row["systemPrompt"]) == ("die 3", "Be brief.")
    assert row["advice"] == done["advice"] == cab.RUN_ADVICE["cli_error"]
    other = admin.new_token()
    assert other.get("/api/requests/" + done["requestId"]).status == 404
    assert admin.get("/api/requests/none").status == 404


PNG = {"name": "a.png", "mediaType": "image/png", "data": "aGk="}


def test_attachments_reach_claude_before_the_message_and_are_not_stored_for_long(
    bridge: Start, fake_claude: Fakes, tmp_path: Path
) -> None:
    fake = fake_claude()
    api = bridge(fake, spare=0).admin
    pdf = {"name": "b.pdf", "mediaType": "application/pdf", "data": "aGk="}
    text = {"mediaType": "text/plain", "data": "Z3LDvG4="}
    done = api.done(api.ask("say hi", attachments=[PNG, pdf, text]))
    assert done["response"] == "hi"
    [prompt] = fake.messages()
    assert prompt["message"]["content"] == [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}},
        {
            "type": "document", "title": "b.pdf",
            "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="},
        },
        {
            "type": "document", "title": "file",
            "source": {"type": "text", "media_type": "text/plain", "data": "grün"},
        },
        {"type": "text", "text": "say hi"},
    ]
    failed = api.done(api.ask("die 3", attachments=[PNG]))
    for job_id, names in ((done["requestId"], ["a.png", "b.pdf", "file"]), (
        failed["requestId"], ["a.png"])):
        row = api.get("/api/requests/" + job_id).json
        assert [entry["name"] for entry in row["attachments"]] == names
    assert row["attachments"] == [{"name": "a.png", "mediaType": "image/png", "bytes": 2}]
    with sqlite3.connect(str(tmp_path / "data/bridge.db")) as db:
        assert db.execute("SELECT DISTINCT attachment_data FROM jobs").fetchall() == [(None,)]
    db.close()


def test_attachments_wait_with_their_request_and_with_its_conversation(
    bridge: Start, fake_claude: Fakes, gate: Path
) -> None:
    fake = fake_claude()
    admin = bridge(fake, spare=0).admin
    api = admin.new_token(sessionMode="stateful")
    processing(admin, gate)
    job_id = api.ask("say see", attachments=[PNG])
    gate.touch()
    assert api.done(job_id)["response"] == "see" and api.answer("turns")
    contents = [message["message"]["content"] for message in fake.messages()]
    assert [[block["type"] for block in content] for content in contents] == [
        ["text"], ["image", "text"], ["text"],
    ]


@pytest.mark.parametrize(
    "attachments, error",
    [
        ("x", "list of at most 20"), ([PNG] * 21, "list of at most 20"), ([None], "list of"),
        ([{**PNG, "data": ""}], "list of"), ([{**PNG, "data": 1}], "list of"),
        ([{**PNG, "mediaType": "image/tiff"}], "one of: image/png, image/jpeg"),
        ([{**PNG, "mediaType": ["image/png"]}], "list of"),
        ([{**PNG, "data": "a b"}], "a.png must be base64"),
        ([{**PNG, "data": "data:image/png;base64,aGk="}], "a.png must be base64"),
        ([{"mediaType": "text/plain", "data": "/w=="}], "of a text in UTF-8"),
        ([{**PNG, "data": "ICA="}], "a.png is empty"), ([{**PNG, "name": 1}], "must be a string"),
    ],
)  # fmt: skip
def test_an_invalid_attachment_is_400(admin: Api, attachments: Any, error: str) -> None:
    answer = admin.post("/api/ask", {"message": "hi", "attachments": attachments})
    assert (answer.status, answer.json["field"]) == (400, "attachments")
    assert error in answer.json["error"]


def test_a_page_of_long_answers_ends_early_and_the_next_page_continues(
    bridge: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "PAGE_CHARACTERS", 4_000)
    api = bridge(spare=0).admin
    ids = [api.ask("big 4") for _ in range(5)]
    api.done(ids[-1])
    pages, path = [], "/api/requests"
    while path:
        page = api.get(path).json
        pages.append([row["requestId"] for row in page["requests"]])
        path = "/api/requests?before=" + page["next"] if page["next"] else ""
    assert pages == [ids[:2:-1], ids[2:0:-1], ids[:1]]


@pytest.mark.parametrize(
    "query, field",
    [
        *(
            ("limit=" + value, "limit")
            for value in ("0", "101", "-1", "x", "", "1.5", "1e1", "%D9%A3")
        ),
        *(("before=" + value, "before") for value in ("0", "-1", "x", "", "1.5", "1000000000")),
        *(
            ("status=" + value, "status")
            for value in ("done", "Queued", "queued,", ",", "queued;error", "queued%20")
        ),
    ],
)
def test_an_invalid_list_query_is_400_and_names_the_field(
    admin: Api, query: str, field: str
) -> None:
    answer = admin.get("/api/requests?" + query)
    assert (answer.status, answer.json["code"], answer.json["field"]) == (
        400, "invalid_request", field,
    )
    assert field in answer.json["error"]


# --- conversations ---


def test_conversations_are_listed_and_a_deleted_one_starts_empty(
    bridge: Start, fake_claude: Callable[..., FakeClaude]
) -> None:
    claude = fake_claude()
    admin = bridge(claude, spare=0).admin
    talk, other = admin.new_token(sessionMode="stateful"), admin.new_token(sessionMode="stateful")
    assert (
        talk.get("/api/conversations").json
        == {"conversations": []}
        == admin.get("/api/conversations").json
    )
    talk.answer("I am Ann", conversation="ann")
    talk.answer("I am Bob")
    talk.answer("die 3", conversation="ann")
    listed = talk.get("/api/conversations").json["conversations"]
    assert [(row["name"], row["turns"], sorted(row)) for row in listed] == [
        (name, 1, ["createdAt", "lastUsedAt", "name", "turns"]) for name in ("ann", "default")
    ]
    assert all(
        ISO.fullmatch(row["createdAt"]) and row["createdAt"] <= row["lastUsedAt"] for row in listed
    )
    other.answer("I am Cid", conversation="ann")
    process_id = claude.children()[1]["pid"]
    # This process belongs to the conversation `default`, and has its whole context.
    assert is_running(process_id)
    for name in ("ann", "default"):
        answer = talk.delete("/api/conversations/" + name)
        assert (answer.status, answer.json) == (
            200, {"ok": True, "message": "Conversation deleted"},
        )
        assert refusal(talk.delete("/api/conversations/" + name)) == (404, "Conversation not found")
        assert json.loads(talk.answer("turns", conversation=name)["response"]) == []
    wait_until(lambda: not is_running(process_id))
    assert json.loads(other.answer("turns", conversation="ann")["response"])[0] == [
        "user", "I am Cid",
    ]
    # The requests remain after the conversation is deleted.
    assert len(talk.get("/api/requests").json["requests"]) == 5


def test_a_conversation_deleted_while_it_runs_starts_empty(bridge: Start, gate: Path) -> None:
    talk = bridge(spare=0).admin.new_token(sessionMode="stateful")
    talk.answer("I am Ann")
    running, waiting = processing(talk, gate), talk.ask("turns")
    assert talk.delete("/api/conversations/default").status == 200
    assert [
        (row["name"], row["turns"]) for row in talk.get("/api/conversations").json["conversations"]
    ] == [("default", 0)]
    gate.touch()
    assert talk.done(running)["response"] == "held"
    assert json.loads(talk.done(waiting)["response"]) == []


def test_only_the_caller_s_own_conversations_can_be_deleted(bridge: Start) -> None:
    admin = bridge(spare=0).admin
    talk = admin.new_token(sessionMode="stateful")
    talk.answer("I am Ann")
    other = admin.new_token(sessionMode="stateful")
    for api, name in (
        (admin, "default"),
        (other, "default"),
        (talk, "other"),
        (talk, "Default"),
        (talk, "%00"),
        (talk, "%ED%A0%80"),
    ):
        assert refusal(api.delete("/api/conversations/" + name)) == (404, "Conversation not found")
    assert json.loads(talk.answer("turns")["response"])[0] == ["user", "I am Ann"]


# --- usage ---

USAGE_OF_ONE = {
    "inputTokens": 10,
    "outputTokens": 7,
    "cacheReadTokens": 5,
    "cacheCreationTokens": 3,
}


def expected_usage(requests: int, completed: int, errors: int) -> Dict[str, Any]:
    """Return the usage of so many requests to the fake, without the cost."""
    return {
        "requests": requests,
        "completed": completed,
        "errors": errors,
        **{name: completed * count for name, count in USAGE_OF_ONE.items()},
    }


def without_cost(sums: Dict[str, Any]) -> Dict[str, Any]:
    """Return the counters of a usage record that `expected_usage` returns, too."""
    return {
        name: value
        for name, value in sums.items()
        if name not in ("costUsd", "day", "tokenId", "name")
    }


def test_usage_is_listed_by_day_and_token(bridge: Start, clock: FakeClock) -> None:
    admin = bridge(spare=0, clock=clock).admin
    user, deleted = admin.new_token("user"), admin.new_token("gone")
    user.answer("one")
    user.answer("die 3")
    deleted.answer("two")
    clock.advance(DAY)
    user.answer("three")
    admin.answer("four")
    ids = {token["name"]: token["id"] for token in admin.get("/api/tokens").json["tokens"]}
    admin.delete("/api/tokens/" + ids["gone"])
    body = admin.get("/api/usage").json
    assert list(body) == ["since", "total", "days", "tokens", "models", "latency", "plan"]
    assert body["since"] == "2026-12-18"
    assert without_cost(body["total"]) == expected_usage(5, 4, 1)
    assert body["total"]["costUsd"] == 0.008
    assert [(row["day"], without_cost(row)) for row in body["days"]] == [
        ("2027-01-15", expected_usage(3, 2, 1)),
        ("2027-01-16", expected_usage(2, 2, 0)),
    ]
    assert {row["tokenId"]: (row["name"], without_cost(row)) for row in body["tokens"]} == {
        ids["user"]: ("user", expected_usage(3, 2, 1)),
        ids["admin"]: ("admin", expected_usage(1, 1, 0)),
        ids["gone"]: (None, expected_usage(1, 1, 0)),
    }
    own = user.get("/api/usage").json
    assert without_cost(own["total"]) == expected_usage(3, 2, 1)
    assert [row["name"] for row in own["tokens"]] == ["user"] and len(own["days"]) == 2
    today = admin.get("/api/usage?days=1").json
    assert (today["since"], without_cost(today["total"])) == ("2027-01-16", expected_usage(2, 2, 0))
    assert admin.new_token().get("/api/usage").json["total"] == {
        **expected_usage(0, 0, 0),
        "costUsd": 0,
    }


def test_usage_by_model_and_the_latency_of_the_last_hour(
    bridge: Start, clock: FakeClock, gate: Path
) -> None:
    admin = bridge(spare=0, clock=clock).admin
    user = admin.new_token("user")
    nothing = {"p50": None, "p95": None}
    assert user.get("/api/usage").json["latency"] == {
        "requests": 0, "waitingMs": nothing, "firstTokenMs": nothing,
    }
    first = processing(admin, gate)
    second = user.ask("one", model="haiku")
    clock.advance(2)
    gate.touch()
    admin.done(first)
    user.done(second)
    user.answer("die 3")
    body = admin.get("/api/usage").json
    assert [(row["model"], row["completed"]) for row in body["models"]] == [
        ("resolved-default-model", 1), ("resolved-haiku", 1),
    ]
    assert body["models"][1]["inputTokens"] == body["total"]["inputTokens"] / 2
    assert body["latency"] == {
        "requests": 3, "waitingMs": {"p50": 0, "p95": 2000},
        "firstTokenMs": {"p50": 0, "p95": 0},
    }
    own = user.get("/api/usage").json
    assert [row["model"] for row in own["models"]] == ["resolved-haiku"]
    assert own["latency"]["requests"] == 2
    clock.advance(3600)
    assert admin.get("/api/usage").json["latency"]["requests"] == 0
    clock.advance(DAY)
    assert admin.get("/api/usage?days=1").json["models"] == []


def test_an_invalid_number_of_days_is_400(admin: Api) -> None:
    for days in ("0", "401", "-1", "x", "", "1.5"):
        answer = admin.get("/api/usage?days=" + days)
        assert (answer.status, answer.json["code"]) == (400, "invalid_request")
        assert answer.json["field"] == "days" and "400" in answer.json["error"]


def test_usage_and_the_admins_status_show_the_windows_of_the_plan(
    bridge: Start, clock: FakeClock
) -> None:
    admin = bridge(spare=0, clock=clock).admin
    nothing = {"windows": [], "isUsingOverage": False, "waitingFor": None, "resumesAt": None}
    assert admin.get("/api/usage").json["plan"] == nothing == admin.get("/api/status").json["plan"]
    soon, later = clock.now() + 600, clock.now() + 6 * DAY
    limits = {
        "five_hour": {"utilization": 0.5, "resetsAt": soon, "status": "allowed"},
        "seven_day": {"utilization": 0.25, "resetsAt": later, "status": "allowed_warning"},
    }
    admin.answer(
        script(
            {
                "limits": {
                    "rateLimitType": "five_hour",
                    **limits["five_hour"],
                    "unifiedWindows": limits,
                }
            },
            {"result": "hi"},
        )
    )
    windows = [
        {
            **window,
            "type": kind,
            "resetsAt": cab.iso_time(float(str(window["resetsAt"]))),
            "seenAt": cab.iso_time(clock.now()),
        }
        for kind, window in limits.items()
    ]
    user = admin.new_token()
    assert (
        admin.get("/api/status").json["plan"]
        == user.get("/api/usage").json["plan"]
        == {**nothing, "windows": windows}
    )
    clock.advance(601)
    # The window was reset: the state of the new one is unknown.
    windows[0].update(status=None, utilization=None)
    assert user.get("/api/usage").json["plan"] == {**nothing, "windows": windows}
    assert "plan" not in user.get("/api/status").json


# --- limits of a token ---


def test_a_token_has_a_limit_of_requests_per_minute(bridge: Start, clock: FakeClock) -> None:
    admin = bridge(spare=0, clock=clock).admin
    user = admin.new_token(requestsPerMinute=2)
    first = user.ask("hi")
    clock.advance(20)
    user.ask("hi")
    clock.advance(10.5)
    refused = user.post("/api/ask", {"message": "hi"})
    assert (refused.status, refused.headers["retry-after"]) == (429, "30")
    assert refused.json == {
        "error": refused.json["error"],
        "code": "rate_limited",
        "retryAfter": 30,
    }
    # Only new requests count.
    assert user.done(first)["status"] == "completed" and user.get("/api/requests").status == 200
    assert admin.post("/api/ask", {"message": "hi"}).status == 202
    clock.advance(29)
    assert user.post("/api/ask", {"message": "hi"}).headers["retry-after"] == "1"
    clock.advance(0.5)
    assert statuses(2, lambda: user.post("/api/ask", {"message": "hi"})) == [202, 429]
    clock.advance(3600)
    assert statuses(3, lambda: user.post("/api/ask", {"message": "hi"})) == [202, 202, 429]


def test_a_token_has_a_limit_of_requests_per_day(bridge: Start, clock: FakeClock) -> None:
    running = bridge(spare=0, clock=clock)
    user = running.admin.new_token(requestsPerDay=2)
    # A cancelled request counts, too.
    user.delete("/api/ask/" + user.ask("hi"))
    assert with_key(user, {"message": "hi"}, "key").status == 202
    refused = user.post("/api/ask", {"message": "hi", "stream": True})
    assert (refused.status, refused.headers["retry-after"]) == (429, "57600")
    assert refused.json == {
        "error": refused.json["error"],
        "code": "daily_limit",
        "resetsAt": "2027-01-16T00:00:00.000Z",
        "retryAfter": 57_600,
    }
    assert refused.json["resetsAt"] in refused.json["error"]
    # A repeated request does not count.
    assert with_key(user, {"message": "hi"}, "key").status == 202
    assert running.admin.post("/api/ask", {"message": "hi"}).status == 202
    clock.advance(57_599)
    assert user.post("/api/ask", {"message": "hi"}).status == 429
    clock.advance(1)
    assert statuses(3, lambda: user.post("/api/ask", {"message": "hi"})) == [202, 202, 429]
    assert user.get("/api/usage").json["total"]["requests"] == 4


def test_a_token_may_use_some_models_only(bridge: Start) -> None:
    admin = bridge(spare=0).admin
    user = admin.new_token(models=["haiku", "claude-opus-4"])
    assert [
        user.answer("hi", model=model)["model"]
        for model in (None, "default", "haiku", "claude-opus-4")
    ] == ["resolved-haiku", "resolved-haiku", "resolved-haiku", "resolved-claude-opus-4"]
    for model in ("sonnet", "Haiku", "opus"):
        refused = user.post("/api/ask", {"message": "hi", "model": model})
        assert (refused.status, refused.json["code"]) == (403, "model_not_allowed")
        assert refused.json["field"] == "model" and model in refused.json["error"]
        assert "haiku, claude-opus-4" in refused.json["error"]
    assert user.post("/api/ask", {"message": "hi", "model": "a b"}).status == 400
    assert admin.answer("hi", model="sonnet")["model"] == "resolved-sonnet"


# --- pauses of the plan or the service ---


def waiting_body(api: Api, job_id: str) -> Dict[str, Any]:
    """Wait until the request waits for the plan or the service. -> its poll body."""
    wait_until(lambda: "waitingFor" in api.poll(job_id))
    return api.poll(job_id)


def test_a_request_waits_for_the_reset_of_the_plan_and_later_requests_follow(
    bridge: Start, tmp_path: Path, fake_claude: Callable[..., FakeClaude]
) -> None:
    clock, claude = Skipped(), fake_claude()
    running = bridge(claude, spare=0, clock=clock)
    api, resets_at = running.admin, int(clock.now()) + 500
    prompt = script(refused_once(resets_at, tmp_path / "mark"), {"delta": "at last"})
    first, others = api.ask(prompt), [api.ask("say %d" % number) for number in range(3)]
    body = waiting_body(api, first)
    waiting = {"waitingFor": "usage_limit", "resumesAt": cab.iso_time(resets_at)}
    assert body == {
        "status": "queued",
        "requestId": first,
        "queuePosition": 1,
        "createdAt": body["createdAt"],
        "attempts": 0,
        **waiting,
    }
    assert [api.poll(job_id)["queuePosition"] for job_id in others] == [2, 3, 4]
    assert {name: api.poll(others[0])[name] for name in waiting} == waiting
    assert [row["resumesAt"] for row in api.get("/api/requests").json["requests"]] == [
        waiting["resumesAt"]
    ] * 4
    plan = api.get("/api/usage").json["plan"]
    assert (
        {name: plan[name] for name in waiting}
        == waiting
        == {name: api.get("/api/status").json["plan"][name] for name in waiting}
    )
    assert [
        (window["type"], window["status"], window["utilization"]) for window in plan["windows"]
    ] == [("five_hour", "rejected", 1)]
    assert claude.prompts() == [prompt]
    clock.ahead = 501
    assert [api.done(job_id)["response"] for job_id in (first, *others)] == [
        "at last", "0", "1", "2",
    ]
    assert claude.prompts() == [prompt, prompt, "say 0", "say 1", "say 2"]
    done = api.poll(first)
    assert done["attempts"] == 1 and not set(waiting) & set(done)
    assert api.get("/api/usage").json["plan"]["waitingFor"] is None


def test_a_full_queue_during_a_pause_of_the_plan_returns_the_time_of_the_reset(
    bridge: Start, tmp_path: Path
) -> None:
    clock = Skipped()
    api = bridge(spare=0, clock=clock).admin
    resets_at = int(clock.now()) + 500
    first = api.ask(script(refused_once(resets_at, tmp_path / "mark")))
    waiting_body(api, first)
    for _ in range(49):
        api.ask("hi")
    full = api.post("/api/ask", {"message": "hi"})
    assert (full.status, full.json["code"]) == (429, "queue_full")
    assert str(cab.iso_time(resets_at)) in full.json["error"]
    assert int(full.headers["retry-after"]) == full.json["retryAfter"]
    assert 490 < full.json["retryAfter"] <= 500
    # A waiting request may be cancelled, and makes room.
    api.delete("/api/ask/" + first)
    assert api.post("/api/ask", {"message": "hi"}).json["position"] == 50


def test_a_request_waits_while_the_service_is_overloaded_and_is_tried_again(
    bridge: Start,
    fake_claude: Callable[..., FakeClaude],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cab, "BACK_OFF_SECONDS", (100,))
    clock, claude = Skipped(), fake_claude()
    api = bridge(claude, spare=0, clock=clock).admin
    job_id = api.ask(
        script(once(tmp_path / "mark", {"delta": "half"}, OVERLOADED), {"delta": "whole"})
    )
    body = waiting_body(api, job_id)
    assert (body["status"], body["waitingFor"], body["attempts"]) == ("queued", "overloaded", 0)
    assert body["queuePosition"] == 1 and not {"partial", "startedAt", "error"} & set(body)
    assert 0 < epoch(body["resumesAt"]) - clock.now() <= 100
    clock.ahead = 101
    done = api.done(job_id)
    assert (done["response"], done["attempts"], "waitingFor" in done, len(claude.prompts())) == (
        "whole", 1, False, 2,
    )


def test_an_overload_that_lasts_ends_the_request_after_the_hours_of_a_hold(
    bridge: Start, monkeypatch: pytest.MonkeyPatch, fake_claude: Callable[..., FakeClaude]
) -> None:
    # No other try comes before the end.
    monkeypatch.setattr(cab, "BACK_OFF_SECONDS", (3 * 3600,))
    clock, claude = Skipped(), fake_claude()
    api = bridge(claude, spare=0, clock=clock, hold_hours=2).admin
    job_id = api.ask(script(OVERLOADED))
    waiting = waiting_body(api, job_id)
    clock.ahead = 2 * 3600 + 1
    body = api.done(job_id)
    assert (body["status"], body["errorCode"], body["attempts"]) == ("error", "overloaded", 0)
    assert body["error"] == (
        "The service is overloaded. The next try is at %s. API Error: 529 Overloaded"
        % waiting["resumesAt"]
    )
    assert "waitingFor" not in body and len(claude.prompts()) == 1


# --- tokens ---

NAME_REQUIRED = "Token name is required"
MODES = 'sessionMode must be "stateful" or "stateless"'
EXPIRY = "expiresInDays must be a whole number from 1 to 3650"
INVALID_NAMES: Tuple[Any, ...] = (
    None, {}, [], b"null", b'"x"', {"name": ""}, {"name": "  "}, {"name": 5}, {"name": None},
    {"name": ["x"]},
)
INVALID_FLAGS: Tuple[Any, ...] = ("true", 1, 0, [])
INVALID_NUMBERS: Tuple[Any, ...] = (0, -1, 1.5, 1e300, "", "many", True, [1], {})
INVALID_MODELS: Tuple[Any, ...] = (
    "haiku", [], {}, True, [""], [None], [1], ["a b"], ["-p"], ["m" * 129], ["haiku"] * 21,
)
INVALID_TOOLS: Tuple[Any, ...] = (
    "", "every", [], [""], ["Bash(a\nb)"], ["--flag"], [1], {}, True, ["Read"] * 51,
    ["Reed"], ["read"], ["wbe"], ["Read", "bash(ls:*)"], ["foo"], ["All"],
)
# (body, text of the original or None, field)
INVALID_TOKENS: Tuple[Tuple[Any, Optional[str], Optional[str]], ...] = (
    *((body, NAME_REQUIRED, "name") for body in INVALID_NAMES),
    ({"name": "x" * 101}, "Token name must be 100 characters or less", "name"),
    *(
        ({"name": "x", "sessionMode": mode}, MODES, "sessionMode")
        for mode in ("Stateful", "both", 1, True, ["stateful"])
    ),
    *(
        ({"name": "x", "expiresInDays": days}, EXPIRY, "expiresInDays")
        for days in (0, 3651, "x", -1, True, 7.5, [7], "")
    ),
    *(({"name": "x", "admin": admin}, None, "admin") for admin in INVALID_FLAGS),
    *(({"name": "x", "tools": tools}, None, "tools") for tools in INVALID_TOOLS),
    *(
        ({"name": "x", field: number}, None, field)
        for field, most in (("requestsPerMinute", 10_000), ("requestsPerDay", 1_000_000))
        for number in (*INVALID_NUMBERS, most + 1)
    ),
    *(({"name": "x", "models": models}, None, "models") for models in INVALID_MODELS),
    (b"{", None, None),
)


def test_an_invalid_new_token_is_refused_with_the_text_of_the_original_and_not_created(
    admin: Api,
) -> None:
    before = admin.get("/api/tokens").json
    for body, text, field in INVALID_TOKENS:
        answer = admin.post("/api/tokens", body)
        context = (body, answer.data)
        assert answer.status == 400 and answer.json.get("field") == field, context
        assert text is None or answer.json["error"] == text, context
        assert answer.json["code"] == ("invalid_request" if field else "invalid_json"), context
        if text is None and field:
            assert field.rstrip("s") in answer.json["error"], context
    assert admin.get("/api/tokens").json == before


def test_deep_nesting_is_refused_also_by_a_thread_with_a_small_stack(admin: Api) -> None:
    """As with musl, where the JSON reader of some versions of Python would end the process."""
    usual = threading.stack_size(512 << 10)
    try:
        for levels in (101, 100_000):
            answer = admin.post("/api/ask", b'{"message": "hi", "x": %s}' % (b"[" * levels))
            assert (answer.status, answer.json["code"]) == (400, "invalid_json")
            assert "nested too deeply" in answer.json["error"]
    finally:
        threading.stack_size(usual)


def test_a_tool_rule_with_half_a_character_is_not_an_internal_error(admin: Api) -> None:
    assert admin.post("/api/tokens", b'{"name": "x", "tools": ["Read(\\ud800)"]}').status in (
        201, 400,
    )


def test_a_new_token_has_the_body_of_the_original(admin: Api) -> None:
    answer = admin.post("/api/tokens", {"name": "bot"})
    body = answer.json
    assert (answer.status, list(body)) == (201, ["ok", "tokenId", "token", "prefix", "warning"])
    assert re.fullmatch("cab-[0-9a-f]{64}", body["token"]) and UUID.fullmatch(body["tokenId"])
    assert body["ok"] is True and body["prefix"] == body["token"][:12]
    assert body["warning"] == "Save this token now. It cannot be retrieved again."


def test_the_options_of_a_token_are_those_of_the_original(bridge: Start, clock: FakeClock) -> None:
    admin = bridge(spare=0, clock=clock).admin
    for fields, mode, days in (
        ({"sessionMode": "", "expiresInDays": None}, "stateless", None),
        ({"sessionMode": None}, "stateless", None),
        ({"sessionMode": "stateful", "expiresInDays": 1}, "stateful", 1),
        ({"expiresInDays": 7}, "stateless", 7),
        ({"expiresInDays": 30}, "stateless", 30),
        ({"expiresInDays": 90}, "stateless", 90),
    ):
        admin.new_token("  blanks around " + "x" * 80, **fields)
        token = admin.get("/api/tokens").json["tokens"][0]
        assert (token["name"], token["sessionMode"]) == ("blanks around " + "x" * 80, mode)
        assert token["expiresAt"] == (cab.iso_time(clock.now() + days * DAY) if days else None)


def test_a_whole_number_may_be_written_with_a_point(admin: Api) -> None:
    # JSON has one kind of number.
    assert admin.post("/api/tokens", b'{"name": "x", "expiresInDays": 7.0}').status == 201


def test_the_list_of_tokens_has_the_body_of_the_original_newest_first(
    bridge: Start, clock: FakeClock
) -> None:
    admin = bridge(spare=0, clock=clock).admin
    unused = admin.new_token("unused", expiresInDays=7)
    admin.new_token("used", sessionMode="stateful", tools="read").get("/api/ask/x")
    # This request writes, too, so that its answer comes after earlier uses were stored.
    assert admin.get("/health").status == 200
    answer = admin.get("/api/tokens")
    tokens = answer.json["tokens"]
    keys = [
        "id", "name", "prefix", "sessionMode", "expiresAt", "createdAt", "lastUsedAt", "isAdmin",
        "isExpired",
    ]
    assert {tuple(list(token)[:9]) for token in tokens} == {tuple(keys)}
    assert [
        (token["name"], token["sessionMode"], token["isAdmin"], token["tools"]) for token in tokens
    ] == [
        ("used", "stateful", False, "read"),
        ("unused", "stateless", False, "none"),
        ("admin", "stateless", True, "none"),
    ]
    now = cab.iso_time(clock.now())
    assert [token["lastUsedAt"] for token in tokens] == [now, None, now]
    assert tokens[1]["createdAt"] == now
    assert str(unused.token).encode() not in answer.data
    assert cab.digest(str(unused.token)).encode() not in answer.data


def test_the_limits_of_a_token_are_stored_and_listed(admin: Api) -> None:
    choices = {
        "requestsPerMinute": 10,
        "requestsPerDay": 200.0,
        "models": ["haiku", "claude-opus-4"],
    }
    limited, free = (
        admin.post("/api/tokens", {"name": "x", **choices}),
        admin.post("/api/tokens", {"name": "y", **dict.fromkeys(choices)}),
    )
    assert "warnings" not in limited.json
    listed = {
        token["id"]: {name: token[name] for name in choices}
        for token in admin.get("/api/tokens").json["tokens"]
    }
    assert listed[limited.json["tokenId"]] == choices
    assert listed[free.json["tokenId"]] == dict.fromkeys(choices)


def test_a_token_is_revoked_once(admin: Api) -> None:
    token_id = admin.post("/api/tokens", {"name": "x"}).json["tokenId"]
    answer = admin.delete("/api/tokens/" + token_id)
    assert (answer.status, answer.json) == (200, {"ok": True, "message": "Token revoked"})
    assert {
        refusal(admin.delete("/api/tokens/" + identifier))
        for identifier in (token_id, "none", "%20")
    } == {(404, "Token not found")}


def test_there_are_at_most_a_hundred_tokens_and_expired_ones_do_not_count(
    bridge: Start, clock: FakeClock
) -> None:
    admin = bridge(spare=0, clock=clock).admin
    for _ in range(99):
        admin.new_token(expiresInDays=1)
    assert refusal(admin.post("/api/tokens", {"name": "x"})) == (400, "Maximum 100 tokens allowed")
    clock.advance(DAY)
    assert admin.post("/api/tokens", {"name": "x"}).status == 201


def test_the_last_valid_admin_token_cannot_be_deleted(bridge: Start, clock: FakeClock) -> None:
    admin = bridge(spare=0, clock=clock).admin
    first = admin.get("/api/tokens").json["tokens"][0]["id"]
    last = 400, "Cannot delete the last admin token"
    assert refusal(admin.delete("/api/tokens/" + first)) == last
    admin.new_token("short", admin=True, expiresInDays=1)
    clock.advance(DAY)
    # The other admin token has expired.
    assert refusal(admin.delete("/api/tokens/" + first)) == last
    successor = admin.new_token("long", admin=True)
    assert admin.delete("/api/tokens/" + first).status == 200
    assert [admin.get("/api/tokens").status, successor.get("/api/tokens").status] == [401, 200]


# --- status ---


def test_the_status_has_the_body_of_the_original(bridge: Start, gate: Path) -> None:
    running = bridge(spare=0)
    admin = running.admin
    admin.answer("hi")
    admin.answer("die 3")
    processing(admin, gate)
    admin.ask("hi")
    body = admin.with_token(None).get("/api/status").json
    assert [list(body), list(body["queue"]), list(body["stats"])] == [
        ["status", "version", "queue", "stats"],
        ["isProcessing", "length"],
        ["totalTokens", "totalRequests", "completedRequests", "errorRequests", "queuedRequests"],
    ]
    assert body == {
        "status": "running",
        "version": cab.__version__,
        "queue": {"isProcessing": True, "length": 2},
        "stats": {
            "totalTokens": 1,
            "totalRequests": 4,
            "completedRequests": 1,
            "errorRequests": 1,
            "queuedRequests": 1,
        },
    }


def test_the_status_has_more_details_for_admins_only(bridge: Start, gate: Path) -> None:
    admin = bridge(spare=0).admin
    job_id = processing(admin, gate)
    body, public = admin.get("/api/status").json, admin.with_token(None).get("/api/status").json
    assert list(body)[:4] == list(public) == ["status", "version", "queue", "stats"]
    assert (body["worker"]["alive"], body["worker"]["requestId"]) == (True, job_id)
    assert ISO.fullmatch(body["worker"]["since"])
    assert body["claude"]["version"].startswith("2.1.330")
    assert list(admin.new_token().get("/api/status").json) == list(public)


# --- limits ---


def call_from(address: str, running: RunningBridge, path: str, **headers: str) -> Answer:
    """Send a request from another loopback address.

    Linux has all of 127.0.0.0/8; some systems have only 127.0.0.1.
    """
    connection = http.client.HTTPConnection(
        "127.0.0.1", running.port, timeout=20, source_address=(address, 0)
    )
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return Answer(
            response.status, {name.lower(): value for name, value in response.getheaders()},
            response.read(),
        )
    except OSError as error:
        missing("cannot call from %s: %s" % (address, error))
        raise
    finally:
        connection.close()


def statuses(count: int, call: Callable[[], Answer]) -> List[int]:
    """Make the call several times. -> the statuses."""
    return [call().status for _ in range(count)]


def test_authenticated_and_anonymous_callers_and_each_address_have_separate_buckets(
    bridge: Start, clock: FakeClock
) -> None:
    running = bridge(rate_limit=5, clock=clock, spare=0)
    anonymous = running.admin.with_token(None)
    assert statuses(6, lambda: anonymous.get("/api/status")) == [200] * 5 + [429]
    assert [
        anonymous.get("/none").status, anonymous.get("/dashboard").status,
        anonymous.post("/api/ask").status,
    ] == [429] * 3
    assert statuses(6, lambda: running.admin.get("/api/status")) == [200] * 5 + [429]
    assert call_from("127.0.0.2", running, "/api/status").status == 200
    assert anonymous.call("OPTIONS", "/api/ask").status == 204


def test_all_authenticated_callers_share_one_bucket_that_refills(
    bridge: Start, clock: FakeClock
) -> None:
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


def test_answers_have_rate_limit_headers_and_a_429_has_retry_after(
    bridge: Start, clock: FakeClock
) -> None:
    api = bridge(rate_limit=5, clock=clock, spare=0).admin
    names = ("ratelimit-policy", "ratelimit-limit", "ratelimit-remaining", "ratelimit-reset")
    headers = api.get("/api/status").headers
    assert [headers[name] for name in names] == ["5;w=60", "5", "4", "12"]
    statuses(4, lambda: api.get("/api/status"))
    refused = api.get("/api/status")
    assert [refused.headers[name] for name in (*names, "retry-after")] == [
        "5;w=60", "5", "0", "60", "12",
    ]
    assert refused.json == {
        "error": "Too many requests, please slow down.",
        "code": "rate_limited",
        "retryAfter": 12,
    }


def test_polls_of_the_caller_s_own_unfinished_request_do_not_use_up_the_bucket(
    bridge: Start, clock: FakeClock, gate: Path
) -> None:
    running = bridge(rate_limit=5, clock=clock, spare=0)
    api = running.admin
    job_id = api.ask("hold %s" % gate)
    assert statuses(26, lambda: api.get("/api/ask/" + job_id)) == [202] * 25 + [429]
    assert statuses(5, lambda: api.get("/api/status")) == [200] * 4 + [429]


def test_waits_and_polls_of_other_or_finished_requests_use_up_the_bucket(
    bridge: Start, clock: FakeClock, gate: Path
) -> None:
    running = bridge(rate_limit=5, clock=clock, spare=0)
    user = running.admin.new_token()
    done = user.post("/api/ask", {"message": "hi", "wait": 60}).json["requestId"]
    clock.advance(60)
    held = user.ask("hold %s" % gate)
    calls = (
        (user, "/api/ask/" + done),
        (user, "/api/ask/%s?wait=0" % held),
        (running.admin, "/api/ask/" + held),
        (user, "/api/ask/none"),
    )
    assert [api.get(path).status for api, path in calls] == [200, 202, 202, 404]
    assert user.get("/api/status").status == 429
    assert user.get("/api/ask/" + held).status == 202


def test_forged_headers_do_not_change_the_client_address(bridge: Start, clock: FakeClock) -> None:
    anonymous = bridge(rate_limit=5, clock=clock, spare=0).admin.with_token(None)
    forged = iter(range(100))
    assert statuses(
        6,
        lambda: anonymous.get(
            "/api/status",
            headers={
                name: "10.0.0.%d" % next(forged)
                for name in ("X-Forwarded-For", "X-Real-IP", "CF-Connecting-IP", "Forwarded")
            },
        ),
    ) == [200] * 5 + [429]


def test_ten_wrong_tokens_per_minute_and_address_are_checked_and_a_right_one_always(
    bridge: Start, clock: FakeClock
) -> None:
    running = bridge(rate_limit=0, clock=clock, spare=0)
    wrong = running.admin.with_token("cab-wrong")
    assert statuses(11, lambda: wrong.get("/api/tokens")) == [401] * 10 + [429]
    refused = wrong.post("/api/ask", {"message": "hi"})
    assert (refused.status, refused.headers["retry-after"], refused.json["code"]) == (
        429, "6", "rate_limited",
    )
    assert running.admin.get("/api/tokens").status == 200
    assert wrong.with_token(None).get("/api/tokens").status == 401
    assert (
        call_from("127.0.0.2", running, "/api/tokens", Authorization="Bearer cab-wrong").status
        == 401
    )
    clock.advance(6)
    assert statuses(2, lambda: wrong.get("/api/status")) == [200, 429]


def test_zero_switches_the_limits_off(bridge: Start, clock: FakeClock) -> None:
    running = bridge(rate_limit=0, clock=clock, spare=0)
    for api in (running.admin, running.admin.with_token(None)):
        answers = [api.get("/api/status") for _ in range(130)]
        assert {answer.status for answer in answers} == {200}
        assert "ratelimit-limit" not in answers[-1].headers


def test_a_full_queue_is_429_with_advice_and_the_queue_continues(bridge: Start, gate: Path) -> None:
    api = bridge(spare=0, rate_limit=1_000).admin
    for position in range(1, 51):
        assert api.post("/api/ask", {"message": "hold %s" % gate}).json["position"] == position
    full = api.post("/api/ask", {"message": "hi"})
    assert refusal(full) == (429, "Queue is full. Please try again later.")
    assert full.json["code"] == "queue_full"
    assert int(full.headers["retry-after"]) == full.json["retryAfter"] > 0
    gate.touch()
    wait_until(lambda: api.post("/api/ask", {"message": "hi"}).status == 202)


def test_a_full_queue_has_the_rate_limit_headers_too(
    bridge: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise cab.QueueFull(headers=(("Retry-After", "10"),))

    monkeypatch.setattr(cab.JobStore, "enqueue", refuse)
    answer = bridge(spare=0, rate_limit=5).admin.post("/api/ask", {"message": "hi"})
    assert (
        answer.status,
        answer.headers.get("ratelimit-limit"),
        answer.headers.get("ratelimit-remaining"),
    ) == (429, "5", "4")


# --- programs for the original: post, read requestId, poll at an interval ---


def run_polling_client(api: Api, message: str) -> str:
    """Ask and poll as in the README of the original; a body without a status is a KeyError."""
    request_id = api.post("/api/ask", {"message": message}).json["requestId"]

    def poll() -> Optional[str]:
        data = api.get("/api/ask/" + request_id).json
        if data["status"] == "error":
            raise Exception(data["error"])
        return str(data["response"]) if data["status"] == "completed" else None

    return str(wait_until(poll))


def test_a_python_program_for_the_original_gets_its_answer_or_its_error(bridge: Start) -> None:
    api = bridge().admin.new_token()
    assert run_polling_client(api, "Explain tides") == "Echo: Explain tides"
    with pytest.raises(Exception, match="out of order"):
        run_polling_client(api, "die 3 out of order")


SHELL = r"""
bridge=http://127.0.0.1:PORT auth="Authorization: Bearer cab-your-token-here"
body='{"message": "Name five commands"}'
id=$(curl -s "$bridge/api/ask" -H "$auth" -H "Content-Type: application/json" -d "$body" |
  jq -r .requestId)
until [ "$(curl -s "$bridge/api/ask/$id" -H "$auth" | jq -r .status)" = completed ]; do
  sleep 0.05
done
curl -s "$bridge/api/ask/$id" -H "$auth" | jq -r .response
"""

JAVASCRIPT = """
const headers = {
  Authorization: "Bearer cab-your-token-here",
  "Content-Type": "application/json",
};
const call = async (path, options = {}) =>
  (await fetch("http://127.0.0.1:PORT/api/ask" + path, { ...options, headers })).json();

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
    """Run an interpreter with the program on its standard input. -> the output."""
    needed = ("bash", "curl", "jq") if words[0] == "bash" else words[:1]
    for name in needed:
        if not shutil.which(name):
            missing("no %s here" % name)
    program = text.replace("PORT", str(api.port)).replace("cab-your-token-here", str(api.token))
    done = subprocess.run(
        words, input=program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_shell_program_for_the_original_gets_its_answer(bridge: Start) -> None:
    assert run_program(bridge().admin.new_token(), ["bash"], SHELL) == "Echo: Name five commands\n"


def test_a_javascript_program_for_the_original_gets_its_answer_or_its_error(bridge: Start) -> None:
    lines = run_program(
        bridge().admin.new_token(), ["node", "--input-type=module", "-"], JAVASCRIPT
    ).splitlines()
    assert lines[0] == "Echo: What does it mean?" and re.match("failed: .*out of order", lines[1])
