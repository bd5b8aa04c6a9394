"""What clients send that the wire formats of the bridge once refused.

Each case was recorded from a program in its newest version.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest

import claude_api_bridge as cab
from conftest import FakeClaude, RunningBridge, wait_until
from test_formats import (
    calls_in, continue_chat, events, initialize_requests, post, streamed, talk,
    text, tool_result, tool_use, tools, words,
)

Start = Callable[..., RunningBridge]


@pytest.fixture
def fake(fake_claude: Callable[..., FakeClaude]) -> FakeClaude:
    return fake_claude()


def messages(*turns: Any, **more: Any) -> cab.Chat:
    return cab.read_messages_request(talk(*turns, **more))


def completion(*messages: Dict[str, Any], **more: Any) -> cab.Chat:
    return cab.read_completion_request({"messages": list(messages), **more})


USER = {"role": "user", "content": "hi"}


def contents(chat: cab.Chat) -> List[Any]:
    return [turn["content"] for turn in chat.turns]


# --- Anthropic ---


def test_a_thread_is_refused_with_the_code_on_which_the_sdk_sends_everything(bridge: Start) -> None:
    admin = bridge().admin
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
        answer = post(admin, "anthropic", talk("hi", thread=thread))
        assert answer.status == 400 and answer.json["error"]["details"] == {
            "error_code": "thread_unsupported_request", "unsupported": ["thread"],
        }
    assert post(admin, "anthropic", talk("hi", thread=None)).status == 200


def test_blocks_that_the_cli_does_not_take_become_texts() -> None:
    search = {
        "type": "search_result", "title": "Sky", "source": "https://example.com",
        "content": [text("It is blue.")], "citations": {"enabled": True},
    }
    document = {"type": "document", "title": "T", "source": {"type": "content", "content": "D"}}
    parts = {"type": "document", "source": {"type": "content", "content": [text("a"), text("b")]}}
    assert contents(messages([search, document, parts]))[0] == [
        text("Sky"), text("(https://example.com)"), text("It is blue."), text("T"), text("D"),
        text("a"), text("b"),
    ]
    reference = {"type": "tool_reference", "tool_name": "WebFetch"}
    chat = messages("a", [tool_use()], [tool_result([reference, search])])
    assert contents(chat)[2][0]["content"][0] == text("The tool WebFetch can be used.")


def test_what_tools_of_a_server_did_earlier_is_told_as_text() -> None:
    use = {
        "type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search",
        "input": {"query": "sky"},
    }
    result = {
        "type": "web_search_tool_result", "tool_use_id": "srvtoolu_1",
        "content": [
            {"type": "web_search_result", "title": "Sky", "encrypted_content": "x" * 5000},
        ],
    }
    answer = contents(messages("a", [use, result, text("Blue.")], "b"))[1]
    assert answer == [
        text('(server_tool_use: {"name":"web_search","input":{"query":"sky"}})'), answer[1],
        text("Blue."),
    ]
    assert "Sky" in answer[1]["text"] and "xxx" not in answer[1]["text"]


def test_tools_that_the_client_runs_need_no_schema_and_added_ones_are_offered() -> None:
    typed = [
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
        {"type": "memory_20250818", "name": "memory"},
        {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"},
        {"name": "later", "defer_loading": True, "input_schema": {"type": "object"}},
    ]
    added = {"type": "tool_addition", "tool": {
        "type": "tool_definition", "definition": {"name": "new", "input_schema": {}}}}
    repeated = {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "later"}}
    body = talk("hi", tools=typed)
    body["messages"].insert(0, {"role": "system", "content": [added, repeated]})
    chat = cab.read_messages_request(body)
    assert [tool["name"] for tool in chat.client_tools] == [
        "bash", "str_replace_based_edit_tool", "memory", "later", "new",
    ]
    commands = [tool["inputSchema"]["properties"]["command"] for tool in chat.client_tools[:3]]
    assert [command.get("enum") for command in commands] == [
        None, ["view", "create", "str_replace", "insert"],
        ["view", "create", "str_replace", "insert", "delete", "rename"],
    ]


def test_a_search_on_the_server_needs_a_token_that_may_search(
    bridge: Start, fake: FakeClaude
) -> None:
    admin = bridge(fake).admin
    web = admin.new_token(tools="web")
    for api, body in (
        ("anthropic", talk("hi", tools=[{"type": "web_search_20250305", "name": "web_search"}])),
        ("openai", talk("hi", web_search_options={})),
    ):
        answer = post(admin, api, body)
        assert answer.status == 400 and "token with the tools web" in answer.data.decode()
        assert words(post(web, api, body)) == "Echo: hi"
    assert post(admin, "openai", talk("hi", web_search_options=None)).status == 200


# --- names, ids and schemas ---


@pytest.mark.parametrize("name", ["files.read", "a" * 128, "ключ", "a b"])
@pytest.mark.parametrize("api", ["anthropic", "openai"])
def test_any_name_of_a_tool_comes_back(
    bridge: Start, fake: FakeClaude, api: str, name: str
) -> None:
    admin = bridge(fake).admin
    inner = cab.read_word(name, cab.TOOL_NAME_CHARACTERS, "name")
    body = talk("call " + json.dumps([[inner, {"at": "sky"}]]), tools=tools(api, name, "b.c"))
    answer = post(admin, api, body)
    assert [call[1] for call in calls_in(answer)] == [name]
    end = post(admin, api, continue_chat(body, answer, "blue"))
    assert "blue" in words(end) and len(fake.children()) == 1
    kind = {"type": "tool", "name": name} if api == "anthropic" else {
        "type": "function", "function": {"name": name},
    }
    forced = post(admin, api, talk('{"answer": "x"}', tools=tools(api, name, "b.c"),
                                   tool_choice=kind))
    assert [call[1] for call in calls_in(forced)] == [name]


def test_any_id_of_a_call_belongs_to_its_result() -> None:
    for call_id in ("call|1:2", "a b", "ü" * 300):
        chat = messages("a", [tool_use(call_id=call_id)], [tool_result(call_id=call_id)])
        use, result = contents(chat)[1][0], contents(chat)[2][0]
        assert use["id"] == result["tool_use_id"] and cab.re.fullmatch(r"[\w-]{1,128}", use["id"])
    two = messages("a", [tool_use(call_id="a:b"), tool_use(call_id="a.b")],
                   [tool_result(call_id="a:b"), tool_result(call_id="a.b")])
    assert len({block["id"] for block in contents(two)[1]}) == 2


@pytest.mark.parametrize("given, read", [
    (None, {"type": "object"}), (True, {"type": "object"}),
    ({"type": ["object", "null"]}, {"type": "object"}),
    ({"type": None, "properties": None, "required": None}, {"type": "object"}),
    ({"properties": {"a": True, "b": False, "c": {}}},
     {"type": "object", "properties": {"a": {}, "b": {"not": {}}, "c": {}}}),
    ({"required": ["a", 5]}, {"type": "object", "required": ["a"]}),
    ({"$defs": {"A": {}}, "anyOf": [{}]}, {"type": "object", "$defs": {"A": {}}, "anyOf": [{}]}),
], ids=str)  # fmt: skip
def test_any_json_schema_of_an_object_describes_an_input(given: Any, read: Any) -> None:
    function = {"name": "f", "parameters": given}
    chat = completion(USER, tools=[{"type": "function", "function": function}])
    assert chat.client_tools[0]["inputSchema"] == read


@pytest.mark.parametrize("given, taken", [
    ({"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "x", "$anchor": "y",
      "x-order": 1, "discriminator": {"propertyName": "k"}, "unevaluatedProperties": False},
     {"type": "object"}),
    ({"properties": {"format": {"type": "string", "format": "uri", "description": "Where."},
                     "when": {"format": "date"}}},
     {"type": "object", "properties": {
         "format": {"type": "string", "description": "Where. Format: uri"},
         "when": {"description": "Format: date"}}}),
    ({"properties": {"a": {"prefixItems": [{"$anchor": "z"}], "items": False}}},
     {"type": "object", "properties": {"a": {"items": [{}], "additionalItems": False}}}),
    ({"$defs": {"A": {"const": {"$id": 1}}}, "dependentRequired": {"a": ["b"]}},
     {"type": "object", "$defs": {"A": {"const": {"$id": 1}}}, "dependencies": {"a": ["b"]}}),
    # What is left must not demand more than before.
    ({"properties": {"a": {"oneOf": [{"format": "ipv4"}, {"format": "ipv6"}]},
                     "b": {"not": {"format": "date"}, "type": "string"},
                     "c": {"if": {"properties": {"x": {"format": "date"}}},
                           "then": {"required": ["y"]}, "else": False},
                     "d": {"contains": {"const": 5}, "minContains": 0},
                     "e": {"nullable": True}, "f": {"oneOf": [{"$anchor": "a"}, {"const": 1}]}}},
     {"type": "object", "properties": {
         "a": {"allOf": [{"anyOf": [{"description": "Format: ipv4"},
                                    {"description": "Format: ipv6"}]}]},
         "b": {"type": "string"}, "c": {}, "d": {}, "e": {}, "f": {"oneOf": [{}, {"const": 1}]}}}),
    ({"anyOf": [{"type": "object", "strict": True}], "additionalProperties": {"format": "x"}},
     {"type": "object", "anyOf": [{"type": "object"}],
      "additionalProperties": {"description": "Format: x"}}),
])  # fmt: skip
def test_a_schema_reaches_claude_without_what_its_validator_does_not_know(
    bridge: Start, fake: FakeClaude, given: Any, taken: Any
) -> None:
    admin = bridge(fake).admin
    body = talk("hi", response_format={"type": "json_schema", "json_schema": {"schema": given}})
    assert post(admin, "openai", body).status == 200
    assert initialize_requests(fake)[-1]["jsonSchema"] == taken


def test_a_schema_that_claude_drops_is_named(bridge: Start) -> None:
    """As the real one does for an invalid pattern: its tool for the answer is missing."""
    admin = bridge().admin
    schema = {"type": "object", "properties": {"a": {"pattern": "("}}}
    body = talk("hi", response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    answer = post(admin, "openai", body)
    assert answer.status == 400 and "does not accept this JSON Schema" in answer.data.decode()
    done = admin.answer("hi", jsonSchema=schema)
    assert done["errorCode"] == "invalid_request" and "JSON Schema" in done["error"]


def test_a_schema_must_be_of_an_object(bridge: Start) -> None:
    admin = bridge().admin
    for schema in ({"type": "array"}, {"type": "string"}, {"type": ["object", "null"]}):
        answer = admin.post("/api/ask", {"message": "hi", "jsonSchema": schema})
        assert (answer.status, answer.json["field"]) == (400, "jsonSchema")


# --- Chat Completions ---


def test_a_conversation_of_instructions_alone_and_an_empty_message_are_answered() -> None:
    chat = completion({"role": "system", "content": "say hello"})
    assert (contents(chat), chat.system_prompt) == ([[text("say hello")]], None)
    for empty in ("", " ", []):
        assert contents(completion({"role": "user", "content": empty})) == [
            [text(cab.EMPTY_MESSAGE)],
        ]


@pytest.mark.parametrize("arguments", ["{", "[1]", '{"a":NaN}', "x", "[" * 100_000])
def test_broken_arguments_of_an_earlier_call_stay_a_text(arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    chat = completion(
        USER, {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
    )
    assert contents(chat)[1][0]["input"] == {"arguments": arguments}


def test_only_allowed_tools_are_offered(bridge: Start, fake: FakeClaude) -> None:
    allowed = [{"type": "function", "function": {"name": "taste"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": allowed}}
    admin = bridge(fake).admin
    body = talk("hi", tools=tools("openai"), tool_choice=choice)
    assert post(admin, "openai", body).status == 200
    assert initialize_requests(fake)[-1]["agents"]["bridge"]["tools"] == ["mcp__api__taste"]
    choice["allowed_tools"]["mode"] = "required"
    chat = cab.read_completion_request(talk("hi", tools=tools("openai"), tool_choice=choice))
    assert chat.forced_tool == "taste"


def test_a_custom_tool_takes_a_text(bridge: Start, fake: FakeClaude) -> None:
    admin = bridge(fake).admin
    grammar = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[a-z]+"}}
    custom = {"type": "custom", "custom": {"name": "patch", "format": grammar}}
    body = talk('call [["patch", {"input": "*** Begin"}]]', tools=[custom])
    answer = post(admin, "openai", body).json["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    [call] = answer["message"]["tool_calls"]
    assert call == {
        "id": "toolu_0", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"},
    }
    body["messages"] += [
        {**answer["message"]}, {"role": "tool", "tool_call_id": call["id"], "content": "done"},
    ]
    assert "done" in words(post(admin, "openai", body)) and len(fake.children()) == 1
    listed = [line["response"]["response"]["mcp_response"]["result"] for line in fake.lines()
              if line["type"] == "control_response"]
    [offered] = next(result["tools"] for result in listed if "tools" in result)
    assert offered["inputSchema"]["required"] == ["input"] and "[a-z]+" in offered["description"]


@pytest.mark.parametrize("stream", [False, True])
def test_functions_are_called_and_answered_as_before_there_were_tools(
    bridge: Start, fake: FakeClaude, stream: bool
) -> None:
    admin = bridge(fake).admin
    functions = [{"name": "look", "parameters": {"type": "object"}}]
    body = talk('call [["look", {"at": "sky"}]]', functions=functions, stream=stream)
    answer = post(admin, "openai", body)
    call = {"name": "look", "arguments": '{"at":"sky"}'}
    if stream:
        choices = [data["choices"][0] for _, data in events(answer.data)[:-1]]
        pieces = [choice["delta"].get("function_call", {}) for choice in choices]
        assert [piece["name"] for piece in pieces if "name" in piece] == ["look"]
        assert json.loads("".join(piece.get("arguments", "") for piece in pieces)) == {"at": "sky"}
        assert choices[-1]["finish_reason"] == "function_call"
        return
    choice = answer.json["choices"][0]
    assert (choice["finish_reason"], choice["message"]["function_call"]) == ("function_call", call)
    body["messages"] += 2 * [
        choice["message"], {"role": "function", "name": "look", "content": "blue"},
    ]
    assert post(admin, "openai", body).status == 200
    ids = [block["id"] for turn in contents(cab.read_completion_request(body)) for block in turn
           if block["type"] == "tool_use"]
    assert len(set(ids)) == len(ids) == 2
    none = cab.read_completion_request({**body, "function_call": "none"})
    assert none.client_tools == ()
    named = cab.read_completion_request({**body, "function_call": {"name": "look"}})
    assert named.forced_tool == "look"


# --- paths and models ---


def test_a_base_url_with_v1_too_much_or_too_little_works(bridge: Start) -> None:
    admin = bridge().admin
    for path in ("/messages", "/v1/v1/messages", "/v1/messages"):
        assert words(admin.post(path, talk("hi"))) == "Echo: hi"
    for path in ("/chat/completions", "/V1/v1/chat/completions"):
        assert words(admin.post(path, talk("hi"))) == "Echo: hi"
    assert admin.get("/models").status == admin.get("/v1/v1/models/haiku").status == 200
    refused = admin.with_token("cab-x").post("/messages", talk("hi"))
    assert (refused.status, refused.json["type"]) == (401, "error")


def test_a_path_that_is_not_offered_says_what_is(bridge: Start) -> None:
    admin = bridge().admin
    for path in ("/v1/embeddings", "/v1/files", "/v1/nothing"):
        text = admin.post(path, {}).json["error"]["message"]
        assert path in text and "embeddings" in text and "POST /v1/messages" in text
    assert admin.post("/nothing", {}).json["error"] == "Not found"


def test_every_model_that_is_answered_can_be_looked_up(bridge: Start) -> None:
    admin = bridge().admin
    for name in ("haiku", "gpt-5.2", "claude-haiku-9-20300101", "o3"):
        answer = admin.get("/v1/models/" + name)
        assert (answer.status, answer.json["id"]) == (200, name)
    assert admin.get("/v1/models/a%20b").status == 404
    haiku = admin.new_token(models=["haiku"])
    assert haiku.get("/v1/models/claude-haiku-4-5").status == 200
    assert haiku.get("/v1/models/claude-opus-5").status == 404


def test_a_token_of_a_family_takes_its_full_names(bridge: Start) -> None:
    api = bridge().admin.new_token(models=["haiku"])
    for name, status in (
        ("claude-haiku-4-5-20251001", 200), ("haiku", 200), ("claude-opus-4-8", 403),
        ("haiku-claude", 403), ("claude-haikuish-1", 403),
    ):
        assert post(api, "anthropic", talk("hi", model=name)).status == status, name


def test_a_page_may_read_the_id_of_a_request(bridge: Start) -> None:
    headers = post(bridge().admin, "openai", talk("hi")).headers
    exposed = headers["access-control-expose-headers"].lower()
    assert "request-id" in exposed and "x-request-id" in exposed


# --- the older completions ---


def test_a_prompt_is_completed(bridge: Start) -> None:
    admin = bridge().admin
    body: Dict[str, Any] = {"model": "gpt-3.5-turbo-instruct", "prompt": ["say hello"]}
    answer = admin.post("/v1/completions", body).json
    assert (answer["object"], answer["choices"]) == ("text_completion", [
        {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"},
    ])
    assert answer["id"].startswith("cmpl-") and answer["usage"]["completion_tokens"] > 0
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(admin.post("/v1/completions", {**body, **options}).data)
    texts = [data["choices"][0]["text"] for _, data in chunks[:-2]]
    assert "".join(texts) == "hello" and chunks[-1][1] == "[DONE]"
    assert chunks[-3][1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2][1]["choices"] == [] and chunks[-2][1]["usage"]["total_tokens"] > 0
    for prompt in (None, [1, 2], ["a", "b"], 5):
        refused = admin.post("/v1/completions", {"prompt": prompt})
        assert (refused.status, refused.json["error"]["param"]) == (400, "prompt")
    assert admin.post("/v1/completions", {"prompt": "x", "echo": True}).status == 400


# --- large bodies ---

PHOTO: Dict[str, Any] = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "iVBO" * 400_000},
}


def photo(**more: Any) -> Dict[str, Any]:
    return talk([PHOTO, text("say seen")], **more)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_photo_of_more_than_a_mebibyte_reaches_claude(
    bridge: Start, fake: FakeClaude, is_chunked: bool
) -> None:
    running = bridge(fake)
    body = json.dumps(photo()).encode()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port)) as connection:
        headers = {"Authorization": "Bearer %s" % running.admin.token}
        pieces = (body[start : start + 700_001] for start in range(0, len(body), 700_001))
        connection.request("POST", "/v1/messages", pieces if is_chunked else body, headers,
                           encode_chunked=is_chunked)
        # Of one connection: the body was read to its end.
        for _ in range(2):
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            answer.read()
            connection.request("GET", "/v1/models", None, headers)
        connection.getresponse().read()
    [prompt] = fake.messages()
    assert prompt["message"]["content"][0] == PHOTO


def test_the_limit_of_v1_is_a_setting_and_that_of_the_native_api_stays(bridge: Start) -> None:
    admin = bridge(body_mb=2).admin
    assert words(post(admin, "anthropic", photo())) == "seen"
    two = [{**PHOTO, "source": {**PHOTO["source"], "data": "iVBO" * 600_000}}]
    refused = post(admin, "anthropic", talk(two))
    assert refused.status == 413 and "2097152 byte limit" in refused.json["error"]["message"]
    native = admin.post("/api/ask", {"message": "x" * (1 << 20)})
    assert native.status == 413 and "1048576 byte limit" in native.json["error"]
    strange = post(admin.with_token("cab-x"), "anthropic", photo())
    assert strange.status == 401


def test_a_large_body_that_is_broken_off_or_of_a_revoked_token_leaves_no_file(
    bridge: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: List[Any] = []

    def note(*_: Any, **__: Any) -> Any:
        files.append(open(tmp_path / "spool", "w+b"))
        return files[-1]

    monkeypatch.setattr(cab.tempfile, "TemporaryFile", note)
    running = bridge(body_mb=4)
    user = running.admin.new_token("user")
    head = ("POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n"
            "Content-Length: 2000000\r\n\r\n" % user.token)
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(head.encode() + b"[" + b" " * 1_500_000)
        client.shutdown(socket.SHUT_WR)
        assert b"400 Bad Request" in client.recv(1000)
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(head.encode() + b"[" + b" " * 1_500_000)
        wait_until(lambda: len(files) == 2)
        token_id = running.admin.get("/api/tokens").json["tokens"][0]["id"]
        assert running.admin.delete("/api/tokens/" + token_id).status == 200
        client.sendall(b" " * 499_998 + b"]")
        assert b"401 Unauthorized" in client.recv(1000)
    wait_until(lambda: all(file.closed for file in files))
    limit = running.bridge._server.large_bodies
    assert all(limit.acquire(blocking=False) for _ in range(cab.LARGE_BODIES))


def test_a_large_body_of_many_small_values_is_refused(bridge: Start) -> None:
    """The reader would need a hundred times its size, and all threads would wait for it."""
    admin = bridge().admin
    many = json.dumps({**talk("hi"), "metadata": [[]] * 400_000}).encode()
    answer = admin.post("/v1/messages", many)
    assert answer.status == 400 and "more than 200000 values" in answer.data.decode()
    # Commas and brackets of a text do not count.
    assert post(admin, "anthropic", talk("say x" + "[,{" * 400_000)).status == 200


def test_a_full_disk_refuses_a_large_body(
    bridge: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cab.tempfile, "TemporaryFile", refuse)
    answer = post(bridge().admin, "openai", talk("x" * 2_000_000))
    assert answer.status == 503 and "No space left" in answer.json["error"]["message"]


@pytest.mark.parametrize("odd", ["", '"', "\\", "ä", "\n", "\x7f", "\ud800", "-0-"])
def test_the_json_of_large_texts_is_the_usual_one(odd: str) -> None:
    large = "QUJD" * 100_000 + odd
    value = {"a": [large, {"b": large, "c": (1, "x" + odd)}], "d": None, "e": "y" * 300_000}
    for dump in (json.dumps, cab.as_json, partial(json.dumps, sort_keys=True)):
        assert cab.large_json(value, dump) == dump(value)


def test_a_stream_begins_with_the_figures_of_the_input(bridge: Start) -> None:
    """LangChain takes the tokens of the input from the first event alone."""
    admin = bridge().admin
    stream = events(post(admin, "anthropic", talk("say hello", stream=True)).data)
    usage = stream[0][1]["message"]["usage"]
    assert usage["input_tokens"] > 0 and usage["cache_read_input_tokens"] > 0
    assert usage["input_tokens"] == stream[-2][1]["usage"]["input_tokens"]


def test_tokens_are_counted_by_an_estimate(bridge: Start) -> None:
    admin = bridge().admin

    def count(*turns: Any, query: str = "", **more: Any) -> int:
        answer = admin.post("/v1/messages/count_tokens" + query, talk(*turns, **more))
        assert answer.status == 200 and list(answer.json) == ["input_tokens"]
        return int(answer.json["input_tokens"])

    short = count("hi")
    assert 1 <= short <= 5 == count("hi" * 8, query="?beta=true")
    assert count("hi", system="x" * 350) == short + 100
    assert count("hi", tools=tools("anthropic")) > short + 20
    assert count([PHOTO]) < 3_000
    # A part of a conversation.
    assert count("hi", "ho") > short and count("hi", [tool_use()]) > short
    assert admin.get("/api/requests").json["requests"] == []


def test_many_calls_at_once_are_not_mixed_up(bridge: Start) -> None:
    admin = bridge(spare=2).admin

    def ask(number: int) -> str:
        word = "word%dend" % number
        kind = "/v1/" + ("messages", "chat/completions", "responses", "completions")[number % 4]
        is_stream = number % 8 in (0, 1)
        body = {**talk(word), "input": word, "stream": is_stream}
        if kind == "/v1/completions":
            body = {"prompt": word}
        for _ in range(50):
            answer = admin.post(kind, body)
            # The queue has 50 places.
            if answer.status != 429:
                break
            wait_until(lambda: admin.get("/api/status").json["queue"]["length"] < 50)
        assert answer.status == 200, answer.data
        text = streamed(answer.data) if is_stream else answer.data.decode()
        words = set(re.findall(r"word\d+end", text))
        assert words == {word}, (kind, word, words)
        return word

    with ThreadPoolExecutor(60) as executor:
        assert len(set(executor.map(ask, range(60)))) == 60


def test_a_call_id_that_a_client_uses_again_keeps_its_result() -> None:
    """The CLI drops the result of a second call with the same id."""
    use, result = tool_use(call_id="call_1"), tool_result("one", call_id="call_1")
    chat = messages("a", [use], [result], [use], [tool_result("two", call_id="call_1")])
    pairs = [(contents(chat)[n][0]["id"], contents(chat)[n + 1][0]["tool_use_id"]) for n in (1, 3)]
    assert pairs[0] == ("call_1", "call_1")
    assert pairs[1][0] == pairs[1][1] != "call_1"
    with pytest.raises(cab.InvalidRequest, match="call_1 is repeated"):
        messages("a", [use, use], [result])


@pytest.mark.parametrize("text, is_deep", [
    ('{"a":"' + "[" * 500 + '"}', False), ('{"a":"\\\\"}' + "[" * 500, True),
    ('{"a":"\\"' + "[" * 500 + '"}', False), ('{"a":"\\\\\\"' + "[" * 500 + '"}', False),
    ("[" * 101, True), ("[" * 100, False), ('["x"' + ',["\\\\"' * 120, True)])  # fmt: skip
def test_the_depth_of_json_counts_no_brackets_of_texts(text: str, is_deep: bool) -> None:
    assert cab.nests_too_deeply(text) is is_deep


def test_a_list_shows_the_beginning_of_large_requests(bridge: Start) -> None:
    admin = bridge().admin
    assert post(admin, "anthropic", talk("say " + "x" * 90_000, system="s" * 90_000)).status == 200
    [row] = admin.get("/api/requests").json["requests"]
    assert (len(row["message"]), len(row["systemPrompt"])) == (32_768, 32_768)
    assert len(row["response"]) == 90_000


def test_a_large_body_has_time_by_its_size(
    bridge: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cab.Phase.SECONDS, cab.Phase.BODY, 0.2)
    monkeypatch.setattr(cab, "LARGE_BODY_RATE", 20_000_000)
    running = bridge()
    head = ("POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n"
            "Content-Length: 2000000\r\n\r\n" % running.admin.token)
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(head.encode() + b"[")
        assert b"408 Request Timeout" in client.recv(1000)
    # A tenth of a second more than a small one.
    assert time.monotonic() - started > 0.25
