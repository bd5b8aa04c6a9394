"""Tests of access: every route against every kind of caller, resources of other tokens, secrets."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import pytest

import claude_api_bridge as cab
from conftest import (
    IMPORTED,
    MODULE,
    Answer,
    Api,
    FakeClaude,
    FakeClock,
    Program,
    RunningBridge,
    is_running,
    run_cli,
    wait_until,
)

Start = Callable[..., RunningBridge]
Fakes = Callable[..., FakeClaude]
DAY = 86_400.0
UNKNOWN = "00000000-0000-4000-8000-000000000000"


class Calendar(cab.Clock):
    """A clock whose date is moved by hand.

    Monotonic time is real, so that no run times out because a token expires.
    """

    def __init__(self) -> None:
        self.ahead = 0.0

    def now(self) -> float:
        return super().now() + self.ahead


# --- every route, every method, every kind of caller ---

EVERYBODY, HOLDERS, ADMINS = cab.AuthLevel.NOTHING, cab.AuthLevel.TOKEN, cab.AuthLevel.ADMIN
KINDS = ("none", "malformed", "wrong", "expired", "revoked", "other", "admin", "owner")


@dataclass(frozen=True)
class Rule:
    """The callers that may use a route, and the status they get.

    theirs: the callers that see the resource; for all others it does not exist.
    """

    needs: str
    status: int
    theirs: Tuple[str, ...] = ("other", "admin", "owner")


# Not derived from ROUTES: a new route needs a row here, and a route that requires less than its row
# fails. Status 400 shows that an empty body was read, which happens after all checks of access.
RULES: Mapping[Tuple[str, str], Rule] = {
    ("POST", "/api/ask"): Rule(HOLDERS, 400),
    ("GET", "/api/ask/:requestId"): Rule(HOLDERS, 200, ("owner", "admin")),
    ("DELETE", "/api/ask/:requestId"): Rule(HOLDERS, 409, ("owner", "admin")),
    ("GET", "/api/ask/:requestId/events"): Rule(HOLDERS, 200, ("owner", "admin")),
    ("POST", "/api/ask/:requestId/events"): Rule(HOLDERS, 200, ("owner", "admin")),
    ("GET", "/api/requests"): Rule(HOLDERS, 200),
    ("GET", "/api/requests/:requestId"): Rule(HOLDERS, 200, ("owner", "admin")),
    ("GET", "/api/conversations"): Rule(HOLDERS, 200),
    ("DELETE", "/api/conversations/:name"): Rule(HOLDERS, 200, ("owner",)),
    ("GET", "/api/usage"): Rule(HOLDERS, 200),
    ("POST", "/v1/messages"): Rule(HOLDERS, 400),
    ("POST", "/v1/messages/count_tokens"): Rule(HOLDERS, 400),
    ("POST", "/v1/chat/completions"): Rule(HOLDERS, 400),
    ("POST", "/v1/completions"): Rule(HOLDERS, 400),
    ("POST", "/v1/responses"): Rule(HOLDERS, 400),
    ("POST", "/v1/responses/input_tokens"): Rule(HOLDERS, 400),
    ("GET", "/v1/responses/:id"): Rule(HOLDERS, 200, ("owner", "admin")),
    ("DELETE", "/v1/responses/:id"): Rule(HOLDERS, 200, ("owner", "admin")),
    ("GET", "/v1/models"): Rule(HOLDERS, 200),
    ("GET", "/v1/models/:id"): Rule(HOLDERS, 200),
    ("POST", "/api/tokens"): Rule(ADMINS, 400),
    ("GET", "/api/tokens"): Rule(ADMINS, 200),
    ("PATCH", "/api/tokens/:id"): Rule(ADMINS, 400),
    ("POST", "/api/tokens/:id/rotate"): Rule(ADMINS, 200),
    ("DELETE", "/api/tokens/:id"): Rule(ADMINS, 200),
    ("POST", "/api/queue/pause"): Rule(ADMINS, 200),
    ("POST", "/api/queue/resume"): Rule(ADMINS, 200),
    ("GET", "/api/status"): Rule(EVERYBODY, 200),
    ("GET", "/health"): Rule(EVERYBODY, 200),
    ("GET", "/metrics"): Rule(ADMINS, 200),
    ("GET", "/openapi.json"): Rule(EVERYBODY, 200),
    ("GET", "/dashboard"): Rule(EVERYBODY, 200),
    ("GET", "/"): Rule(EVERYBODY, 200),
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
CODES = {
    400: "invalid_request", 401: "invalid_token", 403: "admin_required", 404: "not_found",
    405: "method_not_allowed", 409: "already_finished",
}
ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
    405: "invalid_request_error",
}


def expected(method: str, path: str, kind: str) -> Tuple[int, Optional[str]]:
    """Return the status that a caller of this kind must get, and the code of an error."""
    rule = RULES.get(("GET" if method == "HEAD" else method, path))
    if method == "OPTIONS":
        return 204, None
    if rule is None:
        return 405, CODES[405]
    if rule.needs != EVERYBODY and kind in ("none", "malformed"):
        return 401, "missing_token"
    if rule.needs != EVERYBODY and kind in ("wrong", "expired", "revoked"):
        return 401, "invalid_token"
    if rule.needs == ADMINS and kind != "admin":
        return 403, "admin_required"
    status = rule.status if rule.needs == EVERYBODY or kind in rule.theirs else 404
    return status, CODES[status] if status >= 400 else None


def expected_format(path: str, is_anthropic: bool) -> str:
    """Return the wire format in which a path must report errors."""
    if not path.startswith("/v1/"):
        return "native"
    return "anthropic" if is_anthropic or path.startswith("/v1/messages") else "openai"


def expected_refusal(
    status: int, code: str, form: str, field: str = "messages"
) -> Dict[str, Any]:
    """Return the body that an error must have, without its sentence."""
    if form == "anthropic":
        return {"type": "error", "error": {"type": ANTHROPIC_TYPES[status], "message": "..."}}
    if form == "openai":
        return {
            "error": {
                "message": "...",
                "type": "invalid_request_error",
                "param": field if status == 400 else None,
                "code": "invalid_api_key" if status == 401 else code,
            }
        }
    return {"error": "...", "code": code}


def without_words(body: Any) -> Any:
    """Return an error body with its sentence replaced; check that it has a sentence."""
    where = body["error"] if isinstance(body["error"], dict) else body
    name = "message" if where is not body else "error"
    assert isinstance(where[name], str) and where[name], body
    where[name] = "..."
    body.pop("field", None)
    return body


class Connection:
    """A connection that stays open over many calls.

    It is several times cheaper than one connection per call.
    """

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.connection.close()

    def call(
        self, method: str, path: str, headers: Mapping[str, str], body: Optional[bytes] = None
    ) -> Answer:
        self.connection.request(method, path, body, dict(headers))
        response = self.connection.getresponse()
        return Answer(
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            response.read(),
        )


@pytest.fixture
def many_logins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the limit of failed log-ins: these tests check access only."""
    monkeypatch.setattr(cab, "LOGINS_PER_MINUTE", 100_000)


@dataclass(frozen=True)
class Cast:
    """The callers: the secret of every kind of caller, None if it sends none."""

    secrets: Mapping[str, Optional[str]]
    apis: Mapping[str, Api]
    request_id: str
    running: RunningBridge

    def headers(self, kind: str, is_key: bool) -> Dict[str, str]:
        """is_key: send the secret in x-api-key, as Anthropic's clients do."""
        if kind == "malformed":
            if is_key:
                return {"x-api-key": "  "}
            return {"Authorization": "Basic " + str(self.secrets["owner"])}
        secret = self.secrets[kind]
        if secret is None:
            return {}
        return {"x-api-key": secret} if is_key else {"Authorization": "Bearer " + secret}

    def path(self, path: str) -> str:
        """Return a path that names a resource of the owner."""
        if ":id" in path and path.startswith("/api/tokens"):
            rows = self.apis["admin"].get("/api/tokens").json["tokens"]
            victim = [row["id"] for row in rows if row["name"] == "victim"]
            if not victim:
                self.apis["admin"].new_token("victim")
                return self.path(path)
            return path.replace(":id", str(victim[0]))
        if path.startswith("/v1/responses/:id"):
            owner = self.apis["owner"]
            requests = owner.get("/api/requests?q=stored").json["requests"]
            stored = ["resp_" + row["requestId"].replace("-", "") for row in requests[:1]]
            if not stored or owner.get("/v1/responses/" + stored[0]).status == 404:
                owner.post("/v1/responses", {"input": "stored"})
                return self.path(path)
            return path.replace(":id", stored[0])
        return (
            path.replace(":requestId", self.request_id)
            .replace(":name", "default")
            .replace(":id", "haiku")
        )


@pytest.fixture
def cast(bridge: Start, many_logins: None) -> Cast:
    """Return a bridge with one caller of every kind.

    The owner has a finished request and a conversation.
    """
    calendar = Calendar()
    running = bridge(clock=calendar)
    admin = running.admin
    expired = admin.new_token("expired", admin=True, expiresInDays=1)
    revoked = admin.new_token("revoked", admin=True)
    calendar.ahead = 2 * DAY
    listed = {row["name"]: row["id"] for row in admin.get("/api/tokens").json["tokens"]}
    assert admin.delete("/api/tokens/" + listed["revoked"]).status == 200
    owner, other = (admin.new_token(name, sessionMode="stateful") for name in ("owner", "other"))
    request_id = owner.ask("hello")
    owner.done(request_id)
    secrets: Dict[str, Optional[str]] = {
        "none": None, "malformed": None, "wrong": "cab-" + "0" * 64, "expired": expired.token,
        "revoked": revoked.token, "other": other.token, "admin": admin.token, "owner": owner.token,
    }
    return Cast(secrets, {"admin": admin, "owner": owner, "other": other}, request_id, running)


def test_every_route_has_its_rule_here_and_asks_for_what_the_rule_says() -> None:
    assert {(route.method, route.path): route.auth for route in cab.ROUTES} == {
        key: rule.needs for key, rule in RULES.items()
    }


def test_every_route_answers_every_kind_of_caller_as_its_rule_says(cast: Cast) -> None:
    """Call every path of ROUTES with every method, as every kind of caller, in every format."""
    wrong: List[Any] = []
    paths = list(dict.fromkeys(route.path for route in cab.ROUTES))
    with Connection(cast.running.port) as connection:
        for path in paths:
            for is_anthropic in (False, True) if path.startswith("/v1/") else (False,):
                for method in METHODS:
                    for kind in KINDS:
                        actual = outcome(cast, connection, method, path, kind, is_anthropic)
                        status, code = expected(method, path, kind)
                        form = expected_format(path, is_anthropic)
                        field = "prompt" if path == "/v1/completions" else "messages"
                        required = (
                            status,
                            expected_refusal(
                                status, code, form, "input" if "/resp" in path else field
                            )
                            if code and method != "HEAD"
                            else None,
                            "Bearer" if status == 401 else None,
                        )
                        if actual != required:
                            wrong.append((method, path, kind, form, actual, required))
    assert not wrong, "\n".join(map(repr, wrong))


def outcome(
    cast: Cast, connection: Connection, method: str, path: str, kind: str, is_anthropic: bool
) -> Tuple[int, Any, Optional[str]]:
    """Return (status, the body of an error without its sentence, WWW-Authenticate)."""
    headers = cast.headers(kind, is_key=is_anthropic)
    if is_anthropic:
        headers["anthropic-version"] = "2023-06-01"
    answer = connection.call(
        method, cast.path(path), headers, b"{}" if method in ("POST", "PUT", "PATCH") else None
    )
    if method == "HEAD" or answer.status == 204:
        assert answer.data == b""
    body = without_words(answer.json) if answer.status >= 400 and method != "HEAD" else None
    return answer.status, body, answer.headers.get("www-authenticate")


@pytest.mark.parametrize(
    "value",
    (
        "", "Bearer", "Bearer ", "Bearer  \t", "Basic %s", "%s", "Bearer\t%s", "Bearer: %s",
        'Bearer "%s"', "Bearer %s x", "Bearer %s,", "Bearer Bearer %s", "Token %s", "bearer=%s",
        "Bearer %s%s", "Bearer ' OR 1=1 --", "Bearer %%", "Bearer \u00e9\u00ff",
    ),
)
def test_a_malformed_authorization_header_is_refused(bridge: Start, value: str) -> None:
    api = bridge().admin
    sent = value.replace("%s", str(api.token))
    for path in ("/api/requests", "/api/tokens", "/metrics", "/v1/models"):
        answer = api.with_token(None).get(path, headers={"Authorization": sent})
        assert answer.status == 401 and str(api.token)[12:].encode() not in answer.data


def test_a_token_in_the_url_a_cookie_or_the_body_is_ignored(bridge: Start) -> None:
    api = bridge().admin
    stranger, secret = api.with_token(None), str(api.token)
    for name in ("token", "access_token", "api_key", "key", "authorization"):
        assert stranger.get("/api/requests?%s=%s" % (name, secret)).status == 401
    assert stranger.get("/api/requests", headers={"Cookie": "token=%s" % secret}).status == 401
    headers = {"Proxy-Authorization": "Bearer " + secret}
    assert stranger.get("/api/requests", headers=headers).status == 401
    body = {"message": "hi", "token": secret, "authorization": "Bearer " + secret}
    assert stranger.post("/api/ask", body).status == 401


# --- tokens that end during a request ---


def revoke(admin: Api, name: str) -> None:
    """Revoke the token with this name."""
    listed = [row["id"] for row in admin.get("/api/tokens").json["tokens"] if row["name"] == name]
    assert admin.delete("/api/tokens/" + listed[0]).status == 200


def running_child(fake: FakeClaude) -> int:
    """Return the pid of the process that was started last, once its turn has started."""
    wait_until(lambda: fake.prompts())
    return int(fake.children()[-1]["pid"])


def chat(text: str, **more: Any) -> Dict[str, Any]:
    return {
        "model": "haiku", "max_tokens": 100, "messages": [{"role": "user", "content": text}],
        **more,
    }


class Reader(threading.Thread):
    """A thread that makes one call."""

    def __init__(self, call: Callable[[], Answer]) -> None:
        super().__init__(name="reader", daemon=True)
        self._call = call
        self.answer: Optional[Answer] = None
        self.start()

    def run(self) -> None:
        self.answer = self._call()

    def result(self) -> Answer:
        self.join(30)
        assert self.answer is not None
        return self.answer


# What is open when the token ends -> how it is opened (FILE: the file that a run waits for; ID: a
# running request), and what its answer then contains.
OPEN: Mapping[str, Tuple[str, str, Optional[Mapping[str, Any]], bytes]] = {
    "long poll": ("GET", "/api/ask/ID?wait=90", None, b'"code":"invalid_token"'),
    "events": ("GET", "/api/ask/ID/events", None, b'"code":"invalid_token"'),
    "events by POST": ("POST", "/api/ask/ID/events", {}, b'"code":"invalid_token"'),
    "ask and wait": (
        "POST", "/api/ask", {"message": "hold FILE", "wait": 90}, b'"code":"invalid_token"',
    ),
    "ask and stream": (
        "POST", "/api/ask", {"message": "hold FILE", "stream": True}, b'"code":"invalid_token"',
    ),
    "messages": ("POST", "/v1/messages", chat("hold FILE"), b'"authentication_error"'),
    "streamed messages": (
        "POST", "/v1/messages", chat("hold FILE", stream=True), b'"authentication_error"',
    ),
    "completions": ("POST", "/v1/chat/completions", chat("hold FILE"), b'"invalid_api_key"'),
    "streamed completions": (
        "POST", "/v1/chat/completions", chat("hold FILE", stream=True), b'"invalid_api_key"',
    ),
}
EXPIRES = "the token expires"
REVOKED = "the token is revoked"


@pytest.mark.parametrize("how", (REVOKED, EXPIRES))
@pytest.mark.parametrize("what", OPEN)
def test_open_requests_end_with_their_token(
    bridge: Start,
    fake_claude: Fakes,
    gate: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    how: str,
) -> None:
    # A revocation notifies at once, without the next re-check; only a re-check notices an expiry.
    monkeypatch.setattr(cab, "RECHECK_SECONDS", 60.0 if how == REVOKED else 0.05)
    fake, calendar = fake_claude(), Calendar()
    running = bridge(claude=fake, clock=calendar)
    app = running.admin.new_token("app", expiresInDays=1)
    method, path, body, content = OPEN[what]
    request_id = app.ask("hold %s" % gate) if "ID" in path else ""
    sent = None if body is None else json.loads(json.dumps(body).replace("FILE", str(gate)))
    reader = Reader(lambda: app.call(method, path.replace("ID", request_id), sent))
    pid = running_child(fake)

    def names_in_use() -> List[str]:
        rows = running.admin.get("/api/tokens").json["tokens"]
        return [row["name"] for row in rows if row["lastUsedAt"]]

    wait_until(lambda: "app" in names_in_use())
    wait_until(lambda: open_streams(running))
    if how == REVOKED:
        revoke(running.admin, "app")
    else:
        calendar.ahead = 2 * DAY
    answer = reader.result()
    assert content in answer.data and b"held" not in answer.data, answer
    assert app.get("/api/requests").status == 401
    # Others may still read the result of a request, as an admin can; such a run continues.
    if how == REVOKED or "/v1/" in path:
        wait_until(lambda: not is_running(pid))
    assert not gate.exists()


def open_streams(running: RunningBridge) -> int:
    """Return the number of streams and waits that the service counts as open."""
    return sum(service_of(running).slots._by_token.values())


def service_of(running: RunningBridge) -> cab.Service:
    return running.bridge._server.dispatcher._service


@pytest.mark.parametrize("what", ("long poll", "events"))
@pytest.mark.parametrize("how", (REVOKED, EXPIRES))
def test_an_admin_that_follows_a_request_is_cut_off_when_its_own_token_ends(
    bridge: Start,
    gate: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    how: str,
) -> None:
    monkeypatch.setattr(cab, "RECHECK_SECONDS", 0.05)
    calendar = Calendar()
    running = bridge(clock=calendar)
    request_id = running.admin.ask("hold %s" % gate)
    second = running.admin.new_token("second", admin=True, expiresInDays=1)
    reader = Reader(lambda: second.get(OPEN[what][1].replace("ID", request_id)))
    wait_until(lambda: open_streams(running))
    if how == REVOKED:
        revoke(running.admin, "second")
    else:
        calendar.ahead = 2 * DAY
    assert b'"code":"invalid_token"' in reader.result().data
    assert not gate.exists()
    assert running.admin.poll(request_id)["status"] in ("queued", "processing")


def test_an_expired_token_is_noticed_while_text_keeps_arriving(
    bridge: Start, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader takes longer to process a piece than the next one takes to arrive."""
    monkeypatch.setattr(cab, "RECHECK_SECONDS", 0.05)
    calendar = Calendar()
    running = bridge(clock=calendar)
    app = running.admin.new_token("app", expiresInDays=1)
    service = service_of(running)
    request_id = app.ask("hold %s" % gate)
    live = wait_until(lambda: service._running.live(request_id))
    events = service.follow(service.authenticate(str(app.token)), request_id)
    until = time.monotonic() + 20
    with contextlib.closing(events), pytest.raises(cab.InvalidToken):  # type: ignore[type-var]
        while time.monotonic() < until:
            live.add("x")
            next(events)
            calendar.ahead = 2 * DAY


@pytest.mark.parametrize(
    "path, body",
    (
        ("/api/tokens", {"name": "backdoor", "admin": True}),
        ("/api/ask", {"message": "late"}),
        ("/v1/messages", chat("late")),
        ("/v1/chat/completions", chat("late")),
    ),
)
@pytest.mark.parametrize("how", (REVOKED, EXPIRES))
def test_a_token_that_ends_during_its_request_body_has_no_effect(
    bridge: Start, how: str, path: str, body: Any
) -> None:
    calendar = Calendar()
    running = bridge(clock=calendar)
    second = running.admin.new_token("second", admin=True, expiresInDays=1)
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", running.port), 30) as connection:
        connection.sendall(
            (
                "POST %s HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n"
                "Content-Length: %d\r\nExpect: 100-continue\r\n"
                "Connection: close\r\n\r\n" % (path, second.token, len(data))
            ).encode()
        )
        # The token has been checked by now.
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        if how == REVOKED:
            revoke(running.admin, "second")
        else:
            calendar.ahead = 2 * DAY
        connection.sendall(data)
        with connection.makefile("rb") as file:
            assert b" 401 " in file.readline()
    assert "backdoor" not in [
        row["name"] for row in running.admin.get("/api/tokens").json["tokens"]
    ]
    assert running.admin.get("/api/requests").json["requests"] == []


TOOL = {"name": "add", "description": "adds", "input_schema": {"type": "object"}}
CALLING = chat('call [["add", {}]]', tools=[TOOL])


def answered(call_id: str, **more: Any) -> Dict[str, Any]:
    """Return the conversation of CALLING continued with the client's result for this call."""
    return {
        **CALLING,
        "messages": [
            *CALLING["messages"],
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": call_id, "name": "add", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": call_id, "content": "41"}],
            },
        ],
        **more,
    }


def test_a_process_that_awaits_tool_results_ends_with_its_token(
    bridge: Start, fake_claude: Fakes
) -> None:
    fake = fake_claude()
    running = bridge(claude=fake)
    app = running.admin.new_token("app")
    assert app.post("/v1/messages", CALLING).json["stop_reason"] == "tool_use"
    pid = int(fake.children()[-1]["pid"])
    assert is_running(pid)
    revoke(running.admin, "app")
    wait_until(lambda: not is_running(pid), 20)


def test_the_warm_process_of_a_conversation_ends_with_its_token(
    bridge: Start, fake_claude: Fakes
) -> None:
    fake = fake_claude()
    running = bridge(claude=fake)
    running.admin.new_token("app", sessionMode="stateful").answer("hello")
    pid = int(fake.children()[-1]["pid"])
    assert is_running(pid)
    revoke(running.admin, "app")
    wait_until(lambda: not is_running(pid), 20)


# --- resources of other tokens ---


def bare(answer: Answer, *names: str) -> Tuple[int, List[Tuple[str, str]], bytes]:
    """Return an answer without its date, its remaining limits and random names.

    names: names that the answer may echo; they are replaced.
    """
    left_out = ("date", "ratelimit-remaining", "ratelimit-reset", "request-id", "x-request-id")
    headers = [(name, value) for name, value in answer.headers.items() if name not in left_out]
    data = answer.data
    for name in names:
        data = data.replace(name.encode(), b"NAME")
    return answer.status, headers, data


ACTS: Tuple[Tuple[str, str, Optional[Dict[str, Any]]], ...] = (
    ("GET", "/api/ask/ID", None),
    ("HEAD", "/api/ask/ID", None),
    ("GET", "/api/ask/ID?wait=20", None),
    ("GET", "/api/ask/ID?wait=x", None),
    ("GET", "/api/ask/ID/events", None),
    ("GET", "/api/ask/ID/events?after=3", None),
    ("POST", "/api/ask/ID/events", {}),
    ("HEAD", "/api/ask/ID/events", None),
    ("DELETE", "/api/ask/ID", None),
    ("PUT", "/api/ask/ID", None),
    ("DELETE", "/api/conversations/ID", None),
    ("DELETE", "/api/tokens/ID", None),
    ("PATCH", "/api/tokens/ID", {"name": "mine"}),
    ("POST", "/api/tokens/ID/rotate", None),
)


@pytest.mark.parametrize("state", ("queued", "processing", "completed", "error"))
def test_anothers_things_are_the_same_bytes_as_unknown_ones(
    bridge: Start, gate: Path, state: str
) -> None:
    running = bridge(rate_limit=1_000)
    owner, other = (
        running.admin.new_token(name, sessionMode="stateful") for name in ("owner", "other")
    )
    if state == "queued":
        running.admin.ask("hold %s" % gate)
    message = {"error": "die 1 x", "completed": "hello"}.get(state, "hold %s" % gate)
    request_id = owner.ask(message, conversation="talk")
    wait_until(lambda: owner.poll(request_id)["status"] == state)
    token_id = next(
        row["id"]
        for row in running.admin.get("/api/tokens").json["tokens"]
        if row["name"] == "owner"
    )
    for method, path, body in ACTS:
        own, unknown = request_id, UNKNOWN
        if "conversations" in path:
            own, unknown = "talk", "tali"
        elif "tokens" in path:
            own = token_id
        foreign, missing = (
            other.call(method, path.replace("ID", name), body) for name in (own, unknown)
        )
        assert bare(foreign, own) == bare(missing, unknown), (method, path)
        assert foreign.status in (400, 403, 404, 405)
    assert owner.poll(request_id)["status"] == state
    assert [row["name"] for row in owner.get("/api/conversations").json["conversations"]] == [
        "talk"
    ]


def test_an_idempotency_key_belongs_to_one_token(bridge: Start) -> None:
    running = bridge(rate_limit=1_000)
    owner, other = running.admin.new_token("owner"), running.admin.new_token("other")
    key = {"Idempotency-Key": "order-1"}
    own = owner.post("/api/ask", {"message": "hello"}, headers=key).json["requestId"]
    owner.done(own)
    for message, name in (("hello", "order-1"), ("hello", "order-2"), ("different", "order-3")):
        answer = other.post("/api/ask", {"message": message}, headers={"Idempotency-Key": name})
        assert (answer.status, "idempotent-replayed" in answer.headers) == (202, False)
        assert answer.json["requestId"] != own
        assert other.done(answer.json["requestId"])["response"] == "Echo: " + message
    again = owner.post("/api/ask", {"message": "hello"}, headers=key)
    assert (again.json["requestId"], again.headers["idempotent-replayed"]) == (own, "true")
    # The conflict is with its own request, not with the owner's.
    assert other.post("/api/ask", {"message": "unlike"}, headers=key).status == 409


def test_no_cursor_or_filter_shows_requests_of_another_token(bridge: Start) -> None:
    running = bridge()
    owner, other = running.admin.new_token("owner"), running.admin.new_token("other")
    own, theirs = [], []
    for n in range(3):
        own.append(owner.ask("secret plan %d" % n))
        theirs.append(other.ask("mine %d" % n))
    for request_id in theirs:
        other.done(request_id)
    cursor = owner.get("/api/requests?limit=1").json["next"]
    queries = ["?before=%d" % n for n in range(1, 9)] + [
        "?before=" + cursor, "?before=%s&limit=100" % cursor, "?status=completed,queued",
        "?tokenId=x", "?q=secret", "?q=plan&status=completed", "?token=other", "?since=2020-01-01",
        "?model=model", "?limit=100&admin=1",
    ]
    seen = set()
    for query in queries:
        answer = other.get("/api/requests" + query)
        assert b"secret plan" not in answer.data
        seen |= {row["requestId"] for row in answer.json["requests"]}
    assert seen == set(theirs)
    ids = {token["name"]: token["id"] for token in running.admin.get("/api/tokens").json["tokens"]}
    for name in ("owner", ids["owner"], "cab-"):
        assert other.get("/api/requests?token=" + name).status == 404


def test_two_tokens_may_use_the_same_conversation_name(bridge: Start) -> None:
    running = bridge()
    owner, other = (
        running.admin.new_token(name, sessionMode="stateful") for name in ("owner", "other")
    )
    owner.answer("my secret", conversation="talk")
    other.answer("hello", conversation="talk")
    assert "my secret" not in other.answer("turns", conversation="talk")["response"]
    assert other.delete("/api/conversations/talk").status == 200
    assert "my secret" in owner.answer("turns", conversation="talk")["response"]


def test_a_pending_tool_call_of_another_token_answers_like_an_unknown_one(
    bridge: Start, fake_claude: Fakes
) -> None:
    fake = fake_claude()
    running = bridge(claude=fake)
    owner, other = running.admin.new_token("owner"), running.admin.new_token("other")
    called = owner.post("/v1/messages", CALLING).json
    call_id, pid = called["content"][1]["id"], int(fake.children()[-1]["pid"])
    foreign, missing = (
        other.post("/v1/messages", answered(name)) for name in (call_id, "toolu_unknown")
    )
    names = [answer.json["id"] for answer in (foreign, missing)]
    assert bare(foreign, names[0]) == bare(missing, names[1]) and foreign.status == 200
    assert int(fake.children()[-1]["pid"]) != pid and is_running(pid)
    assert "41" in owner.post("/v1/messages", answered(call_id)).json["content"][0]["text"]
    # The owner's turn continued in the process that waited.
    assert len(fake.children()) == 3


def test_an_ordinary_token_learns_nothing_about_others_from_statistics_and_pages(
    bridge: Start,
) -> None:
    running = bridge()
    owner, other = running.admin.new_token("secret-project"), running.admin.new_token("other")
    request_id = owner.ask("hello")
    owner.done(request_id)
    ids = [
        row["id"]
        for row in running.admin.get("/api/tokens").json["tokens"]
        if row["name"] != "other"
    ]
    stranger = other.with_token(None)
    for path in (
        "/api/usage", "/api/status", "/api/requests", "/api/conversations", "/v1/models",
        "/openapi.json", "/dashboard", "/", "/health", "/metrics", "/api/tokens",
    ):
        data = other.get(path).data
        for name in ("secret-project", request_id, *ids):
            assert name.encode() not in data, path
        if path in ("/openapi.json", "/", "/health", "/api/status"):
            assert data == stranger.get(path).data, path
    assert other.get("/api/usage").json["tokens"] == []
    assert "worker" in running.admin.get("/api/status").json
    assert "worker" not in other.get("/api/status").json


# --- log-ins ---


def test_a_token_is_looked_up_by_its_digest_and_its_secret_is_never_compared(bridge: Start) -> None:
    """SQL compares digests only.

    The time of a comparison does not help to find a token with that digest.
    """
    running = bridge()
    statements: List[str] = []
    database = service_of(running).stores.database
    database._reader.set_trace_callback(statements.append)
    database._db.set_trace_callback(statements.append)
    wrong = "cab-" + "ab" * 32
    assert running.admin.with_token(wrong).get("/api/requests").status == 401
    assert running.admin.get("/api/requests").status == 200
    sql = "\n".join(statements)
    for secret in (wrong, str(running.admin.token)):
        assert hashlib.sha256(secret.encode()).hexdigest() in sql and secret[4:20] not in sql


def test_the_program_compares_no_secret_with_an_operator() -> None:
    """A comparison with == ends at the first character that differs.

    `content_digest` is no secret: it compares a message with one of the same token.
    """
    secret = re.compile(
        r"secret|token_hash|token_digest|\b(hex)?digest\(|bearer\(|password|api_?key\b|signature",
        re.IGNORECASE,
    )
    comparisons = []
    for node in ast.walk(ast.parse(MODULE.read_text("utf-8"))):
        if isinstance(node, ast.Compare) and any(
            isinstance(operator, (ast.Eq, ast.NotEq, ast.In, ast.NotIn)) for operator in node.ops
        ):
            sides = [node.left, *node.comparators]
            if any(
                secret.search(ast.unparse(side)) and not isinstance(side, ast.Constant)
                for side in sides
            ):
                comparisons.append((node.lineno, ast.unparse(node)))
    assert comparisons == []


FORGED = (
    "CF-Connecting-IP", "X-Forwarded-For", "X-Real-IP", "Forwarded", "True-Client-IP",
    "X-Client-IP",
)


@pytest.mark.parametrize("tunnel", (False, True), ids=("direct", "through the tunnel"))
def test_failed_log_ins_are_limited_per_address_despite_forged_headers(
    bridge: Start, clock: FakeClock, tunnel: bool
) -> None:
    running = bridge(clock=clock, rate_limit=1_000)
    app, wrong = running.admin.new_token("app"), running.admin.with_token("cab-" + "0" * 64)
    name = "calm-sea.trycloudflare.com"
    if tunnel:
        policy = cab.HostPolicy((), lambda: frozenset((name,)))
        running.bridge._server.dispatcher._hosts = policy
    own = {"Host": name, "CF-Connecting-IP": "203.0.113.9"} if tunnel else {}

    def tried(n: int, **more: str) -> int:
        forged = {
            header: "198.51.100.%d" % n for header in FORGED if not (tunnel and header in own)
        }
        return wrong.get(
            ("/api/requests", "/health", "/v1/models")[n % 3], headers={**forged, **own, **more}
        ).status

    first = [tried(n) for n in range(10)]
    assert first == [200 if n % 3 == 1 else 401 for n in range(10)]
    for n in range(10, 40):
        assert tried(n) == 429
        # the same address, with a token
        assert app.get("/api/requests", headers=own).status == 200
    refused = wrong.get("/v1/messages", headers=own)
    assert (refused.status, refused.headers["retry-after"], "0" * 20 in refused.data.decode()) == (
        429, "6", False,
    )
    if tunnel:
        another_client = {**own, "CF-Connecting-IP": "203.0.113.10"}
        assert wrong.get("/api/requests", headers=another_client).status == 401
    clock.advance(6)
    assert [tried(n) for n in (0, 3)] == [401, 429]
    clock.advance(60)
    assert [tried(0) for _ in range(11)] == [401] * 10 + [429]


def test_a_flood_of_strangers_locks_nobody_out_who_has_a_token(
    bridge: Start, clock: FakeClock
) -> None:
    running = bridge(clock=clock, rate_limit=5)
    app, stranger, seen = running.admin.new_token("app"), running.admin.with_token(None), []
    with Connection(running.port) as connection:
        for n in range(300):
            sent = {header: "198.51.100.%d" % (n % 250) for header in FORGED}
            sent.update({"Authorization": "Bearer cab-%064d" % n} if n % 2 else {})
            seen.append(
                connection.call(
                    "GET", ("/api/status", "/api/requests", "/nothing", "/")[n % 4], sent
                ).status
            )
    assert seen[-200:] == [429] * 200 and seen.count(429) >= 300 - 15
    # Token holders have 5 a minute; one of these created the token.
    assert [app.get("/api/requests").status for _ in range(4)] == [200] * 4
    assert stranger.get("/api/status").status == 429


def test_streams_of_all_tokens_leave_connections_for_an_admin(
    bridge: Start, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "CONNECTIONS", 8)
    monkeypatch.setattr(cab, "MAX_STREAMS_PER_TOKEN", 4)
    monkeypatch.setattr(cab, "MAX_STREAMS", 6)
    running = bridge()
    apps = [running.admin.new_token(name) for name in ("one", "two", "three")]
    asked = [app.ask("hold %s" % gate) for app in apps]
    readers: List[Reader] = []
    for n in range(8):
        before = open_streams(running)
        path = "/api/ask/%s?wait=90" % asked[n // 3]
        readers.append(Reader(functools.partial(apps[n // 3].get, path)))
        wait_until(lambda: open_streams(running) > before or not readers[-1].is_alive())
    assert [reader.result().status for reader in readers[6:]] == [429, 429]
    for name in ("one", "two", "three"):
        revoke(running.admin, name)
    assert [reader.result().status for reader in readers[:6]] == [401] * 6


# --- secrets ---


def is_in(secret: str, data: bytes) -> bool:
    """Return whether data contains a secret or a useful part of it.

    The first 12 characters are the public prefix.
    """
    return secret[12:28].encode() in data or secret[-16:].encode() in data


def read_proc(pid: int, name: str) -> bytes:
    """Return a file of a process in /proc; empty if the process has ended."""
    with contextlib.suppress(OSError):
        return Path("/proc/%d/%s" % (pid, name)).read_bytes()
    return b""


def descendants(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants (Linux)."""
    yield pid
    # A thread or a process may end meanwhile.
    with contextlib.suppress(OSError):
        for task in os.listdir("/proc/%d/task" % pid):
            for child in read_proc(pid, "task/%s/children" % task).split():
                yield from descendants(int(child))


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at /proc")


@needs_proc
def test_no_secret_is_in_what_the_program_writes_says_or_shows(
    program: Callable[..., Program], fake_claude: Fakes, gate: Path, tmp_path: Path
) -> None:
    fake, tunnel_token = fake_claude(), "ZZ" + "tunneltoken" * 3
    started = program(
        "--rate-limit", "0", claude=fake.path,
        environ={"CAB_TUNNEL_TOKEN": tunnel_token, "CAB_TOKEN": "cab-" + "5" * 64},
    )
    admin, secrets = started.api, [started.token, "cab-" + "0" * 64]
    for fields in (
        {}, {"admin": True}, {"sessionMode": "stateful"}, {"tools": "read"}, {"expiresInDays": 1},
    ):
        secrets.append(str(admin.new_token("app-%d" % len(secrets), **fields).token))
    made = run_cli(
        "token", "create", "typed", "--json", "--data-dir", str(tmp_path / "data"), home=tmp_path
    )
    secrets.append(json.loads(made.stdout)["token"])
    outputs: Dict[str, bytes] = {}
    for n, secret in enumerate(secrets):
        api = admin.with_token(secret)
        for path in (
            "/api/tokens", "/metrics", "/openapi.json", "/dashboard", "/api/status",
            "/api/requests", "/api/usage", "/nothing", "/api/ask/" + UNKNOWN, "/v1/nothing",
            "/v1/models/x", "/api/requests?limit=x", "/health",
        ):
            outputs["%s as %d" % (path, n)] = api.get(path).data
        for body in (b"{", b'{"message": 5}', b'{"messages": 5}'):
            for path in ("/api/ask", "/v1/messages", "/v1/chat/completions", "/api/tokens"):
                outputs["%s %r as %d" % (path, body, n)] = api.post(path, body).data
        api.post("/api/ask", {"message": "hello"})
    # A head that is refused before the token is checked.
    with socket.create_connection(("127.0.0.1", started.port), 10) as connection:
        connection.sendall(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\nbad line\r\n\r\n"
            % secrets[0].encode()
        )
        with connection.makefile("rb") as file:
            outputs["malformed"] = file.read()
    wait_until(
        lambda: all(
            row["status"] == "completed" for row in admin.get("/api/requests").json["requests"]
        ),
        30,
    )
    held_id = admin.with_token(secrets[2]).ask("hold %s" % gate)
    wait_until(lambda: "partial" in admin.poll(held_id))
    for pid in descendants(started.process.pid):
        outputs["argv of %d" % pid] = words = read_proc(pid, "cmdline")
        # The environment of the bridge itself, and of a fork of it, contains the secrets it was
        # started with.
        if words != outputs["argv of %d" % started.process.pid]:
            outputs["environ of %d" % pid] = read_proc(pid, "environ")
    seen = [
        pid
        for pid in descendants(started.process.pid)
        if b"stream-json" in outputs.get("argv of %d" % pid, b"")
    ]
    assert seen and outputs["environ of %d" % seen[0]]
    files = {
        str(path): path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()
    }
    assert {"bridge.db", "bridge.db-wal"} <= {Path(name).name for name in files}
    gate.touch()
    admin.done(held_id)
    started.process.send_signal(signal.SIGTERM)
    assert started.process.stdout is not None
    later = started.lines[started.lines.index(started.token) + 1 :]
    outputs["stdout after the token"] = "\n".join(later).encode() + started.process.stdout.read()
    assert started.process.wait(20) == 0
    outputs["stderr"] = started.stderr.encode()
    outputs["noted by claude"] = b"".join(path.read_bytes() for path in fake.folder.glob("*.jsonl"))
    outputs.update(files)
    outputs.update(
        {
            "after the end: " + str(path): path.read_bytes()
            for path in (tmp_path / "data").rglob("*")
            if path.is_file()
        }
    )
    secrets += [tunnel_token, "cab-" + "5" * 64]
    assert [
        (name, secret[:12])
        for name, data in outputs.items()
        for secret in secrets
        if is_in(secret, data)
    ] == []
    digest = hashlib.sha256(secrets[0].encode()).hexdigest().encode()
    # The check does find what is there.
    assert any(digest in data for data in files.values())


def test_an_unexpected_error_reveals_no_token_to_the_log_or_the_caller(
    bridge: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = bridge()
    secret = str(running.admin.token)

    def breaks(*args: Any, **more: Any) -> Any:
        raise RuntimeError(
            "met %s and Bearer %s, %r"
            % (secret, secret, {"authorization": ("Bearer " + secret).encode()})
        )

    broken: Tuple[Tuple[str, Any, str], ...] = (
        ("/api/requests", cab.Service, "jobs"),
        ("/api/usage", cab.UsageStore, "by_day"),
        ("/api/conversations", cab.ConversationStore, "list"),
        ("/v1/models", cab.Service, "models"),
        ("/api/tokens", cab.TokenStore, "list"),
        ("/api/status", cab.JobStore, "counts"),
        ("/api/ask/" + secret, cab.Service, "poll"),
        # Comes last: no request passes it.
        ("/health", cab.Service, "authenticate"),
    )
    for path, owner, name in broken:
        monkeypatch.setattr(owner, name, breaks)
        answer = running.admin.get(path)
        assert answer.status == 500 and not is_in(secret, answer.data), path
    logged = "\n".join(running.log)
    assert logged.count("RuntimeError: met") == len(broken)
    assert not is_in(secret, logged.encode())


def test_the_list_of_tokens_shows_no_secret_and_no_digest(bridge: Start) -> None:
    admin = bridge().admin
    secret = str(admin.new_token("app").token)
    for path in ("/api/tokens", "/api/status", "/api/usage", "/metrics"):
        data = admin.get(path).data
        for hidden in (secret[12:], secret, hashlib.sha256(secret.encode()).hexdigest()):
            assert hidden.encode() not in data
    assert secret[:12].encode() in admin.get("/api/tokens").data


@needs_proc
def test_no_core_file_can_hold_a_secret(program: Callable[..., Program], gate: Path) -> None:
    """Core files are off for the bridge and its processes, whatever its shell allows."""
    allowing = ("/bin/sh", "-c", 'ulimit -S -c "$(ulimit -H -c)"; exec "$@"', "sh")
    started = program(command=(*allowing, *IMPORTED))
    started.api.ask("hold %s" % gate)
    child = wait_until(
        lambda: [
            pid
            for pid in descendants(started.process.pid)
            if b"stream-json" in read_proc(pid, "cmdline")
        ]
    )[0]
    for pid in (started.process.pid, child):
        match = re.search(rb"Max core file size +(\S+)", read_proc(pid, "limits"))
        assert match and match.group(1) == b"0"
