"""Tests of the bridge over the real `claude`, against a stand-in for the Messages API.

    npm install @anthropic-ai/claude-code
    CAB_TEST_CLAUDE=node_modules/.bin/claude python -m pytest tests/test_real.py

Nothing here reaches the network: the proxy variables of the CLI name the stand-in, which refuses
such requests.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import pytest

import claude_api_bridge as cab
from conftest import Api, Program, Stream, imported, is_running, text_of, wait_until
from messages_api import (
    Call,
    MessagesApi,
    NotingClaude,
    Reply,
    calls_tools,
    echo,
    last_text,
    system_text,
    tool_results,
    turn_texts,
)
from random_chats import RandomChat, RandomChats, body_of

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]

Version = Tuple[int, ...]
OAUTH_TOKEN = "sk-ant-oat01-dummy"
API_KEY = "sk-ant-api03-of-the-owner"
NEVER = Reply("too late", hold=threading.Event())  # sent when the stand-in closes
FAR = 4_102_444_800  # a time in 2100


def wait_for_count(processes: Callable[[], Set[int]], count: int, seconds: float) -> Set[int]:
    """Wait until exactly so many processes run. -> their pids."""
    pids: Set[int] = set()

    def is_reached() -> bool:
        pids.clear()
        pids.update(processes())
        return len(pids) == count

    wait_until(is_reached, seconds)
    return pids


class Site:
    """A bridge over the real CLI, with its own home, data directory and stand-in API."""

    def __init__(self, claude: Path, version: Version, folder: Path) -> None:
        self.claude, self.version, self.folder = claude, version, folder
        self.home, self.data = folder / "home", folder / "data"
        self.home.mkdir()
        self.messages = MessagesApi()
        self.environ = {
            "PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(self.home),
            "ANTHROPIC_BASE_URL": self.messages.url, "CLAUDE_CODE_OAUTH_TOKEN": OAUTH_TOKEN,
            "HTTPS_PROXY": self.messages.url, "NO_PROXY": "127.0.0.1",
        }
        self.program: Optional[Program] = None
        self._admin = ""

    def start(self, *flags: str, **environ: str) -> None:
        """Start the bridge, and return once it serves."""
        self.program = Program(
            [
                *imported(), "start", "--no-tunnel", "--host", "127.0.0.1", "--port", "0",
                "--data-dir", str(self.data), "--claude", str(self.claude), "--rate-limit", "0",
                *flags,
            ],
            {**self.environ, **environ},
            self.folder,
        )
        self._admin = self._admin or self.program.token

    @property
    def admin(self) -> Api:
        assert self.program is not None
        return Api(self.program.port, self._admin)

    def client(self, **fields: Any) -> Tuple[Api, Dict[str, Any]]:
        """Return a client with a new token, and the row of that token in GET /api/tokens."""
        created = self.admin.post("/api/tokens", {"name": "test", **fields}).json
        listed = self.admin.get("/api/tokens").json["tokens"]
        return self.admin.with_token(created["token"]), next(
            token for token in listed if token["id"] == created["tokenId"]
        )

    def ask(self, message: str, client: Optional[Api] = None, **fields: Any) -> Dict[str, Any]:
        """Ask, and wait for the end. -> the poll body."""
        return dict(
            (client or self.admin).post("/api/ask", {"message": message, "wait": 60, **fields}).json
        )

    def calls(self) -> List[Call]:
        return self.messages.messages()

    def processes(self) -> Set[int]:
        """Return the processes that the bridges of this site started, and their descendants."""
        pids = set()
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and int(entry) != os.getpid():
                    environ = Path("/proc", entry, "environ").read_bytes().split(b"\0")
                    if ("HOME=%s" % self.home).encode() in environ and any(
                        line.startswith(b"CAB_CHILD=") for line in environ
                    ):
                        pids.add(int(entry))
        return {pid for pid in pids if is_running(pid)}

    def idle(self, count: int = 2) -> Set[int]:
        """Wait until only so many processes run, of which two are idle. -> all of them."""
        return wait_for_count(self.processes, count, 10)

    def plan(self) -> Dict[str, Any]:
        return dict(self.admin.get("/api/usage").json["plan"])

    def files(self) -> Dict[str, int]:
        """Return the path and modification time of all files that the CLI or a tool could touch.

        Files that every start and every turn writes into the CLI's own folder are left out.
        """
        own = (
            r"(\.claude\.json|sessions|session-env|projects|plugins|backups"
            r"|shell-snapshots|statsig|debug|todos|cache)"
        )
        usual = r"stderr-|data/(bridge\.|transcripts/|claude-home/%s)" % own
        times = {}
        for parent, _, names in os.walk(self.folder):
            for path in (Path(parent, name) for name in names):
                name = path.relative_to(self.folder).as_posix()
                with contextlib.suppress(FileNotFoundError):
                    if not re.match(usual, name):
                        times[name] = path.lstat().st_mtime_ns
        return times

    def end(self) -> int:
        """Shut down in an orderly way. -> the exit status."""
        assert self.program is not None
        status = self.program.end(signal.SIGTERM, 20)
        self.program = None
        return status

    def kill(self) -> None:
        assert self.program is not None
        self.program.end(signal.SIGKILL)
        self.program = None

    def close(self) -> None:
        if self.program is not None:
            assert self.end() == 0
        self.messages.close()
        assert not self.processes()


@pytest.fixture(scope="module")
def version(real_claude: Path, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """Return the version that the CLI reports."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path_factory.mktemp("version"))}
    words = subprocess.run(
        [str(real_claude), "--version"], env=environ, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, timeout=60,
    ).stdout
    return cab.Features.read(words.decode(), "").version


@pytest.fixture(scope="module")
def standing(
    real_claude: Path, version: Version, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    with contextlib.closing(
        Site(real_claude, version, tmp_path_factory.mktemp("standing"))
    ) as site:
        secret = site.home / ".ssh" / "id_rsa"
        secret.parent.mkdir()
        secret.write_text("SECRET-OF-THE-OWNER\n")
        site.start()
        yield site


@pytest.fixture
def shared(standing: Site) -> Site:
    """Return a bridge with the usual settings that many tests use in turn."""
    standing.messages.reply = echo
    del standing.messages.calls[:], standing.messages.outside[:]
    return standing


@pytest.fixture
def site(real_claude: Path, version: Version, tmp_path: Path) -> Iterator[Site]:
    """Return a site for a bridge with its own settings; nothing is started yet."""
    with contextlib.closing(Site(real_claude, version, tmp_path)) as site:
        yield site


@contextlib.contextmanager
def passing(site: Site, **fields: Any) -> Iterator[Api]:
    """Yield a client with a new token.

    The token is revoked at the end, so that no process of it remains.
    """
    client, token = site.client(**fields)
    try:
        yield client
    finally:
        assert site.admin.delete("/api/tokens/" + token["id"]).status == 200


def streamed(client: Api, message: str, **fields: Any) -> "contextlib.closing[Stream]":
    return contextlib.closing(
        client.stream("POST", "/api/ask", {"message": message, "stream": True, **fields})
    )


def moment(timestamp: str) -> float:
    """Return the epoch seconds of a time on the wire."""
    return (
        datetime.strptime(timestamp, "%Y-%m-%dT%H:%M:%S.%fZ")
        .replace(tzinfo=timezone.utc)
        .timestamp()
    )


def everything(calls: List[Call]) -> str:
    """Return everything that reached the API, including headers."""
    return "\n".join(json.dumps(call.headers) + call.raw.decode() for call in calls)


# --- the quick start ---


def curl(*words: str) -> Dict[str, Any]:
    done = subprocess.run(
        ["curl", "-s", "-S", "--max-time", "30", *words], env={"PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE, check=True, timeout=60,
    )
    return dict(json.loads(done.stdout))


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
def test_quick_start_by_curl(shared: Site) -> None:
    url = "http://localhost:%d" % shared.admin.port
    admin = "Authorization: Bearer %s" % shared.admin.token
    json_body = "Content-Type: application/json"
    made = curl(
        "-X", "POST", url + "/api/tokens", "-H", admin, "-H", json_body, "-d", '{"name": "my-app"}'
    )
    mine = "Authorization: Bearer " + made["token"]
    asked = curl(
        "-X", "POST", url + "/api/ask", "-H", mine, "-H", json_body, "-d",
        '{"message": "Hello Claude"}',
    )
    assert asked == {
        "ok": True, "requestId": asked["requestId"], "position": 1,
        "poll": "GET /api/ask/" + asked["requestId"],
    }
    answer = wait_until(
        lambda: next(
            iter(
                [
                    body
                    for body in [curl(url + "/api/ask/" + asked["requestId"], "-H", mine)]
                    if body["status"] == "completed"
                ]
            ),
            None,
        ),
        30,
    )
    assert answer["response"] == "Echo: Hello Claude" and answer["attempts"] == 1
    assert answer["usage"]["inputTokens"] == 10
    assert answer["usage"]["outputTokens"] == 7
    assert answer["usage"]["costUsd"] > 0
    assert [call.headers.get("authorization") for call in shared.calls()] == [
        "Bearer " + OAUTH_TOKEN
    ]


# --- what a prompt can and cannot do (see also test_hostile_prompts) ---


def test_lone_surrogate_arrives_as_replacement(shared: Site) -> None:
    answer = shared.admin.post("/api/ask", b'{"message": "a\\ud800b", "wait": 60}').json
    assert answer["response"] == "Echo: a\ufffdb"
    assert [last_text(call.body) for call in shared.calls()] == ["a\ufffdb"]


def test_one_byte_too_many_is_refused(shared: Site) -> None:
    assert shared.admin.post("/api/ask", {"message": "é" * 16_384 + "x"}).status == 400
    assert not shared.calls()


def test_a_plain_ask_is_lean(shared: Site, tmp_path: Path) -> None:
    assert shared.ask("hello")["status"] == "completed"
    lean = shared.calls()[-1]
    assert len(lean.raw) <= 4_096
    assert not lean.body.get("tools")
    assert cab.SYSTEM_PROMPT in system_text(lean.body)
    count = len(shared.calls())
    bare = subprocess.run(
        [str(shared.claude), "-p", "hello"], env={**shared.environ, "HOME": str(tmp_path)},
        cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60,
    )
    assert bare.returncode == 0 and bare.stdout.strip() == b"Echo: hello"
    heaviest = max(len(call.raw) for call in shared.calls()[count:])
    assert heaviest >= 45_000 and heaviest >= 20 * len(lean.raw), "%d bytes against %d" % (
        heaviest,
        len(lean.raw),
    )


@pytest.mark.parametrize("spare", ["0", "2"])
def test_the_model_is_told_nothing_of_this_machine(site: Site, spare: str) -> None:
    """Since 2.1.330 the CLI describes its folder and system behind the client's words."""
    site.start("--spare", spare)
    if spare != "0":
        site.idle()
    stateful, _ = site.client(sessionMode="stateful")
    site.ask("hello")
    site.ask("one", stateful)
    site.ask("two", stateful)
    for words in (["a"], ["a", "Echo: a", "b"], ["x", "y", "z", "w", "v"]):
        with passing(site) as client:
            chat(client, MESSAGES, said(*words))
    with passing(site) as client:
        chat(client, MESSAGES, said("other model"), model="haiku")
    assert len(site.calls()) == 7
    for call in site.calls():
        text = json.dumps(call.body)
        for private in (str(site.folder), "Primary working directory", os.uname().release):
            assert private not in text, text[:3000]
        assert len(call.raw) <= 1_700


# --- settings of one request ---


def test_settings_reach_the_api(shared: Site) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "string"}},
        "required": ["answer"],
    }
    assert shared.ask("as you are")["status"] == "completed"
    plain = shared.calls()[-1].body
    body = shared.ask("be brief", model="haiku", systemPrompt="Answer as a pirate ☠.")
    assert body["status"] == "completed" and "haiku" in body["model"]
    call = shared.calls()[-1].body
    assert re.match(r"claude-haiku-\d", call["model"]) and call["model"] != plain["model"]
    assert "Answer as a pirate ☠." in system_text(call)
    assert cab.SYSTEM_PROMPT not in system_text(call)
    assert [text for role, text in turn_texts(call)] == ["be brief"], (
        "a change of model leaves a trace in the prompt"
    )
    assert shared.ask("think", model="claude-opus-4-8", effort="low")["status"] == "completed"
    assert shared.calls()[-1].body["model"] == "claude-opus-4-8"
    assert shared.calls()[-1].body["output_config"]["effort"] == "low"
    shared.ask("think harder", model="claude-opus-4-8", effort="max")
    assert shared.calls()[-1].body["output_config"]["effort"] == "max"
    body = shared.ask("forty-two", jsonSchema=schema)
    assert body["structured"] == {"answer": "forty-two"}
    assert json.loads(body["response"]) == {"answer": "forty-two"}
    shared.messages.reply = lambda body: Reply("I would rather not")
    assert shared.ask("no", jsonSchema=schema)["errorCode"] == "cli_error"
    shared.messages.reply = echo
    assert shared.ask("as you were")["status"] == "completed"
    after = shared.calls()[-1].body
    for name in ("model", "output_config"):
        assert after.get(name) == plain.get(name)
    assert after["system"][-1] == plain["system"][-1]
    assert not after.get("tools")


@pytest.mark.parametrize("model", ("default", "claude-sonnet-4-5-20250929", "gpt-4o"))
def test_a_model_name_is_passed_on_unchanged(shared: Site, model: str) -> None:
    """Full names arrive unchanged, even unknown ones (the API refuses them).

    `default` means no model.
    """
    assert (
        shared.ask("hello")["status"] == shared.ask("hello", model=model)["status"] == "completed"
    )
    plain, named = (call.body["model"] for call in shared.calls())
    assert named == (plain if model == "default" else model)


# --- errors of the API ---

API_ERRORS = (
    (
        "context_too_long",
        Reply(
            "prompt is too long: 250000 tokens > 200000 maximum",
            status=400,
            error="invalid_request_error",
        ),
    ),
    (
        "invalid_request",
        Reply("messages: something odd", status=400, error="invalid_request_error"),
    ),
    ("model_not_found", Reply("model: nosuch", status=404, error="not_found_error")),
    (
        "request_too_large",
        Reply("Request exceeds the maximum size", status=413, error="request_too_large"),
    ),
)


@pytest.mark.parametrize(
    "code, reply",
    API_ERRORS,
    ids=lambda value: (
        value if isinstance(value, str) else "%d-%s" % (value.status, value.text[:12])
    ),
)
def test_api_error_has_its_code(shared: Site, code: str, reply: Reply) -> None:
    shared.messages.reply = lambda body: reply
    body = shared.ask("hello")
    assert body["status"] == "error" and body["errorCode"] == code, body
    assert len(body["error"]) > 10 and OAUTH_TOKEN not in body["error"] and "response" not in body
    shared.messages.reply = echo
    assert shared.ask("and now?")["response"] == "Echo: and now?"


# The CLI does not retry these by itself, as versions up to 2.1.197 do with a 529.
OVERLOADS = (
    Reply(
        "Number of concurrent connections has exceeded your rate limit",
        status=429,
        error="rate_limit_error",
        headers={"x-should-retry": "false"},
    ),
    Reply(
        "Internal server error", status=500, error="api_error", headers={"x-should-retry": "false"}
    ),
)


def test_a_request_waits_until_the_api_works_again(shared: Site) -> None:
    for reason, reply in zip(("overloaded", "network"), OVERLOADS):
        shared.messages.reply = lambda body: reply
        request = shared.admin.ask("hello")
        body = wait_until(lambda: held_body(shared, request), 30)
        assert (body["waitingFor"], body["attempts"]) == (reason, 0), body
        assert -2 < moment(body["resumesAt"]) - time.time() <= 60
        shared.messages.reply = echo
        body = shared.admin.done(request)
        assert body["response"] == "Echo: hello" and body["attempts"] == 1
        assert wait_until(lambda: shared.plan()["waitingFor"] is None)


def held_body(site: Site, request: str) -> Optional[Dict[str, Any]]:
    """Return the poll of a request if the queue waits with it."""
    body = site.admin.poll(request)
    return body if body["status"] == "queued" and "waitingFor" in body else None


def test_an_overload_that_passes_is_waited_out(shared: Site) -> None:
    """The overload lasts longer than the CLI's own 4 retries (9 s), so that the bridge retries."""
    replies = [Reply("Overloaded", status=529, error="overloaded_error")] * 6
    shared.messages.reply = lambda body: replies.pop() if replies else echo(body)
    request = shared.admin.ask("hello")

    def waiting_body() -> Optional[Dict[str, Any]]:
        body = shared.admin.poll(request)
        return body if body.get("waitingFor") else None

    waits = wait_until(waiting_body, 30)
    assert waits["waitingFor"] == "overloaded"
    assert waits["status"] == "processing"
    assert -20 < moment(waits["resumesAt"]) - time.time() <= 2
    body = shared.admin.done(request)
    assert body["response"] == "Echo: hello" and body["attempts"] == 1 and "waitingFor" not in body
    assert shared.messages.prompts() == ["hello"] * 7


# --- answers ---


def test_a_big_answer_arrives_whole(shared: Site) -> None:
    text = "".join("%07d " % n for n in range(3 * 1024 * 1024 // 8))
    shared.messages.reply = lambda body: Reply(text)
    body = shared.ask("much")
    assert body["status"] == "completed" and body["response"] == text


def test_a_unicode_answer_arrives_exactly(shared: Site) -> None:
    text = (
        "äß€ \U0001f469\u200d\U0001f680 \u2028 \u2029 \x85 \0 \x7f \ufeff \ufffd "
        "e\u0301 \\u0041 \"'<&>\t\r\n tail "
    )
    shared.messages.reply = lambda body: Reply(text)
    assert shared.ask("odd")["response"] == text
    shared.messages.reply = lambda body: Reply(text, word_seconds=0.001)
    assert shared.ask("odd, word by word")["response"] == text


def test_a_cut_answer_is_requested_again(shared: Site) -> None:
    text = "one two three four"
    shared.messages.reply = lambda body: Reply(text, cut_after=2 if body.get("stream") else None)
    body = shared.ask("count")
    assert body["status"] == "completed" and body["response"] == text
    assert {last_text(call.body) for call in shared.calls()} == {"count"}


def test_a_poll_returns_the_text_so_far(shared: Site) -> None:
    shared.messages.reply = lambda body: Reply("one two three four five six", word_seconds=0.2)
    request = shared.admin.ask("slowly")

    def text_or_end() -> Any:
        body = shared.admin.poll(request)
        return body.get("partial") or body["status"] == "completed"

    seen = wait_until(text_or_end, 20)
    assert isinstance(seen, str) and "one two three four five six".startswith(seen)
    assert shared.admin.poll(request, wait=30)["response"] == "one two three four five six"


# --- live answers ---

WORDS = " ".join("word-%d" % n for n in range(30))


def test_words_arrive_as_they_are_written(shared: Site) -> None:
    """A reader that was disconnected resumes at its offset, or at any other."""
    shared.messages.reply = lambda body: Reply(WORDS, word_seconds=0.05)
    with streamed(shared.admin, "slowly") as stream:
        stream.until("delta")
        request = stream.events[0].data["requestId"]
        meanwhile = shared.admin.poll(request)
        while len(stream.text) < len(WORDS) / 3:
            stream.until("delta")
    assert meanwhile["status"] == "processing"
    assert 0 < len(meanwhile["partial"]) < len(WORDS) / 3
    assert WORDS.startswith(meanwhile["partial"])
    assert [event.kind for event in stream.events[:3]] == ["queued", "started", "delta"]
    assert len(stream.events) > 7
    assert len(stream.text) < len(WORDS) / 2 and WORDS.startswith(stream.text)
    assert shared.admin.poll(request)["status"] == "processing"
    rest = shared.admin.follow(request, stream.events[-1].id).rest()
    assert {event.kind for event in rest} == {"delta", "completed"} and len(rest) > 10
    assert text_of(rest, stream.text) == WORDS == rest[-1].data["response"]
    assert rest[-1].id == len(WORDS)
    for after in (0, 1, 17, len(WORDS) - 1, len(WORDS)):
        late = shared.admin.follow(request, after).rest()
        assert text_of(late, WORDS[:after]) == WORDS and late[-1].data == shared.admin.poll(request)
        expected = ["completed"]
        if after < len(WORDS):
            expected.insert(0, "delta")
        if not after:
            expected.insert(0, "started")
        assert [event.kind for event in late] == expected


def test_fifty_readers_receive_the_same_text(shared: Site) -> None:
    shared.messages.reply = lambda body: Reply(WORDS, word_seconds=0.05)
    request = shared.admin.ask("to all of you")
    with ThreadPoolExecutor(50) as pool:
        streams = list(pool.map(lambda n: shared.admin.follow(request).rest(), range(50)))
    assert {text_of(events) for events in streams} == {WORDS}
    assert {events[-1].data["response"] for events in streams} == {WORDS}
    assert all([event.kind for event in events].count("delta") > 10 for events in streams), (
        "the text arrived while it was written"
    )


@pytest.mark.parametrize("again", ("one two three four five", "something else"))
def test_a_cut_stream_is_completed(shared: Site, again: str) -> None:
    """The CLI retries, at last without a stream.

    The bridge appends a missing suffix, and restarts a text that differs.
    """
    prefix = "one two three "
    shared.messages.reply = lambda body: (
        Reply(prefix + "four", word_seconds=0.05, cut_after=3)
        if body.get("stream")
        else Reply(again)
    )
    with streamed(shared.admin, "count") as stream:
        stream.until("delta")
        while stream.text != prefix:
            stream.until("delta")
        middle = len(stream.events)
        events = stream.rest()
    rest = [kind for kind, _ in groupby(event.kind for event in events[middle:])]
    # version 2.1.330 streams twice
    restarts = (
        sum(bool(call.body.get("stream")) for call in shared.calls())
        - 1
        + (not again.startswith(prefix))
    )
    assert rest == (["started", "delta"] * restarts or ["delta"]) + ["completed"] and restarts <= 2
    assert text_of(events) == again == events[-1].data["response"]
    late = shared.admin.follow(events[0].data["requestId"], len(prefix))
    assert text_of(late.rest(), prefix) == again


# The halves of one character, as the API may send them.
SMILE = "\ud83d", "\ude00"


@pytest.mark.parametrize(
    "pieces, text",
    (
        (("a " + SMILE[0], SMILE[1] + " b"), "a \U0001f600 b"),
        (("a", *SMILE), "a\U0001f600"),
        (("a" + SMILE[0], "b"), "a\ufffdb"),
    ),
    ids=("inside", "at the end", "one half only"),
)
def test_half_a_character_waits_for_the_other(
    shared: Site, pieces: Tuple[str, ...], text: str
) -> None:
    shared.messages.reply = lambda body: Reply(pieces=pieces)
    with streamed(shared.admin, "smile") as stream:
        events = stream.rest()
    assert text_of(events) == text == events[-1].data["response"]
    assert [event.kind for event in events].count("started") == 1


ALPHABET = (
    "a", "Z", " ", "\n", "é", "ß", "e\u0301", "\u0323", "日本", "\u200d", "\ufe0f",
    "\U0001f600",
    "\U0001f469\u200d\U0001f680", "\U0001f1e9\U0001f1ea", "\U00010348", "क्षि",
    "שלום", "\u2028",
    '"', "\\", "<", "data: ",
)


def test_any_text_in_any_pieces_arrives(shared: Site) -> None:
    """The pieces are cut anywhere, even inside a character."""
    # one process for all texts
    with passing(shared, sessionMode="stateful") as client:
        for seed in range(20):
            chance = random.Random(seed)
            text = (
                "x" + "".join(chance.choice(ALPHABET) for _ in range(chance.randrange(5, 80))) + "x"
            )
            data = text.encode("utf-16-be")
            units = "".join(chr(data[n] << 8 | data[n + 1]) for n in range(0, len(data), 2))
            cuts = sorted(
                {
                    0, len(units),
                    *(chance.randrange(len(units)) for _ in range(chance.randrange(1, 30))),
                }
            )
            pieces = tuple(units[start:end] for start, end in zip(cuts, cuts[1:]))
            shared.messages.reply = lambda body: Reply(pieces=pieces)
            with streamed(client, "text %d" % seed) as stream:
                events = stream.rest()
            assert text_of(events) == text == events[-1].data["response"], seed
            assert [event.kind for event in events].count("started") == 1, (
                "the streamed text was right, not only the final one"
            )


# --- cancelling ---


def cancelled(site: Site, client: Api, request: str) -> Dict[str, Any]:
    """Cancel a request. -> its poll body.

    Another request must start within half a second after it, and complete.
    """
    following = site.admin.ask("next")
    answer = client.delete("/api/ask/" + request)
    assert answer.status == 200, answer
    assert answer.json["status"] == "error", answer
    assert answer.json["errorCode"] == "cancelled", answer
    after = site.admin.done(following)
    body = client.poll(request)
    assert after["response"] == "Echo: next"
    assert body["status"] == "error"
    assert body["errorCode"] == "cancelled"
    assert "response" not in body
    assert 0 <= moment(after["startedAt"]) - moment(body["completedAt"]) < 0.5, (body, after)
    assert client.delete("/api/ask/" + request).json["code"] == "already_finished"
    return body


def test_cancelling_ends_an_answer(shared: Site) -> None:
    running = wait_until(shared.processes)
    shared.messages.reply = lambda body: (
        echo(body) if last_text(body) == "next" else Reply("word " * 400, word_seconds=0.05)
    )
    with streamed(shared.admin, "talk on") as stream:
        for _ in range(3):
            stream.until("delta")
        assert not shared.calls()[0].was_left
        body = cancelled(shared, shared.admin, stream.events[0].data["requestId"])
        end = stream.rest()[-1]
    assert end.kind == "error" and end.data == body
    wait_until(lambda: not all(map(is_running, running)), 3)
    wait_until(lambda: shared.calls()[0].was_left, 3)
    assert Counter(shared.messages.prompts()) == {"talk on": 1, "next": 1}


# --- tools ---


def used(site: Site, client: Api, *tools: Tuple[str, Dict[str, Any]]) -> List[Tuple[bool, str]]:
    """Make the model call these tools. -> the results: (refused or failed, text)."""
    site.messages.reply = calls_tools(*tools)
    body = site.ask("use them", client)
    assert body["response"] == "done", body
    return tool_results(site.calls()[-1].body)


def bash(command: str) -> Tuple[str, Dict[str, Any]]:
    return "Bash", {"command": command, "description": "test"}


def reads(path: object) -> Tuple[str, Dict[str, Any]]:
    return "Read", {"file_path": str(path)}


def writes(path: object) -> Tuple[str, Dict[str, Any]]:
    return "Write", {"file_path": str(path), "content": "hello"}


def workspace_of(site: Site, **fields: Any) -> Tuple[Api, Path]:
    """Return a client with tools, and its workspace with in.txt and links that lead out of it."""
    client, token = site.client(**fields)
    workspace = Path(token["workspace"])
    (workspace / "in.txt").write_text("WHAT-IS-INSIDE\n")
    (workspace / "link.txt").symlink_to("/etc/hostname")
    (workspace / "up").symlink_to(site.home)
    return client, workspace


def test_a_token_without_tools_has_none(shared: Site) -> None:
    results = used(
        shared,
        shared.admin,
        bash("touch made"),
        reads("/etc/hostname"),
        writes("made"),
        ("WebFetch", {"url": "https://example.com/", "prompt": "x"}),
        ("Agent", {"description": "x", "prompt": "x", "subagent_type": "Explore"}),
    )
    assert len(results) == 5, results
    assert all(failed and "No such tool" in text for failed, text in results), results
    assert not list(shared.data.joinpath("work").iterdir())


def test_read_stays_in_the_workspace(shared: Site) -> None:
    client, workspace = workspace_of(shared, tools="read")
    hostname = Path("/etc/hostname").read_text().strip()
    inside, *outside = used(
        shared,
        client,
        *map(
            reads,
            (
                workspace / "in.txt", "/etc/hostname", "%s/../../bridge.db" % workspace,
                workspace / "link.txt", workspace / "up/.ssh/id_rsa", shared.home / ".ssh/id_rsa",
                "~/.ssh/id_rsa",
            ),
        ),
    )
    assert not inside[0] and "WHAT-IS-INSIDE" in inside[1]
    assert len(outside) == 6 and all(failed for failed, _ in outside), outside
    assert not any("SECRET" in text or text.strip().endswith(hostname) for _, text in outside), (
        outside
    )
    match, away, *rest = used(
        shared, client, ("Grep", {"pattern": "INSIDE"}),
        ("Grep", {"pattern": "SECRET", "path": str(shared.home), "output_mode": "content"}),
        bash("touch made"), writes(workspace / "made"),
    )
    assert "in.txt" in match[1] and "SECRET" not in away[1]
    assert all(failed for failed, _ in rest), rest
    assert not (workspace / "made").exists()


def test_web_tools_are_permitted(shared: Site) -> None:
    client, workspace = workspace_of(shared, tools="web")
    fetched, searched, read, run = used(
        shared, client, ("WebFetch", {"url": "https://example.com/", "prompt": "x"}),
        ("WebSearch", {"query": "tides"}), reads(workspace / "in.txt"), bash("touch made"),
    )
    assert shared.messages.outside, "it tried to fetch: %r" % (fetched,)
    assert any(
        tool.get("type", "").startswith("web_search")
        for call in shared.calls()
        for tool in call.body.get("tools") or ()
    ), searched
    assert all(failed and "No such tool" in text for failed, text in (read, run)), (read, run)


def test_all_tools_act_in_the_workspace(shared: Site) -> None:
    client, workspace = workspace_of(shared, tools="all")
    outside = shared.folder / "outside.txt"
    ran, wrote, away, up = used(
        shared, client, bash("touch made && pwd"),
        *map(writes, (workspace / "written.txt", outside, workspace / "up/x.txt")),
    )
    assert not ran[0] and str(workspace) in ran[1] and (workspace / "made").exists(), ran
    assert not wrote[0] and (workspace / "written.txt").read_text() == "hello", wrote
    assert away[0] and not outside.exists(), away
    assert up[0] and not (shared.home / "x.txt").exists(), up


def test_rules_allow_exactly_what_they_name(shared: Site) -> None:
    client, workspace = workspace_of(shared, tools=["Read", "Bash(git log:*)"])
    read, log, touch, both, hostname = used(
        shared, client, reads(workspace / "in.txt"), bash("git log --oneline"), bash("touch made"),
        bash("git log; touch made"), reads("/etc/hostname"),
    )
    assert not read[0] and "WHAT-IS-INSIDE" in read[1]
    assert "not a git repository" in log[1] or not log[0], log
    assert touch[0], (touch, both, hostname)
    assert both[0], (touch, both, hostname)
    assert hostname[0], (touch, both, hostname)
    assert not (workspace / "made").exists(), (touch, both, hostname)


SLEEP = "python3 -c 'import time;time.sleep(300)' %s"


def sleeping(mark: str) -> Set[int]:
    """Return the SLEEP commands with this mark, whatever their parents and environment."""
    pids = set()
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and Path("/proc", entry, "cmdline").read_bytes().split(b"\0")[
                -2:
            ] == [mark.encode(), b""]:
                pids.add(int(entry))
    return pids


@pytest.mark.parametrize(
    "command, count",
    (
        (SLEEP, 1),
        (SLEEP + " & " + SLEEP, 2),
        ("setsid " + SLEEP + " & " + SLEEP, 2),
        ("setsid env -i PATH=$PATH " + SLEEP + " & " + SLEEP, 2),
    ),
    ids=("one", "two", "own session", "own session and environment"),
)
@pytest.mark.parametrize("how", ("revoke", "cancel"))
def test_the_command_of_a_cancelled_run_or_revoked_token_ends(
    shared: Site, how: str, command: str, count: int
) -> None:
    client, token = shared.client(tools="all")
    mark = "mark-" + token["id"]
    runs = calls_tools(bash(command.replace("%s", mark)))
    shared.messages.reply = lambda body: echo(body) if last_text(body) == "next" else runs(body)
    request = client.ask("run it")
    try:
        running = wait_for_count(lambda: sleeping(mark), count, 20)
        if how == "cancel":
            cancelled(shared, client, request)
        else:
            assert shared.admin.delete("/api/tokens/" + token["id"]).status == 200
            assert client.poll(request)["code"] == "invalid_token"
        wait_until(lambda: not sleeping(mark))
    finally:
        for pid in sleeping(mark):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(is_running(pid) for pid in running))
    shared.messages.reply = echo
    assert shared.ask("next")["response"] == "Echo: next"


# --- conversations ---


class Talk:
    """A stateful client that checks every turn.

    The API must receive all earlier turns and no others.
    """

    def __init__(self, site: Site, **fields: Any) -> None:
        self.site, self.client = site, site.client(sessionMode="stateful", **fields)[0]
        self.turns: List[Tuple[str, str]] = []

    def say(self, text: str, calls: int = 1, **fields: Any) -> Dict[str, Any]:
        """Run a turn. -> the body of the last request that reached the API.

        calls: how many calls of the API it must take.
        """
        # The port changes with a restart.
        client, count = self.site.admin.with_token(self.client.token), len(self.site.calls())
        sent = " " + text if text.startswith("/") else text
        body = self.site.ask(text, client, **fields)
        assert body["status"] == "completed" and body["response"].endswith(text), body
        assert len(self.site.calls()) == count + calls, self.site.messages.prompts()[count:]
        call = self.site.calls()[-1]
        sent_turn = ("user", sent)
        assert [turn for turn in turn_texts(call.body) if turn[1]] == [*self.turns, sent_turn]
        self.turns += [sent_turn, ("assistant", body["response"])]
        return call.body

    def cool(self) -> None:
        """Wait until the process of the conversation has exited."""
        self.site.idle()


def test_a_conversation_remembers(site: Site) -> None:
    site.start("--warm-seconds", "1")
    talk = Talk(site)
    talk.say("my number is 7")
    talk.say("and now?")  # the same process
    other = Talk(site)
    other.say("I am somebody else")
    talk.cool()
    talk.say("after a pause")  # replayed from our database
    site.end()
    site.start("--warm-seconds", "1")
    plain = talk.say("after a restart")
    talk.cool()
    for projects in (site.data / "claude-home/projects", site.home / ".claude/projects"):
        shutil.rmtree(projects, ignore_errors=True)
    talk.say("after the loss of the CLI's files")
    talk.say("in the process that received the turns")
    talk.cool()
    assert talk.say("replayed a second time")["model"] == plain["model"]
    call = talk.say("with other instructions", systemPrompt="Speak like a pirate ☠.")
    assert "pirate ☠" in system_text(call) and cab.SYSTEM_PROMPT not in system_text(call)
    call = talk.say("with another model", model="haiku")
    assert re.match(r"claude-haiku-\d", call["model"])
    assert "pirate" not in system_text(call)
    assert cab.SYSTEM_PROMPT in system_text(call)
    assert talk.say("with no model named")["model"] == plain["model"]
    other.say("and still am")


def test_a_resumed_session_follows_new_settings(site: Site) -> None:
    """With tools the CLI resumes its session, under new settings."""
    site.start("--warm-seconds", "0")
    talk = Talk(site, tools="read")
    plain = talk.say("one")
    call = talk.say("two", systemPrompt="Speak like a pirate ☠.")
    assert "pirate ☠" in system_text(call) and cab.SYSTEM_PROMPT not in system_text(call)
    call = talk.say("three", model="haiku")
    assert re.match(r"claude-haiku-\d", call["model"])
    assert "pirate" not in system_text(call)
    assert cab.SYSTEM_PROMPT in system_text(call)
    assert talk.say("four")["model"] == plain["model"]
    site.end()
    shutil.rmtree(site.data / "claude-home/projects")
    site.start("--warm-seconds", "0")
    talk.say("after the loss of its file")


def test_a_failed_turn_is_not_part_of_a_conversation(site: Site) -> None:
    site.start("--run-seconds", "4")
    talk = Talk(site)
    talk.say("/clear @/etc/hostname")
    for code, reply in (
        (
            "invalid_request",
            Reply("messages: something odd", status=400, error="invalid_request_error"),
        ),
        ("timeout", NEVER),
    ):
        site.messages.reply = lambda body: reply
        assert site.ask("this fails", talk.client)["errorCode"] == code
        site.messages.reply = echo
        talk.say("after " + code)
    site.messages.reply = lambda body: Reply("word " * 400, word_seconds=0.05)
    with streamed(talk.client, "this is cancelled") as stream:
        stream.until("delta")
        assert talk.client.delete("/api/ask/" + stream.events[0].data["requestId"]).status == 200
        assert stream.rest()[-1].data["errorCode"] == "cancelled"
    site.messages.reply = echo
    talk.say("after the cancelled one")
    talk.say("in the process that received the turns")


# --- plan limits and usage ---

Headers = Dict[str, str]


def unified(status: str, reset: int, utilization: float, **more: object) -> Headers:
    """Return the headers that the API sends for a plan whose 5-hour window matters most."""
    fields = {
        "status": status, "reset": reset, "representative-claim": "five_hour", "5h-status": status,
        "5h-reset": reset, "5h-utilization": utilization,
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    return {"anthropic-ratelimit-unified-" + name: str(value) for name, value in fields.items()}


def refuse_once(site: Site, seconds: int = 5) -> List[int]:
    """Let the API refuse the next call because the plan is used up.

    -> the time of the reset, once it was.
    """
    resets: List[int] = []

    def reply(body: Dict[str, Any]) -> Reply:
        if resets:
            return echo(body)
        resets.append(int(time.time()) + seconds)
        return Reply(
            "This request would exceed your account's rate limit.",
            status=429,
            error="rate_limit_error",
            headers=unified("rejected", resets[0], 1.0),
        )

    site.messages.reply = reply
    return resets


def test_a_used_up_plan_delays_the_queue(site: Site) -> None:
    site.start()
    resets = refuse_once(site)
    ids = [site.admin.ask("request %d" % n) for n in range(4)]
    with contextlib.closing(site.admin.follow(ids[0])) as stream:
        event = stream.until("queued")
        while "waitingFor" not in event.data:
            event = stream.until("queued")
        waits = site.admin.poll(ids[0])
        assert waits["status"] == "queued"
        assert waits["waitingFor"] == "usage_limit"
        assert waits["queuePosition"] == 1
        assert waits["resumesAt"] == event.data["resumesAt"]
        assert resets[0] <= moment(waits["resumesAt"]) <= resets[0] + 3
        assert [site.admin.poll(request)["waitingFor"] for request in ids[1:]] == [
            "usage_limit"
        ] * 3
        plan = site.plan()
        assert plan["waitingFor"] == "usage_limit"
        assert plan["resumesAt"] == waits["resumesAt"]
        assert not plan["isUsingOverage"]
        (window,) = plan["windows"]
        assert window["type"] == "five_hour"
        assert window["status"] == "rejected"
        assert moment(window["resetsAt"]) == resets[0]
        # Older versions report the utilization only in warnings.
        if site.version >= (2, 1, 330):
            assert window["utilization"] == 1.0
        assert text_of(stream.rest()) == "Echo: request 0"
    bodies = [site.admin.done(request) for request in ids]
    assert [body["response"] for body in bodies] == ["Echo: request %d" % n for n in range(4)]
    assert moment(bodies[0]["startedAt"]) >= moment(waits["resumesAt"])
    moments = [body[name] for body in bodies for name in ("startedAt", "completedAt")]
    assert moments == sorted(moments), "one after the other, in the order of asking"
    assert [body["attempts"] for body in bodies] == [1] * 4
    assert site.messages.prompts() == [
        "request 0", "request 0", "request 1", "request 2", "request 3",
    ], "one call was refused"
    assert site.plan()["waitingFor"] is None


@pytest.mark.parametrize("warm_seconds", ("600", "0"))
def test_a_conversation_survives_a_used_up_plan(site: Site, warm_seconds: str) -> None:
    site.start("--warm-seconds", warm_seconds)
    talk = Talk(site)
    talk.say("my number is 7")
    refuse_once(site)
    talk.say("which one is it?", calls=2)
    assert site.messages.prompts() == ["my number is 7", "which one is it?", "which one is it?"]
    talk.say("thank you")


@pytest.mark.parametrize("warm_seconds", ("600", "0"))
def test_a_conversation_survives_an_overload(site: Site, warm_seconds: str) -> None:
    site.start("--warm-seconds", warm_seconds)
    talk = Talk(site)
    talk.say("my number is 7")
    replies = [OVERLOADS[0]]
    site.messages.reply = lambda body: replies.pop() if replies else echo(body)
    talk.say("which one is it?", calls=2)
    talk.say("thank you")


def test_usage_shows_the_plan(site: Site) -> None:
    site.start()
    reset, later = int(time.time()) + 3600, int(time.time()) + 86_400

    def plan_after(headers: Headers) -> Dict[str, Any]:
        """Return the plan in /api/usage after an answer with these headers.

        Its windows are keyed by type.
        """
        site.messages.reply = lambda body: Reply("hello", headers=headers)
        assert site.ask("hello")["response"] == "hello"
        plan = site.plan()
        return {**plan, "windows": {window["type"]: window for window in plan["windows"]}}

    reports_all = site.version >= (2, 1, 330)
    week: Dict[str, object] = {"7d_status": "allowed", "7d_utilization": 0.1, "7d_reset": later}
    plan = plan_after(unified("allowed", reset, 0.42, **week))
    assert set(plan["windows"]) == ({"five_hour", "seven_day"} if reports_all else {"five_hour"})
    five = plan["windows"]["five_hour"]
    assert five["status"] == "allowed"
    assert moment(five["resetsAt"]) == reset
    assert five["utilization"] == (0.42 if reports_all else None)
    if reports_all:
        seven = plan["windows"]["seven_day"]
        assert seven["status"] == "allowed"
        assert moment(seven["resetsAt"]) == later
        assert seven["utilization"] == 0.1
    assert not plan["isUsingOverage"] and plan["waitingFor"] is None
    plan = plan_after(
        {
            **unified("allowed_warning", reset, 0.92, **week),
            "anthropic-ratelimit-unified-5h-surpassed-threshold": "0.9",
        }
    )
    five = plan["windows"]["five_hour"]
    assert five["status"] == "allowed_warning"
    assert five["utilization"] == 0.92
    assert not plan["isUsingOverage"]
    overage: Dict[str, object] = {"overage_status": "allowed", "overage_reset": later}
    for _ in range(2):  # paid usage starts no pause
        plan = plan_after(unified("rejected", reset, 1.0, **overage))
        assert plan["isUsingOverage"]
        assert plan["waitingFor"] is None
        assert plan["windows"]["five_hour"]["status"] == "rejected"
    plan = plan_after(unified("allowed", reset, 0.0))
    assert not plan["isUsingOverage"] and plan["windows"]["five_hour"]["status"] == "allowed"


def test_plan_only_pauses_before_paid_usage(site: Site) -> None:
    """The paid answer is delivered; the next request waits for the plan."""
    site.start("--plan-only")
    resets: List[int] = []

    def reply(body: Dict[str, Any]) -> Reply:
        if resets:
            return echo(body)
        resets.append(int(time.time()) + 5)
        return Reply(
            "paid",
            headers=unified(
                "rejected", resets[0], 1.0, overage_status="allowed", overage_reset=FAR
            ),
        )

    site.messages.reply = reply
    ids = [site.admin.ask("request %d" % n) for n in range(2)]
    assert site.admin.done(ids[0])["response"] == "paid"
    waits = site.admin.poll(ids[1])
    assert waits["status"] == "queued" and waits["waitingFor"] == "usage_limit"
    assert resets[0] <= moment(waits["resumesAt"]) <= resets[0] + 3
    plan = site.plan()
    assert plan["isUsingOverage"] and plan["waitingFor"] == "usage_limit" and len(site.calls()) == 1
    body = site.admin.done(ids[1])
    assert body["response"] == "Echo: request 1"
    assert moment(body["startedAt"]) >= moment(waits["resumesAt"])
    assert site.messages.prompts() == ["request 0", "request 1"]


def test_each_turn_has_its_own_usage(real_claude: Path, version: Version, tmp_path: Path) -> None:
    """The CLI reports the cost of all turns so far.

    Some versions include all processes of a session.
    """
    noting = NotingClaude(tmp_path / "noting", real_claude, b'"total_cost_usd"')
    small = {
        "input_tokens": 100, "output_tokens": 20, "cache_read_input_tokens": 5,
        "cache_creation_input_tokens": 3,
    }
    large = {
        "input_tokens": 3_000, "output_tokens": 700, "cache_read_input_tokens": 50,
        "cache_creation_input_tokens": 30,
    }
    with (
        contextlib.closing(Site(noting.path, version, tmp_path)) as site,
        contextlib.ExitStack() as stack,
    ):
        # No preparation of an idle process, which has a result of its own.
        site.start("--warm-seconds", "1", "--spare", "0")
        client = stack.enter_context(passing(site, sessionMode="stateful", tools="read"))
        costs = []
        for n, used in enumerate((small, large, small)):
            site.messages.reply = lambda body: Reply("turn", usage=used)
            body = site.ask("turn %d" % n, client)
            assert list(body["usage"].values())[:4] == [
                used[name]
                for name in (
                    "input_tokens", "output_tokens", "cache_read_input_tokens",
                    "cache_creation_input_tokens",
                )
            ], body
            costs.append(body["usage"]["costUsd"])
            totals = [line["total_cost_usd"] for _, line in noting.lines()]
            if n < 2:
                assert len(totals) == n + 1
                assert sum(costs) == pytest.approx(totals[-1], abs=2e-8)
                assert costs[-1] > 0
            if n == 1:
                # The third turn resumes the session.
                site.idle(0)
        assert costs[2] == pytest.approx(costs[0], abs=2e-8) and costs[1] > 5 * costs[0]
        total = site.admin.get("/api/usage").json["total"]
        assert total["requests"] == total["completed"] == 3
        assert total["inputTokens"] == 3_200
        assert total["outputTokens"] == 740
        assert total["costUsd"] == pytest.approx(sum(costs), abs=1e-7)


def test_a_key_makes_one_request_of_many_posts(shared: Site) -> None:
    with passing(shared, sessionMode="stateful") as client, ThreadPoolExecutor(100) as pool:
        ready = threading.Barrier(100)

        def post(n: int) -> Tuple[int, str, bool]:
            ready.wait(20)
            answer = client.post(
                "/api/ask",
                {"message": "message %d" % (n % 10)},
                headers={"Idempotency-Key": "key-%d" % (n % 10)},
            )
            assert answer.status == 202, answer
            return n % 10, answer.json["requestId"], "idempotent-replayed" in answer.headers

        answers = list(pool.map(post, range(100)))
        ids = {key: request for key, request, _ in answers}
        assert {(key, request) for key, request, _ in answers} == set(ids.items())
        assert len(set(ids.values())) == 10
        assert [replayed for _, _, replayed in answers].count(False) == 10
        assert [client.done(ids[n])["response"] for n in range(10)] == [
            "Echo: message %d" % n for n in range(10)
        ]
        assert Counter(shared.messages.prompts()) == {"message %d" % n: 1 for n in range(10)}
        again = client.post(
            "/api/ask", {"message": "message 3"}, headers={"Idempotency-Key": "key-3"}
        )
        assert again.json["requestId"] == ids[3] and len(shared.calls()) == 10
        other = client.post("/api/ask", {"message": "other"}, headers={"Idempotency-Key": "key-3"})
        assert other.status == 409


# --- the wire formats of /v1 ---

MESSAGES, COMPLETIONS = "/v1/messages", "/v1/chat/completions"
PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PAPER = "JVBERi0xLjQKMSAwIG9iajw8Pj5lbmRvYmoKdHJhaWxlcjw8Pj4KJSVFT0Y="
ADD = {
    "name": "add",
    "description": "adds",
    "input_schema": {"type": "object", "properties": {"a": {"type": "number"}}},
}


def blocks_of(call: Call) -> List[Tuple[str, List[Dict[str, Any]]]]:
    """Return (role, blocks) of every user and assistant message, without the CLI's additions."""
    turns = []
    for message in call.body["messages"]:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        blocks = [
            {key: value for key, value in block.items() if key != "cache_control"}
            for block in content
            if not str(block.get("text")).startswith("<system-reminder>")
        ]
        if message["role"] != "system":
            turns.append((message["role"], blocks))
    return turns


def texts(*words: str) -> List[Tuple[str, List[Dict[str, Any]]]]:
    return [
        (("user", "assistant")[n % 2], [{"type": "text", "text": word}])
        for n, word in enumerate(words)
    ]


def chat(client: Api, path: str, messages: List[Dict[str, Any]], **fields: Any) -> Dict[str, Any]:
    answer = client.post(
        path, {"model": "sonnet", "max_tokens": 100, "messages": messages, **fields}
    )
    assert answer.status == 200, answer
    return dict(answer.json)


def said(*words: str) -> List[Dict[str, Any]]:
    """Return messages that alternate between user and assistant."""
    return [{"role": ("user", "assistant")[n % 2], "content": word} for n, word in enumerate(words)]


@pytest.mark.parametrize("path", (MESSAGES, COMPLETIONS))
def test_earlier_turns_are_real_turns(shared: Site, path: str) -> None:
    words = ["one", "1", "two /cost", "2", "/cost three"]
    instructions: Dict[str, Any] = {"system": "Count."} if path == MESSAGES else {}
    messages = ([] if path == MESSAGES else [{"role": "developer", "content": "Count."}]) + said(
        *words
    )
    with passing(shared) as client:
        body = chat(client, path, messages, **instructions)
    (call,) = shared.calls()
    assert blocks_of(call) == texts(*words[:-1], " /cost three")
    assert "Count." in system_text(call.body)
    text = (
        body["content"][0]["text"] if path == MESSAGES else body["choices"][0]["message"]["content"]
    )
    assert text == "Echo:  /cost three" and not call.body.get("tools") and len(call.raw) < 5_000


def test_images_and_documents_are_real_blocks_and_files_stay_closed(shared: Site) -> None:
    """A block of the client arrives as a block, also in earlier turns.

    @/path and /command stay text everywhere.
    """
    before = shared.files()
    picture = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": PICTURE},
    }
    paper = {
        "type": "document",
        "source": {"type": "base64", "media_type": "application/pdf", "data": PAPER},
        "title": "paper.pdf",
    }
    linked = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    secret = {"type": "text", "text": "what is in @~/.ssh/id_rsa and @/etc/hostname ?"}
    command = {"type": "text", "text": "/config theme=dark"}
    messages: List[Dict[str, Any]] = [
        {"role": "user", "content": [picture, secret]},
        {"role": "assistant", "content": "seen"},
        {"role": "user", "content": [paper, command]},
        {"role": "assistant", "content": "read"},
        {"role": "user", "content": [linked, command, paper, secret]},
    ]
    with passing(shared) as client:
        chat(client, MESSAGES, messages)
    openai = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PICTURE}},
        {
            "type": "file",
            "file": {"filename": "paper.pdf", "file_data": "data:application/pdf;base64," + PAPER},
        },
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        secret,
    ]
    with passing(shared) as client:
        chat(client, COMPLETIONS, [{"role": "user", "content": openai}])
    messages_call, completions_call = shared.calls()
    escaped = {"type": "text", "text": " /config theme=dark"}
    assert blocks_of(messages_call) == [
        ("user", [picture, secret]),
        ("assistant", [{"type": "text", "text": "seen"}]),
        ("user", [paper, escaped]),
        ("assistant", [{"type": "text", "text": "read"}]),
        ("user", [linked, command, paper, secret]),
    ]
    assert blocks_of(completions_call) == [("user", [picture, paper, linked, secret])]
    traffic = everything([messages_call, completions_call])
    assert "SECRET-OF-THE-OWNER" not in traffic and "Called the Read tool" not in traffic
    assert shared.files() == before


def tool_turn(body: Dict[str, Any], *results: Any) -> List[Dict[str, Any]]:
    """Return the two messages that answer the tool calls of an answer."""
    calls = [block["id"] for block in body["content"] if block["type"] == "tool_use"]
    return [
        {"role": "assistant", "content": body["content"]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": call_id, "content": result}
                for call_id, result in zip(calls, results)
            ],
        },
    ]


def test_a_client_tool_call_continues_in_the_live_turn(shared: Site) -> None:
    shared.messages.reply = calls_tools(("mcp__api__add", {"a": 1}), ("mcp__api__add", {"a": 2}))
    long = {**ADD, "name": "long", "description": "x" * 5_000 + " the end"}
    with passing(shared) as client:
        asked = said("add both")
        first = chat(client, MESSAGES, asked, tools=[ADD, long])
        assert first["stop_reason"] == "tool_use"
        assert [(block["name"], block["input"]) for block in first["content"]] == [
            ("add", {"a": 1}), ("add", {"a": 2}),
        ]
        assert first["usage"]["input_tokens"] == 10 and first["usage"]["output_tokens"] == 7
        offered = {tool["name"]: tool for tool in shared.calls()[0].body["tools"]}
        assert set(offered) == {"mcp__api__add", "mcp__api__long"}
        assert offered["mcp__api__add"]["input_schema"] == ADD["input_schema"]
        assert offered["mcp__api__add"]["description"] == "adds"
        assert "x" * 5_000 + " the end" in system_text(shared.calls()[0].body)
        assert "truncated" not in offered["mcp__api__long"]["description"]
        last = chat(
            client, MESSAGES, asked + tool_turn(first, "one", [{"type": "text", "text": "two"}]),
            tools=[ADD, long],
        )
        assert last["content"] == [{"type": "text", "text": "done"}]
        assert last["stop_reason"] == "end_turn"
        assert last["usage"]["input_tokens"] == 10 and last["usage"]["output_tokens"] == 7
        _, last_call = shared.calls()
        assert tool_results(last_call.body) == [(False, "one"), (False, "two")]
        assert [role for role, _ in blocks_of(last_call)] == ["user", "assistant", "user"]
        # The process goes on with the next question.
        asked_again = [
            *asked, *tool_turn(first, "one", [{"type": "text", "text": "two"}]), *said("done", "x")
        ]
        asked_again[-2]["role"], asked_again[-1]["role"] = "assistant", "user"
        chat(client, MESSAGES, asked_again, tools=[ADD, long])
        sessions = {call.headers["x-claude-code-session-id"] for call in shared.calls()}
        assert len(sessions) == 1
        # Its results cannot be taken back: a new one receives the whole conversation.
        chat(client, MESSAGES, asked + tool_turn(first, "one", "two"), tools=[ADD, long])
        seeded = shared.calls()[-1]
        assert tool_results(seeded.body) == [(False, "one"), (False, "two")]
        assert [
            block.get("name")
            for _, blocks in blocks_of(seeded)
            for block in blocks
            if block["type"] == "tool_use"
        ] == ["mcp__api__add"] * 2


def test_an_answer_is_limited_by_the_api_itself(shared: Site) -> None:
    """The limit of one turn is not that of the next, in the same process."""
    shared.messages.reply = lambda body: Reply("one two", stop_reason=reason)
    with passing(shared) as client:
        reason = "end_turn"
        chat(client, MESSAGES, said("a"), max_tokens=9)
        chat(client, MESSAGES, said("a", "one two", "b"), max_tokens=9_000)
        chat(client, MESSAGES, said("a", "one two", "b", "one two", "c"), max_tokens=0)
        reason = "max_tokens"
        cut = chat(client, MESSAGES, said("a"), max_tokens=9)
        assert cut["stop_reason"] == "max_tokens" and cut["content"] == texts("one two")[0][1]
        assert cut["usage"]["output_tokens"] == 7
    bodies = [call.body for call in shared.calls()[:3]]
    limits = [body["max_tokens"] for body in bodies]
    assert limits[:2] == [9, 9_000] and limits[2] > 9_000
    assert ["thinking" in body for body in bodies] == [False, True, True]
    assert len({call.headers["x-claude-code-session-id"] for call in shared.calls()[:3]}) == 1


def test_a_beginning_reaches_the_model_as_the_last_message(shared: Site) -> None:
    shared.messages.reply = lambda body: Reply(" red.")
    with passing(shared) as client:
        body = chat(client, MESSAGES, said("a", "b", "A poem.", "Roses are"), model="haiku")
        assert body["content"] == texts(" red.")[0][1]
        chat(client, MESSAGES, said("a"), model="haiku")
    first, last = [call.body for call in shared.calls()][-2:]
    assert "thinking" not in first
    assert [(m["role"], m["content"][0]["text"]) for m in first["messages"]] == [
        ("user", "a"), ("assistant", "b"), ("user", "A poem."), ("assistant", "Roses are"),
    ]
    assert last_text(last) == "a" and "Roses" not in json.dumps(last)


@pytest.mark.parametrize("path", (MESSAGES, COMPLETIONS, "/v1/responses"))
def test_the_arguments_of_a_call_arrive_before_it_is_complete(shared: Site, path: str) -> None:
    middle = threading.Event()
    tool = ("mcp__api__add", {"a": 1, "why": "because " * 5})
    shared.messages.reply = lambda body: Reply("Let me.", tools=(tool, tool), middle=middle)
    kinds = {"parameters": ADD["input_schema"], "name": "add"}
    body: Dict[str, Any] = {"model": "sonnet", "stream": True, "tools": [ADD]}
    if path == COMPLETIONS:
        body["tools"] = [{"type": "function", "function": kinds}]
    elif path != MESSAGES:
        body.update(tools=[{"type": "function", **kinds}], input="go on")
    if path != "/v1/responses":
        body.update(messages=said("go on"))
    with passing(shared) as client:
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
        with contextlib.closing(connection):
            headers = {"Authorization": "Bearer %s" % client.token}
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            data = b""
            while b"because" not in data:
                data += response.readline()
            assert not middle.is_set()
            middle.set()
            data += response.read()
    assert data.count(b"toolu_1_0") and data.count(b"toolu_1_1")


def test_a_pending_tool_call_is_continued_only_by_its_own_token_and_ids(shared: Site) -> None:
    """Two tokens have the same conversation, and the model gives the same ids to both."""

    def reply(body: Dict[str, Any]) -> Reply:
        return (
            Reply("done")
            if tool_results(body)
            else Reply(tools=(("mcp__api__add", {"a": 1}),), ids=("toolu_1_0",))
        )

    shared.messages.reply = reply
    with passing(shared) as one, passing(shared) as two:
        asked = said("add")
        firsts = [chat(client, MESSAGES, asked, tools=[ADD]) for client in (one, two)]
        assert firsts[0]["content"] == firsts[1]["content"]
        other = chat(
            one,
            MESSAGES,
            said("add")
            + [
                {
                    "role": "assistant",
                    "content": [
                        {"type": "tool_use", "id": "toolu_9_9", "name": "add", "input": {"a": 1}}
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "toolu_9_9", "content": "for nobody"}
                    ],
                },
            ],
            tools=[ADD],
        )
        assert other["stop_reason"] == "end_turn"
        # The ids differ: the call got its own process.
        chat(two, MESSAGES, asked + tool_turn(firsts[1], "for two"), tools=[ADD])
        assert tool_results(shared.calls()[-1].body) == [(False, "for two")]
        chat(one, MESSAGES, asked + tool_turn(firsts[0], "for one"), tools=[ADD])
        assert tool_results(shared.calls()[-1].body) == [(False, "for one")]
        # Two calls and three answers: nothing was requested again.
        assert len(shared.calls()) == 5


def test_a_client_that_hangs_up_ends_its_run(shared: Site) -> None:
    shared.messages.reply = lambda body: Reply("word " * 400, word_seconds=0.05)
    client = shared.admin
    with contextlib.closing(
        client.stream("POST", MESSAGES, {"messages": said("go on for ever"), "stream": True})
    ) as stream:
        assert stream.status == 200
    latest = wait_until(
        lambda: next(
            (
                row
                for row in client.get("/api/requests?limit=1").json["requests"]
                if row["status"] == "error"
            ),
            None,
        )
    )
    assert latest["errorCode"] == "cancelled" and latest["api"] == "anthropic"
    wait_until(lambda: shared.calls()[0].was_left)


@pytest.mark.parametrize("path", (MESSAGES, COMPLETIONS))
def test_a_plan_limit_that_resets_soon_is_waited_for(site: Site, path: str) -> None:
    site.start()
    resets = refuse_once(site, 3)
    chat(site.admin, path, said("patience"))
    assert time.time() >= resets[0] and site.messages.prompts() == ["patience", "patience"]
    site.messages.reply = lambda body: Reply(
        "limit", status=429, error="rate_limit_error",
        headers=unified("rejected", int(time.time()) + 3600, 1.0),
    )
    answer = site.admin.post(path, {"messages": said("in vain")})
    assert answer.status == 429 and 3500 < int(answer.headers["retry-after"]) <= 3600
    assert site.admin.post(path, {"messages": said("again")}).status == 429
    assert len(site.calls()) == 3


def test_the_models_are_those_of_the_cli(shared: Site) -> None:
    models = shared.admin.get("/v1/models").json
    ids = [model["id"] for model in models["data"]]
    assert {"default", "sonnet", "opus", "haiku"} <= set(ids)
    assert any(re.match(r"claude-\w+-\d", model_id) for model_id in ids)
    assert not shared.calls()


# --- shutdown ---


def test_kill_nine_loses_nothing(site: Site) -> None:
    site.start()
    site.messages.reply = lambda body: NEVER
    ids = [site.admin.ask("request %d" % n) for n in range(6)]
    wait_until(site.calls, 20)

    def running_and_spare() -> Optional[Set[int]]:
        pids = site.processes()
        return pids if len(pids) >= 2 else None

    first = wait_until(running_and_spare, 20)
    site.kill()
    site.messages.reply = echo
    site.start()
    wait_until(lambda: not any(is_running(pid) for pid in first))
    bodies = [site.admin.poll(request, wait=60) for request in ids]
    assert [body["response"] for body in bodies] == ["Echo: request %d" % n for n in range(6)]
    assert [body["attempts"] for body in bodies] == [2, 1, 1, 1, 1, 1]
    moments = [moment for body in bodies for moment in (body["startedAt"], body["completedAt"])]
    assert moments == sorted(moments), "one after the other, in the order of asking"
    assert Counter(site.messages.prompts()) == {
        "request 0": 2, **{"request %d" % n: 1 for n in range(1, 6)},
    }


def test_a_shutdown_leaves_nothing_running(site: Site) -> None:
    """Kill -9 while a tool runs a command, then shut down during a call of the model.

    The shutdown does not count as an attempt.
    """
    site.start()
    client, token = site.client(tools="all")
    mark = "mark-" + token["id"]
    site.messages.reply = calls_tools(bash(SLEEP.replace("%s", mark)))
    request = client.ask("run it")
    try:
        wait_until(lambda: sleeping(mark), 20)
        count = len(site.calls())
        site.messages.reply = lambda body: NEVER
        site.kill()
        site.start()
        wait_until(lambda: not sleeping(mark))
    finally:
        for pid in sleeping(mark):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(site.calls()) > count, 20)
    assert site.end() == 0 and not site.processes()
    site.messages.reply = echo
    site.start()
    body = site.admin.poll(request, wait=60)
    assert body["response"] == "Echo: run it" and body["attempts"] == 2


def test_deadlines_end_the_process(site: Site) -> None:
    site.start("--run-seconds", "2", "--spare", "0")
    site.messages.reply = lambda body: NEVER
    body = site.ask("never")
    assert body["errorCode"] == "timeout" and "2 seconds" in body["error"]
    wait_until(lambda: not site.processes())
    site.messages.reply = lambda body: Reply("word " * 2_000, word_seconds=0.01)
    body = site.ask("too long")
    assert body["errorCode"] == "timeout"
    wait_until(lambda: not site.processes())
    request = site.client(name="short-lived")
    request[0].ask("revoked")
    wait_until(lambda: "revoked" in site.messages.prompts(), 20)
    assert site.admin.delete("/api/tokens/" + request[1]["id"]).status == 200
    wait_until(lambda: not site.processes())


# --- billing and privacy ---


def test_an_api_key_is_not_used(site: Site) -> None:
    site.start(
        ANTHROPIC_API_KEY=API_KEY,
        ANTHROPIC_AUTH_TOKEN=API_KEY,
        ANTHROPIC_MODEL="claude-of-the-key",
        ANTHROPIC_CUSTOM_HEADERS="x-custom: " + API_KEY,
    )
    assert site.ask("hello")["response"] == "Echo: hello"
    assert all(
        call.headers["authorization"] == "Bearer " + OAUTH_TOKEN and "x-api-key" not in call.headers
        for call in site.calls()
    )
    assert API_KEY not in everything(site.messages.calls)
    assert "claude-of-the-key" not in everything(site.messages.calls)
    assert site.program and "ANTHROPIC_API_KEY is set" in site.program.stderr
    assert API_KEY not in site.program.stderr
    site.end()
    site.start("--allow-api-key", ANTHROPIC_API_KEY=API_KEY)
    assert site.ask("hello again")["response"] == "Echo: hello again"
    assert site.calls()[-1].headers.get("x-api-key") == API_KEY
    assert site.program and "BILLED PER TOKEN" in site.program.stderr


def test_the_billing_guard_stops_a_run(site: Site) -> None:
    """The owner's `claude` is signed in to an API account.

    The key is in its own settings file, not in the environment.
    """
    (site.home / ".claude.json").write_text(json.dumps({"primaryApiKey": API_KEY}))
    site.start(CLAUDE_CODE_OAUTH_TOKEN="")
    body = site.ask("hello")
    assert body["errorCode"] == "billing_guard" and not site.calls()
    assert site.program and "(--allow-api-key): requests are BILLED" not in site.program.stderr, (
        "the flag was not given"
    )
    site.end()
    site.start("--allow-api-key", CLAUDE_CODE_OAUTH_TOKEN="")
    assert site.ask("hello")["response"] == "Echo: hello"
    assert site.calls()[-1].headers.get("x-api-key") == API_KEY
    assert site.program and "BILLED PER TOKEN" in site.program.stderr


def sign_in(home: Path) -> None:
    """Create a login on disk, as `claude` stores it on Linux."""
    (home / ".claude").mkdir()
    (home / ".claude/.credentials.json").write_text(
        json.dumps(
            {
                "claudeAiOauth": {
                    "accessToken": "sk-ant-oat01-x",
                    "refreshToken": "sk-ant-ort01-x",
                    "expiresAt": FAR * 1000,
                    "scopes": ["user:inference", "user:profile"],
                    "subscriptionType": "max",
                }
            }
        )
    )


def test_settings_and_data_of_the_owner_stay_out(site: Site) -> None:
    sign_in(site.home)
    touch = "touch " + str(site.folder / "RAN-")
    server = {"owners-server": {"command": "sh", "args": ["-c", touch + "server"]}}
    (site.home / ".claude.json").write_text(
        json.dumps(
            {
                "mcpServers": server,
                "oauthAccount": {
                    "emailAddress": "owner@example.com",
                    "displayName": "OWNERS-NAME",
                    "fullName": "OWNERS-NAME",
                    "organizationName": "OWNERS-FIRM",
                    "accountUuid": "11111111-1111-1111-1111-111111111111",
                    "organizationUuid": "22222222-2222-2222-2222-222222222222",
                    "billingType": "stripe_subscription",
                    "accountCreatedAt": "2025-01-01T00:00:00Z",
                    "subscriptionCreatedAt": "2025-01-01T00:00:00Z",
                    "ccOnboardingFlags": {},
                },
            }
        )
    )
    hook = [{"hooks": [{"type": "command", "command": touch + "hook"}]}]
    (site.home / ".claude/settings.json").write_text(
        json.dumps(
            {
                "model": "claude-of-the-owner",
                "apiKeyHelper": touch + "helper; echo " + API_KEY,
                "outputStyle": "Explanatory",
                "env": {"ANTHROPIC_MODEL": "claude-of-the-owner"},
                "permissions": {"allow": ["Bash(*)", "Read"]},
                "hooks": {
                    name: hook
                    for name in ("SessionStart", "UserPromptSubmit", "Stop", "SessionEnd")
                },
            }
        )
    )
    for name in (
        "CLAUDE.md", ".claude/CLAUDE.md", ".claude/commands/mine.md", ".claude/agents/mine.md",
        ".claude/skills/mine/SKILL.md", ".claude/rules/mine.md",
    ):
        (site.home / name).parent.mkdir(parents=True, exist_ok=True)
        (site.home / name).write_text(
            "---\nname: mine\ndescription: OWNERS-WORDS\n---\nOWNERS-WORDS\n"
        )
    (site.home / ".mcp.json").write_text(json.dumps({"mcpServers": server}))
    site.start(CLAUDE_CODE_OAUTH_TOKEN="")
    assert site.program and "Claude Max subscription" in site.program.stderr
    client, token = site.client(tools="all", sessionMode="stateful")
    (Path(token["workspace"]) / "CLAUDE.md").write_text("OWNERS-WORDS\n")
    before = site.files()
    for n in (1, 2, 3):
        assert site.ask("hello %d" % n)["response"] == "Echo: hello %d" % n
        assert site.ask("hello tools %d" % n, client)["response"] == "Echo: hello tools %d" % n
    traffic = everything(site.messages.calls)
    assert not re.findall(
        r"OWNERS-[A-Z]+|owner@example\.com|claude-of-the-owner|owners-server|sk-ant-ort01-x|"
        + API_KEY,
        traffic,
    )
    assert {call.headers["authorization"] for call in site.calls()} == {"Bearer sk-ant-oat01-x"}
    assert not list(site.folder.glob("RAN-*")) and site.files() == before
    assert not site.messages.outside


def test_the_cli_does_not_fetch_the_profile_of_the_owner(site: Site) -> None:
    """The CLI would fetch the profile for an incomplete account record.

    It would then send the e-mail address to the model.
    """
    sign_in(site.home)
    (site.home / ".claude.json").write_text(
        json.dumps({"oauthAccount": {"emailAddress": "owner@example.com", "accountUuid": "1" * 32}})
    )
    site.start(CLAUDE_CODE_OAUTH_TOKEN="")
    assert site.ask("one")["status"] == site.ask("two")["status"] == "completed"
    assert not site.messages.outside and "owner@example.com" not in everything(site.messages.calls)


# --- outages (see also test_outages) ---


class Network:
    """The way to the stand-in: a forwarder of TCP that may be away. url: what the CLI connects to.

    Away, nothing listens, and open connections are reset in the middle.
    """

    def __init__(self, target: str) -> None:
        self._target = int(target.rpartition(":")[2])
        self._lock = threading.Lock()
        self._pairs: List[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._port = int(self._listener.getsockname()[1])
        self._threads: List[threading.Thread] = []
        self.url = "http://127.0.0.1:%d" % self._port
        self._serve()

    def _start(self, run: Callable[..., None], *values: Any) -> None:
        thread = threading.Thread(target=run, args=values, name="network", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        self._start(self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            with self._lock:
                self._pairs += [near, far]
            self._start(self._pump, near, far)
            self._start(self._pump, far, near)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65_536), b""):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def leave(self) -> None:
        """Let nothing listen, and reset all connections."""
        # Closing alone would leave `accept` waiting.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for connection in pairs:
            reset = struct.pack("ii", 1, 0)
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                connection.shutdown(socket.SHUT_RD)
            connection.close()

    def come_back(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=64)
        self._serve()

    def close(self) -> None:
        self.leave()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture
def network(site: Site) -> Iterator[Network]:
    """Return the network of `site`, whose bridge is not yet started."""
    with contextlib.closing(Network(site.messages.url)) as network:
        site.environ["ANTHROPIC_BASE_URL"] = network.url
        yield network


def waits_for(site: Site, request: str, reason: str, seconds: float = 40) -> Dict[str, Any]:
    """Wait until a request is queued again because of a hold. -> the poll body."""

    def body_if_held() -> Optional[Dict[str, Any]]:
        body = site.admin.poll(request)
        is_held = body["status"] == "queued" and body.get("waitingFor") == reason
        return body if is_held else None

    return dict(wait_until(body_if_held, seconds))


def finished_in_order(site: Site, requests: List[str]) -> List[Dict[str, Any]]:
    """Wait for all; they must have ended in this order. -> the poll bodies."""
    bodies = [site.admin.done(request, 80) for request in requests]
    ends = [moment(body["completedAt"]) for body in bodies]
    assert ends == sorted(ends)
    return bodies


@pytest.mark.parametrize("is_killed", (False, True), ids=("", "killed"))
def test_requests_wait_while_the_api_is_away(
    site: Site, network: Network, is_killed: bool
) -> None:
    """Two run one after the other when it goes away, one of them in the middle; three wait."""
    site.messages.reply = lambda body: Reply("Echo: " + last_text(body), word_seconds=0.05)
    site.start()
    texts = ["question %d " % n + "word " * 20 + "end" for n in range(5)]
    requests = [site.admin.ask(text) for text in texts]
    wait_until(lambda: site.admin.poll(requests[1]).get("partial"), 30)
    network.leave()
    waits_for(site, requests[1], "network")
    assert [site.admin.poll(request).get("waitingFor") for request in requests[2:]] == [
        "network"
    ] * 3
    if is_killed:
        site.kill()
        site.start()
        waits_for(site, requests[1], "network")
    network.come_back()
    bodies = finished_in_order(site, requests)
    assert [body.get("response") for body in bodies] == ["Echo: " + text for text in texts]
    assert [body["attempts"] for body in bodies] == [1] * 5
    assert not site.admin.get("/api/status").json["queue"].get("waitingFor")


def test_server_errors_are_waited_out(site: Site) -> None:
    is_broken = threading.Event()
    is_broken.set()
    site.messages.reply = lambda body: (
        Reply("boom", status=500, headers={"x-should-retry": "false"})
        if is_broken.is_set()
        else echo(body)
    )
    site.start()
    requests = [site.admin.ask("question %d" % n) for n in range(3)]
    waits_for(site, requests[0], "network")
    assert {last_text(call.body) for call in site.calls()} == {"question 0"}
    is_broken.clear()
    bodies = finished_in_order(site, requests)
    assert [body.get("response") for body in bodies] == ["Echo: question %d" % n for n in range(3)]
    assert [body["attempts"] for body in bodies] == [1] * 3


def test_requests_wait_for_a_new_login(site: Site) -> None:
    sign_in(site.home)
    credentials = site.home / ".claude/.credentials.json"
    before = credentials.stat().st_mtime_ns
    site.messages.reply = lambda body: Reply(
        "OAuth token has expired", status=401, error="authentication_error"
    )
    site.start(CLAUDE_CODE_OAUTH_TOKEN="")
    requests = [site.admin.ask("question %d" % n) for n in range(3)]
    body = waits_for(site, requests[0], "login")
    assert moment(body["resumesAt"]) - time.time() > 200 and body["attempts"] == 0
    # A refused login that the CLI writes itself would be tried again and again.
    assert credentials.stat().st_mtime_ns == before
    assert {last_text(call.body) for call in site.calls()} == {"question 0"}
    site.messages.reply = echo
    os.utime(credentials)
    bodies = finished_in_order(site, requests)
    assert [body.get("response") for body in bodies] == ["Echo: question %d" % n for n in range(3)]
    assert [body["attempts"] for body in bodies] == [1] * 3


def test_a_refusal_of_the_model_is_an_answer_of_v1(shared: Site) -> None:
    shared.messages.reply = lambda body: Reply("I will not", stop_reason="refusal")
    with passing(shared) as client:
        message = client.post(MESSAGES, {"max_tokens": 9, "messages": said("Do it.")})
        assert message.status == 200, message
        assert message.json["stop_reason"] == "refusal"
        assert "".join(block["text"] for block in message.json["content"]) == "I will not"
        completion = client.post(COMPLETIONS, {"messages": said("Do it.")})
        assert completion.status == 200, completion
        choice = completion.json["choices"][0]
        assert choice["finish_reason"] == "content_filter"
        assert choice["message"]["content"] == "I will not"
        body = client.answer("Do it.")
        assert body["errorCode"] == "refused" and body["attempts"] == 1
        assert {call.body["model"] for call in shared.calls()} == {
            shared.calls()[0].body["model"]
        }, "another model was asked"
    shared.messages.reply = echo
    assert shared.ask("and now?")["response"] == "Echo: and now?"


# --- random conversations (see also test_history) ---

RANDOM_SECONDS = 55
RANDOM_STEPS = 150


def test_exactly_the_turns_of_random_conversations_reach_the_model(site: Site) -> None:
    """Whatever the clients do, in whichever process; one request to the API each."""
    site.messages.reply = lambda body: Reply("\nanswer %d " % len(site.messages.calls))
    site.start()
    clients = [site.admin, site.client(name="other")[0]]
    received: List[Call] = []

    def send(chat: RandomChat) -> str:
        before = len(site.calls())
        path = MESSAGES if chat.api == "anthropic" else COMPLETIONS
        answer = clients[chat.client].post(path, body_of(chat))
        assert answer.status == 200, answer
        received[:] = site.calls()[before:]
        assert (chat.system or cab.SYSTEM_PROMPT) in system_text(received[0].body)
        if chat.api == "anthropic":
            return str(answer.json["content"][0]["text"])
        return str(answer.json["choices"][0]["message"]["content"])

    def turns() -> List[Tuple[str, str]]:
        (call,) = received
        return turn_texts(call.body)

    def kill_one() -> None:
        os.kill(chats.chance.choice(sorted(site.processes())), signal.SIGKILL)

    def restart() -> None:
        assert site.end() == 0
        site.start()
        for client in clients:
            client.port = site.admin.port

    chats = RandomChats(15, 2, send, turns, {kill_one: 0.03, restart: 0.01})
    deadline = time.monotonic() + RANDOM_SECONDS
    while chats.count < RANDOM_STEPS and time.monotonic() < deadline:
        chats.step()
    assert chats.count > 30


# --- long conversations ---


@pytest.mark.parametrize("reason", ("max_tokens", "model_context_window_exceeded"))
def test_an_answer_in_parts_is_whole(shared: Site, reason: str) -> None:
    """The CLI continues an answer three times; its result holds only the last part."""
    parts = ["one, ", "two, ", "three, ", "four, ", "five."]

    def reply(body: Dict[str, Any]) -> Reply:
        number = len(shared.calls()) - 1
        return Reply(parts[number], stop_reason="" if number == last else reason)

    shared.messages.reply = reply
    with passing(shared) as client:
        for last in (1, 3, 9):
            whole = "".join(parts[: min(last, 3) + 1])
            del shared.messages.calls[:]
            body = shared.ask("Count.", client)
            assert (body["response"], body.get("stopReason")) == (
                whole, "max_tokens" if last == 9 else None,
            )
            assert body["usage"]["inputTokens"] == 10 * len(shared.calls())
            del shared.messages.calls[:]
            # Without a limit of the client, at which the answer would end.
            answer = chat(client, MESSAGES, said("Count."), max_tokens=0)
            assert answer["content"] == [{"type": "text", "text": whole}]
            assert answer["stop_reason"] == ("max_tokens" if last == 9 else "end_turn")
            del shared.messages.calls[:]
            choice = chat(client, COMPLETIONS, said("Count."), max_tokens=0)["choices"][0]
            assert choice["message"]["content"] == whole
            assert choice["finish_reason"] == ("length" if last == 9 else "stop")
            del shared.messages.calls[:]
            with streamed(client, "Count.") as stream:
                assert text_of(stream.rest()) == whole


def test_the_parts_of_an_answer_are_part_of_its_conversation(site: Site) -> None:
    site.start("--warm-seconds", "0")
    client, _ = site.client(sessionMode="stateful")
    site.messages.reply = lambda body: (
        Reply("one, ", stop_reason="max_tokens") if len(site.calls()) == 1 else Reply("two.")
    )
    assert site.ask("Count.", client)["response"] == "one, two."
    site.ask("And now?", client)
    turns = [turn for turn in turn_texts(site.calls()[-1].body) if turn[1]]
    assert turns == [("user", "Count."), ("assistant", "one, two."), ("user", "And now?")]


def messages_of(call: Call) -> List[Tuple[str, Any]]:
    """Return all messages of a request, also those of the CLI, without the cache's breakpoints."""
    messages = []
    for message in call.body["messages"]:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        blocks = [{k: v for k, v in block.items() if k != "cache_control"} for block in content]
        messages.append((message["role"], blocks))
    return messages


def test_a_request_begins_with_the_one_before(site: Site, version: Version) -> None:
    """Otherwise the prompt cache of the API would be of no use to a conversation."""
    site.start()
    asked: List[Dict[str, Any]] = []
    for number in range(6):
        site.idle(2 + (number not in (0, 3, 5)))
        asked += [{"role": "user", "content": "question %d" % number}]
        answer = chat(site.admin, MESSAGES, asked)
        asked += [{"role": "assistant", "content": answer["content"][0]["text"]}]
        if number in (2, 4):
            site.end()
            site.start()
    systems = [system_text(call.body) for call in site.calls()]
    assert len(set(systems)) == 1
    for before, after in zip(site.calls(), site.calls()[1:]):
        earlier, later = messages_of(before), messages_of(after)
        assert later[: len(earlier)] == earlier and len(later) > len(earlier)


def test_a_conversation_is_never_summarized(shared: Site) -> None:
    """Near the end of the window, the CLI would replace the history on its own."""
    shared.messages.reply = lambda body: Reply("noted", usage={"input_tokens": 985_000})
    with passing(shared) as client:
        asked = said("one")
        for word in ("two", "three", "four"):
            count = len(shared.calls())
            answer = client.post(MESSAGES, {"max_tokens": 9, "messages": asked})
            if answer.status != 200:
                assert answer.status == 400 and "too long" in answer.json["error"]["message"]
                assert len(shared.calls()) == count
            else:
                (call,) = shared.calls()[count:]
                sent = [(message["role"], message["content"]) for message in asked]
                assert [turn for turn in turn_texts(call.body) if turn[1]] == sent
            asked = [*asked, *said("", word)]
            asked[-2:] = [
                {"role": "assistant", "content": "noted"}, {"role": "user", "content": word}
            ]


@pytest.mark.parametrize("pairs", (60, 61))
@pytest.mark.parametrize("kind", ("texts", "pictures", "calls"))
def test_a_long_history_arrives_as_it_was_sent(shared: Site, kind: str, pairs: int) -> None:
    """More turns than are sent one by one: piped, or in a transcript."""
    picture = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": PICTURE},
    }
    messages: List[Dict[str, Any]] = [{"role": "user", "content": texts("start")[0][1]}]
    for number in range(pairs):
        answer: List[Dict[str, Any]] = [{"type": "text", "text": "answer %d" % number}]
        question: List[Dict[str, Any]] = [{"type": "text", "text": "question %d" % number}]
        if kind == "pictures":
            question.insert(0, picture)
        if kind == "calls":
            call_id = "toolu_%d" % number
            answer.append(
                {"type": "tool_use", "id": call_id, "name": "add", "input": {"a": number}}
            )
            question = [{
                "type": "tool_result", "tool_use_id": call_id,
                "content": [{"type": "text", "text": "result %d" % number}],
            }]
        messages += [
            {"role": "assistant", "content": answer}, {"role": "user", "content": question}
        ]
    with passing(shared) as client:
        tools = {"tools": [ADD]} if kind == "calls" else {}
        chat(client, MESSAGES, messages, **tools)
    (call,) = shared.calls()
    sent = [(message["role"], message["content"]) for message in messages]
    received = blocks_of(call)
    for _, blocks in received:
        for block in blocks:
            if block["type"] == "tool_use":
                block["name"] = block["name"].replace("mcp__api__", "")
    assert received == sent
    folder = shared.data / "transcripts"
    content = "".join(path.read_text() for path in folder.glob("*") if path.is_file())
    assert "question" not in content
