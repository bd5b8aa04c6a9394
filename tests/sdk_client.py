"""Run one scenario of the official `openai` or `anthropic` package; print the result as JSON.

    python3 -m venv DIR && DIR/bin/pip install openai anthropic
    DIR/bin/python tests/sdk_client.py anthropic-chat http://localhost:3456 cab-...

It runs in that venv, apart from the tests; test_sdks.py starts it and checks its output. The
packages build their objects from any JSON. Here every answer, event and chunk must match its type
by pydantic's strict rules; otherwise the program ends with a traceback.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import itertools
import json
import re
import struct
import sys
import zlib
from typing import Any, Callable, Dict, List, Tuple

MODEL = "claude-opus-4-8"
SYSTEM = "You are the keeper of a lighthouse."
TURNS = (
    ("user", "one"),
    ("assistant", "two"),
    ("user", "three"),
    ("assistant", "four"),
    ("user", "five"),
)
ANSWER = {
    "type": "object",
    "properties": {"answer": {"type": "string"}},
    "required": ["answer"],
    "additionalProperties": False,
}
NUMBERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
WORD = {
    "type": "object",
    "properties": {"word": {"type": "string"}},
    "required": ["word"],
    "additionalProperties": False,
}
TOOLS = {"add": ("Adds two numbers.", NUMBERS), "look_up": ("Looks a word up.", WORD)}
RESULTS = {"add": "5", "look_up": "no such word"}
STOP = "<END>"
IMAGE_URL = "https://pictures.example/lighthouse.png"
# The longest list of models that is read, in case a server's list has no end.
MAX_MODELS = 200


def png() -> bytes:
    """Return a picture of one red pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0\xff\0\0"))
        + chunk(b"IEND", b"")
    )


def pdf() -> bytes:
    """Return a document of one empty page."""
    parts = (
        b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>",
    )
    data, offsets = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        offsets.append(len(data))
        data += b"%d 0 obj%sendobj\n" % (number, part)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return data + (
        b"xref\n0 4\n0000000000 65535 f \n%strailer<</Size 4/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n"
        % (table, len(data))
    )


PNG, PDF = (base64.b64encode(data).decode() for data in (png(), pdf()))


def events(text: str) -> List[Tuple[str, str]]:
    """Return (name, data) of each event of a stream, without comments, pings and `[DONE]`."""
    parsed = []
    for part in text.replace("\r\n", "\n").split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in part.split("\n"))
        if "data" in fields and fields.get("event") != "ping" and fields["data"] != "[DONE]":
            parsed.append((fields.get("event", ""), fields["data"]))
    return parsed


class Sdk:
    """One package, and two clients of it.

    checked: this class checks the bytes of a response before the package reads them.
    strict: the package itself checks each object while it reads the response.
    """

    def __init__(self, name: str, kind: str, url: str, token: str) -> None:
        self.sdk: Any = importlib.import_module(name)
        self.pydantic: Any = importlib.import_module("pydantic")
        self.Answer: Any = self.pydantic.create_model("Answer", answer=(str, ...))
        self.options: Dict[str, Any] = {
            "base_url": url,
            "api_key": token,
            "max_retries": 0,
            "timeout": 60.0,
        }
        self.kind = getattr(self.sdk, kind)
        self.asynchronous_kind = getattr(self.sdk, "Async" + kind)
        hooks = {"response": [self.check_response]}
        self.checked = self.kind(
            **self.options, http_client=self.sdk.DefaultHttpxClient(event_hooks=hooks)
        )
        self.strict = self.kind(**self.options, _strict_response_validation=True)
        # The type of each answer by path, and of each event by path + " events".
        self.types: Dict[str, Any] = {}
        # The body of the last checked response.
        self.last_body = ""

    def check_response(self, response: Any) -> None:
        """Read a response to its end and check its JSON, before the package makes an int of "1"."""
        self.last_body = response.read().decode()
        path = re.sub("(/models/|/responses/resp_).+", r"\1ID", response.url.path)
        if response.status_code == 200 and "event-stream" not in response.headers["content-type"]:
            self.check_json(self.last_body, self.types[path])
        elif response.status_code == 200:
            for name, data in events(self.last_body):
                if "error" not in json.loads(data):
                    event = self.check_json(data, self.types[path + " events"])
                    assert name == event.get("type", ""), (name, data)

    def check_json(self, body: str, kind: Any) -> Any:
        """Check a body against its type. -> the parsed JSON."""
        self.pydantic.TypeAdapter(kind).validate_json(body, strict=True)
        return json.loads(body)

    def check_object(self, result: Any, kind: Any) -> Any:
        """Check an object that the package made, perhaps from several events. -> its JSON."""
        return self.check_json(result.to_json(indent=None, warnings=False), kind)

    def expect_error(self, call: Callable[[], Any]) -> Dict[str, Any]:
        """Return a description of the error that the call must raise."""
        try:
            call()
        except self.sdk.APIError as error:
            return {
                "class": type(error).__name__,
                "status": getattr(error, "status_code", None),
                "message": error.message,
                "body": error.body,
                "requestId": getattr(error, "request_id", None),
            }
        raise AssertionError("the call raised no error")

    def models(self) -> Any:
        listed = [
            json.loads(model.to_json())
            for model in itertools.islice(self.checked.models.list(), MAX_MODELS)
        ]
        return {
            "page": json.loads(self.last_body),
            "listed": listed,
            "strict": [
                model.id for model in itertools.islice(self.strict.models.list(), MAX_MODELS)
            ],
            "retrieved": [
                json.loads(self.checked.models.retrieve(model["id"]).to_json()) for model in listed
            ],
            "first": self.strict.models.retrieve(listed[0]["id"]).id,
            "nosuch": self.expect_error(lambda: self.strict.models.retrieve("nosuch")),
        }

    def asynchronous(self) -> Any:
        return asyncio.run(self.run_concurrently())

    async def run_concurrently(self) -> Any:
        raise NotImplementedError

    def tools(self) -> Any:
        def ask(**fields: Any) -> Any:
            answer = self.ask(self.checked, **fields)
            return answer, self.summary(answer)

        return self.round_trip(ask)

    def tools_stream(self) -> Any:
        """Run the round trip in streams, and one stream whose calls never get a result."""
        return {
            "low": self.low(content="go on", tools=self.tool_definitions),
            **self.round_trip(self.high),
        }

    def forced_tool(self) -> Any:
        whole = self.summary(self.ask(self.checked, content="forty-two", **self.forced_tool_fields))
        return [whole, self.high(content="forty-two", **self.forced_tool_fields)[1]]


class OverAnthropic(Sdk):
    """The scenarios, with the package `anthropic`."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__("anthropic", "Anthropic", url, token)
        types = self.sdk.types
        self.Message, self.Event = types.Message, types.RawMessageStreamEvent
        self.types = {
            "/v1/messages": self.Message,
            "/v1/messages events": self.Event,
            "/v1/models/ID": types.ModelInfo,
            "/v1/models": importlib.import_module("anthropic.pagination").SyncPage[types.ModelInfo],
        }
        self.tool_definitions = [
            {"name": name, "description": description, "input_schema": schema}
            for name, (description, schema) in TOOLS.items()
        ]
        self.answer_format = {
            "output_config": {"format": {"type": "json_schema", "schema": ANSWER}}
        }
        self.forced_tool_fields = {
            "tools": [{"name": "give", "description": "Gives the answer.", "input_schema": ANSWER}],
            "tool_choice": {"type": "tool", "name": "give"},
        }

    def fields(self, content: Any = "hello", **fields: Any) -> Dict[str, Any]:
        """Return the fields of a request. content: of its only turn, unless `messages` is given."""
        return {
            "model": MODEL,
            "max_tokens": 1000,
            "messages": [{"role": "user", "content": content}],
            **fields,
        }

    def ask(self, client: Any, **fields: Any) -> Any:
        return client.messages.create(**self.fields(**fields))

    def summary(self, message: Any, request: Any = None) -> Dict[str, Any]:
        """Describe a complete message. request: the request id, if the message was streamed."""
        body = self.check_object(message, self.Message)
        texts = [block["text"] for block in body["content"] if block["type"] == "text"]
        calls = [block for block in body["content"] if block["type"] == "tool_use"]
        return {
            "wire": body,
            "text": "".join(texts),
            "calls": [(call["name"], call["input"]) for call in calls],
            "ids": [call["id"] for call in calls],
            "stop": body["stop_reason"],
            "requestId": request or message._request_id,
        }

    def low(self, **fields: Any) -> Dict[str, Any]:
        """Read a stream event by event. -> its events and text."""
        with self.checked.messages.create(stream=True, **self.fields(**fields)) as stream:
            objects = [self.check_object(event, self.Event) for event in stream]
            wire_events = [json.loads(data) for _, data in events(self.last_body)]
            assert [event["type"] for event in objects] == [event["type"] for event in wire_events]
            return self.streamed(wire_events, stream)

    def streamed(self, wire_events: List[Any], stream: Any) -> Dict[str, Any]:
        deltas = [event["delta"] for event in wire_events if event["type"] == "content_block_delta"]
        return {
            "events": wire_events,
            "text": "".join(delta["text"] for delta in deltas if delta["type"] == "text_delta"),
            "requestId": stream.response.headers.get("request-id"),
            "type": stream.response.headers.get("content-type"),
        }

    def high(self, **fields: Any) -> Any:
        """Read a stream with the package's helper. -> (the final message, its description)."""
        with self.strict.messages.stream(**self.fields(**fields)) as stream:
            kinds = [event.type for event in stream]
            message = stream.get_final_message()
            return message, {"kinds": kinds, **self.summary(message, stream.request_id)}

    def chat(self) -> Any:
        return [
            self.summary(self.ask(client, system=SYSTEM)) for client in (self.checked, self.strict)
        ]

    def conversation(self) -> Any:
        turns = [
            {"role": role, "content": [{"type": "text", "text": text}] if text == "three" else text}
            for role, text in TURNS
        ]
        system = [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}]
        return self.summary(self.ask(self.strict, system=system, messages=turns))

    def stream(self) -> Any:
        return {"low": self.low(system=SYSTEM), "high": self.high(system=SYSTEM)[1]}

    def image(self) -> Any:
        return self.summary(
            self.ask(
                self.strict,
                content=[
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": PNG},
                    },
                    {"type": "image", "source": {"type": "url", "url": IMAGE_URL}},
                    {
                        "type": "document",
                        "source": {"type": "base64", "media_type": "application/pdf", "data": PDF},
                    },
                    {"type": "text", "text": "what is this?"},
                ],
            )
        )

    def schema(self) -> Any:
        whole = self.summary(self.ask(self.checked, content="forty-two", **self.answer_format))
        streamed = self.low(content="forty-two", **self.answer_format)
        parsed = self.strict.messages.parse(output_format=self.Answer, **self.fields("forty-two"))
        parsed_summary = self.summary(parsed, "-")
        return {
            "texts": [whole["text"], streamed["text"], parsed_summary["text"]],
            "parsed": [parsed.parsed_output.answer],
            "stops": [whole["stop"], parsed_summary["stop"]],
        }

    def thinking(self) -> Any:
        """Ask for thoughts, whole and streamed, and send them back."""
        fields: Dict[str, Any] = {"thinking": {"type": "adaptive"}}
        whole = self.ask(self.checked, content="one", **fields)
        message, _ = self.high(content="one", **fields)
        turns = [
            {"role": "user", "content": "one"}, {"role": "assistant", "content": message.content},
            {"role": "user", "content": "two"},
        ]
        self.ask(self.strict, messages=turns, system=SYSTEM, **fields)
        self.low(content="one", **fields)
        dumped = [[block.to_dict() for block in m.content] for m in (whole, message)]
        return {"thoughts": [blocks[:-1] for blocks in dumped]}

    def round_trip(self, ask: Callable[..., Any]) -> Any:
        """Get two tool calls in one turn, and send both results in one message.

        ask(...) -> (a message, its description)
        """
        turns: List[Any] = [{"role": "user", "content": "go on"}]
        called, summary = ask(messages=turns, tools=self.tool_definitions)
        results: Dict[str, Dict[str, Any]] = {
            "add": {"content": RESULTS["add"]},
            "look_up": {
                "content": [{"type": "text", "text": RESULTS["look_up"]}],
                "is_error": True,
            },
        }
        result_blocks = [
            {"type": "tool_result", "tool_use_id": block.id, **results[block.name]}
            for block in called.content
            if block.type == "tool_use"
        ]
        turns += [
            {"role": "assistant", "content": called.content},
            {"role": "user", "content": result_blocks},
        ]
        return {"called": summary, "ended": ask(messages=turns, tools=self.tool_definitions)[1]}

    def errors(self) -> Any:
        unauthorized = self.kind(**{**self.options, "api_key": "cab-nobody"})
        return {
            "token": self.expect_error(lambda: self.ask(unauthorized)),
            "request": self.expect_error(lambda: self.ask(self.checked, messages=[])),
            "model": self.expect_error(lambda: self.ask(self.checked, model="nosuch")),
            "stream": self.expect_error(lambda: self.low(model="nosuch")),
            "path": self.expect_error(lambda: self.checked.get("/v1/nosuch", cast_to=object)),
        }

    def models(self) -> Any:
        """Also list page by page: the list is the same whether or not the server obeys `limit`."""
        result = super().models()
        return {
            **result,
            "paged": [
                model.id for model in itertools.islice(self.strict.models.list(limit=1), MAX_MODELS)
            ],
        }

    async def run_concurrently(self) -> Any:
        async with self.asynchronous_kind(
            **self.options, _strict_response_validation=True
        ) as client:

            async def streamed() -> Any:
                stream = await client.messages.create(stream=True, **self.fields("streamed"))
                return self.streamed(
                    [self.check_object(event, self.Event) async for event in stream], stream
                )

            whole, stream = await asyncio.gather(
                client.messages.create(**self.fields("whole")), streamed()
            )
            return {
                "whole": self.summary(whole),
                "stream": stream,
                "models": [model.id async for model in client.models.list()],
            }

    def stop(self) -> Any:
        stop_sequences = {"stop_sequences": ["<OTHER>", STOP]}
        return {
            "whole": self.summary(self.ask(self.checked, **stop_sequences)),
            "low": self.low(**stop_sequences),
            "high": self.high(**stop_sequences)[1],
        }


class OverOpenAI(Sdk):
    """The scenarios, with the package `openai`."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__("openai", "OpenAI", url + "/v1", token)
        types, chat = (
            importlib.import_module("openai.types"),
            importlib.import_module("openai.types.chat"),
        )
        self.Completion, self.Chunk = chat.ChatCompletion, chat.ChatCompletionChunk
        responses = importlib.import_module("openai.types.responses")
        self.Response, self.ResponseEvent = responses.Response, responses.ResponseStreamEvent
        self.types = {
            "/v1/chat/completions": self.Completion,
            "/v1/chat/completions events": self.Chunk,
            "/v1/responses": self.Response,
            "/v1/responses events": self.ResponseEvent,
            "/v1/responses/resp_ID": self.pydantic.JsonValue,
            "/v1/responses/input_tokens": importlib.import_module(
                "openai.types.responses.input_token_count_response"
            ).InputTokenCountResponse,
            "/v1/models/ID": types.Model,
            "/v1/models": importlib.import_module("openai.pagination").SyncPage[types.Model],
        }
        self.tool_definitions = [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": description,
                    "parameters": schema,
                    "strict": True,
                },
            }
            for name, (description, schema) in TOOLS.items()
        ]
        give = {"name": "give", "description": "Gives the answer.", "parameters": ANSWER}
        self.forced_tool_fields = {
            "tools": [{"type": "function", "function": give}],
            "tool_choice": {"type": "function", "function": {"name": "give"}},
        }

    def fields(self, content: Any = "hello", system: str = "", **fields: Any) -> Dict[str, Any]:
        """Return the fields of a request. content: of its only turn, unless `messages` is given."""
        instructions = [{"role": "system", "content": system}] if system else []
        return {
            "model": MODEL,
            "messages": [*instructions, {"role": "user", "content": content}],
            **fields,
        }

    def ask(self, client: Any, **fields: Any) -> Any:
        return client.chat.completions.create(**self.fields(**fields))

    def summary(self, completion: Any, request: Any = None) -> Dict[str, Any]:
        """Describe a complete completion. request: the request id, if it was streamed."""
        body = self.check_object(completion, self.Completion)
        (choice,) = body["choices"]
        calls = choice["message"].get("tool_calls") or []
        return {
            "wire": body,
            "text": choice["message"]["content"],
            "ids": [call["id"] for call in calls],
            "calls": [
                (call["function"]["name"], json.loads(call["function"]["arguments"]))
                for call in calls
            ],
            "stop": choice["finish_reason"],
            "requestId": request or completion._request_id,
        }

    def low(self, **fields: Any) -> Dict[str, Any]:
        """Read a stream chunk by chunk. -> its chunks and text."""
        with self.checked.chat.completions.create(stream=True, **self.fields(**fields)) as stream:
            count = sum(1 for _ in stream)
            wire_events = [json.loads(data) for _, data in events(self.last_body)]
            assert count == len(wire_events) and self.last_body.rstrip().endswith("data: [DONE]")
            return self.streamed(wire_events, stream)

    def streamed(self, wire_events: List[Any], stream: Any) -> Dict[str, Any]:
        deltas = [choice["delta"] for chunk in wire_events for choice in chunk["choices"]]
        return {
            "events": wire_events,
            "text": "".join(delta.get("content") or "" for delta in deltas),
            "requestId": stream.response.headers.get("x-request-id"),
            "type": stream.response.headers.get("content-type"),
        }

    def high(self, **fields: Any) -> Any:
        """Read a stream with the package's helper. -> (the final completion, its description)."""
        fields = {"stream_options": {"include_usage": True}, **self.fields(**fields)}
        with self.strict.chat.completions.stream(**fields) as stream:
            kinds = [event.type for event in stream]
            completion = stream.get_final_completion()
            return completion, {"kinds": kinds, **self.summary(completion, "-")}

    def chat(self) -> Any:
        return [
            self.summary(self.ask(client, system=SYSTEM)) for client in (self.checked, self.strict)
        ]

    def conversation(self) -> Any:
        turns = [
            {"role": role, "content": [{"type": "text", "text": text}] if text == "three" else text}
            for role, text in TURNS
        ]
        return self.summary(
            self.ask(self.strict, messages=[{"role": "developer", "content": SYSTEM}, *turns])
        )

    def stream(self) -> Any:
        return {
            "low": self.low(system=SYSTEM),
            "high": self.high(system=SYSTEM)[1],
            "counted": self.low(system=SYSTEM, stream_options={"include_usage": True}),
        }

    def image(self) -> Any:
        return self.summary(
            self.ask(
                self.strict,
                content=[
                    {
                        "type": "image_url",
                        "image_url": {"url": "data:image/png;base64," + PNG, "detail": "low"},
                    },
                    {"type": "image_url", "image_url": {"url": IMAGE_URL}},
                    {
                        "type": "file",
                        "file": {
                            "filename": "empty.pdf",
                            "file_data": "data:application/pdf;base64," + PDF,
                        },
                    },
                    {"type": "text", "text": "what is this?"},
                ],
            )
        )

    def schema(self) -> Any:
        named = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": ANSWER, "strict": True},
        }
        whole = self.summary(self.ask(self.checked, content="forty-two", response_format=named))
        streamed = self.low(content="forty-two", response_format=named)
        parsed = self.strict.chat.completions.parse(
            response_format=self.Answer, **self.fields("forty-two")
        )
        parsed_summary = self.summary(parsed)
        final, final_summary = self.high(content="forty-two", response_format=self.Answer)
        json_object = self.summary(
            self.ask(
                self.checked, content="forty-two", system="Answer in JSON.",
                response_format={"type": "json_object"},
            )
        )
        return {
            "texts": [
                summary["text"]
                for summary in (whole, streamed, parsed_summary, final_summary, json_object)
            ],
            "parsed": [
                completion.choices[0].message.parsed.answer for completion in (parsed, final)
            ],
            "stops": [
                summary["stop"] for summary in (whole, parsed_summary, final_summary, json_object)
            ],
        }

    def round_trip(self, ask: Callable[..., Any]) -> Any:
        """Get two tool calls in one turn, and send each result in a message of its own.

        ask(...) -> (a completion, its description)
        """
        turns: List[Any] = [{"role": "user", "content": "go on"}]
        called, summary = ask(messages=turns, tools=self.tool_definitions)
        message = called.choices[0].message
        turns += [
            message,
            *(
                {"role": "tool", "tool_call_id": call.id, "content": RESULTS[call.function.name]}
                for call in message.tool_calls or []
            ),
        ]
        return {"called": summary, "ended": ask(messages=turns, tools=self.tool_definitions)[1]}

    def errors(self) -> Any:
        unauthorized = self.kind(**{**self.options, "api_key": "cab-nobody"})
        return {
            "token": self.expect_error(lambda: self.ask(unauthorized)),
            "request": self.expect_error(lambda: self.ask(self.checked, messages=[])),
            "model": self.expect_error(lambda: self.ask(self.checked, model="nosuch")),
            "stream": self.expect_error(lambda: self.low(model="nosuch")),
            "path": self.expect_error(lambda: self.checked.get("/nosuch", cast_to=object)),
            "two": self.expect_error(lambda: self.ask(self.checked, n=2)),
        }

    async def run_concurrently(self) -> Any:
        async with self.asynchronous_kind(
            **self.options, _strict_response_validation=True
        ) as client:

            async def streamed() -> Any:
                stream = await client.chat.completions.create(
                    stream=True, **self.fields("streamed")
                )
                return self.streamed(
                    [self.check_object(chunk, self.Chunk) async for chunk in stream], stream
                )

            whole, stream = await asyncio.gather(
                client.chat.completions.create(**self.fields("whole")), streamed()
            )
            return {
                "whole": self.summary(whole),
                "stream": stream,
                "models": [model.id async for model in client.models.list()],
            }

    def stop(self) -> Any:
        return {
            "whole": self.summary(self.ask(self.checked, stop=STOP)),
            "low": self.low(stop=["<OTHER>", STOP]),
            "high": self.high(stop=[STOP])[1],
        }

    # --- /v1/responses ---

    def response_summary(self, response: Any) -> Dict[str, Any]:
        """Describe a complete response."""
        body = self.check_object(response, self.Response)
        calls = [item for item in body["output"] if "call_id" in item]
        return {
            "wire": body,
            "text": response.output_text,
            "calls": [
                (call["name"], call.get("input") or json.loads(call["arguments"]))
                for call in calls
            ],
            "ids": [call["call_id"] for call in calls],
            "stop": body["status"],
        }

    def response_events(self, **fields: Any) -> Dict[str, Any]:
        """Read a stream event by event, whose types are checked. -> its kinds, and the end."""
        with self.checked.responses.create(model=MODEL, stream=True, **fields) as stream:
            objects = [event for event in stream]
        wire_events = [json.loads(data) for _, data in events(self.last_body)]
        assert [event.type for event in objects] == [event["type"] for event in wire_events]
        assert self.pydantic.TypeAdapter(List[self.ResponseEvent]).validate_json(
            json.dumps(wire_events), strict=True
        )
        return {
            "kinds": [event["type"] for event in wire_events],
            **self.response_summary(objects[-1].response),
        }

    def response_high(self, **fields: Any) -> Any:
        """Read a stream with the package's helper. -> (the response, its description)."""
        with self.strict.responses.stream(model=MODEL, **fields) as stream:
            kinds = [event.type for event in stream]
            response = stream.get_final_response()
            return response, {"kinds": kinds, **self.response_summary(response)}

    def thinking(self) -> Any:
        """Ask for thoughts in both formats, whole and streamed, and send them back."""
        whole = self.ask(self.strict, content="one", reasoning_effort="low")
        message = whole.choices[0].message
        streamed = self.low(content="one", reasoning_effort="low")["events"]
        deltas = [choice["delta"] for chunk in streamed for choice in chunk["choices"]]
        texts = "".join(delta.get("reasoning_content") or "" for delta in deltas)
        fields: Dict[str, Any] = {"reasoning": {"summary": "auto"}}
        response = self.checked.responses.create(model=MODEL, input="one", **fields)
        turns = [{"role": "user", "content": "one"}, *response.output,
                 {"role": "user", "content": "two"}]
        self.checked.responses.create(model=MODEL, input=turns, instructions=SYSTEM, **fields)
        kinds = self.response_events(input="one", **fields)["kinds"]
        final, _ = self.response_high(input="one", **fields)
        items = [item.to_dict() for item in (response.output[0], final.output[0])]
        return {
            "chat": [message.reasoning_content, texts], "items": items,
            "kinds": [kind for kind in kinds if "reasoning" in kind],
        }

    def responses(self) -> Any:
        create = self.checked.responses.create
        first = create(model=MODEL, input="hello", instructions=SYSTEM, metadata={"a": "b"})
        second = self.strict.responses.create(
            model="gpt-5.2", input="again", previous_response_id=first.id
        )
        retrieved = self.strict.responses.retrieve(second.id)
        assert self.response_summary(retrieved) == self.response_summary(second)
        self.strict.responses.delete(second.id)
        counted = self.checked.responses.input_tokens.count(model=MODEL, input="x" * 35)
        image = {"type": "input_image", "detail": "low", "image_url": IMAGE_URL}
        pictured = create(
            model=MODEL,
            input=[{"role": "user", "content": [image, {"type": "input_text", "text": "see"}]}],
        )
        return {
            "first": self.response_summary(first),
            "second": self.response_summary(second),
            "pictured": self.response_summary(pictured),
            "counted": counted.input_tokens,
            "low": self.response_events(input="hello"),
            "high": self.response_high(input="hello")[1],
            "gone": self.expect_error(lambda: self.strict.responses.retrieve(second.id)),
            "lost": self.expect_error(
                lambda: self.strict.responses.create(
                    model=MODEL, input="x", previous_response_id=second.id
                )
            ),
            "hosted": self.expect_error(
                lambda: create(model=MODEL, input="x", tools=[{"type": "web_search"}])
            ),
        }

    def responses_schema(self) -> Any:
        parsed = self.strict.responses.parse(
            model=MODEL, input="forty-two", text_format=self.Answer
        )
        final, summary = self.response_high(input="forty-two", text_format=self.Answer)
        return {
            "parsed": [response.output_parsed.answer for response in (parsed, final)],
            "texts": [parsed.output_text, summary["text"]],
        }

    def responses_tools(self) -> Any:
        """Run three round trips: by items, by the previous response, and with a custom tool."""
        tools = [
            {"type": "function", **tool["function"]} for tool in self.tool_definitions
        ]
        custom = {"type": "custom", "name": "add", "description": "Adds."}
        turns: List[Any] = [{"role": "user", "content": "go on"}]
        called = self.checked.responses.create(model=MODEL, input=turns, tools=tools, store=False)
        ended = self.checked.responses.create(
            model=MODEL, input=[*turns, *called.output, *self.outputs(called)], tools=tools,
            store=False,
        )
        final, streamed = self.response_high(input=turns, tools=tools)
        return {
            "called": self.response_summary(called),
            "ended": self.response_summary(ended),
            "low": self.response_events(input=turns, tools=tools),
            "streamed": streamed,
            "continued": self.response_high(
                input=self.outputs(final), tools=tools, previous_response_id=final.id
            )[1],
            "custom": self.response_events(input=turns, tools=[custom, tools[1]]),
        }

    def outputs(self, response: Any) -> List[Any]:
        """Return the results of the calls in a response."""
        return [
            {
                "type": "function_call_output", "call_id": item.call_id,
                "output": RESULTS[item.name],
            }
            for item in response.output
            if item.type == "function_call"
        ]


def main(scenario: str, url: str, token: str) -> None:
    """Run a scenario: a package and a method of its class, as in anthropic-tools_stream."""
    package, _, name = scenario.partition("-")
    sdk = {"anthropic": OverAnthropic, "openai": OverOpenAI}[package](url, token)
    print(json.dumps(getattr(sdk, name)()))


if __name__ == "__main__":
    main(*sys.argv[1:])
