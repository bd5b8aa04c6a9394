"""Callbacks: which addresses may be named, how a result is signed, sent and sent again."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import socket
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest

import claude_api_bridge as cab
from conftest import FakeClock, RunningBridge, wait_until

Start = Callable[..., RunningBridge]
OK = b"HTTP/1.1 204 No Content\r\n\r\n"


# --- addresses ---


@pytest.mark.parametrize(
    "text, expected",
    [
        ("https://example.com", ("example.com", 443, "/", "example.com")),
        ("HTTPS://Example.COM:443/A?b=%20c", ("example.com", 443, "/A?b=%20c", "example.com")),
        ("https://example.com:8443?x=1", ("example.com", 8443, "/?x=1", "example.com:8443")),
        ("http://192.168.1.5:80/", ("192.168.1.5", 80, "/", "192.168.1.5")),
        ("https://[2606:4700:0:0::1]:444", ("2606:4700::1", 444, "/", "[2606:4700::1]:444")),
        ("https://my_service.internal/", ("my_service.internal", 443, "/", "my_service.internal")),
    ],
)  # fmt: skip
def test_a_url_has_a_host_a_port_and_a_target(text: str, expected: Tuple[Any, ...]) -> None:
    url = cab.CallbackUrl.parse(text)
    assert (url.host, url.port, url.target, url.authority) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "example.com", "ftp://example.com/", "https://", "https://a:b@example.com/",
        "https://example.com/#a", "https://example.com./", "https://exam\tple.com/",
        "https://example.com/\r\nX: y", "https://example.com/\n", "https://example.com:0/",
        "https://example.com:65536/", "https://example.com:+80/", "https://example.\u212aom/",
        "https://2130706433/", "https://0x7f000001/", "https://127.1/", "https://1.2.3.4.5/",
        "https://256.1.1.1/", "https://[fe80::1%25eth0]/", "https://[::1/", "https://a..b/",
        "https://%s.com/" % ("a" * 64), "https://example.com/" + "a" * 2000,
    ],
)  # fmt: skip
def test_what_is_no_plain_url_is_refused(text: str) -> None:
    with pytest.raises(cab.InvalidRequest, match="^callback "):
        cab.CallbackUrl.parse(text)


PUBLIC = """1.1.1.1 8.8.8.8 100.63.255.255 100.128.0.0 172.15.0.1 172.32.0.1 192.0.1.1 198.17.0.1
    223.255.255.255 2606:4700::1111 2001:200::1 2a00:1450::1""".split()
PRIVATE = """127.0.0.1 10.0.0.1 172.16.0.1 172.31.255.255 192.168.0.1 100.64.0.1 ::1 fc00::1
    fdff::1""".split()
SPECIAL = """0.0.0.0 0.1.2.3 169.254.1.1 192.0.0.8 192.0.2.1 192.88.99.1 198.18.0.1 198.51.100.1
    203.0.113.1 224.0.0.1 240.0.0.1 255.255.255.255 :: ::10.0.0.1 ::ffff:10.0.0.1 ::ffff:8.8.8.8
    64:ff9b::a00:1 2002:a00:1:: 2001:0:a00:1:: 2001:db8::1 3fff::1 100::1 5f00::1 fe80::1 fec0::1
    ff02::1""".split()


def test_each_kind_of_address_is_the_same_in_all_versions_of_python() -> None:
    def allowed(texts: List[str], allow_private: bool) -> List[str]:
        return [text for text in texts
                if cab.is_allowed_address(ipaddress.ip_address(text), allow_private)]

    assert allowed(PUBLIC, False) == allowed(PUBLIC, True) == PUBLIC
    assert (allowed(PRIVATE, False), allowed(PRIVATE, True)) == ([], PRIVATE)
    assert allowed(SPECIAL, False) == allowed(SPECIAL, True) == []


@pytest.mark.parametrize(
    "url, callbacks, error",
    [
        ("https://example.com/", False, "needs a token"),
        ("https://example.com/", True, ""),
        ("http://example.com/", True, "https://"),
        ("https://10.0.0.1/", True, "private"),
        ("https://[::1]/", True, "private"),
        ("https://example.com/", ("example.com",), ""),
        ("https://example.com:8443/", ("example.com",), ""),
        ("http://10.0.0.1:8080/x", ("10.0.0.1:8080",), ""),
        ("http://10.0.0.1:8081/x", ("10.0.0.1:8080",), "host of the token"),
        ("https://other.example/", ("example.com",), "host of the token"),
    ],
)
def test_a_token_may_name_what_its_rights_say(url: str, callbacks: Any, error: str) -> None:
    if not error:
        assert cab.check_callback(url, callbacks)[1] == (callbacks is not True)
        return
    with pytest.raises(cab.InvalidRequest, match=error) as refused:
        cab.check_callback(url, callbacks)
    assert refused.value.extra["field"] == "callback"


# --- the signature: the vectors of the specification's own libraries ---


@pytest.mark.parametrize(
    "secret, message_id, timestamp, body, signature",
    [
        (
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330,
            b'{"test": 2432232314}', "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        ),
        (
            "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD", "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk", 1649367553,
            b'{"email":"test@example.com","username":"test_user"}',
            "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=",
        ),
    ],
)  # fmt: skip
def test_the_signature_is_that_of_standard_webhooks(
    secret: str, message_id: str, timestamp: int, body: bytes, signature: str
) -> None:
    assert cab.sign_callback(secret, message_id, timestamp, body) == signature


def test_a_secret_has_24_random_bytes() -> None:
    secret = cab.new_callback_secret()
    assert secret.startswith("whsec_") and secret != cab.new_callback_secret()
    assert len(base64.b64decode(secret[6:], validate=True)) == 24


def test_the_delays_grow_and_end() -> None:
    for attempts, delay in enumerate(cab.CALLBACK_DELAYS, 1):
        assert delay <= (cab.callback_delay(attempts) or 0) <= delay * 1.1
    assert cab.callback_delay(8) is None and cab.callback_delay(8, 60) is None
    assert 60 <= (cab.callback_delay(1, 60) or 0) <= 66
    assert 50_400 <= (cab.callback_delay(1, 10**9) or 0) <= 55_440


# --- sending ---


class Receiver:
    """Takes requests on a port, one after the other, and gives each the same answer.

    requests: their heads and bodies.
    """

    def __init__(self, answer: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.answer = answer
        self.requests: List[Tuple[str, bytes]] = []
        self._thread = threading.Thread(target=self._serve, name="receiver", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return "http://127.0.0.1:%d/hook?a=1" % self.port

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, connection.makefile("rb") as file:
                    lines = list(iter(file.readline, b"\r\n"))
                    head = b"".join(lines).decode()
                    length = int(head.lower().partition("content-length: ")[2].split("\r")[0])
                    self.requests.append((head, file.read(length)))
                    connection.sendall(self.answer)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


@pytest.fixture
def receive() -> Iterator[Callable[..., Receiver]]:
    receivers: List[Receiver] = []

    def start(answer: bytes = OK) -> Receiver:
        receivers.append(Receiver(answer))
        return receivers[-1]

    yield start
    for receiver in receivers:
        receiver.close()


def send(receiver: Receiver, allow_private: bool = True) -> Tuple[int, int]:
    url = cab.CallbackUrl.parse(receiver.url)
    return cab.send_callback(url, {"Webhook-Id": "x"}, b"{}", allow_private, 5.0)


@pytest.mark.parametrize(
    "answer, expected",
    [
        (OK, (204, 0)),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", (200, 0)),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 202 Accepted\r\n\r\n", (202, 0)),
        (b"HTTP/1.1 503 Busy\r\nRetry-After: 120\r\n\r\n", (503, 120)),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n", (302, 0)),
        (b"HTTP/1.1 410 Gone\r\n\r\n", (410, 0)),
    ],
)
def test_the_status_of_the_answer_is_read_and_no_redirect_followed(
    receive: Callable[..., Receiver], answer: bytes, expected: Tuple[int, int]
) -> None:
    receiver = receive(answer)
    assert send(receiver) == expected and len(receiver.requests) == 1
    head, body = receiver.requests[0]
    assert head.startswith("POST /hook?a=1 HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % receiver.port)
    assert "Content-Type: application/json\r\n" in head and body == b"{}"


def test_what_is_no_http_is_an_error_and_a_private_address_needs_the_right(
    receive: Callable[..., Receiver],
) -> None:
    with pytest.raises(ConnectionError):
        send(receive(b"SSH-2.0-x\r\n\r\n"))
    receiver = receive()
    with pytest.raises(PermissionError):
        send(receiver, allow_private=False)
    assert receiver.requests == []


# --- the product ---


def callback_token(running: RunningBridge, *hosts: str) -> Tuple[Any, str]:
    """-> (a client of a token that may name these hosts, the secret of its callbacks)."""
    created = running.admin.post("/api/tokens", {"name": "bot", "callbacks": list(hosts)}).json
    return running.admin.with_token(created["token"]), created["callbackSecret"]


def header(head: str, name: str) -> str:
    return head.partition("\r\n%s: " % name)[2].partition("\r\n")[0]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "CALLBACK_POLL_SECONDS", 0.01)


def test_the_result_is_sent_and_signed(
    bridge: Start, receive: Callable[..., Receiver], quick: None
) -> None:
    running, receiver = bridge(), receive()
    client, secret = callback_token(running, "127.0.0.1")
    done = client.done(client.ask("say hi", callback=receiver.url))
    failed = client.done(client.ask("die 1", callback=receiver.url))
    wait_until(lambda: len(receiver.requests) == 2)
    for (head, body), expected in zip(receiver.requests, (done, failed)):
        assert json.loads(body) == expected
        request_id, timestamp = header(head, "Webhook-Id"), header(head, "Webhook-Timestamp")
        assert request_id == expected["requestId"]
        signature = cab.sign_callback(secret, request_id, int(timestamp), body)
        assert header(head, "Webhook-Signature") == signature
        assert secret not in head
    metrics = running.admin.get("/metrics").data.decode()
    assert 'cab_callbacks_total{result="delivered"} 2' in metrics
    wait_until(lambda: stores_of(running).callbacks.due() is None)


def stores_of(running: RunningBridge) -> cab.Stores:
    dispatcher: Any = running.bridge._server.dispatcher
    stores: cab.Stores = dispatcher._service.stores
    return stores


def test_who_may_not_name_a_callback_is_told_so(bridge: Start) -> None:
    running = bridge()
    client, _ = callback_token(running, "example.com")
    for api, url in ((running.admin, "https://example.com/"), (client, "https://example.org/")):
        answer = api.post("/api/ask", {"message": "hi", "callback": url})
        assert answer.status == 400 and answer.json["field"] == "callback"
    assert running.admin.get("/api/requests").json["requests"] == []


# --- sent again ---


class Courier:
    """A sender over a real store, with a clock of its own."""

    def __init__(self, path: Path, clock: FakeClock) -> None:
        self.clock = clock
        self.store = cab.Stores(path, clock)
        self.metrics = cab.Metrics()
        self.sender = cab.CallbackSender(self.store, self.metrics)

    def add(self, url: str) -> cab.Job:
        new = cab.NewToken("bot", callbacks=("127.0.0.1",))
        token = self.store.tokens.add(new, cab.new_token())
        job = self.store.jobs.enqueue(token.id, cab.Ask("hi", callback=url)).job
        assert not self.sender.step()
        assert self.store.jobs.fail(job, "cancelled", "x", cab.JobStatus.UNFINISHED)
        return job

    def counted(self) -> Dict[str, float]:
        values = self.metrics.values()
        return {dict(labels)["result"]: value for (name, labels), value in values.items()
                if name == "cab_callbacks_total"}


@pytest.fixture
def courier(tmp_path: Path, clock: FakeClock) -> Iterator[Callable[[], Courier]]:
    couriers: List[Courier] = []

    def start() -> Courier:
        couriers.append(Courier(tmp_path / "bridge.db", clock))
        return couriers[-1]

    yield start
    for made in couriers:
        made.store.close()


def test_a_failed_attempt_is_repeated_also_after_a_restart_until_it_is_given_up(
    courier: Callable[[], Courier], receive: Callable[..., Receiver]
) -> None:
    receiver = receive(b"HTTP/1.1 500 Oops\r\n\r\n")
    first = courier()
    first.add(receiver.url)
    assert first.sender.step() and not first.sender.step()
    first.store.close()
    second = courier()
    for count, delay in enumerate(cab.CALLBACK_DELAYS, 2):
        second.clock.advance(delay - 1)
        assert not second.sender.step()
        second.clock.advance(delay * 0.1 + 1)
        assert second.sender.step() and len(receiver.requests) == count
    second.clock.advance(10**6)
    assert not second.sender.step() and second.counted() == {"failed": 6, "given_up": 1}
    ids = {header(head, "Webhook-Id") for head, _ in receiver.requests}
    times = {header(head, "Webhook-Timestamp") for head, _ in receiver.requests}
    assert (len(ids), len(times)) == (1, 8)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 410 Gone\r\n\r\n", OK])
def test_some_answers_end_it(
    courier: Callable[[], Courier], receive: Callable[..., Receiver], answer: bytes
) -> None:
    receiver, sender = receive(answer), courier()
    sender.add(receiver.url)
    assert sender.sender.step()
    sender.clock.advance(10**6)
    assert not sender.sender.step() and len(receiver.requests) == 1


def test_nothing_is_sent_for_a_revoked_token(
    courier: Callable[[], Courier], receive: Callable[..., Receiver]
) -> None:
    receiver, sender = receive(), courier()
    sender.store.tokens.delete(sender.add(receiver.url).token_id, protect=False)
    assert not sender.sender.step() and receiver.requests == []


def test_an_address_that_refuses_is_tried_again(courier: Callable[[], Courier]) -> None:
    sender = courier()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: Optional[int] = listener.getsockname()[1]
    sender.add("http://127.0.0.1:%d/" % (port or 0))
    assert sender.sender.step() and sender.counted() == {"failed": 1}
