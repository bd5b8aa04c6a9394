"""Tests of raw connections: request parsing, reuse and close, headers of every answer."""

from __future__ import annotations

import contextlib
import errno
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import pytest

import claude_api_bridge as cab
from conftest import (
    Answer,
    FakeClock,
    RunningBridge,
    plain_bridge,
    wait_until,
)

# Less than any deadline that the tests leave unchanged.
SECONDS = 9.0
TOO_MUCH = 3 << 20


class Wire:
    """A connection that sends any bytes; every read has a timeout."""

    def __init__(self, port: int, buffer: int = 1 << 16) -> None:
        """buffer: size of the receive buffer, in bytes."""
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(SECONDS)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.file.close()
        self.socket.close()

    def send(self, *pieces: bytes) -> "Wire":
        for piece in pieces:
            self.socket.sendall(piece)
        return self

    def answer(self, has_body: bool = True) -> Answer:
        """Read the next answer; bytes after it stay unread."""
        first = self.file.readline()
        assert first.startswith(b"HTTP/1.1 "), first
        headers: Dict[str, str] = {}
        for line in iter(self.file.readline, b"\r\n"):
            name, colon, value = line.decode("latin-1").rstrip("\r\n").partition(": ")
            assert colon and name.lower() not in headers, line
            headers[name.lower()] = value
        return Answer(
            int(first[9:12]),
            headers,
            # A 204 has neither a body nor a length.
            self.file.read(int(headers.get("content-length", "0"))) if has_body else b"",
        )

    def rest(self) -> bytes:
        """Read until the bridge closes the connection; raise a timeout if it does not."""
        try:
            return self.file.read()
        except ConnectionResetError:
            return b""

    def last_answer(self) -> Answer:
        """Read the next answer, which must announce that it is the last, and be it."""
        answer = self.answer()
        assert (answer.headers["connection"], self.rest()) == ("close", b"")
        return answer

    def drip(self) -> bytes:
        """Send a byte now and then until the bridge closes the connection. -> its answer."""
        self.socket.settimeout(0.05)
        for _ in range(int(SECONDS / 0.05)):
            try:
                self.socket.sendall(b"x")
                return self.socket.recv(65_536)
            except socket.timeout:
                continue
            except ConnectionError:
                return b""
        raise AssertionError("still open")


def request(
    line: str = "GET /health HTTP/1.1", *headers: str, body: bytes = b"", host: bool = True
) -> bytes:
    """Return a request with exactly these lines; no length is added."""
    return (
        "\r\n".join([line, *(["Host: localhost"] if host else []), *headers, "", ""]).encode(
            "latin-1"
        )
        + body
    )


def post(api: Any, path: str, body: bytes, *headers: str) -> bytes:
    return request(
        "POST %s HTTP/1.1" % path, "Authorization: Bearer " + api.token, *headers, body=body
    )


def sized(api: Any, path: str, body: bytes, *headers: str) -> bytes:
    return post(api, path, body, "Content-Length: %d" % len(body), *headers)


HIDDEN = request("GET /hidden HTTP/1.1")
NEW_TOKEN = b'{"name": "from the wire"}'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBridge]:
    """Run one bridge for all tests that only send requests to it."""
    with plain_bridge(tmp_path_factory.mktemp("served")) as running:
        yield running


def connection_threads() -> List[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("http-")]


def phases(running: RunningBridge) -> List[str]:
    """Return the phases of the open connections."""
    return [state.phase for state in list(running.bridge._server._connections.values())]


@pytest.fixture
def long_poll(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunningBridge, str, Wire], None]:
    """long_poll(running, job id, wire): start a long poll; on return the bridge waits."""
    entered, poll = [], cab.Service.poll

    def note_poll(*args: Any) -> Any:
        entered.append(args)
        return poll(*args)

    monkeypatch.setattr(cab.Service, "poll", note_poll)

    def begin(running: RunningBridge, job_id: str, wire: Wire) -> None:
        before = len(entered)
        wire.send(
            request(
                "GET /api/ask/%s?wait=90 HTTP/1.1" % job_id,
                "Authorization: Bearer %s" % running.admin.token,
            )
        )
        wait_until(lambda: len(entered) > before)

    return begin


LongPoll = Callable[[RunningBridge, str, Wire], None]


def processing(running: RunningBridge, gate: Path) -> str:
    """Return the id of a job that runs until the gate opens; no connection is open on return."""
    job_id = running.admin.ask("hold %s" % gate)
    wait_until(lambda: running.admin.poll(job_id)["status"] == "processing")
    wait_until(lambda: not connection_threads())
    return job_id


def set_cap(monkeypatch: pytest.MonkeyPatch, connections: int) -> None:
    """Limit the number of connections; wait until those of earlier tests are closed."""
    wait_until(lambda: not connection_threads())
    monkeypatch.setattr(cab, "CONNECTIONS", connections)


# --- several requests on one connection ---


def test_a_connection_serves_several_requests_in_turn(served: RunningBridge) -> None:
    with Wire(served.port) as wire:
        for _ in range(3):
            answer = wire.send(request()).answer()
            assert (answer.status, answer.json, answer.headers["connection"]) == (
                200, {"status": "ok"}, "keep-alive",
            )


def test_pipelined_requests_are_answered_in_order(served: RunningBridge) -> None:
    with Wire(served.port) as wire:
        wire.send(
            request()
            + request("GET /none HTTP/1.1")
            + request("OPTIONS / HTTP/1.1")
            + request("GET /api/status HTTP/1.1")
        )
        assert [wire.answer().status for _ in range(4)] == [200, 404, 204, 200]


def test_requests_may_arrive_byte_by_byte(served: RunningBridge) -> None:
    sent = sized(served.admin, "/api/tokens", NEW_TOKEN) + request()
    with Wire(served.port) as wire:
        wire.send(*(sent[at : at + 1] for at in range(len(sent))))
        assert [wire.answer().status, wire.answer().status] == [201, 200]


def test_head_answers_like_get_without_the_body(served: RunningBridge) -> None:
    with Wire(served.port) as wire:
        for path in ("/health", "/api/status", "/none"):
            full = wire.send(request("GET %s HTTP/1.1" % path)).answer()
            head = wire.send(request("HEAD %s HTTP/1.1" % path)).answer(has_body=False)
            assert (head.status, head.headers["content-length"]) == (
                full.status, str(len(full.data)),
            )


@pytest.mark.parametrize(
    "status, sent",
    [
        pytest.param(status, sent, id=name)
        for name, status, sent in (
            ("401 without a body", 401, request("GET /api/tokens HTTP/1.1")),
            (
                "401 with a body",
                401,
                request("POST /api/ask HTTP/1.1", "Content-Length: %d" % len(HIDDEN), body=HIDDEN),
            ),
            ("404 without a body", 404, request("GET /none HTTP/1.1")),
            (
                "404 with a body",
                404,
                request("POST /none HTTP/1.1", "Content-Length: %d" % len(HIDDEN), body=HIDDEN),
            ),
            (
                "405 with a body",
                405,
                request("PUT /api/ask HTTP/1.1", "Content-Length: %d" % len(HIDDEN), body=HIDDEN),
            ),
            (
                "200 with an unread body",
                200,
                request("GET /health HTTP/1.1", "Content-Length: %d" % len(HIDDEN), body=HIDDEN),
            ),
            (
                "204 with an unread body",
                204,
                request("OPTIONS / HTTP/1.1", "Content-Length: %d" % len(HIDDEN), body=HIDDEN),
            ),
        )
    ],
)
def test_a_refusal_keeps_the_connection_and_its_body_is_not_a_request(
    served: RunningBridge, status: int, sent: bytes
) -> None:
    with Wire(served.port) as wire:
        wire.send(sent, request())
        assert [wire.answer().status, wire.answer().status] == [status, 200]


@pytest.mark.parametrize(
    "body, headers, status",
    [(b"{", (), 400), (b'{"message": 1}', (), 400), (b"x", ("Content-Encoding: gzip",), 415)],
)
def test_a_refused_body_keeps_the_connection(
    served: RunningBridge, body: bytes, headers: Tuple[str, ...], status: int
) -> None:
    with Wire(served.port) as wire:
        wire.send(sized(served.admin, "/api/ask", body, *headers), request())
        assert [wire.answer().status, wire.answer().status] == [status, 200]


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(sent, id=name)
        for name, sent in (
            ("asked to close", request("GET /health HTTP/1.1", "Connection: close")),
            (
                "asked to close in capitals",
                request("GET /health HTTP/1.1", "Connection: Foo, CLOSE"),
            ),
            (
                "asked to keep and to close",
                request("GET /health HTTP/1.1", "Connection: keep-alive, close"),
            ),
            (
                "asked to keep and to close in two lines",
                request("GET /health HTTP/1.1", "Connection: keep-alive", "Connection: close"),
            ),
            (
                "asked to keep and to close over HTTP/1.0",
                request("GET /health HTTP/1.0", "Connection: keep-alive,close", host=False),
            ),
            (
                "an option that only begins with keep-alive over HTTP/1.0",
                request("GET /health HTTP/1.0", "Connection: keep-alive-2", host=False),
            ),
            ("HTTP/1.0", request("GET /health HTTP/1.0", host=False)),
        )
    ],
)
def test_the_connection_is_closed_when_the_client_asks_for_it(
    served: RunningBridge, sent: bytes
) -> None:
    with Wire(served.port) as wire:
        assert wire.send(sent + HIDDEN).last_answer().status == 200


@pytest.mark.parametrize("option", ["closed-circuit", "not-close", "foo, disclose", ",", ""])
def test_an_option_that_only_contains_close_keeps_the_connection(
    served: RunningBridge, option: str
) -> None:
    with Wire(served.port) as wire:
        for _ in range(2):
            wire.send(request("GET /health HTTP/1.1", "Connection: " + option))
            answer = wire.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "keep-alive")


def test_an_http_1_0_client_may_keep_the_connection(served: RunningBridge) -> None:
    with Wire(served.port) as wire:
        for _ in range(2):
            answer = wire.send(
                request("GET /health HTTP/1.0", "Connection: keep-alive", host=False)
            ).answer()
            assert (answer.status, answer.headers["connection"]) == (200, "keep-alive")


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(sent, id=name)
        for name, sent in (
            ("a leading blank line", b"\r\n" + request()),
            (
                "names in any case, blanks around values",
                request("GET /health HTTP/1.1", "aCCept: \t */* \t", "X-Empty:"),
            ),
            ("an absolute target", request("GET http://localhost/health?x=%20&x HTTP/1.1")),
            (
                "an absolute target in capitals, with a port",
                request("GET HTTP://LOCALHOST:80/health HTTP/1.1"),
            ),
            ("HTTP/1.2", request("GET /health HTTP/1.2")),
            ("HTTP/1.9", request("GET /health HTTP/1.9")),
            ("any visible byte in a value", request("GET /health HTTP/1.1", 'X: \xe9\xff "(,;=)"')),
            ("many headers", request("GET /health HTTP/1.1", *("X-%d: y" % n for n in range(500)))),
            ("a head of nearly 16 KiB", request("GET /health HTTP/1.1", "X: " + "y" * 16_000)),
        )
    ],
)
def test_an_unusual_but_valid_head_is_served(served: RunningBridge, sent: bytes) -> None:
    with Wire(served.port) as wire:
        assert wire.send(sent, request()).answer().status == 200
        assert wire.answer().status == 200


def test_options_is_answered_with_204_without_a_length(served: RunningBridge) -> None:
    with Wire(served.port) as wire:
        for path in ("/", "/api/ask", "*"):
            answer = wire.send(request("OPTIONS %s HTTP/1.1" % path)).answer()
            assert answer.status == 204 and answer.headers["connection"] == "keep-alive"
            assert not {"content-length", "transfer-encoding"} & set(answer.headers)
        assert wire.send(request()).answer().status == 200


def test_a_later_minor_version_is_treated_as_1_1(served: RunningBridge) -> None:
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)
    sent = post(served.admin, "/api/tokens", b"", CHUNKED, "Expect: 100-continue")
    with Wire(served.port) as wire:
        wire.send(sent.replace(b"HTTP/1.1", b"HTTP/1.2", 1))
        assert wire.file.readline() + wire.file.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
        answer = wire.send(body).answer()
        assert (answer.status, answer.headers["connection"]) == (201, "keep-alive")
        wire.send(request("GET /health HTTP/1.7", "Connection: close"))
        assert wire.last_answer().status == 200


@pytest.mark.parametrize(
    "target, host, status",
    [
        ("http://evil.example/", "localhost", 421),
        ("http://evil.example/health", "localhost", 421),
        ("http://evil.example:80", "localhost", 421),
        ("https://evil.example?a=/localhost/", "localhost", 421),
        ("/health", "evil.example", 421),
        ("http://localhost/health", "evil.example", 200),
        ("http://localhost/health", "localhost", 200),
        ("http://127.0.0.1/health", "evil.example", 200),
        ("http://[::1]:3000/health", "evil.example", 200),
    ],
)
def test_the_host_of_an_absolute_target_is_checked_instead_of_the_header(
    served: RunningBridge, target: str, host: str, status: int
) -> None:
    with Wire(served.port) as wire:
        wire.send(request("GET %s HTTP/1.1" % target, "Host: " + host, host=False), request())
        answer = wire.answer()
        assert answer.status == status
        assert status == 200 or answer.json["code"] == "unknown_host"
        assert wire.answer().status == 200


def test_the_path_and_query_of_an_absolute_target_are_used(served: RunningBridge) -> None:
    token = "Authorization: Bearer %s" % served.admin.token
    for target, status in (
        ("http://localhost", 200),
        ("http://localhost?status=none", 200),
        ("http://localhost/api/requests?status=queued", 200),
        ("http://localhost/api/requests?status=none", 400),
        ("http://localhost/none", 404),
    ):
        with Wire(served.port) as wire:
            answer = wire.send(request("GET %s HTTP/1.1" % target, token)).answer()
            assert answer.status == status, target


# --- refused heads ---


def smuggled(*headers: str, line: str = "POST /api/ask HTTP/1.1", body: bytes = b"") -> bytes:
    """Return a request whose length has two readings, one of which makes its body a request."""
    return request(line, *headers, body=body)


REFUSED: Tuple[Tuple[str, int, Union[bytes, str]], ...] = (
    (
        "both lengths",
        400,
        smuggled("Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    ),
    (
        "both lengths, the other way round",
        400,
        smuggled("Transfer-Encoding: chunked", "Content-Length: 5", body=b"0\r\n\r\n"),
    ),
    (
        "two differing lengths",
        400,
        smuggled("Content-Length: 0", "Content-Length: %d" % len(HIDDEN)),
    ),
    ("the same length twice", 400, smuggled("Content-Length: 0", "Content-Length: 0")),
    ("a list of lengths", 400, smuggled("Content-Length: 0, 0")),
    ("a signed length", 400, smuggled("Content-Length: +5", body=b"12345")),
    ("a length with an underscore", 400, smuggled("Content-Length: 1_0", body=b"1234567890")),
    ("a negative length", 400, smuggled("Content-Length: -1")),
    ("a hexadecimal length", 400, smuggled("Content-Length: 0x0")),
    ("an empty length", 400, smuggled("Content-Length:")),
    ("a length in other digits", 400, smuggled("Content-Length: \xb2")),
    ("an endless length", 400, smuggled("Content-Length: " + "9" * 400)),
    ("a blank before the colon", 400, smuggled("Content-Length : %d" % len(HIDDEN))),
    ("a tab before the colon", 400, smuggled("Transfer-Encoding\t: chunked")),
    ("a folded line", 400, smuggled("X: a", " Content-Length: %d" % len(HIDDEN))),
    (
        "a folded first line",
        400,
        request("GET /health HTTP/1.1", host=False).replace(
            b"\r\n", b"\r\n Host: localhost\r\n", 1
        ),
    ),
    ("a bare CR in a value", 400, smuggled("X: a\rContent-Length: %d" % len(HIDDEN))),
    ("a bare CR at the end of a value", 400, smuggled("X: a\r")),
    ("NUL in a value", 400, smuggled("X: a\0b")),
    ("NUL in a name", 400, smuggled("X\0: a")),
    ("a control character in a value", 400, smuggled("X: a\x0bb")),
    ("DEL in a value", 400, smuggled("X: a\x7fb")),
    ("a line without a colon", 400, smuggled("X")),
    ("a header without a name", 400, smuggled(": a")),
    ("a name that is no word", 400, smuggled("X(y): a")),
    ("two hosts", 400, smuggled("Host: other")),
    ("no host on 1.1", 400, request(host=False)),
    ("no host on 1.2", 400, request("GET /health HTTP/1.2", host=False)),
    (
        "no host beside an absolute target",
        400,
        request("GET http://localhost/health HTTP/1.1", host=False),
    ),
    ("user info in the target", 400, request("GET http://user@localhost/health HTTP/1.1")),
    ("a password in the target", 400, request("GET http://a:b@localhost/health HTTP/1.1")),
    ("localhost as user info", 400, request("GET http://localhost@evil.example/ HTTP/1.1")),
    ("empty user info", 400, request("GET http://@localhost/health HTTP/1.1")),
    ("a target without a host", 400, request("GET http:///health HTTP/1.1")),
    ("a target with a port only", 400, request("GET http://:80/health HTTP/1.1")),
    ("a target of another scheme", 400, request("GET ftp://localhost/health HTTP/1.1")),
    ("two authorizations", 400, smuggled("Authorization: Bearer a", "Authorization: Bearer b")),
    ("an unknown coding", 501, smuggled("Transfer-Encoding: xchunked", body=b"0\r\n\r\n")),
    (
        "a coding before chunked",
        501,
        smuggled("Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    ),
    (
        "chunked twice in a line",
        501,
        smuggled("Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"),
    ),
    (
        "chunked in two lines",
        400,
        smuggled("Transfer-Encoding: chunked", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    ),
    ("identity as a coding", 501, smuggled("Transfer-Encoding: identity")),
    ("an empty coding", 501, smuggled("Transfer-Encoding:")),
    (
        "chunked on 1.0",
        400,
        smuggled("Transfer-Encoding: chunked", line="POST /api/ask HTTP/1.0", body=b"0\r\n\r\n"),
    ),
    ("another expectation", 417, smuggled("Expect: 200-ok")),
    ("tabs in the request line", 400, request("GET\t/health\tHTTP/1.1")),
    ("two blanks in the request line", 400, request("GET  /health HTTP/1.1")),
    ("a blank before the method", 400, request(" GET /health HTTP/1.1")),
    ("a blank after the version", 400, request("GET /health HTTP/1.1 ")),
    ("a blank in the target", 400, request("GET /hea lth HTTP/1.1")),
    ("bytes beyond ASCII in the target", 400, request("GET /h\xe9alth HTTP/1.1")),
    ("a target that is no path", 400, request("GET health HTTP/1.1")),
    ("an asterisk with GET", 400, request("GET * HTTP/1.1")),
    ("no version", 400, b"GET /health\r\n\r\n"),
    ("a version of three digits", 400, request("GET /health HTTP/1.10")),
    ("a version in small letters", 400, request("GET /health http/1.1")),
    ("HTTP/0.9", 505, request("GET /health HTTP/0.9")),
    ("HTTP/2.0", 505, request("GET /health HTTP/2.0")),
    ("the preface of HTTP/2", 505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ("a TLS greeting", 400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    ("an unknown method", 501, request("BREW /health HTTP/1.1")),
    ("TRACE", 501, request("TRACE /health HTTP/1.1")),
    ("CONNECT", 501, request("CONNECT bridge:443 HTTP/1.1")),
    ("a method in small letters", 501, request("get /health HTTP/1.1")),
    ("a header of 20 KB", 431, request("GET /health HTTP/1.1", "X: " + "y" * 20_000)),
    ("20 KB of headers", 431, request("GET /health HTTP/1.1", *["X: " + "y" * 96] * 200)),
    ("a request line of 20 KB", 431, request("GET /%s HTTP/1.1" % ("y" * 20_000))),
    ("a request line of 70 KB", 431, request("GET /%s HTTP/1.1" % ("y" * 70_000))),
    ("100,000 headers", 431, request("GET /health HTTP/1.1", *["X:"] * 100_000)),
    ("blank lines without end", 400, b"\r\n" * 5_000),
)


@pytest.mark.parametrize(
    "status, sent", [pytest.param(status, sent, id=name) for name, status, sent in REFUSED]
)
def test_a_head_that_is_not_http_is_refused_and_hides_no_request(
    served: RunningBridge, status: int, sent: bytes
) -> None:
    with Wire(served.port) as wire:
        answer = wire.send(sent + HIDDEN).last_answer()
    assert (answer.status, sorted(answer.json)) == (status, ["code", "error"])
    assert served.admin.get("/health").status == 200


def test_a_bare_lf_in_a_value_hides_no_request(served: RunningBridge) -> None:
    with Wire(served.port) as wire:
        answer = wire.send(
            request("GET /health HTTP/1.1", "X: a\n\n" + HIDDEN.decode())
        ).last_answer()
        assert answer.status == 400


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"\n", id="before the request"),
        pytest.param(b"\r\n\n", id="after a leading blank line"),
        pytest.param(b"GET /health HTTP/1.1\n", id="in the request line"),
        pytest.param(request()[:-2] + b"X: a\n", id="in a header"),
        pytest.param(request()[:-2] + b"X: a\nY: b", id="within a header"),
        pytest.param(request()[:-2] + b"\n", id="as the blank line"),
    ],
)
def test_a_bare_lf_is_refused_at_once(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    # The client sends no end, and no deadline passes.
    monkeypatch.setitem(cab.Phase.SECONDS, cab.Phase.HEAD, float("inf"))
    with Wire(served.port) as wire:
        answer = wire.send(sent).last_answer()
        assert (answer.status, answer.json["code"]) == (400, "malformed_request")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\n\r\n",
        b"GET /health HTTP/1.0x\n\r\n",
        b"\n\r\n\r\n",
    ],
)
def test_a_blank_line_after_a_bare_lf_does_not_end_a_head(
    served: RunningBridge, sent: bytes
) -> None:
    with Wire(served.port) as wire:
        assert wire.send(sent).last_answer().status == 400


def test_a_head_that_fits_in_the_read_buffer_can_still_be_too_large(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the buffer size of Python 3.14
    monkeypatch.setattr(cab.ConnectionHandler, "rbufsize", 1 << 17)
    with Wire(served.port) as wire:
        answer = wire.send(request("GET /health HTTP/1.1", *["X: " + "y" * 96] * 200)).last_answer()
        assert answer.status == 431


def test_a_refused_head_is_refused_on_a_used_connection_too(served: RunningBridge) -> None:
    with Wire(served.port) as wire:
        assert wire.send(request()).answer().status == 200
        answer = wire.send(request("GET /%s HTTP/1.1" % ("y" * 70_000)) + HIDDEN).last_answer()
        assert answer.status == 431


def test_no_header_line_takes_long_to_refuse() -> None:
    """A pattern with two ways to match would take minutes.

    All other threads would wait for it, because it holds the interpreter lock.
    """
    began = time.monotonic()
    assert not cab.HEADER_LINE_RE.fullmatch(b"name:" + b" \t" * 300_000 + b"\0")
    assert not cab.REQUEST_LINE_RE.fullmatch(b"GET " + b"/" * 300_000 + b" " * 300_000)
    assert not cab.ABSOLUTE_TARGET_RE.fullmatch("http://" + "a" * 600_000 + "@")
    assert time.monotonic() - began < 10


def test_a_truncated_head_is_refused(served: RunningBridge) -> None:
    with Wire(served.port) as wire:
        wire.send(request()[:-2]).socket.shutdown(socket.SHUT_WR)
        answer = wire.last_answer()
        assert (answer.status, answer.json["code"]) == (400, "malformed_request")


# --- bodies ---

CHUNKED = "Transfer-Encoding: chunked"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(body, id=name)
        for name, body in (
            ("one chunk", b"%x\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
            (
                "a chunk for every byte",
                b"".join(b"1\r\n%c\r\n" % byte for byte in NEW_TOKEN) + b"0\r\n\r\n",
            ),
            (
                "zeros before a size, capitals",
                b"000F\r\n%b\r\n0A\r\n%b\r\n00\r\n\r\n" % (NEW_TOKEN[:15], NEW_TOKEN[15:]),
            ),
            (
                "an extension",
                b'%x;name="a b";x\r\n%b\r\n0;last\r\n\r\n' % (len(NEW_TOKEN), NEW_TOKEN),
            ),
            (
                "trailers",
                b"%x\r\n%b\r\n0\r\nX-Sum: 1\r\nContent-Length: 99\r\n\r\n"
                % (len(NEW_TOKEN), NEW_TOKEN),
            ),
        )
    ],
)
def test_a_chunked_body_is_joined(served: RunningBridge, body: bytes) -> None:
    with Wire(served.port) as wire:
        wire.send(post(served.admin, "/api/tokens", body, CHUNKED), request())
        assert [wire.answer().status, wire.answer().status] == [201, 200]
    assert served.admin.get("/api/tokens").json["tokens"][0]["name"] == "from the wire"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(body, id=name)
        for name, body in (
            ("a signed size", b"+%x\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
            ("a size with a prefix", b"0x%x\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
            ("a size with an underscore", b"1_9\r\n%b\r\n0\r\n\r\n" % NEW_TOKEN),
            ("a negative size", b"-1\r\n%b\r\n0\r\n\r\n" % NEW_TOKEN),
            ("no size", b"\r\n%b\r\n0\r\n\r\n" % NEW_TOKEN),
            ("a word as size", b"all\r\n%b\r\n0\r\n\r\n" % NEW_TOKEN),
            (
                "a size of nine digits",
                b"0000000%x\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN),
            ),
            ("a blank before a size", b" %x\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
            ("a bare LF after a size", b"%x\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
            (
                "a bare CR in an extension",
                b"%x;a\rb\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN),
            ),
            (
                "an endless extension",
                b"%x;%b\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), b"x" * 2_000, NEW_TOKEN),
            ),
            (
                "a chunk longer than it says",
                b"%x\r\n%b.\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN),
            ),
            ("a chunk ended by LF", b"%x\r\n%b\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
            (
                "a malformed trailer",
                b"%x\r\n%b\r\n0\r\nX : 1\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN),
            ),
            (
                "trailers without end",
                b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(NEW_TOKEN), NEW_TOKEN, b"X: 1\r\n" * 100),
            ),
        )
    ],
)
def test_a_bad_chunk_ends_the_connection_and_hides_no_request(
    served: RunningBridge, body: bytes
) -> None:
    before = served.admin.get("/api/status").json["stats"]["totalTokens"]
    with Wire(served.port) as wire:
        answer = wire.send(post(served.admin, "/api/tokens", body, CHUNKED), HIDDEN).last_answer()
    assert (answer.status, answer.json["code"]) == (400, "malformed_request")
    assert served.admin.get("/api/status").json["stats"]["totalTokens"] == before


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param((b"12345", "Content-Length: 10"), id="sized"),
        pytest.param((b"a\r\n12345", CHUNKED), id="in a chunk"),
        pytest.param((b"5\r\n12345\r\n", CHUNKED), id="between chunks"),
        pytest.param((b"5\r\n12345\r\n0\r\n", CHUNKED), id="before the end"),
    ],
)
def test_a_truncated_body_is_refused(served: RunningBridge, sent: Tuple[bytes, str]) -> None:
    with Wire(served.port) as wire:
        wire.send(post(served.admin, "/api/ask", *sent)).socket.shutdown(socket.SHUT_WR)
        assert wire.last_answer().status == 400


@pytest.mark.parametrize(
    "header, body",
    [
        pytest.param("Content-Length: %d" % TOO_MUCH, b"x" * TOO_MUCH, id="sized"),
        pytest.param("Content-Length: %d" % TOO_MUCH, HIDDEN, id="sized, and the client waits"),
        pytest.param(CHUNKED, b"%x\r\n%b\r\n" % (TOO_MUCH, b"x" * TOO_MUCH), id="one chunk"),
        pytest.param(
            CHUNKED, (b"%x\r\n%b\r\n" % (1 << 18, b"x" * (1 << 18))) * 12, id="many chunks"
        ),
    ],
)
def test_the_whole_refusal_of_a_large_body_arrives_while_the_client_still_sends(
    served: RunningBridge, header: str, body: bytes
) -> None:
    with Wire(served.port) as wire:
        answer = wire.send(post(served.admin, "/api/ask", body, header)).last_answer()
    assert (answer.status, answer.json["code"]) == (413, "body_too_large")


def test_a_body_of_exactly_the_limit_is_read(served: RunningBridge) -> None:
    body = b'{"name": "at the limit"}'.ljust(cab.BODY_BYTES)
    with Wire(served.port) as wire:
        assert wire.send(sized(served.admin, "/api/tokens", body)).answer().status == 201
        answer = wire.send(sized(served.admin, "/api/tokens", body + b" ")).last_answer()
        assert answer.status == 413


def test_a_large_unread_body_closes_the_connection(served: RunningBridge) -> None:
    with Wire(served.port) as wire:
        wire.send(request("POST /api/ask HTTP/1.1", "Content-Length: 100000", body=HIDDEN * 1_000))
        assert wire.last_answer().status == 401


def test_an_unread_chunked_body_closes_the_connection(served: RunningBridge) -> None:
    with Wire(served.port) as wire:
        answer = wire.send(
            request("POST /none HTTP/1.1", CHUNKED, body=b"0\r\n\r\n" + HIDDEN)
        ).last_answer()
        assert answer.status == 404


def test_100_continue_is_sent_for_a_body_that_is_read(served: RunningBridge) -> None:
    for length, body in (
        ("Content-Length: %d" % len(NEW_TOKEN), NEW_TOKEN),
        (CHUNKED, b"%x\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
    ):
        with Wire(served.port) as wire:
            wire.send(post(served.admin, "/api/tokens", b"", length, "Expect: 100-Continue"))
            assert wire.file.readline() + wire.file.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
            assert wire.send(body, request()).answer().status == 201
            assert wire.answer().status == 200


@pytest.mark.parametrize(
    "status, with_token, line, headers",
    [
        pytest.param(status, with_token, line, headers, id=name)
        for name, status, with_token, line, headers in (
            ("no token", 401, False, "POST /api/ask HTTP/1.1", ("Content-Length: 50",)),
            ("no such path", 404, True, "POST /none HTTP/1.1", ("Content-Length: 50",)),
            ("too large", 413, True, "POST /api/ask HTTP/1.1", ("Content-Length: %d" % TOO_MUCH,)),
            (
                "compressed", 415, True, "POST /api/ask HTTP/1.1",
                ("Content-Length: 50", "Content-Encoding: gzip"),
            ),
            ("not read", 200, True, "GET /health HTTP/1.1", ("Content-Length: 50",)),
        )
    ],
)
def test_100_continue_is_not_sent_for_a_body_that_is_not_read(
    served: RunningBridge, status: int, with_token: bool, line: str, headers: Tuple[str, ...]
) -> None:
    token = ("Authorization: Bearer %s" % served.admin.token,) if with_token else ()
    with Wire(served.port) as wire:
        answer = wire.send(request(line, *token, *headers, "Expect: 100-continue")).answer()
        assert answer.status == status
        # Bytes after this could be a body or a request.
        assert wire.rest() == b""


def test_100_continue_is_not_sent_without_a_body_or_over_http_1_0(served: RunningBridge) -> None:
    with Wire(served.port) as wire:
        answer = wire.send(
            post(served.admin, "/api/tokens", b"", "Content-Length: 0", "Expect: 100-continue")
        ).answer()
        assert answer.status == 400
    old = sized(served.admin, "/api/tokens", NEW_TOKEN, "Expect: 100-continue").replace(
        b"HTTP/1.1", b"HTTP/1.0", 1
    )
    with Wire(served.port) as wire:
        assert wire.send(old).last_answer().status == 201


# --- slow, idle and many connections ---


# The beginnings of requests; TOKEN stands for the admin's token.
POST_HEAD = b"POST /api/ask HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer TOKEN\r\n"
SIZED_HEAD = POST_HEAD + b"Content-Length: 900\r\n\r\n"
CHUNKED_HEAD = POST_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
INCOMPLETE = [
    pytest.param(cab.Phase.HEAD, b"G", id="in the request line"),
    pytest.param(cab.Phase.HEAD, b"GET / HTTP/1.1\r\nX: ", id="in a header"),
    pytest.param(cab.Phase.BODY, SIZED_HEAD, id="in a body"),
    pytest.param(cab.Phase.BODY, CHUNKED_HEAD + b"384\r\n{", id="in a chunk"),
    pytest.param(cab.Phase.BODY, CHUNKED_HEAD + b"1;", id="in the size of a chunk"),
    pytest.param(cab.Phase.BODY, CHUNKED_HEAD + b"0\r\nX: ", id="in a trailer"),
]


@pytest.mark.parametrize("phase, start", INCOMPLETE)
def test_a_client_that_drips_is_closed_at_the_deadline(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch, phase: str, start: bytes
) -> None:
    monkeypatch.setitem(cab.Phase.SECONDS, phase, 0.2)
    with Wire(served.port) as wire:
        wire.send(start.replace(b"TOKEN", str(served.admin.token).encode()))
        answer = wire.drip()
        assert answer.startswith(b"HTTP/1.1 408 ") and b'"code":"request_timeout"' in answer
        wait_until(lambda: not connection_threads())


@pytest.mark.parametrize(
    "phase, start",
    [
        *INCOMPLETE,
        pytest.param(cab.Phase.HEAD, b"\r\n", id="after a leading blank line"),
        pytest.param(cab.Phase.HEAD, request()[:-2], id="before the blank line"),
        pytest.param(cab.Phase.HEAD, request() + b"GET /", id="in a second request"),
        pytest.param(cab.Phase.BODY, CHUNKED_HEAD, id="before a chunk"),
        pytest.param(cab.Phase.BODY, CHUNKED_HEAD + b"1\r\n{", id="after a chunk"),
        pytest.param(cab.Phase.BODY, CHUNKED_HEAD + b"1\r\n{\r\n0\r\n", id="before the end"),
    ],
)
def test_a_request_that_stops_in_the_middle_gets_408_at_the_deadline(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch, phase: str, start: bytes
) -> None:
    monkeypatch.setitem(cab.Phase.SECONDS, phase, 0.2)
    with Wire(served.port) as wire:
        before = time.monotonic()
        wire.send(start.replace(b"TOKEN", str(served.admin.token).encode()))
        if start.startswith(request()):
            assert wire.answer().status == 200
        answer = wire.last_answer()
        assert time.monotonic() - before >= 0.2
        assert (answer.status, answer.json) == (
            408, {"error": "The request did not arrive in time", "code": "request_timeout"},
        )
    check_headers(answer)
    wait_until(lambda: not connection_threads())


def test_a_head_request_that_stops_in_the_middle_gets_408_without_a_body(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cab.Phase.SECONDS, cab.Phase.HEAD, 0.2)
    with Wire(served.port) as wire:
        assert wire.send(b"HEAD /health HTTP/1.1\r\nX").answer(has_body=False).status == 408
        assert wire.rest() == b""


def test_a_body_of_a_chat_that_stops_in_the_middle_gets_408_in_its_format(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cab.Phase.SECONDS, cab.Phase.BODY, 0.2)
    for path in ("/v1/messages", "/v1/chat/completions"):
        with Wire(served.port) as wire:
            wire.send(post(served.admin, path, b"{", "Content-Length: 900"))
            answer = wire.last_answer()
            assert answer.status == 408
            assert answer.json["error"]["message"] == "The request did not arrive in time"


def test_a_late_client_that_continues_to_send_is_disconnected(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cab.Phase.SECONDS, cab.Phase.BODY, 0.2)
    with Wire(served.port) as wire:
        wire.send(SIZED_HEAD.replace(b"TOKEN", str(served.admin.token).encode()))
        with pytest.raises(ConnectionError):
            for _ in range(int(SECONDS / 0.02)):
                wire.send(b"x")
                time.sleep(0.02)
    wait_until(lambda: not connection_threads())


@pytest.mark.parametrize("phase", [cab.Phase.HEAD, cab.Phase.BODY])
def test_a_late_connection_stays_open_for_its_answer_only(clock: FakeClock, phase: str) -> None:
    server = cab.BridgeServer("127.0.0.1", 0, clock)
    bridge_side, client_side = socket.socketpair()
    with contextlib.closing(server.socket), bridge_side, client_side:
        for side in (bridge_side, client_side):
            side.settimeout(SECONDS)
        assert server._admit(bridge_side)
        state = server.state_of(bridge_side)
        state.set_phase(phase)
        clock.advance(cab.Phase.SECONDS[phase] - 1)
        server.service_actions()
        assert not state.is_late
        clock.advance(1)
        server.service_actions()
        assert state.is_late and bridge_side.recv(1) == b""
        bridge_side.sendall(b"4")
        assert client_side.recv(1) == b"4"
        clock.advance(cab.LATE_SECONDS)
        server.service_actions()
        assert client_side.recv(1) == b""


def test_an_unread_body_delays_no_answer_and_occupies_no_connection(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cab.Phase.SECONDS, cab.Phase.BODY, 0.2)
    with Wire(served.port) as wire:
        answer = wire.send(
            b"POST /api/ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n"
        ).answer()
        assert answer.status == 401
        assert wire.drip() == b""
        wait_until(lambda: not connection_threads())


@pytest.mark.parametrize("before", [b"", request()])
def test_an_idle_connection_is_closed(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    seconds = 0.5 if before else 0.1  # the request must arrive in time
    monkeypatch.setitem(cab.Phase.SECONDS, cab.Phase.IDLE, seconds)
    monkeypatch.setattr(cab, "IDLE_SECONDS", seconds)
    with Wire(served.port) as wire:
        assert wire.send(before).rest().count(b"HTTP/1.1 200 OK") == len(before[:1])
        wait_until(lambda: not connection_threads())


def test_no_deadline_interrupts_a_long_poll(
    bridge: Callable[..., RunningBridge], monkeypatch: pytest.MonkeyPatch, gate: Path
) -> None:
    running = bridge(spare=0)
    job_id = processing(running, gate)
    for phase in (cab.Phase.IDLE, cab.Phase.HEAD, cab.Phase.BODY):
        monkeypatch.setitem(cab.Phase.SECONDS, phase, 0.4)
    assert running.admin.get("/api/ask/%s?wait=0.8" % job_id).json["status"] == "processing"


@pytest.mark.parametrize("first", [b"", b"GET /health HT", b"\r\n"])
def test_at_the_cap_the_connection_longest_without_a_request_makes_room(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    set_cap(monkeypatch, 2)
    began: List[None] = []
    setup = cab.ConnectionHandler.setup

    def note_setup(handler: Any) -> None:
        setup(handler)
        began.append(None)

    monkeypatch.setattr(cab.ConnectionHandler, "setup", note_setup)
    with Wire(served.port) as used, Wire(served.port) as waiting:
        wait_until(lambda: len(began) == 2)  # both wait for a request
        assert waiting.send(first) and used.send(request()).answer().status == 200
        with Wire(served.port) as new:
            assert new.send(request()).answer().status == 200
            assert waiting.rest() == b""
            assert used.send(request()).answer().status == 200


def test_when_all_connections_are_busy_a_new_one_gets_503_until_one_is_done(
    bridge: Callable[..., RunningBridge],
    gate: Path,
    monkeypatch: pytest.MonkeyPatch,
    long_poll: LongPoll,
) -> None:
    running = bridge(spare=0)
    job_id = processing(running, gate)
    set_cap(monkeypatch, 2)
    with Wire(running.port) as one, Wire(running.port) as two:
        long_poll(running, job_id, one)
        long_poll(running, job_id, two)
        with Wire(running.port) as three:
            answer = three.last_answer()
        assert (answer.status, answer.json["code"], answer.headers["retry-after"]) == (
            503, "unavailable", "1",
        )
        gate.touch()
        assert [one.answer().json["response"], two.answer().json["response"]] == ["held", "held"]
        wait_until(lambda: running.admin.get("/health").status == 200)


def test_a_silent_stream_keeps_its_connection(
    bridge: Callable[..., RunningBridge], gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = bridge(spare=0)
    job_id = processing(running, gate)
    set_cap(monkeypatch, 1)
    with Wire(running.port) as stream:
        stream.send(
            request(
                "GET /api/ask/%s/events HTTP/1.1" % job_id,
                "Authorization: Bearer %s" % running.admin.token,
            )
        )
        assert stream.answer(has_body=False).status == 200
        assert next(line for line in iter(stream.file.readline, b"") if line == b"event: delta\n")
        wait_until(lambda: phases(running) == ["busy"])
        for phase in (cab.Phase.IDLE, cab.Phase.HEAD, cab.Phase.BODY):
            monkeypatch.setitem(cab.Phase.SECONDS, phase, 0.05)
        # Continue until after the deadlines of all other phases.
        for _ in range(20):
            with Wire(running.port) as new:
                assert new.last_answer().status == 503
        gate.touch()
        assert b"event: completed" in b"".join(iter(stream.file.readline, b"0\r\n"))


def test_a_refused_connection_does_not_occupy_a_slot(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_cap(monkeypatch, 1)
    with Wire(served.port) as refused:
        answer = refused.send(
            request("POST /api/ask HTTP/1.1", "Content-Length: 100000")
        ).last_answer()
        assert answer.status == 401
        with Wire(served.port) as new:
            assert new.send(request()).answer().status == 200


def test_a_connection_that_reads_no_answer_does_not_occupy_a_slot(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_cap(monkeypatch, 1)
    # the stall after which a connection may be evicted
    monkeypatch.setattr(cab, "EVICTABLE_SEND_SECONDS", 0)
    with Wire(served.port) as deaf:
        deaf.socket.settimeout(0.3)
        # Its answers fill the buffers, then the bridge stops reading.
        with pytest.raises(socket.timeout):
            for _ in range(5_000):
                deaf.send(request("GET /dashboard HTTP/1.1") * 100)
        wait_until(lambda: phases(served) == ["send"])
        with Wire(served.port) as new:
            assert new.send(request()).answer().status == 200


def test_of_too_many_large_answers_the_oldest_is_broken_off(
    bridge: Callable[..., RunningBridge], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = bridge(spare=0)
    size, job_id = 8 << 20, running.admin.ask("flood 8")
    wait_until(lambda: running.admin.poll(job_id)["status"] == "completed", 30)
    poll = request(
        "GET /api/ask/%s HTTP/1.1" % job_id, "Authorization: Bearer %s" % running.admin.token
    )
    monkeypatch.setattr(cab, "LARGE_PAYLOAD_BUDGET_BYTES", size * 3 // 2)
    reserved = running.bridge._server._reserved
    with Wire(running.port, buffer=4_096) as deaf, Wire(running.port, buffer=4_096) as reader:
        deaf.send(poll)
        wait_until(lambda: reserved)
        answer = reader.send(poll).answer()
        assert (answer.status, len(answer.json["response"])) == (200, size)
        assert len(deaf.rest()) < size  # the client may ask again
    wait_until(lambda: not reserved)


def test_without_free_file_descriptors_the_longest_idle_connection_is_evicted(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until(lambda: not connection_threads())
    accept = cab.ThreadingHTTPServer.get_request
    failures = [OSError(errno.EMFILE, "Too many open files")] * 3

    def get_request(server: Any) -> Any:
        if failures:
            raise failures.pop()
        return accept(server)

    with Wire(served.port) as idle:
        wait_until(connection_threads)
        monkeypatch.setattr(cab.ThreadingHTTPServer, "get_request", get_request)
        with Wire(served.port) as new:
            assert new.send(request()).answer().status == 200 and not failures
            assert idle.rest() == b""


def test_every_connection_has_its_own_thread_that_ends_with_it(served: RunningBridge) -> None:
    wait_until(lambda: not connection_threads())
    with Wire(served.port) as one, Wire(served.port) as two:
        assert [wire.send(request()).answer().status for wire in (one, two)] == [200, 200]
        names = {"http-127.0.0.1:%d" % wire.socket.getsockname()[1] for wire in (one, two)}
        assert set(connection_threads()) == names
    wait_until(lambda: not connection_threads())
    assert served.bridge._server.connection_count == 0


def test_many_short_connections_are_all_served(served: RunningBridge) -> None:
    for _ in range(200):
        with Wire(served.port) as wire:
            answer = wire.send(request("GET /health HTTP/1.1", "Connection: close")).last_answer()
            assert answer.status == 200


@pytest.mark.parametrize(
    "sent",
    [
        request("GET /dashboard HTTP/1.1"),
        request(
            "POST /api/ask HTTP/1.1", "Authorization: Bearer TOKEN", "Expect: 100-continue",
            "Content-Length: 2", body=b"{}",
        ),
    ],
)
def test_a_client_that_reads_no_answer_is_disconnected(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setitem(cab.Phase.SECONDS, cab.Phase.SEND, 0.2)
    sent = sent.replace(b"TOKEN", str(served.admin.token).encode())
    with Wire(served.port, buffer=4_096) as deaf:
        deaf.socket.settimeout(5)
        with pytest.raises((ConnectionError, socket.timeout)) as ended:
            for _ in range(20_000):
                deaf.send(sent * 20)
        assert not isinstance(ended.value, socket.timeout)
    wait_until(lambda: not connection_threads())


def test_draining_a_refused_body_ends_at_its_deadline(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "DRAIN_SECONDS", 0.3)
    with Wire(served.port) as wire:
        answer = wire.send(
            request("POST /api/ask HTTP/1.1", "Content-Length: 100000")
        ).last_answer()
        assert answer.status == 401
        wait_until(lambda: not connection_threads())


@pytest.mark.parametrize(
    "behind",
    [
        b"",
        pytest.param(
            b"G",
            marks=pytest.mark.skipif(
                sys.platform != "linux", reason="elsewhere the bytes of a next request hide it"
            ),
        ),
    ],
    ids=["nothing", "a next request"],
)
def test_a_client_that_disconnects_during_a_long_poll_leaves_no_thread(
    bridge: Callable[..., RunningBridge],
    gate: Path,
    long_poll: LongPoll,
    monkeypatch: pytest.MonkeyPatch,
    behind: bytes,
) -> None:
    monkeypatch.setattr(cab, "RECHECK_SECONDS", 0.05)
    running = bridge(spare=0)
    job_id = processing(running, gate)
    with Wire(running.port) as wire:
        long_poll(running, job_id, wire)
        # Sent separately, after the first request was read.
        wire.send(behind)
    wait_until(lambda: not connection_threads())


@pytest.mark.parametrize("has_ended", [False, True])
def test_kqueue_tells_of_the_end_behind_the_bytes_of_a_next_request(
    bridge: Callable[..., RunningBridge], gate: Path, long_poll: LongPoll,
    monkeypatch: pytest.MonkeyPatch, has_ended: bool,
) -> None:
    """Emulated: macOS and BSD have no POLLRDHUP."""
    asked: List[Any] = []

    class KernelQueue:
        def control(self, changes: Any, most: int, timeout: float) -> Any:
            asked.append((changes, most, timeout))
            return [SimpleNamespace(flags=0x8000 if has_ended else 0x1)]

        def close(self) -> None:
            asked.append("closed")

    monkeypatch.setattr(cab, "RECHECK_SECONDS", 0.05)
    monkeypatch.setattr(cab, "POLLRDHUP", 0)
    for name, value in (
        ("kqueue", KernelQueue), ("kevent", lambda connection, kind: (connection.fileno(), kind)),
        ("KQ_FILTER_READ", -1), ("KQ_EV_EOF", 0x8000),
    ):
        monkeypatch.setattr(cab.select, name, value, raising=False)
    running = bridge(spare=0)
    job_id = processing(running, gate)
    with Wire(running.port) as wire:
        long_poll(running, job_id, wire)
        wait_until(lambda: len(asked) > 1)
        if has_ended:
            # It waits no longer.
            assert wire.answer().json["status"] == "processing"
        else:
            gate.touch()
            assert running.admin.done(job_id)["status"] == "completed"
    (([(descriptor, kind)], most, timeout), closed) = asked[:2]
    assert descriptor > 2 and (kind, most, timeout, closed) == (-1, 1, 0, "closed")
    wait_until(lambda: not connection_threads())


def test_a_client_that_disconnects_before_its_answer_is_not_an_error(
    bridge: Callable[..., RunningBridge], gate: Path, long_poll: LongPoll
) -> None:
    running = bridge(spare=0)
    job_id = processing(running, gate)
    with Wire(running.port) as wire:
        long_poll(running, job_id, wire)
    gate.touch()
    wait_until(lambda: not connection_threads())
    assert "error" not in " ".join(running.log).lower()


def test_a_client_that_only_closed_its_sending_side_is_answered(
    bridge: Callable[..., RunningBridge], gate: Path
) -> None:
    running = bridge(spare=0)
    job_id = processing(running, gate)
    for path in ("/health", "/api/ask/" + job_id, "/api/ask/%s?wait=90" % job_id):
        with Wire(running.port) as wire:
            wire.send(
                request("GET %s HTTP/1.1" % path, "Authorization: Bearer %s" % running.admin.token)
            ).socket.shutdown(socket.SHUT_WR)
            assert wire.answer().json["status"] in ("ok", "processing")


def test_closing_the_bridge_ends_idle_connections_and_answers_waiting_ones(
    bridge: Callable[..., RunningBridge],
    gate: Path,
    monkeypatch: pytest.MonkeyPatch,
    long_poll: LongPoll,
) -> None:
    running = bridge(spare=0)
    job_id = processing(running, gate)
    monkeypatch.setattr(cab, "FINISH_SECONDS", 0.1)
    with Wire(running.port) as idle, Wire(running.port) as waiting:
        long_poll(running, job_id, waiting)
        assert idle.send(request()).answer().status == 200
        running.bridge.__exit__(None, None, None)
        assert idle.rest() == b""
        assert waiting.answer().json["requestId"] == job_id


# --- headers of every answer ---

STANDARD = {
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "origin-agent-cluster": "?1",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-dns-prefetch-control": "off",
    "x-download-options": "noopen",
    "x-permitted-cross-domain-policies": "none",
    "x-xss-protection": "0",
    "access-control-allow-origin": "*",
    "cache-control": "no-store",
}
ABSENT = ("server", "x-powered-by", "strict-transport-security", "set-cookie", "transfer-encoding")


def check_headers(answer: Answer) -> None:
    assert {name: answer.headers.get(name) for name in STANDARD} == STANDARD
    assert answer.headers["x-frame-options"] in ("SAMEORIGIN", "DENY")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "upgrade-insecure-requests" not in policy
    assert not [name for name in ABSENT if name in answer.headers]
    if answer.status != 204 and "html" not in answer.headers["content-type"]:
        assert answer.headers["content-type"] == "application/json; charset=utf-8"
        assert isinstance(answer.json, dict)
    assert answer.headers["date"].endswith(" GMT")
    assert abs(parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()) < 60
    if answer.status == 204:
        assert "content-length" not in answer.headers
    else:
        assert int(answer.headers["content-length"]) == len(answer.data)


@pytest.mark.parametrize(
    "status, sent",
    [
        pytest.param(status, sent, id="%d %s" % (status, name))
        for status, name, sent in (
            (200, "json", request()),
            (200, "page", request("GET /dashboard HTTP/1.1")),
            (204, "preflight", request("OPTIONS /none HTTP/1.1")),
            (400, "by the parser", request("GET /health HTTP/1.1", "X y")),
            (400, "by the routes", request("GET /api/ask/%zz HTTP/1.1")),
            (401, "no token", request("POST /api/ask HTTP/1.1")),
            (404, "no path", request("GET /none HTTP/1.1")),
            (405, "no method", request("PUT /api/ask HTTP/1.1")),
            (417, "expectation", request("GET / HTTP/1.1", "Expect: more")),
            (431, "head", request("GET / HTTP/1.1", "X: " + "y" * 20_000)),
            (501, "method", request("BREW / HTTP/1.1")),
            (501, "coding", request("POST / HTTP/1.1", "Transfer-Encoding: br")),
            (505, "version", request("GET / HTTP/3.0")),
        )
    ],
)
def test_every_answer_carries_the_security_headers(
    served: RunningBridge, status: int, sent: bytes
) -> None:
    with Wire(served.port) as wire:
        answer = wire.send(sent).answer()
    assert answer.status == status
    check_headers(answer)


def test_answers_to_token_holders_carry_the_security_headers(served: RunningBridge) -> None:
    for status, sent in (
        (201, sized(served.admin, "/api/tokens", NEW_TOKEN)),
        (400, sized(served.admin, "/api/ask", b"{")),
        (413, post(served.admin, "/api/ask", b"", "Content-Length: %d" % TOO_MUCH)),
        (415, sized(served.admin, "/api/ask", b"x", "Content-Encoding: br")),
    ):
        with Wire(served.port) as wire:
            answer = wire.send(sent).answer()
        assert answer.status == status
        check_headers(answer)


def test_a_connection_rejected_at_the_cap_gets_the_security_headers(
    served: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_cap(monkeypatch, 0)
    with Wire(served.port) as wire:
        answer = wire.answer()
    assert answer.status == 503
    check_headers(answer)


def test_a_fault_in_an_answer_gives_500_and_its_details_go_to_the_log_only(
    bridge: Callable[..., RunningBridge], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = bridge(spare=0)
    secret = str(running.admin.token)

    def fail(*args: Any) -> None:
        raise RuntimeError("detail with %s in it" % secret)

    monkeypatch.setattr(cab.Service, "poll", fail)
    with Wire(running.port) as wire:
        answer = wire.send(
            request("GET /api/ask/%s HTTP/1.1" % secret, "Authorization: Bearer " + secret),
            request(),
        ).answer()
        assert (answer.status, answer.json) == (
            500, {"error": "Internal server error", "code": "internal"},
        )
        assert wire.answer().status == 200
    check_headers(answer)
    log = "\n".join(running.log)
    assert "Traceback" in log and "RuntimeError: detail with cab-" in log
    assert secret not in log


def test_a_broken_database_gives_503(bridge: Callable[..., RunningBridge]) -> None:
    running = bridge(spare=0)
    with contextlib.closing(sqlite3.connect(str(running.data_dir / "bridge.db"))) as other:
        other.execute("DROP TABLE tokens")
    for answer in (running.admin.get("/health"), running.admin.post("/api/ask", {"message": "hi"})):
        assert (answer.status, answer.json["code"]) == (503, "unavailable")
        check_headers(answer)


@pytest.mark.parametrize(
    "address, counted_as",
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:0:0:1", "2001:db8::/64"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_an_ipv6_address_is_limited_by_its_network(address: str, counted_as: str) -> None:
    request = cab.Request("GET", "/", {}, {"host": "localhost"}, address, lambda: b"")
    assert cab.HostPolicy().client_address(request) == counted_as


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("requested, resulting", [(300, 300), (200, 256), (10**9, None)])
def test_the_open_file_limit_is_raised_as_far_as_the_system_allows(
    requested: int, resulting: Optional[int]
) -> None:
    code = (
        "import sys; sys.path.insert(0, %r); import claude_api_bridge as cab;"
        " from resource import *;"
        " setrlimit(RLIMIT_NOFILE, (256, 400));"
        " cab.OPEN_FILES = %d; cab.tune_process(); print(*getrlimit(RLIMIT_NOFILE))"
        % (str(Path(cab.__file__).parent), requested)
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=30, check=True
    )
    assert done.stdout.split() == [str(resulting or 400).encode(), b"400"]
