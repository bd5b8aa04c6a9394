"""The official `openai` and `anthropic` packages over the bridge over the real `claude`, against a stand-in of the Messages API.

    python3 -m venv DIR && DIR/bin/pip install openai anthropic
    CAB_TEST_SDKS=DIR/bin/python CAB_TEST_CLAUDE=node_modules/.bin/claude python -m pytest tests/test_sdks.py

Each test runs one scenario of sdk_client.py, for each package, in that venv; it fails by itself where something does not fit the
package's types. Here is looked at what it saw, and at what reached the model.
"""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest

import claude_api_bridge as cab
from conftest import TESTS, missing
from messages_api import Context, Reply, calls_tools, echo, last_text, system_text, tool_results, turn_texts
from sdk_client import ANSWER, IMAGE_URL, MODEL, PDF, PNG, RESULTS, STOP, SYSTEM, TOOLS, TURNS
from test_real import Site, Version, version                # version: a fixture

pytestmark = [pytest.mark.real, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
              pytest.mark.parametrize("sdk", ("anthropic", "openai"))]

See = Callable[[str], Any]
ENDED = {"anthropic": "end_turn", "openai": "stop"}
CALLED = {"anthropic": "tool_use", "openai": "tool_calls"}


@pytest.fixture(scope="session")
def sdk_python() -> Path:
    """A Python that has both packages: the one that $CAB_TEST_SDKS names; else the test is skipped (or fails where it is required)."""
    found = shutil.which(os.environ.get("CAB_TEST_SDKS") or "")
    if not found or subprocess.run([found, "-c", "import anthropic, openai"], stderr=subprocess.DEVNULL, timeout=60).returncode:
        missing("no SDKs here: python3 -m venv DIR && DIR/bin/pip install openai anthropic, and name DIR/bin/python in CAB_TEST_SDKS")
    return Path(str(found)).absolute()


@pytest.fixture(scope="module")
def standing(sdk_python: Path, real_claude: Path, version: Version, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if version < cab.JSON_SCHEMA_CLI:
        pytest.skip("this CLI is too old for the wire formats of the SDKs")
    with contextlib.closing(Site(real_claude, version, tmp_path_factory.mktemp("sdks"))) as site:
        site.start()
        yield site


@pytest.fixture
def site(standing: Site) -> Site:
    """A bridge that the tests of this file use one after the other."""
    standing.messages.reply = echo
    del standing.messages.calls[:], standing.messages.outside[:]
    return standing


@pytest.fixture
def see(site: Site, sdk_python: Path, sdk: str) -> See:
    """see("chat") -> what that scenario told, by a token of its own and without a variable of the owner's."""
    def run(scenario: str) -> Any:
        client, _ = site.client()
        environ = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(site.home), "NO_PROXY": "127.0.0.1"}
        address = "http://127.0.0.1:%d" % client.port
        command = [str(sdk_python), str(TESTS / "sdk_client.py"), sdk + "-" + scenario, address, str(client.token)]
        done = subprocess.run(command, env=environ, cwd=str(site.folder), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, encoding="utf-8", timeout=180)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def blocks(call: Context, role: str) -> List[Dict[str, Any]]:
    """The content of the last message of a role, without what the CLI adds."""
    content = [message["content"] for message in call.body["messages"] if message["role"] == role][-1]
    return [block for block in ([{"type": "text", "text": content}] if isinstance(content, str) else content)
            if not str(block.get("text")).startswith("<system-reminder>")]


def counted(told: Dict[str, Any], sdk: str) -> bool:
    """Whether it has the numbers of the stand-in."""
    usage = told["wire"]["usage"]
    if sdk == "anthropic":
        expected = {"input_tokens": 10, "output_tokens": 7, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 3}
        return {name: usage.get(name) for name in expected} == expected
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"], cached) == (18, 7, 25, 5)


def test_chat(site: Site, see: See, sdk: str) -> None:
    seen = see("chat")
    for told in seen:
        body_field = told["wire"]
        assert told["text"] == "Echo: hello" and told["stop"] == ENDED[sdk] and told["requestId"] and counted(told, sdk)
        assert body_field["model"] == MODEL and body_field["id"].startswith({"anthropic": "msg_", "openai": "chatcmpl-"}[sdk])
        if sdk == "anthropic":
            assert body_field["type"] == "message" and body_field["role"] == "assistant" and body_field["stop_sequence"] is None
            assert [block["type"] for block in body_field["content"]] == ["text"]
        else:                                           # what may be null, but must be there
            choice, = body_field["choices"]
            assert choice["index"] == 0 and choice["logprobs"] is None and choice["message"]["refusal"] is None
            assert body_field["created"] > 1_700_000_000 and choice["message"]["role"] == "assistant"
    assert len({told["wire"]["id"] for told in seen}) == len({told["requestId"] for told in seen}) == len(site.calls()) == 2
    for call in site.calls():
        assert call.body["model"] == MODEL and turn_texts(call.body) == [("user", "hello")] and not call.body.get("tools")
        assert SYSTEM in system_text(call.body) and cab.SYSTEM_PROMPT not in system_text(call.body)


def test_conversation(site: Site, see: See, sdk: str) -> None:
    assert see("conversation")["text"] == "Echo: five"
    call, = site.calls()
    assert turn_texts(call.body) == list(TURNS) and SYSTEM in system_text(call.body)


def test_stream(site: Site, see: See, sdk: str) -> None:
    site.messages.reply = lambda body: Reply(pieces=("one ", "two ", "three"))
    seen = see("stream")
    low, high = seen["low"], seen["high"]
    assert low["text"] == high["text"] == "one two three" and high["stop"] == ENDED[sdk] and counted(high, sdk)
    assert low["requestId"] and high["requestId"] and low["type"].startswith("text/event-stream") and high["wire"]["model"] == MODEL
    if sdk == "anthropic":
        events, kinds = low["events"], [event["type"] for event in low["events"]]
        for order in (kinds, [kind for kind in high["kinds"] if kind != "text"]):
            assert order[:2] == ["message_start", "content_block_start"] and set(order[2:-3]) == {"content_block_delta"}
            assert order[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert {event["index"] for event in events[1:-2]} == {0}
        begun, end = events[0]["message"], events[-2]
        assert begun["content"] == [] and begun["stop_reason"] is None and begun["usage"]["input_tokens"] in (0, 10)     # 0: not known yet
        assert begun["id"].startswith("msg_") and begun["model"] == MODEL
        assert (end["delta"]["stop_reason"], end["delta"]["stop_sequence"], end["usage"]["output_tokens"]) == ("end_turn", None, 7)
    else:
        for chunks in (low["events"], seen["counted"]["events"][:-1]):
            assert [len(chunk["choices"]) for chunk in chunks] == [1] * len(chunks)
            choices = [chunk["choices"][0] for chunk in chunks]
            assert choices[0]["delta"]["role"] == "assistant" and choices[-1]["finish_reason"] == "stop"
            assert {choice["finish_reason"] for choice in choices[:-1]} == {None} and {choice["index"] for choice in choices} == {0}
            assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
            assert not any(chunk.get("usage") for chunk in chunks)
        end = seen["counted"]["events"][-1]
        assert end["choices"] == [] and end["usage"] == high["wire"]["usage"] and seen["counted"]["text"] == "one two three"
        assert Counter(high["kinds"])["content.done"] == 1
    for call in site.calls():
        assert turn_texts(call.body) == [("user", "hello")] and SYSTEM in system_text(call.body)


def test_image_and_document(site: Site, see: See, sdk: str) -> None:
    assert see("image")["text"] == "Echo: what is this?"
    call, = site.calls()
    assert [(block["type"], block.get("source")) for block in blocks(call, "user")] == [
        ("image", {"type": "base64", "media_type": "image/png", "data": PNG}), ("image", {"type": "url", "url": IMAGE_URL}),
        ("document", {"type": "base64", "media_type": "application/pdf", "data": PDF}), ("text", None)]
    assert not site.messages.outside


def test_json_schema(site: Site, see: See, sdk: str) -> None:
    def reply(body: Dict[str, Any]) -> Reply:
        """By the CLI's own tool, or as plain text where it was only asked for in words."""
        by_tool = any(tool["name"] == "StructuredOutput" for tool in body.get("tools", []))
        return echo(body) if by_tool else Reply(json.dumps({"answer": last_text(body)}))

    site.messages.reply = reply
    seen = see("schema")
    assert [json.loads(text) for text in seen["texts"]] == [{"answer": "forty-two"}] * len(seen["texts"])
    assert set(seen["parsed"]) == {"forty-two"} and set(seen["stops"]) == {ENDED[sdk]}
    schemas = [tool["input_schema"] for call in site.calls() for tool in call.body.get("tools", []) if tool["name"] == "StructuredOutput"]
    assert schemas and all(schema["required"] == ["answer"] for schema in schemas if "answer" in schema.get("properties", {}))
    assert sum("answer" in schema.get("properties", {}) for schema in schemas) >= {"anthropic": 3, "openai": 4}[sdk]


MODEL_CALLS = (("mcp__api__add", {"a": 2, "b": 3}), ("mcp__api__look_up", {"word": "cab"}))


def is_round_trip(site: Site, seen: Dict[str, Any], sdk: str) -> bool:
    """Asserts on two calls at once, their results and the end, as the client and the model have them."""
    called, ended = seen["called"], seen["ended"]
    assert called["calls"] == [["add", {"a": 2, "b": 3}], ["look_up", {"word": "cab"}]] and called["stop"] == CALLED[sdk]
    assert len(set(called["ids"])) == 2 and called["text"] in ("", None)
    assert ended["text"] == "done" and ended["stop"] == ENDED[sdk] and not ended["calls"]
    last = site.calls()[-1]
    assert tool_results(last.body) == [(False, RESULTS["add"]), (sdk == "anthropic", RESULTS["look_up"])]
    assert [(block["name"], block["input"]) for block in blocks(last, "assistant") if block["type"] == "tool_use"] == list(MODEL_CALLS)
    assert turn_texts(last.body)[0] == ("user", "go on")
    for call in site.calls():
        tools = {tool["name"].rpartition("__")[2]: tool for tool in call.body["tools"]}
        assert set(tools) == set(TOOLS)
        for name, (told, schema) in TOOLS.items():
            sent = tools[name]["input_schema"]
            assert told in tools[name]["description"]
            assert (sent["properties"], sent["required"]) == (schema["properties"], schema["required"])
    return True


def test_tools(site: Site, see: See, sdk: str) -> None:
    site.messages.reply = calls_tools(*MODEL_CALLS)
    assert is_round_trip(site, see("tools"), sdk)


def test_tools_in_a_stream(site: Site, see: See, sdk: str) -> None:
    site.messages.reply = calls_tools(*MODEL_CALLS)
    seen = see("tools_stream")
    assert is_round_trip(site, seen, sdk)
    events = seen["low"]["events"]
    if sdk == "anthropic":
        begun = {event["index"]: event["content_block"] for event in events if event["type"] == "content_block_start"}
        assert [(block["type"], block["name"], block["input"]) for block in begun.values()] == [
            ("tool_use", "add", {}), ("tool_use", "look_up", {})]
        told = {index: "".join(event["delta"]["partial_json"] for event in events
                               if event["type"] == "content_block_delta" and event["index"] == index) for index in begun}
        assert "input_json" in seen["called"]["kinds"] and events[-2]["delta"]["stop_reason"] == "tool_use"
    else:
        parts = [part for chunk in events for choice in chunk["choices"] for part in choice["delta"].get("tool_calls") or []]
        begun = {part["index"]: part for part in parts if part.get("id")}
        assert [(part["type"], part["function"]["name"]) for part in begun.values()] == [("function", "add"), ("function", "look_up")]
        assert sum(bool(part["function"].get("name")) for part in parts) == 2
        told = {index: "".join(part["function"].get("arguments") or "" for part in parts if part["index"] == index) for index in begun}
        assert seen["called"]["kinds"].count("tool_calls.function.arguments.done") == 2
        assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert {index: json.loads(text) for index, text in told.items()} == {n: args for n, (_, args) in enumerate(MODEL_CALLS)}


def test_a_forced_tool(site: Site, see: See, sdk: str) -> None:
    for told in see("forced_tool"):
        assert told["calls"] == [["give", {"answer": "forty-two"}]] and told["stop"] == CALLED[sdk] and not told["text"]
    assert turn_texts(site.calls()[0].body) == [("user", "forty-two")]
    tools = [tool for tool in site.calls()[0].body["tools"] if tool["name"] == "StructuredOutput"]
    assert [tool["input_schema"]["properties"] for tool in tools] == [ANSWER["properties"]]


REFUSALS = {"token": ("AuthenticationError", 401, "authentication_error"), "request": ("BadRequestError", 400, "invalid_request_error"),
            "two": ("BadRequestError", 400, "invalid_request_error"), "model": ("NotFoundError", 404, "not_found_error")}


def is_error_body(body: Any, sdk: str, kind: str) -> bool:
    """Whether it is an error as that API tells it; the package `openai` hands on the inner object only."""
    if sdk == "anthropic":
        return bool(body["type"] == "error" and body["error"]["type"] == kind and len(body["error"]["message"]) > 5)
    return bool({"message", "type", "param", "code"} <= set(body) and len(body["message"]) > 5 and isinstance(body["type"], str))


def test_errors(site: Site, see: See, sdk: str) -> None:
    unknown = Reply("model: nosuch", status=404, error="not_found_error")
    site.messages.reply = lambda body: unknown if body["model"] == "nosuch" else echo(body)
    seen = see("errors")
    for name, (kind, status, error) in REFUSALS.items():
        if name in seen:
            got = seen[name]
            assert (got["class"], got["status"]) == (kind, status) and got["requestId"], got
            assert is_error_body(got["body"], sdk, error), got
    assert ("two" in seen) == (sdk == "openai")
    assert "nosuch" in json.dumps(seen["model"]["body"])
    assert is_error_body(seen["stream"]["body"], sdk, "not_found_error") and seen["stream"]["status"] in (404, 200, None)
    assert (seen["path"]["class"], seen["path"]["status"]) == ("NotFoundError", 404)
    assert {call.body["model"] for call in site.calls()} == {"nosuch"}


def test_models(site: Site, see: See, sdk: str) -> None:
    seen = see("models")
    page, listed = seen["page"], seen["listed"]
    ids = [model["id"] for model in listed]
    assert page["data"] == listed == seen["each"] and len(set(ids)) == len(ids) >= 1 and seen["strict"] == ids and seen["first"] == ids[0]
    if sdk == "anthropic":
        assert page["has_more"] is False and (page["first_id"], page["last_id"]) == (ids[0], ids[-1]) and seen["paged"] == ids
        assert all(model["type"] == "model" and model["display_name"] and model["created_at"] for model in listed)
    else:
        assert page["object"] == "list" and all(model["object"] == "model" and model["owned_by"] for model in listed)
    refused = seen["nosuch"]
    assert (refused["class"], refused["status"]) == ("NotFoundError", 404) and is_error_body(refused["body"], sdk, "not_found_error")
    assert not site.calls()


def test_asynchronous(site: Site, see: See, sdk: str) -> None:
    seen = see("asynchronous")
    assert seen["whole"]["text"] == "Echo: whole" and seen["stream"]["text"] == "Echo: streamed" and seen["models"]
    assert seen["whole"]["requestId"] and seen["stream"]["requestId"] and seen["whole"]["requestId"] != seen["stream"]["requestId"]
    assert sorted(site.messages.prompts()) == ["streamed", "whole"]


def test_stop(site: Site, see: See, sdk: str) -> None:
    """The word is torn in two on its way, and neither half of it is told."""
    site.messages.reply = lambda body: Reply(pieces=("one", " two" + STOP[:2], STOP[2:] + " three"))
    seen = see("stop")
    assert [seen[name]["text"] for name in ("whole", "low", "high")] == ["one two"] * 3
    if sdk == "anthropic":
        ends = [seen["whole"]["wire"], seen["low"]["events"][-2]["delta"], seen["high"]["wire"]]
        assert [(end["stop_reason"], end["stop_sequence"]) for end in ends] == [("stop_sequence", STOP)] * 3
    else:
        assert [seen["whole"]["stop"], seen["low"]["events"][-1]["choices"][0]["finish_reason"], seen["high"]["stop"]] == ["stop"] * 3
