"""A short run of the mutated requests of tests/mutations.py; tests/bench/fuzz.py is the long one."""
from __future__ import annotations

import contextlib
import json
import socket
from typing import Any, Callable, List, Mapping, Sequence

import pytest

import claude_api_bridge as cab
from conftest import RunningBridge
from mutations import Judge, Mutations, Sent, Wrong, read_all, read_answer

Start = Callable[..., RunningBridge]
CASES = 6                                               # seeds, each with its own requests
REQUESTS, RAW = 150, 100                                # for each seed


@pytest.fixture(scope="module")
def spec() -> Mapping[str, Any]:
    return json.loads(json.dumps(cab.openapi()))        # as it goes over the wire


def exchange(port: int, pieces: Sequence[bytes]) -> bytes:
    """Sends all, ends the sending, and reads to the end. The bridge may have refused it before all was sent."""
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        got: List[bytes] = []
        try:
            for piece in pieces:
                connection.sendall(piece)
            with contextlib.suppress(OSError):                # it may have closed meanwhile: its answer is still to be read
                connection.shutdown(socket.SHUT_WR)
            while not got or got[-1]:
                got.append(connection.recv(1 << 16))
        except (ConnectionResetError, BrokenPipeError):
            pass
        return b"".join(got)


def makers(running: RunningBridge, spec: Mapping[str, Any], seed: int) -> Mutations:
    """With the tokens that its requests carry. None starts `claude`: what it says is the matter of other tests."""
    tokens = {"admin": running.admin, "ordinary": running.admin.new_token("o"), "stateful": running.admin.new_token("s",
        sessionMode="stateful")}
    return Mutations(spec, {who: str(each.token) for who, each in tokens.items()}, seed, runs=0.01)


def nothing_unexpected(running: RunningBridge) -> None:
    assert not [line for line in running.log if "Unexpected" in line or "Traceback" in line]
    assert running.admin.get("/health").status == 200


@pytest.mark.parametrize("seed", range(CASES))
def test_whatever_is_wrong_in_a_request_the_answer_is_a_documented_one(bridge: Start, spec: Mapping[str, Any], seed: int) -> None:
    running = bridge()
    made, judge = makers(running, spec, seed), Judge(spec, str(running.admin.token))
    for n in range(REQUESTS):
        sent = made.request()
        data = exchange(running.port, [sent.data])
        try:
            answers = [each for each in read_all(data, sent.method == "HEAD") if each.status != 100]
            assert len(answers) == 1, "%d answers" % len(answers)
            judge.check(sent, answers[0])
        except (Wrong, AssertionError) as error:
            raise AssertionError("request %d: %s\n%r\n->\n%r" % (n, error, sent.data[:4_000], data[:2_000])) from error
        made.learn(sent, answers[0])
    nothing_unexpected(running)


@pytest.mark.parametrize("seed", range(CASES))
def test_whatever_bytes_come_each_answer_is_whole_and_nothing_fails_inside(bridge: Start, spec: Mapping[str, Any], seed: int) -> None:
    running = bridge()
    made, judge = makers(running, spec, 1_000 + seed), Judge(spec)
    for n in range(RAW):
        data = made.raw()
        cut = made.chance.randrange(len(data) + 1)
        got = exchange(running.port, [data[:cut], data[cut:]])
        try:
            for each in read_all(got, None if b"HEAD" in data else False):
                judge.check_raw(each)
        except Wrong as error:
            raise AssertionError("bytes %d: %s\n%r\n->\n%r" % (n, error, data[:4_000], got[:2_000])) from error
    nothing_unexpected(running)


# --- that the reader and the judge would see it ---

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("data", [
    b"HTTP/1.0 200 OK\r\n\r\n", HEAD + b"\r\n", HEAD + b"Content-Length: 3\r\n\r\nab", HEAD + b"Content-Length: 1\r\n\r\nabc", b"<html>",
    HEAD + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n", HEAD + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    HEAD + b"X-Injected: 1\r\nContent-Length: 0\r\n\r\n", HEAD + b"A:b\r\nContent-Length: 0\r\n\r\n", HEAD + b"Content-Length: 0\r\n"])
def test_the_strict_reader_refuses_what_is_no_answer(data: bytes) -> None:
    with pytest.raises(Wrong):
        read_all(data, False)


def test_the_strict_reader_reads_what_is_one() -> None:
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"
    sized = HEAD + b"Content-Length: 2\r\n\r\n[]"
    answers = read_all(chunked + sized + HEAD + b"Connection: close\r\n\r\n{}", False)
    assert [each.json() for each in answers] == [{}, [], {}]
    assert all(read_answer(sized[:n], False, False) is None for n in range(1, len(sized)))
    assert len(read_all(HEAD + b"Content-Length: 9\r\n\r\n", True)) == 1


@pytest.mark.parametrize("method, target, status, body", [
    ("GET", "/health", 500, {"error": "x", "code": "internal"}), ("GET", "/health", 202, {"status": "ok"}),
    ("GET", "/health", 200, {"status": 7}),
    ("GET", "/health", 200, {}), ("GET", "/health", 200, {"status": "ok", "more": 1}), ("GET", "/health", 404, {"error": "x"}),
    ("GET", "/health", 404, {"error": "x", "code": "made_up"}), ("GET", "/nowhere", 200, {"status": "ok"}),
    ("POST", "/health", 200, {"status": "ok"}),
    ("GET", "/health", 409, {"error": "x", "code": "already_finished"}), ("GET", "/api/ask/cab-secret", 404,
    {"error": "no cab-secret", "code": "not_found"})])
def test_the_judge_sees_what_is_not_documented(spec: Mapping[str, Any], method: str, target: str, status: int, body: Any) -> None:
    data = json.dumps(body).encode()
    head = b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(data))
    with pytest.raises(Wrong):
        Judge(spec, "cab-secret").check(Sent(method, target, [], b"", "none"), read_all(head + data, False)[0])
