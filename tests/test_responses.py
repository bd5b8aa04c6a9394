"""The wire format of the OpenAI Responses API, /v1/responses.

What a request becomes, what the answers and every event contain, and what is stored.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import pytest

import claude_api_bridge as cab
from conftest import Answer, Api, FakeClaude, RunningBridge, running_bridge, wait_until
from test_formats import (  # noqa: F401 (fixtures)
    ANY_TOOL, BLUE, LOOK, PNG, REMOTE_IMAGE, SCHEMA, OpenRequest, Start, close_open_requests,
    events, fake, function, initialize_requests, kind_of, mutated, nothing_runs, pids, quick,
    restarted, rows, service_of, text, tool_result, tool_use, turn,
)
from messages_api import (
    Reply, calls_tools, echo, last_text, system_text, tool_results, turn_texts,
)
from sdk_client import MODEL, RESULTS, SYSTEM
from test_real import Site, version  # noqa: F401 (a fixture)
from test_sdks import (  # noqa: F401 (fixtures)
    MODEL_CALLS, RunScenario, run_scenario, running_site, sdk_python, site,
)
from test_stream import Skipped, once, refused_once, script

PATH = "/v1/responses"
HI = (turn("user", "hi"),)
DATA_URL = "data:image/png;base64,iVBORw0KGgo="
TOOLS = [
    {"type": "function", "name": name, "description": "Does %s." % name, "parameters": SCHEMA}
    for name in ("look", "taste")
]
PATCH = {
    "type": "custom", "name": "patch", "description": "Patches.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"},
}
SETTINGS = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True,
    "previous_response_id": None, "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None}, "safety_identifier": None, "store": True,
    "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
    "truncation": "disabled", "user": None,
}
USAGE = {
    "input_tokens": 18, "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 3},
    "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 25,
}


# --- requests ---


def body_of(value: Any = "hi", **fields: Any) -> Dict[str, Any]:
    return {"input": value, **fields}


def no_conversation(response_id: str) -> List[Tuple[str, Any]]:
    raise AssertionError(response_id)


def read(body: Any, can_search: bool = False) -> cab.Chat:
    return cab.read_responses_request(body, no_conversation, can_search)


def call(name: str = "look", arguments: str = "{}", call_id: str = "c", **more: Any) -> Any:
    return {
        "type": "function_call", "call_id": call_id, "name": name, "arguments": arguments, **more,
    }


def output(value: Any = "blue", call_id: str = "c", kind: str = "function") -> Any:
    return {"type": kind + "_call_output", "call_id": call_id, "output": value}


def message(role: str, *parts: Any) -> Dict[str, Any]:
    return {"type": "message", "role": role, "content": list(parts)}


def part(words: str, kind: str = "input_text") -> Dict[str, Any]:
    return {"type": kind, "text": words}


def pinned(words: str) -> cab.Chat:
    """Return the Chat of a request for JSON of SCHEMA."""
    return cab.Chat(HI, json_schema=cab.as_json({"type": "object", **json.loads(words)}))


@pytest.mark.parametrize(
    "body, chat",
    [
        (body_of(), cab.Chat(HI)),
        (body_of(None, **{"input": "hi"}), cab.Chat(HI)),
        (body_of(instructions="Be brief."), cab.Chat(HI, "Be brief.")),
        (body_of([{"role": "user", "content": "hi"}]), cab.Chat(HI)),
        (
            # Clients send the fields that they do not use as null, or empty.
            body_of(
                model=None, instructions=None, tools=[], tool_choice=None, text=None, stream=None,
                reasoning={}, include=None, store=None, metadata=None, max_output_tokens=None,
                parallel_tool_calls=None, previous_response_id=None, truncation=None, user=None,
                temperature=None, top_p=None, prompt=None, conversation=None, background=None,
                service_tier=None,
            ),
            cab.Chat(HI),
        ),
        (
            body_of(
                model="gpt-5.2", temperature=0.5, include=["reasoning.encrypted_content"],
                store=False, prompt_cache_key="k", metadata={"a": "b"}, max_output_tokens=9,
                reasoning={"effort": "none", "summary": "auto"}, text={"verbosity": "low"},
                background=False, client_metadata={}, top_logprobs=3,
            ),
            cab.Chat(HI, effort="low", max_tokens=9, thinking=cab.OFF),
        ),
        (body_of(model="sonnet", stream=True), cab.Chat(HI, model="sonnet", stream=True)),
        (body_of(reasoning={"effort": "xhigh"}), cab.Chat(HI, effort="xhigh")),
        (
            body_of(
                [
                    message("system", part("One.")), message("developer", part("Two.")),
                    message("user", part("hi"), {"type": "input_image", "image_url": DATA_URL}),
                    {"type": "reasoning", "id": "rs_1", "summary": []},
                    {
                        **message("assistant", part("A", "output_text")), "id": "msg_1",
                        "status": "completed", "phase": "commentary",
                    },
                    message("assistant", {"type": "refusal", "refusal": "No."}),
                    message("user", part("so")), {"role": "developer", "content": "Three."},
                ],
                instructions="Zero.",
            ),
            cab.Chat(
                (turn("user", "hi", PNG), turn("assistant", "A", "No."), turn("user", "so")),
                "Zero.\n\nOne.\n\nTwo.\n\nThree.",
            ),
        ),
        (
            body_of(
                [
                    message(
                        "user",
                        {
                            "type": "input_image",
                            "image_url": {"url": "https://example.com/a.png"},
                        },
                        {
                            "type": "input_file", "filename": "a.pdf",
                            "file_data": "data:application/pdf;base64,JVBERi0=",
                        },
                        {"type": "input_file", "file_data": "JVBERi0="},
                        {"type": "input_file", "file_url": "https://example.com/a.pdf"},
                    )
                ]
            ),
            cab.Chat(
                (
                    turn(
                        "user",
                        REMOTE_IMAGE,
                        {
                            "type": "document",
                            "source": {
                                "type": "base64", "media_type": "application/pdf",
                                "data": "JVBERi0=",
                            },
                            "title": "a.pdf",
                        },
                        {
                            "type": "document",
                            "source": {
                                "type": "base64", "media_type": "application/pdf",
                                "data": "JVBERi0=",
                            },
                        },
                        {
                            "type": "document",
                            "source": {"type": "url", "url": "https://example.com/a.pdf"},
                        },
                    ),
                )
            ),
        ),
        (
            body_of(
                [
                    {"role": "user", "content": "hi"}, call(arguments='{"at":"sky"}'),
                    call("taste", "", "d", status="completed", id="fc_1"),
                    call("look", '{"cut', "e"),
                    {
                        "type": "custom_tool_call", "call_id": "f", "name": "patch",
                        "input": "*** X",
                    },
                    call("spawn", "{}", "g", namespace="agents"),
                    output(), output([part("sweet")], "d"), output("", "e"),
                    output("done", "f", "custom_tool"),
                    output([{"type": "input_image", "image_url": DATA_URL}], "g"),
                ]
            ),
            cab.Chat(
                (
                    *HI,
                    turn(
                        "assistant", tool_use(call_id="c", at="sky"), tool_use("taste", "d"),
                        tool_use("look", "e", arguments='{"cut'),
                        tool_use("patch", "f", input="*** X"), tool_use("agents__spawn", "g"),
                    ),
                    turn(
                        "user", tool_result([text("blue")], "c"), tool_result([text("sweet")], "d"),
                        tool_result("(no result)", "e"), tool_result([text("done")], "f"),
                        tool_result([PNG], "g"),
                    ),
                )
            ),
        ),
        (body_of(tools=TOOLS), cab.Chat(HI, client_tools=LOOK)),
        (
            body_of(
                tools=[
                    PATCH,
                    {
                        "type": "namespace", "name": "agents", "description": "Agents.",
                        "tools": [TOOLS[0], {"type": "custom", "name": "raw"}],
                    },
                ]
            ),
            cab.Chat(
                HI,
                client_tools=(
                    function(
                        "patch", cab.CUSTOM_SCHEMA,
                        "Patches.\n\nThe input must match this lark grammar:\nstart: X",
                    ),
                    function("agents__look", description="Does look."),
                    function("agents__raw", cab.CUSTOM_SCHEMA, ""),
                ),
                custom_tools=("patch", "agents__raw"),
            ),
        ),
        (
            # Newer clients offer their tools as an item of the input.
            body_of(
                [
                    {"type": "additional_tools", "role": "developer", "tools": [TOOLS[1]]},
                    {"role": "user", "content": "hi"},
                    {"type": "additional_tools", "role": "developer", "tools": TOOLS},
                ],
                tools=[TOOLS[0]],
            ),
            cab.Chat(HI, client_tools=LOOK),
        ),
        (body_of(tools=TOOLS, tool_choice="none"), cab.Chat(HI)),
        (
            body_of(tools=TOOLS, tool_choice="required"),
            cab.Chat(HI, cab.SYSTEM_PROMPT + ANY_TOOL, client_tools=LOOK),
        ),
        (
            body_of(
                tools=TOOLS,
                tool_choice={
                    "type": "allowed_tools", "mode": "auto",
                    "tools": [{"type": "function", "name": "look"}],
                },
            ),
            cab.Chat(HI, client_tools=LOOK[:1]),
        ),
        *(
            (
                body_of(tools=TOOLS, tool_choice=choice),
                cab.Chat(
                    HI,
                    cab.SYSTEM_PROMPT
                    + "\n\nAnswer with the input for the tool look. Does look.",
                    json_schema=cab.as_json(SCHEMA), forced_tool="look",
                ),
            )
            for choice in (
                {"type": "function", "name": "look"},
                {
                    "type": "allowed_tools", "mode": "required",
                    "tools": [{"type": "function", "name": "look"}],
                },
            )
        ),
        (
            body_of(tools=[PATCH], tool_choice={"type": "custom", "name": "patch"}),
            cab.Chat(
                HI,
                cab.SYSTEM_PROMPT + "\n\nAnswer with the input for the tool patch. Patches.\n\n"
                "The input must match this lark grammar:\nstart: X",
                json_schema=cab.as_json(cab.CUSTOM_SCHEMA), forced_tool="patch",
                custom_tools=("patch",),
            ),
        ),
        (
            body_of(
                text={
                    "format": {
                        "type": "json_schema", "name": "a", "strict": True, "schema": SCHEMA,
                    },
                    "verbosity": None,
                }
            ),
            pinned(json.dumps(SCHEMA)),
        ),
        (
            body_of(text={"format": {"type": "json_object"}}),
            pinned('{"additionalProperties":true}'),
        ),
        (body_of(text={"format": {"type": "text"}}), cab.Chat(HI)),
    ],
)
def test_a_request_of_the_responses_api_becomes_a_chat(body: Any, chat: cab.Chat) -> None:
    actual = read(body)
    assert actual.response_request
    assert cab.replace(actual, response_request=None) == cab.replace(chat, api="responses")


def test_openais_search_is_left_out_where_claude_has_its_own() -> None:
    for kind in ("web_search", "web_search_preview", "web_search_2025_08_26"):
        assert read(body_of(tools=[{"type": kind}, *TOOLS]), True).client_tools == LOOK
        allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": kind}, TOOLS[0]]}
        chat = read(body_of(tools=[{"type": kind}, *TOOLS], tool_choice=allowed), True)
        assert [tool["name"] for tool in chat.client_tools] == ["look"]


@pytest.mark.parametrize(
    "body, field, words",
    [
        ([], "body", "an object"), ({}, "input", "a list"), (body_of(7), "input", "a list"),
        (body_of([7]), "input.0", "an object"), (body_of(" "), "input.0.content", "blank"),
        (body_of([]), "input", "at least one message"),
        (body_of([{"role": "tool", "content": "x"}]), "input.0.role", "developer"),
        (body_of([{"id": "msg_1"}]), "input.0.type", "msg_1 is not an item"),
        (body_of([{"type": "item_reference", "id": "x"}]), "input.0.type", "send the item"),
        (body_of([{"type": "computer_call"}]), "input.0.type", "function_call"),
        (body_of([message("user", {"type": "input_audio"})]), "input.0.content.0.type", "input_te"),
        (
            body_of([message("user", {"type": "input_image", "file_id": "f"})]),
            "input.0.content.0.file_id", "uploaded elsewhere",
        ),
        (body_of([message("user", part(""), {"type": "input_file"})]), None, "file_data"),
        (body_of([{"role": "user", "content": "hi"}, call()]), "input", "the results of the tool"),
        (body_of([{"role": "user", "content": "hi"}, output()]), "input", "do not belong"),
        (
            body_of([{"role": "user", "content": "hi"}, call(), {"role": "user", "content": "x"}]),
            "input", "have no results",
        ),
        (body_of(prompt={"id": "pmpt_1"}), "prompt", "instructions"),
        (body_of(conversation="conv_1"), "conversation", "previous_response_id"),
        (body_of(background=True), "background", "/api/ask"),
        (body_of(instructions=7), "instructions", "a string"),
        (body_of(metadata="x"), "metadata", "an object"),
        (body_of(max_output_tokens="many"), "max_output_tokens", "whole number"),
        (body_of(max_output_tokens=0), "max_output_tokens", "whole number"),
        (body_of(text={"format": {"type": "grammar"}}), "text.format.type", "json_schema"),
        (body_of(text={"format": {"type": "json_schema"}}), "text.format.schema", "an object"),
        (body_of(reasoning={"effort": "huge"}), "reasoning.effort", "minimal"),
        (body_of(model="no way"), "model", "alias"),
        (body_of(tools=[{"type": "web_search"}]), "tools.0.type", "web_search = \"disabled\""),
        *(
            (body_of(tools=[{"type": kind}]), "tools.0.type", kind)
            for kind in (
                "file_search", "computer", "computer_use_preview", "code_interpreter", "mcp",
                "image_generation", "local_shell", "shell", "apply_patch", "tool_search",
                "programmatic_tool_calling",
            )
        ),
        (body_of(tools=[{"name": "look"}]), "tools.0.type", "custom"),
        (body_of(tools=[{"type": "function"}]), "tools.0.name", "a string"),
        (body_of(tools=[TOOLS[0], {**TOOLS[0], "x": 1}]), "tools.1.name", "duplicated"),
        (
            body_of(tools=[{"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]}]),
            "tools.0.tools.0.type", "mcp",
        ),
        (body_of(tool_choice="required"), "tool_choice", "needs tools"),
        (body_of(tools=TOOLS, tool_choice="some"), "tool_choice", "allowed_tools"),
        (body_of(tools=TOOLS, tool_choice={"type": "mcp"}), "tool_choice", "allowed_tools"),
        (
            body_of(tools=TOOLS, tool_choice={"type": "function", "name": "smell"}),
            "tool_choice", "no tool smell",
        ),
        (body_of(tools=TOOLS, tool_choice={"type": "allowed_tools"}), "tool_choice.tools", "list"),
    ],
)
def test_an_invalid_body_is_refused_with_its_field(
    body: Any, field: Optional[str], words: str
) -> None:
    with pytest.raises(cab.InvalidRequest) as caught:
        read(body)
    assert words in str(caught.value)
    if field:
        assert caught.value.extra["field"] == field
        assert str(caught.value).startswith(field)


def test_every_mutated_body_is_read_or_refused() -> None:
    chance = random.Random(7)
    body = body_of(
        [
            message("user", part("hi"), {"type": "input_image", "image_url": DATA_URL}),
            call(), output([part("x")]),
            {"type": "custom_tool_call", "call_id": "f", "name": "patch", "input": "x"},
            output("y", "f", "custom_tool"),
        ],
        instructions="Be.", tools=[*TOOLS, PATCH], text={"format": {"type": "text"}},
        reasoning={"effort": "low"}, metadata={"a": "b"}, stream=True,
        tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [TOOLS[0]]},
    )
    assert read(body)
    for _ in range(2000):
        try:
            chat = read(mutated(body, chance))
        except cab.InvalidRequest as error:
            assert error.extra["field"]
        else:
            assert chat.columns()["chat"].encode()
            if chat.response_request and chat.response_request.is_stored:
                assert chat.columns()["response_settings"].encode()
            assert cab.estimate_tokens(chat) >= 0
            ending = cab.StopInfo("tool_use", None, (cab.ToolCall("c", "look", {}),))
            check_stream(written(chat, response="half", stop_info=ending))


def test_the_estimate_of_tokens() -> None:
    assert cab.estimate_tokens(read(body_of("x" * 35))) == 10
    image = {"type": "input_image", "image_url": DATA_URL}
    assert cab.estimate_tokens(read(body_of([message("user", image, part("x" * 35))]))) == 1510
    chat = read(body_of([message("user", part("hi")), call(), output([image])]))
    assert 1500 < cab.estimate_tokens(chat) < 1520
    with_tools = read(body_of("x" * 35, tools=TOOLS, text={"format": {"type": "json_object"}}))
    assert cab.estimate_tokens(with_tools) > 60


# --- over the wire ---


def post(client: Api, body: Any) -> Answer:
    return client.post(PATH, body)


def words(answer: Any) -> str:
    """Return the text of a response."""
    body = answer.json if isinstance(answer, Answer) else answer
    return "".join(
        content["text"]
        for item in body["output"]
        if item["type"] == "message"
        for content in item["content"]
        if content["type"] == "output_text"
    )


def calls_in(body: Mapping[str, Any]) -> List[Tuple[str, str, Any]]:
    """Return (call id, name, arguments or input) of each call."""
    return [
        (item["call_id"], item["name"], item.get("input") or json.loads(item["arguments"]))
        for item in body["output"]
        if item["type"] != "message"
    ]


def text_part(words: str) -> Dict[str, Any]:
    return {"type": "output_text", "text": words, "annotations": [], "logprobs": []}


def stream_of(data: bytes) -> List[Tuple[str, Any]]:
    """Return (kind without `response.`, data) of each event, and check their numbers and names."""
    stream_events = events(data)
    assert [event["sequence_number"] for _, event in stream_events] == list(
        range(len(stream_events))
    )
    assert all(kind == event["type"] for kind, event in stream_events)
    return [(kind.partition(".")[2], event) for kind, event in stream_events]


# The events of a part: the list of the item that it belongs to, and the field of its number there.
PARTS = {
    "content_part": ("content", "content_index"),
    "reasoning_summary_part": ("summary", "summary_index"),
}


def check_stream(data: bytes) -> Dict[str, Any]:
    """Check that the events agree with each other and with the final response. -> that."""
    stream_events = stream_of(data)
    assert [kind for kind, _ in stream_events[:2]] == ["created", "in_progress"]
    start, (end_kind, end) = stream_events[0][1]["response"], stream_events[-1]
    assert start["status"] == "in_progress" and start["output"] == [] and start["usage"] is None
    assert end_kind == end["response"]["status"]
    done: Dict[int, Any] = {}
    item: Dict[str, Any] = {}
    pieces: List[str] = []
    for kind, event in stream_events[2:-1]:
        if kind == "output_item.added":
            assert not item and event["output_index"] == len(done)
            item = dict(event["item"])
            assert item["status"] == "in_progress" and not item.get("content")
            pieces = []
            continue
        assert event["output_index"] == len(done)
        if kind == "output_item.done":
            done[len(done)] = event["item"]
            assert event["item"]["id"] == item["id"]
            item = {}
            continue
        assert event["item_id"] == item["id"]
        place, _, step = kind.rpartition(".")
        if place in PARTS:
            name, index = PARTS[place]
        if place in PARTS and step == "added":
            assert event[index] == len(item[name])
            assert not event["part"].get("text") and not event["part"].get("refusal")
            pieces = []
        elif kind.endswith(".delta"):
            pieces.append(event["delta"])
        elif place in PARTS:
            item[name].append(event["part"])
        else:
            keys = {"text", "refusal", "arguments", "input"} & set(event)
            assert [event[key] for key in keys] == ["".join(pieces)]
    assert not item
    if end_kind in ("completed", "incomplete"):
        assert list(done.values())[-len(end["response"]["output"]) :] == end["response"]["output"]
    return dict(end["response"])


def written(chat: cab.Chat, **fields: Any) -> bytes:
    """Return the events of a job with these fields, of which "ha" was streamed."""
    assert chat.response_request
    job = cab.Job("0-1", 1, "t", "completed", "hi", 1.8e9, completed_at=1.8e9, **fields)
    parts = cab.AnswerParts(chat)
    pieces = [step for text in ("ha", "lf") for step in parts.add(cab.JobEvent("delta", 0, text))]
    steps = [cab.ChatStep("heartbeat"), *pieces[1:], *parts.finish(job)]
    steps.append(cab.ChatStep("end", job=job))
    data = b"".join(cab.response_stream(chat, job, pieces[0], (step for step in steps)))
    assert cab.HEARTBEAT in data
    data = data.replace(cab.HEARTBEAT, b"")
    end = stream_of(data)[-1][1]["response"]
    whole = cab.as_json(cab.response_body(chat.response_request.settings, job))
    assert end == json.loads(whole.encode("utf-8", "replace"))
    return data


def test_a_response_whole(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    answer = post(admin, body_of("hello", model="haiku", metadata={"a": "b"}))
    (job,) = rows(admin)
    name, short = job["requestId"], job["requestId"].replace("-", "")
    assert answer.status == 200
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == name
    body = answer.json
    expected = {
        **SETTINGS, "id": "resp_" + short, "object": "response", "status": "completed",
        "created_at": body["created_at"], "completed_at": body["completed_at"],
        "background": False, "error": None, "incomplete_details": None, "max_tool_calls": None,
        "model": "resolved-haiku", "metadata": {"a": "b"}, "service_tier": "default",
        "temperature": None, "top_p": None, "top_logprobs": 0, "usage": USAGE,
        "output": [
            {
                "id": "msg_%s_0" % short, "type": "message", "status": "completed",
                "role": "assistant", "content": [text_part("Echo: hello")],
            }
        ],
    }
    assert body == expected
    assert 1_700_000_000 < body["created_at"] <= body["completed_at"]
    assert admin.get(PATH + "/" + body["id"]).json == expected
    assert (job["status"], job["api"], job["message"]) == ("completed", "responses", "hello")
    assert fake.prompts() == ["hello"]


def test_a_response_repeats_the_settings_of_its_request(bridge: Start) -> None:
    admin = bridge().admin
    sent = {
        "instructions": "Be brief.", "max_output_tokens": 100, "metadata": {"k": "v"},
        "parallel_tool_calls": False, "prompt_cache_key": "p", "safety_identifier": "s",
        "reasoning": {"effort": "minimal", "summary": "auto"}, "tools": TOOLS, "user": "u",
        "text": {"format": {"type": "text"}, "verbosity": "low"}, "tool_choice": "none",
        "truncation": "auto",
    }
    for stream in (False, True):
        answer = post(admin, body_of("say x", stream=stream, **sent))
        body = check_stream(answer.data) if stream else answer.json
        assert {name: body[name] for name in sent} == sent
        assert admin.get(PATH + "/" + body["id"]).json == body


def test_a_response_streamed(bridge: Start) -> None:
    admin = bridge().admin
    answer = post(admin, body_of("say hi", stream=True))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    final = check_stream(answer.data)
    stream_events = stream_of(answer.data)
    kinds = [kind for kind, _ in stream_events]
    deltas = kinds.count("output_text.delta")
    assert deltas >= 1 and kinds == [
        "created", "in_progress", "output_item.added", "content_part.added",
        *["output_text.delta"] * deltas, "output_text.done", "content_part.done",
        "output_item.done", "completed",
    ]
    assert words(final) == "hi" and final["usage"] == USAGE
    place = {
        "item_id": "msg_%s_0" % final["id"][5:], "output_index": 0, "content_index": 0,
    }
    assert stream_events[3][1] == {
        "type": "response.content_part.added", "sequence_number": 3, **place,
        "part": text_part(""),
    }
    assert stream_events[-4][1] == {
        "type": "response.output_text.done", "sequence_number": len(kinds) - 4, **place,
        "text": "hi", "logprobs": [],
    }
    assert stream_events[0][1]["response"]["model"] == "resolved-default-model"


def test_an_empty_answer_has_one_empty_text(bridge: Start) -> None:
    admin = bridge().admin
    prompt = script({"result": ""})
    assert post(admin, body_of(prompt)).json["output"][0]["content"] == [text_part("")]
    answer = post(admin, body_of(prompt, stream=True))
    assert check_stream(answer.data)["output"][0]["content"] == [text_part("")]
    assert "output_text.delta" not in dict(stream_of(answer.data))


def test_a_restarted_text_is_an_item_of_its_own(bridge: Start, tmp_path: Path) -> None:
    admin = bridge().admin
    table = (
        ("one ", "one two", ["one two"]),
        ("one ", "won", ["one ", "won"]),
        ("one", "", ["one", ""]),
        ("one two", "one", ["one two", "one"]),
    )
    for n, (first, second, expected) in enumerate(table):
        data = restarted(admin, PATH, body_of, tmp_path / ("gate-%d" % n), first, second)
        final = check_stream(data)
        items = [
            event["item"]
            for kind, event in stream_of(data)
            if kind == "output_item.done"
        ]
        assert [item["content"][0]["text"] for item in items] == expected, (first, second)
        assert [item["status"] for item in items[:-1]] == ["incomplete"] * (len(expected) - 1)
        assert words(final) == second and len(final["output"]) == 1


def test_a_refusal_is_an_item_of_its_own(bridge: Start) -> None:
    admin = bridge().admin
    refused = {"fail": {"stop_reason": "refusal", "result": "API Error: flagged"}}
    refusal = {"type": "refusal", "refusal": cab.REFUSAL_TEXT}
    for prompt, parts in (
        (script(refused), [[refusal]]),
        (script({"delta": "Well, "}, refused), [[text_part("Well, ")], [refusal]]),
    ):
        body = post(admin, body_of(prompt)).json
        assert body["status"] == "completed"
        assert [item["content"] for item in body["output"]] == parts
        answer = post(admin, body_of(prompt, stream=True))
        assert [item["content"] for item in check_stream(answer.data)["output"]] == parts
        kinds = [kind for kind, _ in stream_of(answer.data)]
        assert kinds[-6:] == [
            "content_part.added", "refusal.delta", "refusal.done", "content_part.done",
            "output_item.done", "completed",
        ]


def test_an_answer_that_was_cut_is_incomplete() -> None:
    body = check_stream(
        written(read(body_of()), response="half", stop_info=cab.StopInfo("max_tokens"))
    )
    assert body["status"] == "incomplete" and body["completed_at"] is None
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["status"] == "incomplete" and words(body) == "half"


def test_a_schema_gives_json(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    form = {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}
    for stream in (False, True):
        answer = post(admin, body_of("say sky", text={"format": form}, stream=stream))
        body = check_stream(answer.data) if stream else answer.json
        assert words(body) == '{"answer":"sky"}' and body["text"] == {"format": form}
    assert initialize_requests(fake)[0]["jsonSchema"] == SCHEMA


# --- tools ---


def calling(*calls: Any, **fields: Any) -> Dict[str, Any]:
    prompt = "call " + json.dumps(calls or [["look", {"at": "sky"}]])
    return body_of([message("user", part(prompt))], tools=TOOLS, **fields)


def test_a_call_and_its_result_sent_back_continue_the_live_turn(
    bridge: Start, fake: FakeClaude
) -> None:
    admin = bridge(fake).admin
    body = calling(["look", {"at": "sky"}], ["taste", {}])
    reply = post(admin, body).json
    short = reply["id"][5:]
    assert reply["output"][1:] == [
        {
            "id": "fc_%s_1" % short, "type": "function_call", "status": "completed",
            "call_id": "toolu_0", "name": "look", "arguments": '{"at":"sky"}',
        },
        {
            "id": "fc_%s_2" % short, "type": "function_call", "status": "completed",
            "call_id": "toolu_1", "name": "taste", "arguments": "{}",
        },
    ]
    assert words(reply) == "Let me see." and reply["status"] == "completed"
    more = [*body["input"], *reply["output"], output("sweet", "toolu_1"), output(call_id="toolu_0")]
    end = post(admin, {**body, "input": more})
    sweet = {"content": [{"type": "text", "text": "sweet"}], "isError": False}
    assert json.loads(words(end)) == [*BLUE, sweet]
    assert len(fake.children()) == 1 and len(pids(fake)) == 1


def test_calls_in_a_stream_and_their_results_by_the_previous_response(
    bridge: Start, fake: FakeClaude
) -> None:
    admin = bridge(fake).admin
    body = calling(["look", {"at": "sky"}], ["taste", {}], stream=True)
    answer = post(admin, body)
    final = check_stream(answer.data)
    kinds = [kind for kind, _ in stream_of(answer.data)]
    assert kinds[-9:] == [
        *[
            "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
            "output_item.done",
        ] * 2,
        "completed",
    ]
    results = [output(call_id="toolu_0"), output("sweet", "toolu_1")]
    end = post(
        admin, {**body, "input": results, "previous_response_id": final["id"], "stream": False}
    )
    assert "sweet" in words(end) and end.json["previous_response_id"] == final["id"]
    # The process that waits for the results got them, and nothing was replayed.
    assert len(fake.children()) == 1 and len(pids(fake)) == 1


def test_a_custom_tool_gets_free_text(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    prompt = "call " + json.dumps([["patch", {"input": "*** X"}], ["agents__look", {"at": "sky"}]])
    agents = {"type": "namespace", "name": "agents", "description": "", "tools": [TOOLS[0]]}
    body = body_of(prompt, tools=[PATCH, agents])
    for stream in (False, True):
        answer = post(admin, {**body, "stream": stream})
        reply = check_stream(answer.data) if stream else answer.json
        short = reply["id"][5:]
        # The spaces are those of the model, if it is streamed.
        look = reply["output"][2]
        assert json.loads(look["arguments"]) == {"at": "sky"}
        assert reply["output"][1:] == [
            {
                "id": "ctc_%s_1" % short, "type": "custom_tool_call", "status": "completed",
                "call_id": "toolu_0", "name": "patch", "input": "*** X",
            },
            {
                "id": "fc_%s_2" % short, "type": "function_call", "status": "completed",
                "call_id": "toolu_1", "name": "look", "namespace": "agents",
                "arguments": look["arguments"],
            },
        ]
        if stream:
            kinds = [kind for kind, _ in stream_of(answer.data)]
            start = kinds.index("custom_tool_call_input.delta")
            assert kinds[start - 1 : start + 3] == [
                "output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done",
                "output_item.done",
            ]
    more = [
        {"role": "user", "content": prompt}, *reply["output"],
        output("patched", "toolu_0", "custom_tool"), output("blue", "toolu_1"),
    ]
    end = post(admin, {**body, "input": more})
    assert [result["content"][0]["text"] for result in json.loads(words(end))] == [
        "patched", "blue",
    ]
    assert len(pids(fake)) == 2


def test_tools_in_the_input_stay_in_the_conversation(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake, warm_seconds=0).admin
    agents = {"type": "namespace", "name": "agents", "description": "", "tools": [PATCH]}
    offer = {"type": "additional_tools", "role": "developer", "tools": [agents]}
    first = post(admin, body_of([offer, {"role": "user", "content": "say one"}])).json
    prompt = "call " + json.dumps([["agents__patch", {"input": "*** X"}]])
    for value in (prompt, [offer, {"role": "user", "content": prompt}]):
        reply = post(admin, body_of(value, previous_response_id=first["id"])).json
        assert calls_in(reply) == [("toolu_0", "patch", "*** X")]
        assert reply["output"][1]["namespace"] == "agents" and reply["tools"] == [agents]


def test_a_tool_that_must_be_called(bridge: Start) -> None:
    admin = bridge().admin
    for stream in (False, True):
        answer = post(
            admin,
            body_of(
                "say sky", tools=TOOLS, tool_choice={"type": "function", "name": "look"},
                stream=stream,
            ),
        )
        body = check_stream(answer.data) if stream else answer.json
        call_id = "toolu_" + body["id"][5:]
        assert calls_in(body) == [(call_id, "look", {"answer": "sky"})]
        assert [item["type"] for item in body["output"]] == ["function_call"]


# --- stored responses ---


def turns_of(admin: Api, **fields: Any) -> List[List[str]]:
    """Return the earlier turns that Claude got for a request."""
    return list(json.loads(words(post(admin, body_of("/turns", **fields)))))


def test_a_conversation_by_previous_responses(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake, warm_seconds=0).admin
    first = post(admin, body_of("say one", instructions="Say I.")).json
    items = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "say two"}]
    second = post(admin, body_of(items, previous_response_id=first["id"])).json
    assert second["previous_response_id"] == first["id"] and second["instructions"] is None
    third = post(admin, body_of("turns", previous_response_id=second["id"]))
    assert json.loads(words(third)) == [
        ["user", "say one"], ["assistant", "one"], ["user", "say two"], ["assistant", "two"],
    ]
    # What is said in the input stays; instructions do not.
    prompts = [request["systemPrompt"] for request in initialize_requests(fake)]
    assert "Say I." in prompts and prompts[-1] == "Be kind."
    # Two answers may continue the same one.
    other = post(admin, body_of("turns", previous_response_id=first["id"]))
    assert json.loads(words(other)) == [["user", "say one"], ["assistant", "one"]]


def test_the_chain_goes_on_in_the_same_process(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    body = post(admin, body_of("say one")).json
    for _ in range(3):
        body = post(admin, body_of("say next", previous_response_id=body["id"])).json
    assert len(pids(fake)) == 1


def test_a_chain_survives_a_restart_of_the_bridge(
    bridge: Start, fake: FakeClaude, tmp_path: Path
) -> None:
    config = cab.Config(
        port=0, host="127.0.0.1", no_tunnel=True, data_dir=tmp_path / "data",
        claude=str(fake.path), spare=0,
    )
    with running_bridge(config, {"PATH": ""}, cab.Clock()) as running:
        first = post(running.admin, body_of("say one")).json
        token = running.admin.token
    again = bridge(fake).admin.with_token(token)
    assert again.get(PATH + "/" + first["id"]).json == first
    answer = post(again, body_of("turns", previous_response_id=first["id"]))
    assert json.loads(words(answer)) == [["user", "say one"], ["assistant", "one"]]


def is_missing(client: Api, response_id: str) -> bool:
    answers = [
        client.get(PATH + "/" + response_id), client.delete(PATH + "/" + response_id),
    ]
    for answer in answers:
        if answer.status == 404:
            assert kind_of(answer, "openai") == (404, "not_found")
            assert response_id in answer.json["error"]["message"]
    return [answer.status for answer in answers] == [404, 404]


def is_not_continued(client: Api, response_id: str) -> bool:
    answer = post(client, body_of(previous_response_id=response_id))
    if answer.status == 404:
        assert kind_of(answer, "openai") == (404, "previous_response_not_found")
        assert answer.json["error"]["param"] == "previous_response_id"
        assert response_id in answer.json["error"]["message"]
    return answer.status == 404


def test_references_to_stored_items(bridge: Start, fake: FakeClaude) -> None:
    """The AI SDK sends them by itself for earlier answers."""
    admin = bridge(fake, warm_seconds=0).admin
    owner, other = admin.new_token("owner"), admin.new_token("other")
    first = post(owner, body_of("say one")).json
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    for sent in (reference, {"id": reference["id"]}):
        items = [{"role": "user", "content": "x"}, sent, {"role": "user", "content": "turns"}]
        answer = post(owner, body_of(items))
        assert json.loads(words(answer)) == [["user", "x"], ["assistant", "one"]]
    for client in (other, admin):
        answer = post(client, body_of(items))
        assert kind_of(answer, "openai") == (400, "invalid_request")
        assert reference["id"] in answer.json["error"]["message"]
    called = post(owner, calling()).json
    items = [
        {"role": "user", "content": "x"},
        *({"type": "item_reference", "id": item["id"]} for item in called["output"]),
        output(call_id="toolu_0"),
    ]
    assert words(post(owner, body_of(items))) == "Echo: tool_result"
    # A stream whose text started over had an item before; it is left out.
    name = reference["id"][:-1]
    items = [
        {"role": "user", "content": "x"},
        *({"type": "item_reference", "id": name + number} for number in "01"),
        {"role": "user", "content": "turns"},
    ]
    assert json.loads(words(post(owner, body_of(items)))) == [["user", "x"], ["assistant", "one"]]
    assert owner.delete(PATH + "/" + first["id"]).status == 200
    items = [{"role": "user", "content": "x"}, reference, {"role": "user", "content": "y"}]
    assert post(owner, body_of(items)).status == 400


def test_what_is_not_stored_cannot_be_read_or_continued(bridge: Start, fake: FakeClaude) -> None:
    running = bridge(fake)
    admin = running.admin
    response_id = post(admin, body_of("say one", store=False)).json["id"]
    assert is_missing(admin, response_id) and is_not_continued(admin, response_id)
    for odd in ("resp_" + "0" * 32, "resp_x", "x", response_id.upper(), response_id[5:]):
        assert is_missing(admin, odd) and is_not_continued(admin, odd)
    native = admin.ask("say native")
    admin.done(native)
    assert is_missing(admin, "resp_" + native.replace("-", ""))
    with service_of(running).stores.database.reading() as db:
        stored = db.execute(
            "SELECT count(*) FROM jobs WHERE response_input || response_settings IS NOT NULL"
        ).fetchone()
    assert stored == (0,)


def test_a_deleted_response(bridge: Start) -> None:
    admin = bridge().admin
    first = post(admin, body_of("say one")).json["id"]
    second = post(admin, body_of("say two", previous_response_id=first)).json["id"]
    answer = admin.delete(PATH + "/" + first)
    assert (answer.status, answer.json) == (
        200, {"id": first, "object": "response", "deleted": True},
    )
    assert is_missing(admin, first) and is_not_continued(admin, first)
    # The rest of its conversation is incomplete now.
    assert is_not_continued(admin, second)
    assert admin.get(PATH + "/" + second).status == 200
    assert [row["message"] for row in rows(admin)] == ["say one", "say two"]


def test_only_its_own_token_and_an_admin_see_a_response(bridge: Start) -> None:
    admin = bridge().admin
    owner, other = admin.new_token("owner"), admin.new_token("other")
    first = post(owner, body_of("say one")).json
    assert is_missing(other, first["id"]) and is_not_continued(other, first["id"])
    # An admin sees it, but does not speak in another's conversation.
    assert admin.get(PATH + "/" + first["id"]).json == first
    assert is_not_continued(admin, first["id"])
    assert not is_not_continued(owner, first["id"])
    assert admin.delete(PATH + "/" + first["id"]).status == 200
    assert is_missing(owner, first["id"])


def test_a_response_without_output_cannot_be_continued(bridge: Start, gate: Path) -> None:
    admin = bridge().admin
    failing = post(admin, body_of(script({"fail": {"result": "It broke"}})))
    assert failing.status == 500
    failed = "resp_" + rows(admin)[-1]["requestId"].replace("-", "")
    body = admin.get(PATH + "/" + failed).json
    assert (body["status"], body["output"], body["usage"]) == ("failed", [], None)
    assert body["error"] == {"code": "server_error", "message": "It broke"}
    request = OpenRequest(admin, PATH, body_of("hold %s" % gate, stream=True))
    request.until('"he"')
    running = "resp_" + rows(admin)[-1]["requestId"].replace("-", "")
    assert admin.get(PATH + "/" + running).json["status"] == "in_progress"
    for response_id in (failed, running):
        answer = post(admin, body_of(previous_response_id=response_id))
        assert kind_of(answer, "openai") == (400, "invalid_request")
        assert "no output" in answer.json["error"]["message"]
    gate.touch()
    assert words(check_stream(request.rest())) == "held"
    assert not is_not_continued(admin, running)


def test_a_conversation_has_a_bound(bridge: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    admin = bridge().admin
    monkeypatch.setattr(cab, "CONVERSATION_CHARACTERS", 4000)
    body = post(admin, body_of("say " + "x" * 1400)).json
    answer = post(admin, body_of("say on", previous_response_id=body["id"]))
    assert words(answer) == "on"
    answer = post(admin, body_of("say " + "y" * 1000, previous_response_id=answer.json["id"]))
    refused = post(admin, body_of("say on", previous_response_id=answer.json["id"]))
    assert kind_of(refused, "openai") == (400, "invalid_request")
    assert "longer than" in refused.json["error"]["message"]
    # An input that is too large to be continued is not stored.
    large = post(admin, body_of("say on" + " " * 4000)).json["id"]
    assert admin.get(PATH + "/" + large).status == 200
    assert kind_of(post(admin, body_of(previous_response_id=large)), "openai")[0] == 400


def test_a_stored_response_cannot_be_streamed(bridge: Start) -> None:
    admin = bridge().admin
    response_id = post(admin, body_of("say one")).json["id"]
    answer = admin.get(PATH + "/" + response_id + "?stream=true")
    assert kind_of(answer, "openai") == (400, "invalid_request")


def test_input_tokens(bridge: Start) -> None:
    admin = bridge().admin
    answer = admin.post(PATH + "/input_tokens", body_of("x" * 35))
    assert answer.json == {"object": "response.input_tokens", "input_tokens": 10}
    first = post(admin, body_of("say " + "y" * 66)).json["id"]
    counted = admin.post(
        PATH + "/input_tokens", body_of("x" * 35, previous_response_id=first)
    ).json
    assert counted["input_tokens"] > 40
    assert len(rows(admin)) == 1
    assert kind_of(admin.post(PATH + "/input_tokens", {}), "openai") == (400, "invalid_request")
    for method in ("GET", "DELETE"):
        answer = admin.call(method, PATH + "/input_tokens")
        assert (answer.status, answer.headers["allow"]) == (405, "OPTIONS, POST")


def test_openais_search_needs_a_token_that_may_search(bridge: Start) -> None:
    admin = bridge().admin
    body = body_of("say on", tools=[{"type": "web_search", "external_web_access": False}])
    refused = post(admin, body)
    assert kind_of(refused, "openai") == (400, "invalid_request")
    assert refused.json["error"]["param"] == "tools.0.type"
    for rules in ("web", "all", ["WebSearch"]):
        searcher = admin.new_token("searcher", tools=rules)
        answer = post(searcher, body)
        assert words(answer) == "on" and answer.json["tools"] == body["tools"]
    assert post(admin.new_token("reader", tools="read"), body).status == 400


def test_allowed_models(bridge: Start) -> None:
    limited = bridge().admin.new_token("limited", models=["haiku"])
    assert kind_of(post(limited, body_of(model="opus")), "openai") == (403, "model_not_allowed")
    assert post(limited, body_of(model="gpt-5.2")).json["model"] == "resolved-haiku"


# --- failures, long waits, clients that leave ---


def test_a_failure_after_the_first_delta_is_a_failed_response(
    bridge: Start, fake: FakeClaude, gate: Path
) -> None:
    running = bridge(fake)
    prompt = script({"delta": "half"}, {"wait": str(gate)}, {"fail": {"result": "It broke"}})
    request = OpenRequest(running.admin, PATH, body_of(prompt, stream=True))
    request.until("half")
    gate.touch()
    kind, data = stream_of(request.rest())[-1]
    assert kind == "failed" and data["response"]["status"] == "failed"
    assert data["response"]["error"] == {"code": "server_error", "message": "It broke"}
    nothing_runs(running, fake)


def test_the_plans_limit_after_the_first_delta(
    bridge: Start, fake: FakeClaude, gate: Path, tmp_path: Path
) -> None:
    clock = Skipped()
    limit = refused_once(int(clock.now()) + 3600, tmp_path / "mark")
    prompt = script({"delta": "half"}, {"wait": str(gate)}, limit)
    admin = bridge(fake, clock=clock).admin
    request = OpenRequest(admin, PATH, body_of(prompt, stream=True))
    request.until("half")
    gate.touch()
    kind, data = stream_of(request.rest())[-1]
    assert (kind, data["response"]["error"]["code"]) == ("failed", "rate_limit_exceeded")
    answer = post(admin, body_of("say new", stream=True))
    assert kind_of(answer, "openai") == (429, "rate_limit_exceeded")
    assert answer.headers["x-should-retry"] == "false"


def test_a_failed_run_has_a_status_before_the_first_event(bridge: Start, tmp_path: Path) -> None:
    admin = bridge().admin
    failing = script(once(tmp_path / "mark", {"fail": {"result": "It broke"}}))
    for stream in (False, True):
        (tmp_path / "mark").unlink(missing_ok=True)
        answer = post(admin, body_of(failing, stream=stream))
        assert kind_of(answer, "openai") == (500, "cli_error")


def test_a_late_answer_begins_with_blanks_and_a_silent_stream_has_heartbeats(
    bridge: Start, monkeypatch: pytest.MonkeyPatch, quick: None, tmp_path: Path
) -> None:
    monkeypatch.setattr(cab, "WAIT_SECONDS", 0.04)
    monkeypatch.setattr(cab, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(cab, "CHAT_HOLD_SECONDS", {"network": 0.1})
    admin = bridge().admin
    gate = tmp_path / "whole"
    request = OpenRequest(admin, PATH, body_of(script({"wait": str(gate)}, {"delta": "late"})))
    assert request.response.status == 200 and request.response.read(2) == b"  "
    gate.touch()
    assert words(json.loads(request.rest())) == "late"
    gate = tmp_path / "stream"
    prompt = script({"wait": str(gate)}, {"delta": "late"})
    request = OpenRequest(admin, PATH, body_of(prompt, stream=True))
    for _ in range(2):
        request.data = b""
        request.until(": still here")
    gate.touch()
    assert b'"late"' in request.rest()


def test_a_client_that_disconnects_cancels_its_run(
    bridge: Start, fake: FakeClaude, quick: None
) -> None:
    running = bridge(fake)
    for stream in (False, True):
        request = OpenRequest(running.admin, PATH, body_of("hang", stream=stream))
        wait_until(lambda: fake.prompts()[-1:] == ["hang"])
        if stream:
            request.until("thinking")
        request.disconnect()
        wait_until(lambda: rows(running.admin)[-1].get("errorCode") == "cancelled")
    response_id = "resp_" + rows(running.admin)[-1]["requestId"].replace("-", "")
    body = running.admin.get(PATH + "/" + response_id).json
    assert body["status"] == "cancelled"
    nothing_runs(running, fake)


ODD: Sequence[Any] = ("\ud800", "\x00", "\u2028", "é" * 50, "</s>", "/clear")


def test_odd_texts_come_back_as_they_are(bridge: Start) -> None:
    admin = bridge().admin
    for odd in ODD:
        body = body_of("say " + odd, metadata={"odd": odd}, user=odd)
        expected = odd.replace("\ud800", "\ufffd")
        for stream in (False, True):
            answer = post(admin, {**body, "stream": stream})
            reply = check_stream(answer.data) if stream else answer.json
            assert words(reply) == expected
            stored = admin.get(PATH + "/" + reply["id"]).json
            assert stored["metadata"] == {"odd": expected}
            assert not is_not_continued(admin, reply["id"])


def test_old_stored_responses_are_deleted_with_their_requests(
    bridge: Start, fake: FakeClaude
) -> None:
    clock = Skipped()
    running: RunningBridge = bridge(fake, clock=clock, keep_days=1)
    response_id = post(running.admin, body_of("say one")).json["id"]
    clock.ahead += 3 * 86_400
    wait_until(lambda: running.admin.get(PATH + "/" + response_id).status == 404)


# --- the package `openai` as client, over the real `claude` ---


def with_sdk(test: Any) -> Any:
    """Mark a test that runs a scenario of sdk_client.py."""
    is_linux = sys.platform == "linux"
    test = pytest.mark.skipif(not is_linux, reason="looks into /proc")(test)
    return pytest.mark.real(pytest.mark.parametrize("sdk", ["openai"])(test))


@with_sdk
def test_responses_of_the_sdk(site: Site, run_scenario: RunScenario) -> None:
    result = run_scenario("responses")
    first, second = result["first"], result["second"]
    assert first["text"] == "Echo: hello" and second["text"] == "Echo: again"
    assert first["wire"]["model"] == MODEL and first["wire"]["metadata"] == {"a": "b"}
    assert first["wire"]["usage"] == USAGE
    assert second["wire"]["previous_response_id"] == first["wire"]["id"]
    assert turn_texts(site.calls()[1].body) == [
        ("user", "hello"), ("assistant", "Echo: hello"), ("user", "again"),
    ]
    assert SYSTEM in system_text(site.calls()[0].body)
    assert SYSTEM not in system_text(site.calls()[1].body)
    assert result["pictured"]["text"] == "Echo: see" and result["counted"] == 10
    for streamed in (result["low"], result["high"]):
        assert streamed["text"] == "Echo: hello" and streamed["stop"] == "completed"
        assert streamed["kinds"][-1] == "response.completed"
    for name, code in (("gone", "not_found"), ("lost", "previous_response_not_found")):
        assert (result[name]["class"], result[name]["body"]["code"]) == ("NotFoundError", code)
    assert result["hosted"]["class"] == "BadRequestError"


@with_sdk
def test_schemas_of_the_sdk(site: Site, run_scenario: RunScenario) -> None:
    def reply(body: Dict[str, Any]) -> Reply:
        by_tool = any(tool["name"] == "StructuredOutput" for tool in body.get("tools", []))
        return echo(body) if by_tool else Reply(json.dumps({"answer": last_text(body)}))

    site.messages.reply = reply
    result = run_scenario("responses_schema")
    assert result["parsed"] == ["forty-two"] * 2
    assert [json.loads(text) for text in result["texts"]] == [{"answer": "forty-two"}] * 2


@with_sdk
def test_tools_of_the_sdk(site: Site, run_scenario: RunScenario) -> None:
    site.messages.reply = calls_tools(*MODEL_CALLS)
    result = run_scenario("responses_tools")
    for name in ("called", "low", "streamed"):
        assert result[name]["calls"] == [["add", {"a": 2, "b": 3}], ["look_up", {"word": "cab"}]]
        assert len(set(result[name]["ids"])) == 2
    for name in ("ended", "continued"):
        assert result[name]["text"] == "done" and result[name]["stop"] == "completed"
    assert tool_results(site.calls()[1].body) == [
        (False, RESULTS["add"]), (False, RESULTS["look_up"]),
    ]
    wire = result["custom"]["wire"]["output"]
    assert [item["type"] for item in wire] == ["custom_tool_call", "function_call"]


# --- reasoning ---


def test_reasoning_is_an_item_that_can_be_sent_back(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    asked: Dict[str, Any] = {"reasoning": {"summary": "auto"}}
    whole = post(admin, body_of("think so", **asked)).json
    kinds = [item["type"] for item in whole["output"]]
    assert kinds == ["reasoning", "reasoning", "message"] and words(whole) == "so"
    thought, secret, _ = whole["output"]
    assert thought["summary"] == [{"type": "summary_text", "text": "Let me think."}]
    assert secret["summary"] == [] and secret["encrypted_content"]
    data = post(admin, body_of("think so", stream=True, **asked)).data
    streamed_items = check_stream(data)["output"]
    assert [{**item, "id": ""} for item in streamed_items] == [
        {**item, "id": ""} for item in whole["output"]
    ]
    deltas = [event["delta"] for kind, event in stream_of(data)
              if kind == "reasoning_summary_text.delta"]
    assert "".join(deltas) == "Let me think."
    items = [
        {"role": "user", "content": "a"}, {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "reasoning", "encrypted_content": "gAAAA", "summary": []},
        *whole["output"], {"role": "user", "content": "b"},
    ]
    assert words(post(admin, body_of(items, instructions="x")).json) == "Echo: b"
    told = [line["message"]["content"] for line in fake.lines() if line["type"] == "assistant"][-1]
    thoughts = [
        {"type": "thinking", "thinking": "Let me think.", "signature": "c2ln"},
        {"type": "redacted_thinking", "data": "eA=="},
    ]
    assert told == [*thoughts, {"type": "text", "text": "so"}]
    body = body_of("b", previous_response_id=whole["id"], instructions="y")
    assert words(post(admin, body).json) == "Echo: b"
    told = [line["message"]["content"] for line in fake.lines() if line["type"] == "assistant"][-1]
    assert told == [*thoughts, {"type": "text", "text": "so"}]
    for fields in (
        {"include": ["reasoning.encrypted_content"]}, {}, {"reasoning": {"effort": "none"}},
    ):
        kinds = [item["type"] for item in post(admin, body_of("think so", **fields)).json["output"]]
        assert ("reasoning" in kinds) == ("include" in fields)
