"""A short run of the requests of tests/mutations.py. tests/bench/fuzz.py is the long one."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any, Callable, List, Mapping, Sequence

import pytest

import claude_api_bridge as cab
from conftest import RunningBridge
from mutations import Judge, Mutations, Request, Violation, read_all, read_response

Start = Callable[..., RunningBridge]
# Number of seeds, and of requests for each seed.
CASES = 6
REQUESTS, RAW = 150, 100


@pytest.fixture(scope="module")
def spec() -> Mapping[str, Any]:
    # The document as a client receives it.
    return json.loads(json.dumps(cab.openapi()))


def exchange(port: int, pieces: Sequence[bytes]) -> bytes:
    """Send the pieces, end the sending direction, and return all that the bridge sends.

    The bridge may refuse the request, and close the connection, before all pieces are sent.
    """
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        received: List[bytes] = []
        try:
            for piece in pieces:
                connection.sendall(piece)
            # If the bridge has closed the connection, its response can still be read.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            while not received or received[-1]:
                received.append(connection.recv(1 << 16))
        except (ConnectionResetError, BrokenPipeError):
            pass
        return b"".join(received)


def makers(running: RunningBridge, spec: Mapping[str, Any], seed: int) -> Mutations:
    """Return a generator of requests, with tokens for them. Few requests start `claude`."""
    clients = {
        "admin": running.admin,
        "ordinary": running.admin.new_token("o"),
        "stateful": running.admin.new_token("s", sessionMode="stateful"),
    }
    tokens = {role: str(client.token) for role, client in clients.items()}
    return Mutations(spec, tokens, seed, runs=0.01)


def nothing_unexpected(running: RunningBridge) -> None:
    """Check that the log has no exception, and that the bridge works."""
    assert not [line for line in running.log if "Unexpected" in line or "Traceback" in line]
    assert running.admin.get("/health").status == 200


@pytest.mark.parametrize("seed", range(CASES))
def test_each_malformed_request_gets_a_documented_response(
    bridge: Start, spec: Mapping[str, Any], seed: int
) -> None:
    running = bridge()
    mutations, judge = makers(running, spec, seed), Judge(spec, str(running.admin.token))
    for n in range(REQUESTS):
        request = mutations.request()
        data = exchange(running.port, [request.data])
        try:
            responses = read_all(data, request.method == "HEAD")
            final = [response for response in responses if response.status != 100]
            assert len(final) == 1, "%d responses" % len(final)
            judge.check(request, final[0])
        except (Violation, AssertionError) as error:
            details = (n, error, request.data[:4_000], data[:2_000])
            raise AssertionError("request %d: %s\n%r\n->\n%r" % details) from error
        mutations.learn(request, final[0])
    nothing_unexpected(running)


@pytest.mark.parametrize("seed", range(CASES))
def test_arbitrary_bytes_get_complete_responses_and_cause_no_exception(
    bridge: Start, spec: Mapping[str, Any], seed: int
) -> None:
    running = bridge()
    mutations, judge = makers(running, spec, 1_000 + seed), Judge(spec)
    for n in range(RAW):
        data = mutations.raw()
        cut = mutations.random.randrange(len(data) + 1)
        received = exchange(running.port, [data[:cut], data[cut:]])
        try:
            for response in read_all(received, None if b"HEAD" in data else False):
                judge.check_raw(response)
        except Violation as error:
            details = (n, error, data[:4_000], received[:2_000])
            raise AssertionError("bytes %d: %s\n%r\n->\n%r" % details) from error
    nothing_unexpected(running)


# --- the reader and the judge detect faults ---

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.0 200 OK\r\n\r\n",
        HEAD + b"\r\n",
        HEAD + b"Content-Length: 3\r\n\r\nab",
        HEAD + b"Content-Length: 1\r\n\r\nabc",
        b"<html>",
        HEAD + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n",
        HEAD + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        HEAD + b"X-Injected: 1\r\nContent-Length: 0\r\n\r\n",
        HEAD + b"A:b\r\nContent-Length: 0\r\n\r\n",
        HEAD + b"Content-Length: 0\r\n",
    ],
)
def test_the_strict_reader_refuses_malformed_responses(data: bytes) -> None:
    with pytest.raises(Violation):
        read_all(data, False)


def test_the_strict_reader_reads_well_formed_responses() -> None:
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"
    sized = HEAD + b"Content-Length: 2\r\n\r\n[]"
    responses = read_all(chunked + sized + HEAD + b"Connection: close\r\n\r\n{}", False)
    assert [response.json() for response in responses] == [{}, [], {}]
    assert all(read_response(sized[:n], False, False) is None for n in range(1, len(sized)))
    assert len(read_all(HEAD + b"Content-Length: 9\r\n\r\n", True)) == 1


@pytest.mark.parametrize(
    "method, target, status, body",
    [
        ("GET", "/health", 500, {"error": "x", "code": "internal"}),
        ("GET", "/health", 202, {"status": "ok"}),
        ("GET", "/health", 200, {"status": 7}),
        ("GET", "/health", 200, {}),
        ("GET", "/health", 200, {"status": "ok", "more": 1}),
        ("GET", "/health", 404, {"error": "x"}),
        ("GET", "/health", 404, {"error": "x", "code": "made_up"}),
        ("GET", "/nowhere", 200, {"status": "ok"}),
        ("POST", "/health", 200, {"status": "ok"}),
        ("GET", "/health", 409, {"error": "x", "code": "already_finished"}),
        ("GET", "/api/ask/cab-secret", 404, {"error": "no cab-secret", "code": "not_found"}),
    ],
)
def test_the_judge_detects_undocumented_responses(
    spec: Mapping[str, Any], method: str, target: str, status: int, body: Any
) -> None:
    data = json.dumps(body).encode()
    head = b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\n" % status
    length = b"Content-Length: %d\r\n\r\n" % len(data)
    (response,) = read_all(head + length + data, False)
    request = Request(method, target, [], b"", "none")
    with pytest.raises(Violation):
        Judge(spec, "cab-secret").check(request, response)
