"""Bytes on raw connections: what counts as a request, how a connection goes on or ends, and what every answer carries."""
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
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import pytest

import claude_api_bridge as cab
from conftest import Answer, FakeClaude, RunningBridge, wait_until

SECONDS = 9.0                                                # less than any deadline that the tests leave as it is
TOO_MUCH = 3 << 20


class Wire:
    """A connection that sends any bytes; every read has a bound."""

    def __init__(self, port: int, buffer: int = 1 << 16) -> None:
        """buffer: for what came and was not read yet, in bytes."""
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
        """The next answer; what follows it stays unread."""
        first = self.file.readline()
        assert first.startswith(b"HTTP/1.1 "), first
        headers: Dict[str, str] = {}
        for line in iter(self.file.readline, b"\r\n"):
            name, colon, value = line.decode("latin-1").rstrip("\r\n").partition(": ")
            assert colon and name.lower() not in headers, line
            headers[name.lower()] = value
        return Answer(int(first[9:12]), headers, self.file.read(int(headers["content-length"])) if has_body else b"")

    def rest(self) -> bytes:
        """All that comes until the bridge closes; a timeout where it does not."""
        try:
            return self.file.read()
        except ConnectionResetError:
            return b""

    def last_answer(self) -> Answer:
        """The next answer, which must say that it is the last, and be it."""
        answer = self.answer()
        assert (answer.headers["connection"], self.rest()) == ("close", b"")
        return answer

    def drip(self) -> bytes:
        """Sends a byte now and then until the bridge closes. -> what it said."""
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


def request(line: str = "GET /health HTTP/1.1", *headers: str, body: bytes = b"", host: bool = True) -> bytes:
    """A request with exactly these lines; no length is added."""
    return "\r\n".join([line, *(["Host: localhost"] if host else []), *headers, "", ""]).encode("latin-1") + body


def post(api: Any, path: str, body: bytes, *headers: str) -> bytes:
    return request("POST %s HTTP/1.1" % path, "Authorization: Bearer " + api.token, *headers, body=body)


def sized(api: Any, path: str, body: bytes, *headers: str) -> bytes:
    return post(api, path, body, "Content-Length: %d" % len(body), *headers)


HIDDEN = request("GET /hidden HTTP/1.1")
NEW_TOKEN = b'{"name": "from the wire"}'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBridge]:
    """One bridge for all tests that only talk to it."""
    folder = tmp_path_factory.mktemp("served")
    claude = FakeClaude(folder / "fake")
    config = cab.Config(port=0, host="127.0.0.1", no_tunnel=True, data_dir=folder / "data", claude=str(claude.path), rate_limit=0, spare=0)
    log: List[str] = []
    with cab.Bridge(config, cab.find_claude(config, {"PATH": "", "HOME": str(folder)}), cab.Clock(), log.append) as opened:
        opened.serve()
        yield RunningBridge(opened, log)


def connection_threads() -> List[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("http-")]


@pytest.fixture
def long_poll(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunningBridge, str, Wire], None]:
    """long_poll(running, job id, wire): begins one on the connection; it is being waited for on return."""
    entered, poll = [], cab.Service.poll
    monkeypatch.setattr(cab.Service, "poll", lambda *args: entered.append(args) or poll(*args))     # type: ignore[func-returns-value]

    def begin(running: RunningBridge, job_id: str, body_field: Wire) -> None:
        before = len(entered)
        body_field.send(request("GET /api/ask/%s?wait=90 HTTP/1.1" % job_id, "Authorization: Bearer %s" % running.admin.token))
        wait_until(lambda: len(entered) > before)

    return begin


LongPoll = Callable[[RunningBridge, str, Wire], None]


def processing(running: RunningBridge, gate: Path) -> str:
    """The id of a job that runs until the gate opens; no connection is open on return."""
    job_id = running.admin.ask("hold %s" % gate)
    wait_until(lambda: running.admin.poll(job_id)["status"] == "processing")
    wait_until(lambda: not connection_threads())
    return job_id


def set_cap(monkeypatch: pytest.MonkeyPatch, connections: int) -> None:
    """From now on so many connections have a place; none of an earlier test has one."""
    wait_until(lambda: not connection_threads())
    monkeypatch.setattr(cab, "CONNECTIONS", connections)


# --- one connection, many requests ---

def test_a_connection_serves_one_request_after_the_other(served: RunningBridge) -> None:
    with Wire(served.port) as body_field:
        for _ in range(3):
            answer = body_field.send(request()).answer()
            assert (answer.status, answer.json, answer.headers["connection"]) == (200, {"status": "ok"}, "keep-alive")


def test_pipelined_requests_are_answered_in_order(served: RunningBridge) -> None:
    with Wire(served.port) as body_field:
        body_field.send(request() + request("GET /none HTTP/1.1") + request("OPTIONS / HTTP/1.1") + request("GET /api/status HTTP/1.1"))
        assert [body_field.answer().status for _ in range(4)] == [200, 404, 204, 200]


def test_requests_may_arrive_byte_by_byte(served: RunningBridge) -> None:
    sent = sized(served.admin, "/api/tokens", NEW_TOKEN) + request()
    with Wire(served.port) as body_field:
        body_field.send(*(sent[at:at + 1] for at in range(len(sent))))
        assert [body_field.answer().status, body_field.answer().status] == [201, 200]


def test_head_answers_like_get_without_the_body(served: RunningBridge) -> None:
    with Wire(served.port) as body_field:
        for path in ("/health", "/api/status", "/none"):
            got = body_field.send(request("GET %s HTTP/1.1" % path)).answer()
            head = body_field.send(request("HEAD %s HTTP/1.1" % path)).answer(has_body=False)
            assert (head.status, head.headers["content-length"]) == (got.status, str(len(got.data)))


@pytest.mark.parametrize("status, sent", [
    pytest.param(status, sent, id=name) for name, status, sent in (
        ("401 without a body", 401, request("GET /api/tokens HTTP/1.1")),
        ("401 with a body", 401, request("POST /api/ask HTTP/1.1", "Content-Length: %d" % len(HIDDEN), body=HIDDEN)),
        ("404 without a body", 404, request("GET /none HTTP/1.1")),
        ("404 with a body", 404, request("POST /none HTTP/1.1", "Content-Length: %d" % len(HIDDEN), body=HIDDEN)),
        ("405 with a body", 405, request("PUT /api/ask HTTP/1.1", "Content-Length: %d" % len(HIDDEN), body=HIDDEN)),
        ("200 with a body that nobody wants", 200, request("GET /health HTTP/1.1", "Content-Length: %d" % len(HIDDEN), body=HIDDEN)),
        ("204 with a body that nobody wants", 204, request("OPTIONS / HTTP/1.1", "Content-Length: %d" % len(HIDDEN), body=HIDDEN)),
    )])
def test_a_refusal_keeps_the_connection_and_its_body_is_no_request(served: RunningBridge, status: int, sent: bytes) -> None:
    with Wire(served.port) as body_field:
        body_field.send(sent, request())
        assert [body_field.answer().status, body_field.answer().status] == [status, 200]


@pytest.mark.parametrize("body, headers, status", [(b"{", (), 400), (b'{"message": 1}', (), 400), (b"x", ("Content-Encoding: gzip",), 415)])
def test_a_refused_body_keeps_the_connection(served: RunningBridge, body: bytes, headers: Tuple[str, ...], status: int) -> None:
    with Wire(served.port) as body_field:
        body_field.send(sized(served.admin, "/api/ask", body, *headers), request())
        assert [body_field.answer().status, body_field.answer().status] == [status, 200]


@pytest.mark.parametrize("sent", [
    pytest.param(sent, id=name) for name, sent in (
        ("asked to close", request("GET /health HTTP/1.1", "Connection: close")),
        ("asked to close in capitals", request("GET /health HTTP/1.1", "Connection: Foo, CLOSE")),
        ("HTTP/1.0", request("GET /health HTTP/1.0", host=False)),
    )])
def test_the_connection_is_closed_when_the_client_wants_that(served: RunningBridge, sent: bytes) -> None:
    with Wire(served.port) as body_field:
        assert body_field.send(sent + HIDDEN).last_answer().status == 200


def test_an_http_1_0_client_may_keep_the_connection(served: RunningBridge) -> None:
    with Wire(served.port) as body_field:
        for _ in range(2):
            answer = body_field.send(request("GET /health HTTP/1.0", "Connection: keep-alive", host=False)).answer()
            assert (answer.status, answer.headers["connection"]) == (200, "keep-alive")


@pytest.mark.parametrize("sent", [
    pytest.param(sent, id=name) for name, sent in (
        ("a leading blank line", b"\r\n" + request()),
        ("names in any case, blanks around values", request("GET /health HTTP/1.1", "aCCept: \t */* \t", "X-Empty:")),
        ("an absolute address", request("GET http://bridge/health?x=%20&x HTTP/1.1")),
        ("any visible byte in a value", request("GET /health HTTP/1.1", 'X: \xe9\xff "(,;=)"')),
        ("many headers", request("GET /health HTTP/1.1", *("X-%d: y" % n for n in range(500)))),
        ("a head of nearly 16 KiB", request("GET /health HTTP/1.1", "X: " + "y" * 16_000)),
    )])
def test_an_unusual_but_valid_head_is_served(served: RunningBridge, sent: bytes) -> None:
    with Wire(served.port) as body_field:
        assert body_field.send(sent, request()).answer().status == 200
        assert body_field.answer().status == 200


# --- heads that are refused ---

def smuggled(*headers: str, line: str = "POST /api/ask HTTP/1.1", body: bytes = b"") -> bytes:
    """A request whose length can be read in two ways, one of which makes its body a request."""
    return request(line, *headers, body=body)


REFUSED: Tuple[Tuple[str, int, Union[bytes, str]], ...] = (
    ("both lengths", 400, smuggled("Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n")),
    ("both lengths, the other way round", 400, smuggled("Transfer-Encoding: chunked", "Content-Length: 5", body=b"0\r\n\r\n")),
    ("two differing lengths", 400, smuggled("Content-Length: 0", "Content-Length: %d" % len(HIDDEN))),
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
    ("a folded first line", 400, request("GET /health HTTP/1.1", host=False).replace(b"\r\n", b"\r\n Host: localhost\r\n", 1)),
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
    ("two authorizations", 400, smuggled("Authorization: Bearer a", "Authorization: Bearer b")),
    ("an unknown coding", 501, smuggled("Transfer-Encoding: xchunked", body=b"0\r\n\r\n")),
    ("a coding before chunked", 501, smuggled("Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n")),
    ("chunked twice in a line", 501, smuggled("Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n")),
    ("chunked in two lines", 400, smuggled("Transfer-Encoding: chunked", "Transfer-Encoding: chunked", body=b"0\r\n\r\n")),
    ("identity as a coding", 501, smuggled("Transfer-Encoding: identity")),
    ("an empty coding", 501, smuggled("Transfer-Encoding:")),
    ("chunked on 1.0", 400, smuggled("Transfer-Encoding: chunked", line="POST /api/ask HTTP/1.0", body=b"0\r\n\r\n")),
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


@pytest.mark.parametrize("status, sent", [pytest.param(status, sent, id=name) for name, status, sent in REFUSED])
def test_a_head_that_is_not_http_is_refused_and_hides_no_request(served: RunningBridge, status: int, sent: bytes) -> None:
    with Wire(served.port) as body_field:
        answer = body_field.send(sent + HIDDEN).last_answer()
    assert (answer.status, sorted(answer.json)) == (status, ["code", "error"])
    assert served.admin.get("/health").status == 200


def test_a_bare_lf_in_a_value_hides_no_request(served: RunningBridge) -> None:
    with Wire(served.port) as body_field:
        assert body_field.send(request("GET /health HTTP/1.1", "X: a\n\n" + HIDDEN.decode())).last_answer().status == 400


@pytest.mark.parametrize("sent", [b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\n\r\n", b"GET /health HTTP/1.0x\n\r\n", b"\n\r\n\r\n"])
def test_a_blank_line_behind_a_bare_lf_ends_no_head(served: RunningBridge, sent: bytes) -> None:
    with Wire(served.port) as body_field:
        assert body_field.send(sent).last_answer().status == 400


def test_a_head_is_too_large_also_where_all_of_it_fits_in_a_buffer(served: RunningBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab.ConnectionHandler, "rbufsize", 1 << 17)    # as with Python 3.14
    with Wire(served.port) as body_field:
        assert body_field.send(request("GET /health HTTP/1.1", *["X: " + "y" * 96] * 200)).last_answer().status == 431


def test_a_refused_head_is_refused_on_a_used_connection_too(served: RunningBridge) -> None:
    with Wire(served.port) as body_field:
        assert body_field.send(request()).answer().status == 200
        assert body_field.send(request("GET /%s HTTP/1.1" % ("y" * 70_000)) + HIDDEN).last_answer().status == 431


def test_no_header_line_takes_long_to_refuse() -> None:
    """A pattern with two ways to match would take minutes for this; and one thread at a time holds the interpreter."""
    began = time.monotonic()
    assert not cab.HEADER_LINE.fullmatch(b"name:" + b" \t" * 300_000 + b"\0\r\n")
    assert not cab.REQUEST_LINE.fullmatch(b"GET " + b"/" * 300_000 + b" " * 300_000 + b"\r\n")
    assert time.monotonic() - began < 10


def test_a_head_that_breaks_off_is_no_request(served: RunningBridge) -> None:
    with Wire(served.port) as body_field:
        body_field.send(request()[:-2]).socket.shutdown(socket.SHUT_WR)
        assert body_field.last_answer().json == {"error": "The request head broke off", "code": "malformed_request"}


# --- bodies ---

CHUNKED = "Transfer-Encoding: chunked"


@pytest.mark.parametrize("body", [
    pytest.param(body, id=name) for name, body in (
        ("one chunk", b"%x\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
        ("a chunk for every byte", b"".join(b"1\r\n%c\r\n" % byte for byte in NEW_TOKEN) + b"0\r\n\r\n"),
        ("zeros before a size, capitals", b"000F\r\n%b\r\n0A\r\n%b\r\n00\r\n\r\n" % (NEW_TOKEN[:15], NEW_TOKEN[15:])),
        ("an extension", b'%x;name="a b";x\r\n%b\r\n0;last\r\n\r\n' % (len(NEW_TOKEN), NEW_TOKEN)),
        ("trailers", b"%x\r\n%b\r\n0\r\nX-Sum: 1\r\nContent-Length: 99\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
    )])
def test_a_chunked_body_is_put_together(served: RunningBridge, body: bytes) -> None:
    with Wire(served.port) as body_field:
        body_field.send(post(served.admin, "/api/tokens", body, CHUNKED), request())
        assert [body_field.answer().status, body_field.answer().status] == [201, 200]
    assert served.admin.get("/api/tokens").json["tokens"][0]["name"] == "from the wire"


@pytest.mark.parametrize("body", [
    pytest.param(body, id=name) for name, body in (
        ("a signed size", b"+%x\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
        ("a size with a prefix", b"0x%x\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
        ("a size with an underscore", b"1_9\r\n%b\r\n0\r\n\r\n" % NEW_TOKEN),
        ("a negative size", b"-1\r\n%b\r\n0\r\n\r\n" % NEW_TOKEN),
        ("no size", b"\r\n%b\r\n0\r\n\r\n" % NEW_TOKEN),
        ("a word as size", b"all\r\n%b\r\n0\r\n\r\n" % NEW_TOKEN),
        ("a size of nine digits", b"0000000%x\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
        ("a blank before a size", b" %x\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
        ("a bare LF after a size", b"%x\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
        ("a bare CR in an extension", b"%x;a\rb\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
        ("an endless extension", b"%x;%b\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), b"x" * 2_000, NEW_TOKEN)),
        ("a chunk longer than it says", b"%x\r\n%b.\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
        ("a chunk ended by LF", b"%x\r\n%b\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
        ("a malformed trailer", b"%x\r\n%b\r\n0\r\nX : 1\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN)),
        ("trailers without end", b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(NEW_TOKEN), NEW_TOKEN, b"X: 1\r\n" * 100)),
    )])
def test_a_bad_chunk_ends_the_connection_and_hides_no_request(served: RunningBridge, body: bytes) -> None:
    before = served.admin.get("/api/status").json["stats"]["totalTokens"]
    with Wire(served.port) as body_field:
        answer = body_field.send(post(served.admin, "/api/tokens", body, CHUNKED), HIDDEN).last_answer()
    assert (answer.status, answer.json["code"]) == (400, "malformed_request")
    assert served.admin.get("/api/status").json["stats"]["totalTokens"] == before


@pytest.mark.parametrize("sent", [
    pytest.param((b"12345", "Content-Length: 10"), id="sized"), pytest.param((b"a\r\n12345", CHUNKED), id="in a chunk"),
    pytest.param((b"5\r\n12345\r\n", CHUNKED), id="between chunks"), pytest.param((b"5\r\n12345\r\n0\r\n", CHUNKED), id="before the end")])
def test_a_body_that_breaks_off_is_refused(served: RunningBridge, sent: Tuple[bytes, str]) -> None:
    with Wire(served.port) as body_field:
        body_field.send(post(served.admin, "/api/ask", *sent)).socket.shutdown(socket.SHUT_WR)
        assert body_field.last_answer().status == 400


@pytest.mark.parametrize("header, body", [
    pytest.param("Content-Length: %d" % TOO_MUCH, b"x" * TOO_MUCH, id="sized"),
    pytest.param("Content-Length: %d" % TOO_MUCH, HIDDEN, id="sized, and the client waits"),
    pytest.param(CHUNKED, b"%x\r\n%b\r\n" % (TOO_MUCH, b"x" * TOO_MUCH), id="one chunk"),
    pytest.param(CHUNKED, (b"%x\r\n%b\r\n" % (1 << 18, b"x" * (1 << 18))) * 12, id="many chunks")])
def test_the_whole_refusal_of_a_large_body_arrives_though_the_client_sends_on(served: RunningBridge, header: str, body: bytes) -> None:
    with Wire(served.port) as body_field:
        answer = body_field.send(post(served.admin, "/api/ask", body, header)).last_answer()
    assert (answer.status, answer.json) == (413, {"error": "Body exceeds 1048576 byte limit", "code": "body_too_large"})


def test_a_body_of_exactly_the_limit_is_read(served: RunningBridge) -> None:
    body = b'{"name": "at the limit"}'.ljust(cab.BODY_BYTES)
    with Wire(served.port) as body_field:
        assert body_field.send(sized(served.admin, "/api/tokens", body)).answer().status == 201
        assert body_field.send(sized(served.admin, "/api/tokens", body + b" ")).last_answer().status == 413


def test_a_large_body_that_nobody_read_ends_the_connection(served: RunningBridge) -> None:
    with Wire(served.port) as body_field:
        body_field.send(request("POST /api/ask HTTP/1.1", "Content-Length: 100000", body=HIDDEN * 1_000))
        assert body_field.last_answer().status == 401


def test_a_chunked_body_that_nobody_read_ends_the_connection(served: RunningBridge) -> None:
    with Wire(served.port) as body_field:
        assert body_field.send(request("POST /none HTTP/1.1", CHUNKED, body=b"0\r\n\r\n" + HIDDEN)).last_answer().status == 404


def test_100_continue_is_sent_when_the_body_is_wanted(served: RunningBridge) -> None:
    for length, body in (("Content-Length: %d" % len(NEW_TOKEN), NEW_TOKEN), (CHUNKED, b"%x\r\n%b\r\n0\r\n\r\n" % (len(NEW_TOKEN), NEW_TOKEN))):
        with Wire(served.port) as body_field:
            body_field.send(post(served.admin, "/api/tokens", b"", length, "Expect: 100-Continue"))
            assert body_field.file.readline() + body_field.file.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
            assert body_field.send(body, request()).answer().status == 201
            assert body_field.answer().status == 200


@pytest.mark.parametrize("status, with_token, line, headers", [
    pytest.param(status, with_token, line, headers, id=name) for name, status, with_token, line, headers in (
        ("no token", 401, False, "POST /api/ask HTTP/1.1", ("Content-Length: 50",)),
        ("no such path", 404, True, "POST /none HTTP/1.1", ("Content-Length: 50",)),
        ("too large", 413, True, "POST /api/ask HTTP/1.1", ("Content-Length: %d" % TOO_MUCH,)),
        ("compressed", 415, True, "POST /api/ask HTTP/1.1", ("Content-Length: 50", "Content-Encoding: gzip")),
        ("not read", 200, True, "GET /health HTTP/1.1", ("Content-Length: 50",)),
    )])
def test_100_continue_is_not_sent_for_a_body_that_is_not_wanted(served: RunningBridge, status: int, with_token: bool, line: str,
                                                                headers: Tuple[str, ...]) -> None:
    token = ("Authorization: Bearer %s" % served.admin.token,) if with_token else ()
    with Wire(served.port) as body_field:
        assert body_field.send(request(line, *token, *headers, "Expect: 100-continue")).answer().status == status
        assert body_field.rest() == b""                     # what is sent after this could be a body or a request


def test_100_continue_is_not_sent_where_there_is_no_body_or_no_such_thing(served: RunningBridge) -> None:
    with Wire(served.port) as body_field:
        assert body_field.send(post(served.admin, "/api/tokens", b"", "Content-Length: 0", "Expect: 100-continue")).answer().status == 400
    old = sized(served.admin, "/api/tokens", NEW_TOKEN, "Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    with Wire(served.port) as body_field:
        assert body_field.send(old).last_answer().status == 201


# --- slow, idle and many connections ---

@pytest.mark.parametrize("phase, start", [
    pytest.param(cab.Phase.HEAD, b"G", id="in the request line"),
    pytest.param(cab.Phase.HEAD, b"GET / HTTP/1.1\r\nX: ", id="in a header"),
    pytest.param(cab.Phase.BODY, b"POST /api/ask HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer TOKEN\r\nContent-Length: 900\r\n\r\n", id="in a body"),
])
def test_a_client_that_drips_is_closed_at_the_deadline(served: RunningBridge, monkeypatch: pytest.MonkeyPatch, phase: str, start: bytes) -> None:
    monkeypatch.setitem(cab.Phase.SECONDS, phase, 0.2)
    with Wire(served.port) as body_field:
        assert body_field.send(start.replace(b"TOKEN", str(served.admin.token).encode())).drip() == b""
        wait_until(lambda: not connection_threads())


def test_a_body_that_nobody_wants_holds_no_answer_back_and_no_place(served: RunningBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cab.Phase.SECONDS, cab.Phase.BODY, 0.2)
    with Wire(served.port) as body_field:
        assert body_field.send(b"POST /api/ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n").answer().status == 401
        assert body_field.drip() == b""
        wait_until(lambda: not connection_threads())


@pytest.mark.parametrize("before", [b"", request()])
def test_an_idle_connection_is_closed(served: RunningBridge, monkeypatch: pytest.MonkeyPatch, before: bytes) -> None:
    seconds = 0.5 if before else 0.1                         # the request has to be there by then
    monkeypatch.setitem(cab.Phase.SECONDS, cab.Phase.IDLE, seconds)
    monkeypatch.setattr(cab, "IDLE_SECONDS", seconds)
    with Wire(served.port) as body_field:
        assert body_field.send(before).rest().count(b"HTTP/1.1 200 OK") == len(before[:1])
        wait_until(lambda: not connection_threads())


def test_no_deadline_cuts_an_answer_that_is_waited_for(bridge: Callable[..., RunningBridge], monkeypatch: pytest.MonkeyPatch, gate: Path) -> None:
    running = bridge(spare=0)
    job_id = processing(running, gate)
    for phase in (cab.Phase.IDLE, cab.Phase.HEAD, cab.Phase.BODY):
        monkeypatch.setitem(cab.Phase.SECONDS, phase, 0.4)
    assert running.admin.get("/api/ask/%s?wait=0.8" % job_id).json["status"] == "processing"


@pytest.mark.parametrize("first", [b"", b"GET /health HT", b"\r\n"])
def test_at_the_cap_the_connection_longest_without_a_request_makes_room(served: RunningBridge, monkeypatch: pytest.MonkeyPatch,
                                                                        first: bytes) -> None:
    set_cap(monkeypatch, 2)
    began: List[None] = []
    setup = cab.ConnectionHandler.setup
    monkeypatch.setattr(cab.ConnectionHandler, "setup", lambda *args: began.append(setup(*args)))      # type: ignore[func-returns-value]
    with Wire(served.port) as used, Wire(served.port) as waiting:
        wait_until(lambda: len(began) == 2)               # both wait for a request
        assert waiting.send(first) and used.send(request()).answer().status == 200
        with Wire(served.port) as new:
            assert new.send(request()).answer().status == 200
            assert waiting.rest() == b""
            assert used.send(request()).answer().status == 200


def test_when_all_connections_are_busy_a_new_one_gets_503_until_one_is_done(bridge: Callable[..., RunningBridge], gate: Path,
                                                                            monkeypatch: pytest.MonkeyPatch, long_poll: LongPoll) -> None:
    running = bridge(spare=0)
    job_id = processing(running, gate)
    set_cap(monkeypatch, 2)
    with Wire(running.port) as one, Wire(running.port) as two:
        long_poll(running, job_id, one)
        long_poll(running, job_id, two)
        with Wire(running.port) as three:
            answer = three.last_answer()
        assert (answer.status, answer.json["code"], answer.headers["retry-after"]) == (503, "unavailable", "1")
        gate.touch()
        assert [one.answer().json["response"], two.answer().json["response"]] == ["held", "held"]
        wait_until(lambda: running.admin.get("/health").status == 200)


def test_a_stream_keeps_its_place_for_as_long_as_it_is_silent(bridge: Callable[..., RunningBridge], gate: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    running = bridge(spare=0)
    job_id = processing(running, gate)
    set_cap(monkeypatch, 1)
    with Wire(running.port) as stream:
        stream.send(request("GET /api/ask/%s/events HTTP/1.1" % job_id, "Authorization: Bearer %s" % running.admin.token))
        assert stream.answer(has_body=False).status == 200
        assert next(line for line in iter(stream.file.readline, b"") if line == b"event: delta\n")
        wait_until(lambda: [place.phase for place in running.bridge._server._snapshot()] == ["busy"])
        for phase in (cab.Phase.IDLE, cab.Phase.HEAD, cab.Phase.BODY):
            monkeypatch.setitem(cab.Phase.SECONDS, phase, 0.05)
        for _ in range(20):                                   # until after the deadlines of all other phases
            with Wire(running.port) as new:
                assert new.last_answer().status == 503
        gate.touch()
        assert b"event: completed" in b"".join(iter(stream.file.readline, b"0\r\n"))


def test_a_connection_that_was_refused_does_not_keep_the_place_of_another(served: RunningBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    set_cap(monkeypatch, 1)
    with Wire(served.port) as refused:
        assert refused.send(request("POST /api/ask HTTP/1.1", "Content-Length: 100000")).last_answer().status == 401
        with Wire(served.port) as new:
            assert new.send(request()).answer().status == 200


def test_a_connection_that_reads_no_answer_does_not_keep_the_place_of_another(served: RunningBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    set_cap(monkeypatch, 1)
    monkeypatch.setattr(cab, "EVICTABLE_SEND_SECONDS", 0)             # how long it is stuck before it may have to make room
    with Wire(served.port) as deaf:
        deaf.socket.settimeout(0.3)
        with pytest.raises(socket.timeout):               # its answers fill the buffers, then the bridge stops reading
            for _ in range(5_000):
                deaf.send(request("GET /dashboard HTTP/1.1") * 100)
        wait_until(lambda: [place.phase for place in served.bridge._server._snapshot()] == ["send"])
        with Wire(served.port) as new:
            assert new.send(request()).answer().status == 200


def test_of_too_many_large_answers_the_oldest_is_broken_off(bridge: Callable[..., RunningBridge], monkeypatch: pytest.MonkeyPatch) -> None:
    running = bridge(spare=0)
    size, job_id = 8 << 20, running.admin.ask("flood 8")
    wait_until(lambda: running.admin.poll(job_id)["status"] == "completed", 30)
    wanted = request("GET /api/ask/%s HTTP/1.1" % job_id, "Authorization: Bearer " + running.admin.token)
    monkeypatch.setattr(cab, "LARGE_PAYLOAD_BUDGET_BYTES", size * 3 // 2)
    held = running.bridge._server._held
    with Wire(running.port, buffer=4_096) as deaf, Wire(running.port, buffer=4_096) as reader:
        deaf.send(wanted)
        wait_until(lambda: held)
        answer = reader.send(wanted).answer()
        assert (answer.status, len(answer.json["response"])) == (200, size)
        assert len(deaf.rest()) < size                        # it asks again
    wait_until(lambda: not held)


def test_where_no_file_can_be_opened_the_connection_longest_without_a_request_makes_room(
        served: RunningBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_until(lambda: not connection_threads())
    accept, failures = cab.ThreadingHTTPServer.get_request, [OSError(errno.EMFILE, "Too many open files")] * 3

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


def idle_threads() -> List[Optional[int]]:
    return [thread.ident for thread in threading.enumerate() if thread.name == "http idle"]


def test_a_thread_serves_one_connection_after_the_other_and_goes_with_the_bridge(bridge: Callable[..., RunningBridge],
                                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "IDLE_THREAD_SECONDS", 60)
    running = bridge(spare=0)
    used = set()
    for _ in range(5):
        with Wire(running.port) as body_field:
            assert body_field.send(request()).answer().status == 200
            busy, = connection_threads()
            assert busy.startswith("http-127.0.0.1:")
        used.update(wait_until(idle_threads))
    assert len(used) == 1
    with Wire(running.port) as one, Wire(running.port) as two:
        assert [body_field.send(request()).answer().status for body_field in (one, two)] == [200, 200]
    wait_until(lambda: len(idle_threads()) == 2)
    running.bridge.__exit__(None, None, None)
    wait_until(lambda: not idle_threads())


def test_a_thread_for_which_nothing_comes_ends(served: RunningBridge) -> None:
    with Wire(served.port) as body_field:
        assert body_field.send(request()).answer().status == 200
    wait_until(lambda: not connection_threads() and not idle_threads())
    with Wire(served.port) as body_field:                          # and is counted no more
        assert body_field.send(request()).answer().status == 200


def test_a_thread_that_gives_up_takes_the_connection_that_it_was_promised_meanwhile(served: RunningBridge,
                                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    server = served.bridge._server
    wait_until(lambda: not connection_threads() and not idle_threads())

    ours, theirs = socket.socketpair()
    with ours, theirs:
        def late(bell: threading.Event, seconds: float) -> bool:    # a connection comes as the time is up
            server.process_request(ours, ("127.0.0.1", 1))
            return False

        monkeypatch.setattr(threading.Event, "wait", late)
        name, current = threading.current_thread().name, threading.current_thread()
        assert server._next_connection() == (ours, ("127.0.0.1", 1)) and not server._idle
        current.name = name
        server.shutdown_request(ours)


def test_connections_that_come_as_threads_give_up_are_all_served(served: RunningBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "IDLE_THREAD_SECONDS", 0.0001)
    for _ in range(200):
        with Wire(served.port) as body_field:
            assert body_field.send(request("GET /health HTTP/1.1", "Connection: close")).last_answer().status == 200


@pytest.mark.parametrize("sent", [request("GET /dashboard HTTP/1.1"), request("POST /api/ask HTTP/1.1", "Authorization: Bearer TOKEN",
                                                                              "Expect: 100-continue", "Content-Length: 2", body=b"{}")])
def test_a_client_that_takes_no_answer_is_cut_off(served: RunningBridge, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setitem(cab.Phase.SECONDS, cab.Phase.SEND, 0.2)
    sent = sent.replace(b"TOKEN", str(served.admin.token).encode())
    with Wire(served.port, buffer=4_096) as deaf:
        deaf.socket.settimeout(5)
        with pytest.raises((ConnectionError, socket.timeout)) as ended:
            for _ in range(20_000):
                deaf.send(sent * 20)
        assert not isinstance(ended.value, socket.timeout)
    wait_until(lambda: not connection_threads())


def test_draining_a_refused_body_ends_at_its_deadline(served: RunningBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "DRAIN_SECONDS", 0.3)
    with Wire(served.port) as body_field:
        assert body_field.send(request("POST /api/ask HTTP/1.1", "Content-Length: 100000")).last_answer().status == 401
        wait_until(lambda: not connection_threads())


@pytest.mark.parametrize("behind", [b"", pytest.param(b"G", marks=pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the bytes of a next request hide it"))], ids=["nothing", "a next request"])
def test_a_client_that_leaves_during_a_long_poll_leaves_no_thread(bridge: Callable[..., RunningBridge], gate: Path, long_poll: LongPoll,
                                                                  monkeypatch: pytest.MonkeyPatch, behind: bytes) -> None:
    monkeypatch.setattr(cab, "RECHECK_SECONDS", 0.05)
    running = bridge(spare=0)
    job_id = processing(running, gate)
    with Wire(running.port) as body_field:
        long_poll(running, job_id, body_field)
        body_field.send(behind)                                     # in a piece of its own, once the first request was taken
    wait_until(lambda: not connection_threads())


def test_a_client_that_left_before_its_answer_is_no_error(bridge: Callable[..., RunningBridge], gate: Path, long_poll: LongPoll) -> None:
    running = bridge(spare=0)
    job_id = processing(running, gate)
    with Wire(running.port) as body_field:
        long_poll(running, job_id, body_field)
    gate.touch()
    wait_until(lambda: not connection_threads())
    assert "error" not in " ".join(running.log).lower()


def test_a_client_that_only_ended_its_sending_is_answered(bridge: Callable[..., RunningBridge], gate: Path) -> None:
    running = bridge(spare=0)
    job_id = processing(running, gate)
    for path in ("/health", "/api/ask/" + job_id, "/api/ask/%s?wait=90" % job_id):
        with Wire(running.port) as body_field:
            body_field.send(request("GET %s HTTP/1.1" % path, "Authorization: Bearer %s" % running.admin.token)).socket.shutdown(socket.SHUT_WR)
            assert body_field.answer().json["status"] in ("ok", "processing")


def test_closing_the_bridge_ends_idle_connections_and_answers_waiting_ones(bridge: Callable[..., RunningBridge], gate: Path,
                                                                           monkeypatch: pytest.MonkeyPatch, long_poll: LongPoll) -> None:
    running = bridge(spare=0)
    job_id = processing(running, gate)
    monkeypatch.setattr(cab, "FINISH_SECONDS", 0.1)
    with Wire(running.port) as idle, Wire(running.port) as waiting:
        long_poll(running, job_id, waiting)
        assert idle.send(request()).answer().status == 200
        running.bridge.__exit__(None, None, None)
        assert idle.rest() == b""
        assert waiting.answer().json["requestId"] == job_id


# --- what every answer carries ---

STANDARD = {
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin", "origin-agent-cluster": "?1",
    "referrer-policy": "no-referrer", "x-content-type-options": "nosniff", "x-dns-prefetch-control": "off", "x-download-options": "noopen",
    "x-permitted-cross-domain-policies": "none", "x-xss-protection": "0", "access-control-allow-origin": "*", "cache-control": "no-store",
}
ABSENT = ("server", "x-powered-by", "strict-transport-security", "set-cookie", "transfer-encoding")


def check_headers(answer: Answer) -> None:
    assert {name: answer.headers.get(name) for name in STANDARD} == STANDARD
    assert answer.headers["x-frame-options"] in ("SAMEORIGIN", "DENY")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "upgrade-insecure-requests" not in policy
    assert not [name for name in ABSENT if name in answer.headers]
    if answer.status != 204 and "html" not in answer.headers["content-type"]:
        assert answer.headers["content-type"] == "application/json; charset=utf-8" and isinstance(answer.json, dict)
    assert answer.headers["date"].endswith(" GMT") and abs(parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()) < 60
    assert int(answer.headers["content-length"]) == len(answer.data)


@pytest.mark.parametrize("status, sent", [
    pytest.param(status, sent, id="%d %s" % (status, name)) for status, name, sent in (
        (200, "json", request()), (200, "page", request("GET /dashboard HTTP/1.1")), (204, "preflight", request("OPTIONS /none HTTP/1.1")),
        (400, "by the parser", request("GET /health HTTP/1.1", "X y")), (400, "by the routes", request("GET /api/ask/%zz HTTP/1.1")),
        (401, "no token", request("POST /api/ask HTTP/1.1")), (404, "no path", request("GET /none HTTP/1.1")),
        (405, "no method", request("PUT /api/ask HTTP/1.1")), (417, "expectation", request("GET / HTTP/1.1", "Expect: more")),
        (431, "head", request("GET / HTTP/1.1", "X: " + "y" * 20_000)), (501, "method", request("BREW / HTTP/1.1")),
        (501, "coding", request("POST / HTTP/1.1", "Transfer-Encoding: br")), (505, "version", request("GET / HTTP/3.0")),
    )])
def test_every_answer_carries_the_security_headers(served: RunningBridge, status: int, sent: bytes) -> None:
    with Wire(served.port) as body_field:
        answer = body_field.send(sent).answer()
    assert answer.status == status
    check_headers(answer)


def test_answers_to_token_holders_carry_the_security_headers(served: RunningBridge) -> None:
    for status, sent in ((201, sized(served.admin, "/api/tokens", NEW_TOKEN)), (400, sized(served.admin, "/api/ask", b"{")),
                         (413, post(served.admin, "/api/ask", b"", "Content-Length: %d" % TOO_MUCH)),
                         (415, sized(served.admin, "/api/ask", b"x", "Content-Encoding: br"))):
        with Wire(served.port) as body_field:
            answer = body_field.send(sent).answer()
        assert answer.status == status
        check_headers(answer)


def test_a_connection_turned_away_at_the_cap_gets_the_security_headers(served: RunningBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    set_cap(monkeypatch, 0)
    with Wire(served.port) as body_field:
        answer = body_field.answer()
    assert answer.status == 503
    check_headers(answer)


def test_a_fault_in_an_answer_gives_500_and_its_details_go_to_the_log_only(bridge: Callable[..., RunningBridge],
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    running = bridge(spare=0)
    secret = str(running.admin.token)

    def fail(*args: Any) -> None:
        raise RuntimeError("detail with %s in it" % secret)

    monkeypatch.setattr(cab.Service, "poll", fail)
    with Wire(running.port) as body_field:
        answer = body_field.send(request("GET /api/ask/%s HTTP/1.1" % secret, "Authorization: Bearer " + secret), request()).answer()
        assert (answer.status, answer.json) == (500, {"error": "Internal server error", "code": "internal"})
        assert body_field.answer().status == 200
    check_headers(answer)
    log = "\n".join(running.log)
    assert "Traceback" in log and "RuntimeError: detail with cab-" in log
    assert secret not in log


def test_a_broken_database_is_a_503_that_says_so(bridge: Callable[..., RunningBridge]) -> None:
    running = bridge(spare=0)
    with contextlib.closing(sqlite3.connect(str(running.data_dir / "bridge.db"))) as other:
        other.execute("DROP TABLE tokens")
    for answer in (running.admin.get("/health"), running.admin.post("/api/ask", {"message": "hi"})):
        assert (answer.status, answer.json["code"]) == (503, "unavailable")
        check_headers(answer)


@pytest.mark.parametrize("address, counted_as", [
    ("203.0.113.7", "203.0.113.7"), ("2001:db8::1", "2001:db8::/64"), ("2001:db8::ffff:0:0:1", "2001:db8::/64"),
    ("2001:db8:0:1::1", "2001:db8:0:1::/64"), ("fe80::1%eth0", "fe80::/64")])
def test_of_an_address_of_version_6_its_network_counts(address: str, counted_as: str) -> None:
    assert cab.HostPolicy().address(cab.Request("GET", "/", {}, {"host": "localhost"}, address, lambda: b"")) == counted_as


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("wanted, allowed", [(300, 300), (200, 256), (10 ** 9, None)])
def test_more_files_may_be_open_where_the_system_lets_us(wanted: int, allowed: Optional[int]) -> None:
    code = ("import sys; sys.path.insert(0, %r); import claude_api_bridge as cab; from resource import *; setrlimit(RLIMIT_NOFILE, (256, 400));"
            " cab.allow_files(%d); print(*getrlimit(RLIMIT_NOFILE))" % (str(Path(cab.__file__).parent), wanted))
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=30, check=True)
    assert done.stdout.split() == [str(allowed or 400).encode(), b"400"]
