"""Tests of callbacks: URLs and addresses, signatures, attempts, the schedule, the product."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import shutil
import signal
import socket
import ssl
import sqlite3
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import pytest

import claude_api_bridge as cab
from conftest import FakeClock, Program, RunningBridge, run_cli, wait_until

NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
SERVER_ERROR = b"HTTP/1.1 500 Internal Server Error\r\n\r\n"
BODY = b'{"status": "completed"}'


@pytest.fixture(autouse=True)
def short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the thread of a bridge look for due callbacks more often."""
    monkeypatch.setattr(cab, "CALLBACK_POLL_SECONDS", 0.01)


# --- signature and schedule ---


def test_signatures_are_those_of_the_official_libraries() -> None:
    """The vectors are in the repository of Standard Webhooks.

    First: libraries/{python,go,java,javascript,php,ruby,csharp}. Second: libraries/rust/src/lib.rs.
    """
    assert (
        cab.sign_callback(
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1614265330,
            b'{"test": 2432232314}',
        )
        == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )
    assert (
        cab.sign_callback(
            "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
            "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk",
            1649367553,
            b'{"email":"test@example.com","username":"test_user"}',
        )
        == "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw="
    )


def test_a_new_secret_has_24_random_bytes() -> None:
    """The specification requires 24 to 64."""
    secret = cab.new_callback_secret()
    assert secret.startswith("whsec_")
    assert len(base64.b64decode(secret[6:], validate=True)) == 24
    assert secret != cab.new_callback_secret()


def test_the_delays_grow_to_14_hours_and_retry_after_only_makes_them_longer() -> None:
    delays = (5, 300, 1800, 7200, 18000, 36000, 50400)
    for attempts, retry_after, least in (
        *((number, 0, delay) for number, delay in enumerate(delays, 1)),
        (1, 60, 60), (2, 60, 300), (1, 10**9, 50400),
    ):
        delay = cab.callback_delay(attempts, retry_after)
        assert delay is not None and least <= delay <= least * 1.1, (attempts, retry_after)
    assert cab.callback_delay(8) is None and cab.callback_delay(8, 60) is None


# --- URLs ---

GOOD_URLS = (
    ("https://example.com", "example.com", 443, "/", "example.com"),
    ("HTTPS://Example.COM:443/A?b=%20c", "example.com", 443, "/A?b=%20c", "example.com"),
    ("https://example.com:8443/", "example.com", 8443, "/", "example.com:8443"),
    ("https://example.com?x=1", "example.com", 443, "/?x=1", "example.com"),
    ("https://xn--bcher-kva.example/a@b:c", "xn--bcher-kva.example", 443, "/a@b:c",
     "xn--bcher-kva.example"),
    ("https://8.8.8.8/", "8.8.8.8", 443, "/", "8.8.8.8"),
    ("https://[2606:4700:0:0::1111]:444/", "2606:4700::1111", 444, "/", "[2606:4700::1111]:444"),
    ("https://my_service.internal/", "my_service.internal", 443, "/", "my_service.internal"),
    ("http://127.0.0.1:8000/x", "127.0.0.1", 8000, "/x", "127.0.0.1:8000"),
    ("http://nas1/", "nas1", 80, "/", "nas1"),
)
BAD_URLS = (
    "", "example.com", "//example.com/", "ftp://example.com/", "file:///x", "https://",
    "https:///x", "https://a@example.com/", "https://a:b@example.com/", "https://example.com/#a",
    "https://example.com\\@example.org/", "https://example.com./", "https://exam\tple.com/",
    "https://example.com/\r\nX: y", "https://example.com/ ", " https://example.com/",
    "https://example.com/\n", "https://example.com:0/", "https://example.com:65536/",
    "https://example.com:/", "https://example.com:+80/", "https://example.com:8_0/",
    "https://example.com:\u0664\u0664/", "https://\u2461.com/", "https://example.\u212aom/",
    "http\u017f://example.com/", "https://ex%61mple.com/", "https://2130706433/",
    "https://0x7f000001/", "https://017700000001/", "https://127.1/", "https://0x7f.0.0.1/",
    "https://1.2.3.4.5/", "https://256.1.1.1/", "https://1.2.3.4./", "https://a.0x10/",
    "https://a.1/", "https://[fe80::1%25eth0]/", "https://[fe80::1%1]/", "https://[::1/",
    "https://[1.2.3.4]x/", "https://[v1.x]/", "https://[:::]/", "https://..com/", "https://a..b/",
    "https://%s.com/" % ("a" * 64), "https://%scom/" % ("abc." * 64),
    "https://example.com/" + "a" * 2000,
)


def test_the_parts_of_urls() -> None:
    for text, *parts in GOOD_URLS:
        url = cab.CallbackUrl.parse(text)
        assert [url.host, url.port, url.target, url.authority] == parts
        assert url.is_https is text.lower().startswith("https:")


def test_other_forms_of_urls_are_refused() -> None:
    accepted = []
    for value in (*BAD_URLS, 5, True, ["https://example.com/"], {"url": "https://example.com/"}):
        try:
            cab.Ask.parse({"message": "hi", "callback": value})
            accepted.append(value)
        except cab.InvalidRequest as error:
            assert error.extra["field"] == "callback" and str(error).startswith("callback ")
    assert accepted == []


# The same in all versions of Python, whose `is_global` differs.
PUBLIC = (
    "1.1.1.1 8.8.8.8 100.63.255.255 100.128.0.0 172.15.0.1 172.32.0.1 192.0.1.1 198.17.0.1 "
    "198.20.0.1 223.255.255.255 2606:4700::1111 2001:200::1 2001:4860:4860::8888 2a00:1450::1"
)
PRIVATE = (
    "127.0.0.1 127.255.255.255 10.0.0.1 172.16.0.1 172.31.255.255 192.168.0.1 100.64.0.1 "
    "100.127.255.255 ::1 fc00::1 fdff::1"
)
# With addresses of IPv4 in IPv6 in every form: mapped, compatible, translated, NAT64, 6to4, Teredo.
REFUSED = (
    "0.0.0.0 0.1.2.3 169.254.169.254 192.0.0.1 192.0.0.8 192.0.0.9 192.0.0.170 192.0.2.1 "
    "192.88.99.1 198.18.0.1 198.19.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.1.1.1 240.0.0.1 "
    "255.255.255.255 100.100.100.200 fd00:ec2::254 :: ::10.0.0.1 ::8.8.8.8 ::ffff:10.0.0.1 "
    "::ffff:8.8.8.8 ::ffff:127.0.0.1 ::ffff:0:a00:1 64:ff9b::a00:1 64:ff9b::808:808 "
    "64:ff9b:1::a00:1 2002:a00:1:: 2001:0:a00:1:: 2001:db8::1 2001:2::1 2001:10::1 2001:20::1 "
    "3fff::1 100::1 100:0:0:1::1 5f00::1 4000::1 fe80::1 fe80::1%eth0 fec0::1 ff02::1 ff0e::1"
)


def test_the_addresses_to_which_a_callback_may_connect() -> None:
    def allowed(words: str, allow_private: bool) -> List[str]:
        addresses = [ipaddress.ip_address(word) for word in words.split()]
        return [str(one) for one in addresses if cab.is_allowed_address(one, allow_private)]

    assert allowed(PUBLIC, False) == allowed(PUBLIC, True) == PUBLIC.split()
    assert (allowed(PRIVATE, False), allowed(PRIVATE, True)) == ([], PRIVATE.split())
    assert allowed(REFUSED, False) == allowed(REFUSED, True) == []


# --- the rights of a token ---


def is_allowed(url: str, callbacks: Any) -> Optional[bool]:
    """Return whether a token may name the URL; None if its address may be private, too."""
    try:
        return None if cab.check_callback(url, callbacks)[1] else True
    except cab.InvalidRequest as error:
        assert error.extra["field"] == "callback"
        return False


def test_a_token_without_a_list_may_name_public_https_addresses_only() -> None:
    assert not is_allowed("https://example.com/", False)
    for url in ("https://example.com/", "https://example.com:8443/", "https://[2606:4700::1111]/"):
        assert is_allowed(url, True) is True
    for host in ("127.0.0.1", "10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:8.8.8.8]"):
        assert is_allowed("https://%s/" % host, True) is False
    assert is_allowed("http://example.com/", True) is False


def test_a_name_that_ends_with_a_digit_is_no_address() -> None:
    for host in ("web1", "server.node1"):
        assert is_allowed("https://%s/" % host, True) is True


def test_a_list_allows_its_hosts_on_all_ports_or_on_one() -> None:
    hosts = cab.validate_callbacks(["Bots.Example.com", "192.168.1.5:8080", "[fd00::1]:8080"])
    for url in (
        "http://bots.example.com/", "https://BOTS.example.com:99/", "http://192.168.1.5:8080/x",
        "http://[fd00:0::1]:8080/",
    ):
        assert is_allowed(url, hosts) is None, url
    for url in (
        "http://example.com/", "http://a.bots.example.com/", "http://bots.example.com.evil.org/",
        "http://192.168.1.5/", "http://192.168.1.5:8081/", "http://192.168.1.6:8080/",
        "https://evil.org/bots.example.com", "https://evil.org/?bots.example.com",
        # Another address, whose last group looks like the port.
        "http://[fd00::1]/", "http://[fd00::1:8080]/",
    ):
        assert is_allowed(url, hosts) is False, url
    assert is_allowed("http://[::1]:81/", cab.validate_callbacks(["[0::1]"])) is None
    assert is_allowed("https://example.com/", cab.validate_callbacks(["example.com:443"])) is None
    assert is_allowed("http://example.com/", cab.validate_callbacks(["example.com:443"])) is False


def test_a_list_that_is_no_list_of_hosts_is_refused() -> None:
    assert [cab.validate_callbacks(value) for value in (None, False, True)] == [False, False, True]
    values: Tuple[Any, ...] = (
        [], "example.com", 1, {}, ["a"] * 21, [""], ["*"], ["*.example.com"], ["a b"], ["a,b"],
        ["https://a.com"], ["a@b.com"], ["a.com#x"], ["127.1"], ["a.com\n"], [["a.com"]],
    )
    for value in values:
        with pytest.raises(cab.InvalidRequest):
            cab.validate_callbacks(value)


def test_an_entry_that_can_match_no_url_is_refused() -> None:
    accepted = []
    for entry in (None, True, "a.com/x", "a.com?x", "999.1.1.1", "a.com:0", "169.254.169.254"):
        with contextlib.suppress(cab.InvalidRequest):
            accepted.append(cab.validate_callbacks([entry]))
    assert accepted == []


# --- a receiver ---


class Receiver:
    """A server that handles one connection after the other with `act`.

    requests: what arrived. connections: how many there were. answer: what `act` sends by default.
    stopped: ends `act` where it waits. names: those for which a certificate was requested.
    """

    def __init__(
        self,
        act: Optional[Callable[[Receiver, Any], None]] = None,
        context: Optional[ssl.SSLContext] = None,
    ) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.host = "127.0.0.1:%d" % self.port
        self.url = "http://%s/hook?x=1" % self.host
        self.answer = NO_CONTENT
        self.requests: List[bytes] = []
        self.connections = 0
        self.names: List[Optional[str]] = []
        self.stopped = threading.Event()
        self._act, self._context = act or Receiver.respond, context
        if context:
            context.sni_callback = lambda _, name, __: self.names.append(name)
        self._thread = threading.Thread(target=self._serve, name="receiver", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            with contextlib.suppress(OSError), connection:
                if self.stopped.is_set():
                    return
                self.connections += 1
                connection.settimeout(10)
                if self._context:
                    with self._context.wrap_socket(connection, server_side=True) as secure:
                        self._act(self, secure)
                else:
                    self._act(self, connection)

    def read(self, connection: Any) -> None:
        """Read a request."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._receive(connection)
        head, _, body = data.partition(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(body) < size:
            body += self._receive(connection)
        self.requests.append(head + b"\r\n\r\n" + body)

    @staticmethod
    def _receive(connection: Any) -> bytes:
        data: bytes = connection.recv(65_536)
        if not data:
            raise ConnectionError("the request is incomplete")
        return data

    def respond(self, connection: Any) -> None:
        """Read a request and send the answer."""
        self.read(connection)
        connection.sendall(self.answer)

    def hang(self, connection: Any) -> None:
        """Read a request and answer when the receiver is closed."""
        self.read(connection)
        self.stopped.wait(30)

    def parts(self, number: int = -1) -> Tuple[str, Dict[str, str], bytes]:
        """Return the first line, the headers and the body of a request."""
        head, _, body = self.requests[number].partition(b"\r\n\r\n")
        line, *lines = head.decode().split("\r\n")
        return line, dict(text.split(": ", 1) for text in lines), body

    def close(self) -> None:
        self.stopped.set()
        # Not create_connection, which looks up the name: a test may replace the look-up.
        with contextlib.suppress(OSError), socket.socket() as connection:
            connection.connect(("127.0.0.1", self.port))
        self._thread.join(10)
        self.listener.close()


Receivers = Callable[..., Receiver]


@pytest.fixture
def receive() -> Iterator[Receivers]:
    """Return receive(act=None, context=None) -> a Receiver."""
    started: List[Receiver] = []

    def start(act: Any = None, context: Optional[ssl.SSLContext] = None) -> Receiver:
        started.append(Receiver(act, context))
        return started[-1]

    yield start
    for receiver in started:
        receiver.close()


@pytest.fixture
def receiver(receive: Receivers) -> Receiver:
    return receive()


def post(
    receiver: Receiver,
    body: bytes = BODY,
    timeout: float = 5.0,
    host: str = "127.0.0.1",
    scheme: str = "http",
    headers: Mapping[str, str] = {},
) -> Tuple[int, int]:
    """Make one attempt with the right to reach private addresses."""
    url = cab.CallbackUrl.parse("%s://%s:%d/hook?x=1" % (scheme, host, receiver.port))
    return cab.send_callback(url, headers, body, True, timeout)


def answer_lookups(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> List[str]:
    """Let all names have these addresses; return the list of the names that are looked up."""
    names: List[str] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> List[Tuple[Any, ...]]:
        names.append(host)
        return [
            (socket.AF_INET6, 1, 6, "", (address, port, 0, 0))
            if ":" in address else (socket.AF_INET, 1, 6, "", (address, port))
            for address in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


# --- one attempt ---


def test_the_request_that_arrives(receiver: Receiver) -> None:
    assert post(receiver, headers={"Webhook-Id": "msg_1"}) == (204, 0)
    assert receiver.parts() == (
        "POST /hook?x=1 HTTP/1.1",
        {
            "Host": receiver.host, "User-Agent": "claude-api-bridge", "Webhook-Id": "msg_1",
            "Content-Type": "application/json", "Content-Length": str(len(BODY)),
            "Connection": "close",
        },
        BODY,
    )


def test_the_status_and_retry_after_of_answers(receiver: Receiver) -> None:
    for receiver.answer, expected in (
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", (200, 0)),
        (b"HTTP/1.0 410 Gone\n\n", (410, 0)),
        (b"HTTP/1.1 500\r\n\r\n", (500, 0)),
        (b"HTTP/1.1 429 Slow\r\nRETRY-AFTER:  120 \r\n\r\n", (429, 120)),
        (b"HTTP/1.1 503 X\r\nA: b\r\nRetry-After: 7\r\nC: d\r\n\r\n", (503, 7)),
        (b"HTTP/1.1 503 X\r\nRetry-After: Wed, 21 Oct 2026 07:28:00 GMT\r\n\r\n", (503, 0)),
        (b"HTTP/1.1 503 X\r\nRetry-After: -5\r\n\r\n", (503, 0)),
        (b"HTTP/1.1 200 OK\r\n\r\na\r\nRetry-After: 5\r\n", (200, 0)),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 H\r\nLink: a\r\n\r\nHTTP/1.1 201 C\r\n\r\n",
         (201, 0)),
        (b"HTTP/1.1 500 X\r\nA: HTTP/1.1 100 C\r\nRetry-After: 5\r\n\r\n", (500, 5)),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 1_000_000, (200, 0)),
        (b"HTTP/1.1 200 OK\r\n", (200, 0)),
    ):
        assert post(receiver) == expected, receiver.answer[:100]


def test_answers_that_are_not_http(receiver: Receiver) -> None:
    for receiver.answer in (
        b"", b"\r\n", b"SSH-2.0-x\r\n", b"HTTP/1.1 20", b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 2000 X\r\n\r\n", b"a" * 100_000, b"HTTP/1.1 100 Continue\r\n\r\n",
    ):
        with pytest.raises(OSError):
            post(receiver)


def test_an_endless_head_is_cut(receive: Receivers) -> None:
    def act(receiver: Receiver, connection: Any) -> None:
        receiver.read(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while not receiver.stopped.is_set():
            connection.sendall(b"A: b\r\n" * 100)

    assert post(receive(act)) == (200, 0)


def test_redirects_are_not_followed(receive: Receivers) -> None:
    receiver, other = receive(), receive()
    receiver.answer = b"HTTP/1.1 307 X\r\nLocation: %s\r\n\r\n" % other.url.encode()
    assert post(receiver) == (307, 0)
    assert other.connections == 0


def test_the_variables_of_proxies_are_ignored(
    receive: Receivers, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver, proxy = receive(), receive()
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://" + proxy.host)
    assert post(receiver) == (204, 0)
    assert (receiver.connections, proxy.connections) == (1, 0)


def test_a_name_with_private_addresses_only_is_refused(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(host: str, allow_private: bool) -> None:
        url = cab.CallbackUrl(False, host, receiver.port, "/")
        # Not parsed, because `parse` refuses most of these forms.
        with pytest.raises(OSError):
            cab.send_callback(url, {}, BODY, allow_private, 5)

    for host in ("localhost", "127.0.0.1", "::1", "2130706433", "0x7f.1", "127.1"):
        refused(host, False)
    answer_lookups(monkeypatch, "127.0.0.1", "::ffff:127.0.0.1", "::1")
    refused("hook.test", False)
    answer_lookups(monkeypatch, "::ffff:127.0.0.1", "0.0.0.0", "fe80::1%2")
    refused("hook.test", True)
    assert receiver.connections == 0


def trickle(receiver: Receiver, connection: Any, start: bytes = b"HTTP/1.1 200 OK\r\nX: ") -> None:
    connection.sendall(start)
    while not receiver.stopped.wait(0.05):
        connection.sendall(b"a")


def trickle_handshake(receiver: Receiver, connection: Any) -> None:
    trickle(receiver, connection, b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc\x03\x03")


def read_slowly(receiver: Receiver, connection: Any) -> None:
    while not receiver.stopped.wait(0.01):
        connection.recv(4096)


def assert_too_late(receiver: Receiver, scheme: str = "http", body: bytes = BODY) -> None:
    began = time.monotonic()
    with pytest.raises(socket.timeout):
        post(receiver, body, 0.5, scheme=scheme)
    assert 0.45 < time.monotonic() - began < 1.5


@pytest.mark.parametrize(
    "act, scheme, size",
    [
        (Receiver.hang, "http", 10),
        (trickle, "http", 10),
        (trickle_handshake, "https", 10),
        (read_slowly, "http", 30_000_000),
    ],
)
def test_the_deadline_is_for_the_whole_attempt(
    act: Any, scheme: str, size: int, receive: Receivers
) -> None:
    assert_too_late(receive(act), scheme, b"x" * size)


def test_an_answer_before_the_end_of_the_body_counts(receive: Receivers) -> None:
    def act(receiver: Receiver, connection: Any) -> None:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 410 Gone\r\n\r\n")

    assert post(receive(act), b"x" * 30_000_000)[0] == 410


def test_the_next_address_is_tried(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_lookups(monkeypatch, "127.0.0.9", "::1", "127.0.0.1")
    assert post(receiver, host="hook.test") == (204, 0)
    answer_lookups(monkeypatch, "127.0.0.9")
    with pytest.raises(ConnectionRefusedError):
        post(receiver, host="hook.test")


def test_an_address_that_is_silent_leaves_time_for_the_next(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        # Linux drops the connections that do not fit into the queue of a listener.
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.5", receiver.port))
        full.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.5", receiver.port))
        answer_lookups(monkeypatch, "127.0.0.5", "127.0.0.1")
        began = time.monotonic()
        assert post(receiver, host="hook.test", timeout=1) == (204, 0)
        assert 0.45 < time.monotonic() - began < 0.95


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with a key and a certificate for hook.test and 127.0.0.1, its own authority."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is missing")
    folder = tmp_path_factory.mktemp("certificate")
    (folder / "config").write_text(
        "[req]\ndistinguished_name=dn\nx509_extensions=ext\nprompt=no\n[dn]\nCN=hook.test\n"
        "[ext]\nsubjectAltName=DNS:hook.test,IP:127.0.0.1\nbasicConstraints=critical,CA:true\n"
    )
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -config config -keyout key -out cert"
    subprocess.run(["openssl", *words.split()], cwd=folder, check=True, capture_output=True)
    path = folder / "both.pem"
    path.write_text((folder / "key").read_text() + (folder / "cert").read_text())
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(certificate))
    return context


@pytest.fixture
def trust(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


def test_https_goes_to_the_checked_address_under_the_name(
    receive: Receivers, tls: ssl.SSLContext, trust: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = receive(None, tls)
    assert post(receiver, scheme="https") == (204, 0)
    looked_up = answer_lookups(monkeypatch, "127.0.0.1")
    assert post(receiver, scheme="https", host="hook.test") == (204, 0)
    # One look-up: a second one could give an address that was not checked.
    assert (looked_up, receiver.names) == (["hook.test"], [None, "hook.test"])
    assert receiver.parts()[1]["Host"] == "hook.test:%d" % receiver.port


def test_a_certificate_of_another_name_or_issuer_is_refused(
    receive: Receivers,
    tls: ssl.SSLContext,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receiver = receive(None, tls)
    with pytest.raises(ssl.SSLCertVerificationError):
        post(receiver, scheme="https")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    answer_lookups(monkeypatch, "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError, match="hook.example"):
        post(receiver, scheme="https", host="hook.example")
    assert receiver.requests == []


def test_the_deadline_and_large_bodies_over_tls(
    receive: Receivers, tls: ssl.SSLContext, trust: None
) -> None:
    assert_too_late(receive(trickle, tls), "https")
    assert_too_late(receive(read_slowly, tls), "https", b"x" * 30_000_000)
    receiver = receive(None, tls)
    assert post(receiver, b"x" * 3_000_000, scheme="https") == (204, 0)
    assert receiver.parts()[2] == b"x" * 3_000_000


# --- the store and the sender ---


class Sending:
    """A database, a token with the right to name callbacks, and a sender that `step` drives."""

    def __init__(self, path: Path, clock: FakeClock, callbacks: Any) -> None:
        self.path, self.clock = path, clock
        self.metrics = cab.Metrics()
        self.open()
        self.token = self.stores.tokens.add(
            cab.NewToken("bot", callbacks=callbacks), cab.new_token()
        )

    def open(self) -> None:
        self.stores = cab.Stores(self.path, self.clock, self.metrics)
        self.sender = cab.CallbackSender(self.stores, self.metrics)

    def restart(self) -> None:
        self.stores.close()
        self.open()

    def finish(self, url: str, response: str = "hi") -> cab.Job:
        """Store a completed request."""
        self.stores.jobs.enqueue(self.token.id, cab.Ask("hello", callback=url))
        job: Optional[cab.Job] = self.stores.jobs.claim()
        assert job is not None
        assert self.stores.jobs.complete(job, cab.Answer(response))
        return job

    def counts(self) -> Dict[str, int]:
        """Return the metric cab_callbacks_total by result."""
        return {
            labels[0][1]: int(value)
            for (name, labels), value in self.metrics.values().items()
            if name == "cab_callbacks_total"
        }

    def rows(self) -> List[Tuple[Any, ...]]:
        """Return (attempts, seconds until the next one) of every callback in the file."""
        with contextlib.closing(sqlite3.connect(str(self.path))) as db:
            rows = db.execute("SELECT attempts, next_at FROM callbacks ORDER BY rowid").fetchall()
        return [(attempts, at and at - self.clock.now()) for attempts, at in rows]


@pytest.fixture
def sending(tmp_path: Path, clock: FakeClock) -> Iterator[Callable[..., Sending]]:
    """Return sending(*hosts) -> Sending; without hosts the token may name public addresses."""
    opened: List[Sending] = []

    def make(*hosts: str) -> Sending:
        opened.append(Sending(tmp_path / "bridge.db", clock, hosts or True))
        return opened[-1]

    yield make
    for one in opened:
        one.stores.close()


SendingOf = Callable[..., Sending]


def test_a_callback_waits_for_the_end_of_its_request(
    sending: SendingOf, receiver: Receiver
) -> None:
    one = sending(receiver.host)
    job = one.stores.jobs.enqueue(one.token.id, cab.Ask("hi", callback=receiver.url)).job
    assert (one.sender.step(), one.stores.callbacks.next_at()) == (False, None)
    claimed = one.stores.jobs.claim()
    assert claimed is not None
    assert not one.sender.step()
    assert one.stores.jobs.requeue(claimed) and one.stores.jobs.claim()
    assert not one.sender.step() and receiver.connections == 0
    assert one.stores.jobs.fail(job, "timeout", "too late")
    assert one.sender.step() and not one.sender.step()
    body = json.loads(receiver.parts()[2])
    assert (body["requestId"], body["errorCode"]) == (job.id, "timeout")
    assert (one.rows(), one.counts()) == ([], {"delivered": 1})


def test_eight_attempts_on_the_schedule_then_none(
    sending: SendingOf, receiver: Receiver, clock: FakeClock, log: List[str]
) -> None:
    receiver.answer = SERVER_ERROR
    one = sending(receiver.host)
    job = one.finish(receiver.url)
    for attempts, delay in enumerate((5, 300, 1800, 7200, 18000, 36000, 50400), 1):
        assert one.sender.step()
        [(stored, seconds)] = one.rows()
        assert stored == attempts and delay <= seconds <= delay * 1.1 + 0.001
        # Not before its time, also after a restart.
        clock.advance(seconds - 0.5)
        assert not one.sender.step()
        one.restart()
        assert not one.sender.step()
        clock.advance(0.5)
    assert one.sender.step()
    clock.advance(10 * 86_400)
    assert not one.sender.step()
    assert (one.rows(), one.counts()) == ([], {"failed": 7, "given_up": 1})
    assert receiver.connections == 8 and len(log) == 8
    assert "attempt 8" in log[-1] and "status 500" in log[-1]
    # The attempts have one id and one body, and the time and signature of each attempt.
    parts = [receiver.parts(number) for number in range(8)]
    assert {headers["Webhook-Id"] for _, headers, _ in parts} == {job.id}
    assert len({body for *_, body in parts}) == 1
    times = [int(headers["Webhook-Timestamp"]) for _, headers, _ in parts]
    assert times == sorted(set(times)) and times[0] == int(FakeClock().at)
    assert len({headers["Webhook-Signature"] for _, headers, _ in parts}) == 8
    assert one.stores.jobs.get(job.id) is not None


def test_a_later_attempt_may_succeed(
    sending: SendingOf, receiver: Receiver, clock: FakeClock
) -> None:
    one = sending(receiver.host)
    one.finish(receiver.url)
    # A redirect is no success.
    for receiver.answer in (b"HTTP/1.1 302 X\r\nLocation: /\r\n\r\n", b"garbage\r\n\r\n"):
        assert one.sender.step()
        clock.advance(331)
    receiver.answer = b"HTTP/1.1 299 Fine\r\n\r\n"
    assert one.sender.step() and not one.sender.step()
    assert (one.rows(), one.counts()) == ([], {"failed": 2, "delivered": 1})


def test_gone_ends_the_attempts_and_retry_after_delays_them(
    sending: SendingOf, receiver: Receiver
) -> None:
    one = sending(receiver.host)
    one.finish(receiver.url)
    receiver.answer = b"HTTP/1.1 503 X\r\nRetry-After: 3600\r\n\r\n"
    assert one.sender.step()
    assert 3600 <= one.rows()[0][1] <= 3961
    one.finish(receiver.url)
    receiver.answer = b"HTTP/1.1 410 Gone\r\nRetry-After: 5\r\n\r\n"
    assert one.sender.step()
    assert (len(one.rows()), one.counts()) == (1, {"failed": 1, "given_up": 1})


def test_a_private_address_behind_a_name_gets_nothing(
    sending: SendingOf, receiver: Receiver, log: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is looked up again for every attempt, because its addresses may change."""
    one = sending()
    one.finish("https://hook.test:%d/secret-path" % receiver.port)
    answer_lookups(monkeypatch, "127.0.0.1", "10.0.0.1")
    assert one.sender.step()
    assert (receiver.connections, one.counts()) == (0, {"failed": 1})
    assert "allowed" in log[0] and "secret-path" not in log[0]


@pytest.mark.parametrize("error", [socket.gaierror(-2, "Name not known"), UnicodeError("label")])
def test_a_name_that_cannot_be_looked_up_is_tried_again(
    error: Exception, sending: SendingOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    one = sending()
    one.finish("https://hook.test/")
    assert one.sender.step() and not one.sender.step()
    assert [attempts for attempts, _ in one.rows()] == [1]


def test_a_receiver_that_does_not_run_is_tried_again(
    sending: SendingOf, receive: Receivers, log: List[str]
) -> None:
    receiver = receive()
    one = sending(receiver.host)
    receiver.close()
    one.finish(receiver.url)
    assert one.sender.step()
    assert (one.rows()[0][0], one.counts()) == (1, {"failed": 1})
    assert "refused" in log[0]


def test_nothing_is_sent_for_a_revoked_token(
    sending: SendingOf, receiver: Receiver, clock: FakeClock
) -> None:
    one = sending(receiver.host)
    one.finish(receiver.url)
    receiver.answer = SERVER_ERROR
    assert one.sender.step()
    one.finish(receiver.url)
    assert len(one.rows()) == 2
    one.stores.tokens.delete(one.token.id, protect=False)
    clock.advance(60)
    assert not one.sender.step()
    assert (receiver.connections, one.rows()) == (1, [])


def test_nothing_is_sent_while_the_requests_of_a_revoked_token_are_deleted(
    sending: SendingOf, receiver: Receiver
) -> None:
    """The first step of a revocation refuses the token; deleting many requests takes time."""
    one = sending(receiver.host)
    one.finish(receiver.url)
    one.stores.tokens._disable(one.token.id, False)
    one.sender.step()
    assert receiver.connections == 0


@pytest.mark.parametrize("amount", [0, 1])
def test_a_disk_that_is_full_does_not_repeat_the_attempt_every_second(
    amount: int,
    sending: SendingOf,
    receiver: Receiver,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """amount: writes before the disk is full."""
    one = sending(receiver.host)
    one.finish(receiver.url)
    left, write = [None] * amount, one.stores.database.write

    def limited(*args: Any, **options: Any) -> Any:
        if not left:
            raise cab.Unavailable("disk full")
        left.pop()
        return write(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(one.stores.database, "write", limited)
        for _ in range(5):
            with contextlib.suppress(cab.Unavailable):
                one.sender.step()
    assert receiver.connections <= 1
    clock.advance(6)
    assert one.sender.step() and not one.sender.step()
    assert (one.rows(), one.counts()) == ([], {"delivered": 1})


def test_the_one_that_waits_longest_is_first_and_indexes_find_it(
    sending: SendingOf, receiver: Receiver, clock: FakeClock, tmp_path: Path
) -> None:
    one = sending(receiver.host)
    receiver.answer = SERVER_ERROR
    first = one.finish(receiver.url)
    one.sender.step()
    clock.advance(100)
    second = one.finish(receiver.url)
    receiver.answer = NO_CONTENT
    assert one.sender.step() and one.sender.step() and not one.sender.step()
    ids = [receiver.parts(number)[1]["Webhook-Id"] for number in range(3)]
    assert ids == [first.id, first.id, second.id]
    statements: List[str] = []
    read = one.stores.database.read

    def note(sql: str, *values: Any) -> Any:
        statements.append(sql)
        return read(sql, *values)

    one.stores.database.read = note  # type: ignore[method-assign]
    one.finish(receiver.url)
    one.sender.step()
    used = [sql for sql in statements if "FROM callbacks" in sql]
    assert len(used) == 2
    with contextlib.closing(sqlite3.connect(str(tmp_path / "bridge.db"))) as db:
        for sql in used:
            plan = db.execute("EXPLAIN QUERY PLAN " + sql, [0] * sql.count("?")).fetchall()
            # The tokens are few.
            lines = [row[-1] for row in plan if row[-1].startswith(("SCAN", "SEARCH"))]
            assert all("INDEX" in line or line == "SCAN t" for line in lines), plan


def test_a_silent_receiver_of_many_tokens_starves_nobody(
    bridge: Start, receive: Receivers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token has its turn, however many results another one has."""
    monkeypatch.setattr(cab, "CALLBACK_THREADS", 1)
    monkeypatch.setattr(cab, "CALLBACK_SECONDS", 0.05)
    silent, good = receive(Receiver.hang), receive()
    running = bridge()
    try:
        deaf, _ = token_for(running, [silent.host])
        heard, _ = token_for(running, [good.host])
        running.admin.post("/api/queue/pause", {})
        for number in range(8):
            deaf.ask(str(number), callback=silent.url)
        heard.ask("hello", callback=good.url)
        running.admin.post("/api/queue/resume", {})
        delivered(good)
        # It was the last that ended, and is not the last that was sent.
        assert silent.connections < 8
    finally:
        silent.stopped.set()


def test_a_callback_is_not_sent_once_its_token_is_revoked(
    sending: SendingOf, receiver: Receiver
) -> None:
    one = sending(receiver.host)
    one.finish(receiver.url)
    due = one.stores.callbacks.due

    def revoked_meanwhile() -> Any:
        callbacks = due()
        one.stores.tokens.delete(one.token.id, protect=False)
        return callbacks

    one.stores.callbacks.due = revoked_meanwhile  # type: ignore[method-assign]
    one.sender.step()
    assert receiver.connections == 0 and one.rows() == []


def test_callbacks_that_an_older_version_stores_are_sent(
    sending: SendingOf, receiver: Receiver
) -> None:
    """Its bridge may run while a command of this version changes the schema."""
    one = sending(receiver.host)
    job = one.finish(receiver.url)
    with contextlib.closing(sqlite3.connect(str(one.path))) as db, db:
        db.execute("DELETE FROM callbacks")
        values = (job.id, receiver.url, one.clock.now())
        db.execute("INSERT INTO callbacks (job_id, url, next_at) VALUES (?, ?, ?)", values)
    one.restart()
    assert one.sender.step() and receiver.connections == 1


def test_an_error_nobody_expects_ends_no_thread(
    bridge: Start, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = bridge()
    api, _ = token_for(running, [receiver.host])
    for owner, name in ((cab.CallbackStore, "due"), (cab.CallbackSender, "_body")):
        with monkeypatch.context() as patch:

            def fails(*arguments: Any) -> Any:
                raise MemoryError(name)

            patch.setattr(owner, name, fails)
            before = len(running.log)
            api.answer("hi", callback=receiver.url)
            wait_until(lambda: any("MemoryError: " + name in line for line in running.log[before:]))
    api.ask("more", callback=receiver.url)
    # The one whose attempt failed may be sent again meanwhile.
    wait_until(lambda: len(receiver.requests) >= 2)


def test_a_time_that_a_wrong_clock_made_is_corrected(
    sending: SendingOf, receiver: Receiver, clock: FakeClock
) -> None:
    one = sending(receiver.host)
    receiver.answer = SERVER_ERROR
    one.finish(receiver.url)
    clock.advance(30 * 86_400)
    one.sender.step()
    clock.advance(-30 * 86_400)
    assert not one.sender.step()
    one.stores.callbacks.limit_delays()
    assert one.sender.step() and receiver.connections == 2


# --- the product ---

Start = Callable[..., RunningBridge]


def token_for(running: RunningBridge, callbacks: Any, **fields: Any) -> Tuple[Any, str]:
    """Create a token. -> (its client, the secret of its callbacks)."""
    answer = running.admin.post("/api/tokens", {"name": "t", "callbacks": callbacks, **fields})
    assert answer.status == 201, answer.data
    return running.admin.with_token(answer.json["token"]), answer.json["callbackSecret"]


def delivered(receiver: Receiver, amount: int = 1) -> List[Dict[str, Any]]:
    """Wait for so many requests; return their bodies."""
    wait_until(lambda: len(receiver.requests) >= amount)
    assert len(receiver.requests) == amount
    return [json.loads(receiver.parts(number)[2]) for number in range(amount)]


def test_a_result_arrives_as_a_poll_returns_it_and_its_signature_is_right(
    bridge: Start, receiver: Receiver
) -> None:
    running = bridge()
    api, secret = token_for(running, [receiver.host], sessionMode="stateful")
    schema = {"type": "object"}
    request_id = api.ask("say grün", callback=receiver.url, jsonSchema=schema)
    [body] = delivered(receiver)
    line, headers, data = receiver.parts()
    assert line == "POST /hook?x=1 HTTP/1.1"
    assert data == api.get("/api/ask/" + request_id).data
    assert (body["status"], body["response"]) == ("completed", "grün")
    assert headers["Webhook-Id"] == request_id
    assert abs(int(headers["Webhook-Timestamp"]) - time.time()) < 30
    # Not by `sign_callback`: a receiver that follows the specification does this.
    content = ("%(Webhook-Id)s.%(Webhook-Timestamp)s." % headers).encode() + data
    key = base64.b64decode(secret[len("whsec_"):])
    expected = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    assert headers["Webhook-Signature"] == "v1," + expected
    counted = b'cab_callbacks_total{result="delivered"} 1'
    wait_until(lambda: counted in running.admin.get("/metrics").data)


def test_a_failure_and_a_cancellation_arrive_as_well(
    bridge: Start, receiver: Receiver, gate: Path
) -> None:
    api, _ = token_for(bridge(), [receiver.host])
    failed = api.ask("die 1", callback=receiver.url)
    running = api.ask("hold %s" % gate, callback=receiver.url)
    queued = api.ask("hi", callback=receiver.url)
    delivered(receiver)
    wait_until(lambda: api.poll(running)["status"] == "processing")
    for request_id in (queued, running):
        assert api.delete("/api/ask/" + request_id).status == 200
    bodies = delivered(receiver, 3)
    assert [body["requestId"] for body in bodies[:1]] == [failed]
    for body in bodies:
        assert body == api.poll(body["requestId"])
    codes = {body["requestId"]: body["errorCode"] for body in bodies}
    assert codes == {failed: "cli_error", queued: "cancelled", running: "cancelled"}


def test_callbacks_that_are_refused(bridge: Start) -> None:
    running = bridge()
    public, _ = token_for(running, True)
    listed, _ = token_for(running, ["bots.example.com"])
    plain = running.admin.new_token()
    for api, url in (
        (plain, "https://example.com/"), (running.admin, "https://example.com/"),
        (public, "http://example.com/"), (public, "https://127.0.0.1/"),
        (public, "https://10.1.2.3/"), (public, "https://[::1]/"), (public, "https://[fd00::1]/"),
        (public, "https://169.254.169.254/"), (public, "https://[::ffff:10.0.0.1]/"),
        (public, "ftp://example.com/"), (public, "https://a@example.com/"), (public, 5),
        (listed, "https://example.com/"), (listed, "https://bots.example.com.evil.org/"),
    ):
        answer = api.post("/api/ask", {"message": "hi", "callback": url})
        body = answer.json
        assert (answer.status, body["code"], body["field"]) == (400, "invalid_request", "callback")
    assert running.admin.get("/api/requests").json["requests"] == []
    values: Tuple[Any, ...] = ("all", [], ["https://example.com"], {})
    for callbacks in values:
        answer = running.admin.post("/api/tokens", {"name": "t", "callbacks": callbacks})
        assert (answer.status, answer.json["field"]) == (400, "callbacks")


def test_only_the_creation_of_a_token_returns_the_secret(bridge: Start) -> None:
    running = bridge()
    _, secret = token_for(running, ["bots.example.com"])
    assert token_for(running, True)[1] != secret
    plain = running.admin.post("/api/tokens", {"name": "plain"})
    assert "callbackSecret" not in plain.json
    tokens = running.admin.get("/api/tokens")
    found = [token["callbacks"] for token in tokens.json["tokens"]]
    assert sorted(map(str, found)) == sorted(["False", "False", "True", "['bots.example.com']"])
    assert b"whsec_" not in tokens.data + running.admin.get("/api/status").data


def test_an_idempotency_key_keeps_its_callback(bridge: Start, receiver: Receiver) -> None:
    api, _ = token_for(bridge(), [receiver.host])
    headers = {"Idempotency-Key": "k"}

    def ask(**fields: Any) -> Any:
        return api.post("/api/ask", {"message": "hi", **fields}, headers=headers)

    first, again = ask(callback=receiver.url), ask(callback=receiver.url)
    assert first.json["requestId"] == again.json["requestId"]
    for fields in ({"callback": receiver.url + "2"}, {}):
        answer = ask(**fields)
        assert (answer.status, answer.json["code"]) == (409, "idempotency_conflict")
    delivered(receiver)
    # The key finds the finished request, too; it is not sent again.
    assert ask(callback=receiver.url).json["requestId"] == first.json["requestId"]
    other = api.answer("other", callback=receiver.url)["requestId"]
    ids = [body["requestId"] for body in delivered(receiver, 2)]
    assert ids == [first.json["requestId"], other]


def test_a_request_without_callback_has_the_fingerprint_of_earlier_versions() -> None:
    """A client may repeat a request with its Idempotency-Key after the bridge was updated."""
    fields = ["hi", "haiku", None, None, "default", None]
    ask = cab.Ask("hi", model="haiku", conversation="default")
    assert ask.fingerprint == cab.digest(cab.as_json(fields))


def test_a_receiver_that_hangs_delays_no_other_token_and_not_the_end(
    bridge: Start, receive: Receivers, tmp_path: Path
) -> None:
    receiver, other = receive(Receiver.hang), receive()
    with contextlib.ExitStack() as stack:
        running = bridge()
        stack.callback(receiver.stopped.set)
        api, _ = token_for(running, [receiver.host])
        others, _ = token_for(running, [other.host])
        request_id = api.ask("hi", callback=receiver.url)
        api.ask("and this", callback=receiver.url)
        delivered(receiver)
        began = time.monotonic()
        others.ask("hello", callback=other.url)
        delivered(other)
        assert api.poll(request_id)["status"] == "completed"
        assert api.answer("more")["response"] == "Echo: more"
        assert time.monotonic() - began < 5
        assert receiver.connections == 1
        running.bridge.__exit__()
        assert time.monotonic() - began < 12 and not receiver.stopped.is_set()
    # The attempt of a bridge that has ended writes nothing, and no traceback.
    wait_until(lambda: "callback" not in [thread.name for thread in threading.enumerate()])
    assert "Traceback" not in "\n".join(running.log)
    with contextlib.closing(sqlite3.connect(str(tmp_path / "data" / "bridge.db"))) as db:
        rows = db.execute("SELECT attempts FROM callbacks ORDER BY rowid").fetchall()
    assert rows == [(1,), (0,)]


def test_a_result_that_was_not_sent_is_sent_after_the_next_start(
    bridge: Start, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "CALLBACK_POLL_SECONDS", 600)
    running = bridge()
    api, _ = token_for(running, [receiver.host])
    request_id = api.ask("hi", callback=receiver.url)
    api.done(request_id)
    running.bridge.__exit__()
    assert receiver.connections == 0
    monkeypatch.setattr(cab, "CALLBACK_POLL_SECONDS", 0.01)
    bridge()
    assert [body["requestId"] for body in delivered(receiver)] == [request_id]


def test_the_log_contains_no_secret_and_no_url(bridge: Start, receiver: Receiver) -> None:
    receiver.answer = b"HTTP/1.1 500 \x1b[31mred token=abc\r\nX: y\r\n\r\n"
    running = bridge()
    api, secret = token_for(running, [receiver.host])
    request_id = api.ask("my question", callback=receiver.url + "&key=hidden")
    wait_until(lambda: any("status 500" in line for line in running.log))
    text = "\n".join(running.log)
    assert request_id[:8] in text
    for hidden in (
        secret, secret[6:], str(api.token), "hidden", "/hook", "my question", request_id, "\x1b",
        "token=abc", receiver.parts()[1]["Webhook-Signature"],
    ):
        assert hidden not in text


# --- the command line ---


@pytest.mark.parametrize(
    "hosts, expected",
    [
        ("all", True),
        ("Bots.example.com,192.168.1.5:8080", ["bots.example.com", "192.168.1.5:8080"]),
    ],
)
def test_a_token_made_on_the_command_line(hosts: str, expected: Any, tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        return run_cli("token", *words, "--data-dir", str(tmp_path / "data"))

    plain = run("create", "plain", "--callbacks", hosts)
    assert plain.returncode == 0, plain.stderr
    # stdout is the token alone; the secret is shown to people.
    assert plain.stdout.startswith("cab-") and plain.stdout.count("\n") == 1
    assert plain.stderr.count("whsec_") == 1
    created = json.loads(run("create", "machine", "--callbacks", hosts, "--json").stdout)
    with contextlib.closing(sqlite3.connect(str(tmp_path / "data" / "bridge.db"))) as db:
        rows = dict(db.execute("SELECT id, callback_secret FROM tokens").fetchall())
    assert rows[created["tokenId"]] == created["callbackSecret"]
    [shown] = [secret for token_id, secret in rows.items() if token_id != created["tokenId"]]
    assert shown in plain.stderr and shown != created["callbackSecret"]
    listed = run("list", "--json").stdout
    assert [token["callbacks"] for token in json.loads(listed)] == [expected] * 2
    assert "whsec_" not in listed


def test_the_command_line_refuses_what_is_no_host(tmp_path: Path) -> None:
    for hosts in ("https://example.com", "a.com,", "*", "a.com,all b"):
        done = run_cli(
            "token", "create", "bot", "--callbacks", hosts, "--data-dir", str(tmp_path / "data")
        )
        assert (done.returncode != 0, done.stdout) == (True, ""), hosts
        assert "callbacks must be" in done.stderr and "Traceback" not in done.stderr
    done = run_cli("token", "create", "bot", "--json", "--data-dir", str(tmp_path / "data"))
    assert "callbackSecret" not in json.loads(done.stdout)


def test_the_program_ends_within_seconds_while_an_attempt_hangs(
    program: Callable[..., Program], receive: Receivers
) -> None:
    receiver = receive(Receiver.hang)
    running = program()
    answer = running.api.post("/api/tokens", {"name": "t", "callbacks": [receiver.host]})
    api = running.api.with_token(answer.json["token"])
    api.ask("hi", callback=receiver.url)
    delivered(receiver)
    assert running.end(signal.SIGTERM, 12) == 0
    assert "Traceback" not in running.stderr and "whsec_" not in running.stderr
