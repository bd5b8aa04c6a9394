"""The wire formats of two other APIs, /v1/messages and /v1/chat/completions: what a request becomes, what comes back, and what a
hostile or a sloppy client can do with them."""
from __future__ import annotations

import contextlib
import copy
import http.client
import json
import os
import random
import re
import select
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import pytest

import claude_api_bridge as cab
from conftest import Answer, Api, FakeClaude, Program, RunningBridge, is_running, wait_until
from test_stream import OVERLOADED, Skipped, refused_once, script

Start = Callable[..., RunningBridge]
Fakes = Callable[..., FakeClaude]
PATHS = {"anthropic": "/v1/messages", "openai": "/v1/chat/completions"}
both = pytest.mark.parametrize("api", list(PATHS))
PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
FAR = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}}


# --- requests ---

def turn(role: str, *blocks: Any) -> Dict[str, Any]:
    return {"role": role, "content": [text(each) if isinstance(each, str) else each for each in blocks]}


def text(words: str) -> Dict[str, Any]:
    return {"type": "text", "text": words}


def tool_use(name: str = "look", call_id: str = "toolu_0", **given: Any) -> Dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def tool_result(content: Any = "blue", call_id: str = "toolu_0", **more: Any) -> Dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def talk(*contents: Any, **more: Any) -> Dict[str, Any]:
    """A body, for either format where the contents are texts: user and assistant in turn."""
    return {"max_tokens": 64, "messages": [{"role": ("user", "assistant")[n % 2], "content": each} for n, each in enumerate(contents)],
            **more}


def tools(api: str, *names: str, schema: Any = None) -> List[Dict[str, Any]]:
    """The client's tools, as a format offers them."""
    told = [(name, {"name": name, "description": "Does %s." % name}, SCHEMA if schema is None else schema) for name in names or ("look",
        "taste")]
    if api == "anthropic":
        return [{**tool, "input_schema": each} for _, tool, each in told]
    return [{"type": "function", "function": {**tool, "parameters": each}} for _, tool, each in told]


def read(api: str, body: Any) -> cab.Chat:
    return (cab.read_messages if api == "anthropic" else cab.read_completions)(body)


def function(name: str, schema: Any = None, description: Optional[str] = None) -> Dict[str, Any]:
    return {"name": name, "description": "Does %s." % name if description is None else description, "inputSchema": schema or SCHEMA}


HI = (turn("user", "hi"),)
BEGUN = turn("user", "(The conversation begins.)")
LOOK = (function("look"), function("taste"))


@pytest.mark.parametrize("body, chat", [
    (talk("hi"), cab.Chat(HI)),
    (talk([text("hi"), text(" \n"), text("there")]), cab.Chat((turn("user", "hi", "there"),))),
    (talk("hi", model="default", metadata={"user_id": "u"}, temperature=7, top_k=1, thinking={"type": "enabled"}), cab.Chat(HI)),
    (talk("hi", model="claude-opus-4-1", stream=True), cab.Chat(HI, model="claude-opus-4-1", stream=True)),
    (talk("hi", system="Be brief."), cab.Chat(HI, "Be brief.")),
    (talk("hi", system=[{**text("One."), "cache_control": {"type": "ephemeral"}}, text("Two.")]), cab.Chat(HI, "One.\n\nTwo.")),
    (talk("hi", system=""), cab.Chat(HI)),
    ({"messages": [{"role": "user", "content": "hi"}, {"role": "system", "content": "Mid."}]}, cab.Chat(HI, "Mid.")),
    (talk("a", "b", "c"), cab.Chat((turn("user", "a"), turn("assistant", "b"), turn("user", "c")))),
    (talk("a", "", "c"), cab.Chat((turn("user", "a"), turn("assistant", "(no answer)"), turn("user", "c")))),
    ({"messages": [turn("assistant", "b"), turn("user", "c"), turn("user", "d")]},
     cab.Chat((BEGUN, turn("assistant", "b"), turn("user", "c", "d")))),
    (talk([{**PNG, "cache_control": 1}, FAR, {"type": "document", "title": "T", "context": None, "source": {
        "type": "text", "media_type": "text/plain", "data": "D", "more": 1}}]),
     cab.Chat((turn("user", PNG, FAR, {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "D"},
                                       "title": "T"}),))),
    (talk("a", [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": 5}, text("b")], "c"),
     cab.Chat((turn("user", "a"), turn("assistant", "b"), turn("user", "c")))),
    (talk("a", [tool_use(at="x")], [text("so"), tool_result(None, is_error=True)], tools=tools("anthropic")),
     cab.Chat((turn("user", "a"), turn("assistant", tool_use(at="x")), turn("user", tool_result("(no result)", is_error=True), "so")),
              client_tools=LOOK)),
    (talk("hi", tools=tools("anthropic"), tool_choice={"type": "none"}), cab.Chat(HI)),
    (talk("hi", tools=tools("anthropic"), tool_choice={"type": "any", "disable_parallel_tool_use": True}),
     cab.Chat(HI, cab.SYSTEM_PROMPT + "\n\nAnswer with a call of at least one of the tools.\n\nCall at most one tool at a time.",
              client_tools=LOOK)),
    (talk("hi", system="S", tools=tools("anthropic"), tool_choice={"type": "tool", "name": "taste"}),
     cab.Chat(HI, "S\n\nAnswer with the input for the tool taste. Does taste.", forced_tool="taste", json_schema=cab.as_json(SCHEMA))),
    (talk("hi", tools=[{"name": "a", "input_schema": None}]), cab.Chat(HI, client_tools=(function("a", {"type": "object"}, ""),))),
    (talk("hi", stop_sequences=["\n", "END"]), cab.Chat(HI, stop_sequences=("\n", "END"))),
    (talk("hi", output_config={"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}}),
     cab.Chat(HI, effort="high", json_schema=cab.as_json(SCHEMA))),
    (talk("\ud800", system="\udc00"), cab.Chat((turn("user", "\ufffd"),), "\ufffd")),
])
def test_a_request_of_the_messages_api_becomes_a_chat(body: Any, chat: cab.Chat) -> None:
    before = copy.deepcopy(body)
    plain = [{**each, "content": [{**block, "content": block["content"] if isinstance(block["content"], list) else [text(block["content"])]}
              if block["type"] == "tool_result" and block["content"] != "(no result)" else block for block in each["content"]]}
              for each in chat.turns]
    assert cab.read_messages(body) == cab.replace(chat, turns=tuple(plain))
    assert body == before


def call_of(name: str = "look", arguments: Any = '{"at":"x"}', call_id: str = "call_0") -> Dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def openai(**fields: Any) -> cab.Chat:
    return cab.Chat(**{"turns": HI, "include_usage": False, "api": "openai", **fields})


@pytest.mark.parametrize("body, chat", [
    (talk("hi"), openai()),
    (talk("hi", model="gpt-4o", temperature=2, seed=1, logprobs=True, user="u", store=False, n=1), openai()),
    *((talk("hi", model=model), openai()) for model in ("o3-mini", "GPT-5", "chatgpt-4o-latest", "codex", "default")),
    (talk("hi", model="sonnet", stream=True, stream_options={"include_usage": True}),
     openai(model="sonnet", stream=True, include_usage=True)),
    ({"messages": [{"role": "system", "content": "A"}, {"role": "user", "content": [text("hi")], "name": "n"},
                   {"role": "developer", "content": [text("B"), text("C")]}]}, openai(system_prompt="A\n\nB\n\nC")),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=",
        "detail": "low"}},
                                                {"type": "image_url", "image_url": "https://example.com/a.png"},
                                                {"type": "file", "file": {"filename": "f.pdf",
                                                    "file_data": "data:application/pdf;x=y;base64,AA=="}}]}]},
     openai(turns=(turn("user", PNG, FAR, {"type": "document", "title": "f.pdf", "source": {
         "type": "base64", "media_type": "application/pdf", "data": "AA=="}}),))),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None,
                                                      "tool_calls": [call_of(), call_of("taste", "", "call_1")]},
                   {"role": "tool", "tool_call_id": "call_1", "content": "sweet"},
                   {"role": "tool", "tool_call_id": "call_0", "content": [text("blue")]},
                   {"role": "user", "content": "so"}], "tools": tools("openai"), "tool_choice": "auto"},
     openai(turns=(turn("user", "a"), turn("assistant", tool_use("look", "call_0", at="x"), tool_use("taste", "call_1")),
                   turn("user", tool_result([text("sweet")], "call_1"), tool_result([text("blue")], "call_0"), "so")), client_tools=LOOK)),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                   {"role": "user", "content": "b"}]}, openai(turns=(turn("user", "a"), turn("assistant", "No."), turn("user", "b")))),
    (talk("hi", stop="END"), openai(stop_sequences=("END",))),
    (talk("hi", stop=None, response_format={"type": "text"}, tool_choice="none", parallel_tool_calls=False), openai()),
    (talk("hi", response_format={"type": "json_object"}), openai(json_schema='{"type":"object","additionalProperties":true}')),
    (talk("hi", response_format={"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}),
     openai(json_schema=cab.as_json(SCHEMA))),
    (talk("hi", response_format={"type": "json_schema", "json_schema": {"name": "n"}}), openai(json_schema='{"type":"object"}')),
    *((talk("hi", reasoning_effort=given), openai(effort=effort)) for given, effort in (
        ("none", "low"), ("minimal", "low"), ("high", "high"), (None, None))),
    (talk("hi", tools=tools("openai", "look"), tool_choice="required"), openai(
        system_prompt=cab.SYSTEM_PROMPT + "\n\nAnswer with the input for the tool look. Does look.", forced_tool="look",
        json_schema=cab.as_json(SCHEMA))),
    (talk("hi", tools=tools("openai"), tool_choice={"type": "function", "function": {"name": "taste"}}), openai(
        system_prompt=cab.SYSTEM_PROMPT + "\n\nAnswer with the input for the tool taste. Does taste.", forced_tool="taste",
        json_schema=cab.as_json(SCHEMA))),
    (talk("hi", tools=tools("openai"), parallel_tool_calls=False), openai(
        system_prompt=cab.SYSTEM_PROMPT + "\n\nCall at most one tool at a time.", client_tools=LOOK)),
])
def test_a_request_of_the_chat_completions_api_becomes_a_chat(body: Any, chat: cab.Chat) -> None:
    before = copy.deepcopy(body)
    assert cab.read_completions(body) == chat
    assert body == before


def forced_tool(name: Any) -> Dict[str, Any]:
    return talk("hi", tools=tools("anthropic"), tool_choice={"type": "tool", "name": name})


def asked(arguments: Any = "{}", **more: Any) -> Dict[str, Any]:
    """A body of Chat Completions with one call of a tool, and its result."""
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{**call_of(arguments=arguments), **more}]},
                         {"role": "tool", "tool_call_id": "call_0", "content": "r"}]}


DEEP = '{"a":%s1%s}' % ("[" * 300, "]" * 300)
REFUSED: Sequence[Tuple[str, Any, str]] = [
    *((api, body, field) for api in PATHS for body, field in (
        ([], "body"), (None, "body"), ("x", "body"), ({}, "messages"), ({"messages": {}}, "messages"), ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages.0"), ({"messages": [{}]}, "messages.0.role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"), (talk(""), "messages.0.content"),
        (talk(" \n"), "messages.0.content"), (talk([]), "messages.0.content"), (talk(None), "messages.0.content"),
        (talk(5), "messages.0.content"),
        (talk("a", "b"), "messages"), (talk([text("x"), 5]), "messages.0.content.1" if api == "anthropic" else "messages.0"),
        (talk([{"type": "text", "text": 5}]), "messages.0.content.0.text"), (talk([{"type": "text"}]), "messages.0.content.0.text"),
        (talk([{"type": "input_audio"}]), "messages.0.content.0.type"), (talk([{"type": ["text"]}]), "messages.0.content.0.type"),
        (talk("hi", model=5), "model"), (talk("hi", model="a b"), "model"), (talk("hi", model="--flag"), "model"),
        (talk("hi", model=["sonnet"]), "model"),
        (talk("hi", tools="x"), "tools"), (talk("hi", tools={"a": 1}), "tools"),
        (talk("hi", tools=["x"]), "tools.0" if api == "anthropic" else "tools.0.function"),
        (talk("hi", tools=tools(api, "a", "a")), "tools.1.name" if api == "anthropic" else "tools.1.function.name"),
        (talk("hi", tools=tools(api, "a b")), "tools.0.name" if api == "anthropic" else "tools.0.function.name"),
        (talk("hi", tools=tools(api, "a" * 119)), "tools.0.name" if api == "anthropic" else "tools.0.function.name"),
        *((talk("hi", tools=tools(api, "a", schema=schema)), "tools.0" if api == "anthropic" else "tools.0.function") for schema in (
            {"type": "array"}, {"type": None}, {"properties": []}, {"properties": {"a": 5}}, {"required": "a"}, {"required": [5]},
            {"properties": None})),
        (talk("hi", tools=tools(api, *("t%d" % n for n in range(cab.MAX_CLIENT_TOOLS + 1)))), "tools"),
        (talk("hi", stream="yes"), "stream"), (talk("hi", stream=1), "stream"), (talk("hi", stream=[0]), "stream"))),
    *(("anthropic", body, field) for body, field in (
        (talk("hi", system=5), "system"), (talk("hi", system=[PNG]), "system.0.type"), (talk("hi", system=["x"]), "system.0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (talk([{"type": "image"}]), "messages.0.content.0.source"), (talk([{"type": "image", "source": {"type": "file"}}]),
            "messages.0.content.0.source.type"),
        (talk([{"type": "image", "source": {"type": []}}]), "messages.0.content.0.source.type"),
        (talk([{"type": "image", "source": {"type": {}}}]), "messages.0.content.0.source.type"),
        (talk([{"type": "image", "source": {"type": "url", "url": None}}]), "messages.0.content.0.source.url"),
        (talk([{"type": "document", "title": 5, "source": PNG["source"]}]), "messages.0.content.0.title"),
        (talk([tool_use()]), "messages.0.content.0.type"), (talk("a", [tool_result()], "c"), "messages.1.content.0.type"),
        (talk("a", [tool_use(call_id="a b")], [tool_result(call_id="a b")]), "messages.1.content.0.id"),
        (talk("a", [{**tool_use(), "id": 5}], [tool_result()]), "messages.1.content.0.id"),
        (talk("a", [{**tool_use(), "input": "x"}], [tool_result()]), "messages.1.content.0.input"),
        (talk("a", [tool_use("a b")], [tool_result()]), "messages.1.content.0.name"),
        (talk("a", [tool_use()], [tool_result([tool_result()])]), "messages.2.content.0.content.0.type"),
        (talk("a", [tool_use()], [tool_result(5)]), "messages.2.content.0.content"),
        (talk("a", [tool_use()], "no result"), "messages"), (talk([tool_result()]), "messages"),
        (talk("a", "b", [tool_result()]), "messages"),
        (talk("a", [tool_use()], [tool_result(), tool_result()]), "messages"),
        (talk("a", [tool_use()], [tool_result(), tool_result(call_id="other")]), "messages"),
        (talk("hi", tools=[{"type": "web_search_20250305", "name": "web_search"}]), "tools.0.type"),
        (talk("hi", tools=[{"type": [], "name": "a"}]), "tools.0.type"),
        (talk("hi", mcp_servers=[{"url": "x"}]), "mcp_servers"), (talk("hi", tool_choice={"type": "any"}), "tool_choice"),
        (talk("hi", tool_choice={"type": "tool", "name": "a"}), "tool_choice"), (talk("hi", tool_choice="auto"), "tool_choice"),
        (talk("hi", tool_choice={"type": []}), "tool_choice.type"), *((forced_tool(name), "tool_choice") for name in ("other", None, 5, [], {},
            ["look"])),
        (talk("hi", stop_sequences="x" * 1001), "stop_sequences"), (talk("hi", stop_sequences=[""]), "stop_sequences"),
        (talk("hi", stop_sequences=[5]), "stop_sequences"), (talk("hi", stop_sequences={"a": 1}), "stop_sequences"),
        (talk("hi", stop_sequences=["x"] * 17), "stop_sequences"), (talk("hi", output_config=[1]), "output_config"),
        (talk("hi", output_config={"effort": "huge"}), "output_config.effort"),
        (talk("hi", output_config={"effort": []}), "output_config.effort"),
        (talk("hi", output_config={"format": "json"}), "output_config.format"),
        (talk("hi", output_config={"format": {"type": "x"}}), "output_config.format.type"),
        (talk("hi", output_format={"type": "json_schema", "schema": []}), "output_config.format.schema"))),
    *(("openai", body, field) for body, field in (
        *((talk("hi", **{name: [1]}), name) for name in cab.REFUSED_BY_COMPLETIONS), (talk("hi", n=2), "n"), (talk("hi", n="1"), "n"),
        (talk("hi", n=[]), "n"), (talk("hi", n="x" * 5000), "n"),
        ({"messages": [{"role": "system", "content": [PNG]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "system"}]}, "messages.0.content"),
        (talk([{"type": "image_url"}]), "messages.0.content.0.image_url.url"),
        (talk([{"type": "image_url", "image_url": {"url": []}}]), "messages.0.content.0.image_url.url"),
        (talk([{"type": "file"}]), "messages.0.content.0.file"), (talk([{"type": "file", "file": {"file_id": "f"}}]),
            "messages.0.content.0.file.file_data"),
        ({"messages": [{"role": "assistant", "content": 5}, {"role": "user", "content": "x"}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages.0.tool_calls.0"),
        (asked(function=5), "messages.1.tool_calls.0.function"), (asked("{"), "messages.1.tool_calls.0.function.arguments"),
        (asked({"a": 1}), "messages.1.tool_calls.0.function.arguments"),
        *((asked(given), "messages.1.tool_calls.0.function.arguments") for given in ('{"a":NaN}', '{"a":-Infinity}', '{"a":1e999}', DEEP,
            "[" * 100_000)),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.content.0.tool_use_id"),
        ({"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}, "messages"),
        (talk("hi", tools=[{"type": "custom"}]), "tools.0.type"),
        (talk("hi", tools=[{"type": "function"}]), "tools.0.function"), (talk("hi", tool_choice="required"), "tool_choice"),
        (talk("hi", tool_choice="any"), "tool_choice"),
        (talk("hi", tool_choice=["auto"]), "tool_choice"), (talk("hi", tool_choice={"type": "function", "function": "x"}), "tool_choice"),
        *((talk("hi", tools=tools("openai"), tool_choice={"type": "function", "function": {"name": name}}),
           "tool_choice") for name in (None, [], {})),
        (talk("hi", stop=["a"] * 17), "stop"), (talk("hi", stop=5), "stop"), (talk("hi", response_format="json"), "response_format"),
        (talk("hi", response_format={"type": "xml"}), "response_format.type"),
        (talk("hi", response_format={"type": []}), "response_format.type"),
        (talk("hi", response_format={"type": "json_schema"}), "response_format.json_schema"),
        (talk("hi", response_format={"type": "json_schema", "json_schema": {"schema": [1]}}), "response_format.json_schema.schema"),
        (talk("hi", stream_options=[1]), "stream_options"), (talk("hi", reasoning_effort="huge"), "reasoning_effort"),
        (talk("hi", reasoning_effort=[]), "reasoning_effort"))),
]


@both
def test_what_cannot_be_used_is_refused_with_its_field(api: str) -> None:
    wrong = []
    for _, body, field in [row for row in REFUSED if row[0] == api]:
        try:
            found: Any = read(api, body).to_json()
        except cab.InvalidRequest as refused:
            found = refused.extra.get("field") if len(str(refused)) < 500 else "%d characters" % len(str(refused))
            assert cab.completion_error(refused)["error"]["param"] == refused.extra.get("field")
        except Exception as error:
            found = repr(error)
        if found != field:
            wrong.append("%.200s -> %.200s, not %s" % (json.dumps(body), found, field))
    assert not wrong, "\n".join(wrong)


SEEDS: Mapping[str, Sequence[Any]] = {
    "anthropic": [
        talk([text("x"), PNG, FAR, {"type": "document", "title": "T", "context": "C",
                                    "source": {"type": "text", "media_type": "text/plain", "data": "D"}}],
             [{"type": "thinking"}, text("b"), tool_use(a=[1, {"b": None}])], [tool_result([text("r"), PNG], is_error=True), text("y")],
             model="haiku",
             system=[text("s")], tools=tools("anthropic"), tool_choice={"type": "tool", "name": "look", "disable_parallel_tool_use": True},
             stream=True,
             stop_sequences=["a"], output_config={"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}}, metadata={},
             mcp_servers=None),
        talk("a", "b", "c", system="s", tools=[{"name": "t"}], tool_choice={"type": "any"}, stop_sequences="a", output_format=None)],
    "openai": [
        {"messages": [{"role": "system", "content": "s"}, {"role": "developer", "content": [text("d")]},
                      {"role": "user", "content": [text("x"), {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                                                   {"type": "file", "file": {"filename": "f",
                                                       "file_data": "data:application/pdf;base64,AA=="}}]},
                      {"role": "assistant", "content": [text("b"), {"type": "refusal", "refusal": "no"}], "tool_calls": [call_of()]},
                      {"role": "tool", "tool_call_id": "call_0", "content": [text("r")]}], "model": "gpt-4o", "tools": tools("openai"),
                      "stop": ["a"],
         "tool_choice": {"type": "function", "function": {"name": "look"}}, "parallel_tool_calls": False, "stream": True, "n": 1,
         "reasoning_effort": "none",
         "stream_options": {"include_usage": True}, "response_format": {"type": "json_schema",
             "json_schema": {"name": "n", "schema": SCHEMA}}},
        talk("a", "b", "c", model="haiku", response_format={"type": "json_object"}, tools=tools("openai", "t"), tool_choice="required",
             stop="x")]}
ODD: Sequence[Any] = (None, True, False, 0, 1, -1, 1.5, 10 ** 30, "", " ", "x", "/x", "\ud800", "\x00", "auto", "{", "[[" * 2000, "x" * 200,
                      [], {}, [[]], [{}], [None],
                      ["x"], {"type": []}, {"type": "text"}, {"": None}, {"type": "object", "properties": {"a": {}}},
                      [{"type": "text", "text": "/y"}])


def places(value: Any, before: Tuple[Any, ...] = ()) -> Iterator[Tuple[Any, ...]]:
    """The way to every value in a body."""
    yield before
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*before, key))


def mutated(body: Any, chance: random.Random) -> Any:
    """A body with one to three odd values, or values in each other's place."""
    body = copy.deepcopy(body)
    for _ in range(chance.choice((1, 1, 2, 3))):
        ways = list(places(body))[1:]
        if not ways:
            break
        *way, last = chance.choice(ways)
        place = body
        for key in way:
            place = place[key]
        if chance.random() < 0.15:
            del place[last]
        elif chance.random() < 0.2:
            other = body
            for key in chance.choice(ways):
                other = other[key]
            place[last] = copy.deepcopy(other)
        else:
            place[last] = copy.deepcopy(chance.choice(ODD))
    return body


@both
def test_whatever_comes_is_read_or_refused(api: str) -> None:
    """Nothing else is raised; and what is read can be stored, read again, and told to the CLI as JSON that is JSON."""
    chance, was_read = random.Random(5), 0
    features = cab.Features.read("2.1.330", "")
    token = cab.Token("t", "t", "p", "stateless", None, 0.0, None, False)
    for n in range(1200):
        body = mutated(SEEDS[api][n % 2], chance)
        try:
            chat = read(api, body)
        except cab.InvalidRequest:
            continue
        except Exception as error:
            raise AssertionError("%r by %s" % (error, json.dumps(body))) from error
        was_read += 1
        told = json.loads(chat.to_json())
        again = cab.Chat(tuple(told["turns"]), client_tools=tuple(told["functions"]), forced_tool=told["forced"], stop_sequences=tuple(told["stops"]))
        job = cab.Job("j", 1, "t", "queued", chat.message, 0.0, model=chat.model, system_prompt=chat.system_prompt,
                      json_schema=chat.json_schema)
        work = cab.chat_work(job, token, again)
        lines = [*cab.initialize_request(work.setup, features), cab.user_message(work.message)]
        for exchange in work.history():
            lines += [cab.user_message(exchange.message, asks=False), cab.assistant_message(exchange.response, "m")]
        for line in lines:
            cab.parse_json(json.dumps(line).encode())
            last = line["message"]["content"][-1] if "message" in line else {}
            assert line["type"] != "user" or not str(last.get("text")).startswith("/")
        assert not any(user["role"] != ("user", "assistant")[n % 2] for n,
                       user in enumerate(again.turns)) and again.turns[-1]["role"] == "user"
    assert was_read > 100


# --- stop sequences ---

def earliest_end(whole: str, stop_sequences: Sequence[str]) -> Tuple[str, Optional[str]]:
    """What a server does that looks after every character: the first stop sequence that is complete ends the text, the longest of two."""
    for end in range(len(whole) + 1):
        found = [stop for stop in stop_sequences if whole[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return whole[:end - len(longest)], longest
    return whole, None


def halves(whole: str) -> str:
    """As the CLI may cut it: characters outside of the first plane as two."""
    return "".join(each if each < "\U00010000" else "".join(map(chr, memoryview(each.encode("utf-16-le")).cast("H"))) for each in whole)


def heard(pieces: Sequence[str], stop_sequences: Sequence[str]) -> Tuple[str, Optional[str], List[str]]:
    """-> (the text in the end, by which stop it ended, what could be read after each piece)."""
    live, seen = cab.LiveText(stop_sequences=stop_sequences), []
    for piece in pieces:
        live.add(piece)
        seen.append(live.read())
        if live.stopped_by:
            return live.read(), live.stopped_by, seen
    rest, stop = cab.cut_at_stop(cab.replace_surrogates("".join(pieces)), stop_sequences)
    live.finish(rest)
    return live.read(), stop, seen


@pytest.mark.parametrize("whole, stop_sequences, cut", [
    ("abc", (), ("abc", None)), ("abc", ("x",), ("abc", None)), ("abc", ("b",), ("a", "b")), ("abcabc", ("c", "b"), ("a", "b")),
    ("abc", ("abc",), ("", "abc")),
    ("abc", ("b", "bc"), ("a", "b")), ("abc", ("c", "bc"), ("a", "bc")), ("abcd", ("bcd", "c"), ("ab", "c")), ("", ("a",), ("", None)),
    ("aaa", ("aa",), ("", "aa"))])
def test_the_first_stop_sequence_that_is_complete_ends_a_text(whole: str, stop_sequences: Sequence[str], cut: Tuple[str, Optional[str]]) -> None:
    assert cab.cut_at_stop(whole, stop_sequences) == cut == earliest_end(whole, stop_sequences)
    assert heard(list(whole), stop_sequences)[:2] == cut


@pytest.mark.parametrize("whole, stop_sequences, size", [
    ("", ("ab",), 0), ("xa", ("ab",), 1), ("xab", ("ab",), 0), ("aaa", ("aaab",), 3), ("aaa", ("aab",), 2), ("ba", ("ab", "bac"), 2),
    ("x", (), 0)])
def test_as_much_is_held_back_as_may_become_a_stop_sequence(whole: str, stop_sequences: Sequence[str], size: int) -> None:
    assert cab.possible_stop(whole, stop_sequences) == size


def test_however_a_text_is_cut_the_same_of_it_is_told_and_nothing_of_a_stop_sequence() -> None:
    chance = random.Random(7)
    for n in range(2000):
        letters = "ab" if n % 3 else "a\U0001f600\n"
        whole = "".join(chance.choice(letters) for _ in range(chance.randrange(12)))
        stop_sequences = ["".join(chance.choice(letters) for _ in range(chance.randrange(1, 5))) for _ in range(chance.randrange(1, 4))]
        units = halves(whole)
        cuts = sorted(chance.randrange(len(units) + 1) for _ in range(chance.randrange(6)))
        pieces = [units[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(units)])]
        final, stop, seen = heard(pieces, stop_sequences)
        expected = earliest_end(whole, stop_sequences)
        assert (final, stop) == expected == cab.cut_at_stop(whole, stop_sequences), (pieces, stop_sequences)
        assert all(final.startswith(each) for each in seen), (pieces, stop_sequences, seen)


# --- the words of the CLI ---

def test_long_descriptions_of_tools_are_told_in_the_instructions() -> None:
    long = "x" * 2001
    told, more = cab.truncate_descriptions([function("a"), function("b", description=long)])
    first, second = told
    assert first == function("a") and len(second["description"]) < 2000 and "instructions" in second["description"]
    assert more == "\n\nThe description of the tool mcp__api__b:\n" + long
    assert cab.truncate_descriptions([]) == ((), "") and cab.truncate_descriptions([function("a", description="x" * 2000)])[1] == ""


@pytest.mark.parametrize("block, told", [
    (tool_result("r"), {"content": [{"type": "text", "text": "r"}], "isError": False}),
    (tool_result(None, is_error=True), {"content": [{"type": "text", "text": "(no result)"}], "isError": True}),
    (tool_result([text("/r"), PNG]), {"content": [{"type": "text", "text": "/r"},
                                                  {"type": "image", "data": "iVBORw0KGgo=", "mimeType": "image/png"}], "isError": False}),
    (tool_result([FAR]), None), (tool_result([{"type": "document", "source": PNG["source"]}]), None),
    (tool_result("x" * 40_000), {"content": [{"type": "text", "text": "x" * 40_000}], "isError": False}),
    (tool_result("x" * 40_001), None), (tool_result([text("x" * 20_000), text("y" * 20_001)]), None)])
def test_results_that_the_cli_hands_on_as_they_are(block: Any, told: Any) -> None:
    assert cab.mcp_content(block) == told
    assert cab.mcp_results([block]) == ({"toolu_0": told} if told else None)
    assert cab.mcp_results([tool_result(call_id="b"), block, text("x")]) is None


def test_only_a_turn_of_results_continues_a_call() -> None:
    assert cab.mcp_results("text") is None and cab.mcp_results([]) is None and cab.mcp_results([text("a")]) is None
    assert list(cab.mcp_results([tool_result(call_id="b"), tool_result(call_id="a")]) or ()) == ["b", "a"]


def test_no_text_becomes_a_command() -> None:
    blocks = [text("/one"), text("/two")]
    for asks in (True, False):
        message = cab.user_message(blocks, asks)
        assert message["message"]["content"] == [text("/one"), text(" /two")] and message.get("shouldQuery") is (None if asks else False)
    assert blocks == [text("/one"), text("/two")]
    assert cab.user_message([text("/one"), PNG])["message"]["content"] == [text("/one"), PNG]
    assert cab.user_message("/one")["message"]["content"] == [text(" /one")]
    assert cab.assistant_message([tool_use()], "m")["message"] == {"id": "m", "role": "assistant", "content": [tool_use()]}
    assert cab.assistant_message(" ")["message"]["content"] == [text("(no answer)")]


# --- bodies ---

JOB = cab.Job("0-1", 1, "t", "completed", "hi", 1_800_000_000.0, model="m", response="hello", usage=cab.Usage(1, 2, 3, 4, 0.5),
              stop_info=cab.StopInfo())
CALLED = cab.replace(JOB, response="", stop_info=cab.StopInfo("tool_use", None, (cab.ToolCall("c", "look", {"at": "é"}),)))


@pytest.mark.parametrize("job, message, completion", [
    (JOB, {}, {}),
    (cab.replace(JOB, stop_info=None, usage=None, model=None, response=""),
     {"content": [text("")], "model": "default", "usage": {"input_tokens": 0, "cache_creation_input_tokens": 0,
                                                           "cache_read_input_tokens": 0, "output_tokens": 0}},
     {"model": "default", "message": {"content": ""}, "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0,
         "prompt_tokens_details": {"cached_tokens": 0}}}),
    (CALLED, {"content": [{"type": "tool_use", "id": "c", "name": "look", "input": {"at": "é"}}], "stop_reason": "tool_use"},
     {"finish_reason": "tool_calls", "message": {"content": None, "tool_calls": [
         {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at":"é"}'}}]}}),
    (cab.replace(JOB, stop_info=cab.StopInfo("stop_sequence", "END")), {"stop_reason": "stop_sequence", "stop_sequence": "END"}, {}),
    (cab.replace(JOB, stop_info=cab.StopInfo("max_tokens")), {"stop_reason": "max_tokens"}, {"finish_reason": "length"}),
    (cab.replace(JOB, stop_info=cab.StopInfo("refusal")), {"stop_reason": "refusal"}, {"finish_reason": "content_filter"})])
def test_the_bodies_of_answers(job: cab.Job, message: Any, completion: Any) -> None:
    assert cab.message_body(job) == {
        "id": "msg_01", "type": "message", "role": "assistant", "model": "m", "content": [text("hello")], "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "cache_creation_input_tokens": 4, "cache_read_input_tokens": 3, "output_tokens": 2}, **message}
    completion = dict(completion)
    told = {"role": "assistant", "content": "hello", "refusal": None, **completion.pop("message", {})}
    choice = {"index": 0, "message": told, "logprobs": None, "finish_reason": completion.pop("finish_reason", "stop")}
    assert cab.completion_body(job) == {"id": "chatcmpl-01", "object": "chat.completion", "created": 1_800_000_000, "model": "m",
                                        "choices": [choice], "usage": {
        "prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 3}}, **completion}


STATUSES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
            413: "request_too_large",
            429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error"}


@pytest.mark.parametrize("error", [kind() for kind in cab.ERRORS] + [cab.RunError(code, "why") for code in cab.RUN_ERRORS],
                         ids=lambda error: error.code)
def test_every_error_in_the_words_of_both(error: cab.BridgeError) -> None:
    body = cab.message_error(error)
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    assert body == {"type": "error", "error": {"type": STATUSES.get(error.status, usual), "message": str(error)}}
    body = cab.completion_error(error)["error"]
    assert set(body) == {"message", "type", "param", "code"} and body["message"] == str(error) and body["code"]
    assert body["type"] == ("rate_limit_error" if error.status == 429 else usual if error.status < 500 else "server_error")
    if isinstance(error, cab.RunError):
        assert ("x-should-retry", "false") in error.headers


# --- over the wire ---

USAGE = {"input_tokens": 10, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 5, "output_tokens": 7}
FIGURES = {"prompt_tokens": 18, "completion_tokens": 7, "total_tokens": 25, "prompt_tokens_details": {"cached_tokens": 5}}
NAME = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def post(client: Api, api: str, body: Any, **headers: str) -> Answer:
    return client.post(PATHS[api], body, headers={name.replace("_", "-"): value for name, value in headers.items()})


def words(answer: Answer) -> str:
    """The text of an answer of either format."""
    assert answer.status == 200, answer.data
    body = answer.json
    return str(body["choices"][0]["message"]["content"] if "choices" in body else "".join(each.get("text", "") for each in body["content"]))


def events(data: bytes) -> List[Tuple[str, Any]]:
    """The Server-Sent Events of a stream: (its name, or "", its data, parsed where it is JSON)."""
    found = []
    for block in data.decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        told = fields.get("data", "")
        found.append((fields.get("event", ""), json.loads(told) if told.startswith("{") else told or fields))
    return found


def streamed(data: bytes) -> str:
    """The text in a stream of either format."""
    parts = []
    for _, told in events(data):
        if isinstance(told, dict):
            delta = told["choices"][0]["delta"] if told.get("choices") else told.get("delta", {})
            parts.append(delta.get("content") or delta.get("text") or "")
    return "".join(parts)


class Line:
    """A request on a connection of its own, whose answer is read as it comes; the client may leave, at the latest when the test ends."""
    opened: List["Line"] = []

    def __init__(self, client: Api, api: str, body: Any) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
        self._connection.request("POST", PATHS[api], json.dumps(body).encode(), {"Authorization": "Bearer %s" % client.token})
        self.data, self.socket = b"", self._connection.sock
        self._response: Optional[http.client.HTTPResponse] = None
        self.opened.append(self)

    @property
    def response(self) -> http.client.HTTPResponse:
        self._response = self._response or self._connection.getresponse()
        return self._response

    def until(self, word: str) -> bytes:
        """Reads lines to the one that holds this word. -> all that was read."""
        while word.encode() not in self.data:
            line = self.response.readline()
            assert line, self.data
            self.data += line
        return self.data

    def rest(self) -> bytes:
        self.data += self.response.read()
        self.leave()
        return self.data

    def leave(self) -> None:
        if self._response:
            self._response.close()
        self._connection.close()


def rows(client: Api) -> List[Dict[str, Any]]:
    """The requests, oldest first."""
    return list(reversed(client.get("/api/requests").json["requests"]))


def pids(fake: FakeClaude) -> List[int]:
    """The processes that took a prompt or a result of a tool, in order, each once."""
    found = [entry["pid"] for entry in fake._log("lines.jsonl") if entry["line"]["type"] == "user" or "mcp_response" in str(entry["line"])
             and "content" in str(entry["line"])]
    return list(dict.fromkeys(found))


def watches(running: RunningBridge) -> Dict[str, int]:
    return running.bridge._server.dispatcher._service._open_streams


def nothing_runs(running: RunningBridge, fake: FakeClaude) -> None:
    """No job is open, nobody is waited for, no process of `claude` lives, and the next request is answered."""
    wait_until(lambda: all(each["status"] in cab.JobStatus.FINISHED for each in rows(running.admin)))
    wait_until(lambda: not watches(running))
    wait_until(lambda: not any(is_running(each["pid"]) for each in fake.children()))
    assert not running.bridge._server.dispatcher._service._hub._waiters.keys() - {"", *(each["requestId"] for each in rows(running.admin))}
    assert running.admin.answer("say on")["response"] == "on"


@pytest.fixture(autouse=True)
def no_line_stays_open() -> Iterator[None]:
    yield
    while Line.opened:
        Line.opened.pop().leave()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that left is noticed at once, and its run leaves sooner: the fake that hangs does so at SIGTERM only."""
    for name, seconds in (("RECHECK_SECONDS", 0.03), ("SHUTDOWN_GRACE_SECONDS", 0.05), ("FINISH_SECONDS", 0.05), ("POLL_SECONDS", 0.03)):
        monkeypatch.setattr(cab, name, seconds)


@pytest.fixture
def fake(fake_claude: Fakes) -> FakeClaude:
    return fake_claude()


@both
def test_a_chat_whole(bridge: Start, fake: FakeClaude, api: str) -> None:
    admin = bridge(fake).admin
    answer = post(admin, api, talk("hello", model="haiku"), anthropic_version="2023-06-01") if api == "anthropic" else post(admin, api,
        talk("hello", model="haiku"))
    job, = rows(admin)
    name, short = job["requestId"], job["requestId"].replace("-", "")
    assert answer.status == 200 and answer.headers["request-id"] == answer.headers["x-request-id"] == name
    assert answer.headers["content-type"] == "application/json; charset=utf-8" and "x-should-retry" not in answer.headers
    if api == "anthropic":
        assert answer.json == {"id": "msg_" + short, "type": "message", "role": "assistant", "model": "resolved-haiku",
                               "content": [text("Echo: hello")],
                               "stop_reason": "end_turn", "stop_sequence": None, "usage": USAGE}
    else:
        created = answer.json["created"]
        assert answer.json == {"id": "chatcmpl-" + short, "object": "chat.completion", "created": created, "model": "resolved-haiku",
                               "usage": FIGURES, "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Echo: hello", "refusal": None}, "logprobs": None,
             "finish_reason": "stop"}]}
    assert (job["status"], job["api"], job["message"], job["usage"]["inputTokens"], job["usage"]["outputTokens"]) == ("completed", api,
        "hello", 10, 7)
    assert admin.poll(name)["response"] == "Echo: hello"
    day = admin.get("/api/usage").json["total"]
    assert (day["requests"], day["completed"], day["errors"], day["inputTokens"]) == (1, 1, 0, 10)


def test_a_message_streamed(bridge: Start) -> None:
    admin = bridge().admin
    answer = post(admin, "anthropic", talk("say hi", stream=True))
    name = answer.headers["request-id"]
    assert NAME.fullmatch(name) and answer.status == 200
    assert (answer.headers["content-type"], answer.headers["cache-control"]) == ("text/event-stream; charset=utf-8",
        "no-store, no-transform")
    found = events(answer.data)
    joined = "".join(told["delta"]["text"] for kind, told in found if kind == "content_block_delta")
    kinds = [kind for kind, _ in found]
    deltas = kinds.count("content_block_delta")
    assert joined == "hi" and 1 <= deltas <= 2
    assert kinds == ["message_start", "ping", "content_block_start", *["content_block_delta"] * deltas, "content_block_stop",
                     "message_delta", "message_stop"]
    assert all(kind == told["type"] for kind, told in found)
    start = ('event: message_start\ndata: {"type":"message_start","message":{"id":"msg_%s","type":"message","role":"assistant",'
             '"model":"resolved-default-model",'
             '"content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":0,"cache_creation_input_tokens":0,'
             '"cache_read_input_tokens":0,"output_tokens":0}}}\n\nevent: ping\ndata: {"type":"ping"}\n\nevent: content_block_start\n'
             'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\nevent: content_block_delta\n'
             'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"h' % name.replace("-", ""))
    end = ('event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\nevent: message_delta\n'
           'data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"input_tokens":10,'
           '"cache_creation_input_tokens":3,"cache_read_input_tokens":5,"output_tokens":7}}\n\n'
           'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    assert answer.data.decode().startswith(start) and answer.data.decode().endswith(end)


def test_a_completion_streamed(bridge: Start) -> None:
    admin = bridge().admin
    for options in ({}, {"stream_options": {"include_usage": False}}, {"stream_options": {"include_usage": True}}):
        answer = post(admin, "openai", talk("say hi", stream=True, **options))
        short, told = answer.headers["x-request-id"].replace("-", ""), [data for kind, data in events(answer.data)]
        assert {kind for kind, _ in events(answer.data)} == {""} and told[-1] == "[DONE]" and answer.data.endswith(b"data: [DONE]\n\n")
        initialized = options.get("stream_options", {}).get("include_usage", False)
        head = {"id": "chatcmpl-" + short, "object": "chat.completion.chunk", "created": told[0]["created"],
                "model": "resolved-default-model"}

        def chunk(delta: Mapping[str, Any], reason: Optional[str] = None) -> Dict[str, Any]:
            return {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}],
                    **({"usage": None} if initialized else {})}

        pieces = [data["choices"][0]["delta"] for data in told[1:-1] if data["choices"] and data["choices"][0]["delta"]]
        assert "".join(each["content"] for each in pieces) == "hi"
        assert told == [chunk({"role": "assistant", "content": "", "refusal": None}), *map(chunk, pieces), chunk({}, "stop"),
                        *[{**head, "choices": [], "usage": FIGURES}] * initialized, "[DONE]"]


@both
def test_what_reaches_claude_and_what_does_not(bridge: Start, fake: FakeClaude, api: str) -> None:
    """Every text in its place, none as a command, nothing in argv, and no memory from one request to the next."""
    admin = bridge(fake).admin
    stateful = admin.new_token(sessionMode="stateful")
    body = talk("/clear", "/compact", "/turns", system="/secret system") if api == "anthropic" else talk("/clear", "/compact", "/turns")
    if api == "openai":
        body["messages"].insert(0, {"role": "system", "content": "/secret system"})
    assert [words(post(stateful, api, body)) for _ in range(2)] == ["Echo:  /turns"] * 2
    assert json.loads(words(post(stateful, api, talk("say before", "/x", "turns")))) == [["user", "say before"], ["assistant", "/x"]]
    told = [line for line in fake.lines() if line["type"] in ("user", "assistant")]
    assert [(line["type"], line.get("shouldQuery"), line["message"]["content"]) for line in told[:3]] == [
        ("user", False, [text(" /clear")]), ("assistant", None, [text("/compact")]), ("user", None, [text(" /turns")])]
    setup = [line["request"] for line in fake.lines() if line["type"] == "control_request" and line["request"]["subtype"] == "initialize"]
    assert [each["systemPrompt"] for each in setup] == ["/secret system"] * 2 + [cab.SYSTEM_PROMPT]
    assert not stateful.get("/api/conversations").json["conversations"]
    assert not any(word in json.dumps([start["argv"], start["env"]]) for start in fake.starts() for word in ("secret", "/clear", "compact"))


def test_images_and_documents_reach_claude(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
    assert words(post(admin, "anthropic", talk([text("/see"), PNG, document]))) == "Echo: /see"
    url = "data:image/png;base64," + PNG["source"]["data"]                                  # type: ignore[index]
    assert words(post(admin, "openai", talk([{"type": "image_url", "image_url": {"url": url}}, text("/see")]))) == "Echo:  /see"
    asked = [line["message"]["content"] for line in fake.lines() if line["type"] == "user"]
    assert asked == [[text("/see"), PNG, document], [PNG, text(" /see")]]


# --- a text that begins anew ---

@both
def test_a_text_that_begins_anew_is_not_told_twice(bridge: Start, tmp_path: Path, api: str) -> None:
    """What is the same goes on, and what differs stands for itself: in a block of its own, or after a blank line."""
    admin = bridge().admin
    for n, (first, second, told) in enumerate((("one ", "one two", ["one two"]), ("one ", "won", ["one ", "won"]),
                                               ("one ", "one ", ["one "]),
                                               ("abc", "abX", ["abc", "abX"]), ("one", "", ["one"]), ("one\n", "one", ["one\n"]),
                                               ("one two", "one", ["one two", "one"]))):
        gate = tmp_path / ("gate-%d" % n)
        prompt = script({"delta": first}, {"wait": str(gate)}, {"message": True}, *[{"delta": second}] * bool(second), {"result": second})
        line = Line(admin, api, talk(prompt, stream=True))
        line.until(json.dumps(first))
        gate.touch()
        found = events(line.rest())
        if api == "openai":
            assert streamed(line.data) == "\n\n".join(told) and found[-1][1] == "[DONE]"
            continue
        blocks: Dict[int, str] = {}
        open_block = -1
        for kind, data in found:
            if kind == "content_block_start":
                assert open_block == -1 and data["index"] == len(blocks)
                open_block, blocks[data["index"]] = data["index"], ""
            elif kind == "content_block_delta":
                assert data["index"] == open_block
                blocks[open_block] += data["delta"]["text"]
            elif kind == "content_block_stop":
                assert data["index"] == open_block
                open_block = -1
        assert list(blocks.values()) == told and open_block == -1 and [kind for kind, _ in found][-2:] == ["message_delta", "message_stop"]


# --- stop sequences, schemas ---

@both
def test_an_answer_ends_before_a_stop_sequence(bridge: Start, fake: FakeClaude, quick: None, api: str) -> None:
    running = bridge(fake)
    prompt = script({"delta": "one ST"}, {"delta": "OP"}, {"delta": " two"}, {"pause": 30})
    body = talk(prompt, **{"stop_sequences" if api == "anthropic" else "stop": ["STOP", "two"]})
    answer = post(running.admin, api, {**body, "stream": True})
    assert streamed(answer.data) == "one "
    assert (b'"stop_reason":"stop_sequence","stop_sequence":"STOP"' if api == "anthropic" else b'"finish_reason":"stop"') in answer.data
    answer = post(running.admin, api, body)
    assert words(answer) == "one "
    told = answer.json
    assert told["choices"][0]["finish_reason"] == "stop" if api == "openai" else (told["stop_reason"],
        told["stop_sequence"]) == ("stop_sequence", "STOP")
    nothing_runs(running, fake)


def test_a_text_that_only_begins_like_a_stop_sequence_is_told_whole(bridge: Start) -> None:
    admin = bridge().admin
    prompt = script({"delta": "one ST"}, {"delta": "O"})
    assert streamed(post(admin, "anthropic", talk(prompt, stream=True, stop_sequences=["STOP"])).data) == "one STO"
    assert words(post(admin, "anthropic", talk(prompt, stop_sequences=["STOP"]))) == "one STO"


@both
def test_an_answer_that_keeps_a_schema_is_json(bridge: Start, api: str) -> None:
    wanted = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}} if api == "anthropic" else {
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}
    admin = bridge().admin
    assert json.loads(words(post(admin, api, talk("say forty-two", **wanted)))) == {"answer": "forty-two"}
    assert json.loads(streamed(post(admin, api, talk("say forty-two", stream=True, **wanted)).data)) == {"answer": "forty-two"}


def test_a_tool_that_must_be_called(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    for api, stream in [(api, stream) for api in PATHS for stream in (False, True)]:
        choice = {"type": "tool", "name": "look"} if api == "anthropic" else {"type": "function", "function": {"name": "look"}}
        answer = post(admin, api, talk("say sky", tools=tools(api), tool_choice=choice, stream=stream))
        call_id = "toolu_" + answer.headers["request-id"].replace("-", "")
        if not stream and api == "anthropic":
            assert (answer.json["content"], answer.json["stop_reason"]) == ([tool_use(call_id=call_id, answer="sky")], "tool_use")
        elif not stream:
            choice = answer.json["choices"][0]
            assert choice["finish_reason"] == "tool_calls" and choice["message"] == {"role": "assistant", "content": None, "refusal": None,
                "tool_calls": [
                call_of(arguments='{"answer":"sky"}', call_id=call_id)]}
        elif api == "anthropic":
            found = events(answer.data)
            assert [kind for kind, _ in found] == ["message_start", "ping", "content_block_start", "content_block_delta",
                                                   "content_block_stop",
                                                   "message_delta", "message_stop"]
            assert found[2][1]["content_block"] == tool_use(call_id=call_id) and found[2][1]["index"] == 0
            assert found[3][1]["delta"] == {"type": "input_json_delta", "partial_json": '{"answer":"sky"}'}
            assert found[5][1]["delta"]["stop_reason"] == "tool_use"
        else:
            found = events(answer.data)
            assert found[-3][1]["choices"][0]["delta"] == {"tool_calls": [{"index": 0,
                **call_of(arguments='{"answer":"sky"}', call_id=call_id)}]}
            assert found[-2][1]["choices"][0]["finish_reason"] == "tool_calls" and streamed(answer.data) == ""
        setup = next(line["request"] for line in fake.lines() if line["type"] == "control_request")
        assert setup["jsonSchema"] == SCHEMA and "sdkMcpServers" not in setup


# --- the client's tools ---

BLUE = [{"content": [{"type": "text", "text": "blue"}], "isError": False}]
SEEDED = "Echo: tool_result"                     # the answer of a process that was told the conversation, and asked with the results


def calling(api: str, *calls: Any, **more: Any) -> Dict[str, Any]:
    """A body at whose prompt the model calls tools."""
    return talk("call " + json.dumps(calls or [["look", {"at": "sky"}]]), tools=tools(api), **more)


def calls_in(answer: Answer) -> List[Tuple[str, str, Any]]:
    """(id, name, input) of each call in a whole answer."""
    assert answer.status == 200, answer.data
    body = answer.json
    if "choices" in body:
        return [(each["id"], each["function"]["name"], json.loads(each["function"]["arguments"]))
                for each in body["choices"][0]["message"]["tool_calls"]]
    return [(each["id"], each["name"], each["input"]) for each in body["content"] if each["type"] == "tool_use"]


def continued(body: Dict[str, Any], answer: Answer, *contents: Any, beside: Sequence[Any] = ()) -> Dict[str, Any]:
    """The body that goes on after an answer with calls. contents: of their results, in order; beside: blocks after them."""
    told = answer.json
    if "choices" in told:
        more = [told["choices"][0]["message"], *({"role": "tool", "tool_call_id": call[0], "content": content}
                                                 for call, content in zip(calls_in(answer), contents)), *beside]
    else:
        more = [{"role": "assistant", "content": told["content"]}, {"role": "user", "content": [
            *(tool_result(content, call[0]) for call, content in zip(calls_in(answer), contents)), *beside]}]
    return copy.deepcopy({**body, "messages": [*body["messages"], *more]})


def pid_of(fake: FakeClaude, word: str) -> List[int]:
    """The processes that were asked a prompt with this word."""
    return [entry["pid"] for entry in fake._log("lines.jsonl") if entry["line"]["type"] == "user" and word in json.dumps(entry["line"])]


@both
def test_a_result_continues_the_live_turn(bridge: Start, fake: FakeClaude, api: str) -> None:
    admin = bridge(fake).admin
    body = calling(api, model="haiku")
    answer = post(admin, api, body)
    assert calls_in(answer) == [("toolu_0", "look", {"at": "sky"})] and words(answer) == "Let me see."
    told = answer.json
    assert told["model"] == "resolved-haiku"
    assert told["stop_reason"] == "tool_use" if api == "anthropic" else told["choices"][0]["finish_reason"] == "tool_calls"
    end = post(admin, api, continued(body, answer, "blue"))
    assert json.loads(words(end)) == BLUE and end.json["model"] == "resolved-haiku"
    assert end.json["stop_reason"] == "end_turn" if api == "anthropic" else end.json["choices"][0]["finish_reason"] == "stop"
    assert len(fake.children()) == 1 and len(pids(fake)) == 1
    setup, = [line["request"] for line in fake.lines() if line["type"] == "control_request" and line["request"]["subtype"] == "initialize"]
    assert setup["sdkMcpServers"] == ["api"] and setup["agents"]["bridge"]["tools"] == ["mcp__api__look", "mcp__api__taste"]
    offered, = [line["response"]["response"]["mcp_response"]["result"]["tools"] for line in fake.lines()
                if line["type"] == "control_response" and "tools" in line["response"]["response"]["mcp_response"]["result"]]
    assert offered == list(LOOK)
    first, second = (each["usage"] for each in rows(admin))
    assert (first["inputTokens"], first["outputTokens"]) == (10, 7) and first["inputTokens"] + second["inputTokens"] == 10
    assert not [line for line in fake.lines() if line["type"] == "assistant"]              # nothing was told again


@both
def test_calls_in_a_stream_and_their_results_in_another(bridge: Start, fake: FakeClaude, api: str) -> None:
    admin = bridge(fake).admin
    calls = [["look", {"at": "sky"}], ["taste", {}]]
    body = calling(api, *calls)
    answer = post(admin, api, {**body, "stream": True})
    found, ids = events(answer.data), ["toolu_0", "toolu_1"]
    assert streamed(answer.data) == "Let me see."
    if api == "anthropic":
        kinds = [kind for kind, _ in found if kind != "content_block_delta"]
        assert kinds == ["message_start", "ping", *["content_block_start", "content_block_stop"] * 3, "message_delta", "message_stop"]
        starts = [data for kind, data in found if kind == "content_block_start"]
        assert [(data["index"], data["content_block"]) for data in starts] == [
            (0, text("")), (1, tool_use("look", "toolu_0")), (2, tool_use("taste", "toolu_1"))]
        assert [(data["index"], json.loads(data["delta"]["partial_json"])) for _,
                data in found if "partial_json" in data.get("delta", {})] == [(1, {"at": "sky"}), (2, {})]
        assert found[-2][1] == {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": USAGE}
        turns = [{"role": "assistant", "content": [text("Let me see."), tool_use("look", "toolu_0", at="sky"),
                                                   tool_use("taste", "toolu_1")]},
                 {"role": "user", "content": [tool_result("sweet", "toolu_1"), tool_result("blue")]}]
    else:
        made = [call_of(arguments='{"at":"sky"}', call_id="toolu_0"), call_of("taste", "{}", "toolu_1")]
        assert found[-3][1]["choices"][0]["delta"] == {"tool_calls": [{"index": n, **each} for n, each in enumerate(made)]}
        assert found[-2][1]["choices"][0]["finish_reason"] == "tool_calls"
        turns = [{"role": "assistant", "content": None, "tool_calls": made}, *(
            {"role": "tool", "tool_call_id": each, "content": content} for each, content in zip(reversed(ids), ("sweet", "blue")))]
    body["messages"] += turns
    end = post(admin, api, {**body, "stream": True})
    assert json.loads(streamed(end.data)) == [*BLUE, {"content": [{"type": "text", "text": "sweet"}], "isError": False}]
    assert len(fake.children()) == 1


def test_results_with_images_and_errors_go_to_the_live_turn(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    body = calling("anthropic")
    answer = post(admin, "anthropic", body)
    more = continued(body, answer, [text("seen"), PNG])
    more["messages"][-1]["content"][0]["is_error"] = True
    assert json.loads(words(post(admin, "anthropic", more))) == [{"content": [
        {"type": "text", "text": "seen"}, {"type": "image", "data": "iVBORw0KGgo=", "mimeType": "image/png"}], "isError": True}]
    assert len(fake.children()) == 1


@both
def test_another_conversation_is_told_to_a_process_of_its_own(bridge: Start, fake: FakeClaude, api: str) -> None:
    admin = bridge(fake).admin
    body = calling(api)
    answer = post(admin, api, body)
    beside = [text("say so")] if api == "anthropic" else [{"role": "user", "content": "say so"}]
    changed = [continued(body, answer, "x" * 40_001), continued(body, answer, "blue", beside=beside)]
    as_it_was = continued(body, answer, "blue")
    changed += [{**as_it_was, "model": "haiku"}, {**as_it_was, "tools": tools(api, "look")},
                json.loads(json.dumps(as_it_was).replace("toolu_0", "toolu_1")),
                {**as_it_was, **({"output_config": {"effort": "low"}} if api == "anthropic" else {"reasoning_effort": "low"})},
                {**as_it_was, "messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"},
                                           *as_it_was["messages"]]},
                {**as_it_was, "messages": [{"role": "system", "content": "other"}, *as_it_was["messages"]]},
                {**as_it_was, "messages": [{"role": "user", "content": body["messages"][0]["content"] + " "}, *as_it_was["messages"][1:]]}]
    for n, each in enumerate(changed if api == "anthropic" else changed[:5]):
        assert words(post(admin, api, each)) == ("so" if n == 1 else SEEDED)
        assert len(pids(fake)) == n + 2
        told = [line for line in fake.lines() if line["type"] == "assistant"][-1]["message"]["content"]
        assert told == [text("Let me see."), tool_use("mcp__api__look", "toolu_1" if n == 4 else "toolu_0", at="sky")]
    assert json.loads(words(post(admin, api, as_it_was))) == BLUE                              # the one that waits still waits
    assert len(pids(fake)) == n + 2


def test_a_call_that_the_client_changed_is_told(bridge: Start, fake: FakeClaude) -> None:
    """The process that waits made another one."""
    admin = bridge(fake).admin
    body = calling("anthropic")
    more = continued(body, post(admin, "anthropic", body), "blue")
    more["messages"][-2]["content"][-1]["input"] = {"at": "sea"}
    assert words(post(admin, "anthropic", more)) == SEEDED and len(pids(fake)) == 2
    told = [line for line in fake.lines() if line["type"] == "assistant"][-1]["message"]["content"]
    assert told[-1] == tool_use("mcp__api__look", "toolu_0", at="sea")


def test_a_result_with_an_image_from_an_address_is_told(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    body = calling("anthropic")
    more = continued(body, post(admin, "anthropic", body), [FAR])
    assert words(post(admin, "anthropic", more)) == SEEDED and len(pids(fake)) == 2
    assert [line for line in fake.lines() if line["type"] == "user"][-1]["message"]["content"] == [tool_result([FAR])]


def test_a_process_that_dies_at_the_result_is_replaced(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    body = talk('call ["deaf", ["look", {}]]', tools=tools("anthropic"))
    answer = post(admin, "anthropic", body)
    assert words(post(admin, "anthropic", continued(body, answer, "blue"))) == SEEDED and len(fake.children()) == 2


def test_a_process_that_died_or_expired_while_it_waited_is_replaced(bridge: Start, fake: FakeClaude) -> None:
    clock = Skipped()
    running = bridge(fake, clock=clock)
    for end in ("dies", "expires", "is about to expire"):
        body = calling("anthropic", ["look", {"at": end}])
        answer = post(running.admin, "anthropic", body)
        pid, = pid_of(fake, end)
        if end == "dies":
            os.kill(pid, signal.SIGKILL)
        else:
            clock.ahead += cab.TOOL_RESULT_WAIT_SECONDS - (20 if end == "is about to expire" else 0)
            running.admin.ask("say ring")                 # the worker looks at once
            wait_until(lambda: end == "is about to expire" or not is_running(pid))
        assert words(post(running.admin, "anthropic", continued(body, answer, "blue"))) == (json.dumps(BLUE) if "about" in end else SEEDED)
    nothing_runs(running, fake)


def test_a_result_that_comes_exactly_when_the_process_expires(bridge: Start, fake: FakeClaude, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "TOOL_RESULT_WAIT_SECONDS", 0.0)
    running = bridge(fake)
    for n in range(2):
        body = calling("openai", ["look", {"at": str(n)}])
        assert words(post(running.admin, "openai", continued(body, post(running.admin, "openai", body), "blue"))) in (SEEDED,
            json.dumps(BLUE))
    nothing_runs(running, fake)


def test_only_its_own_token_continues_a_call(bridge: Start, fake: FakeClaude) -> None:
    """Another one, with the same conversation and the same ids, gets a process of its own; whoever comes first."""
    admin = bridge(fake).admin
    mine, other = admin.new_token("mine"), admin.new_token("other")
    body = calling("anthropic")
    answer, same = post(mine, "anthropic", body), post(other, "anthropic", body)
    assert len(pids(fake)) == 2 and calls_in(answer) == calls_in(same)
    third = admin.new_token("third")
    assert words(post(third, "anthropic", continued(body, answer, "stolen"))) == SEEDED
    assert words(post(admin, "anthropic", continued(body, answer, "stolen"))) == SEEDED
    ends = [json.loads(words(post(each, "anthropic", continued(body, answer, color)))) for each, color in ((mine, "blue"), (other, "red"))]
    assert [end[0]["content"][0]["text"] for end in ends] == ["blue", "red"] and len(pids(fake)) == 4
    for pid in pids(fake):
        assert "stolen" not in json.dumps([entry["line"] for entry in fake._log("lines.jsonl")
                                           if entry["pid"] == pid]) or pid in pids(fake)[2:]


def test_without_tools_two_tokens_never_share_a_process(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    for client in (admin, admin.new_token(), admin, admin.new_token(sessionMode="stateful")):
        assert json.loads(words(post(client, "anthropic", talk("say a", "a", "turns")))) == [["user", "say a"], ["assistant", "a"]]
    assert len(pids(fake)) == len(fake.children()) == 4


def test_two_continuations_of_one_call_at_once(bridge: Start, fake: FakeClaude) -> None:
    running = bridge(fake)
    body = calling("openai")
    more = continued(body, post(running.admin, "openai", body), "blue")
    with ThreadPoolExecutor(3) as pool:
        ends = sorted(words(each) for each in pool.map(lambda _: post(running.admin, "openai", more), range(3)))
    assert ends == sorted([json.dumps(BLUE), SEEDED, SEEDED]) and len(pids(fake)) == 3
    nothing_runs(running, fake)


def test_the_same_conversation_twice_at_once_is_two_runs(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    body = calling("anthropic")
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: post(admin, "anthropic", body), range(2)))
        ends = list(pool.map(lambda answer: post(admin, "anthropic", continued(body, answer, "blue")), answers))
    assert [json.loads(words(end)) for end in ends] == [BLUE, BLUE] and len(pids(fake)) == 2
    assert len({answer.headers["request-id"] for answer in answers + ends}) == 4


def test_calls_whose_results_never_come_do_not_gather(bridge: Start, fake: FakeClaude) -> None:
    clock = Skipped()
    running = bridge(fake, clock=clock)
    for n in range(cab.MAX_KEPT_PROCESSES + 2):
        assert len(calls_in(post(running.admin, "anthropic", calling("anthropic", ["look", {"at": str(n)}])))) == 1
    wait_until(lambda: sum(is_running(each["pid"]) for each in fake.children()) <= cab.MAX_KEPT_PROCESSES)
    clock.ahead += cab.TOOL_RESULT_WAIT_SECONDS
    nothing_runs(running, fake)


def test_one_call_after_the_other_goes_on_in_one_process(bridge: Start, fake: FakeClaude) -> None:
    """A conversation with two rounds of calls, whose second one is asked of a seeded process and continued there."""
    admin = bridge(fake).admin
    body = calling("anthropic")
    more = continued(body, post(admin, "anthropic", body), "blue", beside=[text('call [["taste", {}]]')])
    answer = post(admin, "anthropic", more)
    assert calls_in(answer) == [("toolu_0", "taste", {})]
    more = continued(more, answer, "sweet")
    assert json.loads(words(post(admin, "anthropic", more)))[0]["content"] == [{"type": "text", "text": "sweet"}] and len(pids(fake)) == 2


SUBAGENT = """
class Odd(fake_claude.Fake):
    def act_odd(self, rest):
        parent, meta = ("agent_1", {"claudecode/toolUseId": "toolu_sub"}) if rest == "subagent" else (None, {})
        for owner, use in ((None, ("agent_1", "Agent")), (parent, ("toolu_sub", "mcp__api__look"))):
            self.say(type="assistant", message={"id": "msg_1", "role": "assistant", "content": [
                {"type": "tool_use", "id": use[0], "name": use[1], "input": {}}]}, parent_tool_use_id=owner)
            self.say(type="stream_event", event={"type": "message_stop"}, parent_tool_use_id=owner)
        told = self.ask("tools/call", name="look", arguments={}, _meta=meta)
        self.say(type="stream_event", event={"type": "message_start", "message": {"id": "msg_2"}}, parent_tool_use_id=None)
        self.answer("told: " + json.dumps(told))

import json
fake_claude.Fake = Odd
"""


@pytest.mark.parametrize("odd", ["subagent", "nameless"])
def test_calls_that_are_not_of_the_answer_itself(bridge: Start, fake: FakeClaude, odd: str) -> None:
    """Of a subagent, or without the id of its block: the client is told a call that it can answer, or the model gets an error; there
    is no end for the sake of a call that nobody is told, and what is answered is not forgotten."""
    fake.script.write_text(fake.script.read_text().replace("import fake_claude\n", "import fake_claude\n" + SUBAGENT))
    running = bridge(fake)
    body = talk("odd " + odd, tools=tools("anthropic"))
    answer = post(running.admin, "anthropic", body)
    if answer.json["stop_reason"] == "tool_use":
        assert calls_in(answer)
        answer = post(running.admin, "anthropic", continued(body, answer, "blue"))
    assert words(answer).startswith("told: ") or words(answer) == SEEDED
    assert not [line for line in running.log if "met an error" in line]


# --- refusals ---

def kind_of(answer: Answer, api: Optional[str]) -> Tuple[int, Any]:
    """-> (status, what kind of error), whose shape is checked here once for all."""
    body = answer.json
    if api == "anthropic":
        assert set(body) == {"type", "error"} and body["type"] == "error" and set(body["error"]) == {"type", "message"}
        assert re.fullmatch("req_[0-9a-f]{24}", answer.headers["request-id"]) and body["error"]["message"]
        return answer.status, body["error"]["type"]
    if api == "openai":
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"} and body["error"]["message"]
        assert re.fullmatch("req_[0-9a-f]{24}", answer.headers["x-request-id"])
        return answer.status, body["error"]["code"]
    assert list(body)[:2] == ["error", "code"] and "request-id" not in answer.headers
    return answer.status, body["code"]


VERSION = {"anthropic-version": "2023-06-01"}
LARGE = b'{"messages": "' + b"x" * cab.BODY_BYTES + b'"}'


def test_refusals_have_the_shape_of_the_format(bridge: Start) -> None:
    admin = bridge().admin
    nobody, stranger = admin.with_token(None), admin.with_token("cab-" + "0" * 64)
    limited = admin.new_token("limited", models=["haiku"])
    table: Sequence[Tuple[Api, str, str, Any, Mapping[str, str], Optional[str], Any]] = (
        (nobody, "POST", "/v1/messages", talk("hi"), {}, "anthropic", (401, "authentication_error")),
        (stranger, "POST", "/v1/messages", talk("hi"), {}, "anthropic", (401, "authentication_error")),
        (nobody, "POST", "/v1/messages", talk("hi"), {"x-api-key": "cab-x"}, "anthropic", (401, "authentication_error")),
        (nobody, "POST", "/v1/chat/completions", talk("hi"), {}, "openai", (401, "invalid_api_key")),
        (stranger, "GET", "/v1/models", None, {}, "openai", (401, "invalid_api_key")),
        (nobody, "GET", "/v1/models", None, VERSION, "anthropic", (401, "authentication_error")),
        (nobody, "GET", "/api/usage", None, VERSION, None, (401, "missing_token")),
        (admin, "POST", "/v1/messages/count_tokens", talk("hi"), {}, "anthropic", (404, "not_found_error")),
        (admin, "POST", "/v1/messages/batches", talk("hi"), {}, "anthropic", (404, "not_found_error")),
        (admin, "POST", "/v1/complete", {}, VERSION, "anthropic", (404, "not_found_error")),
        (admin, "POST", "/v1/completions", {}, {}, "openai", (404, "not_found")),
        (admin, "POST", "/v1/responses", {}, {}, "openai", (404, "not_found")),
        (admin, "POST", "/v1/embeddings", {}, {}, "openai", (404, "not_found")),
        (admin, "GET", "/v1", None, {}, "openai", (404, "not_found")), (admin, "GET", "/v1/", None, {}, "openai", (404, "not_found")),
        (admin, "GET", "/V1/nothing", None, {}, "openai", (404, "not_found")),
        (admin, "GET", "/v1/%zz", None, {}, "openai", (400, "invalid_request")),
        (admin, "GET", "/%761/nothing", None, {}, "openai", (404, "not_found")),
        (admin, "GET", "/v12", None, {}, None, (404, "not_found")), (admin, "GET", "/nothing", None, VERSION, None, (404, "not_found")),
        (admin, "GET", "/v1/models/nothing", None, {}, "openai", (404, "not_found")),
        (admin, "GET", "/v1/models/nothing", None, VERSION, "anthropic", (404, "not_found_error")),
        (admin, "GET", "/v1/messages", None, {}, "anthropic", (405, "invalid_request_error")),
        (admin, "DELETE", "/v1/chat/completions", None, {}, "openai", (405, "method_not_allowed")),
        (admin, "POST", "/v1/models", {}, {}, "openai", (405, "method_not_allowed")),
        (limited, "POST", "/v1/messages", talk("hi", model="opus"), {}, "anthropic", (403, "permission_error")),
        (limited, "POST", "/v1/chat/completions", talk("hi", model="opus"), {}, "openai", (403, "model_not_allowed")),
        *((admin, "POST", path, body, headers, api, expected[api == "openai"]) for api, path in PATHS.items() for body, headers,
          expected in (
            (LARGE, {}, ((413, "request_too_large"), (413, "body_too_large"))),
            (b"x", {"Content-Encoding": "gzip"}, ((415, "invalid_request_error"), (415, "unsupported_encoding"))),
            (b"{", {}, ((400, "invalid_request_error"), (400, "invalid_json"))),
            (b'{"a":NaN}', {}, ((400, "invalid_request_error"), (400, "invalid_json"))),
            (b"[" * 200 + b"]" * 200, {}, ((400, "invalid_request_error"), (400, "invalid_json"))),
            (b"\xff", {}, ((400, "invalid_request_error"), (400, "invalid_json"))),
            (None, {}, ((400, "invalid_request_error"), (400, "invalid_request"))),
            (b"[]", {}, ((400, "invalid_request_error"), (400, "invalid_request"))),
            (talk(""), {}, ((400, "invalid_request_error"), (400, "invalid_request"))),
            (talk("hi"), {"Host": "evil.example"}, ((421, "invalid_request_error"), (421, "unknown_host"))))),
        (admin, "POST", "/api/ask", LARGE, {}, None, (413, "body_too_large")),
        (admin, "POST", "/api/ask", {}, {}, None, (400, "invalid_request")))
    for client, method, path, body, headers, api, expected in table:
        answer = client.call(method, path, body, headers)
        assert kind_of(answer, api) == expected, (method, path, answer.data)
        assert ("www-authenticate" in answer.headers) == (answer.status == 401) and ("allow" in answer.headers) == (answer.status == 405)
    assert rows(admin) == []


def test_limits_hold_for_both(bridge: Start, gate: Path) -> None:
    admin = bridge(clock=Skipped()).admin
    kinds = {"anthropic": ["rate_limit_error"] * 3, "openai": ["rate_limit_exceeded", "daily_limit", "queue_full"]}
    for api in PATHS:
        minute, day = admin.new_token("minute", requestsPerMinute=1), admin.new_token("day", requestsPerDay=1)
        for client in (minute, day):
            assert words(post(client, api, talk("say a"))) == "a"
        refused = [post(client, api, talk("say a")) for client in (minute, day)]
        assert [kind_of(each, api) for each in refused] == [(429, kind) for kind in kinds[api][:2]]
        for each in refused:                              # a library waits for what it is told, but not until midnight
            assert int(each.headers["retry-after"]) > 0 and ("x-should-retry" in each.headers) == (int(each.headers["retry-after"]) > 60)
        assert kind_of(minute.post("/api/ask", {"message": "a"}), None) == (429, "rate_limited")
    asked = [admin.ask("hold %s" % gate) for _ in range(cab.QUEUE_JOBS)]
    for api in PATHS:
        answer = post(admin, api, talk("say a"))
        assert kind_of(answer, api) == (429, kinds[api][2]) and answer.headers["retry-after"]
    for each in asked[1:]:
        admin.delete("/api/ask/" + each)
    gate.touch()
    assert admin.done(asked[0])["response"] == "held"


def test_too_many_requests_of_all(bridge: Start) -> None:
    admin = bridge(rate_limit=2).admin
    for _ in range(2):
        post(admin, "openai", {})
    for api, kind in (("anthropic", "rate_limit_error"), ("openai", "rate_limit_exceeded"), (None, "rate_limited")):
        answer = admin.post(PATHS[api] if api else "/api/ask", {})
        assert kind_of(answer, api) == (429, kind) and answer.headers["retry-after"]


def test_lists_of_models(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    body = admin.get("/v1/models").json
    assert [each["id"] for each in body["data"]] == ["default", "haiku", "claude-sonnet-5", "claude-haiku-4-5"]
    assert (body["object"], body["has_more"], body["first_id"], body["last_id"]) == ("list", False, "default", "claude-haiku-4-5")
    assert body["data"][1] == {"id": "haiku", "object": "model", "created": 0, "owned_by": "anthropic", "type": "model",
                               "display_name": "Haiku",
                               "created_at": "1970-01-01T00:00:00Z", "lifecycle": "active"} == admin.get("/v1/models/haiku").json
    limited = admin.new_token("limited", models=["claude-haiku-4-5", "my/own-model"])
    assert [(each["id"], each["display_name"]) for each in limited.get("/v1/models").json["data"]] == [
        ("claude-haiku-4-5", "Haiku"), ("my/own-model", "my/own-model")]
    assert kind_of(limited.get("/v1/models/haiku"), "openai")[0] == 404 and limited.get("/v1/models/my%2Fown-model").status == 200
    assert admin.call("HEAD", "/v1/models").data == b"" and len(fake.children()) == 1       # asked once


def test_allowed_models(bridge: Start, fake: FakeClaude) -> None:
    limited = bridge(fake).admin.new_token("limited", models=["haiku", "opus"])
    told = [post(limited, api, talk("say a", **more)).json["model"] for api in PATHS for more in ({}, {"model": "opus"})]
    assert told == ["resolved-haiku", "resolved-opus"] * 2 and post(limited, "openai",
        talk("say a", model="gpt-4o")).json["model"] == "resolved-haiku"


FAILED: Sequence[Tuple[Any, int, str, str]] = (
    ({"api_error_status": 404, "result": "There's an issue with the selected model (x)."}, 404, "not_found_error", "model_not_found"),
    ({"terminal_reason": "prompt_too_long", "result": "Prompt is too long"}, 400, "invalid_request_error", "context_length_exceeded"),
    ({"said": "authentication_failed", "result": "Not logged in"}, 503, "overloaded_error", "auth_required"),
    ({"result": "It broke: sk-ant-api03-aaaaaaaaaaaaaaaa"}, 500, "api_error", "cli_error"))


@both
def test_a_failed_run_has_a_status_and_the_word_that_it_is_not_to_be_tried_again(bridge: Start, api: str) -> None:
    admin = bridge().admin
    for n, (fail, status, kind, code) in enumerate(FAILED):
        answer = post(admin, api, talk("error " + json.dumps(fail), stream=bool(n % 2)))
        assert kind_of(answer, api) == (status, kind if api == "anthropic" else code)
        assert answer.headers["x-should-retry"] == "false" and b"aaaaaaaa" not in answer.data


def test_the_billing_guard_holds_for_both(bridge: Start, fake: FakeClaude, quick: None) -> None:
    running = bridge(fake)
    assert [kind_of(post(running.admin, api, talk("apikey")), api) for api in PATHS] == [(403, "permission_error"), (403, "billing_guard")]
    nothing_runs(running, fake)


def test_what_fails_after_the_first_word_is_an_event(bridge: Start, fake: FakeClaude, tmp_path: Path) -> None:
    running = bridge(fake)
    for api in PATHS:
        gate = tmp_path / api
        line = Line(running.admin, api, talk(script({"delta": "half"}, {"wait": str(gate)}, {"fail": {"result": "It broke"}}), stream=True))
        line.until("half")
        gate.touch()
        kind, told = events(line.rest())[-1]
        assert line.response.status == 200 and b"message_stop" not in line.data and b"DONE" not in line.data
        if api == "anthropic":
            assert (kind, told) == ("error", {"type": "error", "error": {"type": "api_error", "message": "It broke"}})
        else:
            assert (kind, told) == ("", {"error": {"message": "It broke", "type": "server_error", "param": None, "code": "cli_error"}})
        nothing_runs(running, fake)


# --- those who leave ---

@both
def test_a_client_that_hangs_up_cancels_its_run(bridge: Start, fake: FakeClaude, gate: Path, quick: None, api: str) -> None:
    """Whether it runs, is silent, streams, or waits for its turn."""
    running = bridge(fake)
    for prompt, stream in (("hang", False), ("hang", True), (script({"pause": 30}), True)):
        line = Line(running.admin, api, talk(prompt, stream=stream))
        wait_until(lambda: fake.prompts()[-1:] == [prompt])
        if prompt == "hang" and stream:
            line.until("thinking")
        line.leave()
        wait_until(lambda: rows(running.admin)[-1].get("errorCode") == "cancelled")
    first = running.admin.ask(script({"wait": str(gate)}))
    wait_until(lambda: running.admin.poll(first)["status"] == "processing")
    line = Line(running.admin, api, talk("say never"))
    wait_until(lambda: len(rows(running.admin)) == 5)
    line.leave()
    wait_until(lambda: rows(running.admin)[-1].get("errorCode") == "cancelled")
    gate.touch()
    nothing_runs(running, fake)
    assert "say never" not in fake.prompts()


def test_a_client_that_is_gone_before_the_first_byte(bridge: Start, fake: FakeClaude, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces of a stream are never begun, yet its run ends."""
    running, send = bridge(fake), cab.ConnectionHandler._send

    def breaks(handler: cab.ConnectionHandler, data: bytes) -> None:
        if b"event-stream" in data:
            raise BrokenPipeError
        send(handler, data)

    monkeypatch.setattr(cab.ConnectionHandler, "_send", breaks)
    for api in PATHS:
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            Line(running.admin, api, talk("hang", stream=True)).until("never")
        wait_until(lambda: rows(running.admin)[-1].get("errorCode") == "cancelled")
    monkeypatch.undo()
    nothing_runs(running, fake)


def test_a_request_that_is_cancelled_as_it_is_taken_is_not_asked(bridge: Start, fake: FakeClaude, quick: None,
    monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked is forgotten then, so that nothing but its last text would be left."""
    running, claim = bridge(fake), cab.Database.claim

    def cancelled(store: cab.Database, but: Sequence[str] = ()) -> Optional[cab.Job]:
        job = claim(store, but)
        if job and job.api:
            store.fail(job, "cancelled", "The request was cancelled.")
        return job

    monkeypatch.setattr(cab.Database, "claim", cancelled)
    assert post(running.admin, "anthropic", talk("say a", "a", "say never")).status >= 400
    nothing_runs(running, fake)
    assert fake.prompts() == ["say on"]


def test_a_client_that_leaves_between_a_call_and_its_result(bridge: Start, fake: FakeClaude, quick: None) -> None:
    """Its process waits and is continued by whoever comes with its token; then leaves, whatever that one does."""
    running, gate = bridge(fake), fake.folder / "gate"
    body = calling("anthropic")
    line = Line(running.admin, "anthropic", {**body, "stream": True})
    line.until("tool_use")
    line.leave()
    wait_until(lambda: rows(running.admin)[0]["status"] == "completed")
    turns = [{"role": "assistant", "content": [tool_use(at="sky")]}, {"role": "user", "content": [tool_result("blue")]}]
    other = running.admin.ask("hold %s" % gate)
    line = Line(running.admin, "anthropic", {**body, "messages": body["messages"] + turns})           # waits, and leaves before its turn
    wait_until(lambda: len(rows(running.admin)) == 3)
    line.leave()
    wait_until(lambda: rows(running.admin)[-1].get("errorCode") == "cancelled")
    gate.touch()
    assert running.admin.done(other)["response"] == "held"
    assert json.loads(words(post(running.admin, "anthropic", {**body, "messages": body["messages"] + turns}))) == BLUE
    nothing_runs(running, fake)


def test_a_run_that_is_cancelled_by_another_hand_or_whose_token_is_revoked(bridge: Start, fake: FakeClaude, quick: None) -> None:
    running = bridge(fake)
    for api in PATHS:
        line = Line(running.admin, api, talk("hang", stream=True))
        line.until("thinking")
        running.admin.delete("/api/ask/" + rows(running.admin)[-1]["requestId"])
        assert b"The request was cancelled." in line.rest()
        line = Line(running.admin.new_token("leaves"), api, talk("hang", stream=True))
        line.until("thinking")
        token = next(each for each in running.admin.get("/api/tokens").json["tokens"] if each["name"] == "leaves")
        assert running.admin.delete("/api/tokens/" + token["id"]).status == 200
        assert ("authentication_error" if api == "anthropic" else "invalid_api_key") in line.rest().decode()
    nothing_runs(running, fake)


def test_a_late_answer_begins_with_blanks(bridge: Start, fake: FakeClaude, monkeypatch: pytest.MonkeyPatch, quick: None,
                                          tmp_path: Path) -> None:
    monkeypatch.setattr(cab, "WAIT_SECONDS", 0.04)
    monkeypatch.setattr(cab, "HEARTBEAT_SECONDS", 0.02)
    running = bridge(fake)
    for api in PATHS:
        for n, (step, kind) in enumerate((({"result": "late"}, ""), ({"fail": {"result": "It broke"}},
            "api_error" if api == "anthropic" else "cli_error"))):
            gate = tmp_path / ("%s-%d" % (api, n))
            line = Line(running.admin, api, talk(script({"wait": str(gate)}, step)))
            assert line.response.status == 200 and NAME.fullmatch(str(line.response.getheader("request-id")))
            assert line.response.getheader("content-type") == "application/json; charset=utf-8"
            line.data = line.response.read(2)
            assert line.data == b"  "
            gate.touch()
            answer = Answer(200, {"request-id": "req_" + "0" * 24, "x-request-id": "req_" + "0" * 24}, line.rest())
            assert kind_of(answer, api) == (200, kind) if kind else words(answer) == "late"
        gate = tmp_path / "never"
        line = Line(running.admin, api, talk(script({"wait": str(gate)})))
        assert line.response.read(1) == b" "
        line.leave()
        wait_until(lambda: rows(running.admin)[-1].get("errorCode") == "cancelled")
    monkeypatch.setattr(cab, "WAIT_SECONDS", 90.0)
    nothing_runs(running, fake)


def test_a_silent_stream_shows_that_it_lives(bridge: Start, monkeypatch: pytest.MonkeyPatch, quick: None, tmp_path: Path) -> None:
    monkeypatch.setattr(cab, "HEARTBEAT_SECONDS", 0.05)
    admin = bridge().admin
    for api in PATHS:
        gate = tmp_path / api
        line = Line(admin, api, talk(script({"wait": str(gate)}, {"delta": "late"}), stream=True))
        for _ in range(2):
            line.data = b""
            line.until('"ping"' if api == "anthropic" else ": still here")
        gate.touch()
        assert b"late" in line.rest()


def test_a_line_shows_that_it_lives_also_while_the_queue_moves(bridge: Start, fake: FakeClaude, gate: Path, quick: None,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """A new place in the queue is nothing that a client of /v1 is told: it counts as silence."""
    running = bridge(fake)
    asked = [running.admin.ask(prompt) for prompt in ("hold %s" % gate, *[script({"pause": 0.05}, {"result": "on"})] * 8)]
    monkeypatch.setattr(cab, "WAIT_SECONDS", 0.25)
    monkeypatch.setattr(cab, "HEARTBEAT_SECONDS", 0.2)
    lines = [Line(running.admin, api, talk("say last", stream=stream)) for api, stream in (("anthropic", False), ("openai", True))]
    wait_until(lambda: len(rows(running.admin)) == 11)
    gate.touch()
    assert lines[0].response.status == 200 and running.admin.poll(asked[-1])["status"] != "completed"
    assert lines[0].rest().startswith(b" ") and b": still here" in lines[1].rest()


# --- the plan ---

def refusal_of(client: Api, api: str) -> int:
    """Seconds of Retry-After of a request that is refused, since the plan rests."""
    answer = post(client, api, talk("say new"))
    assert kind_of(answer, api) == (429, "rate_limit_error" if api == "anthropic"
                                    else "rate_limit_exceeded") and answer.headers["x-should-retry"] == "false"
    return int(answer.headers["retry-after"])


def test_a_short_rest_of_the_plan_is_waited_for(bridge: Start, fake: FakeClaude, tmp_path: Path) -> None:
    clock = Skipped()
    running = bridge(fake, clock=clock)
    prompt = script(refused_once(int(clock.now()) + 60, tmp_path / "mark"), {"delta": "an answer"})
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, running.admin, "openai", talk(prompt))
        job = wait_until(lambda: [each for each in rows(running.admin) if each.get("waitingFor")])[0]
        second = pool.submit(post, running.admin, "openai", talk("say second"))
        wait_until(lambda: len(rows(running.admin)) == 2)
        clock.ahead += 66
        running.admin.ask("say ring")                     # the worker looks at once
        assert words(first.result()) == "an answer" and words(second.result()) == "second"
    assert running.admin.poll(job["requestId"])["attempts"] == 1


@both
def test_a_long_rest_of_the_plan_is_told_at_once(bridge: Start, fake: FakeClaude, tmp_path: Path, api: str) -> None:
    """To the one that runs, to those that wait behind it and to those that come; requests of /api/ask go on waiting."""
    clock = Skipped()
    running, gate = bridge(fake, clock=clock), tmp_path / "go"
    prompt = script({"wait": str(gate)}, refused_once(int(clock.now()) + 3600, tmp_path / "mark"), {"delta": "never"})
    kind = (429, "rate_limit_error" if api == "anthropic" else "rate_limit_exceeded")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, running.admin, api, talk(prompt))
        wait_until(lambda: rows(running.admin) and rows(running.admin)[0]["status"] == "processing")
        behind = pool.submit(post, running.admin, api, talk("say behind"))
        streaming = pool.submit(post, running.admin, api, talk("say behind", stream=True))
        wait_until(lambda: len(rows(running.admin)) == 3)
        waits = running.admin.ask("say waits")
        gate.touch()
        for answer in (each.result() for each in (first, behind, streaming)):
            assert kind_of(answer, api) == kind and 3500 < int(answer.headers["retry-after"]) <= 3600
            assert answer.headers["x-should-retry"] == "false"
    assert [(each["status"], each.get("errorCode")) for each in rows(running.admin)] == [("error", "usage_limit")] * 3 + [("queued", None)]
    assert 3500 < refusal_of(running.admin, api) <= 3600
    assert running.admin.poll(waits)["waitingFor"] == "usage_limit"
    clock.ahead += 3601 - cab.MAX_INLINE_WAIT_SECONDS                # a client can wait for what is left
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(post, running.admin, api, talk("say held"))
        wait_until(lambda: len(rows(running.admin)) == 5)
        clock.ahead += cab.MAX_INLINE_WAIT_SECONDS
        running.admin.ask("say ring")
        assert words(held.result()) == "held" and running.admin.done(waits)["response"] == "waits"
    assert "say behind" not in fake.prompts() and "say new" not in fake.prompts()


def test_a_rest_after_the_first_word_is_an_event(bridge: Start, fake: FakeClaude, tmp_path: Path) -> None:
    clock = Skipped()
    gate = tmp_path / "go"
    prompt = script({"delta": "half"}, {"wait": str(gate)}, refused_once(int(clock.now()) + 3600, tmp_path / "mark"))
    line = Line(bridge(fake, clock=clock).admin, "anthropic", talk(prompt, stream=True))
    line.until("half")
    gate.touch()
    kind, told = events(line.rest())[-1]
    assert kind == "error" and told["error"]["type"] == "rate_limit_error" and b"message_stop" not in line.data


def test_a_rest_of_one_model_leaves_the_others_alone(bridge: Start, fake: FakeClaude, tmp_path: Path) -> None:
    clock = Skipped()
    running = bridge(fake, clock=clock)
    limits = {"status": "rejected", "rateLimitType": "seven_day_opus", "resetsAt": int(clock.now()) + 3600, "utilization": 1}
    prompt = script({"limits": limits}, {"fail": {"said": "rate_limit", "api_error_status": 429, "result": "You've hit your limit"}})
    assert kind_of(post(running.admin, "anthropic", talk(prompt, model="opus")), "anthropic") == (429, "rate_limit_error")
    assert kind_of(post(running.admin, "openai", talk("say a", model="opus")), "openai") == (429, "rate_limit_exceeded")
    assert words(post(running.admin, "openai", talk("say a", model="haiku"))) == "a" == words(post(running.admin, "anthropic",
        talk("say a")))


def test_of_two_rests_the_longer_one_counts(bridge: Start, fake: FakeClaude) -> None:
    """That of all models ends soon, that of the one that is asked for does not: its client would wait in vain."""
    clock = Skipped()
    running = bridge(fake, clock=clock)
    for kind, seconds, model in (("seven_day_opus", 3600, "opus"), ("five_hour", 30, "haiku")):
        limits = {"status": "rejected", "rateLimitType": kind, "resetsAt": int(clock.now()) + seconds, "utilization": 1}
        fail = {"said": "rate_limit", "api_error_status": 429, "result": "You've hit your limit"}
        running.admin.ask(script({"limits": limits}, {"fail": fail}), model=model)
        wait_until(lambda: sum(bool(each.get("waitingFor")) for each in rows(running.admin)) == (1 if model == "opus" else 2))
    line = Line(running.admin, "anthropic", talk("say a", model="opus"))
    wait_until(lambda: select.select([line.socket], [], [], 0)[0] or len(rows(running.admin)) == 3)
    assert len(rows(running.admin)) == 2 and line.response.status == 429 and int(str(line.response.getheader("retry-after"))) > 3500


def test_an_overloaded_service_is_waited_for(bridge: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cab, "BACK_OFF_SECONDS", (0.01,))
    prompt = script({"first": str(tmp_path / "mark"), "do": [{"delta": "half "}, OVERLOADED]}, {"delta": "whole"})
    assert words(post(bridge().admin, "anthropic", talk(prompt))) == "whole"


def test_after_a_crash_a_request_is_interrupted_and_not_run_again(program: Callable[..., Program], fake: FakeClaude) -> None:
    """Nobody holds the line any more; requests of /api/ask go on."""
    first = program()
    with ThreadPoolExecutor(2) as pool:
        lines = [pool.submit(post, first.api, api, talk("hang " + api)) for api in PATHS]
        wait_until(lambda: len(rows(first.api)) == 2 and any("hang" in each for each in fake.prompts()))
        waits = first.api.ask("say waits")
        first.end(signal.SIGKILL)
        for line in lines:
            assert line.exception()
    second = Api(program().port, first.token)
    assert [(each["status"], each.get("errorCode")) for each in rows(second)[:2]] == [("error", "interrupted")] * 2
    assert second.done(waits)["response"] == "waits" and len([each for each in fake.prompts() if "hang" in each]) == 1
    assert words(post(second, "anthropic", talk("say again"))) == "again"


# --- the hostile and the sloppy ---

def test_odd_bodies_over_the_wire_are_answered_in_the_right_shape(bridge: Start, fake: FakeClaude) -> None:
    running, chance, statuses = bridge(fake), random.Random(11), set()
    taken = 0
    for n in range(160):
        api = ("anthropic", "openai")[n % 2]
        body = mutated(SEEDS[api][n // 2 % 2], chance)
        with contextlib.suppress(Exception):
            read(api, body)
            taken += 1
            if taken % 8:
                continue                                 # those that are taken are asked, which is slow
        answer = post(running.admin, api, body)
        assert answer.status == 200 or kind_of(answer, api)[0] == 400, (body, answer.data)
        statuses.add(answer.status)
    assert statuses == {200, 400} and not [line for line in running.log if "rror" in line]
    nothing_runs(running, fake)


@both
def test_odd_things_that_are_taken_reach_claude_as_json(bridge: Start, fake: FakeClaude, api: str) -> None:
    running = bridge(fake)
    odd = "\ud800\x00\u2028\x85/\U0001f600"
    body = talk(odd, odd, "say " + odd, tools=tools(api, schema={"properties": {odd: {"enum": [odd, 10 ** 40, None]}}}), stream=True)
    assert streamed(post(running.admin, api, body).data) == odd.replace("\ud800", "\ufffd")
    deep: Any = 1
    for _ in range(90):
        deep = [deep]
    if api == "anthropic":
        turns = [{"role": "assistant", "content": [tool_use(**{odd: deep})]},
                 {"role": "user", "content": [tool_result(odd), text("say so")]}]
    else:
        turns = [{"role": "assistant", "tool_calls": [call_of(arguments=json.dumps({odd: deep[0]}))]},
                 {"role": "tool", "tool_call_id": "call_0", "content": odd},
                 {"role": "user", "content": "say so"}]
    assert words(post(running.admin, api, {"messages": [{"role": "user", "content": "a"}, *turns]})) == "so"
    nothing_runs(running, fake)


def test_many_at_once_in_both_formats_each_get_their_own_answer(bridge: Start, fake: FakeClaude) -> None:
    running = bridge(fake)
    clients = [running.admin, running.admin.new_token()]

    def one(n: int) -> bool:
        answer = post(clients[n % 2], ("anthropic", "openai")[n // 2 % 2], talk("say a", "a", "say %d" % n, stream=n > 3))
        return (streamed(answer.data) if n > 3 else words(answer)) == str(n)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(8)))
    nothing_runs(running, fake)


def test_too_many_open_lines_of_one_token(bridge: Start, fake: FakeClaude, gate: Path, quick: None,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "MAX_STREAMS_PER_TOKEN", 1)
    running = bridge(fake)
    line = Line(running.admin, "openai", talk(script({"delta": "he"}, {"wait": str(gate)}, {"delta": "ld"}), stream=True))
    line.until('"he"')
    for api, kind in (("anthropic", "rate_limit_error"), ("openai", "rate_limit_exceeded")):
        for stream in (False, True):
            assert kind_of(post(running.admin, api, talk("say a", stream=stream)), api) == (429, kind)
    assert len(rows(running.admin)) == 1
    gate.touch()
    assert streamed(line.rest()) == "held"
    nothing_runs(running, fake)


def test_a_bridge_that_ends_gives_up_its_lines(bridge: Start, fake: FakeClaude, quick: None) -> None:
    running = bridge(fake)
    line = Line(running.admin, "anthropic", talk("hang", stream=True))
    line.until("thinking")
    running.bridge.__exit__(None, None, None)
    kind, told = events(line.rest())[-1]
    assert kind == "error" and told["error"]["type"] == "overloaded_error" and not any(is_running(each["pid"]) for each in fake.children())
