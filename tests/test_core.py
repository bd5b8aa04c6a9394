"""The core: what a body may say, what the CLI is told, what its lines mean. Tables; no file, no child, no real clock."""
from __future__ import annotations

import contextlib
import json
import random
import re
import threading
from typing import Any, Dict, List, Mapping, Sequence

import pytest
from conftest import FakeClock
from fake_claude import FLAGS

import claude_api_bridge as cab

# --- commands ---


def test_a_message_alone_is_an_ask_with_defaults() -> None:
    assert cab.Ask.parse({"message": "hi"}) == (cab.Ask("hi"), [])
    assert cab.Ask("hi") == cab.Ask("hi", None, None, None, None, None, 0.0)


def test_every_field_of_an_ask_is_read() -> None:
    body = {"message": "hi", "model": "haiku", "systemPrompt": "Be brief.", "jsonSchema": {"type": "object"}, "conversation": "trip",
            "effort": "low", "wait": 2.5}
    assert cab.Ask.parse(body) == (cab.Ask("hi", "haiku", "Be brief.", '{"type":"object"}', "trip", "low", 2.5), [])


@pytest.mark.parametrize("fields", [
    {"message": "x" * 32_768}, {"message": "é" * 16_384}, {"message": "😀" * 8_192}, {"message": "a\0b"}, {"message": " x"},
    {"model": None}, {"model": "sonnet[1m]"}, {"model": "us.anthropic/claude@1:0"}, {"model": "m" * 128},
    {"systemPrompt": None}, {"systemPrompt": "é" * 16_384},
    {"jsonSchema": None}, {"jsonSchema": {}},
    {"conversation": None}, {"conversation": "A.b_c-9"}, {"conversation": "c" * 64},
    {"effort": None}, {"effort": "low"}, {"effort": "medium"}, {"effort": "high"}, {"effort": "xhigh"}, {"effort": "max"},
    {"wait": None}, {"wait": 0}, {"wait": 90}, {"wait": 90.0}, {"wait": 0.01}, {"wait": "30"},
], ids=lambda fields: "%.40r" % fields)
def test_an_ask_at_its_bounds_is_taken(fields: Dict[str, Any]) -> None:
    assert cab.Ask.parse({"message": "hi", **fields})[1] == []


NO_MESSAGE = "message field is required (string)"
TOO_LONG = "Message exceeds 32768 byte limit"


@pytest.mark.parametrize("body, field, text", [
    ({}, "message", NO_MESSAGE), ([], "message", NO_MESSAGE), (None, "message", NO_MESSAGE), ("hi", "message", NO_MESSAGE),
    (7, "message", NO_MESSAGE), ({"message": None}, "message", NO_MESSAGE), ({"message": ""}, "message", NO_MESSAGE),
    ({"message": 7}, "message", NO_MESSAGE), ({"message": True}, "message", NO_MESSAGE), ({"message": ["hi"]}, "message", NO_MESSAGE),
    ({"message": " \n\t"}, "message", "message must not be blank"),
    ({"message": "x" * 32_769}, "message", TOO_LONG),
    ({"message": "é" * 16_384 + "x"}, "message", TOO_LONG),          # 16,385 characters, 32,769 bytes
    ({"message": "\ud800" * 10_923}, "message", TOO_LONG),           # each becomes the 3 bytes of U+FFFD
], ids=lambda value: "%.40r" % (value,))
def test_a_message_that_cannot_be_used_is_refused_in_the_original_s_words(body: Any, field: str, text: str) -> None:
    with pytest.raises(cab.InvalidRequest) as refused:
        cab.Ask.parse(body)
    assert cab.error_body(refused.value) == {"error": text, "code": "invalid_request", "field": field}
    assert refused.value.status == 400


@pytest.mark.parametrize("fields", [
    {"model": ""}, {"model": 1}, {"model": True}, {"model": "-p"}, {"model": "a b"}, {"model": "haiku\n"}, {"model": "é"},
    {"model": "m" * 129}, {"model": ["haiku"]},
    {"systemPrompt": 1}, {"systemPrompt": ["x"]}, {"systemPrompt": "é" * 16_384 + "x"},
    {"jsonSchema": "{}"}, {"jsonSchema": []}, {"jsonSchema": True}, {"jsonSchema": 1},
    {"conversation": ""}, {"conversation": "a/b"}, {"conversation": "é"}, {"conversation": "c" * 65}, {"conversation": "a\n"},
    {"conversation": 1},
    {"effort": ""}, {"effort": "LOW"}, {"effort": 1}, {"effort": True}, {"effort": ["low"]},
    {"wait": -1}, {"wait": 90.5}, {"wait": "soon"}, {"wait": ""}, {"wait": True}, {"wait": False}, {"wait": [1]}, {"wait": {}},
    {"wait": float("nan")}, {"wait": float("inf")}, {"wait": 10 ** 400}, {"wait": "nan"},
], ids=lambda fields: "%.40r" % fields)
def test_a_field_of_an_ask_that_cannot_be_used_is_named(fields: Dict[str, Any]) -> None:
    with pytest.raises(cab.InvalidRequest) as refused:
        cab.Ask.parse({"message": "hi", **fields})
    body = cab.error_body(refused.value)
    assert body["field"] in fields and body["code"] == "invalid_request"
    assert body["field"] in body["error"]                # the sentence alone says what to change


def test_lone_surrogates_become_the_replacement_character_and_pairs_a_letter() -> None:
    ask, _ = cab.Ask.parse({"message": "a\ud800b\ud83d\ude00", "systemPrompt": "\udfff", "jsonSchema": {"\ud800": 1}})
    assert (ask.message, ask.system_prompt, ask.json_schema) == ("a\ufffdb😀", "\ufffd", '{"\ufffd":1}')


def test_an_empty_system_prompt_means_the_default_one() -> None:
    assert cab.Ask.parse({"message": "hi", "systemPrompt": ""})[0].system_prompt is None


def test_a_schema_that_is_no_json_is_refused() -> None:
    # 1e999 is read as infinity; written again it would be `Infinity`, at which the CLI ends.
    with pytest.raises(cab.BridgeError):
        cab.Ask.parse(cab.parsed_json(b'{"message": "hi", "jsonSchema": {"maximum": 1e999}}'))


def test_unknown_fields_are_named_in_warnings_and_ignored() -> None:
    ask, warnings = cab.Ask.parse({"message": "hi", "systemPromt": "x", "system_prompt": "y", "\ud800": 1})
    assert ask == cab.Ask("hi")
    assert warnings == ["unknown field 'systemPromt' ignored", "unknown field 'system_prompt' ignored", "unknown field '\ufffd' ignored"]


def test_warnings_are_few_and_short_whatever_was_sent() -> None:
    _, warnings = cab.Ask.parse({"message": "hi", **{"x%d" % n + "y" * 1000: n for n in range(100)}})
    assert len(warnings) == 10 and max(map(len, warnings)) < 100


def test_a_name_alone_is_a_token_with_the_original_s_defaults() -> None:
    assert cab.NewToken.parse({"name": "  my app "}) == (cab.NewToken("my app", "stateless", None, False, "none"), [])


@pytest.mark.parametrize("fields, expected", [
    ({"name": "n" * 100}, {}), ({"name": "😀" * 100}, {}), ({"name": "a\ud800"}, {"name": "a\ufffd"}),
    ({"sessionMode": "stateful"}, {"session_mode": "stateful"}), ({"sessionMode": "stateless"}, {}), ({"sessionMode": ""}, {}),
    ({"sessionMode": None}, {}),
    ({"expiresInDays": None}, {}), ({"expiresInDays": 1}, {"expires_in_days": 1}), ({"expiresInDays": 7}, {"expires_in_days": 7}),
    ({"expiresInDays": 30}, {"expires_in_days": 30}), ({"expiresInDays": 90}, {"expires_in_days": 90}),
    ({"expiresInDays": 7.0}, {"expires_in_days": 7}),    # one number in JSON as in the original, however it is written
    ({"admin": True}, {"admin": True}), ({"admin": False}, {}), ({"admin": None}, {}),
    ({"tools": None}, {}), ({"tools": "none"}, {}), ({"tools": "read"}, {"tools": "read"}), ({"tools": "web"}, {"tools": "web"}),
    ({"tools": "all"}, {"tools": "all"}), ({"tools": ["Read", "Bash(git log:*)"]}, {"tools": ("Read", "Bash(git log:*)")}),
    ({"tools": ["mcp__calc__add"]}, {"tools": ("mcp__calc__add",)}), ({"tools": ["Read"] * 50}, {"tools": ("Read",) * 50}),
], ids=lambda value: "%.40r" % (value,))
def test_a_token_may_be_asked_for_in_these_ways(fields: Dict[str, Any], expected: Dict[str, Any]) -> None:
    new, warnings = cab.NewToken.parse({"name": "my-app", **fields})
    assert warnings == []
    assert {name: getattr(new, name) for name in expected} == expected


BAD_NAME, BAD_MODE = "Token name is required", 'sessionMode must be "stateful" or "stateless"'
BAD_DAYS = "expiresInDays must be 1, 7, 30, 90, or null (never)"


@pytest.mark.parametrize("body, field, text", [
    (None, "name", BAD_NAME), ([], "name", BAD_NAME), ({}, "name", BAD_NAME), ({"name": None}, "name", BAD_NAME),
    ({"name": " "}, "name", BAD_NAME), ({"name": 1}, "name", BAD_NAME), ({"name": ["n"]}, "name", BAD_NAME),
    ({"name": "n" * 101}, "name", "Token name must be 100 characters or less"),
    ({"name": " " * 100 + "n"}, "name", "Token name must be 100 characters or less"),       # counted before it is trimmed
    ({"name": "n", "sessionMode": "x"}, "sessionMode", BAD_MODE), ({"name": "n", "sessionMode": True}, "sessionMode", BAD_MODE),
    ({"name": "n", "sessionMode": ["stateful"]}, "sessionMode", BAD_MODE),
    ({"name": "n", "expiresInDays": 0}, "expiresInDays", BAD_DAYS), ({"name": "n", "expiresInDays": 2}, "expiresInDays", BAD_DAYS),
    ({"name": "n", "expiresInDays": "7"}, "expiresInDays", BAD_DAYS), ({"name": "n", "expiresInDays": True}, "expiresInDays", BAD_DAYS),
    ({"name": "n", "expiresInDays": 7.5}, "expiresInDays", BAD_DAYS), ({"name": "n", "expiresInDays": [7]}, "expiresInDays", BAD_DAYS),
    ({"name": "n", "admin": 1}, "admin", "admin must be true or false"), ({"name": "n", "admin": "true"}, "admin", "admin must be true or false"),
], ids=lambda value: "%.50r" % (value,))
def test_a_token_that_cannot_be_made_is_refused_in_the_original_s_words(body: Any, field: str, text: str) -> None:
    with pytest.raises(cab.InvalidRequest) as refused:
        cab.NewToken.parse(body)
    assert cab.error_body(refused.value) == {"error": text, "code": "invalid_request", "field": field}


@pytest.mark.parametrize("tools", [
    "", "write", "Read", True, 1, {}, [], ["Read"] * 51, [1], [None], [""], ["-Read"], ["Read,Bash"], ["Read Bash"], ["Bash()"],
    ["Bash(a)b"], ["Bash(a(b))"], ["Bash(a\nb)"], ['Bash("a")'], ["Bash(" + "a" * 201 + ")"], ["B" * 65], ["--dangerously-skip-permissions"],
], ids=lambda tools: "%.30r" % (tools,))
def test_tools_that_are_no_level_and_no_rules_are_refused(tools: Any) -> None:
    with pytest.raises(cab.InvalidRequest) as refused:
        cab.NewToken.parse({"name": "n", "tools": tools})
    assert refused.value.extra["field"] == "tools"


def test_a_rule_reaches_the_database_and_a_command_line_as_utf_8() -> None:
    try:
        new, _ = cab.NewToken.parse({"name": "n", "tools": ["Bash(\ud800)"]})
    except cab.InvalidRequest:
        return                                           # refusing it is right, too
    assert cab.as_json(new.tools).encode("utf-8")


# --- words of HTTP ---


@pytest.mark.parametrize("data, value", [
    (b"{}", {}), (b' {"a": 1}\n', {"a": 1}), (b"\xef\xbb\xbf{}", {}), (b'"\xc3\xa9"', "é"), (b"null", None), (b'{"a":1,"a":2}', {"a": 2}),
    (b'"\\ud800"', "\ud800"), (b"9" * 400, int("9" * 400)),
], ids=lambda value: "%.20r" % (value,))
def test_a_body_in_json_is_read(data: bytes, value: Any) -> None:
    assert cab.parsed_json(data) == value


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}")])
def test_a_hundred_levels_are_read_and_one_more_is_not(opening: bytes, closing: bytes) -> None:
    cab.parsed_json(opening * 100 + b"1" + closing * 100)
    with pytest.raises(cab.InvalidJson):
        cab.parsed_json(opening * 101 + b"1" + closing * 101)


@pytest.mark.parametrize("data", [
    b"", b" ", b"\xef\xbb\xbf", b"{", b"{} {}", b"{'a':1}", b'{"a":NaN}', b"Infinity", b"-Infinity", b'"\xff"', b"\xed\xa0\x80", b'"a\nb"',
    '{"a":1}'.encode("utf-16"), b"[" * 200_000, b'{"a":' * 150_000, b"9" * 100_000,
], ids=lambda data: "%.20r" % data)
def test_a_body_that_is_no_json_is_refused_with_the_reason(data: bytes) -> None:
    with pytest.raises(cab.InvalidJson) as refused:
        cab.parsed_json(data)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")
    assert re.match(r"Body is not valid (JSON|UTF-8)\b.{5,}", str(refused.value))


def test_no_depth_of_nesting_is_an_unexpected_error() -> None:
    # The reader's and the writer's limits of recursion lie close together: what one takes the other may not.
    for depth in list(range(90, 110)) + list(range(900, 1010)):
        body = b'{"message":"x","jsonSchema":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"
        try:
            ask, _ = cab.Ask.parse(cab.parsed_json(body))
        except cab.BridgeError:
            continue
        json.dumps(cab.initialize_request(cab.Setup("", json_schema=ask.json_schema), NEWEST))


@pytest.mark.parametrize("headers, token", [
    ({}, None), ({"authorization": "Basic cab-1"}, None), ({"authorization": "Bearer"}, None), ({"authorization": "Bearer   "}, None),
    ({"authorization": "cab-1"}, None), ({"authorization": "Bearer cab-1"}, "cab-1"), ({"authorization": "bearer cab-1"}, "cab-1"),
    ({"authorization": "BEARER    cab-1  "}, "cab-1"), ({"authorization": "  Bearer cab-1"}, "cab-1"), ({"x-api-key": "cab-2"}, "cab-2"),
    ({"x-api-key": "  "}, None), ({"authorization": "Bearer cab-1", "x-api-key": "cab-2"}, "cab-1"),
    ({"authorization": "Basic x", "x-api-key": "cab-2"}, "cab-2"),
], ids=lambda value: "%.50r" % (value,))
def test_the_token_of_a_request_is_found(headers: Dict[str, str], token: Any) -> None:
    assert cab.bearer(headers) == token


def test_tokens_have_the_original_s_shape_and_never_repeat() -> None:
    tokens = {cab.new_token() for _ in range(100)}
    assert len(tokens) == 100 and all(re.fullmatch(r"cab-[0-9a-f]{64}", token) for token in tokens)


def test_a_token_is_stored_as_the_original_stored_it() -> None:
    assert cab.digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


SECRET = "cab-" + "0123456789abcdef" * 4
KEY = "sk-ant-oat01-" + "Ab_9-" * 18


@pytest.mark.parametrize("text, shown", [
    ("nothing to hide", "nothing to hide"), (SECRET, "cab-0123..."), ("Bearer %s." % SECRET, "Bearer cab-0123...."),
    (SECRET + " " + SECRET, "cab-0123... cab-0123..."), ('{"token":"%s"}' % SECRET, '{"token":"cab-0123..."}'),
    ("key=" + KEY, "key=sk-ant-oat01..."), ("prefix cab-01234567", "prefix cab-01234567"),
    (repr("\n" + SECRET), "'\\ncab-0123...'"), ("token_" + SECRET, "token_cab-0123..."),    # as a traceback or a log may show it
], ids=lambda text: text[:16])
def test_secrets_are_cut_in_logs(text: str, shown: str) -> None:
    assert cab.redact(text) == shown


@pytest.mark.parametrize("moment, text", [
    (None, None), (0, "1970-01-01T00:00:00.000Z"), (1_769_860_800, "2026-01-31T12:00:00.000Z"), (1_769_860_800.5, "2026-01-31T12:00:00.500Z"),
])
def test_times_are_written_as_the_original_wrote_them(moment: Any, text: Any) -> None:
    assert cab.iso_time(moment) == text


def test_an_error_body_says_the_sentence_first_and_keeps_extra_fields() -> None:
    assert list(cab.error_body(cab.QueueFull(retryAfter=10)).items()) == [
        ("error", "Queue is full. Please try again later."), ("code", "queue_full"), ("retryAfter", 10)]


# --- rate limits ---


def grants(bucket: cab.TokenBucket, tries: int) -> int:
    return sum(bucket.take() == 0 for _ in range(tries))


def test_a_bucket_grants_its_capacity_at_once_and_then_says_how_long_to_wait(clock: FakeClock) -> None:
    bucket = cab.TokenBucket(clock, 120)
    assert grants(bucket, 120) == 120
    assert bucket.take() == pytest.approx(0.5)
    assert bucket.take() == pytest.approx(0.5)           # a refused request costs nothing


def test_a_bucket_refills_steadily_and_never_beyond_its_capacity(clock: FakeClock) -> None:
    bucket = cab.TokenBucket(clock, 120)
    grants(bucket, 120)
    clock.advance(5)
    assert grants(bucket, 20) == 10
    clock.advance(86_400)
    assert grants(bucket, 200) == 120


def test_who_waits_as_long_as_told_is_welcome(clock: FakeClock) -> None:
    bucket = cab.TokenBucket(clock, 7)
    for _ in range(100):
        seconds = bucket.take()
        if seconds:
            clock.advance(cab.whole_seconds(seconds))
            assert bucket.take() == 0


def test_a_bucket_of_nothing_is_no_limit(clock: FakeClock) -> None:
    bucket = cab.TokenBucket(clock, 0)
    assert grants(bucket, 1000) == 1000 and bucket.headers() == ()


def test_a_bucket_shows_the_draft_s_headers(clock: FakeClock) -> None:
    bucket = cab.TokenBucket(clock, 120)
    grants(bucket, 3)
    assert bucket.headers() == (("RateLimit-Policy", "120;w=60"), ("RateLimit-Limit", "120"), ("RateLimit-Remaining", "117"),
                                ("RateLimit-Reset", "2"))
    grants(bucket, 200)
    assert dict(bucket.headers())["RateLimit-Remaining"] == "0"


def test_a_clock_that_goes_backwards_takes_nothing_away(clock: FakeClock) -> None:
    bucket = cab.TokenBucket(clock, 60)
    grants(bucket, 59)
    clock.advance(-3600)
    assert grants(bucket, 60) == 1
    clock.advance(1)
    assert grants(bucket, 60) == 1                       # and time counts again from there


def test_threads_share_a_bucket_exactly(clock: FakeClock) -> None:
    bucket, granted = cab.TokenBucket(clock, 100), []
    threads = [threading.Thread(target=lambda: granted.append(grants(bucket, 50)), name="taker") for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == 100


@pytest.mark.parametrize("seconds, whole", [(0, 0), (0.001, 1), (1, 1), (1.2, 2), (59.999, 60)])
def test_waits_are_rounded_up(seconds: float, whole: int) -> None:
    assert cab.whole_seconds(seconds) == whole


# --- lines of the CLI ---


@pytest.mark.parametrize("seed", range(20))
def test_any_chunking_gives_the_same_lines(seed: int) -> None:
    chance = random.Random(seed)
    wanted, data = [], b""
    for _ in range(30):
        line = bytes(chance.choice(b'{}":a \xc3\xa9\x00\r') for _ in range(chance.choice((0, 1, 5, 40)))).rstrip(b"\r")
        data += line + chance.choice((b"\n", b"\r\n"))
        wanted += [line] if line.strip() else []
    framer, found, start = cab.LineFramer(64), [], 0
    while start < len(data):
        size = chance.choice((1, 2, 3, 17, 500))
        found += framer.feed(data[start:start + size])
        start += size
    assert found == wanted
    assert framer.feed(b"rest") == []                    # a line counts only with its end
    assert framer.feed(b"\n") == [b"rest"]


@pytest.mark.parametrize("chunks, is_fine", [
    ([b"x" * 64 + b"\n"], True), ([b"x" * 65 + b"\n"], False), ([b"x" * 64], True), ([b"x" * 65], False), ([b"x" * 40] * 2, False),
    ([b"x" * 40, b"\n" + b"x" * 40, b"\n"], True), ([b"a\nb\n" * 100], True), ([b"a\n" + b"x" * 65 + b"\nb\n"], False),
], ids=["at the limit", "over it", "unfinished at the limit", "unfinished over it", "in pieces", "two lines", "many lines", "in the middle"])
def test_a_line_beyond_the_limit_is_an_overflow(chunks: Sequence[bytes], is_fine: bool) -> None:
    framer = cab.LineFramer(64)
    with contextlib.nullcontext() if is_fine else pytest.raises(OverflowError):
        for chunk in chunks:
            framer.feed(chunk)


def stream(event: Any, **fields: Any) -> Dict[str, Any]:
    return {"type": "stream_event", "event": event, "parent_tool_use_id": None, **fields}


def assistant(*blocks: Mapping[str, Any], **fields: Any) -> Dict[str, Any]:
    return {"type": "assistant", "message": {"role": "assistant", "content": list(blocks)}, **fields}


TEXT_DELTA = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Héllo"}}


@pytest.mark.parametrize("message, kind, text", [
    ({"type": "system", "subtype": "init", "apiKeySource": "none"}, "init", ""),
    ({"type": "system", "subtype": "status"}, "noise", ""),
    ({"type": "system", "subtype": "api_retry", "attempt": 1}, "noise", ""),
    (stream(TEXT_DELTA), "delta", "Héllo"),
    (stream({"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": "{"}}), "noise", ""),
    (stream({"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "hm"}}), "noise", ""),
    (stream({"type": "content_block_delta"}), "noise", ""),
    (stream({"type": "message_start", "message": {}}), "message", ""),
    (stream({"type": "message_stop"}), "noise", ""),
    (stream(None), "noise", ""),
    (stream(TEXT_DELTA, parent_tool_use_id="toolu_1"), "noise", ""),                     # a subagent's words are not the answer
    (stream({"type": "message_start"}, parent_tool_use_id="toolu_1"), "noise", ""),
    (assistant({"type": "text", "text": "Hi"}), "assistant", ""),
    (assistant({"type": "text", "text": "Hi"}, {"type": "tool_use", "id": "t1", "name": "Bash"}), "assistant", ""),
    ({"type": "assistant", "message": {"content": "Hi"}}, "assistant", ""),
    ({"type": "assistant"}, "assistant", ""),
    ({"type": "user", "message": {"role": "user", "content": []}}, "told", ""),
    ({"type": "user", "message": {"role": "user", "content": "[Request interrupted by user]"}}, "told", ""),
    ({"type": "result", "subtype": "success"}, "result", ""),
    ({"type": "control_response", "response": {}}, "control", ""),
    ({"type": "control_request", "request_id": "1"}, "asks", ""),
    ({"type": "rate_limit_event"}, "noise", ""), ({"type": "conversation_reset"}, "noise", ""), ({"type": ["x"]}, "noise", ""), ({}, "noise", ""),
], ids=lambda value: "%.60s" % json.dumps(value) if isinstance(value, dict) else None)
def test_a_line_of_the_cli_is_understood(message: Dict[str, Any], kind: str, text: str) -> None:
    event = cab.read_cli_event(json.dumps(message, ensure_ascii=False).encode())
    assert (event.kind, event.text, event.body) == (kind, text, message)


def test_a_line_names_the_tool_calls_that_begin_and_end_with_it() -> None:
    calls = assistant({"type": "tool_use", "id": "t1"}, {"type": "text", "text": "and"}, {"type": "tool_use", "id": "t2"})
    results = {"type": "user", "message": {"content": [{"type": "tool_result", "tool_use_id": "t1", "content": "ok"}]}}
    assert [cab.read_cli_event(json.dumps(line).encode()).tools for line in (calls, results)] == [("t1", "t2"), ("t1",)]


@pytest.mark.parametrize("line", [b"[DEBUG] starting", b"undefined", b"[1, 2]", b"\xff\xfe", b"   "])
def test_what_is_no_object_is_noise(line: bytes) -> None:
    assert cab.read_cli_event(line) == cab.CliEvent("noise")


@pytest.mark.parametrize("line", [b'{"type": "assis', b"{", b'{"a": 1} trailing', b"  {'type': 'result'}"])
def test_a_broken_json_line_is_an_error(line: bytes) -> None:
    with pytest.raises(ValueError):
        cab.read_cli_event(line)


def test_bytes_that_are_no_utf_8_do_not_break_a_line() -> None:
    assert cab.read_cli_event(b'{"type":"result","result":"a\xffb"}').body["result"] == "a\ufffdb"


SAID_BY_MODEL = "There's an issue with the selected model (x). It may not exist or you may not have access to it. Run --model"


@pytest.mark.parametrize("result, said, code", [
    ({"api_error_status": 401, "result": "Failed to authenticate. API Error: 401 OAuth token has expired"}, "authentication_failed", "auth_required"),
    ({"result": "Failed to authenticate. API Error: 401 OAuth token has expired"}, "", "auth_required"),      # up to 2.1.50 no status
    ({"api_error_status": 403, "result": "Your account does not have access to Claude. Please login again."}, "authentication_failed",
     "auth_required"),
    ({"api_error_status": 403, "result": "API Error: 403 forbidden"}, "", "auth_required"),
    ({"api_error_status": None, "result": "Not logged in · Please run /login"}, "", "auth_required"),
    ({"result": "Invalid API key · Please run /login"}, "", "auth_required"),
    ({"api_error_status": 400, "result": "Prompt is too long · Try /compact"}, "invalid_request", "context_too_long"),
    ({"terminal_reason": "prompt_too_long", "result": "too long"}, "", "context_too_long"),
    ({"api_error_status": 413, "result": "Request too large (max 32MB). Double press esc"}, "invalid_request", "context_too_long"),
    ({"api_error_status": 400, "result": "Credit balance is too low"}, "billing_error", "cli_error"),
    ({"api_error_status": 400, "result": "API Error: 400 bad"}, "unknown", "cli_error"),
    ({"api_error_status": 404, "result": SAID_BY_MODEL}, "model_not_found", "model_not_found"),
    ({"result": SAID_BY_MODEL}, "", "model_not_found"),
    ({"api_error_status": 429, "result": "You've hit your session limit · resets 8:28am (UTC)"}, "rate_limit", "usage_limit"),
    ({"result": "You've hit your weekly limit · resets Nov 25, 5:48pm (UTC)"}, "rate_limit", "usage_limit"),
    ({"api_error_status": 429, "result": "API Error: Server is temporarily limiting requests (not your usage limit) · Rate limited"},
     "rate_limit", "overloaded"),
    ({"api_error_status": 500, "result": "API Error: 500 internal"}, "server_error", "overloaded"),
    ({"api_error_status": 529, "result": "API Error: 529 Overloaded. This is a server-side issue"}, "server_error", "overloaded"),
    ({"result": "API Error: 529 Overloaded"}, "server_error", "overloaded"),
    ({"api_error_status": None, "result": "API Error: Unable to connect to API (ConnectionRefused)"}, "server_error", "cli_error"),
    ({"api_error_status": None, "result": "Request timed out"}, "server_error", "cli_error"),
    ({"result": "API Error: Claude's response exceeded the 32000 output token maximum"}, "max_output_tokens", "cli_error"),
    ({"result": "API Error: Claude Code is unable to respond to this request"}, "invalid_request", "cli_error"),
    ({"subtype": "error_max_turns", "errors": ["Reached maximum number of turns (1)"]}, "", "cli_error"),
], ids=lambda value: "%.60s" % value.get("result", value) if isinstance(value, dict) else None)
def test_each_failure_of_the_cli_has_its_code_and_keeps_its_words(result: Dict[str, Any], said: str, code: str) -> None:
    failure = cab.failure_of({"subtype": "success", "is_error": True, **result}, said)
    assert (failure.code, str(failure)) == (code, result.get("result") or result["errors"][0])
    assert failure.code in cab.RUN_ERRORS


def test_a_failure_without_words_still_says_something() -> None:
    assert "error_during_execution" in str(cab.failure_of({"subtype": "error_during_execution", "result": "", "errors": []}, ""))


COUNTS = {"input_tokens": 10, "output_tokens": 7, "cache_read_input_tokens": 1000, "cache_creation_input_tokens": 100, "service_tier": "x"}


@pytest.mark.parametrize("result, spent, usage, total", [
    ({"usage": COUNTS, "total_cost_usd": 0.00081}, 0.0, cab.Usage(10, 7, 1000, 100, 0.00081), 0.00081),
    ({"usage": COUNTS, "total_cost_usd": 0.5}, 0.3, cab.Usage(10, 7, 1000, 100, 0.2), 0.5),           # the sum of the process
    ({"usage": COUNTS, "total_cost_usd": 0.1}, 0.3, cab.Usage(10, 7, 1000, 100, 0.1), 0.1),           # it has begun anew
    ({"usage": COUNTS, "total_cost_usd": 0.3}, 0.3, cab.Usage(10, 7, 1000, 100, 0.0), 0.3),
    ({}, 0.0, cab.Usage(), 0.0),
    ({"usage": None, "total_cost_usd": None}, 0.0, cab.Usage(), 0.0),
    ({"usage": {"input_tokens": None}}, 0.0, cab.Usage(), 0.0),
])
def test_the_figures_of_one_turn_are_taken_from_the_sums(result: Dict[str, Any], spent: float, usage: cab.Usage, total: float) -> None:
    assert cab.usage_of(result, spent) == (usage, total)


# --- who pays, and what the CLI is given ---


@pytest.mark.parametrize("status, signed_in, who", [
    ({}, False, "not signed in"), ({"loggedIn": False, "authMethod": "none"}, False, "not signed in"),
    ({"loggedIn": True, "authMethod": "claude.ai", "subscriptionType": "max"}, True, "Claude Max subscription"),
    ({"loggedIn": True, "authMethod": "claude.ai", "subscriptionType": "max", "apiKeySource": "none"}, True, "Claude Max subscription"),
    ({"loggedIn": True, "authMethod": "oauth_token"}, True, "CLAUDE_CODE_OAUTH_TOKEN"),
    ({"loggedIn": True, "subscriptionType": "max", "apiKeySource": "ANTHROPIC_API_KEY"}, True, "an API key (ANTHROPIC_API_KEY)"),
    ({"loggedIn": True, "authMethod": "oauth_token", "apiKeySource": "apiKeyHelper"}, True, "an API key (apiKeyHelper)"),
    ({"loggedIn": True, "authMethod": "third_party"}, True, "third_party"), ({"loggedIn": True}, True, "unknown"),
], ids=lambda value: "%.90r" % (value,))
def test_who_pays_is_read_from_the_login(status: Dict[str, Any], signed_in: bool, who: str) -> None:
    found = cab.payer_of(status)
    assert found[0] is signed_in and who in found[1]


HELP = "Usage: claude [options]\n  --tools <tools...>   names\n  --setting-sources <s>  x\nCommands:\n  auth       Manage authentication\n  mcp\n"


@pytest.mark.parametrize("version, help_text, expected", [
    ("2.1.330 (Claude Code)\n", HELP, ((2, 1, 330), "2.1.330 (Claude Code)", {"--tools", "--setting-sources"}, True)),
    ("2.0.76 (Claude Code)", "  --tools x\n  --use-auth y  auth of a kind\n", ((2, 0, 76), "2.0.76 (Claude Code)", {"--tools", "--use-auth"}, False)),
    ("", "", ((), "", set(), False)), ("git version two", "", ((), "git version two", set(), False)),
])
def test_the_features_of_a_cli_are_read_from_its_version_and_help(version: str, help_text: str, expected: Any) -> None:
    assert tuple(cab.Features.read(version, help_text)) == expected


def test_a_version_text_cannot_be_long() -> None:
    assert len(cab.Features.read("2.1.330 " + "x" * 10_000, "").version_text) <= 80


# Names that choose who pays, which server, model or prompt is used, or that load code; some stand for a family.
STRIPPED = """
    ANTHROPIC_API_KEY ANTHROPIC_AUTH_TOKEN ANTHROPIC_MODEL ANTHROPIC_SMALL_FAST_MODEL ANTHROPIC_DEFAULT_OPUS_MODEL
    ANTHROPIC_DEFAULT_SONNET_MODEL ANTHROPIC_CUSTOM_HEADERS ANTHROPIC_BETAS ANTHROPIC_PROFILE CLAUDE_CODE_USE_BEDROCK CLAUDE_CODE_USE_VERTEX
    CLAUDE_CODE_USE_FOUNDRY CLAUDE_CODE_USE_MANTLE CLAUDE_CODE_USE_GATEWAY CLAUDE_CODE_USE_ANTHROPIC_AWS CLAUDE_CODE_SIMPLE
    CLAUDE_CODE_EXTRA_BODY CLAUDE_CODE_MAX_OUTPUT_TOKENS MAX_THINKING_TOKENS CLAUDE_CODE_EFFORT_LEVEL CLAUDECODE CLAUDE_CODE_ENTRYPOINT
    CLAUDE_CODE_SSE_PORT CLAUDE_CODE_SESSION_ID CLAUDE_CODE_CHILD_SESSION CLAUDE_CODE_REMOTE CLAUDE_CODE_REMOTE_SESSION_ID
    CLAUDE_CODE_SHELL_PREFIX CLAUDE_CODE_RESUME_INTERRUPTED_TURN CLAUDE_AGENT CLAUDE_AGENT_SDK_VERSION CLAUDE_BG_TASK OTEL_EXPORTER
    OTEL_LOG_USER_PROMPTS NODE_OPTIONS BUN_OPTIONS CAB_CHILD CAB_PORT CAB_DATA_DIR anthropic_api_key Claude_Code_Use_Bedrock node_options
""".split()
HANDED_ON = """
    CLAUDE_CODE_OAUTH_TOKEN ANTHROPIC_BASE_URL HOME USER PATH LANG LC_ALL TMPDIR HTTP_PROXY HTTPS_PROXY NO_PROXY https_proxy no_proxy
    NODE_EXTRA_CA_CERTS SSL_CERT_FILE SHELL SYSTEMROOT APPDATA
""".split()


def environment(names: Sequence[str], allow_api_key: bool = False, isolated: Any = "/bridge/claude-home") -> Dict[str, str]:
    return cab.child_environment({name: "the owner's" for name in names}, allow_api_key, isolated)


@pytest.mark.parametrize("isolated", ["/bridge/claude-home", None])
def test_no_variable_that_could_change_who_pays_or_what_is_asked_is_handed_on(isolated: Any) -> None:
    assert [name for name, value in environment(STRIPPED, isolated=isolated).items() if value == "the owner's"] == []


def test_what_the_cli_needs_is_handed_on() -> None:
    assert {name for name, value in environment(HANDED_ON).items() if value == "the owner's"} == set(HANDED_ON)


def test_keys_are_handed_on_only_when_the_owner_allows_it() -> None:
    names = ["ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_USE_BEDROCK", "ANTHROPIC_MODEL"]
    found = environment(names, allow_api_key=True)
    assert {name for name in names if name in found} == {"ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"}


def test_the_switches_that_keep_the_owner_s_files_out_are_always_set() -> None:
    wanted = {"CLAUDE_CODE_DISABLE_ATTACHMENTS": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "CLAUDE_CODE_DISABLE_TERMINAL_TITLE": "1",
              "CLAUDE_CODE_DISABLE_CLAUDE_MDS": "1", "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1", "ENABLE_CLAUDEAI_MCP_SERVERS": "false"}
    found = environment(["CLAUDE_CODE_DISABLE_ATTACHMENTS", "ENABLE_CLAUDEAI_MCP_SERVERS"], isolated=None)
    assert {name: found.get(name) for name in wanted} == wanted


@pytest.mark.parametrize("owners, isolated, expected", [
    (None, "/b", ("/b", "")), ("/mine", "/b", ("/b", "/mine")), (None, None, (None, None)), ("/mine", None, ("/mine", None)),
    ("", None, (None, None)),
])
def test_the_cli_has_a_settings_folder_of_its_own_and_the_owner_s_login(owners: Any, isolated: Any, expected: Any) -> None:
    found = cab.child_environment({} if owners is None else {"CLAUDE_CONFIG_DIR": owners}, False, isolated)
    assert (found.get("CLAUDE_CONFIG_DIR"), found.get("CLAUDE_SECURESTORAGE_CONFIG_DIR")) == expected


def features(version: str, *without: str) -> cab.Features:
    return cab.Features.read(version + " (Claude Code)", "\n".join(flag for flag in FLAGS.split() if flag not in without))


NEWEST = features("2.1.330")
SEEN = features("2.1.197", "--restricted", "--system-prompt-snapshot")
OLDER = features("2.1.50", "--restricted", "--system-prompt-snapshot")
OLDEST = features("2.0.76", "--restricted", "--system-prompt-snapshot")
BARE = features("2.0.76", *(set(FLAGS.split()) - cab.NEEDED_FLAGS))
VERSIONS = [NEWEST, SEEN, OLDER, OLDEST, BARE]
RULES = ("Read", "Glob", "Write", "Bash(git log:*)", "Read(/srv/data/**)", "WebFetch(domain:example.com)")
TOOLS = ["none", "read", "web", "all", RULES]


def options(argv: Sequence[str]) -> Dict[str, List[str]]:
    """["--a", "1", "2", "--b"] -> {"--a": ["1", "2"], "--b": []}"""
    found: Dict[str, List[str]] = {}
    for word in argv:
        if word.startswith("--"):
            found[word] = []
        elif found:
            found[list(found)[-1]].append(word)
    return found


def test_a_child_without_tools_is_started_so() -> None:
    argv = cab.claude_argv(("/opt/claude",), NEWEST, "none")
    assert argv[:2] == ["/opt/claude", "-p"]
    assert options(argv) == {
        "--input-format": ["stream-json"], "--output-format": ["stream-json"], "--verbose": [], "--setting-sources": [""],
        "--strict-mcp-config": [], "--include-partial-messages": [], "--disable-slash-commands": [], "--tools": [""],
        "--permission-mode": ["dontAsk"], "--agent": ["bridge"], "--system-prompt-snapshot": ["off"], "--no-session-persistence": []}


@pytest.mark.parametrize("tools", TOOLS, ids=str)
@pytest.mark.parametrize("cli", VERSIONS, ids=lambda cli: "%s with %d flags" % (cli.version, len(cli.flags)))
def test_only_flags_that_the_cli_has_are_used_and_the_needed_ones_always(cli: cab.Features, tools: Any) -> None:
    used = set(options(cab.claude_argv(("claude",), cli, tools)))
    always = {"--output-format", "--verbose", "--allowedTools"}       # in every version there is
    assert used <= cli.flags | always
    assert used >= {"--tools", "--setting-sources", "--strict-mcp-config", "--input-format", "--permission-mode"}
    assert not any("dangerously" in flag for flag in used)


@pytest.mark.parametrize("session", ["--session-id=0b5e", "--resume=0b5e"])
def test_a_session_is_kept_where_one_is_named(session: str) -> None:
    argv = cab.claude_argv(("claude",), NEWEST, "none", (session,))
    assert session in argv and "--no-session-persistence" not in argv


@pytest.mark.parametrize("tools, cli, exist, mode, allowed, is_restricted", [
    ("none", NEWEST, "", "dontAsk", None, False),
    ("none", OLDEST, "", "dontAsk", None, False),
    ("read", NEWEST, "Glob Grep Read", "dontAsk", None, True),
    ("read", SEEN, "Grep Read", "dontAsk", None, False),              # there Glob can list names outside of the workspace
    ("web", NEWEST, "WebFetch WebSearch", "dontAsk", "WebFetch WebSearch", False),
    ("web", OLDEST, "WebFetch WebSearch", "dontAsk", "WebFetch WebSearch", False),
    (("Read",), NEWEST, "Read", "dontAsk", None, False),
    (("Read", "Bash(git log:*)"), NEWEST, "Bash Read", "dontAsk", "Bash(git log:*)", False),
    (("Bash(ls)", "Bash(pwd)"), NEWEST, "Bash", "dontAsk", "Bash(ls) Bash(pwd)", False),
    (("Write",), NEWEST, "Write", "dontAsk", "Edit(./**)", False),    # a bare Write would open the whole disk
    (("Edit", "Write", "NotebookEdit"), NEWEST, "Edit NotebookEdit Write", "dontAsk", "Edit(./**)", False),
    (("Read(/srv/**)",), NEWEST, "Read", "dontAsk", "Read(/srv/**)", False),
    (("Glob", "WebSearch"), NEWEST, "Glob WebSearch", "dontAsk", "WebSearch", False),
    (("Glob",), SEEN, "", "dontAsk", None, False),
], ids=lambda value: None if isinstance(value, (bool, cab.Features)) else str(value))
def test_a_level_or_rules_become_these_flags(tools: Any, cli: cab.Features, exist: str, mode: str, allowed: Any, is_restricted: bool) -> None:
    argv = cab.tool_argv(cli, tools)
    # A rule may hold a blank; each is a word of its own, so words are compared and not their join.
    listed = argv[argv.index("--allowedTools") + 1:] if "--allowedTools" in argv else None
    assert sorted(filter(None, options(argv)["--tools"][0].split(","))) == exist.split()
    assert options(argv)["--permission-mode"] == [mode]
    assert listed is None if allowed is None else sorted(listed or ()) == sorted(re.findall(r"\w+(?:\([^)]*\))?", allowed))
    assert ("--restricted" in argv) is is_restricted


@pytest.mark.parametrize("cli", VERSIONS, ids=lambda cli: str(cli.version))
def test_all_tools_may_edit_and_run_commands_and_nothing_needs_asking(cli: cab.Features) -> None:
    found = options(cab.tool_argv(cli, "all"))
    exist = set(found["--tools"][0].split(","))
    assert exist >= {"Bash", "Read", "Grep", "Edit", "Write", "WebFetch", "WebSearch"} and ("Glob" in exist) is (cli is NEWEST)
    assert (found["--permission-mode"], set(found["--allowedTools"])) == (["acceptEdits"], {"Bash", "WebFetch", "WebSearch"})
    assert ("--restricted" in found) is ("--restricted" in cli.flags)


FULL = cab.Setup("Be brief.", "haiku", '{"type":"object"}', "low")


@pytest.mark.parametrize("cli, in_agent", [(NEWEST, True), (SEEN, True), (OLDER, False), (OLDEST, False), (BARE, False)])
def test_the_model_is_set_where_it_leaves_no_trace_in_the_prompt(cli: cab.Features, in_agent: bool) -> None:
    requests = [line["request"] for line in cab.initialize_request(FULL, cli)]
    assert requests[0]["agents"]["bridge"].get("model") == ("haiku" if in_agent else None)
    assert [each["model"] for each in requests if each["subtype"] == "set_model"] == ([] if in_agent else ["haiku"])


def test_a_child_is_told_prompt_schema_and_effort() -> None:
    lines = cab.initialize_request(FULL, NEWEST)
    assert [line["type"] for line in lines] == ["control_request"] * 2
    assert [line["request_id"] for line in lines] == ["1", "2"]
    first, second = (line["request"] for line in lines)
    assert (first["subtype"], first["systemPrompt"], first["jsonSchema"]) == ("initialize", "Be brief.", {"type": "object"})
    assert first["agents"]["bridge"]["prompt"] == "Be brief." and first["title"]      # a title of ours stops a request for one
    assert second == {"subtype": "apply_flag_settings", "settings": {"effortLevel": "low"}}


def test_a_plain_setup_is_one_request_without_model_or_schema() -> None:
    lines = cab.initialize_request(cab.Setup("Hi."), OLDEST)
    assert len(lines) == 1 and "jsonSchema" not in lines[0]["request"] and "model" not in lines[0]["request"]["agents"]["bridge"]


@pytest.mark.parametrize("tools, expected", [("none", []), ("read", None), ("all", None), (("Read",), None)])
def test_a_second_lock_keeps_all_tools_away_from_a_token_without(tools: Any, expected: Any) -> None:
    assert cab.initialize_request(cab.Setup("Hi.", tools=tools), NEWEST)[0]["request"]["agents"]["bridge"].get("tools") == expected


@pytest.mark.parametrize("text, sent", [
    ("hi", "hi"), ("/cost", " /cost"), ("/", " /"), ("//x", " //x"), ("/etc/hosts is what?", " /etc/hosts is what?"), (" /cost", " /cost"),
    ("\n/cost", "\n/cost"), ("!ls", "!ls"), ("#note", "#note"), ("@/etc/passwd", "@/etc/passwd"), ("a\0b", "a\0b"), ('{"type":"x"}', '{"type":"x"}'),
])
def test_a_prompt_is_never_a_command(text: str, sent: str) -> None:
    content = [{"type": "text", "text": sent}]
    assert cab.user_message(text) == {"type": "user", "message": {"role": "user", "content": content}}
    assert cab.user_message(text, asks=False) == {"type": "user", "message": {"role": "user", "content": content}, "shouldQuery": False}


@pytest.mark.parametrize("text, sent", [("Hello", "Hello"), ("/x", "/x"), ("", "(no answer)"), (" \n", "(no answer)")])
def test_an_answer_told_again_is_never_blank(text: str, sent: str) -> None:
    assert cab.assistant_message(text)["message"] == {"role": "assistant", "content": [{"type": "text", "text": sent}]}
