"""The wire formats of two other APIs, /v1/messages and /v1/chat/completions.

What a request becomes, what the answers contain, and what invalid or hostile requests do.
"""

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
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import pytest

import claude_api_bridge as cab
from conftest import Answer, Api, FakeClaude, Program, RunningBridge, is_running, wait_until
from test_stream import OVERLOADED, Skipped, refused_once, script

Start = Callable[..., RunningBridge]
Fakes = Callable[..., FakeClaude]
PATHS = {"anthropic": "/v1/messages", "openai": "/v1/chat/completions"}
both = pytest.mark.parametrize("api", list(PATHS))
PNG = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="},
}
REMOTE_IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}}


# --- requests ---


def turn(role: str, *blocks: Any) -> Dict[str, Any]:
    """Return a message of blocks and texts."""
    return {
        "role": role,
        "content": [text(block) if isinstance(block, str) else block for block in blocks],
    }


def text(words: str) -> Dict[str, Any]:
    """Return a text block."""
    return {"type": "text", "text": words}


def tool_use(name: str = "look", call_id: str = "toolu_0", **given: Any) -> Dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def tool_result(content: Any = "blue", call_id: str = "toolu_0", **more: Any) -> Dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def talk(*contents: Any, **more: Any) -> Dict[str, Any]:
    """Return a body with turns of user and assistant; for both formats if they are texts."""
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": content}
        for n, content in enumerate(contents)
    ]
    return {"max_tokens": 64, "messages": messages, **more}


def tools(api: str, *names: str, schema: Any = None) -> List[Dict[str, Any]]:
    """Return the client's tools in a format."""
    input_schema = SCHEMA if schema is None else schema
    definitions = [
        {"name": name, "description": "Does %s." % name} for name in names or ("look", "taste")
    ]
    if api == "anthropic":
        return [{**tool, "input_schema": input_schema} for tool in definitions]
    return [
        {"type": "function", "function": {**tool, "parameters": input_schema}}
        for tool in definitions
    ]


def read(api: str, body: Any) -> cab.Chat:
    """Parse a body of a format."""
    return (cab.read_messages_request if api == "anthropic" else cab.read_completion_request)(body)


def function(name: str, schema: Any = None, description: Optional[str] = None) -> Dict[str, Any]:
    """Return a client's tool as the bridge stores it."""
    if description is None:
        description = "Does %s." % name
    return {"name": name, "description": description, "inputSchema": schema or SCHEMA}


HI = (turn("user", "hi"),)
PLACEHOLDER_TURN = turn("user", "(The conversation begins.)")
LOOK = (function("look"), function("taste"))
# What the bridge adds to the system prompt for the choice of tools.
ANY_TOOL = "\n\nAnswer with a call of at least one of the tools."
ONE_TOOL = "\n\nCall at most one tool at a time."
INPUT_FOR = "\n\nAnswer with the input for the tool %s. Does %s."


@pytest.mark.parametrize(
    "body, chat",
    [
        (talk("hi"), cab.Chat(HI)),
        (talk([text("hi"), text(" \n"), text("there")]), cab.Chat((turn("user", "hi", "there"),))),
        (
            talk(
                "hi", model="default", metadata={"user_id": "u"}, temperature=7, top_k=1,
                thinking={"type": "enabled"},
            ),
            cab.Chat(HI, thinking=cab.SHOWN),
        ),
        (
            talk("hi", model="claude-opus-4-1", stream=True),
            cab.Chat(HI, model="claude-opus-4-1", stream=True),
        ),
        (talk("hi", system="Be brief."), cab.Chat(HI, "Be brief.")),
        (
            talk(
                "hi",
                system=[{**text("One."), "cache_control": {"type": "ephemeral"}}, text("Two.")],
            ),
            cab.Chat(HI, "One.\n\nTwo."),
        ),
        (talk("hi", system=""), cab.Chat(HI)),
        (
            {
                "messages": [
                    {"role": "user", "content": "hi"}, {"role": "system", "content": "Mid."},
                ]
            },
            cab.Chat(HI, "Mid."),
        ),
        (
            talk("a", "b", "c"),
            cab.Chat((turn("user", "a"), turn("assistant", "b"), turn("user", "c"))),
        ),
        (
            talk("a", "", "c"),
            cab.Chat((turn("user", "a"), turn("assistant", "(no answer)"), turn("user", "c"))),
        ),
        (
            {"messages": [turn("assistant", "b"), turn("user", "c"), turn("user", "d")]},
            cab.Chat((PLACEHOLDER_TURN, turn("assistant", "b"), turn("user", "c", "d"))),
        ),
        (
            talk(
                [
                    {**PNG, "cache_control": 1}, REMOTE_IMAGE,
                    {
                        "type": "document",
                        "title": "T",
                        "context": None,
                        "source": {
                            "type": "text",
                            "media_type": "text/plain",
                            "data": "D",
                            "more": 1,
                        },
                    },
                ]
            ),
            cab.Chat(
                (
                    turn(
                        "user",
                        PNG,
                        REMOTE_IMAGE,
                        {
                            "type": "document",
                            "source": {"type": "text", "media_type": "text/plain", "data": "D"},
                            "title": "T",
                        },
                    ),
                )
            ),
        ),
        (
            talk(
                "a",
                [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": 5}, text("b"),
                ],
                "c",
            ),
            cab.Chat(
                (
                    turn("user", "a"),
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": "hm", "signature": "s"}, text("b"),
                        ],
                    },
                    turn("user", "c"),
                )
            ),
        ),
        (
            talk("a", [{"type": "thinking", "thinking": "hm", "signature": ""}], "c"),
            cab.Chat((turn("user", "a"), turn("assistant", cab.NO_ANSWER), turn("user", "c"))),
        ),
        (
            talk("a", [{"type": "redacted_thinking", "data": "x"}, text("b")]),
            cab.Chat(
                (turn("user", "a"),),
                prefill=({"type": "redacted_thinking", "data": "x"}, text("b")),
            ),
        ),
        (talk("hi", thinking={"type": "disabled"}), cab.Chat(HI, thinking=cab.OFF)),
        (
            talk("hi", thinking={"type": "adaptive", "display": "omitted"}),
            cab.Chat(HI, thinking=cab.SHOWN),
        ),
        (
            talk(
                "a", [tool_use(at="x")], [text("so"), tool_result(None, is_error=True)],
                tools=tools("anthropic"),
            ),
            cab.Chat(
                (
                    turn("user", "a"),
                    turn("assistant", tool_use(at="x")),
                    turn("user", tool_result("(no result)", is_error=True), "so"),
                ),
                client_tools=LOOK,
            ),
        ),
        (talk("hi", tools=tools("anthropic"), tool_choice={"type": "none"}), cab.Chat(HI)),
        (
            talk(
                "hi", tools=tools("anthropic"),
                tool_choice={"type": "any", "disable_parallel_tool_use": True},
            ),
            cab.Chat(HI, cab.SYSTEM_PROMPT + ANY_TOOL + ONE_TOOL, client_tools=LOOK),
        ),
        (
            talk(
                "hi", system="S", tools=tools("anthropic"),
                tool_choice={"type": "tool", "name": "taste"},
            ),
            cab.Chat(
                HI, "S" + INPUT_FOR % ("taste", "taste"), forced_tool="taste",
                json_schema=cab.as_json(SCHEMA),
            ),
        ),
        (
            talk("hi", tools=[{"name": "a", "input_schema": None}]),
            cab.Chat(HI, client_tools=(function("a", {"type": "object"}, ""),)),
        ),
        (talk("hi", stop_sequences=["\n", "END"]), cab.Chat(HI, stop_sequences=("\n", "END"))),
        (
            talk(
                "hi",
                output_config={
                    "effort": "high",
                    "format": {"type": "json_schema", "schema": SCHEMA},
                },
            ),
            cab.Chat(HI, effort="high", json_schema=cab.as_json(SCHEMA)),
        ),
        (talk("\ud800", system="\udc00"), cab.Chat((turn("user", "\ufffd"),), "\ufffd")),
    ],
)
def test_a_request_of_the_messages_api_becomes_a_chat(body: Any, chat: cab.Chat) -> None:
    before = copy.deepcopy(body)
    turns = []
    for message in chat.turns:
        blocks = []
        for block in message["content"]:
            # The rows have the results as texts; the bridge reads them as lists of blocks.
            if block["type"] == "tool_result" and block["content"] != "(no result)":
                if not isinstance(block["content"], list):
                    block = {**block, "content": [text(block["content"])]}
            blocks.append(block)
        turns.append({**message, "content": blocks})
    expected = cab.replace(chat, turns=tuple(turns), max_tokens=body.get("max_tokens"))
    assert cab.read_messages_request(body) == expected
    assert body == before


def call_of(
    name: str = "look", arguments: Any = '{"at":"x"}', call_id: str = "call_0"
) -> Dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def openai(**fields: Any) -> cab.Chat:
    return cab.Chat(**{"turns": HI, "include_usage": False, "api": "openai", **fields})


@pytest.mark.parametrize(
    "body, chat",
    [
        (talk("hi"), openai()),
        (
            talk(
                "hi", model="gpt-4o", temperature=2, seed=1, logprobs=True, user="u", store=False,
                n=1,
            ),
            openai(),
        ),
        *(
            (talk("hi", model=model), openai())
            for model in ("o3-mini", "GPT-5", "chatgpt-4o-latest", "codex", "default")
        ),
        (
            talk("hi", model="sonnet", stream=True, stream_options={"include_usage": True}),
            openai(model="sonnet", stream=True, include_usage=True),
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "A"},
                    {"role": "user", "content": [text("hi")], "name": "n"},
                    {"role": "developer", "content": [text("B"), text("C")]},
                ]
            },
            openai(system_prompt="A\n\nB\n\nC"),
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "image_url",
                                "image_url": {
                                    "url": "data:image/png;base64,iVBORw0KGgo=",
                                    "detail": "low",
                                },
                            },
                            {"type": "image_url", "image_url": "https://example.com/a.png"},
                            {
                                "type": "file",
                                "file": {
                                    "filename": "f.pdf",
                                    "file_data": "data:application/pdf;x=y;base64,AA==",
                                },
                            },
                        ],
                    }
                ]
            },
            openai(
                turns=(
                    turn(
                        "user",
                        PNG,
                        REMOTE_IMAGE,
                        {
                            "type": "document",
                            "title": "f.pdf",
                            "source": {
                                "type": "base64",
                                "media_type": "application/pdf",
                                "data": "AA==",
                            },
                        },
                    ),
                )
            ),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [call_of(), call_of("taste", "", "call_1")],
                    },
                    {"role": "tool", "tool_call_id": "call_1", "content": "sweet"},
                    {"role": "tool", "tool_call_id": "call_0", "content": [text("blue")]},
                    {"role": "user", "content": "so"},
                ],
                "tools": tools("openai"),
                "tool_choice": "auto",
            },
            openai(
                turns=(
                    turn("user", "a"),
                    turn(
                        "assistant", tool_use("look", "call_0", at="x"), tool_use("taste", "call_1")
                    ),
                    turn(
                        "user", tool_result([text("sweet")], "call_1"),
                        tool_result([text("blue")], "call_0"), "so",
                    ),
                ),
                client_tools=LOOK,
            ),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                    {"role": "user", "content": "b"},
                ]
            },
            openai(turns=(turn("user", "a"), turn("assistant", "No."), turn("user", "b"))),
        ),
        (talk("hi", stop="END"), openai(stop_sequences=("END",))),
        (
            talk(
                "hi", stop=None, response_format={"type": "text"}, tool_choice="none",
                parallel_tool_calls=False,
            ),
            openai(),
        ),
        (
            talk("hi", response_format={"type": "json_object"}),
            openai(json_schema='{"type":"object","additionalProperties":true}'),
        ),
        (
            talk(
                "hi",
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                },
            ),
            openai(json_schema=cab.as_json(SCHEMA)),
        ),
        (
            talk("hi", response_format={"type": "json_schema", "json_schema": {"name": "n"}}),
            openai(json_schema='{"type":"object"}'),
        ),
        *(
            (talk("hi", reasoning_effort=given), openai(effort=effort, thinking=thinking))
            for given, effort, thinking in (
                ("none", "low", cab.OFF),
                ("minimal", "low", None),
                ("high", "high", cab.SHOWN),
                (None, None, None),
            )
        ),
        (
            talk("hi", tools=tools("openai", "look"), tool_choice="required"),
            openai(
                system_prompt=cab.SYSTEM_PROMPT + INPUT_FOR % ("look", "look"), forced_tool="look",
                json_schema=cab.as_json(SCHEMA),
            ),
        ),
        (
            talk(
                "hi", tools=tools("openai"),
                tool_choice={"type": "function", "function": {"name": "taste"}},
            ),
            openai(
                system_prompt=cab.SYSTEM_PROMPT + INPUT_FOR % ("taste", "taste"),
                forced_tool="taste", json_schema=cab.as_json(SCHEMA),
            ),
        ),
        (
            talk("hi", tools=tools("openai"), parallel_tool_calls=False),
            openai(system_prompt=cab.SYSTEM_PROMPT + ONE_TOOL, client_tools=LOOK),
        ),
    ],
)
def test_a_request_of_the_chat_completions_api_becomes_a_chat(body: Any, chat: cab.Chat) -> None:
    before = copy.deepcopy(body)
    limit = body.get("max_tokens")
    assert cab.read_completion_request(body) == cab.replace(chat, max_tokens=limit)
    assert body == before


def forced_tool(name: Any) -> Dict[str, Any]:
    return talk("hi", tools=tools("anthropic"), tool_choice={"type": "tool", "name": name})


def chat_with_call(arguments: Any = "{}", **more: Any) -> Dict[str, Any]:
    """Return a body of Chat Completions with one tool call and its result."""
    return {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{**call_of(arguments=arguments), **more}]},
            {"role": "tool", "tool_call_id": "call_0", "content": "r"},
        ]
    }


DEEP = '{"a":%s1%s}' % ("[" * 300, "]" * 300)
REFUSED: Sequence[Tuple[str, Any, str]] = [
    *(
        (api, body, field)
        for api in PATHS
        for body, field in (
            ([], "body"), (None, "body"), ("x", "body"), ({}, "messages"),
            ({"messages": {}}, "messages"), ({"messages": []}, "messages"),
            ({"messages": ["x"]}, "messages.0"), ({"messages": [{}]}, "messages.0.role"),
            ({"messages": [{"role": ["user"], "content": "x"}]}, "messages.0.role"),
            ({"messages": [{"role": "functions", "content": "x"}]}, "messages.0.role"),
            (talk(None), "messages.0.content"),
            (talk(5), "messages.0.content"),
            (talk([text("x"), 5]), "messages.0.content.1"),
            (talk([{"type": "text", "text": 5}]), "messages.0.content.0.text"),
            (talk([{"type": "text"}]), "messages.0.content.0.text"),
            (talk([{"type": "input_audio"}]), "messages.0.content.0.type"),
            (talk([{"type": ["text"]}]), "messages.0.content.0.type"),
            (talk("hi", model=5), "model"), (talk("hi", model="a b"), "model"),
            (talk("hi", model="--flag"), "model"), (talk("hi", model=["sonnet"]), "model"),
            (talk("hi", tools="x"), "tools"), (talk("hi", tools={"a": 1}), "tools"),
            (talk("hi", tools=["x"]), "tools.0"),
            (
                talk("hi", tools=tools(api, "a", "a")),
                "tools.1.name" if api == "anthropic" else "tools.1.function.name",
            ),
            *(
                (
                    talk("hi", tools=tools(api, name)),
                    "tools.0.name" if api == "anthropic" else "tools.0.function.name",
                )
                for name in (" ", "a\nb", "a" * 1001)
            ),
            *(
                (
                    talk("hi", tools=tools(api, "a", schema=schema)),
                    "tools.0" if api == "anthropic" else "tools.0.function",
                )
                for schema in (
                    {"type": "array"}, {"type": ["string", "null"]}, {"properties": []},
                    {"properties": {"a": 5}}, {"required": "a"}, False, "object",
                )
            ),
            (
                talk("hi", tools=tools(api, *("t%d" % n for n in range(cab.MAX_CLIENT_TOOLS + 1)))),
                "tools",
            ),
            (talk("hi", stream="yes"), "stream"), (talk("hi", stream=1), "stream"),
            (talk("hi", stream=[0]), "stream"),
        )
    ),
    *(
        ("anthropic", body, field)
        for body, field in (
            (talk("hi", system=5), "system"),
            (talk("hi", system=[PNG]), "system.0.type"),
            (talk("hi", system=["x"]), "system.0"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
            (talk([{"type": "image"}]), "messages.0.content.0.source"),
            (
                talk([{"type": "image", "source": {"type": "file"}}]),
                "messages.0.content.0.source.type",
            ),
            (talk([{"type": "image", "source": {"type": []}}]), "messages.0.content.0.source.type"),
            (talk([{"type": "image", "source": {"type": {}}}]), "messages.0.content.0.source.type"),
            (
                talk([{"type": "image", "source": {"type": "url", "url": None}}]),
                "messages.0.content.0.source.url",
            ),
            (
                talk([{"type": "document", "title": 5, "source": PNG["source"]}]),
                "messages.0.content.0.title",
            ),
            (talk([tool_use()]), "messages.0.content.0.type"),
            (talk("a", [tool_result()], "c"), "messages.1.content.0.type"),
            (talk(""), "messages.0.content"), (talk(" \n"), "messages.0.content"),
            (talk([]), "messages.0.content"),
            (
                talk("a", [tool_use(call_id="a\0")], [tool_result(call_id="a\0")]),
                "messages.1.content.0.id",
            ),
            (talk("a", [{**tool_use(), "id": 5}], [tool_result()]), "messages.1.content.0.id"),
            (
                talk("a", [{**tool_use(), "input": "x"}], [tool_result()]),
                "messages.1.content.0.input",
            ),
            (talk("a", [tool_use("")], [tool_result()]), "messages.1.content.0.name"),
            (
                talk("a", [tool_use()], [tool_result([tool_result()])]),
                "messages.2.content.0.content.0.type",
            ),
            (talk("a", [tool_use()], [tool_result(5)]), "messages.2.content.0.content"),
            (talk("a", [tool_use()], "no result"), "messages"),
            (talk([tool_result()]), "messages"),
            (talk("a", "b", [tool_result()]), "messages"),
            (talk("a", [tool_use()], [tool_result(), tool_result()]), "messages"),
            (talk("a", [tool_use()], [tool_result(), tool_result(call_id="other")]), "messages"),
            (
                talk("hi", tools=[{"type": "code_execution_20250825", "name": "code_execution"}]),
                "tools.0.type",
            ),
            (talk("hi", thread={"type": "create"}), "thread"),
            (talk("hi", max_tokens="many"), "max_tokens"),
            (talk("hi", max_tokens=-1), "max_tokens"),
            (talk("hi", max_tokens=True), "max_tokens"),
            (talk("hi", tools=[{"type": [], "name": "a"}]), "tools.0.type"),
            (talk("hi", mcp_servers=[{"url": "x"}]), "mcp_servers"),
            (talk("hi", tool_choice={"type": "any"}), "tool_choice"),
            (talk("hi", tool_choice={"type": "tool", "name": "a"}), "tool_choice"),
            (talk("hi", tool_choice="auto"), "tool_choice"),
            (talk("hi", tool_choice={"type": []}), "tool_choice.type"),
            *((forced_tool(name), "tool_choice") for name in ("other", None, 5, [], {}, ["look"])),
            (talk("hi", stop_sequences="x" * 1001), "stop_sequences"),
            (talk("hi", stop_sequences=[""]), "stop_sequences"),
            (talk("hi", stop_sequences=[5]), "stop_sequences"),
            (talk("hi", stop_sequences={"a": 1}), "stop_sequences"),
            (talk("hi", stop_sequences=["x"] * 17), "stop_sequences"),
            (talk("hi", output_config=[1]), "output_config"),
            (talk("hi", output_config={"effort": "huge"}), "output_config.effort"),
            (talk("hi", output_config={"effort": []}), "output_config.effort"),
            (talk("hi", output_config={"format": "json"}), "output_config.format"),
            (talk("hi", output_config={"format": {"type": "x"}}), "output_config.format.type"),
            (
                talk("hi", output_format={"type": "json_schema", "schema": []}),
                "output_config.format.schema",
            ),
        )
    ),
    *(
        ("openai", body, field)
        for body, field in (
            (talk("hi", audio=[1]), "audio"),
            (talk("hi", n=2), "n"),
            (talk("hi", n="1"), "n"),
            (talk("hi", n=[]), "n"),
            (talk("hi", n="x" * 5000), "n"),
            ({"messages": [{"role": "system", "content": [PNG]}]}, "messages.0.content.0.type"),
            ({"messages": [{"role": "system"}]}, "messages.0.content"),
            (talk([{"type": "image_url"}]), "messages.0.content.0.image_url.url"),
            (
                talk([{"type": "image_url", "image_url": {"url": []}}]),
                "messages.0.content.0.image_url.url",
            ),
            (talk([{"type": "file"}]), "messages.0.content.0.file"),
            (
                talk([{"type": "file", "file": {"file_id": "f"}}]),
                "messages.0.content.0.file.file_data",
            ),
            (
                {
                    "messages": [
                        {"role": "assistant", "content": 5}, {"role": "user", "content": "x"},
                    ]
                },
                "messages.0.content",
            ),
            (
                {"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]},
                "messages.0.tool_calls",
            ),
            ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages.0.tool_calls.0"),
            (chat_with_call(function=5), "messages.1.tool_calls.0.function"),
            (chat_with_call({"a": 1}), "messages.1.tool_calls.0.function.arguments"),
            ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.content.0.tool_use_id"),
            ({"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}, "messages"),
            (talk("hi", tools=[{"type": "custom"}]), "tools.0.custom"),
            (talk("hi", tools=[{"type": "web_search"}]), "tools.0.type"),
            (talk("hi", functions={"a": 1}), "functions"),
            (talk("hi", functions=[5]), "tools.0.function"),
            *(
                (
                    talk(
                        "hi", tools=tools("openai"),
                        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
                    ),
                    field,
                )
                for allowed, field in (
                    (5, "tool_choice"), ({}, "tool_choice.tools"),
                    ({"mode": []}, "tool_choice.allowed_tools.mode"),
                    ({"mode": "auto", "tools": [5]}, "tool_choice.tools.0"),
                    (
                        {
                            "mode": "auto",
                            "tools": [{"type": "function", "function": {"name": "other"}}],
                        },
                        "tool_choice",
                    ),
                )
            ),
            (talk("hi", tools=[{"type": "function"}]), "tools.0.function"),
            (talk("hi", tool_choice="required"), "tool_choice"),
            (talk("hi", tool_choice="any"), "tool_choice"),
            (talk("hi", tool_choice=["auto"]), "tool_choice"),
            (talk("hi", tool_choice={"type": "function", "function": "x"}), "tool_choice"),
            *(
                (
                    talk(
                        "hi", tools=tools("openai"),
                        tool_choice={"type": "function", "function": {"name": name}},
                    ),
                    "tool_choice",
                )
                for name in (None, [], {})
            ),
            (talk("hi", stop=["a"] * 17), "stop"),
            (talk("hi", stop=5), "stop"),
            (talk("hi", response_format="json"), "response_format"),
            (talk("hi", response_format={"type": "xml"}), "response_format.type"),
            (talk("hi", response_format={"type": []}), "response_format.type"),
            (talk("hi", response_format={"type": "json_schema"}), "response_format.json_schema"),
            (
                talk("hi", response_format={"type": "json_schema", "json_schema": {"schema": [1]}}),
                "response_format.json_schema.schema",
            ),
            (talk("hi", stream_options=[1]), "stream_options"),
            (talk("hi", reasoning_effort="huge"), "reasoning_effort"),
            (talk("hi", reasoning_effort=[]), "reasoning_effort"),
        )
    ),
]


@both
def test_an_invalid_body_is_refused_with_its_field(api: str) -> None:
    wrong = []
    for _, body, field in [row for row in REFUSED if row[0] == api]:
        try:
            outcome: Any = read(api, body).to_json()
        except cab.InvalidRequest as refused:
            outcome = (
                refused.extra.get("field")
                if len(str(refused)) < 500
                else "%d characters" % len(str(refused))
            )
            assert cab.completion_error(refused)["error"]["param"] == refused.extra.get("field")
        except Exception as error:
            outcome = repr(error)
        if outcome != field:
            wrong.append("%.200s -> %.200s, not %s" % (json.dumps(body), outcome, field))
    assert not wrong, "\n".join(wrong)


SEEDS: Mapping[str, Sequence[Any]] = {
    "anthropic": [
        talk(
            [
                text("x"), PNG, REMOTE_IMAGE,
                {
                    "type": "document",
                    "title": "T",
                    "context": "C",
                    "source": {"type": "text", "media_type": "text/plain", "data": "D"},
                },
            ],
            [{"type": "thinking"}, text("b"), tool_use(a=[1, {"b": None}])],
            [tool_result([text("r"), PNG], is_error=True), text("y")],
            model="haiku",
            system=[text("s")],
            tools=tools("anthropic"),
            tool_choice={"type": "tool", "name": "look", "disable_parallel_tool_use": True},
            stream=True,
            stop_sequences=["a"],
            output_config={"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
            metadata={},
            mcp_servers=None,
        ),
        talk(
            "a", "b", "c", system="s", tools=[{"name": "t"}], tool_choice={"type": "any"},
            stop_sequences="a", output_format=None,
        ),
    ],
    "openai": [
        {
            "messages": [
                {"role": "system", "content": "s"}, {"role": "developer", "content": [text("d")]},
                {
                    "role": "user",
                    "content": [
                        text("x"),
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                        {
                            "type": "file",
                            "file": {
                                "filename": "f",
                                "file_data": "data:application/pdf;base64,AA==",
                            },
                        },
                    ],
                },
                {
                    "role": "assistant",
                    "content": [text("b"), {"type": "refusal", "refusal": "no"}],
                    "tool_calls": [call_of()],
                },
                {"role": "tool", "tool_call_id": "call_0", "content": [text("r")]},
            ],
            "model": "gpt-4o", "tools": tools("openai"), "stop": ["a"],
            "tool_choice": {"type": "function", "function": {"name": "look"}},
            "parallel_tool_calls": False, "stream": True, "n": 1, "reasoning_effort": "none",
            "stream_options": {"include_usage": True},
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA},
            },
        },
        talk(
            "a", "b", "c", model="haiku", response_format={"type": "json_object"},
            tools=tools("openai", "t"), tool_choice="required", stop="x",
        ),
    ],
}
ODD: Sequence[Any] = (
    None, True, False, 0, 1, -1, 1.5, 10**30, "", " ", "x", "/x", "\ud800", "\x00", "auto", "{",
    "[[" * 2000, "x" * 200, [], {}, [[]], [{}], [None], ["x"], {"type": []}, {"type": "text"},
    {"": None}, {"type": "object", "properties": {"a": {}}}, [{"type": "text", "text": "/y"}],
)


def value_paths(value: Any, prefix: Tuple[Any, ...] = ()) -> Iterator[Tuple[Any, ...]]:
    """Yield the path of every value in a body."""
    yield prefix
    items: Iterable[Tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield from value_paths(item, (*prefix, key))


def mutated(body: Any, chance: random.Random) -> Any:
    """Return a body with one to three values deleted, copied elsewhere or replaced by odd ones."""
    body = copy.deepcopy(body)
    for _ in range(chance.choice((1, 1, 2, 3))):
        paths = list(value_paths(body))[1:]
        if not paths:
            break
        *path, last = chance.choice(paths)
        container = body
        for key in path:
            container = container[key]
        if chance.random() < 0.15:
            del container[last]
        elif chance.random() < 0.2:
            other = body
            for key in chance.choice(paths):
                other = other[key]
            container[last] = copy.deepcopy(other)
        else:
            container[last] = copy.deepcopy(chance.choice(ODD))
    return body


@both
def test_every_mutated_body_is_read_or_refused(api: str) -> None:
    """A body that is read can be stored, read again, and sent to the CLI as valid JSON."""
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
        stored = json.loads(chat.to_json())
        restored = cab.Chat(
            tuple(stored["turns"]), client_tools=tuple(stored["functions"]),
            forced_tool=stored["forced"], stop_sequences=tuple(stored["stops"]),
        )
        job = cab.Job(
            "j", 1, "t", "queued", chat.message, 0.0, model=chat.model,
            system_prompt=chat.system_prompt, json_schema=chat.json_schema,
        )
        work = cab.chat_run_request(job, token, restored)
        lines = [*cab.initialize_requests(work.session, features), cab.user_message(work.message)]
        for exchange in work.history():
            lines += [
                cab.user_message(exchange.message, wants_reply=False),
                cab.assistant_message(exchange.response, "m"),
            ]
        for line in lines:
            cab.parse_json(json.dumps(line).encode())
            last = line["message"]["content"][-1] if "message" in line else {}
            assert line["type"] != "user" or not str(last.get("text")).startswith("/")
        roles = [message["role"] for message in restored.turns]
        assert roles == [("user", "assistant")[n % 2] for n in range(len(roles))]
        assert roles[-1] == "user"
    assert was_read > 100


# --- stop sequences ---


def earliest_end(whole: str, stop_sequences: Sequence[str]) -> Tuple[str, Optional[str]]:
    """Cut a text as a server does that checks for a stop sequence after every character.

    The first complete stop sequence ends the text; of two, the longer one.
    """
    for end in range(len(whole) + 1):
        matches = [stop for stop in stop_sequences if whole[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return whole[: end - len(longest)], longest
    return whole, None


def halves(whole: str) -> str:
    """Split characters outside of the first plane in two surrogates, as the CLI may cut them."""
    data = whole.encode("utf-16-le")
    return "".join(map(chr, struct.unpack("<%dH" % (len(data) // 2), data)))


def feed(
    pieces: Sequence[str], stop_sequences: Sequence[str]
) -> Tuple[str, Optional[str], List[str]]:
    """Add the pieces to a live text.

    -> (the final text, the stop sequence that ended it, the readable text after each piece)
    """
    live, partials = cab.LiveText(stop_sequences=stop_sequences), []
    for piece in pieces:
        live.add(piece)
        partials.append(live.read())
        if live.stopped_by:
            return live.read(), live.stopped_by, partials
    final, stop = cab.cut_at_stop(cab.replace_surrogates("".join(pieces)), stop_sequences)
    live.reconcile(final)
    return live.read(), stop, partials


@pytest.mark.parametrize(
    "whole, stop_sequences, cut",
    [
        ("abc", (), ("abc", None)), ("abc", ("x",), ("abc", None)), ("abc", ("b",), ("a", "b")),
        ("abcabc", ("c", "b"), ("a", "b")), ("abc", ("abc",), ("", "abc")),
        ("abc", ("b", "bc"), ("a", "b")), ("abc", ("c", "bc"), ("a", "bc")),
        ("abcd", ("bcd", "c"), ("ab", "c")), ("", ("a",), ("", None)), ("aaa", ("aa",), ("", "aa")),
    ],
)
def test_the_first_stop_sequence_that_is_complete_ends_a_text(
    whole: str, stop_sequences: Sequence[str], cut: Tuple[str, Optional[str]]
) -> None:
    assert cab.cut_at_stop(whole, stop_sequences) == cut == earliest_end(whole, stop_sequences)
    assert feed(list(whole), stop_sequences)[:2] == cut


@pytest.mark.parametrize(
    "whole, stop_sequences, size",
    [
        ("", ("ab",), 0),
        ("xa", ("ab",), 1),
        ("xab", ("ab",), 0),
        ("aaa", ("aaab",), 3),
        ("aaa", ("aab",), 2),
        ("ba", ("ab", "bac"), 2),
        ("x", (), 0),
    ],
)
def test_a_suffix_that_may_become_a_stop_sequence_is_held_back(
    whole: str, stop_sequences: Sequence[str], size: int
) -> None:
    assert cab.partial_stop_length(whole, stop_sequences) == size


def test_any_chunking_gives_the_same_text_and_nothing_of_a_stop_sequence() -> None:
    chance = random.Random(7)
    for n in range(2000):
        letters = "ab" if n % 3 else "a\U0001f600\n"
        whole = "".join(chance.choice(letters) for _ in range(chance.randrange(12)))
        stop_sequences = [
            "".join(chance.choice(letters) for _ in range(chance.randrange(1, 5)))
            for _ in range(chance.randrange(1, 4))
        ]
        units = halves(whole)
        cuts = sorted(chance.randrange(len(units) + 1) for _ in range(chance.randrange(6)))
        pieces = [units[start:end] for start, end in zip([0, *cuts], [*cuts, len(units)])]
        final, stop, partials = feed(pieces, stop_sequences)
        expected = earliest_end(whole, stop_sequences)
        assert (final, stop) == expected == cab.cut_at_stop(whole, stop_sequences), (
            pieces, stop_sequences,
        )
        assert all(final.startswith(partial) for partial in partials), (
            pieces, stop_sequences, partials,
        )


# --- messages for the CLI ---


def test_long_descriptions_of_tools_move_to_the_instructions() -> None:
    long = "x" * 2001
    shortened, more = cab.truncate_descriptions([function("a"), function("b", description=long)])
    first, second = shortened
    assert first == function("a") and len(second["description"]) < 2000
    assert "instructions" in second["description"]
    assert more == "\n\nThe description of the tool mcp__api__b:\n" + long
    assert cab.truncate_descriptions([]) == ((), "")
    assert cab.truncate_descriptions([function("a", description="x" * 2000)])[1] == ""


@pytest.mark.parametrize(
    "block, content",
    [
        (tool_result("r"), {"content": [{"type": "text", "text": "r"}], "isError": False}),
        (
            tool_result(None, is_error=True),
            {"content": [{"type": "text", "text": "(no result)"}], "isError": True},
        ),
        (
            tool_result([text("/r"), PNG]),
            {
                "content": [
                    {"type": "text", "text": "/r"},
                    {"type": "image", "data": "iVBORw0KGgo=", "mimeType": "image/png"},
                ],
                "isError": False,
            },
        ),
        (tool_result([REMOTE_IMAGE]), None),
        (tool_result([{"type": "document", "source": PNG["source"]}]), None),
        (
            tool_result("x" * 40_000),
            {"content": [{"type": "text", "text": "x" * 40_000}], "isError": False},
        ),
        (tool_result("x" * 40_001), None),
        (tool_result([text("x" * 20_000), text("y" * 20_001)]), None),
    ],
)
def test_results_that_the_cli_passes_on_unchanged(block: Any, content: Any) -> None:
    assert cab.mcp_content(block) == content
    assert cab.mcp_results([block]) == ({"toolu_0": content} if content else None)
    assert cab.mcp_results([tool_result(call_id="b"), block, text("x")]) is None


def test_only_a_turn_of_results_continues_a_call() -> None:
    assert cab.mcp_results("text") is None and cab.mcp_results([]) is None
    assert cab.mcp_results([text("a")]) is None
    assert list(cab.mcp_results([tool_result(call_id="b"), tool_result(call_id="a")]) or ()) == [
        "b", "a",
    ]


def test_no_text_becomes_a_command() -> None:
    blocks = [text("/one"), text("/two")]
    for asks in (True, False):
        message = cab.user_message(blocks, asks)
        assert message["message"]["content"] == [text("/one"), text(" /two")]
        assert message.get("shouldQuery") is (None if asks else False)
    assert blocks == [text("/one"), text("/two")]
    assert cab.user_message([text("/one"), PNG])["message"]["content"] == [text("/one"), PNG]
    assert cab.user_message("/one")["message"]["content"] == [text(" /one")]
    assert cab.assistant_message([tool_use()], "m")["message"] == {
        "id": "m",
        "role": "assistant",
        "content": [tool_use()],
    }
    assert cab.assistant_message(" ")["message"]["content"] == [text("(no answer)")]


# --- bodies of answers ---

JOB = cab.Job(
    "0-1", 1, "t", "completed", "hi", 1_800_000_000.0, model="m", response="hello",
    usage=cab.Usage(1, 2, 3, 4, 0.5), stop_info=cab.StopInfo(),
)
CALL_JOB = cab.replace(
    JOB,
    response="",
    stop_info=cab.StopInfo("tool_use", None, (cab.ToolCall("c", "look", {"at": "é"}),)),
)


@pytest.mark.parametrize(
    "job, message, completion",
    [
        (JOB, {}, {}),
        (
            cab.replace(JOB, stop_info=None, usage=None, model=None, response=""),
            {
                "content": [text("")],
                "model": "default",
                "usage": {
                    "input_tokens": 0,
                    "cache_creation_input_tokens": 0,
                    "cache_read_input_tokens": 0,
                    "output_tokens": 0,
                },
            },
            {
                "model": "default",
                "message": {"content": ""},
                "usage": {
                    "prompt_tokens": 0,
                    "completion_tokens": 0,
                    "total_tokens": 0,
                    "prompt_tokens_details": {"cached_tokens": 0},
                },
            },
        ),
        (
            CALL_JOB,
            {
                "content": [{"type": "tool_use", "id": "c", "name": "look", "input": {"at": "é"}}],
                "stop_reason": "tool_use",
            },
            {
                "finish_reason": "tool_calls",
                "message": {
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "c",
                            "type": "function",
                            "function": {"name": "look", "arguments": '{"at":"é"}'},
                        }
                    ],
                },
            },
        ),
        (
            cab.replace(JOB, stop_info=cab.StopInfo("stop_sequence", "END")),
            {"stop_reason": "stop_sequence", "stop_sequence": "END"}, {},
        ),
        (
            cab.replace(JOB, stop_info=cab.StopInfo("max_tokens")), {"stop_reason": "max_tokens"},
            {"finish_reason": "length"},
        ),
        (
            cab.replace(JOB, stop_info=cab.StopInfo("refusal")), {"stop_reason": "refusal"},
            {"finish_reason": "content_filter"},
        ),
    ],
)
def test_the_bodies_of_answers(job: cab.Job, message: Any, completion: Any) -> None:
    chat = cab.Chat(HI)
    assert cab.message_body(chat, job) == {
        "id": "msg_01", "type": "message", "role": "assistant", "model": "m",
        "content": [text("hello")], "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {
            "input_tokens": 1,
            "cache_creation_input_tokens": 4,
            "cache_read_input_tokens": 3,
            "output_tokens": 2,
        },
        **message,
    }
    completion = dict(completion)
    body = {
        "role": "assistant",
        "content": "hello",
        "refusal": None,
        **completion.pop("message", {}),
    }
    choice = {
        "index": 0,
        "message": body,
        "logprobs": None,
        "finish_reason": completion.pop("finish_reason", "stop"),
    }
    assert cab.completion_body(chat, job) == {
        "id": "chatcmpl-01",
        "object": "chat.completion",
        "created": 1_800_000_000,
        "model": "m",
        "choices": [choice],
        "usage": {
            "prompt_tokens": 8,
            "completion_tokens": 2,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
        **completion,
    }


STATUSES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    504: "timeout_error", 529: "overloaded_error",
}


@pytest.mark.parametrize(
    "error",
    [kind() for kind in cab.ERRORS] + [cab.RunError(code, "why") for code in cab.RUN_ERRORS],
    ids=lambda error: error.code,
)
def test_every_error_in_both_formats(error: cab.BridgeError) -> None:
    body = cab.message_error(error)
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    assert body == {
        "type": "error",
        "error": {"type": STATUSES.get(error.status, usual), "message": str(error)},
    }
    body = cab.completion_error(error)["error"]
    assert set(body) == {"message", "type", "param", "code"} and body["message"] == str(error)
    assert body["code"]
    if error.status == 429:
        assert body["type"] == "rate_limit_error"
    else:
        assert body["type"] == (usual if error.status < 500 else "server_error")
    if isinstance(error, cab.RunError):
        assert ("x-should-retry", "false") in error.headers


# --- over the wire ---

USAGE = {
    "input_tokens": 10,
    "cache_creation_input_tokens": 3,
    "cache_read_input_tokens": 5,
    "output_tokens": 7,
}
COMPLETION_USAGE = {
    "prompt_tokens": 18,
    "completion_tokens": 7,
    "total_tokens": 25,
    "prompt_tokens_details": {"cached_tokens": 5},
}
REQUEST_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def post(client: Api, api: str, body: Any, **headers: str) -> Answer:
    """Send a body to the endpoint of a format."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(PATHS[api], body, headers=named)


def words(answer: Answer) -> str:
    """Return the text of an answer in either format."""
    assert answer.status == 200, answer.data
    body = answer.json
    if "choices" in body:
        return str(body["choices"][0]["message"]["content"])
    return "".join(block.get("text", "") for block in body["content"])


def events(data: bytes) -> List[Tuple[str, Any]]:
    """Return (name or "", data) of each event of a stream; the data is parsed if it is JSON."""
    parsed = []
    for block in data.decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        payload = fields.get("data", "")
        value = json.loads(payload) if payload.startswith("{") else payload or fields
        parsed.append((fields.get("event", ""), value))
    return parsed


def streamed(data: bytes) -> str:
    """Return the text of a stream in either format."""
    parts = []
    for _, payload in events(data):
        if isinstance(payload, dict):
            if payload.get("choices"):
                delta = payload["choices"][0]["delta"]
            else:
                delta = payload.get("delta", {})
            parts.append(delta.get("content") or delta.get("text") or "")
    return "".join(parts)


def streamed_calls(stream_events: List[Tuple[str, Any]]) -> List[Dict[str, Any]]:
    """Return the calls in a stream of chat completions, each joined from its pieces."""
    calls: List[Dict[str, Any]] = []
    for _, data in stream_events:
        for choice in data["choices"] if isinstance(data, dict) else ():
            for piece in choice["delta"].get("tool_calls", ()):
                if piece["index"] == len(calls):
                    calls.append({key: value for key, value in piece.items() if key != "index"})
                else:
                    assert piece["index"] == len(calls) - 1 and set(piece) == {"index", "function"}
                    calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
    return calls


class OpenRequest:
    """A request on a connection of its own, whose answer is read while it arrives.

    The client may disconnect; otherwise the fixture disconnects it when the test ends.
    """

    opened: List["OpenRequest"] = []

    def __init__(self, client: Api, api: str, body: Any) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
        self._connection.request(
            "POST", PATHS.get(api, api), json.dumps(body).encode(),
            {"Authorization": "Bearer %s" % client.token},
        )
        self.data, self.socket = b"", self._connection.sock
        self._response: Optional[http.client.HTTPResponse] = None
        self.opened.append(self)

    @property
    def response(self) -> http.client.HTTPResponse:
        self._response = self._response or self._connection.getresponse()
        return self._response

    def until(self, word: str) -> bytes:
        """Read lines up to one with this word. -> all data so far."""
        while word.encode() not in self.data:
            line = self.response.readline()
            assert line, self.data
            self.data += line
        return self.data

    def rest(self) -> bytes:
        """Read the answer to its end, and disconnect. -> all data."""
        self.data += self.response.read()
        self.disconnect()
        return self.data

    def disconnect(self) -> None:
        if self._response:
            self._response.close()
        self._connection.close()


def rows(client: Api) -> List[Dict[str, Any]]:
    """Return the list of requests, oldest first."""
    return list(reversed(client.get("/api/requests").json["requests"]))


def pids(fake: FakeClaude) -> List[int]:
    """Return the processes that received a prompt or tool results, in order, without repeats."""
    process_ids = []
    for entry in fake._log("lines.jsonl"):
        line = str(entry["line"])
        has_results = "mcp_response" in line and "content" in line
        if entry["line"]["type"] == "user" or has_results:
            process_ids.append(entry["pid"])
    return list(dict.fromkeys(process_ids))


def service_of(running: RunningBridge) -> cab.Service:
    return running.bridge._server.dispatcher._service


def open_streams(running: RunningBridge) -> Dict[str, int]:
    """Return the number of open streams and waits of each token."""
    return service_of(running).slots._by_token


def nothing_runs(
    running: RunningBridge, fake: FakeClaude, waiting: Optional[int] = None
) -> None:
    """Wait until no job and no stream is left, and check that a new request works.

    Only the processes that wait for the next turn of a conversation may be left.

    waiting: how many there must be, if that matters.
    """
    wait_until(lambda: all(row["status"] in cab.JobStatus.FINISHED for row in rows(running.admin)))
    wait_until(lambda: not open_streams(running))

    def only_waiting_ones_are_left() -> bool:
        left = [child["pid"] for child in fake.children() if is_running(child["pid"])]
        return set(left) == set(running.waiting()) and waiting in (None, len(left))

    wait_until(only_waiting_ones_are_left)
    assert len(running.waiting()) <= cab.MAX_KEPT_PROCESSES
    notifier = service_of(running).notifier
    for job_id in (row["requestId"] for row in rows(running.admin)):
        for topic in (job_id, cab.Notifier.text_topic(job_id)):
            assert notifier.waiter_count(topic) == 0
    assert running.admin.answer("say on")["response"] == "on"


@pytest.fixture(autouse=True)
def close_open_requests() -> Iterator[None]:
    yield
    while OpenRequest.opened:
        OpenRequest.opened.pop().disconnect()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the bridge notice a disconnected client at once, and end its process sooner.

    The fake that hangs ends only at SIGTERM.
    """
    for name, seconds in (
        ("RECHECK_SECONDS", 0.03),
        ("SHUTDOWN_GRACE_SECONDS", 0.05),
        ("FINISH_SECONDS", 0.05),
        ("CANCEL_POLL_SECONDS", 0.03),
    ):
        monkeypatch.setattr(cab, name, seconds)


@pytest.fixture
def fake(fake_claude: Fakes) -> FakeClaude:
    return fake_claude()


def control_requests(fake: FakeClaude, subtype: str) -> List[Dict[str, Any]]:
    """Return the control requests of a kind that the fake received."""
    requests = [line["request"] for line in fake.lines() if line["type"] == "control_request"]
    return [request for request in requests if request["subtype"] == subtype]


def initialize_requests(fake: FakeClaude) -> List[Dict[str, Any]]:
    return control_requests(fake, "initialize")


@both
def test_a_chat_whole(bridge: Start, fake: FakeClaude, api: str) -> None:
    admin = bridge(fake).admin
    headers = {"anthropic_version": "2023-06-01"} if api == "anthropic" else {}
    answer = post(admin, api, talk("hello", model="haiku"), **headers)
    (job,) = rows(admin)
    name, short = job["requestId"], job["requestId"].replace("-", "")
    assert answer.status == 200
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == name
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert "x-should-retry" not in answer.headers
    if api == "anthropic":
        assert answer.json == {
            "id": "msg_" + short, "type": "message", "role": "assistant", "model": "resolved-haiku",
            "content": [text("Echo: hello")], "stop_reason": "end_turn", "stop_sequence": None,
            "usage": USAGE,
        }
    else:
        created = answer.json["created"]
        assert answer.json == {
            "id": "chatcmpl-" + short,
            "object": "chat.completion",
            "created": created,
            "model": "resolved-haiku",
            "usage": COMPLETION_USAGE,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Echo: hello", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
        }
    assert (
        job["status"], job["api"], job["message"], job["usage"]["inputTokens"],
        job["usage"]["outputTokens"],
    ) == ("completed", api, "hello", 10, 7)
    assert admin.poll(name)["response"] == "Echo: hello"
    day = admin.get("/api/usage").json["total"]
    assert (day["requests"], day["completed"], day["errors"], day["inputTokens"]) == (1, 1, 0, 10)


def test_a_message_streamed(bridge: Start) -> None:
    admin = bridge().admin
    answer = post(admin, "anthropic", talk("say hi", stream=True))
    name = answer.headers["request-id"]
    assert REQUEST_ID.fullmatch(name) and answer.status == 200
    assert (answer.headers["content-type"], answer.headers["cache-control"]) == (
        "text/event-stream; charset=utf-8", "no-store, no-transform",
    )
    stream_events = events(answer.data)
    joined = "".join(
        data["delta"]["text"] for kind, data in stream_events if kind == "content_block_delta"
    )
    kinds = [kind for kind, _ in stream_events]
    deltas = kinds.count("content_block_delta")
    assert joined == "hi" and 1 <= deltas <= 2
    assert kinds == [
        "message_start", "ping", "content_block_start", *["content_block_delta"] * deltas,
        "content_block_stop", "message_delta", "message_stop",
    ]
    assert all(kind == data["type"] for kind, data in stream_events)
    start = (
        "event: message_start\n"
        'data: {"type":"message_start","message":{"id":"msg_%s","type":"message",'
        '"role":"assistant","model":"resolved-default-model","content":[],"stop_reason":null,'
        '"stop_sequence":null,"usage":{"input_tokens":10,"cache_creation_input_tokens":3,'
        '"cache_read_input_tokens":5,"output_tokens":%s}}}\n\n'
        "event: ping\n"
        'data: {"type":"ping"}\n\n'
        "event: content_block_start\n"
        'data: {"type":"content_block_start","index":0,'
        '"content_block":{"type":"text","text":""}}\n\n'
        "event: content_block_delta\n"
        'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"h'
    )
    end = (
        "event: content_block_stop\n"
        'data: {"type":"content_block_stop","index":0}\n\n'
        "event: message_delta\n"
        'data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
        '"usage":{"input_tokens":10,"cache_creation_input_tokens":3,"cache_read_input_tokens":5,'
        '"output_tokens":7}}\n\n'
        "event: message_stop\n"
        'data: {"type":"message_stop"}\n\n'
    )
    # A run that has ended by then has its last figures in the first event.
    ids = name.replace("-", "")
    assert answer.data.decode().startswith((start % (ids, 1), start % (ids, 7)))
    assert answer.data.decode().endswith(end)


def test_a_message_whose_run_ends_before_its_first_event_has_the_input_figures(
    bridge: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = bridge().admin
    monkeypatch.setattr(cab.Service, "live_of", lambda self, job: None)
    answer = post(admin, "anthropic", talk("say hi", stream=True))
    kind, data = events(answer.data)[0]
    assert (kind, data["message"]["usage"]["input_tokens"]) == ("message_start", 10)


def test_a_completion_streamed(bridge: Start) -> None:
    admin = bridge().admin
    for options in (
        {}, {"stream_options": {"include_usage": False}},
        {"stream_options": {"include_usage": True}},
    ):
        answer = post(admin, "openai", talk("say hi", stream=True, **options))
        short = answer.headers["x-request-id"].replace("-", "")
        chunks = [data for _, data in events(answer.data)]
        assert {kind for kind, _ in events(answer.data)} == {""}
        assert chunks[-1] == "[DONE]" and answer.data.endswith(b"data: [DONE]\n\n")
        include_usage = options.get("stream_options", {}).get("include_usage", False)
        head = {
            "id": "chatcmpl-" + short,
            "object": "chat.completion.chunk",
            "created": chunks[0]["created"],
            "model": "resolved-default-model",
        }

        def chunk(delta: Mapping[str, Any], reason: Optional[str] = None) -> Dict[str, Any]:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            usage = {"usage": None} if include_usage else {}
            return {**head, "choices": [choice], **usage}

        choices = [data["choices"][0] for data in chunks[1:-1] if data["choices"]]
        deltas = [choice["delta"] for choice in choices if choice["delta"]]
        assert "".join(delta["content"] for delta in deltas) == "hi"
        expected: List[Any] = [
            chunk({"role": "assistant", "content": "", "refusal": None}),
            *map(chunk, deltas),
            chunk({}, "stop"),
        ]
        if include_usage:
            expected.append({**head, "choices": [], "usage": COMPLETION_USAGE})
        assert chunks == [*expected, "[DONE]"]


@both
def test_what_reaches_claude_and_what_does_not(bridge: Start, fake: FakeClaude, api: str) -> None:
    """Every text has its place, none is a command or in argv, and tokens share no memory.

    The second request is a retry in the same process, which takes the first one back.
    """
    admin = bridge(fake).admin
    stateful = admin.new_token(sessionMode="stateful")
    body = talk("/clear", "/compact", "/turns")
    if api == "anthropic":
        body["system"] = "/secret system"
    else:
        body["messages"].insert(0, {"role": "system", "content": "/secret system"})
    assert [words(post(stateful, api, body)) for _ in range(2)] == ["Echo:  /turns"] * 2
    answer = post(stateful, api, talk("say before", "/x", "turns"))
    assert json.loads(words(answer)) == [["user", "say before"], ["assistant", "/x"]]
    messages = [line for line in fake.lines() if line["type"] in ("user", "assistant")]
    assert [
        (line["type"], line.get("shouldQuery"), line["message"]["content"]) for line in messages[:3]
    ] == [
        ("user", False, [text(" /clear")]),
        ("assistant", None, [text("/compact")]),
        ("user", None, [text(" /turns")]),
    ]
    prompts = [request["systemPrompt"] for request in initialize_requests(fake)]
    assert prompts == ["/secret system", cab.SYSTEM_PROMPT]
    rewinds = control_requests(fake, "rewind_conversation")
    assert [request["target_message_uuid"] for request in rewinds[:1]] == [messages[2]["uuid"]]
    assert messages[3] == {**messages[2], "uuid": messages[3]["uuid"]}
    assert not stateful.get("/api/conversations").json["conversations"]
    starts = json.dumps([[start["argv"], start["env"]] for start in fake.starts()])
    assert not any(word in starts for word in ("secret", "/clear", "compact"))


def test_images_and_documents_reach_claude(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    document = {
        "type": "document",
        "source": {"type": "text", "media_type": "text/plain", "data": "D"},
    }
    assert words(post(admin, "anthropic", talk([text("/see"), PNG, document]))) == "Echo: /see"
    url = "data:image/png;base64," + PNG["source"]["data"]  # type: ignore[index]
    body = talk([{"type": "image_url", "image_url": {"url": url}}, text("/see")])
    assert words(post(admin, "openai", body)) == "Echo:  /see"
    contents = [line["message"]["content"] for line in fake.lines() if line["type"] == "user"]
    assert contents == [[text("/see"), PNG, document], [PNG, text(" /see")]]


# --- a restarted text ---


def restarted(
    client: Api, api: str, body_of: Callable[..., Any], gate: Path, first: str, second: str
) -> bytes:
    """Return the stream of an answer whose text begins anew once the client has its first text."""
    steps: List[Dict[str, Any]] = [{"delta": first}, {"wait": str(gate)}, {"message": True}]
    if second:
        steps.append({"delta": second})
    prompt = script(*steps, {"result": second})
    request = OpenRequest(client, api, body_of(prompt, stream=True))
    request.until(json.dumps(first))
    gate.touch()
    return request.rest()


@both
def test_a_restarted_text_is_not_sent_twice(bridge: Start, tmp_path: Path, api: str) -> None:
    """The common prefix continues. A different text has its own block, or follows a blank line."""
    admin = bridge().admin
    table = (
        ("one ", "one two", ["one two"]),
        ("one ", "won", ["one ", "won"]),
        ("one ", "one ", ["one "]),
        ("abc", "abX", ["abc", "abX"]),
        ("one", "", ["one"]),
        ("one\n", "one", ["one\n"]),
        ("one two", "one", ["one two", "one"]),
    )
    for n, (first, second, expected) in enumerate(table):
        stream = restarted(admin, api, talk, tmp_path / ("gate-%d" % n), first, second)
        stream_events = events(stream)
        if api == "openai":
            assert streamed(stream) == "\n\n".join(expected)
            assert stream_events[-1][1] == "[DONE]"
            continue
        blocks: Dict[int, str] = {}
        open_block = -1
        for kind, data in stream_events:
            if kind == "content_block_start":
                assert open_block == -1 and data["index"] == len(blocks)
                open_block, blocks[data["index"]] = data["index"], ""
            elif kind == "content_block_delta":
                assert data["index"] == open_block
                blocks[open_block] += data["delta"]["text"]
            elif kind == "content_block_stop":
                assert data["index"] == open_block
                open_block = -1
        assert list(blocks.values()) == expected and open_block == -1
        assert [kind for kind, _ in stream_events][-2:] == ["message_delta", "message_stop"]


# --- stop sequences, schemas ---


@both
def test_an_answer_ends_before_a_stop_sequence(
    bridge: Start, fake: FakeClaude, quick: None, api: str
) -> None:
    running = bridge(fake)
    prompt = script({"delta": "one ST"}, {"delta": "OP"}, {"delta": " two"}, {"pause": 30})
    body = talk(prompt, **{"stop_sequences" if api == "anthropic" else "stop": ["STOP", "two"]})
    answer = post(running.admin, api, {**body, "stream": True})
    assert streamed(answer.data) == "one "
    if api == "anthropic":
        assert b'"stop_reason":"stop_sequence","stop_sequence":"STOP"' in answer.data
    else:
        assert b'"finish_reason":"stop"' in answer.data
    answer = post(running.admin, api, body)
    assert words(answer) == "one "
    reply = answer.json
    if api == "openai":
        assert reply["choices"][0]["finish_reason"] == "stop"
    else:
        assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", "STOP")
    nothing_runs(running, fake)


def test_a_text_that_only_begins_like_a_stop_sequence_is_sent_whole(bridge: Start) -> None:
    admin = bridge().admin
    prompt = script({"delta": "one ST"}, {"delta": "O"})
    assert (
        streamed(post(admin, "anthropic", talk(prompt, stream=True, stop_sequences=["STOP"])).data)
        == "one STO"
    )
    assert words(post(admin, "anthropic", talk(prompt, stop_sequences=["STOP"]))) == "one STO"


@both
def test_an_answer_with_a_schema_is_json(bridge: Start, api: str) -> None:
    options: Dict[str, Any]
    if api == "anthropic":
        options = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    else:
        json_schema = {"name": "n", "schema": SCHEMA}
        options = {"response_format": {"type": "json_schema", "json_schema": json_schema}}
    admin = bridge().admin
    answer = post(admin, api, talk("say forty-two", **options))
    assert json.loads(words(answer)) == {"answer": "forty-two"}
    answer = post(admin, api, talk("say forty-two", stream=True, **options))
    assert json.loads(streamed(answer.data)) == {"answer": "forty-two"}


def test_a_tool_that_must_be_called(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    for api, stream in [(api, stream) for api in PATHS for stream in (False, True)]:
        choice: Dict[str, Any] = {"type": "tool", "name": "look"}
        if api == "openai":
            choice = {"type": "function", "function": {"name": "look"}}
        answer = post(
            admin, api, talk("say sky", tools=tools(api), tool_choice=choice, stream=stream)
        )
        call_id = "toolu_" + answer.headers["request-id"].replace("-", "")
        if not stream and api == "anthropic":
            assert (answer.json["content"], answer.json["stop_reason"]) == (
                [tool_use(call_id=call_id, answer="sky")], "tool_use",
            )
        elif not stream:
            choice = answer.json["choices"][0]
            call = call_of(arguments='{"answer":"sky"}', call_id=call_id)
            assert choice["finish_reason"] == "tool_calls"
            assert choice["message"] == {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "tool_calls": [call],
            }
        elif api == "anthropic":
            stream_events = events(answer.data)
            assert [kind for kind, _ in stream_events] == [
                "message_start", "ping", "content_block_start", "content_block_delta",
                "content_block_stop", "message_delta", "message_stop",
            ]
            assert stream_events[2][1]["content_block"] == tool_use(call_id=call_id)
            assert stream_events[2][1]["index"] == 0
            assert stream_events[3][1]["delta"] == {
                "type": "input_json_delta",
                "partial_json": '{"answer":"sky"}',
            }
            assert stream_events[5][1]["delta"]["stop_reason"] == "tool_use"
        else:
            stream_events = events(answer.data)
            call = call_of(arguments='{"answer":"sky"}', call_id=call_id)
            assert streamed_calls(stream_events) == [call]
            assert stream_events[-2][1]["choices"][0]["finish_reason"] == "tool_calls"
            assert streamed(answer.data) == ""
        setup = next(line["request"] for line in fake.lines() if line["type"] == "control_request")
        assert setup["jsonSchema"] == SCHEMA and "sdkMcpServers" not in setup


# --- the client's tools ---

BLUE = [{"content": [{"type": "text", "text": "blue"}], "isError": False}]
# The answer of a process that got the conversation by replay, and the results as its prompt.
REPLAYED = "Echo: tool_result"


def chat_that_calls(api: str, *calls: Any, **more: Any) -> Dict[str, Any]:
    """Return a body whose prompt makes the fake call tools."""
    return talk("call " + json.dumps(calls or [["look", {"at": "sky"}]]), tools=tools(api), **more)


def calls_in(answer: Answer) -> List[Tuple[str, str, Any]]:
    """Return (id, name, input) of each call in an answer."""
    assert answer.status == 200, answer.data
    body = answer.json
    if "choices" in body:
        return [
            (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in body["choices"][0]["message"]["tool_calls"]
        ]
    return [
        (block["id"], block["name"], block["input"])
        for block in body["content"]
        if block["type"] == "tool_use"
    ]


def continue_chat(
    body: Dict[str, Any], answer: Answer, *contents: Any, beside: Sequence[Any] = ()
) -> Dict[str, Any]:
    """Return the body that continues after an answer with calls.

    contents: of the results, in the order of the calls. beside: blocks after the results.
    """
    reply = answer.json
    if "choices" in reply:
        results = [
            {"role": "tool", "tool_call_id": call[0], "content": content}
            for call, content in zip(calls_in(answer), contents)
        ]
        more = [reply["choices"][0]["message"], *results, *beside]
    else:
        results = [
            tool_result(content, call[0]) for call, content in zip(calls_in(answer), contents)
        ]
        more = [
            {"role": "assistant", "content": reply["content"]},
            {"role": "user", "content": [*results, *beside]},
        ]
    return copy.deepcopy({**body, "messages": [*body["messages"], *more]})


def pid_of(fake: FakeClaude, word: str) -> List[int]:
    """Return the processes that received a prompt with this word."""
    return [
        entry["pid"]
        for entry in fake._log("lines.jsonl")
        if entry["line"]["type"] == "user" and word in json.dumps(entry["line"])
    ]


@both
def test_a_result_continues_the_live_turn(bridge: Start, fake: FakeClaude, api: str) -> None:
    admin = bridge(fake).admin
    body = chat_that_calls(api, model="haiku")
    answer = post(admin, api, body)
    assert calls_in(answer) == [("toolu_0", "look", {"at": "sky"})]
    assert words(answer) == "Let me see."
    reply = answer.json
    assert reply["model"] == "resolved-haiku"
    if api == "anthropic":
        assert reply["stop_reason"] == "tool_use"
    else:
        assert reply["choices"][0]["finish_reason"] == "tool_calls"
    end = post(admin, api, continue_chat(body, answer, "blue"))
    assert json.loads(words(end)) == BLUE and end.json["model"] == "resolved-haiku"
    if api == "anthropic":
        assert end.json["stop_reason"] == "end_turn"
    else:
        assert end.json["choices"][0]["finish_reason"] == "stop"
    assert len(fake.children()) == 1 and len(pids(fake)) == 1
    (initialize,) = initialize_requests(fake)
    assert initialize["sdkMcpServers"] == ["api"]
    assert initialize["agents"]["bridge"]["tools"] == ["mcp__api__look", "mcp__api__taste"]
    results = [
        line["response"]["response"]["mcp_response"]["result"]
        for line in fake.lines()
        if line["type"] == "control_response"
    ]
    (tool_list,) = [result["tools"] for result in results if "tools" in result]
    assert tool_list == list(LOOK)
    first, second = (row["usage"] for row in rows(admin))
    assert (first["inputTokens"], first["outputTokens"]) == (10, 7)
    assert first["inputTokens"] + second["inputTokens"] == 10
    # Nothing was replayed.
    assert not [line for line in fake.lines() if line["type"] == "assistant"]


@both
def test_calls_in_a_stream_and_their_results_in_another(
    bridge: Start, fake: FakeClaude, api: str
) -> None:
    admin = bridge(fake).admin
    calls = [["look", {"at": "sky"}], ["taste", {}]]
    body = chat_that_calls(api, *calls)
    answer = post(admin, api, {**body, "stream": True})
    stream_events, ids = events(answer.data), ["toolu_0", "toolu_1"]
    assert streamed(answer.data) == "Let me see."
    if api == "anthropic":
        kinds = [kind for kind, _ in stream_events if kind != "content_block_delta"]
        assert kinds == [
            "message_start", "ping", *["content_block_start", "content_block_stop"] * 3,
            "message_delta", "message_stop",
        ]
        starts = [data for kind, data in stream_events if kind == "content_block_start"]
        assert [(data["index"], data["content_block"]) for data in starts] == [
            (0, text("")),
            (1, tool_use("look", "toolu_0")),
            (2, tool_use("taste", "toolu_1")),
        ]
        pieces = [
            (data["index"], data["delta"]["partial_json"])
            for _, data in stream_events
            if "partial_json" in data.get("delta", {})
        ]
        for number, arguments in ((1, {"at": "sky"}), (2, {})):
            joined = "".join(piece for index, piece in pieces if index == number)
            assert json.loads(joined) == arguments
        delta = {"stop_reason": "tool_use", "stop_sequence": None}
        assert stream_events[-2][1] == {"type": "message_delta", "delta": delta, "usage": USAGE}
        turns = [
            {
                "role": "assistant",
                "content": [
                    text("Let me see."),
                    tool_use("look", "toolu_0", at="sky"),
                    tool_use("taste", "toolu_1"),
                ],
            },
            {"role": "user", "content": [tool_result("sweet", "toolu_1"), tool_result("blue")]},
        ]
    else:
        tool_calls = [
            call_of(arguments='{"at":"sky"}', call_id="toolu_0"),
            call_of("taste", "{}", "toolu_1"),
        ]
        joined_calls = streamed_calls(stream_events)
        for call in joined_calls:
            arguments = json.loads(call["function"]["arguments"])
            call["function"]["arguments"] = cab.as_json(arguments)
        assert joined_calls == tool_calls
        assert stream_events[-2][1]["choices"][0]["finish_reason"] == "tool_calls"
        turns = [
            {"role": "assistant", "content": "Let me see.", "tool_calls": tool_calls},
            *(
                {"role": "tool", "tool_call_id": call_id, "content": content}
                for call_id, content in zip(reversed(ids), ("sweet", "blue"))
            ),
        ]
    body["messages"] += turns
    end = post(admin, api, {**body, "stream": True})
    assert json.loads(streamed(end.data)) == [
        *BLUE, {"content": [{"type": "text", "text": "sweet"}], "isError": False},
    ]
    assert len(fake.children()) == 1


def test_a_client_that_drops_the_text_beside_its_calls_continues_the_live_turn(
    bridge: Start, fake: FakeClaude
) -> None:
    """Many clients of the OpenAI format send `content: null` back; the calls have their ids."""
    admin = bridge(fake).admin
    body = chat_that_calls("openai")
    more = continue_chat(body, post(admin, "openai", body), "blue")
    more["messages"][-2]["content"] = None
    assert "blue" in words(post(admin, "openai", more)) and len(pids(fake)) == 1


def test_results_with_images_and_errors_go_to_the_live_turn(
    bridge: Start, fake: FakeClaude
) -> None:
    admin = bridge(fake).admin
    body = chat_that_calls("anthropic")
    answer = post(admin, "anthropic", body)
    more = continue_chat(body, answer, [text("seen"), PNG])
    more["messages"][-1]["content"][0]["is_error"] = True
    assert json.loads(words(post(admin, "anthropic", more))) == [
        {
            "content": [
                {"type": "text", "text": "seen"},
                {"type": "image", "data": "iVBORw0KGgo=", "mimeType": "image/png"},
            ],
            "isError": True,
        }
    ]
    assert len(fake.children()) == 1


@both
def test_a_different_conversation_is_replayed_to_a_process_of_its_own(
    bridge: Start, fake: FakeClaude, monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    """The second request is another end of the first one's conversation: it takes its process."""
    # None of them takes the place of the pending call.
    monkeypatch.setattr(cab, "MAX_KEPT_PROCESSES", 20)
    admin = bridge(fake).admin
    body = chat_that_calls(api)
    answer = post(admin, api, body)
    beside = [text("say so")] if api == "anthropic" else [{"role": "user", "content": "say so"}]
    changed = [
        continue_chat(body, answer, "x" * 40_001),
        continue_chat(body, answer, "blue", beside=beside),
    ]
    unchanged = continue_chat(body, answer, "blue")
    changed += [
        {**unchanged, "model": "haiku"}, {**unchanged, "tools": tools(api, "look")},
        json.loads(json.dumps(unchanged).replace("toolu_0", "toolu_1")),
        {
            **unchanged,
            **(
                {"output_config": {"effort": "low"}}
                if api == "anthropic"
                else {"reasoning_effort": "low"}
            ),
        },
        {
            **unchanged,
            "messages": [
                {"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"},
                *unchanged["messages"],
            ],
        },
        {**unchanged, "messages": [{"role": "system", "content": "other"}, *unchanged["messages"]]},
        {
            **unchanged,
            "messages": [
                {"role": "user", "content": body["messages"][0]["content"] + " "},
                *unchanged["messages"][1:],
            ],
        },
    ]
    if api == "openai":
        changed = changed[:5]
    for n, request in enumerate(changed):
        assert words(post(admin, api, request)) == ("so" if n == 1 else REPLAYED)
        assert len(pids(fake)) == max(n + 1, 2)
        content = [line for line in fake.lines() if line["type"] == "assistant"][-1]["message"][
            "content"
        ]
        assert content == [
            text("Let me see."),
            tool_use("mcp__api__look", "toolu_1" if n == 4 else "toolu_0", at="sky"),
        ]
    # The process with the pending call still waits.
    assert json.loads(words(post(admin, api, unchanged))) == BLUE
    assert len(pids(fake)) == n + 1


def test_a_result_belongs_to_its_call_by_the_id_whatever_the_client_made_of_the_input(
    bridge: Start, fake: FakeClaude
) -> None:
    """Claude Code sends an input back with the defaults of what it left out."""
    admin = bridge(fake).admin
    body = chat_that_calls("anthropic")
    more = continue_chat(body, post(admin, "anthropic", body), "blue")
    more["messages"][-2]["content"][-1]["input"] = {"at": "sky", "replace_all": False}
    assert json.loads(words(post(admin, "anthropic", more))) == BLUE and len(pids(fake)) == 1


def test_a_call_of_another_id_is_replayed(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    body = chat_that_calls("anthropic")
    more = continue_chat(body, post(admin, "anthropic", body), "blue")
    more["messages"][-2]["content"][-1].update(id="toolu_9", input={"at": "sea"})
    more["messages"][-1]["content"][0]["tool_use_id"] = "toolu_9"
    assert words(post(admin, "anthropic", more)) == REPLAYED and len(pids(fake)) == 2
    content = [line for line in fake.lines() if line["type"] == "assistant"][-1]["message"][
        "content"
    ]
    assert content[-1] == tool_use("mcp__api__look", "toolu_9", at="sea")


def test_a_result_with_a_remote_image_is_replayed(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    body = chat_that_calls("anthropic")
    more = continue_chat(body, post(admin, "anthropic", body), [REMOTE_IMAGE])
    assert words(post(admin, "anthropic", more)) == REPLAYED and len(pids(fake)) == 2
    assert [line for line in fake.lines() if line["type"] == "user"][-1]["message"]["content"] == [
        tool_result([REMOTE_IMAGE])
    ]


def test_a_process_that_dies_at_the_result_is_replaced(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    body = talk('call ["deaf", ["look", {}]]', tools=tools("anthropic"))
    answer = post(admin, "anthropic", body)
    assert words(post(admin, "anthropic", continue_chat(body, answer, "blue"))) == REPLAYED
    assert len(fake.children()) == 2


@pytest.mark.parametrize("warm_seconds", [0, 600])
def test_a_process_that_died_or_expired_while_it_waited_is_replaced(
    bridge: Start, fake: FakeClaude, warm_seconds: float
) -> None:
    clock = Skipped()
    running = bridge(fake, clock=clock, warm_seconds=warm_seconds)
    wait_seconds = max(cab.TOOL_RESULT_WAIT_SECONDS, warm_seconds)
    for end in ("dies", "expires", "is about to expire"):
        body = chat_that_calls("anthropic", ["look", {"at": end}])
        answer = post(running.admin, "anthropic", body)
        (pid,) = pid_of(fake, end)
        if end == "dies":
            os.kill(pid, signal.SIGKILL)
        else:
            clock.ahead += wait_seconds - (20 if end == "is about to expire" else 0)
            # The worker checks at once.
            running.admin.ask("say ring")
            wait_until(lambda: end == "is about to expire" or not is_running(pid))
        end_answer = post(running.admin, "anthropic", continue_chat(body, answer, "blue"))
        assert words(end_answer) == (json.dumps(BLUE) if "about" in end else REPLAYED)
    # The replacement of the second one and the third one have not expired yet.
    assert bool(warm_seconds) == (pid in running.waiting())
    nothing_runs(running, fake, 2 if warm_seconds else 0)


def test_a_result_that_comes_exactly_when_the_process_expires(
    bridge: Start, fake: FakeClaude, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "TOOL_RESULT_WAIT_SECONDS", 1e-9)
    running = bridge(fake, warm_seconds=0)
    for n in range(2):
        body = chat_that_calls("openai", ["look", {"at": str(n)}])
        answer = post(running.admin, "openai", body)
        end = post(running.admin, "openai", continue_chat(body, answer, "blue"))
        assert words(end) in (REPLAYED, json.dumps(BLUE))
    nothing_runs(running, fake, 0)


def test_only_its_own_token_continues_a_call(bridge: Start, fake: FakeClaude) -> None:
    """Another token with the same conversation and ids gets a process of its own, in any order."""
    admin = bridge(fake).admin
    mine, other = admin.new_token("mine"), admin.new_token("other")
    body = chat_that_calls("anthropic")
    answer, same_answer = post(mine, "anthropic", body), post(other, "anthropic", body)
    assert len(pids(fake)) == 2 and calls_in(answer) == calls_in(same_answer)
    third = admin.new_token("third")
    assert words(post(third, "anthropic", continue_chat(body, answer, "stolen"))) == REPLAYED
    assert words(post(admin, "anthropic", continue_chat(body, answer, "stolen"))) == REPLAYED
    ends = []
    for client, color in ((mine, "blue"), (other, "red")):
        end = post(client, "anthropic", continue_chat(body, answer, color))
        ends.append(json.loads(words(end)))
    assert [end[0]["content"][0]["text"] for end in ends] == ["blue", "red"]
    assert len(pids(fake)) == 4
    for pid in pids(fake)[:2]:
        lines = [entry["line"] for entry in fake._log("lines.jsonl") if entry["pid"] == pid]
        assert "stolen" not in json.dumps(lines)


def test_without_tools_two_tokens_never_share_a_process(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    for client in (admin, admin.new_token(), admin, admin.new_token(sessionMode="stateful")):
        answer = post(client, "anthropic", talk("say a", "a", "turns"))
        assert json.loads(words(answer)) == [["user", "say a"], ["assistant", "a"]]
    # The third request is a retry of the first one, with the same token.
    assert len(pids(fake)) == len(fake.children()) == 3


def test_two_continuations_of_one_call_at_once(bridge: Start, fake: FakeClaude) -> None:
    running = bridge(fake)
    body = chat_that_calls("openai")
    more = continue_chat(body, post(running.admin, "openai", body), "blue")
    with ThreadPoolExecutor(3) as pool:
        ends = sorted(
            words(answer)
            for answer in pool.map(lambda _: post(running.admin, "openai", more), range(3))
        )
    # The third one takes the process of the second, whose last turn it repeats.
    assert ends == sorted([json.dumps(BLUE), REPLAYED, REPLAYED]) and len(pids(fake)) == 2
    nothing_runs(running, fake, 2)


def test_the_same_conversation_twice_at_once_is_two_runs(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    body = chat_that_calls("anthropic")
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: post(admin, "anthropic", body), range(2)))
        ends = list(
            pool.map(
                lambda answer: post(admin, "anthropic", continue_chat(body, answer, "blue")),
                answers,
            )
        )
    assert [json.loads(words(end)) for end in ends] == [BLUE, BLUE] and len(pids(fake)) == 2
    assert len({answer.headers["request-id"] for answer in answers + ends}) == 4


def test_calls_without_results_do_not_accumulate(bridge: Start, fake: FakeClaude) -> None:
    clock = Skipped()
    running = bridge(fake, clock=clock)
    for n in range(cab.MAX_KEPT_PROCESSES + 2):
        body = chat_that_calls("anthropic", ["look", {"at": str(n)}])
        assert len(calls_in(post(running.admin, "anthropic", body))) == 1

    def count_processes() -> int:
        return sum(is_running(child["pid"]) for child in fake.children())

    wait_until(lambda: count_processes() == cab.MAX_KEPT_PROCESSES)
    clock.ahead += running.bridge.config.warm_seconds
    nothing_runs(running, fake, 0)


def test_one_call_after_the_other_continues_in_one_process(bridge: Start, fake: FakeClaude) -> None:
    """The second of two rounds of calls starts in a process with a replay, and continues there."""
    admin = bridge(fake).admin
    body = chat_that_calls("anthropic")
    more = continue_chat(
        body, post(admin, "anthropic", body), "blue",
        beside=[text('call [["taste", {}, "toolu_5"]]')],
    )
    answer = post(admin, "anthropic", more)
    assert calls_in(answer) == [("toolu_5", "taste", {})]
    more = continue_chat(more, answer, "sweet")
    results = json.loads(words(post(admin, "anthropic", more)))
    assert results[0]["content"] == [{"type": "text", "text": "sweet"}] and len(pids(fake)) == 2


# Code that adds a step to the fake: a call by a subagent, or one without the id of its block.
SUBAGENT = """
class Odd(fake_claude.Fake):
    def act_odd(self, rest):
        parent, meta = None, {}
        if rest == "subagent":
            parent, meta = "agent_1", {"claudecode/toolUseId": "toolu_sub"}
        calls = ((None, "agent_1", "Agent"), (parent, "toolu_sub", "mcp__api__look"))
        for owner, call_id, name in calls:
            block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
            message = {"id": "msg_1", "role": "assistant", "content": [block]}
            self.say(type="assistant", message=message, parent_tool_use_id=owner)
            self.say(type="stream_event", event={"type": "message_stop"}, parent_tool_use_id=owner)
        result = self.ask("tools/call", name="look", arguments={}, _meta=meta)
        event = {"type": "message_start", "message": {"id": "msg_2"}}
        self.say(type="stream_event", event=event, parent_tool_use_id=None)
        self.answer("result: " + json.dumps(result))

import json
fake_claude.Fake = Odd
"""


@pytest.mark.parametrize("odd", ["subagent", "nameless"])
def test_calls_that_do_not_belong_to_the_answer_itself(
    bridge: Start, fake: FakeClaude, odd: str
) -> None:
    """A call of a subagent, or one without the id of its block.

    Either the client gets a call that it can answer, or the model gets an error. The answer never
    ends for a call that the client does not get, and no result is lost.
    """
    program = fake.script.read_text()
    program = program.replace("import fake_claude\n", "import fake_claude\n" + SUBAGENT)
    fake.script.write_text(program)
    running = bridge(fake)
    body = talk("odd " + odd, tools=tools("anthropic"))
    answer = post(running.admin, "anthropic", body)
    if answer.json["stop_reason"] == "tool_use":
        assert calls_in(answer)
        answer = post(running.admin, "anthropic", continue_chat(body, answer, "blue"))
    assert words(answer).startswith("result: ") or words(answer) == REPLAYED
    assert not [line for line in running.log if "rror" in line]


# --- refusals ---


def kind_of(answer: Answer, api: Optional[str]) -> Tuple[int, Any]:
    """Return (status, kind) of an error, and check its shape. api=None: the native API."""
    body = answer.json
    if api == "anthropic":
        assert set(body) == {"type", "error"} and body["type"] == "error"
        assert set(body["error"]) == {"type", "message"}
        assert re.fullmatch("req_[0-9a-f]{24}", answer.headers["request-id"])
        assert body["error"]["message"]
        return answer.status, body["error"]["type"]
    if api == "openai":
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["message"]
        assert re.fullmatch("req_[0-9a-f]{24}", answer.headers["x-request-id"])
        return answer.status, body["error"]["code"]
    assert list(body)[:2] == ["error", "code"] and "request-id" not in answer.headers
    return answer.status, body["code"]


VERSION = {"anthropic-version": "2023-06-01"}
LARGE = b'{"messages": "' + b"x" * cab.BODY_BYTES + b'"}'


def test_refusals_have_the_body_of_the_format(bridge: Start) -> None:
    admin = bridge(body_mb=1).admin
    anonymous, unknown = admin.with_token(None), admin.with_token("cab-" + "0" * 64)
    limited = admin.new_token("limited", models=["haiku"])
    table: Sequence[Tuple[Api, str, str, Any, Mapping[str, str], Optional[str], Any]] = (
        (
            anonymous, "POST", "/v1/messages", talk("hi"), {}, "anthropic",
            (401, "authentication_error"),
        ),
        (
            unknown, "POST", "/v1/messages", talk("hi"), {}, "anthropic",
            (401, "authentication_error"),
        ),
        (
            anonymous, "POST", "/v1/messages", talk("hi"), {"x-api-key": "cab-x"}, "anthropic",
            (401, "authentication_error"),
        ),
        (
            anonymous, "POST", "/v1/chat/completions", talk("hi"), {}, "openai",
            (401, "invalid_api_key"),
        ),
        (unknown, "GET", "/v1/models", None, {}, "openai", (401, "invalid_api_key")),
        (anonymous, "GET", "/v1/models", None, VERSION, "anthropic", (401, "authentication_error")),
        (anonymous, "GET", "/api/usage", None, VERSION, None, (401, "missing_token")),
        (
            admin, "POST", "/v1/messages/count_tokens", {}, {}, "anthropic",
            (400, "invalid_request_error"),
        ),
        (
            admin, "POST", "/v1/messages/batches", talk("hi"), {}, "anthropic",
            (404, "not_found_error"),
        ),
        (admin, "POST", "/v1/complete", {}, VERSION, "anthropic", (404, "not_found_error")),
        (admin, "POST", "/v1/responses", {}, {}, "openai", (400, "invalid_request")),
        (admin, "POST", "/v1/responses", {}, VERSION, "anthropic", (400, "invalid_request_error")),
        (admin, "POST", "/v1/embeddings", {}, {}, "openai", (404, "not_found")),
        (admin, "GET", "/v1", None, {}, "openai", (404, "not_found")),
        (admin, "GET", "/v1/", None, {}, "openai", (404, "not_found")),
        (admin, "GET", "/V1/nothing", None, {}, "openai", (404, "not_found")),
        (admin, "GET", "/v1/%zz", None, {}, "openai", (400, "invalid_request")),
        (admin, "GET", "/%761/nothing", None, {}, "openai", (404, "not_found")),
        (admin, "GET", "/v12", None, {}, None, (404, "not_found")),
        (admin, "GET", "/nothing", None, VERSION, None, (404, "not_found")),
        (admin, "GET", "/v1/models/nothing", None, {}, "openai", (404, "not_found")),
        (admin, "GET", "/v1/models/nothing", None, VERSION, "anthropic", (404, "not_found_error")),
        (admin, "GET", "/v1/messages", None, {}, "anthropic", (405, "invalid_request_error")),
        (admin, "DELETE", "/v1/chat/completions", None, {}, "openai", (405, "method_not_allowed")),
        (admin, "POST", "/v1/models", {}, {}, "openai", (405, "method_not_allowed")),
        (
            limited, "POST", "/v1/messages", talk("hi", model="opus"), {}, "anthropic",
            (403, "permission_error"),
        ),
        (
            limited, "POST", "/v1/chat/completions", talk("hi", model="opus"), {}, "openai",
            (403, "model_not_allowed"),
        ),
        *(
            (admin, "POST", path, body, headers, api, expected[api == "openai"])
            for api, path in PATHS.items()
            for body, headers, expected in (
                (LARGE, {}, ((413, "request_too_large"), (413, "body_too_large"))),
                (
                    b"x", {"Content-Encoding": "gzip"},
                    ((415, "invalid_request_error"), (415, "unsupported_encoding")),
                ),
                (b"{", {}, ((400, "invalid_request_error"), (400, "invalid_json"))),
                (b'{"a":NaN}', {}, ((400, "invalid_request_error"), (400, "invalid_json"))),
                (
                    b"[" * 200 + b"]" * 200, {},
                    ((400, "invalid_request_error"), (400, "invalid_json")),
                ),
                (b"\xff", {}, ((400, "invalid_request_error"), (400, "invalid_json"))),
                (None, {}, ((400, "invalid_request_error"), (400, "invalid_request"))),
                (b"[]", {}, ((400, "invalid_request_error"), (400, "invalid_request"))),
                (talk(5), {}, ((400, "invalid_request_error"), (400, "invalid_request"))),
                (
                    talk("hi"),
                    {"Host": "evil.example"},
                    ((421, "invalid_request_error"), (421, "unknown_host")),
                ),
            )
        ),
        (admin, "POST", "/api/ask", LARGE, {}, None, (413, "body_too_large")),
        (admin, "POST", "/api/ask", {}, {}, None, (400, "invalid_request")),
    )
    for client, method, path, body, headers, api, expected in table:
        answer = client.call(method, path, body, headers)
        assert kind_of(answer, api) == expected, (method, path, answer.data)
        assert ("www-authenticate" in answer.headers) == (answer.status == 401)
        assert ("allow" in answer.headers) == (answer.status == 405)
    assert rows(admin) == []


def test_limits_hold_for_both(bridge: Start, gate: Path) -> None:
    admin = bridge(clock=Skipped()).admin
    kinds = {
        "anthropic": ["rate_limit_error"] * 3,
        "openai": ["rate_limit_exceeded", "daily_limit", "queue_full"],
    }
    for api in PATHS:
        minute = admin.new_token("minute", requestsPerMinute=1)
        day = admin.new_token("day", requestsPerDay=1)
        for client in (minute, day):
            assert words(post(client, api, talk("say a"))) == "a"
        refused = [post(client, api, talk("say a")) for client in (minute, day)]
        assert [kind_of(answer, api) for answer in refused] == [(429, k) for k in kinds[api][:2]]
        # A library waits as long as the answer says, but not until midnight.
        for answer in refused:
            seconds = int(answer.headers["retry-after"])
            assert seconds > 0 and ("x-should-retry" in answer.headers) == (seconds > 60)
        assert kind_of(minute.post("/api/ask", {"message": "a"}), None) == (429, "rate_limited")
    job_ids = [admin.ask("hold %s" % gate) for _ in range(cab.QUEUE_JOBS)]
    for api in PATHS:
        answer = post(admin, api, talk("say a"))
        assert kind_of(answer, api) == (429, kinds[api][2]) and answer.headers["retry-after"]
    for job_id in job_ids[1:]:
        admin.delete("/api/ask/" + job_id)
    gate.touch()
    assert admin.done(job_ids[0])["response"] == "held"


def test_too_many_requests_of_all(bridge: Start) -> None:
    admin = bridge(rate_limit=2).admin
    for _ in range(2):
        post(admin, "openai", {})
    for api, kind in (
        ("anthropic", "rate_limit_error"),
        ("openai", "rate_limit_exceeded"),
        (None, "rate_limited"),
    ):
        answer = admin.post(PATHS[api] if api else "/api/ask", {})
        assert kind_of(answer, api) == (429, kind) and answer.headers["retry-after"]


def test_lists_of_models(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    body = admin.get("/v1/models").json
    assert [model["id"] for model in body["data"]] == [
        "default", "haiku", "claude-sonnet-5", "claude-haiku-4-5",
    ]
    assert (body["object"], body["has_more"], body["first_id"], body["last_id"]) == (
        "list", False, "default", "claude-haiku-4-5",
    )
    assert (
        body["data"][1]
        == {
            "id": "haiku", "object": "model", "created": 0, "owned_by": "anthropic",
            "type": "model", "display_name": "Haiku", "created_at": "1970-01-01T00:00:00Z",
            "lifecycle": "active",
        }
        == admin.get("/v1/models/haiku").json
    )
    limited = admin.new_token("limited", models=["claude-haiku-4-5", "my/own-model"])
    assert [
        (model["id"], model["display_name"]) for model in limited.get("/v1/models").json["data"]
    ] == [("claude-haiku-4-5", "Haiku"), ("my/own-model", "my/own-model")]
    assert kind_of(limited.get("/v1/models/haiku"), "openai")[0] == 404
    assert limited.get("/v1/models/my%2Fown-model").status == 200
    # The bridge asks the CLI only once.
    assert admin.call("HEAD", "/v1/models").data == b"" and len(fake.children()) == 1


def test_allowed_models(bridge: Start, fake: FakeClaude) -> None:
    limited = bridge(fake).admin.new_token("limited", models=["haiku", "opus"])
    models = []
    for api in PATHS:
        for more in ({}, {"model": "opus"}):
            models.append(post(limited, api, talk("say a", **more)).json["model"])
    assert models == ["resolved-haiku", "resolved-opus"] * 2
    answer = post(limited, "openai", talk("say a", model="gpt-4o"))
    assert answer.json["model"] == "resolved-haiku"


FAILED: Sequence[Tuple[Any, int, str, str]] = (
    (
        {"api_error_status": 404, "result": "There's an issue with the selected model (x)."}, 404,
        "not_found_error", "model_not_found",
    ),
    (
        {"terminal_reason": "prompt_too_long", "result": "Prompt is too long"}, 400,
        "invalid_request_error", "context_length_exceeded",
    ),
    (
        {"api_error_status": 400, "result": "API Error: 400 bad"}, 400, "invalid_request_error",
        "invalid_request",
    ),
    (
        {"api_error_status": 413, "result": "Request too large (max 32MB)."}, 413,
        "request_too_large", "request_too_large",
    ),
    ({"result": "It broke: sk-ant-api03-aaaaaaaaaaaaaaaa"}, 500, "api_error", "cli_error"),
)


@both
def test_a_failed_run_has_a_status_and_the_header_against_retries(bridge: Start, api: str) -> None:
    admin = bridge().admin
    for n, (fail, status, kind, code) in enumerate(FAILED):
        answer = post(admin, api, talk("error " + json.dumps(fail), stream=bool(n % 2)))
        assert kind_of(answer, api) == (status, kind if api == "anthropic" else code)
        assert answer.headers["x-should-retry"] == "false" and b"aaaaaaaa" not in answer.data


def test_the_billing_guard_holds_for_both(bridge: Start, fake: FakeClaude, quick: None) -> None:
    running = bridge(fake)
    for api, kind in (("anthropic", "permission_error"), ("openai", "billing_guard")):
        assert kind_of(post(running.admin, api, talk("apikey")), api) == (403, kind)
    nothing_runs(running, fake)


def test_a_failure_after_the_first_delta_is_an_event(
    bridge: Start, fake: FakeClaude, tmp_path: Path
) -> None:
    running = bridge(fake)
    for api in PATHS:
        gate = tmp_path / api
        fail = {"fail": {"result": "It broke"}}
        prompt = script({"delta": "half"}, {"wait": str(gate)}, fail)
        request = OpenRequest(running.admin, api, talk(prompt, stream=True))
        request.until("half")
        gate.touch()
        kind, data = events(request.rest())[-1]
        assert request.response.status == 200 and b"message_stop" not in request.data
        assert b"DONE" not in request.data
        if api == "anthropic":
            error = {"type": "api_error", "message": "It broke"}
            assert (kind, data) == ("error", {"type": "error", "error": error})
        else:
            assert kind == ""
            assert data == {
                "error": {
                    "message": "It broke",
                    "type": "server_error",
                    "param": None,
                    "code": "cli_error",
                }
            }
        nothing_runs(running, fake)


# --- clients that disconnect ---


@both
def test_a_client_that_disconnects_cancels_its_run(
    bridge: Start, fake: FakeClaude, gate: Path, quick: None, api: str
) -> None:
    """The run is silent, or streams, or waits in the queue."""
    running = bridge(fake)
    for prompt, stream in (("hang", False), ("hang", True), (script({"pause": 30}), True)):
        request = OpenRequest(running.admin, api, talk(prompt, stream=stream))
        wait_until(lambda: fake.prompts()[-1:] == [prompt])
        if prompt == "hang" and stream:
            request.until("thinking")
        request.disconnect()
        wait_until(lambda: rows(running.admin)[-1].get("errorCode") == "cancelled")
    first = running.admin.ask(script({"wait": str(gate)}))
    wait_until(lambda: running.admin.poll(first)["status"] == "processing")
    request = OpenRequest(running.admin, api, talk("say never"))
    wait_until(lambda: len(rows(running.admin)) == 5)
    request.disconnect()
    wait_until(lambda: rows(running.admin)[-1].get("errorCode") == "cancelled")
    gate.touch()
    nothing_runs(running, fake)
    assert "say never" not in fake.prompts()


def test_a_client_that_disconnects_before_the_first_byte_cancels_its_run(
    bridge: Start, fake: FakeClaude, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body of the stream is never sent, but the run ends."""
    running, send = bridge(fake), cab.ConnectionHandler._send

    def send_or_break(handler: cab.ConnectionHandler, data: bytes) -> None:
        if b"event-stream" in data:
            raise BrokenPipeError
        send(handler, data)

    monkeypatch.setattr(cab.ConnectionHandler, "_send", send_or_break)
    for api in PATHS:
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            OpenRequest(running.admin, api, talk("hang", stream=True)).until("never")
        wait_until(lambda: rows(running.admin)[-1].get("errorCode") == "cancelled")
    monkeypatch.undo()
    nothing_runs(running, fake)


def test_a_request_that_is_cancelled_when_it_is_claimed_does_not_run(
    bridge: Start, fake: FakeClaude, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversation of a cancelled request is deleted; only its last text would remain."""
    running, claim = bridge(fake), cab.JobStore.claim

    def claim_cancelled(
        jobs: cab.JobStore, excluded_models: Sequence[str] = ()
    ) -> Optional[cab.Job]:
        job = claim(jobs, excluded_models)
        if job and job.api:
            jobs.fail(job, "cancelled", "The request was cancelled.")
        return job

    monkeypatch.setattr(cab.JobStore, "claim", claim_cancelled)
    assert post(running.admin, "anthropic", talk("say a", "a", "say never")).status >= 400
    nothing_runs(running, fake)
    assert fake.prompts() == ["say on"]


def test_a_client_that_disconnects_between_a_call_and_its_result(
    bridge: Start, fake: FakeClaude, quick: None
) -> None:
    """Its process waits, and any later request with the same token continues it."""
    running, gate = bridge(fake), fake.folder / "gate"
    body = chat_that_calls("anthropic")
    request = OpenRequest(running.admin, "anthropic", {**body, "stream": True})
    request.until("tool_use")
    request.disconnect()
    wait_until(lambda: rows(running.admin)[0]["status"] == "completed")
    turns = [
        {"role": "assistant", "content": [text("Let me see."), tool_use(at="sky")]},
        {"role": "user", "content": [tool_result("blue")]},
    ]
    other = running.admin.ask("hold %s" % gate)
    # This request waits in the queue, and disconnects before its turn.
    request = OpenRequest(
        running.admin, "anthropic", {**body, "messages": body["messages"] + turns}
    )
    wait_until(lambda: len(rows(running.admin)) == 3)
    request.disconnect()
    wait_until(lambda: rows(running.admin)[-1].get("errorCode") == "cancelled")
    gate.touch()
    assert running.admin.done(other)["response"] == "held"
    assert (
        json.loads(
            words(post(running.admin, "anthropic", {**body, "messages": body["messages"] + turns}))
        )
        == BLUE
    )
    nothing_runs(running, fake)


def test_a_run_that_is_cancelled_through_the_api_or_whose_token_is_revoked(
    bridge: Start, fake: FakeClaude, quick: None
) -> None:
    running = bridge(fake)
    for api in PATHS:
        request = OpenRequest(running.admin, api, talk("hang", stream=True))
        request.until("thinking")
        running.admin.delete("/api/ask/" + rows(running.admin)[-1]["requestId"])
        assert b"cancelled" in request.rest()
        request = OpenRequest(running.admin.new_token("leaves"), api, talk("hang", stream=True))
        request.until("thinking")
        token = next(
            row
            for row in running.admin.get("/api/tokens").json["tokens"]
            if row["name"] == "leaves"
        )
        assert running.admin.delete("/api/tokens/" + token["id"]).status == 200
        assert (
            "authentication_error" if api == "anthropic" else "invalid_api_key"
        ) in request.rest().decode()
    nothing_runs(running, fake)


def test_a_late_answer_begins_with_blanks(
    bridge: Start, fake: FakeClaude, monkeypatch: pytest.MonkeyPatch, quick: None, tmp_path: Path
) -> None:
    monkeypatch.setattr(cab, "WAIT_SECONDS", 0.04)
    monkeypatch.setattr(cab, "HEARTBEAT_SECONDS", 0.02)
    running = bridge(fake)
    for api in PATHS:
        error_kind = "api_error" if api == "anthropic" else "cli_error"
        steps: Sequence[Tuple[Dict[str, Any], str]] = (
            ({"result": "late"}, ""),
            ({"fail": {"result": "It broke"}}, error_kind),
        )
        for n, (step, kind) in enumerate(steps):
            gate = tmp_path / ("%s-%d" % (api, n))
            request = OpenRequest(running.admin, api, talk(script({"wait": str(gate)}, step)))
            assert request.response.status == 200
            assert REQUEST_ID.fullmatch(str(request.response.getheader("request-id")))
            assert request.response.getheader("content-type") == "application/json; charset=utf-8"
            request.data = request.response.read(2)
            assert request.data == b"  "
            gate.touch()
            name = "req_" + "0" * 24
            answer = Answer(200, {"request-id": name, "x-request-id": name}, request.rest())
            if kind:
                assert kind_of(answer, api) == (200, kind)
            else:
                assert words(answer) == "late"
        gate = tmp_path / "never"
        request = OpenRequest(running.admin, api, talk(script({"wait": str(gate)})))
        assert request.response.read(1) == b" "
        request.disconnect()
        wait_until(lambda: rows(running.admin)[-1].get("errorCode") == "cancelled")
    monkeypatch.setattr(cab, "WAIT_SECONDS", 90.0)
    nothing_runs(running, fake)


def test_a_silent_stream_sends_heartbeats(
    bridge: Start, monkeypatch: pytest.MonkeyPatch, quick: None, tmp_path: Path
) -> None:
    monkeypatch.setattr(cab, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(cab, "CHAT_HOLD_SECONDS", {"network": 0.1})
    admin = bridge().admin
    for api in PATHS:
        gate = tmp_path / api
        request = OpenRequest(
            admin, api, talk(script({"wait": str(gate)}, {"delta": "late"}), stream=True)
        )
        for _ in range(2):
            request.data = b""
            request.until('"ping"' if api == "anthropic" else ": still here")
        gate.touch()
        assert b"late" in request.rest()


def test_an_open_request_gets_heartbeats_also_while_the_queue_moves(
    bridge: Start, fake: FakeClaude, gate: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A /v1 client gets no queue positions, so a moving queue is silence."""
    running = bridge(fake)
    prompts = ["hold %s" % gate, *[script({"pause": 0.05}, {"result": "on"})] * 8]
    job_ids = [running.admin.ask(prompt) for prompt in prompts]
    monkeypatch.setattr(cab, "WAIT_SECONDS", 0.25)
    monkeypatch.setattr(cab, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(cab, "CHAT_HOLD_SECONDS", {"network": 0.0})
    requests = [
        OpenRequest(running.admin, api, talk("say last", stream=stream))
        for api, stream in (("anthropic", False), ("openai", True))
    ]
    wait_until(lambda: len(rows(running.admin)) == 11)
    gate.touch()
    assert requests[0].response.status == 200
    assert running.admin.poll(job_ids[-1])["status"] != "completed"
    assert requests[0].rest().startswith(b" ") and b": still here" in requests[1].rest()


# --- the plan ---


def retry_after_of_refusal(client: Api, api: str) -> int:
    """Send a request, which the pause of the plan refuses. -> its Retry-After in seconds."""
    answer = post(client, api, talk("say new"))
    kind = "rate_limit_error" if api == "anthropic" else "rate_limit_exceeded"
    assert kind_of(answer, api) == (429, kind)
    assert answer.headers["x-should-retry"] == "false"
    return int(answer.headers["retry-after"])


def test_a_request_waits_for_the_end_of_a_short_pause(
    bridge: Start, fake: FakeClaude, tmp_path: Path
) -> None:
    clock = Skipped()
    running = bridge(fake, clock=clock)
    prompt = script(refused_once(int(clock.now()) + 60, tmp_path / "mark"), {"delta": "an answer"})
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, running.admin, "openai", talk(prompt))
        job = wait_until(lambda: [row for row in rows(running.admin) if row.get("waitingFor")])[0]
        second = pool.submit(post, running.admin, "openai", talk("say second"))
        wait_until(lambda: len(rows(running.admin)) == 2)
        clock.ahead += 66
        # The worker checks at once.
        running.admin.ask("say ring")
        assert words(first.result()) == "an answer" and words(second.result()) == "second"
    assert running.admin.poll(job["requestId"])["attempts"] == 1


@both
def test_a_long_pause_of_the_plan_fails_requests_at_once(
    bridge: Start, fake: FakeClaude, tmp_path: Path, api: str
) -> None:
    """The running request fails, and so do queued and new ones; requests of /api/ask still wait."""
    clock = Skipped()
    running, gate = bridge(fake, clock=clock), tmp_path / "go"
    prompt = script(
        {"wait": str(gate)}, refused_once(int(clock.now()) + 3600, tmp_path / "mark"),
        {"delta": "never"},
    )
    kind = (429, "rate_limit_error" if api == "anthropic" else "rate_limit_exceeded")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, running.admin, api, talk(prompt))
        wait_until(lambda: rows(running.admin) and rows(running.admin)[0]["status"] == "processing")
        behind = pool.submit(post, running.admin, api, talk("say behind"))
        streaming = pool.submit(post, running.admin, api, talk("say behind", stream=True))
        wait_until(lambda: len(rows(running.admin)) == 3)
        waits = running.admin.ask("say waits")
        gate.touch()
        for answer in (future.result() for future in (first, behind, streaming)):
            assert kind_of(answer, api) == kind
            assert 3500 < int(answer.headers["retry-after"]) <= 3600
            assert answer.headers["x-should-retry"] == "false"
    states = [(row["status"], row.get("errorCode")) for row in rows(running.admin)]
    assert states == [("error", "usage_limit")] * 3 + [("queued", None)]
    assert 3500 < retry_after_of_refusal(running.admin, api) <= 3600
    assert running.admin.poll(waits)["waitingFor"] == "usage_limit"
    # A client can wait for the time that is left.
    clock.ahead += 3601 - cab.MAX_INLINE_WAIT_SECONDS
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(post, running.admin, api, talk("say held"))
        wait_until(lambda: len(rows(running.admin)) == 5)
        clock.ahead += cab.MAX_INLINE_WAIT_SECONDS
        running.admin.ask("say ring")
        assert words(held.result()) == "held" and running.admin.done(waits)["response"] == "waits"
    assert "say behind" not in fake.prompts() and "say new" not in fake.prompts()


def test_a_pause_after_the_first_delta_is_an_event(
    bridge: Start, fake: FakeClaude, tmp_path: Path
) -> None:
    clock = Skipped()
    gate = tmp_path / "go"
    prompt = script(
        {"delta": "half"}, {"wait": str(gate)},
        refused_once(int(clock.now()) + 3600, tmp_path / "mark"),
    )
    request = OpenRequest(bridge(fake, clock=clock).admin, "anthropic", talk(prompt, stream=True))
    request.until("half")
    gate.touch()
    kind, data = events(request.rest())[-1]
    assert kind == "error" and data["error"]["type"] == "rate_limit_error"
    assert b"message_stop" not in request.data


def test_a_pause_of_one_model_does_not_affect_the_others(
    bridge: Start, fake: FakeClaude
) -> None:
    clock = Skipped()
    running = bridge(fake, clock=clock)
    limits = {
        "status": "rejected",
        "rateLimitType": "seven_day_opus",
        "resetsAt": int(clock.now()) + 3600,
        "utilization": 1,
    }
    prompt = script(
        {"limits": limits},
        {
            "fail": {
                "said": "rate_limit",
                "api_error_status": 429,
                "result": "You've hit your limit",
            }
        },
    )
    assert kind_of(post(running.admin, "anthropic", talk(prompt, model="opus")), "anthropic") == (
        429, "rate_limit_error",
    )
    assert kind_of(post(running.admin, "openai", talk("say a", model="opus")), "openai") == (
        429, "rate_limit_exceeded",
    )
    assert words(post(running.admin, "openai", talk("say a", model="haiku"))) == "a"
    assert words(post(running.admin, "anthropic", talk("say a"))) == "a"


def test_of_two_pauses_the_longer_one_counts(bridge: Start, fake: FakeClaude) -> None:
    """The pause of all models ends soon, but that of the requested model does not."""
    clock = Skipped()
    running = bridge(fake, clock=clock)
    for kind, seconds, model in (("seven_day_opus", 3600, "opus"), ("five_hour", 30, "haiku")):
        limits = {
            "status": "rejected",
            "rateLimitType": kind,
            "resetsAt": int(clock.now()) + seconds,
            "utilization": 1,
        }
        fail = {"said": "rate_limit", "api_error_status": 429, "result": "You've hit your limit"}
        running.admin.ask(script({"limits": limits}, {"fail": fail}), model=model)
        count = 1 if model == "opus" else 2
        wait_until(lambda: sum(bool(row.get("waitingFor")) for row in rows(running.admin)) == count)
    request = OpenRequest(running.admin, "anthropic", talk("say a", model="opus"))
    wait_until(
        lambda: select.select([request.socket], [], [], 0)[0] or len(rows(running.admin)) == 3
    )
    assert len(rows(running.admin)) == 2 and request.response.status == 429
    assert int(str(request.response.getheader("retry-after"))) > 3500


def test_a_request_waits_for_an_overloaded_service(
    bridge: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cab, "BACK_OFF_SECONDS", (0.01,))
    prompt = script(
        {"first": str(tmp_path / "mark"), "do": [{"delta": "half "}, OVERLOADED]},
        {"delta": "whole"},
    )
    assert words(post(bridge().admin, "anthropic", talk(prompt))) == "whole"


def test_after_a_crash_a_request_is_interrupted_and_not_run_again(
    program: Callable[..., Program], fake: FakeClaude
) -> None:
    """Their clients are gone. Requests of /api/ask run again."""
    first = program()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(post, first.api, api, talk("hang " + api)) for api in PATHS]
        wait_until(
            lambda: len(rows(first.api)) == 2 and any("hang" in prompt for prompt in fake.prompts())
        )
        waits = first.api.ask("say waits")
        first.end(signal.SIGKILL)
        for future in futures:
            assert future.exception()
    second = Api(program().port, first.token)
    states = [(row["status"], row.get("errorCode")) for row in rows(second)[:2]]
    assert states == [("error", "interrupted")] * 2
    assert second.done(waits)["response"] == "waits"
    assert len([prompt for prompt in fake.prompts() if "hang" in prompt]) == 1
    assert words(post(second, "anthropic", talk("say again"))) == "again"


# --- hostile and invalid requests ---


def test_odd_bodies_over_the_wire_are_answered_in_the_right_format(
    bridge: Start, fake: FakeClaude
) -> None:
    running, chance, statuses = bridge(fake), random.Random(11), set()
    accepted = 0
    for n in range(160):
        api = ("anthropic", "openai")[n % 2]
        body = mutated(SEEDS[api][n // 2 % 2], chance)
        with contextlib.suppress(Exception):
            read(api, body)
            accepted += 1
            if accepted % 8:
                # Accepted bodies run, which is slow.
                continue
        answer = post(running.admin, api, body)
        assert answer.status == 200 or kind_of(answer, api)[0] == 400, (body, answer.data)
        statuses.add(answer.status)
    assert statuses == {200, 400} and not [line for line in running.log if "rror" in line]
    nothing_runs(running, fake)


@both
def test_odd_but_valid_values_reach_claude_as_json(
    bridge: Start, fake: FakeClaude, api: str
) -> None:
    running = bridge(fake)
    odd = "\ud800\x00\u2028\x85/\U0001f600"
    body = talk(
        odd,
        odd,
        "say " + odd,
        tools=tools(api, schema={"properties": {odd: {"enum": [odd, 10**40, None]}}}),
        stream=True,
    )
    assert streamed(post(running.admin, api, body).data) == odd.replace("\ud800", "\ufffd")
    deep: Any = 1
    for _ in range(90):
        deep = [deep]
    if api == "anthropic":
        turns = [
            {"role": "assistant", "content": [tool_use(**{odd: deep})]},
            {"role": "user", "content": [tool_result(odd), text("say so")]},
        ]
    else:
        turns = [
            {"role": "assistant", "tool_calls": [call_of(arguments=json.dumps({odd: deep[0]}))]},
            {"role": "tool", "tool_call_id": "call_0", "content": odd},
            {"role": "user", "content": "say so"},
        ]
    assert (
        words(post(running.admin, api, {"messages": [{"role": "user", "content": "a"}, *turns]}))
        == "so"
    )
    nothing_runs(running, fake)


def test_concurrent_requests_in_both_formats_get_their_own_answers(
    bridge: Start, fake: FakeClaude
) -> None:
    running = bridge(fake)
    clients = [running.admin, running.admin.new_token()]

    def ask_number(n: int) -> bool:
        api = ("anthropic", "openai")[n // 2 % 2]
        answer = post(clients[n % 2], api, talk("say a", "a", "say %d" % n, stream=n > 3))
        return (streamed(answer.data) if n > 3 else words(answer)) == str(n)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask_number, range(8)))
    nothing_runs(running, fake)


def test_too_many_open_requests_of_one_token(
    bridge: Start, fake: FakeClaude, gate: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "MAX_STREAMS_PER_TOKEN", 1)
    running = bridge(fake)
    request = OpenRequest(
        running.admin,
        "openai",
        talk(script({"delta": "he"}, {"wait": str(gate)}, {"delta": "ld"}), stream=True),
    )
    request.until('"he"')
    for api, kind in (("anthropic", "rate_limit_error"), ("openai", "rate_limit_exceeded")):
        for stream in (False, True):
            assert kind_of(post(running.admin, api, talk("say a", stream=stream)), api) == (
                429, kind,
            )
    assert len(rows(running.admin)) == 1
    gate.touch()
    assert streamed(request.rest()) == "held"
    nothing_runs(running, fake)


def test_a_bridge_that_stops_ends_its_open_requests(
    bridge: Start, fake: FakeClaude, quick: None
) -> None:
    running = bridge(fake)
    request = OpenRequest(running.admin, "anthropic", talk("hang", stream=True))
    request.until("thinking")
    running.bridge.__exit__(None, None, None)
    kind, data = events(request.rest())[-1]
    assert kind == "error" and data["error"]["type"] == "api_error"
    assert not any(is_running(child["pid"]) for child in fake.children())


# --- thinking, limits and beginnings of an answer ---

THOUGHT = {"type": "thinking", "thinking": "Let me think.", "signature": "c2ln"}
SECRET = {"type": "redacted_thinking", "data": "eA=="}
THINKING: Mapping[str, Mapping[str, Any]] = {
    "anthropic": {"thinking": {"type": "adaptive"}}, "openai": {"reasoning_effort": "low"},
}


@both
def test_what_the_model_thinks_is_told_to_those_who_ask(
    bridge: Start, fake: FakeClaude, api: str
) -> None:
    admin = bridge(fake).admin
    for asked in (True, False):
        body = talk("think so", **(THINKING[api] if asked else {}))
        whole = post(admin, api, body)
        stream_events = events(post(admin, api, {**body, "stream": True}).data)
        if api == "openai":
            message = whole.json["choices"][0]["message"]
            assert message.get("reasoning_content") == ("Let me think." if asked else None)
            deltas = [data["choices"][0]["delta"] for _, data in stream_events[:-1]]
            assert [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta
                    ] in ([["Let me ", "think."], ["Let me think."]] if asked else [[]])
            continue
        assert whole.json["content"] == [*([THOUGHT, SECRET] if asked else []), text("so")]
        blocks: List[Dict[str, Any]] = []
        for _, data in stream_events:
            if "content_block" in data:
                assert data["index"] == len(blocks)
                blocks.append(data["content_block"])
            delta = data.get("delta", {})
            for name in ("text", "thinking", "signature"):
                if name in delta:
                    blocks[-1][name] += delta[name]
        assert blocks == whole.json["content"]
    requests = control_requests(fake, "set_max_thinking_tokens")
    assert requests and all(row["thinking_display"] == "summarized" for row in requests)


def test_thoughts_that_a_client_sends_back_reach_the_same_model(
    bridge: Start, fake: FakeClaude
) -> None:
    admin = bridge(fake).admin
    assert post(admin, "anthropic", talk("hi")).status == 200
    unsigned = {"type": "thinking", "thinking": "Elsewhere.", "signature": ""}
    body = talk("a", [unsigned, THOUGHT, SECRET, text("b")], "c", system="x")
    assert words(post(admin, "anthropic", body)) == "Echo: c"
    told = [line["message"] for line in fake.lines() if line["type"] == "assistant"][-1]
    assert told["content"] == [THOUGHT, SECRET, text("b")]
    assert told["model"] == "resolved-default-model"


def test_the_variables_of_an_answer(bridge: Start, fake: FakeClaude) -> None:
    """Each request sets its own, also in a process that goes on."""
    admin = bridge(fake).admin
    limit, silent = "CLAUDE_CODE_MAX_OUTPUT_TOKENS", "CLAUDE_CODE_DISABLE_THINKING"
    table: Tuple[Tuple[Dict[str, Any], Dict[str, str]], ...] = (
        ({"max_tokens": 9}, {limit: "9", silent: "1"}),
        ({"max_tokens": 9}, {limit: "9", silent: "1"}),
        ({"max_tokens": 5000}, {limit: "5000", silent: ""}),
        ({"max_tokens": 5000, "thinking": {"type": "disabled"}}, {limit: "5000", silent: "1"}),
        ({"max_tokens": 0}, {limit: "", silent: ""}),
        ({"max_tokens": 9, "thinking": {"type": "enabled"}}, {limit: "9", silent: ""}),
    )
    messages: List[Any] = []
    for fields, expected in table:
        body = talk("settings", **fields)
        body["messages"] = messages + body["messages"]
        answer = words(post(admin, "anthropic", body))
        environ, display = json.loads(answer)
        assert environ == expected
        messages = [*body["messages"], {"role": "assistant", "content": answer}]
    assert display == "summarized" and len(fake.children()) == 1
    # An effort asks the model to think.
    answer = words(post(admin, "openai", talk("settings", reasoning_effort="minimal")))
    assert json.loads(answer)[0] == {limit: "64"}
    assert json.loads(words(post(admin, "openai", {"messages": talk("settings")["messages"]}))) in (
        [{limit: "", silent: ""}, "summarized"], [{limit: ""}, None], [{}, None],
    )
    # A structured answer would be of no use when it is cut.
    schema = {"format": {"type": "json_schema", "schema": SCHEMA}}
    answer = words(post(admin, "anthropic", talk("settings", output_config=schema)))
    assert json.loads(json.loads(answer)["answer"])[0] == {}


@pytest.mark.parametrize("api, field", [
    ("anthropic", "max_tokens"), ("openai", "max_tokens"), ("openai", "max_completion_tokens")])
def test_an_answer_ends_at_its_limit(
    bridge: Start, fake: FakeClaude, api: str, field: str
) -> None:
    admin = bridge(fake).admin
    body = {**talk("say one two three four"), "max_tokens": None, field: 2}
    answer = post(admin, api, body)
    stream_events = events(post(admin, api, {**body, "stream": True}).data)
    assert words(answer) == "one two"
    if api == "anthropic":
        assert answer.json["stop_reason"] == "max_tokens"
        assert answer.json["usage"]["output_tokens"] == 3
        assert stream_events[-2][1]["delta"]["stop_reason"] == "max_tokens"
    else:
        assert answer.json["choices"][0]["finish_reason"] == "length"
        assert stream_events[-2][1]["choices"][0]["finish_reason"] == "length"
    # Otherwise the CLI would ask the model to go on.
    cut = {row["pid"] for row in fake._log("lines.jsonl") if "one two" in str(row["line"])}
    assert len(cut) == 2 and not any(map(is_running, cut))
    assert words(post(admin, api, {**body, field: 4})) == "one two three four"


@both
def test_an_answer_goes_on_where_the_client_began_it(
    bridge: Start, fake: FakeClaude, api: str
) -> None:
    admin = bridge(fake).admin
    for _ in range(2):
        answer = words(post(admin, api, talk("A poem.", "Roses are", max_tokens=5000)))
        assert answer == "Echo: Continue."
    requests = control_requests(fake, "apply_flag_settings")
    bodies = [row["settings"]["env"].get("CLAUDE_CODE_EXTRA_BODY", "") for row in requests]
    expected = [turn("user", "A poem."), turn("assistant", "Roses are")]
    assert [json.loads(body) for body in bodies] == [{"messages": expected}] * 2
    assert all(row["settings"]["env"]["CLAUDE_CODE_DISABLE_THINKING"] == "1" for row in requests)
    # Its own history is another one.
    assert len({child["pid"] for child in fake.children()}) == 2
    with pytest.raises(cab.InvalidRequest, match="the results of the tool calls"):
        read("anthropic", talk("a", [tool_use()]))
    # An empty one, or a thought alone, begins nothing.
    for blank in (" ", [THOUGHT]):
        assert words(post(admin, "anthropic", talk("a", "b", "c", blank))) == "Echo: c"


@pytest.mark.parametrize("api", [*PATHS, "/v1/responses"])
def test_a_call_arrives_while_it_is_written(bridge: Start, gate: Path, api: str) -> None:
    """If the answer then starts over, the client must not act on the call."""
    admin = bridge().admin
    prompt = "begin-call %s" % gate
    if api == "/v1/responses":
        tool = {"type": "function", "name": "look", "parameters": {"type": "object"}}
        body: Dict[str, Any] = {"input": prompt, "tools": [tool], "stream": True}
    else:
        body = talk(prompt, tools=tools(api, "look"), stream=True)
    request = OpenRequest(admin, api, body)
    seen = request.until('\\"at\\": \\"s').decode()
    assert "toolu_x" in seen and "Let me see." in seen
    gate.touch()
    data = request.rest().decode()
    assert "in the middle of a tool call" in data
    assert not any(word in data for word in ("message_stop", "[DONE]", "response.completed"))
    (job,) = rows(admin)
    wait_until(lambda: rows(admin)[0]["status"] in ("completed", "error"))


# --- the parts of a stream ---


def part_steps(chat: cab.Chat, *inputs: Any, end: Any = None) -> Tuple[str, List[Any]]:
    """Feed events of a run. -> (what is sent, the closed parts).

    inputs: a text, "started", (block, pieces of it), or the same without its end in a list.
    """
    parts = cab.AnswerParts(chat)
    sent, closed = "", []

    def take(steps: Any) -> None:
        nonlocal sent
        for step in steps:
            sent += {"open": "<", "delta": step.text, "close": ">"}[step.kind]
            if step.kind == "close":
                sent = sent[:-1] + ("!" if step.part.is_aborted else ">")
                closed.append(step.part)

    for item in inputs:
        if item == "started":
            take(parts.restart())
        elif isinstance(item, str):
            take(parts.add(cab.JobEvent("delta", text=item)))
        else:
            block, *pieces = item
            take(parts.add(cab.JobEvent("part_start", block=block)))
            for piece in pieces:
                take(parts.add(cab.JobEvent("part_delta", text=piece)))
            if isinstance(item, tuple):
                take(parts.add(cab.JobEvent("part_end", block=block)))
    if end is not None:
        take(parts.finish(cab.replace(JOB, **end)))
    return sent, closed


SHOWN_CHAT = cab.Chat(HI, thinking=cab.SHOWN, stream=True)


@pytest.mark.parametrize(
    "inputs, end, sent",
    [
        (("a", "b"), {"response": "ab"}, "<ab>"),
        # The text that starts over continues, unless a thought stands between.
        (("Hello ", "started", "Hello ", "world"), {"response": "Hello world"}, "<Hello world>"),
        (
            ("Hello ", "started", (THOUGHT, "hm"), "Hello ", "world"), {"response": "Hello world"},
            "<Hello !<hm><Hello world>",
        ),
        (
            ((THOUGHT, "hm"), "Hello ", "started", (THOUGHT, "hm"), "Other"), {"response": "Other"},
            "<hm><Hello !<hm><Other>",
        ),
        (
            ("Let me look.", "started", "Let me", (tool_use(call_id="x"), "{}")),
            {
                "response": "Let me",
                "stop_info": cab.StopInfo("tool_use", None, (cab.ToolCall("x", "look", {}),)),
            },
            "<Let me look.!<{}><Let me>",
        ),
        # A thought that is not complete is sent again.
        (([THOUGHT, "h"], "started", (THOUGHT, "hm"), "a"), {"response": "a"}, "<h!<hm><a>"),
        (
            ([THOUGHT, "h"],), {"response": "a", "stop_info": cab.StopInfo(thinking=(THOUGHT,))},
            "<h!<Let me think.><a>",
        ),
        # Nothing was seen of the run.
        (
            (), {"response": "a", "stop_info": cab.StopInfo(thinking=(THOUGHT, SECRET))},
            "<Let me think.><><a>",
        ),
        # The second of two calls was cut.
        (
            ((tool_use(call_id="x"), "{", "}"), [tool_use(call_id="y"), "{"]),
            {
                "response": "",
                "stop_info": cab.StopInfo("max_tokens", None, (cab.ToolCall("x", "look", {}),)),
            },
            "<{}><{>",
        ),
        (("a",), {"response": "a", "stop_info": cab.StopInfo("max_tokens")}, "<a>"),
        ((), {"response": ""}, "<>"),
        ((), {"response": "", "stop_info": cab.StopInfo("refusal")}, ""),
    ],
)
def test_the_parts_of_an_answer_add_up(inputs: Any, end: Dict[str, Any], sent: str) -> None:
    got, closed = part_steps(SHOWN_CHAT, *inputs, end={"stop_info": None, **end})
    assert got == sent
    is_cut = end.get("stop_info", cab.StopInfo()).reason == "max_tokens"
    assert [part.is_cut for part in closed[-1:]] == [is_cut] * len(closed[-1:])


def test_a_custom_tools_call_is_sent_once_its_input_is_complete() -> None:
    chat = cab.replace(SHOWN_CHAT, custom_tools=("patch",))
    patch = tool_use("patch", "x")
    assert part_steps(chat, [patch, '{"input": "***', ' X"'])[0] == ""
    assert part_steps(chat, (patch, '{"input": "***', ' X"}'))[0] == "<*** X>"
    # It was cut.
    assert part_steps(chat, (patch, '{"input": "***'))[0] == ""


def test_an_answer_that_starts_over_after_a_call_ends_in_an_error() -> None:
    for inputs in (((tool_use(), "{}"), "started"), ([tool_use(), "{"], "started")):
        with pytest.raises(cab.RunError, match="in the middle of a tool call"):
            part_steps(SHOWN_CHAT, *inputs)


@pytest.mark.parametrize("is_seen", [False, True])
def test_thoughts_of_a_run_that_has_ended_come_once_and_first(is_seen: bool) -> None:
    """The reader saw the run's parts, or has only what is stored, which is read once."""
    stop_info = cab.StopInfo(thinking=(THOUGHT,))
    job = cab.replace(JOB, status="completed", response="abc", stop_info=stop_info)
    view = cab.JobView(job, 0, 0, None)
    parts = [
        cab.JobEvent("part_start", block=THOUGHT), cab.JobEvent("part_delta", text="Let me think."),
        cab.JobEvent("part_end", block=THOUGHT),
    ]
    seen = [(event, None) for event in [
        cab.JobEvent("started"), *(parts if is_seen else []),
        *(cab.JobEvent("delta", text=text) for text in "abc"),
    ]]
    reads: List[str] = []

    def get(job_id: str) -> cab.Job:
        reads.append(job_id)
        return job

    service = SimpleNamespace(
        clock=cab.Clock(), live_of=lambda job: None, failure=lambda job: None,
        follow=lambda *_, **__: (row for row in [*seen, (cab.JobEvent("completed"), view)]),
        stores=SimpleNamespace(jobs=SimpleNamespace(get=get, summary=get)),
    )
    context: Any = SimpleNamespace(
        service=service, require_caller=lambda: None,
        request=SimpleNamespace(client_disconnected=lambda: False),
    )
    steps = [step for step in cab.chat_steps(context, SHOWN_CHAT, job) if step.kind == "delta"]
    assert [step.text for step in steps] == ["Let me think.", "a", "b", "c"]
    # One for each of the usage figures, and one for the thoughts.
    assert len(reads) == len(seen) - 1 + (not is_seen)
