"""The pure functions: bodies, HTTP words, rate limits, the protocol of the CLI, streams.

Most tests are tables. They use no file, no process and no real clock.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import threading
import unicodedata
from dataclasses import fields as fields_of
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import pytest
from conftest import FakeClock
from fake_claude import FLAGS

import claude_api_bridge as cab

# --- commands ---


def test_a_message_alone_is_an_ask_with_defaults() -> None:
    assert cab.Ask.parse({"message": "hi"}) == (cab.Ask("hi"), [])
    assert cab.Ask("hi") == cab.Ask("hi", None, None, None, None, None, 0.0, False)


def test_every_field_of_an_ask_is_read() -> None:
    body = {
        "message": "hi", "model": "haiku", "systemPrompt": "Be brief.",
        "jsonSchema": {"type": "object"}, "conversation": "trip", "effort": "low", "wait": 2.5,
        "stream": True,
    }
    assert cab.Ask.parse(body) == (
        cab.Ask("hi", "haiku", "Be brief.", '{"type":"object"}', "trip", "low", 2.5, True),
        [],
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"message": "x" * 32_768}, {"message": "é" * 16_384}, {"message": "😀" * 8_192},
        {"message": "a\0b"}, {"message": " x"}, {"model": None}, {"model": "sonnet[1m]"},
        {"model": "us.anthropic/claude@1:0"}, {"model": "m" * 128}, {"systemPrompt": None},
        {"systemPrompt": "é" * 16_384}, {"jsonSchema": None}, {"jsonSchema": {}},
        {"conversation": None}, {"conversation": "A.b_c-9"}, {"conversation": "c" * 64},
        {"effort": None}, {"effort": "low"}, {"effort": "medium"}, {"effort": "high"},
        {"effort": "xhigh"}, {"effort": "max"}, {"wait": None}, {"wait": 0}, {"wait": 90},
        {"wait": 90.0}, {"wait": 0.01}, {"wait": "30"}, {"stream": None}, {"stream": True},
        {"stream": False},
    ],
    ids=lambda fields: "%.40r" % fields,
)
def test_an_ask_at_its_bounds_is_accepted(fields: Dict[str, Any]) -> None:
    assert cab.Ask.parse({"message": "hi", **fields})[1] == []


NO_MESSAGE = "message field is required (string)"
TOO_LONG = "Message exceeds 32768 byte limit"


@pytest.mark.parametrize(
    "body, field, text",
    [
        ({}, "message", NO_MESSAGE), ([], "message", NO_MESSAGE), (None, "message", NO_MESSAGE),
        ("hi", "message", NO_MESSAGE), (7, "message", NO_MESSAGE),
        ({"message": None}, "message", NO_MESSAGE), ({"message": ""}, "message", NO_MESSAGE),
        ({"message": 7}, "message", NO_MESSAGE), ({"message": True}, "message", NO_MESSAGE),
        ({"message": ["hi"]}, "message", NO_MESSAGE),
        # The original has no error for a blank message.
        ({"message": " \n\t"}, "message", None),
        ({"message": "x" * 32_769}, "message", TOO_LONG),
        # 16,385 characters, 32,769 bytes
        ({"message": "é" * 16_384 + "x"}, "message", TOO_LONG),
        # Each lone surrogate becomes the 3 bytes of U+FFFD.
        ({"message": "\ud800" * 10_923}, "message", TOO_LONG),
    ],
    ids=lambda value: "%.40r" % (value,),
)
def test_an_invalid_message_is_refused_with_the_text_of_the_original(
    body: Any, field: str, text: Optional[str]
) -> None:
    with pytest.raises(cab.InvalidRequest) as refused:
        cab.Ask.parse(body)
    error = cab.error_body(refused.value)
    assert error == {"error": text or error["error"], "code": "invalid_request", "field": field}
    assert field in error["error"] or text
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "fields",
    [
        {"model": ""}, {"model": 1}, {"model": True}, {"model": "-p"}, {"model": "a b"},
        {"model": "haiku\n"}, {"model": "é"}, {"model": "m" * 129}, {"model": ["haiku"]},
        {"systemPrompt": 1}, {"systemPrompt": ["x"]}, {"systemPrompt": "é" * 16_384 + "x"},
        {"jsonSchema": "{}"}, {"jsonSchema": []}, {"jsonSchema": True}, {"jsonSchema": 1},
        {"conversation": ""}, {"conversation": "a/b"}, {"conversation": "é"},
        {"conversation": "c" * 65}, {"conversation": "a\n"}, {"conversation": 1}, {"effort": ""},
        {"effort": "LOW"}, {"effort": 1}, {"effort": True}, {"effort": ["low"]}, {"wait": -1},
        {"wait": 90.5}, {"wait": "soon"}, {"wait": ""}, {"wait": True}, {"wait": False},
        {"wait": [1]}, {"wait": {}}, {"wait": float("nan")}, {"wait": float("inf")},
        {"wait": 10**400}, {"wait": "nan"}, {"stream": 1}, {"stream": 0}, {"stream": 1.0},
        {"stream": "true"}, {"stream": ""}, {"stream": [True]}, {"stream": {}},
    ],
    ids=lambda fields: "%.40r" % fields,
)
def test_the_error_for_an_invalid_field_of_an_ask_names_the_field(fields: Dict[str, Any]) -> None:
    with pytest.raises(cab.InvalidRequest) as refused:
        cab.Ask.parse({"message": "hi", **fields})
    body = cab.error_body(refused.value)
    assert body["field"] in fields and body["code"] == "invalid_request"
    # The sentence alone says what to change.
    assert body["field"] in body["error"]


def test_lone_surrogates_become_the_replacement_character_and_pairs_a_letter() -> None:
    ask, _ = cab.Ask.parse(
        {"message": "a\ud800b\ud83d\ude00", "systemPrompt": "\udfff", "jsonSchema": {"\ud800": 1}}
    )
    assert (ask.message, ask.system_prompt, ask.json_schema) == (
        "a\ufffdb😀", "\ufffd", '{"type":"object","\ufffd":1}',
    )


def test_an_empty_system_prompt_means_the_default_one() -> None:
    assert cab.Ask.parse({"message": "hi", "systemPrompt": ""})[0].system_prompt is None


def test_a_schema_that_is_not_json_is_refused() -> None:
    # 1e999 parses to infinity. Serialized again it would be `Infinity`, and the CLI would exit.
    with pytest.raises(cab.BridgeError):
        cab.Ask.parse(cab.parse_json(b'{"message": "hi", "jsonSchema": {"maximum": 1e999}}'))


NOT_NUMBERS = [
    "", " 7", "7 ", "7\n", "+7", "-7", "7.0", "7e0", "0x7", "1_0", "٣", "seven", "nan", "null",
    "9" * 10, "9" * 5_000, True, False, 7.5, -1, -1.0, 10**400, 1e308, float("nan"), float("inf"),
    float("-inf"), [7], ["7"], {}, {"7": 7},
]


@pytest.mark.parametrize(
    "value, number",
    [
        (None, None), (1, 1), (100, 100), (1.0, 1), (100.0, 100), ("1", 1), ("100", 100), ("7", 7),
        ("007", 7),
    ],
    ids=repr,
)
def test_a_whole_number_is_accepted_from_json_and_from_a_query(
    value: Any, number: Optional[int]
) -> None:
    result = cab.integer("limit", 1, 100)(value)
    assert (result, type(result)) == (number, type(number))


@pytest.mark.parametrize(
    "value", [0, 101, 0.0, "0", "101", *NOT_NUMBERS], ids=lambda value: "%.20r" % (value,)
)
def test_a_value_that_is_not_a_whole_number_within_the_bounds_is_refused(value: Any) -> None:
    with pytest.raises(cab.InvalidRequest) as refused:
        cab.integer("limit", 1, 100)(value)
    assert "limit" in str(refused.value) and "100" in str(refused.value)
    assert refused.value.extra == {"field": "limit"}


@pytest.mark.parametrize(
    "value, offset", [(None, None), ("0", 0), (0, 0), ("16384", 16_384), ("999999999", 999_999_999)]
)
def test_any_length_that_a_text_can_have_is_a_valid_offset(
    value: Any, offset: Optional[int]
) -> None:
    assert cab.validate_offset(value) == offset


@pytest.mark.parametrize(
    "value", [1_000_000_000, "1000000000", "-0", *NOT_NUMBERS], ids=lambda value: "%.20r" % (value,)
)
def test_an_offset_that_no_text_can_have_is_refused(value: Any) -> None:
    with pytest.raises(cab.InvalidRequest) as refused:
        cab.validate_offset(value)
    assert refused.value.extra["field"] == "after" and "after" in str(refused.value)


@pytest.mark.parametrize(
    "value, models",
    [
        (None, None),
        (["haiku"], ("haiku",)),
        (("haiku", "opus"), ("haiku", "opus")),
        (["m" * 128] * 20, ("m" * 128,) * 20),
        (["us.anthropic/claude@1:0", "sonnet[1m]"], ("us.anthropic/claude@1:0", "sonnet[1m]")),
        (["default"], ("default",)),
    ],
    ids=lambda value: "%.40r" % (value,),
)
def test_the_models_of_a_token_keep_their_order(value: Any, models: Any) -> None:
    assert cab.validate_models(value) == models


@pytest.mark.parametrize(
    "models",
    [
        [], {}, "haiku", "", 0, True, {"haiku": 1}, ["haiku"] * 21, [None], ["haiku", None], [""],
        [" "], [1], [True], [["haiku"]], ["a b"], ["-p"], ["haiku\n"], ["m" * 129], ["é"],
        ["\ud800"],
    ],
    ids=lambda value: "%.40r" % (value,),
)
def test_models_that_are_not_a_list_of_names_are_refused(models: Any) -> None:
    with pytest.raises(cab.InvalidRequest) as refused:
        cab.NewToken.parse({"name": "n", "models": models})
    assert refused.value.extra["field"] == "models" and "model" in str(refused.value)


@pytest.mark.parametrize(
    "key", [None, "a", " ", "é", "k" * 200, "8e03978e-40d5-43dd-bc93-6894a57f9324"]
)
def test_any_text_of_at_most_200_characters_is_a_valid_key(key: Optional[str]) -> None:
    assert cab.validate_idempotency_key(key) == key


@pytest.mark.parametrize(
    "key", ["", "k" * 201, "k" * 16_000], ids=lambda key: "%.5s%d" % (key, len(key))
)
def test_an_empty_or_too_long_key_is_refused(key: str) -> None:
    with pytest.raises(cab.InvalidRequest) as refused:
        cab.validate_idempotency_key(key)
    assert refused.value.extra == {"field": "Idempotency-Key"} and "200" in str(refused.value)


@pytest.mark.parametrize(
    "value, statuses",
    [
        (None, ()),
        ("", ()),
        ("queued", ("queued",)),
        ("error,completed", ("error", "completed")),
        ("queued,processing,completed,error", ("queued", "processing", "completed", "error")),
    ],
)
def test_statuses_are_joined_by_commas(value: Optional[str], statuses: Tuple[str, ...]) -> None:
    assert cab.validate_statuses(value) == statuses


@pytest.mark.parametrize(
    "value",
    [
        "QUEUED", "done", "queued,", ",queued", ",", "queued, error", "queued;error", " ",
        "queued\n", "none",
    ],
)
def test_an_unknown_status_is_refused_and_the_error_lists_the_known_ones(value: str) -> None:
    with pytest.raises(cab.InvalidRequest) as refused:
        cab.validate_statuses(value)
    assert refused.value.extra == {"field": "status"}
    assert all(
        status in str(refused.value) for status in ("queued", "processing", "completed", "error")
    )


def fingerprint(body: Dict[str, Any]) -> str:
    """Return the fingerprint of the request with this body."""
    return str(cab.Ask.parse(body)[0].fingerprint)


PHOTO = {"name": "a.png", "mediaType": "image/png", "data": "aGk="}
FULL_BODY = {
    "message": "hi",
    "model": "haiku",
    "systemPrompt": "Be brief.",
    "jsonSchema": {"type": "object"},
    "conversation": "trip",
    "effort": "low",
}


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"wait": 30}, {"wait": "30"}, {"stream": True}, {"stream": False, "wait": 0},
        {"wait": None, "stream": None}, {"unknown": "x"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("body", [{"message": "hi"}, FULL_BODY], ids=len)
def test_equal_requests_have_the_same_fingerprint(
    body: Dict[str, Any], fields: Dict[str, Any]
) -> None:
    request = {**fields, **body}
    assert (
        fingerprint(request)
        == fingerprint(dict(reversed(list(request.items()))))
        == fingerprint(body)
    )


def test_a_field_with_its_default_value_does_not_change_the_fingerprint() -> None:
    nothing = {
        "model": "default",
        "systemPrompt": "",
        "jsonSchema": None,
        "conversation": None,
        "effort": None,
    }
    assert fingerprint({"message": "hi", **nothing}) == fingerprint({"message": "hi"})


def test_every_other_field_changes_the_fingerprint_and_no_two_bodies_share_one() -> None:
    changes: Dict[str, List[Any]] = {
        "message": ["hi ", "Hi", "HI"],
        "model": ["sonnet", "low", None],
        "systemPrompt": ["trip", "", "be brief."],
        "jsonSchema": [{"properties": {}}, {"type": "object", "minProperties": 1}, None],
        "conversation": ["haiku", "Trip", None],
        "effort": ["high", None],
        "callback": ["https://example.com/hook"],
        "attachments": [[PHOTO], [{**PHOTO, "name": "b.png"}], [PHOTO, PHOTO]],
    }
    assert {cab.camel_case(row.name) for row in fields_of(cab.Ask)} == {*changes, "wait", "stream"}
    bodies = [
        FULL_BODY,
        *({**FULL_BODY, name: value} for name, values in changes.items() for value in values),
        *(
            {"message": "hi", name: "low"}
            for name in ("model", "systemPrompt", "conversation", "effort")
        ),
        *(
            {"message": "hi", "model": "abcd"[:cut], "systemPrompt": "abcd"[cut:]}
            for cut in (1, 2, 3)
        ),
    ]
    fingerprints = [fingerprint(body) for body in bodies]
    assert len(set(fingerprints)) == len(bodies)
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in fingerprints)


def test_unknown_fields_are_named_in_warnings_and_ignored() -> None:
    ask, warnings = cab.Ask.parse(
        {"message": "hi", "systemPromt": "x", "system_prompt": "y", "\ud800": 1}
    )
    assert ask == cab.Ask("hi")
    assert warnings == [
        "unknown field 'systemPromt' ignored", "unknown field 'system_prompt' ignored",
        "unknown field '\ufffd' ignored",
    ]


def test_warnings_are_few_and_short_for_any_body() -> None:
    _, warnings = cab.Ask.parse(
        {"message": "hi", **{"x%d" % n + "y" * 1000: n for n in range(100)}}
    )
    assert len(warnings) == 10 and max(map(len, warnings)) < 100


def test_a_name_alone_is_a_token_with_the_original_s_defaults() -> None:
    assert cab.NewToken.parse({"name": "  my app "}) == (
        cab.NewToken("my app", None, None, None, None, "stateless", False, "none"),
        [],
    )


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"name": "n" * 100}, {}), ({"name": "😀" * 100}, {}),
        ({"name": "a\ud800"}, {"name": "a\ufffd"}),
        ({"sessionMode": "stateful"}, {"session_mode": "stateful"}),
        ({"sessionMode": "stateless"}, {}), ({"sessionMode": ""}, {}), ({"sessionMode": None}, {}),
        ({"expiresInDays": None}, {}), ({"expiresInDays": 1}, {"expires_in_days": 1}),
        ({"expiresInDays": 7}, {"expires_in_days": 7}),
        ({"expiresInDays": 30}, {"expires_in_days": 30}),
        ({"expiresInDays": 90}, {"expires_in_days": 90}),
        # JSON has one kind of number, however it is written, as in the original.
        ({"expiresInDays": 7.0}, {"expires_in_days": 7}),
        ({"admin": True}, {"admin": True}), ({"admin": False}, {}), ({"admin": None}, {}),
        ({"tools": None}, {}), ({"tools": "none"}, {}), ({"tools": "read"}, {"tools": "read"}),
        ({"tools": "web"}, {"tools": "web"}), ({"tools": "all"}, {"tools": "all"}),
        ({"tools": ["Read", "Bash(git log:*)"]}, {"tools": ("Read", "Bash(git log:*)")}),
        ({"tools": ["mcp__calc__add"]}, {"tools": ("mcp__calc__add",)}),
        ({"tools": ["Read"] * 50}, {"tools": ("Read",) * 50}),
        ({"requestsPerMinute": None}, {"requests_per_minute": None}),
        ({"requestsPerDay": None}, {"requests_per_day": None}),
        ({"models": None}, {"models": None}),
        ({"requestsPerMinute": 1}, {"requests_per_minute": 1}),
        ({"requestsPerMinute": 10_000.0}, {"requests_per_minute": 10_000}),
        ({"requestsPerDay": 1}, {"requests_per_day": 1}),
        ({"requestsPerDay": 1_000_000}, {"requests_per_day": 1_000_000}),
        ({"models": ["haiku"]}, {"models": ("haiku",)}),
        ({"models": ["haiku", "sonnet[1m]"]}, {"models": ("haiku", "sonnet[1m]")}),
    ],
    ids=lambda value: "%.40r" % (value,),
)
def test_these_fields_of_a_new_token_are_accepted(
    fields: Dict[str, Any], expected: Dict[str, Any]
) -> None:
    new, warnings = cab.NewToken.parse({"name": "my-app", **fields})
    assert warnings == []
    assert {name: getattr(new, name) for name in expected} == expected


BAD_NAME, BAD_MODE = "Token name is required", 'sessionMode must be "stateful" or "stateless"'
NO_LIMITS: List[Any] = [0, -1, 10_001, 0.005, "many", [1]]
BAD_DAYS = "expiresInDays must be a whole number from 1 to 3650"


@pytest.mark.parametrize(
    "body, field, text",
    [
        (None, "name", BAD_NAME),
        ([], "name", BAD_NAME),
        ({}, "name", BAD_NAME),
        ({"name": None}, "name", BAD_NAME),
        ({"name": " "}, "name", BAD_NAME),
        ({"name": 1}, "name", BAD_NAME),
        ({"name": ["n"]}, "name", BAD_NAME),
        ({"name": "n" * 101}, "name", "Token name must be 100 characters or less"),
        # The length counts before the name is trimmed.
        ({"name": " " * 100 + "n"}, "name", "Token name must be 100 characters or less"),
        ({"name": "n", "sessionMode": "x"}, "sessionMode", BAD_MODE),
        ({"name": "n", "sessionMode": True}, "sessionMode", BAD_MODE),
        ({"name": "n", "sessionMode": ["stateful"]}, "sessionMode", BAD_MODE),
        ({"name": "n", "expiresInDays": 0}, "expiresInDays", BAD_DAYS),
        ({"name": "n", "expiresInDays": 3651}, "expiresInDays", BAD_DAYS),
        ({"name": "n", "expiresInDays": "week"}, "expiresInDays", BAD_DAYS),
        ({"name": "n", "expiresInDays": True}, "expiresInDays", BAD_DAYS),
        ({"name": "n", "expiresInDays": 7.5}, "expiresInDays", BAD_DAYS),
        ({"name": "n", "expiresInDays": [7]}, "expiresInDays", BAD_DAYS),
        # The original has no such fields.
        ({"name": "n", "admin": 1}, "admin", None),
        ({"name": "n", "admin": "true"}, "admin", None),
        *[
            ({"name": "n", "requestsPerMinute": bad}, "requestsPerMinute", None)
            for bad in NO_LIMITS
        ],
        *[
            ({"name": "n", "requestsPerDay": bad * 100}, "requestsPerDay", None)
            for bad in NO_LIMITS
        ],
    ],
    ids=lambda value: "%.50r" % (value,),
)
def test_an_invalid_new_token_is_refused_with_the_text_of_the_original(
    body: Any, field: str, text: Optional[str]
) -> None:
    with pytest.raises(cab.InvalidRequest) as refused:
        cab.NewToken.parse(body)
    error = cab.error_body(refused.value)
    assert error == {"error": text or error["error"], "code": "invalid_request", "field": field}
    assert field in error["error"] or text


@pytest.mark.parametrize(
    "tools",
    [
        "", "write", "Read", True, 1, {}, [], ["Read"] * 51, [1], [None], [""], ["-Read"],
        ["Read,Bash"], ["Read Bash"], ["Bash()"], ["Bash(a)b"], ["Bash(a(b))"], ["Bash(a\nb)"],
        ['Bash("a")'], ["Bash(" + "a" * 201 + ")"], ["B" * 65], ["--dangerously-skip-permissions"],
    ],
    ids=lambda tools: "%.30r" % (tools,),
)
def test_tools_that_are_neither_a_level_nor_rules_are_refused(tools: Any) -> None:
    with pytest.raises(cab.InvalidRequest) as refused:
        cab.NewToken.parse({"name": "n", "tools": tools})
    assert refused.value.extra["field"] == "tools"


def test_a_rule_reaches_the_database_and_a_command_line_as_utf_8() -> None:
    try:
        new, _ = cab.NewToken.parse({"name": "n", "tools": ["Bash(\ud800)"]})
    except cab.InvalidRequest:
        # To refuse the rule is correct, too.
        return
    assert cab.as_json(new.tools).encode("utf-8")


# --- JSON, headers, tokens and times ---


@pytest.mark.parametrize(
    "data, value",
    [
        (b"{}", {}), (b' {"a": 1}\n', {"a": 1}), (b"\xef\xbb\xbf{}", {}), (b'"\xc3\xa9"', "é"),
        (b"null", None), (b'{"a":1,"a":2}', {"a": 2}), (b'"\\ud800"', "\ud800"),
        (b"9" * 400, int("9" * 400)),
    ],
    ids=lambda value: "%.20r" % (value,),
)
def test_a_body_in_json_is_read(data: bytes, value: Any) -> None:
    assert cab.parse_json(data) == value


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}")])
def test_a_hundred_levels_are_read_and_one_more_is_not(opening: bytes, closing: bytes) -> None:
    cab.parse_json(opening * 100 + b"1" + closing * 100)
    for levels in (101, 1000):
        with pytest.raises(cab.InvalidJson, match="nested too deeply"):
            cab.parse_json(opening * levels + b"1" + closing * levels)


def test_a_reader_with_a_small_stack_sees_no_deep_nesting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab.json, "loads", lambda *args, **options: pytest.fail("it was read"))
    with pytest.raises(cab.InvalidJson, match="nested too deeply"):
        cab.parse_json(b"[" * 101)


@pytest.mark.parametrize(
    "value",
    [
        [[]] * 500, "[" * 500, "\\" + "[" * 500, '"' + "[" * 500, '\\"' + "{" * 500,
        {"[" * 101: ["]", "[", {"a": "}"}]}, ["a\\", "[" * 300, '\\"'],
    ],
)
def test_brackets_side_by_side_or_in_texts_are_no_nesting(value: Any) -> None:
    for options in ({}, {"ensure_ascii": False}, {"indent": 1}):
        assert cab.parse_json(json.dumps(value, **options).encode()) == value


@pytest.mark.parametrize(
    "data",
    [
        b"", b" ", b"\xef\xbb\xbf", b"{", b"{} {}", b"{'a':1}", b'{"a":NaN}', b"Infinity",
        b"-Infinity", b'"\xff"', b"\xed\xa0\x80", b'"a\nb"', '{"a":1}'.encode("utf-16"),
        b"[" * 200_000, b'{"a":' * 150_000, b"9" * 100_000,
    ],
    ids=lambda data: "%.20r" % data,
)
def test_a_body_that_is_not_json_is_refused_with_the_reason(data: bytes) -> None:
    with pytest.raises(cab.InvalidJson) as refused:
        cab.parse_json(data)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")
    assert re.match(r"Body is not valid (JSON|UTF-8)\b.{5,}", str(refused.value))


def test_no_depth_of_nesting_is_an_unexpected_error() -> None:
    # The recursion limits of the parser and the serializer differ a little: one may accept what
    # the other refuses.
    for depth in list(range(90, 110)) + list(range(900, 1010)):
        body = b'{"message":"x","jsonSchema":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"
        try:
            ask, _ = cab.Ask.parse(cab.parse_json(body))
        except cab.BridgeError:
            continue
        json.dumps(
            cab.initialize_requests(cab.SessionConfig("", json_schema=ask.json_schema), NEWEST)
        )


@pytest.mark.parametrize(
    "headers, token",
    [
        ({}, None), ({"authorization": "Basic cab-1"}, None), ({"authorization": "Bearer"}, None),
        ({"authorization": "Bearer   "}, None), ({"authorization": "cab-1"}, None),
        ({"authorization": "Bearer cab-1"}, "cab-1"), ({"authorization": "bearer cab-1"}, "cab-1"),
        ({"authorization": "BEARER    cab-1  "}, "cab-1"),
        ({"authorization": "  Bearer cab-1"}, "cab-1"), ({"x-api-key": "cab-2"}, "cab-2"),
        ({"x-api-key": "  "}, None),
        ({"authorization": "Bearer cab-1", "x-api-key": "cab-2"}, "cab-1"),
        ({"authorization": "Basic x", "x-api-key": "cab-2"}, "cab-2"),
    ],
    ids=lambda value: "%.50r" % (value,),
)
def test_the_token_is_read_from_the_headers(headers: Dict[str, str], token: Any) -> None:
    assert cab.bearer(headers) == token


def test_tokens_have_the_format_of_the_original_and_never_repeat() -> None:
    tokens = {cab.new_token() for _ in range(100)}
    assert len(tokens) == 100 and all(re.fullmatch(r"cab-[0-9a-f]{64}", token) for token in tokens)


def test_a_token_has_the_same_digest_as_in_the_original() -> None:
    assert cab.digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


SECRET = "cab-" + "0123456789abcdef" * 4
KEY = "sk-ant-oat01-" + "Ab_9-" * 18


@pytest.mark.parametrize(
    "text, shown",
    [
        ("nothing to hide", "nothing to hide"), (SECRET, "cab-0123..."),
        ("Bearer %s." % SECRET, "Bearer cab-0123...."),
        (SECRET + " " + SECRET, "cab-0123... cab-0123..."),
        ('{"token":"%s"}' % SECRET, '{"token":"cab-0123..."}'),
        ("key=" + KEY, "key=sk-ant-oat01..."), ("prefix cab-01234567", "prefix cab-01234567"),
        # as a traceback or a log may show it
        (repr("\n" + SECRET), "'\\ncab-0123...'"),
        ("token_" + SECRET, "token_cab-0123..."),
    ],
    ids=lambda text: text[:16],
)
def test_secrets_are_cut_in_logs(text: str, shown: str) -> None:
    assert cab.redact(text) == shown


@pytest.mark.parametrize(
    "moment, text",
    [
        (None, None),
        (0, "1970-01-01T00:00:00.000Z"),
        (1_769_860_800, "2026-01-31T12:00:00.000Z"),
        (1_769_860_800.5, "2026-01-31T12:00:00.500Z"),
    ],
)
def test_times_are_written_in_the_format_of_the_original(moment: Any, text: Any) -> None:
    assert cab.iso_time(moment) == text


def test_an_error_body_begins_with_the_sentence_and_ends_with_extra_fields() -> None:
    assert list(cab.error_body(cab.QueueFull(retryAfter=10)).items()) == [
        ("error", "Queue is full. Please try again later."),
        ("code", "queue_full"),
        ("retryAfter", 10),
    ]


# --- rate limits ---


def count_grants(bucket: cab.TokenBucket, tries: int) -> int:
    """Return how many of these requests the bucket grants."""
    return sum(bucket.try_consume() == 0 for _ in range(tries))


def test_a_bucket_grants_its_capacity_at_once_and_then_returns_the_wait(clock: FakeClock) -> None:
    bucket = cab.TokenBucket(clock, 120)
    assert count_grants(bucket, 120) == 120
    assert bucket.try_consume() == pytest.approx(0.5)
    # A refused request costs nothing.
    assert bucket.try_consume() == pytest.approx(0.5)


def test_a_bucket_refills_steadily_and_never_beyond_its_capacity(clock: FakeClock) -> None:
    bucket = cab.TokenBucket(clock, 120)
    count_grants(bucket, 120)
    clock.advance(5)
    assert count_grants(bucket, 20) == 10
    clock.advance(86_400)
    assert count_grants(bucket, 200) == 120


def test_a_client_that_waits_as_long_as_advised_is_admitted(clock: FakeClock) -> None:
    bucket = cab.TokenBucket(clock, 7)
    for _ in range(100):
        seconds = bucket.try_consume()
        if seconds:
            clock.advance(math.ceil(seconds))
            assert bucket.try_consume() == 0


def test_a_bucket_of_capacity_0_has_no_limit(clock: FakeClock) -> None:
    bucket = cab.TokenBucket(clock, 0)
    assert count_grants(bucket, 1000) == 1000 and bucket.headers() == ()


def test_a_bucket_has_the_headers_of_the_draft_standard(clock: FakeClock) -> None:
    bucket = cab.TokenBucket(clock, 120)
    count_grants(bucket, 3)
    assert bucket.headers() == (
        ("RateLimit-Policy", "120;w=60"),
        ("RateLimit-Limit", "120"),
        ("RateLimit-Remaining", "117"),
        ("RateLimit-Reset", "2"),
    )
    count_grants(bucket, 200)
    assert dict(bucket.headers())["RateLimit-Remaining"] == "0"


def test_a_clock_that_goes_backwards_takes_nothing_away(clock: FakeClock) -> None:
    bucket = cab.TokenBucket(clock, 60)
    count_grants(bucket, 59)
    clock.advance(-3600)
    assert count_grants(bucket, 60) == 1
    clock.advance(1)
    # Time counts again from there.
    assert count_grants(bucket, 60) == 1


def test_threads_share_a_bucket_exactly(clock: FakeClock) -> None:
    bucket, granted = cab.TokenBucket(clock, 100), []
    threads = [
        threading.Thread(target=lambda: granted.append(count_grants(bucket, 50)), name="taker")
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == 100


# --- lines of the CLI ---


@pytest.mark.parametrize("seed", range(20))
def test_any_chunking_gives_the_same_lines(seed: int) -> None:
    chance = random.Random(seed)
    expected, data = [], b""
    for _ in range(30):
        line = bytes(
            chance.choice(b'{}":a \xc3\xa9\x00\r') for _ in range(chance.choice((0, 1, 5, 40)))
        ).rstrip(b"\r")
        data += line + chance.choice((b"\n", b"\r\n"))
        expected += [line] if line.strip() else []
    framer, lines, start = cab.LineFramer(64), [], 0
    while start < len(data):
        size = chance.choice((1, 2, 3, 17, 500))
        lines += framer.feed(data[start : start + size])
        start += size
    assert lines == expected
    # A line counts only when it is complete.
    assert framer.feed(b"rest") == []
    assert framer.feed(b"\n") == [b"rest"]


@pytest.mark.parametrize(
    "chunks, is_fine",
    [
        ([b"x" * 64 + b"\n"], True), ([b"x" * 65 + b"\n"], False), ([b"x" * 64], True),
        ([b"x" * 65], False), ([b"x" * 40] * 2, False),
        ([b"x" * 40, b"\n" + b"x" * 40, b"\n"], True), ([b"a\nb\n" * 100], True),
        ([b"a\n" + b"x" * 65 + b"\nb\n"], False),
    ],
    ids=[
        "at the limit", "over it", "unfinished at the limit", "unfinished over it", "in pieces",
        "two lines", "many lines", "in the middle",
    ],
)
def test_a_line_beyond_the_limit_is_an_overflow(chunks: Sequence[bytes], is_fine: bool) -> None:
    framer = cab.LineFramer(64)
    with contextlib.nullcontext() if is_fine else pytest.raises(OverflowError):
        for chunk in chunks:
            framer.feed(chunk)


def stream(event: Any, **fields: Any) -> Dict[str, Any]:
    return {"type": "stream_event", "event": event, "parent_tool_use_id": None, **fields}


def assistant(*blocks: Mapping[str, Any], **fields: Any) -> Dict[str, Any]:
    return {
        "type": "assistant",
        "message": {"role": "assistant", "content": list(blocks)},
        **fields,
    }


TEXT_DELTA = {
    "type": "content_block_delta",
    "index": 0,
    "delta": {"type": "text_delta", "text": "Héllo"},
}


@pytest.mark.parametrize(
    "message, kind, text",
    [
        ({"type": "system", "subtype": "init", "apiKeySource": "none"}, "init", ""),
        ({"type": "system", "subtype": "status"}, "noise", ""),
        ({"type": "system", "subtype": "api_retry", "attempt": 1}, "retry", ""),
        (stream(TEXT_DELTA), "delta", "Héllo"),
        (
            stream(
                {
                    "type": "content_block_delta",
                    "delta": {"type": "input_json_delta", "partial_json": "{"},
                }
            ),
            "block", "",
        ),
        (
            stream(
                {
                    "type": "content_block_delta",
                    "delta": {"type": "thinking_delta", "thinking": "hm"},
                }
            ),
            "block", "",
        ),
        (stream({"type": "content_block_delta"}), "block", ""),
        (stream({"type": "content_block_start"}), "block", ""),
        (stream({"type": "content_block_stop"}, parent_tool_use_id="toolu_1"), "noise", ""),
        (stream({"type": "message_start", "message": {}}), "message_start", ""),
        (stream({"type": "message_delta", "usage": {}}), "message_delta", ""),
        (stream({"type": "message_stop"}), "noise", ""),
        (stream(None), "noise", ""),
        # The text of a subagent is not part of the answer.
        (stream(TEXT_DELTA, parent_tool_use_id="toolu_1"), "noise", ""),
        (stream({"type": "message_start"}, parent_tool_use_id="toolu_1"), "noise", ""),
        (assistant({"type": "text", "text": "Hi"}), "assistant", ""),
        (
            assistant(
                {"type": "text", "text": "Hi"}, {"type": "tool_use", "id": "t1", "name": "Bash"}
            ),
            "assistant", "",
        ),
        ({"type": "assistant", "message": {"content": "Hi"}}, "assistant", ""),
        ({"type": "assistant"}, "assistant", ""),
        ({"type": "user", "message": {"role": "user", "content": []}}, "tool_result", ""),
        (
            {
                "type": "user",
                "message": {"role": "user", "content": "[Request interrupted by user]"},
            },
            "tool_result", "",
        ),
        ({"type": "result", "subtype": "success"}, "result", ""),
        ({"type": "control_response", "response": {}}, "control_response", ""),
        ({"type": "control_request", "request_id": "1"}, "control_request", ""),
        ({"type": "rate_limit_event", "rate_limit_info": {"status": "allowed"}}, "rate_limits", ""),
        ({"type": "rate_limit_event"}, "rate_limits", ""),
        ({"type": "conversation_reset"}, "noise", ""),
        ({"type": ["x"]}, "noise", ""),
        ({}, "noise", ""),
    ],
    ids=lambda value: "%.60s" % json.dumps(value) if isinstance(value, dict) else None,
)
def test_a_line_of_the_cli_is_parsed(message: Dict[str, Any], kind: str, text: str) -> None:
    event = cab.parse_cli_event(json.dumps(message, ensure_ascii=False).encode())
    assert (event.kind, event.text, event.body) == (kind, text, message)


def test_a_line_names_the_tool_calls_that_start_and_finish_with_it() -> None:
    calls = assistant(
        {"type": "tool_use", "id": "t1"}, {"type": "text", "text": "and"},
        {"type": "tool_use", "id": "t2"},
    )
    results = {
        "type": "user",
        "message": {"content": [{"type": "tool_result", "tool_use_id": "t1", "content": "ok"}]},
    }
    events = [cab.parse_cli_event(json.dumps(line).encode()) for line in (calls, results)]
    assert [event.tool_ids for event in events] == [("t1", "t2"), ("t1",)]


@pytest.mark.parametrize(
    "line", [b"[DEBUG] starting", b"undefined", b"[1, 2]", b"\xff\xfe", b"   "]
)
def test_a_line_that_is_not_an_object_is_noise(line: bytes) -> None:
    assert cab.parse_cli_event(line) == cab.CliEvent("noise")


@pytest.mark.parametrize(
    "line", [b'{"type": "assis', b"{", b'{"a": 1} trailing', b"  {'type': 'result'}"]
)
def test_a_broken_json_line_is_an_error(line: bytes) -> None:
    with pytest.raises(ValueError):
        cab.parse_cli_event(line)


def test_invalid_utf_8_does_not_break_a_line() -> None:
    assert cab.parse_cli_event(b'{"type":"result","result":"a\xffb"}').body["result"] == "a\ufffdb"


THROTTLED_TEXT = (
    "API Error: Server is temporarily limiting requests (not your usage limit) · Rate limited"
)
UNKNOWN_MODEL_TEXT = (
    "There's an issue with the selected model (x). "
    "It may not exist or you may not have access to it. Run --model"
)


@pytest.mark.parametrize(
    "result, error_word, code",
    [
        (
            {
                "api_error_status": 401,
                "result": "Failed to authenticate. API Error: 401 OAuth token has expired",
            },
            "authentication_failed", "auth_required",
        ),
        # Without a status the text decides.
        (
            {"result": "Failed to authenticate. API Error: 401 OAuth token has expired"}, "",
            "auth_required",
        ),
        (
            {
                "api_error_status": 403,
                "result": "Your account does not have access to Claude. Please login again.",
            },
            "authentication_failed", "auth_required",
        ),
        ({"api_error_status": 403, "result": "API Error: 403 forbidden"}, "", "auth_required"),
        (
            {"api_error_status": None, "result": "Not logged in · Please run /login"}, "",
            "auth_required",
        ),
        ({"result": "Invalid API key · Please run /login"}, "", "auth_required"),
        (
            {"api_error_status": 400, "result": "Prompt is too long · Try /compact"},
            "invalid_request", "context_too_long",
        ),
        ({"terminal_reason": "prompt_too_long", "result": "too long"}, "", "context_too_long"),
        (
            {"api_error_status": 413, "result": "Request too large (max 32MB). Double press esc"},
            "invalid_request", "request_too_large",
        ),
        (
            {"api_error_status": 400, "result": "Credit balance is too low"}, "billing_error",
            "cli_error",
        ),
        ({"api_error_status": 400, "result": "API Error: 400 bad"}, "unknown", "invalid_request"),
        (
            {"api_error_status": 404, "result": UNKNOWN_MODEL_TEXT}, "model_not_found",
            "model_not_found",
        ),
        ({"result": UNKNOWN_MODEL_TEXT}, "", "model_not_found"),
        (
            {
                "api_error_status": 429,
                "result": "You've hit your session limit · resets 8:28am (UTC)",
            },
            "rate_limit", "usage_limit",
        ),
        (
            {"result": "You've hit your weekly limit · resets Nov 25, 5:48pm (UTC)"}, "rate_limit",
            "usage_limit",
        ),
        ({"api_error_status": 429, "result": THROTTLED_TEXT}, "rate_limit", "overloaded"),
        (
            {"api_error_status": 500, "result": "API Error: 500 internal"}, "server_error",
            "network",
        ),
        (
            {
                "api_error_status": 529,
                "result": "API Error: 529 Overloaded. This is a server-side issue",
            },
            "server_error", "overloaded",
        ),
        ({"result": "API Error: 529 Overloaded"}, "server_error", "overloaded"),
        (
            {
                "api_error_status": None,
                "result": "API Error: Unable to connect to API (ConnectionRefused)",
            },
            "server_error", "network",
        ),
        ({"api_error_status": None, "result": "Request timed out"}, "server_error", "network"),
        (
            {"api_error_status": 511, "result": "API Error: 511 Network Authentication Required."},
            "server_error", "network",
        ),
        (
            {"api_error_status": 407, "result": "API Error: 407 Proxy Authentication Required"},
            "unknown", "network",
        ),
        ({"api_error_status": 402, "result": "API Error: 402 billing"}, "unknown", "cli_error"),
        (
            {"api_error_status": 422, "result": "API Error: 422 unprocessable"}, "unknown",
            "invalid_request",
        ),
        (
            {
                "api_error_status": 413, "terminal_reason": "image_error",
                "result": "The request holds more than the API takes.",
            },
            "invalid_request", "request_too_large",
        ),
        (
            {"stop_reason": "refusal", "result": "API Error: safeguards flagged this message"},
            "invalid_request", "refused",
        ),
        (
            {"result": "API Error: Claude's response exceeded the 32000 output token maximum"},
            "max_output_tokens", "cli_error",
        ),
        (
            {"result": "API Error: Claude Code is unable to respond to this request"},
            "invalid_request", "cli_error",
        ),
        (
            {"subtype": "error_max_turns", "errors": ["Reached maximum number of turns (1)"]}, "",
            "cli_error",
        ),
    ],
    ids=lambda value: "%.60s" % value.get("result", value) if isinstance(value, dict) else None,
)
def test_each_failure_of_the_cli_has_its_code_and_the_text_of_the_cli(
    result: Dict[str, Any], error_word: str, code: str
) -> None:
    failure = cab.classify_failure({"subtype": "success", "is_error": True, **result}, error_word)
    assert (failure.code, str(failure)) == (code, result.get("result") or result["errors"][0])
    assert failure.code in cab.RUN_ERRORS


def test_a_failure_without_a_text_names_its_subtype() -> None:
    assert "error_during_execution" in str(
        cab.classify_failure({"subtype": "error_during_execution", "result": "", "errors": []}, "")
    )


# --- the limits of the plan ---

NOW = 1_800_000_000.0
# The times at which the windows reset, as the CLI writes them.
SOON, LATER, MONTH = 1_800_003_600, 1_800_500_000, 1_802_000_000
FIVE_HOURS = {"utilization": 0.42, "resetsAt": SOON, "status": "allowed"}
SEVEN_DAYS = {"utilization": 0.1, "resetsAt": LATER, "status": "allowed"}
USED_UP = {
    "status": "rejected",
    "resetsAt": SOON,
    "rateLimitType": "five_hour",
    "isUsingOverage": False,
}


def window(
    kind: str, status: Optional[str], utilization: Optional[float], resets_at: Optional[float]
) -> cab.RateLimitWindow:
    return cab.RateLimitWindow(kind, status, utilization, resets_at, NOW)


REJECTED = window("five_hour", "rejected", None, SOON)
NO_OVERAGE = window("overage", None, None, None)
LIMIT_EXAMPLES: List[Tuple[str, Any, cab.RateLimitStatus]] = [
    (
        "2.1.330 allowed",
        {
            "status": "allowed",
            "resetsAt": SOON,
            "rateLimitType": "five_hour",
            "isUsingOverage": False,
            "unifiedWindows": {"five_hour": FIVE_HOURS, "seven_day": SEVEN_DAYS},
        },
        cab.RateLimitStatus(
            False,
            False,
            SOON,
            (
                window("five_hour", "allowed", 0.42, SOON),
                window("seven_day", "allowed", 0.1, LATER),
                NO_OVERAGE,
            ),
        ),
    ),
    (
        "2.1.330 nearly",
        {
            "status": "allowed_warning",
            "resetsAt": LATER,
            "rateLimitType": "seven_day",
            "utilization": 0.92,
            "surpassedThreshold": 0.9,
            "isUsingOverage": False,
            "unifiedWindows": {
                "five_hour": {"utilization": 0.42, "resetsAt": SOON},
                "seven_day": {"utilization": 0.92, "resetsAt": LATER},
            },
        },
        cab.RateLimitStatus(
            False,
            False,
            LATER,
            (
                window("seven_day", "allowed_warning", 0.92, LATER),
                window("five_hour", None, 0.42, SOON),
                NO_OVERAGE,
            ),
        ),
    ),
    (
        "2.1.330 used up",
        {
            **USED_UP,
            "unifiedWindows": {
                "five_hour": {"utilization": 1, "resetsAt": SOON},
                "seven_day": SEVEN_DAYS,
            },
        },
        cab.RateLimitStatus(
            True,
            False,
            SOON,
            (
                window("five_hour", "rejected", 1.0, SOON),
                window("seven_day", "allowed", 0.1, LATER),
                NO_OVERAGE,
            ),
        ),
    ),
    (
        "2.1.330 both used up",
        {
            **USED_UP,
            "unifiedWindows": {
                "five_hour": {"utilization": 1, "resetsAt": SOON},
                "seven_day": {"utilization": 1.07, "resetsAt": LATER, "status": "rejected"},
            },
        },
        cab.RateLimitStatus(
            True,
            False,
            LATER,
            (
                window("five_hour", "rejected", 1.0, SOON),
                window("seven_day", "rejected", 1.07, LATER),
                NO_OVERAGE,
            ),
        ),
    ),
    (
        "2.1.330 paid usage",
        {
            **USED_UP,
            "overageStatus": "allowed",
            "overageResetsAt": MONTH,
            "isUsingOverage": True,
            "unifiedWindows": {"five_hour": {"utilization": 1, "resetsAt": SOON}},
        },
        cab.RateLimitStatus(
            False,
            True,
            SOON,
            (window("five_hour", "rejected", 1.0, SOON), window("overage", "in_use", None, SOON)),
        ),
    ),
    (
        "2.1.330 paid usage to the later of two resets",
        {
            **USED_UP,
            "isUsingOverage": True,
            "unifiedWindows": {
                "five_hour": {"utilization": 1, "resetsAt": SOON},
                "seven_day": {"utilization": 1, "resetsAt": LATER},
            },
        },
        cab.RateLimitStatus(
            False,
            True,
            LATER,
            (
                window("five_hour", "rejected", 1.0, SOON),
                window("seven_day", None, 1.0, LATER),
                window("overage", "in_use", None, LATER),
            ),
        ),
    ),
    (
        "2.1.330 no paid usage left",
        {**USED_UP, "overageStatus": "rejected", "overageResetsAt": MONTH},
        cab.RateLimitStatus(
            True, False, SOON, (REJECTED, window("overage", "rejected", None, MONTH))
        ),
    ),
    (
        "2.1.197 allowed",
        {
            "status": "allowed",
            "resetsAt": SOON,
            "rateLimitType": "five_hour",
            "isUsingOverage": False,
        },
        cab.RateLimitStatus(
            False, False, SOON, (window("five_hour", "allowed", None, SOON), NO_OVERAGE)
        ),
    ),
    (
        "2.1.197 nearly",
        {
            "status": "allowed_warning",
            "resetsAt": SOON,
            "rateLimitType": "five_hour",
            "utilization": 0.92,
            "surpassedThreshold": 0.9,
            "isUsingOverage": False,
        },
        cab.RateLimitStatus(
            False, False, SOON, (window("five_hour", "allowed_warning", 0.92, SOON), NO_OVERAGE)
        ),
    ),
    ("2.1.197 used up", USED_UP, cab.RateLimitStatus(True, False, SOON, (REJECTED, NO_OVERAGE))),
    (
        "2.1.197 paid usage",
        {**USED_UP, "overageStatus": "allowed", "overageResetsAt": MONTH, "isUsingOverage": True},
        cab.RateLimitStatus(False, True, SOON, (REJECTED, window("overage", "in_use", None, SOON))),
    ),
    (
        "paid usage could follow",
        {**USED_UP, "status": "allowed", "overageStatus": "allowed", "overageResetsAt": MONTH},
        cab.RateLimitStatus(
            False,
            False,
            SOON,
            (window("five_hour", "allowed", None, SOON), window("overage", "allowed", None, MONTH)),
        ),
    ),
    ("any other 429", {"status": "rejected", "isUsingOverage": False}, cab.RateLimitStatus()),
    (
        "no reset reported",
        {"status": "rejected", "rateLimitType": "five_hour", "isUsingOverage": False},
        cab.RateLimitStatus(
            True, False, None, (window("five_hour", "rejected", None, None), NO_OVERAGE)
        ),
    ),
    (
        "paid usage, no reset reported",
        {"status": "rejected", "rateLimitType": "five_hour", "isUsingOverage": True},
        cab.RateLimitStatus(
            False,
            True,
            None,
            (window("five_hour", "rejected", None, None), window("overage", "in_use", None, None)),
        ),
    ),
    (
        "no type reported", {"status": "rejected", "resetsAt": SOON},
        cab.RateLimitStatus(True, False, SOON),
    ),
    ("nothing reported", {}, cab.RateLimitStatus()),
    (
        "a word is not true", {**USED_UP, "isUsingOverage": "false"},
        cab.RateLimitStatus(True, False, SOON, (REJECTED, NO_OVERAGE)),
    ),
    (
        "true is not a number",
        {
            "rateLimitType": "five_hour",
            "utilization": True,
            "resetsAt": True,
            "overageResetsAt": True,
        },
        cab.RateLimitStatus(
            False, False, None, (window("five_hour", None, None, None), NO_OVERAGE)
        ),
    ),
    (
        "a text is not a number",
        {"rateLimitType": "five_hour", "utilization": "1", "resetsAt": "1800003600"},
        cab.RateLimitStatus(
            False, False, None, (window("five_hour", None, None, None), NO_OVERAGE)
        ),
    ),
]


@pytest.mark.parametrize(
    "name, info, expected", LIMIT_EXAMPLES, ids=[name for name, *_ in LIMIT_EXAMPLES]
)
def test_the_limits_of_the_plan_are_parsed_as_the_cli_reports_them(
    name: str, info: Any, expected: cab.RateLimitStatus
) -> None:
    line = json.dumps(
        {"type": "rate_limit_event", "rate_limit_info": info, "uuid": "u", "session_id": "s"}
    ).encode()
    assert cab.parse_rate_limits(cab.parse_cli_event(line).body, NOW) == expected


ODD: List[Any] = [
    None, True, False, 0, -1, 1, 1e10, 1e11, 1e308, -1e308, 10**400, float("nan"), float("inf"),
    float("-inf"), "", "rejected", "allowed", "five_hour", "x" * 1_000, "0.5", "\ud800", [], [[]],
    [{}], ["rejected"], {}, {"a": 1}, {"utilization": True, "resetsAt": "soon"},
]
MANY = {"unifiedWindows": {"w%d" % n: {"resetsAt": SOON} for n in range(1000)}}


def check_limits(limits: cab.RateLimitStatus) -> None:
    """Check that the parsed limits can be compared, stored and shown."""
    assert isinstance(limits.is_used_up, bool) and isinstance(limits.is_using_overage, bool)
    assert len(limits.windows) <= 11
    numbers = [
        limits.resets_at,
        *(number for window in limits.windows for number in (window.utilization, window.resets_at)),
    ]
    for number in numbers:
        assert number is None or (type(number) is float and 0 <= number < 1e11)
    words = [word for window in limits.windows for word in (window.kind, window.status)]
    assert all(word is None or isinstance(word, str) and len(word) <= 40 for word in words)
    assert all(isinstance(window.kind, str) and window.seen_at == NOW for window in limits.windows)


@pytest.mark.parametrize("info", [*ODD, MANY], ids=lambda info: "%.30r" % (info,))
def test_invalid_limits_break_nothing(info: Any) -> None:
    check_limits(cab.parse_rate_limits({"rate_limit_info": info}, NOW))
    check_limits(cab.parse_rate_limits({"type": info}, NOW))
    for key in (*LIMIT_EXAMPLES[4][1], "utilization"):
        check_limits(
            cab.parse_rate_limits({"rate_limit_info": {**LIMIT_EXAMPLES[4][1], key: info}}, NOW)
        )


@pytest.mark.parametrize("seed", range(20))
def test_no_mixture_of_odd_values_breaks_the_limits(seed: int) -> None:
    chance = random.Random(seed)

    def part(*more: str) -> Dict[str, Any]:
        """Return some of these fields, with odd values."""
        names = ("status", "resetsAt", "utilization", *more)
        return {name: chance.choice((*ODD, SOON, 0.5)) for name in names if chance.random() < 0.7}

    for _ in range(200):
        info = part(
            "rateLimitType", "isUsingOverage", "overageStatus", "overageResetsAt", "unifiedWindows"
        )
        if chance.random() < 0.7:
            info["unifiedWindows"] = {
                name: chance.choice((part(), part(), *ODD))
                for name in ("five_hour", "seven_day", "x" * 50)
            }
        check_limits(cab.parse_rate_limits({"rate_limit_info": info}, NOW))


@pytest.mark.parametrize(
    "resets_at, seconds",
    [
        (None, 900), (NOW, 5), (NOW + 1, 5), (NOW + 5, 5), (NOW + 6, 6), (NOW + 3_600.5, 3_600.5),
        (NOW + 8 * 86_400, 691_200), (NOW + 8 * 86_400 + 1, 691_200), (9e10, 691_200),
        (NOW - 60, 5), (NOW - 61, 900), (0.0, 900),
    ],
)
def test_a_pause_lasts_until_the_reset_within_bounds(
    resets_at: Optional[float], seconds: float
) -> None:
    assert cab.pause_seconds(resets_at, NOW) == seconds


IS_USED_UP, IS_FINE = (
    cab.RateLimitStatus(True, False, SOON),
    cab.RateLimitStatus(False, False, LATER),
)
HIT, BUSY = (
    "You've hit your session limit · resets 8:28am (UTC)",
    "API Error: Server is temporarily limiting requests · Rate limited",
)


@pytest.mark.parametrize(
    "status, text, error_word, limits, code, resets_at",
    [
        (429, HIT, "rate_limit", IS_USED_UP, "usage_limit", SOON),
        (429, HIT, "rate_limit", cab.RateLimitStatus(), "usage_limit", None),
        (None, HIT, "rate_limit", IS_FINE, "usage_limit", LATER),
        # Whatever the text: the CLI reported that the plan is used up.
        (429, BUSY, "rate_limit", IS_USED_UP, "usage_limit", SOON),
        (429, BUSY, "rate_limit", IS_FINE, "overloaded", None),
        (429, BUSY, "rate_limit", cab.RateLimitStatus(), "overloaded", None),
        (429, BUSY, "", cab.RateLimitStatus(True), "usage_limit", None),
        (None, "API Error: 429 x", "", IS_USED_UP, "usage_limit", SOON),
        (529, "API Error: 529 Overloaded", "server_error", IS_USED_UP, "overloaded", None),
        (401, "API Error: 401 x", "authentication_failed", IS_USED_UP, "auth_required", None),
        (None, "Request timed out", "", IS_USED_UP, "cli_error", None),
    ],
)
def test_only_a_used_up_plan_gives_usage_limit_and_the_time_of_its_reset(
    status: Any, text: str, error_word: str, limits: cab.RateLimitStatus, code: str, resets_at: Any
) -> None:
    failure = cab.classify_failure(
        {"api_error_status": status, "result": text, "is_error": True}, error_word, limits
    )
    assert (failure.code, failure.resets_at, str(failure)) == (code, resets_at, text)


COUNTS = {
    "input_tokens": 10,
    "output_tokens": 7,
    "cache_read_input_tokens": 1000,
    "cache_creation_input_tokens": 100,
    "service_tier": "x",
}


@pytest.mark.parametrize(
    "result, spent, usage, total",
    [
        (
            {"usage": COUNTS, "total_cost_usd": 0.00081}, 0.0, cab.Usage(10, 7, 1000, 100, 0.00081),
            0.00081,
        ),
        # The CLI reports the sum of the process.
        ({"usage": COUNTS, "total_cost_usd": 0.5}, 0.3, cab.Usage(10, 7, 1000, 100, 0.2), 0.5),
        # The process has restarted.
        ({"usage": COUNTS, "total_cost_usd": 0.1}, 0.3, cab.Usage(10, 7, 1000, 100, 0.1), 0.1),
        ({"usage": COUNTS, "total_cost_usd": 0.3}, 0.3, cab.Usage(10, 7, 1000, 100, 0.0), 0.3),
        ({}, 0.0, cab.Usage(), 0.0),
        ({"usage": None, "total_cost_usd": None}, 0.0, cab.Usage(), 0.0),
        ({"usage": {"input_tokens": None}}, 0.0, cab.Usage(), 0.0),
    ],
)
def test_the_usage_of_one_turn_is_computed_from_the_sums(
    result: Dict[str, Any], spent: float, usage: cab.Usage, total: float
) -> None:
    assert cab.turn_usage(result, spent) == (usage, total)


# --- the billing account, and the environment and flags of the CLI ---


@pytest.mark.parametrize(
    "status, signed_in, account",
    [
        ({}, False, "not signed in"),
        ({"loggedIn": False, "authMethod": "none"}, False, "not signed in"),
        (
            {"loggedIn": True, "authMethod": "claude.ai", "subscriptionType": "max"}, True,
            "Claude Max subscription",
        ),
        (
            {
                "loggedIn": True,
                "authMethod": "claude.ai",
                "subscriptionType": "max",
                "apiKeySource": "none",
            },
            True, "Claude Max subscription",
        ),
        ({"loggedIn": True, "authMethod": "oauth_token"}, True, "CLAUDE_CODE_OAUTH_TOKEN"),
        (
            {"loggedIn": True, "subscriptionType": "max", "apiKeySource": "ANTHROPIC_API_KEY"},
            True, "an API key (ANTHROPIC_API_KEY)",
        ),
        (
            {"loggedIn": True, "authMethod": "oauth_token", "apiKeySource": "apiKeyHelper"}, True,
            "an API key (apiKeyHelper)",
        ),
        ({"loggedIn": True, "authMethod": "third_party"}, True, "third_party"),
        ({"loggedIn": True}, True, "unknown"),
    ],
    ids=lambda value: "%.90r" % (value,),
)
def test_the_billing_account_is_read_from_the_login(
    status: Dict[str, Any], signed_in: bool, account: str
) -> None:
    billing = cab.parse_login(status)
    assert billing[0] is signed_in and account in billing[1]


HELP = (
    "Usage: claude [options]\n  --tools <tools...>   names\n  --setting-sources <s>  x\n"
    "Commands:\n  auth       Manage authentication\n  mcp\n"
)


@pytest.mark.parametrize(
    "version, help_text, expected",
    [
        (
            "2.1.330 (Claude Code)\n", HELP,
            ((2, 1, 330), "2.1.330 (Claude Code)", {"--tools", "--setting-sources"}),
        ),
        (
            "2.0.76 (Claude Code)", "  --tools x\n  --use-auth y  auth of a kind\n",
            ((2, 0, 76), "2.0.76 (Claude Code)", {"--tools", "--use-auth"}),
        ),
        ("", "", ((), "", set())),
        ("git version two", "", ((), "git version two", set())),
    ],
)
def test_the_features_of_a_cli_are_read_from_its_version_and_help(
    version: str, help_text: str, expected: Any
) -> None:
    assert tuple(cab.Features.read(version, help_text)) == expected


def test_a_version_text_cannot_be_long() -> None:
    assert len(cab.Features.read("2.1.330 " + "x" * 10_000, "").version_text) <= 80


# Variables that choose the billing account, the server, the model or the prompt, or that load code.
# Some names stand for a family.
STRIPPED_ENV = """
    ANTHROPIC_API_KEY ANTHROPIC_AUTH_TOKEN ANTHROPIC_MODEL ANTHROPIC_SMALL_FAST_MODEL
    ANTHROPIC_DEFAULT_OPUS_MODEL ANTHROPIC_DEFAULT_SONNET_MODEL ANTHROPIC_CUSTOM_HEADERS
    ANTHROPIC_BETAS ANTHROPIC_PROFILE CLAUDE_CODE_USE_BEDROCK CLAUDE_CODE_USE_VERTEX
    CLAUDE_CODE_USE_FOUNDRY CLAUDE_CODE_USE_MANTLE CLAUDE_CODE_USE_GATEWAY
    CLAUDE_CODE_USE_ANTHROPIC_AWS CLAUDE_CODE_SIMPLE CLAUDE_CODE_EXTRA_BODY
    CLAUDE_CODE_MAX_OUTPUT_TOKENS MAX_THINKING_TOKENS CLAUDE_CODE_EFFORT_LEVEL CLAUDECODE
    CLAUDE_CODE_ENTRYPOINT CLAUDE_CODE_SSE_PORT CLAUDE_CODE_SESSION_ID CLAUDE_CODE_CHILD_SESSION
    CLAUDE_CODE_REMOTE CLAUDE_CODE_REMOTE_SESSION_ID CLAUDE_CODE_SHELL_PREFIX
    CLAUDE_CODE_RESUME_INTERRUPTED_TURN CLAUDE_AGENT CLAUDE_AGENT_SDK_VERSION CLAUDE_BG_TASK
    OTEL_EXPORTER OTEL_LOG_USER_PROMPTS NODE_OPTIONS BUN_OPTIONS CAB_CHILD CAB_PORT CAB_DATA_DIR
    anthropic_api_key Claude_Code_Use_Bedrock node_options
""".split()
PASSED_ENV = """
    CLAUDE_CODE_OAUTH_TOKEN ANTHROPIC_BASE_URL HOME USER PATH LANG LC_ALL TMPDIR HTTP_PROXY
    HTTPS_PROXY NO_PROXY https_proxy no_proxy NODE_EXTRA_CA_CERTS SSL_CERT_FILE SHELL SYSTEMROOT
    APPDATA
""".split()


def environment(
    names: Sequence[str], allow_api_key: bool = False, isolated: Any = "/bridge/claude-home"
) -> Dict[str, str]:
    """Return the environment of a process if the owner has set these variables."""
    return cab.child_environment({name: "the owner's" for name in names}, allow_api_key, isolated)


@pytest.mark.parametrize("isolated", ["/bridge/claude-home", None])
def test_no_variable_that_could_change_the_billing_or_the_prompt_is_passed_on(
    isolated: Any,
) -> None:
    environ = environment(STRIPPED_ENV, isolated=isolated)
    assert [name for name, value in environ.items() if value == "the owner's"] == []


def test_the_variables_that_the_cli_needs_are_passed_on() -> None:
    environ = environment(PASSED_ENV)
    assert {name for name, value in environ.items() if value == "the owner's"} == set(PASSED_ENV)


def test_keys_are_passed_on_only_if_the_owner_allows_it() -> None:
    names = [
        "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_USE_BEDROCK", "ANTHROPIC_MODEL",
    ]
    environ = environment(names, allow_api_key=True)
    assert {name for name in names if name in environ} == {
        "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN",
    }


def test_the_switches_that_keep_the_owner_s_files_out_are_always_set() -> None:
    expected = {
        "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_DISABLE_TERMINAL_TITLE": "1",
        "CLAUDE_CODE_DISABLE_CLAUDE_MDS": "1",
        "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
        "ENABLE_CLAUDEAI_MCP_SERVERS": "false",
    }
    environ = environment(
        ["CLAUDE_CODE_DISABLE_ATTACHMENTS", "ENABLE_CLAUDEAI_MCP_SERVERS"], isolated=None
    )
    assert {name: environ.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    "owner_dir, isolated, expected",
    [
        (None, "/b", ("/b", "")),
        ("/mine", "/b", ("/b", "/mine")),
        (None, None, (None, None)),
        ("/mine", None, ("/mine", None)),
        ("", None, (None, None)),
    ],
)
def test_the_cli_has_its_own_settings_folder_and_the_login_of_the_owner(
    owner_dir: Any, isolated: Any, expected: Any
) -> None:
    environ = cab.child_environment(
        {} if owner_dir is None else {"CLAUDE_CONFIG_DIR": owner_dir}, False, isolated
    )
    assert (
        environ.get("CLAUDE_CONFIG_DIR"),
        environ.get("CLAUDE_SECURESTORAGE_CONFIG_DIR"),
    ) == expected


def features(version: str, *without: str) -> cab.Features:
    """Return the features of a CLI of this version without some flags."""
    return cab.Features.read(
        version + " (Claude Code)", "\n".join(flag for flag in FLAGS.split() if flag not in without)
    )


NEWEST = features("2.1.330")
SEEN = features("2.1.197", "--restricted", "--system-prompt-snapshot")
BARE = features("2.1.197", *(set(FLAGS.split()) - cab.NEEDED_FLAGS))
VERSIONS = [NEWEST, SEEN, BARE]
RULES = (
    "Read", "Glob", "Write", "Bash(git log:*)", "Read(/srv/data/**)",
    "WebFetch(domain:example.com)",
)
TOOLS = ["none", "read", "web", "all", RULES]


def options(argv: Sequence[str]) -> Dict[str, List[str]]:
    """Parse ["--a", "1", "2", "--b"] to {"--a": ["1", "2"], "--b": []}."""
    parsed: Dict[str, List[str]] = {}
    for word in argv:
        if word.startswith("--"):
            parsed[word] = []
        elif parsed:
            parsed[list(parsed)[-1]].append(word)
    return parsed


def test_the_command_line_of_a_process_without_tools() -> None:
    argv = cab.claude_argv(("/opt/claude",), NEWEST, "none")
    assert argv[:2] == ["/opt/claude", "-p"]
    assert options(argv) == {
        "--input-format": ["stream-json"], "--output-format": ["stream-json"], "--verbose": [],
        "--setting-sources": [""], "--strict-mcp-config": [], "--include-partial-messages": [],
        "--disable-slash-commands": [], "--tools": [""], "--permission-mode": ["dontAsk"],
        "--allowedTools": ["mcp__api"], "--agent": ["bridge"], "--system-prompt-snapshot": ["off"],
        "--no-session-persistence": [],
    }


@pytest.mark.parametrize("tools", TOOLS, ids=str)
@pytest.mark.parametrize(
    "cli", VERSIONS, ids=lambda cli: "%s with %d flags" % (cli.version, len(cli.flags))
)
def test_only_flags_that_the_cli_has_are_used_and_the_required_ones_always(
    cli: cab.Features, tools: Any
) -> None:
    used = set(options(cab.claude_argv(("claude",), cli, tools)))
    # `find_claude` checks that a version has these flags, except for --output-format, --verbose
    # and --allowedTools, which every version has. Without a session, none is resumed.
    always = {"--output-format", "--verbose", "--allowedTools"}
    assert used <= cli.flags | always
    assert used >= (cab.NEEDED_FLAGS | always) - {"--resume", "--session-id"}
    assert not any("dangerously" in flag for flag in used)


@pytest.mark.parametrize("session", ["--session-id=0b5e", "--resume=0b5e"])
def test_a_session_is_persisted_if_one_is_named(session: str) -> None:
    argv = cab.claude_argv(("claude",), NEWEST, "none", (session,))
    assert session in argv and "--no-session-persistence" not in argv


@pytest.mark.parametrize(
    "tools, cli, available, mode, allowed, is_restricted",
    [
        ("none", NEWEST, "", "dontAsk", None, False),
        ("none", SEEN, "", "dontAsk", None, False),
        ("read", NEWEST, "Glob Grep Read", "dontAsk", None, True),
        # In these versions Glob can list names outside of the workspace.
        ("read", SEEN, "Grep Read", "dontAsk", None, False),
        ("web", NEWEST, "WebFetch WebSearch", "dontAsk", "WebFetch WebSearch", False),
        ("web", SEEN, "WebFetch WebSearch", "dontAsk", "WebFetch WebSearch", False),
        (("Read",), NEWEST, "Read", "dontAsk", None, False),
        (("Read", "Bash(git log:*)"), NEWEST, "Bash Read", "dontAsk", "Bash(git log:*)", False),
        (("Bash(ls)", "Bash(pwd)"), NEWEST, "Bash", "dontAsk", "Bash(ls) Bash(pwd)", False),
        # A bare Write would open the whole disk.
        (("Write",), NEWEST, "Write", "dontAsk", "Edit(./**)", False),
        (
            ("Edit", "Write", "NotebookEdit"), NEWEST, "Edit NotebookEdit Write", "dontAsk",
            "Edit(./**)", False,
        ),
        (("Read(/srv/**)",), NEWEST, "Read", "dontAsk", "Read(/srv/**)", False),
        (("Glob", "WebSearch"), NEWEST, "Glob WebSearch", "dontAsk", "WebSearch", False),
        (("Glob",), SEEN, "", "dontAsk", None, False),
    ],
    ids=lambda value: None if isinstance(value, (bool, cab.Features)) else str(value),
)
def test_a_level_or_rules_become_these_flags(
    tools: Any, cli: cab.Features, available: str, mode: str, allowed: Any, is_restricted: bool
) -> None:
    argv = cab.tool_argv(cli, tools)
    # A rule may contain a blank. Compare the words of argv, not their join.
    allowed_words = argv[argv.index("--allowedTools") + 1 :]
    # `mcp__api` stands for the client's tools.
    expected = [*re.findall(r"\w+(?:\([^)]*\))?", allowed or ""), "mcp__api"]
    assert sorted(filter(None, options(argv)["--tools"][0].split(","))) == available.split()
    assert options(argv)["--permission-mode"] == [mode]
    assert sorted(allowed_words) == sorted(expected)
    assert ("--restricted" in argv) is is_restricted


@pytest.mark.parametrize("cli", VERSIONS, ids=["newest", "seen", "bare"])
def test_all_tools_may_edit_and_run_commands_and_nothing_needs_asking(cli: cab.Features) -> None:
    flags = options(cab.tool_argv(cli, "all"))
    available = set(flags["--tools"][0].split(","))
    assert available >= {"Bash", "Read", "Grep", "Edit", "Write", "WebFetch", "WebSearch"}
    assert ("Glob" in available) is (cli is NEWEST)
    assert flags["--permission-mode"] == ["acceptEdits"]
    assert set(flags["--allowedTools"]) == {"Bash", "WebFetch", "WebSearch", "mcp__api"}
    assert ("--restricted" in flags) is ("--restricted" in cli.flags)


FULL_SESSION = cab.SessionConfig("Be brief.", "haiku", '{"type":"object"}', "low")


@pytest.mark.parametrize("cli", VERSIONS, ids=["newest", "seen", "bare"])
def test_the_model_is_set_without_a_trace_in_the_prompt(cli: cab.Features) -> None:
    requests = [line["request"] for line in cab.initialize_requests(FULL_SESSION, cli)]
    assert requests[0]["agents"]["bridge"]["model"] == "haiku"
    assert "set_model" not in [request["subtype"] for request in requests]


def test_an_effort_is_not_sent_to_a_version_that_may_lose_it() -> None:
    requests = [line["request"] for line in cab.initialize_requests(FULL_SESSION, SEEN)]
    assert [request["subtype"] for request in requests] == ["initialize"]


def test_a_process_gets_prompt_schema_and_effort() -> None:
    lines = cab.initialize_requests(FULL_SESSION, NEWEST)
    assert [line["type"] for line in lines] == ["control_request"] * 2
    assert [line["request_id"] for line in lines] == ["1", "2"]
    first, second = (line["request"] for line in lines)
    assert (first["subtype"], first["systemPrompt"], first["jsonSchema"]) == (
        "initialize", "Be brief.", {"type": "object"},
    )
    # A title from the bridge prevents a request for one.
    assert first["agents"]["bridge"]["prompt"] == "Be brief." and first["title"]
    assert second == {"subtype": "apply_flag_settings", "settings": {"effortLevel": "low"}}


def test_the_default_session_is_one_request_without_model_or_schema() -> None:
    lines = cab.initialize_requests(cab.SessionConfig("Hi."), SEEN)
    assert len(lines) == 1 and "jsonSchema" not in lines[0]["request"]
    assert "model" not in lines[0]["request"]["agents"]["bridge"]


@pytest.mark.parametrize(
    "tools, expected", [("none", []), ("read", None), ("all", None), (("Read",), None)]
)
def test_a_token_without_tools_is_also_refused_tools_by_the_agent_definition(
    tools: Any, expected: Any
) -> None:
    request = cab.initialize_requests(cab.SessionConfig("Hi.", tools=tools), NEWEST)[0]["request"]
    assert request["agents"]["bridge"].get("tools") == expected


@pytest.mark.parametrize(
    "text, sent",
    [
        ("hi", "hi"), ("/cost", " /cost"), ("/", " /"), ("//x", " //x"),
        ("/etc/hosts is what?", " /etc/hosts is what?"), (" /cost", " /cost"),
        ("\n/cost", "\n/cost"), ("!ls", "!ls"), ("#note", "#note"),
        ("@/etc/passwd", "@/etc/passwd"), ("a\0b", "a\0b"), ('{"type":"x"}', '{"type":"x"}'),
    ],
)
def test_a_prompt_is_never_a_command(text: str, sent: str) -> None:
    content = [{"type": "text", "text": sent}]
    assert cab.user_message(text) == {
        "type": "user",
        "message": {"role": "user", "content": content},
    }
    assert cab.user_message(text, wants_reply=False) == {
        "type": "user",
        "message": {"role": "user", "content": content},
        "shouldQuery": False,
    }


@pytest.mark.parametrize(
    "text, sent", [("Hello", "Hello"), ("/x", "/x"), ("", "(no answer)"), (" \n", "(no answer)")]
)
def test_a_replayed_answer_is_never_blank(text: str, sent: str) -> None:
    assert cab.assistant_message(text)["message"] == {
        "role": "assistant",
        "content": [{"type": "text", "text": sent}],
    }


# --- live text and events ---

HALVES = ("\ud83d", "\ude00", "\udbff", "\udfff")
ALPHABET = (
    "a", "é", "e\u0301", "中", "😀", "👩\u200d👩\u200d👧", "🇮🇹", "\0", "\n",
    "\u2028", "\ufeff", "\U0010ffff",
)


def random_text(chance: random.Random, most: int = 60) -> str:
    """Return characters of all sizes and halves of them, as a CLI may write them in its JSON."""
    return "".join(chance.choice(ALPHABET + HALVES) for _ in range(chance.randrange(most)))


def chunks(chance: random.Random, text: str) -> Iterable[str]:
    """Yield the text in pieces that end anywhere, also between the halves of a character."""
    data, start = text.encode("utf-16-le", "surrogatepass"), 0
    while start < len(data):
        end = start + 2 * chance.choice((1, 1, 2, 5, 30))
        yield data[start:end].decode("utf-16-le", "surrogatepass")
        start = end


def apply_events(events: Iterable[cab.JobEvent], text: str = "") -> str:
    """Return the text of a reader after these events, and check the offset of each event."""
    for event in events:
        assert event.kind in ("started", "delta") and (event.kind == "delta") is bool(event.text)
        text = text + event.text if event.kind == "delta" else ""
        assert event.offset == len(text) and len(event.text) <= cab.DELTA_CHARACTERS
    return text


def all_events(live: cab.LiveText, cursor: cab.TextCursor) -> List[cab.JobEvent]:
    """Return all new events. They come in batches."""
    events: List[cab.JobEvent] = []
    while True:
        batch = live.events_since(cursor)
        assert len(batch) <= cab.EVENT_BATCH
        events += batch
        if len(batch) < cab.EVENT_BATCH:
            return events


def kinds(events: Iterable[cab.JobEvent]) -> List[str]:
    return [event.kind for event in events]


def live_text(*parts: str) -> cab.LiveText:
    """Return a live text that has received these parts."""
    live = cab.LiveText()
    for part in parts:
        live.add(part)
    return live


@pytest.mark.parametrize("seed", range(40))
def test_the_deltas_add_up_to_the_text_for_any_chunking(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr(cab, "DELTA_CHARACTERS", chance.choice((1, 2, 7, 16_384)))
    monkeypatch.setattr(cab, "EVENT_BATCH", chance.choice((1, 3, 16)))
    monkeypatch.setattr(cab, "TEXT_CHARACTERS", chance.choice((1, 5, 1 << 18)))
    text = random_text(chance)
    expected, live = cab.replace_surrogates(text), cab.LiveText()
    readers = [(cab.TextCursor(0), [""]) for _ in range(3)]
    for part in chunks(chance, text):
        live.add(part)
        # Half a character is never shown.
        assert expected.startswith(live.read())
        for cursor, received in readers:
            if chance.random() < 0.5:
                received[0] = apply_events(all_events(live, cursor), received[0])
                assert received[0] == live.read() and cursor.offset == len(received[0])
    assert live.size == len(live.read().encode())
    live.reconcile(expected)
    assert live.read() == expected
    assert [
        apply_events(all_events(live, cursor), received[0]) for cursor, received in readers
    ] == [expected] * 3
    assert [live.events_since(cursor) for cursor, _ in readers] == [[]] * 3 and live.generation == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_cursor_that_resumes_anywhere_gets_exactly_the_rest(seed: int) -> None:
    chance = random.Random(seed)
    text = random_text(chance)
    live = live_text(*chunks(chance, text))
    received = live.read()
    for offset in range(len(received) + 1):
        assert live.read(offset) == received[offset:]
        events = live.events_since(cab.TextCursor(offset))
        assert apply_events(events, received[:offset]) == received
        if offset == 0:
            assert kinds(events)[0] == "started"
        else:
            assert kinds(events)[:1] == (["delta"] if offset < len(received) else [])
    assert live.read(len(received) + 5) == ""
    assert live.events_since(cab.TextCursor(len(received) + 5)) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_cursor_over_a_stored_answer_gets_exactly_the_rest_too(seed: int) -> None:
    chance = random.Random(seed)
    text = cab.replace_surrogates(random_text(chance))
    for offset in range(len(text) + 1):
        for generation, known in ((0, text), (1, "of another try")):
            cursor = cab.TextCursor(offset)
            events = [*cursor.begin(generation, "haiku"), *cursor.read(lambda start: text[start:])]
            assert apply_events(events, known[:offset]) == text


def block_step(kind: str, block: Any = None, **delta: Any) -> Dict[str, Any]:
    step = {"type": "content_block_" + kind}
    return {**step, **({"content_block": block} if block else {}), "delta": delta or None}


def test_a_stop_sequence_spans_blocks_of_text_and_no_others() -> None:
    live = cab.LiveText(stop_sequences=("END",))
    live.tool_names = {"x"}
    live.add("abE")
    live.follow_block(block_step("start", {"type": "text", "text": ""}))
    live.add("ND x")
    assert (live.read(), live.stopped_by) == ("ab", "END")
    other = cab.LiveText(stop_sequences=("END",))
    other.tool_names = {"x"}
    other.add("abE")
    call = {"type": "tool_use", "id": "x", "name": cab.TOOL_PREFIX + "x", "input": {}}
    other.follow_block(block_step("start", call))
    assert (other.read(), other.stopped_by, other.parts[0].offset) == ("abE", None, 3)


@pytest.mark.parametrize("seed", range(20))
def test_parts_come_to_each_reader_in_their_order(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text, a thought, text and two calls, in pieces that cut characters."""
    chance = random.Random(seed)
    monkeypatch.setattr(cab, "EVENT_BATCH", chance.choice((1, 2, 16)))
    live = cab.LiveText()
    live.shows_thinking, live.tool_names = True, {"x", "y"}
    thought = {"type": "thinking", "thinking": "h\U0001f600m", "signature": "s"}
    calls = [{"type": "tool_use", "id": n, "name": cab.TOOL_PREFIX + n, "input": {}} for n in "xy"]
    other = {"type": "tool_use", "id": "z", "name": cab.TOOL_PREFIX + "z", "input": {}}
    steps: List[Any] = [
        "a", block_step("start", {**thought, "thinking": "", "signature": ""}),
        block_step("delta", type="thinking_delta", thinking="h\ud83d"),
        block_step("delta", type="thinking_delta", thinking="\ude00m"),
        block_step("delta", type="signature_delta", signature="s"), block_step("stop"), "b", "c",
        block_step("start", other), block_step("delta", partial_json="{}"), block_step("stop"),
    ]
    for call in calls:
        steps += [block_step("start", call), block_step("delta", partial_json=""),
                  block_step("delta", partial_json='{"a":'), block_step("delta", partial_json="1}"),
                  block_step("stop")]
    readers = [(cab.TextCursor(0, True), []) for _ in range(3)]  # type: Any
    plain = cab.TextCursor(0)
    text = ""
    for step in steps:
        live.add(step) if isinstance(step, str) else live.follow_block(step)
        for cursor, seen in readers:
            if chance.random() < 0.5:
                seen += live.events_since(cursor)
        text = apply_events(live.events_since(plain), text)
    assert apply_events(all_events(live, plain), text) == "abc"
    for cursor, seen in readers:
        seen += all_events(live, cursor)
        told: List[Any] = []
        for event in seen:
            if event.kind == "part_end":
                told[-1] = (told[-1], event.block)
            elif event.kind in ("started", "part_start"):
                told.append("")
            elif event.kind == "delta" and isinstance(told[-1], tuple):
                told.append(event.text)
            else:
                told[-1] += event.text
        names = [{**call, "name": call["id"]} for call in calls]
        assert told == [
            "a", ("h\U0001f600m", thought), "bc", *(('{"a":1}', name) for name in names),
        ]


@pytest.mark.parametrize(
    "parts, text",
    [
        (["\ud83d", "\ude00"], "😀"), (["a\ud83d", "\ude00b"], "a😀b"),
        (["\ud83d", "", "\ude00"], "😀"), (["\ud83d\ude00"], "😀"),
        (["\ud83d", "x"], "\ufffdx"), (["\ude00", "x"], "\ufffdx"),
        (["\ud83d", "\ud83d", "\ude00"], "\ufffd😀"), (["\ude00\ud83d", "\ude00"], "\ufffd😀"),
        (["e", "\u0301"], "e\u0301"), (["", ""], ""), (["a\ud83d"], "a"),
    ],
    ids=ascii,
)
def test_a_character_in_two_halves_is_joined(parts: List[str], text: str) -> None:
    assert live_text(*parts).read() == text
    assert apply_events(live_text(*parts).events_since(cab.TextCursor(0))) == text


def test_text_is_counted_in_code_points_and_never_normalized() -> None:
    decomposed = unicodedata.normalize("NFD", "é")
    assert [
        event.offset for event in live_text(decomposed, "😀").events_since(cab.TextCursor(0))
    ] == [0, 3]
    assert live_text(decomposed, "😀").read(1) == "\u0301😀"


@pytest.mark.parametrize(
    "length, sizes",
    [
        (0, []),
        (1, [1]),
        (16_384, [16_384]),
        (16_385, [16_384, 1]),
        (40_000, [16_384, 16_384, 7_232]),
    ],
)
@pytest.mark.parametrize("after", [0, 3])
def test_a_long_text_is_sent_in_several_deltas(length: int, sizes: List[int], after: int) -> None:
    events = live_text("abc"[:after], "😀" * length).events_since(cab.TextCursor(after))
    deltas = [event for event in events if event.kind == "delta"]
    assert [len(event.text) for event in deltas] == sizes
    assert apply_events(events, "abc"[:after]) == "abc"[:after] + "😀" * length


def test_nothing_is_sent_before_claude_has_accepted_the_prompt() -> None:
    for after in (0, 5):
        assert cab.LiveText().events_since(cab.TextCursor(after)) == []
        assert cab.LiveText(3).events_since(cab.TextCursor(after)) == []
    live, cursor = cab.LiveText(), cab.TextCursor(0)
    live.restart()
    assert live.events_since(cursor) == []
    live.begin("claude-haiku")
    assert live.events_since(cursor) == [cab.JobEvent("started", 0, model="claude-haiku")]
    assert live.events_since(cursor) == []
    live.add("Hi")
    assert live.events_since(cursor) == [cab.JobEvent("delta", 2, "Hi")]
    assert live.events_since(cursor) == []


def test_an_empty_answer_is_only_a_started_event() -> None:
    live = cab.LiveText()
    live.reconcile("")
    assert kinds(live.events_since(cab.TextCursor(0))) == ["started"]


def test_a_text_of_many_parts_takes_no_more_memory_than_its_characters() -> None:
    # PyPy has none.
    tracemalloc = pytest.importorskip("tracemalloc")
    tracemalloc.start()
    try:
        live = cab.LiveText()
        for number in range(10_000):
            live.add("%05d" % number)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 4 bytes a character, and what the buffer reserves to grow.
    assert len(live.read()) == 50_000 and size < 300_000


def test_a_text_of_many_parts_stays_the_same_text() -> None:
    chance = random.Random(0)
    live, cursor = cab.LiveText(), cab.TextCursor(0)
    expected = received = ""
    for number in range(5_000):
        part = chance.choice(("a", "😀b", "中", "word "))
        live.add(part)
        expected += part
        if number % 500 == 499 or 1_020 <= number < 1_030:
            received = apply_events(live.events_since(cursor), received)
            assert received == expected
    assert all(live.read(offset) == expected[offset:] for offset in range(0, len(expected) + 3, 7))
    live.restart()
    for _ in range(1_030):
        live.add("x")
    assert apply_events(live.events_since(cursor), received) == live.read() == "x" * 1_030
    assert live.generation == 1


def test_a_restarted_text_is_sent_from_its_start_to_every_reader() -> None:
    live, following, idle = live_text("Let me look."), cab.TextCursor(0), cab.TextCursor(0)
    received = apply_events(live.events_since(following))
    live.restart()
    assert [(event.kind, event.offset) for event in live.events_since(following)] == [
        ("started", 0)
    ]
    assert live.events_since(following) == []
    live.add("It is 7.")
    assert received == "Let me look." and apply_events(live.events_since(following)) == "It is 7."
    # An offset in the first text means nothing after the restart.
    for cursor in (idle, *map(cab.TextCursor, (0, 3, 12, 1000))):
        events = live.events_since(cursor)
        assert kinds(events) == ["started", "delta"]
        assert apply_events(events, "whatever") == "It is 7." and cursor.generation == 1


def test_only_a_text_that_a_reader_could_see_counts_as_restarted() -> None:
    live = cab.LiveText(2)
    changes = (
        live.restart, lambda: live.begin(None), live.restart, lambda: live.add(""),
        lambda: live.add("\ud83d"), live.restart,
    )
    for change in changes:
        change()
        assert live.generation == 2
    # The first half belonged to another text.
    live.add("\ude00")
    assert live.read() == "\ufffd"
    live.restart()
    live.restart()
    assert (live.generation, live.read()) == (3, "")


def test_a_cursor_that_was_reset_gets_the_whole_text_again() -> None:
    live, cursor = live_text("Hello"), cab.TextCursor(2)
    assert apply_events(live.events_since(cursor), "He") == "Hello"
    cursor.reset()
    assert cursor.offset == 0 and kinds(live.events_since(cursor)) == ["started", "delta"]


def test_a_pause_has_a_reason_until_claude_accepts_the_prompt_again() -> None:
    live, cursor = live_text("Hel"), cab.TextCursor(0)
    live.events_since(cursor)
    live.restart()
    live.current_pause = cab.Pause("overloaded", NOW + 2)
    assert live.current_pause == cab.Pause("overloaded", NOW + 2)
    assert (live.read(), live.generation) == ("", 1)
    live.begin("haiku")
    live.add("Hello")
    assert live.current_pause is None and apply_events(live.events_since(cursor)) == "Hello"


@pytest.mark.parametrize(
    "streamed, final, new_kinds, generation",
    [
        ("", "Hello", ["started", "delta"], 0), ("Hel", "Hello", ["delta"], 0),
        ("Hello", "Hello", [], 0), ("Hello", "Hullo", ["started", "delta"], 1),
        ("Hello", "Hell", ["started", "delta"], 1), ("Hello", "", ["started"], 1),
        ("a\ud83d", "a😀", ["delta"], 0), ("a\ud83d", "a\ufffd", ["delta"], 0),
        ("a\ud83d", "a", [], 0),
    ],
    ids=ascii,
)
def test_the_final_text_adds_the_missing_suffix_or_restarts_the_text(
    streamed: str, final: str, new_kinds: List[str], generation: int
) -> None:
    live, cursor = live_text(*filter(None, [streamed])), cab.TextCursor(0)
    received = apply_events(live.events_since(cursor))
    live.reconcile(final)
    events = live.events_since(cursor)
    assert (kinds(events), live.generation, live.read()) == (new_kinds, generation, final)
    assert apply_events(events, received) == final


def test_every_change_that_a_reader_can_see_calls_back() -> None:
    sizes: List[int] = []
    live = cab.LiveText(0, lambda: sizes.append(len(live.read())))
    live.begin("haiku")
    live.add("ab")
    live.add("c")
    live.reconcile("cd")
    # The callback runs after the change, so that a reader that looks then sees it.
    assert sizes == [0, 2, 3, 2]


def test_readers_on_threads_always_end_with_the_last_text() -> None:
    texts = [random_text(random.Random(seed), 200) for seed in range(30)]
    wakeups, is_over = [threading.Event() for _ in range(4)], threading.Event()
    final_texts: List[str] = [""] * 4
    errors: List[BaseException] = []

    def wake_readers() -> None:
        for wakeup in wakeups:
            wakeup.set()

    live = cab.LiveText(0, wake_readers)

    def read(number: int) -> None:
        chance, cursor, text = random.Random(number), cab.TextCursor(0), ""
        try:
            while True:
                is_last = is_over.is_set()
                text = apply_events(live.events_since(cursor), text)
                assert cursor.offset == len(text)
                if is_last:
                    final_texts[number] = text
                    return
                if chance.random() < 0.3:
                    # A reader that was disconnected resumes.
                    cursor = cab.TextCursor(len(text))
                assert wakeups[number].wait(10), "no notification came"
                wakeups[number].clear()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(number,), name="reader") for number in range(4)]
    for thread in threads:
        thread.start()
    chance = random.Random(0)
    for text in texts:
        live.begin("haiku")
        for part in chunks(chance, text):
            live.add(part)
        live.restart()
    live.reconcile("the last word")
    is_over.set()
    wake_readers()
    for thread in threads:
        thread.join(10)
    assert errors == [] and final_texts == ["the last word"] * 4
    assert live.generation == sum(bool(text) for text in texts)


def read_sse(data: bytes) -> List[Tuple[int, str, Any]]:
    """Parse Server-Sent Events as a simple reader does, which splits lines with str.splitlines."""
    events: List[Tuple[int, str, Any]] = []
    fields: Dict[str, str] = {}
    for line in data.decode("utf-8").splitlines():
        if line:
            name, colon, value = line.partition(": ")
            assert colon and name not in fields, line
            fields[name] = value
        else:
            assert list(fields) == ["id", "event", "data"]
            events.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
            fields = {}
    assert not fields, "the last event is not complete"
    return events


BREAKS = [
    "\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\0",
    "\n\nevent: error\ndata: {}\n\n", "\ufeff", '"', "\\", "\\u2028", "\\\u2028", "data: ", ":",
    "\x7f", "😀", "e\u0301", "",
]


@pytest.mark.parametrize("text", BREAKS, ids=ascii)
def test_an_event_with_any_content_is_read_as_it_was_sent(text: str) -> None:
    data = {"text": text + "x" + text, "more": [text, {text: 1}], "n": 7}
    stream_bytes = cab.sse_event("delta", 12, data) + cab.sse_event(
        "completed", 0, {"response": text}
    )
    assert read_sse(stream_bytes) == [(12, "delta", data), (0, "completed", {"response": text})]
    # Each event has three lines and a blank one.
    assert len(stream_bytes.split(b"\n")) == 9 and b"\r" not in stream_bytes


@pytest.mark.parametrize("seed", range(10))
def test_random_events_are_read_as_they_were_sent(seed: int) -> None:
    chance = random.Random(seed)
    expected = []
    for _ in range(20):
        text_parts = chance.choices([*BREAKS, *ALPHABET], k=30)
        kind = chance.choice(("delta", "error"))
        expected.append((chance.randrange(10**9), kind, {"text": "".join(text_parts)}))
    sent = b"".join(cab.sse_event(kind, offset, data) for offset, kind, data in expected)
    assert read_sse(sent) == expected


def test_half_a_character_does_not_end_a_stream() -> None:
    [(offset, kind, data)] = read_sse(cab.sse_event("error", 3, {"error": "a\ud800b"}))
    assert (offset, kind) == (3, "error") and re.fullmatch("a.b", data["error"])


@pytest.mark.parametrize(
    "kind, is_of_model",
    [
        ("five_hour", False),
        ("seven_day", False),
        ("seven_day_opus", True),
        ("seven_day_sonnet", True),
    ],
)
def test_the_limit_of_one_model_is_marked_as_such(kind: str, is_of_model: bool) -> None:
    info = {
        "status": "rejected",
        "resetsAt": NOW + 60,
        "rateLimitType": kind,
        "isUsingOverage": False,
    }
    limits = cab.parse_rate_limits({"rate_limit_info": info}, NOW)
    assert limits.is_used_up and limits.is_model_limit == is_of_model
    result = {"is_error": True, "api_error_status": 429, "result": "You've hit your limit"}
    failure = cab.classify_failure(result, "rate_limit", limits)
    assert (failure.code, failure.resets_at, failure.is_of_model) == (
        "usage_limit", NOW + 60, is_of_model,
    )
