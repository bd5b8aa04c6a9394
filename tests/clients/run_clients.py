"""Run small scenarios of libraries that people use with /v1; print one JSON line for each.

    python3 -m venv DIR
    DIR/bin/pip install -r tests/clients/requirements.txt
    DIR/bin/pip install --no-deps -r tests/clients/requirements-no-deps.txt
    DIR/bin/python tests/clients/run_clients.py http://localhost:3456 cab-... [CLIENT ...]

It runs in that venv, apart from the tests; test_clients.py starts it over a stand-in of the model,
on whose replies the checks here depend. `codex` and `claude` are programs of the PATH; the packages
of npm have run_clients.mjs. `--table RESULTS` prints the README's table from saved lines; that, and
importing this file, needs only the standard library.

A line: {"client": ..., "version": ..., "scenario": ..., "ok": true, "error": null}
"""

from __future__ import annotations

import asyncio
import base64
import importlib.metadata
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

Line = Dict[str, Any]
Scenario = Callable[["Bridge"], Any]

MODEL = "sonnet"
# pydantic-ai reads from the name what a model can do.
FULL_MODEL = "claude-opus-4-8"
SCENARIO_SECONDS = 60
QUESTION = "What is the weather in Rome?"
WEATHER = "sunny in Rome"
# The clients that are programs, not libraries
PROGRAMS = ("codex", "claude")
# The row of each client in the table
MAKERS = {
    "openai": "OpenAI",
    "openai-agents": "OpenAI",
    "openai (Node)": "OpenAI",
    "@openai/agents": "OpenAI",
    "codex": "OpenAI",
    "anthropic": "Anthropic",
    "@anthropic-ai/sdk": "Anthropic",
    "claude": "Anthropic",
    "langchain-openai": "LangChain",
    "langchain-anthropic": "LangChain",
    "@langchain/openai": "LangChain",
    "@langchain/anthropic": "LangChain",
    "pydantic-ai-slim": "Others",
    "litellm": "Others",
    "instructor": "Others",
    "ai": "Others",
}
# (client, "what is asked: how", the function), in the order of the table
SCENARIOS: List[Tuple[str, str, Scenario]] = []


class TooSlow(BaseException):
    """The time of a scenario is over. No library catches it, because it is no Exception."""


class Bridge:
    """The bridge to ask, as each of the two formats wants its address."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self.token, self.openai_url = url, token, url + "/v1"

    @property
    def openai(self) -> Dict[str, str]:
        return {"base_url": self.openai_url, "api_key": self.token}

    @property
    def anthropic(self) -> Dict[str, str]:
        return {"base_url": self.url, "api_key": self.token}


def scenario(client: str, what: str) -> Callable[[Scenario], Scenario]:
    """Add a function to the scenarios of a client. client: the name of its package."""

    def add(function: Scenario) -> Scenario:
        SCENARIOS.append((client, what, function))
        return function

    return add


def get_weather(city: str) -> str:
    """Return the weather of a city.

    Args:
        city: The name of the city.
    """
    return "sunny in " + city


def answer_model() -> Any:
    """Return the pydantic model of the structured answers."""
    import pydantic

    return pydantic.create_model("Answer", answer=(str, ...))


def check(value: Any, expected: str) -> None:
    """Fail unless the text contains what is expected."""
    assert isinstance(value, str), repr(value)
    assert expected in value, repr(value)


def check_pieces(pieces: List[str], expected: str) -> None:
    """Fail unless the pieces of a stream add up to a text that contains what is expected."""
    assert pieces, "the stream had no text"
    check("".join(pieces), expected)


def noise_png(width: int) -> bytes:
    """Return a square picture of noise, which no compression makes smaller."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    numbers = random.Random(1)
    rows = b"".join(b"\0" + numbers.randbytes(3 * width) for _ in range(width))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, width, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows, 0))
        + chunk(b"IEND", b"")
    )


# --- openai ---


@scenario("openai", "chat: an image of 2 MB")
def openai_image(bridge: Bridge) -> None:
    import openai

    data = noise_png(840)
    assert len(data) > 2_000_000
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is this?"},
    ]
    messages: Any = [{"role": "user", "content": content}]
    client = openai.OpenAI(max_retries=0, **bridge.openai)
    completion = client.chat.completions.create(model=MODEL, messages=messages)
    check(completion.choices[0].message.content, "What is this?")


# --- anthropic ---


def run_tools(bridge: Bridge, **fields: Any) -> Tuple[Any, List[int]]:
    """Let the package call the tool. -> (the runner, the statuses of the answers so far)."""
    import anthropic

    statuses: List[int] = []
    http = anthropic.DefaultHttpxClient(
        event_hooks={"response": [lambda response: statuses.append(response.status_code)]}
    )
    client = anthropic.Anthropic(max_retries=0, http_client=http, **bridge.anthropic)
    runner = client.beta.messages.tool_runner(
        model=MODEL, max_tokens=1000, tools=[anthropic.beta_tool(get_weather)],
        messages=[{"role": "user", "content": QUESTION}], **fields,
    )
    return runner, statuses


@scenario("anthropic", "`tool_runner`: whole, going on without a thread")
def anthropic_tool_runner(bridge: Bridge) -> None:
    runner, statuses = run_tools(bridge)
    check(runner.until_done().content[0].text, WEATHER)
    # Only the first request asks for a thread.
    assert statuses == [400, 200, 200], statuses


@scenario("anthropic", "`tool_runner`: streamed")
def anthropic_tool_runner_streamed(bridge: Bridge) -> None:
    runner, statuses = run_tools(bridge, stream=True)
    messages = []
    for stream in runner:
        for _ in stream:
            pass
        messages.append(stream.get_final_message())
    check(messages[-1].content[0].text, WEATHER)
    assert statuses == [400, 200, 200], statuses


# --- openai-agents ---


def agent(bridge: Bridge, chat: bool = False, **fields: Any) -> Any:
    """Return an agent; by default it uses the Responses API."""
    import agents
    import openai

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(max_retries=0, **bridge.openai)
    kind = agents.OpenAIChatCompletionsModel if chat else agents.OpenAIResponsesModel
    model = kind(model=MODEL, openai_client=client)
    return agents.Agent(name="helper", instructions="Be brief.", model=model, **fields)


def run_agent(chosen: Any, message: str) -> Any:
    import agents

    return asyncio.run(agents.Runner.run(chosen, message))


def weather_tool() -> Any:
    import agents

    return agents.function_tool(get_weather)


@scenario("openai-agents", "Responses (the default): a tool")
def agents_tool(bridge: Bridge) -> None:
    import agents
    import openai

    agents.set_tracing_disabled(True)
    agents.set_default_openai_client(openai.AsyncOpenAI(max_retries=0, **bridge.openai))
    # Neither a model nor an API is chosen.
    chosen = agents.Agent(name="helper", instructions="Be brief.", tools=[weather_tool()])
    check(run_agent(chosen, QUESTION).final_output, WEATHER)


@scenario("openai-agents", "Responses (the default): streamed")
def agents_streamed(bridge: Bridge) -> None:
    import agents

    async def run() -> Tuple[Any, List[str]]:
        result = agents.Runner.run_streamed(agent(bridge, tools=[weather_tool()]), QUESTION)
        pieces = [
            event.data.delta
            async for event in result.stream_events()
            if event.type == "raw_response_event"
            and event.data.type == "response.output_text.delta"
        ]
        return result.final_output, pieces

    output, pieces = asyncio.run(run())
    check(output, WEATHER)
    check_pieces(pieces, WEATHER)


@scenario("openai-agents", "Responses (the default): a tool and an `output_type`")
def agents_output_type(bridge: Bridge) -> None:
    chosen = agent(bridge, tools=[weather_tool()], output_type=answer_model())
    check(run_agent(chosen, QUESTION).final_output.answer, WEATHER)


@scenario("openai-agents", "Responses (the default): `previous_response_id`")
def agents_previous(bridge: Bridge) -> None:
    import agents

    async def run() -> str:
        chosen = agent(bridge, tools=[weather_tool()])
        first = await agents.Runner.run(chosen, QUESTION, auto_previous_response_id=True)
        last = first.last_response_id
        second = await agents.Runner.run(chosen, "And now?", previous_response_id=last)
        return second.final_output

    check(asyncio.run(run()), "And now?")


@scenario("openai-agents", "Responses (the default): a handoff")
def agents_handoff(bridge: Bridge) -> None:
    import agents

    other = agent(bridge, tools=[weather_tool()])
    other.name = "weather"
    first = agents.Agent(name="first", model=other.model, handoffs=[other])
    result = run_agent(first, QUESTION)
    check(result.final_output, WEATHER)
    assert result.last_agent.name == "weather"


@scenario("openai-agents", "chat: a tool")
def agents_chat(bridge: Bridge) -> None:
    chosen = agent(bridge, chat=True, tools=[weather_tool()])
    check(run_agent(chosen, QUESTION).final_output, WEATHER)


# --- langchain ---


def chat_openai(bridge: Bridge, **fields: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=MODEL, max_retries=0, **bridge.openai, **fields)


def chat_responses(bridge: Bridge) -> Any:
    return chat_openai(bridge, use_responses_api=True)


def chat_anthropic(bridge: Bridge) -> Any:
    from langchain_anthropic import ChatAnthropic

    return ChatAnthropic(model=MODEL, max_retries=0, **bridge.anthropic)


def text_of(message: Any) -> str:
    """Return the text of a message or of a chunk."""
    return str(message.text)


def langchain_round_trip(model: Any) -> None:
    """Bind the tool, run its call, and send the history with the result."""
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    bound = model.bind_tools([tool(get_weather)])
    messages: List[Any] = [HumanMessage(QUESTION)]
    called = bound.invoke(messages)
    assert [call["name"] for call in called.tool_calls] == ["get_weather"], called
    messages.append(called)
    for call in called.tool_calls:
        messages.append(ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"]))
    check(text_of(bound.invoke(messages)), WEATHER)


for package, label, make in (
    ("langchain-openai", "`ChatOpenAI`", chat_openai),
    ("langchain-openai", "`ChatOpenAI` by Responses", chat_responses),
    ("langchain-anthropic", "`ChatAnthropic`", chat_anthropic),
):

    @scenario(package, label + ": `invoke`")
    def langchain_invoke(bridge: Bridge, make: Any = make) -> None:
        check(text_of(make(bridge).invoke("hello")), "Echo: hello")

    @scenario(package, label + ": `stream`")
    def langchain_stream(bridge: Bridge, make: Any = make) -> None:
        pieces = [text_of(chunk) for chunk in make(bridge).stream("hello")]
        check_pieces(pieces, "Echo: hello")

    @scenario(package, label + ": `bind_tools`")
    def langchain_tools(bridge: Bridge, make: Any = make) -> None:
        langchain_round_trip(make(bridge))

    @scenario(package, label + ": `with_structured_output`")
    def langchain_output(bridge: Bridge, make: Any = make) -> None:
        for method in ("json_schema", "function_calling"):
            structured = make(bridge).with_structured_output(answer_model(), method=method)
            check(structured.invoke("forty-two").answer, "forty-two")


# --- pydantic-ai ---


def pydantic_model(bridge: Bridge, name: str) -> Any:
    """Return a model of pydantic-ai by the name of its class."""
    if name == "AnthropicModel":
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        return AnthropicModel(FULL_MODEL, provider=AnthropicProvider(**bridge.anthropic))
    from pydantic_ai.models import openai
    from pydantic_ai.providers.openai import OpenAIProvider

    return getattr(openai, name)(MODEL, provider=OpenAIProvider(**bridge.openai))


for name in ("OpenAIResponsesModel", "OpenAIChatModel", "AnthropicModel"):

    @scenario("pydantic-ai-slim", "`%s`: a tool" % name)
    def pydantic_tool(bridge: Bridge, name: str = name) -> None:
        from pydantic_ai import Agent

        result = Agent(pydantic_model(bridge, name), tools=[get_weather]).run_sync(QUESTION)
        check(result.output, WEATHER)

    @scenario("pydantic-ai-slim", "`%s`: streamed" % name)
    def pydantic_streamed(bridge: Bridge, name: str = name) -> None:
        from pydantic_ai import Agent

        chosen = Agent(pydantic_model(bridge, name), tools=[get_weather])

        async def run() -> List[str]:
            async with chosen.run_stream(QUESTION) as result:
                return [piece async for piece in result.stream_text(delta=True)]

        check_pieces(asyncio.run(run()), WEATHER)

    @scenario("pydantic-ai-slim", "`%s`: a tool and an `output_type`" % name)
    def pydantic_output(bridge: Bridge, name: str = name) -> None:
        from pydantic_ai import Agent

        chosen = Agent(
            pydantic_model(bridge, name), tools=[get_weather], output_type=answer_model()
        )
        check(chosen.run_sync(QUESTION).output.answer, WEATHER)

    @scenario("pydantic-ai-slim", "`%s`: `NativeOutput`" % name)
    def pydantic_native(bridge: Bridge, name: str = name) -> None:
        from pydantic_ai import Agent, NativeOutput

        chosen = Agent(pydantic_model(bridge, name), output_type=NativeOutput(answer_model()))
        check(chosen.run_sync("forty-two").output.answer, "forty-two")


# --- litellm ---


def litellm_fields(bridge: Bridge, provider: str) -> Dict[str, Any]:
    url = {"openai": bridge.openai_url, "anthropic": bridge.url}[provider]
    return {
        "model": provider + "/" + MODEL, "api_base": url, "api_key": bridge.token,
        "num_retries": 0, "max_retries": 0,
    }


WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Return the weather of a city.",
        "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        },
    },
}


for provider in ("openai", "anthropic"):

    @scenario("litellm", "`completion` of `%s/`: whole" % provider)
    def litellm_completion(bridge: Bridge, provider: str = provider) -> None:
        import litellm

        messages = [{"role": "user", "content": "hello"}]
        completion = litellm.completion(messages=messages, **litellm_fields(bridge, provider))
        check(completion.choices[0].message.content, "Echo: hello")

    @scenario("litellm", "`completion` of `%s/`: streamed" % provider)
    def litellm_stream(bridge: Bridge, provider: str = provider) -> None:
        import litellm

        messages = [{"role": "user", "content": "hello"}]
        chunks = litellm.completion(
            messages=messages, stream=True, **litellm_fields(bridge, provider)
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        check_pieces(pieces, "Echo: hello")

    @scenario("litellm", "`completion` of `%s/`: a tool" % provider)
    def litellm_tool(bridge: Bridge, provider: str = provider) -> None:
        import litellm

        fields = {"tools": [WEATHER_TOOL], **litellm_fields(bridge, provider)}
        messages: List[Any] = [{"role": "user", "content": QUESTION}]
        called = litellm.completion(messages=messages, **fields).choices[0].message
        messages.append(called)
        for call in called.tool_calls:
            result = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        answer = litellm.completion(messages=messages, **fields)
        check(answer.choices[0].message.content, WEATHER)


@scenario("litellm", "`responses`: whole")
def litellm_responses(bridge: Bridge) -> None:
    import litellm

    response = litellm.responses(input="hello", **litellm_fields(bridge, "openai"))
    check(response.output[0].content[0].text, "Echo: hello")


@scenario("litellm", "`responses`: streamed")
def litellm_responses_streamed(bridge: Bridge) -> None:
    import litellm

    events = litellm.responses(input="hello", stream=True, **litellm_fields(bridge, "openai"))
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    check_pieces(pieces, "Echo: hello")


@scenario("litellm", "`anthropic_messages` of `openai/`: whole")
def litellm_messages(bridge: Bridge) -> None:
    import litellm

    messages = [{"role": "user", "content": "hello"}]
    answer = asyncio.run(
        litellm.anthropic_messages(
            messages=messages, max_tokens=1000, **litellm_fields(bridge, "openai")
        )
    )
    check(answer["content"][0]["text"], "Echo: hello")


# --- instructor ---


def instructor_answer(client: Any, **fields: Any) -> None:
    answer = client.create(
        model=MODEL, response_model=answer_model(), max_retries=0,
        messages=[{"role": "user", "content": "forty-two"}], **fields,
    )
    check(answer.answer, "forty-two")


for mode in ("TOOLS", "JSON_SCHEMA", "RESPONSES_TOOLS"):

    @scenario("instructor", "OpenAI: `%s`" % mode)
    def instructor_openai(bridge: Bridge, mode: str = mode) -> None:
        import instructor
        import openai

        client = openai.OpenAI(max_retries=0, **bridge.openai)
        instructor_answer(instructor.from_openai(client, mode=instructor.Mode[mode]))


@scenario("instructor", "Anthropic: `ANTHROPIC_TOOLS`")
def instructor_anthropic(bridge: Bridge) -> None:
    import anthropic
    import instructor

    client = anthropic.Anthropic(max_retries=0, **bridge.anthropic)
    mode = instructor.Mode.ANTHROPIC_TOOLS
    instructor_answer(instructor.from_anthropic(client, mode=mode), max_tokens=1000)


# --- programs ---


def run_program(folder: Path, *words: str, **environ: str) -> str:
    """Run a program in the folder, with a new folder as its home. -> its output."""
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            words, cwd=str(folder), env={**os.environ, "HOME": home, **environ},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding="utf-8",
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CODEX_CONFIG = """
model = "%s"
model_provider = "bridge"
web_search = "disabled"
[model_providers.bridge]
name = "bridge"
base_url = "%s"
env_key = "OPENAI_API_KEY"
# Both ask other servers.
[analytics]
enabled = false
[features]
plugins = false
"""


@scenario("codex", "`exec`: a command in the shell")
def codex_exec(bridge: Bridge) -> None:
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Path(home, "config.toml").write_text(CODEX_CONFIG % (MODEL, bridge.openai_url))
        output = run_program(
            folder, "codex", "exec", "--skip-git-repo-check",
            "--dangerously-bypass-approvals-and-sandbox", QUESTION,
            CODEX_HOME=home, OPENAI_API_KEY=bridge.token,
        )
        check(output, WEATHER)
        check((folder / "weather.txt").read_text(), WEATHER)


@scenario("claude", "`-p`: `Read` of an image of 2 MB and of a text, `Edit`")
def claude_edit(bridge: Bridge) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "picture.png").write_bytes(noise_png(840))
        (folder / "weather.txt").write_text("It is rainy in Rome.\n")
        output = run_program(
            folder, "claude", "-p", QUESTION, "--model", MODEL, "--allowedTools", "Read,Edit",
            ANTHROPIC_BASE_URL=bridge.url, ANTHROPIC_AUTH_TOKEN=bridge.token,
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        )
        check(output, "It is The file weather.txt has been updated")
        assert (folder / "weather.txt").read_text() == "It is sunny in Rome.\n"


# --- running, and the table ---


def version_of(client: str) -> str:
    """Return the version of an installed library or program."""
    if client not in PROGRAMS:
        return importlib.metadata.version(client)
    output = subprocess.run([client, "--version"], stdout=subprocess.PIPE, encoding="utf-8").stdout
    return re.findall(r"\d+\.\d+\.\d+", output)[0]


def prepare() -> None:
    """Switch off what asks other servers, and remove variables that name another account."""
    for name in list(os.environ):
        if name.startswith(("ANTHROPIC_", "CLAUDE_", "OPENAI_", "LANGCHAIN_", "LANGSMITH_")):
            del os.environ[name]
    os.environ.update(
        LITELLM_LOCAL_MODEL_COST_MAP="True", LITELLM_TELEMETRY="False", LITELLM_LOG="ERROR",
        LANGSMITH_TRACING="false", OPENAI_AGENTS_DISABLE_TRACING="1", OTEL_SDK_DISABLED="true",
        HF_HUB_OFFLINE="1", NO_PROXY="127.0.0.1,localhost",
    )


def end_scenario(number: int, frame: Any) -> None:
    raise TooSlow("it took longer than %d s" % SCENARIO_SECONDS)


def error_of(function: Scenario, bridge: Bridge) -> Optional[str]:
    """Run a scenario within its time. -> what went wrong, if anything did."""
    signal.setitimer(signal.ITIMER_REAL, SCENARIO_SECONDS)
    try:
        function(bridge)
    except (Exception, TooSlow) as error:
        return "%s: %s" % (type(error).__name__, " ".join(str(error).split())[:1000])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def run(bridge: Bridge, clients: List[str]) -> None:
    """Print a line for each scenario of these clients, or of all."""
    prepare()
    signal.signal(signal.SIGALRM, end_scenario)
    for client, what, function in SCENARIOS:
        if not clients or client in clients:
            error = error_of(function, bridge)
            line = {
                "client": client, "version": version_of(client),
                "scenario": what, "ok": error is None, "error": error,
            }
            print(json.dumps(line), flush=True)


def lines_of(path: Path) -> List[Line]:
    """Return the saved lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def rows(lines: List[Line]) -> List[Tuple[str, str]]:
    """Return the README's table: a row for each maker, with what was run and what failed."""
    clients: Dict[Tuple[str, str], Dict[str, List[str]]] = {}
    for line in lines:
        subject, _, manner = line["scenario"].partition(": ")
        subjects = clients.setdefault((line["client"], line["version"]), {})
        subjects.setdefault(subject, []).append(manner + " (**failed**)" * (not line["ok"]))
    makers: Dict[str, List[str]] = {}
    for (client, version), subjects in clients.items():
        cells = ["%s: %s" % (name, ", ".join(parts)) for name, parts in subjects.items()]
        text = "**%s %s** %s" % (client, version, "; ".join(cells))
        makers.setdefault(MAKERS[client], []).append(text)
    return [("Clients", "What was run"), *((name, "<br>".join(m)) for name, m in makers.items())]


def main(arguments: List[str]) -> None:
    if arguments[:1] == ["--table"]:
        head, *others = rows(lines_of(Path(arguments[1])))
        for row in (head, ("---",) * len(head), *others):
            print("| %s |" % " | ".join(row))
    else:
        url, token, *clients = arguments
        run(Bridge(url, token), clients)


if __name__ == "__main__":
    main(sys.argv[1:])
