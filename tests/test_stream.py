"""Tests of streams over real HTTP: events, their order and offsets, independent readers."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Sequence, Tuple

import pytest

import claude_api_bridge as cab
from conftest import (
    Api,
    Event,
    FakeClaude,
    RunningBridge,
    Stream,
    plain_bridge,
    text_of,
    wait_until,
)
from test_http import CHUNKED, STANDARD, Wire, connection_threads, phases, request, sized

Start = Callable[..., RunningBridge]
UNKNOWN_ID = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def shared_bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBridge]:
    """Run one bridge for all tests that need no other settings."""
    with plain_bridge(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture
def served(shared_bridge: RunningBridge, log: List[str]) -> Iterator[RunningBridge]:
    """Return the shared bridge, which must log no unexpected error during the test."""
    yield shared_bridge
    assert "Traceback" not in "".join(log)


@pytest.fixture
def api(served: RunningBridge) -> Api:
    return served.admin


@pytest.fixture
def quick_rechecks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let streams re-check the store more often; their events stay the same."""
    monkeypatch.setattr(cab, "RECHECK_SECONDS", 0.02)


def script(*steps: Mapping[str, Any]) -> str:
    """Return the prompt at which the fake does these steps."""
    return "script " + json.dumps(steps)


def once(mark: Path, *steps: Dict[str, Any]) -> Dict[str, Any]:
    """Return a step that does these steps the first time only."""
    return {"first": str(mark), "do": list(steps)}


OVERLOADED: Dict[str, Any] = {
    "fail": {"api_error_status": 529, "result": "API Error: 529 Overloaded"}
}


def delta_steps(*texts: str) -> List[Dict[str, Any]]:
    return [{"delta": text} for text in texts]


def half_word(gate: Path) -> str:
    """Return the prompt at which the fake writes half a word, and the rest when the gate opens."""
    return script({"delta": "he"}, {"wait": str(gate)}, {"delta": "ld"})


def kinds(events: Sequence[Event]) -> List[str]:
    """Return the kinds of events; repeated kinds in a row count once."""
    names = [event.kind for event in events]
    return [kind for kind, before in zip(names, [""] + names) if kind != before]


def processing(api: Api, prompt: str) -> str:
    """Return the id of a job that runs and has written some text."""
    job_id = api.ask(prompt)
    wait_until(lambda: api.poll(job_id).get("partial"))
    return job_id


class Skipped(cab.Clock):
    """The real clocks, which a test may advance."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def now(self) -> float:
        return time.time() + self.ahead

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def next_event(stream: Stream) -> Event:
    return next(iter(stream))


def chunks(wire: Wire) -> List[bytes]:
    """Return the pieces of a chunked body, to its end; bytes after it stay unread."""
    pieces: List[bytes] = []
    while True:
        size = int(wire.file.readline(), 16)
        piece = wire.file.read(size)
        assert wire.file.read(2) == b"\r\n"
        if not size:
            return pieces
        pieces.append(piece)


def bearer(api: Api) -> str:
    return "Authorization: Bearer %s" % api.token


def follow_line(job_id: str, method: str = "GET", version: str = "1.1") -> str:
    return "%s /api/ask/%s/events HTTP/%s" % (method, job_id, version)


# --- streamed asks ---


def test_a_streamed_ask_receives_its_steps_and_ends_with_the_poll_body(api: Api) -> None:
    stream = api.stream(
        "POST", "/api/ask", {"message": "say Good morning", "stream": True, "streem": 1}
    )
    queued, started, *deltas, completed = stream.rest()
    job_id = queued.data["requestId"]
    assert queued == Event(
        "queued",
        0,
        {"requestId": job_id, "position": 1, "warnings": ["unknown field 'streem' ignored"]},
    )
    assert started == Event("started", 0, {"requestId": job_id, "model": "resolved-default-model"})
    assert {event.kind for event in deltas} == {"delta"} and stream.text == "Good morning"
    assert completed == Event("completed", 12, api.poll(job_id))
    assert completed.data["response"] == "Good morning"


def test_a_stream_is_chunked_event_by_event_and_the_connection_stays_open(api: Api) -> None:
    body = b'{"message": "say hi", "stream": true}'
    with Wire(api.port) as wire:
        head = wire.send(sized(api, "/api/ask", body), request()).answer(has_body=False)
        pieces = chunks(wire)
        # the second request on the same connection
        assert wire.answer().json == {"status": "ok"}
    assert (head.status, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert (head.headers["transfer-encoding"], head.headers["connection"]) == (
        "chunked", "keep-alive",
    )
    assert {
        **head.headers, **STANDARD, "cache-control": "no-store, no-transform",
        "x-accel-buffering": "no",
    } == head.headers
    assert "content-length" not in head.headers
    job_id = json.loads(pieces[0].splitlines()[2][6:])["requestId"].encode()
    assert pieces[0] == b'id: 0\nevent: queued\ndata: {"requestId":"%b","position":1}\n\n' % job_id
    started = (
        b'id: 0\nevent: started\ndata: {"requestId":"%b","model":"resolved-default-model"}\n\n'
    )
    assert pieces[1] == started % job_id
    assert b"".join(pieces[2:-1]) in (
        b'id: 2\nevent: delta\ndata: {"text":"hi"}\n\n',
        b'id: 1\nevent: delta\ndata: {"text":"h"}\n\nid: 2\nevent: delta\ndata: {"text":"i"}\n\n',
    )
    assert pieces[-1].startswith(
        b'id: 2\nevent: completed\ndata: {"status":"completed","requestId":"%b","response":"hi",'
        % job_id
    )
    assert all(piece.endswith(b"}\n\n") and piece.count(b"\n\n") == 1 for piece in pieces)


@pytest.mark.parametrize(
    "version, headers",
    [("1.0", ()), ("1.1", ("Connection: close",)), ("1.0", ("Connection: keep-alive",))],
)
def test_without_chunked_encoding_a_stream_ends_with_the_connection(
    api: Api, version: str, headers: Tuple[str, ...]
) -> None:
    job_id = api.ask("say hi")
    api.done(job_id)
    with Wire(api.port) as wire:
        head = wire.send(
            request(follow_line(job_id, version=version), bearer(api), *headers)
        ).answer(has_body=False)
        data = wire.rest()
    assert (head.status, head.headers["connection"], head.headers["content-type"]) == (
        200, "close", "text/event-stream; charset=utf-8",
    )
    assert not {"transfer-encoding", "content-length"} & set(head.headers)
    *events, rest = data.split(b"\n\n")
    assert [event.split(b"\n")[1] for event in events] == [
        b"event: started", b"event: delta", b"event: completed",
    ]
    assert rest == b""


def test_head_answers_with_the_headers_of_the_stream_only(api: Api, gate: Path) -> None:
    # It would not end before the gate opens.
    job_id = processing(api, half_word(gate))
    with Wire(api.port) as wire:
        head = wire.send(request(follow_line(job_id, "HEAD"), bearer(api))).answer(has_body=False)
        assert (head.status, head.headers["content-type"]) == (
            200, "text/event-stream; charset=utf-8",
        )
        assert wire.send(request()).answer().json == {"status": "ok"}


def test_a_stream_that_cannot_start_is_an_ordinary_refusal(api: Api) -> None:
    refused = (
        api.post("/api/ask", {"message": "", "stream": True}),
        api.post("/api/ask", {"message": "hi", "stream": "yes"}),
        api.get("/api/ask/%s/events" % UNKNOWN_ID),
        api.with_token(None).get("/api/ask/%s/events" % UNKNOWN_ID),
    )
    assert [(answer.status, answer.headers["content-type"]) for answer in refused] == [
        (status, "application/json; charset=utf-8") for status in (400, 400, 404, 401)
    ]
    assert refused[1].json["field"] == "stream"


def test_a_caller_that_disconnects_cancels_nothing(
    api: Api, gate: Path, quick_rechecks: None
) -> None:
    stream = api.stream("POST", "/api/ask", {"message": half_word(gate), "stream": True})
    job_id = next_event(stream).data["requestId"]
    stream.until("delta")
    stream.close()
    # The bridge noticed it in the middle of a silent run.
    wait_until(lambda: not connection_threads())
    gate.touch()
    assert api.done(job_id)["response"] == "held"


def test_a_stream_costs_one_request_however_long_it_is(bridge: Start, clock: cab.Clock) -> None:
    api = bridge(rate_limit=5, spare=0, clock=clock).admin
    stream = api.stream("POST", "/api/ask", {"message": "big 64", "stream": True})
    job_id = next_event(stream).data["requestId"]
    assert (len(stream.rest()) > 3, stream.headers["ratelimit-remaining"]) == (True, "4")
    with contextlib.closing(api.follow(job_id)) as again:
        assert again.headers["ratelimit-remaining"] == "3"


# --- offsets ---


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_job_can_be_followed_before_during_and_after_its_run(
    api: Api, gate: Path, tmp_path: Path, method: str
) -> None:
    api.ask(half_word(gate))
    job_id = api.ask(script({"delta": "one, "}, {"wait": str(tmp_path / "next")}, {"delta": "two"}))
    before = api.follow(job_id, method=method)
    assert next_event(before) == Event("queued", 0, {"requestId": job_id, "position": 2})
    gate.touch()
    assert before.until("delta") == Event("delta", 5, {"text": "one, "})
    during, late = api.follow(job_id, method=method), api.follow(job_id, 5, method)
    assert [next_event(during), next_event(during)] == [
        Event("started", 0, {"requestId": job_id, "model": "resolved-default-model"}),
        Event("delta", 5, {"text": "one, "}),
    ]
    (tmp_path / "next").touch()
    assert before.rest()[-1] == during.rest()[-1] == Event("completed", 8, api.poll(job_id))
    assert late.rest() == [
        Event("delta", 8, {"text": "two"}),
        Event("completed", 8, api.poll(job_id)),
    ]
    after = api.follow(job_id, method=method)
    assert after.rest() == [
        during.events[0], Event("delta", 8, {"text": "one, two"}), during.events[-1],
    ]
    assert before.text == during.text == after.text == "one, two"


# an emoji, a combining accent, a family joined of five code points
TEXT = "a\U0001f600e\u0301\u4e2d\U0001f468\u200d\U0001f469\u200d\U0001f467z"


def test_an_offset_counts_code_points_and_the_rest_is_exact(api: Api, gate: Path) -> None:
    job_id = api.ask(script(*delta_steps(TEXT[:3], TEXT[3:6], TEXT[6:]), {"wait": str(gate)}))
    wait_until(lambda: api.poll(job_id).get("partial") == TEXT)
    for after in range(1, len(TEXT)):
        with contextlib.closing(api.follow(job_id, after)) as stream:
            assert next_event(stream) == Event("delta", len(TEXT), {"text": TEXT[after:]})
    gate.touch()
    completed = Event("completed", len(TEXT), api.done(job_id))
    assert api.follow(job_id, 0).rest()[1:] == [
        Event("delta", len(TEXT), {"text": TEXT}), completed,
    ]
    for after in range(1, len(TEXT)):
        assert api.follow(job_id, after).rest() == [
            Event("delta", len(TEXT), {"text": TEXT[after:]}), completed,
        ]
    assert api.follow(job_id, len(TEXT)).rest() == [completed]


def test_an_offset_past_the_end_gets_the_end_only(api: Api, gate: Path) -> None:
    job_id = processing(api, half_word(gate))
    during = api.follow(job_id, 999)
    gate.touch()
    api.done(job_id)
    for stream in (during, api.follow(job_id, 999), api.follow(job_id, 999_999_999)):
        assert [event.kind for event in stream.rest()] == ["completed"]
        assert stream.events[0].data["response"] == "held"


def test_an_offset_in_a_text_that_has_not_started_is_ignored(api: Api, gate: Path) -> None:
    api.ask(half_word(gate))
    stream = api.follow(api.ask("say hello"), 3)
    assert next_event(stream).kind == "queued"
    gate.touch()
    assert text_of(stream.rest(), "hel") == "hello"


def test_last_event_id_resumes_too_and_takes_precedence_over_the_query(api: Api) -> None:
    job_id = api.ask("say 0123456789")
    api.done(job_id)
    texts = [
        api.stream(
            "GET", "/api/ask/%s/events%s" % (job_id, query), headers={"Last-Event-ID": header}
        )
        .rest()[0]
        .data["text"]
        for query, header in (("", "4"), ("?after=2", "7"), ("?after=2", "04"), ("?after=2", ""))
    ]
    assert texts == ["456789", "789", "456789", "23456789"]


@pytest.mark.parametrize(
    "after", ["-1", "1.5", "x", "", "%20", "1e3", "0x1", "1_0", "%D9%A3", "1000000000", "9" * 400]
)
def test_an_invalid_offset_is_refused_before_any_event(api: Api, after: str) -> None:
    # The refusal does not reveal whether the request exists.
    job_id = UNKNOWN_ID
    for answer in (
        api.get("/api/ask/%s/events?after=%s" % (job_id, after)),
        api.post("/api/ask/%s/events?after=%s" % (job_id, after)),
    ):
        assert (answer.status, answer.json["code"], answer.json["field"]) == (
            400, "invalid_request", "after",
        )


def test_an_invalid_last_event_id_is_refused(api: Api) -> None:
    answer = api.get("/api/ask/%s/events" % UNKNOWN_ID, headers={"Last-Event-ID": "abc"})
    assert (answer.status, answer.json["field"]) == (400, "after")


def test_only_the_owner_and_admins_may_follow_and_others_learn_nothing(api: Api) -> None:
    owner, other = api.new_token("owner"), api.new_token("other")
    job_id = owner.ask("say mine")
    owner.done(job_id)
    assert [client.follow(job_id).rest()[-1].data["response"] for client in (owner, api)] == [
        "mine", "mine",
    ]
    unknown = other.get("/api/ask/%s/events" % UNKNOWN_ID)
    assert (unknown.status, unknown.json) == (
        404, {"error": "Request not found", "code": "not_found"},
    )
    for answer in (
        other.get("/api/ask/%s/events" % job_id),
        other.post("/api/ask/%s/events?after=2" % job_id),
    ):
        assert (answer.status, answer.data) == (404, unknown.data)


def test_a_queued_job_reports_every_change_of_its_position(
    api: Api, gate: Path, quick_rechecks: None
) -> None:
    running = processing(api, half_word(gate))
    second = api.ask("say 2")
    third = api.ask("say 3")
    last = api.ask("say last")
    stream = api.follow(last)
    assert next_event(stream) == Event("queued", 0, {"requestId": last, "position": 4})
    for cancelled, position in ((second, 3), (third, 2), (running, 1)):
        assert api.delete("/api/ask/" + cancelled).status == 200
        event = next_event(stream)
        assert event.kind == "started" or event == Event(
            "queued", 0, {"requestId": last, "position": position}
        )
    stream.rest()
    assert stream.text == "last"
    assert [event.data["position"] for event in stream.events if event.kind == "queued"][:3] == [
        4, 3, 2,
    ]


# --- outcomes of a run ---


def test_a_failed_job_ends_with_error_and_the_poll_body(api: Api, gate: Path) -> None:
    message = script(
        {"delta": "dying"}, {"wait": str(gate)}, {"fail": {"result": "the words of claude"}}
    )
    stream = api.stream("POST", "/api/ask", {"message": message, "stream": True})
    job_id = next_event(stream).data["requestId"]
    # The text of a failed run is not stored, so later readers do not get it.
    stream.until("delta")
    gate.touch()
    assert kinds(stream.rest()) == ["queued", "started", "delta", "error"]
    assert stream.text == "dying"
    body = api.poll(job_id)
    assert stream.events[-1] == Event("error", 5, body) and body["errorCode"] == "cli_error"
    assert api.follow(job_id).rest() == [Event("error", 0, body)]


def test_a_cancelled_job_ends_its_streams_at_once(
    api: Api, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "RECHECK_SECONDS", 30.0)
    running, waiting = processing(api, half_word(gate)), api.ask("say never")
    streams = [api.follow(running), api.follow(waiting)]
    streams[0].until("delta")
    streams[1].until("queued")
    began = time.monotonic()
    for job_id, stream, offset in ((waiting, streams[1], 0), (running, streams[0], 2)):
        api.delete("/api/ask/" + job_id)
        assert stream.rest()[-1] == Event("error", offset, api.poll(job_id))
        assert stream.events[-1].data["errorCode"] == "cancelled"
    # A notification ended them, not the next re-check.
    assert time.monotonic() - began < 20


def test_text_before_a_tool_call_is_not_part_of_the_answer(api: Api, gate: Path) -> None:
    job_id = api.ask(
        script(
            {"delta": "Let me look."}, {"wait": str(gate)}, {"message": True}, {"delta": "It is "},
            {"delta": "Tuesday."},
        )
    )
    stream = api.follow(job_id)
    assert stream.until("delta") == Event("delta", 12, {"text": "Let me look."})
    gate.touch()
    stream.rest()
    assert kinds([event for event in stream.events if event.kind != "queued"]) == [
        "started", "delta", "started", "delta", "completed",
    ]
    assert stream.text == api.poll(job_id)["response"] == "It is Tuesday."
    # This is an offset in the text that was discarded.
    late = api.follow(job_id, 12)
    assert kinds(late.rest()) == ["started", "delta", "completed"] and late.text == "It is Tuesday."


@pytest.mark.parametrize(
    "pieces, text, generation",
    [
        (("The stream was ",), "The stream was cut.", 0),
        ((), "All at once", 0),
        (("wrong ", "words"), "right words", 1),
        (("longer than",), "longer", 1),
        (("said in vain",), "", 1),
    ],
)
def test_the_final_text_overrides_the_streamed_text(
    api: Api, gate: Path, pieces: Tuple[str, ...], text: str, generation: int
) -> None:
    stream = api.stream(
        "POST",
        "/api/ask",
        {
            "message": script(*delta_steps(*pieces), {"wait": str(gate)}, {"result": text}),
            "stream": True,
        },
    )
    while stream.text != "".join(pieces):
        next_event(stream)
    gate.touch()
    completed = stream.rest()[-1]
    assert stream.text == completed.data["response"] == text and completed.id == len(text)
    again = api.follow(completed.data["requestId"], 1)
    again.rest()
    assert text_of(again.events, text[:1]) == text
    assert [event.kind for event in stream.events].count("started") == 1 + generation


@pytest.mark.parametrize(
    "pieces, text",
    [
        (("\ud83d", "\ude00!"), "\U0001f600!"),
        (("a\ud83d", "b"), "a\ufffdb"),
        (("a\ud83d",), "a\ufffd"),
        (("\ude00", "\ud83d"), "\ufffd\ufffd"),
        (("\ud83d", "", "\ud83d", "\ude00"), "\ufffd\U0001f600"),
    ],
)
def test_half_characters_wait_for_their_other_half_or_are_replaced(
    api: Api, gate: Path, pieces: Tuple[str, ...], text: str
) -> None:
    steps = delta_steps(pieces[0], "", *pieces[1:])
    stream = api.stream(
        "POST",
        "/api/ask",
        {"message": script(*steps[:2], {"wait": str(gate)}, *steps[2:]), "stream": True},
    )
    stream.until("started")
    gate.touch()
    stream.rest()
    assert stream.text == stream.events[-1].data["response"] == text
    # The streamed text was right from the beginning.
    assert [event.kind for event in stream.events].count("started") == 1


def test_line_ends_of_any_kind_stay_inside_their_event(api: Api) -> None:
    text = "a\u2028b\u2029c\x85d\re\nf\r\ng\x0bh\x0ci\x00j\ufeffk: \nid: 7\n\nevent: completed\n\n"
    job_id = api.ask(script(*delta_steps(text)))
    api.done(job_id)
    with Wire(api.port) as wire:
        wire.send(request(follow_line(job_id), bearer(api))).answer(has_body=False)
        data = b"".join(chunks(wire)).decode()
    # Split at every line end that some client may recognize.
    lines = data.splitlines()
    assert data.split("\n")[:-1] == lines and len(lines) == 12
    assert [json.loads(line[6:]).get("text") for line in lines if line.startswith("data: ")] == [
        None, text, None,
    ]
    assert {line.partition(": ")[0] for line in lines} == {"id", "event", "data", ""}


def test_a_long_text_comes_in_pieces(api: Api) -> None:
    job_id = api.ask("big 600")
    text = "\xe9" * 307_200
    live, middle = api.follow(job_id), None
    for stream in (live, api.follow(job_id)):
        stream.rest()
        assert stream.text == stream.events[-1].data["response"] == text
        lengths = [len(event.data["text"]) for event in stream.events if event.kind == "delta"]
        assert max(lengths) == cab.DELTA_CHARACTERS
        middle = stream.events[8]
    assert middle and text_of(api.follow(job_id, middle.id).rest(), text[: middle.id]) == text


# --- many readers ---

ALPHABET = [
    "a", "b", " ", "\n", "\xe9", "e\u0301", "\u4e2d", "\U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2028", "\U0001f1e9\U0001f1ea", "\u0928\u093f",
    "\x00", "\\", '"', "\ud7ff", "\ue000", "\uffff", "\U0010ffff",
]


def random_steps(chance: random.Random) -> List[Dict[str, Any]]:
    """Return a text in pieces cut anywhere, even inside a character.

    Some restart, some are cut short.
    """
    text = "".join(chance.choice(ALPHABET) for _ in range(chance.randrange(60)))
    units = text.encode("utf-16-le")
    cuts = sorted(chance.randrange(len(units) // 2 + 1) * 2 for _ in range(chance.randrange(12)))
    pieces = [
        units[start:end].decode("utf-16-le", "surrogatepass")
        for start, end in zip([0] + cuts, cuts + [len(units)])
    ]
    steps = delta_steps(*pieces)
    if chance.random() < 0.2:
        steps[:0] = [*delta_steps(*chance.sample(ALPHABET, 3)), {"message": True}]
    if chance.random() < 0.3:
        steps.append(
            {
                "result": text + chance.choice(["", "", "tail"])
                if chance.random() < 0.7
                else "another"
            }
        )
    return steps


def expected(steps: List[Dict[str, Any]]) -> str:
    """Return the answer of a script: its result, otherwise the text since the last message."""
    text = ""
    for step in steps:
        if "result" in step:
            text = step["result"]
        elif "message" in step:
            text = ""
        else:
            text += step["delta"]
    return cab.replace_surrogates(text)


def read_with_breaks(api: Api, job_id: str, chance: random.Random) -> Tuple[str, str]:
    """Read with interruptions, resuming at offsets received before. -> (the text, the response)."""
    text, offsets = "", [0]
    while True:
        offset = chance.choice(offsets)
        text, offsets = text[:offset], [earlier for earlier in offsets if earlier <= offset]
        stream = api.follow(job_id, offset, chance.choice(["GET", "POST"]))
        left = chance.choice([1, 2, 4, 8, 1000])
        for event in stream:
            if event.kind in ("queued", "started"):
                offsets = [0]
            offsets.append(event.id)
            text = text_of([event], text)
            left -= 1
            if event.kind == "completed":
                stream.close()
                return text, event.data["response"]
            if not left:
                break
        stream.close()


def test_readers_that_disconnect_and_resume_receive_the_whole_text(
    bridge: Start, fake_claude: Callable[..., FakeClaude], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "DELTA_CHARACTERS", 7)
    chance, claude = random.Random(5), fake_claude()
    # One process answers all of them, because its conversation stays warm.
    api = bridge(claude, spare=0).admin.new_token(sessionMode="stateful")
    scripts = [random_steps(chance) for _ in range(100)]
    with ThreadPoolExecutor(4) as readers:
        for start in range(0, 100, 50):
            ids = [api.ask(script(*steps)) for steps in scripts[start : start + 50]]
            results = readers.map(
                lambda job_id: read_with_breaks(api, job_id, random.Random(job_id)), ids
            )
            for steps, (text, response) in zip(scripts[start:], results):
                assert text == response == expected(steps), steps
    assert len(claude.children()) == 1


def test_many_readers_of_one_job_get_the_same(api: Api, gate: Path) -> None:
    words = ["%d\U0001f600 " % number for number in range(500)]
    job_id = api.ask(script({"delta": "first "}, {"wait": str(gate)}, *delta_steps(*words)))
    streams = [api.follow(job_id) for _ in range(30)]
    for stream in streams:
        # All readers are connected, in the middle of the run.
        stream.until("delta")
    with ThreadPoolExecutor(30) as readers:
        futures = [readers.submit(stream.rest) for stream in streams]
        gate.touch()
        assert {repr(future.result(60)[-1]) for future in futures} == {
            repr(Event("completed", len(streams[0].text), api.poll(job_id)))
        }
    assert {stream.text for stream in streams} == {"first " + "".join(words)}


class Deaf(Wire):
    """A reader with a small buffer that reads only on request."""

    def __init__(self, port: int, buffer: int = 4_096) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", port))
        self.file = self.socket.makefile("rb")


def test_slow_and_vanished_readers_do_not_affect_others(api: Api, gate: Path) -> None:
    first, large = processing(api, half_word(gate)), api.ask("flood 4")
    with Deaf(api.port) as slow, Deaf(api.port) as vanished:
        for reader in (slow, vanished):
            reader.send(request(follow_line(large), bearer(api)))
        good = api.follow(large)
        good.until("queued")
        vanished.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gate.touch()
        good.until("delta")
        # The connection is reset in the middle.
        vanished.__exit__()
        assert good.rest()[-1].data["response"] == good.text == "x" * (4 << 20)
        assert [api.poll(job_id)["status"] for job_id in (first, large)] == ["completed"] * 2
        assert api.answer("say next")["response"] == "next"
        slow.answer(has_body=False)
        # The slow reader lost nothing.
        data = b"".join(chunks(slow))
    assert data.count(b"x") > 8 << 20 and data.count(b"event: completed") == 1
    wait_until(lambda: not connection_threads())


def test_a_slow_reader_receives_the_backlog_in_few_pieces(
    api: Api, gate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = cab.ConnectionHandler.setup
    monkeypatch.setattr(
        cab.ConnectionHandler,
        "setup",
        lambda handler: (
            handler.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 11),
            setup(handler),
        ),
    )
    # more than the buffers between them hold
    words, begin = ["word-%d %s " % (n, "x" * 60) for n in range(300)], tmp_path / "begin"
    job_id = api.ask(
        script({"wait": str(begin)}, *delta_steps(*words), {"wait": str(gate)}, {"delta": "end"})
    )
    text = "".join(words)
    with Deaf(api.port, 1) as slow, contextlib.closing(api.follow(job_id)) as other:
        slow.send(request(follow_line(job_id), bearer(api)))
        # No more arrives for now.
        assert b"200" in slow.file.readline()
        other.until("started")
        begin.touch()
        # A reader that reads receives all of it.
        assert any(event.id == len(text) for event in other)
        received = b""
        while b"\nid: %d\nevent: delta\n" % len(text) not in received:
            # The run has not ended: this comes from its live text.
            received += slow.file.readline()
        assert received.count(b"event: delta") < len(words) / 2
        gate.touch()
        received += b"".join(iter(slow.file.readline, b"0\r\n"))
    deltas = [
        json.loads(line[6:])["text"]
        for line in received.splitlines()
        if line.startswith(b'data: {"text"')
    ]
    assert "".join(deltas) == text + "end" == api.poll(job_id)["response"]


def test_a_slow_reader_may_take_its_time_for_every_part_of_a_large_answer(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last event alone takes longer.
    monkeypatch.setitem(cab.Phase.SECONDS, cab.Phase.SEND, 0.25)
    setup = cab.ConnectionHandler.setup
    monkeypatch.setattr(
        cab.ConnectionHandler,
        "setup",
        lambda handler: (
            handler.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16),
            setup(handler),
        ),
    )
    job_id = api.ask("flood 2")
    api.done(job_id)
    data, pace = b"", threading.Event()
    with Deaf(api.port, 1 << 16) as wire:
        wire.send(request(follow_line(job_id), bearer(api)))
        while not data.endswith(b"0\r\n\r\n"):
            pace.wait(0.01)
            part = wire.socket.recv(1 << 16)
            assert part, "cut after %d bytes" % len(data)
            data += part
    assert data.count(b"x") > 4 << 20


# --- heartbeats and the end of a stream ---


def test_a_silent_stream_sends_heartbeats(
    api: Api, gate: Path, quick_rechecks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "HEARTBEAT_SECONDS", 0.05)
    running, waiting = processing(api, half_word(gate)), api.ask("say hi")
    for job_id, last in ((running, b"delta"), (waiting, b"queued")):
        with Wire(api.port) as wire:
            wire.send(request(follow_line(job_id), bearer(api))).answer(has_body=False)
            lines = iter(wire.file.readline, b"")
            assert next(line for line in lines if line == b"event: %b\n" % last)
            assert [next(lines) for _ in range(9)][-6:] == [
                b"e\r\n", b": still here\n", b"\n", b"\r\n", b"e\r\n", b": still here\n",
            ]


def test_a_stream_sends_one_heartbeat_after_every_silence(
    bridge: Start, gate: Path, quick_rechecks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Skipped()
    api = bridge(spare=0, clock=clock).admin
    stream = api.follow(processing(api, half_word(gate)))
    stream.until("delta")
    checks: List[int] = []
    check = cab.Service.check_token

    def count_check(*args: Any) -> None:
        checks.append(1)
        check(*args)

    monkeypatch.setattr(cab.Service, "check_token", count_check)
    for seconds in (0, 14, 16, 32):
        clock.ahead = seconds
        before = len(checks)
        wait_until(lambda: len(checks) > before + 5)
    gate.touch()
    assert [event.kind for event in stream.rest()] == [
        "started", "delta", "comment", "comment", "delta", "completed",
    ]


@pytest.mark.parametrize("method, sent", [("GET", b""), ("POST", b""), ("POST", b"{}")])
def test_a_reader_that_disconnects_during_a_silent_run_leaves_no_thread(
    served: RunningBridge, gate: Path, quick_rechecks: None, method: str, sent: bytes
) -> None:
    api = served.admin
    job_id = processing(api, half_word(gate))
    with Wire(api.port) as wire:
        wire.send(
            request(follow_line(job_id, method), bearer(api), "Content-Length: %d" % len(sent))
        )
        wait_until(lambda: head_was_read(served))
        # a body that is not needed
        wire.send(sent)
        wire.answer(has_body=False)
        assert next(line for line in iter(wire.file.readline, b"") if line == b"event: delta\n")
        assert connection_threads()
    wait_until(lambda: not connection_threads())
    assert api.poll(job_id)["status"] == "processing"


def head_was_read(served: RunningBridge) -> bool:
    """Return whether a request has arrived on the only connection."""
    return any(phase not in (cab.Phase.IDLE, cab.Phase.HEAD) for phase in phases(served))


def test_an_unread_body_does_not_cut_the_end_of_a_stream(served: RunningBridge) -> None:
    api = served.admin
    job_id = api.ask("big 600")
    api.done(job_id)
    # The body arrives long before the stream ends.
    with Deaf(api.port) as wire:
        wire.send(request(follow_line(job_id, "POST"), bearer(api), CHUNKED))
        wait_until(lambda: head_was_read(served))
        head = wire.send(b"2\r\n{}\r\n0\r\n\r\n").answer(has_body=False)
        data = b"".join(chunks(wire)) if "transfer-encoding" in head.headers else wire.rest()
    assert data.count("\xe9".encode()) == 2 * 307_200 and b"event: completed" in data


def test_a_client_that_only_closed_its_sending_side_receives_the_stream(api: Api) -> None:
    job_id = api.ask("say hi")
    api.done(job_id)
    with Wire(api.port) as wire:
        wire.send(request(follow_line(job_id), bearer(api))).socket.shutdown(socket.SHUT_WR)
        wire.answer(has_body=False)
        assert b'"response":"hi"' in wire.rest()


def test_a_revoked_token_ends_its_streams_with_an_error(
    api: Api, gate: Path, quick_rechecks: None
) -> None:
    admin, user = api.new_token("other admin", admin=True), api.new_token("user")
    others, own = processing(api, half_word(gate)), user.ask("say never")
    streams = [user.follow(own), admin.follow(own), admin.follow(others)]
    for stream, kind in zip(streams, ("queued", "queued", "delta")):
        stream.until(kind)
    ids = {token["name"]: token["id"] for token in api.get("/api/tokens").json["tokens"]}
    assert api.delete("/api/tokens/" + ids["user"]).status == 200
    gone = {"requestId": own, "error": "Request not found", "code": "not_found"}
    ends = [stream.rest()[-1] for stream in streams[:2]]
    assert [end.kind for end in ends] == ["error"] * 2 and ends[1].data == gone
    # The second form occurs if the token ends during a look-up.
    assert ends[0].data in (
        {**gone, "error": "Invalid or expired token", "code": "invalid_token"},
        gone,
    )
    api.delete("/api/tokens/" + ids["other admin"])
    end = streams[2].rest()[-1]
    assert (end.kind, end.data["code"], end.data["requestId"]) == ("error", "invalid_token", others)
    gate.touch()
    assert api.done(others)["response"] == "held"


def test_the_end_of_the_bridge_ends_streams_cleanly_and_quickly(
    bridge: Start, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "FINISH_SECONDS", 0.05)
    monkeypatch.setattr(cab, "SHUTDOWN_GRACE_SECONDS", 0.1)
    running = bridge(spare=0)
    api = running.admin
    active, waiting = processing(api, half_word(gate)), api.ask("say hi")
    stream = api.follow(waiting)
    stream.until("queued")
    with Wire(running.port) as wire:
        wire.send(request(follow_line(active), bearer(api))).answer(has_body=False)
        began = time.monotonic()
        running.bridge.__exit__(None, None, None)
        # It did not wait for a heartbeat.
        assert time.monotonic() - began < 10
        assert b"event: delta" in b"".join(chunks(wire)) and wire.rest() == b""
    assert set(kinds(stream.rest())) == {"queued"}


# --- after a restart ---


def restarted(bridge: Start, running: RunningBridge) -> Api:
    """Return the admin's client of a new bridge on the same data."""
    running.bridge.__exit__(None, None, None)
    return Api(bridge(spare=0).port, running.admin.token)


def test_after_a_restart_a_reader_resumes_a_finished_text_at_its_offset(bridge: Start) -> None:
    running = bridge(spare=0)
    job_id = running.admin.ask(script(*delta_steps(*TEXT)))
    first = running.admin.follow(job_id)
    completed = first.rest()[-1]
    api = restarted(bridge, running)
    for after in range(1, len(TEXT) + 1):
        stream = api.follow(job_id, after)
        assert stream.rest() == [
            *([Event("delta", len(TEXT), {"text": TEXT[after:]})] if after < len(TEXT) else []),
            completed,
        ]
    assert kinds(api.follow(job_id).rest()) == ["started", "delta", "completed"]


def test_a_text_interrupted_by_a_restart_starts_over(
    bridge: Start, gate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "FINISH_SECONDS", 0.05)
    monkeypatch.setattr(cab, "SHUTDOWN_GRACE_SECONDS", 0.1)
    running = bridge(spare=0)
    first = once(
        tmp_path / "once", {"delta": "What it said at "}, {"message": True}, {"delta": "first"},
        {"wait": str(gate)},
    )
    job_id = running.admin.ask(
        script(first, {"delta": "At last "}, {"wait": str(tmp_path / "more")}, {"delta": "this"})
    )
    stream = running.admin.follow(job_id)
    while not (stream.events and stream.events[-1].data.get("text") == "first"):
        next_event(stream)
    api = restarted(bridge, running)
    assert stream.rest()[-1].kind in ("delta", "queued")
    readers = [api.follow(job_id, after) for after in (5, 3, 0)]
    for reader in readers:
        assert reader.until("started").id == 0
        assert reader.until("delta") == Event("delta", 8, {"text": "At last "})
    (tmp_path / "more").touch()
    assert [
        text_of(reader.rest(), "first"[:after]) for reader, after in zip(readers, (5, 3, 0))
    ] == ["At last this"] * 3
    assert api.poll(job_id)["response"] == "At last this"


def test_a_text_starts_over_when_the_worker_retries_after_an_error(
    bridge: Start, gate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete: Callable[..., bool] = cab.JobStore.complete
    failures: List[int] = []

    def fail_once(*args: Any) -> bool:
        if not failures:
            failures.append(1)
            raise ValueError("unexpected")
        return complete(*args)

    # Otherwise a re-check may fall into the moment in which the job is queued.
    monkeypatch.setattr(cab, "RECHECK_SECONDS", 5.0)
    monkeypatch.setattr(cab.JobStore, "complete", fail_once)
    api = bridge(spare=0).admin
    first = once(
        tmp_path / "once", {"delta": "I look"}, {"wait": str(gate)}, {"message": True},
        {"delta": "first"}, {"wait": str(tmp_path / "more")}, {"result": "first"},
    )
    stream = api.follow(api.ask(script(first, {"delta": "and another"})))
    assert stream.until("delta").data == {"text": "I look"}
    gate.touch()
    # The text is there all the time.
    assert stream.until("delta").data == {"text": "first"}
    (tmp_path / "more").touch()
    assert stream.rest()[-1].data["response"] == "and another"
    assert stream.text == "and another"


# --- pauses and overloads ---


def refused_once(resets_at: float, mark: Path) -> Dict[str, Any]:
    """Return a step at which the first run is refused because the plan is used up."""
    return once(
        mark,
        {"delta": "half an "},
        {
            "limits": {
                "status": "rejected", "rateLimitType": "five_hour", "resetsAt": resets_at,
                "utilization": 1,
            }
        },
        {
            "fail": {
                "said": "rate_limit",
                "api_error_status": 429,
                "result": "You've hit your limit",
            }
        },
    )


def test_streams_report_a_pause_of_the_plan_and_the_text_after_it(
    bridge: Start, tmp_path: Path
) -> None:
    clock = Skipped()
    api = bridge(spare=0, clock=clock).admin
    resets_at = int(clock.now()) + 100
    message = script(refused_once(resets_at, tmp_path / "mark"), *delta_steps("an ", "answer"))
    first = api.stream("POST", "/api/ask", {"message": message, "stream": True})
    job_id = first.until("queued").data["requestId"]
    waits = {
        "requestId": job_id, "position": 1, "waitingFor": "usage_limit",
        "resumesAt": cab.iso_time(resets_at),
    }
    event = first.until("queued")
    # The job is queued for a moment before the time of the reset is known.
    if "waitingFor" not in event.data:
        event = first.until("queued")
    assert event == Event("queued", 0, waits)
    second = api.stream("POST", "/api/ask", {"message": "say behind", "stream": True})
    behind = next_event(second).data["requestId"]
    assert next_event(second) == Event("queued", 0, {**waits, "requestId": behind, "position": 2})
    with contextlib.closing(api.follow(job_id)) as third:
        assert next_event(third) == Event("queued", 0, waits)
    clock.ahead = 101
    assert [first.rest()[-1].data["response"], second.rest()[-1].data["response"]] == [
        "an answer", "behind",
    ]
    assert [first.text, second.text] == ["an answer", "behind"]
    assert first.events[-1].data["attempts"] == 1 and "waitingFor" not in first.events[-1].data


def test_a_text_starts_over_after_an_overload(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "BACK_OFF_SECONDS", (0.1,))
    message = script(
        once(tmp_path / "mark", {"delta": "half an answ"}, OVERLOADED),
        *delta_steps("a whole ", "answer"),
    )
    stream = api.stream("POST", "/api/ask", {"message": message, "stream": True})
    assert stream.rest()[-1].data["response"] == stream.text == "a whole answer"
    assert kinds(stream.events)[-3:] == ["started", "delta", "completed"]


# --- limits ---


def test_one_token_cannot_take_all_connections(
    api: Api, gate: Path, quick_rechecks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "MAX_STREAMS_PER_TOKEN", 3)
    guest, other = api.new_token("guest"), api.new_token("other")
    job = processing(guest, half_word(gate))
    streams = [guest.follow(job) for _ in range(3)]
    for stream in streams:
        stream.until("delta")
    refused = guest.get("/api/ask/%s/events" % job)
    assert (refused.status, refused.json["code"], refused.headers["retry-after"]) == (
        429, "rate_limited", "5",
    )
    before = len(guest.get("/api/requests").json["requests"])
    assert [
        guest.post("/api/ask", {"message": "x", way: 1 if way == "wait" else True}).status
        for way in ("wait", "stream")
    ] == [429] * 2
    # A refused request is not run.
    assert len(guest.get("/api/requests").json["requests"]) == before
    assert guest.get("/api/ask/%s?wait=1" % job).status == 429
    assert guest.get("/api/ask/" + job).status == 202
    # The limit of one token does not affect another.
    streams.insert(0, api.follow(job))
    assert streams[0].until("delta").data == {"text": "he"}
    assert other.post("/api/ask", {"message": "x"}).status == 202
    streams.pop().close()
    wait_until(lambda: guest.get("/api/ask/%s?wait=0.01" % job).status == 202)
    gate.touch()
    assert [stream.rest()[-1].data["response"] for stream in streams] == ["held"] * 3
    assert guest.follow(job).rest()[-1].kind == "completed"
