"""The official `openai` and `anthropic` packages as clients of the bridge over the real `claude`.

A stand-in for the Messages API takes the place of the model.

    python3 -m venv DIR && DIR/bin/pip install openai anthropic
    export CAB_TEST_SDKS=DIR/bin/python CAB_TEST_CLAUDE=node_modules/.bin/claude
    python -m pytest tests/test_sdks.py

Each test runs one scenario of sdk_client.py, for each package, in that venv. The scenario fails by
itself if an answer does not match the package's types. The tests check its output, and what
reached the model.
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
from messages_api import (
    Call, Reply, calls_tools, echo, last_text, system_text, tool_results, turn_texts,
)
from sdk_client import ANSWER, IMAGE_URL, MODEL, PDF, PNG, RESULTS, STOP, SYSTEM, TOOLS, TURNS
from test_real import Site, Version, version  # noqa: F401 (a fixture)

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
    pytest.mark.parametrize("sdk", ("anthropic", "openai")),
]

RunScenario = Callable[[str], Any]
ENDED = {"anthropic": "end_turn", "openai": "stop"}
CALLED = {"anthropic": "tool_use", "openai": "tool_calls"}


@pytest.fixture(scope="session")
def sdk_python() -> Path:
    """Return the Python with both packages that $CAB_TEST_SDKS names, or skip the test.

    With CAB_REQUIRE_REAL=1 the test fails instead.
    """
    python = shutil.which(os.environ.get("CAB_TEST_SDKS") or "")
    probe = ["-c", "import anthropic, openai"]
    if (
        not python
        or subprocess.run([python, *probe], stderr=subprocess.DEVNULL, timeout=60).returncode
    ):
        missing(
            "no SDKs here: python3 -m venv DIR && DIR/bin/pip install openai anthropic, "
            "and set CAB_TEST_SDKS to DIR/bin/python"
        )
    return Path(str(python)).absolute()


@pytest.fixture(scope="module")
def running_site(
    sdk_python: Path, real_claude: Path, version: Version, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """The bridge over the real CLI, which all tests of this file share."""
    with contextlib.closing(Site(real_claude, version, tmp_path_factory.mktemp("sdks"))) as site:
        site.start()
        yield site


@pytest.fixture
def site(running_site: Site) -> Site:
    """The shared bridge, with the stand-in reset: the default reply and no calls."""
    running_site.messages.reply = echo
    del running_site.messages.calls[:], running_site.messages.outside[:]
    return running_site


@pytest.fixture
def run_scenario(site: Site, sdk_python: Path, sdk: str) -> RunScenario:
    """run_scenario("chat") -> the output of that scenario, parsed.

    It runs with a token of its own, and without the environment of the owner.
    """

    def run(scenario: str) -> Any:
        client, _ = site.client()
        environ = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(site.home),
            "NO_PROXY": "127.0.0.1",
        }
        address = "http://127.0.0.1:%d" % client.port
        command = [
            str(sdk_python),
            str(TESTS / "sdk_client.py"),
            sdk + "-" + scenario,
            address,
            str(client.token),
        ]
        done = subprocess.run(
            command, env=environ, cwd=str(site.folder), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", timeout=180,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def blocks(call: Call, role: str) -> List[Dict[str, Any]]:
    """Return the content blocks of the last message of a role, without reminders of the CLI."""
    content = [message["content"] for message in call.body["messages"] if message["role"] == role][
        -1
    ]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return [b for b in content if not str(b.get("text")).startswith("<system-reminder>")]


def has_usage(message: Dict[str, Any], sdk: str) -> bool:
    """Return whether a message has the token counts of the stand-in."""
    usage = message["wire"]["usage"]
    if sdk == "anthropic":
        expected = {
            "input_tokens": 10,
            "output_tokens": 7,
            "cache_read_input_tokens": 5,
            "cache_creation_input_tokens": 3,
        }
        return {name: usage.get(name) for name in expected} == expected
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"], cached) == (
        18, 7, 25, 5,
    )


def test_chat(site: Site, run_scenario: RunScenario, sdk: str) -> None:
    messages = run_scenario("chat")
    id_prefix = {"anthropic": "msg_", "openai": "chatcmpl-"}[sdk]
    for message in messages:
        body = message["wire"]
        assert message["text"] == "Echo: hello" and message["stop"] == ENDED[sdk]
        assert message["requestId"] and has_usage(message, sdk)
        assert body["model"] == MODEL and body["id"].startswith(id_prefix)
        if sdk == "anthropic":
            assert body["type"] == "message" and body["role"] == "assistant"
            assert body["stop_sequence"] is None
            assert [block["type"] for block in body["content"]] == ["text"]
        else:
            # These fields may be null, but must be present.
            (choice,) = body["choices"]
            assert choice["index"] == 0 and choice["logprobs"] is None
            assert choice["message"]["refusal"] is None
            assert body["created"] > 1_700_000_000 and choice["message"]["role"] == "assistant"
    assert len({message["wire"]["id"] for message in messages}) == 2
    assert len({message["requestId"] for message in messages}) == len(site.calls()) == 2
    for call in site.calls():
        assert call.body["model"] == MODEL and turn_texts(call.body) == [("user", "hello")]
        assert not call.body.get("tools")
        assert SYSTEM in system_text(call.body) and cab.SYSTEM_PROMPT not in system_text(call.body)


def test_conversation(site: Site, run_scenario: RunScenario, sdk: str) -> None:
    assert run_scenario("conversation")["text"] == "Echo: five"
    (call,) = site.calls()
    assert turn_texts(call.body) == list(TURNS) and SYSTEM in system_text(call.body)


def test_stream(site: Site, run_scenario: RunScenario, sdk: str) -> None:
    site.messages.reply = lambda body: Reply(pieces=("one ", "two ", "three"))
    result = run_scenario("stream")
    low, high = result["low"], result["high"]
    assert low["text"] == high["text"] == "one two three"
    assert high["stop"] == ENDED[sdk] and has_usage(high, sdk)
    assert low["requestId"] and high["requestId"] and high["wire"]["model"] == MODEL
    assert low["type"].startswith("text/event-stream")
    if sdk == "anthropic":
        events, kinds = low["events"], [event["type"] for event in low["events"]]
        for order in (kinds, [kind for kind in high["kinds"] if kind != "text"]):
            assert order[:2] == ["message_start", "content_block_start"]
            assert set(order[2:-3]) == {"content_block_delta"}
            assert order[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert {event["index"] for event in events[1:-2]} == {0}
        start, end = events[0]["message"], events[-2]
        # The input tokens are 0 if they are not known yet.
        assert start["content"] == [] and start["stop_reason"] is None
        assert start["usage"]["input_tokens"] in (0, 10)
        assert start["id"].startswith("msg_") and start["model"] == MODEL
        assert end["delta"]["stop_reason"] == "end_turn" and end["delta"]["stop_sequence"] is None
        assert end["usage"]["output_tokens"] == 7
    else:
        for chunks in (low["events"], result["counted"]["events"][:-1]):
            assert [len(chunk["choices"]) for chunk in chunks] == [1] * len(chunks)
            choices = [chunk["choices"][0] for chunk in chunks]
            assert choices[0]["delta"]["role"] == "assistant"
            assert choices[-1]["finish_reason"] == "stop"
            assert {choice["finish_reason"] for choice in choices[:-1]} == {None}
            assert {choice["index"] for choice in choices} == {0}
            assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
            assert not any(chunk.get("usage") for chunk in chunks)
        end = result["counted"]["events"][-1]
        assert end["choices"] == [] and end["usage"] == high["wire"]["usage"]
        assert result["counted"]["text"] == "one two three"
        assert Counter(high["kinds"])["content.done"] == 1
    for call in site.calls():
        assert turn_texts(call.body) == [("user", "hello")] and SYSTEM in system_text(call.body)


def test_image_and_document(site: Site, run_scenario: RunScenario, sdk: str) -> None:
    assert run_scenario("image")["text"] == "Echo: what is this?"
    (call,) = site.calls()
    assert [(block["type"], block.get("source")) for block in blocks(call, "user")] == [
        ("image", {"type": "base64", "media_type": "image/png", "data": PNG}),
        ("image", {"type": "url", "url": IMAGE_URL}),
        ("document", {"type": "base64", "media_type": "application/pdf", "data": PDF}),
        ("text", None),
    ]
    assert not site.messages.outside


def test_json_schema(site: Site, run_scenario: RunScenario, sdk: str) -> None:
    def reply(body: Dict[str, Any]) -> Reply:
        """Use the CLI's own tool, or plain text if only the instructions demand JSON."""
        by_tool = any(tool["name"] == "StructuredOutput" for tool in body.get("tools", []))
        return echo(body) if by_tool else Reply(json.dumps({"answer": last_text(body)}))

    site.messages.reply = reply
    result = run_scenario("schema")
    assert [json.loads(text) for text in result["texts"]] == [{"answer": "forty-two"}] * len(
        result["texts"]
    )
    assert set(result["parsed"]) == {"forty-two"} and set(result["stops"]) == {ENDED[sdk]}
    schemas = [
        tool["input_schema"]
        for call in site.calls()
        for tool in call.body.get("tools", [])
        if tool["name"] == "StructuredOutput"
    ]
    schemas = [schema for schema in schemas if "answer" in schema.get("properties", {})]
    assert all(schema["required"] == ["answer"] for schema in schemas)
    assert len(schemas) >= {"anthropic": 3, "openai": 4}[sdk]


MODEL_CALLS = (("mcp__api__add", {"a": 2, "b": 3}), ("mcp__api__look_up", {"word": "cab"}))


def check_round_trip(site: Site, result: Dict[str, Any], sdk: str) -> None:
    """Check two calls in one turn, their results and the final answer, on both sides."""
    called, ended = result["called"], result["ended"]
    assert called["calls"] == [["add", {"a": 2, "b": 3}], ["look_up", {"word": "cab"}]]
    assert called["stop"] == CALLED[sdk]
    assert len(set(called["ids"])) == 2 and called["text"] in ("", None)
    assert ended["text"] == "done" and ended["stop"] == ENDED[sdk] and not ended["calls"]
    last = site.calls()[-1]
    assert tool_results(last.body) == [
        (False, RESULTS["add"]),
        (sdk == "anthropic", RESULTS["look_up"]),
    ]
    calls = [block for block in blocks(last, "assistant") if block["type"] == "tool_use"]
    assert [(block["name"], block["input"]) for block in calls] == list(MODEL_CALLS)
    assert turn_texts(last.body)[0] == ("user", "go on")
    for call in site.calls():
        tools = {tool["name"].rpartition("__")[2]: tool for tool in call.body["tools"]}
        assert set(tools) == set(TOOLS)
        for name, (description, schema) in TOOLS.items():
            input_schema = tools[name]["input_schema"]
            assert description in tools[name]["description"]
            assert input_schema["properties"] == schema["properties"]
            assert input_schema["required"] == schema["required"]


def test_tools(site: Site, run_scenario: RunScenario, sdk: str) -> None:
    site.messages.reply = calls_tools(*MODEL_CALLS)
    check_round_trip(site, run_scenario("tools"), sdk)


def test_tools_in_a_stream(site: Site, run_scenario: RunScenario, sdk: str) -> None:
    site.messages.reply = calls_tools(*MODEL_CALLS)
    result = run_scenario("tools_stream")
    check_round_trip(site, result, sdk)
    events = result["low"]["events"]
    if sdk == "anthropic":
        starts = {
            event["index"]: event["content_block"]
            for event in events
            if event["type"] == "content_block_start"
        }
        assert [(block["type"], block["name"], block["input"]) for block in starts.values()] == [
            ("tool_use", "add", {}),
            ("tool_use", "look_up", {}),
        ]
        deltas = [event for event in events if event["type"] == "content_block_delta"]
        arguments = {
            index: "".join(e["delta"]["partial_json"] for e in deltas if e["index"] == index)
            for index in starts
        }
        assert "input_json" in result["called"]["kinds"]
        assert events[-2]["delta"]["stop_reason"] == "tool_use"
    else:
        choices = [choice for chunk in events for choice in chunk["choices"]]
        parts = [part for choice in choices for part in choice["delta"].get("tool_calls") or []]
        starts = {part["index"]: part for part in parts if part.get("id")}
        assert [(part["type"], part["function"]["name"]) for part in starts.values()] == [
            ("function", "add"),
            ("function", "look_up"),
        ]
        assert sum(bool(part["function"].get("name")) for part in parts) == 2
        arguments = {
            index: "".join(
                part["function"].get("arguments") or "" for part in parts if part["index"] == index
            )
            for index in starts
        }
        assert result["called"]["kinds"].count("tool_calls.function.arguments.done") == 2
        assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    parsed = {index: json.loads(text) for index, text in arguments.items()}
    assert parsed == {n: args for n, (_, args) in enumerate(MODEL_CALLS)}


def test_a_forced_tool(site: Site, run_scenario: RunScenario, sdk: str) -> None:
    for message in run_scenario("forced_tool"):
        assert message["calls"] == [["give", {"answer": "forty-two"}]]
        assert message["stop"] == CALLED[sdk] and not message["text"]
    assert turn_texts(site.calls()[0].body) == [("user", "forty-two")]
    tools = [tool for tool in site.calls()[0].body["tools"] if tool["name"] == "StructuredOutput"]
    assert [tool["input_schema"]["properties"] for tool in tools] == [ANSWER["properties"]]


REFUSALS = {
    "token": ("AuthenticationError", 401, "authentication_error"),
    "request": ("BadRequestError", 400, "invalid_request_error"),
    "two": ("BadRequestError", 400, "invalid_request_error"),
    "model": ("NotFoundError", 404, "not_found_error"),
}


def is_error_body(body: Any, sdk: str, kind: str) -> bool:
    """Return whether an error has the shape of its API. `openai` gives only the inner object."""
    if sdk == "anthropic":
        error = body["error"]
        return bool(body["type"] == "error" and error["type"] == kind and len(error["message"]) > 5)
    has_fields = {"message", "type", "param", "code"} <= set(body)
    return bool(has_fields and len(body["message"]) > 5 and isinstance(body["type"], str))


def test_errors(site: Site, run_scenario: RunScenario, sdk: str) -> None:
    unknown = Reply("model: nosuch", status=404, error="not_found_error")
    site.messages.reply = lambda body: unknown if body["model"] == "nosuch" else echo(body)
    result = run_scenario("errors")
    for name, (kind, status, error) in REFUSALS.items():
        if name in result:
            outcome = result[name]
            assert (outcome["class"], outcome["status"]) == (kind, status), outcome
            assert outcome["requestId"], outcome
            assert is_error_body(outcome["body"], sdk, error), outcome
    assert ("two" in result) == (sdk == "openai")
    assert "nosuch" in json.dumps(result["model"]["body"])
    assert is_error_body(result["stream"]["body"], sdk, "not_found_error")
    assert result["stream"]["status"] in (404, 200, None)
    assert (result["path"]["class"], result["path"]["status"]) == ("NotFoundError", 404)
    assert {call.body["model"] for call in site.calls()} == {"nosuch"}


def test_models(site: Site, run_scenario: RunScenario, sdk: str) -> None:
    result = run_scenario("models")
    page, listed = result["page"], result["listed"]
    ids = [model["id"] for model in listed]
    assert page["data"] == listed == result["retrieved"] and len(set(ids)) == len(ids) >= 1
    assert result["strict"] == ids and result["first"] == ids[0]
    if sdk == "anthropic":
        assert page["has_more"] is False and result["paged"] == ids
        assert (page["first_id"], page["last_id"]) == (ids[0], ids[-1])
        for model in listed:
            assert model["type"] == "model" and model["display_name"] and model["created_at"]
    else:
        assert page["object"] == "list"
        assert all(model["object"] == "model" and model["owned_by"] for model in listed)
    error = result["nosuch"]
    assert (error["class"], error["status"]) == ("NotFoundError", 404)
    assert is_error_body(error["body"], sdk, "not_found_error")
    assert not site.calls()


def test_asynchronous(site: Site, run_scenario: RunScenario, sdk: str) -> None:
    result = run_scenario("asynchronous")
    whole, stream = result["whole"], result["stream"]
    assert whole["text"] == "Echo: whole" and stream["text"] == "Echo: streamed"
    assert result["models"] and whole["requestId"] and stream["requestId"]
    assert whole["requestId"] != stream["requestId"]
    assert sorted(site.messages.prompts()) == ["streamed", "whole"]


def test_stop(site: Site, run_scenario: RunScenario, sdk: str) -> None:
    """The stop sequence arrives in two deltas, and the client gets neither half of it."""
    site.messages.reply = lambda body: Reply(pieces=("one", " two" + STOP[:2], STOP[2:] + " three"))
    result = run_scenario("stop")
    assert [result[name]["text"] for name in ("whole", "low", "high")] == ["one two"] * 3
    if sdk == "anthropic":
        whole, high = result["whole"]["wire"], result["high"]["wire"]
        for end in (whole, result["low"]["events"][-2]["delta"], high):
            assert (end["stop_reason"], end["stop_sequence"]) == ("stop_sequence", STOP)
    else:
        last_choice = result["low"]["events"][-1]["choices"][0]
        assert result["whole"]["stop"] == result["high"]["stop"] == "stop"
        assert last_choice["finish_reason"] == "stop"


THOUGHT = {"type": "thinking", "thinking": "A hard one.", "signature": "c2ln"}


def test_thinking(site: Site, run_scenario: RunScenario, sdk: str) -> None:
    """The packages check each event, and what they send back reaches the model."""
    site.messages.reply = lambda body: Reply("So.", thinking=(THOUGHT,))
    result = run_scenario("thinking")
    back = [
        block
        for call in site.calls()
        for message in call.body["messages"]
        if message["role"] == "assistant"
        for block in message["content"]
    ]
    assert THOUGHT in back
    asked = [call.body["thinking"]["display"] for call in site.calls()]
    assert set(asked) == {"summarized"}
    if sdk == "anthropic":
        assert result["thoughts"] == [[THOUGHT]] * 2
        return
    assert result["chat"] == ["A hard one."] * 2
    assert [item["summary"][0]["text"] for item in result["items"]] == ["A hard one."] * 2
    assert result["items"][0]["encrypted_content"] == result["items"][1]["encrypted_content"]
    assert result["kinds"][0] == "response.reasoning_summary_part.added"
    assert result["kinds"][-2:] == [
        "response.reasoning_summary_text.done", "response.reasoning_summary_part.done",
    ]
